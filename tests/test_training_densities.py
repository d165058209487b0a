"""benchmarks/training_densities.py at tiny size: equal compute, kept results, intervals of both kinds."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import training_densities as td

from minimuse.lab_optimum import GROUPS

TWO = {"cosine (Muse)": td.DENSITIES["cosine (Muse)"], "mine": lambda u: 1 - u**3}
HOW = {"steps": 2, "seeds": 2, "samples": 64}


@pytest.fixture(scope="module")
def done(tiny_muse, tmp_path_factory):
    out = tmp_path_factory.mktemp("densities")
    return out, td.study(tiny_muse, out, TWO, **HOW)


@pytest.mark.slow
def test_a_stopped_study_ends_the_same(done, tiny_muse, tmp_path, monkeypatch):
    _, results = done
    train, calls = td.train, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args)

    monkeypatch.setattr(td, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        td.study(tiny_muse, tmp_path, TWO, **HOW)
    again = td.study(tiny_muse, tmp_path, TWO, **HOW)
    assert len(calls) == 2 + 1 + 2, "two were done, the third was not, and the fourth"
    assert again == results
    with pytest.raises(ValueError, match="curve"):
        td.study(tiny_muse, tmp_path, {**TWO, "mine": lambda u: 1 - u}, **HOW)


def test_densities_differ_by_their_masks_alone(done):
    _, results = done
    one, other = results.values()
    assert set(one[0]) == {"bound", *(f"{m}@{t}" for m in ("accuracy", "frechet") for t in td.DECODING)}
    assert all(len(values) == GROUPS for values in one[0].values())
    bounds = [torch.tensor(r["bound"]).mean().item() for r in (*one, *other)]
    assert len({round(b, 6) for b in bounds}) == 4, f"two densities, two seeds: {bounds}"
    assert all(abs(b - math.log(16)) < 1 for b in bounds), "two steps from chance, log V"


def test_what_is_written(done):
    out, results = done
    td.write(out, results, TWO, HOW)
    text = (out / "densities.md").read_text(encoding="utf-8")
    assert "| mine | 0.75 |" in text
    assert "| cosine (Muse) | 0.64 |" in text
    assert "2 runs a density, 64 test scenes" in text
    assert json.loads((out / "densities.json").read_text(encoding="utf-8"))["results"] == results
    assert (out / "densities.png").stat().st_size > 5000


def test_intervals_hold_test_scenes_and_training_runs():
    same = [1.0] * GROUPS
    assert td.combined([same, same])[:3] == (1, 1, 1)
    runs = td.combined([[1.0] * GROUPS, [2.0] * GROUPS, [3.0] * GROUPS])
    assert runs.value == 2
    assert runs.margin == pytest.approx(4.30 / math.sqrt(3), rel=0.06), "Student's t of three runs"
    spread = [float(i % 2) for i in range(GROUPS)]
    scenes = td.combined([spread])
    assert scenes.margin == pytest.approx(2.04 * math.sqrt(8 / 31) / math.sqrt(GROUPS), rel=0.01)
    paired = td.versus([{"x": [a + 0.5 for a in spread]}], [{"x": spread}], "x")
    assert paired[:3] == pytest.approx((0.5, 0.5, 0.5)), "what both share drops out"
