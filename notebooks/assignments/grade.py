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
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
import psutil
from make import environment


def submissions(folder: Path, name: str) -> dict[str, Path]:
    """Student -> notebook. ValueError where two files claim one student, or where there are none."""
    found: dict[str, Path] = {}
    for path in [*sorted(folder.glob("*.ipynb")), *sorted(folder.glob(f"*/{name}.ipynb"))]:
        student = re.sub(r"[^\w.-]", "_", path.stem if path.parent == folder else path.parent.name)
        if student in found:
            raise ValueError(f"{found[student]} and {path} are both of {student!r}; rename one of them")
        found[student] = path
    if not found:
        raise ValueError(f"{folder} holds neither STUDENT.ipynb nor STUDENT/{name}.ipynb")
    return found


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
    return f"did not end well: see {log.parent.name}/{log.name}" if code else ""


def autograde(
    course: Path, name: str, student: str, notebook: Path, *, seconds: float, cell_seconds: int, gigabytes: float
) -> str:
    """One submission into the gradebook -> "", or why it got no marks; COURSE/logs keeps it."""
    place = course / "submitted" / student / name
    place.mkdir(parents=True, exist_ok=True)
    shutil.copy(notebook, place / f"{name}.ipynb")
    logs = course / "logs" / name
    logs.mkdir(parents=True, exist_ok=True)
    env = environment(name, (course / "KEY").read_text(encoding="utf-8")) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nbgrader", "autograde", name, "--student", student, "--force"]
    command.append(f"--Execute.timeout={cell_seconds}")
    why = limited(command, course, env, logs / f"{student}.log", seconds, gigabytes)
    (logs / f"{student}.note").write_text(why, encoding="utf-8")
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
    rows = []
    with Gradebook(f"sqlite:///{(course / 'gradebook.db').resolve()}") as book:
        for submission in book.assignment_submissions(name):
            student = submission.student.id
            grades = {grade.name: grade for grade in submission.notebooks[0].grades}
            note = course / "logs" / name / f"{student}.note"
            why = note.read_text(encoding="utf-8") if note.is_file() else ""
            left = [] if why else [g for g in cells if g in grades and grades[g].needs_manual_grade]
            scored = {g: 0.0 if why or g not in grades else grades[g].score or 0.0 for g in cells}
            row = {"student": student, **{g: "" if g in left else scored[g] for g in cells}}
            row |= {"total": sum(scored.values()), "of": sum(cells.values()), "to grade by hand": " ".join(left)}
            row["note"] = why or errors(course / "autograded" / student / name / f"{name}.ipynb")
            rows.append(row)
    return sorted(rows, key=lambda row: row["student"])


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
    found = submissions(args.submissions, args.name) if args.submissions else {}
    for i, (student, notebook) in enumerate(found.items(), 1):
        why = autograde(args.course, args.name, student, notebook, **limits)
        print(f"{i} of {len(found)}: {student}{': ' if why else ''}{why}", flush=True)
    if not (rows := marks(args.course, args.name)):
        raise SystemExit(f"nothing of {args.name} was graded yet; give the folder of submissions")
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(f"{len(rows)} students in {args.out}")


if __name__ == "__main__":
    main()
