"""Pixels <-> tensors: PIL images, uint8, and [-1, 1].

`B` images in a batch, `H W` pixels. Images are stored as uint8. Models see them in [-1, 1].

Not here: image files (pictures.py), captioned images (data_sources.py), the tokenizer itself (vqgan.py).
"""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from minimuse.utils import PositiveInt, check, require


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 of the same shape. Values outside are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> float32 of the same shape in [-1, 1]."""
    is_uint8 = images.dtype == torch.uint8
    require(is_uint8, f"to_float expected uint8 images and got {images.dtype}; floats in [-1, 1] need no change")
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W), uint8 or in [-1, 1] -> PIL images."""
    fits = images.ndim == 4 and images.shape[1] == 3
    require(fits, f"to_pil expected images (B, 3, H, W) and got {tuple(images.shape)}; one image needs [None]")
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


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
    if isinstance(mask, Image.Image) and mask.mode[:1] not in ("1", "I", "F"):
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


def area_downsample(images: Tensor, factor: int = 2) -> Tensor:
    """Images (B, 3, H, W) -> (B, 3, H / factor, W / factor): Muse 3.3.1's decimated low-res image.

    Floats in [-1, 1] become what the same uint8 images become: training and editing see the same low-res image.
    """
    factor = check("factor", factor, PositiveInt)
    fits = images.ndim in (3, 4) and images.shape[-2] % factor == images.shape[-1] % factor == 0
    require(fits, f"factor is {factor}, images have the shape {tuple(images.shape)}; give a divisor of H and W")
    is_float = images.dtype != torch.uint8
    images = to_uint8(images) if is_float else images
    small = F.avg_pool2d(images.float(), factor).round().to(torch.uint8)  # equals interpolate(mode="area")
    return to_float(small) if is_float else small
