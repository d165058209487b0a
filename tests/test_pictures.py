"""pictures.py: a drawing as it happens, a PNG that tells what made it, the same pixels again, files from strangers."""

import hashlib
import io
import json
import math
import struct
import subprocess
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import giant_png
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from minimuse.muse import Muse
from minimuse.pictures import (
    Refused,
    again,
    decode_image,
    difference,
    from_pil,
    mask_from,
    open_picture,
    output_paths,
    save_png,
    settings_of,
    with_settings,
)

A = "a red cube"
SETTINGS = {"steps": 3, "guidance": (0, 2.5), "schedule": "pow1.5", "order": "halton", "superres": {"steps": 2}}


def sha(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


# --- what made it, and again ------------------------------------------------------------------------------------------


def test_a_png_holds_its_settings(tiny_muse, tmp_path):
    (image,) = tiny_muse.generate(A, seed=7, negative_prompt="a blue ball", **SETTINGS)
    save_png(image, tmp_path / "x.png")
    told = settings_of(tmp_path / "x.png")
    assert told == json.loads(json.dumps(image.info["minimuse"])), f"{told}"
    opened = Image.open(tmp_path / "x.png")
    assert told == settings_of(opened), "an opened picture tells the same"
    save_png(opened, tmp_path / "y.png")
    assert told == settings_of(tmp_path / "y.png"), "and so does one that is saved again"
    assert settings_of(image)["fingerprint"] == tiny_muse.fingerprint, "and so does one that was never saved"
    assert Image.open(tmp_path / "x.png").tobytes() == image.tobytes(), "the pixels are what was drawn"


def test_a_full_disk_destroys_no_picture(tmp_path, monkeypatch):
    save_png(Image.new("RGB", (4, 4), "red"), tmp_path / "x.png")
    old = (tmp_path / "x.png").read_bytes()

    def fill(image, path, **options):
        Path(path).write_bytes(b"half a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    for name in ("x.png", "y.png"):
        with pytest.raises(OSError, match="No space left"):
            save_png(Image.new("RGB", (4, 4), "blue"), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"], "no half file stays"
    assert (tmp_path / "x.png").read_bytes() == old, "the old picture stays whole"


def test_settings_as_text_are_on_a_copy():
    plain, told = Image.new("RGB", (2, 2)), {"model": "tiny", "fingerprint": "0", "prompt": A, "seed": 1}
    marked = with_settings(plain, told)
    assert settings_of(marked) == told, f"{marked.info}"
    assert [type(value) for value in marked.info.values()] == [str], "a text is what other programs keep"
    assert not plain.info, "the picture itself stays as it was"


def test_again_is_the_same_pixels(tiny_muse, tmp_path):
    images = tiny_muse.generate([A, "a blue ball"], seed=3, batch_size=1, negative_prompt=[None, A], **SETTINGS)
    for image in images:
        save_png(image, tmp_path / "x.png")
        seen = []
        new = again(tiny_muse, settings_of(tmp_path / "x.png"), callback=seen.append)
        assert sha(new) == sha(image), "the same checkpoint and settings must draw the same pixels"
        told = json.loads(json.dumps(settings_of(new)))
        assert told == settings_of(tmp_path / "x.png"), "and the new one tells the same"
        assert [s.stage for s in seen] == ["base"] * 3 + ["superres"] * 2, "callback sees every step"
    assert sha(images[0]) != sha(images[1]), "the two of this test must differ"


def test_another_process_draws_it_again(tiny_muse, tmp_path):
    (image,) = tiny_muse.generate(A, seed=3, **SETTINGS)
    save_png(image, tmp_path / "x.png")
    muse = Muse.from_pretrained(tiny_muse.save_pretrained(tmp_path / "copy"), device="cpu")
    assert sha(again(muse, settings_of(tmp_path / "x.png"))) == sha(image), "saved and loaded, it is the same Muse"


def test_another_checkpoint_is_refused(tiny_muse):
    told = settings_of(tiny_muse.generate(A, seed=0, steps=1)[0])
    with pytest.raises(ValueError, match="another checkpoint, tiny with the fingerprint 0123; this one is tiny"):
        again(tiny_muse, told | {"fingerprint": "0123"})


def test_edits_are_refused(tiny_muse):
    told = settings_of(tiny_muse.generate(A, seed=0, steps=1)[0])
    with pytest.raises(ValueError, match="made by inpaint from another picture, which it does not hold"):
        again(tiny_muse, told | {"task": "inpaint"})


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": lambda u: 1 - u},
        {"superres": {"order": lambda *a: a[1].float()}, "guidance": lambda u: u},
    ],
)
def test_functions_are_noted_and_refused(tiny_muse, tmp_path, settings):
    (image,) = tiny_muse.generate(A, seed=0, steps=2, **settings)
    assert again(tiny_muse, settings_of(image)).tobytes() == image.tobytes(), "the picture itself keeps the function"
    save_png(image, tmp_path / "x.png")
    told = settings_of(tmp_path / "x.png")
    assert told["steps"] == 2, "what it can hold is there"
    with pytest.raises(ValueError, match="a setting came as a function, which no PNG holds"):
        again(tiny_muse, told)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "{",
        "3",
        "[]",
        "null",
        "{}",
        '{"prompt": "a red cube", "seed": 3}',
        "[" * 100_000,
        '{"model": "tiny", "fingerprint": "0", "prompt": ["a red cube"], "seed": 3}',
    ],
)
def test_a_png_without_settings_is_refused(tmp_path, text):
    chunks = PngImagePlugin.PngInfo()
    if text is not None:
        chunks.add_text("minimuse", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png", pnginfo=chunks)
    with pytest.raises(ValueError, match=r"plain\.png holds no settings of minimuse"):
        settings_of(tmp_path / "plain.png")


# --- files from strangers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [None, 16])
@pytest.mark.parametrize("content", [b"", b"I am no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_is_a_sentence(tmp_path, content, side):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png cannot be read, it is of an unknown format"):
        open_picture(tmp_path / "x.png", side)


@pytest.mark.parametrize("side", [None, 16])
@pytest.mark.parametrize("pixels", [10_000, 20_000])  # Pillow warns of the first, and refuses the second by itself
def test_a_gigantic_picture_is_never_decoded(tmp_path, monkeypatch, side, pixels):
    (tmp_path / "x.png").write_bytes(giant_png(pixels))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it is being decoded"))
    with pytest.raises(ValueError, match=r"x\.png cannot be read, it is too large; give .* 89 million"):
        open_picture(tmp_path / "x.png", side)


def test_a_picture_comes_as_it_is_or_as_a_square(tmp_path):
    image = Image.new("RGBA", (40, 20), (200, 0, 0, 255))
    image.save(tmp_path / "x.png")
    assert open_picture(tmp_path / "x.png").size == (40, 20), "as it is"
    square = open_picture(tmp_path / "x.png", 16)
    assert (square.mode, square.size) == ("RGB", (16, 16)), f"{square.mode} {square.size}"
    assert square.getpixel((8, 8)) == (200, 0, 0), "its colours stay"
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "none.png")


# --- names and differences --------------------------------------------------------------------------------------------


def test_the_difference_of_two_pictures():
    black, gray = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2))
    gray.putpixel((1, 1), (0, 7, 0))
    assert difference(black, black) == "the same pixels"
    assert difference(black, gray).startswith("1 of 8 pixels differ, by at most 7 of 255")
    assert difference(black, gray.resize((2, 1))).startswith("another size, 2 x 1 pixels")


def test_output_paths_are_free_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_paths(None, "A red cube!", 2, film=True) == [
        Path("a-red-cube.png"), Path("a-red-cube-1.png"), Path("a-red-cube-film.png")
    ]  # fmt: skip
    Path("a-red-cube-1.png").touch()
    assert output_paths(None, "A red cube!", 2)[0] == Path("a-red-cube-v2.png"), "the first version without a conflict"
    Path("x.png").touch()
    assert output_paths(Path("x.png"), A, 1, force=True) == [Path("x.png")]
    with pytest.raises(ValueError, match=r"x\.png already exists"):
        output_paths(Path("x.png"), A, 1)
    with pytest.raises(ValueError, match=r"ends in \.png"):
        output_paths(Path("x.jpg"), A, 1)
    with pytest.raises(ValueError, match="create it first"):
        output_paths(Path("nowhere/x.png"), A, 1)


# --- image files ---


def decoded(file, side: int, min_side: int = 0) -> torch.Tensor:
    """The file at side x side pixels -> (3, side, side)."""
    return torch.from_numpy(np.array(decode_image(file, side, min_side))).permute(2, 0, 1)


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
        with pytest.raises(Refused, match="large"):
            decoded(io.BytesIO(header(*size)), 16)


def test_no_postscript_runs(monkeypatch):
    """Pillow would hand an EPS to Ghostscript, whatever its name says."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"{args} was run"))
    eps = picture(mode="RGB", form="EPS")
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS", "Pillow alone knows it"
    with pytest.raises(Refused, match="unknown format"):
        decoded(io.BytesIO(eps), 16)


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
    bar = decoded(io.BytesIO(file.getvalue()), 48)[:, 24, [8, 24, 40]].int()
    want = torch.tensor([255, 64, 0]).expand(3, 3)
    there = [0, 2] if mode == "1" else [0, 1, 2]
    assert (bar - want)[:, there].abs().max() <= 2, f"{mode}: {bar.tolist()}"


def test_transparent_is_white():
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(file, "PNG")
    assert (decoded(file, 16) == 255).all()


@pytest.mark.parametrize("value", [70_000, -1])
def test_values_beyond_16_bits_are_refused(value):
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32), value, dtype=np.int32)).save(file, "TIFF")
    with pytest.raises(Refused, match="of mode I"):
        decoded(file, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation):
    """EXIF 1 to 8, against Pillow's own table of turns: a red top left corner comes back as where EXIF puts it."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16, :16] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    red = (decoded(file, 32)[0] > 128).nonzero().float().mean(0).tolist()
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert [value > 16 for value in red] == [bool(value) for value in corner]


@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from(["PNG", "JPEG"]))
def test_shorter_side_is_scaled_and_the_centre_kept(width, height, form):
    """A horizontal and a vertical ramp: the middle of the picture stays in the middle, at one scale for both axes."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    ramp = np.stack([100 + 3 * (x - (width - 1) / 2), 100 + 3 * (y - (height - 1) / 2), 0 * x], -1)
    file = io.BytesIO()
    Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(file, form, **{"quality": 95} if form == "JPEG" else {})
    image = decoded(file, 16).float()
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
    inner = decoded(file, 16)[:, :, 2:-2].int()
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
    whole = decoded(png, 32).int()
    assert (decoded(jpeg, 32).int() - whole).abs().max() <= 8
    assert np.abs(eighth - whole.numpy()).max() > 30, "else this test could not tell"


def test_min_side():
    assert decoded(io.BytesIO(picture(0, (7, 90))), 32, 7).shape == (3, 32, 32)
    with pytest.raises(Refused, match="small"):
        decoded(io.BytesIO(picture(0, (63, 90))), 32, 64)


@given(st.binary(max_size=300), st.integers(0, 60))
def test_no_bytes_break_the_decoder(noise, keep):
    for start in (picture(form="JPEG"), picture(), picture(form="GIF"), picture(form="WEBP")):
        try:
            assert decoded(io.BytesIO(start[:keep] + noise), 16).shape == (3, 16, 16)
        except Refused:
            continue


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
