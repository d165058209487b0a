"""Variable masking: schedules, training rates, random masks, the masked loss and the likelihood bound (Muse 2.6).

    u in [0, 1] --schedule--> r, the ratio still masked, falling from 1 to 0

One curve serves twice. Decoding walks along it: after step i of T, floor(n * schedule((i + 1) / T)) of the n positions
stay masked. Training draws u uniformly, so that r = schedule(u) has the density that decoding will meet;
for the cosine p(r) = (2 / pi) (1 - r^2)^(-1/2) (Muse 2.6), whose mean is 2 / pi = 0.64.

Glossary: B batch, N tokens, V codebook size, u progress, r mask ratio.
Not here: which positions are revealed, and what is drawn there (`sampler.py`).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Schedule = Callable[[float], float]
Draws = torch.Generator | Sequence[torch.Generator] | None  # one for the whole batch, or one for each example


def power_schedule(p: float) -> Schedule:
    """u -> 1 - u ** p. p = 1 is linear, 2 square, 3 cubic, 1/2 sqrt (MaskGIT, table 3)."""
    if not p > 0:
        raise ValueError(f"a power schedule of exponent {p} does not fall from 1 to 0; give a positive exponent")
    return lambda u: 1 - u**p


def log_schedule(n: int) -> Schedule:
    """u -> -log(u) / log(n), at most 1: the one curve that depends on the number n of tokens (MaskGIT)."""
    if n < 2:
        raise ValueError(f"the log schedule needs at least 2 tokens, got {n}")
    return lambda u: 1.0 if u * n <= 1 else -math.log(u) / math.log(n)


SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda u: math.cos(math.pi / 2 * u),  # Muse, MaskGIT
    "arccos": lambda u: 2 / math.pi * math.acos(u),  # the other reading of "truncated arccos": same mean, thinner tail
    "linear": power_schedule(1),
    "square": power_schedule(2),
    "cubic": power_schedule(3),
    "sqrt": power_schedule(0.5),
}


def get_schedule(schedule: str | Schedule, n: int | None = None) -> Schedule:
    """A schedule by name ("cosine", "log", "pow2.5", ...) or as it is. "log" asks for the number n of tokens."""
    if callable(schedule):
        return schedule
    if schedule in SCHEDULES:
        return SCHEDULES[schedule]
    if schedule == "log" and n is not None:
        return log_schedule(n)
    if schedule == "log":
        raise ValueError('"log" depends on the number of tokens; pass log_schedule(n) instead of its name')
    if isinstance(schedule, str) and schedule.startswith("pow") and schedule[3:].replace(".", "", 1).isdigit():
        return power_schedule(float(schedule[3:]))
    known = ", ".join([*SCHEDULES, "log", "powP (such as pow2.5)"])
    raise ValueError(f"unknown schedule {schedule!r}; known: {known}; or pass any function u -> ratio still masked")


def reveal_counts(n: int, steps: int, schedule: str | Schedule = "cosine") -> list[int]:
    """How many of n masked tokens each step reveals; they sum to n, at least one a step.

    MaskGIT: after step i of T, floor(n * schedule((i + 1) / T)) stay masked; we keep enough for one a step to the end.
    With n < steps there are only n steps.

    >>> reveal_counts(256, 12)
    [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]
    """
    if n < 0 or steps < 1:
        raise ValueError(f"cannot reveal {n} tokens in {steps} steps; give n >= 0 and steps >= 1")
    curve, steps = get_schedule(schedule, n if n > 1 else 2), min(n, steps)
    counts, left = [], n
    for i in range(steps):
        ratio = curve((i + 1) / steps)
        if not -1e-6 <= ratio <= 1 + 1e-6:
            raise ValueError(f"the schedule gives {ratio} at u = {(i + 1) / steps:.3g}; it must stay within [0, 1]")
        stay = min(max(math.floor(n * ratio + 1e-6), steps - 1 - i), left - 1) if i < steps - 1 else 0
        counts.append(left - stay)
        left = stay
    return counts


def uniforms(*shape: int, generator: Draws = None) -> Tensor:
    """Uniforms in [0, 1) of shape (B, ...) from CPU generators: one, or one for each example.

    With a generator an example, row i never depends on its neighbours. On the CPU, a seed means the same everywhere.
    """
    each = list(generator) if isinstance(generator, Sequence) else [generator]
    if isinstance(generator, Sequence) and len(each) != shape[0]:
        raise ValueError(f"{len(each)} generators for a batch of {shape[0]}; give one, or one for each image")
    for g in each:
        if g is not None and g.device.type != "cpu":
            raise ValueError(
                f"a generator on {g.device}; give CPU generators, so that a seed means the same everywhere"
            )
    if not isinstance(generator, Sequence):
        return torch.rand(shape, generator=generator)
    return torch.stack([torch.rand(shape[1:], generator=g) for g in each])


def sample_mask_rate(n: int, *, schedule: str | Schedule = "cosine", generator: Draws = None) -> Tensor:
    """One rate for each of n examples, (n,) in [0, 1]: r = schedule(u), u uniform on [0, 1).

    Muse 2.6: for the cosine p(r) = (2 / pi) (1 - r^2)^(-1/2), mean 0.64 and P(r > 0.9) = 0.287.
    """
    curve = get_schedule(schedule)
    return torch.tensor([curve(u) for u in uniforms(n, generator=generator).tolist()])


def masked_counts(rate: Tensor, n: int) -> Tensor:
    """rate (B,) -> (B,) how many of n tokens that masks: ceil(r n)."""
    return (rate.cpu().double() * n - 1e-6).ceil().long()


def random_mask(tokens: Tensor, rate: Tensor, generator: Draws = None) -> Tensor:
    """tokens (B, N), rate (B,) -> masked (B, N) bool: True at exactly ceil(r N) random positions of each row."""
    b, n = tokens.shape
    if rate.shape != (b,):
        raise ValueError(f"rate of shape {tuple(rate.shape)} for a batch of {b}; give one rate an example, ({b},)")
    place = uniforms(b, n, generator=generator).argsort(1).argsort(1)  # (B, N) a random permutation a row
    return (place < masked_counts(rate, n)[:, None]).to(tokens.device)


def masked_cross_entropy(
    logits: Tensor, targets: Tensor, masked: Tensor, label_smoothing: float = 0.0, count: float | None = None
) -> Tensor:
    """logits (B, N, V), targets (B, N), masked (B, N) -> (): mean cross-entropy in nats where masked.

    Muse 2.3. The mean is over the masked tokens of the whole batch, not a mean of each row's mean. Where the rows are a
    part of a batch, `count` is how many tokens are masked in all of it: the parts' losses then add up to its mean.
    """
    hidden = targets.masked_fill(~masked, -100).flatten()
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), hidden, ignore_index=-100, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (masked.sum().clamp(min=1) if count is None else count)


def likelihood_bound(
    logits_fn: Callable[[Tensor], Tensor], tokens: Tensor, mask_id: int, generator: Draws = None
) -> Tensor:
    """tokens (B, N) -> (B,) one-sample estimates, in nats a token, of an upper bound on -log p(tokens) / N.

    D3PM's absorbing diffusion: -log p / N <= E over k uniform on 1..N of the mean cross-entropy with exactly k masked.
    It is fair to every training density: p(r) of Muse 2.6 only re-weights the integrand.
    `logits_fn` maps tokens (B, N) to logits (B, N, V).
    """
    b, n = tokens.shape
    k = (uniforms(b, generator=generator) * n).long() + 1
    masked = random_mask(tokens, k.double() / n, generator)
    logits = logits_fn(tokens.masked_fill(masked, mask_id))
    loss = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")  # (B, N)
    return (loss * masked).sum(1) / masked.sum(1)
