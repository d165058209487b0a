"""What a configuration costs, known before anyone rents a machine: parameters, bytes and FLOPs of the five stages.

    stage_budgets(config) -> a StageBudget a stage      sampling_flops(config) -> FLOPs of one image, the arithmetic floor
    matmul_ceiling() -> FLOP/s of this machine       report(config) -> all of it, a table for people

The real networks and losses run once on the meta device, which has shapes and no memory. A FLOP is a multiplication or
an addition inside a matrix product or a convolution; attention counts as its two products (backwards four), whatever a
kernel computes anew. Hours are FLOPs / ceiling: at best, no forecast.

Bytes are those of fp32 weights trained under bf16 autocast with fused attention, from a run on fake tensors: meta
tensors that believe in a device, which autocast and fused attention ask for. Approximated:
    every prompt fills `text_tokens`, more than most need; for shorter ones pass replace(config, text_tokens=20)
    the CPU's autocast rules, with CUDA's for normalization (in fp32) on top
    left out is what lives between two saves: gradients of activations, an optimizer's temporaries, workspaces, gaps
Not here: reading and tokenizing images and encoding captions, each done once; the language model.
"""

import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from minimuse import transformer
from minimuse.cfg import get_guidance, guided, null_text
from minimuse.config import STAGES, MuseConfig, StageConfig
from minimuse.data_cache import TrainingData
from minimuse.data_images import Example, area_downsample, tokenize_images
from minimuse.data_sources import Problems
from minimuse.masking import masked_cross_entropy
from minimuse.sampler import SamplingConfig
from minimuse.text import Context
from minimuse.train_engine import hidden_matrices
from minimuse.transformer import Layer, SuperRes, Transformer, TransformerConfig
from minimuse.utils import fast_bf16, pick_device
from minimuse.vqgan import VQGAN, ResBlock
from minimuse.vqgan_loss import COMMITMENT, SceneFeatures, VQGANLoss, feature_distance

Losses = Callable[[int, int], Iterator[Tensor]]  # batch, step -> losses, each to be run backwards before the next


class StageBudget(NamedTuple):
    """What one stage needs: FLOPs, and bytes on an accelerator that holds all of it."""

    stage: str
    steps: int
    batch: int  # global: of all accelerators together
    parameters: int  # of all its networks, frozen parts and the discriminator included
    trained: int
    step_flops: float  # a step of the global batch, forward and backward: the mean over the stage
    weights: int  # bytes, fp32
    gradients: int
    optimizer: int
    casts: int  # the weights' bf16 copies, which autocast keeps from forward to backward
    activations: int  # bytes an example, saved for the backward pass

    @property
    def flops(self) -> float:
        """Of the whole stage."""
        return self.steps * self.step_flops

    @property
    def fixed(self) -> int:
        """Bytes that are there whatever the batch."""
        return self.weights + self.gradients + self.optimizer + self.casts

    def examples(self, memory: float, shards: int = 1) -> int:
        """How many examples fit into `memory` bytes at once, at best; `shards`: accelerators that share `fixed`."""
        return max(0, int((memory - self.fixed / shards) // self.activations))


class SamplingFlops(NamedTuple):
    """FLOPs of one image: the memories once, every step of both models with its branches, the decoder once."""

    memory: int
    base: int
    superres: int
    decoder: int


# --- counting ---------------------------------------------------------------------------------------------------------


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions while `run()` runs, on any device; attention as plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class _NormInFloat(TorchFunctionMode):
    """CUDA's autocast rule for normalization: computed, saved and returned in fp32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def saved_bytes(run: Callable[[], Any], weights: nn.Module, bf16: bool = True) -> int:
    """Bytes that `run()` saves for its backward pass: each storage once, those of `weights` not at all."""
    saved: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no number is given twice

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    casts = (torch.autocast("cpu", torch.bfloat16), _NormInFloat()) if bf16 else (nullcontext(), nullcontext())
    fused = patch.object(transformer, "attention", F.scaled_dot_product_attention)  # as an accelerator's, in bf16 too
    with fused, casts[0], casts[1], torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()  # held: its graph owns what was saved
    for x in [*weights.parameters(), *weights.buffers()]:
        saved.pop(x.untyped_storage()._cdata, None)
    del result
    return sum(storage.nbytes() for storage in saved.values())


def optimizer_bytes(parts: nn.Module, optimizer: str) -> int:
    """State in fp32 of AdamW (two moments), of torch's Adafactor (a row and a column factor a matrix), or of Muon (one
    moment of each matrix inside a layer, AdamW's for the rest). Each tensor but Muon's counts its steps."""
    hidden = {id(p) for p in hidden_matrices(parts)} if optimizer == "muon" else set()

    def numbers(p: Tensor) -> int:
        if id(p) in hidden:
            return p.numel()
        if optimizer != "adafactor":
            return 2 * p.numel() + 1
        return (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel()) + 1

    return sum(4 * numbers(p) for p in parts.parameters() if p.requires_grad)


# --- the stages -------------------------------------------------------------------------------------------------------


def _inputs(config: TransformerConfig, text_tokens: int, batch: int) -> tuple[Tensor, Context, list[Tensor]]:
    """Tokens (B, N), a context (B, L, D_lm) and, for super-resolution, [low tokens (B, N_low)]."""
    tokens = torch.zeros(batch, config.tokens, dtype=torch.long)
    context = Context(
        torch.zeros(batch, text_tokens, config.text_width), torch.ones(batch, text_tokens, dtype=torch.bool)
    )
    return tokens, context, [tokens.new_zeros(batch, config.low_grid**2)] if config.low_layers else []


def _transformer_losses(model: Transformer, text_tokens: int, batch: int, step: int) -> Iterator[Tensor]:
    tokens, context, low = _inputs(model.config, text_tokens, batch)
    logits = model(tokens, model.memory(context, *low))
    yield masked_cross_entropy(logits, tokens, torch.ones_like(tokens, dtype=torch.bool))


def _tokenizer_losses(vqgan: VQGAN, losses: VQGANLoss, size: int, batch: int, step: int) -> Iterator[Tensor]:
    x = torch.zeros(batch, 3, size, size)
    made = vqgan(x)
    made = made._replace(images=made.images.float())
    loss = losses.generator_loss(x, made.images, vqgan.decoder.conv_out.weight, step)
    yield loss + made.codebook_loss + COMMITMENT * made.commitment_loss
    if losses.discriminator_active(step):
        yield losses.discriminator_loss(x, made.images)


def _checkpointed(model: Any, checkpointing: bool) -> Any:
    """The model, each layer or residual block of which saves its input alone and runs again for the backward pass."""
    for part in model.modules() if checkpointing else ():
        if isinstance(part, Layer | ResBlock):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def _networks(config: MuseConfig, stage: str, checkpointing: bool) -> tuple[nn.Module, Losses]:
    """A stage's networks, and the losses of its steps."""
    if stage in ("base", "superres"):
        model = Transformer(config.base) if stage == "base" else SuperRes(config.superres)
        return _checkpointed(model, checkpointing), partial(_transformer_losses, model, config.text_tokens)
    how = config.stages[stage]
    vqgan = _checkpointed(
        VQGAN(config.finetuned_tokenizer if stage == "decoder" else getattr(config, stage)), checkpointing
    )
    vqgan.quantizer.eval()  # dead codes restart after what the data say, and shapes say nothing
    if stage == "decoder":
        vqgan.freeze_tokens()
    perceptual = feature_distance(SceneFeatures(1).requires_grad_(False)) if how.perceptual_weight else None
    losses = VQGANLoss(perceptual, how.perceptual_weight, how.adversarial_weight, how.adversarial_start)
    size = min(how.crop or vqgan.config.image_size, vqgan.config.image_size)
    return nn.ModuleList([vqgan, losses]), partial(_tokenizer_losses, vqgan, losses, size)


def _mean_flops(losses: Losses, how: StageConfig) -> float:
    """FLOPs an example a step, the mean over the stage: a discriminator that starts late costs nothing before."""

    def backward(step: int) -> None:
        for loss in losses(1, step):
            loss.backward()

    late = min(how.adversarial_start, how.steps) / how.steps if how.adversarial_weight else 0
    before = count_flops(lambda: backward(how.adversarial_start - 1)) if late > 0 else 0
    after = count_flops(lambda: backward(how.adversarial_start)) if late < 1 else 0
    return late * before + (1 - late) * after


def stage_budget(config: MuseConfig, stage: str, checkpointing: bool = False) -> StageBudget:
    """One stage of `config`. ValueError for an unknown one.

    `checkpointing`: layers and residual blocks run again for the backward pass, which costs their forward FLOPs once
    more; what the one that runs again holds at that moment is left out.
    """
    if stage not in STAGES or stage not in config.stages:
        raise ValueError(
            f"no stage {stage!r} in {config.name!r}; known: {', '.join(s for s in STAGES if s in config.stages)}"
        )
    how = config.stages[stage]
    with torch.device("meta"):
        step_flops = how.batch * _mean_flops(_networks(config, stage, checkpointing)[1], how)
    with FakeTensorMode():
        networks, losses = _networks(config, stage, checkpointing)
        one, two = (saved_bytes(lambda n=n: next(losses(n, how.steps)), networks) for n in (1, 2))
    parameters = [*networks.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    total, learning = (sum(p.numel() for p in x) for x in (parameters, trained))
    static = {"weights": 4 * total, "gradients": 4 * learning, "optimizer": optimizer_bytes(networks, how.optimizer)}
    saved = {"casts": 2 * one - two, "activations": two - one}
    return StageBudget(stage, how.steps, how.batch, total, learning, step_flops, **static, **saved)


def stage_budgets(config: MuseConfig, checkpointing: bool = False) -> list[StageBudget]:
    """All stages of `config`, in the order of training."""
    return [stage_budget(config, stage, checkpointing) for stage in STAGES if stage in config.stages]


# --- sampling ---------------------------------------------------------------------------------------------------------


def _decode_flops(model: Transformer, how: SamplingConfig, text_tokens: int) -> tuple[int, int]:
    """FLOPs of the memories with and without text, and of all steps; where t = 0 a step has one branch."""
    tokens, text, low = _inputs(model.config, text_tokens, 1)
    memories: list[Any] = []
    once = count_flops(lambda: memories.extend(model.memory(c, *low) for c in (text, null_text(text))))
    logits_fn, t = guided(model, *memories, how.guidance), get_guidance(how.guidance)
    costs: dict[bool, int] = {}
    progress = [i / (how.steps - 1) if how.steps > 1 else 1.0 for i in range(how.steps)]
    for u in progress:
        if (t(u) != 0) not in costs:
            costs[t(u) != 0] = count_flops(partial(logits_fn, tokens, u))
    return once, sum(costs[t(u) != 0] for u in progress)


def sampling_flops(config: MuseConfig) -> SamplingFlops:
    """One image by the configuration's own defaults, the language model left out: the arithmetic floor of its time."""
    with torch.device("meta"), torch.no_grad():
        base_memory, base = _decode_flops(Transformer(config.base), config.base_sampling, config.text_tokens)
        superres_memory, superres = _decode_flops(
            SuperRes(config.superres), config.superres_sampling, config.text_tokens
        )
        vqgan = VQGAN(config.finetuned_tokenizer)
        decoder = count_flops(lambda: vqgan.decode(torch.zeros(1, config.superres.tokens, dtype=torch.long)))
    return SamplingFlops(base_memory + superres_memory, base, superres, decoder)


# --- hours and a report -----------------------------------------------------------------------------------------------


def matmul_ceiling(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None, size: int = 2048, seconds: float = 1.0
) -> float:
    """FLOP/s of a product of two (size, size) matrices on this machine, the median over `seconds`.

    `device` None is the best here; `dtype` None is bf16 where that is fast, else fp32. A machine that does other work
    meanwhile shows a lower one.
    """
    device = pick_device(device)
    a = torch.randn(size, size, device=device, dtype=dtype or (torch.bfloat16 if fast_bf16(device) else torch.float32))
    wait = torch.get_device_module(device).synchronize
    times: list[float] = []
    for _ in range(3):  # the first ones choose a kernel
        a @ a
    while sum(times) < seconds or len(times) < 5:
        wait()
        start = time.perf_counter()
        a @ a
        wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / median(times)


def si(x: float, unit: str) -> str:
    """1.5e12, "FLOP" -> "1.5 TFLOP": three digits and a prefix, powers of 1000."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    while x >= 999.5 and len(prefixes) > 1:
        x, prefixes = x / 1000, prefixes[1:]
    return f"{x:,.{2 if x < 9.995 else 1 if x < 99.95 else 0}f} {prefixes[0]}{unit}"


def duration(seconds: float) -> str:
    """Seconds -> hours as people say them; minutes, seconds and milliseconds below one."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"


def _advice(b: StageBudget, accelerators: int, memory: float, checkpointing: bool) -> str:
    """What to do where a stage's share of the batch does not fit, or nothing."""
    share, fit, sharded = -(-b.batch // accelerators), b.examples(memory), b.examples(memory, accelerators)
    if fit >= share:
        return ""
    if fit or sharded:
        mend = ("" if fit else f"FSDP over {accelerators} and ") + f"accumulation, {fit or sharded} at a time"
        mend += "" if checkpointing else ", or activation checkpointing"
    else:
        mend = ("" if checkpointing else "activation checkpointing and ") + "FSDP over more accelerators"
    return textwrap.fill(f"{b.stage}: {share} on each exceed {si(memory, 'B')}: {mend}", 100, subsequent_indent="  ")


def report(
    config: MuseConfig,
    accelerators: int = 1,
    *,
    ceiling: float | None = None,
    memory_gb: float | None = None,
    checkpointing: bool = False,
) -> str:
    """All of it as a table of 100 columns. `ceiling`: FLOP/s of one accelerator; None measures this machine.

    `memory_gb`: of one accelerator, 1e9 bytes each; stages that do not fit get a line with the mend.
    """
    if accelerators < 1 or (ceiling is not None and not ceiling > 0) or (memory_gb is not None and not memory_gb > 0):
        raise ValueError(
            f"{accelerators=}, {ceiling=}, {memory_gb=}; give at least 1 accelerator, and positive figures"
        )
    source = "matrix products measured here" if ceiling is None else "as given"
    ceiling = matmul_ceiling() if ceiling is None else ceiling
    rows = "{:14}{:>10}{:>11}{:>7}{:>13}{:>13}{:>10}{:>10}{:>12}"
    lines = [
        f"{config.name}: {accelerators} x {si(ceiling, 'FLOP/s')}, {source}{', activation checkpointing' * checkpointing}",
        rows.format("stage", "trained", "steps", "batch", "a step", "all steps", "fixed", "example", "at best"),
    ]
    budgets = stage_budgets(config, checkpointing)
    for b in budgets:
        flops = si(b.step_flops, "FLOP"), si(b.flops, "FLOP")
        sizes = si(b.fixed, "B"), si(b.activations, "B")
        at_best = duration(b.flops / ceiling / accelerators)
        lines.append(rows.format(b.stage, si(b.trained, ""), f"{b.steps:,}", b.batch, *flops, *sizes, at_best))
    total = sum(b.flops for b in budgets)
    at_best = duration(total / ceiling / accelerators)
    lines.append(rows.format("all", "", "", "", "", si(total, "FLOP"), "", "", at_best))
    lines.append("fixed: weights, gradients, optimizer, bf16 copies; example: activations saved for one example")
    image = sampling_flops(config)
    parts = ", ".join(f"{name} {si(flops, 'FLOP')}" for name, flops in image._asdict().items())
    lines += ["one image on one accelerator:", f"{parts}; at best {duration(sum(image) / ceiling)}"]
    if memory_gb is not None:
        mends = [_advice(b, accelerators, memory_gb * 1e9, checkpointing) for b in budgets]
        lines += list(filter(None, mends)) or [f"every stage's batch fits in {memory_gb:g} GB, at best"]
    return "\n".join(lines)


# --- caches -----------------------------------------------------------------------------------------------------------


def cache_bytes(config: MuseConfig, images: int, captions: int, text_tokens: float, pixels: int) -> dict[str, float]:
    """-> bytes of each cache before it is computed, without headers. `pixels`: images that are kept as pixels.

    10 million captions of 77 T5-XXL tokens (4096-d) take 6.3 TB.
    """
    low, high = config.low_tokenizer, config.high_tokenizer
    sizes = {"pixels": min(pixels, images) * 3 * high.image_size**2}
    for name, c in (("low", low), ("high", high)):
        sizes[name] = images * c.grid**2 * (2 if c.codebook_size <= 2**16 else 4)
    return sizes | {"text": captions * text_tokens * config.base.text_width * 2}


def preview(data: TrainingData, most: int = 64) -> str:
    """Bytes of each cache and the time of one process to compute it, measured on the first images. Nothing is kept."""

    def first() -> list[Example]:
        return list(islice(data.source.read(0, data.side, Problems()), most))

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    examples = first()  # untimed: what is slow only once
    if not examples:
        return "the first part of the data holds no usable image"
    captions = [text for e in examples for text in e.captions]
    each = {"pixels": timed(first) / len(examples)}
    for name in ("low", "high"):
        tokenizer = VQGAN(getattr(data.config, f"{name}_tokenizer")).to(data.device)
        few = torch.stack([e.image for e in examples[:4]])
        few = area_downsample(few, data.side // tokenizer.config.image_size)
        tokenize_images(tokenizer, few, bf16=data.bf16)
        each[name] = timed(partial(tokenize_images, tokenizer, few, bf16=data.bf16)) / len(few)
    try:
        length = sum(map(len, data.encode(captions))) / len(captions)
        each["text"], note = timed(partial(data.encode, captions)) / len(examples), ""
    except OSError:
        length, note = 32.0, f" ({data.config.text_encoder} is not here: 32 tokens per caption assumed)"
    n = (
        len(data.source)
        if hasattr(data.source, "__len__")
        else data.source.parts * sum(1 for _ in data.source.read(0, data.side, Problems()))
    )
    sizes = cache_bytes(data.config, n, n * len(captions) // len(examples), length, data.pixels_limit)
    if sizes["text"] > data.config.text_gib * 2**30:
        note += "; above text_gib: encoded at every step instead"
    lines = [f"caches of about {n:,} images, and the time of one process:"]
    for name, size in sizes.items():
        took = duration(each[name] * n) if name in each else "?"
        lines.append(f"  {name:7}{si(size, 'B'):>9}  {took:>10}{note * (name == 'text')}")
    return "\n".join(lines)
