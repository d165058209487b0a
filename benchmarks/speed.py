"""Speed of sampling and training, compared with other projects and with the matrix products of this machine.

    pip install -e ".[offline,amused]"
    pip install --no-deps --target runs/peers muse-maskgit-pytorch==0.3.5 memory-efficient-attention-pytorch==0.1.6 \\
        einops==0.8.2 beartype==0.23.1
    python benchmarks/speed.py --peers runs/peers [--out runs/speed] [--rounds 3] [--quick] [--docs]

`peers.py` defines who takes part and how they are made equal. Every project runs in a warm process of its own. They
take turns, in fp32 and, where this CPU is fast at it, in bf16. Times are medians of the rounds, ratios are medians
of the ratios of each round.
    sampling    tokens of one batch of pictures, with guidance in every step
    training    one step: loss, gradient, clipping, AdamW
    ceiling     the product of two 2048 x 2048 matrices. The fraction of the ceiling counts the FLOPs of the shape
                (`train_budget.py`): two for each multiply-add, logits and attention included
    memory      the largest memory of a process, from the start of Python
    start       `import minimuse` beyond `import torch`; `minimuse generate` from return to picture; drawing alone
Keep the machine idle. A project that is not installed is left out, and the report says why. --quick runs tiny shapes.
Writes speed.json and speed.md into --out; --docs also writes the tables of speed.md here and of benchmarks/README.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from flops import decode_flops
from peers import CPU, ENTRANTS, GUIDANCE, Shape
from timing import (
    HERE,
    Apart,
    alone,
    alternate,
    machine,
    markdown,
    peak_memory,
    precisions,
    ratio,
    save,
    short,
    timed,
    write_readme,
)

from minimuse.sampler import SamplingConfig
from minimuse.text import Context
from minimuse.train import MaskedLoss
from minimuse.train_budget import count_flops, duration, matmul_ceiling, si
from minimuse.transformer import Transformer

SHAPES = {
    "4 pictures of 256 tokens": Shape(batch=4, grid=16, codes=8192, width=512, layers=8, text=32, steps=24),
    "1 picture of 256 tokens": Shape(batch=1, grid=16, codes=8192, width=512, layers=8, text=32, steps=24),
    "16 pictures of 64 tokens": Shape(batch=16, grid=8, codes=512, width=192, layers=6, text=20, steps=16),
}
QUICK = {"tiny": Shape(batch=2, grid=4, codes=32, width=32, layers=2, text=5, steps=2)}
IMPORTS = """
import json, time
times = [time.perf_counter()]
import torch
times.append(time.perf_counter())
from minimuse import Muse
times.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""
DRAWING = """
import json, sys, time
from minimuse import Muse
muse = Muse.from_pretrained(sys.argv[1], device="cpu")
muse.encoder.encode(["a cube"])
began = time.perf_counter()
muse.generate("a large red cube", seed=0)
print(json.dumps(time.perf_counter() - began))
"""
OURS = "minimuse"

# --- arithmetic -------------------------------------------------------------------------------------------------------


def sampling_flops(shape: Shape) -> int:
    """FLOPs to decode one batch."""
    how = SamplingConfig(steps=shape.steps, guidance=(GUIDANCE, GUIDANCE))
    with torch.device("meta"), torch.no_grad():
        return shape.batch * sum(decode_flops(Transformer(shape.config()), how, shape.text))


def training_flops(shape: Shape) -> int:
    """FLOPs of the forward and backward pass of one batch."""
    with torch.device("meta"):
        loss, x = MaskedLoss(Transformer(shape.config())), torch.zeros(1, shape.grid**2, dtype=torch.long)
        text = Context(torch.zeros(1, shape.text, loss.model.config.text_width), torch.ones(1, shape.text).bool())
        return shape.batch * count_flops(lambda: loss(x, x == 0, text, None, x.numel())[0].backward())


# --- measuring --------------------------------------------------------------------------------------------------------


def prepare(work: str, name: str, shape: Shape, dtype: torch.dtype) -> tuple[Any, int]:
    """-> a warm function that does `work` ("sampling" or "training") once, and the number of parameters."""
    torch.manual_seed(0)
    run, parameters = getattr(ENTRANTS[name], work)(shape, dtype)
    if work == "sampling":
        run(1)
        return partial(run, shape.steps), parameters
    run()
    return run, parameters


def apart(work: str, name: str, shape: Shape, dtype: torch.dtype) -> tuple[Any, int]:
    """Like `prepare`, in a separate process."""
    run = Apart(prepare, work, name, shape, dtype)
    return run, run.about


def compete(work: str, shape: Shape, rounds: int, prepare: Callable[..., tuple[Any, int]] = apart) -> dict[str, Any]:
    """All projects take turns -> one row for each, and the reason where one is left out."""
    runs, rows, absent = {}, {}, {}
    for name, entrant in ENTRANTS.items():
        for dtype in precisions(CPU):
            label = f"{name}, {short(dtype)}"
            try:
                run, parameters = prepare(work, name, shape, dtype)
            except ImportError as error:
                absent[name] = str(error)
                break
            except RuntimeError as error:  # a peer may not know bf16
                if name == OURS:
                    raise
                absent[label] = str(error)
                continue
            runs[label] = run
            default = entrant.default(shape) == dtype
            rows[label] = {"entrant": name, "dtype": short(dtype), "default": default, "parameters": parameters}
    for label, seconds in alternate(runs, rounds, CPU).items():
        rows[label]["seconds"] = seconds
    for run in runs.values():
        if isinstance(run, Apart):
            run.close()
    ours = {row["dtype"]: row for row in rows.values() if row["entrant"] == OURS}
    best = next(row for row in ours.values() if row["default"])
    for row in rows.values():
        row["over default"] = ratio(row["seconds"], best["seconds"])
        row["over same dtype"] = ratio(row["seconds"], ours[row["dtype"]]["seconds"])
    return {"rows": list(rows.values()), "absent": absent}


def ceilings(seconds: float) -> dict[str, float]:
    """FLOP/s of large products, by precision."""
    return {short(dtype): matmul_ceiling(CPU, dtype, seconds=seconds) for dtype in precisions(CPU)}


def hold(work: str, name: str, shape: Shape) -> int:
    """Run two steps of `work` with the defaults of a project -> peak memory in bytes. Call it in a separate process."""
    dtype = ENTRANTS[name].default(shape)
    run, _ = getattr(ENTRANTS[name], work)(shape, dtype)
    for _ in range(2):
        run(2) if work == "sampling" else run()
    return peak_memory()


def memories(shape: Shape, names: list[str], peers: str) -> dict[str, dict[str, int]]:
    """-> peak memory in bytes, by work and by project."""
    how = ["--peers", peers]
    return {
        work: {n: alone(__file__, *how, "--alone", json.dumps([work, n, *shape])) for n in names}
        for work in ("sampling", "training")
    }


def starts(checkpoint: str, rounds: int) -> dict[str, float]:
    """Median seconds until a user sees something."""
    imports = [alone("-c", IMPORTS) for _ in range(max(rounds, 3))]
    command = "import sys; from minimuse.cli import main; main(sys.argv[1:]); print(0)"
    with TemporaryDirectory() as folder:
        arguments = ["generate", "a large red cube", "--model", checkpoint, "--seed", "0", "--force", "--out"]
        run = partial(alone, "-c", command, *arguments, str(Path(folder, "picture.png")))
        pictures = [timed(run, CPU) for _ in range(rounds)]
    return {
        "import torch": median(a for a, _ in imports),
        "import minimuse beyond it": median(b for _, b in imports),
        f"minimuse generate ({checkpoint}), from return to picture": median(pictures),
        "of which drawing": median(alone("-c", DRAWING, checkpoint) for _ in range(rounds)),
    }


def measure(shapes: dict[str, Shape], *, rounds: int, seconds: float, checkpoint: str, peers: str) -> dict[str, Any]:
    """-> the whole report. Each table is printed when it is ready."""
    report: dict[str, Any] = {"machine": machine(CPU), "rounds": rounds, "shapes": {}}
    for title, shape in shapes.items():
        found: dict[str, Any] = {"shape": shape._asdict(), "ceiling": ceilings(seconds)}
        for work, flops in (("sampling", sampling_flops), ("training", training_flops)):
            turns = rounds if work == "sampling" else 3 * rounds  # a step is short
            found[work] = compete(work, shape, turns) | {"flops": flops(shape)}
            print(work_table(title, work, found), flush=True)
        report["shapes"][title] = found
    first = next(iter(report["shapes"].values()))
    names = list(dict.fromkeys(row["entrant"] for row in first["sampling"]["rows"]))
    report["memory"] = memories(next(iter(shapes.values())), names, peers)
    report["start"] = starts(checkpoint, rounds)
    return report


# --- reporting --------------------------------------------------------------------------------------------------------


def work_table(title: str, work: str, found: dict[str, Any]) -> str:
    """The table of one shape. Only our rows have a fraction of the ceiling."""
    shape, flops = Shape(**found["shape"]), found[work]["flops"]
    rows = []
    for row in found[work]["rows"]:
        took = median(row["seconds"])
        share = f"{flops / took / found['ceiling'][row['dtype']]:.0%}" if row["entrant"] == OURS else ""
        speed = [f"{shape.batch * shape.grid**2 / took:,.0f}"] if work == "training" else []
        cells = [row["entrant"], si(row["parameters"], "").strip(), row["dtype"] + ", default" * row["default"]]
        rows.append(
            [*cells, duration(took), *speed, *(f"{row[k]:.2f}" for k in ("over default", "over same dtype")), share]
        )
    head = ["", "parameters", "precision", "a decode" if work == "sampling" else "a step"]
    head += ["tokens/s"] * (work == "training")
    head += ["x ours, its default", "x ours, same precision", "of the ceiling"]
    size = f"width {shape.width}, {shape.layers} layers, {shape.codes:,} codes, {shape.text} text tokens"
    size += f", {shape.steps} steps" * (work == "sampling")
    limits = ", ".join(f"{k} {si(v, 'FLOP/s')}" for k, v in found["ceiling"].items())
    left = "".join(f"Left out: {name}, {why}.\n" for name, why in found[work]["absent"].items())
    about = f"**{work.capitalize()}, {title}** ({size}): {si(flops, 'FLOP')}; ceiling {limits}.\n"
    return f"{about}\n{markdown(head, rows)}{left and chr(10) + left}"


def report_text(report: dict[str, Any]) -> str:
    """speed.md and the table of benchmarks/README.md."""
    at, rounds = report["machine"], report["rounds"]
    works = [(t, w, f) for t, f in report["shapes"].items() for w in ("sampling", "training")]
    head = f"{at['device']}, {at['threads']} threads, torch {at['torch']}; medians of {rounds} alternating "
    head += f"rounds, {3 * rounds} of training.\n"
    names = list(report["memory"]["sampling"])
    held = [[w, *(f"{report['memory'][w][n] / 2**20:,.0f} MiB" for n in names)] for w in report["memory"]]
    first = next(iter(report["shapes"]))
    memory = f"**Peak memory of a process** ({first}, each by its defaults)\n\n{markdown(['', *names], held)}"
    start = markdown(["To begin", "seconds"], [[k, f"{v:.2f}"] for k, v in report["start"].items()])
    return "\n".join([head, *(work_table(*work) for work in works), memory, start])


def summary(report: dict[str, Any]) -> str:
    """The table of benchmarks/README.md: the first shape, and what a user waits for."""
    at, (title, found) = report["machine"], next(iter(report["shapes"].items()))
    shape, rows = Shape(**found["shape"]), []
    trained = {(row["entrant"], row["dtype"]): row for row in found["training"]["rows"]}
    for drawn in found["sampling"]["rows"]:
        took, row = median(drawn["seconds"]), trained[drawn["entrant"], drawn["dtype"]]
        ours = drawn["entrant"] == OURS
        share = f"{found['sampling']['flops'] / took / found['ceiling'][drawn['dtype']]:.0%}" if ours else ""
        speed = f"{shape.batch * shape.grid**2 / median(row['seconds']):,.0f}"
        held = [f"{report['memory'][w][drawn['entrant']] / 2**20:,.0f}" for w in ("sampling", "training")]
        held = held if drawn["default"] else ["", ""]
        name = f"{drawn['entrant']}, {drawn['dtype']}" + ", its default" * drawn["default"]
        times = [f"{r['over default']:.2f}" for r in (drawn, row)]
        rows.append([name, duration(took), times[0], share, speed, times[1], *held])
    head = [title, "a decode", "x ours", "of the ceiling", "training, tokens/s", "ours / that"]
    table = markdown([*head, "MiB, drawing", "MiB, training"], rows)
    size = f"{si(found['sampling']['rows'][0]['parameters'], '').strip()} parameters, {shape.codes:,} codes, "
    size += f"{shape.steps} steps with guidance"
    limits = ", ".join(f"{k} {si(v, 'FLOP/s')}" for k, v in found["ceiling"].items())
    start = "; ".join(f"{k} {v:.2f} s" for k, v in report["start"].items())
    on = f"{at['device']}, {at['threads']} threads, torch {at['torch']}; matrix products reach {limits}"
    return f"{table}\n{size}. {on}. {start[0].upper() + start[1:]}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="", help="folder that muse-maskgit-pytorch was installed into")
    parser.add_argument("--out", type=Path, default=Path("runs/speed"))
    parser.add_argument(
        "--rounds", type=int, default=3, help="alternating decodes, and three times as many training steps (default: 3)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: does it all run?")
    parser.add_argument("--docs", action="store_true", help="also write speed.md and the table of benchmarks/README.md")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peers:
        sys.path.append(args.peers)  # last, so that nothing there takes an installed package's place
    if args.alone:
        work, name, *numbers = json.loads(args.alone)
        print(hold(work, name, Shape(*numbers)))
        return
    began, shapes = time.monotonic(), QUICK if args.quick else SHAPES
    how = {"rounds": 1, "seconds": 0.1, "checkpoint": "nano"} if args.quick else {}
    how = {"rounds": args.rounds, "seconds": 2.0, "checkpoint": "toy"} | how
    report = measure(shapes, **how, peers=args.peers)
    save(args.out, "speed", report, report_text(report))
    if args.docs:
        write_readme(report_text(report), "speed", HERE / "speed.md")
        write_readme(summary(report), "speed")
    print(f"{report_text(report)}\n{args.out / 'speed.json'}, {duration(time.monotonic() - began)}")


if __name__ == "__main__":
    main()
