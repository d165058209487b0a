"""muse.py: the user's API, on a tiny Muse with random weights (Muse figure 3).

Where tokens must be equal, the weights are in float64: rounding cannot tip a draw.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import parameter_counts
from PIL import Image

import minimuse.muse
from minimuse.config import preset
from minimuse.muse import Muse, build
from minimuse.text import TextEncoder
from minimuse.vqgan import draft_tokens

ROOT = Path(__file__).resolve().parent.parent
SEEDS = [-1, 2**32, 2**63, "7", b"3", 2.0, 1e20, True, math.nan, {}]
A, B = "a red cube", "two small blue spheres left of a metal cylinder"


@pytest.fixture(scope="module")
def folder(tiny_muse, tmp_path_factory):
    """The tiny Muse, saved."""
    return tiny_muse.save_pretrained(tmp_path_factory.mktemp("muse") / "tiny")


@pytest.fixture
def exact(folder, tiny_text):
    """A copy in float64 of one's own, free to be spied on."""
    muse = Muse.from_pretrained(folder, device="cpu", dtype=torch.float64)
    muse.encoder = tiny_text
    return muse


@pytest.fixture(scope="module")
def image(tiny_muse):
    """A picture of the right size, no two pixels alike."""
    side = tiny_muse.config.high_tokenizer.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def final_tokens(muse: Muse, prompts, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The last low and the last high tokens of all pictures of one `generate`, however it is batched."""
    ends: dict[str, list[torch.Tensor]] = {"base": [], "superres": []}

    def callback(step):
        if not step.masked.any():
            ends[step.stage].append(step.tokens)

    muse.generate(prompts, callback=callback, **settings)
    return torch.cat(ends["base"]), torch.cat(ends["superres"])


def spy_on_decode(monkeypatch) -> list[tuple[torch.Tensor, dict]]:
    """-> a list that grows by (start tokens, settings) at each `decode` of a Muse."""
    seen, decode = [], minimuse.muse.decode

    def spy(logits_fn, tokens, **settings):
        seen.append((tokens.clone(), settings))
        return decode(logits_fn, tokens, **settings)

    monkeypatch.setattr(minimuse.muse, "decode", spy)
    return seen


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_generate_gives_n_pictures_of_each_prompt_in_order(tiny_muse):
    side = tiny_muse.config.high_tokenizer.image_size
    images = tiny_muse.generate([A, B], n=2, seed=5, steps=2)
    assert isinstance(images, list), f"always a list, {type(images)} came"
    assert len(images) == 4, f"2 prompts x 2 are 4 pictures, {len(images)} came"
    for picture in images:
        assert (picture.mode, picture.size) == ("RGB", (side, side)), f"{picture.mode} {picture.size}"
    told = [(i.info["minimuse"]["prompt"], i.info["minimuse"]["seed"]) for i in images]
    assert told == [(A, 5), (A, 6), (B, 7), (B, 8)], f"prompt by prompt, seed + i: {told}"
    assert len(tiny_muse.generate(A, steps=1)) == 1, "one prompt alone is one picture, in a list"


def test_info_tells_what_made_a_picture(tiny_muse):
    (picture,) = tiny_muse.generate(A, seed=3, negative_prompt=B, steps=2, guidance=(0, 2), superres={"steps": 1})
    told = picture.info["minimuse"]
    expected = {"model": "tiny", "prompt": A, "negative_prompt": B, "seed": 3, "steps": 2, "guidance": (0, 2)}
    expected |= {"superres": {"steps": 1}, "fingerprint": tiny_muse.fingerprint}
    assert told == expected, f"what was given and which checkpoint it was given to, no more: {told}"
    assert json.loads(json.dumps(told))["guidance"] == [0, 2], "info must be plain JSON"
    (picture,) = tiny_muse.generate(A, steps=1)
    assert isinstance(picture.info["minimuse"]["seed"], int), "without a seed, the random one is told"
    again = tiny_muse.generate(A, seed=picture.info["minimuse"]["seed"], steps=1)[0]
    assert again.tobytes() == picture.tobytes(), "the told seed must draw the same picture"


def test_seeds_one_for_each_or_one_number(exact):
    low, high = final_tokens(exact, A, n=3, seed=10, steps=3)
    for seeds in ([10, 11, 12], (10, 11, 12), range(10, 13)):
        again = final_tokens(exact, A, n=3, seed=seeds, steps=3)
        assert torch.equal(low, again[0]), f"seed=10 is seeds 10, 11, 12: {seeds}"
        assert torch.equal(high, again[1]), f"seed=10 is seeds 10, 11, 12, in super-resolution too: {seeds}"
    back = final_tokens(exact, A, n=3, seed=[12, 11, 10], steps=3)[0]
    assert torch.equal(low.flip(0), back), "picture i draws with seeds[i]"


def test_pictures_do_not_depend_on_the_batch_size(tiny_muse):
    whole = tiny_muse.generate(A, n=5, seed=0, steps=2)
    parts = tiny_muse.generate(A, n=5, seed=0, steps=2, batch_size=2)
    assert len(parts) == 5, f"5 pictures in batches of 2: {len(parts)} came"
    off = max(np.abs(pixels(a) - pixels(b)).max() for a, b in zip(whole, parts, strict=True))
    assert off <= 1, f"pixels differ by {off} with another batch_size"


def test_callback_sees_every_step(tiny_muse):
    seen = []
    tiny_muse.generate(A, seed=0, steps=3, superres={"steps": 2}, callback=seen.append)
    assert [s.stage for s in seen] == ["base"] * 3 + ["superres"] * 2, f"{[s.stage for s in seen]}"


# --- an image alone and in a batch ------------------------------------------------------------------------------------


def batch_invariant(codebook_size: int):
    """A forward whose logits are looked up by integers of one row alone: no rounding can come from its neighbours."""
    table = torch.randn(97, codebook_size, generator=torch.Generator().manual_seed(0))

    def forward(tokens, memory):
        length = memory.attend.sum((1, 2, 3))[:, None]  # tells texts of other lengths apart, padding does not count
        places = torch.arange(tokens.shape[1])
        return table[(13 * tokens + 7 * places + 5 * length + 31 * tokens.sum(1, keepdim=True)) % 97]

    return forward


@pytest.mark.parametrize("settings", [{}, {"guidance": (0.0, 3.0), "order": "random"}, {"negative_prompt": "a ball"}])
def test_pitfall_17_an_image_alone_and_in_a_batch_identical_tokens(exact, monkeypatch, settings):
    monkeypatch.setattr(exact.base, "forward", batch_invariant(exact.config.base.codebook_size))
    monkeypatch.setattr(exact.superres, "forward", batch_invariant(exact.config.superres.codebook_size))
    prompts, seeds = [A, B, A], [7, 8, 9]
    low, high = final_tokens(exact, prompts, seed=seeds, **settings)
    for i in range(3):
        alone = final_tokens(exact, prompts[i], seed=seeds[i], **settings)
        assert torch.equal(low[i : i + 1], alone[0]), f"low tokens of picture {i} depend on its neighbours"
        assert torch.equal(high[i : i + 1], alone[1]), f"high tokens of picture {i} depend on its neighbours"


def test_pitfall_17_with_the_real_model_rounding_is_all_that_differs(exact):
    together = final_tokens(exact, [B, A], seed=[3, 4], steps=4)
    alone = final_tokens(exact, A, seed=4, steps=4)
    for i, stage in enumerate(("base", "superres")):
        same = (together[i][1] == alone[i][0]).double().mean().item()
        assert same > 0.99, f"{stage}: {same:.1%} of the tokens alone are those in a batch, in float64"


# --- guidance, negative prompts, settings -----------------------------------------------------------------------------


def test_pitfall_13_a_negative_prompt_of_the_same_text_cancels_guidance(exact):
    none, strong = ({"steps": 4, "guidance": t, "superres": {"guidance": t}} for t in (0, 5))
    plain = final_tokens(exact, B, seed=1, **none)
    cancelled = final_tokens(exact, B, seed=1, negative_prompt=B, **strong)
    guided = final_tokens(exact, B, seed=1, **strong)
    away = final_tokens(exact, B, seed=1, negative_prompt="a green ball", **strong)
    for i, stage in enumerate(("base", "superres")):
        assert torch.equal(plain[i], cancelled[i]), f"{stage}: away from and towards the same text is nowhere"
        assert not torch.equal(plain[i], guided[i]), f"{stage}: guidance must change something"
        assert not torch.equal(guided[i], away[i]), f"{stage}: a negative prompt is not the removed text"


def test_pitfall_13_negative_prompts_one_for_each_and_none(exact):
    settings = {"guidance": 3, "steps": 3}
    low, high = final_tokens(exact, [A, B], seed=[1, 2], negative_prompt=[None, A], **settings)
    without = final_tokens(exact, A, seed=1, **settings)
    away = final_tokens(exact, B, seed=2, negative_prompt=A, **settings)
    assert torch.equal(low[:1], without[0]), "None among negative prompts is plain guidance"
    assert torch.equal(high[:1], without[1]), "None among negative prompts is plain guidance, in super-resolution too"
    assert torch.equal(low[1:], away[0]), "each prompt is guided away from its own negative prompt"
    assert torch.equal(high[1:], away[1]), "each prompt is guided away from its own, in super-resolution too"
    shared = final_tokens(exact, [A, B], seed=[1, 2], negative_prompt=A, **settings)[0]
    assert torch.equal(shared[1:], away[0]), "one text holds for all prompts"
    told = [i.info["minimuse"]["negative_prompt"] for i in exact.generate([A, B], n=2, negative_prompt=[None, A])]
    assert told == [None, None, A, A], f"negative prompts stay with their prompts when n > 1: {told}"


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [(2, [2, 2, 2]), (1.5, [1.5, 1.5, 1.5]), ((0, 4), [0, 2, 4]), ([4, 0], [4, 2, 0]), (lambda u: 8 * u**2, [0, 2, 8])],
    ids=["int", "float", "pair", "list", "callable"],
)
def test_guidance_forms(tiny_muse, guidance, expected):
    settings = {"guidance": guidance, "steps": 3}
    seen = list(tiny_muse.steps(A, seed=0, **settings, superres=settings))
    assert [s.guidance for s in seen] == expected * 2, f"{[s.guidance for s in seen]}"


def test_guidance_of_another_kind_is_refused(tiny_muse):
    for wrong in ("strong", math.nan, True, 1j, [math.inf]):
        with pytest.raises(ValueError, match=r"guidance is .*; give (a number, a pair|2 values)"):
            tiny_muse.generate(A, guidance=wrong)
    with pytest.raises(ValueError, match=r"guidance\[1\] is nan; give a number"):
        tiny_muse.generate(A, guidance=(0, math.nan))


def test_settings_hold_for_the_base_model_and_those_in_superres_for_super_resolution(exact):
    own = exact.config.superres_sampling
    override = {"steps": 2, "guidance": 0, "sampling_temperature": 0.5}
    plain, changed = (list(exact.steps(A, seed=0, steps=4, guidance=2, **s)) for s in ({}, {"superres": override}))
    assert [s.stage for s in plain] == ["base"] * 4 + ["superres"] * own.steps, "super-resolution keeps its own steps"
    assert [s.guidance for s in plain[:4]] == [2] * 4, "guidance=2 holds for the base model"
    assert (plain[4].guidance, plain[-1].guidance) == own.guidance, "super-resolution keeps its own guidance"
    assert [s.stage for s in changed] == ["base"] * 4 + ["superres"] * 2, "superres={'steps': 2} for that one"
    for a, b in zip(plain[:4], changed[:4], strict=True):
        assert torch.equal(a.tokens, b.tokens), f"base step {a.index} must not notice"
    assert [s.guidance for s in changed[4:]] == [0, 0], "superres={'guidance': 0} is followed"


@pytest.mark.parametrize(
    ("superres", "error", "match"),
    [
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"stages": 3}, TypeError, "unknown setting stages"),
        ({"superres": {}}, TypeError, "unknown setting superres"),
        (3, ValueError, "superres is 3; give a dict"),
        ({"guidance": math.nan}, ValueError, "guidance is nan"),
    ],
)
def test_wrong_settings_of_super_resolution_are_refused_before_the_base_model_draws(
    tiny_muse, image, monkeypatch, superres, error, match
):
    seen = spy_on_decode(monkeypatch)
    monkeypatch.setattr(minimuse.editing, "decode", minimuse.muse.decode)
    mask = np.ones(image.size[::-1], dtype=bool)
    calls = [
        lambda: tiny_muse.generate(A, superres=superres),
        lambda: next(tiny_muse.steps(A, superres=superres)),
        lambda: tiny_muse.inpaint(image, mask, A, superres=superres),
        lambda: tiny_muse.outpaint(image, 8, A, superres=superres),
        lambda: tiny_muse.edit(image, A, superres=superres),
        lambda: next(tiny_muse.edit_steps(image, A, superres=superres)),
    ]
    for call in calls:
        with pytest.raises(error, match=match):
            call()
    assert seen == [], "nothing was decoded"


def test_defaults_are_the_checkpoints(tiny_muse, monkeypatch):
    seen = spy_on_decode(monkeypatch)
    tiny_muse.generate(A, seed=0)
    for (_, given), config in zip(
        seen, (tiny_muse.config.base_sampling, tiny_muse.config.superres_sampling), strict=True
    ):
        for name in ("steps", "schedule", "order", "sampling_temperature", "choice_temperature"):
            assert given[name] == getattr(config, name), f"{name} is {given[name]}, not the checkpoint's"
    tiny_muse.generate(A, seed=0, steps=None, order=None)
    assert seen[2][1]["steps"] == seen[0][1]["steps"], "None is the default"


@pytest.mark.parametrize("order", ["halton", lambda logits, d, m, u: d.float()])
def test_another_order_ranks_without_noise(tiny_muse, monkeypatch, order):
    seen = spy_on_decode(monkeypatch)
    tiny_muse.generate(A, seed=0, order=order, steps=2)
    tiny_muse.generate(A, seed=0, order=order, steps=2, choice_temperature=1.5)
    noise, own = [settings["choice_temperature"] for _, settings in seen], tiny_muse.config.superres_sampling
    assert noise == [0, own.choice_temperature, 1.5, own.choice_temperature], f"0 unless it is given: {noise}"


def test_unknown_settings_list_the_known(tiny_muse):
    known = "choice_temperature, choose, corrector, guidance, order, remask, sampling_temperature, schedule, steps"
    with pytest.raises(TypeError, match=f"unknown setting strength, temperature; known: {known}"):
        tiny_muse.generate(A, temperature=1.0, strength=0.5)
    with pytest.raises(TypeError, match="unknown setting stages"):
        tiny_muse.generate(A, superres={"stages": 3})
    with pytest.raises(TypeError, match="iteration"):
        tiny_muse.edit(Image.new("RGB", (64, 64)), A, iteration=3)


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "match"),
    [
        ([], {}, ValueError, "0 prompts, n is 1; give 1 to 100000 pictures in one call"),
        (None, {}, ValueError, "prompts is None; give a list"),
        (A, {"n": 0}, ValueError, "n is 0; give a positive whole number"),
        (A, {"n": -1}, ValueError, "n is -1"),
        (A, {"n": 1.5}, ValueError, "n is 1.5"),
        (A, {"n": True}, ValueError, "n is True"),
        (A, {"n": 1_000_000_000}, ValueError, "n is 1000000000; give 1 to 100000 pictures in one call"),
        (A, {"batch_size": -1}, ValueError, "batch_size is -1; give a positive whole number"),
        (A, {"batch_size": 0}, ValueError, "batch_size is 0"),
        (A, {"batch_size": 1.5}, ValueError, "batch_size is 1.5"),
        ([A, 3], {}, ValueError, r"prompts\[1\] is 3; give a text"),
        ([A, None], {}, ValueError, r"prompts\[1\] is None; give a text"),
        *((A, {"seed": seed}, ValueError, "seed is .*; give a whole number from 0 to") for seed in SEEDS),
        (A, {"n": 2, "seed": 2**32 - 1}, ValueError, "seed is 4294967296"),
        (A, {"seed": [2.0]}, ValueError, "seed is 2.0"),
        ([A, B], {"negative_prompt": [A, 3]}, ValueError, "negative_prompt is 3; give a text"),
        (A, {"negative_prompt": 3}, ValueError, "negative_prompt is 3"),
        (A, {"callback": 3}, ValueError, "callback is 3; give a function"),
        ([A, B], {"seed": [1]}, ValueError, "1 seeds for 2 pictures"),
        (A, {"n": 2, "seed": [1, 2, 3]}, ValueError, "3 seeds for 2 pictures"),
        ([A, B], {"negative_prompt": [A]}, ValueError, "1 negative prompts; give one, or 2"),
        (A, {"negative_prompt": []}, ValueError, "0 negative prompts; give one, or 1"),
        (A, {"steps": 0}, ValueError, "steps is 0"),
        (A, {"steps": 2.5}, ValueError, r"steps is 2\.5"),
        (A, {"superres": {"steps": 0}}, ValueError, "steps is 0"),
        (A, {"schedule": "cosinus"}, ValueError, "schedule is 'cosinus'; give the name of a schedule: cosine"),
        (A, {"order": "confident"}, ValueError, "order is 'confident'; give confidence, random, raster"),
        (A, {"sampling_temperature": -1}, ValueError, "sampling_temperature is -1"),
        (A, {"choice_temperature": math.nan}, ValueError, "choice_temperature is nan"),
        (A, {"top_k": 0}, ValueError, "top_k is 0"),
        (A, {"remask": 1}, ValueError, "remask is 1; give True or False"),
        (A, {"steps": len}, ValueError, "steps is "),
    ],
)
def test_what_cannot_be_drawn_is_refused(tiny_muse, prompts, settings, error, match):
    with pytest.raises(error, match=match):
        tiny_muse.generate(prompts, **settings)


def test_numpy_and_torch_scalars_are_numbers(tiny_muse):
    plain = {"n": 2, "seed": 5, "steps": 3, "guidance": 2.0, "top_k": 4, "sampling_temperature": 0.5}
    special = {"n": np.int64(2), "seed": np.uint32(5), "steps": torch.tensor(3), "guidance": np.float32(2)}
    special |= {"top_k": np.array(4), "sampling_temperature": torch.tensor(0.5, dtype=torch.float64)}
    expected = tiny_muse.generate(A, **plain, superres={"steps": 2})
    images = tiny_muse.generate(A, **special, superres={"steps": np.int8(2)}, batch_size=np.int64(16))
    assert [i.tobytes() for i in images] == [i.tobytes() for i in expected]
    assert json.dumps(images[1].info["minimuse"]) == json.dumps(expected[1].info["minimuse"]), "info is plain JSON"
    by_array = tiny_muse.generate(A, n=2, seed=np.array([5, 6]), **{k: plain[k] for k in ("steps", "guidance")})
    assert [i.info["minimuse"]["seed"] for i in by_array] == [5, 6]


def test_seeds_beyond_32_bits_draw_nothing_else(tiny_muse):
    last = tiny_muse.generate(A, seed=2**32 - 1, steps=1, superres={"steps": 1})[0]
    first = tiny_muse.generate(A, seed=0, steps=1, superres={"steps": 1})[0]
    assert last.tobytes() != first.tobytes()


def test_steps_beyond_the_tokens_are_clamped_with_a_word(tiny_muse):
    with pytest.warns(UserWarning, match="steps is 1000000000, but there are only 64 tokens"):
        seen = list(tiny_muse.steps(A, seed=0, steps=10**9, superres={"steps": 1}))
    assert sum(step.stage == "base" for step in seen) == 64


def test_superres_continues_a_seed_where_the_base_decode_ends(tiny_muse):
    """Also where the checkpoint's steps are more than the tokens."""
    sampling = replace(tiny_muse.config.base_sampling, steps=100)
    config = replace(tiny_muse.config, base_sampling=sampling)
    muse = Muse(config, tiny_muse.parts, tiny_muse.encoder)
    with pytest.warns(UserWarning, match="there are only 64 tokens"):
        seen = list(muse.steps(A, seed=3))
    low = [step for step in seen if step.stage == "base"][-1].tokens
    *_, last = muse.decode_superres(muse.jobs(A, seed=3), low)
    assert last.tokens.equal(seen[-1].tokens)


def test_a_muse_leaves_the_callers_modules_as_they_are(tiny_muse):
    parts = build(tiny_muse.config)
    muse = Muse(tiny_muse.config, parts, tiny_muse.encoder)
    muse.generate(A, seed=0, steps=1, superres={"steps": 1})
    assert parts.training, "still in training mode"
    assert all(p.requires_grad for p in parts.parameters()), "still trained"


def test_integers_are_no_dtype_of_a_muse(folder, tiny_muse):
    with pytest.raises(ValueError, match=r"dtype is 'x'; give torch\.float32"):
        tiny_muse.to(dtype="x")
    with pytest.raises(ValueError, match=r"dtype is torch\.int64; give torch\.float32"):
        Muse.from_pretrained(folder, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"dtype is torch\.int64"):
        Muse.from_pretrained(folder).save_pretrained(folder.parent / "integers", dtype=torch.int64)


# --- words that it never saw ------------------------------------------------------------------------------------------


def test_unknown_words_are_told_once_and_drawn(tiny_muse, capsys):
    muse = Muse(
        tiny_muse.config, tiny_muse.parts, tiny_muse.encoder, words=["a", "red", "cube"], examples=["x", "y", "z"]
    )
    far = "a steam locomotive crossing the cube"
    (picture,) = muse.generate(far, seed=0, steps=1)
    assert picture.size[0] == tiny_muse.config.high_tokenizer.image_size, "a prompt far outside is drawn all the same"
    out, err = capsys.readouterr()
    assert out == "", f"nothing on stdout: {out}"
    assert err.count("\n") == 1, f"one line: {err!r}"
    assert "tiny never saw steam, locomotive, crossing, the in training" in err, f"it names the words: {err}"
    assert "Try one of ['x', 'y', 'z']" in err, f"it gives three prompts to try: {err}"
    muse.generate([far, far], seed=0, steps=1)
    muse.generate(["A red cube!", "a red teapot"], seed=0, steps=1)
    assert capsys.readouterr().err == "", "once a prompt; a prompt that is mostly known goes without"
    muse.generate("dogs and cats", seed=0, steps=1)
    assert capsys.readouterr().err.count("\n") == 1, "another prompt, another line"


def test_unknown_words_of_any_alphabet(tiny_muse, capsys):
    far = "röd kub på gård"
    muse = Muse(
        tiny_muse.config, tiny_muse.parts, tiny_muse.encoder, words=["a", "red", "cube"], examples=["x", "y", "z"]
    )
    muse.generate(far, seed=0, steps=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1, f"{far!r} is far outside: {err!r}"
    assert far.split()[0] in err, f"it names the words whole: {err}"


# --- the trace --------------------------------------------------------------------------------------------------------


def test_the_trace_of_a_decode(tiny_muse):
    config, trace = tiny_muse.config, list(tiny_muse.steps(A, n=2, seed=0))
    models = {
        "base": (tiny_muse.base, config.base_sampling),
        "superres": (tiny_muse.superres, config.superres_sampling),
    }
    assert list(dict.fromkeys(s.stage for s in trace)) == ["base", "superres"], "base first, then super-resolution"
    for stage, (model, sampling) in models.items():
        steps = [s for s in trace if s.stage == stage]
        assert [s.index for s in steps] == list(range(sampling.steps)), f"{stage}: a Step for each of its steps"
        first, last = sampling.guidance
        for s in steps:
            t = first + (last - first) * s.index / (sampling.steps - 1)
            assert math.isclose(s.guidance, t, abs_tol=1e-9), f"{stage} {s.index}: guidance {s.guidance}, not {t}"
        masked = torch.ones(2, model.config.tokens, dtype=torch.bool)
        for s in steps:
            where = f"{stage} step {s.index}"
            assert s.tokens.shape == s.confidence.shape == (2, model.config.tokens), f"{where}: {s.tokens.shape}"
            assert s.revealed.any(1).all(), f"{where} reveals nothing"
            assert not (s.revealed & ~masked).any(), f"{where} reveals what was not masked"
            assert torch.equal(s.masked, masked & ~s.revealed), f"{where}: masked is not what was left"
            assert torch.equal(s.tokens == model.mask_id, s.masked), f"{where}: tokens and masked disagree"
            assert ((s.confidence >= 0) & (s.confidence <= 1)).all(), f"{where}: confidence is a probability"
            assert (s.confidence[~masked] == 0).all(), f"{where}: confidence is 0 where the token was known"
            assert (s.confidence[s.revealed] > 0).all(), f"{where}: what was drawn had a chance"
            masked = s.masked
        assert not masked.any(), f"{stage} leaves tokens masked"


def test_superres_reads_the_low_tokens(exact, monkeypatch):
    read, memory = [], exact.superres.memory
    monkeypatch.setattr(exact.superres, "memory", lambda text, low, *d: (read.append(low), memory(text, low, *d))[1])
    low, _ = final_tokens(exact, [A, B], seed=0, steps=2)
    assert len(read) == 2, f"once with text and once without, not once a step: {len(read)}"
    for tokens in read:
        assert torch.equal(tokens, low), "pitfall 1: super-resolution must read what the base model drew"


def test_superres_reads_the_draft_of_the_low_tokens(exact, monkeypatch):
    read, memory = [], exact.superres.memory
    monkeypatch.setattr(
        exact.superres, "memory", lambda text, low, draft: (read.append(draft), memory(text, low, draft))[1]
    )
    low, _ = final_tokens(exact, [A, B], seed=0, steps=2)
    draft = draft_tokens(exact.low_tokenizer, exact.high_tokenizer, low)
    assert all(tokens.equal(draft) for tokens in read), "with text and without, the draft is of what the base drew"


def test_picture_of_a_step(tiny_muse):
    sides = {"base": tiny_muse.config.low_tokenizer.image_size, "superres": tiny_muse.config.high_tokenizer.image_size}
    for step in tiny_muse.steps(A, n=2, seed=0, steps=2):
        pictures = tiny_muse.picture(step)
        assert [p.size for p in pictures] == [(sides[step.stage],) * 2] * 2, f"{step.stage}: {pictures}"
    assert pictures[0].tobytes() == tiny_muse.generate(A, n=2, seed=0, steps=2)[0].tobytes(), "the last is the picture"


# --- save, load, move -------------------------------------------------------------------------------------------------


def test_save_load_same_pixels(tiny_muse, folder):
    loaded = Muse.from_pretrained(str(folder), device="cpu")
    assert loaded.config == tiny_muse.config, "the configuration must come back as it was"
    assert (loaded.words, loaded.examples) == (tiny_muse.words, tiny_muse.examples), "so must words and examples"
    for key, value in tiny_muse.parts.state_dict().items():
        assert torch.equal(loaded.parts.state_dict()[key], value), f"{key} changed on its way"
    a, b = (muse.generate([A, B], seed=0) for muse in (tiny_muse, loaded))
    assert [i.tobytes() for i in a] == [i.tobytes() for i in b], "save -> load must draw the same pixels"


def test_half_precision_files(tiny_muse, folder, tmp_path):
    dtype = torch.float16
    half = tiny_muse.save_pretrained(tmp_path / "half", dtype=dtype)
    sizes = [(f / "model.safetensors").stat().st_size for f in (half, folder)]
    assert sizes[0] < 0.6 * sizes[1], f"half precision takes half the room: {sizes}"
    loaded = Muse.from_pretrained(half, device="cpu")
    assert {p.dtype for p in loaded.parts.parameters()} == {torch.float32}, "on a CPU weights are float32 again"
    for a, b in zip(loaded.parts.parameters(), tiny_muse.parts.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype).float()), "each weight is the rounded one"
    assert {p.dtype for p in tiny_muse.parts.parameters()} == {torch.float32}, "saving leaves the model as it is"
    assert len(loaded.generate(A, seed=0, steps=2)) == 1, "it draws"


def test_bf16_draws_on_a_cpu(folder, tiny_text, image):
    muse = Muse.from_pretrained(folder, device="cpu")
    muse.encoder = tiny_text
    assert muse.to(dtype=torch.bfloat16) is muse, ".to() returns the Muse itself"
    assert {p.dtype for p in muse.parts.parameters()} == {torch.bfloat16}, "all four networks move"
    (picture,) = muse.generate(A, seed=0, guidance=2, negative_prompt=B)
    assert len(np.unique(pixels(picture))) > 10, "bf16 must draw a picture"
    assert muse.edit(image, A, seed=0, iterations=1)[0].size == image.size, "and edit"


def test_the_dtype_is_picked_by_size_or_told(tiny_muse, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(minimuse.muse, "pick_dtype", lambda *about: asked.append(about) or torch.bfloat16)
    size = sum(p.numel() for p in tiny_muse.parts.parameters())
    assert Muse.from_pretrained(folder, device="cpu").dtype == torch.bfloat16
    assert asked == [(torch.device("cpu"), size)]
    assert Muse.from_pretrained(folder, device="cpu", dtype=torch.float32).dtype == torch.float32
    assert len(asked) == 1, "what the user says holds"


def test_pitfall_18_everything_is_frozen(tiny_muse, folder):
    tiny_muse.generate(A, seed=0, steps=1)
    for muse in (tiny_muse, Muse.from_pretrained(folder, device="cpu")):
        assert not any(p.requires_grad for p in muse.parts.parameters()), "no weight asks for a gradient"
        assert not any(m.training for m in muse.parts.modules()), "every module is in eval mode"
    lm = tiny_muse.encoder._lm
    assert not lm.training, "the language model is in eval mode"
    assert not any(p.requires_grad for p in lm.parameters()), "the language model is frozen"


def test_parameter_counts_are_the_real_ones(tiny_muse):
    counted = parameter_counts(tiny_muse.config)
    for name, n in counted.items():
        real = sum(p.numel() for p in getattr(tiny_muse, name).parameters())
        assert n == real, f"{name}: counted {n:,} on the meta device, it has {real:,}"
    assert list(counted) == ["low_tokenizer", "base", "high_tokenizer", "superres"], f"{list(counted)}"


@pytest.mark.parametrize(("part", "published"), [("base", 632e6), ("superres", 268e6)])
def test_the_papers_sizes(part, published):
    n = parameter_counts(preset("paper_632m"))[part]
    assert abs(n / published - 1) < 0.02, f"{part} has {n / 1e6:.1f}M parameters, published {published / 1e6:.0f}M"


# --- no network -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pitfall_20_import_and_construction_ask_no_network():
    """In a process of its own: every module imported, a nano made from its configuration."""
    modules = sorted(p.stem for p in (ROOT / "minimuse").glob("*.py") if p.stem != "__init__")
    code = f"""
import os, sys

def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print(event, args, file=sys.stderr, flush=True)
        os._exit(3)

sys.addaudithook(hook)
import importlib
for name in {modules!r}:
    importlib.import_module("minimuse." + name)
from minimuse.muse import Muse, build
from minimuse.config import preset
from minimuse.text import TextEncoder
from minimuse.train_budget import stage_budget
config = preset("nano")
Muse(config, build(config), TextEncoder(config.text_encoder, max_tokens=config.text_tokens))
TextEncoder("nobody/has-this-one")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"rc {done.returncode}: {done.stderr[-1000:]}"


def test_pitfall_20_loading_and_drawing_ask_no_network(tiny_muse, folder, no_network):
    assert Muse(tiny_muse.config, build(tiny_muse.config), TextEncoder("nobody/has-this-one")).encoder is not None
    loaded = Muse.from_pretrained(folder, device="cpu")
    assert len(loaded.generate(A, seed=0, steps=1)) == 1, "with its language model on disk, Muse needs no network"


def test_pitfall_21_no_pickle_on_the_way(tiny_muse, tmp_path, monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        pytest.fail("a pickle was read or written")

    for module, names in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "dumps"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    folder = tiny_muse.save_pretrained(tmp_path / "tiny")
    assert Muse.from_pretrained(folder, device="cpu").config == tiny_muse.config, "safetensors and JSON only"
    assert (folder / "model.safetensors").read_bytes()[8:9] == b"{", "a safetensors file begins with its JSON header"
