"""validation.py: held-out losses against cases worked by hand, and what looking must leave as it was."""

import math

import pytest
import torch
import torch.nn.functional as F

from minimuse.masking import masked_cross_entropy
from minimuse.train import MaskedLoss
from minimuse.train_engine import Engine
from minimuse.transformer import Transformer, TransformerConfig
from minimuse.validation import RATES, _masks, eval_mode, unigram_entropy, validate

V, N, D_LM = 8, 16, 6
ENGINE = Engine(device="cpu", bf16=False)


class Texts(list):
    """Unpadded captions, one an example, read as a cache of them is."""

    def pick(self, at, u):
        return [self[i] for i in at.tolist()]


class Spy:
    """A loss by a function of (true tokens, masked) -> logits, which keeps what it was shown."""

    def __init__(self, logits):
        self.logits, self.shown = logits, []

    def modules(self):
        return iter(())

    def eval(self):
        return self

    def __call__(self, x, masked, context, low, count):
        self.shown.append((x, masked, context.embeds[:, 0, 0], low))
        logits = self.logits(x, masked)
        assert not torch.is_grad_enabled(), "validation builds no graph"
        right = ((logits.argmax(-1) == x) & masked).sum() / count
        return masked_cross_entropy(logits, x, masked, count=count), right


def flat(x, masked):
    return torch.zeros(*x.shape, V)


def rows(n=10):
    tokens = torch.randint(V, (n, N), generator=torch.Generator().manual_seed(0))
    return tokens, Texts(torch.full((2, D_LM), float(i + 1)) for i in range(n))


def look(loss, tokens, texts, *low, **kwargs):
    return validate(loss, tokens, texts, *low, codebook_size=V, engine=ENGINE, **kwargs)


def test_a_flat_model_costs_log_v_at_each_rate():
    tokens, texts = rows()
    figures = look(Spy(flat), tokens, texts)
    keys = [f"{name}@{rate}" for rate in RATES for name in ("loss", "accuracy")]
    assert sorted(figures) == sorted([*keys, "bound", "unigram"]), f"{sorted(figures)}"
    for key in ("bound", *keys[::2]):
        assert figures[key] == pytest.approx(math.log(V), rel=1e-6), f"{key} of a flat guess is {figures[key]}"


def test_a_model_that_knows_all_costs_nothing():
    tokens, texts = rows()
    figures = look(Spy(lambda x, masked: 50.0 * F.one_hot(x, V)), tokens, texts)
    assert figures["bound"] < 1e-6, f"{figures}"
    assert all(figures[f"accuracy@{rate}"] == pytest.approx(1) for rate in RATES), "each guess is right"


def test_unigram_entropy_by_hand():
    tokens = torch.tensor([[0, 0, 1, 2]])
    assert unigram_entropy(tokens, 5) == pytest.approx(1.5 * math.log(2)), "1/2, 1/4, 1/4: 1.5 bits"
    assert unigram_entropy(torch.zeros(3, 4).long(), 5) == 0, "one code, no surprise"
    assert unigram_entropy(torch.arange(6)[None], 6) == pytest.approx(math.log(6)), "all equally often"


def test_rates_are_the_buckets_they_name():
    tokens, texts = rows(64)
    spy = Spy(flat)
    look(spy, tokens, texts, strata=0)
    assert len(spy.shown) == len(RATES), "without strata there is no bound to pay for"
    for rate, (_, masked, *_) in zip(RATES, spy.shown, strict=True):
        share = masked.float().mean(1)
        assert ((rate - 0.1 <= share) & (share <= rate + 0.1 + 1 / N)).all(), f"{rate}: {share}, rounded up to tokens"
        assert len(share.unique()) > 2, "one rate an example, not one a batch"


def test_the_bound_is_the_mean_over_uniform_counts():
    """A model whose loss is a function of the count alone: k masked cost log(1 + k) each; D3PM's mean by hand."""
    n = 8

    def by_count(x, masked):
        k = masked.sum(1, keepdim=True).float()  # p(x) = 1 / (1 + k), the rest on one other code
        true = F.one_hot(x, V).bool()
        other = F.one_hot((x + 1) % V, V).bool()
        p = torch.where(true, (1 / (1 + k))[..., None], torch.where(other, (k / (1 + k))[..., None], 1e-30))
        return p.log()

    tokens, texts = torch.randint(V, (6, n)), Texts([torch.ones(1, D_LM)] * 6)
    spy = Spy(by_count)
    figures = look(spy, tokens, texts)
    counts = [shown[1].sum(1) for shown in spy.shown[len(RATES) :]]
    assert [c.unique().tolist() for c in counts] == [[k] for k in range(1, n + 1)], "8 strata of 8: each count once"
    exact = sum(math.log(1 + k) for k in range(1, n + 1)) / n
    assert figures["bound"] == pytest.approx(exact, rel=1e-5), "the bound is not the mean over uniform counts"


def test_the_bound_holds_for_a_world_that_is_known():
    """Two tokens that are equal: -log p / N = log(V) / 2, and for the perfect model the bound is no bound but exact."""
    values = torch.arange(V)

    def perfect(x, masked):
        both = masked.all(1)[:, None, None]
        seen = torch.where(masked[:, :1], x[:, 1:], x[:, :1])  # the one that is not masked
        return torch.where(both, 0.0, 50.0 * F.one_hot(seen, V)).expand(-1, 2, -1)

    tokens, texts = values[:, None].expand(V, 2).contiguous(), Texts([torch.ones(1, D_LM)] * V)
    bound = look(Spy(perfect), tokens, texts)["bound"]
    assert bound == pytest.approx(math.log(V) / 2, rel=1e-5), "k = 1 costs 0, k = 2 costs log V each: mean log(V) / 2"


def test_masks_are_functions_of_the_example():
    tokens, _ = rows(6)
    for all_, some in zip(_masks(tokens, torch.arange(6), 0), _masks(tokens[2:5], torch.arange(2, 5), 0), strict=True):
        assert all_[1][2:5].equal(some[1]), "an example's mask depends on its neighbours"
    masks = [m for _, m in _masks(tokens, torch.arange(6), 8)]
    torch.manual_seed(99)
    assert all(a.equal(b[1]) for a, b in zip(masks, _masks(tokens, torch.arange(6), 8), strict=True)), "and on nothing"
    assert not masks[2][0].equal(masks[2][1]), "two examples share a mask"


def test_texts_and_low_tokens_belong_to_their_image():
    tokens, texts = rows(10)
    low = torch.arange(10)[:, None].expand(10, 4)
    spy = Spy(flat)
    look(spy, tokens, texts, low, batch=4)
    for x, _, text, seen in spy.shown:
        at = (text - 1).long()
        assert x.equal(tokens[at]), "a caption of another example"
        assert seen[:, 0].equal(at), "low-resolution tokens of another example"
    assert sum(len(shown[0]) for shown in spy.shown) == 10 * (len(RATES) + 8), "each example once a mask"


def test_at_most_so_many_examples():
    tokens, texts = rows(10)
    spy = Spy(flat)
    look(spy, tokens, texts, most=3)
    assert {len(shown[0]) for shown in spy.shown} == {3}, "`most` is not kept to"


def test_looking_changes_nothing():
    """Modes, gradients and the global draws are as before; within, everything is in eval mode."""
    model = Transformer(
        TransformerConfig(
            codebook_size=V, grid=4, text_width=D_LM, width=32, layers=2, heads=2, mlp_width=64, dropout=0.5
        )
    )
    loss = MaskedLoss(model).train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear))
    frozen.eval()
    tokens, texts = rows()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    a = look(loss, tokens, texts)
    assert a == look(loss, tokens, texts), "dropout was on, or a mask differs from look to look"
    assert torch.get_rng_state().equal(state), "looking used up draws of the training"
    assert [m.training for m in (loss, model, frozen)] == [True, True, False], "a part's mode is not what it was"
    assert all(v.equal(before[k]) for k, v in model.state_dict().items()), "looking moved a weight"
    assert all(p.grad is None and p.requires_grad for p in model.parameters()), "looking left gradients"


def test_modes_come_back_after_an_error():
    net, part = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()), []

    def broken():
        with eval_mode(net):
            part.extend(m.training for m in net.modules())
            raise RuntimeError("within")

    net[1].eval()
    with pytest.raises(RuntimeError, match="within"):
        broken()
    assert part == [False] * 3, "eval mode within"
    assert [m.training for m in net.modules()] == [True, True, False], "an error within left eval mode on"
