"""What each `minimuse` command does with its options, a function a command; no logic of its own.

What a command needs is imported when it runs, so that `minimuse --help` is there at once.
Not here: the options (`cli.py`).
"""

import argparse
import itertools
import sys
from collections import deque
from pathlib import Path
from typing import Any

SAMPLING = ("guidance", "steps", "schedule", "order", "sampling_temperature", "choice_temperature")  # options of them

# --- drawing ----------------------------------------------------------------------------------------------------------


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


# --- training ---------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """All five stages with a bar each, then the checkpoint. Started by `accelerate launch`, on all its processes."""
    import torch

    from minimuse import train_state as runs
    from minimuse.config import to_dict
    from minimuse.data_sources import open_source
    from minimuse.train import train_muse
    from minimuse.train_engine import Engine, Stopped
    from minimuse.train_log import add_record

    config = _configuration(args)
    source = open_source(args.data, config, seed=args.seed)
    if args.dry_run:
        _dry_run(config, source, args)
        return
    engine = Engine(
        seed=args.seed, device=args.device, accumulate=args.accumulate, compile=args.compile,
        recompute=args.recompute, folder=args.out, keep=args.keep,
    )  # fmt: skip
    values = {"config": to_dict(config), "seed": args.seed, "data": args.data, "data_fingerprint": source.fingerprint}
    if engine.is_main:
        runs.open_run(args.out, values, resume=args.resume)
    engine.accelerator.wait_for_everyone()
    engine.heed_signals()
    try:
        progress = _with_bars(train_muse(config, data=source, engine=engine), engine.is_main)
        p = deque(progress, maxlen=1).pop()
    except Stopped:
        if engine.is_main:
            print(f"\nminimuse: stopped; go on with: minimuse train --resume --out {args.out}", file=sys.stderr)
        raise SystemExit(128 + engine.signal) from None
    if engine.is_main:
        folder = p.model.save_pretrained(args.out, dtype=torch.float16 if args.half else None, overwrite=True)
        add_record(folder, config)
        print(f"trained in {p.figures['minutes']:.1f} minutes: {folder}")
        print(f'try: minimuse generate "{p.model.examples[0]}" --model {folder}')


def _configuration(args: argparse.Namespace) -> Any:
    """Preset, file or, to resume, the run's own; then what --set changes."""
    from minimuse import checkpoint
    from minimuse import train_state as runs
    from minimuse.config import PRESETS, changed, preset

    if args.resume and args.preset is None:
        if not (args.out / runs.RUN).exists():
            raise FileNotFoundError(f"{args.out} holds no run to resume; give a preset to begin one")
        run = runs.read_run(args.out)
        args.seed, args.data = run["seed"], run["data"]
        return changed(checkpoint.configuration(run, args.out / runs.RUN), args.set)
    if args.preset is None:
        raise ValueError(f"give a preset ({', '.join(PRESETS)}), a JSON file, or --resume")
    if args.preset in PRESETS or not Path(args.preset).is_file():
        config = preset(args.preset)
    else:
        values = checkpoint.read_json(Path(args.preset))
        whole = values if isinstance(values, dict) and "config" in values else {"config": values}
        config = checkpoint.configuration(whole, Path(args.preset))
    if args.model:
        raise NotImplementedError("--model: the baselines are moving to files of their own")
    return changed(config, args.set)


def _dry_run(config: Any, source: Any, args: argparse.Namespace) -> None:
    """What a run would take, printed before any of it; nothing is written."""
    from minimuse.data_cache import TrainingData
    from minimuse.text import TextEncoder
    from minimuse.train_budget import report
    from minimuse.train_engine import Engine

    engine, encoder = Engine(device=args.device), TextEncoder(config.text_encoder, max_tokens=config.text_tokens)
    print(TrainingData(args.out / "cache", source, config, engine, encoder.to(engine.device)).preview())
    ceiling = args.ceiling and args.ceiling * 1e12
    print(report(config, args.accelerators, ceiling=ceiling, memory_gb=args.memory, checkpointing=args.recompute))


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
    from minimuse import train_state as runs
    from minimuse.muse import Muse

    checkpoint.refuse_existing(args.out)
    muse = Muse.from_pretrained(args.folder, device="cpu")
    for name in (n for n in ("base", "superres") if n in muse.parts):
        states = runs.states(args.folder / name)
        if not states:
            raise FileNotFoundError(f"{args.folder / name} holds no states; `minimuse train` writes them there")
        muse.parts[name].load_state_dict(runs.average(states, args.decay))
        print(f"{name}: {len(states)} states, steps {int(states[0].name[5:])} to {int(states[-1].name[5:])}")
    print(muse.save_pretrained(args.out, dtype=torch.float16 if args.half else None))


def doctor(args: argparse.Namespace) -> None:
    """One finding after the other: verdict, stage and check; the number; what failure looks like and what to do."""
    from textwrap import fill

    from minimuse.train_doctor import examine

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


# --- measuring --------------------------------------------------------------------------------------------------------


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
    from minimuse.eval_run import measure

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
        from minimuse.eval_metrics import ClipScorer
        from minimuse.lab_models import AmusedJudge
        from minimuse.utils import pick_device

        if not (args.data and args.clip):
            raise ValueError("--amused needs --data, a folder of captioned pictures, and --clip, a CLIP's name")
        device = pick_device(args.device)
        amused, score = Amused.from_pretrained(args.amused).to(device), ClipScorer(args.clip, device)
        return AmusedJudge(amused, args.data, score, samples=args.samples or 512, seed=args.seed)
    if args.world not in lab.WORLDS:
        raise ValueError(f"unknown world {args.world!r}; known: {', '.join(lab.WORLDS)}")
    return lab.WORLDS[args.world]()


def info(args: argparse.Namespace) -> None:
    """A few lines for each preset or checkpoint, counted on the meta device."""
    from minimuse import checkpoint
    from minimuse.config import PRESETS, preset
    from minimuse.muse import parameter_counts

    for name in args.names or [*PRESETS]:
        config = preset(name) if name in PRESETS else checkpoint.load(name)[0]
        sizes = parameter_counts(config)
        print(f"{name}: {sum(sizes.values()) / 1e6:,.1f}M parameters, text from {config.text_encoder}")
        for part, size in (("base", "low"), ("superres", "high")):
            model, tokenizer = getattr(config, part), getattr(config, f"{size}_tokenizer")
            print(
                f"  {part:9} {sizes[part] / 1e6:8,.1f}M  {model.layers} layers x {model.width}, MLP {model.mlp_width}; "
                f"{tokenizer.image_size} px, f={tokenizer.downsampling}: {model.grid}x{model.grid} tokens of "
                f"{model.codebook_size} codes; {getattr(config, f'{part}_sampling').steps} steps"
            )
        high = f" and, fine-tuned, {sizes['high_tokenizer'] / 1e6:,.1f}M"
        print(f"  tokenizers {sizes['low_tokenizer'] / 1e6:,.1f}M{high}")
    if not args.names:
        print(f"shipped checkpoints: {', '.join(checkpoint.shipped()) or 'none'}")
