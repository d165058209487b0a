"""The networks that evaluate pictures: a detector of things, and CLIP scores (Muse 3.2).

    Detector     finds the things in a picture of a scene; all accuracies in minimuse come from it
        image (B, 3, 64, 64) --convolutions--> maps (B, 22, 16, 16): heat, logits of the attributes, box and place
    SceneClip    a small CLIP for scenes
        image (B, 3, 64, 64) --convolutions, attention--> 64 cells (B, 64, d) -----------------+--> score in [-1, 1]
        prompt --frozen language model, attention--> one vector per text token (B, L, d) ------+
    ClipScorer   any CLIP of `transformers`

Last come the features of the perceptual loss of tokenizers (A.2), trained anew in each run.

Each peak of the heat map is the center of a detected thing (CenterNet, arXiv 1904.07850). The score of SceneClip is the
largest cosine of each text token with a cell, averaged over tokens (FILIP, arXiv 2111.07783).
Both are shipped. They only measure and are never part of a loss. They share no weights and no data seed with each other
and with the perceptual network, and were trained without scenes of split "train" and without generated pictures.

Glossary: B pictures, T texts, L text tokens, K things found in a picture, G = 16 cells per side, d = 48.
Not here: training (benchmarks/train_detector.py, benchmarks/train_clip.py), what a prompt asks for (`eval_prompts.py`).
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from minimuse import checkpoint
from minimuse.data_captions import SceneDataset
from minimuse.data_scenes import COLORS, MATERIALS, SHAPES, SIZES
from minimuse.eval_metrics import Distance, check_images, feature_distance, lpips_distance
from minimuse.pictures import from_pil
from minimuse.text import Context, TextEncoder
from minimuse.utils import explain, require, to_float, to_pil
from minimuse.vqgan import Encoder, VQGANConfig
from minimuse.vqgan_loss import pyramid

SIZE, GRID = 64, 16  # pixels per side of the network's input; cells per side of its output
FIELDS = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES, "material": MATERIALS}
HEADS = [1, *map(len, FIELDS.values()), 6]  # output channels: heat, logits of each field, box and place
SPREAD = 0.8  # target heat at d cells from the center of a thing: exp(-d^2 / (2 SPREAD^2))
_FULL_HEAT = math.exp(-0.5 / (2 * SPREAD**2))  # smallest peak of a thing that is there: its center is a cell's corner
Images = Sequence[Image.Image] | Tensor  # square ones: PIL images, or a tensor (B, 3, H, H), uint8 or in [-1, 1]


class Pretrained(nn.Module):
    """A network whose weights are shipped; benchmarks/train_NAME.py trained it."""

    NAME = FORMAT = ""  # the name of its shipped folder; the format in its config.json

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> Self:
        """The shipped network, or the one in a folder that the benchmark wrote, frozen."""
        path = (checkpoint.SHIPPED / cls.NAME if folder is None else Path(folder)) / checkpoint.CONFIG
        script = f"benchmarks/train_{cls.NAME}.py"
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} has no {path.name}; train the network with `python {script}`")
        values = checkpoint.read_json(path)
        if not isinstance(values, dict) or values.get("format") != cls.FORMAT:
            raise ValueError(f"{path} has another format, expected {cls.FORMAT!r}; give a folder written by {script}")
        net, weights = cls(), load_file(path.with_name(checkpoint.WEIGHTS))
        checkpoint.check_weights(net.state_dict(), weights, path.parent)
        net.load_state_dict(weights)
        return net.eval().requires_grad_(False)

    def batches(self, images: Images) -> list[Tensor]:
        """Square pictures of any size -> batches (at most 64, 3, 64, 64) in [-1, 1], on the network's device."""
        return [part.to(next(self.parameters()).device) for part in network_input(images).split(64)]


def network_input(images: Images) -> Tensor:
    """Square pictures of any size -> (B, 3, 64, 64) in [-1, 1]."""
    if isinstance(images, Image.Image) or len(images) == 0:
        raise ValueError("expected PIL images or a tensor (B, 3, H, W), at least one; give one picture as [picture]")
    if not isinstance(images, Tensor):
        return torch.cat([network_input(from_pil(image, getattr(image, "width", 0))) for image in images])
    check_images(images)
    _, channels, height, width = images.shape
    require(channels == 3 and height == width, f"images are {tuple(images.shape)}, expected (B, 3, H, H); crop them")
    images = to_float(images) if images.dtype == torch.uint8 else images.float()
    if images.shape[-1] != SIZE:
        images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return images.clamp(-1, 1)


class Detection(NamedTuple):
    """One detected thing."""

    color: str
    shape: str
    size: str
    material: str
    x: float  # as in data_scenes.Thing: left -> right
    depth: float  # near -> far
    box: tuple[float, float, float, float]  # left, top, right, bottom in [0, 1]
    confidence: float  # in [0, 1]: heat relative to a certain thing, times the probabilities of the four attributes


class Detections(NamedTuple):
    things: tuple[Detection, ...]  # all of one picture, left to right


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class _Residual(nn.Module):
    """x (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.layers = nn.Sequential(_conv(c_in, c_out, 3, stride), nn.ReLU(), _conv(c_out, c_out))
        self.skip = _conv(c_in, c_out, 1, stride) if (c_in, stride) != (c_out, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.layers(x))


class Detector(Pretrained):
    """images (B, 3, 64, 64) in [-1, 1] -> maps (B, 22, 16, 16), with the channels of HEADS; and what they say."""

    NAME, FORMAT = "detector", "minimuse-reader-1"

    def __init__(self, width: int = 32):
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.stem = nn.Sequential(_conv(5, a, 3, 2), nn.ReLU())
        self.fine = nn.Sequential(_Residual(a, b, 2), _Residual(b, b))
        self.coarse = nn.Sequential(_Residual(b, c, 2), _Residual(c, c))
        self.up = _conv(c, b, 1)
        self.join = nn.Sequential(_conv(b, 3 * width), nn.ReLU())
        self.head = nn.Conv2d(3 * width, sum(HEADS), 1)
        nn.init.constant_(self.head.bias[:1], -3.0)  # most cells hold no center

    def trunk(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, H) -> fine (B, b, H/4, H/4), coarse (B, c, H/8, H/8). Choice: positions are an input too."""
        at = torch.linspace(-1, 1, images.shape[-1], device=images.device)
        places = torch.stack(torch.meshgrid(at, at, indexing="ij")).expand(len(images), -1, -1, -1)
        x = torch.cat([images, places], 1).contiguous(memory_format=torch.channels_last)
        fine = self.fine(self.stem(x))
        return fine, self.coarse(fine)

    def forward(self, images: Tensor) -> Tensor:
        fine, coarse = self.trunk(images)
        return self.head(self.join(F.relu(fine + F.interpolate(self.up(coarse), scale_factor=2.0))))

    @torch.inference_mode()
    def features(self, images: Images) -> Tensor:
        """Pictures -> (B, D) features for a Frechet distance: fine and coarse features, averaged over all cells."""
        levels = (self.trunk(part) for part in self.batches(images))
        return torch.cat([torch.cat([x.mean((2, 3)) for x in each], 1) for each in levels]).float().cpu()

    @torch.inference_mode()
    def detect(self, images: Images) -> list[Detections]:
        """Square pictures of any size -> the things in each."""
        return [_things(maps) for part in self.batches(images) for maps in self(part).float().cpu()]


def _things(maps: Tensor) -> Detections:
    """The maps (22, G, G) of one picture -> its things, at most 6."""
    heat, *fields, numbers = maps.split(HEADS)
    heat = heat.sigmoid()  # (1, G, G)
    peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > _FULL_HEAT / 2)
    _, row, column = peaks.nonzero(as_tuple=True)  # (K,)
    hottest = heat[0, row, column].argsort(descending=True)[:6]
    row, column = row[hottest], column[hottest]
    center = (torch.stack([column, row]) + 0.5) / GRID  # (2, K): x and y in [0, 1]
    numbers = numbers[:, row, column]  # (6, K): four edges from the center in quarter pictures, x, depth
    edges = numbers[:4] / 4 + center.repeat(2, 1)
    best = [logits.softmax(0)[:, row, column].max(0) for logits in fields]  # the most probable values, (K,)
    presence = (heat[0, row, column] / _FULL_HEAT).clamp(max=1)
    confidence = presence * torch.stack([p.values for p in best]).prod(0)
    things = []
    for k, place in enumerate(numbers[4:].T.tolist()):
        attributes = [values[p.indices[k]] for values, p in zip(FIELDS.values(), best, strict=True)]
        things.append(Detection(*attributes, *place, tuple(edges[:, k].tolist()), confidence[k].item()))
    return Detections(tuple(sorted(things, key=lambda thing: thing.x)))


WIDTH = 48  # d
_SIZES = {"code_dim": WIDTH, "width": 16, "multipliers": (1, 2, 3, 3), "blocks": (0, 0, 1, 1)}
_UNUSED = {"codebook_size": 1, "decoder_width": 16, "decoder_blocks": (0, 0, 0, 0)}
TOWER = VQGANConfig(image_size=SIZE, **_SIZES, **_UNUSED)


class SceneClip(Pretrained):
    """The image tower and the text tower, on top of a language model of width `text_width`."""

    NAME, FORMAT = "clip", "minimuse-scorer-1"

    def __init__(self, text_width: int = 384):
        super().__init__()
        mixer = partial(nn.TransformerEncoderLayer, WIDTH, 4, 2 * WIDTH, 0.0, F.gelu, norm_first=True)
        self.see = Encoder(TOWER)
        self.mix_cells = mixer(batch_first=True)
        self.mix_words = mixer(batch_first=True)
        self.place = nn.Parameter(torch.randn(TOWER.grid**2, WIDTH) * 0.1)
        self.hear = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, WIDTH))
        self.scale = nn.Parameter(torch.tensor(3.0))  # log of the softmax's scale in training
        self.encoder = TextEncoder()

    def scores(self, images: Tensor, text: Context) -> Tensor:
        """B images (B, 3, 64, 64), T texts -> (B, T): the score of every image with every text."""
        cells = self.see(images).flatten(2).transpose(1, 2) + self.place  # (B, 64, d)
        cells = F.normalize(self.mix_cells(cells).float(), dim=-1)
        words = self.mix_words(self.hear(text.embeds), src_key_padding_mask=~text.mask)  # (T, L, d)
        best = torch.einsum("bcd,tld->btlc", cells, F.normalize(words.float(), dim=-1)).amax(-1)
        return (best * text.mask).sum(-1) / text.mask.sum(-1)

    @torch.inference_mode()
    def forward(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """B square pictures of any size, with a prompt each -> B scores."""
        _check_pairs(images, prompts)
        scores = []
        for i, part in enumerate(self.batches(images)):
            text = self.encoder.encode(prompts[64 * i : 64 * (i + 1)]).to(part.device)
            scores.append(self.scores(part, text).diagonal().cpu())
        return torch.cat(scores)


def _check_pairs(images: Images, prompts: Sequence[str]) -> None:
    paired = not isinstance(prompts, str) and len(images) == len(prompts)
    require(paired, f"{len(images)} pictures and {len(prompts)} prompts; give a list with the prompt of each")


class ClipScorer:
    """Cosines of the image and text embeddings of a CLIP, a folder or hub id. Each CLIP has its own scale of scores."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoProcessor, CLIPModel

        self.processor = AutoProcessor.from_pretrained(name)
        convert = "CLIPModel.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(FOLDER)"
        no_clip = f"{name!r} has no CLIP in safetensors; if you trust it, convert it: {convert}"
        with explain(no_clip, OSError, kind=OSError):  # never a pickle, which may run code
            model, info = CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{name!r} is not a complete CLIP: it lacks {missing[0]!r} and others")
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        _check_pairs(images, prompts)
        both = {"text": list(prompts), "images": to_pil(images)}
        inputs = self.processor(**both, return_tensors="pt", padding=True, truncation=True)
        out = self.model(**inputs.to(self.model.device))
        return F.cosine_similarity(out.image_embeds, out.text_embeds)


class SceneFeatures(nn.Module):
    """images (B, 3, H, W) -> features at 1/2, 1/4 and 1/8 of the size; `train_features` trains it."""

    def __init__(self, classes: int, width: int = 32):
        super().__init__()
        self.stages = nn.ModuleList(pyramid(width))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = [images]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[1:]

    def classify(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> logits (B, classes): does the image show an object of this class?"""
        return self.head(self(images)[-1].amax((2, 3)))


def train_features(images: Tensor, labels: Tensor, *, steps: int = 200, seed: int = 0) -> SceneFeatures:
    """images (n, 3, H, W) uint8, labels (n, K), 1 for the classes that it shows -> a classifier, for its features."""
    torch.manual_seed(seed)
    net = SceneFeatures(labels.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(len(images), (64,), generator=generator)
        F.binary_cross_entropy_with_logits(net.classify(to_float(images[at])), labels[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def perceptual_distance(
    kind: str, image_size: int, device: torch.device | str = "cpu", seed: int = 0, n: int = 2000
) -> Distance:
    """LPIPS for "lpips". Choice: for "scenes", features trained on n scenes, which need no download."""
    if kind == "lpips":
        return lpips_distance()
    scenes = SceneDataset(n, image_size, seed=seed)
    return feature_distance(train_features(scenes.images(), scenes.labels(), seed=seed).to(device))
