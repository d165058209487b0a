"""The schedule lab: test a masking idea against the exact answer, in seconds.

    report = compare(MixtureWorld.random(), {"cosine": "cosine", "mine": lambda u: 1 - u**3}, orders=["halton"])
    print(report.table())
    report.plot()
    report.save("out")

A grid of schedules x orders x steps, each decoded and measured by a Judge, all with the same truth and the same seeds:
in an exact world (`judge.py`), in a trained Muse or with published weights (`lab_models.py`).
Not here: the worlds (`lab_worlds.py`), what is measured, how known code bases sample (`lab_samplers.py`).
"""

import csv
import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minimuse import __version__
from minimuse import lab_samplers as variants
from minimuse.judge import Estimate, Judge, Outcome, WorldJudge, estimate
from minimuse.lab_worlds import WORLDS, ChainWorld, MixtureWorld, PottsWorld, World
from minimuse.masking import get_schedule, reveal_counts
from minimuse.sampler import ORDERS, Order, entropy_bound, is_adaptive
from minimuse.utils import atomic_write, content_hash

if TYPE_CHECKING:
    from minimuse.muse import Muse

__all__ = ["WORLDS", "Cell", "ChainWorld", "MixtureWorld", "PottsWorld", "Report", "World", "compare", "difference"]


@dataclass(frozen=True)
class Cell:
    """One sampler of the grid and what was measured of it."""

    schedule: str
    order: str
    steps: int
    passes: float
    groups: dict[str, list[float]]
    bound: bool

    def __getitem__(self, measure: str) -> Estimate:
        """cell["kl"] -> its mean and 95% interval."""
        return estimate(self.groups[measure])


def difference(a: Cell, b: Cell, measure: str) -> Estimate:
    """a - b with its interval, group by group, since both saw the same samples."""
    return estimate([x - y for x, y in zip(a.groups[measure], b.groups[measure], strict=True)])


def compare(
    target: "World | Muse | Judge",
    schedules: Iterable[str] | Mapping[str, Any] = ("cosine",),
    orders: Iterable[str] | Mapping[str, str | Order] = ("confidence",),
    steps: Iterable[int] = (4, 8, 16),
    *,
    presets: Iterable[str] = (),
    samples: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    **sampling: Any,
) -> "Report":
    """Measure every schedule x order x steps, and every preset x steps, in a world, a Muse, or by a Judge of your own.

    Schedules and orders are names, or names with functions; an adaptive rule is a schedule, "bound0.5" the
    entropy-bounded one of 0.5 nats. `samples` are 4096 in a world, 512 pictures of a Muse; a Judge brings its own and
    its own seed. `sampling` is what `decode` takes besides. With `out`, finished cells are kept there and used again
    where all settings are the same; a cell with functions of your own, but curves, is always measured anew, since code
    cannot be compared.
    """
    judge = _judge(target, samples, seed)
    trials = [
        _trial(judge, name, other, t, schedule, order, sampling)
        for name, schedule in _named(schedules).items()
        for other, order in _named(orders).items()
        for t in steps
    ] + [_preset(judge, name, t, sampling) for name in presets for t in steps]
    if not trials:
        raise ValueError("nothing to compare: give at least one schedule, order and number of steps, or a preset")
    about = {"minimuse": __version__, "torch": str(torch.__version__), **judge.identity()}
    plain = all(isinstance(v, str | int | float | tuple | None) for v in sampling.values())
    cells = []
    for label, settings, key in trials:
        kept = out and key and plain and Path(out) / "cells" / f"{content_hash(about, key, sampling)[:24]}.json"
        if kept and kept.is_file():
            outcome = Outcome(**json.loads(kept.read_text(encoding="utf-8")))
        else:
            outcome = judge(**settings)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(kept, json.dumps(outcome._asdict()))
        cells.append(Cell(*label, *outcome))
    about |= {"python": platform.python_version(), "sampling": {k: repr(v) for k, v in sampling.items()}}
    return Report(cells, dict(judge.titles), about)


@dataclass(frozen=True)
class Report:
    """What `compare` found: `cells`, and `about`, all that they depend on."""

    cells: list[Cell]
    titles: dict[str, str]
    about: dict[str, Any]

    def __getitem__(self, key: tuple[str, str, int]) -> Cell:
        """report["cosine", "halton", 8]"""
        for cell in self.cells:
            if (cell.schedule, cell.order, cell.steps) == key:
                return cell
        raise KeyError(f"no cell {key}; there are {[(c.schedule, c.order, c.steps) for c in self.cells]}")

    def table(self, against: tuple[str, str] | None = None) -> str:
        """Markdown: a line a cell, 95% intervals; "<=" marks a KL that is an upper bound.

        against a (schedule, order): each cell less that one's in as many steps, paired, in bold where 0 is left out.
        """
        lines = [["schedule", "order", "steps", "passes", *self.titles]]
        for c in self.cells:
            base = against and self[(*against, c.steps)]
            if c is not base:
                shown = (_shown(c, m, base) for m in self.titles)
                lines.append([c.schedule, c.order, str(c.steps), f"{c.passes:.1f}", *shown])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |" for line in lines]
        rows.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        return "\n".join(rows)

    def plot(self, ax=None, measure: str | None = None):
        """A measure against the mean forward passes, 95% bars -> the axes. Dashes are schedules, colours orders.

        Of one order, colours are schedules too. Those whose names begin with "bound" make one line, a point a bound.
        """
        import matplotlib.pyplot as plt

        measure = measure or next(m for m in self.titles if any(m in c.groups for c in self.cells))
        cells = [c for c in self.cells if measure in c.groups]
        if not cells:
            raise ValueError(f"no cell has measured {measure!r}; known: {', '.join(self.titles)}")
        lines: dict[tuple[str, str], list[Cell]] = {}
        for c in cells:
            name = "entropy bounds" if c.schedule.startswith("bound") else c.schedule
            lines.setdefault((c.order or name, name), []).append(c)
        many = len(lines) > 8  # the legend goes outside
        ax = ax or plt.subplots(figsize=(9 if many else 6, 4), layout="constrained")[1]
        colours, dashes = (list(dict.fromkeys(names)) for names in zip(*lines, strict=True))
        for (order, name), points in lines.items():
            points, i = sorted(points, key=lambda c: c.passes), dashes.index(name)
            mean, half = zip(*(c[measure] for c in points), strict=True)
            bound = " (upper bound)" if measure == "kl" and any(c.bound for c in points) else ""
            hue = colours.index(order) if len(colours) > 1 else i
            look = {"color": f"C{hue}", "marker": "osD^vP"[i % 6], "ls": ("-", "--", ":", "-.")[i % 4]}
            look |= {"label": ", ".join(dict.fromkeys((order, name))) + bound, "capsize": 3, "ms": 4, "lw": 1.4}
            ax.errorbar([c.passes for c in points], mean, half, **look)
        _scales(ax, cells, measure)
        ax.set(xlabel="forward passes a picture", ylabel=self.titles[measure])
        ax.set_title(f"{self.about['target']}", fontsize=10)
        ax.grid(alpha=0.25)
        outside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}
        ax.legend(fontsize=7, frameon=False, handlelength=3.5, **outside)
        return ax

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """report.json, report.csv, report.md, and MEASURE.png and .pdf. FileExistsError where a figure would be lost:
        a report may replace one whose every cell it holds."""
        import matplotlib.pyplot as plt

        folder = Path(folder)
        measures = [m for m in self.titles if any(m in c.groups for c in self.cells)]
        cells = [asdict(c) for c in self.cells]
        if not overwrite:
            figures = [f"{m}.{ending}" for m in measures for ending in ("png", "pdf")]
            _refuse_loss(folder, ["report.json", "report.csv", "report.md", *figures], cells)
        for measure in measures:
            figure = self.plot(measure=measure).figure
            folder.mkdir(parents=True, exist_ok=True)
            for ending in ("png", "pdf"):
                figure.savefig(folder / f"{measure}.{ending}", dpi=160)
            plt.close(figure)
        with open(folder / "report.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["schedule", "order", "steps", "passes", "measure", "mean", "low", "high", "upper bound"])
            for c in self.cells:
                for m, (mean, half) in ((m, c[m]) for m in c.groups):
                    bound = c.bound and m == "kl"
                    rows.writerow([c.schedule, c.order, c.steps, c.passes, m, mean, mean - half, mean + half, bound])
        atomic_write(folder / "report.md", self.table() + "\n")
        values = {"about": self.about, "titles": self.titles, "cells": cells}
        atomic_write(folder / "report.json", json.dumps(values, indent=1) + "\n")
        return folder


def _shown(cell: Cell, measure: str, base: Cell | None = None) -> str:
    """A figure and its interval as text, or its difference to that of `base`; "" where it was not measured."""
    if measure not in cell.groups or (base and measure not in base.groups):
        return ""
    mean, half = difference(cell, base, measure) if base else cell[measure]
    digits = min(7, max(2, 1 - math.floor(math.log10(half)))) if half > 0 else 4
    text = f"{round(mean, digits) + 0.0:.{digits}f} ± {half:.{digits}f}"
    if base:
        return f"**{text}**" if abs(mean) > max(half, 1e-5) else text
    return f"<= {text}" if cell.bound and measure == "kl" else text


def _scales(ax: Any, cells: list[Cell], measure: str) -> None:
    """Passes in powers of two; a distance that spans a power of ten in powers of ten, down to what tells from 0."""
    values = [c[measure] for c in cells]
    typical = sorted(v.half for v in values)[len(values) // 2]
    least, most = min(v.mean for v in values), max(v.mean for v in values)
    if least > -typical and most > 10 * max(least, typical):
        ax.set_yscale("symlog", linthresh=max(typical, 1e-9))
        lowest, highest = min(v.mean - v.half for v in values), max(v.mean + v.half for v in values)
        ax.set_ylim(min(0, lowest) - typical / 5, 1.5 * highest)
    if least - typical < 0 or most > 10 * least:
        ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    ticks = sorted({c.steps for c in cells if c.passes == c.steps} or {round(c.passes) for c in cells})
    ax.set_xticks(ticks, [str(t) for t in ticks])
    ax.minorticks_off()


def _refuse_loss(folder: Path, files: list[str], cells: list[dict[str, Any]]) -> None:
    """FileExistsError where a file would go whose figures are not all among `cells`."""
    if not (there := [f for f in files if (folder / f).exists()]):
        return
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if all(c in cells for c in report["cells"]):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise FileExistsError(f"{folder} holds another report ({there[0]}); give another folder, or overwrite it")


# --- the grid ---------------------------------------------------------------------------------------------------------

Trial = tuple[tuple[str, str, int], dict[str, Any], dict[str, Any] | None]  # label, for `decode`, what it depends on


def _judge(target: Any, samples: int | None, seed: int) -> Judge:
    if isinstance(target, World):
        return WorldJudge(target, samples or 4096, seed)
    if hasattr(target, "generate"):  # a Muse; only now are networks imported
        from minimuse.lab_models import MuseJudge

        return MuseJudge(target, samples or 512, seed)
    return target


def _named(x: Iterable[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """Names -> each its own; a mapping as it is. A lone name is one name, not its letters."""
    return x if isinstance(x, Mapping) else {name: name for name in ([x] if isinstance(x, str) else x)}


def _trial(judge: Judge, name: str, other: str, t: int, schedule: Any, order: Any, sampling: dict[str, Any]) -> Trial:
    """Checks both before anything is measured; functions other than curves have no key."""
    if isinstance(schedule, str) and schedule.startswith("bound"):
        rule, mark = entropy_bound(float(schedule.removeprefix("bound"))), schedule
    elif is_adaptive(schedule):
        rule, mark = schedule, None
    else:
        rule = get_schedule(schedule, judge.n)
        mark = reveal_counts(judge.n, t, rule)
    if isinstance(order, str) and order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; known: {', '.join(ORDERS)}; or a mapping of names to functions")
    key = {"schedule": mark, "order": order, "steps": t} if mark and isinstance(order, str) else None
    by = judge.order(order) if isinstance(order, str) else order
    return (name, other, t), {"schedule": rule, "order": by, **sampling, "steps": t}, key


def _preset(judge: Judge, name: str, t: int, sampling: dict[str, Any]) -> Trial:
    settings = {**variants.settings(name, judge.n, judge.v, t), **sampling}
    if isinstance(settings["order"], str):
        settings["order"] = judge.order(settings["order"])
    return (f"as {name}", "", t), settings, {"preset": name, "steps": t}
