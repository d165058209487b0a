"""What the schedule lab finds: schedules, orders and adaptive rules in the three exact worlds, with 95% intervals.

    python benchmarks/lab_findings.py [--out runs/lab_findings] [--samples 2048] [--worlds mixture,chain,potts]

It writes a report for each world to --out, and findings.md with four tables:
    schedules   paired difference of the KL from that of cosine, in Halton order: below 0 is better than cosine
    orders      with cosine: KL, the squared distance of token pairs (for all orders), and the excess NLL
    adaptive    NFE and KL of entropy-bounded rules, and of cosine in the same order
    presets     the samplers of published code bases
"""

import argparse
from pathlib import Path

from minimuse.eval_metrics import Estimate, paired_difference
from minimuse.lab import WORLDS, Report, compare
from minimuse.lab_samplers import SAMPLER_PRESETS

SCHEDULES = ("cosine", "linear", "square", "cubic", "sqrt")
ORDERS = ("halton", "random", "entropy", "confidence")
STEPS = (4, 8, 16, 32)
BOUNDS = tuple(f"bound{b}" for b in (0.25, 0.5, 1, 2, 4, 8))


def show(e: Estimate, digits: int = 4, bound: bool = False) -> str:
    return f"{'<= ' * bound}{round(e.value, digits) + 0.0:.{digits}f} ± {e.margin:.{digits}f}"


def verdict(e: Estimate) -> str:
    """Bold where the interval excludes 0 by more than rounding."""
    return f"**{show(e)}**" if abs(e.value) > max(e.margin, 1e-5) else show(e)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def schedules_table(reports: dict[str, Report]) -> str:
    rows = [
        [w, str(t), show(r["cosine", "halton", t]["kl"])]
        + [
            verdict(paired_difference(r[s, "halton", t].groups["kl"], r["cosine", "halton", t].groups["kl"]))
            for s in SCHEDULES[1:]
        ]
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
            rows.append([w, str(t), *kls, *(show(c["pairs"]) for c in cells), show(cells[-1]["excess_nll"], 3)])
    head = [*(f"KL, {o}" for o in ORDERS[:-1]), *(f"pairs, {o}" for o in ORDERS), "excess NLL, confidence"]
    return markdown(["world", "steps", *head], rows)


def adaptive_table(reports: dict[str, Report]) -> str:
    rows = []
    for w, r in reports.items():
        for name, t in [(b, 64) for b in BOUNDS] + [("cosine", t) for t in STEPS]:
            c = r[name, "entropy", t]
            rows.append([w, name, f"{c.nfe:.1f}", show(c["kl"], bound=c.bound), show(c["excess_nll"], 3)])
    return markdown(["world", "rule", "NFE", "KL", "excess NLL"], rows)


def presets_table(reports: dict[str, Report]) -> str:
    rows = [
        [w, name, str(t), show(c["excess_nll"], 3), show(c["singles"]), show(c["pairs"])]
        for w, r in reports.items()
        for name in SAMPLER_PRESETS
        for t in (8, 16)
        for c in [r[f"as {name}", "", t]]
    ]
    return markdown(["world", "sampler", "steps", "excess NLL", "singles", "pairs"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lab_findings"))
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--worlds", default=",".join(WORLDS))
    args = parser.parse_args()
    reports = {}
    for name in args.worlds.split(","):
        world, out = WORLDS[name](), args.out / name
        fixed = compare(world, SCHEDULES, ORDERS, STEPS, samples=args.samples)
        adaptive = compare(world, BOUNDS, ["entropy"], [64], samples=args.samples)
        presets = compare(world, [], presets=SAMPLER_PRESETS, steps=(8, 16), samples=args.samples)
        reports[name] = Report(fixed.cells + adaptive.cells + presets.cells, fixed.titles, fixed.about)
        reports[name].save(out)
        print(f"{name}: {out}", flush=True)
    tables = {"Schedules": schedules_table, "Orders": orders_table, "Adaptive rules": adaptive_table}
    tables |= {"Samplers of known code bases": presets_table}
    text = "\n".join(f"## {title}\n\n{table(reports)}" for title, table in tables.items())
    (args.out / "findings.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
