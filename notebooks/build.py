"""Notebooks from their sources: python notebooks/build.py [01_tour ...] [--fast | --text]

    source/NN_name.py, cells in percent format --notebook--> cells --execute--> NN_name.ipynb with its outputs

The sources are what people edit and review; Jupyter, VS Code and PyCharm open them as notebooks too. A notebook is
written only when all of its cells ran. What each takes comes from measured.json, which `measure.py` writes.
Where a source has ### BEGIN SOLUTION ... ### END SOLUTION, a second notebook NN_name_yours.ipynb has blanks there.
Conventions for authors: README.md beside this file.
"""

import argparse
import base64
import io
import json
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

HERE = Path(__file__).resolve().parent
SOURCES, MEASURED, CITATION = HERE / "source", HERE / "measured.json", HERE.parent / "CITATION.cff"
TAKES = "@takes@"  # in a header: minutes and memory, once they are measured
SETUP = """\
# Does nothing in a clone where minimuse is installed. Elsewhere, as on Colab, it installs minimuse: a minute or two.
import importlib.util
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

ARCHIVE = os.environ.get("MINIMUSE_ARCHIVE", "@archive@")  # address of a .zip of the repository
missing = importlib.util.find_spec("minimuse") is None
if missing and not Path("../notebooks/checks.py").exists():
    assert ARCHIVE, "set MINIMUSE_ARCHIVE to the address of minimuse's .zip, or open this notebook in a clone"
    shutil.unpack_archive(urllib.request.urlretrieve(ARCHIVE, "minimuse.zip")[0], "minimuse-course")
CLONE = next(Path("minimuse-course").glob("*"), Path(".."))  # the archive's only folder, or this clone
if missing:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{CLONE}[offline,eval]"], check=True)
    importlib.invalidate_caches()
sys.path.append(str(CLONE / "notebooks"))  # checks.py, for the exercises"""


def names() -> list[str]:
    """The notebooks that have a source, in the order of the course."""
    return sorted(path.stem for path in SOURCES.glob("[0-9][0-9]*_*.py"))


def repository() -> str:
    """The address on GitHub that CITATION.cff gives as `repository-code`; empty if it gives none."""
    text = CITATION.read_text(encoding="utf-8")
    found = re.search(r"^repository-code: *\"?(https://github\.com/[\w.-]+/[\w.-]+?)/?\"?$", text, flags=re.MULTILINE)
    return found[1] if found else ""


def takes(name: str) -> str:
    """A notebook's row of measured.json in words."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    if name not in rows:
        return "not measured yet"
    row = rows[name]
    if "fp32" not in row:
        minutes, gib = row["bf16"]["minutes"], row["bf16"]["gib"]
        return f"{minutes:.1f} minutes on one CPU core where bf16 is fast; {gib:.1f} GiB of memory at most"
    return (
        f"{row['fp32']['minutes']:.1f} minutes on {row['cores']} CPU cores in fp32, {row['bf16']['minutes']:.1f} where "
        f"bf16 is fast; {max(row[p]['gib'] for p in ('fp32', 'bf16')):.1f} GiB of memory at most"
    )


def cells(text: str) -> list[tuple[str, str]]:
    """A source -> (kind, text) of each cell, kind "markdown", "code" or "solution".

    >>> cells('# %%\\nx = 1\\n# %% tags=["solution"]\\ny = 2')
    [('code', 'x = 1'), ('solution', 'y = 2')]
    """
    before, *parts = re.split(r"^# %%(.*)$", text, flags=re.MULTILINE)
    if before.strip() or not parts:
        raise ValueError("a source begins with its first cell, a line of # %% [markdown]")
    found = []
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        body = body.strip()
        kind = "markdown" if "[markdown]" in head else "solution" if '"solution"' in head else "code"
        if kind == "markdown":
            quoted = re.fullmatch(r'r?"""\n?(.*?)\n?"""', body, flags=re.DOTALL)
            if quoted is None:
                raise ValueError(f'a markdown cell is one r""" text """; this one begins {body[:60]!r}')
            body = quoted[1]
        if not body.strip():
            raise ValueError(f"an empty {kind} cell stands after {found[-1:] or 'the beginning'}")
        found.append((kind, body))
    return found


def notebook(name: str, blanks: bool = False) -> nbformat.NotebookNode:
    """A source by name -> its notebook, not yet executed: the header, the setup, then what the author wrote.

    With `blanks`, what stands between BEGIN and END SOLUTION is left for students to write.
    """
    text = (SOURCES / f"{name}.py").read_text(encoding="utf-8")
    if blanks:
        text = re.sub(r"### BEGIN SOLUTION.*?### END SOLUTION", "...  # your code", text, flags=re.DOTALL)
    header, *rest = cells(re.sub(r" *### (BEGIN|END) SOLUTION\n", "", text))
    header = (header[0], header[1].replace(TAKES, takes(name)))
    setup = SETUP.replace("@archive@", f"{address}/archive/HEAD.zip" if (address := repository()) else "")
    if address:
        page = f"{address}/blob/HEAD/notebooks/{name}{'_yours' * blanks}.ipynb"
        page = page.replace("https://github.com", "https://colab.research.google.com/github")
        badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({page})"
        header = (header[0], f"{header[1]}\n\n{badge}")
    nb = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    for i, (kind, text) in enumerate([header, ("code", setup), *rest]):
        cell = new_markdown_cell(text) if kind == "markdown" else new_code_cell(text)
        cell.id = f"cell-{i:02}"  # the same each time, so that a change shows as a change
        if kind == "solution":  # Jupyter folds it away; Colab does so by cellView
            cell.metadata = {"tags": ["solution"], "jupyter": {"source_hidden": True}, "cellView": "form"}
        nb.cells.append(cell)
    return nb


def slim(data: dict) -> None:
    """An output with a PNG: Jupyter's coarse JPEG goes; a fine one takes its place where that spares a quarter."""
    data.pop("image/jpeg", None)
    png, jpeg = base64.b64decode(data["image/png"]), io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(jpeg, "JPEG", quality=80, subsampling=0, optimize=True)
    if len(png) > 20_000 and len(jpeg.getvalue()) < len(png) * 3 / 4:
        del data["image/png"]
        data["image/jpeg"] = base64.b64encode(jpeg.getvalue()).decode()


def execute(nb: nbformat.NotebookNode, fast: bool = False, timeout: int = 1800) -> nbformat.NotebookNode:
    """Run all cells in a fresh kernel and an empty folder, in place; CellExecutionError at the first that fails.

    The kernel imports minimuse and checks.py from this clone, even if another minimuse is installed.
    """
    env = {k: v for k, v in os.environ.items() if k not in ("MINIMUSE_FAST", "MPLBACKEND")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), str(HERE), env.get("PYTHONPATH")]))
    env |= {"MINIMUSE_FAST": "1"} if fast else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = {"timeout": timeout, "startup_timeout": 600, "kernel_name": "python3"}
        tidy = {"store_widget_state": False, "record_timing": False, "coalesce_streams": True}
        where = {"resources": {"metadata": {"path": folder}}}
        NotebookClient(nb, **run, **tidy, **where).execute(env=env)
    for out in (out for cell in nb.cells for out in cell.get("outputs", [])):
        if "image/png" in out.get("data", {}):
            slim(out["data"])
    nb.metadata = {
        "kernelspec": nb.metadata["kernelspec"],
        "language_info": {"name": "python"},
        "minimuse": {"setting": "fast" if fast else "full"},
    }
    return nb


def retext(name: str) -> nbformat.NotebookNode:
    """The stored notebook with the texts of its source, and the outputs it has; ValueError where code has changed."""
    old, new = nbformat.read(HERE / f"{name}.ipynb", as_version=4), notebook(name)
    code = [[cell.source for cell in nb.cells if cell.cell_type == "code"] for nb in (old, new)]
    if code[0] != code[1]:
        raise ValueError(f"the code of {name} has changed since it was executed; build it without --text")
    ran = iter(cell for cell in old.cells if cell.cell_type == "code")
    for cell in (cell for cell in new.cells if cell.cell_type == "code"):
        was = next(ran)
        cell.outputs, cell.execution_count = was.outputs, was.execution_count
    new.metadata = old.metadata
    return new


def store(name: str, nb: nbformat.NotebookNode) -> Path:
    """Write it under a new name, then rename: a stopped build leaves the old notebook whole."""
    path = HERE / f"{name}.ipynb"
    new = path.with_suffix(".new")
    nbformat.write(nb, new)
    new.replace(path)
    if (yours := notebook(name, blanks=True)) != notebook(name):
        nbformat.write(yours, path.with_stem(f"{name}_yours"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="build notebooks from source/, execute them and store them")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; none is all of {', '.join(names())}")
    parser.add_argument("--fast", action="store_true", help="the tests' setting: fewer pictures, fewer steps")
    parser.add_argument("--text", action="store_true", help="renew texts and what was measured; run nothing")
    args = parser.parse_args()
    for name in args.names or names():
        began = time.monotonic()
        nb = retext(name) if args.text else execute(notebook(name), args.fast)
        path = store(name, nb)
        size, took = path.stat().st_size / 1e3, time.monotonic() - began
        print(f"{path.name}: {len(nb.cells)} cells, {size:.0f} kB, {took:.0f} s")


if __name__ == "__main__":
    main()
