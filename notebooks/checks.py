"""Instant checks for the exercises of the notebooks and assignments.

    check_guide(my_guide) -> a Verdict: all properties hold, or which one fails, with a small counter-example

A check takes a function of yours, called with the arguments of the package's own, and raises nothing: what it raises is
part of the verdict, and `assert check_guide(my_guide)` works. Properties are tried from the simplest up.
Not here: the exercises (`notebooks/`).
"""

import math
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.masking import reveal_counts
from minimuse.text import Context
from minimuse.transformer import Layer

Given = Callable[..., Any]  # what a student wrote


class Verdict(NamedTuple):
    """True where all holds; Jupyter shows what it says."""

    check: str
    properties: int  # tried
    failed: str = ""  # the first that does not hold
    found: str = ""  # its counter-example

    def __bool__(self) -> bool:
        return not self.failed

    def __repr__(self) -> str:
        if self:
            return f"{self.check}: all {self.properties} properties hold"
        return f"{self.check} FAILS: {self.failed}\n    {self.found}"


class _Wrong(Exception):
    """A counter-example."""


def _check(properties: Callable[[Given], Iterator[str]]) -> Callable[[Given], Verdict]:
    """A generator that names each property, then raises where it does not hold -> a check."""

    @wraps(properties)
    def check(fn: Given) -> Verdict:
        tried, found = [], ""
        try:
            for name in properties(fn):
                tried.append(name)
        except _Wrong as wrong:
            found = str(wrong)
        except Exception as error:
            found = f"your function, or what was done with its result, raised {type(error).__name__}: {error}"
        return Verdict(properties.__name__, len(tried), tried[-1] if found else "", found)

    return check


def _expect(holds: Any, wrong: str) -> None:
    if not holds:
        raise _Wrong(wrong)


def _shaped(call: str, got: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    none = " (is its body still to be written?)" if got is None or got is ... else ""
    _expect(isinstance(got, Tensor), f"{call} gave {got!r}, no tensor{none}")
    _expect(got.shape == shape, f"{call} has shape {tuple(got.shape)}; expected {shape}")
    _expect(dtype in (None, got.dtype), f"{call} is of {got.dtype}; expected {dtype}")
    return got


def _same(call: str, got: Any, want: Any) -> None:
    """Numbers or tensors that should agree, in shape too."""
    want = torch.as_tensor(want)
    got = torch.as_tensor(got) if isinstance(got, int | float) else got
    _shaped(call, got, tuple(want.shape))
    said = [[round(v, 3) for v in x.flatten().tolist()] for x in (got.double(), want.double())]
    _expect(torch.allclose(got.double(), want.double(), atol=1e-4), f"{call} gave {said[0]}; expected {said[1]}")


def _near(what: str, got: Any, want: float, within: float) -> None:
    _expect(abs(got - want) <= within, f"{what} is {float(got):.3f}; expected {want:.3f}, give or take {within:g}")


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- texts, VQGAN -----------------------------------------------------------------------------------------------------


@_check
def check_pool(fn: Given) -> Iterator[str]:
    """fn(context) -> (B, D), one vector a prompt: the mean of its real text tokens."""
    for name, embeds, mask, want in [
        ("one token is its own mean", [[[3.0, 1.0]]], [[True]], [[3.0, 1.0]]),
        ("each prompt has its own", [[[3.0]], [[1.0]]], [[True], [True]], [[3.0], [1.0]]),
        ("padding does not count", [[[2.0], [4.0], [0.0]]], [[True, True, False]], [[3.0]]),
    ]:
        yield name
        _same(f"fn(embeds {embeds}, mask {mask})", fn(Context(torch.tensor(embeds), torch.tensor(mask))), want)


@_check
def check_nearest(fn: Given) -> Iterator[str]:
    """fn(z (B, d, h, w), codebook (V, d)) -> tokens (B, h*w), row by row: as `VectorQuantizer.nearest`."""
    grid = torch.randn(2, 3, 4, generator=_seeded()).round(decimals=1).tolist()  # h, w, d
    for name, places, codes in [
        ("a code is nearest to itself", [[[1.0]]], [[0.0], [1.0]]),
        ("nearest by distance, not by product", [[[2.0]]], [[1.0], [9.0]]),
        ("tokens are read row by row, a vector from each place", grid, grid[1] + grid[0]),
    ]:
        yield name
        z, book = torch.tensor(places), torch.tensor(codes)
        call = f"fn(z of places {places}, codebook {codes})"
        got = _shaped(call, fn(z.permute(2, 0, 1)[None], book), (1, z.shape[0] * z.shape[1]), torch.long)
        _same(call, got, torch.cdist(z.flatten(0, 1), book).argmin(1)[None])


@_check
def check_straight_through(fn: Given) -> Iterator[str]:
    """fn(z, q) -> the value of q with the gradient of z."""
    z, q = torch.tensor([0.3, 2.0], requires_grad=True), torch.tensor([0.0, 3.0], requires_grad=True)
    yield "forwards it is q"
    out, sent = fn(z, q), torch.tensor([1.0, 5.0])
    _same("fn(z=[0.3, 2.0], q=[0.0, 3.0])", out, q.detach())
    yield "backwards the gradient passes to z as it is"
    _expect(out.requires_grad, "nothing in the result has a gradient: what is detached?")
    grads = torch.autograd.grad((out * sent).sum(), (z, q), allow_unused=True)
    got = [torch.zeros(2) if g is None else g for g in grads]
    _same("a gradient of [1, 5] at the result: z's", got[0], sent)
    yield "on this way no gradient reaches q"
    _same("a gradient of [1, 5] at the result: q's", got[1], 0 * sent)


@_check
def check_psnr(fn: Given) -> Iterator[str]:
    """fn(images, again), both (B, C, H, W) in [-1, 1] -> (B,) dB of pixels in [0, 1]: as `eval_metrics.psnr`."""
    zeros = torch.zeros(1, 3, 2, 2)
    for name, again, want in [
        ("10 log10(1 / MSE), pixels in [0, 1]", [0.2], [20.0]),  # a tenth of the range
        ("one figure an image, not of the batch", [0.2, 2.0], [20.0, 0.0]),
    ]:
        yield name
        shifted = torch.cat([zeros + by for by in again])
        _same(f"fn(B gray images, the same + {again})", fn(torch.zeros_like(shifted), shifted), want)
    yield "the error is squared before it is averaged"
    half = torch.tensor([0.0, 2.0]).repeat(6).view(1, 3, 2, 2)
    _same("fn(0 everywhere, 2 in every other pixel)", fn(zeros, half), [10 * math.log10(2)])


@_check
def check_grow(fn: Given) -> Iterator[str]:
    """fn(weight (O, I), outputs, inputs) -> (outputs, inputs), at least as large: as `VQGAN.grow_decoder`."""
    old, old_inputs, new_inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0]), torch.ones(3)
    torch.manual_seed(0)
    yield "the old weights fill the leading block"
    new = _shaped("fn(2 x 2, 4, 5)", fn(old.clone(), 4, 5), (4, 5))
    _same("fn([[1, 2], [3, 4]], 4, 5)[:2, :2]", new[:2, :2], old)
    yield "old outputs stay, whatever the new inputs bring"
    _same(
        "inputs [1, -1] and new ones of 1: the old outputs", (new @ torch.cat([old_inputs, new_inputs]))[:2], [-1, -1]
    )
    yield "new outputs are not all zero, or they would never learn"
    _expect(new[2:].abs().sum() > 0, f"the new rows are {new[2:].tolist()}")


# --- masking ----------------------------------------------------------------------------------------------------------


@_check
def check_schedule(fn: Given) -> Iterator[str]:
    """fn(u) -> the ratio still masked: any curve that falls from 1 to 0."""
    for name, u, want in [("at u = 0 all is masked", 0.0, 1.0), ("at u = 1 nothing is", 1.0, 0.0)]:
        yield name
        _same(f"fn({u})", fn(u), want)
    yield "it never rises"
    for u, v in pairwise(i / 20 for i in range(21)):
        _expect(fn(v) <= fn(u) + 1e-6, f"fn({u}) = {fn(u):.4f}, and fn({v}) = {fn(v):.4f} is more")


@_check
def check_mask_rate(fn: Given) -> Iterator[str]:
    """fn(n, generator=...) -> (n,) rates, one an example, of Muse's density: as `masking.sample_mask_rate`."""
    yield "one rate an example"
    few = _shaped("fn(3)", fn(3, generator=_seeded()), (3,))
    yield "rates differ within a batch"
    _expect(len(set(few.tolist())) == 3, f"fn(3) gave {few.tolist()}")
    yield "the generator decides"
    again, other = fn(3, generator=_seeded()), fn(3, generator=_seeded(1))
    _expect(few.equal(again), f"the same seed gave {few.tolist()}, then {again.tolist()}")
    _expect(not few.equal(other), f"seeds 0 and 1 both gave {few.tolist()}")
    yield "rates lie in [0, 1]"
    rates = fn(20_000, generator=_seeded()).double()
    low, high = rates.min(), rates.max()
    _expect(low >= 0 and high <= 1, f"rates reach from {low:.3f} to {high:.3f}")
    yield "the mean is 2 / pi"
    _near("the mean of 20,000 rates", rates.mean(), 2 / math.pi, 0.01)
    yield "P(r > 0.9) = 0.287"
    _near("the fraction of 20,000 rates above 0.9", (rates > 0.9).double().mean(), 0.287, 0.015)


@_check
def check_random_mask(fn: Given) -> Iterator[str]:
    """fn(tokens (B, N), rate (B,), generator=...) -> (B, N) bool, True = masked: as `masking.random_mask`."""

    def masks(n: int, *rate: float) -> Tensor:
        shape, call = (len(rate), n), f"fn({len(rate)} x {n} tokens, rates {list(rate)[:3]})"
        made = fn(torch.zeros(shape, dtype=torch.long), torch.tensor(rate), generator=_seeded())
        return _shaped(call, made, shape, torch.bool)

    yield "True says masked"
    _same("fn(one token, rate 1)", masks(1, 1.0), torch.tensor([[True]]))
    yield "exactly ceil(r N) are masked"
    for n, r in product(range(1, 9), (0.01, 0.3, 0.5, 0.75, 1.0)):
        _same(f"of {n} tokens at rate {r} the number masked", masks(n, r).sum(), math.ceil(r * n - 1e-6))
    yield "each row has its own rate"
    _same("of 8 tokens at rates 0.25 and 1 the numbers masked", masks(8, 0.25, 1.0).sum(1), [2, 8])
    yield "each row has its own places"
    rows = masks(16, *[0.5] * 8).tolist()
    _expect(len({tuple(row) for row in rows}) > 1, "8 rows of 16 tokens all mask the same places")
    yield "all places are as likely"
    for place, fraction in enumerate(masks(4, *[0.25] * 4000).double().mean(0)):
        _near(f"of 4,000 rows at rate 0.25, the fraction that masks place {place} of 4", fraction, 0.25, 0.04)


@_check
def check_masked_loss(fn: Given) -> Iterator[str]:
    """fn(logits (B, N, V), targets (B, N), masked (B, N)) -> (): as `masking.masked_cross_entropy`."""
    sure, good, bad = [2.0, 0.0], math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))  # cost of targets 0 and 1
    for name, logits, targets, masked, want in [
        ("equal logits cost log V", [[[0.0, 0.0]]], [[1]], [[1]], math.log(2)),
        ("it is the cross-entropy of the target", [[sure]], [[1]], [[1]], bad),
        ("tokens that are not masked do not count", [[sure] * 2], [[0, 1]], [[1, 0]], good),
        ("the mean is over the batch's masked tokens", [[sure] * 2] * 2, [[1, 0], [0, 0]], [[1, 0], [1, 1]], None),
        ("nothing masked costs 0", [[sure]], [[0]], [[0]], 0.0),
    ]:
        yield name
        given = (torch.tensor(logits), torch.tensor(targets), torch.tensor(masked).bool())
        want = (bad + 2 * good) / 3 if want is None else want
        _same(f"fn(logits {logits}, targets {targets}, masked {masked})", fn(*given), want)


@_check
def check_unigram(fn: Given) -> Iterator[str]:
    """fn(tokens (n, N), codebook_size) -> nats: as `train_log.unigram_entropy`."""
    for name, tokens, size, want in [
        ("one code alone has none", [[0, 0]], 1, 0.0),
        ("two codes, equally common, have log 2", [[0, 1]], 2, math.log(2)),
        ("codes that never occur do no harm", [[0, 3]], 8, math.log(2)),
        ("how common each is counts", [[0, 0, 0, 1]], 2, 2 * math.log(2) - 0.75 * math.log(3)),
        ("it is of all pictures together", [[0, 0], [1, 1]], 2, math.log(2)),
    ]:
        yield name
        _same(f"fn(tokens {tokens}, {size})", fn(torch.tensor(tokens), size), want)


# --- transformers -----------------------------------------------------------------------------------------------------


@_check
def check_attention(fn: Given) -> Iterator[str]:
    """fn(q (B, H, N, d), k, v (B, H, M, d), attend (B, 1, 1, M) bool) -> (B, H, N, d), True = may be looked at."""
    for name, q, k, v, attend in [
        ("keys alike: the mean of the values", [[0.0]], [[1.0], [1.0]], [[2.0], [4.0]], [1, 1]),
        ("weights are a softmax over the memory", [[1.0]], [[2.0], [1.0]], [[1.0], [0.0]], [1, 1]),
        ("scores are divided by sqrt(d)", [[1.0] * 4], [[1.0] * 4, [0.0] * 4], [[1.0] * 4, [0.0] * 4], [1, 1]),
        ("each query has its own weights", [[1.0], [-1.0]], [[2.0], [0.0]], [[1.0], [0.0]], [1, 1]),
        ("what is not attended does not count", [[1.0]], [[0.0], [9.0]], [[3.0], [5.0]], [1, 0]),
    ]:
        yield name
        given = [torch.tensor(x)[None, None] for x in (q, k, v)]
        may = torch.tensor(attend).bool()[None, None, None]
        call = f"fn(q {q}, k {k}, v {v}, attend {attend})"
        _same(call, fn(*given, may), F.scaled_dot_product_attention(*given, attn_mask=may))


@_check
def check_multi_axis(fn: Given) -> Iterator[str]:
    """fn(q, k, v (B, H, N, d), block) -> (B, H, N, d): as `transformer.multi_axis_attention`."""
    row, column, q = torch.arange(16) // 4, torch.arange(16) % 4, torch.zeros(1, 2, 16, 16)
    v = torch.eye(16).expand_as(q)  # all weights alike and values that tell tokens apart: the output says who is seen
    for head, name, group in [
        (0, "the first half of the heads sees its own block", row // 2 * 2 + column // 2),
        (1, "the second half sees its own place in every block", row % 2 * 2 + column % 2),
    ]:
        yield name
        got = _shaped("fn(1 x 2 heads x 16 tokens)", fn(q, q, v, 2), (1, 2, 16, 16))
        for i in range(16):
            sees, want = ((x.nonzero().flatten().tolist()) for x in (got[0, head, i] > 1e-6, group == group[i]))
            _expect(sees == want, f"4 x 4 tokens, block 2: token {i} of head {head} sees {sees}; expected {want}")
    yield "weights are softmax(q k / sqrt(d))"
    q, k, v = torch.randn(3, 1, 2, 4, 2, generator=_seeded())
    _same(
        "one block of 4 tokens: the first head", fn(q, k, v, 2)[:, :1], F.scaled_dot_product_attention(q, k, v)[:, :1]
    )


@_check
def check_join_memory(fn: Given) -> Iterator[str]:
    """fn(text (B, L, D), mask (B, L), low (B, K, D)) -> entries (B, L + K, D), attend (B, L + K): as in `memory`."""
    text, low = torch.tensor([[[1.0], [0.0]], [[5.0], [6.0]]]), torch.tensor([[[2.0], [3.0], [4.0]]] * 2)
    mask, call = torch.tensor([[True, False], [True, True]]), "fn(2 texts of 2 tokens, 3 low-res entries)"
    yield "along the sequence, the text first, then the low-res entries"
    entries, attend = fn(text, mask, low)
    _same(f"{call}: entries", entries, [[[1.0], [0.0], [2.0], [3.0], [4.0]], [[5.0], [6.0], [2.0], [3.0], [4.0]]])
    yield "padding is not attended to, low-res entries always are"
    _shaped(f"{call}: attend", attend, (2, 5), torch.bool)
    _same(f"{call}: attend", attend, [[True, False, True, True, True], [True] * 5])


# --- guidance, decoding -----------------------------------------------------------------------------------------------


@_check
def check_drop_text(fn: Given) -> Iterator[str]:
    """fn(context, p, generator=...) -> the same shape, a fraction p of the texts removed: as `cfg.drop_text`."""

    def run(b: int, p: float) -> Context:
        made = Context(*fn(Context(torch.ones(b, 2, 1), torch.ones(b, 2, dtype=torch.bool)), p, generator=_seeded()))
        call = f"fn({b} texts of 2 tokens, p={p})"
        return Context(_shaped(call, made.embeds, (b, 2, 1)), _shaped(call, made.mask, (b, 2), torch.bool))

    yield "p = 0 leaves all as it is"
    _same("p = 0: the embeddings of a text", run(1, 0.0).embeds, torch.ones(1, 2, 1))
    _same("p = 0: its mask", run(1, 0.0).mask, [[True, True]])
    yield "a fraction p is removed, each text by itself"
    removed = (run(4000, 0.1).embeds == 0).all(1).double().mean()
    _near("p = 0.1: of 4,000 texts the fraction removed", removed, 0.1, 0.03)
    yield "removed text has no text token in its mask"
    _same("p = 1: the mask of a removed text", run(1, 1.0).mask, [[False, False]])


@_check
def check_guide(fn: Given) -> Iterator[str]:
    """fn(cond, uncond, t) -> guided logits: as `cfg.guide`."""
    for name, c, u, t, want in [
        ("t = 0 gives the conditional logits", 2.0, 1.0, 0.0, 2.0),
        ("cond = uncond gives cond, whatever t", 2.0, 2.0, 3.0, 2.0),
        ("l_g = (1 + t) l_c - t l_u", 2.0, 1.0, 3.0, 5.0),
    ]:
        yield name
        _same(f"fn(cond=[{c}], uncond=[{u}], t={t})", fn(torch.tensor([c]), torch.tensor([u]), t), [want])


@_check
def check_rising(fn: Given) -> Iterator[str]:
    """fn(t, start) -> a function of u: as `cfg.rising`."""
    for name, u, want in [("it begins at start", 0.0, 1.0), ("it ends at t", 1.0, 4.0), ("it is linear", 0.5, 2.5)]:
        yield name
        ramp = fn(4.0, 1.0)
        _expect(callable(ramp), f"fn(4.0, 1.0) gave {ramp!r}; expected a function of u")
        _same(f"fn(4.0, 1.0)({u})", ramp(u), want)


@_check
def check_reveal_counts(fn: Given) -> Iterator[str]:
    """fn(n, steps) -> how many tokens each step of the cosine reveals: as `masking.reveal_counts`."""
    for name, holds in [
        ("counts sum to n", lambda counts, n, steps: sum(counts) == n),
        ("each step reveals at least one", lambda counts, n, steps: min(counts) >= 1),
        ("as many steps as asked for, or as tokens", lambda counts, n, steps: len(counts) == min(n, steps)),
    ]:
        yield name
        for n, steps in product(range(1, 9), range(1, 9)):
            _expect(holds(fn(n, steps), n, steps), f"fn({n}, {steps}) gave {fn(n, steps)}")
    yield "after step i, floor(n cos(pi/2 (i+1)/T)) stay masked"
    for n, steps in [(4, 2), (16, 4), (256, 12)]:
        _same(f"fn({n}, {steps})", torch.tensor(fn(n, steps)), reveal_counts(n, steps))


@_check
def check_decode(fn: Given) -> Iterator[str]:
    """fn(logits_fn, tokens (B, N), mask_id=, steps=, generator=) -> after each step the tokens, or a `sampler.Step`."""
    n, steps, mask, widths = 8, 4, 8, torch.tensor([3, 1, 8, 6, 2, 5, 7, 4])
    among = torch.where(torch.arange(8) < widths[:, None], 0.0, -1e4)  # (N, V): place i draws among widths[i] alike
    blank, given, seen = torch.full((1, n), mask), torch.tensor([[mask, 3, mask, mask, 1, mask, mask, mask]]), []

    def model(tokens: Tensor, u: float) -> Tensor:
        seen.append(tokens.clone())
        return among.expand(len(tokens), n, 8)

    def fickle(tokens: Tensor, u: float) -> Tensor:  # wants another code at each step
        return 50.0 * F.one_hot((tokens == mask).sum(1, keepdim=True).expand(-1, n) % 8, 8)

    def coin(tokens: Tensor, u: float) -> Tensor:
        return torch.tensor([0.8, 0.2]).log().expand(len(tokens), 1, 2)

    def run(logits_fn: Given, start: Tensor, steps: int = steps) -> list[Tensor]:
        made = fn(logits_fn, start.clone(), mask_id=mask, steps=steps, generator=_seeded())
        states = [getattr(state, "tokens", state) for state in made]
        return [start, *(_shaped("a state", state, tuple(start.shape), torch.long).clone() for state in states)]

    yield "in the end nothing is masked"
    _same("the number of [MASK] left", (run(model, blank)[-1] == mask).sum(), 0)
    yield "each step reveals what the cosine says"
    left = [int((state == mask).sum()) for state in run(model, blank)]
    _same("8 tokens in 4 steps: counts", torch.tensor([a - b for a, b in pairwise(left)]), reveal_counts(n, steps))
    for name, start in [("what is revealed stays", blank), ("what was given stays", given)]:
        yield name
        for i, (a, b) in enumerate(pairwise(run(fickle, start))):
            _expect((a == b)[a != mask].all(), f"step {i}: {a.tolist()} became {b.tolist()}, where {mask} is [MASK]")
    yield "the surest are revealed first"
    states, surest = run(model, blank), widths.argsort().tolist()
    for i, (a, b) in enumerate(pairwise(states)):
        places = ((a == mask) & (b != mask))[0].nonzero().flatten().tolist()
        best, surest = sorted(surest[: len(places)]), surest[len(places) :]
        _expect(places == best, f"step {i} fixed places {places} of {n}; the model is surest at {best}")
    yield "the model sees what was revealed"
    seen.clear()
    states = run(model, blank)
    same = len(seen) == steps and all(a.equal(b) for a, b in zip(states, seen, strict=False))
    _expect(same, f"it was asked {len(seen)} times in {steps} steps, not always about the tokens of the step before")
    yield "tokens are drawn, each with its probability"
    fraction = (run(coin, torch.full((2000, 1), mask), 1)[-1] == 0).double().mean()
    _near("a token of probability 0.8: its fraction of 2,000 draws", fraction, 0.8, 0.05)


# --- editing, the schedule lab ----------------------------------------------------------------------------------------


@_check
def check_token_mask(fn: Given) -> Iterator[str]:
    """fn(repaint (B, H, W) bool, f) -> (B, h*w) bool: as `editing.token_mask`."""
    for name, cases in [
        ("nothing to repaint masks nothing", [()]),
        ("one pixel masks its token", [(pixel,) for pixel in product(range(4), range(6))]),
        ("a region masks all that it overlaps", [((1, 1), (1, 2), (2, 1), (2, 2))]),
    ]:
        yield name
        for pixels in cases:
            repaint, want = torch.zeros(1, 4, 6, dtype=torch.bool), {y // 2 * 3 + x // 2 for y, x in pixels}
            for y, x in pixels:
                repaint[0, y, x] = True
            found = _shaped("fn(4 x 6 pixels, f=2)", fn(repaint, 2), (1, 6))[0].nonzero().flatten().tolist()
            _expect(found == sorted(want), f"4 x 6 pixels, f=2: {pixels} mask {found}; expected {sorted(want)}")


@_check
def check_resample_step(fn: Given) -> Iterator[str]:
    """fn(logits_fn, tokens (1, N), mask_id=, fraction=, generator=) -> (1, N): one iteration of `editing.resample`."""
    start, seen = torch.zeros(1, 8, dtype=torch.long), []

    def other(tokens: Tensor, u: float) -> Tensor:  # sure that code 1 stands everywhere
        seen.append(tokens.clone())
        return torch.tensor([-50.0, 50.0]).expand(1, 8, 2)

    def run(fraction: float, seed: int = 0) -> Tensor:
        made = fn(other, start.clone(), mask_id=2, fraction=fraction, generator=_seeded(seed))
        return _shaped(f"fn(8 tokens, fraction={fraction})", made, (1, 8), torch.long)

    yield "every state is a whole picture"
    _same("fraction 0.5: the number of [MASK] left", (run(0.5) == 2).sum(), 0)
    yield "exactly ceil(fraction N) tokens are drawn again"
    for fraction in (0.5, 0.25, 0.08, 1.0):
        call = f"8 tokens of code 0, a model sure of 1, fraction {fraction}: changed"
        _same(call, run(fraction).sum(), math.ceil(8 * fraction))
    yield "the model sees [MASK] there, and all the other tokens"
    _expect((got := seen[-1].tolist()) == [[2] * 8], f"fraction 1: the model saw {got}, where 2 is [MASK]")
    yield "the places are random"
    _expect(len({tuple(run(0.25, seed)[0].tolist()) for seed in range(8)}) > 1, "8 seeds chose the same places")


@_check
def check_margin(fn: Given) -> Iterator[str]:
    """fn(logits (B, N, V), drawn (B, N), masked (B, N), u) -> scores (B, N): as `sampler.margin`."""
    for name, p, drawn in [
        ("two codes alike are no margin", [[0.4, 0.4, 0.2]], 0),
        ("it is the first less the second", [[0.6, 0.3, 0.1]], 0),
        ("codes may come in any order", [[0.1, 0.3, 0.6]], 2),
        ("what was drawn does not count", [[0.6, 0.3, 0.1]], 2),
        ("each token has its own", [[0.6, 0.3, 0.1], [0.5, 0.5, 0.0]], 0),
    ]:
        yield name
        logits, tokens = torch.tensor([p]).clamp(min=1e-9).log() + 3, torch.full((1, len(p)), drawn)
        first, second = torch.tensor([p]).topk(2).values.unbind(-1)
        call = f"fn(logits log {p} + 3, drawn {tokens.tolist()})"
        _same(call, fn(logits, tokens, tokens >= 0, 0.5), first - second)


@_check
def check_threshold(fn: Given) -> Iterator[str]:
    """fn(logits (B, N, V), masked (B, N), u) -> (B,): how many masked tokens have a code of probability 0.9 or more."""
    p = [0.95, 0.6, 0.92, 0.05]  # three of four have such a code
    logits = torch.tensor([[v, 1 - v] for v in p]).log().expand(2, -1, -1) + 3
    for name, masked, want in [
        ("certain tokens count, whichever code it is", [[True] * 4] * 2, [3, 3]),
        ("known tokens do not count, rows have their own number", [[True, True, False, False], [False] * 4], [1, 0]),
    ]:
        yield name
        _same(f"fn(logits log (p, 1 - p) + 3 of p = {p}, masked {masked})", fn(logits, torch.tensor(masked), 0.5), want)


@_check
def check_order(fn: Given) -> Iterator[str]:
    """fn(logits (B, N, V), drawn (B, N), masked (B, N), u) -> scores (B, N): all black fields of a board come first."""
    logits, drawn = torch.zeros(2, 16, 3), torch.zeros(2, 16, dtype=torch.long)
    yield "a score for each place"
    scores = _shaped("fn(logits 2 x 16 x 3, ...)", fn(logits, drawn, drawn == 0, 0.5), (2, 16)).double()
    yield "every black field scores above every white one"
    black = (torch.arange(16) // 4 + torch.arange(16) % 4) % 2 == 0
    low, high = scores[:, black].amin(1), scores[:, ~black].amax(1)
    _expect(
        (low > high).all(), f"4 x 4 fields, the first one black: the least black {low[0]}, the most white {high[0]}"
    )


@_check
def check_world(fn: Given) -> Iterator[str]:
    """fn() -> a `lab_worlds.World`: 4 tokens of 2 codes. The first and the last agree in 9 of 10, others are coins."""
    yield "all pictures together have probability 1"
    world, every = fn(), torch.cartesian_prod(*[torch.arange(2)] * 4)  # (16, 4)
    log_p = _shaped("log_evidence(e of 16 pictures)", world.log_prob(every), (16,)).double()
    _near("the sum of p over all 16 pictures", log_p.exp().sum(), 1.0, 1e-4)
    yield "the first and the last agree in 9 of 10"
    _near("p(x_1 = x_4)", log_p.exp()[every[:, 0] == every[:, 3]].sum(), 0.9, 1e-4)
    yield "the others are fair coins"
    for i in (1, 2):
        _near(f"p(x_{i + 1} = 1)", log_p.exp()[every[:, i] == 1].sum(), 0.5, 1e-4)
    yield "evidence weighs pictures: log of the sum over x of p(x) e_1(x_1) ... e_N(x_N)"
    e = torch.rand(1, 4, 2, generator=_seeded()).double()
    weights = e[0, torch.arange(4), every].prod(1)  # (16,)
    _same("log_evidence(e) of random e", world.log_evidence(e), (log_p.exp() * weights).sum().log()[None])


# --- scaling, diffusion -----------------------------------------------------------------------------------------------


@_check
def check_layer_parameters(fn: Given) -> Iterator[str]:
    """fn(width, mlp_width) -> how many numbers the matrices of one `transformer.Layer` hold."""

    def held(width: int, mlp_width: int) -> int:
        return sum(p.numel() for p in Layer(width, 2, mlp_width, 0, 0.0).parameters() if p.ndim == 2)

    yield "the MLP goes up and down"
    _same("fn(8, 33) - fn(8, 32)", fn(8, 33) - fn(8, 32), held(8, 33) - held(8, 32))
    yield "attention to itself and to the text: four square matrices each"
    for size in ((2, 8), (8, 32)):
        _same(f"fn{size}", fn(*size), held(*size))


@_check
def check_training_flops(fn: Given) -> Iterator[str]:
    """fn(parameters, tokens) -> FLOPs of training a model of matrices, without attention's products."""
    for name, size, want in [
        ("a multiplication and an addition forwards, and two such products backwards", (1, 1), 6),
        ("each parameter meets each token", (100, 7), 4200),
    ]:
        yield name
        _same(f"fn(parameters={size[0]}, tokens={size[1]})", fn(*size), want)


@_check
def check_sharded_bytes(fn: Given) -> Iterator[str]:
    """fn(parameters, processes, sharded) -> bytes on each before any example: AdamW in fp32, and bf16 copies."""
    for name, given, want in [
        ("weight 4, gradient 4, two moments 8, bf16 copy 2", (100, 1, False), 1800),
        ("without sharding each process holds all", (100, 8, False), 1800),
        ("sharded, each holds its part", (100, 8, True), 225),
    ]:
        yield name
        _same(f"fn(parameters={given[0]}, processes={given[1]}, sharded={given[2]})", fn(*given), want)


@_check
def check_nearest_picture(fn: Given) -> Iterator[str]:
    """fn(samples (n, ...), train (m, ...)) -> distances (n,) and indices (n,): root mean square differences."""
    train = torch.tensor([[0.0, 0.0], [10.0, 10.0], [0.0, 20.0]])[:, None].to(torch.uint8)
    samples = torch.tensor([[10.0, 10.0], [3.0, 4.0], [0.0, 18.0]])[:, None].to(torch.uint8)
    yield "which training picture is nearest"
    far, which = fn(samples, train)
    _same("fn of pictures of two pixels: indices", which, torch.tensor([1, 0, 2]))
    yield "a copy is at distance 0"
    _same("fn([10, 10] among [0, 0], [10, 10], [0, 20]): distance", far[0], 0.0)
    yield "the root of the mean of squares, not of their sum"
    _near("fn([3, 4] among them): distance", far[1], 12.5**0.5, 1e-4)


@_check
def check_copied(fn: Given) -> Iterator[str]:
    """fn(samples (n,), held_out (m,), q) -> the fraction of samples below the quantile q of held_out."""
    held_out = torch.arange(101.0)
    yield "held-out pictures themselves: the fraction q"
    _near("fn(held_out, held_out, 0.1)", fn(held_out, held_out, 0.1), 0.1, 0.015)
    yield "copies: all"
    _same("fn(0 everywhere, held_out, 0.1)", fn(torch.zeros(7), held_out, 0.1), 1.0)
    yield "the quantile is q's"
    _same("fn([20, 40, 60, 80], held_out, 0.5)", fn(torch.tensor([20.0, 40, 60, 80]), held_out, 0.5), 0.5)


@_check
def check_add_noise(fn: Given) -> Iterator[str]:
    """fn(x, noise, a) -> x at level a, noise in it: as `baseline_dit.add_noise`, with a itself given."""
    for name, a, want in [
        ("a = 1 leaves the picture", 1.0, 3.0),
        ("a = 0 is noise alone", 0.0, 5.0),
        ("the variance stays: amounts are square roots", 0.36, 5.8),
    ]:
        yield name
        _same(f"fn(x=[3.0], noise=[5.0], a={a})", fn(torch.tensor([3.0]), torch.tensor([5.0]), a), [want])


@_check
def check_ddim_step(fn: Given) -> Iterator[str]:
    """fn(x, noise, now, then) -> x at level `then`: one step of `baseline_dit.ddim`, without clipping."""
    for name, now, then, want in [
        ("then = 1 gives the picture", 0.36, 1.0, 2.0),
        ("nothing moves where then = now", 0.36, 0.36, 0.4),
        ("the same picture and noise, in another ratio", 0.36, 0.64, 1.0),
    ]:
        yield name
        call = f"fn(x=[0.4], noise=[-1.0], now={now}, then={then}), of a picture [2.0],"
        _same(call, fn(torch.tensor([0.4]), torch.tensor([-1.0]), now, then), [want])


# --- evaluation -------------------------------------------------------------------------------------------------------


@_check
def check_paired(fn: Given) -> Iterator[str]:
    """fn(a (n,), b (n,)) -> (mean of a - b, half of its 95% interval): 1.96 standard errors, pair by pair."""
    a, b, rise = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([1.0, 0.0, 3.0, 4.0]), torch.ones(4)
    for name, first, second, want in [
        ("the mean of a - b", a, b, 1.0),
        ("what is common to a and b cancels: its half interval is 0", a + rise, a, 0.0),
        ("1.96 times the standard deviation (n - 1) over the root of n", a, b, 1.96 * (4 / 3) ** 0.5 / 2),
    ]:
        yield name
        found = fn(first, second)
        _same(f"fn({first.tolist()}, {second.tolist()})", found[name[0] != "t"], want)


@_check
def check_wilson(fn: Given) -> Iterator[str]:
    """fn(right, n) -> (low, high): Wilson's 95% interval, as `eval_metrics.proportion_interval`."""
    yield "it holds the fraction itself"
    for right, n in [(1, 2), (9, 10), (0, 3)]:
        low, high = fn(right, n)
        _expect(low - 1e-6 <= right / n <= high + 1e-6, f"fn({right}, {n}) gave {float(low):.3f} to {float(high):.3f}")
    for name, right, n in [
        ("all right is not yet 100%", 2, 2),
        ("none right is not yet 0%", 0, 2),
        ("more pictures make it narrower", 180, 200),
        ("its middle is (p + z^2 / 2n) / (1 + z^2 / n), z = 1.96", 9, 10),
    ]:
        yield name
        p, z2 = right / n, 1.959964**2
        reach = (z2 * (p * (1 - p) / n + z2 / (4 * n * n))) ** 0.5
        want = [(p + z2 / (2 * n) + sign * reach) / (1 + z2 / n) for sign in (-1, 1)]
        _same(f"fn({right}, {n})", torch.tensor([float(end) for end in fn(right, n)]), want)


@_check
def check_frechet(fn: Given) -> Iterator[str]:
    """fn(m1 (D,), C1 (D, D), m2, C2) -> the Frechet distance of two Gaussians, as `eval_metrics.frechet_distance`."""
    zero, unit, plus, minus = [0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], [[5.0, 4.0], [4.0, 5.0]], [[5.0, -4.0], [-4.0, 5.0]]
    for name, m1, c1, m2, c2, want in [
        ("a Gaussian is at 0 from itself", [1.0], [[4.0]], [1.0], [[4.0]], 0.0),
        ("means count by their squared distance", zero, unit, [3.0, 4.0], unit, 25.0),
        ("so do standard deviations, not variances", [0.0], [[1.0]], [0.0], [[9.0]], 4.0),
        ("and correlations", zero, plus, zero, minus, 8.0),
        ("the root is of the matrix C1 C2", zero, [[4.0, 0.0], [0.0, 1.0]], zero, [[2.0, 1.0], [1.0, 2.0]], 0.77122),
    ]:
        yield name
        _same(f"fn({m1}, {c1}, {m2}, {c2})", fn(*map(torch.tensor, (m1, c1, m2, c2))), want)
