"""Metrics and their 95% confidence intervals (Muse 3.2).

Pictures of one prompt resemble each other: 10 pictures of each of 20 prompts say less than 200 prompts. `groups`, one
label per row (such as the prompt), gives intervals for clustered samples: what counts is the number of groups.

Images are (B, 3, H, W), uint8 or in [-1, 1]. n, m rows, D features, G groups.
Not here: the networks that make features and scores (`eval_networks.py`), prompts (`eval_prompts.py`).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.utils import explain, require, to_float, to_uint8

Distance = Callable[[Tensor, Tensor], Tensor]  # images (B, 3, H, W) twice -> ()
Features = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> (B, D)
Groups = Sequence[Hashable] | Tensor | None  # one label per row; None: every row is its own group
Values = Tensor | Sequence[float]


class Estimate(NamedTuple):
    """A value with its 95% interval, over n pictures or pairs. `format` is how it is printed."""

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
        return f"{self.short()[:-1]}, n = {self.n})"

    def short(self) -> str:
        """The same without n: "86.7% (81.4 to 90.6)"."""
        low, high = (f"{x:{self.format}}".removesuffix("%") for x in (self.low, self.high))
        return f"{self.value:{self.format}} ({low} to {high})"


def mean_interval(values: Values, groups: Groups = None) -> Estimate:
    """Values (n,) -> their mean, with Student's t interval for G - 1 degrees of freedom. Infinite for one group."""
    values, index, count = _rows(values, groups)
    residuals = index.bincount(weights=values - values.mean())  # (G,) summed in each group
    error = math.inf
    if count > 1:  # sqrt(G / (G - 1) sum_g (sum of residuals of g)^2) / n
        error = math.sqrt(count / (count - 1) * residuals.square().sum().item()) / len(values)
    value, margin = values.mean().item(), error * _t_quantile(count)
    return Estimate(value, value - margin, value + margin, len(values))


def proportion_interval(successes: Values, groups: Groups = None) -> Estimate:
    """Successes (n,), True or False -> their fraction, with Wilson's interval, which is also good near 0 and 1.

    With groups, n is the effective sample size: p (1 - p) / error^2, at most n, or G where p is 0 or 1.
    """
    values, _, count = _rows(successes, groups)
    if not ((values == 0) | (values == 1)).all():
        raise ValueError("proportion_interval expects True or False in each row; use mean_interval for numbers")
    p, n, z = values.mean().item(), len(values), _t_quantile(math.inf)
    if groups is not None:
        z = _t_quantile(count)
        error = mean_interval(values, groups).margin / z
        n = count if p in (0, 1) or count == 1 else min(n, p * (1 - p) / max(error**2, 1e-12))
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, min(max(center - margin, 0.0), p), max(min(center + margin, 1.0), p), len(values), ".1%")


def paired_difference(first: Values, second: Values, groups: Groups = None) -> Estimate:
    """Two models on the same prompts and seeds, (n,) and (n,) -> the mean of first - second, pair by pair.

    Numbers: as `mean_interval`. True or False: only pairs that disagree count, as in McNemar's test. One pseudo-pair
    (with groups: a group) in each direction is added, so the interval stays open where all agree (Bonett & Price 2012).
    """
    (one, index, count), (other, *_) = _rows(first, groups), _rows(second, None)
    require(len(one) == len(other), f"got {len(one)} and {len(other)} values, expected pairs: one of each per row")
    gaps = one - other
    if not all(torch.as_tensor(x).dtype == torch.bool for x in (first, second)):
        return mean_interval(gaps, groups)
    extra = gaps.new_ones(round(len(gaps) / count))  # as many rows as an average group
    labels = torch.cat([index, torch.full_like(extra, count), torch.full_like(extra, count + 1)])
    padded = mean_interval(torch.cat([gaps, extra, -extra]), labels)
    return Estimate(gaps.mean().item(), max(-1.0, padded.low), min(1.0, padded.high), len(gaps), "+.1%")


def jackknife(whole: Tensor | float, without: Tensor) -> Tensor:
    """A statistic of all groups (), and of all but group g (G,) -> G pseudo-values, for `mean_interval`."""
    return len(without) * whole - (len(without) - 1) * without


def marginal_distances(x: Tensor, y: Tensor, v: int, groups: int) -> dict[str, list[float]]:
    """x, y (n, P): examples of two distributions -> "singles" and "pairs", jackknife pseudo-values of so many groups.

    The squared distance of two means has an unbiased estimate: no example is compared with itself. The means of one-hot
    vectors (P V) give "singles"; the means of their outer products (P V, P V) hold each pair twice, and the singles.
    """
    n, p = x.shape
    hot = [F.one_hot(each, v).flatten(1).float().unflatten(0, (groups, -1)) for each in (x, y)]  # (G, n / G, P V)

    def distance(a: Tensor, b: Tensor, n: int, itself: int) -> Tensor:
        within = (a.square().sum() - n * itself + b.square().sum() - n * itself) / (n * (n - 1))
        return within - 2 * (a * b).sum() / n**2

    def pseudo_values(sums: list[Tensor], itself: int) -> Tensor:
        a, b = (each.sum(0).double() for each in sums)
        without = [distance(a - one, b - other, n - n // groups, itself) for one, other in zip(*sums, strict=True)]
        return jackknife(distance(a, b, n, itself), torch.stack(without))

    singles = pseudo_values([h.sum(1) for h in hot], p)
    pairs = pseudo_values([h.mT @ h for h in hot], p * p) - singles
    return {"singles": (singles / p).tolist(), "pairs": (pairs / max(p * (p - 1), 1)).tolist()}


def _t_quantile(count: float) -> float:
    """The 97.5% quantile of Student's t for this many groups; of the normal distribution for infinitely many."""
    with explain('confidence intervals need scipy: pip install "minimuse[eval]"', ImportError, kind=ImportError):
        from scipy.stats import t
    return float(t.ppf(0.975, max(1, count - 1)))


def _rows(values: Values, groups: Groups, ndim: int = 1) -> tuple[Tensor, Tensor, int]:
    """Values (n,) or (n, D) and labels -> values in double, the number of each row's group as they appear, and G."""
    expected = "expected values in rows, and a list of group labels, one for each row"
    with explain(expected, TypeError, ValueError, RuntimeError):
        values = torch.as_tensor(values).detach().cpu().double()
        labels = range(len(values)) if groups is None else groups
        labels = [label.item() if isinstance(label, Tensor) else label for label in labels]
        number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    if values.ndim != ndim or values.numel() == 0 or not (values.abs() < 1e100).all():
        expected = f"at least one row of finite numbers, {'(n,)' if ndim == 1 else '(n, D)'}"
        raise ValueError(f"got values of shape {tuple(values.shape)}, or NaN or infinite ones; expected {expected}")
    fits = not isinstance(groups, str) and len(labels) == len(values)
    require(fits, f"got {len(values)} rows and {len(labels)} group labels, expected a list of one for each row")
    return values, torch.tensor([number[label] for label in labels]), len(number)


def in_batches(function: Callable[..., Tensor], *arrays: Sequence | Tensor, batch: int = 64) -> Tensor:
    """A function of features or scores over arrays of n rows -> (n, ...) on the CPU, one batch at a time."""
    rows = [len(a) for a in arrays]
    require(0 < min(rows) == max(rows), f"got {rows} rows, expected the same number, at least one")
    with torch.no_grad():
        return torch.cat([function(*(a[i : i + batch] for a in arrays)).cpu() for i in range(0, rows[0], batch)])


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Features (n, D), (m, D) -> |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to them.

    With C = R^T R from a QR, tr (C1 C2)^(1/2) is the sum of the singular values of R1 R2^T, also for n < D.
    """
    real, fake = (_rows(x, None, 2)[0] for x in (real, fake))
    if real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(f"features {tuple(real.shape)} and {tuple(fake.shape)}: expected (n, D), (m, D), n and m >= 2")
    means = [x.mean(0) for x in (real, fake)]
    centered = [(x - m) / math.sqrt(len(x) - 1) for x, m in zip((real, fake), means, strict=True)]
    roots = [torch.linalg.qr(x, mode="r")[1] for x in centered]
    traces = sum(r.square().sum() for r in roots)
    distance = (means[0] - means[1]).square().sum() + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(0.0, distance.item())


def frechet_interval(
    real: Tensor, fake: Tensor, groups: Groups = None, *, extrapolate: bool = False, less: Tensor | None = None
) -> Estimate:
    """Features (n, D), (m, D) -> their Frechet distance: FID for `inception_features` (Muse 3.2).

    Its standard error is the standard deviation over 20 random halves of both (delete-half jackknife). `groups` are
    those of the fakes, and are halved as a whole. The distance is biased by about c / n, so only distances of equal n
    compare. `extrapolate` removes that: 2 S(n) - mean S(n / 2) (after arXiv 1911.07023), perhaps below 0.
    `less`, features (n, D) of other fakes: how much farther `fake` is from `real` than they are, paired. Row i of all
    three is of the same prompt, and all are halved alike.
    """
    others = () if less is None else (less,)
    rows = [_rows(real, groups if others else None, 2), *(_rows(x, groups, 2) for x in (fake, *others))]
    if (fewest := min(count for *_, count in rows)) < 4:
        raise ValueError(f"{fewest} rows or groups are too few; give at least 4 real and 4 fake ones")
    if others and not len(real) == len(fake) == len(less):
        raise ValueError(f"got {len(real)}, {len(fake)} and {len(less)} rows, expected features of the same prompts")

    def distance(real: Tensor, fake: Tensor, *others: Tensor) -> float:
        return frechet_distance(real, fake) - sum(frechet_distance(real, x) for x in others)

    generator = torch.Generator().manual_seed(0)
    halves = []
    for _ in range(20):
        chosen = [torch.randperm(count, generator=generator)[: (count + 1) // 2] for *_, count in rows]
        chosen = chosen[:1] * len(rows) if others else chosen
        halves.append(distance(*(x[torch.isin(index, half)] for (x, index, _), half in zip(rows, chosen, strict=True))))
    spread, mean = torch.std_mean(torch.tensor(halves, dtype=torch.double))
    value, margin = distance(real, fake, *others), _t_quantile(20) * spread.item()
    value = 2 * value - mean.item() if extrapolate else value
    low = value - margin if extrapolate or others else max(0.0, value - margin)
    return Estimate(value, low, value + margin, min(len(real), len(fake)))


def inception_features(weights: str | None = None) -> Features:
    """FID's Inception network: images -> (B, 2048). Downloads its weights unless their file is given."""
    needs = "inception_features needs torch-fidelity and a fitting torchvision: pip install 'minimuse[metrics]'"
    with explain(needs, ImportError, RuntimeError, kind=ImportError):  # RuntimeError: a torchvision for another torch
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    net = net.eval()  # version 0.3.0 leaves it in training mode (pitfall 18)
    return lambda images: net.to(images.device)(images if images.dtype == torch.uint8 else to_uint8(images))[0]


def diversity(features: Tensor, prompts: Sequence[str]) -> Estimate:
    """Features (n, D) and the prompt of each -> mean distance of two pictures of one prompt, averaged over prompts."""
    rows, index, count = _rows(features, prompts, 2)
    if index.bincount().min() < 2:
        raise ValueError("diversity within a prompt needs at least 2 pictures of each prompt")
    means = [torch.pdist(rows[index == g]).mean().item() for g in range(count)]
    return mean_interval(means)._replace(n=len(rows))


def summarize(values: dict[str, list], features: dict[str, Tensor], pairs: dict[str, str]) -> dict[str, Estimate]:
    """Columns of values and rows of features, "right" or "right, VARIANT" -> metrics of the same names.

    Fractions of True, means of numbers; Frechet distances to the variant "real"; diversity within prompts. `pairs`
    {"true": "bicubic"} adds the differences "psnr, true less bicubic" and so on, paired by picture.
    """
    groups, prompts = values["group"], values["prompt"]
    twice = len(prompts) // 2 * 2  # each prompt comes twice in a row
    columns = {name: column for name, column in {**values, **features}.items() if not isinstance(column[0], str)}
    found = {}
    for name, column in columns.items():
        metric, _, variant = name.partition(", ")
        less = columns[f"{metric}, {pairs[variant]}"] if variant in pairs else None
        gap = f"{metric}, {variant} less {pairs.get(variant)}".replace(",  ", ", ")
        if name in values:
            found[name] = (proportion_interval if isinstance(column[0], bool) else mean_interval)(column, groups)
            found |= {gap: paired_difference(column, less, groups)} if less else {}
        elif variant != "real":
            real = features[f"{metric}, real"]
            found[name] = frechet_interval(real, column, groups)
            found |= {gap: frechet_interval(real, column, groups, less=less)} if less is not None else {}
        if metric == "frechet":
            found[name.replace("frechet", "diversity")] = diversity(column[:twice], prompts[:twice])
    return found


def check_images(images: Tensor) -> None:
    """ValueError unless images are (B, C, H, W), uint8 or floats of about [-1, 1]. Decoders go a little beyond."""
    shaped = images.ndim == 4 and images.numel() > 0
    if not shaped or not (images.dtype == torch.uint8 or (images.is_floating_point() and images.abs().max() <= 4)):
        hint = "one image needs [None]; scale pixels of 0 to 255 with x / 127.5 - 1"
        came = f"{tuple(images.shape)}, {images.dtype}"
        raise ValueError(f"images are {came}; expected (B, C, H, W), uint8 or floats in [-1, 1]: {hint}")


def psnr(images: Tensor, reconstructed: Tensor) -> Tensor:
    """(B, C, H, W) twice -> (B,) dB, 10 log10(1 / MSE) of pixels in [0, 1]. Choice: at most 100, so equal ones too."""
    x, y = _same_shape(images, reconstructed)
    return -10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def gmsd(images: Tensor, reconstructed: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation (arXiv 1308.3052): (B, 3, H, W) twice -> (B,), 0 for equal gradients.

    s = (2 g g' + c) / (g^2 + g'^2 + c) in each pixel, g the length of the luminance's Prewitt gradient, c = 0.0026;
    then the standard deviation of s over pixels that have all neighbors.
    Deviation: the paper first halves the size. That would average away what super-resolution adds.
    """
    prewitt = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=torch.double) / 3
    luminance = prewitt.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    kernels = torch.stack([prewitt * luminance, prewitt.T * luminance]).to(images.device)  # (2, 3, 3, 3)
    g, h = (F.conv2d(x, kernels).square().sum(1).sqrt() for x in _same_shape(images, reconstructed))
    similarity = (2 * g * h + 0.0026) / (g.square() + h.square() + 0.0026)
    return similarity.flatten(1).std(1, correction=0)


def outline_features(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, H) -> (B, 64) features for a Frechet distance that sees whether outlines are straight.

    Log-Gabor filters (Field 1987) of 16 orientations, for waves of 8 and 16 pixels, are long, narrow lines: a straight
    edge answers to one of them, a ragged one to many. Each cell of 8 x 8 pixels has the fraction of each orientation in
    its answers. The features are their means and standard deviations over cells. Nothing is learned.
    """
    spectrum = torch.fft.fft2(to_float(images).mean(1, keepdim=True) / 2)  # (B, 1, H, H)
    across = torch.fft.fftfreq(images.shape[-1], device=images.device)
    frequency, angle = torch.hypot(across, across[:, None]).clamp(min=1e-6), torch.atan2(across[:, None], across)
    narrow = torch.stack([torch.cos(angle - math.pi * i / 16).clamp(min=0) ** 40 for i in range(16)])  # (16, H, H)
    found = []
    for wave in (8, 16):
        answers = torch.fft.ifft2(spectrum * narrow * torch.exp(-((frequency * wave).log2() / 0.55).square() / 2)).abs()
        cells = F.avg_pool2d(answers[..., 8:-8, 8:-8], 8).flatten(2)  # without the margin, where filters wrap around
        fractions = cells / (cells.sum(1, keepdim=True) + 0.005)
        found += [fractions.mean(2), fractions.std(2)]
    return torch.cat(found, 1)


def _same_shape(images: Tensor, reconstructed: Tensor) -> tuple[Tensor, Tensor]:
    """Images twice -> their pixels in [0, 1], in double."""
    check_images(images)
    check_images(reconstructed)
    one, other = tuple(images.shape), tuple(reconstructed.shape)
    require(one == other, f"images {one} and {other}: expected the same shape")
    return tuple(x.double() / 255 if x.dtype == torch.uint8 else (x.double() + 1) / 2 for x in (images, reconstructed))


def feature_distance(features: Callable[[Tensor], list[Tensor]]) -> Distance:
    """LPIPS without learned weights: squared distance of channel-normalized features, mean over positions, summed."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(features(x), features(y), strict=True)
        return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in pairs)

    return distance


def lpips_distance() -> Distance:
    """LPIPS with VGG features, as in VQGAN. The package downloads the weights at first use."""
    needs = 'perceptual="lpips" needs pip install "minimuse[lpips]"; "scenes" and "none" do not'
    with explain(needs, ImportError, kind=ImportError):
        import lpips
    net = lpips.LPIPS(net="vgg").eval().requires_grad_(False)
    return lambda x, y: net.to(x.device)(x, y).mean()
