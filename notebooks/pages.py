"""The course as a static site: python notebooks/pages.py [--out site]. Needs the extra `site`.

    NN_name.ipynb, as stored, and the pages in Markdown --nbconvert--> site/NN_name.html, with navigation
    diagrams and figures of a week's notebooks --> site/slides_N.html; Page Down turns a slide, printing makes a PDF

The site works without a network and without scripts: formulas become MathML, styles and pictures stand in the pages.
Source files that a page links to are copied. Other links within the repository end at the site's first page.
"""

import argparse
import html
import re
import shutil
from itertools import pairwise
from pathlib import Path

import nbformat
from build import HERE, cells, names
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbformat.v4 import new_markdown_cell, new_notebook
from pygments.formatters import HtmlFormatter

ROOT = HERE.parent
TEXTS = {  # page -> its Markdown
    "index": HERE / "README.md",
    "glossary": HERE / "glossary.md",
    "ledger": HERE / "LEDGER.md",
    "assignments": HERE / "assignments" / "README.md",
}
WEEKS = {1: ("01", "02", "03", "04"), 2: ("05", "06", "07", "08", "10")}  # of README.md, for teachers
CELL = '<div class="cell border-box-sizing'  # how nbconvert's basic template begins each cell
CSS, SLIDES = HERE / "pages.css", HERE / "slides.css"


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


def slides(name: str) -> list[str]:
    """A stored notebook -> slides in HTML: its title and aims, each question, and the first picture of each section.

    A question "Predict, then run" has a slide of its own before the picture that answers it.
    """
    header, *cells = nbformat.read(HERE / f"{name}.ipynb", as_version=4).cells
    title, motto = re.match(r"(# .+)\n+(.+)", header.source).groups()
    aims = re.search(r"\*\*You will learn\*\* \| (.+?) \|", header.source)[1].replace(" · ", "\n- ")
    found, heading, wanted = [markdown2html(with_formulas(f"{title}\n\n{motto}\n\n- {aims}"))], title, True
    for cell, after in pairwise([*cells, cells[-1]]):
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^## .+", cell.source, flags=re.MULTILINE) or [heading])[-1]
            question = re.search(r"\*\*Predict, then run\.\*\*.+?(?=\n\n|$)", cell.source, flags=re.DOTALL)
            wanted = wanted or bool(question) or cell.source.startswith("## ")
            if question:
                found.append(markdown2html(with_formulas(f"{heading}\n\n{question[0]}")))
        for output in cell.get("outputs", []) * wanted:
            if kind := {"image/png", "image/jpeg"} & set(output.get("data", {})):
                kind = kind.pop()
                alt = html.escape(output.get("metadata", {}).get("alt", "figure"))
                picture = f'<img alt="{alt}" src="data:{kind};base64,{output.data[kind].strip()}">'
                text = after.source.split("\n\n")[0] if after.cell_type == "markdown" else ""
                text = "" if text.startswith(("#", "**Predict")) else markdown2html(with_formulas(text))
                found.append(markdown2html(heading) + picture + text)
                wanted = False
                break
    return [f"<section>{slide}</section>" for slide in found]


def write_slides(out: Path) -> list[Path]:
    """For each week of the course one page of slides, written to `out` -> their paths."""
    style, written = SLIDES.read_text(encoding="utf-8"), []
    for week, numbers in WEEKS.items():
        shown = [slide for name in names() if name.partition("_")[0] in numbers for slide in slides(name)]
        written.append(out / f"slides_{week}.html")
        written[-1].write_text(document(f"Week {week}", style, linked("".join(shown), HERE, out)), encoding="utf-8")
    return written


def document(title: str, style: str, inside: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)} - Muse</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body>{inside}</body></html>"
    )


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
        rows += [f'<li><a href="slides_{week}.html">Slides, week {week}</a></li>' for week in WEEKS]
        ends = [(order[i - 1], "← ")] * (i > 0) + [(order[(i + 1) % len(order)], "→ ")]
        ends = "".join(f'<a href="{n}.html">{mark}{html.escape(titles[n])}</a>' for n, mark in ends)
        page = (
            f"<nav><details><summary>All pages</summary></details><ol>{''.join(rows)}</ol></nav>"
            f"<main>{linked(body(nb), path.parent, out)}<footer>{ends}</footer></main>"
        )
        written.append(out / f"{name}.html")
        written[-1].write_text(document(titles[name], style, page), encoding="utf-8")
    return written + write_slides(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="write the course as a static site")
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the site (default: site)")
    out = parser.parse_args().out
    print(f"{len(write(out))} pages; open {out / 'index.html'}")


if __name__ == "__main__":
    main()
