# %% [markdown] stubs=cfg,editing
r"""
# Assignment: build guidance and editing

You make a model listen to its text, and change pictures with a model that was only ever trained to fill holes. Then you catch other
people's mistakes, and explain what you saw.

| Part | Points |
|---|---|
| 1. Guidance: text dropped, the formula, one batch of two, and a variant | 35 |
| 2. Editing: masks, infilling, mask-free edits, and a variant | 35 |
| 3. Tests that find mistakes | 15 |
| 4. An explanation | 15 |

**Before this**: notebooks 6 (guidance) and 10 (editing).
**Rules.** Write your code where it says so; cells of tests are put back before grading. What the package holds of this
(`minimuse.cfg`, `minimuse.editing`) raises an error while we grade; `minimuse.sampler.decode` and `minimuse.masking.random_mask`
are yours to use. Read the package as much as you like, say in a comment what you took from where, and know that two of the tasks
are in no package. Every cell of tests may take 30 seconds, and runs on a CPU.
"""

# %% locked=setup
import math
import sys
from functools import partial

import torch
import zoo
from torch.nn import functional as F

sys.path.append("..")  # in a clone, checks.py stands one folder up
from checks import check_drop_text, check_guide, check_rising, check_token_mask

from minimuse.eval_metrics import jackknife, mean_interval, proportion_interval
from minimuse.lab_worlds import MixtureWorld
from minimuse.masking import random_mask
from minimuse.sampler import decode
from minimuse.text import Context


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
r"""
## 1. Guidance (35 points)

### 1.1 The formula and its ramp (6 points)

With $\ell_c$ the logits that know the text and $\ell_u$ those that do not, $\ell_g = (1 + t)\,\ell_c - t\,\ell_u$ (Muse 2.7). Where both
agree, the result is $\ell_c$ exactly, whatever $t$. `t` is a number, or a tensor $(B,)$ with a scale for each image. `rising(t, start, until)`
gives a function of progress $u$ that goes from `start` at $u = 0$ to $t$ at $u =$ `until` on a straight line, and stays there.
"""


# %% answer=guide
def guide(cond, uncond, t):
    """cond, uncond (B, N, V) -> guided logits (B, N, V)."""
    ### BEGIN SOLUTION
    if isinstance(t, torch.Tensor) and t.dim() == 1:
        t = t[:, None, None]  # (B, 1, 1)
    return cond + t * (cond - uncond)
    ### END SOLUTION


def rising(t, start, until):
    """-> a function of u; 0 < until <= 1."""
    ### BEGIN SOLUTION
    return lambda u: start + (t - start) * min(u / until, 1)
    ### END SOLUTION


# %% test=test_guide points=6
assert check_guide(guide), check_guide(guide)
_ramp = partial(rising, until=1.0)
assert check_rising(_ramp), check_rising(_ramp)
assert [rising(4.0, 1.0, 0.5)(u) for u in (0.25, 0.5, 0.9)] == [2.5, 4.0, 4.0], "it stays at t"
_c, _n = torch.tensor([[[2.0]], [[2.0]]]), torch.tensor([[[1.0]], [[1.0]]])
assert guide(_c, _n, torch.tensor([1.0, 3.0])).flatten().tolist() == [3.0, 5.0], "a scale an image"
### BEGIN HIDDEN TESTS
_c, _n = torch.randn(2, 3, 5, 7, generator=seeded())
assert guide(_c, _c.clone(), 1e6).equal(_c), (
    "where both agree, the result is the conditional exactly"
)
assert torch.allclose(guide(_c, _n, 2.5), 3.5 * _c - 2.5 * _n, atol=1e-4)
_t = torch.tensor([0.0, 1.0, 4.0])
_want = torch.stack([(1 + t) * c - t * n for t, c, n in zip(_t, _c, _n, strict=True)])
assert torch.allclose(guide(_c, _n, _t), _want, atol=1e-4), "each image has its own scale"
assert abs(rising(3.0, 0.0, 0.75)(0.25) - 1.0) < 1e-6
assert rising(3.0, 1.0, 0.2)(1.0) == 3.0
### END HIDDEN TESTS

# %% [markdown]
r"""
### 1.2 Dropping the text (6 points)

For guidance the model must know pictures without a text, so training removes the text of a random share $p$ of the
examples, each by itself. A removed text has *no text token*: all embeddings are 0, and its mask is all `False`. (The transformer
takes care that no softmax is empty.) A `Context` holds `embeds` $(B, L, D)$ and `mask` $(B, L)$. Say also which texts were removed:
return the new `Context` and a tensor $(B,)$ that is `True` for them.
"""


# %% answer=drop_text
def drop_text(context, p, generator=None):
    """context, fraction p -> (Context of the same shape, dropped (B,) bool)."""
    ### BEGIN SOLUTION
    drop = torch.rand(len(context.mask), generator=generator) < p
    return Context(context.embeds * ~drop[:, None, None], context.mask & ~drop[:, None]), drop
    ### END SOLUTION


# %% test=test_drop_text points=6


def _drop(context, p, generator=None):
    return drop_text(context, p, generator=generator)[0]


assert check_drop_text(_drop), check_drop_text(_drop)
### BEGIN HIDDEN TESTS
_given = Context(torch.ones(5000, 3, 2), torch.tensor([True, True, False]).expand(5000, 3).clone())
_made, _said = drop_text(_given, 0.3, generator=seeded(1))
_gone = _made.embeds.eq(0).flatten(1).all(1)
assert _said.dtype == torch.bool
assert _said.equal(_gone), "the second result says which texts were removed"
assert abs(_gone.double().mean() - 0.3) < 0.03
assert not _made.mask[_gone].any()
assert (_made.mask[~_gone] == torch.tensor([True, True, False])).all()
assert _made.embeds[~_gone].eq(1).all(), "texts that stay are changed"
assert _given.embeds.eq(1).all(), "the context that was handed in was changed in place"
### END HIDDEN TESTS

# %% [markdown]
r"""
### 1.3 Two branches, one batch (8 points)

A model here is `model(tokens (B, N), memory (B, ...)) -> logits (B, N, V)`. Write `guided(model, cond, uncond, guidance)`, which returns the
function `logits_fn(tokens, u)` that a sampler asks. `cond` and `uncond` are memories, tensors of $B$ rows; `guidance` is a function of $u$.

Both branches run as **one** call with $2B$ rows, the conditional ones first. Where `guidance(u)` is 0 the second branch is
nothing but cost: then call the model once, with $B$ rows.
"""


# %% answer=guided
def guided(model, cond, uncond, guidance):
    """-> logits_fn(tokens (B, N), u) -> (B, N, V)."""
    ### BEGIN SOLUTION
    both = torch.cat([cond, uncond])

    def logits_fn(tokens, u):
        t = guidance(u)
        if t == 0:
            return model(tokens, cond)
        return guide(*model(torch.cat([tokens, tokens]), both).chunk(2), t)

    return logits_fn
    ### END SOLUTION


# %% test=test_guided points=8
_sizes = []


def _model(tokens, memory):
    _sizes.append(len(tokens))
    assert len(tokens) == len(memory), "as many rows of tokens as of memory"
    return tokens[..., None] + memory[:, None]


_tokens, _cond, _uncond = (
    torch.tensor([[1, 2], [3, 4]]),
    torch.tensor([[10.0], [20.0]]),
    torch.tensor([[1.0], [2.0]]),
)
_logits_fn = guided(_model, _cond, _uncond, lambda u: 4 * u)
assert _logits_fn(_tokens, 0.5)[..., 0].tolist() == [
    [29.0, 30.0],
    [59.0, 60.0],
]  # 11 + 2 (11 - 2), ...
assert _sizes == [4], f"the model was called with {_sizes} rows; expected one call with 4"
### BEGIN HIDDEN TESTS
_sizes.clear()
assert _logits_fn(_tokens, 0.0)[..., 0].tolist() == [[11.0, 12.0], [23.0, 24.0]]
assert _sizes == [2], (
    f"without guidance the model was called with {_sizes} rows; expected one call with 2"
)
_seen = []
guided(_model, _cond, _uncond, lambda u: _seen.append(u) or 1.0)(_tokens, 0.25)
assert set(_seen) == {0.25}, "guidance is asked about the progress u"
### END HIDDEN TESTS

# %% [markdown] only=guidance:across
r"""
### 1.4 Variant: guide across, not along (15 points)

Much of $\ell_c - \ell_u$ may only point along $\ell_c$: it makes the model surer of what it thinks anyway. Write
`guide_more(cond, uncond, t)` that leaves this part out. For each token, over the $V$ codes: let $c$ be $\ell_c$ less its mean over the codes, and $d$ be
$\ell_c - \ell_u$ less its mean. Remove from $d$ its projection on $c$ (nothing, where $c$ is all zero), and return
$\ell_c + t\,d_\perp$.
"""


# %% answer=guide_more only=guidance:across
def guide_more(cond, uncond, t):
    """cond, uncond (B, N, V) -> (B, N, V)."""
    ### BEGIN SOLUTION
    c, d = (x - x.mean(-1, keepdim=True) for x in (cond, cond - uncond))
    along = (c * d).sum(-1, keepdim=True) / (c * c).sum(-1, keepdim=True).clamp(min=1e-12)
    return cond + t * (d - along * c)
    ### END SOLUTION


# %% test=test_guide_more points=15 only=guidance:across
_c = torch.tensor([[[1.0, -1.0, 0.0]]])
assert torch.allclose(guide_more(_c, torch.zeros_like(_c), 5.0), _c, atol=1e-5), (
    "all of c - u points along c"
)
assert torch.allclose(
    guide_more(_c, torch.tensor([[[-1.0, -3.0, 4.0]]]), 1.0),
    _c + torch.tensor([2.0, 2.0, -4.0]),
    atol=1e-5,
)
### BEGIN HIDDEN TESTS
_c, _n = torch.randn(2, 3, 4, 6, generator=seeded()).double()
assert torch.allclose(guide_more(_c, _n, 0.0), _c)
_moved = guide_more(_c, _n, 2.0) - _c
_centred = _c - _c.mean(-1, keepdim=True)
assert (_moved * _centred).sum(-1).abs().max() < 1e-5, "what is added still points along c"
assert _moved.norm(dim=-1).min() > 1e-3, "nothing is added"
assert torch.allclose(guide_more(_c, _n, 4.0) - _c, 2 * _moved, atol=1e-6), "t is a factor"
for _shift in (torch.tensor(5.0), torch.randn(3, 4, 1, generator=seeded(1)).double()):
    _same = [
        guide_more(_c + a * _shift, _n + b * _shift, 2.0).softmax(-1)
        for a, b in ((0, 0), (1, 0), (0, 1))
    ]
    assert torch.allclose(_same[0], _same[1]), (
        "a constant added to a token's logits changes nothing"
    )
    assert torch.allclose(_same[0], _same[2]), (
        "a constant added to a token's logits changes nothing"
    )
assert guide_more(torch.zeros(1, 1, 4), torch.randn(1, 1, 4), 1.0).isfinite().all(), (
    "c may be all zero"
)
### END HIDDEN TESTS

# %% [markdown] only=guidance:rescaled
r"""
### 1.4 Variant: guide, and keep the contrast (15 points)

Strong guidance makes logits large, so that the model draws the same thing again and again. Write `guide_more(cond, uncond, t, keep)`: with
$\ell_g$ from 1.1, for each token over its $V$ codes, let $m$ be the mean of $\ell_g$, and let

$$\ell_r = m + (\ell_g - m)\,\frac{\mathrm{std}(\ell_c)}{\mathrm{std}(\ell_g)}$$

(leave $\ell_g$ as it is where its standard deviation is 0). Return $keep \cdot \ell_r + (1 - keep) \cdot \ell_g$.
"""


# %% answer=guide_more only=guidance:rescaled
def guide_more(cond, uncond, t, keep=0.7):
    """cond, uncond (B, N, V) -> (B, N, V)."""
    ### BEGIN SOLUTION
    guided_logits = guide(cond, uncond, t)
    mean, std = guided_logits.mean(-1, keepdim=True), guided_logits.std(-1, keepdim=True)
    factor = torch.where(std > 0, cond.std(-1, keepdim=True) / std.clamp(min=1e-12), 1.0)
    rescaled = mean + (guided_logits - mean) * factor
    return keep * rescaled + (1 - keep) * guided_logits
    ### END SOLUTION


# %% test=test_guide_more points=15 only=guidance:rescaled
_c = torch.tensor([[[1.0, -1.0, 0.0]]])
assert torch.allclose(guide_more(_c, 0 * _c, 3.0, 1.0), _c, atol=1e-5), (
    "4 c, brought back to the contrast of c"
)
assert torch.allclose(guide_more(_c, 0 * _c, 3.0, 0.0), 4 * _c, atol=1e-5), "keep = 0 is 1.1"
### BEGIN HIDDEN TESTS
_c, _n = torch.randn(2, 3, 4, 6, generator=seeded()).double()
_g = 3 * _c - 2 * _n
_r = guide_more(_c, _n, 2.0, 1.0)
assert torch.allclose(_r.std(-1), _c.std(-1)), (
    "with keep = 1 the contrast is that of the conditional"
)
assert torch.allclose(_r.mean(-1), _g.mean(-1)), "the mean is that of the guided logits"
assert _r.argmax(-1).equal(_g.argmax(-1)), "the order of the codes is that of the guided logits"
assert torch.allclose(guide_more(_c, _n, 2.0, 0.25), 0.25 * _r + 0.75 * _g)
assert torch.allclose(guide_more(_c, _n, 0.0, 0.6), _c)
_flat = guide_more(torch.ones(1, 1, 4), torch.ones(1, 1, 4), 1.0, 1.0)
assert _flat.isfinite().all(), "a token whose logits are all alike"
assert torch.allclose(_flat, torch.ones(1, 1, 4))
### END HIDDEN TESTS

# %% [markdown] only=guidance:within
r"""
### 1.4 Variant: as much guidance as a bound allows (15 points)

One $t$ for all tokens is too little for some and breaks others. Write `guide_more(cond, uncond, t, bound)`: each token has its own scale, the
first of $t, t/2, t/4, \dots$ for which what it would draw from stays near the conditional,

$$\mathrm{KL}\big(\mathrm{softmax}(\ell_g)\,\|\,\mathrm{softmax}(\ell_c)\big) \le bound \text{ nats.}$$

After 20 halvings give up, and use 0 for that token.
"""


# %% answer=guide_more only=guidance:within
def guide_more(cond, uncond, t, bound):
    """cond, uncond (B, N, V) -> (B, N, V)."""
    ### BEGIN SOLUTION
    scale, made = torch.full(cond.shape[:-1], float(t), dtype=cond.dtype), cond.log_softmax(-1)
    for halving in range(22):
        log_p = guide(cond, uncond, scale[..., None]).log_softmax(-1)
        far = (log_p.exp() * (log_p - made)).sum(-1) > bound
        scale = torch.where(far, scale / 2 if halving < 20 else 0, scale)
    return guide(cond, uncond, scale[..., None])
    ### END SOLUTION


# %% test=test_guide_more points=15 only=guidance:within
_c, _n = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [0.0, 0.1]]])
assert torch.allclose(guide_more(_c, _n, 2.0, 10.0), 3 * _c - 2 * _n), (
    "a bound that never binds is 1.1"
)
assert torch.allclose(guide_more(_c.double(), _n.double(), 2.0, 1e-9), _c.double(), atol=1e-3), (
    "a tiny bound leaves the conditional"
)
### BEGIN HIDDEN TESTS
_c, _n = 2 * torch.randn(2, 3, 8, 6, generator=seeded()).double()


def _kl(made, cond):
    return (made.softmax(-1) * (made.log_softmax(-1) - cond.log_softmax(-1))).sum(-1)


_made = guide_more(_c, _n, 8.0, 0.1)
assert (_kl(_made, _c) <= 0.1 + 1e-9).all(), "a token exceeds the bound"
_d = _c - _n
_scale = ((_made - _c) * _d).sum(-1) / (_d * _d).sum(-1)
assert torch.allclose(_made, _c + _scale[..., None] * _d, atol=1e-6), "each token has one scale"
_halvings = (8.0 / _scale).log2()
assert (_halvings - _halvings.round()).abs().max() < 1e-4, "scales are 8, 4, 2, 1, ..."
assert len(set(_halvings.round().flatten().tolist())) > 1, "each token has its own"
_double = _c + 2 * _scale[..., None] * _d
assert (_kl(_double, _c)[_halvings.round() > 0] > 0.1).all(), "it was halved once too often"
assert torch.allclose(guide_more(_c, _c, 3.0, 0.1), _c)
### END HIDDEN TESTS

# %% [markdown]
r"""
Guidance in a world that is known exactly. Twelve pictures are mixed; the prompt asks for the first three. The model listens with half
an ear: with the text it puts half of its weight on these three, without it a quarter. What is drawn is sorted by the picture that it most
resembles; "kinds" is how many of the twelve come, the rare ones counting less ($e$ to the entropy of their fractions). In brackets
stands the 95% interval over the 200 pictures. You may change this cell, and need it in part 4.
"""

# %%
tables = MixtureWorld.random(modes=12, grid=(4, 4), codebook_size=6, sharpness=1.5, seed=1).tables
weights = torch.tensor([2.0] * 3 + [2.0 / 3] * 9)  # half of the weight on the three
with_text, without = MixtureWorld(tables, weights), MixtureWorld(tables)


def half_deaf(tokens, memory):
    b = len(tokens) // 2 if len(tokens) > len(empty) else len(tokens)
    parts = [with_text(tokens[:b]), *([without(tokens[b:])] if len(tokens) > b else [])]
    return torch.cat(parts).clamp(min=-40)  # known tokens have -inf, and -inf - -inf is no number


def told(tokens):
    """-> the fraction of pictures that the prompt asked for, and how many kinds there are, with 95% intervals."""
    nearest = torch.einsum("bnv,knv->bk", F.one_hot(tokens, 6).double(), tables.log()).argmax(1)
    each = F.one_hot(nearest, 12).double()
    without = (each.sum(0) - each) / (len(each) - 1)  # (B, 12): fractions without one picture
    whole, parts = (torch.special.entr(x).sum(-1).exp() for x in (each.mean(0), without))
    kinds = mean_interval(jackknife(whole, parts))._replace(format=".1f")
    return f"{proportion_interval(nearest < 3).short()} as asked for, {kinds.short()} kinds"


empty = torch.full((200, 16), 6)
try:
    for t in (0.0, 0.5, 1.0, 3.0):
        logits_fn = guided(half_deaf, torch.zeros(200, 1), torch.zeros(200, 1), lambda u, t=t: t)
        *_, last = decode(logits_fn, empty, mask_id=6, steps=8, order="random", generator=seeded())
        print(f"guidance {t}: {told(last.tokens)}")
except NotImplementedError:
    print("guide and guided are still to be written")

# %% [markdown]
r"""
## 2. Editing (35 points)

### 2.1 From pixels to tokens (6 points)

A region is painted in pixels: `repaint` $(B, H, W)$, `True` where something new shall stand. A token covers a square of $f \times f$
pixels, and must be drawn anew if the region touches it in a single pixel. Painted regions are often a little too small, so the region first
grows by `margin` pixels in every direction, diagonals included. Return $(B, hw)$, line by line.
"""


# %% answer=token_mask
def token_mask(repaint, f, margin):
    """repaint (B, H, W) bool -> (B, h*w) bool."""
    ### BEGIN SOLUTION
    b, height, width = repaint.shape
    grown = F.max_pool2d(repaint.float(), 2 * margin + 1, 1, margin) > 0
    return grown.view(b, height // f, f, width // f, f).any(4).any(2).flatten(1)
    ### END SOLUTION


# %% test=test_token_mask points=6
_exact = partial(token_mask, margin=0)
assert check_token_mask(_exact), check_token_mask(_exact)
_pixel = torch.zeros(1, 4, 4, dtype=torch.bool)
_pixel[0, 1, 1] = True  # with a margin of one pixel the region reaches all four tokens of 2 x 2
assert token_mask(_pixel, 2, 1).tolist() == [[True] * 4]
### BEGIN HIDDEN TESTS
_pixels = torch.rand(5, 24, 40, generator=seeded()) < 0.01
_want = torch.zeros(5, 3, 5, dtype=torch.bool)
for _b, _y, _x in _pixels.nonzero().tolist():
    _want[_b, _y // 8, _x // 8] = True
assert token_mask(_pixels, 8, 0).equal(_want.flatten(1))
for _b, _y, _x in _pixels.nonzero().tolist():
    _want[_b, max(_y - 2, 0) // 8 : (_y + 2) // 8 + 1, max(_x - 2, 0) // 8 : (_x + 2) // 8 + 1] = (
        True
    )
assert token_mask(_pixels, 8, 2).equal(_want.flatten(1)), "a margin of 2 pixels"
### END HIDDEN TESTS

# %% [markdown]
r"""
### 2.2 Infilling (6 points)

`infill` draws the tokens of a region anew and leaves all others as they are. The model must not see what stood in the region before.
Use `decode` (its `Step` holds `.tokens`) and return the tokens when nothing is masked any more.
"""


# %% answer=infill
def infill(logits_fn, tokens, repaint, *, mask_id, steps, generator=None):
    """tokens (B, N), repaint (B, N) bool -> (B, N)."""
    ### BEGIN SOLUTION
    *_, last = decode(
        logits_fn,
        tokens.masked_fill(repaint, mask_id),
        mask_id=mask_id,
        steps=steps,
        generator=generator,
    )
    return last.tokens
    ### END SOLUTION


# %% test=test_infill points=6
_seen = []


def _model(tokens, u):
    _seen.append(tokens.clone())
    return 50.0 * F.one_hot(torch.full_like(tokens, 2), 5)  # wants code 2 everywhere


_old, _region = (
    torch.tensor([[0, 1, 0, 1, 3, 4]]),
    torch.tensor([[True, False, True, True, False, False]]),
)
assert infill(_model, _old, _region, mask_id=5, steps=2, generator=seeded()).tolist() == [
    [2, 1, 2, 2, 3, 4]
]
### BEGIN HIDDEN TESTS
assert all(((s == 5) | (s == 2))[_region].all() for s in _seen), (
    "the model saw what stood in the region"
)
assert all(s[~_region].equal(_old[~_region]) for s in _seen), (
    "the model did not see what stands around the region"
)
assert len(_seen) == 2, "2 steps ask the model twice"
assert _old.tolist() == [[0, 1, 0, 1, 3, 4]], "the tokens that were handed in were changed in place"
assert infill(_model, _old, torch.zeros_like(_region), mask_id=5, steps=2).equal(_old), (
    "an empty region"
)
### END HIDDEN TESTS

# %% [markdown]
r"""
### 2.3 Edits without a mask (8 points)

To change a whole picture towards a new prompt, again and again hide a random `share` of its tokens, $\lceil share \cdot N \rceil$ of them in each row,
and draw them anew in one step (Muse 3.3.2). Yield the tokens after each iteration: each state is a whole picture. Each row has its own places, new ones in
each iteration. `random_mask(tokens, rate (B,), generator)` is yours to use.
"""


# %% answer=resample
def resample(logits_fn, tokens, *, mask_id, iterations, share, generator=None):
    """tokens (B, N) of a whole picture -> yields (B, N) after each iteration."""
    ### BEGIN SOLUTION
    for _ in range(iterations):
        repaint = random_mask(tokens, torch.full((len(tokens),), share), generator)
        tokens = infill(logits_fn, tokens, repaint, mask_id=mask_id, steps=1, generator=generator)
        yield tokens
    ### END SOLUTION


# %% test=test_resample points=8
_seen = []
_old = torch.randint(5, (3, 25), generator=seeded()).clamp(max=1)
_states = list(resample(_model, _old, mask_id=5, iterations=60, share=0.1, generator=seeded()))
assert len(_states) == 60
assert all((s != 5).all() for s in _states), "every state is a whole picture"
assert (_states[-1] == 2).double().mean() > 0.95, "in the end nearly all is what the model wants"
### BEGIN HIDDEN TESTS
assert len(_seen) == 60, "one call of the model an iteration"
assert all((s == 5).sum(1).tolist() == [3, 3, 3] for s in _seen), (
    "ceil(0.1 * 25) = 3 tokens of each row are hidden"
)
_where = [tuple((s[0] == 5).nonzero().flatten().tolist()) for s in _seen]
assert len(set(_where)) > 50, "places are the same again and again"
assert any((s[0] == 5).ne(s[1] == 5).any() for s in _seen), "all rows hide the same places"
for _before, _asked, _after in zip([_old, *_states], _seen, _states, strict=False):
    assert (_before == _asked)[_asked != 5].all(), "the model is not asked about the state before"
    assert (_before == _after)[_asked != 5].all(), "a token changed that was not hidden"
_times = torch.stack([(s == 5).sum(0) for s in _seen]).sum(0).double()
assert _times.min() > 5, "some places are never hidden"
### END HIDDEN TESTS

# %% [markdown] only=editing:kept
r"""
### 2.4 Variant: edits that spare a region (15 points)

Somebody likes the face and wants the rest changed. Write `edit(logits_fn, tokens, keep, *, mask_id, iterations, share, generator)`, like
`resample`, but tokens where `keep` $(B, N)$ is `True` are never hidden. Of the $n$ *other* tokens of a row, $\lceil share \cdot n \rceil$ are hidden in each
iteration, at random places. Rows may keep different numbers; a row that keeps all of its tokens stays as it is.
"""


# %% answer=edit only=editing:kept
def edit(logits_fn, tokens, keep, *, mask_id, iterations, share, generator=None):
    """tokens (B, N), keep (B, N) bool -> yields (B, N)."""
    ### BEGIN SOLUTION
    count = ((~keep).sum(1).double() * share - 1e-6).ceil()
    for _ in range(iterations):
        score = torch.rand(tokens.shape, generator=generator).masked_fill(keep, 2.0)
        repaint = (score.argsort(1).argsort(1) < count[:, None]) & ~keep
        tokens = infill(logits_fn, tokens, repaint, mask_id=mask_id, steps=1, generator=generator)
        yield tokens
    ### END SOLUTION


# %% test=test_edit points=15 only=editing:kept
_seen = []
_old = torch.zeros(3, 20, dtype=torch.long)
_keep = torch.zeros(3, 20, dtype=torch.bool)
_keep[0, :10], _keep[1] = True, True
_states = list(edit(_model, _old, _keep, mask_id=5, iterations=60, share=0.25, generator=seeded()))
assert (_states[-1][_keep] == 0).all(), "a token that was to be kept changed"
assert (_states[-1][~_keep] == 2).double().mean() > 0.95
### BEGIN HIDDEN TESTS
assert len(_states) == len(_seen) == 60, "one call of the model an iteration"
assert all((s == 5).sum(1).tolist() == [3, 0, 5] for s in _seen), (
    "of 10, 0 and 20 free tokens, 3, 0 and 5 are hidden"
)
assert not any(((s == 5) & _keep).any() for s in _seen), "a token that was to be kept is hidden"
_times = torch.stack([(s == 5) for s in _seen]).sum(0)[~_keep].double()
assert _times.min() >= 4, "places are not all as likely"
assert _times.max() <= 32, "places are not all as likely"
assert len({tuple((s[0] == 5).nonzero().flatten().tolist()) for s in _seen}) > 25
for _before, _asked, _after in zip([_old, *_states], _seen, _states, strict=False):
    assert (_before == _after)[_asked != 5].all(), "a token changed that was not hidden"
### END HIDDEN TESTS

# %% [markdown] only=editing:weakest
r"""
### 2.4 Variant: edits where it fits least (15 points)

Random places waste work on tokens that suit the new prompt already. Write `edit(logits_fn, tokens, *, mask_id, iterations, share, generator)`, like
`resample`, but hide the $\lceil share \cdot N \rceil$ tokens of each row that the model finds least likely: ask it about the *whole* picture, nothing hidden,
and look up the probability of each token that stands there. Then hide them, and draw them anew in one step. That makes two calls of the
model an iteration, both with $u = 1$.
"""


# %% answer=edit only=editing:weakest
def edit(logits_fn, tokens, *, mask_id, iterations, share, generator=None):
    """tokens (B, N) -> yields (B, N)."""
    ### BEGIN SOLUTION
    count = math.ceil(share * tokens.shape[1] - 1e-6)
    for _ in range(iterations):
        log_p = logits_fn(tokens, 1.0).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        repaint = torch.zeros_like(tokens, dtype=torch.bool).scatter(
            1, log_p.argsort(1)[:, :count], True
        )
        tokens = infill(logits_fn, tokens, repaint, mask_id=mask_id, steps=1, generator=generator)
        yield tokens
    ### END SOLUTION


# %% test=test_edit points=15 only=editing:weakest
_seen = []
_old = torch.tensor([[2, 0, 2, 1, 2, 2, 2, 2, 2, 2], [2] * 9 + [0]])
(_one,) = edit(_model, _old, mask_id=5, iterations=1, share=0.2, generator=seeded())
assert _one.tolist() == [[2] * 10] * 2, "one iteration mends two tokens of each row"
### BEGIN HIDDEN TESTS
assert _seen[0].equal(_old), "the first call is about the whole picture"
assert [len(_seen), *(_seen[1] == 5).sum(1).tolist()] == [2, 2, 2], (
    "2 of 10 tokens are hidden in the second call"
)
_scale = torch.rand(40, generator=seeded())


def _ranked(tokens, u):
    assert u == 1.0, f"u is {u}"
    _seen.append(tokens.clone())
    return (_scale * (1 + tokens.float().mean(1, keepdim=True)))[..., None] * F.one_hot(
        torch.ones_like(tokens), 4
    )


_seen, _start = [], torch.ones(2, 40, dtype=torch.long)
_states = list(edit(_ranked, _start, mask_id=4, iterations=5, share=0.13, generator=seeded(1)))
assert len(_seen) == 10
for _before, _whole, _hidden, _after in zip(
    [_start, *_states], _seen[::2], _seen[1::2], _states, strict=False
):
    assert _whole.equal(_before), "it is asked about the picture as it stands"
    _p = _ranked(_before, 1.0).softmax(-1).gather(-1, _before[..., None])[..., 0]
    _seen.pop()
    for _row in range(2):
        _out = _hidden[_row] == 4
        assert _out.sum() == 6, "ceil(0.13 * 40) = 6"
        assert _p[_row][_out].max() <= _p[_row][~_out].min() + 1e-6, (
            "not the least likely are hidden"
        )
    assert (_before == _after)[_hidden != 4].all(), "a token changed that was not hidden"
### END HIDDEN TESTS

# %% [markdown] only=editing:blocks
r"""
### 2.4 Variant: edits by blocks (15 points)

Scattered places are filled in after what is around them, so that large things never change. Write
`edit(logits_fn, tokens, *, mask_id, iterations, side, generator)`, like `resample`, but hide one square of `side` × `side` tokens of each row in each iteration. The grid is
square, token $(r, c)$ at $r \cdot \sqrt N + c$. The square lies wholly within the grid, every such position is as likely, and each row has its own.
"""


# %% answer=edit only=editing:blocks
def edit(logits_fn, tokens, *, mask_id, iterations, side, generator=None):
    """tokens (B, N) -> yields (B, N)."""
    ### BEGIN SOLUTION
    (b, n), grid = tokens.shape, math.isqrt(tokens.shape[1])
    line, column = torch.arange(n) // grid, torch.arange(n) % grid
    for _ in range(iterations):
        top, left = torch.randint(grid - side + 1, (2, b, 1), generator=generator)
        repaint = (line >= top) & (line < top + side) & (column >= left) & (column < left + side)
        tokens = infill(logits_fn, tokens, repaint, mask_id=mask_id, steps=1, generator=generator)
        yield tokens
    ### END SOLUTION


# %% test=test_edit points=15 only=editing:blocks
_seen = []
_old = torch.zeros(2, 25, dtype=torch.long)
_states = list(edit(_model, _old, mask_id=5, iterations=200, side=2, generator=seeded()))
assert len(_states) == 200
assert (_states[-1] == 2).double().mean() > 0.95
### BEGIN HIDDEN TESTS
assert len(_seen) == 200, "one call of the model an iteration"
_corners = []
for _before, _asked, _after in zip([_old, *_states], _seen, _states, strict=False):
    assert (_before == _after)[_asked != 5].all(), "a token changed that was not hidden"
    _rows = []
    for _row in (_asked == 5).view(2, 5, 5):
        _at = _row.nonzero()
        assert len(_at) == 4, "2 x 2 tokens of each row are hidden"
        assert (_at.max(0).values - _at.min(0).values).tolist() == [1, 1], (
            f"{_at.tolist()} is no square"
        )
        _rows.append(tuple(_at.min(0).values.tolist()))
    _corners.append(tuple(_rows))
_times = [[rows[0] for rows in _corners].count((r, c)) for r in range(4) for c in range(4)]
assert min(_times) >= 2, "some positions never come"
assert max(_times) <= 32, "positions are not all as likely"
assert any(a != b for a, b in _corners), "all rows hide the same square"
assert len(list(edit(_model, _old, mask_id=5, iterations=1, side=5, generator=seeded()))) == 1, (
    "a square as large as the grid"
)
assert (_seen[-1] == 5).all()
### END HIDDEN TESTS

# %% [markdown]
r"""
Pictures of the last nine kinds, edited towards the prompt of part 1 with guidance 3. Each line draws every token about eight times anew,
fewer or more at a time. You may change this cell, and need it in part 4.
"""

# %%
from_others = MixtureWorld(tables, torch.tensor([1e-9] * 3 + [1.0] * 9)).sample(200, seeded())
try:
    logits_fn = guided(half_deaf, torch.zeros(200, 1), torch.zeros(200, 1), lambda u: 3.0)
    print("before:                ", told(from_others))
    for hidden in (1, 4, 8):
        settings = {"share": hidden / 16, "iterations": 128 // hidden, "generator": seeded()}
        *_, edited = resample(logits_fn, from_others, mask_id=6, **settings)
        same = mean_interval((edited == from_others).double().mean(1))._replace(format=".1%")
        print(
            f"{hidden} of 16 at a time, {128 // hidden:3} x: {told(edited)}; {same.short()} of tokens as before"
        )
except NotImplementedError:
    print("guided, infill and resample are still to be written")

# %% [markdown]
r"""
## 3. Tests that find mistakes (15 points)

The **bug zoo** holds mistakes that real code bases made, each a copy of our package with one line changed. Some of them are in
`cfg`, `editing`, `transformer` and `muse`. Your tests are to find them. (`zoo.py` lies
beside this notebook. Write your tests first; what you find yourself is what you will find again.)

A test is a function of one argument, a library, whose modules are `lib.cfg`, `lib.transformer` and so on. It raises (`assert` is
enough) where something is wrong. It must be silent with the true package: a test that cries wolf there kills nothing, and costs 2
points. Think of what *must not* change (padding, for one), of what *must* (a condition, wherever it stands), and of the
smallest case where it would show. Two helpers are there to begin with; `Muse.contexts(self, jobs)` needs of `self` no more than `encoder`, `device` and `dtype`.
"""

# %% answer=zoo_tests
from dataclasses import replace
from types import SimpleNamespace

from minimuse.config import preset


def texts(length=3, padding=0):
    """One text of `length` vectors of 4 numbers, with padding behind it."""
    embeds = F.pad(torch.randn(1, length, 4, generator=seeded()), (0, 0, 0, padding))
    return Context(embeds, torch.arange(length + padding)[None] < length)


def tiny_superres(lib):
    """A super-resolution transformer: 4 x 4 tokens, 2 x 2 low-resolution ones, 8 codes each."""
    small = {
        "codebook_size": 8,
        "low_codebook_size": 8,
        "text_width": 4,
        "width": 16,
        "mlp_width": 16,
        "grid": 4,
    }
    small |= {"low_grid": 2, "block": 0, "layers": 1, "low_layers": 1, "draft": False}
    torch.manual_seed(0)
    return lib.transformer.SuperRes(replace(preset("nano").superres, **small)).eval()


def test_logits_have_a_shape(lib):  # an example, which finds nothing much
    model, low = tiny_superres(lib), torch.tensor([[1, 2, 3, 4]])
    assert model(torch.zeros(1, 16, dtype=torch.long), model.memory(texts(), low)).shape == (
        1,
        16,
        8,
    )


TESTS = [test_logits_have_a_shape]

### BEGIN SOLUTION


def test_share_of_texts_dropped(lib):
    many = Context(torch.ones(4000, 2, 1), torch.ones(4000, 2, dtype=torch.bool))
    gone = lib.cfg.drop_text(many, 0.1, seeded()).embeds.eq(0).flatten(1).all(1)
    assert abs(gone.float().mean() - 0.1) < 0.02


def test_no_guidance_is_the_conditional(lib):
    c, u = torch.randn(2, 1, 3, 4, generator=seeded())
    assert lib.cfg.guide(c, u, 0.0).equal(c)


def test_removed_text_is_attended(lib):
    model = lib.transformer.Transformer(tiny_superres(lib).config)
    assert model.memory(lib.cfg.null_text(texts())).attend.any(-1).all()


def told_apart(lib, a, b):
    """Do two pairs of text and low tokens give other logits?"""
    model = tiny_superres(lib)
    with torch.no_grad():
        x, y = (
            model(torch.zeros(1, 16, dtype=torch.long), model.memory(t, torch.tensor([low])))
            for t, low in (a, b)
        )
    return not torch.allclose(x, y, atol=1e-5)


def test_padding_changes_nothing(lib):
    assert not told_apart(lib, (texts(), [1, 2, 3, 4]), (texts(padding=2), [1, 2, 3, 4]))


def test_mask_is_no_code(lib):
    assert tiny_superres(lib).mask_id not in range(8)


def test_low_tokens_count(lib):
    assert told_apart(lib, (texts(), [1, 2, 3, 4]), (texts(), [5, 5, 5, 5]))


def test_low_tokens_have_places(lib):
    assert told_apart(lib, (texts(), [1, 2, 3, 4]), (texts(), [2, 1, 3, 4]))


def test_one_pixel_is_enough(lib):
    repaint = torch.zeros(1, 4, 4, dtype=torch.bool)
    repaint[0, 1, 2] = True
    assert lib.editing.token_mask(repaint, 2).tolist() == [[False, True, False, False]]


def test_negative_prompts_arrive(lib):
    def encode(prompts):
        return Context(
            torch.tensor([[[float(len(p))]] for p in prompts]),
            torch.ones(len(prompts), 1, dtype=torch.bool),
        )

    muse = SimpleNamespace(
        encoder=SimpleNamespace(encode=encode), device=torch.device("cpu"), dtype=torch.float32
    )
    _, null = lib.muse.Muse.contexts(muse, [{"prompt": "abc", "negative_prompt": "ab"}])
    assert null.embeds.flatten().tolist() == [2.0]


TESTS += [
    test_share_of_texts_dropped,
    test_no_guidance_is_the_conditional,
    test_removed_text_is_attended,
    test_padding_changes_nothing,
    test_mask_is_no_code,
    test_low_tokens_count,
    test_low_tokens_have_places,
    test_one_pixel_is_enough,
    test_negative_prompts_arrive,
]
### END SOLUTION

# %% test=test_zoo points=15
_mutants = [m for m in zoo.MUTANTS if m.room in ("cfg", "editing", "transformer", "muse")]
_score = zoo.score(TESTS, _mutants)
print(
    f"{len(_score.killed)} of {len(_mutants)} mistakes found; false alarms: {_score.false_alarms or 'none'}"
)
assert len(_score.killed), "no mistake is found"
round(max(0.0, 15 * len(_score.killed) / len(_mutants) - 2 * len(_score.false_alarms)), 1)

# %% [markdown]
r"""
## 4. An explanation (15 points)

In at most 300 words, for a reader who has seen neither part:

1. What does $\ell_g = (1 + t)\,\ell_c - t\,\ell_u$ do to the probability of a code, in terms of $p_c$ and $p_u$? Why does diversity fall as
   $t$ rises? Quote the numbers printed in part 1, with their intervals. (5)
2. When would your variant of 1.4 draw another picture than plain guidance, and when the same? Give a case of each. (5)
3. Every line printed in part 2 draws each token equally often. Why do edits of many tokens at a time get further than edits of one?
   Why does Muse hide only 8% nevertheless? Quote the numbers with their intervals, and say what your variant of 2.4 changes. (5)

Full points for what is right, said in your own words, and tied to your numbers; half where a claim is right and not argued;
none for a text that would fit any variant.
"""

# %% [markdown] written=explanation points=15
r"""
*(A model answer.)* Logits are log-probabilities up to a constant, so $p_g \propto p_c\,(p_c / p_u)^t$: a code gains where the text makes it
likelier, and the more so the larger $t$. Codes that the text makes less likely lose all they had, and with them the pictures
that were right and rare; so the share of pictures asked for rises, and the number of kinds seen falls.

The second point depends on the variant: guiding across is the same where what the text adds is new, and does nothing where it only
says the same louder; rescaling keeps which code is likeliest, and draws others more often; a bound is the same while it does not bind.

With one token hidden, fifteen speak for the old picture, and the draw repeats it: the chain is right in the long run, and stuck for
a long time. With half hidden, less speaks for the old, and the prompt decides. But eight tokens drawn at once do not know of each other,
so they may fit neither picture; and what the prompt does not ask to change is lost as well. 8% is the careful end. The variant of 2.4 changes which tokens may go: those outside of
what is kept, those that fit worst, or whole squares at a time.
"""
