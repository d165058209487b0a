"""Muse's rivals in its own house: autoregression and diffusion in the base model's place, and the base model alone.

    config.model   trained to                              draws                                   in steps
    "masked"    predict masked tokens (Muse 2.3)        many tokens at a time, the surest first any T
    "ar"        predict the next token (as Parti)       one token at a time, row by row         N, no fewer
    "dit"       predict noise in latents (`baseline_dit.py`)     all latents at a time, ever less noisy  any T

The same data, text, tokenizer, training loop, and as many parameters (`config.rival`); all draw the low-resolution
picture, since what Muse does after it is the same for all three. Each step shows tokens, so films and `minimuse
generate` work.

Not here: their training (`train.py`), the race (`benchmarks/race.py`).
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from minimuse.baseline_dit import ddim, gaussians
from minimuse.cfg import Guidance, get_guidance, guide, guided
from minimuse.muse import Muse, sampling_settings
from minimuse.sampler import LogitsFn, SamplingConfig, Step, decode
from minimuse.transformer import Memory, Transformer


def cached(model: Transformer, cond: Memory, uncond: Memory, guidance: Guidance) -> LogitsFn:
    """As `config.guided`, of a causal model whose tokens come one a step in raster order: keys and values are kept.

    A step then costs one place, not N. The logits of all other places are 0. Both branches run where t = 0 too, since
    a later step may need what they keep. For one decode from all [MASK]; begin another with another one.
    """
    scale, both, past = get_guidance(guidance), cond.cat(uncond), [[] for _ in model.layers]

    def logits_fn(tokens: Tensor, u: float) -> Tensor:
        at = len(past[0][0][0, 0]) if past[0] else 0  # the place that is drawn now
        new = model(tokens[:, : at + 1].repeat(2, 1), both, past)  # (2B, 1, V)
        logits = new.new_zeros(*tokens.shape, new.shape[-1])
        logits[:, at] = guide(*new[:, 0].chunk(2), scale(u))
        return logits

    return logits_fn


KNOWN = {
    "masked": {"guidance", *(f.name for f in fields(SamplingConfig)), "top_k"},
    "ar": {"guidance", "sampling_temperature", "top_k"},
    "dit": {"guidance", "steps"},
}


class LowRes(Muse):
    """The low-resolution stage alone, by a rival: generates as `Muse` does, pictures of the low tokenizer's size.

    Settings that mean nothing to a model are refused: KNOWN says which it is told.
    """

    @torch.inference_mode()
    def decode(self, jobs: list[dict[str, Any]], **sampling: Any) -> Iterator[Step]:
        """B jobs (prompt, negative prompt, seed) -> Steps, each with the tokens so far."""
        if wrong := sorted(k for k in sampling if sampling[k] is not None and k not in KNOWN[self.config.model]):
            known = ", ".join(sorted(KNOWN[self.config.model]))
            raise TypeError(f"{', '.join(wrong)} means nothing to {self.config.name}, which is told {known}")
        draws = [torch.Generator().manual_seed(job["seed"]) for job in jobs]
        t, how = sampling_settings(self.config.base_sampling, sampling)
        memories = [self.base.memory(context) for context in self.contexts(jobs)]
        if self.config.model == "dit":
            steps = self._denoise(guided(self.base, *memories, t), draws, how["steps"])
        else:
            logits_fn = (guided if self.config.model == "masked" else cached)(self.base, *memories, t)
            tokens = self._all_masked(self.base, len(jobs))
            if self.config.model == "ar":
                how |= {"steps": tokens.shape[1], "order": "raster", "choice_temperature": 0.0}
            steps = decode(logits_fn, tokens, mask_id=self.base.mask_id, generator=draws, **how)
        for step in steps:
            yield step._replace(stage="base", guidance=t(step.u))

    def _denoise(self, noise_fn: Any, draws: list[torch.Generator], steps: int) -> Iterator[Step]:
        """DDIM; the tokens of a step are the codes nearest to the picture that the network then believes in."""
        grid = self.config.low_tokenizer.grid
        x = gaussians(len(draws), len(self.base.mean), grid, grid, generator=draws).to(self.device)
        for d in ddim(noise_fn, x, steps=steps):
            tokens = self.low_tokenizer.quantizer.nearest(self.base.standardize(d.clean, back=True))
            none = torch.zeros_like(tokens, dtype=torch.bool)
            yield Step(d.index, d.u, tokens, none, none, none.float())

    def _from_text_alone(self, *args: Any, **settings: Any) -> NoReturn:
        raise TypeError(f"{self.config.name} draws low-resolution pictures from text alone; editing needs a whole Muse")

    inpaint = outpaint = edit = edit_steps = _from_text_alone
