"""Iterative parallel decoding over any LogitsFn (Muse 2.8; MaskGIT, arXiv 2202.04200).

    all [MASK] -> predict every masked token -> keep the most confident ones -> predict the rest -> ... -> no [MASK]

`decode` needs only a LogitsFn (tokens (B, N), u) -> logits (B, N, V). You may replace each setting by a function:
    how many are revealed   schedule: a curve, or an adaptive rule (logits, masked, u) -> (B,), such as an entropy bound
    which are revealed      order: (logits, drawn, masked, u) -> scores (B, N), the highest are kept
    what is drawn           sampling_temperature: a number or a function of u; top_k, top_p
    how noisy the ranking   choice_temperature: a number that falls linearly to 0, or a function of u
    which stay, and as what choose, corrector: functions of a `State`. `lab_samplers.py` has published ones

Randomness: two uniforms per token and step, drawn before the loop from CPU generators, so equal on every machine.
Not here: the schedules (`masking.py`), guidance (`cfg.py`).
"""

import inspect
import math
import reprlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from minimuse import utils
from minimuse.masking import Schedule, ScheduleName, reveal_counts
from minimuse.utils import Checked, Generators, Natural, NonNegative, PositiveInt, Rule, check, halton_rank, require

LogitsFn = Callable[[Tensor, float], Tensor]
Order = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # drawn (B, N) holds the known tokens too
Count = Schedule | Callable[[Tensor, Tensor, float], Tensor]
Hook = Callable[["State"], Tensor]
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
SETTINGS |= {"top_p": Annotated[float, Rule(lambda x: 0 < x <= 1, "a fraction above 0")]}
SETTINGS |= dict.fromkeys(("choose", "corrector"), Annotated[object, Rule(callable, "a function of a State")])
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
        elif (name in FUNCTIONS and callable(value)) or (name == "guidance" and isinstance(value, str)):
            continue  # `decode` and `get_guidance` check what they give
        elif name == "guidance" and not isinstance(value, tuple | list):
            settings[name] = check(name, value, float, "a number, a pair (first, last), a name, or a function of u")
        else:
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


class State(NamedTuple):
    """One step of a decode, as `choose` and `corrector` see it."""

    index: int  # 0 .. T-1
    steps: int  # T
    u: float
    logits: Tensor  # (B, N, V)
    previous: Tensor | None  # logits of the step before
    drawn: Tensor  # (B, N) a token everywhere: known, or drawn now. A corrector sees mask_id where `masked`
    masked: Tensor  # (B, N) bool, before the step; a corrector sees it after the step
    free: Tensor  # (B, N) bool, True = not given
    confidence: Tensor  # (B, N) probability of the token in the step that drew it
    noise: Tensor  # (B, 2, N) uniforms: of the draw, and of the ranking; a corrector has two more


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


def token_entropy(logits: Tensor) -> Tensor:
    """logits (..., V) -> entropy in nats (...)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def is_adaptive(schedule: object) -> bool:
    """True for a function of three required arguments (logits, masked, u). A curve takes one."""
    parameters = inspect.signature(schedule).parameters.values() if callable(schedule) else ()
    return sum(p.default is p.empty for p in parameters) == 3


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1) -> Tensor:
    """logits (B, N, V), uniforms (B, N) -> tokens (B, N): inverse CDF of softmax(logits / temperature); 0 is argmax.

    top_p draws from the fewest likely tokens that have this probability together (nucleus sampling, arXiv 1904.09751).
    The CDF has the dtype of the uniforms. `decode` gives float64: next to 1, float32 has no place for 1e-9.
    """
    if temperature < 1e-30:  # float32 cannot divide by less
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -math.inf).scatter(-1, best.indices, best.values)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        best = p.sort(-1, descending=True)
        kept = best.values.cumsum(-1) - best.values < top_p
        p = torch.zeros_like(p).scatter(-1, best.indices, best.values * kept)
    cdf = p.cumsum(-1, dtype=uniforms.dtype)
    below_one = uniforms.clamp(max=1 - 2 * torch.finfo(cdf.dtype).eps)[..., None]  # stay below the end of the CDF
    return torch.searchsorted(cdf, below_one * cdf[..., -1:], right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)


def decode(
    logits_fn: LogitsFn, tokens: Tensor, *, mask_id: int, steps: int,
    schedule: str | Count = "cosine", order: str | Order = "confidence", top_k: int | None = None, top_p: float = 1.0,
    sampling_temperature: Temperature = 1.0, choice_temperature: Temperature = 0.0, remask: bool = False,
    choose: Hook | None = None, corrector: Hook | None = None, generator: Generators = None,
) -> Iterator[Step]:  # fmt: skip
    """tokens (B, N), mask_id where unknown -> one Step at a time until no token is masked; the last has the result.

    Of T steps, step i sees u = i / (T - 1) and leaves masked the ratio schedule((i + 1) / T) of the tokens that were
    masked at the start. Tokens given as input never change, and revealed ones do not either (2.8). T is at most N.
    An image with n < T masked tokens is decoded in the last n steps. An adaptive rule may finish early.
    `choose` replaces schedule and order: State -> (B, N) bool, the tokens to keep. The last step keeps all.
    `corrector` runs after each step: State -> (B, N) tokens; those that are masked or were given stay.
    Deviation: with remask=True, revealed tokens may be masked again (Token-Critic, arXiv 2209.04439).
    """
    rest = {"sampling_temperature": sampling_temperature, "choice_temperature": choice_temperature}
    check_settings({"top_k": top_k, "top_p": top_p, "remask": remask, "choose": choose, "corrector": corrector, **rest})
    steps = _number_of_steps(tokens, mask_id, steps)
    order = get_order(order)
    random = utils.uniforms(len(tokens), steps, 4 if corrector else 2, tokens.shape[1], generator=generator)
    random = utils.add_bits(random, tokens.device)  # (B, T, 2, N), and 4 with a corrector
    free = masked = tokens == mask_id
    stored = masked.float()
    logits = None
    plan = None if choose or is_adaptive(schedule) else _plan(masked, steps, schedule)
    first_nan = torch.full((), math.inf, device=tokens.device)  # its u, read after the loop: no step waits for a GPU
    if not masked.any():
        yield Step(0, 0.0, tokens, masked, masked, masked.float())  # masked is False everywhere
    for i in range(steps):
        if not (any(plan[i]) if plan else (free if choose and remask else masked).any()):
            continue
        u = i / (steps - 1) if steps > 1 else 1.0
        temperature = _temperature("sampling_temperature", sampling_temperature, u, 1.0)
        previous, logits = logits, logits_fn(tokens, u).float()
        drawn = torch.where(masked, draw(logits, random[:, i, 0], temperature, top_k, top_p), tokens)
        log_prob = confidence(logits, drawn, masked, u)
        stored = torch.where(masked, log_prob.exp(), stored)
        state = State(i, steps, u, logits, previous, drawn, masked, free, stored, random[:, i])
        candidates = free if remask else masked
        score = log_prob if choose or order is confidence else order(logits, drawn, masked, u)
        nan = ((_like(tokens, "order's scores", score).isnan() | log_prob.isnan()) & candidates).any()
        first_nan = torch.where(nan, first_nan.clamp(max=u), first_nan)
        if choose is None:
            count = _adaptive_count(schedule, state) if plan is None else torch.tensor(plan[i])
            kept = _best(state, score, choice_temperature, candidates, count)
        else:
            kept = _like(tokens, "tokens that choose keeps", choose(state), torch.bool) | (u == 1)
        masked = candidates & ~kept
        tokens = drawn.masked_fill(masked, mask_id)
        tokens = _corrected(state._replace(drawn=tokens, masked=masked), corrector) if corrector else tokens
        yield Step(i, u, tokens, masked, kept & state.masked, stored.masked_fill(~state.masked, 0))
    require(first_nan.isinf().item(), f"NaN at u = {first_nan:.3g}, in the logits or the order's scores; give numbers")


def _best(state: State, score: Tensor, temperature: Temperature, candidates: Tensor, count: Tensor) -> Tensor:
    """(B, N) bool, True at the candidates that stay: the `count` (B,) best, and as many as were revealed before."""
    noise = _temperature("choice_temperature", temperature, state.u, 1 - (state.index + 1) / state.steps)
    gumbel = -torch.log(-torch.log(state.noise[:, 1]))
    score = score + noise * gumbel
    count = count.to(score.device, non_blocking=True) + (candidates & ~state.masked).sum(1)
    return utils.top_mask(score.clamp(min=-1e30).masked_fill(~candidates, -math.inf), gumbel, count) & candidates


def _corrected(state: State, corrector: Hook) -> Tensor:
    """(B, N) tokens after a corrector. Those that are masked or were given stay."""
    tokens = _like(state.drawn, "corrector's tokens", corrector(state), torch.long)
    return torch.where(state.free & ~state.masked, tokens, state.drawn)


def _temperature(name: str, temperature: Temperature, u: float, annealing: float) -> float:
    """A function's value at u, or a number times `annealing`."""
    now = temperature(u) if callable(temperature) else temperature * annealing
    return float(check(name, now, NonNegative))


def _like(tokens: Tensor, name: str, x: Any, dtype: torch.dtype | None = None) -> Tensor:
    """x, which a user's function gave, if it has the shape of the tokens."""
    ok = isinstance(x, Tensor) and x.shape == tokens.shape and dtype in (None, x.dtype)
    require(ok, f"the {name} are {reprlib.repr(x)}; give a tensor of shape {tuple(tokens.shape)}, {dtype or 'numbers'}")
    return x


def _number_of_steps(tokens: Tensor, mask_id: int, steps: int) -> int:
    """The number of steps, at most the number of tokens. Refuses wrong arguments."""
    ok = isinstance(tokens, Tensor) and tokens.ndim == 2 and tokens.numel() > 0 and tokens.dtype == torch.long
    require(ok, f"tokens are {reprlib.repr(tokens)}; give a (B, N) long tensor that is not empty")
    check("mask_id", mask_id, Natural)
    n = tokens.shape[1]
    if check("steps", steps, PositiveInt) > n:
        warnings.warn(f"steps is {steps}, but there are only {n} tokens; {n} steps are enough", stacklevel=3)
    return min(int(steps), n)


def _adaptive_count(rule: Callable[..., Tensor], state: State) -> Tensor:
    """How many tokens a rule reveals of each image, (B,): at least one, and at u = 1 all that are left."""
    left = state.masked.sum(1)
    count = rule(state.logits, state.masked, state.u) if state.u < 1 else left
    return torch.minimum(_like(left, "schedule's counts", count).to(left).clamp(min=1), left)


def _plan(masked: Tensor, steps: int, schedule: str | Schedule) -> list[tuple[int, ...]]:
    """masked (B, N) -> how many tokens each step reveals of each image, T times B numbers."""
    sizes = masked.sum(1).tolist()
    counts = {n: reveal_counts(n, steps, schedule) for n in set(sizes)}
    return list(zip(*([0] * (steps - len(counts[n])) + counts[n] for n in sizes), strict=True))
