"""benchmarks/toy_findings.py: what it tells of figures made up by hand, and that README tells what was measured."""

import json
import sys

import pytest
from conftest import ROOT

from minimuse.eval_metrics import Estimate, proportion_interval
from minimuse.eval_run import RISING

sys.path.insert(0, str(ROOT / "benchmarks"))
import toy_findings

STORED = ROOT / "benchmarks" / "toy.json"


def percent(value):
    return [value, value - 0.05, value + 0.05, 1000, ".1%"]


def number(value):
    return [value, value - 1, value + 1, 1000, ".4g"]


def kinds():
    """Figures as eval.json holds them, each another one."""
    base = {kind: {"right": percent(0.1 * (i + 1))} for i, kind in enumerate(toy_findings.PARTS["base"]["kinds"][:5])}
    base["negative"] = {"right": percent(0.9), "with": percent(0.07), "without": [0.6, 0.5, 0.7, 750, ".1%"]}
    edits = {
        "right": percent(0.4),
        "colour, 10": percent(0.6),
        "colour, 30": percent(0.95),
        "rest, final": percent(0.8),
    }
    inpaint = {"right": percent(0.3), "right, of 1": percent(0.31), "right, of 2": percent(0.29)}
    gains = {f"right, gain over {k}": [0.02, -0.01, 0.05, 1000, "+.1%"] for k in ("bicubic", "no text")}
    rights = {f"right, {k}": percent(0.7) for k in ("bicubic", "no text")}
    decoder = {"right": percent(0.9), "right, before": percent(0.8), "psnr, gain": number(0.5)}
    cascade = {
        "seen": {"right": percent(0.99)},
        "relations": {"right": percent(0.88)},
        "inpaint": inpaint | {"changed outside": number(0)},
        "outpaint": {"right": percent(0.5), "seam": number(9), "seam, real": number(3), "changed outside": number(0)},
        "edit": edits,
        "superres": {"right": percent(0.75)} | gains | rights,
        "decoder": decoder | {"perceptual, gain": number(-0.02), "perceptual, before": number(1)},
    }
    sweep = {name: {"right": percent(0.6), "frechet": number(0.25)} for pair in RISING.items() for name in pair}
    for name, constant in RISING.items():
        sweep[name] = sweep[name] | {f"right, less {constant}": [0.01, -0.02, 0.04, 300, "+.1%"]}
    return {"base": base, "cascade": cascade, "sweep": sweep}


def test_readmes_tables_by_hand():
    parts = {name: {"kinds": found} for name, found in kinds().items()}
    text = toy_findings.summary({"parts": parts})
    for line in (
        "| one thing, seen combinations | 10.0% (5.0 to 15.0) | 97% |",
        "| nevertheless (without it: 60.0%; 750 pictures) | 7.0% (2.0 to 12.0) | at most 10% |",
        "| inpainting: a thing replaced | 30.0% (25.0 to 35.0) | of one thing 31.0%, of two 29.0%; of the ",
        "pixels outside the mask none change |",
        "| the base model's pictures of them, enlarged | 70.0% (65.0 to 75.0) | super-resolution gains +2.0 (-1.0 to ",
        "material are then still right in 80.0%; after 10 the colour is there in 60.0%, after 30 in 95.0% |",
        "80.0% before; it gains 0.50 (-0.50 to 1.50) dB and 2% of perceptual distance |",
        "| 0 to 2, or 1 throughout | 60.0% (55.0 to 65.0) | 60.0% (55.0 to 65.0) | +1.0% (-2.0 to +4.0) | 0.250 |",
        "| 0 to 16, or 8 throughout |",
    ):
        assert line.removeprefix("| nevertheless") in text, f"{line}\n{text}"


def test_relations_are_told_apart():
    rows = [
        {"group": f"red cube {name} gray sphere", "right": i < right}
        for name, right in (("left", 3), ("right", 1), ("beside", 0))
        for i in range(4)
    ]
    found = toy_findings.by_relation(rows)
    assert {name: round(4 * f.value) for name, f in found.items()} == {
        "right, left": 3,
        "right, right": 1,
        "right, beside": 0,
    }
    assert found["right, left"] == proportion_interval([True] * 3 + [False], ["one"] * 4), (
        "clustered by what is asked for"
    )


@pytest.mark.slow
def test_from_pictures_to_tables(tiny_muse, tmp_path, monkeypatch, capsys):
    """Untrained weights: nothing is right, and everything is told."""
    folder = tiny_muse.save_pretrained(tmp_path / "tiny")
    words = ["toy_findings.py", str(folder), "--out", str(tmp_path / "out"), "--n", "10", "--points", "10"]
    monkeypatch.setattr(sys, "argv", [*words, "--parts", "base,cascade"])
    toy_findings.main()
    report = json.loads((tmp_path / "out" / "toy.json").read_text(encoding="utf-8"))
    for part in ("base", "cascade"):
        asked = [k for k in toy_findings.PARTS[part]["kinds"] if k != "decoder"]
        assert {*report["parts"][part]["kinds"]} == {*asked}
        assert "right, left" in report["parts"][part]["kinds"]["relations"]
    assert toy_findings.cascade_table(report["parts"]["cascade"]["kinds"]).count("\n") == 2 + 8, (
        "no decoder without a run"
    )
    assert f"## {toy_findings.TITLES['cascade']}" in (tmp_path / "out" / "toy.md").read_text(encoding="utf-8")
    for wrong, says in (("--parts x", "unknown parts x"), ("--docs", "give --run")):
        monkeypatch.setattr(sys, "argv", [*words, *wrong.split()])
        with pytest.raises(SystemExit, match=says):
            toy_findings.main()


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text(encoding="utf-8"))


def test_readme_and_page_tell_what_was_measured(stored):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.split("<!-- toy -->\n")[1].split("<!-- /toy -->")[0] == toy_findings.summary(stored)
    assert STORED.with_suffix(".md").read_text(encoding="utf-8") == toy_findings.told(stored)


def test_it_was_measured_of_the_shipped_toy(stored):
    """Other weights or settings of drawing need other figures."""
    from minimuse import checkpoint
    from minimuse.config import to_dict
    from minimuse.train_state import stamp
    from minimuse.utils import content_hash

    folder = checkpoint.find("toy")
    for name, part in stored["parts"].items():
        settings = part["settings"]
        assert settings["weights of checkpoint"] == stamp(folder / checkpoint.WEIGHTS)[1], f"{name}: other weights"
        assert settings["config"] == content_hash(to_dict(checkpoint.load("toy")[0])), f"{name}: drawn otherwise"
        assert (settings["n"], settings["seed"]) == (300 if name == "sweep" else 1000, 1000)


def test_what_the_prose_says(stored):
    """README tells the relations apart in numbers of pictures, and dials in percent."""
    text, found = (ROOT / "README.md").read_text(encoding="utf-8"), stored["parts"]["base"]["kinds"]["relations"]
    figures = {name: Estimate(*found[f"right, {name}"]) for name in ("left", "right", "front", "behind", "beside")}
    count = {name: round(f.value * f.n) for name, f in figures.items()}
    for pair in (("left", "right"), ("front", "behind"), ("beside",)):
        said = f"{sum(count[n] for n in pair)} of {sum(figures[n].n for n in pair)}"
        assert said in text, f"{pair}: {said}"
    sweep = stored["parts"]["sweep"]["kinds"]
    right = {name: f"{figures['right'][0]:.1%}" for name, figures in sweep.items()}
    for says in (
        f"without guidance {right['guidance 0']} of",
        f"with t = 1 throughout {right['guidance 1']}",
        f"draws {right['steps 16']} of these",
        f"random and Halton order, {right['order random']} and {right['order halton']}, lie within",
        f"{right['steps 2']} right in 2, {right['steps 4']} in 4, {right['steps 8']} in 8, {right['steps 32']} in 32",
        "diversity {:.1f} and {:.1f}, where confidence has {:.1f}".format(
            *(sweep[f"order {name}"]["diversity"][0] for name in ("entropy", "margin", "confidence"))
        ),
    ):
        assert says in text, says
    heat = [figures["right"][0] for name, figures in sweep.items() if name.startswith("temperature")]
    assert f"draw {min(heat):.1%} to {max(heat):.1%}" in text
    low, high = sweep["order confidence"]["right"][1:3]
    assert all(low < sweep[f"order {name}"]["right"][0] < high for name in ("random", "halton"))
    for name, constant in RISING.items():
        low, high = sweep[name][f"right, less {constant}"][1:3]
        assert low < 0 < high, f"{name}: README says that the intervals hold 0"
