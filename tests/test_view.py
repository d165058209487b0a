"""notebooks/view.py: strips have a column a step, animations play, source code stands under its file's name."""

import base64
import importlib.util
import io
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image

from minimuse.cfg import guide
from minimuse.muse import Muse
from minimuse.vqgan import VectorQuantizer

_FILE = Path(__file__).resolve().parent.parent / "notebooks" / "view.py"
_spec = importlib.util.spec_from_file_location("notebooks_view", _FILE)
view = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(view)
PICTURES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_film_strip():
    frames = [PICTURES[:2]] * 4
    strip = view.film_strip(frames, [f"step {i}: {64 - i} left" for i in range(4)], scale=2)
    assert strip.width == 8 + 4 * 72, f"one column a step: {strip.width}"
    assert strip.height > view.film_strip(frames, scale=2).height, "titles take their room"
    assert view.film_strip([Image.new("RGB", (16, 16))] * 3, scale=1).size == (80, 32), "PIL images are frames of one"


@pytest.mark.parametrize("wrong", [lambda: view.film_strip([]), lambda: view.film_strip([PICTURES], ["a", "b"])])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected|give|came"):
        wrong()


def test_an_animation_is_a_gif_that_plays():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    page = view.animation(frames, ms=100).data
    back = Image.open(io.BytesIO(base64.b64decode(page.split("base64,")[1].split('"')[0])))
    assert (back.format, back.n_frames, back.info["loop"]) == ("GIF", 3, 0)
    times = []
    for i in range(3):
        back.seek(i)
        times.append(back.info["duration"])
    assert times == [100, 100, 1500]
    assert 'width="240"' in page, "it is shown about 240 pixels wide"


def test_style_is_small_and_says_only_what_matplotlib_knows():
    with matplotlib.rc_context():
        view.style()
        assert matplotlib.rcParams["figure.dpi"] == 80


def test_show_gives_source_under_its_file():
    source = view.show(guide, VectorQuantizer.nearest).data
    assert source.startswith("```python\n# minimuse/cfg.py\ndef guide(")
    assert "\n\n\n# minimuse/vqgan.py\ndef nearest(self" in source, "methods are dedented"
    assert "# minimuse/muse.py\n@torch.inference_mode()" in view.show(Muse.picture).data, "decorated ones too"
