"""Train the detector (`eval_networks.py`) from scratch. This made the shipped weights, minimuse/checkpoints/detector.

    python benchmarks/train_detector.py FOLDER

    scenes --render--> images --degrade, as decoders do--> Detector --> heat, attributes, box and place

The training data is kept away from everything that the detector measures: seeds from 7 billion, splits "test" and
"novel", no generated pictures. The defaults are those of the shipped weights: 8,000 scenes, 1,200 steps, 8 minutes on
one CPU thread. B pictures, K things per scene at most, G cells per side, M cells near a thing.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from minimuse import checkpoint
from minimuse.config import StageConfig
from minimuse.data_scenes import MAX_THINGS, SPLITS, Scene, box, render, sample_scene
from minimuse.eval_networks import (
    FIELDS,
    GRID,
    HEADS,
    SIZE,
    SPREAD,
    Detections,
    Detector,
)
from minimuse.train_engine import Engine, Stage
from minimuse.utils import to_float, to_uint8

TRAINING = StageConfig(steps=1200, batch=64, learning_rate=4e-3, warmup=100, weight_decay=0.01, betas=(0.9, 0.98))
SCENES, SEED = 8_000, 7_000_000_000  # far from the seeds of data sets, which begin at 0
FRESH = 8_000_000_000  # seeds of the scenes that it is measured on


def scenes(n: int, seed: int, splits: Sequence[str] = ("novel", "test", "test")) -> list[Scene]:
    """n scenes of 1 to 3 things, with held-out combinations, which must be detected too."""
    return [sample_scene(seed + i, split=splits[i % len(splits)], fractions=(25, 35, 40)) for i in range(n)]


def targets(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Scenes -> indices of FIELDS (B, K, 4), -1 where there is no thing; box and place (B, K, 6)."""
    index = torch.full((len(scenes), MAX_THINGS, len(FIELDS)), -1)
    place = torch.zeros(len(scenes), MAX_THINGS, 6)
    for b, scene in enumerate(scenes):
        for k, thing in enumerate(scene.things):
            index[b, k] = torch.tensor([kinds.index(getattr(thing, name)) for name, kinds in FIELDS.items()])
            place[b, k] = torch.tensor([*box(thing), thing.x, thing.depth])
    return index, place


def cell_centers(device: torch.device | None = None) -> Tensor:
    """(G, G, 2): x and y of each cell's center in [0, 1]."""
    at = (torch.arange(GRID, device=device) + 0.5) / GRID
    return torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)


def encode_numbers(numbers: Tensor, centers: Tensor) -> Tensor:
    """Box and place (M, 6) -> what the network predicts: edges from the cell centers (M, 2), in quarter pictures."""
    from_cell = torch.cat([centers, centers, torch.zeros_like(centers)], 1)
    return (numbers - from_cell) * numbers.new_tensor([4.0, 4.0, 4.0, 4.0, 1.0, 1.0])


def loss(maps: Tensor, index: Tensor, place: Tensor, doubt: Tensor | None = None) -> Tensor:
    """maps (B, 22, G, G), targets -> (): heat in all cells, everything else where the target heat is above a half.

    doubt (B,) in [0, 1] says how uncertain the shape is; the target of the shape is smoothed by it.
    """
    heat, *fields, numbers = maps.float().split(HEADS, 1)
    middle = (place[..., :2] + place[..., 2:4]) / 2  # (B, K, 2)
    at = cell_centers(maps.device)
    apart = (at - middle[:, :, None, None]).mul(GRID).square().sum(-1)  # (B, K, G, G), in cells
    target = (-apart / (2 * SPREAD**2)).exp() * (index[:, :, :1, None] >= 0)
    target, owner = target.max(1)  # (B, G, G)
    total = 2 * F.binary_cross_entropy_with_logits(heat[:, 0], target, reduction="sum")
    b, v, u = (target > 0.5).nonzero(as_tuple=True)  # (M,)
    k, weight = owner[b, v, u], target[b, v, u]
    for i, (name, logits) in enumerate(zip(FIELDS, fields, strict=True)):
        log_p = logits[b, :, v, u].log_softmax(1)  # (M, C)
        nll = -log_p.gather(1, index[b, k, i, None])[:, 0]
        if name == "shape" and doubt is not None:
            nll = nll.lerp(-log_p.mean(1), doubt[b])
        total = total + (weight * nll).sum()
    wrong = F.smooth_l1_loss(numbers[b, :, v, u], encode_numbers(place[b, k], at[v, u]), reduction="none", beta=0.1)
    return (total + (weight * wrong.sum(1)).sum()) / weight.sum()


def warp(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) -> a third of them with wavy outlines, as bad generators draw; doubt (B,) of the shapes.

    Choice: below half a pixel of distortion a shape is certain; at 3 pixels of 64 it could be any.
    """
    far = (torch.rand(len(images), generator=generator) * 9 - 6).clamp(min=0)  # pixels
    field = torch.randn(len(images), 2, 14, 14, generator=generator) * far[:, None, None, None] * 2 / SIZE
    flow = F.interpolate(field, size=images.shape[-2:], mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid + flow, padding_mode="reflection", align_corners=False)
    return torch.where(far[:, None, None, None] > 0, moved, images), ((far - 0.5) / 2.5).clamp(0, 1)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> degraded as by decoders: resampled, blurred, in blocks, tinted, noisy."""

    def u(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *(shape or (1, 1, 1)), generator=generator)

    side = int(torch.randint(SIZE * 3 // 8, SIZE, (), generator=generator))
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    coarse = F.interpolate(small, size=images.shape[-2:], mode="bicubic")
    x = torch.where(u(0, 1) < 0.3, coarse, images)
    blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x.lerp(blur, u(-0.3, 1))  # sharpens if negative
    x = torch.where(u(0, 1) < 0.3, quantize(x, u(0.02, 0.4)), x)
    x = x * u(0.9, 1.1, 3, 1, 1) + u(-0.06, 0.06, 3, 1, 1) + u(-0.06, 0.06)
    return (x + u(0, 0.15) * torch.randn(x.shape, generator=generator)).clamp(-1, 1)


def quantize(images: Tensor, step: Tensor) -> Tensor:
    """As JPEG: in blocks of 8 x 8, each frequency is rounded, the high ones more coarsely."""
    at = torch.arange(8.0)
    basis = torch.cos(torch.pi / 8 * (at + 0.5) * at[:, None]) / 2  # (8, 8): frequency, place
    basis[0] /= 2**0.5
    b, c, h, w = images.shape
    blocks = images.view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    rough = (step * (1 + at[:, None] + at))[:, :, None, None]
    rounded = ((basis @ blocks @ basis.T) / rough).round() * rough
    return (basis.T @ rounded @ basis).transpose(3, 4).reshape(b, c, h, w)


def train(engine: Engine, config: StageConfig, images: Tensor, scenes: list[Scene]) -> Iterator[tuple[float, Detector]]:
    """images (n, 3, 64, 64) uint8 and their scenes -> (loss, network) after each step."""
    torch.manual_seed(engine.seed)
    stage = Stage(engine, "detector", config, {"model": Detector().to(memory_format=torch.channels_last)})
    net, (index, place) = stage.modules["model"], targets(scenes)
    for step in stage.steps():
        for at, generators in stage.micro_batches(len(images), step):
            pictures, doubt = warp(to_float(images[at]), generators[0])
            with engine.precision():
                maps = net(degrade(pictures, generators[0]).to(engine.device))
            value = loss(maps, *(part.to(maps.device) for part in (index[at], place[at], doubt))) / engine.parts
            stage.backward(value, loss=value)
        yield stage.finish(step)["loss"], net


def attributes_right(found: Detections, scene: Scene) -> list[bool]:
    """Detections and the true scene -> for each true thing in turn, is each of FIELDS right? A missing thing is wrong.

    Things are paired by place only, so the pairing cannot favor the attributes that are compared.
    """
    candidates = [*found.things, *[None] * len(scene.things)]

    def distance(pairing: tuple) -> float:
        pairs = zip(pairing, scene.things, strict=True)
        return sum(9.0 if f is None else min(9.0, (f.x - t.x) ** 2 + (f.depth - t.depth) ** 2) for f, t in pairs)

    pairing = min(permutations(candidates, len(scene.things)), key=distance)
    return [
        f is not None and getattr(f, name) == getattr(t, name)
        for f, t in zip(pairing, scene.things, strict=True)
        for name in FIELDS
    ]


def measure(detector: Detector, n: int, size: int, seed: int = FRESH) -> dict[int, list[int]]:
    """n fresh scenes per number of things -> {number: [attributes right, of all, scenes completely right, of all]}.

    A scene is completely right if the number of things and every attribute are right.
    """
    table = {}
    for k in range(1, MAX_THINGS + 1):
        made = [sample_scene(seed + i, split=SPLITS[i % len(SPLITS)], n_things=k) for i in range(n)]
        readings = [r for i in range(0, n, 100) for r in detector.detect(render(made[i : i + 100], size))]
        right = [attributes_right(*pair) for pair in zip(readings, made, strict=True)]
        whole = [all(each) and len(reading.things) == k for each, reading in zip(right, readings, strict=True)]
        table[k] = [sum(map(sum, right)), sum(map(len, right)), sum(whole), n]
    return table


CARD = """---
library_name: minimuse
license: apache-2.0
---
# detector

Finds the things in a picture of minimuse's scenes: color, shape, size, material, place and box of each.
{parameters:,} parameters, input of 64 px. It only measures generators and is never part of a loss.

Made by `python benchmarks/train_detector.py`, in {minutes:.0f} minutes (CPU threads: {threads}), rendering included:
{scenes:,} scenes of splits "novel" (a third) and "test", seeds from {seed:,}; {steps:,} steps of {batch} pictures,
degraded as by decoders. It was trained without scenes of split "train" and without generated pictures, and shares no
weights, training run or data seed with the perceptual network of `vqgan_loss.py`.

On fresh renders of splits "train", "test" and "novel" in equal parts, seeds from {fresh:,}:

| Pictures | Things | Attributes right | Scenes completely right |
|---|---|---|---|
{rows}

It must name one of three shapes, so a lump becomes the nearest one; `confidence` says how sure it is. It learned
doubt about shapes from renders with wavy outlines.
"""


def save(detector: Detector, folder: Path, training: dict[str, float], n: int = 700) -> None:
    """Write weights in half precision, config.json, and a model card with the accuracy of the written weights."""
    weights = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in detector.state_dict().items()}
    detector.load_state_dict(weights)  # measure what is saved
    detector.eval().requires_grad_(False)
    sizes = {size: measure(detector, n, size) for size in (64, 128)}
    rows = [
        f"| {size} px | {k} | {right:,} of {asked:,} | {whole:,} of {all_:,} |"
        for size, table in sizes.items()
        for k, (right, asked, whole, all_) in table.items()
    ]
    values = {"format": Detector.FORMAT, "fields": FIELDS, "training": training}
    parameters = sum(p.numel() for p in detector.parameters())
    card = CARD.format(parameters=parameters, rows="\n".join(rows), fresh=FRESH, **training)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / checkpoint.WEIGHTS)
    (folder / checkpoint.CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / checkpoint.CARD).write_text(card, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Render, train, measure, save."""
    parser = argparse.ArgumentParser(prog="python benchmarks/train_detector.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--fresh", type=int, default=700, help="scenes with each number of things, for the model card")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    checkpoint.refuse_existing(args.folder)
    begun, config, made = time.time(), replace(TRAINING, steps=args.steps), scenes(args.scenes, args.seed)
    from tqdm import tqdm

    chunks = tqdm(range(0, len(made), 100), desc="rendering", unit_scale=100)
    images = torch.cat([to_uint8(render(made[i : i + 100], SIZE)) for i in chunks])
    progress = train(Engine(seed=args.seed % 2**32, device=args.device), config, images, made)
    _, net = deque(tqdm(progress, desc="training", total=config.steps), maxlen=1).pop()
    training = {"scenes": args.scenes, "seed": args.seed, "steps": config.steps, "batch": config.batch}
    spent = {"minutes": round((time.time() - begun) / 60, 1), "threads": torch.get_num_threads()}
    save(net, args.folder, training | spent, args.fresh)
    print(args.folder)


if __name__ == "__main__":
    main()
