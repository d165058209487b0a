"""What only notebooks show: source code, animations, film strips of any frames, and the look of their figures.

Not here: sheets of pictures (`minimuse/plots.py`), diagrams (`diagrams.py`).
"""

import base64
import inspect
import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from IPython.display import HTML, Markdown
from PIL import Image
from torch import Tensor

from minimuse.plots import Images, grid
from minimuse.utils import require, to_pil


def style() -> None:
    """Set matplotlib's defaults: small enough for a notebook, with colours that the colour-blind can tell apart."""
    warnings.filterwarnings("ignore", "Creating legend with loc")  # appears on a busy machine
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
    matplotlib.rcParams |= {
        "axes.prop_cycle": matplotlib.cycler(color=colors),
        "figure.dpi": 80, "savefig.dpi": 80, "figure.figsize": (8, 3.2), "figure.constrained_layout.use": True,
        "font.size": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "lines.linewidth": 2, "image.cmap": "viridis", "image.interpolation": "nearest",
    }  # fmt: skip


def show(*things: Any) -> Markdown:
    """Functions, classes or methods -> their source code for Jupyter, each below the name of its file."""
    parts = []
    for thing in things:
        path = Path(inspect.getsourcefile(inspect.unwrap(thing)))
        parts.append(f"# {path.parent.name}/{path.name}\n{textwrap.dedent(inspect.getsource(thing)).rstrip()}")
    return Markdown("```python\n" + "\n\n\n".join(parts) + "\n```")


def film_strip(frames: Sequence[Images], titles: Sequence[str] | None = None, scale: int | None = None) -> Image.Image:
    """Steps, each a PIL image, several, or (B, 3, H, W) -> a strip: steps are columns, rows the batch, titles below."""
    require(len(frames) > 0, "no picture came: expected at least one step")
    frames = [[x] if isinstance(x, Image.Image) else to_pil(x) if isinstance(x, Tensor) else x for x in frames]
    pictures = [picture for row in zip(*frames, strict=True) for picture in row]
    titles = titles and [""] * (len(pictures) - len(frames)) + list(titles)
    return grid(pictures, titles, len(frames), scale)


def animation(frames: Sequence[Image.Image], ms: int = 250) -> HTML:
    """Frames of one size -> a looping GIF that Jupyter plays: `ms` milliseconds each, 1.5 seconds the last."""
    first, *rest = [frame.convert("RGB").quantize(128, dither=0) for frame in frames]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=rest, loop=0, duration=[ms] * len(rest) + [1500])
    source = f"data:image/gif;base64,{base64.b64encode(file.getvalue()).decode()}"
    width = first.width * max(1, round(240 / first.width))
    return HTML(f'<img alt="animation" width="{width}" style="image-rendering: pixelated" src="{source}">')
