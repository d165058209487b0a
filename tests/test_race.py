"""benchmarks/race.py: the race from training to tables, tiny."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

from minimuse.config import preset
from minimuse.text import Context
from minimuse.transformer import Transformer

sys.path.insert(0, str(ROOT / "benchmarks"))
import race


def start(out, muse, **changes):
    how = {"steps": 2, "scenes": 60, "n": 4, "real": 6, "tuning": 2, "batch": 4, "nano": muse}
    return race.Race(out, **(how | changes))


@pytest.mark.slow
def test_a_race_from_training_to_tables(tiny_muse, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "STEPS", (1, 4))
    monkeypatch.setattr(race, "TUNE", {model: settings[:1] for model, settings in race.TUNE.items()})
    found = race.run(start(tmp_path, tiny_muse), list(race.PARTS))
    assert set(found["parts"]) == set(race.PARTS)
    parts = found["parts"]
    assert {"masked, 4 steps", "dit, 1 steps", "ar, 64 steps", "masked, raster, 64 steps"} <= set(
        parts["race"]["found"]["figures"]
    )
    for part in parts.values():
        for row in part["found"].get("figures", {}).values():
            assert all(f["low"] <= f["value"] <= f["high"] for f in row.values()), "an interval holds its figure"
    bound, exact = parts["likelihood"]["found"].values()
    assert math.log(16) * 0.5 < exact["value"] < math.log(16) * 1.5, "two steps of training: about log V"
    assert bound["value"] == pytest.approx(math.log(16), rel=0.5)
    assert Image.open(tmp_path / "race.png").width > 1500
    told = (tmp_path / "race.md").read_text(encoding="utf-8")
    assert all(f"## {title}" in told for title in race.TITLES.values())

    monkeypatch.setattr(race.LowRes, "generate", lambda *a, **k: pytest.fail("drawn again"))
    again = race.run(start(tmp_path, tiny_muse), ["likelihood", "race"])  # from what was kept, in another order
    assert again["parts"] == parts == json.loads((tmp_path / "race.json").read_text(encoding="utf-8"))["parts"]
    with pytest.raises(SystemExit, match="holds a race of"):
        race.run(start(tmp_path, tiny_muse, n=5), ["race"])


def test_all_get_the_same_training_compute(tiny_muse, tmp_path):
    it = start(tmp_path, tiny_muse, steps=1000)
    total = 1000 * it.flops("masked")
    for name in ("masked", "ar", "dit", "masked, identity", "dit, open gates"):
        assert it.train_steps(name) * it.flops(name) == pytest.approx(total, rel=0.01), name
    masked, ar, dit = (race.flops(make, make.configure(preset("nano"))) for make in race.MAKES)
    assert ar == masked
    assert 0.6 < dit / masked < 1, "the DiT is narrower, so it takes more steps"


def test_residual_blocks_may_start_as_the_identity():
    model = Transformer(preset("nano").base)
    assert race.zero_init_residual(model) is model, "it returns the model"
    text = Context(torch.randn(2, 5, 384), torch.ones(2, 5, dtype=torch.bool))
    memory = model.memory(text)
    x = torch.randn(2, 64, 128)
    for layer, k, v in zip(model.layers, memory.keys, memory.values, strict=True):
        assert layer(x, k, v, memory.attend).equal(x), "a layer changes its input"
    model(torch.zeros(2, 64, dtype=torch.long), memory).sum().backward()
    assert model.layers[0].mlp[2].weight.grad.abs().sum() > 0, "the zeros can be left"


def test_the_gates_of_a_dit_may_start_open(tiny_muse):
    model = race.Diffusion.network(tiny_muse.config)
    width = model.config.width
    memory = model.memory(Context(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)))
    x, c = torch.randn(2, 64, width), torch.randn(2, 1, width)
    for opened in (False, True):
        change = model.layers[0](x, c, memory.keys[0], memory.values[0], memory.attend) - x
        assert (change.std() > 0.05) == opened, "with open gates a block does something from the start"
        race.open_gates(model)


def test_one_stage_is_as_large_as_two():
    from conftest import parameter_counts

    sizes = parameter_counts(preset("nano"))
    one = sum(p.numel() for p in race.LowRes.network(race.one_stage(preset("nano"))).parameters())
    assert one == pytest.approx(sizes["base"] + sizes["superres"], rel=0.1)
