"""Is my loss right? Checks of a run, finished or under way: each finding has a verdict, a number and a hint.

    tokenizers     codebook (collapsed?), pictures (PSNR), overfitting
    transformers   context (loss by mask rate, and bound), leakage, text and low tokens (ignored?), overfitting
    every stage    trend (of the log)

Verdicts: "fine"; "look" means that a person should look at it; "wrong" needs a repair. Losses are in nats a token.
A message names the set that its number was read on. Nothing of the run is changed or computed anew. Choice: the limits.

Not here: the losses themselves (`train_log.py`), whether pictures show what the prompt asks for (`eval_run.py`).
"""

import math
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimuse import checkpoint, train_state
from minimuse.amused import published_tokenizer
from minimuse.config import STAGES, MuseConfig
from minimuse.data_cache import HELD_OUT, Decimated, Subset, TrainingData
from minimuse.text import TextEncoder, pad_contexts
from minimuse.train import MaskedLoss
from minimuse.train_engine import Engine
from minimuse.train_log import RATES, STRATA, codebook_usage, eval_mode, read_log, set_of, unigram_entropy, validate
from minimuse.transformer import SuperRes, Transformer
from minimuse.utils import seeded_generator, to_float
from minimuse.vqgan import VQGAN

MOST = 128  # examples that a check reads
FEW = 16  # with fewer held-out examples, training examples are checked, and overfitting cannot be seen
EARLY = 0.1  # fraction of a stage's steps before which a transformer may still be untrained
GOOD_PSNR = 30.0  # dB that are enough, however easy the pictures are
GOOD_BOUND = 0.1  # nats a token that are enough, however little the tokens vary
Rows = Sequence[Any]  # columns of n examples: tokens, texts and, for super-resolution, low-resolution tokens

HINTS = {  # what failure looks like, and what to do
    "codebook": "Only a few codes are used. Lower the learning rate, restart dead codes sooner, or lower code_dim.",
    "pictures": "No transformer can draw what the tokenizer loses. Train longer, or use a larger width or grid.",
    "overfitting": "A model that memorizes needs more data or captions, more weight decay or dropout, or fewer steps.",
    "context": "A healthy loss is below the unigram entropy, and falls as fewer tokens are masked. Check the inputs, "
    "or lower the learning rate.",
    "leakage": "A model that sees its targets has a loss near 0, and draws noise. Its input must hold [MASK] at every "
    "target, and the loss must count masked tokens only.",
    "text": "The model ignores its text. Check that captions belong to their images and differ, and cond_drop_prob.",
    "low tokens": "The model ignores them. Check that they belong to the same image, and reach memory().",
    "trend": "A NaN stays. Spikes and a rising loss may recover. Lower the learning rate, or use a longer warm-up.",
    "files": "Wait until the run has computed it, or continue the run: minimuse train --resume.",
}


class Finding(NamedTuple):
    """One result of a check."""

    check: str  # a key of HINTS
    verdict: str  # "fine", "look" or "wrong"
    number: float
    message: str  # the number in a sentence
    stage: str = ""  # such as "base"


def _finding(check: str, number: float, message: str, x: float, look: float, wrong: float) -> Finding:
    """The verdict follows from a value x that should be low, and its two limits. NaN is wrong."""
    return Finding(check, "fine" if x <= look else "look" if x <= wrong else "wrong", number, message)


def _overfitting(held_out: Any, gap: float, message: str, look: float, wrong: float) -> Finding:
    """The finding about the gap between training and held-out examples, if enough are held out."""
    n = len(held_out) if set_of(held_out) == "held_out" else 0
    if n >= FEW:
        return _finding("overfitting", gap, message, gap, look, wrong)
    few = f"Only {n} examples are held out" if n else f"Nothing is held out (of fewer than {HELD_OUT} examples)"
    return Finding("overfitting", "look", math.nan, f"{few}, so overfitting could not be seen.")


def _name(rows: Any) -> str:
    return f"{min(MOST, len(rows))} {set_of(rows).replace('_', '-')} examples"


def examine_tokenizer(model: VQGAN, train: Any, held_out: Any, *, engine: Engine) -> Iterator[Finding]:
    """A tokenizer, training and held-out images (n, 3, H, W) uint8 -> its findings."""
    tokens, psnr, floor = _reconstruct(model, held_out, engine)
    train_tokens, train_psnr, _ = _reconstruct(model, train, engine)
    size, good = model.codebook_size, psnr >= GOOD_PSNR
    used, perplexity = codebook_usage(torch.cat([tokens, train_tokens]), size)
    message = f"{used:.0%} of {size} codes are used by {_name(held_out)} and {min(MOST, len(train))} training ones; "
    message += f"the perplexity is {perplexity:.1f}."
    yield _finding("codebook", perplexity, message, -perplexity, -size / 10, math.inf if good else -max(2, size / 100))
    message = f"The PSNR of {_name(held_out)} is {psnr:.1f} dB; that of their mean colors is {floor:.1f} dB."
    yield _finding("pictures", psnr, message, -math.inf if good else floor - psnr, -6, -1)
    message = f"The PSNR of training images is {train_psnr - psnr:+.1f} dB compared with held-out ones."
    yield _overfitting(held_out, train_psnr - psnr, message, 2, 6)


def _reconstruct(model: VQGAN, images: Any, engine: Engine) -> tuple[Tensor, float, float]:
    """-> tokens, PSNR of the reconstructions, PSNR of each image's mean color."""
    tokens, errors = [], []
    for at in torch.arange(min(MOST, len(images))).split(16):
        x = to_float(images[at]).to(engine.device)
        with eval_mode(model), engine.precision():
            tokens.append(model.encode(x).cpu())
            made = model.decode(tokens[-1].to(x.device)).float()
        errors.append(torch.stack([(made - x).square().mean((1, 2, 3)), x.var((2, 3), correction=0).mean(1)]).cpu())
    psnr, floor = (10 * (4 / torch.cat(errors, 1).mean(1).clamp(min=1e-10)).log10()).tolist()
    return torch.cat(tokens), psnr, floor


def examine_transformer(
    loss: Callable, train: Rows, held_out: Rows, *, codebook_size: int, engine: Engine, early: bool = False
) -> Iterator[Finding]:
    """A `MaskedLoss`, training and held-out examples -> its findings.

    early: the model may still be untrained, so only leakage and overfitting are "wrong".
    """
    rows = held_out if len(held_out[0]) >= FEW else train
    measure, slack = partial(_metrics, loss, codebook_size, engine), math.inf if early else 0.0
    own, tokens, seen = measure(rows), rows[0][torch.arange(min(4096, len(rows[0])))], _name(rows[0])
    entropy = unigram_entropy(tokens, codebook_size)
    floor = max(entropy, GOOD_BOUND)
    rates = {rate: own[f"loss@{rate}"].mean().item() for rate in RATES}
    bound = own["bound"].mean().item()
    message = f"The loss of {seen} is {', '.join(f'{x:.2f} at mask rate {rate:.0%}' for rate, x in rates.items())}. "
    message += f"-log p is at most {bound:.2f}; the unigram entropy is {entropy:.2f}."
    flat = not rates[RATES[0]] <= 0.97 * floor
    yield _finding("context", bound, message, max(bound / floor, 2.0 * flat), 0.97, 1.05 + slack)
    yield _leakage(loss, rows, codebook_size, engine)
    captions = rows[1].pick(torch.arange(MOST) % len(rows[0]), [0.0] * MOST)
    same = all(a.equal(b) for a, b in pairwise(captions))
    for column, (check, fraction) in enumerate([("text", 0.005), ("low tokens", 0.05)][: len(rows) - 1], 1):
        cost, error = _mean(measure(rows, exchange=column)["loss"] - own["loss"])
        low, high = sorted([fraction * floor, max(2 * error, 1e-6)])
        message = f"With the {check} of another image the loss of {seen} changes by {cost:+.3f} ± {error:.3f}; "
        message += f"less than {fraction * floor:.3f} would be little."
        if check == "text" and same:
            message, low = f"All captions of {seen} are the same.", -math.inf
        yield _finding(check, cost, message, -cost, -high, slack - low)
    (known, known_error), (fresh, fresh_error) = _mean(measure(train)["loss"]), _mean(own["loss"])
    gap, unsure = fresh - known, 2 * math.hypot(known_error, fresh_error)
    message = f"Held-out examples cost {gap:+.3f} more than training ones, {gap / floor:.1%} of the unigram entropy."
    yield _overfitting(held_out[0], gap, message, max(0.05 * floor, unsure), max(0.2 * floor, unsure))


def _leakage(loss: Callable, rows: Rows, size: int, engine: Engine) -> Finding:
    """Sum p = exp(-loss) of one masked token over up to 256 of its values.

    Over all values the sum is 1, over some at most 1, unless the model sees the value.
    """
    first = torch.tensor([0])
    x = rows[0][first].to(engine.device)
    context = pad_contexts([text.float() for text in rows[1].pick(first, [0.0])]).to(engine.device)
    low = rows[2][first].to(engine.device) if len(rows) > 2 else None
    masked = torch.zeros_like(x, dtype=torch.bool)
    masked[0, x.shape[1] // 2] = True
    values, total = torch.randperm(size, generator=seeded_generator(size))[:256].tolist(), 0.0
    for value in values:
        with eval_mode(loss), engine.precision():
            total += math.exp(-float(loss(x.masked_fill(masked, value), masked, context, low, 1)[0]))
    message = f"The probabilities of {len(values)} of {size} values of a masked token add up to {total:.2f} "
    message += f"in the first of {_name(rows[0])}."
    error = abs(total - 1) if len(values) == size else total - 1
    return _finding("leakage", total, message, error, 0.05, 0.05)


def _metrics(loss: Callable, size: int, engine: Engine, rows: Rows, exchange: int = 0) -> dict[str, Tensor]:
    """`validate` on up to 8 groups of examples -> its metrics, (groups,) each, and "loss", the mean over mask rates.

    Column `exchange` of the rows, unless it is 0, is that of another image.
    """
    n, found = min(MOST, len(rows[0])), []
    for at in torch.arange(n).chunk(max(1, min(8, n // 2))):
        shift = len(at) // 2 | 1  # odd, since the captions of a made-up set repeat with an even period
        group = [Subset(r, at.roll(shift) if exchange == i > 0 else at) for i, r in enumerate(rows)]
        found.append(validate(loss, *group, codebook_size=size, engine=engine, strata=0 if exchange else STRATA))
    metrics = {key: torch.tensor([each[key] for each in found]) for key in found[0]}
    return metrics | {"loss": torch.stack([metrics[f"loss@{rate}"] for rate in RATES]).mean(0)}


def _mean(each: Tensor) -> tuple[float, float]:
    """-> mean, and its standard error."""
    return each.mean().item(), each.std().item() / math.sqrt(len(each)) if len(each) > 1 else 0.0


def examine_log(lines: Sequence[dict[str, Any]]) -> Finding:
    """The log lines of a stage -> is its loss (for tokenizers l1) finite, without spikes, and not rising?"""
    for line in lines:
        if bad := [k for k, v in line.items() if k != "stage" and not math.isfinite(v)]:
            return Finding("trend", "wrong", math.nan, f"{', '.join(bad)}: NaN or infinite at step {line['step']}.")
    key = "l1" if any("l1" in line for line in lines) else "loss"
    values = torch.tensor([line[key] for line in lines if key in line])
    if len(values) < 12:
        return Finding("trend", "look", math.nan, f"{len(values)} lines in the log, too few for a trend.")
    *_, third, last = values.chunk(4)
    change = (last.mean() / third.mean() - 1).item()
    spikes = int((values[10:] > 3 * values.unfold(0, 10, 1)[:-1].median(1).values).sum())
    message = f"In the last quarter the {key} of training batches changed by {change:+.1%}. {spikes} of {len(values)} "
    message += "lines are spikes, above 3 times the median of the ten before."
    return _finding("trend", change, message, math.inf if spikes else change, 0.05, math.inf)


def examine(folder: str | Path, stage: str | None = None, *, device: Any = None) -> list[Finding]:
    """The folder of a run -> the findings of one stage, or of all that have a state. Only its caches are read.

    FileNotFoundError if there is no run, ValueError if there is no state.
    """
    folder = Path(folder)
    run, lines = train_state.read_run(folder), read_log(folder / "log.jsonl")
    config = checkpoint.read_configuration(folder / train_state.RUN)
    engine = Engine(seed=run["seed"], device=device)
    stages = STAGES[:1] if run.get("model") in ("ar", "dit") else STAGES  # these have no masked transformer
    started = [name for name in stages if train_state.states(folder / name)]
    if not started or stage not in (None, *started):
        raise ValueError(f"{folder} has no state of {stage or 'any stage'} yet; stages with a state: {started}")
    encoder = TextEncoder(config.text_encoder, max_tokens=config.text_tokens, device=engine.device)
    options = {"device": engine.device, "bf16": engine.bf16, "read_only": True}
    data = TrainingData(folder / "cache", SimpleNamespace(**run["data"]), config, encoder, **options)
    findings: list[Finding] = []
    for name in [stage] if stage else started:
        found = [examine_log([line for line in lines if line["stage"] == name])]
        try:
            found += _examine_stage(folder, name, config, data, engine)
        except (ValueError, OSError) as error:
            found.append(Finding("files", "look", math.nan, f"Not examined: {error}."))
        findings += [finding._replace(stage=name) for finding in found]
    return findings


def _examine_stage(
    folder: Path, name: str, config: MuseConfig, data: TrainingData, engine: Engine
) -> Iterator[Finding]:
    """The newest state of a stage, on the data that the run has computed for it."""

    def tokenizer(name: str) -> VQGAN:
        sizes = config.finetuned_tokenizer if name == "decoder" else getattr(config, name)
        vqgan = VQGAN(sizes).to(engine.device)
        train_state.load_weights(folder / name, vqgan)
        return vqgan

    deque(data.read(), maxlen=0)
    if name not in ("base", "superres"):
        factor = config.high_tokenizer.image_size // config.low_tokenizer.image_size if name == "low_tokenizer" else 1
        sets = [data.split(Decimated(data.images, factor), held_out) for held_out in (False, True)]
        yield from examine_tokenizer(tokenizer(name), *sets, engine=engine)
        return
    deque(data.tokenize("low", published_tokenizer(config) or tokenizer("low_tokenizer")), maxlen=0)
    deque(data.embed(), maxlen=0)
    rows, model = [data.tokens["low"], data.texts], Transformer(config.base)
    if name == "superres":
        deque(data.tokenize("high", tokenizer("high_tokenizer")), maxlen=0)
        rows, model = [data.tokens["high"], data.texts, data.tokens["low"]], SuperRes(config.superres)
    loss = MaskedLoss(model).to(engine.device)
    early = train_state.load_weights(folder / name, loss) < EARLY * config.stages[name].steps
    parts = ([data.split(r, held_out) for r in rows] for held_out in (False, True))
    yield from examine_transformer(loss, *parts, codebook_size=model.mask_id, engine=engine, early=early)


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings as text: verdict, stage, check, the number and, unless it is fine, what to do."""
    lines = []
    for check, verdict, _, message, stage in findings:
        text = message if verdict == "fine" else f"{message} {HINTS[check]}"
        lines.append(f"{verdict:5}  {stage}, {check}\n{textwrap.indent(textwrap.fill(text, 103), ' ' * 7)}")
    look, wrong = ([finding.verdict for finding in findings].count(verdict) for verdict in ("look", "wrong"))
    return "\n".join([*lines, f"{len(findings)} findings, {look} to look at, {wrong} wrong"])
