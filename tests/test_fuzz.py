"""Nonsense in, one sentence out: 3,000 random calls of the public API and 500 configurations.

Every argument of a call is valid, except one or two. Such a call works, or it ends in a ValueError or a TypeError that
minimuse raised itself: one sentence, with the name of a wrong argument.
"""

import math
import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import minimuse
from minimuse import cfg, config, eval_metrics, lab, masking, pictures, sampler, utils
from minimuse.baseline_dit import ddim, dit_sizes
from minimuse.lab_samplers import entropy_bound, preset_settings
from minimuse.lab_worlds import ChainWorld, MixtureWorld, PottsWorld
from minimuse.muse import Muse, build

CALLS, CONFIGURATIONS = 3000, 500
PACKAGE = str(Path(minimuse.__file__).parent)
V, N = 8, 16  # codes and tokens of the fake model

NUMBERS = (0, -1, 1, 3, 10**9, 10**30, -(10**30), 0.5, 1.5, -0.5, 1e300, math.nan, math.inf, -math.inf, True, False, 2j)
SCALARS = (
    np.int64(2), np.int64(-2), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(3), torch.tensor(2),
    torch.tensor(math.nan), torch.tensor(True), torch.tensor(0.5, dtype=torch.bfloat16),
)  # fmt: skip
TEXTS = ("", "7", "cosine", "x" * 300, "\0", b"3", Path("nowhere"))
OTHERS = (None, (), [], {}, [1], (1, 2), [math.nan, 1], ["a"], {"a": 1}, {1}, range(3), object(), NotImplemented)
TENSORS = (
    torch.zeros(0), torch.zeros(N), torch.zeros(2, N), torch.zeros(2, N, dtype=torch.long), torch.ones(2, 3, 4, 4),
    torch.full((2, N), -5), torch.full((2, N), 10**6), torch.ones(2, N).bool(), torch.full((2, N, V), math.nan),
    torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.complex64),
)  # fmt: skip
ARRAYS = (
    np.zeros((16, 16)), np.full((16, 16), math.nan), np.full((16, 16), -1), np.ones((8, 16)), np.zeros(3),
    np.array(["a"]),
)  # fmt: skip
PICTURES = (
    Image.new("RGB", (16, 16)), Image.new("RGBA", (16, 16)), Image.new("L", (15, 16), 255), Image.new("1", (16, 16), 1),
    Image.new("F", (16, 16), 0.5), Image.new("I;16", (16, 16), 300), Image.new("CMYK", (16, 16)),
    Image.new("LAB", (16, 16)), Image.new("RGB", (1, 1)), Image.new("P", (16, 16)),
)  # fmt: skip
SETTINGS_NONSENSE = (*NUMBERS, *SCALARS, *TEXTS, *OTHERS)


def nonsense(valid: Any) -> tuple:
    """What may come in place of a valid value: tensors of other shapes and dtypes, odd pictures, or any scalar."""
    if isinstance(valid, torch.Tensor):
        return TENSORS
    if isinstance(valid, Image.Image | np.ndarray):
        return (*PICTURES, *ARRAYS, *TENSORS, None, "a.png")
    return SETTINGS_NONSENSE


ALSO = {  # how an error may name an argument instead
    "name": "preset", "prompt": "prompts", "schedules": "schedule", "orders": "order", "codebook_size": "rows",
    "stay": "transition", "sharpness": "tables", "presets": "preset", "negative_prompt": "negative prompts",
    "first": "values", "second": "values", "successes": "row", "superres": "setting", "mask_schedule": "schedule",
    "groups": "group labels",
    "values": "rows", "block": "grid", "heads": "width", "multipliers": "blocks",
}  # fmt: skip


class Call(NamedTuple):
    """A function, the arguments that stay as they are, and valid values of each of the others."""

    function: Callable[..., Any]
    fixed: dict[str, Any]
    arguments: dict[str, tuple]


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0))


def logits_fn(tokens: torch.Tensor, u: float) -> torch.Tensor:
    return torch.linspace(0, 1, V).expand(*tokens.shape, V)


@pytest.fixture(scope="module")
def small_muse(tiny_muse):
    """The tiny Muse with 2 x 2 and 4 x 4 tokens, 16 x 16 pixels."""
    c = tiny_muse.config
    low, high = replace(c.low_tokenizer, image_size=8), replace(c.high_tokenizer, image_size=16)
    sampling = replace(c.base_sampling, steps=2)
    c = replace(
        c, low_tokenizer=low, high_tokenizer=high, base_sampling=sampling, superres_sampling=sampling,
        base=replace(c.base, grid=low.grid, layers=1),
        superres=replace(c.superres, grid=high.grid, low_grid=low.grid, block=0),
    )  # fmt: skip
    return Muse(c, build(c).eval().requires_grad_(False), tiny_muse.encoder)


SETTINGS = {
    "guidance": (0.0, 2, (0.0, 3.0), lambda u: 3 * u),
    "steps": (1, 2, 3),
    "schedule": ("cosine", "linear", "pow2.5", lambda u: 1 - u),
    "order": ("confidence", "random", "halton", "raster"),
    "sampling_temperature": (0, 0.7, lambda u: 1 - u),
    "choice_temperature": (0, 4.5, lambda u: 1 - u),
    "top_k": (None, 1, 3),
    "remask": (False, True),
}
COMMON = {"n": (1, 2), "seed": (0, 7, 2**32 - 5), "negative_prompt": (None, "a ball")}
DECODE = {name: values for name, values in SETTINGS.items() if name != "guidance"}
SIZES = {"codebook_size": (2, 3)}
LAB = {"target": (ChainWorld.sticky(4, 2),), "steps": (1, [2]), "presets": ((), ["muse"]), "seed": (0, 1)}


def calls(muse: Muse) -> list[Call]:
    square = Image.new("RGB", (16, 16), "red")
    half = np.zeros((16, 16), dtype=np.uint8)
    half[:8] = 255
    world = ChainWorld.sticky(4, 2)
    scores = [torch.rand(64, generator=torch.Generator().manual_seed(i)).tolist() for i in (0, 1)]
    prompt = {"prompt": "a cube"}
    picture = {"image": (square,), "prompt": ("a cube",)}
    return [
        Call(muse.generate, {}, {"prompts": ("a cube", ["a", "b"]), **COMMON, **SETTINGS, "batch_size": (1, 16)}),
        Call(muse.generate, {"prompts": "a cube"}, {"superres": (None, {}, {"steps": 1}), "callback": (None, repr)}),
        Call(muse.generate, {"prompts": "a cube"}, {f"superres.{name}": values for name, values in SETTINGS.items()}),
        Call(muse.steps, {}, {"prompt": ("a cube",), **COMMON, **SETTINGS}),
        Call(muse.inpaint, {}, {**picture, "mask": (half, half > 0), **COMMON, **SETTINGS}),
        Call(muse.inpaint, prompt, {"image": (square,), "mask": (half,), "keep": (True, False)}),
        Call(muse.outpaint, {}, {**picture, "padding": (2, (0, 0, 4, 0)), **COMMON}),
        Call(muse.edit, {}, {**picture, **COMMON, "guidance": SETTINGS["guidance"]}),
        Call(
            muse.edit_steps,
            {},
            {**picture, "iterations": (1, 3), "fraction": (0.1, 1.0), "top_k": (None, 3), "seed": (0,)},
        ),
        Call(muse.to, {"dtype": torch.float32}, {"device": ("cpu", None)}),
        Call(muse.low_tokenizer.encode, {}, {"images": (torch.zeros(1, 3, 8, 8),)}),
        Call(muse.low_tokenizer.decode, {}, {"tokens": (tokens(1, 4),)}),
        Call(muse.encoder.encode, {}, {"prompts": (["a cube"],)}),
        Call(sampler.decode, {"logits_fn": logits_fn, "mask_id": V}, {"tokens": (torch.full((2, N), V),), **DECODE}),
        Call(entropy_bound, {}, {"bound": (0, 0.5)}),
        Call(sampler.get_order, {}, {"order": ("halton", sampler.raster)}),
        Call(cfg.get_guidance, {}, {"guidance": SETTINGS["guidance"]}),
        Call(masking.get_schedule, {}, {"schedule": ("cosine", "pow3", len)}),
        Call(
            masking.reveal_counts,
            {},
            {"n": (0, 5, 64), "steps": (1, 8), "schedule": ("cosine", "log", lambda u: 1 - u)},
        ),
        Call(masking.sample_mask_rate, {}, {"n": (1, 5), "schedule": ("cosine", "sqrt")}),
        Call(masking.random_mask, {}, {"tokens": (tokens(2, N),), "rate": (torch.rand(2),)}),
        Call(config.preset, {}, {"name": ("nano", "toy")}),
        Call(pictures.from_pil, {"size": 16}, {"image": (square,)}),
        Call(pictures.mask_from, {"size": (16, 16)}, {"mask": (half,)}),
        Call(utils.to_pil, {}, {"images": (torch.zeros(1, 3, 4, 4),)}),
        Call(utils.area_downsample, {}, {"images": (torch.zeros(1, 3, 8, 8),), "factor": (1, 2)}),
        Call(
            eval_metrics.mean_interval, {}, {"values": (scores[0], torch.rand(64)), "groups": (None, [*range(8)] * 8)}
        ),
        Call(eval_metrics.proportion_interval, {}, {"successes": ([True] * 5,), "groups": (None,)}),
        Call(eval_metrics.paired_difference, {}, {"first": (scores[0],), "second": (scores[1],)}),
        Call(
            lab.compare,
            {"samples": 64},
            {"schedules": ("cosine", ["linear", "bound0.5"]), "orders": (["halton"],), **LAB},
        ),
        Call(
            lab.compare,
            {"target": world},
            {"samples": (64, 128), "remask": (False,), "top_k": (None, 2), "steps": (1,)},
        ),
        Call(preset_settings, {}, {"name": ("muse", "halton"), "n": (4, 64), "codebook_size": (8,), "steps": (1, 8)}),
        Call(
            MixtureWorld,
            {},
            {"tables": (torch.ones(2, 4, 3),), "weights": (None, torch.ones(2)), "grid": (None, (2, 2))},
        ),
        Call(MixtureWorld.random, {}, {"modes": (2,), "grid": ((2, 2),), **SIZES, "sharpness": (0, 2.0), "seed": (0,)}),
        Call(ChainWorld, {}, {"transition": (torch.ones(2, 2),), "n": (4,), "initial": (None, torch.ones(2))}),
        Call(ChainWorld.sticky, {}, {"n": (4,), **SIZES, "stay": (0.5,)}),
        Call(PottsWorld, {}, {"grid": ((2, 2),), **SIZES, "coupling": (0.5, -1)}),
        Call(world.log_prob, {}, {"tokens": (torch.zeros(1, 4, dtype=torch.long),)}),
        Call(world.sample, {}, {"n": (3,)}),
        Call(dit_sizes, {"base": muse.config.base}, {"patch": (1, 2)}),
        Call(ddim, {"noise_fn": lambda x, u, step: x, "x": torch.randn(1, 3, 2, 2)}, {"steps": (1, 3)}),
    ]


def complaint(error: Exception, names: set[str]) -> str:
    """What is wrong with an error, "" if nothing is."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, ValueError | TypeError):
        return "is no ValueError or TypeError"
    if not last.filename.startswith(PACKAGE):
        return f"comes from {Path(last.filename).name}"
    if "\n" in str(error) or len(str(error)) < 10:
        return "is no sentence"
    if not any(name in str(error) for name in names):
        return f"names none of {sorted(names)}"
    return ""


def is_no_number(value: Any) -> bool:
    """True for a bool, a complex number, NaN or an infinity, also of numpy and torch."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    return isinstance(value, bool | complex) or (isinstance(value, float) and not math.isfinite(value))


def attempt(function: Callable[..., Any], arguments: dict[str, Any], names: set[str], must_fail: bool) -> str:
    """Call the function, and take the steps of an iterator -> "" or a complaint."""
    try:
        result = function(**arguments)
        if isinstance(result, Iterator):
            list(islice(result, 50))
        return "what is no number was accepted" if must_fail else ""
    except Exception as error:
        if wrong := complaint(error, names):
            place = " < ".join(
                f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[:0:-1][:4]
            )
            return f"{type(error).__name__} {wrong}: {str(error)[:150]!r} at {place}"
    return ""


@pytest.mark.slow
def test_calls(small_muse):
    rng = random.Random(0)
    found = {}
    table = calls(small_muse)
    for i in range(CALLS):
        torch.manual_seed(i)
        call = table[i % len(table)]
        arguments = {name: rng.choice(values) for name, values in call.arguments.items()}
        wrong = rng.sample(sorted(arguments), min(len(arguments), 1 + (rng.random() < 0.2)))
        arguments |= {name: rng.choice(nonsense(call.arguments[name][0])) for name in wrong}
        names = {word for name in wrong for word in (name.removeprefix("superres."), ALSO.get(name, name))}
        if inner := {
            name.removeprefix("superres."): v for name, v in arguments.items() if name.startswith("superres.")
        }:
            arguments = {"superres": inner}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            numbers = [name for name in wrong if all(type(v) in (int, float) for v in call.arguments[name])]
            must_fail = any(is_no_number((inner or arguments)[name.removeprefix("superres.")]) for name in numbers)
            if problem := attempt(call.function, call.fixed | arguments, names, must_fail):
                shown = {name: repr((inner or arguments)[name.removeprefix("superres.")])[:60] for name in wrong}
                found.setdefault(
                    (call.function.__qualname__, problem[:60]), f"{call.function.__qualname__}({shown}): {problem}"
                )
    assert not found, "\n".join(["", *sorted(found.values())])


def test_configurations(small_muse):
    """A field with nonsense is refused by its name, or it is kept as a plain value that JSON holds."""
    rng = random.Random(0)
    c = small_muse.config
    known = [c, c.low_tokenizer, c.superres, c.base_sampling, c.stages["base"]]
    found = {}
    for i in range(CONFIGURATIONS):
        one = known[i % len(known)]
        name = rng.choice([f.name for f in fields(one)])
        value = rng.choice(SETTINGS_NONSENSE)
        try:
            changed = replace(one, **{name: value})
        except Exception as error:
            problem = complaint(error, {name, ALSO.get(name, name)})
        else:
            kept, was = getattr(changed, name), getattr(one, name)
            problem = "" if type(kept) is type(was) or {type(kept), type(was)} <= {int, float} else f"became {kept!r}"
            if isinstance(kept, float) and not math.isfinite(kept):
                problem = f"became {kept}"
        if problem:
            found.setdefault(
                (type(one).__name__, name, problem[:30]), f"{type(one).__name__}.{name} = {value!r:.60}: {problem}"
            )
    assert not found, "\n".join(["", *sorted(found.values())])
