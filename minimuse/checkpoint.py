"""A finished Muse on disk: safetensors and JSON, never pickles; found by shipped name, folder, or hub id.

    folder/config.json         format, configuration, words of the training captions, prompts to try
    folder/model.safetensors   the four networks; the language model is named in the configuration, not stored
    folder/README.md           the model card

Whatever is written is written under a new name, then renamed.
Not here: a training under way (`train_state.py`).
"""

import errno
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_weights
from safetensors.torch import save_file
from torch import Tensor

from minimuse.config import MuseConfig, from_dict, to_dict
from minimuse.utils import atomic_write

SHIPPED = Path(__file__).parent / "checkpoints"
FORMAT = "minimuse-1"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# fields of a configuration that say nothing of what is drawn
NOT_DRAWN = ("name", "stages", "scenes", "captions", "fractions", "synonyms", "pixels_gib", "text_gib", "dropout")
NOT_DRAWN += ("edit_guidance",)  # of edits alone, and each tells its own


def shipped() -> list[str]:
    """Names of the Muses in the package; what else it ships (the reader) has another format."""
    return sorted(p.parent.name for p in SHIPPED.glob(f"*/{CONFIG}") if f'"{FORMAT}"' in p.read_text(encoding="utf-8"))


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
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        came = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{folder / CONFIG} is not of minimuse: its format is {came!r}, expected {FORMAT!r}")
    config = configuration(values, folder / CONFIG)
    about = {name: values.get(name, []) for name in ("words", "examples")}
    return config, read_weights(folder / WEIGHTS), about


def read_json(path: Path) -> Any:
    """A JSON file; ValueError names it where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is broken JSON: {e}") from e


def configuration(values: Any, path: Path) -> MuseConfig:
    """The configuration in the JSON values of a file; ValueError where there is none, or a broken one."""
    try:
        return from_dict(values["config"])
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} holds no whole configuration: {e!r}") from e


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file, whole; ValueError names it where it is broken."""
    try:
        return parse_weights(path.read_bytes())  # not memory-mapped: Windows does not let a mapped file be replaced
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is broken or cut short: {e}; copy or download it again") from e


def check_weights(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str | Path, config: str = "its config.json"
) -> None:
    """ValueError where names or shapes of weights are not those of the configuration."""
    wrong = [f"lacks {k}" for k in expected.keys() - found.keys()] + [
        f"has {k}" for k in found.keys() - expected.keys()
    ]
    for key in expected.keys() & found.keys():
        if expected[key].shape != found[key].shape:
            wrong.append(f"{key} is {tuple(found[key].shape)}, not {tuple(expected[key].shape)}")
    if wrong:
        raise ValueError(f"the weights of {str(name)!r} do not fit {config}: {'; '.join(sorted(wrong)[:3])}, ...")


def fingerprint(config: MuseConfig, weights: Mapping[str, Tensor]) -> str:
    """-> 16 hex digits, others wherever weights or defaults of drawing differ; name and training do not count.

    Fields at their defaults are left out, so that pictures stay known when a later version brings a field.
    Choice: of each tensor at most 2**17 numbers, evenly spread, as float32, so that the paper's 3B takes no longer.
    """
    sha = hashlib.sha256(json.dumps(_set(config), sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        some = tensor.detach().flatten()[:: max(1, tensor.numel() >> 16)]
        sha.update(name.encode() + some.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _set(config: Any) -> dict[str, Any]:
    """The fields of a configuration that decide what is drawn and are not at their defaults, parts included."""
    found = {f.name: (getattr(config, f.name), f.default) for f in fields(config) if f.name not in NOT_DRAWN}
    return {k: _set(v) if is_dataclass(v) else v for k, (v, default) in found.items() if v != default}


def save(
    folder: str | Path,
    config: MuseConfig,
    weights: dict[str, Tensor],
    about: dict[str, Any],
    *,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint; FileExistsError where one is already there, unless `overwrite`."""
    folder = Path(folder)
    if not overwrite:
        refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"format": FORMAT, "config": to_dict(config), **about}
    atomic_write(folder / WEIGHTS, lambda path: write_weights(weights, path))
    atomic_write(folder / CONFIG, json.dumps(values, indent=1) + "\n")
    atomic_write(folder / CARD, card(config, weights, about))
    return folder


def refuse_existing(folder: Path) -> None:
    """FileExistsError where a checkpoint would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder")
    if there := [f for f in (CONFIG, WEIGHTS, CARD) if (folder / f).exists()]:
        raise FileExistsError(f"{folder} already holds {', '.join(there)}; give another folder, or overwrite=True")


def card(config: MuseConfig, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """The model card: what it is, its sizes, how it was trained, how to use it."""
    parts: Counter[str] = Counter()
    for key, value in weights.items():
        parts[key.split(".")[0]] += value.numel()
    low = f"{config.low_tokenizer.image_size} px ({config.base.grid}x{config.base.grid} tokens)"
    high = f"{config.high_tokenizer.image_size} px ({config.superres.grid}x{config.superres.grid} tokens)"
    what = f"A [Muse](https://arxiv.org/abs/2301.00704) made by minimuse: {low} to {high}."
    sizes = "\n".join(f"| {name} | {n:,} |" for name, n in parts.items())
    rows = [(name, f"{s.steps:,}", s.batch, f"{s.learning_rate:g}", s.optimizer) for name, s in config.stages.items()]
    stages = "\n".join("| {} | {} | {} | {} | {} |".format(*row) for row in rows)
    return f"""---
library_name: minimuse
pipeline_tag: text-to-image
license: apache-2.0
---
# {config.name}

{what}
Text: {config.text_encoder}, frozen.

| Part | Parameters |
|---|---|
{sizes}

Data: {about.get("data", f"{config.scenes:,} scenes of minimuse, {config.captions} captions each")}.

| Stage | Steps | Batch | Learning rate | Optimizer |
|---|---|---|---|---|
{stages}

```python
from minimuse import Muse
Muse.from_pretrained("path/to/this/folder").generate("{(about.get("examples") or ["a red cube"])[0]}")
```
"""


def write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Tensors into a file; safetensors' own error, as of a full disk, becomes the OSError that it stands for."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:
        code = re.search(r"(?:os error|code:) (\d+)", str(e))
        raise OSError(int(code[1]) if code else errno.EIO, str(e), str(path)) from e
