"""utils.py: checks of settings, devices and precision, seeds, files."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minimuse.utils
from minimuse.utils import (
    atomic_write,
    content_hash,
    derive_seed,
    fast_bf16,
    pick_device,
    pick_dtype,
    precision,
    require_at_least,
    require_fraction,
    require_multiple,
    require_positive,
    seeded_generator,
)


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


# --- files ------------------------------------------------------------------------------------------------------------


def test_content_hash_tells_contents_apart():
    ones = torch.ones(2, 3)
    values = ["a", ["a"], ["a", 1], ones, ones.T, ones.half(), ones * 2, {"a": ones}, {"b": ones}, [ones, ones], None]
    assert len({content_hash(value) for value in values}) == len(values), "two of these have one hash"
    assert content_hash(ones.T.contiguous()) == content_hash(ones.T), "strides do not count"
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1}), "nor does the order of keys"
    assert len(content_hash()) == 64
    with pytest.raises(TypeError, match=r"content_hash got a (Posix|Windows)Path"):
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
    ("check", "value", "match"),
    [
        (lambda s: require_positive(s, "x"), 0, "SimpleNamespace.x is 0; give a positive whole number"),
        (lambda s: require_positive(s, "x"), 1.0, "x is 1.0; give a positive whole"),
        (lambda s: require_at_least(s, 0, "x"), -1, "x is -1; give 0 or more"),
        (lambda s: require_at_least(s, 0, "x"), math.nan, "x is nan"),
        (lambda s: require_at_least(s, 0, "x"), math.inf, "x is inf"),
        (lambda s: require_at_least(s, 0, "x"), "1", "x is '1'"),
        (lambda s: require_fraction(s, "x"), 1.1, "x is 1.1; give a fraction"),
        (lambda s: require_fraction(s, "x"), math.nan, "x is nan"),
        (lambda s: require_multiple(s, "x", 16), 30, "x is 30; give a multiple of 16, such as 32"),
        (lambda s: require_multiple(s, "x", 16), 3, "such as 16"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(check, value, match):
    with pytest.raises(ValueError, match=match):
        check(SimpleNamespace(x=value))


def test_settings_that_make_sense_pass():
    s = SimpleNamespace(x=1)
    require_positive(s, "x")
    require_at_least(s, 0, "x")
    require_fraction(s, "x")
    require_multiple(s, "x", 1)
