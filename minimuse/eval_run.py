"""`minimuse eval`: how good a checkpoint is, with intervals, tables and pictures; and Muse's figure 8 at toy scale.

    a kind (`kinds.py`) --a batch at a time, each kept on disk--> rows and features --> figures, page of pictures
    a sweep: settings of the base model, one after the other --> accuracy, CLIP-like score, Frechet distance of each

A folder holds one evaluation: settings.json says of what, and another one is refused there.
    eval.json, eval.md                 all figures with 95% intervals
    kinds/NAME.json, kinds/NAME.png    every picture's verdict; the first pictures, the best and the worst
    parts/NAME/*.safetensors           batches of a kind that is not done yet
Whatever is written is written whole or not at all, so that a stopped evaluation goes on where it was, to the same
figures. Picture i of a kind draws with seed + i.
Not here: what is measured (`kinds.py`), prompts (`prompts.py`).
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimuse import __version__, checkpoint, editing
from minimuse import train_state as runs
from minimuse.config import to_dict
from minimuse.data_images import area_downsample, to_float, to_pil, to_uint8
from minimuse.data_scenes import MATERIALS, SIZES, Scene, render
from minimuse.eval_clip import SceneClip
from minimuse.eval_detector import Detector
from minimuse.eval_metrics import (
    Estimate,
    diversity,
    frechet_interval,
    mean_interval,
    paired_difference,
    proportion_interval,
    psnr,
)
from minimuse.eval_prompts import EvalPrompt, matches, parse_prompt, prompt_set
from minimuse.muse import Muse
from minimuse.plots import grid, tradeoff
from minimuse.sampler import ORDERS, Step
from minimuse.utils import atomic_write, content_hash
from minimuse.vqgan import VQGAN
from minimuse.vqgan_loss import feature_distance

ITERATIONS = (10, 30, 100)  # of the mask-free edit that are looked at; the last is all (Muse 3.3.2)


class Studio:
    """A Muse at work, a batch at a time. Whatever has these methods can stand in for it: `evaluate` asks no more.

    `before` is the high tokenizer before its decoder was fine-tuned. With `base_only` pictures are the base model's,
    low tokens decoded at the low size.
    """

    def __init__(self, muse: Muse, *, before: VQGAN | None = None, base_only: bool = False):
        self.muse, self.before, self.base_only = muse, before, base_only
        self.side = muse.config.high_tokenizer.image_size
        self.factor = self.side // muse.config.low_tokenizer.image_size
        self._rendered = lru_cache(32)(lambda scenes: to_uint8(render([*scenes], self.side)))  # a sweep's, seen again

    def real(self, scenes: Sequence[Scene]) -> Tensor:
        """What the pictures should look like: renders, decimated where the base model alone is measured."""
        images = self._rendered(tuple(scenes))
        return area_downsample(images, self.factor) if self.base_only else images

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], negatives: Sequence[str] = (), **sampling) -> Tensor:
        """Prompts, a seed each, and what to guide away from -> images."""
        stage = "base" if self.base_only else "superres"
        jobs = self._jobs(prompts, seeds, negatives)
        steps = self.muse.decode_base(jobs, **sampling) if self.base_only else self.muse.decode(jobs, **sampling)
        return self._images(self._last(steps), stage)

    def cascade(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """-> the base model's pictures, small; those of super-resolution; and those of it without the text."""
        jobs = self._jobs(prompts, seeds)
        low = self._last(self.muse.decode_base(jobs))
        high = self._last(self.muse.decode_superres(jobs, low))
        bare = self._last(self.muse.decode_superres(jobs, low, guidance=-1.0))  # l_c - (l_c - l_u) = l_u
        return self._images(low, "base"), self._images(high, "superres"), self._images(bare, "superres")

    def inpaint(self, images: Tensor, repaint: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """`Muse.inpaint(keep=False)`, repaint (B, H, W) bool."""
        steps = editing.inpaint_tokens(self.muse, self._tokenized(images), repaint, self._jobs(prompts, seeds))
        return self._images(self._last(steps), "superres")

    def edit(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        """`Muse.edit` -> the base model's pictures, small, after each of ITERATIONS, and then the whole cascade's."""
        jobs, found = self._jobs(prompts, seeds), []
        with torch.inference_mode():
            for step in editing.edit_tokens(self.muse, self._tokenized(images), jobs, iterations=ITERATIONS[-1]):
                if step.stage == "base" and step.index + 1 in ITERATIONS:
                    found.append(self._images(step.tokens, "base"))
            return [*found, self._images(step.tokens, "superres")]

    def reconstruct(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images through the high tokenizer, and decimated ones through the low one."""
        low, high = self._tokenized(images)
        return self._images(high, "superres"), self._images(low, "base")

    def decoders(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images through the high tokenizer, its decoder as before and as after fine-tuning."""
        tokens = self._tokenized(images)[1]
        with torch.inference_mode():
            return to_uint8(self.before.decode(tokens)).cpu(), self._images(tokens, "superres")

    def _jobs(
        self, prompts: Sequence[str], seeds: Sequence[int], negatives: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        rows = zip(prompts, negatives or [None] * len(prompts), seeds, strict=True)
        return [dict(zip(("prompt", "negative_prompt", "seed"), row, strict=True)) for row in rows]

    def _last(self, steps: Iterator[Step]) -> Tensor:
        """The tokens when a decode is done."""
        *_, last = steps
        return last.tokens

    def _tokenized(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return editing.tokenize(self.muse, *to_pil(images))

    @torch.inference_mode()
    def _images(self, tokens: Tensor, stage: str) -> Tensor:
        tokenizer = self.muse.low_tokenizer if stage == "base" else self.muse.high_tokenizer
        return to_uint8(tokenizer.decode(tokens)).cpu()


class Judge:
    """The two networks that measure, in one place."""

    def __init__(self, detector: Detector | None = None, scorer: SceneClip | None = None):
        self.detector, self.scorer = detector or Detector.from_pretrained(), scorer or SceneClip.from_pretrained()
        self.perceptual = feature_distance(self.scorer.levels)
        self.features = self.detector.features

    def rows(self, images: Tensor, asks: Sequence[EvalPrompt], mark: str = "") -> list[dict[str, Any]]:
        """-> of each picture: is all that the prompt names right, and clearly so; what is wrong; CLIP-like score."""
        rows, scores = [], self.scorer(images, [ask.prompt for ask in asks]).tolist()
        for reading, ask, score in zip(self.detector.detect(images), asks, scores, strict=True):
            wants = parse_prompt(ask.prompt)
            verdict, clear = matches(reading, wants), matches(reading, wants, sure=0.5).right
            row = {"right": verdict.right, "clear": clear, "wrong": "; ".join(verdict.wrong), "score": round(score, 5)}
            rows.append({f"{name}{mark}": value for name, value in row.items()})
        return rows

    def surest(self, images: Tensor) -> list[dict[str, str]]:
        """Of each picture the looks of the thing that the detector is surest of, {} where it sees none."""
        things = [
            max(reading.things, key=lambda t: t.confidence, default=None) for reading in self.detector.detect(images)
        ]
        return [{k: getattr(t, k) for k in ("color", "shape", "size", "material")} if t else {} for t in things]


TILE = 64  # pixels a side that the networks which measure were trained on


class Batch(NamedTuple):
    """What is kept of a batch: a row of each a picture. "images" go on the page, the others into distributions."""

    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]


Rows, Tensors, Figures = list[dict[str, Any]], dict[str, Tensor], dict[str, Estimate]


class Kind(NamedTuple):
    """A kind of question: its prompt set, how a batch of it is measured, and the figures of all its batches."""

    title: str
    prompts: str
    measure: Callable[[Studio, Judge, list[EvalPrompt], list[int]], Batch]
    figures: Callable[[Rows, Tensors], Figures]
    cascade: bool = True  # does it need more than the base model?
    shows: str = ""  # what stands side by side in a picture of its page


# --- pictures from prompts --------------------------------------------------------------------------------------------


def drawn(studio: Studio, judge: Judge, asks: list[EvalPrompt], seeds: list[int], **sampling) -> Batch:
    """Pictures of prompts, judged beside real renders of scenes that have what is asked for."""
    images = studio.draw([ask.prompt for ask in asks], seeds, **sampling)
    real = studio.real([ask.scene for ask in asks])
    rows = _joined(judge.rows(images, asks), judge.rows(real, asks, ", real"))
    return Batch(rows, {"images": images, "features": judge.features(images), "real": judge.features(real)})


def quality(rows: Rows, tensors: Tensors) -> Figures:
    """The figures of pictures drawn from prompts; "..., real" are those of the real renders, which nothing can beat."""
    groups, prompts = _column(rows, "group"), _column(rows, "prompt")
    pairs = len(rows) - len(rows) % 2  # each prompt comes twice in a row
    found = {name: proportion_interval(_column(rows, name), groups) for name in ("right", "clear")}
    found["frechet"] = frechet_interval(tensors["real"], tensors["features"], groups)
    found["score"] = mean_interval(_column(rows, "score"), groups)
    found["diversity"] = diversity(tensors["features"][:pairs], prompts[:pairs])
    found["right, real"] = proportion_interval(_column(rows, "right, real"), groups)
    found["score, real"] = mean_interval(_column(rows, "score, real"), groups)
    return found | {"diversity, real": diversity(tensors["real"][:pairs], prompts[:pairs])}


def negative(studio: Studio, judge: Judge, asks: list[EvalPrompt], seeds: list[int]) -> Batch:
    """Each prompt without guidance, with it, and guided away from the same prompt with one word more.

    Choice: the paper is silent on how to word a negative prompt. Where it repeats the prompt ("a red metal cube"
    against "a red cube"), l_c - l_u holds nothing but the word.
    """
    prompts = [ask.prompt for ask in asks]
    away = [_with(ask.prompt, ask.negative) for ask in asks]
    unguided, plain, guided = (
        studio.draw(prompts, seeds, guidance=0.0, superres={"guidance": 0.0}),
        studio.draw(prompts, seeds),
        studio.draw(prompts, seeds, away),
    )
    rows = judge.rows(guided, asks)
    for name, images in (("unguided", unguided), ("without", plain), ("with", guided)):
        for row, ask, looks in zip(rows, asks, judge.surest(images), strict=True):
            row |= {"word": ask.negative, name: ask.negative in looks.values()}
    return Batch(rows, {"images": torch.cat([plain, guided], 3)})


def _with(prompt: str, word: str) -> str:
    """ "a red cube", "metal" -> "a red metal cube"."""
    article, color, shape = prompt.split()
    return f"{article} {color} {word} {shape}" if word in MATERIALS else f"{article} {word} {color} {shape}"


def avoidance(rows: Rows, tensors: Tensors) -> Figures:
    """How often the word shows: of each, and of all that unguided pictures show in at least 40%."""
    found, often = {}, []
    for word in (*SIZES, *MATERIALS):
        mine = [row for row in rows if row["word"] == word]
        for name in ("unguided", "without", "with") if mine else ():
            found[f"{word}, {name}"] = proportion_interval(_column(mine, name), _column(mine, "group"))
        often += mine if mine and found[f"{word}, unguided"].value >= 0.4 else []
    groups = _column(often, "group")
    found |= {name: proportion_interval(_column(often, name), groups) for name in ("without", "with") if often}
    return {"right": proportion_interval(_column(rows, "right"), _column(rows, "group"))} | found


# --- edits ------------------------------------------------------------------------------------------------------------


def regions(asks: Sequence[EvalPrompt], side: int) -> Tensor:
    """-> (B, side, side) bool: the pixels of each picture that are to change."""
    at = (torch.arange(side) + 0.5) / side
    left, top, right, bottom = torch.tensor([ask.region for ask in asks]).T[..., None]
    return ((at > top) & (at < bottom))[:, :, None] & ((at > left) & (at < right))[:, None]


def _psnr_outside(x: Tensor, y: Tensor, region: Tensor) -> list[float]:
    """Images twice, region (B, H, W) -> dB of each outside its region, at most 100."""
    rest = (~region)[:, None].expand_as(x)
    squares = ((x.double() - y.double()) / 255).square() * rest
    return (-10 * (squares.sum((1, 2, 3)) / rest.sum((1, 2, 3))).clamp(min=1e-10).log10()).tolist()


def _changed(x: Tensor, y: Tensor, region: Tensor) -> list[float]:
    """The share of pixels outside the region that are not the same, bit for bit."""
    return (((x != y).any(1) & ~region).sum((1, 2)) / (~region).sum((1, 2))).tolist()


def edited(studio: Studio, judge: Judge, asks: list[EvalPrompt], seeds: list[int]) -> Batch:
    """A thing's colour changed without a mask: along the iterations, then after super-resolution."""
    before, side = studio.real([ask.before for ask in asks]), studio.side
    made = studio.edit(before, [ask.prompt for ask in asks], seeds)
    rows = judge.rows(made[-1], asks)
    for name, images in zip((*map(str, ITERATIONS), "final"), made, strict=True):
        small = area_downsample(before, side // images.shape[-1])
        outside = _psnr_outside(images, small, regions(asks, images.shape[-1]))
        for row, ask, looks, psnr_ in zip(rows, asks, judge.surest(images), outside, strict=True):
            thing = ask.scene.things[0]
            row[f"colour, {name}"] = looks.get("color") == thing.color
            row[f"rest, {name}"] = all(looks.get(k) == getattr(thing, k) for k in ("shape", "size", "material"))
            row[f"psnr outside, {name}"] = psnr_
    return Batch(rows, {"images": torch.cat([before, *(_enlarged(x, side) for x in made)], 3)})


def inpainted(studio: Studio, judge: Judge, asks: list[EvalPrompt], seeds: list[int]) -> Batch:
    """A thing replaced; the pixels outside come back as `Muse.inpaint` gives them, and "psnr" is without that."""
    before, region = studio.real([ask.before for ask in asks]), regions(asks, studio.side)
    made = studio.inpaint(before, region, [ask.prompt for ask in asks], seeds)
    after = torch.where(region[:, None], made, before)
    rows, again = judge.rows(after, asks), studio.reconstruct(before)[0]
    columns = {
        "things": [len(ask.scene.things) for ask in asks],
        "changed outside": _changed(after, before, region),
        "psnr outside, not kept": _psnr_outside(made, before, region),
        "psnr outside, tokenizer alone": _psnr_outside(again, before, region),
    }
    return Batch(_widened(rows, columns), {"images": torch.cat([before, after], 3)})


def outpainted(studio: Studio, judge: Judge, asks: list[EvalPrompt], seeds: list[int]) -> Batch:
    """The window half beyond the right edge, as `Muse.outpaint` paints it; how sharp is the step at the edge?"""
    before, region, half = studio.real([ask.before for ask in asks]), regions(asks, studio.side), studio.side // 2
    window = torch.cat([before[..., half:], before[..., -1:].expand_as(before[..., half:])], 3)
    made = studio.inpaint(window, region, [ask.prompt for ask in asks], seeds)
    after, real = torch.where(region[:, None], made, window), studio.real([ask.scene for ask in asks])

    def seam(images: Tensor) -> list[float]:
        return (images[..., half].float() - images[..., half - 1].float()).abs().mean((1, 2)).tolist()

    columns = {"seam": seam(after), "seam, real": seam(real), "changed outside": _changed(after, window, region)}
    rows = _widened(judge.rows(after, asks), columns)
    whole = torch.cat([before[..., :half], after], 3)
    return Batch(rows, {"images": whole, "features": judge.features(after), "real": judge.features(real)})


def figures_of(rows: Rows, tensors: Tensors) -> Figures:
    """A figure a column: shares of True and False, means of numbers; and Frechet distances of features to "real"."""
    groups, found = _column(rows, "group"), {}
    for name, first in rows[0].items():
        if not isinstance(first, str) and name not in ("seed", "things"):
            found[name] = (proportion_interval if isinstance(first, bool) else mean_interval)(_column(rows, name), groups)
    for things in sorted({row["things"] for row in rows if "things" in row}):
        mine = [row for row in rows if row["things"] == things]
        found[f"right, of {things}"] = proportion_interval(_column(mine, "right"), _column(mine, "group"))
    for name, features in tensors.items():
        if name.split(",")[0] == "features":
            real = tensors["real, tiles" if "tiles" in name else "real"].flatten(0, -2)
            repeats = features[0].numel() // features.shape[-1]
            labels = [group for group in groups for _ in range(repeats)]
            found[name.replace("features", "frechet")] = frechet_interval(real, features.flatten(0, -2), labels)
    return found


# --- the parts --------------------------------------------------------------------------------------------------------


def _enlarged(images: Tensor, side: int, mode: str = "nearest") -> Tensor:
    if images.shape[-1] == side:
        return images
    if mode == "nearest":
        return F.interpolate(images, size=(side, side), mode=mode)
    return to_uint8(F.interpolate(to_float(images), size=(side, side), mode=mode, align_corners=False))


def _tiles(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> squares of TILE pixels (B, T, 3, TILE, TILE): at full size, where fine detail shows."""
    parts = images.unfold(2, TILE, TILE).unfold(3, TILE, TILE)  # (B, 3, h, w, TILE, TILE)
    return parts.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def _features(judge: Judge, name: str, images: Tensor) -> Tensors:
    """Features of whole pictures, as seen at 64 px; and of their tiles, where they are larger."""
    found = {name: judge.features(images)}
    if images.shape[-1] >= 2 * TILE:
        tiles = _tiles(images)
        found[f"{name}, tiles"] = judge.features(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
    return found


def superresolved(studio: Studio, judge: Judge, asks: list[EvalPrompt], seeds: list[int]) -> Batch:
    """The base model's picture enlarged; after super-resolution; after super-resolution that sees no text."""
    low, high, bare = studio.cascade([ask.prompt for ask in asks], seeds)
    made = {"": high, ", bicubic": _enlarged(low, studio.side, "bicubic"), ", no text": bare}
    tensors = {"images": torch.cat([made[", bicubic"], high, bare], 3)}
    rows = [{} for _ in asks]
    for mark, images in made.items():
        rows = _joined(rows, judge.rows(images, asks, mark))
        tensors |= _features(judge, f"features{mark}", images)
    return Batch(rows, tensors | _features(judge, "real", studio.real([ask.scene for ask in asks])))


def superres_figures(rows: Rows, tensors: Tensors) -> Figures:
    found, groups = figures_of(rows, tensors), _column(rows, "group")
    for other in ("bicubic", "no text"):
        right = (torch.tensor(_column(rows, name)) for name in ("right", f"right, {other}"))
        found[f"right, gain over {other}"] = paired_difference(*right, groups)
    return found


def tokenized(studio: Studio, judge: Judge, asks: list[EvalPrompt], seeds: list[int]) -> Batch:
    """Real renders, and what each tokenizer makes of them: no generator that uses it can be read better."""
    real = studio.real([ask.scene for ask in asks])
    small = area_downsample(real, studio.factor)
    high, low = studio.reconstruct(real)
    rows, tensors = judge.rows(high, asks), {"images": torch.cat([real, high, _enlarged(low, studio.side)], 3)}
    for mark, images in ((", low", low), (", real", real), (", real, low", small)):
        rows = _joined(rows, judge.rows(images, asks, mark))
    rows = _widened(rows, {"psnr": psnr(real, high).tolist(), "psnr, low": psnr(small, low).tolist()})
    for name, images in (("features", high), ("features, low", low), ("real", real)):
        tensors[name] = judge.features(images)
    return Batch(rows, tensors)


def finetuned(studio: Studio, judge: Judge, asks: list[EvalPrompt], seeds: list[int]) -> Batch:
    """Real renders through the decoder before and after fine-tuning; "perceptual" by the scorer's features, which were
    part of no loss."""
    real = studio.real([ask.scene for ask in asks])
    before, after = studio.decoders(real)
    rows, tensors = judge.rows(after, asks), {"images": torch.cat([real, before, after], 3)}
    for mark, images in ((", before", before), ("", after)):
        rows = _joined(rows, judge.rows(images, asks, mark))
        pairs = zip(to_float(real).split(1), to_float(images).split(1), strict=True)
        far = [judge.perceptual(*pair).item() for pair in pairs]
        rows = _widened(rows, {f"psnr{mark}": psnr(real, images).tolist(), f"perceptual{mark}": far})
        tensors |= _features(judge, f"features{mark}", images)
    return Batch(rows, tensors | _features(judge, "real", real))


def finetuned_figures(rows: Rows, tensors: Tensors) -> Figures:
    found, groups = figures_of(rows, tensors), _column(rows, "group")
    for name in ("psnr", "perceptual"):
        found[f"{name}, gain"] = paired_difference(_column(rows, name), _column(rows, f"{name}, before"), groups)
    return found


def _column(rows: Rows, name: str) -> list[Any]:
    return [row[name] for row in rows]


def _widened(rows: Rows, columns: dict[str, Sequence[Any]]) -> Rows:
    for name, values in columns.items():
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    return rows


def _joined(rows: Rows, more: Rows) -> Rows:
    return [a | b for a, b in zip(rows, more, strict=True)]


_AFTER = ", ".join(map(str, ITERATIONS))
KINDS = {
    "seen": Kind("one object, seen combinations", "seen", drawn, quality, cascade=False),
    "novel": Kind("one object, novel combinations", "novel", drawn, quality, cascade=False),
    "paraphrases": Kind("one object, words never trained on", "paraphrases", drawn, quality, cascade=False),
    "relations": Kind("two objects with a relation", "relations", drawn, quality, cascade=False),
    "counts": Kind("two or three alike", "counts", drawn, quality, cascade=False),
    "negative": Kind(
        "negative prompts", "negative", negative, avoidance, cascade=False, shows="without, with the negative prompt"
    ),
    "edit": Kind("mask-free edit of a colour", "edit", edited, figures_of,
                 shows=f"before; after {_AFTER} iterations; with super-resolution"),
    "inpaint": Kind("inpainting, a thing replaced", "inpaint", inpainted, figures_of, shows="before, after"),
    "outpaint": Kind("outpainting, a thing beyond the edge", "outpaint", outpainted, figures_of),
    "superres": Kind("super-resolution against plain upscaling", "mixed", superresolved, superres_figures,
                     shows="bicubic, super-resolution, super-resolution without text"),
    "tokenizers": Kind("real renders through the tokenizers", "mixed", tokenized, figures_of,
                       shows="render, high tokenizer, low tokenizer"),
    "decoder": Kind("the decoder before and after fine-tuning", "mixed", finetuned, finetuned_figures,
                    shows="render, before, after"),
}  # fmt: skip


COLUMNS = {"right": "all right", "clear": "clear", "frechet": "Frechet", "score": "CLIP-like", "diversity": "diversity"}
FIRST, BEST = 24, 8  # pictures of a kind that are shown: the first ones; the best and the worst by CLIP-like score
SWEEP: dict[str, dict[str, dict[str, Any]]] = {  # a line of the plot -> its points
    "guidance": {f"{t}": {"guidance": float(t)} for t in (0, 1, 2, 4, 8)},
    "rising guidance": {f"0-{t}": {"guidance": (0.0, float(t))} for t in (1, 2, 4, 8, 16)},
    "temperature": {f"{t}": {"sampling_temperature": t} for t in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)},
    "steps": {f"{t}": {"steps": t} for t in (2, 4, 8, 16, 32)},
    "order": {name: {"order": name} for name in ORDERS},
}
RISING = {f"rising guidance 0-{2 * t}": f"guidance {t}" for t in (1, 2, 4, 8)}  # of the same mean t, told pair by pair
PANELS = (("guidance", "rising guidance"), ("temperature",), ("steps",), ("order",))  # lines that are drawn together


def evaluate(
    studio: Studio,
    out: str | Path,
    about: dict[str, Any],
    *,
    kinds: Sequence[str] = (),
    n: int | None = None,
    seed: int = 1000,
    batch: int = 50,
    sweep: bool = False,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Measure kinds (all that the studio can draw), or sweep -> what eval.json holds; resumes what `out` holds.

    `about` says what the studio draws with: JSON values that tell one checkpoint from another. n pictures a kind (1000)
    or a point of the sweep (300). Default seeds lie far from those on which settings are chosen, which begin at 0.
    ValueError where `out` belongs to other settings, or a kind cannot be measured.
    """
    n = n if n is not None else 300 if sweep else 1000
    if n < 10 or batch < 1:
        raise ValueError(f"n = {n}, batch = {batch}: intervals need at least 10 pictures, batches at least 1")
    trials, out = _trials(studio, kinds, sweep), Path(out)
    versions = {"minimuse": __version__, "torch": str(torch.__version__)}
    settings = versions | about | {"n": n, "seed": seed, "batch": batch, "sweep": sweep, "base_only": studio.base_only}
    _settle(out, settings)
    from tqdm import tqdm

    judge, found = judge or Judge(), {}
    with tqdm(total=n * len(trials), unit="picture") as bar:
        for name, (kind, how) in trials.items():
            bar.set_description(name)
            found[name] = _measured(kind, how, out, name, (n, seed, batch), studio, judge, bar)
    return _report(out, settings, found)


def _trials(studio: Studio, kinds: Sequence[str], sweep: bool) -> dict[str, tuple[Kind, dict[str, Any]]]:
    """Name -> a kind, and settings to draw it with; refuses what cannot be measured."""
    if sweep and kinds:
        raise ValueError(f"a sweep has prompts of its own: leave out --sweep, or the kinds {', '.join(kinds)}")
    if sweep:
        point = Kind("a point of the sweep", "mixed", drawn, quality)
        points = [(f"{line} {label}", how) for line, points in SWEEP.items() for label, how in points.items()]
        return {name: (point, how) for name, how in points}
    can = [name for name, kind in KINDS.items() if not (kind.cascade and studio.base_only)]
    can = [name for name in can if name != "decoder" or studio.before is not None]
    for name in kinds or can:
        if name not in KINDS:
            raise ValueError(f"unknown kind {name!r}; known: {', '.join(KINDS)}")
        if name not in can and name == "decoder":
            raise ValueError("kind decoder needs the decoder before fine-tuning: give --run, the folder of a training")
        if name not in can:
            raise ValueError(f"kind {name} needs the whole cascade; leave out --base-only")
    return {name: (KINDS[name], {}) for name in kinds or can}


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Begin an evaluation in a folder, or go on with the same one."""
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        if changed := runs.differences(checkpoint.read_json(path), settings):
            raise ValueError(
                f"{out} holds another evaluation: {'; '.join(changed[:4])}. Put it back, or give another folder"
            )
        return
    if there := [name for name in ("eval.json", "eval.md", "kinds", "parts") if (out / name).exists()]:
        raise FileExistsError(f"{out} holds {', '.join(there)} but no settings.json; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(settings, indent=1) + "\n")


# --- one kind ---------------------------------------------------------------------------------------------------------


def _measured(
    kind: Kind, how: dict[str, Any], out: Path, name: str, size: tuple[int, int, int], studio: Studio, judge: Judge, bar
) -> Figures:
    """The figures of a kind: read where it is done, else measured batch by batch."""
    n, seed, batch = size
    path, parts = out / "kinds" / f"{name}.json", out / "parts" / name
    if path.exists():
        bar.update(n)
        return {k: Estimate(*v) for k, v in checkpoint.read_json(path)["figures"].items()}
    asked, measure = prompt_set(kind.prompts, n), partial(kind.measure, studio, judge, **how)
    for start in range(0, n, batch):
        file = parts / f"{start:06d}.safetensors"
        if not file.exists():
            some, seeds = asked[start : start + batch], list(range(seed + start, seed + min(start + batch, n)))
            found = measure(some, seeds)
            told = [{"prompt": a.prompt, "seed": s, "group": a.group} for a, s in zip(some, seeds, strict=True)]
            _keep(file, found._replace(rows=[a | b for a, b in zip(told, found.rows, strict=True)]))
        bar.update(min(batch, n - start))
    rows, tensors = _kept(parts)
    figures = kind.figures(rows, tensors)
    path.parent.mkdir(exist_ok=True)
    atomic_write(path.with_suffix(".png"), partial(page(rows, tensors["images"]).save, format="PNG"))
    atomic_write(path, json.dumps({"figures": figures, "rows": rows}, indent=1) + "\n")  # last: the kind is done
    shutil.rmtree(parts)
    return figures


def _keep(file: Path, batch: Batch) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in batch.tensors.items()}
    atomic_write(file, partial(save_file, tensors, metadata={"rows": json.dumps(batch.rows)}))


def _kept(folder: Path) -> tuple[Rows, Tensors]:
    """All batches of a kind, in order."""
    rows: Rows = []
    parts: dict[str, list[Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as part:
            rows += json.loads(part.metadata()["rows"])
            for name in [*part.keys()]:
                parts.setdefault(name, []).append(part.get_tensor(name))
    return rows, {name: torch.cat(several) for name, several in parts.items()}


def page(rows: Rows, images: Tensor) -> Image.Image:
    """The first pictures, whatever they are; then the best and the worst by CLIP-like score. Wrong ones say so."""
    order, few = sorted(range(len(rows)), key=lambda i: -rows[i]["score"]), min(BEST, len(rows) // 2)
    shown = [("", i) for i in range(min(FIRST, len(rows)))]
    shown += [("best: ", i) for i in order[:few]] + [("worst: ", i) for i in order[: -few - 1 : -1]]
    captions = [
        f"{mark}{rows[i]['prompt']}{'' if rows[i]['right'] else '  WRONG: ' + rows[i]['wrong']}" for mark, i in shown
    ]
    columns = max(2, 8 * images.shape[2] // images.shape[3])
    return grid(to_pil(images[[i for _, i in shown]]), captions, columns, max(1, 128 // images.shape[2]))


# --- the report -------------------------------------------------------------------------------------------------------


def _report(out: Path, settings: dict[str, Any], found: dict[str, Figures]) -> dict[str, Any]:
    """eval.json, eval.md, and of a sweep the trade-offs; what earlier calls measured in this folder stays in them."""
    for path in sorted((out / "kinds").glob("*.json")):
        if path.stem not in found:
            found[path.stem] = {k: Estimate(*v) for k, v in checkpoint.read_json(path)["figures"].items()}
    order = [*KINDS, *(f"{line} {label}" for line, points in SWEEP.items() for label in points)]
    found = {name: found[name] for name in order if name in found}
    for name, constant in RISING.items():
        if name in found and constant in found:
            found[name] = found[name] | _paired(out, name, constant)
    report = {"settings": settings, "kinds": found} | ({"sweep": SWEEP} if settings["sweep"] else {})
    atomic_write(out / "eval.json", json.dumps(report, indent=1) + "\n")
    atomic_write(out / "eval.md", table(found) + "\n")
    for x, name in (("score", "CLIP-like score"), ("right", "all right")) if settings["sweep"] else ():
        atomic_write(out / f"sweep-{x}.png", partial(_tradeoffs(found, x, name).save, format="PNG"))
    return json.loads(json.dumps(report))


def _paired(out: Path, first: str, second: str) -> Figures:
    """What is right of one point less what is right of another, on the same prompts and seeds."""
    rows, others = (checkpoint.read_json(out / "kinds" / f"{name}.json")["rows"] for name in (first, second))
    groups, found = [row["group"] for row in rows], {}
    for name in ("right", "clear"):
        pair = (torch.tensor([row[name] for row in some]) for some in (rows, others))
        found[f"{name}, less {second}"] = paired_difference(*pair, groups)
    return found


def _tradeoffs(found: dict[str, Figures], x: str, name: str) -> Image.Image:
    """A sweep -> x against Frechet distance: guidance, temperatures, steps and orders, each with its Pareto front."""
    series = {
        line: {label: (found[f"{line} {label}"][x], found[f"{line} {label}"]["frechet"]) for label in points}
        for line, points in SWEEP.items()
    }
    panels = [{k: v for k, v in series.items() if k in lines} for lines in PANELS]
    return grid([tradeoff(some, name, "Frechet distance", (False, True)) for some in panels if some], None, 2, 1)


def table(found: dict[str, Figures]) -> str:
    """Markdown: the kinds that are pictures of prompts, a line each; then all other figures, a line each."""

    def cell(figure: Estimate | None) -> str:
        return "" if figure is None else str(figure).rsplit(", n", 1)[0] + ")"

    lines = ["| kind | n | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name, figures in found.items():
        if "right" in figures:
            cells = " | ".join(cell(figures.get(column)) for column in COLUMNS)
            lines.append(f"| {KINDS[name].title if name in KINDS else name} | {figures['right'].n} | {cells} |")
    lines += ["", "| kind | figure | value and 95% interval | n |", "|---|---|---|---|"]
    for name, figures in found.items():
        for k, figure in figures.items():
            if k not in COLUMNS:
                lines.append(f"| {name} | {k} | {cell(figure)} | {figure.n} |")
    shown = [f"- kinds/{name}.png: {KINDS[name].shows}" for name in found if name in KINDS and KINDS[name].shows]
    return "\n".join([*lines, *(["", "Side by side in the pictures:", *shown] if shown else [])])


# --- the command ------------------------------------------------------------------------------------------------------


def measure(
    name: str,
    out: Path,
    *,
    training: Path | None = None,
    device: str | None = None,
    base_only: bool = False,
    sweep: bool = False,
    **how,
) -> dict[str, Any]:
    """A shipped name, folder or hub id -> `evaluate`. The folder of its training (the checkpoint's own may be one)
    holds the high tokenizer as it was before its decoder was fine-tuned. Sweeps are of the base model alone."""
    muse = Muse.from_pretrained(name, device=device)
    folder, before = checkpoint.find(name), None
    if training or runs.states(folder / "high_tokenizer"):
        before = VQGAN(muse.config.high_tokenizer)
        runs.load_weights((training or folder) / "high_tokenizer", before)
        before = before.eval().requires_grad_(False).to(muse.device, muse.dtype)
        if not torch.allclose(before.codebook, muse.high_tokenizer.codebook, rtol=1e-2, atol=1e-3):  # saved in half
            raise ValueError(f"{training or folder} is not the training of {name}: its codebook is another one")
    about = {"checkpoint": muse.config.name, "device": muse.device.type, "dtype": str(muse.dtype)}
    about["config"] = content_hash(to_dict(muse.config))
    for part, home in (("checkpoint", folder), *((part, checkpoint.SHIPPED / part) for part in ("detector", "clip"))):
        about[f"weights of {part}"] = runs.stamp(home / checkpoint.WEIGHTS)[1]
    return evaluate(Studio(muse, before=before, base_only=base_only or sweep), out, about, sweep=sweep, **how)
