"""benchmarks/toy_findings.py: tables of invented metrics, and the stored tables show what was measured."""

import hashlib
import json
import sys

import pytest
from conftest import ROOT

from minimuse import checkpoint
from minimuse.eval_metrics import proportion_interval
from minimuse.eval_prompts import prompt_set

sys.path.insert(0, str(ROOT / "benchmarks"))
import toy_findings
from toy_findings import RISING

STORED = ROOT / "benchmarks" / "toy.json"


def percent(value):
    return [value, value - 0.05, value + 0.05, 1000, ".1%"]


def number(value):
    return [value, value - 1, value + 1, 1000, ".4g"]


def tasks():
    """Metrics as in eval.json, each with another value."""
    base = {task: {"right": percent(0.1 * (i + 1))} for i, task in enumerate(toy_findings.PARTS["base"]["tasks"][:5])}
    base["negative"] = {"right": percent(0.9), "with": percent(0.07), "without": [0.6, 0.5, 0.7, 750, ".1%"]}
    edits = {
        "right": percent(0.4),
        "colour, 10": percent(0.6),
        "colour, 30": percent(0.95),
        "rest": percent(0.8),
    }
    inpaint = {"right": percent(0.3), "right, of 1": percent(0.31), "right, of 2": percent(0.29)}
    gains = {f"right, gain over {k}": [0.02, -0.01, 0.05, 1000, "+.1%"] for k in ("bicubic", "no text")}
    rights = {f"right, {k}": percent(0.7) for k in ("bicubic", "no text")}
    decoder = {"right": percent(0.9), "right, before": percent(0.8), "psnr, gain": number(0.5)}
    cascade = {
        "seen": {"right": percent(0.99)},
        "relations": {"right": percent(0.88)},
        "inpaint": inpaint,
        "outpaint": {"right": percent(0.5)},
        "edit": edits,
        "superres": {"right": percent(0.75)} | gains | rights,
        "decoder": decoder,
    }
    sweep = {name: {"right": percent(0.6), "frechet": number(0.25)} for pair in RISING.items() for name in pair}
    for name, constant in RISING.items():
        sweep[name] = sweep[name] | {f"right, less {constant}": [0.01, -0.02, 0.04, 300, "+.1%"]}
    return {"base": base, "cascade": cascade, "sweep": sweep}


def test_tables_by_hand():
    parts = {name: {"tasks": found} for name, found in tasks().items()}
    text = toy_findings.summary({"parts": parts})
    for line in (
        "| one thing, seen combinations | 10.0% (5.0 to 15.0) | 97% |",
        "| nevertheless (without it: 60.0%; 750 pictures) | 7.0% (2.0 to 12.0) | at most 10% |",
        "| inpainting: a thing replaced | 30.0% (25.0 to 35.0) | of one thing 31.0%, of two 29.0% |",
        "| the base model's pictures of them, enlarged | 70.0% (65.0 to 75.0) | super-resolution gains +2.0 (-1.0 to ",
        "material are then still right in 80.0%; after 10 the colour is there in 60.0%, after 30 in 95.0% |",
        "80.0% before; it gains 0.50 (-0.50 to 1.50) dB |",
        "| 0 to 2, or 1 throughout | 60.0% (55.0 to 65.0) | 60.0% (55.0 to 65.0) | +1.0% (-2.0 to +4.0) | 0.250 |",
        "| 0 to 16, or 8 throughout |",
    ):
        assert line.removeprefix("| nevertheless") in text, f"{line}\n{text}"


def columns(groups, **values):
    return {"group": groups, **values}


def test_relations_are_told_apart():
    groups = [f"red cube {name} gray sphere" for name in ("left", "right", "beside") for _ in range(4)]
    right = [i < count for count in (3, 1, 0) for i in range(4)]
    found = toy_findings.derived("relations", columns(groups, right=right))
    assert {name: round(4 * m.value) for name, m in found.items()} == {
        "right, left": 3,
        "right, right": 1,
        "right, beside": 0,
    }
    assert found["right, left"] == proportion_interval([True] * 3 + [False], ["one"] * 4), "clustered by content"


def test_words_that_unguided_pictures_seldom_show_do_not_count():
    groups = [f"red cube, not {word}" for word in ["small", "metal"] * 4]
    metal = ["metal" in group for group in groups]
    shown = {"word shown, unguided": metal, "word shown, without": metal, "word shown": [False] * 8}
    found = toy_findings.derived("negative", columns(groups, **shown))
    assert found["without"] == found["metal, without"]
    assert found["with"].n == 4
    assert found["small, with"].value == 0


def test_parts_of_edits_and_of_inpainted_pictures():
    asked = prompt_set("edit", 4)
    fields = ("color", "shape", "size", "material")
    seen = {f: [getattr(ask.scene.things[0], f) for ask in asked] for f in fields}
    values = {f"{f}{mark}": seen[f] for f in fields for mark in (", 10", ", 30", ", 100", "")}
    values["color, 10"] = [ask.before.things[0].color for ask in asked]
    values["size"] = ["", *seen["size"][1:]]
    found = toy_findings.derived("edit", columns([ask.group for ask in asked], **values))
    assert (found["colour, 10"].value, found["colour"].value) == (0, 1), "not yet changed; changed"
    assert (found["rest, 10"].value, found["rest"].value) == (1, 0.75), "one thing is lost in the end"
    groups = ["a red cube", "a red cube", "a red cube and a blue sphere", "a gray cube and a red sphere"]
    found = toy_findings.derived("inpaint", columns(groups, right=[True, True, True, False]))
    assert (found["right, of 1"].value, found["right, of 2"].value) == (1, 0.5)


@pytest.mark.slow
def test_from_pictures_to_tables(tiny_muse, tmp_path, monkeypatch, capsys):
    """Untrained weights: nothing is right, and everything is shown."""
    folder = tiny_muse.save_pretrained(tmp_path / "tiny")
    words = ["toy_findings.py", str(folder), "--out", str(tmp_path / "out"), "--n", "10", "--points", "10"]
    monkeypatch.setattr(sys, "argv", [*words, "--parts", "base,cascade"])
    toy_findings.main()
    report = json.loads((tmp_path / "out" / "toy.json").read_text(encoding="utf-8"))
    for part in ("base", "cascade"):
        asked = [k for k in toy_findings.PARTS[part]["tasks"] if k != "decoder"]
        assert {*report["parts"][part]["tasks"]} == {*asked}
        assert "right, left" in report["parts"][part]["tasks"]["relations"]
    assert toy_findings.cascade_table(report["parts"]["cascade"]["tasks"]).count("\n") == 2 + 9, (
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


def test_the_tables_show_what_was_measured(stored):
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert readme.split("<!-- toy -->\n")[1].split("<!-- /toy -->")[0] == toy_findings.summary(stored)
    assert STORED.with_suffix(".md").read_text(encoding="utf-8") == toy_findings.page(stored)


def test_the_shipped_weights_were_measured(stored):
    """Other weights need other metrics."""
    base = toy_findings.base_weights(checkpoint.find("toy"))
    for name, part in stored["parts"].items():
        assert part["settings"]["weights of base"] == base, f"{name}: another base model"
        weights = {"detector": "detector", "clip": "clip"} | ({"checkpoint": "toy"} if name == "cascade" else {})
        for label, folder in weights.items():
            content = (checkpoint.SHIPPED / folder / checkpoint.WEIGHTS).read_bytes()
            found = hashlib.sha256(content).hexdigest()
            assert part["settings"][f"weights of {label}"] == found, f"{name}: other weights of the {label}"
        n = {"base": 500, "cascade": 200, "sweep": 150}[name]
        assert (part["settings"]["n"], part["settings"]["seed"]) == (n, 1000)


def test_no_rising_guidance_differs_from_constant_guidance(stored):
    """As benchmarks/README.md says: the intervals of all four differences contain 0."""
    for name, constant in RISING.items():
        low, high = stored["parts"]["sweep"]["tasks"][name][f"right, less {constant}"][1:3]
        assert low < 0 < high, name
