"""Assignments from their sources: python notebooks/assignments/make.py COURSE --key KEY

    source/NAME.py, cells in percent format --notebook(key)--> COURSE/source/NAME/NAME.ipynb, nbgrader's own format
    --nbgrader--> COURSE/release/NAME (for students) and COURSE/solution/NAME (answers, executed under the stubs)

The key chooses the variants that this course sets: of cells with only=GROUP:OPTION, one option of each group is kept.
HIDDEN_SEED in a hidden test becomes a number that depends on the key.
What may stand after # %%:

    [markdown]                    text
    locked=ID                     code that the grader puts back as it was
    answer=ID                     the student's code; what stands between BEGIN and END SOLUTION is taken out
    test=ID points=N              graded; what stands between BEGIN and END HIDDEN TESTS is taken out
    [markdown] written=ID points=N    graded by a person
    stubs=masking,eval_metrics.jackknife  in the first cell: rooms and functions that are not to be called
Grading is `grade.py`'s; the page for instructors is README.md.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "source"
CONFIG = """\
# Written by make.py. Run nbgrader by grade.py, which sets limits and stubs; formgrader and export run as they are.
c = get_config()
c.CourseDirectory.course_id = "minimuse"
c.Execute.startup_timeout = 600
c.Execute.timeout = 300  # seconds for a cell of a solution; grade.py sets its own for students
c.Execute.iopub_timeout = 60  # a busy machine needs longer to stop a cell than nbgrader's 4 s, which cost all marks
# formgrader shows what students wrote: no script of theirs may run in your browser
c.HTMLExporter.preprocessors = ["nbconvert.preprocessors.sanitize.SanitizeHTML"]
stubs = "--IPKernelApp.exec_lines=__import__('stubs').place()"  # before the first cell
c.Execute.extra_arguments = ["--HistoryManager.hist_file=:memory:", stubs]
"""


def names() -> list[str]:
    """The assignments, in the order of the course."""
    return sorted(path.stem for path in SOURCES.glob("*.py"))


def cells(text: str) -> list[tuple[dict[str, str], str]]:
    """A source -> (what stands after # %%, text) of each cell; "markdown" is there or not.

    >>> cells('# %% test=x points=3\\nassert x == 1')
    [({'test': 'x', 'points': '3'}, 'assert x == 1')]
    """
    before, *parts = re.split(r"^# %%(.*)$", text, flags=re.MULTILINE)
    if before.strip() or not parts:
        raise ValueError("a source begins with its first cell, a line of # %% [markdown]")
    found = []
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        marks = {name: value for name, _, value in (word.partition("=") for word in shlex.split(head))}
        marks = {name.strip("[]"): value for name, value in marks.items()}
        body = body.strip()
        if "markdown" in marks:
            quoted = re.fullmatch(r'r?"""\n?(.*?)\n?"""', body, flags=re.DOTALL)
            if quoted is None:
                raise ValueError(f'a markdown cell is one r""" text """; this one begins {body[:60]!r}')
            body = quoted[1]
        found.append((marks, body))
    return found


def chosen(found: list[tuple[dict[str, str], str]], key: str) -> dict[str, str]:
    """Cells and the course's key -> the option of each group of variants."""
    groups: dict[str, list[str]] = {}
    for marks, _ in found:
        if "only" in marks:
            group, option = marks["only"].split(":")
            groups.setdefault(group, [])
            groups[group] += [option] * (option not in groups[group])
    number = {g: int.from_bytes(hashlib.sha256(f"{key}/{g}".encode()).digest()[:8], "big") for g in groups}
    return {group: options[number[group] % len(options)] for group, options in groups.items()}


def _grader(marks: dict[str, str], kind: str) -> dict:
    """nbgrader's metadata of a cell, or nothing where it is no business of nbgrader's."""
    roles = {"locked": (False, False), "answer": (False, True), "test": (True, False), "written": (True, True)}
    for role, (grade, solution) in roles.items():
        if role in marks:
            about = {"grade": grade, "solution": solution, "locked": not solution, "task": False}
            about |= {"grade_id": marks[role], "schema_version": 3, "cell_type": kind}
            return {"nbgrader": about | ({"points": int(marks["points"])} if grade else {})}
    return {}


def notebook(name: str, key: str) -> nbformat.NotebookNode:
    """An assignment by name -> nbgrader's source notebook, answers and hidden tests included."""
    found = cells((SOURCES / f"{name}.py").read_text(encoding="utf-8"))
    options = chosen(found, key)
    kept = [(m, body) for m, body in found if "only" not in m or options[(o := m["only"].split(":"))[0]] == o[1]]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nb = new_notebook(metadata={"kernelspec": spec, "minimuse": {"stubs": found[0][0].get("stubs", "")}})
    hidden_seed = str(int.from_bytes(hashlib.sha256(f"{key}/{name}".encode()).digest()[:4], "big"))
    for i, (marks, text) in enumerate(kept):
        text = text.replace("HIDDEN_SEED", hidden_seed)
        kind = "markdown" if "markdown" in marks else "code"
        cell = (new_markdown_cell if kind == "markdown" else new_code_cell)(text)
        cell.id, cell.metadata = f"cell-{i:02}", _grader(marks, kind)
        nb.cells.append(cell)
    return nb


def environment(name: str, key: str) -> dict[str, str]:
    """Environment variables of a process that runs an assignment: where `stubs.py` is, and what it replaces."""
    folders = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # nbgrader calls alembic
    stubs = notebook(name, key).metadata["minimuse"]["stubs"]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "PATH": path, "MINIMUSE_STUBS": stubs}
    return {
        **os.environ,
        **ours,
        "OMP_NUM_THREADS": "1",
    }  # with more threads, cells exceed their time on a busy machine


def write_sources(course: Path, key: str) -> None:
    """COURSE/nbgrader_config.py, KEY, and for each assignment source/NAME/ with its notebook, zoo.py and checks.py."""
    told = course / "KEY"
    if told.is_file() and told.read_text(encoding="utf-8") != key:
        raise SystemExit(f"{course} was made with another key; a course keeps its key, so give another folder")
    for name in names():
        folder = course / "source" / name
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook(name, key), folder / f"{name}.ipynb")
        for module in (HERE / "zoo.py", HERE.parent / "checks.py"):  # the notebook imports both
            shutil.copy(module, folder)
    told.write_text(key, encoding="utf-8")
    (course / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")


def nbgrader(course: Path, name: str, *command: str) -> None:
    """Run nbgrader in a course; SystemExit with what it said where it fails."""
    key = (course / "KEY").read_text(encoding="utf-8")
    run = [sys.executable, "-m", "nbgrader", *command]
    done = subprocess.run(run, cwd=course, env=environment(name, key), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nbgrader {' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def failed_cells(path: Path) -> list[str]:
    """An executed notebook -> its cells that hold an error: "test_x: CellTimeoutError"."""
    failed = []
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
        name = cell.metadata.get("nbgrader", {}).get("grade_id", f"cell {i}")
        failed += [
            f"{name}: {out.ename} {out.evalue}".strip() for out in cell.get("outputs", []) if out.output_type == "error"
        ]
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="make a course folder for nbgrader: source, release, solution")
    parser.add_argument("course", type=Path, help="a folder of its own; made if it is not there")
    parser.add_argument("--key", required=True, help="any text; another one sets other variants. Keep it to yourself")
    args = parser.parse_args()
    write_sources(args.course, args.key)
    for name in names():
        for command in ("generate_assignment", "generate_solution"):
            nbgrader(args.course, name, command, name, "--force")
        if failed := failed_cells(args.course / "solution" / name / f"{name}.ipynb"):
            raise SystemExit(f"the solution of {name} fails: {'; '.join(failed)}. Do not hand this release out")
        options = chosen(cells((SOURCES / f"{name}.py").read_text(encoding="utf-8")), args.key)
        print(f"{name}: release/{name}, solution/{name}; variants: {', '.join(options.values())}")


if __name__ == "__main__":
    main()
