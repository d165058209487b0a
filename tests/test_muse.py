"""muse.py and the pictures of editing.py: the user's API, on a tiny Muse with random weights (Muse figure 3, 3.3).

Where tokens must be equal, the weights are in float64: rounding cannot tip a draw.
"""

import inspect
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minimuse.muse
import minimuse.utils
from minimuse import checkpoint, editing
from minimuse.config import PRESETS, preset
from minimuse.muse import DIFFUSERS_NAMES, Muse, build, parameter_counts
from minimuse.text import TextEncoder
from minimuse.utils import pick_device, pick_dtype

ROOT = Path(__file__).resolve().parent.parent
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


def test_a_seed_is_a_picture(tiny_muse):
    one, two = (tiny_muse.generate(A, seed=1, steps=3)[0].tobytes() for _ in range(2))
    assert one == two, "the same seed must draw the same picture"
    other = tiny_muse.generate(A, seed=2, steps=3)[0].tobytes()
    assert one != other, "another seed must draw another picture"
    assert one != tiny_muse.generate(B, seed=1, steps=3)[0].tobytes(), "another prompt must draw another picture"


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
    plain = final_tokens(exact, B, seed=1, guidance=0, steps=4)
    cancelled = final_tokens(exact, B, seed=1, guidance=5, negative_prompt=B, steps=4)
    guided = final_tokens(exact, B, seed=1, guidance=5, steps=4)
    away = final_tokens(exact, B, seed=1, guidance=5, negative_prompt="a green ball", steps=4)
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
    seen = list(tiny_muse.steps(A, seed=0, guidance=guidance, steps=3))
    assert [s.guidance for s in seen] == expected * 2, f"{[s.guidance for s in seen]}"


def test_guidance_of_another_kind_is_refused(tiny_muse):
    with pytest.raises(TypeError, match="a number, a pair"):
        tiny_muse.generate(A, guidance="strong")


def test_superres_settings_hold_for_that_stage_alone(exact):
    override = {"steps": 2, "guidance": 0, "sampling_temperature": 0.5}
    plain, changed = (list(exact.steps(A, seed=0, steps=4, guidance=2, **s)) for s in ({}, {"superres": override}))
    assert [s.stage for s in plain] == ["base"] * 4 + ["superres"] * 4, "steps holds for both stages"
    assert [s.stage for s in changed] == ["base"] * 4 + ["superres"] * 2, "superres={'steps': 2} for that one"
    for a, b in zip(plain[:4], changed[:4], strict=True):
        assert torch.equal(a.tokens, b.tokens), f"base step {a.index} must not notice"
    assert [s.guidance for s in changed[4:]] == [0, 0], "superres={'guidance': 0} is followed"


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


@pytest.mark.parametrize(
    "order", ["random", "raster", "halton", "entropy", "margin", lambda logits, d, m, u: d.float()]
)
def test_another_order_ranks_without_noise(tiny_muse, monkeypatch, order):
    seen = spy_on_decode(monkeypatch)
    tiny_muse.generate(A, seed=0, order=order, steps=2)
    tiny_muse.generate(A, seed=0, order=order, steps=2, choice_temperature=1.5)
    noise = [settings["choice_temperature"] for _, settings in seen]
    assert noise == [0, 0, 1.5, 1.5], f"0 unless it is given: {noise}"


def test_the_default_order_by_name_keeps_its_noise(tiny_muse, monkeypatch):
    seen = spy_on_decode(monkeypatch)
    tiny_muse.generate(A, seed=0, order=tiny_muse.config.base_sampling.order, steps=1)
    assert seen[0][1]["choice_temperature"] == tiny_muse.config.base_sampling.choice_temperature


def test_unknown_settings_list_the_known(tiny_muse):
    known = "choice_temperature, guidance, order, remask, sampling_temperature, schedule, steps, top_k"
    with pytest.raises(TypeError, match=f"unknown setting strength, temperature; known: {known}"):
        tiny_muse.generate(A, temperature=1.0, strength=0.5)
    with pytest.raises(TypeError, match="unknown setting stages"):
        tiny_muse.generate(A, superres={"stages": 3})
    with pytest.raises(TypeError, match="iteration"):
        tiny_muse.edit(Image.new("RGB", (64, 64)), A, iteration=3)


@pytest.mark.parametrize(
    ("name", "value", "ours"),
    [
        ("guidance_scale", 7.5, r"guidance=t with t = guidance_scale - 1"),
        ("num_inference_steps", 12, "steps"),
        ("num_images_per_prompt", 2, r"\bn\b"),
        ("generator", None, "seed"),
        ("mask_image", None, r"\bmask\b"),
    ],
)
def test_names_of_diffusers_are_translated(tiny_muse, image, name, value, ours):
    assert name in DIFFUSERS_NAMES, f"{name} is a name that diffusers users will type"
    calls = [tiny_muse.generate, tiny_muse.steps, lambda p, **kw: tiny_muse.edit(image, p, **kw)]
    calls += [lambda p, **kw: tiny_muse.inpaint(image, image, p, **kw)]
    calls += [lambda p, **kw: tiny_muse.outpaint(image, 8, p, **kw)]
    for call in calls:
        with pytest.raises(TypeError, match=f"{name} is diffusers' name; here it is .*{ours}"):
            call(A, **{name: value})


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "match"),
    [
        ([], {}, ValueError, "at least one prompt"),
        (A, {"n": 0}, ValueError, "n of at least 1"),
        (A, {"n": -1}, ValueError, "n of at least 1"),
        (A, {"n": 1.5}, ValueError, "n of at least 1"),
        ([A, 3], {}, TypeError, "give texts"),
        ([A, None], {}, TypeError, "give texts"),
        ([A, B], {"seed": [1]}, ValueError, "1 seeds for 2 pictures"),
        (A, {"n": 2, "seed": [1, 2, 3]}, ValueError, "3 seeds for 2 pictures"),
        ([A, B], {"negative_prompt": [A]}, ValueError, "1 negative prompts for 2 prompts"),
        (A, {"negative_prompt": []}, ValueError, "0 negative prompts for 1 prompts"),
        (A, {"steps": 0}, ValueError, "steps is 0"),
        (A, {"steps": 2.5}, ValueError, r"steps is 2\.5"),
        (A, {"superres": {"steps": 0}}, ValueError, "steps is 0"),
        (A, {"schedule": "cosinus"}, ValueError, "unknown schedule 'cosinus'; known: cosine"),
        (A, {"order": "confident"}, ValueError, "unknown order 'confident'; known: confidence"),
        (A, {"sampling_temperature": -1}, ValueError, "temperatures"),
        (A, {"top_k": 0}, ValueError, "top_k is 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tiny_muse, prompts, settings, error, match):
    with pytest.raises(error, match=match):
        tiny_muse.generate(prompts, **settings)


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
    assert 'Try "x"; "y"; "z"' in err, f"it gives three prompts to try: {err}"
    muse.generate([far, far], seed=0, steps=1)
    muse.generate(["A red cube!", "a red teapot"], seed=0, steps=1)
    assert capsys.readouterr().err == "", "once a prompt; a prompt that is mostly known goes without"
    muse.generate("dogs and cats", seed=0, steps=1)
    assert capsys.readouterr().err.count("\n") == 1, "another prompt, another line"


@pytest.mark.parametrize("far", ["красный куб", "röd kub på gård", "一只猫"])
def test_unknown_words_of_any_alphabet(tiny_muse, capsys, far):
    muse = Muse(
        tiny_muse.config, tiny_muse.parts, tiny_muse.encoder, words=["a", "red", "cube"], examples=["x", "y", "z"]
    )
    muse.generate(far, seed=0, steps=1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1, f"{far!r} is far outside: {err!r}"
    assert far.split()[0] in err, f"it names the words whole: {err}"


def test_without_a_list_of_words_nothing_is_told(tiny_muse, capsys):
    Muse(tiny_muse.config, tiny_muse.parts, tiny_muse.encoder).generate("quixotic zebras", seed=0, steps=1)
    assert capsys.readouterr().err == "", "a checkpoint that does not know its words stays silent"


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
    monkeypatch.setattr(exact.superres, "memory", lambda text, low: (read.append(low), memory(text, low))[1])
    low, _ = final_tokens(exact, [A, B], seed=0, steps=2)
    assert len(read) == 2, f"once with text and once without, not once a step: {len(read)}"
    for tokens in read:
        assert torch.equal(tokens, low), "pitfall 1: super-resolution must read what the base model drew"


def test_picture_of_a_step(tiny_muse):
    sides = {"base": tiny_muse.config.low_tokenizer.image_size, "superres": tiny_muse.config.high_tokenizer.image_size}
    for step in tiny_muse.steps(A, n=2, seed=0, steps=2):
        pictures = tiny_muse.picture(step)
        assert [p.size for p in pictures] == [(sides[step.stage],) * 2] * 2, f"{step.stage}: {pictures}"
    assert pictures[0].tobytes() == tiny_muse.generate(A, n=2, seed=0, steps=2)[0].tobytes(), "the last is the picture"


# --- inpainting (3.3.1) -----------------------------------------------------------------------------------------------


def rectangle(image: Image.Image) -> np.ndarray:
    mask = np.zeros(image.size[::-1], dtype=bool)
    mask[20:45, 3:30] = True
    return mask


def as_rgb(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")


MASKS = {
    "PIL 1": lambda m: as_rgb(m).convert("1"),
    "PIL L": lambda m: as_rgb(m).convert("L"),
    "PIL RGB": as_rgb,
    "numpy bool": lambda m: m,
    "numpy uint8": lambda m: m.astype(np.uint8) * 255,
    "numpy float": lambda m: m.astype(np.float32),
    "tensor bool": torch.from_numpy,
    "tensor float": lambda m: torch.from_numpy(m).float(),
}


@pytest.mark.parametrize("kind", MASKS)
def test_inpaint_keeps_the_users_pixels(tiny_muse, image, kind):
    mask, before = rectangle(image), image.tobytes()
    (new,) = tiny_muse.inpaint(image, MASKS[kind](mask), A, seed=0, steps=2)
    assert (new.mode, new.size) == ("RGB", image.size), f"{new.mode} {new.size}"
    assert (pixels(new)[~mask] == pixels(image)[~mask]).all(), "outside the mask every pixel is the user's"
    assert (pixels(new)[mask] != pixels(image)[mask]).any(1).mean() > 0.9, "inside it is new"
    assert image.tobytes() == before, "the user's image is never written to"
    (plain,) = tiny_muse.inpaint(image, mask, A, seed=0, steps=2)
    assert new.tobytes() == plain.tobytes(), f"a mask as {kind} must mean the same as a boolean one"


def test_inpaint_without_keep_is_the_decoders_picture(tiny_muse, image):
    mask = rectangle(image)
    kept, made = (tiny_muse.inpaint(image, mask, A, seed=0, steps=2, keep=keep)[0] for keep in (True, False))
    assert (pixels(made)[~mask] != pixels(image)[~mask]).any(), "keep=False shows the decoder's pixels everywhere"
    assert (pixels(made)[mask] == pixels(kept)[mask]).all(), "keep changes nothing inside the mask"


def test_inpaint_draws_n_and_tells_what_made_them(tiny_muse, image):
    images = tiny_muse.inpaint(image, rectangle(image), A, n=3, seed=4, steps=2)
    assert len({i.tobytes() for i in images}) == 3, "three seeds, three pictures"
    told = [i.info["minimuse"] for i in images]
    assert [t["seed"] for t in told] == [4, 5, 6], f"{told}"
    assert all(t["task"] == "inpaint" and t["prompt"] == A for t in told), f"{told}"
    again = tiny_muse.inpaint(image, rectangle(image), A, seed=5, steps=2)[0]
    off = np.abs(pixels(again) - pixels(images[1])).max()
    assert off <= 1, f"a picture alone and among three: pixels differ by {off}"


def test_pitfall_16_one_pixel_masks_the_tokens_that_hold_it(exact, image, monkeypatch):
    config, (x, y) = exact.config, (13, 42)
    seen = spy_on_decode(monkeypatch)
    mask = np.zeros(image.size[::-1], dtype=bool)
    mask[y, x] = True
    (new,) = exact.inpaint(image, mask, A, seed=0, steps=2)
    (low, _), (high, _) = seen
    given_low, given_high = editing.tokenize(exact, image)
    covered = config.high_tokenizer.image_size // config.base.grid  # picture pixels a low token covers, each way
    f = config.high_tokenizer.downsampling
    at_low = y // covered * config.base.grid + x // covered
    at_high = y // f * config.superres.grid + x // f
    assert (low[0] == exact.base.mask_id).nonzero().flatten().tolist() == [at_low], "the one low token that holds it"
    assert (high[0] == exact.superres.mask_id).nonzero().flatten().tolist() == [at_high], "and the one high token"
    for start, given, at in ((low, given_low, at_low), (high, given_high, at_high)):
        rest = torch.arange(given.shape[1]) != at
        assert torch.equal(start[0, rest], given[0, rest]), "all other tokens are those of the picture"
    changed = (pixels(new) != pixels(image)).any(2).nonzero()
    assert set(zip(*changed, strict=True)) <= {(y, x)}, f"only the masked pixel may change: {changed}"


def test_inpaint_leaves_tokens_outside_as_they_are(exact, image):
    low, high = editing.tokenize(exact, image)
    mask = rectangle(image)
    ends = {}
    exact.inpaint(image, mask, A, seed=0, steps=2, callback=lambda s: ends.update({s.stage: s}))
    for stage, given, side in (("base", low, exact.config.base.grid), ("superres", high, exact.config.superres.grid)):
        size = len(mask) // side
        covered = torch.from_numpy(mask).view(side, size, side, size).any(3).any(1).flatten()
        assert torch.equal(ends[stage].tokens[0, ~covered], given[0, ~covered]), f"{stage}: given tokens were redrawn"
        assert not torch.equal(ends[stage].tokens[0, covered], given[0, covered]), f"{stage}: nothing was repainted"


def test_everything_may_be_repainted(tiny_muse, image):
    (new,) = tiny_muse.inpaint(image, np.ones(image.size[::-1], dtype=bool), A, seed=0, steps=2)
    drawn = tiny_muse.generate(A, seed=0, steps=2)[0]
    assert new.tobytes() == drawn.tobytes(), "a mask of everything is `generate`"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_inpaint_takes_the_usual_modes(tiny_muse, image, mode):
    mask, given = rectangle(image), image.convert(mode)
    before = given.tobytes()
    (new,) = tiny_muse.inpaint(given, mask, A, seed=0, steps=1)
    assert (pixels(new)[~mask] == pixels(given)[~mask]).all(), f"{mode}: outside the mask every pixel is the user's"
    assert (given.mode, given.tobytes()) == (mode, before), "the user's image is never written to"


def test_pictures_that_do_not_fit_are_refused(tiny_muse, image):
    side, mask = image.width, rectangle(image)
    calls = [
        lambda picture: tiny_muse.inpaint(picture, mask, A),
        lambda picture: tiny_muse.outpaint(picture, 8, A),
        lambda picture: tiny_muse.edit(picture, A),
        lambda picture: next(tiny_muse.edit_steps(picture, A)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"str came.*PIL\.Image\.open"):
            call("cat.png")
        with pytest.raises(ValueError, match=rf"{side} x {side} pixels, {side} x 8 came.*resize"):
            call(image.resize((side, 8)))
        with pytest.raises(ValueError, match="CMYK"):
            call(image.convert("CMYK"))


def test_masks_that_do_not_fit_are_refused(tiny_muse, image):
    with pytest.raises(ValueError, match="8 x 9 came"):
        tiny_muse.inpaint(image, np.ones((9, 8), dtype=bool), A)
    with pytest.raises(ValueError, match="came"):
        tiny_muse.inpaint(image, None, A)
    with pytest.raises(ValueError, match=r"mask is empty.*white is what to repaint"):
        tiny_muse.inpaint(image, Image.new("L", image.size), A)


# --- outpainting (3.3.1) ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [5, 16, (24, 0, 0, 0), (0, 7, 3, 0), [0, 0, 0, 32]])
def test_outpaint_grows_by_the_padding_and_keeps_the_picture(tiny_muse, image, padding):
    left, top, right, bottom = padding if isinstance(padding, tuple | list) else (padding,) * 4
    before, side = image.tobytes(), image.width
    (new,) = tiny_muse.outpaint(image, padding, A, seed=0, steps=1)
    assert new.size == (left + side + right, top + side + bottom), f"padding {padding} made {new.size}"
    kept = new.crop((left, top, left + side, top + side))
    assert kept.tobytes() == image.tobytes(), "the picture's own pixels come back bit for bit"
    assert image.tobytes() == before, "the user's image is never written to"
    told = new.info["minimuse"]
    assert (told["task"], told["prompt"], told["seed"]) == ("outpaint", A, 0), f"{told}"
    assert told["padding"] == [left, top, right, bottom], f"{told}"


def test_outpaint_by_more_than_the_picture(tiny_muse, image):
    side = image.width
    padding = (side + 20, 0, 0, 9)
    (new,) = tiny_muse.outpaint(image, padding, A, seed=0, steps=1)
    assert new.size == (2 * side + 20, side + 9), f"{new.size}"
    assert new.crop((side + 20, 0, 2 * side + 20, side)).tobytes() == image.tobytes(), "kept bit for bit"
    black = (pixels(new) == 0).all(2)
    assert black.mean() < 0.05, f"{black.mean():.0%} of the canvas was never painted"


def test_outpaint_sees_what_stands(tiny_muse, image, monkeypatch):
    seen = spy_on_decode(monkeypatch)
    tiny_muse.outpaint(image, 24, A, seed=0, steps=1)
    for tokens, _ in seen[::2]:
        share = (tokens == tiny_muse.base.mask_id).float().mean().item()
        assert 0 < share < 1, f"a window masks {share:.0%} of its low tokens: it should overlap what stands"


def test_outpaint_draws_n(tiny_muse, image):
    images = tiny_muse.outpaint(image, 8, A, n=2, seed=3, steps=1)
    assert [i.info["minimuse"]["seed"] for i in images] == [3, 4], "picture i draws with seed + i"
    assert images[0].tobytes() != images[1].tobytes(), "two seeds, two pictures"


@pytest.mark.parametrize("padding", [0, -1, (0, 0, 0, 0), (8, -8, 0, 0), (8, 8), (1, 2, 3, 4, 5), ()])
def test_outpaint_refuses_padding_that_makes_no_sense(tiny_muse, image, padding):
    with pytest.raises(ValueError, match="give pixels to add, 1 number or 4"):
        tiny_muse.outpaint(image, padding, A)


# --- mask-free editing (3.3.2) ----------------------------------------------------------------------------------------


def test_edit_defaults_are_the_papers():
    defaults = {k: p.default for k, p in inspect.signature(editing.edit_tokens).parameters.items()}
    paper = {"iterations": 100, "fraction": 0.08, "top_k": 3}
    assert {k: defaults[k] for k in paper} == paper, f"Muse 3.3.2: {paper}; {defaults}"
    assert {name: preset(name).edit_guidance for name in PRESETS if name != "toy"} == dict.fromkeys(
        ("nano", "paper_632m", "paper_3b"), 4.0
    ), "guidance 4; toy, which loses shapes by it, says so"
    assert checkpoint.load("toy")[0].edit_guidance == preset("toy").edit_guidance == 1.0, "preset and checkpoint alike"


def test_a_checkpoint_may_edit_with_a_guidance_of_its_own(exact, image):
    exact.config = replace(exact.config, edit_guidance=1.5)
    for given, t in (({}, 1.5), ({"guidance": None}, 1.5), ({"guidance": 0.0}, 0.0), ({"guidance": (1.0, 3.0)}, None)):
        steps = exact.edit_steps(image, A, seed=0, iterations=2, superres={"steps": 1}, **given)
        told = [s.guidance for s in steps if s.stage == "base"]
        assert told == ([t, t] if t is not None else [1.0, 3.0]), f"{given}: {told}"
    with pytest.raises(ValueError, match=r"edit_guidance -1.0 is negative"):
        replace(exact.config, edit_guidance=-1.0)


def test_edit_changes_a_share_of_the_tokens_at_a_time(exact, image):
    before, _ = editing.tokenize(exact, image)
    most = math.ceil(0.08 * before.shape[1])
    trace = list(exact.edit_steps(image, A, seed=0, iterations=3, superres={"steps": 2}))
    assert [s.stage for s in trace] == ["base"] * 3 + ["superres"] * 2, "iterations first, then super-resolution"
    assert [s.index for s in trace[:3]] == [0, 1, 2], "iterations are counted"
    for step in trace[:3]:
        changed = step.tokens != before
        assert step.revealed.sum() == most, f"iteration {step.index} resamples {step.revealed.sum()} of {most} tokens"
        assert not (changed & ~step.revealed).any(), f"iteration {step.index} changes tokens outside its share"
        assert not step.masked.any(), "every state on the way is a whole picture"
        assert step.guidance == 4, "guidance 4 by default"
        before = step.tokens
    assert trace[-1].tokens.shape[1] == exact.config.superres.tokens, "it ends with a high-resolution picture"


def test_edit_tells_a_rising_guidance(exact, image):
    steps = exact.edit_steps(image, A, seed=0, iterations=3, guidance=(0, 4), superres={"steps": 1})
    assert [s.guidance for s in steps][:3] == [0, 2, 4], "it rises along the iterations"


def test_edit_superres_reads_the_edited_tokens(exact, image, monkeypatch):
    read, memory = [], exact.superres.memory
    monkeypatch.setattr(exact.superres, "memory", lambda text, low: (read.append(low), memory(text, low))[1])
    base = [s for s in exact.edit_steps(image, A, iterations=2, superres={"steps": 1}) if s.stage == "base"]
    assert torch.equal(read[0], base[-1].tokens), "super-resolution must read what the iterations ended with"


def test_edit_gives_pictures(tiny_muse, image):
    before = image.tobytes()
    settings = {"iterations": 2, "fraction": 0.5, "superres": {"steps": 1}}
    images = tiny_muse.edit(image, A, n=2, seed=1, negative_prompt=B, **settings)
    assert [i.size for i in images] == [image.size] * 2, f"{images}"
    assert images[0].tobytes() != images[1].tobytes(), "two seeds, two pictures"
    told = images[1].info["minimuse"]
    expected = {"model": "tiny", "fingerprint": tiny_muse.fingerprint, "task": "edit", "guidance": 4.0}
    assert told == expected | {"prompt": A, "negative_prompt": B, "seed": 2} | settings, f"{told}"
    assert image.tobytes() == before, "the user's image is never written to"
    seen = []
    again = tiny_muse.edit(image, A, n=2, seed=1, negative_prompt=B, callback=seen.append, **settings)
    assert again[0].tobytes() == images[0].tobytes(), "the same seed, the same edit"
    assert [s.stage for s in seen] == ["base", "base", "superres"], "callback sees every step"


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"fraction": 0.0}, {"fraction": 1.5}])
def test_edit_refuses_nonsense(tiny_muse, image, wrong):
    with pytest.raises(ValueError, match="iterations of a fraction"):
        tiny_muse.edit(image, A, **wrong)


# --- save, load, move -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_save_load_same_pixels(tiny_muse, folder, kind):
    loaded = Muse.from_pretrained(kind(folder), device="cpu")
    assert loaded.config == tiny_muse.config, "the configuration must come back as it was"
    assert (loaded.words, loaded.examples) == (tiny_muse.words, tiny_muse.examples), "so must words and examples"
    for key, value in tiny_muse.parts.state_dict().items():
        assert torch.equal(loaded.parts.state_dict()[key], value), f"{key} changed on its way"
    a, b = (muse.generate([A, B], seed=0) for muse in (tiny_muse, loaded))
    assert [i.tobytes() for i in a] == [i.tobytes() for i in b], "save -> load must draw the same pixels"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tiny_muse, folder, tmp_path, dtype):
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
    assert muse.inpaint(image, rectangle(image), A, seed=0, steps=1)[0].size == image.size, "and inpaint"


@pytest.mark.parametrize(
    ("fast", "device", "parameters", "dtype"),
    [
        (True, "cpu", 30_000_000, torch.bfloat16),
        (True, "cpu", 29_999_999, torch.float32),
        (True, "cuda", 1, torch.bfloat16),
        (False, "cpu", 10**9, torch.float32),
        (False, "cuda", 10**9, torch.float32),
    ],
)
def test_bf16_where_it_is_fast_and_worth_it(monkeypatch, fast, device, parameters, dtype):
    monkeypatch.setattr(minimuse.utils, "fast_bf16", lambda device: fast)
    assert pick_dtype(torch.device(device), parameters) == dtype


def test_the_dtype_is_picked_by_size_or_told(tiny_muse, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(minimuse.muse, "pick_dtype", lambda *about: asked.append(about) or torch.bfloat16)
    size = sum(p.numel() for p in tiny_muse.parts.parameters())
    assert Muse.from_pretrained(folder, device="cpu").dtype == torch.bfloat16
    assert asked == [(torch.device("cpu"), size)]
    assert Muse.from_pretrained(folder, device="cpu", dtype=torch.float32).dtype == torch.float32
    assert len(asked) == 1, "what the user says holds"


@pytest.mark.slow
def test_compiled_it_draws_the_same(tiny_muse, folder, tiny_text):
    muse = Muse.from_pretrained(folder, device="cpu")
    muse.encoder = tiny_text
    assert muse.compile(backend="eager") is muse
    pair = [list(m.steps(A, n=2, seed=0, guidance=(0.0, 2.0))) for m in (tiny_muse, muse)]
    for plain, compiled in zip(*pair, strict=True):
        assert plain.tokens.equal(compiled.tokens), f"{plain.stage}, step {plain.index}"
    assert muse.base._compiled_call_impl is not None, "the switch reaches the networks"
    assert set(muse.parts.state_dict()) == set(tiny_muse.parts.state_dict()), "and leaves their names"


def test_pick_device(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu"), "a device that was named is taken"
    for cuda, mps, best in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device() == torch.device(best), f"cuda {cuda}, mps {mps}: expected {best}, {pick_device()} came"


@pytest.mark.parametrize("wrong", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(wrong):
    with pytest.raises(ValueError, match=wrong):
        pick_device(wrong)


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


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_counted_without_its_memory(name):
    counted = parameter_counts(preset(name))
    assert min(counted.values()) > 0, f"{counted}"


# --- no network -------------------------------------------------------------------------------------------------------


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


def test_what_is_masked_shows_as_the_nearest_known_token():
    x = None  # masked
    rows = [[7, x, x, x, 5, x, x, x, x], [x] * 9, list(range(1, 10))]
    masked = torch.tensor([[t is x for t in row] for row in rows])
    tokens = torch.tensor([[99 if t is x else t for t in row] for row in rows])
    shown = editing.fill_with_nearest(tokens, masked)
    assert shown[0, [0, 2, 4, 5, 6, 7, 8]].tolist() == [7, 5, 5, 5, 5, 5, 5], "the centre is nearer than the corner"
    assert set(shown[0, [1, 3]].tolist()) <= {5, 7}, "between both, either"
    assert shown[1].tolist() == [0] * 9, "nothing is known"
    assert shown[2].tolist() == rows[2], "all is known"
