"""cli.py: each command from its arguments to its files, in this process, with a tiny saved Muse."""

import copy
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from conftest import giant_png
from PIL import Image
from safetensors.torch import load_file

import minimuse
import minimuse.config
from minimuse import cli
from minimuse.cfg import GUIDANCES
from minimuse.checkpoint import shipped
from minimuse.cli_commands import COMMANDS, changed
from minimuse.config import preset, to_dict
from minimuse.lab_models import muse_settings
from minimuse.lab_samplers import SAMPLERS
from minimuse.muse import Muse
from minimuse.pictures import save_png
from minimuse.train_doctor import examine
from minimuse.train_state import states
from minimuse.utils import pick_device

ROOT = Path(__file__).resolve().parent.parent
A = "a red cube"


@pytest.fixture(scope="module")
def folder(tiny_muse, tmp_path_factory):
    return str(tiny_muse.save_pretrained(tmp_path_factory.mktemp("cli") / "tiny"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """run("generate", "a red cube", ...) -> (exit code, lines on stdout, lines on stderr without progress bars)."""

    def run(command, *words, model=True):
        words = [command, *(str(w) for w in words)]
        try:
            code = cli.main([*words, "--model", folder, "--device", "cpu"] if model else words)
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), [line for line in err.splitlines() if line.startswith("minimuse")]

    return run


@pytest.fixture
def image(here, tiny_muse):
    """picture.png of the right size; mask.png, white in a corner."""
    side = tiny_muse.config.high_tokenizer.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(here / "picture.png")
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[:20, :30] = 255
    Image.fromarray(mask).save(here / "mask.png")
    return pixels


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def told(path: Path) -> dict:
    settings = json.loads(Image.open(path).text["minimuse"])
    assert re.fullmatch("[0-9a-f]{16}", settings.pop("fingerprint")), "which checkpoint drew it"
    return settings


def refused(result, match: str) -> None:
    """Exit code 2 and one line on stderr that holds `match`."""
    code, out, err = result
    assert code == 2, f"exit code {code}, expected 2"
    assert out == [], f"nothing on stdout: {out}"
    assert len(err) == 1, f"one line on stderr: {err}"
    assert match in err[0], f"{match!r} is not in {err[0]!r}"


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_writes_a_picture_that_tells_how_it_was_made(run, here, folder):
    code, out, err = run("generate", A, "--seed", 3, "--steps", 2, "--guidance", "0:3", "--out", "cube.png")
    assert (code, err) == (0, []), f"{code} {err}"
    assert files(here) == ["cube.png"], f"{files(here)}"
    assert out == [f"cube.png  ({A!r}, seed 3)"], f"it says where the picture is: {out}"
    settings = told(here / "cube.png")
    expected = {"model": "tiny", "prompt": A, "negative_prompt": None, "seed": 3, "steps": 2, "guidance": [0.0, 3.0]}
    assert settings == expected, f"prompt, seed and settings as JSON: {settings}"
    settings.pop("model")
    muse = Muse.from_pretrained(folder, device="cpu")
    (again,) = muse.generate(settings.pop("prompt"), **settings)
    assert np.array_equal(np.asarray(again), np.asarray(Image.open(here / "cube.png"))), "what it tells draws it again"


def test_a_random_seed_is_told(run, here):
    code, _, _ = run("generate", A, "--steps", 1, "--out", "one.png")
    seed = told(here / "one.png")["seed"]
    assert code == 0, "no seed is a random one"
    run("generate", A, "--steps", 1, "--out", "two.png", "--seed", seed)
    one, two = (Image.open(here / f"{name}.png").tobytes() for name in ("one", "two"))
    assert one == two, "the told seed draws the picture again"


def test_every_option_reaches_the_sampler(run, here):
    words = ["--negative-prompt", "a blue ball", "--guidance", 2.5, "--steps", 2, "--schedule", "linear"]
    words += ["--order", "halton", "--sampling-temperature", 0.5, "--choice-temperature", 1.5]
    code, _, err = run("generate", A, *words, "--seed", 1, "--out", "x.png")
    assert code == 0, f"{err}"
    expected = {"negative_prompt": "a blue ball", "guidance": 2.5, "steps": 2, "schedule": "linear", "order": "halton"}
    expected |= {"sampling_temperature": 0.5, "choice_temperature": 1.5, "seed": 1, "prompt": A, "model": "tiny"}
    assert told(here / "x.png") == expected, f"{told(here / 'x.png')}"


def test_n_pictures_of_each_prompt(run, here):
    code, out, _ = run("generate", A, "a blue ball", "--n", 2, "--seed", 5, "--steps", 1, "--out", "x.png")
    assert code == 0, "several prompts, several pictures"
    names = ["x.png", "x-1.png", "x-2.png", "x-3.png"]
    assert files(here) == sorted(names), f"{files(here)}"
    found = [(told(here / n)["prompt"], told(here / n)["seed"]) for n in names]
    assert found == [(A, 5), (A, 6), ("a blue ball", 7), ("a blue ball", 8)], f"{found}"
    assert [line.split()[0] for line in out] == names, f"a line a picture: {out}"


def test_film(run, here):
    code, out, _ = run("generate", A, "--seed", 0, "--steps", 3, "--film", "--out", "x.png")
    assert code == 0, "a film is drawn"
    assert files(here) == ["x-film.png", "x.png"], f"{files(here)}"
    assert out[-1] == "x-film.png", f"it says where the film is: {out}"
    picture, film = (Image.open(here / n) for n in ("x.png", "x-film.png"))
    assert film.width > 6 * 2 * picture.width, f"3 + 3 steps side by side, twice as large: {film.size}"


def test_the_film_shows_the_first_decode_alone(run, here, image):
    for n in (1, 17):  # 17 pictures are two batches, so two decodes
        code, _, err = run("generate", A, "--seed", 0, "--steps", 1, "--film", "--n", n, "--out", f"{n}.png")
        assert code == 0, f"{err}"
    code, _, err = run("outpaint", "picture.png", A, "--seed", 0, "--steps", 1, "--film", "--out", "wide.png")
    assert code == 0, f"{err}"
    sizes = [Image.open(here / f"{name}-film.png").size for name in ("1", "17", "wide")]
    assert len(set(sizes)) == 1, f"films of one base and one super-resolution step each: {sizes}"


@pytest.mark.filterwarnings("ignore:prompt cut")
def test_free_names_are_found(run, here):
    prompt = "Two small red cubes, and a ball!"
    for name in ("two-small-red-cubes-and-a-ball", "two-small-red-cubes-and-a-ball-v2"):
        code, out, _ = run("generate", prompt, "--steps", 1, "--seed", 0)
        assert code == 0, f"{out}"
        assert out[0].startswith(f"{name}.png "), f"the first free name after the prompt: {out}"
    code, out, _ = run("generate", prompt, "--steps", 1, "--n", 2, "--film")
    assert [line.split()[0] for line in out] == [
        f"two-small-red-cubes-and-a-ball-v3{e}.png" for e in ("", "-1", "-film")
    ]
    assert run("generate", "?!", "--steps", 1)[1][0].startswith("picture.png"), (
        "a prompt without letters has a name too"
    )
    run("generate", "a-red-cube" * 30, "--steps", 1)
    assert max(map(len, files(here))) <= 64, f"long prompts make no endless names: {files(here)}"


@pytest.mark.parametrize("existing", ["x.png", "x-1.png", "x-film.png"])
def test_an_existing_file_is_refused(run, here, existing):
    (here / existing).write_bytes(b"mine")
    words = ["generate", A, "--n", 2, "--film", "--steps", 1, "--out", "x.png"]
    refused(run(*words), f"{existing} already exists; give another name, or --force")
    assert files(here) == [existing], f"nothing is written: {files(here)}"
    assert (here / existing).read_bytes() == b"mine", "the file must be untouched"
    code, _, _ = run(*words, "--force")
    assert code == 0, "--force overwrites"
    assert files(here) == ["x-1.png", "x-film.png", "x.png"], f"{files(here)}"
    assert Image.open(here / existing).format == "PNG", "--force overwrites"


def test_it_is_refused_before_the_model_loads(run, here, monkeypatch):
    (here / "x.png").write_bytes(b"mine")
    monkeypatch.setattr(Muse, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))
    refused(run("generate", A, "--out", "x.png"), "already exists")
    refused(run("generate", A, "--out", "x.jpg"), "give a name that ends in .png")
    refused(run("generate", A, "--out", "nowhere/x.png"), "no folder nowhere")
    refused(run("generate", A, "--n", 0), "argument --n: '0' is not a whole number from 1 to 10,000")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--steps", "0"], "argument --steps: '0' is not a whole number"),
        (["--schedule", "cosinus"], "'cosinus'"),
        (["--order", "best"], "'best'"),
        (["--sampling-temperature", "-1"], "'-1' is not a number from 0"),
        (["--device", "toaster"], "device 'toaster'"),
        (["--model", "nowhere"], "no checkpoint 'nowhere'"),
    ],
)
def test_what_is_wrong_is_one_line(run, here, folder, words, match):
    defaults = {"--model": folder, "--device": "cpu"} | dict([words])
    refused(run("generate", A, *(w for pair in defaults.items() for w in pair), model=False), match)
    assert files(here) == [], f"nothing is written: {files(here)}"


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, ImportError])
def test_errors_of_several_lines_are_told_in_one(capsys, here, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("first\n  second")

    monkeypatch.setattr(Muse, "from_pretrained", fail)
    assert cli.main(["generate", A]) == 2, "an error is exit code 2"
    assert capsys.readouterr().err == "minimuse: first second\n", "one line, whatever the error's"


@pytest.mark.parametrize(("text", "value"), [("3", 3.0), ("0:3", (0.0, 3.0)), ("2.5:0.5", (2.5, 0.5)), ("0", 0.0)])
def test_guidance_is_a_number_or_first_to_last(text, value):
    args = cli.parser().parse_args(["generate", A, "--guidance", text])
    assert args.guidance == value, f"{text} is {args.guidance}"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["paint", A],
        ["generate", A, "--model", ""],
        ["train", "nano", "--out", ""],
        ["train", "nano", "--out", "x", "--accumulate", "0"],
        ["compare", "--samples", "0"],
        ["compare", "--steps", "4,,8"],
        ["generate", A, "--guidance", "1:2:3"],
        ["app", "--port", "99999999"],
        ["generate"],
        ["generate", A, "--guidance", "strong"],
        ["generate", A, "--like", "picture.png"],
        ["generate", A, "--n", "two"],
        ["inpaint", "picture.png", A],
        ["edit", "picture.png", A, "--steps", "3"],
        ["train", "nano"],
    ],
)
def test_wrong_usage_is_one_line(words, run):
    code, out, err = run(*words, model=False) if words else run("", model=False)
    refused((code, out, err), "see minimuse")


def test_a_file_is_no_folder_for_a_report(run, here):
    (here / "report.png").touch()
    refused(run("compare", "--out", "report.png", model=False), "--out report.png is a file; give a folder")


@pytest.mark.parametrize("command", ["", "generate", "inpaint", "outpaint", "edit", "app", "train", "info"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0, "help is no error"
    assert f"usage: minimuse {command}".strip() in capsys.readouterr().out, "help shows the usage"


# --- any option at any nonsense ---------------------------------------------------------------------------------------

NONSENSE = [
    "",
    " ",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e999",
    "-1",
    "0",
    "-0.0",
    "1e-400",
    "1000000000",
    "9" * 5000,
    "1.5",
]
NONSENSE += [
    "-1e9",
    "x",
    "None",
    "true",
    "[]",
    "{}",
    "1,2",
    ",",
    ":",
    "1:nan",
    "0:1:2",
    "0x10",
    "1_0",
    "٣",
    "\u202e",
    "💥",
]
NONSENSE += ["\0", "--", "'", "../..", "/dev/null", "a" * 5000, "\udcff"]
REFUSED = [
    "",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 5000,
    ":",
    "1:nan",
    "1:inf",
]  # by every option with a number


NAMES = ("tasks", "preset", "schedule", "order", "stages", "caption_columns")


def options(command: str) -> list:
    """The options of a command that take a value, and its positional arguments."""
    (commands,) = (action for action in cli.parser()._actions if action.dest == "command")
    return [action for action in commands.choices[command]._actions if action.nargs != 0]


def test_samplers_and_guidance_by_name(run, here, tiny_muse):
    """A published sampler draws what its settings draw; options of the user replace its own."""
    words = ["--seed", 3, "--steps", 4, "--guidance", "falling:2", "--out", "a.png"]
    assert run("generate", A, *words, "--sampler", "p2:0.5")[::2] == (0, [])
    settings = muse_settings(tiny_muse, "p2:0.5", 4) | {"steps": 4, "guidance": "falling:2.0"}
    (expected,) = tiny_muse.generate(A, seed=3, **settings)
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(expected))
    assert told(here / "a.png")["guidance"] == "falling:2.0"
    assert run("generate", A, "--seed", 3, "--sampler", "eb:0", "--steps", 3, "--force", "--out", "a.png")[0] == 0
    refused(run("generate", A, "--sampler", "dalle"), "unknown preset 'dalle'; known: muse, maskgit")
    refused(run("generate", A, "--sampler", "informed"), "which only an exact world knows")
    refused(run("generate", "--like", "a.png", "--sampler", "eb"), "leave out the other options")
    refused(run("generate", "--like", "a.png"), "only Python can draw it again")
    refused(run("generate", A, "--guidance", "interval:1:2:3:4"), "unknown guidance")
    assert cli.SAMPLERS.replace("\n", " ").split(", ") == list(SAMPLERS), "its help names them all"
    assert cli.GUIDANCES.split(", ") == list(GUIDANCES)


@pytest.mark.slow
def test_generate_with_any_option_at_any_nonsense(here, tiny_muse, capsys, monkeypatch):
    """One sentence and exit code 2, or a picture. The seed of this test picks a third of all pairs."""
    monkeypatch.setattr(Muse, "from_pretrained", lambda name, device: pick_device(device) and tiny_muse)
    pairs = [(option, value) for option in options("generate") for value in NONSENSE]
    done = []
    for option, value in random.Random(0).sample(pairs, len(pairs) // 3):
        words = [f"{option.option_strings[0]}={value}"] if option.option_strings else [value]
        words += [] if option.dest in ("prompts", "like") else [A]
        words += [] if option.dest in ("steps", "like") else ["--steps", "1"]
        try:
            code = cli.main(["generate", "--film", *words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        lines = err.splitlines()
        if code == 0:
            assert "seed" in out, f"{words} drew: {out}"
        else:
            assert (code, len(lines), out) == (2, 1, ""), f"{words}: exit code {code}, {err}"
            assert lines[0].startswith("minimuse: "), f"{words}: {err}"
        done.append(code)
    assert done.count(2) > len(done) / 2 > 60, f"{done.count(2)} of {len(done)} were refused"


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers_of_all_commands_are_finite(command, capsys):
    """Every option that takes a number refuses what is none; every option that takes a name refuses an empty one."""
    for option in options(command):
        needed = [word for o in options(command) if o.required and o is not option for word in (*o.option_strings, "1")]
        is_number = callable(option.type) and option.type not in (str, Path, cli._name) and option.dest not in NAMES
        for value in REFUSED if is_number else [""] * (option.type is not str):
            words = [f"{option.option_strings[0]}={value}"] if option.option_strings else [value]
            with pytest.raises(SystemExit) as stop:
                cli.parser().parse_args([command, *words, *needed])
            err = capsys.readouterr().err
            assert (stop.value.code, err.count("\n")) == (2, 1), f"{words}: {err}"
            assert all(name in err for name in option.option_strings), f"{words}: {err}"


def test_warnings_are_one_line(monkeypatch, capsys):
    monkeypatch.setitem(COMMANDS, "info", lambda args: warnings.warn("steps is 5000: 64 are enough", stacklevel=2))
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "minimuse: steps is 5000: 64 are enough\n", "no path, no source line"


def test_output_in_ascii_and_to_a_closed_pipe(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setitem(COMMANDS, "info", lambda args: print("0.5 ± 0.1"))
    assert cli.main(["info"]) == 0
    assert written.getvalue() == b"0.5 ? 0.1\n", "a terminal in ASCII gets another letter, not an error"
    command = [sys.executable, "-c", "import sys; from minimuse.cli import main; sys.exit(main(['info']))"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `head -1` does
    assert (process.stderr.read(), process.wait()) == ("", 141), "no traceback where the reader has left"


# --- like a picture ---------------------------------------------------------------------------------------------------


def test_like_draws_the_same_pixels(run, here):
    words = ["--negative-prompt", "a blue ball", "--guidance", "0:2", "--steps", 3, "--schedule", "linear"]
    run("generate", A, *words, "--seed", 4, "--out", "x.png", "--film")
    code, out, err = run("generate", "--like", "x.png", "--out", "y.png")
    assert (code, err) == (0, []), f"{code} {err}"
    one, two = (hashlib.sha256(Image.open(name).tobytes()).hexdigest() for name in ("x.png", "y.png"))
    assert one == two, "the same pixels"
    assert out[-1] == "x.png: the same pixels", f"and it says so: {out}"
    assert told(here / "x.png") == told(here / "y.png"), "the copy tells the same"
    assert told(here / "x.png") == told(here / "x-film.png"), "a film tells what it is the film of"


def test_like_says_how_many_pixels_differ(run, here):
    run("generate", A, "--steps", 1, "--seed", 4, "--out", "x.png")
    with Image.open(here / "x.png") as old:
        old.load()
        red, *others = old.getpixel((5, 7))
        old.putpixel((5, 7), (red + 3 if red < 250 else red - 3, *others))
        old.info["minimuse"] = json.loads(old.text["minimuse"])
        save_png(old, here / "touched.png")
    code, out, _ = run("generate", "--like", "touched.png", "--out", "y.png")
    assert code == 0, "it is drawn all the same"
    assert out[-1].startswith("touched.png: 1 of 4096 pixels differ, by at most 3 of 255"), f"{out}"


def test_like_refuses_what_it_cannot_draw_again(run, here, image, folder):
    run("generate", A, "--steps", 1, "--seed", 4, "--out", "x.png")
    run("inpaint", "x.png", "mask.png", A, "--steps", 1, "--out", "inpainted.png")
    (here / "text.png").write_text("no picture")
    before = files(here)
    refused(run("generate", "--like", "picture.png"), "picture.png holds no settings of minimuse")
    refused(run("generate", "--like", "text.png"), "text.png cannot be read")
    refused(run("generate", "--like", "none.png"), "none.png")
    refused(run("generate", "--like", "inpainted.png"), "made by inpaint from another picture")
    refused(run("generate", "--like", "x.png", "--seed", 5), "--like takes seed and settings from the picture")
    refused(run("generate", "--like", "x.png", "--n", 2), "--like takes seed and settings from the picture")
    refused(run("generate", "--like", "x.png", model=False), "x.png was made by 'tiny', which is not shipped")
    if "nano" in shipped():
        other = run("generate", "--like", "x.png", "--model", "nano", "--device", "cpu", model=False)
        refused(other, "another checkpoint, tiny with the fingerprint")
    assert files(here) == before, f"nothing is written: {files(here)}"


# --- editing ----------------------------------------------------------------------------------------------------------


def test_inpaint(run, here, image):
    code, _, err = run("inpaint", "picture.png", "mask.png", A, "--seed", 0, "--steps", 2, "--out", "new.png")
    assert code == 0, f"{err}"
    new, mask = np.asarray(Image.open("new.png")), np.asarray(Image.open("mask.png")) > 0
    assert (new[~mask] == image[~mask]).all(), "outside the mask every pixel is the user's"
    assert (new[mask] != image[mask]).any(), "inside it is new"
    assert told(here / "new.png")["task"] == "inpaint", f"{told(here / 'new.png')}"


@pytest.mark.parametrize(("words", "padding"), [(["8"], [8] * 4), (["4", "0", "2", "6"], [4, 0, 2, 6]), ([], [16] * 4)])
def test_outpaint(run, here, image, words, padding):
    words = ["--padding", *words] if words else []
    code, _, err = run("outpaint", "picture.png", A, *words, "--seed", 0, "--steps", 1, "--out", "new.png")
    assert code == 0, f"{err}"
    left, top, right, bottom = padding
    side = len(image)
    new = np.asarray(Image.open("new.png"))
    assert new.shape == (top + side + bottom, left + side + right, 3), f"{new.shape}"
    assert (new[top : top + side, left : left + side] == image).all(), "the picture stands where it was, bit for bit"
    assert told(here / "new.png")["padding"] == padding, f"{told(here / 'new.png')}"


def test_edit(run, here, image):
    words = ["edit", "picture.png", A, "--iterations", 2, "--share", 0.5, "--seed", 1, "--guidance", 1]
    code, _, err = run(*words, "--out", "new.png", "--film", "--n", 2)
    assert code == 0, f"{err}"
    assert {"new.png", "new-1.png", "new-film.png"} <= set(files(here)), f"{files(here)}"
    assert Image.open("new.png").size == (len(image), len(image)), "an edited picture keeps its size"
    expected = {"task": "edit", "iterations": 2, "fraction": 0.5, "guidance": 1.0, "seed": 2}
    settings = told(here / "new-1.png")
    assert expected.items() <= settings.items(), f"{settings}"


def test_pictures_that_cannot_be_read(run, here, image):
    whole = (here / "picture.png").read_bytes()
    (here / "text.png").write_text("no picture")
    (here / "empty.png").write_bytes(b"")
    Image.fromarray(image[:9]).save("small.png")
    refused(run("edit", "text.png", A), "text.png cannot be read")
    refused(run("edit", "empty.png", A), "empty.png cannot be read")
    refused(run("edit", "none.png", A), "none.png")
    refused(run("edit", ".", A), "")
    refused(run("inpaint", "picture.png", "text.png", A), "text.png cannot be read")
    refused(run("edit", "small.png", A), f"x {9} came")
    refused(run("inpaint", "picture.png", "small.png", A), f"x {9} came")
    refused(run("outpaint", "picture.png", A, "--padding", 1, 2), "padding is (1, 2); give 4 values")
    refused(run("outpaint", "picture.png", A, "--padding", 0), "padding is 0")
    (here / "giant.png").write_bytes(giant_png())
    refused(run("edit", "giant.png", A), "giant.png cannot be read, it is too large")
    for keep in (20, 40, 100, len(whole) // 2):
        (here / "cut.png").write_bytes(whole[:keep])
        refused(run("edit", "cut.png", A), "")
    assert not [f for f in files(here) if f.startswith("a-red")], f"nothing is written: {files(here)}"


# --- train, info and the rest -----------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_a_run_takes_and_writes_nothing(run, here, tiny_muse, monkeypatch):
    monkeypatch.setitem(minimuse.config.PRESETS, "tiny", lambda: tiny_muse.config)
    how = ["--out", "runs/dry", "--dry-run", "--ceiling", "1", "--memory", "80", "--device", "cpu"]
    code, out, err = run("train", "tiny", *how, model=False)
    assert (code, err) == (0, []), f"{code} {err}"
    text = "\n".join(out)
    for told in ("caches of about 8 images", "pixels", "high", "1.00 TFLOP/s, as given", "superres", "fits in 80 GB"):
        assert told in text, f"{told!r} is not in: {text}"
    assert not (here / "runs").exists(), "a dry run left files"


def test_train_writes_a_checkpoint_that_draws(run, here, tiny_muse, monkeypatch):
    monkeypatch.setitem(minimuse.config.PRESETS, "tiny", lambda: tiny_muse.config)
    code, out, err = run("train", "tiny", "--out", "runs/tiny", "--seed", 1, "--device", "cpu", model=False)
    assert (code, err) == (0, []), f"{code} {err}"
    made = {
        "README.md",
        "curves.png",
        "config.json",
        "model.safetensors",
        "run.json",
        "log.jsonl",
        "cache",
        *tiny_muse.config.stages,
    }
    assert set(files(here / "runs/tiny")) == made, f"{files(here / 'runs/tiny')}"
    muse = Muse.from_pretrained(here / "runs/tiny", device="cpu")
    assert muse.config == tiny_muse.config, "it is what the preset says"
    assert muse.words, "it knows the words that it was trained on"
    assert muse.generate(A, seed=0, steps=1)[0].size == (muse.config.high_tokenizer.image_size,) * 2, "it draws"
    card = (here / "runs/tiny/README.md").read_text()
    assert "Data: 8 pictures with 8 captions, from scenes. Nothing is held out" in card, card
    assert "trained in" in out[0], f"{out}"
    assert out[-1].startswith("try: minimuse generate "), f"it says what to do next: {out}"


@pytest.fixture
def pictures(here):
    """Six captioned pictures, three of each of two captions with a word that tiny never saw."""
    (here / "pictures").mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (40 * i, 128, 128)).save(here / f"pictures/{i}.png")
        (here / f"pictures/{i}.txt").write_text(("a teal cube", "two teal boxes")[i % 2])
    return "pictures"


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_fine_tuning_changes_only_its_stages(run, here, folder, pictures):
    words = ("train", "--from", folder, "--data", pictures, "--device", "cpu", "--set", "stages.base.steps=3")
    code, _, err = run(*words, "--stages", "base", "--out", "mine", model=False)
    assert code == 0, err
    before, after = weights_of(folder), weights_of("mine")
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == {"base"}, f"tokenizers and super-resolution stay as they were: {changed}"
    tuned, start = (Muse.from_pretrained(name, device="cpu") for name in ("mine", folder))
    assert set(tuned.words) == {*start.words, "a", "teal", "cube", "two", "boxes"}, "old and new words"
    assert set(tuned.examples) == {"a teal cube", "two teal boxes"}, "new captions to try"
    assert tuned.config.name == "tiny-tuned", "another name, so that --like does not draw with the old one"
    findings = examine("mine", device="cpu")
    assert {"context", "leakage", "text"} <= {finding.check for finding in findings}, (
        "frozen tokenizers are the start's"
    )
    assert "files" not in {finding.check for finding in findings}, findings
    code, out, err = run("average", "mine", "--out", "averaged", model=False)
    assert (code, len(out)) == (0, 2), f"only the base model has states: {out} {err}"
    averaged = weights_of("averaged")
    same = {name.split(".")[0] for name in after if averaged[name].equal(after[name])}
    assert same == {name.split(".")[0] for name in after}, "one state is its own average; the frozen parts stay"
    code, _, err = run("average", "mine", "--from", folder, "--decay", "0.25", "--out", "kept", model=False)
    assert code == 0, err
    kept = weights_of("kept")
    for name in after:
        assert (kept[name] - 0.25 * before[name].float() - 0.75 * after[name]).abs().max() < 1e-6, name
    refused(run("average", "mine", "--from", "nano", "--out", "next", model=False), "has other networks than nano")
    refused(run(*words, "--out", "next", "tiny", model=False), "take no preset")
    refused(run(*words, "--out", "next", "--stages", "bass", model=False), "unknown stages bass; give some of")
    refused(run("train", "nano", "--stages", "base", "--out", "next", model=False), "--stages needs --from")


def test_a_model_without_captions(run, here, folder, pictures, image, capsys):
    """Pictures without any caption train a model that draws, inpaints and outpaints without a prompt."""
    for path in Path(pictures).glob("*.txt"):
        path.unlink()
    steps = ("--set", "stages.base.steps=2", "--set", "stages.superres.steps=2", "--device", "cpu")
    words = ("train", "--from", folder, "--data", pictures, *steps, "--out", "mine")
    refused(run(*words, model=False), "holds no captioned image")
    code, out, err = run(*words, "--captions", "none", "--count", 4, model=False)
    assert code == 0, err
    assert out[-2:] == [f'try: minimuse generate "" --model {Path("mine")}', out[-1]], "it says what works"
    assert 'generate, inpaint and outpaint with the prompt ""; other prompts change nothing' in out[-1]
    assert "4 pictures" in Path("mine/README.md").read_text(), "--count takes so many"
    muse = Muse.from_pretrained("mine", device="cpu")
    assert (muse.config.text_encoder, muse.words, muse.unfamiliar("")) == ("", [], "")
    capsys.readouterr()
    a, b = (muse.generate(prompt, seed=1)[0].tobytes() for prompt in ("", "a red cube"))
    assert a == b, "a prompt changes nothing"
    assert "tiny-tuned-unconditional has no captions: prompts change nothing" in capsys.readouterr().err
    assert "_lm" not in vars(muse.encoder), "and no language model is loaded"
    model = ("--model", "mine", "--device", "cpu")
    assert run("generate", "", *model, "--out", "a.png", model=False)[0] == 0
    assert run("inpaint", "picture.png", "mask.png", "", *model, "--out", "b.png", model=False)[0] == 0
    assert run("outpaint", "picture.png", "", *model, "--out", "c.png", model=False)[0] == 0
    assert run("train", "--more", 1, "--out", "mine", "--device", "cpu", model=False)[0] == 0
    findings = examine("mine", "base", device="cpu")
    assert "text" not in [finding.check for finding in findings], "the doctor asks for no text"


def test_a_finished_run_is_continued(run, here, folder, pictures):
    """More steps in two commands, stopped in between or not, read the start, the data and the place from the run."""
    words = ("--device", "cpu", "--set", "stages.base.steps=3", "--set", "stages.superres.steps=2")
    assert run("train", "--from", folder, "--data", pictures, "--out", "mine", *words, model=False)[0] == 0
    first = weights_of("mine")
    refused(run("train", "--resume", "--out", "mine", model=False), "finished; continue it with --more 2000")
    code, _, err = run("train", "--more", 2, "--out", "mine", "--device", "cpu", model=False)
    assert code == 0, err
    steps = [json.loads(line) for line in (here / "mine/log.jsonl").read_text().splitlines()]
    assert {(line["stage"], line["step"]) for line in steps} >= {("base", 5), ("superres", 4)}, f"{steps}"
    more = weights_of("mine")
    assert not all(more[name].equal(first[name]) for name in more), "it has gone on"
    assert Muse.from_pretrained("mine", device="cpu").config.stages["base"].steps == 5, "and says for how long"
    (here / "mine/README.md").unlink()  # as if the second command had been stopped before its end
    for stage in ("base", "superres"):
        shutil.rmtree(states(here / "mine" / stage)[-1])
    refused(run("train", "--more", 2, "--out", "mine", model=False), "is not finished; continue it with --resume")
    assert run("train", "--resume", "--out", "mine", "--device", "cpu", model=False)[0] == 0
    again = weights_of("mine")
    assert all(again[name].equal(more[name]) for name in more), "bit for bit"


def test_train_refuses_before_any_work(run, here, folder, monkeypatch):
    monkeypatch.setattr("minimuse.train.train_muse", lambda *a, **k: pytest.fail("it has begun to train"))
    before = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    refused(run("train", "nano", "--out", folder, model=False), "already holds")
    assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == before, "the checkpoint must be untouched"
    refused(run("train", "pico", "--out", "new", model=False), "unknown preset 'pico'; known: nano")
    assert files(here) == [], f"nothing is written: {files(here)}"


def test_info_of_all_presets(run, capsys):
    code, out, _ = run("info", model=False)
    assert code == 0, "info needs no weights"
    text = "\n".join(out)
    for name in minimuse.config.PRESETS:
        assert f"{name}: " in text, f"{name} is missing: {text}"
    lines = {}
    for line in out:
        if not line.startswith(" "):
            name = line.split(":")[0]
        lines.setdefault(name, []).append(line.split())
    (base,) = [w for w in lines["paper_632m"] if w[0] == "base"]
    (superres,) = [w for w in lines["paper_632m"] if w[0] == "superres"]
    for words, published in ((base, 632), (superres, 268)):
        count = float(words[1].rstrip("M").replace(",", ""))
        assert abs(count / published - 1) < 0.02, f"{count}M printed, {published}M published"
    assert any("48 layers x 2048, MLP 8192" in line for line in out), "the 3B base of table A.1"
    assert any("32 layers x 1024, MLP 4096" in line for line in out), "the super-resolution of table A.3"
    assert out[-1] == f"shipped checkpoints: {', '.join(shipped()) or 'none'}", f"{out[-1]}"


def test_info_of_one_preset_or_checkpoint(run, folder, tiny_muse):
    code, out, _ = run("info", "toy", folder, model=False)
    assert code == 0, f"{out}"
    assert out[0].startswith("toy: "), f"{out}"
    assert any(line.startswith(f"{folder}: ") and tiny_muse.config.text_encoder in line for line in out), f"{out}"
    refused(run("info", "nowhere", model=False), "no checkpoint 'nowhere'")
    refused(run("info", ".", model=False), f"{Path().absolute()} holds no config.json; give a checkpoint's folder")


def test_ctrl_c_is_130(capsys, here, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Muse, "from_pretrained", stop)
    assert cli.main(["generate", A]) == 130, "as shells expect of a program that Ctrl-C stopped"
    out, err = capsys.readouterr()
    assert (out, err) == ("", "minimuse: stopped\n"), f"one line, no traceback: {out!r} {err!r}"


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0, "--version is no error"
    assert capsys.readouterr().out == f"minimuse {minimuse.__version__}\n", "it names the package's version"


def test_python_m_and_the_console_script():
    done = subprocess.run(
        [sys.executable, "-m", "minimuse.cli", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"minimuse {minimuse.__version__}\n", f"python -m minimuse.cli: {done.stdout}{done.stderr}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"minimuse": "minimuse.cli:main"}, f"{project['scripts']}"
    try:
        scripts = distribution("minimuse").entry_points.select(group="console_scripts")
    except PackageNotFoundError:
        pytest.skip("minimuse is not installed here, only its sources are on the path")
    assert [s.load() for s in scripts] == [cli.main], "the installed command is this main"


# --- changes by --set -------------------------------------------------------------------------------------------------

NANO = preset("nano")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("stages.base.steps=500", "stages.base.steps", 500),
        ("base.dropout=0.25", "base.dropout", 0.25),
        ("low_tokenizer.blocks=[1, 1, 1]", "low_tokenizer.blocks", (1, 1, 1)),
        ("base_sampling.schedule=linear", "base_sampling.schedule", "linear"),
        ('text_encoder="google/t5-v1_1-base"', "text_encoder", "google/t5-v1_1-base"),
        ("text_encoder=a=b", "text_encoder", "a=b"),
        ("name=", "name", ""),
    ],
)
def test_a_field_is_changed_by_its_path(text, path, value):
    before, config = to_dict(NANO), changed(NANO, [text])
    expected = part = copy.deepcopy(before)
    *parents, last = path.split(".")
    for name in parents:
        part = part[name]
    part[last] = value
    assert to_dict(config) == expected, "that field, and no other"
    assert changed(config, []) == config
    assert to_dict(NANO) == before, "what it was made from stays as it was"


def test_several_changes_must_fit_together_in_the_end():
    both = ["low_tokenizer.codebook_size=64", "base.codebook_size=64", "superres.low_codebook_size=64"]
    assert changed(NANO, both).base.codebook_size == 64, "on the way they need not"
    with pytest.raises(ValueError, match=r"base\.codebook_size is 256 but low_tokenizer\.codebook_size is 64"):
        changed(NANO, both[:1])
    assert changed(NANO, ["scenes=1", "scenes=2"]).scenes == 2, "the last one counts"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("stages.base.stpes=5", r"no field 'stages\.base\.stpes'; give PATH=VALUE"),
        ("basis.width=5", r"no field 'basis\.width'"),
        ("base.width.more=5", r"no field 'base\.width\.more'"),
        ("steps=5", "no field 'steps'"),
        ("=3", "no field ''"),
        ("", "no field ''; give PATH=VALUE with fields of config.json, such as stages.base.steps=500"),
        ("base.layers", r"no field 'base\.layers'; give PATH=VALUE"),
        ("base.layers=many", "layers is 'many'; give a positive whole number"),
        ("base.layers=-1", "layers is -1"),
        ("base=3", r"MuseConfig\.base is 3; give a TransformerConfig"),
    ],
)
def test_changes_that_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        changed(NANO, [text])


def test_a_place_that_cannot_be_written_is_refused_before_the_model_loads(run, here, monkeypatch):
    monkeypatch.setattr(Muse, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))
    (here / "folder.png").mkdir()
    refused(run("generate", A, "--out", "folder.png", "--force"), "folder.png already exists")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    refused(run("generate", A, "--out", "x.png"), "no folder . to write in")


def test_what_is_not_utf8_is_no_prompt(run):
    refused(run("generate", "\udcff"), "give a text in UTF-8")


def test_reconstruct(run, here, tiny_muse):
    size = tiny_muse.config.high_tokenizer.image_size
    (here / "mine" / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "more/b.JPG", "c.png"):
        Image.fromarray(rng.integers(0, 256, (size, 2 * size, 3), dtype=np.uint8)).save(here / "mine" / name)
    (here / "mine" / "a.txt").write_text("a caption")
    (here / "mine" / "d.png").write_text("damaged")
    Image.new("RGB", (size // 4, size // 4)).save(here / "mine" / "small.png")
    code, out, err = run("reconstruct", "mine")
    assert (code, out[0]) == (0, "reconstruct.png"), f"{out}, {err}"
    assert err == [
        "minimuse: d.png is of an unknown format, so it is left out",
        "minimuse: small.png is too small, so it is left out",
    ]
    said = " ".join(" ".join(out).split())
    assert "wrong low_tokenizer, pictures The PSNR of 3 pictures at" in said, said
    assert "high_tokenizer, codebook" in said, said
    assert "Train tokenizers on pictures like these. Good enough is: 30 dB" in out[-1], "random weights are not"
    assert run("reconstruct", "mine/a.png")[1][0] == "reconstruct-v2.png", "one picture, and a free name"
    assert run("reconstruct", "mine", "--out", "reconstruct.png")[0] == 2, "nothing is overwritten"
    code, _, err = run("reconstruct", "nowhere")
    assert (code, len(err)) == (2, 1), f"{err}"
    (here / "empty").mkdir()
    assert "empty holds no picture of at least" in run("reconstruct", "empty")[2][0]
