"""benchmarks/gpu.py, its dry run on the CPU at tiny size."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
from flops import decode_flops, sampling_flops

from minimuse import Muse
from minimuse.cfg import guided, null_text
from minimuse.config import preset
from minimuse.muse import build
from minimuse.sampler import SamplingConfig, decode
from minimuse.text import Context
from minimuse.train_budget import count_flops, stage_budget
from minimuse.transformer import Transformer

CPU = torch.device("cpu")
HOW = {"batch": 2, "rounds": 2, "compiled": False, "training_batches": (4,), "size": 64}


@pytest.mark.slow
def test_compiled_it_draws_the_same(tiny_muse, tiny_text):
    parts = build(tiny_muse.config)
    parts.load_state_dict(tiny_muse.parts.state_dict())
    muse = Muse(tiny_muse.config, parts.eval(), tiny_text)
    gpu.compile_networks(muse, backend="eager")
    pair = [list(m.steps("a red cube", n=2, seed=0, guidance=(0.0, 2.0))) for m in (tiny_muse, muse)]
    for plain, compiled in zip(*pair, strict=True):
        assert plain.tokens.equal(compiled.tokens), f"{plain.stage}, step {plain.index}"
    assert muse.base._compiled_call_impl is not None, "the switch reaches the networks"
    assert set(muse.parts.state_dict()) == set(tiny_muse.parts.state_dict()), "and leaves their names"


@pytest.mark.slow
def test_a_dry_run_from_start_to_tables(tiny_muse):
    config = tiny_muse.config
    report = gpu.measure([config], CPU, **HOW)
    assert [(r["draw"], r["batch"]) for r in report["sampling"]] == [
        ("32 px", 1),
        ("64 px", 1),
        ("32 px", 2),
        ("64 px", 2),
    ]
    flops = sampling_flops(config)
    low, whole = (r["by flops"] * report["ceiling"] for r in report["sampling"][2:])
    assert (low, whole) == pytest.approx((2 * flops.base, 2 * sum(flops))), "FLOPs of two pictures"
    read = report["sampling"][0]["by bytes"] * report["bandwidth"]
    weights = sum(p.numel() for p in tiny_muse.base.parameters())
    assert read == pytest.approx(2 * weights * config.base_sampling.steps), (
        "bf16 weights, once a step, whatever the batch"
    )
    assert [(r["stage"], r["batch"], len(r["seconds"])) for r in report["training"]] == [
        ("base", 4, 1),
        ("superres", 4, 1),
    ]
    budget = stage_budget(config, "base")
    assert report["training"][0]["by flops"] * report["ceiling"] == pytest.approx(budget.step_flops / budget.batch * 4)
    assert json.loads(json.dumps(report)) == report, "plain values"
    text = gpu.told(report)
    assert "| tiny, 64 px, plain | 2 |" in text
    assert "| tiny, superres | 4 |" in text


def test_random_weights_are_made_in_bf16_and_draw(tiny_muse):
    muse = gpu.random_muse(tiny_muse.config, CPU, torch.bfloat16)
    assert {p.dtype for p in muse.parts.parameters()} == {torch.bfloat16}
    drawn = []
    muse.picture = lambda step: drawn.append(step)
    for run in gpu.draws(muse, 2).values():
        run()
    assert [(s.stage, len(s.tokens)) for s in drawn] == [("base", 2), ("superres", 2)]
    assert not any(s.masked.any() for s in drawn), "each picture is finished"


def test_smaller_batches_where_memory_ends(tiny_muse, monkeypatch):
    tried = []

    def steps(config, stage, device, batch, rounds, compiled):
        tried.append(batch)
        if batch > 8:
            raise torch.OutOfMemoryError("full")
        return [1.0]

    monkeypatch.setattr(gpu, "_steps", steps)
    row = gpu.training(tiny_muse.config, "base", CPU, (32, 16, 8, 4), 1, False, 1e9)
    assert (tried, row["batch"]) == ([32, 16, 8], 8)
    with pytest.raises(SystemExit, match="not even a batch of 16 fits"):
        gpu.training(tiny_muse.config, "base", CPU, (32, 16), 1, False, 1e9)


def test_the_best_is_whichever_bound_is_longer():
    row = {"preset": "p", "draw": "8 px", "batch": 1, "seconds": [4.0, 2.0, 1.0], "compiled": True, "graphs": True}
    cells = gpu._drawn(row | {"by flops": 0.5, "by bytes": 1.0, "memory": 0})
    assert cells[:3] == ["p, 8 px, CUDA graphs", "1", "2.000"]
    assert cells[5] == "50%", "1 s of a median of 2"


def test_sampling_costs_what_a_real_decode_costs():
    config = preset("nano").base
    model, how = Transformer(config).eval(), SamplingConfig(steps=5, guidance=(0.0, 3.0))
    text = Context(torch.randn(1, 64, config.text_width), torch.ones(1, 64, dtype=torch.bool))

    @torch.no_grad()
    def real():
        logits_fn = guided(model, model.memory(text), model.memory(null_text(text)), how.guidance)
        start = torch.full((1, config.tokens), model.mask_id)
        for _ in decode(logits_fn, start, mask_id=model.mask_id, steps=5, generator=torch.Generator().manual_seed(0)):
            pass

    counted = sampling_flops(replace(preset("nano"), base_sampling=how))
    alone = sampling_flops(replace(preset("nano"), base_sampling=replace(how, steps=1, guidance=(0.0, 0.0))))
    once = sum(decode_flops(model, how, 64))
    assert once == count_flops(real)
    assert counted.base == 9 * alone.base  # t = 0 at the first of five steps: one branch there, two in the others
    assert counted[2:] == alone[2:]
