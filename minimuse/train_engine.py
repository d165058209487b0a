"""How a stage trains: one code path from a laptop to many accelerators, and a run that can be repeated.

Hugging Face accelerate does the distributed part: DDP and FSDP2 through `accelerate launch`, mixed precision, clipping.
The examples of a step depend only on (seed, step), the random draws of an example only on (seed, its place). So one
process, P processes and A micro-batches compute the same gradient, and a stopped run resumes bit for bit.

Glossary: P processes, A micro-batches a step. A batch is the global batch. A place counts examples since step 0.
Not here: what is trained (`train.py`), files (`train_state.py`).
"""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from minimuse import train_state, utils
from minimuse.config import StageConfig
from minimuse.transformer import Layer, TextLayer, Transformer
from minimuse.utils import Natural, OneSeed, PositiveInt, check, derive_seed, precision, require, seeded_generator
from minimuse.vqgan import ResBlock

EvalFn = Callable[[nn.Module, int], dict[str, float]]  # (model or its loss module, steps done) -> metrics for the log


class Progress(NamedTuple):
    """Where a stage stands after a step."""

    stage: str
    step: int  # steps done
    steps: int
    metrics: dict[str, float]  # the loss and whatever else the stage reports
    model: Any  # the module in training; at the end of a run the finished Muse


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended the run. All finished steps are saved."""


# --- batches, learning rates, optimizers ------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The examples of a step, (batch,): a function of seed and step only. Each epoch is a permutation of all n."""
    places = range(step * batch, (step + 1) * batch)
    return torch.stack([_order(n, seed + 7919 * (p // n))[p % n] for p in places])


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to 0 (Muse 3)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weight matrices inside a transformer's layers, which Muon trains."""
    return [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and "layers." in name]


def make_optimizers(model: nn.Module, config: StageConfig) -> list[torch.optim.Optimizer]:
    """AdamW, Adafactor, or Muon for the matrices inside the layers together with AdamW for the rest.

    Vectors (norms, biases) get no weight decay. `lr_scale` of a group multiplies the learning rate of the step.
    """
    hidden = hidden_matrices(model) if config.optimizer == "muon" else []
    slow = [p for name, p in model.named_parameters() if name.endswith("text.weight") and config.text_lr_scale < 1]
    others = {id(p) for p in hidden + slow}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if slow:
        groups.append({"params": slow, "weight_decay": config.weight_decay, "lr_scale": config.text_lr_scale})
    if config.optimizer == "adafactor":
        # Deviation: Muse uses beta1 0.9 and beta2 0.96. torch's Adafactor has no beta1, and its beta2 rises to 1.
        return [torch.optim.Adafactor(groups, lr=config.learning_rate)]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    if not hidden:
        return [adamw]
    # "match_rms_adamw" makes updates as large as AdamW's, so one learning rate serves both (arXiv 2502.16982)
    muon = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(hidden, **muon), adamw]


@torch.no_grad()
def init_from_codebook(model: Transformer, codebook: Tensor, low_codebook: Tensor | None = None) -> None:
    """Choice: before training, codes with similar vectors (V, d) get similar embeddings and output weights."""
    model.embed.codes.weight[:-1].copy_(0.5 * random_features(codebook, model.config.width))
    model.head.weight.copy_(0.02 * random_features(codebook, model.config.width))
    if low_codebook is not None:
        model.low_embed.codes.weight[:-1].copy_(0.5 * random_features(low_codebook, model.config.width))
        if model.config.draft:
            model.draft.weight.copy_(model.embed.codes.weight[:-1])


def random_features(vectors: Tensor, width: int) -> Tensor:
    """vectors (V, d) -> (V, width) of variance about 1, similar for near vectors (Rahimi and Recht 2007).

    The product of two rows, divided by the width, is about exp(-|a - b|^2 / (2 s^2)) with s half the median distance.
    """
    vectors = vectors.detach().float().cpu()  # on the CPU, so that a seed gives the same result on every machine
    distance = torch.cdist(vectors, vectors)
    scale = 0.5 * distance[distance > 0].median() if distance.any() else 1.0
    waves = torch.randn(vectors.shape[1], width) / scale
    return 2**0.5 * (vectors @ waves + 2 * math.pi * torch.rand(width)).cos()


def checkpoint_activations(module: nn.Module) -> None:
    """In place: a layer or residual block keeps only its input, and runs again in the backward pass."""
    for part in module.modules():
        if isinstance(part, Layer | TextLayer | ResBlock) and "forward" not in vars(part):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False)


class Engine:
    """The processes and devices of a run, shared by all its stages.

    seed fixes all random draws. bf16=None takes bf16 where it is fast, or what `accelerate launch` chose. accumulate:
    micro-batches a step. recompute: activation checkpointing, less memory for about a third more compute. folder:
    where states are saved, None saves nothing. keep: states kept for each stage; 0 keeps all, for `average`.
    """

    def __init__(
        self, *, seed: int = 0, device: str | torch.device | None = None, bf16: bool | None = None,
        accumulate: int | None = None, compile: bool = False, recompute: bool = False,
        folder: str | Path | None = None, keep: int = 2,
    ):  # fmt: skip
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device is not None and utils.pick_device(device).type == "cpu")
        found = self.accelerator.device  # on CPUs "cpu:0", "cpu:1"; moving there would copy each tensor
        self.device = torch.device("cpu") if found.type == "cpu" else found
        self.rank, self.processes = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        chosen = self.accelerator.mixed_precision  # by `accelerate launch`
        self.bf16 = bf16 if chosen == "no" else chosen == "bf16"
        self.precision = partial(precision, self.device, self.bf16)  # -> the autocast context of this run
        accumulate = self.accelerator.gradient_accumulation_steps if accumulate is None else accumulate
        self.accumulate, self.keep = check("accumulate", accumulate, PositiveInt), check("keep", keep, Natural)
        self.parts = self.accumulate * self.processes  # of a batch
        self.seed, self.compile, self.recompute = check("seed", seed, OneSeed), compile, recompute
        self.folder = folder and Path(folder)
        self.signal = 0  # number of the signal that asks the run to stop
        if compile:  # the adaptive weight of a tokenizer's losses needs more than one backward pass
            from torch._functorch import config as functorch

            functorch.donated_buffer = False

    def check_batches(self, stages: dict[str, StageConfig]) -> None:
        """ValueError unless the batch of each stage splits into equal micro-batches of all processes."""
        for name, config in stages.items():
            shares = f"{self.processes} processes x {self.accumulate} micro-batches"
            hint = f"a batch of {config.batch} does not split into {shares}; make it a multiple of {self.parts}"
            require(config.batch % self.parts == 0, f"{name}: {hint}")

    def handle_signals(self) -> None:
        """From now on Ctrl-C and SIGTERM finish the step, save and raise Stopped. A second one ends at once."""

        def request_stop(number: int, frame: Any) -> None:
            self.signal = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, request_stop)

    def check_stop(self) -> None:
        """Raise Stopped if this process got a signal."""
        if self.signal:
            raise Stopped

    def gather_full_model(self, module: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
        """A module that FSDP has sharded -> a new one from `make` with all weights, in every process."""
        if not self.accelerator.is_fsdp2:
            return module
        full = make()
        full.load_state_dict(get_model_state_dict(module, options=StateDictOptions(full_state_dict=True)))
        return full


class Stage:
    """A stage under way: its modules with their optimizers, its place in the run, its states.

    A step is `backward` for each of `micro_batches`, then `finish`. extra: tensors that belong to the state besides
    weights and optimizers. wrap: let accelerate wrap the only module, in DDP or FSDP. Otherwise modules stay as they
    are, and `finish` averages their gradients over the processes.
    """

    def __init__(
        self, engine: Engine, name: str, config: StageConfig, modules: dict[str, nn.Module],
        extra: dict[str, Tensor] | None = None, wrap: bool = False,
    ):  # fmt: skip
        from accelerate.utils import broadcast

        engine.check_batches({name: config})
        self.engine, self.name, self.config, self.wrap = engine, name, config, wrap
        self.modules = dict(modules)
        self.optimizers: dict[str, list[torch.optim.Optimizer]] = {}
        self.metrics: dict[str, Tensor] = {}
        engine.accelerator.free_memory()  # it would keep the modules of the stage before
        for key, module in modules.items():
            module.zero_grad()  # otherwise torch does not make the optimizer's state before its first step
            if engine.recompute:
                checkpoint_activations(module)
            if engine.compile:
                module.compile()
            self.optimizers[key] = make_optimizers(module, config)
            if wrap:
                self.modules[key], *_ = engine.accelerator.prepare(module, *self.optimizers[key])
            else:
                broadcast([p.data for p in module.parameters()])  # all processes start with the first one's weights
        self.trained = {k: [p for p in m.parameters() if p.requires_grad] for k, m in self.modules.items()}
        self.averages = [p.detach().clone() for p in self.trained["model"]] if config.ema else []
        self.extra = (extra or {}) | {f"ema.{i}": average for i, average in enumerate(self.averages)}
        self.folder = engine.folder and engine.folder / name
        self.first = 0
        if self.folder and train_state.states(self.folder):
            self.first = train_state.load_state(self.folder, self.state, self.about())

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on. They are written to disk, and read back in place."""
        tensors: dict[str, Any] = dict(self.extra)
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        for key, module in self.modules.items():
            for part in get_state_dict(module, self.optimizers[key], options=flat):
                tensors |= {f"{key}.{name}": value for name, value in part.items()}
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}

    def about(self) -> dict[str, Any]:
        """The settings that a saved state and the run that reads it must share."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("save_every", "eval_every")}
        return {"stage": self.name, "seed": self.engine.seed, "config": config}

    def steps(self) -> Iterator[int]:
        """The steps still to do. torch's global random numbers (dropout) depend on the step only."""
        for step in range(self.first, self.config.steps):
            torch.manual_seed(derive_seed(self.engine.seed, step, self.engine.rank))
            yield step
        self.engine.check_stop()  # a signal may come after the last state is saved

    def generators(self, step: int) -> list[torch.Generator]:
        """A generator for each example of the global batch of a step, by its place in the run."""
        places = range(step * self.config.batch, (step + 1) * self.config.batch)
        return [seeded_generator(self.engine.seed, place) for place in places]

    def micro_batches(self, n: int, step: int) -> Iterator[tuple[Tensor, list[torch.Generator]]]:
        """-> this process's part of a step, A times: indices (b,) of n examples, and a generator for each."""
        engine, generators = self.engine, self.generators(step)
        at = batch_indices(n, self.config.batch, step, engine.seed)
        size = self.config.batch // engine.parts
        self.metrics = {}
        for module in self.modules.values():
            module.zero_grad()
        for k in range(engine.accumulate):
            start = (k * engine.processes + engine.rank) * size
            alone = self.wrap and k < engine.accumulate - 1  # processes sum their gradients only after the last one
            with engine.accelerator.no_sync(self.modules["model"]) if alone else nullcontext():
                yield at[start : start + size], generators[start : start + size]

    def backward(self, share: Tensor, **metrics: Tensor) -> None:
        """Backward pass of a share of the step's loss. The shares of all micro-batches and processes add up to it.

        metrics: other values that add up in the same way. `finish` returns their sums.
        """
        accelerator = self.engine.accelerator  # it averages over processes, and divides by its own accumulation steps
        accelerator.backward(share * self.engine.processes * accelerator.gradient_accumulation_steps)
        for key, value in metrics.items():
            self.metrics[key] = self.metrics.get(key, 0) + value.detach().float()

    def finish(self, step: int) -> dict[str, float]:
        """End of a step: optimizers, moving average, saving -> its metrics. Stopped if any process got a signal.

        ValueError if a metric, a gradient or a weight is not finite. Then nothing of the step is saved.
        """
        engine, done = self.engine, step + 1
        stop = torch.tensor(float(engine.signal), device=engine.device)
        summed = engine.accelerator.reduce(torch.stack([*self.metrics.values(), stop]), "sum")
        norms = {f"the gradient norm of the {key}": self.clip(key) for key in self.modules}
        values = torch.cat([summed, torch.stack([*norms.values()])]).tolist()  # the only wait for the device
        values = dict(zip([*self.metrics, "stop", *norms], values, strict=True))
        self.require_finite(done, values)
        self.update(step)
        if done == self.config.steps and self.averages:
            for p, average in zip(self.trained["model"], self.averages, strict=True):
                p.detach().copy_(average)
        if values["stop"] or done == self.config.steps or done % self.config.save_every == 0:
            norms = {f"the weight norm of the {k}": _whole(get_total_norm(p)).item() for k, p in self.trained.items()}
            self.require_finite(done, norms)
            if self.folder:
                train_state.save_state(self.folder, done, self.state(), self.about(), engine.keep, engine.accelerator)
        if values["stop"]:
            raise Stopped
        return {name: values[name] for name in self.metrics}

    def require_finite(self, done: int, values: dict[str, float]) -> None:
        """ValueError, with what to try, if a value is infinite or not a number."""
        for name, value in values.items():
            hint = f"nothing of this step is saved. Lower stages.{self.name}.learning_rate or raise its warmup"
            require(math.isfinite(value), f"{self.name} diverged at step {done}: {name} is {value}; {hint}")

    def clip(self, key: str) -> Tensor:
        """Average a module's gradients over the processes, unless accelerate did; clip them -> norm before, ()."""
        for p in self.trained[key] if self.engine.processes > 1 and not self.wrap else []:
            p.grad = None if p.grad is None else self.engine.accelerator.reduce(p.grad, "mean")
        norm = self.engine.accelerator.clip_grad_norm_(self.trained[key], self.config.clip)
        return _whole(norm).to(self.engine.device)

    def update(self, step: int) -> None:
        """One optimizer step at the step's learning rate, then the moving average.

        A module without gradients stays as it is, such as a discriminator that has not started.
        """
        for optimizer in (o for optimizers in self.optimizers.values() for o in optimizers):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, step) * group.get("lr_scale", 1.0)
            with nullcontext() if utils.fast_bf16(self.engine.device) else utils.NoBfloat16():
                optimizer.step()
        if self.averages:
            get_ema_multi_avg_fn(self.config.ema)(self.averages, [p.detach() for p in self.trained["model"]], None)


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
