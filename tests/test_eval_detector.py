"""eval_networks.py: the shipped detector detects things in real renders of any size, degraded ones too."""

import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from torch.nn import functional as F

from minimuse import checkpoint
from minimuse.data_scenes import SPLITS, Scene, Thing, box, render, sample_scene
from minimuse.eval_networks import (
    Detection,
    Detections,
    Detector,
)
from minimuse.utils import seeded_generator, to_pil, to_uint8

sys.path.insert(0, str(ROOT / "benchmarks"))
from train_detector import attributes_right, degrade, warp

FOLDER = checkpoint.SHIPPED / "detector"
SEED = 9_000_000_000  # neither the detector nor its card has seen these scenes
SCENES = [sample_scene(SEED + i, split=SPLITS[i % 3], n_things=1 + i // 3 % 3) for i in range(60)]


@pytest.fixture(scope="module")
def detector():
    return Detector.from_pretrained()


@pytest.fixture(scope="module")
def images():
    return to_uint8(render(SCENES, 64))


def fraction_right(detector, images, scenes):
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
    assert fraction_right(detector, images, SCENES) >= 0.98, "attributes of 60 fresh renders"
    counts = [len(reading.things) for reading in detector.detect(images)]
    assert counts == [len(scene.things) for scene in SCENES], "things are counted"


def test_it_reads_pictures_as_decoders_spoil_them(detector, images):
    shaken = degrade(images.float() / 127.5 - 1, seeded_generator(SEED))
    assert fraction_right(detector, shaken, SCENES) >= 0.97


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
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    detector.features(images)
    assert not detector.training
    assert not any(p.requires_grad for p in detector.parameters())
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


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
    pictures, doubt = warp((images.float() / 127.5 - 1).repeat(4, 1, 1, 1), seeded_generator(4))
    sure = [max((t.confidence for t in r.things), default=0.0) for r in detector.detect(pictures)]
    sure = torch.tensor(sure)
    clear, lumps = sure[doubt == 0].mean(), sure[doubt > 0.6].mean()
    assert clear > 0.95
    assert lumps < 0.75, f"lumps {lumps:.2f}, clear ones {clear:.2f}"


def test_features_tell_pictures_apart(detector, images):
    features = detector.features(images)
    assert features.shape == (60, 192)
    assert features.isfinite().all()
    near = degrade(images.float() / 127.5 - 1, seeded_generator(3))
    assert (detector.features(images) - features).abs().max() == 0
    assert torch.cdist(features, detector.features(near)).argmin(1).eq(torch.arange(60)).float().mean() > 0.3


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_is_no_picture_is_refused(detector, images):
    for wrong in (images[0], images[:, :1], images[:, :, :32]):
        with pytest.raises(ValueError, match=r"expected (square ones )?\(B, [3C], H"):
            detector.detect(wrong)
    with pytest.raises(ValueError, match=r"one picture as \[picture\]"):
        detector.detect(to_pil(images[:1])[0])
    with pytest.raises(ValueError, match="at least one"):
        detector.detect([])
    with pytest.raises(TypeError, match="expected a PIL image, str came"):
        detector.detect(["picture.png"])
    with pytest.raises(ValueError, match="crop it to a square"):
        detector.detect([to_pil(images[:1])[0].crop((0, 0, 64, 32))])
    for wrong in (images.float(), images.long(), images.float() * torch.nan):
        with pytest.raises(ValueError, match=r"expected .*uint8 or floats in \[-1, 1\]"):
            detector.detect(wrong)


def test_what_is_no_reader_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_detector"):
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
    assert attributes_right(swapped, scene) == [True] * 8, "the order does not matter"
    assert attributes_right(perfect(scene, color="red"), scene) == [True] * 4 + [False] + [True] * 3
    assert attributes_right(Detections(perfect(scene).things[1:]), scene) == [False] * 4 + [True] * 4, (
        "not found is wrong"
    )
    assert attributes_right(Detections(()), scene) == [False] * 8
    crossed = Scene((Thing("blue", "sphere", x=-1.5), Thing("red", "cube", x=1.5)))
    assert attributes_right(perfect(scene), crossed) == [False, False, True, True] * 2, (
        "paired by place, not by attributes"
    )
