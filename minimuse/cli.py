"""The `minimuse` command: its options. Not here: what the commands do (`cli_commands.py`)."""

import argparse
import logging
import os
import re
import reprlib
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tqdm.contrib.logging import logging_redirect_tqdm

import minimuse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code. A user's mistake is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal in ASCII shows "?" for other letters
    words = sys.argv[1:] if argv is None else argv
    words = [re.sub("^(--[^=]+=)--$", r"\1", word) for word in words]  # argparse takes the value "--" for no value
    args = parser().parse_args(words)
    log = logging.getLogger("minimuse")
    log.handlers[:] = [logging.StreamHandler()]
    log.handlers[0].setFormatter(logging.Formatter("minimuse: %(message)s"))
    try:
        with logging_redirect_tqdm([log]), warnings.catch_warnings():  # lines start below a progress bar
            warnings.showwarning = lambda message, *_: log.warning(message)
            from minimuse.cli_commands import COMMANDS  # not before: it loads torch, and `minimuse --help` is fast

            COMMANDS[args.command](args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wants, as in `minimuse info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as shells expect it of a program whose reader left
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError) as error:
        print(f"minimuse: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minimuse: stopped", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """argparse's, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and where to find help; exit code 2."""
        self.exit(2, f"minimuse: {' '.join(message.split())}; see {self.prog} --help\n")


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return text


def _number(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    """An argparse type: a number from `low` to `high`. The upper limits refuse what no machine could finish."""

    def parse(text: str) -> Any:
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:  # NaN is not
                return value
        expected = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not {expected} from {low:,} to {high:,}")

    return parse


def _each(parse: Callable[[str], Any]) -> Callable[[str], list]:
    """An argparse type: values with commas between them."""
    return lambda text: [parse(part.strip()) for part in text.split(",")]


def _guidance(text: str) -> float | tuple[float, ...] | str:
    name, *numbers = text.split(":")
    if name in GUIDANCES.split(", "):
        return ":".join([name, *(str(_number(-1000, 1000)(number)) for number in numbers)])
    first, *last = [_number(-1000, 1000)(part) for part in text.split(":", 1)]
    return (first, *last) if last else first


GUIDANCES = "constant, rising, falling, interval, power-cosine"
SAMPLERS = """muse, maskgit, amused, halton, lucidrains, meissonic, muse_pytorch, titok, maskgen, maskbit, llada,
nanomaskgit, remdm_conf, remdm_loop, p2, moment, klass, beta, dilated, token_critic, informed, mdlm, remdm_cap,
remdm_rescale, choose_then_sample, eb, entropy_sum, fast_dllm, fast_dllm_factor, top_p"""
COUNT = _number(1, 10_000, int)
MANY = _number(1, 1_000_000, int)
COUNT_OR_0 = _number(0, 10_000, int)
SEED = _number(0, 2**32 - 1, int)
AMOUNT = _number(0, 1_000_000)
FRACTION = _number(0, 1)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = Parser("minimuse", description="Text-to-image by masked generative transformers (Muse).")
    top.add_argument("--version", action="version", version=f"minimuse {minimuse.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    groups = _option_groups()

    def command(name: str, help: str, *options: str) -> Callable[..., argparse.Action]:
        added = commands.add_parser(name, help=help, description=help, parents=[groups[option] for option in options])
        added.register("type", None, _name)  # what has no type
        added.register("type", Path, lambda text: Path(_name(text)))
        return added.add_argument

    _making_options(command)
    _measuring_options(command)
    return top


def _option_groups() -> dict[str, argparse.ArgumentParser]:
    """Options that several commands share."""
    groups = defaultdict(lambda: argparse.ArgumentParser(add_help=False))
    add = groups["prompts"].add_mutually_exclusive_group(required=True).add_argument
    add("prompts", nargs="*", default=[], type=str, metavar="PROMPT")
    add("--like", type=Path, metavar="PNG", help="draw this picture again: its prompt, seed and settings")
    groups["image"].add_argument("image", type=Path)
    groups["mask"].add_argument("mask", type=Path)
    groups["prompt"].add_argument("prompts", nargs=1, type=str, metavar="PROMPT")
    add = groups["drawing"].add_argument
    add("--model", help="shipped name, folder or hub id (default: toy; with --like, the picture's own)")
    add("--n", type=COUNT, default=1, help="number of pictures for each prompt")
    add("--seed", type=SEED, help="picture i uses seed + i (default: a random seed, which is printed)")
    add("--negative-prompt", type=str, help="what the pictures should not show")
    add("--guidance", type=_guidance, help=f"t of the base model, FIRST:LAST, or NAME:t, as rising:4: {GUIDANCES}")
    add("--out", type=Path, help="PNG to write; picture i > 0 gets -i at the end of its name (default: a free name)")
    add("--film", action="store_true", help="also write a film strip of the decoding, as ...-film.png")
    add("--force", action="store_true", help="overwrite existing files")
    add = groups["sampling"].add_argument
    add("--steps", type=COUNT, help="decoding steps of the base model; super-resolution keeps its own")
    add("--schedule", help="cosine, linear, square, cubic, sqrt, arccos, log or powP, such as pow2.5")
    add("--order", help="confidence, random, raster, halton, entropy or margin")
    add("--sampling-temperature", type=AMOUNT, help="temperature of the softmax that tokens are drawn from")
    add("--choice-temperature", type=AMOUNT, help="scale of the noise in the choice of tokens to reveal")
    add = groups["data"].add_argument
    add("--data", help="folder, tar shards, Parquet or hub id of captioned images (default: scenes)")
    add("--image-column", metavar="NAME", help="column of images, or metadata key of their files (default: usual ones)")
    add("--caption-column", dest="caption_columns", type=_each(_name), metavar="NAMES", help="such as text,alt_text")
    add("--split", help="of a hub data set or a folder with a folder for each split (default: train; a folder: all)")
    add("--count", type=MANY, help="read only so many images, the first ones (default: all)")
    add("--captions", choices=["none"], help='no text: the model draws, inpaints and outpaints with the prompt ""')
    groups["seed"].add_argument("--seed", type=SEED, default=0, help="seed of all random numbers (default: 0)")
    groups["half"].add_argument("--half", action="store_true", help="save weights in float16, as shipped ones are")
    groups["device"].add_argument("--device", help="cpu, cuda or mps (default: the fastest one)")
    return groups


def _making_options(command: Callable) -> None:
    """Options of the commands that make pictures and models."""
    add = command("generate", "draw pictures from prompts", "prompts", "drawing", "sampling", "device")
    add("--sampler", help=f"published sampler of the base model, as in p2:0.5: {SAMPLERS}")
    command("inpaint", "repaint the white part of a mask", "image", "mask", "prompt", "drawing", "sampling", "device")
    add = command("outpaint", "extend a picture beyond its edges", "image", "prompt", "drawing", "sampling", "device")
    add("--padding", type=COUNT_OR_0, nargs="+", default=[16], help="pixels: one number, or left top right bottom")
    add = command("edit", "change a picture towards a prompt, without a mask", "image", "prompt", "drawing", "device")
    add("--iterations", type=COUNT, default=100, help="number of resampling steps (default: 100)")
    add("--share", dest="fraction", type=FRACTION, default=0.08, help="fraction of tokens resampled in an iteration")
    add = command("app", "open a page to draw with in the browser (extra `app`)", "device")
    add("--checkpoint", "--model", default="toy", help="shipped name, folder or hub id (default: toy)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    add("--port", type=_number(1, 65535, int), help="port to listen on (default: the first free one from 7860)")
    add = command("train", "train a Muse from scratch, fine-tune one, or resume a run", "data", "half", "device")
    add("preset", nargs="?", help="nano, toy, ..., or a JSON file: config.json, run.json")
    add("--out", type=Path, required=True, help="folder of the run: states, log, pictures, checkpoint")
    add("--model", choices=("masked", "ar", "dit"), help="train this low-resolution baseline instead of Muse")
    add("--seed", type=SEED, help="seed of all random numbers (default: 0)")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="change a setting: stages.base.steps=500")
    add("--from", dest="start", metavar="MODEL", help="fine-tune this shipped name, folder or hub id, not a preset")
    add("--stages", type=_each(_name), help="with --from: stages to train (default: base,superres)")
    add("--resume", action="store_true", help="continue the stopped run in --out; with --data if its data moved")
    add("--more", type=MANY, help="continue the finished run in --out by so many steps of each transformer")
    add("--dry-run", action="store_true", help="print sizes, memory, FLOPs, bytes and hours, and train nothing")
    add("--accelerators", type=MANY, default=1, help="for --dry-run: number of accelerators")
    add("--memory", type=AMOUNT, metavar="GB", help="for --dry-run: memory of each, to see what does not fit")
    add("--ceiling", type=AMOUNT, metavar="TFLOPS", help="for --dry-run: speed of each (default: this machine's)")
    add("--accumulate", type=MANY, help="micro-batches in each step: less memory, the same gradient")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, more computation")
    add("--compile", action="store_true", help="compile the models with torch.compile")
    add("--keep", type=COUNT_OR_0, default=2, help="states to keep of each stage (default: 2); 0 keeps all: `average`")
    add = command("average", "average the states of a run into a checkpoint (Muse 3)", "half")
    add("folder", type=Path, metavar="RUN", help="a finished run of train --keep 0")
    add("--out", type=Path, required=True, help="folder for the checkpoint")
    add("--from", dest="start", metavar="MODEL", help="average only the base model, with that of the fine-tuned MODEL")
    add("--decay", type=FRACTION, default=0.7, help="decay of the moving average (default: 0.7, as in the paper)")
    add = command("doctor", "check losses and metrics of a run; exit code 1 if one is wrong", "device")
    add("folder", type=Path, metavar="RUN", help="a run of train, finished or not; it is not changed")
    add("--stage", help="check only this stage, such as base (default: all that have a state)")
    add = command("reconstruct", "show what tokenizers make of pictures, and say if they are good enough", "device")
    add("pictures", type=Path, help="a folder of pictures, or one picture; no captions are needed")
    add("--model", default="toy", help="shipped name, folder or hub id (default: toy)")
    add("--out", type=Path, help="PNG to write (default: a free name)")
    add("--force", action="store_true", help="overwrite an existing file")


def _measuring_options(command: Callable) -> None:
    """Options of compare, eval and info."""
    add = command("compare", "measure schedules and orders in a world or on a model", "seed", "device")
    add("--world", default="mixture", help="mixture, chain, potts or labels (default: mixture)")
    add("--muse", metavar="MODEL", help="the base model of this checkpoint instead of a world")
    add("--amused", metavar="MODEL", help="these aMUSEd weights instead of a world; needs --data and --clip")
    add("--data", metavar="FOLDER", help="for --amused: captioned pictures, for prompts and FID")
    add("--clip", metavar="MODEL", help="for --amused: a CLIP of transformers")
    add("--schedule", type=_each(_name), default=["cosine"], help="as cosine,pow2,optimal,bound2 (adaptive, 2 nats)")
    add("--order", type=_each(_name), default=["confidence"], help="comma-separated, the orders of generate")
    add("--sampler", "--preset", dest="preset", type=_each(_name), default=[], help=SAMPLERS + ", as in p2:0.5")
    add("--guidance", type=_each(_guidance), default=[], help="first schedule and order with each; worlds: only labels")
    add("--steps", type=_each(COUNT), default=[4, 8, 16], help="comma-separated (default: 4,8,16)")
    add("--samples", type=MANY, help="number of samples (default: 4096 of a world, 512 of a model)")
    add("--out", type=Path, help="folder for the report: tables and figures")
    add("--force", action="store_true", help="overwrite another report")
    add = command("eval", "measure how often a checkpoint is right, with confidence intervals", "device")
    add("name", nargs="?", default="toy", metavar="CHECKPOINT", help="shipped name, folder or hub id (default: toy)")
    add("--out", type=Path, required=True, help="folder for the report; a stopped evaluation continues there")
    add("--kinds", dest="tasks", type=_each(_name), default=[], help="tasks, such as seen,counts,edit (default: all)")
    add("--n", type=MANY, help="pictures of each task (default: 1000), or of each point of the sweep (300)")
    add("--sweep", action="store_true", help="vary guidance, temperature, steps and order (figure 8 of Muse)")
    add("--base-only", action="store_true", help="measure only the base model, at low resolution; sweeps always do")
    add("--seed", type=SEED, default=1000, help="picture i uses seed + i (default: 1000)")
    add("--batch", type=COUNT, default=50, help="pictures drawn at once (default: 50)")
    add("--run", dest="training", type=Path, metavar="RUN", help="its training run, for the decoder before fine-tuning")
    add = command("info", "show sizes and defaults of presets and checkpoints")
    add("names", nargs="*", metavar="NAME")


if __name__ == "__main__":
    sys.exit(main())
