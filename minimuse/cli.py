"""The `minimuse` command: its options. What each command does with them stands in `commands.py`.

minimuse generate "two small red cubes" --n 4 --seed 0 --film
minimuse inpaint picture.png mask.png "a green sphere"
minimuse info paper_3b
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minimuse.commands import app, average, compare, doctor, edit, eval_, generate, info, inpaint, outpaint, train


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code. What the user got wrong is one line on stderr, never a traceback."""
    args = parser().parse_args(argv)
    log = logging.getLogger("minimuse")
    log.handlers[:] = [logging.StreamHandler()]  # to today's stderr, in our words; other libraries keep their own
    log.handlers[0].setFormatter(logging.Formatter("minimuse: %(message)s"))
    log.setLevel(logging.INFO)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"minimuse: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minimuse: stopped", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    from minimuse import __version__

    top = argparse.ArgumentParser("minimuse", description="Text-to-image by masked generative transformers (Muse).")
    top.add_argument("--version", action="version", version=f"minimuse {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    shared = _shared()

    def command(run: Callable, help: str, *options: str) -> argparse.ArgumentParser:
        parents = [shared[name] for name in options]
        p = commands.add_parser(run.__name__.rstrip("_"), help=help, description=help, parents=parents)
        p.set_defaults(run=run)
        return p

    _drawing(command)
    _training(command)
    _measuring(command)
    return top


def _drawing(command: Callable[..., argparse.ArgumentParser]) -> None:
    """generate, inpaint, outpaint, edit, app."""
    p = command(generate, "turn prompts into pictures", "drawing", "sampling", "device")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("prompts", nargs="*", default=[], metavar="PROMPT")
    what.add_argument("--like", type=Path, metavar="PNG", help="draw this picture again: its prompt, seed and settings")
    says = "repaint the white part of a mask after a prompt"
    add = command(inpaint, says, "drawing", "sampling", "device").add_argument
    add("image", type=Path)
    add("mask", type=Path)
    add("prompts", nargs=1, metavar="PROMPT")
    add = command(outpaint, "extend a picture beyond its edges", "drawing", "sampling", "device").add_argument
    add("image", type=Path)
    add("prompts", nargs=1, metavar="PROMPT")
    add("--padding", type=int, nargs="+", default=[16], help="pixels: one number, or left top right bottom")
    add = command(edit, "change a picture towards a prompt, without a mask", "drawing", "device").add_argument
    add("image", type=Path)
    add("prompts", nargs=1, metavar="PROMPT")
    add("--iterations", type=int, default=100)
    add("--share", type=float, default=0.08, help="of the tokens resampled an iteration (default: 0.08)")
    add = command(app, "a page to play with, in the browser, on this machine (extra `app`)", "device").add_argument
    add("--checkpoint", "--model", help="shipped name, folder or hub id (default: the last shipped one)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, help="(default: the first free one from 7860)")


def _training(command: Callable[..., argparse.ArgumentParser]) -> None:
    """train, average, doctor."""
    from minimuse.config import STAGES

    add = command(train, "train a Muse from nothing, or go on with a run", "seed", "half", "device").add_argument
    add("preset", nargs="?", help="nano, toy, ..., or a JSON file: config.json, run.json")
    add("--out", type=Path, required=True, help="folder for the run: states, log, pictures, checkpoint")
    add(
        "--model",
        choices=("masked", "ar", "dit"),
        help="another one for low resolution, of the base's size (default: Muse)",
    )
    add("--data", default="scenes", help="a folder of captioned images, or tar shards (default: scenes)")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="such as stages.base.steps=500")
    add("--resume", action="store_true", help="go on with the run in --out, where it was stopped")
    add("--dry-run", action="store_true", help="print sizes, memory, FLOPs, bytes and hours; train nothing")
    add("--accelerators", type=int, default=1, help="for --dry-run: how many")
    add("--memory", type=float, metavar="GB", help="for --dry-run: of each, to say what does not fit")
    add("--ceiling", type=float, metavar="TFLOPS", help="for --dry-run: of each (default: this machine's)")
    add("--accumulate", type=int, help="micro-batches a step: less memory, the same gradient")
    add("--recompute", action="store_true", help="activation checkpointing: more work for less memory")
    add("--compile", action="store_true", help="torch.compile the models")
    add("--keep", type=int, default=2, help="states kept of a stage; 0: all, for `average` (default: 2)")
    says = "average the states of a run's transformers into a checkpoint (Muse 3)"
    add = command(average, says, "half").add_argument
    add("folder", type=Path, metavar="RUN", help="finished, made by train --keep 0")
    add("--out", type=Path, required=True, help="folder for the checkpoint")
    add("--decay", type=float, default=0.7, help="of the moving average (default: 0.7, the paper's)")
    says = "is my loss right? examine a run, finished or not; exit code 1 if wrong"
    add = command(doctor, says, "device").add_argument
    add("folder", type=Path, metavar="RUN", help="made by train; nothing in it is changed")
    add("--stage", choices=STAGES, help="this one alone (default: all that have a state)")


def _measuring(command: Callable[..., argparse.ArgumentParser]) -> None:
    """compare, eval, info."""
    says = "measure schedules and orders in an exact world or a trained model"
    add = command(compare, says, "seed", "device").add_argument
    add("--world", default="mixture", help="mixture, chain or potts (default: mixture)")
    add("--muse", metavar="MODEL", help="instead of a world: nano, a folder or a hub id; its base model")
    add("--amused", metavar="MODEL", help="instead: published weights, with --data and --clip")
    add("--data", metavar="FOLDER", help="for --amused: captioned pictures, for prompts and FID")
    add("--clip", metavar="MODEL", help="for --amused: any CLIP of transformers")
    add("--schedule", type=_names, default=["cosine"], help="such as cosine,pow2,bound2 (adaptive, 2 nats)")
    add("--order", type=_names, default=["confidence"], help="comma-separated, as of generate")
    add("--preset", type=_names, default=[], help="muse, maskgit, amused, halton, lucidrains")
    add("--steps", type=_names, default=["4", "8", "16"], help="comma-separated (default: 4,8,16)")
    add("--samples", type=int, help="(default: 4096 of a world, 512 pictures)")
    add("--out", type=Path, help="folder for the report; finished cells are kept there and used again")
    add("--force", action="store_true", help="overwrite another report")
    add = command(eval_, "how often a checkpoint is right, with intervals and pictures", "device").add_argument
    add("name", nargs="?", default="toy", metavar="CHECKPOINT", help="shipped name, folder or hub id")
    add("--out", type=Path, required=True, help="folder for the report; a stopped evaluation goes on there")
    add("--kinds", type=_names, default=[], help="comma-separated, such as seen,counts,edit (default: all)")
    add("--n", type=int, help="pictures a kind (default: 1000), or a point of the sweep (300)")
    add("--sweep", action="store_true", help="guidance, temperature, steps, order: Muse's figure 8")
    add("--base-only", action="store_true", help="the base model alone, at its low size; sweeps always are")
    add("--seed", type=int, default=1000, help="picture i draws with seed + i (default: 1000)")
    add("--batch", type=int, default=50, help="pictures drawn at once (default: 50)")
    add("--run", dest="training", type=Path, metavar="RUN", help="of its training, for the decoder before fine-tuning")
    command(info, "sizes and defaults of presets and checkpoints").add_argument("names", nargs="*", metavar="NAME")


def _shared() -> dict[str, argparse.ArgumentParser]:
    """Options of several commands: of all that draw, of how they decode, --seed, --half, --device."""
    names = ("drawing", "sampling", "seed", "half", "device")
    parts = {name: argparse.ArgumentParser(add_help=False) for name in names}
    drawing, sampling, seed, half, device = (part.add_argument for part in parts.values())
    drawing("--model", help="shipped name, folder or hub id (default: toy; of --like, the one that it names)")
    drawing("--n", type=int, default=1, help="pictures a prompt")
    drawing("--seed", type=int, help="picture i draws with seed + i (default: a random one, told)")
    drawing("--negative-prompt")
    drawing("--guidance", type=_guidance, help="t, or FIRST:LAST for a rising one")
    drawing("--out", type=Path, help="PNG to write; picture i > 0 gets -i before its ending (default: a free name)")
    drawing("--film", action="store_true", help="also write the film strip of the decoding, as ...-film.png")
    drawing("--force", action="store_true", help="overwrite files")
    sampling("--steps", type=int)
    sampling("--schedule", help="cosine, linear, square, cubic, sqrt, arccos, log, powP")
    sampling("--order", help="confidence, random, raster, halton, entropy, margin")
    sampling("--sampling-temperature", type=float)
    sampling("--choice-temperature", type=float)
    seed("--seed", type=int, default=0)
    half("--half", action="store_true", help="save the weights in half precision, as the shipped ones are")
    device("--device")
    return parts


def _guidance(text: str) -> float | tuple[float, float]:
    first, _, last = text.partition(":")
    return (float(first), float(last)) if last else float(first)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
