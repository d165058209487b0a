"""Iterative parallel decoding over any LogitsFn (Muse 2.8; MaskGIT, arXiv 2202.04200).

    all [MASK] -> predict every masked token -> keep the most confident ones -> predict the rest -> ... -> no [MASK]

`decode` needs only a LogitsFn (tokens (B, N), u) -> logits (B, N, V). You may replace each setting by a function:
    how many are revealed   schedule: a curve, or an adaptive rule (logits, masked, u) -> (B,), such as `entropy_bound`
    which are revealed      order: (logits, drawn, masked, u) -> scores (B, N), the highest are kept
    what is drawn           sampling_temperature: a number or a function of u; top_k
    how noisy the ranking   choice_temperature: a number that falls linearly to 0, or a function of u

Randomness: two uniforms per token and step, drawn before the loop from CPU generators, so equal on every machine.
Not here: the schedules (`masking.py`), guidance (`cfg.py`).
"""

import inspect
import math
import reprlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from minimuse.masking import Generators, Schedule, ScheduleName, reveal_counts, uniforms
from minimuse.utils import Checked, Natural, NonNegative, PositiveInt, Rule, check, require

LogitsFn = Callable[[Tensor, float], Tensor]
Order = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # drawn (B, N) holds the known tokens too
Count = Schedule | Callable[[Tensor, Tensor, float], Tensor]
Temperature = float | Callable[[float], float]
OrderName = Annotated[str, Rule(lambda x: x in ORDERS, "confidence, random, raster, halton, entropy or margin")]


@dataclass(frozen=True)
class SamplingConfig(Checked):
    """How one transformer decodes (Muse 2.8); the defaults of `Muse.generate`."""

    steps: PositiveInt  # T; the paper: 24 for 256 tokens, 8 for 4096
    guidance: tuple[float, float]  # t at the first and at the last step (2.7: t rises linearly)
    schedule: ScheduleName = "cosine"
    order: OrderName = "confidence"
    sampling_temperature: NonNegative = 1.0
    choice_temperature: NonNegative = 4.5  # Choice: noise of the ranking, annealed to 0, as in MaskGIT's released code


SETTINGS = get_type_hints(SamplingConfig, include_extras=True) | {"top_k": PositiveInt, "remask": bool}
FUNCTIONS = "guidance schedule order sampling_temperature choice_temperature".split()  # may be functions too


def check_settings(given: dict[str, Any], superres: bool = False) -> dict[str, Any]:
    """Settings by name -> those that are not None, with plain numbers; with `superres`, also one of this name."""
    known = SETTINGS | {"superres": dict} if superres else SETTINGS
    if unknown := check("superres", given, dict).keys() - known.keys():
        raise TypeError(f"unknown setting {', '.join(sorted(map(str, unknown)))}; known: {', '.join(sorted(known))}")
    settings = {name: value for name, value in given.items() if value is not None}
    for name, value in settings.items():
        if name == "superres":
            settings[name] = check_settings(value)
        elif name == "guidance" and not isinstance(value, tuple | list | Callable):
            settings[name] = check(name, value, float, "a number, a pair (first, last), or a function of u")
        elif name not in FUNCTIONS or not callable(value):
            settings[name] = check(name, value, known[name])
    return settings


class Step(NamedTuple):
    """One step of a decode."""

    index: int  # 0 .. T-1
    u: float  # progress that guidance and network saw: index / (T - 1)
    tokens: Tensor  # (B, N) after the step, mask_id where still masked
    masked: Tensor  # (B, N) bool, True = still masked after the step
    revealed: Tensor  # (B, N) bool, True = revealed in this step
    confidence: Tensor  # (B, N) probability of the token drawn in this step; 0 where the token was known
    stage: str = ""  # which model decodes, and its guidance: filled in by `Muse`
    guidance: float = 0.0


def confidence(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """log p(drawn), (B, N): Muse 2.8 and MaskGIT."""
    return logits.gather(-1, drawn[..., None]).squeeze(-1) - logits.logsumexp(-1)


def margin(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """p(first) - p(second), (B, N): high where the second most likely token is far behind."""
    top = logits.softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """Minus the entropy in nats, (B, N): high where the whole distribution is narrow."""
    return -token_entropy(logits)


def random_order(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """Zeros, (B, N): `decode` breaks ties at random."""
    return torch.zeros_like(drawn, dtype=torch.float)


def raster(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """Row by row from the top left, (B, N): the order of an autoregressive model."""
    return -torch.arange(drawn.shape[1], device=drawn.device).float().expand_as(drawn)


def halton(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    """Tokens revealed together lie far apart, (B, N): the 2-D Halton sequence (arXiv 2503.17076)."""
    side = math.isqrt(drawn.shape[1])
    require(side**2 == drawn.shape[1], "the tokens are not a square; pass order=by_rank(halton_rank(h, w))")
    return by_rank(halton_rank(side, side))(logits, drawn, masked, u)


ORDERS: dict[str, Order] = {
    f.__name__.removesuffix("_order"): f for f in (confidence, random_order, raster, halton, entropy, margin)
}


def get_order(order: str | Order) -> Order:
    """A name of `ORDERS` or a function -> the function."""
    return order if callable(order) else ORDERS[check("order", order, OrderName)]


def by_rank(rank: Tensor) -> Order:
    """rank (N,), 0 = first -> an order that reveals positions by rank."""
    return lambda logits, drawn, masked, u: -rank.to(drawn.device, non_blocking=True).float().expand_as(drawn)


@lru_cache(maxsize=16)
def halton_rank(h: int, w: int) -> Tensor:
    """(h*w,) long: the rank of each cell in the Halton sequence of bases 2 (rows) and 3 (columns)."""

    def radical_inverse(i: int, base: int) -> float:  # the digits of i, mirrored at the point
        return (i % base + radical_inverse(i // base, base)) / base if i else 0.0

    rank: dict[int, int] = {}
    i = 0
    while len(rank) < h * w:
        i += 1
        cell = int(radical_inverse(i, 2) * h) * w + int(radical_inverse(i, 3) * w)
        rank.setdefault(cell, len(rank))
    return torch.tensor([rank[cell] for cell in range(h * w)])


def token_entropy(logits: Tensor) -> Tensor:
    """logits (..., V) -> entropy in nats (...)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def entropy_bound(bound: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    """A rule that reveals the k tokens of lowest entropy, k as large as sum(H) - max(H) <= bound allows, in nats.

    EB-Sampler (arXiv 2505.24857): the bound limits the error of independent draws. Use it with order="entropy".
    """
    bound = check("the entropy bound", bound, NonNegative)

    def rule(logits: Tensor, masked: Tensor, u: float) -> Tensor:
        h = token_entropy(logits).masked_fill(~masked, math.inf).sort(1).values
        return (h.cumsum(1) - h <= bound).sum(1)  # not at known tokens: inf - inf is NaN

    return rule


def is_adaptive(schedule: object) -> bool:
    """True for a function of three required arguments (logits, masked, u). A curve takes one."""
    parameters = inspect.signature(schedule).parameters.values() if callable(schedule) else ()
    return sum(p.default is p.empty for p in parameters) == 3


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None = None) -> Tensor:
    """logits (B, N, V), uniforms (B, N) -> tokens (B, N): inverse CDF of softmax(logits / temperature); 0 is argmax.

    The CDF has the dtype of the uniforms. `decode` gives float64: next to 1, float32 has no place for 1e-9.
    """
    if temperature < 1e-30:  # float32 cannot divide by less
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=uniforms.dtype)
    below_one = uniforms.clamp(max=1 - 2 * torch.finfo(cdf.dtype).eps)[..., None]  # stay below the end of the CDF
    return torch.searchsorted(cdf, below_one * cdf[..., -1:], right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)


def decode(
    logits_fn: LogitsFn, tokens: Tensor, *, mask_id: int, steps: int,
    schedule: str | Count = "cosine", order: str | Order = "confidence",
    sampling_temperature: Temperature = 1.0, choice_temperature: Temperature = 0.0,
    top_k: int | None = None, remask: bool = False, generator: Generators = None,
) -> Iterator[Step]:  # fmt: skip
    """tokens (B, N), mask_id where unknown -> one Step at a time until no token is masked; the last has the result.

    Of T steps, step i sees u = i / (T - 1) and leaves masked the ratio schedule((i + 1) / T) of the tokens that were
    masked at the start. Tokens given as input never change, and revealed ones do not either (2.8). T is at most N.
    An image with n < T masked tokens is decoded in the last n steps. An adaptive rule may finish early.
    Deviation: with remask=True, revealed tokens may be masked again (Token-Critic, arXiv 2209.04439).

    >>> *_, last = decode(logits_fn, torch.full((1, 64), mask_id), mask_id=mask_id, steps=12)
    """
    temperatures = {"sampling_temperature": sampling_temperature, "choice_temperature": choice_temperature}
    check_settings({"top_k": top_k, "remask": remask, **temperatures})
    steps = _number_of_steps(tokens, mask_id, steps)
    order = get_order(order)
    random = _fine_uniforms(tokens, steps, generator)  # (B, T, 2, N)
    unknown = masked = tokens == mask_id
    plan = None if is_adaptive(schedule) else _plan(masked, steps, schedule)
    first_nan = torch.full((), math.inf, device=tokens.device)  # its u, read after the loop: no step waits for a GPU
    if not masked.any():
        yield Step(0, 0.0, tokens, masked, masked, masked.float())  # masked is False everywhere
    for i in range(steps):
        if not (masked.any() if plan is None else any(plan[i])):
            continue
        u = i / (steps - 1) if steps > 1 else 1.0
        temperature = sampling_temperature(u) if callable(sampling_temperature) else sampling_temperature
        temperature = float(check("sampling_temperature", temperature, NonNegative))
        annealed = choice_temperature(u) if callable(choice_temperature) else choice_temperature * (1 - (i + 1) / steps)
        annealed = check("choice_temperature", annealed, NonNegative)
        logits = logits_fn(tokens, u).float()
        drawn = torch.where(masked, draw(logits, random[:, i, 0], temperature, top_k), tokens)
        log_prob = confidence(logits, drawn, masked, u)
        score = log_prob if order is confidence else order(logits, drawn, masked, u)
        candidates = unknown if remask else masked
        ok = isinstance(score, Tensor) and score.shape == tokens.shape
        require(ok, f"the order's scores are {reprlib.repr(score)}; give a tensor of shape {tuple(tokens.shape)}")
        nan = ((score.isnan() | log_prob.isnan()) & candidates).any()
        first_nan = torch.where(nan, first_nan.clamp(max=u), first_nan)
        gumbel = -torch.log(-torch.log(random[:, i, 1]))
        score = score + annealed * gumbel
        count = _adaptive_count(schedule, logits, masked, u) if plan is None else torch.tensor(plan[i])
        count = count.to(tokens.device, non_blocking=True) + (candidates & ~masked).sum(1)
        kept = top_mask(score.clamp(min=-1e30).masked_fill(~candidates, -math.inf), gumbel, count) & candidates
        before = masked
        masked = candidates & ~kept
        tokens = drawn.masked_fill(masked, mask_id)
        yield Step(i, u, tokens, masked, kept & before, log_prob.exp().masked_fill(~before, 0))
    require(first_nan.isinf().item(), f"NaN at u = {first_nan:.3g}, in the logits or the order's scores; give numbers")


def _number_of_steps(tokens: Tensor, mask_id: int, steps: int) -> int:
    """The number of steps, at most the number of tokens. Refuses wrong arguments."""
    ok = isinstance(tokens, Tensor) and tokens.ndim == 2 and tokens.numel() > 0 and tokens.dtype == torch.long
    require(ok, f"tokens are {reprlib.repr(tokens)}; give a (B, N) long tensor that is not empty")
    check("mask_id", mask_id, Natural)
    steps = check("steps", steps, PositiveInt)
    n = tokens.shape[1]
    if steps > n:
        warnings.warn(f"steps is {steps}, but there are only {n} tokens; {n} steps are enough", stacklevel=3)
    return min(steps, n)


def _fine_uniforms(tokens: Tensor, steps: int, generator: Generators) -> Tensor:
    """(B, T, 2, N) in (0, 1). torch's float32 numbers have 24 random bits; those of another number follow them."""
    coarse = uniforms(len(tokens), steps, 2, tokens.shape[1], generator=generator)
    fine = coarse.double() + 2**-24 * coarse.flatten(1).roll(1, 1).view_as(coarse)
    fine = fine.to(tokens.device, torch.float if tokens.device.type == "mps" else torch.double)  # MPS has no float64
    return fine.clamp(1e-30, 1 - torch.finfo(fine.dtype).eps)


def _adaptive_count(rule: Callable[..., Tensor], logits: Tensor, masked: Tensor, u: float) -> Tensor:
    """How many tokens a rule reveals of each image, (B,): at least one, and at u = 1 all that are left."""
    left = masked.sum(1)
    count = rule(logits, masked, u) if u < 1 else left
    ok = isinstance(count, Tensor) and count.shape == left.shape
    require(ok, f"the schedule's counts are {reprlib.repr(count)}; give a tensor of shape {tuple(left.shape)}")
    return torch.minimum(count.to(left).clamp(min=1), left)


def _plan(masked: Tensor, steps: int, schedule: str | Schedule) -> list[tuple[int, ...]]:
    """masked (B, N) -> how many tokens each step reveals of each image, T times B numbers."""
    sizes = masked.sum(1).tolist()
    counts = {n: reveal_counts(n, steps, schedule) for n in set(sizes)}
    return list(zip(*([0] * (steps - len(counts[n])) + counts[n] for n in sizes), strict=True))


def top_mask(scores: Tensor, ties: Tensor, counts: Tensor) -> Tensor:
    """scores (B, N), counts (B,) -> (B, N) bool, True at the `counts` highest of each row; `ties` (B, N) break ties."""
    by_tie = ties.argsort(1, descending=True)
    order = by_tie.gather(1, scores.gather(1, by_tie).argsort(dim=1, descending=True, stable=True))
    return order.argsort(1) < counts[:, None]
