"""Captions of scenes, such as "two blue spheres left of a small red cube", `SceneDataset`, and `Source`.

SYNONYMS are for training, if a data set asks for them. PARAPHRASES are in no training caption: what a model makes of
them comes from its language model. Both stand in words.json.

Not here: the scenes and their pictures (data_scenes.py), data from files (data_sources.py).
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from minimuse import data_scenes
from minimuse.data_scenes import COLORS, MATERIALS, SHAPES, SIZES, Scene, Thing, relations
from minimuse.pictures import Refused
from minimuse.utils import Checked, Fraction, NonNegative, OneSeed, Rule, check, content_hash, require, to_uint8

SCENES_VERSION = 1  # raise it on purpose when the same scenes give other pixels or captions: caches become invalid
PART = 500  # examples in a part, where a source has no parts of its own

_WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
PARAPHRASES: dict[str, list[str]] = _WORDS["paraphrases"]
SYNONYMS: dict[str, list[str]] = _WORDS["synonyms"]
EXAMPLE_PROMPTS: list[str] = _WORDS["examples"]
OPENINGS = ("a photo of", "a picture of", "a picture with", "there")  # "there" needs "is" or "are"
FLOOR_PHRASE = "on a gray floor"
RELATION_PHRASES = {
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"), "front": ("in front of",),
    "behind": ("behind",), "beside": ("next to",),
}  # fmt: skip
_NUMBERS = ("", "a", "two", "three")


def caption(scene: Scene, seed: int, *, style: str = "any", paraphrase: bool = False, synonyms: float = 0.0) -> str:
    """A true phrase about all things of the scene, such as "two small red cubes behind a blue metal sphere".

    Things with the same words form one group with its number, so the numbers are exact. "long" names every attribute,
    "short" names colour and shape and sometimes one more, "any" mixes both. A paraphrase replaces at least one word.
    `synonyms` is the fraction of captions in which about half of the words are replaced by SYNONYMS.
    """
    check("style", style, Literal["any", "short", "long"])
    rng = Random(f"caption/{seed}")
    long = style == "long" or (style == "any" and rng.random() < 0.3)
    fields = rng.choices(("color shape", "size color shape", "color material shape", "shape"), (40, 25, 23, 12))[0]
    fields = ("size color material shape" if long else fields).split()
    groups = defaultdict(list)
    for thing in scene.things:
        groups[tuple(getattr(thing, field) for field in fields)].append(thing)
    words = sorted({word for group in groups for word in group})
    swapped = rng.sample(words, rng.randint(1, len(words))) if paraphrase else ()
    swaps = {word: rng.choice(PARAPHRASES[word]) for word in swapped}
    if synonyms and not paraphrase and (other := Random(f"synonyms/{seed}")).random() < synonyms:
        swaps = {word: other.choice(SYNONYMS[word]) for word in words if other.random() < 0.6}
    phrases = [(noun_phrase(group, len(things), swaps), things) for group, things in groups.items()]
    return _sentence(rng.sample(phrases, len(phrases)), FLOOR_PHRASE if long and rng.random() < 0.5 else "", rng)


def noun_phrase(words: tuple[str, ...], number: int, swaps: dict[str, str]) -> str:
    """("red", "metal", "cube"), 2 -> "two red metal cubes". A replaced material comes first: "two shiny red boxes"."""
    early = [word for word in words if word in SIZES or (word in MATERIALS and word in swaps)]
    words = [swaps.get(word, word) for word in early + [word for word in words if word not in early]]
    if number > 1:
        words[-1] += "es" if words[-1].endswith("x") else "s"
    return " ".join(["an" if number == 1 and words[0][0] in "aeiou" else _NUMBERS[number], *words])


def _sentence(groups: list[tuple[str, list[Thing]]], floor: str, rng: Random) -> str:
    """Phrases with their things -> the sentence. A relation is used only if it holds for each pair it speaks of."""
    true = []
    for i, (_, things) in enumerate(groups):
        rest = groups[:i] + groups[i + 1 :]
        pairs = [relations(a, b) for a in things for _, others in rest for b in others]
        true += [(i, name) for name in RELATION_PHRASES if pairs and all(name in pair for pair in pairs)]
    subject, phrases = "", [phrase for phrase, _ in groups]
    opening = rng.choice(OPENINGS) if rng.random() < 0.3 else ""
    be = {phrase: "are" if phrase.startswith(_NUMBERS[2:]) else "is" for phrase in phrases}
    if true and rng.random() < 0.75:
        i, name = rng.choice(true)
        first = phrases.pop(i)
        verb = be[first] if not opening and rng.random() < 0.25 else ""
        subject = f"{first} {verb} {rng.choice(RELATION_PHRASES[name])}"
    if opening == "there":
        opening = f"there {be[first if subject else phrases[0]]}"
    listed = ", ".join(phrases[:-1]) + " and " * (len(phrases) > 1) + phrases[-1]
    return " ".join(f"{opening} {subject} {listed} {floor}".split())


def vocabulary(synonyms: bool = False) -> list[str]:
    """All words of training captions, sorted; with SYNONYMS if the captions use them."""
    shapes = [*SHAPES]
    texts = ["and is are", FLOOR_PHRASE, *COLORS, *SHAPES, *SIZES, *MATERIALS, *_NUMBERS, *OPENINGS]
    texts += sum(RELATION_PHRASES.values(), ())
    if synonyms:
        shapes += [word for shape in SHAPES for word in SYNONYMS[shape]]
        texts += sum(SYNONYMS.values(), ["an"])
    return sorted({word for text in texts for word in text.split()} | {shape + "s" for shape in shapes})


class Example(NamedTuple):
    """What a source yields."""

    image: Tensor  # (3, size, size) uint8
    captions: tuple[str, ...]  # at least one
    name: str = ""  # its own in its part, by which it is known when the part is read again

    def check(self, size: int) -> "Example":
        """The example itself. ValueError unless image and captions are as above."""
        image, captions, _ = self
        right = image.shape == (3, size, size) and image.dtype == torch.uint8
        came = f"a source gave an image {tuple(image.shape)} of {image.dtype} with the captions {captions!r}"
        expected = f"it yields Example(image (3, {size}, {size}) uint8, a tuple of captions)"
        require(right and bool(captions) and not isinstance(captions, str), f"{came}; {expected}")
        return self


OTHER, CROPPED = "neither image nor caption", "cropped by more than half"  # these are no reason to leave an image out


@dataclass
class Problems:
    """What a reader left out or cut away, such as "left out 1 of 9 images: 1 damaged (a.png)"."""

    seen: int = 0  # all images, good ones included
    names: dict[str, list[str]] = field(default_factory=dict)  # kind of problem -> the files that have it
    cut: float = 0.0  # sum over the images used: the fraction of pixels that the crop to a square removed

    def add(self, kind: str, *names: str) -> None:
        """Note that these files have a problem of this kind."""
        self.names.setdefault(kind, []).extend(name.encode("utf-8", "backslashreplace").decode() for name in names)

    def include(self, other: "Problems") -> None:
        """Add the problems of another part."""
        self.seen += other.seen
        self.cut += other.cut
        for kind, names in other.names.items():
            self.add(kind, *names)

    def summary(self) -> str:
        """One sentence with the first three names of each kind, or "" if there is nothing to say."""
        told = {kind: f"{len(n)} {kind} ({', '.join(n[:3])}{', ...' * (len(n) > 3)})" for kind, n in self.names.items()}
        notes = [told.pop(kind) for kind in (OTHER, CROPPED) if kind in told]
        left_out = sum(len(self.names[kind]) for kind in told)
        if told:
            notes.insert(0, f"left out {left_out} of {self.seen} images: {', '.join(told.values())}")
        if self.cut and self.cut >= 0.005 * (self.seen - left_out):
            notes.append(f"the crop to squares cut {self.cut / (self.seen - left_out):.0%} of the pixels")
        return "; ".join(notes)


class Source(Protocol):
    """Captioned images from anywhere. Several processes read different parts."""

    fingerprint: str  # hex; changes whenever an image, a caption or a rule of reading may have changed
    parts: int  # units of work

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part 0 to parts - 1 -> its examples at size x size pixels, always in the same order.

        Add 1 to `problems.seen` for every image. Call `problems.add(kind, name)` for one that cannot be used.
        """
        ...


class Reading(NamedTuple):
    """What is read of captioned images: the options of `minimuse train`."""

    image_column: str = ""  # or the key in metadata of the file's name; "" takes a usual one
    caption_columns: Sequence[str] = ()  # or keys: all of them are captions of one image; () takes a usual one
    split: str = ""  # of a saved data set or one of the hub ("" is train), or a folder in a folder ("" is all)
    count: int = 0  # of the first usable images; 0 is all. `TrainingData` stops there
    captioned: bool = True  # False: images need no caption, and get ""


def captions_of(value: Any, names: Sequence[str] = ()) -> tuple[str, ...]:
    """A text, lists of texts, or an object that has them under `names` -> the captions that are not blank.

    Without names, an object has them as "text" or, if there is none, as "caption". `Refused` if a name is not there.
    """
    if isinstance(value, dict):
        known = names or ("text", "caption")
        lacking = [json.dumps(name) for name in known if name not in value]
        others = [json.dumps(str(key)[:40]) for key in value if key not in ("file_name", *known)]
        if lacking and (names or (others and len(lacking) == len(known))):
            raise Refused(f"without {' or '.join(lacking)}, but with {', '.join(others[:3]) or 'no other key'}")
        value = [value[name] for name in names] if names else value.get("text") or value.get("caption")
    parts = value if isinstance(value, list) else [value]
    parts = [text for part in parts for text in (part if isinstance(part, list) else [part])]
    texts = [" ".join(text.split()) for text in parts if isinstance(text, str)]
    if any(re.search("[\ud800-\udfff]", text) for text in texts):  # a byte that is no UTF-8, or half a character
        raise Refused("with a caption not in UTF-8")
    return tuple(text for text in texts if text)


@dataclass(frozen=True)
class SceneDataset(Checked):
    """n captioned scenes of one split: a `Source`. Everything follows from (split, seed, i), so nothing is stored."""

    n: Annotated[int, Rule(lambda x: 1 <= x <= 10**8, "a positive whole number, at most 10**8")]
    size: data_scenes.Side
    split: Literal[data_scenes.SPLITS] = "train"
    seed: OneSeed = 0
    fractions: tuple[NonNegative, NonNegative, NonNegative] = data_scenes.FRACTIONS  # of scenes with 1, 2 and 3 things
    k: Annotated[int, Rule(lambda x: 1 <= x <= 100, "a whole number from 1 to 100")] = 2  # captions per scene
    synonyms: Fraction = 0.0  # fraction of captions that use the words of SYNONYMS

    def __post_init__(self):
        super().__post_init__()
        require(sum(self.fractions) > 0, "SceneDataset.fractions are all 0; give one above 0")

    @cached_property
    def fingerprint(self) -> str:
        """Of SCENES_VERSION and all fields except `size`, which `read` receives."""
        return content_hash("scenes", SCENES_VERSION, asdict(replace(self, size=8)))

    @property
    def parts(self) -> int:
        return -(-self.n // PART)

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part -> scenes 500 part to 500 part + 499, the same as `images` and `captions` give."""
        scenes = replace(self, size=size)
        for start in range(part * PART, min((part + 1) * PART, self.n), 50):
            few = range(start, min(start + 50, (part + 1) * PART, self.n))
            for i, image in zip(few, scenes.images(few), strict=True):
                problems.seen += 1
                yield Example(image, tuple(self.captions(i)), str(i))

    def __len__(self) -> int:
        return self.n

    def scene(self, i: int) -> Scene:
        """Index 0 to n - 1 -> the scene."""
        if not 0 <= i < self.n:
            raise IndexError(f"scene {i} of a data set of {self.n}: expected 0 to {self.n - 1}")
        return data_scenes.sample_scene(self.seed * 1_000_003 + i, split=self.split, fractions=self.fractions)

    def captions(self, i: int, k: int | None = None) -> list[str]:
        """-> k different captions of scene i (None: as many as the data set has per scene)."""
        k = self.k if k is None else replace(self, k=k).k
        scene, found = self.scene(i), []
        for attempt in range(50 * k):
            text = caption(scene, 10_007 * i + attempt, synonyms=self.synonyms)
            found += [text] if text not in found else []
            if len(found) == k:
                return found
        raise ValueError(f"scene {i} has fewer than {k} different captions: ask for at most {len(found)}")

    def labels(self) -> Tensor:
        """-> (n, K): 1 for the pairs of color and shape that a scene shows."""
        seen = [{(thing.color, thing.shape) for thing in self.scene(i).things} for i in range(self.n)]
        return torch.tensor([[float(pair in pairs) for pair in product(COLORS, SHAPES)] for pairs in seen])

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        """Indices (None: all) -> uint8 images (B, 3, H, W), rendered 256 scenes at a time."""
        indices = range(self.n) if indices is None else [int(i) for i in indices]
        parts = [torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)]
        for start in range(0, len(indices), 256):
            scenes = [self.scene(i) for i in indices[start : start + 256]]
            parts.append(to_uint8(data_scenes.render(scenes, self.size)))
        return torch.cat(parts)
