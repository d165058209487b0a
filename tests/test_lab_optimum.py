"""lab_optimum.py against brute force over all compositions, enumeration of worlds, and what `compare` measures."""

import doctest
import itertools
import math
import re
import time

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse import lab_optimum
from minimuse.lab import ChainWorld, MixtureWorld, PottsWorld, compare
from minimuse.lab_optimum import (
    expected_kl,
    information_curve,
    optimal_counts,
    plot_curve,
    sampled_curves,
    schedule_of,
    trial,
    world_curves,
)
from minimuse.masking import reveal_counts

SMALL = {"mixture": MixtureWorld.random(3, (2, 2), 3, seed=2), "potts": PottsWorld((2, 3), 2, 0.7)}
SMALL["chain"] = ChainWorld(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 4, torch.tensor([0.7, 0.3]))
small = pytest.mark.parametrize("world", SMALL.values(), ids=SMALL.keys())
curves = st.lists(st.floats(0, 3), min_size=1, max_size=8).map(lambda h: torch.tensor(h, dtype=torch.double))


def compositions(n, steps):
    for cuts in itertools.combinations(range(1, n), steps - 1):
        yield [b - a for a, b in itertools.pairwise([0, *cuts, n])]


def by_definition(h, counts):
    a, total = 0, 0.0
    for s in counts:
        total += sum(h[a] - h[j] for j in range(a, a + s))
        a += s
    return float(total) / len(h)


@given(h=curves, steps=st.integers(1, 9), falls=st.booleans())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_counts_are_the_best_of_all_compositions(h, steps, falls):
    h = h.sort(descending=True).values if falls else h
    counts = optimal_counts(h, steps)
    assert (len(counts), sum(counts), min(counts) > 0) == (min(steps, len(h)), len(h), True)
    best = min(by_definition(h, c) for c in compositions(len(h), len(counts)))
    assert by_definition(h, counts) == pytest.approx(best, abs=1e-9)
    assert expected_kl(h, counts) == pytest.approx(best, abs=1e-9), "the closed form is the sum of its definition"


@small
def test_the_curve_is_that_of_the_enumeration(world):
    """The mean of H(X_i | X_S) over all sets S of j tokens, all values of X_S, and all i outside."""
    n, h = world.n, []
    x = torch.cartesian_prod(*[torch.arange(world.v)] * n)
    p = world.log_prob(x).exp()
    for j in range(n):
        terms = []
        for known in itertools.combinations(range(n), j):
            hidden = [i for i in range(n) if i not in known]
            tokens = x.clone()
            tokens[:, hidden] = world.mask_id
            log_p = world(tokens)[:, hidden]
            terms.append((p[:, None] * -(log_p.exp() * log_p).sum(-1)).sum(0).mean())
        h.append(sum(terms) / len(terms))
    found = information_curve(world)
    torch.testing.assert_close(found, torch.stack(h), rtol=0, atol=1e-9)
    assert world_curves(world).shape == (1, n), "no sampling in a small world"
    estimates = sampled_curves(world, world.sample(4096, torch.Generator().manual_seed(0)), world.mask_id)
    error = estimates.std(0) / 4096**0.5
    assert ((estimates.mean(0) - found).abs() <= 4 * error + 1e-9).all(), "the estimate is unbiased"


@small
@pytest.mark.parametrize("schedule", ["cosine", "linear", "optimal"])
def test_the_closed_form_is_what_compare_measures(world, schedule):
    h = information_curve(world)
    counts = optimal_counts(h, 2) if schedule == "optimal" else reveal_counts(world.n, 2, schedule)
    found = compare(world, {"mine": schedule_of(counts)}, "random", 2, samples=4096).cells[0]
    expected = expected_kl(h, counts)
    assert abs(found["kl"].value - expected) <= 1.5 * found["kl"].margin, f"{found['kl']}, closed form {expected}"
    assert found["kl"].value > 2 * found["kl"].margin, "the case has the power to tell"


def test_the_closed_form_in_a_large_world():
    world = ChainWorld.sticky()
    h = information_curve(world)
    found = compare(world, ["cosine", "square"], "random", 8, samples=512)
    for cell in found.cells:
        expected = expected_kl(h, reveal_counts(64, 8, cell.schedule))
        assert abs(cell["kl"].value - expected) <= 1.5 * cell["kl"].margin
    assert expected_kl(h, optimal_counts(h, 8)) < 0.95 * expected_kl(h, reveal_counts(64, 8, "cosine"))


def test_a_network_gives_cross_entropies():
    """A network that is sure of code 0 with p = 0.7 where nothing is known, and 0.9 where everything else is."""
    x = torch.zeros(8, 100, dtype=torch.long)

    def network(tokens, u):
        p = 0.7 + 0.2 * (tokens != 5).double().mean(1)[:, None, None] * torch.ones(8, 100, 1)
        return torch.cat([p, 1 - p], -1).log()

    found = sampled_curves(network, x, 5, points=11).mean(0)
    assert found.shape == (100,)
    assert found[0].item() == pytest.approx(-math.log(0.7))
    assert found[99].item() == pytest.approx(-math.log(0.7 + 0.2 * 0.99))
    exact = -torch.log(0.7 + 0.2 * torch.arange(100) / 100)
    assert (found - exact).abs().max() < 1e-3, "the points between are interpolated"
    assert sampled_curves(network, x, 5, points=100).mean(0).tolist() == pytest.approx(exact.tolist())


def test_a_noisy_curve_becomes_one_that_falls():
    found = information_curve(torch.tensor([[3.0, 1.0, 2.0, 0.5], [3.0, 1.0, 2.0, 0.7]]))
    assert found.tolist() == pytest.approx([3, 1.5, 1.5, 0.6]), "values that rise share their mean"


def test_the_time_that_it_takes():
    h = torch.rand(1024).sort(descending=True).values
    start = time.process_time()
    optimal_counts(h[:256], 24)
    middle = time.process_time()
    assert optimal_counts(h, 1024) == [1] * 1024
    assert middle - start < 1
    assert time.process_time() - middle < 20


def test_plot_the_staircases():
    h = torch.tensor([2.0, 1.0, 0.5, 0.0])
    _, ax = plt.subplots()
    plot_curve(h, {"all at once": [4], "one by one": [1] * 4}, ax)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["information curve", "all at once: KL 1.1250", "one by one: KL 0.0000"]
    plt.close("all")


def test_a_trial_in_a_named_world():
    """The closed form is that of the curve; the excess NLL agrees with the error of a sampler that is exact."""
    text, figure = trial("potts", "linear", "halton", 64)
    assert "**linear**: " + " ".join("1" * 64) + ". Expected KL 0.0000." in text
    value, margin = map(float, re.search(r"halton order: (\S+) ± (\S+)", text).groups())
    assert abs(value) < 2 * margin < 0.1, "one token a step draws from the world"
    assert len(figure.axes) == 13


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(lab_optimum) == (0, 1), "no failure, one example"


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda: expected_kl(torch.ones(4), [2, 1]), "sum to the 4 tokens"),
        (lambda: expected_kl(torch.ones(4), [4, 0]), "positive"),
        (lambda: expected_kl(torch.tensor([1.0, math.nan]), [2]), "finite"),
        (lambda: optimal_counts(torch.ones(4), 0), "steps is 0"),
        (lambda: optimal_counts([1.0, 0.5], 2), r"\(N,\)"),
        (lambda: world_curves(MixtureWorld.random(), samples=0), "samples is 0"),
    ],
)
def test_wrong_input_is_named(wrong, match):
    with pytest.raises(ValueError, match=match):
        wrong()
