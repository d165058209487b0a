"""The autoregressive baseline (as Parti, arXiv 2206.10789), and what all baselines share.

A baseline replaces Muse's base model, and draws only the low-resolution picture. It has the same data, text, tokenizer
and optimizer, and about as many parameters.

    model      is trained to predict                         draws                                   in steps
    masked     masked tokens: Muse's base model by itself    many tokens a step, in any order        any T
    ar         the next token, row by row                    one token a step, in that order         N
    dit        the noise in latents (`baseline_dit.py`)      all latents, less noisy at each step    any T

A new baseline is a subclass of `LowRes` with its own `configure`, `network`, `fit` and `decode_base`, and a name in
`cli.py`, `cli_commands.baseline` and `cli_commands.model_class`.

B batch, N image tokens, D width, V codebook size, u progress, t guidance scale.
Not here: the diffusion baseline (`baseline_dit.py`), the comparison (`benchmarks/race.py`).
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.cfg import Guidance, get_guidance, guide
from minimuse.config import MuseConfig, StageConfig
from minimuse.editing import Jobs
from minimuse.muse import Muse
from minimuse.sampler import LogitsFn, SamplingConfig, Step
from minimuse.text import Context
from minimuse.train import MuseTrainer, pick_captions, train_network
from minimuse.train_engine import Progress, Stage, init_from_codebook
from minimuse.transformer import Layer, Memory, Transformer, TransformerConfig, attention
from minimuse.utils import require
from minimuse.vqgan import VQGAN


class LowRes(Muse):
    """Muse's base model by itself. Each baseline is a subclass. config: from `configure`; parts: from `build`."""

    model = "masked"  # its name in `minimuse train --model`
    format = "minimuse-masked-1"
    model_card = "# {name}\n\nA baseline for Muse by minimuse ({format}). It draws at low resolution.\n"
    settings = frozenset({f.name for f in fields(SamplingConfig)} | {"top_k", "remask"})  # of `generate`

    @classmethod
    def configure(cls, config: MuseConfig) -> MuseConfig:
        """A Muse's configuration -> this model's: its name, two of the five stages, its sampling."""
        foreign = config.low_tokenizer_from
        require(not foreign, f"low_tokenizer_from is {foreign!r}; a baseline trains its own tokenizer: give ''")
        stages = {name: config.stages[name] for name in ("low_tokenizer", "base") if name in config.stages}
        return replace(config, name=f"{config.name}-{cls.model}", stages=stages)

    @classmethod
    def network(cls, config: MuseConfig) -> nn.Module:
        """The network with fresh weights. It has a method `memory(context)`."""
        return Transformer(config.base)

    @classmethod
    def build(cls, config: MuseConfig) -> nn.ModuleDict:
        """Tokenizer and network with fresh weights."""
        return nn.ModuleDict({"low_tokenizer": VQGAN(config.low_tokenizer), "base": cls.network(config)})

    def fit(self, trainer: MuseTrainer) -> Iterator[Progress]:
        """Train the network on what the trainer has prepared."""
        return trainer.transformer("base", self.low_tokenizer.codebook)

    def decode(self, jobs: Jobs, **sampling: Any) -> Iterator[Step]:
        """B jobs (prompt, negative prompt, seed) -> Steps with (B, N) tokens."""
        if wrong := sorted(k for k, v in sampling.items() if v is not None and k not in self.settings):
            known = ", ".join(sorted(self.settings))
            raise TypeError(f"{self.config.name} has no setting {', '.join(wrong)}; it has {known}")
        return self.decode_base(jobs, **sampling)

    def refuse(self, *_: Any, **__: Any) -> Any:
        """In place of what needs super-resolution: TypeError."""
        raise TypeError(f"{self.config.name} is a {self.model} baseline: it only generates; edit with a whole Muse")

    inpaint = outpaint = edit = edit_steps = decode_superres = refuse

    @classmethod
    def stages(cls, trainer: MuseTrainer) -> Iterator[Progress]:
        """The stages of `train.train_muse`: train the tokenizer, compute tokens and embeddings, train the network."""
        config, engine = trainer.config, trainer.engine
        parts = trainer.parts = cls.build(config)
        yield from trainer.before_base()
        words = trainer.data.words()
        torch.manual_seed(engine.seed)  # as in a resumed run
        yield from cls(config, parts, trainer.encoder, **words).to(engine.device).fit(trainer)
        parts["base"] = engine.gather_full_model(parts["base"], lambda: cls.network(config))
        yield Progress("all", 1, 1, {}, cls(config, parts.eval(), trainer.encoder, **words).to(engine.device))


class CausalLayer(Layer):
    """x (B, N, D) -> (B, N, D): Muse's layer, in which a token sees itself and the tokens before it.

    `past`, empty or [keys, values] of earlier tokens, grows by the N tokens of x: the cache.
    """

    def forward(self, x: Tensor, *memory: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """x and the keys, values and mask of cross-attention -> (B, N, D)."""
        qkv = self.attention.qkv(self.norm1(x)).unflatten(-1, (3, self.attention.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        if past is not None:
            k, v = past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
        n, m = q.shape[2], k.shape[2]
        see = torch.ones(n, m, dtype=torch.bool, device=x.device).tril(m - n)
        x = x + self.dropout(self.attention.out(attention(q, k, v, see).transpose(1, 2).flatten(2)))
        x = x + self.dropout(self.cross(self.norm2(x), *memory))
        return x + self.dropout(self.mlp(self.norm3(x)))


class CausalTransformer(Transformer):
    """tokens (B, N), memory -> logits (B, N, V); those of place i follow from the tokens before it."""

    def __init__(self, config: TransformerConfig):
        require(not config.block, f"block is {config.block}; causal attention is not multi-axis: give block=0")
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            self.layers[i] = CausalLayer(config.width, config.heads, config.mlp_width, 0, config.dropout)
            self.layers[i].load_state_dict(layer.state_dict())

    def forward(self, tokens: Tensor, memory: Memory, cache: list[list[Tensor]] | None = None) -> Tensor:
        """tokens (B, N) -> logits (B, N, V). The first place sees [MASK] and the text.

        cache: an empty list for each layer at first. Each call then gives the logits of one more place, (B, 1, V).
        """
        x = self.embed(F.pad(tokens, (1, -1), value=self.mask_id))  # (B, N, D): place i holds token i - 1
        if cache is not None:
            place = cache[0][0].shape[2] if cache[0] else 0
            x = x[:, place : place + 1]
        pasts = cache or [None] * len(self.layers)
        for layer, k, v, past in zip(self.layers, memory.keys, memory.values, pasts, strict=True):
            x = layer(x, k, v, memory.attend, past=past)
        return self.head(self.norm(x))


class NextTokenLoss(nn.Module):
    """tokens x (B, N), texts -> -log p(x) by the chain rule, in nats, summed over all tokens."""

    def __init__(self, model: CausalTransformer, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, context: Context) -> Tensor:
        logits = self.model(x, self.model.memory(context)).flatten(0, 1).float()
        return F.cross_entropy(logits, x.flatten(), reduction="sum", label_smoothing=self.label_smoothing)


def train_ar(model: nn.Module, config: StageConfig, tokens: Any, texts: Any, **options: Any) -> Iterator[Progress]:
    """Train to predict the next token. The arguments are those of `train.train_transformer`."""

    def losses(job: Stage, step: int, at: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        x = tokens[at].to(job.engine.device)
        context = pick_captions(texts, at, generators, config.cond_drop_prob)
        total = job.modules["model"](x, context.to(job.engine.device))
        return {"loss": total / (config.batch * x.shape[1])}

    return train_network(NextTokenLoss(model, config.label_smoothing), losses, config, len(tokens), **options)


def cached(model: CausalTransformer, cond: Memory, uncond: Memory, guidance: Guidance) -> LogitsFn:
    """As `cfg.guided`, for one decode from all [MASK] that reveals one token a step in raster order.

    A step computes one place; the logits of all others are 0. Both branches run where t = 0 too: the cache needs them.
    """
    scale, both = get_guidance(guidance), cond.cat(uncond)
    cache: list[list[Tensor]] = [[] for _ in model.layers]

    def logits_fn(tokens: Tensor, u: float) -> Tensor:
        place = cache[0][0].shape[2] if cache[0] else 0
        masked = torch.arange(tokens.shape[1], device=tokens.device) >= place
        right = (tokens == model.mask_id).equal(masked.expand_as(tokens))
        require(right, f"not only the first {place} tokens are known; reveal one token a step, in raster order")
        new = model(tokens.repeat(2, 1), both, cache)[:, 0]  # (2B, V)
        logits = new.new_zeros(*tokens.shape, new.shape[-1], dtype=torch.float)
        logits[:, place] = guide(*new.chunk(2), scale(u))
        return logits

    return logits_fn


class Autoregressive(LowRes):
    """One token a step, row by row."""

    model = "ar"
    format = "minimuse-ar-1"
    guided = staticmethod(cached)
    settings = frozenset({"guidance", "sampling_temperature", "top_k"})

    @classmethod
    def configure(cls, config: MuseConfig) -> MuseConfig:
        one_by_one = {"steps": config.base.tokens, "order": "raster", "choice_temperature": 0.0}
        sampling = replace(config.base_sampling, guidance=(1.0, 1.0), **one_by_one)
        return replace(super().configure(config), base_sampling=sampling)

    @classmethod
    def network(cls, config: MuseConfig) -> CausalTransformer:
        return CausalTransformer(config.base)

    def fit(self, trainer: MuseTrainer) -> Iterator[Progress]:
        init_from_codebook(self.base, self.low_tokenizer.codebook)
        eval_fn = trainer.log.samples("base", self.parts, self.examples, partial(self.generate, self.examples, seed=0))
        options = {"engine": trainer.engine, "eval_fn": eval_fn}
        return train_ar(self.base, self.config.stages["base"], *trainer.data.columns("base"), **options)
