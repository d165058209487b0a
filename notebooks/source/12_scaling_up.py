# %% [markdown]
r"""
# 12. Scaling up: from nano to 3B on the back of an envelope

*What a model costs in parameters, bytes, FLOPs, hours and money, worked out before anyone rents a machine.*

|  |  |
|---|---|
| **Paper** | [Muse](https://arxiv.org/abs/2301.00704), A.1 to A.3 and table 3 |
| **You will learn** | where parameters sit · why training costs 6 FLOPs per parameter and token · what fills the memory of a GPU, and what sharding takes away · why few parallel steps are fast although they compute more |
| **Before this** | [5. The base transformer](05_base_transformer.ipynb), [8. Super-resolution](08_super_resolution.ipynb); matrix products; powers of ten |
| **Takes** | @takes@; about 75 minutes of your time |
| **Files** | [`train_budget.py`](../minimuse/train_budget.py), [`config.py`](../minimuse/config.py), [`launch/`](../minimuse/launch) |
"""

# %% knobs
import os

import matplotlib.pyplot as plt
import torch
from checks import check_layer_parameters, check_sharded_bytes, check_training_flops
from view import show, style

from minimuse.config import preset

FAST = bool(os.environ.get("MINIMUSE_FAST"))  # the tests' setting: two presets of four
PRESETS = ["nano", "paper_3b"] if FAST else ["nano", "toy", "paper_632m", "paper_3b"]
# An accelerator of your choice, from its data sheet; these are round numbers of a large one.
PEAK = 400e12  # FLOP/s of bf16 matrix products
BANDWIDTH = 2e12  # bytes per second between its memory and its cores
MEMORY = 80e9  # bytes
USED = 0.4  # the fraction of PEAK that a good training run reaches
PRICE = 2.0  # money for an hour of it, in your currency
style()

# %% [markdown]
r"""
## 1. One code, four sizes

minimuse's classes are the paper's; a **preset** is a set of numbers for them. Nothing else changes between the model that trains on a
laptop and the one that took 512 TPU cores a week. Let us see which numbers differ.
"""

# %%
from minimuse.config import to_dict

configs = {name: preset(name) for name in PRESETS}
sizes = ["grid", "codebook_size", "text_width", "layers", "heads", "width", "mlp_width"]
print(f"{'base model':16}" + "".join(f"{name:>14}" for name in configs))
for field in sizes:
    print(
        f"{field:16}"
        + "".join(f"{to_dict(config)['base'][field]:>14,}" for config in configs.values())
    )

# %% [markdown]
r"""
There is one dataclass per component. A `MuseConfig` holds them all, and a `StageConfig` for each of the five stages of training, which
`train_muse` goes through in turn.

A configuration is frozen: nobody changes it on the way. `changed` makes a new one, from the same texts that the command line takes, and
refuses what does not fit together. As plain values it goes into a checkpoint's `config.json`, and comes back.
"""

# %%
from dataclasses import fields

from minimuse.config import MuseConfig, StageConfig
from minimuse.sampler import SamplingConfig
from minimuse.train import train_muse
from minimuse.transformer import TransformerConfig
from minimuse.vqgan import VQGANConfig

for part in (VQGANConfig, TransformerConfig, SamplingConfig, StageConfig, MuseConfig):
    print(f"{part.__name__:18}{len(fields(part)):>3} fields. {part.__doc__.splitlines()[0]}")
for name, stage in configs["nano"].stages.items():
    print(f"nano, stage {name}: {stage.steps:,} steps of {stage.batch} examples")
show(train_muse)

# %%
from minimuse.cli_commands import changed
from minimuse.config import from_dict

wider = changed(configs["nano"], ["base.width=192", "base.mlp_width=768", "base.heads=6"])
print(
    "a wider nano:",
    wider.base.width,
    "- and back from plain values:",
    from_dict(to_dict(wider)) == wider,
)
try:
    changed(wider, ["base.heads=5"])
except ValueError as error:
    print("5 heads:", error)

# %% [markdown]
r"""
## 2. Parameters

### One layer

Let $D$ be the width and $F$ the width inside the MLP. A layer of the base model holds nothing but matrices (and a few scales of its norms):

- self-attention: queries, keys, values and the output, $4 D^2$;
- cross-attention to the text: the same four, $4 D^2$;
- the MLP: up and down, $2 D F$.

With the usual $F = 4D$ that is $16 D^2$. A language model without cross-attention has $12 D^2$, the number that you may have met elsewhere.
"""

# %%
from minimuse.transformer import Layer

show(Layer)

# %% [markdown]
r"""
Is it so? The `meta` device has shapes and no memory: on it the 3B model is built in a moment, on any laptop. That is how all counts of
this notebook are made: from the real classes, not from a formula that may lag behind.
"""

# %%
from minimuse.transformer import Transformer


def weights(module):
    return sum(p.numel() for p in module.parameters())


print(f"{'':12}{'one layer':>14}{'4D²+4D²+2DF':>14}{'all layers':>16}{'base model':>16}")
for name, config in configs.items():
    d, f = config.base.width, config.base.mlp_width
    with torch.device("meta"):
        model = Transformer(config.base)
    layer = weights(model.layers[0])
    print(
        f"{name:12}{layer:>14,}{8 * d * d + 2 * d * f:>14,}{weights(model.layers):>16,}{weights(model):>16,}"
    )

# %% [markdown]
r"""
**Predict, then run.** The formula counts only the layers. Embeddings of the codes, the projection of the text, and the output head
come on top. Nano has a few hundred codes, the 3B model 8,192. In which of them are these extras the larger *fraction* of all parameters?
"""


# %%
def census(config):
    """Where a base model's parameters are, as fractions of all."""
    with torch.device("meta"):
        model = Transformer(config.base)
    kinds = {"self-attention": 0, "cross-attention": 0, "MLP": 0}
    for layer in model.layers:
        kinds["self-attention"] += weights(layer.attention)
        kinds["cross-attention"] += weights(layer.cross)
        kinds["MLP"] += weights(layer.mlp)
    kinds["embedding, text, head"] = weights(model) - sum(kinds.values())
    return {kind: n / weights(model) for kind, n in kinds.items()}


fractions = {name: census(config) for name, config in configs.items()}
hatches = ["", "//", "..", "xx", ""]  # so that the parts differ in black and white, too
figure, ax = plt.subplots(figsize=(8, 0.9 + 0.5 * len(fractions)))
left = [0.0] * len(fractions)
for kind, hatch in zip(next(iter(fractions.values())), hatches, strict=False):
    part = [s[kind] for s in fractions.values()]
    ax.barh(list(fractions), part, left=left, label=kind, hatch=hatch, edgecolor="white")
    left = [a + b for a, b in zip(left, part, strict=True)]
ax.invert_yaxis()
ax.set(xlabel="fraction of the base model's parameters", xlim=(0, 1))
ax.grid(False)
ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
plt.show()

# %% [markdown]
r"""
In nano, although it has few codes. Layers grow with $D^2$ and with their number, embeddings only with $D$: the larger the model, the less they weigh.
Rules of thumb about "the parameters" are rules about layers, so they hold for large models and mislead for tiny ones.
"""

# %% [markdown]
r"""
### Exercise 12.1: count a layer

*Difficulty 1 of 3, about 5 minutes.*

Write how many numbers the matrices of one layer hold: self-attention, cross-attention, MLP. The check compares with the real class.

<details><summary>Hint</summary>

The list above has all matrices. The MLP's width is `mlp_width`, not always four times `width`.

</details>
"""


# %%
def my_layer_parameters(width, mlp_width):
    return 12 * width**2  # your code: this one has forgotten something


check_layer_parameters(my_layer_parameters)


# %% tags=["solution"]
def my_layer_parameters(width, mlp_width):
    return 4 * width**2 + 4 * width**2 + 2 * width * mlp_width


check_layer_parameters(my_layer_parameters)

# %% [markdown]
r"""
### All networks

Muse is more than its base model. The language model, which is not ours and stays frozen, is left out here; the paper's T5-XXL
alone has 4.6 billion.
"""

# %%
from minimuse.muse import build

counts = {}
for name, config in configs.items():
    with torch.device("meta"):  # shapes without memory
        counts[name] = {
            part: sum(p.numel() for p in net.parameters()) for part, net in build(config).items()
        }
print(f"{'millions':18}" + "".join(f"{name:>14}" for name in counts))
for part in counts["nano"]:
    print(f"{part:18}" + "".join(f"{c[part] / 1e6:>14,.2f}" for c in counts.values()))

# %% [markdown]
r"""
## 3. FLOPs

A **FLOP** is one multiplication or one addition. A matrix of $P$ numbers, applied to one token, multiplies each number once and adds
once: $2P$. Going backwards, two such products are made, one for the gradient of the input and one for the gradient of the weights: $4P$. Together

$$\text{training} \approx 6\,P \text{ FLOPs per token,} \qquad \text{using it} \approx 2\,P.$$

This leaves out the two products of tokens with tokens inside attention, $q k^\top$ and weights times $v$. They have no parameters, and cost $4 N^2 D$
forwards.
"""

# %%
from minimuse.train_budget import count_flops, si

d, n = 64, 48
layer = Layer(d, 4, 4 * d, 0, 0.0, cross=False)  # without cross-attention, for a start
x = torch.randn(1, n, d, requires_grad=True)
forward = count_flops(lambda: layer(x))
both = count_flops(lambda: layer(x).sum().backward())
matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
print(
    f"forward          {forward:>12,}   2 P N = {2 * matrices * n:>12,}   + attention 4 N² D  = {4 * n * n * d:>10,}"
)
print(
    f"and backward     {both:>12,}   6 P N = {6 * matrices * n:>12,}   + attention 12 N² D = {12 * n * n * d:>10,}"
)
assert forward == 2 * matrices * n + 4 * n * n * d, "the formula misses something"
assert both == 3 * forward, "backward is not twice forward"

# %% [markdown]
r"""
The sums agree to the last digit. `count_flops` counts in the real forward and backward pass, so it also counts what a formula forgets. Here it is
against the rule of thumb, for the base model of each preset: one picture of $N$ tokens, with its text.
"""

# %%
from minimuse.train_budget import stage_budget

base = {name: stage_budget(config, "base") for name, config in configs.items()}
print(f"{'':12}{'counted per picture':>20}{'6 P N':>14}{'ratio':>8}")
for name, b in base.items():
    counted, rule = b.step_flops / b.batch, 6 * b.parameters * configs[name].base.tokens
    print(f"{name:12}{si(counted, 'FLOP'):>20}{si(rule, 'FLOP'):>14}{counted / rule:>8.2f}")
    assert 0.8 < counted / rule < 1.2, "the rule of six is off by more than 20%"

# %% [markdown]
r"""
The rule is good to within 20%. Attention adds to it, in `toy` also the layer that reads the text; the embedding of codes (a lookup) and the keys and values of a short text cost less than $6P$ suggests.

**Predict, then run.** Super-resolution has 4,096 tokens in the paper, 16 times the base model's 256. In a layer of width 1,024, which costs more:
all matrices together, or the $N^2$ products of full attention?
"""

# %%
tokens = [2**k for k in range(6, 17, 2)]
d, block = 1024, 8
matrix = [2 * 16 * d * d] * len(tokens)  # per token
full = [4 * n * d for n in tokens]
axis = [4 * (block**2 + n / block**2) / 2 * d for n in tokens]  # half of the heads each
figure, ax = plt.subplots(figsize=(7, 3.4))
for costs, label, mark in [
    (matrix, "all matrices of the layer", "s-"),
    (full, "full attention", "o-"),
    (axis, "multi-axis attention, blocks of 8 x 8", "^-"),
]:
    ax.loglog(tokens, costs, mark, label=label, base=2)
for n, model, height in [(256, "base", 0.45), (4096, "super-resolution", 0.16)]:
    ax.axvline(n, color="0.7", lw=1, zorder=0)
    at = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "bottom", "ha": "right"}
    ax.annotate(model, (n, height), fontsize=9, color="0.4", **at)
ax.set(xlabel="tokens of a picture", ylabel="FLOPs per token, forward")
ax.legend(fontsize=9)
plt.show()

# %% [markdown]
r"""
The matrices, by a factor of two at 4,096 tokens! Full attention overtakes them only at $N = 8D$, where the lines cross. "Attention is
quadratic" is true, but at these sizes it is not the largest cost. Multi-axis attention (notebook 8) makes the quadratic part 64 times smaller. At 4,096 tokens
this saves a third of the arithmetic, and the memory of $N \times N$ weights where no fused kernel is available.
"""

# %% [markdown]
r"""
### Exercise 12.2: the rule of six

*Difficulty 1 of 3, about 5 minutes.*

Write the FLOPs of training a model of `parameters` weights on `tokens` tokens, without attention's products.

<details><summary>Hint</summary>

Forwards 2 per weight and token, backwards twice as many.

</details>
"""


# %%
def my_training_flops(parameters, tokens):
    return 2 * parameters * tokens  # your code: forward alone


check_training_flops(my_training_flops)


# %% tags=["solution"]
def my_training_flops(parameters, tokens):
    return (2 + 4) * parameters * tokens  # forward, and two products backward


check_training_flops(my_training_flops)

# %% [markdown]
r"""
## 4. Memory

While a model trains, an accelerator holds, for each parameter in fp32 (4 bytes):

| | bytes |
|---|---|
| the weight | 4 |
| its gradient | 4 |
| the optimizer's state: AdamW two moments, Muon one, Adafactor nearly nothing | 8, 4, ~0 |
| its copy in bf16, for the fast products | 2 |

That is **fixed**, whatever the batch. On top come the **activations**: what the forward pass saves for the backward pass, for each example of the batch.
"""

# %%
from minimuse.train_budget import optimizer_bytes

with torch.device("meta"):
    largest = Transformer(configs["paper_3b"].base)
states = {o: optimizer_bytes(largest, o) for o in ("adamw", "muon", "adafactor")}
print(f"optimizer's state of the 3B base model, of {weights(largest):,} parameters:")
for optimizer, size in states.items():
    print(
        f"  {optimizer:10} {si(size, 'B'):>8}  {size / weights(largest):6.3f} bytes per parameter"
    )

# %% [markdown]
r"""
Adafactor keeps a row and a column for each matrix instead of a number for each weight. (The paper trains with it, and with a first moment, $\beta_1 = 0.9$: 4 bytes
more. PyTorch's, which we count, has none.) How do these parts add up? Below, "one example" is what one picture saves on its way forward.
"""

# %%
lean = stage_budget(configs["paper_3b"], "base", checkpointing=True)  # explained below
parts = ["weights", "gradients", "optimizer", "casts"]
b = base["paper_3b"]
figure, ax = plt.subplots(figsize=(8, 2.6))
rows = {"AdamW": states["adamw"], "Muon": states["muon"], "Adafactor": states["adafactor"]}
left = [0.0] * len(rows)
for part, hatch in zip(parts, hatches, strict=False):
    sizes = [(size if part == "optimizer" else getattr(b, part)) / 1e9 for size in rows.values()]
    name = {"casts": "bf16 copies"}.get(part, part)
    ax.barh(list(rows), sizes, left=left, label=name, hatch=hatch, edgecolor="white")
    left = [x + y for x, y in zip(left, sizes, strict=True)]
ax.barh(list(rows), [b.activations / 1e9] * len(rows), left=left, label="one example", color="0.6")
ax.axvline(MEMORY / 1e9, color="k", ls="--", lw=1)
ax.annotate(
    "the accelerator",
    (MEMORY / 1e9, -0.42),
    ha="right",
    fontsize=9,
    xytext=(-4, 0),
    textcoords="offset points",
)
ax.invert_yaxis()
ax.set(xlabel="GB, the 3B base model in training")
ax.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=9)
plt.show()

# %% [markdown]
r"""
**Predict, then run.** The paper's batch is 512 pictures. With Adafactor, how many fit at once on an accelerator of this size: hundreds, dozens, or a handful?
And with **activation checkpointing**, where each layer saves only its input, and runs again when the backward pass needs the rest?
"""

# %%
for name, budget in [("as it is", b), ("checkpointed", lean)]:
    print(
        f"{name:13} one example saves {si(budget.activations, 'B'):>8}; {budget.examples(MEMORY):4} fit;"
        f" {si(budget.step_flops / budget.batch, 'FLOP')} an example"
    )
print(
    f"checkpointing: {b.activations / lean.activations:.0f} times less saved for {lean.step_flops / b.step_flops - 1:.0%} more FLOPs"
)
assert 12 <= b.examples(MEMORY) < 100 <= lean.examples(MEMORY), "not dozens, then hundreds"

# %% [markdown]
r"""
Dozens, then hundreds. The price is part of the forward pass, once more: at most $2P$ on top of $6P$, a third, and less here, since running again
stops as soon as all that the backward pass needs is there. In practice somewhat fewer fit than counted, since gradients of activations and workspaces want room too.

If a batch does not fit, **accumulate**: run part after part, add up the gradients, and step once. Time stays, memory shrinks. Or use more accelerators.
"""

# %% [markdown]
r"""
## 5. Many accelerators

**DDP** (distributed data parallel): each of $n$ accelerators holds *everything*, and works on its part of the batch; gradients are averaged after each step.

**FSDP** (fully sharded): weights, gradients and optimizer are cut into $n$ pieces, and each holds one. When a layer's turn comes, its weights are
gathered from all, used, and thrown away again. So what is fixed is divided by $n$; activations are not, since each has its own examples.
"""

# %%
from pathlib import Path

import minimuse

launch = Path(minimuse.__file__).parent / "launch"
print((launch / "fsdp8.yaml").read_text())

# %% [markdown]
r"""
Read it with the above in mind: `fsdp_transformer_layer_cls_to_wrap` says what a piece is that is gathered at once, a `Layer`, and the `KeyValue` of its
cross-attention, which works before the layers do. `reshard_after_forward` throws gathered weights away, and gathers them again for the
backward pass: less memory, half as much traffic again.
"""

# %%
sharded = [1, 2, 4, 8, 16, 32, 64]
figure, ax = plt.subplots(figsize=(7, 3.2))
for budget, optimizer, mark in [(b, "adafactor", "o"), (b, "adamw", "s")]:
    fixed = budget.fixed - budget.optimizer + states[optimizer]
    ax.plot(sharded, [fixed / n / 1e9 for n in sharded], f"{mark}-", label=f"FSDP, {optimizer}")
    ax.axhline(
        fixed / 1e9, ls=":", lw=1.4, color=ax.lines[-1].get_color(), label=f"DDP, {optimizer}"
    )
ax.axhline(MEMORY / 1e9, color="k", ls="--", lw=1, label="the accelerator")
ax.set_xscale("log", base=2)
ax.set_xticks(sharded, sharded)
ax.set(xlabel="accelerators", ylabel="GB on each, before any example", ylim=(0, 1.1 * MEMORY / 1e9))
ax.legend(fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
r"""
What does it cost? In each step every weight travels to every accelerator twice (forward, backward), and every gradient once. That is
about three times the model, whatever $n$: as long as one step computes long enough, the traffic hides behind it.
"""

# %%
share = b.batch // 8
compute = b.step_flops / 8 / (PEAK * USED)
traffic = 3 * 2 * b.parameters  # in bf16
print(
    f"8 accelerators, {share} pictures on each: {compute:.2f} s of arithmetic a step, {si(traffic, 'B')} of traffic"
)
print(f"they hide each other if a link carries {si(traffic / compute, 'B/s')} or more")

# %% [markdown]
r"""
### Exercise 12.3: what is left on each

*Difficulty 2 of 3, about 10 minutes.*

Write the bytes on each of `processes` accelerators before any example, for AdamW in fp32 with bf16 copies: under DDP, and under FSDP (`sharded=True`).

<details><summary>Hint</summary>

Add up the table of section 4. Only FSDP divides.

</details>
"""


# %%
def my_bytes(parameters, processes, sharded):
    return 16 * parameters  # your code: bf16 copies, and the sharding, are missing


check_sharded_bytes(my_bytes)


# %% tags=["solution"]
def my_bytes(parameters, processes, sharded):
    fixed = (4 + 4 + 8 + 2) * parameters
    return fixed / processes if sharded else fixed


check_sharded_bytes(my_bytes)

# %% [markdown]
r"""
## 6. Hours and money

All FLOPs of a stage are known now: steps, times batch, times FLOPs per picture. Divided by what an accelerator computes in a second they become
hours; by its price, money. No run reaches the peak of the data sheet. 40% is good; `USED` says what you expect.
"""


# %%
from minimuse.train_budget import duration


def bill(budget):
    """Accelerator hours and money for a stage."""
    hours = budget.flops / (PEAK * USED) / 3600
    return hours, hours * PRICE


print(f"{'base model':12}{'steps':>11}{'batch':>7}{'all FLOPs':>14}{'on one':>12}{'money':>13}")
for name, budget in base.items():
    hours, money = bill(budget)
    scale = f"{budget.steps:>11,}{budget.batch:>7}{si(budget.flops, 'FLOP'):>14}"
    print(f"{name:12}{scale}{duration(3600 * hours):>12}{money:>13,.2f}")

# %% [markdown]
r"""
Is that plausible? The paper says: 512 cores of a TPU-v4, about a week. A chip has two cores and a peak of $275 \cdot 10^{12}$ FLOP/s.
"""

# %%
rented = 256 * 275e12 * 7 * 24 * 3600
needed = base["paper_3b"].flops
print(
    f"rented: {si(rented, 'FLOP')} at peak; counted for the base model: {si(needed, 'FLOP')}, {needed / rented:.0%} of it"
)

# %% [markdown]
r"""
The count is well below what was rented, as it should be: no run reaches the peak, and the paper does not say whether the week also holds
the text encoder (4.6 billion parameters, run on every caption unless its outputs are kept), the other stages, or waiting for data. An
envelope may be wrong by a factor of a few. Had it come out *above* what was rented, or a hundred times below, you would have found a mistake, in the plan
or in the envelope.

The bill, drawn. Both axes are powers of ten:
"""

# %%
figure, ax = plt.subplots(figsize=(7, 3.2))
ax.loglog([b.parameters for b in base.values()], [bill(b)[0] for b in base.values()], "o-")
for name, budget in base.items():
    ax.annotate(
        name,
        (budget.parameters, bill(budget)[0]),
        xytext=(-6, 6),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
for hours, word in [(1, "an hour"), (24, "a day"), (24 * 365, "a year")]:
    ax.axhline(hours, color="0.8", lw=1, zorder=0)
    ax.annotate(
        word,
        (1, hours),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=9,
        color="0.4",
    )
ax.set(xlabel="parameters of the base model", ylabel="hours of one accelerator")
ax.margins(x=0.15)
plt.show()

# %% [markdown]
r"""
From nano to 3B is a factor of hundreds of millions in hours. Three factors make it: more pictures weigh most (28,000 times), then
parameters (2,800 times), then tokens per picture (4 times). The next cell multiplies them.

"""

# %%
import math

small, large = configs["nano"], configs["paper_3b"]
pictures_seen = [c.stages["base"].steps * c.stages["base"].batch for c in (small, large)]
factors = {
    "pictures": pictures_seen[1] / pictures_seen[0],
    "parameters": base["paper_3b"].parameters / base["nano"].parameters,
    "tokens per picture": large.base.tokens / small.base.tokens,
}
print({name: f"x {factor:,.0f}" for name, factor in factors.items()})
in_all = math.prod(factors.values())
print(f"their product: {in_all:.2g}; counted: {base['paper_3b'].flops / base['nano'].flops:.2g}")
assert factors["pictures"] > 5 * factors["parameters"] > 100 * factors["tokens per picture"]
assert 0.5 < base["paper_3b"].flops / base["nano"].flops / in_all < 2, "another factor matters, too"

# %% [markdown]
r"""
### This machine

What does *your* machine compute in a second? `matmul_ceiling` multiplies large matrices. Then one real step of nano's base model: what
fraction of the ceiling does it reach?
"""

# %%
import time

from minimuse.masking import masked_cross_entropy
from minimuse.text import Context
from minimuse.train_budget import matmul_ceiling

ceiling = matmul_ceiling("cpu", torch.float32, size=1024, seconds=0.3)
config, batch = configs["nano"], 16
model = Transformer(config.base)
tokens = torch.randint(config.base.codebook_size, (batch, config.base.tokens))
text = Context(
    torch.randn(batch, config.text_tokens, config.base.text_width),
    torch.ones(batch, config.text_tokens, dtype=torch.bool),
)


def one_step():
    logits = model(tokens, model.memory(text))
    masked_cross_entropy(logits, tokens, torch.ones_like(tokens, dtype=torch.bool)).backward()


one_step()
started = time.perf_counter()
for _ in range(3):
    one_step()
took = (time.perf_counter() - started) / 3
flops = base["nano"].step_flops / base["nano"].batch * batch
print(
    f"this CPU multiplies at {si(ceiling, 'FLOP/s')}; a step of {batch} pictures took {duration(took)}"
)
print(
    f"at the ceiling it would take {duration(flops / ceiling)}: {flops / ceiling / took:.0%} of it is reached"
)

# %% [markdown]
r"""
Small matrices stay below the ceiling: there is much to do around each product. The larger the model, the nearer it comes.

`report` puts all of this notebook into one table, for any configuration; on the command line it is `minimuse train paper_3b --dry-run`. "At best" is the time at
`PEAK`. The last column says how many examples fit, of how many that each accelerator gets, and how many fit with FSDP.
"""

# %%
from minimuse.train_budget import report

print(
    report(
        configs["nano"] if FAST else configs["paper_3b"], 8, ceiling=PEAK, memory_gb=MEMORY / 1e9
    )
)

# %% [markdown]
r"""
## 7. Why few parallel steps are fast

Now imagine a trained 3B base model that draws one picture. Muse fills 256 tokens in 24 parallel steps; each is a forward pass over all 256. An
autoregressive model of the same size draws one token at a time, 256 steps; with its keys and values kept, each is a pass over *one* token.

**Predict, then run.** Which of the two computes more?
"""

# %%
parameters, n = base["paper_3b"].parameters, configs["paper_3b"].base.tokens
ways = {"Muse, 24 steps": (24, n), "autoregressive, 256 steps": (n, 1)}  # steps, tokens in each
for way, (steps, each) in ways.items():
    print(
        f"{way:27} {si(2 * parameters * each * steps, 'FLOP'):>12}, reads {si(2 * parameters * steps, 'B'):>8} of weights"
    )

# %% [markdown]
r"""
Muse: 24 times as much! And yet it is faster. A step also has to *read* all weights from memory into the cores, 2 bytes each, whether it
then uses them for one token or for 256. With $f$ FLOPs and $m$ bytes, a step takes at least

$$\max\Big(\frac{f}{\text{peak}},\ \frac{m}{\text{bandwidth}}\Big).$$

This is called the *roofline*. With one token a step the cores wait for the memory nearly all of the time; with 256 both take about as long.
"""


# %%
def seconds(steps, each, pictures=1):
    """A lower bound for `pictures` pictures together, without guidance."""
    return steps * max(2 * parameters * each * pictures / PEAK, 2 * parameters / BANDWIDTH)


pictures = [2**k for k in range(11)]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
for (way, (steps, each)), mark in zip(ways.items(), "os", strict=True):
    axes[0].barh(way, seconds(steps, each), color=f"C{'os'.index(mark)}")
    axes[1].loglog(pictures, [seconds(steps, each, k) / k for k in pictures], f"{mark}-", label=way)
axes[0].invert_yaxis()
axes[0].set(xlabel="seconds for one picture, at least", title="one at a time")
axes[0].tick_params(axis="y", labelsize=9)
axes[1].set(
    xlabel="pictures at a time", ylabel="seconds per picture, at least", title="many at a time"
)
axes[1].legend(fontsize=9)
plt.show()
few, many = ([seconds(*way, k) for way in ways.values()] for k in (1, pictures[-1]))
assert few[0] < few[1] / 4, "one at a time, few steps do not win"
assert many[0] > many[1], "the lines do not cross"

# %% [markdown]
r"""
Left: for one picture the fewer steps win by far. Right: with more pictures at a time the autoregressive model reads its weights once for
all of them, so each becomes cheaper; Muse's cores were busy already, so its price stays. The lines cross: a server with many requests
at once may well prefer the autoregressive model. (It also has to read keys and values, which grow with the batch; we left that out.)

So parallel decoding pays with arithmetic for *latency*. And guidance, which doubles the arithmetic, is not free.
"""

# %%
from minimuse.cfg import get_guidance
from minimuse.muse import build


@torch.no_grad()
def image_flops(config):
    """Base, super-resolution, decoder; the two memories, computed once, are left out."""
    with torch.device("meta"):
        parts = build(config)
    found = {}
    for name, how in [("base", config.base_sampling), ("superres", config.superres_sampling)]:
        c, scale = getattr(config, name), get_guidance(how.guidance)
        tokens = torch.zeros(1, c.tokens, dtype=torch.long, device="meta")
        texts = torch.zeros(1, config.text_tokens, c.text_width, device="meta")
        low = [tokens.new_zeros(1, c.low_grid**2)] if c.low_layers else []
        low += [tokens] if c.draft else []  # notebook 8
        memory = parts[name].memory(Context(texts, texts[:, :, 0] == 0), *low)
        branch = count_flops(lambda name=name, x=tokens, m=memory: parts[name](x, m))
        branches = sum(1 + (scale(i / (how.steps - 1)) != 0) for i in range(how.steps))
        found[name] = branches * branch  # a step with guidance runs the model with text and without
    found["decoder"] = count_flops(lambda: parts["high_tokenizer"].decode(tokens))
    return found


image = {name: image_flops(config) for name, config in configs.items()}
print(f"{'FLOPs per image':16}" + "".join(f"{part:>16}" for part in image["nano"]))
for name, part in image.items():
    print(f"{name:16}" + "".join(f"{si(x, 'FLOP'):>16}" for x in part.values()))
at_best = sum(image["paper_3b"].values()) / PEAK
print(
    f"\nthe 3B cascade at 512 px, guidance included: {duration(at_best)} an image at the peak of one accelerator"
)
print("the paper's measurement on TPUv4: 1.3 s")

# %% [markdown]
r"""
Look at the row of the 3B cascade: super-resolution has a quarter of the base model's parameters and a third of its steps, and costs nearly as much,
since it has 16 times the tokens. And the decoder, which has the fewest parameters of all, works on every pixel.
"""

# %% [markdown]
r"""
## What failure looks like

**The envelope that forgets activations.** "AdamW, 16 bytes per parameter, 80 GB: a model of 5 billion fits." With the bf16 copies it does not, and without them
no room is left for a batch. For 3 billion, the same envelope promises much free memory; here is what happens as the batch grows. (With checkpointing, a layer's bf16
copies are freed as well, so that line begins lower.)
"""

# %%
examples = list(range(0, 33, 2))
figure, ax = plt.subplots(figsize=(7, 3.2))
ax.axhline(16 * b.parameters / 1e9, color="C3", ls=":", label="16 bytes per parameter")
for budget, label, style_of in [(b, "as it is", "C1-"), (lean, "checkpointed", "C0-.")]:
    fixed = budget.fixed - budget.optimizer + states["adamw"]
    ax.plot(
        examples, [(fixed + k * budget.activations) / 1e9 for k in examples], style_of, label=label
    )
ax.axhline(MEMORY / 1e9, color="k", ls="--", lw=1, label="the accelerator")
ax.set(xlabel="pictures at a time", ylabel="GB, the 3B base with AdamW", ylim=(0, None))
ax.legend(fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
r"""
**The mean of means.** The masked loss is a mean over the masked tokens of the *whole* batch, and rows mask different numbers. Cut the
batch into parts, for accumulation or for many accelerators, take each part's mean, and average: a part with few masked tokens then counts as much as one with many. The
curve looks fine, and the gradient depends on how many GPUs you had.
"""

# %%
from minimuse.masking import random_mask

generator = torch.Generator().manual_seed(0)
tokens = torch.randint(8, (4, 64), generator=generator)
masked = random_mask(tokens, torch.tensor([0.05, 0.1, 0.9, 1.0]), generator)
logits = torch.randn(4, 64, 8, generator=generator)
logits += (
    4
    * (~masked[..., None] | (masked.sum(1) < 10)[:, None, None])
    * torch.nn.functional.one_hot(tokens, 8)
)
halves = [slice(0, 2), slice(2, 4)]  # nearly full pictures are easy, nearly empty ones are not
whole = masked_cross_entropy(logits, tokens, masked)
wrong = [masked_cross_entropy(logits[h], tokens[h], masked[h]) for h in halves]
right = [masked_cross_entropy(logits[h], tokens[h], masked[h], count=masked.sum()) for h in halves]
print(f"the whole batch            {whole:.4f}")
print(
    f"mean of two parts' means   {sum(wrong) / 2:.4f}   parts: {', '.join(f'{x:.4f}' for x in wrong)}"
)
print(
    f"parts with the whole count {sum(right):.4f}   parts: {', '.join(f'{x:.4f}' for x in right)}"
)

# %% [markdown]
r"""
That is why `masked_cross_entropy` takes `count`, the number of masked tokens in all parts: then the parts' losses add up to the whole batch's, for one process or for
many, and a test says so.
"""

# %% [markdown]
r"""
### Open question

*About 30 minutes.*

You have 1,000 hours of one accelerator. Make a configuration with `changed`, and find its bill with `stage_budget`. Do you buy width, layers, pictures or tokens per
picture? Give a reason for each factor, and name one that this notebook cannot decide.
"""

# %% [markdown]
r"""
## Summary

A layer holds $16 D^2$ numbers. Training costs $6P$ FLOPs per token, using the model $2P$; attention's own products cost as much as all matrices at $N = 8D$ tokens.
Memory is 18 bytes per parameter with AdamW, 10 with PyTorch's Adafactor, plus activations, which checkpointing exchanges for up to a third more arithmetic. FSDP divides what is fixed, never the activations. One token at a time waits for memory, not for arithmetic, so few parallel
steps are fast although they compute more. An envelope may be wrong by a factor of a few; that is good enough to find most mistakes before they cost
money.
"""

# %% [markdown]
r"""
## Further reading

- Kaplan et al. 2020, *Scaling laws for neural language models*, [arXiv 2001.08361](https://arxiv.org/abs/2001.08361): where $6P$ comes from.
- Chen et al. 2016, *Training deep nets with sublinear memory cost*, [arXiv 1604.06174](https://arxiv.org/abs/1604.06174): checkpointing.
- Shazeer and Stern 2018, *Adafactor*, [arXiv 1804.04235](https://arxiv.org/abs/1804.04235).
- Rajbhandari et al. 2019, *ZeRO*, [arXiv 1910.02054](https://arxiv.org/abs/1910.02054): what FSDP shards, and why.
- Next: [13. The schedule lab](13_schedule_lab.ipynb).
"""
