# %% [markdown]
r"""
# 16. A model of your own: fine-tuning, and what memorization looks like

*A folder of pictures becomes a model in a minute. Then we ask what it learned: a kind of picture, or these pictures by heart?*

|  |  |
|---|---|
| **Paper** | beyond Muse: WiSE-FT ([arXiv 2109.01903](https://arxiv.org/abs/2109.01903)); copies ([arXiv 2212.03860](https://arxiv.org/abs/2212.03860)) |
| **You will learn** | what a folder of your own needs · whether frozen tokenizers can show your pictures · fine-tuning in Python and as commands · how to find copies, with a yardstick · what averaging with the old weights takes back |
| **Before this** | [5. The base transformer](05_base_transformer.ipynb), [7. Parallel decoding](07_parallel_decoding.ipynb); quantiles |
| **Takes** | @takes@; about 75 minutes of your time |
| **Files** | [`train.py`](../minimuse/train.py), [`train_state.py`](../minimuse/train_state.py), [`data_sources.py`](../minimuse/data_sources.py) |
"""

# %% knobs
import os

import matplotlib.pyplot as plt
import torch
from checks import check_copied, check_nearest_picture
from view import show, style

from minimuse import Muse
from minimuse.plots import grid

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: fewer pictures and steps
CHECKPOINT = "nano"  # the small one: it learns within a minute
PICTURES = 6 if FAST else 24  # to train on
HELD_OUT = 20 if FAST else 200  # never trained on
LOOKS = (2, 4) if FAST else (15, 120)  # steps after which we look
SHOWN = 6  # pictures a row
style()
muse = Muse.from_pretrained(CHECKPOINT, device="cpu", dtype=torch.float32)

# %% [markdown]
r"""
## 1. A folder with captions

"Now with my pictures" is what everybody tries first. A folder is enough: pictures, and a file `metadata.jsonl` that gives each picture
one caption or a list of them. We write such a folder. Its pictures are scenes, so that we can make as many **held-out** ones as we like:
new pictures of the same kind, which the model never sees. You will want some of yours held out as well.
"""

# %%
import json
import tempfile
from pathlib import Path

from minimuse.data_captions import SceneDataset
from minimuse.utils import to_pil

scenes = SceneDataset(PICTURES + HELD_OUT, muse.config.high_tokenizer.image_size, seed=4242, k=1)
images = scenes.images(range(scenes.n))
captions = [scenes.captions(i)[0] for i in range(scenes.n)]

folder = Path(tempfile.mkdtemp())
for i, image in enumerate(to_pil(images[:PICTURES])):
    image.save(folder / f"{i:03d}.png")
lines = [{"file_name": f"{i:03d}.png", "text": captions[i]} for i in range(PICTURES)]
(folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
print(*lines[:3], sep="\n")
grid(to_pil(images[:SHOWN]), captions[:SHOWN], SHOWN)

# %% [markdown]
r"""
Some of the pictures that we shall train on. A folder, tar shards, a Parquet file and a data set of a hub are read alike; damaged and
uncaptioned pictures are counted and named, not skipped in silence.

## 2. Can the tokenizers show them?

Fine-tuning leaves the tokenizers as they are. So they are the first thing to look at. What they lose, no transformer can bring back.
Below, four scenes, and four drawings of a kind that `nano` never saw.

**Predict, then run.** Which of the four drawings comes back best, and which worst?
"""

# %%
from PIL import Image, ImageDraw

from minimuse.eval_metrics import psnr
from minimuse.pictures import from_pil
from minimuse.utils import area_downsample, to_float, to_uint8


def drawing(kind, size=images.shape[-1]):
    """A picture that is no scene."""
    image = Image.new("RGB", (size, size), "white")
    pen, s = ImageDraw.Draw(image), size / 64
    if kind == "a disk":
        pen.ellipse([12 * s, 12 * s, 52 * s, 52 * s], fill="orange")
    elif kind == "a face":
        pen.ellipse([6 * s, 6 * s, 58 * s, 58 * s], fill="gold")
        for x in (22, 42):
            pen.ellipse([(x - 4) * s, 20 * s, (x + 4) * s, 30 * s], fill="black")
        pen.arc([18 * s, 24 * s, 46 * s, 48 * s], 20, 160, fill="black", width=round(3 * s))
    elif kind == "text":
        for row in range(6):
            pen.text((4 * s, (4 + 9 * row) * s), "Muse 2.3 !?", fill="black")
    else:
        for x in range(0, size, 4):
            pen.line([x, 0, x, size], fill="red", width=2)
    return image


kinds = ["a disk", "a face", "text", "stripes"]
foreign = to_uint8(torch.cat([from_pil(drawing(kind), images.shape[-1]) for kind in kinds]))
looked_at = torch.cat([images[:4], foreign])
with torch.inference_mode():
    small, large = to_float(area_downsample(looked_at)), to_float(looked_at)
    low, high = (
        t.decode(t.encode(x))
        for t, x in ((muse.low_tokenizer, small), (muse.high_tokenizer, large))
    )
    of_low, of_high = psnr(small, low).tolist(), psnr(large, high).tolist()
sheet = [
    *to_pil(looked_at),
    *to_pil(low.repeat_interleave(2, 2).repeat_interleave(2, 3)),
    *to_pil(high),
]
titles = (
    ["scene"] * 4
    + kinds
    + [f"low: {x:.0f} dB" for x in of_low]
    + [f"high: {x:.0f} dB" for x in of_high]
)
grid(sheet, titles, 8)

# %% [markdown]
r"""
Rows: originals, what the low tokenizer returns, what the high one returns. Large areas come back with their
shapes. But white turns gray, small dark strokes turn into spots, and stripes into one color: a codebook that was trained on scenes has no
tokens for them. On your own folder,
`minimuse reconstruct pictures --model toy` draws this sheet and says whether the tokenizers are good enough. If not, train them too
(`--stages low_tokenizer,base,high_tokenizer,superres,decoder`).
"""

# %%
assert min(of_low[:4]) > max(of_low[6:]), "text and stripes come back as well as scenes"
assert of_high[4] > max(of_high[6:]) + 1, "the disk comes back no better than text and stripes"

# %% [markdown]
r"""
## 3. Fine-tuning

Four things are different from training from scratch: it starts from trained weights, the tokenizers are frozen, the learning rate is
lower, and there are few steps. `finetuned` makes this configuration from the checkpoint's own:
"""

# %%
from minimuse.train_state import finetuned

show(finetuned)

# %% [markdown]
r"""
We train the base model alone, and keep it as it was after some steps. The batches' loss is noisy and depends on the mask, so we
measure two losses ourselves, with one fixed mask of 60% of the tokens: on all training pictures, and on as many held-out ones.

**Predict, then run.** The first falls. Does the second one fall as well, stay, or rise?
"""

# %%
import copy
from dataclasses import replace

from minimuse.masking import masked_cross_entropy, random_mask
from minimuse.train import train_muse
from minimuse.train_engine import Engine


@torch.inference_mode()
def tokens_of(images):
    """uint8 images -> low tokens (B, N)."""
    return muse.low_tokenizer.encode(to_float(area_downsample(images)))


@torch.inference_mode()
def loss_of(base, which):
    """Nats for each of the masked tokens of some scenes."""
    generator = torch.Generator().manual_seed(0)
    x, context = tokens[which], muse.encoder.encode([captions[i] for i in which])
    masked = random_mask(x, torch.full((len(x),), 0.6), generator)
    logits = base(x.masked_fill(masked, base.mask_id), base.memory(context))
    return masked_cross_entropy(logits, x, masked).item()


tokens = tokens_of(images)
known, new = range(PICTURES), range(PICTURES, 2 * PICTURES)
config = finetuned(muse.config, ["base"])
stage = replace(config.stages["base"], steps=LOOKS[-1], warmup=10, eval_every=10_000)
config = replace(config, stages=config.stages | {"base": stage})

models = {"0 steps": copy.deepcopy(muse.base)}
curve = [(0, loss_of(muse.base, known), loss_of(muse.base, new))]
for p in train_muse(config, start=muse, data=folder, engine=Engine(device="cpu")):
    if p.stage == "base" and p.metrics and (p.step % 15 == 0 or p.step in LOOKS):
        now = copy.deepcopy(p.model).eval()
        curve.append((p.step, loss_of(now, known), loss_of(now, new)))
        if p.step in LOOKS:
            models[f"{p.step} steps"] = now
print("the pictures of training, and new ones:")
for step, a, b in curve:
    print(f"{step:4} steps: {a:.2f}, {b:.2f} nats")

# %%
steps, of_known, of_new = zip(*curve, strict=True)
figure, axis = plt.subplots(figsize=(7, 3.2))
axis.plot(steps, of_known, "o-", label="pictures of training")
axis.plot(steps, of_new, "s--", label="new pictures")
axis.set(xlabel="step", ylabel="loss, nats for each masked token")
axis.legend()
plt.show()

# %% [markdown]
r"""
The gap between the two lines is **memorization** by definition: what the model knows of these pictures and not of their kind. On the
new pictures the loss does not fall at all: `nano` knew scenes before, and a few of them teach it no more about scenes. With pictures of a
new kind the dashed line falls first, then rises. The moment to stop is where it is lowest.
"""

# %%
if not FAST:
    assert of_known[-1] < of_known[0] - 0.5, "the training pictures' loss does not fall"
    assert of_new[-1] > min(of_new) + 0.1, "the held-out loss does not rise at the end"
    assert of_new[-1] - of_known[-1] > 1, "no gap: nothing is memorized"

# %% [markdown]
r"""
## 4. Are these copies?

A loss says nothing to a stranger, who sees samples. And copies look good. Two things are needed to notice them:

1. **The nearest training picture** next to each sample. Nobody can judge a copy without its original.
2. **A yardstick.** Each picture has a nearest training picture at some distance. How near is too near? Held-out pictures say it: they
   are no copies. Of them, by definition, 10% are nearer to the training pictures than their own 10% quantile. Of the samples of a model
   that does not copy, it should be about 10% as well.

The distance is the root mean square difference of pixels, from 0 to 255.
"""

# %% [markdown]
r"""
### Exercise 16.1: the nearest

*Difficulty 2 of 3, about 10 minutes.*

Write it: for each sample, the distance of its nearest training picture, and which one that is.

<details><summary>Hint</summary>

Flatten the pictures to rows of numbers. `torch.cdist` gives the root of the *sum* of squares; `min(1)` gives values and indices.

</details>
"""


# %%
def my_nearest(samples, train):  # (n, ...), (m, ...) -> distances (n,), indices (n,)
    return torch.zeros(len(samples)), torch.zeros(len(samples), dtype=torch.long)  # your code


check_nearest_picture(my_nearest)


# %% tags=["solution"]
def nearest(samples, train):
    x, y = (images.flatten(1).float() for images in (samples, train))
    found = torch.cdist(x, y).min(1)
    return found.values / x.shape[1] ** 0.5, found.indices


check_nearest_picture(nearest)

# %% [markdown]
r"""
### Exercise 16.2: how many are too near

*Difficulty 1 of 3, about 5 minutes.*

Write the fraction of samples that are nearer than the quantile q of the held-out distances.

<details><summary>Hint</summary>

`held_out.quantile(q)` is one number; compare, then take the mean.

</details>
"""


# %%
def my_copied(samples, held_out, q=0.1):  # distances (n,), (m,) -> a number from 0 to 1
    return 0.0  # your code


check_copied(my_copied)


# %% tags=["solution"]
def copied(samples, held_out, q=0.1):
    return (samples < held_out.quantile(q)).float().mean().item()


check_copied(copied)

# %% [markdown]
r"""
Samples come out of the tokenizer a little blurred. So the training and held-out pictures go through it as well; otherwise sharp held-out
pictures would look farther away for no other reason. Each caption of training gets one sample of each model, all with the same seeds.
"""


# %%
@torch.inference_mode()
def decoded(tokens):
    """Low tokens -> uint8 pictures."""
    return to_uint8(muse.low_tokenizer.decode(tokens))


def draw(base):
    """A sample of a base model for each caption of training."""
    before, muse.parts["base"] = muse.parts["base"], base
    *_, step = muse.decode_base(muse.jobs(captions[:PICTURES], seed=0))
    muse.parts["base"] = before
    return decoded(step.tokens)


train, held_out = decoded(tokens).split([PICTURES, HELD_OUT])
yardstick = nearest(held_out, train)[0]
samples = {name: draw(base) for name, base in models.items()}
distances, which = {}, {}
for name, drawn in samples.items():
    distances[name], which[name] = nearest(drawn, train)
    own = (which[name] == torch.arange(PICTURES)).float().mean()
    print(
        f"{name:>10}: median distance {distances[name].median():.0f};"
        f" {copied(distances[name], yardstick):.0%} nearer than 90% of the held-out pictures;"
        f" {own:.0%} nearest to the picture with their caption"
    )


def beside_nearest(name):
    """A row of samples, and below each its nearest training picture."""
    rows = to_pil(samples[name][:SHOWN]) + to_pil(train[which[name][:SHOWN]])
    return grid(rows, [name] * SHOWN + [f"at {x:.0f}" for x in distances[name][:SHOWN]], SHOWN)


first, middle, last = samples
beside_nearest(first)

# %% [markdown]
r"""
`nano` as it comes. Above its samples, below each the nearest training picture. They have little in common.
"""

# %%
beside_nearest(middle)

# %% [markdown]
r"""
After a few steps, still no copies. They are not better pictures either.
"""

# %%
beside_nearest(last)

# %% [markdown]
r"""
In the end, most samples stand above the very picture that had their caption: the same things at the same places, although hardly a
caption says where they are. The faults are new, the scene is not.
"""

# %%
figure, axis = plt.subplots(figsize=(7, 3.2))
far = max(x.max().item() for x in (yardstick, *distances.values()))
bins = torch.linspace(0, far, 25)
axis.hist(yardstick, bins, density=True, color="0.8", label="held-out pictures")
for (name, x), line in zip(distances.items(), ("-", "--", ":"), strict=True):
    axis.hist(x, bins, density=True, histtype="step", lw=2, ls=line, label=f"samples, {name}")
axis.axvline(yardstick.quantile(0.1), color="black", lw=1)
axis.set(xlabel="distance of the nearest training picture", ylabel="density")
axis.legend()
plt.show()

# %% [markdown]
r"""
The gray area is the yardstick, the vertical line its 10% quantile. The samples of the last model pile up to the left of it.
"""

# %%
if not FAST:
    near = {name: copied(x, yardstick) for name, x in distances.items()}
    assert max(near[first], near[middle]) < 0.25, "there are copies before the end"
    assert near[last] > 0.35, "the last model does not copy"
    assert (which[last] == torch.arange(PICTURES)).float().mean() > 0.6, (
        "samples are near to other scenes"
    )

# %% [markdown]
r"""
## 5. What takes it back

More pictures, fewer steps and several captions of each picture help before training. Afterwards, an average of old and new weights
helps (WiSE-FT): decay 0 is the new model, 1 is the old one. It costs no training.
"""

# %%
from minimuse.train_state import keep_old

show(keep_old)

# %%
tuned, decays, table = copy.deepcopy(muse), (0.0, 0.25, 0.5, 0.75, 1.0), []
for decay in decays:
    tuned.parts["base"] = copy.deepcopy(models[last])
    keep_old(tuned, muse, decay)
    far, _ = nearest(draw(tuned.base), train)
    table.append((loss_of(tuned.base, known), loss_of(tuned.base, new), copied(far, yardstick)))
of_known, of_new, copies = zip(*table, strict=True)
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
axes[0].plot(decays, of_known, "o-", label="pictures of training")
axes[0].plot(decays, of_new, "s--", label="new pictures")
axes[0].set(xlabel="decay: how much of the old model", ylabel="loss, nats")
axes[0].legend()
axes[1].plot(decays, copies, "o-")
axes[1].axhline(0.1, color="0.5", ls=":")
axes[1].set(xlabel="decay: how much of the old model", ylabel="fraction too near", ylim=(0, 1))
plt.show()

# %% [markdown]
r"""
Between the two ends, the loss on new pictures is lower than the new model's, and the fraction of copies (dotted: what held-out
pictures have) is smaller. But the training pictures are known less, too: what was learned by heart goes first, and with it some of what
was to be learned. So try several decays, and look at samples of new words *and* of old ones.
"""

# %%
if not FAST:
    assert min(of_new) < of_new[0] - 0.1, "averaging takes nothing back"
    assert copies[2] < copies[0], "half of the old weights copy as much"

# %% [markdown]
r"""
## What failure looks like

**A copy that was moved.** Our distance compares pixels at the same place. We move the training pictures by a few pixels. Everybody would
call that a copy.
"""

# %%
for pixels in (0, 1, 3):
    moved = train.roll(pixels, 3)
    far, _ = nearest(moved, train)
    print(
        f"moved by {pixels}: {copied(far, yardstick):.0%} are nearer than 90% of the held-out pictures"
    )
grid(to_pil(train[:3]) + to_pil(moved[:3]), ["original"] * 3 + ["moved by 3"] * 3, SHOWN)

# %%
assert FAST or copied(far, yardstick) < 0.9, "the distance finds moved copies as well"

# %% [markdown]
r"""
**The yardstick without the tokenizer.** Someone compares samples with sharp pictures, because the tokenizer seems to be beside the point:
"""

# %%
sharp = area_downsample(images)
blind, _ = nearest(sharp[PICTURES:], sharp[:PICTURES])
print(f"held-out, through the tokenizer: 10% nearer than {yardstick.quantile(0.1):.1f}")
print(f"held-out, sharp: 10% nearer than {blind.quantile(0.1):.1f}")
itself, _ = nearest(train, sharp[:PICTURES])
print(
    f"a perfect copy out of the tokenizer is {itself.median():.1f} from its sharp original, not 0"
)

# %%
assert itself.median() > 1, "the tokenizer loses nothing"

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

Find a distance that is small for moved and recolored copies, and that still ranks held-out pictures as far. Its yardstick has to be
measured anew. With which pictures do you show that it finds the copies that ours misses? And: at how many `PICTURES` are half of the
samples too near after the same number of steps? Predict it before you run it.
"""

# %% [markdown]
r"""
## Summary

- A folder with captions is enough to fine-tune. Look at the frozen tokenizers first.
- The loss on held-out pictures says when to stop. The gap to the loss of training is memorization.
- Copies show only beside their nearest training picture, and only against a yardstick of held-out pictures that took the same way.
- An average with the old weights takes back much of what was forgotten, and some of what was learned.
- A distance of pixels finds exact copies, and misses moved ones. So "no copies found" is always a statement on one distance.
"""

# %% [markdown]
r"""
## Further reading

- The same in five commands, with what it measured: [`benchmarks/finetune.md`](../benchmarks/finetune.md).
- Wortsman et al. 2021, *Robust fine-tuning of zero-shot models* (WiSE-FT), [arXiv 2109.01903](https://arxiv.org/abs/2109.01903).
- Somepalli et al. 2022, *Diffusion Art or Digital Forgery?*, [arXiv 2212.03860](https://arxiv.org/abs/2212.03860): copies in diffusion models.
- Carlini et al. 2023, *Extracting Training Data from Diffusion Models*, [arXiv 2301.13188](https://arxiv.org/abs/2301.13188).
- Ruiz et al. 2022, *DreamBooth*, [arXiv 2208.12242](https://arxiv.org/abs/2208.12242): one subject from a handful of pictures.
"""
