"""The shipped nano checkpoint: what README says of it holds, counted by the detector."""

import sys
from pathlib import Path

import pytest

from minimuse import Muse, checkpoint
from minimuse.eval_networks import Detector

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import nano_accuracy  # noqa: E402

pytestmark = pytest.mark.skipif("nano" not in checkpoint.shipped(), reason="no nano checkpoint in this tree")


def test_prompts_cover_every_seen_combination():
    asked = nano_accuracy.prompts(84)
    pairs = {(color, shape) for _, color, shape in asked}
    assert len(pairs) == 21, "eight colours times three shapes, less the three held-out pairs"
    assert all(color in prompt and shape in prompt for prompt, color, shape in asked), "a prompt names what is counted"


@pytest.mark.slow
def test_nano_draws_the_colour_and_the_shape_that_the_prompt_names():
    muse = Muse.from_pretrained("nano")
    right, _, _ = nano_accuracy.accuracy(muse, Detector.from_pretrained(), 42)
    color, both = right[:, 0].float().mean().item(), right[:, :2].all(1).float().mean().item()
    assert color >= 0.92, f"colour right in {color:.1%} of 42; 99.5% of 210 when this checkpoint was shipped"
    assert both >= 0.85, f"colour and shape right in {both:.1%} of 42; 96.2% of 210 when it was shipped"
