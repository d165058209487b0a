"""How many pictures of one object are right: in color, in shape, in everything that the prompt names?

    python benchmarks/nano_accuracy.py [checkpoint] [--n 210] [--out grid.png]

The prompts are "a red cube", "a large green sphere", ..., with every combination of color and shape from training, and
seeds 1000, 1001, ... (sampling was tuned on seeds from 0). No picture is selected. The shipped detector measures:
    colour, shape   those of the detected thing with the highest confidence
    everything      exactly one thing, with all that the prompt names, also size and material
    clear           the same, with a confidence of at least one half
It also writes the first 50 pictures.
"""

import argparse
from itertools import product

import torch
from torch import Tensor

from minimuse import Muse
from minimuse.data_scenes import COLORS, HELD_OUT, SHAPES
from minimuse.eval_metrics import proportion_interval
from minimuse.eval_networks import Detector
from minimuse.eval_prompts import matches, parse_prompt
from minimuse.plots import grid


def prompts(n: int) -> list[tuple[str, str, str]]:
    """(prompt, color, shape): every combination from training in turn, with and without a size and a material."""
    seen = [(c, s) for s, c in product(SHAPES, COLORS) if (c, s) not in HELD_OUT]
    extras = ["", "large ", "small ", ""]
    materials = ["", "", "metal ", "rubber "]
    return [
        (f"a {extras[i // len(seen) % 4]}{c} {materials[(i // len(seen)) % 4]}{s}", c, s)
        for i in range(n)
        for c, s in [seen[i % len(seen)]]
    ]


def accuracy(muse: Muse, detector: Detector, n: int, seed: int = 1000, **sampling) -> tuple[Tensor, list, list]:
    """right (n, 4): color, shape, everything, clear; the pictures; their prompts."""
    asked, right = prompts(n), []
    images = muse.generate([p for p, _, _ in asked], seed=seed, batch_size=32, **sampling)
    for found, (prompt, color, shape) in zip(detector.detect(images), asked, strict=True):
        surest = max(found.things, key=lambda thing: thing.confidence, default=None)
        looks = (surest is not None and surest.color == color, surest is not None and surest.shape == shape)
        spec = parse_prompt(prompt)
        right.append([*looks, matches(found, spec).right, matches(found, spec, min_confidence=0.5).right])
    return torch.tensor(right), images, [p for p, _, _ in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="nano")
    parser.add_argument("--n", type=int, default=210)
    parser.add_argument("--out", default="nano_accuracy.png")
    args = parser.parse_args()
    muse = Muse.from_pretrained(args.checkpoint)
    right, images, asked = accuracy(muse, Detector.from_pretrained(), args.n)
    color, shape, everything, clear = right.T
    columns = {"colour": color, "shape": shape, "both": color & shape, "everything": everything, "clear": clear}
    for name, column in columns.items():
        print(f"{name:10} {int(column.sum())} of {args.n}: {proportion_interval(column)}")
    marks = [f"{p}{'' if ok else '  WRONG'}" for p, ok in zip(asked, everything.tolist(), strict=True)]
    grid(images[:50], marks[:50], columns=10).save(args.out)
    print(f"the first 50 are in {args.out}")


if __name__ == "__main__":
    main()
