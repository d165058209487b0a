"""Shared by the benchmarks: runs that take turns, separate processes, the machine, tables and files.

Other work on the machine slows down everything at that time. So the runs that are compared take turns, round by round,
and a ratio is the median of the ratios of each round. Each package runs in a process of its own that stays warm, so no
run shares memory, threads or settings with another one."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from minimuse import __version__
from minimuse.utils import fast_bf16

HERE = Path(__file__).resolve().parent


def precisions(device: torch.device) -> list[torch.dtype]:
    """float32, and bfloat16 if this device is fast at it."""
    return [torch.float32, *([torch.bfloat16] if fast_bf16(device) else [])]


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of `run` in seconds, until the device has finished."""
    wait = torch.get_device_module(device).synchronize
    wait()
    began = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - began


class Apart:
    """Runs `make(*args) -> (run, about)` in a separate process. A call runs `run` there; errors are raised here."""

    def __init__(self, make: Callable[..., tuple[Callable[[], Any], Any]], *args: Any):
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()
        self.about = self._answer()

    def __call__(self) -> None:
        self.pipe.send(None)
        self._answer()

    def close(self) -> None:
        self.pipe.close()
        self.process.join()

    def _answer(self) -> Any:
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            self.close()
            raise answer
        return answer


def _serve(pipe: Connection, make: Callable[..., tuple[Callable[[], Any], Any]], args: Sequence[Any]) -> None:
    """The loop of the separate process: run once for each message, until the pipe is closed."""
    try:
        run, about = make(*args)
        pipe.send(about)
        while True:
            pipe.recv()
            run()
            pipe.send(None)
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)


def alternate(runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Runs take turns -> seconds of each run, round by round. Warm the runs up before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    return seconds


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median of the ratios of each round."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def alone(script: str, *args: str) -> Any:
    """Run a script in a separate process that finds this package -> its last line of output, read as JSON."""
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        [sys.executable, script, *args], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if found.returncode:
        raise RuntimeError(f"{script} {' '.join(args)}: {found.stderr.strip().splitlines()[-1]}")
    return json.loads(found.stdout.strip().splitlines()[-1])


def peak_memory() -> int:
    """Peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss starts with the memory of the parent
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    import resource  # macOS counts in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine(device: torch.device) -> dict[str, Any]:
    """The machine that was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {"minimuse": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return {"device": name, "threads": torch.get_num_threads(), "system": platform.system(), **versions}


def _processor() -> str:
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def save(out: Path, name: str, report: Mapping[str, Any], text: str) -> None:
    """Write `name`.json and `name`.md into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text, encoding="utf-8")


def write_readme(text: str, name: str, readme: Path = HERE / "README.md") -> None:
    """Replace the text between the markers <!-- name --> and <!-- /name --> of benchmarks/README.md or another file."""
    content, (begin, end) = readme.read_text(encoding="utf-8"), (f"<!-- {name} -->\n", f"<!-- /{name} -->")
    if begin not in content or end not in content:
        raise ValueError(f"{readme} has no {begin.strip()} and {end}; put both markers where the tables belong")
    before, rest = content.split(begin)
    readme.write_text(before + begin + text + end + rest.split(end, 1)[1], encoding="utf-8")
