"""cfg.py: dropping text, guidance and its schedules, negative prompts (Muse 2.7)."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimuse.cfg import GUIDANCES, drop_text, get_guidance, guide, guided, null_text, rising
from minimuse.text import Context
from minimuse.transformer import Transformer, TransformerConfig

OFF = settings(deadline=None, max_examples=50, derandomize=True)


def context(batch=3, length=5, width=4, seed=0):
    embeds = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))
    lengths = torch.arange(batch) % length + 1
    mask = torch.arange(length) < lengths[:, None]
    return Context(embeds * mask[..., None], mask)


class FakeMemory(NamedTuple):
    """One logit vector an example: a model whose logits are its memory, whatever the batch."""

    logits: Tensor  # (B, V)

    def cat(self, other):
        return FakeMemory(torch.cat([self.logits, other.logits]))


class FakeModel:
    def __init__(self):
        self.rows = []

    def __call__(self, tokens, memory):
        self.rows.append(len(tokens))
        return memory.logits[:, None].expand(-1, tokens.shape[1], -1) + tokens[..., None]


# --- dropping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_pitfall_03_the_fraction_of_dropped_texts(p):
    """Inverted, p = 0.1 would drop 90%."""
    given_ = Context(torch.ones(10_000, 2, 1), torch.ones(10_000, 2, dtype=torch.bool))
    dropped = drop_text(given_, p, torch.Generator().manual_seed(0))
    gone = dropped.embeds.eq(0).all(2).all(1)
    assert gone.float().mean().item() == pytest.approx(p, abs=0.015), "fraction of the examples without text"
    assert gone.equal(~dropped.mask.any(1)), "the mask says the same as the embeddings"


def test_dropping_none_or_all():
    before = context()
    kept = drop_text(before, 0.0)
    assert kept.embeds.equal(before.embeds), "p = 0 keeps every text"
    assert kept.mask.equal(before.mask), "p = 0 keeps every mask"
    gone = drop_text(before, 1.0)
    assert gone.embeds.eq(0).all(), "p = 1 keeps no text"
    assert not gone.mask.any(), "p = 1 keeps no text token"
    assert before.mask.sum() > 3, "what was given is not written to"


@given(st.floats(0, 1), st.integers(0, 1000))
@OFF
def test_each_text_is_dropped_whole_or_kept_whole(p, seed):
    before = context(batch=6)
    after = drop_text(before, p, torch.Generator().manual_seed(seed))
    for i in range(6):
        kept = after.embeds[i].equal(before.embeds[i]) and after.mask[i].equal(before.mask[i])
        gone = after.embeds[i].eq(0).all() and not after.mask[i].any()
        assert kept or gone, f"text {i} is half dropped"


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), 10, True, "0.1", None])
def test_a_probability_outside_zero_to_one_is_refused(p):
    with pytest.raises(ValueError, match=r"the probability p of drop_text is .* give a fraction"):
        drop_text(context(), p)


def test_half_precision_stays():
    before = context().to(dtype=torch.float16)
    assert drop_text(before, 0.5).embeds.dtype == torch.float16, "dropping changed the dtype"
    assert null_text(before).embeds.dtype == torch.float16, "the null text has another dtype"


def test_null_text_is_zeros_without_a_text_token():
    null = null_text(context())
    assert null.embeds.shape == (3, 1, 4), "one embedding an example"
    assert null.embeds.eq(0).all(), "which is zero"
    assert not null.mask.any(), "and no text token"


def test_training_and_sampling_agree_on_removed_text():
    model, tokens = tiny(), torch.randint(9, (3, 16))
    dropped = model(tokens, model.memory(drop_text(context(), 1.0)))
    null = model(tokens, model.memory(null_text(context())))
    torch.testing.assert_close(
        dropped, null, msg=lambda m: f"dropped in training is not the null text of sampling: {m}"
    )


# --- the formula ------------------------------------------------------------------------------------------------------


def test_pitfall_26_guide_itself_computes_in_float32():
    c, u = (16 * torch.rand(2, 50)).bfloat16()
    out = guide(c, u, 8.0)
    assert out.dtype == torch.float32, f"guided logits are {out.dtype}"
    torch.testing.assert_close(out, 9 * c.float() - 8 * u.float(), msg=lambda m: f"not the formula in float32: {m}")


def test_guide_by_hand():
    cond, uncond = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([0.0, 3.0, -1.0])
    assert guide(cond, uncond, 2.0).tolist() == [3.0, 0.0, -1.0], "3 l_c - 2 l_u"


@given(st.floats(0, 20), st.integers(0, 100))
@OFF
def test_guide_is_muses_formula(t, seed):
    c, u = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    torch.testing.assert_close(guide(c, u, t), (1 + t) * c - t * u, msg=lambda m: f"l_g = (1 + t) l_c - t l_u: {m}")


def test_pitfall_12_zero_guidance_is_the_conditional_and_scales_convert():
    c, u = torch.randn(2, 2, 3, 4)
    assert guide(c, u, 0.0).equal(c), "t = 0 is the conditional logits exactly"
    for s in (0.0, 1.0, 7.5):
        diffusers = u + s * (c - u)
        torch.testing.assert_close(guide(c, u, s - 1), diffusers, msg=lambda m: f"u + s (c - u) with t = s - 1: {m}")


@given(st.floats(-10, 100, width=32), st.integers(0, 100))
@OFF
def test_pitfall_13_the_same_text_as_negative_prompt_cancels_exactly(t, seed):
    c = 10 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    assert guide(c, c, t).equal(c), f"guide(c, c, {t}) is not c bit for bit"


# --- ramps ------------------------------------------------------------------------------------------------------------


def test_rising_is_linear_from_start_to_t():
    assert [rising(4.0)(u) for u in (0.0, 0.25, 1.0)] == [0.0, 1.0, 4.0], "rises from 0 to t"
    assert [rising(4.0, 2.0)(u) for u in (0.0, 0.5, 1.0)] == [2.0, 3.0, 4.0], "rises from start to t"


@pytest.mark.parametrize(
    ("guidance", "at_0", "at_half", "at_1"),
    [(3, 3, 3, 3), (2.5, 2.5, 2.5, 2.5), ((0, 8), 0, 4, 8), ([6.0, 2.0], 6, 4, 2), (lambda u: u**2, 0, 0.25, 1)],
)
def test_get_guidance(guidance, at_0, at_half, at_1):
    t = get_guidance(guidance)
    assert [t(0.0), t(0.5), t(1.0)] == [at_0, at_half, at_1], f"{guidance!r} as a function of progress"


def test_guidance_by_name():
    found = {name: [get_guidance(f"{name}:4")(u) for u in (0.0, 0.2, 0.5, 1.0)] for name in GUIDANCES}
    assert found.pop("power-cosine") == pytest.approx([0, 2 * (1 - math.cos(math.pi / 25)), 4 * 0.14645, 4], abs=1e-4)
    assert found == {
        "constant": [4.0] * 4, "rising": pytest.approx([0, 0.8, 2, 4]),
        "falling": pytest.approx([4, 3.2, 2, 0]), "interval": [0.0, 0.0, 4, 4],
    }  # fmt: skip
    assert get_guidance("interval:3:0.1:0.4")(0.2) == 3
    for wrong in ("rising", "rising:x", "constant:1:2"):
        with pytest.raises(ValueError, match=r"unknown guidance .* known: constant, rising"):
            get_guidance(wrong)


@pytest.mark.parametrize(
    "guidance",
    ["4", None, True, (1,), (1, 2, 3), [], {"t": 1}, float("nan"), float("inf"), (0, float("nan")), (True, 1)],
)
def test_get_guidance_refuses_the_rest(guidance):
    with pytest.raises(ValueError, match=r"guidance is .* give a number, a pair"):
        get_guidance(guidance)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), None, "1", True])
def test_a_guidance_function_that_gives_no_number_is_refused(value):
    with pytest.raises(ValueError, match=r"guidance at u = 0\.5 is"):
        get_guidance(lambda u: value)(0.5)


def test_numpy_and_torch_scalars_are_guidance():
    for three in (np.float32(3), np.int64(3), torch.tensor(3.0)):
        assert (
            get_guidance(three)(0.2)
            == get_guidance((three, three))(0.7)
            == get_guidance(lambda u, three=three: three)(1)
            == 3
        )


# --- guided -----------------------------------------------------------------------------------------------------------


def test_guided_mixes_the_two_branches_row_by_row():
    c, n = torch.randn(2, 3, 5)
    tokens = torch.arange(6).view(3, 2)
    out = guided(FakeModel(), FakeMemory(c), FakeMemory(n), 1.5)(tokens, 0.3)
    expected = 2.5 * (c[:, None] + tokens[..., None]) - 1.5 * (n[:, None] + tokens[..., None])
    torch.testing.assert_close(out, expected, msg=lambda m: f"(1 + t) l_c - t l_u of each row: {m}")


def test_pitfall_26_guidance_is_computed_in_float32():
    """In bf16 a logit near 16 is rounded to steps of 0.125, and t multiplies the rounding of l_c - l_u."""
    c, n = (16 * torch.rand(2, 3, 50)).bfloat16()
    tokens = torch.zeros(3, 1, dtype=torch.long)
    for t in (0.0, 8.0):
        out = guided(FakeModel(), FakeMemory(c), FakeMemory(n), t)(tokens, 1.0)
        assert out.dtype == torch.float32, f"t = {t}: guided logits are {out.dtype}"
        expected = (1 + t) * c.float() - t * n.float()
        torch.testing.assert_close(out[:, 0], expected, msg=lambda m: f"not the formula in float32: {m}")


def test_guided_follows_the_ramp():
    c, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    logits_fn = guided(FakeModel(), FakeMemory(c), FakeMemory(n), (0.0, 4.0))
    seen = [logits_fn(torch.zeros(1, 1, dtype=torch.long), u)[0, 0, 0].item() for u in (0.0, 0.25, 0.5, 1.0)]
    assert seen == [1.0, 2.0, 3.0, 5.0], f"1 + t(u) with t from 0 to 4, got {seen}"


def test_no_second_branch_where_guidance_is_zero():
    model, memory = FakeModel(), FakeMemory(torch.zeros(3, 5))
    logits_fn = guided(model, memory, memory, lambda u: 0.0 if u < 0.5 else 2.0)
    for u in (0.0, 0.25, 0.5, 1.0):
        out = logits_fn(torch.zeros(3, 4, dtype=torch.long), u)
        assert out.shape == (3, 4, 5), "as many rows come out as went in"
    assert model.rows == [3, 3, 6, 6], f"rows that the model saw: {model.rows}"


def tiny():
    return Transformer(
        TransformerConfig(codebook_size=9, grid=4, text_width=4, width=32, layers=2, heads=2, mlp_width=64)
    )


def test_pitfall_13_guided_with_identical_memories_is_the_conditional():
    c = torch.randn(3, 5)
    tokens = torch.randint(5, (3, 4))
    fake = guided(FakeModel(), FakeMemory(c), FakeMemory(c.clone()), 7.0)(tokens, 1.0)
    assert fake.equal(FakeModel()(tokens, FakeMemory(c))), "a negative prompt of the same text cancels exactly"
    model, tokens = tiny().eval(), torch.randint(9, (3, 16))
    memory = model.memory(context())
    both, alone = guided(model, memory, memory, 7.0)(tokens, 1.0), model(tokens, memory)
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4, msg=lambda m: f"but for rounding: {m}")


def test_removed_text_costs_no_cross_attention():
    model, tokens, rows = tiny().eval(), torch.randint(9, (3, 16)), []
    memory, null = model.memory(context()), model.memory(null_text(context()))
    expected = 3 * model(tokens, memory) - 2 * model(tokens, null)
    for layer in model.layers:
        layer.cross.q.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    out = guided(model, memory, null, 2.0)(tokens, 0.0)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4, msg=lambda m: f"3 l_c - 2 l_u: {m}")
    assert rows == [3, 3], "only the rows with text need queries"


def test_negative_prompts_of_another_length_are_guided_away_from():
    model, tokens = tiny().eval(), torch.randint(9, (3, 16))
    text, negative = context(), context(length=2, seed=5)
    memory, away = model.memory(text), model.memory(negative)
    out = guided(model, memory, away, 2.0)(tokens, 0.0)
    expected = 3 * model(tokens, memory) - 2 * model(tokens, away)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4, msg=lambda m: f"3 l_c - 2 l_n: {m}")
