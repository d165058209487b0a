"""eval_prompts.py: prompts are parsed as meant; a picture matches if all that is named is there; sets are balanced."""

import math
from collections import Counter
from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimuse.data_captions import EXAMPLE_PROMPTS, PARAPHRASES, RELATION_PHRASES, caption, vocabulary
from minimuse.data_scenes import HELD_OUT, SPLITS, Scene, Thing, box, relations, sample_scene
from minimuse.eval_networks import FIELDS, Detection, Detections
from minimuse.eval_prompts import (
    EXTRAS,
    NOVEL,
    PROMPT_SETS,
    SEEN,
    ObjectGroup,
    PromptSpec,
    matches,
    parse_prompt,
    possible_relations,
    prompt_set,
)

TOLD = [("any", False), ("short", False), ("long", False), ("any", True), ("short", True), ("long", True)]


def perfect(scene: Scene) -> Detections:
    """What a perfect detector finds."""
    return Detections(
        tuple(Detection(t.color, t.shape, t.size, t.material, t.x, t.depth, box(t), 1.0) for t in scene.things)
    )


@cache
def told(seed: int) -> tuple[Scene, str, PromptSpec]:
    """A scene of every split, count and style in turn, what is said of it, and what that asks for."""
    scene = sample_scene(seed, split=("train", "test", "novel")[seed % 3], n_things=1 + seed // 3 % 3)
    style, paraphrase = TOLD[seed % len(TOLD)]
    said = caption(scene, seed, style=style, paraphrase=paraphrase)
    return scene, said, parse_prompt(said)


def changed(reading: Detections, k: int, **fields) -> Detections:
    return Detections(tuple(t._replace(**fields) if i == k else t for i, t in enumerate(reading.things)))


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_by_hand():
    cube = ObjectGroup(2, {"size": "small", "color": "red", "shape": "cube"})
    ball = ObjectGroup(1, {"color": "blue", "material": "metal", "shape": "sphere"})
    assert parse_prompt("two small red cubes left of a blue metal sphere") == PromptSpec((cube, ball), "left")
    assert parse_prompt("There are two tiny crimson boxes to the left of a shiny azure orb, on a gray floor.".replace(
        ", on", " on")) == PromptSpec((cube, ball), "left"), "paraphrases, opening, floor and full stop"  # fmt: skip
    can = ObjectGroup(1, {"shape": "cylinder"})
    assert parse_prompt("a picture with a can, a blue metal sphere and a can") == PromptSpec((can, ball, can))
    assert parse_prompt("a cylinder is next to a blue metal sphere and a tin") == PromptSpec((can, ball, can), "beside")
    assert str(ball) == "blue metal sphere"


def test_examples_are_understood():
    for prompt in EXAMPLE_PROMPTS:
        assert parse_prompt(prompt).groups, prompt


def test_every_paraphrase_means_its_word():
    fields = {name: field for field, names in FIELDS.items() for name in names}
    for name, words in PARAPHRASES.items():
        for word in (name, *words):
            phrase = f"a {word}" if fields[name] == "shape" else f"a {word} cube"
            assert parse_prompt(phrase).groups[0].attributes[fields[name]] == name, f"{phrase!r} must ask for {name}"


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a red zebra", "unknown word 'zebra'; known: .*azure"),
        ("", "does not start with a number; known: a, an, one"),
        ("red cubes", "does not start with a number"),
        ("a red", "names no shape"),
        ("a red blue cube", "names an attribute twice"),
        ("a cube sphere", "names an attribute twice"),
        ("two cubes and two spheres", "asks for 4 things; scenes hold at most 3"),
        ("a cube left of a sphere behind a cylinder", "at most one relation"),
        ("a cube and a sphere left of a cylinder", "at most one relation"),
        ("a cube left of", "unknown word 'left'"),
        ("a cube above a sphere", "unknown word 'above'"),
        ("a cube, and", "unknown word 'and'|does not start with a number"),
        (None, "prompt is None; give a text"),
        (["a red cube"], "prompt is .*; give a text"),
    ],
)
def test_what_cannot_be_understood_is_told(prompt, says):
    with pytest.raises(ValueError, match=says):
        parse_prompt(prompt)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [range(1000), pytest.param(range(1000, 2500), marks=pytest.mark.slow)], ids=str)
def test_true_captions_are_right_of_their_scenes(seeds):
    for seed in seeds:
        scene, said, spec = told(seed)
        assert sum(group.number for group in spec.groups) == len(scene.things), f"{said!r}: captions count all things"
        verdict = matches(perfect(scene), spec)
        assert verdict.right, f"{said!r} is true of its scene, but: {verdict.wrong}"


def test_one_changed_attribute_is_wrong_where_it_is_named_and_only_there():
    named_ones = 0
    for seed in range(1000):
        scene, said, spec = told(seed)
        rng, reading = Random(seed), perfect(scene)
        k, field = rng.randrange(len(scene.things)), rng.choice([*FIELDS])
        old = getattr(scene.things[k], field)
        new = rng.choice([name for name in FIELDS[field] if name != old])
        verdict = matches(changed(reading, k, **{field: new}), spec)
        named = field in spec.groups[0].attributes  # all groups of a caption name the same fields
        named_ones += named
        assert verdict.right != named, f"{said!r} with {old} -> {new}: {verdict}"
    assert named_ones > 400


def test_a_thing_too_many_or_too_few_is_wrong():
    for seed in range(400):
        scene, said, spec = told(seed)
        reading = perfect(scene)
        more = Detections((*reading.things, reading.things[0]))
        assert not matches(more, spec).right, f"{said!r}: one more {reading.things[0].shape}"
        assert f"{len(more.things)} things, not {len(scene.things)}" in matches(more, spec).wrong
        assert not matches(Detections(reading.things[1:]), spec).right, f"{said!r}: one less"
    assert matches(Detections(()), parse_prompt("a red cube")).wrong == ["0 things, not 1", "no red cube"]


def test_a_relation_that_is_not_there_is_wrong():
    opposite, seen = {"left": "right", "right": "left", "front": "behind", "behind": "front"}, 0
    for seed in range(1000):
        scene, said, spec = told(seed)
        if not spec.relation:
            continue
        seen += 1
        reading = perfect(scene)
        if spec.relation in opposite:
            verdict = matches(reading, spec._replace(relation=opposite[spec.relation]))
            same = len({tuple(group.attributes.items()) for group in spec.groups}) < len(spec.groups)
            assert same or not verdict.right, f"{said!r} with the opposite relation"
        heap = Detections(tuple(t._replace(x=0.0, depth=0.0) for t in reading.things))
        assert not matches(heap, spec).right, f"{said!r}: all in one place stand in no relation"
    assert seen > 150


def test_relations_are_those_of_scenes():
    for seed in range(150):
        a, b = perfect(sample_scene(seed, n_things=2)).things
        thing_a, thing_b = sample_scene(seed, n_things=2).things
        assert possible_relations(a, b) >= relations(thing_a, thing_b), "the tolerance adds relations and removes none"


def test_the_tolerance_forgives_small_errors_and_no_more():
    a = perfect(Scene((Thing("red", "cube", x=0.0),))).things[0]
    at = {x: possible_relations(a, a._replace(x=x)) for x in (0.65, 0.75, 0.95, -0.95)}
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
    spec = parse_prompt("a cube and a sphere")
    assert matches(blurred, spec).right
    assert matches(blurred, spec, min_confidence=0.3).right
    assert matches(blurred, spec, min_confidence=0.5).wrong == ["the cube is unclear: confidence 0.30"]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(3)))
def test_the_order_of_the_things_read_says_nothing(seed, order):
    scene, _, _ = told(3 * (seed % 1000) + 6)
    reading = perfect(scene)
    shuffled = Detections(tuple(reading.things[i] for i in order if i < len(reading.things)))
    spec = told(seed)[2]
    assert matches(shuffled, spec).right == matches(reading, spec).right


def test_every_relation_of_captions_is_understood():
    for name, phrases in RELATION_PHRASES.items():
        for phrase in phrases:
            assert parse_prompt(f"a cube is {phrase} a sphere").relation == name


# --- prompt sets ------------------------------------------------------------------------------------------------------

ALL = pytest.mark.parametrize("name", PROMPT_SETS)
SWAPS = {word for words in PARAPHRASES.values() for word in words}


@cache
def whole(name):
    return prompt_set(name, 420)


def asks(name, n):
    """The first n prompts of a set, which are made once: see test_ask_i_follows_from_i_alone."""
    return whole(name)[:n]


def looks(ask):
    """The colour and shape of each group of a prompt."""
    return [(g.attributes["color"], g.attributes["shape"]) for g in parse_prompt(ask.prompt).groups]


@ALL
def test_every_prompt_is_understood_and_true_of_its_scene(name):
    for ask in asks(name, 240):
        verdict = matches(perfect(ask.scene), parse_prompt(ask.prompt))
        assert verdict.right, f"{ask.prompt!r} is not true of its scene: {verdict.wrong}"


@ALL
def test_ask_i_follows_from_i_alone_and_prompts_come_in_pairs(name):
    some = prompt_set(name, 40)
    assert some == prompt_set(name, 60)[:40]
    for a, b in zip(some[::2], some[1::2], strict=True):
        assert (a.prompt, a.group, a.negative) == (b.prompt, b.group, b.negative)
        assert a.scene != b.scene, "of one prompt, two scenes"


def test_the_first_of_them():
    assert [ask.prompt for ask in asks("counts", 3)] == ["two gray cubes"] * 2 + ["three small blue cylinders"]
    pairs = [looks(ask)[0] for ask in asks("seen", 24)[::2]]
    assert len({color for color, _ in pairs}) >= 6, "the pictures that are shown differ"


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="unknown set 'sene'; give one of seen, novel"):
        prompt_set("sene", 3)
    for n in (0, -1, math.nan, 1.5, True, 10**15):
        with pytest.raises(ValueError, match=r"n is .*; give a whole number from 1"):
            prompt_set("seen", n)
    for confidence in (math.nan, -0.1, 1.5, "high", None):
        with pytest.raises(ValueError, match=r"min_confidence is .*; give a fraction"):
            matches(Detections(()), parse_prompt("a cube"), min_confidence=confidence)


@pytest.mark.parametrize("name", [name for name in PROMPT_SETS if name not in ("novel", "paraphrases")])
def test_training_could_have_said_it(name):
    for ask in asks(name, 240):
        assert set(ask.prompt.split()) <= set(vocabulary()), ask.prompt
        assert not HELD_OUT & set(looks(ask)), f"{ask.prompt!r}: a pair that is held out"
        assert ask.before is None or not HELD_OUT & {(t.color, t.shape) for t in ask.before.things}


def test_novel_prompts_are_of_pairs_that_training_never_shows():
    counts = Counter(pair for ask in asks("novel", 300) for pair in looks(ask))
    assert counts == dict.fromkeys(NOVEL, 100)
    shown = {(t.color, t.shape) for seed in range(500) for t in sample_scene(seed, split="train").things}
    assert shown == set(SEEN)


def test_paraphrases_are_of_words_that_training_never_says():
    assert not SWAPS & set(vocabulary())
    said = Counter()
    for ask in prompt_set("paraphrases", 1000):
        words = SWAPS & set(ask.prompt.split())
        assert words, f"{ask.prompt!r} has no paraphrase"
        said.update(words)
    assert set(said) == SWAPS, f"never said: {SWAPS - set(said)}"


@pytest.mark.parametrize("name", ["seen", "paraphrases", "counts", "relations"])
def test_combinations_are_balanced(name):
    counts = Counter(looks(ask)[0] for ask in asks(name, 420))
    assert counts == dict.fromkeys(SEEN, 20)


def test_extras_relations_and_numbers_are_balanced():
    assert Counter(bool(size) for size, _ in EXTRAS) == Counter(bool(material) for _, material in EXTRAS)
    named = Counter(tuple(parse_prompt(a.prompt).groups[0].attributes.get(k) for k in ("size", "material"))
                    for a in asks("seen", 420))  # fmt: skip
    assert set(named.values()) == {42, 84}, "each in turn; plain prompts are two of ten"
    relations = Counter(parse_prompt(ask.prompt).relation for ask in asks("relations", 100))
    assert relations == dict.fromkeys(RELATION_PHRASES, 20)
    numbers = Counter(parse_prompt(ask.prompt).groups[0].number for ask in asks("counts", 100))
    assert numbers == {2: 50, 3: 50}
    assert Counter(ask.negative for ask in asks("negative", 80)) == dict.fromkeys(
        ("small", "large", "rubber", "metal"), 20
    )


def test_edits_change_what_they_say_and_nothing_else():
    for ask in asks("edit", 120):
        (old,), (new,) = ask.before.things, ask.scene.things
        assert old.color != new.color
        assert vars(old) | {"color": new.color} == vars(new)
    for name in ("edit", "inpaint"):
        for ask in asks(name, 120):
            (old, *rest), (new, *others) = ask.before.things, ask.scene.things
            assert rest == others
            assert (old.color, old.shape) != (new.color, new.shape)
            for edges in (box(old), box(new)):
                assert all(a <= b for a, b in zip(ask.region[:2], edges[:2], strict=True)), "the region holds both"
                assert all(a >= b for a, b in zip(ask.region[2:], edges[2:], strict=True)), "the region holds both"
    assert Counter(len(ask.scene.things) for ask in asks("inpaint", 120)) == {1: 60, 2: 60}
    for ask in asks("outpaint", 60):
        assert box(ask.before.things[0])[2] < 0.5 < box(ask.scene.things[0])[0], "the window's left half is bare floor"


def test_scenes_are_of_no_split():
    shown = {sample_scene(seed, split=split) for split in SPLITS for seed in range(100)}
    assert not shown & {ask.scene for name in PROMPT_SETS for ask in asks(name, 60)}
