"""config.py and the dataclasses of the components: checks, presets, JSON and back, changes by path."""

import dataclasses
import json
import math
import random
from dataclasses import replace
from decimal import Decimal
from typing import get_args

import numpy as np
import pytest
import torch

from minimuse.config import PRESETS, STAGES, StageConfig, from_dict, preset, to_dict
from minimuse.sampler import SamplingConfig
from minimuse.transformer import TransformerConfig
from minimuse.vqgan import VQGANConfig

# Sizes of the tests' own: nano's numbers may be tuned.
TOKENIZER = VQGANConfig(32, 256, 8, 16, (1, 2, 4), (1, 1, 2), 16, (1, 1, 2))
BASE = TransformerConfig(codebook_size=256, grid=8, text_width=384, width=160, layers=5, heads=5, mlp_width=640)
SR = TransformerConfig(
    codebook_size=256,
    grid=16,
    text_width=384,
    width=128,
    layers=4,
    heads=4,
    mlp_width=512,
    block=4,
    low_layers=2,
    low_grid=8,
    low_codebook_size=256,
)
NANO = replace(
    preset("nano"),
    low_tokenizer=TOKENIZER,
    high_tokenizer=replace(TOKENIZER, image_size=64),
    base=BASE,
    superres=SR,
    finetuned_width=32,
    finetuned_blocks=(2, 2, 2),
)
STAGE = NANO.stages["base"]


# --- nonsense is refused, with a hint ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "change", "match"),
    [
        # image size and downsampling
        (TOKENIZER, {"image_size": 34}, r"image_size is 34; give a multiple of 4, such as 32"),
        (TOKENIZER, {"image_size": 3}, r"image_size is 3; give a multiple of 4, such as 4"),
        (TOKENIZER, {"image_size": 0}, r"VQGANConfig\.image_size is 0; give a positive whole number"),
        (TOKENIZER, {"image_size": 32.0}, r"image_size is 32\.0; give a positive whole"),
        (TOKENIZER, {"codebook_size": -5}, r"codebook_size is -5; give a positive"),
        (TOKENIZER, {"code_dim": 0}, r"code_dim is 0; give a positive"),
        # widths and depths
        (TOKENIZER, {"width": 20}, r"VQGANConfig\.width is 20; give a multiple of 16, such as 16"),
        (TOKENIZER, {"width": 30}, r"such as 32"),
        (TOKENIZER, {"decoder_width": 8}, r"decoder_width is 8; give a multiple of 16, such as 16"),
        (TOKENIZER, {"blocks": (1, 1)}, "one number of blocks"),
        (TOKENIZER, {"decoder_blocks": (1, 1, 1, 1)}, "decoder_blocks per resolution"),
        (TOKENIZER, {"multipliers": ()}, "give one multiplier"),
        # transformers
        (BASE, {"width": 162}, r"TransformerConfig\.width is 162; give a multiple of 5, such as 160"),
        (BASE, {"layers": 0}, r"TransformerConfig\.layers is 0; give a positive"),
        (BASE, {"grid": -8}, r"grid is -8"),
        (BASE, {"heads": 0}, r"heads is 0"),
        (BASE, {"mlp_width": "wide"}, r"mlp_width is 'wide'"),
        (BASE, {"text_width": None}, r"text_width is None"),
        (SR, {"block": 3}, r"TransformerConfig\.grid is 16; give a multiple of 3, such as 15"),
        (BASE, {"text_layers": 1}, r"heads is 5; give a multiple of 2"),
        (SR, {"heads": 1}, r"heads is 1; give a multiple of 2, such as 2"),
        # sampling and stages
        (STAGE, {"steps": -1}, r"StageConfig\.steps is -1"),
        (STAGE, {"batch": 0}, r"batch is 0"),
        (STAGE, {"optimizer": "sgd"}, r"optimizer is 'sgd'; give one of adamw, adafactor, muon"),
        (STAGE, {"text_lr_scale": 1.5}, r"text_lr_scale is 1\.5; give a fraction"),
        (STAGE, {"cond_drop_prob": 1.5}, r"cond_drop_prob is 1\.5; give a fraction"),
        (STAGE, {"ema": 1.5}, r"ema is 1\.5; give a fraction"),
        # NaN passes no comparison
        (STAGE, {"learning_rate": math.nan}, r"learning_rate is nan"),
        (STAGE, {"weight_decay": math.nan}, r"weight_decay is nan"),
        (NANO, {"synonyms": 1.5}, r"synonyms is 1\.5; give a fraction"),
        # types and ranges come from the annotations
        (STAGE, {"warmup": "x"}, r"StageConfig\.warmup is 'x'; give 0 or a positive whole number"),
        (STAGE, {"warmup": -1}, r"warmup is -1"),
        (STAGE, {"crop": -1}, r"crop is -1"),
        (STAGE, {"steps": True}, r"steps is True"),
        (STAGE, {"batch": 10**13}, r"batch is 10000000000000; give a positive whole number, at most 2\*\*17"),
        (STAGE, {"learning_rate": 0}, r"learning_rate is 0; give a number above 0"),
        (STAGE, {"clip": math.nan}, r"clip is nan"),
        (STAGE, {"betas": "x"}, r"betas is 'x'; give a list"),
        (STAGE, {"betas": (0.9,)}, r"betas is \(0\.9,\); give 2 values"),
        (STAGE, {"betas": (0.9, 1.0)}, r"betas\[1\] is 1\.0; give a fraction, from 0 to below 1"),
        (STAGE, {"mask_schedule": "stairs"}, r"mask_schedule is 'stairs'; give the name of a schedule: cosine, arccos"),
        (STAGE, {"perceptual": None}, r"perceptual is None; give one of scenes, lpips, none"),
        (NANO, {"stages": {"bass": STAGE}}, r"a key of MuseConfig\.stages is 'bass'; give one of low_tokenizer, base"),
        (NANO, {"fractions": (0, 0, 0)}, r"fractions are all 0"),
        (NANO, {"text_tokens": 2}, r"text_tokens is 2; give at least 3"),
        (NANO, {"finetuned_width": 40}, r"finetuned_width is 40; give a multiple of 16, >= 16"),
        (NANO, {"base": 3}, r"MuseConfig\.base is 3; give a TransformerConfig"),
        (NANO.base_sampling, {"guidance": None}, r"SamplingConfig\.guidance is None; give a list"),
        (NANO.base_sampling, {"order": "best"}, r"order is 'best'; give confidence, random"),
        (
            NANO.base_sampling,
            {"sampling_temperature": -0.1},
            r"sampling_temperature is -0\.1; give a number, 0 or more",
        ),
    ],
)
def test_nonsense_is_refused_with_a_hint(config, change, match):
    with pytest.raises(ValueError, match=match):
        replace(config, **change)


NONSENSE = [None, math.nan, math.inf, -math.inf, b"3", ["x"], {"x": 1}, 1j, -(10**400), object(), int, [[1]], {1, 2}]
NONSENSE += [(None, None), (math.nan, 1.0), (1.0, "x"), {"base": 3}, {3: STAGE}, np.float64("nan"), np.array([1, 2])]
NONSENSE += [torch.zeros(2), Decimal(1), range(3)]


def refusal(make):
    """What the ValueError says, or "" if there is none."""
    try:
        make()
    except ValueError as error:
        return str(error)
    return ""


def test_no_field_takes_nonsense():
    """Every field of every configuration with every value that is of no field's kind: the error names the field."""
    tries = 0
    for config in (STAGE, NANO, TOKENIZER, BASE, SR, NANO.base_sampling):
        for field in dataclasses.fields(config):
            name = f"{type(config).__name__}.{field.name}"
            texts = [text for text in ("", "x") if field.type is not str and text not in get_args(field.type)]
            for value in NONSENSE + texts + ([] if field.type is bool else [True]):
                said = refusal(lambda c=config, f=field, v=value: replace(c, **{f.name: v}))
                assert name in said, f"{name} = {value!r}: {said}"
                tries += 1
    assert tries > 1800, f"only {tries} values"


def test_500_configurations_from_json():
    """Random changes of a whole configuration: it loads, or one sentence says what is wrong."""
    draw = random.Random(0)
    refused = 0
    values_of_json = [None, True, -1, 0, 3, 1e400, 1e30, "x", [], [1] * 3, {}, 2**80]
    for _ in range(500):
        values = json.loads(json.dumps(to_dict(NANO)))
        changed = []
        for _ in range(draw.randint(1, 3)):
            part = values
            while True:
                key = draw.choice(sorted(part))
                if not isinstance(part[key], dict) or not part[key] or draw.random() < 0.2:
                    break
                part = part[key]
            part[key] = draw.choice(values_of_json)
            changed.append(key)
        said = refusal(lambda v=values: from_dict(v))
        refused += bool(said)
        words = [*changed, "codebook_size", "grid", "missing", "multiple", "per resolution"]  # several fields disagree
        assert not said or any(word in said for word in words), f"{changed}: {said}"
    assert refused > 400, f"only {refused} of 500 were refused"


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_numpy_and_torch_scalars_are_numbers(number):
    stage = replace(STAGE, steps=number, learning_rate=number)
    assert (type(stage.steps), stage.steps, type(stage.learning_rate)) == (int, 3, int), (
        "plain numbers, as JSON has them"
    )
    assert from_dict(json.loads(json.dumps(to_dict(replace(NANO, stages={"base": stage}))))).stages["base"] == stage


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"base": replace(BASE, codebook_size=128)},
            r"base\.codebook_size is 128 but low_tokenizer.* is 256; make them",
        ),
        ({"superres": replace(SR, codebook_size=128)}, r"superres\.codebook_size is 128 but high_tokenizer"),
        ({"superres": replace(SR, low_codebook_size=128)}, r"superres\.low_codebook_size is 128 but low_tokenizer"),
        ({"base": replace(BASE, grid=16)}, r"base\.grid is 16 but low_tokenizer\.grid is 8; make them equal"),
        ({"superres": replace(SR, grid=8)}, r"superres\.grid is 8 but high_tokenizer\.grid is 16"),
        ({"superres": replace(SR, low_grid=4)}, r"superres\.low_grid is 4 but low_tokenizer\.grid is 8"),
        ({"superres": replace(SR, text_width=768)}, r"superres\.text_width is 768 but base\.text_width is 384"),
        ({"superres": replace(SR, low_layers=0, low_grid=0)}, r"superres\.low_grid is 0 but low_tokenizer"),
        ({"finetuned_blocks": (1, 0, 2)}, r"finetuned_blocks is \(1, 0, 2\); give \(1, 1, 2\), or larger numbers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        replace(NANO, **change)


def test_a_fine_tuned_decoder_narrower_than_the_old_is_refused():
    high = replace(NANO.high_tokenizer, decoder_width=48)
    with pytest.raises(ValueError, match="finetuned_width is 32; give a multiple of 16, >= 48"):
        replace(NANO, high_tokenizer=high, finetuned_width=32)


def test_high_resolution_is_a_multiple_of_the_low():
    high = replace(NANO.high_tokenizer, image_size=48)
    superres = replace(SR, grid=12)
    with pytest.raises(ValueError, match="image_size is 48; give a multiple of 32"):
        replace(NANO, high_tokenizer=high, superres=superres)


def test_configurations_are_frozen():
    for config in (NANO, TOKENIZER, BASE, NANO.base_sampling, STAGE):
        name = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 1)


# --- derived sizes ----------------------------------------------------------------------------------------------------


def test_derived_sizes_by_hand():
    config = VQGANConfig(64, 10, 4, 16, (1, 2, 4, 4), (0, 1, 1, 1), 16, (1, 1, 1, 1))
    assert (config.downsampling, config.grid) == (8, 8), "three halvings; 64 / 8"
    model = TransformerConfig(codebook_size=10, grid=8, text_width=4, width=32, layers=1, heads=2, mlp_width=64)
    assert model.tokens == 64, "8 x 8 tokens"


def test_the_fine_tuned_tokenizer_differs_in_its_decoder_alone():
    for name in PRESETS:
        config = preset(name)
        high, tuned = dataclasses.asdict(config.high_tokenizer), dataclasses.asdict(config.finetuned_tokenizer)
        differ = {key for key in high if high[key] != tuned[key]}
        assert differ == {"decoder_width", "decoder_blocks"}, f"{name}: {differ} differ (Muse 2.5)"


# --- presets ----------------------------------------------------------------------------------------------------------


def shape(value):
    """A configuration with its numbers taken out."""
    if isinstance(value, dict):
        return {key: shape(v) for key, v in value.items()}
    if isinstance(value, bool) or not isinstance(value, int | float | tuple | list):
        return value
    return "numbers" if isinstance(value, tuple | list) else "number"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_differ_in_numbers_alone(name):
    """Besides the name: the LM that gives the numbers their text, and the paper's optimizer and perceptual loss."""
    mine, nano = shape(to_dict(preset(name))), shape(to_dict(NANO))
    assert mine["superres"].pop("draft") == (name in ("nano", "toy")), "the paper has no draft"
    del nano["superres"]["draft"]
    for part in (mine, nano):
        del part["name"], part["text_encoder"]
        for stage in part["stages"].values():
            assert stage.pop("optimizer") in ("adamw", "adafactor", "muon"), "an optimizer of its own"
            assert stage.pop("perceptual") in ("scenes", "lpips"), "a perceptual network of its own"
    assert mine == nano, f"{name} and nano differ in more than numbers"


def test_presets_carry_their_names_and_all_stages():
    for name in PRESETS:
        config = preset(name)
        assert config.name == name, f"{name} calls itself {config.name}"
        assert tuple(config.stages) == STAGES, f"{name} lacks a stage, or has them in another order"


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="unknown preset 'mega'; known: nano, toy, paper_632m, paper_3b"):
        preset("mega")


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("nano", (32, 4, 8), (64, 4, 16)),
        ("toy", (64, 8, 8), (128, 4, 32)),
        ("paper_632m", (256, 16, 16), (512, 8, 64)),
        ("paper_3b", (256, 16, 16), (512, 8, 64)),
    ],
)
def test_sizes_of_the_presets(name, low, high):
    config = preset(name)
    for part, expected in ((config.low_tokenizer, low), (config.high_tokenizer, high)):
        assert (part.image_size, part.downsampling, part.grid) == expected, f"{name}: pixels, f, tokens a side"
    if name != "nano":
        assert config.superres.tokens == 16 * config.base.tokens, f"{name}: the paper's 16-fold token ratio"


@pytest.mark.parametrize("name", ["paper_632m", "paper_3b"])
def test_the_papers_numbers(name):
    config = preset(name)
    assert (config.base_sampling.steps, config.superres_sampling.steps) == (24, 8), (
        "Muse 2.8: 24 steps for 256, 8 for 4096"
    )
    assert config.base.codebook_size == config.superres.codebook_size == 8192, "Muse A.2"
    assert config.base.text_width == 4096, "Muse 2.1: T5-XXL"
    assert (config.low_tokenizer.width, config.low_tokenizer.blocks) == (128, (2,) * 5), "Muse A.2"
    assert (config.finetuned_width, config.finetuned_blocks) == (256, (4,) * 4), "Muse A.2: the fine-tuned decoder"
    for stage in ("base", "superres"):
        s = config.stages[stage]
        assert (s.optimizer, s.learning_rate, s.weight_decay, s.batch) == ("adafactor", 1e-4, 0.045, 512), "Muse A.1"
        assert (s.warmup, s.betas, s.cond_drop_prob, s.mask_schedule) == (5000, (0.9, 0.96), 0.1, "cosine"), (
            "A.1, 2.6, 2.7"
        )
    for stage in ("low_tokenizer", "high_tokenizer"):
        s = config.stages[stage]
        assert (s.learning_rate, s.weight_decay, s.batch, s.steps) == (1e-4, 1e-4, 256, 1_000_000), "Muse A.2"
        assert (s.warmup, s.betas) == (10_000, (0.9, 0.99)), "Muse A.2"
        assert (s.perceptual_weight, s.adversarial_weight) == (0.05, 0.1), "Muse A.2"


def test_default_steps_belong_to_the_preset():
    """Near the paper's tokens a step: 256 / 24 = 11 and 4096 / 8 = 512, scaled to small grids."""
    for name in PRESETS:
        config = preset(name)
        for model, sampling in ((config.base, config.base_sampling), (config.superres, config.superres_sampling)):
            assert 1 <= sampling.steps <= model.tokens, f"{name}: {sampling.steps} steps for {model.tokens} tokens"
        assert config.base.tokens / config.base_sampling.steps <= 256 / 12, f"{name}: too few steps for the base model"
        assert config.superres.tokens / config.superres_sampling.steps <= 512, (
            f"{name}: more tokens a step than the paper"
        )


def test_guidance_rises_in_every_preset():
    for name in PRESETS:
        config = preset(name)
        for sampling in (config.base_sampling, config.superres_sampling):
            first, last = sampling.guidance
            assert first < last or first == last == 0, f"{name}: t goes from {first} to {last} (Muse 2.7: it rises)"
    assert SamplingConfig(steps=8, guidance=(0.0, 1.0)).choice_temperature == 4.5, "MaskGIT's released value"


# --- JSON and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_json(name):
    config = preset(name)
    back = from_dict(json.loads(json.dumps(to_dict(config))))
    assert back == config, f"{name} is not what it was"
    assert isinstance(back.base_sampling.guidance, tuple), "tuples come back as tuples"
    assert isinstance(back.stages["base"], StageConfig), "stages come back as what they were"
    assert hash(back.low_tokenizer) == hash(config.low_tokenizer), "and can still be hashed"


def change(path, value):
    values = json.loads(json.dumps(to_dict(NANO)))
    *parents, last = path.split(".")
    part = values
    for key in parents:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("base.layers", None, r"TransformerConfig.* missing .*'layers'. Was it written by another version"),
        ("superres", None, r"MuseConfig.* missing .*'superres'"),
        ("low_tokenizer.code_dim", None, r"VQGANConfig.* missing .*'code_dim'"),
        ("base_sampling.steps", None, r"SamplingConfig.* missing .*'steps'"),
        ("stages.base.batch", None, r"StageConfig.* missing .*'batch'"),
        ("base.causal", True, r"TransformerConfig.* unexpected .*'causal'. Was it written"),
        ("extra", 3, r"MuseConfig.* unexpected .*'extra'"),
        ("stages.decoder.speed", 3, r"StageConfig.* unexpected .*'speed'"),
        ("base", 3, r"MuseConfig\.base is 3; give a TransformerConfig"),
        ("base.width", 161, r"width is 161; give a multiple of 5"),
        ("superres.codebook_size", 5, r"superres\.codebook_size is 5"),
    ],
)
def test_broken_values_are_refused(path, value, match):
    with pytest.raises(ValueError, match=match):
        from_dict(change(path, value))


@pytest.mark.parametrize("values", [None, [], "nano", 3])
def test_what_is_no_object_is_refused(values):
    with pytest.raises(ValueError, match=r"MuseConfig is .*; give a MuseConfig"):
        from_dict(values)


def test_as_many_fine_tuned_blocks_as_resolutions():
    with pytest.raises(ValueError):
        from_dict(change("finetuned_blocks", [2, 2]))


def test_fields_with_a_default_may_be_missing():
    """So that an old file loads after a new field was added."""
    assert from_dict(change("base.dropout", None)) == NANO, "a missing field takes its default"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"base": {"layers": 10**11}}, "layers is 100000000000; give a positive whole number, at most 1000"),
        ({"base": {"width": 10**12}}, "width is 1000000000000; give a positive whole number"),
        ({"low_tokenizer": {"blocks": [1, 1, 10**9]}}, r"blocks\[2\] is 1000000000"),
        ({"stages": {"low_tokenizer": {"crop": 17}}}, "stages.low_tokenizer.crop is 17; give a multiple of 8, or 0"),
        ({"name": "\udcff"}, r"MuseConfig.name is '\\udcff'; give a text in UTF-8"),
    ],
)
def test_what_no_machine_could_build_is_refused_by_arithmetic(changes, match):
    def merge(old, new):
        return old | {k: merge(old[k], v) if isinstance(v, dict) else v for k, v in new.items()}

    with pytest.raises(ValueError, match=match):
        from_dict(merge(to_dict(preset("nano")), changes))
