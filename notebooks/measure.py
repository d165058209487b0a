"""What each notebook takes: python notebooks/measure.py [01_tour ...] [--store] -> measured.json, README.md's table

Each is executed in the full setting, once in fp32 and once in bf16 (where this CPU multiplies bf16 fast), by itself:
run it on a machine that does nothing else. Minutes are wall time with the kernel's start; memory is the kernel's peak.
On a machine with other work, --busy counts the processor time of a kernel with one thread, only in bf16.
With --store the outputs of the second run are kept, as `build.py` would; else nothing in the notebooks changes.
`build.py --text` writes what was measured into their headers. Needs Linux or macOS.
"""

import argparse
import json
import os
import sys
import time

from build import HERE, MEASURED, cells, execute, names, notebook, store
from nbformat.v4 import new_code_cell

README = HERE / "README.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->"
FP32 = """from minimuse import utils
utils.fast_bf16 = lambda device: False"""
PEAK = """import resource
used = resource.getrusage(resource.RUSAGE_SELF)
print("PEAK", used.ru_maxrss, used.ru_utime + used.ru_stime)"""


def measure(name: str, precision: str, keep: bool = False, busy: bool = False) -> dict[str, float]:
    """A notebook's minutes and the peak of its kernel's memory in GiB; `keep` stores what was executed."""
    nb = notebook(name)
    if precision == "fp32":
        nb.cells.insert(2, new_code_cell(FP32))
    nb.cells.append(new_code_cell(PEAK))
    began = time.monotonic()
    execute(nb)
    minutes = (time.monotonic() - began) / 60
    peak, seconds = map(float, nb.cells.pop().outputs[0].text.split()[1:])
    minutes = seconds / 60 if busy else minutes
    if keep:
        store(name, nb)
    return {"minutes": round(minutes, 2), "gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2)}


def title(name: str) -> str:
    return cells((HERE / "source" / f"{name}.py").read_text(encoding="utf-8"))[0][1].splitlines()[0].lstrip("# ")


def table(rows: dict) -> str:
    """measured.json -> README's table, in the order of the course."""
    lines = ["| Notebook | Minutes, fp32 | Minutes, bf16 | Memory |", "|---|---|---|---|"]
    for name in names():
        if name in rows:
            bf16 = rows[name]["bf16"]
            fp32 = rows[name].get("fp32", {"gib": 0})
            gib = max(fp32["gib"], bf16["gib"])
            figures = f"{fp32['minutes']:.1f}" if "fp32" in rows[name] else "-"
            figures = f"{figures} | {bf16['minutes']:.1f} | {gib:.1f} GiB"
            lines.append(f"| [{title(name)}]({name}.ipynb) | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="measure notebooks; write measured.json and README's table")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; none is all")
    parser.add_argument("--store", action="store_true", help="keep the outputs of the run in bf16")
    parser.add_argument(
        "--busy", action="store_true", help="processor time of one thread: this machine does other work"
    )
    args, rows = parser.parse_args(), json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    if args.busy:
        os.environ["OMP_NUM_THREADS"] = "1"  # kernels inherit it
    for name in args.names or names():
        precisions = ("bf16",) if args.busy else ("fp32", "bf16")
        rows[name] = {p: measure(name, p, args.store and p == "bf16", args.busy) for p in precisions}
        rows[name]["cores"] = 1 if args.busy else os.cpu_count()
        print(name, rows[name])
        MEASURED.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(before + BEGIN + table(rows) + END + rest.split(END, 1)[1], encoding="utf-8")
    print("now: python notebooks/build.py --text, which writes what was measured into their headers")


if __name__ == "__main__":
    main()
