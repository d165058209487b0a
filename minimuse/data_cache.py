"""What training reads, computed once and kept on disk: pixels, tokens and embedded captions of a source.

The tokenizers and the language model are frozen while a transformer trains (Muse 2.1, 2.3): training reads memory maps.

    TrainingData(folder, source, ...)   .read()      -> .images (n, 3, S, S)       pixels, for the tokenizers
                                        .tokenize()  -> .tokens["low"] (n, N)      by a tokenizer that is trained
                                        .embed()     -> .texts, k captions each    by the frozen language model

A cache is a folder, named by a hash of all that decides its content, with a file per part of the source. A file is
renamed into place when it is whole, so a process may be killed at any moment. Each row has the name of its image, so
that no row of one cache is paired with another's.

Not here: where images come from (data_sources.py), which rows a training step reads (train.py).
"""

import json
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimuse.config import MuseConfig
from minimuse.data_captions import EXAMPLE_PROMPTS, Problems, SceneDataset, vocabulary
from minimuse.data_sources import Source
from minimuse.text import TextEncoder
from minimuse.utils import area_downsample, atomic_write, content_hash, explain, precision, require, to_float

CACHE_VERSION = 2  # raise it on purpose when the files of a cache change
BLOCK = 500  # images that are tokenized at a time
HELD_OUT = 50  # every 50th example is held out for validation
OPEN = 64  # files that a reader keeps open as memory maps

Record = dict[str, Any]  # of a part: "names" and "captions" of its rows, and "problems"
Make = Callable[[int, Record], Iterator[Tensor]]  # part -> its rows in pieces; it fills the record


class Rows:
    """At most `limit` rows, one an image, on disk in parts: `rows[indices (B,)]` -> a copy (B, ...), tokens as long."""

    def __init__(self, folder: Path, parts: int, limit: int = sys.maxsize):
        self.folder, self.limit = folder, limit
        self.paths = [folder / f"{part:05d}.safetensors" for part in range(parts)]
        self.load = lru_cache(OPEN)(lambda part: load_file(self.paths[part])["rows"])  # a memory map

    def record(self, part: int) -> Record | None:
        """The record of a part, or None if it was not computed yet. ValueError if its file is damaged."""
        try:
            with safe_open(self.paths[part], "pt") as file:
                return json.loads(file.metadata()["record"])
        except FileNotFoundError:
            return None
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{self.paths[part]} is damaged ({error}); delete it to compute it again") from error

    def records(self) -> Iterator[Record]:
        """The records of all parts, or of those within the limit. ValueError if one is missing."""
        rows = 0
        for part, path in enumerate(self.paths):
            record = self.record(part) if rows < self.limit else None
            if record is None and rows and self.limit < sys.maxsize:
                return
            require(record is not None, f"there is no {path}; it was not computed yet")
            rows += len(record["names"])
            yield record

    def fill(self, make: Make, rank: int = 0, processes: int = 1) -> Iterator[tuple[int, int]]:
        """Compute the missing ones of parts rank, rank + processes, ..., up to `limit` -> (done, of how many)."""
        mine = range(rank, len(self.paths), processes)
        rows = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        for done, part in enumerate(mine):
            yield done, len(mine)
            if rows * processes >= self.limit:
                break
            rows += len((self.record(part) or self._compute(part, make))["names"])
        yield len(mine), len(mine)

    def _compute(self, part: int, make: Make) -> Record:
        path, record = self.paths[part], {}
        for leftover in self.folder.glob(f"{path.name}.*"):  # of a process that was killed
            leftover.unlink()
        pieces = list(make(part, record))
        tensors = {"rows": torch.cat(pieces) if pieces else torch.empty(0)}
        no_room = f"{path} could not be written; make room, finished parts are kept"
        with explain(no_room, OSError, SafetensorError, kind=OSError):
            atomic_write(path, partial(save_file, tensors, metadata={"record": json.dumps(record)}))
        return record

    @cached_property
    def starts(self) -> Tensor:
        """The first row of each part, and the number of rows."""
        return torch.tensor([0, *(len(record["names"]) for record in self.records())]).cumsum(0)

    def __len__(self) -> int:
        return min(int(self.starts[-1]), self.limit)

    def __getitem__(self, indices: Sequence[int] | slice | Tensor) -> Tensor:
        rows = torch.arange(len(self))[indices] if isinstance(indices, slice) else torch.as_tensor(indices).long()
        if rows.ndim != 1 or not ((rows >= 0) & (rows < len(self))).all():
            raise IndexError(f"rows {rows.tolist()}: expected a list of numbers from 0 to {len(self) - 1}")
        parts = torch.searchsorted(self.starts, rows, right=True) - 1
        like = self.load(int(self.starts.diff().nonzero()[0]))
        out = like.new_empty(len(rows), *like.shape[1:])
        for part in parts.unique().tolist():
            out[parts == part] = self.load(part)[rows[parts == part] - self.starts[part]]
        return out if out.dtype == torch.uint8 else out.long()


@dataclass
class Texts:
    """The captions of n examples, and a function that embeds some: it looks them up, or asks the language model."""

    captions: list[tuple[str, ...]]
    embed: Callable[[list[str]], list[Tensor]]

    def __len__(self) -> int:
        return len(self.captions)

    def pick(self, indices: Sequence[int] | Tensor, u: Sequence[float] | Tensor) -> list[Tensor]:
        """indices (B,), u (B,) in [0, 1) -> caption floor(u k) of the k of each example: B tensors (L, D), unpadded."""
        rows = [(self.captions[int(i)], float(x)) for i, x in zip(indices, u, strict=True)]
        return self.embed([texts[min(int(x * len(texts)), len(texts) - 1)] for texts, x in rows])


@dataclass
class Subset:
    """Some rows of other rows: the training examples, or the held-out ones."""

    rows: Any
    index: Tensor
    held_out: bool = False  # whether no training example is among them

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, indices: Any) -> Any:
        return self.rows[self.index[indices]]

    def pick(self, indices: Tensor, u: Sequence[float] | Tensor) -> list[Tensor]:
        """As `Texts.pick`."""
        return self.rows.pick(self.index[indices], u)


@torch.inference_mode()
def tokenize_images(tokenizer: Any, images: Tensor, batch: int = 256, bf16: bool | None = None) -> Tensor:
    """A frozen tokenizer and images (n, 3, H, W) uint8 -> tokens (n, N) on the CPU."""
    device = next(tokenizer.parameters()).device
    tokenizer.eval()
    with precision(device, bf16):
        return torch.cat([tokenizer.encode(to_float(x).to(device)).cpu() for x in images.split(batch)])


@dataclass
class Decimated:
    """Images (n, 3, H, W) -> (n, 3, H / factor, W / factor), computed when they are read: the low-res images."""

    images: Any
    factor: int

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Any) -> Tensor:
        return area_downsample(self.images[indices], self.factor)


@dataclass
class TrainingData:
    """A source, its caches under `folder`, and the split into training and held-out examples."""

    folder: str | Path
    source: Source
    config: MuseConfig
    encoder: TextEncoder
    _: KW_ONLY
    device: str | torch.device = "cpu"  # of the tokenizers
    bf16: bool | None = None  # None: where it is fast
    rank: int = 0  # this process computes parts rank, rank + processes, ...
    processes: int = 1
    wait: Callable[[], Any] = lambda: None  # returns when all processes have arrived
    read_only: bool = False  # compute and write nothing; ValueError if something is missing

    def __post_init__(self):
        self.side = self.config.high_tokenizer.image_size
        self.count = getattr(self.source, "count", 0) or sys.maxsize  # images to use
        self.pixels_limit = int(min(self.count, max(1, self.config.pixels_gib / (3 * self.side**2) * 2**30)))
        self.images = self._first = self._rows("pixels", limit=self.pixels_limit)  # later rows must match the first
        self.tokens: dict[str, Rows] = {}
        self._logged = 0  # parts whose problems are in the log

    def read(self) -> Iterator[tuple[int, int]]:
        """Decode or render the images, as many as `pixels_gib` has room for."""
        return self._fill(self.images, lambda part, record: _blocks(self._images(part, record)))

    def tokenize(self, name: str, tokenizer: Any) -> Iterator[tuple[int, int]]:
        """name "low" or "high": the tokens of all images by a frozen tokenizer; "low" reads decimated images."""
        size = getattr(self.config, f"{name}_tokenizer").image_size
        v = tokenizer.codebook_size

        def tokens_of(images: Tensor) -> Tensor:
            tokens = tokenize_images(tokenizer, area_downsample(images, self.side // size), bf16=self.bf16)
            lowest, highest = tokens.aminmax()
            require(lowest >= 0 and highest < v, f"{name} tokens {lowest} to {highest}; expected 0 to {v - 1}")
            return tokens.to(torch.int16 if v <= 2**15 else torch.int32)

        rows = self._rows(f"{name}_tokens", size, tokenizer.to(self.device).state_dict())
        yield from self._fill(rows, lambda part, record: map(tokens_of, _blocks(self._images(part, record))))
        self.tokens[name] = self._first = rows

    def _images(self, part: int, record: Record) -> Iterator[Tensor]:
        """Part -> its images, from the cache or the source. It fills the record.

        When a part is read again, images that could not be read before are left out. ValueError if others are missing.
        """
        if stored := self.images.record(part):
            record |= stored
            yield from self.images.load(part)
            return
        first = self._first.record(part)
        due = first["names"][::-1] if first else []  # the next one last
        problems = Problems()
        record |= {"names": [], "captions": [], "problems": vars(problems)}
        for example in islice(self.source.read(part, self.side, problems), None if first else self.count):
            name = example.check(self.side).name or content_hash(example.image, example.captions)
            if first and due[-1:] != [name]:
                continue
            del due[-1:]
            record["names"].append(name)
            record["captions"].append(example.captions)
            yield example.image
        lost = f"part {part} of the data lost {due[-1:]}, and {len(due)} images in all, since it was read first"
        require(not due, f"{lost}. Start again when they can be read, or delete {self.folder}")

    def embed(self) -> Iterator[tuple[int, int]]:
        """The captions of all examples, embedded. If they exceed `text_gib`, they are encoded at each reading."""
        captions = self.captions()
        texts = list(dict.fromkeys(text for texts in captions[:50_000] for text in texts))
        for remark in self.encoder.remarks(texts) if self.rank == 0 else []:
            logging.getLogger("minimuse").warning(remark)
        known = self.encode([text for texts in captions[:: max(1, len(captions) // 64)] for text in texts])
        each = sum(row.nbytes for row in known) / len(known)  # of a caption
        if each * sum(map(len, captions)) > self.config.text_gib * 2**30:
            self.texts = Texts(captions, self.encode)
            return

        def make(part: int, record: Record) -> Iterator[Tensor]:
            record |= self._first.record(part)
            texts = list(dict.fromkeys(text for texts in record["captions"] for text in texts))
            values = self.encode(texts)
            record |= {"texts": texts, "lengths": [len(value) for value in values]}
            return iter(values)

        stored = self._rows("text", self.encoder.max_tokens, self.encoder.weights)
        yield from self._fill(stored, make)
        self.encode(self.words()["examples"])  # for the sample grids, which then need no language model
        self.encoder.release()
        places = {}
        for part, record in enumerate(stored.records()):
            ends = torch.tensor([0, *record["lengths"]]).cumsum(0).tolist()
            places |= {text: (part, *span) for text, span in zip(record["texts"], pairwise(ends), strict=True)}

        def look_up(texts: list[str]) -> list[Tensor]:
            return [stored.load(part)[start:end].clone() for part, start, end in map(places.__getitem__, texts)]

        self.texts = Texts(captions, look_up)

    def encode(self, texts: Sequence[str], batch: int = 512) -> list[Tensor]:
        """B texts -> B embeddings (L, D), unpadded, in half precision."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `embed` says once what holds for all captions
            parts = [self.encoder.encode(list(texts[i : i + batch])) for i in range(0, len(texts), batch)]
        rows = [e[m].half().cpu() for part in parts for e, m in zip(part.embeds, part.mask, strict=True)]
        require(all(row.isfinite().all() for row in rows), "embeddings beyond float16's 65,504 cannot be stored")
        return rows

    def captions(self) -> list[tuple[str, ...]]:
        """The captions of all examples read so far, in order."""
        return [tuple(x) for record in self._first.records() for x in record["captions"]][: self._first.limit]

    def split(self, rows: Any, held_out: bool = False) -> Subset:
        """Rows of all examples -> those to train on, or every 50th, held out. Of fewer than 50, all serve for both."""
        index = torch.arange(len(rows))
        if len(rows) >= HELD_OUT:
            index = index[(index % HELD_OUT == HELD_OUT - 1) == held_out]
        return Subset(rows, index, held_out and len(rows) >= HELD_OUT)

    def columns(self, stage: str, held_out: bool = False) -> list[Subset]:
        """What a stage reads: images of its size, or tokens, texts and, for super-resolution, low tokens."""
        if stage in ("base", "superres"):
            tokens = [self.tokens["low"]] if stage == "base" else [self.tokens["high"], self.tokens["low"]]
            return [self.split(rows, held_out) for rows in (tokens[0], self.texts, *tokens[1:])]
        factor = self.side // self.config.low_tokenizer.image_size if stage == "low_tokenizer" else 1
        return [self.split(Decimated(self.images, factor) if factor > 1 else self.images, held_out)]

    def words(self, most: int = 20_000) -> dict[str, list[str]]:
        """What a checkpoint says about its data: the most common words of the captions, and prompts to try."""
        if not self.config.text_encoder:
            return {"words": [], "examples": [""] * 3}
        if isinstance(self.source, SceneDataset):
            return {"words": vocabulary(bool(self.source.synonyms)), "examples": EXAMPLE_PROMPTS}
        captions = [text for texts in self.captions() for text in texts]
        words = Counter(word for text in captions for word in re.findall(r"[^\W\d_]+", text.lower()))
        examples = [captions[i * (len(captions) - 1) // 3] for i in range(min(3, len(captions)))]
        return {"words": [word for word, _ in words.most_common(most)], "examples": examples}

    def _rows(self, kind: str, *content: Any, limit: int = sys.maxsize) -> Rows:
        key = content_hash(CACHE_VERSION, self.source.fingerprint, self.side, *content)
        return Rows(Path(self.folder) / f"{kind}-{key[:16]}", self.source.parts, min(limit, self.count))

    def _fill(self, rows: Rows, make: Make) -> Iterator[tuple[int, int]]:
        """Compute what is missing, check that each part has the rows of the first cache, and log what was left out."""
        if not self.read_only:
            yield from rows.fill(make, self.rank, self.processes)
            self.wait()
        problems = Problems()
        for part, record in enumerate(rows.records()):
            first = self._first.record(part)
            same = first is None or first["names"] == record["names"]
            require(same, f"{rows.folder} has other rows than {self._first.folder}; delete {self.folder}")
            if part >= self._logged:
                problems.include(Problems(**record["problems"]))
                self._logged = part + 1
        require(len(rows) > 0, f"no usable captioned image; {problems.summary() or 'nothing was found'}")
        if self.rank == 0 and problems.summary():
            logging.getLogger("minimuse").warning(problems.summary())


def _blocks(images: Iterator[Tensor]) -> Iterator[Tensor]:
    """Images -> batches of up to BLOCK."""
    while few := list(islice(images, BLOCK)):
        yield torch.stack(few)
