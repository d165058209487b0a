"""What a prompt asks for, and whether a picture has it: the rule behind attribute accuracy.

    "two small red cubes left of a metal sphere" --parse_prompt--> Wants: 2 x small red cube, 1 x metal sphere; left
    Reading (eval_detector.py), Wants                   --matches-------> Verdict: right, or what is wrong

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
    from minimuse.eval_detector import Found, Reading

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
SLACK = 0.2  # a place is read, not known: relations may hold from so much nearer than in data_scenes.py (0.9 and 1.2)


class Group(NamedTuple):
    """Things told in the same words."""

    number: int
    looks: dict[str, str]  # what is named of them: {"color": "red", "shape": "cube"}

    def __str__(self) -> str:
        order = ("size", "color", "material", "shape")
        return " ".join(self.looks[field] for field in order if field in self.looks)


class Wants(NamedTuple):
    groups: tuple[Group, ...]
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


def parse_prompt(prompt: str) -> Wants:
    """A prompt in the words of data_captions.py, paraphrases included -> what it asks for; ValueError for any other word.

    >>> parse_prompt("a photo of two red cubes next to a shiny ball")
    Wants(groups=(Group(number=2, looks={'color': 'red', 'shape': 'cube'}),
                  Group(number=1, looks={'material': 'metal', 'shape': 'sphere'})), relation='beside')
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
    return Wants(groups, _NAMES[related[0]] if related else "")


def _group(phrase: str, prompt: str) -> Group:
    """ "two small red cubes" -> Group(2, {"size": "small", "color": "red", "shape": "cube"})."""
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
    return Group(NUMBERS[number], looks)


def matches(reading: "Reading", wants: Wants, *, sure: float = 0.0, slack: float = SLACK) -> Verdict:
    """Has the picture everything that the prompt names? Things are paired with what is asked so that least is wrong.

    A thing that the reader is less `sure` of than this, in [0, 1], is wrong too: a lump is nearest to something.
    """
    slots = [(i, group) for i, group in enumerate(wants.groups) for _ in range(group.number)]
    things, count = list(reading.things), len(reading.things)
    wrong = [] if count == len(slots) else [f"{count} thing{'s' * (count != 1)}, not {len(slots)}"]
    things += [None] * (len(slots) - count)
    wrong += min((_faults(slots, pairing, wants, sure, slack) for pairing in permutations(things, len(slots))), key=len)
    return Verdict(not wrong, wrong)


def _faults(slots: list[tuple[int, Group]], pairing: tuple, wants: Wants, sure: float, slack: float) -> list[str]:
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
                if a and b and wants.relation not in related(a, b, slack):
                    wrong.append(f"the {a.color} {a.shape} is not {said} the {b.color} {b.shape}")
    return wrong


def related(a: "Found", b: "Found", slack: float = SLACK) -> set[str]:
    """The relations of data_scenes.py that hold of a as seen from b, if b may stand up to `slack` from where it was read."""
    shifts = (-slack, 0.0, slack)
    moved = [b._replace(x=b.x + dx, depth=b.depth + dz) for dx in shifts for dz in shifts]
    return set().union(*(relations(a, b) for b in moved))
