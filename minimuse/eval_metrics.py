"""Metrics and their confidence intervals (Muse 3.2).

    values (n,)                  --mean_interval-------->
    successes (n,)               --proportion_interval--> Estimate(value, low, high, n)
    two models, the same prompts --paired_difference---->
    features (n, D)              --frechet_interval, diversity-->

Pictures of one prompt resemble each other: 10 pictures of each of 20 prompts say less than 200 prompts. `groups`, one
label per row (such as the prompt), gives intervals for clustered samples: what counts is the number of groups.
Intervals use Student's t from scipy (pip install "minimuse[eval]"). Resampling follows a seed.

Images are (B, 3, H, W), uint8 or in [-1, 1]. n, m rows, D features, G groups.
Not here: the networks that make features and scores (`eval_detector.py`, `eval_clip.py`), prompts (`eval_prompts.py`).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minimuse.data_images import to_uint8

Features = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> (B, D)
Groups = Sequence[Hashable] | Tensor | None  # one label per row; None: every row is its own group
Statistic = Callable[..., Tensor | float]
Values = Tensor | Sequence[float]


# --- intervals --------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A value with its confidence interval, over n pictures or pairs. `format` is how it is printed.

    >>> print(proportion_interval(torch.arange(210) < 182))
    86.7% (81.4 to 90.6, n = 210)
    """

    value: float
    low: float
    high: float
    n: int
    format: str = ".4g"

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.short().removesuffix(')')}, n = {self.n})"

    def short(self) -> str:
        """Value and interval, without n: "86.7% (81.4 to 90.6)"."""
        low, high = (f"{x:{self.format}}".removesuffix("%") for x in (self.low, self.high))
        return f"{self.value:{self.format}} ({low} to {high})"


def mean_interval(values: Values, groups: Groups = None, confidence: float = 0.95) -> Estimate:
    """Values (n,) -> their mean, with Student's t interval for G - 1 degrees of freedom. Infinite for one group."""
    values = _vector(values)
    error, count = _standard_error(values, _group_index(groups, len(values)))
    value = values.mean().item()
    margin = error * _t_quantile(confidence, max(1, count - 1))
    return Estimate(value, value - margin, value + margin, len(values))


def proportion_interval(successes: Values, groups: Groups = None, confidence: float = 0.95) -> Estimate:
    """Successes (n,), True or False -> their fraction, with Wilson's interval, which is also good near 0 and 1.

    With groups, n becomes the effective sample size p (1 - p) / error^2, at most n, and t replaces the normal quantile.
    Where p is 0 or 1 no error is visible, and the effective size is G.
    """
    values = _vector(successes)
    if not ((values == 0) | (values == 1)).all():
        raise ValueError("proportion_interval expects True or False in each row; use mean_interval for numbers")
    p, n = values.mean().item(), float(len(values))
    z = _t_quantile(confidence, math.inf)
    if groups is not None:
        error, count = _standard_error(values, _group_index(groups, len(values)))
        n = float(count) if p in (0, 1) or count == 1 else min(n, p * (1 - p) / max(error**2, 1e-12))
        z = _t_quantile(confidence, max(1, count - 1))
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, min(max(center - margin, 0.0), p), max(min(center + margin, 1.0), p), len(values), ".1%")


def paired_difference(first: Values, second: Values, groups: Groups = None, confidence: float = 0.95) -> Estimate:
    """Two models on the same prompts and seeds, (n,) and (n,) -> the mean of first - second, pair by pair.

    Numbers: as `mean_interval`. True or False: only pairs that disagree count, as in McNemar's test. One pseudo-pair
    (with groups: a group) in each direction is added, so the interval stays open where all agree (Bonett & Price 2012).
    """
    binary = all(torch.as_tensor(x).dtype == torch.bool for x in (first, second))
    first, second = _vector(first), _vector(second)
    if first.shape != second.shape:
        raise ValueError(f"got {len(first)} and {len(second)} values, expected pairs: one of each per row")
    gaps, n = first - second, len(first)
    if not binary:
        return mean_interval(gaps, groups, confidence)
    index = _group_index(groups, n)
    count = int(index.max()) + 1
    size = round(n / count)  # rows of an average group
    padded = torch.cat([gaps, gaps.new_ones(size), -gaps.new_ones(size)])
    index = torch.cat([index, index.new_full((size,), count), index.new_full((size,), count + 1)])
    center = padded.mean().item()
    margin = _standard_error(padded, index)[0] * _t_quantile(confidence, count)
    return Estimate(gaps.mean().item(), max(-1.0, center - margin), min(1.0, center + margin), n, "+.1%")


def half_sample_interval(
    statistic: Statistic,
    *samples: Tensor,
    groups: Sequence[Groups] | None = None,
    resamples: int = 20,
    seed: int = 0,
    confidence: float = 0.95,
    extrapolate: bool = False,
) -> Estimate:
    """Any statistic of independent samples (n_i, ...) -> its interval, from random halves (delete-half jackknife).

    The standard deviation over halves drawn without replacement is the standard error. A bias c / n is 2 c / n in the
    halves, so `extrapolate` returns 2 S(n) - mean S(n / 2), without that bias.
    `groups`: one entry per sample; groups are halved as a whole. The n reported is that of the smallest sample.
    """
    parts = []  # of each sample: the rows of each group
    for sample, labels in zip(samples, groups or [None] * len(samples), strict=True):
        index = _group_index(labels, len(sample))
        parts.append(index.argsort(stable=True).split(index.bincount().tolist()))
    if (fewest := min(map(len, parts))) < 4:
        raise ValueError(f"{fewest} rows or groups are too few to resample; give at least 4 of each sample")
    generator = torch.Generator().manual_seed(seed)

    def half(sample: Tensor, part: Sequence[Tensor]) -> Tensor:
        chosen = torch.randperm(len(part), generator=generator)[: (len(part) + 1) // 2].tolist()
        return sample[torch.cat([part[g] for g in chosen]).to(sample.device)]

    halves = [float(statistic(*map(half, samples, parts))) for _ in range(resamples)]
    halves = torch.tensor(halves, dtype=torch.double)
    value = float(statistic(*samples))
    value = 2 * value - halves.mean().item() if extrapolate else value
    margin = _t_quantile(confidence, resamples - 1) * halves.std().item()
    return Estimate(value, value - margin, value + margin, min(map(len, samples)))


def jackknife(whole: Tensor | float, without: Tensor) -> Tensor:
    """A statistic of all groups (), and of all but group g (G,) -> G pseudo-values; `mean_interval` of them follows."""
    count = len(without)
    return count * whole - (count - 1) * without


@lru_cache
def _t_quantile(confidence: float, freedom: float) -> float:
    """Two-sided quantile of Student's t; of the normal distribution for infinite degrees of freedom."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, expected a fraction between 0 and 1, such as 0.95")
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('confidence intervals need scipy; install it with pip install "minimuse[eval]"') from error
    return float(stats.t.ppf((1 + confidence) / 2, freedom))


def _group_index(groups: Groups, n: int) -> Tensor:
    """Labels -> the number of each row's group, (n,), in the order in which groups appear."""
    labels = range(n) if groups is None else groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if n == 0 or len(labels) != n:
        raise ValueError(
            f"got {n} rows and {len(labels)} group labels, expected at least one row, and one label per row"
        )
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([number[label] for label in labels])


def _vector(values: Values) -> Tensor:
    values = torch.as_tensor(values).detach().cpu().double()
    if values.ndim != 1 or not values.isfinite().all():
        raise ValueError(f"values of shape {tuple(values.shape)}: expected finite numbers (n,), one per row")
    return values


def _standard_error(values: Tensor, index: Tensor) -> tuple[float, int]:
    """values (n,) -> the standard error of their mean, with each group as one draw, and G. Infinite for one group.

    The mean as a ratio of sums over groups, linearized: sqrt(G / (G - 1) sum_g (sum of residuals of g)^2) / n.
    """
    count = int(index.max()) + 1
    squares = index.bincount(weights=values - values.mean()).square().sum().item()
    return math.sqrt(count / (count - 1) * squares) / len(values) if count > 1 else math.inf, count


# --- metrics ----------------------------------------------------------------------------------------------------------


def in_batches(function: Callable[..., Tensor], *arrays: Sequence | Tensor, batch: int = 64) -> Tensor:
    """A function of features or scores over arrays of n rows -> (n, ...) on the CPU, one batch at a time."""
    n = len(arrays[0])
    if n == 0 or any(len(a) != n for a in arrays):
        raise ValueError(f"got {', '.join(str(len(a)) for a in arrays)} rows, expected the same number, at least one")
    with torch.no_grad():
        return torch.cat([function(*(a[i : i + batch] for a in arrays)).cpu() for i in range(0, n, batch)])


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Features (n, D), (m, D) -> |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to them.

    With C = R^T R, where R is from the QR of the centered features, tr (C1 C2)^(1/2) is the sum of the singular values
    of R1 R2^T. No matrix is squared, and n < D is no problem.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(f"features {tuple(real.shape)} and {tuple(fake.shape)}: expected (n, D), (m, D), n and m >= 2")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("features contain NaN or infinite values; look for the picture that causes them")
    means = [x.double().mean(0) for x in (real, fake)]
    roots = [
        torch.linalg.qr((x.double() - m) / math.sqrt(len(x) - 1), mode="r")[1]
        for x, m in zip((real, fake), means, strict=True)
    ]
    traces = sum(r.square().sum() for r in roots)
    distance = (means[0] - means[1]).square().sum() + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(0.0, distance.item())


def frechet_interval(
    real: Tensor, fake: Tensor, groups: Groups = None, *, extrapolate: bool = False, **resampling
) -> Estimate:
    """Features (n, D), (m, D) -> their Frechet distance: FID for `inception_features` (Muse 3.2).

    It is biased upwards by about c / n, so only distances of equal n and equal reference compare. `extrapolate`
    estimates it at infinite n (after arXiv 1911.07023, from two sizes); the result may be below 0.
    `groups` are those of the fakes; `resampling` (resamples, seed, confidence) as in `half_sample_interval`.
    """
    both = (None, groups)
    found = half_sample_interval(frechet_distance, real, fake, groups=both, extrapolate=extrapolate, **resampling)
    return found if extrapolate else found._replace(low=max(0.0, found.low))


def inception_features(weights: str | None = None) -> Features:
    """FID's Inception network: images -> (B, 2048). Downloads its weights unless their file is given."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise ImportError(
            "Inception features need torch-fidelity, and a torchvision built for this torch; "
            f"install them with pip install 'minimuse[metrics]' ({error})"
        ) from error
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    net = net.eval()  # version 0.3.0 leaves it in training mode (pitfall 18)
    return lambda images: net.to(images.device)(images if images.dtype == torch.uint8 else to_uint8(images))[0]


def pairwise(features: Tensor) -> float:
    """Features (k, D) of the pictures of one prompt -> the mean Euclidean distance of two of them."""
    return torch.pdist(features.double()).mean().item()


def diversity(features: Tensor, prompts: Sequence[str], confidence: float = 0.95) -> Estimate:
    """Features (n, D) and the prompt of each -> `pairwise` within a prompt, averaged over prompts."""
    if len(features) != len(prompts):
        raise ValueError(f"{len(features)} pictures and {len(prompts)} prompts; give the prompt of each picture")
    rows = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)}
    if not rows or min(map(len, rows.values())) < 2:
        raise ValueError("diversity within a prompt needs at least 2 pictures of each prompt")
    return mean_interval([pairwise(features[r]) for r in rows.values()], None, confidence)._replace(n=len(features))


def psnr(images: Tensor, reconstructed: Tensor) -> Tensor:
    """(B, C, H, W) twice -> (B,) dB, 10 log10(1 / MSE) of pixels in [0, 1]. Choice: at most 100, so equal ones too."""
    if images.shape != reconstructed.shape or images.ndim != 4:
        raise ValueError(f"images {tuple(images.shape)} and {tuple(reconstructed.shape)}: expected two of (B, C, H, W)")
    x, y = (x.double() / 255 if x.dtype == torch.uint8 else (x.double() + 1) / 2 for x in (images, reconstructed))
    return -10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
