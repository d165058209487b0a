"""The masked transformer: tokens + memory -> logits; base and super-resolution (Muse 2.3, 2.4, A.1, A.3).

    Context --Transformer.memory--> Memory                    text, projected; every layer's keys and values, once
    Context, low tokens --SuperRes.memory--> Memory           the low-res encoder's output joins the text
    tokens (B, N), Memory --forward--> logits (B, N, V)

Each layer: self-attention over the image tokens, cross-attention to the memory, MLP; pre-norm, no biases.

Glossary: B batch, N image tokens, g tokens a side (N = g^2), M memory entries, D width, H heads, d = D / H,
V codebook size, b side of multi-axis attention's blocks. [MASK] is token V.
Not here: masking (`masking.py`), guidance (`cfg.py`), decoding (`sampler.py`).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minimuse.utils import require, require_positive

if TYPE_CHECKING:
    from minimuse.text import Context


@dataclass(frozen=True)
class TransformerConfig:
    """A masked transformer (Muse 2.3, A.1); with `low_layers` > 0 a super-resolution transformer (2.4, A.3)."""

    codebook_size: int  # V of the tokens that it predicts
    grid: int  # tokens a side; N = grid ** 2
    text_width: int  # D_lm of the language model
    width: int  # D
    layers: int
    heads: int  # Choice: 64 channels a head at paper scale; the paper is silent
    mlp_width: int
    block: int = 0  # side b of multi-axis attention's blocks; 0 is full attention
    low_layers: int = 0  # depth of the encoder over the low-resolution tokens
    low_grid: int = 0
    low_codebook_size: int = 0
    dropout: float = 0.0  # Choice: the paper is silent
    identity: bool = False  # residual blocks begin as the identity, as DiT's (arXiv 2212.09748)
    causal: bool = False  # an autoregressive model: each token sees those before it, row by row
    patch: int = 1  # of a DiT alone: side of a token in the latent grid
    text_layers: int = 0  # Deviation: layers of our own over the LM's embeddings, see `Transformer.memory`; Muse: none

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid**2

    @property
    def mask_id(self) -> int:
        """The [MASK] token: one past the codebook."""
        return self.codebook_size

    def __post_init__(self):
        require_positive(self, "codebook_size", "grid", "text_width", "width", "layers", "heads", "mlp_width", "patch")
        ok = self.grid % self.patch == 0
        require(ok, f"a latent grid of {self.grid} is not divisible into patches of {self.patch}; give a divisor")
        require(not (self.causal and self.block), "causal attention is not multi-axis attention; give block=0")
        ok = self.width % self.heads == 0
        mend = f"take {max(1, self.width // self.heads) * self.heads}, or a number of heads that divides it"
        require(ok, f"width {self.width} is not divisible by {self.heads} heads; {mend}")
        ok = self.block >= 0 and self.low_layers >= 0 and self.text_layers >= 0
        given = f"block {self.block}, low_layers {self.low_layers}, text_layers {self.text_layers}"
        require(ok, f"{given}; give 0 or more")
        ok = not self.text_layers or self.heads % 2 == 0
        require(ok, f"text_layers look ahead with half of the heads, and {self.heads} is odd; give an even number")
        if self.block:
            ok = self.grid % self.block == 0
            require(ok, f"a grid of {self.grid} is not divisible into blocks of {self.block}; give a divisor, or 0")
            mend = "give an even number, or block=0"
            require(self.heads % 2 == 0, f"multi-axis attention halves the heads, and {self.heads} is odd; {mend}")
        if self.low_layers:
            require_positive(self, "low_grid", "low_codebook_size")
        require(0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)")


class Memory(NamedTuple):
    """All that the layers attend to besides the tokens: computed once, used at every step of a decode."""

    keys: tuple[Tensor, ...]  # a layer: (B, H, M, d)
    values: tuple[Tensor, ...]
    attend: Tensor  # (B, 1, 1, M) bool, False = padding

    def cat(self, other: "Memory") -> "Memory":
        """Two memories of batches B and C -> one of B + C; the shorter is padded, and its padding is not attended."""
        length = max(self.attend.shape[-1], other.attend.shape[-1])

        def join(a: Tensor, b: Tensor, dim: int) -> Tensor:
            pads = [[0, 0] * (-dim - 1) + [0, length - x.shape[dim]] for x in (a, b)]
            return torch.cat([F.pad(a, pads[0]), F.pad(b, pads[1])])

        keys = tuple(join(a, b, -2) for a, b in zip(self.keys, other.keys, strict=True))
        values = tuple(join(a, b, -2) for a, b in zip(self.values, other.values, strict=True))
        return Memory(keys, values, join(self.attend, other.attend, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None = None) -> Tensor:
    """q (B, H, N, d), k and v (B, H, M, d) -> softmax(q k^T / sqrt(d)) v, (B, H, N, d).

    attend (..., N or 1, M): bool, True where it may; or numbers that are added to the products.
    torch's own, but for bf16 on a CPU: there its fused kernel makes a training step longer than plain products do.
    Choice: beyond 1,024 entries, whose N x M weights would fill the memory, it is fused nevertheless.
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
    """q, k, v (B, H, N, d) -> (B, H, N, d): half of the heads attend inside b x b blocks, half across them (HiT).

    The g x g grid is cut into (g/b)^2 blocks. Local heads: a token sees its own block. Dilated heads: a token sees
    the tokens at its place in every block. Cost O(N (b^2 + N / b^2)) instead of O(N^2).
    """
    batch, heads, n, d = q.shape
    g = math.isqrt(n)

    def attend(start: int, order: tuple[int, ...]) -> Tensor:
        """Half of the heads, from `start` on: reorder the axes (B, H/2, g/b, b, g/b, b, d), attend, put them back."""
        back = tuple(order.index(i) for i in range(7))

        def split(x: Tensor) -> Tensor:
            x = x[:, start : start + heads // 2].reshape(batch, heads // 2, g // block, block, g // block, block, d)
            x = x.permute(order)
            return x.reshape(-1, heads // 2, x.shape[4] * x.shape[5], d)

        out = attention(split(q), split(k), split(v))
        sizes = [(batch, heads // 2, g // block, block, g // block, block, d)[i] for i in order]
        return out.reshape(sizes).permute(back).reshape(batch, heads // 2, n, d)

    local = attend(0, (0, 2, 4, 1, 3, 5, 6))  # (B, rows of blocks, columns, H/2, b, b, d)
    dilated = attend(heads // 2, (0, 3, 5, 1, 2, 4, 6))  # (B, b, b, H/2, rows of blocks, columns, d)
    return torch.cat([local, dilated], 1)


class SelfAttention(nn.Module):
    """x (B, N, D) -> (B, N, D): full attention, multi-axis in blocks of side `block`, or causal: to those before alone.

    `attend` as in `attention`, for full attention alone.
    `past` (empty, or [keys, values] of earlier places) grows by the N places of x, which see it too.
    """

    def __init__(self, width: int, heads: int, block: int = 0, causal: bool = False):
        super().__init__()
        self.heads, self.block, self.causal = heads, block, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, past: list[Tensor] | None = None, attend: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        if past is not None:
            k, v = past[:] = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)] if past else [k, v]
        if self.block:
            y = multi_axis_attention(q, k, v, self.block)
        else:
            n, m = q.shape[2], k.shape[2]
            see = torch.ones(n, m, dtype=torch.bool, device=x.device).tril(m - n) if self.causal else attend
            y = attention(q, k, v, see)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, N, D)


class KeyValue(nn.Linear):
    """A linear layer by another name: a memory uses it outside of its layer's forward, so FSDP gathers it by itself."""


class CrossAttention(nn.Module):
    """x (B, N, D), one layer's keys and values (B, H, M, d) -> (B, N, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = KeyValue(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, memory: Tensor, found: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """memory (B, M, D) -> keys and values, each (B, H, M, d); keys of `found`, where it is given."""
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if found is not None:
            k = self.kv(found).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)[0]
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, attend: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, d)
        y = attention(q, k, v, attend)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, N, D)


class Layer(nn.Module):
    """x (B, N, D) -> (B, N, D): self-attention, cross-attention (where there is a memory), MLP."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        block: int,
        dropout: float,
        cross: bool = True,
        causal: bool = False,
    ):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, bias=False), SelfAttention(width, heads, block, causal)
        if cross:
            self.norm2, self.cross = nn.LayerNorm(width, bias=False), CrossAttention(width, heads)
        self.norm3 = nn.LayerNorm(width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width, bias=False), nn.GELU(), nn.Linear(mlp_width, width, bias=False)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor, Tensor] | None = None, past: list[Tensor] | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), past))
        if memory is not None:
            x = x + self.dropout(self.cross(self.norm2(x), *memory))
        return x + self.dropout(self.mlp(self.norm3(x)))


class TextLayer(nn.Module):
    """x (B, L, D), `attend` as in `attention` -> (B, L, D): to each word, what stands ahead of it and behind.

    Choice: no MLP. One learns the words of training by heart: of toy's prompts in unseen words a linear reader told
    all looks right in 59% before it and in 44% after it.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(config.width, bias=False), SelfAttention(config.width, config.heads)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:
        return x + self.dropout(self.attention(self.norm(x), attend=attend))


def sinusoids(grid: int, width: int, shortest: float = 0.125) -> Tensor:
    """Waves at the centres of `grid` cells, (grid, width): half-waves from the whole side down to `shortest` of it."""
    x = (torch.arange(grid) + 0.5) / grid
    waves = x[:, None] * math.pi * torch.logspace(0, math.log10(1 / shortest), width // 2)
    return F.pad(torch.cat([waves.sin(), waves.cos()], 1), (0, width % 2)) / 2**0.5


def ahead_and_back(mask: Tensor, heads: int) -> Tensor:
    """mask (B, L) bool, True at a real text token -> what is added to attention's products, (B, H, L, L).

    Half of the heads look at a token and those after it, half at it and those before (arXiv 1709.04696), the nearer the
    more (ALiBi, arXiv 2108.12409): 2^-1, 2^-3, ... less a token of distance. Padding sees itself too, so that no
    softmax is empty.
    """
    at = torch.arange(mask.shape[1], device=mask.device)
    ahead = (at - at[:, None]).float()  # (L, L): how far ahead of the row's token the column's is
    slopes = 0.5 ** (2 * torch.arange(heads // 2, device=mask.device) + 1)[:, None, None]
    bias = torch.cat([torch.where(far >= 0, -slopes * far, -math.inf) for far in (ahead, -ahead)])  # (H, L, L)
    return torch.where(mask[:, None, None] | (ahead == 0), bias, -math.inf)


def random_features(vectors: Tensor, width: int) -> Tensor:
    """vectors (V, d) -> (V, width) of variance about 1: near vectors are alike (Rahimi and Recht 2007).

    The product of two rows, over the width, is about exp(-|a - b|^2 / (2 s^2)), s half the median distance.
    """
    vectors = vectors.detach().float().cpu()  # one seed, one result, on a laptop and on a GPU
    distance = torch.cdist(vectors, vectors)
    scale = 0.5 * distance[distance > 0].median() if distance.any() else 1.0
    waves = torch.randn(vectors.shape[1], width) / scale
    return 2**0.5 * (vectors @ waves + 2 * math.pi * torch.rand(width)).cos()


class TokenEmbedding(nn.Module):
    """tokens (B, N) -> (B, N, D): a vector a code (and one for [MASK]) plus learned row and column positions.

    Choice: positions begin as sinusoids of the place in the picture, rows in one half of the channels and columns in
    the other: the same place has the same position in a low and in a high grid.
    """

    def __init__(self, codebook_size: int, grid: int, width: int):
        super().__init__()
        self.codes = nn.Embedding(codebook_size + 1, width)
        half = width // 2
        rows, columns = sinusoids(grid, half), sinusoids(grid, width - half)
        self.rows = nn.Parameter(F.pad(rows, (0, width - half))[:, None])  # (g, 1, D)
        self.columns = nn.Parameter(F.pad(columns, (half, 0))[None])  # (1, g, D)

    def init_from_codebook(self, codebook: Tensor) -> None:
        """codebook (V, d): the embeddings of like codes begin alike; [MASK] stays as it is."""
        self.codes.weight.data[:-1].copy_(0.5 * random_features(codebook, self.codes.embedding_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.codes(tokens) + (self.rows + self.columns).flatten(0, 1)[: tokens.shape[1]]


class Transformer(nn.Module):
    """The base model (Muse 2.3): tokens (B, N), some of them [MASK], and a memory -> logits (B, N, V)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing: about a third more work, a fraction of the memory
        self.embed = TokenEmbedding(config.codebook_size, config.grid, config.width)
        self.text = nn.Linear(config.text_width, config.width, bias=False)  # Muse 2.1: linearly projected to the width
        self.text_layers = nn.ModuleList(TextLayer(config) for _ in range(config.text_layers))
        self.text_norm = nn.LayerNorm(config.width, bias=False)  # Choice: any LM's scale fits, and zero text stays zero
        self.layers = nn.ModuleList(
            Layer(config.width, config.heads, config.mlp_width, config.block, config.dropout, causal=config.causal)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        """Choice: linear weights at std 1/sqrt(fan in), less where layers write; embeddings 0.5; the head near zero."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, Layer):  # `apply` visits children first
            scale = 0.0 if self.config.identity else (2 * self.config.layers) ** -0.5
            outputs = [module.attention.out, module.mlp[2], *([module.cross.out] if hasattr(module, "cross") else [])]
            for linear in outputs:
                linear.weight.data.mul_(scale)
        elif isinstance(module, TextLayer):
            module.attention.out.weight.data.mul_(0.0 if self.config.identity else 1.0)
        elif isinstance(module, Transformer):
            nn.init.normal_(module.head.weight, std=0.02)
        elif isinstance(module, CrossAttention):  # like attends to like from the start: a token to its low-res place
            module.kv.weight.data[: len(module.q.weight)] = module.q.weight.data

    @property
    def mask_id(self) -> int:
        return self.config.mask_id

    @torch.no_grad()
    def init_from_codebook(self, codebook: Tensor) -> None:
        """Before training: begin from the tokenizer's codebook (V, d): what is learned of a code holds for its like.

        Choice: the paper is silent. Many codes look the same, and from random embeddings each is learned by itself.
        500 steps of nano's super-resolution, true low tokens, about this scale: 1.64 -> 1.53 nats a token, shapes read
        right in 64% -> 88% of 84 pictures, one run each.
        """
        self.embed.init_from_codebook(codebook)
        self.head.weight.copy_(0.02 * random_features(codebook, self.config.width))

    def memory(self, context: "Context", *extra: Tensor) -> Memory:
        """context (B, L, D_lm), extra entries (B, K, D) -> Memory of M = L + K entries; padding is not attended.

        Deviation: with `text_layers`, the text is read by layers of our own first; Muse projects what T5-XXL gives and
        no more. A small LM made for comparing sentences tells in a word's vector what it is, but hardly who stands left
        of whom: 0.01% of the variance in MiniLM's. Each layer sees which words stand ahead and behind. What it reads
        makes the keys alone, by which a word is found; the values, what is found, stay the LM's own.
        """
        plain = self.text(context.embeds)  # (B, L, D)
        entries, found = torch.cat([self.text_norm(plain), *extra], 1), None  # (B, M, D)
        if self.text_layers:
            read, see = plain, ahead_and_back(context.mask, self.config.heads)
            for layer in self.text_layers:
                read = self._run(layer, read, see)
            found = torch.cat([self.text_norm(read), *extra], 1)
        attend = F.pad(context.mask, (0, entries.shape[1] - plain.shape[1]), value=True)
        keys, values = zip(*(layer.cross.project(entries, found) for layer in self.layers), strict=True)
        return Memory(keys, values, attend[:, None, None])

    def _run(self, layer: Layer, x: Tensor, *memory: Any) -> Tensor:
        """A layer; with `recompute` what it computes inside is thrown away, and computed again for the gradient."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, x, *memory, use_reentrant=False)
        return layer(x, *memory)

    def forward(self, tokens: Tensor, memory: Memory, past: list[list[Tensor]] | None = None) -> Tensor:
        """tokens (B, N) -> logits (B, N, V); where causal, place i sees the tokens before it, and [MASK] for the first.

        `past` (causal only), an empty list a layer at first, keeps keys and values from one call to the next: give the
        first n tokens, and the logits are those of the places that are new since, (B, new, V).
        """
        if self.config.causal:
            tokens = F.pad(tokens, (1, -1), value=self.mask_id)
        done = past[0][0].shape[2] if past and past[0] else 0
        x = self.embed(tokens)[:, done:]  # (B, N, D)
        kept = [past] if past is not None else []
        for layer, k, v, *own in zip(self.layers, memory.keys, memory.values, *kept, strict=True):
            x = self._run(layer, x, (k, v, memory.attend), *own)
        return self.head(self.norm(x))  # (B, N, V)


class SuperRes(Transformer):
    """The super-resolution model (Muse 2.4): the same, over a memory that also holds the encoded low-res tokens."""

    def __init__(self, config: TransformerConfig):
        if not config.low_layers:
            raise ValueError("a super-resolution transformer reads low-res tokens; give low_layers > 0")
        super().__init__(config)
        self.low_embed = TokenEmbedding(config.low_codebook_size, config.low_grid, config.width)  # positions of its own
        self.low_layers = nn.ModuleList(
            Layer(config.width, config.heads, config.mlp_width, 0, config.dropout, cross=False)
            for _ in range(config.low_layers)
        )
        self.low_norm = nn.LayerNorm(config.width, bias=False)
        for part in (self.low_embed, self.low_layers):
            part.apply(self._initialize)

    @torch.no_grad()
    def init_from_codebook(self, codebook: Tensor, low_codebook: Tensor) -> None:
        """The same of both codebooks: the high-res tokens', and the low-res ones' (V_low, d_low)."""
        super().init_from_codebook(codebook)
        self.low_embed.init_from_codebook(low_codebook)

    def memory(self, context: "Context", low_tokens: Tensor) -> Memory:
        """context (B, L, D_lm), low_tokens (B, N_low) -> Memory of L + N_low entries.

        Guidance removes the text alone: pass `null_text` as the context, and the low-res tokens stay.
        """
        low = self.low_embed(low_tokens)  # (B, N_low, D)
        for layer in self.low_layers:
            low = self._run(layer, low)
        return super().memory(context, self.low_norm(low))
