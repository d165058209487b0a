"""notebooks/pages.py: the course as a site that works without a network."""

import re
import sys

import nbformat
import pytest
from conftest import ROOT

pytest.importorskip("latex2mathml", reason="the extra `site` is not installed")
sys.path.append(str(ROOT / "notebooks"))
import pages


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    return {path.name: path.read_text(encoding="utf-8") for path in pages.write(out)}, out


def test_formulas_become_mathml_and_code_stays():
    found = pages.with_formulas("$x_1$ costs `a$b` and\n$$\\arg\\min_k |z|$$\n```\n$no$\n```")
    assert found.count("<math") == 2
    assert "`a$b`" in found
    assert "```\n$no$\n```" in found
    assert not re.search(r"\\[a-z]|[_*|]", found.replace("```\n$no$\n```", "")), "Markdown would read these"


def test_solutions_are_folded_and_the_installation_is_left_out():
    new = nbformat.v4
    nb = new.new_notebook(
        cells=[new.new_code_cell(text) for text in ("importlib.util.find_spec", "stub = 1", "answer = 2")]
    )
    nb.cells[2].metadata["tags"] = ["solution"]
    nb.cells.insert(0, new.new_markdown_cell("# Title\n\n[![Open in Colab](https://a/badge.svg)](https://b)"))
    found = pages.body(nb)
    assert "badge" not in found, "it would be loaded from the network"
    assert "find_spec" not in found
    assert found.index("stub") < found.index("<details>") < found.index("answer") < found.index("</details>")


def test_links_lead_to_pages_and_to_copies_of_files(tmp_path):
    text = '<a href="04_masking.ipynb#x">a</a><a href="../minimuse/vqgan.py">b</a><a href="https://arxiv.org">c</a>'
    found = pages.linked(text, pages.HERE, tmp_path)
    assert re.findall('"(.*?)"', found) == ["04_masking.html#x", "files/minimuse/vqgan.py.txt", "https://arxiv.org"]
    assert (tmp_path / "files/minimuse/vqgan.py.txt").read_bytes() == (ROOT / "minimuse/vqgan.py").read_bytes()
    assert '"index.html"' in pages.linked('<a href="../nowhere">', pages.HERE, tmp_path)


def test_a_question_has_a_slide_before_the_picture_that_answers_it(tmp_path, monkeypatch):
    new = nbformat.v4
    picture = new.new_output("display_data", data={"image/png": "AAAA"}, metadata={"alt": "a <b>"})
    texts = [
        "## 2. Why",
        "**Predict, then run.** Is $x$ > 1?\n\nmore",
        "Yes. See [4](04_masking.ipynb).\n\nNot this.",
        "end",
    ]
    one, two, three, four = map(new.new_markdown_cell, texts)
    header = new.new_markdown_cell("# 4. M\n\n*All of it.*\n\n| **You will learn** | this · that |")
    drawn = [new.new_code_cell("plot()", outputs=[picture]) for _ in range(3)]
    cells = [header, one, drawn[0], two, drawn[1], three, drawn[2], four]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "04_m.ipynb")
    monkeypatch.setattr(pages, "HERE", tmp_path)
    title, first, question, answer = pages.slides("04_m")
    assert re.findall("<li>(.*?)</li>", title) == ["this", "that"]
    assert 'alt="a &lt;b&gt;"' in first
    assert "Predict" not in first, "the question comes on the next slide"
    assert "<math" in question
    assert "more" not in question
    assert "<img" not in question
    assert "Yes. See" in answer
    assert "Not this" not in answer


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_without_a_network(site):
    found, out = site
    slides = {f"slides_{week}.html" for week in pages.WEEKS}
    assert set(found) == {f"{name}.html" for name in [*pages.names(), *pages.TEXTS]} | slides
    for name, page in found.items():
        assert "<script" not in page, name
        assert not re.search(r'(src|<link[^>]*href)="(https?:)?//', page), f"{name} loads something from the network"
        for link in re.findall(r'<a [^>]*href="((?!https?:)[^"#]+)', page):
            assert (out / link).is_file(), f"{name}: {link} leads nowhere"
        assert not re.search(r"<m[ion][^>]*>\\", page), f"{name} has a formula that MathML does not show"
        assert page.count('aria-current="page"') == (name not in slides)
