# %% [markdown]
r"""
# 9. Fine-tuning the decoder

*A better decoder for the same tokens: why the decoder may change after everything else is trained, and why nothing else may.*

|  |  |
|---|---|
| **Paper** | Muse 2.5, A.2; VQGAN ([arXiv 2012.09841](https://arxiv.org/abs/2012.09841)) |
| **You will learn** | why tokens are a language · how a network grows without changing what it computes · what frozen means, bit for bit · what a bigger decoder and an adversarial loss can and cannot do |
| **Before this** | [3. VQGAN](03_vqgan.ipynb), [8. Super-resolution](08_super_resolution.ipynb); gradients |
| **Takes** | @takes@; about 90 minutes of your time |
| **Files** | [`vqgan.py`](../minimuse/vqgan.py), [`vqgan_loss.py`](../minimuse/vqgan_loss.py), [`train.py`](../minimuse/train.py) |
"""

# %% knobs
import copy
import hashlib
import math
import os
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from checks import check_grow, check_psnr
from view import show, style

from minimuse import Muse
from minimuse.data_sources import SceneDataset
from minimuse.plots import grid
from minimuse.utils import to_float, to_pil

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: too few steps to learn much
CHECKPOINT = "nano"  # a shipped name or a folder
FIRST_STEPS, FIRST_BATCH = (20, 4) if FAST else (900, 8)  # the small decoder that we begin with
STEPS, BATCH = (12, 4) if FAST else (300, 4)  # each fine-tuning; the batch is nano's own
CROP = 64  # pixels a side of the training pictures
SCENES, HELD_OUT = (64, 6) if FAST else (2000, 48)  # to train on; to measure with
style()

# %% [markdown]
r"""
Super-resolution has filled the fine grid, and the tokenizer's **decoder** turns it into pixels. Small objects and thin lines
are blurred. Retraining everything with more tokens would cost weeks. Muse does something cheaper: it makes the
*decoder* bigger and trains **only it**; all the rest is frozen.

Why is that allowed for the decoder, and for nothing else? That is the question of this notebook.
"""

# %%
muse = Muse.from_pretrained(CHECKPOINT)
shipped = muse.high_tokenizer
size = muse.config.high_tokenizer.image_size
for name, part in (
    ("encoder", shipped.encoder),
    ("codebook", shipped.quantizer),
    ("decoder", shipped.decoder),
):
    print(f"{name:>9}: {sum(p.numel() for p in part.parameters()):>9,} parameters")

# %% [markdown]
r"""
## 1. Tokens are a language

The encoder writes a picture as tokens, the decoder reads them. The transformers have learned this language in all of
their training: which token follows from which text, which tokens stand side by side.
"""

# %%
held_out = to_float(
    SceneDataset(HELD_OUT, size, split="test", fractions=muse.config.fractions).images()
)
with torch.inference_mode():
    tokens = shipped.encode(held_out)
    again = shipped.decode(tokens)
print("pictures (n, 3, H, W):", tuple(held_out.shape), " tokens (n, h*w):", tuple(tokens.shape))
grid(torch.cat([held_out[:6], again[:6]]), ["a scene"] * 6 + ["encoded and decoded"] * 6, columns=6)

# %% [markdown]
r"""
**Predict, then run.** We make a twin of the tokenizer in which the codes are numbered differently: what was code 17 may now
be code 203. Its encoder and decoder use the new numbers consistently. How well does the twin reconstruct pictures? And what
does its decoder draw from the tokens that *our* super-resolution model produces for a prompt?
"""

# %%
twin = copy.deepcopy(shipped)
renumbered = torch.randperm(twin.codebook_size, generator=torch.Generator().manual_seed(0))
twin.quantizer.codebook.data = twin.codebook[renumbered]

prompts = ["a large red cube", "a large yellow cylinder", "a large blue sphere"]
*_, last = muse.decode(muse.jobs(prompts, seed=0))
drawn = last.tokens  # (3, N), what the transformers say
with torch.inference_mode():
    by_twin = twin.decode(twin.encode(held_out[:3]))
    print("the same reconstruction:", torch.allclose(by_twin, again[:3], atol=1e-4))
    pictures = torch.cat([by_twin, shipped.decode(drawn), twin.decode(drawn)])
grid(
    pictures,
    ["the twin reconstructs"] * 3
    + [f"{p}: our decoder" for p in prompts]
    + ["the same tokens: the twin's"] * 3,
    columns=3,
)

# %% [markdown]
r"""
As a tokenizer the twin is as good as ours, and with our transformers it is useless. A token's number has a meaning only by
agreement. If we train the encoder or the codebook further, the agreement changes, and the transformers still use the old one.

The **decoder** is not part of the agreement: it only reads tokens. Any function from tokens to pixels may take its place.
"""

# %% [markdown]
r"""
## 2. What is lost, and can it come back?

We measure reconstruction by the **peak signal-to-noise ratio**. With pixels $x$, their reconstruction $\hat x$, both
from 0 to 1,

$$\mathrm{PSNR} = 10 \log_{10} \frac{1}{\mathrm{MSE}(x, \hat x)} \;\text{dB},$$

so that 10 dB more is a tenth of the squared error, and 3 dB about half of it.
"""

# %%
from minimuse.eval_metrics import psnr

show(psnr)

# %% [markdown]
r"""
### Exercise 9.1: PSNR

*Difficulty 1 of 3, about 10 minutes.*

Write it for images $(B, 3, H, W)$ in $[-1, 1]$, one number for each image. Mind the range.

<details><summary>Hint</summary>

The mean goes over all axes except the first. How large is a difference in $[-1, 1]$ after both images are mapped to $[0, 1]$?

</details>
"""


# %%
def my_psnr(images, again):
    return -10 * torch.log10((images - again).square().mean())  # your code: two things are wrong


check_psnr(my_psnr)


# %% tags=["solution"]
def my_psnr(images, again):
    error = ((images - again) / 2).square().mean((1, 2, 3))  # [-1, 1] is twice as wide as [0, 1]
    return -10 * torch.log10(error)


check_psnr(my_psnr)

# %%
error = (held_out - again).abs().mean(1)  # (n, H, W)
figure, axes = plt.subplots(2, 4, figsize=(9, 4.6))
for k in range(4):
    axes[0, k].imshow(to_pil(again[k : k + 1])[0])
    axes[0, k].set_title(f"{psnr(held_out[k : k + 1], again[k : k + 1]).item():.1f} dB")
    drawn_error = axes[1, k].imshow(error[k], cmap="magma", vmin=0, vmax=0.4)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
axes[0, 0].set_ylabel("reconstruction")
axes[1, 0].set_ylabel("its error")
figure.colorbar(drawn_error, ax=axes, label="|error| of a pixel")
plt.show()

# %% [markdown]
r"""
The error is on edges and on objects, not on the floor. Is that the decoder's fault? Partly. The rest is lost for good: a grid of
tokens is a very short message.
"""

# %%
bits = tokens.shape[1] * math.log2(shipped.codebook_size)
raw = held_out[0].numel() * 8
print(f"the picture: {raw:,} bits; its tokens: {bits:,.0f} bits, {raw / bits:.0f} times fewer")

# %% [markdown]
r"""
So many pictures have the same tokens, and a decoder must decode all of them to one. Which one? If it is trained with squared
error, the best answer is their **mean**. Suppose that the tokens leave open, by a few pixels, where an edge runs:

**Predict, then run.** A hundred edges, at slightly different positions, all with the same tokens. Decoder A gives their mean, a
soft ramp. Decoder B gives one of the edges, sharp. Which of them has the better PSNR, and by how much?
"""

# %%
draws = torch.Generator().manual_seed(0)
places = 16 + 3 * torch.randn(100, generator=draws)
edges = (torch.arange(32)[None] > places[:, None]).float()  # (100, 32): pixels along a row
mean, sample = edges.mean(0), edges[0]
error_of_mean = (edges - mean).square().mean()
error_of_one = (
    (edges[:, None] - edges[None]).square().mean()
)  # over all pairs: asked for one, answered by another
scores = [-10 * math.log10(error) for error in (error_of_mean, error_of_one)]
figure, ax = plt.subplots(figsize=(7, 3))
ax.plot(edges[:25].T + 0.01 * torch.randn(32, 25, generator=draws), color="0.8", lw=0.8)
ax.plot(mean, color="C0", label=f"A: their mean, {scores[0]:.1f} dB")
ax.plot(sample, color="C1", ls="--", label=f"B: one of them, {scores[1]:.1f} dB on average")
ax.set(xlabel="pixel along a row", ylabel="brightness", title="gray: pictures with the same tokens")
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
r"""
The blur wins. For any distribution with variance $\sigma^2$ the mean has squared error $\sigma^2$, and an independent sample has $2\sigma^2$: always 3 dB
worse. Yet B *looks* like a picture, and A like none of them. So more capacity only brings a decoder nearer to
the mean; a sharp answer needs another loss (section 7).
"""

# %% [markdown]
r"""
## 3. Growing without changing

Our shipped checkpoint holds only the *grown* decoder. To see the whole story, we first train a decoder of the small
size, on the shipped encoder and codebook, which stay as they are.
"""

# %%
from minimuse.train import train_tokenizer
from minimuse.vqgan import VQGAN

torch.manual_seed(0)
small = VQGAN(muse.config.high_tokenizer)
small.encoder.load_state_dict(shipped.encoder.state_dict())
small.quantizer.load_state_dict(shipped.quantizer.state_dict())
small.freeze_tokens()
images = SceneDataset(
    SCENES, size, fractions=muse.config.fractions
).images()  # (n, 3, H, W) uint8, split "train"
pixels_alone = {"perceptual_weight": 0.0, "adversarial_weight": 0.0, "crop": CROP, "warmup": 5}
first = replace(
    muse.config.stages["high_tokenizer"],
    steps=FIRST_STEPS,
    batch=FIRST_BATCH,
    learning_rate=3e-3,
    **pixels_alone,
)


@torch.inference_mode()
def quality(vqgan):
    """(n,) dB of the held-out pictures; the tokens are the same for all of our decoders."""
    return psnr(held_out, vqgan.decode(tokens))


curve = [(p.step, p.metrics["psnr"]) for p in train_tokenizer(small, first, images)]
before = quality(small)
print(f"small decoder: {before.mean():.2f} dB on held-out scenes")

# %%
figure, ax = plt.subplots(figsize=(7, 2.8))
ax.plot(*zip(*curve, strict=True), lw=1)
ax.set(
    xlabel="step",
    ylabel="PSNR of the batch, dB",
    title="the small decoder learns to read the tokens",
)
plt.show()

# %% [markdown]
r"""
Now the paper's step: a decoder with **more channels and more blocks**. One could begin it from random weights. Ours begins as
the *same function*, so that no training is spent on learning it again. Take a linear layer $y = Wx$ that gets new inputs $x'$ and new
outputs $y'$:

$$\begin{pmatrix} y \\ y' \end{pmatrix} = \begin{pmatrix} W & 0 \\ A & B \end{pmatrix}\begin{pmatrix} x \\ x' \end{pmatrix}$$

Old outputs read only old inputs. New outputs read all inputs through random $A$ and $B$; no later layer reads them yet. A
convolution is such a matrix at each position of its kernel.
"""

# %%
show(VQGAN.grow_decoder)

# %% [markdown]
r"""
Three more details make it work, each a line in [`vqgan.py`](../minimuse/vqgan.py):

- **Normalization** shares statistics within a group of channels. Our groups have a fixed *size*, so wider layers have more
  groups and old channels stay among themselves. With a fixed *number* of groups, old and new would mix.
- **New residual blocks** compute $x + f(x)$, and $f$ ends in a convolution of zeros: the identity.
- **Upsampling** turns $4C$ channels into $C$ of twice the side; the four of one output channel lie side by side, so the
  leading ones belong to the old outputs.
"""

# %%
from minimuse.vqgan import ResBlock, up_block

show(ResBlock, up_block)

# %% [markdown]
r"""
**Predict, then run.** The grown decoder has several times the parameters, most of them random. How far are its pictures from those
of the small one?
"""

# %%
torch.manual_seed(1)
grown = small.grow_decoder(muse.config.finetuned_tokenizer)
with torch.inference_mode():
    gap = (grown.decode(tokens) - small.decode(tokens)).abs().max()
counts = [sum(p.numel() for p in v.decoder.parameters()) for v in (small, grown)]
print(
    f"decoder: {counts[0]:,} -> {counts[1]:,} parameters, {counts[1] / counts[0]:.1f} times as many"
)
print(
    f"largest difference of a pixel: {gap:.1e}, of a range of 2; 8-bit pixels differ by {2 / 255:.1e}"
)
print(f"held-out PSNR: {before.mean():.4f} -> {quality(grown).mean():.4f} dB")

# %% [markdown]
r"""
They differ only by rounding: sums over more channels are added in another order. Here is one layer of it before and after. Each cell
is one pair of channels, averaged over the kernel.
"""


# %%
def layer_of(vqgan):
    return vqgan.decoder.levels[0].blocks[0].conv1.weight  # (outputs, inputs, 3, 3)


old, new = (layer_of(v).detach().abs().mean((2, 3)) for v in (small, grown))
figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.9))
most = float(new.quantile(0.99))
for ax, weight, title in ((axes[0], old, "before"), (axes[1], new, "after growing")):
    shown = ax.imshow(
        weight, cmap="viridis", vmin=0, vmax=most, extent=(0, weight.shape[1], weight.shape[0], 0)
    )
    ax.set(
        title=f"{title}: {weight.shape[0]} x {weight.shape[1]}",
        xlabel="input channel",
        ylabel="output channel",
    )
    ax.grid(False)
axes[1].axhline(len(old), color="white", lw=1)
axes[1].axvline(len(old), color="white", lw=1)
for text, at in (
    ("W", (0.25, 0.25)),
    ("0", (0.75, 0.25)),
    ("A", (0.25, 0.75)),
    ("B", (0.75, 0.75)),
):
    axes[1].text(
        *[len(new) * a for a in at], text, color="white", fontsize=20, ha="center", va="center"
    )
figure.colorbar(shown, ax=axes, label="mean |weight|")
plt.show()

# %% [markdown]
r"""
### Exercise 9.2: grow a matrix

*Difficulty 2 of 3, about 20 minutes.*

Write it for one matrix of shape (outputs, inputs). Mind the new outputs: they may be anything, but not all zero. (If new outputs are zero and the weights that read them are
zero, neither ever gets a gradient.)

<details><summary>Hint</summary>

Begin with random numbers. Then two assignments: all columns of the old rows, and the old columns in them.

</details>
"""


# %%
def my_grow(weight, outputs, inputs):
    new = torch.zeros(outputs, inputs)  # your code: a safe start that never learns
    new[: weight.shape[0], : weight.shape[1]] = weight
    return new


check_grow(my_grow)


# %% tags=["solution"]
def my_grow(weight, outputs, inputs):
    new = torch.randn(outputs, inputs) / inputs**0.5
    new[: weight.shape[0]] = 0  # old outputs do not read new inputs
    new[: weight.shape[0], : weight.shape[1]] = weight
    return new


check_grow(my_grow)

# %% [markdown]
r"""
**Predict, then run.** At the very first step of fine-tuning, which of the four parts $W$, $0$, $A$, $B$ have a gradient that is not
zero? And a few steps later?
"""


# %%
def gradient_of(vqgan):
    """Mean |gradient| of each pair of channels of the layer above, for four held-out pictures."""
    made, _ = vqgan(held_out[:4, :, :CROP, :CROP])
    (gradient,) = torch.autograd.grad(
        (made - held_out[:4, :, :CROP, :CROP]).abs().mean(), layer_of(vqgan)
    )
    return gradient.abs().mean((2, 3))


trial = copy.deepcopy(grown)
few = replace(
    muse.config.stages["decoder"], steps=3, batch=BATCH, learning_rate=1e-3, **pixels_alone
)
at_first = gradient_of(trial)
*_, _ = train_tokenizer(trial, few, images)
later = gradient_of(trial)
n = len(old)
quarters = {
    "W": (slice(0, n), slice(0, n)),
    "0": (slice(0, n), slice(n, None)),
    "A": (slice(n, None), slice(0, n)),
    "B": (slice(n, None), slice(n, None)),
}
figure, ax = plt.subplots(figsize=(6.5, 2.8))
for k, (gradient, label) in enumerate(((at_first, "first step"), (later, "after 3 steps"))):
    sizes = [gradient[q].mean().item() for q in quarters.values()]
    ax.bar(
        [i + 0.38 * (k - 0.5) for i in range(4)],
        sizes,
        0.36,
        label=label,
        hatch=["", "//"][k],
        edgecolor="white",
    )
    print(
        f"{label:>13}: "
        + ", ".join(f"{name} {size:.1e}" for name, size in zip(quarters, sizes, strict=True))
    )
    assert [size > 0 for size in sizes] == [True, True, k > 0, k > 0], "others have gradients"
ax.set_xticks(range(4), [f"{name}" for name in quarters])
ax.set(xlabel="part of the grown layer", ylabel="mean |gradient|")
ax.legend()
plt.show()

# %% [markdown]
r"""
$W$ and the zeros have a gradient, and the random weights do not. A weight's gradient is its input times the derivative of the loss by its
output. New inputs are not zero, and the loss depends on old outputs, so the block of zeros learns at once. The
loss does not depend on new outputs yet, so $A$ and $B$ do not change; one step later the zeros are no longer zero, and all parts learn.
"""

# %% [markdown]
r"""
## 4. Frozen, bit for bit

A part without gradient may still change. Weight decay shrinks a weight even where its gradient is zero; in training mode, batch normalization updates
its statistics in each forward pass. Training restarts dead codes: in a frozen codebook, it must not. So we compute a fingerprint of all
bytes.
"""

# %%
show(VQGAN.freeze_tokens)

# %%
from minimuse.vqgan import VectorQuantizer

show(VectorQuantizer.restart_dead_codes)

# %% [markdown]
r"""
See the first line of its body: a codebook without gradient never changes, in training mode or not.
"""


# %%
def fingerprint(*modules):
    """The SHA-256 of all weights and buffers, its first 12 digits."""
    values = [value for module in modules for value in module.state_dict().values()]
    joined = b"".join(value.contiguous().numpy().tobytes() for value in values)
    return hashlib.sha256(joined).hexdigest()[:12]


frozen_before = fingerprint(grown.encoder, grown.quantizer)
learning_before = fingerprint(grown.decoder)
print("encoder and codebook:", frozen_before, "  decoder:", learning_before)

# %% [markdown]
r"""
## 5. Fine-tune while you watch

Is a gain due to the *size*, or just to more *steps*? Only a fair comparison shows it. Three decoders begin as the same function: the small
one trained on, the grown one, and a still wider one. Same pictures, same order, same steps.
"""

# %%
torch.manual_seed(1)
wider_config = replace(
    muse.config.finetuned_tokenizer,
    decoder_width=muse.config.finetuned_width + muse.config.high_tokenizer.width,
)
runners = {
    "small, trained on": copy.deepcopy(small),
    "grown": grown,
    "wider": small.grow_decoder(wider_config),
}
recipe = replace(
    muse.config.stages["decoder"], steps=STEPS, batch=BATCH, learning_rate=1e-3, **pixels_alone
)
look = max(1, STEPS // 8)
curves = {}
for name, vqgan in runners.items():
    curves[name] = [(0, quality(vqgan).mean().item())]
    for p in train_tokenizer(vqgan, recipe, images):
        if p.step % look == 0 or p.step == STEPS:
            curves[name].append((p.step, quality(vqgan).mean().item()))

# %%
figure, ax = plt.subplots(figsize=(7.5, 3.2))
for (name, points), mark in zip(curves.items(), "osD", strict=True):
    parameters = sum(p.numel() for p in runners[name].decoder.parameters())
    ax.plot(*zip(*points, strict=True), f"{mark}-", ms=5, label=f"{name}, {parameters / 1e6:.2f}M")
ax.set(
    xlabel="step of fine-tuning",
    ylabel="held-out PSNR, dB",
    title="they begin at the same function",
)
ax.legend()
plt.show()
assert max(p[0][1] for p in curves.values()) - min(p[0][1] for p in curves.values()) < 1e-3, (
    "the three do not begin at the same function"
)

# %% [markdown]
r"""
All curves begin at one point, because growing changed nothing. They dip at first: the optimizer is new, and the learning rate, which had decayed to 0, begins again at
$10^{-3}$. The rise of the small one is what *more steps* bring without any growth; only what the others gain beyond it is due to *size*. Is it chance? The same pictures are measured before and after, so we look at the gain of each:
"""

# %%
from minimuse.eval_metrics import paired_difference

for name, vqgan in runners.items():
    after = quality(vqgan)
    print(
        f"{name:>18}: {before.mean():.2f} -> {after.mean():.2f} dB, gain {paired_difference(after, before)}"
    )
gain = paired_difference(quality(runners["grown"]), quality(runners["small, trained on"]))
print(f"grown over small, same steps: {gain}")
print(
    "\nencoder and codebook:", fingerprint(grown.encoder, grown.quantizer), "- as before:", end=" "
)
print(fingerprint(grown.encoder, grown.quantizer) == frozen_before)
print(
    "decoder:             ",
    fingerprint(grown.decoder),
    "- as before:",
    fingerprint(grown.decoder) == learning_before,
)
with torch.inference_mode():
    print("tokens of the held-out pictures as before:", grown.encode(held_out).equal(tokens))

# %% [markdown]
r"""
Not one bit of the encoder and the codebook has changed. Most of the gain is due to more *steps*: the small decoder has it, too. *Size* adds
a few hundredths of a decibel in so short a training: by the interval this is not chance, but no eye sees it.
Where is the gain? Below: the scene, the small decoder before fine-tuning, the grown one after it, and where its error is
smaller (white) or larger (black); gray is no difference. Most of the gain, and of the loss, is on the objects' edges.
"""

# %%
if not FAST:  # a few steps on six pictures show nothing
    steps_alone = paired_difference(quality(runners["small, trained on"]), before)
    assert steps_alone.low > 0, "more steps bring nothing"
    assert gain.low > 0, "size brings nothing"
    assert gain.value < steps_alone.value / 2, "size brings most of the gain"

# %%
with torch.inference_mode():
    by_small, by_grown = small.decode(tokens[:4]), grown.decode(tokens[:4])
better = (by_small - held_out[:4]).abs().mean(1) - (by_grown - held_out[:4]).abs().mean(1)
reach = better.abs().quantile(0.99).item()
figure, axes = plt.subplots(4, 4, figsize=(7.5, 7.6))
for k in range(4):
    for row, (label, x) in enumerate(
        (("scene", held_out), ("small", by_small), ("grown", by_grown))
    ):
        axes[row, k].imshow(to_pil(x[k : k + 1])[0])
        axes[0 + row, 0].set_ylabel(label)
    shown = axes[3, k].imshow(better[k], cmap="gray", vmin=-reach, vmax=reach)
axes[3, 0].set_ylabel("gain")
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
figure.colorbar(shown, ax=axes, label="|error| of small minus grown", shrink=0.5)
plt.show()

# %% [markdown]
r"""
### The transformers never noticed

The same tokens, drawn once by the transformers in section 1, read by both decoders. Nothing else was retrained.
"""

# %%
with torch.inference_mode():
    read = torch.cat([small.decode(drawn), grown.decode(drawn)])
grid(
    read, [f"{p}: small decoder" for p in prompts] + ["the same tokens: fine-tuned"] * 3, columns=3
)

# %% [markdown]
r"""
A decoder only draws the tokens that it is given. Real tokens come out well (section 1), so if these objects are lumps, the
transformers chose bad tokens. No decoder can repair that.
"""

# %% [markdown]
r"""
## 6. What more channels cost

Quality against price, for the three decoders. The price is paid once per picture: the decoder runs once, the transformers many times. In the paper it has four residual blocks per resolution and twice the width.
"""

# %%
import time

figure, axes = plt.subplots(1, 2, figsize=(9, 3.1))
for (name, vqgan), mark in zip(runners.items(), "osD", strict=True):
    with torch.inference_mode():
        vqgan.decode(tokens[:1])
        began = time.perf_counter()
        vqgan.decode(tokens[:4])
        each = 1000 * (time.perf_counter() - began) / 4
    parameters = sum(p.numel() for p in vqgan.decoder.parameters()) / 1e6
    gained = quality(vqgan).mean() - before.mean()
    axes[0].plot(parameters, gained, mark, ms=9, label=name)
    axes[1].plot(each, gained, mark, ms=9, label=name)
axes[0].set(xlabel="decoder parameters, millions", ylabel="PSNR gained, dB")
axes[1].set(xlabel="ms per picture to decode, here", ylabel="PSNR gained, dB")
for ax in axes:
    low, high = ax.get_ylim()
    ax.set_ylim(min(0, low), max(0, high) * 1.15)
axes[0].legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
On an axis that begins at 0 the three are nearly level: several times the parameters and the time buy a few hundredths of a decibel. Longer
training may show more, but there is a limit: by the squared error no decoder can do better than the mean of all pictures with
the same tokens.
"""

# %% [markdown]
r"""
## 7. What the adversarial loss does

How can a decoder learn to prefer a sharp answer to the mean? A **discriminator** $D$ looks at patches and learns to distinguish real ones
from decoded ones; the decoder is rewarded when $D$ is wrong. A ramp where there should be an edge is easy to recognize. With $\hat x$ the decoded
picture,

$$\mathcal{L} = \text{pixels}(x, \hat x) \;-\; w\,\lambda\, \mathbb{E}\, D(\hat x), \qquad
\lambda = \frac{\lVert \nabla_{\!\theta}\, \text{pixels} \rVert}{\lVert \nabla_{\!\theta}\, \mathbb{E}\,D \rVert + 10^{-4}},$$

where $\theta$ are the weights of the decoder's last layer: $\lambda$ gives both terms gradients of the same length, and $w$ then says how much the discriminator counts: 0.1 in the paper, 0.4 below,
so that a short training shows an effect.
"""

# %%
from minimuse.vqgan_loss import VQGANLoss, adaptive_weight, hinge_discriminator

show(adaptive_weight, hinge_discriminator, VQGANLoss.generator_loss)

# %%
torch.manual_seed(1)
sharp = small.grow_decoder(muse.config.finetuned_tokenizer)
adversarial = replace(recipe, adversarial_weight=0.4, adversarial_start=0)
log = [
    (
        p.step,
        p.metrics["discriminator_loss"],
        quality(sharp).mean().item() if p.step % look == 0 else None,
    )
    for p in train_tokenizer(sharp, adversarial, images)
]


def sharpness(images):
    """Mean step from a pixel to its right neighbour, against that of the real pictures."""
    return ((images.diff(dim=-1).abs().mean()) / held_out.diff(dim=-1).abs().mean()).item()


with torch.inference_mode():
    for name, vqgan in (
        ("small", small),
        ("grown, pixels only", grown),
        ("grown, adversarial", sharp),
    ):
        made = vqgan.decode(tokens)
        print(
            f"{name:>21}: {psnr(held_out, made).mean():.2f} dB, sharpness {sharpness(made):.3f} of the real pictures'"
        )

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
steps, fooled, at = zip(*log, strict=True)
axes[0].plot(steps, fooled, lw=1)
axes[0].axhline(1, color="0.5", ls=":", lw=1)
axes[0].set(xlabel="step", ylabel="discriminator loss", title="1: it cannot tell; 0: it always can")
axes[1].plot(*zip(*curves["grown"], strict=True), "s-", ms=5, label="pixels only")
axes[1].plot(
    *zip(*[(s, q) for s, q in zip(steps, at, strict=True) if q is not None], strict=True),
    "^--",
    ms=5,
    label="adversarial",
)
axes[1].set(xlabel="step of fine-tuning", ylabel="held-out PSNR, dB")
axes[1].legend()
plt.show()

# %%
with torch.inference_mode():
    pictures = torch.cat([held_out[:4], grown.decode(tokens[:4]), sharp.decode(tokens[:4])])
grid(
    pictures,
    ["scene"] * 4 + ["pixels only"] * 4 + ["adversarial"] * 4,
    columns=4,
    scale=max(1, 192 // size),
)

# %% [markdown]
r"""
Theory says: sharper, and *fewer* decibels, as decoder B above. These numbers do not show it. The discriminator loss stays near 1 for the
whole run: it has *not* learned to distinguish decoded pictures from real ones, so what it rewards is close to arbitrary, and the lost decibels
bought nothing. The sharpness misleads, too: it counts noise as edges, and the decoder trained on pixels only is already "sharper" than the real
pictures. A discriminator needs far more steps than a notebook has. Large models train with it for days, because it gives photographs their fine
texture. PSNR does not measure that; Frechet distances do ([notebook 11](11_evaluation.ipynb)).
"""

# %%
if not FAST:
    assert abs(sum(fooled[-100:]) / 100 - 1) < 0.1, (
        "the discriminator has learned to tell the pictures apart"
    )
    with torch.inference_mode():
        by_pixels, by_both = grown.decode(tokens), sharp.decode(tokens)
    assert sharpness(by_pixels) > 1, "the measure of sharpness does not count noise"
    assert psnr(held_out, by_both).mean() < psnr(held_out, by_pixels).mean(), "it costs no decibels"

# %% [markdown]
r"""
## What failure looks like

**The codebook was not frozen.** Someone fine-tunes the whole tokenizer, because its loss is better that way. We do *one* step of it.
"""

# %%
awake = copy.deepcopy(small).requires_grad_(True)
*_, p = train_tokenizer(awake, replace(recipe, steps=1), images)
awake.eval()
with torch.inference_mode():
    moved = (awake.encode(held_out) != tokens).float().mean()
    print(f"after one step {moved:.0%} of the tokens of the same pictures are others")
    assert moved > 0.9, "most tokens are as before"
    broken = torch.cat([small.decode(drawn), awake.decode(drawn)])
grid(broken, [f"{p}: before" for p in prompts] + ["after one step"] * 3, columns=3)

# %% [markdown]
r"""
A training begins with new codes: in its first step it replaces all of them by encoder outputs. Without that, the tokens would change more slowly, and the loss would
still look good: only the transformers' pictures fail, days later, in another
script. That is why the fingerprints of section 4 are a test in minimuse.

**Grown without the zeros.** Old weights fill the leading block, and the rest stays random, so old channels get noise:
"""

# %%
torch.manual_seed(1)
careless = VQGAN(muse.config.finetuned_tokenizer)
for name, old_value in small.decoder.state_dict().items():
    careless.decoder.state_dict()[name][tuple(slice(n) for n in old_value.shape)] = old_value
careless.quantizer = small.quantizer
with torch.inference_mode():
    pictures = torch.cat([small.decode(tokens[:3]), careless.decode(tokens[:3])])
print(f"{before.mean():.2f} dB before, {quality(careless).mean():.2f} dB after")
assert FAST or quality(careless).mean() < before.mean() - 5, "it begins as nearly the same function"
grid(pictures, ["small decoder"] * 3 + ["grown, without the zeros"] * 3, columns=3)

# %% [markdown]
r"""
After some training it may be as good. But much of what the small decoder had learned is lost at the start, and the
final number does not show it. The cheap test is the one that we did above: **before the first step, nothing may change**.
"""

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

Does size pay in a longer training? Take more `STEPS`, and compare the grown decoder with the small one after equal steps, then after equal *time*: the small one makes
more steps per second. Write down your prediction first, and give intervals.
"""

# %% [markdown]
r"""
## Summary

- Tokens mean something by agreement between encoder, codebook and transformers. The decoder only reads tokens, so it may be replaced at any
  time.
- A decoder can grow without changing what it computes: old outputs ignore new inputs, new blocks begin as the identity. The zeros learn
  first, the random weights after them.
- "Frozen" means that no byte changes, which is cheap to test.
- A fair comparison gives the small decoder the same steps. In ours, more channels brought a few hundredths of a decibel.
- Squared error asks for the mean of all pictures that fit, a discriminator for one of them: sharper, with fewer decibels.
"""

# %% [markdown]
r"""
## Further reading

- Chang et al. 2023, *Muse*, [arXiv 2301.00704](https://arxiv.org/abs/2301.00704), sections 2.5 and A.2.
- Esser et al. 2021, *Taming Transformers* (VQGAN), [arXiv 2012.09841](https://arxiv.org/abs/2012.09841): the discriminator and its weight $\lambda$.
- Chen et al. 2016, *Net2Net*, [arXiv 1511.05641](https://arxiv.org/abs/1511.05641): growing networks that compute the same.
- Blau and Michaeli 2018, *The Perception-Distortion Tradeoff*, [arXiv 1711.06077](https://arxiv.org/abs/1711.06077): why sharp and accurate part ways.
- Next: [10. Editing](10_editing.ipynb).
"""
