"""The autoregressive baseline (as Parti, arXiv 2206.10789), and what all baselines share.

A baseline takes the place of Muse's base model. It has the same data, text, tokenizer and optimizer, and about as many
parameters. It draws the low-resolution picture alone, since what Muse does after it would be the same.

    model      is trained to predict                         draws                                   in steps
    masked     masked tokens: Muse's base model by itself    many tokens a step, in any order        any T
    ar         the next token, row by row                    one token a step, in that order         N
    dit        the noise in latents (`baseline_dit.py`)      all latents, less noisy at each step    any T

A new baseline is a subclass of `LowRes` with its own `configure`, `network`, `fit` and `draw`, and a line in
`cli.BASELINES`.

Glossary: B batch, N image tokens, D width, V codebook size, u progress, t guidance scale.
Not here: the diffusion baseline (`baseline_dit.py`), the comparison (`benchmarks/race.py`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minimuse import checkpoint
from minimuse.cfg import Guidance, drop_text, get_guidance, guide, guided
from minimuse.config import MuseConfig, StageConfig
from minimuse.data_sources import Source
from minimuse.editing import Callback
from minimuse.muse import Muse, sampling_settings
from minimuse.sampler import LogitsFn, SamplingConfig, Step, decode
from minimuse.text import Context, TextEncoder, pad_contexts
from minimuse.train import MuseTrainer, pick_captions
from minimuse.train_engine import Engine, EvalFn, Progress, Stage
from minimuse.transformer import Layer, Memory, Transformer, TransformerConfig, attention, init_from_codebook
from minimuse.utils import atomic_write, require
from minimuse.vqgan import VQGAN

FORMAT = "minimuse-{}-1"  # in config.json, with the name of the model
Inputs = Callable[[Tensor, list[torch.Generator]], tuple[Any, ...]]  # indices (b,), b generators -> arguments of a loss

# --- what all baselines share: a checkpoint that draws ----------------------------------------------------------------


class LowRes:
    """Muse's base model by itself: low-resolution pictures from text alone. Each baseline is a subclass.

    config: from `configure`; parts: from `build`. A Muse of the two parts reads the prompts and decodes the tokens.
    """

    model = "masked"  # its name in `minimuse train --model` and in config.json
    settings = frozenset({f.name for f in fields(SamplingConfig)} | {"top_k", "remask"})  # of `generate`

    def __init__(self, config: MuseConfig, parts: nn.ModuleDict, encoder: TextEncoder, *, examples: Sequence[str] = ()):
        self.config = config
        self.parts = parts
        self.muse = Muse(config, parts, encoder, examples=examples)

    base = property(lambda self: self.parts["base"])
    low_tokenizer = property(lambda self: self.parts["low_tokenizer"])
    examples = property(lambda self: self.muse.examples)
    fingerprint = property(lambda self: self.muse.fingerprint)
    picture = property(lambda self: self.muse.picture)  # a Step -> B images

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

    def fit(self, trainer: MuseTrainer) -> Iterator[Progress]:
        """Train the network on what the trainer has prepared."""
        init_from_codebook(self.base, self.low_tokenizer.codebook)
        return trainer.transformer("base")

    def draw(self, memories: list[Memory], guidance: Guidance, generators: Any, sampling: dict) -> Iterator[Step]:
        """Memories of the texts and of what to guide away from, a generator for each picture, settings -> Steps."""
        logits_fn = self.logits_fn(*memories, guidance)
        tokens = torch.full((len(generators), self.base.config.tokens), self.base.mask_id, device=self.muse.device)
        return decode(logits_fn, tokens, mask_id=self.base.mask_id, generator=generators, **sampling)

    def logits_fn(self, text: Memory, null: Memory, guidance: Guidance) -> LogitsFn:
        """The function that `draw` decodes with."""
        return guided(self.base, text, null, guidance)

    @classmethod
    def build(cls, config: MuseConfig) -> nn.ModuleDict:
        """Tokenizer and network with fresh weights."""
        return nn.ModuleDict({"low_tokenizer": VQGAN(config.low_tokenizer), "base": cls.network(config)})

    @torch.inference_mode()
    def decode(self, jobs: list[dict[str, Any]], **sampling: Any) -> Iterator[Step]:
        """B jobs (prompt, negative prompt, seed) -> Steps with (B, N) tokens."""
        if wrong := sorted(k for k, v in sampling.items() if v is not None and k not in self.settings):
            known = ", ".join(sorted(self.settings))
            raise TypeError(f"{self.config.name} has no setting {', '.join(wrong)}; it has {known}")
        guidance, values = sampling_settings(self.config.base_sampling, sampling)
        memories = [self.base.memory(context) for context in self.muse.contexts(jobs)]
        generators = [torch.Generator().manual_seed(job["seed"]) for job in jobs]
        for step in self.draw(memories, guidance, generators, values):
            yield step._replace(stage="base", guidance=guidance(step.u))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        batch_size: int = 16,
        callback: Callback | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """As `Muse.generate`, with the sampling settings that the baseline has."""
        images = []
        jobs = self.muse.jobs(prompts, n, seed, negative_prompt)
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            images += self.muse.to_pictures(self.decode(batch, **sampling), batch, sampling, callback)
        return images

    def steps(self, prompt: str, *, n: int = 1, seed: int | None = None, **sampling: Any) -> Iterator[Step]:
        """The Steps of `generate`, one at a time."""
        return self.decode(self.muse.jobs(prompt, n, seed), **sampling)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> Path:
        """Write config.json, model.safetensors and a model card (README.md)."""
        weights = {k: v.to(dtype or v.dtype).cpu().contiguous() for k, v in self.parts.state_dict().items()}
        load_with = f"{type(self).__module__}.{type(self).__name__}.from_pretrained"
        about = {"format": FORMAT.format(self.model), "load_with": load_with, "examples": self.examples}
        folder = checkpoint.save(folder, self.config, weights, about, overwrite=overwrite)
        card = f"# {self.config.name}\n\nA baseline for Muse by minimuse ({self.model}). It draws at low resolution.\n"
        atomic_write(folder / checkpoint.CARD, card)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device | None = None) -> Self:
        """A folder of `save_pretrained` of the same class -> the model. `device` None is cuda, then mps, then cpu."""
        config, weights, about = checkpoint.load(folder, FORMAT.format(cls.model))
        with torch.device("meta"):
            parts = cls.build(config)
        checkpoint.check_weights(parts.state_dict(), weights, folder)
        parts.load_state_dict(weights, assign=True)
        encoder = TextEncoder(config.text_encoder, max_tokens=config.text_tokens)
        return cls(config, parts.eval(), encoder, examples=about["examples"]).to(device)

    def to(self, device: str | torch.device | None = None) -> Self:
        """Move the networks and the language model. Returns itself."""
        self.muse.to(device)
        return self


# --- what all baselines share: training -------------------------------------------------------------------------------


def train_network(
    loss: nn.Module, config: StageConfig, inputs: Inputs, n: int, count: int, engine: Engine, eval_fn: EvalFn | None
) -> Iterator[Progress]:
    """Train `loss.model` on n examples. `loss` sums over a micro-batch; `count` is the number of terms of a batch."""
    loss.train()
    torch.manual_seed(engine.seed)
    job = Stage(engine, "base", config, {"model": loss}, shard=True)
    if job.first:
        yield Progress("base", job.first, config.steps, {}, loss.model)
    for step in job.steps():
        for at, generators in job.micro_batches(n, step):
            arguments = [x.to(engine.device) for x in inputs(at, generators)]
            with engine.precision():
                value = job.modules["model"](*arguments) / count
            job.backward(value, loss=value)
        metrics = job.finish(step)
        if eval_fn and (step + 1) % config.eval_every == 0:
            metrics |= eval_fn(job.modules["model"], step + 1)
        yield Progress("base", step + 1, config.steps, metrics, loss.model)
    loss.eval()


def read_texts(texts: Any, at: Tensor, generators: list[torch.Generator], p: float) -> Context:
    """One caption of each example `at`; a fraction p of them is removed (Muse 2.7)."""
    return drop_text(pad_contexts(pick_captions(texts, at, generators)), p, generators)


def train_baseline(
    make: type[LowRes], config: MuseConfig, *, data: str | Path | Source = "scenes", engine: Engine | None = None
) -> Iterator[Progress]:
    """As `train.train_muse`, for a configuration of `make.configure`. The last Progress holds the baseline."""
    engine = engine or Engine()
    with ExitStack() as stack:
        folder = engine.folder or stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
        trainer = MuseTrainer(config, data, engine, Path(folder))
        for progress in _stages(make, trainer):
            yield progress._replace(metrics=trainer.log(progress))


def _stages(make: type[LowRes], trainer: MuseTrainer) -> Iterator[Progress]:
    """Train the tokenizer, compute tokens and embeddings, train the network."""
    started = time.monotonic()
    config, engine, data = trainer.config, trainer.engine, trainer.data
    parts = trainer.parts = make.build(config)
    yield from trainer.prepare("read images", data.read())
    yield from trainer.tokenizer("low_tokenizer", parts["low_tokenizer"])
    yield from trainer.prepare("low tokens", data.tokenize("low", parts["low_tokenizer"]))
    yield from trainer.prepare("embed captions", data.embed())
    about = {"examples": data.words()["examples"]}
    torch.manual_seed(engine.seed)  # as in a resumed run
    yield from make(config, parts, trainer.encoder, **about).to(engine.device).fit(trainer)
    parts["base"] = engine.gather_full_model(parts["base"], lambda: make.network(config))
    model = make(config, parts.eval(), trainer.encoder, **about).to(engine.device)
    yield Progress("done", 1, 1, {"minutes": (time.monotonic() - started) / 60}, model)


# --- autoregression ---------------------------------------------------------------------------------------------------


class CausalLayer(Layer):
    """x (B, N, D) -> (B, N, D): Muse's layer, in which a token sees itself and the tokens before it.

    `past`, empty or [keys, values] of earlier tokens, grows by the N tokens of x: the cache.
    """

    def forward(self, x: Tensor, *memory: Tensor, past: list[Tensor] | None = None) -> Tensor:
        x = x + self.dropout(self.look_back(self.norm1(x), past))
        x = x + self.dropout(self.cross(self.norm2(x), *memory))
        return x + self.dropout(self.mlp(self.norm3(x)))

    def look_back(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """Causal self-attention of x (B, n, D) over m tokens, of which the last n are x's -> (B, n, D)."""
        q, k, v = self.attention.qkv(x).unflatten(-1, (3, self.attention.heads, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
        n, m = q.shape[2], k.shape[2]
        see = torch.ones(n, m, dtype=torch.bool, device=x.device).tril(m - n)
        return self.attention.out(attention(q, k, v, see).transpose(1, 2).flatten(2))


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
        pasts = [None] * len(self.layers) if cache is None else cache
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


def train_ar(
    model: CausalTransformer,
    config: StageConfig,
    tokens: Any,
    texts: Any,
    *,
    engine: Engine | None = None,
    eval_fn: EvalFn | None = None,
) -> Iterator[Progress]:
    """Train to predict the next token. The arguments are those of `train.train_transformer`."""

    def inputs(at: Tensor, generators: list[torch.Generator]) -> tuple[Tensor, Context]:
        return tokens[at], read_texts(texts, at, generators, config.cond_drop_prob)

    loss, count = NextTokenLoss(model, config.label_smoothing), config.batch * tokens.shape[1]
    return train_network(loss, config, inputs, len(tokens), count, engine or Engine(), eval_fn)


def cached(model: CausalTransformer, cond: Memory, uncond: Memory, guidance: Guidance) -> LogitsFn:
    """As `cfg.guided`, for one decode from all [MASK] that reveals one token a step in raster order.

    A step computes one place; the logits of all others are 0. Both branches run where t = 0 too: the cache needs them.
    """
    scale, both = get_guidance(guidance), cond.cat(uncond)
    cache: list[list[Tensor]] = [[] for _ in model.layers]

    def logits_fn(tokens: Tensor, u: float) -> Tensor:
        place = cache[0][0].shape[2] if cache[0] else 0
        known = int((tokens[0] != model.mask_id).sum())
        require(known == place, f"step {place} came with {known} known tokens; reveal one a step, in raster order")
        new = model(tokens.repeat(2, 1), both, cache)[:, 0]  # (2B, V)
        logits = new.new_zeros(*tokens.shape, new.shape[-1])
        logits[:, place] = guide(*new.chunk(2), scale(u))
        return logits

    return logits_fn


class Autoregressive(LowRes):
    """One token a step, row by row."""

    model = "ar"
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
        data, stage = trainer.data, self.config.stages["base"]
        how = {"engine": trainer.engine, "eval_fn": trainer.log.samples_of(self)}
        return train_ar(self.base, stage, data.split(data.tokens["low"]), data.split(data.texts), **how)

    def logits_fn(self, text: Memory, null: Memory, guidance: Guidance) -> LogitsFn:
        return cached(self.base, text, null, guidance)
