"""eval_prompts.py: a prompt is read as it was meant, and a picture is right exactly where all that the prompt names is."""

from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse.data_captions import EXAMPLE_PROMPTS, PARAPHRASES, RELATION_PHRASES, caption
from minimuse.data_scenes import Scene, Thing, box, relations, sample_scene
from minimuse.eval_detector import FIELDS, Found, Reading
from minimuse.eval_prompts import Group, Wants, matches, parse_prompt, related

TOLD = [("any", False), ("short", False), ("long", False), ("any", True), ("short", True), ("long", True)]


def perfect(scene: Scene) -> Reading:
    """What a reader without a fault reads."""
    return Reading(tuple(Found(t.color, t.shape, t.size, t.material, t.x, t.depth, box(t), 1.0) for t in scene.things))


@cache
def told(seed: int) -> tuple[Scene, str, Wants]:
    """A scene of every split, count and style in turn, what is said of it, and what that asks for."""
    scene = sample_scene(seed, split=("train", "test", "novel")[seed % 3], n_things=1 + seed // 3 % 3)
    style, paraphrase = TOLD[seed % len(TOLD)]
    said = caption(scene, seed, style=style, paraphrase=paraphrase)
    return scene, said, parse_prompt(said)


def changed(reading: Reading, k: int, **fields) -> Reading:
    return Reading(tuple(t._replace(**fields) if i == k else t for i, t in enumerate(reading.things)))


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_by_hand():
    cube = Group(2, {"size": "small", "color": "red", "shape": "cube"})
    ball = Group(1, {"color": "blue", "material": "metal", "shape": "sphere"})
    assert parse_prompt("two small red cubes left of a blue metal sphere") == Wants((cube, ball), "left")
    assert parse_prompt("There are two tiny crimson boxes to the left of a shiny azure orb, on a gray floor.".replace(
        ", on", " on")) == Wants((cube, ball), "left"), "paraphrases, opening, floor and full stop"  # fmt: skip
    can = Group(1, {"shape": "cylinder"})
    assert parse_prompt("a picture with a can, a blue metal sphere and a can") == Wants((can, ball, can))
    assert parse_prompt("a cylinder is next to a blue metal sphere and a tin") == Wants((can, ball, can), "beside")
    assert str(ball) == "blue metal sphere"


def test_examples_are_understood():
    for prompt in EXAMPLE_PROMPTS:
        assert parse_prompt(prompt).groups, prompt


def test_every_paraphrase_means_its_word():
    fields = {name: field for field, names in FIELDS.items() for name in names}
    for name, words in PARAPHRASES.items():
        for word in (name, *words):
            phrase = f"a {word}" if fields[name] == "shape" else f"a {word} cube"
            assert parse_prompt(phrase).groups[0].looks[fields[name]] == name, f"{phrase!r} must ask for {name}"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a red zebra", "unknown word 'zebra'; known: .*azure"),
        ("", "does not begin with a number; known: a, an, one"),
        ("red cubes", "does not begin with a number"),
        ("a red", "names no shape"),
        ("a red blue cube", "names its color twice"),
        ("a cube sphere", "names its shape twice"),
        ("two cubes and two spheres", "asks for 4 things; scenes hold at most 3"),
        ("a cube left of a sphere behind a cylinder", "at most one relation"),
        ("a cube and a sphere left of a cylinder", "at most one relation"),
        ("a cube left of", "unknown word 'left'"),
        ("a cube above a sphere", "unknown word 'above'"),
        ("a cube, and", "unknown word 'and'|does not begin with a number"),
    ],
)
def test_what_cannot_be_understood_is_told(prompt, says):
    with pytest.raises(ValueError, match=says):
        parse_prompt(prompt)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [range(1000), pytest.param(range(1000, 6000), marks=pytest.mark.slow)], ids=str)
def test_true_captions_are_right_of_their_scenes(seeds):
    for seed in seeds:
        scene, said, wants = told(seed)
        assert sum(group.number for group in wants.groups) == len(scene.things), f"{said!r}: captions count all things"
        for slack in (0.0, 0.2):
            verdict = matches(perfect(scene), wants, slack=slack)
            assert verdict.right, f"{said!r} is true of its scene, but: {verdict.wrong}"


def test_one_changed_attribute_is_wrong_where_it_is_named_and_only_there():
    named_ones = 0
    for seed in range(1000):
        scene, said, wants = told(seed)
        rng, reading = Random(seed), perfect(scene)
        k, field = rng.randrange(len(scene.things)), rng.choice([*FIELDS])
        old = getattr(scene.things[k], field)
        new = rng.choice([name for name in FIELDS[field] if name != old])
        verdict = matches(changed(reading, k, **{field: new}), wants)
        named = field in wants.groups[0].looks  # all groups of a caption name the same fields
        named_ones += named
        assert verdict.right != named, f"{said!r} with {old} -> {new}: {verdict}"
    assert named_ones > 400


def test_a_thing_too_many_or_too_few_is_wrong():
    for seed in range(400):
        scene, said, wants = told(seed)
        reading = perfect(scene)
        more = Reading((*reading.things, reading.things[0]))
        assert not matches(more, wants).right, f"{said!r}: one more {reading.things[0].shape}"
        assert f"{len(more.things)} things, not {len(scene.things)}" in matches(more, wants).wrong
        assert not matches(Reading(reading.things[1:]), wants).right, f"{said!r}: one less"
    assert matches(Reading(()), parse_prompt("a red cube")).wrong == ["0 things, not 1", "no red cube"]


def test_a_relation_that_is_not_there_is_wrong():
    opposite, seen = {"left": "right", "right": "left", "front": "behind", "behind": "front"}, 0
    for seed in range(1000):
        scene, said, wants = told(seed)
        if not wants.relation:
            continue
        seen += 1
        reading = perfect(scene)
        if wants.relation in opposite:
            verdict = matches(reading, wants._replace(relation=opposite[wants.relation]))
            same = len({tuple(group.looks.items()) for group in wants.groups}) < len(wants.groups)
            assert same or not verdict.right, f"{said!r} with the opposite relation"
        heap = Reading(tuple(t._replace(x=0.0, depth=0.0) for t in reading.things))
        assert not matches(heap, wants).right, f"{said!r}: all in one place stand in no relation"
    assert seen > 150


def test_relations_are_those_of_scenes():
    for seed in range(150):
        a, b = perfect(sample_scene(seed, n_things=2)).things
        thing_a, thing_b = sample_scene(seed, n_things=2).things
        assert related(a, b, slack=0.0) == relations(thing_a, thing_b)
        assert related(a, b) >= relations(thing_a, thing_b), "slack forgives, it never takes away"


def test_slack_forgives_what_reading_blurs_and_no_more():
    a = perfect(Scene((Thing("red", "cube", x=0.0),))).things[0]
    at = {x: related(a, a._replace(x=x)) for x in (0.65, 0.75, 0.95, -0.95)}
    assert at[0.65] == set(), "0.9 - 0.2 is the least"
    assert "left" in at[0.75]
    assert "left" in at[0.95] and "right" not in at[0.95]  # noqa: PT018
    assert "right" in at[-0.95]


def test_things_are_paired_so_that_least_is_wrong():
    scene = Scene((Thing("red", "cube", x=1.5), Thing("red", "sphere", x=-1.5)))
    assert matches(perfect(scene), parse_prompt("a sphere left of a cube")).right, "the order of things says nothing"
    verdict = matches(perfect(scene), parse_prompt("a blue cube and a red sphere"))
    assert verdict.wrong == ["the blue cube has color red, not blue"]
    verdict = matches(perfect(scene), parse_prompt("a cube left of a sphere"))
    assert verdict.wrong == ["the red cube is not left of the red sphere"]


def test_alike_things_are_paired_by_their_relation_too():
    scene = Scene((Thing("red", "cube", "small", x=1.5), Thing("blue", "cube", "small", x=-1.5)))
    assert matches(perfect(scene), parse_prompt("a cube left of a red cube")).right, "the blue one is the one at left"
    assert not matches(perfect(scene), parse_prompt("a cube right of a red cube")).right


def test_what_is_unclear_is_wrong_where_it_is_asked_to_be_clear():
    blurred = changed(perfect(Scene((Thing("red", "cube", x=-1.5), Thing("red", "sphere", x=1.5)))), 0, confidence=0.3)
    wants = parse_prompt("a cube and a sphere")
    assert matches(blurred, wants).right
    assert matches(blurred, wants, sure=0.3).right
    assert matches(blurred, wants, sure=0.5).wrong == ["the cube is unclear: confidence 0.30"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(3)))
def test_the_order_of_the_things_read_says_nothing(seed, order):
    scene, _, _ = told(3 * (seed % 1000) + 6)
    reading = perfect(scene)
    shuffled = Reading(tuple(reading.things[i] for i in order if i < len(reading.things)))
    wants = told(seed)[2]
    assert matches(shuffled, wants).right == matches(reading, wants).right


def test_every_relation_of_captions_is_understood():
    for name, phrases in RELATION_PHRASES.items():
        for phrase in phrases:
            assert parse_prompt(f"a cube is {phrase} a sphere").relation == name
