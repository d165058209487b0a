"""How close do the paper's shapes come to an accelerator's matrix ceiling? Random weights, bf16, no language model.

    python benchmarks/gpu.py [--presets paper_632m,paper_3b] [--out runs/gpu] [--no-compile] [--parts sampling,training]

The bars are for an H100: `paper_3b`, batch 1: 256 px (256 tokens, 24 steps with guidance) within 0.2 s, 512 px whole
within 0.6 s; training of `paper_632m`'s base model at half of the measured ceiling.
    sampling    the preset's own steps and guidance, `Muse.decode` and its decoders, whole: low resolution alone, and
                the cascade; batches of 1 and --batch. Compiled, batch 1 with CUDA graphs. Medians of 20.
    training    `train_transformer` on random tokens, base and super-resolution, compiled: the largest batch of 8, 16,
                32, 64 that fits; medians of 10 steps
    ceiling     bf16 products of two 8192 x 8192 matrices
Beside every figure stands the floor: FLOPs / ceiling, and for sampling also bytes of weights that each step must read
/ the measured bandwidth, whichever is longer. Without an accelerator it runs on the CPU: `--presets nano --quick`.
Compiling takes minutes. Writes gpu.json and gpu.md into --out.
"""

import argparse
import gc
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from flops import sampling_flops
from timing import machine, markdown, save, timed
from torch import nn

from minimuse import Muse
from minimuse.config import MuseConfig, preset
from minimuse.muse import build
from minimuse.text import Context
from minimuse.train import train_transformer
from minimuse.train_budget import duration, matmul_ceiling, si, stage_budget
from minimuse.train_engine import Engine
from minimuse.utils import pick_device
from minimuse.vqgan import draft_tokens

PARTS, BATCHES = ("sampling", "training"), (64, 32, 16, 8)


class Silent:
    """In the language model's place: as many random embeddings as a prompt may have."""

    def __init__(self, config: MuseConfig):
        self.embeds = torch.randn(1, config.text_tokens, config.base.text_width)

    def encode(self, prompts: list[str]) -> Context:
        embeds = self.embeds.expand(len(prompts), -1, -1)
        return Context(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))

    def to(self, device: torch.device) -> "Silent":
        return self


def random_muse(config: MuseConfig, device: torch.device, dtype: torch.dtype) -> Muse:
    """The preset with fresh weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        parts = build(config)
    for part in parts.values():  # one after the other, so that not all of them are there twice
        part.to(dtype)
    parts.eval().requires_grad_(False)
    return Muse(config, parts, Silent(config)).to(device, dtype)


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes/s read while `size` bytes are summed up."""
    x = torch.ones(size // 4, device=device)
    x.sum()
    return size / median(timed(x.sum, device) for _ in range(5))


def peak(device: torch.device) -> int:
    """Bytes that tensors held at once since `clear`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def clear(device: torch.device) -> None:
    gc.collect()  # a stage and its engine know each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# --- sampling ---------------------------------------------------------------------------------------------------------


def draws(muse: Muse, batch: int) -> dict[str, Callable[[], Any]]:
    """What a user waits for: the low-resolution picture alone, and the whole cascade."""
    jobs = [{"prompt": "", "negative_prompt": None, "seed": i} for i in range(batch)]

    def low() -> None:
        (last,) = deque(muse.decode_base(jobs), maxlen=1)
        muse.picture(last)

    def whole() -> None:
        (last,) = deque(muse.decode(jobs), maxlen=1)
        muse.picture(last)

    return {f"{muse.config.low_tokenizer.image_size} px": low, f"{muse.config.high_tokenizer.image_size} px": whole}


def floors(muse: Muse, batch: int, ceiling: float, speed: float) -> tuple[list[float], list[float]]:
    """Seconds at best of both draws, by FLOPs and by weights read; the low decoder and memories are left out."""
    flops, size = sampling_flops(muse.config), next(muse.base.parameters()).element_size()
    read = [how.steps * size * sum(p.numel() for p in part.parameters()) for how, part in _stages(muse)]
    work = [batch * flops.base, batch * sum(flops)]
    return [f / ceiling for f in work], [read[0] / speed, sum(read) / speed]


def _stages(muse: Muse) -> list[tuple[Any, nn.Module]]:
    return [(muse.config.base_sampling, muse.base), (muse.config.superres_sampling, muse.superres)]


def compile_networks(muse: Muse, **options: Any) -> None:
    """Apply torch.compile to the networks that draw. The first pictures wait for the compiler."""
    for part in (muse.base, muse.superres, muse.low_tokenizer.decoder, muse.high_tokenizer.decoder):
        part.compile(**{"dynamic": False} | options)


def sampling(
    config: MuseConfig,
    device: torch.device,
    batches: tuple[int, ...],
    rounds: int,
    compiled: bool,
    ceiling: float,
    speed: float,
) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        clear(device)
        muse = random_muse(config, device, torch.bfloat16)
        graphs = compiled and batch == 1 and device.type == "cuda"
        if compiled:
            torch.compiler.reset()
            compile_networks(muse, **({"mode": "reduce-overhead"} if graphs else {}))
        by_flops, by_bytes = floors(muse, batch, ceiling, speed)
        for i, (name, run) in enumerate(draws(muse, batch).items()):
            for _ in range(3):  # compiles, records graphs, replays them
                run()
            row = {
                "preset": config.name,
                "draw": name,
                "batch": batch,
                "seconds": [timed(run, device) for _ in range(rounds)],
            }
            row |= {"compiled": compiled, "graphs": graphs, "by flops": by_flops[i], "by bytes": by_bytes[i]}
            rows.append(row | {"memory": peak(device)})
        del muse, run
    return rows


# --- training ---------------------------------------------------------------------------------------------------------


def training(
    config: MuseConfig,
    stage: str,
    device: torch.device,
    batches: tuple[int, ...],
    rounds: int,
    compiled: bool,
    ceiling: float,
) -> dict[str, Any]:
    """The largest of `batches` that fits, by the stage's own optimizer."""
    budget = stage_budget(config, stage)
    for batch in batches:
        clear(device)
        try:
            seconds = _steps(config, stage, device, batch, rounds, compiled)
        except torch.OutOfMemoryError:
            continue
        flops = budget.step_flops / budget.batch * batch
        row = {"preset": config.name, "stage": stage, "batch": batch, "seconds": seconds, "compiled": compiled}
        row |= {"tokens": getattr(config, stage).tokens, "by flops": flops / ceiling, "memory": peak(device)}
        return row
    raise SystemExit(f"{config.name}, {stage}: not even a batch of {batches[-1]} fits; give smaller ones")


def _steps(
    config: MuseConfig, stage: str, device: torch.device, batch: int, rounds: int, compiled: bool
) -> list[float]:
    """Seconds of training steps, after three that compile and warm up. What they hold is free again afterwards."""
    torch.compiler.reset()
    with torch.device(device):
        parts = build(config)
    model, draft = parts[stage], partial(draft_tokens, parts["low_tokenizer"], parts["high_tokenizer"])
    sizes, n = getattr(config, stage), 4 * batch
    tokens = torch.randint(sizes.codebook_size, (n, sizes.tokens))
    low = torch.randint(sizes.low_codebook_size, (n, sizes.low_grid**2)) if sizes.low_layers else None
    texts = [[torch.randn(config.text_tokens, sizes.text_width)]] * n
    how = replace(config.stages[stage], steps=10**6, batch=batch, eval_every=10**9)
    engine = Engine(device=device if device.type == "cpu" else None, bf16=True, compile=compiled)
    options = {"low_tokens": low, "draft": draft if sizes.draft else None, "stage": stage, "engine": engine}
    steps = train_transformer(model, how, tokens, texts, **options)
    for _ in range(3):
        next(steps)
    return [timed(partial(next, steps), device) for _ in range(rounds)]


# --- telling ----------------------------------------------------------------------------------------------------------


def told(report: dict[str, Any]) -> str:
    at = report["machine"]
    text = [f"{at['device']}, torch {at['torch']}, bf16: ceiling {si(report['ceiling'], 'FLOP/s')}, "]
    text[0] += f"bandwidth {si(report['bandwidth'], 'B/s')}. Random weights, language model left out.\n"
    if rows := report["sampling"]:
        head = ["", "pictures at once", "seconds", "at best, FLOPs", "at best, bytes", "of what is possible", "memory"]
        text.append(markdown(head, [_drawn(row) for row in rows]))
    if rows := report["training"]:
        head = ["training", "batch", "a step", "tokens/s", "of the ceiling", "memory"]
        text.append(markdown(head, [_trained(row) for row in rows]))
    return "\n".join(text)


def _drawn(row: dict[str, Any]) -> list[str]:
    took, best = median(row["seconds"]), max(row["by flops"], row["by bytes"])
    how = "CUDA graphs" if row["graphs"] else "compiled" if row["compiled"] else "plain"
    figures = [f"{took:.3f}", *(duration(row[k]) for k in ("by flops", "by bytes")), f"{best / took:.0%}"]
    return [f"{row['preset']}, {row['draw']}, {how}", str(row["batch"]), *figures, si(row["memory"], "B")]


def _trained(row: dict[str, Any]) -> list[str]:
    took = median(row["seconds"])
    figures = [duration(took), f"{row['batch'] * row['tokens'] / took:,.0f}", f"{row['by flops'] / took:.0%}"]
    return [f"{row['preset']}, {row['stage']}", str(row["batch"]), *figures, si(row["memory"], "B")]


def measure(
    presets: list[MuseConfig],
    device: torch.device,
    *,
    parts: tuple[str, ...] = PARTS,
    batch: int = 8,
    rounds: int = 20,
    compiled: bool = True,
    training_batches: tuple[int, ...] = BATCHES,
    size: int = 8192,
) -> dict[str, Any]:
    """The whole report; `size` of the ceiling's matrices, and of the bandwidth's (size / 2)^2 floats and more."""
    ceiling, speed = matmul_ceiling(device, torch.bfloat16, size), bandwidth(device, 16 * size**2)
    report: dict[str, Any] = {"machine": machine(device), "ceiling": ceiling, "bandwidth": speed}
    report |= {part: [] for part in PARTS}
    for config in presets:
        if "sampling" in parts:
            report["sampling"] += sampling(config, device, (1, batch), rounds, compiled, ceiling, speed)
        for stage in ("base", "superres") if "training" in parts else ():
            how = (training_batches, max(1, rounds // 2), compiled, ceiling)
            report["training"].append(training(config, stage, device, *how))
        print(told(report), flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="paper_632m,paper_3b", help="comma-separated")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best here)")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once, besides 1 (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--no-compile", action="store_true", help="neither torch.compile nor CUDA graphs")
    parser.add_argument(
        "--quick", action="store_true", help="one round, small batches, nothing compiled: does it all run?"
    )
    args = parser.parse_args()
    presets, parts, began = [preset(p) for p in args.presets.split(",")], tuple(args.parts.split(",")), time.monotonic()
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    quick = {"batch": 2, "rounds": 1, "compiled": False, "training_batches": (2,), "size": 256}
    how = quick if args.quick else {"batch": args.batch, "compiled": not args.no_compile}
    report = measure(presets, pick_device(args.device), parts=parts, **how)
    save(args.out, "gpu", report, told(report))
    print(f"{args.out / 'gpu.json'}, {duration(time.monotonic() - began)}")


if __name__ == "__main__":
    main()
