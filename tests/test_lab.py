"""lab.py: every metric against enumeration of all examples, the comparison and its report."""

import doctest
import itertools
import json
import math
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from minimuse import cli, lab
from minimuse.cfg import get_guidance
from minimuse.eval_metrics import marginal_distances, mean_interval, paired_difference
from minimuse.lab import (
    WORLDS,
    Cell,
    ChainWorld,
    ConditionalMixture,
    MixtureWorld,
    PottsWorld,
    Report,
    WorldEvaluator,
    compare,
    ignores_drawn,
    path_log_q,
)
from minimuse.lab_optimum import GROUPS, Outcome, expected_kl, information_curve, optimal_counts
from minimuse.lab_samplers import entropy_bound
from minimuse.masking import reveal_counts
from minimuse.sampler import ORDERS, by_rank, decode

CHAIN = ChainWorld(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 4, torch.tensor([0.7, 0.3]))  # no ties; a 2x2 grid
MIXTURE = MixtureWorld.random(3, (2, 2), 3, seed=2)
worlds = pytest.mark.parametrize("world", [CHAIN, MIXTURE], ids=["chain", "mixture"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def all_examples(world):
    return torch.cartesian_prod(*[torch.arange(world.v)] * world.n)


def product_q(world, groups):
    """q(x) of all x, by definition, when groups of positions are revealed one after the other."""
    x = all_examples(world)
    q, tokens = torch.ones(len(x), dtype=torch.double), torch.full_like(x, world.mask_id)
    for group in groups:
        logits = world(tokens)
        for i in group:
            q = q * logits[:, i].gather(1, x[:, i : i + 1])[:, 0].exp()
        tokens[:, group] = x[:, group]
    return q


def confident_q(world, counts):
    """q(x) of all x under the confidence order, summed over everything that can be drawn at each step."""
    states = {(world.mask_id,) * world.n: 1.0}
    for count in counts:
        following = {}
        for tokens, weight in states.items():
            log_p = world(torch.tensor([tokens]))[0]
            positions = [i for i in range(world.n) if tokens[i] == world.mask_id]
            for drawn in itertools.product(range(world.v), repeat=len(positions)):
                each = [log_p[i, v].item() for i, v in zip(positions, drawn, strict=True)]
                best = sorted(range(len(positions)), key=lambda j: -each[j])[:count]
                new = list(tokens)
                for j in best:
                    new[positions[j]] = drawn[j]
                following[tuple(new)] = following.get(tuple(new), 0) + weight * math.exp(sum(each))
        states = following
    q = torch.tensor([states.get(tuple(row), 0.0) for row in all_examples(world).tolist()], dtype=torch.double)
    assert q.sum().item() == pytest.approx(1)
    return q


def truth(world):
    return world.log_prob(all_examples(world)).exp()


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def squared_distances(world, p, q):
    """Mean over tokens, and over pairs of tokens, of the squared distance of their distributions."""
    x, gap = all_examples(world), (p - q)[:, None]
    hot = torch.nn.functional.one_hot(x, world.v).double()
    singles = (hot * gap[..., None]).sum(0).square().sum(1).mean().item()
    pairs = [
        (torch.einsum("xa,xb,xo->ab", hot[:, i], hot[:, j], gap)).square().sum().item()
        for i, j in itertools.combinations(range(world.n), 2)
    ]
    return singles, sum(pairs) / len(pairs)


def assert_near(groups, expected):
    """Twice the interval holds the enumerated value; with a fixed seed, chance fails this once in 10,000 cases."""
    found = mean_interval(groups)
    assert abs(found.value - expected) <= max(2 * found.margin, 1e-6), f"{found}, enumerated {expected}"


# --- metrics ----------------------------------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize(
    ("order", "counts", "groups"),
    [
        ("raster", [2, 2], [[0, 1], [2, 3]]),
        ("halton", [2, 2], None),
        (by_rank(torch.tensor([3, 1, 0, 2])), [1, 3], [[2], [0, 1, 3]]),
        ("raster", [1, 1, 1, 1], [[0], [1], [2], [3]]),
        ("raster", [4], [[0, 1, 2, 3]]),
    ],
)
def test_kl_of_a_fixed_partition(world, order, counts, groups):
    left = [sum(counts[i:]) / 4 for i in range(len(counts) + 1)]
    sampling = {"schedule": lambda u: left[round(u * len(counts))], "steps": len(counts), "order": order}
    log_q, when = path_log_q(world, all_examples(world), **sampling)
    if groups is None:
        groups = [(when[0] == t).nonzero()[:, 0].tolist() for t in range(len(counts))]
        assert [len(g) for g in groups] == counts
    p, q = truth(world), product_q(world, groups)
    torch.testing.assert_close(log_q.exp(), q, rtol=1e-6, atol=0)
    outcome = WorldEvaluator(world, samples=2048, seed=5)(**sampling)
    assert_near(outcome.groups["kl"], kl(p, q) / 4)
    assert not outcome.bound, "this path is not random"
    if len(counts) == 4:
        assert kl(p, q) == pytest.approx(0, abs=1e-9), "one token at a time makes no error"


@worlds
@pytest.mark.parametrize(
    ("order", "schedule"), [("entropy", "cosine"), ("margin", "linear"), ("entropy", entropy_bound(1.0))]
)
def test_kl_of_a_path_that_depends_on_the_tokens(world, order, schedule):
    """The order reads logits but no draws: q sums to 1, it is what `decode` draws, and the metric is its KL."""
    sampling = {"order": order, "schedule": schedule, "steps": 3}
    x, p = all_examples(world), truth(world)
    q = path_log_q(world, x, **sampling)[0].exp()
    assert q.sum().item() == pytest.approx(1, abs=1e-6)
    n = 20_000
    *_, last = decode(world, torch.full((n, 4), world.mask_id), mask_id=world.mask_id, generator=seeded(), **sampling)
    code = (last.tokens * world.v ** torch.arange(4).flip(0)).sum(1)
    seen = torch.bincount(code, minlength=len(x)).double() / n
    assert (seen - q).square().sum() < 3 / n
    outcome = WorldEvaluator(world, 2048, seed=1)(**sampling)
    assert_near(outcome.groups["kl"], kl(p, q) / 4)
    assert not outcome.bound


def test_kl_of_random_orders_is_a_bound():
    """The metric is the mean over the six partitions; the KL of the mixture of paths is lower."""
    partitions = [[list(a), [i for i in range(4) if i not in a]] for a in itertools.combinations(range(4), 2)]
    p, paths = truth(CHAIN), [product_q(CHAIN, groups) for groups in partitions]
    mean, true = sum(kl(p, q) for q in paths) / 6, kl(p, sum(paths) / 6)
    outcome = WorldEvaluator(CHAIN, 4096)(order="random", schedule="linear", steps=2)
    assert outcome.bound
    assert_near(outcome.groups["kl"], mean / 4)
    assert true < 0.7 * mean, "in this case the bound is not tight"
    noisy = WorldEvaluator(CHAIN, 64)(order="entropy", schedule="linear", steps=2, choice_temperature=5.0)
    assert noisy.bound, "ranking noise makes the path random"


@worlds
@pytest.mark.parametrize("counts", [[2, 2], [1, 2, 1]])
def test_confidence_against_everything_that_can_be_drawn(world, counts):
    left = [sum(counts[i:]) / 4 for i in range(len(counts) + 1)]
    sampling = {"schedule": lambda u: left[round(u * len(counts))], "steps": len(counts), "order": "confidence"}
    p, q = truth(world), confident_q(world, counts)
    groups = WorldEvaluator(world, 4096, seed=2)(**sampling).groups
    assert "kl" not in groups, "its q is not a product along a path"
    assert_near(groups["excess_nll"], (-(q * p.log()).sum() + (p * p.log()).sum()).item() / 4)
    singles, pairs = squared_distances(world, p, q)
    assert_near(groups["singles"], singles)
    assert_near(groups["pairs"], pairs)
    assert singles > 4 * mean_interval(groups["singles"]).margin, "this case has the power to tell"


def test_an_exact_sampler_has_no_error():
    """One token a step: every interval holds 0, in worlds with and without an exact entropy."""
    for world in (CHAIN, MIXTURE, PottsWorld((2, 3), 2)):
        outcome = WorldEvaluator(world, 1024, seed=3)(order="random", schedule="linear", steps=world.n)
        for groups in outcome.groups.values():
            assert_near(groups, 0.0)
        assert max(map(abs, outcome.groups["kl"])) < 1e-6, "it is 0 for every sample"
        assert outcome.nfe == world.n


def test_marginal_distances_are_the_u_statistic():
    x, y = (torch.randint(3, (2 * GROUPS, 5), generator=seeded(s)) for s in (0, 1))
    y[:, 1] = y[:, 0]
    found = marginal_distances(x, y, 3, GROUPS)

    def u_statistic(x, y, kernel):
        n = len(x)
        xx, yy, xy = (kernel((a[:, None] == b).sum(-1).double()) for a, b in ((x, x), (y, y), (x, y)))
        return (xx.sum() - xx.diag().sum() + yy.sum() - yy.diag().sum()) / (n * (n - 1)) - 2 * xy.mean()

    for metric, kernel in (("singles", lambda m: m / 5), ("pairs", lambda m: m * (m - 1) / 20)):
        whole, without = u_statistic(x, y, kernel), u_statistic(x[2:], y[2:], kernel)  # without the first group
        expected = (GROUPS * whole - (GROUPS - 1) * without).item()
        assert found[metric][0] == pytest.approx(expected, abs=1e-9)


def test_intervals_cover():
    """95% of the intervals hold the enumerated value."""
    p, q = truth(CHAIN), product_q(CHAIN, [[0, 1], [2, 3]])
    expected = {"kl": kl(p, q) / 4, "pairs": squared_distances(CHAIN, p, q)[1]}
    hits = dict.fromkeys(expected, 0)
    for seed in range(60):
        groups = WorldEvaluator(CHAIN, 256, seed)(order="raster", schedule="linear", steps=2).groups
        for metric, value in expected.items():
            found = mean_interval(groups[metric])
            hits[metric] += found.low <= value <= found.high
    assert all(h >= 52 for h in hits.values()), f"of 60 intervals {hits} hold the truth"


def test_which_orders_ignore_the_drawn_tokens():
    blind = {name for name in ORDERS if name != "halton" and ignores_drawn(name, 6, 5)}
    assert blind == {"random", "raster", "entropy", "margin"}
    assert not ignores_drawn(lambda logits, drawn, masked, u: drawn.float(), 4, 2)


# --- guidance ---------------------------------------------------------------------------------------------------------

LABELS = ConditionalMixture.random(3, (2, 2), 2, labels=3, t=1.5)


@pytest.mark.parametrize("guidance", ["constant:1.5", "rising:3", "falling:3", "interval:2:0.4", "power-cosine:3", 0.0])
def test_guided_kl_against_enumeration(guidance):
    """KL to p(x | y) and to p(x) p(y | x)^(1 + t) of q, a product over two steps of three and one of raster order."""
    x, scale = all_examples(LABELS), get_guidance(guidance)
    marginal = LABELS.marginal
    q, tokens = torch.ones(len(x), dtype=torch.double), torch.full_like(x, LABELS.mask_id)
    for step, group in enumerate([[0], [1], [2, 3]]):
        t = scale(step / 2)
        p = (LABELS.leave_one_out(tokens) * (1 + t) - marginal.leave_one_out(tokens) * t).softmax(-1)
        for i in group:
            q = q * p[:, i].gather(1, x[:, i : i + 1])[:, 0]
        tokens[:, group] = x[:, group]
    assert q.sum().item() == pytest.approx(1)
    p, p_x = truth(LABELS), marginal.log_prob(x).exp()
    tilted = p_x * (p / (3 * p_x)) ** 2.5
    tilted = tilted / tilted.sum()
    presets = {
        "mine": {"schedule": lambda u: 1 - round(3 * u) / 4 if u < 1 else 0.0, "order": "raster", "guidance": guidance}
    }
    (cell,) = compare(LABELS, [], presets=presets, steps=[3], samples=8192).cells
    assert_near(cell.groups["kl"], kl(p, q) / 4)
    assert_near(cell.groups["tilted"], kl(tilted, q) / 4)
    assert "gap" not in cell.groups
    assert abs(cell["kl"].value - cell["tilted"].value) > cell["kl"].margin, "this case has the power to tell"


def test_one_token_a_step_is_not_the_tilted_joint():
    """Guidance of each token differs from the tilted target even where no two tokens are drawn together."""
    world = ConditionalMixture.random(4, (2, 2), 3, labels=3, t=1.5, sharpness=1.0)
    presets = {g: {"order": "raster", "guidance": g} for g in ("constant:0", "constant:1.5")}
    plain, guided = compare(world, [], presets=presets, steps=[4]).cells
    assert abs(plain["kl"].value) < 1e-9
    assert guided["tilted"].value > 2 * guided["tilted"].margin
    assert guided["tilted"].value < plain["tilted"].value - plain["tilted"].margin, "but it is nearer"


def test_guidance_needs_labels():
    with pytest.raises(ValueError, match="needs a world with labels"):
        compare(MIXTURE, ["cosine"], ["halton"], [2], samples=64, guidance=1.0)


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    schedules = {"cosine": "cosine", "mine": lambda u: 1 - u**3, "bound": entropy_bound(1.0)}
    orders = ("confidence", "random", "halton")
    return compare(MIXTURE, schedules, orders, steps=(2, 4), presets=["maskgit"], samples=128, seed=0)


def test_the_grid_is_complete(report):
    assert len(report.cells) == 3 * 3 * 2 + 2
    cell = report["mine", "halton", 2]
    assert set(cell.groups) == {"kl", "excess_nll", "singles", "pairs"}
    assert "kl" not in report["mine", "confidence", 2].groups
    assert report["cosine", "random", 2].bound
    assert not cell.bound
    assert cell.nfe == 2
    adaptive = report["bound", "halton", 4]
    assert 1 < adaptive.nfe <= 4, "an adaptive rule counts the passes it took"
    with pytest.raises(KeyError, match="no cell"):
        report["mine", "raster", 2]
    again = compare(MIXTURE, {"mine": lambda u: 1 - u**3}, ["halton"], [2], samples=128)
    assert again.cells == [cell], "a cell does not depend on the others"


@worlds
def test_the_optimal_schedule_and_the_gap_to_it(world):
    """In random order KL is the optimum's plus the gap; other cells have none."""
    h, schedules = information_curve(world), ["optimal", "linear", "square", "bound0.2"]
    report = compare(world, schedules, ["random", "halton"], [2, 3], samples=4096)
    for steps, schedule in itertools.product((2, 3), schedules[:3]):
        cell, best = report[schedule, "random", steps], optimal_counts(h, steps)
        counts = best if schedule == "optimal" else reveal_counts(4, steps, schedule)
        assert cell["gap"].value == pytest.approx(expected_kl(h, counts) - expected_kl(h, best), abs=1e-9)
        assert_near(cell.groups["kl"], expected_kl(h, best) + cell["gap"].value)
        assert cell["gap"].value >= -1e-9, "nothing is below the optimum"
    assert all("gap" not in c.groups for c in report.cells if c.order == "halton" or c.schedule == "bound0.2")
    assert report["square", "random", 2]["gap"].value > 0, "this case has the power to tell"


def test_the_optimum_needs_a_curve():
    class Own:
        grid, codebook_size, titles, about = (4, 4), 4, {}, {}

        def __call__(self, **sampling):
            raise AssertionError

    with pytest.raises(ValueError, match="needs an evaluator with `curves`"):
        compare(Own(), ["optimal"], ["random"], [4])


def test_paired_difference_of_two_cells():
    a, b = compare(CHAIN, ["linear"], ["raster", "halton"], [2], samples=2048).cells
    p = truth(CHAIN)
    expected = (kl(p, product_q(CHAIN, [[0, 1], [2, 3]])) - kl(p, product_q(CHAIN, [[1, 2], [0, 3]]))) / 4
    found = paired_difference(a.groups["kl"], b.groups["kl"])
    assert abs(found.value - expected) <= 2 * found.margin
    assert abs(found.value) > 2 * found.margin, "this case has the power to tell"
    assert found.value == pytest.approx(a["kl"].value - b["kl"].value)


def test_table(report):
    lines = report.table().splitlines()
    assert len(lines) == 2 + len(report.cells)
    assert "<=" in next(line for line in lines if "random" in line), "a bound is marked"
    assert "<=" not in next(line for line in lines if "halton" in line)
    assert lines[0].replace(" ", "") == "|schedule|order|steps|kl|gap|excess_nll|NFE|"
    cells = [report[a, b, int(t)] for a, b, t in ([w.strip() for w in line.split("|")[1:4]] for line in lines[2:])]
    found = [c["kl"].value for c in cells if c.steps == 2 and "kl" in c.groups]
    assert found == sorted(found), "the best first"
    assert [c.steps for c in cells] == [2] * 10 + [4] * 10
    assert ["kl" in c.groups for c in cells[:10]].index(False) == len(found), "what was not measured comes last"
    assert "| pairs " in report.table(metrics=["pairs"])
    paired = report.table(("cosine", "halton"))
    assert len(paired.splitlines()) == len(lines) - 2
    assert "**" in paired


def test_plot(report):
    _, ax = plt.subplots()
    assert report.plot(ax, "pairs") is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(labels) == 10, "a line for each schedule and order, and one for the preset"
    assert {"as maskgit", "halton, entropy bounds"} <= set(labels)
    labels = [text.get_text() for text in report.plot().get_legend().get_texts()]
    assert {"random, cosine (upper bound)", "halton, cosine"} <= set(labels)
    with pytest.raises(ValueError, match="known: kl, tilted, gap, excess_nll"):
        report.plot(metric="fid")
    fractions = [Cell("cosine", "random", t, t, {"accuracy": [0.3 + t / 20] * GROUPS}, False) for t in (2, 8)]
    ax = Report(fractions, {"accuracy": "fraction"}, {"target": "fake"}).plot()
    assert ax.get_yscale() == "linear", "only what spans a power of ten gets a log scale"
    plt.close("all")


def test_save_does_not_overwrite(tmp_path, monkeypatch):
    report = compare(MIXTURE, ["cosine"], ["halton", "confidence"], [2], samples=64, out=tmp_path / "out")
    for metric in report["cosine", "halton", 2].groups:
        assert (tmp_path / "out" / f"{metric}.png").stat().st_size > 5000
    values = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert {"minimuse", "torch", "seed", "samples", "target"} <= set(values["about"])
    assert values["cells"][0]["groups"] == report.cells[0].groups
    assert (tmp_path / "out" / "report.md").read_text(encoding="utf-8") == report.table() + "\n"
    monkeypatch.setattr(WorldEvaluator, "__call__", lambda *a, **k: pytest.fail("work was done first"))
    with pytest.raises(FileExistsError, match="another report"):
        compare(MIXTURE, ["linear"], ["raster"], [2], samples=64, out=tmp_path / "out")
    assert report.save(tmp_path / "out") == tmp_path / "out"


def test_an_evaluator_of_your_own():
    """Any metric of any sampler."""

    class Steps:
        grid, codebook_size = (4, 4), 4
        titles = {"cost": "steps, as a metric"}  # noqa: RUF012
        about = {"target": "nothing"}  # noqa: RUF012

        def __call__(self, *, steps, **sampling):
            return Outcome(steps, {"cost": [float(steps + i % 2) for i in range(8)]})

    report = compare(Steps(), ["cosine"], ["random"], [4, 8])
    assert report["cosine", "random", 8]["cost"].value == 8.5
    assert report.plot().get_ylabel() == "steps, as a metric"
    plt.close("all")


def test_how_to_add_something():
    """The example of the docstring runs."""
    assert doctest.testmod(lab).attempted >= 5
    assert doctest.testmod(lab).failed == 0


def test_a_world_of_your_own():
    """A class with one function is a world: here two tokens that agree, and two that are independent."""

    class Agree(lab.World):
        def log_evidence(self, e):
            p = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.double)
            return (torch.einsum("ba,bc,ac->b", e[:, 0], e[:, 1], p) * e[:, 2].mean(1) * e[:, 3].mean(1)).log()

    orders = {"apart": by_rank(torch.tensor([0, 3, 1, 2])), "raster": "raster"}
    report = compare(Agree((2, 2), 2), ["linear"], orders, [2], samples=640)
    assert report["linear", "apart", 2]["kl"].value == pytest.approx(0, abs=1e-6), "the pair is drawn in two steps"
    information = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert_near(report["linear", "raster", 2].groups["kl"], information / 4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: compare(CHAIN, ["cosinus"]),
        lambda: compare(CHAIN, orders=["confident"]),
        lambda: compare(CHAIN, steps=[]),
        lambda: compare(CHAIN, steps=[0]),
        lambda: compare(CHAIN, samples=100),
        lambda: compare(CHAIN, presets=["dalle"]),
        lambda: compare(CHAIN, ["boundless"]),
    ],
)
def test_wrong_settings_are_refused_before_any_work(wrong, monkeypatch):
    monkeypatch.setattr(WorldEvaluator, "__call__", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"known|give"):
        wrong()


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        *(({"samples": x}, "samples") for x in (0, 32, 100, -64, 64.0, True, math.nan, "64", 10**9)),
        *(({"seed": x}, "seed") for x in (-1, 2**32, 1.5, True, math.nan, "0", [1])),
        *(({"steps": x}, "steps") for x in (0, 1.5, True, math.nan, "8", None, [4, "8"], [math.inf], {4})),
        ({"steps": range(10**9)}, "samplers to compare"),
        *(({"schedules": x}, "schedule") for x in (["pow"], ["boundnan"], ["bound"], ["bound-1"], {"x": 5})),
        ({"presets": ["dalle"]}, "preset"),
    ],
)
def test_every_setting_of_compare_is_checked(wrong, name, monkeypatch):
    monkeypatch.setattr(WorldEvaluator, "__call__", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=name):
        compare(CHAIN, **wrong)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"schedules": 5}, "schedules is 5"),
        ({"orders": [lambda *_: None]}, "orders is"),
        ({"presets": None}, "presets is None"),
        ({"schedule": "linear"}, "give schedules="),  # it would replace every schedule, without a word
        ({"order": "halton"}, "give .* orders="),
        ({"target": 3}, "target is 3"),
        ({"target": MixtureWorld}, "target is"),
        ({"target": lambda **_: None}, "target is"),
    ],
)
def test_wrong_types_are_named(wrong, name):
    with pytest.raises(TypeError, match=name):
        compare(**{"target": CHAIN} | wrong)


def test_numpy_and_torch_scalars_are_numbers():
    same = [compare(CHAIN, steps=t, samples=s, seed=k).cells for t, s, k in (
        (2, 64, 3), (np.int64(2), np.int32(64), torch.tensor(3)), ([torch.tensor(2)], 64, np.uint8(3)),
    )]  # fmt: skip
    assert same[0] == same[1] == same[2]


def test_more_steps_than_tokens():
    """Each takes N steps, one token at a time: no work for the steps that are left."""
    report = compare(CHAIN, ["linear"], ["raster"], [4, 10**9], samples=64)
    assert [c.nfe for c in report.cells] == [4, 4]
    assert report["linear", "raster", 10**9]["kl"].value == pytest.approx(0, abs=1e-6)


def test_a_world_that_is_not_normalized_has_the_same_kl():
    class Scaled(MixtureWorld):
        def log_evidence(self, e):
            return super().log_evidence(e) + 3

    ends = [
        compare(w, ["linear"], ["raster"], [2], samples=64).cells[0].groups["kl"]
        for w in (MIXTURE, Scaled(MIXTURE.tables))
    ]
    assert ends[1] == pytest.approx(ends[0], abs=1e-6)


def test_the_command_with_guidance(capsys):
    words = "compare --world labels --schedule optimal,linear --order random --steps 2 --samples 64 --guidance"
    assert cli.main([*words.split(), "rising:4,1"]) == 0
    values, _ = capsys.readouterr().out.split("difference from optimal, random")
    assert all(name in values for name in ("guidance rising:4.0", "guidance 1.0", "tilted", "gap"))
    assert cli.main("compare --world potts --samples 64 --steps 2 --guidance 1".split()) == 2
    assert "it needs a world with labels" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    words = "compare --world potts --schedule cosine,bound2 --order halton --steps 2 --samples 64"
    words = [*words.split(), "--sampler", "muse,p2:0.5,klass", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    values, paired = capsys.readouterr().out.split("difference from cosine, halton")
    assert values.count("halton") == 2
    assert paired.count("| halton |") == 1, "bound2 less cosine"
    assert all(f"as {name}" in values for name in ("muse", "p2:0.5", "klass"))
    assert (tmp_path / "out" / "report.md").is_file()
    assert cli.main(words) == 2
    assert "another folder" in capsys.readouterr().err
    assert cli.main([*words, "--force"]) == 0
    assert cli.main(["compare", "--world", "ising"]) == 2
    assert "mixture, chain, potts" in capsys.readouterr().err


def test_an_exact_world_needs_no_networks():
    code = """
import sys
from minimuse.lab import PottsWorld, compare
compare(PottsWorld((2, 3)), samples=64, steps=[2], presets=["muse"])
print(*sorted(m for m in sys.modules if m.startswith("minimuse.")))
"""
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {f"minimuse.{m}" for m in ("transformer", "text", "muse", "train", "train_engine")} & set(loaded)


@pytest.mark.parametrize("name", WORLDS)
def test_the_named_worlds_run(name):
    report = compare(WORLDS[name](), ["cosine"], ["halton", "confidence"], [4], samples=64)
    assert all(math.isfinite(v) for cell in report.cells for groups in cell.groups.values() for v in groups)
