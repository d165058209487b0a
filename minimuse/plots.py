"""Contact sheets of pictures: grids, films of a decode, its tokens, masks over a picture; curves and trade-offs.

All but `Animation` return a PIL image, and sheets are drawn with PIL alone, which is fast. `B` pictures, `h w` token
grid, `N` = h w tokens.

Not here: saving, which is the image's own `.save(path)`.
"""

import base64
import inspect
import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minimuse.data_images import to_pil

if TYPE_CHECKING:
    from minimuse.eval_metrics import Estimate
    from minimuse.muse import Muse
    from minimuse.sampler import Step

Images = Sequence[Image.Image] | Tensor  # PIL images, or a tensor (B, 3, H, W), uint8 or in [-1, 1]
_INK, _PAPER, _MASKED, _GAP, _FONT = (45, 45, 50), (255, 255, 255), (150, 150, 155), 8, 13


def _enlarged(images: Images, scale: int | None) -> list[Image.Image]:
    """-> RGB pictures, each pixel scale x scale; None: so that they are about 160 wide."""
    images = to_pil(images) if isinstance(images, Tensor) else list(images)
    if not images:
        raise ValueError("no picture came: expected at least one")
    scale = scale or max(1, round(160 / images[0].width))
    return [i.convert("RGB").resize((i.width * scale, i.height * scale), Image.Resampling.NEAREST) for i in images]


def _wrapped(text: str, width: int, font: ImageFont.ImageFont) -> list[str]:
    """Text -> lines that fit the width; a word alone may stick out."""
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def grid(
    images: Images, captions: Sequence[str] | None = None, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Pictures and their captions -> one sheet, row by row; columns=None: about as many as rows."""
    cells = _enlarged(images, scale)
    if captions is not None and len(captions) != len(cells):
        raise ValueError(f"{len(captions)} captions for {len(cells)} pictures: give one each, or None")
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}: expected at least 1, or None")
    columns = min(columns or math.ceil(math.sqrt(len(cells))), len(cells))
    rows, font = math.ceil(len(cells) / columns), ImageFont.load_default(size=_FONT)
    width, height = (max(cell.size[axis] for cell in cells) for axis in (0, 1))
    lines = [_wrapped(text, width, font) for text in captions or [""] * len(cells)]
    footer, line = max(map(len, lines)) * (_FONT + 4), _FONT + 4
    sheet = Image.new("RGB", (_GAP + columns * (width + _GAP), _GAP + rows * (height + footer + _GAP)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, cell in enumerate(cells):
        x, y = _GAP + i % columns * (width + _GAP), _GAP + i // columns * (height + footer + _GAP)
        sheet.paste(cell, (x, y))
        for j, text in enumerate(lines[i]):
            draw.text((x, y + height + 2 + j * line), text, fill=_INK, font=font)
    return sheet


def film_strip(frames: Sequence[Images], titles: Sequence[str] | None = None, scale: int | None = None) -> Image.Image:
    """Decoding steps -> a strip, a column a step under its title, a row an image of the batch.

    A frame is one step's pictures: a PIL image, several, or a tensor (B, 3, H, W). Titles such as "step 3: 41 left".
    """
    frames = [[frame] if isinstance(frame, Image.Image) else frame for frame in frames]
    frames = [to_pil(frame) if isinstance(frame, Tensor) else list(frame) for frame in frames]
    if not frames or len({len(frame) for frame in frames}) > 1:
        raise ValueError(f"frames of {[len(frame) for frame in frames]} pictures: expected as many in each")
    pictures = [frame[row] for row in range(len(frames[0])) for frame in frames]
    if titles is not None and len(titles) != len(frames):
        raise ValueError(f"{len(titles)} titles for {len(frames)} frames: give one each, or None")
    strip = grid(pictures, None, len(frames), scale)
    if titles is None:
        return strip
    font, width = ImageFont.load_default(size=_FONT), (strip.width - _GAP) // len(frames)
    lines = [_wrapped(title, width - _GAP, font) for title in titles]
    header = max(map(len, lines)) * (_FONT + 4)
    sheet = Image.new("RGB", (strip.width, strip.height + header), _PAPER)
    sheet.paste(strip, (0, header))
    for i, wrapped in enumerate(lines):
        for j, text in enumerate(wrapped):
            ImageDraw.Draw(sheet).text((_GAP + i * width, 4 + j * (_FONT + 4)), text, fill=_INK, font=font)
    return sheet


def mask_overlay(image: Image.Image | Tensor, masked: Tensor) -> Image.Image:
    """A picture (3, H, W) or PIL, masked (N,) or (h, w) bool -> the picture, still-masked tokens as gray squares."""
    picture = to_pil(image[None])[0] if isinstance(image, Tensor) else image.convert("RGB")
    masked = torch.as_tensor(masked)
    side = math.isqrt(masked.numel())
    if masked.dtype != torch.bool or masked.ndim not in (1, 2) or (masked.ndim == 1 and side**2 != len(masked)):
        raise ValueError(f"masked {tuple(masked.shape)} {masked.dtype}: expected bool (N,) with square N, or (h, w)")
    tokens = masked.view(side, side) if masked.ndim == 1 else masked
    cover = Image.fromarray((tokens.cpu().byte() * 255).numpy()).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, _MASKED), picture, cover)


def token_map(step: "Step", row: int = 0, side: int = 384) -> Image.Image:
    """A Step -> its token grid, about `side` pixels wide: a colour a code, gray where masked, the new ones framed."""
    cells = math.isqrt(step.tokens.shape[1])
    tokens, size = step.tokens[row].view(cells, cells).cpu(), max(1, side // cells)
    masked, revealed = (x[row].view(cells, cells).cpu() for x in (step.masked, step.revealed))
    hue = (tokens * 0.618034 % 1 * 255).byte()  # the golden ratio: neighbouring codes get colours far apart
    value = 130 + (tokens % 5 * 25).byte()
    bands = [Image.fromarray(band.numpy()) for band in (hue, torch.full_like(hue, 130), value)]
    sheet = mask_overlay(Image.merge("HSV", bands), masked).resize((cells * size,) * 2, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(sheet)
    for y, x in revealed.nonzero().tolist():
        draw.rectangle((x * size, y * size, (x + 1) * size - 1, (y + 1) * size - 1), outline=_INK, width=1 + size // 16)
    return sheet


def film(muse: "Muse", steps: Sequence["Step"], row: int = 0, most: int = 12) -> Image.Image:
    """The Steps of a Muse's decode -> a film strip of at most `most` of them, evenly spread, ends kept.

    Base and super-resolution stand side by side, 128 pixels wide or as wide as the finished picture; `row` picks the
    picture of the batch.
    """
    if not steps:
        raise ValueError("no step came: collect them from muse.steps(...), or with callback=list.append")
    count = min(most, len(steps))
    picks = [round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)]
    picks = [steps[i] for i in picks]
    side = max(128, muse.config.high_tokenizer.image_size)
    frames = [
        mask_overlay(muse.picture(s)[row], s.masked[row]).resize((side, side), Image.Resampling.NEAREST) for s in picks
    ]
    titles = [f"{s.stage} {s.index + 1}: {int(s.masked[row].sum())} left" for s in picks]
    return film_strip(frames, titles, scale=1)


class Animation(bytes):
    """A GIF: frames of one size, `ms` milliseconds each, the last for a second and a half; then again.

    In a notebook it plays, about 240 pixels wide. >>> Path("film.gif").write_bytes(Animation(frames))
    """

    def __new__(cls, frames: Sequence[Image.Image], ms: int = 250) -> "Animation":
        if not frames or len({frame.size for frame in frames}) > 1:
            raise ValueError(f"frames of {sorted({f.size for f in frames})} pixels: expected at least one, of one size")
        few, file = [frame.convert("RGB").quantize(128, dither=0) for frame in frames], io.BytesIO()
        few[0].save(file, "GIF", save_all=True, append_images=few[1:], loop=0, duration=[ms] * (len(few) - 1) + [1500])
        made = super().__new__(cls, file.getvalue())
        made.width = frames[0].width * max(1, round(240 / frames[0].width))
        return made

    def __repr__(self) -> str:
        return f"<Animation, a GIF of {len(self):,} bytes>"

    def _repr_html_(self) -> str:
        source = f"data:image/gif;base64,{base64.b64encode(self).decode()}"
        return f'<img alt="animation" width="{self.width}" style="image-rendering: pixelated" src="{source}">'


def style() -> None:
    """How figures of matplotlib look from now on: small enough for a notebook, legible, also to the colour-blind."""
    import matplotlib

    warnings.filterwarnings("ignore", "Creating legend with loc")  # on a busy machine; it would stand in the notebook
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito's
    matplotlib.rcParams |= {
        "axes.prop_cycle": matplotlib.cycler(color=colors),
        "figure.dpi": 80, "savefig.dpi": 80, "figure.figsize": (8, 3.2), "figure.constrained_layout.use": True,
        "font.size": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
        "legend.frameon": False, "lines.linewidth": 2, "image.cmap": "viridis", "image.interpolation": "nearest",
    }  # fmt: skip


def pareto_front(points: Sequence[tuple[float, float]], lower: tuple[bool, bool] = (True, False)) -> list[int]:
    """(x, y) each -> the indices of those that no other beats, by rising x; `lower` says where less is better.

    One beats another if it is at least as good in both and better in one.
    """
    signs = [1 if less else -1 for less in lower]
    costs = [(signs[0] * x, signs[1] * y) for x, y in points]
    best = [a for a in costs if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in costs)]
    return sorted((i for i, cost in enumerate(costs) if cost in best), key=lambda i: points[i])


def tradeoff(
    series: Mapping[str, Mapping[str, tuple["Estimate", "Estimate"]]],
    x: str,
    y: str,
    lower: tuple[bool, bool] = (True, False),
    *,
    log_x: bool = False,
) -> Image.Image:
    """{series: {label: (x, y)}}, each measured with its interval -> a plot of 900 x 600 pixels, as Muse's figure 8.

    `x` and `y` name the axes, `lower` says where less is better. The Pareto front of all points is a gray staircase.
    Points with numbers in their labels are joined in their order; names have none.
    """
    if not any(series.values()):
        raise ValueError("no point came: expected {series: {label: (x, y)}} with at least one")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    points = [tuple(m.value for m in pair) for pairs in series.values() for pair in pairs.values()]
    front = [points[i] for i in pareto_front(points, lower)]
    axes.plot(*zip(*front, strict=True), drawstyle=_steps(lower), color="0.6", lw=4, alpha=0.5, label="Pareto front")
    for i, (name, pairs) in enumerate(series.items()):
        columns = list(zip(*pairs.values(), strict=True)) or [(), ()]
        at = [[m.value for m in column] for column in columns]
        reach = [[[m.value - m.low for m in column], [m.high - m.value for m in column]] for column in columns]
        joined = "-" if all(any(c.isdigit() for c in label) for label in pairs) else "none"
        look = {"marker": "osD^vPX*"[i % 8], "color": f"C{i % 10}", "lw": 0.8, "ms": 5, "ls": joined}
        axes.errorbar(*at, xerr=reach[0], yerr=reach[1], label=name, **look)
        where = [{"xytext": (5, 4)}, {"xytext": (-5, -10), "ha": "right"}][i % 2]  # of two series, on either side
        for label, px, py in zip(pairs, *at, strict=True):
            axes.annotate(label, (px, py), textcoords="offset points", fontsize=8, color=look["color"], **where)
    for less, set_label, text in zip(lower, (axes.set_xlabel, axes.set_ylabel), (x, y), strict=True):
        set_label(f"{text} ({'lower' if less else 'higher'} is better)")
    axes.set_xscale("log" if log_x else "linear")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return _drawn(figure)


def curves(log: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The lines of a run's log.jsonl -> a plot a stage beside each other: its loss, smoothed, and held-out figures.

    Tokenizers show PSNR in dB, transformers nats a masked token, and held out the likelihood bound.
    """
    stages = list(dict.fromkeys(line["stage"] for line in log))
    if not stages:
        raise ValueError("the log holds no line of a stage yet; a run writes one every ten steps")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(stages), 2.6), dpi=100, layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        lines = [line for line in log if line["stage"] == stage]
        shown = "psnr" if "psnr" in lines[-1] else "loss"
        held_out = "held_out_psnr" if shown == "psnr" else "held_out_bound"
        for name, look in ((shown, {"lw": 1, "label": "training"}), (held_out, {"marker": "o", "ms": 3})):
            points = [(line["step"], line[name]) for line in lines if name in line]
            few = max(1, len(points) // 50) if name == shown else 1  # smoothed over so many lines
            values = [mean(value for _, value in points[max(0, i - few + 1) : i + 1]) for i in range(len(points))]
            axes.plot([step for step, _ in points], values, **({"label": "held out"} | look))
        axes.set(title=stage.replace("_", " "), xlabel="step", ylabel={"psnr": "PSNR (dB)"}.get(shown, "nats a token"))
        axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return _drawn(figure)


def _drawn(figure: Any) -> Image.Image:
    """A matplotlib figure -> its picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _steps(lower: tuple[bool, bool]) -> str:
    """The staircase turns on the worse side of the front: what lies behind it is beaten by one of its points."""
    return "steps-post" if lower[0] else "steps-pre"


class SourceCode(str):
    """Python source. Jupyter shows it with syntax colours, `print` as plain text."""

    def _repr_markdown_(self) -> str:
        return f"```python\n{self}\n```"

    __repr__ = str.__str__


def show(*things: Any) -> SourceCode:
    """Functions, classes or methods of the package -> their source code, each below the name of its file."""
    parts = []
    for thing in things:
        path = Path(inspect.getsourcefile(inspect.unwrap(thing)))
        parts.append(f"# {path.parent.name}/{path.name}\n{textwrap.dedent(inspect.getsource(thing)).rstrip()}")
    return SourceCode("\n\n\n".join(parts))
