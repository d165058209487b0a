"""The reader: a small network that says what is in a picture of scenes, and so measures every generator here.

    image (B, 3, 64, 64) --convolutions--> a grid of 16 x 16 cells: heat, is the middle of a thing near?
                                           and there, its colour, shape, size, material, place and box

Peaks of the heat are the things (CenterNet, arXiv 1904.07850), so that they are counted however many there are.
It is for measuring alone, never part of a loss: it shares no weights, training run or data seed with the perceptual
network of `vqgan_loss.py`, and has seen no scene of split "train" and no generated picture.

`B` pictures, `K` things found in one, `G` = 16 cells a side.
Not here: how it was trained (`train_reader.py`), what a prompt asks for (`eval_prompts.py`).
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from minimuse import checkpoint
from minimuse.data_images import from_pil, to_float
from minimuse.data_scenes import COLORS, MATERIALS, SHAPES, SIZES, Scene

FORMAT = "minimuse-reader-1"
SIZE, GRID = 64, 16  # the side it reads at; its cells a side, of 4 pixels each
FIELDS = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES, "material": MATERIALS}
HEADS = [1, *map(len, FIELDS.values()), 6]  # channels: heat, the logits of each field, box and place
SPREAD = 0.8  # the heat of a thing is exp(-d^2 / (2 SPREAD^2)), d cells from its middle
_SURE = math.exp(-0.5 / (2 * SPREAD**2))  # the peak of a thing that is surely there is no colder: its middle a corner
_HOT, _MOST = _SURE / 2, 6  # the least heat of a peak; the most things found in a picture
Images = Sequence[Image.Image] | Tensor  # PIL images, or a tensor (B, 3, H, W), uint8 or in [-1, 1]


class Found(NamedTuple):
    """A thing that the reader sees."""

    color: str
    shape: str
    size: str
    material: str
    x: float  # as in scenes.Thing: left -> right
    depth: float  # towards -> away
    box: tuple[float, float, float, float]  # left, top, right, bottom in [0, 1]
    confidence: float  # in [0, 1]: how surely a thing is there, times the probabilities of its four attributes


class Reading(NamedTuple):
    things: tuple[Found, ...]  # left to right


# --- the network ------------------------------------------------------------------------------------------------------


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Residual(nn.Module):
    """x (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.layers = nn.Sequential(_conv(c_in, c_out, 3, stride), nn.ReLU(), _conv(c_out, c_out))
        self.skip = _conv(c_in, c_out, 1, stride) if (c_in, stride) != (c_out, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.layers(x))


class Network(nn.Module):
    """images (B, 3, 64, 64) in [-1, 1] -> maps (B, 22, 16, 16): HEADS, cell by cell."""

    def __init__(self, width: int = 32):
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.stem = nn.Sequential(_conv(5, a, 3, 2), nn.ReLU())
        self.fine = nn.Sequential(Residual(a, b, 2), Residual(b, b))
        self.coarse = nn.Sequential(Residual(b, c, 2), Residual(c, c))
        self.up = _conv(c, b, 1)
        self.join = nn.Sequential(_conv(b, 3 * width), nn.ReLU())
        self.head = nn.Conv2d(3 * width, sum(HEADS), 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # most cells are cold

    def trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """-> fine (B, b, 16, 16) and coarse (B, c, 8, 8) features. It is told where each pixel is: far is small."""
        at = torch.linspace(-1, 1, SIZE, device=images.device)
        places = torch.stack(torch.meshgrid(at, at, indexing="ij")).expand(len(images), -1, -1, -1)
        x = torch.cat([images, places], 1).contiguous(memory_format=torch.channels_last)
        fine = self.fine(self.stem(x))
        return fine, self.coarse(fine)

    def forward(self, images: Tensor) -> Tensor:
        fine, coarse = self.trunk(images)
        return self.head(self.join(F.relu(fine + F.interpolate(self.up(coarse), scale_factor=2.0))))


def cells(device: torch.device | None = None) -> Tensor:
    """-> the middles of the cells, (G, G, 2): left to right, top to bottom, in [0, 1]."""
    at = (torch.arange(GRID, device=device) + 0.5) / GRID
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)


def scaled(place: Tensor, cell: Tensor, back: bool = False) -> Tensor:
    """Box and place (M, 6) <-> what is asked of the network: edges from the cell's middle, in quarters of a picture."""
    from_cell = torch.cat([cell, cell, torch.zeros_like(cell)], 1)
    scale = place.new_tensor([4.0, 4.0, 4.0, 4.0, 1.0, 1.0])
    return place / scale + from_cell if back else (place - from_cell) * scale


# --- reading ----------------------------------------------------------------------------------------------------------


class Reader:
    """A trained network and what it makes of pictures.

    >>> Reader.from_pretrained().read(images)[0].things[0].color
    'red'
    """

    def __init__(self, net: Network):
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls) -> "Reader":
        """The reader in the package."""
        return cls.load(checkpoint.SHIPPED / "reader")

    @classmethod
    def load(cls, folder: str | Path) -> "Reader":
        """A folder that `train_reader.py` wrote."""
        path, net = Path(folder) / checkpoint.CONFIG, Network()
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {path.name}; python -m minimuse.train_reader trains a reader")
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT or {k: tuple(v) for k, v in values["fields"].items()} != FIELDS:
            raise ValueError(f"{path} is not of this reader: expected format {FORMAT!r}, and the fields {FIELDS}")
        weights = load_file(path.with_name(checkpoint.WEIGHTS))
        checkpoint.check_weights(net.state_dict(), weights, folder)
        net.load_state_dict(weights)
        return cls(net)

    def to(self, device: str | torch.device) -> "Reader":
        self.net.to(device)
        return self

    def _run(self, make: Callable[[Tensor], Tensor], images: Images) -> Tensor:
        """Pictures -> what `make` says of them, 64 at a time."""
        device, pixels = self.net.head.weight.device, _pixels(images)
        with torch.inference_mode():
            return torch.cat([make(part.to(device)) for part in pixels.split(64)]).float().cpu()

    def features(self, images: Images) -> Tensor:
        """Pictures -> (B, D), for a Frechet distance: the means over all places of the fine and coarse features."""
        return self._run(lambda x: torch.cat([level.mean((2, 3)) for level in self.net.trunk(x)], 1), images)

    def read(self, images: Images) -> list[Reading]:
        """PIL images, or (B, 3, H, W), uint8 or in [-1, 1] -> what is in each. Other sizes are resized to 64 x 64."""
        heat, *fields, numbers = self._run(self.net, images).split(HEADS, 1)
        heat = heat[:, 0].sigmoid()  # (B, G, G)
        peak = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > _HOT)  # (B, G, G) bool
        return [
            self._reading(heat[b], peak[b], [logits[b].softmax(0) for logits in fields], numbers[b])
            for b in range(len(heat))
        ]

    def _reading(self, heat: Tensor, peak: Tensor, fields: list[Tensor], numbers: Tensor) -> Reading:
        v, u = peak.nonzero(as_tuple=True)  # (K,)
        v, u = (at[heat[v, u].argsort(descending=True)[:_MOST]] for at in (v, u))
        place = scaled(numbers[:, v, u].T, cells()[v, u], back=True)
        best = [p[:, v, u].max(0) for p in fields]
        sure = (heat[v, u] / _SURE).clamp(max=1) * torch.stack([p.values for p in best]).prod(0)
        things = []
        for k, (*edges, x, depth) in enumerate(place.tolist()):
            looks = [kinds[p.indices[k]] for kinds, p in zip(FIELDS.values(), best, strict=True)]
            things.append(Found(*looks, x, depth, tuple(edges), sure[k].item()))
        return Reading(tuple(sorted(things, key=lambda thing: thing.x)))


def _pixels(images: Images) -> Tensor:
    """Square pictures of any size -> (B, 3, 64, 64) in [-1, 1]."""
    if isinstance(images, Image.Image) or len(images) == 0:
        raise ValueError(
            "expected at least one picture: PIL images or a tensor (B, 3, H, W); one alone needs [picture]"
        )
    if not isinstance(images, Tensor):
        return torch.cat([_pixels(from_pil(image, getattr(image, "width", 0))) for image in images])
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"expected square images (B, 3, H, W), {tuple(images.shape)} came; one image needs [None]")
    images = to_float(images) if images.dtype == torch.uint8 else images.float()
    if images.abs().max() > 2:
        raise ValueError(
            f"expected uint8 or [-1, 1], values up to {images.abs().max():.3g} came; x / 127.5 - 1 mends it"
        )
    if images.shape[-1] != SIZE:
        images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return images.clamp(-1, 1)


def compare(reading: Reading, scene: Scene) -> list[bool]:
    """Reading and truth -> for each true thing in turn, is each of the FIELDS right? What is not found is wrong.

    Things are paired by place, not by looks: the pairing knows nothing of what is asked.
    """
    found = [*reading.things, *[None] * len(scene.things)]

    def far(pairing: tuple) -> float:
        pairs = zip(pairing, scene.things, strict=True)
        return sum(9.0 if f is None else min(9.0, (f.x - t.x) ** 2 + (f.depth - t.depth) ** 2) for f, t in pairs)

    pairing = min(permutations(found, len(scene.things)), key=far)
    return [
        f is not None and getattr(f, name) == getattr(t, name)
        for f, t in zip(pairing, scene.things, strict=True)
        for name in FIELDS
    ]
