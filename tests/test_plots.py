"""plots.py: sheets have the right shape, captions are drawn, masks cover what they say."""

import numpy as np
import pytest
import torch
from PIL import Image

from minimuse.eval_metrics import Estimate
from minimuse.plots import (
    curves,
    film,
    grid,
    mask_overlay,
    pareto_front,
    token_map,
    tradeoff,
)
from minimuse.sampler import Step

PICTURES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_grid_shape_and_pixels():
    sheet = grid(PICTURES, columns=2, scale=3)
    assert sheet.size == (8 + 2 * (96 + 8), 8 + 3 * (96 + 8)), f"5 pictures in 2 columns are 3 rows: {sheet.size}"
    corner = np.asarray(sheet)[8:11, 8:11]
    assert (corner == corner[0, 0]).all(), "pixels must be enlarged whole"
    assert grid([Image.new("RGB", (64, 64))]).size == (144, 144), "64 px is shown twice as large by default"


def test_captions_are_wrapped_under_the_pictures():
    plain = grid(PICTURES, columns=5)
    told = grid(PICTURES, ["a red cube"] * 4 + ["a large purple metal cylinder behind a sphere on a gray floor"], 5)
    assert told.width == plain.width, "captions are wrapped, not squeezed in"
    assert told.height >= plain.height + 2 * 17, "a long caption takes several lines"
    footer = np.asarray(told)[plain.height :]
    assert (footer < 100).any(), "no ink under the pictures"
    wide = np.asarray(grid(PICTURES[:2], ["THE WIDEST LETTERS ARE W AND M, AND WORDS HAVE MANY", ""], 2, scale=5))
    assert (wide[170:, :168] < 100).any(), "no ink under the first picture"
    assert (wide[170:, 176:] == 255).all(), "capitals run under the second picture: lines are wrapped by their width"


@pytest.mark.parametrize("masked", [torch.arange(16) < 4, (torch.arange(16) < 4).view(4, 4)])
@pytest.mark.parametrize("image", [torch.ones(3, 32, 32), Image.new("RGB", (32, 32), "white")])
def test_mask_overlay_covers_masked_tokens(image, masked):
    pixels = np.asarray(mask_overlay(image, masked))
    assert (pixels[:8] < 200).all(), "the first row of tokens is masked, so gray"
    assert (pixels[8:] == 255).all(), "the rest stays as it is"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: grid([]),
        lambda: grid(PICTURES, ["one"]),
    ],
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected|give|came"):
        wrong()


def test_film_of_a_decode(tiny_muse):
    steps = list(tiny_muse.steps("a red cube", n=2, seed=0, steps=3, superres={"steps": 2}))
    side, gap = 2 * tiny_muse.config.high_tokenizer.image_size, 8
    strip = film(tiny_muse, steps)
    assert strip.width == gap + 5 * (side + gap), f"3 + 2 steps are 5 frames: {strip.width}"
    assert strip.height > side + 2 * gap, "each frame has a title"
    frames = [strip.crop((gap + i * (side + gap), gap, gap + i * (side + gap) + side, gap + side)) for i in range(5)]
    for i, (step, frame) in enumerate(zip(steps, frames, strict=True)):
        gray = (np.asarray(frame) == (150, 150, 155)).all(2).mean()
        masked = step.masked[0].float().mean().item()
        assert abs(gray - masked) < 0.02, f"frame {i}: {gray:.0%} is gray, {masked:.0%} is masked"
    last = tiny_muse.picture(steps[-1])[0].resize((side, side), Image.Resampling.NEAREST)
    assert frames[-1].tobytes() == last.tobytes(), "the last frame is the picture"


def test_film_keeps_the_ends_and_picks_a_row(tiny_muse):
    steps = list(tiny_muse.steps("a red cube", n=2, seed=0, steps=6))
    side, gap = 2 * tiny_muse.config.high_tokenizer.image_size, 8
    strips = [film(tiny_muse, steps, row=row, most=4) for row in (0, 1)]
    assert strips[0].width == gap + 4 * (side + gap), f"at most 4 frames: {strips[0].width}"
    assert strips[0].tobytes() != strips[1].tobytes(), "row picks the picture of the batch"
    for row, strip in enumerate(strips):
        left = strip.width - side - gap
        picture = tiny_muse.picture(steps[-1])[row].resize((side, side), Image.Resampling.NEAREST)
        assert strip.crop((left, gap, left + side, gap + side)).tobytes() == picture.tobytes(), "the last step is kept"
    for most in (1, 2):
        assert film(tiny_muse, steps, most=most).width == gap + most * (side + gap), f"{most} frames"
    with pytest.raises(ValueError, match="no step came"):
        film(tiny_muse, [])


@pytest.mark.parametrize(
    ("lower", "front"),
    [((True, False), [0, 3]), ((True, True), [0, 1]), ((False, False), [3]), ((False, True), [1, 2, 4])],
)
def test_pareto_front_by_hand(lower, front):
    points = [(1.0, 5.0), (2.0, 1.0), (3.0, 3.0), (4.0, 9.0), (4.0, 4.0)]
    assert pareto_front(points, lower) == front


def test_pareto_front_keeps_equals_and_no_beaten_one():
    points = [(float(x), float(y)) for x, y in torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(0))]
    front = pareto_front(points)
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
        assert (i in front) == (not beaten), f"point {i}, {points[i]}"
    assert [points[i] for i in front] == sorted(points[i] for i in front), "by rising x"
    assert pareto_front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]


def test_tradeoff_draws_points_intervals_and_front():
    def measured(value, reach):
        return Estimate(value, value - reach, value + reach, 100)

    def plot(reach):
        rising = {f"t={t}": (measured(9 - t, reach), measured(0.2 + t / 50, reach / 50)) for t in range(4)}
        return tradeoff({"rising": rising, "constant": {"t=1": (measured(12, 1), measured(0.1, 0.01))}}, "FID", "CLIP")

    wide, narrow = np.asarray(plot(1.5)).astype(int), np.asarray(plot(0.01)).astype(int)
    assert wide.shape == (600, 900, 3)
    blue = [((p[..., 2] - p[..., 0]) > 100).sum() for p in (wide, narrow)]
    assert blue[0] > blue[1] + 500, f"intervals take ink: {blue}"
    with pytest.raises(ValueError, match="at least one"):
        tradeoff({"rising": {}}, "FID", "CLIP")


def test_curves_draw_each_stage():
    log = [{"stage": "low_tokenizer", "step": i, "psnr": 20.0 + i} for i in range(10, 60, 10)]
    log += [
        {"stage": "base", "step": i, "loss": 5 - i / 60} | ({"held_out_bound": 5.0} if i == 50 else {})
        for i in (10, 50)
    ]
    one, two = curves(log[:5]), curves(log)
    assert two.size == (2 * one.width, one.height), "a plot a stage, side by side"
    dots = sum(abs(r - 255) + abs(g - 127) + abs(b - 14) < 30 for r, g, b in np.asarray(two).reshape(-1, 3).astype(int))
    assert dots > 10, "the held-out point is drawn in matplotlib's second colour"
    with pytest.raises(ValueError, match="no line of a stage yet"):
        curves([])


def test_token_map_has_a_colour_a_code_gray_where_masked_and_frames_what_is_new():
    tokens = torch.tensor([[7, 7, 8, 16]])  # 16 is [MASK]
    masked, revealed = tokens == 16, torch.tensor([[False, True, False, False]])
    step = Step(0, 0.0, tokens, masked, revealed, torch.zeros(1, 4))
    pixels = np.asarray(token_map(step, side=64)).astype(int)
    assert pixels.shape == (64, 64, 3), f"{pixels.shape}"
    old, new, other, hidden = (pixels[y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32))
    for cell in (old, other, hidden):
        assert (cell == cell[0, 0]).all(), "a cell is of one colour"
    assert (new[16, 16] == old[0, 0]).all(), "one code, one colour"
    assert np.abs(other[0, 0] - old[0, 0]).max() > 60, f"neighbouring codes are told apart: {other[0, 0]} {old[0, 0]}"
    assert np.ptp(hidden[0, 0]) < 10, f"masked is gray: {hidden[0, 0]}"
    assert (new[0] < 60).all(), "what is new is framed"
    assert (new[:, -1] < 60).all(), "all around"
