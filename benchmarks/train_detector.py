"""Train the detector (`eval_detector.py`) from nothing: `python benchmarks/train_detector.py FOLDER` made the shipped one.

    scenes --render--> images --spoiled, as decoders spoil pictures--> DetectorNetwork --> heat, attributes, box and place

What it learns from is kept away from all that it measures: seeds from 7 billion, splits "test" and "novel", no
generated picture. `K` things a scene at most, `G` cells a side, `M` cells in which there is a thing.
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from minimuse import checkpoint
from minimuse.config import StageConfig
from minimuse.data_images import to_float, to_uint8
from minimuse.data_scenes import MAX_THINGS, SPLITS, Scene, box, render, sample_scene
from minimuse.eval_detector import (
    DETECTOR_FORMAT,
    FIELDS,
    GRID,
    HEADS,
    SIZE,
    SPREAD,
    Detector,
    DetectorNetwork,
    attributes_right,
    cell_centers,
    encode_numbers,
)
from minimuse.train_engine import Engine, Stage

TRAINING = StageConfig(steps=1200, batch=64, learning_rate=4e-3, warmup=100, weight_decay=0.01, betas=(0.9, 0.98))
SCENES, SEED = 8_000, 7_000_000_000  # far from the seeds of data sets, which begin at 0
FRESH = 8_000_000_000  # seeds of the scenes that it is measured on


def scenes(n: int, seed: int, splits: Sequence[str] = ("novel", "test", "test")) -> list[Scene]:
    """n scenes of 1 to 3 things; the held-out combinations among them, since those too must be read."""
    return [sample_scene(seed + i, split=splits[i % len(splits)], fractions=(25, 35, 40)) for i in range(n)]


def targets(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Scenes -> indices of the FIELDS (B, K, 4), -1 where there is no thing; box and place (B, K, 6)."""
    index = torch.full((len(scenes), MAX_THINGS, len(FIELDS)), -1)
    place = torch.zeros(len(scenes), MAX_THINGS, 6)
    for b, scene in enumerate(scenes):
        for k, thing in enumerate(scene.things):
            index[b, k] = torch.tensor([kinds.index(getattr(thing, name)) for name, kinds in FIELDS.items()])
            place[b, k] = torch.tensor([*box(thing), thing.x, thing.depth])
    return index, place


def loss(maps: Tensor, index: Tensor, place: Tensor, doubt: Tensor | None = None) -> Tensor:
    """maps (B, 22, G, G), targets -> (): heat everywhere; the rest where the heat of a thing is above a half.

    Where there is doubt (B,) in [0, 1] of the shape, the network is to share it.
    """
    heat, *fields, numbers = maps.float().split(HEADS, 1)
    middle = (place[..., :2] + place[..., 2:4]) / 2  # (B, K, 2)
    at = cell_centers(maps.device)
    apart = (at - middle[:, :, None, None]).mul(GRID).square().sum(-1)  # (B, K, G, G), in cells
    warm = (-apart / (2 * SPREAD**2)).exp() * (index[:, :, :1, None] >= 0)
    warm, owner = warm.max(1)  # (B, G, G)
    total = 2 * F.binary_cross_entropy_with_logits(heat[:, 0], warm, reduction="sum")
    b, v, u = (warm > 0.5).nonzero(as_tuple=True)  # (M,)
    k, weight = owner[b, v, u], warm[b, v, u]
    for i, (name, logits) in enumerate(zip(FIELDS, fields, strict=True)):
        log_p = logits[b, :, v, u].log_softmax(1)  # (M, C)
        surprise = -log_p.gather(1, index[b, k, i, None])[:, 0]
        if name == "shape" and doubt is not None:
            surprise = surprise.lerp(-log_p.mean(1), doubt[b])
        total = total + (weight * surprise).sum()
    wrong = F.smooth_l1_loss(numbers[b, :, v, u], encode_numbers(place[b, k], at[v, u]), reduction="none", beta=0.1)
    return (total + (weight * wrong.sum(1)).sum()) / weight.sum()


def warped(images: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) -> a third of them with wobbling outlines, as bad generators draw; doubt (B,) of the shapes.

    Choice: what wobbles by less than half a pixel has its shape beyond doubt; by 3 pixels of 64, it might be any.
    """
    far = (torch.rand(len(images), generator=draws) * 9 - 6).clamp(min=0)  # pixels
    field = torch.randn(len(images), 2, 14, 14, generator=draws) * far[:, None, None, None] * 2 / SIZE
    flow = F.interpolate(field, size=images.shape[-2:], mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid + flow, padding_mode="reflection", align_corners=False)
    return torch.where(far[:, None, None, None] > 0, moved, images), ((far - 0.5) / 2.5).clamp(0, 1)


def spoiled(images: Tensor, draws: torch.Generator) -> Tensor:
    """images (B, 3, H, W) in [-1, 1] -> as decoders spoil them: resampled, blurred, in blocks, tinted, noisy."""

    def u(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(images), *(shape or (1, 1, 1)), generator=draws)

    side = int(torch.randint(SIZE * 3 // 8, SIZE, (), generator=draws))
    small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    coarse = F.interpolate(small, size=images.shape[-2:], mode="bicubic")
    x = torch.where(u(0, 1) < 0.3, coarse, images)
    blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x.lerp(blur, u(-0.3, 1))  # below 0 it sharpens
    x = torch.where(u(0, 1) < 0.3, _quantized(x, u(0.02, 0.4)), x)
    x = x * u(0.9, 1.1, 3, 1, 1) + u(-0.06, 0.06, 3, 1, 1) + u(-0.06, 0.06)
    return (x + u(0, 0.15) * torch.randn(x.shape, generator=draws)).clamp(-1, 1)


def _quantized(images: Tensor, step: Tensor) -> Tensor:
    """JPEG's way to lose detail: blocks of 8 x 8, each frequency rounded, the high ones more coarsely."""
    at = torch.arange(8.0)
    basis = torch.cos(torch.pi / 8 * (at + 0.5) * at[:, None]) / 2  # (8, 8): frequency, place
    basis[0] /= 2**0.5
    b, c, h, w = images.shape
    blocks = images.view(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    rough = (step * (1 + at[:, None] + at))[:, :, None, None]
    rounded = ((basis @ blocks @ basis.T) / rough).round() * rough
    return (basis.T @ rounded @ basis).transpose(3, 4).reshape(b, c, h, w)


def train(
    engine: Engine, config: StageConfig, images: Tensor, scenes: list[Scene]
) -> Iterator[tuple[float, DetectorNetwork]]:
    """images (n, 3, 64, 64) uint8 and their scenes -> (loss, network) after each step."""
    torch.manual_seed(engine.seed)
    stage = Stage(engine, "detector", config, {"model": DetectorNetwork().to(memory_format=torch.channels_last)})
    net, (index, place) = stage.modules["model"], targets(scenes)
    for step in stage.steps():
        shares = []
        for at, draws in stage.micro_batches(len(images), step):
            pictures, doubt = warped(to_float(images[at]), draws[0])
            with engine.precision():
                maps = net(spoiled(pictures, draws[0]).to(engine.device))
            value = loss(maps, *(part.to(maps.device) for part in (index[at], place[at], doubt))) / stage.parts
            stage.backward(value)
            shares.append({"loss": value})
        stage.update(step)
        stage.end(step)
        yield stage.total(shares)["loss"], net


def measure(detector: Detector, n: int, size: int, seed: int = FRESH) -> dict[int, list[int]]:
    """Fresh scenes of all splits, n with each number of things -> {number: [attributes right, of how many, scenes
    wholly right, of how many]}. A scene is wholly right where the number of things is, and every attribute."""
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

What is in a picture of minimuse's scenes: how many things, and colour, shape, size, material, place and box of each.
{parameters:,} parameters, read at 64 px. It is for measuring generators, never part of a loss.

Made by `python benchmarks/train_detector.py`, in {minutes:.0f} minutes (CPU threads: {threads}), rendering included:
{scenes:,} scenes of splits "novel" (a third) and "test", seeds from {seed:,}; {steps:,} steps of {batch} pictures,
spoiled as decoders spoil them. It saw no scene of split "train" and no generated picture, and shares no weights,
training run or data seed with the perceptual network of `vqgan_loss.py`.

On fresh renders of splits "train", "test" and "novel" in equal parts, seeds from {fresh:,}:

| Pictures | Things | Attributes right | Scenes wholly right |
|---|---|---|---|
{rows}

It must name one of three shapes, so a lump is read as the nearest; `confidence` says how sure it is. It was taught
doubt of shapes on renders with wobbling outlines.
"""


def save(detector: Detector, folder: Path, training: dict[str, float], n: int = 700) -> None:
    """Write weights in half precision, config.json, and the model card with what is then measured."""
    weights = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in detector.net.state_dict().items()}
    detector.net.load_state_dict(weights)  # what is measured is what is saved
    sizes = {size: measure(detector, n, size) for size in (64, 128)}
    rows = [
        f"| {size} px | {k} | {right:,} of {asked:,} | {whole:,} of {all_:,} |"
        for size, table in sizes.items()
        for k, (right, asked, whole, all_) in table.items()
    ]
    values = {"format": DETECTOR_FORMAT, "fields": FIELDS, "training": training}
    parameters = sum(p.numel() for p in detector.net.parameters())
    card = CARD.format(parameters=parameters, rows="\n".join(rows), fresh=FRESH, **training)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / checkpoint.WEIGHTS)
    (folder / checkpoint.CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / checkpoint.CARD).write_text(card, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Render, train, measure, save."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/train_detector.py", description="Train a detector from nothing."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--fresh", type=int, default=700, help="scenes of each count that it is measured on")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    checkpoint.refuse_existing(args.folder)
    begun, config, made = time.time(), replace(TRAINING, steps=args.steps), scenes(args.scenes, args.seed)
    from tqdm import tqdm

    chunks = tqdm(range(0, len(made), 100), desc="rendering", unit_scale=100)
    images = torch.cat([to_uint8(render(made[i : i + 100], SIZE)) for i in chunks])
    progress = train(Engine(seed=args.seed, device=args.device), config, images, made)
    _, net = deque(tqdm(progress, desc="training", total=config.steps), maxlen=1).pop()
    training = {"scenes": args.scenes, "seed": args.seed, "steps": config.steps, "batch": config.batch}
    spent = {"minutes": round((time.time() - begun) / 60, 1), "threads": torch.get_num_threads()}
    save(Detector(net), args.folder, training | spent, args.fresh)
    print(args.folder)


if __name__ == "__main__":
    main()
