"""Small helpers that every file may use: checks of settings, devices and precision, seeds, atomic writes."""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# --- checks of settings -----------------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_positive(config: Any, *names: str) -> None:
    """ValueError unless each named field is a whole number of at least 1."""
    _require_fields(config, names, lambda x: isinstance(x, int) and x > 0, "a positive whole number")


def require_at_least(config: Any, lowest: float, *names: str) -> None:
    """ValueError unless each named field is a finite number of at least `lowest`."""
    _require_fields(config, names, lambda x: isinstance(x, int | float) and lowest <= x < math.inf, f"{lowest} or more")


def require_fraction(config: Any, *names: str) -> None:
    """ValueError unless each named field is a number in [0, 1]."""
    _require_fields(config, names, lambda x: isinstance(x, int | float) and 0 <= x <= 1, "a fraction, from 0 to 1")


def require_multiple(config: Any, name: str, of: int) -> None:
    """ValueError unless the named field is a multiple of `of`."""
    nearest = max(1, round(getattr(config, name) / of)) * of
    _require_fields(config, [name], lambda x: x % of == 0, f"a multiple of {of}, such as {nearest}")


def _require_fields(config: Any, names: Iterable[str], is_right: Callable[[Any], bool], expected: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(is_right(value), f"{type(config).__name__}.{name} is {value!r}; give {expected}")


# --- devices and precision --------------------------------------------------------------------------------------------


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """A device, or None for cuda, mps or cpu, in this order. ValueError if this machine does not have it."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device is None:
        return torch.device(best)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"device {str(device)!r} is not on this machine; give {best!r}. {e}") from e
    return torch.device(device)


def pick_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """bfloat16 if the device multiplies it faster than float32, otherwise float32.

    Choice: on a CPU, models below 30 million parameters use float32, so that a seed gives one picture on every CPU.
    """
    fast = fast_bf16(device) and (device.type != "cpu" or parameters >= 30_000_000)
    return torch.bfloat16 if fast else torch.float32


def fast_bf16(device: torch.device) -> bool:
    """Does this device multiply bf16 faster than fp32? A CPU does with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # absent in older torch
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def precision(device: torch.device, bf16: bool | None = None) -> AbstractContextManager:
    """A context: matrix products in bf16 where that is fast (None), always or never; weights and losses stay fp32."""
    fast = fast_bf16(device) if bf16 is None else bf16
    return torch.autocast(device.type, torch.bfloat16) if fast else nullcontext()


# --- seeds ------------------------------------------------------------------------------------------------------------


def derive_seed(*numbers: int) -> int:
    """Whole numbers, such as (seed, step) -> a seed. Other numbers give an unrelated seed."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by whole numbers, such as (seed, place)."""
    return torch.Generator().manual_seed(derive_seed(*numbers))


# --- files ------------------------------------------------------------------------------------------------------------


def atomic_write(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Write a text, or what `content` writes to a path, under a new name; flush it, then rename it.

    So a crash never leaves half a file, and a reader's memory map never changes.
    """
    new = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        if isinstance(content, str):
            new.write_text(content, encoding="utf-8")
        else:
            new.touch()
            mode = new.stat().st_mode  # the user's default; safetensors would let nobody else read the file
            content(new)
            new.chmod(mode)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """A file -> SHA-256 of its content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(*values: Any) -> str:
    """Tensors and JSON values, also in lists and dicts (a state_dict) -> SHA-256 in hex, the same on every machine.

    The order of a dict's keys does not count. Everything else does, a tensor's dtype and shape included.
    """

    def plain(value: Any) -> list:
        if not isinstance(value, Tensor):
            raise TypeError(f"content_hash got a {type(value).__name__}; give tensors, JSON values, lists and dicts")
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(content).hexdigest()]

    return hashlib.sha256(json.dumps(values, sort_keys=True, default=plain).encode()).hexdigest()
