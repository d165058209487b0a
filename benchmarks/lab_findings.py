"""What the schedule lab finds: schedules, orders and adaptive rules in the three exact worlds, with 95% intervals.

    python benchmarks/lab_findings.py [--out runs/lab_findings] [--samples 2048] [--worlds mixture,chain,potts]

Finished cells are kept in --out, so that it may be stopped at any time. It writes a report for each world, and
findings.md with four tables:
    schedules   KL of each less KL of cosine, the same truth for both, Halton order: below 0 beats cosine
    orders      under cosine: the squared distance of token pairs, which is fair to all, and the surprise
    adaptive    passes and KL of entropy-bounded rules, beside cosine in the same order
    presets     the samplers of known code bases, each as it is
"""

import argparse
from pathlib import Path

from minimuse.judge import Estimate
from minimuse.lab import WORLDS, Report, compare, difference
from minimuse.lab_samplers import PRESETS

SCHEDULES = ("cosine", "linear", "square", "cubic", "sqrt")
ORDERS = ("halton", "random", "entropy", "confidence")
STEPS = (4, 8, 16, 32)
BOUNDS = tuple(f"bound{b}" for b in (0.25, 0.5, 1, 2, 4, 8))


def show(e: Estimate, digits: int = 4, bound: bool = False) -> str:
    return f"{'<= ' * bound}{round(e.mean, digits) + 0.0:.{digits}f} ± {e.half:.{digits}f}"


def verdict(e: Estimate) -> str:
    """Bold where the interval leaves 0 out, and not by rounding alone."""
    return f"**{show(e)}**" if abs(e.mean) > max(e.half, 1e-5) else show(e)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def schedules_table(reports: dict[str, Report]) -> str:
    rows = [
        [w, str(t), show(r["cosine", "halton", t]["kl"])]
        + [verdict(difference(r[s, "halton", t], r["cosine", "halton", t], "kl")) for s in SCHEDULES[1:]]
        for w, r in reports.items()
        for t in STEPS
    ]
    return markdown(["world", "steps", "cosine, KL", *(f"{s} - cosine" for s in SCHEDULES[1:])], rows)


def orders_table(reports: dict[str, Report]) -> str:
    rows = []
    for w, r in reports.items():
        for t in STEPS:
            cells = [r["cosine", order, t] for order in ORDERS]
            kls = [show(c["kl"], bound=c.bound) for c in cells if "kl" in c.groups]
            rows.append([w, str(t), *kls, *(show(c["pairs"]) for c in cells), show(cells[-1]["surprise"], 3)])
    head = [*(f"KL, {o}" for o in ORDERS[:-1]), *(f"pairs, {o}" for o in ORDERS), "surprise, confidence"]
    return markdown(["world", "steps", *head], rows)


def adaptive_table(reports: dict[str, Report]) -> str:
    rows = []
    for w, r in reports.items():
        for name, t in [(b, 64) for b in BOUNDS] + [("cosine", t) for t in STEPS]:
            c = r[name, "entropy", t]
            rows.append([w, name, f"{c.passes:.1f}", show(c["kl"], bound=c.bound), show(c["surprise"], 3)])
    return markdown(["world", "rule", "passes", "KL", "surprise"], rows)


def presets_table(reports: dict[str, Report]) -> str:
    rows = [
        [w, name, str(t), show(c["surprise"], 3), show(c["singles"]), show(c["pairs"])]
        for w, r in reports.items()
        for name in PRESETS
        for t in (8, 16)
        for c in [r[f"as {name}", "", t]]
    ]
    return markdown(["world", "sampler", "steps", "surprise", "singles", "pairs"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lab_findings"))
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--worlds", default=",".join(WORLDS))
    args = parser.parse_args()
    reports = {}
    for name in args.worlds.split(","):
        world, out = WORLDS[name](), args.out / name
        fixed = compare(world, SCHEDULES, ORDERS, STEPS, samples=args.samples, out=out)
        adaptive = compare(world, BOUNDS, ["entropy"], [64], samples=args.samples, out=out)
        presets = compare(world, [], presets=PRESETS, steps=(8, 16), samples=args.samples, out=out)
        reports[name] = Report(fixed.cells + adaptive.cells + presets.cells, fixed.titles, fixed.about)
        reports[name].save(out, overwrite=True)
        print(f"{name}: {out}", flush=True)
    tables = {"Schedules": schedules_table, "Orders": orders_table, "Adaptive rules": adaptive_table}
    tables |= {"Samplers of known code bases": presets_table}
    text = "\n".join(f"## {title}\n\n{table(reports)}" for title, table in tables.items())
    (args.out / "findings.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
