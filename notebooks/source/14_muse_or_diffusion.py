# %% [markdown]
r"""
# 14. Muse or diffusion?

*Three ways to draw the same pictures, with the same data, text and tokenizer and about as many parameters. What differs is what is predicted, and from what a picture begins.*

|  |  |
|---|---|
| **Paper** | Muse 4; [DiT](https://arxiv.org/abs/2212.09748), [DDIM](https://arxiv.org/abs/2010.02502), [D3PM](https://arxiv.org/abs/2107.03006), [Parti](https://arxiv.org/abs/2206.10789) |
| **You will learn** | a diffusion transformer, line by line · an autoregressive one · what they share with Muse · who is fast, and why · whether Muse is a diffusion model |
| **Before this** | [4. Masking](04_masking.ipynb), [7. Parallel decoding](07_parallel_decoding.ipynb); Gaussians |
| **Takes** | @takes@; about 90 minutes of your time |
| **Files** | [`baseline_dit.py`](../minimuse/baseline_dit.py), [`baseline_ar.py`](../minimuse/baseline_ar.py), [`transformer.py`](../minimuse/transformer.py) |
"""

# %% knobs
import inspect
import os
import time
from dataclasses import replace
from pathlib import Path

import diagrams
import matplotlib.pyplot as plt
import torch
from checks import check_add_noise, check_ddim_step
from view import film_strip, show, style

import minimuse
from minimuse import Muse
from minimuse.plots import film, grid, mask_overlay, tradeoff

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, hardly trained
CHECKPOINT = "nano"  # a shipped name or a folder
SCENES = 48 if FAST else 3000  # to train on, one thing in each
STEPS = 5 if FAST else 600  # of training; the DiT takes more, until it has had as many FLOPs
PICTURES = 6 if FAST else 60  # a point of the race
DRAWS = 2 if FAST else 16  # masks of each picture in section 6
style()

# %% [markdown]
r"""
This table, from the notes with which this project began, compares DiT and Muse; section 6 tests the words in quotation marks. By the end you can point to
the line of code behind each row: section 9 has the table once more, with these lines.

|  | DiT | Muse |
|---|---|---|
| what it is | diffusion | not diffusion, "but it looks like just a discrete diffusion model" |
| latent space | continuous | discrete |
| image tokens | patches of the latents | positions of the token grid |
| architecture | one transformer of DiT blocks | two transformers |
| transformer | not autoregressive | not autoregressive |
| it predicts | noise | masked tokens |
| a picture begins as | noise from $N(0, I)$ | all [MASK] |
| guidance | used when needed | used |
| nice ideas | blocks that begin as the identity | two stages; fine-tuned decoder; rising guidance; mask-free editing |

A third column is missing, and the paper's own tables have it: Parti, which is autoregressive. We add it.
"""

# %% [markdown]
r"""
## 0. What all three share

All three share the scenes of one object, their captions, read by the frozen language model, and the checkpoint's low-resolution tokenizer, which is not
trained any further. (The networks take the place of the base model; what Muse does after it would be the same for all three.)
"""

# %%
from minimuse.data_cache import tokenize_images
from minimuse.data_sources import SceneDataset
from minimuse.muse import build
from minimuse.train_engine import Engine
from minimuse.utils import area_downsample, to_float, to_pil

muse = Muse.from_pretrained(CHECKPOINT, device="cpu")
side, low_side = muse.config.high_tokenizer.image_size, muse.config.low_tokenizer.image_size
data = SceneDataset(SCENES, side, seed=0, fractions=(1, 0, 0))
images = area_downsample(data.images(), side // low_side)  # (SCENES, 3, h, w) uint8
captions = [data.captions(i, 1)[0] for i in range(SCENES)]
context = muse.encoder.encode(captions)
texts = [[e[m]] for e, m in zip(context.embeds, context.mask, strict=True)]
grid(images[:8], captions[:8], columns=8, scale=128 // low_side)

# %% [markdown]
r"""
## 1. Latent space: continuous or discrete

The tokenizer's encoder gives $d$ numbers for each position of the grid. Muse rounds them to the nearest of $V$ codes and
keeps the code's *number*. A diffusion model keeps the $d$ numbers themselves, because a little noise can be added to
them.
"""

# %%
from minimuse.baseline_dit import latents

tokens = tokenize_images(muse.low_tokenizer, images)  # (SCENES, N)
z = latents(muse.low_tokenizer, images)  # (SCENES, d, h, w)
print("tokens (n, N):      ", tuple(tokens.shape), tokens[0, :8].tolist(), "...")
print(
    "latents (n, d, h, w):",
    tuple(z.shape),
    [round(v, 2) for v in z[0, :, 0, 0].tolist()],
    "at the first place",
)

# %%
codes = muse.low_tokenizer.codebook.detach()
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
some = z[:200].permute(0, 2, 3, 1).flatten(0, 2)
axes[0].scatter(some[:, 0], some[:, 1], s=2, alpha=0.3, label="what the encoder gives")
axes[0].scatter(codes[:, 0], codes[:, 1], s=14, marker="x", label="the codebook")
axes[0].set(xlabel="channel 0", ylabel="channel 1", title="two of the channels")
axes[0].legend(loc="lower left", fontsize=9)
axes[1].hist(
    [z[:, c].flatten().numpy() for c in range(z.shape[1])], bins=40, histtype="step", density=True
)
axes[1].set(xlabel="value", ylabel="density", title="each channel has its own scale")
plt.show()

# %% [markdown]
r"""
Left: Muse can express only the crosses, the diffusion model any point. Right: the channels differ in mean and spread,
and noise will have variance 1 in all of them. So latents are *standardized*, channel by channel, before noise is
added; the numbers needed to undo it are part of the model.
"""

# %%
from minimuse.baseline_dit import DiT

show(DiT.observe, DiT.standardize)

# %% [markdown]
r"""
At the end of sampling we round after all: the drawn latents go to their nearest codes, then through the same decoder.
The rounding costs little, as the pictures show, and makes the race fair: all three draw through one decoder. (Stable Diffusion
does not round; its decoder was made for latents between the codes.)
"""

# %%
with torch.inference_mode():
    rounded = to_pil(muse.low_tokenizer.decode(tokens[:6]))
    unrounded = to_pil(muse.low_tokenizer.decoder(z[:6].to(codes)).clamp(-1, 1))
rows = [*to_pil(to_float(images[:6])), *unrounded, *rounded]
grid(
    rows,
    ["rendered"] * 6 + ["latents, decoded"] * 6 + ["tokens, decoded"] * 6,
    columns=6,
    scale=96 // low_side,
)

# %% [markdown]
r"""
## 2. Image tokens: patches or positions

A transformer wants a sequence. Muse's sequence is the token grid, one token per position. DiT cuts the latents into patches of
$p \times p$ positions and makes a token of each; larger patches are cheaper and coarser. Our grid is small, so $p = 1$, and both have the
same number of tokens. With $p = 2$ the DiT would have a quarter of them:
"""

# %%
from minimuse.baseline_ar import Autoregressive, LowRes
from minimuse.baseline_dit import Diffusion, dit_sizes

BASELINES = {make.model: make for make in (LowRes, Autoregressive, Diffusion)}  # masked, ar, dit
sizes = muse.config.base
for patch in (1, 2):
    net = DiT(dit_sizes(sizes, patch), z.shape[1], patch)
    print(f"p = {patch}: {net.places.shape[0]} tokens of {net.inputs.in_features} numbers")
show(DiT.forward)

# %% [markdown]
r"""
Read `forward` from top to bottom: the time becomes a vector `c`; `pixel_unshuffle` cuts the patches; the blocks; the
head; `pixel_shuffle` puts patches back; the last two lines are section 3's. Where Muse's transformer ends in $V$ logits per token,
this one ends in $d\,p^2$ numbers per token: no softmax, no codebook.

How are the sizes made equal? adaLN, explained below, costs parameters, so the DiT is narrower:
"""

# %%
for model, make in BASELINES.items():
    net = make.network(make.configure(muse.config))
    size = sum(p.numel() for p in net.parameters())
    print(
        f"{model:>7}: {size:9,} parameters, {net.config.layers} layers of width {net.config.width}, class {make.__name__}"
    )
show(dit_sizes)

# %% [markdown]
r"""
## 3. What is predicted: noise, masked tokens, or the next token

All three take a picture, damage it, and learn to repair it. They differ in the damage.

**Diffusion** mixes in Gaussian noise. Step $s$ of $S = 1000$ has a level $a_s$, from nearly 1 down to nearly 0; step $r$ replaces a fraction $b_r$ of the
variance by noise:

$$x_s = \sqrt{a_s}\,x + \sqrt{1 - a_s}\,\varepsilon, \qquad \varepsilon \sim \mathcal N(0, I), \qquad
a_s = \prod_{r \le s} (1 - b_r).$$

The square roots keep the variance at 1. The network sees $x_s$, $s$ and the text, and predicts $\varepsilon$.

In which form? Where all is noise, $\varepsilon$ is what the network sees, and to repeat it is easy; but the picture that follows from
it, $(x_s - \sqrt{1 - a_s}\,\varepsilon) / \sqrt{a_s}$, divides by nearly nothing, so the smallest error is
fatal just where a picture begins. So our head predicts the *velocity* $v = \sqrt{a_s}\,\varepsilon - \sqrt{1 - a_s}\,x$: close to $\varepsilon$ at
low noise, close to $-x$ at high noise. The noise follows by one line, and divided by $a_s$ its squared error is
that of $v$, the same size at every level:
"""

# %%
from minimuse.baseline_dit import LEVELS, NoiseLoss, add_noise, amounts, gaussians, noise_levels

show(noise_levels, amounts, add_noise, NoiseLoss.forward)

# %% [markdown]
r"""
**Masking** replaces tokens by [MASK], a fraction $r$ of them, and asks for those. **Autoregression** hides all that comes
later in reading order, and asks for every token at once, each from those before it. In code they
differ in what the model is shown:
"""

# %%
from minimuse.baseline_ar import NextTokenLoss, train_ar
from minimuse.baseline_dit import train_dit
from minimuse.train import MaskedLoss, train_transformer
from minimuse.train_engine import init_from_codebook

show(MaskedLoss.forward, NextTokenLoss.forward)

# %% [markdown]
r"""
**Predict, then run.** Below, the same scene is damaged more and more: by noise at $s = 0, 150, \ldots, 900$, by masks
of a fraction $s / 1000$, and by as many hidden from the end of the reading order. After which step can you no longer see the colour? Is it
about the same step for noise and for masks?
"""

# %%
from minimuse.masking import random_mask

dit_config = dit_sizes(sizes)
model = DiT(dit_config, z.shape[1])
model.observe(z)
x, e = model.standardize(z[:1]), gaussians(*z[:1].shape, generator=torch.Generator().manual_seed(0))
ladder = [0, 150, 300, 450, 600, 750, 900]
picture, noisy, holes, later = rounded[0], [], [], []
with torch.inference_mode():
    for s in ladder:
        spoiled = model.standardize(add_noise(x, e, torch.tensor([s])), back=True)
        noisy.append(to_pil(muse.low_tokenizer.decoder(spoiled.to(codes)).clamp(-1, 1))[0])
        rate = torch.tensor([s / 1000])
        holes.append(
            mask_overlay(
                picture, random_mask(tokens[:1], rate, torch.Generator().manual_seed(1))[0]
            )
        )
        later.append(
            mask_overlay(picture, torch.arange(tokens.shape[1]) >= tokens.shape[1] * (1 - rate))
        )
figure, ax = plt.subplots(figsize=(7, 3))
ax.plot(LEVELS, label=r"$a_s$: share of the variance that is picture")
ax.plot(
    1 - torch.arange(1000) / 1000, "--", label="fraction of tokens that is visible at r = s / 1000"
)
ax.set(xlabel="step s", ylabel="what is left of the picture")
ax.legend(fontsize=9)
plt.show()
titles = [f"s = {s}" for s in ladder]
film_strip(
    [[n, h, a] for n, h, a in zip(noisy, holes, later, strict=True)], titles, scale=128 // low_side
)

# %% [markdown]
r"""
Under masks the colour remains as long as one token of the object is visible; noise hides it in the last quarter. Noise
damages every position a little; a mask removes some positions and leaves the others as they are. The
diffusion model sees all of a bad picture, Muse a part of a good one. That is the root of nearly every other difference: Muse
can be *sure* of a part and keep it, while a diffusion model revises the whole at each step.
"""

# %% [markdown]
r"""
### Exercise 14.1: add noise

*Difficulty 1 of 3, about 10 minutes.*

Write it for a level $a$ given as a number: `my_noise(x, noise, a)`. The stub mixes with $a$ and $1 - a$, which seems
natural and is wrong: what happens to the variance half-way?

<details><summary>Hint</summary>

Variances of independent terms add: the *squares* of the two amounts must sum to 1.

</details>
"""


# %%
def my_noise(x, noise, a):
    return a * x + (1 - a) * noise  # your code


check_add_noise(my_noise)


# %% tags=["solution"]
def my_noise(x, noise, a):
    return a**0.5 * x + (1 - a) ** 0.5 * noise


check_add_noise(my_noise)

# %% [markdown]
r"""
## 4. The transformers

All three side by side, with the sizes of this notebook:
"""

# %%
diagrams.three_models(muse.config)

# %% [markdown]
r"""
The autoregressive one is a subclass of Muse's; its layers hide what comes later. Let us *see* who sees
whom: change token $i$, and mark the positions whose logits move.
"""

# %%
from minimuse.baseline_ar import CausalLayer, CausalTransformer
from minimuse.transformer import SelfAttention, Transformer

show(SelfAttention, CausalLayer)


# %%
@torch.inference_mode()
def influence(model, moved=0):
    """(N, N): how far the logits of place j (column) move when token i (row) changes."""
    torch.manual_seed(0)
    net = model(replace(sizes, grid=4, layers=2)).eval()
    memory, before = (
        net.memory(muse.encoder.encode(["a red cube"])),
        torch.zeros(1, 16, dtype=torch.long),
    )
    rows = before.repeat(16, 1).scatter(1, torch.arange(16)[:, None], 1)
    one = net(before, memory)
    return torch.stack(
        [(net(row[None].roll(moved), memory) - one).abs().amax(-1)[0] for row in rows]
    )


def draw_influence(matrices):
    """{title: (N, N)} -> gray where the logits move; the dotted line is each token's own place."""
    _, axes = plt.subplots(1, len(matrices), figsize=(7, 3.2))
    for ax, (title, moves) in zip(axes, matrices.items(), strict=True):
        ax.imshow(moves > 1e-6, cmap="gray_r", vmin=0, vmax=2)
        ax.plot([-0.5, 15.5], [-0.5, 15.5], ":", color="C1")
        ax.set(title=title, xlabel="logits at place", ylabel="token changed")
        ax.set(xticks=range(0, 16, 5), yticks=range(0, 16, 5))
        ax.grid(False)
    plt.show()


draw_influence({"masked": influence(Transformer), "ar": influence(CausalTransformer)})

# %% [markdown]
r"""
Gray is where the logits move; on the dotted line is each token's own position. Left, everything sees everything. Right, a token moves only
the logits of *later* positions, and not those of its own: position $i$ is predicted from the tokens before it. In
`CausalTransformer.forward` that is one line, which moves all tokens on by one position and puts [MASK] before the first.

### adaLN-Zero: how the DiT reads the time, and how it begins

Muse's network needs no clock: the number of [MASK]s says how far the picture is. Noise cannot be counted, so the DiT also reads
$s$. Each block turns it into a shift $\beta$, a scale $\gamma$ and a gate $g$:

$$x \leftarrow x + g(s) \cdot \text{attention}\big(\text{norm}(x)\,(1 + \gamma(s)) + \beta(s)\big),$$

and all of them are 0 at the start. The first of the *nice ideas*: every block begins as the identity.
"""

# %%
from minimuse.baseline_dit import Block, modulate, time_waves

show(modulate, time_waves, Block)

# %%
net = DiT(dit_config, z.shape[1])
words = net.memory(muse.encoder.encode(["a red cube"]))
h, c = torch.randn(1, 64, net.config.width), torch.randn(1, 1, net.config.width)
block = net.layers[0]
for gate in (0.0, 1.0):
    block.condition.bias.data.view(6, -1)[[2, 5]] = gate  # 0 is where adaLN-Zero begins
    out = block(h, c, words.keys[0], words.values[0], words.attend)
    print(
        f"gates at {gate:.0f}: the block moves its input by {(out - h).abs().mean():.3f} on average"
    )

# %% [markdown]
r"""
`benchmarks/race.py` does the same to Muse's transformer, and trains both with and without it.

## 5. Training the three

The same stage of the same engine: optimizer, learning rate, warm-up, batch. The DiT is narrower, and takes more
steps until it has had about as much arithmetic. A few hundred steps are few: you see here how the three *begin* to draw.
(From a shell: `minimuse train nano --model dit`, or `ar`, or `masked`.)
"""

# %%
from minimuse.train import train_network

show(train_dit, train_network)

# %%
models, losses = {}, {}
for name, make in BASELINES.items():
    config = make.configure(muse.config)
    torch.manual_seed(0)
    parts = make.build(config)
    steps = round(STEPS * (sizes.width / parts["base"].config.width) ** 2)
    stage = replace(
        config.stages["base"], steps=steps, warmup=max(1, steps // 10), eval_every=10**9
    )
    parts["low_tokenizer"] = muse.low_tokenizer
    if name == "dit":
        run = train_dit(parts["base"], stage, z, texts, engine=Engine(device="cpu"))
    else:
        init_from_codebook(parts["base"], muse.low_tokenizer.codebook)
        train = train_ar if name == "ar" else train_transformer
        run = train(parts["base"], stage, tokens, texts, engine=Engine(device="cpu"))
    began = time.monotonic()
    losses[name] = torch.tensor([p.metrics["loss"] for p in run])
    models[name] = make(config, parts, muse.encoder)
    print(f"{name:>7}: {steps} steps, {time.monotonic() - began:.0f} s")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
smooth = max(1, STEPS // 20)
for ax, names in zip(axes, (("masked", "ar"), ("dit",)), strict=True):
    for name in names:
        ax.plot(
            losses[name].unfold(0, smooth, 1).mean(-1),
            label=name,
            color=f"C{list(BASELINES).index(name)}",
        )
    ax.set(xlabel="step", ylim=(0, None))
    ax.legend()
axes[0].set(ylabel="nats per token asked for")
axes[1].set(ylabel="squared error of the velocity")
plt.show()

# %% [markdown]
r"""
The two plots cannot be compared: nats are not squared errors. Nor can the two curves on the left, although they have one unit:
the autoregressive model is asked for every token and sees on average half of the others; the masked one is asked for a fraction that varies, and sees
the rest. And both are measured on training scenes, which return again and again. Section 6 makes the two comparable, on scenes that
neither has seen.
"""

# %% [markdown]
r"""
### How each draws

**Muse** begins with [MASK]s and keeps the most certain tokens. **Autoregression** writes row by row; what a position has
computed is kept (a *cache*), so each step costs one position and not all of them. **Diffusion** begins with noise and takes DDIM steps:
from the predicted noise it computes the picture $\hat x_0$, then goes to the next lower level, from $a$ to $a'$, with the same two:

$$\hat x_0 = \frac{x - \sqrt{1 - a}\,\varepsilon}{\sqrt a}, \qquad x' = \sqrt{a'}\,\hat x_0 + \sqrt{1 - a'}\,\varepsilon .$$
"""

# %%
from minimuse.baseline_ar import cached
from minimuse.baseline_dit import ddim

show(ddim, cached)

# %%
PROMPT = "a large red cube"
strips = [
    film(models[name], list(models[name].steps(PROMPT, seed=0)), most=8) for name in BASELINES
]
grid(strips, [f"{name}: {PROMPT}" for name in BASELINES], columns=1, scale=1)

# %% [markdown]
r"""
Gray is [MASK]. In the DiT's strip each frame is $\hat x_0$, its prediction of the finished picture at this noise level, rounded to codes ("0 left": it has no
masks). For so simple a prompt even the first frame may look finished. But it may still change everywhere until the end; Muse's fixed tokens
may not.
"""

# %% [markdown]
r"""
### Exercise 14.2: one DDIM step

*Difficulty 2 of 3, about 25 minutes.*

`my_step(x, noise, now, then)` with levels $a$ = `now` and $a'$ = `then`. The stub forgets to put any noise back.

<details><summary>Hint</summary>

The second formula above has two terms. Its noise is the same $\varepsilon$.

</details>
"""


# %%
def my_step(x, noise, now, then):
    clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
    return then**0.5 * clean  # your code


check_ddim_step(my_step)


# %% tags=["solution"]
def my_step(x, noise, now, then):
    clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
    return then**0.5 * clean + (1 - then) ** 0.5 * noise


check_ddim_step(my_step)

# %% [markdown]
r"""
### Guidance is one formula

In all three it is $(1 + t)\,\text{cond} - t\,\text{uncond}$, applied to logits or to predicted noise: `cfg.guided` does not know which it has. The
difference in the table, "when needed" or "used", is only a habit.
"""

# %% [markdown]
r"""
## 6. Is Muse just discrete diffusion?

D3PM defines diffusion over discrete values. One of its kinds of noise is *absorbing*: each token falls into [MASK] with time and
stays there. Its variational bound, which is a squared error for Gaussian noise, is here

$$-\frac{1}{N} \log p(x) \;\le\; \mathbb{E}_{k \sim \text{uniform}\{1..N\}} \;
\big[\text{mean cross-entropy of } k \text{ masked tokens}\big].$$

That is a masked loss with a uniform $k/N$, each picture counting alike. Muse draws $r$ from its own density $p(r)$ and averages over the
hidden *tokens* of a batch, so a rate has the weight $r\,p(r)$ (notebook 4). So the *training* is a diffusion training, re-weighted.
The autoregressive model needs no bound: the chain rule gives $\log p(x)$ itself. Now both are in nats per token.
"""

# %%
from minimuse.train_log import likelihood_bound

show(likelihood_bound)

# %%
test = SceneDataset(16 if FAST else 60, side, split="test", seed=1, fractions=(1, 0, 0))
seen = tokenize_images(
    muse.low_tokenizer, area_downsample(test.images(), side // low_side)
)  # held-out pictures
said = muse.encoder.encode([test.captions(i, 1)[0] for i in range(len(test))])
n = seen.shape[1]


@torch.inference_mode()
def by_count(net):
    """(k / N, mean cross-entropy with k masked) for counts from 1 to N, a fresh mask for each picture."""
    memory, found = net.memory(said), []
    for k in range(1, n + 1, 4 if FAST else 2):
        share_k, draw = torch.full((len(seen),), k / n), torch.Generator().manual_seed(k)
        masked = random_mask(seen, share_k, draw)
        logp = net(seen.masked_fill(masked, net.mask_id), memory).log_softmax(-1)
        cost = -(logp.gather(-1, seen[..., None])[..., 0] * masked).sum() / masked.sum()
        found.append((k / n, cost.item()))
    return torch.tensor(found)


@torch.inference_mode()
def exact(net, x, context):
    """-log p / N of an autoregressive model, by the chain rule."""
    logp = net(x, net.memory(context)).log_softmax(-1)
    return -logp.gather(-1, x[..., None]).mean().item()


curves = {
    "masked, trained here": by_count(models["masked"].base),
    f"{CHECKPOINT}'s base": by_count(muse.base),
}
nll = exact(models["ar"].base, seen, said)
figure, ax = plt.subplots(figsize=(7, 3.4))
for i, (name, curve) in enumerate(curves.items()):
    ax.plot(
        curve[:, 0], curve[:, 1], color=f"C{i}", label=f"{name}: bound {curve[:, 1].mean():.3f}"
    )
    ax.axhline(curve[:, 1].mean(), color=f"C{i}", ls=":")
ax.axhline(nll, color="C2", ls="--", label=f"ar, trained here: exactly {nll:.3f}")
ax.set(xlabel="fraction masked, k / N", ylabel="nats per masked token", ylim=(0, None))
ax.legend(fontsize=9)
plt.show()
memory = muse.base.memory(said)
with torch.inference_mode():
    seeds = [torch.Generator().manual_seed(i) for i in range(DRAWS)]
    shipped = lambda x: muse.base(x, memory)  # noqa: E731
    bounds = [likelihood_bound(shipped, seen, muse.base.mask_id, seed) for seed in seeds]
    bound = torch.stack(bounds).mean()
print(
    f"likelihood_bound of {CHECKPOINT}'s base, {DRAWS} draws a picture: {bound:.3f} nats per token"
)
few = slice(0, len(seen))
trained_on = exact(models["ar"].base, tokens[few], muse.encoder.encode(captions[few]))
print(
    f"ar: {nll:.3f} nats per token of held-out scenes, {trained_on:.3f} of scenes it was trained on"
)

# %% [markdown]
r"""
A curve is the cost at each count; the dotted line, its mean over uniform counts, is the bound. The package's function estimates the
same with one random count per picture. The shipped model was trained for longer, on more scenes.

Two things to keep apart. The bound is one over all *orders* in which tokens may be revealed, one at a time: a masked model is asked for every
order, an autoregressive one for a single order, and may specialize in it. But the latter is asked the same questions of a scene each time,
the former new ones with each mask; so it is slower to learn scenes by heart. The last printed line says how far that has
gone.
"""

# %% [markdown]
r"""
**Predict, then run.** The *sampler* of absorbing diffusion reveals tokens at random positions, each drawn from its probabilities as
they are. Muse reveals the most certain tokens first, at a lower temperature, and is guided. Let both take 16 steps with the shipped base model. Which of these makes
the larger difference: guidance, or all the rest?
"""

# %%
from minimuse.eval_metrics import proportion_interval
from minimuse.eval_networks import Detector
from minimuse.eval_prompts import matches, parse_prompt

detector, base = (
    Detector.from_pretrained(),
    LowRes(
        LowRes.configure(muse.config),
        torch.nn.ModuleDict({k: muse.parts[k] for k in ("low_tokenizer", "base")}),
        muse.encoder,
    ),
)
prompts = [test.captions(i % len(test), 1)[0] for i in range(PICTURES)]


def right(drawn):
    """Pictures -> which of them have all that their prompt names."""
    return [
        matches(r, parse_prompt(p)).right
        for r, p in zip(detector.detect(drawn), prompts, strict=True)
    ]


ancestral = {"order": "random", "schedule": "linear", "sampling_temperature": 1.0, "guidance": 0.0}
settings = {
    "D3PM's sampler": ancestral,
    "... with guidance": {k: v for k, v in ancestral.items() if k != "guidance"},
    "Muse's": {},
}
for name, how in settings.items():
    drawn = base.generate(prompts, seed=0, steps=16, **how)
    print(f"{name:>18}: {proportion_interval(torch.tensor(right(drawn)))}")

# %% [markdown]
r"""
Guidance, which any diffusion model can have, too. What order, schedule and temperature add is smaller than the intervals of so few pictures. So the answer to the
table's "looks like just a discrete diffusion model" is: in training yes, up to a weight; in sampling Muse has another rule, which only a discrete space
allows: it ranks tokens by its confidence and keeps the best. This run cannot show that the rule is better; notebook 7 compares orders.
"""

# %% [markdown]
r"""
## 7. The race

The prompts ask for one object, and the models had a few minutes of training. Points are labelled with their sampling steps, bars are 95% intervals. In the
fast setting nothing has learned to draw, and only the seconds mean something.
"""

# %%
from IPython.display import Markdown, display

from minimuse.eval_metrics import frechet_interval, mean_interval

points = {"masked": (1, 4, 16), "dit": (4, 16, 50), "ar": (muse.config.base.tokens,)}
truth = detector.features(area_downsample(test.images(), side // low_side))
by_right, by_distance = {name: {} for name in points}, {name: {} for name in points}
for name, t in [(name, t) for name, counts in points.items() for t in counts]:
    how = {} if name == "ar" else {"steps": t}
    models[name].generate(prompts[:2], seed=0, **how)  # the first call is slow
    drawn, seconds = [], []
    for i in range(0, PICTURES, max(2, PICTURES // 4)):
        few, began = prompts[i : i + max(2, PICTURES // 4)], time.perf_counter()
        drawn += models[name].generate(few, seed=100 + i, **how)
        seconds.append((time.perf_counter() - began) / len(few))
    by_right[name][str(t)] = mean_interval(seconds), proportion_interval(torch.tensor(right(drawn)))
    by_distance[name][str(t)] = (
        mean_interval(seconds),
        frechet_interval(truth, detector.features(drawn)),
    )
display(tradeoff(by_right, "seconds per picture", "everything right", log_x=True))
tradeoff(by_distance, "seconds per picture", "Frechet distance", lower=(True, True), log_x=True)

# %% [markdown]
r"""
In this race the autoregressive model does best on both plots: with so few tokens it is quick, and it learns most from so little training. What holds
on every machine: Muse's and the DiT's time grows with their steps, each of which computes all positions; the
autoregressive model computes each position once, but in $N$ steps, one after the other. With so few tokens, on a CPU, that need not be a disadvantage. On an
accelerator it is one: there a step of one position costs hardly less than one of all positions (notebook 12, section 7), and $N$ grows
with the picture, while Muse's steps do not.
"""

# %% [markdown]
r"""
**Predict, then run.** The autoregressive model draws $N$ tokens in $N$ steps, with a cache. What happens to its time if the
cache is left out: each step computes all positions again?
"""

# %%
from minimuse.cfg import guided, null_text
from minimuse.sampler import decode

net, few = models["ar"].base, muse.encoder.encode(prompts[:4])
with torch.inference_mode():
    memories = net.memory(few), net.memory(null_text(few))
    blank, drawn = torch.full((4, n), net.mask_id), {}
    for name, start in (("without", guided), ("with", cached)):
        how = {
            "mask_id": net.mask_id,
            "steps": n,
            "order": "raster",
            "generator": torch.Generator().manual_seed(0),
        }
        began = time.perf_counter()
        *_, last = decode(start(net, *memories, 1.0), blank, **how)
        drawn[name] = last.tokens
        print(f"{name:>8} a cache: {time.perf_counter() - began:.2f} s")
print("the same tokens:", drawn["with"].equal(drawn["without"]))

# %% [markdown]
r"""
The same tokens for a fraction of the products. Muse cannot keep what it computed for the picture: when a token is revealed, all other positions look at
it, and change. Its way to save is to take fewer steps. (What comes from the text is computed once, in all three.)

## 8. What the full race found

`python benchmarks/race.py` trains all three for as much arithmetic each, tunes their guidance alike, and draws the same prompts and
seeds. It also tries the nice ideas: identity blocks, one stage or two, rising or constant guidance. It takes about an hour on two cores;
this is what it found:
"""

# %%
from PIL import Image

found = Path(minimuse.__file__).parents[1] / "benchmarks" / "race.md"
if found.is_file():
    display(Image.open(found.with_suffix(".png")))
    display(Markdown(found.read_text(encoding="utf-8").split("\n", 1)[1]))
else:
    print("Its tables lie in a clone's folder `benchmarks`, which is not here.")

# %% [markdown]
r"""
At this scale Muse does not win. All three draw what is asked; the DiT is a little ahead in as many steps, and 64 tokens are few
for an autoregressive model with a cache. (It needed more scenes than the others: it learned 5,000 by heart.) But the paper's parallel decoding works: the masked
model goes from 26% to 91% between 1 step and 4, and one token per step, 64 steps, is no better than 16.
Of the nice ideas two stages help clearly; identity blocks and rising guidance do not help here. This says nothing about a larger
world.
"""

# %% [markdown]
r"""
### Rising guidance

One of the nice ideas needs no training: guidance that rises from 0 to $2t$, or $t$ in all steps, in the models
trained above. Do the intervals overlap? Then 60 pictures do not decide it.
"""

# %%
for name in ("masked", "dit"):
    for told, how in (("constant, 2", 2.0), ("rising, 0 to 4", (0.0, 4.0))):
        drawn = models[name].generate(prompts, seed=0, steps=16, guidance=how)
        print(f"{name:>7}, {told:15} {proportion_interval(torch.tensor(right(drawn)))}")

# %% [markdown]
r"""
## 9. The table again, in code

For each row, here is the line of code that shows it. The cell looks the lines up in the package, and fails if one is gone.
"""

# %%
from minimuse.cfg import rising
from minimuse.editing import resample
from minimuse.transformer import Layer
from minimuse.vqgan import VQGAN, VectorQuantizer


def line(thing, words):
    """The first line of a function's or class's source with these words, and where it stands."""
    source, first = inspect.getsourcelines(inspect.unwrap(thing))
    at = next(i for i, text in enumerate(source) if words in text)
    return f"`{source[at].strip()}` <br>{Path(inspect.getsourcefile(inspect.unwrap(thing))).name}, {first + at}"


rows = [
    ("what it is", (NoiseLoss.forward, "add_noise("), (MaskedLoss.forward, "masked_fill")),
    ("latent space", (latents, "vqgan.encoder("), (VectorQuantizer.nearest, "argmin(1)")),
    ("image tokens", (DiT.forward, "pixel_unshuffle"), (Transformer.forward, "self.embed(tokens)")),
    ("architecture", (DiT, "nn.ModuleList(Block"), (build, '"superres": SuperRes')),
    ("transformer", (Block, "self.attention(modulate"), (Layer, "self.attention(self.norm1")),
    ("it predicts", (DiT, "self.head = "), (Transformer, "self.head = ")),
    ("a picture begins as", (Diffusion.decode_base, "gaussians("), (Muse, "torch.full(")),
    ("guidance", (Diffusion.decode_base, "guided("), (Muse, "self.guided(")),
    (
        "nice ideas",
        (DiT, "nn.init.zeros_(p)"),
        (Muse.decode_superres, '_stage("superres"'),
    ),
    ("", None, (VQGAN.grow_decoder, "freeze_tokens()")),
    ("", None, (rising, "lambda u")),
    ("", None, (resample, "random_mask")),
]
table = ["|  | DiT | Muse |", "|---|---|---|"]
for name, *pair in rows:
    table.append(
        f"| {name} | " + " | ".join(line(*which) if which else "" for which in pair) + " |"
    )
Markdown("\n".join(table))

# %% [markdown]
r"""
## What failure looks like

**Latents that were not standardized.** Noise of variance 1 on latents of another scale is another schedule. Where they are large, the
picture survives nearly to the last step: the network never learns to begin from noise, which is what it must do when it draws.
"""

# %%
figure, ax = plt.subplots(figsize=(7, 3))
scales = {"standardized": 1.0, "raw latents": float(z.std()), "ten times too large": 10.0}
for (name, scale), dash in zip(scales.items(), ("-", "--", ":"), strict=True):
    ax.plot(LEVELS * scale**2 / (LEVELS * scale**2 + 1 - LEVELS), dash, label=name)
ax.set(xlabel="step s", ylabel="fraction of the variance\nthat is picture")
ax.legend(fontsize=9)
plt.show()
print(f"standard deviation of the raw latents: {z.std():.2f}")

# %% [markdown]
r"""
The raw latents of *this* tokenizer happen to have a standard deviation near 1, so their line lies on the standardized one, and the mistake would go
unnoticed. Another tokenizer may give the dotted line.

**An autoregressive model that sees its own answer.** Forget to move the tokens on by one position, and each position can copy the token that it is
asked for: the loss falls towards 0, and the pictures are garbage. You need not train
to find out. Look at who sees whom, as in section 4. The diagonal shows it: no token may move the logits of its own position. (In the right picture the
first token is seen by nobody; that comes from how we move them back.)
"""

# %%
draw_influence(
    {
        "as it should be": influence(CausalTransformer),
        "not moved on by one position": influence(CausalTransformer, -1),
    }
)

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

Which of the three would gain most from four times the training, and which would lose most on a grid of twice the side? Write down your predictions and the figures or tables of
this notebook on which they rest. Then test one, with intervals.
"""

# %% [markdown]
r"""
## Summary

Muse, DiT and an autoregressive transformer learn to repair damaged pictures; the damage is masks, noise, or hiding
what comes later. DiT works on continuous latents, must read the time, and revises the whole picture at each step. Muse works on
tokens, reads the time from its masks, and keeps what it is sure of. For both a few steps suffice. Muse's training is that of
absorbing diffusion with another weight, and bounds the likelihood; its sampler follows another rule. Guidance, cross-attention to the text and the tokenizer
are the same for all.
"""

# %% [markdown]
r"""
## Further reading

- Peebles and Xie 2022, *Scalable diffusion models with transformers* (DiT), [arXiv 2212.09748](https://arxiv.org/abs/2212.09748); text by cross-attention: PixArt, [arXiv 2310.00426](https://arxiv.org/abs/2310.00426).
- Ho et al. 2020 (DDPM), [arXiv 2006.11239](https://arxiv.org/abs/2006.11239); Song et al. 2020 (DDIM), [arXiv 2010.02502](https://arxiv.org/abs/2010.02502); the velocity: Salimans and Ho 2022, [arXiv 2202.00512](https://arxiv.org/abs/2202.00512); cosine levels: Nichol and Dhariwal 2021, [arXiv 2102.09672](https://arxiv.org/abs/2102.09672); where sampling should begin: [arXiv 2305.08891](https://arxiv.org/abs/2305.08891).
- Austin et al. 2021 (D3PM), [arXiv 2107.03006](https://arxiv.org/abs/2107.03006); the same link for language: [arXiv 2406.07524](https://arxiv.org/abs/2406.07524).
- Yu et al. 2022 (Parti), [arXiv 2206.10789](https://arxiv.org/abs/2206.10789).
- The schedule of masked decoding, measured exactly: [13. The schedule lab](13_schedule_lab.ipynb).
"""
