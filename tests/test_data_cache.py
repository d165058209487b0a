"""data_cache.py: rows that are computed once, read again by memory map, and never paired wrongly."""

import logging
import os
import subprocess
import sys
import warnings
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minimuse import data_cache
from minimuse.data_cache import HELD_OUT, Decimated, Rows, Subset, Texts, TrainingData, tokenize_images
from minimuse.data_captions import EXAMPLE_PROMPTS, Example, vocabulary
from minimuse.data_sources import FolderDataset, SceneDataset
from minimuse.text import Context, TextEncoder, pad_contexts
from minimuse.utils import area_downsample, to_pil

SIDE = 64
SIZES = (3, 0, 5, 2)  # rows of the parts in the tests of files


# --- files ------------------------------------------------------------------------------------------------------------


def make_rows(part, record):
    """Rows (i, 10 i) of all parts in order, in pieces of up to 2."""
    first = sum(SIZES[:part])
    numbers = range(first, first + SIZES[part])
    record |= {"names": [f"{i}.png" for i in numbers], "captions": [(f"number {i}",) for i in numbers]}
    for start in range(0, len(numbers), 2):
        yield torch.tensor([[i, 10 * i] for i in numbers[start : start + 2]], dtype=torch.int16)


def filled(folder: Path, **options) -> Rows:
    rows = Rows(folder, len(SIZES), **options)
    deque(rows.fill(make_rows), maxlen=0)
    return rows


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_all_rows_come_back_in_order(tmp_path):
    rows = filled(tmp_path)
    assert rows[:].tolist() == [[i, 10 * i] for i in range(10)]
    assert rows[:1].dtype == torch.long, "tokens as models read them"
    assert [text for record in rows.records() for text in record["captions"]] == [[f"number {i}"] for i in range(10)]
    before = tree(tmp_path)
    assert list(rows.fill(make_rows)) == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)], "it says where it stands"
    assert tree(tmp_path) == before, "nothing is made twice"


@settings(deadline=None, max_examples=30)
@given(at=st.lists(st.integers(0, 9), max_size=20), handles=st.integers(1, 3))
def test_indexing_is_that_of_one_array(tmp_path_factory, at, handles):
    folder = tmp_path_factory.getbasetemp() / "indexing"
    data_cache.OPEN, opened = handles, data_cache.OPEN
    try:
        rows = filled(folder)
    finally:
        data_cache.OPEN = opened
    assert rows[torch.tensor(at, dtype=torch.long)].tolist() == [[i, 10 * i] for i in at]
    assert rows.load.cache_info().currsize <= handles, "few files stay open"
    got = rows[[0]]
    got[:] = 77
    assert rows[[0]].tolist() == [[0, 0]], "rows are copies"


@pytest.mark.parametrize("wrong", [[10], [-1], [[1]], 3])
def test_what_is_no_list_of_rows_is_refused(tmp_path, wrong):
    with pytest.raises(IndexError, match="expected a list of numbers from 0 to 9"):
        filled(tmp_path)[wrong]


@pytest.mark.parametrize("limit", [1, 3, 4, 9, 10, 50])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_share_the_parts(tmp_path, limit, order):
    rows = Rows(tmp_path, 4, limit)
    with pytest.raises(ValueError, match=r"there is no .*00000.safetensors; it was not computed yet"):
        len(rows)
    for rank in order:
        deque(rows.fill(make_rows, rank, 2), maxlen=0)
    n = 3 if limit == 4 else min(limit, 10)  # the first process has its half of 4 with part 0
    assert rows[:].tolist() == [[i, 10 * i] for i in range(n)], "whoever comes first"


def test_a_limit_spares_the_rest(tmp_path):
    rows = filled(tmp_path, limit=3)
    assert [rows.record(part) is None for part in range(4)] == [False, True, True, True]
    assert len(filled(tmp_path, limit=9)) == 9, "a larger limit adds to what is there"


KILLED = """
import os, sys
from pathlib import Path
import torch
from minimuse import utils
from minimuse.data_cache import Rows

calls, rename = 0, os.replace
def killed(*paths):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os._exit(9)
    rename(*paths)
utils.os.replace = killed

def make(part, record):
    record["names"] = ["a", "b"]
    for i in range(2):
        yield torch.full((1, 2), 2 * part + i)
list(Rows(Path(sys.argv[1]), 3).fill(make))
"""


def test_killed_at_any_moment_then_resumed(tmp_path):
    """One rename per part. What is not finished is made again, the rest is kept, and nothing else stays."""
    for call, finished in ((1, 0), (3, 2)):  # the second continues where the first was killed
        command = [sys.executable, "-c", KILLED, tmp_path, str(call)]
        assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 9
        rows = Rows(tmp_path, 3)
        assert [part for part in range(3) if rows.record(part)] == list(range(finished))
        kept = {name: stat for name, stat in tree(tmp_path).items() if name.endswith(".safetensors")}

    def rest(part, record):
        record["names"] = ["a", "b"]
        yield torch.tensor([[2 * part] * 2, [2 * part + 1] * 2])

    deque(rows.fill(rest), maxlen=0)
    assert rows[:].tolist() == [[i, i] for i in range(6)]
    assert all(tree(tmp_path)[name] == stat for name, stat in kept.items()), "finished parts are kept"
    assert len(tree(tmp_path)) == 3, "what a killed process left is removed"


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: c[:-1], lambda c: b"no file", lambda c: b""])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = filled(tmp_path).paths[2]
    path.write_bytes(damage(path.read_bytes()))
    for use in (lambda: Rows(tmp_path, 4)[:], lambda: filled(tmp_path)):
        with pytest.raises(ValueError, match=r"00002.safetensors is damaged .*delete it to compute it again"):
            use()
    path.unlink()
    assert len(filled(tmp_path)) == 10


def test_a_full_disk(tmp_path, monkeypatch):
    save = data_cache.save_file

    def full(tensors, path, **options):
        if "00002" in str(path):
            raise OSError("no space left")
        save(tensors, path, **options)

    monkeypatch.setattr(data_cache, "save_file", full)
    with pytest.raises(OSError, match=r"00002.safetensors could not be written; make room.*left"):
        filled(tmp_path)
    monkeypatch.undo()
    assert len(filled(tmp_path)) == 10


# --- text -------------------------------------------------------------------------------------------------------------

CAPTIONS = [tuple(["a cube", f"number {i}", "wide " * (i % 7)][: 1 + i % 3]) for i in range(1, 11)]


@settings(deadline=None)
@given(data=st.data())
def test_pick_takes_one_caption_of_each(data):
    at = data.draw(st.lists(st.integers(0, 9), max_size=6))
    u = data.draw(st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=len(at), max_size=len(at)))
    picked = Texts(CAPTIONS, lambda texts: texts).pick(torch.tensor(at, dtype=torch.long), torch.tensor(u))
    assert picked == [CAPTIONS[i][int(x * len(CAPTIONS[i]))] for i, x in zip(at, u, strict=True)]


def test_pick_is_uniform():
    texts = Texts(CAPTIONS, lambda texts: texts)
    picked = texts.pick([1] * 300, torch.arange(300) / 300)
    assert [picked.count(text) for text in CAPTIONS[1]] == [100, 100, 100]
    assert texts.pick([1], [1.0]) == [CAPTIONS[1][-1]], "u rounded up to 1 is the last one"


def test_texts_are_stored_once_per_part_and_must_fit_half_precision(make, tmp_path, monkeypatch):
    data = make()
    work(data)
    (folder,) = (tmp_path / "cache").glob("text-*")
    record = Rows(folder, 3).record(0)
    assert record["texts"] == ["a red cube", "a blue ball and green boxes", *(
        f"a blue ball and {'two small ' * n}green boxes" for n in (1, 2)
    )]  # fmt: skip
    assert len(load_file(folder / "00000.safetensors")["rows"]) == sum(record["lengths"])
    data = make(Made(fingerprint="3" * 64))
    deque(data.read(), maxlen=0)
    huge = pad_contexts([torch.full((2, 3), 1e5)])
    monkeypatch.setattr(data.encoder, "encode", lambda texts: Context.cat([huge] * len(texts)))
    with pytest.raises(ValueError, match="65,504"):
        deque(data.embed())


def test_the_language_model_is_released_once_captions_are_stored(make, tiny_lm):
    data = make(encoder=TextEncoder(tiny_lm, max_tokens=16))
    work(data)
    assert "_lm" not in vars(data.encoder), "19 GB of a T5-XXL"
    data.encoder.encode(data.words()["examples"])
    assert "_lm" not in vars(data.encoder), "sample grids of these prompts need none"
    data = make(encoder=TextEncoder(tiny_lm, max_tokens=16), text_gib=0)
    work(data)
    assert "_lm" in vars(data.encoder), "every step encodes"


# --- the data of a run ------------------------------------------------------------------------------------------------


class Made:
    """A source of plain images: three parts, each of `n` images whose captions tell their colour and number."""

    parts = 3

    def __init__(self, n=4, fingerprint="0" * 64, broken=(), captions=None, named=True):
        self.n, self.fingerprint, self.broken, self.reads = n, fingerprint, broken, []
        self.captions, self.named = captions, named

    def read(self, part, size, problems):
        self.reads.append(part)
        for i in range(part * self.n, (part + 1) * self.n):
            problems.seen += 1
            if i in self.broken:
                problems.add("damaged", f"{i}.png")
                continue
            image = torch.full((3, size, size), 10 * (i % 25) + 5, dtype=torch.uint8)
            captions = self.captions or ("a red cube", f"a blue ball and {'two small ' * (i % 3)}green boxes")
            yield Example(image, captions, f"{i}.png" if self.named else "")


class Counted(torch.nn.Module):
    """A tokenizer that keeps what it saw."""

    codebook_size = 16

    def __init__(self, weight=1.0, grid=8):
        super().__init__()
        self.grid, self.weight, self.seen = grid, torch.nn.Parameter(torch.tensor(weight)), []

    def encode(self, images):
        assert not self.training, "pitfall 18: a tokenizer at work is in eval mode"
        self.seen.append(images)
        level = ((images[:, 0, 0, 0] + 1) * 7.99).long()
        return level[:, None].expand(-1, self.grid**2)


def levels(numbers):
    """The token of each of these images."""
    return [int((10 * (i % 25) + 5) / 127.5 * 7.99) for i in numbers]


@pytest.fixture
def make(tiny_muse, tmp_path):
    """make(source, ...) -> TrainingData under tmp_path."""

    def make(source=None, encoder=None, read_only=False, **changes):
        config, encoder = replace(tiny_muse.config, **changes), encoder or tiny_muse.encoder
        return TrainingData(tmp_path / "cache", source or Made(), config, encoder, bf16=False, read_only=read_only)

    return make


def work(data, low=None, high=None):
    """Compute everything -> the steps that it reported."""
    steps = [*data.read()]
    steps += data.tokenize("low", low or Counted())
    steps += data.embed()
    steps += data.tokenize("high", high or Counted(grid=16))
    return steps


def test_images_tokens_and_texts_of_the_same_examples(make, tiny_muse):
    data, low, high = make(), Counted(), Counted(grid=16)
    steps = work(data, low, high)
    assert (steps[0], steps[-1]) == ((0, 3), (3, 3)), "it reports where it stands"
    assert data.images[:].shape == (12, 3, SIDE, SIDE)
    assert (len(data.tokens["low"]), len(data.tokens["high"]), len(data.texts)) == (12, 12, 12), "one row each"
    assert data.tokens["low"][:][:, 0].tolist() == levels(range(12)), "each image's own tokens, in the source's order"
    assert data.tokens["low"][[0]].dtype == torch.long, "as models read them"
    expected = tiny_muse.encoder.encode(["a blue ball and two small green boxes"]).embeds[0].half()
    assert data.texts.pick([4], [0.9])[0].equal(expected), "each image's own captions, in half precision"
    assert {tuple(x.shape[1:]) for x in low.seen} == {(3, 32, 32)}, "Muse 3.3.1: the decimated image"
    assert {tuple(x.shape[1:]) for x in high.seen} == {(3, 64, 64)}
    assert all(x.min() >= -1 and x.max() <= 1 for x in low.seen + high.seen), "as models see them"


def test_blocks_do_not_show(make, monkeypatch):
    monkeypatch.setattr(data_cache, "BLOCK", 3)
    data = make()
    work(data)
    assert data.images[:][:, 0, 0, 0].tolist() == [10 * i + 5 for i in range(12)]
    assert data.tokens["high"][:][:, 0].tolist() == levels(range(12))
    assert [len(t) for t in data.texts.pick(range(12), [0.9] * 12)] == [9 + 2 * (i % 3) for i in range(12)]


FEW_PIXELS = 5 * 3 * SIDE**2 / 2**30  # room for five images: parts 0 and 1


def test_beyond_pixels_gib_the_source_is_read_again(make):
    source = Made()
    data = make(source, pixels_gib=FEW_PIXELS)
    work(data)
    assert (len(data.images), len(data.tokens["low"]), len(data.texts)) == (5, 12, 12)
    assert source.reads == [0, 1, 2, 2], "pixels of two parts; the third for low, then for high tokens"


@pytest.mark.parametrize("named", [True, False])
def test_a_transient_error_never_pairs_another_image(make, named):
    """All captions are the same, so that only the identity of a row tells them apart."""
    source = Made(captions=("a picture",), named=named, broken=(9,))
    data = make(source, pixels_gib=FEW_PIXELS)
    deque(data.read(), maxlen=0)
    deque(data.tokenize("low", Counted()), maxlen=0)
    numbers = [i for i in range(12) if i != 9]
    source.broken = (10,)  # 9 can be read again, and 10 fails: as many rows as before
    with pytest.raises(ValueError, match=r"part 2 of the data lost .*Start again when they can be read"):
        deque(data.tokenize("high", Counted(grid=16)), maxlen=0)
    source.broken = ()
    deque(data.tokenize("high", Counted(grid=16)), maxlen=0)
    for name in ("low", "high"):
        assert data.tokens[name][:][:, 0].tolist() == levels(numbers), f"{name}: rows of other images"
    assert len(data.captions()) == 11, "an image that the first reading left out stays out"


def test_caches_of_other_rows_are_refused(make, tmp_path):
    """A cache that was deleted and computed again, from files that cannot all be read now."""
    work(make())
    (pixels,) = (tmp_path / "cache").glob("pixels-*")
    (pixels / "00001.safetensors").unlink()
    data = make(Made(broken=(5,)))
    deque(data.read(), maxlen=0)
    with pytest.raises(ValueError, match=r"low_tokens-.* has other rows than .*pixels-.*delete"):
        deque(data.tokenize("low", Counted()), maxlen=0)


@pytest.mark.parametrize(("v", "dtype"), [(32_768, torch.int16), (32_769, torch.int32), (70_000, torch.int32)])
def test_the_largest_token_fits(make, v, dtype):
    data, tokenizer = make(), Counted()
    tokenizer.codebook_size = v
    tokenizer.encode = lambda images: torch.full((len(images), 3), v - 1)
    deque(data.read(), maxlen=0)
    deque(data.tokenize("low", tokenizer), maxlen=0)
    low = data.tokens["low"]
    assert (low.load(0).dtype, low[[0]].tolist()) == (dtype, [[v - 1] * 3])
    tokenizer.encode = lambda images: torch.full((len(images), 3), v)
    with pytest.raises(ValueError, match=f"high tokens {v} to {v}; expected 0 to {v - 1}"):
        deque(data.tokenize("high", tokenizer), maxlen=0)


def test_problems_are_logged_once_and_nothing_usable_is_an_error(make, caplog):
    with caplog.at_level(logging.WARNING, "minimuse"):
        work(make(Made(broken=(0, 1))))
    assert caplog.messages == ["left out 2 of 12 images: 2 damaged (0.png, 1.png)"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "minimuse"):  # the third part is read when its tokens are computed
        work(make(Made(fingerprint="3" * 64, broken=(1, 9)), pixels_gib=FEW_PIXELS))
    assert caplog.messages == [f"left out 1 of {n} images: 1 damaged ({i}.png)" for n, i in ((8, 1), (4, 9))]
    with pytest.raises(ValueError, match="no usable captioned image; left out 12 of 12 images: 12 damaged"):
        deque(make(Made(fingerprint="2" * 64, broken=range(12))).read())


def test_scenes_end_to_end(make):
    scenes = SceneDataset(6, SIDE)
    data = make(scenes)
    work(data)
    assert torch.equal(data.images[:], scenes.images())
    assert data.captions() == [tuple(scenes.captions(i)) for i in range(6)]
    assert data.words() == {"words": vocabulary(), "examples": list(EXAMPLE_PROMPTS)}


# --- held out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [49, 50, 149, 150])
def test_every_50th_is_held_out(make, n):
    rows = torch.arange(n)[:, None]
    train, held_out = make().split(rows), make().split(rows, held_out=True)
    seen, kept = ([int(x) for x in part[torch.arange(len(part))]] for part in (train, held_out))
    if n < HELD_OUT:
        assert seen == kept == list(range(n)), "of few, all serve for both"
        return
    assert kept == list(range(HELD_OUT - 1, n, HELD_OUT))
    assert sorted(seen + kept) == list(range(n)), "an example is lost, or both trained on and held out"


def test_images_tokens_and_texts_are_split_alike(make):
    data = make(Made(n=40))
    work(data)
    for held_out, numbers in ((True, [49, 99]), (False, [i for i in range(120) if i not in (49, 99)])):
        (images,), (tokens, texts) = data.columns("high_tokenizer", held_out), data.columns("base", held_out)
        assert isinstance(images, Subset)
        assert len(images) == len(numbers)
        at = torch.arange(len(numbers))
        assert images[at][:, 0, 0, 0].tolist() == [10 * (i % 25) + 5 for i in numbers], "another image"
        assert tokens[at][:, 0].tolist() == levels(numbers), "its tokens"
        assert [len(t) for t in texts.pick(at, [0.9] * len(at))] == [9 + 2 * (i % 3) for i in numbers], "its captions"


def test_the_columns_of_every_stage(make):
    data = make()
    work(data)
    at = torch.arange(12)
    shapes = {name: [x[at].shape[1:] for x in data.columns(name)] for name in ("low_tokenizer", "decoder")}
    assert shapes == {"low_tokenizer": [(3, 32, 32)], "decoder": [(3, SIDE, SIDE)]}
    high, texts, low = data.columns("superres")
    assert high[at].equal(data.tokens["high"][at])
    assert low[at].equal(data.tokens["low"][at])
    assert texts.pick(at[4:5], [0.9])[0].equal(data.texts.pick([4], [0.9])[0])


def test_decimated_images():
    images = torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    small = Decimated(images, 2)
    assert len(small) == 5
    assert small[[3, 0]].equal(area_downsample(images[[3, 0]])), "made as they are asked for"


def test_tokenizing_in_batches_changes_nothing():
    images = torch.arange(7).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).byte() * 30
    assert tokenize_images(Counted(), images, batch=2, bf16=False).equal(tokenize_images(Counted(), images, bf16=False))


# --- text of a run ----------------------------------------------------------------------------------------------------


def test_text_beyond_text_gib_is_encoded_live(make, tmp_path):
    stored, live = make(), make(text_gib=0.0)
    work(stored)
    before = tree(tmp_path / "cache")
    work(live)
    assert live.texts.embed == live.encode
    assert len(live.texts) == 12
    assert tree(tmp_path / "cache") == before, "nothing is written"
    at, u = torch.tensor([4, 0, 11]), [0.99, 0.0, 0.5]
    for a, b in zip(stored.texts.pick(at, u), live.texts.pick(at, u), strict=True):
        assert a.dtype == b.dtype == torch.float16
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_encoding_is_unpadded_and_whatever_the_batch(make, tiny_muse):
    prompts = ["a red cube", "a blue ball and two small green boxes", "a"]
    rows = make().encode(prompts, batch=2)
    assert [len(r) for r in rows] == [4, 11, 2], "each with its end token"
    for row, text in zip(rows, prompts, strict=True):
        assert row.equal(tiny_muse.encoder.encode([text]).embeds[0].half()), "a text depends on its neighbours"


def test_words_and_examples_of_a_folder(make, tmp_path):
    """The most common words first, of letters only; prompts from the beginning, the middle and on."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, text in enumerate(["A red cube, 3 cm", "a red ball", "a größerer cube", "a box"]):
        to_pil(torch.full((1, 3, SIDE, SIDE), 50 * i).byte())[0].save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(text, encoding="utf-8")
    data = make(FolderDataset(pictures))
    work(data)
    found = data.words()
    assert found["words"][:3] == ["a", "red", "cube"]
    assert set(found["words"]) == {"a", "red", "cube", "cm", "ball", "größerer", "box"}
    assert data.words(most=2)["words"] == ["a", "red"]
    assert found["examples"] == ["A red cube, 3 cm", "a red ball", "a größerer cube"]


# --- opened again -----------------------------------------------------------------------------------------------------


def test_opened_again_nothing_is_computed(make, tmp_path):
    work(make())
    before = tree(tmp_path / "cache")
    source, low, high = Made(), Counted(), Counted(grid=16)
    again = make(source)
    work(again, low, high)
    assert (source.reads, low.seen, high.seen) == ([], [], [])
    assert tree(tmp_path / "cache") == before, "a file was written"
    assert again.tokens["low"][:][:, 0].tolist() == levels(range(12))


def test_the_language_model_embeds_nothing_again(make, tiny_lm):
    """A second opening encodes the captions of about 64 examples, however many there are, and 3 prompts of samples."""
    work(make(Made(n=100)))
    encoder = TextEncoder(tiny_lm, max_tokens=64)
    asked, encode = [], encoder.encode
    encoder.encode = lambda prompts: asked.extend(prompts) or encode(prompts)
    work(make(Made(n=100), encoder))
    assert len(asked) <= 2 * 75 + 3, f"{len(asked)} of 600 captions were encoded"


@pytest.mark.parametrize("what", ["tokenizer", "data", "lm"])
def test_what_changed_has_a_cache_of_its_own(make, tmp_path, tiny_lms, what):
    work(make())
    kinds = {"tokenizer": {"low_tokens"}, "data": {"pixels", "low_tokens", "high_tokens", "text"}, "lm": {"text"}}
    before = tree(tmp_path / "cache")
    source = Made(fingerprint="1" * 64) if what == "data" else Made()
    low = Counted(weight=2.0) if what == "tokenizer" else Counted()
    work(make(source, TextEncoder(tiny_lms["bert"], max_tokens=64) if what == "lm" else None), low)
    after = tree(tmp_path / "cache")
    assert all(after[name] == stat for name, stat in before.items() if name.count("/")), "the old cache was touched"
    assert {name.split("-")[0] for name in after.keys() - before.keys() if "/" not in name} == kinds[what]


def test_read_only(make, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*00000.safetensors"):
        deque(make(read_only=True).read())
    assert not (tmp_path / "cache").exists(), "a folder was made for what is not there"
    work(make())
    before = tree(tmp_path / "cache")
    data, low = make(read_only=True), Counted()
    assert work(data, low) == []
    assert low.seen == [], "nothing was computed"
    assert len(data.texts) == 12, "but everything is there to be read"
    with pytest.raises(ValueError, match="low_tokens"):
        deque(data.tokenize("low", Counted(weight=3.0)))
    assert tree(tmp_path / "cache") == before, "reading wrote"


def test_several_processes_share_the_work_and_wait(make, tiny_muse, tmp_path):
    waited, source = [], Made()
    options = {"bf16": False, "processes": 2}
    second = TrainingData(tmp_path / "cache", source, tiny_muse.config, tiny_muse.encoder, rank=1, **options)
    steps = second.read()
    assert [next(steps), next(steps)] == [(0, 1), (1, 1)]
    first = TrainingData(
        tmp_path / "cache", Made(), tiny_muse.config, tiny_muse.encoder, wait=lambda: waited.append(1), **options
    )
    assert list(first.read())[-1] == (2, 2)
    assert waited == [1], "it waits for the others before it reads"
    assert list(steps) == []
    assert len(second.images) == len(first.images) == 12


def test_a_wrong_example_is_refused():
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    Example(pixels, ("a cube",)).check(8)
    for image, captions in ((pixels, "a"), (pixels, ()), (pixels.float(), ("a",)), (pixels.permute(1, 2, 0), ("a",))):
        with pytest.raises(ValueError, match=r"yields Example\(image \(3, 8, 8\) uint8"):
            Example(image, captions).check(8)


def test_cut_and_unknown_captions_are_one_line_each(make, tiny_lm, caplog):
    """Many long captions, and sentences of one unknown script: a count, no warning for each caption."""
    captions = ["red cube " * 150, "a blue ball and " * 50, "一只红色的猫坐在草地上", "蓝天白云下的山", "a red cube"]
    with warnings.catch_warnings(), caplog.at_level("WARNING", "minimuse"):
        warnings.simplefilter("error")
        data = make(Made(n=5, captions=captions), TextEncoder(tiny_lm, max_tokens=8))
        work(data)
    said = [r.message for r in caplog.records if "texts" in r.message]
    assert len(said) == 2, said
    assert said[0].startswith("2 of 5 texts are cut to 8 tokens: 'red cube red cube"), said
    assert "of the tokens in 2 of 5 texts, such as '一只红色的猫坐在草地上'; 1 become the same as another" in said[1], (
        said
    )
