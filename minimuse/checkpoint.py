"""Checkpoints on disk: safetensors and JSON, never pickles.

A finished Muse, found by shipped name, folder, or hub id:
    folder/config.json         format, configuration, words of the training captions, prompts to try
    folder/model.safetensors   the four networks; the language model is named in the configuration, not stored
    folder/README.md           the model card

A stage under way, so that a stopped run goes on to the same weights:
    stage/step-00000500/state.json      step, what the state agrees on with its run, sizes and checksums of its files
    stage/step-00000500/*.safetensors   weights, optimizer, moving average; sharded runs write a file a process

Whatever is written is written under a new name, then renamed. A state without a whole state.json does not count.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from minimuse.cache import write_whole
from minimuse.config import MuseConfig, from_dict, to_dict

SHIPPED = Path(__file__).parent / "checkpoints"
FORMAT = "minimuse-1"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
STATE, TENSORS, RUN = "state.json", "state.safetensors", "run.json"
# fields of a configuration that say nothing of what is drawn
NOT_DRAWN = ("name", "stages", "scenes", "captions", "shares", "synonyms", "pixels_gib", "text_gib", "dropout")
MODEL = "model.model."  # names of a transformer's weights in a state: MaskedLoss holds it
log = logging.getLogger("minimuse")

# --- a finished Muse --------------------------------------------------------------------------------------------------


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
    cfg = configuration(values, folder / CONFIG)
    return cfg, _parse(folder / WEIGHTS), {"words": values.get("words", []), "examples": values.get("examples", [])}


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


def _parse(path: Path) -> dict[str, Tensor]:
    try:
        return parse_weights(path.read_bytes())  # not memory-mapped: Windows does not let a mapped file be replaced
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is broken or cut short: {e}; copy or download it again") from e


def check_weights(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str | Path, cfg: str = "its config.json"
) -> None:
    """ValueError where names or shapes of weights are not those of the configuration."""
    wrong = [f"lacks {k}" for k in expected.keys() - found.keys()] + [
        f"has {k}" for k in found.keys() - expected.keys()
    ]
    for key in expected.keys() & found.keys():
        if expected[key].shape != found[key].shape:
            wrong.append(f"{key} is {tuple(found[key].shape)}, not {tuple(expected[key].shape)}")
    if wrong:
        raise ValueError(f"the weights of {str(name)!r} do not fit {cfg}: {'; '.join(sorted(wrong)[:3])}, ...")


def fingerprint(cfg: MuseConfig, weights: Mapping[str, Tensor]) -> str:
    """-> 16 hex digits, others wherever weights or defaults of drawing differ; name and training do not count.

    Fields at their defaults are left out, so that pictures stay known when a later version brings a field.
    Choice: of each tensor at most 2**17 numbers, evenly spread, as float32, so that the paper's 3B takes no longer.
    """
    sha = hashlib.sha256(json.dumps(_set(cfg), sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        some = tensor.detach().flatten()[:: max(1, tensor.numel() >> 16)]
        sha.update(name.encode() + some.float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _set(cfg: Any) -> dict[str, Any]:
    """The fields of a configuration that decide what is drawn and are not at their defaults, parts included."""
    found = {f.name: (getattr(cfg, f.name), f.default) for f in fields(cfg) if f.name not in NOT_DRAWN}
    return {k: _set(v) if is_dataclass(v) else v for k, (v, default) in found.items() if v != default}


def save(
    folder: str | Path, cfg: MuseConfig, weights: dict[str, Tensor], about: dict[str, Any], *, overwrite: bool = False
) -> Path:
    """Write a checkpoint; FileExistsError where one is already there, unless `overwrite`."""
    folder = Path(folder)
    if not overwrite:
        refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {"format": FORMAT, "config": to_dict(cfg), **about}
    write_whole(folder / WEIGHTS, lambda path: _save(weights, path))
    write_whole(folder / CONFIG, json.dumps(values, indent=1) + "\n")
    write_whole(folder / CARD, card(cfg, weights, about))
    return folder


def refuse_existing(folder: Path) -> None:
    """FileExistsError where a checkpoint would be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give a folder")
    if there := [f for f in (CONFIG, WEIGHTS, CARD) if (folder / f).exists()]:
        raise FileExistsError(f"{folder} already holds {', '.join(there)}; give another folder, or overwrite=True")


def card(cfg: MuseConfig, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """The model card: what it is, its sizes, how it was trained, how to use it."""
    parts: Counter[str] = Counter()
    for key, value in weights.items():
        parts[key.split(".")[0]] += value.numel()
    low = f"{cfg.low_tokenizer.image_size} px ({cfg.base.grid}x{cfg.base.grid} tokens)"
    high = f"{cfg.high_tokenizer.image_size} px ({cfg.superres.grid}x{cfg.superres.grid} tokens)"
    what = f"A [Muse](https://arxiv.org/abs/2301.00704) made by minimuse: {low} to {high}."
    if cfg.model != "muse":
        what = f"A rival of Muse's base model made by minimuse ({cfg.model}): {low}, no super-resolution."
    sizes = "\n".join(f"| {name} | {n:,} |" for name, n in parts.items())
    rows = [(name, f"{s.steps:,}", s.batch, f"{s.learning_rate:g}", s.optimizer) for name, s in cfg.stages.items()]
    stages = "\n".join("| {} | {} | {} | {} | {} |".format(*row) for row in rows)
    return f"""---
library_name: minimuse
pipeline_tag: text-to-image
license: apache-2.0
---
# {cfg.name}

{what}
Text: {cfg.text_encoder}, frozen.

| Part | Parameters |
|---|---|
{sizes}

Data: {about.get("data", f"{cfg.scenes:,} scenes of minimuse, {cfg.captions} captions each")}.

| Stage | Steps | Batch | Learning rate | Optimizer |
|---|---|---|---|---|
{stages}

```python
from minimuse import Muse
Muse.from_pretrained("path/to/this/folder").generate("{(about.get("examples") or ["a red cube"])[0]}")
```
"""


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Tensors into a file; safetensors' own error, as of a full disk, becomes the OSError that it stands for."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:
        code = re.search(r"(?:os error|code:) (\d+)", str(e))
        raise OSError(int(code[1]) if code else errno.EIO, str(e), str(path)) from e


# --- the state of a stage under way -----------------------------------------------------------------------------------


def states(folder: Path) -> list[Path]:
    """The states of a stage, oldest first; what a dead run left half written is not among them."""
    return sorted(p.parent for p in folder.glob(f"step-????????/{STATE}"))


def save_state(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    keep: int = 2,
    *,
    main: bool = True,
    wait: Callable[[], None] | None = None,
) -> Path:
    """Tensors and `about` -> folder/step-..., of which the newest `keep` stay (0: all).

    With `wait`, a barrier, every process of a sharded run writes its own part, and `main` does the rest.
    OSError where the disk is full; the states before it are untouched.
    """
    path = folder / f"step-{step:08d}"
    new = path.with_name(path.name + ".new")
    try:
        if main:
            shutil.rmtree(new, ignore_errors=True)  # a dead run's
            new.mkdir(parents=True)
        if wait is None:
            _save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new / TENSORS)
        else:
            wait()
            _save_sharded(tensors, new)
            wait()
        if main:
            files = {p.name: _stamp(p, flush=True) for p in sorted(new.iterdir())}
            write_whole(new / STATE, json.dumps({"step": step, "about": about, "files": files}, indent=1) + "\n")
            if path.exists():  # a damaged one, which load_state passed over
                path.rename(_free(path))
            new.rename(path)
    except OSError as e:
        if main:  # it may be what fills the disk
            shutil.rmtree(new, ignore_errors=True)
        last = states(folder)
        there = f"the last whole state is {last[-1]}" if last else "there is no earlier state"
        raise OSError(
            e.errno, f"could not save step {step} to {folder} ({e.strerror}); {there}. Mend it and --resume"
        ) from e
    for old in [s for s in states(folder) if s <= path][:-keep] if main and keep else []:  # later ones are damaged
        with suppress(OSError):  # somebody reads it (Windows)
            (old / STATE).unlink()  # first, so that one half removed no longer counts
            shutil.rmtree(old)
    return path


def load_state(folder: Path, tensors: dict[str, Tensor], about: dict[str, Any], *, sharded: bool = False) -> int:
    """Read the newest whole state into `tensors`, in place -> its step.

    A damaged one is passed over with a warning that names the damage. ValueError where none is whole, and where the
    state is of another configuration: nothing is deleted, and nothing starts anew unasked.
    """
    path, values, found = _newest(folder, read=not sharded)
    if changed := differences(values["about"], json.loads(json.dumps(about))):
        raise ValueError(f"{path} belongs to another run: {'; '.join(changed[:4])}. Put it back, or start a new run")
    if sharded:
        _load_sharded(tensors, path)
    else:
        _copy(found, tensors, path)
    return values["step"]


def load_weights(folder: Path, module: nn.Module) -> int:
    """The newest whole state of a stage -> the weights of what it trains, into a module of its kind; -> its step."""
    path, values, found = _newest(folder)  # optimizer and all: a file is read whole or not at all
    tensors = module.state_dict()
    _copy({k: found[f"model.{k}"] for k in tensors if f"model.{k}" in found}, tensors, path)
    return values["step"]


def _newest(folder: Path, read: bool = True) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The newest state whose files are all as they were written -> where, its state.json, and its tensors."""
    reasons = []
    for path in reversed(states(folder)):
        try:
            return path, _whole(path), _read(path) if read else {}
        except (OSError, ValueError) as e:
            reasons.append(str(e))
            log.warning("passed over a damaged state: %s", e)
    raise ValueError(f"no state in {folder} is whole: {'; '.join(reasons)}; restore one, or start a new run")


def _whole(path: Path) -> dict[str, Any]:
    """state.json of a state whose files are all there, byte for byte; ValueError says what is not."""
    try:
        values = json.loads((path / STATE).read_text(encoding="utf-8"))
        files = {path / name: (size, sha) for name, (size, sha) in values["files"].items()}
        if not files or path.name != f"step-{values['step']:08d}" or not values["about"]:
            raise ValueError(f"it names no files, or not the step of its folder: {values['step']}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path / STATE} is broken: {e!r}") from e
    for file, (size, sha) in files.items():
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if (found := _stamp(file)) != [size, sha]:
            raise ValueError(f"{file} has {f'{found[0]} bytes of {size}' if found[0] != size else 'changed bytes'}")
    return values


def _stamp(path: Path, flush: bool = False) -> list[Any]:
    """[bytes, SHA-256] of a file; with `flush`, it is on the disk when this returns."""
    with path.open("rb+" if flush else "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _free(path: Path) -> Path:
    return next(p for i in range(1, 1000) if not (p := path.with_name(f"{path.name}.damaged-{i}")).exists())


def _copy(found: Mapping[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    check_weights(tensors, found, path, "the run's configuration")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])  # in place: strides (channels last) and devices stay


def _save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    """torch's distributed checkpoint in safetensors: each process writes what it holds."""
    from torch.distributed import checkpoint as dcp

    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _load_sharded(tensors: dict[str, Tensor], folder: Path, alone: bool = False) -> None:
    """The same backwards, also onto another number of processes, or without any."""
    from torch.distributed import checkpoint as dcp

    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Two JSON values -> where they differ, as "config.batch was 16 and is 32"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{name}.{k}".strip("."))]
    return [] if old == new else [f"{name} was {old!r} and is {new!r}"]


# --- a run ------------------------------------------------------------------------------------------------------------


def open_run(folder: Path, values: dict[str, Any], *, resume: bool) -> None:
    """Begin a run in a folder, or go on with the one that is there, which must be of the same `values`.

    values: configuration, seed and data of the run, as JSON. FileExistsError where a run is there and `resume` is not
    set; ValueError where it is of other values; FileNotFoundError where there is nothing to resume.
    """
    path = folder / RUN
    if path.exists() and resume and (folder / CARD).exists():  # the last file of a finished run
        raise FileExistsError(f"the run in {folder} is finished; begin a new one in another folder")
    if not path.exists():
        refuse_existing(folder)
        if resume:
            raise FileNotFoundError(f"{folder} holds no {RUN}: nothing to resume there; without --resume a run begins")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(values, indent=1) + "\n")
    elif not resume:
        raise FileExistsError(
            f"{folder} holds a run already; --resume goes on with it, another folder begins a new one"
        )
    elif changed := differences(_filled(read_run(folder), path), json.loads(json.dumps(values))):
        raise ValueError(
            f"the run in {folder} is another one: {'; '.join(changed[:4])}. Put it back, or begin a new run"
        )


def _filled(run: dict[str, Any], path: Path) -> dict[str, Any]:
    """A run of an older version: what its configuration did not know yet has its default. Others stay as they are."""
    if "text_encoder" not in run["config"]:
        return run
    return run | {"config": json.loads(json.dumps(to_dict(configuration(run, path))))}


def read_run(folder: Path) -> dict[str, Any]:
    """What `open_run` wrote; ValueError where it is damaged."""
    values = read_json(folder / RUN)
    if not isinstance(values, dict) or not {"config", "seed", "data"} <= values.keys():
        raise ValueError(f"{folder / RUN} lacks config, seed or data; restore it, or begin a new run")
    return values


def average(paths: Sequence[Path], decay: float = 0.7) -> dict[str, Tensor]:
    """States of a transformer, oldest first -> the moving average of its weights (Muse 3: decay 0.7).

    avg <- decay * avg + (1 - decay) * weights, beginning with the oldest.
    """
    if not paths or not 0 <= decay < 1:
        raise ValueError(f"{len(paths)} states, decay {decay}; give at least one state, and a decay in [0, 1)")
    total: dict[str, Tensor] = {}
    for path in paths:
        _whole(path)
        weights = {k.removeprefix(MODEL): v.double() for k, v in _read(path).items() if k.startswith(MODEL)}
        total = {k: decay * total[k] + (1 - decay) * v for k, v in weights.items()} if total else weights
    return {k: v.float() for k, v in total.items()}


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a state, whole, also those that several processes wrote."""
    if (path / TENSORS).exists():
        return _parse(path / TENSORS)
    from torch.distributed import checkpoint as dcp

    known = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in known.items()}
    _load_sharded(tensors, path, alone=True)
    return tensors
