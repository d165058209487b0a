"""data_images.py: images between PIL, files, uint8 and [-1, 1]."""

import io
import struct
import subprocess
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minimuse.data_images import Refused, area_downsample, decode_image, from_pil, mask_from, to_float, to_pil, to_uint8
from minimuse.data_sources import SceneDataset


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


# --- image files ---


def picture(i: int = 0, size=(40, 32), mode: str = "RGB", form: str = "PNG", **options) -> bytes:
    """An image file with a colour of its own."""
    file = io.BytesIO()
    color = (10 * i % 256, 80, 160)
    Image.new("RGB", size, color).convert(mode).save(file, form, **options)
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG that claims to have this size, and holds no pixel."""
    chunk = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ihdr = struct.pack(">I", len(chunk)) + b"IHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    return b"\x89PNG\r\n\x1a\n" + ihdr + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 10_000)])
def test_a_bomb_is_never_decoded(size, monkeypatch):
    """The first is beyond Pillow's own limit, the second between its warning and its limit."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a bomb was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # even where a user silenced Pillow
        with pytest.raises(Refused, match="huge"):
            decode_image(io.BytesIO(header(*size)), 16)


def test_no_postscript_runs(monkeypatch):
    """Pillow would hand an EPS to Ghostscript, whatever its name says."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"{args} was run"))
    eps = picture(mode="RGB", form="EPS")
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS", "Pillow alone knows it"
    with pytest.raises(Refused, match="unknown format"):
        decode_image(io.BytesIO(eps), 16)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I"])
def test_modes_become_rgb(mode):
    """White, dark gray and black bars survive every mode (1 has no gray; I is 16-bit gray in a wider box)."""
    bars = np.repeat(np.array([255, 64, 0], dtype=np.uint8), 16)[None].repeat(48, 0)
    if mode.startswith("I"):
        image = Image.fromarray((bars.astype(np.uint16) * 257).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray(bars).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    file = io.BytesIO()
    image.save(file, "TIFF")
    bar = decode_image(io.BytesIO(file.getvalue()), 48)[:, 24, [8, 24, 40]].int()
    want = torch.tensor([255, 64, 0]).expand(3, 3)
    there = [0, 2] if mode == "1" else [0, 1, 2]
    assert (bar - want)[:, there].abs().max() <= 2, f"{mode}: {bar.tolist()}"


def test_transparent_is_white():
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(file, "PNG")
    assert (decode_image(file, 16) == 255).all()


def test_values_beyond_16_bits_are_refused():
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32), 70_000, dtype=np.int32)).save(file, "TIFF")
    with pytest.raises(Refused, match="of mode I"):
        decode_image(file, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation):
    """EXIF 1 to 8, against Pillow's own table of turns: a red top left corner comes back as where EXIF puts it."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16, :16] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    red = (decode_image(file, 32)[0] > 128).nonzero().float().mean(0).tolist()
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert [value > 16 for value in red] == [bool(value) for value in corner]


@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from(["PNG", "JPEG"]))
def test_shorter_side_is_scaled_and_the_centre_kept(width, height, form):
    """A horizontal and a vertical ramp: the middle of the picture stays in the middle, at one scale for both axes."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    ramp = np.stack([100 + 3 * (x - (width - 1) / 2), 100 + 3 * (y - (height - 1) / 2), 0 * x], -1)
    file = io.BytesIO()
    Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(file, form, **{"quality": 95} if form == "JPEG" else {})
    image = decode_image(file, 16).float()
    assert image.shape == (3, 16, 16)
    middle = image[:2, 6:10, 6:10].mean((1, 2))
    assert (middle - 100).abs().max() < 5, f"the centre moved: {middle.tolist()}"
    slope = 3 * min(width, height) / 16
    across = (image[0, 4:12, 10] - image[0, 4:12, 5]).mean() / 5
    down = (image[1, 10, 4:12] - image[1, 5, 4:12]).mean() / 5
    assert abs(across - slope) < 1.5, f"{across} a pixel across, {slope} expected"
    assert abs(down - slope) < 1.5, f"{down} a pixel down, {slope} expected"


def test_resizing_is_antialiased():
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    inner = decode_image(file, 16)[:, :, 2:-2].int()
    assert (inner - 127).abs().max() <= 2, "black and white stripes finer than a pixel are gray"


def test_a_drafted_jpeg_is_nearly_the_whole_one():
    """128 px of detail that 32 px can just hold: decoded at half it is kept, at an eighth it would be lost."""
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    blobs = blobs.resize((128, 128), Image.Resampling.BICUBIC)
    jpeg, png = io.BytesIO(), io.BytesIO()
    blobs.save(jpeg, "JPEG", quality=95, subsampling=0)
    with Image.open(jpeg) as image:
        image.save(png, "PNG")
    with Image.open(jpeg) as image:
        image.draft(None, (16, 16))
        eighth = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1).astype(int)
    whole = decode_image(png, 32).int()
    assert (decode_image(jpeg, 32).int() - whole).abs().max() <= 8
    assert np.abs(eighth - whole.numpy()).max() > 30, "else this test could not tell"


def test_min_side():
    for file, min_side in ((picture(0, (16, 90)), None), (picture(0, (7, 90)), 7)):
        assert decode_image(io.BytesIO(file), 32, min_side).shape == (3, 32, 32)
    for file, min_side in ((picture(0, (15, 90)), None), (picture(0, (63, 90)), 64)):
        with pytest.raises(Refused, match="small"):
            decode_image(io.BytesIO(file), 32, min_side)


@given(st.binary(max_size=300), st.integers(0, 60))
def test_no_bytes_break_the_decoder(noise, keep):
    for start in (picture(form="JPEG"), picture(), picture(form="GIF"), picture(form="WEBP")):
        try:
            assert decode_image(io.BytesIO(start[:keep] + noise), 16).shape == (3, 16, 16)
        except Refused:
            continue
