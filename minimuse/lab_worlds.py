"""Exact worlds: distributions over token grids whose every conditional is known.

A trained network errs, and so does the schedule that it is decoded with. A world makes no error: called as a LogitsFn,
it gives p(x_i | all known tokens) exactly, so that what is left of the error is the schedule's alone (`lab.py`).

    MixtureWorld  one of K pictures, then each token by itself: strongly multi-modal, each token tells of all others
    ChainWorld    a Markov chain: a token tells of its neighbours, and little of what is far
    PottsWorld    a strip of interacting spins, as in statistical physics: neighbours in two dimensions

One function makes a world, `log_evidence(e)` = log sum over x of p(x) e_1(x_1) ... e_N(x_N). It is multilinear in each
e_i, so its derivative by e_i(v), over itself, is p(x_i = v | evidence on the others) / p(evidence on i | the others):
autograd turns the sum over all pictures into all conditionals at once (Darwiche's network polynomial, 2003).

Glossary: B batch, N tokens, V codebook size, K modes, h w grid; token (r, c) stands at r w + c.
Not here: the measures and the comparison (`lab.py`).
"""

import math

import torch
from torch import Tensor


class World:
    """A distribution over tokens (N,) of V codes. A subclass gives `log_evidence`, and a quicker `sample`.

    A world is a LogitsFn: `world(tokens, u)` -> logits (B, N, V); it does not look at u. All sums are float64.
    """

    batch = 1024  # pictures at a time: what bounds the memory

    def __init__(self, grid: tuple[int, int], codebook_size: int):
        self.grid, self.n, self.v, self.mask_id = tuple(grid), grid[0] * grid[1], codebook_size, codebook_size

    def log_evidence(self, e: Tensor) -> Tensor:
        """e (B, N, V) float64, not negative -> (B,): log of the sum over x of p(x) prod_i e_i(x_i), in nats.

        e_i(v) weighs that token i is v: 1 for a known token's code and 0 for others, all 1 where nothing is known.
        """
        raise NotImplementedError

    def __call__(self, tokens: Tensor, u: float = 0.0) -> Tensor:
        """tokens (B, N), mask_id where unknown -> (B, N, V) log p(x_i | the known ones), normalized.

        Literally so: a known token is certain, 0 for itself and -inf for every other.
        """
        known = tokens != self.mask_id
        certain = self._evidence(tokens).log()
        return torch.where(known[..., None], certain, self.leave_one_out(tokens))

    def leave_one_out(self, tokens: Tensor) -> Tensor:
        """tokens (B, N), mask_id where unknown -> (B, N, V) log p(x_i | the known ones but i), known i doubted too."""
        with torch.inference_mode(False), torch.enable_grad():
            parts = []
            for part in tokens.split(self.batch):
                e = self._evidence(part).requires_grad_()
                (p,) = torch.autograd.grad(self.log_evidence(e).sum(), e)
                parts.append((p / p.sum(-1, keepdim=True)).log())
        return torch.cat(parts)

    def log_prob(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> (B,) log p in nats; where some are mask_id, of the known ones together."""
        with torch.no_grad():
            return torch.cat([self.log_evidence(self._evidence(part)) for part in tokens.split(self.batch)])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n exact samples, (n, N): token by token, each from its conditional; N calls."""
        tokens = torch.full((n, self.n), self.mask_id)
        for i in range(self.n):
            tokens[:, i] = torch.multinomial(self(tokens)[:, i].exp(), 1, generator=generator)[:, 0]
        return tokens

    def entropy(self, x: Tensor | None = None) -> tuple[float, float]:
        """Nats and the standard error: the mean of -log p over samples x, 4096 new ones by default; 0 where exact."""
        x = self.sample(4096, torch.Generator().manual_seed(0)) if x is None else x
        nll = -self.log_prob(x)
        return nll.mean().item(), (nll.std() / math.sqrt(len(x))).item()

    def _evidence(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> (B, N, V): 1 where the token may be v."""
        if tokens.ndim != 2 or tokens.shape[1] != self.n or tokens.dtype != torch.long:
            raise ValueError(f"tokens {tuple(tokens.shape)} of {tokens.dtype}; this world takes (B, {self.n}) long")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) <= self.v:
            raise ValueError(f"tokens outside 0..{self.v - 1}; [MASK] is {self.mask_id}")
        table = torch.cat([torch.eye(self.v, dtype=torch.double), torch.ones(1, self.v, dtype=torch.double)])
        return table[tokens]


class MixtureWorld(World):
    """p(x) = sum_k w_k prod_i p_ki(x_i): K pictures, each with its own noise.

    Tokens that are drawn together before the mode is decided come from different pictures: the classic failure of
    parallel decoding.
    """

    def __init__(self, tables: Tensor, weights: Tensor | None = None, grid: tuple[int, int] | None = None):
        """tables (K, N, V): p_ki(v), all above 0; weights (K,), default equal; grid, default a square or a row."""
        tables = torch.as_tensor(tables).double()
        k, n, v = tables.shape
        super().__init__(grid or _grid(n), v)
        weights = torch.ones(k) / k if weights is None else torch.as_tensor(weights)
        if self.n != n or weights.shape != (k,):
            raise ValueError(
                f"{len(weights)} weights, {self.n} tokens for tables (K, N, V) {(k, n, v)}; give K weights, h w = N"
            )
        self.tables, self.weights = (_full_support(t, "tables and weights") for t in (tables, weights.double()))

    @classmethod
    def random(
        cls,
        modes: int = 32,
        grid: tuple[int, int] = (8, 8),
        codebook_size: int = 8,
        sharpness: float = 2.0,
        seed: int = 0,
    ) -> "MixtureWorld":
        """Softmaxed Gaussian tables; the sharper, the less noise within a mode."""
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(modes, grid[0] * grid[1], codebook_size, generator=generator, dtype=torch.double)
        return cls((sharpness * logits).softmax(-1), grid=grid)

    def log_evidence(self, e: Tensor) -> Tensor:
        """(B, N, V) -> (B,): a product over tokens within each mode, then the sum over modes."""
        each = torch.einsum("bnv,knv->bnk", e, self.tables).log()  # (B, N, K)
        return (each.sum(1) + self.weights.log()).logsumexp(1)

    def __call__(self, tokens: Tensor, u: float = 0.0) -> Tensor:
        """As of every world, in two matrix products: the modes' posterior (B, K), then its mean of the tables."""
        e, known = self._evidence(tokens), (tokens != self.mask_id)[..., None]
        posterior = self._told(e, known).softmax(1)
        return torch.where(known, e, (posterior @ self.tables.flatten(1)).view_as(e)).log()

    def log_prob(self, tokens: Tensor) -> Tensor:
        return self._told(self._evidence(tokens), (tokens != self.mask_id)[..., None]).logsumexp(1)

    def _told(self, e: Tensor, known: Tensor) -> Tensor:
        """(B, K) log of weight times probability of the known tokens."""
        return (e * known).flatten(1) @ self.tables.log().flatten(1).T + self.weights.log()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return torch.cat([_draw(self.tables[part], generator) for part in mode.split(self.batch)])


class ChainWorld(World):
    """x_1 ~ initial, then x_(i+1) ~ transition[x_i], along the raster of the grid."""

    def __init__(self, transition: Tensor, n: int, initial: Tensor | None = None, grid: tuple[int, int] | None = None):
        """transition (V, V), rows of p(next | this), all above 0; initial (V,), the stationary one by default."""
        transition = torch.as_tensor(transition).double()
        super().__init__(grid or _grid(n), transition.shape[1])
        if transition.shape != (self.v, self.v) or self.n != n:
            raise ValueError(
                f"transition {tuple(transition.shape)}, {n} tokens, grid {self.grid}; give (V, V), h w = n"
            )
        self.transition = _full_support(transition, "the transition")
        initial = torch.linalg.matrix_power(self.transition, 2**20)[0] if initial is None else torch.as_tensor(initial)
        self.initial = _full_support(initial.double(), "the initial distribution")

    @classmethod
    def sticky(cls, n: int = 64, codebook_size: int = 4, stay: float = 0.8) -> "ChainWorld":
        """A chain that repeats its token with probability `stay`, else takes any of the others."""
        eye = torch.eye(codebook_size, dtype=torch.double)
        return cls(stay * eye + (1 - stay) / (codebook_size - 1) * (1 - eye), n)

    def log_evidence(self, e: Tensor) -> Tensor:
        """(B, N, V) -> (B,): the forward messages of a hidden Markov model."""
        first, *rest = e.unbind(1)
        message, log_scale = self.initial * first, 0.0  # (B, V) p(x_i, evidence up to i), less a scale
        for i, here in enumerate(rest):
            message = (message @ self.transition) * here
            if i % 16 == 15:  # often enough for float64
                scale = message.detach().sum(1, keepdim=True)
                message, log_scale = message / scale, log_scale + scale.log()[:, 0]
        return message.sum(1).log() + log_scale

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        tokens = [_draw(self.initial.expand(n, -1), generator)]
        for _ in range(1, self.n):
            tokens.append(_draw(self.transition[tokens[-1]], generator))
        return torch.stack(tokens, 1)

    def entropy(self, x: Tensor | None = None) -> tuple[float, float]:
        """Exact: H(x_1) + sum_i E[H(x_(i+1) | x_i)]."""
        row, p = -torch.xlogy(self.transition, self.transition).sum(1), self.initial
        nats = -torch.xlogy(p, p).sum()
        for _ in range(1, self.n):
            nats, p = nats + p @ row, p @ self.transition
        return nats.item(), 0.0


class PottsWorld(World):
    """p(x) = exp(J [number of equal neighbours] + sum_i field(x_i)) / Z on an h x w strip with free borders.

    Transfer matrices: the V^h states of a column are summed out column by column, so h is small and w any length.
    J > 0: neighbours agree, patches form. J < 0: they differ; two colours make a checkerboard.
    """

    def __init__(
        self,
        grid: tuple[int, int] = (4, 16),
        codebook_size: int = 2,
        coupling: float = 0.8,
        field: Tensor | None = None,
    ):
        super().__init__(grid, codebook_size)
        h, v = self.grid[0], codebook_size
        if v**h > 4096:
            raise ValueError(
                f"{v} states on {h} rows are {v**h} states a column; at most 4096, so turn or thin the strip"
            )
        self.coupling = float(coupling)
        self.field = torch.zeros(v).double() if field is None else torch.as_tensor(field).double()
        self.columns = torch.cartesian_prod(*[torch.arange(v)] * h).view(-1, h)  # (S, h) the spins of state s
        down = (self.columns[:, 1:] == self.columns[:, :-1]).sum(1)
        self._within = self.coupling * down.double() + self.field[self.columns].sum(1)  # (S,) log weight of a column
        self._between = self.coupling * (self.columns[:, None] == self.columns).sum(-1).double()  # (S, S)
        self.log_z = self._log_z(1.0).item()

    def _log_z(self, scale: Tensor | float) -> Tensor:
        """log of the sum over x of exp(scale * energy)."""
        message = scale * self._within
        for _ in range(1, self.grid[1]):
            message = (message[:, None] + scale * self._between).logsumexp(0) + scale * self._within
        return message.logsumexp(0)

    def log_evidence(self, e: Tensor) -> Tensor:
        """(B, N, V) -> (B,): the transfer matrix, a column at a time, its evidence site by site."""
        transfer, within = self._between.exp(), self._within.exp()
        message, log_scale = within[None], -self.log_z
        for c, sites in enumerate(e.view(-1, *self.grid, self.v).unbind(2)):  # a column at a time, (B, h, V)
            column, *below = sites.unbind(1)
            for site in below:
                column = (column[:, :, None] * site[:, None, :]).flatten(1)  # (B, V^rows)
            message = (message @ transfer * within if c else message) * column  # (B, S)
            scale = message.detach().sum(1, keepdim=True)
            message, log_scale = message / scale, log_scale + scale.log()[:, 0]
        return message.sum(1).log() + log_scale

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The messages forwards, then the columns backwards, each given the one to its right."""
        forward = [self._within]
        for _ in range(1, self.grid[1]):
            forward.append((forward[-1][:, None] + self._between).logsumexp(0) + self._within)
        states = [_draw(forward[-1].softmax(0).expand(n, -1), generator)]
        for message in reversed(forward[:-1]):
            following = (message + self._between).softmax(1)  # (S, S): given the right one's state, p of this one
            states.append(_draw(following[states[-1]], generator))
        return self.columns[torch.stack(states[::-1], 1)].transpose(1, 2).flatten(1)  # (n, w, h) -> (n, h w)

    def entropy(self, x: Tensor | None = None) -> tuple[float, float]:
        """Exact: log Z - E[energy], and E[energy] is the derivative of log Z(scale) at scale 1."""
        with torch.inference_mode(False), torch.enable_grad():
            scale = torch.ones((), dtype=torch.double, requires_grad=True)
            (energy,) = torch.autograd.grad(self._log_z(scale), scale)
        return self.log_z - energy.item(), 0.0


WORLDS = {"mixture": MixtureWorld.random, "chain": ChainWorld.sticky, "potts": PottsWorld}  # what the command offers


def _grid(n: int) -> tuple[int, int]:
    side = math.isqrt(n)
    return (side, side) if side * side == n else (1, n)


def _full_support(p: Tensor, name: str) -> Tensor:
    """p (..., V), normalized; ValueError unless everything may happen."""
    if not (p > 0).all() or not p.isfinite().all():
        raise ValueError(f"{name}: holds {p.min().item():g}; a world gives every picture a chance, so give only p > 0")
    return p / p.sum(-1, keepdim=True)


def _draw(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """p (..., V) -> a draw from each."""
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])
