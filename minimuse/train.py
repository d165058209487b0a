"""Training: the five stages of Muse as generators (Muse 3, A.1 to A.3).

    low tokenizer -> base -> high tokenizer -> super-resolution -> decoder fine-tuning

Each stage yields a `Progress` a step, so that a notebook may watch, plot or stop: `*_, last = train_transformer(...)`.
`train_muse` walks through all five and ends with a `Muse`. While a transformer trains, the tokenizers and the language
model are frozen: images are tokenized and captions encoded once.

Not here: processes, precision, optimizer, saved states (`train_engine.py`), what is kept on disk (`data_cache.py`).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.baseline_dit import LEVELS, DiT, NoiseLoss, gaussians
from minimuse.cfg import drop_text
from minimuse.config import MuseConfig, StageConfig
from minimuse.data_cache import TrainingData
from minimuse.data_images import area_downsample, to_float
from minimuse.data_scenes import COLORS, SHAPES
from minimuse.data_sources import SceneDataset, Source, open_source
from minimuse.masking import masked_counts, masked_cross_entropy, random_mask, sample_mask_rate, uniforms
from minimuse.muse import Muse, build, ready_tokenizer
from minimuse.text import Context, TextEncoder, pad_contexts
from minimuse.train_engine import Engine, Stage, batch_indices, generator, learning_rate, make_optimizers, sync
from minimuse.train_log import Watch
from minimuse.transformer import SuperRes, Transformer, init_from_codebook
from minimuse.vqgan import VQGAN, codebook_usage
from minimuse.vqgan_loss import COMMITMENT, Perceptual, SceneFeatures, VQGANLoss, feature_distance

Look = Callable[[nn.Module, int], dict[str, float]]  # (model or its MaskedLoss, steps done) -> figures for the log


class Progress(NamedTuple):
    """Where a stage stands after a step."""

    stage: str
    step: int  # steps done
    steps: int
    figures: dict[str, float]  # loss and whatever else the stage reports
    model: nn.Module | Muse


# --- tokenizers -------------------------------------------------------------------------------------------------------


def random_crop(images: Tensor, size: int, draws: torch.Generator) -> Tensor:
    """images (B, 3, H, W) -> one random square of all, (B, 3, size, size); size 0 keeps them whole."""
    if not size or size >= images.shape[-1]:
        return images
    top, left = torch.randint(images.shape[-1] - size + 1, (2,), generator=draws).tolist()
    return images[:, :, top : top + size, left : left + size]


def train_tokenizer(
    vqgan: VQGAN,
    config: StageConfig,
    images: Any,
    *,
    stage: str = "tokenizer",
    perceptual: Perceptual | None = None,
    engine: Engine | None = None,
    look: Look | None = None,
) -> Iterator[Progress]:
    """VQGAN, images -> a Progress a step (Muse 2.2; with encoder and codebook frozen: 2.5).

    images: a tensor (n, 3, H, W) uint8, or whatever has a length and gives such tensors for indices.
    """
    engine = engine or Engine()
    for part in (vqgan.encoder, vqgan.quantizer, vqgan.decoder):
        part.train(any(p.requires_grad for p in part.parameters()))
    vqgan.to(engine.device, memory_format=torch.channels_last)
    torch.manual_seed(engine.seed)
    vqgan.quantizer.sync = sync
    losses = VQGANLoss(perceptual, config.perceptual_weight, config.adversarial_weight, config.adversarial_start)
    losses.to(engine.device, memory_format=torch.channels_last)
    modules = {"model": vqgan} | ({"critic": losses.discriminator} if losses.discriminator is not None else {})
    job = Stage(engine, stage, config, modules, {"idle": vqgan.quantizer.watch_codes()})
    last_layer = vqgan.decoder.conv_out.weight
    if job.first:
        yield Progress(stage, job.first, config.steps, {}, vqgan)
    for step in job.steps():
        shares: list[dict[str, Tensor]] = []
        for at, _ in job.micro_batches(len(images), step):
            x = to_float(random_crop(images[at], config.crop, generator(engine.seed, step))).to(engine.device)
            x = x.contiguous(memory_format=torch.channels_last)
            with engine.precision():
                made = job.modules["model"](x)
            made = made._replace(images=made.images.float())
            with engine.precision():
                loss = losses.generator(x, made.images, last_layer, step)
            loss = loss + made.codebook_loss + COMMITMENT * made.commitment_loss
            job.backward(loss / job.parts)
            figures = {"loss": loss, "l1": F.l1_loss(made.images, x), "mse": F.mse_loss(made.images, x)}
            if losses.adversarial(step):
                with engine.precision():
                    critic = losses.critic(x, made.images, job.modules["critic"])
                job.backward(critic / job.parts)
                figures["critic"] = critic
            shares.append({k: v.detach() / job.parts for k, v in figures.items()})
        job.update(step)
        if losses.adversarial(step):
            job.update(step, "critic")
        figures = job.total(shares)
        figures["psnr"] = -10 * math.log10(max(figures.pop("mse"), 1e-10) / 4)
        figures["used"], figures["perplexity"] = codebook_usage(made.tokens, vqgan.codebook_size)
        job.end(step)
        if look and (step + 1) % config.eval_every == 0:
            figures |= look(vqgan, step + 1)
        yield Progress(stage, step + 1, config.steps, figures, vqgan)


def train_features(images: Tensor, kinds: Tensor, *, steps: int = 200, seed: int = 0) -> SceneFeatures:
    """images (n, 3, H, W) uint8, kinds (n, K) 0 or 1 -> features for a perceptual loss, trained to tell kinds."""
    torch.manual_seed(seed)
    net = SceneFeatures(kinds.shape[1])
    config = StageConfig(steps=steps, batch=64, learning_rate=2e-3, warmup=10, weight_decay=1e-4)
    (optimizer,) = make_optimizers(net, config)
    for step in range(steps):
        at = batch_indices(len(images), config.batch, step, seed)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(config, step)
        F.binary_cross_entropy_with_logits(net.classify(to_float(images[at])), kinds[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


# --- transformers -----------------------------------------------------------------------------------------------------


class MaskedLoss(nn.Module):
    """The masked loss (Muse 2.3) as one module, so that DDP, FSDP and torch.compile see the whole pass."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(
        self,
        x: Tensor,
        masked: Tensor,
        context: Context,
        low_tokens: Tensor | None,
        count: int,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """True tokens and masked (B, N), texts, low-res tokens -> shares of loss and accuracy of `count` tokens, ()."""
        memory = self.model.memory(context, *([] if low_tokens is None else [low_tokens]))
        logits = self.model(x.masked_fill(masked, self.model.mask_id), memory)
        right = ((logits.detach().argmax(-1) == x) & masked).sum() / count
        return masked_cross_entropy(logits, x, masked, label_smoothing, count), right


class NextLoss(MaskedLoss):
    """The same of a causal model. It sees no token that it is asked for, so none is hidden; asked for all, -log p."""

    def forward(
        self,
        x: Tensor,
        masked: Tensor,
        context: Context,
        low_tokens: None,
        count: int,
        label_smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """As `MaskedLoss`, all of x given: shares of loss and accuracy of the `count` tokens asked for, ()."""
        logits = self.model(x, self.model.memory(context))
        right = ((logits.detach().argmax(-1) == x) & masked).sum() / count
        return masked_cross_entropy(logits, x, masked, label_smoothing, count), right


def train_transformer(
    model: Transformer,
    config: StageConfig,
    tokens: Any,
    texts: Any,
    *,
    low_tokens: Any = None,
    stage: str = "base",
    engine: Engine | None = None,
    look: Look | None = None,
) -> Iterator[Progress]:
    """Masked training of the base (Muse 2.3) or, with `low_tokens`, the super-resolution transformer (2.4).

    tokens (n, N), low_tokens (n, N_low): tensors, or whatever gives such rows for indices. texts: for each example its
    captions, each as unpadded embeddings (L, D_lm).
    The loss is the mean over the masked tokens of the whole batch, whatever number of processes and micro-batches.
    """
    engine = engine or Engine()
    device = engine.device
    model.train()
    torch.manual_seed(engine.seed)
    schedule = config.mask_schedule
    job = Stage(engine, stage, config, {"model": MaskedLoss(model)}, shard=True)
    if job.first:
        yield Progress(stage, job.first, config.steps, {}, model)
    for step in job.steps():
        rates = sample_mask_rate(config.batch, schedule=schedule, generator=job.draws(job.places(step)))
        count = int(masked_counts(rates, tokens.shape[1]).sum())  # of the whole batch: an example's rate comes first
        shares = []
        for at, draws in job.micro_batches(len(tokens), step):
            x = tokens[at]
            rates = sample_mask_rate(len(x), schedule=schedule, generator=draws)  # one an example (Muse 2.6)
            masked = random_mask(x, rates, draws)
            context = drop_text(pad_contexts(pick(texts, at, draws)), config.cond_drop_prob, draws)  # Muse 2.7
            low = None if low_tokens is None else low_tokens[at].to(device)
            with engine.precision():
                loss, right = job.modules["model"](
                    x.to(device), masked.to(device), context.to(device), low, count, config.label_smoothing
                )
            job.backward(loss)
            shares.append({"loss": loss, "accuracy": right})
        job.update(step)
        figures = job.total(shares)
        job.end(step)
        if look and (step + 1) % config.eval_every == 0:
            figures |= look(job.modules["model"], step + 1)
        yield Progress(stage, step + 1, config.steps, figures, model)
    model.eval()


def train_dit(
    model: DiT,
    config: StageConfig,
    z: Tensor,
    texts: Any,
    *,
    stage: str = "base",
    engine: Engine | None = None,
    look: Look | None = None,
) -> Iterator[Progress]:
    """Noise prediction (`baseline_dit.py`) on latents z (n, d, h, w) as the encoder gives them; texts as `train_transformer`."""
    engine = engine or Engine()
    device = engine.device
    model.train().observe(z)
    torch.manual_seed(engine.seed)
    job = Stage(engine, stage, config, {"model": NoiseLoss(model)}, shard=True)
    if job.first:
        yield Progress(stage, job.first, config.steps, {}, model)
    for step in job.steps():
        shares = []
        for at, draws in job.micro_batches(len(z), step):
            x = z[at]
            when = (uniforms(len(x), generator=draws) * len(LEVELS)).long()  # one an example, uniform on 0 .. S-1
            noise = gaussians(*x.shape, generator=draws)
            context = drop_text(pad_contexts(pick(texts, at, draws)), config.cond_drop_prob, draws)
            with engine.precision():
                inputs = (t.to(device) for t in (x, noise, when, context))
                loss = job.modules["model"](*inputs, config.batch * x[0].numel())
            job.backward(loss)
            shares.append({"loss": loss})
        job.update(step)
        figures = job.total(shares)
        job.end(step)
        if look and (step + 1) % config.eval_every == 0:
            figures |= look(job.modules["model"], step + 1)
        yield Progress(stage, step + 1, config.steps, figures, model)
    model.eval()


def pick(texts: Any, at: Tensor, draws: list[torch.Generator]) -> list[Tensor]:
    """One of the captions of each example `at`, drawn from its own generator, (L, D_lm) each."""
    u = [torch.rand((), generator=g).item() for g in draws]
    if hasattr(texts, "pick"):
        return [text.float() for text in texts.pick(at, u)]
    return [texts[i][int(x * len(texts[i]))].float() for i, x in zip(at.tolist(), u, strict=True)]


# --- all five ---------------------------------------------------------------------------------------------------------


class Decimated:
    """Images (n, 3, H, W) -> (n, 3, H / factor, W / factor), made as they are asked for: the low-res images."""

    def __init__(self, images: Any, factor: int):
        self.images, self.factor = images, factor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Any) -> Tensor:
        return area_downsample(self.images[indices], self.factor)


def train_muse(
    config: MuseConfig, *, data: str | Path | Source = "scenes", engine: Engine | None = None
) -> Iterator[Progress]:
    """A configuration -> a Progress a step of every stage; the last one's model is the finished Muse.

    data: "scenes", a folder of captioned images, or tar shards; see `folders.open_source`. Or the source itself.
    With `engine.folder` a stopped run goes on where it was; without, nothing is kept. The low-resolution image is the
    decimated high-resolution one (Muse 3.3.1).
    """
    engine, started = engine or Engine(), time.monotonic()
    watch = Watch(config, engine)
    for p in _stages(config, data, engine, watch):
        yield p._replace(figures=watch(p))
    yield Progress("done", 1, 1, {"minutes": (time.monotonic() - started) / 60}, p.model)


def _stages(config: MuseConfig, data: str | Path | Source, engine: Engine, watch: Watch) -> Iterator[Progress]:
    """The five stages, and before each what it reads; the last Progress holds the Muse."""
    torch.manual_seed(engine.seed)
    parts, high = build(config), VQGAN(config.high_tokenizer)
    encoder = TextEncoder(config.text_encoder, max_tokens=config.text_tokens, device=engine.device)
    factor = config.high_tokenizer.image_size // config.low_tokenizer.image_size
    perceptual = _perceptual(config, engine)

    def tokenizer(name: str, vqgan: VQGAN, images: Any, held_out: Any) -> Iterator[Progress]:
        seen = {"perceptual": perceptual, "look": watch.tokenizer(name, held_out)}
        return train_tokenizer(vqgan, config.stages[name], images, stage=name, engine=engine, **seen)

    def transformer(name: str, tokens: Any, low_tokens: Any = None) -> Iterator[Progress]:
        seen = {"low_tokens": low_tokens, "look": watch.transformer(name, corpus, parts)}
        return train_transformer(parts[name], config.stages[name], tokens, texts, stage=name, engine=engine, **seen)

    with ExitStack() as stack:
        root = engine.folder or stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
        source = open_source(data, config, seed=engine.seed) if isinstance(data, str | Path) else data
        corpus = TrainingData(Path(root, "cache"), source, config, engine, encoder)
        yield from _work("read images", corpus.read(), parts)
        images, held_out = corpus.split(corpus.images), corpus.split(corpus.images, held_out=True)

        small = Decimated(images, factor), Decimated(held_out, factor)
        if (ready := ready_tokenizer(config)) is not None:
            parts["low_tokenizer"] = ready
        else:
            yield from tokenizer("low_tokenizer", parts["low_tokenizer"], *small)
        yield from _work("low tokens", corpus.tokenize("low", parts["low_tokenizer"]), parts)
        yield from _work("embed captions", corpus.embed(), parts)
        low_tokens, texts = corpus.split(corpus.tokens["low"]), corpus.split(corpus.texts)
        torch.manual_seed(engine.seed)  # whatever ran before: a resumed run begins each stage as a whole one does
        init_from_codebook(parts["base"], parts["low_tokenizer"].codebook)
        yield from transformer("base", low_tokens)
        parts["base"] = engine.whole(parts["base"], lambda: build(config)["base"])

        def finished() -> Muse:
            return Muse(config, parts, encoder, **corpus.words()).to(engine.device, torch.float32)

        yield from tokenizer("high_tokenizer", high, images, held_out)
        parts["high_tokenizer"] = high
        yield from _work("high tokens", corpus.tokenize("high", high), parts)
        torch.manual_seed(engine.seed)
        init_from_codebook(parts["superres"], high.codebook, parts["low_tokenizer"].codebook)
        yield from transformer("superres", corpus.split(corpus.tokens["high"]), low_tokens)
        parts["superres"] = engine.whole(parts["superres"], lambda: SuperRes(config.superres))

        torch.manual_seed(engine.seed)
        parts["high_tokenizer"] = high.grow_decoder(config.finetuned_tokenizer)
        yield from tokenizer("decoder", parts["high_tokenizer"], images, held_out)
        yield Progress("all", 1, 1, {}, finished())


def _work(name: str, work: Iterator[tuple[int, int]], parts: nn.ModuleDict) -> Iterator[Progress]:
    """What is computed once, as a stage of its own."""
    for done, of in work:
        yield Progress(name, done, of, {}, parts)


def _perceptual(config: MuseConfig, engine: Engine, n: int = 2000) -> Perceptual | None:
    """Features trained on scenes, whatever the data, where a tokenizer stage weighs a perceptual loss."""
    if not any(s.perceptual_weight for name, s in config.stages.items() if name not in ("base", "superres")):
        return None
    scenes, kinds = SceneDataset(n, config.low_tokenizer.image_size, seed=engine.seed), [*product(COLORS, SHAPES)]
    there = [{(t.color, t.shape) for t in scenes.scene(i).things} for i in range(n)]
    labels = torch.tensor([[float(k in t) for k in kinds] for t in there])
    features = train_features(scenes.images(), labels, seed=engine.seed)
    return feature_distance(features.to(engine.device))
