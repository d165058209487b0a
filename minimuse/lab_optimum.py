"""The optimum of the lab: how many tokens each step should reveal where the places are random; what a sampler costs.

    h_j     information curve: mean entropy of a token given j random others, in nats; it falls from h_0 to h_(N-1)
    E KL    sum over the steps that reveal s tokens after a known ones of s h_a - (h_a + ... + h_(a+s-1))

The error is the area between a staircase and the curve (arXiv 2511.04647, 2510.25544): the KL that `compare` measures
in random order with fixed counts. The best counts are those of the best staircase with T steps.
Each KL is in nats a token, as in `compare`. N tokens, V codes, T steps; j and a known tokens.
Not here: adaptive rules and orders that look at the tokens. They may fall below this optimum (`lab.py`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minimuse.lab_worlds import WORLDS, World
from minimuse.masking import Schedule, reveal_counts
from minimuse.sampler import Hook, LogitsFn, Step, by_rank, confidence, decode, token_entropy
from minimuse.utils import PositiveInt, check, halton_rank, require, seeded_generator

GROUPS = 32  # samples form so many groups; intervals compare the groups
EXCESS = "Excess NLL in {} order: {:.3f} ± {:.3f} (0 is exact, below 0 is mode seeking)."


class Outcome(NamedTuple):
    """What an evaluator measured of one sampler."""

    nfe: float  # mean forward passes of an image
    groups: dict[str, list[float]]  # metric -> a value for each group of samples
    bound: bool = False  # "kl" is an upper bound


def run(steps: Iterator[Step], corrector: Hook | None = None) -> tuple[Tensor, int]:
    """The steps of a decode -> its final tokens (B, N), and the forward passes of all its images together.

    A step that changes an image is a pass, with a corrector two; the logits of an unchanged image are known.
    """
    nfe, before = 0, None
    for step in steps:
        changed = step.revealed if before is None else step.revealed | (step.tokens != before)
        nfe += int(changed.any(1).sum()) * (1 if corrector is None else 2)
        before = step.tokens
    return step.tokens, nfe


def check_samples(samples: Any) -> int:
    """-> the number of samples. ValueError unless they form GROUPS groups of at least two, and fit into memory."""
    samples = check("samples", samples, PositiveInt)
    good = 2 * GROUPS <= samples <= 2**18 and samples % GROUPS == 0
    require(good, f"samples is {samples}; give a multiple of {GROUPS}, from {2 * GROUPS} to {2**18}")
    return samples


@torch.no_grad()
def sampled_curves(logits_fn: LogitsFn, x: Tensor, mask_id: int, seed: int = 0, points: int = 65) -> Tensor:
    """Examples x (B, N) -> (B, N) the curve of each along a random order of its own. Their mean is the curve.

    A world gives the entropies of its conditionals, also of a known token given the others; a network, which may be
    wrong, its cross-entropies -log p(x_i | known). With more than `points` tokens, values between so many interpolate.
    """
    n, is_world = x.shape[1], isinstance(logits_fn, World)
    place = torch.rand(x.shape, generator=seeded_generator(seed)).argsort(1).argsort(1).to(x.device)
    sums, counts = torch.zeros(len(x), n + 1, dtype=torch.double), torch.zeros(n + 1)  # [:, -1] of none known but one
    for j in np.unique(np.linspace(0, n - 1 + is_world, min(n + 1, points)).round()).astype(int).tolist():
        masked = place >= j
        tokens = x.masked_fill(masked, mask_id)
        if is_world:
            nats = token_entropy(logits_fn.leave_one_out(tokens))
        else:
            nats = -confidence(logits_fn(tokens, j / n).double(), x, masked, 0.0)
        for known, those in [(j, masked), (j - 1, ~masked)][: 1 + is_world]:
            sums[:, known] += torch.where(those, nats, 0.0).sum(1).cpu()
            counts[known] += those[0].sum().cpu()
    found = counts[:n].nonzero()[:, 0]
    rows = (sums[:, found] / counts[found]).numpy()
    return torch.from_numpy(np.stack([np.interp(np.arange(n), found, row) for row in rows]))


def world_curves(world: World, samples: int = 1024, seed: int = 0) -> Tensor:
    """-> curves (samples, N) with the standard error curves.std(0) / samples^0.5; (1, N) where the world is small.

    Exactly, h_j = G_(j+1) - G_j, where G_j is the mean entropy of j of the N tokens: sums over (V + 1)^N terms.
    """
    n, v = world.n, world.v
    if (v + 1) ** n > 20_000:
        x = world.sample(check("samples", samples, PositiveInt), seeded_generator(seed, 1))
        return sampled_curves(world, x, world.mask_id, seed)
    p = world.log_prob(torch.cartesian_prod(*[torch.arange(v)] * n).view(-1, n)).exp().view([v] * n + [1])
    entropies = [
        np.mean([torch.special.entr(p.sum((*others, n))).sum() for others in combinations(range(n), n - j)])
        for j in range(n + 1)
    ]
    return torch.from_numpy(np.diff(entropies))[None]


def information_curve(curves: World | Tensor) -> Tensor:
    """A world, or the curves (B, N) of examples -> h (N,), float64: their mean, as a curve that never rises."""
    h = _checked((world_curves(curves) if isinstance(curves, World) else curves).mean(0))
    sums, place = np.cumsum([0, *h]), np.arange(len(h))
    width = place + 1 - place[:, None]  # (a, b): the mean of h_a .. h_b
    means = np.where(width > 0, (sums[1:] - sums[:-1, None]) / np.maximum(width, 1), -np.inf)
    highest = np.maximum.accumulate(means[:, ::-1], 1)[:, ::-1]  # isotonic regression: min over a of the max over b
    return torch.from_numpy(np.where(width > 0, highest, np.inf).min(0))


def expected_kl(curve: Tensor, counts: Sequence[int]) -> float:
    """Curve (N,), the tokens of each step, which sum to N -> E KL(p || q) in random order, nats a token."""
    h = _checked(curve)
    right = sum(counts) == len(h) and min(counts) > 0
    require(right, f"the counts are {counts}; give positive ones that sum to the {len(h)} tokens of the curve")
    return float((counts * h[np.cumsum([0, *counts[:-1]])]).sum() - h.sum()) / len(h)


def optimal_counts(curve: Tensor, steps: int) -> list[int]:
    """Curve (N,) -> the counts of min(steps, N) steps with the least `expected_kl`: dynamic programming, O(T N^2).

    >>> optimal_counts(torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0]), 3)
    [1, 1, 3]
    """
    h, steps = _checked(curve), check("steps", steps, PositiveInt)
    width = np.arange(1, len(h) + 1)[:, None] - np.arange(len(h))
    cost = np.where(width > 0, width * h, np.inf)  # (b, a): a step from a known tokens to b + 1
    best, starts = cost[:, 0], []  # best[b]: the least staircase over b + 1 tokens
    for _ in range(1, min(len(h), steps)):
        total = cost[:, 1:] + best[:-1]
        starts.append(total.argmin(1) + 1)
        best = total.min(1)
    ends = [len(h)]
    for start in reversed(starts):
        ends.append(int(start[ends[-1] - 1]))
    return np.diff([0, *reversed(ends)]).tolist()


def schedule_of(counts: Sequence[int]) -> Schedule:
    """The tokens of each step -> the schedule u -> ratio still masked that reveals so many."""
    left = 1 - np.cumsum([0, *counts]) / sum(counts)
    return lambda u: float(left[round(u * len(counts))])


def plot_curve(curve: Tensor, counts: Mapping[str, Sequence[int]], ax: Any) -> None:
    """Draw a curve (N,), and the staircase of each schedule by name, with its KL."""
    h = _checked(curve)
    ax.plot(h, "k", label="information curve")
    for name, each in counts.items():
        edges = np.cumsum([0, *each])
        ax.stairs(h[edges[:-1]], edges, baseline=None, label=f"{name}: KL {expected_kl(curve, each):.4f}")
    ax.set(xlabel="tokens known", ylabel="entropy of a hidden token, nats", title="KL N = area above the curve")
    ax.legend(fontsize=7, frameon=False)


@lru_cache
def _known(world: str) -> tuple[World, Tensor]:
    """A name of WORLDS -> the world, and its information curve (N,)."""
    world = WORLDS[world]()
    return world, information_curve(world_curves(world, 256))


def trial(world: str, schedule: str, order: str, steps: int) -> tuple[str, Any]:
    """Names of a world, a schedule and an order -> counts and KL next to the optimum's, in words; a figure.

    The figure has the curve with both staircases, six draws, and six exact samples of the world.
    """
    from matplotlib.figure import Figure

    world, curve = _known(world)
    counts = {schedule: reveal_counts(world.n, steps, schedule), "optimum": optimal_counts(curve, steps)}
    start = torch.full((256, world.n), world.mask_id)
    ranked = by_rank(halton_rank(*world.grid)) if order == "halton" else order
    sampling = {"mask_id": world.mask_id, "steps": steps, "schedule": schedule, "order": ranked}
    *_, last = decode(world, start, **sampling, generator=seeded_generator(0))
    exact = world.sample(len(start), seeded_generator(1))
    excess = (world.log_prob(exact) - world.log_prob(last.tokens)) / world.n
    error = 1.96 * excess.std() / math.sqrt(len(excess))
    text = [f"**{k}**: {' '.join(map(str, c))}. Expected KL {expected_kl(curve, c):.4f}." for k, c in counts.items()]
    text += ["KL is in nats a token, in random order. " + EXCESS.format(order, excess.mean(), error)]
    figure = Figure((6, 5), layout="constrained")
    top, *rows = figure.subfigures(3, height_ratios=(4, 1, 1))
    plot_curve(curve, counts, top.subplots())
    for row, title, examples in zip(rows, ("drawn", "samples of the world"), (last.tokens, exact), strict=True):
        row.suptitle(title, fontsize=9)
        for ax, tokens in zip(row.subplots(1, 6), examples, strict=False):
            ax.imshow(tokens.view(world.grid).numpy(), vmin=0, vmax=world.v - 1)
            ax.axis("off")
    return "\n\n".join(text), figure


def _checked(curve: Tensor) -> np.ndarray:
    right = isinstance(curve, Tensor) and curve.ndim == 1 and len(curve) > 0 and bool(curve.isfinite().all())
    require(right, f"the curve is {curve}; give a tensor (N,) of finite numbers")
    return curve.detach().cpu().double().numpy()
