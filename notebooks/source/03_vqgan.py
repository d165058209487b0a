# %% [markdown]
r"""
# 3. VQGAN: pictures into tokens and back

*A transformer predicts one of finitely many classes. This notebook turns pictures into such classes: what a codebook is,
how a gradient gets past it, and what each term of the loss is for.*

|  |  |
|---|---|
| **Paper** | Muse 2.2 and A.2; [VQGAN](https://arxiv.org/abs/2012.09841) |
| **You will learn** | nearest codes · the straight-through gradient · dead codes · what pixel, perceptual and adversarial losses do |
| **Before this** | [1. The tour](01_tour.ipynb); convolutions; training a network by gradient descent; symbols are in the [glossary](glossary.md) |
| **Takes** | @takes@; about 75 minutes of your time |
| **Files** | [`vqgan.py`](../minimuse/vqgan.py), [`vqgan_loss.py`](../minimuse/vqgan_loss.py) |
"""

# %% knobs
import math
import os
from dataclasses import replace

import diagrams
import matplotlib.pyplot as plt
import torch
from checks import check_nearest, check_straight_through
from view import show, style

from minimuse import Muse
from minimuse.data_sources import SceneDataset
from minimuse.plots import grid
from minimuse.utils import area_downsample, to_float, to_pil

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer steps
CHECKPOINT = "nano"  # a shipped name or a folder
SCENES = 96 if FAST else 1000  # rendered for training and for the statistics
STEPS = 25 if FAST else 400  # of each tokenizer that is trained here
style()

# %% [markdown]
r"""
A picture is a great many numbers, most of them predictable from their neighbours. A transformer's attention looks at all pairs
of inputs, so few inputs are wanted, and its last layer gives a probability to each of finitely many
choices. A **tokenizer** provides both: an encoder makes a small grid of vectors out of the picture, each vector is
replaced by the nearest of $V$ learned ones, and the number of that one is the **token**.
"""

# %%
muse = Muse.from_pretrained(CHECKPOINT)
for name, tokenizer, size in (
    ("low", muse.low_tokenizer, muse.config.low_tokenizer.image_size),
    ("high", muse.high_tokenizer, muse.config.high_tokenizer.image_size),
):
    f, v = tokenizer.downsampling, tokenizer.codebook_size
    n = (size // f) ** 2
    print(f"{name:>4}: {size} px, f = {f}: {n} tokens, each one of {v} codes")
    print(f"      {3 * 8 * size**2:,} bits of pixels become {n * math.log2(v):,.0f} bits of tokens")

# %% [markdown]
r"""
## 1. The encoder: a picture shrinks

$f$ is the downsampling: one token for each $f \times f$ pixels. Residual blocks work at each resolution, and a convolution of
stride 2 halves the sides in between. There is no attention in it: Muse removes the one that VQGAN had, so
pictures of any size pass.
"""

# %%
from minimuse.vqgan import Decoder, Encoder, ResBlock, up_block

show(Encoder)

# %%
size = muse.config.high_tokenizer.image_size
data = SceneDataset(SCENES, size, split="train", seed=3)
images = data.images()  # (SCENES, 3, H, W) uint8
x = to_float(images[:1])
print(f"{'image':>10}: {tuple(x.shape)}")
with torch.inference_mode():
    for layer in muse.high_tokenizer.encoder.layers:
        x = layer(x)
        print(f"{type(layer).__name__:>10}: {tuple(x.shape)}")

# %% [markdown]
r"""
The last line is $z$: one vector of only $d$ numbers for each token. The decoder mirrors the
encoder. Here are a residual block and a level of the decoder:
"""

# %%
show(ResBlock, up_block, Decoder.forward)

# %%
f = muse.high_tokenizer.downsampling
with torch.inference_mode():
    for h, w in ((size, size), (size, 2 * size), (size // 2, size)):
        tokens = muse.high_tokenizer.encode(torch.zeros(1, 3, h, w))
        again = muse.high_tokenizer.decode(tokens, grid=(h // f, w // f))
        print(f"{h} x {w} pixels -> {tokens.shape[1]} tokens -> {tuple(again.shape)}")

# %% [markdown]
r"""
## 2. The codebook: the nearest of $V$ vectors

With $e_1, \dots, e_V$ the codes, the token of a vector $z$ is

$$k(z) = \arg\min_k \lVert z - e_k \rVert^2 = \arg\min_k \big( \lVert e_k \rVert^2 - 2\, z \cdot e_k \big),$$

since $\lVert z \rVert^2$ is the same for all $k$. The second form is one matrix product.
"""

# %%
from minimuse.vqgan import VectorQuantizer

show(VectorQuantizer.nearest)

# %% [markdown]
r"""
In two dimensions it can be drawn. Each code owns the region of all points that are nearer to it than to any other;
every point of a region becomes the same token.
"""

# %%
torch.manual_seed(1)
flat = VectorQuantizer(12, 2)
side = 120
line = torch.linspace(-2.5, 2.5, side)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"))[None]  # (1, 2, side, side)
with torch.inference_mode():
    owner = flat.nearest(plane).view(side, side)
figure, ax = plt.subplots(figsize=(4, 3.6))
ax.imshow(owner, extent=(-2.5, 2.5, -2.5, 2.5), origin="lower", cmap="tab20", alpha=0.5)
ax.plot(*flat.codebook.detach().T, "k.", ms=9)
ax.set(xlabel="z, first number", ylabel="z, second number", title="12 codes and what they own")
ax.grid(False)
plt.show()

# %% [markdown]
r"""
### Exercise 3.1: the nearest code

*Difficulty 2 of 3, about 20 minutes.*

Write it for $z$ of shape $(B, d, h, w)$ and a codebook $(V, d)$: tokens $(B, hw)$, row by row. Mind where $d$ stands in $z$. The stub
takes the largest product; the check shows where that goes wrong.

<details><summary>Hint</summary>

The nearest code has the smallest distance, and a long code has large products with everything. Which term of the formula above does the
stub leave out? It is one number for each code.

</details>
"""


# %%
def my_nearest(z, codebook):
    flat = z.flatten(2).transpose(1, 2)  # (B, h*w, d)
    return (flat @ codebook.T).argmax(-1)  # your code


check_nearest(my_nearest)


# %% tags=["solution"]
def my_nearest(z, codebook):
    flat = z.flatten(2).transpose(1, 2)  # (B, h*w, d)
    return (codebook.square().sum(1) - 2 * flat @ codebook.T).argmin(-1)


check_nearest(my_nearest)

# %% [markdown]
r"""
### What do the codes of a trained tokenizer look like?

The decoder turns codes into pixels, so we give it a small grid filled with only one code, and keep the middle of the picture. Sorted by
brightness, this is the alphabet that the base model writes with.
"""

# %%
with torch.inference_mode():
    v, f = muse.low_tokenizer.codebook_size, muse.low_tokenizer.downsampling
    nine = muse.low_tokenizer.decode(torch.arange(v)[:, None].expand(v, 9))  # 3 x 3 times each code
alone = nine[:, :, f : 2 * f, f : 2 * f]
patches = alone[alone.mean((1, 2, 3)).argsort(descending=True)]
columns = 32
sheet = patches.view(-1, columns, 3, f, f).permute(2, 0, 3, 1, 4).reshape(3, -1, columns * f)
to_pil(sheet[None])[0].resize((columns * 28, sheet.shape[1] * 28 // f), 0)

# %% [markdown]
r"""
Sky, floor, shadows, and the colours of objects in light and shade; many look nearly the same. A code has no fixed look: the decoder
reads a token together with its neighbours.

**Predict, then run.** We change a single token in the middle of a picture and decode again. Which pixels change: the
$f \times f$ of that token, a neighbourhood, or all of them?
"""

# %%
held_out = to_float(SceneDataset(8, size, split="test", seed=5).images())
low = area_downsample(held_out, size // muse.config.low_tokenizer.image_size)
g, most = muse.config.base.grid, int(alone.std(1).mean((1, 2)).argmax())  # the most colourful code
with torch.inference_mode():
    tokens = muse.low_tokenizer.encode(low[:1])
    changed = tokens.clone()
    changed[0, (g // 2) * g + g // 2] = most
    before, after = muse.low_tokenizer.decode(tokens), muse.low_tokenizer.decode(changed)
difference = (after - before).abs().amax(1)[0]
figure, axes = plt.subplots(1, 3, figsize=(8, 2.8))
pictures = {"before": to_pil(before)[0], "one token changed": to_pil(after)[0]}
for ax, (title, picture) in zip(
    axes, (pictures | {"change of a pixel": difference}).items(), strict=True
):
    ax.imshow(picture, cmap="magma")
    ax.set_title(title)
    ax.axis("off")
plt.show()

# %% [markdown]
r"""
A neighbourhood: most in the token's own square, and a rim around it, as far as the decoder's convolutions reach (the
normalization layers also spread a faint trace over the whole picture). So when a region is repainted, what is far from
it stays nearly as it is, and pixels just outside of its edge may change a little.
"""

# %% [markdown]
r"""
## 3. A gradient through a choice

The encoder should learn from the decoder's errors. But between them stands $\arg\min$: a small change of $z$ changes no
token, so the derivative is zero nearly everywhere.

The **straight-through** trick: forwards take the nearest code $q = e_k$; backwards pretend that it was $z$.

$$\text{codes} = z + \operatorname{sg}(q - z), \qquad \operatorname{sg} \text{ a constant for the gradient (stop-gradient).}$$

The value is $q$, since $z$ cancels; the derivative by $z$ is 1. In the diagram, follow the values from left to right, then the gradients back.
"""

# %%
diagrams.quantizer(muse.config)

# %%
from minimuse.vqgan import Quantized

show(VectorQuantizer.forward, Quantized)

# %%
z = torch.randn(1, 2, 1, 1, requires_grad=True)
quantized = flat.eval()(z)
quantized.codes.sum().backward()
rounded = lambda x: [round(v, 2) for v in x.detach().flatten().tolist()]  # noqa: E731
print("z", rounded(z), "-> code", rounded(quantized.codes))
print("gradient at z:", z.grad.flatten().tolist())
plain = flat.embed_code(flat.nearest(z), (1, 1))
print(
    "without the trick the code depends on",
    "the codebook alone" if plain.grad_fn is not None else "nothing",
)

# %% [markdown]
r"""
### Exercise 3.2: straight through

*Difficulty 1 of 3, about 10 minutes.*

Write it for any $z$ and $q$: the value is $q$; the gradient passes to $z$ unchanged, and none reaches $q$.

<details><summary>Hint</summary>

You want the value of one expression and the gradient of another. `detach()` makes a constant for the gradient: the diagram's formula has
one difference in it.

</details>
"""


# %%
def my_straight_through(z, q):
    return q  # your code: right forwards


check_straight_through(my_straight_through)


# %% tags=["solution"]
def my_straight_through(z, q):
    return z + (q - z).detach()


check_straight_through(my_straight_through)

# %% [markdown]
r"""
### What moves the codes, then?

The straight-through gradient never reaches them. Two more terms do the work, with $\beta = 0.25$:

$$\lVert \operatorname{sg}(z) - e_k \rVert^2 \;+\; \beta\, \lVert z - \operatorname{sg}(e_k) \rVert^2 .$$

The first, the *codebook loss*, pulls the chosen code towards the vectors that chose it, as k-means does. The second,
the *commitment loss*, holds the encoder near its codes. A code that nobody chooses gets no gradient at all, and
stays where it is for ever: a **dead code**. Ours start again at some vector of the batch when they have not been
used for twenty steps.
"""

# %%
torch.manual_seed(0)
centres = torch.randn(9, 2)
points = (centres.repeat(60, 1) + 0.08 * torch.randn(540, 2)).T[None, :, :, None]  # (1, 2, 540, 1)


def fit(restart):
    torch.manual_seed(3)
    quantizer = VectorQuantizer(9, 2).train()
    quantizer.codebook.data = 3.0 + 0.3 * torch.randn(9, 2)  # a bad start, far from all
    idle = quantizer.new_idle_counts()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        out = quantizer(points)
        out.codebook_loss.backward()
        optimizer.step()
        if restart:
            quantizer.restart_dead_codes(out.z, out.tokens, idle)
    return quantizer


# %%
from minimuse.train_log import codebook_usage

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for ax, restart in zip(axes, (False, True), strict=True):
    fitted = fit(restart)
    used, perplexity = codebook_usage(fitted.nearest(points), 9)
    ax.plot(*points[0, :, :, 0], ".", color="0.8", ms=3)
    ax.plot(*fitted.codebook.detach().T, "C3*", ms=11)
    name = "dead codes restart" if restart else "no restart"
    ax.set(title=f"{name}: {used:.0%} used, perplexity {perplexity:.1f}", xlabel="z, first number")
axes[0].set_ylabel("z, second number")
plt.show()

# %% [markdown]
r"""
Stars are codes, gray dots the vectors. On the left a few codes were nearest at first, took everything, and the rest
never moved. On the right all of them are in use.

**Perplexity** says how many codes are in use, if rare ones count less: $\exp\big(-\sum_k p_k \log p_k\big)$ with $p_k$ the fraction of tokens that are
$k$. It is $V$ if all are used equally often and 1 if one takes all. Watch it in training: no loss curve shows a collapsed codebook. Below,
the two tokenizers of the checkpoint: every code is in use, but the most common ones more than a hundred times as often as the rarest.
"""

# %%
show(codebook_usage)

# %%
with torch.inference_mode():
    some = to_float(images[: 64 if FAST else 256])
    codes = {
        "low": (
            muse.low_tokenizer,
            muse.low_tokenizer.encode(
                area_downsample(some, size // muse.config.low_tokenizer.image_size)
            ),
        ),
        "high": (muse.high_tokenizer, muse.high_tokenizer.encode(some)),
    }
figure, ax = plt.subplots(figsize=(7, 3))
for name, (tokenizer, tokens) in codes.items():
    used, perplexity = codebook_usage(tokens, tokenizer.codebook_size)
    share = torch.bincount(tokens.flatten(), minlength=tokenizer.codebook_size) / tokens.numel()
    ax.plot(
        share.sort(descending=True).values,
        label=f"{name}: {used:.0%} used, perplexity {perplexity:.0f}",
    )
ax.set(xlabel="codes, the most common first", ylabel="fraction of all tokens", yscale="log")
ax.legend()
plt.show()

# %% [markdown]
r"""
## 4. What comes back

**Predict, then run.** A picture goes through each tokenizer and back. What gets lost in the coarse one: the sky, colours, the shape of
small objects?
"""

# %%
from minimuse.eval_metrics import psnr

with torch.inference_mode():
    low_back = muse.low_tokenizer.decode(muse.low_tokenizer.encode(low))
    high_back = muse.high_tokenizer.decode(muse.high_tokenizer.encode(held_out))
count = 5
rows = [*to_pil(held_out[:count]), *to_pil(high_back[:count])]
rows += [p.resize((size, size), 0) for p in to_pil(low_back[:count])]
names = ["scene", "high and back", "low and back"]
print(
    f"PSNR: low {psnr(low, low_back).mean():.1f} dB, high {psnr(held_out, high_back).mean():.1f} dB"
)
grid(rows, [name for name in names for _ in range(count)], columns=count, scale=max(1, 128 // size))

# %% [markdown]
r"""
The sky survives. Small objects lose their shape: they are few tokens, so few that a cube looks like a cylinder. And colours shift:
gray becomes bluish, brown reddish. What a tokenizer loses, no transformer brings back. So measure it first: it limits all that follows.

PSNR is $10 \log_{10}(1 / \text{mean squared error})$ in decibels, for pixels from 0 to 1: three more is half the error. (The two numbers
above are of pictures of different sizes; do not compare them.) PSNR has a weakness, as we see now.
"""

# %% [markdown]
r"""
## 5. What should "near" mean?

A tokenizer is trained to give back what it got. But how is the difference of two pictures measured? Pixel by pixel,

$$\lVert x - \hat x \rVert_1 + 4\, \lVert x - \hat x \rVert_2^2 \quad\text{(means; the second term is our choice)}$$

has a weakness. Suppose an edge lies one or two pixels further to the left or to the right, and the code cannot say which. The best
answer *in the squared sense* is the average: a blur, which is not an edge at all. In the absolute sense it is the median: here an edge,
but probably in the wrong place.
"""

# %%
edge = lambda at: (torch.arange(16) >= at).float()  # noqa: E731
possible = torch.stack([edge(at) for at in (6, 7, 8, 9, 10)])
figure, ax = plt.subplots(figsize=(7, 2.6))
ax.plot(possible.T, color="0.75", drawstyle="steps-mid", lw=1)
ax.plot(possible.mean(0), "C0o-", label="least squares: their mean")
ax.plot(
    possible.median(0).values,
    "C1",
    drawstyle="steps-mid",
    label="least absolute error: their median",
)
ax.set(
    xlabel="pixel",
    ylabel="brightness",
    title="five edges that are equally likely, and the best single answers",
)
ax.legend(loc="upper left", fontsize=9)
plt.show()

# %% [markdown]
r"""
Two remedies. A **perceptual** loss compares not pixels but features: the activations of a network that was trained to recognize things.
What matters to that network has a large weight. The usual one, VGG, has to be downloaded;
ours is a small network that learns here which kinds of objects are in a scene.
"""

# %%
from minimuse.eval_metrics import feature_distance, lpips_distance
from minimuse.eval_networks import SceneFeatures, train_features
from minimuse.vqgan_loss import pixel_loss

show(SceneFeatures.forward, feature_distance, pixel_loss)

# %%
from minimuse.data_scenes import COLORS, SHAPES

pairs = [(color, shape) for color in COLORS for shape in SHAPES]
there = [{(thing.color, thing.shape) for thing in data.scene(i).things} for i in range(SCENES)]
kinds = torch.tensor(
    [[float(pair in things) for pair in pairs] for things in there]
)  # (SCENES, 24)
small = area_downsample(images, size // 32)  # 32 pixels: quick, and enough to see
features = train_features(small, kinds, steps=STEPS // 2)
perceptual = feature_distance(features)
print("for those who can download LPIPS and its VGG, the same socket:", lpips_distance.__name__)

# %% [markdown]
r"""
**Predict, then run.** A scene; the same scene a little paler; the same scene with its object in the other material; and
in another colour. Order the three changes by size: once for the pixel loss, and once for the features.
"""

# %%
from minimuse.data_scenes import MATERIALS, Scene, render, sample_scene

singles = [
    sample_scene(seed, split="test", n_things=1).things[0] for seed in range(16 if FAST else 64)
]


def drawn(change):
    """The scenes, each thing changed, at 32 pixels."""
    return area_downsample(render([Scene((change(thing),)) for thing in singles], 64), 2)


def next_of(value, values):
    return values[(values.index(value) + 1) % len(values)]


clear = drawn(lambda thing: thing)
others = {
    "paler": 0.85 * clear,
    "other material": drawn(lambda t: replace(t, material=next_of(t.material, MATERIALS))),
    "other colour": drawn(lambda t: replace(t, color=next_of(t.color, tuple(COLORS)))),
}
print(f"{'':>16}  {'pixel loss':>10}  {'perceptual':>10}")
with torch.inference_mode():
    for name, y in others.items():
        print(f"{name:>16}  {pixel_loss(y, clear):10.4f}  {perceptual(clear, y):10.4f}")
grid([to_pil(p[:1])[0] for p in (clear, *others.values())], ["a scene", *others], columns=4)

# %% [markdown]
r"""
For the pixel loss, paler is worse than a wrong material: every pixel changes a little. For the features it is next to
nothing, since it does not change what is in the picture. A wrong colour is worst for both. A perceptual loss measures what
its network was trained to distinguish, and does not see the rest. Choose the network accordingly.
"""

# %% [markdown]
r"""
The second remedy is an opponent. A **discriminator** looks at patches and learns to distinguish real ones from decoded ones;
the decoder is rewarded for fooling it. A blur is easy to recognize, so the decoder learns to avoid it. With $D$ the discriminator's
logit, high for real,

$$\mathcal{L}_D = \tfrac12\, \mathbb{E}\big[\max(0, 1 - D(x)) + \max(0, 1 + D(\hat x))\big], \qquad \mathcal{L}_G = -\lambda\, \mathbb{E}\, D(\hat x).$$

$\lambda$ is set anew at each step so that both terms have gradients of about the same size at the decoder's last layer. Muse then
gives the terms the weights 0.05 (perceptual) and 0.1 (adversarial).
"""

# %%
from minimuse.vqgan_loss import (
    PatchDiscriminator,
    VQGANLoss,
    adaptive_weight,
    hinge_discriminator,
    pyramid,
)

show(PatchDiscriminator, pyramid, hinge_discriminator, adaptive_weight, VQGANLoss.generator_loss)

# %%
opinion = PatchDiscriminator()(clear[:1])
print("a logit for each patch of 8 x 8 pixels:", tuple(clear[:1].shape), "->", tuple(opinion.shape))
real, fake = torch.tensor([3.0, 0.0]), torch.tensor([-2.0, 0.5])
print(
    f"hinge loss of real {real.tolist()}, fake {fake.tolist()}:",
    hinge_discriminator(real, fake).item(),
)

# %% [markdown]
r"""
## 6. Train three, watch them

Training is a generator: it yields a `Progress` at each step, with the metrics and the model, so a notebook can look at any moment. In
training encoder and decoder run in one pass: pictures in, pictures and `Quantized` out, with the two
losses of section 3. Large pictures may be cut to a random square first, the same for a whole batch: it costs less, and purely
convolutional networks take any size.
"""

# %%
from minimuse.train import random_crop
from minimuse.vqgan import VQGAN

side = muse.config.high_tokenizer.image_size // 2
cut = random_crop(held_out[:5], side, torch.Generator().manual_seed(0))
with torch.inference_mode():
    made, quantized = muse.high_tokenizer(cut)
print("pictures:", tuple(made.shape), {k: tuple(v.shape) for k, v in quantized._asdict().items()})
print(
    f"codebook loss {quantized.codebook_loss:.4f}, commitment loss {quantized.commitment_loss:.4f}"
)
show(VQGAN.forward, random_crop)

# %%
cuts = [*to_pil(cut), *to_pil(made.clamp(-1, 1))]
grid(cuts, ["a random square"] * 5 + ["and back"] * 5, columns=5, scale=max(1, 96 // side))

# %% [markdown]
r"""
Any size, but not any picture: a tokenizer trained on whole pictures has learned that the top is sky. It recognizes the border by its
zero padding, so it paints a line of sky at the top of a crop.

Now three tokenizers of the `nano` size for 32 pixels, which differ only in their loss, from the same start, on the same pictures.
"""

# %%
from minimuse.config import preset
from minimuse.train import train_tokenizer

config = preset("nano")
stage = replace(config.stages["low_tokenizer"], steps=STEPS)
weights = {
    "pixels": (0.0, 0.0),
    "+ perceptual": (1.0, 0.0),
    "+ perceptual, adversarial": (1.0, 0.1),
}
trained, curves = {}, {}
for name, (w_p, w_a) in weights.items():
    torch.manual_seed(0)
    how = replace(
        stage, perceptual_weight=w_p, adversarial_weight=w_a, adversarial_start=STEPS // 2
    )
    run = train_tokenizer(VQGAN(config.low_tokenizer), how, small, perceptual=perceptual)
    *_, last = seen = list(run)
    trained[name], curves[name] = last.model.eval(), [p.metrics for p in seen]
    print(f"{name:>26}: PSNR of the last batch {last.metrics['psnr']:.1f} dB")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
for name, figures in curves.items():
    axes[0].plot([f["psnr"] for f in figures], label=name, lw=1.2)
    axes[1].plot([f["perplexity"] for f in figures], label=name, lw=1.2)
axes[0].set(xlabel="step", ylabel="PSNR of the batch, dB")
axes[1].set(xlabel="step", ylabel="perplexity of the codes of the batch")
axes[0].legend(fontsize=9)
plt.show()

# %%
fresh = to_float(SceneDataset(5, 32, split="test", seed=9).images())
with torch.inference_mode():
    again, found = {name: vqgan(fresh)[0].clamp(-1, 1) for name, vqgan in trained.items()}, {}
    for name, y in again.items():
        near, alike = psnr(fresh, y).mean(), perceptual(fresh, y)
        found[name] = near.item(), alike.item()
        print(f"{name:>26}: PSNR {near:.1f} dB, perceptual distance {alike:.3f}")
rows = [*to_pil(fresh), *(p for y in again.values() for p in to_pil(y))]
if not FAST:
    pixels, felt, _ = found.values()
    assert felt[1] < pixels[1], "the perceptual term does not lower the perceptual distance"
    assert felt[0] < pixels[0], "it costs no PSNR"
grid(rows, [name for name in ("scene", *again) for _ in range(5)], columns=5, scale=3)

# %% [markdown]
r"""
The perceptual term lowers the perceptual distance, and costs some PSNR; the adversarial term changes little. To the eye the three rows
hardly differ: after so short a training all are blurred, and the three curves nearly coincide. The adversarial term needs
the longest training (Muse: a million steps), and joins late, when decoded pictures are nearly real. We gave the perceptual term the
weight 1, since our features give smaller numbers than VGG's. The `nano` preset trains only on pixels; `toy` adds the perceptual term.
"""

# %% [markdown]
r"""
## What failure looks like

**A dead codebook**, as in section 3: PSNR stops early at a low level, and everything after it is trained on a handful of
tokens. **A tokenizer that goes on learning** while the transformers train: the tokens change their meaning for the
transformer. The next cell lets one learn on for a few steps and counts how many tokens of the same pictures are still the
same.
"""

# %%
base = trained["pixels"]
was = base.encode(fresh)
*_, later = train_tokenizer(base, replace(stage, steps=max(5, STEPS // 8)), small)
kept = (later.model.eval().encode(fresh) == was).float().mean()
print(f"{kept:.0%} of the tokens are what they were")

frozen = later.model.freeze_tokens()
was = frozen.encode(fresh)
*_, later = train_tokenizer(frozen, replace(stage, steps=5), small)
kept = (later.model.eval().encode(fresh) == was).float().mean()
print(f"{kept:.0%} after freeze_tokens(), where the decoder alone learns")

# %% [markdown]
r"""
A transformer trained on the old tokens cannot use the new ones. So encoder and codebook are frozen from then on,
and only the decoder may still improve: that is the subject of notebook 9.
"""

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

Is a picture's budget of bits better spent on more tokens or on more codes? Train $8 \times 8$ tokens of 256 codes, and $16 \times 16$ of 4
(`replace(config.low_tokenizer, codebook_size=4, multipliers=(1, 2), blocks=(1, 1), decoder_blocks=(1, 1))`): 512 bits each. Compare PSNR
and perceptual distance of held-out scenes. What would a transformer prefer?
"""

# %% [markdown]
r"""
## Summary

- A tokenizer makes a picture into a short grid of whole numbers; what it loses is lost for all that follows.
- The token is the number of the nearest code. Gradients pass straight through; codes move by a loss of their own.
- Codes that nobody uses never learn, unless they are restarted. Usage and perplexity show it, losses do not.
- Pixel losses blur what is uncertain. A perceptual loss measures what its network was trained to distinguish; an adversarial one,
  what gives a decoded picture away.
- Once transformers train on its tokens, encoder and codebook must not change.
"""

# %% [markdown]
r"""
## Further reading

- Esser et al. 2020, *VQGAN*, [arXiv 2012.09841](https://arxiv.org/abs/2012.09841).
- van den Oord et al. 2017, *VQ-VAE*, [arXiv 1711.00937](https://arxiv.org/abs/1711.00937): codebook and commitment losses, straight through.
- Zhang et al. 2018, *LPIPS*, [arXiv 1801.03924](https://arxiv.org/abs/1801.03924).
- Next: [4. Masking](04_masking.ipynb): what to hide from a model that learns to fill in tokens.
"""
