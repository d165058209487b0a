"""Small helpers that every file may use: checks of settings, devices and precision, seeds, atomic writes, pixels."""

import hashlib
import inspect
import json
import os
import re
import reprlib
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import is_dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# --- checks of settings -----------------------------------------------------------------------------------------------


def require(condition: bool, message: str) -> None:
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@contextmanager
def explain(message: str, *errors: type[Exception], kind: type[Exception] = ValueError) -> Iterator[None]:
    """A context in which these errors become one of this kind, which says "message: first line of the error"."""
    try:
        yield
    except errors as error:
        first_line = str(error).partition("\n")[0]
        raise kind(f"{message}: {first_line}") from error


def require_multiple(config: Any, name: str, of: int) -> None:
    """ValueError unless the named field is a multiple of `of`."""
    value = getattr(config, name)
    nearest = max(1, round(value / of)) * of
    require(value % of == 0, f"{type(config).__name__}.{name} is {value}; give a multiple of {of}, such as {nearest}")


Generators = torch.Generator | Sequence[torch.Generator] | None  # one for the whole batch, or one for each example


class Rule(NamedTuple):
    """`Annotated[float, Rule(...)]`: which floats a setting may be, and how an error says so."""

    is_right: Callable[[Any], bool]
    expected: str


PositiveInt = Annotated[int, Rule(lambda x: 0 < x <= 10**12, "a positive whole number, at most 10**12")]
Natural = Annotated[int, Rule(lambda x: 0 <= x <= 10**12, "0 or a positive whole number, at most 10**12")]
Size = Annotated[int, Rule(lambda x: 0 < x <= 2**17, "a positive whole number, at most 2**17")]
Layers = Annotated[int, Rule(lambda x: 0 < x <= 1000, "a positive whole number, at most 1000")]
Depth = Annotated[int, Rule(lambda x: 0 <= x <= 1000, "0 or a positive whole number, at most 1000")]
Positive = Annotated[float, Rule(lambda x: x > 0, "a number above 0")]
NonNegative = Annotated[float, Rule(lambda x: x >= 0, "a number, 0 or more")]
Fraction = Annotated[float, Rule(lambda x: 0 <= x <= 1, "a fraction, from 0 to 1")]
Decay = Annotated[float, Rule(lambda x: 0 <= x < 1, "a fraction, from 0 to below 1")]
FloatType = Annotated[torch.dtype, Rule(lambda x: x.is_floating_point, "torch.float32 or torch.bfloat16")]
OneSeed = Annotated[int, Rule(lambda x: 0 <= x < 2**32, "a whole number from 0 to 2**32 - 1")]
EXPECTED = {int: "a whole number", float: "a number", str: "a text in UTF-8", bool: "True or False", tuple: "a list"}


def check(name: str, value: Any, kind: Any, expected: str = "") -> Any:
    """The value of a setting, with plain Python numbers. ValueError, with its name, if it is not of this kind.

    `kind` is an annotation: PositiveInt, float, Literal["a", "b"], tuple[Fraction, ...], dict[str, float], a dataclass.
    numpy and torch scalars are numbers; bool, NaN and infinity are not. A dict becomes the dataclass.
    """
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(value, dict) and is_dataclass(kind):
        try:
            return kind(**value)
        except TypeError as e:  # a field is missing or unknown
            raise ValueError(f"{name}: {e}. Was it written by another version of minimuse?") from e
    if isinstance(value, dict) and origin is dict:
        return {check(f"a key of {name}", k, args[0]): check(f"{name}.{k}", v, args[1]) for k, v in value.items()}
    if isinstance(value, tuple | list) and origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is ... else args
        require(len(value) == len(kinds), f"{name} is {reprlib.repr(value)}; give {len(kinds)} values")
        return tuple(check(f"{name}[{i}]", v, k) for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    value = plain(value)
    expected = expected or EXPECTED.get(origin or kind) or f"a {kind.__name__}"
    if origin is Annotated:
        expected = args[1].expected
        value = check(name, value, args[0], expected)
        right = args[1].is_right(value)
    elif origin is Literal:
        expected = f"one of {', '.join(args)}"
        right = isinstance(value, str) and value in args
    elif kind in (int, float):
        right = isinstance(value, int | kind) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        value = float(value) if right and kind is float and abs(value) > 2**53 else value  # torch takes no larger int
    else:
        right = isinstance(value, origin or kind) and not (kind is str and re.search("[\ud800-\udfff]", value))
    require(right, f"{name} is {reprlib.repr(value)}; give {expected}")
    return value


_kinds = cache(partial(get_type_hints, include_extras=True))  # it is slow


def plain(value: Any) -> Any:
    """A numpy or torch scalar -> a Python number; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


class Checked:
    """The base of a dataclass whose fields are checked by their annotations, and hold plain Python numbers."""

    def __post_init__(self):
        for name, kind in _kinds(type(self)).items():
            object.__setattr__(self, name, check(f"{type(self).__name__}.{name}", getattr(self, name), kind))


def named(setting: str, text: Any, table: Mapping[str, Callable[..., Any]], *first: Any) -> Any:
    """A name of the table, with numbers after colons: "p2:0.5" -> table["p2"](*first, 0.5). ValueError for others."""
    name, *words = text.split(":") if isinstance(text, str) else [""]
    try:
        numbers = [int(word) if word.isdecimal() else check(setting, float(word), float) for word in words]
        inspect.signature(table[name]).bind(*first, *numbers)
    except (KeyError, TypeError, ValueError) as e:
        known = f"known: {', '.join(table)}, some with numbers, such as name:0.5"
        raise ValueError(f"unknown {setting} {reprlib.repr(text)}; {known}") from e
    return table[name](*first, *numbers)


# --- random numbers and ranks -----------------------------------------------------------------------------------------


def derive_seed(*numbers: int) -> int:
    """Whole numbers, such as (seed, step) -> a seed. Other numbers give an unrelated seed."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def generator_of(seed: int, name: str = "seed") -> torch.Generator:
    """A CPU generator with this seed. ValueError beyond 32 bits, which torch would not read."""
    return torch.Generator().manual_seed(check(name, seed, OneSeed))


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by whole numbers, such as (seed, place)."""
    return torch.Generator().manual_seed(derive_seed(*numbers))


def uniforms(*shape: int, generator: Generators = None) -> Tensor:
    """Random numbers in [0, 1), (B, ...). With one generator per example, no row depends on its neighbours."""
    each = generator if isinstance(generator, Sequence) else [generator]
    ok = all(g is None or (isinstance(g, torch.Generator) and g.device.type == "cpu") for g in each)
    require(ok, f"generator is {generator!r}; give CPU generators, so that a seed means the same everywhere")
    if not isinstance(generator, Sequence):
        return torch.rand(shape, generator=generator)
    n = len(generator)
    require(n == shape[0], f"{n} generators for a batch of {shape[0]}; give one generator, or one for each image")
    return torch.stack([torch.rand(shape[1:], generator=g) for g in generator])


def top_mask(scores: Tensor, ties: Tensor, counts: Tensor) -> Tensor:
    """scores (B, N), counts (B,) -> (B, N) bool, True at the `counts` highest of each row; `ties` (B, N) break ties."""
    by_tie = ties.argsort(1, descending=True)
    order = by_tie.gather(1, scores.gather(1, by_tie).argsort(dim=1, descending=True, stable=True))
    return order.argsort(1) < counts[:, None]


def add_bits(coarse: Tensor, device: torch.device) -> Tensor:
    """Uniforms (B, ...) in [0, 1) -> (0, 1). torch's have 24 random bits; those of another number follow them."""
    fine = coarse.double() + 2**-24 * coarse.flatten(1).roll(1, 1).view_as(coarse)
    fine = fine.to(device, torch.float if device.type == "mps" else torch.double)  # MPS has no float64
    return fine.clamp(1e-30, 1 - torch.finfo(fine.dtype).eps)


@lru_cache(maxsize=16)
def halton_rank(h: int, w: int) -> Tensor:
    """(h*w,) long: the rank of each cell in the Halton sequence of bases 2 (rows) and 3 (columns)."""

    def radical_inverse(i: int, base: int) -> float:  # the digits of i, mirrored at the point
        return (i % base + radical_inverse(i // base, base)) / base if i else 0.0

    rank: dict[int, int] = {}
    i = 0
    while len(rank) < h * w:
        i += 1
        cell = int(radical_inverse(i, 2) * h) * w + int(radical_inverse(i, 3) * w)
        rank.setdefault(cell, len(rank))
    return torch.tensor([rank[cell] for cell in range(h * w)])


# --- devices and precision --------------------------------------------------------------------------------------------


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """A device, or None for cuda, mps or cpu, in this order. ValueError if this machine does not have it."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device is None:
        return torch.device(best)
    problem = f"device {str(device)!r} is not on this machine; give {best!r}"
    with explain(problem, RuntimeError, AssertionError, ValueError, TypeError):
        require(torch.device(device).type in ("cpu", "cuda", "mps", "xpu"), "known are cpu, cuda, mps and xpu")
        torch.empty(0, device=device)
    return torch.device(device)


def pick_dtype(device: torch.device, parameters: int) -> torch.dtype:
    """bfloat16 if the device multiplies it faster than float32, otherwise float32.

    Choice: on a CPU, models below 30 million parameters use float32. So a seed gives nearly one picture on all CPUs:
    kernels and threads change the rounding, which may change a pixel by 1 and, rarely, a token.
    """
    return torch.bfloat16 if fast_bf16(device) and (device.type != "cpu" or parameters >= 3e7) else torch.float32


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


class NoBfloat16(TorchFunctionMode):
    """Inside, `x.bfloat16()` is a float32 copy: for torch's Muon, on a CPU that multiplies bf16 slowly."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].float().clone() if func is Tensor.bfloat16 else func(*args, **kwargs or {})


# --- files ------------------------------------------------------------------------------------------------------------


def atomic_write(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Write a text, or what `content` writes to a path, under a new name, then rename: never half a file."""
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
    """JSON values and tensors (a state_dict) -> SHA-256 in hex. The order of a dict's keys does not count."""

    def digest(tensor: Tensor) -> list:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()]

    return hashlib.sha256(json.dumps(values, sort_keys=True, default=digest).encode()).hexdigest()


# --- pixels -----------------------------------------------------------------------------------------------------------
# images are stored as uint8; models see them in [-1, 1]


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 of the same shape. Values outside are clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> float32 of the same shape in [-1, 1]."""
    require(images.dtype == torch.uint8, f"to_float expected uint8, {images.dtype} came; floats need no change")
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W), uint8 or in [-1, 1] -> PIL images."""
    fits = images.ndim == 4 and images.shape[1] == 3
    require(fits, f"to_pil expected images (B, 3, H, W) and got {tuple(images.shape)}; one image needs [None]")
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def area_downsample(images: Tensor, factor: int = 2) -> Tensor:
    """Images (B, 3, H, W) -> (B, 3, H / factor, W / factor), decimated (Muse 3.3.1). Floats become what uint8 would."""
    factor = check("factor", factor, PositiveInt)
    fits = images.ndim in (3, 4) and images.shape[-2] % factor == images.shape[-1] % factor == 0
    require(fits, f"factor is {factor}, images have the shape {tuple(images.shape)}; give a divisor of H and W")
    is_float = images.dtype != torch.uint8
    images = to_uint8(images) if is_float else images
    small = F.avg_pool2d(images.float(), factor).round().to(torch.uint8)  # equals interpolate(mode="area")
    return to_float(small) if is_float else small
