"""train_log.py: what a run leaves to look at: its log, its pictures, TensorBoard's files, and nothing without a folder."""

import importlib.util
import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from PIL import Image

from minimuse.config import STAGES
from minimuse.train import Progress
from minimuse.train_engine import Engine
from minimuse.train_log import EVERY, Watch, add_record, read_log


@pytest.fixture
def config(tiny_muse):
    return tiny_muse.config


@pytest.fixture
def no_board(monkeypatch):
    """As where TensorBoard is not installed."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def watch(config, folder):
    return Watch(config, Engine(device="cpu", bf16=False, folder=folder))


def walk(eyes, stage, steps, of=40, first=0, **figures):
    """A stage's Progress of each of `steps`; before it, as a resumed stage does, one without figures."""
    if first:
        eyes(Progress(stage, first, of, {}, None))
    return [eyes(Progress(stage, step, of, {"loss": 1 / step, **figures}, None)) for step in steps]


def steps_of(folder, stage="base"):
    return [line["step"] for line in read_log(folder / "log.jsonl") if line["stage"] == stage]


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_line_every_ten_steps_and_the_last(config, tmp_path, no_board):
    walk(watch(config, tmp_path), "base", range(1, 38), of=37)
    assert steps_of(tmp_path) == [10, 20, 30, 37], f"{steps_of(tmp_path)}, every {EVERY}th"
    text = (tmp_path / "log.jsonl").read_text()
    first = json.loads(text.splitlines()[0])
    assert first.keys() == {"stage", "step", "loss", "tokens_per_s"}, "a JSON object a line"
    assert (first["stage"], first["loss"]) == ("base", 0.1), f"{first}"


def test_validation_is_logged_whenever_it_comes(config, tmp_path, no_board):
    eyes = watch(config, tmp_path)
    walk(eyes, "base", range(1, 4))
    walk(eyes, "base", [4], held_out_bound=2.0)
    assert steps_of(tmp_path) == [4], "a step with held-out figures has its line"
    assert read_log(tmp_path / "log.jsonl")[0]["held_out_bound"] == 2.0, "which holds them"


def test_a_stage_of_one_step_is_logged(config, tmp_path, no_board):
    walk(watch(config, tmp_path), "base", [1], of=1)
    walk(watch(config, tmp_path), "base", [1], of=1)  # it died before it was saved, and does the step again
    assert steps_of(tmp_path) == [1], f"{steps_of(tmp_path)}"


def test_what_is_no_stage_is_not_logged(config, tmp_path, no_board):
    eyes = watch(config, tmp_path)
    told = [eyes(Progress("done", 1, 1, {"minutes": 2.0}, None)) for _ in range(2)]
    assert told == [{"minutes": 2.0}] * 2, f"its figures pass through: {told}"
    assert not (tmp_path / "log.jsonl").exists(), "the log is of stages"


def test_speed_by_hand(config, tmp_path, no_board, monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 14.0, 20.0, 20.5, 21.0])
    monkeypatch.setattr("minimuse.train_log.time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    eyes = watch(config, tmp_path)  # at 0.0
    first, second, third = walk(eyes, "base", [1, 2, 6])
    assert "tokens_per_s" not in first, "before the first step there is nothing to measure from"
    tokens = config.stages["base"].batch * 8 * 8
    assert second["tokens_per_s"] == pytest.approx(tokens / 2.0), "a step in 2 seconds"
    assert third["tokens_per_s"] == pytest.approx(4 * tokens / 2.0), "four in 2 seconds"
    _, high = walk(eyes, "superres", [1, 2])
    assert high["tokens_per_s"] == pytest.approx(4 * 16 * 16 / 0.5), "the high-resolution grid has 16 x 16"


def test_steps_done_again_after_a_resume_are_logged_once(config, tmp_path, no_board):
    walk(watch(config, tmp_path), "low_tokenizer", range(1, 41))
    walk(watch(config, tmp_path), "base", range(1, 36))  # and dies; its last state is of step 20
    walk(watch(config, tmp_path), "base", range(21, 41), first=20)
    assert steps_of(tmp_path) == [10, 20, 30, 40], f"{steps_of(tmp_path)}"
    assert steps_of(tmp_path, "low_tokenizer") == [10, 20, 30, 40], "another stage's lines stay"
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl"}, "nothing is left of the rewriting"


def test_a_stage_begun_anew_forgets_what_it_had_logged(config, tmp_path, no_board):
    walk(watch(config, tmp_path), "base", range(1, 16))  # and dies before its first state
    walk(watch(config, tmp_path), "base", range(1, 41))
    assert steps_of(tmp_path) == [10, 20, 30, 40], f"{steps_of(tmp_path)}"


def test_a_half_written_last_line(config, tmp_path, no_board):
    path = tmp_path / "log.jsonl"
    walk(watch(config, tmp_path), "base", range(1, 31))
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert steps_of(tmp_path) == [10, 20], "the torn line is passed over, those before it are read"
    walk(watch(config, tmp_path), "base", range(21, 41), first=20)
    assert steps_of(tmp_path) == [10, 20, 30, 40], "and a resumed run writes on below it"
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_log_that_is_not_there(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == [], "no log is an empty one"


def test_nothing_is_written_without_a_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eyes = watch(config, None)
    told = walk(eyes, "base", range(1, 12))
    look = eyes.tokenizer("low_tokenizer", torch.zeros(3, 3, 32, 32).byte())
    assert "held_out_psnr" in look(Half(), 1), "validation is part of the figures all the same"
    assert "tokens_per_s" in told[-1], "and so is the speed"
    assert list(tmp_path.iterdir()) == [], f"{list(tmp_path.iterdir())}"


# --- pictures ---------------------------------------------------------------------------------------------------------


class Half(torch.nn.Module):
    """A tokenizer that gives back images at half their contrast."""

    def encode(self, images):
        assert not self.training, "pitfall 18: looked at in eval mode"
        return images

    def decode(self, tokens):
        return tokens / 2


def test_held_out_psnr_by_hand_and_its_picture(config, tmp_path, no_board):
    images = torch.full((12, 3, 32, 32), 255).byte()  # 1 in [-1, 1], given back as 1/2
    model = Half()
    figures = watch(config, tmp_path).tokenizer("low_tokenizer", images)(model, 30)
    assert figures == {"held_out_psnr": pytest.approx(10 * math.log10(4 / 0.25), abs=1e-4)}, f"{figures}"
    assert model.training, "its mode comes back"
    sheet = Image.open(tmp_path / "samples" / "low_tokenizer-0000030.png")
    assert sheet.getpixel((50, 50)) == (255, 255, 255), "above the images"
    assert sheet.getpixel((50, sheet.height - 50)) == (191, 191, 191), "below them what came back"


def test_a_run_leaves_log_and_pictures(tiny_run):
    """Of each stage a line and a picture: tokenizers 8 pairs of about 160 pixels, transformers one for each prompt."""
    log = read_log(tiny_run / "log.jsonl")
    assert [(line["stage"], line["step"]) for line in log] == [(stage, 2) for stage in STAGES], f"{log}"
    assert all("held_out_psnr" in line for line in log if "token" in line["stage"]), "tokenizers: PSNR"
    assert all("held_out_loss@0.9" in line for line in log if line["stage"] in ("base", "superres")), "losses by rate"
    sizes = {path.name: Image.open(path).size for path in (tiny_run / "samples").iterdir()}
    assert set(sizes) == {f"{stage}-0000002.png" for stage in STAGES}, f"{sizes}"
    side, gap = 160, 8
    pairs = (gap + 8 * (side + gap), gap + 2 * (side + gap))
    assert {sizes[f"{s}-0000002.png"] for s in ("low_tokenizer",)} == {pairs}, f"{sizes}"
    for stage, scale in (("base", 32 * 5), ("superres", 64 * 2)):
        width, height = sizes[f"{stage}-0000002.png"]
        assert width == gap + 3 * (scale + gap), f"{stage}: three columns of {scale} pixels, {width} wide"
        assert height > gap + 2 * (scale + gap), f"{stage}: two rows with their prompts, {height} high"


def test_the_models_go_on_training_after_a_picture(config, tmp_path, tiny_muse, no_board):
    """A Muse is frozen; drawing with one must not freeze what trains."""
    from minimuse.muse import build

    class TrainingData:
        encoder = tiny_muse.encoder

    parts = build(config).train()
    parts["low_tokenizer"].requires_grad_(False)
    few = replace(config, base_sampling=replace(config.base_sampling, steps=2))
    (image,) = watch(few, tmp_path)._draw("base", parts, TrainingData(), ["a red cube"])
    assert image.size == (32, 32), "the base model draws low-resolution pictures"
    assert all(p.requires_grad for p in parts["base"].parameters()), "the model that trains was frozen"
    assert not any(p.requires_grad for p in parts["low_tokenizer"].parameters()), "what was frozen was wakened"


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_without_tensorboard(config, tmp_path, no_board):
    eyes = watch(config, tmp_path)
    walk(eyes, "base", range(1, 11))
    assert eyes.board is None, "it is optional"
    assert steps_of(tmp_path) == [10], "the log is written all the same"


def test_with_tensorboard(config, tmp_path, monkeypatch):
    """Every figure of a logged line, by stage."""
    written, folders = [], []

    class Writer:
        def __init__(self, folder):
            folders.append(folder)

        def add_scalar(self, name, value, step):
            written.append((name, step, value))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    walk(watch(config, tmp_path), "base", range(1, 21), accuracy=0.5)
    assert folders == [str(tmp_path / "tensorboard")], "in a folder of its own"
    assert {name for name, *_ in written} == {"base/loss", "base/accuracy", "base/tokens_per_s"}, f"{written}"
    assert [(step, value) for name, step, value in written if name == "base/loss"] == [(10, 0.1), (20, 0.05)], (
        "at the steps of the log"
    )


def test_real_tensorboard_writes_its_files(config, tmp_path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("TensorBoard is not installed")
    walk(watch(config, tmp_path), "base", range(1, 11))
    assert list((tmp_path / "tensorboard").glob("events.*")), "an event file"


def test_the_model_card_tells_how_it_went(config, tmp_path):
    """By hand: two lines of a stage at 64 tokens a second, so that its steps took batch x tokens / 64 seconds each."""
    tokens = config.base.tokens * config.stages["base"].batch
    lines = [{"stage": "base", "step": s, "loss": 3.0, "tokens_per_s": 64.0} for s in (10, 20)]
    lines[1] |= {"loss": 2.0, "held_out_bound": 2.75}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "README.md").write_text("# a card\n")
    add_record(tmp_path, config)
    text, minutes = (tmp_path / "README.md").read_text(), config.stages["base"].steps * tokens / 64 / 60
    assert text.startswith("# a card\n"), "what stood there stays"
    assert f"| base | {minutes:.1f} | 2.50 nats a token | 2.75 nats a token |" in text, text
    assert (tmp_path / "curves.png").stat().st_size > 1000, "and the curves are drawn"
