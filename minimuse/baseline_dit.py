"""The diffusion baseline: a text-conditional DiT on the continuous latents of our VQGAN (DiT, arXiv 2212.09748).

    images --VQGAN's encoder--> z (B, d, h, w) --standardize--> x; training predicts the noise in
    x_s = sqrt(a_s) x + sqrt(1 - a_s) e, e ~ N(0, I), s = 0 .. S-1, a_s falling from nearly 1 to nearly 0
    x_S ~ N(0, I) --DDIM, T steps--> x --standardize back, nearest codes--> tokens --VQGAN's decoder--> images

Deviation: DiT predicts mean and variance of the noise; we predict the mean, which is all that DDIM needs.
Deviation: the head predicts the velocity, from which the noise follows (arXiv 2202.00512, appendix D). The noise levels
follow a cosine (arXiv 2102.09672, equation 17), not DDPM's line. `benchmarks/race.md` compares them.
Deviation: DiT adds a class to the time; ours reads text by cross-attention (as PixArt, arXiv 2310.00426).

Glossary: d latent channels, p patch, N = (h / p)^2 tokens, D width, s noise step of S = 1000, a_s = alpha-bar.
Not here: what all baselines share (`baseline_ar.py`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.baseline_ar import LowRes
from minimuse.cfg import guided
from minimuse.config import MuseConfig, StageConfig
from minimuse.editing import Jobs, seeded_generators
from minimuse.muse import sampling_settings
from minimuse.sampler import Step
from minimuse.text import Context
from minimuse.train import MuseTrainer, pick_captions, train_network
from minimuse.train_engine import Progress, Stage
from minimuse.transformer import Layer, Memory, Transformer, TransformerConfig
from minimuse.utils import Generators, PositiveInt, check, require, to_float, uniforms
from minimuse.vqgan import VQGAN


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, 1, D) -> (B, N, D). They replace the weights of the norm before it."""
    return x * (1 + scale) + shift


class Block(Layer):
    """x (B, N, D), time c (B, 1, D), a layer's keys and values -> (B, N, D): adaLN-Zero (DiT 3.2)."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config.width, config.heads, config.mlp_width, config.block, config.dropout)
        self.norm1 = self.norm3 = nn.LayerNorm(config.width, elementwise_affine=False)
        self.condition = nn.Linear(config.width, 6 * config.width)

    def forward(self, x: Tensor, c: Tensor, *memory: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c).chunk(6, -1)
        x = x + gate1 * self.dropout(self.attention(modulate(self.norm1(x), shift1, scale1)))
        x = x + self.dropout(self.cross(self.norm2(x), *memory))
        return x + gate2 * self.dropout(self.mlp(modulate(self.norm3(x), shift2, scale2)))


def time_waves(step: Tensor, width: int) -> Tensor:
    """step (...) -> (..., width): cos and sin of s at frequencies from 1 down to 1/10000 (DDPM's embedding)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(width // 2, device=step.device) / (width // 2))
    angle = step[..., None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def dit_sizes(base: TransformerConfig, patch: int = 1) -> TransformerConfig:
    """Sizes of the base model -> of a DiT with about as many parameters: adaLN takes 6 D^2 a layer next to 16 D^2."""
    patch = check("patch", patch, PositiveInt)
    require(base.grid % patch == 0, f"patch is {patch}; give a divisor of the grid, {base.grid}")
    width = round(base.width * (16 / 22) ** 0.5 / (2 * base.heads)) * 2 * base.heads
    return replace(base, grid=base.grid // patch, width=width, mlp_width=4 * width)


class DiT(Transformer):
    """Noisy latents x (B, d, h, w), a memory, step s (B,) or () -> the noise in them, (B, d, h, w) float32.

    config: from `dit_sizes` with the same patch. The head's velocity v gives the noise sqrt(1 - a_s) x + sqrt(a_s) v.
    """

    def __init__(self, config: TransformerConfig, channels: int, patch: int = 1):
        super().__init__(config)
        d = config.width
        self.patch = patch
        self.register_buffer("mean", torch.zeros(channels, 1, 1))  # of the encoder's output, by channel
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.places = nn.Parameter((self.embed.rows + self.embed.columns).detach().flatten(0, 1))  # (N, D)
        del self.embed
        self.inputs = nn.Linear(channels * patch**2, d)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.layers = nn.ModuleList(Block(config) for _ in self.layers)
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.condition = nn.Linear(d, 2 * d)
        self.head = nn.Linear(d, channels * patch**2)
        for name, p in self.named_parameters():  # adaLN-Zero: conditions and head at 0, so blocks start as the identity
            if name.endswith(("bias", "cross.out.weight")) or "condition" in name or name.startswith("head"):
                nn.init.zeros_(p)
            elif name.startswith(("inputs", "time", "layers")) and p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)

    def forward(self, x: Tensor, memory: Memory, step: Tensor) -> Tensor:
        """x (B, d, h, w), noise level `step` (B,) or () -> the noise in x, (B, d, h, w) float32."""
        grid, dtype = x.shape[-1] // self.patch, self.head.weight.dtype
        c = self.time(time_waves(step.expand(len(x)), self.config.width).to(dtype))[:, None]  # (B, 1, D)
        h = F.pixel_unshuffle(x.to(dtype), self.patch).flatten(2).transpose(1, 2)  # (B, N, d p^2)
        h = self.inputs(h) + self.places  # (B, N, D)
        for block, k, v in zip(self.layers, memory.keys, memory.values, strict=True):
            h = block(h, c, k, v, memory.attend)
        h = self.head(modulate(self.norm(h), *self.condition(c).chunk(2, -1)))  # (B, N, d p^2)
        velocity = F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (grid, grid)), self.patch)  # (B, d, h, w)
        signal, spread = amounts(step, x.float())
        return spread * x.float() + signal * velocity.float()

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Before training: store mean and standard deviation of each channel of latents z (n, d, h, w)."""
        self.mean.copy_(z.mean((0, 2, 3)).view_as(self.mean))
        self.std.copy_(z.std((0, 2, 3)).clamp(min=1e-6).view_as(self.std))

    def standardize(self, z: Tensor, back: bool = False) -> Tensor:
        """The encoder's output <-> what is diffused: mean 0 and variance 1 in each channel."""
        return z * self.std + self.mean if back else (z - self.mean) / self.std


def noise_levels(steps: int = 1000) -> Tensor:
    """a_s = product over r <= s of (1 - b_r), (S,) double, close to cos^2(pi / 2 (s + 1) / S) (arXiv 2102.09672, 3.2).

    b_s = 1 - f(s + 1) / f(s), at most 0.999, with f(s) = cos^2(pi / 2 (s / S + 0.008) / 1.008): equation 17.
    """
    f = torch.cos(math.pi / 2 * (torch.linspace(0, 1, steps + 1, dtype=torch.double) + 0.008) / 1.008).square()
    return (f[1:] / f[:-1]).clamp(min=0.001).cumprod(0)


LEVELS = noise_levels()


def amounts(step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """step (B,) or () -> sqrt(a_s) of the picture and sqrt(1 - a_s) of the noise, (B, 1, 1, 1) or (1, 1, 1, 1)."""
    signal, spread = ((c.to(like))[step.to(like.device)] for c in (LEVELS.sqrt(), (1 - LEVELS).sqrt()))
    return signal.view(-1, 1, 1, 1), spread.view(-1, 1, 1, 1)


def gaussians(*shape: int, generator: Generators = None) -> Tensor:
    """N(0, 1) of a shape (B, ...) from CPU generators: one, or one for each image, as `utils.uniforms`."""
    return torch.special.ndtri(uniforms(*shape, generator=generator).double().clamp(1e-9, 1 - 1e-9)).float()


def add_noise(x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """x, noise (B, d, h, w), step (B,) -> sqrt(a_s) x + sqrt(1 - a_s) e."""
    signal, spread = amounts(step, x)
    return signal * x + spread * noise


class NoiseLoss(nn.Module):
    """The noise-prediction loss (DDPM, equation 14).

    Deviation: weighted by 1 / a_s, which makes it the squared error of the velocity (arXiv 2202.00512, section 4).
    """

    def __init__(self, model: DiT):
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, noise: Tensor, step: Tensor, context: Context) -> Tensor:
        """The encoder's latents and noise (B, d, h, w), steps (B,), texts -> sum of squared errors / a_s, ()."""
        noisy = add_noise(self.model.standardize(z), noise, step)
        found = self.model(noisy, self.model.memory(context), step)
        signal, _ = amounts(step, noise)
        return ((found - noise) / signal).square().sum()


@torch.no_grad()
def latents(vqgan: VQGAN, images: Any, batch: int = 256) -> Tensor:
    """Images (n, 3, H, W) uint8 -> the encoder's output before quantization, (n, d, h, w) on the CPU."""
    device = vqgan.codebook.device
    parts = torch.arange(len(images)).split(batch)
    return torch.cat([vqgan.encoder(to_float(images[at]).to(device)).float().cpu() for at in parts])


def train_dit(model: DiT, config: StageConfig, z: Tensor, texts: Any, **options: Any) -> Iterator[Progress]:
    """Train to predict noise in latents z (n, d, h, w). The others are as in `train.train_transformer`."""
    model.observe(z)

    def losses(job: Stage, s: int, at: Tensor, generators: list[torch.Generator]) -> dict[str, Tensor]:
        step = (uniforms(len(at), generator=generators) * len(LEVELS)).long()  # one for each example, uniform
        noise = gaussians(len(at), *z.shape[1:], generator=generators)
        context = pick_captions(texts, at, generators, config.cond_drop_prob)
        total = job.modules["model"](*(x.to(job.engine.device) for x in (z[at], noise, step, context)))
        return {"loss": total / (config.batch * z[0].numel())}

    return train_network(NoiseLoss(model), losses, config, len(z), **options)


def ddim(noise_fn: Callable[..., Tensor], x: Tensor, *, steps: int = 50) -> Iterator[tuple]:
    """Noise x ~ N(0, I) (B, d, h, w) -> T steps: u, x, estimate of the picture (DDIM, arXiv 2010.02502).

    noise_fn: x, progress u, step s () -> the noise in x.
    x0 = (x - sqrt(1 - a_s) e) / sqrt(a_s), x' = sqrt(a_s') x0 + sqrt(1 - a_s') e: equation 12 with eta = 0.
    Choice: the steps begin at S - 1, where there is only noise ("trailing", arXiv 2305.08891); a' ends at 1.
    Choice: x0 is clipped to 5 standard deviations, and e follows from it (ADM, arXiv 2105.05233).
    """
    total, steps = len(LEVELS), check("steps", steps, PositiveInt)
    require(steps <= total, f"steps is {steps}; give a whole number from 1 to {total}")
    times = [round(total - i * total / steps) - 1 for i in range(steps)]
    levels = [LEVELS[s].item() for s in times] + [1.0]
    for i, s in enumerate(times):
        u = i / (steps - 1) if steps > 1 else 1.0
        now, then = levels[i], levels[i + 1]
        noise = noise_fn(x, u, torch.tensor(s, device=x.device)).float()
        clean = ((x - (1 - now) ** 0.5 * noise) / now**0.5).clamp(-5, 5)
        noise = (x - now**0.5 * clean) / (1 - now) ** 0.5
        x = then**0.5 * clean + (1 - then) ** 0.5 * noise
        yield u, x, clean


class Diffusion(LowRes):
    """All latents at a time. The tokens of a step are the codes nearest to the network's estimate of the picture."""

    model = "dit"
    format = "minimuse-dit-1"
    settings = frozenset({"guidance", "steps"})

    @classmethod
    def configure(cls, config: MuseConfig) -> MuseConfig:
        sampling = replace(config.base_sampling, guidance=(2.0, 2.0), steps=50)
        return replace(super().configure(config), base_sampling=sampling)

    @classmethod
    def network(cls, config: MuseConfig) -> DiT:
        return DiT(dit_sizes(config.base), config.low_tokenizer.code_dim)

    def fit(self, trainer: MuseTrainer) -> Iterator[Progress]:
        """Train on the latents of the low tokenizer."""
        data, stage = trainer.data, self.config.stages["base"]
        z = latents(self.low_tokenizer, *data.columns("low_tokenizer"))
        eval_fn = trainer.log.samples("base", self.parts, self.examples, partial(self.generate, self.examples, seed=0))
        return train_dit(self.base, stage, z, data.split(data.texts), engine=trainer.engine, eval_fn=eval_fn)

    @torch.inference_mode()
    def decode_base(self, jobs: Jobs, **sampling: Any) -> Iterator[Step]:
        """B jobs -> the Steps of DDIM."""
        guidance, settings = sampling_settings(self.config.base_sampling, sampling)
        memories = [self.base.memory(context) for context in self.contexts(jobs)]

        def noise_fn(x: Tensor, u: float, step: Tensor) -> Tensor:
            return guided(partial(self.base, step=step), *memories, guidance)(x, u)

        shape = (len(self.base.mean), self.config.low_tokenizer.grid, self.config.low_tokenizer.grid)
        x = gaussians(len(jobs), *shape, generator=seeded_generators(jobs)).to(self.device)
        for i, (u, _, clean) in enumerate(ddim(noise_fn, x, steps=settings["steps"])):
            tokens = self.low_tokenizer.quantizer.nearest(self.base.standardize(clean, back=True))
            none = torch.zeros_like(tokens, dtype=torch.bool)
            yield Step(i, u, tokens, none, none, none.float(), stage="base", guidance=guidance(u))
