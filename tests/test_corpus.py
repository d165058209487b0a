"""corpus.py: a run's data, computed once and read again; what is held out; text beyond its room encoded live."""

import logging
from collections import deque
from dataclasses import replace

import pytest
import torch

from minimuse import data_sources as folders
from minimuse.data_cache import HELD_OUT, LiveTexts, Texts, TrainingData
from minimuse.data_captions import EXAMPLE_PROMPTS, vocabulary
from minimuse.data_images import area_downsample, to_pil
from minimuse.data_sources import Example, SceneDataset
from minimuse.text import TextEncoder
from minimuse.train import Decimated
from minimuse.train_engine import Engine

SIDE = 64


class Made:
    """A source of plain images: three parts, each of `n` images whose captions tell their color and number."""

    parts = 3

    def __init__(self, n=4, fingerprint="0" * 64, broken=0):
        self.n, self.fingerprint, self.broken, self.reads = n, fingerprint, broken, []

    def read(self, part, size, problems):
        self.reads.append(part)
        for i in range(part * self.n, (part + 1) * self.n):
            problems.seen += 1
            if i < self.broken:
                problems.add("corrupt", f"{i}.png")
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


class Asked(TextEncoder):
    """A language model that keeps what it was asked to encode."""

    def __init__(self, name, **kwargs):
        super().__init__(name, **kwargs)
        self.asked = []

    def encode(self, prompts):
        self.asked += prompts
        return super().encode(prompts)


@pytest.fixture
def make(tiny_muse, tmp_path):
    """make(source, ...) -> a TrainingData under tmp_path."""

    def make(source=None, encoder=None, read_only=False, **changes):
        config = replace(tiny_muse.config, **changes)
        engine = Engine(device="cpu", bf16=False)
        encoder = encoder or tiny_muse.encoder
        return TrainingData(tmp_path / "cache", source or Made(), config, engine, encoder, read_only=read_only)

    return make


def work(corpus, low=None, high=None):
    """All that a run computes -> the steps it told of."""
    told = [*corpus.read()]
    told += corpus.tokenize("low", low or Counted())
    told += corpus.embed()
    told += corpus.tokenize("high", high or Counted(grid=16))
    return told


def tree(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


# --- what is computed -------------------------------------------------------------------------------------------------


def test_images_tokens_and_texts_of_the_same_examples(make, tiny_muse):
    corpus, low, high = make(), Counted(), Counted(grid=16)
    told = work(corpus, low, high)
    assert corpus.images.shape == (12, 3, SIDE, SIDE), f"{corpus.images.shape}"
    assert (len(corpus.tokens["low"]), len(corpus.tokens["high"]), len(corpus.texts)) == (12, 12, 12), "one row each"
    assert told[0] == (0, 3), "it tells where it stands"
    assert told[-1] == (3, 3), "up to the end"
    assert corpus.tokens["low"][:][:, 0].tolist() == levels(range(12)), "each image's own tokens, in the source's order"
    assert corpus.tokens["low"].shape == (12, 64), "a long row of each"
    assert corpus.tokens["low"][0].dtype == torch.long, "as models read them"
    expected = tiny_muse.encoder.encode(["a blue ball and two small green boxes"]).embeds[0].half()
    assert corpus.texts[4][1].equal(expected), "each image's own captions, in half precision"


def test_the_low_tokenizer_reads_decimated_images(make):
    """Muse 3.3.1: the 32-pixel image is the 64-pixel one, decimated."""
    corpus, low, high = make(), Counted(), Counted(grid=16)
    work(corpus, low, high)
    assert {tuple(x.shape[1:]) for x in low.seen} == {(3, 32, 32)}, f"{[x.shape for x in low.seen]}"
    assert {tuple(x.shape[1:]) for x in high.seen} == {(3, 64, 64)}, f"{[x.shape for x in high.seen]}"
    assert all(x.min() >= -1 and x.max() <= 1 for x in low.seen + high.seen), "as models see them"


def test_decimated_images():
    images = torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    small = Decimated(images, 2)
    assert len(small) == 5, "as many"
    assert small[[3, 0]].equal(area_downsample(images[[3, 0]])), "made as they are asked for"
    assert Decimated(images, 1)[[1]].equal(images[[1]]), "factor 1 leaves them as they are"


def test_problems_are_told_once_read(make, caplog):
    with caplog.at_level(logging.WARNING, "minimuse"):
        work(make(Made(broken=2)))
    assert [r.message for r in caplog.records] == ["passed over 2 of 12 images: 2 corrupt (0.png, 1.png)"], (
        f"{caplog.messages}"
    )


def test_nothing_usable(make):
    with pytest.raises(ValueError, match="no usable captioned image"):
        deque(make(Made(broken=12)).read())


# --- held out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [50, 120, 149, 150])
def test_every_50th_is_held_out(make, n):
    rows = torch.arange(n)[:, None]
    train, held_out = make().split(rows), make().split(rows, held_out=True)
    kept = held_out[torch.arange(len(held_out))].flatten().tolist()
    assert kept == list(range(HELD_OUT - 1, n, HELD_OUT)), f"{kept}"
    seen = train[torch.arange(len(train))].flatten().tolist()
    assert sorted(seen + kept) == list(range(n)), "an example is lost, or both trained on and held out"


def test_of_few_all_serve_for_both(make):
    rows = torch.arange(49)[:, None]
    assert len(make().split(rows)) == len(make().split(rows, held_out=True)) == 49, "fewer than 50: nothing to spare"


def test_images_tokens_and_texts_are_split_alike(make):
    corpus = make(Made(n=40))
    work(corpus)
    for held_out, numbers in ((True, [49, 99]), (False, [i for i in range(120) if i not in (49, 99)])):
        images, tokens, texts = (corpus.split(r, held_out) for r in (corpus.images, corpus.tokens["low"], corpus.texts))
        assert len(images) == len(tokens) == len(texts) == len(numbers), f"{len(images)}"
        at = torch.arange(len(numbers))
        assert images[at][:, 0, 0, 0].tolist() == [10 * (i % 25) + 5 for i in numbers], "another image"
        assert tokens[at][:, 0].tolist() == levels(numbers), "its tokens"
        lengths = [len(t) for t in texts.pick(at, [0.9] * len(at))]
        assert lengths == [9 + 2 * (i % 3) for i in numbers], "its second caption, with so many times 'two small'"


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_beyond_its_room_is_encoded_live(make, tmp_path):
    cached, live = make(), make(text_gib=0.0)
    work(cached)
    assert isinstance(cached.texts, Texts), "small texts are kept on disk"
    before = tree(tmp_path / "cache")
    work(live)
    assert isinstance(live.texts, LiveTexts), "those beyond text_gib are not"
    assert tree(tmp_path / "cache") == before, "nor is anything else written"
    at, u = torch.tensor([4, 0, 11]), [0.99, 0.0, 0.5]
    for a, b in zip(cached.texts.pick(at, u), live.texts.pick(at, u), strict=True):
        assert a.dtype == b.dtype == torch.float16, "in half precision either way"
        assert a.shape == b.shape, "as many text tokens"
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0, msg=lambda m: f"live text differs from the cached: {m}")


def test_encoding_is_unpadded_and_whatever_the_batch(make, tiny_muse):
    corpus, texts = make(), ["a red cube", "a blue ball and two small green boxes", "a"]
    rows = corpus.encode(texts, batch=2)
    assert [len(r) for r in rows] == [4, 11, 2], f"{[len(r) for r in rows]} text tokens, each with its end token"
    for row, text in zip(rows, texts, strict=True):
        assert row.equal(tiny_muse.encoder.encode([text]).embeds[0].half()), "a text depends on its neighbours"


def test_words_and_examples_of_scenes(make):
    told = make(SceneDataset(4, SIDE)).words()
    assert told == {"words": vocabulary(), "examples": list(EXAMPLE_PROMPTS)}, "known without reading a caption"


def test_words_and_examples_of_a_folder(make, tmp_path):
    """The commonest words first, of letters alone; prompts from the beginning, the middle and on."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, text in enumerate(["A red cube, 3 cm", "a red ball", "a größerer cube", "a box"]):
        image = torch.full((1, 3, SIDE, SIDE), 50 * i).byte()
        to_pil(image)[0].save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(text, encoding="utf-8")
    corpus = make(folders.FolderDataset(pictures))
    work(corpus)
    told = corpus.words()
    assert told["words"][:3] == ["a", "red", "cube"], f"{told['words']}"
    assert set(told["words"]) == {"a", "red", "cube", "cm", "ball", "größerer", "box"}, f"{told['words']}"
    assert corpus.words(most=2)["words"] == ["a", "red"], "at most so many"
    assert told["examples"] == ["A red cube, 3 cm", "a red ball", "a größerer cube"], f"{told['examples']}"


# --- opened again -----------------------------------------------------------------------------------------------------


def test_opened_again_nothing_is_computed(make, tmp_path):
    work(make())
    before = tree(tmp_path / "cache")
    source, low, high = Made(), Counted(), Counted(grid=16)
    again = make(source)
    work(again, low, high)
    assert (source.reads, low.seen, high.seen) == ([], [], []), "a second opening reads, or tokenizes, again"
    assert tree(tmp_path / "cache") == before, "a file was written"
    assert again.tokens["low"][:][:, 0].tolist() == levels(range(12)), "and the rows are those of the first"


def test_the_language_model_embeds_nothing_again(make, tiny_lm):
    """Of 200 captions and more, a second opening asks for those of about 64 examples, however many there are."""
    work(make(Made(n=100)), *[Counted(), Counted(grid=16)])
    encoder = Asked(tiny_lm, max_tokens=64)
    work(make(Made(n=100), encoder))
    assert len(encoder.asked) <= 2 * 75, f"{len(encoder.asked)} of 600 captions were encoded"


@pytest.mark.parametrize("what", ["tokenizer", "data", "lm"])
def test_what_changed_has_a_cache_of_its_own(make, tmp_path, tiny_lms, what):
    work(make())
    kinds = {
        "tokenizer": {"low_tokens"},
        "data": {"pixels", "low_tokens", "high_tokens", "text"},
        "lm": {"text"},
    }
    before = tree(tmp_path / "cache")
    source = Made(fingerprint="1" * 64) if what == "data" else Made()
    low = Counted(weight=2.0) if what == "tokenizer" else Counted()
    work(make(source, TextEncoder(tiny_lms["bert"], max_tokens=64) if what == "lm" else None), low)
    after = tree(tmp_path / "cache")
    assert all(after[name] == stat for name, stat in before.items() if name.count("/")), "the old cache was touched"
    new = {name.split("-")[0] for name in after.keys() - before.keys() if "/" not in name}
    assert new == kinds[what], f"{new}"


def test_read_only(make, tmp_path):
    with pytest.raises(ValueError, match="part 0 of 3 is not in"):
        deque(make(read_only=True).read())
    assert not (tmp_path / "cache").exists(), "a folder was made for what is not there"
    work(make())
    before = tree(tmp_path / "cache")
    corpus, low = make(read_only=True), Counted()
    assert work(corpus, low) == [], "there is nothing to tell of"
    assert low.seen == [], "and nothing was computed"
    assert len(corpus.texts) == 12, "but all is there to be read"
    with pytest.raises(ValueError, match="low_tokens"):
        deque(corpus.tokenize("low", Counted(weight=3.0)))
    assert tree(tmp_path / "cache") == before, "reading wrote"
