"""data_images.py: images between PIL, uint8 and [-1, 1]."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from minimuse.data_images import area_downsample, to_float, to_pil, to_uint8
from minimuse.data_sources import SceneDataset
from minimuse.pictures import from_pil, mask_from


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
    with pytest.raises(ValueError, match=r"8 x 8 pixels, 9 x 8 came; crop it to a square"):
        from_pil(Image.new("RGB", (9, 8)), 8)
    with pytest.raises(ValueError, match="CMYK"):
        from_pil(Image.new("CMYK", (8, 8)), 8)


def test_halve_averages():
    images = torch.tensor([[0.0, 0.2], [0.4, 0.6]]).view(1, 1, 2, 2)
    mean = area_downsample(images).item()
    assert abs(mean - 0.3) <= 1 / 127.5, f"a low-res pixel is the mean of its block, {mean} came"
    images = SceneDataset(4, 32).images()
    low = area_downsample(to_float(images), 4)
    assert low.equal(to_float(area_downsample(images, 4))), "floats and uint8 of one image have the same low-res image"
    small = area_downsample(SceneDataset(1, 32).images(), 4)
    assert (small.shape, small.dtype) == ((1, 3, 8, 8), torch.uint8), "uint8 stays uint8"
    for factor in (0, 3):
        with pytest.raises(ValueError, match="factor"):
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


GRAY = np.array([[0, 127, 128, 255]], dtype=np.uint8)
WHITE = [[False, False, True, True]]


@pytest.mark.parametrize(
    "mask",
    [
        GRAY,
        Image.fromarray(GRAY),
        Image.fromarray(GRAY).convert("RGB"),
        Image.fromarray(GRAY).convert("RGBA"),
        Image.fromarray(GRAY).convert("LA"),
        Image.fromarray(GRAY).convert("P"),
        Image.fromarray(GRAY.astype(np.float32)),
        Image.fromarray(GRAY.astype(np.float32) / 255),
        Image.fromarray(GRAY.astype(np.int32)),
        Image.fromarray(GRAY.astype(np.uint16)),
        Image.fromarray(GRAY.astype(np.uint16) * 257),
        Image.fromarray(GRAY // 128),
        GRAY // 128,
        GRAY > 127,
        GRAY.astype(np.int64),
        GRAY.astype(np.float16),
        GRAY / 255,
        GRAY.astype(np.uint16) * 257,
        torch.from_numpy(GRAY),
        torch.from_numpy(GRAY / 255).bfloat16(),
        GRAY.tolist(),
    ],
    ids=lambda m: getattr(m, "mode", None) or str(getattr(m, "dtype", "list")),
)
def test_pitfall_35_one_rule_for_masks_of_every_type(mask):
    assert mask_from(mask, (4, 1)).tolist() == WHITE


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (Image.new("RGBA", (4, 1), (255, 255, 255, 0)), "transparent parts"),
        (Image.new("LA", (4, 1), (0, 128)), "transparent parts"),
        (Image.new("P", (4, 1)), "empty"),
        (Image.new("LAB", (4, 1)), "the mask is of mode LAB"),
        (np.full((1, 4), 100), "no value is above half of 255; white is"),
        (np.full((1, 4), 100, np.uint8), "no value is above half of 255"),
        (np.full((1, 4), 300, np.uint16), "no value is above half of 65535"),
        (np.zeros((1, 4)), "no value is above half of 1;"),
        (np.full((1, 4), math.nan), "float64 values from nan to nan"),
        (np.full((1, 4), -1), "int64 values from -1.0 to -1.0"),
        (np.full((1, 4), 1e9), "values from 1000000000.0"),
        (np.full((1, 4), "x"), "values from nan to nan"),
    ],
)
def test_pitfall_35_ambiguous_masks_are_refused(mask, match):
    with pytest.raises(ValueError, match=match):
        mask_from(mask, (4, 1))


def test_a_black_and_white_file_with_a_transparent_color_is_no_mask(tmp_path):
    Image.new("1", (4, 1), 1).save(tmp_path / "mask.png", transparency=1)
    with pytest.raises(ValueError, match="transparent color"):
        mask_from(Image.open(tmp_path / "mask.png"), (4, 1))


def test_a_picture_with_an_erased_part_is_no_mask():
    erased = Image.new("RGBA", (4, 1), "white")
    erased.putpixel((0, 0), (255, 255, 255, 0))
    with pytest.raises(ValueError, match=r"transparent parts.*getchannel"):
        mask_from(erased, (4, 1))
    alpha = Image.fromarray(np.array([[255, 0, 0, 255]], dtype=np.uint8))
    assert mask_from(alpha, (4, 1)).tolist() == [[True, False, False, True]]


def test_a_mask_of_a_training_step_may_need_gradients():
    mask = torch.eye(4).requires_grad_()
    assert torch.equal(mask_from(mask, (4, 4)), torch.eye(4) > 0), "gradients do not matter"
