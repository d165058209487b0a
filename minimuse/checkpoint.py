"""A finished Muse on disk: safetensors and JSON, never pickles; found by shipped name, folder, or hub id.

    folder/config.json         format, configuration, words of the training captions, prompts to try
    folder/model.safetensors   the four networks; the configuration names the language model, which is not stored
    folder/README.md           the model card

Not here: training states (`train_state.py`).
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from minimuse.config import FORMAT, MuseConfig, from_dict, to_dict
from minimuse.utils import atomic_write, check, explain, require

Build = Callable[[MuseConfig], nn.ModuleDict]
SHIPPED = Path(__file__).parent / "checkpoints"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# fields of a configuration that do not change what `generate` draws
NOT_DRAWN = "name stages scenes captions fractions synonyms pixels_gib text_gib dropout edit_guidance".split()

MODEL_CARD = """---
library_name: minimuse
pipeline_tag: text-to-image
license: apache-2.0
---
# {name}

A [Muse](https://arxiv.org/abs/2301.00704) made by minimuse: {low} to {high}. Frozen language model: {text}.
Load it with `Muse.from_pretrained("path/to/this/folder")`. Settings: `config.json`. A prompt to try: "{example}".
"""


def shipped() -> list[str]:
    """Names of the Muses in the package. Other networks in its folder have another format."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}") if f'"{FORMAT}"' in p.read_text(encoding="utf-8"))


def find(name: str | Path) -> Path:
    """A shipped name, a folder or a hub id -> the folder. Only a hub id uses the network."""
    folder = SHIPPED / name if str(name) in shipped() else Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    problem = f"no checkpoint {str(name)!r}: no such folder, and the shipped ones are: {', '.join(shipped())}"
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name)[0] in "./~":
        raise FileNotFoundError(problem)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as e:  # the hub has many errors for offline, unknown, private, ...
        raise FileNotFoundError(f"{problem}; the hub gave none: {type(e).__name__}") from e


def load_networks(name: str | Path, build: Build, format: str = FORMAT) -> tuple[MuseConfig, nn.ModuleDict, dict]:
    """A checkpoint -> configuration, frozen networks, {"words": ..., "examples": ...}. Errors name what is wrong."""
    folder = find(name)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}; a checkpoint is what Muse.save_pretrained writes")
    at = folder / CONFIG
    values = read_json(at)
    values = values if isinstance(values, dict) else {}
    if values.get("format") != format:
        hint = f"; load it with {values['load_with']}" if "load_with" in values else ""  # a baseline names its class
        found = f"its format is {values.get('format')!r}, expected {format!r}{hint}"
        raise ValueError(f"{at} holds another kind of model: {found}")
    about = {k: list(check(f"{k} in {at}", values.get(k, []), tuple[str, ...])) for k in ("words", "examples")}
    config = read_configuration(at)
    check_size(config, folder, whole=format == FORMAT)
    broken = f"{folder / WEIGHTS} is broken or cut short; copy or download it again"
    with explain(broken, safetensors.SafetensorError, OSError):  # not memory-mapped: Windows cannot replace such a file
        weights = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    with torch.device("meta"):
        parts = build(config)
    if config.low_tokenizer_from:
        from minimuse.amused import published_tokenizer

        parts["low_tokenizer"] = published_tokenizer(config)
        weights |= {f"low_tokenizer.{k}": v for k, v in parts["low_tokenizer"].state_dict().items()}
    check_weights(parts.state_dict(), weights, name)
    parts.load_state_dict(weights, assign=True)
    return config, parts.eval().requires_grad_(False), about


def stored_weights(config: MuseConfig, parts: nn.ModuleDict, build: Build, dtype: torch.dtype | None) -> dict:
    """The weights that a checkpoint stores; `dtype` None keeps theirs. ValueError if they do not fit the config."""
    parts = nn.ModuleDict(parts)
    with torch.device("meta"):
        expected = build(config)
    if config.low_tokenizer_from:
        del parts["low_tokenizer"], expected["low_tokenizer"]
    weights = {k: v.to(dtype or v.dtype).cpu().contiguous() for k, v in parts.state_dict().items()}
    check_weights(expected.state_dict(), weights, config.name)
    return weights


def read_json(path: Path) -> Any:
    """The values of a JSON file. ValueError names a file that is broken."""
    with explain(f"{path} is broken JSON", ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))


def read_configuration(path: Path) -> MuseConfig:
    """The configuration in a checkpoint's config.json, a run's run.json, or a JSON file that holds nothing else."""
    values = read_json(path)
    with explain(f"{path} holds no whole configuration", ValueError):
        return from_dict(values.get("config", values) if isinstance(values, dict) else values)


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str | Path) -> None:
    """ValueError if names or shapes of weights are not those of the configuration, or numbers are not finite."""

    def kinds(weights: Mapping[str, Tensor]) -> dict[str, str]:
        return {k: f"{'floats' if x.is_floating_point() else x.dtype} {tuple(x.shape)}" for k, x in weights.items()}

    old, new = kinds(expected), kinds(found)
    changed = [k for k in old | new if old.get(k) != new.get(k)]
    wrong = [f"{k} is {new.get(k, 'missing')}, not {old.get(k, 'expected')}" for k in changed]
    wrong += [f"{k} holds NaN or infinity" for k, x in found.items() if not x.float().isfinite().all()]
    require(not wrong, f"the weights of {str(name)!r} do not fit its config.json: {'; '.join(sorted(wrong)[:3])}")


def check_size(config: MuseConfig, folder: Path, whole: bool) -> None:
    """ValueError if the networks have more parameters than the file of weights has bytes; nothing is built."""
    transformers = [config.base, config.superres] if whole else [config.base]
    tokenizers = [config.finetuned_tokenizer] if whole else []
    tokenizers += [] if config.low_tokenizer_from else [config.low_tokenizer]
    fewest = sum((c.layers + c.low_layers + c.text_layers) * c.width**2 for c in transformers)  # a layer has over D^2
    for c in tokenizers:
        fewest += sum(c.blocks) * c.width**2 + sum(c.decoder_blocks) * c.decoder_width**2 + c.width * max(c.multipliers)
    size = (folder / WEIGHTS).stat().st_size
    wrong = f"{folder / WEIGHTS} is broken or cut short: {size} bytes, and {CONFIG} has over {fewest} parameters"
    require(fewest <= size, f"{wrong}; copy or download it again")


def fingerprint(config: MuseConfig, weights: Mapping[str, Tensor]) -> str:
    """-> 16 hex digits that differ if weights or default settings differ; name and training do not count.

    Fields with their default values are left out, so a new field in a later version changes no fingerprint.
    Choice: at most 2**17 numbers of each tensor count, evenly spread, so a 3B model takes no longer.
    """

    def not_default(config: Any) -> dict[str, Any]:
        pairs = {f.name: (getattr(config, f.name), f.default) for f in fields(config) if f.name not in NOT_DRAWN}
        return {k: not_default(v) if is_dataclass(v) else v for k, (v, default) in pairs.items() if v != default}

    sha = hashlib.sha256(json.dumps(not_default(config), sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() >> 16)]
        sha.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def save(
    folder: str | Path, config: MuseConfig, weights: dict, about: dict[str, Any], *, card: str = "", overwrite: bool
) -> Path:  # fmt: skip
    """Write a checkpoint. FileExistsError if one is already there, unless `overwrite`."""
    folder = Path(folder)
    if not overwrite:
        refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"format": FORMAT, "config": to_dict(config), **about}
    atomic_write(folder / WEIGHTS, lambda path: path.write_bytes(safetensors.torch.save(weights, {"format": "pt"})))
    atomic_write(folder / CONFIG, json.dumps(values, indent=1) + "\n")
    low, high = (f"{t.image_size} px ({t.grid}x{t.grid} tokens)" for t in (config.low_tokenizer, config.high_tokenizer))
    example = (about.get("examples") or ["a red cube"])[0]
    text = {"name": config.name, "low": low, "high": high, "text": config.text_encoder or "none", "example": example}
    atomic_write(folder / CARD, (card or MODEL_CARD).format(**text, format=values["format"]))
    return folder


def refuse_existing(folder: Path) -> None:
    """FileExistsError if a checkpoint would be overwritten."""
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; give a folder")
    if existing := [f for f in (CONFIG, WEIGHTS, CARD) if (folder / f).exists()]:
        raise FileExistsError(f"{folder} already holds {', '.join(existing)}; give another folder")
