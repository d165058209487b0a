"""What a sampler costs in an exact world, with intervals.

p is the world, q the sampler's distribution; nothing is a network, so nothing but the sampler errs.

    kl        KL(p || q), nats a token. Tokens drawn together are drawn as if independent: step by step this is the
              conditional total correlation of what is revealed. From x ~ p, log p(x) - log q(x), without bias, where q
              is a product along a known path (temperature 1, an order that does not look at what was drawn).
              Where the path is random too (order "random", ties, ranking noise), the mean over paths is an upper bound
              on the sampler's KL, by convexity
    surprise  (E_q[-log p(y)] - H(p)), nats a token: above 0 pictures that do not exist, below 0 mode seeking. It is
              fair to every sampler, confidence-driven ones too; but 0 does not mean q = p
    singles   sum over v of (p_i(v) - q_i(v))^2, mean over tokens i. Two-sample, without bias: it may fall below 0
    pairs     the same of the distributions of two tokens, mean over all pairs

Each is kept as GROUPS values from groups of samples (jackknife pseudo-values for the last two): their mean estimates,
their spread tells the error, and two samplers that share samples are compared group by group.
Not here: the worlds (`lab_worlds.py`), the comparison of many samplers (`lab.py`), trained models (`lab_models.py`).
"""

import math
import os
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.lab_worlds import World
from minimuse.sampler import ORDERS, LogitsFn, Order, by_rank, confidence, decode, halton_rank
from minimuse.utils import content_hash

GROUPS, T_QUANTILE = 32, 2.0395  # Student's t, 31 degrees of freedom, 97.5%


class Estimate(NamedTuple):
    """A mean with its 95% interval, mean - half to mean + half."""

    mean: float
    half: float


def estimate(groups: Sequence[float]) -> Estimate:
    """Values of independent groups -> their mean and Student's interval."""
    values = torch.tensor(groups, dtype=torch.double)
    return Estimate(values.mean().item(), T_QUANTILE * (values.std() / math.sqrt(len(values))).item())


def check_samples(samples: int) -> None:
    """ValueError unless they fall into GROUPS groups of at least two."""
    if samples < 2 * GROUPS or samples % GROUPS:
        raise ValueError(f"{samples} samples do not fall into {GROUPS} groups; give a multiple of {GROUPS}, from 64 up")


def drawn(logits_fn: LogitsFn, start: Tensor, mask_id: int, **sampling: Any) -> tuple[Tensor, int]:
    """`decode` from start (B, N) to its end -> tokens (B, N), and how many passes its pictures took together."""
    passes = 0
    for step in decode(logits_fn, start, mask_id=mask_id, **sampling):
        passes += len(start) if sampling.get("remask") else int(step.revealed.any(1).sum())
    return step.tokens, passes


@torch.no_grad()
def path_log_q(logits_fn: LogitsFn, x: Tensor, *, mask_id: int, **sampling: Any) -> tuple[Tensor, Tensor]:
    """x (B, N) -> (B,) log q(x) along the path that `decode` takes to x, and (B, N) the step that reveals each token.

    `decode` runs as always, but is shown x wherever it reveals; what it draws itself (argmax, the quickest) is lost.
    Exact for an order that ignores `drawn`, at sampling temperature 1 without top-k.
    """
    sampling = {**sampling, "sampling_temperature": 0.0}
    seen: list[Tensor] = []

    def shown(tokens: Tensor, u: float) -> Tensor:
        seen[:] = [logits_fn(torch.where(tokens == mask_id, mask_id, x), u)]
        return seen[0]

    log_q, when = torch.zeros(len(x), dtype=torch.double), torch.full_like(x, -1)
    for step in decode(shown, torch.full_like(x, mask_id), mask_id=mask_id, **sampling):
        log_p = confidence(seen[0].double(), x, step.masked, step.u)
        log_q += torch.where(step.revealed, log_p, 0.0).sum(1)
        when = torch.where(step.revealed, step.index, when)
    return log_q, when


def ignores_draws(order: str | Order, n: int, v: int) -> bool:
    """Whether an order gives the same scores whatever was drawn: tried on random logits with two random draws."""
    rank_by, g = ORDERS[order] if isinstance(order, str) else order, torch.Generator().manual_seed(0)
    logits, masked = torch.randn(16, n, v, generator=g), torch.rand(16, n, generator=g) < 0.5
    one, other = (torch.randint(v, (16, n), generator=g) for _ in range(2))
    return all(rank_by(logits, one, masked, u).equal(rank_by(logits, other, masked, u)) for u in (0.0, 0.5, 1.0))


def features(tokens: Tensor, v: int) -> tuple[Tensor, Tensor]:
    """tokens (GROUPS * B, P) -> counts of codes (GROUPS, P V), and of pairs of codes (GROUPS, (P V)^2)."""
    hot = F.one_hot(tokens, v).flatten(1).float().unflatten(0, (GROUPS, -1))  # (G, B, P V)
    return hot.sum(1), (hot.transpose(1, 2) @ hot).flatten(1)


def distances(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], size: int, places: int) -> tuple[Tensor, Tensor]:
    """Features of two sets, `size` samples a group -> (GROUPS,) pseudo-values of the singles' and pairs' distances.

    With m the number of places where two samples agree, E m(x, x') + E m(y, y') - 2 E m(x, y) is the sum over places
    of the squared distance; m (m - 1) in place of m gives it for pairs. A U-statistic: no sample meets itself.
    """

    def mean(sums: Tensor, itself: int) -> Tensor:  # (G, G) over groups -> over all, then without each one: (1 + G,)
        sums = sums - size * itself * torch.eye(GROUPS)
        without = sums.sum() - sums.sum(0) - sums.sum(1) + sums.diag()
        n = torch.tensor([GROUPS] + [GROUPS - 1] * GROUPS, dtype=torch.double) * size
        return torch.cat([sums.sum()[None], without]) / (n * (n - 1 if itself else n))

    def distance(a: Tensor, b: Tensor, itself: int) -> Tensor:
        both = torch.cat([a, b])
        sums = sum(part.double() @ part.double().T for part in both.split(2**16, 1))  # (2 G, 2 G)
        xx, xy, yy = sums[:GROUPS, :GROUPS], sums[:GROUPS, GROUPS:], sums[GROUPS:, GROUPS:]
        return mean(xx, itself) + mean(yy, itself) - 2 * mean(xy, 0)

    singles, squares = distance(x[0], y[0], places), distance(x[1], y[1], places**2)
    pairs = (squares - singles) / max(places * (places - 1), 1)
    return tuple(GROUPS * d[0] - (GROUPS - 1) * d[1:] for d in (singles / places, pairs))


class Outcome(NamedTuple):
    """What a judge says of one sampler."""

    passes: float  # mean forward passes a picture
    groups: dict[str, list[float]]  # measure -> GROUPS values
    bound: bool = False  # "kl" is an upper bound


class Judge(Protocol):
    """What `compare` asks of: an exact world here, a trained model in `lab_models.py`; whatever measures fits."""

    n: int
    v: int
    titles: dict[str, str]  # measure -> axis title

    def identity(self) -> dict[str, Any]: ...  # all that the figures depend on, as JSON
    def order(self, name: str) -> str | Order: ...
    def __call__(self, **sampling: Any) -> Outcome: ...


class WorldJudge:
    """Measures samplers of an exact world; each sees the same truth and the same seeds."""

    titles: ClassVar = {
        "kl": "KL(p || q), nats a token",
        "surprise": "surprise over the entropy, nats a token",
        "singles": "squared distance of single tokens",
        "pairs": "squared distance of token pairs",
    }

    def __init__(self, world: World, samples: int = 4096, seed: int = 0):
        check_samples(samples)
        self.world, self.samples, self.seed, self.n, self.v = world, samples, seed, world.n, world.v
        self.x = world.sample(samples, self._generator(0))
        self.log_p = world.log_prob(self.x)
        entropy, error = world.entropy(self.x)
        self.minus_entropy = self.log_p if error else -entropy  # where it is not exact, group by group
        places = torch.randperm(world.n, generator=self._generator(1))[: max(2, 1024 // world.v)]  # bounds the memory
        self.places = places.sort().values
        self.truth = features(self.x[:, self.places], self.v)

    def identity(self) -> dict[str, Any]:
        """A world of your own is code, which cannot be compared: its identity is never met again."""
        own = type(self.world).__module__ != World.__module__
        parameters = os.urandom(8).hex() if own else content_hash(vars(self.world))[:16]
        name = f"{type(self.world).__name__} {self.world.grid[0]}x{self.world.grid[1]}, {self.v} codes"
        return {"target": name, "parameters": parameters, "samples": self.samples, "seed": self.seed}

    def order(self, name: str) -> str | Order:
        """The grid is known here, square or not."""
        return by_rank(halton_rank(*self.world.grid)) if name == "halton" else name

    def __call__(self, **sampling: Any) -> Outcome:
        """What `decode` takes -> what the sampler costs; "kl" where its q is a product along a path."""
        world, start = self.world, torch.full_like(self.x, self.world.mask_id)
        chunks = enumerate(start.split(world.batch))
        parts = [drawn(world, x, world.mask_id, generator=self._generator(4 + i), **sampling) for i, x in chunks]
        y, passes = torch.cat([tokens for tokens, _ in parts]), sum(took for _, took in parts) / self.samples
        each = self.minus_entropy - world.log_prob(y)
        seen = features(y[:, self.places], self.v)
        singles, pairs = distances(self.truth, seen, self.samples // GROUPS, len(self.places))
        groups = {"surprise": self._grouped(each), "singles": singles.tolist(), "pairs": pairs.tolist()}
        get = sampling.get
        plain = not get("remask") and get("top_k") is None and get("sampling_temperature", 1) == 1
        if not plain or not ignores_draws(sampling["order"], self.n, self.v):
            return Outcome(passes, groups)
        log_q, when = self._paths(self.x, sampling, 2)
        few, again = self.x[:64], self._paths(self.x[:64], sampling, 3)[1]
        return Outcome(passes, {"kl": self._grouped(self.log_p - log_q), **groups}, not again.equal(when[: len(few)]))

    def _paths(self, x: Tensor, sampling: dict[str, Any], stream: int) -> tuple[Tensor, Tensor]:
        draws = {"mask_id": self.world.mask_id, "generator": self._generator(stream)}
        parts = [path_log_q(self.world, part, **draws, **sampling) for part in x.split(self.world.batch)]
        log_q, when = zip(*parts, strict=True)
        return torch.cat(log_q), torch.cat(when)

    def _grouped(self, each: Tensor) -> list[float]:
        return (each / self.n).view(GROUPS, -1).mean(1).tolist()

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * self.seed + stream)
