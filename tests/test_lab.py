"""judge.py, lab.py and lab_samplers.py: every measure against enumeration, the report, and the presets of known codes."""

import csv
import itertools
import json
import math

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse import cli
from minimuse import lab_samplers as variants
from minimuse.judge import GROUPS, Outcome, WorldJudge, distances, estimate, features, ignores_draws, path_log_q
from minimuse.lab import WORLDS, ChainWorld, MixtureWorld, PottsWorld, World, compare, difference
from minimuse.masking import SCHEDULES, reveal_counts
from minimuse.sampler import ORDERS, by_rank, decode, entropy_bound

OFF = settings(deadline=None, max_examples=25, derandomize=True)
CHAIN = ChainWorld(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 4, torch.tensor([0.7, 0.3]))  # no ties; a 2x2 grid
MIXTURE = MixtureWorld.random(3, (2, 2), 3, seed=2)
WORLDS_ = pytest.mark.parametrize("world", [CHAIN, MIXTURE], ids=["chain", "mixture"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def everything(world):
    return torch.cartesian_prod(*[torch.arange(world.v)] * world.n)


def product_q(world, groups):
    """q(x) of all x, revealing the groups of positions one after another: by the definition."""
    x = everything(world)
    q, tokens = torch.ones(len(x), dtype=torch.double), torch.full_like(x, world.mask_id)
    for group in groups:
        logits = world(tokens)
        for i in group:
            q = q * logits[:, i].gather(1, x[:, i : i + 1])[:, 0].exp()
        tokens[:, group] = x[:, group]
    return q


def confident_q(world, counts):
    """q(x) of all x under the confidence order, summed over everything that could be drawn at each step."""
    states = {(world.mask_id,) * world.n: 1.0}
    for count in counts:
        following = {}
        for tokens, weight in states.items():
            log_p = world(torch.tensor([tokens]))[0]
            places = [i for i in range(world.n) if tokens[i] == world.mask_id]
            for drawn in itertools.product(range(world.v), repeat=len(places)):
                each = [log_p[i, v].item() for i, v in zip(places, drawn, strict=True)]
                best = sorted(range(len(places)), key=lambda j: -each[j])[:count]
                new = list(tokens)
                for j in best:
                    new[places[j]] = drawn[j]
                following[tuple(new)] = following.get(tuple(new), 0) + weight * math.exp(sum(each))
        states = following
    q = torch.tensor([states.get(tuple(row), 0.0) for row in everything(world).tolist()], dtype=torch.double)
    assert q.sum().item() == pytest.approx(1)
    return q


def truth(world):
    return world.log_prob(everything(world)).exp()


def kl(p, q):
    return (p * (p / q).log()).sum().item()


def squared_distances(world, p, q):
    """Mean over tokens, and over pairs of tokens, of the squared distance of their distributions."""
    x, off = everything(world), (p - q)[:, None]
    hot = torch.nn.functional.one_hot(x, world.v).double()
    singles = (hot * off[..., None]).sum(0).square().sum(1).mean().item()
    pairs = [
        (torch.einsum("xa,xb,xo->ab", hot[:, i], hot[:, j], off)).square().sum().item()
        for i, j in itertools.combinations(range(world.n), 2)
    ]
    return singles, sum(pairs) / len(pairs)


def near(result, expected, times=2.0):
    """The interval, widened: one in 10,000 would miss it by chance, and seeds are fixed."""
    assert abs(result.mean - expected) <= max(times * result.half, 1e-6), (
        f"{result.mean} ± {result.half}, enumerated {expected}"
    )


# --- measures ---------------------------------------------------------------------------------------------------------


@WORLDS_
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
    sampling = {"schedule": lambda u: left[round(u * len(counts))], "steps": len(counts)}
    judge = WorldJudge(world, samples=2048, seed=5)
    by = judge.order(order) if isinstance(order, str) else order
    if groups is None:
        when = path_log_q(world, everything(world), mask_id=world.mask_id, order=by, **sampling)[1]
        groups = [(when[0] == t).nonzero()[:, 0].tolist() for t in range(len(counts))]
        assert [len(g) for g in groups] == counts
    p, q = truth(world), product_q(world, groups)
    log_q, _ = path_log_q(world, everything(world), mask_id=world.mask_id, order=by, **sampling)
    torch.testing.assert_close(log_q.exp(), q, rtol=1e-6, atol=0)
    outcome = judge(order=by, **sampling)
    near(estimate(outcome.groups["kl"]), kl(p, q) / 4)
    assert not outcome.bound, "nothing is random about this path"
    if len(counts) == 4:
        assert kl(p, q) == pytest.approx(0, abs=1e-9), "one at a time there is no error"


@WORLDS_
@pytest.mark.parametrize(
    ("order", "schedule"), [("entropy", "cosine"), ("margin", "linear"), ("entropy", entropy_bound(1.0))]
)
def test_kl_of_a_path_that_the_tokens_choose(world, order, schedule):
    """q sums to 1, is what decode draws, and its KL is the judge's: the order reads logits, but no draw."""
    sampling = {"order": order, "schedule": schedule, "steps": 3}
    x, p = everything(world), truth(world)
    q = path_log_q(world, x, mask_id=world.mask_id, **sampling)[0].exp()
    assert q.sum().item() == pytest.approx(1, abs=1e-6), "a distribution"
    n = 20_000
    *_, last = decode(world, torch.full((n, 4), world.mask_id), mask_id=world.mask_id, generator=seeded(), **sampling)
    code = (last.tokens * world.v ** torch.arange(4).flip(0)).sum(1)
    seen = torch.bincount(code, minlength=len(x)).double() / n
    assert (seen - q).square().sum() < 3 / n, "and the one that decode samples"
    outcome = WorldJudge(world, 2048, seed=1)(**sampling)
    near(estimate(outcome.groups["kl"]), kl(p, q) / 4)
    assert not outcome.bound


def test_kl_of_random_orders_is_a_bound():
    """The mean over the six partitions is what is estimated; the KL of the mixture of paths lies below."""
    partitions = [[list(a), [i for i in range(4) if i not in a]] for a in itertools.combinations(range(4), 2)]
    p, paths = truth(CHAIN), [product_q(CHAIN, groups) for groups in partitions]
    mean, true = sum(kl(p, q) for q in paths) / 6, kl(p, sum(paths) / 6)
    outcome = WorldJudge(CHAIN, 4096)(order="random", schedule="linear", steps=2)
    assert outcome.bound
    near(estimate(outcome.groups["kl"]), mean / 4)
    assert true < 0.7 * mean, "the bound is no equality here, so that the label matters"
    noisy = WorldJudge(CHAIN, 64)(order="entropy", schedule="linear", steps=2, choice_temperature=5.0)
    assert noisy.bound, "ranking noise makes the path random"


@WORLDS_
@pytest.mark.parametrize("counts", [[2, 2], [1, 2, 1]])
def test_confidence_against_all_that_could_be_drawn(world, counts):
    left = [sum(counts[i:]) / 4 for i in range(len(counts) + 1)]
    sampling = {"schedule": lambda u: left[round(u * len(counts))], "steps": len(counts), "order": "confidence"}
    p, q = truth(world), confident_q(world, counts)
    outcome = WorldJudge(world, 4096, seed=2)(**sampling)
    assert "kl" not in outcome.groups, "its q is no product along a path"
    expected = (-(q * p.log()).sum() + (p * p.log()).sum()).item() / 4
    near(estimate(outcome.groups["surprise"]), expected)
    singles, pairs = squared_distances(world, p, q)
    near(estimate(outcome.groups["singles"]), singles)
    near(estimate(outcome.groups["pairs"]), pairs)
    assert singles > 4 * estimate(outcome.groups["singles"]).half, "this case can tell"


def test_an_exact_sampler_has_no_error():
    """One token a step: every interval holds 0, in worlds with and without a closed entropy."""
    for world in (CHAIN, MIXTURE, PottsWorld((2, 3), 2)):
        outcome = WorldJudge(world, 1024, seed=3)(order="random", schedule="linear", steps=world.n)
        for groups in outcome.groups.values():
            near(estimate(groups), 0.0)
        assert max(map(abs, outcome.groups["kl"])) < 1e-6, "not even by chance"
        assert outcome.passes == world.n


def test_distances_are_the_u_statistic():
    x, y = (torch.randint(3, (2 * GROUPS, 5), generator=seeded(s)) for s in (0, 1))
    y[:, 1] = y[:, 0]
    singles, pairs = distances(features(x, 3), features(y, 3), 2, 5)
    same = lambda a, b: (a[:, None] == b).sum(-1).double()  # noqa: E731
    n = 2 * GROUPS
    for result, kernel in ((singles, lambda m: m / 5), (pairs, lambda m: m * (m - 1) / 20)):
        xx, yy, xy = kernel(same(x, x)), kernel(same(y, y)), kernel(same(x, y))
        whole = (xx.sum() - xx.diag().sum() + yy.sum() - yy.diag().sum()) / (n * (n - 1)) - 2 * xy.mean()
        a, b = x[2:], y[2:]  # without the first group
        xx, yy, xy = kernel(same(a, a)), kernel(same(b, b)), kernel(same(a, b))
        without = (xx.sum() - xx.diag().sum() + yy.sum() - yy.diag().sum()) / ((n - 2) * (n - 3)) - 2 * xy.mean()
        assert result[0].item() == pytest.approx((GROUPS * whole - (GROUPS - 1) * without).item(), abs=1e-9)


def test_intervals_cover():
    """95% of the intervals hold the enumerated value, give or take."""
    p, q = truth(CHAIN), product_q(CHAIN, [[0, 1], [2, 3]])
    expected = kl(p, q) / 4
    _, pairs = squared_distances(CHAIN, p, q)
    seen = {"kl": expected, "pairs": pairs}
    hits = dict.fromkeys(seen, 0)
    for seed in range(60):
        groups = WorldJudge(CHAIN, 256, seed)(order="raster", schedule="linear", steps=2).groups
        for measure, value in seen.items():
            result = estimate(groups[measure])
            hits[measure] += abs(result.mean - value) <= result.half
    assert all(h >= 52 for h in hits.values()), f"of 60 intervals {hits} hold the truth"


def test_which_orders_look_at_the_draws():
    blind = {name for name in ORDERS if name != "halton" and ignores_draws(name, 6, 5)}
    assert blind == {"random", "raster", "entropy", "margin"}
    assert not ignores_draws(variants.critic(variants.exact_score(CHAIN)), 4, 2)


# --- invariants -------------------------------------------------------------------------------------------------------


@given(
    world=st.sampled_from([CHAIN, MIXTURE, PottsWorld((2, 2), 3), ChainWorld.sticky(16, 3)]),
    order=st.sampled_from([*ORDERS, "critic"]),
    schedule=st.sampled_from([*SCHEDULES, "log", "pow2.5", entropy_bound(0.7)]),
    steps=st.integers(1, 20),
    known=st.lists(st.integers(0, 2), min_size=16, max_size=16),
    remask=st.booleans(),
    temperature=st.sampled_from([0.0, 2.0, lambda u: 2 * (1 - u)]),
)
@OFF
def test_invariants_of_every_schedule_and_order(world, order, schedule, steps, known, remask, temperature):
    start = torch.tensor([known, [2] * 16, [0, 2, 1, 2] * 4])[:, : world.n].clamp(max=world.v)
    start[start == 2] = world.mask_id
    by = variants.critic(variants.exact_score(world)) if order == "critic" else order
    sampling = {"mask_id": world.mask_id, "steps": steps, "schedule": schedule, "order": by, "remask": remask}
    sampling |= {"choice_temperature": temperature}
    trace = list(decode(world, start, generator=[seeded(i) for i in range(3)], **sampling))
    given_, last = start != world.mask_id, trace[-1].tokens
    assert not trace[-1].masked.any(), "a mask is left"
    assert (last != world.mask_id).all(), "a mask is left"
    assert last[given_].equal(start[given_]), "a known token was touched"
    assert len(trace) <= max(steps, 1)
    standing = given_.sum(1)
    for s in trace:
        now = (~s.masked).sum(1)
        assert (now >= standing).all(), "fewer stand than before"
        assert (s.tokens == world.mask_id).equal(s.masked)
        standing = now
    if not callable(schedule):
        for row in range(3):
            counts = [0, *((~s.masked[row]).sum().item() - given_[row].sum().item() for s in trace)]
            took = [b - a for a, b in itertools.pairwise(counts) if b > a]
            assert took == reveal_counts(int((~given_[row]).sum()), steps, schedule), "counts of the schedule"
    alone = list(decode(world, start[1:2], generator=[seeded(1)], **sampling))
    assert alone[-1].tokens.equal(last[1:2]), "an image depends on its neighbours"


def test_remasking_takes_back_what_does_not_fit():
    """Two modes, half drawn at once: the exact ranker takes back tokens of the wrong mode, so pictures get better."""
    world = MixtureWorld.random(4, (4, 4), 4, sharpness=3.0)
    critic = variants.critic(variants.exact_score(world))
    judge = WorldJudge(world, 512)
    fixed, free = (judge(order=critic, schedule="linear", steps=4, remask=r).groups["surprise"] for r in (False, True))
    assert estimate([a - b for a, b in zip(fixed, free, strict=True)]).mean > 0, "fewer pictures that do not exist"
    start = torch.full((64, 16), world.mask_id)
    trace = list(decode(world, start, mask_id=4, steps=4, order=critic, remask=True, generator=seeded()))
    changed = sum(int((~a.masked & b.masked).sum()) for a, b in itertools.pairwise(trace))
    assert changed > 0, "nothing was ever masked again"


def test_a_critic_learns_to_tell_drawn_from_real(tiny_muse):
    """Rows of one code each, from a model that knows nothing: what differs from its row was drawn."""
    base = tiny_muse.base
    tokens = torch.arange(16).repeat(8)[:, None].expand(-1, 64)
    texts = tiny_muse.encoder.encode(["a red cube"] * len(tokens))
    losses, nets = zip(*variants.train_critic(base, tokens, texts, steps=80, learning_rate=3e-3), strict=True)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), f"it learns: {losses[::10]}"
    odd = torch.arange(16)[:, None].expand(-1, 64).clone()
    odd[:, [3, 20, 41]] = (odd[:, [3, 20, 41]] + torch.tensor([1, 5, 9])) % 16
    score = variants.learned_score(nets[-1])
    lowest = score(odd).topk(3, largest=False).indices.sort(1).values
    assert (lowest == torch.tensor([3, 20, 41])).float().mean() > 0.8, "the odd ones out look least real"
    order = variants.critic(score)
    how = {"order": order, "steps": 4, "superres": {"order": None, "remask": False}}
    first, second = (tiny_muse.generate("a red cube", seed=0, remask=r, **how)[0] for r in (False, True))
    assert first.tobytes() != second.tobytes(), "a critic may take tokens back"
    assert not any(p.requires_grad for p in [*base.parameters(), *nets[-1].parameters()])


# --- presets ----------------------------------------------------------------------------------------------------------

GOLDEN = {  # what each step of 12 reveals of 256
    "muse": [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33],
    "maskgit": [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33],
    "amused": [3, 6, 11, 15, 18, 22, 26, 28, 30, 31, 33, 33],
    "halton": [13, 14, 14, 14, 15, 15, 16, 17, 20, 22, 28, 68],
    "lucidrains": [3, 8, 13, 17, 22, 26, 29, 32, 34, 36, 35, 1],
}


@pytest.mark.parametrize("name", variants.PRESETS)
def test_presets_reveal_what_their_codes_do(name):
    assert reveal_counts(256, 12, variants.settings(name, 256, 1024, 12)["schedule"]) == GOLDEN[name]


@pytest.mark.parametrize(("n", "steps"), [(256, 12), (256, 8), (1024, 18), (64, 10)])
def test_counts_against_the_arithmetic_of_each_code(n, steps):
    f = [(i + 1) / steps for i in range(steps)]
    masked = [max(int(n * math.cos(math.pi / 2 * i / (steps - 1))), 1) for i in range(steps)] + [0]
    lucidrains = [a - b for a, b in itertools.pairwise(masked)]
    shown = [0, *(max(i + 1, int(n * (1 - math.acos(u) / (math.pi / 2)) + 1e-9)) for i, u in enumerate(f))]
    halton = [b - a for a, b in itertools.pairwise(shown)]
    for name, counts in (("lucidrains", lucidrains), ("halton", halton)):
        assert reveal_counts(n, steps, variants.settings(name, n, 64, steps)["schedule"]) == counts, name


@pytest.mark.parametrize(("n", "steps"), [(256, 12), (256, 9), (64, 7), (100, 3)])
def test_amused_against_diffusers(n, steps):
    """Counts and noise of diffusers' own scheduler."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.AmusedScheduler(mask_token_id=16)
    scheduler.set_timesteps(steps, (2, 0))
    x, left = torch.full((1, n), 16), [n]
    for t in scheduler.timesteps:
        x = scheduler.step(torch.randn(1, n, 16, generator=seeded()), t, x, generator=seeded()).prev_sample
        left.append(int((x == 16).sum()))
    ours = variants.settings("amused", n, 16, steps)
    assert reveal_counts(n, steps, ours["schedule"]) == [a - b for a, b in itertools.pairwise(left)]
    noise = [ours["choice_temperature"](i / (steps - 1)) for i in range(steps)]
    assert noise == pytest.approx(scheduler.temperatures.tolist(), abs=1e-6)


@given(name=st.sampled_from([*variants.PRESETS]), steps=st.integers(1, 20), known=st.integers(0, 16))
@OFF
def test_presets_keep_the_invariants(name, steps, known):
    world = ChainWorld.sticky(16, 3)
    start = torch.full((2, 16), world.mask_id)
    start[0, :known] = 1
    sampling = variants.settings(name, 16, 3, steps)
    trace = list(decode(world, start, mask_id=world.mask_id, generator=[seeded(), seeded(1)], **sampling))
    for row, free in enumerate((16 - known, 16)):
        took = [c for s in trace if (c := int(s.revealed[row].sum()))]
        assert took == reveal_counts(free, steps, sampling["schedule"]), "counts of its schedule"
    assert trace[-1].tokens[0, :known].eq(1).all(), "a known token was touched"
    assert not trace[-1].masked.any(), "a mask is left"
    *_, alone = decode(world, start[1:], mask_id=world.mask_id, generator=[seeded(1)], **sampling)
    assert alone.tokens[0].equal(trace[-1].tokens[1]), "an image depends on its neighbours"


def test_guidance_of_the_presets_is_in_muses_convention():
    scales = {name: p.guidance for name, p in variants.PRESETS.items()}
    assert scales == {"muse": None, "maskgit": 0.0, "amused": 9.0, "halton": 4.0, "lucidrains": 2.0}
    with pytest.raises(ValueError, match="maskgit, amused"):
        variants.settings("dalle", 256, 1024)


def test_temperatures_may_be_functions():
    seen = []

    def annealed(u):
        seen.append(u)
        return 1 - u

    list(decode(CHAIN, torch.full((1, 4), 2), mask_id=2, steps=4, sampling_temperature=annealed))
    assert seen == pytest.approx([0, 1 / 3, 2 / 3, 1])


# --- the comparison ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    schedules = {"cosine": "cosine", "mine": lambda u: 1 - u**3, "bound": entropy_bound(1.0)}
    orders = ("confidence", "random", "halton")
    return compare(MIXTURE, schedules, orders, steps=(2, 4), presets=["maskgit"], samples=128, seed=0)


def test_the_grid_is_complete(report):
    assert len(report.cells) == 3 * 3 * 2 + 2
    cell = report["mine", "halton", 2]
    assert set(cell.groups) == {"kl", "surprise", "singles", "pairs"}
    assert "kl" not in report["mine", "confidence", 2].groups
    assert report["cosine", "random", 2].bound
    assert not cell.bound
    assert cell.passes == 2
    adaptive = report["bound", "halton", 4]
    assert 1 < adaptive.passes <= 4, "adaptive rules count the passes that they took"
    assert difference(cell, cell, "kl") == (0, 0)
    with pytest.raises(KeyError, match="no cell"):
        report["mine", "raster", 2]


def test_difference_of_two_cells():
    """Group by group, since both saw the same samples."""
    a, b = compare(CHAIN, ["linear"], ["raster", "halton"], [2], samples=2048).cells
    p = truth(CHAIN)
    found = difference(a, b, "kl")
    near(found, (kl(p, product_q(CHAIN, [[0, 1], [2, 3]])) - kl(p, product_q(CHAIN, [[1, 2], [0, 3]]))) / 4)
    assert abs(found.mean) > 2 * found.half, "this case can tell"
    assert found.mean == pytest.approx(a["kl"].mean - b["kl"].mean)


def test_table(report):
    lines = report.table().splitlines()
    assert len(lines) == 2 + len(report.cells)
    assert "<=" in next(line for line in lines if "random" in line), "a bound is told"
    assert "<=" not in next(line for line in lines if "halton" in line)


def test_plot(report):
    _, ax = plt.subplots()
    assert report.plot(ax, "pairs") is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(labels) == 10, "a line for each schedule and order, and one for the preset"
    assert {"as maskgit", "halton, entropy bounds"} <= set(labels)
    labels = [text.get_text() for text in report.plot().get_legend().get_texts()]
    assert "random, cosine (upper bound)" in labels
    assert "halton, cosine" in labels
    with pytest.raises(ValueError, match="known: kl, surprise"):
        report.plot(measure="fid")
    plt.close("all")


def test_save_keeps_what_is_there(tmp_path):
    report = compare(MIXTURE, ["cosine"], ["halton", "confidence"], [2], samples=64)
    folder = report.save(tmp_path / "out")
    for measure in ("kl", "surprise", "singles", "pairs"):
        assert (folder / f"{measure}.png").stat().st_size > 5000
        assert (folder / f"{measure}.pdf").read_bytes().startswith(b"%PDF")
    with open(folder / "report.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(c.groups) for c in report.cells)
    assert all(float(r["low"]) <= float(r["mean"]) <= float(r["high"]) for r in rows)
    values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert {"minimuse", "torch", "seed", "samples", "target", "parameters"} <= set(values["about"])
    report.save(folder)  # the same again loses nothing
    other = compare(MIXTURE, ["linear"], ["raster"], [2], samples=64)
    with pytest.raises(FileExistsError, match="another report"):
        other.save(folder)
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == values, "nothing was touched"
    other.save(folder, overwrite=True)
    for name in ("report.json", "kl.png"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(FileExistsError, match=name):
            other.save(tmp_path / name)
        assert (tmp_path / name / name).read_text() == "mine", "a stranger's file"


class Counting(WorldJudge):
    calls = 0

    def __call__(self, **sampling):
        type(self).calls += 1
        return super().__call__(**sampling)


def test_finished_cells_are_used_again(tmp_path):
    judge, curve = Counting(CHAIN, 64), lambda u: 1 - u**3
    once = compare(judge, {"a": curve}, ["halton", "random"], [2, 3], out=tmp_path)
    assert Counting.calls == 4
    again = compare(judge, {"a": lambda u: 1 - u**3}, ["halton", "random"], [2, 3], out=tmp_path)
    assert Counting.calls == 4, "the same curve, written again, is the same cell"
    assert again.cells == once.cells
    compare(judge, {"a": curve}, ["halton", "random"], [2, 3, 4], out=tmp_path)
    assert Counting.calls == 6, "only what is new"
    compare(judge, {"a": lambda u: 1 - u}, ["halton"], [2, 4], out=tmp_path)
    assert Counting.calls == 7, "in 4 steps of 4 tokens every curve is the same, in 2 it is not"
    compare(Counting(CHAIN, 64, seed=1), {"a": curve}, ["halton"], [2], out=tmp_path)
    compare(Counting(MIXTURE, 64), {"a": curve}, ["halton"], [2], out=tmp_path)
    compare(judge, {"a": curve}, ["halton"], [2], out=tmp_path, top_k=1)
    assert Counting.calls == 10, "another seed, another world, another setting"
    own = type("Own", (ChainWorld,), {})(CHAIN.transition, 4)
    assert WorldJudge(own, 64).identity() != WorldJudge(own, 64).identity(), "nor a world of one's own"
    for _ in range(2):
        compare(judge, {"rule": lambda logits, masked, u: masked.sum(1)}, ["halton"], [2], out=tmp_path)
        compare(judge, ["cosine"], {"own": by_rank(torch.arange(4))}, [2], out=tmp_path)
    assert Counting.calls == 14, "code cannot be compared"
    first = next((tmp_path / "cells").glob("*.json"))
    assert first.read_text(encoding="utf-8"), "kept as JSON"
    assert not list((tmp_path / "cells").glob("*.new"))


def test_a_judge_of_ones_own():
    """What a trained model will plug into: any measure of any sampler."""

    class Steps:
        n, v, titles = 16, 4, {"cost": "steps, as a measure"}

        def identity(self):
            return {"target": "nothing"}

        def order(self, name):
            return name

        def __call__(self, *, steps, **sampling):
            return Outcome(steps, {"cost": [float(steps + i % 2) for i in range(8)]})

    report = compare(Steps(), ["cosine"], ["random"], [4, 8])
    assert report["cosine", "random", 8]["cost"].mean == 8.5
    assert report.plot().get_ylabel() == "steps, as a measure"
    plt.close("all")


def test_a_world_of_ones_own():
    """A class of one function is a world: here two tokens that agree, and two that do not care."""

    class Agree(World):
        def __init__(self):
            super().__init__((2, 2), 2)

        def log_evidence(self, e):
            p = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.double)
            return (torch.einsum("ba,bc,ac->b", e[:, 0], e[:, 1], p) * e[:, 2].mean(1) * e[:, 3].mean(1)).log()

    report = compare(
        Agree(), ["linear"], {"apart": by_rank(torch.tensor([0, 3, 1, 2])), "raster": "raster"}, [2], samples=640
    )
    assert report["linear", "apart", 2]["kl"].mean == pytest.approx(0, abs=1e-6), "the pair is drawn in two steps"
    information = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    near(report["linear", "raster", 2]["kl"], information / 4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: compare(CHAIN, ["cosinus"]),
        lambda: compare(CHAIN, orders=["confident"]),
        lambda: compare(CHAIN, steps=[]),
        lambda: compare(CHAIN, steps=[0]),
        lambda: compare(CHAIN, samples=100),
        lambda: compare(CHAIN, presets=["dalle"]),
        lambda: compare(CHAIN, ["bound-1"]),
        lambda: compare(CHAIN, ["boundless"]),
    ],
)
def test_nonsense_is_refused_before_any_work(wrong, monkeypatch):
    monkeypatch.setattr(WorldJudge, "__call__", lambda *a, **k: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"known|give|float"):
        wrong()


def test_the_command(tmp_path, capsys):
    words = "compare --world potts --schedule cosine,bound2 --order halton --preset muse --steps 2 --samples 64"
    assert cli.main([*words.split(), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "less cosine, halton" in printed
    figures, paired = printed.split("less cosine, halton")
    assert figures.count("halton") == 2
    assert paired.count("| halton |") == 1, "bound2 less cosine"
    assert "as muse" in figures
    assert (tmp_path / "out" / "report.csv").is_file()
    assert cli.main([*words.replace("halton", "raster").split(), "--out", str(tmp_path / "out")]) == 1
    assert "another folder" in capsys.readouterr().err
    assert cli.main(["compare", "--world", "ising"]) == 1
    assert "mixture, chain, potts" in capsys.readouterr().err


@pytest.mark.parametrize("name", WORLDS)
def test_the_named_worlds_run(name):
    report = compare(WORLDS[name](), ["cosine"], ["halton", "confidence"], [4], samples=64)
    for cell in report.cells:
        assert all(math.isfinite(v) for groups in cell.groups.values() for v in groups)
