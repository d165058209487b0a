"""What a run reports: log.jsonl, sample grids, held-out losses, and its part of the model card.

    folder/log.jsonl              metrics every ten steps, one JSON object a line: {"stage", "step", "loss", ...}
    folder/samples/base-...png    pictures of the transformers, or reconstructions of the tokenizers, by step

Validation of a masked transformer, losses in nats a token. The names begin with the set: "held_out_", or "training_"
where the data are too few to hold any out.
    loss@r       masked cross-entropy with about a fraction r masked. It falls with r, since more context is visible
    unigram      entropy of the token histogram: the loss of a model that knows the frequency of each token and no more
    bound        an upper bound on -log p of all tokens, the mean over uniform counts (`likelihood_bound`)

Not here: what healthy values are (`train_doctor.py`), the progress bar (`cli.py`).
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minimuse.checkpoint import CARD
from minimuse.config import MuseConfig
from minimuse.data_cache import HELD_OUT
from minimuse.masking import random_mask
from minimuse.muse import Muse
from minimuse.plots import curves, grid
from minimuse.text import pad_contexts
from minimuse.train_engine import Engine, EvalFn, Progress
from minimuse.train_state import read_run
from minimuse.utils import Generators, atomic_write, seeded_generator, to_float, uniforms

EVERY = 10  # steps between two lines of the log
STRATA = 8  # the bound averages over one count of masked tokens from each eighth of 1..N
RATES = (0.1, 0.3, 0.5, 0.7, 0.9)  # the middles of five buckets of mask rates
EVALUATED = ("held_out_", "training_")  # metrics of validation begin so, by the set that they were read on
MAX_TOKENS = 2**16  # Choice: validation reads at most so many tokens, 64 images of 32 x 32, to stay cheap


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """A module in eval mode, without gradients. Afterwards each submodule has its own mode again."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in before:
            part.training = training


def codebook_usage(tokens: Tensor, codebook_size: int) -> tuple[float, float]:
    """tokens -> fraction of codes in use (Muse 2.2), perplexity exp(entropy) of their histogram."""
    p = torch.bincount(tokens.flatten(), minlength=codebook_size).double() / tokens.numel()
    return (p > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


def unigram_entropy(tokens: Tensor, codebook_size: int) -> float:
    """tokens -> entropy of their histogram in nats: the loss of the best guess without any context."""
    return math.log(codebook_usage(tokens, codebook_size)[1])


def likelihood_bound(
    logits_fn: Callable[[Tensor], Tensor], tokens: Tensor, mask_id: int, generator: Generators = None
) -> Tensor:
    """tokens (B, N) -> (B,): one-sample estimates, in nats per token, of an upper bound on -log p(tokens) / N.

    D3PM's absorbing diffusion: -log p / N <= E over k uniform on 1..N of the mean cross-entropy with exactly k masked.
    The bound does not depend on the training density p(r) (Muse 2.6). Training's mean over tokens weights r by r p(r).
    """
    b, n = tokens.shape
    k = (uniforms(b, generator=generator) * n).long() + 1
    masked = random_mask(tokens, k.double() / n, generator)
    logits = logits_fn(tokens.masked_fill(masked, mask_id))  # (B, N, V)
    loss = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")  # (B, N)
    return (loss * masked).sum(1) / masked.sum(1)


def validate(
    loss: Callable[..., tuple[Tensor, Tensor]], tokens: Any, texts: Any, low_tokens: Any = None, *,
    codebook_size: int, engine: Engine, most: int = 256, batch: int = 64, strata: int = STRATA,
) -> dict[str, float]:  # fmt: skip
    """Examples -> {"loss@0.1": ..., ..., "accuracy@0.9": ..., "bound": ..., "unigram": ...}.

    loss: a `train.MaskedLoss`, wrapped by an engine or not. The masks depend only on the index of the example, so two
    results differ only by the model. Each example's first caption is read. strata=0 leaves out the bound.
    """
    n = min(most, len(tokens), max(1, MAX_TOKENS // tokens[torch.arange(1)].shape[1]))
    metrics = dict.fromkeys(["bound"] if strata else [], 0.0)
    for at in torch.arange(n).split(batch):
        x = tokens[at]
        low = None if low_tokens is None else low_tokens[at].to(engine.device)
        context = pad_contexts([text.float() for text in texts.pick(at, [0.0] * len(at))]).to(engine.device)
        for names, masked in _masks(x, at, strata):
            with eval_mode(loss), engine.precision():
                values = loss(x.to(engine.device), masked.to(engine.device), context, low, int(masked.sum()))
            for name, value in zip(names, values, strict=False):
                each = float(value) * len(at) / n
                metrics[name] = metrics.get(name, 0.0) + (each / strata if name == "bound" else each)
    return metrics | {"unigram": unigram_entropy(tokens[torch.arange(n)], codebook_size)}


def _masks(x: Tensor, at: Tensor, strata: int) -> Iterator[tuple[list[str], Tensor]]:
    """Tokens (B, N) of the examples `at` -> names of the metrics under a mask, and the mask (B, N).

    For the bound all rows have the same count of masked tokens, one count from each stratum of 1..N: the mean over
    masked tokens is then the mean over rows, and the bound is its mean over uniform counts.
    """
    n = x.shape[1]
    for k in range(len(RATES) + strata):
        generators = [seeded_generator(k, i) for i in at.tolist()]
        u = torch.stack([torch.rand((), generator=g) for g in generators]).double()
        if k < len(RATES):
            yield [f"loss@{RATES[k]}", f"accuracy@{RATES[k]}"], random_mask(x, RATES[k] + 0.2 * (u - 0.5), generators)
        else:
            count = min(n, int((k - len(RATES) + u[0]) / strata * n) + 1)
            yield ["bound"], random_mask(x, torch.full_like(u, count / n), generators)


class TrainLog:
    """The log of one run. Without `engine.folder` nothing is written, but validation is still part of the metrics."""

    def __init__(self, config: MuseConfig, engine: Engine):
        self.config, self.engine = config, engine
        self.folder = engine.folder if engine.is_main else None
        self.last = ("", 0, 0.0)  # stage, step, time

    def __call__(self, p: Progress) -> dict[str, float]:
        """A Progress -> its metrics with the speed. Every tenth, and those with validation, go into the log."""
        stage, step, then = self.last
        now, metrics = time.perf_counter(), dict(p.metrics)
        self.last = (p.stage, p.step, now)
        if p.stage not in self.config.stages:
            return metrics
        path = self.folder and self.folder / "log.jsonl"
        if stage != p.stage and path and path.exists():
            # drop the lines of steps that a resumed run does again, and a half-written last line
            done = p.step - bool(metrics)  # the first Progress of a resumed stage has no metrics
            kept = [line for line in read_log(path) if line["stage"] != p.stage or line["step"] <= done]
            atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
        elif stage == p.stage and metrics:
            metrics["images_per_s"] = self.config.stages[stage].batch * (p.step - step) / (now - then)
        due = p.step % EVERY == 0 or p.step == p.steps or any(key.startswith(EVALUATED) for key in metrics)
        if path and metrics and due:
            line = {"stage": p.stage, "step": p.step, **{k: round(v, 5) for k, v in metrics.items()}}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return metrics

    def tokenizer(self, stage: str, images: Any) -> EvalFn:
        """-> a function that returns the PSNR of the first eight images and saves a picture of them."""

        def eval_fn(model: nn.Module, step: int) -> dict[str, float]:
            x = to_float(images[range(min(8, len(images)))]).to(self.engine.device)
            with eval_mode(model), self.engine.precision():
                made = model.decode(model.encode(x)).float()
            self._save(stage, step, torch.cat([x, made]), columns=len(x))
            return {f"{set_of(images)}_psnr": float(-10 * ((x - made).square().mean() / 4).log10())}

        return eval_fn

    def transformer(self, stage: str, data: Any, parts: nn.ModuleDict) -> EvalFn:
        """-> a function that returns validation losses, and saves pictures of fixed prompts and seeds."""
        rows = data.columns(stage, held_out=True)
        size, prompts = getattr(self.config, stage).codebook_size, data.words()["examples"]

        def draw() -> list[Image.Image]:  # before super-resolution is trained, at low resolution
            muse = Muse(self.config, parts, data.encoder).to(self.engine.device)
            if stage != "base":
                return muse.generate(prompts, seed=0)
            *_, last = muse.decode_base(muse.jobs(prompts, seed=0))
            return muse.picture(last)

        save_samples = self.samples(stage, parts, prompts, draw)

        def eval_fn(loss: nn.Module, step: int) -> dict[str, float]:
            metrics = validate(loss, *rows, codebook_size=size, engine=self.engine)
            return {f"{set_of(rows[0])}_{key}": value for key, value in metrics.items()} | save_samples(loss, step)

        return eval_fn

    def samples(self, stage: str, parts: nn.ModuleDict, prompts: list[str], draw: Callable[[], list]) -> EvalFn:
        """-> a function that saves the pictures that `draw` makes of the prompts with the networks in training."""

        def eval_fn(model: Any, step: int) -> dict[str, float]:
            if self.folder and not self.engine.accelerator.is_fsdp2:  # a sharded model would need all processes
                with eval_mode(parts), self.engine.precision():
                    images = draw()
                self._save(stage, step, images, prompts, columns=3)
            return {}

        return eval_fn

    def _save(self, stage: str, step: int, images: Any, captions: Any = None, *, columns: int) -> None:
        if self.folder:
            (self.folder / "samples").mkdir(exist_ok=True)
            grid(images, captions, columns=columns).save(self.folder / "samples" / f"{stage}-{step:07d}.png")


def set_of(rows: Any) -> str:
    """Which set metrics on these rows are read on, "held_out" or "training": the beginning of their names."""
    return "held_out" if getattr(rows, "held_out", True) else "training"


def read_log(path: Path) -> list[dict[str, Any]]:
    """log.jsonl -> its lines, without damaged ones, such as a half-written last one."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            line = json.loads(text)
            kinds = {key: str if key == "stage" else int | float for key in line.keys() | {"stage", "step"}}
            if all(isinstance(line.get(key), kind) for key, kind in kinds.items()):
                lines.append(line)
    return lines


def add_record(folder: Path, pictures: int, captions: int) -> None:
    """Of a finished run: write curves.png, and add to its model card what it read, how it went, on what machine."""
    source = read_run(folder)["data"]["source"]
    source = Path(source).name if os.path.isabs(source) else source  # the card may be published: no home folder
    split = f"Every {HELD_OUT}th picture is held out" if pictures >= HELD_OUT else "Nothing is held out"
    cpu = f"{os.cpu_count()} cores, {platform.machine()}"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    text = (folder / CARD).read_text(encoding="utf-8")
    text += f"\nData: {pictures:,} pictures with {captions:,} captions, from {source}. {split} for validation.\n"
    text += f"\nTrained on {machine}, torch {torch.__version__}.\n\n![training and validation](curves.png)\n"
    curves(read_log(folder / "log.jsonl")).save(folder / "curves.png")
    atomic_write(folder / CARD, text)
