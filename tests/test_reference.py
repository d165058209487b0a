"""The same seed draws the same pixels as when tests/reference/pictures.json was stored.

To store it again, on purpose: python tests/test_reference.py. Kernels differ between kinds of CPU and thread counts,
and rounding may flip a token. So one thread draws, and pixels are compared exactly on the kind of CPU that stored them.
Elsewhere most pictures must look the same.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minimuse import Muse

FILE = Path(__file__).parent / "reference" / "pictures.json"
STORED = json.loads(FILE.read_text(encoding="utf-8"))
SIDE = 128


def checksum(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def thumbnail(image: Image.Image) -> list[int]:
    """16 x 16 gray levels."""
    small = image.resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small).mean(2).round().astype(int).flatten().tolist()


@cache
def model(name: str) -> Muse:
    return Muse.from_pretrained(name, device="cpu", dtype=torch.float32)


@cache
def start() -> Image.Image:
    """The picture that is edited."""
    return model("toy").generate("a large red cube", seed=0)[0]


def draw(case: dict[str, Any]) -> list[Image.Image]:
    """A stored case -> its pictures."""
    torch.set_num_threads(1)
    muse, method, settings = model(case["model"]), case["method"], dict(case["settings"])
    for name in ("guidance", "padding"):
        if isinstance(settings.get(name), list):
            settings[name] = tuple(settings[name])
    if method == "generate":
        return muse.generate(settings.pop("prompts"), **settings)
    prompt = settings.pop("prompt")
    if method == "inpaint":
        mask = np.zeros((SIDE, SIDE), bool)
        mask[:, SIDE // 2 :] = True
        return muse.inpaint(start(), mask, prompt, **settings)
    if method == "outpaint":
        return muse.outpaint(start(), settings.pop("padding"), prompt, **settings)
    return muse.edit(start(), prompt, **settings)


@pytest.mark.parametrize("name", STORED["cases"])
def test_the_same_seed_draws_the_same_pixels(name):
    case = STORED["cases"][name]
    images = draw(case)
    assert model(case["model"]).fingerprint == case["fingerprint"], "configuration or weights changed"
    if torch.backends.cpu.get_cpu_capability() == STORED["cpu"] and torch.__version__ == STORED["torch"]:
        assert [checksum(image) for image in images] == case["pixels"], "the same seed drew other pixels"
    close = [
        np.abs(np.subtract(thumbnail(image), small)).mean() < 2
        for image, small in zip(images, case["small"], strict=True)
    ]
    assert sum(close) >= len(close) / 2, "the same seed drew other pictures"


if __name__ == "__main__":
    for case in STORED["cases"].values():
        images = draw(case)
        case["pixels"] = [checksum(image) for image in images]
        case["small"] = [thumbnail(image) for image in images]
        case["fingerprint"] = model(case["model"]).fingerprint
    STORED |= {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    FILE.write_text(json.dumps(STORED, separators=(",", ":")), encoding="utf-8")
