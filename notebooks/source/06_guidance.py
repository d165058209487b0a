# %% [markdown]
r"""
# 6. Guidance: saying the text louder

*Why a model that knows your prompt may still ignore it, and what one line of arithmetic on the logits does about it.*

|  |  |
|---|---|
| **Paper** | [Muse](https://arxiv.org/abs/2301.00704) 2.7; classifier-free guidance ([arXiv 2207.12598](https://arxiv.org/abs/2207.12598)) |
| **You will learn** | what the two predictions are · why their difference is a classifier · what a scale and a ramp buy, and what they cost · negative prompts · what too much of it does |
| **Before this** | [1. The tour](01_tour.ipynb), [5. The base transformer](05_base_transformer.ipynb); softmax and Bayes' rule; symbols are in the [glossary](glossary.md) |
| **Takes** | @takes@; about 90 minutes of your time |
| **Files** | [`cfg.py`](../minimuse/cfg.py), all of it |
"""

# %% knobs
import os

import diagrams
import matplotlib.pyplot as plt
import torch
from checks import check_guide, check_rising
from view import show, style

from minimuse import Muse
from minimuse.plots import grid, mask_overlay

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer pictures
CHECKPOINT = "toy"  # a shipped name or a folder
COUNTED = 4 if FAST else 64  # prompts, one picture of each, wherever "right" is counted
VARIED = 2 if FAST else 6  # pictures of each prompt where variety is measured
MANY = 6 if FAST else 48  # pictures of the one prompt of section 5
style()

# %% [markdown]
r"""
A text-to-image model predicts what pictures *with this caption* look like. Much of that has nothing to do with the
caption: floors are gray, objects cast shadows. A model that predicts all this well, and not so well the colour
that you asked for, still has a low loss. **Guidance** compares the prediction with the text to one without it, and
exaggerates the difference.

First some tools. All of this notebook happens in the base model, so we draw only with it, at low resolution. The
detector of notebook 1 says whether a picture shows what its prompt asks for.
"""

# %%
from minimuse.cfg import null_text
from minimuse.eval_metrics import mean_interval, paired_difference, proportion_interval
from minimuse.eval_networks import Detector
from minimuse.eval_prompts import matches, parse_prompt, prompt_set

muse = Muse.from_pretrained(CHECKPOINT, device="cpu")
detector = Detector.from_pretrained()
# one object, two in a relation, two or three alike, in turn; each prompt once
PROMPTS = [ask.prompt for ask in prompt_set("mixed", 2 * COUNTED)[::2]]
SIDE = (
    96 // muse.config.low_tokenizer.image_size
)  # pictures of sheets are drawn about 96 pixels wide


def coarse(prompts, n=1, seed=0, negative=None, **how):
    """Prompts -> n pictures of each by the base model only, and their tokens."""
    with torch.inference_mode():
        *_, last = muse.decode_base(muse.jobs(prompts, n, seed, negative), **how)
        return muse.picture(last), last.tokens


def is_right(images, prompts):
    read = zip(detector.detect(images), prompts, strict=True)
    return [matches(reading, parse_prompt(prompt)).right for reading, prompt in read]


# %% [markdown]
r"""
## 1. Without guidance

A row is a prompt, a column a seed. A **?** marks what the detector does not find right.
"""

# %%
FEW = ["two red cubes", "a yellow cube left of a blue sphere", "a small red metal cube"]
asked = [p for p in FEW for _ in range(6)]
plain, _ = coarse(FEW, n=6, seed=0, guidance=0.0)
verdicts = is_right(plain, asked)
captions = [
    p.removeprefix("a ") + ("" if ok else " ?") for p, ok in zip(asked, verdicts, strict=True)
]
print(f"right: {sum(verdicts)} of {len(verdicts)}")
grid(plain, captions, columns=6, scale=SIDE)

# %% [markdown]
r"""
Most of them are right, and the others are nearly right: an object is missing, or hidden by another one. (The detector errs too, above
all with small objects at this resolution.) Section 4 counts over more and harder prompts.
"""

# %% [markdown]
r"""
## 2. Two predictions

Let us stop a decode when about half of the tokens are fixed, and ask the model for its logits twice: once with the
prompt, $\ell_c$ (*conditional*), and once with the text removed, $\ell_u$ (*unconditional*). What "removed" means,
section 3 explains.
"""

# %%
prompt = "a large red cube"
with torch.inference_mode():
    steps = []
    for step in muse.steps(prompt, seed=1):
        steps.append(step)
        if not step.masked.any():  # the base model is done
            break
    half, done = next(s for s in steps if s.masked.float().mean() < 0.55), steps[-1]
    text = muse.encoder.encode([prompt])
    cond, uncond = muse.base.memory(text), muse.base.memory(null_text(text))
    l_c, l_u = muse.base(half.tokens, cond), muse.base(half.tokens, uncond)
p_c, p_u, g = l_c.softmax(-1), l_u.softmax(-1), muse.config.base.grid
print("logits (B, N, V) with the text:", tuple(l_c.shape), "- and without:", tuple(l_u.shape))

# %% [markdown]
r"""
How much do the two differ? At position $i$ we take the Kullback-Leibler divergence, in nats: how much *more* surprised the model
without the text is, on average, by what the model with the text would draw there.

$$D_i = \sum_{v} p_c(x_i = v)\,\log \frac{p_c(x_i = v)}{p_u(x_i = v)}$$

Of the eight positions where it is largest, we take the one whose codes look most different, and see which codes each prediction
prefers. Below the bars is the piece of the finished picture that this code makes at that position.
"""


# %%
def told(p_c, p_u):
    """(B, N, V) twice -> (B, N): how much the text says at each position, in nats."""
    return (p_c * (p_c.clamp(min=1e-12) / p_u.clamp(min=1e-12)).log()).sum(-1)


def looks(codes, place):
    """Codes (K,) -> one strip, one square per code: how it looks at this position of the finished picture."""
    with torch.inference_mode():
        tokens = done.tokens.repeat(len(codes), 1)
        tokens[:, place] = codes
        pictures = muse.low_tokenizer.decode(tokens)
    f = muse.low_tokenizer.downsampling
    a, b = place // g * f, place % g * f
    return (
        (pictures[:, :, a : a + f, b : b + f].clamp(-1, 1) / 2 + 0.5)
        .permute(2, 0, 3, 1)
        .flatten(1, 2)
    )


kl = told(p_c, p_u)[0].masked_fill(~half.masked[0], float("nan"))
liked = lambda place: (p_c + p_u)[0, place].topk(7).indices.sort().values  # noqa: E731
differ = lambda place: looks(liked(place), place).unflatten(1, (7, -1)).std(1).mean()  # noqa: E731
place = max(kl.nan_to_num(-1).topk(8).indices.tolist(), key=differ)
codes = liked(place)
figure, axes = plt.subplot_mosaic(
    [["seen", "kl", "bars"], ["seen", "kl", "looks"]],
    figsize=(11, 3),
    width_ratios=[1, 1.15, 1.6],
    height_ratios=[5, 1],
)
axes["seen"].imshow(mask_overlay(muse.picture(half)[0], half.masked[0]))
axes["seen"].set_title("known so far")
shown = axes["kl"].imshow(kl.view(g, g), cmap="viridis")
axes["kl"].plot(place % g, place // g, "s", ms=15, mfc="none", mec="red", mew=2)
axes["kl"].set_title("what the text says, nats")
figure.colorbar(shown, ax=axes["kl"], shrink=0.8)
for k, (p, label) in enumerate([(p_u, "$p_u$, no text"), (p_c, "$p_c$, with text")]):
    axes["bars"].bar(
        torch.arange(7) + 0.4 * k - 0.2, p[0, place, codes], 0.4, label=label, color=f"C{1 - k}"
    )
axes["bars"].set(title="at the marked position", ylabel="probability", xticks=[], xlim=(-0.5, 6.5))
axes["bars"].legend(fontsize=9)
axes["looks"].imshow(looks(codes, place), extent=(-0.5, 6.5, 0, 1), aspect="auto")
axes["looks"].set(
    yticks=[], xticks=range(7), xticklabels=codes.tolist(), xlabel="code, and its look"
)
for name in ("seen", "kl"):
    axes[name].set(xticks=[], yticks=[])
for name in ("seen", "kl", "looks"):
    axes[name].grid(False)
plt.show()

# %% [markdown]
r"""
Gray positions (left) are still to be filled, white ones (middle) are fixed. On the far floor the text changes next to nothing. It
changes the prediction where the cube may be, and there it moves probability to other codes. The model uses the text; the question is
whether it uses it *enough*.
"""

# %% [markdown]
r"""
### The formula

Muse takes the difference that the text makes to the logits, and adds it $t$ more times:

$$\ell_g \;=\; \ell_c + t\,(\ell_c - \ell_u) \;=\; (1 + t)\,\ell_c - t\,\ell_u .$$

$t$ is the **guidance scale**. At $t = 0$ nothing is added: $\ell_g = \ell_c$. We write the first form, not the second:
where the two predictions agree, rounding cannot make a difference of its own.
"""

# %%
from minimuse.cfg import guide

show(guide)

# %% [markdown]
r"""
### Why "classifier-free"?

Logits are log-probabilities up to a constant. So in probabilities the sum is a product:

$$p_g(x) \;\propto\; p_c(x)\left(\frac{p_c(x)}{p_u(x)}\right)^{t}.$$

And what is the ratio? $p_c(x)$ is $p(x \mid \text{text})$, $p_u(x)$ is $p(x)$, and Bayes' rule says

$$\frac{p(x \mid \text{text})}{p(x)} = \frac{p(\text{text} \mid x)}{p(\text{text})}.$$

That is a *classifier*: how strongly a picture with $x$ in it suggests that this was its caption. Guidance multiplies the
model by the $t$-th power of it, and nobody had to train it: it is a quotient of two predictions of one network.
Let us check the first equation with the logits above.
"""

# %%
for t in (0.0, 1.0, 3.0):
    by_logits = guide(l_c, l_u, t).softmax(-1)
    by_bayes = p_c.double() * (p_c.double() / p_u.double()) ** t
    by_bayes = by_bayes / by_bayes.sum(-1, keepdim=True)
    print(f"t = {t:g}: largest difference {(by_logits - by_bayes).abs().max():.1e}")

# %% [markdown]
r"""
**Predict, then run.** Three codes. With the text the model gives them 50%, 30% and 20%; without it 50%, 10% and 40%.
As $t$ grows, which code gets all the probability: the first, which is the likeliest? Or another?
"""

# %%
three_c, three_u = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.5, 0.1, 0.4])
scales = torch.linspace(0, 6, 61)
guided_p = torch.stack([guide(three_c.log(), three_u.log(), float(t)).softmax(-1) for t in scales])
figure, ax = plt.subplots(figsize=(7, 3))
for i, dash in enumerate(("-", "--", ":")):
    name = f"code {i + 1}: {three_c[i]:.0%} with the text, {three_u[i]:.0%} without"
    ax.plot(scales, guided_p[:, i], dash, label=name)
ax.set(xlabel="guidance scale t", ylabel="guided probability", ylim=(0, 1))
ax.legend(fontsize=9, loc="center right")
plt.show()

# %% [markdown]
r"""
The second. The first is as likely without the text, so it is not a sign of the text: its ratio is 1, and guidance
does not raise it. The second is three times as likely with the text. In the limit only the *ratio* counts,
not the probability: guidance does not prefer what is likely, but what is specific to the text. Keep that in mind for what
happens at large $t$.
"""

# %% [markdown]
r"""
### Mind the convention

Many programs compute $\ell_u + s\,(\ell_c - \ell_u)$ and call $s$ the guidance scale. It is the same line with
$s = 1 + t$: there 1 is no guidance, and 0 is *no text*. A number from a paper or a program means nothing until you
know which it is.
"""

# %%
print("diffusers' guidance_scale s  ->  our t")
for s in (0.0, 1.0, 4.0, 7.5):
    t = s - 1
    theirs = l_u + s * (l_c - l_u)
    print(
        f"{s:>28g}      {t:g}    same logits: {torch.allclose(theirs, guide(l_c, l_u, t), atol=1e-3)}"
    )

# %% [markdown]
r"""
### Exercise 6.1: the other convention

*Difficulty 1 of 3, about 10 minutes.*

Write guidance with the scale $s$, so that $s = 1$ gives the plain conditional model. (The check uses Muse's $t$; `in_muses_t`
translates.) The stub confuses the two.

<details><summary>Hint</summary>

What must come out at $s = 1$, and what at $s = 0$? A straight line in $s$ goes through both.

</details>
"""


# %%
def in_muses_t(fn):
    return lambda cond, uncond, t: fn(cond, uncond, 1 + t)


def my_guide(cond, uncond, s):
    return cond + s * (cond - uncond)  # your code: what should s = 1 give?


check_guide(in_muses_t(my_guide))


# %% tags=["solution"]
def my_guide(cond, uncond, s):
    return uncond + s * (cond - uncond)


check_guide(in_muses_t(my_guide))

# %% [markdown]
r"""
## 3. One network, both predictions

Where does $\ell_u$ come from? From the same weights. In training the text is removed from 10% of the examples, so the
network learns both jobs. Removed text has no token in its mask, and its embeddings are zero. Attention is then attention among
image tokens (Muse 2.7): cross-attention of the base model adds zero, that of super-resolution sees only the low-res tokens. A
softmax over nothing would be $0/0$; so the base model attends to the zeros, whose values are zero.
"""

# %%
from minimuse.cfg import drop_text

show(null_text, drop_text)

# %%
from minimuse.text import Context

crowd = Context(text.embeds.expand(5000, -1, -1), text.mask.expand(5000, -1))
dropped = drop_text(crowd, 0.1, torch.Generator().manual_seed(0))
gone = ~dropped.mask.any(1)
print(
    "a prompt   (B, L, D_lm):", tuple(text.embeds.shape), "- pieces of text:", int(text.mask.sum())
)
print("no prompt  (B, 1, D_lm):", tuple(null_text(text).embeds.shape), "- pieces of text: 0")
print(f"of 5000 texts {gone.double().mean():.1%} were removed; what is left of the first: ", end="")
print(f"{dropped.mask[gone][0].tolist()}, largest number {dropped.embeds[gone][0].abs().max():g}")

# %% [markdown]
r"""
You wrote `drop_text` in exercise 2.2. When drawing, both branches run side by side as one batch of $2B$ rows: the same tokens twice, once with the memory of
the prompt, once with that of no prompt. So guidance costs twice the work. `guided` makes the function that the
sampler calls; where $t = 0$ it leaves the second branch out.
"""

# %%
diagrams.guidance(muse.config)

# %%
from minimuse.cfg import get_guidance, guided

show(guided, get_guidance)

# %%
rows = []
hook = muse.base.register_forward_pre_hook(lambda model, args: rows.append(len(args[0])))
with torch.inference_mode():
    for guidance in (0.0, 3.0, (0.0, 3.0)):
        logits_fn = guided(muse.base, cond, uncond, guidance)
        for u in (0.0, 1.0):
            logits_fn(half.tokens, u)
        print(f"guidance {guidance!s:>10}: rows at the first and at the last step {rows}")
        rows.clear()
hook.remove()

# %% [markdown]
r"""
## 4. How much?

The same seeds under rising scales, each constant through the decode. Follow a column from top to bottom.
"""

# %%
SCALES = [0.0, 3.0, 20.0] if FAST else [0.0, 1.0, 3.0, 8.0, 20.0]
sheet = []
for t in SCALES:
    sheet += coarse("a large yellow cube", n=7, seed=3, guidance=t)[0]
grid(sheet, [f"t = {t:g}" for t in SCALES for _ in range(7)], columns=7, scale=SIDE)

# %% [markdown]
r"""
One large object is so easy that this model needs no guidance for it: all rows show yellow cubes. Further down, damage sets in: fragments
lie on the floor. To see what guidance is *good* for we need harder prompts, and numbers.

- **Right** is the fraction of pictures with everything that the prompt names, over many prompts of one to three objects.
- **Variety** needs something that a prompt leaves *open*. For prompts with a single large object, we take the position where
  it stands, as the detector sees it (x and depth), and average the distance of two pictures of the same prompt.

All scales draw the same prompts with the same seeds, so the measurements are *pairs*. We compare pair by pair: prompts that are hard at every
scale then cancel. Bars are 95% intervals of the difference from $t = 0$.

**Predict, then run.** Where will the model be right most often: without guidance, at $t = 1$, or at $t = 8$?
"""

# %%
SINGLE = [
    f"a large {looks}" for looks in ("red cube", "blue sphere", "green cylinder", "yellow cube")
]
SINGLE += [
    "a large cyan cube",
    "a large gray sphere",
    "a large brown cylinder",
    "a large red sphere",
]
SINGLE = SINGLE[:3] if FAST else SINGLE


def measure(**how):
    """How the base model draws -> right (n,) bool, a row per picture; variety of position (S,), a row per prompt of SINGLE."""
    right = is_right(coarse(PROMPTS, seed=100, **how)[0], PROMPTS)
    read = detector.detect(coarse(SINGLE, n=VARIED, seed=100, **how)[0])
    best = [max(r.things, key=lambda thing: thing.confidence, default=None) for r in read]
    at = torch.tensor([[t.x, t.depth] if t else [0.0, 0.0] for t in best])  # (S * VARIED, 2)
    variety = torch.stack([torch.pdist(of_prompt).mean() for of_prompt in at.split(VARIED)])
    return torch.tensor(right), variety


def against(found, baseline):
    """Two measurements of the same prompts and seeds -> differences in right and in variety, with intervals."""
    return paired_difference(found[0], baseline[0]), paired_difference(found[1], baseline[1])


constant = {t: measure(guidance=t) for t in SCALES}
for t, (right, variety) in constant.items():
    print(f"t = {t:>2g}: right {proportion_interval(right)}, variety {mean_interval(variety)}")
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for k, (ax, name) in enumerate(zip(axes, ("fraction right", "variety of position"), strict=True)):
    gains = [against(constant[t], constant[0.0])[k] for t in SCALES[1:]]
    reach = [[m.value - m.low for m in gains], [m.high - m.value for m in gains]]
    ax.errorbar(
        range(len(gains)), [m.value for m in gains], yerr=reach, fmt="o-", capsize=3, color=f"C{k}"
    )
    ax.axhline(0, color="k", lw=1, ls=":")
    ax.set_xticks(range(len(gains)), [f"{t:g}" for t in SCALES[1:]])
    ax.set(xlabel="guidance scale t", ylabel=f"{name}, less t = 0")
plt.show()

# %% [markdown]
r"""
Left: a little guidance helps a lot, and too much undoes it. Guidance has a price, too: it raises what is specific to the text and
lowers the rest, so pictures of one prompt become similar (Muse's figure 8). Right: with $t = 1$ and $3$, *where* the object stands varies
less than without guidance, although the prompt says nothing about it. With $8$ and $20$ it varies as much again, because damage is varied,
too. So be careful with measures of variety at large scales. And eight prompts are few: an interval may contain zero.
"""

# %%
if not FAST:  # four prompts are too few
    gain = {t: against(constant[t], constant[0.0])[0] for t in SCALES[1:]}
    assert gain[1.0].low > 0, "a little guidance does not help"
    assert gain[20.0].value < gain[1.0].value - 0.2, "too much does not undo it"
    price = {t: against(constant[t], constant[0.0])[1] for t in SCALES[1:]}
    assert max(price[1.0].value, price[3.0].value) < 0, "the object varies no less with guidance"

# %% [markdown]
r"""
### Exercise 6.2: a ramp

*Difficulty 1 of 3, about 10 minutes.*

Muse lets $t$ rise linearly through the decode: diversity at first, fidelity at the end. Progress $u$ goes from 0 at
the first step to 1 at the last. Write a function that makes such a ramp from `start` to `t`.

<details><summary>Hint</summary>

The result is a function of $u$, not a number. What does it give at $u = 0$, and at $u = 1$? So how fast does it rise?

</details>
"""


# %%
def my_rising(t, start=0.0):
    return start + (t - start) * 0.5  # your code: a ramp is a function of u


check_rising(my_rising)


# %% tags=["solution"]
def my_rising(t, start=0.0):
    return lambda u: start + (t - start) * u


check_rising(my_rising)

# %% [markdown]
r"""
**Predict, then run.** Three ways to spend the same mean scale: constant at 3; rising from 0 to 6; falling from 6 to 0. The
seeds are those of an unguided decode. Which of the three leaves the most tokens as they were without guidance?
"""

# %%
from minimuse.cfg import rising

ramps = {
    "none": 0.0,
    "rising, 0 to 6": rising(6.0),
    "constant, 3": 3.0,
    "falling, 6 to 0": rising(0.0, start=6.0),
}
drawn = {name: coarse(SINGLE, n=4, seed=50, guidance=t) for name, t in ramps.items()}
free = drawn["none"][1]
kept = {name: (tokens == free).double().mean().item() for name, (_, tokens) in drawn.items()}
for name, fraction in kept.items():
    print(f"{name:>15}: {fraction:5.1%} of the tokens are those of no guidance")
few = min(7, len(free))
sheet = [image for images, _ in drawn.values() for image in images[:few]]
grid(sheet, [name for name in drawn for _ in range(few)], columns=few, scale=SIDE)

# %% [markdown]
r"""
Rising, although the cosine schedule fixes most tokens in the *last* steps, and there a rising scale guides most. The first tokens
are few, but they decide the rest: where the object will stand, and what the later tokens must fit. Change them, and nearly everything
that follows changes. A rising scale hardly changes them. So more layouts stay as they were without guidance (compare the first two
rows), and guidance acts on the details. That is the paper's argument for the ramp. Its price: the strong end leaves fragments and
frayed edges (second row). Neither of these says which is better, so we count:
"""

# %%
assert kept["rising, 0 to 6"] > 1.2 * max(kept["constant, 3"], kept["falling, 6 to 0"]), (
    "rising does not keep the most tokens"
)

# %%
MEANS = [3.0]
pairs = {}
for t in MEANS:
    pairs[f"rising, 0 to {2 * t:g}"] = against(measure(guidance=rising(2 * t)), constant[t])
    pairs[f"falling, {2 * t:g} to 0"] = against(measure(guidance=rising(0.0, 2 * t)), constant[t])
figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True)
for k, (ax, name) in enumerate(zip(axes, ("fraction right", "variety of position"), strict=True)):
    for row, less in enumerate(both[k] for both in pairs.values()):
        ax.plot([less.low, less.high], [row, row], color=f"C{k}")
        ax.plot(less.value, row, "o", color=f"C{k}")
    ax.axvline(0, color="k", lw=1, ls=":")
    ax.set(xlabel=f"{name}, less constant {MEANS[0]:g}")
axes[0].set_yticks(range(len(pairs)), list(pairs))
axes[0].set_ylim(-0.5, len(pairs) - 0.5)
axes[0].invert_yaxis()
plt.show()
for name, gains in pairs.items():
    print(f"{name:>17}: right {gains[0]}, variety {gains[1]}")

# %% [markdown]
r"""
Dots are the measured differences from the constant scale of the same mean, lines their 95% intervals. All are small compared with what
guidance itself gained above: these 64 prompts separate guidance from no guidance, but not one ramp from another. That is a result, too; do
not name a winner. A fair comparison of models shows more than one scale, as notebook 11 does.
"""

# %%
if not FAST:
    assert all(abs(right.value) < gain[3.0].value / 2 for right, _ in pairs.values())

# %% [markdown]
r"""
### When does the text count?

At every step of an unguided decode, how much does the text still say about a token that is not fixed yet (the divergence $D_i$ of
section 2, averaged over the masked tokens)? One might think that it says much at first and little later, when the visible tokens say
the same.
"""

# %%
speaks = []
with torch.inference_mode():
    for prompt in PROMPTS[:12]:
        text = muse.encoder.encode([prompt]).to(muse.device)
        cond, uncond = muse.base.memory(text), muse.base.memory(null_text(text))
        tokens = torch.full((1, muse.config.base.tokens), muse.base.mask_id)
        curve = []
        for step in muse.steps(prompt, seed=7, guidance=0.0):
            masked = tokens == muse.base.mask_id  # before the step
            a, b = (muse.base(tokens, m).softmax(-1) for m in (cond, uncond))
            curve.append(told(a, b)[masked].mean().item())
            tokens = step.tokens
            if not step.masked.any():
                break
        speaks.append(curve)
speaks = torch.tensor(speaks)
figure, ax = plt.subplots(figsize=(7, 3))
ax.plot(range(1, speaks.shape[1] + 1), speaks.T, color="0.8", lw=1)
ax.plot(range(1, speaks.shape[1] + 1), speaks.mean(0), "o-", label="mean over prompts")
ax.set(xlabel="step", ylabel="nats per masked token", ylim=(0, None))
ax.legend()
plt.show()

# %% [markdown]
r"""
A gray line is one prompt, the blue one is their mean. It does *not* fall: in the last steps the text says at least as much about a masked
token as in the first. The order may explain it. The model fixes first what it is certain of, mostly floor and sky, about which the text
says little; what remains masked is the object, where the text counts. So guidance can change something in every step.
"""

# %%
if not FAST:
    start, end = speaks[:, :4].mean(), speaks[:, -4:].mean()
    assert 0.5 < end / start < 2, "the text counts less, or more, towards the end"

# %% [markdown]
r"""
### One token, or the whole picture?

Section 2 derived the formula for *one* token, given the visible ones. One would like more: whole pictures $x$ from the **tilted joint**

$$p_t(x) \;\propto\; p(x \mid y)\; p(y \mid x)^t .$$

Does a guided decode draw from it? In an exact world we can measure that. The world here has labels $y$ in place of texts, and all of
$p(x)$, $p(x \mid y)$ and $p_t(x)$ are known ([notebook 13](13_schedule_lab.ipynb) is about such worlds). The
network's error is zero, so what remains is the sampler's error.

**Predict, then run.** With one token a step, an unguided decode draws exactly from $p(x \mid y)$. Does a decode with a constant scale
of 1 then draw exactly from $p_1(x)$?
"""

# %%
from minimuse.lab import ConditionalMixture, compare

world = ConditionalMixture.random(8, (4, 4), 4, t=1.0)  # 16 tokens of 4 codes
SCHEDULES = {"no guidance": 0.0, "constant, 1": 1.0, "rising, 0 to 2": "rising:2"}
samplers = {name: {"order": "halton", "guidance": g} for name, g in SCHEDULES.items()}
STEPS = (2, 4, 8, 16)
exact = compare(world, [], [], STEPS, presets=samplers, samples=64 if FAST else 2048)
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for ax, metric, target in zip(
    axes, ("kl", "tilted"), ("p(x | y)", "the tilted joint"), strict=True
):
    for name, fmt in zip(samplers, ("o-", "s--", "^:"), strict=True):
        found = [exact[name, "", steps][metric] for steps in STEPS]
        values, margins = [e.value for e in found], [e.margin for e in found]
        ax.errorbar(STEPS, values, margins, fmt=fmt, capsize=3, label=name)
    ax.axhline(0, color="k", lw=1, ls=":")
    ax.set_xscale("log", base=2)
    ax.set(
        xlabel="steps, of 16 tokens", ylabel="KL, nats per token", title=f"distance from {target}"
    )
axes[1].legend(fontsize=9)
plt.show()
for name in samplers:
    print(f"{name:>15}, 16 steps: from the tilted joint {exact[name, '', 16]['tilted']}")

# %% [markdown]
r"""
No. Left, the unguided decode reaches $p(x \mid y)$ with one token a step, as it should. Right, no guided decode reaches the tilted joint, not even
then: a constant scale of 1 brings it hardly nearer than no guidance. The exponent $t$ acts on each conditional $p(x_i \mid \text{visible})$, and each of them is normalized for itself. The joint would need
$p(y \mid x)^t$ averaged over all that is still masked, and that is no function of the two predictions at hand. So read guidance as a
rule for one token, and judge it by its pictures.
"""

# %%
if not FAST:
    assert abs(exact["no guidance", "", 16]["kl"].value) < 1e-6, "one token a step is not exact"
    assert exact["constant, 1", "", 16]["tilted"].low > 0, "guidance reaches the tilted joint"

# %% [markdown]
r"""
## 5. Negative prompts

Nothing forces $\ell_u$ to be the prediction without any text. Put the prediction for *another text* in its place, and
guidance pushes away from that:

$$\ell_g = (1 + t)\,\ell_c - t\,\ell_{\text{negative}} .$$

The scale is constant here: a ramp that begins at 0 would ignore the negative prompt in the first steps.

**Predict, then run.** We ask for a large sphere of no particular colour, many times, and count the colours. Then again,
away from "a red sphere". Which colours do we get then: all others equally often, or only some of them?
"""


# %%
def colours(images):
    """Pictures -> how often the largest object in each has each colour."""
    area = lambda thing: (thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1])  # noqa: E731
    seen = [max(r.things, key=area).color for r in detector.detect(images) if r.things]
    return {name: seen.count(name) / len(images) for name in COLORS}


from minimuse.data_scenes import COLORS

wanted = "a large sphere"
freely, _ = coarse(wanted, n=MANY, seed=0, guidance=2.0)
away, _ = coarse(wanted, n=MANY, seed=0, guidance=2.0, negative="a red sphere")
figure, ax = plt.subplots(figsize=(8, 3))
for k, (name, images) in enumerate(
    [("no negative prompt", freely), ('away from "a red sphere"', away)]
):
    heights = list(colours(images).values())
    ax.bar(
        torch.arange(len(COLORS)) + 0.4 * k - 0.2,
        heights,
        0.4,
        label=name,
        hatch=["", "//"][k],
        ec="w",
    )
ax.set_xticks(range(len(COLORS)), list(COLORS))
ax.set(ylabel=f"fraction of {MANY} pictures", xlabel="colour of the largest object")
ax.legend(fontsize=9)
plt.show()

# %%
few = 6
grid(
    [*freely[:few], *away[:few]],
    ["no negative prompt"] * few + ["away from red"] * few,
    columns=few,
    scale=SIDE,
)

# %% [markdown]
r"""
One colour takes nearly everything. A negative prompt does not say what is wanted instead. The pictures move *away*,
and arrive at the colour that is farthest from red (cyan is its complement), although red was rare before. A negative prompt is a strong
instruction, and not a filter that removes the red ones. Name in it only what you do not want: "a red *sphere*" also names *sphere*,
which the prompt asks for.
"""

# %%
if not FAST:
    before, after = colours(freely), colours(away)
    assert max(after.values()) > 0.8 > max(before.values()), "no colour takes nearly everything"
    assert before["red"] < 0.2, "red was not rare"
    assert after["red"] == 0, "red has remained"

# %% [markdown]
r"""
**Predict, then run.** What does a model draw if the negative prompt is *the prompt itself*, at a scale of 5? Noise?
Anything but the prompt? The opposite of it?
"""

# %%
same = {"prompts": PROMPTS[:2], "n": 2, "seed": 4}
cancelled, a = coarse(**same, guidance=5.0, negative=PROMPTS[:2])
plain, b = coarse(**same, guidance=0.0)
print(f"tokens that agree with no guidance at all: {(a == b).double().mean():.1%}")
grid(
    [*cancelled, *plain],
    ["negative = prompt, t = 5"] * 4 + ["t = 0"] * 4,
    columns=4,
    scale=SIDE,
)

# %% [markdown]
r"""
The pictures of $t = 0$ (where a token differs, rounding has tipped a draw): $\ell_c - \ell_c = 0$, whatever $t$ is.
This is also a test of any implementation of negative prompts: a path that never ran, or that compares with the wrong
text, does not cancel.
"""

# %%
assert (a == b).double().mean() > 0.95, "a prompt against itself does not cancel"

# %% [markdown]
r"""
## What failure looks like

### Too much

Section 2 showed what happens for $t \to \infty$: only the ratio counts, and the likeliest codes are no longer those
that are drawn. The answer then comes from the far ends of the two distributions, where the model has learned little.
"""

# %%
extreme = [0.0, 3.0, 20.0, 1000.0]
WANTED = "a large blue sphere"
made = {t: coarse(WANTED, n=6, seed=11, guidance=t) for t in extreme}
sheet = [image for images, _ in made.values() for image in images]
grid(sheet, [f"t = {t:g}" for t in extreme for _ in range(6)], columns=6, scale=SIDE)

# %% [markdown]
r"""
Edges fray, fragments lie on the floor, and the rows for 20 and 1000 look much the same: the limit is near. What does
the model *itself*, without guidance, think of these pictures? We take the bound of notebook 4, in nats per token; higher
is less likely. The dotted line is $\ln V$, the loss of a model that gives every code the same probability.
"""

# %%
from minimuse.train_log import likelihood_bound

strange = []
with torch.inference_mode():
    memory = muse.base.memory(muse.encoder.encode([WANTED] * 6))
    for _, tokens in made.values():
        draws = [torch.Generator().manual_seed(seed) for seed in range(4 if FAST else 32)]
        plain = lambda x: muse.base(x, memory)  # noqa: E731
        each = [likelihood_bound(plain, tokens, muse.base.mask_id, draw) for draw in draws]
        strange.append(torch.stack(each).mean().item())
figure, ax = plt.subplots(figsize=(6, 3))
ax.plot(range(len(extreme)), strange, "o-")
uniform = torch.tensor(float(muse.config.base.codebook_size)).log().item()
ax.axhline(uniform, color="k", lw=1, ls=":")
ax.set_xticks(range(len(extreme)), [f"{t:g}" for t in extreme])
ax.set(xlabel="guidance scale t", ylabel="nats per token, plain model", ylim=(0, None))
plt.show()

# %% [markdown]
r"""
The more guidance, the less likely are the pictures to the unguided model. At the largest scales they are even above the dotted
line: it would have predicted them better by guessing.
"""

# %%
assert strange == sorted(strange), "more guidance is not less likely"
assert strange[0] < uniform / 2 < 0.9 * uniform < strange[-1], "the limit is not above the line"

# %% [markdown]
r"""
### The wrong convention

Code that was written for $s$ and is called with $t$: `uncond + t * (cond - uncond)`. Nothing crashes; pictures are a
little less guided than you think, until you ask for $t = 0$, "no guidance".
"""

# %%
wrong = lambda cond, uncond, t: uncond + t * (cond - uncond)  # noqa: E731
drawn = []
with torch.inference_mode():
    text = muse.encoder.encode(["a large red cube"] * 6)
    cond, uncond = muse.base.memory(text), muse.base.memory(null_text(text))
    from minimuse.sampler import decode

    for t, how in [(0.0, guide), (0.0, wrong)]:
        logits_fn = lambda x, u, t=t, how=how: how(muse.base(x, cond), muse.base(x, uncond), t)  # noqa: E731
        start = torch.full((6, muse.config.base.tokens), muse.base.mask_id)
        draws = [torch.Generator().manual_seed(i) for i in range(6)]
        *_, last = decode(logits_fn, start, mask_id=muse.base.mask_id, steps=8, generator=draws)
        drawn += muse.picture(last._replace(stage="base"))
grid(drawn, ["t = 0"] * 6 + ["t = 0, wrong line"] * 6, columns=6, scale=SIDE)

# %% [markdown]
r"""
We asked for a large red cube. The second row shows ordinary pictures that ignore the prompt: at $t = 0$ the wrong line gives the
*unconditional* model. `check_guide` tests exactly that first.
"""

# %%
red_cubes = is_right(drawn, ["a large red cube"] * 12)
assert sum(red_cubes[6:]) < sum(red_cubes[:6]) - 2, "the second row does not ignore the prompt"
check_guide(wrong)

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

In which third of the decode does guidance earn its gain? The scale may be any function of $u$: let it be 3 in one third and 0 elsewhere,
and compare with constant 3 by `measure` and `against`. Predict the order first. Does the third with the most gain also cost the most
variety?
"""

# %% [markdown]
r"""
## Summary

- The network predicts with the text and without it, since in training 10% of the texts were removed.
- Guidance adds the difference of the logits $t$ more times. In probabilities: it multiplies by the $t$-th power of
  an implied classifier, so codes win that are specific to the text, not those that are likely anyway. That holds for one token given
  the visible ones; the whole decode does not sample from $p(x)\,p(\text{text} \mid x)^t$.
- A little of it makes pictures more faithful, and less varied. A ramp that begins at 0 leaves the first steps alone, which decide the layout.
- A negative prompt replaces "no text", and leads to what is farthest from it. A prompt against itself cancels.
- Far too much of it gives pictures that the model itself finds unlikely.
- There are two conventions, $s = 1 + t$.
"""

# %% [markdown]
r"""
## Further reading

- Ho and Salimans 2022, *Classifier-free diffusion guidance*, [arXiv 2207.12598](https://arxiv.org/abs/2207.12598): where it comes from.
- Chang et al. 2023, *Muse*, [arXiv 2301.00704](https://arxiv.org/abs/2301.00704): 2.7 on the ramp and on negative prompts; figure 8 for the trade-off.
- Kynkäänniemi et al. 2024, *Applying guidance in a limited interval*, [arXiv 2404.07724](https://arxiv.org/abs/2404.07724): when to guide, in diffusion.
- Next: [7. Parallel decoding](07_parallel_decoding.ipynb). The trade-off in full: [11. Evaluation](11_evaluation.ipynb).
"""
