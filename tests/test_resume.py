"""Runs that are stopped or killed go on to the same weights, byte for byte (damage to files: test_train_state.py).

The tiny runs here have all that a state must hold or a step may draw: adversarial and perceptual loss, codebook
restarts, crops, dropout, a moving average, AdamW and Adafactor, validation and pictures in between.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import D_LM, ROOT

from minimuse import cli, train
from minimuse.checkpoint import WEIGHTS
from minimuse.config import MuseConfig, StageConfig, to_dict
from minimuse.eval_metrics import feature_distance
from minimuse.eval_networks import SceneFeatures
from minimuse.muse import Muse
from minimuse.sampler import SamplingConfig
from minimuse.train_engine import Engine, Stage, Stopped
from minimuse.train_log import read_log
from minimuse.train_state import read_tensors, states
from minimuse.transformer import SuperRes, Transformer, TransformerConfig
from minimuse.vqgan import VQGAN, VQGANConfig

Tensors = dict[str, torch.Tensor]
LOW = VQGANConfig(
    image_size=16,
    codebook_size=16,
    code_dim=4,
    width=16,
    multipliers=(1, 1, 1),
    blocks=(0, 1, 1),
    decoder_width=16,
    decoder_blocks=(0, 1, 1),
)
SIZES = {"codebook_size": 16, "text_width": D_LM, "width": 32, "layers": 1, "heads": 2, "mlp_width": 64}
BASE = TransformerConfig(**SIZES, grid=4, dropout=0.1)
SUPERRES = TransformerConfig(**SIZES, grid=8, dropout=0.1, block=4, low_layers=1, low_grid=4, low_codebook_size=16)
PIXELS = StageConfig(
    steps=7,
    batch=4,
    learning_rate=3e-3,
    warmup=1,
    weight_decay=1e-4,
    crop=8,
    ema=0.5,
    adversarial_start=2,
    save_every=3,
    eval_every=2,
)
MASKED = replace(PIXELS, label_smoothing=0.1)


def tiny(lm: str) -> MuseConfig:
    """A whole run of seconds. The base model takes more steps, so that a signal finds it at work."""
    sampling = SamplingConfig(steps=2, guidance=(0.0, 1.0))
    return MuseConfig(
        name="tiny",
        text_encoder=lm,
        text_tokens=16,
        low_tokenizer=LOW,
        high_tokenizer=replace(LOW, image_size=32),
        base=BASE,
        superres=SUPERRES,
        base_sampling=sampling,
        superres_sampling=sampling,
        finetuned_width=32,
        finetuned_blocks=(0, 1, 1),
        scenes=16,
        captions=2,
        stages={
            "low_tokenizer": PIXELS,
            "base": replace(MASKED, steps=40, save_every=20, eval_every=15),
            "high_tokenizer": PIXELS,
            "superres": replace(MASKED, optimizer="adafactor"),
            "decoder": PIXELS,
        },
    )


def features():
    torch.manual_seed(0)
    return feature_distance(SceneFeatures(4).eval().requires_grad_(False))


@pytest.fixture(autouse=True)
def _signals():
    """Handlers of signals belong to the process: what a test sets must not outlive it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- a stage ----------------------------------------------------------------------------------------------------------


def pixels(folder: Path, config: StageConfig = PIXELS):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    return train.train_tokenizer(
        VQGAN(LOW), config, images, perceptual=features(), engine=Engine(folder=folder, keep=1)
    )


def masked(folder: Path, config: StageConfig = MASKED, superres: bool = False):
    torch.manual_seed(0)
    model = SuperRes(SUPERRES) if superres else Transformer(BASE)
    tokens, low = torch.randint(16, (9, 64 if superres else 16)), torch.randint(16, (9, 16)) if superres else None
    texts = [[torch.randn(length, D_LM) for length in (1, 4)] for _ in range(9)]
    return train.train_transformer(model, config, tokens, texts, low_tokens=low, engine=Engine(folder=folder, keep=1))


KINDS = {
    "tokenizer": pixels,
    "base": masked,
    "superres, adafactor": lambda folder: masked(folder, replace(MASKED, optimizer="adafactor"), superres=True),
    "no average": lambda folder: masked(folder, replace(MASKED, ema=0.0)),
}


def newest(folder: Path) -> Tensors:
    """All tensors of the newest state of the only stage there."""
    (stage,) = [p for p in folder.iterdir() if p.is_dir()]
    return read_tensors(states(stage)[-1])


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_stopped_after_any_step(tmp_path, monkeypatch, kind):
    """The generator is closed after one step, then two more, and so on: model, optimizers, average, idle codes."""
    monkeypatch.setattr("gc.collect", lambda *args: 0)  # takes longer than the stage
    *_, last = KINDS[kind](tmp_path / "whole")
    lives = 0
    for life in range(1, 20):
        run = KINDS[kind](tmp_path / "stopped")
        for p in run:
            if p.step == min(life, 7):
                break
        run.close()
        lives += 1
        torch.rand(life)  # whatever the process has drawn before counts for nothing
        if p.step == 7:
            break
    assert lives == 7, f"it was stopped after each of its steps: {lives}"
    assert same(newest(tmp_path / "stopped"), newest(tmp_path / "whole")), "a tensor of the last state differs"
    for (key, a), b in zip(last.model.state_dict().items(), p.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{key} differs"


def test_a_finished_stage_is_read_and_not_done_again(tmp_path):
    *_, last = pixels(tmp_path)
    before = newest(tmp_path)
    (only,) = pixels(tmp_path)
    assert (only.step, only.metrics) == (7, {}), "no step is left"
    assert all(torch.equal(a, b) for a, b in zip(last.model.parameters(), only.model.parameters(), strict=True))
    assert same(newest(tmp_path), before)


# --- signals ----------------------------------------------------------------------------------------------------------


def heeding(folder: Path) -> Stage:
    """A stage of seven steps that saves at the third and the sixth, in an engine that heeds signals."""
    torch.manual_seed(0)
    engine = Engine(folder=folder)
    engine.handle_signals()
    return Stage(engine, "base", PIXELS, {"model": torch.nn.Linear(2, 2)})


def steps(job: Stage, tell: int = -1, number: int = signal.SIGTERM, where: str = "step") -> None:
    for step in job.steps():
        if (step, where) == (tell, "step"):
            signal.raise_signal(number)
        for at, _ in job.micro_batches(9, step):
            job.backward(job.modules["model"](at.float()[:2]).square().mean())
        job.finish(step)
        if (step, where) == (tell, "after"):  # as while it validates, draws or logs
            signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("tell", "where", "saved"), [(4, "step", 5), (0, "after", 2), (6, "step", 7), (6, "after", 7)])
def test_a_signal_lets_the_step_end_and_saves(tmp_path, number, tell, where, saved):
    steps(heeding(tmp_path / "whole"))
    job = heeding(tmp_path / "stopped")
    with pytest.raises(Stopped):
        steps(job, tell, number, where)
    assert job.engine.signal == number, "the exit code tells which"
    assert states(tmp_path / "stopped/base")[-1].name == f"step-{saved:08d}", "all that was done is saved"
    steps(heeding(tmp_path / "stopped"))
    assert same(newest(tmp_path / "stopped"), newest(tmp_path / "whole")), "it resumes to the same weights"


def test_a_second_one_ends_at_once(tmp_path):
    job = heeding(tmp_path)
    under_way = job.steps()
    next(under_way)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as e:
        signal.raise_signal(signal.SIGINT)
    assert e.type is KeyboardInterrupt, "no Stopped, which would promise a saved state"
    assert not states(tmp_path / "base"), "nothing is half saved"
    job.engine.handle_signals()
    job.engine.stepping = True
    signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a second SIGTERM ends the process"


def test_while_data_is_prepared_a_signal_stops_the_run(tiny_lm, tmp_path):
    """Data is computed part by part: the next part raises Stopped, and a resumed run continues there."""
    run = whole_run(tiny(tiny_lm), tmp_path)
    assert next(run).stage == "read images"
    run.gi_frame.f_locals["engine"].signal = signal.SIGTERM
    with pytest.raises(Stopped):
        list(run)
    assert not (tmp_path / "low_tokenizer").exists(), "no stage has begun"


def test_a_run_that_diverges_fails(tiny_lm, tmp_path, monkeypatch, capsys):
    """Exit code 2, one sentence with the stage, the step and what to try, and no checkpoint."""
    monkeypatch.setattr(train, "perceptual_distance", lambda *_, **__: features())
    (tmp_path / "tiny.json").write_text(json.dumps(to_dict(tiny(tiny_lm))))
    words = ["train", str(tmp_path / "tiny.json"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert cli.main([*words, "--set", "stages.low_tokenizer.learning_rate=1e30"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "low_tokenizer diverged at step" in told, told
    assert "Lower stages.low_tokenizer.learning_rate" in told, told
    assert not (tmp_path / "run" / WEIGHTS).exists(), "a checkpoint was written"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lpips", None)
    tokenizers = ("low_tokenizer", "high_tokenizer", "decoder")
    changes = [x for name in tokenizers for x in ("--set", f"stages.{name}.perceptual=lpips")]
    assert cli.main([*words[:3], str(tmp_path / "lpips"), *changes]) == 2
    assert 'pip install "minimuse[lpips]"' in capsys.readouterr().err, "the error names the extra"


# --- whole runs in this process ---------------------------------------------------------------------------------------


def whole_run(config: MuseConfig, folder: Path, keep: int = 2):
    """All five stages, with the perceptual features made in no time."""
    engine = Engine(device="cpu", folder=folder, keep=keep, bf16=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "perceptual_distance", lambda *_, **__: features())
        yield from train.train_muse(config, engine=engine)


@pytest.fixture(scope="module")
def finished(tiny_lm, tmp_path_factory):
    """-> (configuration, folder of a run that was never stopped, with all its states)."""
    folder, config = tmp_path_factory.mktemp("runs") / "finished", tiny(tiny_lm)
    deque(whole_run(config, folder, keep=0), maxlen=1).pop().model.save_pretrained(folder)
    return config, folder


ENDS = [
    *[("read images", 0), ("low_tokenizer", 5), ("base", 25), ("high tokens", 1), ("decoder", 4), ("done", 1)],
]


@pytest.mark.slow
def test_a_whole_run_closed_again_and_again(finished, tmp_path):
    """In caches, in stages and between them."""
    config, folder = finished
    for end in ENDS:
        run = whole_run(config, tmp_path)
        p = next(p for p in run if (p.stage, p.step) == end)
        run.close()
    p.model.save_pretrained(tmp_path)
    assert_same(tmp_path, folder)


def assert_same(found: Path, expected: Path) -> None:
    """Final weights, and all tensors of the last state of every stage."""
    assert (found / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes(), "the final weights differ"
    for stage in tiny("").stages:
        last = [states(folder / stage)[-1] for folder in (found, expected)]
        assert last[0].name == last[1].name, f"{stage}: {last}"
        assert same(*map(read_tensors, last)), f"{stage}: the last state differs"
    lines, all_lines = ([line | {"images_per_s": 0} for line in read_log(f / "log.jsonl")] for f in (found, expected))
    assert all(line in all_lines for line in lines), "log.jsonl: the same figures"
    steps = [(line["stage"], line["step"]) for line in lines]
    assert len(set(steps)) == len(steps), f"each step once: {steps}"
    assert len(steps) >= len(all_lines) - 3, "a kill may cost the line of a step that is saved and not yet told"


@pytest.mark.slow
def test_average_of_a_run(finished, tmp_path, capsys):
    """Muse 3: the states of the transformers averaged offline; the tokenizers stay."""
    _, folder = finished
    assert cli.main(["average", str(folder), "--out", str(tmp_path / "made")]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "base: 2 states, steps 20 to 40" in out, out
    assert "superres: 3 states, steps 3 to 7" in out, out
    made, muse = (Muse.from_pretrained(f, device="cpu").parts.state_dict() for f in (tmp_path / "made", folder))
    a, b = (read_tensors(state) for state in states(folder / "base"))
    for key, value in made.items():
        if key.startswith("base."):
            name = "model.model." + key.removeprefix("base.")
            assert torch.allclose(value, 0.7 * a[name] + 0.3 * b[name], atol=1e-6), key
        assert key.startswith(("base.", "superres.")) or torch.equal(value, muse[key]), key
    assert cli.main(["average", str(folder), "--out", str(tmp_path / "made")]) == 2
    assert "already holds" in capsys.readouterr().err
    assert cli.main(["average", str(tmp_path / "made"), "--out", str(tmp_path / "none")]) == 2
    assert "holds no states; `minimuse train` writes them there" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- the command, killed ----------------------------------------------------------------------------------------------


def start(out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "minimuse.cli", "train", *words, "--out", str(out), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(out: Path, *words: str) -> None:
    process = start(out, *words)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]


def send_when(process: subprocess.Popen, moment: Callable[[], bool], number: int) -> tuple[int, str]:
    """A signal as soon as the moment has come -> exit code, stderr."""
    while not moment():
        assert process.poll() is None, f"it ended before its moment: {process.communicate()[1][-2000:]}"
        time.sleep(0.002)
    process.send_signal(number)
    err = process.communicate(timeout=120)[1]
    return process.returncode, err


@pytest.fixture(scope="module")
def uninterrupted(tiny_lm, tmp_path_factory) -> tuple[str, Path]:
    """-> (configuration file, folder of a run of the command, never stopped)."""
    root, config = tmp_path_factory.mktemp("command"), tiny(tiny_lm)
    stages = {name: replace(stage, perceptual="none") for name, stage in config.stages.items()}  # takes too long
    (root / "tiny.json").write_text(json.dumps(to_dict(replace(config, stages=stages))))
    finish(root / "whole", str(root / "tiny.json"))
    return str(root / "tiny.json"), root / "whole"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are of POSIX")
def test_killed_and_resumed(uninterrupted, tmp_path):
    """SIGKILL in a tokenizer stage and in a transformer stage. benchmarks/kill_and_resume.py does it many times."""
    config, whole = uninterrupted
    out, words = tmp_path / "run", [config]
    for pattern in ("low_tokenizer/step-*3", "base/step-*20"):
        code, err = send_when(start(out, *words), lambda pattern=pattern: any(out.glob(pattern)), signal.SIGKILL)
        assert code == -signal.SIGKILL, f"{pattern}: {code} {err[-2000:]}"
        words = ["--resume"]
    finish(out, *words)
    assert_same(out, whole)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are of POSIX")
def test_told_to_stop(uninterrupted, tmp_path):
    config, whole = uninterrupted
    out = tmp_path / "run"

    def at_work() -> bool:
        return any(line["stage"] == "base" for line in read_log(out / "log.jsonl"))

    code, err = send_when(start(out, config), at_work, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, f"{code} {err[-2000:]}"
    told = [line for line in err.splitlines() if line.startswith("minimuse: ")]
    assert told[-1:] == [f"minimuse: stopped; continue with: minimuse train --resume --out {out}"], f"{told}"
    state = states(out / "base")[-1]
    assert 10 < int(state.name[5:]) < 40, f"saved where it was: {state.name}"
    finish(out, "--resume")
    assert_same(out, whole)
