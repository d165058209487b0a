"""Pixels <-> tensors: PIL images, image files, uint8 and [-1, 1]; what readers of images yield and leave out.

`B` images in a batch, `H W` pixels. Images are stored as uint8. Models see them in [-1, 1].

Not here: where images come from (data_sources.py), the tokenizer itself (vqgan.py).
"""

import os
import warnings
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from minimuse.utils import precision

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS: Pillow would run Ghostscript
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # and 16-bit gray
HUGE, UNKNOWN, CORRUPT, TINY, UNREADABLE = "too huge", "of an unknown format", "corrupt", "too small", "unreadable"


class Example(NamedTuple):
    """What a source of captioned images yields."""

    image: Tensor  # (3, size, size) uint8
    captions: tuple[str, ...]  # at least one


@dataclass
class Problems:
    """What a reader left out, by kind, with the first three names of each kind.

    >>> problems = Problems(seen=9)
    >>> problems.add("corrupt", "a.png")
    >>> problems.summary()
    'left out 1 of 9 images: 1 corrupt (a.png)'
    """

    seen: int = 0  # all images, good ones included
    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one of the images seen as left out."""
        self.merge(Problems(0, {kind: 1}, {kind: [name.encode("utf-8", "backslashreplace").decode()]}))

    def merge(self, other: "Problems") -> None:
        """Add what another reading left out."""
        self.seen += other.seen
        for kind, n in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + n
            self.names[kind] = (self.names.get(kind, []) + other.names[kind])[:3]

    def summary(self) -> str:
        """One sentence, or "" if nothing was left out."""
        kinds = [f"{n} {kind} ({', '.join(self.names[kind])}{', ...' * (n > 3)})" for kind, n in self.counts.items()]
        return f"left out {sum(self.counts.values())} of {self.seen} images: {', '.join(kinds)}" if kinds else ""

    def check(self, where: str) -> None:
        """After all of `where` was read: ValueError if none of it was usable."""
        if self.seen == sum(self.counts.values()):
            raise ValueError(f"{where}: no usable captioned image; {self.summary() or 'nothing was found'}")


class Refused(Exception):
    """An image that cannot be used. The text is the kind of problem, such as `CORRUPT`."""


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 of the same shape. Values outside are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> float32 of the same shape in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float expected uint8 images and got {images.dtype}; floats in [-1, 1] need no change")
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W), uint8 or in [-1, 1] -> PIL images."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"to_pil expected images (B, 3, H, W) and got {tuple(images.shape)}; one image needs [None]")
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> RGB. Transparent pixels become white."""
    if image.mode[:1] == "I":  # 16-bit gray, which Pillow's own conversion clips
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Refused(f"of mode {image.mode}")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def from_pil(image: Image.Image, size: int) -> Tensor:
    """A PIL image of size x size pixels -> (1, 3, size, size) in [-1, 1]. Transparent pixels become white."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, {type(image).__name__} came; open a file with PIL.Image.open(path)")
    if image.size != (size, size):
        raise ValueError(
            f"expected an image of {size} x {size} pixels, {image.width} x {image.height} came; "
            f"crop it to a square, then use image.resize(({size}, {size}))"
        )
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
        raise ValueError(f"expected an image of mode RGB, RGBA, L or P, {image.mode} came; try image.convert('RGB')")
    pixels = torch.frombuffer(bytearray(to_rgb(image).tobytes()), dtype=torch.uint8)
    return to_float(pixels.view(1, size, size, 3).permute(0, 3, 1, 2))


def decode_image(file: str | os.PathLike | IO[bytes], size: int, min_side: int | None = None) -> Tensor:
    """An image file -> (3, size, size) uint8: upright, RGB, shorter side scaled to `size`, cropped at the centre.

    Raises `Refused` for a file that cannot be used, and where the shorter side has fewer than `min_side` pixels.
    Choice: the default is size // 2, because images enlarged more than twofold teach blur. Colour profiles are not
    applied. An animation gives its first frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:  # reads only the header
                if min(image.size) < (size // 2 if min_side is None else min_side):
                    raise Refused(TINY)
                if image.mode not in MODES and image.mode[:1] != "I":
                    raise Refused(f"of mode {image.mode}")
                image.draft(None, (2 * size, 2 * size))  # JPEGs decode faster at a half, a quarter or an eighth
                square = ImageOps.fit(to_rgb(ImageOps.exif_transpose(image)), (size, size), Image.Resampling.LANCZOS)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(HUGE) from error
    except UnidentifiedImageError as error:
        raise Refused(UNKNOWN) from error
    except Exception as error:  # damaged files raise almost every kind of exception
        raise Refused(UNREADABLE if getattr(error, "errno", None) else CORRUPT) from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def mask_from(mask: Any, size: tuple[int, int]) -> Tensor:
    """A PIL image or an array (H, W), white or True = repaint -> bool (H, W). `size` is the picture's (W, H)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    mask = np.asarray(mask)
    if mask.shape != size[::-1]:
        came = " x ".join(str(n) for n in mask.shape[::-1]) or "a single value"
        raise ValueError(f"expected a mask of the picture's {size[0]} x {size[1]} pixels, {came} came")
    return torch.from_numpy(mask > 127 if mask.dtype == np.uint8 else mask > 0.5)


def area_downsample(images: Tensor, factor: int = 2) -> Tensor:
    """Images (B, 3, H, W) -> (B, 3, H / factor, W / factor): Muse 3.3.1's decimated low-res image."""
    if factor < 1 or images.shape[-1] % factor or images.shape[-2] % factor:
        height, width = images.shape[-2:]
        raise ValueError(f"factor={factor} must divide the image's {height} x {width} pixels")
    small = F.avg_pool2d(images.float(), factor)  # equals interpolate(mode="area")
    return small.round().to(torch.uint8) if images.dtype == torch.uint8 else small


@torch.inference_mode()
def tokenize_images(tokenizer: Any, images: Tensor, batch: int = 256, bf16: bool | None = None) -> Tensor:
    """A frozen tokenizer and images (n, 3, H, W) uint8 -> tokens (n, N) on the CPU."""
    device = next(tokenizer.parameters()).device
    tokenizer.eval()
    with precision(device, bf16):
        return torch.cat([tokenizer.encode(to_float(x).to(device)).cpu() for x in images.split(batch)])
