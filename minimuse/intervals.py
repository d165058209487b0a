"""How sure a figure is: intervals of means, shares, paired differences and of any statistic.

    rows (n, ...) --mean, share, difference, bootstrap, half_samples--> Measured(value, low, high, n)

Pictures of one prompt resemble each other, so that 10 pictures of 20 prompts say less than 200 prompts: `groups`, one
label a row (the prompt, or the combination it asks for), widens an interval to what that many *groups* can tell.

n rows, G groups. What is resampled is so from a seed.
Not here: what is measured (`eval_metrics.py`), how it is drawn (`plots.tradeoff`).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

Groups = Sequence[Hashable] | Tensor | None  # one label a row; None: each row stands for itself
Statistic = Callable[..., Tensor | float]


class Measured(NamedTuple):
    """A figure and its interval, over n pictures (or pairs); prints itself in the format `shown`.

    >>> print(share(torch.arange(210) < 182))
    86.7% (81.4 to 90.6, n = 210)
    """

    value: float
    low: float
    high: float
    n: int
    shown: str = ".4g"

    def __str__(self) -> str:
        low, high = (f"{x:{self.shown}}".removesuffix("%") for x in (self.low, self.high))
        return f"{self.value:{self.shown}} ({low} to {high}, n = {self.n})"


def _quantile(confidence: float, freedom: float = math.inf) -> float:
    """The two-sided quantile of Student's t, the normal's where freedom is infinite.

    The first terms of its series (Abramowitz & Stegun 26.7.5): at 95% 4% too small for freedom 2, 1% for 3.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a share between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2 + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / freedom**3


def _index(groups: Groups, n: int) -> Tensor:
    """-> (n,) which group each row is of, numbered as they come."""
    labels = range(n) if groups is None else groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if n == 0 or len(labels) != n:
        raise ValueError(f"{n} rows and {len(labels)} group labels: expected at least one row, and one label a row")
    place = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([place[label] for label in labels])


def _parts(index: Tensor) -> list[Tensor]:
    """(n,) -> the rows of each group."""
    return list(index.argsort(stable=True).split(index.bincount().tolist()))


def _vector(values: Tensor | Sequence[float]) -> Tensor:
    values = torch.as_tensor(values).detach().cpu().double()
    if values.ndim != 1 or not values.isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)}: expected finite figures, one a row, (n,)")
    return values


def _error(values: Tensor, index: Tensor) -> tuple[float, int]:
    """values (n,) -> the standard error of their mean, each group one draw, and G; it is infinite for one group.

    A ratio of sums over groups, linearized: sqrt(G / (G - 1) sum_g (sum of g's residuals)^2) / n.
    """
    many = int(index.max()) + 1
    squares = index.bincount(weights=values - values.mean()).square().sum().item()
    return math.sqrt(many / (many - 1) * squares) / len(values) if many > 1 else math.inf, many


def mean(values: Tensor | Sequence[float], groups: Groups = None, confidence: float = 0.95) -> Measured:
    """Figures (n,), one a picture -> their mean, with Student's t over the groups."""
    values = _vector(values)
    error, many = _error(values, _index(groups, len(values)))
    value, reach = values.mean().item(), error * _quantile(confidence, max(1, many - 1))
    return Measured(value, value - reach, value + reach, len(values))


def share(right: Tensor | Sequence[bool], groups: Groups = None, confidence: float = 0.95) -> Measured:
    """What is right (n,), True or False -> its share: Wilson's interval, which holds near 0 and 1 too.

    With groups, n is replaced by what it is worth, p (1 - p) / error^2, at most n; where all are right or all wrong no
    error can be seen, and each group counts once.
    """
    values = _vector(right)
    if not ((values == 0) | (values == 1)).all():
        raise ValueError("share: expected True or False a row; figures between are for mean(...)")
    p, n, z = values.mean().item(), float(len(values)), _quantile(confidence)
    if groups is not None:
        error, many = _error(values, _index(groups, len(values)))
        n = float(many) if p in (0, 1) or many == 1 else min(n, p * (1 - p) / max(error**2, 1e-12))
        z = _quantile(confidence, max(1, many - 1))
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * reach) / (1 + z * z / n) for sign in (-1, 1))
    return Measured(p, min(max(low, 0.0), p), max(min(high, 1.0), p), len(values), ".1%")


def difference(
    first: Tensor | Sequence[float], second: Tensor | Sequence[float], groups: Groups = None, confidence: float = 0.95
) -> Measured:
    """Two models on the same prompts and seeds, (n,) and (n,) -> the mean of first - second, pair by pair.

    Figures: as `mean`. True or False: only pairs that disagree count, as in McNemar's test, and a pseudo-pair (with
    groups: a group) each way keeps the interval open where all agree (Bonett & Price 2012).
    """
    binary = all(torch.as_tensor(x).dtype == torch.bool for x in (first, second))
    first, second = _vector(first), _vector(second)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} figures: give pairs, one of each a row")
    gaps, n = first - second, len(first)
    if not binary:
        return mean(gaps, groups, confidence)
    index = _index(groups, n)
    many = int(index.max()) + 1
    weight = round(n / many)  # rows of an average group
    padded = torch.cat([gaps, gaps.new_ones(weight), -gaps.new_ones(weight)])
    index = torch.cat([index, index.new_full((weight,), many), index.new_full((weight,), many + 1)])
    middle, reach = padded.mean().item(), _error(padded, index)[0] * _quantile(confidence, many)
    return Measured(gaps.mean().item(), max(-1.0, middle - reach), min(1.0, middle + reach), n, "+.1%")


def _resampled(statistic: Statistic, samples: Sequence[Tensor], groups: Sequence[Groups], draws, seed, pick) -> Tensor:
    """-> (draws,) the statistic where pick(G, generator) says which groups of each sample take part."""
    generator, results = torch.Generator().manual_seed(seed), []
    every = [_parts(_index(g, len(s))) for g, s in zip(groups, samples, strict=True)]
    if min(map(len, every)) < 4:
        raise ValueError(f"{min(map(len, every))} rows or groups are too few to resample: give at least 4 of each")
    for _ in range(draws):
        picks = [pick(len(parts), generator).tolist() for parts in every]
        rows = [torch.cat([parts[i] for i in p]) for parts, p in zip(every, picks, strict=True)]
        results.append(float(statistic(*(s[r.to(s.device)] for s, r in zip(samples, rows, strict=True)))))
    return torch.tensor(results, dtype=torch.double)


def bootstrap(
    statistic: Statistic, values: Tensor, groups: Groups = None, draws: int = 1000, seed=0, confidence: float = 0.95
) -> Measured:
    """Any statistic of rows (n, ...) -> its percentile interval over rows, or groups, drawn with replacement.

    Give pairs as columns, and both models are resampled together. Percentiles are moved outwards to what Student's t
    would leave beyond them, as G draws vary too little by (G - 1) / G (Hesterberg 2015, "expanded percentile").
    Where repeated rows bias the statistic (Frechet distance, codes in use), use `half_samples`.
    """
    found = _resampled(statistic, [values], [groups], draws, seed, lambda n, g: torch.randint(n, (n,), generator=g))
    many = int(_index(groups, len(values)).max()) + 1
    tail = NormalDist().cdf(-math.sqrt(many / (many - 1)) * _quantile(confidence, many - 1))
    low, high = found.quantile(torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return Measured(float(statistic(values)), low, high, len(values))


def half_samples(
    statistic: Statistic,
    *samples: Tensor,
    groups: Sequence[Groups] | None = None,
    draws: int = 20,
    seed: int = 0,
    confidence: float = 0.95,
    extrapolate: bool = False,
) -> Measured:
    """Any statistic of independent samples (n_i, ...) -> its interval, from random halves of them.

    The spread over halves drawn without replacement is the standard error (the delete-half jackknife). A bias c / n is
    c / (n / 2) in the halves, so `extrapolate` gives 2 S(n) - mean S(n / 2), free of it.
    `groups`: for each sample its own, or None; groups are halved whole. The n reported is the smallest sample's.
    """
    groups = groups or [None] * len(samples)
    halves = _resampled(
        statistic, samples, groups, draws, seed, lambda n, g: torch.randperm(n, generator=g)[: (n + 1) // 2]
    )
    value = float(statistic(*samples))
    value = 2 * value - halves.mean().item() if extrapolate else value
    reach = _quantile(confidence, draws - 1) * halves.std().item()
    return Measured(value, value - reach, value + reach, min(map(len, samples)))
