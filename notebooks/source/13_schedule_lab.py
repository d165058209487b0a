# %% [markdown]
r"""
# 13. The schedule lab: what parallel decoding costs

*In worlds whose every conditional is known, the network makes no error, so all that is left is the schedule's.*

|  |  |
|---|---|
| **Paper** | Muse 2.8; MaskGIT (arXiv 2202.04200); Halton order (arXiv 2503.17076); Token-Critic (arXiv 2209.04439) |
| **You will learn** | why many tokens per step cost accuracy, in nats · where the cosine wins and where it does not · what an order changes · how to compare two samplers so that the difference is not luck |
| **Before this** | [7. Parallel decoding](07_parallel_decoding.ipynb); entropy and KL divergence; conditional probability |
| **Takes** | @takes@ |
| **Files** | [`lab_worlds.py`](../minimuse/lab_worlds.py), [`lab.py`](../minimuse/lab.py), [`lab_models.py`](../minimuse/lab_models.py), [`lab_samplers.py`](../minimuse/lab_samplers.py) |
"""

# %% knobs
import os

import matplotlib.pyplot as plt
import torch
from checks import check_order, check_schedule, check_world
from view import show, style

from minimuse import Muse
from minimuse.eval_metrics import paired_difference
from minimuse.lab import ChainWorld, MixtureWorld, PottsWorld, World, compare

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer samples
CHECKPOINT = "nano"  # a shipped name or a folder
SAMPLES = 64 if FAST else 512  # of an exact world; intervals narrow by the root of it
PICTURES = 64 if FAST else 256  # of the trained model
STEPS = (4, 16) if FAST else (4, 8, 16, 32)  # in the worlds
TRAINED = (2, 6) if FAST else (4, 8, 16)  # of the trained model
CRITIC = 4 if FAST else 150  # training steps of a ranker
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
print(both.table())

# %% [markdown]
r"""
The column `kl` is what this notebook is about: in one step it holds the number worked out by hand, in
two steps it is zero. It was *estimated* from samples, and came with a 95% interval; later worlds are too large to work
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
from minimuse.sampler import token_entropy


def hidden_entropy(logits_fn, x, mask_id, known):
    """Mean entropy in nats of the tokens of x (B, N) that stay hidden when `known` random ones are shown."""
    n = x.shape[1]
    place = (
        torch.rand(x.shape, generator=torch.Generator().manual_seed(known)).argsort(1).argsort(1)
    )
    masked = place >= known
    return (
        token_entropy(logits_fn(x.masked_fill(masked, mask_id), known / n).float())[masked]
        .mean()
        .item()
    )


shown = [0, 1, 2, 4, 8, 16, 32, 48, 60]
for name, world in worlds.items():
    x = world.sample(64, torch.Generator().manual_seed(1))
    plt.plot(shown, [hidden_entropy(world, x, world.mask_id, k) for k in shown], "o-", label=name)
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
bins = torch.linspace(-3.5, -0.8, 60).tolist()
plt.hist(truth.numpy(), bins, color="0.8", label="exact samples")
for steps in (1, 4, 16):
    draws = torch.Generator().manual_seed(1)
    *_, last = decode(
        mixture, start, mask_id=mixture.mask_id, steps=steps, order="random", generator=draws
    )
    log_p = mixture.log_prob(last.tokens) / mixture.n
    plt.hist(log_p.numpy(), bins, histtype="step", lw=1.6, label=f"{steps} step{'s' * (steps > 1)}")
plt.xlabel("log p of the whole picture, nats per token")
plt.ylabel("pictures")
plt.legend()
plt.show()

# %% [markdown]
r"""
In one step nearly all probability is gone: every token is right *for some* picture, none for all. Four steps still
leave a tail to the left, pictures that began in two minds. Sixteen look like the truth, but looks are not a measure.
"""

# %% [markdown]
r"""
## 4. Measures that can be trusted

`WorldEvaluator` measures four, each with an interval:

| | what it is | for which samplers |
|---|---|---|
| `kl` | $\mathrm{KL}(p \,\Vert\, q)$, nats per token, from $x \sim p$: the mean of $\log p(x) - \log q(x)$ | orders that do not look at what was drawn, at temperature 1 |
| `excess_nll` | $E_q[-\log p(y)] - H(p)$: above 0 impossible pictures, below 0 *mode seeking* | all |
| `singles`, `pairs` | squared distance of the distributions of one token, and of two | all |

For `kl` the decoder walks along its own path but is shown the truth wherever it reveals, which gives $q(x)$:
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

# %% [markdown]
r"""
**Predict, then run.** In random order each decode takes another partition of the four positions into two pairs. One
number is the mean of the six KLs, one for each partition. The other is the KL of the sampler as a whole, which mixes
the six $q$'s. Which one is larger?
"""

# %%
from itertools import combinations, pairwise

parts = [[list(a), [i for i in range(4) if i not in a]] for a in combinations(range(4), 2)]
each = [q_of(groups) for groups in parts]
print(f"mean of the six KLs:        {sum(kl(p, q) for q in each) / 6:.4f}")
print(f"KL of the mixture of six:   {kl(p, sum(each) / 6):.4f}")
print(
    f"what the lab measures:      {compare(tiny, ['linear'], ['random'], steps=[2], samples=4096).table()}"
)

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
reports = {
    name: compare(w, schedules, ["halton"], STEPS, samples=SAMPLES) for name, w in worlds.items()
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for ax, (name, report) in zip(axes, reports.items(), strict=True):
    report.plot(ax, "kl").set_title(name)
plt.show()

# %% [markdown]
r"""
Bars are 95% intervals, and the vertical axis goes in powers of ten. Everywhere the cost falls steeply with the steps.
The square root, which reveals most tokens in the first steps, is worst in every world. The others change places. Since
all cells share their samples, differences are more certain than two measurements side by side. The table holds
each cell **less the cosine's in as many steps**, in bold where the interval leaves 0 out; below 0 beats the cosine.
"""

# %%
for name, report in reports.items():
    print(f"{name}\n{report.table(against=('cosine', 'halton'))}\n")
for name, report in reports.items():
    for steps in STEPS:
        best = min((c for c in report.cells if c.steps == steps), key=lambda c: c["kl"].value)
        gap = paired_difference(best.groups["kl"], report["cosine", "halton", steps].groups["kl"])
        sure = (
            "" if best.schedule == "cosine" or abs(gap.value) > gap.margin else "  (may be chance)"
        )
        print(f"{name:8} {steps:3} steps: least cost by {best.schedule}{sure}")

# %% [markdown]
r"""
Read the `kl` column. In the mixture the first steps decide, so a curve that begins even more slowly than the cosine
(here $1 - u^3$) tends to win once there are enough steps, and linear loses. In the chain a token depends on its
neighbours alone, the last steps are as dangerous as the first ones, and linear holds its own. **No schedule wins
everywhere**: the best curve follows how fast the hidden entropy of section 2 falls.

A warning: the last lines pick the *best of four*, and the best of many always looks a little better than it is. A
claim of yours should name its schedule before it looks, or measure it again with another `seed`.
"""

# %% [markdown]
r"""
## 6. Which: orders

An order scores the positions; the highest are kept. Halton order spreads the tokens of a step over the grid, so
neighbours are seldom drawn together. Entropy order takes the places that the network is surest of.
"""

# %%
from minimuse.utils import halton_rank

figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
rank, seen = halton_rank(8, 8), 0
for ax, count in zip(axes, (3, 10, 24, 27), strict=True):
    state = torch.where(rank < seen, 0.3, 0.0) + torch.where(
        (rank >= seen) & (rank < seen + count), 1.0, 0.0
    )
    ax.imshow(state.view(8, 8), cmap="magma_r", vmin=0, vmax=1.2)
    ax.set(title=f"{count} tokens", xticks=[], yticks=[])
    ax.grid(False)
    seen += count
figure.suptitle("what Halton order reveals in four steps: dark now, light before")
plt.show()

# %%
orders = ["halton", "random", "entropy", "confidence"]
ordered = {
    name: compare(w, ["cosine"], orders, STEPS, samples=SAMPLES) for name, w in worlds.items()
}
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for ax, (name, report) in zip(axes, ordered.items(), strict=True):
    report.plot(ax, "kl").set_title(name)
plt.show()

# %% [markdown]
r"""
Where tokens depend on neighbours (chain, strip), Halton order costs a fraction of what random order is bounded by, and
entropy order costs most. In the chain the most certain positions are those right beside what is known, which all lie together,
so long runs are drawn blindly at once. In the mixture positions are alike, and spreading buys nothing: Halton and
random are hard to separate. **Halton wins where near means dependent.**

Confidence, Muse's order, has no `kl` here: it looks at what was drawn, so its $q$ is not a product along a path.

**Predict, then run.** Confidence keeps the draws that were most probable, and throws the others back. Will its
pictures be *less* likely than the truth's (impossible mixtures), or *more* likely (the same few typical pictures)?
And will more steps make that better or worse?
"""

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for ax, (name, report) in zip(axes, ordered.items(), strict=True):
    report.plot(ax, "excess_nll").set_title(name)
plt.show()

# %% [markdown]
r"""
Below zero, and further below with more steps: it seeks modes. A step that keeps 3 of 64 draws keeps the 3 most typical
ones, again and again. In a schedule's usual comparison, "more steps are better" hides that; here it does not. For
pictures this is not all bad: typical pictures look clean, and we call it *fidelity*; but rare ones go missing.
MaskGIT adds noise to the ranking, which gives the rare ones a chance. `presets` name the samplers of known code bases:
"""

# %%
from minimuse.lab_samplers import SAMPLER_PRESETS

known = compare(mixture, [], presets=["muse", "maskgit", "halton"], steps=STEPS, samples=SAMPLES)
print("presets:", ", ".join(SAMPLER_PRESETS))
print(known.table(metrics=("excess_nll", "singles", "pairs")))

# %% [markdown]
r"""
`singles` and `pairs` are distances to the truth's own statistics. The noise costs nothing and mends most of the
distance; Halton order hardly has any. No order is best in every column.
"""

# %% [markdown]
r"""
## 7. How many, decided as you go

Why fix the counts in advance? An adaptive rule looks at the logits: reveal the most certain tokens as long as the sum of their
entropies less the largest one stays within a bound, which bounds the cost of the step (EB-Sampler, arXiv 2505.24857). It
takes few passes where little is at stake.
"""

# %%
bounds = ["bound4", "bound8"] if FAST else ["bound2", "bound4", "bound8", "bound16"]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for ax, name in zip(axes, ("mixture", "potts"), strict=True):
    rule = compare(worlds[name], bounds, ["entropy"], [64], samples=SAMPLES)
    fixed = compare(worlds[name], ["cosine"], ["entropy", "halton"], STEPS, samples=SAMPLES)
    type(rule)(rule.cells + fixed.cells, rule.titles, rule.about).plot(ax, "kl").set_title(name)
plt.show()

# %% [markdown]
r"""
The horizontal axis is the *mean* NFE, the number of forward passes per picture. Compare the adaptive line with the cosine **in the same
order** first, and only then with Halton: a rule has to beat the best fixed sampler of its cost, not the nearest one.
"""

# %% [markdown]
r"""
## 8. A trained model

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

# %%
trained = compare(evaluator, ["cosine", "linear"], ["confidence", "random", "halton"], TRAINED)
print("each cell less cosine with confidence, paired:")
print(trained.table(against=("cosine", "confidence")))
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
for ax, measure in zip(axes, trained.titles, strict=True):
    trained.plot(ax, measure)
plt.show()

# %% [markdown]
r"""
The bars of single cells overlap widely; the paired differences in the table say more.

Does the ranking of the worlds carry over? Let the cell say it, measure by measure. A world ranks orders by `pairs`,
which is fair to all of them; the trained model by both of its measures. A "=" says that the paired interval holds 0.
"""

# %%


def ranking(report, measure, steps, sign=1):
    """Orders under cosine from best to worst; = where the paired difference to the next may be chance."""
    cells = [report["cosine", order, steps] for order in ("confidence", "random", "halton")]
    cells.sort(key=lambda c: sign * c[measure].value)
    said = cells[0].order
    for a, b in pairwise(cells):
        gap = paired_difference(a.groups[measure], b.groups[measure])
        said += f" {'=' if abs(gap.value) <= gap.margin else '<'} {b.order}"
    return said


for name, report in ordered.items():
    print(f"{name:8} {'pairs':9} in 16 steps: {ranking(report, 'pairs', 16)}")
for measure, sign in (("accuracy", -1), ("frechet", 1)):
    best_first = ranking(trained, measure, TRAINED[-1], sign)
    print(f"{model.config.name:8} {measure:9} in {TRAINED[-1]:2} steps: {best_first}")

# %% [markdown]
r"""
In the worlds, at temperature 1 and without noise, confidence is far from the truth's statistics. In the trained model
it draws at a temperature below 1, with ranking noise and guidance, where typical pictures are *wanted*: accuracy asks
for what the prompt says, not for every rare way to say it. So a ranking need not carry over, and where it does not,
ask what the measure rewards. Which world is the trained model most like? Its own hidden entropy shows it:
"""

# %%
from minimuse.data_sources import SceneDataset
from minimuse.utils import area_downsample, to_float

scenes = SceneDataset(64, model.config.high_tokenizer.image_size, "test")
factor = model.config.high_tokenizer.image_size // model.config.low_tokenizer.image_size
with torch.inference_mode():
    real = model.low_tokenizer.encode(to_float(area_downsample(scenes.images(), factor)))  # (64, N)
    memory = model.base.memory(model.encoder.encode([scenes.captions(i)[0] for i in range(64)]))
    counts = [round(k * real.shape[1] / 64) for k in shown]
    own = [
        hidden_entropy(lambda t, u: model.base(t, memory), real, model.base.mask_id, k)
        for k in counts
    ]
plt.plot(shown, own, "ks-", label=f"{model.config.name}, told the caption")
for name, world in worlds.items():
    x = world.sample(64, torch.Generator().manual_seed(1))
    plt.plot(
        shown,
        [hidden_entropy(world, x, world.mask_id, k) for k in shown],
        "o--",
        alpha=0.5,
        label=name,
    )
plt.xlabel("tokens known, of 64")
plt.ylabel("entropy of a hidden token, nats")
plt.legend()
plt.show()

# %% [markdown]
r"""
For nano, something of both: steep at first, as in the mixture (where does the object stand?), then a slow decline, as
in the chain (what do the neighbours say?). And much is left to the end, far more than in any of the worlds: many codes
of the codebook look alike, so which of them is drawn hardly matters to the eye. That is one reason why few steps
do, and why differences between samplers are small beside those in the worlds.
"""

# %% [markdown]
r"""
## 9. A ranker that was trained

Token-Critic trains a second network to distinguish drawn tokens from real ones, and keeps those that look most real. It may
take back what was revealed (`remask`), which Muse never does. In a world the perfect ranker is known,
$p(x_i \mid \text{all others})$. For the trained model a few lines train one (below), beginning as a copy of the base
model, on scenes that the evaluator does not use.
"""

# %%
from token_critic import critic, exact_score, learned_score, train_critic

perfect = critic(exact_score(mixture))
plain = compare(mixture, ["cosine"], {"ranker": perfect, "random": "random"}, [8], samples=SAMPLES)
again = compare(
    mixture, ["cosine"], {"ranker, may take back": perfect}, [8], samples=SAMPLES, remask=True
)
print(plain.table(), again.table(), sep="\n\n")

# %%
show(train_critic)

# %%
many = SceneDataset(64 if FAST else 1000, model.config.high_tokenizer.image_size, "train", seed=7)
with torch.inference_mode():
    tokens = model.low_tokenizer.encode(to_float(area_downsample(many.images(), factor)))
texts = model.encoder.encode([many.captions(i)[0] for i in range(len(many))])
losses, nets = zip(*train_critic(model.base, tokens.clone(), texts, steps=CRITIC), strict=True)
plt.plot(losses)
plt.xlabel("step of training")
plt.ylabel("binary cross-entropy, nats")
plt.show()

# %%
steps = TRAINED[-1]
ranker = {"trained ranker": critic(learned_score(nets[-1]))}
ranked = compare(evaluator, ["cosine"], {**ranker, "confidence": "confidence"}, [steps])
taken_back = compare(evaluator, ["cosine"], ranker, [steps], remask=True)
print(ranked.table(("cosine", "confidence")))
for measure in evaluator.titles:
    before = ranked["cosine", "trained ranker", steps].groups[measure]
    gap = paired_difference(taken_back.cells[0].groups[measure], before)
    print(f"taking tokens back changes {measure} by {gap.value:+.3f} ± {gap.margin:.3f}")

# %% [markdown]
r"""
Two things to see. In the mixture even the perfect ranker seeks modes, as confidence does: the token that fits the rest
best is the most typical one. Taking tokens back changes little there. And for the trained model each decoding step
now costs a pass of a second network, so a fair test would give the other orders twice the steps. A ranker trained
for minutes need not earn that; look at the intervals before you believe that it does.
"""

# %% [markdown]
r"""
## What failure looks like

**A grid of progress that ends too early.** With `linspace(0, 1, T)` the first step sees $u = 0$ and leaves everything
masked, so $T$ steps do the work of $T - 1$ (mistake 9 of the zoo; our decoder reveals one token even then). A
decode that does so still ends with no token masked, and nothing looks amiss; the counts and the lab show it.

**Comparing without pairing.** The intervals of two figures, added up as if they had nothing in common, against the
interval of their paired difference. Prompts that are hard for one sampler are usually hard for the other, so their difficulty cancels.
"""

# %%
import math

from minimuse.masking import reveal_counts

T = 4
late = lambda u: math.cos(math.pi / 2 * max(0.0, (u * T - 1) / (T - 1)))  # noqa: E731
print("right:", reveal_counts(64, T, "cosine"), " off by one:", reveal_counts(64, T, late))
shifted = compare(
    worlds["mixture"], {"cosine": "cosine", "off by one": late}, ["halton"], [T], samples=SAMPLES
)
print(shifted.table(against=("cosine", "halton")))

pairs = {
    "mixture, kl": (reports["mixture"], ("cosine", "halton", 4), ("1 - u^3", "halton", 4), "kl"),
    f"{model.config.name}, accuracy": (
        trained,
        ("cosine", "random", steps),
        ("cosine", "halton", steps),
        "accuracy",
    ),
    f"{model.config.name}, frechet": (
        trained,
        ("cosine", "random", steps),
        ("cosine", "halton", steps),
        "frechet",
    ),
}
for name, (report, one, other, measure) in pairs.items():
    a, b = report[one], report[other]
    gap = paired_difference(a.groups[measure], b.groups[measure])
    apart = math.hypot(a[measure].margin, b[measure].margin)
    print(f"{name:15} {gap.value:+.4f} ± {gap.margin:.4f} paired, ± {apart:.4f} not paired")

# %% [markdown]
r"""
### Exercise 13.1: a schedule

*Difficulty 2 of 3, about 20 minutes.*

Write a curve $r(u)$, the fraction still masked at progress $u$, that falls from 1 to 0 and that you expect to beat the
cosine in the mixture in 8 steps. Say why before you run it. Then look at the interval: is the difference real?
"""

# %%


def my_schedule(u): ...  # your code


check_schedule(my_schedule)

# %% tags=["solution"]


def slow_start(u):
    return 1 - u**3  # the first dozen tokens decide the mode: reveal few of them per step


mine = compare(
    mixture, {"cosine": "cosine", "mine": slow_start}, ["halton"], [8], samples=SAMPLES, seed=5
)
print(mine.table(against=("cosine", "halton")))
check_schedule(slow_start)

# %% [markdown]
r"""
### Exercise 13.2: an order

*Difficulty 2 of 3, about 20 minutes.*

Write an order `(logits (B, N, V), drawn (B, N), masked (B, N), u) -> scores (B, N)` that reveals a checkerboard: all
"black" fields of the 8 x 8 grid before any "white" one, at random within a colour. In which world should it do well?
"""

# %%


def my_order(logits, drawn, masked, u): ...  # your code


check_order(my_order)

# %% tags=["solution"]


def checkerboard(logits, drawn, masked, u):
    side = math.isqrt(drawn.shape[1])
    place = torch.arange(drawn.shape[1], device=drawn.device)
    return (
        (((place // side + place % side) % 2) == 0).float().expand_as(drawn)
    )  # ties are broken at random


board = compare(
    worlds["chain"],
    ["linear"],
    {"halton": "halton", "board": checkerboard},
    [2, 8],
    samples=SAMPLES,
)
print(board.table())
check_order(checkerboard)

# %% [markdown]
r"""
In which world does it do well? In the chain, where neighbours depend on each other, and with *two* steps: no two tokens of one colour are
neighbours, so each step draws tokens that hardly depend on each other. With eight steps it loses to Halton: within a colour it picks at random, and tokens
two cells apart fall into the same step more often than in Halton's order. In the mixture, where all positions are alike, it cannot help.
"""

# %%
cost = {
    (name, steps): board["linear", name, steps]["kl"]
    for name in ("halton", "board")
    for steps in (2, 8)
}
assert FAST or cost["board", 2].high < cost["halton", 2].low, (
    "in two steps it is no better than Halton"
)
assert FAST or cost["board", 8].value > cost["halton", 8].value, "in eight steps it does not lose"

# %% [markdown]
r"""
### Exercise 13.3: a world

*Difficulty 3 of 3, about 40 minutes.*

Write a world: a class with one function, `log_evidence(e (B, N, V)) -> (B,)`. Let it be 4 tokens of 2 codes on a
2 x 2 grid, of which the first and the last are always equal with probability 0.9, and the others are fair coins.
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


print(compare(Corners(), ["linear"], ["raster", "halton"], [2], samples=SAMPLES).table())
check_world(Corners)

# %% [markdown]
r"""
## Summary

- Parallel decoding errs even with a perfect network: each step loses the total correlation of the tokens drawn in it.
- In an exact world that loss is measured in nats, with an interval, and agrees with enumeration where that is possible.
- Which schedule is best depends on how dependence is spread: of those tried here the cosine is never bad, and not always
  best. A slow start pays where a few tokens settle everything.
- Halton order wins where near means dependent. Confidence seeks modes; noise in its ranking mends most of that.
- A claim about samplers needs pairs, an interval, and a sampler named before looking.
"""

# %% [markdown]
r"""
## Further reading

- MaskGIT (arXiv 2202.04200): the schedules compared by FID, and confidence with noise.
- Halton scheduler (arXiv 2503.17076): why positions far apart should go together.
- Token-Critic (arXiv 2209.04439): a ranker that is trained, and tokens taken back.
- D3PM (arXiv 2107.03006): masking as a diffusion, whose bound notebook 4 measures.
- The larger tables: [what the schedule lab finds](../benchmarks/lab_findings.md), with adaptive rules and presets.
- Next: [14. Muse or diffusion](14_muse_or_diffusion.ipynb).
"""
