"""Evaluation prompts: what a prompt asks for, whether a picture has it, and the prompt sets of `minimuse eval`.

    "two red cubes left of a metal sphere"    --parse_prompt--> PromptSpec: 2 x red cube, 1 x metal sphere; left
    Detections (eval_networks.py), PromptSpec --matches-------> Verdict: right, or what is wrong

A picture is right if it has everything that the prompt names: how many things, their attributes, their relation. What
the prompt does not name may be anything, but no other thing may be there.
Prompt i of a set depends only on i, and each prompt comes twice in a row. Pairs of color and shape, other attributes,
relations and numbers repeat with different periods, so every stretch of a set is balanced.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations, product
from random import Random
from typing import Annotated, NamedTuple

from minimuse.data_captions import FLOOR_PHRASE, OPENINGS, PARAPHRASES, RELATION_PHRASES, SYNONYMS, noun_phrase
from minimuse.data_scenes import HELD_OUT, MAX_THINGS, Scene, Thing, box, place_things, relations, stand_apart
from minimuse.eval_networks import FIELDS, Detection, Detections
from minimuse.utils import Fraction, Rule, check, require

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_TOLERANCE = 0.2  # detected places are not exact: relations hold from this much less than data_scenes.py asks for
_LEXICON = {  # every word for an attribute -> its field and its plain name, with paraphrases, synonyms and plurals
    word + ending: (field, name)
    for field, names in FIELDS.items()
    for name in names
    for word in (name, *PARAPHRASES[name], *SYNONYMS[name])
    for ending in (("", "es" if word.endswith("x") else "s") if field == "shape" else ("",))
}
_RELATION_NAMES = {phrase: name for name, phrases in RELATION_PHRASES.items() for phrase in phrases}
_OPENING = re.compile(rf"({'|'.join(OPENINGS).replace('there', 'there (is|are)')}) ")
_RELATION = re.compile(rf" (?:is |are )?({'|'.join(sorted(_RELATION_NAMES, key=len, reverse=True))}) ")
_AND = re.compile(r" ?, ?(?:and )?| and ")


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


def parse_prompt(prompt: str) -> PromptSpec:
    """A prompt in the words of data_captions.py, with paraphrases -> what it asks for. ValueError for other words."""
    words = check("prompt", prompt, str).lower().rstrip(" .").replace(",", " , ").split()
    text = " ".join(words).removesuffix(f" {FLOOR_PHRASE}")
    first, *related = _RELATION.split(_OPENING.sub("", text, 1) if _OPENING.match(text) else text)
    one, others = _AND.split(first), _AND.split(related[1]) if related else []
    one_relation = len(related) <= 2 and not (related and len(one) > 1)
    require(one_relation, f"{prompt!r}: expected at most one relation, between the first thing or group and the others")
    groups = tuple(_parse_group(phrase, prompt) for phrase in one + others)
    total = sum(group.number for group in groups)
    require(total <= MAX_THINGS, f"{prompt!r} asks for {total} things; scenes hold at most {MAX_THINGS}")
    return PromptSpec(groups, _RELATION_NAMES[related[0]] if related else "")


def _parse_group(phrase: str, prompt: str) -> ObjectGroup:
    """ "two small red cubes" -> ObjectGroup(2, {"size": "small", "color": "red", "shape": "cube"})."""
    number, *words = phrase.split() or [""]
    numbers, shapes = ", ".join(NUMBERS), ", ".join(FIELDS["shape"])
    require(number in NUMBERS, f"{prompt!r}: {phrase!r} does not start with a number; known: {numbers}")
    for word in words:
        require(word in _LEXICON, f"{prompt!r}: unknown word {word!r}; known: {', '.join(sorted(_LEXICON))}")
    attributes = dict(_LEXICON[word] for word in words)
    require(len(attributes) == len(words), f"{prompt!r}: {phrase!r} names an attribute twice")
    require("shape" in attributes, f"{prompt!r}: {phrase!r} names no shape; known: {shapes}, and other words")
    return ObjectGroup(NUMBERS[number], attributes)


def matches(found: Detections, spec: PromptSpec, *, min_confidence: float = 0.0) -> Verdict:
    """Does a picture have everything that the prompt names? Things are paired with the prompt so that least is wrong.

    A thing detected with less than `min_confidence` is wrong too: for a lump, the detector names the nearest shape.
    """
    check("min_confidence", min_confidence, Fraction)
    slots = [group for group in spec.groups for _ in range(group.number)]
    count = len(found.things)
    wrong = [] if count == len(slots) else [f"{count} thing{'s' * (count != 1)}, not {len(slots)}"]
    pairings = permutations([*found.things, *[None] * (len(slots) - count)], len(slots))
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


def possible_relations(a: Detection, b: Detection) -> set[str]:
    """Relations of a to b, as in data_scenes.py, if b may be a little from where it was detected."""
    shifts = product((-_TOLERANCE, 0.0, _TOLERANCE), repeat=2)
    return set().union(*(relations(a, b._replace(x=b.x + dx, depth=b.depth + dz)) for dx, dz in shifts))


_PAIRS = [pair for pair in product(FIELDS["color"], FIELDS["shape"]) if pair not in HELD_OUT]
SEEN = [_PAIRS[8 * i % 21] for i in range(21)]  # in an order in which neighbors differ in color and shape
NOVEL = sorted(HELD_OUT)
EXTRAS = [("", ""), ("small", ""), ("", "metal"), ("large", "rubber"), ("small", "metal"),
          ("", ""), ("large", ""), ("", "rubber"), ("large", "metal"), ("small", "rubber")]  # fmt: skip
Pair = tuple[str, str]  # color and shape, or size and material


class EvalPrompt(NamedTuple):
    """A prompt of a set, with what is needed to measure its picture."""

    prompt: str
    scene: Scene  # has everything that the prompt names; never part of training
    group: str  # the content of the prompt in plain words: pictures of one group resemble each other
    negative: str = ""  # the word to guide away from
    negative_prompt: str = ""  # the prompt with that word
    before: Scene | None = None  # edits: the picture to change
    region: tuple[float, float, float, float] = (0, 0, 0, 0)  # the part of it to change: left, top, right, bottom


def prompt_set(name: str, n: int) -> list[EvalPrompt]:
    """The first n prompts of a set."""
    require(name in PROMPT_SETS, f"unknown set {name!r}; give one of {', '.join(PROMPT_SETS)}")
    n = check("n", n, Annotated[int, Rule(lambda n: 1 <= n <= 10**6, "a whole number from 1 to 1,000,000")])
    return [PROMPT_SETS[name](i // 2, Random(f"{name}/{i // 2}"), Random(f"{name}/scene/{i}")) for i in range(n)]


def _words(pair: Pair, extra: Pair) -> tuple[str, ...]:
    """("red", "cube"), ("", "metal") -> ("red", "metal", "cube")."""
    return tuple(word for word in (extra[0], pair[0], extra[1], pair[1]) if word)


def _look(pair: Pair, rng: Random, extra: Pair = ("", "")) -> tuple[str, ...]:
    """Color, shape, size, material; drawn if not named."""
    return (*pair, extra[0] or rng.choice(FIELDS["size"]), extra[1] or rng.choice(FIELDS["material"]))


def _scene(rng: Random, looks: list[tuple], holds: Callable[[tuple[Thing, ...]], bool] = bool) -> Scene:
    """A random scene of these looks for which `holds` is True."""
    while not ((things := place_things(rng, looks)) and holds(things)):
        pass
    return Scene(things)


def _one(i: int, say: Random, rng: Random, pairs: list[Pair], paraphrase: bool = False) -> EvalPrompt:
    """One thing. A paraphrase replaces at least one word."""
    pair, extra = pairs[i % len(pairs)], EXTRAS[i % 10]
    words = _words(pair, extra)
    swapped = say.sample(words, say.randint(1, len(words))) if paraphrase else ()
    prompt = noun_phrase(words, 1, {word: say.choice(PARAPHRASES[word]) for word in swapped})
    return EvalPrompt(prompt, _scene(rng, [_look(pair, rng, extra)]), " ".join(words))


def _relation(i: int, say: Random, rng: Random) -> EvalPrompt:
    """Two things that differ in color or shape, and where the first stands."""
    pairs, extra = (SEEN[i % 21], SEEN[(i + 1 + i // 21 % 20) % 21]), EXTRAS[i % 10]
    extras = extra, (extra[0] and say.choice(FIELDS["size"]), extra[1] and say.choice(FIELDS["material"]))
    name = [*RELATION_PHRASES][(i + i // 10) % 5]
    first, second = (noun_phrase(_words(*both), 1, {}) for both in zip(pairs, extras, strict=True))
    looks = [_look(pair, rng, extra) for pair, extra in zip(pairs, extras, strict=True)]
    scene = _scene(rng, looks, lambda things: name in relations(*things))
    return EvalPrompt(f"{first} {say.choice(RELATION_PHRASES[name])} {second}", scene, f"{first} {name} {second}")


def _count(i: int, say: Random, rng: Random) -> EvalPrompt:
    """Two or three things with equal attributes. Three large ones fit into no picture, so that size is not named."""
    pair, extra, number = SEEN[i % 21], EXTRAS[i % 10], 2 + (i + i // 10) % 2
    if number == 3 and extra[0] == "large":
        extra = "", extra[1]
    prompt = noun_phrase(_words(pair, extra), number, {})
    while not (things := place_things(rng, [_look(pair, rng, extra)] * number)):
        pass  # if no size is named, small things fit
    return EvalPrompt(prompt, Scene(things), prompt)


def _negative(i: int, say: Random, rng: Random) -> EvalPrompt:
    """One thing, and a size or material to guide away from."""
    pair, extra = SEEN[i % 21], [("small", ""), ("large", ""), ("", "rubber"), ("", "metal")][i % 4]
    word, away = "".join(extra), noun_phrase(_words(pair, extra), 1, {})
    scene = _scene(rng, [_look(pair, rng)])
    return EvalPrompt(noun_phrase(pair, 1, {}), scene, f"{' '.join(pair)}, not {word}", word, away)


def _change(before: Scene, new: Pair, prompt: str, group: str) -> EvalPrompt:
    """The first thing of `before` gets another color and shape. The region has a little floor around both boxes."""
    old, *others = before.things
    put = replace(old, color=new[0], shape=new[1])
    left, top, right, bottom = zip(box(old), box(put), strict=True)
    start = (max(0.0, min(edge) - 0.03) for edge in (left, top))
    end = (min(1.0, max(edge) + 0.03) for edge in (right, bottom))
    region = (*start, *end)
    return EvalPrompt(prompt, Scene((put, *others)), group, before=before, region=region)


def _edit(i: int, say: Random, rng: Random) -> EvalPrompt:
    """The same thing in another color."""
    color, shape = SEEN[i % 21]
    others = [other for other, same in SEEN if same == shape and other != color]
    new = others[i // 21 % len(others)], shape
    before = _scene(rng, [_look((color, shape), rng)])
    return _change(before, new, noun_phrase(new, 1, {}), f"{color} {new[0]} {shape}")


def _inpaint(i: int, say: Random, rng: Random) -> EvalPrompt:
    """The only thing, or one of two, is replaced. The new one is as far from the edges and the other thing."""
    old, new, other = SEEN[i % 21], SEEN[(i + 1 + i // 21 % 18) % 21], SEEN[(i + 20) % 21]
    looks = [_look(pair, rng) for pair in (old, other)[: 1 + i % 2]]

    def free(things: tuple[Thing, ...]) -> bool:
        put = replace(things[0], color=new[0], shape=new[1])
        return all(0.02 <= edge <= 0.98 for edge in box(put)) and all(stand_apart(put, thing) for thing in things[1:])

    prompt = " and ".join(noun_phrase(pair, 1, {}) for pair in (new, other)[: 1 + i % 2])
    return _change(_scene(rng, looks, free), new, prompt, prompt)


def _outpaint(i: int, say: Random, rng: Random) -> EvalPrompt:
    """A picture with one thing at its left; the window half beyond its right edge gets one at its right."""
    old, new, extra = SEEN[i % 21], SEEN[(i + 1 + i // 21 % 20) % 21], EXTRAS[i % 10]
    before = _scene(rng, [_look(old, rng)], lambda things: box(things[0])[2] < 0.5)
    after = _scene(rng, [_look(new, rng, extra)], lambda things: box(things[0])[0] > 0.5)
    prompt = noun_phrase(_words(new, extra), 1, {})
    return EvalPrompt(prompt, after, prompt, before=before, region=(0.5, 0.0, 1.0, 1.0))


PROMPT_SETS: dict[str, Callable[[int, Random, Random], EvalPrompt]] = {  # (i, random words, random scene) -> prompt
    "seen": partial(_one, pairs=SEEN),  # "a small red cube"
    "novel": partial(_one, pairs=NOVEL),  # pairs of color and shape that are held out of training
    "paraphrases": partial(_one, pairs=SEEN, paraphrase=True),  # "a tiny crimson box": words held out of training
    "relations": _relation,  # "a red cube left of a gray sphere"
    "counts": _count,  # "three blue cylinders"
    "mixed": lambda i, *rngs: PROMPT_SETS[("seen", "relations", "counts")[i % 3]](i // 3, *rngs),
    "negative": _negative,
    "edit": _edit,
    "inpaint": _inpaint,
    "outpaint": _outpaint,
}
