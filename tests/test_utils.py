"""utils.py: checks of settings, devices and precision, seeds, files, pixels."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minimuse.utils
from minimuse.data_sources import SceneDataset
from minimuse.pictures import from_pil
from minimuse.utils import (
    Decay,
    Fraction,
    Natural,
    NonNegative,
    OneSeed,
    Positive,
    PositiveInt,
    area_downsample,
    atomic_write,
    check,
    content_hash,
    derive_seed,
    explain,
    fast_bf16,
    generator_of,
    pick_device,
    pick_dtype,
    precision,
    require_multiple,
    seeded_generator,
    to_float,
    to_pil,
    to_uint8,
)


def test_errors_of_others_are_explained():
    with pytest.raises(OSError, match=r"^no such part: 3$") as found, explain("no such part", IndexError, kind=OSError):
        raise IndexError(3)
    assert isinstance(found.value.__cause__, IndexError), "the first error is kept"
    with pytest.raises(KeyError), explain("no such part", IndexError):
        raise KeyError(3)


@pytest.mark.parametrize(
    ("fast", "device", "parameters", "dtype"),
    [
        (True, "cpu", 30_000_000, torch.bfloat16),
        (True, "cpu", 29_999_999, torch.float32),
        (True, "cuda", 1, torch.bfloat16),
        (False, "cpu", 10**9, torch.float32),
        (False, "cuda", 10**9, torch.float32),
    ],
)
def test_bf16_where_it_is_fast_and_worth_it(monkeypatch, fast, device, parameters, dtype):
    monkeypatch.setattr(minimuse.utils, "fast_bf16", lambda device: fast)
    assert pick_dtype(torch.device(device), parameters) == dtype


def test_pick_device(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu"), "a device that was named is taken"
    for cuda, mps, best in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert pick_device() == torch.device(best), f"cuda {cuda}, mps {mps}: expected {best}, {pick_device()} came"


@pytest.mark.parametrize("wrong", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(wrong):
    with pytest.raises(ValueError, match=wrong):
        pick_device(wrong)


def test_precision():
    cpu, a = torch.device("cpu"), torch.randn(4, 4)
    with precision(cpu, True):
        assert (a @ a).dtype == torch.bfloat16, "True: matrix products in bf16"
    with precision(cpu, False):
        assert (a @ a).dtype == torch.float32, "False: never"
    with precision(cpu):
        assert ((a @ a).dtype == torch.bfloat16) == fast_bf16(cpu), "None: where it is fast"
    assert isinstance(fast_bf16(cpu), bool), "yes or no"


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_generators_are_functions_of_their_numbers():
    a, b, c, d = (torch.rand(4, generator=seeded_generator(*x)) for x in ((1, 2), (1, 2), (2, 1), (12,)))
    assert a.equal(b), "the same numbers, other draws"
    assert not a.equal(c), "the order of the numbers does not matter"
    assert not a.equal(d), "1, 2 is taken for 12"


@given(numbers=st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_any_whole_numbers_make_a_seed(numbers):
    assert 0 <= derive_seed(*numbers) < 2**63, "what torch takes as a seed"


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 1e20, 2.0, "7", b"3", [2.0], True, None, math.nan])
def test_a_seed_beyond_what_torch_reads_is_refused(seed):
    with pytest.raises(ValueError, match=r"^seed is .*; give a whole number from 0 to 2\*\*32 - 1"):
        generator_of(seed)


def test_different_seeds_draw_different_numbers():
    draws = [torch.rand(4, generator=generator_of(seed)).tolist() for seed in (0, 1, 2**31, 2**32 - 1, np.uint32(7))]
    assert len(set(map(tuple, draws))) == 5
    assert draws[0] == torch.rand(4, generator=torch.Generator().manual_seed(0)).tolist(), "torch's own draws"


# --- files ------------------------------------------------------------------------------------------------------------


def test_content_hash_tells_contents_apart():
    ones = torch.ones(2, 3)
    values = ["a", ["a"], ["a", 1], ones, ones.T, ones.half(), ones * 2, {"a": ones}, {"b": ones}, [ones, ones], None]
    assert len({content_hash(value) for value in values}) == len(values), "two of these have one hash"
    assert content_hash(ones.T.contiguous()) == content_hash(ones.T), "strides do not count"
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1}), "nor does the order of keys"
    assert len(content_hash()) == 64
    with pytest.raises(AttributeError):
        content_hash(Path("x"))


def test_pitfall_23_a_file_is_written_whole_under_a_new_name(tmp_path):
    path = tmp_path / "a.json"
    atomic_write(path, "one")
    old = path.open()
    atomic_write(path, lambda new: new.write_text("two"))
    assert (path.read_text(), old.read()) == ("two", "one"), "a reader of the old file still sees it whole"
    assert path.stat().st_mode & 0o777 == (tmp_path / "a.json").stat().st_mode & 0o777

    def fail(new):
        new.write_text("th")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        atomic_write(path, fail)
    assert path.read_text() == "two", "a failed write leaves the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "and nothing else"


# --- checks of settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (PositiveInt, 0, "a positive whole number"),
        (PositiveInt, 1.0, "a positive whole"),
        (PositiveInt, True, "a positive whole"),
        (PositiveInt, 10**13, r"a positive whole number, at most 10\*\*12"),
        (Natural, -1, "0 or a positive whole number"),
        (NonNegative, -1, "a number, 0 or more"),
        (NonNegative, math.nan, "a number, 0 or more"),
        (NonNegative, math.inf, "a number, 0 or more"),
        (NonNegative, "1", "a number, 0 or more"),
        (NonNegative, 10**400, "a number, 0 or more"),
        (Positive, 0, "a number above 0"),
        (Fraction, 1.1, "a fraction"),
        (Fraction, torch.tensor(math.nan), "a fraction"),
        (Decay, 1, "a fraction, from 0 to below 1"),
        (OneSeed, 2**32, r"a whole number from 0 to 2\*\*32 - 1"),
        (float, torch.zeros(1), "a number"),
        (float, None, "a number"),
        (int, np.bool_(True), "a whole number"),
        (bool, 1, "True or False"),
        (str, b"a", "a text"),
        (Literal["a", "b"], ["a"], "one of a, b"),
        (tuple[float, float], 1.0, "a list"),
        (tuple[float, float], (1.0,), "2 values"),
        (dict[str, float], 3, "a dict"),
    ],
)
def test_a_setting_that_is_not_of_its_kind_is_refused_by_its_name(kind, value, expected):
    with pytest.raises(ValueError, match=f"^speed is .*; give {expected}"):
        check("speed", value, kind)


def test_parts_of_a_setting_are_named():
    with pytest.raises(ValueError, match=r"speed\[1\] is 'x'; give a fraction"):
        check("speed", [0.5, "x"], tuple[Fraction, ...])
    with pytest.raises(ValueError, match=r"speed\.a is 2; give a fraction"):
        check("speed", {"a": 2}, dict[str, Fraction])
    with pytest.raises(ValueError, match=r"a key of speed is 1; give a text"):
        check("speed", {1: 1}, dict[str, Fraction])


def test_settings_that_make_sense_become_plain_python():
    kinds = [(PositiveInt, np.int64(3)), (PositiveInt, torch.tensor(3)), (Fraction, np.array(0.5)), (float, 3)]
    kinds += [
        (bool, True),
        (str, "a"),
        (tuple[Fraction, ...], [0, 1]),
        (dict[str, float], {"a": 1}),
        (Literal["a"], "a"),
    ]
    values = [check("x", value, kind) for kind, value in kinds]
    assert values == [3, 3, 0.5, 3, True, "a", (0, 1), {"a": 1}, "a"]
    assert [type(value) for value in values[:4]] == [int, int, float, int]
    assert type(check("x", 10**30, Positive)) is float, "torch takes no int beyond 64 bits"
    require_multiple(SimpleNamespace(x=4), "x", 2)
    with pytest.raises(ValueError, match="x is 30; give a multiple of 16, such as 32"):
        require_multiple(SimpleNamespace(x=30), "x", 16)
    with pytest.raises(ValueError, match="such as 16"):
        require_multiple(SimpleNamespace(x=3), "x", 16)


def test_uint8_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(to_float(pixels)), pixels), "uint8 -> float -> uint8 must be exact"
    assert to_float(pixels).aminmax() == (-1, 1), "0 and 255 are the ends of [-1, 1]"
    assert torch.equal(to_uint8(torch.tensor([-3.0, 3.0])), torch.tensor([0, 255], dtype=torch.uint8)), "clip"
    with pytest.raises(ValueError, match="uint8"):
        to_float(torch.zeros(1, 3, 4, 4))


def test_pil_round_trip():
    images = SceneDataset(2, 32).images()
    back = torch.cat([from_pil(picture, 32) for picture in to_pil(images)])
    assert torch.equal(to_uint8(back), images), "tensor -> PIL -> tensor must be exact"
    assert to_pil(to_float(images))[1].tobytes() == to_pil(images)[1].tobytes(), "floats and uint8 give one picture"
    with pytest.raises(ValueError, match=r"B, 3, H, W"):
        to_pil(images[0])


def test_halve_averages():
    images = torch.tensor([[0.0, 0.2], [0.4, 0.6]]).view(1, 1, 2, 2)
    mean = area_downsample(images).item()
    assert abs(mean - 0.3) <= 1 / 127.5, f"a low-res pixel is the mean of its block, {mean} came"
    images = SceneDataset(4, 32).images()
    low = area_downsample(to_float(images), 4)
    assert low.equal(to_float(area_downsample(images, 4))), "floats and uint8 of one image have the same low-res image"
    small = area_downsample(SceneDataset(1, 32).images(), 4)
    assert (small.shape, small.dtype) == ((1, 3, 8, 8), torch.uint8), "uint8 stays uint8"
    for factor in (0, 3):
        with pytest.raises(ValueError, match="factor"):
            area_downsample(torch.zeros(1, 3, 32, 32), factor)
