"""Pictures as files: PNGs that tell what made them, the same picture drawn again, and pictures from strangers.

    for step in follow(drawing)              a drawing as it happens, and then the picture
    save_png(image, "cube.png")              its text chunk `minimuse` holds prompt, seed and settings as JSON
    again(muse, settings_of("cube.png"))     the same checkpoint and settings: the same pixels

Not here: what the settings are (`Muse.finish` notes them), captioned pictures to train on (`data_sources.py`).
"""

import json
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from minimuse.data_images import to_pil
from minimuse.data_sources import FORMATS, HUGE, UNKNOWN, Refused, decode

if TYPE_CHECKING:
    from minimuse.muse import Muse
    from minimuse.sampler import Step

KEY = "minimuse"  # where the settings stand: a dict in a picture's `info`, JSON in a PNG's text chunk


def follow(draw: "Callable[..., list[Image.Image]]") -> "Iterator[Step | Image.Image]":
    """A method of Muse, called with `callback` -> each Step as soon as it is made, at last the picture.

    It runs in a thread of its own, and stops at its next step when nobody follows any longer. Its error is raised here.

    >>> for made in follow(partial(muse.generate, "a red cube", seed=0)): ...
    """
    steps, left = SimpleQueue(), Event()

    def callback(step: "Step") -> None:
        if left.is_set():
            raise CancelledError
        steps.put(step)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(draw, callback=callback)
        job.add_done_callback(steps.put)
        try:
            while (step := steps.get()) is not job:
                yield step
        finally:
            left.set()
    yield job.result()[0]


def save_png(image: Image.Image, path: str | Path) -> None:
    """A picture of Muse -> a PNG that holds its settings, which `image.save` would drop."""
    chunks = PngInfo()
    chunks.add_text(KEY, json.dumps(image.info.get(KEY, {})))
    image.save(path, format="PNG", pnginfo=chunks)


def with_settings(image: Image.Image, told: dict[str, Any]) -> Image.Image:
    """A copy with `settings_of` a picture as text, which other programs too keep in a PNG."""
    image = image.copy()
    image.info = {KEY: json.dumps(told)}
    return image


def open_picture(path: str | Path, side: int | None = None) -> Image.Image:
    """A picture file of any origin -> the picture; with `side`, upright, RGB, its centre as side x side pixels.

    ValueError says in a sentence what is wrong. What is too huge is refused by its header and never decoded.
    """
    try:
        if side is not None:
            return to_pil(decode(path, side, min_side=1)[None])[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
            image.load()
            return image
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning, Refused) as e:
        kind = str(e) if isinstance(e, Refused) else UNKNOWN if isinstance(e, UnidentifiedImageError) else HUGE
        raise ValueError(
            f"{Path(path).name} is no picture that can be read, it is {kind}; give a PNG, JPEG or WebP of at most "
            f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        ) from e


def settings_of(picture: str | Path | Image.Image) -> dict[str, Any]:
    """A PNG of `save_png`, or a picture of Muse -> what made it: model, fingerprint, prompt, seed, settings.

    ValueError where it holds none, as after another program has saved it.
    """
    image = picture if isinstance(picture, Image.Image) else open_picture(picture)
    try:
        told = image.info.get(KEY)
        told = json.loads(told) if isinstance(told, str) else told
        return {name: told[name] for name in ("model", "fingerprint", "prompt", "seed")} | told
    except (ValueError, TypeError, KeyError) as e:
        name = Path(getattr(image, "filename", "") or "the picture").name
        raise ValueError(
            f"{name} holds no settings of minimuse; `minimuse generate`, `minimuse app` and pictures.save_png write "
            "them, and many programs drop them when they save a picture anew"
        ) from e


def again(muse: "Muse", settings: dict[str, Any], *, callback: Callable[["Step"], None] | None = None) -> Image.Image:
    """`settings_of` a generated picture -> the same picture, drawn by the same checkpoint.

    ValueError where another checkpoint made it, or where more than a prompt and settings did. The pixels are the same
    on the same machine; another one may round differently, and so may a batch of several pictures.
    """
    settings = dict(settings)
    model, fingerprint = settings.pop("model"), settings.pop("fingerprint")
    if fingerprint != muse.fingerprint:
        raise ValueError(
            f"the picture was made by another checkpoint, {model} with the fingerprint {fingerprint}; this one is "
            f"{muse.config.name} with {muse.fingerprint}; name the right one"
        )
    if task := settings.pop("task", None):
        raise ValueError(f"it was made by {task} from another picture, which it does not hold; give a generated one")
    if functions := settings.pop("functions", None):
        raise ValueError(
            f"its {', '.join(functions)} came as a function, which no picture holds; pass it to `generate`"
        )
    return muse.generate(settings.pop("prompt"), n=1, callback=callback, **settings)[0]
