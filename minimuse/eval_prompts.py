"""What a prompt asks for, and whether a picture has it: the rule behind attribute accuracy.

    "two small red cubes left of a metal sphere" --parse_prompt--> PromptSpec: 2 x small red cube, 1 x metal sphere; left
    Detections (eval_detector.py), PromptSpec                   --matches-------> Verdict: right, or what is wrong

A picture is right where everything that the prompt names is: how many things, what each looks like, where they stand.
What the prompt does not name may be anything; a thing too many is wrong.

Not here: seeing what is in a picture (`eval_detector.py`), saying what is in a scene (`data_captions.py`).
"""

import re
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple

from minimuse.data_captions import FLOOR_PHRASE, OPENINGS, PARAPHRASES, RELATION_PHRASES, SYNONYMS
from minimuse.data_scenes import COLORS, MATERIALS, MAX_THINGS, SHAPES, SIZES, relations

if TYPE_CHECKING:
    from minimuse.eval_detector import Detection, Detections

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from random import Random

from minimuse.data_captions import noun_phrase
from minimuse.data_scenes import (
    HELD_OUT,
    Scene,
    Thing,
    box,
    place_things,
    stand_apart,
)

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
SLACK = 0.2  # a place is read, not known: relations may hold from so much nearer than in data_scenes.py (0.9 and 1.2)


class ObjectGroup(NamedTuple):
    """Things told in the same words."""

    number: int
    looks: dict[str, str]  # what is named of them: {"color": "red", "shape": "cube"}

    def __str__(self) -> str:
        order = ("size", "color", "material", "shape")
        return " ".join(self.looks[field] for field in order if field in self.looks)


class PromptSpec(NamedTuple):
    groups: tuple[ObjectGroup, ...]
    relation: str = ""  # of each thing of the first group to all of the others: "left", "right", "front", ...


class Verdict(NamedTuple):
    right: bool
    wrong: list[str]


def _lexicon() -> dict[str, tuple[str, str]]:
    """Every word for a look -> its field and its plain name; paraphrases, synonyms and plurals included."""
    words = {}
    for field, names in (("color", COLORS), ("shape", SHAPES), ("size", SIZES), ("material", MATERIALS)):
        for name in names:
            for word in (name, *PARAPHRASES[name], *SYNONYMS[name]):
                words[word] = (field, name)
                if field == "shape":
                    words[word + ("es" if word.endswith("x") else "s")] = (field, name)
    return words


_LEXICON = _lexicon()
_NAMES = {phrase: name for name, phrases in RELATION_PHRASES.items() for phrase in phrases}
_OPENING = re.compile(rf"({'|'.join(OPENINGS).replace('there', 'there (is|are)')}) ")
_RELATION = re.compile(rf" (?:is |are )?({'|'.join(sorted(_NAMES, key=len, reverse=True))}) ")
_AND = re.compile(r" ?, ?(?:and )?| and ")


def parse_prompt(prompt: str) -> PromptSpec:
    """A prompt in the words of data_captions.py, paraphrases included -> what it asks for; ValueError for any other word.

    >>> parse_prompt("a photo of two red cubes next to a shiny ball")
    PromptSpec(groups=(ObjectGroup(number=2, looks={'color': 'red', 'shape': 'cube'}),
                  ObjectGroup(number=1, looks={'material': 'metal', 'shape': 'sphere'})), relation='beside')
    """
    text = " ".join(prompt.lower().rstrip(" .").replace(",", " , ").split()).removesuffix(f" {FLOOR_PHRASE}")
    if opening := _OPENING.match(text):
        text = text[opening.end() :]
    first, *related = _RELATION.split(text)
    phrases = [*_AND.split(first), *(_AND.split(related[1]) if related else ())]
    if len(related) > 2 or (related and len(_AND.split(first)) > 1):
        raise ValueError(f"{prompt!r}: expected at most one relation, of one thing or group to what follows it")
    groups = tuple(_group(phrase, prompt) for phrase in phrases)
    if (total := sum(group.number for group in groups)) > MAX_THINGS:
        raise ValueError(f"{prompt!r} asks for {total} things; scenes hold at most {MAX_THINGS}")
    return PromptSpec(groups, _NAMES[related[0]] if related else "")


def _group(phrase: str, prompt: str) -> ObjectGroup:
    """ "two small red cubes" -> ObjectGroup(2, {"size": "small", "color": "red", "shape": "cube"})."""
    number, *words = phrase.split() or [""]
    if number not in NUMBERS:
        raise ValueError(f"{prompt!r}: {phrase!r} does not begin with a number; known: {', '.join(NUMBERS)}")
    looks: dict[str, str] = {}
    for word in words:
        if word not in _LEXICON:
            raise ValueError(f"{prompt!r}: unknown word {word!r}; known: {', '.join(sorted(_LEXICON))}")
        field, name = _LEXICON[word]
        if field in looks:
            raise ValueError(f"{prompt!r}: {phrase!r} names its {field} twice")
        looks[field] = name
    if "shape" not in looks:
        raise ValueError(f"{prompt!r}: {phrase!r} names no shape; known: {', '.join(SHAPES)}, and words for them")
    return ObjectGroup(NUMBERS[number], looks)


def matches(reading: "Detections", wants: PromptSpec, *, sure: float = 0.0, slack: float = SLACK) -> Verdict:
    """Has the picture everything that the prompt names? Things are paired with what is asked so that least is wrong.

    A thing that the reader is less `sure` of than this, in [0, 1], is wrong too: a lump is nearest to something.
    """
    slots = [(i, group) for i, group in enumerate(wants.groups) for _ in range(group.number)]
    things, count = list(reading.things), len(reading.things)
    wrong = [] if count == len(slots) else [f"{count} thing{'s' * (count != 1)}, not {len(slots)}"]
    things += [None] * (len(slots) - count)
    wrong += min((_faults(slots, pairing, wants, sure, slack) for pairing in permutations(things, len(slots))), key=len)
    return Verdict(not wrong, wrong)


def _faults(
    slots: list[tuple[int, ObjectGroup]], pairing: tuple, wants: PromptSpec, sure: float, slack: float
) -> list[str]:
    """What is wrong if the things of the pairing are meant to be what the slots ask for."""
    wrong = []
    for (_, group), thing in zip(slots, pairing, strict=True):
        if thing is None:
            wrong.append(f"no {group}")
            continue
        if thing.confidence < sure:
            wrong.append(f"the {group} is unclear: confidence {thing.confidence:.2f}")
        for field, name in group.looks.items():
            if (seen := getattr(thing, field)) != name:
                wrong.append(f"the {group} has {field} {seen}, not {name}")
    if wants.relation:
        said = RELATION_PHRASES[wants.relation][0]
        sides = [
            [thing for (i, _), thing in zip(slots, pairing, strict=True) if (i == 0) == own] for own in (True, False)
        ]
        for a in sides[0]:
            for b in sides[1]:
                if a and b and wants.relation not in possible_relations(a, b, slack):
                    wrong.append(f"the {a.color} {a.shape} is not {said} the {b.color} {b.shape}")
    return wrong


def possible_relations(a: "Detection", b: "Detection", slack: float = SLACK) -> set[str]:
    """The relations of data_scenes.py that hold of a as seen from b, if b may stand up to `slack` from where it was read."""
    shifts = (-slack, 0.0, slack)
    moved = [b._replace(x=b.x + dx, depth=b.depth + dz) for dx in shifts for dz in shifts]
    return set().union(*(relations(a, b) for b in moved))


_PAIRS = [pair for pair in product(COLORS, SHAPES) if pair not in HELD_OUT]
SEEN = [_PAIRS[8 * i % 21] for i in range(21)]  # so that a few in a row differ in colour and shape
NOVEL = sorted(HELD_OUT)
EXTRAS = [("", ""), ("small", ""), ("", "metal"), ("large", "rubber"), ("small", "metal"),
          ("", ""), ("large", ""), ("", "rubber"), ("large", "metal"), ("small", "rubber")]  # fmt: skip


class EvalPrompt(NamedTuple):
    """What is asked for."""

    prompt: str
    scene: Scene  # it has all that the prompt names; training never shows it
    group: str  # what the prompt asks for, in plain words: pictures of one group resemble each other
    negative: str = ""  # the word to guide away from
    before: Scene | None = None  # edits: the picture to change
    region: tuple[float, float, float, float] = (0, 0, 0, 0)  # of it that is to change: left, top, right, bottom


def prompt_set(name: str, n: int) -> list[EvalPrompt]:
    """The first n of a set; ValueError where there is no such set.

    >>> [ask.prompt for ask in prompt_set("counts", 3)]
    ['two gray cubes', 'two gray cubes', 'three small blue cylinders']
    """
    if name not in PROMPT_SETS or n < 1:
        raise ValueError(f"{n} prompts of set {name!r}: give at least 1, and one of {', '.join(PROMPT_SETS)}")
    return [PROMPT_SETS[name](i // 2, Random(f"{name}/{i // 2}"), Random(f"{name}/scene/{i}")) for i in range(n)]


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


def _one(i: int, pairs: list[tuple[str, str]], rng: Random, swap: Random | None = None) -> EvalPrompt:
    """One object; with `swap`, at least one of its words a paraphrase."""
    pair, extra = pairs[i % len(pairs)], EXTRAS[i % len(EXTRAS)]
    words = _named(pair, extra)
    swapped = swap.sample(words, swap.randint(1, len(words))) if swap else ()
    prompt = noun_phrase(words, 1, {word: swap.choice(PARAPHRASES[word]) for word in swapped})
    return EvalPrompt(prompt, _scene(rng, [_look(pair, extra, rng)]), " ".join(words))


def _relation(i: int, say: Random, rng: Random) -> EvalPrompt:
    """Two objects that differ in colour or shape, and where the first stands."""
    pairs, extra = (SEEN[i % 21], SEEN[(i + 1 + i // 21 % 20) % 21]), EXTRAS[i % 10]
    extras = extra, tuple(word and say.choice(names) for word, names in zip(extra, (SIZES, MATERIALS), strict=True))
    name = [*RELATION_PHRASES][(i + i // 10) % 5]
    first, second = (noun_phrase(_named(*both), 1, {}) for both in zip(pairs, extras, strict=True))
    looks = [_look(*both, rng) for both in zip(pairs, extras, strict=True)]
    scene = _scene(rng, looks, lambda things: name in relations(*things))
    return EvalPrompt(f"{first} {say.choice(RELATION_PHRASES[name])} {second}", scene, f"{first} {name} {second}")


def _count(i: int, rng: Random) -> EvalPrompt:
    """Two or three alike in all that is named, and in all else. Three large ones fit into no picture: size unnamed."""
    pair, extra, number = SEEN[i % 21], EXTRAS[i % 10], 2 + (i + i // 10) % 2
    if number == 3 and extra[0] == "large":
        extra = "", extra[1]
    prompt = noun_phrase(_named(pair, extra), number, {})
    while True:  # where no size is named, small ones fit
        if things := place_things(rng, [_look(pair, extra, rng)] * number):
            return EvalPrompt(prompt, Scene(things), prompt)


def _negative(i: int, rng: Random) -> EvalPrompt:
    pair, word = SEEN[i % 21], (*SIZES, *MATERIALS)[i % 4]
    return EvalPrompt(
        noun_phrase(pair, 1, {}), _scene(rng, [_look(pair, ("", ""), rng)]), f"{' '.join(pair)}, not {word}", word
    )


def _around(*things: Thing) -> tuple[float, float, float, float]:
    """What holds the boxes of all, and a little of the floor about them."""
    left, top, right, bottom = zip(*map(box, things), strict=True)
    return (
        max(0.0, min(left) - 0.03),
        max(0.0, min(top) - 0.03),
        min(1.0, max(right) + 0.03),
        min(1.0, max(bottom) + 0.03),
    )


def _edit(i: int, rng: Random) -> EvalPrompt:
    """The same thing in another colour."""
    color, shape = SEEN[i % 21]
    others = [c for c, s in SEEN if s == shape and c != color]
    new = others[i // 21 % len(others)]
    before = _scene(rng, [_look((color, shape), ("", ""), rng)])
    put = replace(before.things[0], color=new)
    return EvalPrompt(noun_phrase((new, shape), 1, {}), Scene((put,)), f"{color} {new} {shape}", "", before, _around(put))


def _inpaint(i: int, rng: Random) -> EvalPrompt:
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
    return EvalPrompt(prompt, after, prompt, "", before, _around(before.things[0], after.things[0]))


def _outpaint(i: int, rng: Random) -> EvalPrompt:
    """A picture with one thing at its left; the window half beyond its right edge is to have one at its right."""
    old, new = SEEN[i % 21], SEEN[(i + 1 + i // 21 % 20) % 21]
    before = _scene(rng, [_look(old, ("", ""), rng)], lambda things: box(things[0])[2] < 0.5)
    extra = EXTRAS[i % 10]
    after = _scene(rng, [_look(new, extra, rng)], lambda things: box(things[0])[0] > 0.5)
    prompt = noun_phrase(_named(new, extra), 1, {})
    return EvalPrompt(prompt, after, prompt, "", before, (0.5, 0.0, 1.0, 1.0))


PROMPT_SETS: dict[str, Callable[[int, Random, Random], EvalPrompt]] = {
    "seen": lambda i, say, rng: _one(i, SEEN, rng),
    "novel": lambda i, say, rng: _one(i, NOVEL, rng),
    "paraphrases": lambda i, say, rng: _one(i, SEEN, rng, say),
    "relations": _relation,
    "counts": lambda i, say, rng: _count(i, rng),
    "mixed": lambda i, say, rng: PROMPT_SETS[("seen", "relations", "counts")[i % 3]](i // 3, say, rng),
    "negative": lambda i, say, rng: _negative(i, rng),
    "edit": lambda i, say, rng: _edit(i, rng),
    "inpaint": lambda i, say, rng: _inpaint(i, rng),
    "outpaint": lambda i, say, rng: _outpaint(i, rng),
}
