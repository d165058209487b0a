# %% [markdown]
r"""
# 8. Super-resolution: the same game on a finer grid

*A second transformer turns a coarse grid of tokens into a fine one: how it knows what to draw, and how it affords so many tokens.*

|  |  |
|---|---|
| **Paper** | Muse 2.4, A.3; multi-axis attention from HiT ([arXiv 2106.07631](https://arxiv.org/abs/2106.07631)) |
| **You will learn** | why two stages · how low-res tokens enter a transformer's memory · what multi-axis attention sees, and what it saves · who decides when text and tokens disagree |
| **Before this** | [5. The base transformer](05_base_transformer.ipynb), [7. Parallel decoding](07_parallel_decoding.ipynb); attention with queries, keys and values; symbols are in the [glossary](glossary.md) |
| **Takes** | @takes@; about 105 minutes of your time |
| **Files** | [`transformer.py`](../minimuse/transformer.py), [`muse.py`](../minimuse/muse.py) |
"""

# %% knobs
import math
import os
import time

import diagrams
import matplotlib.pyplot as plt
import torch
from checks import check_join_memory, check_multi_axis
from matplotlib.colors import LogNorm
from PIL import Image
from view import show, style

from minimuse import Muse
from minimuse.data_sources import SceneDataset
from minimuse.pictures import from_pil
from minimuse.plots import film, grid
from minimuse.utils import area_downsample, to_float, to_pil

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer pictures
CHECKPOINT = "toy"  # a shipped name or a folder
PICTURES = 3 if FAST else 6  # a row of pictures
SCENES = 12 if FAST else 96  # held-out scenes to measure losses on
LARGEST = 32 if FAST else 64  # tokens per side of the largest grid that we time
style()

# %% [markdown]
r"""
The base model of notebook 5 fills a coarse grid. That grid says *what stands where*, and little else. A second model of
the same kind, **super-resolution**, now fills a finer grid, whose decoder draws the picture that you get. Two things
are new in it, and they are the two halves of this notebook:

- its **memory** holds the coarse tokens besides the text;
- its **self-attention** is cut into two cheap halves, since the fine grid has many tokens.

All else stays: masked training, the same loss, parallel decoding, guidance.
"""

# %%
muse = Muse.from_pretrained(CHECKPOINT)
prompts = ["a large red cube", "a large yellow cylinder", "a large green metal sphere"][:PICTURES]
pairs = []
for prompt in prompts:
    steps = list(muse.steps(prompt, seed=0))
    base = [s for s in steps if s.stage == "base"]
    pairs += [muse.picture(base[-1])[0], muse.picture(steps[-1])[0]]
fine = muse.config.high_tokenizer.image_size
grid(
    [image.resize((fine, fine), 0) for image in pairs],
    [text for prompt in prompts for text in (f"{prompt}: the base model's", "super-resolution's")],
    columns=6,
)

# %% [markdown]
r"""
## 1. Why two stages?

Why not fill the fine grid at once? **Cost** is one reason. In self-attention every token looks at every token, so that
$N$ tokens need $N^2$ products of a query and a key; and $N$ itself grows with the square of the grid's side. Twice the
side: four times the tokens, sixteen times the pairs.
"""

# %%
from minimuse.config import preset

rows = []
for config in (muse.config, preset("paper_3b")):
    for name, part in (("base", config.base), ("super-resolution", config.superres)):
        rows.append((f"{config.name}, {name}", part.tokens))
        print(
            f"{rows[-1][0]:>28}: {part.grid:>2} x {part.grid:<2} = {part.tokens:>5,} tokens, ",
            end="",
        )
        print(f"{part.tokens**2:>11,} pairs per head in full attention")

# %% [markdown]
r"""
The other reason is **division of labour**. *What* is in the picture and *where* are questions about the whole of it:
every token must agree with every other, and the text must be read with care. *How an edge runs* is a question about a
few neighbours. A large model should answer the first on few tokens, and a smaller one the second on many.

We can measure that. For each token, the model's uncertainty is the **entropy** of its prediction,
$H = -\sum_v p_v \log p_v$: 0 nats where it is certain, $\log V$ where all $V$ codes are equally likely.
"""

# %% [markdown]
r"""
**Predict, then run.** We hide *all* tokens of held-out scenes and let both models predict them from the caption; super-
resolution also gets the true coarse tokens. Whose tokens are less certain, those of the base model or those of
super-resolution? And does your answer explain why the paper takes 24 steps for 256 coarse tokens, but only 8 for 4,096
fine ones?
"""

# %%
from minimuse.sampler import token_entropy

scenes = SceneDataset(SCENES, fine, split="test", fractions=muse.config.fractions)
pixels = to_float(scenes.images())  # (n, 3, H, W) in [-1, 1]
small = area_downsample(pixels, fine // muse.config.low_tokenizer.image_size)
with torch.inference_mode():
    low, high = muse.low_tokenizer.encode(small), muse.high_tokenizer.encode(pixels)
    text = muse.encoder.encode([scenes.captions(i, 1)[0] for i in range(SCENES)])
    blank_low = torch.full_like(low, muse.base.mask_id)
    blank_high = torch.full_like(high, muse.superres.mask_id)
    of_base = token_entropy(muse.base(blank_low, muse.base.memory(text)))
    of_superres = token_entropy(
        muse.superres(blank_high, muse.superres.memory(text, *muse.low_condition(low)))
    )

figure, ax = plt.subplots(figsize=(7, 3))
edges = torch.linspace(0, math.log(muse.config.base.codebook_size), 30).tolist()
for values, name in (
    (of_base, "base: from the text"),
    (of_superres, "super-resolution: + coarse tokens"),
):
    ax.hist(
        values.flatten().tolist(),
        edges,
        density=True,
        alpha=0.6,
        label=f"{name}, mean {values.mean():.2f}",
    )
ax.set(xlabel="entropy of a hidden token, nats", ylabel="density", title="nothing is revealed yet")
ax.legend()
plt.show()

# %% [markdown]
r"""
The base model is far less certain. The text leaves open where the object stands, so that almost any coarse token may be
floor or object. Once the coarse tokens are known, most fine tokens are nearly decided.

And the steps? Tokens that are revealed in the same step are drawn *independently* of each other, and the error of that is at most
what was uncertain about them (notebook 7). So more tokens can be revealed at a time if they are more certain: few steps for many
tokens.
"""

# %% [markdown]
r"""
## 2. One picture, two grids

For training, each picture is tokenized twice: as it is, and **decimated**, that is, averaged down to the low
resolution. Both grids show the same scene, so that a block of fine tokens belongs to each coarse one.
"""

# %%
from minimuse.data_scenes import Scene, Thing, render

scene = Scene(
    (Thing("red", "cube", x=-0.9), Thing("cyan", "sphere", size="small", x=1.1, depth=-0.5))
)
picture = render([scene], fine)
decimated = area_downsample(picture, fine // muse.config.low_tokenizer.image_size)
with torch.inference_mode():
    a, b = muse.low_tokenizer.encode(decimated), muse.high_tokenizer.encode(picture)
print("low tokens ", tuple(a.shape), "  high tokens", tuple(b.shape))
g_low, g_high = muse.config.base.grid, muse.config.superres.grid
panels = [
    (f"decimated, {decimated.shape[-1]} px", to_pil(decimated)[0]),
    (f"{g_low} x {g_low} tokens", a.view(g_low, g_low)),
    (f"the picture, {fine} px", to_pil(picture)[0]),
    (f"{g_high} x {g_high} tokens", b.view(g_high, g_high)),
]
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8))
for ax, (title, shown) in zip(axes, panels, strict=True):
    ax.imshow(shown, cmap="nipy_spectral")
    ax.set_title(title)
    ax.axis("off")
plt.show()

# %% [markdown]
r"""
Training hides fine tokens at a random rate and asks for them, given the fine tokens that are left, the text, and the
**true** coarse tokens of the same picture. With $x$ the fine tokens, $M$ the hidden positions, $y$ the coarse tokens and
$c$ the text:

$$\mathcal{L} = -\,\mathbb{E}\;\frac{1}{|M|}\sum_{i\in M}\log p_\theta\big(x_i \mid x_{\text{visible}},\; y,\; c\big)$$

Coarse tokens are never hidden. Note what training does not see: coarse tokens that the base model drew, mistakes
included. Section 6 looks at that.
"""

# %% [markdown]
r"""
## 3. Text and coarse tokens in one memory

A transformer of ours reads conditions only through its **memory**: a sequence of vectors that every layer attends to.
For the base model it holds the text. For super-resolution the coarse tokens $y$ join it:

$$m = \big[\,\underbrace{\mathrm{LN}(W e_1), \dots, \mathrm{LN}(W e_L)}_{\text{text}},\;\;
\underbrace{E(y)_1, \dots, E(y)_K}_{\text{coarse tokens}}\,\big]$$

$W$ projects the language model's vectors $e_1, \dots, e_L$ to the transformer's width, LN is layer normalization, $E$ is a small
transformer of its own (16 layers in the paper): the **low-res encoder**. "Concatenated along the sequence" means one list after the
other. In the diagram the text entries are called t, the $K$ coarse ones c; the *draft* is explained at the end of this section.
"""

# %%
diagrams.memory(muse.config)

# %%
from minimuse.transformer import SuperRes, Transformer

show(SuperRes, Transformer.memory)

# %% [markdown]
r"""
`super().memory(context, low)` appends the encoder's output to the text, marks all of it as attended to, and computes
the keys and values of each layer once for a whole decode. Cross-attention does not know which entry is text and which
is a coarse token; only what they hold tells them apart.
"""

# %%
model = muse.superres
one = muse.encoder.encode(["a red cube left of a small cyan sphere"])
with torch.inference_mode():
    memory = model.memory(one, *muse.low_condition(a))  # a, and a draft: see below
print("text (B, L, D_lm):     ", tuple(one.embeds.shape))
print("coarse tokens (B, K):  ", tuple(a.shape))
print("keys of layer 1 (B, H, L + K, d):", tuple(memory.keys[0].shape))
print("attend (B, 1, 1, L + K):", tuple(memory.attend.shape))

# %% [markdown]
r"""
### Exercise 8.1: join the two

*Difficulty 1 of 3, about 5 minutes.*

Write the central step yourself. Text entries come with a mask, `True` at real text and `False` at padding; coarse
entries have no padding. Return the joined entries and the joined mask.

<details><summary>Hint</summary>

Which mask entries belong to the coarse tokens? There are as many as coarse tokens, and all have the same value. The mask is joined along
the same axis as the entries.

</details>
"""


# %%
def my_join(text, mask, low):
    return torch.cat([text, low], dim=1), mask  # your code: half of it is here


check_join_memory(my_join)


# %% tags=["solution"]
def my_join(text, mask, low):
    always = torch.ones(low.shape[:2], dtype=torch.bool)
    return torch.cat([text, low], dim=1), torch.cat([mask, always], dim=1)


check_join_memory(my_join)

# %% [markdown]
r"""
### Why an encoder?

One could append the embeddings of the coarse tokens as they are. But a code by itself says little: a red patch may be a
face of a cube or the middle of a sphere; its neighbours decide. The encoder's self-attention first mixes the entries.
To see it, we change **one** coarse token and look where the entries change, before and after the encoder's layers.
"""

# %%
with torch.inference_mode():
    changed = a.clone()
    middle = g_low // 2 * g_low + g_low // 3
    changed[0, middle] = a[0, 0]  # a piece of wall where a thing stands
    moved = []
    for tokens in (a, changed):
        x = model.low_embed(tokens)
        y = x
        for layer in model.low_layers:
            y = layer(y)
        moved.append((x, model.low_norm(y)))
before, after = ((p - q).norm(dim=-1).view(g_low, g_low) for p, q in zip(*moved, strict=True))
figure, axes = plt.subplots(1, 3, figsize=(9.5, 2.9))
axes[0].imshow(to_pil(decimated)[0], extent=(-0.5, g_low - 0.5, g_low - 0.5, -0.5))
axes[0].plot(middle % g_low, middle // g_low, "s", ms=16, mfc="none", mec="black", mew=2)
axes[0].set_title("the changed token")
scale = LogNorm(float(after.max()) / 300, float(after.max()))  # each step of colour is a factor
for ax, change, title in ((axes[1], before, "embeddings"), (axes[2], after, "after the encoder")):
    shown = ax.imshow(change.clamp(min=scale.vmin), cmap="magma", norm=scale)
    ax.set_title(title)
figure.colorbar(shown, ax=axes[2], label="change of the entry (log scale)")
for ax in axes:
    ax.set(xlabel="column")
    ax.grid(False)
axes[0].set_ylabel("row")
plt.show()

# %% [markdown]
r"""
In the middle picture one entry has changed, as it must. On the right all others have changed too: by a small
fraction of its own change, and some more than others. A fine token that reads one entry now reads a little of the whole grid. A deeper
encoder passes on more; the paper's has 16 layers.
"""

# %% [markdown]
r"""
### Who is read, the text or the coarse tokens?

Cross-attention gives each fine token weights over the memory that sum to 1. With a query $q$ of the fine token and the
keys $k_j$ of the memory, with $d$ channels per head:

$$w_j = \frac{\exp(q \cdot k_j / \sqrt d)}{\sum_{j'} \exp(q \cdot k_{j'} / \sqrt d)}$$

The package does not keep these weights: fast attention never stores them. A forward hook on the layer that makes $q$ lets us
compute them from outside.
"""


# %%
def cross_weights(model, tokens, memory):
    """-> a tensor (B, H, N, M) for each layer: how much each token reads of each entry of the memory."""
    queries = []
    hooks = [
        layer.cross.q.register_forward_hook(lambda _, given, q: queries.append(q))
        for layer in model.layers
    ]
    with torch.inference_mode():
        model(tokens, memory)
    for hook in hooks:
        hook.remove()
    weights = []
    for q, k in zip(queries, memory.keys, strict=True):
        q = q.unflatten(-1, (k.shape[1], -1)).transpose(1, 2)  # (B, H, N, d)
        scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
        weights.append(scores.masked_fill(~memory.attend, -math.inf).softmax(-1))
    return weights


weights = cross_weights(model, torch.full_like(b, model.mask_id), memory)
print(
    "weights of layer 1 (B, H, N, L + K):",
    tuple(weights[0].shape),
    "; each row sums to 1:",
    end=" ",
)
print(torch.allclose(weights[0].sum(-1), torch.ones(())))

# %% [markdown]
r"""
**Predict, then run.** The memory of this picture holds a few entries of text and many coarse tokens. Averaged over all
fine tokens, what fraction of the attention goes to the text? And will each fine token read all coarse tokens, or one?
"""

# %%
length = one.embeds.shape[1]
side = g_high // g_low
line = torch.arange(g_high) // side
own = (line[:, None] * g_low + line[None]).flatten()  # the coarse token that each fine one lies in
to_text = [w[..., :length].sum(-1).mean().item() for w in weights]
to_own = [w[0, :, torch.arange(g_high**2), length + own].mean().item() for w in weights]
rest = [1 - t - o for t, o in zip(to_text, to_own, strict=True)]
uniform = [length, 1, g_low**2 - 1]
names = [f"layer {i + 1}" for i in range(len(weights))] + ["if all were alike"]
bars = [*zip(to_text, to_own, rest, strict=True), [u / sum(uniform) for u in uniform]]
figure, ax = plt.subplots(figsize=(8, 2.6))
start = torch.zeros(len(bars))
for part, label in enumerate(
    ["the text", "the coarse token at its own position", "the other coarse tokens"]
):
    fraction = torch.tensor([bar[part] for bar in bars])
    ax.barh(
        names, fraction, left=start, label=label, hatch=["//", "", ".."][part], edgecolor="white"
    )
    start += fraction
ax.invert_yaxis()
ax.set(xlabel="fraction of the attention, all fine tokens and heads", xlim=(0, 1))
ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.25), ncols=3)
plt.show()
assert max(to_text) < bars[-1][0], "some layer reads the text more than its even part"
assert max(to_own) > 2 * bars[-1][1], "no layer prefers a token's own position"

# %% [markdown]
r"""
The coarse tokens get most of it in every layer. The lowest bar is attention without any preference: every layer reads the text even less
than that. That is no mistake: the coarse tokens were drawn *from* the text, so what it says about colour, shape and place is
in them already. In the first layer the entry at a fine token's own position gets a few times its even part. (Attention is not
influence; section 6 changes the text, and the coarse tokens, and looks.)

Where does the rest go? Below, four fine tokens and what they read, averaged over layers and heads.
"""

# %%
places = [
    (0.25, 0.25),
    (0.6, 0.3),
    (0.6, 0.72),
    (0.85, 0.5),
]  # rows and columns, as fractions of the side
maps = torch.stack(weights).mean((0, 2))[0, :, length:]  # (N, K): the mean over layers and heads
figure, axes = plt.subplots(2, 4, figsize=(9, 4.6))
for k, (row, column) in enumerate(places):
    r, c = int(row * g_high), int(column * g_high)
    axes[0, k].imshow(to_pil(picture)[0], extent=(-0.5, g_high - 0.5, g_high - 0.5, -0.5))
    axes[0, k].plot(c, r, "s", ms=9, mfc="none", mec="black", mew=2)
    axes[0, k].set_title("a fine token", fontsize=10)
    axes[1, k].imshow(maps[r * g_high + c].view(g_low, g_low), cmap="magma")
    axes[1, k].set_title("the coarse ones it reads", fontsize=10)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
plt.show()

# %% [markdown]
r"""
Some tokens read mostly near their own position, others far from it too. (The draft, below, already says what stands at each
position, so this model needs the map less than the paper's would.) No rule connects the positions: coarse and fine grids have
position embeddings of their own, and both are learned. Ours begin as waves over the picture, the same for both grids, which makes
the match easy to learn.
"""

# %%
from minimuse.transformer import TokenEmbedding, sinusoids

show(sinusoids, TokenEmbedding)

# %% [markdown]
r"""
### Guidance removes only the text

Guidance (notebook 6) compares predictions with and without the condition. Here "without" means *without the text*: the
coarse tokens stay in both memories, and without the text nothing else is attended to. Otherwise guidance would push the picture away from its own coarse grid.
"""

# %%
from minimuse.cfg import null_text

with torch.inference_mode():
    without = model.memory(null_text(one), *muse.low_condition(a))
print(
    "entries with text:   ", memory.attend.shape[-1], "of which attended", int(memory.attend.sum())
)
print(
    "entries without text:",
    without.attend.shape[-1],
    "of which attended",
    int(without.attend.sum()),
)
print(
    "the same keys of coarse tokens:",
    memory.keys[0][:, :, length:].equal(without.keys[0][:, :, 1:]),
)

# %% [markdown]
r"""
### A draft at each position

This is our own addition. The paper does not have it.

With cross-attention only, super-resolution must learn what picture each coarse token stands for. The frozen tokenizers
already know. So we decode the coarse tokens, enlarge the picture with bicubic interpolation, and encode it with the
high-res tokenizer. The result is a **draft**: one fine token for each position. Its embedding is added to that of the
hidden token. A configuration with `draft=False` gives the model of the paper.

**Predict, then run.** How many tokens of the draft are already the right ones?
"""

# %%
from minimuse.vqgan import draft_tokens

show(draft_tokens)

# %%
with torch.inference_mode():
    draft = draft_tokens(muse.low_tokenizer, muse.high_tokenizer, low)
    memory_of_all = model.memory(text, *muse.low_condition(low))
    first = model(blank_high, memory_of_all).argmax(-1)  # the best guess, nothing revealed
    shown = [muse.high_tokenizer.decode(t[:3]) for t in (draft, first, high)]
right = {
    name: (t == high).float().mean().item() for name, t in (("draft", draft), ("model", first))
}
for name, fraction in right.items():
    print(f"{name}: {fraction:.0%} of the fine tokens are right")
assert right["draft"] < right["model"]
rows = ["the draft", "the model's best guess from it", "the true fine tokens"]
grid(
    [image for tokens in shown for image in to_pil(tokens)],
    [row for row in rows for _ in range(3)],
    columns=3,
)

# %% [markdown]
r"""
The draft is a good start, but some edges are blurred: enlarging adds no detail. The model learns what to change. That is easier than
to draw everything anew ([measured](../benchmarks/superres.md)).
"""

# %% [markdown]
r"""
## 4. Multi-axis attention

Full attention over the paper's 4,096 fine tokens needs 16.8 million pairs in every head of every layer. Yet a token
needs only two things: its **neighbours**, to draw an edge, and an **overview**, to agree with the rest. Multi-axis
attention gives half of the heads to each. The $g \times g$ grid is cut into blocks of $b \times b$:

- **local** heads: a token sees the $b^2$ tokens of its own block;
- **dilated** heads: a token sees the tokens at *its position in every block*, $g^2/b^2$ of them, spread over the
  whole picture.

Then the heads' outputs are concatenated, as always.
"""

# %%
from minimuse.transformer import multi_axis_attention

show(multi_axis_attention)

# %% [markdown]
r"""
The trick is one reshape. Row $= (\text{block row}, \text{row in the block})$, and the same for columns, so that the
token axis becomes four. Attention always runs over the last two of them: for local heads the places *in* a block are
put last, for dilated heads the *blocks*. All else is batch.

To see which tokens see which, we make all keys equal, so that all weights are equal, and make the values the identity
matrix: the output of a token is then not zero at those that it has seen.
"""

# %%
G, BLOCK = 16, 4  # a grid to draw, cut into blocks of 4 x 4
N = G * G
same, names_of = torch.zeros(1, 2, N, N), torch.eye(N).expand(1, 2, N, N)
sees = (
    multi_axis_attention(same, same, names_of, BLOCK)[0] > 0
)  # (2, N, N): a local head, a dilated head
print(
    "a local head sees",
    int(sees[0, 0].sum()),
    "tokens, a dilated one",
    int(sees[1, 0].sum()),
    "of",
    N,
)

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3))
token = 5 * G + 6
views = [
    ("local head", sees[0, token]),
    ("dilated head", sees[1, token]),
    ("both", sees[:, token].any(0)),
]
for ax, (title, seen) in zip(axes, views, strict=True):
    ax.imshow(seen.view(G, G), cmap="Blues", vmin=0, vmax=1.6)
    ax.plot(token % G, token // G, "s", color="black", ms=7)
    for edge in range(0, G + 1, BLOCK):
        ax.axhline(edge - 0.5, color="0.6", lw=1)
        ax.axvline(edge - 0.5, color="0.6", lw=1)
    ax.set(
        title=f"{title}: {int(seen.sum())} tokens",
        xlabel="column",
        ylabel="row",
        xticks=[0, 5, 10, 15],
        yticks=[0, 5, 10, 15],
    )
    ax.grid(False)
plt.show()

# %% [markdown]
r"""
The black square is the token that looks, blue what it sees, lines are the blocks' borders. As masks over all pairs of
tokens, the two halves look like this:
"""

# %%
masks = []
for mask, colour in zip(sees, ((0, 114, 178), (213, 94, 0)), strict=True):
    pixels_of = torch.where(mask[..., None], torch.tensor(colour), torch.tensor(245)).byte()
    masks.append(Image.fromarray(pixels_of.numpy()))
grid(
    masks,
    [
        "local head: row = the token that looks, column = a token that it sees",
        f"dilated head: the same pairs of {N} tokens, {sees[1].float().mean():.1%} of them seen",
    ],
    columns=2,
    scale=2,
)

# %% [markdown]
r"""
Tokens are numbered row by row, so that a block's 16 tokens come in four runs of four, and the local mask consists of small squares.
Both masks are equally full; they meet only on the diagonal, where a token sees itself.
"""

# %% [markdown]
r"""
**Predict, then run.** In one layer a token sees 31 of the 256: 16 + 16, itself counted once. In a second
layer it also gets what *those* have seen. How many of the 256 tokens can have reached it after **two** layers:
if all heads were local, if all were dilated, and with half of each?
"""

# %%
kinds = {"all local": sees[0], "all dilated": sees[1], "half and half": sees.any(0)}
figure, axes = plt.subplots(2, 3, figsize=(8.5, 5.4))
for column, (name, once) in enumerate(kinds.items()):
    reach = once
    for layer in range(2):
        ax = axes[layer, column]
        ax.imshow(reach[token].view(G, G), cmap="Blues", vmin=0, vmax=1.6)
        ax.plot(token % G, token // G, "s", color="black", ms=6)
        plural = "layer" if layer == 0 else "layers"
        ax.set(
            title=f"{name}, {layer + 1} {plural}: {int(reach[token].sum())}", xticks=[], yticks=[]
        )
        ax.grid(False)
        reach = (reach.float() @ once.float()) > 0
plt.show()

# %% [markdown]
r"""
Local on local stays in the block, and dilated on dilated stays on its lattice, however many layers follow: neither half
could do it alone. Together, two layers reach everything: first the whole block, then from each of its positions the same position in
all blocks. Full attention needs one layer for that, at many times the cost.
"""

# %% [markdown]
r"""
### What it saves

Full attention computes $N^2$ pairs per head, multi-axis attention $N b^2$ in a local head and $N \cdot N/b^2$ in a dilated
one. Their mean, $N\,(b^2 + N/b^2)/2$ per head, is least where both are equal, $b^2 = \sqrt N$: then it is $N^{3/2}$. For the
paper's $64 \times 64$ grid that is $b = 8$. Let us count, and time it too.
"""

# %%
import torch.nn.functional as F


def milliseconds(attention, *given):
    took = []
    for _ in range(4):
        began = time.perf_counter()
        attention(*given)
        took.append(1000 * (time.perf_counter() - began))
    return min(took)


counted = []
for g, block in ((16, 4), (32, 8), (64, 8)):
    n = g * g
    full, ours = n * n, n * (block**2 + n / block**2) / 2
    counted.append((n, full, ours))
    told = (
        f"{g} x {g} tokens, blocks of {block}: {full:>12,} pairs per head, {ours:>9,.0f} multi-axis"
    )
    if g <= LARGEST:
        q, k, v = torch.randn(3, 1, 4, n, 32).unbind()
        times = (
            milliseconds(F.scaled_dot_product_attention, q, k, v),
            milliseconds(multi_axis_attention, q, k, v, block),
        )
        told += f"; {times[0]:.1f} and {times[1]:.1f} ms here"
    print(told)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
n, full, ours = zip(*counted, strict=True)
axes[0].loglog(n, full, "o-", label="full")
axes[0].loglog(n, ours, "s--", label="multi-axis")
axes[0].set(xlabel="tokens $N$", ylabel="pairs per head", title="the gap widens with the picture")
axes[0].set_xticks(n, [f"{m:,}" for m in n])
axes[0].minorticks_off()
axes[0].legend()
sides = [2, 4, 8, 16, 32]
axes[1].plot(sides, [(s**2 + 4096 / s**2) / 2 for s in sides], "o-")
axes[1].set(
    xlabel="side $b$ of a block",
    ylabel="tokens seen, mean per head",
    title="64 x 64 tokens: best at $b = 8$",
)
axes[1].set_xscale("log", base=2)
axes[1].set_yscale("log")
axes[1].minorticks_off()
axes[1].set_yticks([64, 128, 256, 512], ["64", "128", "256", "512"])
axes[1].set_xticks(sides, [str(s) for s in sides])
plt.show()

# %% [markdown]
r"""
For the smallest grid here either would do. At the paper's size the difference decides whether the model is affordable at all.
"""

# %% [markdown]
r"""
### Exercise 8.2: the same by masks

*Difficulty 2 of 3, about 25 minutes.*

Write multi-axis attention without any reshape: as full attention under two masks, one for the first half of the heads
and one for the second. It saves nothing, and it must give the same numbers. (`F.scaled_dot_product_attention` takes
`attn_mask`, `True` where a token may look.) Fast functions are tested against such slow ones.

<details><summary>Hint</summary>

Compute each token's row and column first. Two tokens share a block if their block rows and block columns agree. What must agree for two
tokens of the dilated half?

</details>
"""


# %%
def my_multi_axis(q, k, v, block):
    return F.scaled_dot_product_attention(q, k, v)  # your code: here every head sees everything


check_multi_axis(my_multi_axis)


# %% tags=["solution"]
def my_multi_axis(q, k, v, block):
    n, half = q.shape[2], q.shape[1] // 2
    row, column = torch.arange(n) // math.isqrt(n), torch.arange(n) % math.isqrt(n)
    in_block = row // block * n + column // block  # a name for each token's block
    in_place = row % block * n + column % block  # and for its place in it
    local, dilated = (x[:, None] == x[None] for x in (in_block, in_place))
    return torch.cat(
        [
            F.scaled_dot_product_attention(q[:, :half], k[:, :half], v[:, :half], attn_mask=local),
            F.scaled_dot_product_attention(
                q[:, half:], k[:, half:], v[:, half:], attn_mask=dilated
            ),
        ],
        dim=1,
    )


check_multi_axis(my_multi_axis)

# %% [markdown]
r"""
## 5. The cascade at work

The base model has revealed all coarse tokens of *a large red cube*. Now super-resolution reveals fine ones, in 8 steps. Gray is still
hidden.
"""

# %%
steps = list(muse.steps("a large red cube", seed=0))
film(muse, [s for s in steps if s.stage == "superres"], most=8)

# %% [markdown]
r"""
The first fine tokens already show where the cube will stand, since the coarse grid says so: red ones lie only there. (Fine tokens look
odd while they are alone. The decoder is made of convolutions: it looks at the neighbours, and in place of a hidden one it gets the
nearest token that is known.) What is left for super-resolution are edges, shading and texture. How many steps does that take? We keep
the coarse tokens, and vary the number of steps:
"""

# %%
base = [s for s in steps if s.stage == "base"]
coarse = base[-1].tokens  # (1, K)


def refine(prompt, coarse, seed=0, **settings):
    """Coarse tokens (B, K) -> B pictures: super-resolution alone."""
    jobs = muse.jobs(prompt, len(coarse), seed)
    *_, last = muse.decode_superres(jobs, coarse, **settings)
    return muse.picture(last)


counts = [1, 2, 4, 8, 16]
grid(
    [refine("a large red cube", coarse, steps=n)[0] for n in counts],
    [f"super-resolution in {n} step{'s' * (n > 1)}" for n in counts],
    columns=5,
)

# %% [markdown]
r"""
You will find few differences, at the edges. The lower a token's uncertainty, the less is lost by drawing many at once,
as section 1 predicted. So the paper can take a third of the base model's steps for 16 times the tokens.

And which tokens decide what the picture is? In the upper row, we keep the coarse tokens and draw the fine ones with other
seeds. We draw them at temperature 1: by default, super-resolution takes the most likely tokens, and all seeds give the same
picture. In the lower row, we draw everything with other seeds.
"""

# %%
again = refine("a large red cube", coarse.repeat(PICTURES, 1), seed=10, sampling_temperature=1.0)
anew = muse.generate("a large red cube", n=PICTURES, seed=10)
spread = [torch.cat([from_pil(i, fine) for i in row]).std(0).mean() for row in (again, anew)]
assert spread[0] < spread[1] / 2, "fine tokens decide more than details"
print(
    f"mean standard deviation of a pixel: same coarse tokens {spread[0]:.3f}, other ones {spread[1]:.3f}"
)
grid(
    again + anew,
    [f"same coarse tokens, seed {10 + i}" for i in range(PICTURES)]
    + [f"all anew, seed {10 + i}" for i in range(PICTURES)],
    columns=PICTURES,
)

# %% [markdown]
r"""
The upper row differs in details, the lower one in place and material too. For variants of a picture that you like, keep its coarse
tokens; for another picture, draw new ones.
"""

# %% [markdown]
r"""
## 6. The wrong coarse tokens

In training, text and coarse tokens always agreed. What if they do not?

**Predict, then run.** The text says *a large red cube*. The coarse tokens were drawn for *a large blue sphere*. Which will
super-resolution follow, in colour and in shape? The detector, a small network that says what is in a picture, names what it finds.
"""

# %%
from minimuse.eval_networks import Detector

detector = Detector.from_pretrained()


def coarse_of(prompt, n, seed=0):
    """n coarse grids that the base model draws for the prompt."""
    return [s.tokens for s in muse.steps(prompt, n=n, seed=seed) if s.stage == "base"][-1]


def seen(image):
    things = detector.detect([image])[0].things
    return " and ".join(f"{t.color} {t.shape}" for t in things) or "nothing"


blue = coarse_of("a large blue sphere", PICTURES)
torn = refine("a large red cube", blue)
strong = refine("a large red cube", blue, guidance=10.0)
grid(
    torn + strong,
    [f"detector: {seen(i)}" for i in torn] + [f"guidance 10; detector: {seen(i)}" for i in strong],
    columns=PICTURES,
)

# %% [markdown]
r"""
The coarse tokens win, in shape and in colour, and strong guidance changes little. The model does not *need* the text:
in training all that a caption says was in the coarse grid as well, and there it was easier to find.
"""

# %%
assert all(seen(image) == "blue sphere" for image in torn + strong), (
    "the text has changed something"
)
red = coarse_of("a large red cube", 1)
draws = torch.Generator().manual_seed(0)
shuffled = red[:, torch.randperm(red.shape[1], generator=draws)]
noise = torch.randint(muse.config.base.codebook_size, red.shape, generator=draws)
half = red.shape[1] // 2
collage = torch.cat([red[:, :half], blue[:1, half:]], dim=1)
wrong = {
    "as drawn": red,
    "shuffled positions": shuffled,
    "random codes": noise,
    "cube above, sphere below": collage,
}
with torch.inference_mode():
    coarse_pictures = [
        to_pil(muse.low_tokenizer.decode(tokens))[0].resize((fine, fine), 0)
        for tokens in wrong.values()
    ]
grid(
    coarse_pictures + [refine("a large red cube", tokens)[0] for tokens in wrong.values()],
    [f"coarse: {name}" for name in wrong] + ["super-resolution of it"] * len(wrong),
    columns=4,
)

# %% [markdown]
r"""
Wrong coarse tokens give the same wrong picture, only sharper. Super-resolution has learned to *trust* its coarse tokens, since they
were never wrong in training. That is a weakness of every cascade: the second stage cannot repair the mistakes of the first. (Some
cascades therefore corrupt the coarse input a little in training.)
"""

# %% [markdown]
r"""
## What failure looks like

The classic mistake of this model is silent: the coarse tokens are encoded, and then never passed on. It has happened in
public code. Training runs, the loss falls, pictures come out: from only the text. A second one forgets
the *positions* of the coarse tokens, so that the model knows what is in the picture but not where.

How to find out? **Change the condition, and see whether the loss changes.** We measure the masked loss on held-out scenes
with the true coarse tokens, with the same tokens at shuffled positions, and with those of another scene.
"""


# %%
class Lost(SuperRes):
    def memory(self, context, low_tokens, draft):
        return Transformer.memory(self, context)  # both taken, and forgotten


class Placeless(SuperRes):
    def memory(self, context, low_tokens, draft):
        low = self.low_embed.codes(low_tokens)  # no rows, no columns
        for layer in self.low_layers:
            low = layer(low)
        return Transformer.memory(self, context, self.low_norm(low))


from minimuse.masking import masked_cross_entropy, random_mask, sample_mask_rate
from minimuse.text import Context

draws = torch.Generator().manual_seed(0)
masked = random_mask(high, sample_mask_rate(SCENES, generator=draws), draws)
shuffle = torch.randperm(low.shape[1], generator=draws)
given = {"true": low, "shuffled": low[:, shuffle], "another scene's": low.roll(1, 0)}
other_text = Context(text.embeds.roll(1, 0), text.mask.roll(1, 0))


def loss_of(model, context, coarse):
    with torch.inference_mode():
        memory = model.memory(context, *muse.low_condition(coarse))
        logits = model(high.masked_fill(masked, model.mask_id), memory)
    return masked_cross_entropy(logits, high, masked).item()


losses = {}
for kind in (SuperRes, Placeless, Lost):
    broken = kind(muse.config.superres).eval()
    broken.load_state_dict(model.state_dict())
    for name, tokens in given.items():
        losses[kind.__name__, name] = loss_of(broken, text, tokens)
    print(
        f"{kind.__name__:>10}: "
        + "  ".join(f"{name} {losses[kind.__name__, name]:.3f}" for name in given)
    )
print(
    f"\nSuperRes, true coarse tokens, another scene's caption: {loss_of(model, other_text, low):.3f}"
)

# %%
figure, ax = plt.subplots(figsize=(8, 3))
for k, name in enumerate(given):
    ax.bar(
        [i + 0.27 * (k - 1) for i in range(3)],
        [losses[kind, name] for kind in ("SuperRes", "Placeless", "Lost")],
        0.25,
        label=f"{name} coarse tokens",
        hatch=["", "//", ".."][k],
        edgecolor="white",
    )
ax.set_xticks(range(3), ["as it should be", "without positions", "condition lost"])
ax.set(ylabel="masked loss, nats per token")
ax.legend(fontsize=9)
plt.show()
loss_with = lambda kind: [losses[kind, name] for name in given]  # noqa: E731
assert loss_with("SuperRes")[0] + 1 < min(loss_with("SuperRes")[1:]), "the loss does not notice"
assert abs(loss_with("Placeless")[0] - loss_with("Placeless")[1]) < 1e-3, (
    "shuffling changes something"
)
assert max(loss_with("Lost")) - min(loss_with("Lost")) < 1e-6, "a lost condition changes something"

# %% [markdown]
r"""
Compare the three bars of each group, not the groups. As it should be: both changes raise the loss, far more than another caption does.
Without positions: shuffling changes *nothing*. Condition lost: nothing changes anything. (Our broken models have the weights of the
healthy one, so their loss is also high. A model *trained* with the mistake would have a normal loss curve, and still show the same
pattern.)
"""

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

When does super-resolution begin to read the text? Replace a growing fraction of the true coarse tokens by random codes, and measure
`loss_of` with the right captions and with `other_text`. Where do the two curves part, with intervals over several draws? Would a model that
is trained with corrupted coarse tokens be better at it?
"""

# %% [markdown]
r"""
## Summary

- A coarse grid decides what stands where, a fine one how it looks: few tokens for a large model, many for a smaller one.
- The coarse tokens pass through an encoder of their own, and its output is appended to the text. Cross-attention reads
  both.
- Multi-axis attention gives half of the heads a block each and the other half a lattice over the whole picture. Two
  layers reach everything, for $N^{3/2}$ pairs in place of $N^2$.
- Guidance removes only the text. When text and coarse tokens disagree, super-resolution follows the coarse tokens.
- To test whether a condition arrives, change it.
"""

# %% [markdown]
r"""
## Further reading

- Chang et al. 2023, *Muse*, [arXiv 2301.00704](https://arxiv.org/abs/2301.00704), sections 2.4 and A.3.
- Zhao et al. 2021, *Improved Transformer for High-Resolution GANs* (HiT), [arXiv 2106.07631](https://arxiv.org/abs/2106.07631): multi-axis attention.
- Tu et al. 2022, *MaxViT*, [arXiv 2204.01697](https://arxiv.org/abs/2204.01697): the same idea, block and grid attention in turn.
- Ho et al. 2021, *Cascaded Diffusion Models*, [arXiv 2106.15282](https://arxiv.org/abs/2106.15282): why to corrupt the coarse input.
- Next: [9. Fine-tuning the decoder](09_decoder_finetuning.ipynb).
"""
