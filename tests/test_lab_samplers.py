"""lab_samplers.py: presets against the code they follow, and the rules that every sampler keeps."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse.lab import WorldEvaluator
from minimuse.lab_samplers import (
    SAMPLER_PRESETS,
    SAMPLERS,
    check_samples,
    entropy_bound,
    exact_score,
    preset_settings,
    run,
)
from minimuse.lab_worlds import ChainWorld, MixtureWorld, PottsWorld
from minimuse.masking import SCHEDULES, reveal_counts
from minimuse.sampler import ORDERS, State, decode

OFF = settings(deadline=None, max_examples=25, derandomize=True)
CHAIN = ChainWorld(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 4, torch.tensor([0.7, 0.3]))
GOLDEN = {  # how many of 256 tokens each of 12 steps reveals
    "muse": [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33],
    "maskgit": [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33],
    "amused": [3, 6, 11, 15, 18, 22, 26, 28, 30, 31, 33, 33],
    "halton": [13, 14, 14, 14, 15, 15, 16, 17, 20, 22, 28, 68],
    "lucidrains": [3, 8, 13, 17, 22, 26, 29, 32, 34, 36, 35, 1],
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
    for name, counts in (("lucidrains", lucidrains), ("halton", halton)):
        assert reveal_counts(n, steps, preset_settings(name, n, 64, steps)["schedule"]) == counts, name


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
    sampler=st.sampled_from([*ORDERS, "critic", *(f"as {name}" for name in SAMPLER_PRESETS)]),
    schedule=st.sampled_from([*SCHEDULES, "log", "pow2.5", entropy_bound(0.7)]),
    steps=st.integers(1, 20),
    known=st.lists(st.integers(0, 2), min_size=16, max_size=16),
    remask=st.booleans(),
    temperature=st.sampled_from([0.0, 2.0, lambda u: 2 * (1 - u)]),
)
@settings(OFF, max_examples=50)
def test_invariants_of_every_sampler(world, sampler, schedule, steps, known, remask, temperature):
    start = torch.tensor([known, [2] * 16, [0, 2, 1, 2] * 4])[:, : world.n].clamp(max=world.v)
    start[start == 2] = world.mask_id
    if sampler.startswith("as "):
        sampling = preset_settings(sampler.removeprefix("as "), world.n, world.v, steps)
    else:
        order = exact_order(world) if sampler == "critic" else sampler
        sampling = {"schedule": schedule, "order": order, "remask": remask, "choice_temperature": temperature}
    sampling = {**sampling, "steps": steps, "mask_id": world.mask_id}
    trace = list(decode(world, start, generator=[seeded(i) for i in range(3)], **sampling))
    given_, last = start != world.mask_id, trace[-1].tokens
    assert not trace[-1].masked.any(), "a mask is left"
    assert (last != world.mask_id).all(), "a mask is left"
    assert last[given_].equal(start[given_]), "a known token has changed"
    assert len(trace) <= max(steps, 1)
    known_now = given_.sum(1)
    for s in trace:
        assert ((~s.masked).sum(1) >= known_now).all(), "fewer tokens are known than before"
        assert (s.tokens == world.mask_id).equal(s.masked)
        known_now = (~s.masked).sum(1)
    if sampling["schedule"] is not schedule or not callable(schedule):
        for row in range(3):
            counts = [0, *((~s.masked[row]).sum().item() - given_[row].sum().item() for s in trace)]
            took = [b - a for a, b in itertools.pairwise(counts) if b > a]
            assert took == reveal_counts(int((~given_[row]).sum()), steps, sampling["schedule"])
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


def test_samples_form_groups():
    for samples in (0, 32, 100, 10**9, 64.0, True, math.nan, None, "64"):
        with pytest.raises(ValueError, match="samples is"):
            check_samples(samples)
