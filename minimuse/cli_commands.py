"""What each `minimuse` command does with its options. A command calls the library and prints.

Training and evaluation load slowly, so only the commands that need them import them.
Not here: the options (`cli.py`, which loads this file when a command runs), the page of `minimuse app` (`app.py`).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from minimuse import checkpoint, lab
from minimuse.app import serve
from minimuse.config import PRESETS, from_dict, preset, to_dict
from minimuse.data_captions import Reading
from minimuse.lab_models import muse_settings, open_amused
from minimuse.muse import Muse, text_encoder
from minimuse.pictures import again, difference, open_picture, output_paths, save_png, settings_of, with_settings
from minimuse.plots import film
from minimuse.utils import pick_device, require

SETTINGS = "guidance steps schedule order sampling_temperature choice_temperature".split()  # of a drawing
SETTINGS += "iterations fraction seed negative_prompt".split()
NO_TEXT = "base_sampling.guidance superres_sampling.guidance".split()
NO_TEXT = ["text_encoder=", "edit_guidance=0", *(f"{name}=[0,0]" for name in NO_TEXT)]


def run_draw(args: argparse.Namespace) -> None:
    """Draw with a progress bar, and save the pictures with their settings."""
    draw = _drawing(args)
    paths = output_paths(args.out, args.prompts[0], len(args.prompts) * args.n, film=args.film, force=args.force)
    muse = open_model(args.model or "toy", device=args.device)
    steps = []
    with tqdm(desc="decoding", unit="step", delay=0.1) as bar:  # no bar if it is refused

        def callback(step: Any) -> None:
            bar.set_postfix_str(f"{step.stage}, {int(step.revealed[0].sum())} tokens drawn")
            bar.update()
            if not steps or steps[-1].stage == "base" or steps[-1].masked.any():  # the film shows the first decode only
                steps.append(step)

        images = draw(muse, callback)
    for image, path in zip(images, paths, strict=False):
        save_png(image, path)
        print(f"{path}  ({image.info['minimuse']['prompt']!r}, seed {image.info['minimuse']['seed']})")
    if args.film:
        save_png(with_settings(film(muse, steps), images[0].info["minimuse"]), paths[-1])
        print(paths[-1])
    if getattr(args, "like", None):
        print(f"{args.like}: {difference(open_picture(args.like), images[0])}")


def _drawing(args: argparse.Namespace) -> Callable[..., list]:
    """What a command draws, as a function of a Muse and a callback. --like sets model and prompts in `args`."""
    given = {name: value for name in SETTINGS if (value := getattr(args, name, None)) is not None}
    if getattr(args, "like", None):
        is_plain = not given and args.n == 1 and not args.sampler
        require(is_plain, "--like takes seed and settings from the picture; leave out the other options")
        settings = settings_of(args.like)
        name, args.prompts = settings["model"], [settings["prompt"]]
        known = args.model or name in checkpoint.shipped()
        require(known, f"{args.like} was made by {name!r}, which is not shipped; name its folder with --model")
        args.model = args.model or name
        return lambda muse, callback: [again(muse, settings, callback=callback)]
    inputs = [open_picture(getattr(args, name)) for name in ("image", "mask") if hasattr(args, name)]
    if args.command == "outpaint":
        inputs.append(tuple(args.padding) if len(args.padding) > 1 else args.padding[0])
    inputs.append(args.prompts if args.command == "generate" else args.prompts[0])

    def draw(muse: Any, callback: Callable) -> list:
        settings = muse_settings(muse, args.sampler, args.steps) | given if getattr(args, "sampler", None) else given
        return getattr(muse, args.command)(*inputs, n=args.n, callback=callback, **settings)

    return draw


def baseline(model: str) -> Any:
    """The class of a baseline of `minimuse train --model`."""
    from minimuse.baseline_ar import Autoregressive, LowRes
    from minimuse.baseline_dit import Diffusion

    return {make.model: make for make in (LowRes, Autoregressive, Diffusion)}[model]


def model_class(name: str | Path) -> Any:
    """A shipped name, a folder or a hub id -> Muse, or the class of a baseline."""
    path = checkpoint.find(name) / checkpoint.CONFIG
    require(path.is_file(), f"{path.absolute().parent} holds no {path.name}; give a checkpoint's folder or its name")
    found = re.search('"minimuse-(masked|ar|dit)-1"', path.read_text(encoding="utf-8"))
    return baseline(found[1]) if found else Muse


def open_model(name: str | Path, *, device: Any = None) -> Any:
    """A Muse or a baseline from a shipped name, a folder or a hub id."""
    return model_class(name).from_pretrained(name, device=device)


def run_train(args: argparse.Namespace) -> None:
    """Run all stages with a progress bar each, then save the checkpoint."""
    from minimuse.train import train_muse
    from minimuse.train_engine import Engine, Stopped
    from minimuse.train_log import EVALUATED, add_record
    from minimuse.train_state import data_record, longer, open_run

    args.resume = args.resume or bool(args.more)
    config, source, start = _configuration(args)
    if args.dry_run:
        _dry_run(config, source, args)
        return
    options = {name: getattr(args, name) for name in ("seed", "device", "accumulate", "compile", "recompute", "keep")}
    engine = Engine(folder=args.out, **options)
    engine.check_batches(config.stages)
    run = {"config": to_dict(config), "seed": args.seed, "data": data_record(args.data, source)}
    run |= {"model": args.model} if args.model else {}
    run |= {"start": args.start, "start_fingerprint": start.fingerprint} if start else {}
    if engine.is_main:
        open_run(args.out, run, resume=args.resume, more=args.more or 0)
    config = longer(config, args.more) if args.more else config
    engine.accelerator.wait_for_everyone()
    engine.handle_signals()
    settings = {"stages": baseline(args.model).stages} if args.model else {"start": start}
    progress = train_muse(config, data=source, engine=engine, **settings)
    try:
        for stage, parts in groupby(progress, lambda p: p.stage):
            with tqdm(desc=stage, disable=not engine.is_main) as bar:
                for p in parts:
                    bar.total = p.steps
                    shown = {k: f"{value:.3g}" for k, value in p.metrics.items() if not k.startswith(EVALUATED)}
                    bar.set_postfix(shown, refresh=False)
                    bar.update(p.step - bar.n)
    except Stopped:
        if engine.is_main:
            print(f"minimuse: stopped; continue with: minimuse train --resume --out {args.out}", file=sys.stderr)
        raise SystemExit(128 + engine.signal) from None
    if engine.is_main:
        folder = p.model.save_pretrained(args.out, dtype=torch.float16 if args.half else None, overwrite=True)
        add_record(folder, int(p.metrics["pictures"]), int(p.metrics["captions"]))
        print(f"trained in {p.metrics['minutes']:.1f} minutes: {folder}")
        print(f'try: minimuse generate "{p.model.examples[0]}" --model {folder}')
        if not config.text_encoder:
            print('it has no captions: generate, inpaint and outpaint with the prompt ""; other prompts change nothing')


def _configuration(args: argparse.Namespace) -> tuple[Any, Any, Muse | None]:
    """Configuration and data of a preset, a JSON file, --from or the run to resume, with --set and absolute paths."""
    from minimuse.data_sources import open_source
    from minimuse.train_state import RUN, finetuned, open_start, read_run

    run = read_run(args.out) if args.resume else {"seed": 0, "data": {"source": "scenes"}}
    known = {"seed": run["seed"], "data": run["data"]["source"], "model": run.get("model"), "start": run.get("start")}
    known |= {name: run["data"].get(name) for name in Reading._fields[:4]}
    for name, value in known.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    only_start = not (args.preset or args.model) or not args.start
    require(only_start, "--from and --resume of its run take no preset and no --model; leave them out")
    require(args.start or not args.stages, "--stages needs --from; --set stages.NAME.steps=0 leaves a stage out")
    hint = f"give a preset ({', '.join(PRESETS)}), a JSON file, --from, or --resume"
    require(args.preset or args.resume or args.start, hint)
    file = Path(args.preset or args.out / RUN)
    is_file = args.preset not in PRESETS and file.is_file()
    if args.start and args.start not in checkpoint.shipped() and Path(args.start).is_dir():
        args.start = str(Path(args.start).absolute())
    _, start = open_start(None, args.start) if args.start else (None, None)
    if start and not args.resume:
        config = finetuned(start.config, args.stages or ("base", "superres"))
    else:
        config = checkpoint.read_configuration(file) if is_file else preset(args.preset)
    if args.model and args.preset:
        config = baseline(args.model).configure(config)
    removed = [f"name={config.name}-unconditional", *NO_TEXT] if args.captions and not args.resume else []
    config = changed(config, removed + args.set)
    for name in ("text_encoder", "low_tokenizer_from"):
        place = getattr(config, name)
        if place and Path(place).is_dir():
            config = replace(config, **{name: str(Path(place).absolute())})
    reading = Reading(**{name: value for name in Reading._fields[:4] if (value := getattr(args, name))})
    try:
        return config, open_source(args.data, config, seed=args.seed, reading=reading), start
    except ValueError as error:
        hint = f". If the data of {args.out} moved, give the new place with --data" if args.resume else ""
        raise ValueError(f"{error}{hint}") from error


def changed(config: Any, changes: list[str]) -> Any:
    """A configuration with fields set by "path=value", the value in JSON: "stages.base.steps=500", "name=mine"."""
    values = to_dict(config)
    for change in changes:
        path, equals, value = change.partition("=")
        *parents, last = path.split(".")
        part: Any = values
        for name in parents:
            part = part.get(name) if isinstance(part, dict) else None
        known = equals and isinstance(part, dict) and last in part
        require(known, f"no field {path!r}; give PATH=VALUE with fields of config.json, such as stages.base.steps=500")
        with suppress(ValueError, RecursionError):  # else it is a text
            value = json.loads(value)
        part[last] = value
    return from_dict(values)


def _dry_run(config: Any, source: Any, args: argparse.Namespace) -> None:
    """Print what a run would need. Nothing is written."""
    from minimuse.data_cache import TrainingData
    from minimuse.train_budget import preview, report

    require(not args.model, "--dry-run counts a whole Muse, not a baseline; leave out --model")
    device = pick_device(args.device)
    print(preview(TrainingData(args.out / "cache", source, config, text_encoder(config, device), device=device)))
    ceiling = args.ceiling and args.ceiling * 1e12
    print(report(config, args.accelerators, ceiling=ceiling, memory_gb=args.memory, checkpointing=args.recompute))


def run_average(args: argparse.Namespace) -> None:
    """Average the states of both transformers, or with --from two base models, and save a checkpoint."""
    from minimuse import train_state

    checkpoint.refuse_existing(args.out)
    muse = open_model(args.folder, device="cpu")
    trained = [name for name in ("base", "superres") if name in muse.parts and muse.config.stages[name].steps]
    require(trained, f"{args.folder} trained no transformer; there is nothing to average")
    if args.start:
        train_state.keep_old(muse, open_model(args.start, device="cpu"), args.decay)
        trained = []
    for name in trained:  # others are frozen in fine-tuning, and stay
        states = train_state.states(args.folder / name)
        require(states, f"{args.folder / name} holds no states; `minimuse train` writes them there")
        muse.parts[name].load_state_dict(train_state.average(states, args.decay))
        print(f"{name}: {len(states)} states, steps {int(states[0].name[5:])} to {int(states[-1].name[5:])}")
    print(muse.save_pretrained(args.out, dtype=torch.float16 if args.half else None))


def run_doctor(args: argparse.Namespace) -> None:
    """Print the findings about a run. Exit code 1 if one is wrong."""
    from minimuse.train_doctor import examine, findings_text

    findings = examine(args.folder, args.stage, device=args.device)
    print(findings_text(findings))
    if any(finding.verdict == "wrong" for finding in findings):
        raise SystemExit(1)


def run_reconstruct(args: argparse.Namespace) -> None:
    """Save originals next to their reconstructions, and print what the doctor finds."""
    from minimuse.pictures import read_pictures
    from minimuse.train_doctor import MOST, compare_tokenizers

    (out,) = output_paths(args.out, "reconstruct", 1, force=args.force)
    muse = open_model(args.model, device=args.device).to(dtype=torch.float32)
    sheet, text = compare_tokenizers(muse, read_pictures(args.pictures, muse.config.high_tokenizer.image_size, MOST))
    sheet.save(out)
    print(f"{out}\n{text}")


def run_compare(args: argparse.Namespace) -> None:
    """Print a table, and paired differences from its first sampler. With --out, also write figures and tables."""
    require(args.out is None or not args.out.is_file(), f"--out {args.out} is a file; give a folder")
    if args.muse:
        target = open_model(args.muse, device=args.device)
    elif args.amused:
        samples = args.samples or 512
        target = open_amused(args.amused, args.data, args.clip, device=args.device, samples=samples, seed=args.seed)
    else:
        require(args.world in lab.WORLDS, f"unknown world {args.world!r}; known: {', '.join(lab.WORLDS)}")
        target = lab.WORLDS[args.world]()
    out = None if args.force else args.out  # compare refuses a folder with another report
    first = {"schedule": args.schedule[0], "order": args.order[0]}
    presets = {x: x for x in args.preset} | {f"guidance {g}": first | {"guidance": g} for g in args.guidance}
    settings = {"presets": presets, "samples": args.samples, "seed": args.seed, "out": out}
    report = lab.compare(target, args.schedule, args.order, args.steps, **settings)
    print(report.table())
    if len(args.schedule) * len(args.order) > 1:
        print(f"\ndifference from {args.schedule[0]}, {args.order[0]}; paired, bold where the interval excludes 0")
        print(report.table((args.schedule[0], args.order[0])))
    if args.out:
        print(report.save(args.out) if args.force else args.out)


def run_evaluate(args: argparse.Namespace) -> None:
    """Evaluate a checkpoint and print the report."""
    from minimuse.eval_run import measure

    measure(**{name: value for name, value in vars(args).items() if name != "command"})
    print((args.out / "eval.md").read_text(encoding="utf-8"))


def run_info(args: argparse.Namespace) -> None:
    """Print sizes and sampling defaults of presets and checkpoints."""
    for name in args.names or PRESETS:
        make, path = (Muse, None) if name in PRESETS else (model_class(name), checkpoint.find(name) / checkpoint.CONFIG)
        config = checkpoint.read_configuration(path) if path else preset(name)
        with torch.device("meta"):
            parts = make.build(config)
        counts = {part: sum(p.numel() for p in module.parameters()) / 1e6 for part, module in parts.items()}
        print(f"{name}: {sum(counts.values()):,.1f}M parameters, text from {config.text_encoder or 'nothing'}")
        for part, module in parts.items():
            c = module.config
            if sampling := getattr(config, f"{part}_sampling", None):
                about = f"{c.layers} layers x {c.width}, MLP {c.mlp_width}; {c.grid}x{c.grid} tokens of "
                about += f"{c.codebook_size} codes; {sampling.steps} steps"
            else:
                about = f"{c.image_size} px, f={c.downsampling}"
            print(f"  {part:14} {counts[part]:8,.1f}M  {about}")
    if not args.names:
        print(f"shipped checkpoints: {', '.join(checkpoint.shipped()) or 'none'}")


COMMANDS = {
    **dict.fromkeys(("generate", "inpaint", "outpaint", "edit"), run_draw), "train": run_train, "average": run_average,
    "doctor": run_doctor, "reconstruct": run_reconstruct, "compare": run_compare, "eval": run_evaluate,
    "app": lambda args: serve(args.checkpoint, host=args.host, port=args.port, device=args.device), "info": run_info,
}  # fmt: skip
