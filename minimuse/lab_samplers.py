"""How others sample: presets by the names of known code bases, and a trained ranker as an order.

    settings("maskgit", n=256, codebook_size=1024, steps=12) -> what `sampler.decode` takes

Each preset says what its code does otherwise than minimuse, and what of it `decode` does not follow. Their guidance
conventions differ too; PRESETS holds the scale as Muse's t, l_g = (1 + t) l_c - t l_u.

Glossary: n tokens masked at the start, steps T, u = i / (T - 1) progress.
Not here: remasking, which is `decode(remask=True)`; guidance, which is part of the LogitsFn (`cfg.py`).
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.cfg import from_guidance_scale
from minimuse.config import StageConfig
from minimuse.lab_worlds import World
from minimuse.masking import SCHEDULES, random_mask, sample_mask_rate, uniforms
from minimuse.sampler import Order, draw
from minimuse.text import Context
from minimuse.train_engine import batch_indices, make_optimizers
from minimuse.train_engine import learning_rate as rate_at
from minimuse.transformer import Transformer


def muse(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """Muse 2.8 to the letter: cosine, the most confident first, no ranking noise."""
    return {"schedule": "cosine", "order": "confidence"}


def maskgit(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """google-research/maskgit: ranking noise 4.5 annealed to 0 by 1 - (i + 1) / T, as `decode` anneals.

    Counts are ours, which were taken from it. Once its curve leaves one token it idles to the end, where ours has kept
    one for each step: it shows with about as many steps as tokens.
    """
    return {"schedule": "cosine", "order": "confidence", "choice_temperature": 4.5}


def amused(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """huggingface/diffusers AmusedScheduler: MaskGIT with noise 2, annealed by 1 - i / (T - 1).

    Its cosine is float32: of 256 tokens in 12 steps, cos(pi / 3) leaves 127, not 128.
    """
    return {
        "schedule": lambda u: (torch.tensor(u) * math.pi / 2).cos().item(),
        "order": "confidence",
        "choice_temperature": lambda u: 2 * (1 - u),
    }


def halton(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """valeoai/Halton-MaskGIT: Halton order, no noise; the *other* arccos curve, and what is revealed is rounded down.

    Its exponent `sched_pow` is not used, and its softmax temperature multiplies the logits (1 to 1.2 sharpens).
    Not followed: it draws the revealed tokens again at every step; it starts each image elsewhere in the sequence.
    """
    return {"schedule": lambda u: 1 - math.floor(n * (1 - SCHEDULES["arccos"](u)) + 1e-6) / n, "order": "halton"}


def lucidrains(n: int, codebook_size: int, steps: int) -> dict[str, Any]:
    """lucidrains/muse-maskgit-pytorch: the sampling temperature anneals by 1 - (i + 1) / T, top-k is V / 10.

    Its steps see linspace(0, 1, T), so the last reveals a single token: T steps do the work of T - 1. It ranks by raw
    logits. With few codes it is greedy: a tenth of 8 is 1. Not followed: it may reveal none in a step.
    """
    last = max(steps - 1, 1)
    return {
        "schedule": lambda u: math.cos(math.pi / 2 * min(1.0, u * steps / last)) if u < 1 else 0.0,
        "order": lambda logits, drawn, masked, u: logits.gather(-1, drawn[..., None]).squeeze(-1),
        "sampling_temperature": lambda u: (1 - u) * (steps - 1) / steps,
        "top_k": math.ceil((1 - 0.9) * codebook_size),
    }


class Preset(NamedTuple):
    """A code base's way to sample, and its defaults."""

    settings: Callable[[int, int, int], dict[str, Any]]  # (n, codebook_size, steps) -> for `decode`
    steps: int
    guidance: float | None  # Muse's t; None: the paper gives no number


PRESETS = {
    "muse": Preset(muse, 24, None),
    "maskgit": Preset(maskgit, 12, 0.0),
    "amused": Preset(amused, 12, from_guidance_scale(10.0)),
    "halton": Preset(halton, 64, 4.0),  # its w is Muse's t
    "lucidrains": Preset(lucidrains, 18, from_guidance_scale(3.0)),
}


def settings(name: str, n: int, codebook_size: int, steps: int | None = None) -> dict[str, Any]:
    """What `decode` takes to sample n tokens as the named code base does; its own number of steps by default.

    Both temperatures are told even where they are `decode`'s defaults: those of a checkpoint must not take their place.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    steps = steps or PRESETS[name].steps
    plain = {"steps": steps, "sampling_temperature": 1.0, "choice_temperature": 0.0}
    return plain | PRESETS[name].settings(n, codebook_size, steps)


# --- a ranker as an order ---------------------------------------------------------------------------------------------


def critic(score: Callable[[Tensor], Tensor]) -> Order:
    """score: picture filled in (B, N) -> (B, N), high where a token looks real; -> an order (Token-Critic, 2209.04439).

    Any network that scores tokens fits; with `decode(remask=True)` it is Token-Critic's sampler. One more call a step.
    """
    return lambda logits, drawn, masked, u: score(drawn)


def exact_score(world: World) -> Callable[[Tensor], Tensor]:
    """log p(x_i | all other tokens), (B, N): does the token fit the rest of the picture? What a perfect ranker says.

    Choice: Token-Critic is trained to tell drawn from real tokens, whose optimum depends on the sampler; this does not.
    """
    return lambda tokens: world.leave_one_out(tokens).gather(-1, tokens[..., None]).squeeze(-1)


def learned_score(net: Transformer) -> Callable[[Tensor], Tensor]:
    """A network of `train_critic` -> its scores (B, N): the logit of the very token that stands there."""

    def score(tokens: Tensor) -> Tensor:
        nothing = torch.zeros(len(tokens), 1, net.config.text_width, device=tokens.device, dtype=net.head.weight.dtype)
        memory = net.memory(Context(nothing, torch.ones_like(nothing[..., 0], dtype=torch.bool)))
        return net(tokens, memory).gather(-1, tokens[..., None]).squeeze(-1)

    return score


def train_critic(
    base: Transformer,
    tokens: Tensor,
    texts: Context,
    *,
    steps: int = 300,
    batch: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Iterator[tuple[float, Transformer]]:
    """Real tokens (n, N) and their texts, all in float32 on one device -> (loss, network) a step; the last is trained.

    2209.04439: mask at the cosine's rates, let the frozen `base` fill in, and tell by binary cross-entropy which tokens
    are real and which drawn. Deviation: it begins as a copy of `base`, and reads no text, so that one order serves
    whatever batch; that the prompt is met stays the base model's affair.

    >>> *_, (loss, net) = train_critic(muse.base, tokens, muse.encoder.encode(captions))
    >>> base_alone = {"order": None, "remask": False}  # None: the checkpoint's
    >>> muse.generate("a red cube", order=critic(learned_score(net)), remask=True, superres=base_alone)
    """
    net, draws = copy.deepcopy(base).train().requires_grad_(True), torch.Generator().manual_seed(seed)
    config = StageConfig(steps, batch, learning_rate, warmup=max(1, steps // 20), weight_decay=0.045)
    (optimizer,), score = make_optimizers(net, config), learned_score(net)
    for step in range(steps):
        at = batch_indices(len(tokens), batch, step, seed)
        x, text = tokens[at], Context(texts.embeds[at], texts.mask[at])
        masked = random_mask(x, sample_mask_rate(len(x), generator=draws), draws)
        with torch.no_grad():
            logits = base(x.masked_fill(masked, base.mask_id), base.memory(text))
            made = draw(logits.float(), uniforms(*x.shape, generator=draws).to(x.device), 1.0)
        loss = F.binary_cross_entropy_with_logits(score(torch.where(masked, made, x)), (~masked).float())
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(config, step)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), net
    net.eval().requires_grad_(False)
