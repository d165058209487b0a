"""How should a model read its text, so that it can tell a red cube left of a blue sphere from the reverse?

    python benchmarks/binding.py [--out runs/binding] [--steps 500] [--scenes 16000] [--only NAME] [--docs]

toy's base model is trained from scratch on the same scenes in the same order, with four ways to read the text:
    projected        embeddings of the language model, linearly projected (Muse 2.1)
    ahead and back   one attention layer of our own; half of its heads look ahead, half look back (`text_layers=1`)
    every way        the same layer, with heads that look in all directions, as in most encoders
    told outright    no language model: one vector per thing, with its attributes and relations
Test scenes have two things, and every token is masked. Metrics: by how many nats per picture the true caption fits
better than one with the two things, or their two colors, swapped; and for how many pictures it fits better.

Also measured: what each layer of the language model says by itself. Which fraction of the variance of a color word's
vector depends on the side of its thing? And how many standard deviations lie between the two sides along the best
direction (d')? Intervals are 95%, over pictures, one training each. Finished trainings are kept in --out and reused.
"""

import argparse
import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse import Muse, transformer
from minimuse.config import MuseConfig, preset
from minimuse.data_captions import RELATION_PHRASES, noun_phrase
from minimuse.data_scenes import COLORS, MATERIALS, SHAPES, SIZES, Thing, relations
from minimuse.data_sources import SceneDataset
from minimuse.eval_metrics import Estimate, mean_interval, proportion_interval
from minimuse.text import TextEncoder, pad_contexts
from minimuse.train import train_transformer
from minimuse.train_engine import Engine, init_from_codebook
from minimuse.transformer import Transformer
from minimuse.utils import atomic_write, precision, to_float

WAYS = {"projected": 0, "ahead and back": 1, "every way": 1, "told outright": 0}  # -> text_layers
FRACTIONS = (25, 55, 20)  # of scenes with one, two and three things
SWAPS = ("things", "colours")
WORDS = (*COLORS, *SHAPES, *SIZES, *MATERIALS, "left", "right", "front", "behind", "beside")


def tokens_of(muse: Muse, scenes: SceneDataset, which: list[int]) -> Tensor:
    """Scenes -> their low tokens (n, N)."""
    parts = [which[start : start + 250] for start in range(0, len(which), 250)]
    return torch.cat([muse.low_tokenizer.encode(to_float(scenes.images(part))).flatten(1) for part in parts])


def told(things: tuple[Thing, ...], width: int) -> Tensor:
    """Things -> (K, width): the attributes and relations of each thing, one number per word."""
    rows = torch.zeros(len(things), width)
    for row, thing in zip(rows, things, strict=True):
        others = [name for other in things if other is not thing for name in relations(thing, other)]
        for word in (thing.color, thing.shape, thing.size, thing.material, *others):
            row[WORDS.index(word)] = 2.0
    return rows


def pairs(n: int, size: int) -> tuple[SceneDataset, list[int], list[list[tuple[Thing, ...]]], list[list[str]]]:
    """n test scenes of two things that differ in color and shape.

    Returns data set and indices; then things and captions, each as they are, with things and with colors swapped.
    """
    scenes, rng = SceneDataset(100 * n, size, split="test", fractions=(0, 100, 0), seed=77), Random(0)
    which, things, captions = [], [], []
    for i in range(len(scenes)):
        a, b = scenes.scene(i).things
        names = sorted(relations(a, b) - {"beside"})
        if a.color == b.color or a.shape == b.shape or not names:
            continue
        stands = rng.choice(RELATION_PHRASES[rng.choice(names)])
        looks = {k: {f: getattr(t, f) for f in ("color", "shape", "size", "material")} for k, t in (("a", a), ("b", b))}
        recolored = replace(a, color=b.color), replace(b, color=a.color)
        things.append([(a, b), (replace(a, **looks["b"]), replace(b, **looks["a"])), recolored])
        said = [(a, b), (b, a), recolored]
        captions.append([f" {stands} ".join(noun_phrase((t.color, t.shape), 1, {}) for t in two) for two in said])
        which.append(i)
        if len(which) == n:
            break
    return scenes, which, things, captions


@contextmanager
def looking_everywhere(really: bool):
    """Inside, and only if `really`, the heads of the text layer look in all directions."""
    before = transformer.directional_bias
    if really:
        transformer.directional_bias = lambda mask, heads: mask[:, None, None]
    try:
        yield
    finally:
        transformer.directional_bias = before


@torch.no_grad()
def nats(model: Transformer, tokens: Tensor, texts: list[Tensor], batch: int = 96) -> Tensor:
    """-log p of all tokens of each picture when all are masked, (n,)."""
    found = []
    for start in range(0, len(tokens), batch):
        x = tokens[start : start + batch]
        with precision(x.device):
            memory = model.memory(pad_contexts(texts[start : start + batch]))
            logits = model(torch.full_like(x, model.mask_id), memory)
        found.append(F.cross_entropy(logits.float().transpose(1, 2), x, reduction="none").sum(1))
    return torch.cat(found)


def embed(encoder: TextEncoder, texts: list[str]) -> list[Tensor]:
    """Texts -> (L, D_lm) each, unpadded."""
    rows = []
    for start in range(0, len(texts), 256):
        context = encoder.encode(texts[start : start + 256])
        rows += [e[m] for e, m in zip(context.embeds, context.mask, strict=True)]
    return rows


def study(muse: Muse, config: MuseConfig, out: Path, ways: list[str], n: int, test: int) -> dict[str, dict[str, Any]]:
    """Ways to read the text -> their results, kept in `out`."""
    size, width = config.low_tokenizer.image_size, config.base.text_width
    results, missing, settings = {}, [], {"steps": config.stages["base"].steps, "scenes": n, "test": test}
    for way in ways:
        path = out / f"{way.replace(' ', '-')}.json"
        results[way] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        missing += [way] if not results[way] else []
        if (kept := {k: results[way].get(k) for k in settings}) != settings and results[way]:
            raise ValueError(f"{path} is of {kept}, not {settings}; give the same numbers or another --out")
    if not missing:
        return results
    scenes = SceneDataset(n, size, seed=5, fractions=FRACTIONS, k=3, synonyms=0.5)
    tokens = tokens_of(muse, scenes, list(range(n)))
    print(f"{n} scenes rendered", flush=True)
    captions = [scenes.captions(i) for i in range(n)]
    rows = embed(muse.encoder, [text for texts in captions for text in texts])
    held_out, which, things, said = pairs(test, size)
    truth = tokens_of(muse, held_out, which)
    print("captions embedded", flush=True)
    for way in missing:
        outright = way == "told outright"
        texts = [[told(scenes.scene(i).things, width)] if outright else rows[3 * i : 3 * i + 3] for i in range(n)]
        torch.manual_seed(0)
        model = Transformer(replace(config.base, text_layers=WAYS[way]))
        init_from_codebook(model, muse.low_tokenizer.codebook)
        with looking_everywhere(way == "every way"):
            for p in train_transformer(model, config.stages["base"], tokens, texts, engine=Engine(seed=0)):
                if p.step % 50 == 0:
                    print(f"{way}: step {p.step} of {p.steps}, {p.metrics['loss']:.3f} nats a token", flush=True)
            asked = [
                [told(each[k], width) for each in things] if outright else embed(muse.encoder, [t[k] for t in said])
                for k in range(1 + len(SWAPS))
            ]
            true, *swapped = (nats(model, truth, texts) for texts in asked)
        gains = {name: (nats_ - true).tolist() for name, nats_ in zip(SWAPS, swapped, strict=True)}
        results[way] = {"nats": true.tolist(), "gains": gains, **settings}
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / f"{way.replace(' ', '-')}.json", json.dumps(results[way]) + "\n")
    return results


@torch.no_grad()
def lm_tells(encoder: TextEncoder, n: int = 6000) -> list[tuple[float, float]]:
    """Layer by layer of the LM -> (fraction of a color word's variance that depends on left or right, d')."""
    rng, texts, where = Random(0), [], []
    for _ in range(n):
        (c1, c2), (s1, s2) = rng.sample(list(COLORS), 2), rng.sample(SHAPES, 2)
        left = rng.random() < 0.5
        opening = rng.choice(["", "", "a photo of ", "a picture of "])
        texts.append(f"{opening}a {c1} {s1} {'left' if left else 'right'} of a {c2} {s2}")
        where.append(((c1, left), (c2, not left)))
    ids = {color: encoder._tokenizer.encode(color, add_special_tokens=False)[0] for color in COLORS}
    words, sides = [], []
    for start in range(0, n, 250):
        batch = encoder._tokenizer(texts[start : start + 250], return_tensors="pt", padding=True)
        hidden = torch.stack(encoder._lm(**batch, output_hidden_states=True).hidden_states[1:])  # (layers, b, L, D)
        for k, both in enumerate(where[start : start + 250]):
            for color, left in both:
                words.append(hidden[:, k, (batch["input_ids"][k] == ids[color]).nonzero()[0, 0]])
                sides.append(left)
    found, left = [], torch.tensor(sides)
    for x in torch.stack(words, 1).double():  # (2 n, D)
        between = x[left].mean(0) - x[~left].mean(0)
        within = (torch.cov(x[left].T) + torch.cov(x[~left].T)) / 2 + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype)
        part = between.square().sum() / 4 / (x - x.mean(0)).square().sum(1).mean()
        found.append((part.item(), (between @ torch.linalg.solve(within, between)).sqrt().item()))
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line per way."""
    lines = ["| text | nats a picture | " + " | ".join(f"{s} swapped: nats | told apart" for s in SWAPS) + " |"]
    lines += ["|---" * (2 + 2 * len(SWAPS)) + "|"]
    for way, found in results.items():
        cells: list[Estimate] = [mean_interval(found["nats"])]
        for name in SWAPS:
            gains = torch.tensor(found["gains"][name])
            cells += [mean_interval(gains), proportion_interval(gains > 0)]
        shown = [f"{c.value:.1f} ({c.low:.1f} to {c.high:.1f})" for c in cells]
        for at in (2, 4):
            c = cells[at]
            shown[at] = f"{c.value:.0%} ({c.low:.0%} to {c.high:.0%})"
        lines.append(f"| {way} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def report(results: dict[str, dict[str, Any]], lm: list[tuple[float, float]], name: str) -> str:
    """The content of binding.md."""
    first = next(iter(results.values()))
    layers = "\n".join(f"| {i} | {part:.2%} | {d:.1f} |" for i, (part, d) in enumerate(lm, 1))
    return (
        "# Who is red, who stands left?\n\n"
        f"Made by `python benchmarks/binding.py`: {first['steps']} steps of toy's base\n"
        f"model on {first['scenes']:,} scenes, judged on {len(first['nats'])} held-out ones of two things.\n\n"
        f"{table(results)}\nWhat {name} tells by itself of a colour word's thing, left or right, after each of its\n"
        f"layers (the last one's output is what Muse reads):\n\n"
        f"| layer | fraction of variance | d' |\n|---|---|---|\n{layers}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/binding"))
    parser.add_argument("--steps", type=int, default=500, help="of training, the same for all (default: 500)")
    parser.add_argument("--scenes", type=int, default=16000, help="to train on (default: 16000)")
    parser.add_argument("--test", type=int, default=384, help="held-out scenes (default: 384)")
    parser.add_argument("--only", choices=WAYS, action="append", help="only this way; may be repeated")
    parser.add_argument("--docs", action="store_true", help="also write binding.md next to this script")
    args = parser.parse_args()
    muse, config = Muse.from_pretrained("toy", device="cpu", dtype=torch.float32), preset("toy")
    stage = replace(config.stages["base"], steps=args.steps, eval_every=10**9, save_every=10**9, text_lr_scale=1.0)
    config = replace(config, stages={**config.stages, "base": stage})
    results = study(muse, config, args.out, args.only or list(WAYS), args.scenes, args.test)
    text = report(results, lm_tells(muse.encoder), muse.encoder.name)
    atomic_write(args.out / "binding.md", text)
    print(text)
    if args.docs:
        shutil.copy(args.out / "binding.md", Path(__file__).with_name("binding.md"))


if __name__ == "__main__":
    main()
