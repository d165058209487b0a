"""utils.py: devices and precision."""

import pytest
import torch

import minimuse.utils
from minimuse.utils import pick_device, pick_dtype


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
