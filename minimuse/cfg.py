"""Classifier-free guidance: dropping text, the guidance formula, guidance schedules, negative prompts (Muse 2.7).

    training: the text is removed from 10% of the examples
    sampling: l_g = (1 + t) l_c - t l_u, with t rising linearly over the steps; a negative prompt takes the place of l_u

Glossary: l_c = cond, l_u = uncond, t = guidance scale (0 is no guidance), u = progress of the decoding in [0, 1].
Not here: the decoding (`sampler.py`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minimuse.text import Context
from minimuse.transformer import Memory, Transformer
from minimuse.utils import Fraction, Generators, check, named, uniforms

Guidance = float | tuple[float, float] | str | Callable[[float], float]


def null_text(context: Context) -> Context:
    """Removed text, (B, 1, D_lm): zeros, and no text token in the mask. `Transformer.memory` says what it means."""
    return Context(torch.zeros_like(context.embeds[:, :1]), torch.zeros_like(context.mask[:, :1]))


def drop_text(context: Context, p: float, generator: Generators = None) -> Context:
    """context (B, L, D_lm) -> same shape; each example loses its text with probability p, as in `null_text`."""
    p = check("the probability p of drop_text", p, Fraction)
    drop = (uniforms(len(context.mask), generator=generator) < p).to(context.mask.device)
    return Context(context.embeds.masked_fill(drop[:, None, None], 0), context.mask & ~drop[:, None])


def guide(cond: Tensor, uncond: Tensor, t: float) -> Tensor:
    """cond, uncond (B, N, V) -> guided logits (B, N, V), in float32: in bf16, t would multiply the rounding error.

    Muse 2.7: l_g = (1 + t) l_c - t l_u, written l_c + t (l_c - l_u), so that l_c = l_u gives exactly l_c.
    """
    cond = cond.to(torch.promote_types(cond.dtype, torch.float32))  # float64 stays
    uncond = uncond.to(cond.dtype)
    return cond + t * (cond - uncond)


def rising(t: float, start: float = 0.0) -> Callable[[float], float]:
    """u -> guidance that rises linearly from `start` to t (Muse 2.7: diversity at first, fidelity at the end)."""
    return lambda u: start + (t - start) * u


GUIDANCES: dict[str, Callable[..., Callable[[float], float]]] = {
    "constant": lambda t: rising(t, t),
    "rising": rising,
    "falling": lambda t, end=0.0: rising(end, t),
    "interval": lambda t, first=0.25, last=1.0: lambda u: t if first <= u <= last else 0.0,  # arXiv 2404.07724
    "power-cosine": lambda t, power=2.0: lambda u: t * (1 - math.cos(math.pi * u**power)) / 2,  # MDT, arXiv 2303.14389
}


def get_guidance(guidance: Guidance) -> Callable[[float], float]:
    """A number, a pair (first, last) that is linear in u, a name of GUIDANCES, or a function -> a function of u.

    A name has numbers after colons: t, then those of the function, such as "rising:4" or "interval:4:0.2:0.8".
    """
    if isinstance(guidance, str) and guidance.partition(":")[0] in GUIDANCES:
        return named("guidance", guidance, GUIDANCES)
    if callable(guidance):
        return lambda u: check(f"guidance at u = {u:.3g}", guidance(u), float)
    pair = guidance if isinstance(guidance, tuple | list) and len(guidance) == 2 else (guidance, guidance)
    expected = f"a number, a pair (first, last), a function of u, or {', '.join(GUIDANCES)} and t, such as rising:4"
    start, t = (float(check("guidance", number, float, expected)) for number in pair)
    return rising(t, start)


def guided(model: Transformer, cond: Memory, uncond: Memory, guidance: Guidance) -> Callable[[Tensor, float], Tensor]:
    """A model and two memories -> the LogitsFn (tokens (B, N), u) -> guided logits (B, N, V), in float32.

    Both branches run as one batch of 2B, only the first if t = 0. `uncond` is of `null_text` or of a negative prompt.
    """
    scale = get_guidance(guidance)
    both = cond.cat(uncond)

    def logits_fn(tokens: Tensor, u: float) -> Tensor:
        t = scale(u)
        if t == 0:
            return model(tokens, cond).float()
        return guide(*model(torch.cat([tokens, tokens]), both).chunk(2), t)

    return logits_fn
