"""How good is `toy`? The three forms of `minimuse eval`, and the tables of benchmarks/README.md.

    python benchmarks/toy_findings.py [--run RUN] [--out runs/toy_findings] [--parts base,cascade,sweep] [--docs]

    base      minimuse eval toy --base-only --kinds seen,novel,counts,relations,paraphrases,negative
    cascade   minimuse eval toy --kinds seen,relations,inpaint,outpaint,edit,superres,decoder --run RUN
    sweep     minimuse eval toy --sweep

From the values of each picture it also computes metrics of parts of a task: each relation, each number of things, what
an edit leaves as it was; and paired differences between variants of a picture.

1,000 pictures per task (--n), 300 per point of the sweep (--points), seeds from 1000. The stored numbers are of 500 for
the base model, 200 for the cascade, 150 for a point. Two
to three hours on 2 CPU cores. Each part has its own folder in --out, with pictures, and continues after its last
finished task. RUN is the folder of toy's training, with the decoder before fine-tuning; without it, that task is left
out.
Writes toy.json, toy.md and toy_sweep.png into --out; with --docs also into this folder, with the tables of README.md.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timing import HERE, machine, markdown, save, write_readme

from minimuse import checkpoint
from minimuse.data_captions import RELATION_PHRASES
from minimuse.data_scenes import MATERIALS, SIZES
from minimuse.eval_metrics import Estimate, paired_difference, proportion_interval
from minimuse.eval_networks import FIELDS
from minimuse.eval_prompts import prompt_set
from minimuse.eval_run import measure, table

PARTS = {
    "base": {"base_only": True, "tasks": ["seen", "novel", "counts", "relations", "paraphrases", "negative"]},
    "cascade": {"tasks": ["seen", "relations", "inpaint", "outpaint", "edit", "superres", "decoder"]},
    "sweep": {"sweep": True},
}
TITLES = {
    "base": "The base model alone, at 64 px",
    "cascade": "The whole cascade, at 128 px",
    "sweep": "The sweep: one line per point (base model, Muse's figure 8)",
}
RISING = {f"rising guidance 0-{2 * t}": f"guidance {t}" for t in (1, 2, 4, 8)}  # pairs with the same mean guidance
PROMPTS = (  # what the table says of a task, which metric it shows, and the bar
    ("one thing, seen combinations", "seen", "right", "97%"),
    ("one thing, held-out combinations", "novel", "right", "93%"),
    ("two or three alike", "counts", "right", "85%"),
    ("two things and where they stand", "relations", "right", "85%"),
    ("words never trained on", "paraphrases", "right", "70%"),
    ("the negative prompt's word shows nevertheless", "negative", "with", "at most 10%"),
)


def run(name: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Measure one part -> its report, with the derived metrics."""
    report = measure(name, out, **options)
    report["settings"]["weights of base"] = base_weights(checkpoint.find(name))
    paths = {task: out / "tasks" / f"{task}.json" for task in report["tasks"]}
    values = {task: json.loads(path.read_text(encoding="utf-8"))["values"] for task, path in paths.items()}
    for task, columns in values.items():
        found = derived(task, columns)
        if task in RISING:
            found[f"right, less {RISING[task]}"] = paired(columns["right"], values[RISING[task]]["right"], columns)
        report["tasks"][task] |= json.loads(json.dumps(found))
    return report


def base_weights(folder: Path) -> str:
    """SHA-256 of the networks of base pictures. Another super-resolution changes no metric of `base` or `sweep`."""
    sha = hashlib.sha256()
    for key, tensor in sorted(load_file(folder / checkpoint.WEIGHTS).items()):
        if key.startswith(("base.", "low_tokenizer.")):
            sha.update(key.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()


def proportion(successes: Sequence[bool], values: dict[str, list[Any]], rows: Sequence[int]) -> Estimate:
    """The fraction of successes among some pictures of a task."""
    return proportion_interval([successes[i] for i in rows], [values["group"][i] for i in rows])


def paired(first: list[Any], second: list[Any], values: dict[str, list[Any]]) -> Estimate:
    return paired_difference(torch.tensor(first), torch.tensor(second), values["group"])


def derived(task: str, values: dict[str, list[Any]]) -> dict[str, Estimate]:
    """Values of a task's pictures -> metrics that are made from them."""
    groups, found = values["group"], {}
    if task == "relations":  # a group is "red cube left gray sphere"
        for name in RELATION_PHRASES:
            if rows := [i for i, group in enumerate(groups) if name in group.split()]:
                found[f"right, {name}"] = proportion(values["right"], values, rows)
    if task == "inpaint":
        for things in (1, 2):
            rows = [i for i, group in enumerate(groups) if group.count(" and ") == things - 1]
            found[f"right, of {things}"] = proportion(values["right"], values, rows)
    if task == "negative":
        found |= avoidance(values)
    if task == "edit":
        found |= unchanged(values)
    for variant in ("bicubic", "no text"):
        if f"right, {variant}" in values:
            found[f"right, gain over {variant}"] = paired(values["right"], values[f"right, {variant}"], values)
    if "psnr, before" in values:
        found["psnr, gain"] = paired(values["psnr"], values["psnr, before"], values)
    return found


def avoidance(values: dict[str, list[Any]]) -> dict[str, Estimate]:
    """How often each word to guide away from shows; together, those that at least 40% of unguided pictures show."""
    names = {"unguided": "word shown, unguided", "without": "word shown, without", "with": "word shown"}
    found, often = {}, []
    for word in (*SIZES, *MATERIALS):
        rows = [i for i, group in enumerate(values["group"]) if group.endswith(f"not {word}")]  # "red cube, not metal"
        for name, column in names.items() if rows else ():
            found[f"{word}, {name}"] = proportion(values[column], values, rows)
        often += rows if rows and found[f"{word}, unguided"].value >= 0.4 else []
    return found | {name: proportion(values[names[name]], values, often) for name in ("without", "with") if often}


def unchanged(values: dict[str, list[Any]]) -> dict[str, Estimate]:
    """Of edits after some iterations and at the end: is the color the new one, and the rest as it was?"""
    things = [ask.scene.things[0] for ask in prompt_set("edit", len(values["group"]))]
    found = {}
    for mark in (", 10", ", 30", ", 100", ""):
        equal = {
            field: [seen == getattr(thing, field) for seen, thing in zip(values[f"{field}{mark}"], things, strict=True)]
            for field in FIELDS
        }
        rest = [all(row) for row in zip(*(equal[k] for k in ("shape", "size", "material")), strict=True)]
        found[f"colour{mark}"] = proportion_interval(equal["color"], values["group"])
        found[f"rest{mark}"] = proportion_interval(rest, values["group"])
    return found


def cell(metric: list[Any]) -> str:
    """A metric of eval.json as the tables show it: "99.3% (98.6 to 99.7)"."""
    return Estimate(*metric).short()


def plain(metric: list[Any]) -> str:
    """The value alone: "99.3%"."""
    return f"{metric[0]:{metric[4]}}"


def prompts_table(tasks: dict[str, dict[str, Any]]) -> str:
    rows = [[says, cell(tasks[task][name]), bar] for says, task, name, bar in PROMPTS]
    without = tasks["negative"]["without"]
    rows[-1][0] += f" (without it: {plain(without)}; {without[3]:,} pictures)"
    return markdown(["Prompts", "Right, 95% interval", "Bar"], rows)


def cascade_table(tasks: dict[str, dict[str, Any]]) -> str:
    """One row per task, with what else is known about it."""
    inpaint, outpaint, edit, superres = (tasks[name] for name in ("inpaint", "outpaint", "edit", "superres"))
    rows = [
        ["one thing, seen combinations", cell(tasks["seen"]["right"]), ""],
        ["two things and where they stand", cell(tasks["relations"]["right"]), ""],
        [
            "inpainting: a thing replaced",
            cell(inpaint["right"]),
            f"of one thing {plain(inpaint['right, of 1'])}, of two {plain(inpaint['right, of 2'])}",
        ],
        ["outpainting to the right", cell(outpaint["right"]), ""],
        [
            "mask-free edit: another colour",
            cell(edit["right"]),
            "after 100 iterations, the paper's number, and super-resolution; shape, size and material are then still "
            f"right in {plain(edit['rest'])}; after 10 the colour is there in {plain(edit['colour, 10'])}, "
            f"after 30 in {plain(edit['colour, 30'])}",
        ],
        ["one to three things, after super-resolution", cell(superres["right"]), ""],
        [
            "the base model's pictures of them, enlarged",
            cell(superres["right, bicubic"]),
            f"super-resolution gains {cell(superres['right, gain over bicubic'])} points over bicubic".replace("%", ""),
        ],
        [
            "after super-resolution that does not see the text",
            cell(superres["right, no text"]),
            f"the text gains {cell(superres['right, gain over no text'])} points".replace("%", ""),
        ],
    ]
    if "gmsd, true less true bicubic" in superres:
        psnr, gmsd, perceptual = (
            superres[f"{name}, true less true bicubic"] for name in ("psnr", "gmsd", "perceptual")
        )
        rows.append(
            [
                "super-resolution of real low tokens, less bicubic",
                f"{cell([*psnr[:4], '+.2f'])} dB",
                f"GMSD {cell([*gmsd[:4], '+.4f'])}, perceptual distance {cell([*perceptual[:4], '+.4f'])}; "
                "of both, lower is better",
            ]
        )
    if "decoder" in tasks:
        found = tasks["decoder"]
        psnr = Estimate(*found["psnr, gain"][:4], ".2f")
        rows.append(
            [
                "real pictures through the high tokenizer, decoder fine-tuned",
                cell(found["right"]),
                f"{plain(found['right, before'])} before; it gains {cell([*psnr])} dB",
            ]
        )
    return markdown(["The whole cascade", "Right, 95% interval", ""], rows)


def rising_table(tasks: dict[str, dict[str, Any]]) -> str:
    """Guidance that rises from 0 to 2t, next to constant t: what is right, pair by pair, and the Frechet distance."""
    rows = [
        [
            f"0 to {name.split('-')[1]}, or {constant.split()[1]} throughout",
            *(cell(tasks[k]["right"]) for k in (name, constant)),
            cell(tasks[name][f"right, less {constant}"]),
            *(f"{tasks[k]['frechet'][0]:.3f}" for k in (name, constant)),
        ]
        for name, constant in RISING.items()
    ]
    head = ["Guidance", "Right, rising", "Right, constant", "Rising less constant", "Frechet, rising", "constant"]
    return markdown(head, rows)


def page(report: dict[str, Any]) -> str:
    """toy.md: every metric."""
    at = report["machine"]
    head = (
        "Made by `python benchmarks/toy_findings.py`; 95% intervals. *Clear*: right, and the detector is at least half "
        f"sure. {at['device']}, torch {at['torch']}.\n"
    )
    text = ["# How good is toy\n", head]
    for name in (n for n in PARTS if n in report["parts"]):
        how, tasks = report["parts"][name]["settings"], report["parts"][name]["tasks"]
        found = {task: {k: Estimate(*v) for k, v in metrics.items()} for task, metrics in tasks.items()}
        text += [f"## {TITLES[name]}\n", f"{how['n']:,} pictures each, seeds from {how['seed']}.\n"]
        text += [table(found) + "\n"]
    return "\n".join(text)


def summary(report: dict[str, Any]) -> str:
    """The tables of README.md."""
    tasks = {name: report["parts"][name]["tasks"] for name in PARTS}
    return "\n".join([prompts_table(tasks["base"]), cascade_table(tasks["cascade"]), rising_table(tasks["sweep"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="toy")
    parser.add_argument("--run", type=Path, help="folder of its training, for the decoder before fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("runs/toy_findings"))
    parser.add_argument("--n", type=int, default=1000, help="pictures per task")
    parser.add_argument("--points", type=int, default=300, help="pictures per point of the sweep")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    parser.add_argument("--docs", action="store_true", help="also write here, and the tables of README.md")
    args = parser.parse_args()
    names = args.parts.split(",")
    if unknown := set(names) - set(PARTS):
        raise SystemExit(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if args.docs and (set(names) != set(PARTS) or not args.run):
        raise SystemExit("--docs writes all there is: leave out --parts, and give --run")
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "parts": {}}
    for name in names:
        how = dict(PARTS[name]) | {"n": args.points if name == "sweep" else args.n}
        if name == "cascade":
            how |= {"training": args.run, "tasks": [k for k in how["tasks"] if args.run or k != "decoder"]}
        report["parts"][name] = run(args.checkpoint, args.out / name, how)
    save(args.out, "toy", report, page(report))
    if "sweep" in names:
        shutil.copy(args.out / "sweep" / "sweep-right.png", args.out / "toy_sweep.png")
    if args.docs:
        for name in ("toy.json", "toy.md", "toy_sweep.png"):
            shutil.copy(args.out / name, HERE)
        write_readme(summary(report), "toy")
    print(page(report))


if __name__ == "__main__":
    main()
