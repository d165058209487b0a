"""benchmarks/train_detector.py: targets, loss, degradations, the shipped card, and a training of two steps."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_eval_detector import FOLDER, SCENES, SEED
from torch.nn import functional as F

from minimuse import checkpoint
from minimuse.config import StageConfig
from minimuse.data_scenes import SPLITS, box, render, sample_scene
from minimuse.eval_networks import GRID, HEADS, SPREAD, Detector
from minimuse.train_engine import Engine
from minimuse.utils import seeded_generator, to_uint8

sys.path.insert(0, str(ROOT / "benchmarks"))
import train_detector
from train_detector import (
    TRAINING,
    attributes_right,
    cell_centers,
    degrade,
    encode_numbers,
    loss,
    measure,
    targets,
    warp,
)


@pytest.fixture(scope="module")
def images():
    return to_uint8(render(SCENES, 64))


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128])
def test_the_bar(size):
    table = measure(Detector.from_pretrained(), 120, size, SEED + 1000)
    right, asked = (sum(row[i] for row in table.values()) for i in (0, 1))
    assert right / asked >= 0.995, f"{right} of {asked} attributes right at {size} px"
    assert table[2][2] / table[2][3] >= 0.97, f"{table[2]}: scenes of two things wholly right"
    assert table[3][2] / table[3][3] >= 0.95, f"{table[3]}: scenes of three"


def test_the_card_is_written_by_the_code_and_meets_the_bar():
    card = (FOLDER / checkpoint.CARD).read_text(encoding="utf-8")
    training = json.loads((FOLDER / checkpoint.CONFIG).read_text(encoding="utf-8"))["training"]
    rows = [line for line in card.splitlines() if " px |" in line]
    parameters = sum(p.numel() for p in Detector().parameters())
    written = train_detector.CARD.format(
        parameters=parameters, rows="\n".join(rows), fresh=train_detector.FRESH, **training
    )
    assert card == written
    assert len(rows) == 6, "two sizes, one to three things"
    for row in rows:
        (right, asked), (whole, n) = ([int(k.replace(",", "")) for k in c.split(" of ")] for c in row.split("|")[3:5])
        assert n >= 500
        assert right >= 0.995 * asked
        assert whole >= 0.97 * n


def perfect_maps(scenes):
    """The maps that a network without a fault gives: the logits of its targets."""
    index, place = targets(scenes)
    maps = torch.zeros(len(scenes), sum(HEADS), GRID, GRID)
    heat, *fields, numbers = maps.split(HEADS, 1)
    at = cell_centers()
    warm = torch.zeros(len(scenes), GRID, GRID)
    for b, scene in enumerate(scenes):
        middles = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in map(box, scene.things)]
        d2 = torch.stack([(at - torch.tensor(m)).mul(GRID).square().sum(-1) for m in middles])  # (K, G, G)
        near, owner = d2.min(0)
        warm[b] = (-near / (2 * SPREAD**2)).exp()
        for i, logits in enumerate(fields):
            logits[b] = 20 * F.one_hot(index[b, owner, i], logits.shape[1]).permute(2, 0, 1)
        numbers[b] = encode_numbers(place[b, owner].flatten(0, 1), at.flatten(0, 1)).T.unflatten(1, (GRID, GRID))
    heat[:, 0] = warm.clamp(1e-6, 1 - 1e-6).logit()
    return maps


def test_targets_and_reading_are_inverses():
    """Round trip: scenes -> targets -> perfect maps -> what is read, exactly the scenes."""

    class Perfect(Detector):
        def forward(self, images):
            return perfect_maps(SCENES)

    for reading, scene in zip(Perfect().eval().detect(torch.zeros(60, 3, 64, 64)), SCENES, strict=True):
        assert len(reading.things) == len(scene.things), f"{scene}"
        assert all(attributes_right(reading, scene))
        for found, thing in zip(reading.things, sorted(scene.things, key=lambda t: t.x), strict=True):
            assert found.box == pytest.approx(box(thing), abs=1e-4)
            assert (found.x, found.depth) == pytest.approx((thing.x, thing.depth), abs=1e-4)
            assert found.confidence > 0.999, "sure of what could not be surer"


def test_the_loss_is_least_where_the_maps_are_true():
    index, place = targets(SCENES)
    true = perfect_maps(SCENES)
    least = loss(true, index, place)
    for channel in (0, 3, 10, 13, 15, 18, 20):
        worse = true.clone()
        worse[:, channel] += 20
        assert loss(worse, index, place) > least, f"channel {channel}"


def test_doubt_of_the_shape_is_asked_for():
    """With doubt d of C shapes, the least loss is at 1 - d + d / C for the true one."""
    index, place = targets(SCENES)
    for doubt, margin in ((0.0, 12.0), (0.5, math.log(0.5 + 0.5 / 3) - math.log(0.5 / 3)), (1.0, 0.0)):
        values = []
        for change in (-0.3, 0.0, 0.3):
            maps = perfect_maps(SCENES)
            logits = maps[:, 1 + 8 : 1 + 8 + 3]
            logits *= (margin + change) / 20
            values.append(loss(maps, index, place, torch.full((60,), doubt)))
        least = values.index(min(values))
        assert least == (2 if doubt == 0 else 1), f"doubt {doubt}: {values}"


def test_warped_pictures_wobble_and_say_so(images):
    clean = (images.float() / 127.5 - 1).repeat(10, 1, 1, 1)
    moved, doubt = warp(clean, seeded_generator(6))
    same = (moved == clean).flatten(1).all(1)
    assert 0.6 < same.float().mean() < 0.73, "two thirds stay as they are"
    assert (doubt[same] == 0).all()
    assert doubt.min() >= 0
    assert 0.36 < doubt[~same].mean() < 0.48, "of 0 to 3 pixels, half a pixel is free: 0.42"
    assert doubt.max() <= 1
    again, _ = warp(clean, seeded_generator(6))
    assert torch.equal(moved, again)


def test_gradients_reach_every_weight():
    net = Detector()
    loss(net(render(SCENES[:4], 64)), *targets(SCENES[:4])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_spoiled_pictures_stay_themselves(images):
    clean = images.float() / 127.5 - 1
    shaken = degrade(clean, seeded_generator(2))
    assert torch.equal(shaken, degrade(clean, seeded_generator(2))), "a function of pictures and draws"
    assert shaken.shape == clean.shape
    assert shaken.abs().max() <= 1
    assert 0.02 < (shaken - clean).abs().mean() < 0.2, "changed, and not beyond knowing"


def test_the_quantizer_is_a_round_trip_for_small_steps(images):
    clean = images[:8].float() / 127.5 - 1
    steps = torch.full((8, 1, 1, 1), 1e-4)
    assert torch.allclose(train_detector.quantize(clean, steps), clean, atol=5e-3), "the transform is orthonormal"
    rough = train_detector.quantize(clean, torch.full((8, 1, 1, 1), 100.0))
    assert rough.abs().max() == 0, "steps beyond all amplitudes leave nothing"


def test_no_scene_is_shared_with_what_it_measures():
    assert {sample_scene(0, split=split) for split in SPLITS}.isdisjoint(train_detector.scenes(20, train_detector.SEED))
    last = train_detector.SEED + train_detector.SCENES
    assert last < train_detector.FRESH, "the card's scenes were not trained on"
    trained = json.loads((FOLDER / checkpoint.CONFIG).read_text())["training"]
    assert (trained["seed"], trained["scenes"], trained["steps"]) == (
        train_detector.SEED,
        train_detector.SCENES,
        TRAINING.steps,
    ), "the command's defaults are those of the shipped detector"


def test_training_learns_and_follows_from_its_seed(images):
    config = StageConfig(steps=6, batch=8, learning_rate=4e-3, warmup=1, weight_decay=0.01)
    runs = [[*train_detector.train(Engine(seed=5, device="cpu"), config, images, SCENES)] for _ in range(2)]
    losses = [[value for value, _ in run] for run in runs]
    assert losses[0] == losses[1], "one seed, one run"
    assert losses[0][-1] < losses[0][0] * 0.9, f"{losses[0]}"


def test_the_command_trains_measures_saves_and_overwrites_nothing(tmp_path, capsys):
    folder = tmp_path / "mine"
    train_detector.main([str(folder), "--scenes", "16", "--steps", "2", "--fresh", "2", "--device", "cpu"])
    assert Path(capsys.readouterr().out.strip()) == folder
    net = Detector.from_pretrained(folder)
    assert (folder / checkpoint.WEIGHTS).stat().st_size <= 2_000_000
    assert all(v.dtype != torch.float16 for v in net.state_dict().values()), "halved on disk, whole at work"
    assert "16 scenes" in " ".join((folder / checkpoint.CARD).read_text().split())
    with pytest.raises(FileExistsError, match="already holds"):
        train_detector.main([str(folder)])
