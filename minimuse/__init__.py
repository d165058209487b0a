"""minimuse: the readable reference implementation of Muse (arXiv 2301.00704) in PyTorch.

    from minimuse import Muse
    Muse.from_pretrained("toy").generate("two small red cubes", seed=0)[0].show()

Each file without a prefix is one part of the paper. To read Muse, go in this order:

    vqgan.py        images <-> tokens                          2.2, 2.5
    masking.py      schedules, masks, the loss                 2.6
    transformer.py  tokens + text -> logits                    2.3, 2.4
    cfg.py          classifier-free guidance                   2.7
    sampler.py      iterative parallel decoding                2.8
    text.py         prompts -> embeddings by a frozen LM       2.1
    muse.py         the whole flow                             Fig. 3

Importing this package loads no model, uses no network and imports neither torch nor transformers: each name below is
loaded from its file at first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {"Context": "text", "Muse": "muse", "TextEncoder": "text"}  # exported name -> its file

__all__ = ["Context", "Muse", "TextEncoder", "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"minimuse has no {name!r}; it exports {', '.join(sorted(_HOME))} and its modules")
    value = getattr(import_module(f"minimuse.{_HOME[name]}"), name)
    globals()[name] = value  # from now on found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
