"""What `minimuse eval` measures: tasks, from a prompt set to values per picture and metrics with intervals.

    prompts, seeds --task.draw, by an EvalModel--> Drawn: images --Evaluator--> Batch: values per picture, features
    values and features of all batches --summarize--> Metrics

    seen, novel, paraphrases, relations, counts   is everything right that the prompt names?
    negative                                      does the picture show the word to guide away from?
    edit, inpaint, outpaint                       is the change right, and the rest unchanged (Muse 3.3)?
    superres                                      against plain upscaling, and without its text (Muse 2.4)
    tokenizers, decoder                           real renders through tokenizers; before fine-tuning (Muse 2.5)

A task compares variants of a picture: "" is what the model draws, "real" a render of a scene that fits the prompt.
Images are uint8, (B, 3, H, W).
Not here: prompts and what they mean (`eval_prompts.py`), intervals (`eval_metrics.py`), reports (`eval_run.py`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.data_images import area_downsample, to_float, to_pil, to_uint8
from minimuse.data_scenes import MATERIALS, Scene, render
from minimuse.editing import edit_tokens, inpaint_tokens, tokenize
from minimuse.eval_clip import SceneClip
from minimuse.eval_detector import FIELDS, SIZE, Detector
from minimuse.eval_metrics import (
    Estimate,
    diversity,
    frechet_interval,
    mean_interval,
    proportion_interval,
    psnr,
)
from minimuse.eval_prompts import EvalPrompt, matches, parse_prompt
from minimuse.muse import Muse
from minimuse.sampler import Step
from minimuse.vqgan import VQGAN
from minimuse.vqgan_loss import feature_distance

ITERATIONS = (10, 30, 100)  # of a mask-free edit: after these, pictures are measured

Values = dict[str, list[Any]]  # "right, real" -> one value per picture: bool, number or text
Features = dict[tuple[str, str], Tensor]  # (variant, "" or "tiles") -> (B, D) or (B, tiles, D)
Metrics = dict[str, Estimate]


class Drawn(NamedTuple):
    """The images of a task."""

    variants: dict[str, Tensor]
    reference: Tensor | None = None  # what all variants should equal outside the region that the prompt changes
    values: Values | None = None  # what only this task measures


class Batch(NamedTuple):
    """What is kept of measured pictures."""

    values: Values
    features: Features
    images: Tensor  # all variants side by side, to look at


def label(*parts: str) -> str:
    """("right", "no text") -> "right, no text"; ("right", "") -> "right"."""
    return ", ".join(filter(None, parts))


# --- what draws and what measures -------------------------------------------------------------------------------------


class EvalModel:
    """A Muse that draws whole batches. Any object with these methods can take its place.

    `before` is the high tokenizer before its decoder was fine-tuned. With `base_only`, pictures are the base model's.
    """

    def __init__(self, muse: Muse, *, before: VQGAN | None = None, base_only: bool = False):
        self.muse, self.before, self.base_only = muse, before, base_only
        self.side = muse.config.high_tokenizer.image_size
        self.factor = self.side // muse.config.low_tokenizer.image_size
        self._render = lru_cache(32)(lambda scenes: to_uint8(render([*scenes], self.side)))  # shared by sweep points

    def real(self, scenes: Sequence[Scene]) -> Tensor:
        """Renders of scenes, at the size of the model's pictures."""
        images = self._render(tuple(scenes))
        return area_downsample(images, self.factor) if self.base_only else images

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], negatives: Sequence[str] = (), **sampling) -> Tensor:
        """Prompts, with a seed and perhaps a negative prompt each -> images."""
        decode = self.muse.decode_base if self.base_only else self.muse.decode
        return self._last(decode(self._jobs(prompts, seeds, negatives), **sampling))

    def cascade(self, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Images of the base model (small), of super-resolution, and of super-resolution without text."""
        jobs, superres = self._jobs(prompts, seeds), self.muse.decode_superres
        *_, low = self.muse.decode_base(jobs)
        without_text = superres(jobs, low.tokens, guidance=-1.0)  # l_c - (l_c - l_u) = l_u
        return self._images(low), self._last(superres(jobs, low.tokens)), self._last(without_text)

    def inpaint(self, images: Tensor, repaint: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """As `Muse.inpaint(keep=False)`; repaint is (B, H, W) bool."""
        tokens = tokenize(self.muse, *to_pil(images))
        return self._last(inpaint_tokens(self.muse, tokens, repaint, self._jobs(prompts, seeds)))

    def edit(self, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        """As `Muse.edit`: the base model's images (small) after each of ITERATIONS, then the final images."""
        tokens, found = tokenize(self.muse, *to_pil(images)), []
        for step in edit_tokens(self.muse, tokens, self._jobs(prompts, seeds), iterations=ITERATIONS[-1]):
            if step.stage == "base" and step.index + 1 in ITERATIONS:
                found.append(self._images(step))
        return [*found, self._images(step)]

    @torch.inference_mode()
    def reconstruct(self, images: Tensor) -> dict[str, Tensor]:
        """Images through the high tokenizer (""), "before" its fine-tuning, and decimated through the "low" one."""
        low, high = tokenize(self.muse, *to_pil(images))
        made = {"": self.muse.high_tokenizer.decode(high), "low": self.muse.low_tokenizer.decode(low)}
        made |= {} if self.before is None else {"before": self.before.decode(high)}
        return {name: to_uint8(made_images).cpu() for name, made_images in made.items()}

    def _jobs(self, prompts: Sequence[str], seeds: Sequence[int], negatives: Sequence[str] = ()) -> list[dict]:
        """As `Muse.jobs`, without its hints about unfamiliar words, which the set paraphrases is made of."""
        rows = zip(prompts, negatives or [None] * len(prompts), seeds, strict=True)
        return [{"prompt": prompt, "negative_prompt": negative, "seed": seed} for prompt, negative, seed in rows]

    def _last(self, steps: Iterator[Step]) -> Tensor:
        *_, step = steps
        return self._images(step)

    @torch.inference_mode()
    def _images(self, step: Step) -> Tensor:
        tokenizer = self.muse.low_tokenizer if step.stage == "base" else self.muse.high_tokenizer
        return to_uint8(tokenizer.decode(step.tokens)).cpu()


class Evaluator:
    """Measures pictures with two networks: the detector and SceneClip."""

    def __init__(self, detector: Detector | None = None, clip: SceneClip | None = None):
        self.detector = detector or Detector.from_pretrained()
        self.clip = clip or SceneClip.from_pretrained()
        self.perceptual = feature_distance(self.clip.levels)

    def __call__(self, drawn: Drawn, asked: Sequence[EvalPrompt], real: Tensor) -> Batch:
        """Values and features of all variants and of real renders. With a reference, also the distances from it."""
        values: Values = {"prompt": [ask.prompt for ask in asked], "group": [ask.group for ask in asked]}
        features: Features = {}
        for variant, images in {**drawn.variants, "real": real}.items():
            found = self.values(images, asked)
            if drawn.reference is not None and variant != "real":
                found |= self.against(images, drawn.reference, asked)
            values |= {label(name, variant): column for name, column in found.items()}
            features |= {(variant, part): rows for part, rows in self.features(images).items()}
        shown = [*([] if drawn.reference is None else [drawn.reference]), *drawn.variants.values()]
        side = max(images.shape[-1] for images in shown)
        sheet = torch.cat([enlarge(images, side, "nearest") for images in shown], 3)
        return Batch(values | (drawn.values or {}), features, sheet)

    def values(self, images: Tensor, asked: Sequence[EvalPrompt]) -> Values:
        """Is all that the prompt names right, and clearly; what is wrong; CLIP score; the surest thing's attributes."""
        found = self.detector.detect(images)
        pairs = [(each, parse_prompt(ask.prompt)) for each, ask in zip(found, asked, strict=True)]
        verdicts = [matches(*pair) for pair in pairs]
        surest = [max(each.things, key=lambda thing: thing.confidence, default=()) for each in found]
        shown = [ask.negative in thing for ask, thing in zip(asked, surest, strict=True)]
        return {
            "right": [verdict.right for verdict in verdicts],
            "clear": [matches(*pair, min_confidence=0.5).right for pair in pairs],
            "wrong": ["; ".join(verdict.wrong) for verdict in verdicts],
            "score": [round(score, 5) for score in self.clip(images, [ask.prompt for ask in asked]).tolist()],
            **{field: [getattr(thing, field, "") for thing in surest] for field in FIELDS},
            **({"word shown": shown} if asked[0].negative else {}),
        }

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Features of whole pictures; of larger pictures also those of 64 x 64 tiles, where fine detail shows."""
        found = {"": self.detector.features(images)}
        if images.shape[-1] >= 2 * SIZE:
            tiles = images.unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE)  # (B, 3, h, w, 64, 64)
            tiles = tiles.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # (B, h w, 3, 64, 64)
            found["tiles"] = self.detector.features(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
        return found

    def against(self, images: Tensor, reference: Tensor, asked: Sequence[EvalPrompt]) -> Values:
        """PSNR outside the regions that are to change, and the perceptual distance by SceneClip, part of no loss."""
        reference = area_downsample(reference, reference.shape[-1] // images.shape[-1])
        region = regions(asked, images.shape[-1])
        outside = psnr(torch.where(region[:, None], reference, images), reference)  # inside, the error is 0
        pairs = zip(to_float(images).split(1), to_float(reference).split(1), strict=True)
        return {
            "psnr": (outside + 10 * (~region).double().mean((1, 2)).log10()).tolist(),
            "perceptual": [self.perceptual(*pair).item() for pair in pairs],
        }


def regions(asked: Sequence[EvalPrompt], side: int) -> Tensor:
    """(B, side, side) bool: the pixels of each picture that are to change."""
    at = (torch.arange(side) + 0.5) / side
    left, top, right, bottom = torch.tensor([ask.region for ask in asked]).T[..., None]
    return ((at > top) & (at < bottom))[:, :, None] & ((at > left) & (at < right))[:, None]


def enlarge(images: Tensor, side: int, mode: str) -> Tensor:
    """uint8 images (B, 3, H, W) -> (B, 3, side, side), by a mode of `F.interpolate`."""
    return F.interpolate(images.float(), size=(side, side), mode=mode).round().clamp(0, 255).to(torch.uint8)


# --- how each task draws: model, prompts, seeds -> Drawn --------------------------------------------------------------


def draw_prompts(model: EvalModel, asked: Sequence[EvalPrompt], seeds: Sequence[int], **sampling) -> Drawn:
    """Pictures of prompts."""
    return Drawn({"": model.draw([ask.prompt for ask in asked], seeds, **sampling)})


def draw_negative(model: EvalModel, asked: Sequence[EvalPrompt], seeds: Sequence[int]) -> Drawn:
    """Each prompt guided away from the same prompt with one more word; "without" that, and "unguided".

    Choice: the paper does not say how to word a negative prompt. Where it repeats the prompt ("a red metal cube"
    against "a red cube"), l_c - l_u holds only the word.
    """
    prompts, away = [ask.prompt for ask in asked], []
    for ask in asked:
        article, color, shape = ask.prompt.split()
        words = (color, ask.negative) if ask.negative in MATERIALS else (ask.negative, color)
        away.append(" ".join((article, *words, shape)))
    unguided = {"guidance": 0.0} if model.base_only else {"guidance": 0.0, "superres": {"guidance": 0.0}}
    variants = {"unguided": model.draw(prompts, seeds, **unguided), "without": model.draw(prompts, seeds)}
    return Drawn(variants | {"": model.draw(prompts, seeds, away)})


def draw_edit(model: EvalModel, asked: Sequence[EvalPrompt], seeds: Sequence[int]) -> Drawn:
    """A thing's color changed without a mask: after some iterations, and after super-resolution."""
    before = model.real([ask.before for ask in asked])
    *stages, final = model.edit(before, [ask.prompt for ask in asked], seeds)
    return Drawn({**dict(zip(map(str, ITERATIONS), stages, strict=True)), "": final}, before)


def draw_inpaint(model: EvalModel, asked: Sequence[EvalPrompt], seeds: Sequence[int]) -> Drawn:
    """A thing replaced, and the pixels outside kept; "not kept" as they come from the model."""
    before, region = model.real([ask.before for ask in asked]), regions(asked, model.side)
    made = model.inpaint(before, region, [ask.prompt for ask in asked], seeds)
    kept = torch.where(region[:, None], made, before)
    return Drawn({"not kept": made, "tokenizer alone": model.reconstruct(before)[""], "": kept}, before)


def draw_outpaint(model: EvalModel, asked: Sequence[EvalPrompt], seeds: Sequence[int]) -> Drawn:
    """The window half beyond the right edge, as `Muse.outpaint` fills it. "seam" is the step at the edge, of 255."""
    before, half = model.real([ask.before for ask in asked]), model.side // 2
    window = torch.cat([before[..., half:], before[..., -1:].expand_as(before[..., half:])], 3)
    region = regions(asked, model.side)
    made = model.inpaint(window, region, [ask.prompt for ask in asked], seeds)
    kept = torch.where(region[:, None], made, window)
    steps = {"seam": kept, "seam, real": model.real([ask.scene for ask in asked])}
    steps = {k: (x[..., half].float() - x[..., half - 1].float()).abs().mean((1, 2)) for k, x in steps.items()}
    return Drawn({"": kept}, window, {name: step.tolist() for name, step in steps.items()})


def draw_superres(model: EvalModel, asked: Sequence[EvalPrompt], seeds: Sequence[int]) -> Drawn:
    """The base model's pictures upscaled, after super-resolution, and after super-resolution without text."""
    low, high, without_text = model.cascade([ask.prompt for ask in asked], seeds)
    return Drawn({"bicubic": enlarge(low, model.side, "bicubic"), "": high, "no text": without_text})


def draw_reconstructions(
    model: EvalModel, asked: Sequence[EvalPrompt], seeds: Sequence[int], *, variants: Sequence[str]
) -> Drawn:
    """Real renders through the tokenizers: an upper limit for every model that uses them."""
    real = model.real([ask.scene for ask in asked])
    made = model.reconstruct(real)
    return Drawn({variant: made[variant] for variant in variants}, real)


# --- tasks ------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A prompt set, and how it is drawn."""

    title: str
    prompts: str
    draw: Callable[..., Drawn] = draw_prompts
    base_only: bool = False  # possible with the base model alone


TASKS = {
    "seen": Task("one object, seen combinations", "seen", base_only=True),
    "novel": Task("one object, novel combinations", "novel", base_only=True),
    "paraphrases": Task("one object, words never trained on", "paraphrases", base_only=True),
    "relations": Task("two objects with a relation", "relations", base_only=True),
    "counts": Task("two or three alike", "counts", base_only=True),
    "negative": Task("negative prompts", "negative", draw_negative, base_only=True),
    "edit": Task("mask-free edit of a colour", "edit", draw_edit),
    "inpaint": Task("inpainting, a thing replaced", "inpaint", draw_inpaint),
    "outpaint": Task("outpainting, a thing beyond the edge", "outpaint", draw_outpaint),
    "superres": Task("super-resolution against plain upscaling", "mixed", draw_superres),
    "tokenizers": Task(
        "real renders through the tokenizers", "mixed", partial(draw_reconstructions, variants=("", "low"))
    ),
    "decoder": Task(
        "the decoder before and after fine-tuning", "mixed", partial(draw_reconstructions, variants=("before", ""))
    ),
}


def summarize(values: Values, features: Features) -> Metrics:
    """Fractions of True, means of numbers; Frechet distances to the real renders, and diversity within prompts."""
    groups, prompts = values["group"], values["prompt"]
    found: Metrics = {}
    for name, column in values.items():
        if name != "seed" and not isinstance(column[0], str):
            found[name] = (proportion_interval if isinstance(column[0], bool) else mean_interval)(column, groups)
    pairs = len(prompts) // 2 * 2  # each prompt comes twice in a row
    for (variant, part), rows in features.items():
        if variant != "real":
            repeated = [group for group in groups for _ in range(rows[0].numel() // rows.shape[-1])]
            pair = (features["real", part].flatten(0, -2), rows.flatten(0, -2))
            found[label("frechet", variant, part)] = frechet_interval(*pair, repeated)
        if not part:
            found[label("diversity", variant)] = diversity(rows[:pairs], prompts[:pairs])
    return found
