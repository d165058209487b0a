"""intervals.py: against scipy, hand-worked cases, and by how often simulated intervals hold the truth."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minimuse.intervals import Measured, _quantile, bootstrap, difference, half_samples, mean, share


def clustered(seed: int, groups: int = 40, size: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Right or wrong, groups of `size` that agree: each group has its own rate, uniform on 0 to 1. Mean 1/2."""
    g = torch.Generator().manual_seed(seed)
    rate = torch.rand(groups, 1, generator=g)
    right = torch.rand(groups, size, generator=g) < rate
    return right.flatten(), torch.arange(groups).repeat_interleave(size)


def coverage(intervals: list[Measured], truth: float) -> float:
    return sum(m.low <= truth <= m.high for m in intervals) / len(intervals)


# ---------------------------------------------------------------- single figures


def test_it_prints_well():
    assert str(share(torch.arange(210) < 182)) == "86.7% (81.4 to 90.6, n = 210)"
    assert str(mean([1.0, 2.0, 3.0, 4.0])).startswith("2.5 (0.4")
    assert str(difference(torch.arange(100) < 60, torch.arange(100) < 50)).startswith("+10.0% (+3.")


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
@settings(deadline=None, max_examples=60)
def test_share_is_scipys_wilson(case, confidence):
    k, n = case
    found = share(torch.arange(n) < k, confidence=confidence)
    low, high = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert (found.value, found.n) == (pytest.approx(k / n), n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(
    ("freedom", "within"), [(2, 0.04), (3, 0.01), (9, 3e-4), (30, 1e-5), (1000, 1e-6), (math.inf, 1e-9)]
)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_quantiles_of_students_t(freedom, within, confidence):
    truth = stats.t.ppf((1 + confidence) / 2, freedom) if freedom < math.inf else stats.norm.ppf((1 + confidence) / 2)
    assert _quantile(confidence, freedom) == pytest.approx(truth, rel=within)


def test_mean_is_the_textbook_one():
    values = torch.randn(200, generator=torch.Generator().manual_seed(1)).double()
    low, high = stats.t.interval(0.9, 199, values.mean().item(), stats.sem(values.numpy()))
    found = mean(values, confidence=0.9)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)


def test_one_row_or_one_group_tells_nothing():
    assert mean([3.0]).low == -math.inf
    assert mean([3.0, 4.0], groups=["a", "a"]).high == math.inf
    alone = share([True] * 50, groups=["a"] * 50)
    assert alone.low < 0.1, f"one prompt drawn 50 times is one prompt: {alone}"


# ---------------------------------------------------------------- groups


@given(st.lists(st.booleans(), min_size=8, max_size=30), st.integers(2, 6))
@settings(deadline=None, max_examples=40)
def test_copies_in_groups_add_nothing(right, copies):
    """Each row written down several times, and named so, leaves the interval of a mean as it was."""
    once, groups = torch.tensor(right).double(), torch.arange(len(right))
    again = mean(once.repeat(copies), groups.repeat(copies))
    assert (again.low, again.high) == pytest.approx((mean(once).low, mean(once).high), abs=1e-9)
    shares = share(once.repeat(copies), groups.repeat(copies)), share(once, groups)
    assert shares[0][:3] == pytest.approx(shares[1][:3], abs=1e-9)


def test_order_and_names_of_groups_do_not_matter():
    right, groups = clustered(0)
    shuffle = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))
    named = [f"prompt {g}" for g in groups[shuffle].tolist()]
    for measure in (share, mean):
        assert measure(right[shuffle].double(), named)[:3] == pytest.approx(measure(right.double(), groups)[:3])


@pytest.mark.parametrize(
    "measure",
    [
        share,
        lambda right, groups=None: mean(right.double(), groups),
        lambda right, groups=None: bootstrap(torch.mean, right.double(), groups, draws=100),
    ],
    ids=["share", "mean", "bootstrap"],
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
    found = share(right, groups)
    assert found.value == found.high == 1
    assert found.low < share(right).low < 1, "ten groups say less than a hundred rows"


# ---------------------------------------------------------------- pairs


def test_difference_by_hand():
    """Bonett & Price 2012: b = 20, c = 10 of n = 100: (21 - 11) / 102, error sqrt((32 / 102 - (10 / 102)^2) / 102)."""
    first = torch.arange(100) < 20
    second = (torch.arange(100) >= 20) & (torch.arange(100) < 30)
    middle, error = 10 / 102, math.sqrt((32 / 102 - (10 / 102) ** 2) / 102)
    found = difference(first, second)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), rel=0.02, abs=2e-3)


def test_difference_agrees_with_mcnemar():
    """It leaves out 0 where the exact test of the pairs that disagree is clear, and holds it where that is not."""
    for b, c in [(20, 4), (30, 10), (15, 2), (12, 10), (5, 3), (40, 38)]:
        first = torch.arange(200) < b
        second = (torch.arange(200) >= b) & (torch.arange(200) < b + c)
        p = stats.binomtest(b, b + c).pvalue
        assert (difference(first, second).low > 0) == (p < 0.05), f"{b} against {c}: p = {p:.3f}"


def test_pairs_that_all_agree_leave_it_open():
    right = torch.arange(50) < 40
    found = difference(right, right)
    assert found.low < found.value == 0 < found.high
    grouped = difference(right, right, groups=torch.arange(50) // 10)
    assert grouped.high > found.high, "five groups say less than fifty rows"


def test_pairing_helps_where_models_agree():
    g = torch.Generator().manual_seed(3)
    hard = torch.rand(400, generator=g)
    first, second = hard < 0.80, hard < 0.75
    paired = difference(first, second)
    assert paired.low > 0, "20 pairs disagree, all one way"
    assert share(first).low < share(second).high, "two intervals overlap, and could not tell"
    assert difference(second, first)[:3] == pytest.approx((-paired.value, -paired.high, -paired.low))


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
        held.append(difference(*pair, groups=torch.arange(40).repeat_interleave(5)))
    assert 0.92 <= coverage(held, 0.1) <= 0.98


# ---------------------------------------------------------------- any statistic


def test_bootstrap_of_pairs_and_its_seed():
    pairs = torch.randn(100, 2, generator=torch.Generator().manual_seed(4))
    pairs[:, 1] = pairs[:, 0] + 0.1

    def gap(rows):
        return rows[:, 1].mean() - rows[:, 0].mean()

    found = bootstrap(gap, pairs, draws=100)
    assert found.high - found.low < 1e-3, "columns are resampled together"
    wide = [bootstrap(torch.median, pairs[:, 0], draws=100, seed=s) for s in (0, 0, 1)]
    assert wide[0] == wide[1] != wide[2]


def test_half_samples_of_a_mean():
    """The delete-half jackknife of a mean is its standard error."""
    values = torch.randn(100, generator=torch.Generator().manual_seed(5)).double()
    found, truth = half_samples(torch.mean, values, draws=400), mean(values)
    assert found.high - found.low == pytest.approx(truth.high - truth.low, rel=0.15)
    right, groups = clustered(1)
    found, truth = half_samples(torch.mean, right.double(), groups=[groups], draws=400), mean(right.double(), groups)
    assert found.high - found.low == pytest.approx(truth.high - truth.low, rel=0.15)


def test_extrapolation_removes_a_bias_of_one_over_n():
    values = torch.full((100,), 3.0)
    found = half_samples(lambda v: v.mean() + 5 / len(v), values, extrapolate=True)
    assert found.value == pytest.approx(3)
    assert half_samples(lambda v: v.mean() + 5 / len(v), values).value == pytest.approx(3.05)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: mean([]), "at least one row"),
        (lambda: mean([1.0, math.nan]), "finite"),
        (lambda: mean([1.0, 2.0], groups=["a"]), "2 rows and 1 group labels"),
        (lambda: mean([1.0, 2.0], confidence=95), "share between 0 and 1"),
        (lambda: share([0.5]), "mean"),
        (lambda: difference([1.0], [1.0, 2.0]), "pairs"),
        (lambda: bootstrap(torch.mean, torch.zeros(3)), "too few"),
        (lambda: half_samples(torch.mean, torch.zeros(9), torch.zeros(3)), "too few"),
    ],
)
def test_wrong_inputs_say_what_to_do(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
