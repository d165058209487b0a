"""precompute.py: pixels, tokens and text of a source, aligned row by row; what they will take on a disk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse.config import preset
from minimuse.data_cache import (
    CachedPixels,
    Rows,
    Shards,
    Texts,
    all_captions,
    all_problems,
    estimate,
    fill,
    make_pixels,
    make_text,
    make_tokens,
    text_fits,
)
from minimuse.data_sources import Example, Problems, SceneDataset
from minimuse.utils import content_hash

SIDE = 4


class FakeSource:
    """Five parts of 10 images: every other one is bad, and all of part 2. Captions repeat; an example has 1 to 3."""

    fingerprint = content_hash("fake")
    parts = 5

    def read(self, part, size, problems):
        for i in range(10):
            problems.seen += 1
            if i % 2 or part == 2:
                problems.add("corrupt", f"{part}-{i}.png")
                continue
            n = 10 * part + i
            image = torch.full((3, size, size), n, dtype=torch.uint8)
            yield Example(image, tuple(["a cube", f"number {n}", "wide " * (n % 7)][: 1 + n // 2 % 3]))


def made(root, kind, make, parts=5, **options):
    shards = Shards(root, kind, FakeSource.fingerprint, parts, **options)
    list(fill(shards, make))
    return shards


def examples(source=None, size=SIDE):
    source = source or FakeSource()
    return [e for part in range(source.parts) for e in source.read(part, size, Problems())]


def encode_text(texts):
    """One vector a word and one for the end, as language models have; its numbers tell text and place."""
    return [
        torch.tensor([[len(text), place, -1.5] for place in range(len(text.split()) + 1)], dtype=torch.float32)
        for text in texts
    ]


class TestPixels:
    def test_round_trip(self, tmp_path):
        shards = made(tmp_path, "pixels", make_pixels(FakeSource(), SIDE))
        pixels = Rows(shards, "pixels")
        assert (pixels.shape, pixels[:].dtype) == ((20, 3, SIDE, SIDE), torch.uint8)
        assert torch.equal(pixels[:], torch.stack([e.image for e in examples()]))
        assert list(all_captions(shards)) == [e.captions for e in examples()]

    def test_problems_are_summed(self, tmp_path):
        shards, problems = made(tmp_path, "pixels", make_pixels(FakeSource(), SIDE)), Problems()
        for part in range(5):
            list(FakeSource().read(part, SIDE, problems))
        assert all_problems(shards) == problems
        assert all_problems(shards).counts == {"corrupt": 30}, "20 of 50 are good"

    def test_a_limit_cuts_captions_too(self, tmp_path):
        shards = made(tmp_path, "pixels", make_pixels(FakeSource(), SIDE), limit=7)
        assert len(Rows(shards, "pixels")) == len(list(all_captions(shards))) == 7
        assert list(all_captions(shards)) == [e.captions for e in examples()[:7]]
        assert shards.record(2)[0] is None, "two parts hold 10"

    def test_refuses_an_image_without_caption(self, tmp_path):
        class Silent(FakeSource):
            def read(self, part, size, problems):
                yield Example(torch.zeros(3, size, size).byte(), ("a cube",))
                yield Example(torch.zeros(3, size, size).byte(), ())

        with pytest.raises(ValueError, match="image 1 of a part has no caption"):
            make_pixels(Silent(), SIDE)(0)

    def test_the_cache_is_a_source(self, tmp_path):
        shards = made(tmp_path, "pixels", make_pixels(FakeSource(), SIDE))
        again, problems = CachedPixels(shards), Problems()
        assert (again.parts, again.fingerprint) == (5, FakeSource.fingerprint)
        for part in range(5):
            seen, wanted = (list(s.read(part, SIDE, problems)) for s in (again, FakeSource()))
            assert [e.captions for e in seen] == [e.captions for e in wanted]
            assert all(torch.equal(a.image, b.image) for a, b in zip(seen, wanted, strict=True))
        assert (problems.seen, problems.counts) == (100, {"corrupt": 60}), "its problems are told again"
        with pytest.raises(ValueError, match="images of 4 px, not 8"):
            list(again.read(0, 8, Problems()))


class TestTokens:
    @staticmethod
    def encoders(calls=None):
        def low(images):
            if calls is not None:
                calls.append(len(images))
            return images[:, 0, :2, :2].flatten(1).long()  # (b, 4)

        return {"low": low, "high": lambda images: images[:, 0].flatten(1).long() * 5}  # (b, 16)

    def test_several_tokenizers_in_one_reading(self, tmp_path):
        calls = []
        shards = made(tmp_path, "tokens", make_tokens(FakeSource(), SIDE, self.encoders(calls), 256, batch=2))
        images = torch.stack([e.image for e in examples()])
        for name, encode in self.encoders().items():
            rows = Rows(shards, name, torch.long)
            assert torch.equal(rows[:], encode(images)), f"{name} tokens are not those of their image"
        assert Rows(shards, "low")[:].dtype == torch.uint16
        assert calls == [2, 2, 1] * 4, "each image once, in batches of 2"
        assert list(all_captions(shards)) == [e.captions for e in examples()]
        assert all_problems(shards).counts == {"corrupt": 30}

    @pytest.mark.parametrize(("v", "dtype"), [(65_535, np.uint16), (65_536, np.uint16), (65_537, np.int32)])
    def test_the_largest_token_fits(self, v, dtype):
        make = make_tokens(FakeSource(), SIDE, {"low": lambda x: torch.full((len(x), 3), v - 1)}, v)
        low = make(0)[0]["low"]
        assert (low.dtype, low.tolist()) == (dtype, [[v - 1] * 3] * 5)

    @pytest.mark.parametrize("wrong", [lambda x: torch.full((len(x), 3), 8), lambda x: torch.full((len(x), 3), -1)])
    def test_refuses_tokens_outside_the_codebook(self, wrong):
        with pytest.raises(ValueError, match=r"'low': tokens .* 0 to 7"):
            make_tokens(FakeSource(), SIDE, {"low": wrong}, 8)(0)

    def test_refuses_fewer_rows_than_images(self):
        with pytest.raises(ValueError, match=r"expected \(5, N\)"):
            make_tokens(FakeSource(), SIDE, {"low": lambda x: torch.zeros(1, 3)}, 8)(0)


class TestText:
    @pytest.fixture
    def texts(self, tmp_path):
        pixels = made(tmp_path, "pixels", make_pixels(FakeSource(), SIDE))
        return Texts(made(tmp_path, "text", make_text(pixels, encode_text)))

    def test_every_caption_of_every_example(self, texts):
        assert len(texts) == 20
        for i, example in enumerate(examples()):
            wanted = encode_text(example.captions)
            assert len(texts[i]) == len(wanted), f"example {i} has {len(wanted)} captions"
            for a, b in zip(texts[i], wanted, strict=True):
                assert a.dtype == torch.float16
                assert torch.equal(a, b.half()), f"a caption of example {i} is another's, or padded"
        assert torch.equal(texts[-1][0], texts[19][0])
        with pytest.raises(IndexError, match="of 20"):
            texts[20]

    def test_each_text_is_encoded_and_kept_once_a_part(self, tmp_path):
        pixels, asked = made(tmp_path, "pixels", make_pixels(FakeSource(), SIDE)), []
        shards = made(tmp_path, "text", make_text(pixels, lambda texts: (asked.append(texts), encode_text(texts))[1]))
        assert len(asked) == 4, "a part without captions asks for nothing"
        assert all(len(set(texts)) == len(texts) for texts in asked)
        (arrays,) = [record["arrays"] for record in shards.records()[:1]]
        assert arrays["values"]["shape"] == [sum(map(len, encode_text(asked[0]))), 3]
        assert arrays["spans"]["shape"][0] > len(asked[0]), "this source repeats captions"

    @settings(max_examples=30, deadline=None)
    @given(data=st.data())
    def test_pick_takes_one_of_each(self, tmp_path_factory, data):
        if not hasattr(TestText, "shared"):
            root = tmp_path_factory.mktemp("text")
            pixels = made(root, "pixels", make_pixels(FakeSource(), SIDE))
            TestText.shared = Texts(made(root, "text", make_text(pixels, encode_text)))
        texts = TestText.shared
        indices = data.draw(st.lists(st.integers(-20, 19), max_size=6))
        u = data.draw(
            st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=len(indices), max_size=len(indices))
        )
        rows = texts.pick(torch.tensor(indices, dtype=torch.long), torch.tensor(u))
        assert len(rows) == len(indices)
        for row, i, x in zip(rows, indices, u, strict=True):
            assert torch.equal(row, texts[i][int(x * len(texts[i]))]), f"u = {x} of {len(texts[i])} captions"

    def test_pick_is_uniform(self, texts):
        i = next(i for i in range(20) if len(texts[i]) == 3)
        u = torch.arange(300) / 300
        rows = texts.pick([i] * 300, u)
        counts = [sum(torch.equal(row, caption) for row in rows) for caption in texts[i]]
        assert counts == [100, 100, 100]
        assert torch.equal(texts.pick([i], [1.0])[0], texts[i][2]), "u rounded up to 1 is the last one"

    def test_needs_the_captions_first(self, tmp_path):
        empty = Shards(tmp_path, "pixels", FakeSource.fingerprint, 5)
        with pytest.raises(ValueError, match=r"part 3 is not in .*first"):
            make_text(empty, encode_text)(3)

    def test_refuses_what_half_precision_cannot_hold(self, tmp_path):
        pixels = made(tmp_path, "pixels", make_pixels(FakeSource(), SIDE))
        with pytest.raises(ValueError, match="65,504"):
            make_text(pixels, lambda texts: [torch.full((2, 3), 70_000.0) for _ in texts])(0)

    def test_rows_of_tokens_and_texts_are_one_example(self, tmp_path):
        """Pixels tell the example's number, and so does one of its captions: they meet through both caches."""
        pixels = made(tmp_path, "pixels", make_pixels(FakeSource(), SIDE))
        tokens = made(tmp_path, "tokens", make_tokens(CachedPixels(pixels), SIDE, TestTokens.encoders(), 256))
        names = {}

        def remember(texts):
            rows = encode_text(texts)
            for text in texts:
                names[text] = float(len(names))
            return [row.clone().fill_(names[text]) for row, text in zip(rows, texts, strict=True)]

        texts, low = Texts(made(tmp_path, "text", make_text(tokens, remember))), Rows(tokens, "low", torch.long)
        several = [i for i in range(20) if len(texts[i]) > 1]
        assert len(several) == 12, "3 of the 5 in each of 4 parts"
        by_number = {value: text for text, value in names.items()}
        for i in several:
            assert by_number[float(texts[i][1][0, 0])] == f"number {int(low[i][0])}", f"row {i} is of two examples"


def test_scenes_end_to_end(tmp_path):
    scenes = SceneDataset(6, 16)
    shards = Shards(tmp_path, "pixels", scenes.fingerprint, scenes.parts)
    list(fill(shards, make_pixels(scenes, 16)))
    assert torch.equal(Rows(shards, "pixels")[:], scenes.images())
    assert [list(texts) for texts in all_captions(shards)] == [scenes.captions(i) for i in range(6)]
    assert all_problems(shards).summary() == ""


class TestEstimate:
    def test_worked_by_hand(self):
        config = preset("paper_3b")  # T5-XXL: 4096-d; 16x16 and 64x64 tokens of 8192 codes; 512 px
        assert estimate(config, 10_000_000, text_tokens=77) == {
            "pixels": 10_000_000 * 3 * 512 * 512,  # 7.9 TB
            "low": 10_000_000 * 256 * 2,  # 5.1 GB
            "high": 10_000_000 * 4096 * 2,  # 82 GB
            "text": 6_307_840_000_000,  # 10M x 77 x 4096 x 2: 6.3 TB
        }
        few = estimate(config, 1000, captions=2.5, text_tokens=10.2, pixels=300)
        assert few["pixels"] == 300 * 786_432
        assert few["text"] == 1000 * 25.5 * 4096 * 2
        assert estimate(config, 1000, pixels=5000)["pixels"] == 1000 * 786_432, "no more than there are"

    def test_it_is_what_the_files_take(self, tmp_path):
        """The arrays of a real cache, headers aside, are the bytes foretold."""
        config, source = preset("nano"), FakeSource()
        low, high = config.low_tokenizer, config.high_tokenizer
        encoders = {
            name: (lambda x, n=c.grid**2: torch.zeros(len(x), n).long()) for name, c in (("low", low), ("high", high))
        }
        pixels = made(tmp_path, "pixels", make_pixels(source, high.image_size))
        tokens = made(tmp_path, "tokens", make_tokens(CachedPixels(pixels), high.image_size, encoders, 256))
        told = estimate(config, 20)
        assert told["pixels"] == Rows(pixels, "pixels")[:].nbytes
        assert (told["low"], told["high"]) == (Rows(tokens, "low")[:].nbytes, Rows(tokens, "high")[:].nbytes)

    def test_text_fits(self):
        assert text_fits(64 * 2**30)
        assert not text_fits(64 * 2**30 + 1)
        assert text_fits(6_307_840_000_000, gib=6000)
        assert not text_fits(1, gib=0), "0 GiB: always encode anew"
