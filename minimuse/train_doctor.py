"""Is my loss right? Checks of a run, finished or under way: each finding has a verdict, a number and a hint.

    tokenizers     codebook (dead codes?), pictures (PSNR), pixel range, overfitting, discriminator (has it taken over?)
    transformers   context (loss by mask rate, and bound), leakage, text and low tokens (ignored?), overfitting
    every stage    trend (of the log)

Verdicts: "fine"; "look" means that a person should look at it; "wrong" needs a repair. Losses are in nats a token.
A message names the set that its number was read on. Nothing of the run is changed or computed anew. Choice: the limits.

`reconstruct` says the same of the tokenizers of a finished Muse and of pictures that it never saw.

Not here: the losses themselves (`train_log.py`), whether pictures show what the prompt asks for (`eval_run.py`).
"""

import math
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from minimuse import checkpoint, train_state
from minimuse.amused import published_tokenizer
from minimuse.config import STAGES, MuseConfig
from minimuse.data_cache import HELD_OUT, Subset, TrainingData
from minimuse.eval_metrics import feature_distance, psnr
from minimuse.eval_networks import Detector, network_input
from minimuse.muse import text_encoder
from minimuse.plots import grid
from minimuse.text import pad_contexts
from minimuse.train import MaskedLoss
from minimuse.train_engine import Engine
from minimuse.train_log import RATES, STRATA, codebook_usage, eval_mode, read_log, set_of, unigram_entropy, validate
from minimuse.transformer import SuperRes, Transformer
from minimuse.utils import area_downsample, seeded_generator, to_float, to_pil, to_uint8
from minimuse.vqgan import VQGAN, draft_tokens

MOST = 128  # examples that a check reads
FEW = 16  # with fewer held-out examples, training examples are checked, and overfitting cannot be seen
EARLY = 0.1  # fraction of a stage's steps before which a transformer may still be untrained
GOOD_PSNR = 30.0  # dB that are enough, however easy the pictures are
SHOWN = 8  # pictures on the sheet of `reconstruct`
GOOD_BOUND = 0.1  # nats a token that are enough, however little the tokens vary
Rows = Sequence[Any]  # columns of n examples: tokens, texts and, for super-resolution, low-resolution tokens

HINTS = {  # what failure looks like, and what to do
    "codebook": "Only a few codes are used. Lower the learning rate, restart dead codes sooner, or lower code_dim.",
    "pictures": "No transformer can draw what the tokenizer loses. Train it on these pictures, longer, or use a "
    "larger width or grid.",
    "pixel range": "A small span: scale the files, such as 12 bits in PNGs of 16. A shift: check that the model gets "
    "pixels of -1 to 1.",
    "discriminator": "It tells originals from reconstructions, and its gradient says no more how to improve. Lower "
    "adversarial_weight or discriminator_width, or raise adversarial_start.",
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
    (_, unseen), (_, known) = (reconstruct(model, x, engine, _name(x)) for x in (held_out, train))
    gap = known[1].number - unseen[1].number
    message = f"The PSNR of training images is {gap:+.1f} dB compared with held-out ones."
    yield from [*unseen, _overfitting(held_out, gap, message, 2, 6)]


def reconstruct(model: Any, images: Any, engine: Engine, name: str) -> tuple[Tensor, list[Finding]]:
    """A tokenizer, images (n, 3, H, W) uint8, "128 pictures" -> reconstructions; codebook, pictures and pixel range.

    Choice: pictures are fine from 30 dB on, or if they are nearer to the originals than copies at a quarter of the side
    by PSNR or by perceptual distance: that of the detector's features, which are no part of a loss.
    """
    n, size = min(MOST, len(images)), model.codebook_size
    perceptual = feature_distance(Detector.from_pretrained().to(engine.device).trunk)
    tokens, made, sums, span = [], [], 0, []
    for at in torch.arange(n).split(16):
        given = images[at].to(engine.device)
        x = to_float(given)
        with eval_mode(model), engine.precision():
            tokens.append(model.encode(x).cpu())
            y = model.decode(tokens[-1].to(x.device)).float()
        made.append(to_uint8(y).cpu())
        small = F.interpolate(F.avg_pool2d(x, 4, ceil_mode=True), x.shape[2:], mode="bilinear")
        errors = [(z - x).square().mean() for z in (y, small, x.mean((2, 3), keepdim=True))]
        far = [perceptual(network_input(given), network_input(to_uint8(z))) for z in (y, small)]
        sums += len(x) / n * torch.stack([*errors, *far, 127.5 * (y - x).mean()])
        span += given.aminmax()
    psnr, coarse, floor = (-10 * (sums[:3].clamp(min=1e-10) / 4).log10()).tolist()
    distance, limit, shift = sums[3:].tolist()
    good = psnr >= min(GOOD_PSNR, coarse) or (psnr > floor and distance <= limit)
    used, perplexity = codebook_usage(torch.cat(tokens), size)
    most = min(size, n * tokens[0].shape[1])
    message = f"{used:.0%} of {size} codes are used by {name}; the perplexity is {perplexity:.1f}."
    wrong = math.inf if good else -max(2, most / 100)
    found = [_finding("codebook", perplexity, message, -perplexity, -most / 10, wrong)]
    message = f"The PSNR of {name} is {psnr:.1f} dB, the perceptual distance {distance:.3f}. Copies at a quarter of "
    message += f"the side have {coarse:.1f} dB and {limit:.3f}, mean colors {floor:.1f} dB."
    found.append(_finding("pictures", psnr, message, -math.inf if good else floor - psnr, -math.inf, -1))
    bright = int(max(span)) - int(min(span))
    message = f"Pixels of {name} span {bright} of 255. The reconstruction shifts their mean by {shift:+.1f}."
    found.append(_finding("pixel range", shift, message, abs(shift), 32 if bright >= 128 else -1, 64))
    return torch.cat(made), found


def compare_tokenizers(muse: Any, images: Tensor) -> tuple[Image.Image, str]:
    """A Muse in float32, pictures (n, 3, S, S) uint8 of its size -> originals next to reconstructions, and advice."""
    engine, side = Engine(device=muse.device), images.shape[-1]
    cells, findings = [[(image, "original") for image in to_pil(images[:SHOWN])]], []
    for name in [name for name in muse.parts if "tokenizer" in name]:
        size = getattr(muse.config, name).image_size
        small = area_downsample(images, side // size)
        made, found = reconstruct(muse.parts[name], small, engine, f"{min(MOST, len(images))} pictures at {size} px")
        findings += [finding._replace(stage=name) for finding in found]
        shown = [image.resize((side, side), Image.Resampling.NEAREST) for image in to_pil(made[:SHOWN])]
        texts = [f"{name.split('_')[0]}, {x:.1f} dB" for x in psnr(small[:SHOWN], made[:SHOWN])]
        cells.append(list(zip(shown, texts, strict=True)))
    pictures, captions = zip(*chain(*zip(*cells, strict=True)), strict=True)
    good = all(finding.verdict == "fine" for finding in findings if finding.check == "pictures")
    advice = "The tokenizers are good enough for these pictures" if good else "Train tokenizers on pictures like these"
    rule = f"{GOOD_PSNR:.0f} dB, or nearer than copies at a quarter of the side by PSNR or perceptual distance"
    report = f"{findings_text(findings)}\n{advice}. Good enough is: {rule}."
    return grid(pictures, captions, len(cells)), report


def examine_transformer(
    loss: Callable, train: Rows, held_out: Rows, *, codebook_size: int, engine: Engine, early: bool = False
) -> Iterator[Finding]:
    """A `MaskedLoss`, two sets of examples -> findings. `early`, only leakage and overfitting can be "wrong"."""
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
        if check == "text" and not len(captions[0]):
            continue  # a model without captions
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
    """The sum of p = exp(-loss) over up to 256 values of one masked token: at most 1, unless the model sees it."""
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
    """`validate` on up to 8 groups, column `exchange` (0: none) of other images -> metrics (groups,), "loss" too."""
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


def examine_discriminator(lines: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """The log lines of a stage, at least 12 -> has its discriminator taken over? Choice: if its loss is below 0.1."""
    seen = [(line["discriminator_loss"], line["l1"]) for line in lines if {"discriminator_loss", "l1"} <= line.keys()]
    if len(seen) < 12:
        return
    first, *_, last = (part.mean(0) for part in torch.tensor(seen).chunk(4))
    loss, change = last[0].item(), (last[1] / first[1] - 1).item()
    message = f"In the last quarter the discriminator's loss is {loss:.2f}; 1 is chance, below 0.1 it has taken over. "
    message += f"Meanwhile the l1 changed by {change:+.1%}."
    yield _finding("discriminator", loss, message, change if loss < 0.1 else -math.inf, -math.inf, 0.05)


def examine(folder: str | Path, stage: str | None = None, *, device: Any = None) -> list[Finding]:
    """A run's folder -> findings of a stage, or of all that have a state. Only its caches are read."""
    folder = Path(folder)
    run, lines = train_state.read_run(folder), read_log(folder / "log.jsonl")
    config = checkpoint.read_configuration(folder / train_state.RUN)
    engine = Engine(seed=run["seed"], device=device)
    stages = STAGES[:1] if run.get("model") in ("ar", "dit") else STAGES  # these have no masked transformer
    started = [name for name in stages if train_state.states(folder / name)]
    if not started or stage not in (None, *started):
        raise ValueError(f"{folder} has no state of {stage or 'any stage'} yet; stages with a state: {started}")
    encoder = text_encoder(config, engine.device)
    options = {"device": engine.device, "bf16": engine.bf16, "read_only": True}
    data = TrainingData(folder / "cache", SimpleNamespace(**run["data"]), config, encoder, **options)
    findings: list[Finding] = []
    for name in [stage] if stage else started:
        own = [line for line in lines if line["stage"] == name]
        found = [examine_log(own), *examine_discriminator(own)]
        try:
            found += _examine_stage(folder, name, config, data, engine, run.get("start"))
        except (ValueError, OSError) as error:
            found.append(Finding("files", "look", math.nan, f"Not examined: {error}."))
        findings += [finding._replace(stage=name) for finding in found]
    return findings


def _examine_stage(
    folder: Path, name: str, config: MuseConfig, data: TrainingData, engine: Engine, start: str | None
) -> Iterator[Finding]:
    """The newest state of a stage, on the data that the run computed for it. Frozen tokenizers are those of `start`."""

    def tokenizer(name: str) -> VQGAN:
        if start and not config.stages[name].steps:
            return train_state.open_start(None, start)[1].parts[name].to(engine.device)
        grown = name == "decoder" or (start and name == "high_tokenizer")
        vqgan = VQGAN(config.finetuned_tokenizer if grown else getattr(config, name)).to(engine.device)
        train_state.load_weights(folder / name, vqgan)
        return vqgan

    deque(data.read(), maxlen=0)
    if name not in ("base", "superres"):
        sets = (data.columns(name, held_out)[0] for held_out in (False, True))
        yield from examine_tokenizer(tokenizer(name), *sets, engine=engine)
        return
    low = published_tokenizer(config) or tokenizer("low_tokenizer")
    deque(data.tokenize("low", low), maxlen=0)
    deque(data.embed(), maxlen=0)
    model, draft = Transformer(config.base), None
    if name == "superres":
        high = tokenizer("high_tokenizer")
        deque(data.tokenize("high", high), maxlen=0)
        model = SuperRes(config.superres)
        draft = partial(draft_tokens, low, high) if config.superres.draft else None
    loss = MaskedLoss(model, draft).to(engine.device)
    early = train_state.load_weights(folder / name, loss) < EARLY * config.stages[name].steps
    parts = (data.columns(name, held_out) for held_out in (False, True))
    yield from examine_transformer(loss, *parts, codebook_size=model.mask_id, engine=engine, early=early)


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings as text: verdict, stage, check, the number and, unless it is fine, what to do."""
    lines = []
    for check, verdict, _, message, stage in findings:
        text = message if verdict == "fine" else f"{message} {HINTS[check]}"
        lines.append(f"{verdict:5}  {stage}, {check}\n{textwrap.indent(textwrap.fill(text, 103), ' ' * 7)}")
    look, wrong = ([finding.verdict for finding in findings].count(verdict) for verdict in ("look", "wrong"))
    return "\n".join([*lines, f"{len(findings)} findings, {look} to look at, {wrong} wrong"])
