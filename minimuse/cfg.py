"""Classifier-free guidance: dropping text, the guidance formula, its ramps, negative prompts (Muse 2.7).

    training: the text is removed from 10% of the examples
    sampling: l_g = (1 + t) l_c - t l_u, with t rising linearly through the steps; a negative prompt takes l_u's place

Glossary: l_c = cond, l_u = uncond, t = guidance scale (0 is no guidance), u = progress of the decoding in [0, 1].
Not here: the decoding (`sampler.py`).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from minimuse.text import Context
    from minimuse.transformer import Memory, Transformer

Guidance = float | tuple[float, float] | Callable[[float], float]


def null_text(context: "Context") -> "Context":
    """Removed text, (B, 1, D_lm): one attended zero embedding.

    Choice: the paper is silent. Not an empty softmax, which is NaN or 0 by attention backend.
    """
    embeds = context.embeds.new_zeros(len(context.embeds), 1, context.embeds.shape[2])
    return context._replace(embeds=embeds, mask=torch.ones_like(embeds[:, :, 0], dtype=torch.bool))


def drop_text(
    context: "Context", p: float, generator: torch.Generator | Sequence[torch.Generator] | None = None
) -> "Context":
    """context (B, L, D_lm) -> same shape, with the text of a share p of the examples replaced by `null_text`.

    `generator` is one, or one for each example.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"a share of {p} of the texts cannot be dropped; give 0 <= p <= 1")
    each = generator if isinstance(generator, Sequence) else [generator] * len(context.mask)
    drop = torch.cat([torch.rand(1, generator=g) < p for g in each]).to(context.mask.device)
    null = torch.zeros_like(context.mask)
    null[:, 0] = True
    embeds = torch.where(drop[:, None, None], 0, context.embeds)
    return context._replace(embeds=embeds, mask=torch.where(drop[:, None], null, context.mask))


def guide(cond: Tensor, uncond: Tensor, t: float) -> Tensor:
    """cond, uncond (B, N, V) -> guided logits (B, N, V).

    Muse 2.7: l_g = (1 + t) l_c - t l_u, written l_c + t (l_c - l_u), so that l_c = l_u gives l_c exactly.
    """
    return cond + t * (cond - uncond)


def rising(t: float, start: float = 0.0) -> Callable[[float], float]:
    """u -> guidance rising linearly from `start` to t (Muse 2.7: diversity at first, fidelity at the end)."""
    return lambda u: start + (t - start) * u


def get_guidance(guidance: Guidance) -> Callable[[float], float]:
    """A number (constant), a pair (first, last) rising linearly, or any function of u -> a function of u."""
    if callable(guidance):
        return guidance
    if isinstance(guidance, tuple | list) and len(guidance) == 2:
        return rising(float(guidance[1]), float(guidance[0]))
    if isinstance(guidance, int | float) and not isinstance(guidance, bool):
        return lambda u: float(guidance)
    raise TypeError(f"guidance {guidance!r}; give a number, a pair (first, last), or a function of u in [0, 1]")


def from_guidance_scale(s: float) -> float:
    """diffusers' guidance_scale s -> t: l_u + s (l_c - l_u) equals (1 + t) l_c - t l_u where t = s - 1."""
    return s - 1


def guided(
    model: "Transformer", cond: "Memory", uncond: "Memory", guidance: Guidance
) -> Callable[[Tensor, float], Tensor]:
    """A model and two memories -> the LogitsFn (tokens (B, N), u) -> guided logits (B, N, V).

    Both branches run as one batch of 2B; where t = 0 the second is left out. `uncond` is the memory of `null_text`, or
    of a negative prompt.
    """
    scale = get_guidance(guidance)
    both = cond.cat(uncond)

    def logits_fn(tokens: Tensor, u: float) -> Tensor:
        t = scale(u)
        if t == 0:
            return model(tokens, cond)
        return guide(*model(torch.cat([tokens, tokens]), both).chunk(2), t)

    return logits_fn
