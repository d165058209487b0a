# %% [markdown]
r"""
# 5. The base transformer: what stands behind the gray?

*The network that fills in hidden tokens while it reads your sentence: its parts, where it looks, and how it learns, from nothing, while you watch.*

|  |  |
|---|---|
| **Paper** | [Muse](https://arxiv.org/abs/2301.00704) 2.3, A.1 |
| **You will learn** | how tokens, positions and text come together · why nothing is causal here · what attention sees, and what that proves · how to read a masked loss, by the fraction that is hidden · how a leak looks |
| **Before this** | [3. VQGAN](03_vqgan.ipynb) and [4. Masking](04_masking.ipynb); matrix products, softmax, gradient descent; symbols are in the [glossary](glossary.md) |
| **Takes** | @takes@; about 105 minutes of your time |
| **Files** | [`transformer.py`](../minimuse/transformer.py), [`train.py`](../minimuse/train.py), [`train_log.py`](../minimuse/train_log.py) |
"""

# %% knobs
import os

import diagrams
import matplotlib.pyplot as plt
import torch
from checks import check_attention, check_unigram
from view import film_strip, show, style

from minimuse import Muse
from minimuse.plots import grid, mask_overlay

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: fewer pictures and steps
CHECKPOINT = "nano"  # a shipped name or a folder
SCENES, STEPS, EVERY = (
    (96, 8, 4) if FAST else (2500, 1200, 100)
)  # to train on; steps; steps between two looks
LEAK = 4 if FAST else 150  # steps of the broken training at the end
style()

# %% [markdown]
r"""
Notebook 4 hid a random part of a token grid, and asked for what was there. The **base transformer** answers. It gets the grid, with `[MASK]` where it is hidden, and the text; the answer is a distribution over the
codebook for each position:

$$p_\theta(x_i \mid x_{\text{visible}}, \text{text}), \qquad i = 1 \dots N .$$

All $N$ answers come out of one pass. Let us look at a trained one first, then inside, then train one ourselves.
"""

# %%
from minimuse.data_scenes import Scene, Thing, render
from minimuse.masking import random_mask
from minimuse.utils import area_downsample, to_pil

muse = Muse.from_pretrained(CHECKPOINT, device="cpu")
base, g = muse.base, muse.config.base.grid
N, V = muse.config.base.tokens, muse.config.base.codebook_size
SIZE = muse.config.low_tokenizer.image_size
SIDE = 96 // SIZE  # pictures of sheets are drawn about 96 pixels wide

scene = Scene(
    (Thing("red", "cube", x=-0.85), Thing("blue", "sphere", size="small", x=1.05, depth=-0.3))
)
CAPTION = "a red cube left of a small blue sphere"
with torch.inference_mode():
    high = muse.config.high_tokenizer.image_size
    pixels = area_downsample(render([scene], high), high // SIZE)
    x = muse.low_tokenizer.encode(pixels)  # (1, N)
print(f"{SIZE} px -> tokens", tuple(x.shape), f"of {V} codes; [MASK] is {base.mask_id}")


def memory_of(*prompts):
    return base.memory(muse.encoder.encode(list(prompts)))


def best_guess(tokens, memory):
    """tokens (B, N) with [MASK] -> pictures, each hidden token at its likeliest code."""
    with torch.inference_mode():
        logits = base(tokens, memory)
        return to_pil(
            muse.low_tokenizer.decode(
                torch.where(tokens == base.mask_id, logits.argmax(-1), tokens)
            )
        )


# %% [markdown]
r"""
**Predict, then run.** We hide 70% of this scene, and lie about it: the text says "a green cylinder". Will the model
draw what it *sees*, what the *text* says, or something between? And what does it do with the same lie if nothing is
visible?
"""

# %%
hidden = random_mask(x, torch.tensor([0.7]), torch.Generator().manual_seed(2))
seen, blank = x.masked_fill(hidden, base.mask_id), torch.full_like(x, base.mask_id)
lie = "a green cylinder"
pictures = [
    to_pil(muse.low_tokenizer.decode(x))[0],
    mask_overlay(to_pil(muse.low_tokenizer.decode(x))[0], hidden[0]),
]
pictures += [
    best_guess(tokens, memory_of(text))[0] for tokens in (seen, blank) for text in (CAPTION, lie)
]
grid(
    pictures,
    [
        "all tokens",
        "what it sees",
        "sees 30%, true text",
        "sees 30%, the lie",
        "sees nothing, true text",
        "sees nothing, the lie",
    ],
    columns=6,
    scale=SIDE + 1,
)

# %% [markdown]
r"""
Something between. The visible tokens keep the large object where it was and as large as it was; the text repaints what is hidden, and the
sphere, which the lie does not name, fades. Both are evidence, and the model weighs them position by position. Where nothing is seen,
only the text decides. (The two pictures on the right are bad, for a reason that notebook 7 is about: the likeliest code of each
position *by itself* does not make a picture.)
"""

# %% [markdown]
r"""
## 1. Tokens get positions

A transformer treats its input as a *set*. So each token also gets its position: the vector of code $x_i$, plus one
for the row, plus one for the column of the grid,

$$e_i = E[x_i] + R[\text{row}(i)] + C[\text{column}(i)] \in \mathbb{R}^D .$$

$E$ has one row more than the codebook has codes: `[MASK]` is a token like any other.
"""

# %%
from minimuse.transformer import TokenEmbedding, sinusoids

show(TokenEmbedding)

# %%
with torch.inference_mode():
    e = base.embed(x)
print("tokens (B, N):", tuple(x.shape), "-> embedded (B, N, D):", tuple(e.shape))
print(
    "codes:",
    tuple(base.embed.codes.weight.shape),
    "rows:",
    tuple(base.embed.rows.shape),
    "columns:",
    tuple(base.embed.columns.shape),
)

# %% [markdown]
r"""
Positions begin as waves of rising frequency (`sinusoids`), and are trained like any other weight. Do trained positions still
know which are near each other? We take one position, and compare its vector with those of all positions.
"""

# %%
fresh = TokenEmbedding(V, g, muse.config.base.width)
figure, axes = plt.subplots(1, 3, figsize=(11, 2.8), width_ratios=[1.5, 1, 1])
axes[0].imshow(
    sinusoids(g, muse.config.base.width // 2), aspect="auto", cmap="RdBu", vmin=-0.8, vmax=0.8
)
axes[0].set(title="the waves it begins with", xlabel="channel", ylabel="row (or column)")
for ax, embed, title in ((axes[1], fresh, "at the start"), (axes[2], base.embed, "after training")):
    with torch.inference_mode():
        places = (embed.rows + embed.columns).flatten(0, 1)
        alike = torch.cosine_similarity(places[g * (g // 2 - 1) + g // 4][None], places, dim=1)
    shown = ax.imshow(alike.view(g, g), vmin=-1, vmax=1, cmap="RdBu")
    ax.set(title=title, xlabel="column", ylabel="row")
figure.colorbar(shown, ax=axes[2], label="cosine")
for ax in axes:
    ax.grid(False)
plt.show()

# %% [markdown]
r"""
Blue is similar, and the darkest square is the position itself. The comparison makes a cross, since a position shares its row vector
with its row and its column vector with its column; it is most similar to itself and its neighbours. Training keeps that.
"""

# %% [markdown]
r"""
## 2. Tokens look at each other

In **self-attention** every token asks a question $q$, offers a key $k$ and a value $v$, each a linear map of its vector,
and takes a weighted mean of the values:

$$a_{ij} = \operatorname{softmax}_j\!\left(\frac{q_i \cdot k_j}{\sqrt d}\right), \qquad y_i = \sum_j a_{ij}\, v_j .$$

$d$ is the length of $q$ and $k$; without $\sqrt d$ the softmax would saturate for long vectors. It happens in several
*heads* side by side, each with $d = D / \text{heads}$ channels of its own.
"""

# %%
from minimuse.transformer import SelfAttention

show(SelfAttention)

# %% [markdown]
r"""
**Predict, then run.** In a language model a word sees only the words before it. We change *one* visible token in the
bottom right corner of the grid, the last one that a raster scan would reach. For how many of the hidden positions does
the prediction change at all?
"""

# %%
other = seen.clone()
other[0, -1] = x[0, g // 2]  # a piece of the sky
seen_corner = seen.clone()
seen_corner[0, -1] = x[0, -1]
with torch.inference_mode():
    memory = memory_of(CAPTION)
    before, after = (base(t, memory).log_softmax(-1) for t in (seen_corner, other))
change = (before - after).abs().amax(-1)[0]  # (N,) the largest change of a log-probability
masked = seen_corner[0] == base.mask_id
print(f"predictions that changed: {int((change[masked] > 1e-5).sum())} of {int(masked.sum())}")
figure, axes = plt.subplots(1, 2, figsize=(8, 3))
axes[0].imshow(mask_overlay(to_pil(muse.low_tokenizer.decode(x))[0], masked))
axes[0].set_title("hidden: gray")
shown = axes[1].imshow(change.masked_fill(~masked, float("nan")).view(g, g).clamp(min=1e-5).log10())
axes[1].plot(g - 1, g - 1, "x", color="red", ms=12, mew=3)
axes[1].set_title("change of each prediction")
figure.colorbar(shown, ax=axes[1], label="log10 of the change")
for ax in axes:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
plt.show()

# %% [markdown]
r"""
For all of them: nothing here is causal. There is no order of tokens, so every hidden position may use every visible one, on
all sides. The predictions next to the cross change most, but some far away change nearly as much. An autoregressive model
cannot do that; so this one can repaint a hole in the middle.
"""

# %% [markdown]
r"""
## 3. Tokens read the text

**Cross-attention** is the same formula, but keys and values come from the *memory*: the vectors of the text, projected
to the width $D$. In words, the query of a position asks: what does the text say about me? Padding is not attended
to, and the text is never masked.
"""

# %%
from minimuse.transformer import CrossAttention, KeyValue, Memory, Transformer

show(CrossAttention, KeyValue, Memory, Transformer.memory)

# %%
context = muse.encoder.encode([CAPTION, "a cube"])
memory = base.memory(context)
print(
    "text     embeds (B, L, D_lm):",
    tuple(context.embeds.shape),
    "- mask:",
    context.mask.sum(1).tolist(),
    "pieces",
)
print(
    "memory   keys, one per layer (B, heads, M, d):",
    len(memory.keys),
    "x",
    tuple(memory.keys[0].shape),
)
print("         attend (B, 1, 1, M), the second prompt:", memory.attend[1, 0, 0].int().tolist())

# %% [markdown]
r"""
`memory` is computed once for a picture, and used in all steps of its decode: the text does not change while tokens do.
"""

# %% [markdown]
r"""
### Exercise 5.1: attention

*Difficulty 2 of 3, about 25 minutes.*

Write it for several heads, with padding: `attend` is `True` where the memory may be looked at. The stub has the
softmax, and forgets two things.

<details><summary>Hint</summary>

The sum of $d$ products of numbers of size 1 has a size of about $\sqrt d$. And which score has weight exactly 0 after a softmax?
`masked_fill` writes where its mask is `True`, and `attend` says the opposite.

</details>
"""


# %%
def my_attention(q, k, v, attend):
    scores = q @ k.transpose(-1, -2)  # (B, H, N, M)   your code: scale them, and hide the padding
    return scores.softmax(-1) @ v  # (B, H, N, d)


check_attention(my_attention)


# %% tags=["solution"]
def my_attention(q, k, v, attend):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, N, M)
    scores = scores.masked_fill(~attend, -float("inf"))
    return scores.softmax(-1) @ v  # (B, H, N, d)


check_attention(my_attention)

# %% [markdown]
r"""
## 4. The whole network

A **layer** is three small steps, each *added* to what is there: look at the other tokens, read the text, process the result
(an MLP: two linear layers with a nonlinearity between, applied to each token separately). Before each step the vectors are normalized. Layers
are stacked; a last linear map,
the *head*, turns each vector into $V$ logits.
"""

# %%
diagrams.layer(muse.config)

# %%
from minimuse.transformer import Layer

show(Layer.forward, Transformer.forward)

# %%
sizes = {
    "token embedding": base.embed,
    "text projection": base.text,
    "self-attention": [layer.attention for layer in base.layers],
    "cross-attention": [layer.cross for layer in base.layers],
    "MLP": [layer.mlp for layer in base.layers],
    "head": base.head,
}


def count(part):
    modules = torch.nn.ModuleList(part if isinstance(part, list) else [part])
    return sum(p.numel() for p in modules.parameters())


figure, ax = plt.subplots(figsize=(7, 2.6))
ax.barh(list(sizes), [count(m) / 1e6 for m in sizes.values()])
ax.invert_yaxis()
ax.set(
    xlabel=f"million parameters, of {count([base]) / 1e6:.2f} in {len(base.layers)} layers of width {base.config.width}"
)
plt.show()

# %% [markdown]
r"""
Nearly all parameters are in the layers, and half of those in the MLPs. The paper's 3B model has the same parts: 48 layers of
width 2048.
"""

# %% [markdown]
r"""
## 5. What attention sees

Weights of attention can be looked at. Hooks on the layers catch the questions and keys as they pass by; the softmax is
ours. Half of the scene's tokens are hidden. First, the text: each picture below is one piece of it, and bright is where
the tokens look at that piece (the mean over layers and heads).
"""


# %%
def attention_maps(model, tokens, memory):
    """tokens (1, N) -> weights among the tokens (layers, H, N, N), and in the memory (layers, H, N, M)."""
    among, reading, hooks, heads = [], [], [], model.config.heads

    def weights(q, k, attend=None):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return (scores if attend is None else scores.masked_fill(~attend, -1e9)).softmax(-1)[0]

    def self_hook(module, args, out):
        q, k, _ = out.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        among.append(weights(q, k))

    for layer, keys in zip(model.layers, memory.keys, strict=True):

        def cross_hook(module, args, out, keys=keys):
            reading.append(
                weights(out.unflatten(-1, (heads, -1)).transpose(1, 2), keys, memory.attend)
            )

        hooks += [
            layer.attention.qkv.register_forward_hook(self_hook),
            layer.cross.q.register_forward_hook(cross_hook),
        ]
    with torch.inference_mode():
        model(tokens, memory)
    for hook in hooks:
        hook.remove()
    return torch.stack(among), torch.stack(reading)


half = random_mask(x, torch.tensor([0.5]), torch.Generator().manual_seed(4))
half_seen = x.masked_fill(half, base.mask_id)
among, reading = attention_maps(base, half_seen, memory_of(CAPTION))
print(
    "among the tokens (layers, heads, N, N):",
    tuple(among.shape),
    "- in the text (layers, heads, N, M):",
    tuple(reading.shape),
)
pieces = ["[begin]", *CAPTION.split(), "[end]"]
if len(pieces) != reading.shape[-1]:  # a language model that cuts words otherwise
    pieces = [f"piece {i + 1}" for i in range(reading.shape[-1])]
figure, axes = plt.subplots(1, len(pieces) + 1, figsize=(12, 1.7))
axes[0].imshow(mask_overlay(to_pil(muse.low_tokenizer.decode(x))[0], half[0]))
for ax, piece, shown in zip(axes[1:], pieces, reading.mean((0, 1)).T, strict=True):
    ax.imshow(shown.view(g, g), cmap="magma", vmin=0, vmax=reading.mean((0, 1)).max())
    ax.set_title(f"{piece}\n{shown.mean():.0%}", fontsize=9)
for ax in axes:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
plt.show()

# %% [markdown]
r"""
The number is the piece's fraction of all attention. It is not a map of "where is the cube": the vector of each piece comes
from a language model that has read the whole sentence, so the vector of *sphere* may also say small and blue, and even those of the
marks at the beginning and the end hold something of the whole sentence. A bright word is read often; other words may say the same.

So we do an experiment: we swap one word, and see which predictions change (the KL divergence, in nats).
"""

# %%
swaps = {"red": "yellow", "cube": "cylinder", "left": "right", "blue": "green", "sphere": "cube"}
changes = {}
with torch.inference_mode():
    for rate in (0.85, 1.0):
        hidden = random_mask(x, torch.tensor([rate]), torch.Generator().manual_seed(6))
        tokens = x.masked_fill(hidden, base.mask_id)
        own = base(tokens, memory_of(CAPTION)).log_softmax(-1)
        for old, new in swaps.items():
            swapped = base(tokens, memory_of(CAPTION.replace(old, new, 1))).log_softmax(-1)
            nats = (own.exp() * (own - swapped)).sum(-1)[0]  # (N,)
            changes[rate, old] = nats.masked_fill(~hidden[0], float("nan"))
top = max(nats.nan_to_num().max() for nats in changes.values())
figure, axes = plt.subplots(2, len(swaps), figsize=(10, 4.2))
for ax, ((_, old), nats) in zip(axes.flat, changes.items(), strict=True):
    shown = ax.imshow(nats.view(g, g), cmap="viridis", vmin=0, vmax=top)
    ax.set_title(f"{old} to {swaps[old]}: {nats.nanmean():.2f}", fontsize=10)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
for ax, label in zip(axes[:, 0], ("15% is visible", "nothing is visible"), strict=True):
    ax.set_ylabel(label)
figure.colorbar(shown, ax=axes, label="nats", shrink=0.8)
plt.show()

# %% [markdown]
r"""
White positions are visible; the number is the mean over the hidden ones. In the top row a colour moves predictions most where its
object is. In the bottom row nothing says where that is, so it moves many positions a little. And a column that stays dark in both
rows? Either the word shows only in how tokens fit *together*, as a shape does, while each prediction is about one token by itself,
averaged over all positions where the object may stand. Or the model has not learned to read it: small ones have trouble
with *left* and *right*. From outside, the two look the same.

Now the tokens among themselves: one position on the right side of the cube (the cross), and where each head of each layer
looks from there.
"""

# %%
place = g * (g // 2) + g // 2 - 1
heads = base.config.heads
figure, axes = plt.subplots(
    len(base.layers), heads, figsize=(1.35 * heads, 1.4 * len(base.layers)), squeeze=False
)
for i, row in enumerate(axes):
    for j, ax in enumerate(row):
        ax.imshow(among[i, j, place].view(g, g), cmap="magma")
        ax.plot(place % g, place // g, "+", color="cyan", ms=9, mew=2)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    row[0].set_ylabel(f"layer {i + 1}")
for j, ax in enumerate(axes[0]):
    ax.set_title(f"head {j + 1}", fontsize=10)
plt.show()

# %% [markdown]
r"""
Each picture has a scale of its own. The heads differ: some look at near positions, some at far ones, some at much of the picture.
No rule assigns them this work; training did.
"""

# %% [markdown]
r"""
## 6. Before the first step

Now we train one. It has nano's size, and learns the tokens of the tokenizer above. Two numbers say what its loss can
be compared with.

**Knowing nothing** costs $\ln V$: every code is as likely. **Knowing how common each code is**, and nothing of the
picture, costs the entropy of the tokens' histogram, the *unigram entropy*, with $p(v)$ the fraction of tokens that are code $v$:

$$H = -\sum_{v} p(v) \ln p(v) .$$
"""

# %% [markdown]
r"""
### Exercise 5.2: unigram entropy

*Difficulty 1 of 3, about 15 minutes.*

Write it, in nats, for tokens $(n, N)$ of $n$ pictures. Codes that never occur must do no harm. The stub answers with
the entropy that *equally common* codes would have.

<details><summary>Hint</summary>

`torch.bincount` counts; give it `minlength`. Then look at a code that never occurs: what does a computer make of $0 \cdot \ln 0$, and what
should it be? `torch.special` may help.

</details>
"""


# %%
def my_unigram(tokens, codebook_size):
    return float(torch.tensor(float(codebook_size)).log())  # your code: count them first


check_unigram(my_unigram)


# %% tags=["solution"]
def my_unigram(tokens, codebook_size):
    p = torch.bincount(tokens.flatten(), minlength=codebook_size) / tokens.numel()
    return torch.special.entr(p).sum().item()  # entr(p) = -p log p, and 0 where p = 0


check_unigram(my_unigram)

# %% [markdown]
r"""
The data: rendered scenes, their tokens, and two captions each as vectors. All is computed once. The test scenes are
never trained on.
"""

# %%
from minimuse.config import preset
from minimuse.data_sources import SceneDataset
from minimuse.train_log import unigram_entropy, validate
from minimuse.utils import to_float


class Captions(list):
    """For each picture its captions, each as vectors (L, D_lm); `pick` chooses one by a number in [0, 1)."""

    def pick(self, at, u):
        return [self[i][int(v * len(self[i]))] for i, v in zip(at.tolist(), u, strict=True)]


def prepare(data):
    """Scenes -> pictures (n, 3, H, W), their tokens (n, N), their captions as vectors."""
    images, texts = data.images(), Captions()
    with torch.inference_mode():
        tokens = [muse.low_tokenizer.encode(to_float(part)) for part in images.split(250)]
    for start in range(0, len(data), 100):
        told = [data.captions(i) for i in range(start, min(start + 100, len(data)))]
        context = muse.encoder.encode([text for captions in told for text in captions])
        rows = zip(context.embeds, context.mask, strict=True)
        rows = iter([embeds[mask] for embeds, mask in rows])
        texts += [[next(rows) for _ in captions] for captions in told]
    return images, torch.cat(tokens), texts


fractions = preset("nano").fractions  # of scenes with 1, 2 and 3 things
train_set = SceneDataset(SCENES, SIZE, fractions=fractions)
images, tokens, texts = prepare(train_set)
_, held_tokens, held_texts = prepare(SceneDataset(64, SIZE, split="test", fractions=fractions))
print(
    "to learn from: tokens",
    tuple(tokens.shape),
    "and",
    sum(map(len, texts)),
    "captions; held out:",
    tuple(held_tokens.shape),
)
grid(images[:8], [train_set.captions(i)[0] for i in range(8)], columns=8, scale=SIDE)

# %% [markdown]
r"""
The student begins with one piece of knowledge. Many codes of a codebook look alike, and codes that look alike have
near vectors in it. `init_from_codebook` makes the embeddings of similar codes similar before the first step (random features of
their vectors), so what is learned of one code holds for similar ones: right, near codes have a cosine near 1. The paper is silent about
this; it is for short trainings. Each dot below is a pair of codes.
"""

# %%
from dataclasses import replace

from minimuse.train_engine import init_from_codebook, random_features

torch.manual_seed(0)
sizes = {"codebook_size": V, "grid": g, "text_width": muse.config.base.text_width}
student = Transformer(replace(preset("nano").base, **sizes))
codebook = muse.low_tokenizer.codebook
some = torch.randint(V * V, (1500,), generator=torch.Generator().manual_seed(0))  # pairs of codes
figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
for ax, title in zip(axes, ("fresh embeddings", "after init_from_codebook"), strict=True):
    if title == "after init_from_codebook":
        init_from_codebook(student, codebook)
    unit = torch.nn.functional.normalize(student.embed.codes.weight.detach()[:-1], dim=1)  # (V, D)
    ax.plot(
        torch.cdist(codebook, codebook).flatten()[some], (unit @ unit.T).flatten()[some], ".", ms=3
    )
    ax.set(title=title, xlabel="distance of two codes in the codebook")
axes[0].set_ylabel("cosine of their embeddings")
plt.show()
print("random features (V, D):", tuple(random_features(codebook, student.config.width).shape))

# %% [markdown]
r"""
## 7. Train it

A step: draw examples, draw a rate for each, hide that many tokens, remove a tenth of the texts (for guidance, notebook
6), predict, take the mean cross-entropy over the hidden tokens, one step downhill. `train_transformer` is a generator: it
yields a `Progress` after each step, so a notebook can look, or stop.
"""

# %%
from minimuse.train import MaskedLoss, Progress, train_network, train_transformer

show(MaskedLoss, Progress, train_transformer, train_network)

# %% [markdown]
r"""
**Predict, then run.** Before the first step: what is the loss of the fresh student, roughly? And is it higher with 90%
hidden than with 10%? Write the numbers down.
"""

# %%
import math

from minimuse.train_engine import Engine

engine = Engine(seed=0, device="cpu")


def look(loss, step=0):
    """Held-out loss at five shares hidden."""
    return validate(
        loss, held_tokens, held_texts, codebook_size=V, engine=engine, most=64, strata=0
    )


begun = look(MaskedLoss(student))
for name in ("loss@0.1", "loss@0.5", "loss@0.9"):
    print(f"{name}: {begun[name]:.3f}")
print(f"\nln V = {math.log(V):.3f}; unigram entropy {unigram_entropy(tokens, V):.3f}")

# %% [markdown]
r"""
About $\ln V$, whatever is hidden: the head begins near zero, so all codes get about the same logit. If a training of yours
begins anywhere else, look for the reason before you go on.

Now train. We look at it again and again: the held-out loss, and a few sketches, drawn in 12 steps from the same seeds.
"""

# %%
from minimuse.cfg import guided, null_text
from minimuse.sampler import decode
from minimuse.train_log import eval_mode

SKETCHED = ["a large red cube", "a large blue sphere", "a large yellow cylinder"]


def sketch(model):
    """What a base model draws for the three prompts."""
    context = muse.encoder.encode(SKETCHED)
    with eval_mode(model):
        fn = guided(model, model.memory(context), model.memory(null_text(context)), (0.0, 3.0))
        *_, last = decode(
            fn,
            torch.full((3, N), model.mask_id),
            mask_id=model.mask_id,
            steps=12,
            sampling_temperature=0.7,
            choice_temperature=4.5,
            generator=[torch.Generator().manual_seed(i) for i in range(3)],
        )
        return to_pil(muse.low_tokenizer.decode(last.tokens))


recipe = replace(preset("nano").stages["base"], steps=STEPS, warmup=STEPS // 12, eval_every=EVERY)
print(
    f"{recipe.optimizer}, learning rate {recipe.learning_rate}, {recipe.steps} steps of {recipe.batch} pictures"
)
sketches, losses, looks = {0: sketch(student)}, [], {0: begun}
for p in train_transformer(
    student, recipe, tokens, texts, engine=engine, eval_fn=look
):  # each p a Progress
    losses.append(p.metrics["loss"])
    if p.step % EVERY == 0:
        looks[p.step], sketches[p.step] = p.metrics, sketch(student)
print(f"last step: {p.step} of {p.steps}; loss of its batch {losses[-1]:.2f}")

# %%
some = sorted(sketches)
some = some if len(some) <= 8 else [some[round(i * (len(some) - 1) / 7)] for i in range(8)]
film_strip([sketches[s] for s in some], [f"{s} steps" for s in some], scale=SIDE)

# %% [markdown]
r"""
Rows are the three prompts. First noise. In the second column floor, sky, shadow and a blot of the right colour are there; shapes take
the rest of the training, and are not finished. (In the fast setting it stops long before anything can be seen.)
"""

# %%
figure, ax = plt.subplots(figsize=(8, 3.2))
ax.plot(range(1, len(losses) + 1), losses, color="0.8", lw=1, label="each batch")
for k, rate in enumerate((0.1, 0.5, 0.9)):
    ax.plot(
        list(looks),
        [looks[s][f"loss@{rate}"] for s in looks],
        "os^"[k] + "-",
        ms=4,
        label=f"held out, {rate:.0%} hidden",
    )
ax.axhline(math.log(V), color="k", lw=1, ls=":", label="ln V: knows nothing")
ax.axhline(unigram_entropy(tokens, V), color="k", lw=1, ls="--", label="unigram entropy")
ax.set(xlabel="step", ylabel="nats per hidden token", ylim=(0, None))
ax.legend(fontsize=8, ncols=2)
plt.show()

# %% [markdown]
r"""
Three things to read here.

- The batches scatter widely, and not because training is rough: each has other rates, and a nearly empty picture is
  harder than a nearly full one. Judge by the held-out lines.
- First all lines fall together, and past the unigram entropy: *where* a position lies (sky above, floor below) and what
  the text says help without any visible token. Then the line of 90% stays behind.
- The lines of 10% and 50% nearly coincide: half of the neighbours already predict most of what can be predicted. Some loss
  remains even there, since many codes look alike. With 90% hidden too few neighbours are left, and the text must help.
"""

# %%
if not FAST:  # a few steps separate nothing
    tenth, half, most_hidden = (looks[max(looks)][f"loss@{rate}"] for rate in (0.1, 0.5, 0.9))
    assert most_hidden < unigram_entropy(tokens, V) - 1, (
        "90% hidden is not far below the unigram entropy"
    )
    assert abs(half - tenth) < 0.5 * (most_hidden - half), (
        "the lines of 10% and 50% do not nearly coincide"
    )
    assert tenth > 1, "with 10% hidden nothing is left to learn"

# %% [markdown]
r"""
## 8. The loss by mask rate

One loss says little; the curve over rates says what a model can do. Here are our student and the shipped checkpoint; then
the checkpoint without any text, and misled: each picture with *another picture's* caption.
"""

# %%
from minimuse.train_log import RATES


class Textless(MaskedLoss):
    def forward(self, x, masked, context, *rest):
        return super().forward(x, masked, null_text(context), *rest)


moved = Captions(held_texts[1:] + held_texts[:1])
how = {"codebook_size": V, "engine": engine, "most": 64, "strata": 0}
curves = {
    "our student": validate(MaskedLoss(student), held_tokens, held_texts, **how),
    "the checkpoint": validate(MaskedLoss(base), held_tokens, held_texts, **how),
    "the checkpoint, no text": validate(Textless(base), held_tokens, held_texts, **how),
    "the checkpoint, another's caption": validate(MaskedLoss(base), held_tokens, moved, **how),
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
for k, (name, found) in enumerate(curves.items()):
    for ax, what in zip(axes, ("loss", "accuracy"), strict=True):
        ax.plot(
            RATES, [found[f"{what}@{r}"] for r in RATES], ["o-", "s-", "v:", "^--"][k], label=name
        )
axes[0].axhline(unigram_entropy(tokens, V), color="k", lw=1, ls="--")
axes[0].set(xlabel="fraction hidden", ylabel="nats per hidden token", ylim=(0, None))
axes[1].set(xlabel="fraction hidden", ylabel="likeliest code is the true one", ylim=(0, 1))
axes[0].legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
The dashed black line is the unigram entropy. Look at the two solid lines first: **you have just trained a model that is as good on this
loss as the shipped one.**

Between the lines with text and without lies what the text is worth: little where much is visible, most where little is. A
*false* text costs more than none at all: the model believes it. The accuracy (right) looks low for a network that draws well:
most guesses name another code than the true one. Many codes look alike, so which one it was cannot be known, and need
not be.
"""

# %%
ours, theirs, textless, misled = curves.values()
worth = {r: textless[f"loss@{r}"] - theirs[f"loss@{r}"] for r in RATES}
assert worth[0.1] < 0.7 * worth[0.9], "the text is not worth most where most is hidden"
for r in RATES:
    assert theirs[f"loss@{r}"] < textless[f"loss@{r}"] < misled[f"loss@{r}"], (
        "a false text is cheaper"
    )
    assert FAST or abs(ours[f"loss@{r}"] - theirs[f"loss@{r}"]) < 0.2, "the student is not as good"

# %% [markdown]
r"""
Where in the picture is the loss? The mean over the held-out scenes, with 70% hidden, for each position:
"""

# %%
from minimuse.text import pad_contexts

with torch.inference_mode():
    said = pad_contexts([captions[0] for captions in held_texts])
    cost = torch.zeros(2, N)
    seen_by = torch.zeros(N)
    for seed in range(2 if FAST else 8):
        m = random_mask(
            held_tokens, torch.full((len(held_tokens),), 0.7), torch.Generator().manual_seed(seed)
        )
        for k, memory in enumerate((base.memory(null_text(said)), base.memory(said))):
            logits = base(held_tokens.masked_fill(m, base.mask_id), memory)
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), held_tokens, reduction="none"
            )  # (B, N)
            cost[k] += (each * m).sum(0)
        seen_by += m.sum(0)
    cost = (cost / seen_by).view(2, g, g)
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8))
for ax, values, title in zip(
    axes,
    (cost[0], cost[1], cost[0] - cost[1]),
    ("without text", "with its text", "what the text is worth"),
    strict=True,
):
    shown = ax.imshow(values, vmin=0, vmax=cost.max() if ax is not axes[2] else None)
    figure.colorbar(shown, ax=ax, label="nats")
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)
plt.show()

# %% [markdown]
r"""
The left, right and lower borders have a low loss: sky and floor are predictable. It is highest in the middle, where objects stand.
The text helps little where the loss is low anyway.
"""

# %% [markdown]
r"""
## What failure looks like

A line of `MaskedLoss` puts `[MASK]` where tokens are hidden. Forget it, and the model is *shown* the answers. Nothing
crashes. We take the module's own source, change that one line, and train for a while.
"""

# %%
import inspect
import types

from minimuse import train

source, broken = inspect.getsource(train), types.ModuleType("broken")
line = "self.model(x.masked_fill(masked, self.model.mask_id), memory)"
assert source.count(line) == 1
exec(source.replace(line, "self.model(x, memory)"), vars(broken))

torch.manual_seed(0)
leaky = Transformer(student.config)
init_from_codebook(leaky, codebook)
leaky_losses = []
for p in broken.train_transformer(leaky, recipe, tokens, texts, engine=engine):
    leaky_losses.append(p.metrics["loss"])
    if p.step == LEAK:
        break
figure, ax = plt.subplots(figsize=(7, 2.8))
ax.plot(range(1, LEAK + 1), losses[:LEAK], label="as it should be")
ax.plot(range(1, LEAK + 1), leaky_losses, "--", label="the answers are shown")
ax.set(xlabel="step", ylabel="nats per hidden token", ylim=(0, None))
ax.legend()
plt.show()

# %%
grid(
    [*sketch(student), *sketch(leaky)],
    [f"{who}: {p}" for who in ("right", "leaky") for p in SKETCHED],
    columns=6,
    scale=SIDE,
)

# %% [markdown]
r"""
The *better* loss is the broken one. It learns to copy, and `[MASK]`, which it never sees, means nothing to
it. The curve is the symptom: a masked loss that falls to nearly 0 within minutes is not a success. `minimuse doctor` has a
test that needs no second training: hide one token, let its *true* value be each code in turn, and add up the
probabilities that the model gives to what is true. They are one distribution, so the sum is 1, unless the model peeks.
"""

# %%
from minimuse.train_doctor import examine_transformer

for name, loss in (("right", MaskedLoss(student)), ("leaky", broken.MaskedLoss(leaky))):
    found = examine_transformer(
        loss, (tokens, texts), (held_tokens, held_texts), codebook_size=V, engine=engine, early=True
    )
    leak = next(f for f in found if f.check == "leakage")
    print(f"{name}: {leak.verdict}. The sum is {leak.number:.2f}")

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

What is `init_from_codebook` worth? Train a second student without it, with the same seed and `recipe`. How many steps later does it reach
the first one's held-out loss, with 10% and with 90% hidden? Does the advantage shrink? Two runs are one pair: what would you need to give
an interval?
"""

# %% [markdown]
r"""
## Summary

- The base transformer turns tokens, some of them `[MASK]`, and a text into logits for every position, in one pass.
- A token is its code plus its row plus its column. Self-attention lets all positions see all; cross-attention reads the
  text. Nothing is causal.
- The text's keys and values are computed once for a whole decode.
- Attention weights show where a model looks. Swapping a word shows what it does with it.
- Compare a masked loss with $\ln V$, with the unigram entropy, and with itself at other rates. What is visible is worth
  most; the text is worth most where little is visible.
- A loss that is too good is a bug.
"""

# %% [markdown]
r"""
## Further reading

- Vaswani et al. 2017, *Attention is all you need*, [arXiv 1706.03762](https://arxiv.org/abs/1706.03762).
- Devlin et al. 2018, *BERT*, [arXiv 1810.04805](https://arxiv.org/abs/1810.04805): masked prediction of words.
- Chang et al. 2022, *MaskGIT*, [arXiv 2202.04200](https://arxiv.org/abs/2202.04200): of picture tokens.
- Jain and Wallace 2019, *Attention is not explanation*, [arXiv 1902.10186](https://arxiv.org/abs/1902.10186).
- Jordan et al. 2024, *Muon*, and Liu et al. 2025, [arXiv 2502.16982](https://arxiv.org/abs/2502.16982): the optimizer of our student.
- Next: [6. Guidance](06_guidance.ipynb), which uses the tenth of the texts that we removed.
"""
