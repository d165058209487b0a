"""Every dial of minimuse: one frozen dataclass a component, and presets that differ in numbers alone.

    preset("nano")        32 px f=4 (8x8 tokens)    -> 64 px f=4 (16x16 tokens); trains on 2 CPU cores in minutes
    preset("toy")         64 px f=8 (8x8 tokens)    -> 128 px f=4 (32x32 tokens): the paper's 16-fold token ratio
    preset("paper_632m")  256 px f=16 (16x16 tokens) -> 512 px f=8 (64x64 tokens); 632M base, 268M super-resolution
    preset("paper_3b")    the same grids; Muse A.1 to A.3: 3B base

Nonsense is refused when a configuration is made, with the mend in the message.
Glossary: f = downsampling, V = codebook_size, D = width, t = guidance scale, r = mask ratio.
"""

import dataclasses
import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

from minimuse.sampler import SamplingConfig
from minimuse.transformer import TransformerConfig
from minimuse.utils import require, require_positive
from minimuse.vqgan import VQGANConfig


@dataclass(frozen=True)
class StageConfig:
    """How one stage trains."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    weight_decay: float
    optimizer: str = "adamw"  # "adafactor", the paper's for its transformers (A.1), or "muon"
    betas: tuple[float, float] = (0.9, 0.96)
    clip: float = 1.0  # largest gradient norm
    crop: int = 0  # tokenizers: side of the training crops in pixels; 0 is the whole image
    label_smoothing: float = 0.0  # Choice: the paper is silent; MaskGIT takes 0.1
    cond_drop_prob: float = 0.1  # share of the examples without text (Muse 2.7)
    text_lr_scale: float = 1.0  # the text projection's learning rate, as a share of all others'
    mask_schedule: str = "cosine"  # r = cos(pi u / 2), u uniform (Muse 2.6)
    perceptual_weight: float = 0.05  # tokenizers (A.2)
    adversarial_weight: float = 0.1  # tokenizers (A.2)
    adversarial_start: int = 0  # step at which the adversarial loss joins
    ema: float = 0.0  # decay of a moving average of the weights, which then are the result; 0 is none, as in the paper
    save_every: int = 500  # steps from one saved state to the next
    eval_every: int = 500  # steps from one validation and sample grid to the next

    def __post_init__(self):
        require_positive(self, "steps", "batch", "save_every", "eval_every")
        known = ("adamw", "adafactor", "muon")
        require(self.optimizer in known, f"unknown optimizer {self.optimizer!r}; known: {', '.join(known)}")
        require(self.learning_rate > 0, f"learning rate {self.learning_rate} is not positive")
        require(0 <= self.cond_drop_prob <= 1, f"cond_drop_prob {self.cond_drop_prob} is not in [0, 1]")
        require(0 <= self.text_lr_scale <= 1, f"text_lr_scale {self.text_lr_scale} is not in [0, 1]")
        require(0 <= self.ema < 1, f"ema {self.ema} is not in [0, 1)")


@dataclass(frozen=True)
class MuseConfig:
    """A whole Muse: two tokenizers, two transformers, a language model, and how each stage trains and decodes."""

    name: str
    text_encoder: str  # hub id, folder, or "all-MiniLM-L6-v2"
    text_tokens: int  # longest prompt, in tokens of the language model
    low_tokenizer: VQGANConfig
    high_tokenizer: VQGANConfig
    base: TransformerConfig
    superres: TransformerConfig
    base_sampling: SamplingConfig
    superres_sampling: SamplingConfig
    finetuned_width: int  # the decoder of Muse 2.5
    finetuned_blocks: tuple[int, ...]
    scenes: int  # training scenes rendered, if the data are scenes
    captions: int  # captions a scene
    fractions: tuple[float, float, float] = (45, 35, 20)  # of scenes with 1, 2 and 3 things
    synonyms: float = 0.0  # share of the scenes' captions told in other words too (captions.SYNONYMS)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    low_tokenizer_from: str = ""  # a diffusers VQModel, hub id or folder, in place of training one (`amused.py`)
    pixels_gib: float = 32.0  # Choice: images kept as pixels, enough to train tokenizers on; the rest is read once more
    text_gib: float = 64.0  # embedded captions kept on disk; where they need more, they are encoded at every step
    edit_guidance: float = 4.0  # t of a mask-free edit; the paper's (3.3.2)

    @property
    def finetuned_tokenizer(self) -> VQGANConfig:
        """The high tokenizer with the bigger decoder of Muse 2.5."""
        return replace(self.high_tokenizer, decoder_width=self.finetuned_width, decoder_blocks=self.finetuned_blocks)

    def __post_init__(self):
        low, high, base, sr = self.low_tokenizer, self.high_tokenizer, self.base, self.superres
        pairs = [
            ("base.codebook_size", base.codebook_size, "low_tokenizer.codebook_size", low.codebook_size),
            ("superres.codebook_size", sr.codebook_size, "high_tokenizer.codebook_size", high.codebook_size),
            ("superres.low_codebook_size", sr.low_codebook_size, "low_tokenizer.codebook_size", low.codebook_size),
            ("base.grid", base.grid, "low_tokenizer.grid", low.grid),
            ("superres.grid", sr.grid, "high_tokenizer.grid", high.grid),
            ("superres.low_grid", sr.low_grid, "low_tokenizer.grid", low.grid),
            ("superres.text_width", sr.text_width, "base.text_width", base.text_width),
        ]
        for a, x, b, y in pairs:
            require(x == y, f"{a} is {x} but {b} is {y}; make them equal")
        ok = high.image_size % low.image_size == 0
        mend = "take a multiple, since the low-resolution image is the decimated high-resolution one"
        require(ok, f"high image size {high.image_size} is not a multiple of the low {low.image_size}; {mend}")
        ok = self.finetuned_width >= high.decoder_width and all(
            a >= b for a, b in zip(self.finetuned_blocks, high.decoder_blocks, strict=True)
        )
        require(ok, "the fine-tuned decoder is smaller than high_tokenizer's; give at least its width and blocks")
        require(self.edit_guidance >= 0, f"edit_guidance {self.edit_guidance} is negative; give 0 or more")
        require(0 <= self.synonyms <= 1, f"synonyms {self.synonyms} is not in [0, 1]; give a share")


STAGES = ("low_tokenizer", "base", "high_tokenizer", "superres", "decoder")


def _square(width: int, multiplier: int = 4) -> dict[str, int]:
    return {"width": width, "mlp_width": multiplier * width}


def nano() -> MuseConfig:
    """32 px -> 64 px, about 3.4M parameters: trains from nothing on 2 CPU cores while a student watches."""
    low = VQGANConfig(
        image_size=32, codebook_size=256, code_dim=4, width=16, multipliers=(1, 2, 4), blocks=(1, 1, 2),
        decoder_width=16, decoder_blocks=(1, 1, 2),
    )  # fmt: skip
    base = TransformerConfig(codebook_size=256, grid=8, text_width=384, layers=4, heads=4, **_square(128))
    # small batches: with minutes at hand, the number of steps counts
    tokenizing = StageConfig(
        steps=1250, batch=16, learning_rate=3e-3, warmup=30, weight_decay=1e-4, betas=(0.9, 0.99),
        perceptual_weight=0.0, adversarial_weight=0.0, eval_every=1000,
    )  # fmt: skip
    masked = StageConfig(
        steps=1700, batch=16, learning_rate=5e-3, warmup=100, weight_decay=0.045, betas=(0.9, 0.99),
        optimizer="muon", eval_every=1000,
    )  # fmt: skip
    drawing = SamplingConfig(steps=16, guidance=(0.0, 3.0), sampling_temperature=0.7)
    return MuseConfig(
        name="nano",
        text_encoder="all-MiniLM-L6-v2",
        text_tokens=64,
        low_tokenizer=low,
        high_tokenizer=replace(low, image_size=64, blocks=(1, 1, 1), decoder_blocks=(1, 1, 1)),
        base=base,
        superres=replace(base, grid=16, layers=3, block=4, low_layers=1, low_grid=8, low_codebook_size=256),
        base_sampling=drawing,
        superres_sampling=replace(drawing, guidance=(1.0, 3.0), sampling_temperature=0.4, choice_temperature=0.5),
        finetuned_width=32,
        finetuned_blocks=(2, 2, 1),
        scenes=5000,
        captions=2,
        fractions=(67, 24, 9),
        stages={
            "low_tokenizer": tokenizing,
            "base": masked,
            "high_tokenizer": replace(tokenizing, steps=1100, batch=8),
            "superres": replace(masked, batch=8),
            "decoder": replace(tokenizing, steps=300, batch=4, learning_rate=1e-3),
        },
    )


def toy() -> MuseConfig:
    """64 px f=8 -> 128 px f=4: the paper's 16-fold token ratio; an hour and a half of steps on 2 CPU cores."""
    small = nano()
    low = replace(
        small.low_tokenizer, image_size=64, codebook_size=512, code_dim=16,
        multipliers=(1, 2, 4, 8), blocks=(1, 1, 1, 2), decoder_blocks=(1, 1, 1, 2),
    )  # fmt: skip
    fine = {"multipliers": (1, 2, 4), "blocks": (0, 1, 2), "decoder_blocks": (0, 1, 2)}
    tokenizing = replace(small.stages["low_tokenizer"], steps=7000, perceptual_weight=0.05)
    masked = replace(small.stages["base"], batch=64)
    late = {"adversarial_weight": 0.1, "adversarial_start": 200}
    return MuseConfig(
        name="toy",
        text_encoder="all-MiniLM-L6-v2",
        text_tokens=64,
        low_tokenizer=low,
        high_tokenizer=replace(low, image_size=128, **fine),
        # MiniLM's vectors hardly say what stands where: one layer over the text tells it (benchmarks/binding.md)
        base=replace(small.base, codebook_size=512, layers=6, text_layers=1, **_square(192)),
        superres=replace(small.superres, codebook_size=512, grid=32, layers=4, block=8, low_codebook_size=512),
        base_sampling=SamplingConfig(steps=16, guidance=(1.0, 3.0), sampling_temperature=0.3, choice_temperature=2.0),
        # no guidance: the low tokens say what is there, and t from 1 to 3 melted outlines
        superres_sampling=SamplingConfig(steps=8, guidance=(0.0, 0.0), sampling_temperature=0.4),
        finetuned_width=32,
        finetuned_blocks=(1, 2, 2),
        edit_guidance=1.0,  # Deviation: with the paper's 4 a hundred iterations redraw shape and size too
        scenes=60_000,
        captions=4,
        fractions=(25, 55, 20),
        synonyms=0.5,
        stages={
            "low_tokenizer": tokenizing,
            "base": replace(masked, steps=10_000, text_lr_scale=0.1),
            "high_tokenizer": replace(tokenizing, steps=2500, batch=8),
            "superres": replace(masked, steps=3000, batch=8),
            "decoder": replace(tokenizing, steps=500, batch=8, learning_rate=1e-3, **late),
        },
    )


def _paper(name: str, base: dict[str, int], superres: dict[str, int]) -> MuseConfig:
    """What the paper's models share (2.2, A.1 to A.3)."""
    low = VQGANConfig(
        image_size=256, codebook_size=8192, code_dim=256, width=128, multipliers=(1, 1, 2, 2, 4), blocks=(2,) * 5,
        decoder_width=128, decoder_blocks=(2,) * 5,
    )  # fmt: skip
    fine = {"multipliers": (1, 1, 2, 4), "blocks": (2,) * 4, "decoder_blocks": (2,) * 4}
    tokens = {"codebook_size": 8192, "text_width": 4096}
    tokenizing = StageConfig(
        steps=1_000_000, batch=256, learning_rate=1e-4, warmup=10_000, weight_decay=1e-4, betas=(0.9, 0.99),
        crop=256, adversarial_start=250_000,
    )  # fmt: skip
    masked = StageConfig(
        steps=1_500_000, batch=512, learning_rate=1e-4, warmup=5_000, weight_decay=0.045, optimizer="adafactor"
    )
    return MuseConfig(
        name=name,
        text_encoder="google/t5-v1_1-xxl",
        text_tokens=128,
        low_tokenizer=low,
        high_tokenizer=replace(low, image_size=512, **fine),
        base=TransformerConfig(**tokens, grid=16, **base),
        superres=TransformerConfig(**tokens, grid=64, block=8, low_grid=16, low_codebook_size=8192, **superres),
        base_sampling=SamplingConfig(steps=24, guidance=(0.0, 8.0)),
        superres_sampling=SamplingConfig(steps=8, guidance=(0.0, 4.0)),
        finetuned_width=256,
        finetuned_blocks=(4,) * 4,
        scenes=1_000_000,
        captions=4,
        stages={
            "low_tokenizer": tokenizing,
            "base": masked,
            "high_tokenizer": tokenizing,
            "superres": replace(masked, steps=1_000_000),
            "decoder": replace(tokenizing, adversarial_start=0),
        },
    )


def paper_632m() -> MuseConfig:
    """The paper's smaller pair: 632M base, 268M super-resolution. Choice: their shapes are not stated; ours match."""
    base = {"layers": 36, "heads": 16, **_square(1024)}
    return _paper("paper_632m", base, {"layers": 20, "heads": 12, "low_layers": 8, **_square(768)})


def paper_3b() -> MuseConfig:
    """The 3B base (A.1: 48 layers, 2048, 8192) and its super-resolution (A.3: 32 + 16 layers, 1024, 4096)."""
    base = {"layers": 48, "heads": 32, **_square(2048)}
    return _paper("paper_3b", base, {"layers": 32, "heads": 16, "low_layers": 16, **_square(1024)})


PRESETS = {f.__name__: f for f in (nano, toy, paper_632m, paper_3b)}


def preset(name: str) -> MuseConfig:
    """A preset by name."""
    require(name in PRESETS, f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()


def changed(config: MuseConfig, changes: list[str]) -> MuseConfig:
    """A configuration with fields set by "path=value", the value in JSON: "stages.base.steps=500", "base.width=192".

    ValueError where there is no such field, or where the whole no longer fits together.
    """
    values = to_dict(config)
    for change in changes:
        path, equals, text = change.partition("=")
        require(bool(equals), f"{change!r} sets nothing; give PATH=VALUE, such as stages.base.steps=500")
        *parents, last = path.split(".")
        here: Any = values
        for name in parents:
            here = here.get(name) if isinstance(here, dict) else None
        require(isinstance(here, dict) and last in here, f"no field {path!r}; known: {', '.join(_leaves(values))}")
        try:
            here[last] = json.loads(text)
        except ValueError:
            here[last] = text
    return from_dict(values)


def _leaves(values: Any, name: str = "") -> list[str]:
    """The paths of all fields, as "stages.base.steps"."""
    if not isinstance(values, dict):
        return [name]
    return [leaf for key, value in values.items() for leaf in _leaves(value, f"{name}.{key}".strip("."))]


def to_dict(config: MuseConfig) -> dict[str, Any]:
    """A configuration as plain JSON values; `from_dict` undoes it."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> MuseConfig:
    """A configuration from `to_dict`'s values. ValueError where a field is missing, unknown or nonsense."""
    values = _fields(MuseConfig, values)
    for name, cls in ((f.name, f.type) for f in fields(MuseConfig) if dataclasses.is_dataclass(f.type)):
        values[name] = cls(**_fields(cls, values[name]))
    values["stages"] = {name: StageConfig(**_fields(StageConfig, v)) for name, v in values["stages"].items()}
    return MuseConfig(**values)


def _fields(cls: type, values: Any) -> dict[str, Any]:
    """JSON values -> arguments of a dataclass, lists as tuples; refuses a missing or an unknown field."""
    require(isinstance(values, dict), f"{cls.__name__} is {values!r}; expected an object of its fields")
    known = {f.name for f in fields(cls)}
    needed = {f.name for f in fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    for wrong, names in (("lacks", needed - set(values)), ("does not know", set(values) - known)):
        require(not names, f"{cls.__name__} {wrong} {', '.join(sorted(names))}; was it written by another version?")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
