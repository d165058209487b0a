"""Checkpoints on disk: safetensors and JSON, never pickles.

    folder/config.json         format, configuration, words of the training captions, prompts to try
    folder/model.safetensors   the four networks; the language model is named in the configuration, not stored
    folder/README.md           the model card

A checkpoint is found by shipped name, folder, or hub id. Files are written under a new name, then renamed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_weights
from safetensors.torch import save_file
from torch import Tensor

from minimuse.config import MuseConfig, from_dict, to_dict

SHIPPED = Path(__file__).parent / "checkpoints"
FORMAT = "minimuse-1"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def shipped() -> list[str]:
    """Names of the checkpoints in the package."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}"))


def find(name: str | Path) -> Path:
    """A shipped name, a folder or a hub id -> the folder; only a hub id asks the network, or its cache."""
    if str(name) in shipped():
        return SHIPPED / name
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    known = ", ".join(shipped())
    if isinstance(name, Path) or str(name).count("/") != 1 or str(name)[0] in "./~":
        raise FileNotFoundError(f"no checkpoint {str(name)!r}: no such folder, and the shipped ones are: {known}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as e:  # offline, unknown, private, ...: the hub has many errors, the mend is the same
        raise FileNotFoundError(
            f"no checkpoint {name!r}: no such folder, and the hub gave none ({type(e).__name__}); shipped: {known}"
        ) from e


def load(name: str | Path) -> tuple[MuseConfig, dict[str, Tensor], dict[str, Any]]:
    """-> configuration, weights, and {"words": ..., "examples": ...}. ValueError says which file is broken, and how."""
    folder = find(name)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}; a checkpoint is what Muse.save_pretrained writes")
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{folder / CONFIG} is broken JSON: {e}") from e
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        came = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{folder / CONFIG} is not of minimuse: its format is {came!r}, expected {FORMAT!r}")
    try:
        cfg = from_dict(values["config"])
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder / CONFIG} holds no whole configuration: {e}") from e
    try:
        # read, not memory-mapped: Windows does not let a mapped file be replaced
        weights = parse_weights((folder / WEIGHTS).read_bytes())
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{folder / WEIGHTS} is broken or cut short: {e}; copy or download it again") from e
    return cfg, weights, {"words": values.get("words", []), "examples": values.get("examples", [])}


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str | Path) -> None:
    """ValueError where names or shapes of weights are not those of the configuration."""
    wrong = [f"lacks {k}" for k in expected.keys() - found.keys()] + [
        f"has {k}" for k in found.keys() - expected.keys()
    ]
    for key in expected.keys() & found.keys():
        if expected[key].shape != found[key].shape:
            wrong.append(f"{key} is {tuple(found[key].shape)}, not {tuple(expected[key].shape)}")
    if wrong:
        raise ValueError(
            f"the weights of {str(name)!r} do not fit its config.json: {'; '.join(sorted(wrong)[:3])}, ..."
        )


def save(
    folder: str | Path, cfg: MuseConfig, weights: dict[str, Tensor], about: dict[str, Any], *, overwrite: bool = False
) -> Path:
    """Write a checkpoint; FileExistsError where one is already there, unless `overwrite`."""
    folder = Path(folder)
    if not overwrite:
        refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"format": FORMAT, "config": to_dict(cfg), **about}
    _replace(folder / WEIGHTS, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda path: path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8"))
    _replace(folder / CARD, lambda path: path.write_text(card(cfg, weights, about), encoding="utf-8"))
    return folder


def refuse_existing(folder: Path) -> None:
    """FileExistsError where a checkpoint would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder")
    if there := [f for f in (CONFIG, WEIGHTS, CARD) if (folder / f).exists()]:
        raise FileExistsError(f"{folder} already holds {', '.join(there)}; give another folder, or overwrite=True")


def card(cfg: MuseConfig, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """The model card: what it is, its sizes, how it was trained, how to use it."""
    parts: dict[str, int] = {}
    for key, value in weights.items():
        part = key.split(".")[0]
        parts[part] = parts.get(part, 0) + value.numel()
    size = f"{cfg.low_tokenizer.image_size} px ({cfg.base.grid}x{cfg.base.grid} tokens)"
    high = f"{cfg.high_tokenizer.image_size} px ({cfg.superres.grid}x{cfg.superres.grid} tokens)"
    lines = [
        "---",
        "library_name: minimuse",
        "pipeline_tag: text-to-image",
        "license: apache-2.0",
        "---",
        f"# {cfg.name}",
        "",
        f"A [Muse](https://arxiv.org/abs/2301.00704) made by minimuse: {size} to {high}.",
        f"Text: {cfg.text_encoder}, frozen.",
        "",
        "| Part | Parameters |",
        "|---|---|",
        *(f"| {name} | {n:,} |" for name, n in parts.items()),
        "",
        f"Data: {about.get('data', f'{cfg.scenes:,} scenes of minimuse, {cfg.captions} captions each')}.",
        "",
        "| Stage | Steps | Batch | Learning rate |",
        "|---|---|---|---|",
        *(f"| {name} | {s.steps:,} | {s.batch} | {s.learning_rate:g} |" for name, s in cfg.stages.items()),
        "",
        "```python",
        "from minimuse import Muse",
        f'Muse.from_pretrained("path/to/this/folder").generate("{(about.get("examples") or ["a red cube"])[0]}")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _replace(path: Path, write) -> None:
    """Write beside `path`, then rename: never half a file, never one changed under a reader's memory map."""
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)
