"""app.py without a browser; test_page.py has the page itself."""

import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minimuse import cli
from minimuse.app import follow, painted

A = "a red cube"


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app"]) == 1
    assert capsys.readouterr().err == 'minimuse: the app needs gradio: pip install "minimuse[app]"\n'


def test_dials_left_alone_are_the_checkpoints(tiny_muse):
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from minimuse.app import Page

    base, high = tiny_muse.config.base_sampling, tiny_muse.config.superres_sampling
    page, left = Page(tiny_muse), [*base.guidance, base.steps, high.steps, base.schedule, base.order]
    settings = page._settings(*left)
    assert settings["superres"]["choice_temperature"] == high.choice_temperature, "each decode has its own"
    one, two = tiny_muse.generate(A, seed=1), tiny_muse.generate(A, seed=1, **settings)
    assert one[0].tobytes() == two[0].tobytes(), "they draw what no settings draw"
    settings = page._settings(*left[:-1], "halton")
    one, two = tiny_muse.generate(A, seed=1, order="halton"), tiny_muse.generate(A, seed=1, **settings)
    assert one[0].tobytes() == two[0].tobytes(), "another order has no ranking noise, as in `generate`"


# --- following a drawing ----------------------------------------------------------------------------------------------


def test_follow_gives_the_steps_then_the_picture(tiny_muse):
    seen = []

    def draw(callback):
        return tiny_muse.generate(A, seed=3, steps=2, callback=lambda step: (seen.append(step), callback(step)))

    *steps, picture = follow(draw)
    assert [a is b for a, b in zip(steps, seen, strict=True)] == [True] * 4, "each step, in order"
    assert picture.tobytes() == tiny_muse.generate(A, seed=3, steps=2)[0].tobytes(), "at last the picture"


def test_follow_gives_a_step_before_the_next_is_made():
    go, made = threading.Semaphore(0), []

    def draw(callback):
        for i in range(3):
            assert go.acquire(timeout=60), "nobody asked for the next step"
            made.append(i)
            callback(i)
        return ["picture"]

    following = follow(draw)
    for i in range(3):
        go.release()
        assert (next(following), made) == (i, list(range(i + 1))), "a step comes as soon as it is made"
    assert list(following) == ["picture"]


def test_follow_raises_what_the_drawing_raises(tiny_muse):
    with pytest.raises(ValueError, match="steps is 0"):
        list(follow(lambda callback: tiny_muse.generate(A, steps=0, callback=callback)))


def test_a_drawing_that_nobody_follows_stops():
    made = []

    def draw(callback):
        for i in range(10_000):
            made.append(i)
            callback(i)
            time.sleep(0.001)

    following = follow(draw)
    next(following)
    following.close()  # as gradio does when the client has left; it returns when the drawing has stopped
    assert len(made) < 10_000, "it drew to its end"
    assert threading.active_count() < 20, "threads are left"


# --- what is painted --------------------------------------------------------------------------------------------------


def layer(side: int, *box: int, alpha: int = 255) -> Image.Image:
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).rectangle(box, fill=(255, 0, 0, alpha))
    return image


def test_a_pixel_is_painted_if_a_part_of_it_is():
    mask = painted([layer(96, 12, 6, 17, 6)], side=16, zoom=6)  # one row of the third pixel of the second row
    assert np.argwhere(mask).tolist() == [[1, 2]], f"{np.argwhere(mask).tolist()}"
    mask = painted([layer(96, 12, 6, 18, 6), layer(96, 95, 95, 95, 95)], side=16, zoom=6)
    assert np.argwhere(mask).tolist() == [[1, 2], [1, 3], [15, 15]], f"all layers count: {np.argwhere(mask).tolist()}"
    mask = painted([layer(192, 0, 0, 11, 11)], side=16, zoom=6)
    assert np.argwhere(mask).tolist() == [[0, 0]], "a layer of another size is scaled, as of a screen of finer pixels"


@pytest.mark.parametrize("layers", [[], [layer(96, 0, 0, 95, 95, alpha=100)], [Image.new("RGBA", (96, 96))]])
def test_an_empty_mask_is_refused(layers):
    with pytest.raises(ValueError, match="The mask is empty: paint over the part"):
        painted(layers, side=16, zoom=6)
