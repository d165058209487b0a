"""Grade a folder of submissions: python notebooks/assignments/grade.py COURSE NAME SUBMISSIONS --out marks.csv

    SUBMISSIONS/anna.ipynb or .../anna/NAME.ipynb --nbgrader autograde, limited--> COURSE/gradebook.db --> marks.csv

nbgrader does the grading: it puts tests back, runs the notebook, stops a cell that takes too long, and keeps the marks.
What it lacks stands here: a limit of time and of memory on each submission, the stubs, and marks cell by cell. A
submission that is stopped or dies gets 0, with a note, and the next one is graded.

STUDENTS' CODE RUNS HERE, with your rights: it may read, write and send what you may. Use a machine, an account or a
container that has nothing to lose; README.md says how.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import nbformat
import psutil
from make import environment


def submissions(folder: Path, name: str) -> tuple[dict[str, Path], dict[str, str]]:
    """A folder -> (student -> notebook, student or file -> why it is passed over).

    STUDENT.ipynb is one submission. In a folder STUDENT/, at any depth, we take NAME.ipynb, or its only notebook.
    ValueError where two files belong to one student, or where there is no notebook.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; expected one that holds STUDENT.ipynb or STUDENT/{name}.ipynb")
    found: dict[str, Path] = {}
    passed: dict[str, str] = {}
    for entry in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        notebooks = [entry] if entry.suffix == ".ipynb" else []
        if entry.is_dir():
            notebooks = [p for p in sorted(entry.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
            notebooks = [p for p in notebooks if p.name == f"{name}.ipynb"] or notebooks
        student = re.sub(r"[^\w.-]", "_", entry.name if entry.is_dir() else entry.stem)
        if len(notebooks) != 1:
            several = f"{len(notebooks)} notebooks ({', '.join(str(p.relative_to(folder)) for p in notebooks)})"
            what = several if notebooks else "no notebook"
            passed[student if entry.is_dir() else entry.name] = f"not graded: {what}; expected one {name}.ipynb"
        elif student in found:
            raise ValueError(f"{found[student]} and {notebooks[0]} both belong to {student!r}; rename one of them")
        else:
            found[student] = notebooks[0]
    if not found:
        raise ValueError(f"{folder} holds no notebook; expected STUDENT.ipynb or STUDENT/{name}.ipynb")
    return found, passed


def restored(notebook: Path, source: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A submission with deleted tests and locked cells put back, each after the cell that it followed in `source`.

    ValueError, with the cause, where the file is no notebook or a graded cell stands in it twice.
    """
    try:
        nb = nbformat.reads(notebook.read_text(encoding="utf-8-sig"), as_version=4)
        ids = [cell.metadata.get("nbgrader", {}).get("grade_id") for cell in nb.cells]
    except Exception as error:  # nbformat raises many kinds
        raise ValueError(
            f"{notebook.name} cannot be read as a notebook: {str(error) or type(error).__name__}"
        ) from None
    named = [grade_id for grade_id in ids if grade_id]
    if twice := sorted({grade_id for grade_id in named if named.count(grade_id) > 1}):
        raise ValueError(f"{notebook.name} holds the cell {', '.join(twice)} twice; delete the copy and grade again")
    place = 0
    for cell in source.cells:
        about = cell.metadata.get("nbgrader")
        if about and about["grade_id"] in ids:
            place = ids.index(about["grade_id"]) + 1
        elif about and not about["solution"]:
            nb.cells.insert(place, cell)
            ids.insert(place, about["grade_id"])
            place += 1
    return nb


def limited(
    command: Sequence[str], folder: Path, env: Mapping[str, str], log: Path, seconds: float, gigabytes: float
) -> str:
    """Run a command and all that it starts -> "", or why it did not end well. What it says goes to `log`.

    `gigabytes` bounds the memory that each of its processes may ask for; only Linux keeps to it.
    """

    def limit() -> None:  # in the child, before it becomes the command; what that starts inherits it
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 2**30),) * 2)

    how = {"preexec_fn": limit, "start_new_session": True} if os.name == "posix" else {}
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **how
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            tree = psutil.Process(process.pid)
            for one in [*tree.children(recursive=True), tree]:  # a kernel is in a session of its own
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
            return f"stopped after {seconds:g} s"
    if not code:
        return ""
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    cause = next((line for line in reversed(said) if re.match(r"[\w.]*(Error|Exception)\b", line)), "")
    return f"did not end well: {cause[:300]} (see {log.parent.name}/{log.name})"


def autograde(
    course: Path, name: str, student: str, notebook: Path, *, seconds: float, cell_seconds: int, gigabytes: float
) -> str:
    """One submission into the gradebook -> "", or why it got no marks; COURSE/logs keeps it."""
    logs = course / "logs" / name
    place = course / "submitted" / student / name
    for folder in (logs, place):
        folder.mkdir(parents=True, exist_ok=True)
    note = logs / f"{student}.note"
    try:
        release = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
        nbformat.write(restored(notebook, release), place / f"{name}.ipynb")
    except ValueError as error:
        note.write_text(str(error), encoding="utf-8")
        return str(error)
    env = environment(name, (course / "KEY").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "nbgrader", "autograde", name, "--student", student, "--force"]
    command.append(f"--Execute.timeout={cell_seconds}")
    why = limited(command, course, env, logs / f"{student}.log", seconds, gigabytes)
    note.write_text(why, encoding="utf-8")
    return why


def errors(notebook: Path) -> str:
    """A notebook that was graded -> its tests that failed, and of what: "test_x: AssertionError"."""
    said = []
    for cell in nbformat.read(notebook, as_version=4).cells if notebook.is_file() else []:
        about = cell.metadata.get("nbgrader", {})
        kinds = [out.ename for out in cell.get("outputs", []) if out.output_type == "error"]
        if about.get("grade") and kinds:
            said.append(f"{about['grade_id']}: {kinds[-1]}")
    return "; ".join(said)


def marks(course: Path, name: str) -> list[dict[str, object]]:
    """A row a student: each graded cell, the total of them, what a person has still to grade, notes."""
    from nbgrader.api import Gradebook

    path = course / "source" / name / f"{name}.ipynb"
    about = [cell.metadata.get("nbgrader", {}) for cell in nbformat.read(path, as_version=4).cells]
    cells = {a["grade_id"]: a["points"] for a in about if a.get("grade")}
    notes = {p.stem: p.read_text(encoding="utf-8") for p in (course / "logs" / name).glob("*.note")}
    rows = []
    with Gradebook(f"sqlite:///{(course / 'gradebook.db').resolve()}") as book:
        graded = {s.student.id: s.notebooks[0].grades for s in book.assignment_submissions(name)}
        for student in sorted({*notes, *graded}):  # one that was stopped early may be in no gradebook
            grades = {grade.name: grade for grade in graded.get(student, [])}
            why = notes.get(student, "")
            left = [] if why else [g for g in cells if g in grades and grades[g].needs_manual_grade]
            scored = {g: 0.0 if why or g not in grades else grades[g].score or 0.0 for g in cells}
            row = {"student": student, **{g: "" if g in left else scored[g] for g in cells}}
            row |= {"total": sum(scored.values()), "of": sum(cells.values()), "to grade by hand": " ".join(left)}
            row["note"] = why or errors(course / "autograded" / student / name / f"{name}.ipynb")
            rows.append(row)
    return rows


def remember(path: Path, passed: dict[str, str], found: Collection[str]) -> dict[str, str]:
    """What was passed over so far, with why, kept in a file; without those of whom a notebook was found since."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = {student: why for student, why in (before | passed).items() if student not in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description="grade a folder of submissions; students' code runs here")
    parser.add_argument("course", type=Path, help="a folder that make.py made")
    parser.add_argument("name", help="an assignment")
    parser.add_argument("submissions", type=Path, nargs="?", help="left out: only read the marks from the gradebook")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    parser.add_argument("--force", action="store_true", help="write over CSV")
    parser.add_argument("--seconds", type=float, default=900, help="for one submission (default %(default)s)")
    parser.add_argument("--cell-seconds", type=int, default=30, help="for one cell (default %(default)s)")
    parser.add_argument("--gigabytes", type=float, default=8, help="for each process (default %(default)s)")
    args = parser.parse_args()
    if args.out.exists() and not args.force:
        raise SystemExit(f"{args.out} exists; give another name, or --force to write over it")
    if not (args.course / "source" / args.name).is_dir():
        raise SystemExit(f"{args.course} has no assignment {args.name!r}; make.py makes a course")
    limits = {"seconds": args.seconds, "cell_seconds": args.cell_seconds, "gigabytes": args.gigabytes}
    try:
        found, passed = submissions(args.submissions, args.name) if args.submissions else ({}, {})
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for student, why in passed.items():
        print(f"{student}: {why}", file=sys.stderr)
    for i, (student, notebook) in enumerate(found.items(), 1):
        why = autograde(args.course, args.name, student, notebook, **limits)
        print(f"{i} of {len(found)}: {student}{': ' if why else ''}{why}", flush=True)
    rows = marks(args.course, args.name)
    if not rows:
        raise SystemExit(f"nothing of {args.name} was graded yet; give the folder of submissions")
    passed = remember(args.course / "logs" / args.name / "passed.json", passed, [row["student"] for row in rows])
    rows += [{"student": student, "note": why} for student, why in passed.items()]
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(f"{len(rows)} students in {args.out}")


if __name__ == "__main__":
    main()
