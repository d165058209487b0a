"""Contact sheets of pictures: grids with captions, film strips of a decode, masks drawn over a picture.

All draw with PIL alone, which is fast, and return a PIL image. `B` pictures, `h w` token grid, `N` = h w tokens.

Not here: curves; saving, which is the image's own `.save(path)`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minimuse.data import to_pil

if TYPE_CHECKING:
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


def film(muse: "Muse", steps: Sequence["Step"], row: int = 0, most: int = 12) -> Image.Image:
    """The Steps of a Muse's decode -> a film strip of at most `most` of them, evenly spread, ends kept.

    Base and super-resolution stand side by side at one size; `row` picks the picture of the batch.
    """
    if not steps:
        raise ValueError("no step came: collect them from muse.steps(...), or with watch=list.append")
    count = min(most, len(steps))
    picks = [round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)]
    picks = [steps[i] for i in picks]
    side = 2 * muse.cfg.high_tokenizer.image_size
    frames = [
        mask_overlay(muse.picture(s)[row], s.masked[row]).resize((side, side), Image.Resampling.NEAREST) for s in picks
    ]
    titles = [f"{s.stage} {s.index + 1}: {int(s.masked[row].sum())} left" for s in picks]
    return film_strip(frames, titles, scale=1)
