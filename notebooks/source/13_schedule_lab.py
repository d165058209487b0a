# %% [markdown]
r"""
# 13. The schedule lab: what parallel decoding costs

*In worlds whose every conditional is known, the network makes no error, so all that is left is the schedule's.*

|  |  |
|---|---|
| **Paper** | Muse 2.8; MaskGIT (arXiv 2202.04200); Halton order (arXiv 2503.17076) |
| **You will learn** | why many tokens per step cost accuracy, in nats · where the cosine wins and where it does not · what an order changes |
| **Before this** | [7. Parallel decoding](07_parallel_decoding.ipynb); entropy and KL divergence; conditional probability |
| **Takes** | @takes@; about 75 minutes of your time |
| **Files** | [`lab_worlds.py`](../minimuse/lab_worlds.py), [`lab.py`](../minimuse/lab.py) |
"""

# %% knobs
import os

import matplotlib.pyplot as plt
import torch
from checks import check_order, check_schedule
from IPython.display import Markdown
from view import show, style

from minimuse.eval_metrics import paired_difference
from minimuse.lab import ChainWorld, MixtureWorld, PottsWorld, World, compare

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer samples
SAMPLES = 64 if FAST else 512  # intervals narrow by the root of it
STEPS = (4, 16) if FAST else (4, 8, 16)
KL = ["kl"]  # the only measure of this notebook
style()

# %% [markdown]
r"""
## 1. Two errors, and how to see only one

A parallel decode reveals a set $S_1$ of tokens, then $S_2$ given those, and so on for $T$ steps. Within a step each
token is drawn by itself, as if the others of the step did not exist. So even a perfect network samples not from the
truth $p$ but from

$$q(x) = \prod_{t=1}^{T} \prod_{i \in S_t} p\big(x_i \mid x_{S_1}, \dots, x_{S_{t-1}}\big).$$

What that costs is the sum, over steps, of the **total correlation** that the step throws away. With
$S_{<t}$ all tokens revealed before step $t$ and $H$ the entropy in nats:

$$\mathrm{KL}(p \,\|\, q) = \sum_{t=1}^{T} \Big[ \sum_{i \in S_t} H(x_i \mid x_{S_{<t}}) - H(x_{S_t} \mid x_{S_{<t}}) \Big].$$

It is zero where the tokens of a step are independent given the earlier ones. A trained network adds an error of its
own; to see only the schedule's we need a $p$ whose conditionals are exact.
"""

# %% [markdown]
r"""
### Two coins

The smallest case. Two coins show the same side nine times out of ten. Drawn one after the other they are right. Drawn
at once each is fair, and they agree half the time. The formula says what is lost: their mutual information.
"""

# %%
agree = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.double)
coins = ChainWorld(agree, 2)  # x_2 given x_1, by the rows of `agree`
p = 0.5 * agree
lost = (p * (p / 0.25).log()).sum().item() / 2
print(f"mutual information: {lost:.4f} nats per token, worked out by hand")
both = compare(coins, ["linear"], ["raster"], steps=(1, 2), samples=SAMPLES)
one = both["linear", "raster", 1]["kl"]
assert abs(one.value - lost) < 2 * one.margin, "the estimate is not the mutual information"
assert both["linear", "raster", 2]["kl"].value < 1e-6, "two steps are not exact"
Markdown(both.table(metrics=KL))

# %% [markdown]
r"""
The column `kl` is what this notebook is about. In one step it agrees with the number worked out by hand, in
two steps it is zero. It was *estimated* from samples, with a 95% interval; later worlds are too large to work
out by hand.
"""

# %% [markdown]
r"""
## 2. Three worlds

A **world** is a distribution over a grid of $N$ tokens with $V$ codes, small enough to sum over all pictures at once:

- `MixtureWorld`: first one of $K$ pictures is chosen, then each token by itself. Every token carries information about all others, as
  the colour of one patch of a cube does about the cube.
- `ChainWorld`: a Markov chain along the rows. A token carries information about its neighbours and little about what is far.
- `PottsWorld`: spins on a strip that like their neighbours' state, in two dimensions.
"""

# %%
worlds = {"mixture": MixtureWorld.random(), "chain": ChainWorld.sticky(), "potts": PottsWorld()}
rows = 6
figure, axes = plt.subplots(3, rows, figsize=(9, 4.2))
for line, (name, world) in zip(axes, worlds.items(), strict=True):
    for ax, x in zip(line, world.sample(rows, torch.Generator().manual_seed(0)), strict=True):
        ax.imshow(x.view(world.grid), cmap="viridis", vmin=0, vmax=world.v - 1)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
    line[0].set_ylabel(f"{name}\nN = {world.n}, V = {world.v}", fontsize=8)
figure.suptitle("exact samples of three worlds, a colour a code")
plt.show()

# %% [markdown]
r"""
The mixture looks like noise, and is none: 32 hidden pictures are behind it, which a network would know by heart. The
chain shows runs along the rows, the strip patches in both directions.

One function makes a world: the sum over all pictures, each weighted by evidence $e_i(v)$ that token $i$ is $v$,

$$Z(e) = \sum_x p(x) \prod_i e_i(x_i), \qquad \frac{\partial \log Z}{\partial e_i(v)} \propto \frac{p(x_i = v \mid \text{evidence})}{e_i(v)}.$$

$Z$ is linear in each $e_i$, so its derivative holds *all* conditionals at once, and autograd computes it.
"""

# %%
show(World.__call__, World.leave_one_out)

# %%
tokens = torch.full((1, worlds["chain"].n), worlds["chain"].mask_id)
tokens[0, :3] = torch.tensor([1, 1, 1])
logits = worlds["chain"](tokens)  # a world is a LogitsFn, as a network under guidance is
print("tokens (B, N):", tuple(tokens.shape), " logits (B, N, V):", tuple(logits.shape))
print("p(x_4 | 1 1 1):", [round(v, 3) for v in logits[0, 3].exp().tolist()])
print("p(x_40 | 1 1 1):", [round(v, 3) for v in logits[0, 39].exp().tolist()])

# %% [markdown]
r"""
How do worlds differ for a decoder? Reveal the true tokens of samples one after another in random order, and watch the
mean entropy of those still hidden.

**Predict, then run.** In one world the first ten tokens determine all that can be known about the others; in the two
others the uncertainty falls slowly, to the very end. Which is which?
"""

# %%
from minimuse.masking import random_mask
from minimuse.sampler import token_entropy


def hidden_entropy(world, known):
    """Mean entropy in nats of the tokens of 64 samples that stay hidden when `known` random ones are shown."""
    x, rates = world.sample(64, torch.Generator().manual_seed(1)), torch.full((64,), 1 - known / 64)
    masked = random_mask(x, rates, torch.Generator().manual_seed(known))
    logits = world(x.masked_fill(masked, world.mask_id))
    return token_entropy(logits)[masked].mean().item()


shown = [0, 1, 2, 4, 8, 16, 32, 48, 60]
for (name, world), mark in zip(worlds.items(), ["o-", "s--", "^:"], strict=True):
    plt.plot(shown, [hidden_entropy(world, k) for k in shown], mark, label=name)
plt.xlabel("tokens known, of 64")
plt.ylabel("entropy of a hidden token, nats")
plt.legend()
plt.show()

# %% [markdown]
r"""
The mixture: a dozen tokens name the hidden picture, after which the rest is independent noise that may be drawn at
once, for free. In the chain and the strip a token is settled by its *neighbours*, so it matters where the known ones
lie. Remember this picture; it explains most of what follows.
"""

# %% [markdown]
r"""
## 3. The failure, seen

Decode the mixture in 1, 4 and 16 steps, and ask the world how probable each result is. A picture whose tokens come
from different hidden pictures is next to impossible.
"""

# %%
from minimuse.sampler import decode

mixture = worlds["mixture"]
start = torch.full((SAMPLES, mixture.n), mixture.mask_id)
truth = mixture.log_prob(mixture.sample(SAMPLES, torch.Generator().manual_seed(0))) / mixture.n
how, median = {"mask_id": mixture.mask_id, "order": "random"}, {}
bins = torch.linspace(-3.5, -0.8, 60).tolist()
plt.hist(truth.numpy(), bins, color="0.8", label="exact samples")
for steps in (1, 4, 16):
    draws = torch.Generator().manual_seed(1)
    *_, last = decode(mixture, start, steps=steps, generator=draws, **how)
    log_p = mixture.log_prob(last.tokens) / mixture.n
    median[steps] = log_p.median()
    plt.hist(log_p.numpy(), bins, histtype="step", lw=1.6, label=f"{steps} step{'s' * (steps > 1)}")
plt.xlabel("log p of the whole picture, nats per token")
plt.ylabel("pictures")
plt.legend()
plt.show()
assert median[1] < truth.median() - 0.5, "one step looks like the truth"
assert (median[16] - truth.median()).abs() < 0.1, "sixteen steps do not look like the truth"

# %% [markdown]
r"""
In one step nearly all probability is gone: every token is right *for some* picture, none for all. Four steps still
leave a tail to the left, pictures that began in two minds. Sixteen look like the truth, but looks are not a measure.
"""

# %% [markdown]
r"""
## 4. A measure that can be trusted

The lab measures `kl`, $\mathrm{KL}(p \,\Vert\, q)$ in nats per token, with an interval: the mean of $\log p(x) - \log q(x)$ over samples
$x \sim p$. That needs an order that does not look at what was drawn. [Notebook 13b](13b_measuring_samplers.ipynb) has measures for the others.

To get $q(x)$ the decoder walks along its own path, but is shown the true token wherever it reveals one:
"""

# %%
from minimuse.lab import path_log_q

show(path_log_q.__wrapped__)  # beneath its @torch.no_grad()

# %% [markdown]
r"""
Is it right? In a world of 4 tokens all 16 pictures can be listed, $q$ be computed for each by the formula of section 1,
and the KL summed up. The interval must hold that number.
"""

# %%
tiny = ChainWorld(torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 4)
everything = torch.cartesian_prod(*[torch.arange(2)] * 4)  # (16, 4)
p = tiny.log_prob(everything).exp()


def q_of(groups):
    """q of all pictures when the groups of places are revealed one after another."""
    q, tokens = torch.ones(16, dtype=torch.double), torch.full((16, 4), tiny.mask_id)
    for group in groups:
        logits = tiny(tokens)
        for i in group:
            q = q * logits[:, i].gather(1, everything[:, i : i + 1])[:, 0].exp()
        tokens[:, group] = everything[:, group]
    return q


def kl(p, q):
    return (p * (p / q).log()).sum().item() / 4


exact = kl(p, q_of([[0, 1], [2, 3]]))
found = compare(tiny, ["linear"], ["raster"], steps=[2], samples=4096).cells[0]["kl"]
print(f"enumerated {exact:.4f}, estimated {found.value:.4f} ± {found.margin:.4f}")
assert abs(exact - found.value) < found.margin, "the interval does not hold the number"

# %% [markdown]
r"""
**Predict, then run.** In random order each decode takes another partition of the four positions into two pairs. One
number is the mean of the six KLs, one for each partition. The other is the KL of the sampler as a whole, which mixes
the six $q$'s. Which one is larger?
"""

# %%
from itertools import combinations

parts = [[list(a), [i for i in range(4) if i not in a]] for a in combinations(range(4), 2)]
each = [q_of(groups) for groups in parts]
found = compare(tiny, ["linear"], ["random"], steps=[2], samples=4096).cells[0]["kl"]
mean, whole = sum(kl(p, q) for q in each) / 6, kl(p, sum(each) / 6)
print(f"mean of the six KLs:      {mean:.4f}")
print(f"KL of the mixture of six: {whole:.4f}")
print(f"what the lab measures:    {found.value:.4f} ± {found.margin:.4f}")
assert whole < found.value - found.margin, "the lab does not measure a bound"
assert abs(mean - found.value) < found.margin, "the lab does not measure the mean"

# %% [markdown]
r"""
The mean is larger: KL is convex in $q$, so mixing never hurts. An evaluator that follows one path a sample measures the
mean, so for random orders it has an **upper bound**, and the table marks it with "<=". Never read a bound as if it
were the figure itself: that random order is bounded by more than Halton order costs does not yet say that it is worse.
"""

# %% [markdown]
r"""
## 5. How many: schedules

`compare` decodes a grid of schedules, orders and steps, all with the same truth and the same seeds. A schedule is a
name or any function of progress $u$. We fix the order to Halton's, which does not look at the draws, so the KL is
exact and not a bound.
"""

# %%
schedules = {"cosine": "cosine", "linear": "linear", "sqrt": "sqrt", "1 - u^3": lambda u: 1 - u**3}
reports = {}
for name, world in worlds.items():
    reports[name] = compare(world, schedules, ["halton"], STEPS, samples=SAMPLES)


def panels(reports):
    """The KL of each world's report, over the number of passes."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    for ax, (name, report) in zip(axes, reports.items(), strict=True):
        report.plot(ax, "kl").set_title(name)
        ax.get_legend().remove()
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    plt.show()


panels(reports)

# %% [markdown]
r"""
Bars are 95% intervals, and the vertical axis goes in powers of ten. Everywhere the cost falls steeply with the steps.
The square root, which reveals most tokens in the first steps, is worst in every world. The others change places. Since
all cells share their samples, differences are more certain than two measurements side by side. The table holds
each schedule's `kl` **less the cosine's in as many steps**, in bold where the interval leaves 0 out; below 0 beats the cosine.
"""


# %%
def gap(world, schedule, steps):
    cells = [reports[world][name, "halton", steps].groups["kl"] for name in (schedule, "cosine")]
    return paired_difference(*cells)


lines = ["| steps | schedule | " + " | ".join(worlds) + " |", "|---" * 5 + "|"]
for steps in STEPS:
    for schedule in ("1 - u^3", "linear", "sqrt"):
        found = [gap(world, schedule, steps) for world in worlds]
        bold = ["**" if abs(g.value) > max(g.margin, 1e-5) else "" for g in found]
        shown = [f"{b}{g.value:+.4f} ± {g.margin:.4f}{b}" for b, g in zip(bold, found, strict=True)]
        lines.append(f"| {steps} | {schedule} | " + " | ".join(shown) + " |")
Markdown("\n".join(lines))

# %% [markdown]
r"""
In the mixture the first steps decide. So a curve that begins even more slowly than the cosine
(here $1 - u^3$) wins with a medium number of steps, and linear loses. In the chain a token depends only on its
neighbours, the last steps are as dangerous as the first ones, and linear can beat the cosine. **No schedule wins
everywhere**: the best curve follows how fast the hidden entropy of section 2 falls.

A warning: whoever picks the *best of four* finds it a little better than it is. Name your schedule before you look, or measure it again
with another `seed`.
"""

# %%
if not FAST:
    assert all(gap(w, "sqrt", t).low > 0 for w in worlds for t in STEPS), "sqrt is not the worst"
    assert all(gap("mixture", "1 - u^3", t).high < 0 for t in (8, 16)), "1 - u^3 does not win"
    assert all(gap("mixture", "linear", t).low > 0 for t in STEPS), "linear does not lose"
    assert gap("chain", "linear", 16).high < 0, "linear does not beat the cosine in the chain"

# %% [markdown]
r"""
## 6. Which: orders

An order scores the positions; the highest are kept. Halton order spreads the tokens of a step over the grid, so
neighbours are seldom drawn together (notebook 7 shows it). Entropy order takes the positions that the network is most certain of.
"""

# %%
orders = ["halton", "random", "entropy"]
ordered = {}
for name, world in worlds.items():
    ordered[name] = compare(world, ["cosine"], orders, STEPS, samples=SAMPLES)
panels(ordered)

# %% [markdown]
r"""
Where tokens depend on neighbours (chain, strip), Halton order costs a fraction of what random order is bounded by, and
entropy order costs most. In the chain the most certain positions are those right beside what is known, which all lie together,
so long runs are drawn blindly at once. In the mixture positions are alike, and spreading buys nothing: Halton and
random are hard to separate. **Halton wins where near means dependent.**

Muse's own order, confidence, looks at what was drawn, so its $q$ is not a product along a path, and it has no `kl`.
"""

# %%
if not FAST:
    dear = {w: [ordered[w]["cosine", o, 16]["kl"] for o in orders] for w in worlds}
    for world in ("chain", "potts"):
        assert dear[world][0].high < dear[world][1].low, "Halton order is not the cheapest"
        assert dear[world][1].high < dear[world][2].low, "entropy order is not the dearest"

# %% [markdown]
r"""
## What failure looks like

**A grid of progress that ends too early.** With `linspace(0, 1, T)` the first step sees $u = 0$ and leaves everything
masked, so $T$ steps do the work of $T - 1$ (mistake 9 of the zoo; our decoder reveals one token even then). A
decode that does so still ends with no token masked, and nothing looks amiss; the counts and the lab show it.
"""

# %%
import math

from minimuse.masking import reveal_counts

T = 4
late = lambda u: math.cos(math.pi / 2 * max(0.0, (u * T - 1) / (T - 1)))  # noqa: E731
print("right:", reveal_counts(64, T, "cosine"), " off by one:", reveal_counts(64, T, late))
both = {"cosine": "cosine", "off by one": late}
shifted = compare(mixture, both, ["halton"], [T], samples=SAMPLES)
assert (
    FAST
    or shifted["off by one", "halton", T]["kl"].value > shifted["cosine", "halton", T]["kl"].value
)
Markdown(shifted.table(metrics=KL))

# %% [markdown]
r"""
### Exercise 13.1: a schedule

*Difficulty 2 of 3, about 20 minutes.*

Write a curve $r(u)$, the fraction still masked at progress $u$, that falls from 1 to 0 and that you expect to beat the
cosine in the mixture in 8 steps. Say why before you run it. Then look at the interval: is the difference real?

<details><summary>Hint</summary>

The first dozen tokens decide which hidden picture it is: reveal few of them per step. The curve stays near 1 longer than the cosine.

</details>
"""

# %%


def my_schedule(u): ...  # your code


check_schedule(my_schedule)

# %% tags=["solution"]


def slow_start(u):
    return 1 - u**3  # the first dozen tokens decide the mode: reveal few of them per step


both = {"cosine": "cosine", "mine": slow_start}
mine = compare(mixture, both, ["halton"], [8], samples=SAMPLES, seed=5)
print(mine.table(("cosine", "halton"), KL))
check_schedule(slow_start)

# %% [markdown]
r"""
### Exercise 13.2: an order

*Difficulty 2 of 3, about 20 minutes.*

Write an order `(logits (B, N, V), drawn (B, N), masked (B, N), u) -> scores (B, N)` that reveals a checkerboard: all
"black" fields of the 8 x 8 grid before any "white" one, at random within a colour. In which world should it do well?

<details><summary>Hint</summary>

Position `i` stands in row `i // 8` and column `i % 8`; a field is black where their sum is even. Equal scores are ranked at random.

</details>
"""

# %%


def my_order(logits, drawn, masked, u): ...  # your code


check_order(my_order)

# %% tags=["solution"]


def checkerboard(logits, drawn, masked, u):
    side = math.isqrt(drawn.shape[1])
    place = torch.arange(drawn.shape[1], device=drawn.device)
    return ((place // side + place % side) % 2 == 0).float().expand_as(drawn)  # ties at random


both = {"halton": "halton", "board": checkerboard}
board = compare(worlds["chain"], ["linear"], both, [2, 8], samples=SAMPLES)
print(board.table(metrics=KL))
check_order(checkerboard)

# %% [markdown]
r"""
In which world does it do well? In the chain, where neighbours depend on each other, and with *two* steps: no two tokens of one colour are
neighbours, so each step draws tokens that hardly depend on each other. With eight steps it loses to Halton: within a colour it picks at random, and tokens
two cells apart fall into the same step more often than in Halton's order. In the mixture, where all positions are alike, it cannot help.
"""

# %%
if not FAST:
    two, eight = ([board["linear", name, t]["kl"] for name in both] for t in (2, 8))
    assert two[1].high < two[0].low, "in two steps it is no better than Halton"
    assert eight[1].value > eight[0].value, "in eight steps it does not lose"

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

The lab knows two-dimensional neighbours (`PottsWorld`) and hidden pictures (`MixtureWorld`). Real pictures have both. Which schedule and which
order would you choose for a world that is half of each? Write down a reason, then measure: `PottsWorld` and `MixtureWorld` take arguments
that make them easier or harder. Does your choice still win?
"""

# %% [markdown]
r"""
## Summary

- Parallel decoding errs even with a perfect network: each step loses the total correlation of the tokens drawn in it.
- In an exact world that loss is measured in nats, with an interval, and agrees with enumeration where that is possible.
- Which schedule is best depends on how dependence is spread: of those tried here the cosine is never bad, and not always
  best. A slow start pays where a few tokens settle everything.
- Halton order wins where near means dependent.
"""

# %% [markdown]
r"""
## Further reading

- MaskGIT (arXiv 2202.04200): the schedules compared by FID, and confidence with noise.
- Halton scheduler (arXiv 2503.17076): why positions far apart should go together.
- D3PM (arXiv 2107.03006): masking as a diffusion, whose bound notebook 4 measures.
- The larger tables: [what the schedule lab finds](../benchmarks/lab_findings.md), with adaptive rules and presets.
- Next: [13b. Measuring samplers](13b_measuring_samplers.ipynb), an appendix: other measures, adaptive rules, a trained model;
  or [14. Muse or diffusion](14_muse_or_diffusion.ipynb).
"""
