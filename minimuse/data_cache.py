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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimuse.utils import atomic_write

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


def fingerprint(*things: Any) -> str:
    """Tensors and JSON values, and lists and dicts of them (a state_dict is one) -> SHA-256 in hex.

    The order of a dict's keys does not count; everything else does, a tensor's dtype and shape included.
    """

    def plain(thing: Any) -> list:
        if not isinstance(thing, Tensor):
            raise TypeError(f"fingerprint of {type(thing).__name__}; give tensors, JSON values, lists and dicts")
        content = thing.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(thing.dtype), list(thing.shape), hashlib.sha256(content).hexdigest()]

    return hashlib.sha256(json.dumps(things, sort_keys=True, default=plain).encode()).hexdigest()


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
            if record.pop("sha256") != fingerprint(record):
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
                atomic_write(self._json(part), json.dumps(record | {"sha256": fingerprint(record)}))
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
