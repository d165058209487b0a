"""Exact worlds: distributions over token grids. As a LogitsFn, a world returns p(x_i | all known tokens) exactly.

    MixtureWorld  K modes, independent tokens within a mode: every token carries information about all others
    ConditionalMixture  a mixture with labels: p(x | y), and p(x) for guidance
    ChainWorld    a Markov chain along the raster: a token depends on its neighbours
    PottsWorld    a strip of interacting spins: neighbours in two dimensions

`log_evidence(e)` = log sum over x of p(x) e_1(x_1) ... e_N(x_N) defines a world. The derivative of the sum by e_i(v) is
proportional to p(x_i = v | evidence on the others): one backward pass gives all conditionals (Darwiche, 2003).

B batch, N tokens, V codebook size, K modes, S states, h w grid; token (r, c) has the index r w + c.
Not here: the metrics and the comparison, and how to add a world (`lab.py`).
"""

import copy
import math
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from minimuse.utils import Fraction, Natural, NonNegative, PositiveInt, check, explain, generator_of, require

Grid = tuple[int, int]  # (h, w)


class World:
    """A distribution over N tokens of V codes, in float64. A subclass defines `log_evidence`, and perhaps `draw`.

    A subclass calls `super().__init__(grid, codebook_size)`. `log_evidence` need not be normalized. Every grid needs
    p(x) > 0, perhaps a tiny one: otherwise one impossible sample makes the measured NLL infinite.
    """

    batch = 1024  # examples at a time; limits the memory

    def __init__(self, grid: Grid, codebook_size: int):
        self.grid, self.v = check_grid(grid, codebook_size)
        self.n = math.prod(self.grid)
        self.mask_id = self.v

    def log_evidence(self, e: Tensor) -> Tensor:
        """e (B, N, V) >= 0 -> (B,) nats. A known token has 1 at its code, else 0; an unknown one has 1 everywhere."""
        raise NotImplementedError

    def __call__(self, tokens: Tensor, u: float = 0.0) -> Tensor:
        """tokens (B, N), mask_id where unknown -> (B, N, V) log p(x_i | known tokens); 0 or -inf at a known token."""
        known = (tokens != self.mask_id)[..., None]
        return torch.where(known, self._evidence(tokens).log(), self.leave_one_out(tokens))

    def leave_one_out(self, tokens: Tensor) -> Tensor:
        """tokens (B, N), mask_id where unknown -> (B, N, V) log p(x_i | the known tokens except token i)."""
        parts = []
        with torch.inference_mode(False), torch.enable_grad():
            for part in tokens.split(self.batch):
                e = self._evidence(part).requires_grad_()
                (p,) = torch.autograd.grad(self.log_evidence(e).sum(), e)
                parts.append((p / p.sum(-1, keepdim=True)).log())
        return torch.cat(parts)

    @torch.no_grad()
    def log_prob(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> (B,) log p in nats; with some tokens masked, the log-marginal of the known ones."""
        found = torch.cat([self.log_evidence(self._evidence(part)) for part in tokens.split(self.batch)])
        right = found.shape == tokens.shape[:1] and bool(found.isfinite().all())
        came = f"log_evidence of {len(tokens)} examples has the shape {tuple(found.shape)}, or infinite numbers"
        require(right, f"{came}; give (B,), and p(x) > 0 for every x")
        return found - self.log_evidence(self._evidence(tokens[:1].new_full((1, self.n), self.mask_id)))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """-> n exact samples, (n, N)."""
        n = check("n", n, PositiveInt)
        require(n * self.n <= 2**27, f"n is {n}; give at most {2**27 // self.n} samples of {self.n} tokens")
        return self.draw(n, generator)

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """As `sample`, token by token with N calls of the world, unless a subclass knows a faster way."""
        tokens = torch.full((n, self.n), self.mask_id)
        for i in range(self.n):
            tokens[:, i] = _draw(self(tokens)[:, i].exp(), generator)
        return tokens

    def entropy(self) -> float | None:
        """-> nats; None where there is no closed form."""

    def _evidence(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> (B, N, V): 1 where the token may be v."""
        right = tokens.dtype == torch.long and tokens.ndim == 2 and tokens.shape[1] == self.n
        right = right and bool(((tokens >= 0) & (tokens <= self.mask_id)).all())
        wanted = f"(B, {self.n}) long of codes 0..{self.v - 1}, or {self.mask_id} for [MASK]"
        require(right, f"tokens are {tokens.dtype} {tuple(tokens.shape)}; give {wanted}")
        return torch.eye(self.v + 1, self.v, dtype=torch.double).index_fill(0, torch.tensor(self.v), 1.0)[tokens]


class MixtureWorld(World):
    """p(x) = sum_k w_k prod_i p_ki(x_i). Tokens drawn together before the mode is decided mix the modes."""

    def __init__(self, tables: Tensor, weights: Tensor | None = None, grid: Grid | None = None):
        """tables (K, N, V): p_ki(v) > 0; weights (K,), equal by default; grid, by default a square or a row."""
        self.tables = _normalized(tables, "tables", 3)
        k, n, v = self.tables.shape
        super().__init__(_default_grid(n) if grid is None else grid, v)
        self.weights = _normalized(torch.ones(k) if weights is None else weights, "weights", 1)
        fits = self.n == n and len(self.weights) == k
        require(fits, f"got tables {(k, n, v)}, {len(self.weights)} weights, grid {grid}; give K weights, h w = N")

    @classmethod
    def random(
        cls, modes: int = 32, grid: Grid = (8, 8), codebook_size: int = 8, sharpness: float = 2.0, seed: int = 0
    ) -> "MixtureWorld":
        """Softmax of Gaussian tables. A higher sharpness means less noise within a mode."""
        (h, w), v = check_grid(grid, codebook_size)
        modes = check("modes", modes, PositiveInt)
        require(modes * h * w <= 2**17, f"modes is {modes}; give at most {2**17 // (h * w)} for {h * w} tokens")
        logits = torch.randn(modes, h * w, v, generator=generator_of(seed), dtype=torch.double)
        return cls((float(check("sharpness", sharpness, float)) * logits).softmax(-1), grid=(h, w))

    def log_evidence(self, e: Tensor) -> Tensor:
        """(B, N, V) -> (B,): a product over tokens within each mode, then the sum over modes."""
        each = torch.einsum("bnv,knv->bnk", e, self.tables).log()  # (B, N, K)
        return (each.sum(1) + self.weights.log()).logsumexp(1)

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return torch.cat([_draw(self.tables[part], generator) for part in mode.split(self.batch)])


class ConditionalMixture(MixtureWorld):
    """p(x | y) = sum_k w_yk p_k(x) of one label y. Labels share their modes; p(x) is the mean over all labels.

    Guidance t aims at the tilted target p_t(x), proportional to p(x) p(y | x)^(1 + t), that is to p(x | y) p(y | x)^t.
    """

    def __init__(self, tables: Tensor, weights: Tensor, label: int = 0, t: float = 1.0, grid: Grid | None = None):
        """tables (K, N, V), weights (Y, K): p(mode | label) > 0; t of the tilted target."""
        weights = _normalized(weights, "weights", 2)
        label, self.labels = check("label", label, Natural), len(weights)
        require(label < self.labels, f"label is {label}; give one of 0..{self.labels - 1}")
        super().__init__(tables, weights[label], grid)
        self.marginal, self.guidance = MixtureWorld(tables, weights.mean(0), grid), lambda u: 0.0
        self.t = check("t", t, NonNegative)

    @classmethod
    def random(cls, modes: int = 16, *mixture: Any, labels: int = 4, t: float = 1.0, **named: Any) -> Self:
        """The modes of `MixtureWorld.random`; each label's weights are a softmax of Gaussians."""
        world = MixtureWorld.random(modes, *mixture, **named)
        weights = torch.randn(check("labels", labels, PositiveInt), modes, generator=generator_of(0)).mul(2).softmax(-1)
        return cls(world.tables, weights, 0, t, world.grid)

    def guided(self, guidance: Any) -> Self:
        """The same world, which as a LogitsFn is guided: Muse 2.7, l_g = (1 + t) l_c - t l_u for each token."""
        from minimuse.cfg import get_guidance  # loads networks

        world = copy.copy(self)
        world.guidance = get_guidance(guidance)
        return world

    def __call__(self, tokens: Tensor, u: float = 0.0) -> Tensor:
        cond, t = super().__call__(tokens, u), self.guidance(u)
        return cond if t == 0 else torch.where(cond.isinf(), cond, cond + t * (cond - self.marginal(tokens)))

    def log_posterior(self, x: Tensor) -> Tensor:
        """x (B, N) -> (B,) log p(y | x)."""
        return self.log_prob(x) - self.marginal.log_prob(x) - math.log(self.labels)


class MarkovWorld(World):
    """A Markov chain over columns of tokens: p(s_1 .. s_w) proportional to start(s_1) prod_i transfer(s_i, s_(i+1)).

    positions (w, h): the index of each token, column by column. columns (S, h): the tokens of each state, S = V^h.
    """

    def __init__(self, grid: Grid, v: int, positions: Tensor, columns: Tensor, start: Tensor, transfer: Tensor):
        super().__init__(grid, v)
        self.positions = positions
        self.columns = columns
        self.start = start
        self.transfer = transfer
        self.later = [torch.ones_like(start)]  # (S,) for each column: the weight of all later columns, up to a scale
        for _ in positions[1:]:
            message = transfer @ self.later[0]
            self.later.insert(0, message / message.sum())

    def transitions(self) -> Iterator[Tensor]:
        """-> p(s_1) as (1, S), then p(s_(i+1) | s_i) as (S, S) for each further column."""
        for i, later in enumerate(self.later):
            weights = (self.transfer if i else self.start[None]) * later
            yield weights / weights.sum(1, keepdim=True)

    def log_evidence(self, e: Tensor) -> Tensor:
        """(B, N, V) -> (B,): the forward messages of a hidden Markov model, rescaled at each column."""
        message, log_scale = e.new_ones(len(e), 1), 0.0
        for sites, transition in zip(e[:, self.positions].unbind(1), self.transitions(), strict=True):
            evidence, *others = sites.unbind(1)
            for site in others:
                evidence = (evidence[:, :, None] * site[:, None, :]).flatten(1)  # (B, V^rows)
            message = message @ transition * evidence  # (B, S)
            scale = message.detach().sum(1, keepdim=True)
            message, log_scale = message / scale, log_scale + scale.log()[:, 0]
        return message.sum(1).log() + log_scale

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        tokens, state = torch.empty(n, self.n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
        for positions, transition in zip(self.positions, self.transitions(), strict=True):
            state = _draw(transition[state], generator)
            tokens[:, positions] = self.columns[state]
        return tokens

    def entropy(self) -> float:
        """Exact: H(s_1) + sum_i E[H(s_(i+1) | s_i)]."""
        nats, p = 0.0, torch.ones(1, dtype=torch.double)
        for transition in self.transitions():
            nats = nats - p @ torch.xlogy(transition, transition).sum(1)
            p = p @ transition
        return nats.item()


class ChainWorld(MarkovWorld):
    """x_1 ~ initial, then x_(i+1) ~ transition[x_i], along the raster of the grid: a square if N is one, or a row."""

    def __init__(self, transition: Tensor, n: int, initial: Tensor | None = None):
        """transition (V, V): rows p(next | this), all > 0; initial (V,), by default the stationary distribution."""
        transition = _normalized(transition, "transition", 2)
        grid, v = check_grid(_default_grid(check("n", n, PositiveInt)), len(transition))
        require(transition.shape == (v, v), f"transition has the shape {tuple(transition.shape)}; give (V, V)")
        if initial is None:  # solve p transition = p, sum(p) = 1
            equations = (transition.T - torch.eye(v)).index_fill(0, torch.tensor(v - 1), 1.0)
            initial = torch.linalg.solve(equations, torch.eye(v, dtype=torch.double)[-1])
        initial = _normalized(initial, "initial", 1)
        require(len(initial) == v, f"initial holds {len(initial)} numbers; give {v}")
        super().__init__(grid, v, torch.arange(n)[:, None], torch.arange(v)[:, None], initial, transition)

    @classmethod
    def sticky(cls, n: int = 64, codebook_size: int = 4, stay: float = 0.8) -> "ChainWorld":
        """A chain that repeats its token with probability `stay`; all other codes are equally likely."""
        (_, v), stay = check_grid((1, 1), codebook_size), check("stay", stay, Fraction)
        eye = torch.eye(v, dtype=torch.double)
        return cls(stay * eye + (1 - stay) / max(v - 1, 1) * (1 - eye), n)


class PottsWorld(MarkovWorld):
    """p(x) = exp(J [number of equal neighbours]) / Z on an h x w strip with free borders.

    A column has V^h states, so h must be small. With J > 0 patches form; with J < 0 and two codes, a checkerboard.
    """

    def __init__(self, grid: Grid = (4, 16), codebook_size: int = 2, coupling: float = 0.8):
        (h, w), v = check_grid(grid, codebook_size)
        require(max(v, 2) ** h <= 4096, f"got {h} rows of {v} codes; give at most 4096 = codes^rows")
        self.coupling = check("coupling", coupling, float)
        require(abs(self.coupling) * h <= 150, f"coupling is {coupling}; give at most {150 // h}, so that p(x) > 0")
        columns = torch.cartesian_prod(*[torch.arange(v)] * h).view(-1, h)  # (S, h)
        within = (columns[:, 1:] == columns[:, :-1]).sum(1).double()  # (S,)
        between = (columns[:, None] == columns).sum(-1).double()  # (S, S)
        start = (self.coupling * within).exp()
        from_right = torch.arange(h * w).view(h, w).T.flip(0)
        super().__init__((h, w), v, from_right, columns, start, (self.coupling * between).exp() * start)


WORLDS = {"mixture": MixtureWorld.random, "chain": ChainWorld.sticky, "potts": PottsWorld}  # names of the command line
WORLDS["labels"] = ConditionalMixture.random


def check_grid(grid: Grid, codebook_size: int) -> tuple[Grid, int]:
    """Grid and codebook size of a world. ValueError if 1,024 examples would need more than a gigabyte."""
    h, w = check("grid", grid, tuple[PositiveInt, PositiveInt])
    v = check("codebook_size", codebook_size, PositiveInt)
    small = v <= 1024 and h * w * v <= 2**17
    require(small, f"grid is {h} x {w}, codebook_size is {v}; give at most 1024 codes, and 2**17 codes times tokens")
    return (h, w), v


def _default_grid(n: int) -> Grid:
    side = math.isqrt(n)
    return (side, side) if side * side == n else (1, n)


def _normalized(p: Any, name: str, axes: int) -> Tensor:
    """p (..., V) -> float64, normalized. ValueError unless it has so many axes, and every entry is positive."""
    expected = f"{name} is a {type(p).__name__}; give a tensor of positive numbers"
    with explain(expected, TypeError, ValueError, RuntimeError):
        p = torch.as_tensor(p).double()
    require(p.ndim == axes and p.numel() > 0, f"{name} has the shape {tuple(p.shape)}; give {axes} axes")
    normal = p / p.sum(-1, keepdim=True)
    require(((p > 0) & (normal > 0)).all(), f"{name} holds {p.min():g}; give positive numbers, as p > 0 everywhere")
    return normal


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """p (..., V) -> a draw from each."""
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
