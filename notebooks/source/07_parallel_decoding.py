# %% [markdown]
r"""
# 7. Parallel decoding: many tokens at a time

*How a whole picture is drawn in a few passes, which four questions every such sampler answers, and where the speed is paid for.*

|  |  |
|---|---|
| **Paper** | [Muse](https://arxiv.org/abs/2301.00704) 2.8; MaskGIT ([arXiv 2202.04200](https://arxiv.org/abs/2202.04200)) |
| **You will learn** | why tokens drawn together do not fit together · how many to fix, which, what to draw, with how much noise · what 1, 4, 24 and all steps look like · where a perfect model still errs |
| **Before this** | [4. Masking](04_masking.ipynb), [5. The base transformer](05_base_transformer.ipynb); independence of random variables |
| **Takes** | @takes@ |
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
DRAWS = 200 if FAST else 2000  # from the exact world of section 1
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
icons = torch.stack(
    [(torch.hypot(x, y) - 2.8).abs() < 0.9, (x.abs() < 1) | (y.abs() < 1), y.abs() % 4 < 2, x < 0]
)
icons = icons.flatten(1).long()  # (4, 64)
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


print(
    "tokens (B, N):",
    tuple(world.sample(6).shape),
    "- logits (B, N, V):",
    tuple(world(world.sample(6)).shape),
)
tiles(
    [torch.cat([icons, icons[:2]]), world.sample(6, torch.Generator().manual_seed(1))],
    ["the icons", "six pictures\nof this world"],
)

# %% [markdown]
r"""
**Predict, then run.** We start from 64 times `[MASK]` and draw all tokens in *one* step from the exact
probabilities. Will each picture be one of the icons, perhaps with some noise more? A blend of two? Or neither?
"""

# %%
from minimuse.sampler import Step, decode


def from_world(steps, n=6, order="random", seed=0):
    """n pictures of the exact world, decoded in so many steps."""
    blank = torch.full((n, world.n), world.mask_id)
    draws = torch.Generator().manual_seed(seed)
    *_, last = decode(
        world, blank, mask_id=world.mask_id, steps=steps, order=order, generator=draws
    )
    return last.tokens


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

The next sections take them one by one. First, a whole decode of the trained base model.
"""

# %%
SIDE = (
    96 // muse.config.low_tokenizer.image_size
)  # pictures of sheets are drawn about 96 pixels wide


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
print("step     u   fixed in it   still masked   mean probability of what was fixed")
for s in steps:
    sure = s.confidence[s.revealed].mean()
    print(
        f"{s.index + 1:>4} {s.u:>6.2f} {int(s.revealed.sum()):>9} {int(s.masked.sum()):>14} {sure:>20.2f}"
    )

# %% [markdown]
r"""
`u` is the progress that guidance sees, `revealed` is what was fixed in this step, `confidence` the probability of the
codes that were drawn. The same as an animation (where your viewer shows none, the strip above shows the same):
"""

# %%
animation(
    [mask_overlay(muse.picture(s)[0].resize((160, 160), 0), s.masked[0]) for s in steps], ms=250
)

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
A dot left of the dotted line is a schedule that is right less often than the cosine. For `sqrt` and `linear` the whole line lies left of
it: they cost tens of points, and that is not luck. The cubic curve begins even more slowly than the cosine, and these prompts cannot separate the two.
"""

# %%
if not FAST:  # four prompts are too few
    assert gains["sqrt"].high < 0, "sqrt is not worse than the cosine"
    assert gains["linear"].high < 0, "linear is not worse than the cosine"
    assert gains["cubic"].low < 0 < gains["cubic"].high, "cubic and cosine can be separated"

# %% [markdown]
r"""
### Exercise 7.1: reveal counts

*Difficulty 3 of 3, about 30 minutes.*

Write `reveal_counts` for the cosine: a list of how many of `n` tokens each of `steps` steps fixes. They must add up
to `n`, and no step may be idle; with more steps than tokens there are only `n` steps. The stub shares them out evenly.
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
    assert abs(paired_difference(by_steps[N], by_steps[16]).value) < 0.1, (
        "the last steps count, too"
    )

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
cost = compare(
    chain, orders=["raster", "random", "halton"], steps=[4, 8, 16, 32], samples=64 if FAST else 1024
)
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
## 6. How noisy

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
    ax.bar(range(3), first, color="0.8", label="counted")
    ax.plot(range(3), p ** (1 / tau) / (p ** (1 / tau)).sum(), "kx", label=r"$\propto p^{1/\tau}$")
    ax.set(title=rf"$\tau$ = {tau}", xticks=range(3), xticklabels=["0.6", "0.3", "0.1"])
    ax.set_xlabel("place, of probability")
axes[0].set_ylabel("fraction of first places")
axes[0].legend(fontsize=9)
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
from minimuse.eval_metrics import diversity

by_noise = {tau: rightness(choice_temperature=tau) for tau in TAUS}
few = PROMPTS[:2] if FAST else PROMPTS[:8]
four = [p for p in few for _ in range(4)]
varied = [
    diversity(detector.features(coarse(few, n=4, seed=100, choice_temperature=tau)), four)
    for tau in TAUS
]
figure, axes = plt.subplots(1, 2, figsize=(10, 3))
named = {f"tau = {tau:g}": right for tau, right in by_noise.items()}
gains = forest(axes[0], named, "tau = 0")
reach = [[m.value - m.low for m in varied], [m.high - m.value for m in varied]]
axes[1].errorbar(
    range(len(TAUS)), [m.value for m in varied], yerr=reach, fmt="s--", color="C1", capsize=3
)
axes[1].set(
    ylabel="difference of two pictures\nof one prompt", ylim=(0, 1.5 * max(m.value for m in varied))
)
axes[1].set_xticks(range(len(TAUS)), [f"{tau:g}" for tau in TAUS])
axes[1].set_xlabel(r"ranking noise $\tau$ at the start")
plt.show()
for name, gain in gains.items():
    print(f"{name:>8} less tau = 0: right {gain}")
print("this checkpoint's own:", muse.config.base_sampling.choice_temperature)

# %% [markdown]
r"""
Look at the rows first. Without noise, different seeds make much the same picture: the most certain positions are always the same
ones, and among the codes that were drawn there, the likely ones win. Noise gives the others a chance, so objects
come to stand elsewhere. At $\tau = 50$ hardly anything but chance is left of the ranking: that is the order *random*.

So noise is a dial for variety, and what it costs in right pictures is for your intervals to say. But note what "without
noise" did: it *changed what is drawn*, not only when. The next section catches that in the exact world.
"""

# %% [markdown]
r"""
## 7. Where a perfect model errs

Back to the icons, where the model makes no error at all. A picture is **torn** if more than 6 of its 64 tokens
disagree with every icon; true pictures hardly ever are. And of those that are not torn, how many tokens are off? In
the world it is 3% of 64, about 1.9. Both errors come only from the sampler.
"""

# %%
away = lambda tokens: (tokens[:, None] != icons).sum(-1).amin(1)  # noqa: E731  (B,) tokens off the nearest icon
truth = away(world.sample(DRAWS, torch.Generator().manual_seed(0))).double()
ladder = [1, 2, 4, 8, 16, 32, 64]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for order, mark in (("random", "o-"), ("halton", "s--"), ("confidence", "^:")):
    off = [away(from_world(t, DRAWS, order)).double() for t in ladder]
    axes[0].plot(ladder, [(o > 6).double().mean() for o in off], mark, label=order)
    axes[1].plot(ladder, [o[o <= 6].mean() for o in off], mark, label=order)
axes[1].axhline(truth.mean(), color="k", lw=1, label="the world")
axes[0].set(ylabel="fraction of torn pictures", ylim=(-0.03, 1.03))
axes[1].set(ylabel="tokens off, if not torn", ylim=(0, None))
for ax in axes:
    ax.set(xlabel="steps for 64 tokens", xscale="log", xticks=ladder, xticklabels=ladder)
    ax.minorticks_off()
axes[1].legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
Left: with enough steps nothing is torn, whatever the order. Right, the excess NLL: one token at a time, random and
Halton are exact, but **confidence is not**. It is cleaner than the truth. A code that was drawn against the odds
has a low confidence, is not fixed, and is *drawn again* next time: unlikely draws are rejected until likely ones come.
That does not sample from the model; it searches for typical pictures. For pictures to look at, that may be welcome.
For anything that counts on the probabilities, it is an error that no number of steps removes.

[Notebook 13](13_schedule_lab.ipynb) measures all this, with intervals, in larger worlds.
"""

# %% [markdown]
r"""
## 8. What

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
for k, (label, how) in enumerate(
    {"temperature 1": (1.0,), "0.5": (0.5,), "2": (2.0,), "1, top_k = 2": (1.0, 2)}.items()
):
    drawn = torch.bincount(draw(logits, points, *how)[0], minlength=4) / 20_000
    ax.bar(
        torch.arange(4) + 0.2 * k - 0.3,
        drawn,
        0.2,
        label=label,
        hatch=["", "//", "..", "xx"][k],
        ec="w",
    )
ax.set(xlabel="code", ylabel="fraction of draws", xticks=range(4))
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
### Exercise 7.3: the whole loop

*Difficulty 2 of 3, about 20 minutes.*

Now write `decode`: a generator that yields the tokens after each step. All rows have the same number of masked
tokens. The stub is complete but for one line: it fixes the *first* masked tokens, not the most certain ones.
"""


# %%
def my_decode(logits_fn, tokens, *, mask_id, steps, generator=None):
    for i, k in enumerate(reveal_counts(int((tokens[0] == mask_id).sum()), steps)):
        masked = tokens == mask_id
        p = logits_fn(tokens, i / max(1, steps - 1)).softmax(-1)  # (B, N, V)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view_as(tokens)
        scores = -torch.arange(tokens.shape[1]).expand_as(tokens)  # your code: whom to fix?
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
## 9. A rule that decides by itself

Why should each picture take the same steps? Tokens drawn together are drawn as if independent, and the error of that
is at most the sum of their entropies less the largest one. So: fix the most certain tokens as long as that stays within a
*bound* (EB-Sampler, arXiv 2505.24857). Where the model is certain, that is many at once; where it is not, one.
"""

# %%
from minimuse.lab_samplers import entropy_bound
from minimuse.sampler import token_entropy

show(entropy_bound, token_entropy)

# %%
figure, ax = plt.subplots(figsize=(7, 3))
for bound, dash in ((1.0, "-"), (8.0, "--"), (32.0, ":")):
    rule = entropy_bound(bound)
    strip = base_steps("a large red cube", seed=1, schedule=rule, order="entropy", steps=N)
    left = [N, *(int(s.masked.sum()) for s in strip)]
    ax.plot(range(len(left)), left, dash, label=f"bound {bound:g} nats: {len(strip)} passes")
ax.plot([N, *(int(s.masked.sum()) for s in steps)], "0.7", label=f"cosine: {len(steps)} passes")
ax.set(xlabel="passes", ylabel="tokens still masked")
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
The rule chooses its own curve, another one for each picture. A small bound means careful steps, and many.
"""

# %% [markdown]
r"""
## What failure looks like

We take the sampler's own source and change one line of it, in two ways that real code bases have been. All runs,
shapes are right, pictures come out.

1. *Redrawn*: every step draws **all** tokens again, those that were fixed too.
2. *Noise on probabilities*: Gumbel noise is added to $p$, not to $\log p$.
"""

# %%
import inspect
import types

from minimuse import sampler
from minimuse.cfg import guided, null_text


def broken(old, new):
    """`decode` of a sampler.py in which one line is changed."""
    source, module = inspect.getsource(sampler), types.ModuleType("broken")
    assert source.count(old) == 1
    exec(source.replace(old, new), vars(module))
    return module.decode


true_line = "torch.where(masked, draw(logits, random[:, i, 0], temperature, top_k, top_p), tokens)"
redrawn = broken(true_line, "draw(logits, random[:, i, 0], temperature, top_k, top_p)")
on_p = broken("score + noise * gumbel", "score.exp() + noise * gumbel")


def drawn_by(decode, n=7, seed=60):
    """Pictures of one prompt by any `decode`, each with a generator of its own; the rest as the checkpoint has it."""
    how = muse.config.base_sampling
    with torch.inference_mode():
        text = muse.encoder.encode(["a large purple cylinder"] * n)
        fn = guided(
            muse.base, muse.base.memory(text), muse.base.memory(null_text(text)), how.guidance
        )
        *_, last = decode(
            fn,
            torch.full((n, N), muse.base.mask_id),
            mask_id=muse.base.mask_id,
            steps=how.steps,
            sampling_temperature=how.sampling_temperature,
            choice_temperature=1.0,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(n)],
        )
    return muse.picture(last._replace(stage="base"))


sheet = [*drawn_by(decode), *drawn_by(redrawn), *drawn_by(on_p)]
grid(sheet, ["as it is"] * 7 + ["redrawn"] * 7 + ["noise on p"] * 7, columns=7, scale=SIDE)

# %% [markdown]
r"""
*Redrawn* asks the model about tokens that it can see. The loss never counted those (notebook 4), so the answers are
arbitrary, and they take the place of what was fixed. (When inpainting, they paint over the picture that was given.)
*Noise on p* does not show at all: it is nearly a random
order, since probabilities lie between 0 and 1, and noise does not. Pictures reveal the first and hide the second. What
finds both is a check of the property that is broken. For the second: two positions, one certain (90%), one with 100 codes
alike (1% each). How often is the *unsure* one fixed first? By section 6 in $p_i^{1/\tau} / \sum_j p_j^{1/\tau}$ of the decodes. In the first of two steps the
noise has already fallen to $\tau = 0.5$, so that is $0.01^2 / (0.01^2 + 0.9^2)$, about one in 8,000.
"""

# %%
print(check_decode(redrawn), "\n")
unsure = torch.zeros(4000, 2, 100)
unsure[:, 0] = torch.cat([torch.tensor([0.9]), torch.full((99,), 0.1 / 99)]).log()
first = {}
for name, fn in (("as it is", decode), ("noise on p", on_p)):
    blank, g0 = torch.full((4000, 2), 100), torch.Generator().manual_seed(0)
    how = {"mask_id": 100, "steps": 2, "choice_temperature": 1.0, "sampling_temperature": 0.0}
    begun = next(fn(lambda tokens, u: unsure, blank, generator=g0, **how))
    first[name] = begun.revealed[:, 1].double().mean().item()
    print(f"{name:>11}: the unsure position is first in {first[name]:.1%} of 4000 decodes")
assert first["as it is"] < 0.002, "the formula of section 6 does not hold"
assert first["noise on p"] > 0.1, "noise on p ranks as well"

# %% [markdown]
r"""
## Summary

- Tokens that are drawn in the same step are drawn as if independent. That is the whole price of parallel decoding.
- So fix few in the dark and many in the light: the cosine. Most of the gain comes within a few steps.
- Which tokens: those with the highest probability, with Gumbel noise that makes the ranking a draw without replacement.
- Neighbours need each other most, so raster order in blocks is bad, and Halton's far-apart positions are good.
- Confidence prefers typical draws. Even with a perfect model and one token a step it does not sample the model's
  distribution.
- What is fixed stays fixed, and what is given is never touched: test that, pictures do not show it.
"""

# %% [markdown]
r"""
## Further reading

- Chang et al. 2022, *MaskGIT*, [arXiv 2202.04200](https://arxiv.org/abs/2202.04200): the algorithm, and its schedules compared.
- Besnier et al. 2025, *Halton scheduler*, [arXiv 2503.17076](https://arxiv.org/abs/2503.17076): far-apart positions.
- Lezama et al. 2022, *Token-Critic*, [arXiv 2209.04439](https://arxiv.org/abs/2209.04439): a second network that ranks, and takes fixed tokens back.
- Kool et al. 2019, *Stochastic beams and where to find them*, [arXiv 1903.06059](https://arxiv.org/abs/1903.06059): Gumbel noise and draws without replacement.
- Next: [8. Super-resolution](08_super_resolution.ipynb), the same loop on a finer grid; [13. The schedule lab](13_schedule_lab.ipynb).
"""
