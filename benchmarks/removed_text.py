"""Do the shipped super-resolution models mind what stands for removed text? Held-out nats, three ways.

    python benchmarks/removed_text.py [--n 64]

    text   the scene's caption
    none   removed text as it is now (Muse 2.7): only the low-res tokens are attended to
    zero   removed text as these models were trained: one zero entry is attended to as well

The loss is the mean over masked tokens at five mask rates, the interval that of the paired difference over scenes. It
takes about a minute.
"""

import argparse

import torch
from torch import Tensor

from minimuse import Muse
from minimuse.cfg import null_text
from minimuse.data_sources import SceneDataset
from minimuse.masking import masked_cross_entropy, random_mask
from minimuse.text import Context
from minimuse.utils import area_downsample, to_float

RATES = (1.0, 0.9, 0.7, 0.4, 0.15)
SEED = 9_000_000_000  # scenes that no training reads


@torch.inference_mode()
def losses(muse: Muse, n: int) -> dict[str, Tensor]:
    """-> for each way the mean loss of each scene, (n,)."""
    side = muse.config.high_tokenizer.image_size
    scenes = SceneDataset(n, side, seed=SEED)
    images = scenes.images()
    high = muse.high_tokenizer.encode(to_float(images))
    low = muse.low_tokenizer.encode(to_float(area_downsample(images, side // muse.config.low_tokenizer.image_size)))
    text = muse.encoder.encode([scenes.captions(i)[0] for i in range(n)])
    none = null_text(text)
    contexts = {"text": text, "none": none, "zero": Context(none.embeds, torch.ones_like(none.mask))}
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, list[Tensor]] = {name: [] for name in contexts}
    for rate in RATES:
        masked = random_mask(high, torch.full((n,), rate, dtype=torch.double), generator)
        tokens = high.masked_fill(masked, muse.superres.mask_id)
        for name, context in contexts.items():
            logits = muse.superres(tokens, muse.superres.memory(context, low))
            each = zip(logits.split(1), high.split(1), masked.split(1), strict=True)
            rows[name].append(torch.stack([masked_cross_entropy(*row) for row in each]))
    return {name: torch.stack(values).mean(0) for name, values in rows.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64)
    n = parser.parse_args().n
    for name in ("nano", "toy"):
        found = losses(Muse.from_pretrained(name, device="cpu", dtype=torch.float32), n)
        difference = found["none"] - found["zero"]
        print(name, ", ".join(f"{way} {loss.mean():.4f}" for way, loss in found.items()), end="; ")
        print(f"none - zero {difference.mean():+.5f} +- {1.96 * difference.std() / n**0.5:.5f} nats")
