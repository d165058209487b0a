"""benchmarks/scaling.py at tiny size: what arithmetic predicts, what is written."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling
from scaling import START, TINY, attention_flops, predicted_bytes, slope

from minimuse.train_budget import count_flops
from minimuse.transformer import SelfAttention


def test_slope_is_the_power():
    assert slope([1, 2, 8], [3, 12, 192]) == pytest.approx(2)
    assert slope([64, 1024], [5, 80]) == pytest.approx(1)


@pytest.mark.parametrize(("grid", "block"), [(8, 0), (8, 4), (16, 4)])
def test_flops_of_attention_are_the_counted_ones(grid, block):
    d = scaling.HEADS * scaling.CHANNELS
    with torch.device("meta"):
        layer, x = SelfAttention(d, scaling.HEADS, block), torch.zeros(1, grid**2, d)
    assert count_flops(lambda: layer(x)) == 2 * grid**2 * 4 * d * d + attention_flops(grid, block)


def test_predicted_bytes_by_hand():
    small, more = (predicted_bytes(START._replace(batch=b)) for b in (1, 2))
    entries, logits = 32 + 1 + 64, 256 * 8192
    assert more - small == 4 * (2 * 4 * entries * 256 + 4 * logits), "a picture's keys, values and logits"
    assert 2 * small - more == 4 * START.parameters(), "the weights are there once"
    assert predicted_bytes(START._replace(steps=99)) == predicted_bytes(START), "steps cost no memory"


def test_points_are_measured_once_and_stand_on_their_axes(monkeypatch):
    asked = []
    monkeypatch.setattr(scaling, "alone", lambda *a: asked.append(a) or {"seconds": 2.0, "bytes": 8})
    found = scaling.grow(TINY, scaling.TINY_AXES, 1, 1e9)
    assert {axis: [p["at"] for p in points] for axis, points in found.items()} == {
        "tokens": [16, 64],
        "steps": [2, 4],
        "batch": [1, 2],
        "width": [32, 64],
    }
    assert len(asked) == 5, "the start, which is on all four axes, and one more each"
    for points in found.values():
        assert points[1]["floor"] > points[0]["floor"], "more work takes longer"


def test_a_point():
    found = scaling.point(TINY, 1)
    assert found["seconds"] > 0
    assert found["bytes"] >= 1


def test_what_is_written(tmp_path, monkeypatch, capsys):
    """All but the processes: from the command line to tables and figure."""
    monkeypatch.setattr(scaling, "alone", lambda *a: {"seconds": 2.0 + len(a), "bytes": 8})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick", "--out", str(tmp_path)])
    scaling.main()
    text = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert "| tokens | 16 to 64 |" in text
    assert "| 64 | 4 | fp32 |" in text, "multi-axis in blocks of 4"
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
    assert (tmp_path / "scaling.json").exists()
    assert "scaling.png" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_measures_a_point():
    found = scaling.grow(TINY, {"batch": [{"batch": 2}]}, 1, 1e9)
    assert found["batch"][0]["seconds"] > 0
