"""benchmarks/speed.py at tiny size: entrants, FLOPs, tables. Projects that are not installed are left out."""

import functools
import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import peers
import speed
import timing
from peers import CPU, ENTRANTS, TEXT_WIDTH

TINY = speed.QUICK["tiny"]
ISSUE = speed.SHAPES["4 pictures of 256 tokens"]
THERE = [n for n in ENTRANTS if n != "muse-maskgit-pytorch" or importlib.util.find_spec("muse_maskgit_pytorch")]


def report(rounds=2):
    """A report of made-up seconds: ours takes 1 s in fp32 and 0.5 s in bf16, a peer 3 and 2 s."""
    rows = [
        {"entrant": name, "dtype": dtype, "default": default, "parameters": 10**6, "seconds": [s] * rounds}
        | {"over default": s, "over same dtype": s}
        for name, dtype, default, s in (
            ("minimuse", "fp32", True, 1.0),
            ("minimuse", "bf16", False, 0.5),
            ("x", "fp32", True, 3.0),
        )
    ]
    work = {"rows": rows, "absent": {"y": "No module named 'y'"}, "flops": 4e9}
    shape = {"shape": ISSUE._asdict(), "ceiling": {"fp32": 8e9, "bf16": 16e9}, "sampling": work, "training": work}
    held = {"minimuse": 2**20, "x": 2**22}
    return {
        "machine": {"device": "a CPU", "threads": 2, "torch": "2"},
        "rounds": rounds,
        "shapes": {"4 pictures": shape},
        "memory": {"sampling": held, "training": held},
        "start": {"import torch": 1.0},
    }


# --- who runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_draw_every_token(name, dtype):
    if name == "aMUSEd in diffusers":
        pytest.importorskip("diffusers")
    run, _ = ENTRANTS[name].sampling(TINY, dtype)
    if name == "muse-maskgit-pytorch" and dtype == torch.bfloat16:
        with pytest.raises(RuntimeError, match="BFloat16 without overflow"):
            run(1)
        return
    for steps in (1, 3):
        tokens = run(steps)
        assert tokens.shape == (2, 16), f"{name}: the shape's batch"
        assert ((tokens >= 0) & (tokens < 32)).all(), f"{name}: a token is left masked"


@pytest.mark.parametrize("name", THERE)
def test_all_train_their_weights(name):
    if name == "aMUSEd in diffusers":
        pytest.importorskip("diffusers")
    made = []
    before = torch.nn.Module.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "train", lambda self, mode=True: made.append(self) or before(self, mode))
        step, parameters = ENTRANTS[name].training(TINY, torch.float32)
        step()
        model = max(made, key=peers.count)
        weights = [p.detach().clone() for p in model.parameters()]
        step()
    assert peers.count(model) == parameters
    moved = [not a.equal(b) for a, b in zip(weights, model.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved), f"{name}: {sum(moved)} of {len(moved)} weights moved in a step"


def test_an_absent_peer_is_left_out_with_the_reason(monkeypatch):
    peers.maskgit_library.cache_clear()
    monkeypatch.setitem(sys.modules, "muse_maskgit_pytorch", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = speed.compete("sampling", TINY, 2, speed.prepare)
    assert {row["entrant"] for row in found["rows"]} == {"minimuse"}
    assert set(found["absent"]) == set(ENTRANTS) - {"minimuse"}
    assert "muse_maskgit_pytorch" in found["absent"]["muse-maskgit-pytorch"]
    assert "torchvision" not in sys.modules or hasattr(sys.modules["torchvision"], "__file__"), "a stub stayed"
    (default,) = [row for row in found["rows"] if row["default"]]
    assert default["dtype"] == "fp32", "so small a model stays in float32"
    assert default["over default"] == default["over same dtype"] == 1
    assert all(len(row["seconds"]) == 2 for row in found["rows"]), "one figure a round"


def test_a_peer_that_does_not_know_bf16_is_left_out_there_and_ours_is_not(monkeypatch):
    def sampling(shape, dtype):
        if dtype == torch.bfloat16:
            raise RuntimeError("no bf16")
        return peers.our_sampling(shape, dtype)

    entrants = {"minimuse": ENTRANTS["minimuse"], "x": peers.Entrant(sampling, None, peers.single)}
    monkeypatch.setattr(speed, "ENTRANTS", entrants)
    monkeypatch.setattr(speed, "precisions", lambda device: [torch.float32, torch.bfloat16])
    found = speed.compete("sampling", TINY, 1, speed.prepare)
    pairs = [(row["entrant"], row["dtype"]) for row in found["rows"]]
    assert pairs == [("minimuse", "fp32"), ("minimuse", "bf16"), ("x", "fp32")]
    assert found["absent"] == {"x, bf16": "no bf16"}
    entrants["minimuse"] = entrants["x"]
    with pytest.raises(RuntimeError, match="no bf16"):
        speed.compete("sampling", TINY, 1, speed.prepare)


def test_amused_has_our_number_of_parameters():
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        assert peers.count(peers.amused(ISSUE)) == pytest.approx(ISSUE.parameters(), rel=0.1)


# --- arithmetic and time ----------------------------------------------------------------------------------------------


def test_flops_of_a_decode_by_hand():
    b, n, d, v, l, t = ISSUE.batch, ISSUE.grid**2, ISSUE.width, ISSUE.codes, ISSUE.text, ISSUE.steps
    place = ISSUE.layers * (2 * 14 * d * d + 4 * n * d + 4 * l * d) + 2 * d * v  # 4 + 2 + 8 d^2 of matrices a layer
    once = sum(2 * m * d * (TEXT_WIDTH + 2 * ISSUE.layers * d) for m in (l, 1))  # both memories
    assert speed.sampling_flops(ISSUE) == b * (2 * n * t * place + once)
    assert 3.4e12 < speed.sampling_flops(ISSUE) < 3.6e12, "what the bars are made of"
    assert speed.sampling_flops(ISSUE._replace(batch=1)) == speed.sampling_flops(ISSUE) / b


def test_training_takes_three_times_the_forward_pass():
    b, n, d, v, l = ISSUE.batch, ISSUE.grid**2, ISSUE.width, ISSUE.codes, ISSUE.text
    layer = n * (2 * 14 * d * d + 4 * n * d + 4 * l * d) + 2 * l * 2 * d * d
    assert speed.training_flops(ISSUE) == b * (3 * (ISSUE.layers * layer + 2 * n * d * v) + 2 * 2 * l * TEXT_WIDTH * d)


def test_runs_alternate_and_ratios_are_paired(monkeypatch):
    order, clock = [], iter([0, 1, 10, 12, 20, 21, 30, 36, 40, 43, 50, 56])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    seconds = timing.alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1, 1, 3], "b": [2, 6, 6]}
    assert timing.ratio(seconds["b"], seconds["a"]) == 2, "median of 2, 6 and 2, not 6 / 1"


@pytest.mark.slow
def test_a_process_of_its_own_holds_more_with_a_larger_model():
    small, large = (
        timing.alone(str(ROOT / "benchmarks" / "speed.py"), "--alone", json.dumps(["sampling", "minimuse", *shape]))
        for shape in (TINY, TINY._replace(width=1024, layers=4))
    )
    assert 50e6 < small < large, "bytes"
    more = 4 * (TINY._replace(width=1024, layers=4).parameters() - TINY.parameters())
    assert large - small > 0.8 * more, "the weights are among them"


# --- tables -----------------------------------------------------------------------------------------------------


def test_tables_by_hand():
    text = speed.report_text(report())
    assert "| minimuse | 1.00 M | fp32, default | 1.0 s | 1.00 | 1.00 | 50% |" in text, "4 of 8 GFLOP/s"
    assert "| minimuse | 1.00 M | bf16 | 500.0 ms | 0.50 | 0.50 | 50% |" in text, "8 of 16"
    assert "| x | 1.00 M | fp32, default | 3.0 s | 3.00 | 3.00 |  |" in text
    assert "| x | 1.00 M | fp32, default | 3.0 s | 341 | 3.00 | 3.00 |  |" in text, "1,024 tokens in 3 s"
    assert "Left out: y, No module named 'y'." in text
    assert "| sampling | 1 MiB | 4 MiB |" in text


def test_summary_by_hand():
    text = speed.summary(report())
    assert "| minimuse, fp32, its default | 1.0 s | 1.00 | 50% | 1,024 | 1.00 | 1 | 1 |" in text, "MiB of the default"
    assert "| minimuse, bf16 | 500.0 ms | 0.50 | 50% | 2,048 | 0.50 |  |  |" in text
    assert "| x, fp32, its default | 3.0 s | 3.00 |  | 341 | 3.00 | 4 | 4 |" in text


def test_readmes_tables_are_filled_and_nothing_else(tmp_path):
    readme, begin, end = tmp_path / "README.md", "<!-- speed -->\n", "<!-- /speed -->\n"
    readme.write_text(f"# x\n\n{begin}old\n{end}\nend\n", encoding="utf-8")
    for text in ("one\n", "two\n"):
        timing.write_readme(text, "speed", readme)
    assert readme.read_text(encoding="utf-8") == f"# x\n\n{begin}two\n{end}\nend\n"
    for content in ("# x\n", f"# x\n\n{begin}"):
        readme.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="has no <!-- speed -->"):
            timing.write_readme("one\n", "speed", readme)


@pytest.mark.slow
def test_a_run_apart_is_called_there_and_its_errors_come_here():
    run = timing.Apart(speed.prepare, "sampling", "minimuse", TINY, torch.float32)
    assert run.about == TINY.parameters()
    assert run() is None
    run.close()
    assert run.process.exitcode == 0, "nobody asks any more: it ends"
    with pytest.raises(KeyError, match="nobody"):
        timing.Apart(speed.prepare, "sampling", "nobody", TINY, torch.float32)


@pytest.mark.slow
def test_a_dry_run_from_start_to_table(tmp_path, monkeypatch, capsys):
    """Each script of `starts` runs once in a process of its own, and our model alone in this one."""
    once = functools.cache(timing.alone)

    def alone(script, *args):
        if "--alone" not in args:
            return once(script, *args)
        work, name, *numbers = json.loads(args[-1])
        return speed.hold(work, name, peers.Shape(*numbers))

    monkeypatch.setattr(speed, "SHAPES", {})
    monkeypatch.setattr(speed, "ENTRANTS", {"minimuse": ENTRANTS["minimuse"]})
    monkeypatch.setattr(speed, "compete", functools.partial(speed.compete, prepare=speed.prepare))
    monkeypatch.setattr(speed, "alone", alone)
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick", "--out", str(tmp_path)])
    speed.main()
    found = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert set(found["shapes"]) == {"tiny"}
    assert all(v > 0 for v in found["start"].values())
    assert set(found["memory"]["training"]) >= {"minimuse"}
    assert "**Training, tiny**" in (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert "speed.json" in capsys.readouterr().out
