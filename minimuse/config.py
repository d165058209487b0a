"""The configuration of a whole Muse, how each stage trains, and the presets, which differ only in numbers.

Not here: the configuration of one component, which stands in its file, above the class that reads it.
"""

from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal

from minimuse.masking import ScheduleName
from minimuse.sampler import SamplingConfig
from minimuse.text import TextTokens
from minimuse.transformer import TransformerConfig
from minimuse.utils import Checked, Decay, Fraction, Natural, NonNegative, Positive, PositiveInt, Size, check, require
from minimuse.vqgan import GROUP, VQGANConfig

FORMAT = "minimuse-1"  # of a checkpoint
STAGES = ("low_tokenizer", "base", "high_tokenizer", "superres", "decoder")
EQUAL = (  # fields of MuseConfig that must agree
    ("base.codebook_size", "low_tokenizer.codebook_size"),
    ("superres.codebook_size", "high_tokenizer.codebook_size"),
    ("superres.low_codebook_size", "low_tokenizer.codebook_size"),
    ("base.grid", "low_tokenizer.grid"),
    ("superres.grid", "high_tokenizer.grid"),
    ("superres.low_grid", "low_tokenizer.grid"),
    ("superres.text_width", "base.text_width"),
)


@dataclass(frozen=True)
class StageConfig(Checked):
    """How one stage trains."""

    steps: Natural  # 0: the stage is left out, as in fine-tuning
    batch: Size
    learning_rate: Positive
    warmup: Natural
    weight_decay: NonNegative
    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"  # the paper: adafactor for its transformers (A.1)
    betas: tuple[Decay, Decay] = (0.9, 0.96)
    clip: Positive = 1.0  # largest gradient norm
    crop: Natural = 0  # tokenizers: side of the training crops in pixels; 0 is the whole image
    label_smoothing: Decay = 0.0  # Choice: the paper is silent; MaskGIT has 0.1
    cond_drop_prob: Fraction = 0.1  # fraction of the examples without text (Muse 2.7)
    text_lr_scale: Fraction = 1.0  # learning rate of the text projection, relative to all others
    mask_schedule: ScheduleName = "cosine"  # r = cos(pi u / 2), u uniform (Muse 2.6)
    perceptual: Literal["scenes", "lpips", "none"] = "scenes"  # tokenizers: network of the perceptual loss
    perceptual_weight: NonNegative = 0.05  # tokenizers (A.2)
    adversarial_weight: NonNegative = 0.1  # tokenizers (A.2)
    adversarial_start: Natural = 0  # step at which the adversarial loss starts
    discriminator_width: Size = 32  # tokenizers: channels of the discriminator's first layer
    ema: Decay = 0.0  # decay of a moving average of the weights, which becomes the result; 0 is none
    save_every: PositiveInt = 500  # steps between saved states
    eval_every: PositiveInt = 500  # steps between validations and sample grids


@dataclass(frozen=True)
class MuseConfig(Checked):
    """A whole Muse: two tokenizers, two transformers, a language model, and how each stage trains and decodes."""

    name: str
    text_encoder: str  # hub id, folder, "all-MiniLM-L6-v2", or "": every text is removed, in training and sampling
    text_tokens: TextTokens  # longest prompt, in tokens of the language model
    low_tokenizer: VQGANConfig
    high_tokenizer: VQGANConfig
    base: TransformerConfig
    superres: TransformerConfig
    base_sampling: SamplingConfig
    superres_sampling: SamplingConfig
    finetuned_width: Size  # the decoder of Muse 2.5
    finetuned_blocks: tuple[Natural, ...]
    scenes: PositiveInt  # number of training scenes, if the data are scenes
    captions: PositiveInt  # captions per scene
    fractions: tuple[NonNegative, NonNegative, NonNegative] = (45, 35, 20)  # of scenes with 1, 2 and 3 objects
    synonyms: Fraction = 0.0  # fraction of the captions that also use other words (data_captions.SYNONYMS)
    stages: dict[Literal[STAGES], StageConfig] = field(default_factory=dict)
    low_tokenizer_from: str = ""  # a trained diffusers VQModel, hub id or folder, in place of our own (`amused.py`)
    pixels_gib: NonNegative = 32.0  # images cached as pixels, enough for the tokenizers; others are read twice
    text_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the language model; auto is bfloat16 on GPUs
    text_device: Literal["", "cpu"] = ""  # of the language model; "" is that of the networks
    text_gib: NonNegative = 64.0  # embedded captions cached on disk; beyond it they are encoded at every step
    edit_guidance: float = 4.0  # t of a mask-free edit; the paper's (3.3.2)

    @property
    def finetuned_tokenizer(self) -> VQGANConfig:
        """The high tokenizer with the bigger decoder of Muse 2.5."""
        return replace(self.high_tokenizer, decoder_width=self.finetuned_width, decoder_blocks=self.finetuned_blocks)

    def __post_init__(self):
        super().__post_init__()
        for a, b in EQUAL:
            x, y = attrgetter(a, b)(self)
            require(x == y, f"{a} is {x} but {b} is {y}; make them equal")
        low, high = self.low_tokenizer, self.high_tokenizer
        fits = high.image_size % low.image_size == 0
        require(fits, f"high_tokenizer.image_size is {high.image_size}; give a multiple of {low.image_size}")
        fits = self.finetuned_width >= high.decoder_width and self.finetuned_width % GROUP == 0
        require(fits, f"finetuned_width is {self.finetuned_width}; give a multiple of {GROUP}, >= {high.decoder_width}")
        more = [a >= b for a, b in zip(self.finetuned_blocks, high.decoder_blocks, strict=False)]
        fits = all(more) and len(self.finetuned_blocks) == len(high.decoder_blocks)
        require(fits, f"finetuned_blocks is {self.finetuned_blocks}; give {high.decoder_blocks}, or larger numbers")
        for name, stage in self.stages.items():
            side = max(8, low.downsampling if name == "low_tokenizer" else high.downsampling)  # 8: the discriminator's
            require(stage.crop % side == 0, f"stages.{name}.crop is {stage.crop}; give a multiple of {side}, or 0")
        require(sum(self.fractions) > 0, "fractions are all 0; give at least one above 0")


def nano() -> MuseConfig:
    """32 px (8x8 tokens) -> 64 px (16x16 tokens), 3.4M parameters: trains on 2 CPU cores in minutes."""
    low = VQGANConfig(
        image_size=32, codebook_size=256, code_dim=4, width=16, multipliers=(1, 2, 4), blocks=(1, 1, 2),
        decoder_width=16, decoder_blocks=(1, 1, 2),
    )  # fmt: skip
    base = TransformerConfig(codebook_size=256, grid=8, text_width=384, width=128, layers=4, heads=4, mlp_width=512)
    tokenizing = StageConfig(
        steps=1250, batch=16, learning_rate=3e-3, warmup=30, weight_decay=1e-4, betas=(0.9, 0.99),
        perceptual_weight=0.0, adversarial_weight=0.0, eval_every=1000,
    )  # fmt: skip
    masked = StageConfig(
        steps=1700, batch=16, learning_rate=5e-3, warmup=100, weight_decay=0.045, betas=(0.9, 0.99),
        optimizer="muon", eval_every=1000,
    )  # fmt: skip
    sampling = SamplingConfig(steps=16, guidance=(0.0, 3.0), sampling_temperature=0.7)
    return MuseConfig(
        name="nano", text_encoder="all-MiniLM-L6-v2", text_tokens=64,
        scenes=5000, captions=2, fractions=(67, 24, 9),
        low_tokenizer=low,
        high_tokenizer=replace(low, image_size=64, blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)),
        finetuned_width=32, finetuned_blocks=(2, 2, 1),
        base=base,
        superres=replace(base, grid=16, layers=3, block=4, low_layers=1, low_grid=8, low_codebook_size=256, draft=True),
        base_sampling=sampling,
        # Deviation: no guidance, because the low tokens already say what is in the picture (benchmarks/choices.md)
        superres_sampling=SamplingConfig(steps=8, guidance=(0.0, 0.0), sampling_temperature=0.0),
        stages={
            "low_tokenizer": tokenizing, "base": masked,
            "high_tokenizer": replace(tokenizing, steps=1100, batch=8), "superres": replace(masked, batch=8),
            "decoder": replace(tokenizing, steps=300, batch=4, learning_rate=1e-3),
        },
    )  # fmt: skip


def toy() -> MuseConfig:
    """64 px (8x8 tokens) -> 128 px (32x32 tokens), the paper's 16-fold ratio: trains on 2 CPU cores in hours."""
    small = nano()
    low = replace(
        small.low_tokenizer, image_size=64, codebook_size=512, code_dim=16,
        multipliers=(1, 2, 4, 8), blocks=(1, 1, 1, 2), decoder_blocks=(1, 1, 1, 2),
    )  # fmt: skip
    tokenizing = replace(small.stages["low_tokenizer"], steps=7000, perceptual_weight=0.05)
    masked = replace(small.stages["base"], batch=64)
    return replace(
        small, name="toy",
        scenes=60_000, captions=4, fractions=(25, 55, 20), synonyms=0.5,
        low_tokenizer=low,
        high_tokenizer=replace(low, image_size=128, multipliers=(1, 2, 4), blocks=(0, 1, 2), decoder_blocks=(0, 1, 2)),
        finetuned_blocks=(1, 2, 2),
        # Deviation: one text layer, because MiniLM's vectors hardly tell the order of words (benchmarks/binding.md)
        base=replace(small.base, codebook_size=512, layers=6, text_layers=1, width=192, mlp_width=768),
        superres=replace(small.superres, codebook_size=512, grid=32, layers=4, block=8, low_codebook_size=512),
        base_sampling=SamplingConfig(steps=24, guidance=(1.0, 3.0), sampling_temperature=0.3, choice_temperature=2.0),
        edit_guidance=1.0,  # Deviation: with the paper's 4, a hundred iterations change shape and size too
        stages={
            "low_tokenizer": tokenizing, "base": replace(masked, steps=10_000, text_lr_scale=0.1),
            "high_tokenizer": replace(tokenizing, steps=2500, batch=8),
            "superres": replace(masked, steps=1200, batch=8),
            # Deviation: no adversarial loss; the discriminator learns nothing here (notebook 9)
            "decoder": replace(tokenizing, steps=2300, batch=8, learning_rate=5e-4, perceptual_weight=0.5),
        },
    )  # fmt: skip


def paper_3b() -> MuseConfig:
    """256 px (16x16 tokens) -> 512 px (64x64 tokens): the paper's large pair, base 3B (2.2, A.1 to A.3).

    Choice: the paper is silent on code_dim, text_tokens, heads (64 channels each), block, crop, adversarial_start (a
    quarter of the steps), discriminator_width (VQGAN's), the ranking noise (MaskGIT's 4.5) and both guidance scales.
    """
    low = VQGANConfig(
        image_size=256, codebook_size=8192, code_dim=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=(2,) * 5,
        decoder_width=128, decoder_blocks=(2,) * 5,
    )  # fmt: skip
    smaller = {"width": 1024, "layers": 32, "heads": 16, "mlp_width": 4096}
    larger = {"width": 2048, "layers": 48, "heads": 32, "mlp_width": 8192}
    base = TransformerConfig(codebook_size=8192, grid=16, text_width=4096, **larger)
    tokenizing = StageConfig(
        steps=1_000_000, batch=256, learning_rate=1e-4, warmup=10_000, weight_decay=1e-4, betas=(0.9, 0.99),
        perceptual="lpips", discriminator_width=64, crop=256, adversarial_start=250_000,
        save_every=5000, eval_every=5000,  # as the paper's averages need (A.1)
    )  # fmt: skip
    masked = StageConfig(
        steps=1_500_000, batch=512, learning_rate=1e-4, warmup=5_000, weight_decay=0.045, optimizer="adafactor",
        save_every=5000, eval_every=5000,
    )  # fmt: skip
    return MuseConfig(
        name="paper_3b", text_encoder="google/t5-v1_1-xxl", text_tokens=128,
        scenes=1_000_000, captions=4,
        low_tokenizer=low,
        high_tokenizer=replace(low, image_size=512, multipliers=(1, 1, 2, 4), blocks=(2,) * 4, decoder_blocks=(2,) * 4),
        finetuned_width=256, finetuned_blocks=(4,) * 4,
        base=base,
        superres=replace(base, grid=64, block=8, low_layers=16, low_grid=16, low_codebook_size=8192, **smaller),
        base_sampling=SamplingConfig(steps=24, guidance=(0.0, 8.0)),
        superres_sampling=SamplingConfig(steps=8, guidance=(0.0, 4.0)),
        stages={
            "low_tokenizer": tokenizing, "base": masked,
            "high_tokenizer": tokenizing, "superres": replace(masked, steps=1_000_000),
            "decoder": replace(tokenizing, adversarial_start=0),
        },
    )  # fmt: skip


def paper_632m() -> MuseConfig:
    """The paper's smaller pair: 632M base, 268M super-resolution. Choice: their shapes are not stated; ours match."""
    large = paper_3b()
    base = replace(large.base, width=1024, layers=36, heads=16, mlp_width=4096)
    superres = replace(large.superres, width=768, layers=20, heads=12, mlp_width=3072, low_layers=8)
    return replace(large, name="paper_632m", base=base, superres=superres)


PRESETS = {f.__name__: f for f in (nano, toy, paper_632m, paper_3b)}


def preset(name: str) -> MuseConfig:
    """A preset by name."""
    require(isinstance(name, str) and name in PRESETS, f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()


to_dict = asdict  # a configuration as plain JSON values


def from_dict(values: dict[str, Any]) -> MuseConfig:
    """The values of `to_dict` -> a configuration."""
    return check("MuseConfig", values, MuseConfig)
