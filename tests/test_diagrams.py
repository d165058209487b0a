"""notebooks/diagrams.py: shapes come from the configuration, no text covers another or leaves its picture."""

import importlib.util
import io
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from minimuse.config import preset

_FILE = Path(__file__).resolve().parent.parent / "notebooks" / "diagrams.py"
_spec = importlib.util.spec_from_file_location("notebooks_diagrams", _FILE)
diagrams = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(diagrams)
NAMES = [f.__name__ for f in diagrams.DIAGRAMS]


@cache
def drawn(name: str, config: str):
    return getattr(diagrams, name)(preset(config))


def texts(figure) -> list:
    """(text, its box in pixels) of all texts of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = [text for ax in figure.axes for text in ax.texts if text.get_text()]
    return [(text, text.get_window_extent(canvas.get_renderer())) for text in found]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", ["toy", "paper_3b"])
def test_texts_are_legible(name, config):
    figure = drawn(name, config).figure
    found = texts(figure)
    assert len(found) >= 10
    for text, box in found:
        assert text.get_fontsize() >= 9, f"{text.get_text()!r} is tiny"
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert inside, f"{text.get_text()!r} leaves the picture"
    for (a, box), (b, other) in combinations(found, 2):
        assert not box.overlaps(other), f"{a.get_text()!r} and {b.get_text()!r} overlap"


@pytest.mark.parametrize("name", NAMES)
def test_a_diagram_is_a_gray_png_with_a_text_that_says_the_same(name):
    shown = drawn(name, "toy")
    image = Image.open(io.BytesIO(shown.data)).convert("RGB")
    assert 1000 <= image.width <= 1100
    assert image.getchannel(0).tobytes() == image.getchannel(2).tobytes()
    assert 150 <= len(shown.alt) <= 700
    assert repr(shown) == f"[diagram: {shown.alt}]"
    _, metadata = shown._repr_png_()
    assert metadata["alt"] == shown.alt


@pytest.mark.parametrize("name", NAMES)
def test_shapes_come_from_the_configuration(name):
    toy, large = (drawn(name, config) for config in ("toy", "paper_3b"))
    assert toy.alt != large.alt
    assert {t.get_text() for t, _ in texts(toy.figure)} != {t.get_text() for t, _ in texts(large.figure)}


def test_the_numbers_of_the_base_model():
    config = preset("toy")
    shown = diagrams.layer(replace(config, base=replace(config.base, layers=7, width=256)))
    words = " ".join(text.get_text() for text, _ in texts(shown.figure))
    assert "there are 7" in words
    assert "B × 64 × 256" in words  # noqa: RUF001
    assert "Each of 7 layers" in shown.alt


@pytest.mark.parametrize("here", ["text", "tokenizer", "masking", "base", "superres", "decoder"])
def test_the_cascade_shows_where_one_is(here):
    def black(shown):
        return sum(patch.get_facecolor()[:3] == (0, 0, 0) for patch in shown.figure.axes[0].patches)

    config = preset("toy")
    more = black(diagrams.cascade(config, here=here)) - black(diagrams.cascade(config))
    assert more == (2 if here in ("tokenizer", "masking") else 1)
