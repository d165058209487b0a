"""What helps super-resolution to learn: the same few images with and without a draft, other things equal.

    python benchmarks/superres.py [--images 2400] [--scenes 4000] [--variants plain,layers,draft] [--out FILE]

    plain    toy's super-resolution as in Muse 2.4: the low-res tokens are read by cross-attention only
    layers   the same with four layers over the low-res tokens in place of one
    draft    it also reads, at each position, the token of the enlarged low-res picture (`vqgan.draft_tokens`)

All start from the shipped toy's frozen tokenizers and train from scratch without text. Measured on 200 held-out scenes:
nats per masked token and accuracy with all, 60% and 20% of the tokens masked. First line: how many tokens of the draft
itself are right. About 15 minutes a variant on one idle core.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse import Muse
from minimuse.data_sources import SceneDataset
from minimuse.masking import random_mask
from minimuse.text import Context
from minimuse.train import train_transformer
from minimuse.train_engine import init_from_codebook
from minimuse.transformer import SuperRes, TransformerConfig
from minimuse.utils import area_downsample, to_float
from minimuse.vqgan import draft_tokens

HELD_OUT = 200
RATES = (1.0, 0.6, 0.2)
VARIANTS = {"plain": {"draft": False}, "layers": {"draft": False, "low_layers": 4}, "draft": {"draft": True}}


@torch.no_grad()
def tokens_of(muse: Muse, scenes: SceneDataset) -> tuple[Tensor, Tensor]:
    """Scenes -> high tokens (n, N), low tokens (n, N_low)."""
    high, low = [], []
    for start in range(0, scenes.n, 50):
        images = scenes.images(range(start, min(start + 50, scenes.n)))
        high.append(muse.high_tokenizer.encode(to_float(images)))
        low.append(muse.low_tokenizer.encode(to_float(area_downsample(images))))
    return torch.cat(high), torch.cat(low)


@torch.no_grad()
def held_out(model: SuperRes, high: Tensor, low: Tensor, draft: Tensor) -> str:
    """Nats per masked token and accuracy for each of RATES, as cells of a table."""
    generator = torch.Generator().manual_seed(0)
    width, cells = model.config.text_width, []
    for rate in RATES:
        nats, right, count = 0.0, 0, 0
        for x, y, z in zip(high.split(25), low.split(25), draft.split(25), strict=True):
            masked = random_mask(x, torch.full((len(x),), rate), generator)
            removed = Context(torch.zeros(len(x), 1, width), torch.zeros(len(x), 1, dtype=torch.bool))
            memory = model.memory(removed, y, *([z] if model.config.draft else []))
            logits = model(x.masked_fill(masked, model.mask_id), memory)[masked]
            nats += F.cross_entropy(logits, x[masked], reduction="sum").item()
            right += int((logits.argmax(-1) == x[masked]).sum())
            count += int(masked.sum())
        cells.append(f"{nats / count:.3f} nats, {right / count:.1%}")
    return " | ".join(cells)


def rows(muse: Muse, high: Tensor, low: Tensor, images: int, variants: list[str]) -> Iterator[str]:
    """The lines of the table, one after another: the training takes minutes."""
    make_draft = partial(draft_tokens, muse.low_tokenizer, muse.high_tokenizer)
    train, test = slice(None, -HELD_OUT), slice(-HELD_OUT, None)
    truth = high[test], low[test], torch.cat([make_draft(part) for part in low[test].split(25)])
    yield f"Of the draft's tokens, {(truth[0] == truth[2]).float().mean():.1%} are the true ones.\n"
    yield (
        f"| variant | images | {' | '.join(f'{rate:.0%} masked' for rate in RATES)} |\n"
        + "|---" * (2 + len(RATES))
        + "|"
    )
    yield f"| the shipped toy, without its prompt | | {held_out(muse.superres, *truth)} |"
    silent = [[torch.zeros(1, muse.config.superres.text_width)]] * len(high)
    stage = replace(muse.config.stages["superres"], cond_drop_prob=1.0)
    stage = replace(stage, steps=images // stage.batch, warmup=images // stage.batch // 10)
    for name in variants:
        config: TransformerConfig = replace(muse.config.superres, **VARIANTS[name])
        torch.manual_seed(0)
        model = SuperRes(config).requires_grad_(False)
        init_from_codebook(model, muse.high_tokenizer.codebook, muse.low_tokenizer.codebook)
        model.requires_grad_(True)
        how = {"low_tokens": low[train], "draft": make_draft if config.draft else None, "stage": "superres"}
        for _ in train_transformer(model, stage, high[train], silent[train], **how):
            pass
        yield f"| {name} | {images:,} | {held_out(model.eval(), *truth)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2400, help="training images, with repetitions")
    parser.add_argument("--scenes", type=int, default=4000, help="different scenes, held-out ones included")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args()
    muse = Muse.from_pretrained("toy", dtype=torch.float32)
    config = muse.config
    scenes = SceneDataset(args.scenes, config.high_tokenizer.image_size, fractions=config.fractions, k=1)
    lines = []
    for line in rows(muse, *tokens_of(muse, scenes), args.images, args.variants.split(",")):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
