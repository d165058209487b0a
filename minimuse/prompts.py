"""The fixed prompt sets that `minimuse eval` draws: what is asked for, and a scene that has it.

    seen          "a small red cube"                        colour and shape as in training
    novel         "a brown metal cube"                      the held-out pairs of colour and shape
    paraphrases   "a tiny crimson box"                      words that no training caption contains
    relations     "a red cube left of a gray sphere"
    counts        "three blue cylinders"
    mixed         of seen, relations and counts in turn
    negative      "a red cube", not "a red metal cube"      a size or material to guide away from
    edit          a picture of a blue cube, "a red cube"
    inpaint       a picture, the region of one of its things, and what shall stand there instead
    outpaint      the right half of a picture, bare floor, and what shall stand beyond its edge

Ask i of a set is a function of i alone. Each prompt comes twice in a row, so that pictures of one prompt compare.
Colours and shapes, sizes and materials (named in 6 of 10 prompts each), relations and numbers go round in cycles of
lengths that share no factor, so that any stretch of a set is balanced.
Not here: drawing and measuring (`eval_run.py`), what a prompt means (`eval_prompts.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from random import Random
from typing import NamedTuple

from minimuse.data_captions import PARAPHRASES, RELATION_PHRASES, noun_phrase
from minimuse.data_scenes import (
    COLORS,
    HELD_OUT,
    MATERIALS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    box,
    place_things,
    relations,
    stand_apart,
)

_PAIRS = [pair for pair in product(COLORS, SHAPES) if pair not in HELD_OUT]
SEEN = [_PAIRS[8 * i % 21] for i in range(21)]  # so that a few in a row differ in colour and shape
NOVEL = sorted(HELD_OUT)
EXTRAS = [("", ""), ("small", ""), ("", "metal"), ("large", "rubber"), ("small", "metal"),
          ("", ""), ("large", ""), ("", "rubber"), ("large", "metal"), ("small", "rubber")]  # fmt: skip


class Ask(NamedTuple):
    """What is asked for."""

    prompt: str
    scene: Scene  # it has all that the prompt names; training never shows it
    group: str  # what the prompt asks for, in plain words: pictures of one group resemble each other
    negative: str = ""  # the word to guide away from
    before: Scene | None = None  # edits: the picture to change
    region: tuple[float, float, float, float] = (0, 0, 0, 0)  # of it that is to change: left, top, right, bottom


def asks(name: str, n: int) -> list[Ask]:
    """The first n of a set; ValueError where there is no such set.

    >>> [ask.prompt for ask in asks("counts", 3)]
    ['two gray cubes', 'two gray cubes', 'three small blue cylinders']
    """
    if name not in SETS or n < 1:
        raise ValueError(f"{n} prompts of set {name!r}: give at least 1, and one of {', '.join(SETS)}")
    return [SETS[name](i // 2, Random(f"{name}/{i // 2}"), Random(f"{name}/scene/{i}")) for i in range(n)]


def _named(pair: tuple[str, str], extra: tuple[str, str]) -> tuple[str, ...]:
    """("red", "cube"), ("", "metal") -> ("red", "metal", "cube")."""
    return tuple(word for word in (extra[0], pair[0], extra[1], pair[1]) if word)


def _look(pair: tuple[str, str], extra: tuple[str, str], rng: Random) -> tuple[str, ...]:
    """-> colour, shape, size, material; drawn where not named."""
    return (*pair, extra[0] or rng.choice(SIZES), extra[1] or rng.choice(MATERIALS))


def _scene(rng: Random, looks: list[tuple], holds: Callable[[tuple[Thing, ...]], bool] = bool) -> Scene:
    """Looks -> a scene of them that `holds`."""
    while True:
        if (things := place_things(rng, looks)) and holds(things):
            return Scene(things)


def _one(i: int, pairs: list[tuple[str, str]], rng: Random, swap: Random | None = None) -> Ask:
    """One object; with `swap`, at least one of its words a paraphrase."""
    pair, extra = pairs[i % len(pairs)], EXTRAS[i % len(EXTRAS)]
    words = _named(pair, extra)
    swapped = swap.sample(words, swap.randint(1, len(words))) if swap else ()
    prompt = noun_phrase(words, 1, {word: swap.choice(PARAPHRASES[word]) for word in swapped})
    return Ask(prompt, _scene(rng, [_look(pair, extra, rng)]), " ".join(words))


def _relation(i: int, say: Random, rng: Random) -> Ask:
    """Two objects that differ in colour or shape, and where the first stands."""
    pairs, extra = (SEEN[i % 21], SEEN[(i + 1 + i // 21 % 20) % 21]), EXTRAS[i % 10]
    extras = extra, tuple(word and say.choice(names) for word, names in zip(extra, (SIZES, MATERIALS), strict=True))
    name = [*RELATION_PHRASES][(i + i // 10) % 5]
    first, second = (noun_phrase(_named(*both), 1, {}) for both in zip(pairs, extras, strict=True))
    looks = [_look(*both, rng) for both in zip(pairs, extras, strict=True)]
    scene = _scene(rng, looks, lambda things: name in relations(*things))
    return Ask(f"{first} {say.choice(RELATION_PHRASES[name])} {second}", scene, f"{first} {name} {second}")


def _count(i: int, rng: Random) -> Ask:
    """Two or three alike in all that is named, and in all else. Three large ones fit into no picture: size unnamed."""
    pair, extra, number = SEEN[i % 21], EXTRAS[i % 10], 2 + (i + i // 10) % 2
    if number == 3 and extra[0] == "large":
        extra = "", extra[1]
    prompt = noun_phrase(_named(pair, extra), number, {})
    while True:  # where no size is named, small ones fit
        if things := place_things(rng, [_look(pair, extra, rng)] * number):
            return Ask(prompt, Scene(things), prompt)


def _negative(i: int, rng: Random) -> Ask:
    pair, word = SEEN[i % 21], (*SIZES, *MATERIALS)[i % 4]
    return Ask(noun_phrase(pair, 1, {}), _scene(rng, [_look(pair, ("", ""), rng)]), f"{' '.join(pair)}, not {word}", word)


def _around(*things: Thing) -> tuple[float, float, float, float]:
    """What holds the boxes of all, and a little of the floor about them."""
    left, top, right, bottom = zip(*map(box, things), strict=True)
    return (
        max(0.0, min(left) - 0.03),
        max(0.0, min(top) - 0.03),
        min(1.0, max(right) + 0.03),
        min(1.0, max(bottom) + 0.03),
    )


def _edit(i: int, rng: Random) -> Ask:
    """The same thing in another colour."""
    color, shape = SEEN[i % 21]
    others = [c for c, s in SEEN if s == shape and c != color]
    new = others[i // 21 % len(others)]
    before = _scene(rng, [_look((color, shape), ("", ""), rng)])
    put = replace(before.things[0], color=new)
    return Ask(noun_phrase((new, shape), 1, {}), Scene((put,)), f"{color} {new} {shape}", "", before, _around(put))


def _inpaint(i: int, rng: Random) -> Ask:
    """The only one of the things, or one of two, is replaced; what replaces it stands as free as it did."""
    old, new, other = SEEN[i % 21], SEEN[(i + 1 + i // 21 % 18) % 21], SEEN[(i + 20) % 21]
    looks = [_look(pair, ("", ""), rng) for pair in (old, other)[: 1 + i % 2]]

    def replaced(things: tuple[Thing, ...]) -> tuple[Thing, ...]:
        return (replace(things[0], color=new[0], shape=new[1]), *things[1:])

    def free(things: tuple[Thing, ...]) -> bool:
        put, *rest = replaced(things)
        return all(0.02 <= edge <= 0.98 for edge in box(put)) and all(stand_apart(put, thing) for thing in rest)

    before = _scene(rng, looks, free)
    after = Scene(replaced(before.things))
    prompt = " and ".join(noun_phrase(pair, 1, {}) for pair in (new, other)[: 1 + i % 2])
    return Ask(prompt, after, prompt, "", before, _around(before.things[0], after.things[0]))


def _outpaint(i: int, rng: Random) -> Ask:
    """A picture with one thing at its left; the window half beyond its right edge is to have one at its right."""
    old, new = SEEN[i % 21], SEEN[(i + 1 + i // 21 % 20) % 21]
    before = _scene(rng, [_look(old, ("", ""), rng)], lambda things: box(things[0])[2] < 0.5)
    extra = EXTRAS[i % 10]
    after = _scene(rng, [_look(new, extra, rng)], lambda things: box(things[0])[0] > 0.5)
    prompt = noun_phrase(_named(new, extra), 1, {})
    return Ask(prompt, after, prompt, "", before, (0.5, 0.0, 1.0, 1.0))


SETS: dict[str, Callable[[int, Random, Random], Ask]] = {
    "seen": lambda i, say, rng: _one(i, SEEN, rng),
    "novel": lambda i, say, rng: _one(i, NOVEL, rng),
    "paraphrases": lambda i, say, rng: _one(i, SEEN, rng, say),
    "relations": _relation,
    "counts": lambda i, say, rng: _count(i, rng),
    "mixed": lambda i, say, rng: SETS[("seen", "relations", "counts")[i % 3]](i // 3, say, rng),
    "negative": lambda i, say, rng: _negative(i, rng),
    "edit": lambda i, say, rng: _edit(i, rng),
    "inpaint": lambda i, say, rng: _inpaint(i, rng),
    "outpaint": lambda i, say, rng: _outpaint(i, rng),
}
