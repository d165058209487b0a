"""amused.py: diffusers' aMUSEd behind our interfaces. The oracle is diffusers itself, on tiny random models."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import scheduling_amused
from PIL import Image
from safetensors.torch import load_file

from minimuse import cli, lab_models
from minimuse.amused import Amused, VQTokenizer, _load, published_tokenizer, settings
from minimuse.data_cache import tokenize_images
from minimuse.eval_networks import ClipScorer
from minimuse.lab import compare
from minimuse.lab_models import AmusedEvaluator
from minimuse.muse import Muse
from minimuse.sampler import decode, draw
from minimuse.train import train_muse, train_transformer
from minimuse.train_engine import Engine
from minimuse.transformer import Transformer
from minimuse.utils import uniforms as draw_uniforms

V, GRID, F = 16, 8, 4
N, MASK = GRID * GRID, V + 1  # a vocabulary of V + 2: [MASK] is its last, and not one past the codebook
PROMPTS = ["a red cube", "two spheres"]


def make_vq(**changes):
    vq = diffusers.VQModel(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        **{"num_vq_embeddings": V, "lookup_from_codebook": True, "force_upcast": True} | changes,
    )
    torch.nn.init.normal_(vq.quantize.embedding.weight, std=0.3)  # near what the encoder says: many codes are in use
    return vq


def make_transformer(**changes):
    sizes = {
        "hidden_size": 16,
        "in_channels": 16,
        "block_out_channels": 16,
        "intermediate_size": 32,
        "sample_size": GRID,
    }
    heads = {"block_num_heads": 2, "num_attention_heads": 2, "num_res_blocks": 1, "num_hidden_layers": 2}
    text = {"encoder_hidden_size": 16, "cond_embed_dim": 12, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20}
    model = diffusers.UVit2DModel(**sizes, **heads, **text, **{"vocab_size": V + 2, "codebook_size": V} | changes)
    for name, p in model.named_parameters():
        if p.ndim > 1 and "mlm" not in name:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)  # at their own scale the text hardly matters
    return model


def make_clip():
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    ids = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 12, "num_hidden_layers": 3}
    config = transformers.CLIPTextConfig(vocab_size=len(vocab), num_attention_heads=2, **sizes, **ids)
    clip = transformers.CLIPTextModelWithProjection(config)
    torch.nn.init.normal_(clip.text_model.embeddings.token_embedding.weight)
    return clip.eval(), tokenizer


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    clip, tokenizer = make_clip()
    pipe = diffusers.AmusedPipeline(
        vqvae=make_vq().eval(),
        tokenizer=tokenizer,
        text_encoder=clip,
        transformer=make_transformer().eval(),
        scheduler=diffusers.AmusedScheduler(mask_token_id=MASK),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("amused")
    pipeline.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def amused(folder):
    return Amused.from_pretrained(folder)


def replaced(monkeypatch, uniforms):
    """diffusers' two random calls return our draws: uniforms (B, T, 2, N), a step at a time."""
    steps = iter(uniforms.unbind(1))
    now = SimpleNamespace(ranking=None)

    def multinomial(p, *args, **kwargs):
        value, now.ranking = next(steps).unbind(1)
        return draw(p.log().view(*value.shape, -1), value, 1.0).view(-1, 1)

    def gumbel(p, *args, **kwargs):
        return -torch.log(-torch.log(now.ranking))

    monkeypatch.setattr(scheduling_amused.torch, "multinomial", multinomial)
    monkeypatch.setattr(scheduling_amused, "gumbel_noise", gumbel)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_images_to_tokens_equal_diffusers(amused, pipeline):
    images = torch.rand(2, 3, 32, 16) * 2 - 1
    processor = VaeImageProcessor(do_normalize=False)  # as in aMUSEd's image-to-image
    unit = processor.preprocess(((images + 1) / 2).clamp(0, 1))
    latents = pipeline.vqvae.encode(unit).latents
    expected = pipeline.vqvae.quantize(latents)[2][2].view(2, -1)
    tokens = amused.tokenizer.encode(images)
    assert tokens.dtype == torch.long
    assert tokens.tolist() == expected.tolist()
    assert tokens.unique().numel() > 3, "a test over one code shows nothing"
    assert tokens.tolist() != pipeline.vqvae.quantize(pipeline.vqvae.encode(images).latents)[2][2].view(2, -1).tolist()


def test_tokens_to_pixels_equal_the_pipeline(amused, pipeline):
    tokens = torch.randint(V, (2, N))
    expected = pipeline.vqvae.decode(tokens.view(2, GRID, GRID), force_not_quantize=True, shape=(2, GRID, GRID, 4))
    pixels = pipeline.image_processor.postprocess(expected.sample.detach().clip(0, 1), "pt")  # in [0, 1]
    images = amused.tokenizer.decode(tokens)
    torch.testing.assert_close((images + 1) / 2, pixels)
    assert images.shape == (2, 3, GRID * F, GRID * F)
    assert images.min() < 0 < images.max(), "the whole of [-1, 1]"


def test_pitfall_18_frozen(amused):
    for network in (amused.tokenizer.vq, amused.transformer, amused.clip, VQTokenizer(make_vq()).vq):
        assert not any(m.training for m in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
    assert not amused.tokenizer.decode(torch.zeros(1, N, dtype=torch.long)).requires_grad


def test_a_vq_model_alone(tmp_path):
    vq = make_vq()
    vq.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(VQTokenizer.from_pretrained(tmp_path).encode(images), VQTokenizer(vq).encode(images))


# --- text and logits --------------------------------------------------------------------------------------------------


def test_text_is_the_penultimate_layer_and_the_pooled_embedding(amused):
    seen = []
    hook = amused.clip.text_model.encoder.layers[-2].register_forward_hook(lambda m, i, out: seen.append(out))
    states, pooled = amused.encode(PROMPTS)
    hook.remove()
    torch.testing.assert_close(states, seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0])
    assert states.shape == (2, 77, 16)
    assert pooled.shape == (2, 12)
    assert not torch.allclose(pooled[0], pooled[1])


def pipeline_logits(pipeline, monkeypatch, tokens, prompts, scale, **kwargs):
    """What the pipeline hands to its scheduler in a single step."""
    seen = []

    def step(self, model_output, timestep, sample, **_):
        seen.append(model_output)
        return SimpleNamespace(prev_sample=sample)

    monkeypatch.setattr(diffusers.AmusedScheduler, "step", step)
    latents = tokens.view(-1, GRID, GRID)
    call = {
        "guidance_scale": scale,
        "num_inference_steps": 1,
        "output_type": "latent",
        "height": GRID * F,
        "width": GRID * F,
    }
    pipeline(prompts, latents=latents, **call, **kwargs)
    return seen[0].flatten(2).transpose(1, 2)


@pytest.mark.parametrize("scale", [10.0, 3.5, 1.0])
def test_pitfall_12_logits_equal_the_pipeline(amused, pipeline, monkeypatch, scale):
    tokens = torch.where(torch.rand(2, N) < 0.5, MASK, torch.randint(V, (2, N)))
    ours = amused.logits_fn(PROMPTS, guidance=scale - 1)(tokens, 0.5)
    assert ours.shape == (2, N, V)
    torch.testing.assert_close(
        ours, pipeline_logits(pipeline, monkeypatch, tokens, PROMPTS, scale), rtol=1e-4, atol=1e-4
    )


def test_its_defaults_are_the_pipelines(amused, pipeline, monkeypatch):
    tokens = torch.full((2, N), MASK)
    expected = pipeline_logits(pipeline, monkeypatch, tokens, PROMPTS, 10.0)
    torch.testing.assert_close(amused.logits_fn(PROMPTS)(tokens, 0.0), expected, rtol=1e-4, atol=1e-4)
    assert amused.mask_id == pipeline.scheduler.config.mask_token_id == MASK


def test_negative_prompts_equal_the_pipeline(amused, pipeline, monkeypatch):
    tokens, negatives = torch.full((2, N), MASK), ["blurry", ""]
    expected = pipeline_logits(pipeline, monkeypatch, tokens, PROMPTS, 5.0, negative_prompt=negatives)
    ours = amused.logits_fn(PROMPTS, guidance=4.0, negative_prompts=negatives)(tokens, 0.0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(amused.logits_fn(PROMPTS, guidance=4.0)(tokens, 0.0), ours, atol=1e-3)


def test_pitfall_13_a_negative_prompt_of_the_same_text_cancels_guidance(amused):
    tokens = torch.full((1, N), MASK)
    same = amused.logits_fn(PROMPTS[:1], guidance=9.0, negative_prompts=PROMPTS[:1])(tokens, 0.0)
    torch.testing.assert_close(same, amused.logits_fn(PROMPTS[:1], guidance=0)(tokens, 0.0), rtol=1e-4, atol=1e-4)


def test_too_few_negative_prompts_are_refused(amused):
    with pytest.raises(ValueError, match="1 negative_prompts came for 2 prompts"):
        amused.logits_fn(PROMPTS, negative_prompts=["blurry"])


def test_guidance_may_rise(amused):
    tokens = torch.full((2, N), MASK)
    rising = amused.logits_fn(PROMPTS, guidance=(0.0, 9.0))
    torch.testing.assert_close(rising(tokens, 0.0), amused.logits_fn(PROMPTS, guidance=0.0)(tokens, 0.3))
    torch.testing.assert_close(rising(tokens, 1.0), amused.logits_fn(PROMPTS, guidance=9.0)(tokens, 0.3))


def test_long_prompts_are_cut_with_one_warning(amused, caplog):
    long = amused.encode(["a " * 90, "a " * 100, "a"])
    assert [r.message for r in caplog.records if r.name == "minimuse"] == ["2 prompts are cut to 77 tokens of CLIP"]
    assert torch.equal(long[0], amused.encode(["a " * 75, "a " * 75, "a"])[0])


# --- a whole decode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_the_same_tokens_as_its_scheduler_step_by_step(amused, pipeline, monkeypatch, steps):
    g = torch.Generator().manual_seed(steps)
    uniforms = draw_uniforms(2, steps, 2, N, generator=g).clamp(1e-6, 1 - 1e-6)
    replaced(monkeypatch, uniforms)
    theirs = []
    call = {
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "callback": lambda i, t, x: theirs.append(x.flatten(1)),
    }
    pipeline(PROMPTS, output_type="latent", **call)
    g = torch.Generator().manual_seed(steps)
    start = torch.full((2, N), amused.mask_id)
    trace = list(
        decode(amused.logits_fn(PROMPTS, guidance=3.0), start, mask_id=amused.mask_id, generator=g, **settings(steps))
    )
    assert len(theirs) == len(trace) == steps
    for ours, expected in zip(trace, theirs, strict=True):
        assert ours.tokens.tolist() == expected.tolist(), f"step {ours.index}"
    assert trace[-1].tokens.unique().numel() > 3


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 12, 24, 48])
@pytest.mark.parametrize("n", [64, 256, 1024])
def test_pitfall_09_as_many_as_its_scheduler(n, steps, monkeypatch):
    """Counts over the usual grids: 12 steps and all multiples of 3 hit the border of u = 2/3."""
    flat, start = torch.zeros(1, n, 2), torch.full((1, n), 2)
    scheduler = diffusers.AmusedScheduler(mask_token_id=2)
    scheduler.set_timesteps(steps)
    counts, sample = [], start
    for t in scheduler.timesteps:
        after = scheduler.step(flat, t, sample, generator=torch.Generator().manual_seed(0)).prev_sample
        counts.append(((after != 2) & (sample == 2)).sum().item())
        sample = after
    trace = decode(lambda tokens, u: flat, start, mask_id=2, **settings(steps))
    assert [s.revealed.sum().item() for s in trace] == counts


def test_the_noise_falls_as_its_scheduler_says():
    for steps in (2, 12, 30):
        scheduler = diffusers.AmusedScheduler(mask_token_id=2)
        scheduler.set_timesteps(steps)  # from 2 to 0
        c = settings(steps)["choice_temperature"]
        ours = torch.tensor([c * (1 - (i + 1) / steps) for i in range(steps)])
        torch.testing.assert_close(ours, scheduler.temperatures)


def test_infilling_keeps_known_tokens(amused):
    tokens = torch.randint(V, (1, N))
    start = tokens.masked_fill(torch.rand(1, N) < 0.5, amused.mask_id)
    *_, last = decode(amused.logits_fn(PROMPTS[:1]), start, mask_id=amused.mask_id, **settings(4))
    known = start != amused.mask_id
    assert torch.equal(last.tokens[known], tokens[known])
    assert last.tokens.max() < V


def test_in_bfloat16(folder):
    amused = Amused.from_pretrained(folder).to(torch.bfloat16)
    start = torch.full((2, N), amused.mask_id)
    *_, last = decode(amused.logits_fn(PROMPTS), start, mask_id=amused.mask_id, **settings(3))
    assert amused.tokenizer.decode(last.tokens).isfinite().all()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_mask_that_is_left_is_refused(amused):
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        amused.tokenizer.decode(torch.full((1, N), amused.mask_id))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vqvae", "no VQModel in .*, subfolder 'vqvae'"),
        ("transformer", "no UVit2DModel in .*, subfolder 'transformer'"),
        ("text_encoder", "no CLIPTextModelWithProjection in .*, subfolder 'text_encoder'"),
        ("tokenizer", "CLIP knows 54 text tokens.*vocab.json"),
    ],
)
def test_a_folder_without_a_part_is_refused(tmp_path, folder, part, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(ValueError, match=message):
        Amused.from_pretrained(tmp_path)


def test_foreign_models_are_refused(tmp_path):
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vqvae")
    with pytest.raises(ValueError, match="no VQModel in"):
        VQTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lookup_from_codebook"):
        VQTokenizer(make_vq(lookup_from_codebook=False))


def test_missing_weights_are_refused(tmp_path, amused):
    amused.clip.text_model.save_pretrained(tmp_path / "text_encoder")  # no projection
    config = json.loads((tmp_path / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] != ["CLIPTextModelWithProjection"]
    with pytest.raises(ValueError, match="lacks"):
        _load("CLIPTextModelWithProjection", tmp_path, "text_encoder")


def test_pitfall_20_import_and_construction_touch_no_network(folder, no_network):
    Amused.from_pretrained(folder)
    code = "import sys, minimuse.amused; assert not {'diffusers', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_extra(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"minimuse\[amused\]"):
        VQTokenizer.from_pretrained(folder)


# --- in Muse's place --------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tiny_muse):
    """The tiny Muse with a VQModel of diffusers as its low tokenizer."""
    parts = torch.nn.ModuleDict({**tiny_muse.parts, "low_tokenizer": VQTokenizer(make_vq())})
    return Muse(tiny_muse.config, parts, tiny_muse.encoder)


def test_muse_draws_and_edits_with_it(mixed):
    seen = []
    (image,) = mixed.generate("a red cube", seed=0, callback=seen.append)
    assert mixed.picture(next(s for s in seen if s.stage == "base"))[0].size == (32, 32)
    mask = [[x > 31 for x in range(64)] for _ in range(64)]
    assert mixed.inpaint(image, mask, "a blue ball", seed=0)[0].size == image.size
    assert mixed.edit(image, "a blue ball", seed=0, iterations=2)[0].size == image.size


def test_a_base_model_trains_on_its_tokens(mixed, tiny_muse):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    tokens = tokenize_images(mixed.low_tokenizer, images, batch=3, bf16=False)
    assert torch.equal(tokens, mixed.low_tokenizer.encode(images / 127.5 - 1))
    base = Transformer(tiny_muse.config.base)
    texts = [[torch.zeros(1, tiny_muse.config.base.text_width)]] * 8
    config = replace(tiny_muse.config.stages["base"], steps=16, batch=8, learning_rate=1e-2)
    losses = [p.metrics["loss"] for p in train_transformer(base, config, tokens, texts, engine=Engine(bf16=False))]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), f"it learns: {losses}"


def test_what_could_not_be_loaded_again_is_not_saved(mixed, tmp_path):
    with pytest.raises(ValueError, match="low_tokenizer"):
        mixed.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_muse_names_the_tokenizer_that_others_trained(tiny_muse, folder, tmp_path):
    """`low_tokenizer_from`: no stage for it, its tokens in training, its name in the checkpoint, the same pixels."""
    tokenizer = VQTokenizer.from_pretrained(folder)
    config = replace(tiny_muse.config, low_tokenizer_from=str(folder))
    trace = list(train_muse(config, engine=Engine(bf16=False)))
    assert "low_tokenizer" not in {p.stage for p in trace}, "it is trained already"
    muse = trace[-1].model
    muse.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored, "the rest is stored"
    assert not any(name.startswith("low_tokenizer") for name in stored), "it is named, not stored"
    again = Muse.from_pretrained(tmp_path)
    assert again.low_tokenizer.vq.quantize.embedding.weight.equal(tokenizer.vq.quantize.embedding.weight)
    first, second = (m.generate("a red cube", seed=0)[0] for m in (muse, again))
    assert first.tobytes() == second.tobytes(), "loaded, it draws the same pixels"
    vocabulary = {"low_tokenizer": {"codebook_size": 32}, "base": {"codebook_size": 32}}
    vocabulary["superres"] = {"low_codebook_size": 32}
    wrong = replace(config, **{name: replace(getattr(config, name), **change) for name, change in vocabulary.items()})
    with pytest.raises(ValueError, match="codebook_size 16, but low_tokenizer says 32"):
        published_tokenizer(wrong)


# --- in the lab -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A captioned folder of 70 noisy pictures."""
    path = tmp_path_factory.mktemp("pictures")
    for i in range(70):
        Image.fromarray(torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()).save(path / f"{i:02}.png")
        (path / f"{i:02}.txt").write_text(f"a {['red', 'blue'][i % 2]} cube")
    return path


def test_a_schedule_measured_by_fid_and_clip_score(amused, pictures, tiny_clip):
    features = lambda images: images.float().mean((2, 3))  # noqa: E731
    score = ClipScorer(tiny_clip)
    evaluator = AmusedEvaluator(amused, pictures, score, features, samples=64)
    assert evaluator.real.shape == (64, 3)
    report = compare(evaluator, ["cosine"], ["confidence", "halton"], [2], presets=["amused"])
    assert list(report.titles) == ["clip", "fid"]
    ours, halton = report["cosine", "confidence", 2], report["cosine", "halton", 2]
    theirs = report["as amused", "", 2]
    assert ours.groups == theirs.groups, "by name, the model's own order has the model's own noise"
    assert ours.groups != halton.groups
    images, nfe = evaluator.draw(evaluator.prompts[:2], [0, 1], {"order": "confidence", **settings(2)})
    tokens = torch.full((2, N), MASK)
    draws = [torch.Generator().manual_seed(i) for i in range(2)]
    *_, last = decode(
        amused.logits_fn(evaluator.prompts[:2]), tokens, mask_id=amused.mask_id, generator=draws, **settings(2)
    )
    assert images.equal(amused.tokenizer.decode(last.tokens)), "as in amused.py's own example"
    assert nfe == 4
    images, _ = evaluator.draw(
        evaluator.prompts, list(range(64)), {"schedule": "cosine", "order": "confidence", "steps": 2}
    )
    expected = score(images, evaluator.prompts).mean().item()
    assert ours["clip"].value == pytest.approx(expected, abs=1e-6), "the mean over all pictures"
    with pytest.raises(ValueError, match="samples is 96"):
        AmusedEvaluator(amused, pictures, score, features, samples=96)


def test_the_command_compares_published_weights(folder, pictures, tiny_clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lab_models, "inception_features", lambda: lambda images: images.float().mean((2, 3)))
    words = f"compare --amused {folder} --data {pictures} --clip {tiny_clip} --steps 1 --samples 64 --device cpu"
    assert cli.main([*words.split(), "--out", str(tmp_path)]) == 0
    assert "fid" in capsys.readouterr().out
    assert (tmp_path / "clip.png").is_file()
