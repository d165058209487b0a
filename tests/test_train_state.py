"""train_state.py: damaged states are skipped and named, other settings are refused, and no earlier state is lost.

A folder without state.json and a half-written .new folder do not count.
A state or run.json with other settings or data is refused, and the difference is named.
A full disk or a folder that is not writable: OSError names the last complete state.
Damaged caches: test_data_cache.py. Damaged checkpoints: test_checkpoint.py.
"""

import errno
import json
import logging
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from minimuse import checkpoint, cli
from minimuse import train_state as runs
from minimuse.config import StageConfig, to_dict
from minimuse.train_engine import Engine, Progress, Stage
from minimuse.train_state import RUN, STATE, average, differences, states

CFG = StageConfig(steps=8, batch=2, learning_rate=0.1, warmup=2, weight_decay=0.1, ema=0.5, save_every=2)


def work(folder: Path, until: int = 8, keep: int = 2, seed: int = 0, stage: str = "base", **changes) -> Stage:
    """A stage as small as can be, with dropout, up to a step; from its newest state if there is one."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5), torch.nn.Linear(2, 3))
    job = Stage(Engine(seed=seed, folder=folder, keep=keep), stage, replace(CFG, **changes), {"model": net})
    for step in job.steps():
        for at, _ in job.micro_batches(9, step):
            job.backward((job.modules["model"](torch.randn(4, 3)) - at[0]).square().mean())
        job.finish(step)
        if step + 1 == until:
            break
    return job


def weights(job: Stage) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in job.state().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def rewrite(state: Path, change) -> None:
    """state.json changed by `change`, whole otherwise."""
    values = json.loads((state / STATE).read_text())
    change(values)
    (state / STATE).write_text(json.dumps(values))


def resave(state: Path, change) -> None:
    """The state with other tensors."""
    found = runs.read_tensors(state)
    change(found)
    about = json.loads((state / STATE).read_text())["about"]
    runs.save_state(state.parent, int(state.name[5:]), found, about, keep=0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def weights_file(state: Path) -> Path:
    (path,) = state.glob("*.distcp")
    return path


def flip(path: Path) -> None:
    """One bit of the byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGED = {
    "weights with a flipped bit": lambda s: flip(weights_file(s)),
    "weights cut short": lambda s: cut(weights_file(s)),
    "weights empty": lambda s: weights_file(s).write_bytes(b""),
    "weights missing": lambda s: weights_file(s).unlink(),
    "metadata with a flipped bit": lambda s: flip(s / ".metadata"),
    "metadata missing": lambda s: (s / ".metadata").unlink(),
    "state.json with another step": lambda s: rewrite(s, lambda v: v.update(step=3)),
    "state.json cut short": lambda s: cut(s / STATE),
    "state.json binary": lambda s: (s / STATE).write_bytes(b"\xff\xfe\0"),
    "state.json a list": lambda s: (s / STATE).write_text("[1]"),
    "state.json without about": lambda s: rewrite(s, lambda v: v.pop("about")),
}


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """A stage begins with a garbage collection, which takes longer than all of a stage so small."""
    monkeypatch.setattr("gc.collect", lambda *args: 0)


@pytest.fixture
def whole(tmp_path):
    """Weights, optimizer and average of the stage, never stopped."""
    return weights(work(tmp_path / "whole"))


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_state_is_skipped_and_the_one_before_it_is_used(tmp_path, whole, caplog, kind):
    work(tmp_path, until=4)
    newest = tmp_path / "base/step-00000004"
    DAMAGED[kind](newest)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="step-00000004 is damaged or incomplete"):
        runs.read_tensors(newest)
    assert contents(tmp_path) == before, "nothing is deleted"
    caplog.clear()
    job = work(tmp_path)
    assert job.first == 2, "the state before it"
    assert [r.name for r in caplog.records].count("minimuse") == 1, "one line"
    assert "step-00000004 is damaged or incomplete" in caplog.text, "which names the state"
    assert same(weights(job), whole), "the same weights in the end"


def test_any_flipped_bit_of_state_json(tmp_path):
    """The state before it is used, unless the values are still the same, as after a flip in white space."""
    work(tmp_path, until=4)
    path = tmp_path / "base/step-00000004" / STATE
    whole, about = path.read_bytes(), json.loads(path.read_bytes())["about"]
    steps = set()
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        same_values = runs.load_state(tmp_path / "base", dict, about) == 4
        steps.add(same_values)
        assert not same_values or json.loads(changed) == json.loads(whole), f"byte {at}: {bytes(changed)}"
    assert False in steps


def test_a_damaged_newer_state_does_not_push_out_a_whole_one(tmp_path):
    work(tmp_path, until=4)
    flip(weights_file(tmp_path / "base/step-00000004"))
    work(tmp_path, until=3, keep=1, save_every=1)
    assert work(tmp_path, until=3).first == 3, "step 3 stays, though step 4 has the higher number"


def test_what_does_not_count(tmp_path, whole):
    """No state.json, the half-written folder of a dead run, and a file of the user's."""
    work(tmp_path, until=4)
    (tmp_path / "base/step-00000004" / STATE).unlink()
    dead = tmp_path / "base/step-00000006.new"
    dead.mkdir()
    (dead / "__0_0.distcp").write_bytes(b"half of it")
    (tmp_path / "base/step-00000002/notes.txt").write_text("mine")
    job = work(tmp_path)
    assert job.first == 2, "the newest complete state"
    assert same(weights(job), whole), "the same weights in the end"
    names = sorted(p.name for p in (tmp_path / "base").iterdir())
    assert names == ["step-00000006", "step-00000008"], f"{names}"


def test_the_only_state_damaged(tmp_path, whole):
    """The stage starts again, to the same weights; what reads only weights is refused."""
    work(tmp_path, until=2)
    cut(weights_file(tmp_path / "base/step-00000002"))
    with pytest.raises(ValueError, match="base holds no whole training state"):
        runs.load_weights(tmp_path / "base", torch.nn.Linear(2, 2))
    job = work(tmp_path)
    assert job.first == 0
    assert same(weights(job), whole)
    with pytest.raises(ValueError, match="superres holds no whole training state"):
        runs.load_weights(tmp_path / "superres", torch.nn.Linear(2, 2))


REFUSED = {
    "lacking": (lambda f: f.pop("ema.0"), r"ema\.0"),
    "shape": (lambda f: f.update({"ema.0": torch.zeros(3, 2)}), r"ema\.0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_state_of_another_run_is_refused(tmp_path, kind):
    """It is whole, so an earlier one is not taken in its place: somebody put it there."""
    work(tmp_path, until=4)
    change, reason = REFUSED[kind]
    resave(tmp_path / "base/step-00000004", change)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)step-00000004.*{reason}"):
        work(tmp_path)
    assert contents(tmp_path) == before, "what was refused must change nothing on disk"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"learning_rate": 0.2}, r"config\.learning_rate was 0\.1 and is 0\.2"),
        ({"ema": 0.0, "batch": 4}, r"config\.batch was 2 and is 4; config\.ema was 0\.5 and is 0"),
    ],
)
def test_a_run_of_another_kind_is_refused(tmp_path, changes, told):
    work(tmp_path, until=4)
    with pytest.raises(ValueError, match=f"belongs to another run: {told}"):
        work(tmp_path, **changes)


def test_how_often_to_save_may_change(tmp_path, whole):
    work(tmp_path, until=4)
    assert same(weights(work(tmp_path, save_every=3, eval_every=1)), whole), "it does not touch the weights"
    assert [s.name for s in states(tmp_path / "base")] == ["step-00000006", "step-00000008"], "the newest two"


def test_differences():
    old = {"a": 1, "b": {"c": [1, 2], "d": None}}
    assert differences(old, json.loads(json.dumps(old))) == [], "the same"
    new = {"a": 1, "b": {"c": [1, 3]}, "e": 0}
    assert differences(old, new) == ["b.c was [1, 2] and is [1, 3]", "e was None and is 0"], "by path; null is nothing"
    assert differences({"a": {"b": 1}}, {"a": 3}) == ["a was {'b': 1} and is 3"], "another kind of value"


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("earlier", [0, 4])
@pytest.mark.parametrize("target", [(runs.dcp.FileSystemWriter, "write_data"), (Path, "write_text")])
def test_a_full_disk(tmp_path, whole, monkeypatch, earlier, target):
    if earlier:
        work(tmp_path, until=earlier)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = contents(tmp_path)
    kept = "the last complete state is .*step-00000004" if earlier else "there is no earlier state"
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(OSError, match=f"could not save step .*No space left.*{kept}.*resume") as e:
            work(tmp_path)
    assert e.value.errno == errno.ENOSPC, f"{e.value!r}"
    assert contents(tmp_path) == before, "the earlier states are complete, and the half-written one is removed"
    assert same(weights(work(tmp_path)), whole), "with room again it resumes"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="the limit on the size of a file is of POSIX")
def test_a_disk_that_is_truly_full(tmp_path):
    """torch meets a file that may not grow, so we know the kind of its error."""
    import resource

    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not save step 2"):
            work(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not states(tmp_path / "base"), "nothing half-written counts"


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    work(tmp_path, until=4)
    before = contents(tmp_path)

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"could not save step 6 to .*Permission denied.*step-00000004"):
        work(tmp_path)
    assert contents(tmp_path) == before


def test_pitfall_23_a_state_that_is_open_is_neither_replaced_nor_changed(tmp_path, whole, monkeypatch):
    """Windows refuses to write, rename or delete a file that somebody holds open; a run goes on all the same."""
    work(tmp_path, until=4)
    held = {str(p) for p in tmp_path.rglob("step-*/*")}
    replace_, unlink, rmtree, rename = os.replace, os.unlink, shutil.rmtree, os.rename

    def refuse(path):
        if any(name.startswith(str(path)) for name in held):
            raise PermissionError(errno.EACCES, "open", str(path))

    monkeypatch.setattr(os, "replace", lambda a, b: (refuse(a), refuse(b), replace_(a, b))[-1])
    monkeypatch.setattr(os, "rename", lambda a, b: (refuse(a), rename(a, b))[-1])
    monkeypatch.setattr(os, "unlink", lambda path, **kw: (refuse(path), unlink(path, **kw))[-1])
    monkeypatch.setattr(shutil, "rmtree", lambda path, *a, **kw: (refuse(path), rmtree(path, *a, **kw))[-1])
    before = contents(tmp_path)
    assert same(weights(work(tmp_path)), whole), "the same weights"
    after = contents(tmp_path)
    assert before.items() <= after.items(), "what is open stays as it was"
    assert "base/step-00000008/state.json" in after, "and the new states are there"


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, tiny_muse):
    """run(*words) -> (exit code, what stderr says) of `minimuse train` in tmp_path, up to where it would train."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(to_dict(tiny_muse.config)))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def begun(config, data, engine, start):
        raise ValueError("it has begun to train")

    monkeypatch.setattr("minimuse.train.train_muse", begun)

    def run(*words):
        code = cli.main(["train", *words, "--out", "run", "--device", "cpu"])
        return code, capsys.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(answer, *words):
    code, err = answer
    assert code == 2, f"{code} {err}"
    assert err.startswith("minimuse: "), f"{err}"
    assert err.count("\n") == 1, f"one line: {err}"
    for word in words:
        assert re.search(word, err), f"{word!r} is not in {err!r}"


def begun(answer):
    assert answer == (2, "minimuse: it has begun to train\n"), f"{answer}"


def edit_run(change):
    values = json.loads(Path("run", RUN).read_text())
    change(values)
    Path("run", RUN).write_text(json.dumps(values))


BROKEN_RUN = {
    "empty": (lambda path: path.write_bytes(b""), r"run\.json is broken JSON: "),
    "cut short": (cut, r"run\.json is broken JSON: "),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\0"), r"run\.json is broken JSON: "),
    "a list": (
        lambda path: path.write_text("[1]"),
        r"run\.json lacks config, seed or data; restore it, or start a new run",
    ),
    "a number": (lambda path: path.write_text("3"), r"run\.json lacks config, seed or data"),
    "no seed": (lambda _: edit_run(lambda v: v.pop("seed")), r"run\.json lacks config, seed or data"),
    "data of an older version": (lambda _: edit_run(lambda v: v.update(data="scenes")), r"lacks config, seed or data"),
    "odd stages": (
        lambda _: edit_run(lambda v: v["config"].update(stages=[])),
        "holds no whole configuration",
    ),
    "no width": (
        lambda _: edit_run(lambda v: v["config"]["base"].pop("width")),
        "TransformerConfig.* missing .*'width'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_RUN)
def test_a_broken_run_json_is_refused(run, tmp_path, kind):
    begun(run("tiny.json"))
    damage, reason = BROKEN_RUN[kind]
    damage(Path("run", RUN))
    before = contents(tmp_path)
    refused(run("--resume"), reason)
    assert contents(tmp_path) == before, "nothing is written"


def test_a_run_goes_on_as_it_began(run, tmp_path):
    begun(run("tiny.json", "--seed", "3", "--set", "stages.base.steps=7"))
    values = json.loads(Path("run", RUN).read_text())
    assert (values["seed"], values["data"]["source"]) == (3, "scenes")
    assert values["config"]["stages"]["base"]["steps"] == 7
    begun(run("--resume"))
    refused(
        run("--resume", "--set", "base.dropout=0.5"),
        r"has other settings or data: config\.base\.dropout was 0\.0 and is 0\.5",
    )
    refused(run("tiny.json", "--resume"), r"config\.stages\.base\.steps was 7 and is 2")
    begun(run("tiny.json", "--resume", "--set", "stages.base.steps=7"))
    begun(run("--resume", "--seed", "3"))
    refused(run("--resume", "--seed", "4"), "seed was 3 and is 4")
    refused(run("--resume", "--model", "ar"), "model was None and is 'ar'")
    refused(run("tiny.json"), "already holds a run; --resume continues it")
    edit_run(lambda v: v["config"].update(scenes=9))
    refused(run("--resume"), "scenes gives other images or captions than scenes did")
    Path("run", RUN).unlink()
    refused(run("--resume"), r"run holds no run\.json; give a folder that `minimuse train --out` made")
    assert not [p for p in Path("run").iterdir() if p.name != RUN], "nothing else is written"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"mine\.json is broken JSON"),
        ("[1]", "holds no whole configuration"),
        ('{"config": 3}', "MuseConfig is 3"),
        ('{"name": "mine"}', "MuseConfig.* missing .*'base'"),
    ],
)
def test_a_preset_file_that_is_refused(run, text, match):
    Path("mine.json").write_text(text)
    refused(run("mine.json"), match)
    refused(run("none.json"), "unknown preset 'none.json'; known: nano")
    refused(run("tiny.json", "--set", "base.widht=64"), r"no field 'base\.widht'")
    assert not Path("run").exists(), "nothing is written"


def test_a_run_begins_from_the_files_of_another(run, tiny_muse):
    """run.json of a run, config.json of a checkpoint, and a configuration as it is say the same."""
    begun(run("tiny.json"))
    values = Path("run", RUN).read_text()
    tiny_muse.save_pretrained("made")
    for source in (Path("run", RUN), Path("made", checkpoint.CONFIG)):
        Path("other.json").write_text(source.read_text())
        shutil.rmtree("run")
        begun(run("other.json"))
        assert Path("run", RUN).read_text() == values, f"{source}"


def test_where_a_run_may_not_begin(run, tmp_path):
    refused(run(), "give a preset .*nano.*, a JSON file, --from, or --resume")
    refused(run("tiny.json", "--data", "no/where"), "no/where")
    assert not Path("run").exists(), "a mistyped --data is no run"
    Path("run").write_text("mine")
    refused(run("tiny.json"), "run is a file; give a folder")
    refused(run("tiny.json", "--resume"), r"run holds no run\.json; give a folder")
    assert Path("run").read_text() == "mine"
    Path("run").unlink()
    begun(run("tiny.json"))
    Path("run", checkpoint.CARD).write_text("# tiny")
    before = contents(tmp_path)
    refused(run("--resume"), "the run in run is finished; continue it with --more 2000, or start one in another")
    Path("run", RUN).rename("elsewhere.json")
    refused(run("tiny.json"), r"already holds README\.md")
    assert contents(tmp_path / "run").items() <= {k.removeprefix("run/"): v for k, v in before.items()}.items()


def test_messages_are_not_glued_to_the_progress_bar(run, monkeypatch):
    def stages(config, data, engine, start):
        yield Progress("base", 1, 9, {"loss": 1.0}, None)
        logging.getLogger("minimuse").warning("a picture is broken")
        yield Progress("base", 2, 9, {"loss": 1.0}, None)
        raise OSError("the disk is full")

    monkeypatch.setattr("minimuse.train.train_muse", stages)
    code, err = run("tiny.json")
    assert code == 2
    assert "2/9" in err, "the bar shows the last step"
    lines = re.split(r"[\r\n]+", err)
    assert "minimuse: a picture is broken" in lines, err
    assert "minimuse: the disk is full" in lines, err


@pytest.fixture
def data(tmp_path):
    """A folder of three captioned pictures, named as users name it: by a relative path."""
    folder = tmp_path / "some data"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red cube")
    return Path("some data")


def test_changed_data_are_refused_by_name(run, tmp_path, data):
    """A state trained on other images, or a cache of them, must not go on unnoticed."""
    begun(run("tiny.json", "--data", str(data)))
    begun(run("--resume"))
    (data / "1.txt").write_text("a blue cube")
    shutil.copy(data / "0.png", data / "2.png")
    before = contents(tmp_path)
    answer = run("--resume")
    refused(answer, r"other settings or data: 1\.png has changed; 2\.png has changed\. Restore them")
    assert not re.search("[0-9a-f]{16}", answer[1]), f"names say more than hashes: {answer[1]}"
    (data / "0.png").rename(data / "4.png")
    (data / "0.txt").rename(data / "4.txt")
    refused(run("--resume"), r"0\.png is missing; 4\.png is new; 1\.png has changed; 2\.png has changed\.")
    for name in ("3", "5", "6"):
        shutil.copy(data / "4.png", data / f"{name}.png")
    refused(run("--resume"), r"0\.png is missing; 3\.png is new; .* and 3 more\.")
    assert contents(tmp_path / "run").items() <= {k.removeprefix("run/"): v for k, v in before.items()}.items()


def test_a_run_resumes_from_another_folder(run, tmp_path, data, monkeypatch):
    lm = json.loads(Path("tiny.json").read_text())["text_encoder"]
    Path("lm").symlink_to(lm)
    begun(run("tiny.json", "--data", str(data), "--set", "text_encoder=lm"))
    values = json.loads(Path("run", RUN).read_text())
    assert values["data"]["source"] == str(tmp_path / data)
    assert values["config"]["text_encoder"] == str(tmp_path / "lm")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    Path("run").symlink_to(tmp_path / "run")
    begun(run("--resume"))


def test_data_may_move(run, tmp_path, data):
    """Copying changes the times of files, not their content."""
    begun(run("tiny.json", "--data", str(data)))
    before = json.loads(Path("run", RUN).read_text())
    moved = Path("moved")
    shutil.copytree(data, moved, copy_function=shutil.copyfile)
    shutil.rmtree(data)
    refused(run("--resume"), "there is no file .*some data.*If the data of run moved, give the new place with --data")
    begun(run("--resume", "--data", "moved"))
    begun(run("--resume"))
    after = json.loads(Path("run", RUN).read_text())
    assert after == before | {"data": before["data"] | {"source": str(tmp_path / moved)}}
    shutil.copytree(moved, "other")
    (Path("other") / "1.txt").write_text("a blue cube")
    refused(run("--resume", "--data", "other"), r"1\.png has changed")
    refused(run("--resume", "--data", "scenes"), r"0\.png is missing; ")


# --- averages ---------------------------------------------------------------------------------------------------------


def saved(folder: Path, *values: float) -> list[Path]:
    for step, value in enumerate(values, 1):
        made = {"model.model.w": torch.full((2, 3), value), "model.model.b": torch.tensor([value, -value])}
        rest = {"ema.0": torch.zeros(2, 3), "model.state.model.w.exp_avg": torch.ones(2, 3)}
        runs.save_state(folder, step, made | rest, {"stage": "base"}, keep=0)
    return states(folder)


def test_an_average_by_hand(tmp_path, caplog):
    """1, 2, 4 at decay 0.7: 0.7 * (0.7 * 1 + 0.3 * 2) + 0.3 * 4 = 2.11."""
    made = average(saved(tmp_path, 1, 2, 4), 0.7)
    assert {k: v.shape for k, v in made.items()} == {"w": (2, 3), "b": (2,)}, "the transformer's names, nothing else"
    assert made["w"].dtype == torch.float32
    assert torch.allclose(made["w"], torch.full((2, 3), 2.11))
    assert torch.allclose(made["b"], torch.tensor([2.11, -2.11]))
    assert torch.equal(average(states(tmp_path), 0)["w"], torch.full((2, 3), 4.0)), "decay 0 is the newest"
    assert "only state" not in caplog.text
    assert torch.equal(average(states(tmp_path)[:1], 0.7)["w"], torch.ones(2, 3)), "of one state it is that one"
    assert "step-00000001 is the only state: the average is a copy of it" in caplog.text, "and says so"


def test_averages_that_are_refused(tmp_path):
    paths = saved(tmp_path, 1, 2)
    with pytest.raises(ValueError, match="no states to average"):
        average([])
    for decay in (1, -0.1, float("nan"), True, "0.7"):
        with pytest.raises(ValueError, match=r"decay is .*; give a fraction, from 0 to below 1"):
            average(paths, decay)
    weights_file(paths[0]).write_bytes(b"")
    with pytest.raises(ValueError, match="step-00000001 is damaged"):
        average(paths)
