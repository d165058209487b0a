"""Is work lost when a run is killed? Kill one again and again, resume it, compare the weights byte for byte.

    python benchmarks/kill_and_resume.py nano --out kills [--kills 20] [--seed 0] [--set stages.base.steps=500 ...]

First the run without a stop, which tells how long it takes. Then runs that are killed without a warning (SIGKILL), each
time after a drawn while, and resumed with the same command that a user has: `minimuse train --resume`. A run that ends
before all kills are spent is compared, and another one begins. What is compared: the finished weights, and of every
stage the last state: weights, both optimizers, moving average.

The same bytes are promised on one machine with one number of threads, so OMP_NUM_THREADS is set here, to 1 unless it is
set already.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from minimuse.checkpoint import TENSORS, WEIGHTS, states
from minimuse.config import STAGES

BAR = re.compile(r"([a-z_][a-z_ ]*): +\d+%\|[^|]*\| (\d+)/(\d+)")  # a progress bar, such as "base:  12%|#  | 12/100"


class Life:
    """One process of a run; what it says goes into a file, for its bars tell where it is."""

    def __init__(self, out: Path, words: list[str]):
        command = [sys.executable, "-m", "minimuse.cli", "train", *words, "--out", str(out)]
        self.path = out.with_suffix(".stderr")
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
        with self.path.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL, env=environment)

    def where(self) -> tuple[str, str]:
        """-> the stage that it is at and "step/steps", or two empty strings before the first."""
        found = BAR.findall(self.path.read_text(errors="replace"))
        return (found[-1][0], f"{found[-1][1]}/{found[-1][2]}") if found else ("", "")

    def over(self) -> bool:
        """Is it finished? SystemExit where it failed."""
        if self.process.poll() not in (None, 0):
            raise SystemExit(f"the run failed:\n{self.path.read_text(errors='replace')[-2000:]}")
        return self.process.poll() == 0

    def wait(self, seconds: float) -> bool:
        """Let it work for so long from its first bar on -> is it finished?"""
        while not self.where()[0] and not self.over():
            time.sleep(0.01)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.over():
            time.sleep(0.002)
        return self.over()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def kill_one(out: Path, begin: list[str], kills: int, longest: float, draws: random.Random, first: int) -> int:
    """A run killed at most `kills` times, then let finish -> how often it was killed. A line of the table each time."""
    words = begin
    for n in range(kills):
        life, after = Life(out, words), draws.uniform(0, longest)
        if life.wait(after):
            return n
        life.kill()
        stage, step = life.where()
        newest = {s.parent.name: f"{s.parent.name} {int(s.name[5:])}" for name in STAGES for s in states(out / name)}
        half = [p.name for p in out.rglob("*.new")]
        last = list(newest.values())[-1] if newest else "none"
        print(
            f"| {first + n} | {out.name} | {after:.2f} s | {stage} {step} | {last} | {', '.join(half) or '-'} |",
            flush=True,
        )
        words = ["--resume"] if (out / "run.json").exists() else begin
    life = Life(out, words)
    while not life.wait(1):
        pass
    return kills


def differing(found: Path, expected: Path) -> list[str]:
    """The files that are not the same, byte for byte."""
    files = [WEIGHTS, *(states(expected / name)[-1].relative_to(expected) / TENSORS for name in STAGES)]
    return [str(f) for f in files if (found / f).read_bytes() != (expected / f).read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("preset", help="nano, toy, ..., or a JSON file of a configuration")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the runs")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    begin = [args.preset, "--device", "cpu", *(word for change in args.set for word in ("--set", change))]

    whole = Life(args.out / "whole", begin)
    whole.wait(0)
    started = time.monotonic()
    while not whole.wait(0.1):
        pass
    works = time.monotonic() - started
    print(f"never stopped: {works:.1f} s from its first bar on\n", flush=True)

    print("| Kill | Run | After | At | Newest state | Half written |\n|---|---|---|---|---|---|", flush=True)
    # some work is done twice after each kill, so the mean life is longer than one part of the run in `kills`
    draws, longest, killed, runs = random.Random(args.seed), 3 * works / args.kills, 0, []
    while killed < args.kills:
        runs.append(args.out / f"run-{len(runs)}")
        killed += kill_one(runs[-1], begin, args.kills - killed, longest, draws, killed + 1)
    wrong = {run.name: found for run in runs if (found := differing(run, args.out / "whole"))}
    print(
        f"\n{killed} kills, {len(runs)} runs: "
        + (f"DIFFERENT: {wrong}" if wrong else "the same bytes as never stopped")
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
