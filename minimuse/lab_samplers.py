"""Samplers by name: those of public code bases and of published papers, as arguments of `sampler.decode`.

    preset_settings("maskgit", n=256, codebook_size=1024, steps=12) -> keyword arguments of `sampler.decode`
    preset_settings("remdm_cap:0.1", ...)                           -> numbers after a colon replace the defaults

Each says which paper or code it follows, and where that differs from `decode`. To add one, enter in SAMPLERS
a function (Target, its numbers) -> what differs from MUSE. A hook sees a `sampler.State`.

n tokens, T steps, u = i / (T - 1) progress, a and b the fractions alpha revealed before and after step i,
U revealed tokens. The guidance scale t of a code base, as in `cfg.py`, is for reading only.
Left out: Jump Your Steps (2410.07761; `lab_optimum.py` solves its problem exactly), DDPD (2410.06264) and learned
policies, which need networks of their own.
Not here: guidance, which is part of the LogitsFn (`cfg.py`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimuse.lab_optimum import schedule_of
from minimuse.lab_worlds import World
from minimuse.masking import SCHEDULES, Schedule
from minimuse.sampler import State, by_rank, confidence, draw, token_entropy
from minimuse.utils import Fraction, NonNegative, PositiveInt, check, named, require, top_mask


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


# --- samplers of papers -----------------------------------------------------------------------------------------------


def entropy_bound(bound: float, whole: bool = False) -> Callable[[Tensor, Tensor, float], Tensor]:
    """A rule that reveals the k tokens of lowest entropy, k as large as sum(H) - max(H) <= bound allows, in nats.

    EB-Sampler (arXiv 2505.24857): the bound limits the error of independent draws. Use it with order="entropy".
    Choice: with `whole`, sum(H) <= bound, a stricter rule of our own.
    """
    bound = check("the entropy bound", bound, NonNegative)

    def rule(logits: Tensor, masked: Tensor, u: float) -> Tensor:
        h = token_entropy(logits).masked_fill(~masked, math.inf).sort(1).values
        return (h.cumsum(1) - (0 if whole else h) <= bound).sum(1)  # not at known tokens: inf - inf is NaN

    return rule


def _or_best(state: State, ready: Tensor, p: Tensor) -> Tensor:
    """(B, N) bool: the masked tokens that are `ready`; where an image has none, its masked token of the highest p."""
    ready = ready & state.masked
    best = top_mask(p.masked_fill(~state.masked, -1.0), state.noise[:, 1], state.masked.any(1).long())
    return torch.where(ready.any(1, keepdim=True), ready, best)


def _factor(state: State) -> Tensor:
    """(n + 1) (1 - p), (B, N), where p is the n-th largest probability of a masked token: it rises with n."""
    p = state.confidence.masked_fill(~state.masked, -1.0)
    return (p.argsort(1, descending=True).argsort(1) + 2) * (1 - p)


def _klass(to: Target, threshold: float = 0.9, bound: float = 0.01, passes: float = 2) -> dict[str, Any]:
    """KLASS (arXiv 2511.05664): reveal where max p > threshold, and KL(p || p of the pass before) < bound.

    The KL must be below the bound in each of the last `passes` passes. Where no token is ready, the surest is revealed
    (the public code: n / T tokens).
    """
    stable = torch.zeros(1)  # for how many passes, (B, N)

    def choose(state: State) -> Tensor:
        nonlocal stable
        log_p = state.logits.log_softmax(-1)
        p = log_p.exp()
        if state.previous is None:
            stable = torch.zeros_like(state.drawn)
        else:
            kl = torch.where(p > 0, p * (log_p - state.previous.log_softmax(-1)), 0.0).sum(-1)
            stable = torch.where(kl < bound, stable + 1, 0)
        return _or_best(state, (stable >= passes) & (p.amax(-1) > threshold), p.amax(-1))

    return {"choose": choose}


# --- random counts, and tokens that are masked again ------------------------------------------------------------------


def _remdm(sigma: Callable[[State, float], float | Tensor], alpha: Schedule = lambda u: u) -> dict[str, Any]:
    """ReMDM (arXiv 2503.00307): mask a token of U again with probability s = sigma(state, s_max).

    s_max = min(1, (1 - b) / a). A masked token is revealed with probability (b - (1 - s) a) / (1 - a).
    """

    def choose(state: State) -> Tensor:
        a, b = alpha(state.index / state.steps), alpha((state.index + 1) / state.steps)
        s = torch.as_tensor(sigma(state, min(1.0, (1 - b) / a) if a else 1.0)).to(state.noise)
        reveal = (b - (1 - s) * a) / (1 - a)
        return torch.where(state.masked, state.noise[:, 1] < reveal, state.noise[:, 1] >= s)

    return {"choose": choose, "remask": True}


def _remdm_loop(to: Target, eta: float = 0.02, on: float = 0.45, off: float = 0.95, top: float = 0.9) -> dict[str, Any]:
    """ReMDM-loop: alpha rises to `top` at u = on, stays until u = off with s = min(eta, s_max), then rises to 1.

    While it rises, s = 0: MDLM. The defaults are the public code's, which counts time down. Choice: a step that `on`
    falls into ends at `top`; in the public code it goes beyond.
    """
    require(0 < on < off < 1 and 0 < top < 1, f"remdm_loop has {on, off, top}; give 0 < on < off < 1, 0 < top < 1")
    eta = check("eta", eta, Fraction)
    alpha = lambda u: float(np.interp(u, [0, on, off, 1], [0, top, top, 1]))  # noqa: E731

    def sigma(state: State, most: float) -> float:
        return min(eta, most) if alpha(state.index / state.steps) == alpha((state.index + 1) / state.steps) else 0.0

    return _remdm(sigma, alpha)


def _remdm_conf(to: Target) -> dict[str, Any]:
    """ReMDM-conf: s_i = s_max softmax(-p_i) over U, p_i the probability that token i had when it was drawn."""

    def sigma(state: State, most: float) -> Tensor:
        revealed = state.free & ~state.masked
        return most * (-state.confidence).masked_fill(~revealed, -1e30).softmax(1) * revealed

    return _remdm(sigma)


def _p2(to: Target, eta: float = 1.0) -> dict[str, Any]:
    """P2, self-planning (arXiv 2502.03540): keep the alpha n best of all tokens by log p; in U, eta log p.

    eta = 0 masks nothing again. alpha = (i + 1) / T. Deviation in a world: log p of a known token is given the others.
    """
    eta = check("eta", eta, NonNegative)

    def choose(state: State) -> Tensor:
        logits = state.logits
        if to.world is not None:
            logits = to.world.leave_one_out(state.drawn.masked_fill(state.masked, to.world.mask_id))
        score = confidence(logits, state.drawn, state.masked, state.u).clamp(min=-1e30)
        score = torch.where(state.masked, score, eta * score).masked_fill(~state.free, -math.inf)
        n = state.free.sum(1)
        count = n - (n * (1 - (state.index + 1) / state.steps) + 1e-6).long()
        return top_mask(score, state.noise[:, 1], count)

    return {"choose": choose, "remask": True}


def _largest(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
    return logits.log_softmax(-1).amax(-1)


def _world(to: Target, name: str) -> World:
    require(to.world is not None, f"{name} needs p(x_i | all other tokens), which only an exact world knows")
    return to.world


def _token_critic(to: Target) -> dict[str, Any]:
    """Token-Critic (arXiv 2209.04439) with a perfect critic: log p(x_i | all other tokens).

    For networks, train one (`notebooks/token_critic.py`).
    """
    world = _world(to, "token_critic")
    return {"order": lambda logits, drawn, *step: _raw_logit(world.leave_one_out(drawn), drawn, *step), "remask": True}


def _informed(to: Target, k: float = 4) -> dict[str, Any]:
    """Informed corrector (arXiv 2407.21243): after a step, draw the k least sure tokens of U once more.

    Sure is log p(x_i) - max over v other than x_i of log p(v), given all other known tokens. All k are drawn at once.
    """
    world, k = _world(to, "informed"), check("k", k, PositiveInt)

    def corrector(state: State) -> Tensor:
        log_p = world.leave_one_out(state.drawn)
        own = state.drawn.clamp(max=world.v - 1)[..., None]
        sure = log_p.gather(-1, own) - log_p.scatter(-1, own, -math.inf).amax(-1, keepdim=True)
        revealed = state.free & ~state.masked
        worst = (-sure.squeeze(-1)).masked_fill(~revealed, -math.inf)
        again = top_mask(worst, state.noise[:, 3], revealed.sum(1).clamp(max=k))
        return torch.where(again, draw(log_p, state.noise[:, 2], 1.0), state.drawn)

    return {"order": "random", "corrector": corrector}


# --- orders, curves and draws -----------------------------------------------------------------------------------------


def _moment(to: Target, alpha: float = 4.5) -> dict[str, Any]:
    """Moment sampler (arXiv 2510.04525): MaskGIT with ranking noise a, as choosing first and drawing afterwards.

    Places by Gumbel-top-k of log sum_v p(v)^(1 + 1/a); there, v is drawn with p(v)^(1 + 1/a): temperature a / (1 + a).
    Both scores are multiplied by a here, so a = 0 is argmax. a = alpha (1 - (i + 1) / T) as in MaskGIT.
    """
    noise = lambda u: alpha * to.annealing(u)  # noqa: E731

    def order(logits: Tensor, drawn: Tensor, masked: Tensor, u: float) -> Tensor:
        a = max(noise(u), 1e-4)
        return a * ((1 + 1 / a) * logits.log_softmax(-1)).logsumexp(-1)

    temperature = {"sampling_temperature": lambda u: noise(u) / (1 + noise(u)), "choice_temperature": noise}
    return {"order": order, **temperature}


def _dilated(to: Target, block: float = 0) -> dict[str, Any]:
    """Dilated unmasking (arXiv 2506.19037): in a block of B places, pass r reveals every (B / 2^r)-th that is masked.

    Block after block from the left, log2 B passes each. 0: the smallest B = 4, 8, ... whose passes fit into T steps.
    Choice: if even the whole picture needs more passes than T, the schedule joins some.
    """
    sizes = [2**r for r in range(2, max(3, math.ceil(math.log2(to.n)) + 1))]
    require(block in (0, *sizes), f"dilated has the block {block:g}; give one of {', '.join(map(str, sizes))}")
    place = torch.arange(to.n)
    for size in [int(block)] if block else sizes:
        passes = range(1, size.bit_length())
        late = sum((place % (size >> r) > 0).long() for r in passes)
        rank = place // size * len(passes) + late
        counts = rank.unique(return_counts=True)[1].tolist()
        if len(counts) <= to.steps:
            break
    return {"order": by_rank(rank), "schedule": schedule_of(counts), "steps": min(to.steps, len(counts))}


def _beta(to: Target, a: float = 2.0, b: float = 1.0) -> dict[str, Any]:
    """Beta schedule (arXiv 2509.13866): the fraction masked is 1 - BetaCDF(u; a, b), in random order."""
    from scipy.special import betainc

    require(a > 0 and b > 0, f"beta has a {a}, b {b}; give numbers above 0")
    return {"schedule": lambda u: 1 - float(betainc(a, b, u)), "order": "random"}


PAPERS = [_remdm_conf, _remdm_loop, _p2, _moment, _klass, _beta, _dilated, _token_critic, _informed]
SAMPLERS = SAMPLER_PRESETS | {f.__name__[1:]: f for f in PAPERS}
SAMPLERS |= {
    # MDLM, ancestral (arXiv 2406.07524): each token is revealed with probability (b - a) / (1 - a), alpha = u, so the
    # counts are binomial. A step that reveals none has an NFE of 0: the logits of the step before hold.
    "mdlm": lambda to: {"choose": lambda s: ~s.masked | (s.noise[:, 1] < 1 / (s.steps - s.index))},
    # ReMDM-cap: s = min(eta, s_max). ReMDM-rescale: s = eta s_max. eta = 0 is MDLM.
    "remdm_cap": lambda to, eta=0.02: _remdm(lambda state, most: min(check("eta", eta, Fraction), most)),
    "remdm_rescale": lambda to, eta=0.05: _remdm(lambda state, most: check("eta", eta, Fraction) * most),
    # Places by the largest log p(v), with MaskGIT's ranking noise; the draw has no influence (arXiv 2510.04525).
    "choose_then_sample": lambda to, noise=4.5: {"order": _largest, "choice_temperature": noise},
    # EB-Sampler: `entropy_bound`. The paper also ranks by confidence and by margin.
    "eb": lambda to, bound=0.1: {"schedule": entropy_bound(bound), "order": "entropy"},
    "entropy_sum": lambda to, bound=1.0: {"schedule": entropy_bound(bound, whole=True), "order": "entropy"},
    # Fast-dLLM (arXiv 2505.22618): reveal all of p(drawn) >= threshold, or the n likeliest with (n + 1) (1 - p_n) < f;
    # at least one. Choice: drawn at temperature 1; the paper's argmax has no distribution to compare.
    "fast_dllm": lambda to, threshold=0.9: {"choose": lambda s: _or_best(s, s.confidence >= threshold, s.confidence)},
    "fast_dllm_factor": lambda to, f=1.0: {"choose": lambda s: _or_best(s, _factor(s) < f, s.confidence)},
    # Nucleus sampling (arXiv 1904.09751).
    "top_p": lambda to, p=0.9: {"top_p": p},
}


def preset_settings(name: str, n: int, codebook_size: int, steps: int, world: World | None = None) -> dict[str, Any]:
    """-> the arguments of `decode` that sample n tokens as the named paper or code base does.

    "p2:0.5" is p2 with 0.5 in place of its first number; "klass:0.9:0.01" gives the first two.
    """
    sizes = {"n": n, "codebook_size": codebook_size, "steps": steps}
    n, codebook_size, steps = (check(size, value, PositiveInt) for size, value in sizes.items())
    to = Target(n, codebook_size, min(n, steps), world)
    return {"steps": steps} | MUSE | named("preset", name, SAMPLERS, to)
