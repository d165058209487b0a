"""Captioned images out of files: a folder, or tar shards, as sources (data_images.py says what a source is).

    pictures/metadata.jsonl   {"file_name": "a.png", "text": "a red cube"}, a line an image; "text" may be a list
    pictures/a.png, a.txt     or a text file beside each image, a caption a line
    shards/000.tar, ...       a.jpg with a.txt or a.json ("text" or "caption"), the WebDataset convention

A file of its own, since all it knows is formats and what can be wrong with them: training never sees either. Files come
from strangers. Nothing of them is executed or unpickled, no name leads out of the folder, and what cannot be used is
passed over and counted (`Problems`).

Not here: pictures to read over the network.
"""

import glob
import io
import json
import os
import posixpath
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minimuse.config import MuseConfig
from minimuse.data_captions import caption
from minimuse.data_images import to_rgb, to_uint8
from minimuse.data_scenes import FRACTIONS, SPLITS, Scene, render, sample_scene
from minimuse.utils import content_hash

PART = 500  # images that one process reads in one go, where the source itself has no parts
SCENES_VERSION = 1  # part of the fingerprint: raise it when the same scenes begin to give other pixels or captions


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS, which would run Ghostscript
SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm")
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr")  # and 16-bit gray
LARGEST = 2**28  # bytes of a file in a tar: they are read as a whole, and a compressed tar may promise terabytes
RULES = 1  # part of every fingerprint: raise it when the same files begin to give other pixels or captions

HUGE, UNKNOWN, CORRUPT, TINY = "too huge", "of an unknown format", "corrupt", "too small"
UNCAPTIONED, NOT_UTF8, NOT_JSON = "without a caption", "with a caption not in UTF-8", "with metadata not in JSON"
MISSING, OUTSIDE, TWICE = "listed without a file", "listed outside of the folder", "listed twice"
DAMAGED, UNREADABLE = "lost in a damaged tar", "unreadable"


class Refused(Exception):
    """An image that cannot be used; its text is the kind of problem."""


# ---------------------------------------------------------------- sources


class Example(NamedTuple):
    image: Tensor  # (3, size, size) uint8
    captions: tuple[str, ...]  # at least one


@dataclass
class Problems:
    """What reading passed over, by kind, with the first few names of each. Plain values: `Problems(**asdict(p))` is p.

    >>> problems = Problems(seen=9)
    >>> problems.add("corrupt", "a.png")
    >>> problems.summary()
    'passed over 1 of 9 images: 1 corrupt (a.png)'
    """

    seen: int = 0  # images met, good ones included
    counts: dict[str, int] = field(default_factory=dict)  # kind -> how many were passed over
    names: dict[str, list[str]] = field(default_factory=dict)  # kind -> the first of them

    NAMED = 3  # no annotation, so no field

    def add(self, kind: str, name: str) -> None:
        """One of the images seen is passed over."""
        name = name.encode("utf-8", "backslashreplace").decode()  # file names may hold bytes that no text can
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.names[kind] = [*self.names.get(kind, []), name][: self.NAMED]

    def __add__(self, other: "Problems") -> "Problems":
        kinds = list(dict.fromkeys((*self.counts, *other.counts)))
        counts = {kind: self.counts.get(kind, 0) + other.counts.get(kind, 0) for kind in kinds}
        names = {kind: (self.names.get(kind, []) + other.names.get(kind, []))[: self.NAMED] for kind in kinds}
        return Problems(self.seen + other.seen, counts, names)

    @property
    def usable(self) -> int:
        """How many of the images seen were read."""
        return self.seen - sum(self.counts.values())

    def summary(self) -> str:
        """-> one sentence, or "" where nothing was passed over."""
        if not self.counts:
            return ""
        told = []
        for kind, n in self.counts.items():
            more = ", ..." if n > len(self.names[kind]) else ""
            told.append(f"{n} {kind} ({', '.join(self.names[kind])}{more})")
        return f"passed over {sum(self.counts.values())} of {self.seen} images: {', '.join(told)}"

    def check(self, where: str) -> None:
        """After reading all of `where`: ValueError if none of it was usable."""
        if not self.usable:
            raise ValueError(f"{where}: no usable captioned image; {self.summary() or 'nothing was found'}")


class Source(Protocol):
    """Captioned images from anywhere, read from front to back. To read two parts at once, use two processes."""

    fingerprint: str  # hex; another one wherever an image, a caption or a rule of reading could have changed
    parts: int  # units of work: a part is read by one process, in order

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part 0 to parts - 1 -> its examples at size x size pixels; what is passed over is added to `problems`."""
        ...


def check_part(part: int, parts: int) -> None:
    if not 0 <= part < parts:
        raise IndexError(f"part {part} of {parts}: expected 0 to {parts - 1}")


@dataclass(frozen=True)
class SceneDataset:
    """n captioned scenes of one split: a `Source`. All follows from (split, seed, i), so there is nothing to store."""

    n: int
    size: int
    split: str = "train"
    seed: int = 0
    fractions: tuple[float, ...] = FRACTIONS  # how often there are 1, 2 and 3 things
    k: int = 2  # captions a scene
    synonyms: float = 0.0  # share of the captions that are told in captions.SYNONYMS too

    def __post_init__(self):
        if self.n < 1 or self.size < 8 or self.k < 1 or self.split not in SPLITS:
            raise ValueError(f"{self}: expected n >= 1, size >= 8, k >= 1 and a split of {', '.join(SPLITS)}")

    @cached_property
    def fingerprint(self) -> str:
        """Of all fields but `size`, which `read` is told, and of SCENES_VERSION."""
        return content_hash("scenes", SCENES_VERSION, asdict(replace(self, size=8)))

    @property
    def parts(self) -> int:
        return -(-self.n // PART)

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part -> its examples: scenes 500 part to 500 part + 499, the same as `images` and `captions` give."""
        check_part(part, self.parts)
        indices, sized = range(part * PART, min((part + 1) * PART, self.n)), replace(self, size=size)
        for few in (indices[start : start + 50] for start in range(0, len(indices), 50)):
            for i, image in zip(few, sized.images(few), strict=True):
                problems.seen += 1
                yield Example(image, tuple(self.captions(i)))

    def __len__(self) -> int:
        return self.n

    def scene(self, i: int) -> Scene:
        if not 0 <= i < self.n:
            raise IndexError(f"scene {i} of a data set of {self.n}: expected 0 to {self.n - 1}")
        return sample_scene(self.seed * 1_000_003 + i, split=self.split, fractions=self.fractions)

    def captions(self, i: int, k: int | None = None, *, paraphrase: bool = False) -> list[str]:
        """-> k different captions of scene i; None: as many as the data set has a scene."""
        scene, found, k = self.scene(i), {}, self.k if k is None else k
        for attempt in range(50 * k):
            found[caption(scene, 10_007 * i + attempt, paraphrase=paraphrase, synonyms=self.synonyms)] = None
            if len(found) == k:
                return list(found)
        raise ValueError(f"scene {i} has no {k} different captions: ask for at most {len(found)}")

    def images(self, indices: Sequence[int] | None = None, *, progress: bool = False) -> Tensor:
        """Indices (None: all) -> uint8 images (B, 3, H, W), rendered 256 scenes at a time."""
        indices = range(self.n) if indices is None else [int(i) for i in indices]
        starts = range(0, len(indices), 256)
        if progress:
            from tqdm import tqdm

            starts = tqdm(
                starts, desc=f"rendering {len(indices)} scenes at {self.size} px", unit_scale=256, leave=False
            )
        parts = [to_uint8(render([self.scene(i) for i in indices[s : s + 256]], self.size)) for s in starts]
        return torch.cat(parts) if parts else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)


# ---------------------------------------------------------------- one image, one caption


def decode(file: str | os.PathLike | IO[bytes], size: int, min_side: int | None = None) -> Tensor:
    """An image file -> (3, size, size) uint8: upright, RGB, its shorter side scaled to `size`, cropped at its centre.

    Refused if the shorter side has fewer than `min_side` pixels. Choice: the default, size // 2, since an image that
    is enlarged more than twofold teaches blur. Colour profiles are not applied. Of moving pictures, the first frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:  # reads the header alone
                if min(image.size) < (size // 2 if min_side is None else min_side):
                    raise Refused(TINY)
                if image.mode not in MODES and image.mode[:1] != "I":
                    raise Refused(f"of mode {image.mode}")
                image.draft(None, (2 * size, 2 * size))  # lets a JPEG be decoded at half, a quarter or an eighth
                square = ImageOps.fit(_rgb(ImageOps.exif_transpose(image)), (size, size), Image.Resampling.LANCZOS)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(HUGE) from error
    except UnidentifiedImageError as error:
        raise Refused(UNKNOWN) from error
    except Exception as error:  # decoders meet damaged files with nearly every kind of exception
        raise Refused(UNREADABLE if getattr(error, "errno", None) else CORRUPT) from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    """A PIL image of one of MODES, or of 16-bit gray, which Pillow's own conversion clips -> RGB."""
    if image.mode[:1] != "I":
        return to_rgb(image)
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise Refused(f"of mode {image.mode}")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def captions_of(value: Any) -> tuple[str, ...]:
    """A text, a list of texts, or an object that has either as "text" or "caption" -> those that say something."""
    if isinstance(value, dict):
        value = value.get("text") or value.get("caption")
    texts = value if isinstance(value, list) else [value]
    texts = [" ".join(text.split()) for text in texts if isinstance(text, str)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # JSON can hold half a character
        raise Refused(NOT_UTF8) from error
    return tuple(text for text in texts if text)


def _lines(content: bytes) -> tuple[str, ...]:
    """A caption file -> a caption for each line that says something."""
    try:
        return captions_of(content.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise Refused(NOT_UTF8) from error


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # a wrong encoding is a ValueError too
        raise Refused(NOT_JSON) from error


# ---------------------------------------------------------------- folders


class Row(NamedTuple):
    """What a folder says of one image."""

    name: str  # below the folder, with /
    captions: tuple[str, ...] = ()
    problem: str = ""  # its kind, if there is one already


class FolderDataset:
    """A folder of images with metadata.jsonl, or a .txt beside each: a `Source`, in the order of the names.

    Folders in it are searched too; a metadata.jsonl speaks of the files from its own folder on. Hidden files are left
    out. Names and captions are read here, images when `read`. ValueError if there is no image with a caption.
    """

    def __init__(self, folder: str | Path, *, min_side: int | None = None):
        self.folder, self.min_side = Path(folder), min_side
        if not self.folder.is_dir():
            raise ValueError(f"{folder} is no folder")
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        files = {name: files[name] for name in sorted(files) if "/." not in f"/{name}"}
        self.rows = _scan(files)
        if all(row.problem for row in self.rows):
            raise ValueError(_nothing_in(self.folder, files, self.rows))
        stats = [(row.name, files[row.name].stat()) for row in self.rows if row.name in files]
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        self.fingerprint = content_hash("folder", RULES, min_side, self.rows, facts)
        self.parts = -(-len(self.rows) // PART)

    def __len__(self) -> int:
        """How many images and rows of metadata there are, those with problems included."""
        return len(self.rows)

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part -> its examples: up to 500, in the order of their names."""
        check_part(part, self.parts)
        for row in self.rows[part * PART : (part + 1) * PART]:
            problems.seen += 1
            try:
                if row.problem:
                    raise Refused(row.problem)
                yield Example(decode(self.folder / row.name, size, self.min_side), row.captions)
            except Refused as problem:
                problems.add(str(problem), row.name)


def _scan(files: dict[str, Path]) -> list[Row]:
    """Files of a folder by their names -> a row for each image, and for each line of metadata that leads to none."""
    rows: dict[str, Row] = {}
    stray = []
    for name, path in files.items():
        if posixpath.basename(name) == "metadata.jsonl":
            for row in _metadata(name, path.read_bytes()):
                if row.name in files and row.name in rows:
                    stray.append(row._replace(captions=(), problem=TWICE))
                elif row.name in files:
                    rows[row.name] = row
                else:
                    stray.append(row._replace(problem=row.problem or MISSING))
    for name in files:
        if name not in rows and name.rpartition(".")[2].lower() in SUFFIXES:
            rows[name] = _beside(name, files)
    return sorted([*rows.values(), *stray])


def _metadata(name: str, content: bytes) -> Iterator[Row]:
    """metadata.jsonl -> a row a line; the name of a line that names no file is the metadata's own, and its number."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        file = f"{name}:{number}"
        try:
            values = _json(line)
            if not isinstance(values, dict) or not isinstance(values.get("file_name"), str):
                raise Refused(NOT_JSON)
            said = values["file_name"].replace("\\", "/")
            file = posixpath.normpath(posixpath.join(posixpath.dirname(name), said))
            if file.startswith(("../", "/")):
                raise Refused(OUTSIDE)
            texts = captions_of(values)
            yield Row(file, texts, "" if texts else UNCAPTIONED)
        except Refused as problem:
            yield Row(file, (), str(problem))


def _beside(name: str, files: dict[str, Path]) -> Row:
    """An image that no metadata speak of -> its row, with the captions of the .txt beside it."""
    path = files.get(f"{name.rpartition('.')[0]}.txt")
    try:
        texts = _lines(path.read_bytes()) if path else ()
        return Row(name, texts, "" if texts else UNCAPTIONED)
    except Refused as problem:
        return Row(name, (), str(problem))


def _nothing_in(folder: Path, files: dict[str, Path], rows: Sequence[Row]) -> str:
    """What there is in a folder without captioned images, and what we expect."""
    kinds = Counter(posixpath.splitext(name)[1].lower() or "without an ending" for name in files)
    found = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) or "no file at all"
    wrong = "".join(f"; {n} {kind}" for kind, n in Counter(row.problem for row in rows).items())
    if kinds[".tar"]:
        first = next(name for name in files if name.lower().endswith(".tar"))
        return f"{folder} holds {found}; for its tar shards give the pattern {(folder / first).parent / '*.tar'}"
    return (
        f"{folder} holds no captioned image: {found}{wrong}. Expected images ({', '.join(SUFFIXES)}) and either "
        'metadata.jsonl with lines {"file_name": "a.png", "text": "a red cube"}, or a.txt beside a.png'
    )


# ---------------------------------------------------------------- tar shards


class TarDataset:
    """Tar shards on this machine, of images with .txt or .json beside them: a `Source`; a part is a shard.

    pattern: a path, a pattern ("shards/{000..009}.tar", "shards/*.tar"), or a list of either. ValueError if a shard is
    missing, or if none is a tar file.
    """

    def __init__(self, pattern: str | Path | Sequence[str | Path], *, min_side: int | None = None):
        _webdataset()
        patterns = [pattern] if isinstance(pattern, (str, Path)) else pattern
        self.shards, self.min_side = [path for one in patterns for path in _expand(one)], min_side
        if not any(tarfile.is_tarfile(path) for path in self.shards):
            named = ", ".join(str(path) for path in self.shards[:3])
            raise ValueError(f"{pattern}: expected tar files, {named or 'no file'} came, and no tar file among it")
        stats = [(path.name, path.stat()) for path in self.shards]
        facts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        self.fingerprint = content_hash("tar", RULES, min_side, facts)
        self.parts = len(self.shards)

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part -> the examples of one shard, in the order in which it holds them."""
        check_part(part, self.parts)
        shard = self.shards[part]
        for sample in _samples(shard, problems):
            image = next((sample[suffix] for suffix in SUFFIXES if suffix in sample), None)
            if image is None and not {"txt", "json"} & set(sample):
                continue  # a licence, or whatever else lies about
            problems.seen += 1
            try:
                if image is None:
                    raise Refused(MISSING)
                texts = _lines(sample.get("txt", b"")) or captions_of(_json(sample.get("json", b"{}")))
                if not texts:
                    raise Refused(UNCAPTIONED)
                yield Example(decode(io.BytesIO(image), size, self.min_side), texts)
            except Refused as problem:
                problems.add(str(problem), f"{shard.name}/{sample['__key__']}")


def _webdataset() -> Any:
    try:
        from webdataset import tariterators
    except ImportError as error:
        raise ImportError('tar shards need the webdataset library: pip install "minimuse[webdataset]"') from error
    return tariterators


def _expand(pattern: str | Path) -> list[Path]:
    """A path or pattern -> the files that it names, in order; each must be there."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    from braceexpand import braceexpand

    found = []
    for name in braceexpand(Path(pattern).as_posix()):  # to braceexpand, a backslash is an escape
        paths = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not paths:
            raise ValueError(f"{pattern}: there is no file {name}; expected a folder, or tar files, on this machine")
        found += [Path(path) for path in paths]
    return found


def _samples(shard: Path, problems: Problems) -> Iterator[dict[str, Any]]:
    """A tar file -> its samples as webdataset groups them: {"__key__": "a", "jpg": bytes, "txt": bytes}.

    We take that convention alone: webdataset's decoders would unpickle, and its opener runs `pipe:` commands.
    """

    def twice(error: Exception) -> bool:  # all that grouping raises; the first of the two stays
        problems.seen += 1
        problems.add(TWICE, shard.name)
        return True

    yield from _webdataset().group_by_keys(_members(shard, problems), handler=twice)


def _members(shard: Path, problems: Problems) -> Iterator[dict[str, Any]]:
    """A tar file -> its files as webdataset hands them on. tarfile takes any damage after the first header for the end
    of the archive, so we look whether the zeros that mark the end are there."""
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.size > LARGEST:
                    problems.seen += 1
                    problems.add(HUGE, f"{shard.name}/{member.name}")
                elif member.isreg():
                    yield {"fname": member.name, "data": archive.extractfile(member).read(), "__url__": shard.name}
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("unexpected end")
    except Exception:  # of tarfile, and of whatever decompresses
        problems.seen += 1
        problems.add(DAMAGED, shard.name)


# ---------------------------------------------------------------- whatever the user names


def open_source(spec: str | Path, config: MuseConfig, *, seed: int = 0, min_side: int | None = None) -> Source:
    """What to train on -> a source: "scenes" (a folder of that name is ./scenes), a folder, a tar file, a pattern."""
    if spec == "scenes":
        size = config.high_tokenizer.image_size
        return SceneDataset(
            config.scenes, size, seed=seed, fractions=config.fractions, k=config.captions, synonyms=config.synonyms
        )
    if os.path.isdir(spec):
        return FolderDataset(spec, min_side=min_side)
    return TarDataset(spec, min_side=min_side)
