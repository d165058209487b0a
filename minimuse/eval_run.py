"""`minimuse eval`: draw the pictures of tasks, measure them, write a report. A sweep is Muse's figure 8 at small scale.

A task draws variants of each picture: "" is the result, "real" a render of a scene that fits the prompt. The method of
EvalModel with the task's name draws them, or `prompts`. The folder gets settings.json (other settings need another
folder), eval.json and eval.md (metrics with 95% intervals), tasks/NAME.json and .png (the values of every picture; the
first pictures), and sweep-*.png (trade-offs). A stopped evaluation continues after its last finished task.

Images are uint8, (B, 3, H, W). Not here: prompts and what they mean (`eval_prompts.py`), metrics (`eval_metrics.py`).
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import minimuse
from minimuse import checkpoint, eval_metrics, train_state, utils
from minimuse.data_scenes import Scene, render
from minimuse.editing import edit_tokens, inpaint_tokens, tokenize
from minimuse.eval_metrics import Estimate, proportion_interval, summarize
from minimuse.eval_networks import FIELDS, Detector, SceneClip
from minimuse.eval_prompts import PROMPT_SETS, EvalPrompt, matches, parse_prompt, prompt_set
from minimuse.muse import Muse
from minimuse.plots import grid, tradeoff
from minimuse.sampler import ORDERS, Step
from minimuse.utils import OneSeed, Rule, area_downsample, atomic_write, check, require, to_float, to_pil, to_uint8
from minimuse.vqgan import VQGAN

FIRST = 24  # pictures of a task that are shown
ITERATIONS = (10, 30, 100)  # of a mask-free edit: after these, pictures are measured
COLUMNS = {"right": "all right", "clear": "clear", "frechet": "Frechet", "score": "CLIP-like", "diversity": "diversity"}
TASKS = (*(name for name in PROMPT_SETS if name != "mixed"), "superres", "tokenizers", "decoder")
BASE_TASKS = TASKS[:6]  # those of the base model alone
COPIES = {"superres": ("true", "true bicubic", "true tokenizer"), "tokenizers": ("", "low"), "decoder": ("", "before")}
PAIRED = {"superres": {"true": "true bicubic", "": "bicubic"}, "decoder": {"": "before"}}  # variant -> less which one
SWEEP: dict[str, dict[str, dict[str, Any]]] = {  # line of the plot -> point -> settings of the base model
    "guidance": {f"{t}": {"guidance": float(t)} for t in (0, 1, 2, 4, 8)},
    "rising guidance": {f"0-{t}": {"guidance": (0.0, float(t))} for t in (1, 2, 4, 8, 16)},
    "temperature": {f"{t}": {"sampling_temperature": t} for t in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)},
    "steps": {f"{t}": {"steps": t} for t in (2, 4, 8, 16, 32)},
    "order": {name: {"order": name} for name in ORDERS},
}
Values = dict[str, list[Any]]  # "right, real" -> one value per picture: bool, number or text
Variants = dict[str, Tensor]
Metrics = dict[str, Estimate]
Asked = Sequence[EvalPrompt]
Seeds = Iterable[int]
Pictures = Annotated[int, Rule(lambda n: 10 <= n <= 10**6, "at least 10 pictures, for the intervals, at most 10**6")]
BatchSize = Annotated[int, Rule(lambda n: 1 <= n <= 1000, "a whole number from 1 to 1,000")]


class Batch(NamedTuple):
    """What is kept of measured pictures."""

    values: Values
    features: Variants  # (B, D), by metric and variant: "frechet, real"
    images: Tensor  # the variants of full size, side by side


class EvalModel:
    """A Muse that draws the tasks: prompts, a seed each -> variants. Any object with these methods can take its place.

    `before` is the high tokenizer before its decoder was fine-tuned. With `base_only`, pictures are the base model's.
    """

    def __init__(self, muse: Muse, *, before: VQGAN | None = None, base_only: bool = False):
        self.muse, self.before, self.base_only = muse, before, base_only
        self.side = muse.config.high_tokenizer.image_size

    def real(self, scenes: Iterable[Scene]) -> Tensor:
        """Renders of scenes, at the size of the model's pictures."""
        images, small = to_uint8(render([*scenes], self.side)), self.muse.config.low_tokenizer.image_size
        return area_downsample(images, self.side // small) if self.base_only else images

    def draw(self, prompts: Sequence[str], seeds: Seeds, negatives: Sequence[str] = (), **sampling) -> Tensor:
        """Prompts, with a seed and perhaps a negative prompt each -> images."""
        decode = self.muse.decode_base if self.base_only else self.muse.decode
        return self._images(decode(_jobs(prompts, seeds, negatives), **sampling))

    def prompts(self, asked: Asked, seeds: Seeds, **sampling) -> Variants:
        """Pictures of prompts."""
        return {"": self.draw([ask.prompt for ask in asked], seeds, **sampling)}

    def negative(self, asked: Asked, seeds: Seeds) -> Variants:
        """Each prompt guided away from the same prompt with one more word; "without" that, and "unguided".

        Choice: a negative prompt repeats the prompt ("a red metal cube"), so l_c - l_u holds only the word.
        """
        prompts, away = [ask.prompt for ask in asked], [ask.negative_prompt for ask in asked]
        unguided = {"guidance": 0.0} if self.base_only else {"guidance": 0.0, "superres": {"guidance": 0.0}}
        variants = {"unguided": self.draw(prompts, seeds, **unguided), "without": self.draw(prompts, seeds)}
        return variants | {"": self.draw(prompts, seeds, away)}

    def edit(self, asked: Asked, seeds: Seeds) -> Variants:
        """A thing's color changed without a mask: base images (small) after some iterations, and the end."""
        before, jobs = self.real(ask.before for ask in asked), _jobs([ask.prompt for ask in asked], seeds)
        steps = [*edit_tokens(self.muse, tokenize(self.muse, *to_pil(before)), jobs, iterations=ITERATIONS[-1])]
        stages = {f"{i}": self._images([steps[i - 1]]) for i in ITERATIONS}
        return {"before": before, **stages, "": self._images(steps)}

    def outpaint(self, asked: Asked, seeds: Seeds) -> Variants:
        """The window half beyond the right edge, as `Muse.outpaint` fills it."""
        known = self.real(ask.before for ask in asked)[..., self.side // 2 :]
        before = torch.cat([known, known[..., -1:].expand_as(known)], 3)
        return self.inpaint(asked, seeds, before)

    def inpaint(self, asked: Asked, seeds: Seeds, before: Tensor | None = None) -> Variants:
        """The region of each picture drawn again, and the pixels outside kept."""
        before = self.real(ask.before for ask in asked) if before is None else before
        at = (torch.arange(self.side) + 0.5) / self.side
        left, top, right, bottom = torch.tensor([ask.region for ask in asked]).T[..., None]
        region = ((at > top) & (at < bottom))[:, :, None] & ((at > left) & (at < right))[:, None]  # (B, H, W)
        tokens, jobs = tokenize(self.muse, *to_pil(before)), _jobs([ask.prompt for ask in asked], seeds)
        made = self._images(inpaint_tokens(self.muse, tokens, region, jobs))
        return {"before": before, "": torch.where(region[:, None], made, before)}

    def superres(self, asked: Asked, seeds: Seeds) -> Variants:
        """Super-resolution and bicubic enlargement, from the base model's tokens and from "true" ones of real renders.

        "no text": super-resolution that does not see it. "true tokenizer": the renders reconstructed, a limit.
        """
        jobs = _jobs([ask.prompt for ask in asked], seeds)
        *_, base = self.muse.decode_base(jobs)
        low, high = tokenize(self.muse, *to_pil(self.real(ask.scene for ask in asked)))
        without_text = self.muse.decode_superres(jobs, base.tokens, guidance=-1.0)  # l_c - (l_c - l_u) = l_u
        return {
            "bicubic": self._bicubic(base.tokens),
            "": self._images(self.muse.decode_superres(jobs, base.tokens)),
            "no text": self._images(without_text),
            "true": self._images(self.muse.decode_superres(jobs, low)),
            "true bicubic": self._bicubic(low),
            "true tokenizer": _decoded(self.muse.high_tokenizer, high),
        }

    def tokenizers(self, asked: Asked, seeds: Seeds) -> Variants:
        """Real renders through both tokenizers: an upper limit for every model that uses them."""
        low, high = tokenize(self.muse, *to_pil(self.real(ask.scene for ask in asked)))
        return {"low": _decoded(self.muse.low_tokenizer, low), "": _decoded(self.muse.high_tokenizer, high)}

    def decoder(self, asked: Asked, seeds: Seeds) -> Variants:
        """Real renders through the high tokenizer, before and after its fine-tuning."""
        _, tokens = tokenize(self.muse, *to_pil(self.real(ask.scene for ask in asked)))
        return {"before": _decoded(self.before, tokens), "": _decoded(self.muse.high_tokenizer, tokens)}

    def _bicubic(self, low: Tensor) -> Tensor:
        images = to_float(_decoded(self.muse.low_tokenizer, low))
        return to_uint8(F.interpolate(images, size=(self.side, self.side), mode="bicubic"))

    def _images(self, steps: Iterable[Step]) -> Tensor:
        *_, step = steps
        return _decoded(self.muse.low_tokenizer if step.stage == "base" else self.muse.high_tokenizer, step.tokens)


@torch.inference_mode()
def _decoded(tokenizer: VQGAN, tokens: Tensor) -> Tensor:
    return to_uint8(tokenizer.decode(tokens)).cpu()


def _jobs(prompts: Sequence[str], seeds: Seeds, negatives: Sequence[str] = ()) -> list[dict[str, Any]]:
    """As `Muse.jobs`, without its hints about unfamiliar words, which the set paraphrases is made of."""
    rows = zip(prompts, negatives or [None] * len(prompts), seeds, strict=True)
    return [{"prompt": prompt, "negative_prompt": negative, "seed": seed} for prompt, negative, seed in rows]


class Evaluator:
    """Measures pictures with two networks: the detector and SceneClip."""

    def __init__(self, detector: Detector | None = None, clip: SceneClip | None = None):
        self.detector = detector or Detector.from_pretrained()
        self.clip = clip or SceneClip.from_pretrained()

    def __call__(self, variants: Variants, asked: Asked, real: Tensor, task: str = "") -> Batch:
        """Values and features of all variants and of real renders. COPIES are also compared with these, by pixels."""
        values: Values = {"prompt": [ask.prompt for ask in asked], "group": [ask.group for ask in asked]}
        features: Variants = {}
        distance = eval_metrics.feature_distance(self.detector.trunk)  # at full size, where it sees edges
        for variant, images in {**variants, "real": real}.items():
            found = self.values(images, asked)
            if variant in COPIES.get(task, ()):
                pair = [to_float(x) for x in (images, area_downsample(real, real.shape[-1] // images.shape[-1]))]
                found |= {name: getattr(eval_metrics, name)(*pair).tolist() for name in ("psnr", "gmsd")}
                found["perceptual"] = [distance(x[None], y[None]).item() for x, y in zip(*pair, strict=True)]
            values |= {f"{name}, {variant}".removesuffix(", "): column for name, column in found.items()}
            features[f"frechet, {variant}".removesuffix(", ")] = self.detector.features(images)
            if task in COPIES and images.shape == real.shape:
                features[f"frechet of outlines, {variant}".removesuffix(", ")] = eval_metrics.outline_features(images)
        return Batch(values, features, torch.cat([x for x in variants.values() if x.shape == variants[""].shape], 3))

    def values(self, images: Tensor, asked: Asked) -> Values:
        """Is all that the prompt names right, and clearly; what is wrong; CLIP score; the surest thing's attributes."""
        found = self.detector.detect(images)
        pairs = [(each, parse_prompt(ask.prompt)) for each, ask in zip(found, asked, strict=True)]
        verdicts = [matches(*pair) for pair in pairs]
        surest = [max(each.things, key=lambda thing: thing.confidence, default=()) for each in found]
        values: Values = {field: [getattr(thing, field, "") for thing in surest] for field in FIELDS}
        if asked[0].negative:
            values["word shown"] = [ask.negative in thing for ask, thing in zip(asked, surest, strict=True)]
        return values | {
            "right": [verdict.right for verdict in verdicts],
            "clear": [matches(*pair, min_confidence=0.5).right for pair in pairs],
            "wrong": ["; ".join(verdict.wrong) for verdict in verdicts],
            "score": [round(score, 5) for score in self.clip(images, [ask.prompt for ask in asked]).tolist()],
        }


def evaluate(
    model: EvalModel, out: str | Path, about: dict[str, Any], *, tasks: Sequence[str] = (), n: int | None = None,
    seed: int = 1000, batch: int = 50, sweep: bool = False, evaluator: Evaluator | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run tasks (default: all that the model can do) or a sweep -> the content of eval.json.

    n pictures per task (1000) or point of the sweep (300), picture i with seed + i. `about` says what draws, in JSON
    values. ValueError where `out` holds other settings, or a task is not possible.
    """
    n = check("n", n if n is not None else 300 if sweep else 1000, Pictures)
    batch, seed = check("batch", batch, BatchSize), check("seed", seed, OneSeed)
    check("seed + n - 1", seed + n - 1, OneSeed)
    runs, out = _runs(model, tasks, sweep), Path(out)
    versions = {"minimuse": minimuse.__version__, "torch": str(torch.__version__)}
    settings = versions | about | {"n": n, "seed": seed, "sweep": sweep, "base_only": model.base_only}
    proportion_interval([True, False])  # without scipy: an error now, not after all pictures are drawn
    path = out / "settings.json"
    if out.exists() and not path.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is a file, or holds files but no settings.json; give another folder")
    asked = json.loads(json.dumps(settings))
    changed = train_state.differences(checkpoint.read_json(path) if path.exists() else asked, asked)
    require(not changed, f"{out} holds another evaluation: {'; '.join(changed)}. Give another folder")
    (out / "tasks").mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(settings, indent=1) + "\n")
    evaluator = evaluator or Evaluator()
    waiting = {name: how for name, how in runs.items() if not (out / "tasks" / f"{name}.json").exists()}
    with tqdm(total=n * len(waiting), unit="picture") as bar:
        for name, sampling in waiting.items():
            bar.set_description(name)
            parts, asked = [], prompt_set(name if name in PROMPT_SETS else "mixed", n)
            for start in range(0, n, batch):
                some, seeds = asked[start : start + batch], range(seed + start, seed + min(n, start + batch))
                drawn = getattr(model, name, model.prompts)(some, seeds, **sampling)
                real = model.real(ask.scene for ask in some)
                parts.append(evaluator(drawn, some, real, name))
                bar.update(len(some))
            _save_task(out / "tasks" / f"{name}.json", parts)
    return _report(out, settings)


def _runs(model: EvalModel, tasks: Sequence[str], sweep: bool) -> dict[str, dict[str, Any]]:
    """Names of tasks or points -> sampling settings. ValueError for a task that is not possible."""
    require(not (sweep and tasks), f"a sweep has its own prompts; leave out --sweep, or the tasks {', '.join(tasks)}")
    if sweep:
        return {f"{line} {point}": how for line, points in SWEEP.items() for point, how in points.items()}
    possible = BASE_TASKS if model.base_only else [t for t in TASKS if t != "decoder" or model.before is not None]
    hint = f"Known tasks: {', '.join(TASKS)}; decoder needs --run; --base-only leaves only the first six"
    for task in tasks:
        require(task in possible, f"task {task!r} is not possible. {hint}")
    return {name: {} for name in tasks or possible}


def _save_task(path: Path, parts: list[Batch]) -> None:
    values = {name: [value for part in parts for value in part.values[name]] for name in parts[0].values}
    features = {key: torch.cat([part.features[key] for part in parts]) for key in parts[0].features}
    images = torch.cat([part.images for part in parts])[:FIRST]
    told = zip(values["prompt"][:FIRST], values["wrong"], strict=False)
    captions = [f"{prompt}  WRONG: {wrong}" if wrong else prompt for prompt, wrong in told]
    side, width = images.shape[2:]
    sheet = grid(to_pil(images), captions, max(2, 8 * side // width), max(1, 128 // side))
    atomic_write(path.with_suffix(".png"), partial(sheet.save, format="PNG"))
    content = {"metrics": summarize(values, features, PAIRED.get(path.stem, {})), "values": values}
    atomic_write(path, json.dumps(content, indent=1) + "\n")  # last: now the task is finished


def _report(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write eval.json, eval.md, and the plots of a sweep, from all finished tasks in the folder."""
    names = [*TASKS, *(f"{line} {point}" for line, points in SWEEP.items() for point in points)]
    paths = {name: out / "tasks" / f"{name}.json" for name in names}
    found = {name: checkpoint.read_json(path)["metrics"] for name, path in paths.items() if path.exists()}
    report = {"settings": settings, "tasks": found}
    metrics = {name: {key: Estimate(*value) for key, value in each.items()} for name, each in found.items()}
    atomic_write(out / "eval.json", json.dumps(report, indent=1) + "\n")
    note = (
        f"\n\nSuper-resolution takes {settings.get('superres steps')} steps, from low tokens of the base model or from "
        '"true" ones of real pictures. "bicubic" enlarges the picture of the same tokens; "less": paired difference.'
    )
    atomic_write(out / "eval.md", table(metrics) + (note if "superres" in found else "") + "\n")
    for key, title in (("score", "CLIP-like score"), ("right", "all right")) if settings["sweep"] else ():
        plots: dict[str, dict[str, Any]] = {}  # lines that share a plot
        for line, each in SWEEP.items():
            points = {point: (metrics[f"{line} {point}"][key], metrics[f"{line} {point}"]["frechet"]) for point in each}
            plots.setdefault(line.removeprefix("rising "), {})[line] = points
        pictures = [tradeoff(lines, title, "Frechet distance", (False, True)) for lines in plots.values()]
        atomic_write(out / f"sweep-{key}.png", partial(grid(pictures, None, 2, 1).save, format="PNG"))
    return report


def table(found: dict[str, Metrics]) -> str:
    """Markdown: a line per task with the main metrics, then a line per other metric."""
    lines = ["| task | n | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for name, metrics in found.items():
        cells = [metrics[key].short() if key in metrics else "" for key in COLUMNS]
        lines.append(f"| {name} | {metrics['right'].n} | {' | '.join(cells)} |")
    lines += ["", "| task | metric | value and 95% interval | n |", "|---|---|---|---|"]
    for name, metrics in found.items():
        others = [(key, m) for key, m in metrics.items() if key not in COLUMNS]
        lines += [f"| {name} | {key} | {m.short()}{_verdict(name, key, m)} | {m.n} |" for key, m in others]
    return "\n".join(lines)


def _verdict(task: str, key: str, m: Estimate) -> str:
    """ ": better" and so on, for a difference of PAIRED variants."""
    metric, _, variants = key.partition(", ")
    if task not in PAIRED or "less" not in variants.split():
        return ""
    better = (m.value > 0) == (metric in ("right", "clear", "score", "psnr"))
    return ": cannot be told apart" if m.low <= 0 <= m.high else ": better" if better else ": worse"


def measure(
    name: str, out: Path, *, training: Path | None = None, device: str | None = None, base_only: bool = False,
    sweep: bool = False, **options,
) -> dict[str, Any]:  # fmt: skip
    """`evaluate` for a shipped name, folder or hub id. `training` is its training run, which has the older decoder."""
    muse = Muse.from_pretrained(name, device=device)
    folder, before = training or checkpoint.find(name), None
    if training or (folder / "high_tokenizer").is_dir():
        before = VQGAN(muse.config.high_tokenizer)
        train_state.load_weights(folder / "high_tokenizer", before)
        before = before.eval().requires_grad_(False).to(muse.device, muse.dtype)
        same = torch.allclose(before.codebook, muse.high_tokenizer.codebook, rtol=1e-2, atol=1e-3)  # stored in half
        require(same, f"{folder} is not the training run of {name}: the codebooks differ; give another --run")
    about = {"checkpoint": muse.config.name, "fingerprint": muse.fingerprint, "dtype": str(muse.dtype)}
    about["superres steps"] = muse.config.superres_sampling.steps
    homes = {"checkpoint": checkpoint.find(name), **{part: checkpoint.SHIPPED / part for part in ("detector", "clip")}}
    for part, home in homes.items():
        about[f"weights of {part}"] = utils.file_hash(home / checkpoint.WEIGHTS)
    model = EvalModel(muse, before=before, base_only=base_only or sweep)  # sweeps are of the base model alone
    return evaluate(model, out, about | {"device": muse.device.type}, sweep=sweep, **options)
