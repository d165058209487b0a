"""Samplers by name: the presets of published code bases, a scoring network as an order, and what a measurement returns.

    preset_settings("maskgit", n=256, codebook_size=1024, steps=12) -> keyword arguments of `sampler.decode`

Each preset says where its code differs from `decode`. To add one, enter a function (n, codebook_size, steps) ->
keyword arguments in SAMPLER_PRESETS. n tokens, T steps, u = i / (T - 1) progress, NFE forward passes of an image.
Not here: adaptive rules such as `entropy_bound` (`sampler.py`); guidance, which is part of the LogitsFn (`cfg.py`).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimuse.lab_worlds import World
from minimuse.masking import SCHEDULES
from minimuse.sampler import Order, Step
from minimuse.utils import PositiveInt, check, require

GROUPS = 32  # samples form so many groups; intervals compare the groups


def _amused(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """huggingface/diffusers AmusedScheduler: MaskGIT with ranking noise 2, annealed by 1 - i / (T - 1).

    Its cosine is float32, so cos(pi / 3) of 256 tokens leaves 127, not 128.
    """
    return {
        "schedule": lambda u: (torch.tensor(u) * math.pi / 2).cos().item(),
        "choice_temperature": lambda u: 2 * (1 - u),
    }


def _halton(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """valeoai/Halton-MaskGIT: Halton order, no noise, the arccos curve; the number of revealed tokens is rounded down.

    Its softmax temperature multiplies the logits (1 to 1.2 sharpens).
    Not followed: it draws revealed tokens again at every step, and starts each image at another place of the sequence.
    """
    return {"schedule": lambda u: 1 - math.floor(n * (1 - SCHEDULES["arccos"](u)) + 1e-6) / n, "order": "halton"}


def _lucidrains(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """lucidrains/muse-maskgit-pytorch: ranks raw logits; top-k is V / 10; temperature anneals by 1 - (i + 1) / T.

    Its steps see linspace(0, 1, T), so T steps do the work of T - 1. Not followed: it may reveal none in a step.
    """
    last = max(steps - 1, 1)
    return {
        "schedule": lambda u: math.cos(math.pi / 2 * min(1.0, u * steps / last)) if u < 1 else 0.0,
        "order": lambda logits, drawn, masked, u: logits.gather(-1, drawn[..., None]).squeeze(-1),
        "sampling_temperature": lambda u: (1 - u) * (steps - 1) / steps,
        "top_k": math.ceil((1 - 0.9) * codebook_size),
    }


class SamplerPreset(NamedTuple):
    """How a code base samples by default: MaskGIT's schedule and order, no ranking noise, and what `changes` says."""

    steps: int
    guidance: float | None  # as Muse's t, which is w - 1 where l_g = l_u + w (l_c - l_u); None: the paper gives none
    changes: Callable[[int, int, int], dict[str, Any]]  # (n, codebook_size, steps) -> keyword arguments of `decode`


SAMPLER_PRESETS = {
    "muse": SamplerPreset(24, None, lambda n, v, t: {}),  # Muse 2.8 to the letter
    # google-research/maskgit: ranking noise 4.5, annealed by 1 - (i + 1) / T. With about as many steps as tokens the
    # original stops revealing once its curve leaves one token; ours reveals one at each step
    "maskgit": SamplerPreset(12, 0.0, lambda n, v, t: {"choice_temperature": 4.5}),
    "amused": SamplerPreset(12, 9.0, _amused),
    "halton": SamplerPreset(64, 4.0, _halton),
    "lucidrains": SamplerPreset(18, 2.0, _lucidrains),
}


def preset_settings(name: str, n: int, codebook_size: int, steps: int | None = None) -> dict[str, Any]:
    """-> the arguments of `decode` that sample n tokens as the named code base does, by default in its own steps."""
    known = isinstance(name, str) and name in SAMPLER_PRESETS
    require(known, f"unknown preset {name!r}; known: {', '.join(SAMPLER_PRESETS)}")
    preset = SAMPLER_PRESETS[name]
    sizes = {"n": n, "codebook_size": codebook_size, "steps": preset.steps if steps is None else steps}
    sizes = [check(size, value, PositiveInt) for size, value in sizes.items()]
    # all are set, so the defaults of a checkpoint do not replace them
    plain = {"schedule": "cosine", "order": "confidence", "sampling_temperature": 1.0, "choice_temperature": 0.0}
    return plain | {"steps": sizes[2]} | preset.changes(*sizes)


def critic(score: Callable[[Tensor], Tensor]) -> Order:
    """A score of tokens, (B, N) -> (B, N), high where one looks real -> an order (Token-Critic, arXiv 2209.04439)."""
    return lambda logits, drawn, masked, u: score(drawn)


def exact_score(world: World) -> Callable[[Tensor], Tensor]:
    """-> the score log p(x_i | all other tokens), (B, N): how well each token fits the others."""
    return lambda tokens: world.leave_one_out(tokens).gather(-1, tokens[..., None]).squeeze(-1)


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
