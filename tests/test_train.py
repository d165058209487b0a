"""train.py: the stages as generators, on sets so small that they are learnt in seconds (Muse 3)."""

import copy
import itertools
import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minimuse.config import StageConfig, preset
from minimuse.data_cache import tokenize_images
from minimuse.eval_metrics import feature_distance
from minimuse.eval_networks import SceneFeatures, perceptual_distance, train_features
from minimuse.masking import masked_cross_entropy
from minimuse.text import pad_contexts
from minimuse.train import (
    MaskedLoss,
    MuseTrainer,
    random_crop,
    train_muse,
    train_tokenizer,
    train_transformer,
)
from minimuse.train_engine import Engine, Stage, batch_indices, learning_rate
from minimuse.transformer import SuperRes, Transformer, TransformerConfig
from minimuse.vqgan import VQGAN, VQGANConfig
from minimuse.vqgan_loss import VQGANLoss

OFF = settings(deadline=None, max_examples=40, derandomize=True)
V, D_LM = 8, 6
VQ = VQGANConfig(
    image_size=16,
    codebook_size=16,
    code_dim=4,
    width=16,
    multipliers=(1, 2),
    blocks=(0, 1),
    decoder_width=16,
    decoder_blocks=(0, 1),
)
SIZES = {"codebook_size": V, "text_width": D_LM, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
PIXELS = StageConfig(
    steps=60, batch=8, learning_rate=5e-3, warmup=3, weight_decay=1e-4, betas=(0.9, 0.99), adversarial_weight=0.0
)
MASKED = StageConfig(steps=80, batch=16, learning_rate=5e-3, warmup=5, weight_decay=0.01)


def transformer(seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**SIZES, grid=4))


def superres(seed=0):
    torch.manual_seed(seed)
    return SuperRes(TransformerConfig(**SIZES, grid=4, block=2, low_layers=1, low_grid=2, low_codebook_size=4))


def vqgan(seed=0):
    torch.manual_seed(seed)
    return VQGAN(VQ)


def plain_images(n=24):
    """uint8 pictures of one color each."""
    colors = torch.randint(0, 256, (n, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    return colors.expand(n, 3, 16, 16).to(torch.uint8)


def told(n=32):
    """Tokens that the text tells: code c all over the grid, and c's own embedding as caption."""
    codes = torch.arange(n) % 4
    words = 3 * torch.randn(4, 3, D_LM, generator=torch.Generator().manual_seed(0))
    return codes[:, None].expand(n, 16).contiguous(), [[words[c], words[c][:2]] for c in codes.tolist()]


def fp32(seed=0):
    return Engine(seed=seed, bf16=False)


def same(a, b):
    return all(v.equal(w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- batches, rates, crops --------------------------------------------------------------------------------------------


@given(n=st.integers(1, 60), batch=st.integers(1, 70), seed=st.integers(0, 1000))
@OFF
def test_each_epoch_is_a_permutation(n, batch, seed):
    steps = math.ceil(3 * n / batch)
    seen = torch.cat([batch_indices(n, batch, step, seed) for step in range(steps)])[: 3 * n]
    for epoch in seen.view(3, n):
        assert epoch.sort().values.equal(torch.arange(n)), "an example is left out, or comes twice in an epoch"


def test_batches_follow_from_seed_and_step_alone():
    a = [batch_indices(100, 30, step, 7) for step in (5, 0, 3)]
    torch.manual_seed(99)
    b = {step: batch_indices(100, 30, step, 7) for step in (0, 3, 5)}
    assert all(x.equal(b[step]) for x, step in zip(a, (5, 0, 3), strict=True)), "the order of asking matters"
    assert not batch_indices(100, 30, 0, 8).equal(b[0]), "another seed, the same batch"
    epochs = [batch_indices(100, 100, step, 7) for step in (0, 1)]
    assert not epochs[0].equal(epochs[1]), "every epoch has the same order"


def test_learning_rate_by_hand():
    config = StageConfig(steps=110, batch=1, learning_rate=2.0, warmup=10, weight_decay=0.0)
    rates = [learning_rate(config, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]), "linear warm-up, not from zero"
    assert rates[10] == 2.0, "then the peak"
    assert rates[60] == pytest.approx(1.0), "half of it half-way down the cosine"
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4)), "a cosine, not a line"
    assert rates[110] == pytest.approx(0, abs=1e-12), "nothing at the end"
    assert all(a > b for a, b in itertools.pairwise(rates[10:])), "it falls all the way"
    assert learning_rate(replace(config, warmup=0), 0) == 2.0, "without warm-up it starts at the peak"


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_optimizer_decays_matrices_alone_and_clips(optimizer):
    net = torch.nn.Linear(3, 3)
    net.bias.data.fill_(1.0)
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    net.register_parameter("frozen", frozen)
    config = StageConfig(
        steps=10, batch=1, learning_rate=0.1, warmup=0, weight_decay=0.5, optimizer=optimizer, betas=(0.9, 0.96)
    )
    stage = Stage(fp32(), "s", config, {"model": net})
    before = net.weight.detach().clone()
    stage.backward(0 * net(torch.ones(1, 3)).sum())
    stage.clip("model")
    stage.update(0)  # no gradient: all that moves is decay
    assert net.weight.allclose(0.95 * before, atol=1e-6), "matrices decay by rate * weight_decay"
    assert net.bias.equal(torch.ones(3)), "vectors do not"
    stage.backward(1e6 * net(torch.ones(1, 3)).sum())
    assert stage.clip("model").item() == pytest.approx(1e6 * 12**0.5), "the norm before it is clipped"
    stage.update(1)
    norm = torch.stack([p.grad.norm() for p in (net.weight, net.bias)]).norm().item()
    assert norm == pytest.approx(1.0, abs=1e-3), f"the gradient was clipped to {norm}"
    assert stage.optimizers["model"][0].param_groups[0]["lr"] == learning_rate(config, 1), "the rate of the step"
    assert frozen.equal(torch.ones(2)), "a frozen parameter moved"


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_the_text_projection_may_learn_more_slowly(optimizer):
    """One optimizer's groups with a share of the rate, which each step keeps; all weights still have a group."""
    model = Transformer(TransformerConfig(**SIZES, grid=4))
    config = StageConfig(10, 1, 0.1, 0, 0.5, optimizer, betas=(0.9, 0.96), text_lr_scale=0.1)
    stage = Stage(fp32(), "s", config, {"model": MaskedLoss(model)})
    groups = [group for o in stage.optimizers["model"] for group in o.param_groups]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}, (
        "some weight is left out"
    )
    stage.backward(sum(p.square().sum() for p in model.parameters()))
    stage.update(3)
    for group in groups:
        text = any(p is model.text.weight for p in group["params"])
        assert group["lr"] == pytest.approx(learning_rate(config, 3) * (0.1 if text else 1.0)), f"text: {text}"
        assert not text or len(group["params"]) == 1, "others learn slowly, too"


def test_random_crop():
    images = torch.arange(64).view(1, 1, 8, 8).expand(2, 3, 8, 8)
    g = torch.Generator().manual_seed(0)
    crops = [random_crop(images, 4, g) for _ in range(60)]
    assert all(c.shape == (2, 3, 4, 4) for c in crops), "a square of the size asked for"
    corners = {c[0, 0, 0, 0].item() for c in crops}
    assert corners <= {8 * y + x for y in range(5) for x in range(5)}, "a crop hangs over the edge"
    assert {c // 8 for c in corners} == {c % 8 for c in corners} == set(range(5)), "every row and column is reached"
    whole = crops[0] - crops[0][:, :, :1, :1]
    assert whole[0, 0].equal(images[0, 0, :4, :4]), "a crop is a piece in one piece"
    for size in (0, 8, 20):
        assert random_crop(images, size, g).equal(images), f"size {size} keeps the images whole"


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_learns():
    trace = list(train_tokenizer(vqgan(), PIXELS, plain_images(), engine=fp32()))
    first, last = trace[0].metrics, trace[-1].metrics
    assert last["l1"] < 0.4, f"gray costs 0.5 on such colors; l1 went from {first['l1']:.3f} to {last['l1']:.3f}"
    assert last["psnr"] > first["psnr"], "and the signal rises"
    assert [p.step for p in trace] == list(range(1, 61)), "a Progress a step"
    assert {(p.stage, p.steps) for p in trace} == {("tokenizer", 60)}, "which says what it is"
    assert all(math.isfinite(x) for p in trace for x in p.metrics.values()), "finite figures"


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.1])
def test_pitfall_28_a_tokenizer_step_is_the_same_however_it_is_split(adversarial_weight):
    """Gradients, restarted codes and metrics: one lambda and one restart a step, not one a micro-batch."""
    made = []
    for accumulate in (1, 2, 4):
        config = replace(PIXELS, steps=1, crop=8, adversarial_weight=adversarial_weight)
        (p,) = train_tokenizer(vqgan(), config, plain_images(), engine=Engine(bf16=False, accumulate=accumulate))
        made.append(({name: q.grad for name, q in p.model.named_parameters()}, p.model.codebook, p.metrics))
    for gradients, codebook, metrics in made[1:]:
        assert metrics == pytest.approx(made[0][2], rel=1e-4), "other metrics"
        torch.testing.assert_close(codebook, made[0][1], atol=1e-4, rtol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, made[0][0][name], atol=1e-6, rtol=1e-3, msg=lambda m, n=name: n + m)


def test_the_discriminator_has_the_width_of_the_stage(monkeypatch):
    made = []
    monkeypatch.setattr("minimuse.train.VQGANLoss", lambda *args: made.append(VQGANLoss(*args)) or made[0])
    config = replace(PIXELS, steps=1, adversarial_weight=0.1, discriminator_width=24)
    list(train_tokenizer(vqgan(), config, plain_images(), engine=fp32()))
    assert made[0].discriminator[0][0].out_channels == 24


def test_each_stage_has_its_own_perceptual_loss(tiny_muse, monkeypatch, tmp_path):
    """No network is made that no stage weighs. Without its extra, LPIPS is refused by name."""
    monkeypatch.setattr("minimuse.eval_networks.lpips_distance", lambda: "lpips")
    asked = {"low_tokenizer": ("lpips", 1.0), "high_tokenizer": ("none", 1.0), "decoder": ("scenes", 0.0)}
    stages = {
        name: replace(tiny_muse.config.stages[name], perceptual=kind, perceptual_weight=weight)
        for name, (kind, weight) in asked.items()
    }
    trainer = MuseTrainer(replace(tiny_muse.config, stages=stages), "scenes", fp32(), tmp_path)
    assert trainer.perceptual == {"lpips": "lpips"}
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match=r"minimuse\[lpips\]"):
        perceptual_distance("lpips", 32)
    monkeypatch.setattr(
        "minimuse.eval_networks.train_features", lambda images, labels, seed: SceneFeatures(labels.shape[1])
    )
    features = perceptual_distance("scenes", 32, n=8)
    assert features(torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)) > 0


def test_features_of_scenes_depend_on_the_seed_only(monkeypatch):
    """A resumed run trains them again, and goes on with the same weights."""
    pair, steps = (torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)), partial(train_features, steps=3)
    monkeypatch.setattr("minimuse.eval_networks.train_features", steps)
    found = []
    for seed in (3, 3, 4):
        torch.rand(seed + len(found))  # whatever the process has drawn before
        found.append(perceptual_distance("scenes", 32, seed=seed, n=16)(*pair).item())
    assert found[0] == found[1] != found[2]


def test_a_batch_that_does_not_split_is_refused_before_images_are_read(tiny_muse):
    with pytest.raises(
        ValueError, match=r"low_tokenizer: a batch of .* does not split into 1 processes x 7 micro-batches"
    ):
        next(train_muse(tiny_muse.config, data=object(), engine=Engine(bf16=False, accumulate=7)))


def test_pitfall_19_usage_and_perplexity_are_reported():
    *_, last = train_tokenizer(vqgan(), replace(PIXELS, steps=8), plain_images(), engine=fp32())
    assert 0 < last.metrics["used"] <= 1, "share of the codes in use"
    assert 1 <= last.metrics["perplexity"] <= 16, "perplexity of their histogram"


def test_the_same_seed_makes_the_same_tokenizer():
    made = []
    for seed in (3, 3, 4):
        *_, last = train_tokenizer(vqgan(), replace(PIXELS, steps=4, crop=8), plain_images(), engine=fp32(seed))
        made.append(last.model)
    assert same(made[0], made[1]), "one seed, two tokenizers"
    assert not same(made[0], made[2]), "two seeds, one tokenizer"


def test_all_losses_at_once():
    config = replace(PIXELS, steps=5, adversarial_weight=0.1, adversarial_start=3)
    features = train_features(plain_images(), torch.rand(24, 2).round(), steps=2)
    trace = list(train_tokenizer(vqgan(), config, plain_images(), perceptual=feature_distance(features), engine=fp32()))
    assert ["discriminator_loss" in p.metrics for p in trace] == [False] * 3 + [True] * 2, (
        "the discriminator joins at its step"
    )


@pytest.mark.slow
def test_a_compiled_tokenizer_can_balance_its_losses(monkeypatch):
    """Their balance walks back through the compiled network twice more, which torch refuses unless it is told.

    It does so where a step before has walked back once: so the adversarial loss joins at the second. Of a decoder
    alone, since where codes restart a compiled network draws other ones.
    """
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="aot_eager"))  # no C++
    config, made = replace(PIXELS, steps=2, adversarial_weight=0.1, adversarial_start=1), []
    for how in ({}, {"compile": True}):
        torch.manual_seed(1)
        grown = vqgan().grow_decoder(replace(VQ, decoder_width=32, decoder_blocks=(1, 2)))
        trace = train_tokenizer(grown, config, plain_images(), engine=Engine(bf16=False, **how))
        made.append([p.metrics for p in trace])
    (first, second), (compiled, balanced) = made
    assert compiled == pytest.approx(first, rel=1e-4), "torch.compile computes something else"
    assert balanced == pytest.approx(second, rel=1e-2), "after a step, whose rounding Adam magnifies"


def test_fine_tuning_the_decoder_alone():
    """Muse 2.5, and pitfall 18: encoder and codebook are the same bits before and after."""
    *_, last = train_tokenizer(vqgan(), replace(PIXELS, steps=10), plain_images(), engine=fp32())
    small = last.model
    grown = small.grow_decoder(replace(VQ, decoder_width=32, decoder_blocks=(1, 2)))
    decoder = copy.deepcopy(grown.decoder)
    *_, tuned = train_tokenizer(grown, replace(PIXELS, steps=30), plain_images(), stage="decoder", engine=fp32())
    assert tuned.stage == "decoder", "the stage has its name"
    assert same(small.encoder, grown.encoder), "fine-tuning moved the encoder"
    assert same(small.quantizer, grown.quantizer), "fine-tuning moved the codebook"
    assert not same(decoder, grown.decoder), "the decoder learnt nothing"
    x = plain_images()
    assert tokenize_images(grown, x, bf16=False).equal(tokenize_images(small, x, bf16=False)), (
        "the token language changed"
    )


def test_tokenize_images():
    model, x = vqgan(), plain_images(10)
    tokens = tokenize_images(model, x, batch=3, bf16=False)
    assert tokens.shape == (10, 64), "(n, N)"
    assert tokens.equal(model.encode(x.float() / 127.5 - 1)), "uint8 pictures as the model's [-1, 1]"
    assert not model.training, "pitfall 18: a tokenizer at work is in eval mode"


def test_features_learn_what_is_there():
    images = torch.zeros(32, 3, 16, 16, dtype=torch.uint8)
    kinds = torch.rand(32, 2, generator=torch.Generator().manual_seed(0)).round()
    images[:, 0] = (255 * kinds[:, 0, None, None]).byte()
    images[:, 2] = (255 * kinds[:, 1, None, None]).byte()
    net = train_features(images, kinds, steps=40)
    right = ((net.classify(images.float() / 127.5 - 1) > 0) == kinds.bool()).float().mean()
    assert right == 1, f"it names {right:.0%} of what is there"
    assert not net.training, "pitfall 18: frozen, so in eval mode"
    assert not any(p.requires_grad for p in net.parameters()), "and without gradients"


# --- transformers -----------------------------------------------------------------------------------------------------


def test_a_transformer_learns_what_the_text_tells():
    tokens, texts = told()
    model = transformer()
    trace = list(train_transformer(model, MASKED, tokens, texts, engine=fp32()))
    first = sum(p.metrics["loss"] for p in trace[:10]) / 10
    last = sum(p.metrics["loss"] for p in trace[-10:]) / 10
    assert last < 0.5 * first, f"the loss falls from {first:.2f} to {last:.2f}"
    assert not model.training, "a trained model is in eval mode"
    blind = torch.full((4, 16), model.mask_id)
    memory = model.memory(pad_contexts([texts[c][0] for c in range(4)]))
    assert model(blind, memory).argmax(-1).equal(tokens[:4]), "of a blank grid the text alone tells the tokens"


def test_super_resolution_learns_what_the_low_tokens_tell():
    """Pitfall 1 in training: the text says nothing, the low-res tokens all."""
    codes = torch.arange(32) % 4
    tokens, low = codes[:, None].expand(32, 16).contiguous(), codes[:, None].expand(32, 4).contiguous()
    texts = [[torch.zeros(1, D_LM)]] * 32
    model = superres()
    trace = list(train_transformer(model, MASKED, tokens, texts, low_tokens=low, stage="superres", engine=fp32()))
    assert trace[-1].stage == "superres", "the stage has its name"
    assert trace[-1].metrics["accuracy"] > 0.9, f"accuracy {trace[-1].metrics['accuracy']:.0%}"
    context = pad_contexts([texts[0][0]] * 4)
    blind = torch.full((4, 16), model.mask_id)
    assert model(blind, model.memory(context, low[:4])).argmax(-1).equal(tokens[:4]), (
        "the low tokens tell the high ones"
    )


def test_super_resolution_learns_what_the_draft_tells():
    """The low tokens say nothing; the draft, made from them by a function, says all."""
    low = torch.arange(32)[:, None].expand(32, 4) % 4
    tokens = torch.randint(4, (4, 16), generator=torch.Generator().manual_seed(0))[low[:, 0]]
    table = tokens[:4].clone()
    model = SuperRes(replace(superres().config, draft=True))
    how = {"low_tokens": low, "draft": lambda low: table[low[:, 0]], "stage": "superres", "engine": fp32()}
    trace = list(train_transformer(model, MASKED, tokens, [[torch.zeros(1, D_LM)]] * 32, **how))
    assert trace[-1].metrics["accuracy"] > 0.9, f"accuracy {trace[-1].metrics['accuracy']:.0%}"


class Spy(torch.nn.Module):
    """Keeps what a training step shows a transformer."""

    mask_id = V

    def __init__(self):
        super().__init__()
        self.bias, self.tokens, self.contexts, self.low = torch.nn.Parameter(torch.zeros(V)), [], [], []

    def memory(self, context, *low):
        self.contexts.append(context)
        self.low += low

    def forward(self, tokens, memory):
        self.tokens.append(tokens)
        return self.bias.expand(*tokens.shape, V)


def spied(texts=None, n=400, steps=5, **kwargs):
    torch.manual_seed(1)
    spy, tokens = Spy(), torch.randint(V, (n, 16))
    texts = texts or [[torch.randn(3, D_LM)] for _ in range(n)]
    trace = list(
        train_transformer(spy, replace(MASKED, steps=steps, batch=200), tokens, texts, engine=fp32(), **kwargs)
    )
    return spy, tokens, trace


def test_pitfall_03_a_tenth_of_the_texts_is_dropped():
    spy, *_ = spied(steps=15)
    gone = torch.cat([c.embeds.eq(0).all(2).all(1) for c in spy.contexts])
    assert gone.float().mean().item() == pytest.approx(0.1, abs=0.02), "Muse 2.7: 10% without text"
    attended = torch.cat([c.mask.sum(1) for c in spy.contexts])
    assert attended[gone].eq(0).all(), "removed text has no text token"
    assert attended[~gone].eq(3).all(), "all other texts are whole"


def test_pitfall_04_05_masks_of_a_training_step():
    spy, tokens, _ = spied()
    rates = torch.stack([(x == V).float().mean(1) for x in spy.tokens])
    assert rates.mean().item() == pytest.approx(2 / math.pi + 1 / 32, abs=0.03), "2 / pi, rounded up to whole tokens"
    assert all(len(row.unique()) > 10 for row in rates), "one rate an example, not one a batch"
    assert rates.min() > 0, "an example with nothing masked teaches nothing"
    first = tokens[batch_indices(400, 200, 0, 0)]
    shown = spy.tokens[0]
    assert shown[shown != V].equal(first[shown != V]), "what is not masked is shown as it is"
    assert not spy.tokens[0].eq(V).equal(spy.tokens[1].eq(V)), "every step has masks of its own"


def test_pitfall_07_training_hides_what_it_asks_for(monkeypatch):
    """The loss gets the true tokens and the very mask under which the model saw [MASK]."""
    asked = []

    def record(logits, targets, masked, smoothing=0.0, count=None):
        asked.append((targets, masked, smoothing))
        assert count == masked.sum(), "the whole batch is one part, so its own tokens are all that count"
        return masked_cross_entropy(logits, targets, masked, smoothing, count)

    monkeypatch.setattr("minimuse.train.masked_cross_entropy", record)
    spy, tokens, trace = spied(steps=2)
    for shown, (targets, masked, _), step in zip(spy.tokens, asked, (0, 1), strict=True):
        assert masked.equal(shown == V), "a token is asked for that the model sees"
        assert targets.equal(tokens[batch_indices(400, 200, step, 0)]), "the targets are not the true tokens"
    assert trace[0].metrics["loss"] == pytest.approx(math.log(V), rel=1e-4), "a flat guess costs log V"


def test_every_caption_of_an_example_is_used():
    texts = [[torch.full((1 + c, D_LM), 10.0 * i + c + 1) for c in range(3)] for i in range(4)]
    spy, *_ = spied(texts, n=4, steps=2)
    for step, context in enumerate(spy.contexts):
        at = batch_indices(4, 200, step, 0)
        for i, row, mask in zip(at.tolist(), context.embeds, context.mask, strict=True):
            if row.abs().sum() > 0:
                value, length = row[0, 0].item(), mask.sum().item()
                assert value == 10.0 * i + length, f"example {i} reads a caption of another"
    lengths = torch.cat([c.mask.sum(1) for c in spy.contexts]).bincount(minlength=4)
    assert lengths[1:].min() > 80, f"captions of lengths 1, 2, 3 come up {lengths[1:].tolist()} times"


def test_low_tokens_belong_to_their_image():
    low = torch.arange(400)[:, None].expand(400, 4)
    spy, *_ = spied(low_tokens=low, steps=2)
    for step, shown in enumerate(spy.low):
        assert shown[:, 0].equal(batch_indices(400, 200, step, 0)), "an image trains with another's low-res tokens"


def test_the_same_seed_makes_the_same_transformer():
    tokens, texts = told()
    made = []
    for seed in (3, 3, 4):
        model = transformer()
        *_, _ = train_transformer(model, replace(MASKED, steps=4), tokens, texts, engine=fp32(seed))
        made.append(model)
    assert same(made[0], made[1]), "one seed, two models"
    assert not same(made[0], made[2]), "two seeds, one model"


def test_a_stage_may_be_stopped_and_watched():
    tokens, texts = told()
    model = transformer()
    before = copy.deepcopy(model)
    stage = train_transformer(model, MASKED, tokens, texts, engine=fp32())
    assert same(before, model), "nothing happens before the first step is asked for"
    progress = next(stage)
    assert progress.model is model, "the model itself, to be looked at"
    assert (progress.step, progress.steps) == (1, 80), "a step done of all"
    assert not same(before, model), "the first step changed nothing"
    stage.close()


def test_bf16_and_label_smoothing_train_too():
    tokens, texts = told()
    config = replace(MASKED, steps=3, label_smoothing=0.1)
    model = transformer()
    trace = list(train_transformer(model, config, tokens, texts, engine=Engine(bf16=True)))
    assert all(math.isfinite(p.metrics["loss"]) for p in trace), "bf16 products, finite losses"
    assert all(p.dtype == torch.float32 for p in model.parameters()), "weights stay fp32"


def test_pitfall_22_accumulation_gives_one_batchs_gradient():
    """Sums over micro-batches, divided by the number of masked tokens of all: the gradient of the whole batch."""
    tokens, texts = told(12)
    model, masked = transformer().eval(), torch.rand(12, 16) < torch.linspace(0.05, 1, 12)[:, None]

    def loss(at):
        memory = model.memory(pad_contexts([texts[i][0] for i in range(*at.indices(12))]))
        return masked_cross_entropy(
            model(tokens[at].masked_fill(masked[at], model.mask_id), memory), tokens[at], masked[at]
        )

    parameters = list(model.parameters())
    whole = torch.autograd.grad(loss(slice(0, 12)), parameters)
    parts = [slice(0, 2), slice(2, 7), slice(7, 12)]
    shares = [masked[at].sum() / masked.sum() for at in parts]
    summed = torch.autograd.grad(sum(s * loss(at) for s, at in zip(shares, parts, strict=True)), parameters)
    for a, b in zip(whole, summed, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3, msg=lambda m: f"accumulated gradients differ: {m}")


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", ["base", "superres"])
@pytest.mark.parametrize("name", ["paper_632m", "paper_3b"])
def test_one_step_at_the_papers_depth(name, part):
    """Every layer of the paper presets, 64 channels wide: a real step by their own optimizer, Adafactor."""
    whole = preset(name)
    wide = getattr(whole, part)
    config = replace(wide, width=64, heads=2, mlp_width=256, text_width=D_LM)
    torch.manual_seed(0)
    model = (Transformer if part == "base" else SuperRes)(config)
    assert len(model.layers) == wide.layers, "a layer is left out"
    before = copy.deepcopy(model)
    stage = replace(whole.stages[part], batch=2, warmup=0)  # 1 / 5000 of the rate moves no norm: fp32 has 7 digits
    assert stage.optimizer == "adafactor", "the paper's optimizer"
    tokens, low = torch.randint(config.codebook_size, (2, config.tokens)), None
    if part == "superres":
        low = torch.randint(config.low_codebook_size, (2, config.low_grid**2))
    texts = [[torch.randn(5, D_LM)]] * 2
    progress = next(train_transformer(model, stage, tokens, texts, low_tokens=low, engine=fp32()))
    assert progress.metrics["loss"] == pytest.approx(math.log(config.codebook_size), rel=0.1), "a flat guess, at first"
    moved = [not torch.equal(a, b) for a, b in zip(model.layers.parameters(), before.layers.parameters(), strict=True)]
    assert all(moved), f"{moved.count(False)} of {len(moved)} weights of the layers did not move"


@pytest.mark.slow
def test_a_users_own_folder_trains_with_mistakes_mixed_in(tiny_muse, tmp_path, caplog):
    folder = tmp_path / "mine"
    folder.mkdir()
    for i in range(20):
        Image.new(["RGB", "L", "RGBA"][i % 3], (90 + i, 70), 12 * i).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"picture {i} of mine", encoding="utf-8")
    (folder / "broken.png").write_bytes((folder / "00.png").read_bytes()[:60])
    (folder / "broken.txt").write_text("broken", encoding="utf-8")
    Image.new("RGB", (9, 9)).save(folder / "tiny.png")
    (folder / "tiny.txt").write_text("tiny", encoding="utf-8")
    Image.new("RGB", (80, 80)).save(folder / "silent.png")
    config = replace(tiny_muse.config, name="mine")
    with caplog.at_level("WARNING", "minimuse"):
        *_, last = train_muse(config, data=folder, engine=Engine(bf16=False, folder=tmp_path / "run"))
    told = " ".join(record.getMessage() for record in caplog.records)
    assert "left out 3 of 23 images" in told, f"what was left out is not told: {told}"
    assert {"picture", "mine"} <= set(last.model.words), "it knows the words of its captions"
    assert last.model.generate("picture 3 of mine", seed=0, steps=1)[0].size == (64, 64), "and draws"
