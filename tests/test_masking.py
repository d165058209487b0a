"""masking.py: schedules, training rates, masks, the masked loss, the likelihood bound (Muse 2.6)."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from minimuse.masking import (
    SCHEDULES,
    get_schedule,
    log_schedule,
    masked_counts,
    masked_cross_entropy,
    power_schedule,
    random_mask,
    reveal_counts,
    sample_mask_rate,
)

NAMES = [*SCHEDULES, "log", "pow2.5", "pow4"]
CURVES = [*NAMES, lambda u: 1 - u, lambda u: (1 - u) ** 3, lambda u: float(u < 1)]
OFF = settings(deadline=None, max_examples=150, derandomize=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_schedules_fall_from_one_to_zero(name):
    curve = get_schedule(name, 64)
    values = [curve(i / 200) for i in range(201)]
    assert values[0] == pytest.approx(1), f"{name} starts at {values[0]}, all should be masked"
    assert values[-1] == pytest.approx(0, abs=1e-12), f"{name} ends at {values[-1]}, none should be masked"
    assert all(a >= b for a, b in itertools.pairwise(values)), f"{name} rises somewhere"


@pytest.mark.parametrize(
    ("name", "u", "ratio"),
    [
        ("cosine", 1 / 3, math.sqrt(3) / 2),
        ("cosine", 0.5, math.sqrt(0.5)),
        ("arccos", 0.5, 2 / 3),
        ("linear", 0.25, 0.75),
        ("square", 0.5, 0.75),
        ("cubic", 0.5, 0.875),
        ("sqrt", 0.25, 0.5),
        ("pow2.5", 0.25, 1 - 1 / 32),
        ("log", 0.25, 0.5),  # of 16 tokens
        ("log", 1 / 16, 1.0),
        ("log", 0.0, 1.0),
    ],
)
def test_schedules_by_hand(name, u, ratio):
    assert get_schedule(name, 16)(u) == pytest.approx(ratio), f"{name} at {u}"


def test_a_callable_is_its_own_schedule():
    def curve(u):
        return 1 - u

    assert [get_schedule(curve)(u) for u in (0.0, 0.3, 1.0)] == [1.0, 0.7, 0.0], "a function is its own schedule"


@pytest.mark.parametrize("name", ["cosinus", "Cosine", "pow", "powx", "pow-1", "pow²", "", None, 3, ["cosine"]])
def test_pitfall_15_unknown_schedule_lists_the_known(name):
    for call in (
        lambda: get_schedule(name),
        lambda: reveal_counts(64, 8, name),
        lambda: sample_mask_rate(2, schedule=name),
    ):
        with pytest.raises(ValueError, match="schedule is") as error:
            call()
        missing = [known for known in [*SCHEDULES, "log", "pow2.5"] if known not in str(error.value)]
        assert not missing, f"the message does not name {missing}"


def test_schedules_that_make_no_sense_are_refused():
    for exponent in (0, -1, math.nan, math.inf, True, "2"):
        with pytest.raises(ValueError, match="the exponent of a schedule is"):
            power_schedule(exponent)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        log_schedule(1)
    with pytest.raises(ValueError, match=r"log_schedule\(n\)"):
        get_schedule("log")


# --- how many a step --------------------------------------------------------------------------------------------------


def test_pitfall_09_reveal_counts_match_maskgits_table():
    expected = [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]
    assert reveal_counts(256, 12) == expected, "MaskGIT's released decoding reveals these of 256 tokens"


@pytest.mark.parametrize(
    ("n", "steps", "schedule", "expected"),
    [
        (4, 2, "cosine", [2, 2]),  # floor(4 * 0.707) = 2 stay
        (9, 3, "cosine", [2, 3, 4]),  # floor(9 * 0.866) = 7, floor(9 * 0.5) = 4
        (8, 4, "linear", [2, 2, 2, 2]),
        (100, 10, "linear", [10] * 10),
        (1000, 10, "linear", [100] * 10),
        (16, 4, "square", [1, 3, 5, 7]),
        (16, 4, "sqrt", [8, 4, 2, 2]),  # stay 8, floor(4.69) = 4, floor(2.14) = 2
        (5, 5, "cubic", [1] * 5),
        (3, 8, "cosine", [1, 1, 1]),
        (7, 1, "cosine", [7]),
        (0, 4, "cosine", []),
        (1, 4, "log", [1]),
        (10, 4, lambda u: float(u < 1), [1, 1, 1, 7]),  # nothing before the end: still one a step
        (10, 4, lambda u: 0.0, [7, 1, 1, 1]),  # all at once: still one a step
    ],
)
def test_pitfall_09_reveal_counts_by_hand(n, steps, schedule, expected):
    assert reveal_counts(n, steps, schedule) == expected, f"{n} tokens in {steps} steps of {schedule}"


@given(n=st.integers(0, 5000), steps=st.integers(1, 64), schedule=st.sampled_from(CURVES))
@OFF
def test_reveal_counts_sum_to_n_at_least_one_a_step(n, steps, schedule):
    counts = reveal_counts(n, steps, schedule)
    assert sum(counts) == n, f"{counts} sums to {sum(counts)}, not {n}"
    assert len(counts) == min(n, steps), f"{len(counts)} steps for {n} tokens and T = {steps}"
    assert all(c >= 1 for c in counts), f"a step of {counts} reveals nothing"


@given(n=st.integers(200, 5000), steps=st.integers(2, 24), name=st.sampled_from(["cosine", "arccos", "linear"]))
@OFF
def test_reveal_counts_leave_the_schedules_ratio(n, steps, name):
    """After step i of T, n * schedule((i + 1) / T) stay, rounded down: neither i / T nor i / (T - 1)."""
    left = n
    for i, count in enumerate(reveal_counts(n, steps, name)[:-1]):
        left -= count
        exact = n * SCHEDULES[name]((i + 1) / steps)
        assert -1e-6 <= exact - left < 1 + 1e-6, f"{left} stay after step {i}, the curve says {exact}"


@pytest.mark.parametrize(
    ("n", "steps", "name"),
    [(-1, 4, "n"), (4, 0, "steps"), (4, -2, "steps"), (4, True, "steps"), (4, math.nan, "steps"), (2.5, 2, "n")],
)
def test_reveal_counts_refuse_nonsense(n, steps, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        reveal_counts(n, steps)


def test_more_steps_than_tokens_cost_nothing():
    assert reveal_counts(3, 10**9) == [1, 1, 1], "steps beyond the tokens are never made"


@pytest.mark.parametrize("curve", [lambda u: u, lambda u: 0.5 + 0.4 * math.sin(7 * u), lambda u: abs(1 - 2 * u)])
def test_a_curve_that_rises_is_refused(curve):
    with pytest.raises(ValueError, match="the schedule rises to"):
        reveal_counts(64, 16, curve)


@pytest.mark.parametrize("curve", [lambda u: 1 + u, lambda u: -u, lambda u: math.nan, lambda u: None, lambda u: "1"])
def test_a_curve_outside_zero_to_one_is_refused(curve):
    for call in (lambda: reveal_counts(64, 8, curve), lambda: sample_mask_rate(4, schedule=curve)):
        with pytest.raises(ValueError, match=r"the schedule at u = .* give a ratio within \[0, 1\]"):
            call()


# --- training rates and masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "above_9", "above_99"), [("cosine", 0.287, 0.090), ("arccos", 0.156, 0.016)])
def test_pitfall_04_mask_rate_mean_and_tail(name, above_9, above_99):
    """The mean is 2 / pi for both readings of "truncated arccos"; an inverted mask has mean 0.36."""
    r = sample_mask_rate(100_000, schedule=name, generator=seeded())
    assert r.mean().item() == pytest.approx(2 / math.pi, abs=0.004), "mean rate"
    assert (r > 0.9).float().mean().item() == pytest.approx(above_9, abs=0.005), "P(r > 0.9)"
    assert (r > 0.99).float().mean().item() == pytest.approx(above_99, abs=0.003), "P(r > 0.99)"
    assert r.min() >= 0, "a rate below 0"
    assert r.max() <= 1, "a rate above 1"


@pytest.mark.parametrize(
    ("schedule", "cdf"),
    [
        ("cosine", lambda r: 2 / math.pi * torch.as_tensor(r).clamp(0, 1).arcsin().numpy()),  # of p(r) in Muse 2.6
        ("arccos", lambda r: 1 - torch.cos(math.pi / 2 * torch.as_tensor(r)).numpy()),
        ("linear", lambda r: r),
        ("square", lambda r: 1 - (1 - r) ** 0.5),
        (lambda u: 1 - u**3, lambda r: 1 - (1 - r) ** (1 / 3)),
    ],
)
def test_mask_rates_have_the_density_of_the_schedule(schedule, cdf):
    r = sample_mask_rate(20_000, schedule=schedule, generator=seeded(1)).double().numpy()
    result = stats.kstest(r, cdf)
    assert result.pvalue > 0.01, f"Kolmogorov-Smirnov: {result}"


@given(
    rates=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5),
    n=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
@OFF
def test_random_mask_covers_exactly_ceil_of_rate_times_n(rates, n, seed):
    exact = [Fraction(r) * n for r in rates]
    assume(all(x == int(x) or x - int(x) > Fraction(n, 2**22) for x in exact))  # the rounding of r is forgiven
    masked = random_mask(torch.zeros(len(rates), n, dtype=torch.long), torch.tensor(rates), seeded(seed))
    assert masked.dtype == torch.bool, "a mask is boolean"
    assert masked.sum(1).tolist() == [math.ceil(x) for x in exact], f"rates {rates} of {n} tokens"


@pytest.mark.parametrize("n", [1, 7, 16, 64, 100, 256, 900, 1024, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_mask_of_k_of_n_masks_k(n, dtype):
    """0.1 * 30 is 3.0000000000000004, and in float32 off by more: rounding must not mask a fourth."""
    k = torch.arange(0, n + 1, max(1, n // 100))
    masked = random_mask(torch.zeros(len(k), n, dtype=torch.long), k.to(dtype) / n, seeded())
    assert masked.sum(1).equal(k), f"k / {n} should mask exactly k"


@pytest.mark.parametrize("n", [100, 144, 900])
def test_no_rate_masks_one_token_too_many(n):
    """Rates of a step curve, so that each is k / n: in float32 some masked k + 1."""
    rates = sample_mask_rate(2000, schedule=lambda u: math.ceil(n * (1 - u)) / n, generator=seeded())
    assert rates.dtype == torch.float64, "rates are float64"
    expected = (rates * n).round().long()
    assert masked_counts(rates, n).equal(expected), "one token too many"
    assert masked_counts(rates.float(), n).equal(expected), "one token too many in float32"


@pytest.mark.parametrize("rate", [math.nan, -0.1, 1.5, math.inf])
def test_rates_that_are_no_rates_are_refused(rate):
    with pytest.raises(ValueError, match="give numbers from 0 to 1"):
        random_mask(torch.zeros(1, 4, dtype=torch.long), torch.tensor([rate]))


def test_random_mask_falls_on_every_place_alike():
    masked = random_mask(torch.zeros(8000, 10, dtype=torch.long), torch.full((8000,), 0.3), seeded())
    assert masked.sum(1).eq(3).all(), "0.3 of 10 is 3"
    result = stats.chisquare(masked.sum(0).numpy())
    assert result.pvalue > 1e-3, f"places {masked.sum(0).tolist()}: {result}"


def test_pitfall_05_rates_differ_within_a_batch():
    tokens = torch.zeros(64, 100, dtype=torch.long)
    masked = random_mask(tokens, sample_mask_rate(64, generator=seeded()), seeded(1))
    assert len(masked.sum(1).unique()) > 20, "one number to mask for the whole batch"
    half = random_mask(tokens, torch.full((64,), 0.5), seeded(1))
    assert len({tuple(row) for row in half.tolist()}) == 64, "one mask for the whole batch"
    with pytest.raises(ValueError, match="one rate per example"):
        random_mask(tokens, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="one rate per example"):
        random_mask(tokens, torch.tensor(0.5))


def test_a_seed_makes_the_same_rates_and_masks():
    tokens = torch.zeros(4, 50, dtype=torch.long)
    draws = [
        (sample_mask_rate(4, generator=g), random_mask(tokens, torch.full((4,), 0.5), g))
        for g in (seeded(7), seeded(7))
    ]
    assert draws[0][0].equal(draws[1][0]), "rates of one seed"
    assert draws[0][1].equal(draws[1][1]), "masks of one seed"


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def example():
    g = seeded(3)
    logits = torch.randn(4, 9, 7, generator=g)
    targets = torch.randint(7, (4, 9), generator=g)
    masked = random_mask(targets, torch.tensor([0.1, 0.5, 0.9, 1.0]), g)
    return logits, targets, masked


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_cross_entropy_by_selection(example, smoothing):
    logits, targets, masked = example
    expected = F.cross_entropy(logits[masked], targets[masked], label_smoothing=smoothing)
    loss = masked_cross_entropy(logits, targets, masked, smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5), "the mean over the masked positions alone"


def test_masked_cross_entropy_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, -5.0]], [[0.0, 0.0], [0.0, 0.0]]])
    targets, masked = torch.tensor([[1, 1], [0, 1]]), torch.tensor([[True, False], [True, True]])
    expected = (math.log(4 / 3) + 2 * math.log(2)) / 3
    assert masked_cross_entropy(logits, targets, masked).item() == pytest.approx(expected, rel=1e-6), (
        "-log 3/4, -log 1/2"
    )


def test_pitfall_06_unmasked_targets_do_not_count(example):
    logits, targets, masked = example
    other = torch.where(masked, targets, (targets + 1) % 7)
    loss = masked_cross_entropy(logits, targets, masked)
    assert masked_cross_entropy(logits, other, masked).equal(loss), "an unmasked token's target moved the loss"
    moved = torch.where(masked, (targets + 1) % 7, targets)
    assert not masked_cross_entropy(logits, moved, masked).equal(loss), "a masked token's target must move it"
    logits = logits.requires_grad_()
    masked_cross_entropy(logits, targets, masked).backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.equal(masked), "the gradient reaches the masked positions and no other"


def test_pitfall_22_the_mean_is_over_the_whole_batch(example):
    """Accumulated sums divided by the total give one batch's gradient; a mean of means does not."""
    logits, targets, masked = example
    whole = logits.clone().requires_grad_()
    masked_cross_entropy(whole, targets, masked).backward()
    parts = logits.clone().requires_grad_()
    for row in range(4):  # four micro-batches, of 1, 5, 9 and 9 masked tokens
        at = slice(row, row + 1)
        share = masked[at].sum() / masked.sum()
        (share * masked_cross_entropy(parts[at], targets[at], masked[at])).backward()
    torch.testing.assert_close(parts.grad, whole.grad, msg=lambda m: f"accumulation is not the batch's gradient: {m}")
    means = torch.stack(
        [masked_cross_entropy(logits[i : i + 1], targets[i : i + 1], masked[i : i + 1]) for i in range(4)]
    )
    loss = masked_cross_entropy(logits, targets, masked)
    assert abs(means.mean() - loss) > 1e-3, "this example cannot tell the two means apart"


def test_masked_cross_entropy_of_nothing_is_zero_and_half_precision_is_safe(example):
    logits, targets, masked = example
    nothing = masked_cross_entropy(logits, targets, torch.zeros_like(masked))
    assert nothing.item() == 0, f"nothing masked gives {nothing}, not NaN"
    low = masked_cross_entropy(logits.bfloat16(), targets, masked)
    assert low.dtype == torch.float32, "the loss is computed in float32"
