"""editing.py: the token mask, infills, mask-free edits, windows, and the same over pictures (Muse 3.3)."""

import copy
import inspect
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import minimuse.muse
from minimuse import checkpoint
from minimuse.config import PRESETS, preset
from minimuse.editing import fill_with_nearest, resample, token_mask, tokenize, windows
from minimuse.muse import Muse
from minimuse.sampler import decode
from minimuse.utils import area_downsample, to_float

V = 6
MASK = V
OFF = settings(deadline=None, max_examples=40, derandomize=True)


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def toy(tokens, u):
    """Exact and batch-invariant, (B, N) -> (B, N, V): what stands in a row chooses the logits of each place."""
    table = 2 * torch.randn(53, V, generator=torch.Generator().manual_seed(9))
    place = torch.arange(tokens.shape[1])
    return table[(31 * tokens + 7 * place + tokens.sum(1, keepdim=True)) % 53]


def picture(batch=2, n=64):
    return torch.randint(V, (batch, n), generator=torch.Generator().manual_seed(1))


# --- pixels to tokens -------------------------------------------------------------------------------------------------


@given(h=st.integers(1, 5), w=st.integers(1, 5), f=st.sampled_from([1, 2, 4, 8]), data=st.data())
@OFF
def test_pitfall_16_one_pixel_masks_its_token(h, w, f, data):
    """A token that overlaps the region by a single pixel, anywhere in it, is masked; no other is."""
    y, x = data.draw(st.integers(0, h * f - 1)), data.draw(st.integers(0, w * f - 1))
    repaint = torch.zeros(2, h * f, w * f, dtype=torch.bool)
    repaint[1, y, x] = True
    masked = token_mask(repaint, f)
    assert masked.shape == (2, h * w), "(B, h*w)"
    assert masked.dtype == torch.bool, "a mask is boolean"
    assert masked.nonzero().tolist() == [[1, (y // f) * w + x // f]], f"pixel ({y}, {x}) at f = {f}"


def test_pitfall_16_token_masks_by_hand():
    repaint = torch.zeros(1, 8, 8, dtype=torch.bool)
    repaint[0, 3:5, 0:4] = True  # across the border of two tokens of 4 pixels
    assert token_mask(repaint, 4).tolist() == [[True, False, True, False]], "both tokens of a straddling stripe"
    assert token_mask(repaint, 8).tolist() == [[True]], "the only token"
    assert not token_mask(torch.zeros(1, 8, 8, dtype=torch.bool), 4).any(), "an empty region masks nothing"
    assert token_mask(torch.ones(1, 8, 8, dtype=torch.bool), 4).all(), "the whole picture masks all"


# --- infills ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 12])
def test_infill_leaves_the_others(steps):
    tokens, repaint = picture(), torch.rand(2, 64) < 0.4
    for step in decode(toy, tokens.masked_fill(repaint, MASK), mask_id=MASK, steps=steps, generator=seeds(1, 2)):
        assert step.tokens[~repaint].equal(tokens[~repaint]), f"step {step.index} touched a token outside the region"
    assert not step.masked.any(), "the region is not filled"
    assert not step.tokens[repaint].equal(tokens[repaint]), "nothing was drawn anew"


def test_infill_hides_what_it_replaces():
    """Two pictures that differ inside the region alone are the same to the model."""
    tokens, repaint = picture(), torch.rand(2, 64) < 0.4
    other = torch.where(repaint, (tokens + 1) % V, tokens)
    *_, a = decode(toy, tokens.masked_fill(repaint, MASK), mask_id=MASK, steps=4, generator=seeds(1, 2))
    *_, b = decode(toy, other.masked_fill(repaint, MASK), mask_id=MASK, steps=4, generator=seeds(1, 2))
    assert a.tokens.equal(b.tokens), "what stood in the region leaks into its infill"


def test_infill_counts_from_the_region():
    repaint = torch.zeros(2, 64, dtype=torch.bool)
    repaint[0, :16], repaint[1, 40:43] = True, True
    steps = list(decode(toy, picture().masked_fill(repaint, MASK), mask_id=MASK, steps=4, schedule="linear"))
    assert [s.revealed.sum(1).tolist() for s in steps] == [[4, 0], [4, 1], [4, 1], [4, 1]], "counts per image"


# --- mask-free edits --------------------------------------------------------------------------------------------------


@given(st.integers(1, 80), st.integers(1, 64).map(lambda k: k / 64))
@OFF
def test_each_iteration_masks_a_share_and_changes_no_other(n, share):
    tokens, seen = picture(2, n), []

    def spy(x, u):
        seen.append(x == MASK)
        return toy(x, u)

    before = tokens
    for step in resample(spy, tokens, mask_id=MASK, iterations=3, fraction=share, generators=seeds(1, 2)):
        masked = seen[-1]
        assert masked.sum(1).tolist() == [math.ceil(share * n)] * 2, f"{share:.3f} of {n} tokens"
        assert step.tokens[~masked].equal(before[~masked]), "a token that was not masked changed"
        assert step.revealed.equal(masked), "what is masked is drawn again"
        assert (step.tokens < V).all(), "every state is a whole picture"
        before = step.tokens
    assert len(seen) == 3, "one forward pass an iteration"


def test_the_papers_mask_free_edit():
    """100 iterations of 8% (Muse 3.3.2)."""
    steps = list(resample(toy, picture(), mask_id=MASK, generators=seeds(1, 2)))
    assert len(steps) == 100, "100 iterations"
    assert all(s.revealed.sum(1).tolist() == [6, 6] for s in steps), "8% of 64 tokens, rounded up"
    assert [s.index for s in steps] == list(range(100)), "counted"
    assert (steps[0].u, steps[-1].u) == (0.0, 1.0), "from the first to the last"
    changed = torch.stack([s.revealed for s in steps]).any(0)
    assert changed.float().mean() > 0.99, "in the end nearly every token has been drawn again"


def test_a_rising_guidance_rises_along_the_iterations():
    """The model is asked at u = 0 first and at u = 1 last, as in a decode; one iteration alone is a last one."""

    def spy(x, u):
        seen.append(u)
        return toy(x, u)

    for iterations, progress in ((5, [0.0, 0.25, 0.5, 0.75, 1.0]), (1, [1.0])):
        seen = []
        steps = resample(spy, picture(), mask_id=MASK, iterations=iterations, generators=seeds(1, 2))
        assert [s.u for s in steps] == seen == progress, f"{iterations} iterations: asked at {seen}"


def test_the_edited_places_are_random():
    """Uniform over the grid, and other ones each time and in each image."""
    steps = list(resample(toy, picture(), mask_id=MASK, iterations=400, generators=seeds(1, 2)))
    counts = torch.stack([s.revealed for s in steps]).sum((0, 1))
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3, "some places are edited more often"
    assert not steps[0].revealed.equal(steps[1].revealed), "the same places twice"
    assert not steps[0].revealed[0].equal(steps[0].revealed[1]), "the same places in both images"


def test_top_k_limits_the_edit():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.0])

    def flat(tokens, u):
        return logits.expand(*tokens.shape, V)

    start = torch.full((2, 64), 5)
    for k, allowed in ((1, {0}), (3, {0, 1, 2})):
        *_, last = resample(flat, start, mask_id=MASK, iterations=10, fraction=1.0, top_k=k, generators=seeds(1, 2))
        assert set(last.tokens.unique().tolist()) == allowed, f"top-{k} of the codes"
    *_, last = resample(flat, start, mask_id=MASK, iterations=2, fraction=1.0, top_k=None, generators=seeds(1, 2))
    assert len(last.tokens.unique()) > 3, "None draws from all"


def test_pitfall_17_an_edit_does_not_depend_on_its_neighbours():
    tokens = picture(3)
    *_, together = resample(toy, tokens, mask_id=MASK, iterations=5, generators=seeds(1, 2, 3))
    for i in range(3):
        *_, alone = resample(toy, tokens[i : i + 1], mask_id=MASK, iterations=5, generators=seeds(1 + i))
        assert alone.tokens[0].equal(together.tokens[i]), f"image {i} is edited otherwise in a batch"


@pytest.mark.parametrize(
    "change",
    [
        {"iterations": 0},
        {"iterations": 10**9},
        {"iterations": True},
        *({"fraction": x} for x in (0, 1.5, -0.1, math.nan)),
    ],
)
def test_edits_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} is "):
        list(resample(toy, picture(), mask_id=MASK, generators=seeds(1, 2), **change))


def test_a_generator_for_each_image():
    with pytest.raises(ValueError):
        list(resample(toy, picture(), mask_id=MASK, iterations=1, generators=seeds(1)))


# --- windows ----------------------------------------------------------------------------------------------------------


def walk(known, side):
    """The windows, painted one by one; each with the share of it that was known before."""
    seen = []
    for top, left in windows(known, side):
        view = known[top : top + side, left : left + side]
        seen.append(((top, left), view.float().mean().item(), tuple(view.shape)))
        view[:] = True
        assert len(seen) <= 1000, "windows without end"
    return seen


@given(
    side=st.integers(2, 8),
    pads=st.tuples(*[st.integers(0, 6)] * 4),
)
@OFF
def test_windows_cover_the_canvas(side, pads):
    left, top, right, bottom = pads
    known = torch.zeros(top + side + bottom, left + side + right, dtype=torch.bool)
    known[top : top + side, left : left + side] = True
    seen = walk(known, side)
    assert known.all(), "a part of the canvas is not painted"
    assert all(shape == (side, side) for _, _, shape in seen), "a window hangs over the edge"
    assert len({at for at, _, _ in seen}) == len(seen), "a window comes twice"
    assert all(share < 1 for _, share, _ in seen), "a window has nothing to paint"
    assert bool(seen) == any(pads), "as many windows as there is something to paint"


def test_windows_start_where_most_is_known():
    known = torch.zeros(8, 24, dtype=torch.bool)
    known[:, :8] = True
    seen = walk(known, 8)
    assert [at for at, _, _ in seen] == [(0, 4), (0, 8), (0, 12), (0, 16)], "outwards, half a window at a time"
    assert all(share == 0.5 for _, share, _ in seen), "each sees what was painted before it"


def test_windows_that_leave_a_remainder_end_at_the_edge():
    known = torch.zeros(8, 11, dtype=torch.bool)
    known[:, :8] = True
    seen = walk(known, 8)
    assert known.all(), "the edge is left over"
    assert max(left for (_, left), _, _ in seen) == 3, "the last window ends at the edge"


def test_what_is_masked_shows_as_the_nearest_known_token():
    x = None  # masked
    rows = [[7, x, x, x, 5, x, x, x, x], [x] * 9, list(range(1, 10))]
    masked = torch.tensor([[t is x for t in row] for row in rows])
    tokens = torch.tensor([[99 if t is x else t for t in row] for row in rows])
    shown = fill_with_nearest(tokens, masked)
    assert shown[0, [0, 2, 4, 5, 6, 7, 8]].tolist() == [7, 5, 5, 5, 5, 5, 5], "the centre is nearer than the corner"
    assert set(shown[0, [1, 3]].tolist()) <= {5, 7}, "between both, either"
    assert shown[1].tolist() == [0] * 9, "nothing is known"
    assert shown[2].tolist() == rows[2], "all is known"


# --- pictures ---------------------------------------------------------------------------------------------------------

A, B = "a red cube", "two small blue spheres left of a metal cylinder"


@pytest.fixture
def exact(tiny_muse):
    """A copy of the tiny Muse in float64, free to be spied on."""
    muse = Muse(tiny_muse.config, copy.deepcopy(tiny_muse.parts), tiny_muse.encoder)
    return muse.to("cpu", torch.float64)


@pytest.fixture(scope="module")
def image(tiny_muse):
    """A picture of the right size, no two pixels alike."""
    side = tiny_muse.config.high_tokenizer.image_size
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def spy_on_decode(monkeypatch) -> list[tuple[torch.Tensor, dict]]:
    """-> a list that grows by (start tokens, settings) at each `decode` of a Muse."""
    seen, decode = [], minimuse.muse.decode

    def spy(logits_fn, tokens, **settings):
        seen.append((tokens.clone(), settings))
        return decode(logits_fn, tokens, **settings)

    monkeypatch.setattr(minimuse.muse, "decode", spy)
    return seen


# --- inpainting pictures (3.3.1) --------------------------------------------------------------------------------------


def rectangle(image: Image.Image) -> np.ndarray:
    mask = np.zeros(image.size[::-1], dtype=bool)
    mask[20:45, 3:30] = True
    return mask


def as_rgb(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")


MASKS = {
    "PIL 1": lambda m: as_rgb(m).convert("1"),
    "PIL RGB": as_rgb,
    "numpy uint8": lambda m: m.astype(np.uint8) * 255,
    "numpy float": lambda m: m.astype(np.float32),
    "tensor float": lambda m: torch.from_numpy(m).float(),
}


@pytest.mark.parametrize("kind", MASKS)
def test_inpaint_keeps_the_users_pixels(tiny_muse, image, kind):
    mask, before = rectangle(image), image.tobytes()
    (new,) = tiny_muse.inpaint(image, MASKS[kind](mask), A, seed=0, steps=2)
    assert (new.mode, new.size) == ("RGB", image.size), f"{new.mode} {new.size}"
    assert (pixels(new)[~mask] == pixels(image)[~mask]).all(), "outside the mask every pixel is the user's"
    assert (pixels(new)[mask] != pixels(image)[mask]).any(1).mean() > 0.9, "inside it is new"
    assert image.tobytes() == before, "the user's image is never written to"
    (plain,) = tiny_muse.inpaint(image, mask, A, seed=0, steps=2)
    assert new.tobytes() == plain.tobytes(), f"a mask as {kind} must mean the same as a boolean one"


def test_inpaint_without_keep_is_the_decoders_picture(tiny_muse, image):
    mask = rectangle(image)
    kept, made = (tiny_muse.inpaint(image, mask, A, seed=0, steps=2, keep=keep)[0] for keep in (True, False))
    assert (pixels(made)[~mask] != pixels(image)[~mask]).any(), "keep=False shows the decoder's pixels everywhere"
    assert (pixels(made)[mask] == pixels(kept)[mask]).all(), "keep changes nothing inside the mask"


def test_inpaint_draws_n_and_tells_what_made_them(tiny_muse, image):
    images = tiny_muse.inpaint(image, rectangle(image), A, n=3, seed=4, steps=2)
    assert len({i.tobytes() for i in images}) == 3, "three seeds, three pictures"
    told = [i.info["minimuse"] for i in images]
    assert [t["seed"] for t in told] == [4, 5, 6], f"{told}"
    assert all(t["task"] == "inpaint" and t["prompt"] == A for t in told), f"{told}"
    again = tiny_muse.inpaint(image, rectangle(image), A, seed=5, steps=2)[0]
    off = np.abs(pixels(again) - pixels(images[1])).max()
    assert off <= 1, f"a picture alone and among three: pixels differ by {off}"


def test_pitfall_16_one_pixel_masks_the_tokens_that_hold_it(exact, image, monkeypatch):
    config, (x, y) = exact.config, (13, 42)
    seen = spy_on_decode(monkeypatch)
    mask = np.zeros(image.size[::-1], dtype=bool)
    mask[y, x] = True
    (new,) = exact.inpaint(image, mask, A, seed=0, steps=2)
    (low, _), (high, _) = seen
    given_low, given_high = tokenize(exact, image)
    covered = config.high_tokenizer.image_size // config.base.grid  # picture pixels a low token covers, each way
    f = config.high_tokenizer.downsampling
    at_low = y // covered * config.base.grid + x // covered
    at_high = y // f * config.superres.grid + x // f
    assert (low[0] == exact.base.mask_id).nonzero().flatten().tolist() == [at_low], "the one low token that holds it"
    assert (high[0] == exact.superres.mask_id).nonzero().flatten().tolist() == [at_high], "and the one high token"
    for start, old, at in ((low, given_low, at_low), (high, given_high, at_high)):
        rest = torch.arange(old.shape[1]) != at
        assert torch.equal(start[0, rest], old[0, rest]), "all other tokens are those of the picture"
    changed = (pixels(new) != pixels(image)).any(2).nonzero()
    assert set(zip(*changed, strict=True)) <= {(y, x)}, f"only the masked pixel may change: {changed}"


def test_inpaint_leaves_tokens_outside_as_they_are(exact, image):
    low, high = tokenize(exact, image)
    mask = rectangle(image)
    ends = {}
    exact.inpaint(image, mask, A, seed=0, steps=2, callback=lambda s: ends.update({s.stage: s}))
    for stage, old, side in (("base", low, exact.config.base.grid), ("superres", high, exact.config.superres.grid)):
        size = len(mask) // side
        covered = torch.from_numpy(mask).view(side, size, side, size).any(3).any(1).flatten()
        assert torch.equal(ends[stage].tokens[0, ~covered], old[0, ~covered]), f"{stage}: given tokens were redrawn"
        assert not torch.equal(ends[stage].tokens[0, covered], old[0, covered]), f"{stage}: nothing was repainted"


def test_everything_may_be_repainted(tiny_muse, image):
    (new,) = tiny_muse.inpaint(image, np.ones(image.size[::-1], dtype=bool), A, seed=0, steps=2)
    drawn = tiny_muse.generate(A, seed=0, steps=2)[0]
    assert new.tobytes() == drawn.tobytes(), "a mask of everything is `generate`"


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_inpaint_takes_the_usual_modes(tiny_muse, image, mode):
    mask, given = rectangle(image), image.convert(mode)
    before = given.tobytes()
    (new,) = tiny_muse.inpaint(given, mask, A, seed=0, steps=1)
    assert (pixels(new)[~mask] == pixels(given)[~mask]).all(), f"{mode}: outside the mask every pixel is the user's"
    assert (given.mode, given.tobytes()) == (mode, before), "the user's image is never written to"


def test_pictures_that_do_not_fit_are_refused(tiny_muse, image):
    side, mask = image.width, rectangle(image)
    calls = [
        lambda picture: tiny_muse.inpaint(picture, mask, A),
        lambda picture: tiny_muse.outpaint(picture, 8, A),
        lambda picture: tiny_muse.edit(picture, A),
        lambda picture: next(tiny_muse.edit_steps(picture, A)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"str came.*PIL\.Image\.open"):
            call("cat.png")
        with pytest.raises(ValueError, match=rf"{side} x {side} pixels, {side} x 8 came; crop it to a square"):
            call(image.resize((side, 8)))
        with pytest.raises(ValueError, match="CMYK"):
            call(image.convert("CMYK"))


def test_masks_that_do_not_fit_are_refused(tiny_muse, image):
    with pytest.raises(ValueError, match="8 x 9 came"):
        tiny_muse.inpaint(image, np.ones((9, 8), dtype=bool), A)
    with pytest.raises(ValueError, match="came"):
        tiny_muse.inpaint(image, None, A)
    with pytest.raises(ValueError, match=r"mask is empty.*white is what to repaint"):
        tiny_muse.inpaint(image, Image.new("L", image.size), A)


# --- outpainting pictures (3.3.1) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [5, (0, 7, 3, 0), [0, 0, 0, 32]])
def test_outpaint_grows_by_the_padding_and_keeps_the_picture(tiny_muse, image, padding):
    left, top, right, bottom = padding if isinstance(padding, tuple | list) else (padding,) * 4
    before, side = image.tobytes(), image.width
    (new,) = tiny_muse.outpaint(image, padding, A, seed=0, steps=1)
    assert new.size == (left + side + right, top + side + bottom), f"padding {padding} made {new.size}"
    kept = new.crop((left, top, left + side, top + side))
    assert kept.tobytes() == image.tobytes(), "the picture's own pixels come back bit for bit"
    assert image.tobytes() == before, "the user's image is never written to"
    told = new.info["minimuse"]
    assert (told["task"], told["prompt"], told["seed"]) == ("outpaint", A, 0), f"{told}"
    assert told["padding"] == [left, top, right, bottom], f"{told}"


def test_outpaint_by_more_than_the_picture(tiny_muse, image):
    side = image.width
    padding = (side + 20, 0, 0, 9)
    (new,) = tiny_muse.outpaint(image, padding, A, seed=0, steps=1)
    assert new.size == (2 * side + 20, side + 9), f"{new.size}"
    assert new.crop((side + 20, 0, 2 * side + 20, side)).tobytes() == image.tobytes(), "kept bit for bit"
    black = (pixels(new) == 0).all(2)
    assert black.mean() < 0.05, f"{black.mean():.0%} of the canvas was never painted"


def test_outpaint_sees_what_stands(tiny_muse, image, monkeypatch):
    seen = spy_on_decode(monkeypatch)
    tiny_muse.outpaint(image, 24, A, seed=0, steps=1)
    for tokens, _ in seen[::2]:
        share = (tokens == tiny_muse.base.mask_id).float().mean().item()
        assert 0 < share < 1, f"a window masks {share:.0%} of its low tokens: it should overlap what stands"


def test_outpaint_draws_n(tiny_muse, image):
    images = tiny_muse.outpaint(image, 8, A, n=2, seed=3, steps=1)
    assert [i.info["minimuse"]["seed"] for i in images] == [3, 4], "picture i draws with seed + i"
    assert images[0].tobytes() != images[1].tobytes(), "two seeds, two pictures"


@pytest.mark.parametrize("padding", [0, (0, 0, 0, 0), (8, -8, 0, 0), (8, 8), 10**9, True, math.nan, "8", None])
def test_outpaint_refuses_padding_that_makes_no_sense(tiny_muse, image, padding):
    with pytest.raises(ValueError, match=r"padding.* is "):
        tiny_muse.outpaint(image, padding, A)


# --- mask-free edits of pictures (3.3.2) ------------------------------------------------------------------------------


def test_edit_defaults_are_the_papers():
    defaults = {k: p.default for k, p in inspect.signature(resample).parameters.items()}
    paper = {"iterations": 100, "fraction": 0.08, "top_k": 3}
    assert {k: defaults[k] for k in paper} == paper, f"Muse 3.3.2: {paper}; {defaults}"
    assert {name: preset(name).edit_guidance for name in PRESETS if name != "toy"} == dict.fromkeys(
        ("nano", "paper_632m", "paper_3b"), 4.0
    ), "guidance 4; toy, which loses shapes by it, says so"
    shipped = checkpoint.read_configuration(checkpoint.find("toy") / checkpoint.CONFIG)
    assert shipped.edit_guidance == preset("toy").edit_guidance == 1.0, "preset and checkpoint alike"


def test_a_checkpoint_may_edit_with_a_guidance_of_its_own(exact, image):
    exact.config = replace(exact.config, edit_guidance=1.5)
    for own, t in (({}, 1.5), ({"guidance": None}, 1.5), ({"guidance": 0.0}, 0.0), ({"guidance": (1.0, 3.0)}, None)):
        steps = exact.edit_steps(image, A, seed=0, iterations=2, superres={"steps": 1}, **own)
        told = [s.guidance for s in steps if s.stage == "base"]
        assert told == ([t, t] if t is not None else [1.0, 3.0]), f"{own}: {told}"


def test_edit_changes_a_share_of_the_tokens_at_a_time(exact, image):
    before, _ = tokenize(exact, image)
    most = math.ceil(0.08 * before.shape[1])
    trace = list(exact.edit_steps(image, A, seed=0, iterations=3, superres={"steps": 2}))
    assert [s.stage for s in trace] == ["base"] * 3 + ["superres"] * 2, "iterations first, then super-resolution"
    assert [s.index for s in trace[:3]] == [0, 1, 2], "iterations are counted"
    for step in trace[:3]:
        changed = step.tokens != before
        assert step.revealed.sum() == most, f"iteration {step.index} resamples {step.revealed.sum()} of {most} tokens"
        assert not (changed & ~step.revealed).any(), f"iteration {step.index} changes tokens outside its share"
        assert not step.masked.any(), "every state on the way is a whole picture"
        assert step.guidance == 4, "guidance 4 by default"
        before = step.tokens
    assert trace[-1].tokens.shape[1] == exact.config.superres.tokens, "it ends with a high-resolution picture"


def test_edit_tells_a_rising_guidance(exact, image):
    steps = exact.edit_steps(image, A, seed=0, iterations=3, guidance=(0, 4), superres={"steps": 1})
    assert [s.guidance for s in steps][:3] == [0, 2, 4], "it rises along the iterations"


def test_edit_superres_reads_the_edited_tokens(exact, image, monkeypatch):
    read, memory = [], exact.superres.memory
    monkeypatch.setattr(exact.superres, "memory", lambda text, low, *d: (read.append(low), memory(text, low, *d))[1])
    base = [s for s in exact.edit_steps(image, A, iterations=2, superres={"steps": 1}) if s.stage == "base"]
    assert torch.equal(read[0], base[-1].tokens), "super-resolution must read what the iterations ended with"


def test_edit_gives_pictures(tiny_muse, image):
    before = image.tobytes()
    settings = {"iterations": 2, "fraction": 0.5, "superres": {"steps": 1}}
    images = tiny_muse.edit(image, A, n=2, seed=1, negative_prompt=B, **settings)
    assert [i.size for i in images] == [image.size] * 2, f"{images}"
    assert images[0].tobytes() != images[1].tobytes(), "two seeds, two pictures"
    told = images[1].info["minimuse"]
    expected = {"model": "tiny", "fingerprint": tiny_muse.fingerprint, "task": "edit", "guidance": 4.0}
    assert told == expected | {"prompt": A, "negative_prompt": B, "seed": 2} | settings, f"{told}"
    assert image.tobytes() == before, "the user's image is never written to"
    seen = []
    again = tiny_muse.edit(image, A, n=2, seed=1, negative_prompt=B, callback=seen.append, **settings)
    assert again[0].tobytes() == images[0].tobytes(), "the same seed, the same edit"
    assert [s.stage for s in seen] == ["base", "base", "superres"], "callback sees every step"


def test_low_tokens_are_those_of_training(tiny_muse, image):
    """Training decimates uint8 images; editing reads the same low-res image, so the same tokens."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
    factor = tiny_muse.config.high_tokenizer.image_size // tiny_muse.config.low_tokenizer.image_size
    trained = tiny_muse.low_tokenizer.encode(to_float(area_downsample(pixels, factor)))
    assert tokenize(tiny_muse, image)[0].equal(trained)


def test_numpy_scalars_are_numbers_in_edits(tiny_muse, image):
    settings = {"iterations": np.int64(2), "fraction": np.float32(0.25), "top_k": np.int8(3), "guidance": np.float32(2)}
    (new,) = tiny_muse.edit(image, A, seed=np.int64(1), superres={"steps": 1}, **settings)
    plain = {"iterations": 2, "fraction": 0.25, "top_k": 3, "guidance": 2.0}
    assert {k: json.loads(json.dumps(new.info["minimuse"]))[k] for k in plain} == plain, "info is plain JSON"
    (wide,) = tiny_muse.outpaint(image, np.int64(4), A, seed=2**32 - 1, steps=1, superres={"steps": 1})
    assert wide.size == (image.width + 8, image.height + 8)


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"fraction": 0.0}, {"fraction": 1.5}, {"guidance": math.nan}])
def test_edit_refuses_nonsense(tiny_muse, image, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is "):
        tiny_muse.edit(image, A, **wrong)
