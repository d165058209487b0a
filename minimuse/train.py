"""Training: the five stages of Muse as generators (Muse 3, A.1 to A.3).

    low tokenizer -> base -> high tokenizer -> super-resolution -> decoder fine-tuning

Each stage yields a `Progress` after every step, so a notebook can plot or stop it: `*_, last = train_transformer(...)`.
While a transformer trains, tokenizers and language model are frozen: images and captions are encoded once.

Not here: processes, precision, optimizers, saved states (`train_engine.py`), data on disk (`data_cache.py`).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse import train_engine, vqgan_loss
from minimuse.amused import published_tokenizer
from minimuse.cfg import drop_text
from minimuse.config import MuseConfig, StageConfig
from minimuse.data_cache import TrainingData
from minimuse.data_sources import Source, open_source
from minimuse.eval_networks import perceptual_distance
from minimuse.masking import masked_counts, masked_cross_entropy, random_mask, sample_mask_rate
from minimuse.muse import Muse, build, text_encoder
from minimuse.text import Context, pad_contexts
from minimuse.train_engine import Engine, EvalFn, Progress, Stage
from minimuse.train_log import TrainLog, codebook_usage
from minimuse.train_state import open_start, starting_parts
from minimuse.transformer import Transformer
from minimuse.utils import seeded_generator, to_float
from minimuse.vqgan import VQGAN, Quantized, draft_tokens
from minimuse.vqgan_loss import Perceptual, VQGANLoss, Weight, adaptive_weight

Draft = Callable[[Tensor], Tensor]  # low tokens (B, N_low) -> high tokens (B, N)


def random_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """images (B, 3, H, W) -> the same random square of all of them, (B, 3, size, size). Size 0 keeps whole images."""
    if not size or size >= images.shape[-1]:
        return images
    top, left = torch.randint(images.shape[-1] - size + 1, (2,), generator=generator).tolist()
    return images[:, :, top : top + size, left : left + size]


def train_tokenizer(
    vqgan: VQGAN, config: StageConfig, images: Any, *, stage: str = "tokenizer",
    perceptual: Perceptual | None = None, engine: Engine | None = None, eval_fn: EvalFn | None = None,
) -> Iterator[Progress]:  # fmt: skip
    """Train a VQGAN (Muse 2.2), or only its decoder where encoder and codebook are frozen (2.5).

    images: a tensor (n, 3, H, W) uint8, or any object with a length that returns such tensors for indices.
    """
    engine = engine or Engine()
    for part in (vqgan.encoder, vqgan.quantizer, vqgan.decoder):
        part.train(any(p.requires_grad for p in part.parameters()))
    torch.manual_seed(engine.seed)
    weights = (config.perceptual_weight, config.adversarial_weight)
    losses = VQGANLoss(perceptual, *weights, config.adversarial_start, config.discriminator_width)
    for module in (vqgan, losses):
        module.to(engine.device, memory_format=torch.channels_last)
    modules = {"model": vqgan} | ({} if losses.discriminator is None else {"discriminator": losses.discriminator})
    idle = vqgan.quantizer.new_idle_counts()
    job = Stage(engine, stage, config, modules, {"idle": idle})
    if job.first:
        yield Progress(stage, job.first, config.steps, {}, vqgan)

    def read(step: int) -> Iterator[Tensor]:
        for at, _ in job.micro_batches(len(images), step):
            x = to_float(random_crop(images[at], config.crop, seeded_generator(engine.seed, step)))
            yield x.to(engine.device).contiguous(memory_format=torch.channels_last)

    for step in job.steps():
        outputs = []
        weight = _step_weight(job, vqgan, losses, read(step), step)
        for x in read(step):
            for shares, quantized in tokenizer_losses(vqgan, losses, x, step, weight, engine.precision):  # noqa: B007
                shares = {name: value / engine.parts for name, value in shares.items()}
                job.backward(next(iter(shares.values())), **shares)
            outputs.append(engine.accelerator.gather((quantized.z, quantized.tokens)))
        z, tokens = (torch.cat(parts) for parts in zip(*outputs, strict=True))  # of the whole batch, in its order
        vqgan.quantizer.restart_dead_codes(z, tokens, idle, seeded_generator(engine.seed, step))
        metrics = job.finish(step)
        metrics["psnr"] = -10 * math.log10(max(metrics.pop("mse"), 1e-10) / 4)
        metrics["used"], metrics["perplexity"] = codebook_usage(tokens, vqgan.codebook_size)
        if eval_fn and (step + 1) % config.eval_every == 0:
            metrics |= eval_fn(vqgan, step + 1)
        yield Progress(stage, step + 1, config.steps, metrics, vqgan)


def tokenizer_losses(
    vqgan: VQGAN, losses: VQGANLoss, x: Tensor, step: int, weight: Weight = adaptive_weight,
    precision: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[tuple[dict[str, Tensor], Quantized]]:  # fmt: skip
    """A micro-batch x (B, 3, H, W) -> the VQGAN's loss and metrics, and after its backward pass the discriminator's."""
    with precision():
        made, quantized = vqgan(x)
        made = made.float()
        loss = losses.generator_loss(x, made, vqgan.decoder.conv_out.weight, step, weight)
    loss = loss + quantized.codebook_loss + vqgan_loss.COMMITMENT * quantized.commitment_loss
    yield {"loss": loss, "l1": F.l1_loss(made, x), "mse": F.mse_loss(made, x)}, quantized
    if losses.active(step):
        with precision():
            loss = losses.discriminator_loss(x, made)
        yield {"discriminator_loss": loss}, quantized


def _step_weight(job: Stage, vqgan: VQGAN, losses: VQGANLoss, batches: Iterator[Tensor], step: int) -> Weight:
    """One lambda for all micro-batches and processes of a step. Micro-batches take one more forward pass for it."""
    found = []

    def weight(gradients: Tensor) -> Tensor:
        found.append(gradients)
        return adaptive_weight(job.engine.accelerator.reduce(gradients, "mean"))

    if job.engine.accumulate == 1 or not losses.active(step):
        return weight
    for x in batches:
        next(tokenizer_losses(vqgan, losses, x, step, weight, job.engine.precision))
    return weight(sum(found) / len(found))


class MaskedLoss(nn.Module):
    """The masked loss (Muse 2.3) as one module, so that DDP, FSDP and torch.compile see the whole forward pass."""

    def __init__(self, model: Transformer, draft: Draft | None = None):
        super().__init__()
        self.model = model
        self.draft = draft

    def forward(
        self, x: Tensor, masked: Tensor, context: Context, low: Tensor | None, count: int, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """x, masked (B, N), texts, low-res tokens -> loss and accuracy, (): sums / `count` masked tokens of a batch."""
        condition = [] if low is None else [low] if self.draft is None else [low, self.draft(low)]
        memory = self.model.memory(context, *condition)
        logits = self.model(x.masked_fill(masked, self.model.mask_id), memory)
        accuracy = ((logits.detach().argmax(-1) == x) & masked).sum() / count
        return masked_cross_entropy(logits, x, masked, label_smoothing, count), accuracy


def train_transformer(
    model: Transformer, config: StageConfig, tokens: Any, texts: Any, *, low_tokens: Any = None,
    draft: Draft | None = None, stage: str = "base", engine: Engine | None = None, eval_fn: EvalFn | None = None,
) -> Iterator[Progress]:  # fmt: skip
    """Masked training of the base (Muse 2.3) or, with `low_tokens`, of the super-resolution transformer (2.4).

    tokens (n, N), low_tokens (n, N_low): tensors, or objects that return such rows. texts: captions (L, D_lm) of each.
    draft: low tokens -> the draft that a super-resolution transformer with `config.draft` reads (`vqgan.draft_tokens`).
    """

    def losses(job: Stage, step: int, at: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        rates = sample_mask_rate(config.batch, schedule=config.mask_schedule, generator=job.generators(step))
        x = tokens[at]
        count = int(masked_counts(rates, x.shape[1]).sum())  # masked tokens of the whole batch
        rates = sample_mask_rate(len(x), schedule=config.mask_schedule, generator=generators)  # Muse 2.6
        masked = random_mask(x, rates, generators)
        context = pick_captions(texts, at, generators, config.cond_drop_prob)
        low = None if low_tokens is None else low_tokens[at].to(job.engine.device)
        inputs = (value.to(job.engine.device) for value in (x, masked, context))
        loss, accuracy = job.modules["model"](*inputs, low, count, config.label_smoothing)
        return {"loss": loss, "accuracy": accuracy}

    loss, options = MaskedLoss(model, draft), {"stage": stage, "engine": engine, "eval_fn": eval_fn}
    return train_network(loss, losses, config, len(tokens), **options)


def train_network(
    loss: nn.Module, losses: Callable[..., dict[str, Tensor]], config: StageConfig, n: int, *,
    stage: str = "base", engine: Engine | None = None, eval_fn: EvalFn | None = None,
) -> Iterator[Progress]:  # fmt: skip
    """The loop of a stage that trains `loss.model` on n examples.

    losses: (stage, step, indices (b,) of a micro-batch, b generators) -> its share of the batch's "loss" and metrics.
    """
    engine = engine or Engine()
    loss.train()
    torch.manual_seed(engine.seed)
    job = Stage(engine, stage, config, {"model": loss}, wrap=True)
    if job.first:
        yield Progress(stage, job.first, config.steps, {}, loss.model)
    for step in job.steps():
        for at, generators in job.micro_batches(n, step):
            with engine.precision():
                shares = losses(job, step, at, generators)
            job.backward(shares["loss"], **shares)
        metrics = job.finish(step)
        if eval_fn and (step + 1) % config.eval_every == 0:
            metrics |= eval_fn(job.modules["model"], step + 1)
        yield Progress(stage, step + 1, config.steps, metrics, loss.model)
    loss.eval()


def pick_captions(texts: Any, at: Tensor, generators: list[torch.Generator], p: float) -> Context:
    """One random caption of each example `at`, chosen by the example's own generator; removed with probability p."""
    u = [torch.rand((), generator=g).item() for g in generators]
    if hasattr(texts, "pick"):
        chosen = texts.pick(at, u)
    else:
        chosen = [texts[i][int(x * len(texts[i]))] for i, x in zip(at.tolist(), u, strict=True)]
    return drop_text(pad_contexts([text.float() for text in chosen]), p, generators)  # Muse 2.7


def train_muse(
    config: MuseConfig | None = None, *, data: str | Path | Source = "scenes", engine: Engine | None = None,
    stages: Any = None, start: str | Path | Muse | None = None,
) -> Iterator[Progress]:  # fmt: skip
    """All five stages -> a Progress a step. The last one's model is the finished Muse.

    data: "scenes", a source, or what `data_sources.open_source` opens: a folder of captioned images, tar shards.
    With `engine.folder` a stopped run is resumed where it was; without, nothing is kept.
    stages: a baseline's, instead of `MuseTrainer.five_stages`.
    start: a Muse to fine-tune, or its name, folder or hub id; `config` None is `train_state.finetuned`.
    """
    engine = engine or Engine()
    config, start = open_start(config, start)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = engine.folder or stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
        trainer = MuseTrainer(config, data, engine, Path(folder), start)
        for progress in (stages or MuseTrainer.five_stages)(trainer):
            yield progress._replace(metrics=trainer.log(progress))
        captions = trainer.data.captions()
    minutes = (time.monotonic() - started) / 60
    done = {"pictures": len(captions), "captions": sum(map(len, captions)), "minutes": minutes}
    yield Progress("done", 1, 1, done, progress.model)


class MuseTrainer:
    """The networks, the data and the log of one run."""

    def __init__(self, config: MuseConfig, data: Any, engine: Engine, folder: Path, start: Muse | None = None):
        engine.check_batches(config.stages)
        torch.manual_seed(engine.seed)
        self.config, self.engine, self.start = config, engine, start
        self.parts = starting_parts(config, start) if start else build(config)
        self.high = self.parts["high_tokenizer"] if start else VQGAN(config.high_tokenizer)
        self.encoder = text_encoder(config, engine.device)
        tokenizing = [s for name, s in config.stages.items() if name not in ("base", "superres")]
        kinds = {s.perceptual for s in tokenizing if s.perceptual_weight and s.steps} - {"none"}
        with engine.accelerator.main_process_first():  # LPIPS downloads its weights
            how = (config.low_tokenizer.image_size, engine.device, engine.seed)
            self.perceptual = {kind: perceptual_distance(kind, *how) for kind in sorted(kinds)}
        source = open_source(data, config, seed=engine.seed) if isinstance(data, str | Path) else data
        self.data = TrainingData(
            folder / "cache", source, config, self.encoder, device=engine.device, bf16=engine.bf16,
            rank=engine.rank, processes=engine.processes, wait=engine.accelerator.wait_for_everyone,
        )  # fmt: skip
        self.log = TrainLog(config, engine)

    def five_stages(self) -> Iterator[Progress]:
        """The stages in order, and before each the data that it reads. The last Progress holds the Muse."""
        config, parts, data = self.config, self.parts, self.data
        yield from self.before_base()
        yield from self.transformer("base", parts["low_tokenizer"].codebook)

        parts["high_tokenizer"] = self.high
        yield from self.tokenizer("high_tokenizer", self.high)
        yield from self.prepare("high tokens", data.tokenize("high", self.high))
        yield from self.transformer("superres", self.high.codebook, parts["low_tokenizer"].codebook)
        torch.manual_seed(self.engine.seed)  # independent of what ran before, as in a resumed run
        parts["high_tokenizer"] = self.high.grow_decoder(config.finetuned_tokenizer)
        yield from self.tokenizer("decoder", parts["high_tokenizer"])
        parts.eval().requires_grad_(False)
        muse = Muse(config, parts, self.encoder, **data.words()).to(self.engine.device, torch.float32)
        muse.words = sorted({*muse.words, *(self.start.words if self.start and config.text_encoder else [])})
        yield Progress("all", 1, 1, {}, muse)

    def before_base(self) -> Iterator[Progress]:
        """The low tokenizer, its tokens and the embeddings of the captions."""
        yield from self.prepare("read images", self.data.read())
        self.parts["low_tokenizer"] = published_tokenizer(self.config) or self.parts["low_tokenizer"]
        if not self.config.low_tokenizer_from:
            yield from self.tokenizer("low_tokenizer", self.parts["low_tokenizer"])
        yield from self.prepare("low tokens", self.data.tokenize("low", self.parts["low_tokenizer"]))
        yield from self.prepare("embed captions", self.data.embed())

    def prepare(self, name: str, work: Iterator[tuple[int, int]]) -> Iterator[Progress]:
        """Work that is done once, as a stage of its own: `work` yields (done, of how many)."""
        for done, total in work:
            self.engine.check_stop()
            yield Progress(name, done, total, {}, self.parts)

    def tokenizer(self, name: str, vqgan: VQGAN) -> Iterator[Progress]:
        """A tokenizer stage: the low tokenizer sees the downsampled images."""
        eval_fn = self.log.tokenizer(name, *self.data.columns(name, held_out=True))
        config = self.config.stages[name]
        options = {"engine": self.engine, "eval_fn": eval_fn, "perceptual": self.perceptual.get(config.perceptual)}
        return train_tokenizer(vqgan, config, *self.data.columns(name), stage=name, **options)

    def transformer(self, name: str, *codebooks: Tensor) -> Iterator[Progress]:
        """A transformer stage, "base" or "superres", whose embeddings start from the codebooks."""
        torch.manual_seed(self.engine.seed)  # independent of what ran before, as in a resumed run
        if not self.start:
            train_engine.init_from_codebook(self.parts[name], *codebooks)
        model, (tokens, texts, *low) = self.parts[name], self.data.columns(name)
        options = {"stage": name, "engine": self.engine, "eval_fn": self.log.transformer(name, self.data, self.parts)}
        options["low_tokens"] = low[0] if low else None
        if model.config.draft:
            tokenizers = (part.to(self.engine.device) for part in (self.parts["low_tokenizer"], self.high))
            options["draft"] = partial(draft_tokens, *tokenizers)
        yield from train_transformer(model, self.config.stages[name], tokens, texts, **options)
        self.parts[name] = self.engine.gather_full_model(model, lambda: build(self.config)[name])
