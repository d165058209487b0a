"""VQGAN: images <-> tokens (Muse 2.2 and A.2; VQGAN, arXiv 2012.09841).

    images (B, 3, H, W) --Encoder--> z (B, d, h, w) --VectorQuantizer--> tokens (B, h*w) --codebook, Decoder--> images

Every layer is a convolution: Muse removes VQGAN's attention block so that any image size works.
The fine-tuned decoder of Muse 2.5 is the same `Decoder` with larger numbers: see `VQGAN.grow_decoder`.

Glossary: f = downsampling, V = codebook_size, d = code_dim, h = H / f, w = W / f.
Not here: the losses that train it (`vqgan_loss.py`), the loop (`train.py`).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.utils import require, require_positive

GROUP = 16  # channels a group of the VQGAN's normalization: fixed, so that a wider layer keeps a narrower one's groups


@dataclass(frozen=True)
class VQGANConfig:
    """A tokenizer (Muse 2.2, A.2). Each tuple holds one number a resolution, from full size down to size / f."""

    image_size: int  # pixels a side it is trained for; all-convolutional, so any multiple of f works
    codebook_size: int  # V; the paper found that more than 8192 did not help
    code_dim: int  # width of a code; small, so that nearest codes are well told apart
    width: int  # channels at full size, times `multipliers` below it
    multipliers: tuple[int, ...]  # f = 2 ** (len(multipliers) - 1)
    blocks: tuple[int, ...]  # encoder residual blocks; 0 at full size saves most of a CPU's time
    decoder_width: int  # the fine-tuned decoder (Muse 2.5) differs in these two alone
    decoder_blocks: tuple[int, ...]

    @property
    def downsampling(self) -> int:
        """f."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return self.image_size // self.downsampling

    def __post_init__(self):
        require_positive(self, "image_size", "codebook_size", "code_dim", "width", "decoder_width")
        levels = len(self.multipliers)
        require(levels > 0, "VQGANConfig.multipliers is empty; give one number a resolution, such as (1, 2, 4)")
        for name in ("blocks", "decoder_blocks"):
            n = len(getattr(self, name))
            require(n == levels, f"VQGANConfig.{name} has {n} entries for {levels} resolutions; give {levels}")
        for name in ("width", "decoder_width"):
            value = getattr(self, name)
            mend = f"take {max(1, round(value / GROUP)) * GROUP}"
            require(value % GROUP == 0, f"VQGANConfig.{name} {value} is not a multiple of {GROUP}; {mend}")
        f = self.downsampling
        mend = f"take {max(1, round(self.image_size / f)) * f}, or {levels - 1} fewer multipliers"
        require(self.image_size % f == 0, f"image size {self.image_size} is not a multiple of f = {f}; {mend}")


class ResBlock(nn.Module):
    """x (B, C, h, w) -> same: x + conv(conv(x)); the identity at first, since its last convolution starts at zero."""

    def __init__(self, c: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(c // GROUP, c), nn.Conv2d(c, c, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(c // GROUP, c), nn.Conv2d(c, c, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(y)))


class Encoder(nn.Module):
    """images (B, 3, H, W) -> z (B, d, H/f, W/f): residual blocks at each resolution, a strided convolution between."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for level, (c, blocks) in enumerate(zip(widths, config.blocks, strict=True)):
            if level > 0:
                layers.append(nn.Conv2d(widths[level - 1], c, 4, stride=2, padding=1))
            layers += [ResBlock(c) for _ in range(blocks)]
        layers += [nn.GroupNorm(c // GROUP, c), nn.SiLU(), nn.Conv2d(c, config.code_dim, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Level(nn.Module):
    """x (B, C_in, h, w) -> (B, C_out, 2h, 2w): residual blocks at one resolution, then (but for the last) up by two."""

    def __init__(self, c_in: int, c_out: int, blocks: int, up: bool):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_in) for _ in range(blocks))
        self.up = nn.Conv2d(c_in, 4 * c_out, 1) if up else None  # Choice: 1x1 and pixel shuffle, cheap and learned

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.up is None else F.pixel_shuffle(self.up(x), 2)


class Decoder(nn.Module):
    """codes (B, d, h, w) -> images (B, 3, H, W): the encoder's mirror, with a width and depths of its own."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.decoder_width * m for m in config.multipliers][::-1]  # from the coarsest resolution up
        depths = config.decoder_blocks[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.code_dim, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(c, widths[min(i + 1, last)], depths[i], up=i < last) for i, c in enumerate(widths)
        )
        self.norm = nn.GroupNorm(widths[-1] // GROUP, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.conv_in(codes)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm(x)))


class Quantized(NamedTuple):
    """What the quantizer makes of z (B, d, h, w)."""

    codes: Tensor  # (B, d, h, w), the gradient passed straight through to z
    tokens: Tensor  # (B, h*w) long
    codebook_loss: Tensor  # () moves codes towards the encoder
    commitment_loss: Tensor  # () holds the encoder near its codes


class VectorQuantizer(nn.Module):
    """Nearest code of a learned codebook (VQGAN 3.1), with dead codes brought back to life while training.

    Straight-through gradient: codes = z + stopgrad(q - z), so the forward value is q and d codes / d z = 1.
    Choice: a code unused for about `patience` steps restarts at a random encoder output of the batch.
    """

    def __init__(self, codebook_size: int, code_dim: int, patience: int = 20):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))
        self.patience = patience
        self.idle: Tensor | None = None  # (V,) steps since a code was last used; all count as dead at the first step
        self.sync: Callable[[Tensor, str], None] | None = None  # several processes: see `train_engine.sync`

    def lookup(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """tokens (B, h*w) -> codes (B, d, h, w)."""
        return F.embedding(tokens, self.codebook).transpose(1, 2).unflatten(2, grid).contiguous()

    def nearest(self, z: Tensor) -> Tensor:
        """z (B, d, h, w) -> tokens (B, h*w): argmin_k |z - e_k|^2 = argmin_k |e_k|^2 - 2 z.e_k."""
        flat = z.flatten(2).transpose(1, 2).float()
        book = self.codebook.float()
        return torch.addmm(book.square().sum(1), flat.flatten(0, 1), book.T, alpha=-2).argmin(1).view(flat.shape[:2])

    def forward(self, z: Tensor) -> Quantized:
        """z (B, d, h, w) -> its nearest codes, their tokens and the two losses; in training, dead codes restart."""
        z, learning = z.float(), self.training and self.codebook.requires_grad  # frozen, `train()` does not wake it
        if learning:
            self._restart_dead_codes(z.detach())
        tokens = self.nearest(z.detach())
        codes = self.lookup(tokens, z.shape[2:])
        losses = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
        if learning:
            self._count_used(tokens)
        return Quantized(z + (codes - z).detach(), tokens, *losses)

    def watch_codes(self) -> Tensor:
        """Begin to count how long each code is idle -> the counts (V,), which are part of a training's state."""
        self.idle = torch.full((len(self.codebook),), self.patience, device=self.codebook.device)
        return self.idle

    @torch.no_grad()
    def _restart_dead_codes(self, z: Tensor) -> None:
        if self.idle is None:
            self.watch_codes()
        dead = (self.idle >= self.patience).nonzero().squeeze(1)
        if len(dead):
            flat = z.transpose(0, 1).flatten(1).T  # (B*h*w, d)
            new = flat[torch.randint(len(flat), (len(dead),), device=z.device)]
            if self.sync:
                self.sync(new, "first")  # all processes take the codes of the first one
            self.codebook[dead] = new
            self.idle[dead] = 0

    @torch.no_grad()
    def _count_used(self, tokens: Tensor) -> None:
        used = torch.zeros_like(self.idle).index_fill_(0, tokens.flatten(), 1)
        if self.sync:
            self.sync(used, "max")  # a code is idle if no process uses it
        self.idle.add_(1).mul_(1 - used)


class Reconstruction(NamedTuple):
    images: Tensor  # (B, 3, H, W)
    tokens: Tensor  # (B, h*w)
    codebook_loss: Tensor
    commitment_loss: Tensor


class VQGAN(nn.Module):
    """The tokenizer: `encode` and `decode` are all that the rest of minimuse asks of it."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantizer = VectorQuantizer(config.codebook_size, config.code_dim)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def downsampling(self) -> int:
        return self.config.downsampling

    @property
    def codebook(self) -> Tensor:
        """(V, d)."""
        return self.quantizer.codebook

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> tokens (B, h*w) long; H and W any multiples of f."""
        f = self.downsampling
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % f or images.shape[3] % f:
            raise ValueError(f"images of shape {tuple(images.shape)}; give (B, 3, H, W) with H and W multiples of {f}")
        return self.quantizer.nearest(self.encoder(images))

    def decode(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """tokens (B, h*w) -> images (B, 3, H, W) in [-1, 1]; a square unless `grid` says (h, w)."""
        side = math.isqrt(tokens.shape[1])
        grid = grid or (side, side)
        if grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(f"{tokens.shape[1]} tokens are no {grid[0]} x {grid[1]} grid; pass grid=(h, w)")
        return self.decoder(self.quantizer.lookup(tokens, grid)).clamp(-1, 1)

    def forward(self, images: Tensor) -> Reconstruction:
        """images (B, 3, H, W) -> their reconstruction, for training: not clamped, with the quantizer's losses."""
        q = self.quantizer(self.encoder(images))
        return Reconstruction(self.decoder(q.codes), q.tokens, q.codebook_loss, q.commitment_loss)

    def grow_decoder(self, config: VQGANConfig) -> "VQGAN":
        """A copy with `config`'s bigger decoder, encoder and codebook shared bit for bit and frozen (Muse 2.5).

        Choice: the bigger decoder begins as the same function. Old weights fill the leading channels, new channels
        feed old ones through zeros, and new residual blocks are the identity; so fine-tuning starts where we are.
        """
        grown = VQGAN(config)
        grown.encoder, grown.quantizer = copy.deepcopy(self.encoder), copy.deepcopy(self.quantizer)
        new = grown.decoder.state_dict()  # shares storage: written in place
        for name, old in self.decoder.state_dict().items():
            if old.ndim > 1:
                new[name][: old.shape[0]] = 0
            new[name][tuple(slice(n) for n in old.shape)] = old
        return grown.train(self.training).freeze_tokens()

    def freeze_tokens(self) -> "VQGAN":
        """Freeze encoder and codebook, so that the token "language" of the transformers stays; returns itself."""
        for part in (self.encoder, self.quantizer):
            part.eval().requires_grad_(False)
        return self


def codebook_usage(tokens: Tensor, codebook_size: int) -> tuple[float, float]:
    """tokens -> (share of the codes in use, perplexity exp(H) of their histogram): both small when it collapses."""
    p = torch.bincount(tokens.flatten(), minlength=codebook_size).double() / tokens.numel()
    return (p > 0).double().mean().item(), math.exp(-torch.special.xlogy(p, p).sum().item())
