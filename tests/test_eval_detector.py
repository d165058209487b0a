"""eval_detector.py, train_detector.py: the shipped detector reads real renders, at any size, spoiled too, and knows its doubts."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch.nn import functional as F

from minimuse import checkpoint
from minimuse.config import StageConfig
from minimuse.data_images import to_pil, to_uint8
from minimuse.data_scenes import SPLITS, Scene, Thing, box, render, sample_scene
from minimuse.eval_detector import (
    GRID,
    HEADS,
    SPREAD,
    Detection,
    Detections,
    Detector,
    DetectorNetwork,
    attributes_right,
    cell_centers,
    encode_numbers,
)
from minimuse.train_engine import Engine
from minimuse.utils import seeded_generator

sys.path.insert(0, str(ROOT / "benchmarks"))
import train_detector
from train_detector import TRAINING, loss, measure, spoiled, targets, warped

FOLDER = checkpoint.SHIPPED / "detector"
SEED = 9_000_000_000  # neither the detector nor its card has seen these scenes
SCENES = [sample_scene(SEED + i, split=SPLITS[i % 3], n_things=1 + i // 3 % 3) for i in range(60)]


@pytest.fixture(scope="module")
def detector():
    return Detector.from_pretrained()


@pytest.fixture(scope="module")
def images():
    return to_uint8(render(SCENES, 64))


def share_right(detector, images, scenes):
    right = [ok for pair in zip(detector.detect(images), scenes, strict=True) for ok in attributes_right(*pair)]
    return sum(right) / len(right)


def perfect(scene, **fields):
    things = [Detection(t.color, t.shape, t.size, t.material, t.x, t.depth, box(t), 1.0) for t in scene.things]
    return Detections(tuple(thing._replace(**fields) for thing in things))


# --- the shipped detector ---------------------------------------------------------------------------------------------


def test_it_loads_without_a_network_and_is_small(no_network):
    Detector.from_pretrained()
    assert (FOLDER / checkpoint.WEIGHTS).stat().st_size <= 2_000_000, "the shipped detector takes at most 2 MB"
    assert {f.name for f in FOLDER.iterdir()} == {checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.CARD}


def test_it_reads_fresh_renders(detector, images):
    assert share_right(detector, images, SCENES) >= 0.98, "attributes of 60 fresh renders"
    counts = [len(reading.things) for reading in detector.detect(images)]
    assert counts == [len(scene.things) for scene in SCENES], "things are counted"


def test_it_reads_pictures_as_decoders_spoil_them(detector, images):
    shaken = spoiled(images.float() / 127.5 - 1, seeded_generator(SEED))
    assert share_right(detector, shaken, SCENES) >= 0.97


def test_places_and_boxes(detector, images):
    off, edges = [], []
    for reading, scene in zip(detector.detect(images), SCENES, strict=True):
        for found, thing in zip(reading.things, sorted(scene.things, key=lambda t: t.x), strict=True):
            off.append([found.x - thing.x, found.depth - thing.depth])
            edges.append([a - b for a, b in zip(found.box, box(thing), strict=True)])
    assert torch.tensor(off).abs().mean() < 0.06, "world units; relations ask for 0.9 and 1.2"
    assert torch.tensor(edges).abs().mean() < 0.012, "less than a pixel of 64"


def test_size_and_kind_of_input_do_not_matter(detector, images):
    looks = [[thing[:4] for thing in reading.things] for reading in detector.detect(images[:12])]
    large = render(SCENES[:12], 128)
    for name, other in {
        "floats": images[:12].float() / 127.5 - 1,
        "PIL images": to_pil(images[:12]),
        "128 px": large,
        "PIL images of 128 px": to_pil(large),
        "96 px": F.interpolate(large, size=(96, 96), mode="bilinear", antialias=True),
    }.items():
        assert [[thing[:4] for thing in r.things] for r in detector.detect(other)] == looks, (
            f"{name} are read differently"
        )
    assert detector.detect(images[:12]) == detector.detect(to_pil(images[:12])), "uint8 and PIL hold the same pixels"


def test_it_is_deterministic_and_pictures_do_not_depend_on_their_batch(detector, images):
    once = detector.detect(images)
    assert once == detector.detect(images)
    for k in (0, 7, 59):
        (alone,) = detector.detect(images[k : k + 1])
        assert [t[:4] for t in alone.things] == [t[:4] for t in once[k].things]


def test_reading_leaves_no_gradient_and_moves_no_buffer(detector, images):
    """Pitfall 18: it is frozen, dropout and batch statistics too."""
    before = {k: v.clone() for k, v in detector.net.state_dict().items()}
    detector.features(images)
    assert not detector.net.training
    assert not any(p.requires_grad for p in detector.net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in detector.net.state_dict().items())


def test_it_finds_nothing_where_nothing_is(detector):
    noise = torch.rand(20, 3, 64, 64, generator=seeded_generator(1)) * 2 - 1
    assert sum(len(reading.things) for reading in detector.detect(noise)) == 0
    assert detector.detect(torch.zeros(1, 3, 64, 64)) == [Detections(())]


def test_it_is_less_sure_of_what_is_half_cube_and_half_cylinder(detector):
    places = [(x, depth) for x in (-1.0, 0.0, 1.0) for depth in (-0.4, 0.4)]
    cubes, cylinders = (
        render([Scene((Thing("red", shape, x=x, depth=depth),)) for x, depth in places], 64)
        for shape in ("cube", "cylinder")
    )
    clear, mixed = (
        sum(max((t.confidence for t in r.things), default=0.0) for r in detector.detect(pictures)) / len(places)
        for pictures in (cubes, (cubes + cylinders) / 2)
    )
    assert clear > 0.95
    assert mixed < 0.9, f"{mixed:.3f}, and a cube {clear:.3f}"


def test_the_more_an_outline_wobbles_the_less_sure_it_is(detector, images):
    pictures, doubt = warped((images.float() / 127.5 - 1).repeat(4, 1, 1, 1), seeded_generator(4))
    sure = [max((t.confidence for t in r.things), default=0.0) for r in detector.detect(pictures)]
    sure = torch.tensor(sure)
    clear, lumps = sure[doubt == 0].mean(), sure[doubt > 0.6].mean()
    assert clear > 0.95
    assert lumps < 0.75, f"lumps {lumps:.2f}, clear ones {clear:.2f}"


def test_features_tell_pictures_apart(detector, images):
    features = detector.features(images)
    assert features.shape == (60, 192)
    assert features.isfinite().all()
    near = spoiled(images.float() / 127.5 - 1, seeded_generator(3))
    assert (detector.features(images) - features).abs().max() == 0
    assert torch.cdist(features, detector.features(near)).argmin(1).eq(torch.arange(60)).float().mean() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128])
def test_the_bar(detector, size):
    table = measure(detector, 333, size, SEED + 1000)
    right, asked = (sum(row[i] for row in table.values()) for i in (0, 1))
    assert right / asked >= 0.995, f"{right} of {asked} attributes right at {size} px"
    assert table[2][2] / table[2][3] >= 0.97, f"{table[2]}: scenes of two things wholly right"
    assert table[3][2] / table[3][3] >= 0.95, f"{table[3]}: scenes of three"


def test_the_card_is_written_by_the_code_and_meets_the_bar():
    card = (FOLDER / checkpoint.CARD).read_text(encoding="utf-8")
    training = json.loads((FOLDER / checkpoint.CONFIG).read_text(encoding="utf-8"))["training"]
    rows = [line for line in card.splitlines() if " px |" in line]
    parameters = sum(p.numel() for p in DetectorNetwork().parameters())
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


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_is_no_picture_is_refused(detector, images):
    for wrong in (images[0], images[:, :1], images[:, :, :32]):
        with pytest.raises(ValueError, match=r"expected square ones \(B, 3, H, W\)"):
            detector.detect(wrong)
    with pytest.raises(ValueError, match=r"single picture as \[picture\]"):
        detector.detect(to_pil(images[:1])[0])
    with pytest.raises(ValueError, match="at least one"):
        detector.detect([])
    with pytest.raises(TypeError, match="expected a PIL image, str came"):
        detector.detect(["picture.png"])
    with pytest.raises(ValueError, match="mend it with"):
        detector.detect([to_pil(images[:1])[0].crop((0, 0, 64, 32))])
    with pytest.raises(ValueError, match=r"values reach .*expected uint8 or \[-1, 1\]"):
        detector.detect(images.float())


def test_what_is_no_reader_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_detector.py"):
        Detector.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected 'minimuse-reader-1'"):
        Detector.from_pretrained(checkpoint.SHIPPED / "nano")
    (tmp_path / checkpoint.CONFIG).write_bytes((FOLDER / checkpoint.CONFIG).read_bytes())
    save_file({"stem.0.weight": torch.zeros(3)}, tmp_path / checkpoint.WEIGHTS)
    with pytest.raises(ValueError, match=r"do not fit its config\.json"):
        Detector.from_pretrained(tmp_path)


# --- comparing --------------------------------------------------------------------------------------------------------


def test_compare_by_hand():
    scene = Scene((Thing("red", "cube", x=-1.5), Thing("blue", "sphere", x=1.5)))
    assert attributes_right(perfect(scene), scene) == [True] * 8
    swapped = Detections(perfect(scene).things[::-1])
    assert attributes_right(swapped, scene) == [True] * 8, "the order read says nothing"
    assert attributes_right(perfect(scene, color="red"), scene) == [True] * 4 + [False] + [True] * 3
    assert attributes_right(Detections(perfect(scene).things[1:]), scene) == [False] * 4 + [True] * 4, (
        "not found is wrong"
    )
    assert attributes_right(Detections(()), scene) == [False] * 8
    crossed = Scene((Thing("blue", "sphere", x=-1.5), Thing("red", "cube", x=1.5)))
    assert attributes_right(perfect(scene), crossed) == [False, False, True, True] * 2, "paired by place, not by looks"


# --- training ---------------------------------------------------------------------------------------------------------


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

    class Perfect(DetectorNetwork):
        def forward(self, images):
            return perfect_maps(SCENES)

    for reading, scene in zip(Detector(Perfect()).detect(torch.zeros(60, 3, 64, 64)), SCENES, strict=True):
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
    moved, doubt = warped(clean, seeded_generator(6))
    same = (moved == clean).flatten(1).all(1)
    assert 0.6 < same.float().mean() < 0.73, "two thirds stay as they are"
    assert (doubt[same] == 0).all()
    assert doubt.min() >= 0
    assert 0.36 < doubt[~same].mean() < 0.48, "of 0 to 3 pixels, half a pixel is free: 0.42"
    assert doubt.max() <= 1
    again, _ = warped(clean, seeded_generator(6))
    assert torch.equal(moved, again)


def test_gradients_reach_every_weight():
    net = DetectorNetwork()
    loss(net(render(SCENES[:4], 64)), *targets(SCENES[:4])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_spoiled_pictures_stay_themselves(images):
    clean = images.float() / 127.5 - 1
    shaken = spoiled(clean, seeded_generator(2))
    assert torch.equal(shaken, spoiled(clean, seeded_generator(2))), "a function of pictures and draws"
    assert shaken.shape == clean.shape
    assert shaken.abs().max() <= 1
    assert 0.02 < (shaken - clean).abs().mean() < 0.2, "changed, and not beyond knowing"


def test_the_quantizer_is_a_round_trip_for_small_steps(images):
    clean = images[:8].float() / 127.5 - 1
    steps = torch.full((8, 1, 1, 1), 1e-4)
    assert torch.allclose(train_detector._quantized(clean, steps), clean, atol=5e-3), "the transform is orthonormal"
    rough = train_detector._quantized(clean, torch.full((8, 1, 1, 1), 100.0))
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
    ), "the command's defaults are those of the shipped reader"


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
    net = Detector.from_pretrained(folder).net
    assert (folder / checkpoint.WEIGHTS).stat().st_size <= 2_000_000
    assert all(v.dtype != torch.float16 for v in net.state_dict().values()), "halved on disk, whole at work"
    assert "16 scenes" in " ".join((folder / checkpoint.CARD).read_text().split())
    with pytest.raises(FileExistsError, match="already holds"):
        train_detector.main([str(folder)])
