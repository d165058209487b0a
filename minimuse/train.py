"""Training: the five stages of Muse as generators (Muse 3, A.1 to A.3).

    low tokenizer -> base -> high tokenizer -> super-resolution -> decoder fine-tuning

Each stage yields a `Progress` a step, so that a notebook may watch, plot or stop: `*_, last = train_transformer(...)`.
`train_muse` walks through all five and ends with a `Muse`. While a transformer trains, the tokenizers and the language
model are frozen: images are tokenized and captions encoded once.

Not here: sharded or resumed training, captioned folders.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minimuse.captions import EXAMPLE_PROMPTS, vocabulary
from minimuse.cfg import drop_text
from minimuse.config import MuseConfig, StageConfig
from minimuse.data import SceneDataset, halve, to_float
from minimuse.masking import masked_cross_entropy, random_mask, sample_mask_rate
from minimuse.muse import Muse, build, pick_device
from minimuse.scenes import COLORS, SHAPES
from minimuse.text import TextEncoder, pad_contexts
from minimuse.transformer import Transformer
from minimuse.vqgan import VQGAN, codebook_usage
from minimuse.vqgan_loss import COMMITMENT, Perceptual, SceneFeatures, VQGANLoss, feature_distance


class Progress(NamedTuple):
    """Where a stage stands after a step."""

    stage: str
    step: int  # steps done
    steps: int
    figures: dict[str, float]  # loss and whatever else the stage reports
    model: nn.Module | Muse


# --- what all stages share --------------------------------------------------------------------------------------------


def fast_bf16(device: torch.device) -> bool:
    """Does this device multiply bf16 faster than fp32? On a CPU: AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # absent in older torch
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


@contextmanager
def precision(device: torch.device, bf16: bool | None = None) -> Iterator[None]:
    """Matrix products in bf16 where that is fast (None), always or never; weights and losses stay fp32."""
    if not (fast_bf16(device) if bf16 is None else bf16):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), ExitStack() as stack:
        if (
            device.type == "cpu"
        ):  # the fused bf16 attention of CPUs takes longer, above all backwards, than plain products
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The examples of a step, (batch,): a function of seed and step alone. Each epoch is a permutation of all n."""
    places = torch.arange(step * batch, (step + 1) * batch)
    orders = {
        e: torch.randperm(n, generator=torch.Generator().manual_seed(seed + 7919 * e))
        for e in set((places // n).tolist())
    }
    return torch.stack([orders[p // n][p % n] for p in places.tolist()])


def learning_rate(cfg: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to 0 (Muse 3)."""
    if step < cfg.warmup:
        return cfg.learning_rate * (step + 1) / cfg.warmup
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))


class Optimizer:
    """One optimizer step with the stage's rate, clipping and decay; vectors (norms, biases) are not decayed."""

    def __init__(self, model: nn.Module, cfg: StageConfig):
        self.cfg, self.parameters = cfg, [p for p in model.parameters() if p.requires_grad]
        decay = [p for p in self.parameters if p.ndim > 1]
        plain = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if cfg.optimizer == "adafactor":
            # Deviation: Muse sets beta1 0.9 and beta2 0.96; torch's Adafactor has no beta1, and a beta2 that rises
            self.inner: torch.optim.Optimizer = torch.optim.Adafactor(groups, lr=cfg.learning_rate)
        else:
            self.inner = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=cfg.betas, fused=True)

    def step(self, loss: Tensor, step: int) -> None:
        """Backward, clip, update."""
        for group in self.inner.param_groups:
            group["lr"] = learning_rate(self.cfg, step)
        self.inner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.cfg.clip)
        self.inner.step()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def random_crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """images (B, 3, H, W) -> one random square of all, (B, 3, size, size); size 0 keeps them whole."""
    if not size or size >= images.shape[-1]:
        return images
    top, left = torch.randint(images.shape[-1] - size + 1, (2,), generator=generator).tolist()
    return images[:, :, top : top + size, left : left + size]


def train_tokenizer(
    vqgan: VQGAN,
    cfg: StageConfig,
    images: Tensor,
    *,
    stage: str = "tokenizer",
    perceptual: Perceptual | None = None,
    seed: int = 0,
    bf16: bool | None = None,
) -> Iterator[Progress]:
    """VQGAN, images (n, 3, H, W) uint8 -> a Progress a step (Muse 2.2; with encoder and codebook frozen: 2.5)."""
    device = next(vqgan.parameters()).device
    for part in (vqgan.encoder, vqgan.quantizer, vqgan.decoder):
        part.train(any(p.requires_grad for p in part.parameters()))
    vqgan.to(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    losses = VQGANLoss(perceptual, cfg.perceptual_weight, cfg.adversarial_weight, cfg.adversarial_start).to(
        device, memory_format=torch.channels_last
    )
    generator_step = Optimizer(vqgan, cfg)
    critic_step = Optimizer(losses.discriminator, cfg) if losses.discriminator is not None else None
    last_layer = vqgan.decoder.conv_out.weight
    for step in range(cfg.steps):
        draws = torch.Generator().manual_seed(seed + step)
        x = to_float(random_crop(images[batch_indices(len(images), cfg.batch, step, seed)], cfg.crop, draws)).to(device)
        x = x.contiguous(memory_format=torch.channels_last)
        with precision(device, bf16):
            made = vqgan(x)
        made = made._replace(images=made.images.float())
        with precision(device, bf16):
            loss = losses.generator(x, made.images, last_layer, step)
        loss = loss + made.codebook_loss + COMMITMENT * made.commitment_loss
        generator_step.step(loss, step)
        figures = {"loss": loss.item(), "l1": F.l1_loss(made.images, x).item()}
        if losses.adversarial(step):
            with precision(device, bf16):
                critic = losses.critic(x, made.images)
            critic_step.step(critic, step)
            figures["critic"] = critic.item()
        used, perplexity = codebook_usage(made.tokens, vqgan.codebook_size)
        figures |= {
            "psnr": -10 * math.log10(max(F.mse_loss(made.images, x).item(), 1e-10) / 4),
            "used": used,
            "perplexity": perplexity,
        }
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
    optimizer = Optimizer(net, cfg)
    for step in range(steps):
        at = batch_indices(len(images), cfg.batch, step, seed)
        optimizer.step(F.binary_cross_entropy_with_logits(net.classify(to_float(images[at])), kinds[at]), step)
    return net.eval().requires_grad_(False)


# --- transformers -----------------------------------------------------------------------------------------------------


def train_transformer(
    model: Transformer,
    cfg: StageConfig,
    tokens: Tensor,
    texts: Sequence[Sequence[Tensor]],
    *,
    low_tokens: Tensor | None = None,
    stage: str = "base",
    seed: int = 0,
    bf16: bool | None = None,
) -> Iterator[Progress]:
    """Masked training of the base (Muse 2.3) or, with `low_tokens`, the super-resolution transformer (2.4).

    tokens (n, N), low_tokens (n, N_low), texts: for each example its captions, each as unpadded embeddings (L, D_lm).
    """
    device = next(model.parameters()).device
    model.train()
    torch.manual_seed(seed)
    optimizer = Optimizer(model, cfg)
    for step in range(cfg.steps):
        draws = torch.Generator().manual_seed(seed + step)
        at = batch_indices(len(tokens), cfg.batch, step, seed)
        picked = [texts[i][torch.randint(len(texts[i]), (), generator=draws)] for i in at.tolist()]
        context = drop_text(pad_contexts([row.float() for row in picked]), cfg.text_drop, draws).to(device)
        x = tokens[at]
        masked = random_mask(x, sample_mask_rate(len(x), schedule=cfg.mask_schedule, generator=draws), draws).to(device)
        x = x.to(device)
        with precision(device, bf16):
            memory = model.memory(context, *([] if low_tokens is None else [low_tokens[at].to(device)]))
            logits = model(x.masked_fill(masked, model.mask_id), memory)
        loss = masked_cross_entropy(logits, x, masked, cfg.label_smoothing)
        optimizer.step(loss, step)
        right = ((logits.detach().argmax(-1) == x) & masked).sum() / masked.sum()
        yield Progress(stage, step + 1, cfg.steps, {"loss": loss.item(), "accuracy": right.item()}, model)
    model.eval()


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
    parts["base"].learn_codes(low.quantizer.codebook)
    yield from train_transformer(parts["base"], cfg.stages["base"], low_tokens, texts, stage="base", **common)
    yield from train_tokenizer(high, cfg.stages["high_tokenizer"], high_images, stage="high_tokenizer", **settings)
    high_tokens = tokenize(high, high_images, bf16=bf16)
    parts["superres"].learn_codes(high.quantizer.codebook, low.quantizer.codebook)
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
