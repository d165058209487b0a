"""Teach a base model which thing is missing: python benchmarks/hide_things.py --from toy --out runs/hidden

Asked for "a red cube next to a blue sphere", a base model may draw two red cubes. The text does not say which thing
stands left. So with one of them in place, the model must find out which one is missing. A random mask seldom asks for
that: it rarely hides one thing whole and leaves the other visible.

Here it is asked. Half of each batch are scenes of two things, with a caption that names both, but not their places. In
half of these one thing is hidden whole, and up to 60% of the other tokens; the rest have masks as ever (Muse 2.6). The
other half of the batch is trained as ever (2.3).
Frozen: both tokenizers, the language model, super-resolution. Measured on 256 held-out scenes with one thing hidden, in
nats for each hidden token: what such a caption ("open") costs more than one that says the side ("sided").

The result is a checkpoint with a new base model. About 2.5 s for each step on one core; the same
command continues a run that was stopped.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse import Muse
from minimuse.checkpoint import refuse_existing
from minimuse.config import StageConfig, preset
from minimuse.data_captions import RELATION_PHRASES, noun_phrase
from minimuse.data_scenes import Scene, box, relations
from minimuse.data_sources import SceneDataset
from minimuse.masking import random_mask, sample_mask_rate
from minimuse.text import Context
from minimuse.train import MaskedLoss, train_network
from minimuse.train_engine import Engine, Stage
from minimuse.utils import area_downsample, to_float

FIELDS = ("color shape", "size color shape", "color material shape", "size color material shape")
HELD_OUT = 256


def names(scene: Scene, seed: int) -> tuple[str, str] | None:
    """A scene of two things -> what the captions call them; None if their number or their words do not allow that."""
    fields = Random(f"names/{seed}").choice(FIELDS).split()
    words = [tuple(getattr(thing, field) for field in fields) for thing in scene.things]
    return tuple(noun_phrase(w, 1, {}) for w in words) if len(words) == 2 and words[0] != words[1] else None


def open_caption(scene: Scene, two: tuple[str, str], rng: Random) -> str:
    """Both things, in any order, without their places."""
    a, b = rng.sample(two, 2)
    return f"{a} next to {b}" if "beside" in relations(*scene.things) and rng.random() < 0.6 else f"{a} and {b}"


def sided_caption(scene: Scene, two: tuple[str, str]) -> str:
    """The same with their places."""
    relation = min(relations(*scene.things) - {"beside"})
    return f"{two[0]} {RELATION_PHRASES[relation][0]} {two[1]}"


def covered(scene: Scene, i: int, grid: int) -> Tensor:
    """(grid**2,) bool: the tokens of thing i, with half a token around its box."""
    left, top, right, bottom = (x * grid for x in box(scene.things[i]))
    mask = torch.zeros(grid, grid, dtype=torch.bool)
    rows, columns = ((max(0, int(a - 0.5)), math.ceil(b + 0.5)) for a, b in ((top, bottom), (left, right)))
    mask[slice(*rows), slice(*columns)] = True
    return mask.flatten()


@torch.no_grad()
def tokens_of(muse: Muse, scenes: SceneDataset, out: Path) -> Tensor:
    """Scenes -> low tokens (n, N), kept in `out`."""
    path = out / "tokens.pt"
    if not path.exists():
        parts = [range(start, min(start + 50, scenes.n)) for start in range(0, scenes.n, 50)]
        images = (area_downsample(to_float(scenes.images(part))) for part in parts)
        torch.save(torch.cat([muse.low_tokenizer.encode(few).to(torch.int16) for few in images]), path)
    return torch.load(path).long()


def held_out(muse: Muse, scenes: SceneDataset, tokens: Tensor, which: list[int]) -> Callable[[MaskedLoss], dict]:
    """-> a function: the loss's model -> nats for each hidden token with open and with sided captions."""
    rng, x = Random(9), tokens[which]
    drawn = [(scenes.scene(i), names(scenes.scene(i), i)) for i in which]
    hidden = torch.stack([covered(scene, rng.randrange(2), muse.base.config.grid) for scene, _ in drawn])
    texts = {"open": [open_caption(*pair, rng) for pair in drawn], "sided": [sided_caption(*pair) for pair in drawn]}
    contexts = {kind: muse.encoder.encode(text) for kind, text in texts.items()}

    @torch.no_grad()
    def measure(loss: MaskedLoss) -> dict[str, float]:
        model, found = loss.model, {}
        for kind, context in contexts.items():
            logits = model(x.masked_fill(hidden, model.mask_id), model.memory(context))
            found[kind] = F.cross_entropy(logits[hidden].float(), x[hidden]).item()
        return found | {"open less sided": found["open"] - found["sided"]}

    return measure


def train(muse: Muse, config: StageConfig, scenes: SceneDataset, out: Path, share: float, hidden: float) -> None:
    """Continue `muse.base` in place; `share` of each batch are pairs, in `hidden` of them one thing is hidden."""
    tokens, grid = tokens_of(muse, scenes, out), muse.base.config.grid
    pairs = [i for i in range(scenes.n) if names(scenes.scene(i), i)]
    measure = held_out(muse, scenes, tokens, pairs[:HELD_OUT])
    others = sorted(set(range(scenes.n)) - set(pairs[:HELD_OUT]))
    pairs = pairs[HELD_OUT:]

    def losses(job: Stage, step: int, at: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        rng = Random(f"{job.engine.seed}/{step}/{at.tolist()}")
        special = [rng.random() < share for _ in at]
        rows = [pairs[i % len(pairs)] if s else rng.choice(others) for i, s in zip(at.tolist(), special, strict=True)]
        x = tokens[rows]
        masked = random_mask(x, sample_mask_rate(len(x), generator=generators), generators)
        texts = []
        for k, (i, s) in enumerate(zip(rows, special, strict=True)):
            scene = scenes.scene(i)
            texts.append(open_caption(scene, names(scene, i), rng) if s else rng.choice(scenes.captions(i)))
            if s and rng.random() < hidden:
                rest = torch.rand(x.shape[1], generator=generators[k]) < rng.random() * 0.6
                masked[k] = covered(scene, rng.randrange(2), grid) | rest
        embeds, mask = muse.encoder.encode(texts)
        kept = torch.tensor([rng.random() >= config.cond_drop_prob for _ in texts])
        loss, accuracy = job.modules["model"](x, masked, Context(embeds, mask & kept[:, None]), None, int(masked.sum()))
        return {"loss": loss, "accuracy": accuracy}

    loss = MaskedLoss(muse.base.requires_grad_(True))
    print("before", {name: round(value, 3) for name, value in measure(loss.eval()).items()}, flush=True)
    for progress in train_network(loss, losses, config, len(pairs), engine=Engine(folder=out)):
        if progress.step % 50 == 0:
            seen = {"loss": progress.metrics.get("loss"), **measure(loss.eval())}
            loss.train()
            print(progress.step, {name: value and round(value, 3) for name, value in seen.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="start", default="toy", help="checkpoint to start from")
    parser.add_argument("--out", type=Path, required=True, help="states, then the checkpoint in --out/model")
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--share", type=float, default=0.5, help="fraction of each batch that are pairs")
    parser.add_argument("--hidden", type=float, default=0.5, help="fraction of the pairs with one thing hidden whole")
    args = parser.parse_args()
    muse = Muse.from_pretrained(args.start, dtype=torch.float32)
    look = preset(muse.config.name)  # of its scenes
    scenes = SceneDataset(
        args.scenes, muse.config.high_tokenizer.image_size, fractions=look.fractions, k=look.captions,
        synonyms=look.synonyms,
    )  # fmt: skip
    config = replace(look.stages["base"], steps=args.steps, learning_rate=args.learning_rate, warmup=30)
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_existing(args.out / "model")
    train(muse, replace(config, save_every=250), scenes, args.out, args.share, args.hidden)
    muse.save_pretrained(args.out / "model", dtype=torch.float16)


if __name__ == "__main__":
    main()
