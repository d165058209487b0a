"""Is my loss right? A run, finished or under way, examined: each finding a verdict, a number, and what it means.

    tokenizers     codebook (collapsed?), pictures (held-out PSNR), overfitting
    transformers   context (loss by mask rate), bound, leakage, text and low tokens (used or ignored?), overfitting
    every stage    trend (of the log)

"fine" is fine, "look" wants your own eyes, "wrong" will not mend itself. Losses are in nats a token.
Nothing of the run is changed, and nothing is computed that it does not hold yet.
Choice: the thresholds, set so that `nano` is far on the right side of each; beside them figures of an earlier nano.

Not here: the losses themselves (`train_log.py`), whether pictures show what was asked for.
"""

import math
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimuse import checkpoint
from minimuse import train_state as runs
from minimuse.amused import published_tokenizer
from minimuse.config import STAGES, MuseConfig
from minimuse.data_cache import Subset, TrainingData
from minimuse.data_images import to_float
from minimuse.data_sources import open_source
from minimuse.text import TextEncoder, pad_contexts
from minimuse.train import Decimated, MaskedLoss
from minimuse.train_engine import Engine
from minimuse.train_log import RATES, STRATA, eval_mode, read_log, unigram_entropy, validate
from minimuse.transformer import SuperRes, Transformer
from minimuse.utils import seeded_generator
from minimuse.vqgan import VQGAN, codebook_usage

MOST = 128  # examples that a figure is the mean of
SOME = 32  # with fewer held out, what shows on training examples too is read there
FEW = 8  # with fewer held out, overfitting cannot be told
KINDS = ("tokens", "text", "low tokens")  # of the rows that a transformer learns from
EARLY = 0.1  # of a stage's steps: what a transformer has not learnt by then is no alarm yet

MENDS = {
    "codebook": "A collapsed codebook has a perplexity of a few codes, and patches of few colors. Lower the learning "
    "rate, restart dead codes sooner (patience of the VectorQuantizer), or take a smaller code_dim.",
    "pictures": "A tokenizer that learnt nothing gives back gray or mean colors, and what it loses no transformer can "
    "draw. See samples/. Train it longer, make it wider, or take a smaller downsampling.",
    "overfitting": "What is learnt by heart gets better, all else gets worse. Take more data, more captions, more "
    "weight decay or dropout, a smaller model, or an earlier state.",
    "context": "A model that learnt no context sits at the unigram entropy, whatever is masked; a healthy curve lies "
    "below and falls as less is masked. See whether tokens and their places reach it; lower the learning rate.",
    "bound": "Above the unigram entropy it would be better to know how common each token is, and no more. See context "
    "and overfitting.",
    "leakage": "A model that sees what it shall guess has a loss near 0, and draws noise. What it reads must hold "
    "[MASK] wherever a token is asked for, and the loss must ask for masked tokens alone.",
    "text": "A model that ignores its text pays the same for another image's, and draws the same whatever is asked. "
    "See whether captions belong to their images and differ, and cond_drop_prob: 0.1 drops a tenth, not nine.",
    "low tokens": "A super-resolution that ignores them pays the same for another image's, and draws a picture of its "
    "own. See whether they are of the same image, reach memory(), and have places.",
    "trend": "NaN never mends itself; spikes and a rising loss may. Lower the learning rate, warm up longer.",
    "files": "Wait until the run has made it, or go on with: minimuse train --resume.",
}


class Finding(NamedTuple):
    """One answer of `examine`."""

    stage: str  # such as "base"
    check: str  # a key of MENDS
    verdict: str  # "fine", "look" or "wrong"
    number: float
    says: str  # the number in a sentence

    @property
    def mend(self) -> str:
        """What failure looks like, and what to do about it."""
        return MENDS[self.check]


def _verdict(wrong: bool, look: bool) -> str:
    return "wrong" if wrong else "look" if look else "fine"


def _nothing_held_out(stage: str) -> Finding:
    says = f"Fewer than {FEW} examples are held out (it is every 50th), so that overfitting would not show."
    return Finding(stage, "overfitting", "look", math.nan, says)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def examine_tokenizer(
    model: VQGAN, train: Any, held_out: Any, *, engine: Engine | None = None, stage: str = "low_tokenizer"
) -> Iterator[Finding]:
    """A tokenizer, images (n, 3, H, W) uint8 that it was and was not trained on -> its findings."""
    engine, size = engine or Engine(), model.codebook_size
    (tokens, psnr, floor), (others, known, _) = (_rebuild(model, images, engine) for images in (held_out, train))
    used, perplexity = codebook_usage(torch.cat([tokens, others]), size)
    says = f"{used:.0%} of {size} codes are used, as if {perplexity:.1f} of them equally often (perplexity)."
    # nano: 100 of 256. A codebook of the paper's size may well leave most of its codes unused
    yield Finding(
        stage, "codebook", _verdict(perplexity < max(2, size / 100), perplexity < size / 10), perplexity, says
    )
    says = f"Held-out images come back with {psnr:.1f} dB; their mean colors alone have {floor:.1f} dB (PSNR)."
    # nano: 30 and 13.5
    yield Finding(stage, "pictures", _verdict(psnr < floor + 1, psnr < floor + 6), psnr, says)
    if len(held_out) < FEW:
        yield _nothing_held_out(stage)
        return
    gap = known - psnr  # nano: 0.4
    says = f"Training images come back with {gap:+.1f} dB against held-out ones."
    yield Finding(stage, "overfitting", _verdict(gap > 6, gap > 2), gap, says)


def _rebuild(model: VQGAN, images: Any, engine: Engine) -> tuple[Tensor, float, float]:
    """-> tokens, PSNR of the reconstructions, PSNR of each image's mean color."""
    tokens, error, floor, n = [], 0.0, 0.0, min(MOST, len(images))
    for at in torch.arange(n).split(16):
        x = to_float(images[at]).to(engine.device)
        with eval_mode(model), engine.precision():
            tokens.append(model.encode(x).cpu())
            made = model.decode(tokens[-1].to(engine.device)).float()
        error += (made - x).square().mean((1, 2, 3)).sum().item() / n
        floor += (x.mean((2, 3), keepdim=True) - x).square().mean((1, 2, 3)).sum().item() / n
    return torch.cat(tokens), *(-10 * math.log10(max(e, 1e-10) / 4) for e in (error, floor))


# --- transformers -----------------------------------------------------------------------------------------------------


def examine_transformer(
    loss: Callable[..., tuple[Tensor, Tensor]],
    train: Sequence[Any],
    held_out: Sequence[Any],
    *,
    codebook_size: int,
    engine: Engine | None = None,
    stage: str = "base",
    early: bool = False,
) -> Iterator[Finding]:
    """A `MaskedLoss`, (tokens, texts) or (tokens, texts, low tokens) that it was and was not trained on -> findings.

    early: what is not learnt yet is no alarm.
    """
    engine = engine or Engine()
    pieces, rows = partial(_pieces, loss, codebook_size, engine), held_out if len(held_out[0]) >= SOME else train
    own, some = pieces(rows, strata=STRATA), rows[0][torch.arange(min(4096, len(rows[0])))]
    floor = max(unigram_entropy(some, codebook_size), 1e-9)  # one code alone has none
    yield from _context(own, floor, stage, early)
    yield _leakage(*_total(loss, rows, codebook_size, engine), own["loss@0.9"].mean().item(), floor, stage)
    # nano: another caption costs the base 1.1, super-resolution 0.14; other low tokens cost it 4.2
    for check, share in (("text", 0.005), ("low tokens", 0.05))[: len(rows) - 1]:
        cost, doubt = _mean(_level(pieces(rows, other=check)) - _level(own))
        little, unsure = cost < share * floor, cost < max(2 * doubt, 1e-6)
        says = (
            f"Another image's {check} cost {cost:+.3f} ± {doubt:.3f} more than its own; less than {share * floor:.3f} "
        )
        says += "would be little."
        yield Finding(stage, check, _verdict(little and unsure and not early, little or unsure), cost, says)
    if len(held_out[0]) < FEW:
        yield _nothing_held_out(stage)
        return
    (known, doubt), (fresh, its) = (_mean(_level(own if r is rows else pieces(r))) for r in (train, held_out))
    gap, sure = fresh - known, fresh - known > 2 * math.hypot(doubt, its)
    says = f"Held-out examples cost {gap:+.3f} more than training ones, {gap / floor:.1%} of the unigram entropy."
    # nano: 2%
    yield Finding(stage, "overfitting", _verdict(sure and gap > 0.2 * floor, sure and gap > 0.05 * floor), gap, says)


def _context(own: dict[str, Tensor], floor: float, stage: str, early: bool) -> Iterator[Finding]:
    costs, rights = ([own[f"{key}@{r}"] for r in RATES] for key in ("loss", "accuracy"))
    least, bound = costs[0].mean().item(), own["bound"].mean().item()
    flat = least > 0.97 * floor  # nano: 2.1 to 2.6 of 4.8
    rises = any(more - 2 * doubt > 0.02 * floor for more, doubt in (_mean(a - b) for a, b in pairwise(costs)))
    says = f"With {_row(RATES, '.0%')} hidden a token costs {_row(costs, '.2f')}, and {_row(rights, '.0%')} of the "
    says += f"guesses are right. The unigram entropy is {floor:.2f}."
    yield Finding(stage, "context", _verdict(flat and not early, flat or rises), least, says)
    says = f"-log p is at most {bound:.2f} a token, {bound / floor:.0%} of the unigram entropy."
    yield Finding(stage, "bound", _verdict(bound > 1.05 * floor and not early, bound > 0.97 * floor), bound, says)


def _leakage(total: float, part: float, cost: float, floor: float, stage: str) -> Finding:
    says = f"p of {part:.0%} of the values of one hidden token adds up to {total:.2f}, and should to "
    says += f"{'' if part == 1 else 'at most '}1. With 90% hidden a token costs {cost:.2f}."
    leaks = total > 1.05 or (part == 1 and total < 0.95)
    return Finding(stage, "leakage", _verdict(leaks, cost < 0.02 * floor), total, says)


def _pieces(
    loss: Callable, size: int, engine: Engine, rows: Sequence[Any], *, other: str = "", strata: int = 0
) -> dict[str, Tensor]:
    """Figures of up to 8 disjoint pieces of the rows, (pieces,) each; `other`: what comes from another image."""
    n, found = min(MOST, len(rows[0])), []
    for at in torch.arange(n).chunk(max(1, min(8, n // 2))):
        shift = len(at) // 2 | 1  # odd, since captions of a made-up set repeat with an even period
        moved = [Subset(r, at.roll(shift * (name == other))) for r, name in zip(rows, KINDS, strict=False)]
        found.append(validate(loss, *moved, codebook_size=size, engine=engine, strata=strata))
    return {key: torch.tensor([figures[key] for figures in found]) for key in found[0]}


def _level(figures: dict[str, Tensor]) -> Tensor:
    """The mean loss over all rates of each piece, (pieces,)."""
    return torch.stack([figures[f"loss@{r}"] for r in RATES]).mean(0)


def _mean(each: Tensor) -> tuple[float, float]:
    """-> mean, and its standard error."""
    return each.mean().item(), each.std().item() / math.sqrt(len(each)) if len(each) > 1 else 0.0


def _total(loss: Callable, rows: Sequence[Any], size: int, engine: Engine, most: int = 256) -> tuple[float, float]:
    """Sum of p = exp(-loss) of one masked token over up to `most` of its values, and which part of all these are.

    Over all of them it is 1, over some at most 1, unless the model sees which one it is.
    """
    first = torch.tensor([0])
    x, text, *low = rows[0][first], rows[1].pick(first, [0.0]), *(r[first].to(engine.device) for r in rows[2:])
    context, masked = pad_contexts([t.float() for t in text]).to(engine.device), torch.zeros_like(x).bool()
    masked[0, x.shape[1] // 2] = True
    values, total = torch.randperm(size, generator=seeded_generator(size))[:most], 0.0
    for value in values:
        shown = x.masked_fill(masked, value).to(engine.device), masked.to(engine.device), context, *(low or [None]), 1
        with eval_mode(loss), engine.precision():
            total += math.exp(-float(loss(*shown)[0]))
    return total, len(values) / size


def _row(values: Sequence[Any], form: str) -> str:
    return ", ".join(format(float(torch.as_tensor(v).mean()), form) for v in values)


# --- the log ----------------------------------------------------------------------------------------------------------


def examine_log(lines: Sequence[dict[str, Any]], stage: str) -> Finding:
    """The lines of a stage -> is its loss, or a tokenizer's l1, which no critic moves, on its way?"""
    key = "loss" if stage in ("base", "superres") else "l1"
    for line in lines:
        if bad := [k for k, v in line.items() if k != "stage" and not math.isfinite(v)]:
            return Finding(
                stage, "trend", "wrong", math.nan, f"{', '.join(bad)}: NaN or infinite at step {line['step']}."
            )
    values = torch.tensor([line[key] for line in lines if key in line])
    if len(values) < 12:
        return Finding(stage, "trend", "look", math.nan, f"{len(values)} lines in the log, too few for a trend.")
    *_, third, last = values.chunk(4)
    change, usual = (last.mean() / third.mean() - 1).item(), values.unfold(0, 10, 1)[:-1].median(1).values
    spikes = int((values[10:] > 3 * usual).sum())  # nano's noise of a step is about a fifth
    says = f"In its last quarter {key} is {last.mean():.3g}, {change:+.1%} against the quarter before"
    says += f"; {spikes} of {len(values)} lines are above 3 times the median of the ten before (spikes)."
    says += " It still falls: more steps would help." if change < -0.02 else ""
    return Finding(stage, "trend", _verdict(False, change > 0.05 or spikes > 0), change, says)


# --- a run ------------------------------------------------------------------------------------------------------------


def examine(folder: str | Path, stage: str | None = None, *, device: Any = None) -> list[Finding]:
    """The folder of a run -> the findings of all stages that have a state, or of one.

    FileNotFoundError where there is no run; ValueError where the stage has no state yet.
    """
    folder = Path(folder)
    if not (folder / runs.RUN).is_file():
        raise FileNotFoundError(f"{folder} holds no {runs.RUN}; give a folder that `minimuse train --out` made")
    run, lines = runs.read_run(folder), read_log(folder / "log.jsonl")
    config, engine = checkpoint.configuration(run, folder / runs.RUN), Engine(seed=run["seed"], device=device)
    started = [name for name in STAGES if runs.states(folder / name)]
    if not started or stage not in (None, *started):
        there = ", ".join(started) or "none"
        raise ValueError(f"no state of {stage or 'any stage'} in {folder} yet; there are those of: {there}")
    encoder = TextEncoder(config.text_encoder, max_tokens=config.text_tokens, device=engine.device)
    source = open_source(run["data"], config, seed=run["seed"])
    device = {"device": engine.device, "bf16": engine.bf16}
    corpus, findings = TrainingData(folder / "cache", source, config, encoder, **device, read_only=True), []
    for name in started if stage is None else [stage]:
        findings.append(examine_log([line for line in lines if line["stage"] == name], name))
        try:
            findings += _stage(folder, name, config, corpus, engine)
        except (ValueError, OSError) as error:
            findings.append(Finding(name, "files", "look", math.nan, f"Not examined: {error}."))
    return findings


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings as text: verdict, stage, check, the number and, once for each check, what to do."""
    lines = []
    explained = set()
    for finding in findings:
        lines.append(f"{finding.verdict:5}  {finding.stage}, {finding.check}")
        known = finding.verdict == "fine" and finding.check in explained
        for text in [finding.says] if known else [finding.says, finding.mend]:
            lines.append(textwrap.fill(text, 110, initial_indent="       ", subsequent_indent="       "))
        explained.add(finding.check)
    look, wrong = (sum(finding.verdict == verdict for finding in findings) for verdict in ("look", "wrong"))
    return "\n".join([*lines, f"{len(findings)} findings, {look} to look at, {wrong} wrong"])


def _stage(folder: Path, name: str, config: MuseConfig, corpus: TrainingData, engine: Engine) -> Iterator[Finding]:
    """The newest state of a stage, against the caches that the run made for it."""
    low, high = config.low_tokenizer, config.high_tokenizer

    def tokenizer(name: str) -> VQGAN:
        sizes = {"low_tokenizer": low, "high_tokenizer": high, "decoder": config.finetuned_tokenizer}
        vqgan = VQGAN(sizes[name]).to(engine.device)
        runs.load_weights(folder / name, vqgan)
        return vqgan

    deque(corpus.read(), maxlen=0)
    if name not in ("base", "superres"):
        factor = high.image_size // low.image_size if name == "low_tokenizer" else 1
        images = [Decimated(corpus.split(corpus.images, held_out), factor) for held_out in (False, True)]
        yield from examine_tokenizer(tokenizer(name), *images, engine=engine, stage=name)
        return
    if config.model in ("ar", "dit"):
        raise ValueError(f"{config.name} is no masked transformer, and these checks are of one")
    deque(corpus.tokenize("low", published_tokenizer(config) or tokenizer("low_tokenizer")), maxlen=0)
    deque(corpus.embed(), maxlen=0)
    rows, model = [corpus.tokens["low"], corpus.texts], Transformer(config.base)
    if name == "superres":
        deque(corpus.tokenize("high", tokenizer("high_tokenizer")), maxlen=0)
        rows, model = [corpus.tokens["high"], corpus.texts, corpus.tokens["low"]], SuperRes(config.superres)
    loss = MaskedLoss(model).to(engine.device)
    early = runs.load_weights(folder / name, loss) < EARLY * config.stages[name].steps
    sets = [[corpus.split(r, held_out) for r in rows] for held_out in (False, True)]
    size = model.mask_id
    yield from examine_transformer(loss, *sets, codebook_size=size, engine=engine, stage=name, early=early)
