"""Does it matter at which rates a model is trained to fill in masks? Densities at equal compute, on nano's base model.

    python benchmarks/training_densities.py [--out runs/densities] [--steps 800] [--seeds 3] [--docs]

Muse 2.6 draws a mask rate for each example, r = curve(u) with u uniform; the curve is the density. Each density trains
nano's base model from nothing, as often as there are seeds, on the same scenes, tokens and texts in the same order.
Judged by what no density is favoured in, both on scenes of split "test":
    bound      nats a token, masks of uniform counts, 8 a scene (`train_log.likelihood_bound`); lower is better
    accuracy   share of sampled pictures with all that is asked for, in 4 and in 16 steps (`lab_models.MuseEvaluator`)
Intervals are 95%, those of test scenes and of training runs added up as independent errors; differences are paired.
Whatever is done is kept in --out and used again. Writes densities.json, .md and .png there, with --docs here as well.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from minimuse import Muse
from minimuse.data_cache import TrainingData
from minimuse.data_sources import SceneDataset, open_source
from minimuse.eval_metrics import Estimate, mean_interval
from minimuse.lab_models import MuseEvaluator
from minimuse.lab_optimum import GROUPS
from minimuse.masking import SCHEDULES, Schedule, sample_mask_rate
from minimuse.text import Context
from minimuse.train import train_transformer
from minimuse.train_engine import Engine, init_from_codebook
from minimuse.train_log import likelihood_bound
from minimuse.train_state import RUN, data_record, open_run
from minimuse.transformer import Transformer
from minimuse.utils import area_downsample, content_hash, seeded_generator, to_float

DENSITIES: dict[str, Schedule] = {
    "cosine (Muse)": SCHEDULES["cosine"],
    "arccos, the other reading": SCHEDULES["arccos"],
    "uniform": SCHEDULES["linear"],
    "15% always (BERT)": lambda u: 0.15,
}
DECODING = (4, 16)
Result = dict[str, list[float]]  # metric -> GROUPS values, as in a cell of the lab


def train(config: Any, name: str, curve: Schedule, corpus: TrainingData, codebook: Any, engine: Engine) -> Transformer:
    """The base model from nothing under a density; goes on with what `engine.folder` holds."""
    SCHEDULES[name] = curve  # so that the stage's configuration can name it
    stage = replace(config.stages["base"], mask_schedule=name, save_every=250, eval_every=10**9)
    torch.manual_seed(engine.seed)
    base = Transformer(config.base)
    init_from_codebook(base, codebook)
    rows = corpus.split(corpus.tokens["low"]), corpus.split(corpus.texts)
    for p in train_transformer(base, stage, *rows, engine=engine):
        if p.step % 100 == 0:
            print(f"  {name}, seed {engine.seed}: step {p.step} of {p.steps}", flush=True)
    return base


def bounder(muse: Muse, samples: int, draws: int = 8, batch: int = 128) -> Callable[[Transformer], list[float]]:
    """-> base model -> GROUPS means of its bound on held-out scenes, the same masks for every model."""
    side, low = (getattr(muse.config, f"{name}_tokenizer").image_size for name in ("high", "low"))
    scenes = SceneDataset(samples, side, "test", seed=1, fractions=muse.config.fractions, k=1)
    images, captions = (
        to_float(area_downsample(scenes.images(), side // low)),
        [scenes.captions(i)[0] for i in range(samples)],
    )
    tokens, texts = torch.cat([muse.low_tokenizer.encode(x) for x in images.split(256)]), muse.encoder.encode(captions)

    @torch.inference_mode()
    def bound(base: Transformer) -> list[float]:
        each = []
        for start in range(0, samples, batch):
            rows = slice(start, start + batch)
            memory = base.memory(Context(texts.embeds[rows], texts.mask[rows]))
            masks = [seeded_generator(start, k) for k in range(draws)]
            found = [likelihood_bound(lambda t, m=memory: base(t, m), tokens[rows], base.mask_id, g) for g in masks]
            each.append(torch.stack(found).mean(0))
        return torch.cat(each).double().view(GROUPS, -1).mean(1).tolist()

    return bound


def study(
    muse: Muse, out: Path, densities: Mapping[str, Schedule], *, steps: int, seeds: int, samples: int
) -> dict[str, list[Result]]:
    """Densities by name, any function of u -> the results of each, seed by seed. What `out` holds is not done again."""
    stage = replace(muse.config.stages["base"], steps=steps)
    config = replace(muse.config, stages={**muse.config.stages, "base": stage})
    engine = Engine(folder=out)
    source, device = open_source("scenes", config), {"device": engine.device, "bf16": engine.bf16}
    corpus = TrainingData(out / "cache", source, config, muse.encoder, **device)
    for work in (corpus.read, lambda: corpus.tokenize("low", muse.low_tokenizer), corpus.embed):
        for done, of in work():
            print(f"  cache: {done} of {of}", flush=True)
    trained = Muse(config, nn.ModuleDict({**muse.parts, "base": Transformer(config.base)}), muse.encoder)
    evaluator, bound, results = (
        MuseEvaluator(trained, samples),
        bounder(muse, samples),
        {name: [] for name in densities},
    )
    shared = {"steps": steps, "samples": samples, "tokens": content_hash(muse.low_tokenizer.state_dict())}
    for seed in range(seeds):  # all densities first, so that a stopped study compares them already
        for name, curve in densities.items():
            folder = out / "runs" / f"{''.join(c for c in name if c.isalnum())}-{seed}"
            about = {**shared, "density": name, "curve": [curve(i / 16) for i in range(17)]}
            run = {"config": about, "seed": seed, "data": data_record("scenes", corpus.source)}
            open_run(folder, run, resume=(folder / RUN).exists())
            path = folder / "result.json"
            if not path.exists():
                engine = Engine(seed=seed, folder=folder, keep=1)
                base = train(config, name, curve, corpus, muse.low_tokenizer.codebook, engine)
                trained.base.load_state_dict(base.state_dict())
                found = {"bound": bound(trained.base)}
                for t in DECODING:
                    groups = evaluator(schedule="cosine", order="confidence", steps=t).groups
                    found |= {f"{measure}@{t}": values for measure, values in groups.items()}
                path.with_suffix(".new").write_text(json.dumps(found), encoding="utf-8")
                path.with_suffix(".new").replace(path)
            results[name].append(json.loads(path.read_text(encoding="utf-8")))
            print(f"{name}, seed {seed}: bound {mean_interval(results[name][-1]['bound']).value:.4f}", flush=True)
    return results


def combined(groups: list[list[float]]) -> Estimate:
    """GROUPS values of each training run -> their mean; test scenes and training runs both may err."""
    values = torch.tensor(groups, dtype=torch.double)  # (seeds, GROUPS)
    found = mean_interval(values.mean(0))
    if len(values) == 1:
        return found
    runs = mean_interval(values.mean(1))
    margin = math.hypot(found.margin, runs.margin)
    return Estimate(found.value, found.value - margin, found.value + margin, found.n)


def versus(results: list[Result], others: list[Result], measure: str) -> Estimate:
    """results - others, run by run and group by group: the same seeds, data order and test scenes."""
    pairs = zip(results, others, strict=True)
    return combined([[x - y for x, y in zip(a[measure], b[measure], strict=True)] for a, b in pairs])


def table(results: dict[str, list[Result]], densities: Mapping[str, Schedule]) -> str:
    """Markdown: a line a density; in bold where it differs from the first one."""
    first, t = next(iter(results.values())), DECODING[-1]
    measures = ("bound", *(f"accuracy@{n}" for n in DECODING), f"frechet@{t}")
    head = ["density", "mean rate"]
    head += [x for m in measures for x in (m, "- cosine")]
    rows = [head, ["---"] * len(head)]
    for name, runs in results.items():
        rate = sum(densities[name]((i + 0.5) / 1000) for i in range(1000)) / 1000
        row = [name, f"{rate:.2f}"]
        for m in measures:
            e, gap = combined([r[m] for r in runs]), versus(runs, first, m)
            shown = f"{gap.value:+.3f} ± {gap.margin:.3f}" if runs is not first else ""
            row += [
                f"{e.value:.3f} ± {e.margin:.3f}",
                f"**{shown}**" if abs(gap.value) > max(gap.margin, 1e-9) else shown,
            ]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def figure(results: dict[str, list[Result]], densities: Mapping[str, Schedule]) -> Figure:
    """Left the densities, then the bound, right the accuracy by decoding steps; 95% bars."""
    drawn = Figure(figsize=(12, 3.8), dpi=120, layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    for i, (name, runs) in enumerate(results.items()):
        rates = sample_mask_rate(20_000, schedule=densities[name], generator=seeded_generator(0))
        left.hist(rates.numpy(), bins=50, range=(0, 1), density=True, histtype="step", color=f"C{i}", label=name)
        e = combined([r["bound"] for r in runs])
        middle.errorbar(i, e.value, e.margin, fmt="o", color=f"C{i}", capsize=4)
        middle.plot([i + 0.15] * len(runs), [mean_interval(r["bound"]).value for r in runs], "_", color=f"C{i}")
        accuracy = [combined([r[f"accuracy@{t}"] for r in runs]) for t in DECODING]
        right.errorbar(
            [t * 1.02**i for t in DECODING],
            [a.value for a in accuracy],
            [a.margin for a in accuracy],
            marker="o",
            color=f"C{i}",
            capsize=3,
        )
    left.set(xlabel="mask rate r", ylabel="density p(r)", yscale="log")
    left.legend(fontsize=7)
    middle.set(ylabel="bound on -log p, nats a token (lower is better)", xticks=[])
    middle.set_xlabel("density, in the legend's order; dashes: single runs")
    right.set(xlabel="decoding steps", ylabel="pictures with all that is asked for", xscale="log")
    right.set_xticks(DECODING, [str(t) for t in DECODING])
    right.minorticks_off()
    return drawn


def write(out: Path, results: dict[str, list[Result]], densities: Mapping[str, Schedule], settings: dict) -> None:
    """densities.json, densities.md, densities.png."""
    runs = len(next(iter(results.values())))
    said = f"{settings['steps']} steps of nano's base model, {runs} runs a density, {settings['samples']} test scenes"
    text = f"# Training densities at equal compute\n\nMade by `python benchmarks/training_densities.py`: {said}.\n\n"
    text += f"{table(results, densities)}\n![Densities, bounds and accuracies](densities.png)\n"
    (out / "densities.md").write_text(text, encoding="utf-8")
    values = {"settings": settings, "torch": str(torch.__version__), "results": results}
    (out / "densities.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
    figure(results, densities).savefig(out / "densities.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/densities"))
    parser.add_argument("--steps", type=int, default=800, help="of training, the same for all (default: 800)")
    parser.add_argument("--seeds", type=int, default=3, help="training runs a density (default: 3)")
    parser.add_argument("--samples", type=int, default=512, help="test scenes, a multiple of 32 (default: 512)")
    parser.add_argument("--own", default="1 - u ** 3", help="a density of your own: r as an expression of u and math")
    parser.add_argument("--docs", action="store_true", help="also write the findings beside this script")
    args = parser.parse_args()
    own = eval(f"lambda u: {args.own}", {"math": math})  # the user's own command line
    densities = {**DENSITIES, f"r = {args.own}": own}
    how = {"steps": args.steps, "seeds": args.seeds, "samples": args.samples}
    results = study(Muse.from_pretrained("nano", device="cpu"), args.out, densities, **how)
    write(args.out, results, densities, how)
    print(table(results, densities))
    if args.docs:
        for name in ("densities.md", "densities.png", "densities.json"):
            shutil.copy(args.out / name, Path(__file__).with_name(name))


if __name__ == "__main__":
    main()
