"""lab_samplers.py: presets against the code they follow, and the rules that every sampler keeps."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse.lab import WorldEvaluator, ignores_drawn
from minimuse.lab_optimum import check_samples, run
from minimuse.lab_samplers import SAMPLER_PRESETS, SAMPLERS, entropy_bound, preset_settings
from minimuse.lab_worlds import ChainWorld, MixtureWorld, PottsWorld
from minimuse.masking import SCHEDULES, reveal_counts
from minimuse.sampler import ORDERS, State, decode, draw, is_adaptive

OFF = settings(deadline=None, max_examples=25, derandomize=True)
CHAIN = ChainWorld(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 4, torch.tensor([0.7, 0.3]))
GOLDEN = {  # how many of 256 tokens each of 12 steps reveals
    "muse": [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33],
    "maskgit": [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33],
    "amused": [3, 6, 11, 15, 18, 22, 26, 28, 30, 31, 33, 33],
    "halton": [13, 14, 14, 14, 15, 15, 16, 17, 20, 22, 28, 68],
    "lucidrains": [3, 8, 13, 17, 22, 26, 29, 32, 34, 36, 35, 1],
    "meissonic": [3, 6, 11, 15, 18, 22, 26, 28, 30, 31, 33, 33],
    "muse_pytorch": [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33],
    "titok": [14, 14, 14, 14, 15, 15, 16, 17, 20, 22, 28, 67],
    "maskgen": [14, 14, 14, 14, 15, 15, 16, 17, 20, 22, 28, 67],
    "maskbit": [14, 14, 14, 14, 15, 15, 16, 17, 20, 22, 28, 67],
    "llada": [22, 22, 22, 22, 21, 21, 21, 21, 21, 21, 21, 21],
    "nanomaskgit": [21, 21, 21, 21, 21, 21, 21, 21, 21, 21, 21, 25],
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def exact_order(world):
    """Ranks tokens by log p(x_i | all other tokens)."""
    return lambda logits, drawn, masked, u: world.leave_one_out(drawn).gather(-1, drawn[..., None]).squeeze(-1)


@pytest.mark.parametrize("name", SAMPLER_PRESETS)
def test_presets_reveal_what_their_codes_do(name):
    assert reveal_counts(256, 12, preset_settings(name, 256, 1024, 12)["schedule"]) == GOLDEN[name]


@pytest.mark.parametrize(("n", "steps"), [(256, 12), (256, 8), (1024, 18), (64, 10)])
def test_counts_against_the_arithmetic_of_each_code(n, steps):
    f = [(i + 1) / steps for i in range(steps)]
    masked = [max(int(n * math.cos(math.pi / 2 * i / (steps - 1))), 1) for i in range(steps)] + [0]
    lucidrains = [a - b for a, b in itertools.pairwise(masked)]
    shown = [0, *(max(i + 1, int(n * (1 - math.acos(u) / (math.pi / 2)) + 1e-9)) for i, u in enumerate(f))]
    halton = [b - a for a, b in itertools.pairwise(shown)]
    left = [n]
    for u in f:
        left.append(max(1, min(left[-1] - 1, math.floor(n * np.arccos(u) / (math.pi * 0.5)))))
    arccos = [a - b for a, b in itertools.pairwise([*left[:-1], 0])]
    llada = torch.full((steps,), n // steps)
    llada[: n % steps] += 1
    nano = [n // steps] * steps
    nano[-1] += n % steps
    found = {"lucidrains": lucidrains, "halton": halton, "llada": llada.tolist(), "nanomaskgit": nano}
    for name, counts in (found | dict.fromkeys(("titok", "maskgen", "maskbit"), arccos)).items():
        assert reveal_counts(n, steps, preset_settings(name, n, 64, steps)["schedule"]) == counts, name


def test_one_temperature_of_muse_pytorch_and_titok_by_hand():
    """Step 1 of 4 (u = 1/3): a = 4.5 / 2, and for TiTok 9.5 / 2 and s = 0.5 + 0.8 / 2 = 0.9; the draw has s a."""
    logits, drawn = torch.tensor([[[1.0, -2.0], [3.0, 4.0]]]), torch.tensor([[1, 0]])
    for name, noise, s in (("muse_pytorch", 4.5, 1.0), ("titok", 9.5, 0.9), ("maskgen", 1.5, 0.9), ("titok:2", 2, 0.9)):
        ours = preset_settings(name, 8, 4, 4)
        assert ours["order"](logits, drawn, None, 1 / 3)[0].tolist() == pytest.approx([-2 / s, 3 / s])
        assert ours["sampling_temperature"](1 / 3) == pytest.approx(s * noise / 2)
        assert ours["sampling_temperature"](1.0) == 0, "argmax at the end"
        assert ours["choice_temperature"] == noise


def test_maskbit_llada_and_nanomaskgit_by_hand():
    logits = torch.tensor([[[1.0, -2.0], [3.0, 4.0], [3.5, 3.6]]])
    nano = preset_settings("nanomaskgit", 3, 2, 3)
    assert nano["order"](logits, None, None, 0.0).tolist() == [[1.0, 4.0, pytest.approx(3.6)]], "raw logits, not log p"
    assert nano["sampling_temperature"] == 1.0
    assert preset_settings("maskbit", 8, 4, 4)["choice_temperature"] == 7.8
    llada = preset_settings("llada", 3, 2, 2)
    trace = list(decode(lambda t, u: logits, torch.full((1, 3), 2), mask_id=2, generator=seeded(), **llada))
    assert trace[0].tokens.tolist() == [[0, 1, 2]], (
        "two of three, of the largest p: 0.95, 0.73, 0.52; the likelier codes"
    )
    assert trace[1].tokens.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("name", ["llada", "nanomaskgit", "titok"])
@pytest.mark.filterwarnings("ignore:steps is")
def test_presets_with_more_steps_than_tokens(name):
    assert reveal_counts(4, 9, preset_settings(name, 4, 8, 9)["schedule"]) == [1, 1, 1, 1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_passes_of_every_sampler(name):
    """One pass for each step that changes an image, two with a corrector, and never more than T, or 2 T."""
    steps, images = 5, 64
    sampling = preset_settings(name, FIELD.n, FIELD.v, steps, FIELD)
    calls = []

    def logits_fn(tokens, u):
        calls.append(len(tokens))
        return FIELD(tokens, u)

    start = torch.full((images, FIELD.n), FIELD.mask_id)
    trace = list(decode(logits_fn, start, mask_id=FIELD.mask_id, generator=seeded(), **sampling))
    nfe, each = run(iter(trace), sampling.get("corrector"))[1], 2 if "corrector" in sampling else 1
    assert nfe <= each * sum(calls) <= each * steps * images
    changed = [(a.tokens != b.tokens).any(1).sum().item() for a, b in itertools.pairwise(trace)]
    assert nfe >= each * (images + sum(changed) - images * (trace[0].masked.all(1).any().item()))
    if "choose" not in sampling and not is_adaptive(sampling["schedule"]):
        assert nfe == each * sampling["steps"] * images


@pytest.mark.parametrize(("n", "steps"), [(256, 12), (64, 7), (100, 3)])
def test_amused_against_diffusers(n, steps):
    """Counts and noise of the scheduler of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.AmusedScheduler(mask_token_id=16)
    scheduler.set_timesteps(steps, (2, 0))
    x, left = torch.full((1, n), 16), [n]
    for t in scheduler.timesteps:
        x = scheduler.step(torch.randn(1, n, 16, generator=seeded()), t, x, generator=seeded()).prev_sample
        left.append(int((x == 16).sum()))
    ours = preset_settings("amused", n, 16, steps)
    assert reveal_counts(n, steps, ours["schedule"]) == [a - b for a, b in itertools.pairwise(left)]
    noise = [ours["choice_temperature"](i / (steps - 1)) for i in range(steps)]
    assert noise == pytest.approx(scheduler.temperatures.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "dalle"}, "known: muse, maskgit, amused"),
        ({"name": None}, "unknown preset None"),
        ({"name": ["muse"]}, "unknown preset"),
        ({"n": 0}, "n is 0"),
        ({"codebook_size": 2.5}, "codebook_size is 2.5"),
        ({"steps": math.nan}, "steps is nan"),
        ({"steps": True}, "steps is True"),
        ({"steps": "8"}, "steps is '8'"),
    ],
)
def test_wrong_presets_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        preset_settings(**{"name": "lucidrains", "n": 16, "codebook_size": 8, "steps": 4} | wrong)
    assert preset_settings("muse", np.int64(16), torch.tensor(8), 4)["steps"] == 4


@pytest.mark.filterwarnings("ignore:steps is")
@given(
    world=st.sampled_from([CHAIN, MixtureWorld.random(3, (2, 2), 3), PottsWorld((2, 2), 3), ChainWorld.sticky(16, 3)]),
    sampler=st.sampled_from([*ORDERS, "critic", *(f"as {name}" for name in SAMPLERS)]),
    schedule=st.sampled_from([*SCHEDULES, "log", "pow2.5", entropy_bound(0.7)]),
    steps=st.integers(1, 20),
    known=st.lists(st.integers(0, 2), min_size=16, max_size=16),
    remask=st.booleans(),
    temperature=st.sampled_from([0.0, 2.0, lambda u: 2 * (1 - u)]),
)
@settings(OFF, max_examples=80)
def test_invariants_of_every_sampler(world, sampler, schedule, steps, known, remask, temperature):
    start = torch.tensor([known, [2] * 16, [0, 2, 1, 2] * 4])[:, : world.n].clamp(max=world.v)
    start[start == 2] = world.mask_id
    if sampler.startswith("as "):
        sampling = preset_settings(sampler.removeprefix("as "), world.n, world.v, steps, world)
    else:
        order = exact_order(world) if sampler == "critic" else sampler
        sampling = {"schedule": schedule, "order": order, "remask": remask, "choice_temperature": temperature}
        sampling["steps"] = steps
    sampling["mask_id"] = world.mask_id
    trace = list(decode(world, start, generator=[seeded(i) for i in range(3)], **sampling))
    given_, last = start != world.mask_id, trace[-1].tokens
    assert not trace[-1].masked.any(), "a mask is left"
    assert (last != world.mask_id).all(), "a mask is left"
    assert last[given_].equal(start[given_]), "a known token has changed"
    assert len(trace) <= max(steps, 1)
    known_now = given_.sum(1)
    fixed = "choose" not in sampling
    for s in trace:
        assert ((~s.masked).sum(1) >= known_now).all() or not fixed, "fewer tokens are known than before"
        assert (s.tokens == world.mask_id).equal(s.masked)
        known_now = (~s.masked).sum(1)
    if fixed and not is_adaptive(sampling["schedule"]):
        for row in range(3):
            counts = [0, *((~s.masked[row]).sum().item() - given_[row].sum().item() for s in trace)]
            took = [b - a for a, b in itertools.pairwise(counts) if b > a]
            assert took == reveal_counts(int((~given_[row]).sum()), sampling["steps"], sampling["schedule"])
    alone = list(decode(world, start[1:2], generator=[seeded(1)], **sampling))
    assert alone[-1].tokens.equal(last[1:2]), "an image depends on its neighbours"


def test_temperatures_may_be_functions():
    seen = []

    def annealed(u):
        seen.append(u)
        return 1 - u

    list(decode(CHAIN, torch.full((1, 4), 2), mask_id=2, steps=4, sampling_temperature=annealed))
    assert seen == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_remasking_takes_back_what_does_not_fit():
    """Two modes, half of the tokens drawn at once: the exact score takes back tokens of the wrong mode."""
    world = MixtureWorld.random(4, (4, 4), 4, sharpness=3.0)
    order = exact_order(world)
    evaluator = WorldEvaluator(world, 512)
    fixed, free = (
        torch.tensor(evaluator(order=order, schedule="linear", steps=4, remask=r).groups["excess_nll"]).mean()
        for r in (False, True)
    )
    assert free < fixed, "fewer impossible examples"
    start = torch.full((64, 16), world.mask_id)
    trace = list(decode(world, start, mask_id=4, steps=4, order=order, remask=True, generator=seeded()))
    changed = sum(int((~a.masked & b.masked).sum()) for a, b in itertools.pairwise(trace))
    assert changed > 0, "no token was masked again"
    assert run(iter(trace))[1] == 4 * 64


# --- papers, by hand on three tokens ----------------------------------------------------------------------------------

P3 = [[0.5, 0.5], [0.8, 0.2], [0.1, 0.9]]  # three tokens, two codes
TRIO = ChainWorld(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 3, torch.tensor([0.6, 0.4]))


def trio(name, steps=4, world=None):
    return preset_settings(name, 3, 2, steps, world)


def see(masked, ranking=(0.5, 0.5, 0.5), index=0, steps=4, p=P3, before=None, drawn=(0, 0, 1), confidence=(0.0,) * 3):
    """A State of three tokens. `masked` is a word such as "MM-"."""
    masked = torch.tensor([[letter == "M" for letter in masked]])
    noise = torch.tensor([[[0.5] * 3, ranking, [0.999] * 3, ranking]], dtype=torch.double)
    logits = torch.tensor([p]).log()
    before = None if before is None else torch.tensor([before]).log()
    tensors = (torch.tensor([drawn]), masked, torch.ones_like(masked), torch.tensor([confidence]), noise)
    return State(index, steps, index / (steps - 1), logits, before, *tensors)


def word(kept):
    return "".join("K" if k else "." for k in kept[0].tolist())


def test_mdlm_by_hand():
    """Step 1 of 4 reveals with probability (1/2 - 1/4) / (1 - 1/4) = 1/3, and keeps what is known."""
    assert word(trio("mdlm")["choose"](see("MM-", (0.33, 0.34, 0.99), index=1))) == "K.K"


def test_remdm_cap_by_hand():
    """a = 1/4, b = 1/2, s_max = 1, s = 0.3: a token is revealed with probability (0.5 - 0.7 0.25) / 0.75 = 0.4333."""
    choose = trio("remdm_cap:0.3")["choose"]
    assert word(choose(see("MM-", (0.43, 0.44, 0.29), index=1))) == "K.."
    assert word(choose(see("MM-", (0.43, 0.44, 0.31), index=1))) == "K.K"


def test_remdm_rescale_by_hand():
    """a = 1/2, b = 3/4, s_max = 1/2, s = 0.5 s_max = 1/4; revealed with probability (0.75 - 0.75 0.5) / 0.5 = 0.75."""
    choose = trio("remdm_rescale:0.5")["choose"]
    assert word(choose(see("MM-", (0.74, 0.76, 0.24), index=2))) == "K.."
    assert word(choose(see("MM-", (0.74, 0.76, 0.26), index=2))) == "K.K"


def test_remdm_conf_by_hand():
    """s_max = 1/2; softmax(-0.2, -0.8) = 0.6457, 0.3543, so s = 0.3228, 0.1772. A masked token has s = 0: 0.5."""
    choose, seen = trio("remdm_conf")["choose"], {"index": 2, "confidence": (0.2, 0.8, 0.7)}
    assert word(choose(see("--M", (0.322, 0.177, 0.51), **seen))) == "..."
    assert word(choose(see("--M", (0.323, 0.178, 0.49), **seen))) == "KKK"


def test_remdm_loop_by_hand():
    """Up to 0.9 at u = 1/2, held to u = 3/4: step 1 of 4 has a = 0.45, b = 0.9; step 2 a = b = 0.9; step 3 b = 1.

    Step 1 reveals with probability (0.9 - 0.45) / 0.55 = 0.8182, step 2 with 0.09 0.9 / 0.1 = 0.81; it masks with 0.09.
    """
    choose = trio("remdm_loop:0.09:0.5:0.75:0.9")["choose"]
    assert word(choose(see("MM-", (0.81, 0.82, 0.0), index=1))) == "K.K", "MDLM: what is known stays"
    assert word(choose(see("MM-", (0.80, 0.82, 0.089), index=2))) == "K.."
    assert word(choose(see("MM-", (0.80, 0.82, 0.091), index=2))) == "K.K"
    assert word(choose(see("MM-", (0.99, 0.99, 0.0), index=3))) == "KKK", "all, and no token is masked again"
    most = trio("remdm_loop:1:0.5:0.75:0.9")["choose"]  # s_max = (1 - 0.9) / 0.9 = 0.1111, reveals with 1
    assert word(most(see("M--", (0.99, 0.11, 0.112), index=2))) == "K.K"


def test_dilated_by_hand():
    """A block of 8: places 0 and 4; 2 and 6; all odd ones. Three tokens: 0 and 2; 1."""
    for n, block, steps, passes in [
        (8, 8, 8, [[0, 4], [2, 6], [1, 3, 5, 7]]),
        (8, 0, 3, [[0, 4], [2, 6], [1, 3, 5, 7]]),
        (8, 0, 4, [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (3, 4, 3, [[0, 2], [1]]),
        (1, 0, 1, [[0]]),
    ]:
        ours = preset_settings(f"dilated:{block}", n, 2, steps)
        trace = decode(
            lambda t, u: torch.zeros(*t.shape, 2), torch.full((1, n), 2), mask_id=2, generator=seeded(), **ours
        )
        assert [step.revealed[0].nonzero()[:, 0].tolist() for step in trace] == passes, f"{n} tokens, block {block}"
    joined = preset_settings("dilated", 8, 2, 2)
    assert reveal_counts(8, joined["steps"], joined["schedule"]) == [4, 4], "two steps for three passes"


def test_dilated_is_exact_in_a_chain():
    """Given its neighbours on both sides, a token of a chain depends on no other: only the first pass has an error."""
    world = ChainWorld.sticky(16, 3, 0.6)
    kl = torch.tensor(WorldEvaluator(world, 1024)(**preset_settings("dilated:16", 16, 3, 4)).groups["kl"]).mean()
    assert abs(kl) < 1e-3, "p(x_8 | x_0) has nearly forgotten x_0"
    other = WorldEvaluator(world, 1024)(order="random", schedule="linear", steps=4)
    assert torch.tensor(other.groups["kl"]).mean() > 0.01, "random order with as many passes"


def test_p2_by_hand():
    """Step 1 of 3 keeps 2. Log p of the drawn tokens is that of 0.5, 0.8, 0.1; eta divides U's distance from 0."""
    seen = see("M--", index=1, steps=3, drawn=(0, 0, 0))
    assert word(trio("p2:1", 3)["choose"](seen)) == "KK.", "the least likely one is masked again"
    assert word(trio("p2:0", 3)["choose"](seen)) == ".KK", "scores of U are 0"
    assert word(trio("p2:0.31", 3)["choose"](seen)) == "KK.", "0.31 log 0.1 = -0.714 is below log 0.5 = -0.693"
    assert word(trio("p2:0.30", 3)["choose"](seen)) == ".KK", "0.30 log 0.1 = -0.691 is above"


def test_moment_by_hand():
    """a = 2 (1 - 1/2) = 1: scores log(p^2 + q^2), a temperature of 1/2; at the end a = 0."""
    ours = trio("moment:2", 2)
    score = ours["order"](torch.tensor([P3]).log(), None, None, 0.0)
    assert score.exp()[0].tolist() == pytest.approx([0.5, 0.68, 0.82])
    assert [ours["choice_temperature"](u) for u in (0.0, 1.0)] == [1.0, 0.0]
    assert [ours["sampling_temperature"](u) for u in (0.0, 1.0)] == [0.5, 0.0]


def test_choose_then_sample_by_hand():
    score = trio("choose_then_sample:2")["order"](torch.tensor([P3]).log(), None, None, 0.0)
    assert score.exp()[0].tolist() == pytest.approx([0.5, 0.8, 0.9])


def test_entropy_sum_by_hand():
    """Sums of 0.3251, 0.5004, 0.6931 in order: 0.3251, 0.8255, 1.5186."""
    seen = (torch.tensor([P3]).log(), torch.ones(1, 3, dtype=torch.bool), 0.0)
    for bound, count in ((0.325, 0), (0.326, 1), (0.825, 1), (0.826, 2), (1.518, 2), (1.519, 3)):
        assert trio(f"entropy_sum:{bound}")["schedule"](*seen).tolist() == [count]
    known = torch.tensor([[True, True, False]])
    assert trio("entropy_sum:1.2")["schedule"](seen[0], known, 0.0).tolist() == [2], "only masked tokens count"


def test_eb_by_hand():
    """Entropies in order 0.3251, 0.5004, 0.6931: sums without the largest are 0, 0.3251, 0.8255."""
    seen = (torch.tensor([P3]).log(), torch.ones(1, 3, dtype=torch.bool), 0.0)
    for bound, count in ((0, 1), (0.325, 1), (0.326, 2), (0.825, 2), (0.826, 3)):
        assert trio(f"eb:{bound}")["schedule"](*seen).tolist() == [count]
    known = torch.tensor([[True, True, False]])
    assert trio("eb:0.6")["schedule"](seen[0], known, 0.0).tolist() == [2], "only masked tokens count"


def test_fast_dllm_by_hand():
    seen = see("MM-", confidence=(0.7, 0.5, 0.9))
    found = [word(trio(f"fast_dllm:{x}")["choose"](seen) & seen.masked) for x in (0.4, 0.6, 0.8)]
    assert found == ["KK.", "K..", "K.."], "the last has no token above 0.8, and takes the best"


def test_fast_dllm_factor_by_hand():
    """(n + 1) (1 - p_n) of 0.9, 0.8, 0.5 is 2 x 0.1 = 0.2, 3 x 0.2 = 0.6, 4 x 0.5 = 2."""
    seen = see("MMM", confidence=(0.8, 0.5, 0.9))
    found = [word(trio(f"fast_dllm_factor:{f}")["choose"](seen)) for f in (0.1, 0.21, 0.59, 0.61, 1.9, 2.1)]
    assert found == ["..K", "..K", "..K", "K.K", "K.K", "KKK"], "the first has none, and takes the best"
    known = see("MM-", confidence=(0.8, 0.5, 0.9))
    assert word(trio("fast_dllm_factor:0.5")["choose"](known)) == "K..", "of masked tokens 0.8 is the first: 0.4"


def test_klass_by_hand():
    """Token 2 has p = 0.9 and does not change; it must not change in two passes. Token 1 has p = 0.8."""
    moved = [[0.5, 0.5], [0.7, 0.3], [0.1, 0.9]]  # KL of token 1 from P3: 0.8 log(8/7) + 0.2 log(2/3) = 0.0257
    choose = trio("klass:0.75:0.01:1")["choose"]
    assert word(choose(see("MMM"))) == "..K", "no pass before: the surest"
    assert word(choose(see("MMM", before=moved))) == "..K"
    assert word(trio("klass:0.75:0.03:1")["choose"](see("MMM", before=moved))) == ".KK", "0.0257 is below the bound"
    assert word(choose(see("MMM", before=P3))) == ".KK"
    two = trio("klass:0.75:0.01:2")["choose"]
    assert [word(two(see("MM-", before=b))) for b in (None, P3, P3, moved)] == [".K.", ".K.", ".K.", ".K."]
    calm = trio("klass:0.4:0.01:2")["choose"]
    assert [word(calm(see("MM-", before=b))) for b in (None, P3, P3, moved)] == [".K.", ".K.", "KK.", "K.."]


def test_beta_by_hand():
    """BetaCDF(u; 2, 1) = u^2, and BetaCDF(u; 1, 2) = 1 - (1 - u)^2."""
    assert [trio("beta:2:1")["schedule"](u) for u in (0, 0.5, 1)] == pytest.approx([1, 0.75, 0])
    assert trio("beta:1:2")["schedule"](0.25) == pytest.approx(0.5625)


def test_top_p_by_hand():
    """Of 0.5, 0.3, 0.2 the first two reach 0.6; they become 0.625 and 0.375."""
    logits, x = torch.tensor([[[0.2, 0.5, 0.3]] * 4]).log(), torch.tensor([[0.0, 0.62, 0.63, 0.9999]]).double()
    assert draw(logits, x, 1.0, None, trio("top_p:0.6")["top_p"]).tolist() == [[1, 1, 2, 2]]
    assert draw(logits, x, 1.0, None, 0.4).tolist() == [[1] * 4]
    assert draw(logits, x, 1.0, None, 1.0).tolist() == [[0, 1, 1, 2]]


def test_token_critic_by_hand():
    """p(x_1 = 0 | x_0 = 0, x_2 = 1) = 0.8 0.2 / (0.8 0.2 + 0.2 0.7)."""
    score = trio("token_critic", world=TRIO)["order"](None, torch.tensor([[0, 0, 1]]), None, 0.0)
    assert score.exp()[0].tolist() == pytest.approx([0.6 * 0.8 / (0.6 * 0.8 + 0.4 * 0.3), 0.16 / 0.30, 0.2])


def test_informed_by_hand():
    """Of 0, 0, 1 the last token is the least sure: p = 0.2 against 0.8. It is drawn again, with the uniform 0.999."""
    corrector = trio("informed:1", world=TRIO)["corrector"]
    assert corrector(see("---", drawn=(0, 0, 1))).tolist() == [[0, 0, 1]], "0.999 is the other end of the CDF"
    seen = see("---", drawn=(0, 0, 1))
    low = torch.zeros_like(seen.noise)
    assert corrector(seen._replace(noise=low)).tolist() == [[0, 0, 0]]
    masked = see("--M", drawn=(0, 1, 2))  # of 0 and 1: p(0 | 1) = 0.48 0.25 ..., by Bayes 0.12 / (0.12 + 0.28) = 0.3
    again = corrector(masked._replace(noise=low))
    assert again.tolist() == [[0, 0, 2]], "p(x_1 = 1 | x_0 = 0) = 0.2 is less sure than p(x_0 = 0 | x_1 = 1) = 0.3"


# --- papers, by what must hold ----------------------------------------------------------------------------------------

FIELD = MixtureWorld.random(4, (4, 4), 4, sharpness=3.0)


def trace_of(name, steps, n=256, world=FIELD, seed=0):
    sampling = preset_settings(name, world.n, world.v, steps, world)
    start = torch.full((n, world.n), world.mask_id)
    return list(decode(world, start, mask_id=world.mask_id, generator=seeded(seed), **sampling))


def again(trace):
    """How many revealed tokens are masked again."""
    return sum(int((~a.masked & b.masked).sum()) for a, b in itertools.pairwise(trace))


@pytest.mark.parametrize("name", ["remdm_cap:0", "remdm_rescale:0"])
def test_remdm_without_remasking_is_mdlm(name):
    ours, mdlm = trace_of(name, 6), trace_of("mdlm", 6)
    assert all(a.tokens.equal(b.tokens) for a, b in zip(ours, mdlm, strict=True))


@pytest.mark.parametrize(
    "name", ["mdlm", "remdm_cap:0.2", "remdm_rescale:0.3", "remdm_conf", "remdm_loop:0.3:0.2:0.6:0.5"]
)
def test_alpha_is_the_fraction_revealed(name):
    """After step i a token is known with probability (i + 1) / T, masked again or not. Binomial counts of MDLM."""
    n, steps = 1024, 5
    trace = trace_of(name, steps, n)
    for i, step in enumerate(trace[:-1]):
        b, known = (i + 1) / steps, (~step.masked).double()
        if name.startswith("remdm_loop"):
            b = (0.5, 0.5, 0.5, 0.75)[i]
        tolerance = 4 * math.sqrt(b * (1 - b) / known.numel())
        if name != "remdm_conf":  # there s depends on the tokens
            assert known.mean().item() == pytest.approx(b, abs=tolerance), f"step {i}"
        if name == "mdlm":
            assert known.sum(1).var().item() == pytest.approx(16 * b * (1 - b), rel=0.2)
    assert (again(trace) > 0) == (name != "mdlm")


def test_p2_masks_again_only_with_eta():
    assert again(trace_of("p2:0", 6)) == 0
    assert again(trace_of("p2:1", 6)) > 0
    counts = [int((~step.masked).sum()) for step in trace_of("p2:1", 5, 1)]
    assert counts == [4, 7, 10, 13, 16], "16 - floor(16 (1 - (i + 1) / 5))"


@pytest.mark.parametrize("name", ["fast_dllm:1.5", "klass:1:0.01", "eb:0", "entropy_sum:0"])
def test_strict_rules_reveal_one_token_a_pass(name):
    assert [step.revealed.sum(1).unique().tolist() for step in trace_of(name, 16)] == [[1]] * 16


@pytest.mark.parametrize("name", ["fast_dllm:0", "eb:1000", "entropy_sum:1000"])
def test_loose_rules_reveal_all_at_once(name):
    assert len(trace_of(name, 16)) == 1


def test_choosing_first_ignores_the_draw():
    for name in ("moment", "choose_then_sample"):
        assert ignores_drawn(preset_settings(name, 6, 5, 4)["order"], 6, 5)


def test_moment_draws_as_maskgit_does():
    """One of many alike tokens: Ranking noise a of MaskGIT is the temperature a / (1 + a): one histogram."""
    n, p = 64, torch.tensor([0.6, 0.3, 0.1])
    seen = {}
    for name, ours in (("moment", "moment:2"), ("maskgit", "maskgit")):
        sampling = preset_settings(ours, n, 3, 2) | ({"choice_temperature": 2.0} if name == "maskgit" else {})
        sampling["schedule"] = lambda u: 1 - 1 / n if u < 1 else 0.0  # one token in the first step; there a = 1
        start = torch.full((8192, n), 3)
        first = next(
            decode(lambda t, u: p.log().expand(*t.shape, 3), start, mask_id=3, generator=seeded(1), **sampling)
        )
        seen[name] = torch.bincount(first.tokens[first.revealed], minlength=3) / 8192
    tempered = p.square() / p.square().sum()
    for name, found in seen.items():
        assert found.tolist() == pytest.approx(tempered.tolist(), abs=0.03), name


def test_corrector_redraws_few_revealed_tokens():
    plain = trace_of("informed:3", 6)
    for before, after in itertools.pairwise(plain):
        changed = (before.tokens != after.tokens) & ~before.masked
        assert changed.sum(1).max() <= 3
        assert (after.tokens == FIELD.mask_id).equal(after.masked)
    nll = {k: -FIELD.log_prob(trace_of(k, 4, 1024)[-1].tokens).mean() for k in ("beta:1:1", "informed:4")}
    assert nll["informed:4"] < nll["beta:1:1"], "random order with a corrector makes fewer impossible examples"


def test_passes_are_counted():
    """A step that changes nothing is no pass; one with a corrector is two."""
    trace = trace_of("mdlm", 16)
    assert run(iter(trace))[1] == sum(int(step.revealed.any(1).sum()) for step in trace) < 256 * 16
    assert run(iter(trace_of("informed", 4)), corrector=print)[1] == 2 * 4 * 256


def test_entropy_bound_against_diffusers():
    """Its scheduler accepts the tokens that our rule reveals, step by step on the same logits."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "EntropyBoundScheduler"):
        pytest.skip("this diffusers has no EntropyBoundScheduler")
    scheduler = diffusers.EntropyBoundScheduler(entropy_bound=0.8, t_max=1.0, t_min=1.0)
    logits, masked, counts = [], torch.ones(1, 12, dtype=torch.bool), []

    def logits_fn(tokens, u):
        logits.append(3 * torch.randn(1, 12, 5, generator=seeded(len(logits))))
        return logits[-1]

    start, ours = torch.full((1, 12), 5), preset_settings("eb:0.8", 12, 5, 12)
    for step in decode(logits_fn, start, mask_id=5, generator=seeded(), **ours):
        theirs = scheduler.step(logits[-1][:, masked[0]], 0, start[:, masked[0]], generator=seeded()).accepted_index
        assert step.revealed[masked][None].equal(theirs)
        masked = step.masked
        counts.append(int(theirs.sum()))
    assert 2 < len(counts) < 12, "this case has the power to tell"


@pytest.mark.parametrize(
    "wrong",
    [
        "p2:x",
        "p2:-1",
        "mdlm:1",
        "klass:1:2:3:4",
        "remdm_cap:2",
        "beta:0",
        "top_p:0",
        "eb:nan",
        "remdm_loop:2",
        "entropy_sum:-1",
        "remdm_loop:0.1:0.9:0.5",
        "dilated:2",
        "dilated:nan",
    ],
)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=r"known|give|fraction"):
        trace_of(wrong, 4)


@pytest.mark.parametrize("name", ["token_critic", "informed"])
def test_what_needs_a_world_says_so(name):
    with pytest.raises(ValueError, match=f"{name} needs p"):
        trio(name)


def test_samples_form_groups():
    for samples in (0, 32, 100, 10**9, 64.0, True, math.nan, None, "64"):
        with pytest.raises(ValueError, match="samples is"):
            check_samples(samples)
