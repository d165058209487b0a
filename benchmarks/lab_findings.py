"""What the schedule lab finds: schedules, orders and adaptive rules in the three exact worlds, with 95% intervals.

    python benchmarks/lab_findings.py [--out runs/lab_findings] [--samples 2048] [--worlds mixture,chain,potts]
                                      [--parts optimum,fixed,adaptive,presets,guidance,samplers,noise,nano]

It writes a report for each world to --out, and findings.md with these tables, by part:
    optimum     random order: KL of the optimal counts, and paired differences of the other schedules' from it
    fixed       paired difference of the KL from that of cosine, in Halton order: below 0 is better than cosine; and
                for each order with cosine: KL, the squared distance of token pairs, and the excess NLL
    adaptive    NFE and KL of entropy-bounded rules, and of cosine in the same order
    presets     the samplers of published code bases
    guidance    in the world of labels: KL to p(x | y), and to the tilted target of t = 1
    samplers    every sampler by name at 8 forward passes, and paired differences from the optimum
    noise       ranking noise a against temperature a / (1 + a) (arXiv 2510.04525), with a figure
    nano        the samplers in the trained `nano`, at 8 forward passes: accuracy and Frechet distance
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minimuse.eval_metrics import Estimate, paired_difference
from minimuse.lab import WORLDS, Cell, Report, World, WorldEvaluator, compare
from minimuse.lab_models import MuseEvaluator
from minimuse.lab_optimum import expected_kl, information_curve, optimal_counts, run
from minimuse.lab_samplers import SAMPLER_PRESETS, SAMPLERS, preset_settings
from minimuse.masking import reveal_counts
from minimuse.muse import Muse
from minimuse.sampler import decode

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
NFE = 8  # forward passes of every sampler in the tables of all samplers
KNOBS = {  # adaptive rules: a number in 0..1 -> the rule; the larger, the fewer passes
    "eb": lambda x: f"eb:{50 * x:.4f}",
    "entropy_sum": lambda x: f"entropy_sum:{50 * x:.4f}",
    "fast_dllm": lambda x: f"fast_dllm:{1 - x:.4f}",
    "fast_dllm_factor": lambda x: f"fast_dllm_factor:{50 * x:.4f}",
    "klass": lambda x: f"klass:{1 - x:.4f}:{x:.4f}",
}
BASELINES = {
    "optimal counts, random": {"schedule": "optimal", "order": "random"},
    "cosine, random": {"schedule": "cosine", "order": "random"},
    "cosine, halton": {"schedule": "cosine", "order": "halton"},
    "cosine, entropy": {"schedule": "cosine", "order": "entropy"},
}
ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
BOUNDS = tuple(f"bound{b}" for b in (0.25, 0.5, 1, 2, 4, 8))


def show(e: Estimate, digits: int = 4, bound: bool = False) -> str:
    return f"{'<= ' * bound}{round(e.value, digits) + 0.0:.{digits}f} ± {e.margin:.{digits}f}"


def verdict(e: Estimate, digits: int = 4) -> str:
    """Bold where the interval excludes 0 by more than rounding."""
    return f"**{show(e, digits)}**" if abs(e.value) > max(e.margin, 1e-5) else show(e, digits)


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


def tuned(knob: Callable[[float], str], passes: Callable[[str], float]) -> str:
    """The rule whose mean forward passes are nearest to NFE: bisection."""
    low, high, found = 0.0, 1.0, {}
    for _ in range(8):
        middle = (low + high) / 2
        found[middle] = passes(knob(middle))
        low, high = (middle, high) if found[middle] > NFE else (low, middle)
    return knob(min(found, key=lambda x: abs(found[x] - NFE)))


def all_samplers(evaluator: Any, world: World | None, passes: Callable[[dict[str, Any]], float]) -> Report:
    """Every sampler by name with NFE forward passes, and the seconds of CPU that each took in `about`."""
    n, v = evaluator.grid[0] * evaluator.grid[1], evaluator.codebook_size
    names = [name for name in SAMPLERS if name != "meissonic" and (world or name not in ("token_critic", "informed"))]
    trials, seconds, cells = dict(BASELINES), {}, []
    for name in [*names, "dilated:32"]:
        if name in KNOBS:
            name = tuned(KNOBS[name], lambda rule: passes(preset_settings(rule, n, v, n)))
        steps = n if name.partition(":")[0] in KNOBS else NFE // 2 if name == "informed" else NFE
        trials[name] = preset_settings(name, n, v, steps, world)
    for name, settings in trials.items():
        start = time.process_time()
        found = compare(evaluator, [], [], [NFE], presets={name: settings})
        seconds[name] = round(time.process_time() - start, 1)
        cells += found.cells
        print(name, round(cells[-1].nfe, 2), seconds[name], flush=True)
    return Report(cells, found.titles, found.about | {"CPU seconds": seconds})


def in_world(world: World, samples: int) -> Report:
    def passes(settings: dict[str, Any]) -> float:
        start = torch.full((64, world.n), world.mask_id)
        generator = torch.Generator().manual_seed(0)
        return run(decode(world, start, mask_id=world.mask_id, generator=generator, **settings))[1] / 64

    return all_samplers(WorldEvaluator(world, samples), world, passes)


def in_nano(samples: int) -> Report:
    evaluator = MuseEvaluator(Muse.from_pretrained("nano", device="cpu"), samples)

    def passes(settings: dict[str, Any]) -> float:
        settings = settings | {"steps": 3 * NFE}  # less work; a rule that takes more is too slow anyway
        return evaluator.draw(evaluator.prompts[:16], list(range(16)), settings)[1] / 16

    return all_samplers(evaluator, None, passes)


def samplers_table(r: Report, columns: dict[str, int], rank: Callable[[Cell], float]) -> str:
    """Each metric, and its paired difference from the optimal counts in random order."""
    best, rows = r.cells[0], []
    for c in sorted(r.cells, key=rank):
        row = [c.schedule, f"{c.nfe:.1f}"]
        for metric, digits in columns.items():
            known = metric in c.groups
            row.append(show(c[metric], digits, c.bound and metric == "kl") if known else "")
            gap = paired_difference(c.groups[metric], best.groups[metric]) if known and c is not best else None
            row.append(verdict(gap, digits) if gap else "")
        rows.append(row)
    names = {"kl": "KL", "excess_nll": "excess NLL", "frechet": "Frechet distance"}
    head = [title for metric in columns for title in (names.get(metric, metric), "less the optimum's")]
    return markdown(["sampler", "NFE", *head], rows)


def worlds_tables(reports: dict[str, Report]) -> str:
    columns = {"kl": 4, "excess_nll": 3, "pairs": 4}
    text = []
    for w, r in reports.items():
        slowest = max(r.about["CPU seconds"].items(), key=lambda item: item[1])
        text.append(f"### {w}\n\n" + samplers_table(r, columns, lambda c: abs(c["excess_nll"].value)))
        text.append(f"The longest row, {slowest[0]}, took {slowest[1]} s on one thread.\n")
    return "\n".join(text)


def nano_table(reports: dict[str, Report]) -> str:
    return samplers_table(reports["nano"], {"accuracy": 3, "frechet": 2}, lambda c: -c["accuracy"].value)


def noise_trials() -> dict[str, dict[str, Any]]:
    """Constant ranking noise a of MaskGIT, and what arXiv 2510.04525 says that it acts like."""
    trials = {}
    for a in ALPHAS:
        tempered = {"schedule": "cosine", "sampling_temperature": a / (1 + a)}
        moment = lambda logits, drawn, masked, u, a=a: a * ((1 + 1 / a) * logits.log_softmax(-1)).logsumexp(-1)  # noqa: E731
        trials[f"noise {a:g}"] = {"schedule": "cosine", "order": "confidence", "choice_temperature": lambda u, a=a: a}
        trials[f"moment {a:g}"] = tempered | {"order": moment, "choice_temperature": lambda u, a=a: a}
        trials[f"temperature {a:g}"] = tempered | {"order": "random"}
    return trials


def noise_table(reports: dict[str, Report]) -> str:
    rows = []
    for w, r in reports.items():
        for a in ALPHAS:
            noise, *others = (r[f"{kind} {a:g}", "", 16] for kind in ("noise", "moment", "temperature"))
            gaps = [paired_difference(noise.groups["excess_nll"], c.groups["excess_nll"]) for c in others]
            shown = [show(c["excess_nll"], 3) for c in (noise, *others)]
            rows.append([w, f"{a:g}", f"{a / (1 + a):.2f}", *shown, *(verdict(gap, 3) for gap in gaps)])
    head = ["excess NLL, noise", "moment sampler", "temperature, random order", "noise - moment", "noise - temperature"]
    return markdown(["world", "a", "a / (1 + a)", *head], rows)


def plot_noise(reports: dict[str, Report], path: Path) -> None:
    """The curves of `noise_table`, a panel for each world -> a picture."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(reports), figsize=(4 * len(reports), 3.5), layout="constrained", squeeze=False)
    names = {"noise": "ranking noise a", "moment": "moment sampler, a", "temperature": "temperature a / (1 + a)"}
    for ax, (w, r) in zip(axes[0], reports.items(), strict=True):
        for (kind, label), style in zip(names.items(), ("o-", "s--", "^:"), strict=True):
            found = [r[f"{kind} {a:g}", "", 16]["excess_nll"] for a in ALPHAS]
            values, margins = [e.value for e in found], [e.margin for e in found]
            ax.errorbar(ALPHAS, values, margins, fmt=style, capsize=3, label=label)
        ax.axhline(0, color="k", lw=1)
        ax.set_xscale("log", base=2)
        ax.set(title=w, xlabel="a", ylabel="excess NLL, nats a token")
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


PARTS = {  # schedules, orders, steps and more for `compare`
    "optimum": [(["optimal", *CURVES], ["random"], STEPS[:3], {})],
    "fixed": [(SCHEDULES, ORDERS, STEPS, {})],
    "adaptive": [(BOUNDS, ["entropy"], [64], {}), (["cosine"], ["entropy"], STEPS, {})],
    "presets": [([], [], (8, 16), {"presets": SAMPLER_PRESETS})],
    "guidance": [([], [], STEPS[:3], {"presets": {g: {"order": "halton", "guidance": g} for g in GUIDANCES}})],
    "noise": [([], [], [16], {"presets": noise_trials()})],
}
TABLES = {
    "optimum": {"The optimum": optimum_table},
    "fixed": {"Schedules": schedules_table, "Orders": orders_table},
    "adaptive": {"Adaptive rules": adaptive_table},
    "presets": {"Samplers of known code bases": presets_table},
    "guidance": {"Guidance": guidance_table},
    "samplers": {f"All samplers at {NFE} forward passes": worlds_tables},
    "noise": {"Ranking noise is a temperature": noise_table},
    "nano": {f"The samplers in nano at {NFE} forward passes": nano_table},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lab_findings"))
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--worlds", default="mixture,chain,potts")
    parser.add_argument("--parts", default=",".join(TABLES))
    args = parser.parse_args()
    worlds, text = {name: WORLDS[name]() for name in args.worlds.split(",")}, []
    for part in args.parts.split(","):
        reports = {}
        of = {"guidance": {"labels": WORLDS["labels"]()}, "nano": {"nano": None}}.get(part, worlds)
        for name, world in of.items():
            if part in PARTS:
                found = [compare(world, *each, samples=args.samples, **more) for *each, more in PARTS[part]]
                reports[name] = Report([c for r in found for c in r.cells], found[0].titles, found[0].about)
            else:
                reports[name] = in_world(world, args.samples) if world else in_nano(min(args.samples, 256))
            reports[name].save(args.out / f"{name}-{part}")
            print(f"{name}, {part}: {args.out}", flush=True)
        text += [f"## {title}\n\n{table(reports)}" for title, table in TABLES[part].items()]
        if part == "optimum":
            text.append(counts_table(worlds))
        if part == "noise":
            plot_noise(reports, args.out / "lab_findings_noise.png")
    text = "\n".join(text)
    (args.out / "findings.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
