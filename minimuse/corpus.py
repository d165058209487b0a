"""What a run trains on: a source, and what is computed of it once under the run's folder.

    Corpus(folder, source, ...)   .read()      -> .images (n, 3, S, S)       pixels, for the tokenizers
                                  .tokenize()  -> .tokens["low"] (n, N)      by a tokenizer that no longer changes
                                  .embed()     -> .texts, k captions each    by the frozen language model

Each of the three yields (done, of how many) while it works, shares the work among the processes, goes on where a run
was stopped, and has nothing to do where all is there. Every 50th example is held out for validation.

Not here: the shards on disk (data_cache.py), how a part is made (precompute.py).
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimuse.config import MuseConfig
from minimuse.data_cache import Rows, Shards, fill, fingerprint, in_bytes
from minimuse.data_captions import EXAMPLE_PROMPTS, vocabulary
from minimuse.data_images import Problems, SceneDataset, Source, area_downsample
from minimuse.precompute import (
    CachedPixels,
    LiveTexts,
    Subset,
    Texts,
    all_captions,
    all_problems,
    estimate,
    make_pixels,
    make_text,
    make_tokens,
    text_fits,
    tokenize,
)
from minimuse.text import TextEncoder
from minimuse.train_budget import duration
from minimuse.train_engine import Engine
from minimuse.vqgan import VQGAN

log = logging.getLogger("minimuse")
HELD_OUT = 50  # every 50th example


class Corpus:
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
        self._pixels = self._shards("pixels", fingerprint(source.fingerprint, self.side), limit)
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
        print_ = fingerprint(self.source.fingerprint, self.side, image_size, tokenizer.state_dict())
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
        print_ = fingerprint(self.source.fingerprint, self.side, self.encoder.max_tokens, self.encoder.weights)
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
