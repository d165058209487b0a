"""baseline_ar.py: the causal transformer and its cache, and what all baselines share: training, files, drawing."""

from collections import deque
from dataclasses import replace

import pytest
import torch
from conftest import parameter_counts

from minimuse import cli, cli_commands
from minimuse.baseline_ar import (
    Autoregressive,
    CausalTransformer,
    LowRes,
    NextTokenLoss,
    cached,
    train_ar,
)
from minimuse.baseline_dit import Diffusion
from minimuse.cfg import guided, null_text
from minimuse.config import PRESETS, StageConfig, preset
from minimuse.muse import Muse
from minimuse.sampler import decode
from minimuse.text import Context
from minimuse.train import train_muse
from minimuse.train_doctor import examine
from minimuse.train_engine import Engine
from minimuse.train_log import likelihood_bound
from minimuse.transformer import TransformerConfig

V, D_LM = 8, 6
CONFIG = TransformerConfig(codebook_size=V, grid=4, text_width=D_LM, width=32, layers=2, heads=2, mlp_width=64)
STAGE = StageConfig(steps=80, batch=16, learning_rate=5e-3, warmup=5, weight_decay=0.01)
MODELS = {make.model: make for make in (LowRes, Autoregressive, Diffusion)}
A = "a red cube"


@pytest.fixture(scope="module")
def made(tiny_muse):
    """{"masked" | "ar" | "dit": a baseline over tiny_muse's low tokenizer, random weights with nothing at zero}."""
    models = {}
    for name, make in MODELS.items():
        config = make.configure(tiny_muse.config)
        torch.manual_seed(0)
        parts = make.build(config).eval()
        parts["low_tokenizer"].load_state_dict(tiny_muse.low_tokenizer.state_dict())
        for p in parts["base"].parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
        models[name] = make(config, parts, tiny_muse.encoder, examples=tiny_muse.examples)
    return models


def causal():
    torch.manual_seed(0)
    return CausalTransformer(CONFIG)


def prompts(batch):
    torch.manual_seed(1)
    return Context(torch.randn(batch, 5, D_LM), torch.ones(batch, 5, dtype=torch.bool))


# --- the causal transformer -------------------------------------------------------------------------------------------


def test_a_place_sees_the_tokens_before_it_and_no_others():
    model = causal().eval()
    memory, tokens = model.memory(prompts(1)), torch.zeros(1, 16, dtype=torch.long)
    before = model(tokens, memory)
    for place in range(16):
        moved = (model(tokens.index_fill(1, torch.tensor(place), 1), memory) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [i > place for i in range(16)], f"token {place} moves {moved.nonzero().flatten()}"


@pytest.mark.parametrize("guidance", [0.0, 2.0, (0.0, 3.0)])
def test_cache_and_full_pass_draw_the_same_tokens(guidance):
    model = causal().eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    text = prompts(3)
    memories = model.memory(text), model.memory(null_text(text))
    drawn = []
    for make in (guided, cached):
        how = {"mask_id": V, "steps": 16, "order": "raster", "generator": torch.Generator().manual_seed(1)}
        with torch.inference_mode():
            *steps, last = decode(make(model, *memories, guidance), torch.full((3, 16), V), **how)
        assert [int(s.masked[0].sum()) for s in (*steps, last)] == list(range(15, -1, -1)), "one token a step"
        drawn.append(last.tokens)
    assert drawn[0].equal(drawn[1]), "the cache changes what is drawn"
    assert len(drawn[0].unique()) > 3, "the test always draws the same token"


def test_the_cache_gives_the_logits_of_the_full_pass():
    model, tokens = causal().eval(), torch.randint(V, (2, 16))
    memory, cache = model.memory(prompts(2)), [[] for _ in range(2)]
    full = model(tokens, memory)
    places = [model(tokens, memory, cache) for _ in range(16)]
    assert torch.allclose(torch.cat(places, 1), full, atol=1e-5)


@pytest.mark.parametrize("how", [{"order": "halton"}, {"order": "raster", "steps": 4}])
def test_the_cache_refuses_any_other_order(how):
    model = causal().eval()
    memory = model.memory(prompts(1))
    with torch.inference_mode(), pytest.raises(ValueError, match="one token a step, in raster order"):
        list(decode(cached(model, memory, memory, 0.0), torch.full((1, 16), V), **{"mask_id": V, "steps": 16} | how))


def test_the_loss_is_the_likelihood():
    """-log p by the chain rule, place by place, from nothing but the tokens before."""
    model, x = causal().eval(), torch.randint(V, (2, 16))
    text = prompts(2)
    memory, total = model.memory(text), 0.0
    for i in range(16):
        seen = torch.cat([x[:, :i], torch.full((2, 16 - i), V)], 1)
        total -= model(seen, memory)[:, i].log_softmax(-1).gather(1, x[:, i : i + 1]).sum()
    assert NextTokenLoss(model)(x, text).item() == pytest.approx(total.item(), abs=1e-3)


def test_training_learns_what_the_text_says():
    codes = torch.arange(32) % 4
    words = 3 * torch.randn(4, 3, D_LM, generator=torch.Generator().manual_seed(0))
    model, tokens = causal(), codes[:, None].expand(-1, 16).contiguous()
    engine = Engine(device="cpu", bf16=False)
    *_, p = train_ar(model, STAGE, tokens, [[words[c]] for c in codes.tolist()], engine=engine)
    assert p.metrics["loss"] < 0.4, "the text says every token, except where it is removed"
    text = Context(words, torch.ones(4, 3, dtype=torch.bool))
    logits_fn = cached(model, model.memory(text), model.memory(null_text(text)), 1.0)
    with torch.inference_mode():
        *_, last = decode(logits_fn, torch.full((4, 16), V), mask_id=V, steps=16, order="raster")
    assert (last.tokens == torch.arange(4)[:, None]).float().mean() > 0.95


def test_multi_axis_attention_is_refused():
    with pytest.raises(ValueError, match="give block=0"):
        CausalTransformer(replace(CONFIG, block=2))


def test_masked_bound_and_likelihood_agree_where_tokens_are_independent():
    """For a model that knows only the histogram, the masked model's bound is tight: both are the entropy."""
    x = torch.randint(V, (64, 16), generator=torch.Generator().manual_seed(0))
    p = torch.bincount(x.flatten(), minlength=V) / x.numel()

    def histogram(tokens):
        return p.log().expand(*tokens.shape, V)

    nll = -p.log()[x].mean()
    assert likelihood_bound(histogram, x.repeat(40, 1), V).mean().item() == pytest.approx(nll.item(), abs=0.01)


# --- what all baselines share -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_all_have_about_as_many_parameters_as_the_base(name):
    base = parameter_counts(preset(name))["base"]
    for model, make in MODELS.items():
        with torch.device("meta"):
            parts = make.build(make.configure(preset(name)))
        assert parts.keys() == {"low_tokenizer", "base"}
        size = sum(p.numel() for p in parts["base"].parameters())
        assert abs(size / base - 1) < 0.08, f"{model}: {size} parameters, the base model {base}"


def test_a_foreign_tokenizer_is_refused():
    with pytest.raises(ValueError, match="low_tokenizer_from is 'amused/amused-256'"):
        Diffusion.configure(replace(preset("paper_632m"), low_tokenizer_from="amused/amused-256"))


@pytest.mark.parametrize("model", MODELS)
def test_each_draws_low_resolution_pictures(made, model):
    muse = made[model]
    steps = []
    images = muse.generate([A, "a blue ball"], n=2, seed=3, callback=steps.append)
    assert [i.size for i in images] == [(muse.config.low_tokenizer.image_size,) * 2] * 4
    assert len(steps) == (64 if model == "ar" else muse.config.base_sampling.steps)
    assert not steps[-1].masked.any()
    alone = muse.generate("a blue ball", seed=5)[0]  # the third picture by itself
    assert alone.tobytes() == images[2].tobytes(), "a picture depends on its neighbours (pitfall 17)"
    assert muse.generate(A, seed=3, guidance=0.0)[0].tobytes() != images[0].tobytes(), "guidance does nothing"
    assert muse.generate(A, seed=3, negative_prompt="a blue ball")[0].tobytes() != images[0].tobytes()
    assert images[0].info["minimuse"]["model"] == muse.config.name


@pytest.mark.parametrize("model", MODELS)
def test_save_and_load(made, model, tmp_path):
    folder = made[model].save_pretrained(tmp_path / model)
    again = cli_commands.open_model(folder, device="cpu")
    assert type(again) is MODELS[model]
    assert again.config == made[model].config
    assert again.generate(A, seed=1)[0].tobytes() == made[model].generate(A, seed=1)[0].tobytes()
    assert f"(minimuse-{model}-1)" in (folder / "README.md").read_text(encoding="utf-8"), "the card says what it is"
    with pytest.raises(
        ValueError, match=rf"another kind of model.*load it with minimuse\.baseline_.*{type(again).__name__}"
    ):
        Muse.from_pretrained(folder)
    other = MODELS["masked" if model != "masked" else "ar"]
    with pytest.raises(ValueError, match=f"'minimuse-{model}-1', expected 'minimuse-{other.model}-1'"):
        other.from_pretrained(folder)
    with pytest.raises(FileExistsError, match="already holds"):
        made[model].save_pretrained(folder)


def test_settings_that_a_baseline_does_not_have_are_refused(made):
    with pytest.raises(TypeError, match="tiny-ar has no setting steps; it has guidance, sampling_temperature, top_k"):
        made["ar"].generate(A, steps=4)
    with pytest.raises(TypeError, match="tiny-dit has no setting order, top_k; it has guidance, steps"):
        made["dit"].generate(A, order="halton", top_k=3)
    assert made["masked"].generate(A, order="halton", steps=4, seed=0), "the base model has all of Muse's"
    with pytest.raises(TypeError, match="tiny-dit is a dit baseline: it only generates"):
        made["dit"].edit(None, A)


def test_the_base_model_alone_is_the_first_half_of_muse(tiny_muse):
    parts = torch.nn.ModuleDict({k: tiny_muse.parts[k] for k in ("low_tokenizer", "base")})
    alone = LowRes(LowRes.configure(tiny_muse.config), parts, tiny_muse.encoder)
    *_, low = (s for s in tiny_muse.steps(A, seed=7) if s.stage == "base")
    *_, last = alone.steps(A, seed=7)
    assert last.tokens.equal(low.tokens)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_trains_saves_and_draws(model, tiny_muse, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", lambda: tiny_muse.config)
    folder = tmp_path / model
    words = ["train", "tiny", "--model", model, "--out", str(folder), "--device", "cpu"]
    assert cli.main([*words, "--set", "stages.base.eval_every=2"]) == 0, capsys.readouterr().err
    assert {"low_tokenizer", "base"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "superres").exists(), "only the low-resolution stages"
    assert (folder / "samples" / "base-0000002.png").is_file(), "samples of what it draws"
    assert isinstance(cli_commands.open_model(folder, device="cpu"), MODELS[model])
    picture = str(tmp_path / "a.png")
    assert cli.main(["generate", A, "--model", str(folder), "--out", picture, "--film", "--device", "cpu"]) == 0
    assert cli.main(["info", str(folder)]) == 0
    assert "base" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--out", str(folder)]) == 2, "it is finished"
    stages = {finding.stage for finding in examine(folder, device="cpu")}
    assert stages == ({"low_tokenizer", "base"} if model == "masked" else {"low_tokenizer"})
    assert cli.main([*words, "--dry-run"]) == 2
    assert "counts a whole Muse" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["ar", "dit"])
def test_a_stopped_run_continues_to_the_same_weights(model, tiny_muse, tmp_path):
    make = MODELS[model]
    config = make.configure(tiny_muse.config)
    longer = replace(config.stages["base"], steps=6, save_every=3, eval_every=100)
    config = replace(config, stages=config.stages | {"base": longer})
    ends = []
    for folder, stop in (("whole", None), ("stopped", 4)):
        for _ in range(1 if stop is None else 2):
            engine = Engine(device="cpu", bf16=False, folder=tmp_path / folder)
            for p in train_muse(config, engine=engine, stages=make.stages):
                if p.stage == "base" and p.step == stop and p.metrics:
                    stop = None
                    break
        ends.append(p.model.base.state_dict())
    assert all(a.equal(b) for a, b in zip(ends[0].values(), ends[1].values(), strict=True))


def test_micro_batches_make_the_same_gradient():
    """Pitfall 22, for the next-token loss."""
    words = torch.randn(32, 3, D_LM, generator=torch.Generator().manual_seed(0))
    tokens, ends = torch.randint(V, (32, 16), generator=torch.Generator().manual_seed(3)), []
    for accumulate in (1, 4):
        model, engine = causal(), Engine(device="cpu", bf16=False, accumulate=accumulate)
        deque(train_ar(model, replace(STAGE, steps=3), tokens, [[w] for w in words], engine=engine), maxlen=0)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-5)
