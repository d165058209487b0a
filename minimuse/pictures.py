"""Pictures of users: files and masks of any kind, PNGs that hold the settings that made them, the same drawn again.

Not here: which settings are noted (`Muse.to_pictures`), captioned images to train on (`data_sources.py`).
"""

import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from minimuse.sampler import Step
from minimuse.utils import atomic_write, require, to_float

KEY = "minimuse"  # where the settings are: a dict in an image's `info`, JSON in a PNG's text chunk
FUNCTION = "a function, which no PNG holds"  # in place of what JSON cannot hold
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS: Pillow would run Ghostscript
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # and 16-bit gray
TEXTS = (".txt", ".json", ".jsonl", ".csv")  # captions, which lie next to pictures
PROBLEMS = dict.fromkeys((Image.DecompressionBombError, Image.DecompressionBombWarning), "too large")
PROBLEMS[UnidentifiedImageError] = "of an unknown format"


class Refused(Exception):
    """A file that cannot be used. The text is the kind of problem, such as "damaged"."""


def save_png(image: Image.Image, path: str | Path) -> None:
    """Save a picture of Muse as a whole PNG or none, with its settings; `image.save` would drop them."""
    chunks = PngInfo()
    chunks.add_text(KEY, with_settings(image, image.info.get(KEY, {})).info[KEY])
    atomic_write(Path(path), partial(image.save, format="PNG", pnginfo=chunks))


def with_settings(image: Image.Image, settings: dict[str, Any] | str) -> Image.Image:
    """A copy that carries the settings as text, which other programs keep when they write a PNG."""
    image = image.copy()
    image.info = {KEY: settings if isinstance(settings, str) else json.dumps(settings, default=lambda value: FUNCTION)}
    return image


def decode_image(file: str | Path | IO[bytes], side: int | None = None, min_side: int = 0) -> Image.Image:
    """An image file of any origin -> a PIL image. `Refused` by its header if it is too large, or below `min_side`.

    With `side`: upright, RGB, the shorter side scaled to `side`, cropped at the centre; `info["cut"]` is the fraction
    that the crop removed. An animation gives its first frame. Colour profiles are not applied.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if min(image.size) < min_side:
                    raise Refused("too small")
                if side is None:
                    image.load()
                    return image
                known = image.mode in MODES or image.mode[:1] == "I"
                if not known or (image.mode == "I" and not all(0 <= value < 2**16 for value in image.getextrema())):
                    raise Refused(f"of mode {image.mode}")
                image.draft(None, (2 * side, 2 * side))  # JPEGs decode faster at a half, a quarter or an eighth
                square = ImageOps.fit(to_rgb(ImageOps.exif_transpose(image)), (side, side), Image.Resampling.LANCZOS)
                square.info["cut"] = 1 - min(image.size) / max(image.size)
                return square
    except (Refused, FileNotFoundError):
        raise
    except Exception as error:  # decoders raise nearly every kind of exception on damaged files
        raise Refused(PROBLEMS.get(type(error), "damaged")) from error


def open_picture(path: str | Path, side: int | None = None) -> Image.Image:
    """`decode_image` for a file that a user names. ValueError says what is wrong and which files are expected."""
    try:
        return decode_image(path, side)
    except Refused as problem:
        expected = f"give a PNG, JPEG or WebP of at most {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        raise ValueError(f"{Path(path).name} cannot be read, it is {problem}; {expected}") from problem


def read_pictures(path: Path, side: int, most: int) -> Tensor:
    """A picture, or a folder of them -> up to `most`, evenly spread by name, (n, 3, side, side) uint8, at least one."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix not in TEXTS and file.name[0] != "."]
    squares = []
    for file in files[:: -(-len(files) // most) or 1]:
        try:
            squares.append(torch.from_numpy(np.array(decode_image(file, side, side // 2))).permute(2, 0, 1))
        except Refused as problem:
            warnings.warn(f"{file.name} is {problem}, so it is left out", stacklevel=2)
    require(squares, f"{path} holds no picture of at least {side // 2} pixels a side; give a folder of pictures")
    return torch.stack(squares)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> RGB. Transparent pixels become white."""
    if image.mode[:1] == "I":  # Choice: gray of the fewest bits that hold its largest value; cameras have 10, 12, or 14
        values = np.asarray(image)
        white = next((2**bits - 1 for bits in (8, 10, 12, 14) if values.max() < 2**bits), 65535)
        image = Image.fromarray((values.clip(0, white) * (255 / white) + 0.5).astype(np.uint8))
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def from_pil(image: Image.Image, size: int) -> Tensor:
    """A PIL image of size x size pixels -> (1, 3, size, size) in [-1, 1]. Transparent pixels become white."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, {type(image).__name__} came; open a file with PIL.Image.open(path)")
    if image.size != (size, size):
        came = f"{image.width} x {image.height} came; crop it to a square and scale it"
        raise ValueError(f"expected an image of {size} x {size} pixels, {came}")
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
        raise ValueError(f"expected an image of mode RGB, RGBA, L or P, {image.mode} came; convert it to RGB")
    pixels = torch.frombuffer(bytearray(to_rgb(image).tobytes()), dtype=torch.uint8)
    return to_float(pixels.view(1, size, size, 3).permute(0, 3, 1, 2))


def mask_from(mask: Any, size: tuple[int, int]) -> Tensor:
    """A PIL image or an array (H, W) -> bool (H, W), True = repaint. `size` is the picture's (W, H).

    One rule for every type: black is 0; white is the smallest of 1, 255 and 65535 that no value exceeds; what is more
    than half of white is repainted. Colors count by their brightness. ValueError if nothing is white, or if parts are
    transparent: some programs erase what is to be repainted, others paint it.
    """
    plain = isinstance(mask, Image.Image) and mask.mode[:1] in ("1", "I", "F")
    require(not (plain and "transparency" in mask.info), "the mask has a transparent color; give black and white")
    if isinstance(mask, Image.Image) and not plain:
        require(mask.mode != "LAB", "the mask is of mode LAB, which Pillow cannot convert; give black and white")
        clear = mask.convert("RGBA").getchannel("A").getextrema() != (255, 255)
        require(not clear, "the mask has transparent parts; give black and white, such as Image.getchannel('A')")
        mask = mask.convert("L")
    mask = np.asarray(mask.detach().cpu().double() if isinstance(mask, Tensor) else mask)
    came = " x ".join(str(n) for n in mask.shape[::-1]) or "a single value"
    require(mask.shape == size[::-1], f"expected a mask of the picture's {size[0]} x {size[1]} pixels, {came} came")
    low, high = (float(mask.min()), float(mask.max())) if mask.dtype.kind in "biuf" else (math.nan, math.nan)
    fits = 0 <= low <= high <= 65535
    require(fits, f"the mask holds {mask.dtype} values from {low} to {high}; give 0 to 1, or 0 to 255")
    white = next(w for w in (1, 255, 65535) if high <= w)
    require(high > white / 2, f"the mask is empty: no value is above half of {white}; white is what to repaint")
    return torch.from_numpy(mask > white / 2)


def settings_of(picture: str | Path | Image.Image) -> dict[str, Any]:
    """A PNG, or a picture of Muse -> what made it: model, fingerprint, prompt, seed, settings. ValueError without."""
    image = picture if isinstance(picture, Image.Image) else open_picture(picture)
    settings = image.info.get(KEY)
    with suppress(ValueError, RecursionError):
        settings = json.loads(settings) if isinstance(settings, str) else settings
    name = Path(getattr(image, "filename", "") or "the picture").name
    needed = {"model": str, "fingerprint": str, "prompt": str, "seed": int}
    known = isinstance(settings, dict) and all(isinstance(settings.get(k), kind) for k, kind in needed.items())
    require(known, f"{name} holds no settings of minimuse; many programs drop them when they save a picture again")
    return settings


def again(muse: Any, settings: dict[str, Any], *, callback: Callable[[Step], None] | None = None) -> Image.Image:
    """A Muse and `settings_of` a picture that it generated -> the same picture.

    ValueError if another checkpoint made it, or if it needs more than its prompt and settings. Another machine, or a
    batch of several pictures, may round differently.
    """
    is_same = settings["fingerprint"] == muse.fingerprint
    made = "the picture was made by another checkpoint, {model} with the fingerprint {fingerprint}".format(**settings)
    require(is_same, f"{made}; this one is {muse.config.name} with {muse.fingerprint}; name the right one")
    task = settings.get("task")
    require(not task, f"it was made by {task} from another picture, which it does not hold; give a generated one")
    require(FUNCTION not in str(settings), f"a setting came as {FUNCTION}; only Python can draw it again")
    given = {name: value for name, value in settings.items() if name not in ("model", "fingerprint", "prompt")}
    return muse.generate(settings["prompt"], callback=callback, **given)[0]


def difference(old: Image.Image, new: Image.Image) -> str:
    """Two pictures -> how many of their pixels differ and by how much, in words."""
    if old.size != new.size:
        return f"another size, {new.width} x {new.height} pixels: the old one was cut or scaled"
    off = np.abs(np.asarray(old.convert("RGB"), dtype=int) - np.asarray(new.convert("RGB"))).max(2)
    count = f"{(off > 0).sum()} of {off.size} pixels differ, by at most {off.max()} of 255"
    return f"{count}: other hardware rounds differently" if off.any() else "the same pixels"


def output_paths(out: Path | None, prompt: str, count: int, *, film: bool = False, force: bool = False) -> list[Path]:
    """Paths for `count` pictures, then for their film, that may be written. Without `out`: the first free name."""
    stem = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60] or "picture"
    endings = ["", *(f"-{i}" for i in range(1, count)), *["-film"] * film]
    for version in itertools.count(1):
        path = out or Path(f"{stem}-v{version}.png" if version > 1 else f"{stem}.png")
        require(path.suffix.lower() == ".png", f"{path}: give a name that ends in .png, the format that holds settings")
        writable = path.parent.is_dir() and os.access(path.parent, os.W_OK)
        require(writable, f"no folder {path.parent} to write in; create it first, or give another")
        paths = [path.with_stem(path.stem + ending) for ending in endings]
        existing = [str(path) for path in paths if path.exists()]
        if out or not existing:
            break
    free = force and not any(path.is_dir() for path in paths)
    require(free or not existing, f"{', '.join(existing)} already exists; give another name, or --force for files")
    return paths
