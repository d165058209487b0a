"""The course as a static site: python notebooks/pages.py [--out site]. Needs the extra `site`.

    NN_name.ipynb, as stored, and the pages in Markdown --nbconvert--> site/NN_name.html, with navigation

The site works without a network and without scripts: formulas become MathML, styles and pictures stand in the pages.
Source files that a page links to are copied. Other links within the repository end at the site's first page.
"""

import argparse
import html
import re
import shutil
from pathlib import Path

import nbformat
from build import HERE, cells, names
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbformat.v4 import new_markdown_cell, new_notebook
from pygments.formatters import HtmlFormatter

ROOT = HERE.parent
TEXTS = {  # page -> its Markdown
    "index": HERE / "README.md",
    "glossary": HERE / "glossary.md",
    "ledger": HERE / "LEDGER.md",
    "assignments": HERE / "assignments" / "README.md",
}
CELL = '<div class="cell border-box-sizing'  # how nbconvert's basic template begins each cell
CSS = HERE / "pages.css"


def formula(tex: str, display: str) -> str:
    """LaTeX -> MathML, on one line, without characters that Markdown would read."""
    for old, new in ((r"\arg", r"\operatorname{arg}"), (r"\Big", ""), (r"\arccos ", r"\arccos\, "), ("\n", " ")):
        tex = tex.replace(old, new)  # what latex2mathml lacks
    return re.sub(r"[*_|]", lambda found: f"&#{ord(found[0])};", convert(tex.strip(), display=display))


def with_formulas(text: str) -> str:
    """Markdown with its $...$ and $$...$$ as MathML; code stays as it is."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\$\$(.+?)\$\$", lambda m: formula(m[1], "block"), parts[i], flags=re.DOTALL)
        parts[i] = re.sub(r"(?<!\\)\$([^$]+?)\$", lambda m: formula(m[1], "inline"), parts[i])
    return "".join(parts)


def body(nb: nbformat.NotebookNode) -> str:
    """A stored notebook -> the HTML of its cells; solutions are folded."""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = with_formulas(re.sub(r"\[!\[Open in Colab\].*", "", cell.source))
    nb.cells = [cell for cell in nb.cells if "find_spec" not in cell.source]  # installation has no place on a page
    found, _ = HTMLExporter(template_name="basic").from_notebook_node(nb)
    before, *parts = found.split(CELL)
    for i, (cell, part) in enumerate(zip(nb.cells, parts, strict=True)):
        parts[i] = CELL + part
        if "solution" in cell.metadata.get("tags", []):
            parts[i] = f"<details><summary>Solution</summary>{parts[i]}</details>"
    return before + "".join(parts)


def linked(found: str, folder: Path, out: Path) -> str:
    """HTML of a page that stands in `folder` -> with links that work in the site; files that it links to are copied."""
    pages = {HERE / f"{name}.ipynb": f"{name}.html" for name in names()}
    pages |= {path: f"{name}.html" for name, path in TEXTS.items()}

    def target(match: re.Match) -> str:
        link, _, part = html.unescape(match[2]).partition("#")
        if not link or re.match(r"[a-z]+:", link):
            return match[0]
        path = (folder / link).resolve()
        new = pages.get(path, pages.get(path / "README.md", "index.html"))
        if path not in pages and path.is_file():
            text = path.suffix in (".py", ".md", ".yaml", ".json")  # browsers show .txt, and download these
            new = f"files/{path.relative_to(ROOT)}{'.txt' * text}"
            (out / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / new)
        return f'{match[1]}="{html.escape(new)}{"#" * bool(part)}{part}"'

    return re.sub(r'(href|src)="([^"]*)"', target, found)


def write(out: Path) -> list[Path]:
    """All pages of the site, written to `out` -> their paths."""
    out.mkdir(parents=True, exist_ok=True)
    titles = {"index": "The course"}
    for name in names():
        titles[name] = cells((HERE / "source" / f"{name}.py").read_text(encoding="utf-8"))[0][1].splitlines()[0][2:]
    titles |= {"glossary": "Glossary", "ledger": "Paper ledger", "assignments": "Assignments"}
    style = CSS.read_text(encoding="utf-8") + HtmlFormatter(style="default").get_style_defs(".highlight")
    order, written = list(titles), []
    for i, name in enumerate(order):
        path = TEXTS.get(name, HERE / f"{name}.ipynb")
        if name in TEXTS:
            nb = new_notebook(cells=[new_markdown_cell(path.read_text(encoding="utf-8"))])
        else:
            nb = nbformat.read(path, as_version=4)
        here = {name: ' class="here" aria-current="page"'}
        rows = [f'<li><a href="{n}.html"{here.get(n, "")}>{html.escape(t)}</a></li>' for n, t in titles.items()]
        ends = [(order[i - 1], "← ")] * (i > 0) + [(order[(i + 1) % len(order)], "→ ")]
        ends = "".join(f'<a href="{n}.html">{mark}{html.escape(titles[n])}</a>' for n, mark in ends)
        page = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(titles[name])} - Muse</title>"
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>'
            f"<nav><details><summary>All pages</summary></details><ol>{''.join(rows)}</ol></nav>"
            f"<main>{linked(body(nb), path.parent, out)}<footer>{ends}</footer></main></body></html>"
        )
        written.append(out / f"{name}.html")
        written[-1].write_text(page, encoding="utf-8")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="write the course as a static site")
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the site (default: site)")
    out = parser.parse_args().out
    print(f"{len(write(out))} pages; open {out / 'index.html'}")


if __name__ == "__main__":
    main()
