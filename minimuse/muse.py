"""Muse: the whole flow on one screen (Muse, figure 3).

    prompts --text--> context --base--> low tokens --super-res--> high tokens --decoder--> pixels

Glossary: B images, N tokens, t guidance scale, u progress. Not here: training (`train.py`), files (`checkpoint.py`),
editing (`editing.py`).
"""

import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minimuse import editing
from minimuse.cfg import get_guidance, guided, null_text
from minimuse.config import FORMAT, MuseConfig
from minimuse.editing import Callback, Jobs, Seed, Steps, seeded_generators
from minimuse.sampler import SamplingConfig, Step, check_settings, decode
from minimuse.text import Context, TextEncoder
from minimuse.transformer import SuperRes, Transformer
from minimuse.utils import FloatType, OneSeed, PositiveInt, check, pick_device, pick_dtype, plain, require, to_pil
from minimuse.vqgan import VQGAN, draft_tokens


def text_encoder(config: MuseConfig, device: Any = "cpu") -> TextEncoder:
    """The language model of a configuration, none if its name is empty; `device` is that of the networks."""
    options = {"device": config.text_device or device, "dtype": getattr(torch, config.text_dtype, None)}
    return TextEncoder(config.text_encoder, max_tokens=config.text_tokens, width=config.base.text_width, **options)


def build(config: MuseConfig) -> nn.ModuleDict:
    """The four networks with fresh weights. The high tokenizer has the size of its fine-tuned decoder."""
    parts = {
        "low_tokenizer": VQGAN(config.low_tokenizer),
        "base": Transformer(config.base),
        "high_tokenizer": VQGAN(config.finetuned_tokenizer),
        "superres": SuperRes(config.superres),
    }
    return nn.ModuleDict(parts)


class Muse:
    """A text-to-image model: four networks, a frozen language model, and default settings for sampling.

    Every method that makes pictures takes, next to its own arguments:
        guidance     t: a number, a pair (first, last) that rises linearly, or a function of u; 0 is none
        steps, schedule, order, sampling_temperature, choice_temperature, top_k, remask    as in `sampler.decode`
        superres     a dict of these settings for super-resolution, such as {"steps": 4}
    They hold for the base model only; those in `superres` hold for super-resolution only. The checkpoint decides what
    you leave out. With another `order` the ranking noise is 0 unless you set it.
    """

    format = FORMAT  # in config.json; a baseline has its own format, model card, networks and guidance
    model_card = ""  # `checkpoint.MODEL_CARD`
    build = staticmethod(build)
    guided = staticmethod(guided)

    def __init__(
        self, config: MuseConfig, parts: nn.ModuleDict, encoder: TextEncoder, words: Sequence[str] = (),
        examples: Sequence[str] = (),
    ):  # fmt: skip
        self.config = config
        self.parts = parts
        self.encoder = encoder
        self.words = sorted(words)  # all words of the training captions
        self.examples = list(examples)  # prompts to try
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self._hinted: set[str] = set()

    low_tokenizer = property(lambda self: self.parts["low_tokenizer"])
    base = property(lambda self: self.parts["base"])
    high_tokenizer = property(lambda self: self.parts["high_tokenizer"])
    superres = property(lambda self: self.parts["superres"])

    def decode_base(self, jobs: Jobs, tokens: Tensor | None = None, *, generators: Any = None, **sampling) -> Steps:
        """B jobs (prompt, negative prompt, seed) -> Steps of the base model over (B, N_low) tokens (Muse 2.3, 2.8).

        `tokens` is where to start; None is all [MASK]. `generators`, one for each job, are made from the seeds if None.
        """
        return self._stage("base", jobs, (), tokens, generators or seeded_generators(jobs), sampling)

    def decode_superres(
        self, jobs: Jobs, low_tokens: Tensor, tokens: Tensor | None = None, *, generators: Any = None, **sampling
    ) -> Steps:
        """B jobs, low_tokens (B, N_low) -> Steps of super-resolution over (B, N) tokens (Muse 2.4, 2.8).

        `generators` None continue each seed where the checkpoint's base decode ends, so that low tokens of `generate`
        become the same picture again.
        """
        if generators is None:
            generators = seeded_generators(jobs)
            steps = min(self.config.base_sampling.steps, self.base.config.tokens)
            for generator in generators:
                torch.rand(steps, 2, self.base.config.tokens, generator=generator)
        return self._stage("superres", jobs, self.low_condition(low_tokens), tokens, generators, sampling)

    def low_condition(self, low_tokens: Tensor) -> tuple[Tensor, ...]:
        """Low tokens -> what `SuperRes.memory` reads besides the text: these, and the draft of a model that has one."""
        if not self.superres.config.draft:
            return (low_tokens,)
        return low_tokens, draft_tokens(self.low_tokenizer, self.high_tokenizer, low_tokens)

    @torch.inference_mode()
    def _stage(self, name: str, jobs: Jobs, condition: tuple, tokens: Any, generators: Any, sampling: dict) -> Steps:
        """`condition` is what the network reads besides the text."""
        network = self.parts[name]
        guidance, settings = sampling_settings(getattr(self.config, f"{name}_sampling"), sampling)
        cond, uncond = (network.memory(text, *condition) for text in self.contexts(jobs))
        logits_fn = self.guided(network, cond, uncond, guidance)
        if tokens is None:
            tokens = torch.full((len(jobs), network.config.tokens), network.mask_id, device=self.device)
        for step in decode(logits_fn, tokens, mask_id=network.mask_id, generator=generators, **settings):
            yield step._replace(stage=name, guidance=guidance(step.u))

    def decode(self, jobs: Jobs, *, low: Any = None, high: Any = None, superres: Any = None, **sampling) -> Steps:
        """Both stages, one after the other. `low` and `high` are the tokens to start from; None is all [MASK]."""
        generators = seeded_generators(jobs)
        superres = check_settings({} if superres is None else superres)  # now: the base model takes long
        for step in self.decode_base(jobs, low, generators=generators, **sampling):
            yield step
        yield from self.decode_superres(jobs, step.tokens, high, generators=generators, **superres)

    def generate(
        self, prompts: str | Sequence[str], *, n: int = 1, seed: Seed = None, batch_size: int = 16,
        negative_prompt: str | Sequence[str] | None = None, callback: Callback = None, **sampling,
    ) -> list[Image.Image]:  # fmt: skip
        """Prompts -> n PIL images of each, in order. Negative prompts are texts to guide away from (Muse 2.7).

        Image i draws with seed + i, or with seeds[i], and never depends on its neighbours. Its `info["minimuse"]` holds
        the settings that made it. `callback` is called with every Step.
        """
        images = []
        jobs = self.jobs(prompts, n, seed, negative_prompt)
        sampling = check_settings(sampling, superres=True)
        batch_size = check("batch_size", batch_size, PositiveInt)
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            images += self.to_pictures(self.decode(batch, **sampling), batch, sampling, callback)
        return images

    def steps(self, prompt: str, *, n: int = 1, seed: Seed = None, negative_prompt: Any = None, **sampling) -> Steps:
        """The Steps of `generate`, one at a time: tokens, masked, revealed, confidence and guidance."""
        return self.decode(self.jobs(prompt, n, seed, negative_prompt), **sampling)

    @torch.inference_mode()
    def picture(self, step: Step) -> list[Image.Image]:
        """A Step -> B images. Masked positions take the nearest revealed token; others bleed into their neighbours."""
        tokenizer = self.low_tokenizer if step.stage == "base" else self.high_tokenizer
        return to_pil(tokenizer.decode(editing.fill_with_nearest(step.tokens, step.masked)).float())

    inpaint = editing.inpaint  # functions of editing.py, whose first argument is the Muse (Muse 3.3)
    outpaint = editing.outpaint
    edit = editing.edit
    edit_steps = editing.edit_steps

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: Any = None, dtype: torch.dtype | None = None) -> "Muse":
        """A shipped name ("nano"), a folder, or a hub id -> Muse, frozen. Its language model loads at the first prompt.

        `device` None is cuda, then mps, then cpu. `dtype` None is what `pick_dtype` chooses.
        """
        from minimuse import checkpoint

        config, parts, about = checkpoint.load_networks(name, cls.build, cls.format)
        muse = cls(config, parts, text_encoder(config), **about)
        _ = muse.fingerprint  # of the stored weights, before a dtype rounds them
        device = pick_device(device)
        return muse.to(device, dtype or pick_dtype(device, sum(p.numel() for p in parts.parameters())))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
        """Write config.json, model.safetensors and a model card (README.md); `dtype` None keeps the weights' dtype.

        A published low tokenizer is named in config.json, not stored. ValueError if the weights do not fit the config.
        """
        from minimuse import checkpoint

        check("dtype", dtype or self.dtype, FloatType)
        weights = checkpoint.stored_weights(self.config, self.parts, self.build, dtype)
        about = {"format": self.format, "words": self.words, "examples": self.examples}
        about["load_with"] = f"{type(self).__module__}.{type(self).__name__}.from_pretrained"
        return checkpoint.save(folder, self.config, weights, about, card=self.model_card, overwrite=overwrite)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits for configuration and weights. Pictures carry it to say which checkpoint made them."""
        from minimuse.checkpoint import fingerprint

        return fingerprint(self.config, self.parts.state_dict())

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Muse":
        """Move the networks and the language model; returns itself."""
        self.dtype = check("dtype", dtype or self.dtype, FloatType)
        self.device = pick_device(device or self.device)
        self.parts.to(self.device, self.dtype)
        self.encoder.to(self.config.text_device or self.device)
        return self

    def jobs(self, prompts: Any, n: int = 1, seed: Seed = None, negative: Any = None) -> Jobs:
        """Arguments of `generate` -> one dict for each picture: prompt, negative prompt, seed."""
        prompts = [prompts] if isinstance(prompts, str) else check("prompts", prompts, tuple[str, ...])
        n = check("n", n, PositiveInt)
        total = len(prompts) * n
        require(0 < total <= 100_000, f"{len(prompts)} prompts, n is {n}; give 1 to 100000 pictures in one call")
        negatives = negative if isinstance(negative, list | tuple) else [negative] * len(prompts)
        negatives = [None if text is None else check("negative_prompt", text, str) for text in negatives]
        require(len(negatives) == len(prompts), f"{len(negatives)} negative prompts; give one, or {len(prompts)}")
        if not isinstance(seed, list | tuple | range) and not getattr(seed, "ndim", 0):
            first = check("seed", random.randrange(2**31) if seed is None else seed, OneSeed)
            seed = range(first, first + total)
        seeds = [check("seed", number, OneSeed) for number in seed]
        require(len(seeds) == total, f"{len(seeds)} seeds for {total} pictures; give one, or {total}")
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._hinted and (hint := self.unfamiliar(prompt)):
                print(f"minimuse: {hint}", file=sys.stderr)
            self._hinted.add(prompt)
        pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(n)]
        return [{"prompt": p, "negative_prompt": q, "seed": s} for (p, q), s in zip(pairs, seeds, strict=True)]

    def unfamiliar(self, prompt: str) -> str:
        """A hint if most words of the prompt are in no training caption, else ""."""
        if prompt and not self.config.text_encoder:
            return f'{self.config.name} has no captions: prompts change nothing. Generate, inpaint or outpaint with ""'
        words = dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower()))
        unknown = [word for word in words if word not in self.words]
        if not self.words or 2 * len(unknown) <= len(words):
            return ""
        return f"{self.config.name} never saw {', '.join(unknown)[:300]} in training. Try one of {self.examples[:3]}"

    def contexts(self, jobs: Jobs) -> tuple[Context, Context]:
        """Jobs -> their texts, and what to guide away from: removed text or negative prompts (Muse 2.7)."""
        text = self.encoder.encode([job["prompt"] for job in jobs]).to(self.device, self.dtype)
        null = null_text(text)
        if any(job["negative_prompt"] is not None for job in jobs):
            negative = self.encoder.encode([job["negative_prompt"] or "" for job in jobs]).to(self.device, self.dtype)
            rows = [negative if job["negative_prompt"] is not None else null for job in jobs]
            null = Context.cat(Context(*(x[i : i + 1] for x in row)) for i, row in enumerate(rows))
        return text, null

    def to_pictures(self, steps: Steps, jobs: Jobs, settings: dict, callback: Callback = None) -> list[Image.Image]:
        """Run the decode to its end, then decode the last tokens. Each image's info holds its job and the settings."""
        require(callback is None or callable(callback), f"callback is {callback!r}; give a function of a Step")
        for step in steps:
            if callback is not None:
                callback(step)
        settings = {k: plain(v) for k, v in settings.items() if v is not None}
        images = self.picture(step)
        for image, job in zip(images, jobs, strict=True):
            image.info["minimuse"] = {"model": self.config.name, "fingerprint": self.fingerprint, **job, **settings}
        return images


def sampling_settings(defaults: SamplingConfig, given: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """A checkpoint's defaults, the user's settings -> guidance as a function of u, arguments for `sampler.decode`."""
    given = check_settings(given)
    settings = asdict(defaults) | given
    if given.get("order") not in (None, defaults.order) and given.get("choice_temperature") is None:
        settings["choice_temperature"] = 0.0
    return get_guidance(settings.pop("guidance")), settings
