"""Compare Muse's base model with an autoregressive and a diffusion baseline: accuracy, steps and seconds.

    python benchmarks/race.py [--out runs/race] [--steps 5000] [--scenes 20000] [--n 300] [--parts race,...] [--docs]

All models share the data, the text encoder, the tokenizers (of the shipped nano), the training loop and the optimizer.
Their parameter counts agree within 5%. The base model trains for --steps steps; the others train for as many steps as
make the same FLOPs. All draw 32 px. The prompts are captions of held-out scenes with one object. Each model's guidance
and temperature are the best of six settings on 96 other prompts. Picture i of every point has the same prompt and seed,
so points are compared in pairs.

    race         accuracy and Frechet distance by steps and seconds; also the base model with one token a step
    likelihood   D3PM's bound for the base model, the exact likelihood of the autoregressive one, in nats a token
    identity     residual blocks that start as the identity, or not: in the DiT and in the masked transformer
    stages       two token grids (base, then the shipped super-resolution) against one model of the fine grid at 64 px
    guidance     guidance that rises from 0 to 2t against constant t, for the base model and for the DiT

A stopped race continues where it was. It writes race.json, race.md, race.png and the checkpoints into --out; with
--docs also the first three next to this script. Seconds are measured in batches of 50, with the tokenizer's decoder and
without the language model. Run it on an idle machine.
"""

import argparse
import json
import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from timing import machine, markdown, save
from torch import Tensor, nn

from minimuse import Muse
from minimuse.baseline_ar import Autoregressive, CausalTransformer, LowRes, NextTokenLoss, train_ar
from minimuse.baseline_dit import Diffusion, latents, train_dit
from minimuse.config import MuseConfig
from minimuse.data_cache import Decimated, TrainingData
from minimuse.data_sources import SceneDataset, open_source
from minimuse.eval_metrics import Estimate, frechet_interval, mean_interval, paired_difference, proportion_interval
from minimuse.eval_networks import Detector
from minimuse.eval_prompts import matches, parse_prompt
from minimuse.muse import build
from minimuse.plots import grid, tradeoff
from minimuse.text import Context, pad_contexts
from minimuse.train import MaskedLoss, train_transformer
from minimuse.train_budget import count_flops
from minimuse.train_engine import Engine, init_from_codebook
from minimuse.train_log import likelihood_bound
from minimuse.transformer import RESIDUAL_OUTPUTS
from minimuse.utils import area_downsample, atomic_write, seeded_generator, to_float

PARTS = ("race", "likelihood", "identity", "stages", "guidance")
MAKES = (LowRes, Autoregressive, Diffusion)  # "masked", "ar", "dit"
STEPS = (1, 2, 4, 8, 16, 32, 64)
SEED = 1000  # pictures draw with SEED + i; tuning with seeds from 0, on prompts of its own
TUNE = {  # six settings each
    "masked": [{"guidance": (0.0, t), "sampling_temperature": x} for t in (1.0, 2.0, 4.0) for x in (0.7, 1.0)],
    "ar": [{"guidance": t, "sampling_temperature": x} for t in (0.0, 1.0, 2.0) for x in (0.7, 1.0)],
    "dit": [{"guidance": t} for t in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)],
}
FINE = {"guidance": (1.0, 3.0), "sampling_temperature": 0.4, "choice_temperature": 0.5}  # nano's own super-resolution
TUNING_STEPS = {"masked": {"steps": 16}, "ar": {}, "dit": {"steps": 32}}


def open_gates(dit: nn.Module) -> None:
    """Before training: the blocks of a DiT write from the start, as Muse's layers do."""
    for name, p in dit.named_parameters():
        if name.endswith(RESIDUAL_OUTPUTS):
            nn.init.normal_(p, std=(2 * len(dit.layers) * p.shape[1]) ** -0.5)
    for block in dit.layers:
        block.condition.bias.data.view(6, -1)[[2, 5]] = 1.0


class Entrant(NamedTuple):
    """A model that is trained: its class, its configuration, and a change of its fresh weights."""

    make: type[LowRes]
    config: MuseConfig
    change: Callable[[nn.Module], Any] = lambda model: model


def zero_init_residual(model: nn.Module) -> nn.Module:
    """Before training: residual blocks start as the identity (DiT), in Muse's transformers too. Returns the model."""
    for name, weight in model.named_parameters():
        if name.endswith(RESIDUAL_OUTPUTS):
            nn.init.zeros_(weight)
    return model


class Point(NamedTuple):
    """A model and how it draws."""

    entrant: str
    sampling: dict[str, Any]


class Race:
    """What all entrants share, and what is kept of each in `out`."""

    def __init__(
        self,
        out: Path,
        steps: int,
        n: int,
        *,
        scenes: int = 20_000,
        real: int = 1000,
        tuning: int = 96,
        batch: int = 50,
        nano: Muse | None = None,
    ):
        self.out, self.steps, self.n, self.tuning, self.batch = out, steps, n, tuning, batch
        self.train_scenes = scenes
        self.nano = nano or Muse.from_pretrained("nano", device="cpu", dtype=torch.float32)
        self.config, self.detector, self.muses = self.nano.config, Detector.from_pretrained(), {}
        self.scenes = SceneDataset(max(n, real) + tuning, self.config.high_tokenizer.image_size, "test", 1, (1, 0, 0))
        self.real = self.scenes.images(range(max(n, real)))
        masked, ar, dit = (Entrant(make, make.configure(self.config)) for make in MAKES)
        self.entrants = {
            "masked": masked,
            "ar": ar,
            "dit": dit,
            "masked, identity": masked._replace(change=zero_init_residual),
            "dit, open gates": dit._replace(change=open_gates),
            "one stage": Entrant(LowRes, one_stage(self.config)),
        }

    # --- training -----------------------------------------------------------------------------------------------------

    @cached_property
    def corpus(self) -> TrainingData:
        """Scenes as nano's, the tokens of its own tokenizers, its captions' embeddings: computed once."""
        config = replace(self.config, scenes=self.train_scenes)
        source = open_source("scenes", config, seed=0)
        corpus = TrainingData(self.out / "cache", source, config, self.nano.encoder)
        for work in (
            corpus.read(),
            corpus.tokenize("low", self.nano.low_tokenizer),
            corpus.tokenize("high", self.nano.high_tokenizer),
            corpus.embed(),
        ):
            deque(work, maxlen=0)
        return corpus

    def flops(self, name: str) -> int:
        """Of one example's forward and backward pass."""
        return flops(*self.entrants[name][:2])

    def train_steps(self, name: str) -> int:
        """As many as make the FLOPs of --steps steps of the base model; "one stage" has super-resolution's as well."""
        total = self.steps * self.flops("masked")
        if name == "one stage":
            stage = self.config.stages["superres"]
            total += stage.steps * stage.batch / self.config.stages["base"].batch * superres_flops(self.config)
        return max(1, round(total / self.flops(name)))

    def muse(self, name: str) -> Muse | LowRes:
        """A trained entrant; its training goes on where it was stopped."""
        if name == "two stages":
            parts = {**self.nano.parts, "base": self.muse("masked").base}
            return Muse(self.config, nn.ModuleDict(parts).eval(), self.nano.encoder)
        if name not in self.muses:
            make, config, change = self.entrants[name]
            slug = name.replace(", ", "-").replace(" ", "-")
            torch.manual_seed(0)
            parts = make.build(config)
            change(parts["base"])
            parts["low_tokenizer"] = self.nano.high_tokenizer if name == "one stage" else self.nano.low_tokenizer
            watched(self.training(name, parts, Engine(device="cpu", folder=self.out / "runs" / slug)), name)
            self.muses[name] = make(config, parts, self.nano.encoder, examples=self.corpus.words()["examples"])
            self.muses[name].save_pretrained(self.out / "checkpoints" / slug, overwrite=True)
        return self.muses[name]

    def training(self, name: str, parts: nn.ModuleDict, engine: Engine) -> Any:
        """-> the steps of an entrant's training."""
        make, config, _ = self.entrants[name]
        stage = replace(config.stages["base"], steps=self.train_steps(name), eval_every=10**9)
        texts = self.corpus.split(self.corpus.texts)
        if make is Diffusion:
            images = Decimated(self.corpus.split(self.corpus.images), self.factor)
            return train_dit(parts["base"], stage, latents(parts["low_tokenizer"], images), texts, engine=engine)
        init_from_codebook(parts["base"], parts["low_tokenizer"].codebook)
        tokens = self.corpus.split(self.corpus.tokens["high" if name == "one stage" else "low"])
        train = train_ar if make is Autoregressive else train_transformer
        return train(parts["base"], stage, tokens, texts, engine=engine)

    @property
    def factor(self) -> int:
        return self.config.high_tokenizer.image_size // self.config.low_tokenizer.image_size

    # --- drawing ------------------------------------------------------------------------------------------------------

    def prompts(self, tuning: bool = False) -> list[str]:
        first = len(self.real) if tuning else 0
        return [self.scenes.captions(first + i, 1)[0] for i in range(self.tuning if tuning else self.n)]

    def measure(self, point: Point, tuning: bool = False) -> dict[str, Tensor]:
        """-> right, clear (n,), detector's features (n, D), seconds a picture of each batch; kept in `out`."""
        label = " ".join([point.entrant, *(f"{k}={v}" for k, v in point.sampling.items()), "tuning" * tuning])
        path = (
            self.out
            / "points"
            / f"{''.join(c if c.isalnum() or c in '.=' else '-' for c in label.strip())}.safetensors"
        )
        if path.exists() and len((kept := load_file(path))["right"]) == (self.tuning if tuning else self.n):
            return kept
        muse, prompts, seed = self.muse(point.entrant), self.prompts(tuning), 0 if tuning else SEED
        self.nano.encoder.encode(prompts)  # the language model keeps what it has read
        muse.generate(prompts[: self.batch], seed=seed, batch_size=self.batch, **point.sampling)  # the first is slow
        images, seconds = [], []
        for i in range(0, len(prompts), self.batch):
            few, began = prompts[i : i + self.batch], time.perf_counter()
            images += muse.generate(few, seed=seed + i, batch_size=self.batch, **point.sampling)
            seconds.append((time.perf_counter() - began) / len(few))
        found = self.read(images, prompts) | {"seconds": torch.tensor(seconds)}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, partial(save_file, found))
        if not tuning:
            marks = [f"{p}{'' if ok else '  WRONG'}" for p, ok in zip(prompts, found["right"].tolist(), strict=True)]
            grid(images[:24], marks[:24], columns=8).save(path.with_suffix(".png"))
        return found

    def read(self, images: Any, prompts: list[str]) -> dict[str, Tensor]:
        readings, wants = self.detector.detect(images), [parse_prompt(p) for p in prompts]
        found = {
            name: torch.tensor([matches(r, w, min_confidence=sure).right for r, w in zip(readings, wants, strict=True)])
            for name, sure in (("right", 0.0), ("clear", 0.5))
        }
        return found | {"features": self.detector.features(images)}

    def tuned(self, entrant: str) -> dict[str, Any]:
        """The best of six by the share that is clearly right; the first where several are."""
        model = self.entrants[entrant].make.model
        trials = [Point(entrant, how | TUNING_STEPS[model]) for how in TUNE[model]]
        shares = [self.measure(p, tuning=True)["clear"].float().mean().item() for p in trials]
        return TUNE[model][shares.index(max(shares))]

    def figures(self, point: Point | None, side: int) -> dict[str, Estimate]:
        """Measured of a point, or of what the low tokenizer makes of real scenes; `side` of the real ones in pixels."""
        real = area_downsample(self.real, self.config.high_tokenizer.image_size // side)
        found = self.ceiling() if point is None else self.measure(point)
        result = {name: proportion_interval(found[name].bool()) for name in ("right", "clear")}
        result["frechet"] = frechet_interval(self.detector.features(real), found["features"])
        return result if point is None else result | {"seconds": mean_interval(found["seconds"])}

    def ceiling(self) -> dict[str, Tensor]:
        images, tokenizer = to_float(area_downsample(self.real[: self.n], self.factor)), self.nano.low_tokenizer
        with torch.inference_mode():
            again = torch.cat([tokenizer.decode(tokenizer.encode(x)) for x in images.split(64)])
        return self.read(again, self.prompts())

    # --- likelihood ---------------------------------------------------------------------------------------------------

    def nats(self, name: str, draws: int = 64) -> Estimate:
        """Held-out pictures in nats a token: D3PM's bound, mean of so many draws each; of "ar" the exact figure."""
        model, corpus = self.muse(name).base, self.corpus
        tokens, texts = (corpus.split(r, held_out=True) for r in (corpus.tokens["low"], corpus.texts))
        with torch.inference_mode():
            at = torch.arange(len(tokens))
            x, memory = tokens[at], model.memory(pad_contexts([t.float() for t in texts.pick(at, [0.0] * len(at))]))
            if isinstance(model, CausalTransformer):
                nll = -model(x, memory).log_softmax(-1).gather(-1, x[..., None])[..., 0].mean(1)
                return mean_interval(nll)
            seeds = [[seeded_generator(k, i) for i in at.tolist()] for k in range(draws)]
            bounds = [likelihood_bound(lambda t: model(t, memory), x, model.mask_id, g) for g in seeds]
            return mean_interval(torch.stack(bounds).mean(0))


def one_stage(config: MuseConfig) -> MuseConfig:
    """A masked transformer of the fine grid from the text alone, with the parameters of base and super-resolution."""
    config, layers = LowRes.configure(config), config.base.layers + config.superres.layers + config.superres.low_layers
    high, sr = config.finetuned_tokenizer, config.superres
    base = replace(config.base, grid=sr.grid, block=sr.block, codebook_size=sr.codebook_size, layers=layers)
    low = {"low_grid": sr.grid, "low_codebook_size": sr.codebook_size}
    return replace(config, name="one stage", low_tokenizer=high, base=base, superres=replace(sr, **low))


def flops(make: type[LowRes], config: MuseConfig, text_tokens: int = 16) -> int:
    """Forward and backward pass of one example with the model's own loss."""
    with torch.device("meta"):
        model = make.network(config)
        context = Context(
            torch.zeros(1, text_tokens, config.base.text_width), torch.ones(1, text_tokens, dtype=torch.bool)
        )
        if make is Diffusion:
            z = torch.zeros(1, len(model.mean), config.low_tokenizer.grid, config.low_tokenizer.grid)
            step = torch.zeros(1, dtype=torch.long)
            return count_flops(lambda: (model(z, model.memory(context), step).sum() / z.numel()).backward())
        x = torch.zeros(1, config.base.tokens, dtype=torch.long)
        if make is Autoregressive:
            return count_flops(lambda: NextTokenLoss(model)(x, context).backward())
        return count_flops(lambda: MaskedLoss(model)(x, x == 0, context, None, x.numel())[0].backward())


def superres_flops(config: MuseConfig, text_tokens: int = 16) -> int:
    with torch.device("meta"):
        model = build(config)["superres"]
        context = Context(
            torch.zeros(1, text_tokens, config.base.text_width), torch.ones(1, text_tokens, dtype=torch.bool)
        )
        x, low = (torch.zeros(1, c.tokens, dtype=torch.long) for c in (config.superres, config.base))
        loss = MaskedLoss(model, (lambda low: x) if config.superres.draft else None)
        return count_flops(lambda: loss(x, x == 0, context, low, x.numel())[0].backward())


def watched(run: Any, name: str) -> None:
    from tqdm import tqdm

    with tqdm(desc=f"train {name}") as bar:
        for p in run:
            bar.total = p.steps
            bar.update(p.step - bar.n)
            bar.set_postfix({k: f"{v:.3g}" for k, v in p.metrics.items()}, refresh=False)


# --- what is measured and told ----------------------------------------------------------------------------------------


def plain(found: Any) -> Any:
    """Figures as JSON values."""
    if isinstance(found, Estimate):
        return {k: v for k, v in found._asdict().items() if k != "shown"}
    return {k: plain(v) for k, v in found.items()} if isinstance(found, dict) else found


COLUMNS = {  # heading: of which figure, times what, shown how
    "all right": ("right", 1, ".1%"),
    "clear": ("clear", 1, ".1%"),
    "Frechet distance": ("frechet", 1, ".3f"),
    "ms a picture": ("seconds", 1000, ".1f"),
}
TITLES = {
    "race": "The race",
    "likelihood": "Likelihood",
    "identity": "Residual blocks that start as the identity, or not",
    "stages": "Two stages or one",
    "guidance": "Rising or constant guidance",
}
NOTES = {  # what stands under a title
    "race": """\
Each row is a model with a number of sampling steps. "right": all objects of the prompt are there, with the right
attributes. "clear": right, and the detector is at least half sure of it. The DiT needs fewer channels, because its
adaptive norms take parameters too, and trains for more steps with the same FLOPs.

The DiT predicts velocity with cosine noise levels. In an earlier run of 2,000 steps on nano's latents it drew 91% of 96
pictures right. Noise prediction with DDPM's linear levels reached 53%, velocity with linear levels 75%. With 5,000
training scenes instead of 20,000 the autoregressive model overfits: 78% of 96 pictures right.
""",
    "likelihood": """\
The masked model has only an upper bound, the mean over all orders of revealing tokens (D3PM). The autoregressive model
has one order and an exact likelihood.
""",
    "identity": """\
"masked, identity" is the base model with `zero_init_residual`. "dit, open gates" is the DiT with gates that
start at 1 instead of 0.
""",
    "stages": """\
"one stage" is one masked transformer of the 16x16 grid, with the parameters and the training FLOPs of both stages.
""",
    "guidance": """\
"0 to 2" is guidance that rises linearly from 0 to 2; it is paired with its mean, a constant 1.
""",
}


def cell(found: Estimate, times: float, shown: str) -> str:
    value, low, high = (f"{times * x:{shown}}" for x in (found.value, found.low, found.high))
    return f"{value} ({low.removesuffix('%')} to {high.removesuffix('%')})"


def figures_table(found: dict[str, dict[str, Estimate]]) -> str:
    rows = [[name, *(cell(f[c], *how) if c in f else "" for c, *how in COLUMNS.values())] for name, f in found.items()]
    return markdown(["", *COLUMNS], rows)


def entrants_table(race: Race, names: list[str]) -> str:
    rows = []
    for name in names:
        config, steps = race.entrants[name].config, race.train_steps(name)
        network = race.muse(name).base
        size = sum(p.numel() for p in network.parameters())
        total = steps * config.stages["base"].batch * race.flops(name)
        rows.append(
            [name, f"{size:,}", f"{network.config.layers} x {network.config.width}", f"{steps:,}", f"{total:.3g}"]
        )
    return markdown(["", "parameters", "layers x width", "training steps", "training FLOPs"], rows)


def paired(race: Race, pairs: dict[str, tuple[Point, Point]]) -> tuple[str, dict[str, Estimate]]:
    """Point against point on the same prompts and seeds: the difference of what is right, first less second."""
    found = {
        f"{name}: {kind}": paired_difference(*(race.measure(p)[kind].bool() for p in pair))
        for name, pair in pairs.items()
        for kind in ("right", "clear")
    }
    return markdown(["difference, in points", ""], [[k, cell(v, 100, "+.1f")] for k, v in found.items()]), found


def run_race(race: Race) -> tuple[str, dict[str, Any]]:
    points: dict[str, dict[str, Point]] = {"masked": {}, "ar": {}, "dit": {}, "masked, raster": {}}
    best = {name: race.tuned(name) for name in ("masked", "ar", "dit")}
    for name in ("masked", "dit"):
        points[name] = {str(t): Point(name, best[name] | {"steps": t}) for t in STEPS}
    tokens = race.config.base.tokens
    points["ar"] = {str(tokens): Point("ar", best["ar"])}
    raster = {"steps": tokens, "order": "raster", "choice_temperature": 0.0}
    points["masked, raster"] = {str(tokens): Point("masked", best["masked"] | raster)}
    side = race.config.low_tokenizer.image_size
    found = {name: {t: race.figures(p, side) for t, p in row.items()} for name, row in points.items()}
    plots = []
    for measure, lower, label in (("right", False, "everything right"), ("frechet", True, "Frechet distance")):
        series = {name: {t: (f["seconds"], f[measure]) for t, f in row.items()} for name, row in found.items()}
        plots.append(tradeoff(series, "seconds a picture", label, lower=(True, lower), log_x=True))
    grid(plots, columns=2, scale=1).save(race.out / "race.png")
    top = {n: max(row, key=lambda t, row=row: found[n][t]["clear"].value) for n, row in points.items()}
    pairs = {
        f"{n} ({top[n]} steps) - masked ({top['masked']})": (points[n][top[n]], points["masked"][top["masked"]])
        for n in ("ar", "dit", "masked, raster")
    }
    flat = {f"{name}, {t} steps": f for name, row in found.items() for t, f in row.items()}
    flat["real scenes through the tokenizer"] = race.figures(None, side)
    told, gaps = paired(race, pairs)
    text = [entrants_table(race, ["masked", "ar", "dit"]), figures_table(flat), told]
    text.append(
        "Sampling, the best of six on other prompts: " + "; ".join(f"{n} {how}" for n, how in best.items()) + "\n"
    )
    return "\n".join(text), {"figures": flat, "differences": gaps, "sampling": best}


def run_likelihood(race: Race) -> tuple[str, dict[str, Any]]:
    found = {"masked (an upper bound)": race.nats("masked"), "ar (exact)": race.nats("ar")}
    return markdown(["", "nats a token"], [[k, cell(v, 1, ".3f")] for k, v in found.items()]), found


def run_identity(race: Race) -> tuple[str, dict[str, Any]]:
    points = {
        name: Point(name, race.tuned(name.split(",")[0]) | {"steps": steps})
        for name, steps in (("masked", 16), ("masked, identity", 16), ("dit", 32), ("dit, open gates", 32))
    }
    found = {name: race.figures(p, race.config.low_tokenizer.image_size) for name, p in points.items()}
    pairs = {
        "masked, identity - masked": ("masked, identity", "masked"),
        "dit - dit, open gates": ("dit", "dit, open gates"),
    }
    told, gaps = paired(race, {k: (points[a], points[b]) for k, (a, b) in pairs.items()})
    nats = {name: race.nats(name) for name in ("masked", "masked, identity")}
    bounds = markdown(["", "bound, nats a token"], [[k, cell(v, 1, ".3f")] for k, v in nats.items()])
    text = [entrants_table(race, list(points)), figures_table(found), told, bounds]
    return "\n".join(text), {"figures": found, "differences": gaps, "bounds": nats}


def run_stages(race: Race) -> tuple[str, dict[str, Any]]:
    how = race.tuned("masked")
    points = {
        "two stages, 16 + 16 steps": Point("two stages", how | {"steps": 16, "superres": FINE | {"steps": 16}}),
        "two stages, 16 + 4 steps": Point("two stages", how | {"steps": 16, "superres": FINE | {"steps": 4}}),
        "one stage, 16 steps": Point("one stage", how | {"steps": 16}),
        "one stage, 32 steps": Point("one stage", how | {"steps": 32}),
    }
    found = {name: race.figures(p, race.config.high_tokenizer.image_size) for name, p in points.items()}
    first, _, one, long = points.values()
    told, gaps = paired(race, {"one stage, 16 - two": (one, first), "one stage, 32 - two": (long, first)})
    return "\n".join([entrants_table(race, ["one stage"]), figures_table(found), told]), {
        "figures": found,
        "differences": gaps,
    }


def run_guidance(race: Race) -> tuple[str, dict[str, Any]]:
    points, pairs = {}, {}
    for name, steps in (("masked", 16), ("dit", 32)):
        rest = {k: v for k, v in race.tuned(name).items() if k != "guidance"} | {"steps": steps}
        for t in (1.0, 2.0, 4.0):
            rising, constant = f"{name}, 0 to {2 * t:g}", f"{name}, {t:g}"
            points[rising] = Point(name, rest | {"guidance": (0.0, 2 * t)})
            points[constant] = Point(name, rest | {"guidance": t})
            pairs[f"{rising} - {constant}"] = (points[rising], points[constant])
    found = {name: race.figures(p, race.config.low_tokenizer.image_size) for name, p in points.items()}
    told, gaps = paired(race, pairs)
    return "\n".join([figures_table(found), told]), {"figures": found, "differences": gaps}


RUN = {"race": run_race, "likelihood": run_likelihood, "identity": run_identity, "stages": run_stages}
RUN |= {"guidance": run_guidance}


def run(race: Race, parts: list[str]) -> dict[str, Any]:
    """One part after the other; race.json and race.md hold what is done so far."""
    settings = {"steps": race.steps, "scenes": race.train_scenes, "n": race.n, "seed": SEED}
    path = race.out / "race.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"settings": settings, "parts": {}}
    if report["settings"] != settings:
        raise SystemExit(f"{race.out} holds a race of {report['settings']}, not {settings}; give another --out")
    for part in parts:
        text, found = RUN[part](race)
        report["machine"] = machine(torch.device("cpu"))
        report["parts"][part] = {"text": text, "found": json.loads(json.dumps(plain(found)))}
        save(race.out, "race", report, page(report))
        print(f"## {part}\n\n{text}", flush=True)
    return report


def page(report: dict[str, Any]) -> str:
    at, how = report["machine"], report["settings"]
    head = (
        f"Made by `python benchmarks/race.py` with {how['scenes']:,} training scenes, {how['steps']:,} training steps "
        f"of the base model and {how['n']} pictures a point. Intervals are of 95%. Milliseconds are measured on "
        f"{at['device']}, {at['threads']} threads, torch {at['torch']}.\n"
    )
    done = [name for name in PARTS if name in report["parts"]]
    parts = [f"## {TITLES[name]}\n\n{NOTES[name]}\n{report['parts'][name]['text']}" for name in done]
    return "\n".join(["# Muse, diffusion and autoregression compared\n", head, *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/race"))
    parser.add_argument("--steps", type=int, default=5000, help="of the base model; the others' follow")
    parser.add_argument("--scenes", type=int, default=20_000, help="to train on")
    parser.add_argument("--n", type=int, default=300, help="pictures a point")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated (default: {','.join(PARTS)})")
    parser.add_argument("--docs", action="store_true", help="also write the findings beside this script")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        raise SystemExit(f"unknown parts {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    run(Race(args.out, args.steps, args.n, scenes=args.scenes), args.parts.split(","))
    if args.docs:
        for name in ("race.json", "race.md", "race.png"):
            shutil.copy(args.out / name, Path(__file__).parent)


if __name__ == "__main__":
    main()
