"""benchmarks/binding.py at tiny size: what the swapped captions say, what is told outright, kept results, the table."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimuse import Muse, transformer
from minimuse.config import preset
from minimuse.data_scenes import Thing, box, relations
from minimuse.eval_networks import Detection, Detections
from minimuse.eval_prompts import matches, parse_prompt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import binding  # noqa: E402


def seen(things):
    return Detections(tuple(Detection(t.color, t.shape, t.size, t.material, t.x, t.depth, box(t), 1.0) for t in things))


def test_true_captions_are_true_and_swapped_ones_are_not():
    scenes, which, things, captions = binding.pairs(40, 64)
    assert len(which) == 40, "as many as asked for"
    for i, (true, swapped, recolored), said in zip(which, things, captions, strict=True):
        assert scenes.scene(i).things == true, "the first is the scene itself"
        spec = [parse_prompt(text) for text in said]
        assert [matches(seen(true), want).right for want in spec] == [True, False, False], f"{said} of {true}"
        assert matches(seen(swapped), spec[1]).right, f"{said[1]}: not what the scene with swapped things shows"
        assert matches(seen(recolored), spec[2]).right, f"{said[2]}: not what the scene with swapped colours shows"


def test_told_outright_is_a_number_a_word():
    """By hand: a large red cube of rubber, left of a small blue sphere of metal."""
    two = Thing("red", "cube", x=-1.0), Thing("blue", "sphere", "small", "metal", x=1.0)
    assert relations(*two) == {"left", "beside"}, "the scene of this test"
    rows = binding.told(two, 30)
    named = [{binding.WORDS[i] for i in row.nonzero()[:, 0]} for row in rows]
    assert named[0] == {"red", "cube", "large", "rubber", "left", "beside"}, "the first thing"
    assert named[1] == {"blue", "sphere", "small", "metal", "right", "beside"}, "the second thing"


def test_looking_everywhere_is_undone():
    before = transformer.directional_bias
    with binding.looking_everywhere(True):
        assert transformer.directional_bias(torch.ones(2, 3, dtype=torch.bool), 4).all(), "no head is held back"
    assert transformer.directional_bias is before, "the model reads otherwise from now on"


@pytest.mark.slow
def test_study_from_training_to_table(tmp_path, monkeypatch):
    muse, config = Muse.from_pretrained("toy", device="cpu", dtype=torch.float32), preset("toy")
    small = replace(config.base, layers=1)
    stage = replace(config.stages["base"], steps=2, batch=4)
    config = replace(config, base=small, stages={**config.stages, "base": stage})
    ways = ["projected", "ahead and back", "told outright"]
    results = binding.study(muse, config, tmp_path, ways, n=12, test=6)
    assert {way: len(found["nats"]) for way, found in results.items()} == dict.fromkeys(ways, 6), "six scenes a way"
    monkeypatch.setattr(binding, "tokens_of", lambda *a: pytest.fail("finished trainings are used again"))
    assert binding.study(muse, config, tmp_path, ways, n=12, test=6) == results, "what is kept is what was found"
    with pytest.raises(ValueError, match=r"'test': 6.*not.*'test': 7.*another --out"):
        binding.study(muse, config, tmp_path, ways, n=12, test=7)
    lm = binding.lm_tells(muse.encoder, 40)
    assert len(lm) == 6, "six layers"
    assert all(0 <= part <= 1 for part, _ in lm), "fractions"
    text = binding.report(results, lm, "an LM")
    for way in ways:
        assert f"| {way} | " in text, text
