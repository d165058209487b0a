"""The schedule lab: `compare` measures schedules and orders against the exact answer, with 95% intervals, in seconds.

p is the world, q the distribution of the sampler. A world makes no error, so all of the error is the sampler's:

    kl          KL(p || q), nats a token, at temperature 1 and for orders that ignore the drawn tokens. It is an upper
                bound where the path is random: order "random", ties, ranking noise
    gap         KL less that of the best fixed counts for as many steps (`lab_optimum.py`), in random order
    tilted      KL(p_t || q) to the tilted target of a `ConditionalMixture`, where guidance is set
    excess_nll  E_q[-log p(y)] - H(p), nats a token: above 0 impossible examples, below 0 mode seeking
    singles     sum over v of (p_i(v) - q_i(v))^2, mean over tokens i; unbiased, so it may fall below 0
    pairs       the same for the joint distributions of two tokens, mean over all pairs

To add something, pass one function or class to `compare`:

>>> schedule = lambda u: 1 - u**3  # progress -> the fraction still masked
>>> rule = lambda logits, masked, u: masked.sum(1) // 2  # an adaptive schedule: how many tokens to reveal now, (B,)
>>> order = lambda logits, drawn, masked, u: logits.amax(-1)  # scores (B, N); the highest are kept
>>> def calm(state):  # sees the pass before: keep (B, N) bool the tokens whose prediction has moved least
...     now, before = (x.softmax(-1) for x in (state.logits, state.previous if state.index else state.logits))
...     moved = (now - before).abs().sum(-1).masked_fill(~state.masked, math.inf)
...     left = state.masked.sum(1) // (state.steps - state.index)
...     return ~state.masked | (moved.argsort(1).argsort(1) < left[:, None])
>>> class Coins(World):  # independent fair coins
...     def log_evidence(self, e):
...         return e.mean(-1).log().sum(1)
>>> mine = {"presets": {"calm": {"choose": calm}}, "steps": [2], "samples": 64}
>>> report = compare(Coins((2, 2), 2), {"mine": schedule, "rule": rule}, {"mine": order}, **mine)
>>> report["mine", "mine", 2]["excess_nll"].value, report["calm", "", 2].nfe
(0.0, 2.0)

For text, arXiv 2602.19619 judges samplers with exact oracles. Here are grids of tokens, any order and schedule, exact
KL with paired intervals, and the same call for trained models.
Not here: the worlds (`lab_worlds.py`), published samplers (`lab_samplers.py`), trained models (`lab_models.py`).
"""

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from operator import neg
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import minimuse
from minimuse import lab_optimum
from minimuse.eval_metrics import Estimate, jackknife, marginal_distances, mean_interval, paired_difference
from minimuse.lab_optimum import GROUPS, Outcome, expected_kl, information_curve, optimal_counts, schedule_of
from minimuse.lab_samplers import entropy_bound, preset_settings
from minimuse.lab_worlds import WORLDS, ChainWorld, ConditionalMixture, MixtureWorld, PottsWorld, World
from minimuse.masking import get_schedule, reveal_counts
from minimuse.sampler import Order, by_rank, confidence, decode, get_order, is_adaptive
from minimuse.utils import OneSeed, PositiveInt, atomic_write, check, generator_of, halton_rank, require

__all__ = ["WORLDS", "Cell", "ChainWorld", "ConditionalMixture", "MixtureWorld", "PottsWorld", "Report", "World"]
__all__ += ["compare"]
Named = str | Sequence[str] | Mapping[str, Any]  # names, or a name for each function
RANK = {"accuracy": neg, "clip": neg, "excess_nll": abs}  # a table shows the lowest first; of these values


@torch.no_grad()
def path_log_q(world: World, x: Tensor, **sampling: Any) -> tuple[Tensor, Tensor]:
    """x (B, N) -> (B,) log q(x) along the path that `decode` takes to x, and (B, N) the step that reveals each token.

    The world sees x at every revealed position. Exact for temperature 1 and orders that ignore the drawn tokens.
    """
    logits = x

    def teacher_forced(tokens: Tensor, u: float) -> Tensor:
        nonlocal logits
        logits = world(torch.where(tokens == world.mask_id, world.mask_id, x), u)
        return logits

    log_q, when = torch.zeros(len(x), dtype=torch.double), torch.full_like(x, -1)
    sampling |= {"mask_id": world.mask_id, "sampling_temperature": 0.0}  # drawn tokens are not used; argmax is fast
    for step in decode(teacher_forced, torch.full_like(x, world.mask_id), **sampling):
        log_p = confidence(logits.double(), x, step.masked, step.u)
        log_q += torch.where(step.revealed, log_p, 0.0).sum(1)
        when = torch.where(step.revealed, step.index, when)
    return log_q, when


def ignores_drawn(order: str | Order, n: int, v: int) -> bool:
    """Whether an order gives the same scores for two different draws, tried on random logits."""
    score = get_order(order)
    g = torch.Generator().manual_seed(0)
    logits, masked = torch.randn(16, n, v, generator=g), torch.rand(16, n, generator=g) < 0.5
    one, other = (torch.randint(v, (16, n), generator=g) for _ in range(2))
    return all(score(logits, one, masked, u).equal(score(logits, other, masked, u)) for u in (0.0, 0.5, 1.0))


class WorldEvaluator:
    """Measures samplers of an exact world. All of them see the same truth and the same seeds."""

    titles: ClassVar = {
        "kl": "KL(p || q), nats a token",
        "tilted": "KL to the tilted target, nats a token",
        "gap": "gap to the optimum, nats a token",
        "excess_nll": "excess NLL, nats a token",
        "singles": "squared distance of single tokens",
        "pairs": "squared distance of token pairs",
    }

    def __init__(self, world: World, samples: int = 4096, seed: int = 0):
        samples, self.seed = lab_optimum.check_samples(samples), check("seed", seed, OneSeed)
        self.world, self.grid, self.codebook_size = world, world.grid, world.v
        name = f"{type(world).__name__} {world.grid[0]}x{world.grid[1]}, {world.v} codes"
        self.about = {"target": name, "samples": samples, "seed": seed}
        self.x = world.sample(samples, self._generator(0))
        self.log_p = world.log_prob(self.x)
        entropy = world.entropy()
        self.minus_entropy = self.log_p if entropy is None else -entropy
        positions = torch.randperm(world.n, generator=self._generator(1))[: max(2, 1024 // world.v)]
        self.positions = positions.sort().values  # where marginals are compared; limits the memory

    @cached_property
    def curves(self) -> Tensor:
        """(GROUPS, N): the information curve of each group of examples."""
        curves = lab_optimum.world_curves(self.world, seed=self.seed)
        return curves.expand(max(GROUPS, len(curves)), -1).unflatten(0, (GROUPS, -1)).mean(1)

    def __call__(self, *, guidance: Any = None, **sampling: Any) -> Outcome:
        """Arguments of `decode` -> the metrics; "kl" only where q is a product along a path."""
        world, get, parts = self.world, sampling.get, []
        ready = guidance is None or isinstance(world, ConditionalMixture)
        require(ready, f"guidance is {guidance}; it needs a world with labels, such as ConditionalMixture.random()")
        sampler = world if guidance is None else world.guided(guidance)
        for i, start in enumerate(torch.full_like(self.x, world.mask_id).split(world.batch)):
            steps = decode(sampler, start, mask_id=world.mask_id, generator=self._generator(4 + i), **sampling)
            parts.append(lab_optimum.run(steps, get("corrector")))
        y = torch.cat([tokens for tokens, _ in parts])
        nfe = sum(n for _, n in parts) / len(y)
        groups = {"excess_nll": self._grouped(self.minus_entropy - world.log_prob(y))}
        groups |= marginal_distances(self.x[:, self.positions], y[:, self.positions], world.v, GROUPS)
        changed = any(map(get, ("remask", "choose", "corrector", "top_k", "top_p")))
        if changed or get("sampling_temperature", 1) != 1 or not ignores_drawn(sampling["order"], world.n, world.v):
            return Outcome(nfe, groups)

        generator = self._generator(2)
        paths = [path_log_q(sampler, x, generator=generator, **sampling) for x in self.x.split(world.batch)]
        log_q, when = (torch.cat(parts) for parts in zip(*paths, strict=True))
        _, other_seed = path_log_q(sampler, self.x[:64], generator=self._generator(3), **sampling)
        groups["kl"] = self._grouped(self.log_p - log_q)
        if guidance is not None:
            groups["tilted"] = self._tilted(log_q)
        elif sampling["order"] == "random" and not is_adaptive(sampling["schedule"]):
            counts = reveal_counts(world.n, sampling["steps"], sampling["schedule"])
            best = optimal_counts(information_curve(self.curves), len(counts))
            groups["gap"] = [expected_kl(h, counts) - expected_kl(h, best) for h in self.curves]
        return Outcome(nfe, groups, not other_seed.equal(when[:64]))

    def _tilted(self, log_q: Tensor) -> list[float]:
        """KL(p_t || q) from examples of p(x | y) of weight w = p(y | x)^t: E[w (log p + log w - log q)] / Z - log Z."""
        tilt = self.world.t * self.world.log_posterior(self.x)
        tilt = tilt - tilt.max()  # a constant, which log Z takes back
        w, value = tilt.exp(), self.log_p + tilt - log_q
        sums = torch.stack([w, w * value, torch.ones_like(w)]).view(3, GROUPS, -1).sum(2)
        without = sums.sum(1, keepdim=True) - sums
        whole, rest = (b / a - (a / n).log() for a, b, n in (sums.sum(1), without))
        return (jackknife(whole, rest) / self.world.n).tolist()

    def _grouped(self, nats: Tensor) -> list[float]:
        return (nats / self.world.n).view(GROUPS, -1).mean(1).tolist()

    def _generator(self, stream: int) -> torch.Generator:
        return generator_of((1_000_003 * self.seed + stream) % 2**32)


@dataclass(frozen=True)
class Cell:
    """One sampler and its metrics. Two cells are compared group by group, since they share their samples."""

    schedule: str
    order: str
    steps: int
    nfe: float
    groups: dict[str, list[float]]
    bound: bool

    def __getitem__(self, metric: str) -> Estimate:
        """cell["kl"] -> its mean and 95% interval."""
        return mean_interval(self.groups[metric])


@dataclass(frozen=True)
class Report:
    """What `compare` measured: the cells, and what they depend on."""

    cells: list[Cell]
    titles: dict[str, str]
    about: dict[str, Any]

    def __getitem__(self, key: tuple[str, str, int]) -> Cell:
        """report["cosine", "halton", 8]"""
        cells = {(c.schedule, c.order, c.steps): c for c in self.cells}
        if key not in cells:
            raise KeyError(f"no cell {key}; there are {list(cells)}")
        return cells[key]

    def table(self, against: tuple[str, str] | None = None, metrics: Sequence[str] = ()) -> str:
        """Markdown: metrics, or the first three, with 95% intervals, the best first; "<=" marks an upper bound of KL.

        against a (schedule, order): paired differences to its cell with as many steps, bold where they exclude 0.
        """
        metrics = metrics or [m for m in self.titles if any(m in c.groups for c in self.cells)][:3]
        lines = [["schedule", "order", "steps", *metrics, "NFE"]]

        def rank(c: Cell) -> tuple[int, list[float]]:
            return c.steps, [RANK.get(m, float)(c[m].value) if m in c.groups else math.inf for m in metrics]

        for c in sorted(self.cells, key=rank):
            base = against and self[(*against, c.steps)]
            if c is not base:
                shown = [_shown(c, metric, base) for metric in metrics]
                lines.append([c.schedule, c.order, str(c.steps), *shown, f"{c.nfe:.1f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * w for w in widths])
        return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)

    def plot(self, ax: Any = None, metric: str | None = None) -> Any:
        """A metric over the NFE, with 95% intervals -> the axes. Schedules named "bound..." form one line."""
        import matplotlib.pyplot as plt

        metric = metric or next(m for m in self.titles if any(m in c.groups for c in self.cells))
        lines: dict[str, list[Cell]] = {}
        for c in sorted(self.cells, key=lambda c: c.nfe):
            if metric in c.groups:
                schedule = "entropy bounds" if c.schedule.startswith("bound") else c.schedule
                bound = " (upper bound)" if metric == "kl" and c.bound else ""
                lines.setdefault(f"{c.order}, {schedule}{bound}".removeprefix(", "), []).append(c)
        require(len(lines) > 0, f"no cell has the metric {metric!r}; known: {', '.join(self.titles)}")
        ax = ax or plt.subplots(figsize=(6, 4), layout="constrained")[1]
        for i, (label, cells) in enumerate(lines.items()):
            found = [c[metric] for c in cells]
            style = {"marker": "osD^vP"[i % 6], "ls": ("-", "--", ":", "-.")[i % 4], "capsize": 3, "label": label}
            ax.errorbar([c.nfe for c in cells], [e.value for e in found], [e.margin for e in found], **style)
        if metric == "kl":
            ax.set_yscale("symlog", linthresh=1e-3)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="NFE (forward passes of an image)", ylabel=self.titles[metric], title=self.about["target"])
        ax.legend(fontsize=7, frameon=False)
        return ax

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.md and METRIC.png to a folder, over those of an earlier report."""
        import matplotlib.pyplot as plt

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for metric in {m: None for c in self.cells for m in c.groups}:
            figure = self.plot(metric=metric).figure
            figure.savefig(folder / f"{metric}.png", dpi=160)
            plt.close(figure)
        atomic_write(folder / "report.md", self.table() + "\n")
        atomic_write(folder / "report.json", json.dumps(asdict(self), indent=1) + "\n")
        return folder


def _shown(cell: Cell, metric: str, base: Cell | None = None) -> str:
    """A value and its interval, or its difference from that of `base`; "" where one was not measured."""
    if metric not in cell.groups or (base and metric not in base.groups):
        return ""
    found = paired_difference(cell.groups[metric], base.groups[metric]) if base else cell[metric]
    digits = min(7, max(2, 1 - math.floor(math.log10(found.margin)))) if found.margin > 0 else 4
    text = f"{round(found.value, digits) + 0.0:.{digits}f} ± {found.margin:.{digits}f}"
    if base:
        return f"**{text}**" if abs(found.value) > max(found.margin, 1e-5) else text
    return f"<= {text}" if cell.bound and metric == "kl" else text


def compare(
    target: Any, schedules: Named = "cosine", orders: Named = "confidence", steps: Sequence[int] | int = (4, 8, 16), *,
    presets: Named = (), samples: int | None = None, seed: int = 0, out: str | Path | None = None, **sampling: Any,
) -> Report:  # fmt: skip
    """Measure every schedule x order x steps, and every preset x steps, in a World or in a Muse.

    Schedules and orders are names, or a mapping of names to functions. An adaptive rule is a schedule; "bound0.5" is
    `entropy_bound(0.5)`, "optimal" the best counts in random order. A preset may be a mapping of names to settings of
    `decode` and `guidance`; `sampling` is for all. `samples`: 4096 in a world, 512 images of a Muse. `out` is a folder
    for the report. The target may be an evaluator of your own, with the methods and attributes of the others.
    """
    if out is not None and (Path(out) / "report.json").exists():
        raise FileExistsError(f"{out} holds another report; give another folder, or overwrite it")
    if wrong := sampling.keys() & {"schedule", "order"}:
        raise TypeError(f"compare has no setting {' and '.join(wrong)}; give schedules=[...] and orders=[...]")
    schedules, orders, presets = _named("schedules", schedules), _named("orders", orders), _named("presets", presets)
    steps = steps if isinstance(steps, Sequence) else [steps]
    cells = len(steps) * (len(schedules) * len(orders) + len(presets))
    require(cells > 0, "nothing to compare: give at least one of schedules, of orders and of steps, or of presets")
    require(cells <= 10_000, f"{cells} samplers to compare; give at most 10,000")
    steps = [check("steps", t, PositiveInt) for t in steps]
    evaluator = target
    if isinstance(target, World):
        evaluator = WorldEvaluator(target, 4096 if samples is None else samples, seed)
    elif hasattr(target, "generate"):  # a Muse; networks are imported only here
        from minimuse.lab_models import MuseEvaluator

        evaluator = MuseEvaluator(target, 512 if samples is None else samples, seed)
    elif not callable(target) or not hasattr(target, "grid"):
        raise TypeError(f"target is {target!r}; give a World such as MixtureWorld.random(), a Muse, or an evaluator")
    every = product(schedules, orders, steps)
    trials = {(s, o, t): {"schedule": schedules[s], "order": orders[o], "steps": t} for s, o, t in every}
    for name, t in product(presets, steps):
        given = presets[name] if isinstance(presets[name], dict) else {}
        size = (math.prod(evaluator.grid), evaluator.codebook_size, t, target if isinstance(target, World) else None)
        settings = preset_settings("muse" if given else name, *size) | given
        trials[name if given else f"as {name}", "", t] = settings
    trials = {label: _resolved(settings, evaluator) | sampling for label, settings in trials.items()}
    cells = [Cell(*label, *evaluator(**settings)) for label, settings in trials.items()]
    about = {"minimuse": minimuse.__version__, "torch": str(torch.__version__), "sampling": repr(sampling)}
    report = Report(cells, dict(evaluator.titles), evaluator.about | about)
    if out is not None:
        report.save(out)
    return report


def _named(setting: str, x: Named) -> Mapping[str, Any]:
    """Names -> a mapping of each name to itself; one string is one name."""
    names = list(x) if isinstance(x, Sequence | Mapping | Set) and not isinstance(x, str) else [x]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"{setting} is {x!r}; give names, or a dict of names and functions: {{'mine': my_function}}")
    return x if isinstance(x, Mapping) else {name: name for name in names}


def _resolved(settings: dict[str, Any], evaluator: Any) -> dict[str, Any]:
    """Check a schedule and an order, and replace names that depend on the target by functions."""
    schedule, order, grid = settings["schedule"], settings["order"], evaluator.grid
    if isinstance(schedule, str) and schedule.startswith("bound"):
        nats = schedule.removeprefix("bound")
        require(nats.replace(".", "", 1).isdecimal(), f"schedule {schedule!r}; give a bound in nats, such as bound0.5")
        schedule = entropy_bound(float(nats))
    elif schedule == "optimal":
        require(hasattr(evaluator, "curves"), "schedule 'optimal' needs an evaluator with `curves`, (GROUPS, N)")
        schedule = schedule_of(optimal_counts(information_curve(evaluator.curves), settings["steps"]))
    elif not is_adaptive(schedule):
        schedule = get_schedule(schedule, math.prod(grid))
        reveal_counts(math.prod(grid), settings["steps"], schedule)  # checks the curve
    get_order(order)  # checks the name
    if order == "halton" and grid[0] != grid[1]:
        order = by_rank(halton_rank(*grid))
    return {**settings, "schedule": schedule, "order": order}
