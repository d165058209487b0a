"""lab_worlds.py: every world against enumeration, and as a LogitsFn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minimuse.lab_worlds import WORLDS, ChainWorld, ConditionalMixture, MixtureWorld, PottsWorld, World

OFF = settings(deadline=None, max_examples=25, derandomize=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Copies(World):
    """A world of one function, as a user would write it: one code everywhere, with some noise; the default `sample`."""

    def __init__(self):
        super().__init__((1, 4), 3)

    def log_evidence(self, e):
        p = 0.9 * torch.eye(3, dtype=torch.double) + 0.1 / 3
        return torch.stack([(e @ p[k]).prod(1) for k in range(3)]).mean(0).log()


TINY = {
    "mixture": MixtureWorld.random(3, (2, 3), 3),
    "weighted mixture": MixtureWorld(torch.rand(2, 4, 2, generator=seeded()) + 0.1, torch.tensor([0.9, 0.1])),
    "labels": ConditionalMixture.random(3, (2, 3), 2, labels=2),
    "chain": ChainWorld(torch.rand(3, 3, generator=seeded(1)) + 0.05, 6, torch.tensor([0.7, 0.2, 0.1])),
    "potts": PottsWorld((2, 3), 3, 0.7),
    "potts of one row": PottsWorld((1, 5), 3, -0.8),
    "potts of three rows": PottsWorld((3, 3), 2, 1.1),
    "of one function": Copies(),
}
worlds = pytest.mark.parametrize("world", TINY.values(), ids=TINY.keys())


def all_examples(world):
    return torch.cartesian_prod(*[torch.arange(world.v)] * world.n)


def table(world):
    """All examples (V^N, N) and their probabilities, by the definition of each world, not by its code."""
    x = all_examples(world)
    if isinstance(world, MixtureWorld):
        terms = world.tables[:, torch.arange(world.n), x].prod(-1)  # (K, V^N)
        p = (world.weights[:, None] * terms).sum(0)
    elif isinstance(world, ChainWorld):
        p = world.start[x[:, 0]] * world.transfer[x[:, :-1], x[:, 1:]].prod(1)
    elif isinstance(world, PottsWorld):
        g = x.view(-1, *world.grid)
        equal = (g[:, 1:] == g[:, :-1]).flatten(1).sum(1) + (g[:, :, 1:] == g[:, :, :-1]).flatten(1).sum(1)
        p = (world.coupling * equal.double()).exp()
        p = p / p.sum()
    else:
        p = sum(((x == k).double() * 0.9 + 0.1 / 3).prod(1) for k in range(3)) / 3
    return x, p


@worlds
def test_log_prob_is_the_definition(world):
    x, p = table(world)
    assert p.sum().item() == pytest.approx(1), "the definition itself is a distribution"
    torch.testing.assert_close(world.log_prob(x).exp(), p.double(), rtol=1e-9, atol=0)


@worlds
@given(data=st.data())
@OFF
def test_conditionals_are_those_of_the_enumeration(world, data):
    cell = st.integers(0, world.v)  # world.v is [MASK]
    row = data.draw(st.lists(cell, min_size=world.n, max_size=world.n))
    x, p = table(world)
    known = torch.tensor(row) != world.mask_id
    out, left_out = world(torch.tensor([row]))[0].exp(), world.leave_one_out(torch.tensor([row]))[0].exp()
    for i in range(world.n):
        others = known.clone()
        others[i] = False
        for given_, result in ((known, out), (others, left_out)):
            fits = (x[:, given_] == torch.tensor(row)[given_]).all(1)
            expected = torch.stack([p[fits & (x[:, i] == v)].sum() for v in range(world.v)]) / p[fits].sum()
            torch.testing.assert_close(result[i], expected.double(), rtol=1e-8, atol=1e-12)


@worlds
def test_marginals_of_known_tokens(world):
    """log_prob of an example with [MASK] is the marginal of the known tokens."""
    x, p = table(world)
    some = x[5].clone()
    some[[0, 2]] = world.mask_id
    fits = (x[:, some != world.mask_id] == some[some != world.mask_id]).all(1)
    assert world.log_prob(some[None]).exp().item() == pytest.approx(p[fits].sum().item())
    assert world.log_prob(torch.full((1, world.n), world.mask_id)).item() == pytest.approx(0, abs=1e-9)


@worlds
def test_entropy(world):
    p = table(world)[1].double()
    exact = -(p * p.log()).sum().item()
    if isinstance(world, ChainWorld | PottsWorld):
        assert world.entropy() == pytest.approx(exact), "the entropy is exact"
    else:
        assert world.entropy() is None, "there is no closed form"


@worlds
def test_samples_have_the_distribution(world):
    x, p = table(world)
    n = 20_000
    drawn = world.sample(n, seeded(3))
    assert drawn.shape == (n, world.n)
    digits = world.v ** torch.arange(world.n).flip(0)
    seen = torch.bincount((drawn * digits).sum(1), minlength=len(x)).double()
    expected = n * p[(x * digits).sum(1).argsort()].double()
    rare = expected < 10
    seen, expected = (torch.cat([c[~rare], c[rare].sum()[None] + 1e-9]).numpy() for c in (seen, expected))
    assert stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-3
    assert drawn.equal(world.sample(n, seeded(3))), "the same seed gives the same samples"


@worlds
def test_batches_do_not_matter(world, monkeypatch):
    x = world.sample(7, seeded(4))
    x[torch.rand(x.shape, generator=seeded(5)) < 0.5] = world.mask_id
    whole, alone = world(x), world(x[3:4])
    torch.testing.assert_close(whole[3:4], alone)
    monkeypatch.setattr(type(world), "batch", 2)
    torch.testing.assert_close(world(x), whole)
    with torch.inference_mode():
        torch.testing.assert_close(world(x), whole)


@pytest.mark.parametrize(
    "world",
    [MixtureWorld.random(32, (16, 16)), ChainWorld.sticky(256, 8, 0.999), PottsWorld((6, 32), 2, 2.0)],
    ids=["mixture", "chain", "potts"],
)
def test_large_worlds_stay_finite_and_consistent(world):
    """The chain rule in any order gives log p, and nothing underflows in 192 or 256 tokens."""
    x = torch.cat([world.sample(2, seeded()), torch.randint(world.v, (1, world.n), generator=seeded(1))])
    tokens, total = torch.full_like(x, world.mask_id), 0
    for group in torch.randperm(world.n, generator=seeded(2)).split(1)[:20]:
        total = total + world(tokens)[:, group[0]].gather(1, x[:, group])[:, 0]
        tokens[:, group] = x[:, group]
    assert world(tokens).exp().sum(-1).sub(1).abs().max() < 1e-9, "normalized"
    torch.testing.assert_close(total, world.log_prob(tokens))
    assert world.log_prob(x).isfinite().all()
    assert (world.log_prob(x)[:2] > world.log_prob(x)[2]).all(), "noise is less likely than a sample"


def test_potts_by_hand():
    """Two spins: p(equal) = e^J / (e^J + 1)."""
    world = PottsWorld((1, 2), 2, torch.tensor(3.0).log().item())
    assert world(torch.tensor([[0, 2]]))[0, 1].exp().tolist() == pytest.approx([0.75, 0.25])
    assert world.log_prob(torch.tensor([[0, 0], [0, 1]])).exp().tolist() == pytest.approx([0.375, 0.125])


def test_the_named_worlds():
    for name, make in WORLDS.items():
        assert make().n == 64, f"{name} has the grid of the base model of nano"


def test_the_stationary_distribution_of_a_slow_chain():
    """It changes its token once in 1e9 steps, but stays in code 0 twice as long as in code 1."""
    world = ChainWorld(torch.tensor([[1 - 1e-9, 1e-9], [2e-9, 1 - 2e-9]], dtype=torch.double), 4)
    assert world.start.tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-5)


def test_log_evidence_need_not_be_normalized():
    class Scaled(Copies):
        def log_evidence(self, e):
            return super().log_evidence(e) + 5

    x = all_examples(Copies())
    torch.testing.assert_close(Scaled().log_prob(x), Copies().log_prob(x))


@pytest.mark.parametrize("found", [lambda e: e.sum((1, 2))[:, None], lambda e: e.sum((1, 2)) / 0])
def test_a_wrong_log_evidence_is_refused(found):
    world = Copies()
    world.log_evidence = found
    with pytest.raises(ValueError, match="log_evidence of 3 examples"):
        world.log_prob(torch.zeros(3, 4, dtype=torch.long))


def test_numpy_and_torch_scalars_are_numbers():
    world = MixtureWorld.random(
        np.int64(2), (torch.tensor(2), np.int32(2)), np.int64(3), np.float32(2.0), torch.tensor(1)
    )
    assert world.tables.equal(MixtureWorld.random(2, (2, 2), 3, 2.0, 1).tables)
    assert PottsWorld((1, 2), np.int64(2), torch.tensor(0.5)).coupling == 0.5
    assert ChainWorld.sticky(np.int64(4), 1, np.float64(0.5)).v == 1, "one code is a world too"


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (lambda: MixtureWorld.random(modes=10**9), "modes"),
        (lambda: MixtureWorld.random(modes=True), "modes"),
        (lambda: MixtureWorld.random(grid=(10**9, 10**9)), "grid"),
        (lambda: MixtureWorld.random(grid=8), "grid"),
        (lambda: MixtureWorld.random(grid=(8, -8)), "grid"),
        (lambda: MixtureWorld.random(codebook_size=2.5), "codebook_size"),
        (lambda: MixtureWorld.random(codebook_size=10**9), "codebook_size"),
        (lambda: MixtureWorld.random(sharpness=math.nan), "sharpness"),
        (lambda: MixtureWorld.random(seed=2**32), "seed"),
        (lambda: MixtureWorld("abc"), "tables"),
        (lambda: MixtureWorld(torch.ones(0, 4, 2)), "tables"),
        (lambda: MixtureWorld(torch.full((2, 4, 2), math.nan)), "tables"),
        (lambda: MixtureWorld(-torch.ones(2, 4, 2)), "tables"),
        (lambda: ChainWorld.sticky(n=10**9), "grid"),
        (lambda: ChainWorld.sticky(n="64"), "n is"),
        (lambda: ChainWorld.sticky(codebook_size=10**9), "codebook_size"),
        (lambda: ChainWorld.sticky(stay=math.nan), "stay"),
        (lambda: ChainWorld.sticky(stay=2), "stay"),
        (lambda: ChainWorld(torch.ones(2, 2), 4, torch.ones(1)), "initial"),
        (lambda: ChainWorld(torch.tensor(1.0), 4), "transition"),
        (lambda: PottsWorld((10**9, 1), 1), "grid"),
        (lambda: PottsWorld((100_000, 1), 1), "rows"),
        (lambda: PottsWorld(coupling=math.inf), "coupling"),
        (lambda: PottsWorld(coupling=1000), "coupling"),
        (lambda: PottsWorld(coupling=True), "coupling"),
    ],
)
def test_nonsense_and_huge_sizes_are_refused_by_name(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MixtureWorld(torch.tensor([[[1.0, 0.0]]])),
        lambda: MixtureWorld(torch.ones(2, 4, 2), torch.ones(3)),
        lambda: MixtureWorld(torch.ones(2, 4, 2), grid=(3, 3)),
        lambda: ChainWorld(torch.ones(2, 3), 4),
        lambda: ChainWorld(torch.eye(2), 4),
        lambda: PottsWorld((13, 4), 2),
        lambda: TINY["chain"](torch.zeros(1, 5, dtype=torch.long)),
        lambda: TINY["chain"](torch.zeros(1, 6)),
        lambda: TINY["chain"](torch.full((1, 6), 4)),
    ],
)
def test_wrong_input_is_refused(wrong):
    with pytest.raises(ValueError, match=r"give|takes|MASK"):
        wrong()
