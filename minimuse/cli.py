"""The `minimuse` command: generate, inpaint, edit, app, train, eval, doctor, compare and others. No logic of its own.

minimuse generate "two small red cubes" --n 4 --seed 0 --film
minimuse inpaint picture.png mask.png "a green sphere"
minimuse info paper_3b
"""

import argparse
import itertools
import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SAMPLING = ("guidance", "steps", "schedule", "order", "sampling_temperature", "choice_temperature")  # options


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
    from minimuse.config import RIVALS, STAGES

    add = command(train, "train a Muse from nothing, or go on with a run", "seed", "half", "device").add_argument
    add("preset", nargs="?", help="nano, toy, ..., or a JSON file: config.json, run.json")
    add("--out", type=Path, required=True, help="folder for the run: states, log, pictures, checkpoint")
    add("--model", choices=RIVALS, help="another one for low resolution, of the base's size (default: Muse)")
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


def generate(args: argparse.Namespace) -> None:
    if args.like is not None:
        _like(args)
    else:
        _draw(args, lambda muse, **settings: muse.generate(args.prompts, **settings))


def _like(args: argparse.Namespace) -> None:
    """A picture of `minimuse generate` or `minimuse app`, drawn again, and whether its pixels are the same."""
    import numpy as np

    from minimuse.checkpoint import shipped
    from minimuse.pictures import again, open_picture, settings_of

    if args.n != 1 or any(getattr(args, k) is not None for k in ("seed", "negative_prompt", *SAMPLING)):
        raise ValueError("--like takes seed and settings from the picture; give none beside it")
    old = open_picture(args.like)
    told = settings_of(old)
    if args.model is None and told["model"] not in shipped():
        raise ValueError(f"{args.like} was made by {told['model']!r}, which is not shipped; name its folder by --model")
    args.model, args.prompts, new = args.model or told["model"], [told["prompt"]], []
    _draw(args, lambda muse, *, watch, **_: new.append(again(muse, told, watch=watch)) or new)
    if new[0].size == old.size:
        off = np.abs(np.asarray(new[0], dtype=int) - np.asarray(old.convert("RGB"))).max(2)
        differ = f"{(off > 0).sum()} of {off.size} pixels differ from {args.like}, by at most {off.max()} of 255"
        print(f"{differ}: other hardware rounds otherwise" if off.any() else f"the same pixels as {args.like}")


def inpaint(args: argparse.Namespace) -> None:
    from minimuse.pictures import open_picture

    image, mask = open_picture(args.image), open_picture(args.mask)
    _draw(args, lambda muse, **settings: muse.inpaint(image, mask, args.prompts[0], **settings))


def outpaint(args: argparse.Namespace) -> None:
    """A picture, wider or higher by --padding."""
    from minimuse.pictures import open_picture

    if len(args.padding) not in (1, 4):
        raise ValueError(f"--padding has {len(args.padding)} numbers; give 1, or 4: left top right bottom")
    padding = tuple(args.padding) if len(args.padding) == 4 else args.padding[0]
    image = open_picture(args.image)
    _draw(args, lambda muse, **settings: muse.outpaint(image, padding, args.prompts[0], **settings))


def edit(args: argparse.Namespace) -> None:
    from minimuse.pictures import open_picture

    image, iterating = open_picture(args.image), {"iterations": args.iterations, "share": args.share}
    _draw(args, lambda muse, **settings: muse.edit(image, args.prompts[0], **iterating, **settings))


def _draw(args: argparse.Namespace, method) -> None:
    """Load, draw with a progress bar, save with settings in the PNG, say where."""
    paths = _paths(args)  # refused before any work
    from tqdm import tqdm

    from minimuse.muse import Muse
    from minimuse.pictures import save_png
    from minimuse.plots import film

    muse = Muse.from_pretrained(args.model or "toy", device=args.device)
    settings = {k: v for k in SAMPLING if (v := getattr(args, k, None)) is not None}
    seen = []
    with tqdm(desc="decoding", unit="step") as bar:

        def watch(step) -> None:
            bar.set_postfix_str(f"{step.stage}, {int(step.masked[0].sum())} masked")
            bar.update()
            if not seen or seen[-1].stage == "base" or seen[-1].masked.any():  # the first decode, not those after it
                seen.append(step)

        images = method(muse, n=args.n, seed=args.seed, negative_prompt=args.negative_prompt, watch=watch, **settings)
    for image, path in zip(images, paths, strict=True):
        save_png(image, path)
        print(f"{path}  ({image.info['minimuse']['prompt']!r}, seed {image.info['minimuse']['seed']})")
    if args.film:
        path = paths[0].with_stem(paths[0].stem + "-film")
        strip = film(muse, seen)
        strip.info = images[0].info
        save_png(strip, path)
        print(path)


def _paths(args: argparse.Namespace) -> list[Path]:
    """Where the pictures go. An existing file is refused without --force; without --out, a free name is found."""
    count = len(args.prompts) * args.n
    if count < 1:
        raise ValueError(f"--n {args.n}: give at least 1")
    if args.out is not None and args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out}: give a name that ends in .png, the format that carries the settings")
    stem = "-".join("".join(c if c.isalnum() else " " for c in args.prompts[0].lower()).split())[:60] or "picture"
    names = [args.out] if args.out else (Path(f"{stem}{f'-v{i}' * (i > 1)}.png") for i in itertools.count(1))
    for out in names:
        files = [out, *(out.with_stem(f"{out.stem}-{i}") for i in range(1, count))]
        written = files + [out.with_stem(out.stem + "-film")] * args.film
        taken = [str(path) for path in written if path.exists()]
        if not taken:
            break
    if taken and not args.force:
        raise FileExistsError(f"{', '.join(taken)} already there; give another --out, or --force to overwrite")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent}; make it first")
    return files


def app(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    from minimuse.app import serve

    serve(args.checkpoint, host=args.host, port=args.port, device=args.device)


def train(args: argparse.Namespace) -> None:
    """All five stages with a bar each, then the checkpoint. Started by `accelerate launch`, on all its processes."""
    import torch

    from minimuse import checkpoint
    from minimuse.config import to_dict
    from minimuse.engine import Engine, Stopped
    from minimuse.folders import open_source
    from minimuse.train import train_muse
    from minimuse.watch import add_record

    cfg = _configuration(args)
    source = open_source(args.data, cfg, seed=args.seed)
    if args.dry_run:
        _dry_run(cfg, source, args)
        return
    engine = Engine(
        seed=args.seed, device=args.device, accumulate=args.accumulate, compile=args.compile,
        recompute=args.recompute, folder=args.out, keep=args.keep,
    )  # fmt: skip
    values = {"config": to_dict(cfg), "seed": args.seed, "data": args.data, "data_fingerprint": source.fingerprint}
    if engine.is_main:
        checkpoint.open_run(args.out, values, resume=args.resume)
    engine.accelerator.wait_for_everyone()
    engine.heed_signals()
    try:
        progress = _with_bars(train_muse(cfg, data=source, engine=engine), engine.is_main)
        p = deque(progress, maxlen=1).pop()
    except Stopped:
        if engine.is_main:
            print(f"\nminimuse: stopped; go on with: minimuse train --resume --out {args.out}", file=sys.stderr)
        raise SystemExit(128 + engine.signal) from None
    if engine.is_main:
        folder = p.model.save_pretrained(args.out, dtype=torch.float16 if args.half else None, overwrite=True)
        add_record(folder, cfg)
        print(f"trained in {p.figures['minutes']:.1f} minutes: {folder}")
        print(f'try: minimuse generate "{p.model.examples[0]}" --model {folder}')


def _configuration(args: argparse.Namespace) -> Any:
    """Preset, file or, to resume, the run's own; then what --set changes."""
    from minimuse import checkpoint
    from minimuse.config import PRESETS, changed, preset, rival

    if args.resume and args.preset is None:
        if not (args.out / checkpoint.RUN).exists():
            raise FileNotFoundError(f"{args.out} holds no run to resume; give a preset to begin one")
        run = checkpoint.read_run(args.out)
        args.seed, args.data = run["seed"], run["data"]
        return changed(checkpoint.configuration(run, args.out / checkpoint.RUN), args.set)
    if args.preset is None:
        raise ValueError(f"give a preset ({', '.join(PRESETS)}), a JSON file, or --resume")
    if args.preset in PRESETS or not Path(args.preset).is_file():
        cfg = preset(args.preset)
    else:
        values = checkpoint.read_json(Path(args.preset))
        whole = values if isinstance(values, dict) and "config" in values else {"config": values}
        cfg = checkpoint.configuration(whole, Path(args.preset))
    return changed(rival(cfg, args.model) if args.model else cfg, args.set)


def _dry_run(cfg: Any, source: Any, args: argparse.Namespace) -> None:
    """What a run would take, printed before any of it; nothing is written."""
    from minimuse.budget import report
    from minimuse.corpus import Corpus
    from minimuse.engine import Engine
    from minimuse.text import TextEncoder

    if cfg.model != "muse":
        raise ValueError(f"--dry-run counts a whole Muse; {cfg.name} is a rival of its base model: leave out --model")
    engine, encoder = Engine(device=args.device), TextEncoder(cfg.text_encoder, max_tokens=cfg.text_tokens)
    print(Corpus(args.out / "cache", source, cfg, engine, encoder.to(engine.device)).preview())
    ceiling = args.ceiling and args.ceiling * 1e12
    print(report(cfg, args.accelerators, ceiling=ceiling, memory_gb=args.memory, checkpointing=args.recompute))


def _with_bars(progress: Any, show: bool) -> Any:
    """Hand on what a training tells, with a bar a stage: loss, speed, time left."""
    from tqdm import tqdm

    bar, stage = tqdm(disable=True), ""
    for p in progress:
        if p.stage != stage:
            bar.close()
            bar, stage = tqdm(total=p.steps, desc=p.stage, disable=not show), p.stage
        bar.update(p.step - bar.n)
        told = {k: f"{v:.3g}" for k, v in p.figures.items() if not k.startswith("held_out")}
        bar.set_postfix(told, refresh=False)
        yield p
    bar.close()


def average(args: argparse.Namespace) -> None:
    """Muse 3: checkpoints of the transformers averaged offline."""
    import torch

    from minimuse import checkpoint
    from minimuse.muse import Muse

    checkpoint.refuse_existing(args.out)
    muse = Muse.from_pretrained(args.folder, device="cpu")
    for name in (n for n in ("base", "superres") if n in muse.parts):
        states = checkpoint.states(args.folder / name)
        if not states:
            raise FileNotFoundError(f"{args.folder / name} holds no states; `minimuse train` writes them there")
        muse.parts[name].load_state_dict(checkpoint.average(states, args.decay))
        print(f"{name}: {len(states)} states, steps {int(states[0].name[5:])} to {int(states[-1].name[5:])}")
    print(muse.save_pretrained(args.out, dtype=torch.float16 if args.half else None))


def compare(args: argparse.Namespace) -> None:
    """Print the table, and paired differences to its first row's sampler; with --out also write figures and tables."""
    from minimuse import lab

    settings = {"presets": args.preset, "samples": args.samples, "seed": args.seed, "out": args.out}
    steps = [int(t) for t in args.steps]
    report = lab.compare(_compared(args), args.schedule, args.order, steps, **settings)
    print(report.table())
    if len(args.schedule) * len(args.order) > 1:
        print(f"\nless {args.schedule[0]}, {args.order[0]}; paired, bold where 0 is left out")
        print(report.table((args.schedule[0], args.order[0])))
    if args.out:
        print(report.save(args.out, overwrite=args.force))


def eval_(args: argparse.Namespace) -> None:
    """Print the tables, and where they and the pictures are."""
    from minimuse.evaluate import measure

    measure(**{name: value for name, value in vars(args).items() if name != "run"})
    print((args.out / "eval.md").read_text(encoding="utf-8"))


def _compared(args: argparse.Namespace) -> Any:
    """A world, a Muse, or the judge of published weights."""
    from minimuse import lab

    if args.muse:
        from minimuse.muse import Muse

        return Muse.from_pretrained(args.muse, device=args.device)
    if args.amused:
        from minimuse.amused import Amused
        from minimuse.metrics import ClipScorer
        from minimuse.muse import pick_device
        from minimuse.picture_judge import AmusedJudge

        if not (args.data and args.clip):
            raise ValueError("--amused needs --data, a folder of captioned pictures, and --clip, a CLIP's name")
        device = pick_device(args.device)
        amused, score = Amused.from_pretrained(args.amused).to(device), ClipScorer(args.clip, device)
        return AmusedJudge(amused, args.data, score, samples=args.samples or 512, seed=args.seed)
    if args.world not in lab.WORLDS:
        raise ValueError(f"unknown world {args.world!r}; known: {', '.join(lab.WORLDS)}")
    return lab.WORLDS[args.world]()


def doctor(args: argparse.Namespace) -> None:
    """One finding after the other: verdict, stage and check; the number; what failure looks like and what to do."""
    from textwrap import fill

    from minimuse.doctor import examine

    findings, told = examine(args.folder, args.stage, device=args.device), set()
    for f in findings:
        print(f"{f.verdict:5}  {f.stage}, {f.check}")
        for text in [f.says] if f.verdict == "fine" and f.check in told else [f.says, f.mend]:
            print(fill(text, 110, initial_indent="       ", subsequent_indent="       "))
        told.add(f.check)
    wrong = sum(f.verdict == "wrong" for f in findings)
    print(f"{len(findings)} findings, {sum(f.verdict == 'look' for f in findings)} to look at, {wrong} wrong")
    if wrong:
        raise SystemExit(1)


def info(args: argparse.Namespace) -> None:
    """A few lines for each preset or checkpoint, counted on the meta device."""
    from minimuse import checkpoint
    from minimuse.config import PRESETS, preset
    from minimuse.muse import parameter_counts

    for name in args.names or [*PRESETS]:
        cfg = preset(name) if name in PRESETS else checkpoint.load(name)[0]
        sizes = parameter_counts(cfg)
        print(f"{name}: {sum(sizes.values()) / 1e6:,.1f}M parameters, text from {cfg.text_encoder}")
        for part, size in (("base", "low"), ("superres", "high"))[: 2 if cfg.model == "muse" else 1]:
            model, tokenizer = getattr(cfg, part), getattr(cfg, f"{size}_tokenizer")
            print(
                f"  {part:9} {sizes[part] / 1e6:8,.1f}M  {model.layers} layers x {model.width}, MLP {model.mlp_width}; "
                f"{tokenizer.image_size} px, f={tokenizer.downsampling}: {model.grid}x{model.grid} tokens of "
                f"{model.codebook_size} codes; {getattr(cfg, f'{part}_sampling').steps} steps"
            )
        high = f" and, fine-tuned, {sizes['high_tokenizer'] / 1e6:,.1f}M" if cfg.model == "muse" else ""
        print(f"  tokenizers {sizes['low_tokenizer'] / 1e6:,.1f}M{high}")
    if not args.names:
        print(f"shipped checkpoints: {', '.join(checkpoint.shipped()) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
