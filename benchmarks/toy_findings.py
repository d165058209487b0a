"""How good is toy? `minimuse eval` in its three forms, and README's tables of what it finds.

    python benchmarks/toy_findings.py [--run RUN] [--out runs/toy_findings] [--parts base,cascade,sweep] [--docs]

    base      minimuse eval toy --base-only --kinds seen,novel,counts,relations,paraphrases,negative
    cascade   minimuse eval toy --kinds seen,relations,inpaint,outpaint,edit,superres,decoder --run RUN
    sweep     minimuse eval toy --sweep

1,000 pictures a kind (--n), 300 a point of the sweep (--points), seeds from 1000; two to three hours on 2 CPU cores,
as measured in pieces. Each part has a folder of its own in --out, pictures included, and goes on where it was stopped.
RUN is the folder of toy's training, for the decoder before its fine-tuning; without it that kind is left out.
Writes toy.json, toy.md and toy_sweep.png into --out; with --docs here as well, and README's tables.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from timing import HERE, machine, markdown, save, write_readme

from minimuse.data_captions import RELATION_PHRASES
from minimuse.eval_metrics import Estimate, proportion_interval
from minimuse.eval_run import RISING, measure, table

PARTS = {
    "base": {"base_only": True, "kinds": ["seen", "novel", "counts", "relations", "paraphrases", "negative"]},
    "cascade": {"kinds": ["seen", "relations", "inpaint", "outpaint", "edit", "superres", "decoder"]},
    "sweep": {"sweep": True},
}
TITLES = {
    "base": "The base model alone, at 64 px",
    "cascade": "The whole cascade, at 128 px",
    "sweep": "How it draws: a point of the sweep a line (base model, Muse's figure 8)",
}
PROMPTS = (  # what README says of a kind, which figure of it, and what we want of it
    ("one thing, seen combinations", "seen", "right", "97%"),
    ("one thing, held-out combinations", "novel", "right", "93%"),
    ("two or three alike", "counts", "right", "85%"),
    ("two things and where they stand", "relations", "right", "85%"),
    ("words never trained on", "paraphrases", "right", "70%"),
    ("the negative prompt's word shows nevertheless", "negative", "with", "at most 10%"),
)


def run(name: str, out: Path, how: dict[str, Any]) -> dict[str, Any]:
    """One part -> its figures, those of each relation among them."""
    found = measure(name, out, **how)
    if (path := out / "kinds" / "relations.json").exists():
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        found["kinds"]["relations"] |= json.loads(json.dumps(by_relation(rows)))
    return found


def by_relation(rows: list[dict[str, Any]]) -> dict[str, Estimate]:
    """Rows of kind "relations" -> what is right of each; a row's group names it, as "red cube left gray sphere"."""
    found = {}
    for name in RELATION_PHRASES:
        mine = [row for row in rows if name in row["group"].split()]
        if mine:
            found[f"right, {name}"] = proportion_interval(
                [row["right"] for row in mine], [row["group"] for row in mine]
            )
    return found


def cell(figure: list[Any]) -> str:
    """A figure of eval.json as README shows it: "99.3% (98.6 to 99.7)"."""
    return str(Estimate(*figure)).rsplit(", n", 1)[0] + ")"


def plain(figure: list[Any]) -> str:
    return f"{figure[0]:{figure[4]}}"


def prompts_table(kinds: dict[str, dict[str, Any]]) -> str:
    rows = [[says, cell(kinds[kind][name]), bar] for says, kind, name, bar in PROMPTS]
    without = kinds["negative"]["without"]
    rows[-1][0] += f" (without it: {plain(without)}; {without[3]:,} pictures)"
    return markdown(["Prompts", "Right, 95% interval", "Bar"], rows)


def cascade_table(kinds: dict[str, dict[str, Any]]) -> str:
    """A row a kind; what else is known of it beside."""
    inpaint, outpaint, edit, superres = (kinds[name] for name in ("inpaint", "outpaint", "edit", "superres"))
    changed = max(kind["changed outside"][0] for kind in (inpaint, outpaint))  # 0: bit for bit
    rows = [
        ["one thing, seen combinations", cell(kinds["seen"]["right"]), ""],
        ["two things and where they stand", cell(kinds["relations"]["right"]), ""],
        [
            "inpainting: a thing replaced",
            cell(inpaint["right"]),
            f"of one thing {plain(inpaint['right, of 1'])}, of two {plain(inpaint['right, of 2'])}; of the user's "
            f"pixels outside the mask {f'{changed:.2%}' if changed else 'none'} change",
        ],
        [
            "outpainting to the right",
            cell(outpaint["right"]),
            f"the step at the seam is {outpaint['seam'][0]:.1f}, where real pictures have "
            f"{outpaint['seam, real'][0]:.1f} (of 255)",
        ],
        [
            "mask-free edit: another colour",
            cell(edit["right"]),
            "after 100 iterations, the paper's number, and super-resolution; shape, size and material are then still "
            f"right in {plain(edit['rest, final'])}; after 10 the colour is there in {plain(edit['colour, 10'])}, "
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
    if "decoder" in kinds:
        found = kinds["decoder"]
        psnr = Estimate(*found["psnr, gain"][:4], ".2f")
        rows.append(
            [
                "real pictures through the high tokenizer, decoder fine-tuned",
                cell(found["right"]),
                f"{plain(found['right, before'])} before; it gains {cell([*psnr])} dB and "
                f"{-found['perceptual, gain'][0] / found['perceptual, before'][0]:.0%} of perceptual distance",
            ]
        )
    return markdown(["The whole cascade", "Right, 95% interval", ""], rows)


def rising_table(kinds: dict[str, dict[str, Any]]) -> str:
    """Guidance that rises from 0 to 2t beside t throughout: what is right, pair by pair, and the Frechet distance."""
    rows = [
        [
            f"0 to {name.split('-')[1]}, or {constant.split()[1]} throughout",
            *(cell(kinds[k]["right"]) for k in (name, constant)),
            cell(kinds[name][f"right, less {constant}"]),
            *(f"{kinds[k]['frechet'][0]:.3f}" for k in (name, constant)),
        ]
        for name, constant in RISING.items()
    ]
    head = ["Guidance", "Right, rising", "Right, constant", "Rising less constant", "Frechet, rising", "constant"]
    return markdown(head, rows)


def told(report: dict[str, Any]) -> str:
    """toy.md: every figure."""
    at = report["machine"]
    head = (
        "Made by `python benchmarks/toy_findings.py`; 95% intervals. *Clear*: right, and the reader at least half "
        f"sure. {at['device']}, torch {at['torch']}.\n"
    )
    text = ["# How good is toy\n", head]
    for name in (n for n in PARTS if n in report["parts"]):
        how, kinds = report["parts"][name]["settings"], report["parts"][name]["kinds"]
        found = {kind: {k: Estimate(*v) for k, v in figures.items()} for kind, figures in kinds.items()}
        text += [f"## {TITLES[name]}\n", f"{how['n']:,} pictures each, seeds from {how['seed']}.\n"]
        text += [table(found).split("\n\nSide by side")[0] + "\n"]
    return "\n".join(text)


def summary(report: dict[str, Any]) -> str:
    """README's tables."""
    kinds = {name: report["parts"][name]["kinds"] for name in PARTS}
    return "\n".join([prompts_table(kinds["base"]), cascade_table(kinds["cascade"]), rising_table(kinds["sweep"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="toy")
    parser.add_argument("--run", type=Path, help="folder of its training, for the decoder before fine-tuning")
    parser.add_argument("--out", type=Path, default=Path("runs/toy_findings"))
    parser.add_argument("--n", type=int, default=1000, help="pictures a kind")
    parser.add_argument("--points", type=int, default=300, help="pictures a point of the sweep")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    parser.add_argument("--docs", action="store_true", help="also write here, and README's tables")
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
            how |= {"training": args.run, "kinds": [k for k in how["kinds"] if args.run or k != "decoder"]}
        report["parts"][name] = run(args.checkpoint, args.out / name, how)
    save(args.out, "toy", report, told(report))
    if "sweep" in names:
        shutil.copy(args.out / "sweep" / "sweep-right.png", args.out / "toy_sweep.png")
    if args.docs:
        for name in ("toy.json", "toy.md", "toy_sweep.png"):
            shutil.copy(args.out / name, HERE)
        write_readme(summary(report), "toy")
    print(told(report))


if __name__ == "__main__":
    main()
