"""editing.py over tokens: the token mask, infills, mask-free edits, windows (Muse 3.3). Over pictures: test_muse.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minimuse.editing import infill, resample, token_mask, windows

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
    for step in infill(toy, tokens, repaint, mask_id=MASK, steps=steps, generator=seeds(1, 2)):
        assert step.tokens[~repaint].equal(tokens[~repaint]), f"step {step.index} touched a token outside the region"
    assert not step.masked.any(), "the region is not filled"
    assert not step.tokens[repaint].equal(tokens[repaint]), "nothing was drawn anew"


def test_infill_hides_what_it_replaces():
    """Two pictures that differ inside the region alone are the same to the model."""
    tokens, repaint = picture(), torch.rand(2, 64) < 0.4
    other = torch.where(repaint, (tokens + 1) % V, tokens)
    *_, a = infill(toy, tokens, repaint, mask_id=MASK, steps=4, generator=seeds(1, 2))
    *_, b = infill(toy, other, repaint, mask_id=MASK, steps=4, generator=seeds(1, 2))
    assert a.tokens.equal(b.tokens), "what stood in the region leaks into its infill"


def test_infill_counts_from_the_region():
    repaint = torch.zeros(2, 64, dtype=torch.bool)
    repaint[0, :16], repaint[1, 40:43] = True, True
    steps = list(infill(toy, picture(), repaint, mask_id=MASK, steps=4, schedule="linear"))
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


@pytest.mark.parametrize("change", [{"iterations": 0}, {"fraction": 0.0}, {"fraction": 1.5}, {"fraction": -0.1}])
def test_edits_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match="give at least 1"):
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
