"""What a run reports: log.jsonl, sample grids, TensorBoard where it is installed, and held-out losses.

    folder/log.jsonl              metrics every ten steps, one JSON object a line: {"stage", "step", "loss", ...}
    folder/samples/base-...png    pictures of the transformers, or reconstructions of the tokenizers, by step

Held-out metrics of a masked transformer, losses in nats a token:
    loss@r       masked cross-entropy with about a fraction r masked. It falls with r, since more context is visible
    unigram      entropy of the token histogram: the loss of a model that knows the frequency of each token and no more
    bound        an upper bound on -log p of all tokens, the mean over uniform counts (`likelihood_bound`)

Not here: what healthy values are (`train_doctor.py`), the progress bar (`cli.py`).
"""

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minimuse.checkpoint import CARD
from minimuse.config import MuseConfig
from minimuse.data_images import to_float
from minimuse.masking import Generators, random_mask, uniforms
from minimuse.muse import Muse
from minimuse.plots import curves, grid
from minimuse.text import pad_contexts
from minimuse.train_engine import Engine, EvalFn, Progress
from minimuse.utils import atomic_write, seeded_generator

EVERY = 10  # steps between two lines of the log
STRATA = 8  # the bound averages over one count of masked tokens from each eighth of 1..N
RATES = (0.1, 0.3, 0.5, 0.7, 0.9)  # the middles of five buckets of mask rates
MAX_TOKENS = 2**16  # Choice: validation reads at most so many tokens, 64 images of 32 x 32, to stay cheap

# --- validation -------------------------------------------------------------------------------------------------------


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode, without gradients. Afterwards each submodule has its own mode again."""
    before = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for m, training in before:
            m.training = training


def unigram_entropy(tokens: Tensor, codebook_size: int) -> float:
    """tokens (n, N) -> entropy of their histogram in nats: the loss of the best guess without any context."""
    p = torch.bincount(tokens.flatten(), minlength=codebook_size).double() / tokens.numel()
    return -torch.special.xlogy(p, p).sum().item()


def codebook_usage(tokens: Tensor, codebook_size: int) -> tuple[float, float]:
    """tokens -> fraction of codes in use (Muse 2.2), perplexity exp(entropy) of their histogram."""
    p = torch.bincount(tokens.flatten(), minlength=codebook_size).double() / tokens.numel()
    return (p > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


def likelihood_bound(
    logits_fn: Callable[[Tensor], Tensor], tokens: Tensor, mask_id: int, generator: Generators = None
) -> Tensor:
    """tokens (B, N) -> (B,): one-sample estimates, in nats per token, of an upper bound on -log p(tokens) / N.

    D3PM's absorbing diffusion: -log p / N <= E over k uniform on 1..N of the mean cross-entropy with exactly k masked.
    The bound does not depend on the training density p(r) (Muse 2.6), which only weights the integrand.
    `logits_fn` maps tokens (B, N) to logits (B, N, V).
    """
    b, n = tokens.shape
    k = (uniforms(b, generator=generator) * n).long() + 1
    masked = random_mask(tokens, k.double() / n, generator)
    logits = logits_fn(tokens.masked_fill(masked, mask_id))
    loss = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")  # (B, N)
    return (loss * masked).sum(1) / masked.sum(1)


def validate(
    loss: Callable[..., tuple[Tensor, Tensor]],
    tokens: Any,
    texts: Any,
    low_tokens: Any = None,
    *,
    codebook_size: int,
    engine: Engine | None = None,
    most: int = 256,
    batch: int = 64,
    strata: int = STRATA,
) -> dict[str, float]:
    """Held-out examples -> {"loss@0.1": ..., ..., "accuracy@0.9": ..., "bound": ..., "unigram": ...}.

    loss: a `train.MaskedLoss`, wrapped by an engine or not. The masks depend only on the index of the example, so two
    results differ only by the model. Each example's first caption is read. strata=0 leaves out the bound.
    """
    engine = engine or Engine()
    n = min(most, len(tokens), max(1, MAX_TOKENS // tokens[torch.arange(1)].shape[1]))
    totals: dict[str, float] = {}
    for start in range(0, n, batch):
        at = torch.arange(start, min(start + batch, n))
        x = tokens[at]
        low = None if low_tokens is None else low_tokens[at].to(engine.device)
        captions = [text.float() for text in texts.pick(at, [0.0] * len(at))]
        context = pad_contexts(captions).to(engine.device)
        for names, masked in _masks(x, at, strata):
            with eval_mode(loss), engine.precision():
                values = loss(x.to(engine.device), masked.to(engine.device), context, low, int(masked.sum()))
            for name, value in zip(names, values, strict=False):
                totals[name] = totals.get(name, 0.0) + float(value) * len(at) / n
    bounds = [totals.pop(f"bound{k}") for k in range(strata)]
    metrics = totals | ({"bound": sum(bounds) / strata} if strata else {})
    return metrics | {"unigram": unigram_entropy(tokens[torch.arange(n)], codebook_size)}


def _masks(x: Tensor, at: Tensor, strata: int) -> Iterator[tuple[list[str], Tensor]]:
    """Tokens (B, N) of the examples `at` -> names of the metrics under a mask, and the mask (B, N).

    For the bound all rows of a batch have the same count of masked tokens, one count from each stratum of 1..N. Then
    the mean over all masked tokens is the mean over the rows, and the bound is its mean over uniform counts.
    """
    n = x.shape[1]
    for k, rate in enumerate(RATES):
        generators = [seeded_generator(k, i) for i in at.tolist()]
        rates = torch.stack([rate + 0.2 * (torch.rand((), generator=g) - 0.5) for g in generators])
        yield [f"loss@{rate}", f"accuracy@{rate}"], random_mask(x, rates, generators)
    for k in range(strata):
        generators = [seeded_generator(len(RATES) + k, i) for i in at.tolist()]
        u = torch.rand((), generator=generators[0]).item()
        count = min(n, int((k + u) / strata * n) + 1)
        rates = torch.full((len(x),), count / n, dtype=torch.double)  # float32 would round some counts up
        yield [f"bound{k}"], random_mask(x, rates, generators)


# --- the log ----------------------------------------------------------------------------------------------------------


class TrainLog:
    """The log of one run. Without `engine.folder` nothing is written, but validation is still part of the metrics."""

    def __init__(self, config: MuseConfig, engine: Engine):
        self.config, self.engine = config, engine
        self.folder = engine.folder if engine.is_main else None
        self.board: Any = None
        self.last = ("", 0, time.perf_counter())
        with suppress(ImportError):  # TensorBoard is optional
            from torch.utils.tensorboard import SummaryWriter

            self.board = self.folder and SummaryWriter(str(self.folder / "tensorboard"))

    def __call__(self, p: Progress) -> dict[str, float]:
        """A Progress -> its metrics with the speed. Every tenth, and those with validation, go into the log."""
        stage, step, then = self.last
        now, metrics = time.perf_counter(), dict(p.metrics)
        self.last = (p.stage, p.step, now)
        if p.stage not in self.config.stages:
            return metrics
        if stage != p.stage:
            if self.folder:  # the first Progress of a resumed stage has no metrics
                self._forget(p.stage, p.step - bool(metrics))
        elif metrics:
            config, low = self.config, stage in ("low_tokenizer", "base")
            tokens = config.stages[stage].batch * (config.low_tokenizer if low else config.high_tokenizer).grid ** 2
            metrics["tokens_per_s"] = tokens * (p.step - step) / (now - then)
        due = p.step % EVERY == 0 or p.step == p.steps or any(k.startswith("held_out") for k in metrics)
        if self.folder and metrics and due:
            line = {"stage": p.stage, "step": p.step, **{k: round(v, 5) for k, v in metrics.items()}}
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for key, value in metrics.items() if self.board else ():
                self.board.add_scalar(f"{p.stage}/{key}", value, p.step)
        return metrics

    def _forget(self, stage: str, step: int) -> None:
        """Drop the lines of steps that a resumed run does again, and a half-written last line."""
        path = self.folder / "log.jsonl"
        kept = [line for line in read_log(path) if line["stage"] != stage or line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            atomic_write(path, text)

    # --- what a stage shows of its model ------------------------------------------------------------------------------

    def tokenizer(self, stage: str, images: Any) -> EvalFn:
        """-> a function that returns the PSNR of eight held-out images and saves a picture of them."""

        def eval_fn(model: nn.Module, step: int) -> dict[str, float]:
            x = to_float(images[range(min(8, len(images)))]).to(self.engine.device)
            with eval_mode(model), self.engine.precision():
                made = model.decode(model.encode(x)).float()
            self._save(stage, step, lambda: grid(torch.cat([x, made]), columns=len(x)))
            return {"held_out_psnr": float(-10 * ((x - made).square().mean() / 4).log10())}

        return eval_fn

    def transformer(self, stage: str, data: Any, parts: nn.ModuleDict) -> EvalFn:
        """-> a function that returns held-out losses, and saves pictures of fixed prompts and seeds."""
        prompts, rows = data.words()["examples"], [data.tokens["low"], data.texts]
        if stage == "superres":
            rows = [data.tokens["high"], data.texts, data.tokens["low"]]
        held_out = [data.split(r, held_out=True) for r in rows]
        size = getattr(self.config, stage).codebook_size

        def draw() -> list[Image.Image]:  # before super-resolution is trained, at low resolution
            muse = Muse(self.config, parts, data.encoder).to(self.engine.device)
            if stage != "base":
                return muse.generate(prompts, seed=0)
            *_, last = muse.decode_base(muse.jobs(prompts, seed=0))
            return muse.picture(last)

        def eval_fn(loss: nn.Module, step: int) -> dict[str, float]:
            metrics = validate(loss, *held_out, codebook_size=size, engine=self.engine)
            self._samples(stage, step, parts, prompts, draw)
            return {f"held_out_{key}": value for key, value in metrics.items()}

        return eval_fn

    def samples_of(self, model: Any) -> EvalFn:
        """-> a function that saves what a model with `parts`, `examples` and `generate` draws at low resolution."""

        def eval_fn(loss: nn.Module, step: int) -> dict[str, float]:
            self._samples("base", step, model.parts, model.examples, lambda: model.generate(model.examples, seed=0))
            return {}

        return eval_fn

    def _samples(self, stage: str, step: int, parts: nn.ModuleDict, prompts: list[str], draw: Callable) -> None:
        """Save what the networks in training draw for the prompts."""
        if (
            self.folder and not self.engine.accelerator.is_fsdp2
        ):  # drawing with a sharded model would need all processes
            with eval_mode(parts), self.engine.precision():
                images = draw()
            self._save(stage, step, lambda: grid(images, prompts, columns=3))

    def _save(self, stage: str, step: int, make: Callable[[], Image.Image]) -> None:
        if self.folder:
            path = self.folder / "samples" / f"{stage}-{step:07d}.png"
            path.parent.mkdir(exist_ok=True)
            make().save(path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """log.jsonl -> its lines, without a half-written last one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def add_record(folder: Path, config: MuseConfig, source: Any) -> None:
    """Of a finished run: write curves.png, and add to its model card how each stage went and on what machine."""
    log = read_log(folder / "log.jsonl")
    lines = ["", "| Stage | Steps | Training, last lines | Held out |", "|---|---|---|---|"]
    for stage in dict.fromkeys(line["stage"] for line in log):
        rows = [line for line in log if line["stage"] == stage]
        name, held, unit = "loss", "held_out_bound", "nats a token"
        if "psnr" in rows[-1]:
            name, held, unit = "psnr", "held_out_psnr", "dB"
        last = mean(line[name] for line in rows[-10:])
        held_out = "".join([f"{line[held]:.2f} {unit}" for line in rows if held in line][-1:])
        lines.append(f"| {stage} | {config.stages[stage].steps:,} | {last:.2f} {unit} | {held_out} |")
    cpu = f"{os.cpu_count()} cores, {platform.machine()}"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    lines += ["", f"Trained on {machine}, torch {torch.__version__}.", "", "![](curves.png)"]
    with (folder / CARD).open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    curves(log).save(folder / "curves.png")
