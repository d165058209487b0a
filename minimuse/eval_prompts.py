"""Evaluation prompts: what a prompt asks for, whether a picture has it, and the prompt sets of `minimuse eval`.

    "two red cubes left of a metal sphere"    --parse_prompt--> PromptSpec: 2 x red cube, 1 x metal sphere; left
    Detections (eval_detector.py), PromptSpec --matches-------> Verdict: right, or what is wrong

A picture is right if it has everything that the prompt names: how many things, their attributes, their relation. What
the prompt does not name may be anything, but no other thing may be there.

There are sets about one thing (seen, novel, paraphrases), several (relations, counts, mixed), and edits (edit, inpaint,
outpaint). Prompt i of a set depends only on i. Each prompt comes twice in a row, so that pictures of the same prompt
compare. Pairs, attributes, relations and numbers repeat with different periods: every stretch of a set is balanced.
Not here: detecting things (`eval_detector.py`), captions of scenes (`data_captions.py`).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from random import Random
from typing import NamedTuple

from minimuse.data_captions import FLOOR_PHRASE, OPENINGS, PARAPHRASES, RELATION_PHRASES, SYNONYMS, noun_phrase
from minimuse.data_scenes import (
    COLORS,
    HELD_OUT,
    MATERIALS,
    MAX_THINGS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    box,
    place_things,
    relations,
    stand_apart,
)
from minimuse.eval_detector import FIELDS, Detection, Detections

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
TOLERANCE = 0.2  # detected places are not exact: relations hold from this much less than data_scenes.py asks for

# --- what a prompt asks for -------------------------------------------------------------------------------------------


class ObjectGroup(NamedTuple):
    """Things that a prompt describes with the same words."""

    number: int
    attributes: dict[str, str]  # those that are named: {"color": "red", "shape": "cube"}

    def __str__(self) -> str:
        order = ("size", "color", "material", "shape")
        return " ".join(self.attributes[field] for field in order if field in self.attributes)


class PromptSpec(NamedTuple):
    """What a prompt asks for."""

    groups: tuple[ObjectGroup, ...]
    relation: str = ""  # of each thing of the first group to all others: "left", "right", "front", ...


class Verdict(NamedTuple):
    """Does a picture have what a prompt asks for?"""

    right: bool
    wrong: list[str]


def _lexicon() -> dict[str, tuple[str, str]]:
    """Every word for an attribute -> its field and its plain name, with paraphrases, synonyms and plurals."""
    words = {}
    for field, names in FIELDS.items():
        for name in names:
            for word in (name, *PARAPHRASES[name], *SYNONYMS[name]):
                words[word] = (field, name)
                if field == "shape":
                    words[word + ("es" if word.endswith("x") else "s")] = (field, name)
    return words


_LEXICON = _lexicon()
_RELATION_NAMES = {phrase: name for name, phrases in RELATION_PHRASES.items() for phrase in phrases}
_OPENING = re.compile(rf"({'|'.join(OPENINGS).replace('there', 'there (is|are)')}) ")
_RELATION = re.compile(rf" (?:is |are )?({'|'.join(sorted(_RELATION_NAMES, key=len, reverse=True))}) ")
_AND = re.compile(r" ?, ?(?:and )?| and ")


def parse_prompt(prompt: str) -> PromptSpec:
    """A prompt in the words of data_captions.py, with paraphrases -> what it asks for. ValueError for other words.

    >>> parse_prompt("a photo of two red cubes next to a shiny ball")
    PromptSpec(groups=(ObjectGroup(number=2, attributes={'color': 'red', 'shape': 'cube'}),
                       ObjectGroup(number=1, attributes={'material': 'metal', 'shape': 'sphere'})), relation='beside')
    """
    text = " ".join(prompt.lower().rstrip(" .").replace(",", " , ").split()).removesuffix(f" {FLOOR_PHRASE}")
    if opening := _OPENING.match(text):
        text = text[opening.end() :]
    first, *related = _RELATION.split(text)
    phrases = [*_AND.split(first), *(_AND.split(related[1]) if related else ())]
    if len(related) > 2 or (related and len(_AND.split(first)) > 1):
        raise ValueError(f"{prompt!r}: expected at most one relation, between the first thing or group and the others")
    groups = tuple(_parse_group(phrase, prompt) for phrase in phrases)
    if (total := sum(group.number for group in groups)) > MAX_THINGS:
        raise ValueError(f"{prompt!r} asks for {total} things; scenes hold at most {MAX_THINGS}")
    return PromptSpec(groups, _RELATION_NAMES[related[0]] if related else "")


def _parse_group(phrase: str, prompt: str) -> ObjectGroup:
    """ "two small red cubes" -> ObjectGroup(2, {"size": "small", "color": "red", "shape": "cube"})."""
    number, *words = phrase.split() or [""]
    if number not in NUMBERS:
        raise ValueError(f"{prompt!r}: {phrase!r} does not start with a number; known: {', '.join(NUMBERS)}")
    attributes: dict[str, str] = {}
    for word in words:
        if word not in _LEXICON:
            raise ValueError(f"{prompt!r}: unknown word {word!r}; known: {', '.join(sorted(_LEXICON))}")
        field, name = _LEXICON[word]
        if field in attributes:
            raise ValueError(f"{prompt!r}: {phrase!r} names its {field} twice")
        attributes[field] = name
    if "shape" not in attributes:
        raise ValueError(f"{prompt!r}: {phrase!r} names no shape; known: {', '.join(SHAPES)}, and words for them")
    return ObjectGroup(NUMBERS[number], attributes)


# --- does a picture have it? ------------------------------------------------------------------------------------------


def matches(found: Detections, spec: PromptSpec, *, min_confidence: float = 0.0) -> Verdict:
    """Does a picture have everything that the prompt names? Things are paired with the prompt so that least is wrong.

    A thing detected with less than `min_confidence` is wrong too: for a lump, the detector names the nearest shape.
    """
    slots = [group for group in spec.groups for _ in range(group.number)]
    things, count = list(found.things), len(found.things)
    wrong = [] if count == len(slots) else [f"{count} thing{'s' * (count != 1)}, not {len(slots)}"]
    things += [None] * (len(slots) - count)
    pairings = permutations(things, len(slots))
    wrong += min((_faults(slots, pairing, spec, min_confidence) for pairing in pairings), key=len)
    return Verdict(not wrong, wrong)


def _faults(slots: list[ObjectGroup], pairing: tuple, spec: PromptSpec, min_confidence: float) -> list[str]:
    """What is wrong if the things of the pairing are meant to be what the slots ask for."""
    wrong = []
    for group, thing in zip(slots, pairing, strict=True):
        if thing is None:
            wrong.append(f"no {group}")
            continue
        if thing.confidence < min_confidence:
            wrong.append(f"the {group} is unclear: confidence {thing.confidence:.2f}")
        for field, name in group.attributes.items():
            if (seen := getattr(thing, field)) != name:
                wrong.append(f"the {group} has {field} {seen}, not {name}")
    if spec.relation:
        first = spec.groups[0].number
        for a, b in product(filter(None, pairing[:first]), filter(None, pairing[first:])):
            if spec.relation not in possible_relations(a, b):
                phrase = RELATION_PHRASES[spec.relation][0]
                wrong.append(f"the {a.color} {a.shape} is not {phrase} the {b.color} {b.shape}")
    return wrong


def possible_relations(a: Detection, b: Detection, tolerance: float = TOLERANCE) -> set[str]:
    """Relations of a to b, as in data_scenes.py, if b may be up to `tolerance` from where it was detected."""
    shifts = (-tolerance, 0.0, tolerance)
    moved = [b._replace(x=b.x + dx, depth=b.depth + dz) for dx in shifts for dz in shifts]
    return set().union(*(relations(a, b) for b in moved))


# --- prompt sets ------------------------------------------------------------------------------------------------------

_PAIRS = [pair for pair in product(COLORS, SHAPES) if pair not in HELD_OUT]
SEEN = [_PAIRS[8 * i % 21] for i in range(21)]  # in an order in which neighbors differ in color and shape
NOVEL = sorted(HELD_OUT)
EXTRAS = [("", ""), ("small", ""), ("", "metal"), ("large", "rubber"), ("small", "metal"),
          ("", ""), ("large", ""), ("", "rubber"), ("large", "metal"), ("small", "rubber")]  # fmt: skip


class EvalPrompt(NamedTuple):
    """A prompt of a set, with what is needed to measure its picture."""

    prompt: str
    scene: Scene  # has everything that the prompt names; never part of training
    group: str  # the content of the prompt in plain words: pictures of one group resemble each other
    negative: str = ""  # the word to guide away from
    before: Scene | None = None  # edits: the picture to change
    region: tuple[float, float, float, float] = (0, 0, 0, 0)  # the part of it to change: left, top, right, bottom


def prompt_set(name: str, n: int) -> list[EvalPrompt]:
    """The first n prompts of a set.

    >>> [each.prompt for each in prompt_set("counts", 3)]
    ['two gray cubes', 'two gray cubes', 'three small blue cylinders']
    """
    if name not in PROMPT_SETS or n < 1:
        raise ValueError(f"{n} prompts of set {name!r}: give at least 1, and one of {', '.join(PROMPT_SETS)}")
    make = PROMPT_SETS[name]
    return [make(i // 2, Random(f"{name}/{i // 2}"), Random(f"{name}/scene/{i}")) for i in range(n)]


def _words(pair: tuple[str, str], extra: tuple[str, str]) -> tuple[str, ...]:
    """("red", "cube"), ("", "metal") -> ("red", "metal", "cube")."""
    return tuple(word for word in (extra[0], pair[0], extra[1], pair[1]) if word)


def _look(pair: tuple[str, str], extra: tuple[str, str], rng: Random) -> tuple[str, ...]:
    """Color, shape, size, material; drawn if not named."""
    return (*pair, extra[0] or rng.choice(SIZES), extra[1] or rng.choice(MATERIALS))


def _scene(rng: Random, looks: list[tuple], holds: Callable[[tuple[Thing, ...]], bool] = bool) -> Scene:
    """A random scene of these looks for which `holds` is True."""
    while True:
        if (things := place_things(rng, looks)) and holds(things):
            return Scene(things)


def _one(i: int, pairs: list[tuple[str, str]], rng: Random, swap: Random | None = None) -> EvalPrompt:
    """One thing. With `swap`, at least one of its words is a paraphrase."""
    pair, extra = pairs[i % len(pairs)], EXTRAS[i % len(EXTRAS)]
    words = _words(pair, extra)
    swapped = swap.sample(words, swap.randint(1, len(words))) if swap else ()
    prompt = noun_phrase(words, 1, {word: swap.choice(PARAPHRASES[word]) for word in swapped})
    return EvalPrompt(prompt, _scene(rng, [_look(pair, extra, rng)]), " ".join(words))


def _relation(i: int, say: Random, rng: Random) -> EvalPrompt:
    """Two things that differ in color or shape, and where the first stands."""
    pairs, extra = (SEEN[i % 21], SEEN[(i + 1 + i // 21 % 20) % 21]), EXTRAS[i % 10]
    extras = extra, tuple(word and say.choice(names) for word, names in zip(extra, (SIZES, MATERIALS), strict=True))
    name = [*RELATION_PHRASES][(i + i // 10) % 5]
    first, second = (noun_phrase(_words(*both), 1, {}) for both in zip(pairs, extras, strict=True))
    looks = [_look(*both, rng) for both in zip(pairs, extras, strict=True)]
    scene = _scene(rng, looks, lambda things: name in relations(*things))
    return EvalPrompt(f"{first} {say.choice(RELATION_PHRASES[name])} {second}", scene, f"{first} {name} {second}")


def _count(i: int, rng: Random) -> EvalPrompt:
    """Two or three things with equal attributes. Three large ones fit into no picture, so that size is not named."""
    pair, extra, number = SEEN[i % 21], EXTRAS[i % 10], 2 + (i + i // 10) % 2
    if number == 3 and extra[0] == "large":
        extra = "", extra[1]
    prompt = noun_phrase(_words(pair, extra), number, {})
    while True:  # if no size is named, small things fit
        if things := place_things(rng, [_look(pair, extra, rng)] * number):
            return EvalPrompt(prompt, Scene(things), prompt)


def _negative(i: int, rng: Random) -> EvalPrompt:
    pair, word = SEEN[i % 21], (*SIZES, *MATERIALS)[i % 4]
    scene = _scene(rng, [_look(pair, ("", ""), rng)])
    return EvalPrompt(noun_phrase(pair, 1, {}), scene, f"{' '.join(pair)}, not {word}", word)


def _around(*things: Thing) -> tuple[float, float, float, float]:
    """A region with the boxes of all things and a little floor around them."""
    left, top, right, bottom = zip(*map(box, things), strict=True)
    low = (max(0.0, min(edges) - 0.03) for edges in (left, top))
    high = (min(1.0, max(edges) + 0.03) for edges in (right, bottom))
    return (*low, *high)


def _edit(i: int, rng: Random) -> EvalPrompt:
    """The same thing in another color."""
    color, shape = SEEN[i % 21]
    others = [other for other, same in SEEN if same == shape and other != color]
    new = others[i // 21 % len(others)]
    before = _scene(rng, [_look((color, shape), ("", ""), rng)])
    put = replace(before.things[0], color=new)
    prompt = noun_phrase((new, shape), 1, {})
    return EvalPrompt(prompt, Scene((put,)), f"{color} {new} {shape}", "", before, _around(put))


def _inpaint(i: int, rng: Random) -> EvalPrompt:
    """The only thing, or one of two, is replaced. The new one is as far from the edges and the other thing."""
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
    return EvalPrompt(prompt, after, prompt, "", before, _around(before.things[0], after.things[0]))


def _outpaint(i: int, rng: Random) -> EvalPrompt:
    """A picture with one thing at its left; the window half beyond its right edge gets one at its right."""
    old, new = SEEN[i % 21], SEEN[(i + 1 + i // 21 % 20) % 21]
    before = _scene(rng, [_look(old, ("", ""), rng)], lambda things: box(things[0])[2] < 0.5)
    extra = EXTRAS[i % 10]
    after = _scene(rng, [_look(new, extra, rng)], lambda things: box(things[0])[0] > 0.5)
    prompt = noun_phrase(_words(new, extra), 1, {})
    return EvalPrompt(prompt, after, prompt, "", before, (0.5, 0.0, 1.0, 1.0))


PROMPT_SETS: dict[str, Callable[[int, Random, Random], EvalPrompt]] = {  # (i, random words, random scene) -> prompt
    "seen": lambda i, say, rng: _one(i, SEEN, rng),  # "a small red cube"
    "novel": lambda i, say, rng: _one(i, NOVEL, rng),  # pairs of color and shape that are held out of training
    "paraphrases": lambda i, say, rng: _one(i, SEEN, rng, say),  # "a tiny crimson box": words held out of training
    "relations": _relation,  # "a red cube left of a gray sphere"
    "counts": lambda i, say, rng: _count(i, rng),  # "three blue cylinders"
    "mixed": lambda i, say, rng: PROMPT_SETS[("seen", "relations", "counts")[i % 3]](i // 3, say, rng),
    "negative": lambda i, say, rng: _negative(i, rng),  # "a red cube", and a size or material to guide away from
    "edit": lambda i, say, rng: _edit(i, rng),
    "inpaint": lambda i, say, rng: _inpaint(i, rng),
    "outpaint": lambda i, say, rng: _outpaint(i, rng),
}
