"""Pixels <-> tensors: PIL images, uint8, and [-1, 1].

`B` images in a batch, `H W` pixels. Images are stored as uint8. Models see them in [-1, 1].

Not here: a user's pictures and masks (pictures.py), captioned images (data_sources.py), the tokenizer (vqgan.py).
"""

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
