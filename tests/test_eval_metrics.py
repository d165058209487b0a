"""eval_metrics.py: against scipy and closed forms, and by how often simulated intervals hold the truth."""

import itertools
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from minimuse.data_scenes import COLORS, render, sample_scene
from minimuse.eval_metrics import (
    Estimate,
    diversity,
    frechet_distance,
    frechet_interval,
    gmsd,
    in_batches,
    inception_features,
    jackknife,
    mean_interval,
    paired_difference,
    proportion_interval,
    psnr,
)
from minimuse.utils import to_float


def clustered(seed: int, groups: int = 40, size: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Right or wrong, groups of `size` that agree: each group has its own rate, uniform on 0 to 1. Mean 1/2."""
    g = torch.Generator().manual_seed(seed)
    rate = torch.rand(groups, 1, generator=g)
    right = torch.rand(groups, size, generator=g) < rate
    return right.flatten(), torch.arange(groups).repeat_interleave(size)


def coverage(intervals: list[Estimate], truth: float) -> float:
    return sum(m.low <= truth <= m.high for m in intervals) / len(intervals)


# ---------------------------------------------------------------- single figures


def test_it_prints_well():
    assert str(proportion_interval(torch.arange(210) < 182)) == "86.7% (81.4 to 90.6, n = 210)"
    assert str(mean_interval([1.0, 2.0, 3.0, 4.0])).startswith("2.5 (0.4")
    assert str(paired_difference(torch.arange(100) < 60, torch.arange(100) < 50)).startswith("+10.0% (+3.")


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None, max_examples=60)
def test_share_is_scipys_wilson(case):
    k, n = case
    found = proportion_interval(torch.arange(n) < k)
    low, high = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (found.value, found.n) == (pytest.approx(k / n), n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'pip install "minimuse\[eval\]"'):
        mean_interval([1.0, 2.0])


def test_one_row_or_one_group_tells_nothing():
    assert mean_interval([3.0]).low == -math.inf
    assert mean_interval([3.0, 4.0], groups=["a", "a"]).high == math.inf
    alone = proportion_interval([True] * 50, groups=["a"] * 50)
    assert alone.low < 0.1, f"one prompt drawn 50 times is one prompt: {alone}"


# ---------------------------------------------------------------- groups


@given(st.lists(st.booleans(), min_size=8, max_size=30), st.integers(2, 6))
@settings(deadline=None, max_examples=40)
def test_copies_in_groups_add_nothing(right, copies):
    """Each row written down several times, and named so, leaves the interval of a mean as it was."""
    once, groups = torch.tensor(right).double(), torch.arange(len(right))
    again = mean_interval(once.repeat(copies), groups.repeat(copies))
    assert (again.low, again.high) == pytest.approx((mean_interval(once).low, mean_interval(once).high), abs=1e-9)
    shares = proportion_interval(once.repeat(copies), groups.repeat(copies)), proportion_interval(once, groups)
    assert shares[0][:3] == pytest.approx(shares[1][:3], abs=1e-9)


def test_order_and_names_of_groups_do_not_matter():
    right, groups = clustered(0)
    shuffle = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))
    named = [f"prompt {g}" for g in groups[shuffle].tolist()]
    for measure in (proportion_interval, mean_interval):
        assert measure(right[shuffle].double(), named)[:3] == pytest.approx(measure(right.double(), groups)[:3])


@pytest.mark.parametrize(
    "measure",
    [
        proportion_interval,
        lambda right, groups=None: mean_interval(right.double(), groups),
    ],
    ids=["proportion", "mean"],
)
def test_coverage_of_clustered_intervals(measure):
    """Prompts that repeat: intervals by group hold the truth in 95% of worlds, naive ones in far fewer."""
    worlds = [clustered(seed) for seed in range(250)]
    honest = coverage([measure(right, groups) for right, groups in worlds], 0.5)
    naive = coverage([measure(right) for right, _ in worlds[:80]], 0.5)
    assert 0.92 <= honest <= 0.98, f"95% intervals by group hold the truth in {honest:.1%}"
    assert naive < 0.85, f"naive ones should under-cover here, not {naive:.1%}"


def test_shares_near_one_by_group():
    """No error is seen where all are right; the interval must not close."""
    right, groups = torch.ones(100, dtype=torch.bool), torch.arange(100) // 10
    found = proportion_interval(right, groups)
    assert found.value == found.high == 1
    assert found.low < proportion_interval(right).low < 1, "ten groups say less than a hundred rows"


# ---------------------------------------------------------------- pairs


def test_difference_by_hand():
    """Bonett & Price 2012: b = 20, c = 10 of n = 100: (21 - 11) / 102, error sqrt((32 / 102 - (10 / 102)^2) / 102)."""
    first = torch.arange(100) < 20
    second = (torch.arange(100) >= 20) & (torch.arange(100) < 30)
    middle, error = 10 / 102, math.sqrt((32 / 102 - (10 / 102) ** 2) / 102)
    found = paired_difference(first, second)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), rel=0.02, abs=2e-3)


def test_difference_agrees_with_mcnemar():
    """It leaves out 0 where the exact test of the pairs that disagree is clear, and holds it where that is not."""
    for b, c in [(20, 4), (30, 10), (15, 2), (12, 10), (5, 3), (40, 38)]:
        first = torch.arange(200) < b
        second = (torch.arange(200) >= b) & (torch.arange(200) < b + c)
        p = stats.binomtest(b, b + c).pvalue
        assert (paired_difference(first, second).low > 0) == (p < 0.05), f"{b} against {c}: p = {p:.3f}"


def test_pairs_that_all_agree_leave_it_open():
    right = torch.arange(50) < 40
    found = paired_difference(right, right)
    assert found.low < found.value == 0 < found.high
    grouped = paired_difference(right, right, groups=torch.arange(50) // 10)
    assert grouped.high > found.high, "five groups say less than fifty rows"


def test_pairing_helps_where_models_agree():
    g = torch.Generator().manual_seed(3)
    hard = torch.rand(400, generator=g)
    first, second = hard < 0.80, hard < 0.75
    paired = paired_difference(first, second)
    assert paired.low > 0, "20 pairs disagree, all one way"
    assert proportion_interval(first).low < proportion_interval(second).high, (
        "two intervals overlap, and could not tell"
    )
    assert paired_difference(second, first)[:3] == pytest.approx((-paired.value, -paired.high, -paired.low))


@pytest.mark.parametrize("binary", [True, False])
def test_coverage_of_differences(binary):
    held = []
    for seed in range(400):
        g = torch.Generator().manual_seed(seed)
        prompt = torch.rand(40, 1, generator=g)  # how hard it is
        edge = torch.rand(40, 1, generator=g)  # how much better the first model is at it: mean 1/2 of 0.2
        first = torch.rand(40, 5, generator=g) < (0.8 * prompt + 0.2 * edge)
        second = torch.rand(40, 5, generator=g) < 0.8 * prompt
        pair = [x.flatten() if binary else x.flatten().double() for x in (first, second)]
        held.append(paired_difference(*pair, groups=torch.arange(40).repeat_interleave(5)))
    assert 0.92 <= coverage(held, 0.1) <= 0.98


# ---------------------------------------------------------------- any statistic


def test_jackknife_of_a_mean_and_of_a_variance():
    """Pseudo-values of a mean are the values; those of the biased variance average to the unbiased one."""
    values = torch.tensor([1.0, 2.0, 4.0, 9.0]).double()
    without = torch.stack([torch.cat([values[:i], values[i + 1 :]]) for i in range(4)])
    assert jackknife(values.mean(), without.mean(1)).tolist() == pytest.approx(values.tolist())
    found = jackknife(values.var(correction=0), without.var(1, correction=0))
    assert mean_interval(found).value == pytest.approx(values.var().item())


def draws(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def whitened(x: torch.Tensor) -> torch.Tensor:
    """Rows (n, D) with mean 0 and covariance I, exactly."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


# ---------------------------------------------------------------- Frechet distance


def test_frechet_of_two_gaussians_in_closed_form():
    """Covariances I and A A^T that commute: |m|^2 + sum (s_i - 1)^2."""
    x, y = whitened(draws(50, 4, 0)), whitened(draws(60, 4, 1))
    scales, shift = torch.tensor([1.0, 2.0, 0.5, 0.0]).double(), torch.tensor([1.0, 0.0, 0.0, -2.0]).double()
    truth = shift.square().sum() + (scales - 1).square().sum()
    assert frechet_distance(x, y * scales + shift) == pytest.approx(truth.item(), abs=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_frechet_is_scipys(seed, d):
    x, y = draws(30, d, seed), draws(40, d, seed + 1) @ draws(d, d, seed + 2) + 1
    covariances = [v.T.cov().view(d, d).numpy() for v in (x, y)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    truth = (x.mean(0) - y.mean(0)).square().sum().item() + (covariances[0] + covariances[1] - 2 * root).trace()
    assert frechet_distance(x, y) == pytest.approx(truth, rel=1e-5, abs=1e-6)


@given(st.integers(0, 10**6), st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_frechet_invariances(seed, scale):
    x, y = draws(25, 5, seed), draws(30, 5, seed + 1, 2.0, 1.0)
    turn, _ = torch.linalg.qr(draws(5, 5, seed + 2))
    found = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(found)
    assert frechet_distance(x @ turn + 7, y @ turn + 7) == pytest.approx(found), "turned and moved together"
    assert frechet_distance(scale * x, scale * y) == pytest.approx(scale**2 * found)
    assert frechet_distance(x, x[torch.randperm(25)]) == pytest.approx(0, abs=1e-9)


def test_frechet_with_fewer_rows_than_features():
    """n < D: covariances of low rank, on which scipy's root of the product goes astray."""
    x, y = draws(10, 64, 0), draws(12, 64, 1, shift=0.5)
    grams = [(v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (x, y)]
    c1, c2 = (g.T @ g for g in grams)
    values, vectors = torch.linalg.eigh(c1)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root = torch.linalg.eigvalsh(half @ c2 @ half).clamp(min=0).sqrt().sum()
    truth = (x.mean(0) - y.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(truth.item(), rel=1e-4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_is_biased_upwards_and_extrapolates():
    """Equal distributions: plain FD is c / n above 0 at every n; extrapolated, intervals hold 0 as they say."""
    pairs = [(draws(100, 6, 2 * i), draws(100, 6, 2 * i + 1)) for i in range(50)]
    plain = [frechet_interval(x, y) for x, y in pairs]
    better = [frechet_interval(x, y, extrapolate=True) for x, y in pairs]
    bias = [torch.tensor([m.value for m in found]).mean().abs().item() for found in (plain, better)]
    assert bias[1] < bias[0] / 4, f"{bias[0]:.3f} -> {bias[1]:.3f}"
    assert sum(m.low <= 0 <= m.high for m in better) >= 45
    assert all(m.low >= 0 for m in plain), "a distance is not below 0"


@pytest.mark.slow
def test_coverage_of_frechet_intervals():
    """N(0, I) against N(1, 2^2 I) in 4 dimensions, true FD 8: the extrapolated interval holds it in about 95%."""
    g = torch.Generator().manual_seed(0)  # one stream: neighbouring seeds are not quite independent
    pairs = [(torch.randn(150, 4, generator=g), 2 * torch.randn(150, 4, generator=g) + 1) for _ in range(250)]
    found = [frechet_interval(*pair, extrapolate=True) for pair in pairs]
    held = sum(m.low <= 8 <= m.high for m in found) / len(found)
    assert 0.92 <= held <= 0.98, f"held in {held:.1%}"
    assert frechet_interval(*pairs[0], extrapolate=True) == found[0], "the random halves are the same each time"


def test_repeated_prompts_widen_the_interval():
    """Twenty prompts, each drawn ten times over with little between: they are worth about twenty."""
    centres = draws(20, 3, 1, 1.0).repeat_interleave(10, 0)
    fake, prompts = centres + draws(200, 3, 2, 0.05), torch.arange(20).repeat_interleave(10)
    naive, honest = (frechet_interval(draws(400, 3, 0), fake, g) for g in (None, prompts))
    assert naive.value == honest.value
    assert honest.high - honest.low > 2 * (naive.high - naive.low)


# ---------------------------------------------------------------- diversity


def test_diversity_by_hand():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = diversity(features, ["a", "a", "a", "b", "b"])
    assert found.value == pytest.approx((10 / 3 + 1) / 2)


def test_diversity_is_within_prompts():
    """Prompts that differ do not make the pictures of one prompt diverse; collapse is seen."""
    prompts = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    far = torch.tensor([0.0, 100.0, 200.0]).repeat_interleave(4)[:, None].expand(12, 3)
    found = diversity(far + draws(12, 3, 0), prompts)
    assert found.value < 10
    assert found.n == 12
    assert diversity(far, prompts)[:3] == (0, 0, 0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    features = far + draws(12, 3, 0)
    assert diversity(features[order], [prompts[i] for i in order]).value == pytest.approx(found.value)


# ---------------------------------------------------------------- PSNR


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    y = x.clone()
    y[0] += 51  # a fifth of the range: MSE 1/25
    assert psnr(x, y).tolist() == pytest.approx([10 * math.log10(25), 100])
    assert psnr(to_float(x), to_float(y)).tolist() == pytest.approx([10 * math.log10(25), 100], abs=1e-4)


# ---------------------------------------------------------------- gradient similarity


def gray(*columns: float) -> torch.Tensor:
    """A gray picture of 3 equal rows; pixels from 0 (black) to 1."""
    return 2 * torch.tensor(columns, dtype=torch.float).expand(1, 3, 3, -1) - 1


@pytest.mark.parametrize(("other", "product", "squares"), [((0, 0, 0, 0), 0, 1), ((0, 0, 0, 0.5), 0.5, 1.25)])
def test_gmsd_by_hand(other, product, squares):
    """Two pixels have all neighbors. At the first all is flat, s = 1; at the second the gradients are 1 and `other`."""
    similarity = (2 * product + 0.0026) / (squares + 0.0026)
    x, y = gray(0, 0, 0, 1), gray(*other)
    assert gmsd(x, y).tolist() == pytest.approx([(1 - similarity) / 2])
    assert gmsd(x.mT, y.mT).tolist() == pytest.approx([(1 - similarity) / 2]), "edges that lie"


def test_gmsd_is_symmetric_and_grows_with_jitter(scenes):
    x = render(scenes[:4], 32)
    jittered = [
        torch.where(torch.rand(x.shape[2:], generator=torch.Generator().manual_seed(0)) < share, x.roll(2, 3), x)
        for share in (0.05, 0.2, 0.5)
    ]
    found = [gmsd(x, y) for y in (x, *jittered)]
    assert found[0].tolist() == [0] * 4
    assert all((less < more).all() for less, more in itertools.pairwise(found))
    assert gmsd(jittered[0], x).tolist() == pytest.approx(found[1].tolist())


def test_pairs_of_frechet_distances():
    """Noise that is the same in all three cancels; what one of them adds is seen."""
    real = draws(60, 4, 0)
    fake = real + 0.1 * draws(60, 4, 1)
    same, worse = (frechet_interval(real, x, less=fake) for x in (fake.clone(), fake + 0.2))
    assert same[:3] == (0, 0, 0)
    assert 0 < worse.low < worse.value < worse.high
    assert worse.value == pytest.approx(frechet_distance(real, fake + 0.2) - frechet_distance(real, fake))
    assert frechet_interval(real, fake, less=fake + 0.2).value == pytest.approx(-worse.value)
    with pytest.raises(ValueError, match="features of the same"):
        frechet_interval(real, fake[:50], less=fake)


# ---------------------------------------------------------------- pictures against renders, captions shuffled


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(i, n_things=1) for i in range(120)]


def features(images: torch.Tensor) -> torch.Tensor:
    """A fixed random convolution, then means and spreads by channel."""
    weight = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    maps = torch.relu(torch.nn.functional.conv2d(images, weight, stride=2)).flatten(2)
    return torch.cat([maps.mean(2), maps.std(2)], 1)


def test_random_pictures_are_far_from_renders(scenes):
    renders = in_batches(features, render(scenes, 32), batch=50)
    noise = in_batches(features, torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    alike, random = frechet_interval(renders[:60], renders[60:]), frechet_interval(renders[:60], noise)
    assert random.low > 10 * alike.high, f"renders {alike}, noise {random}"


def colour_scorer(images: torch.Tensor, prompts) -> torch.Tensor:
    """How near the most colourful pixels are to the colour that the prompt names."""
    wanted = torch.stack([torch.tensor(COLORS[next(c for c in COLORS if c in p)]).float() for p in prompts])
    flat = images.flatten(2)
    vivid = (flat.amax(1) - flat.amin(1)).topk(20).indices  # (B, 20)
    hue = flat.gather(2, vivid[:, None].expand(-1, 3, -1)).mean(2)
    return torch.nn.functional.cosine_similarity(hue - hue.mean(1, True), wanted - wanted.mean(1, True))


def test_shuffled_captions_score_badly(scenes):
    scenes = [s for s in scenes if s.things[0].color not in ("gray", "brown")]
    images, prompts = render(scenes, 32), [f"a {s.things[0].color} {s.things[0].shape}" for s in scenes]
    shuffled = [prompts[i] for i in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))]
    right, wrong = (mean_interval(in_batches(colour_scorer, images, p), groups=p) for p in (prompts, shuffled))
    assert wrong.high < right.low, f"right captions {right}, shuffled {wrong}"
    assert wrong.low < 0.2, "shuffled captions are right by chance alone"


# ---------------------------------------------------------------- Inception


def test_inception_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"minimuse\[metrics\]"):
        inception_features()


def test_inception_gets_uint8(monkeypatch):
    """torch-fidelity takes uint8 alone, and answers with a tuple, one entry a layer asked for."""

    class Fake(torch.nn.Module):
        def __init__(self, name, layers, feature_extractor_weights_path):
            super().__init__()
            assert layers == ["2048"]
            assert feature_extractor_weights_path == "weights.pth"

        def forward(self, images):
            assert images.dtype == torch.uint8
            assert not self.training, "pitfall 18: frozen, yet in training mode"
            return (images.double().mean((2, 3)),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Fake
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    found = inception_features("weights.pth")
    assert found(torch.ones(2, 3, 8, 8)).tolist() == found(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)).tolist()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: mean_interval([]), "at least one row"),
        (lambda: mean_interval([1.0, math.nan]), "finite"),
        (lambda: mean_interval([1.0, 2.0], groups=["a"]), "2 rows and 1 group labels"),
        (lambda: proportion_interval([0.5]), "mean"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "pairs"),
        (lambda: frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4)), r"\(5, 3\) and \(5, 4\)"),
        (lambda: frechet_distance(torch.zeros(5, 3), torch.full((5, 3), math.nan)), "NaN"),
        (lambda: frechet_interval(torch.zeros(3, 2), torch.zeros(9, 2)), "too few"),
        (lambda: diversity(torch.zeros(3, 2), ["a", "a", "b"]), "at least 2"),
        (lambda: diversity(torch.zeros(3, 2), ["a"]), "3 rows and 1 group labels"),
        (lambda: psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8)), "expected the same shape"),
        (lambda: psnr(torch.full((1, 3, 8, 8), math.nan), torch.zeros(1, 3, 8, 8)), r"uint8 or floats in \[-1, 1\]"),
        (lambda: psnr(torch.full((1, 3, 8, 8), 200.0), torch.zeros(1, 3, 8, 8)), r"uint8 or floats in \[-1, 1\]"),
        (lambda: psnr(torch.ones(1, 3, 8, 8).long(), torch.ones(1, 3, 8, 8).long()), r"int64; expected"),
        (lambda: frechet_distance(torch.full((5, 3), 1e200, dtype=torch.double), torch.zeros(5, 3)), "finite"),
        (lambda: frechet_distance(torch.zeros(5, 0), torch.zeros(5, 0)), r"\(n, D\)"),
        (lambda: frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3)), "n and m >= 2"),
        (lambda: mean_interval([1.0, 2.0], groups="ab"), "expected a list"),
        (lambda: mean_interval(torch.ones(2, 2)), "expected at least one row"),
        (lambda: diversity(torch.zeros(4, 2), "aabb"), "expected a list"),
        (lambda: in_batches(features, torch.zeros(0, 3, 8, 8)), "at least one"),
        (lambda: in_batches(colour_scorer, torch.zeros(2, 3, 8, 8), ["a red cube"]), r"\[2, 1\] rows"),
    ],
)
def test_wrong_inputs_say_what_to_do(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
