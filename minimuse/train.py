"""Training: the five stages of Muse as generators (Muse 3, A.1 to A.3).

    low tokenizer -> base -> high tokenizer -> super-resolution -> decoder fine-tuning

Each stage yields a `Progress` a step, so that a notebook may watch, plot or stop: `*_, last = train_transformer(...)`.
`train_muse` walks through all five and ends with a `Muse`. While a transformer trains, the tokenizers and the language
model are frozen: images are tokenized and captions encoded once.

Not here: processes, precision, optimizer, saved states (`engine.py`), what is kept on disk (`cache.py`).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.captions import EXAMPLE_PROMPTS, vocabulary
from minimuse.cfg import drop_text
from minimuse.config import MuseConfig, StageConfig
from minimuse.data import SceneDataset, halve, to_float
from minimuse.engine import Engine, Stage, batch_indices, generator, learning_rate, make_optimizer, precision
from minimuse.masking import masked_counts, masked_cross_entropy, random_mask, sample_mask_rate
from minimuse.muse import Muse, build
from minimuse.scenes import COLORS, SHAPES
from minimuse.text import Context, TextEncoder, pad_contexts
from minimuse.transformer import Transformer
from minimuse.vqgan import VQGAN, codebook_usage
from minimuse.vqgan_loss import COMMITMENT, Perceptual, SceneFeatures, VQGANLoss, feature_distance

Look = Callable[[nn.Module], dict[str, float]]  # what a stage shows of a model now and then, as figures


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
    cfg: StageConfig,
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
    losses = VQGANLoss(perceptual, cfg.perceptual_weight, cfg.adversarial_weight, cfg.adversarial_start)
    losses.to(engine.device, memory_format=torch.channels_last)
    modules = {"model": vqgan} | ({"critic": losses.discriminator} if losses.discriminator is not None else {})
    job = Stage(engine, stage, cfg, modules, {"idle": vqgan.quantizer.watch_codes()})
    last_layer = vqgan.decoder.conv_out.weight
    if job.first:
        yield Progress(stage, job.first, cfg.steps, {}, vqgan)
    for step in job.steps():
        shares: list[dict[str, Tensor]] = []
        for at, _ in job.micro_batches(len(images), step):
            x = to_float(random_crop(images[at], cfg.crop, generator(engine.seed, step))).to(engine.device)
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
        if look and (step + 1) % cfg.look_every == 0:
            figures |= look(vqgan)
        yield Progress(stage, step + 1, cfg.steps, figures, vqgan)


@torch.inference_mode()
def tokenize(vqgan: VQGAN, images: Tensor, batch: int = 256, bf16: bool | None = None) -> Tensor:
    """A frozen tokenizer, images (n, 3, H, W) uint8 -> tokens (n, N), on the CPU."""
    device = next(vqgan.parameters()).device
    vqgan.eval()
    with precision(device, bf16):
        return torch.cat([vqgan.encode(to_float(x).to(device)).cpu() for x in images.split(batch)])


def train_features(images: Tensor, kinds: Tensor, *, steps: int = 200, seed: int = 0) -> SceneFeatures:
    """images (n, 3, H, W) uint8, kinds (n, K) 0 or 1 -> features for a perceptual loss, trained to tell kinds."""
    torch.manual_seed(seed)
    net = SceneFeatures(kinds.shape[1])
    cfg = StageConfig(steps=steps, batch=64, learning_rate=2e-3, warmup=10, weight_decay=1e-4)
    optimizer = make_optimizer(net, cfg)
    for step in range(steps):
        at = batch_indices(len(images), cfg.batch, step, seed)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(cfg, step)
        F.binary_cross_entropy_with_logits(net.classify(to_float(images[at])), kinds[at]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval().requires_grad_(False)


# --- transformers -----------------------------------------------------------------------------------------------------


class MaskedLoss(nn.Module):
    """The masked loss (Muse 2.3) as one module, so that DDP, FSDP and torch.compile see the whole pass."""

    def __init__(self, model: Transformer, label_smoothing: float):
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing

    def forward(
        self, x: Tensor, masked: Tensor, context: Context, low_tokens: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """True tokens and masked (B, N), texts, low-res tokens -> this part's shares of loss and accuracy, () each."""
        memory = self.model.memory(context, *([] if low_tokens is None else [low_tokens]))
        logits = self.model(x.masked_fill(masked, self.model.mask_id), memory)
        right = ((logits.detach().argmax(-1) == x) & masked).sum() / count
        return masked_cross_entropy(logits, x, masked, self.label_smoothing, count), right


def train_transformer(
    model: Transformer,
    cfg: StageConfig,
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
    job = Stage(engine, stage, cfg, {"model": MaskedLoss(model, cfg.label_smoothing)})
    if job.first:
        yield Progress(stage, job.first, cfg.steps, {}, model)
    for step in job.steps():
        rates = sample_mask_rate(cfg.batch, schedule=cfg.mask_schedule, generator=job.draws(job.places(step)))
        count = int(masked_counts(rates, tokens.shape[1]).sum())  # of the whole batch: an example's rate comes first
        shares = []
        for at, draws in job.micro_batches(len(tokens), step):
            x = tokens[at]
            rates = sample_mask_rate(len(x), schedule=cfg.mask_schedule, generator=draws)  # one an example (Muse 2.6)
            masked = random_mask(x, rates, draws)
            context = drop_text(pad_contexts(pick(texts, at, draws)), cfg.text_drop, draws)  # Muse 2.7
            low = None if low_tokens is None else low_tokens[at].to(device)
            with engine.precision():
                loss, right = job.modules["model"](x.to(device), masked.to(device), context.to(device), low, count)
            job.backward(loss)
            shares.append({"loss": loss, "accuracy": right})
        job.update(step)
        figures = job.total(shares)
        job.end(step)
        if look and (step + 1) % cfg.look_every == 0:
            figures |= look(model)
        yield Progress(stage, step + 1, cfg.steps, figures, model)
    model.eval()


def pick(texts: Any, at: Tensor, draws: list[torch.Generator]) -> list[Tensor]:
    """One of the captions of each example `at`, drawn from its own generator, (L, D_lm) each."""
    u = [torch.rand((), generator=g).item() for g in draws]
    if hasattr(texts, "pick"):
        return [text.float() for text in texts.pick(at, u)]
    return [texts[i][int(x * len(texts[i]))].float() for i, x in zip(at.tolist(), u, strict=True)]


def encode_captions(encoder: TextEncoder, captions: Sequence[Sequence[str]], batch: int = 512) -> list[list[Tensor]]:
    """For each example its captions -> their embeddings (L, D_lm), unpadded, in half precision; each text once."""
    unique = list(dict.fromkeys(text for texts in captions for text in texts))
    rows: dict[str, Tensor] = {}
    for start in range(0, len(unique), batch):
        part = unique[start : start + batch]
        context = encoder.encode(part)
        rows |= {t: e[m].half().cpu() for t, e, m in zip(part, context.embeds, context.mask, strict=True)}
    return [[rows[text] for text in texts] for texts in captions]


# --- all five ---------------------------------------------------------------------------------------------------------


def train_muse(
    cfg: MuseConfig, *, seed: int = 0, device: str | torch.device | None = None, bf16: bool | None = None
) -> Iterator[Progress]:
    """A configuration -> a Progress a step of every stage; the last one's model is the finished Muse.

    Data are minimuse's own scenes. The low-resolution image is the decimated high-resolution one.
    """
    device = pick_device(device)
    torch.manual_seed(seed)
    started = time.monotonic()
    parts = build(cfg).to(device)
    encoder = TextEncoder(cfg.text_encoder, max_tokens=cfg.text_tokens, device=device)
    scenes = SceneDataset(cfg.scenes, cfg.high_tokenizer.image_size, seed=seed, shares=cfg.shares)
    scale = cfg.high_tokenizer.image_size // cfg.low_tokenizer.image_size

    chunks = []
    for start in range(0, cfg.scenes, 500):
        chunks.append(scenes.images(range(start, min(start + 500, cfg.scenes))))
        yield Progress("render scenes", min(start + 500, cfg.scenes), cfg.scenes, {}, parts)
    high_images = torch.cat(chunks)
    low_images = torch.cat([(halve(x.float(), scale) + 0.5).byte() for x in high_images.split(500)])
    texts = encode_captions(encoder, [scenes.captions(i, cfg.captions) for i in range(cfg.scenes)])
    yield Progress("encode captions", 1, 1, {}, parts)

    low, high = parts["low_tokenizer"], VQGAN(cfg.high_tokenizer).to(device)
    common = {"seed": seed, "bf16": bf16}
    perceptual = _perceptual(cfg, scenes, low_images)
    settings = {"perceptual": perceptual, **common}
    yield from train_tokenizer(low, cfg.stages["low_tokenizer"], low_images, stage="low_tokenizer", **settings)
    low_tokens = tokenize(low, low_images, bf16=bf16)
    yield from train_transformer(parts["base"], cfg.stages["base"], low_tokens, texts, stage="base", **common)
    yield from train_tokenizer(high, cfg.stages["high_tokenizer"], high_images, stage="high_tokenizer", **settings)
    high_tokens = tokenize(high, high_images, bf16=bf16)
    yield from train_transformer(
        parts["superres"], cfg.stages["superres"], high_tokens, texts, low_tokens=low_tokens, stage="superres", **common
    )
    parts["high_tokenizer"] = high.grow_decoder(cfg.finetuned_tokenizer)
    tuned = parts["high_tokenizer"].to(device)
    yield from train_tokenizer(tuned, cfg.stages["decoder"], high_images, stage="decoder", **settings)

    muse = Muse(cfg, parts, encoder, words=vocabulary(), examples=EXAMPLE_PROMPTS).to(device, torch.float32)
    yield Progress("done", 1, 1, {"minutes": (time.monotonic() - started) / 60}, muse)


def _perceptual(cfg: MuseConfig, scenes: SceneDataset, images: Tensor) -> Perceptual | None:
    """Features trained on the scenes themselves, where a tokenizer stage weighs a perceptual loss."""
    if not any(cfg.stages[name].perceptual_weight for name in ("low_tokenizer", "high_tokenizer", "decoder")):
        return None
    kinds = [(c, s) for c in COLORS for s in SHAPES]
    there = [{(t.color, t.shape) for t in scenes.scene(i).things} for i in range(len(images))]
    return feature_distance(train_features(images, torch.tensor([[float(k in t) for k in kinds] for t in there])))
