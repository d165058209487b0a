"""Editing without training: inpainting, outpainting, mask-free edits (Muse 3.3).

    inpaint      mask a region of both token grids, decode it again, conditioned on the rest
    outpaint     the same, the region being new canvas, window by window
    edit         again and again mask a random 8% of the tokens and resample them under the new prompt

Over tokens each is a few lines on top of `sampler.decode` (`infill`, `resample`); over pictures they are methods of
`Muse`, and stand here with the rest of their section.
Glossary: `repaint` is True where something new shall stand.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minimuse.cfg import Guidance, get_guidance, guided
from minimuse.data_images import area_downsample, from_pil, mask_from, to_rgb
from minimuse.masking import random_mask
from minimuse.sampler import LogitsFn, Step, decode

if TYPE_CHECKING:
    from minimuse.muse import Muse

Watch = Callable[[Step], None]

# --- over tokens ------------------------------------------------------------------------------------------------------


def token_mask(repaint: Tensor, downsampling: int) -> Tensor:
    """repaint (B, H, W) bool, pixels -> (B, h*w) bool, tokens: True where a token overlaps the region by one pixel."""
    return F.max_pool2d(repaint[:, None].float(), downsampling).flatten(1) > 0


def infill(logits_fn: LogitsFn, tokens: Tensor, repaint: Tensor, *, mask_id: int, **sampling) -> Iterator[Step]:
    """tokens (B, N), repaint (B, N) bool -> Steps; tokens outside the region never change (Muse 3.3.1).

    `sampling` is what `sampler.decode` takes: steps, schedule, order, temperatures, generator.
    """
    return decode(logits_fn, tokens.masked_fill(repaint, mask_id), mask_id=mask_id, **sampling)


def resample(
    logits_fn: LogitsFn,
    tokens: Tensor,
    *,
    mask_id: int,
    iterations: int = 100,
    share: float = 0.08,
    top_k: int | None = 3,
    generators: Sequence[torch.Generator],
) -> Iterator[Step]:
    """tokens (B, N) of a real image -> a Step an iteration: a random share masked and drawn again (Muse 3.3.2).

    Like Gibbs sampling: the image drifts towards the prompt that `logits_fn` was made with, and every state on the
    way is a whole picture. The paper: 100 iterations of 8%, top-k 3. One forward pass an iteration; u, and with it a
    guidance that rises, goes from 0 at the first to 1 at the last.
    """
    if iterations < 1 or not 0 < share <= 1:
        raise ValueError(f"{iterations} iterations of a share {share}; give at least 1, and a share in (0, 1]")
    rate = torch.full((1,), share, dtype=torch.double)
    for i in range(iterations):
        repaint = torch.cat([random_mask(row[None], rate, g) for row, g in zip(tokens, generators, strict=True)])
        settings = {"mask_id": mask_id, "steps": 1, "top_k": top_k, "generator": generators}
        u = i / (iterations - 1) if iterations > 1 else 1.0
        (step,) = infill(lambda x, _, u=u: logits_fn(x, u), tokens, repaint, **settings)
        tokens = step.tokens
        yield step._replace(index=i, u=u)


# --- over pictures: methods of Muse -----------------------------------------------------------------------------------


@torch.inference_mode()
def tokenize(muse: "Muse", *images: Image.Image) -> tuple[Tensor, Tensor]:
    """B pictures -> low tokens (B, N_low) of the decimated pictures and high tokens (B, N) (Muse 3.3.1)."""
    side, low_side = muse.config.high_tokenizer.image_size, muse.config.low_tokenizer.image_size
    pixels = torch.cat([from_pil(image, side) for image in images]).to(muse.device)
    low, high = area_downsample(pixels, side // low_side).to(muse.dtype), pixels.to(muse.dtype)
    return muse.low_tokenizer.encode(low), muse.high_tokenizer.encode(high)


def inpaint(
    muse: "Muse",
    image: Image.Image,
    mask: Any,
    prompt: str,
    *,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    negative_prompt: str | None = None,
    keep: bool = True,
    watch: Watch | None = None,
    **sampling,
) -> list[Image.Image]:
    """Repaint the white part of `mask` (an image or array as large as `image`) after the prompt (Muse 3.3.1).

    Both token grids are masked where a token overlaps the region; the base model fills the low one, super-resolution
    the high one. With `keep` your pixels outside the mask come back bit for bit. `sampling` is as in `Muse`.
    """
    tokens = tokenize(muse, image)
    repaint = mask_from(mask, image.size)
    if not repaint.any():
        raise ValueError("the mask is empty: no pixel is white; white is what to repaint")
    jobs = muse.jobs(prompt, n, seed, negative_prompt, sampling)
    steps = _inpaint(muse, tokens, repaint[None], jobs, **sampling)
    images = muse.finish(steps, jobs, sampling | {"task": "inpaint"}, watch)
    if keep:
        kept = Image.fromarray((~repaint).numpy().astype("uint8") * 255)
        for new in images:
            new.paste(to_rgb(image), mask=kept)
    return images


def _inpaint(
    muse: "Muse", tokens: tuple[Tensor, Tensor], repaint: Tensor, jobs: list[dict[str, Any]], **sampling
) -> Iterator[Step]:
    """Tokens of one picture or of one a job, repaint (1 or B, H, W) bool -> Steps."""
    scale = muse.config.high_tokenizer.image_size // muse.config.low_tokenizer.image_size
    at_low = token_mask(repaint, muse.low_tokenizer.downsampling * scale).to(muse.device)
    at_high = token_mask(repaint, muse.high_tokenizer.downsampling).to(muse.device)
    low, high = tokens[0].masked_fill(at_low, muse.base.mask_id), tokens[1].masked_fill(at_high, muse.superres.mask_id)
    low, high = (grid.repeat(len(jobs) // len(grid), 1) for grid in (low, high))
    return muse.decode(jobs, low=low, high=high, **sampling)


def windows(known: Tensor, side: int) -> Iterator[tuple[int, int]]:
    """known (H, W) bool, True where pixels stand -> (top, left) of square windows over the rest, best known first.

    Windows overlap by half, so that each sees what was there or was painted before it. `known` is read anew each time:
    the caller marks what it has painted.
    """
    tops, lefts = ([*range(0, length - side, max(1, side // 2)), length - side] for length in known.shape)
    waiting = [(top, left) for top in tops for left in lefts]

    def share(at: tuple[int, int]) -> float:
        return known[at[0] : at[0] + side, at[1] : at[1] + side].float().mean().item()

    while waiting := [at for at in waiting if share(at) < 1]:
        yield max(waiting, key=share)


def outpaint(
    muse: "Muse",
    image: Image.Image,
    padding: int | tuple[int, int, int, int],
    prompt: str,
    *,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    negative_prompt: str | None = None,
    watch: Watch | None = None,
    **sampling,
) -> list[Image.Image]:
    """Extend the picture by `padding` pixels: one number, or (left, top, right, bottom) (Muse 3.3.1).

    New canvas is inpainted window by window from the picture outwards; its own pixels come back bit for bit.
    Choice: until it is painted, the canvas repeats the picture's edge; black would leak into the tokens beside it.
    """
    sides = tuple(padding) if isinstance(padding, tuple | list) else (padding,) * 4
    if len(sides) != 4 or min(sides) < 0 or max(sides) == 0:
        raise ValueError(f"padding {padding}; give pixels to add, 1 number or 4, none negative, at least one above 0")
    left, top, right, bottom = sides
    tokenize(muse, image)  # refuses what is no picture of the right size
    side, images = image.width, []
    for job in muse.jobs(prompt, n, seed, negative_prompt, sampling):
        canvas = Image.fromarray(np.pad(np.asarray(to_rgb(image)), ((top, bottom), (left, right), (0, 0)), mode="edge"))
        known = torch.zeros(canvas.height, canvas.width, dtype=torch.bool)
        known[top : top + side, left : left + side] = True
        for i, (y, x) in enumerate(windows(known, side)):
            view, own = known[y : y + side, x : x + side], job | {"seed": job["seed"] + 1_000_003 * i}
            (new,) = inpaint(muse, canvas.crop((x, y, x + side, y + side)), ~view, **own, watch=watch, **sampling)
            canvas.paste(new, (x, y))
            view[:] = True
        canvas.info["minimuse"] = new.info["minimuse"] | job | {"task": "outpaint", "padding": list(sides)}
        images.append(canvas)
    return images


def edit(
    muse: "Muse",
    image: Image.Image,
    prompt: str,
    *,
    n: int = 1,
    seed: int | Sequence[int] | None = None,
    negative_prompt: str | None = None,
    watch: Watch | None = None,
    **settings,
) -> list[Image.Image]:
    """Change the picture towards the prompt, without a mask (Muse 3.3.2). `settings` as in `edit_steps`."""
    jobs = muse.jobs(prompt, n, seed, negative_prompt, settings)
    if settings.get("guidance") is None:  # the picture tells it, since the fingerprint leaves it out
        settings["guidance"] = muse.config.edit_guidance
    return muse.finish(_edit(muse, tokenize(muse, image), jobs, **settings), jobs, settings | {"task": "edit"}, watch)


def edit_steps(
    muse: "Muse", image: Image.Image, prompt: str, *, seed: int = 0, negative_prompt: str | None = None, **settings
) -> Iterator[Step]:
    """The trace of `edit`: after each iteration a whole picture of low tokens, then super-resolution's Steps.

    The paper: iterations=100 of a random share=0.08 of the tokens, guidance=4, top_k=3; a checkpoint may have another
    guidance (`MuseConfig.edit_guidance`). Choice: a rising one rises from the first iteration to the last; the paper's
    is constant here.
    """
    return _edit(muse, tokenize(muse, image), muse.jobs(prompt, 1, seed, negative_prompt, settings), **settings)


@torch.inference_mode()
def _edit(
    muse: "Muse",
    tokens: tuple[Tensor, Tensor],
    jobs: list[dict[str, Any]],
    *,
    iterations: int = 100,
    share: float = 0.08,
    guidance: Guidance | None = None,
    top_k: int | None = 3,
    superres: dict[str, Any] | None = None,
) -> Iterator[Step]:
    low = tokens[0].repeat(len(jobs) // len(tokens[0]), 1)
    text, null = muse.contexts(jobs)
    t = get_guidance(muse.config.edit_guidance if guidance is None else guidance)
    logits_fn = guided(muse.base, muse.base.memory(text), muse.base.memory(null), t)
    draws = [torch.Generator().manual_seed(job["seed"]) for job in jobs]
    settings = {"iterations": iterations, "share": share, "top_k": top_k, "generators": draws}
    for step in resample(logits_fn, low, mask_id=muse.base.mask_id, **settings):
        yield step._replace(stage="base", guidance=t(step.u))
    yield from (step for step in muse.decode(jobs, low=step.tokens, superres=superres) if step.stage != "base")
