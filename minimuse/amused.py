"""aMUSEd: published open weights behind our interfaces (arXiv 2401.01808; extra `amused`).

    amused = Amused.from_pretrained("amused/amused-256")  # a folder, or a hub id
    tokens = torch.full((1, 256), amused.mask_id)
    *_, last = decode(amused.logits_fn(["a fox"]), tokens, mask_id=amused.mask_id, **settings(steps=12))
    images = amused.tokenizer.decode(last.tokens)  # (1, 3, 256, 256)

Its `VQTokenizer` has the sizes of Muse's (f = 16, 8192 codes): a base model can train on it (`low_tokenizer_from`).

What aMUSEd does differently from Muse:
    one model for 256 or 512 px, without super-resolution: a U-ViT, attention layers between convolutions
    text is the penultimate layer of CLIP-L/14, padding included; the pooled embedding modulates every layer, and so do
    image size, crop corner and an aesthetic score
    removed text is the empty prompt; guidance is constant, t = 9; the ranking has MaskGIT's noise
    [MASK] is the last id of the vocabulary (8255), not one past the codebook

Not here: training.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimuse.cfg import Guidance, get_guidance, guide
from minimuse.config import MuseConfig
from minimuse.sampler import LogitsFn
from minimuse.utils import explain, require


def settings(steps: int = 12) -> dict[str, Any]:
    """Arguments with which `sampler.decode` decodes as aMUSEd's scheduler does: steps, schedule, ranking noise.

    Its noise at step i is 2 (T-1-i) / (T-1), ours c (T-1-i) / T. Its cosine has single precision: 127 of 256, not 128.
    """
    return {
        "steps": steps,
        "schedule": lambda u: torch.cos(torch.tensor(u, dtype=torch.float) * math.pi / 2).item(),
        "choice_temperature": 2 * steps / (steps - 1) if steps > 1 else 0.0,
    }


def _load(kind: str, name: str | Path, subfolder: str) -> Any:
    """Load a class of diffusers or transformers, given by its name, from a folder or hub id; frozen, float32."""
    with explain("published weights need diffusers: pip install 'minimuse[amused]'", ImportError, kind=ImportError):
        import diffusers
        import transformers
    load = (getattr(diffusers, kind, None) or getattr(transformers, kind)).from_pretrained
    with explain(f"no {kind} in {str(name)!r}, subfolder {subfolder!r}", OSError, ValueError):
        if kind == "CLIPTokenizer":
            return load(name, subfolder=subfolder)
        model, info = load(name, subfolder=subfolder, use_safetensors=True, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        require(not missing, f"it lacks the weights {', '.join(missing[:3])}, ...")
    return model.float().eval().requires_grad_(False)


class VQTokenizer(nn.Module):
    """diffusers' VQModel, frozen, as our tokenizer: images in [-1, 1] <-> tokens. aMUSEd's own pixels are in [0, 1]."""

    def __init__(self, vq: nn.Module):
        super().__init__()
        require(vq.config.lookup_from_codebook, "this VQModel has lookup_from_codebook=False; give one like aMUSEd's")
        self.vq = vq.eval().requires_grad_(False)
        self.codebook_size = vq.config.num_vq_embeddings
        self.downsampling = 2 ** (len(vq.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "VQTokenizer":
        """From a folder or hub id of a whole aMUSEd, or from a folder of a VQModel alone."""
        return cls(_load("VQModel", name, "" if Path(name, "config.json").exists() else "vqvae"))

    @property
    def codebook(self) -> Tensor:
        """(V, d)."""
        return self.vq.quantize.embedding.weight

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], H and W multiples of f -> tokens (B, h*w) long."""
        z = self.vq.encode((images.to(self.vq.dtype) + 1) / 2).latents.float().permute(0, 2, 3, 1)  # (B, h, w, d)
        return torch.cdist(z.flatten(0, 2), self.codebook.float()).argmin(1).view(len(z), -1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) of a square grid -> images (B, 3, H, W) in [-1, 1]. ValueError if a [MASK] is left."""
        known = tokens.min() >= 0 and tokens.max() < self.codebook_size
        require(known, f"tokens: {tokens.min()} to {tokens.max()} came, of {self.codebook_size} codes; is [MASK] left?")
        side = math.isqrt(tokens.shape[1])
        shape = (len(tokens), side, side, self.vq.quantize.vq_embed_dim)
        return self.vq.decode(tokens, force_not_quantize=True, shape=shape).sample.clamp(0, 1) * 2 - 1


def published_tokenizer(config: MuseConfig) -> VQTokenizer | None:
    """The frozen low tokenizer that `low_tokenizer_from` names, or None. ValueError if its sizes are different."""
    if not (name := config.low_tokenizer_from):
        return None
    tokenizer = VQTokenizer.from_pretrained(name)
    for size in ("codebook_size", "downsampling"):
        found, expected = getattr(tokenizer, size), getattr(config.low_tokenizer, size)
        require(found == expected, f"{name}: {size} {found}, but low_tokenizer says {expected}; change it")
    return tokenizer


class Amused(nn.Module):
    """A published aMUSEd, frozen: tokenizer, U-ViT and CLIP text encoder. `.to(...)` moves it to devices and dtypes."""

    def __init__(self, tokenizer: VQTokenizer, transformer: nn.Module, clip: nn.Module, clip_tokenizer: Any):
        super().__init__()
        v, n = clip.config.vocab_size, len(clip_tokenizer)
        require(v == n, f"CLIP knows {v} text tokens, its tokenizer {n}; is vocab.json missing?")
        self.tokenizer = tokenizer
        self.clip_tokenizer = clip_tokenizer
        self.transformer = transformer.eval().requires_grad_(False)
        self.clip = clip.eval().requires_grad_(False)
        self.mask_id = transformer.config.vocab_size - 1  # as in its training

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Amused":
        """A hub id, or a folder with vqvae, transformer, text_encoder, tokenizer -> Amused, on the CPU in float32."""
        clip = _load("CLIPTextModelWithProjection", name, "text_encoder"), _load("CLIPTokenizer", name, "tokenizer")
        return cls(VQTokenizer.from_pretrained(name), _load("UVit2DModel", name, "transformer"), *clip)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B prompts, cut to 77 tokens -> penultimate layer (B, 77, D_lm), projected embedding (B, P)."""
        limit = self.clip.config.max_position_embeddings
        lengths = [len(ids) for ids in self.clip_tokenizer(list(prompts), verbose=False)["input_ids"]]
        if long := sum(n > limit for n in lengths):
            logging.getLogger("minimuse").warning("%d prompts are cut to %d tokens of CLIP", long, limit)
        options = {"padding": "max_length", "truncation": True, "max_length": limit, "return_tensors": "pt"}
        ids = self.clip_tokenizer(list(prompts), **options)["input_ids"].to(self.clip.device)
        out = self.clip(ids, output_hidden_states=True)
        return out.hidden_states[-2].to(self.transformer.dtype), out.text_embeds

    def logits_fn(
        self, prompts: Sequence[str], *, guidance: Guidance = 9.0, negative_prompts: Sequence[str] | None = None
    ) -> LogitsFn:
        """B prompts -> the LogitsFn (tokens (B, N), u) -> guided logits (B, N, V), of the grid of the training.

        guidance: t as in `cfg.get_guidance`; the guidance_scale of diffusers is t + 1. negative_prompts: none are "".
        """
        b, side = len(prompts), self.transformer.config.sample_size
        negatives = list(negative_prompts or [""] * b)
        require(len(negatives) == b, f"{len(negatives)} negative_prompts came for {b} prompts; give one for each")
        scale = get_guidance(guidance)
        states, pooled = self.encode([*prompts, *negatives])
        pixels = side * self.tokenizer.downsampling
        micro = states.new_tensor([pixels, pixels, 0, 0, 6.0]).expand(2 * b, -1)  # size, crop corner, aesthetic score

        @torch.no_grad()
        def logits_fn(tokens: Tensor, u: float) -> Tensor:
            t = scale(u)
            n = b if t == 0 else 2 * b  # without guidance, no second branch
            x = tokens.view(b, side, side).repeat(n // b, 1, 1)
            logits = self.transformer(x, states[:n], pooled[:n], micro[:n]).flatten(2).transpose(1, 2)  # (n, N, V)
            return logits if t == 0 else guide(*logits.chunk(2), t)

        return logits_fn
