"""What a configuration costs before anyone rents a machine: parameters, bytes and FLOPs of its stages.

The real networks and losses run once on the meta device, which has shapes but no memory. A FLOP is one multiplication
or addition in a matrix product or convolution. Hours are FLOPs / `matmul_ceiling()`: a lower bound, not a forecast.
Bytes are those of fp32 weights, trained with bf16 autocast and fused attention, with prompts of `text_tokens` tokens.

Not counted: LPIPS, gradients of activations, temporary tensors, gaps; the data's preparation. See `preview` too.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from minimuse.config import STAGES, MuseConfig
from minimuse.data_cache import TrainingData
from minimuse.data_sources import Problems
from minimuse.eval_metrics import feature_distance
from minimuse.eval_networks import SceneFeatures
from minimuse.text import ENCODERS, Context, TextEncoder
from minimuse.train import MaskedLoss, tokenizer_losses
from minimuse.train_engine import checkpoint_activations, hidden_matrices
from minimuse.transformer import SuperRes, Transformer
from minimuse.utils import Positive, PositiveInt, check, fast_bf16, pick_device, require
from minimuse.vqgan import VQGAN
from minimuse.vqgan_loss import VQGANLoss


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


def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products and convolutions in `run()`, on any device. Attention counts as plain products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class _Autocast(TorchFunctionMode):
    """The rules of CUDA's autocast on any device: products in `dtype`, normalization in fp32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
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
    saved: dict[int, torch.UntypedStorage] = {}  # torch has one Python object for each storage while it lives

    def pack(x: Tensor) -> Tensor:
        saved[id(x.untyped_storage())] = x.untyped_storage()
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    own = [x.untyped_storage() for x in [*weights.parameters(), *weights.buffers()]]
    with _Autocast(torch.bfloat16 if bf16 else torch.float32), hooks:
        run()
    return sum(storage.nbytes() for key, storage in saved.items() if key not in set(map(id, own)))


def optimizer_bytes(parts: nn.Module, optimizer: str) -> int:
    """fp32 state: AdamW's two moments and step, Adafactor's row and column factors, or Muon's one moment."""
    hidden = {id(p) for p in hidden_matrices(parts)} if optimizer == "muon" else set()
    total = 0
    for p in filter(lambda p: p.requires_grad, parts.parameters()):
        factors = p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel()
        moments = factors if optimizer == "adafactor" else 2 * p.numel()
        total += p.numel() if id(p) in hidden else 1 + moments
    return 4 * total


def _networks(config: MuseConfig, stage: str) -> tuple[nn.Module, Callable[[int, int], Iterator[Tensor]]]:
    """A stage's networks, and (batch, step) -> the losses of a step, each for a backward pass of its own."""
    how = config.stages[stage]
    if stage in ("base", "superres"):
        model = getattr(config, stage)
        draft = (lambda low: low.new_zeros(len(low), model.tokens)) if model.draft else None
        networks = MaskedLoss((Transformer if stage == "base" else SuperRes)(model), draft)

        def losses(batch: int, step: int) -> Iterator[Tensor]:
            x = torch.zeros(batch, model.tokens, dtype=torch.long)
            texts = torch.zeros(batch, config.text_tokens, model.text_width)
            low = x.new_zeros(batch, model.low_grid**2) if model.low_layers else None
            yield networks(x, x == 0, Context(texts, texts[:, :, 0] == 0), low, x.numel())[0]
    else:
        vqgan = VQGAN(config.finetuned_tokenizer if stage == "decoder" else getattr(config, stage))
        if stage == "decoder":
            vqgan.freeze_tokens()
        perceptual = feature_distance(SceneFeatures(1).requires_grad_(False)) if how.perceptual != "none" else None
        weights = (how.perceptual_weight, how.adversarial_weight)
        loss = VQGANLoss(perceptual, *weights, how.adversarial_start, how.discriminator_width)
        networks = nn.ModuleList([vqgan, loss])
        size = min(how.crop or vqgan.config.image_size, vqgan.config.image_size)

        def losses(batch: int, step: int) -> Iterator[Tensor]:
            for shares, _ in tokenizer_losses(vqgan, loss, torch.zeros(batch, 3, size, size), step):
                yield next(iter(shares.values()))

    return networks, losses


def stage_budget(config: MuseConfig, stage: str, checkpointing: bool = False) -> StageBudget:
    """One stage of `config`. With `checkpointing`, layers and residual blocks run again for the backward pass."""
    known = [name for name in STAGES if name in config.stages and config.stages[name].steps]
    require(stage in known, f"no stage {stage!r} in {config.name!r}; known: {', '.join(known)}")
    how = config.stages[stage]
    late = min(how.adversarial_start, how.steps) if how.adversarial_weight else 0  # steps without a discriminator
    with torch.device("meta"):
        networks, losses = _networks(config, stage)
        if checkpointing:
            checkpoint_activations(networks)
        steps = {late - 1: late, late: how.steps - late}
        flops = {s: count_flops(lambda s=s: [loss.backward() for loss in losses(1, s)]) for s, n in steps.items() if n}
        one, two = (saved_bytes(lambda n=n: next(losses(n, how.steps)), networks) for n in (1, 2))
    total = sum(p.numel() for p in networks.parameters())
    trained = sum(p.numel() for p in networks.parameters() if p.requires_grad)
    fixed = {"weights": 4 * total, "gradients": 4 * trained, "optimizer": optimizer_bytes(networks, how.optimizer)}
    saved = {"casts": 2 * one - two, "activations": two - one}
    step_flops = how.batch * sum(n * flops.get(s, 0) for s, n in steps.items()) / how.steps
    return StageBudget(stage, how.steps, how.batch, total, trained, step_flops, **fixed, **saved)


def matmul_ceiling(device: Any = None, dtype: torch.dtype | None = None, size: int = 2048, seconds: float = 1) -> float:
    """FLOP/s of a product of two (size, size) matrices on this idle machine, the median over `seconds`."""
    device = pick_device(device)
    a = torch.randn(size, size, device=device, dtype=dtype or (torch.bfloat16 if fast_bf16(device) else torch.float32))
    timer = benchmark.Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=seconds).median


def report(
    config: MuseConfig, accelerators: int = 1, *, ceiling: float | None = None, memory_gb: float | None = None,
    checkpointing: bool = False,
) -> str:  # fmt: skip
    """All of it as a table. ceiling: FLOP/s of an accelerator; None measures this machine. memory_gb: its memory."""
    check("accelerators", accelerators, PositiveInt)
    for name, value in (("ceiling", ceiling), ("memory_gb", memory_gb)):
        check(name, 1 if value is None else value, Positive)
    source = "matrix products measured here" if ceiling is None else "as given"
    rate = (ceiling or matmul_ceiling()) * accelerators
    row = "{:14}{:>9}{:>10}{:>6}{:>12}{:>12}{:>9}{:>9}{:>10}  {}".format
    fits = "" if memory_gb is None else f"fits in {memory_gb:g} GB, with FSDP"
    lines = [f"{config.name}: {accelerators} x {si(rate / accelerators, 'FLOP/s')}, {source}"]
    lines += [row("stage", "trained", "steps", "batch", "a step", "all steps", "fixed", "example", "at best", fits)]
    trained = [name for name in STAGES if name in config.stages and config.stages[name].steps]
    budgets = [stage_budget(config, stage, checkpointing) for stage in trained]
    for b in budgets:
        amounts = [si(b.step_flops, "FLOP"), si(b.flops, "FLOP"), si(b.fixed, "B"), si(b.activations, "B")]
        if memory_gb is not None:
            alone, sharded = (b.examples(memory_gb * 1e9, shards) for shards in (1, accelerators))
            fits = f"{alone:,} of {-(-b.batch // accelerators)}, {sharded:,}"
        lines.append(row(b.stage, si(b.trained, ""), f"{b.steps:,}", b.batch, *amounts, duration(b.flops / rate), fits))
    total = sum(b.flops for b in budgets)
    lines.append(row("all", "", "", "", "", si(total, "FLOP"), "", "", duration(total / rate), ""))
    lines.append("fixed: weights, gradients, optimizer, bf16 copies; example: activations saved for one example")
    if memory_gb is not None:
        lines.append("where fewer fit than an accelerator's part of the batch: accumulate, recompute or shard")
    return "\n".join(line.rstrip() for line in lines)


def preview(data: TrainingData, most: int = 16) -> str:
    """About how many bytes each cache takes, estimated from the first images. Nothing is kept."""
    config, source = data.config, data.source
    read = partial(source.read, 0, data.side, Problems())
    if not (examples := list(islice(read(), most))):
        return "the first part of the data holds no usable image"
    n = min(data.count, len(source) if hasattr(source, "__len__") else source.parts * sum(1 for _ in read()))
    letters = sum(len(text) for e in examples for text in e.captions) / len(examples)
    sizes = {"pixels": 3 * data.side**2 * min(data.pixels_limit, n)}
    for name, part in (("low", config.low_tokenizer), ("high", config.high_tokenizer)):
        sizes[name] = n * part.grid**2 * (2 if part.codebook_size <= 2**15 else 4)
    sizes["text"] = n * letters / 4 * config.base.text_width * 2  # four characters a token, two bytes a number
    lines = [f"caches of about {n:,} images:", *(f"  {name:7}{si(size, 'B'):>9}" for name, size in sizes.items())]
    if sizes["text"] > config.text_gib * 2**30:
        lines[-1] += "; above text_gib: encoded at every step instead"
    stays = "for the whole run" if sizes["text"] > config.text_gib * 2**30 else "until the captions are embedded"
    if config.text_encoder:
        size, dtype = si(language_model_bytes(data.encoder), "B"), str(data.encoder.dtype).removeprefix("torch.")
        lines.append(f"language model: {size} on {data.encoder.device} in {dtype}, {stays}")
    return "\n".join(lines)


def language_model_bytes(encoder: TextEncoder) -> int:
    """Bytes of the LM's weights, from its configuration alone."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(encoder.source)
    make = getattr(transformers, ENCODERS.get(config.model_type.removesuffix("_text_model"), "AutoModel"))
    with torch.device("meta"):
        lm = getattr(make, "from_config", make)(getattr(config, "text_config", config))
    return encoder.dtype.itemsize * sum(p.numel() for p in lm.parameters())


def si(x: float, unit: str) -> str:
    """1.5e12, "FLOP" -> "1.50 TFLOP": three digits and a prefix, powers of 1000."""
    return re.sub(r"(?<=\d)(?=\D*$)", " ", tqdm.format_sizeof(x, unit))


def duration(seconds: float) -> str:
    """Seconds -> "7.5 h", "3.2 min", "4.1 s" or "12.0 ms"."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds * 1000:.1f} ms"
