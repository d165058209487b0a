"""prompts.py: every prompt means what its scene shows, sets are balanced, and hold what training never said."""

from collections import Counter

import pytest
from test_eval_prompts import perfect

from minimuse.data_captions import PARAPHRASES, RELATION_PHRASES, vocabulary
from minimuse.data_scenes import HELD_OUT, SPLITS, box, sample_scene
from minimuse.eval_prompts import matches, parse_prompt
from minimuse.prompts import EXTRAS, NOVEL, SEEN, SETS, asks

ALL = pytest.mark.parametrize("name", SETS)
SWAPS = {word for words in PARAPHRASES.values() for word in words}


def looks(ask):
    """The colour and shape of each group of a prompt."""
    return [(g.looks["color"], g.looks["shape"]) for g in parse_prompt(ask.prompt).groups]


@ALL
def test_every_prompt_is_understood_and_true_of_its_scene(name):
    for ask in asks(name, 240):
        verdict = matches(perfect(ask.scene), parse_prompt(ask.prompt))
        assert verdict.right, f"{ask.prompt!r} is not true of its scene: {verdict.wrong}"


@ALL
def test_ask_i_follows_from_i_alone_and_prompts_come_in_pairs(name):
    some = asks(name, 40)
    assert some == asks(name, 60)[:40]
    for a, b in zip(some[::2], some[1::2], strict=True):
        assert (a.prompt, a.group, a.negative) == (b.prompt, b.group, b.negative)
        assert a.scene != b.scene, "of one prompt, two scenes"


def test_the_first_of_them():
    assert [ask.prompt for ask in asks("counts", 3)] == ["two gray cubes"] * 2 + ["three small blue cylinders"]
    pairs = [looks(ask)[0] for ask in asks("seen", 24)[::2]]
    assert len({color for color, _ in pairs}) >= 6, "the pictures that are shown differ"


def test_nonsense_is_refused():
    for name, n in (("sene", 3), ("seen", 0)):
        with pytest.raises(ValueError, match="at least 1, and one of seen, novel"):
            asks(name, n)


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("novel", "paraphrases")])
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
    for ask in asks("paraphrases", 1000):
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
    named = Counter(tuple(parse_prompt(a.prompt).groups[0].looks.get(k) for k in ("size", "material"))
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
    shown = {sample_scene(seed, split=split) for split in SPLITS for seed in range(300)}
    assert not shown & {ask.scene for name in SETS for ask in asks(name, 60)}
