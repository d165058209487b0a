"""Kill a run again and again, resume it, and compare its weights with those of a run that was never stopped.

    python benchmarks/kill_and_resume.py nano --out kills [--kills 20] [--seed 0] [--set stages.base.steps=500 ...]

First comes a run without a stop; its progress bars tell where it is at every moment. Then a run is killed without
warning (SIGKILL) at random moments of that time, and resumed by the user's command, `minimuse train --resume`.
Compared are the finished weights, and of every stage the last state: weights, optimizers, moving average. If a run
finishes before its moment is noticed, another one starts.

Bit-exact weights are promised on one machine with one number of threads. OMP_NUM_THREADS is 1 unless it is set.
"""

import argparse
import os
import random
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch

from minimuse.checkpoint import WEIGHTS
from minimuse.config import STAGES
from minimuse.train_state import read_tensors, states

BAR = re.compile(r"([a-z_][a-z_ ]*): +\d+%\|[^|]*\| (\d+)/(\d+)")  # a progress bar, such as "base:  12%|#  | 12/100"

Place = tuple[str, int]  # a stage (or the preparation of data) and its step


class Life:
    """One process of a run. Its stderr goes into a file, because the progress bars tell where it is."""

    def __init__(self, out: Path, words: list[str]):
        command = [sys.executable, "-m", "minimuse.cli", "train", *words, "--out", str(out)]
        self.path = out.with_suffix(".stderr")
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
        with self.path.open("w") as file:
            self.process = subprocess.Popen(command, stderr=file, stdout=subprocess.DEVNULL, env=environment)

    def places(self) -> Iterator[Place]:
        """Where it is, again and again until it has finished. SystemExit if it fails."""
        while self.process.poll() is None:
            time.sleep(0.005)
            if found := BAR.findall(self.path.read_text(errors="replace")):
                yield found[-1][0], int(found[-1][1])
        if self.process.returncode:
            raise SystemExit(f"the run failed:\n{self.path.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def watched(out: Path, words: list[str]) -> list[Place]:
    """A run to its end -> where it was at every hundredth of a second, starting at its first bar."""
    seen: list[Place] = []
    began = 0.0
    for place in Life(out, words).places():
        began = began or time.monotonic()
        seen += [place] * (int(100 * (time.monotonic() - began)) + 1 - len(seen))
    return seen


def killed(out: Path, begin: list[str], moments: list[Place], stages: list[str], draws: random.Random) -> int:
    """Kill a run at one moment after another, then let it finish -> the number of kills. Prints a row for each."""

    def reached(place: Place, moment: Place) -> bool:
        return (stages.index(place[0]), place[1]) >= (stages.index(moment[0]), moment[1])

    words = begin
    for n, moment in enumerate(moments):
        life = Life(out, words)
        if not any(reached(place, moment) for place in life.places() if place[0] in stages):
            return n
        time.sleep(draws.uniform(0, 0.1))  # a bar shows some steps at once
        life.kill()
        newest = [f"{name} {int(s.name[5:])}" for name in STAGES for s in states(out / name)[-1:]]
        half = ", ".join(p.name for p in out.rglob("*.new")) or "-"
        at, last = " ".join(map(str, moment)), newest[-1] if newest else "none"
        print(f"| {out.name} | {n + 1} | {at} | {last} | {half} |", flush=True)
        if (out / WEIGHTS).exists():  # it finished before the kill
            return n + 1
        words = ["--resume"] if (out / "run.json").exists() else begin
    deque(Life(out, words).places(), maxlen=0)
    return len(moments)


def differing(found: Path, expected: Path) -> list[str]:
    """What is not the same: the finished weights, or tensors of the last state of a stage."""
    different = [WEIGHTS] if (found / WEIGHTS).read_bytes() != (expected / WEIGHTS).read_bytes() else []
    for stage in STAGES:
        a, b = (read_tensors(states(folder / stage)[-1]) for folder in (found, expected))
        different += [f"{stage}: {name}" for name in a.keys() | b.keys() if name not in a or name not in b]
        different += [f"{stage}: {name}" for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return different


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

    seen = [place for place in watched(args.out / "whole", begin) if place[0] != "done"]  # nothing left
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    print(f"never stopped: {len(seen) / 100:.0f} s; {', '.join(stages)}\n", flush=True)
    print("| Run | Kill | At or soon after | Newest state | Half written |\n|---|---|---|---|---|", flush=True)
    draws, left, runs = random.Random(args.seed), args.kills, []
    while left:
        runs.append(args.out / f"run-{len(runs)}")
        moments = [seen[i] for i in sorted(draws.randrange(len(seen)) for _ in range(left))]
        left -= killed(runs[-1], begin, moments, stages, draws)
    wrong = {run.name: found for run in runs if (found := differing(run, args.out / "whole"))}
    print(
        f"\n{args.kills} kills, {len(runs)} runs: "
        + (f"DIFFERENT: {wrong}" if wrong else "the same weights as never stopped")
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
