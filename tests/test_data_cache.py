"""data_cache.py: rows that are computed once, read again by memory map, and never paired wrongly."""

import json
import logging
import os
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse import data_cache
from minimuse.data_cache import (
    HELD_OUT,
    LiveTexts,
    Rows,
    Shards,
    Subset,
    Texts,
    TrainingData,
    text_block,
    tokenize_images,
)
from minimuse.data_captions import EXAMPLE_PROMPTS, Example, vocabulary
from minimuse.data_images import area_downsample, to_pil
from minimuse.data_sources import FolderDataset, SceneDataset
from minimuse.text import TextEncoder
from minimuse.train import Decimated

SIDE = 64
SIZES = (3, 0, 5, 2)  # rows of the parts in the tests of files


# --- files ------------------------------------------------------------------------------------------------------------


def blocks(part, problems):
    """Rows (i, 10 i) of all parts in order, in blocks of up to 2; every part leaves one image out."""
    problems.seen += SIZES[part] + 1
    problems.add("damaged", f"{part}.png")
    first = sum(SIZES[:part])
    numbers = range(first, first + SIZES[part])
    for start in range(0, len(numbers), 2):
        few = numbers[start : start + 2]
        yield {"rows": np.array([[i, 10 * i] for i in few], np.uint16)}, [(f"number {i}",) for i in few]


def filled(folder: Path, **options) -> Shards:
    shards = Shards(folder, "rows", "0" * 64, len(SIZES), **options)
    deque(shards.fill(blocks), maxlen=0)
    return shards


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_all_rows_come_back_in_order(tmp_path):
    shards = filled(tmp_path)
    rows = Rows(shards, torch.long)
    assert rows[:].tolist() == [[i, 10 * i] for i in range(10)]
    assert Rows(shards)[:1].dtype == torch.uint16, "without a dtype, the stored one"
    assert [text for record in shards.records() for text in record["captions"]] == [[f"number {i}"] for i in range(10)]
    assert [record["problems"]["names"] for record in shards.records()] == [{"damaged": [f"{i}.png"]} for i in range(4)]
    before = tree(tmp_path)
    assert list(shards.fill(blocks)) == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)], "it says where it stands"
    assert tree(tmp_path) == before, "nothing is made twice"


@settings(deadline=None, max_examples=30)
@given(at=st.lists(st.integers(0, 9), max_size=20), handles=st.integers(1, 3))
def test_indexing_is_that_of_one_array(tmp_path_factory, at, handles):
    shards = filled(tmp_path_factory.getbasetemp() / "indexing")
    data_cache.OPEN, opened = handles, data_cache.OPEN
    try:
        rows = Rows(shards, torch.long)
    finally:
        data_cache.OPEN = opened
    assert rows[torch.tensor(at, dtype=torch.long)].tolist() == [[i, 10 * i] for i in at]
    assert rows.map.cache_info().currsize <= handles, "few files stay open"
    got = rows[[0]]
    got[:] = 77
    assert rows[[0]].tolist() == [[0, 0]], "rows are copies"


@pytest.mark.parametrize("wrong", [[10], [-1], [[1]], 3])
def test_what_is_no_list_of_rows_is_refused(tmp_path, wrong):
    with pytest.raises(IndexError, match="expected a list of numbers from 0 to 9"):
        Rows(filled(tmp_path))[wrong]


@pytest.mark.parametrize("limit", [1, 3, 4, 9, 10, 50])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_share_the_parts(tmp_path, limit, order):
    shards = Shards(tmp_path, "rows", "0" * 64, 4, limit)
    with pytest.raises(ValueError, match=r"part 0 of 4 is not in .*not computed yet"):
        Rows(shards)
    for rank in order:
        deque(shards.fill(blocks, rank, 2), maxlen=0)
    n = min(limit, 10)
    assert Rows(shards, torch.long)[:].tolist() == [[i, 10 * i] for i in range(n)], "whoever comes first"


def test_a_limit_spares_the_rest(tmp_path):
    shards = filled(tmp_path, limit=3)
    assert [shards.record(part) is None for part in range(4)] == [False, True, True, True]
    wider = filled(tmp_path, limit=9)
    assert len(Rows(wider)) == 9, "a larger limit adds to what is there"


def test_another_content_is_another_folder(tmp_path):
    filled(tmp_path)
    other = Shards(tmp_path, "rows", "1" * 64, len(SIZES))
    assert other.record(0) is None, "a stale cache is never read"


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
from minimuse import utils
from minimuse.data_cache import Shards

calls, rename = 0, os.replace
def killed(*paths):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os._exit(9)
    rename(*paths)
utils.os.replace = killed

def blocks(part, problems):
    for i in range(2):
        yield {"rows": np.full((1, 2), 2 * part + i)}, [("text",)]
list(Shards(Path(sys.argv[1]), "rows", "0" * 64, 3).fill(blocks))
"""


def test_killed_at_any_moment_then_resumed(tmp_path):
    """One rename per part, of its JSON. What is not finished is made again, the rest is kept."""
    for call, finished in ((1, 0), (3, 2)):  # the second continues where the first was killed
        command = [sys.executable, "-c", KILLED, tmp_path, str(call)]
        assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 9
        shards = Shards(tmp_path, "rows", "0" * 64, 3)
        done = [part for part in range(3) if shards.record(part)]
        assert done == list(range(finished)), "a part is there if and only if its JSON is"
        kept = {name: stat for name, stat in tree(tmp_path).items() if any(f"{part:05d}." in name for part in done)}

    def rest(part, problems):
        yield {"rows": np.array([[2 * part] * 2, [2 * part + 1] * 2])}, [("text",)] * 2

    deque(shards.fill(rest), maxlen=0)
    assert Rows(shards)[:].tolist() == [[i, i] for i in range(6)]
    assert all(tree(tmp_path)[name] == stat for name, stat in kept.items()), "finished parts are kept"


@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b"no array", lambda c: b"", None])
def test_a_damaged_file_is_named(tmp_path, damage):
    shards = filled(tmp_path)
    path = shards.folder / "00002.001.rows.npy"
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(ValueError, match=r"00002.001.rows.npy is damaged .*delete .*rows-0000000000000000"):
        Rows(shards)[:]


def test_lengths_are_compared(tmp_path):
    def more(part, problems):
        yield {"rows": np.zeros((3, 1))}, [("a",), ("b",)]

    with pytest.raises(ValueError, match="part 0 needs captions for each of its 3 rows"):
        deque(Shards(tmp_path, "rows", "1" * 64, 1).fill(more), maxlen=0)


def test_a_full_disk(tmp_path, monkeypatch):
    save = np.save

    def full(path, array, **options):
        if "00002" in str(path):
            raise OSError("24 requested and 8 written")
        save(path, array, **options)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"part 2 could not be written .*8 written\): make room and start again"):
        filled(tmp_path)
    monkeypatch.undo()
    assert len(Rows(filled(tmp_path))) == 10


# --- text -------------------------------------------------------------------------------------------------------------


def encode_words(texts):
    """One vector per word and one for the end; its numbers tell the text and the place."""
    return [torch.tensor([[len(text), i, -1.5] for i in range(len(text.split()) + 1)]).float() for text in texts]


CAPTIONS = [tuple(["a cube", f"number {i}", "wide " * (i % 7)][: 1 + i % 3]) for i in range(1, 11)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    def make(part, problems):
        few = CAPTIONS[5 * part : 5 * part + 5]
        yield text_block(few, encode_words), few

    shards = Shards(tmp_path_factory.mktemp("text"), "text", "0" * 64, 2)
    deque(shards.fill(make), maxlen=0)
    return Texts(shards)


@settings(deadline=None)
@given(data=st.data())
def test_pick_takes_one_caption_of_each(texts, data):
    at = data.draw(st.lists(st.integers(0, 9), max_size=6))
    u = data.draw(st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=len(at), max_size=len(at)))
    for rows in (texts, LiveTexts(CAPTIONS, encode_words)):
        picked = rows.pick(torch.tensor(at, dtype=torch.long), torch.tensor(u))
        assert len(picked) == len(at)
        for row, i, x in zip(picked, at, u, strict=True):
            (want,) = encode_words([CAPTIONS[i][int(x * len(CAPTIONS[i]))]])
            assert torch.equal(row.float(), want), f"u = {x} of the {len(CAPTIONS[i])} captions of example {i}"


def test_pick_is_uniform_and_texts_are_stored_once(texts):
    picked = texts.pick([1] * 300, torch.arange(300) / 300)
    assert [sum(row[0, 0] == len(text) for row in picked) for text in CAPTIONS[1]] == [100, 100, 100]
    assert texts.pick([1], [1.0])[0].shape == picked[-1].shape, "u rounded up to 1 is the last one"
    block = text_block([("a", "b"), ("a",)], encode_words)
    assert (len(block["values"]), block["spans"].tolist()) == (4, [[0, 2], [2, 4], [0, 2]])


def test_half_precision_must_hold_the_embeddings():
    with pytest.raises(ValueError, match="65,504"):
        text_block([("a",)], lambda texts: [torch.full((2, 3), 70_000.0) for _ in texts])


# --- the data of a run ------------------------------------------------------------------------------------------------


class Made:
    """A source of plain images: three parts, each of `n` images whose captions tell their colour and number."""

    parts = 3

    def __init__(self, n=4, fingerprint="0" * 64, broken=()):
        self.n, self.fingerprint, self.broken, self.reads = n, fingerprint, broken, []

    def read(self, part, size, problems):
        self.reads.append(part)
        for i in range(part * self.n, (part + 1) * self.n):
            problems.seen += 1
            if i in self.broken:
                problems.add("damaged", f"{i}.png")
                continue
            image = torch.full((3, size, size), 10 * (i % 25) + 5, dtype=torch.uint8)
            yield Example(image, ("a red cube", f"a blue ball and {'two small ' * (i % 3)}green boxes"))


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
    assert data.images.blocks == [(part, block) for part in range(3) for block in range(2)]
    assert data.images[:][:, 0, 0, 0].tolist() == [10 * i + 5 for i in range(12)]
    assert data.tokens["high"][:][:, 0].tolist() == levels(range(12))
    assert [len(t) for t in data.texts.pick(range(12), [0.9] * 12)] == [9 + 2 * (i % 3) for i in range(12)]


def test_beyond_pixels_gib_the_source_is_read_again(make):
    limit = 5 * 3 * SIDE**2 / 2**30
    source = Made()
    data = make(source, pixels_gib=limit)
    work(data)
    assert (len(data.images), len(data.tokens["low"]), len(data.texts)) == (5, 12, 12)
    assert source.reads == [0, 1, 2, 2], "pixels of two parts; the third for low, then for high tokens"


def test_rows_of_other_examples_are_refused(make):
    """Read again, a file may fail once, or work again: every row after it would be another's."""
    source = Made()
    data = make(source, pixels_gib=5 * 3 * SIDE**2 / 2**30)
    deque(data.read(), maxlen=0)
    deque(data.tokenize("low", Counted()), maxlen=0)
    source.broken = (9,)
    with pytest.raises(ValueError, match="part 2 of the data gave other examples when it was read again"):
        deque(data.tokenize("high", Counted(grid=16)), maxlen=0)


@pytest.mark.parametrize(("v", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_the_largest_token_fits(make, v, dtype):
    data, tokenizer = make(), Counted()
    tokenizer.codebook_size = v
    tokenizer.encode = lambda images: torch.full((len(images), 3), v - 1)
    deque(data.read(), maxlen=0)
    deque(data.tokenize("low", tokenizer), maxlen=0)
    low = data.tokens["low"]
    assert (low.map(0, "low_tokens").dtype, low[[0]].tolist()) == (dtype, [[v - 1] * 3])
    tokenizer.encode = lambda images: torch.full((len(images), 3), v)
    with pytest.raises(ValueError, match=f"high tokens {v} to {v}; expected 0 to {v - 1}"):
        deque(data.tokenize("high", tokenizer), maxlen=0)


def test_problems_are_logged_once_and_nothing_usable_is_an_error(make, caplog):
    with caplog.at_level(logging.WARNING, "minimuse"):
        work(make(Made(broken=(0, 1))))
    assert caplog.messages == ["left out 2 of 12 images: 2 damaged (0.png, 1.png)"]
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
        images, tokens, texts = (data.split(r, held_out) for r in (data.images, data.tokens["low"], data.texts))
        assert isinstance(images, Subset)
        assert len(images) == len(numbers)
        at = torch.arange(len(numbers))
        assert images[at][:, 0, 0, 0].tolist() == [10 * (i % 25) + 5 for i in numbers], "another image"
        assert tokens[at][:, 0].tolist() == levels(numbers), "its tokens"
        assert [len(t) for t in texts.pick(at, [0.9] * len(at))] == [9 + 2 * (i % 3) for i in numbers], "its captions"


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
    assert isinstance(stored.texts, Texts)
    before = tree(tmp_path / "cache")
    work(live)
    assert isinstance(live.texts, LiveTexts)
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
    """A second opening encodes the captions of about 64 examples, however many there are."""
    work(make(Made(n=100)))
    encoder = TextEncoder(tiny_lm, max_tokens=64)
    asked, encode = [], encoder.encode
    encoder.encode = lambda prompts: asked.extend(prompts) or encode(prompts)
    work(make(Made(n=100), encoder))
    assert len(asked) <= 2 * 75, f"{len(asked)} of 600 captions were encoded"


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
    with pytest.raises(ValueError, match="part 0 of 3 is not in"):
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


def test_records_are_plain_json(make, tmp_path):
    work(make())
    (folder,) = (tmp_path / "cache").glob("pixels-*")
    record = json.loads((folder / "00000.json").read_text(encoding="utf-8"))
    assert record["rows"] == [4]
    assert record["problems"] == {"seen": 4, "names": {}}


def test_a_wrong_example_is_refused():
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    Example(pixels, ("a cube",)).check(8)
    for image, captions in ((pixels, "a cube"), (pixels.float(), ("a",)), (pixels.permute(1, 2, 0), ("a",))):
        with pytest.raises(ValueError, match=r"yields Example\(image \(3, 8, 8\) uint8"):
            Example(image, captions).check(8)
