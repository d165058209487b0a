"""How do time and memory of a decode grow with tokens, steps, batch and width, and what does multi-axis attention save?

    python benchmarks/scaling.py [--out runs/scaling] [--rounds 3] [--quick] [--docs]

One dial at a time is turned from START, in fp32; each point is a process of its own. Beside what was measured stands
what arithmetic predicts:
    seconds   FLOPs of the decode (`train_budget.py`) / those of a large matrix product here: at best
    bytes     weights, keys and values of both branches and once more joined, and four times the guided logits, two
              of which are the branches': what is alive while guidance is applied
Attention alone, 8 heads of 64 channels, full against multi-axis: 4 N^2 D FLOPs against 2 N (b^2 + N / b^2) D.
Let the machine be idle. --quick: tiny sizes, to see that it runs. Writes scaling.json, scaling.md and scaling.png into
--out; with --docs here as well.
"""

import argparse
import json
import math
import shutil
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from peers import CPU, Shape, our_sampling
from speed import sampling_flops
from timing import HERE, alone, alternate, machine, markdown, peak_memory, precisions, ratio, save, short, timed

from minimuse.train_budget import duration, matmul_ceiling, si
from minimuse.transformer import attention, multi_axis_attention

START = Shape(batch=2, grid=16, codes=8192, width=256, layers=4, text=32, steps=8)
AXES: dict[str, list[dict[str, int]]] = {
    "tokens": [{"grid": g} for g in (8, 16, 32)],
    "steps": [{"steps": t} for t in (2, 4, 8, 16, 32)],
    "batch": [{"batch": b} for b in (1, 2, 4, 8)],
    "width": [{"width": d} for d in (128, 256, 512, 1024)],
}
TINY = Shape(batch=1, grid=4, codes=64, width=32, layers=1, text=4, steps=2)
TINY_AXES: dict[str, list[dict[str, int]]] = {
    "tokens": [{"grid": 4}, {"grid": 8}],
    "steps": [{"steps": 2}, {"steps": 4}],
    "batch": [{"batch": 1}, {"batch": 2}],
    "width": [{"width": 32}, {"width": 64}],
}
GRIDS = {16: 4, 32: 8, 64: 8}  # tokens a side -> side of a block
HEADS, CHANNELS = 8, 64


# --- arithmetic -------------------------------------------------------------------------------------------------------


def at(axis: str, shape: Shape) -> int:
    """Where a shape stands on an axis."""
    return shape.grid**2 if axis == "tokens" else getattr(shape, axis)


def predicted_bytes(shape: Shape) -> int:
    """fp32, as the module's docstring says."""
    entries = shape.batch * (shape.text + 1 + 2 * shape.text)  # with text, without, and both joined
    logits = shape.batch * shape.grid**2 * shape.codes
    return 4 * (shape.parameters() + 2 * shape.layers * entries * shape.width + 4 * logits)


def attention_flops(grid: int, block: int = 0) -> int:
    """Of one picture's attention alone, full or in blocks of side `block`."""
    n, d = grid**2, HEADS * CHANNELS
    return 2 * n * (block**2 + n // block**2) * d if block else 4 * n * n * d


def slope(xs: list[float], ys: list[float]) -> float:
    """Of log y over log x from the first to the last: 1 is linear, 2 square."""
    return math.log(ys[-1] / ys[0]) / math.log(xs[-1] / xs[0])


# --- measuring --------------------------------------------------------------------------------------------------------


def point(shape: Shape, rounds: int) -> dict[str, float]:
    """In a process of its own: median seconds of a decode, and bytes beyond those before the model was made."""
    before = peak_memory()
    run, _ = our_sampling(shape, torch.float32)
    run(1)
    seconds = median(timed(partial(run, shape.steps), CPU) for _ in range(rounds))
    return {"seconds": seconds, "bytes": max(1, peak_memory() - before)}  # a log axis has no 0


def grow(start: Shape, axes: dict[str, list[dict[str, int]]], rounds: int, ceiling: float) -> dict[str, list[dict]]:
    """Axis -> its points, each measured and predicted. The start, which is on all axes, is measured once."""
    known: dict[Shape, dict[str, float]] = {}
    found: dict[str, list[dict]] = {axis: [] for axis in axes}
    for axis, changes in axes.items():
        for change in changes:
            shape = start._replace(**change)
            if shape not in known:
                known[shape] = alone(__file__, "--alone", json.dumps([rounds, *shape]))
            floor = sampling_flops(shape) / ceiling
            found[axis].append(
                {"at": at(axis, shape), **known[shape], "floor": floor, "predicted": predicted_bytes(shape)}
            )
            print(axis, found[axis][-1], flush=True)
    return found


@torch.inference_mode()
def attentions(grids: dict[int, int], rounds: int, size: int) -> list[dict[str, Any]]:
    """Full and multi-axis attention in turn, for each grid and precision."""
    rows = []
    for dtype in precisions(CPU):
        ceiling = matmul_ceiling(CPU, dtype, size)
        for grid, block in grids.items():
            q, k, v = torch.randn(3, 1, HEADS, grid**2, CHANNELS, dtype=dtype)
            runs = {"full": partial(attention, q, k, v), "multi-axis": partial(multi_axis_attention, q, k, v, block)}
            for run in runs.values():
                run()
            took = alternate(runs, max(rounds, 5), CPU)
            flops = attention_flops(grid), attention_flops(grid, block)
            row = {"tokens": grid**2, "block": block, "dtype": short(dtype)}
            row |= {name: median(seconds) for name, seconds in took.items()}
            row |= {"ratio": ratio(took["full"], took["multi-axis"]), "predicted ratio": flops[0] / flops[1]}
            rows.append(row | {"floors": [f / ceiling for f in flops]})
    return rows


# --- telling ----------------------------------------------------------------------------------------------------------


def told(report: dict[str, Any]) -> str:
    here, rows = report["machine"], []
    for axis, points in report["axes"].items():
        xs = [p["at"] for p in points]
        slopes = [f"{slope(xs, [p[k] for p in points]):.2f}" for k in ("seconds", "floor", "bytes", "predicted")]
        ends = f"{duration(points[0]['seconds'])} to {duration(points[-1]['seconds'])}"
        held = f"{si(points[0]['bytes'], 'B')} to {si(points[-1]['bytes'], 'B')}"
        rows.append([axis, f"{xs[0]} to {xs[-1]}", ends, *slopes[:2], held, *slopes[2:]])
    head = ["", "from, to", "time", "grows as its power", "predicted", "memory", "grows as its power", "predicted"]
    saved = [
        [f"{r['tokens']:,}", str(r["block"]), r["dtype"], *(duration(r[k]) for k in ("full", "multi-axis"))]
        + [f"{r[k]:.1f}" for k in ("ratio", "predicted ratio")]
        for r in report["attention"]
    ]
    start = Shape(**report["start"])
    about = f"# How cost grows\n\nMade by `python benchmarks/scaling.py`: {here['device']}, {here['threads']} threads, "
    about += f"torch {here['torch']}; ceiling {si(report['ceiling'], 'FLOP/s')}. From batch {start.batch}, "
    about += f"{start.grid**2} tokens, {start.codes:,} codes, width {start.width}, {start.layers} layers and "
    about += f"{start.steps} steps, one dial at a time.\n"
    columns = ["tokens", "block", "precision", "full", "multi-axis", "full / multi-axis", "FLOPs' ratio"]
    picture = "![Time and memory on log axes, measured and predicted](scaling.png)\n\n"
    picture += "Dashed is what arithmetic predicts: time, the FLOPs at the speed of a large matrix product; memory, "
    picture += "what must be alive at once. More is held, and not always as much: what was freed stays with the "
    picture += "process (`engine.keep_pages`), in pieces that not every tensor fits into.\n"
    return "\n".join([about, markdown(head, rows), markdown(columns, saved), picture])


def figure(report: dict[str, Any]) -> Figure:
    """Above time, below memory; at the right attention alone."""
    drawn = Figure(figsize=(16, 6), dpi=100, layout="constrained")
    above, below = drawn.subplots(2, len(report["axes"]) + 1)
    for i, (axis, points) in enumerate(report["axes"].items()):
        xs = [p["at"] for p in points]
        for panel, real, line, unit, label in (
            (above[i], "seconds", "floor", 1, "seconds a decode"),
            (below[i], "bytes", "predicted", 2**20, "MiB beyond the start"),
        ):
            panel.plot(xs, [p[real] / unit for p in points], "o-", label="measured")
            panel.plot(xs, [p[line] / unit for p in points], "k--", label="predicted")
            _finish(panel, xs, axis, label if i == 0 else "")
    for i, dtype in enumerate(dict.fromkeys(r["dtype"] for r in report["attention"])):
        rows = [r for r in report["attention"] if r["dtype"] == dtype]
        xs = [r["tokens"] for r in rows]
        for j, (name, mark) in enumerate((("full", "o-"), ("multi-axis", "s:"))):
            above[-1].plot(xs, [r[name] for r in rows], mark, color=f"C{i}", label=f"{name}, {dtype}")
            above[-1].plot(xs, [r["floors"][j] for r in rows], "k--", linewidth=0.7)
        below[-1].plot(xs, [r["ratio"] for r in rows], "o-", color=f"C{i}", label=dtype)
    below[-1].plot(xs, [r["predicted ratio"] for r in rows], "k--", label="FLOPs")
    _finish(above[-1], xs, "tokens", "seconds of attention")
    _finish(below[-1], xs, "tokens", "full / multi-axis")
    return drawn


def _finish(panel: Any, xs: list[int], xlabel: str, ylabel: str) -> None:
    panel.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    panel.set_xticks(xs, [f"{x:,}" for x in xs])
    panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    low, high = panel.get_ylim()
    steps = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [step * 10.0**k for k in range(-6, 5) for step in steps if low <= step * 10.0**k <= high]
    panel.set_yticks(ticks, [f"{y:g}" for y in ticks])
    panel.tick_params(axis="y", which="minor", labelleft=False)
    panel.legend(fontsize=7)


def measure(
    start: Shape, axes: dict[str, list[dict[str, int]]], grids: dict[int, int], *, rounds: int, size: int
) -> dict[str, Any]:
    """The whole report; `size` of the ceiling's matrices."""
    ceiling = matmul_ceiling(CPU, torch.float32, size)
    report = {"machine": machine(CPU), "rounds": rounds, "ceiling": ceiling, "start": start._asdict()}
    return report | {"axes": grow(start, axes, rounds, ceiling), "attention": attentions(grids, rounds, size)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--rounds", type=int, default=3, help="decodes a point, of which the median (default: 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it all run?")
    parser.add_argument("--docs", action="store_true", help="also write the findings beside this script")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        rounds, *numbers = json.loads(args.alone)
        print(json.dumps(point(Shape(*numbers), rounds)))
        return
    began = time.monotonic()
    if args.quick:
        report = measure(TINY, TINY_AXES, {4: 2, 8: 4}, rounds=1, size=256)
    else:
        report = measure(START, AXES, GRIDS, rounds=args.rounds, size=2048)
    save(args.out, "scaling", report, told(report))
    figure(report).savefig(args.out / "scaling.png")
    if args.docs:
        for name in ("scaling.json", "scaling.md", "scaling.png"):
            shutil.copy(args.out / name, HERE / name)
    print(f"{told(report)}\n{args.out / 'scaling.png'}, {duration(time.monotonic() - began)}")


if __name__ == "__main__":
    main()
