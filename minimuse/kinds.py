"""What `minimuse eval` measures, kind by kind: how a batch is drawn, what is kept of it, which figures follow.

    prompts.SETS --Studio: a Muse at work--> pictures --Judge: reader and scorer--> rows and features --> Measured

seen, novel, paraphrases, relations, counts   is everything right that the prompt names?
negative                                      is the word shown that the negative prompt names?
edit, inpaint, outpaint                       is what was asked for there, and the rest as it was (Muse 3.3)?
superres                                      what it gains over plain upscaling, and what its text is worth (2.4)
tokenizers, decoder                           real renders through the tokenizers; fine-tuning before and after (2.5)

Images are uint8, (B, 3, H, W). A row is a dict of plain values a picture; every figure is made of rows and features.
Not here: the prompts (`prompts.py`), resuming, tables, sweeps (`eval_run.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.data_images import area_downsample, to_float, to_uint8
from minimuse.data_scenes import MATERIALS, SIZES
from minimuse.eval_metrics import diversity, frechet, psnr
from minimuse.intervals import Measured, difference, mean, share
from minimuse.prompts import Ask
from minimuse.studio import ITERATIONS, Judge, Studio

TILE = 64  # pixels a side that the networks which measure were trained on


class Batch(NamedTuple):
    """What is kept of a batch: a row of each a picture. "images" go on the page, the others into distributions."""

    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]


Rows, Tensors, Figures = list[dict[str, Any]], dict[str, Tensor], dict[str, Measured]


class Kind(NamedTuple):
    """A kind of question: its prompt set, how a batch of it is measured, and the figures of all its batches."""

    title: str
    prompts: str
    measure: Callable[[Studio, Judge, list[Ask], list[int]], Batch]
    figures: Callable[[Rows, Tensors], Figures]
    cascade: bool = True  # does it need more than the base model?
    shows: str = ""  # what stands side by side in a picture of its page


# --- pictures from prompts --------------------------------------------------------------------------------------------


def drawn(studio: Studio, judge: Judge, asks: list[Ask], seeds: list[int], **sampling) -> Batch:
    """Pictures of prompts, judged beside real renders of scenes that have what is asked for."""
    images = studio.draw([ask.prompt for ask in asks], seeds, **sampling)
    real = studio.real([ask.scene for ask in asks])
    rows = _joined(judge.rows(images, asks), judge.rows(real, asks, ", real"))
    return Batch(rows, {"images": images, "features": judge.features(images), "real": judge.features(real)})


def quality(rows: Rows, tensors: Tensors) -> Figures:
    """The figures of pictures drawn from prompts; "..., real" are those of the real renders, which nothing can beat."""
    groups, prompts = _column(rows, "group"), _column(rows, "prompt")
    pairs = len(rows) - len(rows) % 2  # each prompt comes twice in a row
    found = {name: share(_column(rows, name), groups) for name in ("right", "clear")}
    found["frechet"] = frechet(tensors["real"], tensors["features"], groups)
    found["score"] = mean(_column(rows, "score"), groups)
    found["diversity"] = diversity(tensors["features"][:pairs], prompts[:pairs])
    found["right, real"] = share(_column(rows, "right, real"), groups)
    found["score, real"] = mean(_column(rows, "score, real"), groups)
    return found | {"diversity, real": diversity(tensors["real"][:pairs], prompts[:pairs])}


def negative(studio: Studio, judge: Judge, asks: list[Ask], seeds: list[int]) -> Batch:
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
            found[f"{word}, {name}"] = share(_column(mine, name), _column(mine, "group"))
        often += mine if mine and found[f"{word}, unguided"].value >= 0.4 else []
    groups = _column(often, "group")
    found |= {name: share(_column(often, name), groups) for name in ("without", "with") if often}
    return {"right": share(_column(rows, "right"), _column(rows, "group"))} | found


# --- edits ------------------------------------------------------------------------------------------------------------


def regions(asks: Sequence[Ask], side: int) -> Tensor:
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


def edited(studio: Studio, judge: Judge, asks: list[Ask], seeds: list[int]) -> Batch:
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


def inpainted(studio: Studio, judge: Judge, asks: list[Ask], seeds: list[int]) -> Batch:
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


def outpainted(studio: Studio, judge: Judge, asks: list[Ask], seeds: list[int]) -> Batch:
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
            found[name] = (share if isinstance(first, bool) else mean)(_column(rows, name), groups)
    for things in sorted({row["things"] for row in rows if "things" in row}):
        mine = [row for row in rows if row["things"] == things]
        found[f"right, of {things}"] = share(_column(mine, "right"), _column(mine, "group"))
    for name, features in tensors.items():
        if name.split(",")[0] == "features":
            real = tensors["real, tiles" if "tiles" in name else "real"].flatten(0, -2)
            repeats = features[0].numel() // features.shape[-1]
            labels = [group for group in groups for _ in range(repeats)]
            found[name.replace("features", "frechet")] = frechet(real, features.flatten(0, -2), labels)
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


def superresolved(studio: Studio, judge: Judge, asks: list[Ask], seeds: list[int]) -> Batch:
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
        found[f"right, gain over {other}"] = difference(*right, groups)
    return found


def tokenized(studio: Studio, judge: Judge, asks: list[Ask], seeds: list[int]) -> Batch:
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


def finetuned(studio: Studio, judge: Judge, asks: list[Ask], seeds: list[int]) -> Batch:
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
        found[f"{name}, gain"] = difference(_column(rows, name), _column(rows, f"{name}, before"), groups)
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
