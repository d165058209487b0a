"""What the schedule lab finds: schedules, orders and adaptive rules in the three exact worlds, with 95% intervals.

    python benchmarks/lab_findings.py [--out runs/lab_findings] [--samples 2048] [--worlds mixture,chain,potts]
                                      [--parts optimum,fixed,adaptive,presets,guidance]

It writes a report for each world to --out, and findings.md with these tables, by part:
    optimum     random order: KL of the optimal counts, and paired differences of the other schedules' from it
    fixed       paired difference of the KL from that of cosine, in Halton order: below 0 is better than cosine; and
                for each order with cosine: KL, the squared distance of token pairs, and the excess NLL
    adaptive    NFE and KL of entropy-bounded rules, and of cosine in the same order
    presets     the samplers of published code bases
    guidance    in the world of labels: KL to p(x | y), and to the tilted target of t = 1
"""

import argparse
from pathlib import Path

from minimuse.eval_metrics import Estimate, paired_difference
from minimuse.lab import WORLDS, Report, World, compare
from minimuse.lab_optimum import expected_kl, information_curve, optimal_counts
from minimuse.lab_samplers import SAMPLER_PRESETS
from minimuse.masking import reveal_counts

SCHEDULES = ("cosine", "linear", "square", "cubic", "sqrt")
ORDERS = ("halton", "random", "entropy", "confidence")
STEPS = (4, 8, 16, 32)
CURVES = (*SCHEDULES, "arccos")
GUIDANCES = (
    "constant:0",
    "constant:1",
    "rising:2",
    "falling:2",
    "interval:2:0.5:1",
    "interval:2:0:0.5",
    "power-cosine:2:1",
)
BOUNDS = tuple(f"bound{b}" for b in (0.25, 0.5, 1, 2, 4, 8))


def show(e: Estimate, digits: int = 4, bound: bool = False) -> str:
    return f"{'<= ' * bound}{round(e.value, digits) + 0.0:.{digits}f} ± {e.margin:.{digits}f}"


def verdict(e: Estimate) -> str:
    """Bold where the interval excludes 0 by more than rounding."""
    return f"**{show(e)}**" if abs(e.value) > max(e.margin, 1e-5) else show(e)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]) + "\n"


def optimum_table(reports: dict[str, Report]) -> str:
    rows = []
    for w, r in reports.items():
        for t in STEPS[:3]:
            best = r["optimal", "random", t]
            gaps = [paired_difference(r[s, "random", t].groups["kl"], best.groups["kl"]) for s in CURVES]
            rows.append([w, str(t), show(best["kl"]), *map(verdict, gaps)])
    return markdown(["world", "steps", "optimal, KL", *(f"{s} - optimal" for s in CURVES)], rows)


def counts_table(worlds: dict[str, World]) -> str:
    rows = []
    for w, world in worlds.items():
        h = information_curve(world)
        for t in STEPS[:3]:
            best, cosine = optimal_counts(h, t), reveal_counts(world.n, t, "cosine")
            shown = [" ".join(map(str, counts)) for counts in (best, cosine)]
            rows.append([w, str(t), *shown, f"{expected_kl(h, best):.4f}", f"{expected_kl(h, cosine):.4f}"])
    return markdown(["world", "steps", "optimal counts", "cosine", "its KL, closed form", "cosine's"], rows)


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


def guidance_table(reports: dict[str, Report]) -> str:
    rows = []
    for t in STEPS[:3]:
        base = reports["labels"]["constant:1", "", t]
        for g in GUIDANCES:
            c = reports["labels"][g, "", t]
            gaps = [verdict(paired_difference(c.groups[m], base.groups[m])) for m in ("kl", "tilted")]
            rows.append([str(t), g, show(c["kl"]), gaps[0], show(c["tilted"]), gaps[1], show(c["excess_nll"], 3)])
    head = ["KL to p(x, given y)", "less constant:1", "KL to the tilted target", "less constant:1", "excess NLL"]
    return markdown(["steps", "guidance", *head], rows)


PARTS = {  # schedules, orders, steps and more for `compare`
    "optimum": [(["optimal", *CURVES], ["random"], STEPS[:3], {})],
    "fixed": [(SCHEDULES, ORDERS, STEPS, {})],
    "adaptive": [(BOUNDS, ["entropy"], [64], {}), (["cosine"], ["entropy"], STEPS, {})],
    "presets": [([], [], (8, 16), {"presets": SAMPLER_PRESETS})],
    "guidance": [([], [], STEPS[:3], {"presets": {g: {"order": "halton", "guidance": g} for g in GUIDANCES}})],
}
TABLES = {
    "optimum": {"The optimum": optimum_table},
    "fixed": {"Schedules": schedules_table, "Orders": orders_table},
    "adaptive": {"Adaptive rules": adaptive_table},
    "presets": {"Samplers of known code bases": presets_table},
    "guidance": {"Guidance": guidance_table},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lab_findings"))
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--worlds", default="mixture,chain,potts")
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    worlds, text = {name: WORLDS[name]() for name in args.worlds.split(",")}, []
    for part in args.parts.split(","):
        reports = {}
        for name, world in ({"labels": WORLDS["labels"]()} if part == "guidance" else worlds).items():
            found = [compare(world, *each, samples=args.samples, **more) for *each, more in PARTS[part]]
            reports[name] = Report([c for r in found for c in r.cells], found[0].titles, found[0].about)
            reports[name].save(args.out / f"{name}-{part}")
            print(f"{name}, {part}: {args.out}", flush=True)
        text += [f"## {title}\n\n{table(reports)}" for title, table in TABLES[part].items()]
        if part == "optimum":
            text.append(counts_table(worlds))
    text = "\n".join(text)
    (args.out / "findings.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
