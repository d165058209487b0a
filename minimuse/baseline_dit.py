"""The diffusion baseline: a text-conditional DiT on the continuous latents of our VQGAN (DiT, arXiv 2212.09748).

    images --VQGAN's encoder--> z (B, d, h, w) --standardize--> x, and training asks for the noise in
    x_s = sqrt(a_s) x + sqrt(1 - a_s) e, e ~ N(0, I), s = 0 .. S-1, a_s falling from nearly 1 to nearly 0
    x_S ~ N(0, I) --DDIM, T steps--> x --standardize back, nearest codes--> tokens --VQGAN's decoder--> images

Everything around the network is Muse's own: tokenizer, frozen language model, cross-attention, guidance, training loop.
So the two differ where the papers do: what is predicted, from what it starts, and how time enters.

Deviation: DiT predicts the mean and the variance of the noise; we predict the mean, which is all that DDIM asks for.
Deviation: the head says the velocity, from which the noise follows (arXiv 2202.00512, appendix D), and the levels
fall as a cosine (arXiv 2102.09672, equation 17), not DDPM's line: 91% of 96 pictures right against 53%, where both
trained for 2,000 steps on nano's latents; with the velocity alone 75%.
Deviation: DiT is told a class, which joins the time; ours reads text by cross-attention (as PixArt, arXiv 2310.00426).

Glossary: d latent channels, p patch, N = (h / p)^2 tokens, D width, s noise step of S = 1000, a_s = alpha-bar.
Not here: the loop (`train.py`), the checkpoint that draws pictures (`baseline_ar.py`).
"""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.data_images import to_float
from minimuse.masking import Generators, uniforms
from minimuse.transformer import (
    CrossAttention,
    Memory,
    SelfAttention,
    TextLayer,
    Transformer,
    TransformerConfig,
    sinusoids,
)
from minimuse.vqgan import VQGAN

if TYPE_CHECKING:
    from minimuse.text import Context

NoiseFn = Callable[[Tensor, float, Tensor], Tensor]  # x (B, d, h, w), progress u, step s () -> the noise in x


# --- the network ------------------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), shift and scale (B, 1, D) -> (B, N, D): what is left of a norm's weights is told by the time."""
    return x * (1 + scale) + shift


class Block(nn.Module):
    """x (B, N, D), time c (B, 1, D), a layer's keys and values -> (B, N, D): adaLN-Zero (DiT 3.2).

    shift, scale and gate of self-attention and MLP are linear in the time; at the start they are 0, so that with the
    last projection of cross-attention, 0 as well, each block is the identity. `identity=False`: open gates, gates 1.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.condition = nn.Linear(config.width, 6 * config.width)
        self.attention = SelfAttention(config.width, config.heads)
        self.cross_norm, self.cross = nn.LayerNorm(config.width, bias=False), CrossAttention(config.width, config.heads)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_width, bias=False),
            nn.GELU(),
            nn.Linear(config.mlp_width, config.width, bias=False),
        )

    def forward(self, x: Tensor, c: Tensor, memory: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c).chunk(6, -1)
        x = x + gate1 * self.attention(modulate(self.norm(x), shift1, scale1))
        x = x + self.cross(self.cross_norm(x), *memory)
        return x + gate2 * self.mlp(modulate(self.norm(x), shift2, scale2))


def time_waves(step: Tensor, width: int) -> Tensor:
    """step (...) -> (..., width): cos and sin of s at frequencies from 1 down to 1/10000 (DDPM's embedding)."""
    frequency = torch.exp(-math.log(10000) * torch.arange(width // 2, device=step.device) / (width // 2))
    angle = step[..., None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class DiT(nn.Module):
    """Noisy latents x (B, d, h, w), a memory, step s (B,) or () -> the noise in them, (B, d, h, w) float32.

    e = sqrt(1 - a_s) x + sqrt(a_s) v with the velocity v from the head. So the picture, sqrt(a_s) x - sqrt(1 - a_s) v,
    is never v divided by a small number, as it would be were e the head's own: where all is noise, v is -picture.
    """

    def __init__(self, config: TransformerConfig, channels: int):
        super().__init__()
        self.config = config
        d, grid, each = config.width, config.grid, channels
        self.register_buffer("mean", torch.zeros(channels, 1, 1))  # of the encoder's output, by channel
        self.register_buffer("std", torch.ones(channels, 1, 1))
        self.inputs = nn.Linear(each, d)
        rows, columns = sinusoids(grid, d // 2), sinusoids(grid, d - d // 2)
        places = torch.cat([rows[:, None].expand(-1, grid, -1), columns[None].expand(grid, -1, -1)], -1)
        self.places = nn.Parameter(places.flatten(0, 1))  # (N, D)
        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.text = nn.Linear(config.text_width, d, bias=False)
        self.text_layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))
        self.text_norm = nn.LayerNorm(d, bias=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.condition = nn.Linear(d, 2 * d)
        self.head = nn.Linear(d, each)
        self._initialize()

    memory = Transformer.memory  # the text is read as Muse reads it

    def _initialize(self) -> None:
        """Weights at std 1/sqrt(fan in), as our Transformer's; conditions and head at zero, gates by `config.identity`."""
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for linear in (self.condition, self.head, *(block.condition for block in self.layers)):
            nn.init.zeros_(linear.weight)
        scale, d = 0.0 if self.config.identity else (2 * self.config.layers) ** -0.5, self.config.width
        for block in self.layers:
            block.cross.out.weight.data.mul_(scale)
            if not self.config.identity:
                for linear in (block.attention.out, block.mlp[2]):
                    linear.weight.data.mul_(scale)
                block.condition.bias.data.view(6, d)[[2, 5]] = 1.0

    def forward(self, x: Tensor, memory: Memory, step: Tensor) -> Tensor:
        """Noisy latents x (B, d, h, w), memory, noise level `step` (B,) or () -> the noise in x, (B, d, h, w)."""
        p, grid, dtype = self.config.patch, x.shape[-1] // self.config.patch, self.head.weight.dtype
        c = self.time(time_waves(step.expand(len(x)), self.config.width).to(dtype))[:, None]  # (B, 1, D)
        h = F.pixel_unshuffle(x.to(dtype), p).flatten(2).transpose(1, 2)  # (B, N, d p^2)
        h = self.inputs(h) + self.places  # (B, N, D)
        for block, k, v in zip(self.layers, memory.keys, memory.values, strict=True):
            h = block(h, c, (k, v, memory.attend))
        h = self.head(modulate(self.norm(h), *self.condition(c).chunk(2, -1)))  # (B, N, d p^2)
        velocity = F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (grid, grid)), p)  # (B, d, h, w)
        signal, spread = amounts(step, x.float())
        return spread * x.float() + signal * velocity.float()

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Before training: latents (n, d, h, w) -> mean and standard deviation of each channel, part of the weights."""
        self.mean.copy_(z.mean((0, 2, 3)).view_as(self.mean))
        self.std.copy_(z.std((0, 2, 3)).clamp(min=1e-6).view_as(self.std))

    def standardize(self, z: Tensor, back: bool = False) -> Tensor:
        """What the encoder gives <-> what is diffused: mean 0 and variance 1 in each channel."""
        return z * self.std + self.mean if back else (z - self.mean) / self.std


# --- noise ------------------------------------------------------------------------------------------------------------


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
    """N(0, 1) of a shape (B, ...) from CPU generators: one, or one for each image, as `masking.uniforms`."""
    return torch.special.ndtri(uniforms(*shape, generator=generator).double().clamp(1e-9, 1 - 1e-9)).float()


def add_noise(x: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """x, noise (B, d, h, w), step (B,) -> sqrt(a_s) x + sqrt(1 - a_s) e."""
    signal, spread = amounts(step, x)
    return signal * x + spread * noise


class NoiseLoss(nn.Module):
    """The noise-prediction loss (DDPM, equation 14) as one module, as `train.MaskedLoss` is.

    Deviation: weighted by 1 / a_s, that is 1 + SNR over SNR: the squared error of the velocity, which has the same size
    at every level (arXiv 2202.00512, section 4).
    """

    def __init__(self, model: DiT):
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, noise: Tensor, step: Tensor, context: "Context", count: int) -> Tensor:
        """The encoder's latents and noise (B, d, h, w), steps (B,), texts -> squared error / a_s over `count`.

        count: numbers in the whole batch, of which these may be a part; the parts' losses add up to its mean.
        """
        noisy = add_noise(self.model.standardize(z), noise, step)
        found = self.model(noisy, self.model.memory(context), step)
        signal, _ = amounts(step, noise)
        return ((found - noise) / signal).square().sum() / count


# --- sampling ---------------------------------------------------------------------------------------------------------


class Denoised(NamedTuple):
    """One step of a diffusion's sampling."""

    index: int  # 0 .. T-1
    u: float  # progress that guidance saw: index / (T - 1)
    step: int  # s that the network saw
    x: Tensor  # (B, d, h, w) after the step, less noisy
    clean: Tensor  # (B, d, h, w) the picture that the network now believes in


def ddim(noise_fn: NoiseFn, x: Tensor, *, steps: int = 50, clip: float = 5.0) -> Iterator[Denoised]:
    """Noise x ~ N(0, I) (B, d, h, w) -> a Denoised at a time; the last one's x is the sample (DDIM, arXiv 2010.02502).

    x0 = (x - sqrt(1 - a_s) e) / sqrt(a_s), x' = sqrt(a_s') x0 + sqrt(1 - a_s') e: equation 12 with eta = 0, no noise is
    added. Choice: the steps begin at S - 1, where there is noise alone ("trailing", arXiv 2305.08891); a' ends at 1.
    Choice: x0 is clipped at so many standard deviations, and e is what follows from it (ADM, arXiv 2105.05233): where
    all is noise an error of e is 20,000 times as large in x0, and guidance multiplies it again.
    """
    total = len(LEVELS)
    if not 1 <= steps <= total:
        raise ValueError(f"steps is {steps}; give a whole number from 1 to {total}")
    times = [round(total - i * total / steps) - 1 for i in range(steps)]
    levels = [LEVELS[s].item() for s in times] + [1.0]
    for i, s in enumerate(times):
        u = i / (steps - 1) if steps > 1 else 1.0
        noise = noise_fn(x, u, torch.tensor(s, device=x.device)).float()
        now, then = levels[i], levels[i + 1]
        clean = ((x - (1 - now) ** 0.5 * noise) / now**0.5).clamp(-clip, clip)
        noise = (x - now**0.5 * clean) / (1 - now) ** 0.5
        x = then**0.5 * clean + (1 - then) ** 0.5 * noise
        yield Denoised(i, u, s, x, clean)


@torch.no_grad()
def latents(vqgan: VQGAN, images: Any, batch: int = 256) -> Tensor:
    """Images (n, 3, H, W) uint8 -> what the encoder gives before quantization, (n, d, h, w) on the CPU."""
    device = vqgan.codebook.device
    parts = [torch.arange(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    return torch.cat([vqgan.encoder(to_float(images[at]).to(device)).float().cpu() for at in parts])
