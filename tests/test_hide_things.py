"""benchmarks/hide_things.py at tiny size: true captions without places, whole things hidden, resuming."""

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from minimuse import Muse
from minimuse.config import preset
from minimuse.data_scenes import Scene, Thing, box
from minimuse.data_sources import SceneDataset
from minimuse.eval_networks import Detection, Detections
from minimuse.eval_prompts import matches, parse_prompt

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import hide_things

PLACES = ("left", "right", "front", "behind")


def seen(things):
    return Detections(tuple(Detection(t.color, t.shape, t.size, t.material, t.x, t.depth, box(t), 1.0) for t in things))


def test_captions_are_true_and_only_the_sided_one_names_a_place():
    scenes, found = SceneDataset(200, 64, fractions=(10, 80, 10)), set()
    for i in range(len(scenes)):
        scene = scenes.scene(i)
        if not (two := hide_things.names(scene, i)):
            continue
        free, sided = hide_things.open_caption(scene, two, Random(i)), hide_things.sided_caption(scene, two)
        assert not any(place in free for place in PLACES), f"{free!r} names a place"
        assert any(place in sided for place in PLACES), f"{sided!r} names no place"
        for text in (free, sided):
            assert all(name in text for name in two), f"{text!r} does not name {two}"
            assert matches(seen(scene.things), parse_prompt(text)).right, f"{text!r} is false"
        found |= {"next to" in free, free.startswith(two[0])}
    assert found == {True, False}, "both forms and both orders occur"


def test_a_scene_with_one_thing_three_or_two_alike_is_no_pair():
    a, b = Thing("red", "cube", x=-1.0), Thing("blue", "sphere", x=1.0)
    assert hide_things.names(Scene((a, b)), 0) is not None
    for things in ((a,), (a, b, replace(b, x=3.0)), (a, replace(a, x=1.0))):
        assert hide_things.names(Scene(things), 0) is None, things


def test_a_hidden_thing_is_hidden_whole_and_the_rest_is_not():
    scene, grid = Scene((Thing("red", "cube", x=-2.0), Thing("blue", "sphere", x=2.0))), 8
    for i, thing in enumerate(scene.things):
        left, top, right, bottom = box(thing)
        at = (torch.arange(64 * grid) + 0.5) / (64 * grid)
        inside = ((at > top) & (at < bottom))[:, None] & ((at > left) & (at < right))
        tokens = inside.unflatten(0, (grid, 64)).unflatten(2, (grid, 64)).any(3).any(1).flatten()
        mask = hide_things.covered(scene, i, grid)
        assert (mask | ~tokens).all(), f"thing {i} is visible in part"
        assert mask.sum() < grid**2 / 2, f"{mask.sum()} of {grid**2} tokens are hidden"
    both = [hide_things.covered(scene, i, grid) for i in (0, 1)]
    assert not (both[0] & both[1]).any(), "things far apart do not share tokens"


@pytest.mark.slow
def test_only_the_base_model_changes_and_a_stopped_run_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(hide_things, "HELD_OUT", 2)
    stage = replace(preset("toy").stages["base"], batch=4, steps=2, warmup=1, save_every=1)
    scenes = SceneDataset(12, 128, fractions=(0, 100, 0))
    start, results = Muse.from_pretrained("toy", dtype=torch.float32), []
    for name, runs in (("whole", [2]), ("stopped", [1, 2])):
        (out := tmp_path / name).mkdir()
        for steps in runs:
            muse, stop = Muse.from_pretrained("toy", dtype=torch.float32), iter(range(steps))
            monkeypatch.setattr(hide_things, "train_network", stopping(hide_things.train_network, stop))
            hide_things.train(muse, stage, scenes, out, share=0.5, hidden=0.5)
            monkeypatch.undo()
            monkeypatch.setattr(hide_things, "HELD_OUT", 2)
        results.append(muse)
    for name, part in start.parts.items():
        same = [torch.equal(a, b) for a, b in zip(part.parameters(), results[0].parts[name].parameters(), strict=True)]
        assert all(same) == (name != "base"), name
    both = zip(results[0].base.parameters(), results[1].base.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both), "the continued run differs"


def stopping(train_network, stop):
    """`train_network` that ends after as many steps as `stop` has items."""

    def stopped(*args, **kwargs):
        for progress in train_network(*args, **kwargs):
            yield progress
            if progress.metrics and next(stop, None) is None:
                return

    return stopped
