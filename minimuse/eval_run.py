"""`minimuse eval`: run tasks and write a report with tables and pictures. A sweep is Muse's figure 8 at small scale.

    settings.json         what is measured; other settings need another folder
    eval.json, eval.md    all metrics with 95% intervals
    tasks/NAME.json       metrics of a task, and the values of every picture
    tasks/NAME.png        the first pictures, then the best and the worst by CLIP score
    sweep-*.png           trade-offs of a sweep with their Pareto fronts

A stopped evaluation continues after its last finished task. Picture i of a task uses seed + i.
Not here: what a task draws and measures (`eval_tasks.py`).
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from minimuse import __version__, checkpoint, train_state
from minimuse.data_images import to_pil
from minimuse.eval_metrics import Estimate, proportion_interval
from minimuse.eval_prompts import prompt_set
from minimuse.eval_tasks import TASKS, Batch, EvalModel, Evaluator, Metrics, Task, summarize
from minimuse.muse import Muse
from minimuse.plots import grid, tradeoff
from minimuse.sampler import ORDERS
from minimuse.utils import atomic_write
from minimuse.vqgan import VQGAN

FIRST, BEST = 24, 8  # pictures of a task that are shown: the first ones; the best, and the worst
HEADINGS = {
    "right": "all right",
    "clear": "clear",
    "frechet": "Frechet",
    "score": "CLIP-like",
    "diversity": "diversity",
}
SWEEP: dict[str, dict[str, dict[str, Any]]] = {  # line of the plot -> point -> settings of the base model
    "guidance": {f"{t}": {"guidance": float(t)} for t in (0, 1, 2, 4, 8)},
    "rising guidance": {f"0-{t}": {"guidance": (0.0, float(t))} for t in (1, 2, 4, 8, 16)},
    "temperature": {f"{t}": {"sampling_temperature": t} for t in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)},
    "steps": {f"{t}": {"steps": t} for t in (2, 4, 8, 16, 32)},
    "order": {name: {"order": name} for name in ORDERS},
}
PANELS = (("guidance", "rising guidance"), ("temperature",), ("steps",), ("order",))  # lines of one plot


def evaluate(
    model: EvalModel,
    out: str | Path,
    about: dict[str, Any],
    *,
    tasks: Sequence[str] = (),
    n: int | None = None,
    seed: int = 1000,
    batch: int = 50,
    sweep: bool = False,
    evaluator: Evaluator | None = None,
) -> dict[str, Any]:
    """Run tasks (default: all that the model can do) or a sweep -> the content of eval.json.

    n pictures per task (1000) or point of the sweep (300). `about` says what draws: JSON values that tell one
    checkpoint from another. The default seeds are far from those used to choose settings, which start at 0.
    ValueError where `out` holds other settings, or a task is not possible.
    """
    n = n if n is not None else 300 if sweep else 1000
    if n < 10 or batch < 1:
        raise ValueError(f"n is {n}, batch is {batch}; intervals need at least 10 pictures, batches at least 1")
    runs, out = _runs(model, tasks, sweep), Path(out)
    versions = {"minimuse": __version__, "torch": str(torch.__version__)}
    settings = versions | about | {"n": n, "seed": seed, "sweep": sweep, "base_only": model.base_only}
    proportion_interval([True, False])  # without scipy: an error now, not after all pictures are drawn
    _claim(out, settings)
    evaluator = evaluator or Evaluator()
    with tqdm(total=n * len(runs), unit="picture") as bar:
        for name, (task, sampling) in runs.items():
            bar.set_description(name)
            path = out / "tasks" / f"{name}.json"
            if not path.exists():
                parts, asked = [], prompt_set(task.prompts, n)
                for start in range(0, n, batch):
                    some = asked[start : start + batch]
                    seeds = list(range(seed + start, seed + start + len(some)))
                    drawn = task.draw(model, some, seeds, **sampling)
                    parts.append(evaluator(drawn, some, model.real([ask.scene for ask in some])))
                    bar.update(len(some))
                _save_task(path, parts)
    return _report(out, settings)


def _runs(model: EvalModel, tasks: Sequence[str], sweep: bool) -> dict[str, tuple[Task, dict[str, Any]]]:
    """Name -> task and sampling settings. ValueError for a task that is not possible."""
    if sweep and tasks:
        raise ValueError(f"a sweep has its own prompts; leave out --sweep, or the tasks {', '.join(tasks)}")
    if sweep:
        point = Task("a point of the sweep", "mixed")
        return {f"{line} {name}": (point, how) for line, points in SWEEP.items() for name, how in points.items()}
    reasons = {name: "unknown" for name in tasks if name not in TASKS}
    if model.base_only:
        reasons |= {
            name: "needs the whole cascade; leave out --base-only" for name in TASKS if not TASKS[name].base_only
        }
    elif model.before is None:
        reasons["decoder"] = "needs the decoder before fine-tuning; give --run, the folder of the training"
    for name in tasks:
        if name in reasons:
            raise ValueError(f"task {name!r}: {reasons[name]}. Known tasks: {', '.join(TASKS)}")
    return {name: (TASKS[name], {}) for name in tasks or [name for name in TASKS if name not in reasons]}


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Start a report folder, or continue the one with the same settings."""
    path = out / "settings.json"
    if path.exists():
        old = checkpoint.read_json(path)
        if changed := [f"{k} was {old.get(k)!r} and is {v!r}" for k, v in settings.items() if old.get(k) != v]:
            raise ValueError(f"{out} holds another evaluation: {'; '.join(changed)}. Give another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files but no settings.json; give another folder")
    (out / "tasks").mkdir(parents=True)
    atomic_write(path, json.dumps(settings, indent=1) + "\n")


def _save_task(path: Path, parts: list[Batch]) -> None:
    values = {name: [value for part in parts for value in part.values[name]] for name in parts[0].values}
    features = {key: torch.cat([part.features[key] for part in parts]) for key in parts[0].features}
    images = torch.cat([part.images for part in parts])
    order = sorted(range(len(images)), key=lambda i: -values["score"][i])
    few = min(BEST, len(order) // 2)
    shown = [("", i) for i in range(min(FIRST, len(order)))]
    shown += [("best: ", i) for i in order[:few]] + [("worst: ", i) for i in order[: -few - 1 : -1]]
    captions = [
        f"{mark}{values['prompt'][i]}{'' if values['right'][i] else '  WRONG: ' + values['wrong'][i]}"
        for mark, i in shown
    ]
    width, side = images.shape[3], images.shape[2]
    sheet = grid(to_pil(images[[i for _, i in shown]]), captions, max(2, 8 * side // width), max(1, 128 // side))
    atomic_write(path.with_suffix(".png"), partial(sheet.save, format="PNG"))
    content = {"metrics": summarize(values, features), "values": values}
    atomic_write(path, json.dumps(content, indent=1) + "\n")  # last: now the task is finished


# --- the report -------------------------------------------------------------------------------------------------------


def _report(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write eval.json, eval.md, and the plots of a sweep, from all finished tasks in the folder."""
    names = [*TASKS, *(f"{line} {point}" for line, points in SWEEP.items() for point in points)]
    paths = {name: out / "tasks" / f"{name}.json" for name in names}
    found = {name: checkpoint.read_json(path)["metrics"] for name, path in paths.items() if path.exists()}
    report = {"settings": settings, "tasks": found} | ({"sweep": SWEEP} if settings["sweep"] else {})
    atomic_write(out / "eval.json", json.dumps(report, indent=1) + "\n")
    metrics = {name: {key: Estimate(*value) for key, value in each.items()} for name, each in found.items()}
    atomic_write(out / "eval.md", table(metrics) + "\n")
    for key, title in (("score", "CLIP-like score"), ("right", "all right")) if settings["sweep"] else ():
        atomic_write(out / f"sweep-{key}.png", partial(_tradeoffs(metrics, key, title).save, format="PNG"))
    return json.loads(json.dumps(report))


def _tradeoffs(found: dict[str, Metrics], key: str, title: str) -> Image.Image:
    """A metric of a sweep against the Frechet distance, one plot per panel, each with its Pareto front."""
    plots = []
    for panel in PANELS:
        lines = {line: {point: found[f"{line} {point}"] for point in SWEEP[line]} for line in panel if line in SWEEP}
        series = {line: {p: (m[key], m["frechet"]) for p, m in points.items()} for line, points in lines.items()}
        plots += [tradeoff(series, title, "Frechet distance", (False, True))] if series else []
    return grid(plots, None, 2, 1)


def table(found: dict[str, Metrics]) -> str:
    """Markdown: a line per task with the main metrics, then a line per other metric."""
    lines = ["| task | n | " + " | ".join(HEADINGS.values()) + " |", "|---" * (2 + len(HEADINGS)) + "|"]
    for name, metrics in found.items():
        cells = [metrics[key].short() if key in metrics else "" for key in HEADINGS]
        title = TASKS[name].title if name in TASKS else name
        lines.append(f"| {title} | {metrics['right'].n} | {' | '.join(cells)} |")
    lines += ["", "| task | metric | value and 95% interval | n |", "|---|---|---|---|"]
    for name, metrics in found.items():
        lines += [f"| {name} | {key} | {m.short()} | {m.n} |" for key, m in metrics.items() if key not in HEADINGS]
    return "\n".join(lines)


# --- the command ------------------------------------------------------------------------------------------------------


def measure(
    name: str,
    out: Path,
    *,
    training: Path | None = None,
    device: str | None = None,
    base_only: bool = False,
    sweep: bool = False,
    **options,
) -> dict[str, Any]:
    """`evaluate` for a shipped name, folder or hub id. Sweeps are of the base model alone.

    `training` is the folder of its training run, with the high tokenizer before its decoder was fine-tuned. It may be
    the checkpoint's own folder.
    """
    muse = Muse.from_pretrained(name, device=device)
    folder, before = training or checkpoint.find(name), None
    if training or (folder / "high_tokenizer").is_dir():
        before = VQGAN(muse.config.high_tokenizer)
        train_state.load_weights(folder / "high_tokenizer", before)
        before = before.eval().requires_grad_(False).to(muse.device, muse.dtype)
        if not torch.allclose(before.codebook, muse.high_tokenizer.codebook, rtol=1e-2, atol=1e-3):  # stored in half
            raise ValueError(f"{folder} is not the training run of {name}: the codebooks differ; give another --run")
    about = {"checkpoint": muse.config.name, "fingerprint": muse.fingerprint}
    about |= {"device": muse.device.type, "dtype": str(muse.dtype)}
    homes = {"checkpoint": checkpoint.find(name), "detector": checkpoint.SHIPPED / "detector"}
    for part, home in (homes | {"clip": checkpoint.SHIPPED / "clip"}).items():
        about[f"weights of {part}"] = hashlib.sha256((home / checkpoint.WEIGHTS).read_bytes()).hexdigest()
    model = EvalModel(muse, before=before, base_only=base_only or sweep)
    return evaluate(model, out, about, sweep=sweep, **options)
