"""How a stage trains, whatever it trains: one code path from a laptop to many accelerators.

Hugging Face accelerate does the distributed part: DDP and FSDP2 by `accelerate launch`, mixed precision, clipping. What
is ours makes a run repeatable:
    the examples of a step are a function of (seed, step); the draws of an example one of (seed, its place in the run)
    so 1 process, P processes and A micro-batches see the same masks and make the same gradient
    a stopped run goes on to the same weights, bit for bit: all there is to a state is saved, all else follows from it

Glossary: P processes, A micro-batches a step, a batch is the global one; a place counts examples since the first step.
Not here: what is trained (`train.py`), files (`train_state.py`).
"""

import hashlib
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    apply_activation_checkpointing,
)

from minimuse import train_state as runs
from minimuse.config import StageConfig
from minimuse.transformer import Layer, TextLayer
from minimuse.utils import precision
from minimuse.vqgan import ResBlock

RECOMPUTED = (Layer, TextLayer, ResBlock)  # what activation checkpointing runs again

# --- what follows from seed and step ----------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The examples of a step, (batch,): a function of seed and step alone. Each epoch is a permutation of all n."""
    places = range(step * batch, (step + 1) * batch)
    return torch.stack([_order(n, seed + 7919 * (p // n))[p % n] for p in places])


def mix(*numbers: int) -> int:
    """Whole numbers -> a seed that has nothing to do with that of other numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that is a function of the numbers, such as (seed, place)."""
    return torch.Generator().manual_seed(mix(*numbers))


def learning_rate(config: StageConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to 0 (Muse 3)."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    return (
        config.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))
    )


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices inside a transformer's layers, which Muon is for."""
    return [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and "layers." in name]


def make_optimizers(model: nn.Module, config: StageConfig) -> list[torch.optim.Optimizer]:
    """What trains a model: AdamW, Adafactor, or Muon for the matrices inside its layers and AdamW for the rest.

    Vectors (norms, biases) are not decayed. A group's `share` is of the learning rate.
    """
    hidden = hidden_matrices(model) if config.optimizer == "muon" else []
    others = {id(p) for p in hidden}
    slow = [p for name, p in model.named_parameters() if name.endswith("text.weight") and config.text_lr_scale < 1]
    others |= {id(p) for p in slow}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if slow:
        groups.append({"params": slow, "weight_decay": config.weight_decay, "share": config.text_lr_scale})
    if config.optimizer == "adafactor":
        # Deviation: Muse sets beta1 0.9 and beta2 0.96; torch's Adafactor has no beta1, and a beta2 that rises to 1
        return [torch.optim.Adafactor(groups, lr=config.learning_rate)]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    if not hidden:
        return [adamw]
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f'optimizer "muon" needs torch 2.9 or newer, {torch.__version__} is here; or take "adamw"')
    # updates as large as AdamW's, so that one learning rate serves both (Moonlight, arXiv 2502.16982)
    how = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return [torch.optim.Muon(hidden, **how), adamw]


def sync(tensor: Tensor, how: str) -> None:
    """In place, in all processes: the first one's numbers ("first"), or the largest of all ("max")."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if how == "first":
            torch.distributed.broadcast(tensor, 0)
        else:
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)


def checkpoint_activations(module: nn.Module) -> None:
    """Activation checkpointing, in place: layers and residual blocks keep only their input for the backward pass.

    Their forward pass then runs twice. The names in the state dict do not change.
    """
    wrapped = {part._checkpoint_wrapped_module for part in module.modules() if isinstance(part, CheckpointWrapper)}
    again = lambda part: isinstance(part, RECOMPUTED) and part not in wrapped  # noqa: E731
    apply_activation_checkpointing(module, check_fn=again)


# --- the engine -------------------------------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """The run was told to stop (Ctrl-C, SIGTERM); what it had done is saved.

    No Exception: a signal may come while an image is decoded, and that one is not damaged.
    """


class Engine:
    """The processes and devices at hand, and how steps are done on them. A run has one, shared by its stages.

    seed        all draws of the run follow from it
    bf16        None: where it is fast, or as `accelerate launch --mixed_precision` says
    accumulate  A, micro-batches a step: less memory, the same gradient
    compile     torch.compile the modules; recompute: activation checkpointing, about a third more work for less memory
    folder      where states are saved, each stage in a folder of its own; None saves nothing
    keep        states kept of a stage; 0 keeps all, for `average`
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        bf16: bool | None = None,
        accumulate: int | None = None,
        compile: bool = False,
        recompute: bool = False,
        folder: str | Path | None = None,
        keep: int = 2,
    ):
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device is not None and torch.device(device).type == "cpu")
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        if self.device.type == "cpu":  # several processes get "cpu:0", "cpu:1": moving there would copy each tensor
            self.device = torch.device("cpu")
        self.processes, self.is_main = self.accelerator.num_processes, self.accelerator.is_main_process
        told = self.accelerator.mixed_precision  # by `accelerate launch`; fp16 and fp8 are accelerate's own affair
        self.bf16 = bf16 if told == "no" else told == "bf16"
        self.accumulate = accumulate or self.accelerator.gradient_accumulation_steps
        self.seed, self.compile, self.recompute = seed, compile, recompute
        self.folder, self.keep = folder and Path(folder), keep
        self.signal, self.stepping = 0, False
        if compile:  # the balance of a tokenizer's losses walks back through its network more than once
            from torch._functorch import config as functorch

            functorch.donated_buffer = False
        if self.accumulate < 1 or keep < 0:
            raise ValueError(
                f"accumulate={accumulate}, keep={keep}; give at least one micro-batch, and 0 or more states"
            )

    @property
    def sharded(self) -> bool:
        """Are the parameters spread over the processes (FSDP2)?"""
        return getattr(self.accelerator, "is_fsdp2", False)

    def prepare(self, module: nn.Module, optimizers: list[torch.optim.Optimizer], shard: bool) -> tuple[Any, ...]:
        """Module and optimizers as accelerate wraps them. In a sharded run, small modules may train by DDP instead."""
        if not self.sharded or shard:
            return self.accelerator.prepare(module, *optimizers)
        ids = [self.device.index] if self.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(module.to(self.device), device_ids=ids)
        return wrapped, *(self.accelerator.prepare_optimizer(o) for o in optimizers)

    def heed_signals(self) -> None:
        """From now on Ctrl-C and SIGTERM finish the step, save, and raise Stopped; a second one ends at once.

        Between two steps, as while validating, the next one is finished first, so that what is done is saved.
        """

        def stop(number: int, frame) -> None:
            self.signal = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            if not self.stepping:
                raise Stopped

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    def must_stop(self, step: int) -> bool:
        """Was this process told to stop, or any of them? They ask each other every ten steps."""
        if self.processes == 1:
            return bool(self.signal)
        told = torch.tensor(float(bool(self.signal)), device=self.device)
        return step % 10 == 0 and bool(self.accelerator.reduce(told, "sum") > 0)

    def whole(self, module: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
        """A module that FSDP has sharded -> its like from `make`, with all weights in this process's memory."""
        if not self.sharded:
            return module
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        weights = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        whole = make()
        if self.is_main:
            whole.load_state_dict(weights)
        return whole

    def precision(self) -> AbstractContextManager:
        return precision(self.device, self.bf16)


class Stage:
    """One stage under way. Its modules are trained alike; `extra` are tensors that belong to its state; `shard` says
    whether FSDP, where the run has it, spreads the modules over the processes.

    >>> for step in stage.steps():
    ...     for at, draws in stage.micro_batches(n, step):
    ...         stage.backward(loss(at, draws) / stage.parts)
    ...     stage.update(step)
    ...     stage.end(step)
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        config: StageConfig,
        modules: dict[str, nn.Module],
        extra: dict[str, Tensor] | None = None,
        shard: bool = False,
    ):
        self.engine, self.name, self.config, self.sharded = engine, name, config, shard and engine.sharded
        self.parts = engine.accumulate * engine.processes
        if config.batch % self.parts:
            raise ValueError(
                f"{name}: a batch of {config.batch} does not split into {engine.processes} processes x "
                f"{engine.accumulate} micro-batches; make it a multiple of {self.parts}"
            )
        self.modules, self.optimizers, self.extra = {}, {}, dict(extra or {})
        engine.accelerator.free_memory()  # it holds on to the stage before
        for key, module in modules.items():
            module.zero_grad()  # or torch would not make the optimizer's state ahead of its first step, for `state`
            if engine.recompute:
                checkpoint_activations(module)
            if engine.compile:
                module.compile()
            self.modules[key], *self.optimizers[key] = engine.prepare(module, make_optimizers(module, config), shard)
        self.trained = [p for p in self.modules["model"].parameters() if p.requires_grad]
        if config.ema:
            self.extra |= {f"ema.{i}": p.detach().clone() for i, p in enumerate(self.trained)}
        self.folder = engine.folder and engine.folder / name
        self.first = 0
        if self.folder and runs.states(self.folder):
            self.first = runs.load_state(self.folder, self.state(), self.about(), sharded=self.sharded)

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, alive: written to disk, and read back in place."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict as optimizer_state

        tensors, flat = {}, StateDictOptions(flatten_optimizer_state_dict=True)
        for key, module in self.modules.items():
            inner = [optimizer.optimizer for optimizer in self.optimizers[key]]
            tensors |= {f"{key}.{k}": v for k, v in get_model_state_dict(module).items()}
            tensors |= {f"{key}.{k}": v for k, v in optimizer_state(module, inner, options=flat).items()}
        return {k: v for k, v in (tensors | self.extra).items() if isinstance(v, Tensor)}

    def about(self) -> dict[str, object]:
        """What a state must agree on with the run that reads it."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("save_every", "eval_every")}
        return {"stage": self.name, "seed": self.engine.seed, "config": config}

    def steps(self) -> Iterator[int]:
        """The steps still to do. The global draws (dropout, codebook restarts) of each are a function of the step."""
        self.engine.stepping = True
        try:
            for step in range(self.first, self.config.steps):
                torch.manual_seed(mix(self.engine.seed, step, self.engine.rank))
                yield step
        finally:
            self.engine.stepping = False
        if self.engine.signal:  # it came when the last step was saved already
            raise Stopped

    def places(self, step: int) -> range:
        """The places of the whole batch of a step."""
        return range(step * self.config.batch, (step + 1) * self.config.batch)

    def draws(self, places: range) -> list[torch.Generator]:
        """A generator for each example, by its place in the run."""
        return [generator(self.engine.seed, place) for place in places]

    def micro_batches(self, n: int, step: int) -> Iterator[tuple[Tensor, list[torch.Generator]]]:
        """-> this process's share of a step, A times: indices (b,), and a generator for each example.

        Gradients are summed over the processes at the last one alone.
        """
        engine, at = self.engine, batch_indices(n, self.config.batch, step, self.engine.seed)
        for module in self.modules.values():
            module.zero_grad()
        for k in range(engine.accumulate):
            size = self.config.batch // self.parts
            mine = slice((k * engine.processes + engine.rank) * size, (k * engine.processes + engine.rank + 1) * size)
            with ExitStack() as stack:
                for module in self.modules.values() if k < engine.accumulate - 1 else ():
                    stack.enter_context(self._no_sync(module))
                yield at[mine], self.draws(self.places(step)[mine])

    def _no_sync(self, module: nn.Module) -> AbstractContextManager:
        if self.sharded:
            return self.engine.accelerator.no_sync(module)
        return getattr(module, "no_sync", nullcontext)()  # of DDP; a single process has nothing to wait for

    def backward(self, share: Tensor) -> None:
        """A share of the step's loss: those of all micro-batches and processes add up to it."""
        accelerator = self.engine.accelerator  # which averages over processes, and divides by its own accumulation
        accelerator.backward(share * self.engine.processes * accelerator.gradient_accumulation_steps)

    def update(self, step: int, key: str = "model") -> None:
        """Clip, one optimizer step at the step's rate, the moving average."""
        trained = [p for p in self.modules[key].parameters() if p.requires_grad]
        self.engine.accelerator.clip_grad_norm_(trained, self.config.clip)
        for optimizer in self.optimizers[key]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config, step) * group.get("share", 1.0)
            optimizer.step()
        if self.config.ema and key == "model":
            torch._foreach_lerp_(self._ema(), [p.detach() for p in self.trained], 1 - self.config.ema)

    def _ema(self) -> list[Tensor]:
        return [self.extra[f"ema.{i}"] for i in range(len(self.trained))]

    def total(self, shares: list[dict[str, Tensor]]) -> dict[str, float]:
        """Figures of the micro-batches, each a share -> their sums, over all processes too, as numbers."""
        values = torch.stack([sum(share[k].detach().float() for share in shares) for k in shares[0]])
        if self.engine.processes > 1:
            values = self.engine.accelerator.reduce(values, "sum")
        return dict(zip(shares[0], values.tolist(), strict=True))

    def end(self, step: int) -> None:
        """A step is done: save where it is time to, stop where we were told to."""
        engine, done = self.engine, step + 1
        stop = engine.must_stop(done)
        if done == self.config.steps and self.config.ema:
            for p, mean in zip(self.trained, self._ema(), strict=True):
                p.detach().copy_(mean)
        if self.folder and (stop or done == self.config.steps or done % self.config.save_every == 0):
            self.save(done)
        if stop:
            raise Stopped

    def save(self, done: int) -> None:
        """Everything into `folder/step-...`; all processes call it."""
        engine, state, about = self.engine, self.state(), self.about()
        wait = engine.accelerator.wait_for_everyone
        if self.sharded:
            runs.save_state(self.folder, done, state, about, engine.keep, main=engine.is_main, wait=wait)
        elif engine.is_main:
            runs.save_state(self.folder, done, state, about, engine.keep)
        wait()
