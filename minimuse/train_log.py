"""Watching a run: log.jsonl, TensorBoard where it is installed, pictures now and then of the same prompts and seeds.

    folder/log.jsonl              a line of figures every ten steps: {"stage", "step", "loss", ..., "tokens_per_s"}
    folder/samples/base-...png    what the models draw, or the tokenizers give back, after so many steps

Not here: what the figures mean (`train_doctor.py`), the progress bar (`cli.py`).
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from minimuse.checkpoint import CARD
from minimuse.config import MuseConfig
from minimuse.data_images import to_float
from minimuse.muse import Muse
from minimuse.plots import curves, grid
from minimuse.train_engine import Engine
from minimuse.utils import atomic_write
from minimuse.validation import eval_mode, validate

if TYPE_CHECKING:
    from minimuse.data_cache import TrainingData
    from minimuse.train import Look, Progress

EVERY = 10  # steps from one line of the log to the next


class Watch:
    """The eyes of one run. Without `engine.folder` nothing is written; validation is part of the figures either way."""

    def __init__(self, config: MuseConfig, engine: Engine, prompts: list[str] | None = None):
        self.config, self.engine, self.prompts = config, engine, prompts
        self.folder = engine.folder if engine.is_main else None
        self.board: Any = None
        self.last = ("", 0, time.perf_counter())
        if self.folder:
            self.board = _tensorboard(self.folder)

    # --- what a stage shows of its model ------------------------------------------------------------------------------

    def tokenizer(self, stage: str, images: Any) -> "Look":
        """Held-out images above their reconstructions."""

        def look(model: nn.Module, step: int) -> dict[str, float]:
            """-> the PSNR of eight held-out images in dB; their picture goes into the folder."""
            x = to_float(images[range(min(8, len(images)))]).to(self.engine.device)
            with eval_mode(model), self.engine.precision():
                made = model.decode(model.encode(x))
            error = (x - made.float()).square().mean()
            self.picture(stage, step, lambda: grid(torch.cat([x, made.float()]), columns=len(x)))
            return {"held_out_psnr": float(-10 * (error / 4).log10())}

        return look

    def transformer(self, stage: str, corpus: "TrainingData", parts: nn.ModuleDict) -> "Look":
        """Held-out losses by mask rate, and what the models so far draw for fixed prompts and seeds."""
        prompts = self.prompts or corpus.words()["examples"]
        rows = [corpus.tokens["low" if stage == "base" else "high"], corpus.texts]
        rows += [] if stage == "base" else [corpus.tokens["low"]]
        held_out = [corpus.split(r, held_out=True) for r in rows]
        size = getattr(self.config, stage).codebook_size

        def look(loss: nn.Module, step: int) -> dict[str, float]:
            """-> what `validate` finds on held-out examples; pictures of the prompts go into the folder."""
            figures = validate(loss, *held_out, codebook_size=size, engine=self.engine)
            if self.folder and not self.engine.sharded:  # a sharded model works in all processes, or not at all
                with eval_mode(parts), self.engine.precision():
                    self.picture(
                        stage, step, lambda: grid(self._draw(stage, parts, corpus, prompts), prompts, columns=3)
                    )
            return {f"held_out_{key}": value for key, value in figures.items()}

        return look

    def dit(self, corpus: "TrainingData", parts: nn.ModuleDict) -> "Look":
        """What a diffusion draws for the same prompts and seeds."""
        prompts = self.prompts or corpus.words()["examples"]

        def look(loss: nn.Module, step: int) -> dict[str, float]:
            if self.folder and not self.engine.sharded:
                with eval_mode(parts), self.engine.precision():
                    self.picture("base", step, lambda: grid(self._draw("base", parts, corpus, prompts), prompts, 3))
            return {}

        return look

    def _draw(self, stage: str, parts: nn.ModuleDict, corpus: "TrainingData", prompts: list[str]) -> list[Any]:
        wakened = [p for p in parts.parameters() if p.requires_grad]
        muse = Muse(self.config, parts, corpus.encoder).to(self.engine.device)
        for p in wakened:  # a Muse is frozen; the training goes on
            p.requires_grad_(True)
        if stage != "base":
            return muse.generate(prompts, seed=0)
        for step in muse.decode(muse.jobs(prompts, 1, 0, None, {})):
            if not step.masked.any():  # the last of the base model
                return muse.picture(step)
        raise AssertionError("a decode ends with no token masked")

    def picture(self, stage: str, step: int, make: Callable[[], Image.Image]) -> None:
        """A PIL image into samples/, named by its stage and step."""
        if self.folder:
            path = self.folder / "samples" / f"{stage}-{step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            make().save(path)

    # --- the log ------------------------------------------------------------------------------------------------------

    def __call__(self, p: "Progress") -> dict[str, float]:
        """A Progress -> its figures with the speed; every tenth, and those with validation, go into the log."""
        stage, step, then = self.last
        now, figures = time.perf_counter(), dict(p.figures)
        self.last = (p.stage, p.step, now)
        if p.stage not in self.config.stages:
            return figures
        if stage != p.stage:
            if self.folder:  # a resumed stage first tells where it stands, without figures
                self._forget(p.stage, p.step - bool(figures))
        elif figures:
            tokens = self.config.stages[stage].batch * tokens_of(self.config, stage)
            figures["tokens_per_s"] = tokens * (p.step - step) / (now - then)
        due = p.step % EVERY == 0 or p.step == p.steps or any(k.startswith("held_out") for k in figures)
        if self.folder and figures and due:
            line = {"stage": p.stage, "step": p.step, **{k: round(v, 5) for k, v in figures.items()}}
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for key, value in figures.items() if self.board else ():
                self.board.add_scalar(f"{p.stage}/{key}", value, p.step)
        return figures

    def _forget(self, stage: str, step: int) -> None:
        """Drop the lines of steps that a resumed run does again, and what a dead run left half written."""
        path = self.folder / "log.jsonl"
        kept = [line for line in read_log(path) if line["stage"] != stage or line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            atomic_write(path, text)


def tokens_of(config: MuseConfig, stage: str) -> int:
    """An image's tokens in a stage."""
    return (config.low_tokenizer if stage in ("low_tokenizer", "base") else config.high_tokenizer).grid ** 2


def read_log(path: Path) -> list[dict[str, Any]]:
    """log.jsonl -> its lines; one that a dead run left half written is passed over."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def add_record(folder: Path, config: MuseConfig) -> None:
    """A finished run -> curves.png, and in its model card how each stage went and on what machine."""
    log = read_log(folder / "log.jsonl")
    lines = ["", "| Stage | Minutes | Training, last lines | Held out |", "|---|---|---|---|"]
    for stage in dict.fromkeys(line["stage"] for line in log):
        of = [line for line in log if line["stage"] == stage]
        name, unit = ("psnr", "dB") if "psnr" in of[-1] else ("loss", "nats a token")
        held = "held_out_psnr" if name == "psnr" else "held_out_bound"
        speeds = [line["tokens_per_s"] for line in of if "tokens_per_s" in line and held not in line]
        tokens = config.stages[stage].steps * config.stages[stage].batch * tokens_of(config, stage)
        minutes = f"{tokens * mean(1 / v for v in speeds) / 60:.1f}" if speeds else ""
        last = [line[name] for line in of[-10:]]
        held_out = [f"{line[held]:.2f} {unit}" for line in of if held in line][-1:]
        lines.append(f"| {stage} | {minutes} | {mean(last):.2f} {unit} | {''.join(held_out)} |")
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    lines += [
        "",
        f"Trained on {machine}, torch {torch.__version__}. Minutes are of the steps alone.",
        "",
        "![](curves.png)",
    ]
    with (folder / CARD).open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    curves(log).save(folder / "curves.png")


def _tensorboard(folder: Path) -> Any:
    """A writer of TensorBoard's files, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
