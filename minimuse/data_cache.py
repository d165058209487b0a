"""What training reads, computed once and kept on disk: pixels, tokens and embedded captions of a source.

The tokenizers and the language model are frozen while a transformer trains (Muse 2.1, 2.3): training reads memory maps.

    TrainingData(folder, source, ...)   .read()      -> .images (n, 3, S, S)       pixels, for the tokenizers
                                        .tokenize()  -> .tokens["low"] (n, N)      by a tokenizer that is trained
                                        .embed()     -> .texts, k captions each    by the frozen language model
    folder/low_tokens-0123456789abcdef/ 00012.000.low_tokens.npy, 00012.001.low_tokens.npy, 00012.json, ...

The folder's name holds a hash of all that decides the content: a stale cache is never read. A part exists if and only
if its JSON does, which is renamed into place last: a process may be killed at any moment, and work continues there.

Not here: where images come from (data_sources.py), which rows a training step reads (train.py).
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimuse.config import MuseConfig
from minimuse.data_captions import EXAMPLE_PROMPTS, Problems, SceneDataset, common_words, vocabulary
from minimuse.data_images import area_downsample, to_float
from minimuse.data_sources import Source
from minimuse.text import TextEncoder
from minimuse.utils import atomic_write, content_hash, precision

BLOCK = 500  # rows of one file
HELD_OUT = 50  # every 50th example is held out for validation
OPEN = 64  # memory maps that a reader keeps open: each holds a file handle

Captions = list[tuple[str, ...]]  # of rows, in order
Blocks = Iterator[tuple[dict[str, np.ndarray], Captions]]  # named arrays of up to BLOCK rows, and the rows' captions
Make = Callable[[int, Problems], Blocks]  # part -> its blocks


class Shards:
    """The parts of one kind of rows, of which at most `limit` are read. The array `kind` has a row per example."""

    def __init__(self, folder: Path, kind: str, content: str, parts: int, limit: int | None = None):
        self.kind, self.parts, self.limit = kind, parts, limit
        self.folder = folder / f"{kind}-{content[:16]}"

    def record(self, part: int) -> dict[str, Any] | None:
        """-> {"rows": of each block, "captions": of all rows, "problems"}, or None if the part was not made yet."""
        path = self.folder / f"{part:05d}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all parts, or of as many as hold `limit` rows. ValueError if one is missing."""
        rows = 0
        for part in range(self.parts):
            if self.limit is not None and rows >= self.limit:
                return
            if (record := self.record(part)) is None:
                raise ValueError(f"part {part} of {self.parts} is not in {self.folder}; it was not computed yet")
            rows += sum(record["rows"])
            yield record

    def load(self, part: int, block: int, name: str) -> np.ndarray:
        """An array of a block as a read-only memory map; ValueError if its file is damaged."""
        path = self.folder / f"{part:05d}.{block:03d}.{name}.npy"
        try:
            return np.load(path, mmap_mode="r")
        except (ValueError, EOFError, FileNotFoundError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete {self.folder} to compute it again") from error

    def fill(self, make: Make, rank: int = 0, processes: int = 1) -> Iterator[tuple[int, int]]:
        """Make the missing ones of parts rank, rank + processes, ... -> (done, of how many).

        With a limit, a process may make a part or two too many, because it does not wait for the others.
        """
        mine = range(rank, self.parts, processes)
        rows: dict[int, int] = {}  # of the parts that are there
        self.folder.mkdir(parents=True, exist_ok=True)
        for done, part in enumerate(mine):
            yield done, len(mine)
            for before in set(range(part)) - set(rows):
                if self.limit and (record := self.record(before)):
                    rows[before] = sum(record["rows"])
            if self.limit and sum(rows.values()) >= self.limit:
                break
            if self.record(part) is None:
                self._write(part, make)
        yield len(mine), len(mine)

    def _write(self, part: int, make: Make) -> None:
        problems, rows, captions = Problems(), [], []
        for block, (arrays, texts) in enumerate(make(part, problems)):
            if len(arrays[self.kind]) != len(texts) or not all(texts):
                raise ValueError(f"part {part} needs captions for each of its {len(arrays[self.kind])} rows")
            try:
                for name, array in arrays.items():
                    np.save(self.folder / f"{part:05d}.{block:03d}.{name}.npy", array, allow_pickle=False)
            except OSError as error:
                hint = "make room and start again; finished parts are kept"
                raise OSError(f"part {part} could not be written to {self.folder} ({error}): {hint}") from error
            rows.append(len(texts))
            captions += texts
        record = {"rows": rows, "captions": captions, "problems": asdict(problems)}
        atomic_write(self.folder / f"{part:05d}.json", json.dumps(record))


class Rows:
    """The rows of a cache as one array: `rows[indices (B,)]` -> Tensor (B, ...), a copy."""

    def __init__(self, shards: Shards, dtype: torch.dtype | None = None):
        self.kind, self.dtype = shards.kind, dtype
        sizes = [(part, record["rows"]) for part, record in enumerate(shards.records())]
        self.blocks = [(part, block) for part, rows in sizes for block in range(len(rows))]
        self.starts = np.cumsum([0] + [n for _, rows in sizes for n in rows])
        self.n = min(int(self.starts[-1]), shards.limit or int(self.starts[-1]))
        self.map = lru_cache(OPEN)(lambda block, name: shards.load(*self.blocks[block], name))

    def __len__(self) -> int:
        return self.n

    def locate(self, indices: Any) -> tuple[np.ndarray, np.ndarray]:
        """Indices (B,) or a slice -> the block of each row, and its place in that block."""
        rows = np.asarray(np.arange(self.n)[indices] if isinstance(indices, slice) else indices, np.int64)
        if rows.ndim != 1 or (rows.size and not 0 <= rows.min() <= rows.max() < self.n):
            raise IndexError(f"rows {rows.tolist()}: expected a list of numbers from 0 to {self.n - 1}")
        blocks = np.searchsorted(self.starts, rows, side="right") - 1
        return blocks, rows - self.starts[blocks]

    def __getitem__(self, indices: Sequence[int] | slice | Tensor) -> Tensor:
        blocks, rows = self.locate(indices)
        first = self.map(0, self.kind)
        out = np.empty((len(rows), *first.shape[1:]), first.dtype)
        for block in np.unique(blocks).tolist():
            at = blocks == block
            out[at] = self.map(block, self.kind)[rows[at]]
        return torch.from_numpy(out).to(self.dtype)


class Texts(Rows):
    """The embedded captions of n examples, unpadded. A block stores equal texts once.

    text (n, 2): first caption and end of an example; spans (captions, 2): rows of a caption in values (tokens, D).
    """

    def __init__(self, shards: Shards):
        super().__init__(shards)
        self.index = [[np.array(shards.load(*at, name)) for name in ("text", "spans")] for at in self.blocks]

    def pick(self, indices: Sequence[int] | Tensor, u: Sequence[float] | Tensor) -> list[Tensor]:
        """indices (B,), u (B,) in [0, 1) -> caption floor(u k) of the k of each example: B tensors (L, D)."""
        rows = []
        for block, row, x in zip(*self.locate(indices), np.asarray(u), strict=True):
            text, spans = self.index[block]
            first, end = text[row].tolist()
            start, stop = spans[min(first + int(x * (end - first)), end - 1)].tolist()
            rows.append(torch.from_numpy(np.array(self.map(int(block), "values")[start:stop])))
        return rows


@dataclass
class LiveTexts:
    """Captions that are encoded at each reading, because they are too many to store."""

    captions: Captions
    encode: Callable[[list[str]], list[Tensor]]

    def __len__(self) -> int:
        return len(self.captions)

    def pick(self, indices: Sequence[int] | Tensor, u: Sequence[float] | Tensor) -> list[Tensor]:
        """As `Texts.pick`."""
        rows = [self.captions[int(i)] for i in indices]
        return self.encode([texts[int(float(x) * len(texts))] for texts, x in zip(rows, u, strict=True)])


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


def text_block(captions: Captions, encode: Callable[[list[str]], list[Tensor]]) -> dict[str, np.ndarray]:
    """Captions of n examples -> the arrays that `Texts` reads."""
    every = [text for texts in captions for text in texts]
    unique = list(dict.fromkeys(every))
    rows = [row.cpu().half() for row in encode(unique)]
    values = torch.cat(rows)
    if not values.isfinite().all():
        raise ValueError("embeddings beyond float16's 65,504, or NaN: this language model's text cannot be stored")
    ends = np.cumsum([0] + [len(row) for row in rows])
    span = {text: ends[i : i + 2] for i, text in enumerate(unique)}
    spans = np.array([span[text] for text in every])
    firsts = np.cumsum([0] + [len(texts) for texts in captions])
    return {"text": np.stack([firsts[:-1], firsts[1:]], 1), "spans": spans, "values": values.numpy()}


@torch.inference_mode()
def tokenize_images(tokenizer: Any, images: Tensor, batch: int = 256, bf16: bool | None = None) -> Tensor:
    """A frozen tokenizer and images (n, 3, H, W) uint8 -> tokens (n, N) on the CPU."""
    device = next(tokenizer.parameters()).device
    tokenizer.eval()
    with precision(device, bf16):
        return torch.cat([tokenizer.encode(to_float(x).to(device)).cpu() for x in images.split(batch)])


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
        self.pixels_limit = max(1, int(self.config.pixels_gib * 2**30 / (3 * self.side**2)))
        self._pixels = self._shards("pixels", limit=self.pixels_limit)
        self._paired = self._pixels  # the cache whose rows all later ones must match
        self.tokens: dict[str, Rows] = {}

    def read(self) -> Iterator[tuple[int, int]]:
        """Decode or render the images, as many as `pixels_gib` has room for."""

        def make(part: int, problems: Problems) -> Blocks:
            return (({"pixels": images.numpy()}, captions) for images, captions in self._read(part, problems))

        yield from self._fill(self._pixels, make)
        problems = Problems()
        for found in (record["problems"] for record in self._pixels.records()):
            problems.seen += found["seen"]
            for kind, names in found["names"].items():
                problems.add(kind, *names)
        self.images = Rows(self._pixels)
        if not len(self.images):
            raise ValueError(f"no usable captioned image; {problems.summary() or 'nothing was found'}")
        if problems.names and self.rank == 0:
            logging.getLogger("minimuse").warning(problems.summary())

    def _read(self, part: int, problems: Problems) -> Iterator[tuple[Tensor, Captions]]:
        """Part -> blocks of images and captions, from the cache of pixels if it holds the part."""
        if record := self._pixels.record(part):
            captions = iter(record["captions"])
            for block in range(len(record["rows"])):
                pixels = np.array(self._pixels.load(part, block, "pixels"))
                yield torch.from_numpy(pixels), list(islice(captions, len(pixels)))
            return
        examples = self.source.read(part, self.side, problems)
        while few := list(islice(examples, BLOCK)):
            images = [example.check(self.side).image for example in few]
            yield torch.stack(images), [example.captions for example in few]

    def tokenize(self, name: str, tokenizer: Any) -> Iterator[tuple[int, int]]:
        """name "low" or "high": the tokens of all images by a frozen tokenizer; "low" reads decimated images."""
        kind = f"{name}_tokens"
        size = getattr(self.config, f"{name}_tokenizer").image_size
        v = tokenizer.codebook_size
        shards = self._shards(kind, size, tokenizer.to(self.device).state_dict())

        def make(part: int, problems: Problems) -> Blocks:
            for images, captions in self._read(part, problems):
                tokens = tokenize_images(tokenizer, area_downsample(images, self.side // size), bf16=self.bf16)
                if tokens.min() < 0 or tokens.max() >= v:
                    raise ValueError(f"{name} tokens {tokens.min()} to {tokens.max()}; expected 0 to {v - 1}")
                yield {kind: tokens.numpy().astype(np.uint16 if v <= 2**16 else np.int32)}, captions

        yield from self._fill(shards, make)
        self._paired = shards
        self.tokens[name] = Rows(shards, torch.long)

    def embed(self) -> Iterator[tuple[int, int]]:
        """The captions of all examples, embedded. If they exceed `text_gib`, they are encoded at each reading."""
        captions = self.captions()
        known = self.encode([text for texts in captions[:: max(1, len(captions) // 64)] for text in texts])
        each = sum(row.nbytes for row in known) / len(known)  # of a caption
        if each * sum(map(len, captions)) > self.config.text_gib * 2**30:
            self.texts: Texts | LiveTexts = LiveTexts(captions, self.encode)
            return
        shards = self._shards("text", self.encoder.max_tokens, self.encoder.weights)

        def make(part: int, problems: Problems) -> Blocks:
            captions = iter(self._paired.record(part)["captions"])
            while few := list(islice(captions, BLOCK)):
                yield text_block(few, self.encode), few

        yield from self._fill(shards, make)
        self.texts = Texts(shards)

    def encode(self, texts: Sequence[str], batch: int = 512) -> list[Tensor]:
        """B texts -> B embeddings (L, D), unpadded, in half precision."""
        parts = (self.encoder.encode(list(texts[i : i + batch])) for i in range(0, len(texts), batch))
        return [e[m].half().cpu() for part in parts for e, m in zip(part.embeds, part.mask, strict=True)]

    def captions(self) -> Captions:
        """The captions of all examples read so far, in order."""
        rows = (tuple(texts) for record in self._paired.records() for texts in record["captions"])
        return list(islice(rows, self._paired.limit))

    def split(self, rows: Any, held_out: bool = False) -> Subset:
        """Rows of all examples -> those to train on, or every 50th, held out. Of fewer than 50, all serve for both."""
        index = torch.arange(len(rows))
        if len(rows) >= HELD_OUT:
            index = index[(index % HELD_OUT == HELD_OUT - 1) == held_out]
        return Subset(rows, index, held_out and len(rows) >= HELD_OUT)

    def words(self, most: int = 20_000) -> dict[str, list[str]]:
        """What a checkpoint says about its data: the most common words of the captions, and prompts to try."""
        if isinstance(self.source, SceneDataset):
            return {"words": vocabulary(bool(self.source.synonyms)), "examples": EXAMPLE_PROMPTS}
        captions = [text for texts in self.captions() for text in texts]
        examples = [captions[i * (len(captions) - 1) // 3] for i in range(min(3, len(captions)))]
        return {"words": common_words(captions, most), "examples": examples}

    def _shards(self, kind: str, *content: Any, limit: int | None = None) -> Shards:
        key = content_hash(self.source.fingerprint, self.side, *content)
        return Shards(Path(self.folder), kind, key, self.source.parts, limit)

    def _fill(self, shards: Shards, make: Make) -> Iterator[tuple[int, int]]:
        """Make what is missing, then check that each part has the same examples as the caches before it."""
        if not self.read_only:
            yield from shards.fill(make, self.rank, self.processes)
            self.wait()
        for part, (old, new) in enumerate(zip(self._paired.records(), shards.records(), strict=False)):
            if old["captions"] != new["captions"]:
                hint = f"Delete {self.folder} and start again"
                raise ValueError(f"part {part} of the data gave other examples when it was read again. {hint}")
