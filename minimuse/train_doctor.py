"""Is my loss right? Checks of a run, finished or under way: each finding has a verdict, a number and a hint.

    tokenizers     codebook (collapsed?), pictures (held-out PSNR), overfitting
    transformers   context (loss by mask rate), bound, leakage, text and low tokens (used or ignored?), overfitting
    every stage    trend (of the log)

Verdicts: "fine"; "look" means that a person should look at it; "wrong" needs a repair. Losses are in nats a token.
Nothing of the run is changed, and nothing is computed that the run does not hold yet.
Choice: the thresholds. A healthy `nano` is far on the right side of each.

Not here: the losses themselves (`train_log.py`), whether pictures show what the prompt asks for (`eval_run.py`).
"""

import math
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimuse import checkpoint, train_state
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

MOST = 128  # examples that a check reads
SOME = 32  # with fewer held-out examples, training examples are checked instead
FEW = 8  # with fewer held-out examples, overfitting cannot be seen
EARLY = 0.1  # fraction of a stage's steps before which a transformer may still be untrained

HINTS = {
    "codebook": "A collapsed codebook has a perplexity of a few codes, and its patches have few colors. Lower the "
    "learning rate, restart dead codes sooner (patience of the VectorQuantizer), or use a smaller code_dim.",
    "pictures": "An untrained tokenizer returns gray or mean colors. No transformer can draw what the tokenizer loses. "
    "Look at samples/. Train longer, or use a larger width or a smaller downsampling.",
    "overfitting": "The model memorizes its training examples. Use more data, more captions, more weight decay or "
    "dropout, a smaller model, or an earlier state.",
    "context": "A model without context has the unigram entropy as its loss at every mask rate. A healthy loss is "
    "lower, and falls as fewer tokens are masked. Check that tokens and positions reach the model, or lower the "
    "learning rate.",
    "bound": "Above the unigram entropy, knowing the frequency of each token would be better. See context and "
    "overfitting.",
    "leakage": "A model that sees its targets has a loss near 0, and draws noise. Its input must hold [MASK] at every "
    "target, and the loss must count masked tokens only.",
    "text": "A model that ignores its text has the same loss with the text of another image. Check that captions "
    "belong to their images and differ, and cond_drop_prob: 0.1 drops one text in ten.",
    "low tokens": "A super-resolution model that ignores them has the same loss with those of another image. Check "
    "that they belong to the same image, reach memory(), and have positions.",
    "trend": "A NaN stays. Spikes and a rising loss may recover. Lower the learning rate, or use a longer warm-up.",
    "files": "Wait until the run has computed it, or continue the run: minimuse train --resume.",
}


class Finding(NamedTuple):
    """One result of `examine`."""

    stage: str  # such as "base"
    check: str  # a key of HINTS
    verdict: str  # "fine", "look" or "wrong"
    number: float
    message: str  # the number in a sentence

    @property
    def hint(self) -> str:
        """What failure looks like, and what to do about it."""
        return HINTS[self.check]


def _verdict(wrong: bool, look: bool) -> str:
    return "wrong" if wrong else "look" if look else "fine"


def _nothing_held_out(stage: str) -> Finding:
    message = f"Fewer than {FEW} examples are held out (every 50th is), so overfitting would not be seen."
    return Finding(stage, "overfitting", "look", math.nan, message)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def examine_tokenizer(
    model: VQGAN, train: Any, held_out: Any, *, engine: Engine | None = None, stage: str = "low_tokenizer"
) -> Iterator[Finding]:
    """A tokenizer, training and held-out images (n, 3, H, W) uint8 -> its findings."""
    engine, size = engine or Engine(), model.codebook_size
    tokens, psnr, floor = _reconstruct(model, held_out, engine)
    other_tokens, train_psnr, _ = _reconstruct(model, train, engine)
    used, perplexity = codebook_usage(torch.cat([tokens, other_tokens]), size)
    verdict = _verdict(perplexity < max(2, size / 100), perplexity < size / 10)
    yield Finding(
        stage, "codebook", verdict, perplexity, f"{used:.0%} of {size} codes are used; perplexity {perplexity:.1f}."
    )
    message = f"The PSNR of held-out images is {psnr:.1f} dB; that of their mean colors is {floor:.1f} dB."
    yield Finding(stage, "pictures", _verdict(psnr < floor + 1, psnr < floor + 6), psnr, message)
    if len(held_out) < FEW:
        yield _nothing_held_out(stage)
        return
    gap = train_psnr - psnr
    message = f"The PSNR of training images is {gap:+.1f} dB compared with held-out ones."
    yield Finding(stage, "overfitting", _verdict(gap > 6, gap > 2), gap, message)


def _reconstruct(model: VQGAN, images: Any, engine: Engine) -> tuple[Tensor, float, float]:
    """-> tokens, PSNR of the reconstructions, PSNR of each image's mean color."""
    tokens, errors, floors = [], [], []
    for at in torch.arange(min(MOST, len(images))).split(16):
        x = to_float(images[at]).to(engine.device)
        with eval_mode(model), engine.precision():
            tokens.append(model.encode(x))
            made = model.decode(tokens[-1]).float()
        errors.append((made - x).square().mean((1, 2, 3)))
        floors.append((x.mean((2, 3), keepdim=True) - x).square().mean((1, 2, 3)))
    psnr, floor = (-10 * math.log10(max(torch.cat(e).mean().item(), 1e-10) / 4) for e in (errors, floors))
    return torch.cat(tokens).cpu(), psnr, floor


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
    """A `MaskedLoss`, training and held-out (tokens, texts) or (tokens, texts, low tokens) -> its findings.

    early: the model may still be untrained, so that is not "wrong".
    """
    engine = engine or Engine()
    rows = held_out if len(held_out[0]) >= SOME else train
    own = _metrics(loss, rows, codebook_size, engine, strata=STRATA)
    tokens = rows[0][torch.arange(min(4096, len(rows[0])))]
    floor = max(unigram_entropy(tokens, codebook_size), 1e-9)  # it is 0 if there is only one code
    yield from _context(own, floor, stage, early)
    yield _leakage(loss, rows, codebook_size, engine, own["loss@0.9"].mean().item() < 0.02 * floor, stage)
    for place, (check, fraction) in enumerate([("text", 0.005), ("low tokens", 0.05)][: len(rows) - 1], 1):
        other = _metrics(loss, rows, codebook_size, engine, exchange=place)
        cost, error = _mean(_loss(other) - _loss(own))
        little, unsure = cost < fraction * floor, cost < max(2 * error, 1e-6)
        message = f"With the {check} of another image the loss changes by {cost:+.3f} ± {error:.3f}; "
        message += f"less than {fraction * floor:.3f} would be little."
        yield Finding(stage, check, _verdict(little and unsure and not early, little or unsure), cost, message)
    if len(held_out[0]) < FEW:
        yield _nothing_held_out(stage)
        return
    known, known_error = _mean(_loss(own if train is rows else _metrics(loss, train, codebook_size, engine)))
    fresh, fresh_error = _mean(_loss(own if held_out is rows else _metrics(loss, held_out, codebook_size, engine)))
    gap = fresh - known
    sure = gap > 2 * math.hypot(known_error, fresh_error)
    message = f"Held-out examples cost {gap:+.3f} more than training ones, {gap / floor:.1%} of the unigram entropy."
    verdict = _verdict(sure and gap > 0.2 * floor, sure and gap > 0.05 * floor)
    yield Finding(stage, "overfitting", verdict, gap, message)


def _context(own: dict[str, Tensor], floor: float, stage: str, early: bool) -> Iterator[Finding]:
    """Does the loss fall as fewer tokens are masked, and is the bound below the unigram entropy?"""
    losses = [own[f"loss@{r}"] for r in RATES]
    least, bound = losses[0].mean().item(), own["bound"].mean().item()
    flat = least > 0.97 * floor
    rises = any(more - 2 * error > 0.02 * floor for more, error in (_mean(a - b) for a, b in pairwise(losses)))
    row = ", ".join(f"{loss.mean():.2f} at {rate:.0%}" for rate, loss in zip(RATES, losses, strict=True))
    message = f"The loss by mask rate is {row}. The unigram entropy is {floor:.2f}."
    yield Finding(stage, "context", _verdict(flat and not early, flat or rises), least, message)
    message = f"-log p is at most {bound:.2f} a token, {bound / floor:.0%} of the unigram entropy."
    yield Finding(stage, "bound", _verdict(bound > 1.05 * floor and not early, bound > 0.97 * floor), bound, message)


def _leakage(
    loss: Callable, rows: Sequence[Any], size: int, engine: Engine, suspicious: bool, stage: str, most: int = 256
) -> Finding:
    """Sum p = exp(-loss) of one masked token over up to `most` of its values.

    Over all values the sum is 1, over some at most 1, unless the model sees the value.
    """
    first = torch.tensor([0])
    x = rows[0][first]
    context = pad_contexts([text.float() for text in rows[1].pick(first, [0.0])]).to(engine.device)
    low = rows[2][first].to(engine.device) if len(rows) > 2 else None
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, x.shape[1] // 2] = True
    values, total = torch.randperm(size, generator=seeded_generator(size))[:most], 0.0
    for value in values:
        shown = x.masked_fill(masked, value).to(engine.device)
        with eval_mode(loss), engine.precision():
            total += math.exp(-float(loss(shown, masked.to(engine.device), context, low, 1)[0]))
    message = f"The probabilities of {len(values)} of {size} values of one masked token add up to {total:.2f}."
    leaks = total > 1.05 or (len(values) == size and total < 0.95)
    return Finding(stage, "leakage", _verdict(leaks, suspicious), total, message)


def _metrics(
    loss: Callable, rows: Sequence[Any], size: int, engine: Engine, *, exchange: int = -1, strata: int = 0
) -> dict[str, Tensor]:
    """`validate` on up to 8 groups of examples, (groups,) each. Column `exchange` of the rows is another image's."""
    n, found = min(MOST, len(rows[0])), []
    for at in torch.arange(n).chunk(max(1, min(8, n // 2))):
        shift = len(at) // 2 | 1  # odd, since the captions of a made-up set repeat with an even period
        group = [Subset(r, at.roll(shift) if place == exchange else at) for place, r in enumerate(rows)]
        found.append(validate(loss, *group, codebook_size=size, engine=engine, strata=strata))
    return {key: torch.tensor([metrics[key] for metrics in found]) for key in found[0]}


def _loss(metrics: dict[str, Tensor]) -> Tensor:
    """The mean loss over all rates, (groups,)."""
    return torch.stack([metrics[f"loss@{r}"] for r in RATES]).mean(0)


def _mean(each: Tensor) -> tuple[float, float]:
    """-> mean, and its standard error."""
    return each.mean().item(), each.std().item() / math.sqrt(len(each)) if len(each) > 1 else 0.0


# --- the log ----------------------------------------------------------------------------------------------------------


def examine_log(lines: Sequence[dict[str, Any]], stage: str) -> Finding:
    """The log lines of a stage -> is its loss (for tokenizers l1) finite, without spikes, and not rising?"""
    key = "loss" if stage in ("base", "superres") else "l1"
    for line in lines:
        if bad := [k for k, v in line.items() if k != "stage" and not math.isfinite(v)]:
            message = f"{', '.join(bad)}: NaN or infinite at step {line['step']}."
            return Finding(stage, "trend", "wrong", math.nan, message)
    values = torch.tensor([line[key] for line in lines if key in line])
    if len(values) < 12:
        return Finding(stage, "trend", "look", math.nan, f"{len(values)} lines in the log, too few for a trend.")
    *_, third, last = values.chunk(4)
    change = (last.mean() / third.mean() - 1).item()
    spikes = int((values[10:] > 3 * values.unfold(0, 10, 1)[:-1].median(1).values).sum())
    message = f"In the last quarter {key} is {last.mean():.3g}, {change:+.1%} compared with the quarter before. "
    message += f"{spikes} of {len(values)} lines are spikes, above 3 times the median of the ten before."
    message += " It still falls: more steps would help." if change < -0.02 else ""
    return Finding(stage, "trend", _verdict(False, change > 0.05 or spikes > 0), change, message)


# --- a run ------------------------------------------------------------------------------------------------------------


def examine(folder: str | Path, stage: str | None = None, *, device: Any = None) -> list[Finding]:
    """The folder of a run -> the findings of one stage, or of all that have a state.

    FileNotFoundError if there is no run; ValueError if the stage has no state yet.
    """
    folder = Path(folder)
    if not (folder / train_state.RUN).is_file():
        raise FileNotFoundError(f"{folder} holds no {train_state.RUN}; give a folder that `minimuse train --out` made")
    run, lines = train_state.read_run(folder), read_log(folder / "log.jsonl")
    config = checkpoint.read_configuration(folder / train_state.RUN)
    engine = Engine(seed=run["seed"], device=device)
    stages = STAGES[:1] if run.get("model") in ("ar", "dit") else STAGES  # these have no masked transformer
    started = [name for name in stages if train_state.states(folder / name)]
    if not started or stage not in (None, *started):
        known = ", ".join(started) or "none"
        raise ValueError(f"{folder} has no state of {stage or 'any stage'} yet; stages with a state: {known}")
    encoder = TextEncoder(config.text_encoder, max_tokens=config.text_tokens, device=engine.device)
    source = open_source(run["data"], config, seed=run["seed"])
    options = {"device": engine.device, "bf16": engine.bf16, "read_only": True}
    data = TrainingData(folder / "cache", source, config, encoder, **options)
    findings: list[Finding] = []
    for name in started if stage is None else [stage]:
        findings.append(examine_log([line for line in lines if line["stage"] == name], name))
        try:
            findings += _examine_stage(folder, name, config, data, engine)
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
        for text in [finding.message] if known else [finding.message, finding.hint]:
            lines.append(textwrap.fill(text, 110, initial_indent="       ", subsequent_indent="       "))
        explained.add(finding.check)
    look, wrong = (sum(finding.verdict == verdict for finding in findings) for verdict in ("look", "wrong"))
    return "\n".join([*lines, f"{len(findings)} findings, {look} to look at, {wrong} wrong"])


def _examine_stage(
    folder: Path, name: str, config: MuseConfig, data: TrainingData, engine: Engine
) -> Iterator[Finding]:
    """The newest state of a stage, on the data that the run has computed for it."""
    deque(data.read(), maxlen=0)
    if name not in ("base", "superres"):
        factor = config.high_tokenizer.image_size // config.low_tokenizer.image_size if name == "low_tokenizer" else 1
        images = [Decimated(data.split(data.images, held_out), factor) for held_out in (False, True)]
        yield from examine_tokenizer(_load_tokenizer(folder, name, config, engine), *images, engine=engine, stage=name)
        return
    low = published_tokenizer(config) or _load_tokenizer(folder, "low_tokenizer", config, engine)
    deque(data.tokenize("low", low), maxlen=0)
    deque(data.embed(), maxlen=0)
    rows, model = [data.tokens["low"], data.texts], Transformer(config.base)
    if name == "superres":
        deque(data.tokenize("high", _load_tokenizer(folder, "high_tokenizer", config, engine)), maxlen=0)
        rows, model = [data.tokens["high"], data.texts, data.tokens["low"]], SuperRes(config.superres)
    loss = MaskedLoss(model).to(engine.device)
    early = train_state.load_weights(folder / name, loss) < EARLY * config.stages[name].steps
    train, held_out = ([data.split(r, held_out) for r in rows] for held_out in (False, True))
    size = model.mask_id
    yield from examine_transformer(loss, train, held_out, codebook_size=size, engine=engine, stage=name, early=early)


def _load_tokenizer(folder: Path, name: str, config: MuseConfig, engine: Engine) -> VQGAN:
    """The newest state of a tokenizer stage."""
    vqgan = VQGAN(config.finetuned_tokenizer if name == "decoder" else getattr(config, name)).to(engine.device)
    train_state.load_weights(folder / name, vqgan)
    return vqgan
