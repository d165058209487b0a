"""benchmarks/emoji.py on made pictures: 12 emoji of 4 shapes and 3 colors, three designs to learn, and two others."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw

sys.path.insert(0, str(ROOT / "benchmarks"))
import emoji

SHAPES = ("ellipse", "box", "bar", "corner")
COLORS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200)}
NAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
LEARNED, OTHERS = {"one": (0, 0), "two": (3, 20), "three": (-2, 35)}, {"four": (-4, -20), "five": (2, -35)}


def drawn(name, move, brighter, side=32):
    """A picture of an emoji in a design, which says how far it is moved, and how much brighter its color is."""
    color, shape = name.split()
    canvas = Image.new("RGB", (64, 64), "white")
    left, top, right, bottom = {"bar": (8, 26, 56, 38)}.get(shape, (12, 12, 52, 52))
    box = (left + move, top + move, right + move, bottom + move)
    fill = tuple(value + brighter for value in COLORS[color])
    brush = ImageDraw.Draw(canvas)
    if shape == "corner":
        brush.polygon([box[:2], (box[0], box[3]), box[2:]], fill=fill)
    else:
        (brush.ellipse if shape == "ellipse" else brush.rectangle)(box, fill=fill)
    return canvas.resize((side, side), Image.Resampling.LANCZOS)


def write(folder, designs):
    folder.mkdir()
    lines = []
    for i, name in enumerate(NAMES):
        for design, look in designs.items():
            file = f"1f{i:03x}-{design}.png"
            drawn(name, *look).save(folder / file)
            lines.append(json.dumps({"file_name": file, "text": [name, f"{name}, {design}"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return emoji.read(folder, 32)


@pytest.fixture
def learned(tmp_path):
    return write(tmp_path / "learned", LEARNED)


@pytest.fixture
def others(tmp_path):
    return write(tmp_path / "others", OTHERS)


class Blur:
    """A tokenizer that keeps the picture, with some noise."""

    def encode(self, x):
        return x

    def decode(self, x):
        return x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def measured(monkeypatch, learned, others, design, move=0):
    """What is measured of a model that draws a name in a design, or with `move` 1 the next name."""

    class Model:
        def __init__(self, muse, base_only):
            pass

        def draw(self, prompts, seeds):
            assert [*seeds] == [*range(seeds[0], seeds[0] + len(seeds))]
            names = [NAMES[(NAMES.index(p) + move) % len(NAMES)] if p in NAMES else "red box" for p in prompts]
            rows = [learned.texts.index((name, f"{name}, {design}")) for name in names]
            return torch.stack([learned.images[row] for row in rows])

    monkeypatch.setattr(emoji, "EvalModel", Model)
    monkeypatch.setattr(emoji, "HELD_OUT", 6)
    monkeypatch.setattr(emoji, "WORDS", {"crimson": "red .*", "ball": ".* ellipse"})
    size = SimpleNamespace(image_size=32)
    muse = SimpleNamespace(config=SimpleNamespace(low_tokenizer=size), parts={"low_tokenizer": Blur()})
    return emoji.Measurement(muse, learned, others, base_only=True, names=12)


def test_files_say_which_emoji_and_which_design(learned):
    assert learned.codes[:4] == ["1f000", "1f000", "1f000", "1f001"]
    assert sorted(set(learned.designs)) == sorted(LEARNED)
    few = learned.where([text[0] == "green bar" for text in learned.texts])
    assert few.codes == ["1f006"] * 3
    assert few.images.shape == (3, 3, 32, 32)


def test_a_reader_knows_emoji_in_designs_that_it_never_saw(learned, others):
    reader = emoji.Reader(others)
    assert reader(learned.images).norm(dim=1).allclose(torch.ones(36))
    ranked = reader.rank(learned.images)
    assert [row[0] for row in ranked] == learned.codes, "by shape and color"
    assert all(len(set(row)) == 12 for row in ranked), "each emoji once"
    few = reader.rank(learned.images[:3], ["1f005", "1f000"])
    assert few == [["1f000", "1f005"]] * 3, "only these"


def test_features_see_shapes_and_colors():
    red, green = (
        torch.stack([torch.tensor(list(drawn(f"{c} {s}", 0, 0).tobytes())) for s in SHAPES])
        for c in COLORS
        if c != "blue"
    )
    images = torch.cat([red, green]).reshape(8, 32, 32, 3).permute(0, 3, 1, 2).to(torch.uint8)
    x = emoji.describe(images)
    gradients, colors = x[:, : 7 * 7 * 9], x[:, 7 * 7 * 9 :]
    assert colors.shape == (8, 3 * 8 * 8)
    assert torch.cdist(gradients, gradients)[0, 4] < torch.cdist(gradients, gradients)[0, 1], "a circle in any color"
    across, down = gradients[[1]].reshape(9, 49), gradients[[1]].reshape(9, 7, 7).transpose(1, 2).reshape(9, 49)
    assert across[0].argmax() != down[0].argmax() or across[0].max() > 5 * across[2].max(), "a box has upright edges"
    assert (emoji.describe(torch.full((1, 3, 32, 32), 99, dtype=torch.uint8))[0, : 7 * 7 * 9] == 0).all(), "no edges"


def test_a_model_that_copies(monkeypatch, learned, others):
    found = measured(monkeypatch, learned, others, "one").report
    assert found["names, top 1"].value == 1
    assert found["names in a wrong order, top 1"].value == 0
    assert found["real three, top 1"].value == 1
    assert found["real three, top 1"].n == 12
    assert found["pixels, samples as near as 90% of the copies"].value == 1
    assert found["pixels, samples nearer than 90% of the held-out pictures"].value == 1
    assert found["pixels, mean distance of samples"].value < found["pixels, mean distance of copies"].value
    assert found["low_tokenizer, PSNR of held-out pictures"].value == pytest.approx(41.5, abs=0.5), (
        "noise of 1%, half of it clipped on white"
    )


def test_a_model_that_draws_something_else(monkeypatch, learned, others):
    result = measured(monkeypatch, learned, others, "one", move=1)
    assert result.report["names, top 1"].value == 0
    assert result.report["words of no caption, top 1"].value == 0.5, "a red box is crimson, and no ball"
    assert "words of captions, top 1" not in result.report
    red = torch.tensor([255, 0, 0])
    pages = {name: torch.tensor(list(page.tobytes())).reshape(-1, 3) for name, page in result.pages.items()}
    framed = {name: int((pixels == red).all(1).sum()) for name, pixels in pages.items()}
    assert framed["names"] == 10 * framed["words"] > 0, "ten wrong samples are shown, and one wrong word"


def test_held_out_pictures_are_no_training_pictures(monkeypatch, learned, others):
    result = measured(monkeypatch, learned, others, "one")
    assert len(result.held_out.codes) == 6
    assert len(result.train.codes) == 30
    assert result.held_out.codes == learned.codes[5::6], "every sixth, as in training"


def test_fractions_below_a_quantile():
    others = torch.arange(1000.0)
    found = emoji.nearer(torch.arange(0, 1000, 5.0), others, 0.1)
    assert found.value == pytest.approx(0.1)
    assert 0.04 < found.low < 0.1 < found.high < 0.17
    assert emoji.nearer(torch.full((20,), 999.0), others, 0.5).value == 0
    few = emoji.nearer(torch.arange(0, 1000, 5.0), torch.arange(0, 1000, 100.0), 0.1)
    assert few.high - few.low > found.high - found.low, "ten others leave the quantile uncertain"


@pytest.mark.parametrize(("word", "right", "wrong"), [("puppy", "dog face", "hot dog"), ("hen", "rooster", "peacock")])
def test_words_name_whole_names(word, right, wrong):
    assert re.fullmatch(emoji.WORDS[word], right)
    assert not re.fullmatch(emoji.WORDS[word], wrong)
    assert not any(re.fullmatch(pattern, other) for other, pattern in emoji.WORDS.items()), "no word is a right name"


def test_report_and_pages(monkeypatch, tmp_path, learned, others, tiny_muse, capsys):
    monkeypatch.setattr(emoji.Muse, "from_pretrained", lambda *a, **k: tiny_muse)
    monkeypatch.setattr(emoji, "HELD_OUT", 6)
    monkeypatch.setattr(emoji, "WORDS", {"ball": ".* ellipse"})
    folders = ["--data", str(tmp_path / "learned"), "--others", str(tmp_path / "others")]
    emoji.main(["--model", "x", *folders, "--out", str(tmp_path / "out"), "--names", "3"])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["names, top 1"]["n"] == 3
    assert "high_tokenizer, PSNR of held-out pictures" in report
    assert len((tmp_path / "out/report.md").read_text().splitlines()) == len(report) + 2
    with Image.open(tmp_path / "out/names.png") as page:
        assert page.width > 3 * 64, "three columns of 64 pixels and more"
