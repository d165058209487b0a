"""data_sources.py: captioned images from strangers' files; what is wrong with some never spoils the others."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minimuse.config import preset
from minimuse.data_sources import (
    FolderDataset,
    Problems,
    Refused,
    SceneDataset,
    TarDataset,
    captions_of,
    decode,
    open_source,
)

GOOD = 20


def picture(i: int = 0, size=(40, 32), mode: str = "RGB", form: str = "PNG", **options) -> bytes:
    """An image file with a colour of its own."""
    file = io.BytesIO()
    color = (10 * i % 256, 80, 160)
    Image.new("RGB", size, color).convert(mode).save(file, form, **options)
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """A PNG that claims to have this size, and holds no pixel."""
    chunk = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    ihdr = struct.pack(">I", len(chunk)) + b"IHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    return b"\x89PNG\r\n\x1a\n" + ihdr + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def tar(path: Path, files: dict[str, bytes | str] | list[tuple[str, bytes | str]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items() if isinstance(files, dict) else files:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def good(n: int = GOOD) -> dict[str, bytes | str]:
    return {f"g{i:02}.{end}": c for i in range(n) for end, c in (("png", picture(i)), ("txt", f"number {i}\n"))}


def read_all(source, size: int = 16):
    problems = Problems()
    return [example for part in range(source.parts) for example in source.read(part, size, problems)], problems


def said(examples) -> list[str]:
    return [example.captions[0] for example in examples]


TRUNCATED = picture(3, (400, 300), form="JPEG")[:1200]
WRONG = {  # kind -> an image and its caption file, in a folder as in a tar
    "corrupt": {"bad.jpg": TRUNCATED, "bad.txt": "x"},
    "of an unknown format": {"bad.png": b"this is text", "bad.txt": "x"},
    "too small": {"bad.png": picture(0, (90, 7)), "bad.txt": "x"},
    "too huge": {"bad.png": header(60_000, 60_000), "bad.txt": "x"},
    "of mode F": {"bad.tif": picture(0, mode="F", form="TIFF"), "bad.txt": "x"},
    "without a caption": {"bad.png": picture(), "bad.txt": " \n\n"},
    "with a caption not in UTF-8": {"bad.png": picture(), "bad.txt": b"caf\xe9"},
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_kind_of_problem_among_good_images(kind, tmp_path, recwarn):
    folder = FolderDataset(write(tmp_path / "pictures", good() | WRONG[kind]))
    shards = TarDataset(tar(tmp_path / "0.tar", good() | WRONG[kind]))
    for source, name in ((folder, next(iter(WRONG[kind]))), (shards, "0.tar/bad")):
        examples, problems = read_all(source)
        assert said(examples) == [f"number {i}" for i in range(GOOD)], "every good image, in order"
        assert problems.summary() == f"passed over 1 of 21 images: 1 {kind} ({name})"
        assert problems.usable == GOOD
    assert not recwarn.list, "Pillow's warnings are ours to handle"


def test_examples_are_the_files_own(tmp_path):
    examples, problems = read_all(FolderDataset(write(tmp_path, good())))
    assert problems.summary() == ""
    for i, example in enumerate(examples):
        assert (example.image.shape, example.image.dtype) == ((3, 16, 16), torch.uint8)
        assert example.image[:, 5, 5].tolist() == [10 * i % 256, 80, 160], f"picture {i}"


def test_a_file_that_went_away(tmp_path):
    data = FolderDataset(write(tmp_path, good(3)))
    (tmp_path / "g01.png").unlink()
    examples, problems = read_all(data)
    assert said(examples) == ["number 0", "number 2"]
    assert problems.summary() == "passed over 1 of 3 images: 1 unreadable (g01.png)", "not called corrupt"


def line(name, text) -> str:
    return json.dumps({"file_name": name, "text": text}) + "\n"


def test_metadata(tmp_path):
    rows = [line("b.png", "second"), "\n", line("sub\\c.png", ["one", " two  words\n", "", 7]), line("a.png", "first")]
    files = {"metadata.jsonl": "".join(rows), "d.txt": "beside\n\n again \n", "a.txt": "not asked"}
    files |= {"sub/deep/metadata.jsonl": "\ufeff" + line("../e.png", "from below"), "sub/e.png": picture()}
    files |= {name: picture() for name in ("a.png", "b.png", "d.png", "sub/c.png", ".hidden.png", ".git/x.png")}
    examples, problems = read_all(FolderDataset(write(tmp_path, files)))
    want = [("first",), ("second",), ("beside", "again"), ("one", "two words"), ("from below",)]
    assert [example.captions for example in examples] == want, "sorted by name, metadata before .txt"
    assert problems.summary() == ""


BAD_LINES = {
    "with metadata not in JSON (metadata.jsonl:21)": ["{'file_name'", '["g01.png"]', '{"text": "x"}', "[" * 100_000],
    "listed without a file (none.png)": [line("none.png", "x")],
    "listed twice (g03.png)": [line("g03.png", "again"), line("./g03.png", "again")],
    "listed outside of the folder (../x.png)": [line("../x.png", "x"), line("sub/../../x.png", "x")],
    "listed outside of the folder (/x.png)": [line("/x.png", "x")],
    "without a caption (z.png)": [line("z.png", v) for v in ("", None, [], 3, {"a": 1})] + ['{"file_name": "z.png"}'],
    "with a caption not in UTF-8 (z.png)": [line("z.png", "half a character \ud800")],
}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind, rows in BAD_LINES.items() for row in rows])
def test_bad_lines_of_metadata_among_good_ones(kind, row, tmp_path):
    files = {f"g{i:02}.png": picture(i) for i in range(GOOD)} | {"z.png": picture()} | {"../x.png": picture()}
    if "z.png" not in row:
        del files["z.png"]
    lines = "".join(line(f"g{i:02}.png", f"number {i}") for i in range(GOOD)) + row
    examples, problems = read_all(FolderDataset(write(tmp_path / "in", files | {"metadata.jsonl": lines})))
    assert said(examples) == [f"number {i}" for i in range(GOOD)]
    assert problems.summary() == f"passed over 1 of 21 images: 1 {kind}"


def test_a_line_of_metadata_in_another_encoding(tmp_path):
    rows = (
        line("a.png", "one").encode() + b'{"file_name": "b.png", "text": "caf\xe9"}\n' + line("c.png", "two").encode()
    )
    files = {name: picture() for name in ("a.png", "b.png", "c.png")} | {"metadata.jsonl": rows}
    examples, problems = read_all(FolderDataset(write(tmp_path, files)))
    assert said(examples) == ["one", "two"]
    assert problems.counts == {"with metadata not in JSON": 1, "without a caption": 1}, "the line, and its image"


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 10_000)])
def test_a_bomb_is_never_decoded(size, monkeypatch):
    """The first is beyond Pillow's own limit, the second between its warning and its limit."""
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a bomb was decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # even where a user silenced Pillow
        with pytest.raises(Refused, match="huge"):
            decode(io.BytesIO(header(*size)), 16)


def test_no_postscript_runs(monkeypatch):
    """Pillow would hand an EPS to Ghostscript, whatever its name says."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"{args} was run"))
    eps = picture(mode="RGB", form="EPS")
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS", "Pillow alone knows it"
    with pytest.raises(Refused, match="unknown format"):
        decode(io.BytesIO(eps), 16)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I"])
def test_modes_become_rgb(mode):
    """White, dark gray and black bars survive every mode (1 has no gray; I is 16-bit gray in a wider box)."""
    bars = np.repeat(np.array([255, 64, 0], dtype=np.uint8), 16)[None].repeat(48, 0)
    if mode.startswith("I"):
        image = Image.fromarray((bars.astype(np.uint16) * 257).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray(bars).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    file = io.BytesIO()
    image.save(file, "TIFF")
    bar = decode(io.BytesIO(file.getvalue()), 48)[:, 24, [8, 24, 40]].int()
    want = torch.tensor([255, 64, 0]).expand(3, 3)
    there = [0, 2] if mode == "1" else [0, 1, 2]
    assert (bar - want)[:, there].abs().max() <= 2, f"{mode}: {bar.tolist()}"


def test_transparent_is_white():
    file = io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(file, "PNG")
    assert (decode(file, 16) == 255).all()


def test_values_beyond_16_bits_are_refused():
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32), 70_000, dtype=np.int32)).save(file, "TIFF")
    with pytest.raises(Refused, match="of mode I"):
        decode(file, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation):
    """EXIF 1 to 8, against Pillow's own table of turns: a red top left corner comes back as where EXIF puts it."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16, :16] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    red = (decode(file, 32)[0] > 128).nonzero().float().mean(0).tolist()
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    assert [value > 16 for value in red] == [bool(value) for value in corner]


@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from(["PNG", "JPEG"]))
def test_shorter_side_is_scaled_and_the_centre_kept(width, height, form):
    """A horizontal and a vertical ramp: the middle of the picture stays in the middle, at one scale for both axes."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    ramp = np.stack([100 + 3 * (x - (width - 1) / 2), 100 + 3 * (y - (height - 1) / 2), 0 * x], -1)
    file = io.BytesIO()
    Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).save(file, form, **{"quality": 95} if form == "JPEG" else {})
    image = decode(file, 16).float()
    assert image.shape == (3, 16, 16)
    middle = image[:2, 6:10, 6:10].mean((1, 2))
    assert (middle - 100).abs().max() < 5, f"the centre moved: {middle.tolist()}"
    slope = 3 * min(width, height) / 16
    across = (image[0, 4:12, 10] - image[0, 4:12, 5]).mean() / 5
    down = (image[1, 10, 4:12] - image[1, 5, 4:12]).mean() / 5
    assert abs(across - slope) < 1.5, f"{across} a pixel across, {slope} expected"
    assert abs(down - slope) < 1.5, f"{down} a pixel down, {slope} expected"


def test_resizing_is_antialiased():
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    inner = decode(file, 16)[:, :, 2:-2].int()
    assert (inner - 127).abs().max() <= 2, "black and white stripes finer than a pixel are gray"


def test_a_drafted_jpeg_is_nearly_the_whole_one():
    """128 px of detail that 32 px can just hold: decoded at half it is kept, at an eighth it would be lost."""
    rng = np.random.default_rng(0)
    blobs = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    blobs = blobs.resize((128, 128), Image.Resampling.BICUBIC)
    jpeg, png = io.BytesIO(), io.BytesIO()
    blobs.save(jpeg, "JPEG", quality=95, subsampling=0)
    with Image.open(jpeg) as image:
        image.save(png, "PNG")
    with Image.open(jpeg) as image:
        image.draft(None, (16, 16))
        eighth = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)).transpose(2, 0, 1).astype(int)
    whole = decode(png, 32).int()
    assert (decode(jpeg, 32).int() - whole).abs().max() <= 8
    assert np.abs(eighth - whole.numpy()).max() > 30, "else this test could not tell"


def test_min_side():
    for file, min_side in ((picture(0, (16, 90)), None), (picture(0, (7, 90)), 7)):
        assert decode(io.BytesIO(file), 32, min_side).shape == (3, 32, 32)
    for file, min_side in ((picture(0, (15, 90)), None), (picture(0, (63, 90)), 64)):
        with pytest.raises(Refused, match="small"):
            decode(io.BytesIO(file), 32, min_side)


@given(st.binary(max_size=300), st.integers(0, 60))
def test_no_bytes_break_the_decoder(noise, keep):
    for start in (picture(form="JPEG"), picture(), picture(form="GIF"), picture(form="WEBP")):
        try:
            assert decode(io.BytesIO(start[:keep] + noise), 16).shape == (3, 16, 16)
        except Refused:
            continue


PLAIN = st.none() | st.booleans() | st.integers() | st.text(st.characters())
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@given(JSON | st.fixed_dictionaries({"text": JSON}) | st.fixed_dictionaries({"caption": JSON}))
def test_any_json_value_gives_clean_captions(value):
    try:
        texts = captions_of(value)
    except Refused:
        return
    for text in texts:
        assert text == " ".join(text.split()) != ""
        assert text.encode().decode() == text


def test_parts_of_a_folder(tmp_path):
    same = picture()
    files = {f"{i:04}.png": same for i in range(1003)}
    rows = "".join(line(name, name) for name in reversed(files))
    data = FolderDataset(write(tmp_path, files | {"metadata.jsonl": rows}))
    parts = [[example.captions[0] for example in data.read(part, 8, Problems())] for part in range(data.parts)]
    assert [len(part) for part in parts] == [500, 500, 3]
    assert [name for part in parts for name in part] == list(files), "in the order of the names"
    for part in (-1, 3):
        with pytest.raises(IndexError, match="0 to 2"):
            next(data.read(part, 8, Problems()))


def test_sources_travel_to_other_processes(tmp_path):
    for source in (FolderDataset(write(tmp_path / "in", good(2))), TarDataset(tar(tmp_path / "0.tar", good(2)))):
        there = pickle.loads(pickle.dumps(source))
        assert there.fingerprint == source.fingerprint
        for ours, theirs in zip(read_all(source)[0], read_all(there)[0], strict=True):
            assert torch.equal(ours.image, theirs.image)
            assert ours.captions == theirs.captions


def test_fingerprint_of_a_folder(tmp_path):
    folder = write(tmp_path / "in", good(3) | {"metadata.jsonl": line("g00.png", "one")})
    prints = [FolderDataset(folder).fingerprint]
    assert FolderDataset(str(folder)).fingerprint == prints[0], "reading twice changes nothing"
    write(folder, {"notes.md": "not a part of the data", ".cache/x.png": picture()})
    assert FolderDataset(folder).fingerprint == prints[0], "nor does a file that is not read"
    moved = folder.rename(tmp_path / "moved")
    assert FolderDataset(moved).fingerprint == prints[0], "nor does moving the folder"
    prints.append(FolderDataset(moved, min_side=3).fingerprint)
    for change in (
        {"metadata.jsonl": line("g00.png", "two")},
        {"g01.txt": "another"},
        {"g02.png": picture(2, (41, 33))},
        {"g03.png": picture()},
        {"g03.txt": "a caption for it"},
    ):
        prints.append(FolderDataset(write(moved, change)).fingerprint)
    (moved / "g01.png").rename(moved / "h01.png")
    prints.append(FolderDataset(moved).fingerprint)
    (moved / "g02.png").unlink()
    prints.append(FolderDataset(moved).fingerprint)
    os.utime(moved / "g00.png", (1, 1))  # the same bytes, but written again: as good as changed
    prints.append(FolderDataset(moved).fingerprint)
    assert len(set(prints)) == len(prints), "each change shows"


def test_fingerprint_of_tars(tmp_path):
    pattern = f"{tmp_path}/{{0..1}}.tar"
    tar(tmp_path / "0.tar", good(2))
    tar(tmp_path / "1.tar", good(2))
    prints = [TarDataset(pattern).fingerprint, TarDataset(pattern, min_side=3).fingerprint]
    assert TarDataset(pattern).fingerprint == prints[0]
    prints.append(TarDataset(tmp_path / "0.tar").fingerprint)
    prints.append(TarDataset([tmp_path / "1.tar", tmp_path / "0.tar"]).fingerprint)
    os.utime(tmp_path / "1.tar", (1, 1))
    prints.append(TarDataset(pattern).fingerprint)
    tar(tmp_path / "1.tar", good(30))
    os.utime(tmp_path / "1.tar", (1, 1))
    prints.append(TarDataset(pattern).fingerprint)
    assert len(set(prints)) == len(prints), "each change shows"


def test_a_part_is_a_shard_and_patterns_keep_their_order(tmp_path):
    for i in range(11):
        tar(tmp_path / f"{i:03}.tar", {"a.png": picture(), "a.txt": f"shard {i}"})
    for pattern in (
        f"{tmp_path}/{{000..010}}.tar",
        tmp_path / "*.tar",
        sorted(tmp_path.glob("*.tar")),
        [f"{tmp_path}/{{000..004}}.tar", str(tmp_path / "00[5-9].tar"), tmp_path / "010.tar"],
    ):
        source = TarDataset(pattern)
        assert source.parts == 11
        assert said(read_all(source)[0]) == [f"shard {i}" for i in range(11)], f"{pattern}"
    odd = tar(tmp_path / "{odd}[1].tar", {"a.png": picture(), "a.txt": "odd"})
    assert said(read_all(TarDataset(odd))[0]) == ["odd"], "a file of that very name comes before a pattern"
    with pytest.raises(ValueError, match=r"there is no file .*011\.tar"):
        TarDataset(f"{tmp_path}/{{000..011}}.tar")
    with pytest.raises(IndexError, match="0 to 0"):
        next(TarDataset(tmp_path / "000.tar").read(1, 16, Problems()))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_captions_of_tars(mode, tmp_path):
    files = {
        "README.md": "no image, no caption: none of our business",
        "./0.jpg": picture(form="JPEG"), "./0.json": json.dumps({"caption": "from json", "width": 3}),
        "in/1.PNG": picture(), "in/1.txt": "from txt", "in/1.json": json.dumps({"text": "not this"}),
        "in/2.webp": picture(form="WEBP"), "in/2.json": json.dumps({"text": ["one", "two"]}),
        "3.png": picture(), "3.json": "{not json",
        "4.png": picture(), "4.json": "[1, 2]",
        "5.txt": "words alone",
    }  # fmt: skip
    examples, problems = read_all(TarDataset(tar(tmp_path / "0.tar", files, mode)))
    assert [example.captions for example in examples] == [("from json",), ("from txt",), ("one", "two")]
    assert problems.seen == 6
    assert problems.counts == {
        "with metadata not in JSON": 1,
        "without a caption": 1,
        "listed without a file": 1,
    }


def test_a_tar_may_name_a_file_twice(tmp_path):
    files = list(good().items())
    twice = [*files[:2], (files[0][0], picture(7)), *files[2:]]
    examples, problems = read_all(TarDataset(tar(tmp_path / "0.tar", twice)))
    assert said(examples) == [f"number {i}" for i in range(GOOD)]
    assert examples[0].image[0, 0, 0] == 0, "the first one counts"
    assert problems.summary() == "passed over 1 of 21 images: 1 listed twice (0.tar)"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.55, 0.7])
def test_a_truncated_tar_gives_what_it_still_has(mode, share, tmp_path):
    whole = tar(tmp_path / "0.tar", good(), mode).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: int(len(whole) * share)])
    (tmp_path / "2.tar").write_bytes(b"no tar at all")
    examples, problems = read_all(TarDataset(tmp_path / "*.tar"))
    assert said(examples)[:GOOD] == [f"number {i}" for i in range(GOOD)]
    rest = said(examples)[GOOD:]
    assert len(rest) < GOOD
    assert rest == said(examples)[: len(rest)], "from the front, in order"
    assert problems.names["lost in a damaged tar"] == ["1.tar", "2.tar"], f"{problems}"


@given(st.integers(0, 39), st.integers(0, 511))
def test_a_tar_damaged_anywhere_tells(member, offset):
    """Each of the 40 files has a header and a block of content here; noise over a header loses that file at least."""
    with tempfile.TemporaryDirectory() as folder:
        path = tar(Path(folder) / "0.tar", good())
        with tarfile.open(path) as archive:
            start = archive.getmembers()[member].offset
        content = bytearray(path.read_bytes())
        content[start : start + 512] = bytes([7] * offset + [9] * (512 - offset))
        path.write_bytes(content)
        if member == 0:
            with pytest.raises(ValueError, match="no tar file"):
                TarDataset(path)
            return
        examples, problems = read_all(TarDataset(path))
    assert said(examples) == [f"number {i}" for i in range(member // 2)]
    assert problems.counts["lost in a damaged tar"] == 1, f"{problems}"


def test_a_tar_that_promises_terabytes(tmp_path):
    path = tar(tmp_path / "0.tar", good(3))
    info = tarfile.TarInfo("huge.png")
    info.size = 2**42
    zeros = path.read_bytes().rindex(b"number 2") + 512
    path.write_bytes(path.read_bytes()[:zeros] + info.tobuf() + bytes(1024))
    examples, problems = read_all(TarDataset(path))
    assert said(examples) == ["number 0", "number 1", "number 2"]
    assert problems.names == {"too huge": ["0.tar/huge.png"], "lost in a damaged tar": ["0.tar"]}


def test_nothing_in_a_tar_is_executed(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    bomb = pickle.dumps(Trap())
    files = {"a.png": picture(), "a.txt": "fine", "a.pkl": bomb, "a.pyd": bomb, "a.pth": bomb, "../b.txt": "x"}
    examples, _ = read_all(TarDataset(tar(tmp_path / "0.tar", files)))
    assert said(examples) == ["fine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar"], "nothing ran, nothing was unpacked"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        TarDataset(f"pipe:mkdir {tmp_path / 'sprung'}")
    assert not (tmp_path / "sprung").exists()


def test_without_webdataset_tars_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r"minimuse\[webdataset\]"):
        TarDataset(tar(tmp_path / "0.tar", good(1)))
    assert FolderDataset(write(tmp_path / "in", good(1))).parts == 1, "folders do without"


def test_open_source_of_scenes():
    config = preset("nano")
    assert open_source("scenes", config, seed=3) == SceneDataset(5000, 64, seed=3, fractions=(67, 24, 9), k=2)


def test_open_source_finds_out_what_it_is_given(tmp_path):
    config = preset("nano")
    folder, shard = write(tmp_path / "in", good(2)), tar(tmp_path / "0.tar", good(3))
    for spec, n in (
        (folder, 2),
        (str(folder), 2),
        (shard, 3),
        (f"{tmp_path}/{{0..0}}.tar", 3),
        (f"{tmp_path}/*.tar", 3),
    ):
        source = open_source(spec, config, min_side=5)
        assert source.min_side == 5
        assert len(read_all(source)[0]) == n, f"{spec}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no captioned image: no file at all. Expected images .*metadata.jsonl"),
        ({"a.png": picture(), "b.png": picture(), "c.csv": "x"}, "2 .png, 1 .csv; 2 without a caption. Expected"),
        ({"a.avif": "x", "b": "x"}, "1 .avif, 1 without an ending. Expected images .png, jpg"),
        ({"metadata.jsonl": line("a.png", "x") + "{"}, "1 with metadata not in JSON.*1 listed without a file|1 listed"),
        ({"in/0.tar": "x", "in/1.tar": "x"}, r"holds 2 .tar; for its tar shards give the pattern .*\*\.tar"),
    ],
)
def test_open_source_says_what_it_found_in_a_folder(files, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        open_source(write(tmp_path, files), preset("nano"))


def test_open_source_says_what_is_wrong_with_a_file(tmp_path):
    config = preset("nano")
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("a.zip", "empty.tar"):
        with pytest.raises(ValueError, match=f"{name}: expected tar files.*{name} came"):
            open_source(tmp_path / name, config)
    with pytest.raises(ValueError, match=r"there is no file .*none; expected a folder, or tar files"):
        open_source(tmp_path / "none", config)
    with pytest.raises(ValueError, match="no file came"):
        TarDataset([])
    with pytest.raises(ValueError, match=r"a\.zip is no folder"):
        FolderDataset(tmp_path / "a.zip")
