"""data_captions.py: captions are true, held-out words stay out; the embedded data set."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from minimuse import data_captions
from minimuse.data_captions import EXAMPLE_PROMPTS, PARAPHRASES, SYNONYMS, SceneDataset, caption, vocabulary
from minimuse.data_scenes import COLORS, HELD_OUT, MATERIALS, SHAPES, SIZES, Thing, sample_scene
from minimuse.data_sources import Problems
from minimuse.eval_prompts import parse_prompt

SCENES = [sample_scene(seed) for seed in range(500)]

# ---------------------------------------------------------------- captions

PHRASE = re.compile(
    rf"(?:an?|(two|three)) (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLORS)}) )?(?:({'|'.join(MATERIALS)}) )?"
    rf"({'|'.join(SHAPES)})s?"
)
RELATION = re.compile(r"(left of|right of|in front of|behind|next to)")
HOLDS = {
    "left of": lambda a, b: a.x < b.x - 0.5,
    "right of": lambda a, b: a.x > b.x + 0.5,
    "in front of": lambda a, b: a.depth < b.depth - 0.8,
    "behind": lambda a, b: a.depth > b.depth + 0.8,
    "next to": lambda a, b: abs(a.x - b.x) > 0.5 and abs(a.depth - b.depth) < 1.5,
}


def parse(text: str) -> list[tuple[int, tuple]]:
    """Text -> (number, (size, colour, material, shape)) of each phrase, None for what is not said."""
    text = text.replace("on a gray floor", "")
    return [({"two": 2, "three": 3}.get(m[1], 1), m.groups()[1:]) for m in PHRASE.finditer(text)]


def fits(thing: Thing, words: tuple) -> bool:
    looks = (thing.size, thing.color, thing.material, thing.shape)
    return all(word in (None, look) for word, look in zip(words, looks, strict=True))


@pytest.mark.parametrize("style", ["any", "short", "long"])
def test_captions_are_true(style):
    related = Counter()
    for seed, scene in enumerate(SCENES):
        text = caption(scene, seed, style=style)
        told = parse(text)
        assert sum(number for number, _ in told) == len(scene.things), f"{text!r} of {scene}"
        for number, words in told:
            assert number == sum(fits(t, words) for t in scene.things), f"the number is wrong: {text!r} of {scene}"
        if match := RELATION.search(text):
            related[match[1]] += 1
            before, after = parse(text[: match.start()]), parse(text[match.end() :])
            subjects = [t for t in scene.things if any(fits(t, words) for _, words in before)]
            objects = [t for t in scene.things if any(fits(t, words) for _, words in after)]
            assert min(len(subjects), len(objects)) > 0, f"a relation needs two sides: {text!r}"
            assert all(HOLDS[match[1]](a, b) for a in subjects for b in objects), f"{text!r} is not true of {scene}"
    assert set(related) == set(HOLDS), f"some relations are never spoken of: {related}"


def test_most_captions_name_every_colour_and_shape():
    texts = [caption(scene, 1000 + seed) for seed, scene in enumerate(SCENES)]
    full = sum(all(words[1] and words[3] for _, words in parse(text)) for text in texts) / len(texts)
    assert full >= 0.85, f"only {full:.0%} of the captions name every thing's colour and shape"
    assert any(text.startswith("two ") for text in texts), "some captions should count"
    for scene in SCENES[:50]:
        told = parse(caption(scene, 0, style="long"))
        assert all(None not in words for _, words in told), f"a long caption leaves something out: {told}"


def test_grammar():
    for seed, scene in enumerate(SCENES):
        for text in (caption(scene, seed), caption(scene, seed, paraphrase=True), caption(scene, seed, synonyms=1.0)):
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $| ,", text), f"article or blank: {text!r}"
            assert not re.search("there is (two|three)|there are an? ", text), f"verb: {text!r}"
            assert not re.search(
                r"boxs|(two|three) ((?!and)[a-z]+[^s ] ){0,3}(cube|sphere|box|ball|bead|tube|crate)\b", text
            ), f"plural: {text!r}"


def test_vocabulary_is_what_captions_say():
    said = {
        word for i, s in enumerate(SCENES) for k in range(6) for word in caption(s, 6 * i + k).replace(",", "").split()
    }
    assert said == set(vocabulary()), f"said, not listed: {said - set(vocabulary())}; never: {set(vocabulary()) - said}"
    prompts = {word for prompt in EXAMPLE_PROMPTS for word in prompt.split()}
    assert prompts <= set(vocabulary()), f"example prompts leave the vocabulary: {prompts - set(vocabulary())}"


def test_paraphrases_are_new_words_and_at_least_one_is_used():
    new = {word for words in PARAPHRASES.values() for word in words}
    assert set(PARAPHRASES) == {*COLORS, *SHAPES, *SIZES, *MATERIALS}, "each content word should have a paraphrase"
    assert not new & set(vocabulary()), f"paraphrases in training captions: {new & set(vocabulary())}"
    for seed, scene in enumerate(SCENES):
        words = caption(scene, seed, paraphrase=True).replace(",", "").split()
        singular = {form for word in words for form in (word, word.removesuffix("s"), word.removesuffix("es"))}
        assert singular & new, f"nothing was paraphrased: {' '.join(words)!r}"


def test_synonyms_are_true_words_and_no_paraphrases():
    """They are a share of the captions, mean what the plain words mean, and none is a word that is held out."""
    new = {word for words in PARAPHRASES.values() for word in words}
    assert set(SYNONYMS) == set(PARAPHRASES), "each content word should have other words"
    assert not new & set(vocabulary(synonyms=True)), f"held-out words: {new & set(vocabulary(synonyms=True))}"
    plain = [caption(scene, seed) for seed, scene in enumerate(SCENES)]
    assert plain == [caption(scene, seed, synonyms=0.0) for seed, scene in enumerate(SCENES)]
    told = [caption(scene, seed, synonyms=0.5) for seed, scene in enumerate(SCENES)]
    said = {word for text in told for word in text.replace(",", "").split()}
    assert said <= set(vocabulary(synonyms=True)), f"not listed: {said - set(vocabulary(synonyms=True))}"
    changed = sum(a != b for a, b in zip(plain, told, strict=True)) / len(SCENES)
    assert 0.3 < changed < 0.55, f"{changed:.0%} of the captions are told in other words"
    looks = [[(g.number, g.attributes) for g in parse_prompt(text).groups] for text in (*plain, *told)]
    assert looks[: len(plain)] == looks[len(plain) :], "other words, the same things"


def test_example_prompts_hold_no_held_out_pair():
    for prompt in EXAMPLE_PROMPTS:
        assert not {(words[1], words[3]) for _, words in parse(prompt)} & HELD_OUT, f"{prompt!r} was never trained on"


# --- the data set ---


def test_dataset_follows_from_its_seed():
    a, b = SceneDataset(10, 32), SceneDataset(10, 32)
    assert len(a) == 10, "the length is n"
    assert a.scene(3) == b.scene(3), "the same data set must hold the same scenes"
    assert a.scene(3) != SceneDataset(10, 32, seed=1).scene(3), "another seed, other scenes"
    assert a.scene(3) != SceneDataset(10, 32, split="test").scene(3), "another split, other scenes"
    assert a.captions(3) == b.captions(3), "captions must follow from the index"
    for i in range(10):
        assert len(set(a.captions(i, 5))) == 5, f"captions of scene {i} repeat: {a.captions(i, 5)}"


def test_images_do_not_depend_on_neighbours():
    data = SceneDataset(300, 16)
    images = data.images()
    assert (images.shape, images.dtype) == ((300, 3, 16, 16), torch.uint8), f"{images.shape} {images.dtype}"
    alone = data.images(torch.tensor([299, 4])).int()
    assert (images[[299, 4]] - alone).abs().max() <= 1, "an image alone and in a batch should be the same"
    assert data.images([]).shape == (0, 3, 16, 16), "no index, no image"


def test_dataset_refuses_nonsense():
    nonsense = {
        "n": (0, -1, 2.5, True, "3", float("nan"), 10**12), "size": (4, 2**20, None), "split": ("valid", 1),
        "seed": (-1, 2**32, 1.0, "0"), "fractions": ((0, 0, 0), (1, 1), (-1, 1, 1), 3, (float("nan"), 1, 1)),
        "k": (0, 101, True), "synonyms": (-0.1, 1.1, float("inf")),
    }  # fmt: skip
    for name, values in nonsense.items():
        for value in values:
            with pytest.raises(ValueError, match=rf"SceneDataset\.{name}.* give "):
                SceneDataset(**({"n": 3, "size": 32} | {name: value}))
    numbers = SceneDataset(np.int64(3), torch.tensor(32), seed=np.uint32(2**32 - 1), synonyms=np.float32(0.5))
    assert numbers.fingerprint == SceneDataset(3, 32, seed=2**32 - 1, synonyms=0.5).fingerprint
    with pytest.raises(ValueError, match=r"SceneDataset\.k is 0"):
        SceneDataset(3, 32).captions(0, 0)
    with pytest.raises(IndexError, match="0 to 2"):
        SceneDataset(3, 32).scene(3)
    with pytest.raises(ValueError, match="at most"):
        SceneDataset(3, 32).captions(0, 100)


def test_fractions_say_how_often_there_are_one_two_and_three_things():
    for n in (1, 2, 3):
        data = SceneDataset(20, 32, fractions=tuple(float(i == n) for i in (1, 2, 3)))
        assert {len(data.scene(i).things) for i in range(20)} == {n}, f"all of the weight is on {n}"


def read_all(source, size):
    """All parts of a source, and what it passed over."""
    problems = Problems()
    return [example for part in range(source.parts) for example in source.read(part, size, problems)], problems


def test_scenes_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(data_captions, "PART", 60)
    data = SceneDataset(63, 32, seed=3, k=3)
    examples, problems = read_all(data, 16)
    small = SceneDataset(63, 16, seed=3)
    want = torch.cat([small.images(range(50)), small.images(range(50, 60)), small.images(range(60, 63))])
    assert data.parts == 2
    assert torch.equal(torch.stack([example.image for example in examples]), want), "the size is the one asked for"
    assert [example.captions for example in examples] == [tuple(small.captions(i, 3)) for i in range(63)]
    assert (problems.seen, problems.summary()) == (63, ""), f"{problems}"


def test_pitfall_34_fingerprint_of_scenes_tells_what_they_depend_on(monkeypatch):
    data = SceneDataset(10, 32)
    others = ({"n": 11}, {"split": "test"}, {"seed": 1}, {"fractions": (1, 0, 0)}, {"k": 3})
    prints = [replace(data, **other).fingerprint for other in others]
    assert len({data.fingerprint, *prints}) == 6, "another field, other data"
    assert replace(data, size=64).fingerprint == data.fingerprint, "the size is told when reading"
    monkeypatch.setattr(data_captions, "SCENES_VERSION", 2)
    assert replace(data).fingerprint != data.fingerprint, "another renderer, other pictures"
