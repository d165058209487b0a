"""A captioned folder to train on from what most machines have: python benchmarks/emoji_folder.py --out emoji

Every emoji of one code point in a colour font becomes a picture, and its Unicode name the caption: 1,390 of them in
Noto Color Emoji 2.042. The names are Unicode's own, so that "black" and "white" at times mean filled and outlined. What
comes out is a folder such as `minimuse.data_sources.FolderDataset` reads.
"""

import argparse
import json
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu, Colab
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # Fedora
    "~/.local/share/fonts/NotoColorEmoji.ttf",
    "/System/Library/Fonts/Apple Color Emoji.ttc",
    "C:/Windows/Fonts/seguiemj.ttf",
)
STRIKES = (109, 160, 136, 128, 96, 64)  # bitmaps come in one size or a few: 109 is Noto's, 160 Apple's
HELP = (
    "Linux: apt-get install fonts-noto-color-emoji, or your distribution's package of Noto Color Emoji; macOS and "
    "Windows have one (Apple Color Emoji, Segoe UI Emoji). Or name a font: --font NotoColorEmoji.ttf"
)


def find_font(path: str | None = None) -> ImageFont.FreeTypeFont:
    """A path, or the first of the usual places -> the font, at a size in which it has pictures."""
    places = [Path(place).expanduser() for place in ([path] if path else FONTS)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"there is no colour emoji font at {', '.join(map(str, places))}. {HELP}")
    for strike in STRIKES:
        try:
            return ImageFont.truetype(str(found), strike)
        except OSError:
            continue  # not one of its sizes
    raise ValueError(f"{found} opens at none of the sizes {', '.join(map(str, STRIKES))}. {HELP}")


def draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """A character -> its picture (RGBA), cut to what is drawn; None where the font draws nothing."""
    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top:
        return None
    image = Image.new("RGBA", (right, bottom), (255, 255, 255, 0))
    ImageDraw.Draw(image).text((0, 0), character, font=font, embedded_color=True)
    box = image.getchannel("A").getbbox()
    return image.crop(box) if box else None


def emoji(font: ImageFont.FreeTypeFont) -> dict[str, Image.Image]:
    """Every named symbol that the font draws -> its picture; what looks like a missing glyph is left out."""
    missing = draw("\U000f0000", font)
    pictures = {}
    for code in (*range(0xA9, 0x3300), *range(0x1F000, 0x1FC00)):
        character = chr(code)
        if unicodedata.category(character) not in ("So", "Sk", "Sm", "Po") or not unicodedata.name(character, ""):
            continue
        image = draw(character, font)
        if image and not (missing and image.tobytes() == missing.tobytes()):
            pictures[character] = image
    return pictures


def write(out: Path, size: int, font: ImageFont.FreeTypeFont) -> int:
    """Pictures of size x size on white, and metadata.jsonl, into a new or empty folder -> how many."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a new folder, since we overwrite nothing")
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for character, image in emoji(font).items():
        name, inner = f"{ord(character):05x}.png", size - 2 * (size // 16)
        image = ImageOps.pad(image, (inner, inner), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (size, size), "white")
        canvas.alpha_composite(image, (size // 16, size // 16))
        canvas.convert("RGB").save(out / name)
        lines.append(json.dumps({"file_name": name, "text": unicodedata.name(character).lower()}) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    parser.add_argument("--font", help="a colour emoji font; by default, the one that comes with most systems")
    args = parser.parse_args(arguments)
    try:
        n = write(args.out, args.size, find_font(args.font))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{n} pictures and metadata.jsonl in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
