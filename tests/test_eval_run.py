"""eval_run.py: reports that continue, refuse and compare; sweeps; the command."""

import json

import pytest
from PIL import Image
from test_eval_tasks import Brightness, Oracle, run

from minimuse import cli
from minimuse.eval_metrics import Estimate
from minimuse.eval_prompts import prompt_set
from minimuse.eval_run import SWEEP, evaluate, table
from minimuse.eval_tasks import EvalModel, Evaluator


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(clip=Brightness())


def test_a_stopped_evaluation_gives_the_same_report(tmp_path, evaluator):
    options = {"tasks": ["seen", "tokenizers"], "n": 12, "batch": 6}
    run(Oracle(12), tmp_path / "whole", evaluator, **options)
    for stop in (0, 3, 6):
        out = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            run(Oracle(12, stop=stop), out, evaluator, **options)
        run(Oracle(12), out, evaluator, **options)
        for name in ("eval.json", "eval.md", "tasks/seen.json", "tasks/tokenizers.json", "tasks/tokenizers.png"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), f"{name}, stopped at {stop}"


def test_a_finished_task_is_not_drawn_again_and_others_join(tmp_path, evaluator):
    run(Oracle(10), tmp_path, evaluator, ["tokenizers"], n=10)
    run(Oracle(10, stop=0), tmp_path, evaluator, ["tokenizers"], n=10)
    run(Oracle(10), tmp_path, evaluator, ["edit"], n=10)
    assert list(json.loads((tmp_path / "eval.json").read_text())["tasks"]) == ["edit", "tokenizers"]


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path, evaluator):
    run(Oracle(10), tmp_path, evaluator, ["tokenizers"], n=10)
    before = (tmp_path / "eval.json").read_bytes()
    with pytest.raises(ValueError, match=r"another evaluation: n was 10 and is 12; seed was 1000 and is 7\. Give"):
        run(Oracle(12), tmp_path, evaluator, ["tokenizers"], n=12, seed=7)
    with pytest.raises(ValueError, match="checkpoint was None and is 'nano'"):
        evaluate(Oracle(10), tmp_path, {"checkpoint": "nano"}, n=10, evaluator=evaluator)
    assert (tmp_path / "eval.json").read_bytes() == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds files but no settings\.json"):
        run(Oracle(10), tmp_path, evaluator, ["tokenizers"], n=10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ["sene"]}, "task 'sene': unknown. Known tasks: seen"),
        ({"tasks": ["decoder"]}, "needs the decoder before fine-tuning; give --run"),
        ({"tasks": ["seen"], "sweep": True}, "a sweep has its own prompts"),
        ({"n": 4}, "at least 10 pictures"),
    ],
)
def test_impossible_tasks_are_refused_before_anything_is_written(tmp_path, evaluator, options, says):
    with pytest.raises(ValueError, match=says):
        run(Oracle(10), tmp_path / "new", evaluator, **{"tasks": []} | options)
    assert not (tmp_path / "new").exists()


def test_the_base_model_alone_has_no_edits(tmp_path, evaluator, tiny_muse):
    model = EvalModel(tiny_muse, base_only=True)
    with pytest.raises(ValueError, match="leave out --base-only"):
        run(model, tmp_path, evaluator, ["edit"])
    assert model.draw(["a red cube"], [0]).shape == (1, 3, 32, 32)
    assert model.real([prompt_set("seen", 1)[0].scene]).shape == (1, 3, 32, 32)


def test_the_page_marks_wrong_pictures_and_the_table_has_intervals(tmp_path, evaluator):
    run(Oracle(10), tmp_path, evaluator, ["seen"], n=10)
    assert Image.open(tmp_path / "tasks/seen.png").width > 500
    text = (tmp_path / "eval.md").read_text()
    assert "| one object, seen combinations | 10 | 100.0% (" in text
    assert "| seen | diversity, real |" in text
    line = table({"counts": {"right": Estimate(0.5, 0.25, 0.75, 8, ".1%")}}).splitlines()[2]
    assert line == "| two or three alike | 8 | 50.0% (25.0 to 75.0) |  |  |  |  |"


def test_a_sweep_is_one_call_and_two_plots(tmp_path, evaluator, monkeypatch):
    small = {line: dict(list(points.items())[:2]) for line, points in SWEEP.items() if line in ("guidance", "order")}
    monkeypatch.setattr("minimuse.eval_run.SWEEP", small)
    seen = []

    class Recorded(Oracle):
        base_only = True

        def draw(self, prompts, seeds, negatives=(), **sampling):
            seen.append(sampling)
            return super().draw(prompts, seeds)

    found = evaluate(Recorded(10), tmp_path, {}, n=10, sweep=True, evaluator=evaluator)["tasks"]
    assert list(found) == ["guidance 0", "guidance 1", "order confidence", "order random"]
    assert seen == [{"guidance": 0.0}, {"guidance": 1.0}, {"order": "confidence"}, {"order": "random"}]
    for name in ("sweep-score.png", "sweep-right.png"):
        assert Image.open(tmp_path / name).width > 2 * 900, "two plots of 900 x 600, next to each other"


@pytest.mark.slow
def test_the_command_measures_a_run(tmp_path, tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("minimuse.eval_tasks.SceneClip.from_pretrained", lambda: Brightness())
    words = ["eval", str(tiny_run), "--out", str(tmp_path / "out"), "--n", "10", "--device", "cpu", "--kinds"]
    assert cli.main([*words, "seen,decoder"]) == 0
    assert "| decoder | psnr, before |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/eval.json").read_text())
    assert report["settings"]["checkpoint"] == "tiny"
    assert set(report["settings"]) >= {"minimuse", "torch", "fingerprint", "weights of clip", "seed", "n", "device"}
    assert cli.main([*words, "seen", "--seed", "3"]) == 1
    assert "seed was 1000 and is 3" in capsys.readouterr().err
