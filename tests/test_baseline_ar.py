"""baseline_ar.py: autoregression, diffusion and the base model alone in the low-resolution stage, trained, saved, drawn."""

from collections import deque
from dataclasses import replace

import pytest
import torch

from minimuse import cli
from minimuse.baseline_ar import KNOWN, LowRes, cached
from minimuse.baseline_dit import DiT, ddim, gaussians
from minimuse.cfg import guided, null_text
from minimuse.config import RIVALS, StageConfig, from_dict, preset, rival, to_dict
from minimuse.masking import likelihood_bound
from minimuse.muse import Muse, build, parameter_counts
from minimuse.sampler import decode
from minimuse.text import Context
from minimuse.train import NextLoss, train_dit, train_muse, train_transformer
from minimuse.train_engine import Engine
from minimuse.transformer import Transformer, TransformerConfig

V, D_LM = 8, 6
SIZES = {"codebook_size": V, "grid": 4, "text_width": D_LM, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
STAGE = StageConfig(steps=80, batch=16, learning_rate=5e-3, warmup=5, weight_decay=0.01)
A = "a red cube"


@pytest.fixture(scope="module")
def made(tiny_muse):
    """{"masked" | "ar" | "dit": a LowRes over tiny_muse's low tokenizer, random weights with nothing at zero}."""
    drawn = {}
    for model in RIVALS:
        config = rival(tiny_muse.config, model)
        torch.manual_seed(0)
        parts = build(config)
        parts["low_tokenizer"].load_state_dict(tiny_muse.low_tokenizer.state_dict())
        for p in parts["base"].parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
        drawn[model] = LowRes(config, parts, tiny_muse.encoder, words=tiny_muse.words, examples=tiny_muse.examples)
    return drawn


def causal(seed=0):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(**SIZES, causal=True))


def engine():
    return Engine(device="cpu", bf16=False)


def told(n=32):
    """Codes 0..3 all over the grid or the latents, and the code's own embedding as caption."""
    codes = torch.arange(n) % 4
    words = 3 * torch.randn(4, 3, D_LM, generator=torch.Generator().manual_seed(0))
    return codes, [[words[c]] for c in codes.tolist()], words


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nano", "toy", "paper_632m", "paper_3b"])
def test_rivals_are_of_one_size(name):
    sizes = {model: parameter_counts(rival(preset(name), model)) for model in RIVALS}
    assert all(s.keys() == {"low_tokenizer", "base"} for s in sizes.values())
    base = parameter_counts(preset(name))["base"]
    for model, size in sizes.items():
        assert abs(size["base"] / base - 1) < 0.08, f"{model}: {size['base']} parameters, the base model {base}"


def test_a_rivals_configuration_survives_json_and_is_checked():
    for model in RIVALS:
        config = rival(preset("nano"), model)
        assert from_dict(to_dict(config)) == config
    with pytest.raises(ValueError, match="unknown model 'gan'; known: muse, masked, ar, dit"):
        rival(preset("nano"), "gan")
    with pytest.raises(ValueError, match="causal"):
        replace(preset("nano"), model="ar")
    with pytest.raises(ValueError, match="low_tokenizer_from"):
        rival(replace(preset("paper_632m"), low_tokenizer_from="amused/amused-256"), "dit")


# --- autoregression ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 2.0, (0.0, 3.0)])
def test_cached_and_uncached_draw_the_same_tokens(guidance):
    model = causal().eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    text = Context(torch.randn(3, 5, D_LM), torch.ones(3, 5, dtype=torch.bool))
    memories = model.memory(text), model.memory(null_text(text))
    drawn = []
    for start in (guided, cached):
        how = {"mask_id": V, "steps": 16, "order": "raster", "generator": torch.Generator().manual_seed(1)}
        with torch.inference_mode():
            *steps, last = decode(start(model, *memories, guidance), torch.full((3, 16), V), **how)
        assert [int(s.masked[0].sum()) for s in (*steps, last)] == list(range(15, -1, -1)), "one token a step"
        drawn.append(last.tokens)
    assert drawn[0].equal(drawn[1]), "a cache changes what is drawn"
    assert len(drawn[0].unique()) > 3, "the test draws always the same"


def test_a_causal_models_loss_is_its_likelihood():
    """Asked for every token with nothing hidden: -log p by the chain rule, whatever the mask for the bound says."""
    model, x = causal().eval(), torch.randint(V, (2, 16))
    text = Context(torch.randn(2, 5, D_LM), torch.ones(2, 5, dtype=torch.bool))
    every = torch.ones_like(x, dtype=torch.bool)
    loss, _ = NextLoss(model)(x, every, text, None, 32)
    memory, total = model.memory(text), 0.0
    for i in range(16):
        seen = torch.cat([x[:, :i], torch.full((2, 16 - i), V)], 1)  # the rest is not there yet
        total -= model(seen, memory)[:, i].log_softmax(-1).gather(1, x[:, i : i + 1]).sum()
    assert loss.item() == pytest.approx(total.item() / 32, abs=1e-5)


def test_autoregression_learns_what_the_text_tells():
    codes, texts, words = told()
    tokens = codes[:, None].expand(-1, 16).contiguous()
    model = causal()
    *_, p = train_transformer(model, STAGE, tokens, texts, engine=engine())
    assert p.metrics["loss"] < 0.4, "the text tells every token, but for the tenth whose text is removed"
    text = Context(words, torch.ones(4, 3, dtype=torch.bool))
    logits_fn = cached(model, model.memory(text), model.memory(null_text(text)), 1.0)
    with torch.inference_mode():
        *_, last = decode(logits_fn, torch.full((4, 16), V), mask_id=V, steps=16, order="raster")
    assert (last.tokens == torch.arange(4)[:, None]).float().mean() > 0.95


def test_masked_bound_and_likelihood_meet_where_tokens_are_independent():
    """A model that knows the histogram alone: the masked model's bound is then tight, and both are its entropy."""
    x = torch.randint(V, (64, 16), generator=torch.Generator().manual_seed(0))
    p = torch.bincount(x.flatten(), minlength=V) / x.numel()

    def histogram(tokens):
        return p.log().expand(*tokens.shape, V)

    nll = -p.log()[x].mean()
    assert likelihood_bound(histogram, x.repeat(40, 1), V).mean().item() == pytest.approx(nll.item(), abs=0.01)


# --- diffusion --------------------------------------------------------------------------------------------------------


def test_diffusion_learns_what_the_text_tells():
    codes, texts, words = told()
    patterns = 5 + 2 * torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    model = DiT(TransformerConfig(**SIZES, identity=True), 3)
    stage = replace(STAGE, steps=200, learning_rate=1e-2, optimizer="muon")
    losses = [p.metrics["loss"] for p in train_dit(model, stage, patterns[codes], texts, engine=engine())]
    assert losses[0] == pytest.approx(1, abs=0.1), "no noise predicted at first: its variance"
    assert sum(losses[-20:]) / 20 < 0.2
    assert torch.allclose(model.mean.flatten(), patterns.mean((0, 2, 3)), atol=1e-4), "the latents are standardized"

    text = Context(words, torch.ones(4, 3, dtype=torch.bool))
    noise_fn = guided(model, model.memory(text), model.memory(null_text(text)), 1.0)
    with torch.inference_mode():
        *_, last = ddim(noise_fn, gaussians(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)), steps=20)
    found = model.standardize(last.x, back=True).flatten(1)
    distances = torch.cdist(found, patterns.flatten(1))
    assert distances.argmin(1).tolist() == [0, 1, 2, 3], f"the text does not decide: {distances}"
    assert distances.diag().max() < 0.5 * distances[~torch.eye(4, dtype=torch.bool)].min(), f"{distances}"


def test_micro_batches_make_the_same_gradient():
    """Pitfall 22, for the noise loss."""
    _, texts, _ = told()
    z = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    ends = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = DiT(TransformerConfig(**SIZES, identity=True), 3)
        how = Engine(device="cpu", bf16=False, accumulate=accumulate)
        deque(train_dit(model, replace(STAGE, steps=3), z, texts, engine=how), maxlen=0)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-5)


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", RIVALS)
def test_each_draws_low_resolution_pictures(made, model):
    muse = made[model]
    seen = []
    images = muse.generate([A, "a blue ball"], n=2, seed=3, callback=seen.append)
    assert [i.size for i in images] == [(muse.config.low_tokenizer.image_size,) * 2] * 4
    assert len(seen) == (64 if model == "ar" else muse.config.base_sampling.steps)
    assert not seen[-1].masked.any()
    alone = muse.generate("a blue ball", seed=5)[0]  # the third picture by itself
    assert alone.tobytes() == images[2].tobytes(), "a picture depends on its neighbours (pitfall 17)"
    assert muse.generate(A, seed=3, guidance=0.0)[0].tobytes() != images[0].tobytes(), "guidance does nothing"
    assert images[0].info["minimuse"]["model"] == muse.config.name


@pytest.mark.parametrize("model", RIVALS)
def test_save_and_load(made, model, tmp_path, tiny_muse):
    folder = made[model].save_pretrained(tmp_path / model)
    again = Muse.from_pretrained(folder, device="cpu")
    assert isinstance(again, LowRes)
    assert again.config == made[model].config
    assert again.generate(A, seed=1)[0].tobytes() == made[model].generate(A, seed=1)[0].tobytes()
    assert f"({model})" in (folder / "README.md").read_text(encoding="utf-8"), "the card says what it is"


def test_what_means_nothing_to_a_model_is_refused(made):
    with pytest.raises(TypeError, match="steps means nothing to tiny-ar, which is told guidance"):
        made["ar"].generate(A, steps=4)
    with pytest.raises(TypeError, match="order, top_k means nothing to tiny-dit, which is told guidance, steps"):
        made["dit"].generate(A, order="halton", top_k=3)
    assert made["masked"].generate(A, order="halton", steps=4, seed=0), "the base model takes all that Muse does"
    with pytest.raises(TypeError, match="tiny-dit draws low-resolution pictures from text alone"):
        made["dit"].edit(None, A)
    assert KNOWN.keys() == set(RIVALS)


def test_the_base_model_alone_is_muses_first_half(made, tiny_muse):
    muse = LowRes(
        rival(tiny_muse.config, "masked"),
        torch.nn.ModuleDict({k: tiny_muse.parts[k] for k in ("low_tokenizer", "base")}),
        tiny_muse.encoder,
    )
    *_, low = (s for s in tiny_muse.steps(A, seed=7) if s.stage == "base")
    *_, alone = muse.steps(A, seed=7)
    assert alone.tokens.equal(low.tokens)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", RIVALS)
def test_a_run_trains_saves_and_draws(model, tiny_muse, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli_presets(), "tiny", lambda: tiny_muse.config)
    out = str(tmp_path / model)
    words = ["train", "tiny", "--model", model, "--out", out, "--device", "cpu", "--set", "stages.base.eval_every=2"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert {"low_tokenizer", "base"} <= {p.name for p in (tmp_path / model).iterdir()}
    assert not (tmp_path / model / "superres").exists(), "the low-resolution stage alone"
    assert (tmp_path / model / "samples" / "base-0000002.png").is_file(), "it shows what it draws"
    muse = Muse.from_pretrained(out, device="cpu")
    assert muse.config.model == model
    picture = str(tmp_path / "a.png")
    assert cli.main(["generate", A, "--model", out, "--out", picture, "--film", "--device", "cpu"]) == 0
    assert cli.main(["info", out]) == 0
    assert cli.main(["train", "--resume", "--out", out]) == 1, "it is finished"


def test_a_stopped_run_goes_on_to_the_same_weights(tiny_muse, tmp_path):
    """A diffusion's statistics, noise and steps follow from seed and step alone."""
    config = rival(tiny_muse.config, "dit")
    longer = replace(config.stages["base"], steps=6, save_every=3, eval_every=100)
    config = replace(config, stages=config.stages | {"base": longer})
    ends = []
    for folder, stop in (("whole", None), ("stopped", 4)):
        for _ in range(1 if stop is None else 2):
            how = Engine(device="cpu", bf16=False, folder=tmp_path / folder)
            for p in train_muse(config, engine=how):
                if p.stage == "base" and p.step == stop and p.metrics:
                    stop = None
                    break
        ends.append(p.model.base.state_dict())
    assert all(a.equal(b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


def cli_presets():
    from minimuse.config import PRESETS

    return PRESETS
