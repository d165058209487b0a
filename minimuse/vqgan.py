"""VQGAN: images <-> tokens (Muse 2.2, A.2; VQGAN, arXiv 2012.09841).

    images (B, 3, H, W) --Encoder--> z (B, d, h, w) --VectorQuantizer--> tokens (B, h*w) --codebook, Decoder--> images

Every layer is a convolution: Muse removes VQGAN's attention block, so that any image size works.
Glossary: f = downsampling, V = codebook_size, d = code_dim, h = H / f, w = W / f.
Not here: the losses (`vqgan_loss.py`), the training loop (`train.py`).
"""

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.utils import Checked, Depth, Size, require, require_multiple

GROUP = 16  # channels per normalization group: fixed, so that a wider layer keeps the groups of a narrower one
PATIENCE = 20  # optimizer steps without use after which a code restarts


@dataclass(frozen=True)
class VQGANConfig(Checked):
    """A tokenizer (Muse 2.2, A.2). Each tuple has one number per resolution, from full size down to size / f."""

    image_size: Size  # side of the training images in pixels; any multiple of f works
    codebook_size: Size  # V; in the paper, more than 8192 codes did not help
    code_dim: Size  # d
    width: Size  # channels at full size; `multipliers` scale it below
    multipliers: tuple[Size, ...]  # f = 2 ** (len(multipliers) - 1)
    blocks: tuple[Depth, ...]  # residual blocks of the encoder; 0 at full size saves most of a CPU's time
    decoder_width: Size  # the fine-tuned decoder (Muse 2.5) differs only in these two
    decoder_blocks: tuple[Depth, ...]

    @property
    def downsampling(self) -> int:
        """f."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.downsampling

    def __post_init__(self):
        super().__post_init__()
        fits = len(self.multipliers) == len(self.blocks) == len(self.decoder_blocks) > 0
        require(fits, "VQGANConfig: give one multiplier, one number of blocks and of decoder_blocks per resolution")
        require_multiple(self, "width", GROUP)
        require_multiple(self, "decoder_width", GROUP)
        require_multiple(self, "image_size", self.downsampling)


class ResBlock(nn.Module):
    """x (B, C, h, w) -> x + conv(conv(x)), same shape. Starts as the identity: the last convolution is zero."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(channels // GROUP, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(channels // GROUP, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class Encoder(nn.Module):
    """images (B, 3, H, W) -> z (B, d, H/f, W/f): residual blocks at each resolution, strided convolutions between."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for level, (width, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            if level > 0:
                layers.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
            layers += [ResBlock(width) for _ in range(blocks)]
        layers += [nn.GroupNorm(width // GROUP, width), nn.SiLU(), nn.Conv2d(width, config.code_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def up_block(c_in: int, c_out: int | None, blocks: int) -> nn.Sequential:
    """x (B, C_in, h, w) -> (B, C_out, 2h, 2w): residual blocks, then 2x upsampling, unless `c_out` is None."""
    layers = {"blocks": nn.Sequential(*(ResBlock(c_in) for _ in range(blocks)))}
    if c_out:  # Choice: 1x1 and pixel shuffle, cheap and learned
        layers |= {"up": nn.Conv2d(c_in, 4 * c_out, 1), "shuffle": nn.PixelShuffle(2)}
    return nn.Sequential(OrderedDict(layers))


class Decoder(nn.Module):
    """codes (B, d, h, w) -> images (B, 3, H, W): the mirror of the encoder, with its own width and depths."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.decoder_width * m for m in config.multipliers][::-1]  # from the coarsest resolution up
        levels = zip(widths, [*widths[1:], None], config.decoder_blocks[::-1], strict=True)
        self.conv_in = nn.Conv2d(config.code_dim, widths[0], 3, padding=1)
        self.levels = nn.Sequential(*(up_block(*level) for level in levels))
        self.norm = nn.GroupNorm(widths[-1] // GROUP, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.levels(self.conv_in(codes))
        return self.conv_out(F.silu(self.norm(x)))


class Quantized(NamedTuple):
    codes: Tensor  # (B, d, h, w), the gradient passed straight through to z
    tokens: Tensor  # (B, h*w)
    codebook_loss: Tensor  # () moves codes towards the encoder
    commitment_loss: Tensor  # () keeps the encoder near its codes
    z: Tensor  # (B, d, h, w) without gradient, for `restart_dead_codes`


class VectorQuantizer(nn.Module):
    """z (B, d, h, w) -> the nearest codes of a learned codebook (VQGAN 3.1)."""

    def __init__(self, codebook_size: int, code_dim: int):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def embed_code(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, h*w) -> codes (B, d, h, w)."""
        return F.embedding(tokens, self.codebook).transpose(1, 2).unflatten(2, grid).contiguous()

    def nearest(self, z: Tensor) -> Tensor:
        """z (B, d, h, w) -> tokens (B, h*w): argmin_k |z - e_k|^2 = argmin_k |e_k|^2 - 2 z.e_k."""
        flat = z.flatten(2).transpose(1, 2).float()  # (B, h*w, d)
        book = self.codebook.float()
        return torch.addmm(book.square().sum(1), flat.flatten(0, 1), book.T, alpha=-2).argmin(1).view(flat.shape[:2])

    def forward(self, z: Tensor) -> Quantized:
        """z (B, d, h, w) -> Quantized."""
        z = z.float()
        tokens = self.nearest(z.detach())
        codes = self.embed_code(tokens, z.shape[2:])
        codebook_loss = F.mse_loss(codes, z.detach())
        commitment_loss = F.mse_loss(z, codes.detach())
        straight_through = z + (codes - z).detach()  # the value is `codes`, the gradient with respect to z is 1
        return Quantized(straight_through, tokens, codebook_loss, commitment_loss, z.detach())

    def new_idle_counts(self) -> Tensor:
        """Counts for `restart_dead_codes`, (V,). At first, all codes count as dead, so the first batch places them."""
        return torch.full((len(self.codebook),), PATIENCE, device=self.codebook.device)

    @torch.no_grad()
    def restart_dead_codes(
        self, z: Tensor, tokens: Tensor, idle: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Once per optimizer step, dead codes become random encoder outputs. A frozen codebook stays as it is.

        z (B, d, h, w), tokens (B, h*w): of the whole batch. idle (V,): steps since a code was last used, counted in
        place. Choice: a code that was not used for PATIENCE steps is dead.
        """
        if not self.codebook.requires_grad:
            return
        dead = (idle >= PATIENCE).nonzero().squeeze(1)
        flat = z.transpose(0, 1).flatten(1).T  # (B*h*w, d)
        chosen = torch.randint(len(flat), (len(dead),), generator=generator)
        self.codebook[dead] = flat[chosen.to(flat.device)]
        idle.add_(1)
        idle[tokens.flatten()] = 0
        idle[dead] = 0


class VQGAN(nn.Module):
    """A tokenizer: `encode` images to tokens, `decode` tokens to images. `forward` is for training."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.downsampling = config.downsampling
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = VectorQuantizer(config.codebook_size, config.code_dim)

    @property
    def codebook(self) -> Tensor:
        """(V, d)."""
        return self.quantizer.codebook

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> tokens (B, h*w) long; H and W are any multiples of f."""
        f = self.downsampling
        ok = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] % f == images.shape[3] % f == 0
        ok = ok and images.is_floating_point() and images.numel() > 0
        require(ok, f"images {tuple(images.shape)} of {images.dtype}; give floats (B, 3, H, W), multiples of {f}")
        return self.quantizer.nearest(self.encoder(images))

    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """tokens (B, h*w) -> images (B, 3, H, W) in [-1, 1]; a square, unless `grid` gives (h, w)."""
        ok = tokens.ndim == 2 and tokens.dtype == torch.long and tokens.numel() > 0
        ok = ok and (tokens.device.type != "cpu" or bool(((tokens >= 0) & (tokens < self.codebook_size)).all()))
        require(ok, f"tokens {tuple(tokens.shape)} of {tokens.dtype}; give (B, N) long, 0 to {self.codebook_size - 1}")
        n = tokens.shape[1]
        h, w = grid or (math.isqrt(n), math.isqrt(n))
        require(h * w == n, f"{n} tokens do not fill a grid of {h} x {w}; pass grid=(h, w)")
        return self.decoder(self.quantizer.embed_code(tokens, (h, w))).clamp(-1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """images (B, 3, H, W) -> reconstructed images, not clamped, and Quantized."""
        quantized = self.quantizer(self.encoder(images))
        return self.decoder(quantized.codes), quantized

    def grow_decoder(self, config: VQGANConfig) -> "VQGAN":
        """A copy with the bigger decoder of `config`; encoder and codebook stay the same and are frozen (Muse 2.5).

        Choice: it starts as the same function: new channels feed old ones through zeros, new blocks are the identity.
        """
        grown = VQGAN(config)
        grown.encoder = copy.deepcopy(self.encoder)
        grown.quantizer = copy.deepcopy(self.quantizer)
        new = grown.decoder.state_dict()  # shares storage: written in place
        for name, old in self.decoder.state_dict().items():
            if old.ndim > 1:
                new[name][: old.shape[0]] = 0
            new[name][tuple(slice(n) for n in old.shape)] = old
        return grown.train(self.training).freeze_tokens()

    def freeze_tokens(self) -> "VQGAN":
        """Freeze encoder and codebook, so that tokens keep their meaning for the transformers; returns itself."""
        self.encoder.eval().requires_grad_(False)
        self.quantizer.eval().requires_grad_(False)
        return self
