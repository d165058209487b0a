"""How public code bases sample: their schedules, orders, temperatures and noise, as arguments of `sampler.decode`.

Each says where its original differs from `decode`. T steps, u = i / (T - 1) progress; their guidance scale t, as in
`cfg.py`, is for reading only.
Not here: samplers of papers, and how both are called by name (`lab_samplers.py`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimuse.lab_optimum import schedule_of
from minimuse.lab_worlds import World
from minimuse.masking import SCHEDULES, Schedule
from minimuse.utils import NonNegative, check


class Target(NamedTuple):
    """What a sampler is made for."""

    n: int  # tokens
    codebook_size: int
    steps: int
    world: World | None = None  # knows p(x_i | all other tokens), which no network does

    def annealing(self, u: float) -> float:
        """1 - (i + 1) / T."""
        return (1 - u) * (self.steps - 1) / self.steps


def _raw_logit(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    return logits.gather(-1, drawn[..., None]).squeeze(-1)


def _muse_pytorch(to: Target, noise: float, softmax: Callable[[float], float] = lambda a: 1.0) -> dict[str, Any]:
    """One temperature noise * a, a = 1 - (i + 1) / T, for the draw and for the ranking of raw logits / softmax(a)."""
    return {
        "order": lambda logits, drawn, masked, u: _raw_logit(logits, drawn, masked, u) / softmax(to.annealing(u)),
        "sampling_temperature": lambda u: noise * to.annealing(u) * softmax(to.annealing(u)),
        "choice_temperature": check("the ranking noise", noise, NonNegative),
    }


def _titok(to: Target, noise: float) -> dict[str, Any]:
    return {"schedule": "arccos"} | _muse_pytorch(to, noise, lambda a: 0.5 + 0.8 * a)


def _equal_counts(to: Target, last: bool) -> Schedule:
    """Equal counts. What is left over goes to the last step, or one each to the first ones."""
    each, rest = divmod(to.n, to.steps)
    many = [each] * (to.steps - 1) + [each + rest] if last else [each + 1] * rest + [each] * (to.steps - rest)
    return schedule_of(many)


MUSE = {"schedule": "cosine", "order": "confidence", "sampling_temperature": 1.0, "choice_temperature": 0.0}
SAMPLER_PRESETS: dict[str, Callable[..., dict[str, Any]]] = {
    # Muse 2.8 to the letter, and what the others change; 24 steps.
    "muse": lambda to: MUSE,
    # google-research/maskgit: noise 4.5 (1 - (i + 1) / T); 12 steps, t = 0. With about as many steps as tokens the
    # original stops revealing once its curve leaves one token; ours reveals one.
    "maskgit": lambda to: {"choice_temperature": 4.5},
    # huggingface/diffusers AmusedScheduler: noise 2 (1 - i / (T - 1)); 12 steps, t = 9. Its cosine is float32, so
    # cos(pi / 3) of 256 tokens leaves 127, not 128.
    "amused": lambda to: {
        "schedule": lambda u: (torch.tensor(u) * math.pi / 2).cos().item(),
        "choice_temperature": lambda u: 2 * (1 - u),
    },
    # valeoai/Halton-MaskGIT: arccos, revealed tokens rounded down; 64 steps, t = 4. Its softmax temperature multiplies
    # the logits (1 to 1.2 sharpens). Not followed: it draws revealed tokens again, and each image has its own sequence.
    "halton": lambda to: {
        "schedule": lambda u: 1 - math.floor(to.n * (1 - SCHEDULES["arccos"](u)) + 1e-6) / to.n,
        "order": "halton",
    },
    # lucidrains/muse-maskgit-pytorch: ranks raw logits, top-k is V / 10; 18 steps, t = 2. Its steps see
    # linspace(0, 1, T), so T steps do the work of T - 1. Not followed: it may reveal none in a step.
    "lucidrains": lambda to: {
        "schedule": lambda u: math.cos(math.pi / 2 * min(1.0, u * to.steps / max(to.steps - 1, 1))) if u < 1 else 0.0,
        "order": _raw_logit,
        "sampling_temperature": to.annealing,
        "top_k": math.ceil((1 - 0.9) * to.codebook_size),
    },
    # viiika/Meissonic: the scheduler of aMUSEd; 64 steps (later 48), t = 8.
    "meissonic": lambda to: SAMPLER_PRESETS["amused"](to),
    # baaivision/MUSE-Pytorch: t rises from 0.
    "muse_pytorch": lambda to, noise=4.5: _muse_pytorch(to, noise),
    # bytedance/1d-tokenizer, TiTok-L-32: 8 steps, t rises from 0 to 4.5. MaskGen: 16 steps, t is a power-cosine of
    # power 1 from 1 to 12.
    "titok": lambda to, noise=9.5: _titok(to, noise),
    "maskgen": lambda to, noise=1.5: _titok(to, noise),
    # markweberdev/maskbit, 14 bits: 64 steps, t = "power-cosine:7.1:3". Not followed: halves of a token masked apart.
    "maskbit": lambda to: {"schedule": "arccos", "choice_temperature": 7.8},
    # ML-GSAI/LLaDA, low confidence, in one block: the surest argmax.
    "llada": lambda to: {"schedule": _equal_counts(to, last=False), "sampling_temperature": 0.0},
    # nanoMaskGIT (EPFL CS-503): places by their largest raw logit, drawn afterwards.
    "nanomaskgit": lambda to: {
        "schedule": _equal_counts(to, last=True),
        "order": lambda logits, drawn, masked, u: logits.amax(-1),
    },
}
