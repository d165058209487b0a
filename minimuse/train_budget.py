"""What a configuration costs before anyone rents a machine: parameters, bytes and FLOPs of the five stages.

The real networks and losses run once on the meta device, which has shapes but no memory. A FLOP is one multiplication
or addition in a matrix product or convolution. Hours are FLOPs / `matmul_ceiling()`: a lower bound, not a forecast.
Bytes are those of fp32 weights, trained with bf16 autocast and fused attention, with prompts of `text_tokens` tokens.

Not counted: gradients of activations, temporary tensors, workspaces, gaps; the data's preparation; the language model.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from timeit import timeit
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from minimuse.cfg import get_guidance, guided, null_text
from minimuse.config import STAGES, MuseConfig, StageConfig
from minimuse.data_cache import TrainingData, tokenize_images
from minimuse.data_images import area_downsample
from minimuse.data_sources import Example, Problems
from minimuse.muse import build
from minimuse.sampler import SamplingConfig
from minimuse.text import Context
from minimuse.train import MaskedLoss, tokenizer_losses
from minimuse.train_engine import checkpoint_activations, hidden_matrices
from minimuse.transformer import SuperRes, Transformer, TransformerConfig
from minimuse.utils import fast_bf16, pick_device
from minimuse.vqgan import VQGAN
from minimuse.vqgan_loss import SceneFeatures, VQGANLoss, feature_distance


class StageBudget(NamedTuple):
    """What one stage needs: FLOPs, and bytes on an accelerator that holds all of it."""

    stage: str
    steps: int
    batch: int  # global: of all accelerators together
    parameters: int  # of all its networks, frozen parts and the discriminator included
    trained: int
    step_flops: float  # of the global batch, forward and backward, the mean over the stage
    weights: int  # bytes, fp32
    gradients: int
    optimizer: int
    casts: int  # the bf16 copies of the weights, which autocast keeps from forward to backward
    activations: int  # bytes for each example, saved for the backward pass

    @property
    def flops(self) -> float:
        """FLOPs of the whole stage."""
        return self.steps * self.step_flops

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.optimizer + self.casts

    def examples(self, memory: float, shards: int = 1) -> int:
        """How many examples fit into `memory` bytes at most. `shards`: accelerators that share the fixed bytes."""
        return max(0, int((memory - self.fixed / shards) // self.activations))


# FLOPs of one image: both memories, all steps of both models, the decoder
SamplingFlops = NamedTuple("SamplingFlops", [(name, int) for name in ("memory", "base", "superres", "decoder")])

# --- counting ---------------------------------------------------------------------------------------------------------


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in `run()`, on any device. Attention counts as plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class _Autocast(TorchFunctionMode):
    """The rules of CUDA's autocast on any device: products in bf16 (if `bf16`), normalization in fp32."""

    def __init__(self, bf16: bool):
        super().__init__()
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.casts: dict[nn.Parameter, Tensor] = {}

    def cast(self, x: Any) -> Any:
        if isinstance(x, nn.Parameter):
            return self.casts.setdefault(x, x.to(self.dtype))
        return x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:  # a fused kernel saves q, k, v, its output, and a log-sum per query
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*map(self.cast, args[:3]))[0]
        if func in (F.linear, F.conv2d):
            args = tuple(map(self.cast, args))
        elif func in (F.group_norm, F.layer_norm):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def saved_bytes(run: Callable[[], Any], weights: nn.Module, bf16: bool = True) -> int:
    """Bytes that `run()` saves for its backward pass, each storage once, without the module `weights` itself."""
    own = [x.untyped_storage() for x in [*weights.parameters(), *weights.buffers()]]
    saved: list[torch.UntypedStorage] = []  # torch has one Python object for each storage while it lives

    def pack(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage())
        return x

    with _Autocast(bf16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    sizes = {id(storage): storage.nbytes() for storage in saved}
    return sum(size for key, size in sizes.items() if key not in set(map(id, own)))


def optimizer_bytes(parts: nn.Module, optimizer: str) -> int:
    """fp32 state: AdamW's two moments and step, Adafactor's row and column factors, or Muon's one moment."""
    hidden = {id(p) for p in hidden_matrices(parts)} if optimizer == "muon" else set()

    def numbers(p: nn.Parameter) -> int:
        if id(p) in hidden:
            return p.numel()
        if optimizer == "adafactor":
            return 1 + (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel())
        return 1 + 2 * p.numel()

    return 4 * sum(numbers(p) for p in parts.parameters() if p.requires_grad)


# --- the stages -------------------------------------------------------------------------------------------------------


def _inputs(config: TransformerConfig, text_tokens: int, batch: int) -> tuple[Tensor, Context, list[Tensor]]:
    """Tokens (B, N), a context (B, L, D_lm) and, for super-resolution, [low tokens (B, N_low)]."""
    tokens = torch.zeros(batch, config.tokens, dtype=torch.long)
    mask = torch.ones(batch, text_tokens, dtype=torch.bool)
    context = Context(torch.zeros(batch, text_tokens, config.text_width), mask)
    return tokens, context, [tokens.new_zeros(batch, config.low_grid**2)] if config.low_layers else []


def _networks(config: MuseConfig, stage: str) -> tuple[nn.Module, Callable[[int, int], Iterator[Tensor]]]:
    """A stage's networks, and (batch, step) -> the losses of a step, each for a backward pass of its own."""
    how = config.stages[stage]
    if stage in ("base", "superres"):
        networks = MaskedLoss(Transformer(config.base) if stage == "base" else SuperRes(config.superres))

        def losses(batch: int, step: int) -> Iterator[Tensor]:
            tokens, context, low = _inputs(networks.model.config, config.text_tokens, batch)
            masked = torch.ones_like(tokens, dtype=torch.bool)
            yield networks(tokens, masked, context, *(low or [None]), count=tokens.numel())[0]
    else:
        vqgan = VQGAN(config.finetuned_tokenizer if stage == "decoder" else getattr(config, stage))
        if stage == "decoder":
            vqgan.freeze_tokens()
        perceptual = feature_distance(SceneFeatures(1).requires_grad_(False)) if how.perceptual_weight else None
        weights = (how.perceptual_weight, how.adversarial_weight)
        loss = VQGANLoss(perceptual, *weights, how.adversarial_start, how.discriminator_width)
        networks = nn.ModuleList([vqgan, loss])
        size = min(how.crop or vqgan.config.image_size, vqgan.config.image_size)

        def losses(batch: int, step: int) -> Iterator[Tensor]:
            x = torch.zeros(batch, 3, size, size)
            for shares, _ in tokenizer_losses(vqgan, loss, x, step):
                yield next(iter(shares.values()))

    return networks, losses


def _mean_flops(losses: Callable[[int, int], Iterator[Tensor]], how: StageConfig) -> float:
    """FLOPs of one example and step, the mean over the stage: a discriminator costs nothing before its start."""
    late = min(how.adversarial_start, how.steps) / how.steps if how.adversarial_weight else 0
    shares = {how.adversarial_start - 1: late, how.adversarial_start: 1 - late}
    return sum(x * count_flops(lambda s=s: [loss.backward() for loss in losses(1, s)]) for s, x in shares.items() if x)


def parameter_counts(config: MuseConfig) -> dict[str, int]:
    """The number of parameters of each network, counted on the meta device, which takes no memory."""
    with torch.device("meta"):
        return {name: sum(p.numel() for p in part.parameters()) for name, part in build(config).items()}


def stage_budget(config: MuseConfig, stage: str, checkpointing: bool = False) -> StageBudget:
    """One stage of `config`. With `checkpointing`, layers and residual blocks run again for the backward pass."""
    if stage not in STAGES or stage not in config.stages:
        raise ValueError(f"no stage {stage!r} in {config.name!r}; known: {', '.join(config.stages)}")
    how = config.stages[stage]
    with torch.device("meta"):
        networks, losses = _networks(config, stage)
        if checkpointing:
            checkpoint_activations(networks)
        step_flops = how.batch * _mean_flops(losses, how)
        one, two = (saved_bytes(lambda n=n: next(losses(n, how.steps)), networks) for n in (1, 2))
    total = sum(p.numel() for p in networks.parameters())
    trained = sum(p.numel() for p in networks.parameters() if p.requires_grad)
    fixed = {"weights": 4 * total, "gradients": 4 * trained, "optimizer": optimizer_bytes(networks, how.optimizer)}
    saved = {"casts": 2 * one - two, "activations": two - one}
    return StageBudget(stage, how.steps, how.batch, total, trained, step_flops, **fixed, **saved)


def decode_flops(model: Transformer, how: SamplingConfig, text_tokens: int) -> tuple[int, int]:
    """FLOPs of the memories with and without text, and of all steps. A step with t = 0 has only one branch."""
    tokens, text, low = _inputs(model.config, text_tokens, 1)
    memories: list[Any] = []
    once = count_flops(lambda: memories.extend(model.memory(c, *low) for c in (text, null_text(text))))
    logits_fn, t = guided(model, *memories, how.guidance), get_guidance(how.guidance)
    progress = [i / (how.steps - 1) if how.steps > 1 else 1.0 for i in range(how.steps)]
    costs = {t(u) != 0: count_flops(partial(logits_fn, tokens, u)) for u in {t(u) != 0: u for u in progress}.values()}
    return once, sum(costs[t(u) != 0] for u in progress)


def sampling_flops(config: MuseConfig) -> SamplingFlops:
    """One image with the configuration's defaults, without the language model."""
    with torch.device("meta"), torch.no_grad():
        base_memory, base = decode_flops(Transformer(config.base), config.base_sampling, config.text_tokens)
        model = SuperRes(config.superres)
        superres_memory, superres = decode_flops(model, config.superres_sampling, config.text_tokens)
        vqgan = VQGAN(config.finetuned_tokenizer)
        decoder = count_flops(lambda: vqgan.decode(torch.zeros(1, config.superres.tokens, dtype=torch.long)))
    return SamplingFlops(base_memory + superres_memory, base, superres, decoder)


# --- hours and a report -----------------------------------------------------------------------------------------------


def matmul_ceiling(device: Any = None, dtype: torch.dtype | None = None, size: int = 2048, seconds: float = 1) -> float:
    """FLOP/s of a product of two (size, size) matrices on this idle machine, the median over `seconds`."""
    device = pick_device(device)
    a = torch.randn(size, size, device=device, dtype=dtype or (torch.bfloat16 if fast_bf16(device) else torch.float32))
    timer = benchmark.Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=seconds).median


def report(
    config: MuseConfig,
    accelerators: int = 1,
    *,
    ceiling: float | None = None,
    memory_gb: float | None = None,
    checkpointing: bool = False,
) -> str:
    """All of it as a table. ceiling: FLOP/s of an accelerator; None measures this machine. memory_gb: its memory."""
    if accelerators < 1 or any(value is not None and not value > 0 for value in (ceiling, memory_gb)):
        raise ValueError(f"{accelerators=}, {ceiling=}, {memory_gb=}; give at least 1 accelerator, and positive values")
    source = "matrix products measured here" if ceiling is None else "as given"
    rate = (ceiling or matmul_ceiling()) * accelerators
    row = "{:14}{:>10}{:>11}{:>7}{:>13}{:>13}{:>10}{:>10}{:>12}".format
    lines = [f"{config.name}: {accelerators} x {si(rate / accelerators, 'FLOP/s')}, {source}"]
    lines += [row("stage", "trained", "steps", "batch", "a step", "all steps", "fixed", "example", "at best")]
    budgets = [stage_budget(config, stage, checkpointing) for stage in STAGES if stage in config.stages]
    for b in budgets:
        amounts = [si(b.step_flops, "FLOP"), si(b.flops, "FLOP"), si(b.fixed, "B"), si(b.activations, "B")]
        lines.append(row(b.stage, si(b.trained, ""), f"{b.steps:,}", b.batch, *amounts, duration(b.flops / rate)))
    total = sum(b.flops for b in budgets)
    lines.append(row("all", "", "", "", "", si(total, "FLOP"), "", "", duration(total / rate)))
    lines.append("fixed: weights, gradients, optimizer, bf16 copies; example: activations saved for one example")
    image = sampling_flops(config)
    parts = ", ".join(f"{name} {si(flops, 'FLOP')}" for name, flops in image._asdict().items())
    lines += ["one image on one accelerator:", f"{parts}; at best {duration(sum(image) * accelerators / rate)}"]
    if memory_gb is None:
        return "\n".join(lines)
    for b in budgets:
        part, fit, sharded = -(-b.batch // accelerators), *(b.examples(memory_gb * 1e9, n) for n in (1, accelerators))
        if fit < part:
            lines.append(
                f"{b.stage}: {fit} of {part} fit, {sharded} with FSDP; accumulate, recompute, or use more of them"
            )
    return "\n".join([*lines, f"every other stage's batch fits in {memory_gb:g} GB, at best"])


def preview(data: TrainingData, most: int = 16) -> str:
    """Bytes of each cache and the time of one process to compute it, measured on the first images. Nothing is kept."""
    config, source = data.config, data.source

    def read() -> list[Example]:
        return list(islice(source.read(0, data.side, Problems()), most))

    if not (examples := read()):
        return "the first part of the data holds no usable image"
    captions = [text for e in examples for text in e.captions]
    known = hasattr(source, "__len__")
    n = len(source) if known else source.parts * sum(1 for _ in source.read(0, data.side, Problems()))
    caches = {"pixels": (3 * data.side**2 * min(data.pixels_limit, n), read)}
    for name in ("low", "high"):
        tokenizer = VQGAN(getattr(config, f"{name}_tokenizer")).to(data.device)
        small = area_downsample(torch.stack([e.image for e in examples]), data.side // tokenizer.config.image_size)
        size = n * tokenizer.config.grid**2 * (2 if tokenizer.codebook_size <= 2**16 else 4)
        caches[name] = size, partial(tokenize_images, tokenizer, small, bf16=data.bf16)
    text = n * sum(map(len, captions)) / len(examples) / 4 * config.base.text_width * 2  # four characters a token
    caches["text"] = text, partial(data.encode, captions)
    lines = [f"caches of about {n:,} images, and the time of one process:"]
    for name, (size, work) in caches.items():
        try:
            seconds = timeit(work, number=1) / len(examples) * n
        except OSError:  # the language model is not on this machine
            seconds = float("nan")
        lines.append(f"  {name:7}{si(size, 'B'):>9}  {duration(seconds):>10}")
    if text > config.text_gib * 2**30:
        lines[-1] += "; above text_gib: encoded at every step instead"
    return "\n".join(lines)


# --- numbers for people -----------------------------------------------------------------------------------------------


def si(x: float, unit: str) -> str:
    """1.5e12, "FLOP" -> "1.5 TFLOP": three digits and a prefix, powers of 1000."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"]
    while x >= 999.5 and len(prefixes) > 1:
        x /= 1000
        prefixes.pop(0)
    return f"{x:,.{2 if x < 9.995 else 1 if x < 99.95 else 0}f} {prefixes[0]}{unit}"


def duration(seconds: float) -> str:
    """Seconds -> "7.5 h", "3.2 min", "4.1 s" or "12.0 ms"."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"
