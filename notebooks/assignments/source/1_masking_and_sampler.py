# %% [markdown] stubs=masking,sampler,editing
r"""
# Assignment: build masking and the sampler

You write the two halves of Muse that share one curve: what training hides, and how decoding uncovers it. Then you catch
other people's mistakes, and explain what you saw.

| Part | Points |
|---|---|
| 1. Masking: rates, masks, the loss, and a variant | 30 |
| 2. The sampler: counts, decoding, and a variant | 35 |
| 3. Tests that find mistakes | 20 |
| 4. An explanation | 15 |

**Before this**: notebooks 4 (masking) and 7 (parallel decoding).
**Rules.** Write your code where it says so; cells of tests are put back before grading. What the package holds of this
(`minimuse.masking`, `minimuse.sampler`, `minimuse.editing`) raises an error while we grade. Read it as much as you like, say in
a comment what you took from where, and know that two of the tasks are in no package. Every cell of tests may take
30 seconds, and runs on a CPU.
"""

# %% locked=setup
import math
import sys
from collections import Counter
from functools import partial
from itertools import pairwise

import torch
import zoo
from torch.nn import functional as F

sys.path.append("..")  # in a clone, checks.py stands one folder up
from checks import (
    check_decode,
    check_mask_rate,
    check_masked_loss,
    check_random_mask,
    check_reveal_counts,
)

from minimuse.eval_metrics import mean_interval
from minimuse.lab_worlds import MixtureWorld


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
r"""
## 1. Masking (30 points)

### 1.1 Rates (6 points)

Training hides a share $r$ of each picture's tokens, with density $p(r) = \frac{2}{\pi}(1 - r^2)^{-1/2}$ on $[0, 1]$ (Muse 2.6).
That is what you get from $r = \cos(\frac{\pi}{2} u)$ with $u$ uniform. Here it is one of a family: $r = \cos^{power}(\frac{\pi}{2} u)$. Muse has
`power = 1`; a larger one hides less. Return one rate for each of `n` examples. All your random numbers come from
`torch.rand(..., generator=generator)`.
"""


# %% answer=mask_rate
def mask_rate(n, power, generator=None):
    """-> (n,) rates, one for each example."""
    ### BEGIN SOLUTION
    return torch.cos(math.pi / 2 * torch.rand(n, generator=generator)) ** power
    ### END SOLUTION


# %% test=test_mask_rate points=6
_rate = partial(mask_rate, power=1.0)
assert check_mask_rate(_rate), check_mask_rate(_rate)
_halves = [(mask_rate(4000, k, generator=seeded()) > 0.5).double().mean().item() for k in (1, 2)]
assert abs(_halves[0] - 2 / 3) < 0.03, (
    f"power 1: {_halves[0]:.1%} of rates exceed 0.5; expected 67%"
)
assert abs(_halves[1] - 1 / 2) < 0.03, (
    f"power 2: {_halves[1]:.1%} of rates exceed 0.5; expected 50%"
)
### BEGIN HIDDEN TESTS
for _power in (0.5, 1.0, 3.0):
    _r = mask_rate(50_000, _power, generator=seeded(7)).double()
    for _q in (0.1, 0.5, 0.8, 0.99):  # P(r <= q) = 2/pi arcsin(q^(1/power))
        _want = 2 / math.pi * math.asin(_q ** (1 / _power))
        assert abs((_r <= _q).double().mean() - _want) < 0.01
### END HIDDEN TESTS

# %% [markdown]
r"""
### 1.2 Masks (6 points)

Some places of a picture must always be shown. `may` $(B, N)$ is `True` where a token may be hidden. In each row choose exactly
$\lceil r M \rceil$ of its $M$ such places at random, and return `True` where a token is hidden. Rows have their own rates, their own $M$ and
their own places. (Rounding: $0.3 \cdot 10$ is a little more than 3 in floating point.)
"""


# %% answer=random_mask
def random_mask(tokens, rate, may, generator=None):
    """tokens (B, N), rate (B,), may (B, N) bool -> (B, N) bool, True = masked."""
    ### BEGIN SOLUTION
    count = (rate.double() * may.sum(1) - 1e-6).ceil()
    noise = torch.rand(tokens.shape, generator=generator).masked_fill(~may, math.inf)
    return noise.argsort(1).argsort(1) < count[:, None]
    ### END SOLUTION


# %% test=test_random_mask points=6


def _mask(tokens, rate, generator=None):  # every place may be hidden
    return random_mask(tokens, rate, torch.ones_like(tokens, dtype=torch.bool), generator=generator)


assert check_random_mask(_mask), check_random_mask(_mask)
_may = torch.tensor([[True, False, True, False], [True, True, True, True]])
_m = random_mask(torch.zeros(2, 4).long(), torch.tensor([0.5, 0.5]), _may, generator=seeded())
assert _m.sum(1).tolist() == [1, 2], f"rows hide {_m.sum(1).tolist()} places; expected 1 and 2"
assert not (_m & ~_may).any(), "a place is hidden that must be shown"
### BEGIN HIDDEN TESTS
_m = _mask(torch.zeros(3, 64, dtype=torch.long), torch.tensor([0.0, 0.5, 1.0]), generator=seeded())
assert _m.sum(1).tolist() == [0, 32, 64]
_may = torch.rand(200, 30, generator=seeded(1)) < torch.linspace(0, 1, 200)[:, None]
_rates = torch.rand(200, generator=seeded(2))
_m = random_mask(torch.zeros(200, 30).long(), _rates, _may, generator=seeded())
assert not (_m & ~_may).any(), "a place is hidden that must be shown"
_want = (_rates.double() * _may.sum(1) - 1e-6).ceil().clamp(min=0)
assert _m.sum(1).equal(_want.long()), "the count of a row is not ceil(r M)"
_pairs = Counter(
    tuple(row.nonzero().flatten().tolist())
    for row in _mask(
        torch.zeros(6000, 4, dtype=torch.long), torch.full((6000,), 0.5), generator=seeded(3)
    )
)
assert len(_pairs) == 6, "some pairs of places never come"
assert max(_pairs.values()) < 1.25 * min(_pairs.values()), (
    "pairs of places are not as likely as each other"
)
### END HIDDEN TESTS

# %% [markdown]
r"""
### 1.3 The loss (6 points)

The mean cross-entropy in nats over the masked tokens of the whole batch, where each example has a weight $w_b$ of its own:
$\sum_{b,i} w_b m_{bi} \ell_{bi} \,/\, \sum_{b,i} w_b m_{bi}$. It is 0 where nothing is masked. No gradient reaches the logits of tokens that were shown.
"""


# %% answer=masked_loss
def masked_loss(logits, targets, masked, weight):
    """logits (B, N, V), targets (B, N), masked (B, N) bool, weight (B,) > 0 -> ()."""
    ### BEGIN SOLUTION
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    share = masked * weight[:, None]
    return (loss * share).sum() / share.sum().clamp(min=1e-12)
    ### END SOLUTION


# %% test=test_masked_loss points=6


def _loss(logits, targets, masked):  # all examples weigh the same
    return masked_loss(logits, targets, masked, torch.ones(len(logits)))


assert check_masked_loss(_loss), check_masked_loss(_loss)
_two = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]]])  # these cost log 2 and log(1 + e^2)
_got = masked_loss(
    _two, torch.tensor([[1], [1]]), torch.ones(2, 1).bool(), torch.tensor([3.0, 1.0])
)
_want = (3 * math.log(2) + math.log(1 + math.exp(2))) / 4
assert abs(_got - _want) < 1e-5, (
    f"with weights 3 and 1 the loss is {_got:.4f}; expected {_want:.4f}"
)
### BEGIN HIDDEN TESTS
_logits = torch.randn(3, 5, 7, generator=seeded(), requires_grad=True)
_targets = torch.randint(7, (3, 5), generator=seeded())
_masked = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
_weight = torch.tensor([2.0, 0.5, 4.0])
_parts = [
    (_weight[b], -_logits[b, i].log_softmax(-1)[_targets[b, i]])
    for b, i in _masked.nonzero().tolist()
]
_got = masked_loss(_logits, _targets, _masked, _weight)
assert torch.allclose(_got, sum(w * x for w, x in _parts) / sum(w for w, _ in _parts), atol=1e-5)
(_grad,) = torch.autograd.grad(_got, _logits)
assert _grad[~_masked].eq(0).all(), "a gradient reaches tokens that were shown"
assert _grad[_masked].abs().sum(-1).gt(0).all()
### END HIDDEN TESTS

# %% [markdown] only=rates:stratified
r"""
### 1.4 Variant: rates that cover the batch (12 points)

Independent rates may all be large in one batch and small in the next, so the gradient is noisier than it need be.
Write `batch_rates(n, generator)`: cut $[0, 1]$ into $n$ equal parts, draw one $u$ uniformly in *each*, put the $n$ values in
random order, and return $r = \cos(\frac{\pi}{2}u)$. Each single rate still has Muse's density; their mean varies far less.
"""


# %% answer=batch_rates only=rates:stratified
def batch_rates(n, generator=None):
    """-> (n,) rates, one u from each n-th of [0, 1], in random order."""
    ### BEGIN SOLUTION
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return torch.cos(math.pi / 2 * u[torch.randperm(n, generator=generator)])
    ### END SOLUTION


# %% test=test_batch_rates points=12 only=rates:stratified
assert batch_rates(4, generator=seeded()).shape == (4,)
_u = 2 / math.pi * batch_rates(8, generator=seeded()).double().clamp(0, 1).acos()
assert (_u * 8).floor().sort().values.tolist() == list(range(8)), (
    f"parts {(_u * 8).floor().tolist()}"
)
### BEGIN HIDDEN TESTS
_many = torch.stack([batch_rates(16, generator=seeded(i)) for i in range(2000)]).double()
_u = 2 / math.pi * _many.clamp(0, 1).acos() * 16
assert ((_u + 1e-4).floor().clamp(max=15).sort(1).values - torch.arange(16)).abs().le(1).all()
assert abs(_u.frac().mean() - 0.5) < 0.02, "within its part a value is uniform"
assert _u.frac().std() > 0.25, "within its part a value is uniform"
assert _many.mean(1).std() < 0.02, "the mean varies as if rates were independent"
assert (_many.mean(0) - 2 / math.pi).abs().max() < 0.04, (
    "the order is not random: a place has a rate of its own"
)
assert len({tuple(row.argsort().tolist()) for row in _many[:50]}) > 45, "the order is not random"
assert batch_rates(5, generator=seeded(1)).equal(batch_rates(5, generator=seeded(1)))
### END HIDDEN TESTS

# %% [markdown] only=rates:pairs
r"""
### 1.4 Variant: rates in pairs (12 points)

Independent rates may all be large in one batch and small in the next, so the gradient is noisier than it need be.
Write `batch_rates(n, generator)`: examples 0 and 1 form a pair, 2 and 3 the next, and so on. A pair shares one uniform $u$:
its first takes $r = \cos(\frac{\pi}{2}u)$, its second $r = \cos(\frac{\pi}{2}(1-u))$. Where `n` is odd, the last one stands alone.
Each single rate still has Muse's density; what one of a pair hides more, the other hides less.
"""


# %% answer=batch_rates only=rates:pairs
def batch_rates(n, generator=None):
    """-> (n,) rates; of a pair, u and 1 - u."""
    ### BEGIN SOLUTION
    u = torch.rand((n + 1) // 2, generator=generator)
    return torch.cos(math.pi / 2 * torch.stack([u, 1 - u], 1).flatten()[:n])
    ### END SOLUTION


# %% test=test_batch_rates points=12 only=rates:pairs
_r = batch_rates(6, generator=seeded()).double()
assert _r.shape == (6,)
assert torch.allclose(_r.view(3, 2).square().sum(1), torch.ones(3).double(), atol=1e-5), (
    "cos^2 + sin^2 = 1"
)
### BEGIN HIDDEN TESTS
assert batch_rates(7, generator=seeded()).shape == (7,)
assert batch_rates(1, generator=seeded()).shape == (1,)
_many = batch_rates(40_000, generator=seeded(5)).double()
for _part in (_many[::2], _many[1::2]):
    assert _part.min() >= 0
    assert abs(_part.mean() - 2 / math.pi) < 0.01
    assert abs((_part > 0.9).double().mean() - 0.287) < 0.015
_first = _many[::2]
assert abs(torch.corrcoef(torch.stack([_first[:-1], _first[1:]]))[0, 1]) < 0.03, (
    "pairs depend on each other"
)
assert batch_rates(5, generator=seeded(1)).equal(batch_rates(5, generator=seeded(1)))
### END HIDDEN TESTS

# %% [markdown] only=rates:between
r"""
### 1.4 Variant: rates between two bounds (12 points)

Suppose that a model will only ever *edit*: it never meets an empty grid. Write `batch_rates(n, low, high, generator)`: rates of
Muse's density, given that they lie in $[low, high]$, with $0 \le low < high \le 1$. Do not draw until it fits: for a narrow range
that takes for ever. One uniform for each rate is enough. (Between which $u$ does $r = \cos(\frac{\pi}{2}u)$ lie between the bounds?)
"""


# %% answer=batch_rates only=rates:between
def batch_rates(n, low, high, generator=None):
    """-> (n,) rates in [low, high]."""
    ### BEGIN SOLUTION
    first, last = (2 / math.pi * math.acos(r) for r in (high, low))
    u = first + (last - first) * torch.rand(n, generator=generator)
    return torch.cos(math.pi / 2 * u).clamp(low, high)
    ### END SOLUTION


# %% test=test_batch_rates points=12 only=rates:between
_r = batch_rates(1000, 0.2, 0.6, generator=seeded())
assert _r.shape == (1000,)
assert (_r >= 0.2 - 1e-6).all(), "below the lower bound"
assert (_r <= 0.6 + 1e-6).all(), "above the upper bound"
### BEGIN HIDDEN TESTS
assert check_mask_rate(lambda n, generator=None: batch_rates(n, 0.0, 1.0, generator=generator))
for _low, _high in [(0.2, 0.6), (0.0, 0.5), (0.7, 1.0), (0.95, 0.999)]:
    _r = batch_rates(40_000, _low, _high, generator=seeded(2)).double()
    _width = math.acos(_low) - math.acos(_high)
    _mean = (math.sqrt(1 - _low**2) - math.sqrt(1 - _high**2)) / _width
    assert abs(_r.mean() - _mean) < 0.02 * (_high - _low), (
        f"the mean in [{_low}, {_high}] is {_r.mean():.4f}"
    )
    _half = (_low + _high) / 2
    _below = (math.acos(_low) - math.acos(_half)) / _width
    assert abs((_r < _half).double().mean() - _below) < 0.015, (
        "the density within the bounds is not Muse's"
    )
_r = batch_rates(100_000, 0.5, 0.500001, generator=seeded())
assert (_r - 0.5).abs().max() < 1e-4
assert batch_rates(5, 0.1, 0.9, generator=seeded(1)).equal(
    batch_rates(5, 0.1, 0.9, generator=seeded(1))
)
### END HIDDEN TESTS

# %% [markdown]
r"""
## 2. The sampler (35 points)

### 2.1 How many (6 points)

Of `n` masked tokens, $\lfloor n \cos^{power}(\frac{\pi}{2} \frac{i+1}{T}) \rfloor$ stay masked after step $i = 0, \dots, T-1$. Return how many each step reveals.
Each step reveals at least one, so keep enough for the steps to come; of fewer tokens than steps, `n` steps reveal one each.
With `power = 1`, Muse's cosine, 256 tokens in 12 steps are 3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33. (Add `1e-6` before you take the floor: $\cos(\pi/3)$ is
not quite a half.)
"""


# %% answer=reveal_counts
def reveal_counts(n, steps, power):
    """-> list of min(n, steps) whole numbers that sum to n."""
    ### BEGIN SOLUTION
    steps, left, counts = min(n, steps), n, []
    for i in range(steps):
        stay = math.floor(n * math.cos(math.pi / 2 * (i + 1) / steps) ** power + 1e-6)
        stay = min(max(stay, steps - 1 - i), left - 1)
        counts.append(left - stay)
        left = stay
    return counts
    ### END SOLUTION


# %% test=test_reveal_counts points=6
_cosine = partial(reveal_counts, power=1.0)
assert check_reveal_counts(_cosine), check_reveal_counts(_cosine)
assert reveal_counts(16, 4, 2.0) == [3, 5, 6, 2], f"power 2: {reveal_counts(16, 4, 2.0)}"
### BEGIN HIDDEN TESTS
assert reveal_counts(64, 8, 1.0) == [2, 3, 6, 8, 10, 11, 12, 12]
assert reveal_counts(64, 8, 3.0) == [4, 10, 14, 14, 12, 7, 2, 1]
assert reveal_counts(3, 24, 2.0) == [1, 1, 1]
assert reveal_counts(1, 1, 2.0) == [1]
for _power in (1.0, 2.0, 3.0):
    assert all(sum(reveal_counts(n, 24, _power)) == n for n in range(1, 300))
    assert all(min(reveal_counts(n, 24, _power)) >= 1 for n in range(1, 300))
### END HIDDEN TESTS

# %% [markdown]
r"""
### 2.2 Decoding (15 points)

First a part: `surest(scores, masked, counts)` chooses, in each row, the `counts` masked places of highest score.

Then `decode`. A model is a function `logits_fn(tokens, u)` → logits $(B, N, V)$. In step $i$ of $T$:

1. ask it about the tokens as they are, with $u = i/(T-1)$ ($u = 1$ where $T = 1$);
2. draw a token for every masked place from its softmax (`torch.multinomial(..., generator=generator)`);
3. score each place by $\log p$ of what was drawn there;
4. let `choose(scores, masked, counts)` say which are kept; the others stay `mask_id`.

Yield the tokens after each step. Rows may begin with different numbers of `mask_id`: each follows the curve of 2.1, with `power`, for its own number.
If a row has fewer masked tokens than steps, some of its steps reveal nothing; which ones is up to you. Given tokens never change, nor do those fixed once.
"""


# %% answer=decode
def surest(scores, masked, counts):
    """scores (B, N), masked (B, N) bool, counts (B,) -> (B, N) bool: the best masked places of each row."""
    ### BEGIN SOLUTION
    rank = scores.masked_fill(~masked, -math.inf).argsort(1, descending=True).argsort(1)
    return (rank < counts[:, None]) & masked
    ### END SOLUTION


def decode(logits_fn, tokens, *, mask_id, steps, power, generator=None, choose=surest):
    """tokens (B, N), mask_id where unknown -> yields (B, N) after each step."""
    ### BEGIN SOLUTION
    plans = []
    for n in (tokens == mask_id).sum(1).tolist():
        counts = reveal_counts(n, steps, power) if n else []
        plans.append([0] * (steps - len(counts)) + counts)
    for i in range(steps):
        masked = tokens == mask_id
        logits = logits_fn(tokens, i / (steps - 1) if steps > 1 else 1.0)
        p = logits.softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(tokens.shape)
        scores = p.gather(-1, drawn[..., None])[..., 0].log()
        keep = choose(scores, masked, torch.tensor([plan[i] for plan in plans]))
        tokens = torch.where(keep & masked, drawn, tokens)
        yield tokens
    ### END SOLUTION


# %% test=test_surest points=3
_scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
_masked = torch.tensor([[True, False, True, True]])
assert surest(_scores, _masked, torch.tensor([2])).tolist() == [[False, False, True, True]]
### BEGIN HIDDEN TESTS
_s, _m = torch.randn(50, 9, generator=seeded()), torch.rand(50, 9, generator=seeded(1)) < 0.6
_k = (torch.rand(50, generator=seeded(2)) * (_m.sum(1) + 1)).long()
_kept = surest(_s.clone(), _m.clone(), _k)
assert _kept.sum(1).equal(_k), "as many as counts says, 0 included"
assert not (_kept & ~_m).any(), "a known place was chosen"
for _row in range(50):
    _in, _out = _s[_row][_kept[_row]], _s[_row][_m[_row] & ~_kept[_row]]
    assert not len(_in) or not len(_out) or _in.min() >= _out.max()
### END HIDDEN TESTS

# %% test=test_decode points=8
_decode = partial(decode, power=1.0)
assert check_decode(_decode), check_decode(_decode)
### BEGIN HIDDEN TESTS
_start = torch.full((4, 16), 9)
_start[1, :8], _start[2] = 3, 5
_start[3, 2:] = 1
_u, _states = [], [_start]
_even = torch.zeros(4, 16, 9)


def _model(tokens, u):
    _u.append(round(float(u), 6))
    return _even[: len(tokens)]


_states += list(_decode(_model, _start.clone(), mask_id=9, steps=4, generator=seeded()))
assert _u[-1] == 1.0, "the last step sees u = 1"
assert all(x in (0.0, 0.333333, 0.666667, 1.0) for x in _u)
_left = torch.stack([(s == 9).sum(1) for s in _states], 1).tolist()
assert _left[0] == [16, 14, 11, 6, 0], "a row of 16"
assert _left[1] == [8, 7, 5, 3, 0], "a row of 8, in the same batch"
assert _left[2] == [0] * 5, "a row with nothing to do"
assert _left[3][0] == 2, "a row of 2 in 4 steps"
assert _left[3][-1] == 0, "a row of 2 in 4 steps"
assert all((a == b)[a != 9].all() for a, b in pairwise(_states))
assert _start[1, :8].eq(3).all(), "the tokens that were handed in were changed in place"
_fast = decode(_model, torch.full((1, 16), 9), mask_id=9, steps=4, power=2.0, generator=seeded())
assert [(s == 9).sum().item() for s in _fast] == [13, 8, 2, 0], "power 2: 3, 5, 6 and 2 tokens"
### END HIDDEN TESTS

# %% test=test_decode_draws points=4
_coin = torch.tensor([0.7, 0.2, 0.1]).log().expand(3000, 2, 3)
*_, _last = decode(
    lambda tokens, u: _coin,
    torch.full((3000, 2), 3),
    mask_id=3,
    steps=1,
    power=1.0,
    generator=seeded(),
)
assert abs((_last == 0).double().mean() - 0.7) < 0.03
### BEGIN HIDDEN TESTS
_same = [
    list(
        decode(
            lambda t, u: _coin[:8],
            torch.full((8, 2), 3),
            mask_id=3,
            steps=2,
            power=1.0,
            generator=seeded(4),
        )
    )
    for _ in "ab"
]
assert _same[0][-1].equal(_same[1][-1]), "one seed, two results"
# two places, one sure (0.9) and one not: in the first of two steps the surer draw is kept, judged by what was drawn
_two = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log().expand(6000, 2, 2)
_first = next(
    iter(
        decode(
            lambda t, u: _two,
            torch.full((6000, 2), 2),
            mask_id=2,
            steps=2,
            power=1.0,
            generator=seeded(5),
        )
    )
)
assert abs((_first[:, 0] != 2).double().mean() - 0.9) < 0.02, (
    "the score is that of the token drawn, not of the likeliest"
)
### END HIDDEN TESTS

# %% [markdown] only=choose:apart
r"""
### 2.3 Variant: places that lie apart (14 points)

Tokens that are revealed together cannot agree with each other, and neighbours need to agree most. Write
`choose(scores, masked, counts)` with the interface of `surest`, for a square grid of side $\sqrt N$, token $(r, c)$ at $r \cdot side + c$:

go through the masked places from the highest score down and take a place unless one of its 4 neighbours (above, below,
left, right) was taken in this call. If that ends with fewer than `counts`, take the best of those passed over until there are
`counts`. Rows of the batch are independent.
"""


# %% answer=choose only=choose:apart
def choose(scores, masked, counts):
    """As `surest`, but neighbours on the grid are avoided."""
    ### BEGIN SOLUTION
    side, kept = math.isqrt(scores.shape[1]), torch.zeros_like(masked)
    for b, count in enumerate(counts.tolist()):
        order = [i for i in scores[b].argsort(descending=True).tolist() if masked[b, i]]
        taken, passed = [], []
        for i in order:
            r, c = divmod(i, side)
            near = [
                r * side + c + d
                for d, there in ((-side, r), (side, r < side - 1), (-1, c), (1, c < side - 1))
                if there
            ]
            (passed if set(near) & set(taken[:count]) else taken).append(i)
        kept[b, (taken[:count] + passed)[:count]] = True
    return kept
    ### END SOLUTION


# %% test=test_choose points=10 only=choose:apart
_scores = torch.tensor(
    [[9.0, 8, 1, 7, 2, 3, 4, 5, 6]]
)  # 3 x 3: place 1 is next to place 0, place 3 too
_all = torch.ones(1, 9, dtype=torch.bool)
assert choose(_scores, _all, torch.tensor([2])).nonzero()[:, 1].tolist() == [0, 8]
### BEGIN HIDDEN TESTS
assert choose(_scores, _all, torch.tensor([0])).sum() == 0
assert choose(_scores, _all, torch.tensor([3])).nonzero()[:, 1].tolist() == [0, 6, 8]
assert choose(_scores, _all, torch.tensor([9])).all()


def _reference(s, m, k):
    side, taken = math.isqrt(len(s)), []
    order = sorted((i for i in range(len(s)) if m[i]), key=lambda i: -s[i])
    for i in order:
        apart = all(abs(i // side - j // side) + abs(i % side - j % side) != 1 for j in taken)
        if apart and len(taken) < k:
            taken.append(i)
    rest = [i for i in order if i not in taken]
    return sorted(taken + rest[: k - len(taken)])


_s, _m = torch.randn(60, 25, generator=seeded()), torch.rand(60, 25, generator=seeded(1)) < 0.7
_k = (torch.rand(60, generator=seeded(2)) * (_m.sum(1) + 1)).long()
_kept = choose(_s.clone(), _m.clone(), _k)
for _row in range(60):
    _want = _reference(_s[_row].tolist(), _m[_row].tolist(), int(_k[_row]))
    assert _kept[_row].nonzero()[:, 0].tolist() == _want, (
        f"scores {_s[_row].tolist()}, {int(_k[_row])} places"
    )
### END HIDDEN TESTS

# %% [markdown] only=choose:shares
r"""
### 2.3 Variant: every line of the grid has its share (14 points)

The surest places often lie side by side, and tokens revealed together cannot agree with each other. Write
`choose(scores, masked, counts)` with the interface of `surest`, for a square grid of side $\sqrt N$, token $(r, c)$ at $r \cdot side + c$:

go in rounds. In a round every line $r$ of the grid that has masked places left, not taken yet, offers its best one. The offers of
a round are taken from the highest score down, until `counts` are taken; then rounds go on. Rows of the batch are independent.
"""


# %% answer=choose only=choose:shares
def choose(scores, masked, counts):
    """As `surest`, but in rounds, one place from each line of the grid a round."""
    ### BEGIN SOLUTION
    (b, n), side = scores.shape, math.isqrt(scores.shape[1])
    by_line = scores.masked_fill(~masked, -math.inf).view(b, side, side)
    place = (
        by_line.argsort(-1, descending=True).argsort(-1).view(b, n)
    )  # the round in which it is offered
    kept = torch.zeros_like(masked)
    for row, count in enumerate(counts.tolist()):
        order = [i for i in range(n) if masked[row, i]]
        order.sort(key=lambda i: (int(place[row, i]), -float(scores[row, i])))
        kept[row, order[:count]] = True
    return kept
    ### END SOLUTION


# %% test=test_choose points=10 only=choose:shares
_scores = torch.tensor([[9.0, 8, 7, 1, 2, 3, 4, 6, 5]])  # 3 x 3: the first line is the surest
_all = torch.ones(1, 9, dtype=torch.bool)
assert choose(_scores, _all, torch.tensor([3])).nonzero()[:, 1].tolist() == [0, 5, 7]
### BEGIN HIDDEN TESTS
assert choose(_scores, _all, torch.tensor([0])).sum() == 0
assert choose(_scores, _all, torch.tensor([5])).nonzero()[:, 1].tolist() == [0, 1, 5, 7, 8]
assert choose(_scores, _all, torch.tensor([9])).all()


def _reference(s, m, k):
    side, taken = math.isqrt(len(s)), []
    left = {i for i in range(len(s)) if m[i]}
    while len(taken) < k:
        offers = [
            max((i for i in left if i // side == r), key=lambda i: s[i], default=None)
            for r in range(side)
        ]
        for i in sorted((i for i in offers if i is not None), key=lambda i: -s[i]):
            if len(taken) < k:
                taken.append(i)
                left.discard(i)
    return sorted(taken)


_s, _m = torch.randn(60, 25, generator=seeded()), torch.rand(60, 25, generator=seeded(1)) < 0.7
_k = (torch.rand(60, generator=seeded(2)) * (_m.sum(1) + 1)).long()
_kept = choose(_s.clone(), _m.clone(), _k)
for _row in range(60):
    _want = _reference(_s[_row].tolist(), _m[_row].tolist(), int(_k[_row]))
    assert _kept[_row].nonzero()[:, 0].tolist() == _want, (
        f"scores {_s[_row].tolist()}, {int(_k[_row])} places"
    )
### END HIDDEN TESTS

# %% [markdown] only=choose:frontier
r"""
### 2.3 Variant: from what is known outwards (14 points)

A place with a known neighbour is easier to guess, and inpainting looks best when it grows from the rim. Write
`choose(scores, masked, counts)` with the interface of `surest`, for a square grid of side $\sqrt N$, token $(r, c)$ at $r \cdot side + c$:

masked places with at least one *known* (not masked) 4-neighbour (above, below, left, right) come first, from the highest score
down; if these are fewer than `counts`, the other masked places follow, from the highest score down. What is known is judged
once, at the beginning of the call. Rows of the batch are independent; the left and right rims of the grid do not touch.
"""


# %% answer=choose only=choose:frontier
def choose(scores, masked, counts):
    """As `surest`, but places beside known ones come first."""
    ### BEGIN SOLUTION
    side = math.isqrt(scores.shape[1])
    known = F.pad((~masked).view(-1, side, side), (1, 1, 1, 1))
    beside = known[:, :-2, 1:-1] | known[:, 2:, 1:-1] | known[:, 1:-1, :-2] | known[:, 1:-1, 2:]
    inner = surest(
        scores, masked, masked.sum(1)
    )  # all masked ones, to rank them within their class
    rank = scores.masked_fill(~inner, -math.inf).argsort(1).argsort(1)  # 0 = worst
    return surest((rank + scores.shape[1] * beside.flatten(1)).float(), masked, counts)
    ### END SOLUTION


# %% test=test_choose points=10 only=choose:frontier
_scores = torch.tensor([[0.0, 1, 9, 2, 8, 7, 6, 5, 4]])  # 3 x 3, and place 0 is known
_masked = torch.ones(1, 9, dtype=torch.bool)
_masked[0, 0] = False
assert choose(_scores, _masked, torch.tensor([2])).nonzero()[:, 1].tolist() == [1, 3]
### BEGIN HIDDEN TESTS
assert choose(_scores, _masked, torch.tensor([0])).sum() == 0
assert choose(_scores, _masked, torch.tensor([3])).nonzero()[:, 1].tolist() == [1, 2, 3]
assert choose(_scores, torch.ones_like(_masked), torch.tensor([2])).nonzero()[:, 1].tolist() == [
    2,
    4,
]


def _reference(s, m, k):
    side = math.isqrt(len(s))

    def beside(i):
        return any(
            not m[j] and abs(i // side - j // side) + abs(i % side - j % side) == 1
            for j in range(len(s))
        )

    return sorted(
        sorted((i for i in range(len(s)) if m[i]), key=lambda i: (not beside(i), -s[i]))[:k]
    )


_s, _m = 30 * torch.randn(60, 25, generator=seeded()), torch.rand(60, 25, generator=seeded(1)) < 0.8
_k = (torch.rand(60, generator=seeded(2)) * (_m.sum(1) + 1)).long()
_kept = choose(_s.clone(), _m.clone(), _k)
for _row in range(60):
    _want = _reference(_s[_row].tolist(), _m[_row].tolist(), int(_k[_row]))
    assert _kept[_row].nonzero()[:, 0].tolist() == _want, (
        f"scores {_s[_row].tolist()}, {int(_k[_row])} places"
    )
### END HIDDEN TESTS

# %% [markdown]
r"""
Both ways to choose, in a world whose every probability is known. Twelve pictures of 64 tokens are mixed; a good sampler draws
from one of them at a time. The number is the mean log-likelihood under the true world of what was drawn, in nats per token, with its
95% interval over the pictures. Exact samples stand first, and *their* number is the aim: below it, pictures are mixed up; above it, the
sampler repeats what is likeliest and leaves out the rest. Two numbers with margins $a$ and $b$ differ by their difference
$\pm \sqrt{a^2 + b^2}$. You may change this cell, and need it in part 4.
"""

# %%
world = MixtureWorld.random(modes=12, grid=(8, 8), codebook_size=6, seed=1)


def nats(tokens):
    return mean_interval(world.log_prob(tokens) / 64)._replace(format=".3f").short()


print(f"exact samples       {nats(world.sample(500, seeded()))}")
try:
    for steps in (2, 4, 8, 16):
        for ways in (surest, choose):
            *_, drawn = decode(
                world,
                torch.full((200, 64), 6),
                mask_id=6,
                steps=steps,
                power=1.0,
                generator=seeded(),
                choose=ways,
            )
            print(f"{steps:2} steps, {ways.__name__:8}  {nats(drawn)}")
except NotImplementedError:
    print("decode and choose are still to be written")

# %% test=test_choose_in_decode points=4
for _start in (torch.full((3, 16), 4), torch.tensor([[4, 0, 4, 4] * 4, [1] * 8 + [4] * 8])):
    _states = [
        _start,
        *decode(
            lambda t, u: torch.zeros(len(t), 16, 4),
            _start,
            mask_id=4,
            steps=3,
            power=1.0,
            generator=seeded(),
            choose=choose,
        ),
    ]
    assert not (_states[-1] == 4).any(), "something is still masked"
    assert all((a == b)[a != 4].all() for a, b in pairwise(_states)), "a fixed token changed"
### BEGIN HIDDEN TESTS
_called = []


def _spy(scores, masked, counts):
    _called.append(counts.tolist())
    return choose(scores, masked, counts)


list(
    decode(
        lambda t, u: torch.zeros(2, 16, 4),
        torch.full((2, 16), 4),
        mask_id=4,
        steps=3,
        power=1.0,
        generator=seeded(),
        choose=_spy,
    )
)
assert _called == [[3, 3], [5, 5], [8, 8]], f"choose was asked for {_called}"
### END HIDDEN TESTS

# %% [markdown]
r"""
## 3. Tests that find mistakes (20 points)

Code of this kind is wrong in silence: it runs, shapes are right, pictures come out, a little worse. The **bug zoo** holds
mistakes that real code bases made, each a copy of our package with one line changed. Some of them are in `masking`, `sampler` and `utils`.
Your tests are to find them. (`zoo.py` lies
beside this notebook. Write your tests first; what you find yourself is what you will find again.)

A test is a function of one argument, a library, whose modules are `lib.masking`, `lib.sampler` and so on. It raises (`assert`
is enough) where something is wrong. It must be silent with the true package: a test that cries wolf there kills nothing, and
costs 2 points. Each test may take a second or so. Call the functions as the package's docstrings say, and seed what is random.
"""

# %% answer=zoo_tests


def test_counts_sum(lib):  # an example, which finds nothing much
    assert sum(lib.masking.reveal_counts(64, 8)) == 64


TESTS = [test_counts_sum]

### BEGIN SOLUTION


def test_rates(lib):
    r = lib.masking.sample_mask_rate(20_000, generator=seeded())
    assert abs(r.mean() - 2 / math.pi) < 0.01
    assert abs((r > 0.9).float().mean() - 0.287) < 0.015


def test_rates_differ(lib):
    assert len(set(lib.masking.sample_mask_rate(8, generator=seeded()).tolist())) == 8


def test_loss_is_blind_to_shown_tokens(lib):
    logits, masked = torch.randn(1, 3, 5, generator=seeded()), torch.tensor([[True, False, True]])
    losses = [
        lib.masking.masked_cross_entropy(logits, torch.tensor([[1, t, 2]]), masked)
        for t in range(5)
    ]
    assert len({x.item() for x in losses}) == 1


def test_unknown_names_are_refused(lib):
    try:
        lib.masking.get_schedule("cosin")
    except ValueError:
        return
    raise AssertionError


def test_maskgits_table(lib):
    assert lib.masking.reveal_counts(256, 12) == [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]


def test_neighbours_do_not_matter(lib):
    both = lib.utils.uniforms(2, 3, generator=[seeded(1), seeded(2)])
    assert both[1:].equal(lib.utils.uniforms(1, 3, generator=[seeded(2)]))


def test_given_tokens_stay(lib):
    def logits_fn(tokens, u):
        return torch.randn(1, 6, 9, generator=seeded(int(10 * u)))

    given = torch.tensor([[9, 3, 9, 1, 9, 9]])
    *_, last = lib.sampler.decode(logits_fn, given, mask_id=9, steps=3, generator=seeded())
    assert last.tokens[0, [1, 3]].tolist() == [3, 1]


def test_ranking_noise(lib):
    logits = torch.where(torch.arange(8) < torch.tensor([[2], [8]]), 0.0, -1e4).expand(4000, 2, 8)
    how = {"mask_id": 8, "steps": 2, "choice_temperature": 2.0, "generator": seeded()}
    first = next(iter(lib.sampler.decode(lambda t, u: logits, torch.full((4000, 2), 8), **how)))
    assert abs(first.revealed[:, 0].float().mean() - 0.8) < 0.03


def test_progress(lib):
    seen = []

    def logits_fn(tokens, u):
        seen.append(u)
        return torch.zeros(1, 8, 8)

    list(lib.sampler.decode(logits_fn, torch.full((1, 8), 8), mask_id=8, steps=5))
    assert seen == [0, 0.25, 0.5, 0.75, 1]


def test_rare_codes(lib):
    logits, x = torch.tensor([[[1.0, 1e-9]]]).log(), torch.tensor([[1 - 5e-10]], dtype=torch.double)
    assert lib.sampler.draw(logits, x, 1.0).item() == 1


def test_regions_of_two_sizes(lib):
    start = torch.tensor([[8, 8, 1, 2, 3, 4], [8] * 6])
    *_, last = lib.sampler.decode(lambda t, u: torch.zeros(2, 6, 8), start, mask_id=8, steps=2)
    assert (last.tokens < 8).all()


TESTS += [
    test_rates,
    test_rates_differ,
    test_loss_is_blind_to_shown_tokens,
    test_unknown_names_are_refused,
    test_maskgits_table,
    test_neighbours_do_not_matter,
    test_given_tokens_stay,
    test_ranking_noise,
    test_progress,
    test_rare_codes,
    test_regions_of_two_sizes,
]
### END SOLUTION

# %% test=test_zoo points=20
_mutants = [m for m in zoo.MUTANTS if m.room in ("masking", "sampler", "utils")]
_score = zoo.score(TESTS, _mutants)
print(
    f"{len(_score.killed)} of {len(_mutants)} mistakes found; false alarms: {_score.false_alarms or 'none'}"
)
assert len(_score.killed), "no mistake is found"
round(max(0.0, 20 * len(_score.killed) / len(_mutants) - 2 * len(_score.false_alarms)), 1)

# %% [markdown]
r"""
## 4. An explanation (15 points)

In at most 300 words, for a reader who has seen neither part:

1. Why does revealing many tokens in one step make pictures worse, even when the model is perfect? Make an example of two
   tokens. (5)
2. Why is the training rate not a fixed 15%, as BERT's? Say what the model would meet in decoding that it had never met. (4)
3. What does your variant of 2.3 change in the numbers above, at few and at many steps? Quote them with their intervals, say what you expected
   before you ran it, and name one reason why such numbers from one world may mislead. (6)

Full points for what is right, said in your own words, and tied to your numbers; half where a claim is right and not argued;
none for a text that would fit any variant.
"""

# %% [markdown] written=explanation points=15
r"""
*(A model answer.)* Tokens drawn in the same step are drawn independently, each from its own marginal. Take two tokens that are
either both red or both blue, with equal odds. Each marginal is half red, half blue, and exactly right; drawn together they are
of different colours half of the time, which never happens in truth. Drawn one after the other, the second sees the first.

Decoding begins with an empty grid and ends with a nearly full one. A model trained at 15% has never seen an empty grid; what it
says there, where the picture is decided, is a guess outside of what it learned. Muse's density puts 29% of all training
examples above a rate of 0.9.

The third point depends on the variant: compare the printed numbers at 2 and at 16 steps, expect differences where many tokens
are drawn at once and none in the limit of one a step, and say that this world has no neighbours: its tokens depend on which of
twelve pictures is drawn, and on nothing else, so what helps with neighbours cannot show here.
"""
