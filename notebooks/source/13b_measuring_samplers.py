# %% [markdown]
r"""
# 13b. Measuring samplers: an appendix to the schedule lab

*Samplers that have no KL, rules that choose the number of tokens themselves, a trained model, and a trained ranker.*

|  |  |
|---|---|
| **Paper** | Muse 2.8; EB-Sampler (arXiv 2505.24857); Token-Critic (arXiv 2209.04439) |
| **You will learn** | how to measure any sampler · what confidence costs · whether a ranking carries over to a trained model · how to compare two samplers so that the difference is not luck |
| **Before this** | [13. The schedule lab](13_schedule_lab.ipynb), [7b. Noise and temperature](07b_noise_and_temperature.ipynb) |
| **Takes** | @takes@; about 90 minutes of your time |
| **Files** | [`lab.py`](../minimuse/lab.py), [`lab_models.py`](../minimuse/lab_models.py), [`lab_samplers.py`](../minimuse/lab_samplers.py), [`token_critic.py`](token_critic.py) |
"""

# %% knobs
import math
import os
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from checks import check_paired, check_world
from IPython.display import Markdown
from view import show, style

from minimuse import Muse
from minimuse.eval_metrics import paired_difference
from minimuse.lab import ChainWorld, MixtureWorld, PottsWorld, World, compare

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer samples
CHECKPOINT = "nano"  # a shipped name or a folder
SAMPLES = 64 if FAST else 512  # of an exact world; intervals narrow by the root of it
PICTURES = 64 if FAST else 256  # of the trained model
STEPS = (4, 16) if FAST else (4, 8, 16)  # in the worlds
TRAINED = (2, 6) if FAST else (4, 8, 16)  # of the trained model
CRITIC = 4 if FAST else 150  # training steps of a ranker
style()

# %% [markdown]
r"""
## 1. Measures for any sampler

The lesson measured `kl`, which needs an order that does not look at what was drawn. Confidence, Muse's own order, does. Three other
measures fit every sampler; they compare its pictures $y \sim q$ with the world:

| | what it is |
|---|---|
| `excess_nll` | $E_q[-\log p(y)] - H(p)$: above 0 impossible pictures, below 0 *mode seeking* |
| `singles`, `pairs` | squared distance of the distributions of one token, and of two |

**Predict, then run.** Confidence keeps the draws that were most probable, and throws the others back. Will its
pictures be *less* likely than the truth's (impossible mixtures), or *more* likely (the same few typical pictures)?
And will more steps make that better or worse?
"""

# %%
worlds = {"mixture": MixtureWorld.random(), "chain": ChainWorld.sticky(), "potts": PottsWorld()}
orders, measured = ["halton", "random", "confidence"], {}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
for ax, (name, world) in zip(axes, worlds.items(), strict=True):
    measured[name] = compare(world, ["cosine"], orders, STEPS, samples=SAMPLES)
    measured[name].plot(ax, "excess_nll").set_title(name)
    ax.get_legend().remove()
    ax.axhline(0, color="k", lw=1, ls=":")
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
r"""
Confidence falls below zero, and further below with more steps: it seeks modes. A step that keeps 3 of 64 draws keeps the 3 most typical
ones, again and again. Where one expects "more steps are better", this order gets worse. For
pictures this is not all bad: typical pictures look clean, and we call it *fidelity*; but rare ones go missing.
MaskGIT adds noise to the ranking, which gives the rare ones a chance. `presets` name the samplers of known code bases:
"""

# %%
for report in measured.values():
    few, many = (report["cosine", "confidence", t]["excess_nll"] for t in (STEPS[0], STEPS[-1]))
    assert FAST or many.high < min(few.low, 0), "more steps do not seek modes more"

# %%
from minimuse.lab_samplers import SAMPLER_PRESETS

mixture = worlds["mixture"]
known = compare(mixture, [], presets=["muse", "maskgit", "halton"], steps=[4, 16], samples=SAMPLES)
noisy, strict = (known[f"as {name}", "", 16] for name in ("maskgit", "muse"))
assert FAST or noisy["pairs"].high < strict["pairs"].low, "noise does not mend the statistics"
print("presets:", ", ".join(SAMPLER_PRESETS))
Markdown(known.table(metrics=("excess_nll", "singles", "pairs")))

# %% [markdown]
r"""
`singles` and `pairs` are distances to the truth's own statistics. The noise costs no pass and removes most of the
distance; Halton order hardly has any.
"""

# %% [markdown]
r"""
## 2. How many, decided as you go

The entropy bound of notebook 7b chooses the number of tokens from the logits:
"""

# %%
from minimuse.lab_samplers import entropy_bound

show(entropy_bound)

# %% [markdown]
r"""
Is it worth its passes? `bound8` is `entropy_bound(8.0)`: it allows 8 nats a step.
"""

# %%
bounds = ["bound4", "bound8"] if FAST else ["bound2", "bound4", "bound8", "bound16"]
figure, axes = plt.subplots(1, 2, figsize=(10, 4))
for ax, name in zip(axes, ("mixture", "potts"), strict=True):
    rule = compare(worlds[name], bounds, ["entropy"], [64], samples=SAMPLES)
    fixed = compare(worlds[name], ["cosine"], ["entropy", "halton"], STEPS, samples=SAMPLES)
    type(rule)(rule.cells + fixed.cells, rule.titles, rule.about).plot(ax, "kl").set_title(name)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=9)
plt.show()

# %% [markdown]
r"""
The horizontal axis is the *mean* NFE, the number of forward passes per picture. Compare the adaptive line with the cosine **in the same
order** first, and only then with Halton: a rule has to beat the best fixed sampler of its cost, not the nearest one. In the strip it lies
below the first and above the second.
"""

# %% [markdown]
r"""
## 3. A trained model

Now the network errs too, and nobody knows its truth. What can be asked: are its pictures *right*, and are they *like
real ones*? `compare` takes a `Muse` in the world's place. It draws with only the base model (its low-resolution
pictures, decoded by the low tokenizer), on captions of held-out scenes with one or two objects:

- **accuracy**: fraction of pictures in which everything the prompt names is right, by the detector;
- **frechet**: Frechet distance of the detector's features to renders of the very scenes.

Picture $i$ has the same prompt and the same random numbers in every cell.
"""

# %%
from minimuse.lab_models import MuseEvaluator

model = Muse.from_pretrained(CHECKPOINT)
evaluator = MuseEvaluator(model, PICTURES)
print("first prompts:", evaluator.prompts[:3])
print("real renders reach an accuracy of", evaluator.about["real images"]["accuracy"])

# %% [markdown]
r"""
**Predict, then run.** In all three worlds confidence is the worst of the three orders by `pairs`. Will it also be the worst in the trained
model?
"""

# %%
trained = compare(evaluator, ["cosine"], orders, TRAINED)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
for ax, measure in zip(axes, trained.titles, strict=True):
    trained.plot(ax, measure)
    ax.get_legend().remove()
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()
Markdown(trained.table(against=("cosine", "confidence")))


# %%
def ranking(report, measure, steps, sign=1):
    """Orders from best to worst; = where the paired difference to the next may be chance."""
    cells = [report["cosine", order, steps] for order in orders]
    cells.sort(key=lambda c: sign * c[measure].value)
    said = cells[0].order
    for a, b in pairwise(cells):
        gap = paired_difference(a.groups[measure], b.groups[measure])
        said += f" {'=' if abs(gap.value) <= gap.margin else '<'} {b.order}"
    return said


for name, report in measured.items():
    ranks = ranking(report, "pairs", 16)
    print(f"{name:8} {'pairs':9} in 16 steps: {ranks}")
    assert FAST or ranks.endswith("< confidence"), "confidence is not the worst"
for measure, sign in (("accuracy", -1), ("frechet", 1)):
    ranks = ranking(trained, measure, TRAINED[-1], sign)
    print(f"{model.config.name:8} {measure:9} in {TRAINED[-1]:2} steps: {ranks}")
    assert FAST or not ranks.endswith("< confidence"), "confidence is the worst here, too"

# %% [markdown]
r"""
The bars of single cells overlap widely; the paired differences in the table say more.

It is not. In the worlds, at temperature 1 and without noise, confidence is far from the truth's statistics. The trained model
draws at a temperature below 1, with ranking noise and guidance, where typical pictures are *wanted*: accuracy asks
for what the prompt says, not for every rare way to say it. So a ranking need not carry over, and where it does not,
ask what the measure rewards.

Which world is the trained model most like? As in section 2 of the lesson, we show it a few tokens of real pictures, and look at the mean
entropy of those that stay hidden:
"""

# %%
from minimuse.data_sources import SceneDataset
from minimuse.masking import random_mask
from minimuse.sampler import token_entropy
from minimuse.utils import area_downsample, to_float

factor = model.config.high_tokenizer.image_size // model.config.low_tokenizer.image_size


@torch.no_grad()
def read(scenes):
    """Scenes -> their low tokens (n, N) and encoded captions."""
    texts = model.encoder.encode([scenes.captions(i)[0] for i in range(len(scenes))])
    return model.low_tokenizer.encode(to_float(area_downsample(scenes.images(), factor))), texts


@torch.no_grad()
def hidden_entropy(logits_fn, x, mask_id, known):
    """Mean entropy in nats of the tokens of x (64, N) that stay hidden when a part of them is shown."""
    rates = torch.full((64,), 1 - known)
    masked = random_mask(x, rates, torch.Generator().manual_seed(round(64 * known)))
    return token_entropy(logits_fn(x.masked_fill(masked, mask_id), known).float())[masked].mean()


shown = [k / 64 for k in (0, 1, 2, 4, 8, 16, 32, 48, 60)]
tokens, texts = read(SceneDataset(64, model.config.high_tokenizer.image_size, "test"))
memory = model.base.memory(texts)
own = [
    hidden_entropy(lambda t, u: model.base(t, memory), tokens, model.base.mask_id, k) for k in shown
]
plt.plot(shown, own, "ks-", label=f"{model.config.name}, given the caption")
for (name, world), mark in zip(worlds.items(), ["o-", "v--", "^:"], strict=True):
    x = world.sample(64, torch.Generator().manual_seed(1))
    plt.plot(shown, [hidden_entropy(world, x, world.mask_id, k) for k in shown], mark, label=name)
plt.xlabel("fraction of tokens known")
plt.ylabel("entropy of a hidden token, nats")
plt.ylim(0, None)
plt.legend(loc="lower left", ncols=2, fontsize=9)
plt.show()

# %% [markdown]
r"""
For nano, something of both: steep at first, as in the mixture (where does the object stand?), then a slow decline, as
in the chain (what do the neighbours say?). And much is left to the end, far more than in any of the worlds: many codes
of the codebook look alike, so which of them is drawn hardly matters to the eye. That is one reason why few steps
are enough, and why differences between samplers are small compared with those in the worlds.
"""

# %% [markdown]
r"""
## 4. A ranker that was trained

Token-Critic trains a second network to distinguish drawn tokens from real ones, and keeps those that look most real. It may
take back what was revealed (`remask`), which Muse never does. In a world the perfect ranker is known,
$p(x_i \mid \text{all others})$. For the trained model a few lines train one (below), beginning as a copy of the base
model, on scenes that the evaluator does not use.
"""

# %%
from token_critic import critic, exact_score, learned_score, train_critic

perfect = critic(exact_score(mixture))
rankers = {"ranker": perfect, "random": "random"}
plain = compare(mixture, ["cosine"], rankers, [8], samples=SAMPLES)
again = compare(mixture, ["cosine"], {"may take back": perfect}, [8], samples=SAMPLES, remask=True)
both = type(plain)(plain.cells + again.cells, plain.titles, plain.about)
for order in ("ranker", "may take back"):
    assert FAST or both["cosine", order, 8]["excess_nll"].high < 0, "the ranker does not seek modes"
Markdown(both.table(metrics=("excess_nll", "pairs")))

# %%
show(train_critic)

# %%
tokens, texts = read(
    SceneDataset(64 if FAST else 1000, model.config.high_tokenizer.image_size, "train", seed=7)
)
losses, nets = zip(*train_critic(model.base, tokens, texts, steps=CRITIC), strict=True)
plt.plot(losses)
plt.xlabel("step of training")
plt.ylabel("binary cross-entropy, nats")
plt.show()

# %%
steps = TRAINED[-1]
ranker = {"trained ranker": critic(learned_score(nets[-1]))}
ranked = compare(evaluator, ["cosine"], {**ranker, "confidence": "confidence"}, [steps])
taken_back = compare(evaluator, ["cosine"], ranker, [steps], remask=True)
for measure in evaluator.titles:
    before = ranked["cosine", "trained ranker", steps].groups[measure]
    gap = paired_difference(taken_back.cells[0].groups[measure], before)
    print(f"taking tokens back changes {measure} by {gap.value:+.3f} ± {gap.margin:.3f}")
Markdown(ranked.table(("cosine", "confidence")))

# %% [markdown]
r"""
Two things to see. In the mixture even the perfect ranker seeks modes, as confidence does: the token that fits the rest
best is the most typical one. Taking tokens back changes little there. And for the trained model each decoding step
now costs a pass of a second network, so a fair test would give the other orders twice the steps. A ranker trained
for minutes need not earn that; look at the intervals before you believe that it does.
"""

# %% [markdown]
r"""
### Exercise 13b.1: a world

*Difficulty 3 of 3, about 40 minutes.*

Write a world: a class with one function, `log_evidence(e (B, N, V)) -> (B,)`. Let it be 4 tokens of 2 codes on a
2 x 2 grid, of which the first and the last are equal with probability 0.9, and the others are fair coins.

<details><summary>Hint</summary>

The first and the last have a joint table of 2 x 2 probabilities, 0.45 where they are equal. Sum it with the evidence of both by
`torch.einsum`; a fair coin contributes the mean of its evidence.

</details>
"""

# %%


class MyWorld(World):
    def __init__(self):
        super().__init__((2, 2), 2)

    def log_evidence(self, e): ...  # your code


check_world(MyWorld)

# %% tags=["solution"]


class Corners(World):
    def __init__(self):
        super().__init__((2, 2), 2)

    def log_evidence(self, e):
        p = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.double)
        ends = torch.einsum("ba,bc,ac->b", e[:, 0], e[:, 3], p)
        return (ends * e[:, 1].mean(1) * e[:, 2].mean(1)).log()


found = compare(Corners(), ["linear"], ["raster", "halton"], [2], samples=SAMPLES)
print(found.table(metrics=["kl"]))
check_world(Corners)

# %% [markdown]
r"""
### Exercise 13b.2: a paired interval

*Difficulty 1 of 3, about 15 minutes.*

Two samplers drew the same prompts with the same seeds; `a` and `b` (n,) hold a number for each picture. Write the mean of $a - b$ and half of
its 95% interval: 1.96 times the standard error of the mean.

<details><summary>Hint</summary>

Subtract first. The standard error is the standard deviation of the differences over the root of their number.

</details>
"""


# %%
def my_paired(a, b):
    return (a - b).mean(), 0.0  # your code: how sure is that?


check_paired(my_paired)


# %% tags=["solution"]
def my_paired(a, b):
    return (a - b).mean(), 1.96 * (a - b).std() / len(a) ** 0.5


check_paired(my_paired)

# %% [markdown]
r"""
## What failure looks like

**Comparing without pairing.** The intervals of two measurements, added up as if they had nothing in common, against the
interval of their paired difference. Prompts that are hard for one sampler are usually hard for the other, so their difficulty cancels.
"""

# %%
for measure in trained.titles:
    a, b = (trained["cosine", order, steps] for order in ("random", "halton"))
    gap = paired_difference(a.groups[measure], b.groups[measure])
    apart = math.hypot(a[measure].margin, b[measure].margin)
    print(f"{measure:9} {gap.value:+.4f} ± {gap.margin:.4f} paired, ± {apart:.4f} not paired")
    assert FAST or gap.margin < apart, "pairing does not help"

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

All of section 3 is about one checkpoint. Set `CHECKPOINT = "toy"` and predict first: which line of the figure of hidden entropies will it be
closest to, and which order will be best? Is a difference that you find larger than its paired interval?
"""

# %% [markdown]
r"""
## Summary

- Confidence seeks modes, the more so the more steps it takes; noise in its ranking removes most of the damage.
- An adaptive rule has to beat the best fixed sampler with as many passes.
- A ranking of samplers in exact worlds need not hold in a trained model, whose measures reward typical pictures.
- A claim about samplers needs pairs, an interval, and a sampler named before looking.
"""

# %% [markdown]
r"""
## Further reading

- EB-Sampler (arXiv 2505.24857): a bound on the error of a step decides how many tokens it fixes.
- Token-Critic (arXiv 2209.04439): a ranker that is trained, and tokens taken back.
- The larger tables: [what the schedule lab finds](../benchmarks/lab_findings.md), with adaptive rules and presets.
- Next: [14. Muse or diffusion](14_muse_or_diffusion.ipynb).
"""
