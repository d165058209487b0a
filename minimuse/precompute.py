"""What is computed once: images to pixels and tokens, captions to embeddings, before and beside the training.

    source --make_pixels--> Shards --Rows-->  (n, 3, S, S) uint8
    source --make_tokens--> Shards --Rows-->  (n, N) of each tokenizer
    those captions --make_text--> Shards --Texts--> k captions an example, each (L, D)

Each `make_...` gives the function from a part to its arrays that `fill` asks for. The JSON of a part of pixels or
tokens keeps the captions of its rows, so that text is encoded for exactly those rows.

Glossary: n examples, N tokens, S pixels a side, L text tokens, D the language model's width, V codebook size.
Not here: how arrays are stored (data_cache.py), where images and captions come from (data_images.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimuse.config import MuseConfig
from minimuse.data_cache import Made, Mapped, Shards
from minimuse.data_images import Example, Problems, Source, to_float
from minimuse.utils import precision


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
