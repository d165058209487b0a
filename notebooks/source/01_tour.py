# %% [markdown]
r"""
# 1. A tour of Muse

*From a sentence to a picture in one notebook: every part of Muse, seen once, before the other notebooks take each apart.*

|  |  |
|---|---|
| **Paper** | [Muse](https://arxiv.org/abs/2301.00704), figure 3 and section 2 |
| **You will learn** | what the four networks do · what a token is · why a picture is drawn in steps · where text, guidance and editing come in |
| **Before this** | Python, and having seen a PyTorch tensor; no knowledge of image generation |
| **Takes** | @takes@; about 60 minutes of your time |
| **Files** | [`muse.py`](../minimuse/muse.py), the whole flow |
"""

# %% knobs
import os

import diagrams
import matplotlib.pyplot as plt
import torch
from checks import check_guide, check_schedule
from view import animation, show, style

from minimuse import Muse
from minimuse.plots import film, grid, mask_overlay

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: the same cells, fewer pictures
CHECKPOINT = "toy"  # a shipped name or a folder
PICTURES = 2 if FAST else 6  # a row of pictures
style()

# %% [markdown]
r"""
Muse makes pictures out of **tokens**, as a language model makes texts out of words. Four networks share the work:

1. a **tokenizer** turns a small picture into a short grid of whole numbers, and back;
2. a **base transformer** fills such a grid, a few cells at a time, while it reads your sentence;
3. a **super-resolution transformer** fills a finer grid, while it reads the sentence and the coarse grid;
4. a second tokenizer turns the fine grid into pixels.

A fifth network was trained by others on text alone, and stays as it is: a **language model**, which turns your
sentence into vectors. Section 3 walks along this flow and looks at what comes out of each part. Here is all of it on one page, with
the sizes of the checkpoint that this notebook uses:
"""

# %%
muse = Muse.from_pretrained(CHECKPOINT)
diagrams.cascade(muse.config)

# %% [markdown]
r"""
Read the two upper rows from left to right: that is how a picture is made. The dashed row below is needed only for training. $L$ is
the number of pieces of the sentence; the other letters and words stand in the [glossary](glossary.md).
"""

# %% [markdown]
r"""
## 1. The first picture

`from_pretrained` has loaded a checkpoint that comes with the package. Its world is small on purpose: one to three
spheres, cubes and cylinders on a gray floor. Whether a picture is right can then be *counted*, which nobody can do
for photographs of everything.
"""

# %%
first = muse.generate("a large red cube", seed=0)[0]
grid([first], ["a large red cube"], scale=256 // first.width)

# %% [markdown]
r"""
The same seed makes nearly the same picture on every machine, since all random numbers are drawn on the CPU; only
rounding differs. Another seed is another picture of the same prompt:
"""

# %%
images = muse.generate("a large red cube", n=PICTURES, seed=1)
grid(images, [f"seed {1 + i}" for i in range(PICTURES)], columns=PICTURES)

# %% [markdown]
r"""
How large are the parts? A *parameter* is one learned number. The paper's base model has 3,000 million of them; ours is
the same class with smaller sizes. The language model is not counted: it is not ours.
"""

# %%
for name, part in muse.parts.items():
    print(f"{name:>15}  {sum(p.numel() for p in part.parameters()) / 1e6:5.2f} million parameters")
print(
    f"\nlow-resolution pictures: {muse.config.low_tokenizer.image_size} px, {muse.config.base.tokens} tokens"
)
print(
    f"finished pictures:       {muse.config.high_tokenizer.image_size} px, {muse.config.superres.tokens} tokens"
)

# %% [markdown]
r"""
## 2. Is it right?

Below, each prompt is drawn once with seed 0, and nothing is picked. A small network that we call the **detector** was
trained on rendered scenes to say what is in a picture. `matches` compares its reading with what the prompt asks for.
Six pictures prove little; notebook 11 counts over many prompts.
"""

# %%
from minimuse.eval_networks import Detector
from minimuse.eval_prompts import matches, parse_prompt

detector = Detector.from_pretrained()
prompts = [
    "a large green sphere",
    "a small blue cylinder",
    "a large yellow metal cube",
    "two small red cubes",
    "a red sphere left of a blue cube",
    "three gray spheres",
][: 4 if FAST else 6]
drawn = [muse.generate(prompt, seed=0)[0] for prompt in prompts]


def verdict(image, prompt):
    found = matches(detector.detect([image])[0], parse_prompt(prompt))
    return "right" if found.right else "wrong: " + "; ".join(found.wrong)


verdicts = [verdict(i, p) for i, p in zip(drawn, prompts, strict=True)]
assert verdicts.count("right") >= len(prompts) - 1, "more than one of the pictures is wrong"
grid(drawn, [f"{p}: {v}" for p, v in zip(prompts, verdicts, strict=True)], columns=len(prompts))

# %% [markdown]
r"""
## 3. The whole flow on one screen

This is the method that everything above went through: the base transformer fills the coarse grid, then super-resolution the fine
one. The next sections follow the diagram, part by part. You may skip the source on a first reading.
"""

# %%
show(Muse.decode)

# %% [markdown]
r"""
### A sentence becomes vectors (Muse 2.1, notebook 2)

The language model gives one vector for each piece of the sentence. Prompts of different lengths are padded, and a
mask says which positions hold text. $B$ prompts, at most $L$ pieces, vectors of $D_{LM}$ numbers.
"""

# %%
context = muse.encoder.encode(["a large red cube", "two small blue metal spheres on a gray floor"])
print("embeds (B, L, D_lm):", tuple(context.embeds.shape))
print(
    "mask   (B, L):      ",
    tuple(context.mask.shape),
    "- pieces of text in each:",
    context.mask.sum(1).tolist(),
)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True)
titles = ["a large red cube", "two small blue metal spheres on ..."]
for ax, embeds, title in zip(axes, context.embeds, titles, strict=True):
    ax.imshow(embeds[:, :96], aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    ax.set(title=title, xlabel="the first 96 numbers of each vector")
    ax.set_yticks(range(len(embeds)))
    ax.grid(False)
axes[0].set_ylabel("piece of text")
plt.show()

# %% [markdown]
r"""
Each row is a piece of text (the first and the last mark the beginning and the end), each column one number of its
vector. The blank rows at the bottom left are padding: zeros, which no transformer looks at.
"""

# %% [markdown]
r"""
### A picture becomes tokens (Muse 2.2, notebook 3)

A tokenizer cuts a picture into a grid and says for each cell which of $V$ learned patterns, the **codebook**, fits
best. The index of that pattern is the token. Here is a rendered scene, its two grids, and what comes back from them.
"""

# %%
from minimuse.data_scenes import Scene, Thing, render
from minimuse.utils import area_downsample, to_pil

scene = Scene(
    (Thing("red", "cube", x=-0.8), Thing("blue", "sphere", size="small", x=1.0, depth=-0.4))
)
pixels = render([scene], muse.config.high_tokenizer.image_size)  # (1, 3, H, W) in [-1, 1]
small = area_downsample(
    pixels, muse.config.high_tokenizer.image_size // muse.config.low_tokenizer.image_size
)
with torch.inference_mode():
    low, high = muse.low_tokenizer.encode(small), muse.high_tokenizer.encode(pixels)
    back_low, back_high = muse.low_tokenizer.decode(low), muse.high_tokenizer.decode(high)
print(f"low tokens  {tuple(low.shape)} of {muse.low_tokenizer.codebook_size} codes")
print(f"high tokens {tuple(high.shape)} of {muse.high_tokenizer.codebook_size} codes")
print("the first eight low tokens:", low[0, :8].tolist())

# %%
g_low, g_high = muse.config.base.grid, muse.config.superres.grid
shown = [
    ("the scene", to_pil(pixels)[0]),
    (f"{g_low} x {g_low} tokens", low.view(g_low, g_low)),
    ("back from them", to_pil(back_low)[0]),
    (f"{g_high} x {g_high} tokens", high.view(g_high, g_high)),
    ("back from them", to_pil(back_high)[0]),
]
figure, axes = plt.subplots(1, 5, figsize=(11, 2.5))
for ax, (title, picture) in zip(axes, shown, strict=True):
    ax.imshow(picture, cmap="nipy_spectral")
    ax.set_title(title)
    ax.axis("off")
plt.show()

# %% [markdown]
r"""
A colour in the token pictures stands for a code; codes have no order, so similar colours mean nothing. In the fine grid you can see
the objects: an even face repeats one code, an edge changes it. Compare the two pictures that come back: the coarse grid keeps
what is where, the fine grid adds sharp edges.
"""

# %% [markdown]
r"""
### Hidden tokens are predicted (Muse 2.3 and 2.6, notebooks 4 and 5)

Training hides a random part of the grid behind a special token `[MASK]` and asks for what was there. The fraction that is
hidden varies from a little to nearly all. With $x$ the tokens, $M$ the hidden positions, $c$ the text:

$$\mathcal{L} = -\,\mathbb{E}\;\frac{1}{|M|}\sum_{i \in M} \log p_\theta(x_i \mid x_{\text{visible}}, c)$$

$\mathcal{L}$, the loss, is a mean ($\mathbb{E}$) over pictures and hidden sets. $p_\theta$ is the probability that the transformer
gives to the true token; it comes from $V$ numbers per position, the **logits**. Let us hide 60% of the grid above, and see what the base
model expects there.
"""

# %%
from minimuse.masking import random_mask

text = muse.encoder.encode(["a red cube left of a small blue sphere"])
hidden = random_mask(low, torch.tensor([0.6]), torch.Generator().manual_seed(3))  # (1, N) bool
with torch.inference_mode():
    memory = muse.base.memory(text)
    logits = muse.base(low.masked_fill(hidden, muse.base.mask_id), memory)  # (1, N, V)
    guess = torch.where(hidden, logits.argmax(-1), low)
    guessed = muse.low_tokenizer.decode(guess)
print("logits (B, N, V):", tuple(logits.shape))
print(
    f"of {int(hidden.sum())} hidden tokens {int((guess == low)[hidden].sum())} are guessed to the very code"
)

# %%
grid(
    [to_pil(back_low)[0], mask_overlay(to_pil(back_low)[0], hidden[0]), to_pil(guessed)[0]],
    ["tokens of the scene", "what the model sees", "its best guess for each"],
    columns=3,
    scale=160 // small.shape[-1],
)

# %% [markdown]
r"""
Many guesses name another code than the true one and still look right: several codes of a codebook look alike. So the
fraction of exact hits says little; the picture says more, and the likelihood (notebook 4) says most.
"""

# %% [markdown]
r"""
### Drawing from nothing (Muse 2.8, notebook 7)

If the model can fill any holes, it can fill a grid that is all holes. But not all at once.

**Predict, then run.** Below are coarse pictures of one prompt, drawn in 1, 2, 4 and 24 steps. In one step every token is drawn at the same moment, so none knows what the others became.
What will be in the first row: two cubes that are out of focus, two cubes in wrong colours, or something else?
"""


# %%
def coarse(prompt, n, **how):
    """n pictures of the base model only, the first with seed 0."""
    for step in muse.steps(prompt, n=n, seed=0, **how):
        if step.stage != "base":
            break
        last = step
    return muse.picture(last)


counts = [1, 2, 4, muse.config.base_sampling.steps]
WANTED = "two small blue cubes"
by_steps = {t: coarse(WANTED, PICTURES, steps=t) for t in counts}
rows = [picture for pictures in by_steps.values() for picture in pictures]
captions = [f"{t} step{'s' * (t > 1)}" for t in counts for _ in range(PICTURES)]
grid(rows, captions, columns=PICTURES, scale=96 // rows[0].width)

# %% [markdown]
r"""
Lumps and fragments. Each token by itself is a fair draw: a cube is likely here, and there, and there as well. No token in the
first row knows that two small cubes leave all other positions empty. Tokens drawn in the *same* step cannot agree; tokens
of *later* steps see the earlier ones and fit in with them. So Muse fixes a few tokens, looks again, and fixes some
more. In the last row there are two cubes.
"""

# %%
right = {t: sum(verdict(i, WANTED) == "right" for i in row) for t, row in by_steps.items()}
print(f"right, of {PICTURES}:", right)
assert right[1] == 0, "one step draws two cubes"
assert right[counts[-1]] >= PICTURES - 2, "many steps do not draw two cubes"

# %%
steps = list(muse.steps("a large blue cube", seed=5))
print(len(steps), "steps; tokens fixed in each:", [int(s.revealed.sum()) for s in steps])
film(muse, steps, most=8)

# %% [markdown]
r"""
Gray is still `[MASK]`. The frames marked *base* are the base model on the coarse grid. Those marked *superres* are super-resolution, which
starts from nothing again on the fine grid, but knows the coarse tokens. Odd colours next to gray squares mean nothing:
the decoder has to be given some code there. The base model's steps as an animation:
"""

# %%
base_steps = [s for s in steps if s.stage == "base"]
frames = [mask_overlay(muse.picture(s)[0], s.masked[0]) for s in base_steps]
animation(frames, ms=300)

# %% [markdown]
r"""
How many tokens are fixed in each step? The fraction still hidden follows a cosine: after $i$ of $T$ steps,

$$\Big\lfloor N \cos\!\Big(\frac{\pi}{2}\,\frac{i}{T}\Big) \Big\rfloor \text{ of } N \text{ tokens stay masked.}$$

Few are fixed at the beginning, when little is known; many at the end, when most is decided.
"""

# %%
figure, axes = plt.subplots(1, 2)
left = [int(s.masked.sum()) for s in base_steps]
axes[0].plot([len(low[0]), *left], "o-")
axes[0].set(xlabel="step", ylabel="tokens still masked", title="the cosine schedule")
axes[1].bar(range(1, len(left) + 1), [int(s.revealed.sum()) for s in base_steps])
axes[1].set(xlabel="step", ylabel="tokens fixed in it", title="few first, then more")
axes[1].set_xticks(range(2, len(left) + 1, 2))
plt.show()

# %% [markdown]
r"""
**Predict, then run.** In each step the model fixes the tokens that it is most certain of (usually with a little noise, so
not all pictures begin alike; here without). Where will those of the first steps lie: around the cube, or on it?
The next cell draws with several seeds and notes when each position is fixed.
"""

# %%
when, runs = torch.zeros(muse.config.base.tokens), 4 if FAST else 16
for step in muse.steps("a large blue cube", n=runs, seed=0, choice_temperature=0.0):
    if step.stage != "base":
        break
    when += (step.revealed * (step.index + 1)).sum(0) / runs
figure, ax = plt.subplots(figsize=(4.2, 3.2))
shown = ax.imshow(when.view(g_low, g_low), cmap="magma")
figure.colorbar(shown, label="mean step in which it is fixed")
ax.set(title="early is dark, late is bright", xlabel="column", ylabel="row")
ax.grid(False)
plt.show()

# %% [markdown]
r"""
Around it. What lies far from any object is predictable and comes early: empty floor is empty floor. The middle, where
the cube stands a little more to the left or to the right, comes late, when its neighbours are fixed.
"""

# %%
fixed = when.view(g_low, g_low)
middle = fixed[g_low // 4 : -g_low // 4, g_low // 4 : -g_low // 4].mean()
assert middle > fixed[[0, -1]].mean() + 2, "the middle is not fixed late"

# %% [markdown]
r"""
### Guidance: how much the text counts (Muse 2.7, notebook 6)

In training the text is removed from 10% of the examples, so the model also knows pictures *without* a text. When
drawing, both predictions are made, and the difference that the text makes is exaggerated by a scale $t$:

$$\ell_g = (1 + t)\,\ell_c - t\,\ell_u$$

with $\ell_c$ the logits with the text and $\ell_u$ those without. $t = 0$ is the plain model.
"""

# %%
from minimuse.cfg import guide

show(guide)

# %%
scales = [0.0, 1.0, 3.0, 12.0]
rows = [muse.generate("three gray spheres", n=PICTURES, seed=0, guidance=t) for t in scales]
good = [[verdict(image, "three gray spheres") == "right" for image in row] for row in rows]
captions = [
    f"t = {t:g}" + " ?" * (not ok) for t, row in zip(scales, good, strict=True) for ok in row
]
rows = [image for row in rows for image in row]
grid(rows, captions, columns=PICTURES, scale=1 + 64 // first.width)

# %% [markdown]
r"""
The prompt is *three gray spheres*; a question mark says that the detector finds something else. (It errs too: a brownish sphere may
pass.) A little guidance repairs most pictures. With a very large scale the model picks tokens that it has hardly seen together, and stray objects and fragments appear. Muse lets $t$
rise during the decode: variety first, faithfulness later. Notebook 6 counts what it does.
"""

# %%
none, little, _, much = (sum(row) for row in good)
assert FAST or max(none, much) < little, "a little guidance is not the best"

# %% [markdown]
r"""
### Super-resolution: the same idea on a finer grid (Muse 2.4, notebook 8)

The second transformer reads the coarse tokens as well as the text. Compare the coarse picture with the finished one: the cube stays
where it was, and its edges become sharp.
"""

# %%
before, after = muse.picture(base_steps[-1])[0], muse.picture(steps[-1])[0]
captions = [f"coarse, {before.width} px", f"finished, {after.width} px"]
grid([before.resize(after.size, 0), after], captions, columns=2, scale=256 // after.width)

# %% [markdown]
r"""
## 4. Editing comes for free (Muse 3.3, notebook 10)

A model that fills holes can repaint part of a picture: hide the tokens of a region and decode again. No further
training is needed. The mask is `True` where to repaint; here it is the right half.
"""

# %%
side = first.width
mask = [[x > side // 2 for x in range(side)] for y in range(side)]
source = muse.generate("a small green sphere", seed=2)[0]
WHOLE = (
    "a small green sphere left of a large purple cube"  # the whole picture, not only the new half
)
inpainted = muse.inpaint(source, mask, WHOLE, seed=1)[0]
edited = muse.edit(source, "a small red sphere", seed=1, iterations=20 if FAST else 100)[0]
grid(
    [source, inpainted, edited],
    ["a small green sphere", "right half repainted", "edited: a small red sphere"],
    columns=3,
)

# %% [markdown]
r"""
The prompt of the second picture describes the *whole* picture, as captions do. The third picture had no mask: again and again a random
8% of the tokens is hidden and drawn anew under the new prompt, until the picture has drifted there. Such small models do this well
with some pictures and badly with others; try other seeds.
"""

# %%
print(
    f"{WHOLE}: {verdict(inpainted, WHOLE)}; a small red sphere: {verdict(edited, 'a small red sphere')}"
)
assert FAST or verdict(inpainted, WHOLE) == verdict(edited, "a small red sphere") == "right"

# %% [markdown]
r"""
## What failure looks like

Two failures that are easy to recognize. **Too few steps** you have seen: lumps and fragments. The other is **a prompt from
another world**. The captions of its training have fewer than 300 different words, and it prints a warning if most words of a prompt
are not among them. Then it draws all the same: nothing in the method can say "I do not know".
"""

# %%
outside = ["dogs playing chess", "a crimson ball", "a tiny shiny block"]
pictures = [muse.generate(prompt, seed=0)[0] for prompt in outside]
grid(pictures, outside, columns=3)

# %% [markdown]
r"""
No dogs, no chess: objects on a floor. *Crimson*, *ball*, *tiny*, *shiny* and *block* were in no training caption either.
But the language model has read them elsewhere, so some may come through: compare each picture with *a red sphere* and *a small metal
cube*, which say the same in known words. Notebook 2 measures which words do.
"""

# %% [markdown]
r"""
## Exercises

Each exercise is a function to write. The last line of its cell checks it at once, and says which property fails, with
a small counter-example. The folded cell below each holds an answer.
It is not an exam: run it on a first attempt, read what it says, and go on from there.
"""

# %% [markdown]
r"""
### Exercise 1.1: a schedule of your own

*Difficulty 1 of 3, about 10 minutes.*

A schedule is a function from progress $u \in [0, 1]$ to the fraction of tokens that is still masked. It begins at 1, ends
at 0, and never rises. Write one that is not the cosine, such as one that reveals most tokens at the beginning.

<details><summary>Hint</summary>

Sketch it first: from (0, 1) down to (1, 0), steep at the beginning. The stub runs the other way. Turn it around, and then ask what bends a
straight line that falls from 1 to 0.

</details>
"""


# %%
def my_schedule(u):
    return u  # your code: this one runs backwards


check_schedule(my_schedule)


# %% tags=["solution"]
def my_schedule(u):
    return (1 - u) ** 2  # many first, few in the end


check_schedule(my_schedule)

# %% [markdown]
r"""
`generate` takes your function in place of a schedule's name. Does it draw better than the cosine, or worse? One picture says
little; notebook 13 shows how to find out.
"""

# %%
names = {"cosine": "cosine", "linear": "linear", "mine": my_schedule}
tried = [
    muse.generate("a large cyan sphere", seed=3, schedule=s, steps=6)[0] for s in names.values()
]
grid(tried, [f"{name}, 6 steps" for name in names], columns=3)

# %% [markdown]
r"""
### Exercise 1.2: guidance in one line

*Difficulty 1 of 3, about 5 minutes.*

Write $\ell_g = (1 + t)\,\ell_c - t\,\ell_u$. Then try a wrong sign, and see what the check says.

<details><summary>Hint</summary>

What must be left at $t = 0$? Put 0 into the stub and into the formula, and compare.

</details>
"""


# %%
def my_guide(cond, uncond, t):
    return uncond + t * (cond - uncond)  # your code: this is another convention, and not Muse's


check_guide(my_guide)


# %% tags=["solution"]
def my_guide(cond, uncond, t):
    return (1 + t) * cond - t * uncond


check_guide(my_guide)

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

What makes a prompt hard: the number of objects, their size, or where one stands relative to another? Write ten prompts of each of two
kinds, predict which kind is harder, draw one picture of each, and count `verdict`. Then look at those called wrong yourself. How many of
them would you call right?
"""

# %% [markdown]
r"""
## Summary

A frozen language model turns the prompt into vectors. A transformer fills a coarse grid of picture tokens in several
steps, the most certain tokens first, and sees in each step what it has fixed before. A second one does the same on a fine
grid. A tokenizer's decoder turns the tokens into pixels. Guidance exaggerates what the text changes. A model that fills holes can
also edit.

Everything that you saw is a few lines of `minimuse` that you can open with `show`.
"""

# %% [markdown]
r"""
## Further reading

- Chang et al. 2023, *Muse: Text-To-Image Generation via Masked Generative Transformers*, [arXiv 2301.00704](https://arxiv.org/abs/2301.00704).
- Chang et al. 2022, *MaskGIT*, [arXiv 2202.04200](https://arxiv.org/abs/2202.04200): the same idea without text.
- Next: [2. Scenes and language models](02_scenes_and_language_models.ipynb), or straight to
  [4. Masking](04_masking.ipynb) and [7. Parallel decoding](07_parallel_decoding.ipynb), the heart of it.
"""
