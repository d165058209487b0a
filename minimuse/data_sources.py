"""Sources of captioned images: the embedded scenes, folders, tar shards, Parquet files, data sets of the hub.

    scenes                      the embedded data set (`SceneDataset`)
    saved/                      what the library `datasets` saved: a data set, or several splits
    pictures/                   metadata.jsonl or metadata.csv ("file_name", "text"), or a.txt next to a.png
    shards/{000..009}.tar       the same layout in tar files, or a.jpg with a.json ("text" or "caption"): WebDataset
    tables/*.parquet            a column of images and a column of captions
    user/name, user/name@rev    a data set of the Hugging Face hub, streamed

Training reads a source part by part. To add one, write a class with the three members of `Source`.
Files come from strangers: nothing in them is executed, no name or link leads out of a folder, and every file that is
not used is counted and named (`Problems`), except hidden ones.
Choice: only tables use the library `datasets` (extra `data`), which skips bad images without a word.

Not here: pixels (utils.py), decoding (pictures.py), what is stored of a source (data_cache.py).
"""

import csv
import glob
import io
import json
import os
import posixpath
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minimuse.config import MuseConfig
from minimuse.data_captions import CROPPED, OTHER, PART, Example, Problems, Reading, SceneDataset, Source, captions_of
from minimuse.pictures import FORMATS, Refused, decode_image
from minimuse.utils import content_hash, explain, file_hash, require

FILES_VERSION = 4  # raise it on purpose when the same files give other pixels or captions: caches become invalid
SUFFIXES = ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm .avif .eps .heic .heif .jfif .jp2 .jxl .pgm .psd .svg .tga"
CAPTIONS = (".txt", ".json")  # next to an image; text wins
METADATA = ("metadata.jsonl", "metadata.csv")
HIDDEN = re.compile(r"(^|/)\.(?!\./)")  # a name that begins with a dot, in any folder
LARGEST = 2**28  # bytes of one file in a tar: a compressed tar may promise terabytes
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")  # names of columns
TEXTS = ("text", "caption", "captions", "txt", "json")
MISSING, TWICE = "listed without a file", "listed twice"
DAMAGED, LINK = "lost in a damaged file", "a link to no file in the folder"


class Item(NamedTuple):
    """What a reader knows about an image before it decodes it."""

    name: str
    image: bytes | Path | None = None
    text: Any = None  # what `captions_of` takes
    problem: str = ""  # its kind, if the image cannot be used


class FileSource:
    """A `Source` of image files. `items(part)` of a subclass gives the items, and `read` decodes and counts them.

    hashes: the name of each file -> a hash of its content, so that a run can name the files that changed.
    Choice: the shorter side has at least size // 2 pixels. Images enlarged more than twofold teach blur.
    """

    def __init__(self, parts: int, paths: Sequence[Path], reading: Reading, *facts: Any, root: Path | None = None):
        self.parts, self.reading, self.count = parts, reading, reading.count
        facts += (reading,) * (reading != Reading())
        folder = root or (os.path.commonpath([path.absolute().parent for path in paths]) if paths else "")
        names = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
        with ThreadPoolExecutor() as pool:  # of contents: a file that was copied or touched is the same file
            self.hashes = dict(zip(names, pool.map(file_hash, paths), strict=True))
        self.fingerprint = content_hash(type(self).__name__, FILES_VERSION, list(self.hashes.items()), facts)

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part -> its examples. What cannot be used is added to `problems`."""
        for item in self.items(part):
            problems.seen += item.problem != OTHER
            try:
                if item.problem:
                    raise Refused(item.problem)
                captions = captions_of(item.text, self.reading.caption_columns) if self.reading.captioned else ("",)
                if not captions:
                    raise Refused("without a caption")
                file = io.BytesIO(item.image) if isinstance(item.image, bytes) else item.image
                square = decode_image(file, size, size // 2)
            except (Refused, FileNotFoundError) as error:
                problems.add(str(error) if isinstance(error, Refused) else MISSING, item.name)
            else:
                problems.cut += square.info["cut"]
                if square.info["cut"] > 0.5:
                    problems.add(CROPPED, item.name)
                image = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
                yield Example(image, captions, item.name)


def _scan(names: Sequence[str], read: Callable[[str], bytes], reading: Reading) -> list[Item]:
    """Files of a folder or tar, in order -> an item for each, except captions of others and metadata.

    An image is what metadata list, what has one of SUFFIXES, and a file with a caption that no such image shares.
    """
    place = {name: i for i, name in enumerate(names)}
    stem = {name: posixpath.splitext(name)[0] for name in names}
    rows: dict[str, Item] = {}
    stray: list[Item] = []
    captions: dict[str, list[str]] = defaultdict(list)  # name without suffix -> files
    for name in names:
        if posixpath.basename(name).lower() in METADATA:
            for item in _metadata(name, read(name), reading.image_column or "file_name"):
                if item.name in place and item.name not in rows:
                    rows[item.name] = item
                else:
                    stray.append(item._replace(problem=item.problem or (TWICE if item.name in rows else MISSING)))
        elif name.lower().endswith(CAPTIONS):
            captions[stem[name]].append(name)
    sure = {name for name in names if name in rows or name.lower().endswith(tuple(SUFFIXES.split()))}
    illustrated = {stem[name] for name in sure}
    for name in names:
        last = ".txt" if reading.caption_columns else ".json"
        beside = sorted(captions[stem[name]] + captions[name], key=lambda caption: caption.lower().endswith(last))
        if name in rows or name in captions[stem[name]] or posixpath.basename(name).lower() in METADATA:
            continue
        if name in sure or (beside and stem[name] not in illustrated):
            texts = (_text(read(caption), caption) for caption in beside)
            rows[name] = Item(name, text=next(filter(None, texts), None))
        else:
            stray.append(Item(name, problem=OTHER))
    used = {stem[name] for name in rows} | rows.keys()
    lonely = [name for key in captions.keys() - used for name in captions[key] if name not in rows]
    stray += [Item(name, problem="a caption without an image") for name in lonely]
    return sorted([*rows.values(), *stray], key=lambda item: place.get(item.name, len(place)))


def _text(content: bytes, name: str) -> Any:
    """A file next to an image -> the lines of a text, or the value in JSON, or None if it is not JSON."""
    if name.lower().endswith(".txt"):
        return [line for line in content.decode("utf-8-sig", "surrogateescape").splitlines() if line.strip()]
    with suppress(ValueError, RecursionError):  # a wrong encoding is a ValueError too
        return json.loads(content)


def _metadata(name: str, content: bytes, key: str) -> Iterator[Item]:
    """metadata.jsonl or metadata.csv -> an item per line, with the name of the image, or else of the line."""
    lines: Iterable[tuple[int, Any]] = enumerate(content.split(b"\n"), 1)
    if name.lower().endswith(".csv"):
        table = io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline="")
        lines = enumerate(csv.DictReader(table, restkey=""), 2)
    for number, line in lines:
        if isinstance(line, bytes) and not line.strip():
            continue
        values = line if isinstance(line, dict) else _text(line, name)
        if isinstance(values, dict) and isinstance(values.get(key), str):
            listed = posixpath.join(posixpath.dirname(name), values[key].replace("\\", "/"))
            yield Item(posixpath.normpath(listed), text=values)
        else:
            keys = ", ".join(map(json.dumps, values)) if isinstance(values, dict) else ""
            problem = f'with metadata of {keys[:99]} without "{key}"' if keys else "with metadata that do not parse"
            yield Item(f"{name}:{number}", problem=problem)


class FolderDataset(FileSource):
    """A folder of captioned images in the order of their names, with subfolders. ValueError if none has a caption.

    Metadata name files from their own folder on, and win over files next to the image. Captions are read here.
    """

    def __init__(self, folder: str | Path, reading: Reading = Reading()):
        self.folder = Path(folder)
        require(self.folder.is_dir(), f"{folder} is not a folder")
        files: dict[str, Path] = {}
        root, links = self.folder.resolve(), []
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            outside = path.is_symlink() and not (path.exists() and path.resolve().is_relative_to(root))
            if outside and not HIDDEN.search(name):
                links.append(Item(name, problem=LINK))
            elif path.is_file() and not HIDDEN.search(name):
                files[name] = path
        rows = _scan(sorted(files), lambda name: files[name].read_bytes(), reading)
        if not any((row.text or not reading.captioned) and not row.problem for row in rows if row.name in files):
            kinds = Counter(posixpath.splitext(name)[1] or "without a suffix" for name in sorted(files))
            kinds.update([LINK] * len(links) + [f"line {row.problem}" for row in rows if "metadata" in row.problem])
            found = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no file at all"
            example = 'metadata.jsonl with lines {"file_name": "a.png", "text": "a red cube"}, or a.txt next to a.png'
            expected = f"expected images ({', '.join(FORMATS)}) and {example}; shards need a pattern: {folder}/*.tar"
            raise ValueError(f"{folder} holds no captioned image but {found}; {expected}")
        self.rows = [*(row for row in rows if row.problem != OTHER), *sorted(links)]
        self.others = [row for row in rows if row.problem == OTHER]
        paths = [files[row.name] for row in self.rows if row.name in files]
        super().__init__(-(-len(self.rows) // PART), paths, reading, self.rows, root=self.folder)
        texts = {row.name: row.text for row in self.rows}
        self.hashes = {name: content_hash(value, texts[name]) for name, value in self.hashes.items()}

    def __len__(self) -> int:
        return len(self.rows)  # those with problems included

    def items(self, part: int) -> Iterable[Item]:
        """Part -> up to 500 items."""
        rows = self.rows[part * PART : (part + 1) * PART] + self.others * (part == 0)
        return (row._replace(image=self.folder / row.name) for row in rows)


class TarDataset(FileSource):
    """Tar shards, each with the same layout as a folder; a part is a shard. ValueError if none is a tar file."""

    def __init__(self, shards: Sequence[str | Path], reading: Reading = Reading()):
        self.shards = [Path(shard) for shard in shards]
        expected = "expected a folder, tar files, or files that end in .parquet"
        require(any(map(tarfile.is_tarfile, self.shards)), f"{self.shards[0]}: {expected}")
        super().__init__(len(self.shards), self.shards, reading)

    def items(self, part: int) -> Iterator[Item]:
        """Part -> the items of a shard in its order: captions are read first, images in a second pass."""
        shard = self.shards[part]
        try:
            with tarfile.open(shard) as archive:
                yield from self._items(archive, f"{shard.name}/")
                # tarfile takes damage after the first header for the end: look for the zeros that mark it
                archive.fileobj.seek(archive.offset)
                if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("unexpected end")
        except Exception:  # tarfile and decompressors raise many kinds
            yield Item(shard.name, problem=DAMAGED)

    def _items(self, archive: tarfile.TarFile, prefix: str) -> Iterator[Item]:
        members: dict[str, tarfile.TarInfo] = {}
        texts: dict[str, bytes] = {}
        with suppress(Exception):  # damage: what stands before it is used, and the caller counts it
            for member in archive:
                name = posixpath.normpath(member.name)
                if HIDDEN.search(name) or member.isdir():
                    continue
                if name in members or member.size > LARGEST or not member.isreg():
                    problem = TWICE if name in members else "too large" if member.size > LARGEST else LINK
                    yield Item(prefix + name, problem=problem)
                    continue
                if name.lower().endswith((*CAPTIONS, *METADATA)):
                    texts[name] = archive.extractfile(member).read()
                members[name] = member
        for item in _scan(list(members), texts.__getitem__, self.reading):
            image = None if item.problem else archive.extractfile(members[item.name]).read()
            yield item._replace(name=prefix + item.name, image=image)


class TableDataset(FileSource):
    """Parquet or Arrow files, or a data set of the hub, read by the library `datasets`; a part is one file.

    Images are bytes in the rows. No path in a row is opened, so a hub data set of image files needs its Parquet
    version: user/name@refs/convert/parquet. The columns are those of the first file.
    """

    def __init__(self, files: Sequence[str | Path] = (), reading: Reading = Reading(), hub: str = ""):
        self.files, self.reading = [Path(file) for file in files], reading
        self.hub, _, self.revision = hub.partition("@")
        if hub:
            from huggingface_hub import HfApi

            self.revision = HfApi().dataset_info(self.hub, revision=self.revision or None).sha
        table = self._open()
        super().__init__(len(files) or table.num_shards, self.files, reading, self.hub, self.revision)
        columns = {name: type(feature).__name__ for name, feature in (table.features or {}).items()}
        image, texts, *_, captioned = reading
        self.image = image or next((name for name in columns if name in IMAGES or columns[name] == "Image"), "")
        self.texts = texts or tuple(name for name in TEXTS if name in columns)[:1]
        expected = f"an image column ({image or ', '.join(IMAGES)}) and a caption column ({', '.join(texts or TEXTS)})"
        whole = {self.image, *self.texts} <= columns.keys() and (self.texts or not captioned)
        require(bool(whole), f"{hub or self.files[0]}: expected {expected}, found {', '.join(columns) or 'none'}")

    def _open(self, part: int | None = None) -> Any:
        with explain('this data needs datasets: pip install "minimuse[data]"', ImportError, kind=ImportError):
            from datasets import load_dataset
        if self.files and (file := self.files[part or 0]):
            return load_dataset(file.suffix[1:], data_files=str(file), split="train", streaming=True)
        table = load_dataset(self.hub, revision=self.revision, split=self.reading.split or "train", streaming=True)
        return table if part is None else table.shard(self.parts, part)

    def items(self, part: int) -> Iterator[Item]:
        """Part -> the items of one file, in the order of its rows."""
        from datasets import Image

        name = f"{self.hub}/{part}" if self.hub else self.files[part].name
        try:
            for i, row in enumerate(self._open(part).cast_column(self.image, Image(decode=False))):
                content = (row[self.image] or {}).get("bytes")
                yield Item(f"{name}:{i}", content, [row[key] for key in self.texts], problem="" if content else MISSING)
        except Exception:  # pyarrow raises many kinds
            if self.hub:  # the network failed, not one file
                raise
            yield Item(name, problem=DAMAGED)


def open_source(spec: str | Path, config: MuseConfig, *, seed: int = 0, reading: Reading = Reading()) -> Source:
    """What to train on -> a source; "scenes" is no folder. Without a language model, images need no captions."""
    require(isinstance(spec, str | Path), f"data is {spec!r}; give a text or a path")
    reading, split = reading._replace(captioned=bool(config.text_encoder)), reading.split
    if spec == "scenes":
        require(reading[:4] == Reading()[:4], "scenes have no columns and no splits; their number is --set scenes=N")
        options = {"fractions": config.fractions, "k": config.captions, "synonyms": config.synonyms}
        return SceneDataset(config.scenes, config.high_tokenizer.image_size, seed=seed, **options)
    if os.path.isdir(spec):
        folder = Path(spec)
        if split := split or "train" * (folder / "dataset_dict.json").is_file():
            splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
            require(split in splits, f"{spec} has no split {split!r}; it has {', '.join(splits) or 'none'}")
            folder /= split
        saved = sorted(folder.glob("*.arrow")) if (folder / "state.json").is_file() else []
        return TableDataset(saved, reading) if saved else FolderDataset(folder, reading)
    if files := _expand(str(spec)):
        require(not split, f"{spec} has no splits; name the files of one split instead")
        return (TableDataset if all(file.endswith(".parquet") for file in files) else TarDataset)(files, reading)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(spec)):
        return TableDataset(reading=reading, hub=str(spec))
    raise ValueError(f"there is no file {spec}; expected scenes, a folder, shards, or user/name of a hub data set")


def _expand(pattern: str) -> list[str]:
    """A path or pattern, with {000..009} as in a shell -> the files in order; each number must have its file."""
    if os.path.isfile(pattern):
        return [pattern]
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if not match:
        return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    before, first, last, after = match.groups()
    files = []
    for number in range(int(first), int(last) + 1):
        files.append(f"{before}{number:0{len(first)}}{after}")
        require(os.path.isfile(files[-1]), f"{pattern}: there is no file {files[-1]}")
    return files
