"""Assignments: the source earns all marks, the release none and tells nothing, wrong submissions what they deserve."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks" / "assignments"
SELF_STUDY = "self-study"  # the key of the releases that are stored


def load(name: str):
    """A script of notebooks/assignments as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load("make")
grade = load("grade")
NAMES = make.names()
MASKING, GUIDANCE, SCHEDULE = NAMES


def options(name: str, key: str) -> dict[str, str]:
    return make.chosen(make.cells((make.SOURCES / f"{name}.py").read_text(encoding="utf-8")), key)


def keys(name: str) -> list[str]:
    """A few keys that together choose every variant of an assignment."""
    every = {f"key {i}": set(options(name, f"key {i}").items()) for i in range(200)}
    found, left = [], set().union(*every.values())
    while left:
        found.append(max(every, key=lambda key: len(every[key] & left)))
        left -= every[found[-1]]
    return found


def about(cell) -> dict:
    return cell.metadata.get("nbgrader", {})


def points(nb) -> dict[str, float]:
    """What a computer grades: test -> points."""
    return {
        about(c)["grade_id"]: about(c)["points"] for c in nb.cells if about(c).get("grade") and c.cell_type == "code"
    }


# --- the sources ------------------------------------------------------------------------------------------------------


def test_cells_by_hand():
    text = '# %% [markdown] written=why points=5 only=g:a\nr"""\nWhy?\n"""\n# %% test=t points=3\nassert x\n'
    assert make.cells(text) == [
        ({"markdown": "", "written": "why", "points": "5", "only": "g:a"}, "Why?"),
        ({"test": "t", "points": "3"}, "assert x"),
    ]
    with pytest.raises(ValueError, match="begins with"):
        make.cells("x = 1\n# %%\ny")


def test_the_key_chooses():
    found = [({"only": f"g:{option}"}, "") for option in "abab"] + [({"only": "h:x"}, "")]
    chosen = [make.chosen(found, f"key {i}") for i in range(60)]
    assert {tuple(c) for c in chosen} == {("g", "h")}
    assert {c["g"] for c in chosen} == {"a", "b"}
    assert 15 < sum(c["g"] == "a" for c in chosen) < 45
    assert make.chosen(found, "key 1") == chosen[1]


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    assert len(keys(name)) >= 3
    for key in keys(name):
        nb = make.notebook(name, key)
        nbformat.validate(nb)
        ids = [about(c)["grade_id"] for c in nb.cells if about(c)]
        assert len(set(ids)) == len(ids), "a cell's name stands twice"
        assert sum(about(c).get("points", 0) for c in nb.cells) == 100
        told = sum(int(n) for n in re.findall(r"^\| \d\. .* \| (\d+) \|$", nb.cells[0].source, flags=re.MULTILINE))
        assert told == 100, "the table of points at the top"
        assert sum(about(c).get("points", 0) for c in nb.cells if c.cell_type == "markdown") == 15, "the written part"
        for cell in nb.cells:
            text = cell.source
            assert text.count("BEGIN SOLUTION") == text.count("END SOLUTION") <= 2
            assert ("BEGIN HIDDEN" in text) <= bool(about(cell).get("grade"))
            assert len(text.split()) <= 220 or cell.cell_type == "code" or "written" in str(about(cell))
        assert [about(c)["solution"] for c in nb.cells if about(c)].count(True) >= 5


# --- marks, as nbgrader gives them ------------------------------------------------------------------------------------

RUNNER = """
import ast, json, os, resource, signal, sys
import stubs, torch
stubs.place()
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2)

def stop(*_):
    raise KeyboardInterrupt

def run(source, names):
    tree = ast.parse(source)
    value = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if value is None else eval(compile(ast.Expression(value.value), "cell", "eval"), names)

signal.signal(signal.SIGVTALRM, stop)
out, sys.stdout = sys.stdout, open(os.devnull, "w")
for seconds, cells in json.load(sys.stdin):
    names, marks = {"__name__": "__main__"}, {}
    for name, points, source in cells:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            value = run(source, names)
            got, why = value if isinstance(value, float) else points, ""
        except (Exception, KeyboardInterrupt) as error:
            got, why = 0, f"{type(error).__name__}: {error}"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if points:
            marks[name] = got, why
    print(json.dumps(marks), file=out, flush=True)
"""


def run(name: str, notebooks: list, seconds: float = 120) -> list[dict[str, tuple[float, str]]]:
    """Notebooks of one assignment, in one process with its stubs -> test -> (marks, what it raised) of each."""
    jobs = [
        (
            seconds,
            [
                (about(c).get("grade_id", ""), points(nb).get(about(c).get("grade_id")), c.source)
                for c in nb.cells
                if c.cell_type == "code"
            ],
        )
        for nb in notebooks
    ]
    env = make.environment(name, SELF_STUDY) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUNNER]
    done = subprocess.run(command, input=json.dumps(jobs), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def edited(nb, changes: dict[str, str | tuple[str, str]]):
    """A copy with cells changed: a new text, or (old, new) within it."""
    nb = nbformat.from_dict(json.loads(json.dumps(nb)))
    left = dict(changes)
    for cell in nb.cells:
        change = left.pop(about(cell).get("grade_id"), None)
        if isinstance(change, tuple):
            assert change[0] in cell.source, f"{change[0]!r} is not there"
            cell.source = cell.source.replace(*change)
        elif change is not None:
            cell.source = change
    assert not left, f"no cells {list(left)}"
    return nb


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_source_earns_all_marks_and_the_release_none(name):
    source = [make.notebook(name, key) for key in keys(name)]
    *earned, nothing = run(name, [*source, stored(name)])
    for nb, marks in zip(source, earned, strict=True):
        assert {test: got for test, (got, _) in marks.items()} == points(nb), [why for _, why in marks.values() if why]
    assert len(nothing) >= 6
    assert all(got == 0 and why for got, why in nothing.values()), f"the release earns {nothing}"


ZOO = """
def test_rates(lib):
    r = lib.masking.sample_mask_rate(20_000, generator=seeded())
    assert abs(r.mean() - 2 / math.pi) < 0.01

def test_table(lib):
    assert lib.masking.reveal_counts(256, 12)[:3] == [3, 6, 11]

def test_nonsense(lib):
    assert lib.masking.reveal_counts(4, 2) == [1, 1]

TESTS = [test_rates, test_table, test_nonsense]
"""

# A true function behind its stub, as `functools.wraps` keeps it.
BYPASS = """
import minimuse.masking

def {name}(n, power, generator=None):
    return minimuse.masking.{of}.__wrapped__(n, generator=generator) ** power
"""

# A library may not be known by its identity: mutants are copies, and so is the truth.
IDENTITY = """
def test_identity(lib):
    for name, module in vars(lib).items():
        assert module is sys.modules[f"minimuse.{name}"]

def test_file(lib):
    assert hasattr(lib.masking, "__file__") and hasattr(lib.sampler, "__file__")

def test_code_names(lib):
    for f in (lib.masking.sample_mask_rate, lib.masking.reveal_counts, lib.sampler.decode):
        assert f.__code__.co_filename in ("masking.py", "sampler.py")

TESTS = [test_identity, test_file, test_code_names]
"""

VARIANTS = {GUIDANCE: {"guidance": "across", "editing": "kept"}}  # where the price of a mistake depends on them

# assignment -> what is handed in, and what it costs: tests that give nothing, or {test: marks}
WRONG = {
    MASKING: [
        ({"mask_rate": "from minimuse.masking import sample_mask_rate as mask_rate"}, ["test_mask_rate"]),
        ({"mask_rate": ("torch.cos(", "2 / math.pi * torch.acos(2 / math.pi * ")}, ["test_mask_rate"]),
        ({"random_mask": ("count[:, None]", "count.max()")}, ["test_random_mask"]),
        ({"random_mask": (".ceil()", ".round()")}, ["test_random_mask"]),
        ({"masked_loss": ("(loss * share).sum()", "loss.sum()")}, ["test_masked_loss"]),
        ({"masked_loss": ("    ### BEGIN", "    torch.zeros(10**12)\n    ### BEGIN")}, ["test_masked_loss"]),
        (
            {"reveal_counts": ("(i + 1) / steps", "i / max(steps - 1, 1)")},
            ["test_reveal_counts", "test_decode", "test_decode_draws", "test_choose_in_decode"],
        ),
        (
            {
                "decode": (
                    "(scores, masked, torch.tensor([plan[i] for plan in plans]))",
                    "(scores, masked, torch.tensor([plans[0][i]] * len(tokens)))",
                )
            },
            ["test_decode"],
        ),
        (
            {
                "decode": (
                    "torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(tokens.shape)",
                    "p.argmax(-1)",
                )
            },
            ["test_decode", "test_decode_draws"],
        ),
        ({"decode": ("p.gather(-1, drawn[..., None])[..., 0].log()", "p.amax(-1).log()")}, ["test_decode_draws"]),
        ({"decode": ("keep & masked", "keep & masked | ~masked")}, ["test_decode", "test_choose_in_decode"]),
        ({"choose": "choose = surest"}, ["test_choose"]),
        ({"mask_rate": BYPASS.format(name="mask_rate", of="sample_mask_rate")}, ["test_mask_rate"]),
        ({"zoo_tests": IDENTITY}, ["test_zoo"]),
        ({"zoo_tests": ZOO}, {"test_zoo": 2.3}),
        ({"zoo_tests": "TESTS = []"}, ["test_zoo"]),
        ({"zoo_tests": "def test_always(lib):\n    assert False\n\n\nTESTS = [test_always]"}, ["test_zoo"]),
    ],
    GUIDANCE: [
        ({"guide": ("return cond + t", "return uncond + t")}, ["test_guide", "test_guided"]),
        (
            {
                "guide": (
                    "return cond + t * (cond - uncond)",
                    "from minimuse.cfg import guide as theirs\n    return theirs(cond, uncond, t)",
                )
            },
            ["test_guide", "test_guided"],
        ),
        ({"drop_text": ("< p", ">= p")}, ["test_drop_text"]),
        (
            {"drop_text": ("context.mask & ~drop[:, None]", "context.mask")},
            ["test_drop_text"],
        ),
        ({"guided": ("if t == 0", "if t == -1")}, ["test_guided"]),
        ({"token_mask": (".any(4).any(2)", ".all(4).all(2)")}, ["test_token_mask"]),
        ({"infill": ("tokens.masked_fill(repaint, mask_id)", "tokens")}, ["test_infill", "test_resample", "test_edit"]),
        (
            {
                "resample": (
                    "random_mask(tokens, torch.full((len(tokens),), share), generator)",
                    "random_mask(tokens, torch.full((len(tokens),), share), seeded())",
                )
            },
            ["test_resample"],
        ),
        ({"zoo_tests": ("    assert model(torch", "    assert not model(torch")}, {"test_zoo": 13.0}),
    ],
    SCHEDULE: [
        ({"paired": ("student_t(len(d) - 1)", "1.96")}, ["test_paired"]),
        (
            {
                "paired": "from minimuse.eval_metrics import paired_difference\n\n\n"
                "def paired(a, b):\n    return paired_difference(a, b)"
            },
            ["test_paired"],
        ),
        (
            {"my_schedule": "def my_schedule(u):\n    return math.cos(math.pi / 2 * u)"},
            ["test_my_schedule", "test_it_wins"],
        ),
        ({"make_rule": "from minimuse.lab_samplers import entropy_bound as make_rule"}, ["test_rule"]),
        (
            {
                "interval_tests": (
                    "TESTS += [test_by_hand, test_pairs_matter, test_shrinks_with_the_root_of_n]",
                    "TESTS += [test_pairs_matter]",
                )
            },
            {"test_interval_tests": 2.1},
        ),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_wrong_submissions_get_what_they_deserve(name):
    key = next(f"key {i}" for i in range(200) if options(name, f"key {i}").items() >= VARIANTS.get(name, {}).items())
    source = make.notebook(name, key)
    found = run(name, [without_what_is_slow(edited(source, changes), changes) for changes, _ in WRONG[name]])
    for (changes, costs), marks in zip(WRONG[name], found, strict=True):
        costs = costs if isinstance(costs, dict) else dict.fromkeys(costs, 0)
        got = {test: mark for test, (mark, _) in marks.items()}
        assert costs.keys() <= got.keys()
        assert got == {test: n for test, n in (points(source) | costs).items() if test in got}, f"{changes}: {marks}"


# Slow tests, and the only answer that each of them reads.
READS = {"test_zoo": "zoo_tests", "test_it_wins": "my_schedule", "test_interval_tests": "interval_tests"}


def without_what_is_slow(nb, changes):
    """A copy without cells that are only looked at, and without slow tests of answers that were not changed."""
    nb = edited(nb, {})
    nb.cells = [c for c in nb.cells if about(c) and READS.get(about(c)["grade_id"]) in {None, *changes}]
    return nb


# The answers that the course's notebooks show in folded cells, under the names of the assignment's tasks.
FOLDED = {
    MASKING: {"mask_rate": "my_rate", "random_mask": "my_mask", "masked_loss": "my_loss"}
    | {"reveal_counts": "my_reveal_counts", "decode": "my_decode"},
    GUIDANCE: {"guide": "my_guide", "drop_text": "my_drop_text", "token_mask": "my_token_mask"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDED)
def test_folded_solutions_of_the_notebooks_earn_nothing(name):
    """Every answer that the notebooks show is handed in as it is, with each task's name. No test passes by that."""
    folded = []
    for path in sorted((ROOT / "notebooks" / "source").glob("*.py")):
        folded += re.findall(r'^# %% tags=\["solution"\]\n(.*?)(?=^# %%)', path.read_text(), flags=re.M | re.S)
    shown = "".join(re.sub(r"^check_.*$", "", cell, flags=re.MULTILINE) + "\n" for cell in folded if "def my_" in cell)
    pasted = {
        task: f"from torch.nn import functional as F\n{shown}\n{task} = {mine}" for task, mine in FOLDED[name].items()
    }
    pasted = {task: text for task, text in pasted.items() if f"def {FOLDED[name][task]}(" in text}
    assert len(pasted) == len(FOLDED[name]), "a solution has another name now"
    if "decode" in pasted:
        pasted["decode"] += "\nsurest = None\nfrom minimuse.masking import reveal_counts as theirs"
    if "guide" in pasted:
        pasted["guide"] += "\nrising = my_rising"
    (marks,) = run(name, [without_what_is_slow(edited(stored(name), pasted), pasted)])
    assert {test: got for test, (got, _) in marks.items() if got} == {}


@pytest.mark.slow
def test_what_never_ends_costs_only_its_own_marks():
    source = make.notebook(MASKING, SELF_STUDY)
    loop = {"reveal_counts": ("    steps, left", "    while True:\n        pass\n    steps, left")}
    (marks,) = run(MASKING, [without_what_is_slow(edited(source, loop), loop)], seconds=2)
    lost = ["test_reveal_counts", "test_decode", "test_decode_draws", "test_choose_in_decode"]
    assert [test for test, (mark, _) in marks.items() if not mark] == lost


# --- the releases that are stored, for self-study ---------------------------------------------------------------------


def stored(name: str):
    path = FOLDER / f"{name}.ipynb"
    how = f"make.py COURSE --key {SELF_STUDY}, then copy COURSE/release/{name}/{name}.ipynb"
    assert path.is_file(), f"{name} has no stored release; run {how} to notebooks/assignments"
    return nbformat.read(path, as_version=4)


def regions(text: str) -> tuple[set[str], set[str]]:
    """Lines within BEGIN ... END, and lines outside."""
    inside, found = False, (set(), set())
    for line in text.splitlines():
        if "### BEGIN" in line or "### END" in line:
            inside = "### BEGIN" in line
        else:
            found[0 if inside else 1].add(line.strip())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_release_tells_nothing(name):
    source, release = make.notebook(name, SELF_STUDY), stored(name)
    told = "\n".join(cell.source for cell in release.cells)
    assert "BEGIN" not in told
    parts = [regions(cell.source) for cell in source.cells if cell.cell_type == "code"]
    secret = set().union(*(a for a, _ in parts)) - set().union(*(b for _, b in parts))
    written = [cell for cell in source.cells if cell.cell_type == "markdown" and about(cell).get("grade")]
    secret |= {line for cell in written for line in cell.source.splitlines()}
    secret = {line for line in secret if len(line) >= 16}
    assert len(secret) > 50
    assert not secret & {line.strip() for line in told.splitlines()}
    assert [about(c).get("grade_id") for c in release.cells] == [about(c).get("grade_id") for c in source.cells]
    assert not any(cell.get("outputs") for cell in release.cells)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="sessions and limits are POSIX")
def test_a_submission_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
    child = f"import time, pathlib; pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    why = grade.limited([sys.executable, "-c", parent], tmp_path, os.environ, tmp_path / "log", 5, 4)
    assert why == "stopped after 5 s"
    if (tmp_path / "started").exists():
        assert not [p for p in psutil.process_iter(["cmdline"]) if child in (p.info["cmdline"] or [])]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to a limit of memory")
def test_memory_is_limited(tmp_path):
    hog = [sys.executable, "-c", "x = bytearray(3 * 2**30)"]
    assert grade.limited(hog, tmp_path, os.environ, tmp_path / "log", 60, 1).startswith("did not end well")
    assert "MemoryError" in (tmp_path / "log").read_text()
    assert grade.limited([sys.executable, "-c", "pass"], tmp_path, os.environ, tmp_path / "log", 60, 1) == ""


@pytest.mark.skipif(os.name != "posix", reason="sessions and limits are POSIX")
def test_a_note_names_the_error_and_not_the_code_that_mentions_one(tmp_path):
    says = "print('nbclient.DeadKernelError: Kernel died'); print('except NotImplementedError:'); raise SystemExit(1)"
    why = grade.limited([sys.executable, "-c", says], tmp_path, os.environ, tmp_path / "log", 60, 4)
    assert why.startswith("did not end well: nbclient.DeadKernelError: Kernel died (see ")


def test_no_script_of_a_student_runs_in_formgrader():
    exporters = pytest.importorskip("nbconvert.exporters", reason="the extra `grading` is not installed")
    from traitlets.config import Config

    config = Config()
    exec(make.CONFIG, {"get_config": lambda: config})
    shown = nbformat.v4.new_output("display_data", data={"text/html": "<script>steal()</script><b>fine</b>"})
    written = nbformat.v4.new_markdown_cell("**bold** <img src=x onerror='steal()'> <script>steal()</script>")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[shown]), written])
    page = exporters.HTMLExporter(config=config, template_name="classic").from_notebook_node(nb)[0]
    assert "<b>fine</b>" in page
    assert "<strong>bold</strong>" in page
    assert not re.search(r"<script>steal|<img[^>]*onerror", page)


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        (folder / path).touch()


def test_submissions_are_found(tmp_path):
    touch(tmp_path, "anna.ipynb", "ben/x.ipynb", "ben/y.ipynb", "Zoë Q.ipynb")
    touch(tmp_path, "carl/my homework.ipynb", "dora/x (1).ipynb", "emil/submission/x.ipynb")
    touch(tmp_path, "emil/submission/.ipynb_checkpoints/x-checkpoint.ipynb", ".DS_Store")
    found, passed = grade.submissions(tmp_path, "x")
    assert {student: path.name for student, path in found.items()} == {
        "Zoë_Q": "Zoë Q.ipynb",
        "anna": "anna.ipynb",
        "ben": "x.ipynb",
        "carl": "my homework.ipynb",
        "dora": "x (1).ipynb",
        "emil": "x.ipynb",
    }
    assert passed == {}


def test_what_was_passed_over_stays_in_the_marks_until_it_is_graded(tmp_path):
    path = tmp_path / "logs" / "x" / "passed.json"
    assert grade.remember(path, {"ben": "no notebook", "zip": "no folder"}, ["ann"]) == {
        "ben": "no notebook",
        "zip": "no folder",
    }
    assert grade.remember(path, {}, ["ann"]) == {"ben": "no notebook", "zip": "no folder"}, (
        "read again without a folder"
    )
    assert grade.remember(path, {"eve": "no notebook"}, ["ann", "ben"]) == {"zip": "no folder", "eve": "no notebook"}


def test_what_is_passed_over_is_named(tmp_path):
    touch(tmp_path, "anna.ipynb", "ben/a.ipynb", "ben/b.ipynb", "carl/report.pdf", "dora.zip")
    found, passed = grade.submissions(tmp_path, "x")
    assert list(found) == ["anna"]
    assert list(passed) == ["ben", "carl", "dora.zip"]
    assert "2 notebooks (ben/a.ipynb, ben/b.ipynb); expected one x.ipynb" in passed["ben"]
    assert "no notebook" in passed["carl"]


def test_folders_that_hold_no_submission_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no notebook"):
        grade.submissions(tmp_path, "x")
    with pytest.raises(ValueError, match="not a folder"):
        grade.submissions(tmp_path / "nobody", "x")
    touch(tmp_path, "ben.ipynb", "ben/x.ipynb")
    with pytest.raises(ValueError, match="both belong to 'ben'"):
        grade.submissions(tmp_path, "x")


def test_deleted_cells_are_put_back_where_they_stood(tmp_path):
    release = stored(MASKING)
    ids = [about(c).get("grade_id") for c in release.cells]
    gone = {"setup", "test_mask_rate", "test_decode", "test_decode_draws"}
    left = edited(release, {})
    left.cells = [c for c in left.cells if about(c).get("grade_id") not in gone]
    nbformat.write(left, tmp_path / "x.ipynb")
    (tmp_path / "x.ipynb").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "x.ipynb").read_bytes())  # a byte-order mark
    back = [about(c).get("grade_id") for c in grade.restored(tmp_path / "x.ipynb", release).cells]
    assert [i for i in back if i] == [i for i in ids if i]


def test_damaged_notebooks_are_refused_with_the_cause(tmp_path):
    release = stored(MASKING)
    path = tmp_path / "x.ipynb"
    nbformat.write(release, path)
    path.write_text(path.read_text()[:5000])
    with pytest.raises(ValueError, match=r"x\.ipynb cannot be read as a notebook: .*JSON"):
        grade.restored(path, release)
    copied = edited(release, {})
    copied.cells.append(next(c for c in copied.cells if about(c).get("grade_id") == "mask_rate"))
    nbformat.write(copied, path)
    with pytest.raises(ValueError, match="holds the cell mask_rate twice"):
        grade.restored(path, release)


def test_solutions_that_fail_are_told(tmp_path):
    nb = edited(stored(MASKING), {})
    nbformat.write(nb, tmp_path / "x.ipynb")
    assert make.failed_cells(tmp_path / "x.ipynb") == []
    cell = next(c for c in nb.cells if about(c).get("grade_id") == "test_decode")
    cell.outputs = [nbformat.v4.new_output("error", ename="ImportError", evalue="needs scipy", traceback=[])]
    nbformat.write(nb, tmp_path / "x.ipynb")
    assert make.failed_cells(tmp_path / "x.ipynb") == ["test_decode: ImportError needs scipy"]
    assert make.environment(MASKING, SELF_STUDY)["OMP_NUM_THREADS"] == "1"


def test_the_seed_that_marks_come_from_is_in_no_release():
    seeds = set()
    for key in ("a", "b"):
        (cell,) = [c for c in make.notebook(SCHEDULE, key).cells if about(c).get("grade_id") == "test_it_wins"]
        hidden = re.search(r"BEGIN HIDDEN TESTS\n_beaten = _beaten_with\(seed=(\d+)\)", cell.source)
        seeds.add(hidden[1])
    assert len(seeds) == 2, "the seed depends on the key"
    assert not any(seed in str(stored(SCHEDULE)) for seed in seeds)


# --- the whole way, by nbgrader ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    pytest.importorskip("nbgrader", reason="the extra `grading` is not installed")
    if os.name != "posix":
        pytest.skip("grading is for Linux and macOS, as the instructor's page says")
    folder = tmp_path_factory.mktemp("course")
    make.write_sources(folder, SELF_STUDY)
    for name in NAMES:
        make.nbgrader(folder, name, "generate_assignment", name)
    return folder


@pytest.mark.slow
def test_stored_releases_are_what_nbgrader_makes(course):
    for name in NAMES:
        made = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
        assert [(c.source, c.metadata) for c in stored(name).cells] == [(c.source, c.metadata) for c in made.cells]
    with pytest.raises(SystemExit, match="another key"):
        make.write_sources(course, "other")


@pytest.mark.slow
def test_from_a_folder_of_submissions_to_marks(course, tmp_path, monkeypatch):
    source = make.notebook(MASKING, SELF_STUDY)
    release = nbformat.read(course / "release" / MASKING / f"{MASKING}.ipynb", as_version=4)
    answers = {about(c)["grade_id"]: c.source for c in source.cells if about(c).get("solution")}
    perfect = edited(release, answers)
    too_much = "torch.zeros(10**12)" if sys.platform == "linux" else "raise MemoryError"  # only Linux keeps to limits
    wrong = {
        "mask_rate": "from minimuse.masking import sample_mask_rate as mask_rate",
        "masked_loss": ("    ### BEGIN", f"    {too_much}\n    ### BEGIN"),
        "decode": ("    for i in range(steps):", "    while True:\n        pass\n    for i in range(steps):"),
        "test_batch_rates": "assert True  # tampered with",
        "batch_rates": "def batch_rates(*args, **settings):\n    return torch.zeros(4)",
    }
    handed_in = {
        "anna": perfect,
        "ben": release,
        "carl": edited(perfect, wrong),
        "dora": edited(perfect, {"mask_rate": "import os\n\nos._exit(1)"}),
    }
    for student, nb in handed_in.items():
        nbformat.write(nb, tmp_path / f"{student}.ipynb")
    (tmp_path / "emil.ipynb").write_text("no notebook")
    (tmp_path / "fritz").mkdir()
    (tmp_path / "fritz" / "report.pdf").touch()
    out = tmp_path / "marks.csv"
    command = ["grade.py", str(course), MASKING, str(tmp_path), "--out", str(out), "--cell-seconds", "10"]
    monkeypatch.setattr(sys, "argv", command)
    grade.main()
    with open(out, encoding="utf-8") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    full = {test: str(float(n)) for test, n in points(source).items()}
    got = {student: {test: row[test] for test in full} for student, row in rows.items()}
    assert got["anna"] == full, rows["anna"]["note"]
    assert [rows["anna"][x] for x in ("total", "of", "to grade by hand")] == ["85.0", "100", "explanation"]
    assert set(got["ben"].values()) == {"0.0"}
    assert rows["ben"]["to grade by hand"] == "", "what was not answered needs no reading"
    lost = [
        "test_mask_rate",
        "test_masked_loss",
        "test_batch_rates",
        "test_decode",
        "test_decode_draws",
        "test_choose_in_decode",
    ]
    assert got["carl"] == full | dict.fromkeys(lost, "0.0"), rows["carl"]["note"]
    assert "test_decode: CellTimeoutError" in rows["carl"]["note"]
    for student in ("dora", "emil"):
        assert set(got[student].values()) == {"0.0"}
    assert rows["dora"]["note"].startswith("did not end well: ")
    assert "DeadKernelError" in rows["dora"]["note"]
    assert rows["emil"]["note"].startswith("emil.ipynb cannot be read as a notebook")
    assert "no notebook" in rows["fritz"]["note"]
    with pytest.raises(SystemExit, match="exists"):
        grade.main()
