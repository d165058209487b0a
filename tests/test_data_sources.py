"""data_sources.py: captioned images from strangers' files; what is wrong with some never spoils the others."""

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import zlib
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minimuse import data_sources
from minimuse.config import preset
from minimuse.data_cache import TrainingData
from minimuse.data_captions import CROPPED, OTHER, Reading
from minimuse.data_sources import (
    FolderDataset,
    Problems,
    SceneDataset,
    TarDataset,
    captions_of,
    open_source,
)
from minimuse.pictures import Refused

CONFIG = preset("nano")
GOOD = 20


def picture(i: int = 0, size=(36, 36), mode: str = "RGB", form: str = "PNG", **options) -> bytes:
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


def opened(spec, **options):
    return open_source(spec, CONFIG, **options)


def read_all(source, size: int = 16):
    problems = Problems()
    return [example for part in range(source.parts) for example in source.read(part, size, problems)], problems


def counts(problems) -> dict[str, int]:
    return {kind: len(names) for kind, names in problems.names.items()}


def said(examples) -> list[str]:
    return [example.captions[0] for example in examples]


TRUNCATED = picture(3, (400, 300), form="JPEG")[:1200]
WRONG = {  # kind -> an image and its caption file, in a folder as in a tar
    "damaged": {"bad.jpg": TRUNCATED, "bad.txt": "x"},
    "of an unknown format": {"bad.png": b"this is text", "bad.txt": "x"},
    "too small": {"bad.png": picture(0, (90, 7)), "bad.txt": "x"},
    "too large": {"bad.png": header(60_000, 60_000), "bad.txt": "x"},
    "of mode F": {"bad.tif": picture(0, mode="F", form="TIFF"), "bad.txt": "x"},
    "without a caption": {"bad.png": picture(), "bad.txt": " \n\n"},
    "with a caption not in UTF-8": {"bad.png": picture(), "bad.txt": b"caf\xe9"},
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_kind_of_problem_among_good_images(kind, tmp_path, recwarn):
    folder = FolderDataset(write(tmp_path / "pictures", good() | WRONG[kind]))
    shards = TarDataset([tar(tmp_path / "0.tar", good() | WRONG[kind])])
    bad = next(iter(WRONG[kind]))
    for source, name in ((folder, ""), (shards, "0.tar/")):
        examples, problems = read_all(source)
        assert said(examples) == [f"number {i}" for i in range(GOOD)], "every good image, in order"
        assert problems.summary() == f"left out 1 of 21 images: 1 {kind} ({name}{bad})"
        assert problems.seen == GOOD + 1
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
    assert problems.summary() == "left out 1 of 3 images: 1 listed without a file (g01.png)"


def line(name, text) -> str:
    return json.dumps({"file_name": name, "text": text}) + "\n"


def test_metadata_with_other_keys_are_named(tmp_path):
    files = {"a.png": picture(), "metadata.jsonl": '{"image": "a.png", "prompt": "a red cube"}\n'}
    with pytest.raises(ValueError, match='1 line with metadata of "image", "prompt" without "file_name"'):
        FolderDataset(write(tmp_path, files))


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
    "with metadata that do not parse (metadata.jsonl:21)": [
        "{'file_name'",
        '["g01.png"]',
        "[" * 100_000,
    ],
    'with metadata of "text" without "file_name" (metadata.jsonl:21)': ['{"text": "x"}'],
    "listed without a file (none.png)": [line("none.png", "x")],
    "listed without a file (../x.png)": [line("../x.png", "x"), line("sub/../../x.png", "x")],
    "listed without a file (/x.png)": [line("/x.png", "x")],
    "listed twice (g03.png)": [line("g03.png", "again"), line("./g03.png", "again")],
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
    assert problems.summary() == f"left out 1 of 21 images: 1 {kind}"


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


def test_fingerprint_of_a_folder(tmp_path):
    folder = write(tmp_path / "in", good(3) | {"metadata.jsonl": line("g00.png", "one")})
    prints = [FolderDataset(folder).fingerprint]
    assert FolderDataset(str(folder)).fingerprint == prints[0], "reading twice changes nothing"
    write(folder, {"notes.md": "not a part of the data", ".cache/x.png": picture()})
    assert FolderDataset(folder).fingerprint == prints[0], "nor does a file that is not read"
    moved = folder.rename(tmp_path / "moved")
    assert FolderDataset(moved).fingerprint == prints[0], "nor does moving the folder"
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
    os.utime(moved / "g00.png", (1, 1))
    assert FolderDataset(moved).fingerprint == prints[-1], "a touched file is the same file"
    assert len(set(prints)) == len(prints), "each change shows"


def test_hashes_name_the_file_that_changed(tmp_path):
    folder = write(tmp_path / "in", good(3) | {"metadata.jsonl": line("g00.png", "one")})
    for change, name in (
        ({"metadata.jsonl": line("g00.png", "two")}, "g00.png"),
        ({"g01.txt": "another"}, "g01.png"),
        ({"g02.png": picture(2, (41, 33))}, "g02.png"),
    ):
        old = FolderDataset(folder).hashes
        new = FolderDataset(write(folder, change)).hashes
        assert [key for key in new if new[key] != old[key]] == [name]


def test_fingerprint_of_tars(tmp_path):
    pattern = f"{tmp_path}/{{0..1}}.tar"
    tar(tmp_path / "0.tar", good(2))
    tar(tmp_path / "1.tar", good(2))
    prints = [opened(pattern).fingerprint]
    assert opened(pattern).fingerprint == prints[0]
    prints.append(opened(tmp_path / "0.tar").fingerprint)
    prints.append(TarDataset([tmp_path / "1.tar", tmp_path / "0.tar"]).fingerprint)
    os.utime(tmp_path / "1.tar", (1, 1))
    assert opened(pattern).fingerprint == prints[0], "a touched file is the same file"
    assert list(opened(pattern).hashes) == ["0.tar", "1.tar"]
    tar(tmp_path / "1.tar", good(30))
    os.utime(tmp_path / "1.tar", (1, 1))
    prints.append(opened(pattern).fingerprint)
    assert len(set(prints)) == len(prints), "each change shows"


def test_a_part_is_a_shard_and_patterns_keep_their_order(tmp_path):
    for i in range(11):
        tar(tmp_path / f"{i:03}.tar", {"a.png": picture(), "a.txt": f"shard {i}"})
    for pattern in (
        f"{tmp_path}/{{000..010}}.tar",
        tmp_path / "*.tar",
    ):
        source = opened(pattern)
        assert source.parts == 11
        assert said(read_all(source)[0]) == [f"shard {i}" for i in range(11)], f"{pattern}"
    odd = tar(tmp_path / "{odd}[1].tar", {"a.png": picture(), "a.txt": "odd"})
    assert said(read_all(opened(odd))[0]) == ["odd"], "a file of that very name comes before a pattern"
    with pytest.raises(ValueError, match=r"there is no file .*011\.tar"):
        opened(f"{tmp_path}/{{000..011}}.tar")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_captions_of_tars(mode, tmp_path):
    files = {
        "README.md": "no image, no caption",
        "./0.jpg": picture(form="JPEG"), "./0.json": json.dumps({"caption": "from json", "width": 3}),
        "in/1.PNG": picture(), "in/1.txt": "from txt", "in/1.json": json.dumps({"text": "not this"}),
        "in/2.webp": picture(form="WEBP"), "in/2.json": json.dumps({"text": ["one", "two"]}),
        "3.png": picture(), "3.json": "{not json",
        "4.png": picture(), "4.json": "[1, 2]",
        "5.txt": "words alone",
    }  # fmt: skip
    examples, problems = read_all(TarDataset([tar(tmp_path / "0.tar", files, mode)]))
    assert [example.captions for example in examples] == [("from json",), ("from txt",), ("one", "two")]
    assert problems.seen == 6
    folder = FolderDataset(write(tmp_path / "in", files))
    assert sorted(said(read_all(folder)[0])) == ["from json", "from txt", "one"], "a folder has the same layout"
    assert counts(problems) == {
        "without a caption": 2,
        "a caption without an image": 1,
        OTHER: 1,
    }


def test_a_tar_may_name_a_file_twice(tmp_path):
    files = list(good().items())
    twice = [*files[:2], (files[0][0], picture(7)), *files[2:]]
    examples, problems = read_all(TarDataset([tar(tmp_path / "0.tar", twice)]))
    assert said(examples) == [f"number {i}" for i in range(GOOD)]
    assert examples[0].image[0, 0, 0] == 0, "the first one counts"
    assert problems.summary() == "left out 1 of 21 images: 1 listed twice (0.tar/g00.png)"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.55, 0.7])
def test_a_truncated_tar_gives_what_it_still_has(mode, share, tmp_path):
    whole = tar(tmp_path / "0.tar", good(), mode).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: int(len(whole) * share)])
    (tmp_path / "2.tar").write_bytes(b"no tar at all")
    examples, problems = read_all(opened(tmp_path / "*.tar"))
    assert said(examples)[:GOOD] == [f"number {i}" for i in range(GOOD)]
    rest = said(examples)[GOOD:]
    assert len(rest) < GOOD
    assert rest == said(examples)[: len(rest)], "from the front, in order"
    assert problems.names["lost in a damaged file"] == ["1.tar", "2.tar"], f"{problems}"


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
            with pytest.raises(ValueError, match="expected a folder, tar files"):
                TarDataset([path])
            return
        examples, problems = read_all(TarDataset([path]))
    assert said(examples) == [f"number {i}" for i in range(member // 2)]
    assert counts(problems)["lost in a damaged file"] == 1, f"{problems}"


def test_a_tar_that_promises_terabytes(tmp_path):
    path = tar(tmp_path / "0.tar", good(3))
    info = tarfile.TarInfo("huge.png")
    info.size = 2**42
    zeros = path.read_bytes().rindex(b"number 2") + 512
    path.write_bytes(path.read_bytes()[:zeros] + info.tobuf() + bytes(1024))
    examples, problems = read_all(TarDataset([path]))
    assert said(examples) == ["number 0", "number 1", "number 2"]
    assert problems.names == {"too large": ["0.tar/huge.png"], "lost in a damaged file": ["0.tar"]}


def test_nothing_in_a_tar_is_executed(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    bomb = pickle.dumps(Trap())
    files = {"a.png": picture(), "a.txt": "fine", "a.pkl": bomb, "a.pyd": bomb, "a.pth": bomb, "../b.txt": "x"}
    examples, _ = read_all(TarDataset([tar(tmp_path / "0.tar", files)]))
    assert said(examples) == ["fine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar"], "nothing ran, nothing was unpacked"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        opened(f"pipe:mkdir {tmp_path / 'sprung'}")
    assert not (tmp_path / "sprung").exists()


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
        source = open_source(spec, config)
        assert len(read_all(source)[0]) == n, f"{spec}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no captioned image but no file at all; expected images .*metadata.jsonl"),
        ({"a.png": picture(), "b.png": picture(), "c.csv": "x"}, "2 .png, 1 .csv; expected"),
        ({"a.avif": "x", "b": "x"}, "1 .avif, 1 without a suffix; expected images .PNG, JPEG"),
        (
            {"metadata.jsonl": line("a.png", "x") + "{"},
            "but 1 .jsonl, 1 line with metadata that do not parse; expected",
        ),
        ({"in/0.tar": "x", "in/1.tar": "x"}, r"but 2 .tar; .* shards need a pattern: .*\*\.tar"),
    ],
)
def test_open_source_says_what_it_found_in_a_folder(files, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        open_source(write(tmp_path, files), preset("nano"))


def test_open_source_says_what_is_wrong_with_a_file(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "empty.tar").write_bytes(b"")
    for name in ("a.zip", "empty.tar"):
        with pytest.raises(ValueError, match=f"{name}: expected a folder, tar files"):
            opened(tmp_path / name)
    with pytest.raises(ValueError, match=r"there is no file .*none; expected scenes, a folder, shards, or user/name"):
        opened(tmp_path / "none")
    with pytest.raises(ValueError, match="data is 3; give a text or a path"):
        opened(3)
    with pytest.raises(ValueError, match=r"there is no file .*0\.tar"):  # no list of names is made first
        opened(f"{tmp_path}/{{0..999999999999}}.tar")
    with pytest.raises(ValueError, match=r"a\.zip is not a folder"):
        FolderDataset(tmp_path / "a.zip")


# --- metadata.csv, and pitfall 31 -------------------------------------------------------------------------------------


def test_csv_metadata(tmp_path):
    files = {f"g{i}.png": picture(i) for i in range(3)}
    rows = b'\xef\xbb\xbffile_name,text\ng2.png,"last, in quotes\nand two lines"\n'
    rows += b"g0.png,caf\xc3\xa9,more\ng1.png,caf\xe9\n,x\n"
    examples, problems = read_all(opened(write(tmp_path, files | {"metadata.csv": rows})))
    assert [e.captions for e in examples] == [("café",), ("last, in quotes and two lines",)]
    assert counts(problems) == {"with a caption not in UTF-8": 1, "listed without a file": 1}


def test_pitfall_31_nothing_that_looks_like_an_image_is_ignored(tmp_path):
    files = good(2) | {
        "a.heic": b"?",
        "a.txt": "x",
        "B.SVG": "<svg/>",
        "c.xyz": b"?",
        "c.txt": "y",
        "d.v2.png": picture(),
    }
    files |= {"e.txt": "its image was deleted", "notes.md": "not an image"}
    want = {"of an unknown format": 2, "without a caption": 2, "a caption without an image": 1, OTHER: 1}
    for source in (opened(write(tmp_path / "in", files)), opened(tar(tmp_path / "0.tar", files))):
        examples, problems = read_all(source)
        assert said(examples) == ["number 0", "number 1"]
        assert counts(problems) == want, f"{problems}"
        assert problems.seen == 7


@pytest.mark.parametrize("name", ["a.img", "a.v1.jpg", "a.dat", "a"])
def test_what_shares_its_name_with_a_caption_is_an_image(name, tmp_path):
    """Whatever its suffix: it is tried, and counted if it is none."""
    caption = f"{name.removesuffix('.jpg').removesuffix('.img').removesuffix('.dat')}.txt"
    for content, used in ((picture(), 3), (b"no image", 2)):
        files = good(2) | {name: content, caption: "its caption"}
        for source in (opened(write(tmp_path / "in", files)), opened(tar(tmp_path / "0.tar", files))):
            examples, problems = read_all(source)
            assert (len(examples), problems.seen) == (used, 3), f"{name}: {problems}"
            assert counts(problems) == ({} if used == 3 else {"of an unknown format": 1})


def test_what_is_no_image_is_named_and_changes_nothing(tmp_path):
    folder = write(tmp_path / "in", good(2))
    before = opened(folder)
    stray = ["metadata.json1", "table.csv", "x.img", "noext", "in/captions.jsonl", "my-metadata.csv"]
    examples, problems = read_all(opened(write(folder, dict.fromkeys(stray, "?"))))
    assert (len(examples), problems.seen) == (2, 2)
    assert set(problems.names[OTHER]) == set(stray)
    assert problems.summary().startswith(
        "6 neither image nor caption (in/captions.jsonl, metadata.json1, my-metadata.csv, ...)"
    )
    assert opened(folder).fingerprint == before.fingerprint


def test_suffixes_of_any_case(tmp_path):
    files = {"a.PNG": picture(), "a.TXT": "one", "b.png": picture(), "b.Json": '{"text": "two"}', "c.png": picture()}
    folder = write(tmp_path / "in", files | {"METADATA.JSONL": line("c.png", "three")})
    for source in (
        opened(folder),
        opened(tar(tmp_path / "0.tar", files | {"Metadata.Csv": "file_name,text\nc.png,three"})),
    ):
        assert said(read_all(source)[0]) == ["one", "two", "three"]
    both = {"a.png": picture(), "a.png.txt": "of the full name", "b.png": picture(), "b.txt": "text", "b.json": "{}"}
    assert said(read_all(opened(write(tmp_path / "both", both)))[0]) == ["of the full name", "text"]


def test_other_fields_are_named(tmp_path):
    rows = '{"file_name": "a.png", "prompt": "x", "seed": 3}'
    files = {"a.png": picture(), "metadata.jsonl": rows, "b.png": picture(), "b.json": '{"prompt": "y"}'}
    _, problems = read_all(opened(write(tmp_path, files)))
    assert problems.names == {
        'without "text" or "caption", but with "prompt", "seed"': ["a.png"],
        'without "text" or "caption", but with "prompt"': ["b.png"],
    }


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_do_not_lead_out(tmp_path):
    write(tmp_path, {"out/secret.png": picture(), "out/secret.txt": "x"})
    folder = write(tmp_path / "in", good(2))
    for name, target in {
        "out.png": "../out/secret.png", "dead.png": "none.png", "self.png": "self.png", "dir": "../out",
        "g00.copy.png": "g00.png", "loop": ".", "metadata.jsonl": "../out/secret.txt",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    write(folder, {"g00.copy.txt": "a link inside", "out.txt": "its target is outside"})
    examples, problems = read_all(opened(folder))
    assert said(examples) == ["a link inside", "number 0", "number 1"]
    assert set(problems.names["a link to no file in the folder"]) == {
        "out.png", "dead.png", "self.png", "dir", "metadata.jsonl"
    }  # fmt: skip
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, ".")
    examples, problems = read_all(opened(path))
    assert said(examples)[:2] == ["number 0", "number 1"]
    assert "0.tar/out.png" in problems.names["a link to no file in the folder"]


def test_the_crop_is_told(tmp_path):
    files = {"a.png": picture(0, (40, 32)), "b.png": picture(0, (100, 20)), "c.png": picture()}
    files |= {f"{name}.txt": name for name in "abc"}
    _, problems = read_all(opened(write(tmp_path, files)))
    assert problems.names == {CROPPED: ["b.png"]}
    assert problems.summary() == "1 cropped by more than half (b.png); the crop to squares cut 33% of the pixels"


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_gray_of_any_depth(bits, dtype, tmp_path):
    levels = np.linspace(0, 2**bits - 1, 32).round().astype(dtype)
    path = tmp_path / ("a.png" if dtype is np.uint16 else "a.tif")
    Image.fromarray(np.tile(levels, (32, 1))).save(path)
    (tmp_path / "a.txt").write_text("a ramp")
    (example,), _ = read_all(opened(tmp_path), 32)
    want = torch.linspace(0, 255, 32).expand(3, 32, 32)
    assert (example.image - want).abs().max() <= 1, "nearly black"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(path: Path, image: str = "image", text: str = "text", n: int = 3, first: int = 0) -> Path:
    """A Parquet file of images as the hub stores them."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(first, first + n)]
    pq.write_table(pa.table({image: rows, text: [f"number {i}" for i in range(first, first + n)]}), path)
    return path


def test_parquet(tmp_path):
    for i in range(3):
        table(tmp_path / f"{i}.parquet", first=3 * i)
    source = opened(tmp_path / "*.parquet")
    examples, problems = read_all(source)
    assert (source.parts, said(examples), problems.summary()) == (3, [f"number {i}" for i in range(9)], "")
    assert [e.image[0, 5, 5].item() for e in examples] == [10 * i for i in range(9)], "each with its own image"
    again, one = (opened(tmp_path / name).fingerprint for name in ("*.parquet", "0.parquet"))
    assert source.fingerprint == again != one


def test_bytes_and_datasets_own_parquet(tmp_path):
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"id": [7], "jpg": [picture(4, form="JPEG")], "caption": [["one", "two"]]}), tmp_path / "a.parquet"
    )
    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    rows = {"photo": [Image.new("RGB", (32, 32))], "text": ["three"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "b.parquet")
    for name, captions in (("a", ("one", "two")), ("b", ("three",))):
        examples, problems = read_all(opened(tmp_path / f"{name}.parquet"))
        assert [e.captions for e in examples] == [captions]
        assert problems.summary() == ""


def same_rows(folder: Path) -> dict[str, Path]:
    """The same three rows in all kinds: two columns with captions, one of them with lists, and images of any size."""
    datasets = pytest.importorskip("datasets")
    names, whats, others = ["a.png", "b.png", "c.png"], ["one", "two", ""], [["uno", "ein"], [], ["tres"]]
    images = [picture(i, (36, 33 + i)) for i in range(3)]
    files = dict(zip(names, images, strict=True))
    lines = [{"photo": name, "what": w, "other": o} for name, w, o in zip(names, whats, others, strict=True)]
    write(folder / "lines", files | {"metadata.jsonl": "\n".join(map(json.dumps, lines))})
    first = "photo,what,other,third\na.png,one,uno,ein\nb.png,two,,\nc.png,,tres,\n"  # CSV has no lists, but columns
    write(folder / "csv", files | {"metadata.csv": first})
    for i, row in enumerate(lines):
        pair = {names[i]: images[i], f"{names[i][0]}.json": json.dumps(row), f"{names[i][0]}.txt": "another"}
        tar(folder / f"{i}.tar", pair)
    kinds = {
        "photo": datasets.Image(),
        "what": datasets.Value("string"),
        "other": datasets.List(datasets.Value("string")),
    }
    rows = {"photo": [{"bytes": image, "path": None} for image in images], "what": whats, "other": others}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.to_parquet(folder / "rows.parquet")
    table.save_to_disk(folder / "saved", num_shards=2)
    datasets.DatasetDict({"train": table.select([0]), "test": table}).save_to_disk(folder / "splits")
    return {name: folder / name for name in ("lines", "csv", "*.tar", "rows.parquet", "saved", "splits")}


def test_the_same_rows_in_all_kinds_of_files(tmp_path, tiny_muse):
    pixels, tokens = [], []
    for kind, place in same_rows(tmp_path).items():
        columns = ["what", "other"] + ["third"] * (kind == "csv")
        reading = Reading("photo", columns, "test" if kind == "splits" else "")
        examples, problems = read_all(opened(place, reading=reading))
        assert [e.captions for e in examples] == [("one", "uno", "ein"), ("two",), ("tres",)], kind
        assert [e.image[0, 5, 5].item() for e in examples] == [0, 10, 20], f"{kind}: each with its own image"
        assert problems.names == {}, f"{kind}: {problems.summary()}"
        pixels.append(torch.stack([e.image for e in examples]))
        assert pixels[-1].equal(pixels[0]), f"{kind}: the same pixels"
        source = open_source(str(place), tiny_muse.config, reading=reading._replace(count=2))
        data = TrainingData(tmp_path / "cache", source, tiny_muse.config, tiny_muse.encoder)
        deque((*data.read(), *data.tokenize("low", tiny_muse.parts["low_tokenizer"])), maxlen=0)
        tokens.append(data.tokens["low"][:])
        assert tokens[-1].equal(tokens[0]), f"{kind}: the same tokens"
        assert (len(tokens[-1]), data.captions()) == (2, [("one", "uno", "ein"), ("two",)]), f"{kind}: the first two"
        wrong = reading._replace(caption_columns=["what", "title"])
        tables = kind in ("saved", "splits", "rows.parquet")
        with pytest.raises(ValueError, match="title") if tables else nullcontext():
            assert 'without "title", but with' in read_all(opened(place, reading=wrong))[1].summary()
    with pytest.raises(ValueError, match=r"has no split 'tset'; it has test, train"):
        opened(tmp_path / "splits", reading=Reading(split="tset"))
    assert len(read_all(opened(tmp_path / "splits", reading=Reading("photo", ["what"])))[0]) == 1, "train"
    with pytest.raises(ValueError, match=r"has no splits; name the files of one split"):
        opened(tmp_path / "rows.parquet", reading=Reading(split="test"))
    with pytest.raises(ValueError, match=r"scenes have no columns and no splits"):
        opened("scenes", reading=Reading(caption_columns=["what"]))


def test_what_is_wrong_in_a_table_is_counted(tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good_file = table(tmp_path / "0.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(good_file[: len(good_file) // 2])
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    rows = [{"bytes": picture(), "path": ""}, None, {"bytes": None, "path": str(secret)}, {"bytes": b"?", "path": ""}]
    pq.write_table(pa.table({"image": rows, "text": ["", "b", "c", "d"]}), tmp_path / "2.parquet")
    examples, problems = read_all(opened(tmp_path / "*.parquet"))
    assert said(examples) == ["number 0", "number 1", "number 2"]
    assert problems.names == {
        "lost in a damaged file": ["1.parquet"],
        "without a caption": ["2.parquet:0"],
        "listed without a file": ["2.parquet:1", "2.parquet:2"],
        "of an unknown format": ["2.parquet:3"],
    }, "no path of a row is opened on this machine"
    assert problems.seen == 8


def test_unknown_columns_and_a_missing_library_are_errors(tmp_path, monkeypatch):
    odd = table(tmp_path / "odd.parquet", text="alt")
    with pytest.raises(ValueError, match=r"odd.parquet: expected .* a caption column .*, found image, alt"):
        opened(odd)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "minimuse\[data\]"'):
        opened(table(tmp_path / "0.parquet"))
    assert opened(write(tmp_path / "in", good(1))).parts == 1, "folders do without"
    assert opened(tar(tmp_path / "0.tar", good(1))).parts == 1, "and so do tar shards"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set of two files, at two revisions."""
    datasets, client = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    files = [str(table(tmp_path / f"{i}.parquet", first=3 * i)) for i in range(2)]
    load, asked = datasets.load_dataset, []

    def load_dataset(path, revision=None, **options):
        asked.append((path, revision))
        return load("parquet", data_files=files, **options)

    class Api:
        def dataset_info(self, name, revision):
            return SimpleNamespace(sha={None: "new", "v1": "old"}[revision])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(client, "HfApi", Api)
    return asked


def test_a_hub_data_set(hub, tmp_path, monkeypatch):
    source, old = opened("user/name"), opened("user/name@v1")
    assert set(hub) == {("user/name", "new"), ("user/name", "old")}, "the revision is fixed when it is opened"
    assert source.fingerprint != old.fingerprint
    examples, problems = read_all(source)
    assert (source.parts, said(examples), problems.summary()) == (2, [f"number {i}" for i in range(6)], "")
    monkeypatch.setattr(data_sources, "captions_of", lambda text, names: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # as if the network broke: no image is left out for that
        read_all(source)


# --- problems ---


def test_problems_are_counted_and_named():
    problems = Problems(seen=27)
    problems.add("damaged", *(f"{name}.png" for name in "abcde"))
    problems.add("without a caption", "z.png")
    assert problems.summary() == (
        "left out 6 of 27 images: 5 damaged (a.png, b.png, c.png, ...), 1 without a caption (z.png)"
    )
    assert Problems(**json.loads(json.dumps(asdict(problems)))) == problems, "plain values"
    assert Problems(seen=9).summary() == "", "nothing was left out"
