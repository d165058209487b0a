"""Muse: the whole flow on one screen (Muse, figure 3).

    prompts --text--> context --base--> low tokens --super-res--> high tokens --decoder--> pixels

`Muse.decode` is that flow; `generate`, `inpaint`, `outpaint` and `edit` give it what to start from. Whatever can be
chosen has its default in the checkpoint's configuration.
Glossary: B images, t guidance, u progress. Not here: training (`train.py`), files (`checkpoint.py`).
"""

import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minimuse import checkpoint, editing
from minimuse.cfg import get_guidance, guided, null_text
from minimuse.config import MuseConfig
from minimuse.data_images import to_pil
from minimuse.sampler import SamplingConfig, Step, decode
from minimuse.text import Context, TextEncoder
from minimuse.transformer import SuperRes, Transformer
from minimuse.utils import pick_device, pick_dtype
from minimuse.vqgan import VQGAN

FOREIGN = {  # names that users of diffusers will type -> ours
    "guidance_scale": "guidance=t with t = guidance_scale - 1",
    "num_inference_steps": "steps",
    "num_images_per_prompt": "n",
    "generator": "seed",
    "mask_image": "mask",
}


def build(config: MuseConfig) -> nn.ModuleDict:
    """The four networks with fresh weights; the high tokenizer has its fine-tuned decoder's size."""
    low = VQGAN(config.low_tokenizer)
    high = VQGAN(config.finetuned_tokenizer)
    return nn.ModuleDict(
        {
            "low_tokenizer": low,
            "base": Transformer(config.base),
            "high_tokenizer": high,
            "superres": SuperRes(config.superres),
        }
    )


def ready_tokenizer(config: MuseConfig) -> nn.Module | None:
    """The low tokenizer that others trained, where `low_tokenizer_from` names one: frozen, of the very numbers."""
    if not config.low_tokenizer_from:
        return None
    from minimuse.amused import VQTokenizer

    lone = Path(config.low_tokenizer_from, "config.json").exists()  # a VQModel by itself, not in a whole aMUSEd
    tokenizer = VQTokenizer.from_pretrained(config.low_tokenizer_from, subfolder="" if lone else "vqvae")
    for name in ("codebook_size", "downsampling"):
        found, expected = getattr(tokenizer, name), getattr(config.low_tokenizer, name)
        if found != expected:
            raise ValueError(
                f"{config.low_tokenizer_from}: {name} {found}, but low_tokenizer says {expected}; change it"
            )
    return tokenizer


def parameter_counts(config: MuseConfig) -> dict[str, int]:
    """Parameters of each network, counted on the meta device: no memory is taken, whatever the size."""
    with torch.device("meta"):
        parts = build(config)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


class Muse:
    """A text-to-image model: four networks, a frozen language model, and defaults for their sampling.

    Every method that makes pictures takes, besides what it names:
        negative_prompt       a text, or one for each prompt, to guide away from (Muse 2.7)
        guidance              t: a number, a pair (first, last) rising linearly, or a function of u; 0 is none
        steps, schedule, order, sampling_temperature, choice_temperature, top_k, remask    as in `sampler.decode`
        superres              a dict of the same that holds for super-resolution alone, such as {"steps": 4}
    What is not given comes from the checkpoint. With another `order` the ranking noise is 0 unless you give it.
    """

    def __init__(
        self,
        config: MuseConfig,
        parts: nn.ModuleDict,
        encoder: TextEncoder,
        *,
        words: Sequence[str] = (),
        examples: Sequence[str] = (),
    ):
        self.config, self.encoder, self.parts = config, encoder, parts.eval().requires_grad_(False)
        self.words, self.examples = sorted(words), list(examples)  # words of the training captions; prompts to try
        self._told: set[str] = set()
        self.low_tokenizer, self.base = parts["low_tokenizer"], parts["base"]
        self.high_tokenizer, self.superres = (getattr(parts, k, None) for k in ("high_tokenizer", "superres"))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    # --- the flow -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def decode(
        self,
        jobs: list[dict[str, Any]],
        *,
        low: Tensor | None = None,
        high: Tensor | None = None,
        superres: dict[str, Any] | None = None,
        **sampling,
    ) -> Iterator[Step]:
        """B jobs (prompt, negative prompt, seed) -> Steps of the base model, then of super-resolution (Muse 2.8).

        `low` (B, N_low) and `high` (B, N) are the tokens to start from; None is all [MASK].
        """
        draws = [torch.Generator().manual_seed(job["seed"]) for job in jobs]
        text, null = self.contexts(jobs)
        low_t, low_sampling = _settings(self.config.base_sampling, sampling)
        high_t, high_sampling = _settings(self.config.superres_sampling, sampling | (superres or {}))
        low = self._all_masked(self.base, len(jobs)) if low is None else low
        high = self._all_masked(self.superres, len(jobs)) if high is None else high

        logits_fn = guided(self.base, self.base.memory(text), self.base.memory(null), low_t)
        for step in decode(logits_fn, low, mask_id=self.base.mask_id, generator=draws, **low_sampling):
            yield step._replace(stage="base", guidance=low_t(step.u))
        low = step.tokens

        logits_fn = guided(self.superres, self.superres.memory(text, low), self.superres.memory(null, low), high_t)
        for step in decode(logits_fn, high, mask_id=self.superres.mask_id, generator=draws, **high_sampling):
            yield step._replace(stage="superres", guidance=high_t(step.u))

    # --- pictures from text -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 16,
        watch: Callable[[Step], None] | None = None,
        **sampling,
    ) -> list[Image.Image]:
        """Prompts -> n pictures of each, in order, as PIL images.

        Picture i draws with seed + i, or with seeds[i], and never depends on its neighbours. Each one's
        `info["minimuse"]` holds what made it. `watch` is called with every Step.

        >>> Muse.from_pretrained("nano").generate("two small red cubes", n=4, seed=0)
        """
        images = []
        jobs = self.jobs(prompts, n, seed, negative_prompt, sampling)
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            images += self.finish(self.decode(batch, **sampling), batch, sampling, watch)
        return images

    def steps(
        self,
        prompt: str,
        *,
        n: int = 1,
        seed: int | None = None,
        negative_prompt: str | None = None,
        **sampling,
    ) -> Iterator[Step]:
        """The trace of `generate`: a Step at a time with tokens, masked, revealed, confidence and guidance."""
        return self.decode(self.jobs(prompt, n, seed, negative_prompt, sampling), **sampling)

    @torch.inference_mode()
    def picture(self, step: Step) -> list[Image.Image]:
        """A Step -> its B pictures; what is still masked shows as the nearest known token (`plots.film` draws it gray).

        Else whatever code took its place would colour its neighbours.
        """
        tokenizer = self.low_tokenizer if step.stage == "base" else self.high_tokenizer
        return to_pil(tokenizer.decode(_nearest_known(step.tokens, step.masked)).float())

    inpaint, outpaint, edit, edit_steps = editing.inpaint, editing.outpaint, editing.edit, editing.edit_steps

    # --- files and devices --------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "Muse":
        """A shipped name ("nano"), a folder, or a hub id -> Muse. `device` None is cuda, then mps, then cpu.

        `dtype` None is what `pick_dtype` says. The LM loads at the first prompt.
        """
        config, weights, about = checkpoint.load(name)
        with torch.device("meta"):
            parts = build(config)
        if (ready := ready_tokenizer(config)) is not None:
            parts["low_tokenizer"] = ready
            weights |= {f"low_tokenizer.{k}": v for k, v in ready.state_dict().items()}
        checkpoint.check_weights(parts.state_dict(), weights, name)
        parts.load_state_dict(weights, assign=True)
        encoder = TextEncoder(config.text_encoder, max_tokens=config.text_tokens)
        device = pick_device(device)
        if dtype is None:
            dtype = pick_dtype(device, sum(p.numel() for p in parts.parameters()))
        muse = cls(config, parts, encoder, **about)
        _ = muse.fingerprint  # of the weights as they are stored, before a dtype rounds them
        return muse.to(device, dtype)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
        """config.json, model.safetensors and a model card (README.md) into a folder; `dtype` None changes none.

        A low tokenizer that others trained is named in config.json, not stored. ValueError where `from_pretrained`
        could not build the networks again.
        """
        with torch.device("meta"):
            expected, found = build(self.config).state_dict(), self.parts.state_dict()
        if self.config.low_tokenizer_from:
            expected, found = ({k: v for k, v in w.items() if "low_tokenizer." not in k} for w in (expected, found))
        checkpoint.check_weights(expected, found, self.config.name)
        weights = {k: v.to(dtype or v.dtype).cpu().contiguous() for k, v in found.items()}
        about = {"words": self.words, "examples": self.examples}
        return checkpoint.save(folder, self.config, weights, about, overwrite=overwrite)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that stand for configuration and weights: pictures tell by them which checkpoint made them."""
        return checkpoint.fingerprint(self.config, self.parts.state_dict())

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Muse":
        """Move the networks and the language model; returns itself."""
        self.device, self.dtype = pick_device(device or self.device), dtype or self.dtype
        self.parts.to(self.device, self.dtype)
        self.encoder.to(self.device)
        return self

    def compile(self, **how: Any) -> "Muse":
        """torch.compile what draws; returns itself. It pays for many pictures: the first wait for a compiler.

        `how` goes to torch.compile. CUDA graphs, which pay for one picture at a time: mode="reduce-overhead".
        """
        decoders = [t.decoder for t in (self.low_tokenizer, self.high_tokenizer) if isinstance(t, VQGAN)]
        for part in filter(None, [self.base, self.superres, *decoders]):
            part.compile(**{"dynamic": False} | how)
        return self

    # --- inside -------------------------------------------------------------------------------------------------------

    def jobs(self, prompts: Any, n: int, seed: Any, negative: Any, sampling: dict[str, Any]) -> list[dict[str, Any]]:
        """One dict a picture: prompt, negative prompt, seed. Refuses what cannot be drawn."""
        for name in FOREIGN.keys() & sampling.keys():
            raise TypeError(f"{name} is diffusers' name; here it is {FOREIGN[name]}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not isinstance(n, Integral) or n < 1:
            raise ValueError(f"{len(prompts)} prompts, n = {n!r}; give at least one prompt and n of at least 1")
        if not all(isinstance(p, str) for p in prompts):
            raise TypeError(f"prompts {prompts!r}; give texts")
        negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts; give one, or one for each")
        total = len(prompts) * n
        seed = random.randrange(2**31) if seed is None else seed
        seeds = [int(seed) + i for i in range(total)] if isinstance(seed, Integral) else [*seed]
        if len(seeds) != total:
            raise ValueError(f"{len(seeds)} seeds for {total} pictures; give one for each, or a single number")
        self._tell_unknown_words(prompts)
        pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(n)]
        return [{"prompt": p, "negative_prompt": q, "seed": s} for (p, q), s in zip(pairs, seeds, strict=True)]

    def unfamiliar(self, prompt: str) -> str:
        """A sentence where most of a prompt's words were in no training caption, else ""."""
        words = list(dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower()))) if self.words else []
        unknown = [w for w in words if w not in self.words]
        if 2 * len(unknown) <= len(words):
            return ""
        tries = "; ".join(f'"{x}"' for x in self.examples[:3])
        return f"{self.config.name} never saw {', '.join(unknown)} in training. Try {tries}"

    def _tell_unknown_words(self, prompts: Sequence[str]) -> None:
        """One line to stderr for each unfamiliar prompt, once."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._told and (sentence := self.unfamiliar(prompt)):
                self._told.add(prompt)
                print(f"minimuse: {sentence}", file=sys.stderr)

    def contexts(self, jobs: list[dict[str, Any]]) -> tuple[Context, Context]:
        """Jobs -> their texts, and what to guide away from: nothing, or the negative prompts."""
        text = self.encoder.encode([job["prompt"] for job in jobs]).to(self.device, self.dtype)
        null = null_text(text)
        if any(job["negative_prompt"] is not None for job in jobs):
            negative = self.encoder.encode([job["negative_prompt"] or "" for job in jobs]).to(self.device, self.dtype)
            rows = [negative if job["negative_prompt"] is not None else null for job in jobs]
            null = Context.cat(Context(*(x[i : i + 1] for x in row)) for i, row in enumerate(rows))
        return text, null

    def _all_masked(self, model: Transformer, batch: int) -> Tensor:
        return torch.full((batch, model.config.tokens), model.mask_id, device=self.device)

    def finish(
        self,
        steps: Iterator[Step],
        jobs: list[dict[str, Any]],
        settings: dict[str, Any],
        watch: Callable[[Step], None] | None = None,
    ) -> list[Image.Image]:
        """Walk through the steps, showing each to `watch`; the last one's tokens -> pictures with their settings.

        JSON holds them, so of functions only that there were some: `pictures.again` then refuses.
        """
        for step in steps:
            if watch is not None:
                watch(step)
        given = {k: v for k, v in settings.items() if v is not None}
        told = {k: v for k, v in given.items() if _is_json(v)}
        functions = {"functions": sorted(given.keys() - told.keys())} if given.keys() - told.keys() else {}
        images = self.picture(step)
        for image, job in zip(images, jobs, strict=True):
            about = {"model": self.config.name, "fingerprint": self.fingerprint}
            image.info["minimuse"] = {**about, **job, **told, **functions}
        return images


def _nearest_known(tokens: Tensor, masked: Tensor) -> Tensor:
    """tokens and masked (B, N) of a square grid -> (B, N), masked places filled; with 0 where a picture knows none."""
    if not masked.any():
        return tokens
    side = math.isqrt(tokens.shape[1])
    places = torch.cartesian_prod(*[torch.arange(side, device=tokens.device, dtype=torch.float)] * 2)
    distance = torch.cdist(places, places) + masked[:, None] * 2.0 * side  # (B, N, N)
    return tokens.gather(1, distance.argmin(-1)).masked_fill(masked.all(1, keepdim=True), 0)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _settings(defaults: SamplingConfig, given: dict[str, Any]) -> tuple[Callable[[float], float], dict[str, Any]]:
    """A checkpoint's defaults and what the user gave -> guidance as a function of u, arguments for `sampler.decode`."""
    known = {f.name for f in fields(SamplingConfig)} | {"top_k", "remask"}
    if unknown := given.keys() - known:
        raise TypeError(f"unknown setting {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    values = asdict(defaults) | {k: v for k, v in given.items() if v is not None}
    if given.get("order") not in (None, defaults.order) and given.get("choice_temperature") is None:
        values["choice_temperature"] = 0.0
    return get_guidance(values.pop("guidance")), values
