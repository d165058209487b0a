"""Variable masking: schedules, mask rates, random masks, the masked loss (Muse 2.6).

    u in [0, 1] --schedule--> r, the ratio still masked, falling from 1 to 0

Decoding follows this curve: after step i of T, floor(n * schedule((i + 1) / T)) of the n tokens stay masked.
Training draws u uniformly, so r = schedule(u) has the distribution that decoding meets.
Not here: which positions are revealed, and what is drawn there (`sampler.py`).
"""

import math
import re
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.utils import Generators, Natural, Positive, PositiveInt, Rule, check, require, uniforms

Schedule = Callable[[float], float]
Ratio = Annotated[float, Rule(lambda x: -1e-6 <= x <= 1 + 1e-6, "a ratio within [0, 1]")]  # up to rounding


def power_schedule(p: float) -> Schedule:
    """u -> 1 - u ** p. p = 1 is linear, 2 square, 3 cubic, 1/2 sqrt (MaskGIT, table 3)."""
    p = check("the exponent of a schedule", p, Positive)
    return lambda u: 1 - u**p


def log_schedule(n: int) -> Schedule:
    """u -> -log(u) / log(n), at most 1: the one curve that depends on the number n >= 2 of tokens (MaskGIT)."""
    require(n >= 2, f"log_schedule({n}) does not fall; give at least 2 tokens")
    return lambda u: 1.0 if u * n <= 1 else -math.log(u) / math.log(n)


SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda u: math.cos(math.pi / 2 * u),  # Muse, MaskGIT
    "arccos": lambda u: 2 / math.pi * math.acos(u),  # the other reading of "truncated arccos": same mean, thinner tail
    "linear": power_schedule(1),
    "square": power_schedule(2),
    "cubic": power_schedule(3),
    "sqrt": power_schedule(0.5),
}
POWER = re.compile(r"pow(?=.*[1-9])\d*\.?\d*")
SCHEDULE_NAMES = "the name of a schedule: " + ", ".join([*SCHEDULES, "log, or a power such as pow2.5"])
ScheduleName = Annotated[str, Rule(lambda x: x in SCHEDULES or x == "log" or bool(POWER.fullmatch(x)), SCHEDULE_NAMES)]


def get_schedule(schedule: str | Schedule, n: int | None = None) -> Schedule:
    """A name ("cosine", "log", "pow2.5", ...) or a function u -> r -> the function. "log" needs n tokens."""
    if callable(schedule):
        return lambda u: check(f"the schedule at u = {u:.3g}", schedule(u), Ratio)
    name = check("schedule", schedule, ScheduleName)
    if name == "log":
        require(n is not None, '"log" depends on the number of tokens; pass log_schedule(n) instead of its name')
        return log_schedule(n)
    return SCHEDULES[name] if name in SCHEDULES else power_schedule(float(name[3:]))


def reveal_counts(n: int, steps: int, schedule: str | Schedule = "cosine") -> list[int]:
    """How many of n masked tokens each step reveals. They sum to n; every step reveals at least one.

    At least one token stays masked for each later step. With n < steps there are only n steps.

    >>> reveal_counts(256, 12)
    [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]
    """
    n = check("n", n, Natural)
    steps = min(n, check("steps", steps, PositiveInt))
    curve = get_schedule(schedule, max(n, 2))
    counts = []
    left = n
    before = 1.0
    for i in range(steps):
        u = (i + 1) / steps
        ratio = curve(u)
        require(ratio <= before + 1e-6, f"the schedule rises to {ratio:.3g} at u = {u:.3g}; it must fall from 1 to 0")
        before = ratio
        later = steps - 1 - i
        stay = min(max(math.floor(n * ratio + 1e-6), later), left - 1) if later else 0
        counts.append(left - stay)
        left = stay
    return counts


def sample_mask_rate(n: int, *, schedule: str | Schedule = "cosine", generator: Generators = None) -> Tensor:
    """One rate for each of n examples, (n,) float64 in [0, 1]: r = schedule(u), u uniform on [0, 1).

    Muse 2.6: for the cosine p(r) = (2 / pi) (1 - r^2)^(-1/2), mean 0.64 and P(r > 0.9) = 0.287.
    """
    require(check("n", n, Natural) <= 10**6, f"n is {n}; give at most 10**6 examples")
    curve = get_schedule(schedule)
    return torch.tensor([curve(u) for u in uniforms(n, generator=generator).tolist()], dtype=torch.double).clamp(0, 1)


def masked_counts(rate: Tensor, n: int) -> Tensor:
    """rate (B,) -> how many of n tokens to mask, (B,): ceil(r n). The rate k / n gives k in any precision."""
    require(bool(((rate >= 0) & (rate <= 1)).all()), f"mask rates {rate.tolist()}; give numbers from 0 to 1")
    rate = rate if rate.is_floating_point() else rate.double()
    return (rate.cpu().double() * n - 2 * n * torch.finfo(rate.dtype).eps).ceil().long()


def random_mask(tokens: Tensor, rate: Tensor, generator: Generators = None) -> Tensor:
    """tokens (B, N), rate (B,) -> masked (B, N) bool: True at exactly ceil(r N) random positions of each row."""
    require(tokens.ndim == 2, f"tokens have the shape {tuple(tokens.shape)}; give (B, N)")
    b, n = tokens.shape
    require(rate.shape == (b,), f"rate of shape {tuple(rate.shape)} for a batch of {b}; give one rate per example")
    place = uniforms(b, n, generator=generator).argsort(1).argsort(1)  # (B, N), a random permutation per row
    return (place < masked_counts(rate, n)[:, None]).to(tokens.device)


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, masked: Tensor, label_smoothing: float = 0.0, count: float | None = None
) -> Tensor:
    """logits (B, N, V), targets (B, N), masked (B, N) -> (): mean cross-entropy in nats over the masked tokens.

    Muse 2.3. A row with more masked tokens weighs more: rate r has the weight r p(r), normalized, in the expected loss.
    `count`: the masked tokens of the whole batch, if the rows are only a part of it.
    """
    hidden = targets.masked_fill(~masked, -100).flatten()  # cross_entropy ignores -100
    total = F.cross_entropy(logits.flatten(0, 1).float(), hidden, reduction="sum", label_smoothing=label_smoothing)
    return total / (masked.sum().clamp(min=1) if count is None else count)
