# %% [markdown]
r"""
# 7. Parallel decoding: many tokens at a time

*How a whole picture is drawn in a few passes: how many tokens to fix in each, and which.*

|  |  |
|---|---|
| **Paper** | [Muse](https://arxiv.org/abs/2301.00704) 2.8; MaskGIT ([arXiv 2202.04200](https://arxiv.org/abs/2202.04200)) |
| **You will learn** | why tokens drawn together do not fit together · how many to fix in each step, and which · what 1, 4, 24 and all steps look like |
| **Before this** | [4. Masking](04_masking.ipynb), [5. The base transformer](05_base_transformer.ipynb); independence of random variables |
| **Takes** | @takes@; about 90 minutes of your time |
| **Files** | [`sampler.py`](../minimuse/sampler.py) |
"""

# %% knobs
import os
from functools import cache
from itertools import pairwise

import diagrams
import matplotlib.pyplot as plt
import torch
from checks import check_decode, check_margin, check_reveal_counts
from view import animation, show, style

from minimuse import Muse
from minimuse.plots import film, grid, mask_overlay

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer pictures
CHECKPOINT = "toy"  # a shipped name or a folder
COUNTED = 4 if FAST else 64  # prompts, one picture of each, wherever something is counted
style()

# %% [markdown]
r"""
The base model of notebook 5 says, for every hidden token *by itself*, which codes may stand there. A picture needs
all of them, and they must fit. A language model solves this by drawing one token after the other: $N$ tokens, $N$
passes through the network. Muse draws many in each pass. For the paper's 256 low-resolution tokens it takes 24
passes, for the 4096 of super-resolution 8.

So the question of this notebook is: how can that work, and when does it not?
"""

# %% [markdown]
r"""
## 1. Why not all at once?

Take a world with two tokens and two pictures, AA and BB, each half of the time. Each token *by itself* is A or B with
probability 1/2, and a perfect model says just that. Draw both at once from these answers:

| | AA | AB | BA | BB |
|---|---|---|---|---|
| the world | 1/2 | 0 | 0 | 1/2 |
| both drawn at once | 1/4 | 1/4 | 1/4 | 1/4 |

Half of what is drawn does not exist. Nothing is wrong with the model; what is wrong is the product

$$p(x_1, x_2) \;\neq\; p(x_1)\,p(x_2).$$

Draw the first, *look again*, draw the second, and all is well: $p(x_1)\,p(x_2 \mid x_1)$ is exact.
"""

# %% [markdown]
r"""
Now in pictures. Here is a world of four icons on a grid of 8 x 8 tokens, two codes each; every token of a
picture is the wrong one with a probability of 3%. `MixtureWorld` knows *every* conditional probability of it exactly,
so it can play the part of a perfectly trained network.
"""

# %%
from minimuse.lab_worlds import MixtureWorld

y, x = torch.meshgrid(torch.arange(8) - 3.5, torch.arange(8) - 3.5, indexing="ij")
ring, cross = (torch.hypot(x, y) - 2.8).abs() < 0.9, (x.abs() < 1) | (y.abs() < 1)
icons = torch.stack([ring, cross, y.abs() % 4 < 2, x < 0]).flatten(1).long()  # (4, 64)
right = torch.nn.functional.one_hot(icons, 2).double()  # (4, 64, 2)
world = MixtureWorld(0.97 * right + 0.03 * (1 - right))


def tiles(rows, titles):
    """A list of tokens (6, 64) each -> a row of six icons under each title."""
    _, axes = plt.subplots(len(rows), 6, figsize=(6, 1.05 * len(rows)))
    for line, tokens, title in zip(axes, rows, titles, strict=True):
        for ax, one in zip(line, tokens, strict=True):
            ax.imshow(one.view(8, 8), cmap="gray_r", vmin=0, vmax=1.3)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(True)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    plt.show()


six = world.sample(6, torch.Generator().manual_seed(1))
print(f"tokens (B, N): {tuple(six.shape)}, logits (B, N, V): {tuple(world(six).shape)}")
tiles([torch.cat([icons, icons[:2]]), six], ["the icons", "six pictures\nof this world"])

# %% [markdown]
r"""
**Predict, then run.** We start from 64 times `[MASK]` and draw all tokens in *one* step from the exact
probabilities. Will each picture be one of the icons, perhaps with some noise more? A blend of two? Or neither?
"""

# %%
from minimuse.sampler import Step, decode


def from_world(steps):
    """Six pictures of the exact world, decoded in so many steps."""
    blank, draws = torch.full((6, world.n), world.mask_id), torch.Generator().manual_seed(0)
    how = {"mask_id": world.mask_id, "steps": steps, "order": "random"}
    return list(decode(world, blank, generator=draws, **how))[-1].tokens


few = [1, 2, 4, 8, world.n]
tiles([from_world(steps) for steps in few], [f"{steps} step{'s' * (steps > 1)}" for steps in few])

# %% [markdown]
r"""
Neither: fragments of all four, on top of each other. With nothing known, each token by itself is black as often as it is over
*all* icons, and that is what is drawn. With two steps, what was drawn first is often torn between icons itself. From
eight on, the first few tokens settle which icon it is, and all others follow.
"""

# %% [markdown]
r"""
## 2. The algorithm

1. Begin with `[MASK]` everywhere (or with the part of a picture that is known).
2. **Predict** all masked tokens in one pass, and **draw** one code for each.
3. **Rank** them: how probable is the code that was drawn?
4. **Fix** the best ones, as many as the schedule says. Hide the rest again.
5. From 2, until nothing is masked.

What is fixed stays. What was drawn and not fixed is forgotten; it will be drawn anew when more is known. In our code
this is one generator: it knows nothing of networks, and yields a `Step` at a time.
"""

# %%
muse = Muse.from_pretrained(CHECKPOINT, device="cpu")
N, T = muse.config.base.tokens, muse.config.base_sampling.steps
diagrams.decode_loop(muse.config)

# %%
show(Step, decode)

# %% [markdown]
r"""
Four questions are answered in it, each by an argument that you can replace:

| Question | Argument | Muse's answer |
|---|---|---|
| *how many* are fixed | `schedule` | a cosine |
| *which* | `order` | those with the highest probability |
| *how noisy* is the ranking | `choice_temperature` | none in the paper; our checkpoints take MaskGIT's, which falls to 0 |
| *what* is drawn | `sampling_temperature`, `top_k` | a fair draw |

Sections 3 to 5 are about the first two, [notebook 7b](07b_noise_and_temperature.ipynb) about the others. First, a whole decode of the
trained base model.
"""

# %%
SIDE = 96 // muse.config.low_tokenizer.image_size  # pictures are drawn about 96 pixels wide


def base_steps(prompt, seed=0, **how):
    """The Steps of the base model alone."""
    found = []
    for step in muse.steps(prompt, seed=seed, **how):
        found.append(step)
        if not step.masked.any():  # the base model is done; super-resolution would follow
            break
    return found


steps = base_steps("a large blue cube", seed=5)
film(muse, steps, most=8)

# %%
print("step     u   fixed   still masked   mean probability of what was fixed")
for s in steps:
    sure, fixed, left = s.confidence[s.revealed].mean(), s.revealed.sum(), s.masked.sum()
    print(f"{s.index + 1:>4} {s.u:>6.2f} {fixed:>6} {left:>12} {sure:>16.2f}")

# %% [markdown]
r"""
`u` is the progress that guidance sees, `revealed` is what was fixed in this step, `confidence` the probability of the
codes that were drawn. The same as an animation (where your viewer shows none, the strip above shows the same):
"""

# %%
animation([mask_overlay(muse.picture(s)[0].resize((160, 160), 0), s.masked[0]) for s in steps])

# %% [markdown]
r"""
## 3. How many

A schedule is a curve $\gamma$ from 1 down to 0: after step $i = 0 \dots T-1$ of $T$, a fraction $\gamma\big(\tfrac{i+1}{T}\big)$ of the $N$ tokens is
still masked,

$$\text{masked after step } i \;=\; \Big\lfloor N\,\gamma\Big(\frac{i+1}{T}\Big) \Big\rfloor, \qquad \gamma(u) = \cos\frac{\pi u}{2} \text{ for Muse},$$

and the differences are what each step fixes. Where that would be none, one is taken all the same.
"""

# %%
from minimuse.masking import SCHEDULES, get_schedule, reveal_counts

show(reveal_counts)

# %%
names, dashes = ["sqrt", "linear", "cosine", "cubic"], [":", "--", "-", "-."]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
u = torch.linspace(0, 1, 101).tolist()
for name, dash in zip(names, dashes, strict=True):
    axes[0].plot(u, [get_schedule(name)(v) for v in u], dash, label=name)
    axes[1].plot(range(1, T + 1), reveal_counts(N, T, name), dash, marker=".", label=name)
axes[0].set(xlabel="progress u", ylabel="fraction still masked", title="the curve")
axes[1].set(xlabel=f"step of {T}", ylabel="tokens fixed in it", title=f"{N} tokens", yscale="log")
axes[0].legend(fontsize=9)
plt.show()
print("known by name:", ", ".join(SCHEDULES), "... or any function of u")

# %% [markdown]
r"""
**Predict, then run.** We have 64 tokens and no more than 4 steps. A fair share would be 16 each. How many does the
cosine fix in the first step, and how many in the last?
"""

# %%
for name in names:
    print(f"{name:>7}: {reveal_counts(64, 4, name)}")

# %% [markdown]
r"""
The first step works blind: what it fixes together is drawn independently, and the fewer there are, the less can
clash. In the last, most of the picture stands, hardly anything is left to decide, and many tokens at once do little harm.
`sqrt` does the opposite: most of the picture is decided in the first steps. We count what that costs. The detector of notebook 1
says which pictures show what was asked for. All schedules draw the same prompts with the same seeds, so we compare *pairs*: what is hard
for every schedule cancels. Bars are 95% intervals of the difference from the cosine.
"""

# %%
from minimuse.eval_metrics import paired_difference, proportion_interval
from minimuse.eval_networks import Detector
from minimuse.eval_prompts import matches, parse_prompt, prompt_set

detector = Detector.from_pretrained()
# one object, two in a relation, two or three alike, in turn; each prompt once
PROMPTS = [ask.prompt for ask in prompt_set("mixed", 2 * COUNTED)[::2]]


def coarse(prompts, n=1, seed=0, **how):
    """Prompts -> n pictures of each by the base model only."""
    with torch.inference_mode():
        *_, last = muse.decode_base(muse.jobs(prompts, n, seed), **how)
        return muse.picture(last)


USUAL = {"schedule": "cosine", "order": "confidence", "steps": T}
USUAL["choice_temperature"] = muse.config.base_sampling.choice_temperature


def rightness(**how):
    """How the base model decodes -> (n,) bool: does the picture of each prompt show what it asks for?"""
    return counted(**{**USUAL, **how})


@cache  # several sections count the usual setting
def counted(**how):
    read = detector.detect(coarse(PROMPTS, seed=100, **how))
    right = [matches(r, parse_prompt(p)).right for r, p in zip(read, PROMPTS, strict=True)]
    return torch.tensor(right)


def forest(ax, found, baseline):
    """{name: rightness} -> each one's paired difference from the one called `baseline`, with its interval."""
    gains = {n: paired_difference(r, found[baseline]) for n, r in found.items() if n != baseline}
    for row, gain in enumerate(gains.values()):
        ax.plot([gain.low, gain.high], [row, row], color="C0")
        ax.plot(gain.value, row, "o", color="C0")
    ax.axvline(0, color="k", lw=1, ls=":")
    ax.set_yticks(range(len(gains)), list(gains))
    ax.set(xlabel=f"fraction right, less that of {baseline}", ylim=(len(gains) - 0.5, -0.5))
    return gains


STEPS = 6  # few, so that the choice of a schedule or order matters
by_schedule = {name: rightness(schedule=name, steps=STEPS) for name in names}
for name, right in by_schedule.items():
    print(f"{name:>7}: right {proportion_interval(right)}")
figure, ax = plt.subplots(figsize=(6, 2.3))
gains = forest(ax, by_schedule, "cosine")
plt.show()

# %% [markdown]
r"""
A dot left of the dotted line is a schedule that is right less often than the cosine. For `sqrt` the whole line lies left of it: it costs
tens of points, and that is not luck. `linear` seems to cost some, but its line reaches zero, so these prompts are too few to be sure. The
cubic curve begins even more slowly than the cosine, and cannot be told from it either.
"""

# %%
if not FAST:  # four prompts are too few
    assert gains["sqrt"].high < 0, "sqrt is not worse than the cosine"
    assert gains["linear"].value < 0 < gains["linear"].high, "linear can be separated"
    assert gains["cubic"].low < 0 < gains["cubic"].high, "cubic and cosine can be separated"

# %% [markdown]
r"""
### Exercise 7.1: reveal counts

*Difficulty 3 of 3, about 30 minutes.*

Write `reveal_counts` for the cosine: a list of how many of `n` tokens each of `steps` steps fixes. They must add up
to `n`, and no step may be idle; with more steps than tokens there are only `n` steps. The stub shares them out evenly.

<details><summary>Hint</summary>

After step $i$ at most $\lfloor n \cos(\pi (i+1) / 2T) \rfloor$ tokens stay masked. Then two corrections: at least one fewer than before, and at
least one for each step that follows.

</details>
"""

# %%
import math


def my_reveal_counts(n, steps):
    steps = min(n, steps)
    return [n // steps + (i < n % steps) for i in range(steps)]  # your code: this is linear


check_reveal_counts(my_reveal_counts)


# %% tags=["solution"]
def my_reveal_counts(n, steps):
    steps, left, counts = min(n, steps), n, []
    for i in range(steps):
        stay = math.floor(n * math.cos(math.pi / 2 * (i + 1) / steps) + 1e-6)
        stay = min(stay, left - 1)  # this step fixes at least one
        stay = max(stay, steps - 1 - i)  # and leaves one for each that follows
        counts.append(left - stay)
        left = stay
    return counts


check_reveal_counts(my_reveal_counts)

# %% [markdown]
r"""
## 4. How many steps

The same prompt and seed in 1 step, in 4, in 24, and one token at a time.
"""

# %%
tried = [1, 4, 24, N]
strips = [base_steps("a large green cylinder", seed=2, steps=t) for t in tried]
sheet, titles = [], []
for t, strip in zip(tried, strips, strict=True):
    for share_done in (0.25, 0.5, 0.75, 1.0):
        s = strip[max(0, math.ceil(share_done * len(strip)) - 1)]
        sheet.append(mask_overlay(muse.picture(s)[0], s.masked[0]))
        titles.append(f"{s.index + 1} of {t}")
grid(sheet, titles, columns=8, scale=SIDE)

# %% [markdown]
r"""
Read it in fours: each group of four pictures is one decode, after a quarter, half, three quarters and all of its
steps (a decode in one step has but one picture to show). One step makes a lump: every token knows the prompt, and none
knows the others.

**Predict, then run.** We count over all prompts, from 1 step up to one token per step. Will "right" go on rising to the
end, since each token then sees all of the others?
"""

# %%
ladder = [1, 4, N] if FAST else [1, 2, 4, 8, 16, N]
by_steps = {t: rightness(steps=t) for t in ladder}
found = [proportion_interval(right) for right in by_steps.values()]
reach = [[m.value - m.low for m in found], [m.high - m.value for m in found]]
figure, ax = plt.subplots(figsize=(6, 3))
ax.errorbar(range(len(found)), [m.value for m in found], yerr=reach, fmt="o-", capsize=3)
ax.set_xticks(range(len(ladder)), ladder)
ax.set(xlabel=f"steps for {N} tokens", ylabel="fraction right", ylim=(0, 1.03))
plt.show()
for t, next_t in pairwise(ladder):
    print(f"{next_t:>3} steps less {t:>2}: {paired_difference(by_steps[next_t], by_steps[t])}")

# %% [markdown]
r"""
It rises steeply within the first few steps, and then it is over: the last differences printed below the figure contain zero. More steps can
only repair what comes from drawing together. The errors that are left are the model's own, and no number of steps repairs
those. That is why Muse is fast: most passes of a one-by-one decoder are spent on tokens that were already certain.
"""

# %%
if not FAST:
    assert paired_difference(by_steps[4], by_steps[1]).low > 0.2, "the first steps bring little"
    last = paired_difference(by_steps[N], by_steps[16])
    assert abs(last.value) < 0.1, "the last steps count, too"

# %% [markdown]
r"""
## 5. Which

An **order** gives each token a score; the highest are fixed. Muse's is **confidence**, $\log p(\text{drawn code})$.
There are others, and they are short:
"""

# %%
from minimuse.sampler import by_rank, confidence, entropy, halton_rank, margin, raster

show(confidence, margin, entropy, raster, by_rank)

# %% [markdown]
r"""
*Raster* goes row by row, like an autoregressive model, and does not look at the logits at all. Neither do *random* and
*Halton*: a sequence of positions made so that any few that follow each other lie far apart. Far positions carry little
information about each other, so drawing them together costs little.
"""

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
g = muse.config.base.grid
for ax, count in zip(axes, (4, 12, 32, g * g), strict=True):
    rank = halton_rank(g, g).view(g, g).float()
    ax.imshow(torch.where(rank < count, rank, float("nan")), cmap="viridis", vmin=0, vmax=g * g)
    ax.set(title=f"the first {count}", xticks=[], yticks=[])
    ax.grid(False)
plt.show()

# %% [markdown]
r"""
When does each order fix which position? The mean step over several decodes of the same prompt, dark is early.
"""

# %%
ORDERS = ["confidence", "margin", "entropy", "random", "halton", "raster"]
runs = 2 if FAST else 10
figure, axes = plt.subplots(1, 6, figsize=(11, 2.3))
for ax, order in zip(axes, ORDERS, strict=True):
    when = torch.zeros(N)
    for seed in range(runs):
        for s in base_steps("a large blue cube", seed=seed, order=order, choice_temperature=0.0):
            when[s.revealed[0]] += (s.index + 1) / runs
    shown = ax.imshow(when.view(g, g), cmap="magma", vmin=1, vmax=T)
    ax.set(title=order, xticks=[], yticks=[])
    ax.grid(False)
figure.colorbar(shown, ax=axes, label="step", shrink=0.9)
plt.show()

# %% [markdown]
r"""
The three that look at the model begin far from the object, with sky and floor, and leave the object for the end. By then
its surroundings are settled, but its identity is still undecided. Random and Halton place a few tokens
of the object early, and the rest gathers round them.

The same seeds in each order, with few steps; the last row is raster with one token a step, an autoregressive decode
by the same network.
"""

# %%
sheet, titles = [], []
for order, t in [*((o, 6) for o in ORDERS), ("raster", N)]:
    sheet += coarse("a large red cube", n=7, seed=20, order=order, steps=t)
    titles += [f"{order}, {t}"] * 7
grid(sheet, titles, columns=7, scale=max(1, SIDE * 3 // 4))

# %%
from minimuse.lab import compare
from minimuse.lab_worlds import ChainWorld

by_order = {order: rightness(order=order, steps=STEPS) for order in ORDERS}
figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=[1.2, 1])
gains = forest(axes[0], by_order, "confidence")
axes[0].set_title(f"the trained model, {STEPS} steps", fontsize=11)
chain = ChainWorld.sticky(n=64, codebook_size=4, stay=0.8)
ways, many = ["raster", "random", "halton"], 64 if FAST else 1024
cost = compare(chain, orders=ways, steps=[4, 8, 16, 32], samples=many)
cost.plot(ax=axes[1])
axes[1].set_title("an exact world of like neighbours", fontsize=11)
plt.show()
for name, gain in gains.items():
    print(f"{name.replace(chr(10), ' '):>21}: {gain}")

# %% [markdown]
r"""
Left, the paired differences from confidence: a line that crosses zero says that this many prompts cannot separate the two orders. Right, an exact world again: a
chain in which a token mostly repeats the one before it. There the sampler's error can be computed (KL divergence from
the world, in nats per token). **Raster** fixes *neighbours* together, and they need each other most: its error is by far
the largest. Halton's positions lie far apart, so its error is the least. With one token per step, every order is exact. Which order is
best depends on which tokens depend on which; notebook 13 shows more worlds.
"""

# %% [markdown]
r"""
### Exercise 7.2: margin

*Difficulty 1 of 3, about 10 minutes.*

Confidence looks only at the drawn code. Write **margin**: the probability of the likeliest code less that of the
second, whatever was drawn. Then a position where two codes look alike counts as unsure. The stub ranks by the likeliest
code's probability.

<details><summary>Hint</summary>

`topk(2)` of the probabilities gives both.

</details>
"""


# %%
def my_margin(logits, drawn, masked, u):
    return logits.softmax(-1).amax(-1)  # your code: how far behind is the runner-up?


check_margin(my_margin)


# %% tags=["solution"]
def my_margin(logits, drawn, masked, u):
    first, second = logits.softmax(-1).topk(2).values.unbind(-1)
    return first - second


check_margin(my_margin)

# %% [markdown]
r"""
## What failure looks like

We change one line of the sampler's own source, as real code bases have done: each step draws **all** tokens again, also those that were
fixed. It runs, shapes are right, pictures come out.
"""

# %%
import inspect
import types
from unittest.mock import patch

from minimuse import sampler

source, redrawn = inspect.getsource(sampler), types.ModuleType("redrawn")
new = "draw(logits, random[:, i, 0], temperature, top_k, top_p)"
assert source.count(f"torch.where(masked, {new}, tokens)") == 1
exec(source.replace(f"torch.where(masked, {new}, tokens)", new), vars(redrawn))
sheet = coarse("a large purple cylinder", n=7, seed=60)
with patch("minimuse.muse.decode", redrawn.decode):
    sheet += coarse("a large purple cylinder", n=7, seed=60)
grid(sheet, ["as it is"] * 7 + ["redrawn"] * 7, columns=7, scale=SIDE)

# %% [markdown]
r"""
The mistake asks the model about tokens that it can see. The loss never counted those (notebook 4), so the answers are
arbitrary, and they replace what was fixed. When inpainting, they would paint over the picture that was given. A check of the
property that is broken finds it at once:
"""

# %%
verdict = check_decode(redrawn.decode)
assert not verdict, "the check does not notice"
print(verdict)

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

`by_steps` counts what the *base model* gains from more steps. Does the answer depend on the prompt? Choose two kinds of prompts, for
example one object and two in a relation, write down which of them needs more steps, and measure both with paired differences.
"""

# %% [markdown]
r"""
## Summary

- Tokens that are drawn in the same step are drawn as if independent. That is the whole price of parallel decoding.
- So fix few tokens early and many late: the cosine. Most of the gain comes within a few steps.
- Which tokens: those with the highest probability. Neighbours depend on each other most, so raster order in blocks is bad, and Halton's
  far-apart positions are good.
- What is fixed stays fixed, and what is given is never touched: test that.
"""

# %% [markdown]
r"""
## Further reading

- Chang et al. 2022, *MaskGIT*, [arXiv 2202.04200](https://arxiv.org/abs/2202.04200): the algorithm, and its schedules compared.
- Besnier et al. 2025, *Halton scheduler*, [arXiv 2503.17076](https://arxiv.org/abs/2503.17076): far-apart positions.
- Next: [7b. Noise and temperature](07b_noise_and_temperature.ipynb), the other two questions, or
  [8. Super-resolution](08_super_resolution.ipynb), the same loop on a finer grid.
"""
