"""data_images.py: the embedded data set, and pictures on their way between PIL, uint8 and [-1, 1]."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

from minimuse import data_sources
from minimuse.data_images import area_downsample, from_pil, mask_from, to_float, to_pil, to_uint8
from minimuse.data_sources import Problems, SceneDataset


def test_dataset_follows_from_its_seed():
    a, b = SceneDataset(10, 32), SceneDataset(10, 32)
    assert len(a) == 10, "the length is n"
    assert a.scene(3) == b.scene(3), "the same data set must hold the same scenes"
    assert a.scene(3) != SceneDataset(10, 32, seed=1).scene(3), "another seed, other scenes"
    assert a.scene(3) != SceneDataset(10, 32, split="test").scene(3), "another split, other scenes"
    assert a.captions(3) == b.captions(3), "captions must follow from the index"
    for i in range(10):
        assert len(set(a.captions(i, 5))) == 5, f"captions of scene {i} repeat: {a.captions(i, 5)}"
    assert a.captions(3, paraphrase=True) != a.captions(3), "paraphrases differ from the captions"


@pytest.mark.parametrize("progress", [False, True])
def test_images_do_not_depend_on_neighbours(progress):
    data = SceneDataset(300, 16)
    images = data.images(progress=progress)
    assert (images.shape, images.dtype) == ((300, 3, 16, 16), torch.uint8), f"{images.shape} {images.dtype}"
    alone = data.images(torch.tensor([299, 4])).int()
    assert (images[[299, 4]] - alone).abs().max() <= 1, "an image alone and in a batch should be the same"
    assert data.images([]).shape == (0, 3, 16, 16), "no index, no image"


def test_dataset_refuses_nonsense():
    for wrong in ({"n": 0}, {"size": 4}, {"split": "valid"}):
        with pytest.raises(ValueError, match="expected"):
            SceneDataset(**({"n": 3, "size": 32} | wrong))
    with pytest.raises(IndexError, match="0 to 2"):
        SceneDataset(3, 32).scene(3)
    with pytest.raises(ValueError, match="at most"):
        SceneDataset(3, 32).captions(0, 500)


def test_uint8_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(pixels)), pixels), "uint8 -> float -> uint8 must be exact"
    assert to_float(pixels).aminmax() == (-1, 1), "0 and 255 are the ends of [-1, 1]"
    assert torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8)), "clip"
    with pytest.raises(ValueError, match="uint8"):
        to_float(torch.zeros(1, 3, 4, 4))


def test_pil_round_trip():
    images = SceneDataset(2, 32).images()
    back = torch.cat([from_pil(picture, 32) for picture in to_pil(images)])
    assert torch.equal(to_uint8(back), images), "tensor -> PIL -> tensor must be exact"
    assert to_pil(to_float(images))[1].tobytes() == to_pil(images)[1].tobytes(), "floats and uint8 give one picture"
    with pytest.raises(ValueError, match=r"B, 3, H, W"):
        to_pil(images[0])


def test_from_pil_takes_the_usual_modes():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (from_pil(clear, 8) == 1).all(), "what is transparent becomes white"
    assert (from_pil(Image.new("L", (8, 8), 0), 8) == -1).all(), "gray levels become RGB"
    red = Image.new("RGB", (8, 8), "red")
    assert torch.equal(from_pil(red.convert("P"), 8), from_pil(red, 8)), "a palette is looked up"


def test_from_pil_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"str came.*Image\.open"):
        from_pil("cat.png", 8)
    with pytest.raises(ValueError, match=r"8 x 8 pixels, 9 x 8 came.*resize\(\(8, 8\)\)"):
        from_pil(Image.new("RGB", (9, 8)), 8)
    with pytest.raises(ValueError, match="CMYK"):
        from_pil(Image.new("CMYK", (8, 8)), 8)


def test_halve_averages():
    images = torch.tensor([[0.0, 0.2], [0.4, 0.6]]).view(1, 1, 2, 2)
    assert torch.allclose(area_downsample(images), torch.tensor(0.3)), "a low-res pixel is the mean of its block"
    small = area_downsample(SceneDataset(1, 32).images(), 4)
    assert (small.shape, small.dtype) == ((1, 3, 8, 8), torch.uint8), "uint8 stays uint8"
    for factor in (0, 3):
        with pytest.raises(ValueError, match="divide"):
            area_downsample(torch.zeros(1, 3, 32, 32), factor)


@pytest.mark.parametrize(
    "kind",
    [
        lambda m: Image.fromarray(m.astype(np.uint8) * 255),
        lambda m: Image.fromarray(m.astype(np.uint8) * 255).convert("1"),
        lambda m: Image.fromarray(m.astype(np.uint8) * 255).convert("RGB"),
        lambda m: Image.fromarray(m.astype(np.uint8) * 255).convert("RGBA"),
        lambda m: m,
        lambda m: m.astype(np.uint8) * 255,
        lambda m: m.astype(np.int64),
        lambda m: m.astype(np.float64),
        lambda m: m.tolist(),
        torch.from_numpy,
        lambda m: torch.from_numpy(m).float(),
        lambda m: torch.from_numpy(m).byte() * 255,
    ],
    ids="L 1 RGB RGBA bool uint8 int64 float64 list tensor float-tensor uint8-tensor".split(),
)
def test_mask_from_takes_the_usual_kinds(kind):
    white = np.zeros((6, 9), dtype=bool)
    white[1:3, 4:8] = True
    mask = mask_from(kind(white), (9, 6))
    assert mask.dtype == torch.bool, f"a mask is boolean, {mask.dtype} came"
    assert torch.equal(mask, torch.from_numpy(white)), "white is what to repaint"


def test_mask_from_cuts_gray_in_the_middle():
    gray = Image.fromarray(np.array([[0, 127, 128, 255]], dtype=np.uint8))
    assert mask_from(gray, (4, 1)).tolist() == [[False, False, True, True]], "above half is white"
    assert mask_from(np.array([[0.0, 0.5, 0.51, 1.0]]), (4, 1)).tolist() == [[False, False, True, True]], "floats too"


@pytest.mark.parametrize("wrong", [np.ones((9, 6)), np.ones((1, 6, 9)), np.ones(6), np.array(1), None, [], "mask.png"])
def test_mask_from_says_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=r"expected a mask of the picture's 9 x 6 pixels, .*came"):
        mask_from(wrong, (9, 6))


def test_shares_say_how_often_there_are_one_two_and_three_things():
    for n in (1, 2, 3):
        data = SceneDataset(20, 32, fractions=tuple(float(i == n) for i in (1, 2, 3)))
        assert {len(data.scene(i).things) for i in range(20)} == {n}, f"all of the weight is on {n}"


def read_all(source, size):
    """All parts of a source, and what it passed over."""
    problems = Problems()
    return [example for part in range(source.parts) for example in source.read(part, size, problems)], problems


def test_scenes_are_read_in_parts_of_500():
    data = SceneDataset(503, 32, seed=3, k=3)
    examples, problems = read_all(data, 16)
    small = SceneDataset(503, 16, seed=3)
    want = torch.cat([small.images(range(500)), small.images(range(500, 503))])
    assert data.parts == 2
    assert torch.equal(torch.stack([example.image for example in examples]), want), "the size is the one asked for"
    assert [example.captions for example in examples] == [tuple(small.captions(i, 3)) for i in range(503)]
    assert (problems.seen, problems.usable, problems.summary()) == (503, 503, ""), f"{problems}"
    for part in (-1, 2):
        with pytest.raises(IndexError, match="0 to 1"):
            next(data.read(part, 16, problems))


def test_pitfall_34_fingerprint_of_scenes_tells_what_they_depend_on(monkeypatch):
    data = SceneDataset(10, 32)
    others = ({"n": 11}, {"split": "test"}, {"seed": 1}, {"fractions": (1, 0, 0)}, {"k": 3})
    prints = [replace(data, **other).fingerprint for other in others]
    assert len({data.fingerprint, *prints}) == 6, "another field, other data"
    assert replace(data, size=64).fingerprint == data.fingerprint, "the size is told when reading"
    monkeypatch.setattr(data_sources, "SCENES_VERSION", 2)
    assert replace(data).fingerprint != data.fingerprint, "another renderer, other pictures"


def test_problems_add_up_and_are_plain_values():
    first, second = Problems(seen=20), Problems(seen=7)
    for name in "abcd":
        first.add("corrupt", f"{name}.png")
    second.add("without a caption", "z.png")
    second.add("corrupt", "e.png")
    both = first + Problems(**json.loads(json.dumps(asdict(second))))
    assert (both.seen, both.usable, both.counts) == (27, 21, {"corrupt": 5, "without a caption": 1})
    told = "passed over 6 of 27 images: 5 corrupt (a.png, b.png, c.png, ...), 1 without a caption (z.png)"
    assert both.summary() == told
    assert first.counts == {"corrupt": 4}, "adding leaves the parts as they were"
    assert Problems(seen=9).summary() == "", "nothing to tell"


def test_problems_refuse_a_source_without_any_example():
    problems = Problems(seen=1)
    problems.check("folder")
    problems.add("corrupt", "a.png")
    with pytest.raises(ValueError, match=r"folder: no usable .* 1 of 1 images: 1 corrupt \(a.png\)"):
        problems.check("folder")
    with pytest.raises(ValueError, match="nothing was found"):
        Problems().check("folder")
