"""Pictures as files: PNGs that hold the settings that made them, the same picture drawn again, files of any origin.

Not here: which settings are noted (`Muse.to_pictures`), captioned images to train on (`data_sources.py`).
"""

import itertools
import json
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from minimuse.data_images import to_rgb
from minimuse.sampler import Step
from minimuse.utils import atomic_write, require

KEY = "minimuse"  # where the settings are: a dict in an image's `info`, JSON in a PNG's text chunk
FUNCTION = "a function, which no PNG holds"  # in place of what JSON cannot hold
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS: Pillow would run Ghostscript
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # and 16-bit gray
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


def settings_of(picture: str | Path | Image.Image) -> dict[str, Any]:
    """A PNG of `save_png`, or a picture of Muse -> what made it: model, fingerprint, prompt, seed, settings.

    ValueError if it holds none.
    """
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
    """Paths for `count` pictures, then for their film. Without `out`, the first free name made of the prompt is taken.

    ValueError for another format, a missing folder, or existing files without `force`.
    """
    stem = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60] or "picture"
    endings = ["", *(f"-{i}" for i in range(1, count)), *["-film"] * film]
    for version in itertools.count(1):
        path = out or Path(f"{stem}-v{version}.png" if version > 1 else f"{stem}.png")
        require(path.suffix.lower() == ".png", f"{path}: give a name that ends in .png, the format that holds settings")
        require(path.parent.is_dir(), f"no folder {path.parent}; create it first")
        paths = [path.with_stem(path.stem + ending) for ending in endings]
        existing = [str(path) for path in paths if path.exists()]
        if out or not existing:
            break
    require(force or not existing, f"{', '.join(existing)} already exists; give another name, or --force")
    return paths
