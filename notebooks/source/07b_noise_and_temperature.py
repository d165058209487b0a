# %% [markdown]
r"""
# 7b. Noise and temperature: the rest of parallel decoding

*Two dials that are often confused, what they do to variety and to accuracy, and where a perfect model still errs.*

|  |  |
|---|---|
| **Paper** | Muse 2.8; MaskGIT ([arXiv 2202.04200](https://arxiv.org/abs/2202.04200)); EB-Sampler ([arXiv 2505.24857](https://arxiv.org/abs/2505.24857)) |
| **You will learn** | what noise on the ranking changes, and why it is Gumbel noise · why confidence does not sample from the model · how a sampling temperature acts · how a rule can choose the number of tokens itself |
| **Before this** | [7. Parallel decoding](07_parallel_decoding.ipynb) |
| **Takes** | @takes@; about 75 minutes of your time |
| **Files** | [`sampler.py`](../minimuse/sampler.py), [`lab_samplers.py`](../minimuse/lab_samplers.py) |
"""

# %% knobs
import os

import matplotlib.pyplot as plt
import torch
from checks import check_decode, check_threshold
from view import show, style

from minimuse import Muse
from minimuse.plots import grid

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer pictures
CHECKPOINT = "toy"  # a shipped name or a folder
COUNTED = 4 if FAST else 64  # prompts, one picture of each, where something is counted
VARIED = 2 if FAST else 8  # prompts, four pictures of each, where variety is measured
DRAWS = 200 if FAST else 2000  # from the exact world of section 2
style()

# %%
muse = Muse.from_pretrained(CHECKPOINT, device="cpu")
N, T = muse.config.base.tokens, muse.config.base_sampling.steps
SIDE = 96 // muse.config.low_tokenizer.image_size  # pictures are drawn about 96 pixels wide


def coarse(prompts, n=1, seed=0, **how):
    """Prompts -> n pictures of each by the base model only."""
    with torch.inference_mode():
        *_, last = muse.decode_base(muse.jobs(prompts, n, seed), **how)
        return muse.picture(last)


# %% [markdown]
r"""
## 1. How noisy

A strict ranking is much the same in every decode of a prompt: the most certain positions are the empty ones. So MaskGIT adds
noise to the scores,

$$\text{score}_i = \log p(\text{drawn}_i) + \tau\, g_i, \qquad g_i = -\log(-\log \text{uniform}_i),$$

with a *choice temperature* $\tau$ that falls to 0 through the decode. Why this odd $g$? It is **Gumbel** noise, and it has a
property that no other has: at $\tau = 1$ the position with the highest score is position $i$ with a probability proportional
to $p_i$; in general, to $p_i^{1/\tau}$. So the ranking is a *draw without replacement*. We try it on three positions.
"""

# %%
p = torch.tensor([0.6, 0.3, 0.1])
gumbel = -torch.log(-torch.log(torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))))
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharey=True)
for ax, tau in zip(axes, (0.1, 0.5, 1.0, 4.5), strict=True):
    first = torch.bincount((p.log() + tau * gumbel).argmax(1), minlength=3) / len(gumbel)
    said = p ** (1 / tau) / (p ** (1 / tau)).sum()
    assert (first - said).abs().max() < 0.02, "the formula does not hold"
    ax.bar(range(3), first, color="0.8", label="counted")
    ax.plot(range(3), said, "kx", label=r"$\propto p^{1/\tau}$")
    ax.set(title=rf"$\tau$ = {tau}", xticks=range(3), xticklabels=["0.6", "0.3", "0.1"])
    ax.set_xlabel("probability of the position")
axes[0].set_ylabel("fraction of first ranks")
axes[-1].legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
**Predict, then run.** With no noise at all, and the same seeds: will the pictures of a row be more alike, less, or just
as much? After all, codes are drawn at random in each of them either way.
"""

# %%
TAUS = [0.0, 1.0, 4.5, 50.0]
sheet = []
for tau in TAUS:
    sheet += coarse("a large blue cube", n=7, seed=40, choice_temperature=tau)
grid(sheet, [f"tau = {tau:g}" for tau in TAUS for _ in range(7)], columns=7, scale=SIDE)

# %%
from minimuse.eval_metrics import diversity, paired_difference
from minimuse.eval_networks import Detector
from minimuse.eval_prompts import matches, parse_prompt, prompt_set

detector = Detector.from_pretrained()
PROMPTS = [ask.prompt for ask in prompt_set("mixed", 2 * COUNTED)[::2]]  # those of notebook 7
four = [prompt for prompt in PROMPTS[:VARIED] for _ in range(4)]
right, varied = [], []
for tau in TAUS:
    read = detector.detect(coarse(PROMPTS, seed=100, choice_temperature=tau))
    read = [matches(r, parse_prompt(p)).right for r, p in zip(read, PROMPTS, strict=True)]
    right.append(torch.tensor(read))
    pictures = coarse(PROMPTS[:VARIED], n=4, seed=100, choice_temperature=tau)
    varied.append(diversity(detector.features(pictures), four))
gains = [paired_difference(r, right[0]) for r in right[1:]]
figure, axes = plt.subplots(1, 2, figsize=(10, 3))
for ax, found, taus in ((axes[0], gains, TAUS[1:]), (axes[1], varied, TAUS)):
    reach = [[m.value - m.low for m in found], [m.high - m.value for m in found]]
    ax.errorbar(range(len(found)), [m.value for m in found], yerr=reach, fmt="s", capsize=4)
    ax.set_xticks(range(len(found)), [f"{tau:g}" for tau in taus])
    ax.set(xlabel=r"ranking noise $\tau$ at the start", xlim=(-0.5, len(found) - 0.5))
axes[0].axhline(0, color="k", lw=1, ls=":")
axes[0].set_ylabel(r"fraction right, less that of $\tau = 0$")
axes[1].set(ylabel="distance of two pictures\nof one prompt", ylim=(0, None))
plt.show()
print("this checkpoint's own tau:", muse.config.base_sampling.choice_temperature)

# %% [markdown]
r"""
Look at the rows first. Without noise, different seeds make much the same picture: the most certain positions are always the same
ones, and among the codes that were drawn there, the likely ones win. Noise gives the others a chance, so objects
come to stand elsewhere. At $\tau = 50$ hardly anything but chance is left of the ranking: that is the order *random*.

So noise is a dial for variety, and what it costs in right pictures is for the intervals on the left to say. But note what "without
noise" did: it *changed what is drawn*, not only when. The next section catches that in an exact world.
"""

# %%
if not FAST:
    assert varied[0].high < varied[2].low, "noise does not make pictures differ"

# %% [markdown]
r"""
## 2. Where a perfect model errs

Back to the icons of notebook 7: four pictures of 8 x 8 tokens, each token wrong with a probability of 3%, and a model that makes no error at
all. A picture is **torn** if more than 6 of its 64 tokens disagree with every icon; true pictures hardly ever are. And of those that are
not torn, how many tokens are off? In the world it is 3% of 64, about 1.9. Both errors come only from the sampler.

**Predict, then run.** With one token per step, which of the three orders give as many tokens off as the world has?
"""

# %%
from minimuse.lab_worlds import MixtureWorld
from minimuse.sampler import decode

y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
ring, cross = (torch.hypot(x, y) - 2.8).abs() < 0.9, (x.abs() < 1) | (y.abs() < 1)
icons = torch.stack([ring, cross, y.abs() % 4 < 2, x < 0]).flatten(1).long()  # (4, 64)
right_code = torch.nn.functional.one_hot(icons, 2).double()
world = MixtureWorld(0.97 * right_code + 0.03 * (1 - right_code))


def away(tokens):
    """Tokens (B, 64) -> (B,): how many differ from the nearest icon."""
    return (tokens[:, None] != icons).sum(-1).amin(1).double()


truth, ladder, off = (
    away(world.sample(DRAWS, torch.Generator().manual_seed(0))),
    [2**k for k in range(7)],
    {},
)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for order, mark in (("random", "o-"), ("halton", "s--"), ("confidence", "^:")):
    for t in ladder:
        how = {"mask_id": world.mask_id, "steps": t, "order": order}
        blank, draws = torch.full((DRAWS, world.n), world.mask_id), torch.Generator().manual_seed(0)
        *_, last = decode(world, blank, generator=draws, **how)
        off[order, t] = away(last.tokens)
    torn = [(off[order, t] > 6).double().mean() for t in ladder]
    axes[0].plot(ladder, torn, mark, label=order)
    whole = [off[order, t][off[order, t] <= 6].mean() for t in ladder]
    axes[1].plot(ladder, whole, mark, label=order)
axes[1].axhline(truth.mean(), color="k", lw=1)
axes[1].text(1, truth.mean() + 0.1, "the world")
axes[0].set(ylabel="fraction of torn pictures", ylim=(-0.03, 1.03))
axes[1].set(ylabel="tokens off, if not torn", ylim=(0, None))
for ax in axes:
    ax.set(xlabel="steps for 64 tokens", xscale="log", xticks=ladder, xticklabels=ladder)
    ax.minorticks_off()
axes[0].legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
Left: with enough steps nothing is torn, whatever the order. Right: with one token at a time, random and
Halton are exact, but **confidence is not**. It is cleaner than the truth. A code that was drawn against the odds
has a low confidence, is not fixed, and is *drawn again* next time: unlikely draws are rejected until likely ones come.
That does not sample from the model; it searches for typical pictures. For pictures to look at, that may be welcome.
For anything that counts on the probabilities, it is an error that no number of steps removes.

[Notebook 13](13_schedule_lab.ipynb) measures all this, with intervals, in larger worlds.
"""

# %%
assert max(off[order, 64].gt(6).double().mean() for order in ("random", "halton")) < 0.02, "torn"
if not FAST:
    exact = [(off[order, 64].mean() - truth.mean()).abs() for order in ("random", "halton")]
    assert max(exact) < 0.2, "random or Halton is not exact"
    assert off["confidence", 64].mean() < truth.mean() - 0.5, "confidence is exact"

# %% [markdown]
r"""
## 3. What

The last question is the code itself. `draw` turns one uniform number per token into a code by the inverse of the
cumulative distribution; a *sampling temperature* below 1 sharpens the distribution before, `top_k` leaves the k
likeliest. They act on the *codes* of one token, the choice temperature on the *ranking* of all tokens: two dials that
are often taken for one.
"""

# %%
from minimuse.sampler import draw

show(draw)

# %%
from minimuse.utils import uniforms

logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(1, 20_000, 4)
points = uniforms(1, 20_000, generator=torch.Generator().manual_seed(0))  # one number per token
figure, ax = plt.subplots(figsize=(7, 2.8))
settings = {"temperature 1": (1.0,), "0.5": (0.5,), "2": (2.0,), "1, top_k = 2": (1.0, 2)}
for k, (label, how) in enumerate(settings.items()):
    drawn = torch.bincount(draw(logits, points, *how)[0], minlength=4) / 20_000
    hatch = ["", "//", "..", "xx"][k]
    ax.bar(torch.arange(4) + 0.2 * k - 0.3, drawn, 0.2, label=label, hatch=hatch, ec="w")
ax.set(xlabel="code", ylabel="fraction of draws", xticks=range(4))
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
### Exercise 7b.1: the whole loop

*Difficulty 2 of 3, about 20 minutes.*

Now write `decode`: a generator that yields the tokens after each step. All rows have the same number of masked
tokens. The stub is complete but for one line: it fixes the *first* masked tokens, not the most certain ones.

<details><summary>Hint</summary>

The score is the probability of the code that was drawn: `gather` takes it from `p` (B, N, V) at `drawn` (B, N).

</details>
"""

# %%
from minimuse.masking import reveal_counts


def my_decode(logits_fn, tokens, *, mask_id, steps, generator=None):
    for i, k in enumerate(reveal_counts(int((tokens[0] == mask_id).sum()), steps)):
        masked = tokens == mask_id
        p = logits_fn(tokens, i / max(1, steps - 1)).softmax(-1)  # (B, N, V)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view_as(tokens)
        scores = -torch.arange(tokens.shape[1]).expand_as(tokens)  # your code: which to fix?
        best = scores.masked_fill(~masked, -(10**6)).topk(k).indices  # (B, k)
        tokens = tokens.scatter(1, best, drawn.gather(1, best))
        yield tokens


check_decode(my_decode)


# %% tags=["solution"]
def my_decode(logits_fn, tokens, *, mask_id, steps, generator=None):
    for i, k in enumerate(reveal_counts(int((tokens[0] == mask_id).sum()), steps)):
        masked = tokens == mask_id
        p = logits_fn(tokens, i / max(1, steps - 1)).softmax(-1)  # (B, N, V)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view_as(tokens)
        scores = p.gather(-1, drawn[..., None]).squeeze(-1)  # (B, N) the drawn code's probability
        best = scores.masked_fill(~masked, -1).topk(k).indices  # (B, k)
        tokens = tokens.scatter(1, best, drawn.gather(1, best))
        yield tokens


check_decode(my_decode)

# %% [markdown]
r"""
## 4. A rule that decides by itself

Why should each picture take the same steps? Tokens drawn together are drawn as if independent, and the error of that
is at most the sum of their entropies less the largest one. So: fix the most certain tokens as long as that stays within a
*bound* (EB-Sampler). Where the model is certain, that is many at once; where it is not, one.
"""

# %%
from minimuse.lab_samplers import entropy_bound
from minimuse.sampler import token_entropy

show(entropy_bound, token_entropy)


# %%
def left(**how):
    """How many tokens are still masked before and after each pass."""
    with torch.inference_mode():
        passes = list(muse.decode_base(muse.jobs("a large red cube", 1, 1), **how))
    return [N, *(int(step.masked.sum()) for step in passes)]


curves = {
    f"bound {b:g} nats": left(schedule=entropy_bound(b), order="entropy", steps=N)
    for b in (1.0, 8.0, 32.0)
}
curves["cosine"] = left()
figure, ax = plt.subplots(figsize=(7, 3))
for (name, curve), dash in zip(curves.items(), ["-", "--", ":", "-."], strict=True):
    ax.plot(curve, dash, label=f"{name}: {len(curve) - 1} passes")
ax.set(xlabel="passes", ylabel="tokens still masked")
ax.legend(fontsize=9)
plt.show()
passes = [len(curve) for curve in curves.values()]
assert passes[0] > passes[1] > passes[2], "a smaller bound does not take more passes"

# %% [markdown]
r"""
The rule chooses its own curve, another one for each picture. A small bound means careful steps, and many.
"""

# %% [markdown]
r"""
### Exercise 7b.2: a threshold

*Difficulty 1 of 3, about 10 minutes.*

Write another rule, `(logits (B, N, V), masked (B, N), u) -> (B,)`: how many masked tokens have a code of probability 0.9 or more? As many
are fixed, and never none. The stub fixes one.

<details><summary>Hint</summary>

The probability of the likeliest code is `logits.softmax(-1).amax(-1)`. Tokens that are known do not count.

</details>
"""


# %%
def my_threshold(logits, masked, u):
    return masked.any(1).long()  # your code: how many are certain?


check_threshold(my_threshold)


# %% tags=["solution"]
def my_threshold(logits, masked, u):
    return ((logits.softmax(-1).amax(-1) >= 0.9) & masked).sum(1)


print(len(left(schedule=my_threshold, steps=N)) - 1, "passes")
check_threshold(my_threshold)

# %% [markdown]
r"""
## What failure looks like

**Noise on probabilities.** Gumbel noise is added to $p$, not to $\log p$. Our decoder adds the noise to whatever an order returns, so an order
that forgets the logarithm makes the mistake.
"""

# %%
from minimuse.sampler import confidence


def on_p(logits, drawn, masked, u):
    return confidence(logits, drawn, masked, u).exp()


how = {"order": on_p, "choice_temperature": 1.0}
grid(coarse("a large purple cylinder", n=7, seed=60, **how), columns=7, scale=SIDE)

# %% [markdown]
r"""
Nothing looks wrong. But it is nearly a random order: probabilities lie between 0 and 1, and noise does not. What
finds the mistake is a check of the property that is broken. Take two positions, one certain (90%), one with 100 codes
alike (1% each). How often is the *unsure* one fixed first? By section 1 in $p_i^{1/\tau} / \sum_j p_j^{1/\tau}$ of the decodes. In the first of two steps the
noise has already fallen to $\tau = 0.5$, so that is $0.01^2 / (0.01^2 + 0.9^2)$, about one in 8,000.
"""

# %%
unsure = torch.zeros(4000, 2, 100)
unsure[:, 0] = torch.cat([torch.tensor([0.9]), torch.full((99,), 0.1 / 99)]).log()
how = {"mask_id": 100, "steps": 2, "choice_temperature": 1.0, "sampling_temperature": 0.0}
first = {}
for name, order in (("as it is", "confidence"), ("noise on p", on_p)):
    blank, draws = torch.full((4000, 2), 100), torch.Generator().manual_seed(0)
    begun = next(decode(lambda tokens, u: unsure, blank, generator=draws, order=order, **how))
    first[name] = begun.revealed[:, 1].double().mean().item()
    print(f"{name:>11}: the unsure position is first in {first[name]:.1%} of 4000 decodes")
assert first["as it is"] < 0.002, "the formula of section 1 does not hold"
assert first["noise on p"] > 0.1, "noise on p ranks as well"

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

Sampling temperature and choice temperature both trade variety for accuracy. Which of the two buys more variety for the same fraction of right
pictures? Choose three values of each before you look, measure `right` and `varied` as in section 1, and draw both as points of one plane.
"""

# %% [markdown]
r"""
## Summary

- Gumbel noise makes the ranking a draw without replacement. More noise, more variety.
- Confidence prefers typical draws. Even with a perfect model and one token per step it does not sample the model's distribution.
- The sampling temperature acts on the codes of one token, the choice temperature on the ranking of all tokens.
- A rule can choose the number of tokens from the logits: many where the model is certain, one where it is not.
"""

# %% [markdown]
r"""
## Further reading

- Lezama et al. 2022, *Token-Critic*, [arXiv 2209.04439](https://arxiv.org/abs/2209.04439): a second network that ranks, and takes fixed tokens back.
- Kool et al. 2019, *Stochastic beams and where to find them*, [arXiv 1903.06059](https://arxiv.org/abs/1903.06059): Gumbel noise and draws without replacement.
- Next: [8. Super-resolution](08_super_resolution.ipynb); [13. The schedule lab](13_schedule_lab.ipynb) measures samplers in nats.
"""
