"""Emoji of several designs as a captioned folder to train on: python benchmarks/emoji_folder.py --out emoji DESIGN ...

A design is a folder of an unpacked `@iconify-json` package, which holds SVG pictures and their license:

    npm pack @iconify-json/noto @iconify-json/twemoji @iconify-json/fluent-emoji-flat emojibase-data
    for f in *.tgz; do mkdir "${f%.tgz}" && tar xzf "$f" -C "${f%.tgz}" --strip-components 1; done
    pip install resvg-py
    python benchmarks/emoji_folder.py --out emoji --names emojibase-data-* iconify-json-*

The names and keywords are those of Unicode CLDR, from `emojibase-data`. A picture has up to six captions: its name,
with and without the name of the design, and keywords. People, symbols, flags, and combinations such as "polar bear"
are left out. What comes out is a folder such as `minimuse.data_sources.FolderDataset` reads, and LICENSES.md.
"""

import argparse
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path

from PIL import Image, ImageOps

GROUPS = (0, 3, 4, 5, 6, 7)  # of emojibase: smileys, animals, food, travel, activities, objects
JOINER = "200D"  # in the code points of a combination


def named(folder: Path) -> list[dict]:
    """The unpacked `emojibase-data` -> an entry with label, tags and hexcode for each emoji to draw."""
    entries = json.loads((folder / "en/data.json").read_text(encoding="utf-8"))
    return [entry for entry in entries if entry.get("group") in GROUPS and JOINER not in entry["hexcode"]]


def design(folder: Path) -> tuple[dict, dict[str, str], dict[str, str]]:
    """An unpacked package -> its info, an SVG for each of its names, and its name for each code point, if any."""
    info, icons, characters = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("info.json", "icons.json", "chars.json")
    )
    pictures = {}
    for name, icon in icons["icons"].items():
        width, height = (icon.get(side) or icons.get(side) or 16 for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        pictures[name] = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
    parents = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items()}
    pictures |= {name: pictures[parent] for name, parent in parents.items() if parent in pictures}
    return info, pictures, {code(character): name for character, name in characters.items()}


def code(hexcode: str) -> str:
    """Code points without the variation selector, which designs give or omit."""
    return hexcode.lower().replace("-fe0f", "")


def icon_name(label: str) -> str:
    """The name of an emoji as old packages, which have no code points, name its picture: "dog-face"."""
    return re.sub("[^a-z0-9]+", "-", re.sub("[\u2019']", "", label.lower())).strip("-")


def draw(svg: str, size: int) -> Image.Image | None:
    """SVG -> a picture of size x size on white, cut to what is drawn, with a margin; None if nothing is drawn."""
    import resvg_py

    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size)))).convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        return None
    inner = size - 2 * (size // 32)
    image = ImageOps.pad(image.crop(box), (inner, inner), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(image, (size // 32, size // 32))
    return canvas.convert("RGB")


def captions(entry: dict, style: str, rare: Counter) -> list[str]:
    """The name, also with the name of the design, and keywords. A keyword of few emoji is a caption of its own."""
    name = re.sub(r"[“”:]", "", entry["label"]).lower()
    keywords = [tag for tag in entry.get("tags", []) if tag not in name]
    own = [tag for tag in keywords if rare[tag] <= 3]
    texts = [name, f"{name}, {style}", ", ".join([name, *keywords[:3]]), ", ".join([*keywords[:4], style])]
    return list(dict.fromkeys([*texts[: 2 + 2 * bool(keywords)], *own[:2]]))


def write(out: Path, size: int, entries: list[dict], folders: list[Path]) -> int:
    """Pictures of size x size, metadata.jsonl and LICENSES.md, into a new or empty folder -> how many pictures."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; give a new folder, since we overwrite nothing")
    out.mkdir(parents=True, exist_ok=True)
    rare = Counter(tag for entry in entries for tag in entry.get("tags", []))
    lines, licenses = [], []
    for folder in folders:
        info, pictures, names = design(folder)
        terms, author = info["license"], info["author"]
        licenses.append(f"- {info['name']}, {author['name']} ({author['url']}): {terms['title']} ({terms['url']})\n")
        style = info["prefix"].split("-")[0]
        for entry in entries:
            key = names.get(code(entry["hexcode"]), "") if names else icon_name(entry["label"])
            svg = pictures.get(key)
            if image := svg and draw(svg, size):
                name = f"{code(entry['hexcode'])}-{info['prefix']}.png"
                image.save(out / name)
                values = {"file_name": name, "text": captions(entry, style, rare)}
                lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    (out / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "LICENSES.md").write_text("".join(licenses), encoding="utf-8")
    return len(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("designs", type=Path, nargs="+", help="unpacked @iconify-json packages")
    parser.add_argument("--names", type=Path, required=True, help="the unpacked package emojibase-data")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--size", type=int, default=128, help="pixels a side")
    args = parser.parse_args(arguments)
    try:
        n = write(args.out, args.size, named(args.names), args.designs)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{n} pictures, metadata.jsonl and LICENSES.md in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
