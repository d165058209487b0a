"""Captioned images: what a source of them is, the embedded scenes as one, and the ways between PIL, uint8 and [-1, 1].

`B` images a batch, `H W` pixels. uint8 is how images are kept, [-1, 1] how models see them. Training reads a source
once, part by part, into a cache, so that a source need not be shuffled, indexed or fast.

Not here: how scenes look (data_scenes.py), sources out of files (data_sources.py), tokens (vqgan.py).
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from minimuse import data_captions as captions_module
from minimuse import data_scenes as scenes_module
from minimuse.data_captions import caption
from minimuse.data_scenes import SHARES, SPLITS, Scene, render, sample_scene

PART = 500  # images that one process reads in one go, where the source itself has no parts

# ---------------------------------------------------------------- pixels


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 of the same shape; what lies outside is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> float32 of the same shape in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float: expected uint8 images, {images.dtype} came; floats in [-1, 1] need no change")
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W), uint8 or in [-1, 1] -> PIL images."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"to_pil: expected images (B, 3, H, W), {tuple(images.shape)} came; one image needs [None]")
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> RGB; what is transparent becomes white."""
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def from_pil(image: Image.Image, size: int) -> Tensor:
    """A PIL image of size x size -> (1, 3, size, size) in [-1, 1]; what is transparent becomes white."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, {type(image).__name__} came; files open with PIL.Image.open(path)")
    if image.size != (size, size):
        raise ValueError(
            f"expected an image of {size} x {size} pixels, {image.width} x {image.height} came; "
            f"mend it with image.resize(({size}, {size})), after cropping it to a square"
        )
    if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
        raise ValueError(f"expected an image of mode RGB, RGBA, L or P, {image.mode} came; try image.convert('RGB')")
    pixels = torch.frombuffer(bytearray(to_rgb(image).tobytes()), dtype=torch.uint8)
    return to_float(pixels.view(1, size, size, 3).permute(0, 3, 1, 2))


def mask_from(mask: Any, size: tuple[int, int]) -> Tensor:
    """A PIL image or an array (H, W), white or True = repaint -> bool tensor (H, W); `size` is the picture's (W, H)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"))
    mask = np.asarray(mask)
    if mask.shape != size[::-1]:
        came = " x ".join(str(n) for n in mask.shape[::-1])
        raise ValueError(
            f"expected a mask of the picture's {size[0]} x {size[1]} pixels, {came or 'a single value'} came"
        )
    return torch.from_numpy(mask > 127 if mask.dtype == np.uint8 else mask > 0.5)


def area_downsample(images: Tensor, factor: int = 2) -> Tensor:
    """Images (B, 3, H, W) -> (B, 3, H / factor, W / factor): Muse 3.3.1's decimated low-res image."""
    if factor < 1 or images.shape[-1] % factor or images.shape[-2] % factor:
        height, width = images.shape[-2:]
        raise ValueError(f"factor={factor} must divide the image's {height} x {width} pixels")
    small = F.avg_pool2d(images.float(), factor)  # the same as interpolate(mode="area"), which takes no uint8 either
    return small.round().to(torch.uint8) if images.dtype == torch.uint8 else small


# ---------------------------------------------------------------- sources


class Example(NamedTuple):
    image: Tensor  # (3, size, size) uint8
    captions: tuple[str, ...]  # at least one


@dataclass
class Problems:
    """What reading passed over, by kind, with the first few names of each. Plain values: `Problems(**asdict(p))` is p.

    >>> problems = Problems(seen=9)
    >>> problems.add("corrupt", "a.png")
    >>> problems.summary()
    'passed over 1 of 9 images: 1 corrupt (a.png)'
    """

    seen: int = 0  # images met, good ones included
    counts: dict[str, int] = field(default_factory=dict)  # kind -> how many were passed over
    names: dict[str, list[str]] = field(default_factory=dict)  # kind -> the first of them

    NAMED = 3  # no annotation, so no field

    def add(self, kind: str, name: str) -> None:
        """One of the images seen is passed over."""
        name = name.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that no text can
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.names[kind] = [*self.names.get(kind, []), name][: self.NAMED]

    def __add__(self, other: "Problems") -> "Problems":
        kinds = list(dict.fromkeys((*self.counts, *other.counts)))
        counts = {kind: self.counts.get(kind, 0) + other.counts.get(kind, 0) for kind in kinds}
        names = {kind: (self.names.get(kind, []) + other.names.get(kind, []))[: self.NAMED] for kind in kinds}
        return Problems(self.seen + other.seen, counts, names)

    @property
    def usable(self) -> int:
        """How many of the images seen were read."""
        return self.seen - sum(self.counts.values())

    def summary(self) -> str:
        """-> one sentence, or "" where nothing was passed over."""
        if not self.counts:
            return ""
        told = []
        for kind, n in self.counts.items():
            more = ", ..." if n > len(self.names[kind]) else ""
            told.append(f"{n} {kind} ({', '.join(self.names[kind])}{more})")
        return f"passed over {sum(self.counts.values())} of {self.seen} images: {', '.join(told)}"

    def check(self, where: str) -> None:
        """After reading all of `where`: ValueError if none of it was usable."""
        if not self.usable:
            raise ValueError(f"{where}: no usable captioned image; {self.summary() or 'nothing was found'}")


class Source(Protocol):
    """Captioned images from anywhere, read from front to back. To read two parts at once, use two processes."""

    fingerprint: str  # hex; another one wherever an image, a caption or a rule of reading could have changed
    parts: int  # units of work: a part is read by one process, in order

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part 0 to parts - 1 -> its examples at size x size pixels; what is passed over is added to `problems`."""
        ...


def check_part(part: int, parts: int) -> None:
    if not 0 <= part < parts:
        raise IndexError(f"part {part} of {parts}: expected 0 to {parts - 1}")


def digest(*things: Any) -> str:
    """JSON values -> hex SHA-256, the same on every machine."""
    text = json.dumps(things, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class SceneDataset:
    """n captioned scenes of one split: a `Source`. All follows from (split, seed, i), so there is nothing to store."""

    n: int
    size: int
    split: str = "train"
    seed: int = 0
    shares: tuple[float, ...] = SHARES  # how often there are 1, 2 and 3 things
    k: int = 2  # captions a scene
    synonyms: float = 0.0  # share of the captions that are told in captions.SYNONYMS too

    def __post_init__(self):
        if self.n < 1 or self.size < 8 or self.k < 1 or self.split not in SPLITS:
            raise ValueError(f"{self}: expected n >= 1, size >= 8, k >= 1 and a split of {', '.join(SPLITS)}")

    @cached_property
    def fingerprint(self) -> str:
        """Of all fields but `size`, which `read` is told, and of the code that draws and describes."""
        code = [inspect.getsource(part) for part in (scenes_module, captions_module, SceneDataset)]
        return digest("scenes", asdict(replace(self, size=8)), code)

    @property
    def parts(self) -> int:
        return -(-self.n // PART)

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part -> its examples: scenes 500 part to 500 part + 499, the same as `images` and `captions` give."""
        check_part(part, self.parts)
        indices, sized = range(part * PART, min((part + 1) * PART, self.n)), replace(self, size=size)
        for few in (indices[start : start + 50] for start in range(0, len(indices), 50)):
            for i, image in zip(few, sized.images(few), strict=True):
                problems.seen += 1
                yield Example(image, tuple(self.captions(i)))

    def __len__(self) -> int:
        return self.n

    def scene(self, i: int) -> Scene:
        if not 0 <= i < self.n:
            raise IndexError(f"scene {i} of a data set of {self.n}: expected 0 to {self.n - 1}")
        return sample_scene(self.seed * 1_000_003 + i, split=self.split, shares=self.shares)

    def captions(self, i: int, k: int | None = None, *, paraphrase: bool = False) -> list[str]:
        """-> k different captions of scene i; None: as many as the data set has a scene."""
        scene, found, k = self.scene(i), {}, self.k if k is None else k
        for attempt in range(50 * k):
            found[caption(scene, 10_007 * i + attempt, paraphrase=paraphrase, synonyms=self.synonyms)] = None
            if len(found) == k:
                return list(found)
        raise ValueError(f"scene {i} has no {k} different captions: ask for at most {len(found)}")

    def images(self, indices: Sequence[int] | None = None, *, progress: bool = False) -> Tensor:
        """Indices (None: all) -> uint8 images (B, 3, H, W), rendered 256 scenes at a time."""
        indices = range(self.n) if indices is None else [int(i) for i in indices]
        starts = range(0, len(indices), 256)
        if progress:
            from tqdm import tqdm

            starts = tqdm(
                starts, desc=f"rendering {len(indices)} scenes at {self.size} px", unit_scale=256, leave=False
            )
        parts = [to_uint8(render([self.scene(i) for i in indices[s : s + 256]], self.size)) for s in starts]
        return torch.cat(parts) if parts else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
