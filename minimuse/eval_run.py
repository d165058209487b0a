"""`minimuse eval`: how good a checkpoint is, with intervals, tables and pictures; and Muse's figure 8 at toy scale.

    a kind (`kinds.py`) --a batch at a time, each kept on disk--> rows and features --> figures, page of pictures
    a sweep: settings of the base model, one after the other --> accuracy, CLIP-like score, Frechet distance of each

A folder holds one evaluation: settings.json says of what, and another one is refused there.
    eval.json, eval.md                 all figures with 95% intervals
    kinds/NAME.json, kinds/NAME.png    every picture's verdict; the first pictures, the best and the worst
    parts/NAME/*.safetensors           batches of a kind that is not done yet
Whatever is written is written whole or not at all, so that a stopped evaluation goes on where it was, to the same
figures. Picture i of a kind draws with seed + i.
Not here: what is measured (`kinds.py`), prompts (`prompts.py`).
"""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minimuse import __version__, checkpoint
from minimuse import train_state as runs
from minimuse.config import to_dict
from minimuse.data_images import to_pil
from minimuse.intervals import Measured, difference
from minimuse.kinds import KINDS, Batch, Figures, Kind, Rows, Tensors, drawn, quality
from minimuse.muse import Muse
from minimuse.plots import grid, tradeoff
from minimuse.prompts import asks
from minimuse.sampler import ORDERS
from minimuse.studio import Judge, Studio
from minimuse.utils import atomic_write, content_hash
from minimuse.vqgan import VQGAN

COLUMNS = {"right": "all right", "clear": "clear", "frechet": "Frechet", "score": "CLIP-like", "diversity": "diversity"}
FIRST, BEST = 24, 8  # pictures of a kind that are shown: the first ones; the best and the worst by CLIP-like score
SWEEP: dict[str, dict[str, dict[str, Any]]] = {  # a line of the plot -> its points
    "guidance": {f"{t}": {"guidance": float(t)} for t in (0, 1, 2, 4, 8)},
    "rising guidance": {f"0-{t}": {"guidance": (0.0, float(t))} for t in (1, 2, 4, 8, 16)},
    "temperature": {f"{t}": {"sampling_temperature": t} for t in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)},
    "steps": {f"{t}": {"steps": t} for t in (2, 4, 8, 16, 32)},
    "order": {name: {"order": name} for name in ORDERS},
}
RISING = {f"rising guidance 0-{2 * t}": f"guidance {t}" for t in (1, 2, 4, 8)}  # of the same mean t, told pair by pair
PANELS = (("guidance", "rising guidance"), ("temperature",), ("steps",), ("order",))  # lines that are drawn together


def evaluate(
    studio: Studio,
    out: str | Path,
    about: dict[str, Any],
    *,
    kinds: Sequence[str] = (),
    n: int | None = None,
    seed: int = 1000,
    batch: int = 50,
    sweep: bool = False,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Measure kinds (all that the studio can draw), or sweep -> what eval.json holds; resumes what `out` holds.

    `about` says what the studio draws with: JSON values that tell one checkpoint from another. n pictures a kind (1000)
    or a point of the sweep (300). Default seeds lie far from those on which settings are chosen, which begin at 0.
    ValueError where `out` belongs to other settings, or a kind cannot be measured.
    """
    n = n if n is not None else 300 if sweep else 1000
    if n < 10 or batch < 1:
        raise ValueError(f"n = {n}, batch = {batch}: intervals need at least 10 pictures, batches at least 1")
    trials, out = _trials(studio, kinds, sweep), Path(out)
    versions = {"minimuse": __version__, "torch": str(torch.__version__)}
    settings = versions | about | {"n": n, "seed": seed, "batch": batch, "sweep": sweep, "base_only": studio.base_only}
    _settle(out, settings)
    from tqdm import tqdm

    judge, found = judge or Judge(), {}
    with tqdm(total=n * len(trials), unit="picture") as bar:
        for name, (kind, how) in trials.items():
            bar.set_description(name)
            found[name] = _measured(kind, how, out, name, (n, seed, batch), studio, judge, bar)
    return _report(out, settings, found)


def _trials(studio: Studio, kinds: Sequence[str], sweep: bool) -> dict[str, tuple[Kind, dict[str, Any]]]:
    """Name -> a kind, and settings to draw it with; refuses what cannot be measured."""
    if sweep and kinds:
        raise ValueError(f"a sweep has prompts of its own: leave out --sweep, or the kinds {', '.join(kinds)}")
    if sweep:
        point = Kind("a point of the sweep", "mixed", drawn, quality)
        points = [(f"{line} {label}", how) for line, points in SWEEP.items() for label, how in points.items()]
        return {name: (point, how) for name, how in points}
    can = [name for name, kind in KINDS.items() if not (kind.cascade and studio.base_only)]
    can = [name for name in can if name != "decoder" or studio.before is not None]
    for name in kinds or can:
        if name not in KINDS:
            raise ValueError(f"unknown kind {name!r}; known: {', '.join(KINDS)}")
        if name not in can and name == "decoder":
            raise ValueError("kind decoder needs the decoder before fine-tuning: give --run, the folder of a training")
        if name not in can:
            raise ValueError(f"kind {name} needs the whole cascade; leave out --base-only")
    return {name: (KINDS[name], {}) for name in kinds or can}


def _settle(out: Path, settings: dict[str, Any]) -> None:
    """Begin an evaluation in a folder, or go on with the same one."""
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        if changed := runs.differences(checkpoint.read_json(path), settings):
            raise ValueError(
                f"{out} holds another evaluation: {'; '.join(changed[:4])}. Put it back, or give another folder"
            )
        return
    if there := [name for name in ("eval.json", "eval.md", "kinds", "parts") if (out / name).exists()]:
        raise FileExistsError(f"{out} holds {', '.join(there)} but no settings.json; give another folder")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(settings, indent=1) + "\n")


# --- one kind ---------------------------------------------------------------------------------------------------------


def _measured(
    kind: Kind, how: dict[str, Any], out: Path, name: str, size: tuple[int, int, int], studio: Studio, judge: Judge, bar
) -> Figures:
    """The figures of a kind: read where it is done, else measured batch by batch."""
    n, seed, batch = size
    path, parts = out / "kinds" / f"{name}.json", out / "parts" / name
    if path.exists():
        bar.update(n)
        return {k: Measured(*v) for k, v in checkpoint.read_json(path)["figures"].items()}
    asked, measure = asks(kind.prompts, n), partial(kind.measure, studio, judge, **how)
    for start in range(0, n, batch):
        file = parts / f"{start:06d}.safetensors"
        if not file.exists():
            some, seeds = asked[start : start + batch], list(range(seed + start, seed + min(start + batch, n)))
            found = measure(some, seeds)
            told = [{"prompt": a.prompt, "seed": s, "group": a.group} for a, s in zip(some, seeds, strict=True)]
            _keep(file, found._replace(rows=[a | b for a, b in zip(told, found.rows, strict=True)]))
        bar.update(min(batch, n - start))
    rows, tensors = _kept(parts)
    figures = kind.figures(rows, tensors)
    path.parent.mkdir(exist_ok=True)
    atomic_write(path.with_suffix(".png"), partial(page(rows, tensors["images"]).save, format="PNG"))
    atomic_write(path, json.dumps({"figures": figures, "rows": rows}, indent=1) + "\n")  # last: the kind is done
    shutil.rmtree(parts)
    return figures


def _keep(file: Path, batch: Batch) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in batch.tensors.items()}
    atomic_write(file, partial(save_file, tensors, metadata={"rows": json.dumps(batch.rows)}))


def _kept(folder: Path) -> tuple[Rows, Tensors]:
    """All batches of a kind, in order."""
    rows: Rows = []
    parts: dict[str, list[Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as part:
            rows += json.loads(part.metadata()["rows"])
            for name in [*part.keys()]:
                parts.setdefault(name, []).append(part.get_tensor(name))
    return rows, {name: torch.cat(several) for name, several in parts.items()}


def page(rows: Rows, images: Tensor) -> Image.Image:
    """The first pictures, whatever they are; then the best and the worst by CLIP-like score. Wrong ones say so."""
    order, few = sorted(range(len(rows)), key=lambda i: -rows[i]["score"]), min(BEST, len(rows) // 2)
    shown = [("", i) for i in range(min(FIRST, len(rows)))]
    shown += [("best: ", i) for i in order[:few]] + [("worst: ", i) for i in order[: -few - 1 : -1]]
    captions = [
        f"{mark}{rows[i]['prompt']}{'' if rows[i]['right'] else '  WRONG: ' + rows[i]['wrong']}" for mark, i in shown
    ]
    columns = max(2, 8 * images.shape[2] // images.shape[3])
    return grid(to_pil(images[[i for _, i in shown]]), captions, columns, max(1, 128 // images.shape[2]))


# --- the report -------------------------------------------------------------------------------------------------------


def _report(out: Path, settings: dict[str, Any], found: dict[str, Figures]) -> dict[str, Any]:
    """eval.json, eval.md, and of a sweep the trade-offs; what earlier calls measured in this folder stays in them."""
    for path in sorted((out / "kinds").glob("*.json")):
        if path.stem not in found:
            found[path.stem] = {k: Measured(*v) for k, v in checkpoint.read_json(path)["figures"].items()}
    order = [*KINDS, *(f"{line} {label}" for line, points in SWEEP.items() for label in points)]
    found = {name: found[name] for name in order if name in found}
    for name, constant in RISING.items():
        if name in found and constant in found:
            found[name] = found[name] | _paired(out, name, constant)
    report = {"settings": settings, "kinds": found} | ({"sweep": SWEEP} if settings["sweep"] else {})
    atomic_write(out / "eval.json", json.dumps(report, indent=1) + "\n")
    atomic_write(out / "eval.md", table(found) + "\n")
    for x, name in (("score", "CLIP-like score"), ("right", "all right")) if settings["sweep"] else ():
        atomic_write(out / f"sweep-{x}.png", partial(_tradeoffs(found, x, name).save, format="PNG"))
    return json.loads(json.dumps(report))


def _paired(out: Path, first: str, second: str) -> Figures:
    """What is right of one point less what is right of another, on the same prompts and seeds."""
    rows, others = (checkpoint.read_json(out / "kinds" / f"{name}.json")["rows"] for name in (first, second))
    groups, found = [row["group"] for row in rows], {}
    for name in ("right", "clear"):
        pair = (torch.tensor([row[name] for row in some]) for some in (rows, others))
        found[f"{name}, less {second}"] = difference(*pair, groups)
    return found


def _tradeoffs(found: dict[str, Figures], x: str, name: str) -> Image.Image:
    """A sweep -> x against Frechet distance: guidance, temperatures, steps and orders, each with its Pareto front."""
    series = {
        line: {label: (found[f"{line} {label}"][x], found[f"{line} {label}"]["frechet"]) for label in points}
        for line, points in SWEEP.items()
    }
    panels = [{k: v for k, v in series.items() if k in lines} for lines in PANELS]
    return grid([tradeoff(some, name, "Frechet distance", (False, True)) for some in panels if some], None, 2, 1)


def table(found: dict[str, Figures]) -> str:
    """Markdown: the kinds that are pictures of prompts, a line each; then all other figures, a line each."""

    def cell(figure: Measured | None) -> str:
        return "" if figure is None else str(figure).rsplit(", n", 1)[0] + ")"

    lines = ["| kind | n | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name, figures in found.items():
        if "right" in figures:
            cells = " | ".join(cell(figures.get(column)) for column in COLUMNS)
            lines.append(f"| {KINDS[name].title if name in KINDS else name} | {figures['right'].n} | {cells} |")
    lines += ["", "| kind | figure | value and 95% interval | n |", "|---|---|---|---|"]
    for name, figures in found.items():
        for k, figure in figures.items():
            if k not in COLUMNS:
                lines.append(f"| {name} | {k} | {cell(figure)} | {figure.n} |")
    shown = [f"- kinds/{name}.png: {KINDS[name].shows}" for name in found if name in KINDS and KINDS[name].shows]
    return "\n".join([*lines, *(["", "Side by side in the pictures:", *shown] if shown else [])])


# --- the command ------------------------------------------------------------------------------------------------------


def measure(
    name: str,
    out: Path,
    *,
    training: Path | None = None,
    device: str | None = None,
    base_only: bool = False,
    sweep: bool = False,
    **how,
) -> dict[str, Any]:
    """A shipped name, folder or hub id -> `evaluate`. The folder of its training (the checkpoint's own may be one)
    holds the high tokenizer as it was before its decoder was fine-tuned. Sweeps are of the base model alone."""
    muse = Muse.from_pretrained(name, device=device)
    folder, before = checkpoint.find(name), None
    if training or runs.states(folder / "high_tokenizer"):
        before = VQGAN(muse.config.high_tokenizer)
        runs.load_weights((training or folder) / "high_tokenizer", before)
        before = before.eval().requires_grad_(False).to(muse.device, muse.dtype)
        if not torch.allclose(before.codebook, muse.high_tokenizer.codebook, rtol=1e-2, atol=1e-3):  # saved in half
            raise ValueError(f"{training or folder} is not the training of {name}: its codebook is another one")
    about = {"checkpoint": muse.config.name, "device": muse.device.type, "dtype": str(muse.dtype)}
    about["config"] = content_hash(to_dict(muse.config))
    for part, home in (("checkpoint", folder), *((part, checkpoint.SHIPPED / part) for part in ("reader", "scorer"))):
        about[f"weights of {part}"] = runs.stamp(home / checkpoint.WEIGHTS)[1]
    return evaluate(Studio(muse, before=before, base_only=base_only or sweep), out, about, sweep=sweep, **how)
