"""A run on disk: its run.json and the training states of its stages, from which it resumes to the same weights.

    run/run.json                        configuration, seed and data; the folder refuses any other run
    stage/step-00000500/*.distcp        weights, optimizer, moving average, by torch.distributed.checkpoint
    stage/step-00000500/state.json      the step, the settings that a resuming run must share, each file's SHA-256

A state is written into a new folder, state.json last, which is then renamed. A folder without state.json does not
count. A damaged state is skipped with a warning: the run resumes from the newest whole one before it.
Not here: the checkpoint of a finished Muse (`checkpoint.py`), what a state holds (`train_engine.py`).
"""

import copy
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from minimuse.checkpoint import CARD, read_configuration, read_json, refuse_existing
from minimuse.config import MuseConfig
from minimuse.muse import Muse
from minimuse.utils import Decay, atomic_write, check, content_hash, file_hash, require

STATE, RUN = "state.json", "run.json"
MODEL = "model.model."  # a transformer's weights in a state begin so, because MaskedLoss holds the transformer


def states(folder: Path) -> list[Path]:
    """The complete states of a stage, oldest first. Whether their files are whole is checked when they are read."""
    return sorted(p.parent for p in folder.glob(f"step-????????/{STATE}"))


def save_state(
    folder: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any], keep: int = 2, accelerator: Any = None
) -> None:
    """Tensors and `about` -> folder/step-..., of which the newest `keep` stay (0: all).

    All processes of an accelerator call it together. OSError if the disk is full; earlier states stay untouched.
    """
    main = accelerator is None or accelerator.is_main_process
    wait = accelerator.wait_for_everyone if accelerator else lambda: None
    path = folder / f"step-{step:08d}"
    new = path.with_name(path.name + ".new")
    try:
        if main:
            shutil.rmtree(new, ignore_errors=True)  # left by a killed run
            new.mkdir(parents=True)
        wait()
        _transfer(dcp.save, tensors, new)
        if main:
            values = {"step": step, "about": about, "files": {file.name: file_hash(file) for file in new.iterdir()}}
            atomic_write(new / STATE, json.dumps(values | {"sha256": content_hash(values)}, indent=1) + "\n")
            shutil.rmtree(path, ignore_errors=True)  # incomplete, damaged, or the same state
            new.rename(path)
    except OSError as e:
        if main:  # the new folder may be what fills the disk
            shutil.rmtree(new, ignore_errors=True)
        kept = f"the last complete state is {states(folder)[-1]}" if states(folder) else "there is no earlier state"
        problem = f"could not save step {step} to {folder} ({e.strerror or e}); {kept}"
        raise OSError(e.errno, f"{problem}. Free some space or fix the folder, then --resume") from e
    older = [state for state in states(folder) if state <= path]  # a newer one was damaged, and does not count
    for old in older[:-keep] if main and keep else []:
        with suppress(OSError):  # on Windows another program may hold it open
            (old / STATE).unlink()  # first, so that a half-deleted state does not count
            shutil.rmtree(old)
    wait()


def _check(path: Path) -> dict[str, Any]:
    """A state -> the values of its state.json. ValueError if any of its files has changed since it was saved."""
    try:
        values = read_json(path / STATE)
        changed = [] if values.pop("sha256") == content_hash(values) else [STATE]
        changed += [name for name, digest in values["files"].items() if file_hash(path / name) != digest]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        changed = [repr(e)]
    require(not changed, f"{path} is damaged or incomplete: {', '.join(changed)}")
    return values


def load_state(folder: Path, tensors: Callable[[], dict[str, Tensor]], about: dict[str, Any] | None = None) -> int:
    """Read the newest whole state of a stage into `tensors()`, in place -> its step; 0 if there is none.

    ValueError if the state belongs to a run with other settings `about`. A warning names each damaged state.
    """
    for path in reversed(states(folder)):
        try:
            values = _check(path)
        except ValueError as e:
            logging.getLogger("minimuse").warning("%s; it is skipped, the state before it is used", e)
            continue
        changed = differences(values["about"], json.loads(json.dumps(about))) if about else []
        changed = [change for change in changed if not change.startswith("config.steps ")]  # a run may get longer
        told = "; ".join(changed[:4])
        require(not changed, f"{path} belongs to another run: {told}. Restore them, or start anew")
        _transfer(dcp.load, tensors(), path)
        return values["step"]
    return 0


def load_weights(folder: Path, module: nn.Module) -> int:
    """Read the weights of a stage's newest whole state into a module of the same kind -> the state's step."""
    step = load_state(folder, lambda: {f"model.{name}": tensor for name, tensor in module.state_dict().items()})
    require(step, f"{folder} holds no whole training state; `minimuse train` writes them there")
    return step


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """A state -> all its tensors whose names begin with `prefix`, on the CPU. ValueError if it is damaged."""
    _check(path)
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in saved.items() if k.startswith(prefix)}
    _transfer(dcp.load, tensors, path)
    return tensors


def average(paths: Sequence[Path], decay: float = 0.7) -> dict[str, Tensor]:
    """States of a transformer, oldest first -> avg <- decay * avg + (1 - decay) * weights (Muse 3: decay 0.7)."""
    decay = check("decay", decay, Decay)
    require(bool(paths), "there are no states to average; give at least one")
    if len(paths) == 1:
        hint = "the average is a copy of it; train with --keep 0 to keep them all"
        logging.getLogger("minimuse").warning("%s is the only state: %s", paths[0], hint)
    total = read_tensors(paths[0], MODEL)
    for path in paths[1:]:
        total = {k: torch.lerp(v.double(), total[k].double(), decay) for k, v in read_tensors(path, MODEL).items()}
    return {k.removeprefix(MODEL): v.float() for k, v in total.items()}


def _transfer(action: Callable[..., Any], tensors: dict[str, Tensor], path: Path) -> None:
    """dcp.save, or dcp.load in place. OSError if writing fails in any process, ValueError if tensors do not fit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns if there is only one process
            action(tensors, checkpoint_id=path)
    except dcp.CheckpointException as e:
        cause = next(iter(e.failures.values()))[0]
        if action is dcp.load:
            raise ValueError(f"{path} holds other tensors than this run: {cause}") from e
        raise OSError(getattr(cause, "errno", None), str(cause)) from e


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Two JSON values -> where they differ, such as "config.batch was 16 and is 32"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{name}.{k}".strip("."))]
    return [] if old == new else [f"{name} was {old!r} and is {new!r}"]


def open_start(config: MuseConfig | None, start: str | Path | Muse | None) -> tuple[MuseConfig, Muse | None]:
    """A configuration (None: `finetuned`), a Muse or where it is -> both, the Muse in float32 on the CPU."""
    if isinstance(start, str | Path):
        start = Muse.from_pretrained(start, device="cpu", dtype=torch.float32)
    require(config or start, "there is nothing to train; give a configuration, or a Muse to start from")
    return config or finetuned(start.config), start


def finetuned(config: MuseConfig, stages: Sequence[str] = ("base", "superres")) -> MuseConfig:
    """The configuration of a checkpoint -> that of a run that starts from it: only these stages have steps.

    Choice: at most 600 steps of the base model and 250 of others, each of at most 16 pictures, by AdamW at a learning
    rate of at most 1e-3. Muon's products in bf16 are slow on CPUs without instructions for them.
    """
    unknown = [name for name in stages if name not in config.stages]
    require(not unknown, f"unknown stages {', '.join(unknown)}; give some of {', '.join(config.stages)}")
    changes = {}
    for name, stage in config.stages.items():
        most = 600 if name == "base" else 250
        steps = min(stage.steps or most, most) if name in stages else 0
        rate, batch = min(stage.learning_rate, 1e-3), min(stage.batch, 16)
        options = {"optimizer": "adamw", "warmup": min(stage.warmup, 50), "eval_every": 200}
        changes[name] = replace(stage, steps=steps, learning_rate=rate, batch=batch, **options)
    return replace(config, name=f"{config.name}-tuned", stages=changes)


def starting_parts(config: MuseConfig, start: Muse) -> nn.ModuleDict:
    """A copy of the networks of `start`, ready to train. ValueError if the configuration has other networks."""
    names = [*start.parts, "finetuned_tokenizer", *["text_encoder", "text_tokens"] * bool(config.text_encoder)]
    same = all(getattr(config, name) == getattr(start.config, name) for name in names)
    require(same, f"{config.name} has other networks than {start.config.name}; change only its stages")
    return copy.deepcopy(start.parts).float().requires_grad_(True)


def keep_old(muse: Muse, start: Muse, decay: float) -> None:
    """The base model becomes decay * that of `start` + (1 - decay) * its own, in place (WiSE-FT, arXiv 2109.01903)."""
    old, new = starting_parts(muse.config, start)["base"].state_dict(), muse.parts["base"].state_dict()
    muse.parts["base"].load_state_dict({name: value.float().lerp(old[name], decay) for name, value in new.items()})


def longer(config: MuseConfig, more: int) -> MuseConfig:
    """The configuration of a run -> with `more` steps of each transformer that it trains."""
    stages = {name: s for name, s in config.stages.items() if name in ("base", "superres") and s.steps}
    require(stages, f"{config.name} trains no transformer; there is nothing to continue")
    more_steps = {name: replace(stage, steps=stage.steps + more) for name, stage in stages.items()}
    return replace(config, stages=config.stages | more_steps)


def data_record(spec: str | Path, source: Any) -> dict[str, Any]:
    """What run.json holds about a source that `open_source(spec)` opened: its absolute place, its content by file."""
    place = str(spec) if spec == "scenes" or getattr(source, "hub", "") else os.path.abspath(spec)
    files = getattr(source, "hashes", {})
    record = {"source": place, "fingerprint": source.fingerprint, "parts": source.parts, "files": files}
    return record | (source.reading._asdict() if hasattr(source, "reading") else {})


def open_run(folder: Path, values: dict[str, Any], *, resume: bool, more: int = 0) -> None:
    """Start a run in a folder, or resume the run that is there. Its data may have moved.

    values: "config", "seed" and "data" (a `data_record`) of the run, as JSON. FileExistsError if a run is there and
    `resume` is False; ValueError if it has other values; FileNotFoundError if there is nothing to resume.
    more: with `resume`, steps by which a finished run becomes `longer`.
    """
    path = folder / RUN
    if resume and path.exists() and (folder / CARD).exists() != bool(more):  # the last file of a finished run
        stopped = f"the run in {folder} is not finished; continue it with --resume, without --more"
        finished = f"the run in {folder} is finished; continue it with --more 2000, or start one in another folder"
        raise FileExistsError(stopped if more else finished)
    if resume:
        old, new = read_run(folder), json.loads(json.dumps(values))
        changes = differences(old, new | {"data": old["data"]}) + _changed_data(old["data"], new["data"])
        told = "; ".join(changes[:4]) + f" and {len(changes) - 4} more" * (len(changes) > 4)
        require(not changes, f"the run in {folder} has other settings or data: {told}. Restore them, or start anew")
        if more:
            values = values | {"config": asdict(longer(read_configuration(path), more))}
            (folder / CARD).unlink()
    elif path.exists():
        raise FileExistsError(f"{folder} already holds a run; --resume continues it, or give another folder")
    else:
        refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(values, indent=1) + "\n")


def _changed_data(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Two records of data, perhaps at different places -> the names of the files that differ."""
    if old["fingerprint"] == new["fingerprint"]:
        return []
    before, now = old["files"], new["files"]
    changes = [f"{name} is {'missing' if name in before else 'new'}" for name in sorted(before.keys() ^ now.keys())]
    changes += [f"{name} has changed" for name in before if before[name] != now.get(name, before[name])]
    return changes or [f"{new['source']} gives other images or captions than {old['source']} did"]


def read_run(folder: Path) -> dict[str, Any]:
    """The values that `open_run` wrote. FileNotFoundError if there are none, ValueError if they are damaged."""
    if not (folder / RUN).is_file():
        raise FileNotFoundError(f"{folder} holds no {RUN}; give a folder that `minimuse train --out` made")
    values = read_json(folder / RUN)
    data = values.get("data") if isinstance(values, dict) else None
    whole = isinstance(data, dict) and {"source", "fingerprint", "parts", "files"} <= data.keys()
    whole = whole and {"config", "seed"} <= values.keys()
    require(whole, f"{folder / RUN} lacks config, seed or data; restore it, or start a new run")
    return values
