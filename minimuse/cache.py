"""What is computed once: pixels, tokens and text embeddings as shards on disk, read by memory map.

While a transformer trains, tokenizers and language model are frozen (Muse 2.1, 2.3), so images are decoded and
tokenized and captions encoded once. Training reads rows at index = f(seed, step) from the maps: resuming is exact.

    source --make_pixels--> Shards --Rows--> (n, 3, S, S)      root/pixels-0123456789abcdef/00012.json
    source --make_tokens--> Shards --Rows--> (n, N)            root/pixels-0123456789abcdef/00012.pixels.89abcdef.npy
    captions --make_text--> Shards --Texts--> [(L, D), ...]    root/pixels-0123456789abcdef/about.json

One shard is one part of a source. Its arrays are written under names that no file has, and flushed; its JSON, which
names them with their sizes and SHA-256, is put in place last, by a rename. So a part is there if and only if its JSON
is, a process may be killed at any moment, and no file is changed under a reader's map (Windows would refuse).

Glossary: n examples, N tokens, S pixels a side, L text tokens, D the language model's width.
Not here: what images and captions are (data.py), which rows a step reads (train.py).
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Choice: a logger, no warnings: Python shows a warning once a line of code, and each damaged part should be named.
log = logging.getLogger("minimuse")
CHECKED = 2 * 2**30  # bytes: up to this sum checksums are compared, beyond it sizes alone (hashing reads it all again)
ABANDONED = 3600  # seconds: a file that no JSON names, untouched for as long, is of a run that died
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows knows no quota by name
OPEN = 64  # memory maps a reader keeps open; macOS allows 256 files a process

Made = tuple[Mapping[str, np.ndarray], Mapping[str, Any]]  # a part: named arrays, and what else its JSON shall keep


def fingerprint(*things: Any) -> str:
    """Strings, numbers, None, bytes, tensors, and lists and dicts of them (a state_dict is one) -> SHA-256 in hex.

    The order of a dict's keys does not count; everything else does, a tensor's dtype and shape included.
    """
    sha = hashlib.sha256()

    def add(kind: str, content: bytes) -> None:
        sha.update(f"{kind} {len(content)}:".encode())  # so that ("ab", "c") and ("a", "bc") differ
        sha.update(content)

    def walk(thing: Any) -> None:
        if isinstance(thing, Tensor):
            flat = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            add(f"{thing.dtype} {tuple(thing.shape)}", memoryview(flat.numpy()))
        elif isinstance(thing, Mapping):
            add("dict", str(len(thing)).encode())
            for key in sorted(thing):
                walk(key)
                walk(thing[key])
        elif isinstance(thing, list | tuple):
            add("list", str(len(thing)).encode())
            for item in thing:
                walk(item)
        elif isinstance(thing, bytes):
            add("bytes", thing)
        elif thing is None or isinstance(thing, str | bool | int | float):
            add("json", json.dumps(thing).encode())
        else:
            raise TypeError(f"fingerprint of {type(thing).__name__}; give strings, numbers, tensors, lists and dicts")

    walk(list(things))
    return sha.hexdigest()


class Shards:
    """The parts of one cache, in root/<kind>-<fingerprint[:16]>. Made at once: the folder appears with its first part.

    fingerprint  hex, of all that decides the content: another one is another folder, so a stale cache is never read.
    parts        of the source; a cache that lacks one is not read.
    limit        of the rows: parts are made in order until they hold so many, and no more rows are read; None is all.
    about        in words, for about.json: what the cache was made from.
    """

    def __init__(
        self, root: str | Path, kind: str, fingerprint: str, parts: int, *, limit: int | None = None, about: Any = ""
    ):
        if not re.fullmatch(r"\w+", kind) or not re.fullmatch("[0-9a-f]{16,}", fingerprint):
            raise ValueError(
                f"Shards got kind {kind!r} and fingerprint {fingerprint!r}; give a word, and at least 16 hex digits"
            )
        if parts < 1 or (limit is not None and limit < 1):
            raise ValueError(f"Shards got {parts=}, {limit=}; give at least 1")
        self.kind, self.fingerprint, self.parts, self.limit, self.about = kind, fingerprint, parts, limit, about
        self.folder = Path(root) / f"{kind}-{fingerprint[:16]}"

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}, parts={self.parts}, limit={self.limit})"

    def record(self, part: int) -> dict[str, Any] | None:
        """What a part's JSON holds: {"rows", "arrays": {name: {"file", "dtype", "shape", "bytes", "sha256"}}, "extra"}.

        None where the part was not made; ValueError where the JSON is damaged.
        """
        path = self._json(part)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            shapes = [entry["shape"] for entry in record["arrays"].values()]
            if record["rows"] != shapes[0][0] or "extra" not in record:
                raise ValueError("rows or extra are not what they should be")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); fill() makes the part anew") from error
        return record

    def records(self) -> list[dict[str, Any]]:
        """The records of the parts that are read, in order: all, or as many as hold `limit` rows."""
        records, rows = [], 0
        for part in range(self.parts):
            if self.limit is not None and rows >= self.limit:
                break
            record = self.record(part)
            if record is None:
                raise ValueError(f"part {part} of {self.parts} is missing in {self.folder}; finish fill() first")
            records.append(record)
            rows += record["rows"]
        return records

    def extras(self) -> list[dict[str, Any]]:
        """What `make` gave beside the arrays, a part at a time."""
        return [record["extra"] for record in self.records()]

    def enough(self, part: int) -> bool:
        """Do the parts before this one hold `limit` rows already?"""
        if self.limit is None:
            return False
        rows = 0
        for before in range(part):
            try:
                record = self.record(before)
            except ValueError:
                continue
            rows += record["rows"] if record else 0
        return rows >= self.limit

    def verify(self, parts: Iterable[int] | None = None) -> dict[int, str]:
        """Parts (None: all) -> {part: what is wrong with it}. A part that was not made is not wrong.

        Sizes always; checksums where all these parts together are at most CHECKED bytes.
        """
        records, wrong = {}, {}
        for part in range(self.parts) if parts is None else parts:
            try:
                records[part] = self.record(part)
            except ValueError as error:
                wrong[part] = str(error)
        entries = [(p, entry) for p, record in records.items() if record for entry in record["arrays"].values()]
        hashed = sum(entry["bytes"] for _, entry in entries) <= CHECKED
        for part, entry in entries:
            if reason := _damage(self.folder / entry["file"], entry, hashed):
                wrong.setdefault(part, reason)
        return wrong

    def open(self, part: int, entry: Mapping[str, Any]) -> np.ndarray:
        """A part's array as a read-only memory map."""
        path = self.folder / entry["file"]
        reason = _damage(path, entry, hashed=False)
        if not reason:
            try:
                array = np.load(path, mmap_mode="r")
                if [array.dtype.name, list(array.shape)] == [entry["dtype"], entry["shape"]]:
                    return array
                reason = f"{path} holds {array.dtype.name} {array.shape}, not {entry['dtype']} {entry['shape']}"
            except (ValueError, EOFError) as error:
                reason = f"{path} is no array: {error}"
        raise ValueError(f"part {part} is damaged: {reason}; fill() makes it anew")

    def write(
        self, part: int, arrays: Mapping[str, np.ndarray], extra: Mapping[str, Any], replace: bool = False
    ) -> None:
        """Store a part whole or not at all. Where another process was faster its part stays, unless `replace`.

        rows is the length of the first array. OSError with what is needed where the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"rows": len(next(iter(arrays.values()))), "arrays": {}, "extra": dict(extra)}
        tag, kept, new = uuid.uuid4().hex[:8], False, []
        try:
            about = {"kind": self.kind, "fingerprint": self.fingerprint, "about": self.about}
            if not (self.folder / "about.json").exists():
                self._put(self.folder / "about.json", about, tag, new)
            for name, array in arrays.items():
                path = self.folder / f"{part:05d}.{name}.{tag}.npy"
                new.append(path)
                record["arrays"][name] = {"file": path.name, **_save(path, array)}
            if replace or not self._json(part).exists():
                self._put(self._json(part), record, tag, new)
                kept = True
        except OSError as error:
            if error.errno not in FULL:
                raise
            need, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(self.folder).free
            message = f"no space for part {part} of {self.parts}: it takes {in_bytes(need)}, {in_bytes(free)} are free"
            mend = "make room there and start again: the parts made so far are kept"
            raise OSError(error.errno, f"{message}; {mend}", str(self.folder)) from error
        finally:
            for path in new if not kept else []:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete what dead runs left behind: files of ours that no JSON names, untouched for ABANDONED seconds."""
        for path in self.folder.glob("*.*") if self.folder.exists() else []:
            match = re.fullmatch(r"(\d+|about)\.(\w+)\.([0-9a-f]{8})\.(npy|new)", path.name)
            try:
                if not match or time.time() - path.stat().st_mtime < ABANDONED:
                    continue
                record = self.record(int(match[1])) if match[4] == "npy" else None
                if not record or path.name not in [entry["file"] for entry in record["arrays"].values()]:
                    path.unlink()
            except (OSError, ValueError):  # gone meanwhile, still mapped (Windows), or of a part to be made anew
                continue

    def others(self) -> list[tuple[Path, int]]:
        """Caches of this kind beside this one, with their bytes: stale ones, or another data set's. They stay."""
        pattern, root = re.compile(rf"{self.kind}-[0-9a-f]{{16}}"), self.folder.parent
        folders = [f for f in root.iterdir() if pattern.fullmatch(f.name) and f.name != self.folder.name]
        return [(f, sum(file.stat().st_size for file in f.iterdir() if file.is_file())) for f in sorted(folders)]

    def _json(self, part: int) -> Path:
        return self.folder / f"{part:05d}.json"

    def _put(self, path: Path, content: Any, tag: str, new: list[Path]) -> None:
        """JSON, flushed, then renamed: there whole or not at all."""
        beside = path.with_name(f"{path.name}.{tag}.new")
        new.append(beside)
        with beside.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        new.remove(beside)


def in_bytes(n: float) -> str:
    """Bytes in words: 6,300,000,000,000 -> "6.3 TB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    """An array into a new file -> what the JSON keeps of it. The checksum is of what we meant to write."""
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

    Process `rank` of `world` takes parts rank, rank + world, ...: read only after all processes are through. With a
    limit a process may make a part or two too many, since it does not know what the others are at; they are not read.
    """
    mine = range(rank, shards.parts, world)
    shards.sweep()
    damaged = shards.verify(mine)
    for reason in damaged.values():
        log.warning("made anew: %s", reason)
    if shards.folder.parent.exists() and rank == 0:
        for folder, n in shards.others():
            log.info(
                "%s (%s) was made from something else; it is left alone, delete it if it is stale", folder, in_bytes(n)
            )
    for done, part in enumerate(mine):
        if shards.enough(part):
            break
        yield done, len(mine)
        if part in damaged or not shards._json(part).exists():
            shards.write(part, *make(part), replace=part in damaged)
    yield len(mine), len(mine)


class _Mapped:
    """Parts opened when first read, the OPEN last used kept; pickled without their maps."""

    def __init__(self, shards: Shards):
        self.shards = shards
        records = shards.records()
        self._entries = [record["arrays"] for record in records]
        self._starts = np.cumsum(
            [0] + [record["rows"] for record in records]
        )  # the first row of each part, and the end
        self._maps: dict[tuple[int, str], np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1] if self.shards.limit is None else min(self._starts[-1], self.shards.limit))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def _map(self, part: int, name: str) -> np.ndarray:
        array = self._maps.pop((part, name), None)
        array = self.shards.open(part, self._entries[part][name]) if array is None else array
        self._maps[part, name] = array  # last used stands last
        for key in list(self._maps)[:-OPEN]:
            self._maps.pop(key, None)
        return array

    def _places(self, indices: Any) -> tuple[np.ndarray, np.ndarray]:
        """A slice, an index or indices of any shape -> (part, row in the part) of the same shape."""
        if isinstance(indices, slice):
            indices = range(*indices.indices(len(self)))
        rows = np.asarray(indices)
        rows = rows.astype(np.int64) if rows.size == 0 else rows
        if rows.dtype.kind not in "iu":
            raise TypeError(f"indices of {rows.dtype}; give whole numbers or a slice")
        if rows.size and not (-len(self) <= rows.min() and rows.max() < len(self)):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} of {len(self)}; expected {-len(self)} to {len(self) - 1}"
            )
        rows = np.where(rows < 0, rows.astype(np.int64) + len(self), rows.astype(np.int64))
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        return parts, rows - self._starts[parts]


class Rows(_Mapped):
    """One array of all parts as a sequence (n, ...): `rows[indices]` -> Tensor, a copy.

    indices is an index, a slice, a list or a long tensor of any shape. dtype None keeps the stored one.
    """

    def __init__(self, shards: Shards, name: str, dtype: torch.dtype | None = None):
        super().__init__(shards)
        self.name, self.dtype, kinds = name, dtype, {}
        for part, arrays in enumerate(self._entries):
            if name not in arrays:
                raise ValueError(f"part {part} of {shards.folder} holds {', '.join(arrays)}; there is no {name!r}")
            entry = arrays[name]
            if entry["shape"][0] != self._starts[part + 1] - self._starts[part]:
                raise ValueError(f"{name!r} of part {part} has not one row an example; read it by Texts")
            if entry["shape"][0]:  # a part without a usable image knows no shape
                kinds.setdefault((entry["dtype"], *entry["shape"][1:]), part)
        if len(kinds) > 1:
            raise ValueError(f"the parts of {shards.folder} disagree on {name!r}: {kinds} (dtype and shape: part)")
        first = self._entries[0][name]
        kind, *shape = next(iter(kinds), (first["dtype"], *first["shape"][1:]))
        self._kind, self.shape = np.dtype(kind), (len(self), *shape)

    def __getitem__(self, indices: int | slice | Sequence[int] | Tensor) -> Tensor:
        parts, rows = self._places(indices)
        out = np.empty((*parts.shape, *self.shape[1:]), self._kind)
        for part in np.unique(parts):
            at = parts == part
            out[at] = self._map(int(part), self.name)[rows[at]]
        out = torch.from_numpy(out)
        return out if self.dtype is None else out.to(self.dtype)


class Texts(_Mapped):
    """The embedded captions of n examples, unpadded, as `make_text` stores them.

    `texts[i]` -> all captions of example i, each (L, D). `texts.pick(indices, u)` -> one of each.
    """

    def __getitem__(self, i: int) -> list[Tensor]:
        part, row = (int(x) for x in self._places(i))
        first, count = self._captions(part, row)
        spans = self._map(part, "spans")[first : first + count]
        return [self._read(part, *span) for span in spans.tolist()]

    def pick(self, indices: Sequence[int] | Tensor, u: Sequence[float] | Tensor) -> list[Tensor]:
        """Indices (B,), u (B,) in [0, 1) -> caption floor(u k) of the k of each example, B tensors (L_i, D)."""
        rows = []
        for part, row, x in zip(*(a.tolist() for a in (*self._places(indices), np.asarray(u))), strict=True):
            first, count = self._captions(part, row)
            span = self._map(part, "spans")[first + min(int(x * count), count - 1)]
            rows.append(self._read(part, *span.tolist()))
        return rows

    def _captions(self, part: int, row: int) -> tuple[int, int]:
        """The first caption of an example within its part, and how many there are."""
        first, end = self._map(part, "captions")[row].tolist()
        return first, end - first

    def _read(self, part: int, start: int, length: int) -> Tensor:
        return torch.from_numpy(np.array(self._map(part, "values")[start : start + length]))
