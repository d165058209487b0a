"""FLOPs of drawing, counted on the meta device, which has shapes but no memory."""

from functools import partial
from typing import Any, NamedTuple

import torch

from minimuse.cfg import get_guidance, guided, null_text
from minimuse.config import MuseConfig
from minimuse.sampler import SamplingConfig
from minimuse.text import Context
from minimuse.train_budget import count_flops
from minimuse.transformer import SuperRes, Transformer
from minimuse.vqgan import VQGAN

# FLOPs of one image: both memories, all steps of both models, the decoder
SamplingFlops = NamedTuple("SamplingFlops", [(name, int) for name in ("memory", "base", "superres", "decoder")])


def decode_flops(model: Transformer, how: SamplingConfig, text_tokens: int) -> tuple[int, int]:
    """FLOPs of the memories with and without text, and of all steps. A step with t = 0 has only one branch."""
    tokens = torch.zeros(1, model.config.tokens, dtype=torch.long)
    text = Context(torch.zeros(1, text_tokens, model.config.text_width), torch.ones(1, text_tokens, dtype=torch.bool))
    low = [tokens.new_zeros(1, model.config.low_grid**2)] if model.config.low_layers else []
    low += [tokens] if model.config.draft else []  # the two tokenizers that make a draft are left out
    memories: list[Any] = []
    once = count_flops(lambda: memories.extend(model.memory(c, *low) for c in (text, null_text(text))))
    logits_fn, t = guided(model, *memories, how.guidance), get_guidance(how.guidance)
    progress = [i / (how.steps - 1) if how.steps > 1 else 1.0 for i in range(how.steps)]
    costs = {t(u) != 0: count_flops(partial(logits_fn, tokens, u)) for u in {t(u) != 0: u for u in progress}.values()}
    return once, sum(costs[t(u) != 0] for u in progress)


def sampling_flops(config: MuseConfig) -> SamplingFlops:
    """One image with the configuration's defaults, without the language model."""
    with torch.device("meta"), torch.no_grad():
        base_memory, base = decode_flops(Transformer(config.base), config.base_sampling, config.text_tokens)
        model = SuperRes(config.superres)
        superres_memory, superres = decode_flops(model, config.superres_sampling, config.text_tokens)
        vqgan = VQGAN(config.finetuned_tokenizer)
        decoder = count_flops(lambda: vqgan.decode(torch.zeros(1, config.superres.tokens, dtype=torch.long)))
    return SamplingFlops(base_memory + superres_memory, base, superres, decoder)
