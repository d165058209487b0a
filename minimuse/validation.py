"""Held-out losses of a masked transformer, by mask rate, beside what they can be measured against.

    loss@r       masked cross-entropy with about a share r masked: it falls with r, since more context is seen
    unigram      entropy of the tokens' histogram: what a model pays that knows how common each token is and no more
    bound        an upper bound on -log p of all tokens, the mean over uniform counts (D3PM; `masking.likelihood_bound`)

All in nats a token. Not here: what healthy figures look like (`train_doctor.py`), accuracy of pictures.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minimuse.masking import random_mask
from minimuse.text import pad_contexts
from minimuse.train_engine import Engine, generator

STRATA = 8  # counts of masked tokens that the bound averages over, one from each eighth of 1..N
RATES = (0.1, 0.3, 0.5, 0.7, 0.9)  # the middle of five buckets of mask rates
TOKENS = 2**16  # Choice: of 64 pictures at 32 x 32 tokens; a look took 160 s there before, at 256 pictures


@contextmanager
def eval_mode(*modules: nn.Module):
    """Modules in eval mode without gradients, each part's own mode given back afterwards."""
    before = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for m, training in before:
            m.training = training


def unigram_entropy(tokens: Tensor, codebook_size: int) -> float:
    """tokens (n, N) -> entropy of their histogram in nats: the loss of the best guess without any context."""
    p = torch.bincount(tokens.flatten(), minlength=codebook_size).double() / tokens.numel()
    return -torch.special.xlogy(p, p).sum().item()


def validate(
    loss: Callable[..., tuple[Tensor, Tensor]],
    tokens: Any,
    texts: Any,
    low_tokens: Any = None,
    *,
    codebook_size: int,
    engine: Engine | None = None,
    most: int = 256,
    batch: int = 64,
    strata: int = STRATA,
) -> dict[str, float]:
    """Held-out rows -> {"loss@0.1": ..., ..., "accuracy@0.9": ..., "bound": ..., "unigram": ...}.

    loss is a `train.MaskedLoss`, wrapped by an engine or not. The masks are functions of the example, so that the
    figures of two moments differ by the model alone. The first caption is read. The bound is the mean over so many
    `strata`; 0 leaves it out. At most TOKENS tokens are read, so that a look costs the same at any size of picture.
    """
    engine, n = engine or Engine(), min(most, len(tokens), max(1, TOKENS // tokens.shape[1]))
    totals: dict[str, float] = {}
    for start in range(0, n, batch):
        at = torch.arange(start, min(start + batch, n))
        x, low = tokens[at], None if low_tokens is None else low_tokens[at].to(engine.device)
        said = texts.pick(at, [0.0] * len(at))
        context = pad_contexts([text.float() for text in said]).to(engine.device)
        for names, masked in _masks(x, at, strata):
            with eval_mode(loss), engine.precision():
                pair = loss(x.to(engine.device), masked.to(engine.device), context, low, int(masked.sum()))
            for name, value in zip(names, pair, strict=True):
                totals[name] = totals.get(name, 0.0) + float(value) * len(at) / n
    bounds = [totals.pop(f"bound{k}") for k in range(strata)]
    figures = {k: v for k, v in totals.items() if not k.startswith("_")}
    figures |= {"bound": sum(bounds) / strata} if strata else {}
    return figures | {"unigram": unigram_entropy(tokens[torch.arange(n)], codebook_size)}


def _masks(x: Tensor, at: Tensor, strata: int) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Tokens (B, N) of examples `at` -> names of loss and accuracy under a mask, and the mask (B, N).

    For the bound all rows of a batch have the same count, one of each stratum of 1..N: then the mean over the masked
    tokens of the batch is the mean of the rows' means, whose mean over uniform counts the bound is.
    """
    n = x.shape[1]
    for k, rate in enumerate(RATES):
        draws = [generator(k, i) for i in at.tolist()]
        rates = torch.stack([rate + 0.2 * (torch.rand((), generator=g) - 0.5) for g in draws])
        yield (f"loss@{rate}", f"accuracy@{rate}"), random_mask(x, rates, draws)
    for k in range(strata):
        draws = [generator(len(RATES) + k, i) for i in at.tolist()]
        u = torch.rand((), generator=draws[0]).item()
        count = min(n, int((k + u) / strata * n) + 1)
        yield (f"bound{k}", f"_{k}"), random_mask(x, torch.full((len(x),), count / n), draws)
