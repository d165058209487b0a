"""Train a scoring network for Token-Critic (arXiv 2209.04439), used by notebook 13b.

    *_, (loss, net) = train_critic(muse.base, tokens, muse.encoder.encode(captions))
    settings = {"order": critic(learned_score(net)), "remask": True, "superres": {"order": None, "remask": False}}
    muse.generate("a red cube", **settings)

In an exact world, `exact_score` is the perfect score.
"""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.lab_worlds import World
from minimuse.masking import random_mask, sample_mask_rate
from minimuse.sampler import Order, draw
from minimuse.text import Context
from minimuse.transformer import Transformer
from minimuse.utils import uniforms


def critic(score: Callable[[Tensor], Tensor]) -> Order:
    """A score of tokens, (B, N) -> (B, N), high where one looks real -> an order (Token-Critic, arXiv 2209.04439)."""
    return lambda logits, drawn, masked, u: score(drawn)


def exact_score(world: World) -> Callable[[Tensor], Tensor]:
    """-> the score log p(x_i | all other tokens), (B, N): how well each token fits the others."""
    return lambda tokens: world.leave_one_out(tokens).gather(-1, tokens[..., None]).squeeze(-1)


def learned_score(net: Transformer) -> Callable[[Tensor], Tensor]:
    """A network of `train_critic` -> its score of tokens (B, N): the logit of the token at each position, (B, N)."""

    def score(tokens: Tensor) -> Tensor:
        empty = torch.zeros(len(tokens), 1, net.config.text_width, device=tokens.device, dtype=net.head.weight.dtype)
        memory = net.memory(Context(empty, torch.ones_like(empty[..., 0], dtype=torch.bool)))
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
    """Real tokens (n, N) and their texts -> (loss, network) at each step; the last network is trained.

    2209.04439: mask at the rates of the cosine, let the frozen `base` fill in, and learn by binary cross-entropy which
    tokens are real. Deviation: the network starts as a copy of `base` and reads no text, so one order fits every batch.
    """
    net = copy.deepcopy(base).train().requires_grad_(True)
    score = learned_score(net)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), learning_rate, betas=(0.9, 0.96), weight_decay=0.045)
    for _ in range(steps):
        rows = torch.randint(len(tokens), (batch,), generator=generator)
        x, text = tokens[rows], Context(texts.embeds[rows], texts.mask[rows])
        masked = random_mask(x, sample_mask_rate(len(x), generator=generator), generator)
        with torch.no_grad():
            logits = base(x.masked_fill(masked, base.mask_id), base.memory(text)).float()
            drawn = draw(logits, uniforms(*x.shape, generator=generator).to(x.device), 1.0)
        loss = F.binary_cross_entropy_with_logits(score(torch.where(masked, drawn, x)), (~masked).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), net
    net.eval().requires_grad_(False)
