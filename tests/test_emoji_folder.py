"""benchmarks/emoji_folder.py: a captioned folder out of several designs of emoji."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from PIL import Image

from minimuse.data_sources import FolderDataset, Problems

sys.path.insert(0, str(ROOT / "benchmarks"))
import emoji_folder

DOG = {"label": "dog face", "tags": ["animal", "dog", "pet", "puppy"], "hexcode": "1F436", "group": 3}
CAT = {"label": "cat face", "tags": ["animal", "cat", "pet", "kitten"], "hexcode": "1F431", "group": 3}
SUN = {"label": "sun", "tags": ["bright"], "hexcode": "2600-FE0F", "group": 5}
LEFT_OUT = [DOG | {"group": 9}, DOG | {"hexcode": "1F436-200D-2764"}, {"label": "regional indicator A", "hexcode": "1"}]


def package(folder, prefix, icons, characters):
    """An unpacked package of a design."""
    folder.mkdir()
    info = {"name": prefix.title(), "prefix": prefix, "author": {"name": "Someone", "url": "https://a.b"}}
    info["license"] = {"title": "CC BY 4.0", "url": "https://c.d"}
    for name, values in (("info", info), ("icons", icons), ("chars", characters)):
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Names, and two designs: a red wide and a blue wide picture of each dog, and a cat and a sun in the first."""

    def svg_to_bytes(svg_string, width):
        image = Image.new("RGBA", (width, width), (0, 0, 0, 0))
        if "<g" in svg_string:
            image.paste("red" if "red" in svg_string else "blue", (0, width // 4, width // 2, width // 2))
        file = io.BytesIO()
        image.save(file, "png")
        return list(file.getvalue())

    monkeypatch.setitem(sys.modules, "resvg_py", SimpleNamespace(svg_to_bytes=svg_to_bytes))
    (tmp_path / "names/en").mkdir(parents=True)
    entries = json.dumps([DOG, CAT, SUN, *LEFT_OUT])
    (tmp_path / "names/en/data.json").write_text(entries, encoding="utf-8")
    icons = {"icons": {"dog": {"body": "<g red/>"}, "cat": {"body": ""}, "sun": {"body": "<g red/>"}}}
    aliases = {"aliases": {"star": {"parent": "sun"}}, "width": 32, "height": 32}
    one = package(tmp_path / "one", "one-flat", icons | aliases, {"1f436": "dog", "1f431": "cat", "2600": "star"})
    two = package(tmp_path / "two", "two", {"icons": {"dog": {"body": "<g/>"}}}, {"1f436": "dog"})
    return ["--names", str(tmp_path / "names"), "--out", str(tmp_path / "out"), "--size", "64", str(one), str(two)]


def test_a_folder_to_train_on(arguments, tmp_path, capsys):
    assert emoji_folder.main(arguments) == 0
    assert "3 pictures" in capsys.readouterr().out
    problems = Problems()
    examples = list(FolderDataset(tmp_path / "out").read(0, 64, problems))
    assert [example.name for example in examples] == ["1f436-one-flat.png", "1f436-two.png", "2600-one-flat.png"]
    assert "left out" not in problems.summary()
    for example, color in zip(examples, ("red", "blue", "red"), strict=True):
        image = example.image.float()
        assert (image[:, 0] == 255).all(), "touches the edge"
        assert image[:, 32, 32].tolist() == [255.0 * (color == "red"), 0, 255.0 * (color == "blue")]
        assert image[1, 8, 32] == 255, "a wide picture keeps its shape, with white above"
    licenses = (tmp_path / "out/LICENSES.md").read_text()
    assert licenses.count("CC BY 4.0 (https://c.d)") == 2, "each design has its license"


def test_a_package_without_code_points(arguments, tmp_path):
    icons = {"dog-face": {"body": "<g red/>"}, "cat": {"body": "<g/>"}}
    package(tmp_path / "old", "old", {"icons": icons, "aliases": {"cat-face": {"parent": "cat"}}}, {})
    assert emoji_folder.main([*arguments[:6], str(tmp_path / "old")]) == 0
    found = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert found == ["1f431-old.png", "1f436-old.png"], "found by name, or by another name"
    assert emoji_folder.icon_name("Santa\u2019s “sleigh”") == "santas-sleigh"


def test_captions(arguments, tmp_path):
    emoji_folder.main(arguments)
    lines = (tmp_path / "out/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {values["file_name"]: values["text"] for values in map(json.loads, lines)}
    assert texts["1f436-one-flat.png"][:2] == ["dog face", "dog face, one"]
    assert texts["1f436-one-flat.png"][2:4] == ["dog face, animal, pet, puppy", "animal, pet, puppy, one"]
    assert set(texts["1f436-two.png"][4:]) == {"animal", "pet"}, "keywords of few emoji are captions of their own"
    assert texts["2600-one-flat.png"] == ["sun", "sun, one", "sun, bright", "bright, one", "bright"]


def test_nothing_is_overwritten(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert emoji_folder.main(arguments) == 1
    assert "overwrite nothing" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_missing_package_is_named(arguments, tmp_path, capsys):
    assert emoji_folder.main([*arguments, str(tmp_path / "three")]) == 1
    assert "three" in capsys.readouterr().err
