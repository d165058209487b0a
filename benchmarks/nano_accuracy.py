"""How often is a picture of one object right in colour and shape?

    python benchmarks/nano_accuracy.py [checkpoint] [--n 210] [--out grid.png]

A small reader is trained on real renders of one object (other seeds than any checkpoint's data), measured on held-out
renders, and then reads what the checkpoint draws for prompts "a red cube", "a large green sphere", ..., every seen
combination of colour and shape in turn, seeds 1000, 1001, ... (sampling was tuned on seeds from 0). Nothing is picked.
Writes the pictures too: look at them.
"""

import argparse
import math
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse import Muse
from minimuse.data import from_pil, to_float, to_uint8
from minimuse.engine import precision
from minimuse.plots import grid
from minimuse.scenes import COLORS, SHAPES, Thing, is_novel, render, sample_scene

KINDS = list(COLORS), list(SHAPES)


def single_scenes(n: int, seed: int) -> list:
    """n scenes of one thing, all combinations, the held-out ones too."""
    return [sample_scene(seed + i, split="novel" if i % 8 == 0 else "test", n_things=1) for i in range(n)]


def labels(things: list[Thing]) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.tensor([kinds.index(getattr(t, name)) for t in things])
        for kinds, name in zip(KINDS, ("color", "shape"), strict=True)
    )


class Reader(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> logits of the colour (B, 8) and of the shape (B, 3)."""

    def __init__(self, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in pairwise(widths)
        ]
        self.layers = nn.Sequential(*layers)
        self.color, self.shape = nn.Linear(widths[-1], len(COLORS)), nn.Linear(widths[-1], len(SHAPES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(images).amax((2, 3))
        return self.color(features), self.shape(features)

    @torch.inference_mode()
    def read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images uint8 -> indices of colour and shape."""
        return tuple(logits.argmax(-1) for logits in self(to_float(images)))


def blurred(images: Tensor) -> Tensor:
    """Renders a little less sharp and less clean, as decoded pictures are."""
    small = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    weight = torch.rand(len(images), 1, 1, 1)
    return (weight * images + (1 - weight) * small + 0.05 * torch.randn_like(images)).clamp(-1, 1)


def train_reader(size: int, n: int = 3000, epochs: int = 6) -> tuple[Reader, float]:
    """-> the reader, and the share of 500 held-out renders that it reads wholly right."""
    torch.manual_seed(1)
    scenes = single_scenes(n + 500, seed=900_000_000)
    images = torch.cat([to_uint8(render(scenes[i : i + 250], size)) for i in range(0, len(scenes), 250)])
    color, shape = labels([s.things[0] for s in scenes])
    reader = Reader()
    steps = epochs * n // 64
    optimizer = torch.optim.AdamW(reader.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(n, (64,))
        with precision(torch.device("cpu")):
            said = reader(blurred(to_float(images[at])))
        loss = F.cross_entropy(said[0].float(), color[at]) + F.cross_entropy(said[1].float(), shape[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    reader.eval()
    said = reader.read(images[n:])
    return reader, ((said[0] == color[n:]) & (said[1] == shape[n:])).float().mean().item()


def prompts(n: int) -> list[tuple[str, str, str]]:
    """(prompt, colour, shape): every seen combination in turn, with and without a size and a material."""
    seen = [(c, s) for s, c in product(SHAPES, COLORS) if not is_novel(Thing(c, s, "large", "rubber", 0, 0, 0))]
    extras = ["", "large ", "small ", ""]
    materials = ["", "", "metal ", "rubber "]
    return [
        (f"a {extras[i // len(seen) % 4]}{c} {materials[(i // len(seen)) % 4]}{s}", c, s)
        for i in range(n)
        for c, s in [seen[i % len(seen)]]
    ]


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share."""
    p = right / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


def accuracy(muse: Muse, reader: Reader, n: int, seed: int = 1000, **sampling) -> tuple[Tensor, list, list]:
    """-> right (n, 2) for colour and shape, the pictures, their prompts."""
    asked = prompts(n)
    images = muse.generate([p for p, _, _ in asked], seed=seed, batch_size=32, **sampling)
    said = reader.read(to_uint8(torch.cat([from_pil(image, image.width) for image in images])))
    wanted = [torch.tensor([kinds.index(a[j + 1]) for a in asked]) for j, kinds in enumerate(KINDS)]
    return torch.stack([s == w for s, w in zip(said, wanted, strict=True)], 1), images, [p for p, _, _ in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="nano")
    parser.add_argument("--n", type=int, default=210)
    parser.add_argument("--out", default="nano_accuracy.png")
    args = parser.parse_args()
    muse = Muse.from_pretrained(args.checkpoint)
    reader, held_out = train_reader(muse.cfg.high_tokenizer.image_size)
    print(f"reader on 500 held-out renders: {held_out:.1%} wholly right")
    right, images, asked = accuracy(muse, reader, args.n)
    for name, column in [("colour", right[:, 0]), ("shape", right[:, 1]), ("both", right.all(1))]:
        k = int(column.sum())
        low, high = wilson(k, args.n)
        print(f"{name:7} {k}/{args.n} = {k / args.n:.1%}  (95% interval {low:.1%} to {high:.1%})")
    marks = [f"{p}{'' if ok else '  WRONG'}" for p, ok in zip(asked, right.all(1).tolist(), strict=True)]
    grid(images[:50], marks[:50], columns=10).save(args.out)
    print(f"the first 50 are in {args.out}")


if __name__ == "__main__":
    main()
