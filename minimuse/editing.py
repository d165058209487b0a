"""Editing without training: inpainting, outpainting, mask-free edits (Muse 3.3).

    inpaint      mask a region of both token grids and decode it again, conditioned on the rest
    outpaint     the same with new canvas as the region, window by window
    edit         mask a random 8% of the tokens and resample them under the new prompt, many times

Glossary: `repaint` is True where something new is drawn. Not here: decoding (`sampler.py`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minimuse.cfg import Guidance, get_guidance, guided
from minimuse.masking import random_mask
from minimuse.sampler import LogitsFn, Step, check_settings, decode
from minimuse.utils import Fraction, Natural, PositiveInt, area_downsample, check, generator_of, require

Callback = Callable[[Step], None] | None  # called with every Step of a decode
Steps = Iterator[Step]
Jobs = list[dict[str, Any]]  # one dict for each picture: prompt, negative prompt, seed
Seed = int | Sequence[int] | None  # of the first picture, or one for each; None is random
Muse = Any  # a `muse.Muse`; that file imports this one


def seeded_generators(jobs: Jobs) -> list[torch.Generator]:
    """A generator for each picture, with its seed."""
    return [generator_of(job["seed"]) for job in jobs]


def token_mask(repaint: Tensor, downsampling: int) -> Tensor:
    """repaint (B, H, W) bool over pixels -> (B, h*w) bool over tokens, True where one pixel of the token is True."""
    return F.max_pool2d(repaint[:, None].float(), downsampling).flatten(1) > 0


def resample(
    logits_fn: LogitsFn, tokens: Tensor, *, mask_id: int, generators: Sequence[torch.Generator],
    iterations: int = 100, fraction: float = 0.08, top_k: int | None = 3,
) -> Steps:  # fmt: skip
    """tokens (B, N) -> one Step per iteration: a random fraction is drawn again (Muse 3.3.2); u goes from 0 to 1."""
    iterations = check("iterations", iterations, PositiveInt)
    fraction = check("fraction", fraction, Fraction)
    ok = fraction > 0 and iterations <= 100_000
    require(ok, f"iterations is {iterations}, fraction is {fraction}; give at most 100000, and a fraction above 0")
    rate = torch.full((1,), fraction, dtype=torch.double)
    for i in range(iterations):
        repaint = torch.cat([random_mask(row[None], rate, g) for row, g in zip(tokens, generators, strict=True)])
        u = i / (iterations - 1) if iterations > 1 else 1.0
        settings = {"mask_id": mask_id, "steps": 1, "top_k": top_k, "generator": generators}
        (step,) = decode(lambda x, _, u=u: logits_fn(x, u), tokens.masked_fill(repaint, mask_id), **settings)
        tokens = step.tokens
        yield step._replace(index=i, u=u)


def fill_with_nearest(tokens: Tensor, masked: Tensor) -> Tensor:
    """tokens, masked (B, N) of a square -> (B, N): masked positions take the nearest known token, or 0 without any."""
    axis = torch.arange(math.isqrt(tokens.shape[1]), device=tokens.device, dtype=torch.float)
    cells = torch.cartesian_prod(axis, axis)  # (N, 2)
    distance = torch.cdist(cells, cells, compute_mode="donot_use_mm_for_euclid_dist")  # (N, N)
    nearest = torch.stack([distance.masked_fill(row, math.inf).argmin(1) for row in masked])
    return tokens.gather(1, nearest).masked_fill(masked.all(1, keepdim=True), 0)


def windows(known: Tensor, side: int) -> Iterator[tuple[int, int]]:
    """known (H, W) bool, where the caller marks what it paints -> (top, left) of the best known window, overlapping."""
    tops, lefts = ([*range(0, length - side, max(1, side // 2)), length - side] for length in known.shape)
    while not known.all():
        fractions = {(y, x): known[y : y + side, x : x + side].float().mean().item() for y in tops for x in lefts}
        yield max((at for at, fraction in fractions.items() if fraction < 1), key=fractions.get)


@torch.inference_mode()
def tokenize(muse: Muse, *images: Image.Image) -> tuple[Tensor, Tensor]:
    """B pictures -> low tokens (B, N_low) of the decimated pictures, high tokens (B, N) (Muse 3.3.1)."""
    from minimuse.pictures import from_pil

    side = muse.config.high_tokenizer.image_size
    pixels = torch.cat([from_pil(image, side) for image in images]).to(muse.device)
    low = area_downsample(pixels, side // muse.config.low_tokenizer.image_size)
    return muse.low_tokenizer.encode(low.to(muse.dtype)), muse.high_tokenizer.encode(pixels.to(muse.dtype))


def inpaint_tokens(muse: Muse, tokens: tuple[Tensor, Tensor], repaint: Tensor, jobs: Jobs, **sampling) -> Steps:
    """Low and high tokens of one picture or one per job, repaint (1 or B, H, W) bool -> Steps of both stages."""
    scale = muse.config.high_tokenizer.image_size // muse.config.low_tokenizer.image_size
    low_mask = token_mask(repaint, muse.low_tokenizer.downsampling * scale).to(muse.device)
    high_mask = token_mask(repaint, muse.high_tokenizer.downsampling).to(muse.device)
    low = tokens[0].masked_fill(low_mask, muse.base.mask_id)
    high = tokens[1].masked_fill(high_mask, muse.superres.mask_id)
    low, high = (grid.repeat(len(jobs) // len(grid), 1) for grid in (low, high))
    return muse.decode(jobs, low=low, high=high, **sampling)


@torch.inference_mode()
def edit_tokens(
    muse: Muse, tokens: tuple[Tensor, Tensor], jobs: Jobs, *,
    guidance: Guidance | None = None, superres: dict[str, Any] | None = None, **settings,
) -> Steps:  # fmt: skip
    """Tokens as in `inpaint_tokens` -> Steps of `resample` on the low tokens, then super-resolution's Steps."""
    low = tokens[0].repeat(len(jobs) // len(tokens[0]), 1)
    text, null = muse.contexts(jobs)
    scale = get_guidance(muse.config.edit_guidance if guidance is None else guidance)
    logits_fn = guided(muse.base, muse.base.memory(text), muse.base.memory(null), scale)
    settings |= {"mask_id": muse.base.mask_id, "generators": seeded_generators(jobs)}
    superres = check_settings({} if superres is None else superres)
    for step in resample(logits_fn, low, **settings):
        yield step._replace(stage="base", guidance=scale(step.u))
    yield from muse.decode_superres(jobs, step.tokens, **superres)


# --- over pictures: methods of Muse -----------------------------------------------------------------------------------


def inpaint(
    muse: Muse, image: Image.Image, mask: Any, prompt: str, *, n: int = 1, seed: Seed = None,
    negative_prompt: str | None = None, keep: bool = True, callback: Callback = None, **sampling,
) -> list[Image.Image]:  # fmt: skip
    """Repaint the white part of `mask`, an image or array of the picture's size, after the prompt (Muse 3.3.1).

    With `keep` your pixels outside the mask come back bit for bit. `sampling` is as in `Muse`.
    """
    from minimuse.pictures import mask_from, to_rgb

    tokens = tokenize(muse, image)
    repaint = mask_from(mask, image.size)
    jobs = muse.jobs(prompt, n, seed, negative_prompt)
    sampling = check_settings(sampling, superres=True)
    steps = inpaint_tokens(muse, tokens, repaint[None], jobs, **sampling)
    images = muse.to_pictures(steps, jobs, sampling | {"task": "inpaint"}, callback)
    if keep:
        outside = Image.fromarray((~repaint).numpy().astype("uint8") * 255)
        for new in images:
            new.paste(to_rgb(image), mask=outside)
    return images


def outpaint(
    muse: Muse, image: Image.Image, padding: int | tuple[int, int, int, int], prompt: str, *,
    n: int = 1, seed: Seed = None, negative_prompt: str | None = None, callback: Callback = None, **sampling,
) -> list[Image.Image]:  # fmt: skip
    """Extend the picture by `padding` pixels: one number, or (left, top, right, bottom) (Muse 3.3.1).

    New canvas is inpainted window by window, starting next to the picture, whose pixels come back bit for bit.
    Choice: unpainted canvas repeats the picture's edge; black would leak into the tokens next to it.
    """
    from minimuse.pictures import from_pil, to_rgb

    side = muse.config.high_tokenizer.image_size
    sides = padding if isinstance(padding, tuple | list) else (padding,) * 4
    left, top, right, bottom = sides = check("padding", sides, tuple[Natural, Natural, Natural, Natural])
    most = 16 * side  # Choice: about 4,000 windows
    require(0 < max(sides) <= most, f"padding is {padding}; give 0 to {most} pixels per side, one side above 0")
    from_pil(image, side)  # refuses what is not a picture of the right size
    wide = Image.fromarray(np.pad(np.asarray(to_rgb(image)), ((top, bottom), (left, right), (0, 0)), mode="edge"))
    images = []
    sampling = check_settings(sampling, superres=True)
    for job in muse.jobs(prompt, n, seed, negative_prompt):
        canvas = wide.copy()
        known = torch.zeros(canvas.height, canvas.width, dtype=torch.bool)
        known[top : top + side, left : left + side] = True
        for i, (y, x) in enumerate(windows(known, side)):
            view = known[y : y + side, x : x + side]
            window = job | {"seed": (job["seed"] + 1_000_003 * i) % 2**32}
            crop = canvas.crop((x, y, x + side, y + side))
            (new,) = inpaint(muse, crop, ~view, **window, callback=callback, **sampling)
            canvas.paste(new, (x, y))
            view[:] = True
        canvas.info["minimuse"] = new.info["minimuse"] | job | {"task": "outpaint", "padding": list(sides)}
        images.append(canvas)
    return images


def edit(
    muse: Muse, image: Image.Image, prompt: str, *, n: int = 1, seed: Seed = None,
    negative_prompt: str | None = None, callback: Callback = None, **settings,
) -> list[Image.Image]:  # fmt: skip
    """Change the picture towards the prompt, without a mask (Muse 3.3.2). `settings` as in `edit_steps`."""
    jobs = muse.jobs(prompt, n, seed, negative_prompt)
    if settings.get("guidance") is None:  # noted in the picture, because the fingerprint leaves it out
        settings["guidance"] = muse.config.edit_guidance
    steps = edit_tokens(muse, tokenize(muse, image), jobs, **settings)
    return muse.to_pictures(steps, jobs, settings | {"task": "edit"}, callback)


def edit_steps(muse: Muse, image: Image.Image, prompt: str, *, seed: int = 0, **settings) -> Steps:
    """The Steps of `edit`: a whole picture of low tokens after each iteration, then super-resolution's Steps.

    The paper: iterations=100, fraction=0.08, guidance=4 (here `MuseConfig.edit_guidance`), top_k=3.
    Choice: a pair of guidance rises from the first iteration to the last; the paper's is constant.
    """
    negative = settings.pop("negative_prompt", None)
    return edit_tokens(muse, tokenize(muse, image), muse.jobs(prompt, 1, seed, negative), **settings)
