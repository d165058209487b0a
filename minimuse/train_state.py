"""A training under way on disk: its run.json and the states of its stages, so that it goes on to the same weights.

    run/run.json                        configuration, seed and data: another run is refused in this folder
    stage/step-00000500/state.json      step, what the state agrees on with its run, sizes and checksums of its files
    stage/step-00000500/*.safetensors   weights, optimizer, moving average; sharded runs write a file a process

Whatever is written is written under a new name, then renamed. A state without a whole state.json does not count.
Not here: the checkpoint of a finished Muse (`checkpoint.py`), what a state holds (`train_engine.py`).
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimuse.checkpoint import (
    CARD,
    check_weights,
    configuration,
    read_json,
    read_weights,
    refuse_existing,
    write_weights,
)
from minimuse.config import to_dict
from minimuse.utils import atomic_write

STATE, TENSORS, RUN = "state.json", "state.safetensors", "run.json"
MODEL = "model.model."  # names of a transformer's weights in a state: MaskedLoss holds it
log = logging.getLogger("minimuse")

# --- the states of a stage --------------------------------------------------------------------------------------------


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
            write_weights({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new / TENSORS)
        else:
            wait()
            _save_sharded(tensors, new)
            wait()
        if main:
            files = {p.name: stamp(p, flush=True) for p in sorted(new.iterdir())}
            atomic_write(new / STATE, json.dumps({"step": step, "about": about, "files": files}, indent=1) + "\n")
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
        if (found := stamp(file)) != [size, sha]:
            raise ValueError(f"{file} has {f'{found[0]} bytes of {size}' if found[0] != size else 'changed bytes'}")
    return values


def stamp(path: Path, flush: bool = False) -> list[Any]:
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
        atomic_write(path, json.dumps(values, indent=1) + "\n")
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
        return read_weights(path / TENSORS)
    from torch.distributed import checkpoint as dcp

    known = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in known.items()}
    _load_sharded(tensors, path, alone=True)
    return tensors
