"""Samplers by name: the presets of published code bases, and what a measurement of a sampler returns.

    preset_settings("maskgit", n=256, codebook_size=1024, steps=12) -> keyword arguments of `sampler.decode`

Each preset says where its code differs from `decode`, and its default steps and guidance t. To add one, enter in
SAMPLER_PRESETS a function (n, codebook_size, steps) -> what differs from `_muse`.

n tokens, T steps, u = i / (T - 1) progress, NFE forward passes of an image.
Not here: adaptive rules such as `entropy_bound` (`sampler.py`); guidance, which is part of the LogitsFn (`cfg.py`).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimuse.masking import SCHEDULES
from minimuse.sampler import Step
from minimuse.utils import PositiveInt, check, require

GROUPS = 32  # samples form so many groups; intervals compare the groups


def _muse(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """Muse 2.8 to the letter, and what the others change: cosine, confidence, no ranking noise; 24 steps."""
    return {"schedule": "cosine", "order": "confidence", "sampling_temperature": 1.0, "choice_temperature": 0.0}


def _maskgit(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """google-research/maskgit: ranking noise 4.5, annealed by 1 - (i + 1) / T; 12 steps, t = 0.

    With about as many steps as tokens the original stops revealing once its curve leaves one token; ours reveals one.
    """
    return {"choice_temperature": 4.5}


def _amused(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """huggingface/diffusers AmusedScheduler: ranking noise 2, annealed by 1 - i / (T - 1); 12 steps, t = 9.

    Its cosine is float32, so cos(pi / 3) of 256 tokens leaves 127, not 128.
    """
    return {
        "schedule": lambda u: (torch.tensor(u) * math.pi / 2).cos().item(),
        "choice_temperature": lambda u: 2 * (1 - u),
    }


def _halton(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """valeoai/Halton-MaskGIT: Halton order, the arccos curve, revealed tokens rounded down; 64 steps, t = 4.

    Its softmax temperature multiplies the logits (1 to 1.2 sharpens).
    Not followed: it draws revealed tokens again at every step, and starts each image at another place of the sequence.
    """
    return {"schedule": lambda u: 1 - math.floor(n * (1 - SCHEDULES["arccos"](u)) + 1e-6) / n, "order": "halton"}


def _lucidrains(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """lucidrains/muse-maskgit-pytorch: ranks raw logits, top-k is V / 10, temperature 1 - (i + 1) / T; 18 steps, t = 2.

    Its steps see linspace(0, 1, T), so T steps do the work of T - 1. Not followed: it may reveal none in a step.
    """
    last = max(steps - 1, 1)
    return {
        "schedule": lambda u: math.cos(math.pi / 2 * min(1.0, u * steps / last)) if u < 1 else 0.0,
        "order": lambda logits, drawn, masked, u: logits.gather(-1, drawn[..., None]).squeeze(-1),
        "sampling_temperature": lambda u: (1 - u) * (steps - 1) / steps,
        "top_k": math.ceil((1 - 0.9) * codebook_size),
    }


SAMPLER_PRESETS = {
    "muse": _muse,
    "maskgit": _maskgit,
    "amused": _amused,
    "halton": _halton,
    "lucidrains": _lucidrains,
}


def preset_settings(name: str, n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """-> the arguments of `decode` that sample n tokens as the named code base does."""
    known = isinstance(name, str) and name in SAMPLER_PRESETS
    require(known, f"unknown preset {name!r}; known: {', '.join(SAMPLER_PRESETS)}")
    sizes = {"n": n, "codebook_size": codebook_size, "steps": steps}
    sizes = {size: check(size, value, PositiveInt) for size, value in sizes.items()}
    return {"steps": sizes["steps"]} | _muse(**sizes) | SAMPLER_PRESETS[name](**sizes)


class Outcome(NamedTuple):
    """What an evaluator measured of one sampler."""

    nfe: float  # mean forward passes of an image
    groups: dict[str, list[float]]  # metric -> a value for each group of samples
    bound: bool = False  # "kl" is an upper bound


def run(steps: Iterator[Step], remask: bool | None = False) -> tuple[Tensor, int]:
    """The steps of a decode -> its final tokens (B, N), and the forward passes of all its images together."""
    nfe = 0
    for step in steps:
        nfe += len(step.tokens) if remask else int(step.revealed.any(1).sum())
    return step.tokens, nfe


def check_samples(samples: Any) -> int:
    """-> the number of samples. ValueError unless they form GROUPS groups of at least two, and fit into memory."""
    samples = check("samples", samples, PositiveInt)
    good = 2 * GROUPS <= samples <= 2**18 and samples % GROUPS == 0
    require(good, f"samples is {samples}; give a multiple of {GROUPS}, from {2 * GROUPS} to {2**18}")
    return samples
