"""The masked transformer: tokens + memory -> logits; base and super-resolution (Muse 2.3, 2.4, A.1, A.3).

    Context --Transformer.memory--> Memory                 projected text; keys and values of every layer, computed once
    Context, low-res tokens --SuperRes.memory--> Memory    the output of the low-res encoder joins the text
    tokens (B, N), Memory --forward--> logits (B, N, V)

What the paper does not have comes last, under "deviations".
Glossary: B batch, N image tokens, g tokens per side (N = g^2), M memory entries, D width, H heads, d = D / H,
V codebook size, b side of a multi-axis attention block. [MASK] is token V.
Not here: masking (`masking.py`), guidance (`cfg.py`), decoding (`sampler.py`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.text import Context
from minimuse.utils import Checked, Depth, Fraction, Layers, Natural, Size, require, require_multiple

RESIDUAL_OUTPUTS = ("attention.out.weight", "cross.out.weight", "mlp.2.weight")  # of a layer: added to its input


@dataclass(frozen=True)
class TransformerConfig(Checked):
    """A masked transformer (Muse 2.3, A.1). With `low_layers` > 0, a super-resolution transformer (2.4, A.3)."""

    codebook_size: Size  # V of the tokens that it predicts
    grid: Size  # tokens per side; N = grid ** 2
    text_width: Size  # D_lm of the language model
    width: Size  # D
    layers: Layers
    heads: Size  # Choice: 64 channels per head in the paper presets
    mlp_width: Size
    block: Natural = 0  # side b of multi-axis attention's blocks; 0 is full attention
    low_layers: Depth = 0  # depth of the encoder over the low-res tokens
    low_grid: Natural = 0
    low_codebook_size: Natural = 0
    dropout: Fraction = 0.0  # Choice: the paper is silent
    text_layers: Depth = 0  # Deviation: trained layers over the text embeddings, see `TextLayer`; Muse has none
    draft: bool = False  # Deviation: super-resolution also reads `vqgan.draft_tokens` at each position; Muse does not

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid**2

    def __post_init__(self):
        super().__post_init__()
        require_multiple(self, "width", self.heads)
        require_multiple(self, "grid", self.block or 1)
        require(self.low_layers > 0 or not self.draft, "draft is True and low_layers 0; only SuperRes reads a draft")
        if self.block or self.text_layers:  # half of the heads attend in one way, half in another
            require_multiple(self, "heads", 2)


class Memory(NamedTuple):
    """What the layers attend to besides the image tokens."""

    keys: tuple[Tensor, ...]  # one per layer, (B, H, M, d)
    values: tuple[Tensor, ...]
    attend: Tensor  # (B, 1, 1, M) bool, False at padding
    draft: Tensor | None = None  # (B, N, D), added to the embeddings of the image tokens

    def cat(self, other: "Memory") -> "Memory":
        """Memories of batches B and C -> one of B + C. The shorter is padded; padding is not attended to.

        If `other` holds only removed text, its keys and values are left out: `CrossAttention` gives zeros without them.
        """
        draft = None if self.draft is None else torch.cat([self.draft, other.draft])
        if not any(v.is_meta or v.any() for v in other.values):
            return self._replace(attend=F.pad(self.attend, (0,) * 7 + (len(other.attend),)), draft=draft)
        length = max(self.attend.shape[-1], other.attend.shape[-1])

        def join(*pair: Tensor) -> Tensor:  # (B, H, M, d), (C, H, M', d) -> (B + C, H, length, d)
            return torch.cat([F.pad(x, (0, 0, 0, length - x.shape[2])) for x in pair])

        attend = join(self.attend.mT, other.attend.mT).mT
        keys, values = (tuple(map(join, *pair)) for pair in zip(self[:2], other[:2], strict=True))
        return Memory(keys, values, attend, draft)


def attention(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None = None) -> Tensor:
    """q (B, H, N, d), k and v (B, H, M, d) -> softmax(q k^T / sqrt(d)) v, (B, H, N, d).

    `attend` (..., N or 1, M): bool, True where a query may look, or numbers that are added to the scores.
    In bf16 on a CPU, plain matmuls are faster than PyTorch's fused kernel up to M = 1024.
    """
    if attend is not None and attend.dtype != torch.bool:
        attend = attend.to(q.dtype)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[2] > 1024:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attend)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, N, M)
    if attend is not None:
        scores = scores.masked_fill(~attend, -math.inf) if attend.dtype == torch.bool else scores + attend
    return scores.softmax(-1) @ v


def multi_axis_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """q, k, v (B, H, N, d) -> (B, H, N, d): multi-axis attention in b x b blocks (Muse 2.4; HiT, arXiv 2106.07631).

    In half of the heads a token sees its own block, in the others its position in every block: O(N (b^2 + N / b^2)).
    """
    batch, heads, n, d = q.shape
    blocks = math.isqrt(n) // block
    sizes = (batch, heads // 2, blocks, block, blocks, block, d)  # axes 2, 4: which block; axes 3, 5: where in it

    def attend(half: slice, groups: tuple[int, int], members: tuple[int, int]) -> Tensor:  # inside each group
        order = (0, *groups, 1, *members, 6)
        length = sizes[members[0]] * sizes[members[1]]
        split = [x[:, half].reshape(sizes).permute(order).reshape(-1, heads // 2, length, d) for x in (q, k, v)]
        out = attention(*split).reshape([sizes[axis] for axis in order])
        return out.permute([order.index(axis) for axis in range(7)]).reshape(batch, heads // 2, n, d)

    local = attend(slice(heads // 2), groups=(2, 4), members=(3, 5))
    dilated = attend(slice(heads // 2, None), groups=(3, 5), members=(2, 4))
    return torch.cat([local, dilated], 1)


class SelfAttention(nn.Module):
    """x (B, N, D) -> (B, N, D): multi-axis attention in blocks of side `block`; block 0 is full attention."""

    def __init__(self, width: int, heads: int, block: int = 0):
        super().__init__()
        self.heads = heads
        self.block = block
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        y = multi_axis_attention(q, k, v, self.block) if self.block else attention(q, k, v, attend)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, N, D)


class KeyValue(nn.Linear):
    """A layer of its own for FSDP, because `memory` calls it outside its `Layer` (launch/fsdp8.yaml)."""


class CrossAttention(nn.Module):
    """x (B, N, D), keys and values of one layer (B, H, M, d), mask -> (B, N, D); zeros for rows without keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = KeyValue(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, memory: Tensor) -> Tensor:
        """memory (B, M, D) -> keys and values, (2, B, H, M, d)."""
        return self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, attend: Tensor) -> Tensor:
        rows = len(k) if len(k) < len(attend) else len(x)  # fewer if `Memory.cat` left out removed text
        q = self.q(x[:rows]).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, d)
        y = self.out(attention(q, k, v, attend[:rows]).transpose(1, 2).flatten(2))  # (B, N, D)
        return y if rows == len(x) else F.pad(y, (0, 0, 0, 0, 0, len(x) - rows))


class Layer(nn.Module):
    """x (B, N, D), keys, values, mask -> (B, N, D): self-attention, cross-attention (if `cross`), MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int, block: int, dropout: float, cross: bool = True):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, bias=False)
        self.attention = SelfAttention(width, heads, block)
        if cross:
            self.norm2 = nn.LayerNorm(width, bias=False)
            self.cross = CrossAttention(width, heads)
        self.norm3 = nn.LayerNorm(width, bias=False)
        mlp = nn.Linear(width, mlp_width, bias=False), nn.GELU(), nn.Linear(mlp_width, width, bias=False)
        self.mlp = nn.Sequential(*mlp)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *memory: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        if memory:
            x = x + self.dropout(self.cross(self.norm2(x), *memory))
        return x + self.dropout(self.mlp(self.norm3(x)))


def sinusoids(grid: int, width: int, shortest: float = 0.125) -> Tensor:
    """Waves over the side of a grid, sampled at its cells, (grid, width)."""
    x = (torch.arange(grid) + 0.5) / grid
    waves = x[:, None] * math.pi * torch.logspace(0, math.log10(1 / shortest), width // 2)
    return F.pad(torch.cat([waves.sin(), waves.cos()], 1), (0, width % 2)) / 2**0.5


class TokenEmbedding(nn.Module):
    """tokens (B, N) -> (B, N, D): a vector for each code and for [MASK], plus learned row and column positions.

    Choice: positions start as sinusoids, half of the channels for rows, half for columns.
    """

    def __init__(self, codebook_size: int, grid: int, width: int):
        super().__init__()
        self.codes = nn.Embedding(codebook_size + 1, width)
        half = width // 2
        self.rows = nn.Parameter(F.pad(sinusoids(grid, half), (0, width - half))[:, None])  # (g, 1, D)
        self.columns = nn.Parameter(F.pad(sinusoids(grid, width - half), (half, 0))[None])  # (1, g, D)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = (self.rows + self.columns).flatten(0, 1)  # (N, D)
        n = len(positions)
        require(tokens.shape[1:] == (n,), f"tokens of shape {tuple(tokens.shape)}; this model reads (B, {n}) tokens")
        return self.codes(tokens) + positions


class Transformer(nn.Module):
    """The base model (Muse 2.3): tokens (B, N), some of them [MASK], and a memory -> logits (B, N, V)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embed = TokenEmbedding(config.codebook_size, config.grid, config.width)
        self.text = nn.Linear(config.text_width, config.width, bias=False)  # Muse 2.1: a linear projection to the width
        self.text_layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))
        self.text_norm = nn.LayerNorm(config.width, bias=False)  # Choice: fits any LM's scale, and zero text stays zero
        sizes = (config.width, config.heads, config.mlp_width, config.block, config.dropout)
        self.layers = nn.ModuleList(Layer(*sizes) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        self.mask_id = config.codebook_size  # the [MASK] token, one past the codebook
        self.apply(self._initialize)
        nn.init.normal_(self.head.weight, std=0.02)

    def _initialize(self, module: nn.Module) -> None:
        """Choice: std 1/sqrt(fan in), less where layers write; queries and keys of cross-attention start equal."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, CrossAttention):  # `apply` visits children first
            module.kv.weight.data[: len(module.q.weight)] = module.q.weight.data
        elif isinstance(module, Layer):
            for name, weight in module.named_parameters():
                if name.endswith(RESIDUAL_OUTPUTS):
                    weight.data.mul_((2 * self.config.layers) ** -0.5)

    def memory(self, context: Context, *extra: Tensor) -> Memory:
        """context (B, L, D_lm), extra entries (B, K, D) -> Memory of M = L + K entries.

        Removed text has no text token: only the extra entries are left (Muse 2.7). Without any, all L entries are
        attended to: their values are zero, so cross-attention adds exactly zero.
        """
        text = self.text(context.embeds.masked_fill(~context.mask[..., None], 0))  # (B, L, D)
        entries = torch.cat([self.text_norm(text), *extra], 1)  # (B, M, D)
        keys, values = zip(*(layer.cross.project(entries) for layer in self.layers), strict=True)
        if self.text_layers:
            bias = directional_bias(context.mask, self.config.heads)
            for layer in self.text_layers:
                text = layer(text, bias)
            entries = torch.cat([self.text_norm(text), *extra], 1)
            keys = tuple(layer.cross.project(entries)[0] for layer in self.layers)
        attend = F.pad(context.mask, (0, entries.shape[1] - text.shape[1]), value=True)  # (B, M)
        attend = attend | ~attend.any(1, keepdim=True)
        return Memory(keys, values, attend[:, None, None])

    def forward(self, tokens: Tensor, memory: Memory) -> Tensor:
        """tokens (B, N) -> logits (B, N, V)."""
        x = self.embed(tokens)  # (B, N, D)
        x = x if memory.draft is None else x + memory.draft
        for layer, k, v in zip(self.layers, memory.keys, memory.values, strict=True):
            x = layer(x, k, v, memory.attend)
        return self.head(self.norm(x))  # (B, N, V)


class SuperRes(Transformer):
    """The super-resolution model (Muse 2.4): a transformer whose memory also holds the encoded low-res tokens."""

    def __init__(self, config: TransformerConfig):
        require(config.low_layers > 0, "SuperRes got low_layers=0, but it reads low-res tokens; give low_layers > 0")
        super().__init__(config)
        self.low_embed = TokenEmbedding(config.low_codebook_size, config.low_grid, config.width)  # its own positions
        sizes = (config.width, config.heads, config.mlp_width, 0, config.dropout)
        self.low_layers = nn.ModuleList(Layer(*sizes, cross=False) for _ in range(config.low_layers))
        self.low_norm = nn.LayerNorm(config.width, bias=False)
        self.low_embed.apply(self._initialize)
        self.low_layers.apply(self._initialize)
        if config.draft:
            self.draft = nn.Embedding(config.codebook_size, config.width).apply(self._initialize)

    def memory(self, context: Context, low_tokens: Tensor, draft: Tensor | None = None) -> Memory:
        """context (B, L, D_lm), low_tokens (B, N_low) -> Memory of L + N_low entries.

        draft (B, N): see `vqgan.draft_tokens`; only a model with `config.draft` reads one.
        """
        require((draft is not None) == self.config.draft, "give a draft if config.draft is True, and only then")
        low = self.low_embed(low_tokens)  # (B, N_low, D)
        for layer in self.low_layers:
            low = layer(low)
        memory = super().memory(context, self.low_norm(low))
        return memory._replace(draft=self.draft(draft)) if self.config.draft else memory


# --- deviations: what the paper does not have -------------------------------------------------------------------------


class TextLayer(nn.Module):
    """x (B, L, D), bias (B, H, L, L) -> (B, L, D): self-attention over the words of the prompt.

    Deviation: Muse only projects the text, but MiniLM's vectors hardly tell the order of words. The output makes the
    keys of cross-attention; the values remain the projected text. No MLP, it overfits (benchmarks/choices.md).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.attention = SelfAttention(config.width, config.heads)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.dropout(self.attention(self.norm(x), bias))


def directional_bias(mask: Tensor, heads: int) -> Tensor:
    """mask (B, L) -> numbers to add to the attention scores, (B, H, L, L).

    Half of the heads see a token and the tokens after it, half see it and those before (DiSAN, arXiv 1709.04696).
    Scores fall by 2^-1, 2^-3, ... per token of distance (ALiBi, arXiv 2108.12409). Padding sees only itself.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    ahead = (place - place[:, None]).float()  # (L, L): how many tokens the column is ahead of the row
    slopes = 0.5 ** (2 * torch.arange(heads // 2, device=mask.device) + 1)[:, None, None]
    halves = [torch.where(distance >= 0, -slopes * distance, -math.inf) for distance in (ahead, -ahead)]
    return torch.where(mask[:, None, None] | (ahead == 0), torch.cat(halves), -math.inf)
