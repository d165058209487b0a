"""A Muse at work and the networks that judge it: what `minimuse eval` draws with, and what it reads with.

    Studio: prompts, seeds --Muse--> images          Judge: images, prompts --reader, scorer--> right or wrong, scores

Both work a batch at a time. Images are uint8, (B, 3, H, W), as they would be saved.
Not here: what is measured (`kinds.py`).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from minimuse import editing
from minimuse.data_images import area_downsample, to_pil, to_uint8
from minimuse.data_scenes import Scene, render
from minimuse.eval_clip import Scorer
from minimuse.eval_detector import Reader
from minimuse.eval_prompts import matches, parse_prompt
from minimuse.muse import Muse
from minimuse.prompts import Ask
from minimuse.sampler import Step
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

    def __init__(self, reader: Reader | None = None, scorer: Scorer | None = None):
        self.reader, self.scorer = reader or Reader.from_pretrained(), scorer or Scorer.from_pretrained()
        self.perceptual = feature_distance(self.scorer.levels)
        self.features = self.reader.features

    def rows(self, images: Tensor, asks: Sequence[Ask], mark: str = "") -> list[dict[str, Any]]:
        """-> of each picture: is all that the prompt names right, and clearly so; what is wrong; CLIP-like score."""
        rows, scores = [], self.scorer(images, [ask.prompt for ask in asks]).tolist()
        for reading, ask, score in zip(self.reader.read(images), asks, scores, strict=True):
            wants = parse_prompt(ask.prompt)
            verdict, clear = matches(reading, wants), matches(reading, wants, sure=0.5).right
            row = {"right": verdict.right, "clear": clear, "wrong": "; ".join(verdict.wrong), "score": round(score, 5)}
            rows.append({f"{name}{mark}": value for name, value in row.items()})
        return rows

    def surest(self, images: Tensor) -> list[dict[str, str]]:
        """Of each picture the looks of the thing that the reader is surest of, {} where it sees none."""
        things = [max(reading.things, key=lambda t: t.confidence, default=None) for reading in self.reader.read(images)]
        return [{k: getattr(t, k) for k in ("color", "shape", "size", "material")} if t else {} for t in things]
