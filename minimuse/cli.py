"""The `minimuse` command: its options.

minimuse generate "two small red cubes" --n 4 --seed 0 --film
minimuse inpaint picture.png mask.png "a green sphere"
minimuse info paper_3b

Not here: what the commands do (`cli_commands.py`).
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from minimuse.cli_commands import (
    BASELINES,
    run_app,
    run_average,
    run_compare,
    run_doctor,
    run_draw,
    run_evaluate,
    run_info,
    run_train,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code. A user's mistake is one line on stderr, without a traceback."""
    args = parser().parse_args(argv)
    log = logging.getLogger("minimuse")
    log.handlers[:] = [logging.StreamHandler()]
    log.handlers[0].setFormatter(logging.Formatter("minimuse: %(message)s"))
    log.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm([log]):  # a line of the log starts below a progress bar
            args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"minimuse: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minimuse: stopped", file=sys.stderr)
        return 130
    return 0


# --- options ----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    import minimuse

    top = argparse.ArgumentParser("minimuse", description="Text-to-image by masked generative transformers (Muse).")
    top.add_argument("--version", action="version", version=f"minimuse {minimuse.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    groups = _option_groups()

    def command(name: str, run: Callable, help: str, *options: str) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, help=help, description=help, parents=[groups[option] for option in options])
        added.set_defaults(run=run)
        return added.add_argument

    _drawing_options(command)
    _training_options(command)
    _measuring_options(command)
    return top


def _option_groups() -> dict[str, argparse.ArgumentParser]:
    """Options that several commands share."""
    names = ("prompts", "image", "drawing", "sampling", "seed", "half", "device")
    groups = {name: argparse.ArgumentParser(add_help=False) for name in names}
    add = groups["prompts"].add_mutually_exclusive_group(required=True).add_argument
    add("prompts", nargs="*", default=[], metavar="PROMPT")
    add("--like", type=Path, metavar="PNG", help="draw this picture again: its prompt, seed and settings")
    add = groups["image"].add_argument
    add("image", type=Path)
    add = groups["drawing"].add_argument
    add("--model", help="shipped name, folder or hub id (default: toy; with --like, the picture's own)")
    add("--n", type=int, default=1, help="number of pictures for each prompt")
    add("--seed", type=int, help="picture i uses seed + i (default: a random seed, which is printed)")
    add("--negative-prompt", help="what the pictures should not show")
    add("--guidance", type=_guidance, help="scale t, or FIRST:LAST for a scale that rises from step to step")
    add("--out", type=Path, help="PNG to write; picture i > 0 gets -i at the end of its name (default: a free name)")
    add("--film", action="store_true", help="also write a film strip of the decoding, as ...-film.png")
    add("--force", action="store_true", help="overwrite existing files")
    add = groups["sampling"].add_argument
    add("--steps", type=int, help="decoding steps of each stage")
    add("--schedule", help="cosine, linear, square, cubic, sqrt, arccos, log or powP, such as pow2.5")
    add("--order", help="confidence, random, raster, halton, entropy or margin")
    add("--sampling-temperature", type=float, help="temperature of the softmax that tokens are drawn from")
    add("--choice-temperature", type=float, help="scale of the noise in the choice of tokens to reveal")
    groups["seed"].add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")
    groups["half"].add_argument("--half", action="store_true", help="save weights in float16, as shipped ones are")
    groups["device"].add_argument("--device", help="cpu, cuda or mps (default: the fastest one)")
    return groups


def _drawing_options(command: Callable) -> None:
    """Options of generate, inpaint, outpaint, edit and app."""
    command("generate", run_draw, "draw pictures from prompts", "prompts", "drawing", "sampling", "device")
    add = command("inpaint", run_draw, "repaint the white part of a mask", "image", "drawing", "sampling", "device")
    add("mask", type=Path)
    add("prompts", nargs=1, metavar="PROMPT")
    add = command("outpaint", run_draw, "extend a picture beyond its edges", "image", "drawing", "sampling", "device")
    add("prompts", nargs=1, metavar="PROMPT")
    add("--padding", type=int, nargs="+", default=[16], help="pixels: one number, or left top right bottom")
    add = command("edit", run_draw, "change a picture towards a prompt, without a mask", "image", "drawing", "device")
    add("prompts", nargs=1, metavar="PROMPT")
    add("--iterations", type=int, default=100, help="number of resampling steps (default: 100)")
    add("--share", dest="fraction", type=float, default=0.08, help="fraction of tokens resampled in an iteration")
    add = command("app", run_app, "open a page to draw with in the browser (extra `app`)", "device")
    add("--checkpoint", "--model", default="toy", help="shipped name, folder or hub id (default: toy)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=int, help="port to listen on (default: the first free one from 7860)")


def _training_options(command: Callable) -> None:
    """Options of train, average and doctor."""
    add = command("train", run_train, "train a Muse from scratch, or resume a run", "half", "device")
    add("preset", nargs="?", help="nano, toy, ..., or a JSON file: config.json, run.json")
    add("--out", type=Path, required=True, help="folder of the run: states, log, pictures, checkpoint")
    add("--model", choices=BASELINES, help="train this low-resolution baseline instead of Muse")
    add("--data", help="folder, tar shards, Parquet or hub id of captioned images (default: scenes)")
    add("--seed", type=int, help="seed of all random numbers (default: 0)")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="change a setting: stages.base.steps=500")
    add("--resume", action="store_true", help="continue the stopped run in --out; with --data if its data moved")
    add("--dry-run", action="store_true", help="print sizes, memory, FLOPs, bytes and hours, and train nothing")
    add("--accelerators", type=int, default=1, help="for --dry-run: number of accelerators")
    add("--memory", type=float, metavar="GB", help="for --dry-run: memory of each, to see what does not fit")
    add("--ceiling", type=float, metavar="TFLOPS", help="for --dry-run: speed of each (default: this machine's)")
    add("--accumulate", type=int, help="micro-batches in each step: less memory, the same gradient")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, more computation")
    add("--compile", action="store_true", help="compile the models with torch.compile")
    add("--keep", type=int, default=2, help="states to keep of each stage; 0 keeps all, for `average` (default: 2)")
    add = command("average", run_average, "average the states of a run into a checkpoint (Muse 3)", "half")
    add("folder", type=Path, metavar="RUN", help="a finished run of train --keep 0")
    add("--out", type=Path, required=True, help="folder for the checkpoint")
    add("--decay", type=float, default=0.7, help="decay of the moving average (default: 0.7, as in the paper)")
    add = command("doctor", run_doctor, "check losses and metrics of a run; exit code 1 if one is wrong", "device")
    add("folder", type=Path, metavar="RUN", help="a run of train, finished or not; it is not changed")
    add("--stage", help="check only this stage, such as base (default: all that have a state)")


def _measuring_options(command: Callable) -> None:
    """Options of compare, eval and info."""
    add = command("compare", run_compare, "measure schedules and orders in a world or on a model", "seed", "device")
    add("--world", default="mixture", help="mixture, chain or potts (default: mixture)")
    add("--muse", metavar="MODEL", help="the base model of this checkpoint instead of a world")
    add("--amused", metavar="MODEL", help="these aMUSEd weights instead of a world; needs --data and --clip")
    add("--data", metavar="FOLDER", help="for --amused: captioned pictures, for prompts and FID")
    add("--clip", metavar="MODEL", help="for --amused: a CLIP of transformers")
    add("--schedule", type=_names, default=["cosine"], help="such as cosine,pow2,bound2 (adaptive, 2 nats)")
    add("--order", type=_names, default=["confidence"], help="comma-separated, the orders of generate")
    add("--preset", type=_names, default=[], help="published samplers: muse, maskgit, amused, halton, lucidrains")
    add("--steps", type=_names, default=["4", "8", "16"], help="comma-separated (default: 4,8,16)")
    add("--samples", type=int, help="number of samples (default: 4096 of a world, 512 of a model)")
    add("--out", type=Path, help="folder for the report: tables and figures")
    add("--force", action="store_true", help="overwrite another report")
    add = command("eval", run_evaluate, "measure how often a checkpoint is right, with confidence intervals", "device")
    add("name", nargs="?", default="toy", metavar="CHECKPOINT", help="shipped name, folder or hub id (default: toy)")
    add("--out", type=Path, required=True, help="folder for the report; a stopped evaluation continues there")
    add("--kinds", dest="tasks", type=_names, default=[], help="tasks, such as seen,counts,edit (default: all)")
    add("--n", type=int, help="pictures of each task (default: 1000), or of each point of the sweep (300)")
    add("--sweep", action="store_true", help="vary guidance, temperature, steps and order (figure 8 of Muse)")
    add("--base-only", action="store_true", help="measure only the base model, at low resolution; sweeps always do")
    add("--seed", type=int, default=1000, help="picture i uses seed + i (default: 1000)")
    add("--batch", type=int, default=50, help="pictures drawn at once (default: 50)")
    add("--run", dest="training", type=Path, metavar="RUN", help="its training run, for the decoder before fine-tuning")
    add = command("info", run_info, "show sizes and defaults of presets and checkpoints")
    add("names", nargs="*", metavar="NAME")


def _guidance(text: str) -> float | tuple[float, float]:
    first, _, last = text.partition(":")
    return (float(first), float(last)) if last else float(first)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
