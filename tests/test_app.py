"""app.py without a browser; test_page.py has the page itself."""

import sys

import pytest

from minimuse import cli

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
