"""benchmarks/emoji_folder.py: a captioned folder out of a colour font."""

import json
import sys
import unicodedata

import pytest
from conftest import ROOT
from PIL import ImageFont

from minimuse.data_sources import FolderDataset, Problems

sys.path.insert(0, str(ROOT / "benchmarks"))
import emoji_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        emoji_folder.find_font()
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("emoji") / "out"
    assert emoji_folder.main(["--out", str(out), "--size", "32"]) == 0
    return out


def test_every_emoji_is_a_captioned_picture(folder):
    data, problems = FolderDataset(folder), Problems()
    examples = [example for part in range(data.parts) for example in data.read(part, 32, problems)]
    assert problems.summary() == ""
    assert len(examples) > 1000, "a colour font of our days has more than a thousand of them"
    for row, example in zip(data.rows, examples, strict=True):
        character = chr(int(row.name.removesuffix(".png"), 16))
        assert example.captions == (unicodedata.name(character).lower(),)
        assert example.image.shape == (3, 32, 32)
        assert example.image.min() < 250, f"{row} is blank"
        assert (example.image[:, 0] == 255).all(), f"{row} touches the edge"
    coloured = sum((example.image[0] != example.image[2]).any().item() for example in examples)
    assert coloured > len(examples) / 2, "most emoji have colours"


def test_known_emoji_look_as_they_are_called(folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {row["text"]: int(row["file_name"].removesuffix(".png"), 16) for row in rows}
    assert names["grinning face"] == 0x1F600
    data = FolderDataset(folder)
    images = {
        row.captions[0]: example.image
        for part in range(data.parts)
        for row, example in zip(data.rows[500 * part :], data.read(part, 32, Problems()), strict=False)
    }
    for name, channel in (("large red circle", 0), ("large green square", 1), ("large blue circle", 2)):
        if name in images:
            middle = images[name][:, 16, 16].tolist()
            assert max(middle) == middle[channel], f"{name}: {middle}"


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ValueError, match="overwrite nothing"):
            emoji_folder.write(out, 32, ImageFont.load_default(32))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_font_says_where_to_get_one(tmp_path, monkeypatch, capsys):
    assert emoji_folder.main(["--out", str(tmp_path / "out"), "--font", str(tmp_path / "none.ttf")]) == 1
    told = capsys.readouterr().err
    for word in ("none.ttf", "apt-get install fonts-noto-color-emoji", "macOS", "Windows", "--font"):
        assert word in told, f"{word} is not in: {told}"
    monkeypatch.setattr(emoji_folder, "FONTS", (str(tmp_path / "a.ttf"),))
    with pytest.raises(ValueError, match=r"a\.ttf"):
        emoji_folder.find_font()
    (tmp_path / "a.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="none of the sizes"):
        emoji_folder.find_font()
    assert not (tmp_path / "out").exists(), "nothing was begun"


def test_draw_leaves_out_what_is_blank():
    font = ImageFont.load_default(32)
    assert emoji_folder.draw(" ", font) is None
    assert emoji_folder.draw("A", font).getchannel("A").getextrema()[1] > 200
