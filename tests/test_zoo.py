"""The bug zoo: each mutant runs and looks fine, a reference set of tests kills each, and the truth raises no alarm."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minimuse.config import preset
from minimuse.text import Context

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("zoo", ROOT / "notebooks" / "assignments" / "zoo.py")
zoo = sys.modules["zoo"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(zoo)
NAMES = [mutant.name for mutant in zoo.MUTANTS]

TINY = replace(preset("nano").superres, codebook_size=8, low_codebook_size=8, text_width=4, width=16, mlp_width=16)
TINY = replace(TINY, grid=4, low_grid=2, block=0, layers=1, low_layers=1, draft=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def texts(b=1, length=3, padding=0):
    embeds = torch.randn(b, length, 4, generator=seeded())
    mask = torch.arange(length + padding) < length
    return Context(nn.functional.pad(embeds, (0, 0, 0, padding)), mask.expand(b, -1))


def superres(lib):
    torch.manual_seed(0)
    return lib.transformer.SuperRes(TINY).eval()


# --- the reference set: what a very good student hands in -------------------------------------------------------------


def test_rates_have_muses_mean_and_tail(lib):
    r = lib.masking.sample_mask_rate(20_000, generator=seeded())
    assert abs(r.mean() - 2 / math.pi) < 0.01
    assert abs((r > 0.9).float().mean() - 0.287) < 0.015


def test_rates_differ_within_a_batch(lib):
    assert len(set(lib.masking.sample_mask_rate(8, generator=seeded()).tolist())) == 8


def test_the_loss_knows_only_masked_tokens(lib):
    logits, masked = torch.randn(1, 4, 5, generator=seeded()), torch.tensor([[True, False, True, False]])
    losses = [lib.masking.masked_cross_entropy(logits, torch.tensor([[1, t, 2, t]]), masked) for t in range(5)]
    assert len({loss.item() for loss in losses}) == 1


def test_an_unknown_schedule_is_refused(lib):
    try:
        lib.masking.get_schedule("cosin")
    except ValueError:
        return
    raise AssertionError("a misspelt schedule was taken")


def test_maskgits_table(lib):
    assert lib.masking.reveal_counts(256, 12) == [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]


def test_a_row_of_draws_does_not_know_its_neighbours(lib):
    both = lib.utils.uniforms(2, 3, generator=[seeded(1), seeded(2)])
    assert both[1:].equal(lib.utils.uniforms(1, 3, generator=[seeded(2)]))


def test_given_tokens_stay(lib):
    given = torch.tensor([[9, 3, 9, 1, 9, 9]])

    def logits_fn(tokens, u):
        return torch.randn(1, 6, 9, generator=seeded(int(10 * u)))

    *_, last = lib.sampler.decode(logits_fn, given, mask_id=9, steps=3, generator=seeded())
    assert last.tokens[0, [1, 3]].tolist() == [3, 1]


def test_ranking_noise_by_hand(lib):
    """Place 0 draws one of 2 codes, place 1 one of 8; with noise 1 the surer comes first with odds 1/2 : 1/8."""
    logits = torch.where(torch.arange(8) < torch.tensor([[2], [8]]), 0.0, -1e4)
    start = torch.full((4000, 2), 8)
    how = {"mask_id": 8, "steps": 2, "choice_temperature": 2.0, "generator": seeded()}  # 2 (1 - 1/2) = 1 in step 0
    first = next(iter(lib.sampler.decode(lambda tokens, u: logits.expand(4000, 2, 8), start, **how)))
    assert abs(first.revealed[:, 0].float().mean() - 0.8) < 0.03


def test_a_tenth_of_the_texts_is_dropped(lib):
    dropped = lib.cfg.drop_text(texts(4000), 0.1, seeded()).embeds.eq(0).all(2).all(1)
    assert abs(dropped.float().mean() - 0.1) < 0.02


def test_no_guidance_is_the_conditional(lib):
    c, u = torch.randn(2, 1, 3, 4, generator=seeded())
    assert lib.cfg.guide(c, u, 0.0).equal(c)


def test_removed_text_is_attended(lib):
    model = lib.transformer.Transformer(TINY)
    assert model.memory(lib.cfg.null_text(texts())).attend.any(-1).all()


def test_padding_changes_nothing(lib):
    model, low, tokens = superres(lib), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        a, b = (model(tokens, model.memory(texts(padding=p), low)) for p in (0, 2))
    assert torch.allclose(a, b, atol=1e-5)


def test_low_tokens_reach_the_logits_and_have_places(lib):
    model, tokens = superres(lib), torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        a, b, c = (
            model(tokens, model.memory(texts(), torch.tensor([low]))) for low in ([1, 2, 3, 4], [5] * 4, [2, 1, 3, 4])
        )
    assert not torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(a, c, atol=1e-6)


def test_the_model_does_not_see_what_is_masked(lib):
    class Spy(nn.Module):
        mask_id = 8

        def memory(self, context):
            return None

        def forward(self, tokens, memory):
            self.saw = tokens
            return torch.zeros(*tokens.shape, 8)

    spy, masked = Spy(), torch.tensor([[True, False]])
    lib.train.MaskedLoss(spy)(torch.tensor([[3, 5]]), masked, texts(), None, 1)
    assert spy.saw.tolist() == [[8, 5]]


def test_idle_codes_come_back(lib):
    quantizer = lib.vqgan.VectorQuantizer(4, 2)
    quantizer.codebook.data = torch.tensor([[0.0, 0.0], [90.0, 0.0], [0.0, 90.0], [90.0, 90.0]])
    out = quantizer(torch.randn(1, 2, 4, 4, generator=seeded()))
    quantizer.restart_dead_codes(out.z, out.tokens, quantizer.new_idle_counts())
    assert quantizer.codebook.abs().max() < 10


def test_one_pixel_masks_its_token(lib):
    repaint = torch.zeros(1, 4, 4, dtype=torch.bool)
    repaint[0, 1, 2] = True
    assert lib.editing.token_mask(repaint, 2).tolist() == [[False, True, False, False]]


def test_a_negative_prompt_is_what_is_guided_away_from(lib):
    class Encoder:
        def encode(self, prompts):
            return Context(
                torch.tensor([[[float(len(p))]] for p in prompts]), torch.ones(len(prompts), 1, dtype=torch.bool)
            )

    muse = SimpleNamespace(encoder=Encoder(), device=torch.device("cpu"), dtype=torch.float32)
    _, null = lib.muse.Muse.contexts(muse, [{"prompt": "abc", "negative_prompt": "ab"}])
    assert null.embeds.flatten().tolist() == [2.0]


def test_progress_goes_from_0_to_1(lib):
    seen, start = [], torch.full((1, 8), 8)

    def logits_fn(tokens, u):
        seen.append(u)
        return torch.zeros(1, 8, 8)

    list(lib.sampler.decode(logits_fn, start, mask_id=8, steps=5, generator=seeded()))
    assert seen == [0, 0.25, 0.5, 0.75, 1]


def test_rare_codes_are_drawn(lib):
    """The last code has p = 1e-9, and the uniform 1 - 5e-10 belongs to it."""
    logits = torch.tensor([[[1.0, 1e-9]]]).log()
    assert lib.sampler.draw(logits, torch.tensor([[1 - 5e-10]], dtype=torch.double), 1.0).item() == 1


def test_each_image_has_counts_of_its_own(lib):
    start = torch.tensor([[8, 8, 1, 2, 3, 4], [8] * 6])
    *_, last = lib.sampler.decode(lambda t, u: torch.zeros(2, 6, 8), start, mask_id=8, steps=2, generator=seeded())
    assert (last.tokens < 8).all()


def test_mask_is_no_code(lib):
    assert lib.transformer.Transformer(TINY).mask_id not in range(TINY.codebook_size)


def test_p2_takes_back_the_least_likely_token(lib):
    """Of three tokens, two known, two stay; the last known one has p = 0.1, the others 0.5 and 0.8."""
    sampler, lab = lib.sampler, lib.lab_samplers
    masked, ones = torch.tensor([[True, False, False]]), torch.ones(1, 3)
    logits = torch.tensor([[[0.5, 0.5], [0.8, 0.2], [0.1, 0.9]]]).log()
    random = torch.full((1, 2, 3), 0.5, dtype=torch.double)
    state = sampler.State(1, 3, 0.5, logits, None, torch.zeros(1, 3).long(), masked, ones.bool(), ones, random)
    assert lab.preset_settings("p2:1", 3, 2, 3)["choose"](state).tolist() == [[True, True, False]]


REFERENCE = [f for name, f in sorted(globals().items()) if name.startswith("test_")]
for _f in REFERENCE:  # they are the zoo's, not pytest's
    del globals()[_f.__name__]


# --- what pytest runs -------------------------------------------------------------------------------------------------


def glance(lib):
    """What one sees who runs everything once: shapes and kinds of results."""
    masking, sampler, cfg = lib.masking, lib.sampler, lib.cfg
    tokens, logits = torch.full((2, 4), 8), torch.randn(2, 4, 8, generator=seeded())
    masked = masking.random_mask(tokens, masking.sample_mask_rate(2, generator=seeded()), seeded())
    steps = list(
        sampler.decode(lambda t, u: logits, tokens, mask_id=8, steps=2, choice_temperature=1.0, generator=seeded())
    )
    p2 = lib.lab_samplers.preset_settings("p2", 4, 8, 2)
    model, low = superres(lib), torch.zeros(2, 4, dtype=torch.long)
    made = [
        list(sampler.decode(lambda t, u: logits, tokens, mask_id=8, generator=seeded(), **p2))[-1].tokens,
        masking.sample_mask_rate(3, generator=seeded()),
        masked,
        masking.masked_cross_entropy(logits, tokens % 8, masked),
        torch.tensor(masking.reveal_counts(16, 4)),
        lib.utils.uniforms(2, 3, generator=[seeded(), seeded(1)]),
        steps[-1].tokens,
        *cfg.drop_text(texts(2), 0.5, seeded()),
        *cfg.null_text(texts(2)),
        cfg.guide(logits, -logits, 1.0),
        model(torch.full((2, 16), 8), model.memory(texts(2), low)),
        lib.vqgan.VectorQuantizer(4, 2)(torch.randn(1, 2, 3, 3, generator=seeded())).tokens,
        lib.editing.token_mask(torch.ones(1, 4, 4, dtype=torch.bool), 2),
        lib.train.MaskedLoss(lib.transformer.Transformer(TINY))(
            low.repeat(1, 4), low.repeat(1, 4) == 0, texts(2), None, 32
        )[0],
    ]
    assert all(x.isfinite().all() for x in made)
    assert (steps[-1].tokens < 8).all()
    return [(x.shape, x.dtype) for x in made]


def test_the_zoo_is_large_enough_and_told():
    assert len(set(NAMES)) == len(zoo.MUTANTS) >= 12
    assert all(len(mutant.story) > 40 for mutant in zoo.MUTANTS)
    assert sum(mutant.source.startswith("https://") for mutant in zoo.MUTANTS) >= 7


@pytest.mark.parametrize("mutant", zoo.MUTANTS, ids=NAMES)
def test_a_mutant_looks_fine_at_a_glance(mutant):
    assert glance(zoo.library(mutant)) == glance(zoo.library())


def test_the_reference_set_kills_all_and_cries_no_wolf():
    score = zoo.score(REFERENCE)
    assert score.false_alarms == []
    assert score.survived == []
    assert set(score.killed) == set(NAMES)
    for test in REFERENCE:  # a mutant is killed for what it is, not for being a mutant
        assert 1 <= sum(test.__name__ in by for by in score.killed.values()) <= 3, test.__name__


def test_false_alarms_count_and_kill_nothing():
    def test_nonsense(lib):
        assert lib.masking.sample_mask_rate(3).mean() > 2

    score = zoo.score([test_nonsense, REFERENCE[0]])
    assert score.false_alarms == ["test_nonsense"]
    assert all("test_nonsense" not in by for by in score.killed.values())
    assert len(score.killed) + len(score.survived) == len(NAMES)


def test_a_mutant_that_lags_behind_is_refused():
    with pytest.raises(ValueError, match="stands 0 times"):
        zoo.library(zoo.MUTANTS[0]._replace(old="no such line"))


def test_the_true_package_is_left_alone():
    before = dict(vars(sys.modules["minimuse.masking"]))
    zoo.library(zoo.MUTANTS[0])
    assert vars(sys.modules["minimuse.masking"]) == before
    test_true = {f.__name__: f for f in REFERENCE}["test_rates_have_muses_mean_and_tail"]
    assert not zoo.raises(test_true, zoo.library())
