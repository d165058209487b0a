"""The projects that `speed.py` compares: Muse's base model here, in muse-maskgit-pytorch and in aMUSEd (diffusers).

    sampling(shape, dtype) -> run(steps), which decodes one batch      training(shape, dtype) -> a function, one step

All have random weights and the same text embeddings, steps and guidance: l_u + 3 (l_c - l_u), which is t = 2 here. None
has a language model. Each uses its own default for attention. The default dtype of the other projects is fp32; ours
comes from `utils.pick_dtype`. In bf16 they use what their users would: autocast, and bf16 weights for sampling with
diffusers. The attention of muse-maskgit-pytorch masks with the lowest float32 number, which bf16 cannot represent.

aMUSEd needs the extra `amused`. Its U-ViT has the number of layers that gives our number of parameters. The other
project is installed into a folder that --peers names:

    pip install --no-deps --target runs/peers muse-maskgit-pytorch==0.3.5 memory-efficient-attention-pytorch==0.1.6 \\
        einops==0.8.2 beartype==0.23.1

It imports torchvision, vector-quantize-pytorch and ema-pytorch for parts that are not measured. Empty stubs replace
them during the import. Its tokenizer and language model are stubs too."""

import importlib
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimuse.cfg import guided, null_text
from minimuse.config import StageConfig
from minimuse.masking import random_mask, sample_mask_rate
from minimuse.sampler import decode
from minimuse.text import Context
from minimuse.train import train_transformer
from minimuse.train_engine import Engine
from minimuse.transformer import Transformer, TransformerConfig
from minimuse.utils import pick_dtype

CPU, TEXT_WIDTH, GUIDANCE = torch.device("cpu"), 768, 2.0
Sample, Train = Callable[[int], Tensor], Callable[[], Any]


class Shape(NamedTuple):
    """The shape that all projects share."""

    batch: int
    grid: int  # tokens on each side
    codes: int
    width: int
    layers: int
    text: int  # text tokens
    steps: int

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)

    def config(self) -> TransformerConfig:
        sizes = {"width": self.width, "mlp_width": 4 * self.width, "heads": self.heads, "layers": self.layers}
        return TransformerConfig(codebook_size=self.codes, grid=self.grid, text_width=TEXT_WIDTH, **sizes)

    def embeds(self) -> Tensor:
        """(B, L, D_lm)."""
        return torch.randn(self.batch, self.text, TEXT_WIDTH, generator=torch.Generator().manual_seed(0))

    def tokens(self) -> Tensor:
        """(B, N)."""
        shape = self.batch, self.grid**2
        return torch.randint(self.codes, shape, generator=torch.Generator().manual_seed(1))

    def parameters(self) -> int:
        """Number of parameters of our model."""
        with torch.device("meta"):
            return count(Transformer(self.config()))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def stepping(model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype) -> Train:
    """A typical training step."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)

    def step() -> None:
        with autocast(dtype):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- ours -------------------------------------------------------------------------------------------------------------


def our_sampling(shape: Shape, dtype: torch.dtype) -> tuple[Sample, int]:
    model = Transformer(shape.config()).eval().requires_grad_(False).to(dtype)
    embeds = shape.embeds().to(dtype)
    text = Context(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))
    start = torch.full((shape.batch, shape.grid**2), model.mask_id)

    @torch.inference_mode()
    def run(steps: int) -> Tensor:
        logits_fn = guided(model, model.memory(text), model.memory(null_text(text)), GUIDANCE)
        *_, last = decode(logits_fn, start, mask_id=model.mask_id, steps=steps, choice_temperature=4.5)
        return last.tokens

    return run, count(model)


def our_training(shape: Shape, dtype: torch.dtype) -> tuple[Train, int]:
    """One step of `train_transformer`, with everything that it does."""
    model = Transformer(shape.config())
    config = StageConfig(
        steps=10**6, batch=shape.batch, learning_rate=1e-4, warmup=1, weight_decay=0.01, eval_every=10**9
    )
    texts = [[row] for row in shape.embeds()]
    engine = Engine(device="cpu", bf16=dtype == torch.bfloat16)
    steps = train_transformer(model, config, shape.tokens(), texts, engine=engine)
    return lambda: next(steps), count(model)


# --- muse-maskgit-pytorch ---------------------------------------------------------------------------------------------


class Absent(ModuleType):
    """A stub of a package: each of its attributes is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@lru_cache
def maskgit_library() -> ModuleType:
    """Import the package with stubs for what is not measured. ImportError if it is not installed."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer  # noqa: F401  imported first: with the stubs in place it would look for more

    names = ["torchvision", "torchvision.transforms", "torchvision.datasets", "torchvision.utils"]
    with patch.dict(sys.modules, {name: Absent(name) for name in [*names, "vector_quantize_pytorch", "ema_pytorch"]}):
        package = importlib.import_module("muse_maskgit_pytorch")
    inside = package.muse_maskgit_pytorch
    inside.get_encoded_dim, inside.tqdm = lambda name: TEXT_WIDTH, lambda steps, total: steps
    return package


def maskgit(shape: Shape) -> nn.Module:
    library, codes, grid = maskgit_library(), shape.codes, shape.grid

    class Codes(library.VQGanVAE):
        """Replaces the tokenizer: the output is the tokens."""

        codebook_size = codes

        def __init__(self):
            nn.Module.__init__(self)

        def copy_for_eval(self) -> "Codes":
            return self

        def get_encoded_fmap_size(self, image_size: int) -> int:
            return grid

        def decode_from_ids(self, ids: Tensor) -> Tensor:
            return ids

    sizes = {"dim": shape.width, "depth": shape.layers, "heads": shape.heads, "dim_head": shape.width // shape.heads}
    net = library.MaskGitTransformer(num_tokens=codes, seq_len=grid**2, **sizes)
    embeds = shape.embeds()
    net.encode_text = lambda texts: embeds
    return library.MaskGit(image_size=grid, transformer=net, vae=Codes(), cond_drop_prob=0.1)


def maskgit_sampling(shape: Shape, dtype: torch.dtype) -> tuple[Sample, int]:
    model = maskgit(shape)

    def run(steps: int) -> Tensor:
        with autocast(dtype):
            ids = model.generate(texts=[""] * shape.batch, timesteps=steps, cond_scale=GUIDANCE + 1)
        return ids.flatten(1)

    return run, count(model)


def maskgit_training(shape: Shape, dtype: torch.dtype) -> tuple[Train, int]:
    model, tokens, embeds = maskgit(shape), shape.tokens(), shape.embeds()
    return stepping(model, lambda: model(tokens, text_embeds=embeds), dtype), count(model)


# --- aMUSEd -----------------------------------------------------------------------------------------------------------


def amused(shape: Shape) -> nn.Module:
    from diffusers import UVit2DModel

    conv = 3 * shape.width // 4  # the published ratio: 768 channels for width 1024

    def make(layers: int) -> nn.Module:
        sizes = {"hidden_size": shape.width, "intermediate_size": 11 * shape.width // 4, "num_hidden_layers": layers}
        sizes |= {"in_channels": conv, "block_out_channels": conv, "block_num_heads": max(1, conv // 64)}
        tokens = {"vocab_size": shape.codes + 1, "codebook_size": shape.codes, "sample_size": shape.grid}
        text = {"encoder_hidden_size": TEXT_WIDTH, "cond_embed_dim": TEXT_WIDTH}
        return UVit2DModel(num_attention_heads=shape.heads, **sizes, **tokens, **text)

    with torch.device("meta"):
        one, two = count(make(1)), count(make(2))
    return make(max(1, 1 + round((shape.parameters() - one) / (two - one))))


def conditions(shape: Shape, dtype: torch.dtype, copies: int) -> dict[str, Tensor]:
    """Text, pooled text, size, crop and aesthetic score of the batch, repeated `copies` times."""
    embeds = shape.embeds().to(dtype).repeat(copies, 1, 1)
    micro = torch.tensor([16 * shape.grid, 16 * shape.grid, 0, 0, 6], dtype=dtype).expand(len(embeds), -1)
    return {"encoder_hidden_states": embeds, "pooled_text_emb": embeds.mean(1), "micro_conds": micro}


def amused_sampling(shape: Shape, dtype: torch.dtype) -> tuple[Sample, int]:
    """The decoding loop of AmusedPipeline in diffusers."""
    from diffusers import AmusedScheduler

    model, given = amused(shape).eval().to(dtype), conditions(shape, dtype, 2)
    scheduler = AmusedScheduler(mask_token_id=shape.codes)

    @torch.no_grad()
    def run(steps: int) -> Tensor:
        tokens = torch.full((shape.batch, shape.grid, shape.grid), shape.codes)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            uncond, cond = model(torch.cat([tokens, tokens]), **given).chunk(2)
            tokens = scheduler.step(uncond + (GUIDANCE + 1) * (cond - uncond), t, tokens).prev_sample
        return tokens.flatten(1)

    return run, count(model)


def amused_training(shape: Shape, dtype: torch.dtype) -> tuple[Train, int]:
    model, given, tokens = amused(shape), conditions(shape, torch.float32, 1), shape.tokens()
    square = shape.batch, shape.grid, shape.grid

    def loss() -> Tensor:
        masked = random_mask(tokens, sample_mask_rate(shape.batch))
        logits = model(tokens.masked_fill(masked, shape.codes).view(square), **given)  # (B, V, h, w)
        return F.cross_entropy(logits.float(), tokens.masked_fill(~masked, -100).view(square))

    return stepping(model, loss, dtype), count(model)


class Entrant(NamedTuple):
    sampling: Callable[[Shape, torch.dtype], tuple[Sample, int]]
    training: Callable[[Shape, torch.dtype], tuple[Train, int]]
    default: Callable[[Shape], torch.dtype]


def single(shape: Shape) -> torch.dtype:
    return torch.float32


ENTRANTS = {
    "minimuse": Entrant(our_sampling, our_training, lambda shape: pick_dtype(CPU, shape.parameters())),
    "muse-maskgit-pytorch": Entrant(maskgit_sampling, maskgit_training, single),
    "aMUSEd in diffusers": Entrant(amused_sampling, amused_training, single),
}
