"""Pictures to look at, as PIL images: grids, films, token masks, curves, trade-offs.

B pictures, h w token grid, N = h w. Not here: saving, which is the image's own `.save(path)`.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minimuse.sampler import Step
from minimuse.utils import require, to_pil

Images = Sequence[Image.Image] | Tensor  # PIL images, or a tensor (B, 3, H, W), uint8 or in [-1, 1]
INK = (45, 45, 50)
MASKED = (150, 150, 155)
GAP = 8  # pixels between pictures
LINE = 17  # pixels from one line of text to the next


def grid(
    images: Images, captions: Sequence[str] | None = None, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Pictures and captions -> one image, row by row; by default about square, each picture about 160 pixels wide."""
    images = to_pil(images) if isinstance(images, Tensor) else list(images)
    require(images, "no picture came: expected at least one")
    scale = scale or max(1, round(160 / images[0].width))
    cells = [i.convert("RGB").resize((i.width * scale, i.height * scale), Image.Resampling.NEAREST) for i in images]
    captions = [""] * len(cells) if captions is None else captions
    require(len(captions) == len(cells), f"{len(captions)} captions for {len(cells)} pictures: give one each, or None")
    columns = min(columns or math.ceil(math.sqrt(len(cells))), len(cells))
    width, height = (max(sizes) for sizes in zip(*(cell.size for cell in cells), strict=True))
    font = ImageFont.load_default(size=13)
    texts = [_wrapped(text.split(), width + GAP // 2, font) for text in captions]
    pitch = height + LINE * max(map(len, texts)) + GAP  # from one row to the next
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + math.ceil(len(cells) / columns) * pitch), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * pitch
        sheet.paste(cell, (x, y))
        draw.multiline_text((x, y + height + 2), "\n".join(text), fill=INK, font=font)
    return sheet


def _wrapped(words: list[str], width: int, font: Any) -> list[str]:
    """The words of a caption -> lines of at most `width` pixels, if the words allow."""
    lines = words[:1]
    for word in words[1:]:
        longer = f"{lines[-1]} {word}"
        lines[-1:] = [longer] if font.getlength(longer) <= width else [lines[-1], word]
    return lines


def mask_overlay(image: Image.Image | Tensor, masked: Tensor) -> Image.Image:
    """A picture (3, H, W) or PIL, masked (N,) or (h, w) bool -> the picture with masked tokens as gray squares."""
    picture = to_pil(image[None])[0] if isinstance(image, Tensor) else image.convert("RGB")
    tokens = torch.as_tensor(masked).cpu()
    tokens = tokens.reshape(math.isqrt(tokens.numel()), -1)
    cover = Image.fromarray(tokens.numpy()).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, MASKED), picture, cover)


def token_map(step: Step, row: int = 0, side: int = 384) -> Image.Image:
    """A Step -> its token grid, about `side` pixels wide: a colour for each code, masked gray, new tokens framed."""
    cells = math.isqrt(step.tokens.shape[1])
    size = max(1, side // cells)
    tokens, masked, revealed = (x[row].view(cells, cells).cpu() for x in (step.tokens, step.masked, step.revealed))
    hue = (tokens * 0.618034 % 1 * 255).byte()  # the golden ratio: neighbouring codes get colours far apart
    bands = (hue, torch.full_like(hue, 130), 130 + (tokens % 5 * 25).byte())
    sheet = mask_overlay(Image.merge("HSV", [Image.fromarray(band.numpy()) for band in bands]), masked)
    sheet = sheet.resize((cells * size,) * 2, Image.Resampling.NEAREST)
    for y, x in revealed.nonzero().tolist():
        box = (x * size, y * size, (x + 1) * size - 1, (y + 1) * size - 1)
        ImageDraw.Draw(sheet).rectangle(box, outline=INK, width=1 + size // 16)
    return sheet


def film(muse: Any, steps: Sequence[Step], row: int = 0, most: int = 12) -> Image.Image:
    """The Steps of a decode -> a strip of up to `most`, evenly spread, for one `row` of the batch, 128 px or more."""
    require(steps, "no step came: collect them from muse.steps(...), or with callback=list.append")
    side = max(128, muse.config.high_tokenizer.image_size)
    shown = np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)
    for last in [i for i, step in enumerate(steps[1:]) if step.stage != steps[i].stage]:
        shown[np.abs(shown - last).argmin()] = last
    steps = [steps[i] for i in shown]
    frames = [mask_overlay(muse.picture(step)[row], step.masked[row]) for step in steps]
    frames = [frame.resize((side, side), Image.Resampling.NEAREST) for frame in frames]
    titles = [f"{step.stage} {step.index + 1}: {int(step.masked[row].sum())} left" for step in steps]
    return grid(frames, titles, len(frames), scale=1)


def pareto_front(points: Sequence[tuple[float, float]], lower: tuple[bool, bool] = (True, False)) -> list[int]:
    """Points -> indices by x of those that none beats (as good in both, better in one). `lower`: is less better?"""
    costs = [tuple(value if less else -value for value, less in zip(point, lower, strict=True)) for point in points]
    best = [a for a in costs if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in costs)]
    return sorted((i for i, cost in enumerate(costs) if cost in best), key=lambda i: points[i])


def tradeoff(
    series: Mapping[str, Mapping[str, tuple[Any, Any]]], x: str, y: str, lower: tuple[bool, bool] = (True, False), *,
    log_x: bool = False,
) -> Image.Image:  # fmt: skip
    """{series: {label: (x, y)}} of `Estimate`s -> a plot like Muse's figure 8, with the `pareto_front` in gray."""
    points = [(a.value, b.value) for pairs in series.values() for a, b in pairs.values()]
    require(points, "no point came: expected {series: {label: (x, y)}} with at least one")
    from matplotlib.figure import Figure

    figure = Figure((6, 4), 150, layout="constrained")
    axes = figure.subplots()
    front = [points[i] for i in pareto_front(points, lower)]
    turn = "steps-post" if lower[0] else "steps-pre"  # the points behind the staircase are beaten by one on it
    axes.plot(*zip(*front, strict=True), drawstyle=turn, color="0.6", lw=4, alpha=0.5, label="Pareto front")
    for i, (name, pairs) in enumerate(series.items()):
        pen = {"color": f"C{i % 10}", "marker": "osD^vPX*"[i % 8], "lw": 0.8, "ms": 5}
        axes.plot([a.value for a, _ in pairs.values()], [b.value for _, b in pairs.values()], label=name, **pen)
        for label, (a, b) in pairs.items():
            axes.hlines(b.value, a.low, a.high, pen["color"], lw=0.8)
            axes.vlines(a.value, b.low, b.high, pen["color"], lw=0.8)
            axes.annotate(label, (a.value, b.value), (5, 4), textcoords="offset points", fontsize=8, color=pen["color"])
    labels = [f"{text} ({'lower' if less else 'higher'} is better)" for less, text in zip(lower, (x, y), strict=True)]
    axes.set(xlabel=labels[0], ylabel=labels[1], xscale="log" if log_x else "linear")
    return _drawn(figure)


def curves(log: Sequence[Mapping[str, Any]]) -> Image.Image:
    """The lines of a run's log.jsonl -> a plot for each stage: PSNR, or the loss and the held-out likelihood bound."""
    stages = dict.fromkeys(line["stage"] for line in log)
    require(stages, "the log holds no line of a stage yet; a run writes one every ten steps")
    from matplotlib.figure import Figure

    figure = Figure((3 * len(stages), 2.6), 100, layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        lines = [line for line in log if line["stage"] == stage]
        is_tokenizer = "psnr" in lines[-1]
        names = ("psnr", "held_out_psnr") if is_tokenizer else ("loss", "held_out_bound")
        for name, style, label in zip(names, "-o", ("training", "held out"), strict=True):
            values = [line.get(name, math.nan) for line in lines]
            axes.plot([line["step"] for line in lines], values, style, lw=1, ms=3, label=label)
        axes.set(title=stage.replace("_", " "), xlabel="step", ylabel="PSNR (dB)" if is_tokenizer else "nats per token")
    return _drawn(figure)


def _drawn(figure: Any) -> Image.Image:
    """A matplotlib figure, with grids and one legend -> its picture."""
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, dpi=figure.dpi)  # else matplotlib's settings decide
    return Image.open(file).convert("RGB")
