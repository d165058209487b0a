"""Train SceneClip (`eval_networks.py`) from scratch. This made the shipped weights, minimuse/checkpoints/clip.

    python benchmarks/train_clip.py FOLDER

    scenes --render, degrade as decoders do--> images            }  each image finds its caption among all captions
    scenes --data_captions.py--> true captions --swap--> false   }  of the batch, and the other way round

The training data is kept away from everything that SceneClip measures: seeds from 5 billion, splits "test" and "novel",
no generated pictures. The shipped weights are those after about 1,137 of the 1,500 steps. n scenes, B per batch.
"""

import argparse
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from train_detector import degrade, scenes

from minimuse import checkpoint
from minimuse.config import StageConfig
from minimuse.data_captions import FLOOR_PHRASE, caption
from minimuse.data_scenes import render
from minimuse.eval_networks import FIELDS, SIZE, SceneClip
from minimuse.text import TextEncoder, pad_contexts
from minimuse.train_engine import Engine, Stage
from minimuse.utils import to_float, to_uint8

TRAINING = StageConfig(steps=1500, batch=64, learning_rate=2e-3, warmup=100, weight_decay=0.05, betas=(0.9, 0.98))
SCENES, SEED, FRESH, WRONG = 8_000, 5_000_000_000, 6_000_000_000, 2  # FRESH: seeds of the scenes for the card
_OTHERS = {name: [o for o in names if o != name] for names in FIELDS.values() for name in names}
_OTHERS |= {"left of": ["right of"], "right of": ["left of"], "in front of": ["behind"], "behind": ["in front of"]}
_OTHERS |= {"two": ["three"], "three": ["two"]}
_SWAPPED = re.compile(rf"\b({'|'.join(_OTHERS)})")
_KINDS = {name: field for field, names in FIELDS.items() for name in names}  # all others: "relation or number"


def swap(text: str, rng: Random) -> tuple[str, str]:
    """A true caption -> the same with one word that makes it false, and what was swapped: "color", "shape", ...

    Captions describe all things of a scene, so the new one is false for every scene for which the old one is true.

    >>> swap("two red cubes", Random(0))
    ('two yellow cubes', 'color')
    """
    told = text.removesuffix(FLOOR_PHRASE)
    at = rng.choice([*_SWAPPED.finditer(told)])
    return text[: at.start()] + rng.choice(_OTHERS[at[1]]) + text[at.end() :], _KINDS.get(at[1], "relation or number")


def train(
    engine: Engine, config: StageConfig, images: Tensor, texts: list[list[Tensor]]
) -> Iterator[tuple[float, SceneClip]]:
    """images (n, 3, 64, 64) uint8, for each its caption and WRONG false ones (L, 384) -> (loss, network) per step."""
    torch.manual_seed(engine.seed)
    stage = Stage(engine, "clip", config, {"model": SceneClip().to(memory_format=torch.channels_last)})
    net = stage.modules["model"]
    for step in stage.steps():
        for at, generators in stage.micro_batches(len(images), step):
            rows = [texts[i][k].float() for k in range(1 + WRONG) for i in at.tolist()]
            pictures = degrade(to_float(images[at]), generators[0]).to(engine.device)
            with engine.precision():
                scores = net.scores(pictures, pad_contexts(rows).to(engine.device))
            logits, right = scores * net.scale.exp().clamp(max=100), torch.arange(len(at), device=scores.device)
            both = F.cross_entropy(logits, right) + F.cross_entropy(logits[:, : len(at)].T, right)
            stage.backward(both / engine.parts, loss=both / engine.parts)
        yield stage.finish(step)["loss"], net


def measure(clip: SceneClip, n: int, seed: int = FRESH, size: int = SIZE) -> dict[str, list[int]]:
    """n fresh renders of all counts and splits -> {what is swapped: [ranked right, of how many]}."""
    made, rng, table = scenes(n, seed, ("train", "test", "novel")), Random(seed), {}
    true = [caption(scene, seed + i) for i, scene in enumerate(made)]
    false, kinds = zip(*(swap(text, rng) for text in true), strict=True)
    images = torch.cat([render(made[i : i + 100], size) for i in range(0, n, 100)])
    for kind, won in zip(kinds, (clip(images, true) > clip(images, false)).tolist(), strict=True):
        row = table.setdefault(kind, [0, 0])
        row[0], row[1] = row[0] + won, row[1] + 1
    return dict(sorted(table.items()))


CARD = """---
library_name: minimuse
license: apache-2.0
---
# SceneClip

A small CLIP: how well a picture of minimuse's scenes fits a prompt. {parameters:,} parameters on top of
all-MiniLM-L6-v2 (frozen, not stored here), input of 64 px. It only measures generators and is never part of a loss.

Made by `python benchmarks/train_clip.py`: {scenes:,} scenes of splits "novel" (a third) and "test", seeds from
{seed:,}; {steps:,} steps of {batch} pictures, each with its caption and two that one swapped word makes false. It was
trained without scenes of split "train" and without generated pictures, and shares no weights, training run or data
seed with the detector or the perceptual network of `vqgan_loss.py`.

Fresh renders of splits "train", "test" and "novel" in equal parts, 1 to 3 things, seeds from {fresh:,}: how often the
true caption scores higher than the same one with one word swapped.

| Swapped | Correct |
|---|---|
{rows}
"""


def save(clip: SceneClip, folder: Path, training: dict[str, int], n: int) -> None:
    """Write weights in half precision, config.json, and a model card with the accuracy of the written weights."""
    weights = {k: v.half().contiguous() for k, v in clip.state_dict().items()}
    clip.load_state_dict(weights)  # measure what is saved
    clip.eval().requires_grad_(False)
    table = measure(clip, n)
    table["all"] = [sum(column) for column in zip(*table.values(), strict=True)]
    rows = "\n".join(f"| {kind} | {right:,} of {of:,} ({right / of:.1%}) |" for kind, (right, of) in table.items())
    parameters = sum(p.numel() for p in clip.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / checkpoint.WEIGHTS)
    values = json.dumps({"format": SceneClip.FORMAT, "training": training}, indent=1)
    (folder / checkpoint.CONFIG).write_text(values + "\n", encoding="utf-8")
    card = CARD.format(parameters=parameters, rows=rows, fresh=FRESH, **training)
    (folder / checkpoint.CARD).write_text(card, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Render, embed, train, measure, save."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python benchmarks/train_clip.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--steps", type=int, default=TRAINING.steps)
    parser.add_argument("--fresh", type=int, default=2000, help="scenes for the model card")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    checkpoint.refuse_existing(args.folder)
    config, made, rng = replace(TRAINING, steps=args.steps), scenes(args.scenes, args.seed), Random(args.seed)
    chunks = tqdm(range(0, len(made), 100), desc="rendering", unit_scale=100)
    images = torch.cat([to_uint8(render(made[i : i + 100], SIZE)) for i in chunks])
    true = [caption(scene, args.seed + i) for i, scene in enumerate(made)]
    said = [[text, *(swap(text, rng)[0] for _ in range(WRONG))] for text in true]
    encoder, known = TextEncoder(device=args.device), {text: None for texts in said for text in texts}
    for few in tqdm([[*known][i : i + 256] for i in range(0, len(known), 256)], desc="embedding", unit_scale=256):
        known |= {text: e[m].half().cpu() for text, e, m in zip(few, *encoder.encode(few), strict=True)}
    progress = train(
        Engine(seed=args.seed % 2**32, device=args.device), config, images, [[known[t] for t in row] for row in said]
    )
    _, net = deque(tqdm(progress, desc="training", total=config.steps), maxlen=1).pop()
    training = {"scenes": args.scenes, "seed": args.seed, "steps": config.steps, "batch": config.batch}
    save(net.cpu(), args.folder, training, args.fresh)
    print(args.folder)


if __name__ == "__main__":
    main()
