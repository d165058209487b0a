"""sampler.py: iterative parallel decoding over any LogitsFn (Muse 2.8; MaskGIT)."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from minimuse.lab_samplers import entropy_bound
from minimuse.masking import reveal_counts
from minimuse.sampler import (
    ORDERS,
    by_rank,
    decode,
    draw,
    halton,
    halton_rank,
    token_entropy,
)
from minimuse.utils import uniforms

V = 7
MASK = V
OFF = settings(deadline=None, max_examples=30, derandomize=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def seeds(*numbers):
    return [seeded(n) for n in numbers]


def masks(batch, n):
    return torch.full((batch, n), MASK)


def fixed(p):
    """p (N, V) -> a model whose distribution at each place is p, whatever the rest says."""
    log_p = torch.tensor(p).log()
    return lambda tokens, u: log_p.expand(len(tokens), *log_p.shape)


def toy(tokens, u):
    """Exact and batch-invariant, (B, N) -> (B, N, V): what stands in a row, and u, choose the logits of each place."""
    table = 2 * torch.randn(101, V, generator=seeded(9))
    place = torch.arange(tokens.shape[1])
    key = 31 * tokens + 17 * tokens.roll(1, 1) + 7 * place + tokens.sum(1, keepdim=True) + round(100 * u)
    return table[key % 101]


def run(model, tokens, **settings_):
    return list(decode(model, tokens, mask_id=MASK, **settings_))


def infills(*rows, n=16):
    """For each row its number of masked tokens, spread over the row -> (B, n)."""
    tokens = torch.randint(V, (len(rows), n), generator=seeded(4))
    for row, k in zip(tokens, rows, strict=True):
        row[torch.randperm(n, generator=seeded(k))[:k]] = MASK
    return tokens


# --- how many ---------------------------------------------------------------------------------------------------------


def test_pitfall_09_each_step_reveals_what_the_table_says():
    steps = run(toy, masks(2, 256), steps=12, choice_temperature=4.5)
    expected = [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]
    for row in (0, 1):
        assert [s.revealed[row].sum().item() for s in steps] == expected, "MaskGIT's counts, a step at a time"
    assert [s.index for s in steps] == list(range(12)), "twelve steps, none lost"
    assert not steps[-1].masked.any(), "the last step leaves nothing masked"


def test_u_runs_from_zero_to_one_with_the_steps():
    seen = []

    def spy(tokens, u):
        seen.append(u)
        return toy(tokens, u)

    steps = run(spy, masks(1, 16), steps=5)
    assert seen == [0, 0.25, 0.5, 0.75, 1], "guidance is seen at i / (T - 1)"
    assert [s.u for s in steps] == seen, "and told"
    (only,) = run(spy, masks(1, 16), steps=1)
    assert seen[5:] == [1.0], "a single step sees the end"
    assert only.revealed.all(), "and reveals all"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "log", "pow2.5", "arccos", lambda u: 1 - u])
def test_any_schedule_is_followed(schedule):
    steps = run(toy, masks(1, 64), steps=6, schedule=schedule)
    assert [s.revealed.sum().item() for s in steps] == reveal_counts(64, 6, schedule), f"counts of {schedule}"


def test_a_row_with_fewer_masked_tokens_than_steps_joins_late():
    steps = run(toy, infills(3, 16), steps=8)
    late = [s.revealed[0].sum().item() for s in steps]
    assert late == [0, 0, 0, 0, 0, 1, 1, 1], "three tokens take the last three steps"
    assert [s.revealed[1].sum().item() for s in steps] == reveal_counts(16, 8), "the neighbour follows its own counts"
    alone = run(toy, infills(3), steps=8)
    assert [(s.index, s.u) for s in alone] == [(5, 5 / 7), (6, 6 / 7), (7, 1.0)], "alone, no step is spent on nothing"


@given(
    rows=st.lists(st.integers(0, 16), min_size=1, max_size=4),
    steps=st.integers(1, 16),
    order=st.sampled_from(list(ORDERS)),
    schedule=st.sampled_from(["cosine", "sqrt", "log", entropy_bound(2.0)]),
    temperature=st.sampled_from([0.0, 4.5]),
)
@OFF
def test_pitfall_08_revealed_tokens_never_change(rows, steps, order, schedule, temperature):
    start = infills(*rows)
    tokens, masked = start, start == MASK
    trace = run(toy, start, steps=steps, order=order, schedule=schedule, choice_temperature=temperature)
    for s in trace:
        assert s.tokens[~masked].equal(tokens[~masked]), "a token that stood was drawn again"
        assert not (s.revealed & ~masked).any(), "a known token counts as revealed"
        assert s.masked.equal(masked & ~s.revealed), "masked is what was masked, less what was revealed"
        assert (s.tokens == MASK).equal(s.masked), "[MASK] stands exactly where masked says"
        assert s.confidence[~masked].eq(0).all(), "a known token has no confidence"
        tokens, masked = s.tokens, s.masked
    assert not masked.any(), "something is still masked at the end"
    assert tokens[start != MASK].equal(start[start != MASK]), "a given token was touched"
    assert len(trace) <= max(1, steps), f"{len(trace)} steps of {steps}"


def test_an_order_sees_the_picture_filled_in():
    """Known tokens as they are, the others as drawn: what a ranker of whole pictures needs."""
    start, seen = infills(16, 5, 0), []

    def spy(logits, drawn, masked, u):
        assert drawn.max() < V, "[MASK] is no part of a picture"
        seen.append((drawn, masked))
        return torch.zeros(drawn.shape)

    tokens = start
    for s, (drawn, masked) in zip(run(toy, start, steps=4, order=spy), seen, strict=True):
        assert masked.equal(tokens == MASK)
        assert drawn[~masked].equal(tokens[~masked]), "a known token was drawn again"
        assert s.tokens[s.revealed].equal(drawn[s.revealed]), "what is revealed is what was judged"
        tokens = s.tokens


def test_remasking_keeps_the_best_of_all_so_far():
    """Deviation from Muse: the counts are the schedule's, the given tokens stay, a revealed one need not."""
    liked = torch.rand(4, 16, generator=seeded(2))
    taste = iter(liked)  # each step likes other places

    def order(logits, drawn, masked, u):
        return next(taste).expand(drawn.shape)

    start = infills(12)
    given_ = start != MASK
    trace = run(toy, start, steps=4, order=order, schedule="linear", remask=True)
    for i, s in enumerate(trace):
        best = liked[i].masked_fill(given_[0], -1).topk(3 * (i + 1)).indices
        assert sorted(best.tolist()) == (~s.masked & ~given_)[0].nonzero()[:, 0].tolist(), f"step {i}"
        assert s.tokens[given_].equal(start[given_]), "a given token was touched"
    taken_back = sum(int((~a.masked & b.masked).sum()) for a, b in itertools.pairwise(trace))
    assert taken_back > 0, "nothing was masked again"
    assert not trace[-1].masked.any()


def test_nothing_masked_is_a_single_step():
    tokens = torch.randint(V, (2, 9))
    (step,) = run(toy, tokens, steps=8)
    assert step.tokens.equal(tokens), "nothing to draw, nothing drawn"
    assert not step.masked.any(), "nothing is masked"
    assert not step.revealed.any(), "and nothing was revealed"


def test_the_given_tensor_is_not_written_to():
    tokens = masks(2, 9)
    run(toy, tokens, steps=3)
    assert tokens.eq(MASK).all(), "decode wrote into its argument"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_models_logits_are_not_written_to(temperature):
    logits = torch.randn(2, 9, 5)
    kept = logits.clone()
    for step in decode(
        lambda t, u: logits, torch.full((2, 9), 5), mask_id=5, steps=3, sampling_temperature=temperature
    ):
        assert logits.equal(kept), f"step {step.index} changed what the model gave"


def test_the_model_sees_what_stands():
    seen = []

    def spy(tokens, u):
        seen.append(tokens.clone())
        return toy(tokens, u)

    steps = run(spy, infills(9, 16), steps=4)
    assert seen[0].equal(infills(9, 16)), "first the tokens as given"
    for before, after in zip(steps, seen[1:], strict=False):
        assert after.equal(before.tokens), "then each step's result"


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature):
    logits = torch.tensor([1.0, -1.0, 0.3, 2.0, -3.0, 0.0])
    tokens = draw(logits.expand(1, 40_000, 6), torch.rand(1, 40_000, generator=seeded()), temperature)
    expected = (logits.double() / temperature).softmax(0) * 40_000
    result = stats.chisquare(torch.bincount(tokens[0], minlength=6).numpy(), expected.numpy())
    assert result.pvalue > 1e-3, f"softmax(logits / {temperature}): {result}"


@given(st.integers(0, 1000), st.sampled_from([1e-4, 0.3, 1.0, 50.0]), st.sampled_from([None, 1, 2, 5, 100]))
@OFF
def test_draws_are_the_inverse_cdf(seed, temperature, top_k):
    """Uniform x draws the token whose stretch of the CDF holds x: the same draw on every machine."""
    logits = 3 * torch.randn(1, 20, V, generator=seeded(seed))
    x = torch.rand(1, 20, generator=seeded(seed + 1))
    tokens = draw(logits, x, temperature, top_k)
    kept = logits >= logits.topk(min(top_k or V, V)).values[..., -1:]
    cdf = (logits.double() / temperature).masked_fill(~kept, -math.inf).softmax(-1).cumsum(-1)
    upper = cdf.gather(-1, tokens[..., None])[..., 0]
    lower = torch.where(tokens > 0, cdf.gather(-1, (tokens[..., None] - 1).clamp(min=0))[..., 0], 0)
    assert (lower - 1e-5 <= x).all(), "x lies below the drawn token's stretch"
    assert (x <= upper + 1e-5).all(), "x lies above the drawn token's stretch"


@pytest.mark.parametrize("x", [0.0, 1 - 2**-24, 0.5])
def test_tokens_of_probability_zero_are_never_drawn(x):
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf]).expand(1, 3, 5)
    tokens = draw(logits, torch.full((1, 3), x), 1.0)
    assert tokens.eq(1 if x < 0.5 else 3).all(), f"uniform {x} drew {tokens.tolist()}"


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_never_draws_outside_the_k(k):
    logits = torch.randn(1, 1, V, generator=seeded(2)).expand(1, 20_000, V)
    tokens = draw(logits, torch.rand(1, 20_000, generator=seeded()), 2.0, k)
    best = logits[0, 0].topk(k)
    assert set(tokens.unique().tolist()) == set(best.indices.tolist()), f"all of the best {k}, and no other"
    counts = torch.bincount(tokens[0], minlength=V)[best.indices]
    expected = (best.values.double() / 2).softmax(0) * 20_000
    if k > 1:
        result = stats.chisquare(counts.numpy(), expected.numpy())
        assert result.pvalue > 1e-3, f"in the proportions of their softmax: {result}"


@pytest.mark.parametrize("place", [0, 3, 6])
def test_pitfall_33_rare_tokens_are_drawn_as_often_as_they_should(place):
    """A token of probability 1e-9, at the start, in the middle and at the end: float32 draws it 60 times too often, or
    never. A billion evenly spaced uniforms are too many, so that only those around its stretch of the CDF are tried.
    """
    p = torch.full((7,), (1 - 1e-9) / 6, dtype=torch.double)
    p[place] = 1e-9
    start = p[:place].sum()
    x = start + torch.linspace(-4e-9, 4e-9, 8001, dtype=torch.double)
    x = x[(x >= 0) & (x < 1)]
    for logits in (p.log(), p.log().float()):
        tokens = draw(logits.expand(1, len(x), 7), x[None], 1.0)
        spread = (tokens[0] == place).sum().item() * 1e-12  # each uniform stands for 1e-12
        assert spread == pytest.approx(1e-9, rel=0.01), f"a token of 1e-9 has {spread:.2g} of the draws"


def test_pitfall_33_random_numbers_reach_the_tails():
    """Of 2^24 float32 uniforms the lowest is 0, and Gumbel noise ends at 16.6. Finer numbers have 48 random bits."""
    seen = []

    def spy(logits, x, *how):
        seen.append(x)
        return draw(logits, x, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimuse.sampler.draw", spy)
        run(toy, masks(64, 256), steps=1, generator=seeded())
    (x,) = seen
    fine = (x.double() * 2**24).frac()
    assert x.dtype == torch.float64, "uniforms are float64"
    assert stats.kstest(fine.flatten().numpy(), "uniform").pvalue > 1e-3, "the lower 24 bits are random too"
    assert x.min() > 0, "and no noise is infinite"


def test_temperature_zero_is_argmax():
    logits = torch.randn(3, 50, V)
    assert draw(logits, torch.rand(3, 50), 0).equal(logits.argmax(-1)), "temperature 0 is the most likely token"
    assert draw(logits, torch.rand(3, 50), 1e-300).equal(logits.argmax(-1)), "and so is nearly 0"
    once, again = (run(toy, masks(2, 16), steps=4, sampling_temperature=0, generator=seeded(i))[-1] for i in (0, 1))
    assert once.tokens.equal(again.tokens), "without noise there is nothing random left"


def test_confidence_is_the_probability_of_the_drawn_token():
    model = fixed([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    (step,) = decode(model, torch.full((1000, 2), 3), mask_id=3, steps=1)
    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    expected = torch.stack([table[0][step.tokens[:, 0]], table[1][step.tokens[:, 1]]], 1)
    torch.testing.assert_close(step.confidence, expected, msg=lambda m: f"p of what was drawn: {m}")


# --- which are revealed -----------------------------------------------------------------------------------------------


def first_revealed(steps):
    """The places that the first step reveals, (B, k)."""
    return steps[0].revealed.nonzero()[:, 1].view(len(steps[0].revealed), -1)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 6.0])
def test_pitfall_10_ranking_noise_is_gumbel_on_log_p(tau):
    """Two places, two steps. Gumbel-max: P(A first) = p_A^(1/tau') / (p_A^(1/tau') + p_B^(1/tau')), tau' = tau / 2.

    Noise on p instead of log p would give 0.426 instead of 0.4 at tau = 2; at every other tau the share is another.
    """
    model, count = fixed([[0.6, 0.4], [0.9, 0.1]]), 20_000
    first, _ = decode(
        model,
        torch.full((count, 2), 2),
        mask_id=2,
        steps=2,
        sampling_temperature=0,
        choice_temperature=tau,
        generator=seeded(),
    )
    a, b = 0.6 ** (2 / tau), 0.9 ** (2 / tau)
    share = first.revealed[:, 0].float().mean().item()
    assert share == pytest.approx(a / (a + b), abs=0.012), f"P(A is kept first) at tau = {tau}"


def test_sampling_temperature_does_not_move_the_ranking():
    """The ranking reads log p of the model, not of the tempered distribution."""
    model, count = fixed([[0.6, 0.4], [0.9, 0.1]]), 20_000
    first, _ = decode(
        model,
        torch.full((count, 2), 2),
        mask_id=2,
        steps=2,
        sampling_temperature=1e-3,
        choice_temperature=2.0,
        generator=seeded(),
    )
    assert first.revealed[:, 0].float().mean().item() == pytest.approx(0.4, abs=0.012), "0.6 / (0.6 + 0.9)"


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_pitfall_11_ranking_noise_falls_linearly_to_zero(at):
    """Of T = 4 steps, step i ranks with tau (1 - (i + 1) / 4): 3/4, 1/2, 1/4 and 0 of tau, no product of them.

    Step i < `at` reveals place i; at step `at` places 4 and 5 compete with log p of 0.3 and 0.7.
    """
    tau, count = 3.0, 5000

    def order(logits, drawn, masked, u):
        scores = torch.full(drawn.shape, -1e6)
        i = round(3 * u)
        if i < at:
            scores[:, i] = 1e6
        else:
            scores[:, 4], scores[:, 5] = math.log(0.3), math.log(0.7)
        return scores

    *before, step = itertools.islice(
        decode(
            toy,
            masks(count, 6),
            mask_id=MASK,
            steps=4,
            schedule=lambda logits, masked, u: (
                torch.ones(count, dtype=torch.long) if u < 1 else torch.full((count,), 2)
            ),
            order=order,
            choice_temperature=tau,
            generator=seeded(),
        ),
        at + 1,
    )
    assert all(s.revealed[:, i].all() for i, s in enumerate(before)), "the steps before should take the decoys"
    if at == 3:  # all that is left is revealed: nothing to rank
        assert step.revealed.sum(1).eq(3).all(), "the last step reveals the rest"
        return
    now = tau * (1 - (at + 1) / 4)
    a, b = 0.3 ** (1 / now), 0.7 ** (1 / now)
    share = step.revealed[:, 4].float().mean().item()
    assert share == pytest.approx(a / (a + b), abs=0.02), f"at step {at} the temperature should be {now}"


def test_without_noise_the_most_confident_are_kept():
    steps = run(toy, masks(3, 16), steps=5, choice_temperature=0.0)
    for s in steps:
        for row in range(3):
            kept, left = s.confidence[row][s.revealed[row]], s.confidence[row][s.masked[row]]
            assert left.numel() == 0 or kept.min() >= left.max(), f"step {s.index} left a surer token masked"


@pytest.mark.parametrize("order", ["margin", "entropy"])
def test_margin_and_entropy_by_hand(order):
    """p = (0.5, 0.5, 0), (0.6, 0.2, 0.2), (0.55, 0.43, 0.02): margins 0, 0.4, 0.12; entropies 0.69, 0.95, 0.77."""
    p = torch.tensor([[0.5, 0.5, 1e-9], [0.6, 0.2, 0.2], [0.55, 0.43, 0.02]])
    steps = list(decode(fixed(p.tolist()), torch.full((1, 3), 3), mask_id=3, steps=3, order=order))
    places = [s.revealed[0].nonzero().item() for s in steps]
    assert places == {"margin": [1, 2, 0], "entropy": [0, 2, 1]}[order], f"the order of {order}"


def test_raster_is_row_by_row():
    steps = run(toy, masks(2, 16), steps=16, order="raster", generator=seeds(1, 2))
    assert [s.revealed.nonzero()[:, 1].tolist() for s in steps] == [[i, i] for i in range(16)], "one after the other"


def test_random_order_is_uniform():
    model = fixed([[0.5, 0.5]] * 8)
    steps = list(decode(model, torch.full((5000, 8), 2), mask_id=2, steps=8, order="random", generator=seeded()))
    first = torch.bincount(first_revealed(steps)[:, 0], minlength=8)
    assert stats.chisquare(first.numpy()).pvalue > 1e-3, f"first places {first.tolist()}"
    second = steps[1].revealed.nonzero()[:, 1]
    pairs = torch.bincount(8 * first_revealed(steps)[:, 0] + second, minlength=64).view(8, 8)
    apart = pairs[~torch.eye(8, dtype=torch.bool)]
    assert pairs.diagonal().eq(0).all(), "the same place twice"
    assert stats.chisquare(apart.numpy()).pvalue > 1e-3, "the second place depends on the first"


@pytest.mark.parametrize(("h", "w"), [(1, 1), (4, 4), (8, 8), (16, 16), (3, 5), (2, 32)])
def test_halton_is_a_permutation(h, w):
    assert halton_rank(h, w).sort().values.equal(torch.arange(h * w)), "each cell has one place in the sequence"


def test_halton_matches_scipy():
    """Cells in the order in which scipy's sequence of bases 2 and 3 enters them (its first point is the origin)."""
    points = stats.qmc.Halton(d=2, scramble=False).random(4000)[1:]
    cells = dict.fromkeys((int(8 * y), int(8 * x)) for y, x in points)
    rank = halton_rank(8, 8).view(8, 8)
    assert [rank[cell].item() for cell in cells] == list(range(64)), "not the Halton sequence of bases 2 and 3"
    assert list(cells)[:4] == [(4, 2), (2, 5), (6, 0), (1, 3)], (
        "by hand: (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9)"
    )


def test_halton_spreads_what_is_revealed_together():
    def nearest(places):
        at = torch.stack([places // 16, places % 16], 1).double()
        return (torch.cdist(at, at) + 99 * torch.eye(len(at))).min().item()

    steps = run(toy, masks(1, 256), steps=16, order="halton", schedule="linear")
    spread = nearest(first_revealed(steps)[0])
    by_chance = [nearest(torch.randperm(256, generator=seeded(i))[:16]) for i in range(50)]
    assert spread > max(by_chance), f"nearest neighbours are {spread} apart, by chance up to {max(by_chance)}"
    rank = halton_rank(16, 16)
    assert rank[first_revealed(steps)[0]].sort().values.equal(torch.arange(16)), "the first sixteen of the sequence"


def test_halton_ranks_are_computed_once():
    halton_rank.cache_clear()
    run(toy, masks(2, 256), steps=16, order="halton")
    assert halton_rank.cache_info().misses == 1, "the ranks are computed again at every step"


def test_halton_of_no_square_says_what_to_do():
    with pytest.raises(ValueError, match="by_rank"):
        run(toy, masks(1, 15), steps=3, order=halton)
    steps = run(toy, masks(1, 15), steps=15, order=by_rank(halton_rank(3, 5)))
    places = torch.tensor([s.revealed[0].nonzero().item() for s in steps])
    assert halton_rank(3, 5)[places].equal(torch.arange(15)), "by_rank reveals by rank"


def test_an_order_of_ones_own_sees_logits_draws_and_mask():
    seen = []

    def backwards(logits, drawn, masked, u):
        seen.append((logits.shape, drawn.shape, masked.clone(), u))
        return torch.arange(drawn.shape[1]).float().expand_as(drawn)

    steps = run(toy, masks(2, 9), steps=3, order=backwards)
    assert steps[0].revealed[0].nonzero()[:, 0].tolist() == [7, 8], "the highest scores are kept"
    assert [s[0] for s in seen] == [(2, 9, V)] * 3, "logits (B, N, V)"
    assert [s[1] for s in seen] == [(2, 9)] * 3, "drawn (B, N)"
    assert seen[1][2].equal(steps[0].masked), "masked before the step"
    assert [s[3] for s in seen] == [0, 0.5, 1], "and progress"


# --- adaptive rules ---------------------------------------------------------------------------------------------------


def test_token_entropy_by_hand():
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([math.log(2), math.log(4), 0.0])
    torch.testing.assert_close(
        token_entropy(p.log()), expected, msg=lambda m: f"impossible tokens (logit -inf) count nothing: {m}"
    )


def test_a_world_with_impossible_tokens_decodes():
    """Exact worlds give some tokens probability 0."""
    model = fixed([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    for order in [o for o in ORDERS if o != "halton"]:
        steps = list(decode(model, torch.full((50, 3), 3), mask_id=3, steps=3, order=order, choice_temperature=1.0))
        tokens = steps[-1].tokens
        assert tokens[:, 0].max() <= 1, f"{order} drew a token of probability 0"
        assert tokens[:, 1].eq(0).all(), f"{order} missed the only possible token"
    first, *_ = decode(model, torch.full((1, 3), 3), mask_id=3, steps=3, order="entropy")
    assert first.revealed[0].tolist() == [False, True, False], "the certain token is the surest"


def test_entropy_bound_by_hand():
    """Pitfall 32. Entropies 0, ln 2, ln 2, ln 4, the surest first: without the largest they sum to 0, 0, 0.69, 1.39."""
    p = [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]]
    logits, masked = torch.tensor(p).log()[None], torch.ones(1, 4, dtype=torch.bool)
    for bound, count in ((0.0, 2), (0.69, 2), (0.70, 3), (1.38, 3), (1.39, 4), (2.78, 4)):
        assert entropy_bound(bound)(logits, masked, 0.0).tolist() == [count], f"a bound of {bound} nats"
    masked = torch.tensor([[True, False, True, False]])
    assert entropy_bound(0.7)(logits, masked, 0.0).tolist() == [2], "known tokens are not counted"
    assert entropy_bound(0.0)(logits[:, 2:], masked[:, 2:], 0.0).tolist() == [1], "0 nats: one token a step"
    for wrong in (-1, math.nan, math.inf, True, "1", None):
        with pytest.raises(ValueError, match="the entropy bound is"):
            entropy_bound(wrong)


def test_images_of_an_adaptive_batch_finish_at_different_steps():
    sure, unsure = torch.full((2, 8, 4), -20.0)
    sure[:, 0], unsure[:] = 20.0, 0.0

    def model(tokens, u):
        return torch.stack([sure, unsure])

    tokens = torch.full((2, 8), 4)
    steps = list(decode(model, tokens, mask_id=4, steps=8, schedule=entropy_bound(2.0), order="entropy"))
    counts = [s.revealed.sum(1).tolist() for s in steps]
    assert counts == [[8, 2], [0, 2], [0, 2], [0, 2]], f"ln 4 < 2 < 2 ln 4: two a step, got {counts}"
    capped = list(decode(model, tokens, mask_id=4, steps=2, schedule=entropy_bound(2.0), order="entropy"))
    assert [s.revealed.sum(1).tolist() for s in capped] == [[8, 2], [0, 6]], "the last of T steps reveals the rest"
    slow = list(decode(model, tokens, mask_id=4, steps=8, schedule=entropy_bound(0.0), order="entropy"))
    assert len(slow) == 8, "at least one token a step, whatever the bound"


def test_a_rule_is_told_from_a_curve_by_its_three_arguments():
    class Curve:
        def __call__(self, u, sharp=1.0, blunt=2.0):
            return 1 - u

    class Rule:
        def __call__(self, logits, masked, u):
            return masked.sum(1)

    assert len(run(toy, masks(1, 16), steps=4, schedule=Curve())) == 4, "one required argument: a curve"
    assert len(run(toy, masks(1, 16), steps=4, schedule=Rule())) == 1, "three: a rule, here all at once"
    assert len(run(toy, masks(1, 16), steps=4, schedule=math.cos)) == 4, "a function without Python's signature"


# --- random numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "log", entropy_bound(2.0)])
@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("rows", [(16, 16, 16), (16, 3, 9), (1, 16, 0)])
def test_pitfall_17_an_image_does_not_depend_on_its_neighbours(schedule, order, rows):
    """One generator an image: the batch draws what each image draws alone, in-fills of any size included."""
    settings_ = {"steps": 6, "schedule": schedule, "order": order, "choice_temperature": 4.5}
    start = infills(*rows)
    together = run(toy, start, generator=seeds(10, 11, 12), **settings_)[-1].tokens
    for i in range(3):
        alone = run(toy, start[i : i + 1], generator=seeds(10 + i), **settings_)[-1].tokens
        assert alone[0].equal(together[i]), f"image {i} differs alone and in the batch"
    turned = run(toy, start.flip(0), generator=seeds(12, 11, 10), **settings_)[-1].tokens
    assert turned.flip(0).equal(together), "the order of the images in the batch matters"


def test_one_seed_one_decode_another_seed_another():
    settings_ = {"steps": 4, "choice_temperature": 4.5}
    a, b, c = (run(toy, masks(2, 16), generator=seeded(s), **settings_)[-1].tokens for s in (1, 1, 2))
    assert a.equal(b), "one seed draws the same twice"
    assert not a.equal(c), "another seed draws something else"
    assert not a[0].equal(a[1]), "images of one generator differ"
    single = run(toy, masks(1, 16), generator=seeded(1), **settings_)[-1].tokens
    listed = run(toy, masks(1, 16), generator=seeds(1), **settings_)[-1].tokens
    assert single.equal(listed), "a list of one generator is that generator"


def test_uniforms_are_drawn_before_the_loop():
    """So the number of draws depends on (B, T, N) alone, and a generator may go on to a second decode."""
    g, h = seeded(3), seeded(3)
    steps = decode(toy, infills(2), mask_id=MASK, steps=8, generator=[g])
    next(steps)
    uniforms(1, 8, 2, 16, generator=[h])
    assert g.get_state().equal(h.get_state()), "in-fills and stopped decodes use as many numbers as any"
    x = uniforms(3, 20, 2, 100, generator=seeded())
    assert x.shape == (3, 20, 2, 100), "two a token a step"
    assert stats.kstest(x.flatten().numpy(), "uniform").pvalue > 1e-3, "uniform on [0, 1)"


def test_values_and_ranking_use_numbers_of_their_own():
    """Were they the same, which place is first would say what is drawn there."""
    model = fixed([[0.5, 0.5]] * 2)
    first, _ = decode(model, torch.full((8000, 2), 2), mask_id=2, steps=2, choice_temperature=4.5, generator=seeded())
    drawn = first.tokens[first.revealed]
    assert drawn.float().mean().item() == pytest.approx(0.5, abs=0.02), "the first place's value is biased by its rank"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_generators_of_the_wrong_number():
    for wrong in ([], seeds(1), seeds(1, 2, 3)):
        with pytest.raises(ValueError, match=f"{len(wrong)} generators for a batch of 2"):
            run(toy, masks(2, 9), steps=3, generator=wrong)


def test_a_generator_on_another_device_is_refused():
    class Elsewhere:
        device = torch.device("cuda")

    for wrong in (Elsewhere(), [seeded(), Elsewhere()], 7, "seed", [None, 3]):
        with pytest.raises(ValueError, match="give CPU generators"):
            run(toy, masks(2, 9), steps=3, generator=wrong)


NUMBERS = (-1, math.nan, math.inf, True, "1", [1.0], 1e999)
NONSENSE = [
    {name: x} for name in ("sampling_temperature", "choice_temperature") for x in (*NUMBERS, lambda u: math.nan)
]
NONSENSE += [{name: x} for name in ("steps", "top_k") for x in (*NUMBERS, 0, 2.5, 10**13)]
NONSENSE += [{"remask": x} for x in (1, "yes", math.nan)] + [{"mask_id": x} for x in (None, -1, True, 1.5)]


@pytest.mark.parametrize(
    ("tokens", "change", "match"),
    [
        (torch.full((0, 9), MASK), {}, "not empty"),
        (torch.full((2, 0), MASK), {}, "not empty"),
        (torch.full((9,), MASK), {}, r"\(B, N\) long"),
        (torch.full((2, 9), MASK).float(), {}, "tokens are"),
        (torch.full((2, 9), MASK).int(), {}, "int32"),
        (torch.full((2, 9), MASK), {"steps": 0}, "steps is 0"),
        (torch.full((2, 9), MASK), {"steps": -3}, "steps is -3"),
        (torch.full((2, 9), MASK), {"steps": 2.5}, "steps is 2.5"),
        (None, {}, "tokens are None"),
        *((torch.full((2, 9), MASK), change, " is ") for change in NONSENSE),
        (torch.full((2, 9), MASK), {"schedule": "cosinus"}, "schedule is 'cosinus'"),
    ],
)
def test_nonsense_is_refused(tokens, change, match):
    with pytest.raises(ValueError, match=match) as error:
        list(decode(toy, tokens, **{"mask_id": MASK, "steps": 3} | change))
    assert match != " is " or str(error.value).startswith(next(iter(change))), "the message names the setting"


def test_steps_beyond_the_tokens_are_clamped_with_a_warning():
    """A billion steps would be a billion random numbers for each token."""
    with pytest.warns(UserWarning, match="there are only 16 tokens"):
        many = run(toy, masks(1, 16), steps=10**9, generator=seeded())
    assert len(many) == 16, "one token a step"
    assert many[-1].tokens.equal(run(toy, masks(1, 16), steps=16, generator=seeded())[-1].tokens), "as with 16 steps"


def test_numpy_and_torch_scalars_are_numbers():
    plain = run(toy, masks(1, 16), steps=4, top_k=3, choice_temperature=2.0, generator=seeded())[-1].tokens
    for make in (np.int64, torch.tensor):
        settings_ = {"steps": make(4), "top_k": make(3), "choice_temperature": make(2)}
        assert run(toy, masks(1, 16), generator=seeded(), **settings_)[-1].tokens.equal(plain), f"{make} differs"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"order": lambda logits, drawn, masked, u: torch.full(drawn.shape, math.nan)}, "NaN at u = 0"),
        ({"order": lambda logits, drawn, masked, u: torch.zeros(3)}, "the order's scores are"),
        ({"order": lambda logits, drawn, masked, u: None}, "the order's scores are None"),
        ({"schedule": lambda logits, masked, u: None}, "the schedule's counts are None"),
        ({"schedule": lambda logits, masked, u: torch.ones(7)}, "the schedule's counts are"),
        ({"schedule": lambda u: u}, "the schedule rises"),
        ({"schedule": lambda u: math.nan}, "the schedule at u"),
    ],
)
def test_functions_that_give_nonsense_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        run(toy, masks(2, 9), steps=3, **change)


@pytest.mark.parametrize("order", list(ORDERS))
def test_a_model_that_gives_nan_is_refused(order):
    with pytest.raises(ValueError, match="NaN at u = 0"):
        run(lambda tokens, u: torch.full((*tokens.shape, V), math.nan), masks(2, 9), steps=3, order=order)


class HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value, each of which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("order", list(ORDERS))
def test_no_step_reads_a_tensor_on_the_host(order):
    reads = []
    for steps in (2, 9):
        with HostReads() as mode:
            run(toy, masks(2, 16), steps=steps, order=order, choice_temperature=2.0, top_k=3, generator=seeded())
        reads.append(mode.count)
    assert reads[0] == reads[1], "as many reads for 9 steps as for 2"


@pytest.mark.parametrize("order", ["confident", "", None, 3, ["halton"]])
def test_an_unknown_order_lists_the_known(order):
    with pytest.raises(ValueError, match="order is") as error:
        run(toy, masks(2, 9), steps=3, order=order)
    assert all(name in str(error.value) for name in ORDERS), "the message names the known orders"
