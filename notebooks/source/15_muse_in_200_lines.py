# %% [markdown]
r"""
# 15. Muse in 200 lines

*You write the parts of Muse yourself, train them, and draw a picture of a kind that your model has never seen.*

|  |  |
|---|---|
| **Paper** | Muse 2.2, 2.3, 2.6, 2.7, 2.8 |
| **You will learn** | to write a quantizer, a training loop, attention, a layer, the masked loss, decoding and guidance |
| **Before this** | notebooks [3](03_vqgan.ipynb) to [7](07_parallel_decoding.ipynb); PyTorch |
| **Takes** | @takes@; about 4 hours of your time |
| **Files** | all of them: [`vqgan.py`](../minimuse/vqgan.py), [`masking.py`](../minimuse/masking.py), [`transformer.py`](../minimuse/transformer.py), [`cfg.py`](../minimuse/cfg.py), [`sampler.py`](../minimuse/sampler.py) |
"""

# %% knobs
import math
import os
import random

import matplotlib.pyplot as plt
import numpy as np
import torch
from checks import (
    check_attention,
    check_decode,
    check_guide,
    check_masked_loss,
    check_nearest,
    check_random_mask,
    check_straight_through,
)
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional as F
from view import animation, film_strip, show, style

from minimuse.plots import grid
from minimuse.utils import to_pil

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer steps
SCENES = 200 if FAST else 3000  # pictures to train on
TOKENIZER_STEPS = 20 if FAST else 800
MUSE_STEPS = 20 if FAST else 700
BATCH = 8 if FAST else 32
style()
torch.manual_seed(0)


def passed(verdict):
    """Stop here if a check has failed."""
    assert verdict, verdict
    return verdict


# %% [markdown]
r"""
There are two versions of this notebook. In
[`15_muse_in_200_lines_yours`](15_muse_in_200_lines_yours.ipynb) the bodies are blank: **write there**. In
[`15_muse_in_200_lines`](15_muse_in_200_lines.ipynb) they are filled in: look there when you are stuck.

Work from top to bottom. Each part has a text, a cell with blanks, and a cell that checks what you wrote. A check stops with
a message that says what is wrong. Repair it before you go on, because later parts call earlier ones.

Use nothing of `minimuse` for your own code, only PyTorch. We use it here for checks and for showing pictures.
"""

# %% [markdown]
r"""
## 0. The world

Our pictures show a house. Its walls have one of five colours. There is a tree or none, and it is day or night. All positions
are random. The caption says the colour, the tree and the night, but no position.
"""

# %%
WALLS = {
    "red": (214, 60, 50),
    "yellow": (242, 200, 60),
    "white": (240, 236, 226),
    "pink": (236, 140, 170),
    "blue": (70, 120, 220),
}
DAY, NIGHT, LEAVES = (130, 200, 250), (24, 28, 66), (34, 150, 70)
SIZE = 32


def draw(color, tree, night, rng):
    """One picture of a house, SIZE x SIZE pixels. It is drawn four times as large, so that edges are smooth."""
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), NIGHT if night else DAY)
    pen, left = ImageDraw.Draw(image), rng.choice([True, False])

    def put(shape, fill, *points):
        getattr(pen, shape)([4 * p for p in points], fill=fill)

    x = rng.randint(2, 6) if left else rng.randint(12, 16)
    sun = rng.randint(22, 27) if left else rng.randint(5, 10)
    put("ellipse", (240, 240, 215) if night else (255, 220, 60), sun - 4, 3, sun + 4, 11)
    if night:  # a dark disc makes a crescent of the moon
        put("ellipse", NIGHT, sun - 1, 2, sun + 6, 10)
    put("rectangle", (40, 90, 50) if night else (110, 190, 80), 0, 26, SIZE, SIZE)
    put("rectangle", WALLS[color], x, 16, x + 14, 28)
    put("polygon", (120, 60, 40), x - 2, 16, x + 7, 7, x + 16, 16)
    put("rectangle", (90, 50, 30), x + 8, 21, x + 12, 28)
    put("rectangle", (255, 230, 120) if night else (70, 90, 110), x + 2, 19, x + 6, 23)
    if tree:
        at = rng.randint(22, 27) if left else rng.randint(5, 8)
        put("rectangle", (100, 65, 40), at - 1, 22, at + 1, 28)
        put("ellipse", LEAVES, at - 4, 13, at + 4, 23)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def caption(color, tree, night):
    return f"a {color} house" + " with a tree" * tree + " at night" * night


ALL = [(c, t, n) for n in (False, True) for t in (False, True) for c in WALLS]
grid([draw(*s, random.Random(i)) for i, s in enumerate(ALL)], [caption(*s) for s in ALL], 5, 4)

# %% [markdown]
r"""
We hide one combination from training: **a pink house with a tree at night**. Pink houses, trees and nights all occur in
training, but never these three together. At the end we ask for exactly this picture.
"""

# %%
SECRET = ("pink", True, True)
rng = random.Random(0)
scenes = [rng.choice([s for s in ALL if s != SECRET]) for _ in range(SCENES)]
pixels = np.stack([draw(*s, rng) for s in scenes])  # (SCENES, SIZE, SIZE, 3) of 0 to 255
images = torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1  # (SCENES, 3, SIZE, SIZE) in [-1, 1]
captions = [caption(*s) for s in scenes]
print(tuple(images.shape), captions[:3])

# %% [markdown]
r"""
Muse reads its captions with a frozen language model. Ours is tiny: each word has a random vector that is never trained. The
first entry is the same in all captions. Without a text only this entry is left. Shorter captions are filled up, and `may` says
where words are.
"""

# %%
WORDS = sorted({word for s in ALL for word in caption(*s).split()})
VECTORS = torch.randn(len(WORDS) + 1, 32, generator=torch.Generator().manual_seed(0))
LENGTH = 1 + max(len(caption(*s).split()) for s in ALL)


def read(captions):
    """Captions -> embeddings (B, LENGTH, 32), may (B, LENGTH) bool: True where a word is."""
    rows = [[0] + [1 + WORDS.index(word) for word in text.split()] for text in captions]
    may = torch.tensor([[i < len(row) for i in range(LENGTH)] for row in rows])
    return VECTORS[torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])], may


text, may = read(captions)
print(WORDS, tuple(text.shape))

# %% [markdown]
r"""
## 1. The quantizer

An encoder turns a picture into $8 \times 8$ vectors $z$. The quantizer replaces each vector by the nearest of $V$ codes $e_k$. The
number $k$ of that code is the token:

$$k(z) = \arg\min_k \lVert z - e_k \rVert^2 .$$
"""

# %% [markdown]
r"""
### Exercise 15.1: the quantizer

*Difficulty 2 of 3, about 30 minutes.*

Write three functions:

1. `nearest`: $z$ of shape $(B, d, h, w)$ and codes $(V, d)$ give tokens $(B, h w)$, row by row.
2. `straight_through`: the value is $q$, but the gradient goes to $z$ as if nothing had happened.
3. `quantizer_loss`: $\lVert \mathrm{sg}(z) - q \rVert^2 + 0.25\, \lVert z - \mathrm{sg}(q) \rVert^2$, each as a mean over all numbers. The first term moves the codes, the
   second moves the encoder. $\mathrm{sg}$ means: no gradient goes through here.

<details><summary>Hint</summary>

`torch.cdist` gives all distances of two lists of vectors. Move $d$ to the end first: `z.flatten(2).transpose(1, 2)`.
`x.detach()` is $\mathrm{sg}(x)$. For the second function, add to $z$ a difference that carries no gradient.

</details>
"""


# %%
def nearest(z, codes):
    """z (B, d, h, w), codes (V, d) -> tokens (B, h*w)"""
    ### BEGIN SOLUTION
    vectors = z.flatten(2).transpose(1, 2)  # (B, h*w, d)
    return torch.cdist(vectors, codes.expand(len(z), -1, -1)).argmin(2)
    ### END SOLUTION


def straight_through(z, q):
    """z, q of one shape -> the value of q with the gradient of z"""
    ### BEGIN SOLUTION
    return z + (q - z).detach()
    ### END SOLUTION


def quantizer_loss(z, q):
    """z, q of one shape -> (), codebook loss + 0.25 times commitment loss"""
    ### BEGIN SOLUTION
    return F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
    ### END SOLUTION


# %%
# Check of exercise 15.1
print(passed(check_nearest(nearest)))
print(passed(check_straight_through(straight_through)))
z, q = torch.tensor([1.0, 1.0], requires_grad=True), torch.tensor([3.0, 3.0], requires_grad=True)
loss = quantizer_loss(z, q)
assert loss is not None, "quantizer_loss returns nothing: is its body still to be written?"
assert loss.shape == (), (
    f"quantizer_loss has shape {tuple(loss.shape)}; expected one number, a mean"
)
assert loss.item() == 5, f"z = 1 and q = 3 cost {loss.item():g}; expected 4 + 0.25 * 4 = 5"
to_z, to_q = torch.autograd.grad(loss, (z, q), allow_unused=True)
assert to_z is not None, "no gradient reaches z: the second term must not detach z"
assert to_q is not None, "no gradient reaches q: the first term must not detach q"
assert to_q.tolist() == [2, 2], (
    f"q gets the gradient {to_q.tolist()}; expected [2, 2], from the first term only"
)
assert to_z.tolist() == [-0.5, -0.5], (
    f"z gets {to_z.tolist()}; expected [-0.5, -0.5], from the second term only"
)
print("quantizer_loss: value and both gradients are right")

# %% [markdown]
r"""
Here is the tokenizer around your quantizer. Two convolutions of stride 2 make $8 \times 8$ vectors of $32 \times 32$ pixels. The decoder
does the reverse. We write these layers for you, because they teach nothing about Muse.
"""

# %%
CODES, DIM = 256, 8


class Tokenizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(32, 64, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(64, 64, 3, 1, 1), nn.SiLU(), nn.Conv2d(64, DIM, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(DIM, 64, 3, 1, 1), nn.SiLU(),
            nn.Conv2d(64, 64, 3, 1, 1), nn.SiLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1),
        )  # fmt: skip
        self.codes = nn.Parameter(torch.randn(CODES, DIM))

    def encode(self, images):
        return nearest(self.encoder(images), self.codes)  # (B, 64) tokens

    def look_up(self, tokens):
        return self.codes[tokens].transpose(1, 2).unflatten(2, (SIZE // 4, SIZE // 4))

    def decode(self, tokens):
        return self.decoder(self.look_up(tokens))

    def loss(self, images, with_codes=True):
        z = self.encoder(images)
        q = self.look_up(nearest(z, self.codes)) if with_codes else z
        again = self.decoder(straight_through(z, q))
        return F.l1_loss(again, images) + F.mse_loss(again, images) + quantizer_loss(z, q)


# %% [markdown]
r"""
## 2. The training loop
"""

# %% [markdown]
r"""
### Exercise 15.2: the loop

*Difficulty 1 of 3, about 15 minutes.*

Write the body of the loop. `loss()` computes the loss of a fresh batch. In each step: compute the loss, clear the old
gradients, compute the new ones, let the optimizer move the parameters, and append the loss as a plain number to `losses`. The same loop
trains both networks.

<details><summary>Hint</summary>

Four calls: `optimizer.zero_grad()`, `.backward()`, `optimizer.step()`, `.item()`. Gradients add up in PyTorch, so clear them
before each `backward`.

</details>
"""


# %%
def train(parameters, loss, steps, learning_rate):
    """Minimize loss() -> the loss of each step, a list of numbers."""
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.05, steps
    )  # smaller and smaller steps
    losses = []
    for _ in range(steps):
        ### BEGIN SOLUTION
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
        ### END SOLUTION
        decay.step()
    return losses


# %%
# Check of exercise 15.2
weight, seen = nn.Parameter(torch.tensor(5.0)), []
weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.item()))
losses = train([weight], lambda: 2 * weight, 3, 0.1)
assert losses, "losses is empty: is the body of the loop still to be written?"
assert len(seen) == 3, f"backward ran {len(seen)} times in 3 steps; expected once in each step"
assert seen[1] != 4, (
    "the second gradient is twice as large as the first: call optimizer.zero_grad()"
)
assert weight.item() != 5, "the weight has not moved: call optimizer.step() after backward"
assert weight.item() < 4.9, "the weight has hardly moved: do not clear the gradients before step"
assert len(losses) == 3, f"{len(losses)} losses for 3 steps; expected one for each step"
assert all(isinstance(v, float) for v in losses), (
    "losses holds tensors: append value.item(), a plain number"
)
assert losses[0] == 10, (
    f"the first loss is {losses[0]:g}; expected 10, computed before the weight moves"
)
print("train: steps, gradients and losses are right")

# %% [markdown]
r"""
Now train the tokenizer. At first it has no codes: $q = z$. When its vectors mean something, we choose the codes among them: each
further code is the vector that is farthest from all codes so far. So every colour and every edge gets one. Then your quantizer joins: the loss jumps, and falls again.
"""

# %%
tokenizer = Tokenizer()


def batch():
    return torch.randint(SCENES, (BATCH,))


def start_codes():
    vectors = tokenizer.encoder(images[:200]).transpose(1, -1).flatten(0, 2)  # (n, DIM)
    codes = vectors[:1]
    while len(codes) < CODES:
        farthest = torch.cdist(vectors, codes).amin(1).argmax()
        codes = torch.cat([codes, vectors[farthest, None]])
    tokenizer.codes.data.copy_(codes)


without_codes = lambda: tokenizer.loss(images[batch()], with_codes=False)  # noqa: E731
losses = train(tokenizer.parameters(), without_codes, TOKENIZER_STEPS // 4, 3e-3)
with torch.no_grad():
    start_codes()
losses += train(
    tokenizer.parameters(), lambda: tokenizer.loss(images[batch()]), TOKENIZER_STEPS, 3e-3
)
figure, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(losses)
ax.set(xlabel="step", ylabel="loss of the tokenizer", yscale="log")
plt.show()

# %% [markdown]
r"""
**Predict, then run.** Above: pictures. Below: the same pictures, as 64 tokens and back. What is lost first: colours, edges or small
objects?
"""

# %%
with torch.no_grad():
    tokens = torch.cat([tokenizer.encode(part) for part in images.split(100)])  # (SCENES, 64)
    again = tokenizer.decode(tokens[:6])
print(f"{tokens.unique().numel()} of {CODES} codes are in use")
grid(to_pil(images[:6]) + to_pil(again.clamp(-1, 1)), columns=6, scale=4)

# %% [markdown]
r"""
Edges get a little soft, and everything else is there. From now on a picture is a list of 64 numbers.
"""

# %%
if not FAST:
    assert (again - images[:6]).abs().mean() < 0.06, "tokens lose more than soft edges"
    assert tokens.unique().numel() > CODES / 4, "most codes are dead"

# %% [markdown]
r"""
## 3. Attention and a layer

A query $q$ of $d$ numbers compares itself with all keys $k$ and takes a weighted mean of the values $v$:

$$\operatorname{softmax}\big(q k^\top / \sqrt{d}\big)\, v .$$

In self-attention, queries, keys and values come from the tokens. In cross-attention, keys and values come from the text.
"""

# %% [markdown]
r"""
### Exercise 15.3: attention

*Difficulty 2 of 3, about 30 minutes.*

Write the formula. `may` is `True` where a key may be looked at. Do not call PyTorch's finished attention.

<details><summary>Hint</summary>

`q @ k.transpose(-1, -2)` has shape $(B, H, N, M)$. Put $-\infty$ where `may` is `False` (`masked_fill`), before the softmax over the
last axis.

</details>
"""


# %%
def attend(q, k, v, may):
    """q (B, H, N, d), k and v (B, H, M, d), may (B, 1, 1, M) bool -> (B, H, N, d)"""
    ### BEGIN SOLUTION
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~may, -math.inf).softmax(-1) @ v
    ### END SOLUTION


# %%
# Check of exercise 15.3
passed(check_attention(attend))

# %% [markdown]
r"""
### Exercise 15.4: a layer

*Difficulty 2 of 3, about 20 minutes.*

`Attention` projects its inputs and calls your function. Write the `forward` of the layer: self-attention, then cross-attention to the text,
then the MLP. Each of the three reads a normalized $x$ and is **added** to $x$.

<details><summary>Hint</summary>

Three lines of the form `x = x + part(norm(x), ...)`. In self-attention all tokens may be looked at: `may=None`.

</details>
"""

# %%
WIDTH, HEADS = 128, 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x, memory, may=None):
        """x (B, N, WIDTH), memory (B, M, WIDTH), may (B, M) bool or None: all -> (B, N, WIDTH)"""
        may = torch.ones(memory.shape[:2]).bool() if may is None else may
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)  # (B, H, N or M, d)
            for part in (self.q(x), self.k(memory), self.v(memory))
        )
        return self.out(attend(q, k, v, may[:, None, None]).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention, self.cross_attention = Attention(), Attention()
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x, text, may):
        """x (B, N, WIDTH), text (B, L, WIDTH), may (B, L) bool: True where a word is -> (B, N, WIDTH)"""
        ### BEGIN SOLUTION
        seen = self.norm1(x)
        x = x + self.self_attention(seen, seen)
        x = x + self.cross_attention(self.norm2(x), text, may)
        return x + self.mlp(self.norm3(x))
        ### END SOLUTION


# %%
# Check of exercise 15.4
torch.manual_seed(0)
layer, x, words = Layer(), torch.randn(1, 4, WIDTH), torch.randn(1, 3, WIDTH)
two_words = torch.tensor([[True, True, False]])
out = layer(x, words, two_words)
assert out is not None, "Layer.forward returns nothing: is its body still to be written?"
assert out.shape == x.shape, (
    f"a layer makes {tuple(out.shape)} of {tuple(x.shape)}; expected the same shape"
)


def change(of, at):
    """How much the last token changes when one entry of x or of the text becomes another."""
    other = {"x": x.clone(), "text": words.clone()}
    other[of][0, at] = torch.randn(WIDTH)
    return (layer(other["x"], other["text"], two_words) - out)[0, -1].abs().max()


assert change("x", 0) > 1e-4, (
    "the last token does not notice the first one: self-attention is missing"
)
assert change("text", 0) > 1e-4, "tokens do not notice the text: cross-attention is missing"
assert change("text", 2) < 1e-5, (
    "an empty place of the text changes the result: give may to cross-attention"
)
for name in ("self_attention.out", "cross_attention.out", "mlp.2"):
    layer, part = Layer(), name.split(".")[0]
    before = layer(x, words, two_words)
    layer.get_submodule(name).weight.data.zero_()
    assert not before.equal(layer(x, words, two_words)), f"{part} has no effect on the result"
for name in (
    "self_attention.out",
    "cross_attention.out",
    "mlp.2",
):  # of the last layer; all are off now
    for p in layer.get_submodule(name).parameters():
        p.data.zero_()
same = torch.allclose(layer(x, words, two_words), x)
assert same, (
    "with all three parts at zero, x should pass unchanged: add each part to x, and do not normalize x itself"
)
large = 100 * torch.randn(1, 4, WIDTH)
assert (Layer()(large, words, two_words) - large).abs().max() < 10, (
    "a part reads x without its norm"
)
print("Layer: residuals, both attentions, the MLP and the mask are right")

# %% [markdown]
r"""
The transformer stacks three of your layers. Its input is a grid of tokens. One more embedding stands for `[MASK]`. Its output is a score
(logit) for each code at each position.
"""

# %%
MASK, N = CODES, (SIZE // 4) ** 2


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CODES + 1, WIDTH)
        self.position = nn.Parameter(torch.randn(N, WIDTH))
        self.text = nn.Linear(32, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CODES)

    def forward(self, tokens, text, may):
        """tokens (B, N), text (B, L, 32), may (B, L) -> logits (B, N, CODES)"""
        x, text = self.embed(tokens) + self.position, self.text(text)
        for layer in self.layers:
            x = layer(x, text, may)
        return self.head(self.norm(x))


# %% [markdown]
r"""
## 4. The masked loss

Training hides a random fraction $r$ of the tokens of each picture and asks the model for them. Muse draws $r = \cos(\frac{\pi}{2} u)$ with
$u$ uniform in $[0, 1]$. This makes high rates frequent: nearly everything is hidden, as at the beginning of a drawing.
"""

# %% [markdown]
r"""
### Exercise 15.5: hide and ask

*Difficulty 2 of 3, about 30 minutes.*

1. `random_mask`: in each row hide exactly $\lceil r N \rceil$ random positions. `True` means hidden. All random numbers come from
   `torch.rand(..., generator=generator)`.
2. `masked_loss`: the mean cross-entropy over the hidden tokens of the whole batch, 0 if there are none.

<details><summary>Hint</summary>

Give each position a random number and hide those with the smallest ones: `noise.argsort(1).argsort(1)` is the rank of each. For the
loss, `logits[masked]` has shape (number of hidden tokens, V). The mean of nothing is not a number, so divide a sum by the
count, which is at least 1 (`clamp`).

</details>
"""


# %%
def random_mask(tokens, rate, generator=None):
    """tokens (B, N), rate (B,) -> (B, N) bool, True = hidden"""
    ### BEGIN SOLUTION
    rank = torch.rand(tokens.shape, generator=generator).argsort(1).argsort(1)
    return rank < (rate * tokens.shape[1]).ceil()[:, None]
    ### END SOLUTION


def masked_loss(logits, targets, masked):
    """logits (B, N, V), targets (B, N), masked (B, N) bool -> (), nats per hidden token"""
    ### BEGIN SOLUTION
    total = F.cross_entropy(logits[masked], targets[masked], reduction="sum")
    return total / masked.sum().clamp(min=1)
    ### END SOLUTION


# %%
# Check of exercise 15.5
print(passed(check_random_mask(random_mask)))
print(passed(check_masked_loss(masked_loss)))

# %% [markdown]
r"""
Now train Muse. One caption in ten is taken away, so that the model also learns to draw without a text. Guidance needs that.

**Predict, then run.** At the start the model knows nothing: all 256 codes are equally likely. What is the loss of the first step, in nats
(with the natural logarithm)?
"""

# %%
model = Transformer()


def muse_loss():
    rows = batch()
    rate = torch.cos(math.pi / 2 * torch.rand(BATCH))
    masked = random_mask(tokens[rows], rate)
    may_see = may[rows].clone()
    may_see[torch.rand(BATCH) < 0.1, 1:] = False  # no text
    logits = model(tokens[rows].masked_fill(masked, MASK), text[rows], may_see)
    return masked_loss(logits, tokens[rows], masked)


losses = train(model.parameters(), muse_loss, MUSE_STEPS, 1.5e-3)
figure, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(losses, lw=1)
ax.axhline(math.log(CODES), ls="--", color="black", lw=1)
ax.set(xlabel="step", ylabel="masked loss, nats", title="dashed: log 256, all codes equally likely")
plt.show()
print(
    f"first step {losses[0]:.2f} nats, last steps {sum(losses[-10:]) / 10:.2f}; log 256 = {math.log(CODES):.2f}"
)

# %%
assert abs(losses[0] - math.log(CODES)) < 0.8, "the first loss is far from log 256"
if not FAST:
    assert sum(losses[-50:]) / 50 < 1.7, "the model has learned too little: is a part above wrong?"

# %% [markdown]
r"""
## 5. Guidance

The model gives logits with the text, $l_c$, and without it, $l_u$. Guidance goes further in the direction of the text, with a strength $t$:

$$l_g = (1 + t)\, l_c - t\, l_u .$$
"""

# %% [markdown]
r"""
### Exercise 15.6: guidance

*Difficulty 1 of 3, about 5 minutes.*

Write the formula.

<details><summary>Hint</summary>

With $t = 0$ nothing of $l_u$ is left. With $l_c = l_u$ the result is $l_c$.

</details>
"""


# %%
def guide(cond, uncond, t):
    """Logits with the text, logits without, strength t -> guided logits"""
    ### BEGIN SOLUTION
    return cond + t * (cond - uncond)
    ### END SOLUTION


# %%
# Check of exercise 15.6
passed(check_guide(guide))

# %% [markdown]
r"""
## 6. Decoding

We start with 64 hidden tokens. In each step the model predicts all of them at once. We draw one code for each hidden position, and keep those
that the model was most sure of. The others are hidden again. After step $i$ of $T$,
$\lfloor N \cos(\frac{\pi}{2} \frac{i + 1}{T}) \rfloor$ tokens are still hidden ($i$ counts from 0).
"""

# %% [markdown]
r"""
### Exercise 15.7: parallel decoding

*Difficulty 3 of 3, about 45 minutes.*

Write the body of the loop. `logits_fn(tokens, u)` gives logits $(B, N, V)$ at progress $u = i / T$. What is revealed stays. `yield`
the tokens after each step.

<details><summary>Hint</summary>

`torch.multinomial` draws from rows of probabilities, so flatten $(B, N, V)$ to $(B N, V)$. `probs.gather(2, drawn[..., None])` is the probability of
what was drawn. Give revealed positions the confidence $\infty$. Then hide the positions with the lowest confidence: their rank is
below the number that stays hidden.

</details>
"""


# %%
def decode(logits_fn, tokens, *, mask_id, steps, generator=None):
    """tokens (B, N), mask_id where hidden -> yields tokens (B, N) after each step"""
    for i in range(steps):
        ### BEGIN SOLUTION
        hidden = tokens == mask_id
        probs = logits_fn(tokens, i / steps).softmax(-1)
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(tokens.shape)
        confidence = probs.gather(2, drawn[..., None])[..., 0].masked_fill(~hidden, math.inf)
        stay = math.floor(tokens.shape[1] * math.cos(math.pi / 2 * (i + 1) / steps))
        again = hidden & (confidence.argsort(1).argsort(1) < stay)  # these are hidden again
        tokens = torch.where(hidden, drawn, tokens).masked_fill(again, mask_id)
        yield tokens
        ### END SOLUTION


# %%
# Check of exercise 15.7
passed(check_decode(decode))

# %% [markdown]
r"""
## 7. The picture

All parts are yours now. This cell puts them together and draws the combination that training never showed. A `temperature` below 1 makes
likely codes likelier (notebook 7).
"""


# %%
def paint(prompts, steps=8, t=1.0, temperature=0.5, seed=0):
    """Prompts -> the tokens (B, N) after each step"""
    text, may = read(prompts)
    nothing = may & (torch.arange(LENGTH) == 0)

    def logits_fn(tokens, u):
        both = model(
            torch.cat([tokens, tokens]), torch.cat([text, text]), torch.cat([may, nothing])
        )
        return guide(*both.chunk(2), t) / temperature

    start = torch.full((len(prompts), N), MASK)
    with torch.no_grad():
        yield from decode(
            logits_fn,
            start,
            mask_id=MASK,
            steps=steps,
            generator=torch.Generator().manual_seed(seed),
        )


def pictures(tokens):
    """Tokens (B, N) -> PIL images; hidden tokens are gray."""
    hidden = (tokens == MASK).view(-1, 1, SIZE // 4, SIZE // 4)
    with torch.no_grad():
        pixels = tokenizer.decode(tokens.masked_fill(tokens == MASK, 0)).clamp(-1, 1)
    return to_pil(torch.where(hidden.repeat_interleave(4, 2).repeat_interleave(4, 3), 0.0, pixels))


wish = caption(*SECRET)
drawn = list(paint([wish] * 6))
pictures(drawn[-1])[0].resize((8 * SIZE, 8 * SIZE), Image.Resampling.NEAREST)

# %% [markdown]
r"""
**A pink house with a tree at night**, drawn by a model that you wrote and trained in minutes. Training never showed it such a picture. This is
the film of its drawing:
"""

# %%
frames = [pictures(step)[0] for step in drawn]
film_strip(frames, [f"step {i + 1}" for i in range(len(frames))], scale=4)

# %%
animation(frames, ms=400)

# %% [markdown]
r"""
Five more pictures of the same prompt, then one picture of each prompt. Nothing is selected. Do the five resemble each other more than training
pictures do? The open question at the end comes back to that.
"""

# %%
grid(pictures(drawn[-1])[1:], [f"row {i}" for i in range(1, 6)], columns=5, scale=5)

# %%
*_, everything = paint([caption(*s) for s in ALL], seed=1)
grid(pictures(everything), [caption(*s) for s in ALL], columns=5, scale=4)

# %% [markdown]
r"""
How many are right? A simple test looks at the pixels: which wall colour covers most of them, are there leaves, and is the sky dark?
"""


# %%
def right(image, scene):
    """Does a picture show what its scene says?"""
    color, tree, night = scene
    pixels = torch.tensor(np.array(image)).flatten(0, 1).float()

    def covers(rgb, within=45):
        return ((pixels - torch.tensor(rgb).float()).norm(dim=1) < within).sum().item()

    walls = max(WALLS, key=lambda name: covers(WALLS[name]))
    return (
        walls == color
        and (covers(LEAVES, 30) > 25) == tree
        and (covers(NIGHT) > covers(DAY)) == night
    )


def fraction_right(scene, n=40, **settings):
    *_, last = paint([caption(*scene)] * n, **settings)
    return sum(right(image, scene) for image in pictures(last)) / n


originals = sum(right(image, s) for image, s in zip(to_pil(images[:100]), scenes, strict=False))
known = sum(fraction_right(s, n=4) for s in ALL) / len(ALL)
secret = fraction_right(SECRET)
print(
    f"training pictures: {originals}%; all prompts: {known:.0%}; the hidden combination: {secret:.0%}"
)

# %%
assert originals >= 98, "the test itself is wrong too often"
if not FAST:
    assert known > 0.5, "most pictures do not show what was asked for"
    assert secret > 0.4, "the hidden combination is mostly wrong"

# %% [markdown]
r"""
## What failure looks like

Two settings break the drawing, although all parts are right. On the left everything is drawn in **one step**: no token sees another one, so
positions do not agree. In the middle the text is missing: **$t = -1$** leaves only $l_u$, and the colour is random. On the right are the settings
from above.
"""

# %%
broken = [list(paint([wish] * 4, **s))[-1] for s in ({"steps": 1}, {"t": -1.0}, {})]
names = ["one step", "no text", "8 steps, t = 1"]
grid([pictures(b)[i] for i in range(4) for b in broken], names * 4, columns=3, scale=4)

# %%
one_step, no_text = fraction_right(SECRET, steps=1), fraction_right(SECRET, t=-1.0)
print(f"right: one step {one_step:.0%}, no text {no_text:.0%}, 8 steps with text {secret:.0%}")
if not FAST:
    assert no_text < secret - 0.2, "the text is not needed"

# %% [markdown]
r"""
## What the package does in addition

The package has the same parts, ready for large models: a real language model, a second transformer for large pictures, perceptual and adversarial losses, memory-saving attention,
checkpoints, editing. Compare its sampler with yours:
"""

# %%
from minimuse.sampler import decode as package_decode

show(package_decode)

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

Change one thing and measure `fraction_right` again: the number of steps, $t$, the temperature, `BATCH`, the rate of dropped captions, or another hidden
combination. Write down your prediction first. Is the difference larger than what another seed makes? And which of them makes pictures of one prompt more
varied?
"""

# %% [markdown]
r"""
## Summary

- A tokenizer turns a picture into 64 numbers. Its quantizer takes the nearest code, and the gradient goes straight through.
- The transformer sees some tokens and the text, and gives a probability to each code at each hidden position.
- Training hides a random fraction of the tokens; the loss counts the hidden ones only.
- Decoding starts with all hidden, and reveals the most confident tokens first, more and more per step. Guidance strengthens the text.
- With about 200 lines and a few minutes of training, the model combines words that it never saw together.
"""

# %% [markdown]
r"""
## Further reading

- Chang et al. 2023, *Muse*, [arXiv 2301.00704](https://arxiv.org/abs/2301.00704); Chang et al. 2022, *MaskGIT*, [arXiv 2202.04200](https://arxiv.org/abs/2202.04200).
- Next: [8. Super-resolution](08_super_resolution.ipynb), the part that is missing here.
"""
