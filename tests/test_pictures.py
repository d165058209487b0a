"""pictures.py: a drawing as it happens, a PNG that tells what made it, the same pixels again, files from strangers."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import giant_png
from PIL import Image, PngImagePlugin

from minimuse.muse import Muse
from minimuse.pictures import again, difference, open_picture, output_paths, save_png, settings_of, with_settings

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
    assert told == settings_of(Image.open(tmp_path / "x.png")), "an opened picture tells the same"
    assert settings_of(image)["fingerprint"] == tiny_muse.fingerprint, "and so does one that was never saved"
    assert Image.open(tmp_path / "x.png").tobytes() == image.tobytes(), "the pixels are what was drawn"


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
        assert settings_of(new) == settings_of(tmp_path / "x.png"), "and the new one tells the same"
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
    [None, "", "{", "3", "[]", "null", "{}", '{"prompt": "a red cube", "seed": 3}'],
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


def test_output_paths_are_free_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_paths(None, "A red cube!", 2, film=True) == [
        Path("a-red-cube.png"), Path("a-red-cube-1.png"), Path("a-red-cube-film.png")
    ]  # fmt: skip
    Path("a-red-cube-1.png").touch()
    assert output_paths(None, "A red cube!", 2)[0] == Path("a-red-cube-v2.png"), "the first version without a conflict"
    Path("x.png").touch()
    assert output_paths(Path("x.png"), A, 1, force=True) == [Path("x.png")]
    with pytest.raises(FileExistsError, match=r"x\.png already there"):
        output_paths(Path("x.png"), A, 1)
    with pytest.raises(ValueError, match=r"ends in \.png"):
        output_paths(Path("x.jpg"), A, 1)
    with pytest.raises(FileNotFoundError, match="create it first"):
        output_paths(Path("nowhere/x.png"), A, 1)
