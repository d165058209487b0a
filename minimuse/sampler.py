"""Iterative parallel decoding over any LogitsFn (Muse 2.8; MaskGIT, arXiv 2202.04200).

    all [MASK] -> predict every masked token -> fix the most confident ones -> predict the rest -> ... -> no [MASK]

`decode` knows nothing of networks: a LogitsFn (tokens (B, N), u) -> logits (B, N, V) is all it asks for. Its axes are
independent, each a plain function that you may replace:
    how many are revealed   schedule: a curve, or an adaptive rule (logits, masked, u) -> (B,), such as `entropy_bound`
    which are revealed      order: (logits, drawn, masked, u) -> scores (B, N), the highest are kept
    what is drawn           sampling_temperature, top_k
    how noisy the ranking   choice_temperature, annealed linearly to 0
Both temperatures may be functions of u, for any other annealing.

Randomness: uniforms from CPU generators, two a token a step (value and ranking), drawn before the loop. One seed makes
the same draws on a laptop and on a GPU; with a generator an image, image i never depends on its neighbours.
Not here: the schedules (`masking.py`), guidance (`cfg.py`).
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minimuse.masking import Draws, Schedule, reveal_counts, uniforms
from minimuse.utils import require_positive

LogitsFn = Callable[[Tensor, float], Tensor]
Order = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # drawn (B, N): the picture filled in, known tokens kept
Count = Schedule | Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class SamplingConfig:
    """How one transformer decodes (Muse 2.8); the defaults of `Muse.generate`."""

    steps: int  # T; the paper: 24 for 256 tokens, 8 for 4096
    guidance: tuple[float, float]  # t at the first and at the last step (2.7: t rises linearly)
    schedule: str = "cosine"
    order: str = "confidence"
    sampling_temperature: float = 1.0
    choice_temperature: float = 4.5  # noise of the ranking, annealed to 0 (MaskGIT's released value)

    def __post_init__(self):
        require_positive(self, "steps")


class Step(NamedTuple):
    """One step of a decode."""

    index: int  # 0 .. T-1
    u: float  # progress that guidance and network saw: index / (T - 1)
    tokens: Tensor  # (B, N) after the step, mask_id where still masked
    masked: Tensor  # (B, N) bool, True = still masked after the step
    revealed: Tensor  # (B, N) bool, True = fixed in this step
    confidence: Tensor  # (B, N) probability of the token drawn in this step; 0 where the token was known
    stage: str = ""  # the model at work and its guidance, filled in by `Muse`
    guidance: float = 0.0


# --- which: the orders ------------------------------------------------------------------------------------------------


def confidence(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """log p(drawn), (B, N): Muse 2.8 and MaskGIT."""
    return logits.gather(-1, drawn[..., None]).squeeze(-1) - logits.logsumexp(-1)


def margin(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """p(first) - p(second), (B, N): sure where the runner-up is far behind."""
    top = logits.softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """minus the entropy in nats, (B, N): sure where the whole distribution is narrow."""
    return -token_entropy(logits)


def random(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """Zeros, (B, N): `decode` breaks ties at random."""
    return torch.zeros_like(drawn, dtype=torch.float)


def raster(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """Row by row from the top left, (B, N): an autoregressive model's order."""
    return -torch.arange(drawn.shape[1], device=drawn.device).float().expand_as(drawn)


def halton(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """Tokens revealed together lie far apart, (B, N): the 2-D Halton sequence (arXiv 2503.17076)."""
    side = math.isqrt(drawn.shape[1])
    if side * side != drawn.shape[1]:
        raise ValueError(f"{drawn.shape[1]} tokens are no square; pass order=by_rank(halton_rank(h, w))")
    return by_rank(halton_rank(side, side))(logits, drawn, masked, u)


ORDERS: dict[str, Order] = {f.__name__: f for f in (confidence, random, raster, halton, entropy, margin)}


def by_rank(rank: Tensor) -> Order:
    """rank (N,), 0 = first -> an order that reveals positions by it."""
    return lambda logits, drawn, masked, u: -rank.to(drawn.device).float().expand_as(drawn)


def halton_rank(h: int, w: int) -> Tensor:
    """(h*w,) long: the place of each cell in the Halton sequence of bases 2 (rows) and 3 (columns)."""

    def radical_inverse(i: int, base: int) -> float:
        x, scale = 0.0, 1.0 / base
        while i:
            i, digit = divmod(i, base)
            x, scale = x + digit * scale, scale / base
        return x

    rank, i = {}, 1
    while len(rank) < h * w:
        rank.setdefault(int(radical_inverse(i, 2) * h) * w + int(radical_inverse(i, 3) * w), len(rank))
        i += 1
    return torch.tensor([rank[cell] for cell in range(h * w)])


# --- how many: adaptive rules -----------------------------------------------------------------------------------------


def token_entropy(logits: Tensor) -> Tensor:
    """logits (..., V) -> entropy in nats (...)."""
    p = logits.softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1)  # 0 log 0 = 0: exact worlds hold impossible tokens


def entropy_bound(bound: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    """A rule that reveals as many of the surest tokens as keep their summed entropy within `bound` nats.

    Tokens drawn together are drawn independently; the error of that is at most the sum of their entropies.
    Use it with order="entropy", which reveals in the same order as it counts.
    """
    if not bound >= 0:
        raise ValueError(f"an entropy bound of {bound} reveals nothing; give 0 nats or more")

    def rule(logits: Tensor, masked: Tensor, u: float) -> Tensor:
        spent = token_entropy(logits).masked_fill(~masked, math.inf).sort(1).values.cumsum(1)
        return (spent <= bound).sum(1)

    return rule


def _is_adaptive(schedule: object) -> bool:
    """True for a callable of three arguments (logits, masked, u); a curve takes one."""
    if not callable(schedule):
        return False
    try:
        parameters = inspect.signature(schedule).parameters.values()
    except (TypeError, ValueError):  # some C functions have no signature; they are curves
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == 3


# --- what: drawing ----------------------------------------------------------------------------------------------------


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """logits (B, N, V), uniforms (B, N) -> tokens (B, N): inverse CDF of softmax(logits / temperature); 0 is argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature if temperature != 1 else logits
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    cdf = logits.softmax(-1).cumsum_(-1)
    point = (
        uniforms.clamp(max=1 - 2**-22)[..., None] * cdf[..., -1:]
    )  # strictly below the last entry, rounding included
    return torch.searchsorted(cdf, point, right=True).squeeze(-1)


# --- decode -----------------------------------------------------------------------------------------------------------


def decode(
    logits_fn: LogitsFn,
    tokens: Tensor,
    *,
    mask_id: int,
    steps: int,
    schedule: str | Count = "cosine",
    order: str | Order = "confidence",
    sampling_temperature: float | Callable[[float], float] = 1.0,
    choice_temperature: float | Callable[[float], float] = 0.0,
    top_k: int | None = None,
    remask: bool = False,
    generator: Draws = None,
) -> Iterator[Step]:
    """tokens (B, N), mask_id where unknown -> a Step at a time until none is masked; the last holds the whole decode.

    Of T steps, step i sees u = i / (T - 1) and leaves the schedule's ratio at (i + 1) / T of the tokens that were
    masked at the start, counted for each image. Known tokens are never touched; a revealed one stays (Muse 2.8).
    An image with n < T masked tokens joins at step T - n: it takes n steps, and sees the guidance of the last ones.
    An adaptive rule may finish early; in the last of its T steps all that is left is revealed.
    Deviation: with `remask` each step keeps the best of all tokens but the given ones, as many as would stand without
    it, so that a revealed one may be masked again (Token-Critic, arXiv 2209.04439). The order then judges them too.

    >>> *_, last = decode(logits_fn, torch.full((1, 64), mask_id), mask_id=mask_id, steps=12)
    """
    rank_by = _check(tokens, steps, order, sampling_temperature, choice_temperature, top_k)
    heat = sampling_temperature if callable(sampling_temperature) else lambda u: sampling_temperature
    b, n = tokens.shape
    draws = uniforms(b, steps, 2, n, generator=generator).to(tokens.device)  # (B, T, 2, N), ahead of the loop
    free = masked = tokens == mask_id
    adaptive = _is_adaptive(schedule)
    plan = None if adaptive else _plan(masked, steps, schedule)
    if not masked.any():
        none = torch.zeros_like(masked)
        yield Step(0, 0.0, tokens, none, none, none.float())
    for i in range(steps):
        left = masked.sum(1)
        if (plan is not None and not plan[i].any()) or (adaptive and not left.any()):
            continue
        u = i / (steps - 1) if steps > 1 else 1.0
        logits = logits_fn(tokens, u).float()
        drawn = torch.where(masked, draw(logits, draws[:, i, 0], heat(u), top_k), tokens)
        if plan is not None:
            reveal = plan[i].to(tokens.device)
        else:
            reveal = left if i == steps - 1 else torch.minimum(schedule(logits, masked, u).clamp(min=1), left)
        gumbel = -torch.log(-torch.log(draws[:, i, 1].clamp(1e-20, 1 - 1e-7)))
        noise = choice_temperature(u) if callable(choice_temperature) else choice_temperature * (1 - (i + 1) / steps)
        sure = confidence(logits, drawn, masked, u)
        judged = sure if rank_by is confidence else rank_by(logits, drawn, masked, u)
        scores = judged + noise * gumbel
        pool, keep = (free, reveal + (free & ~masked).sum(1)) if remask else (masked, reveal)
        kept = _highest(scores.clamp(min=-1e30).masked_fill(~pool, -math.inf), gumbel, keep) & pool
        p = sure.exp().masked_fill(~masked, 0)
        revealed, masked = kept & masked, pool & ~kept
        tokens = drawn.masked_fill(masked, mask_id)
        yield Step(i, u, tokens, masked, revealed, p)


def _check(
    tokens: Tensor,
    steps: int,
    order: str | Order,
    sampling_temperature: float | Callable[[float], float],
    choice_temperature: float | Callable[[float], float],
    top_k: int | None,
) -> Order:
    """Refuse nonsense; give the order as a function."""
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.dtype != torch.long:
        raise ValueError(f"tokens {tuple(tokens.shape)} of {tokens.dtype}; give a (B, N) long tensor that is not empty")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}; give a whole number of at least 1")
    if any(not callable(t) and t < 0 for t in (sampling_temperature, choice_temperature)):
        raise ValueError(f"temperatures {sampling_temperature}, {choice_temperature}; give 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; give at least 1, or None for all")
    if not callable(order) and order not in ORDERS:
        known = ", ".join(ORDERS)
        raise ValueError(
            f"unknown order {order!r}; known: {known}; or pass a function (logits, drawn, masked, u) -> scores"
        )
    return order if callable(order) else ORDERS[order]


def _plan(masked: Tensor, steps: int, schedule: str | Schedule) -> Tensor:
    """masked (B, N) -> how many each image reveals at each step, (T, B) on the CPU."""
    sizes = masked.sum(1).tolist()
    counts = {n: reveal_counts(n, steps, schedule) for n in set(sizes)}
    return torch.tensor([[0] * (steps - len(counts[n])) + counts[n] for n in sizes]).T


def _highest(scores: Tensor, ties: Tensor, counts: Tensor) -> Tensor:
    """scores (B, N), counts (B,) -> (B, N) bool, True at each row's `counts` highest; ties broken by `ties`."""
    by_tie = ties.argsort(1, descending=True)
    order = by_tie.gather(1, scores.gather(1, by_tie).argsort(dim=1, descending=True, stable=True))
    return order.argsort(1) < counts[:, None]
