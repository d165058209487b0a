"""Arrays that are computed once: shards on disk, written so that nothing can break them, read by memory map.

While a transformer trains, tokenizers and language model are frozen (Muse 2.1, 2.3), so images are decoded and
tokenized and captions encoded once. Training reads rows at index = f(seed, step) from the maps: resuming is exact.

    make(part) -> arrays --fill--> Shards --Rows--> rows[indices] -> Tensor
    root/tokens-0123456789abcdef/ about.json, 00012.json, 00012.low.89abcdef.npy, 00012.high.89abcdef.npy, ...

One shard is one part of a source. Its arrays are written under names that no file has, and flushed; its JSON, which
names them with their sizes and SHA-256, is put in place last, by a rename. So a part is there if and only if its JSON
is, a process may be killed at any moment, and no file is changed under a reader's map (Windows would refuse).

Not here: what the parts hold (precompute.py), which rows a step reads (train.py).
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimuse.config import MuseConfig
from minimuse.data_captions import EXAMPLE_PROMPTS, vocabulary
from minimuse.data_images import area_downsample, to_float
from minimuse.data_sources import Example, Problems, SceneDataset, Source
from minimuse.text import TextEncoder
from minimuse.train_budget import duration
from minimuse.train_engine import Engine
from minimuse.utils import atomic_write, content_hash, precision
from minimuse.vqgan import VQGAN

# Choice: a logger, no warnings: Python shows a warning once a line of code, and each damaged part should be named.
log = logging.getLogger("minimuse")
CHECKED = 2 * 2**30  # bytes: up to this sum checksums are compared, beyond it sizes alone, for hashing reads it all
ABANDONED = 3600  # seconds: a file that no JSON names, untouched for as long, is of a run that died
OPEN = 1024  # memory maps that a reader keeps open, if the system lets it: opening one takes longer than to read a row
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows knows no quota by name

try:  # each map holds a file: 256 a process on macOS, mostly 1024 on Linux; a training run has about three readers
    import resource

    if (soft := resource.getrlimit(resource.RLIMIT_NOFILE)[0]) > 0:
        OPEN = max(16, min(OPEN, soft // 4))
except ImportError:  # Windows counts no files
    pass

Made = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]  # a part: named arrays, and what else its JSON shall keep


def in_bytes(n: float) -> str:
    """A number of bytes in words: 6.31e12 -> "6.31 TB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"


# --- writing ----------------------------------------------------------------------------------------------------------


class Shards:
    """The parts of one cache, in root/<kind>-<fingerprint[:16]>; nothing is written before `fill`.

    fingerprint  hex, of all that decides the content: another one is another folder, so a stale cache is never read.
    parts        of the source; a cache that lacks one is not read.
    limit        of the rows: parts are made in order until they hold so many, and no more rows are read; None is all.
    about        in words, for about.json: what the cache is made from.

    A part's record, its JSON, is {"rows": of its first array, "arrays": {name: {"file", "dtype", "shape", "bytes",
    "sha256"}}, "extra": what `make` gave beside them}; the file has the record's own SHA-256 too.
    """

    def __init__(
        self, root: str | Path, kind: str, fingerprint: str, parts: int, *, limit: int | None = None, about: Any = ""
    ):
        if not re.fullmatch(r"\w+", kind) or not re.fullmatch("[0-9a-f]{16,}", fingerprint):
            raise ValueError(f"Shards got {kind=}, {fingerprint=}; give a word, and at least 16 hex digits")
        if parts < 1 or (limit is not None and limit < 1):
            raise ValueError(f"Shards got {parts=}, {limit=}; give at least 1")
        self.kind, self.fingerprint, self.parts, self.limit, self.about = kind, fingerprint, parts, limit, about
        self.folder = Path(root) / f"{kind}-{fingerprint[:16]}"

    def record(self, part: int) -> tuple[dict[str, Any] | None, str]:
        """-> (record, ""), or (None, why the JSON is damaged), or (None, "") where the part was not made."""
        path = self._json(part)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("sha256") != content_hash(record):
                raise ValueError("it does not have its checksum")
            return record, ""
        except FileNotFoundError:
            return None, ""
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            return None, f"{path} is damaged: {error!r}"

    def records(self) -> list[dict[str, Any]]:
        """The records of the parts to be read, in order: all, or as many as hold `limit` rows."""
        records, rows = [], 0
        for part in range(self.parts):
            if self.limit is not None and rows >= self.limit:
                break
            record, reason = self.record(part)
            if record is None:
                raise ValueError(
                    f"{reason or f'part {part} of {self.parts} is not in {self.folder}'}; run fill() first"
                )
            records.append(record)
            rows += record["rows"]
        return records

    def verify(self, parts: Iterable[int] | None = None) -> dict[int, str]:
        """Parts (None: all) -> {part: what is wrong with it}. A part that was not made is not wrong.

        Sizes always; checksums where all these parts together are at most CHECKED bytes.
        """
        found = {part: self.record(part) for part in (range(self.parts) if parts is None else parts)}
        wrong = {part: reason for part, (_, reason) in found.items() if reason}
        files = [(part, entry) for part, (record, _) in found.items() if record for entry in record["arrays"].values()]
        hashed = sum(entry["bytes"] for _, entry in files) <= CHECKED
        for part, entry in files:
            if reason := _damage(self.folder / entry["file"], entry, hashed):
                wrong.setdefault(part, reason)
        return wrong

    def open(self, entry: Mapping[str, Any]) -> np.ndarray:
        """One of a record's arrays as a read-only memory map; ValueError where the file is not what was written."""
        path = self.folder / entry["file"]
        if not (reason := _damage(path, entry, hashed=False)):
            try:
                array = np.load(path, mmap_mode="r")
                if (array.dtype.name, list(array.shape)) == (entry["dtype"], entry["shape"]):
                    return array
                reason = f"{path} holds {array.dtype.name} {array.shape}, not {entry['dtype']} {entry['shape']}"
            except ValueError as error:
                reason = f"{path} is no array: {error}"
        raise ValueError(f"{reason}; fill() makes its part anew")

    def write(self, part: int, arrays: Mapping[str, np.ndarray], extra: Mapping[str, Any], replace: bool) -> None:
        """Store a part whole or not at all. Where another process was faster its part stays, unless `replace`."""
        record = {"rows": len(next(iter(arrays.values()))), "arrays": {}, "extra": extra}
        tag, files = uuid.uuid4().hex[:8], []
        try:
            for name, array in arrays.items():
                files.append(self.folder / f"{part:05d}.{name}.{tag}.npy")
                record["arrays"][name] = {"file": files[-1].name, **_save(files[-1], array)}
            if replace or not self._json(part).exists():
                record = json.loads(json.dumps(record))  # as it will be read: tuples are lists, keys are strings
                atomic_write(self._json(part), json.dumps(record | {"sha256": content_hash(record)}))
                files = []
        except OSError as error:
            if error.errno not in FULL:
                raise
            need, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(self.folder).free
            message = f"no space for part {part} of {self.parts}: it takes {in_bytes(need)}, {in_bytes(free)} are free"
            mend = "make room there and start again, the parts made so far are kept"
            raise OSError(error.errno, f"{message}; {mend}", str(self.folder)) from error
        finally:
            for file in files:
                file.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what dead runs left: files of ours that no record names, untouched for ABANDONED seconds."""

        @cache
        def named(part: int) -> list[str]:
            record = self.record(part)[0]
            return [entry["file"] for entry in record["arrays"].values()] if record else []

        for path in self.folder.iterdir():
            match = re.fullmatch(r"(\d+|about)\.\w+\.[0-9a-f]{8}\.(npy|new)", path.name)
            try:
                old = match and time.time() - path.stat().st_mtime > ABANDONED
                if old and (match[2] == "new" or path.name not in named(int(match[1]))):
                    path.unlink()
            except OSError:  # gone meanwhile, or still mapped (Windows)
                continue

    def others(self) -> list[tuple[Path, int]]:
        """Caches of this kind beside this one, with their bytes: made from something else, so never read."""
        name = re.compile(rf"{self.kind}-[0-9a-f]{{16}}")
        folders = [f for f in sorted(self.folder.parent.iterdir()) if name.fullmatch(f.name) and f != self.folder]
        return [(f, sum(file.stat().st_size for file in f.iterdir())) for f in folders if f.is_dir()]

    def _json(self, part: int) -> Path:
        return self.folder / f"{part:05d}.json"


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    """An array into a new file -> what the JSON keeps of it. The checksum is of what was meant to be written."""
    sha, file = hashlib.sha256(), path.open("xb")

    class Tee:
        def write(self, chunk: bytes) -> None:
            sha.update(chunk)
            file.write(chunk)

    with file:
        np.save(Tee(), array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
        n = file.tell()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "bytes": n, "sha256": sha.hexdigest()}


def _damage(path: Path, entry: Mapping[str, Any], hashed: bool) -> str:
    """What is wrong with a file, or ""."""
    if not path.exists():
        return f"{path} is missing"
    if (found := path.stat().st_size) != entry["bytes"]:
        return f"{path} has {found:,} bytes, not {entry['bytes']:,}"
    if hashed:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                return f"{path} does not have its checksum"
    return ""


def fill(shards: Shards, make: Callable[[int], Made], rank: int = 0, world: int = 1) -> Iterator[tuple[int, int]]:
    """Make the parts that are missing or damaged -> (done, of how many), counting this process's parts alone.

    Process `rank` of `world` takes parts rank, rank + world, ...: read when all of them are through. With a limit a
    process may make a part or two too many, since it cannot know what the others are at; they are not read.
    """
    if not 0 <= rank < world:
        raise ValueError(f"fill got {rank=}, {world=}; give a rank of 0 to world - 1")
    mine, rows = range(rank, shards.parts, world), {}
    shards.folder.mkdir(parents=True, exist_ok=True)
    if not (shards.folder / "about.json").exists():
        about = {"kind": shards.kind, "fingerprint": shards.fingerprint, "about": shards.about}
        atomic_write(shards.folder / "about.json", json.dumps(about))
    if rank == 0:
        shards.sweep()
        for folder, n in shards.others():
            log.info("%s (%s) was made from something else: not read, left alone", folder, in_bytes(n))
    damaged = shards.verify(mine)
    for part, reason in damaged.items():
        log.warning("part %d is made anew: %s", part, reason)
    for done, part in enumerate(mine):
        yield done, len(mine)
        if shards.limit is not None:
            found = {before: shards.record(before)[0] for before in range(part) if before not in rows}
            rows |= {before: record["rows"] for before, record in found.items() if record}
            if sum(rows.values()) >= shards.limit:
                break
        if part in damaged or not shards._json(part).exists():
            shards.write(part, *make(part), replace=part in damaged)
    yield len(mine), len(mine)


# --- reading ----------------------------------------------------------------------------------------------------------


class Mapped:
    """All parts as one sequence: opened when first read, the OPEN maps last used kept, pickled without them."""

    def __init__(self, shards: Shards):
        self.shards, records = shards, shards.records()
        self._arrays = [record["arrays"] for record in records]
        self._starts = np.cumsum([0] + [record["rows"] for record in records])  # the first row of each part, the end
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    def __len__(self) -> int:
        rows = int(self._starts[-1])
        return rows if self.shards.limit is None else min(rows, self.shards.limit)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def map(self, part: int, name: str) -> np.ndarray:
        array = self._maps.pop((part, name), None)
        self._maps[part, name] = array = self.shards.open(self._arrays[part][name]) if array is None else array
        if len(self._maps) > OPEN:
            self._maps.pop(next(iter(self._maps)))  # the longest unused
        return array

    def places(self, indices: Any) -> tuple[np.ndarray, np.ndarray]:
        """A slice, an index, or indices of any shape -> (part, row within it), each of that shape."""
        n = len(self)
        rows = np.asarray(range(*indices.indices(n)) if isinstance(indices, slice) else indices)
        if rows.size and rows.dtype.kind not in "iu":
            raise TypeError(f"indices of {rows.dtype}; give whole numbers or a slice")
        rows = rows.astype(np.int64)
        if rows.size and not -n <= rows.min() <= rows.max() < n:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {n}; give {-n} to {n - 1}")
        rows = np.where(rows < 0, rows + n, rows)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        return parts, rows - self._starts[parts]


class Rows(Mapped):
    """One array of all parts as a sequence of `shape` (n, ...): `rows[indices]` -> Tensor, a copy.

    indices is an index, a slice, a list or a long tensor of any shape; dtype None keeps the stored one.
    """

    def __init__(self, shards: Shards, name: str, dtype: torch.dtype | None = None):
        super().__init__(shards)
        if lacking := [part for part, arrays in enumerate(self._arrays) if name not in arrays]:
            raise ValueError(
                f"no {name!r} in part {lacking[0]} of {shards.folder}: {', '.join(self._arrays[lacking[0]])}"
            )
        entries = [arrays[name] for arrays in self._arrays]
        if [entry["shape"][0] for entry in entries] != np.diff(self._starts).tolist():
            raise ValueError(f"{name!r} of {shards.folder} has not one row an example, so Rows cannot read it")
        # a part without a usable image knows no shape
        kinds = {(entry["dtype"], *entry["shape"][1:]) for entry in entries if entry["shape"][0]}
        if len(kinds) > 1:
            raise ValueError(
                f"parts of {shards.folder} differ in dtype or shape of {name!r}: {kinds}; delete the folder"
            )
        kind, *shape = kinds.pop() if kinds else (entries[0]["dtype"], *entries[0]["shape"][1:])
        self.name, self.dtype, self._kind, self.shape = name, dtype, np.dtype(kind), (len(self), *shape)

    def __getitem__(self, indices: int | slice | Sequence[int] | Tensor) -> Tensor:
        parts, rows = self.places(indices)
        out = np.empty((*parts.shape, *self.shape[1:]), self._kind)
        for part in np.unique(parts).tolist():
            at = parts == part
            out[at] = self.map(part, self.name)[rows[at]]
        return torch.from_numpy(out).to(self.dtype)


# --- what a part holds ---


def make_pixels(source: Source, side: int) -> Callable[[int], Made]:
    """For `fill`: part -> "pixels" (n, 3, S, S) uint8; its JSON keeps captions and problems."""

    def make(part: int) -> Made:
        problems = Problems()
        examples = list(source.read(part, side, problems))
        pixels = torch.stack([e.image for e in examples]) if examples else torch.empty(0, 3, side, side).byte()
        return {"pixels": pixels.numpy()}, _extra([e.captions for e in examples], problems)

    return make


@torch.inference_mode()
def tokenize(tokenizer: Any, images: Tensor, batch: int = 256, bf16: bool | None = None) -> Tensor:
    """A frozen tokenizer, ours or another, images (n, 3, H, W) uint8 -> tokens (n, N), on the CPU."""
    device = next(tokenizer.parameters()).device
    tokenizer.eval()
    with precision(device, bf16):
        return torch.cat([tokenizer.encode(to_float(x).to(device)).cpu() for x in images.split(batch)])


def make_tokens(
    source: Source,
    side: int,
    encoders: Mapping[str, Callable[[Tensor], Tensor]],
    codebook_size: int,
    batch: int = 32,
) -> Callable[[int], Made]:
    """For `fill`: part -> an array (n, N) for each of `encoders`, in one reading; captions and problems as above.

    encoders       name -> function from images (b, 3, S, S) uint8 to tokens (b, N)
    codebook_size  the largest V: uint16 holds tokens below 65,536, int32 the rest
    """
    dtype = np.uint16 if codebook_size <= 2**16 else np.int32

    def make(part: int) -> Made:
        """A part of the source, read once -> its tokens by each encoder, captions and problems."""
        problems, captions, tokens = Problems(), [], {name: [np.empty((0, 0), dtype)] for name in encoders}
        examples = iter(source.read(part, side, problems))
        while chunk := list(islice(examples, batch)):
            captions += [e.captions for e in chunk]
            images = torch.stack([e.image for e in chunk])
            for name, encode in encoders.items():
                found = encode(images).cpu().numpy()  # (b, N)
                if len(found) != len(chunk) or found.min() < 0 or found.max() >= codebook_size:
                    came = f"{found.shape}, {found.min()} to {found.max()}"
                    raise ValueError(f"{name!r}: tokens {came}; expected ({len(chunk)}, N), 0 to {codebook_size - 1}")
                tokens[name].append(found.astype(dtype))
        arrays = {name: np.concatenate(rows[1:] or rows) for name, rows in tokens.items()}
        return arrays, _extra(captions, problems)

    return make


def make_text(shards: Shards, encode: Callable[[list[str]], Sequence[Tensor]]) -> Callable[[int], Made]:
    """For `fill`: part -> the embedded captions of that part of `shards`, for `Texts`; each text encoded and kept once.

    encode    B texts -> B tensors (L, D), unpadded; kept in half precision
    captions  (n, 2): the first caption of an example within the part, and one past its last
    spans     (captions, 2): the rows of a caption in values
    values    (text tokens of all different captions, D) float16
    """

    def make(part: int) -> Made:
        """A part of `shards` -> the embeddings of its captions, each text embedded once."""
        record, reason = shards.record(part)
        if record is None:
            raise ValueError(f"{reason or f'part {part} is not in {shards.folder}'}; fill() that cache first")
        captions = record["extra"]["captions"]
        unique = list(dict.fromkeys(text for texts in captions for text in texts))
        rows = [row.cpu().half() for row in encode(unique)] if unique else [torch.empty(0, 0).half()]
        values = torch.cat(rows)
        if not values.isfinite().all():
            raise ValueError("embeddings beyond float16's 65,504, or NaN: this language model's text cannot be cached")
        ends = np.cumsum([0] + [len(row) for row in rows])
        span = {text: ends[i : i + 2] for i, text in enumerate(unique)}
        firsts = np.cumsum([0] + [len(texts) for texts in captions])
        arrays = {
            "captions": np.stack([firsts[:-1], firsts[1:]], 1),
            "spans": np.array([span[text] for texts in captions for text in texts], np.int64).reshape(-1, 2),
            "values": values.numpy(),
        }
        return arrays, {}

    return make


def _extra(captions: list[tuple[str, ...]], problems: Problems) -> dict[str, Any]:
    if not all(captions):
        raise ValueError(f"image {captions.index(())} of a part has no caption; a source gives at least one for each")
    return {"captions": captions, "problems": asdict(problems)}


class Texts(Mapped):
    """The embedded captions of n examples, unpadded, as `make_text` stores them.

    `texts[i]` -> all captions of example i, each (L, D). `texts.pick(indices, u)` -> one of each example.
    """

    def __getitem__(self, i: int) -> list[Tensor]:
        part, row = (int(x) for x in self.places(i))
        return [self._read(part, caption) for caption in range(*self.map(part, "captions")[row].tolist())]

    def pick(self, indices: Sequence[int] | Tensor, u: Sequence[float] | Tensor) -> list[Tensor]:
        """indices (B,), u (B,) in [0, 1) -> caption floor(u k) of the k of each example: B tensors (L, D)."""
        rows = []
        for part, row, x in zip(*self.places(indices), np.asarray(u), strict=True):
            first, end = self.map(part, "captions")[row].tolist()
            rows.append(self._read(part, min(first + int(x * (end - first)), end - 1)))
        return rows

    def _read(self, part: int, caption: int) -> Tensor:
        first, end = self.map(part, "spans")[caption].tolist()
        return torch.from_numpy(np.array(self.map(part, "values")[first:end]))


class CachedPixels:
    """A cache of pixels as a `Source`: what was decoded once need not be decoded again for its tokens.

    It gives whole parts, so a cache with a limit may give a few examples more.
    """

    def __init__(self, shards: Shards):
        self.shards, self.fingerprint = shards, shards.fingerprint
        self._records = shards.records()
        self.parts = len(self._records)

    def read(self, part: int, size: int, problems: Problems) -> Iterator[Example]:
        """Part -> its examples, as the source gave them when they were cached."""
        record = self._records[part]
        pixels = self.shards.open(record["arrays"]["pixels"])
        if len(pixels) and pixels.shape[-1] != size:
            raise ValueError(f"the cache holds images of {pixels.shape[-1]} px, not {size}; read the source itself")
        vars(problems).update(vars(problems + Problems(**record["extra"]["problems"])))
        for image, captions in zip(pixels, record["extra"]["captions"], strict=True):
            yield Example(torch.from_numpy(np.array(image)), tuple(captions))


def all_captions(shards: Shards) -> Iterator[tuple[str, ...]]:
    """The captions of each row of a cache of pixels or tokens, in order."""
    rows = (tuple(texts) for record in shards.records() for texts in record["extra"]["captions"])
    return islice(rows, shards.limit)


def all_problems(shards: Shards) -> Problems:
    """What was passed over while a cache of pixels or tokens was made."""
    return sum((Problems(**record["extra"]["problems"]) for record in shards.records()), Problems())


def estimate(
    config: MuseConfig, images: int, *, captions: float = 1, text_tokens: float = 32, pixels: int | None = None
) -> dict[str, int]:
    """-> bytes of each cache: "pixels", "low", "high", "text", before any of it is made.

    captions an image, text_tokens a caption, `pixels` of the images kept as pixels (None: all). 10 million captions of
    77 tokens of T5-XXL (4096-d) take 6.3 TB; the files' headers and JSON are not counted.
    """
    low, high = config.low_tokenizer, config.high_tokenizer
    width = 2 if max(low.codebook_size, high.codebook_size) <= 2**16 else 4
    return {
        "pixels": (images if pixels is None else min(pixels, images)) * 3 * high.image_size**2,
        "low": images * low.grid**2 * width,
        "high": images * high.grid**2 * width,
        "text": round(images * captions * text_tokens * config.base.text_width * 2),
    }


def text_fits(n: int, gib: float = 64) -> bool:
    """Should text of n bytes be cached? Beyond `gib` it is encoded anew each time it is read."""
    return n <= gib * 2**30


class LiveTexts:
    """Captions encoded each time they are read, for those too many to keep: the same `pick` as `Texts`."""

    def __init__(self, captions: Sequence[Sequence[str]], encode: Callable[[list[str]], Sequence[Tensor]]):
        self.captions, self.encode = captions, encode

    def __len__(self) -> int:
        return len(self.captions)

    def pick(self, indices: Sequence[int] | Tensor, u: Sequence[float] | Tensor) -> Sequence[Tensor]:
        """indices (B,), u (B,) in [0, 1) -> caption floor(u k) of the k of each example: B tensors (L, D)."""
        rows = [self.captions[int(i)] for i in indices]
        return self.encode([texts[int(float(x) * len(texts))] for texts, x in zip(rows, u, strict=True)])


class Subset:
    """Rows of other rows: the training examples without the held-out ones, or those alone."""

    def __init__(self, rows: Any, index: Tensor):
        self.rows, self.index = rows, index
        self.shape = (len(index), *getattr(rows, "shape", (0,))[1:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, indices: Any) -> Any:
        return self.rows[self.index[indices]]

    def pick(self, indices: Tensor, u: Sequence[float] | Tensor) -> Sequence[Tensor]:
        return self.rows.pick(self.index[indices], u)


# --- training data ---

HELD_OUT = 50  # every 50th example


class TrainingData:
    """A source, its caches under `folder`, and the split into training and held-out examples.

    read_only: nothing is computed or written; ValueError where something is not there yet.
    """

    def __init__(
        self,
        folder: str | Path,
        source: Source,
        config: MuseConfig,
        engine: Engine,
        encoder: TextEncoder,
        *,
        read_only: bool = False,
    ):
        self.folder, self.source, self.config, self.engine, self.encoder = Path(folder), source, config, engine, encoder
        self.read_only = read_only
        self.side = config.high_tokenizer.image_size
        limit = max(1, int(config.pixels_gib * 2**30 / (3 * self.side**2)))
        self._pixels = self._shards("pixels", content_hash(source.fingerprint, self.side), limit)
        self._captions = self._pixels  # the shards whose JSON holds the captions of all examples
        self.tokens: dict[str, Rows] = {}

    def read(self) -> Iterator[tuple[int, int]]:
        """Decode or render the images, as many as `pixels_gib` has room for."""
        yield from self._fill(self._pixels, make_pixels(self.source, self.side))
        self.images = Rows(self._pixels, "pixels")
        problems = all_problems(self._pixels)
        problems.check("the data")
        if problems.counts and self.engine.is_main:
            log.warning(problems.summary())
        self.all_pixels = len(self.images) < self._pixels.limit  # else the source has, or may have, more

    def tokenize(self, name: str, tokenizer: Any) -> Iterator[tuple[int, int]]:
        """name "low" or "high": the tokens of all images by a frozen tokenizer, the low one's of decimated images."""
        image_size = getattr(self.config, f"{name}_tokenizer").image_size
        print_ = content_hash(self.source.fingerprint, self.side, image_size, tokenizer.state_dict())
        shards = self._shards(f"{name}_tokens", print_)
        tokenizer.to(self.engine.device)

        def encode(images: Tensor) -> Tensor:
            return tokenize(tokenizer, area_downsample(images, self.side // image_size), bf16=self.engine.bf16)

        source = CachedPixels(self._pixels) if self.all_pixels else self.source
        make = make_tokens(source, self.side, {name: encode}, tokenizer.codebook_size, batch=128)
        yield from self._fill(shards, make)
        self.tokens[name], self._captions = Rows(shards, name, torch.long), shards

    def embed(self) -> Iterator[tuple[int, int]]:
        """The captions of all examples, embedded; above `text_gib` they are encoded each time they are read."""
        captions = list(all_captions(self._captions))
        known = [t for texts in captions[:: max(1, len(captions) // 64)] for t in texts]
        mean = sum(len(row) for row in self.encode(known)) / len(known)
        need = estimate(self.config, len(captions), captions=sum(map(len, captions)) / len(captions), text_tokens=mean)
        if not text_fits(need["text"], self.config.text_gib):
            self.texts: Texts | LiveTexts = LiveTexts(captions, self.encode)
            return
        print_ = content_hash(self.source.fingerprint, self.side, self.encoder.max_tokens, self.encoder.weights)
        shards = self._shards("text", print_)
        yield from self._fill(shards, make_text(self._captions, self.encode))
        self.texts = Texts(shards)

    def encode(self, texts: Sequence[str], batch: int = 512) -> list[Tensor]:
        """B texts -> B embeddings (L, D_lm), unpadded, in half precision."""
        rows: list[Tensor] = []
        for start in range(0, len(texts), batch):
            context = self.encoder.encode(list(texts[start : start + batch]))
            rows += [e[m].half().cpu() for e, m in zip(context.embeds, context.mask, strict=True)]
        return rows

    def split(self, rows: Any, held_out: bool = False) -> Any:
        """Rows of all examples -> those to train on, or every 50th, held out; of fewer than 50, all serve for both."""
        index = torch.arange(len(rows))
        if len(rows) < HELD_OUT:
            return Subset(rows, index)
        is_held = index % HELD_OUT == HELD_OUT - 1
        return Subset(rows, index[is_held if held_out else ~is_held])

    def words(self, most: int = 20_000) -> dict[str, list[str]]:
        """What a checkpoint tells of itself: the commonest words of the captions, and prompts to try."""
        if isinstance(self.source, SceneDataset):
            return {"words": vocabulary(bool(self.source.synonyms)), "examples": list(EXAMPLE_PROMPTS)}
        captions = [text for texts in all_captions(self._captions) for text in texts]
        counts = Counter(word for text in captions for word in re.findall(r"[^\W\d_]+", text.lower()))
        return {
            "words": [word for word, _ in counts.most_common(most)],
            "examples": [captions[i * (len(captions) - 1) // 3] for i in range(min(4, len(captions)))][:3],
        }

    def preview(self, most: int = 64) -> str:
        """Before anything is computed: bytes of each cache, and how long one process takes, by the first images."""
        examples = list(islice(self.source.read(0, self.side, Problems()), most))  # untimed: what is slow but once
        if not examples:
            return "the first part of the data holds no usable image"
        known = hasattr(self.source, "__len__")
        n = (
            len(self.source)
            if known
            else self.source.parts * sum(1 for _ in self.source.read(0, self.side, Problems()))
        )
        read = _seconds(lambda: list(islice(self.source.read(0, self.side, Problems()), most))) / len(examples)
        captions, said = [text for e in examples for text in e.captions], ""
        try:
            self.encode(captions[:1])
            embed = duration(_seconds(lambda: self.encode(captions)) / len(examples) * n)
            length = sum(map(len, self.encode(captions))) / len(captions)
        except OSError:
            embed, length, said = "?", 32.0, f" ({self.config.text_encoder} is not here: 32 tokens a caption assumed)"
        tokenizing = {}
        for name in ("low", "high"):
            tokenizer = VQGAN(getattr(self.config, f"{name}_tokenizer")).to(self.engine.device)
            images = torch.stack(
                [area_downsample(e.image[None], self.side // tokenizer.config.image_size)[0] for e in examples[:4]]
            )
            work = partial(tokenize, tokenizer, images, bf16=self.engine.bf16)
            work()
            tokenizing[name] = duration(_seconds(work) / len(images) * n)
        each = len(captions) / len(examples)
        sizes = estimate(self.config, n, captions=each, text_tokens=length, pixels=self._pixels.limit)
        if not text_fits(sizes["text"], self.config.text_gib):
            said += "; above text_gib: encoded at every step instead"
        lines = [f"caches of about {n:,} images, and the time of one process:"]
        for name, time_ in [("pixels", duration(read * n)), *tokenizing.items(), ("text", embed)]:
            lines.append(f"  {name:7}{in_bytes(sizes[name]):>9}  {time_:>10}{said * (name == 'text')}")
        return "\n".join(lines)

    def _shards(self, kind: str, print_: str, limit: int | None = None) -> Shards:
        about = {
            "config": self.config.name,
            "text_encoder": self.config.text_encoder,
            "source": type(self.source).__name__,
        }
        return Shards(self.folder, kind, print_, self.source.parts, limit=limit, about=about)

    def _fill(self, shards: Shards, make: Any) -> Iterator[tuple[int, int]]:
        if not self.read_only:
            yield from fill(shards, make, self.engine.rank, self.engine.processes)
            self.engine.accelerator.wait_for_everyone()


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
