"""What a Muse trained on emoji draws right, and what it copies:

    python benchmarks/emoji_folder.py --out emoji --names NAMES DESIGN ...       # what it was trained on
    python benchmarks/emoji_folder.py --out others --names NAMES OTHER ...       # designs that it never saw
    python benchmarks/emoji.py --model runs/emoji --data emoji --others others --out measured [--base-only]

Reconstruction: PSNR of the tokenizers on held-out pictures, on some training pictures, and on some of other designs.

Names: one picture of each of 200 names, chosen at random from the emoji that all designs have; seeds 0 to 199. A reader
that saw only other designs ranks the 200 names. It compares oriented gradients and mean colors, whitened by their
covariance within an emoji, with the nearest picture of each emoji. Its limits: the same for real pictures of these
names in the designs that the model learned, before and after the tokenizer, and for names in a wrong order.

Words: 30 words that are not names, two pictures of each. The reader ranks all emoji.

Copies: the distance of each picture of a name from the nearest training picture, in pixels (root mean square, 0 to 255)
and in features of the reader (Euclidean, of length 1). References are held-out pictures after the tokenizer, which are
no copies, and training pictures after the tokenizer, which are. Of an emoji, other designs may be among the training
pictures; this holds for held-out pictures and for samples.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from minimuse import Muse
from minimuse.data_cache import HELD_OUT
from minimuse.data_sources import FolderDataset, Problems
from minimuse.eval_metrics import Estimate, in_batches, mean_interval, proportion_interval, psnr
from minimuse.eval_run import EvalModel
from minimuse.plots import grid
from minimuse.utils import area_downsample, to_float, to_pil, to_uint8

COLUMNS, ROWS = 10, 4  # of the pages of samples
WORDS = {  # the names that are right, as regular expressions
    "puppy": "dog( face)?",
    "kitten": "cat( face)?",
    "bunny": "rabbit( face)?",
    "pony": "horse( face)?",
    "hen": "chicken|rooster",
    "piglet": "pig( face)?",
    "serpent": "snake",
    "insect": "bug|ant|honeybee|(lady )?beetle|cricket|cockroach|mosquito|fly|butterfly",
    "happy": "(grinning|beaming) .*face.*|(slightly )?smiling face( with smiling eyes)?",
    "sad": "(loudly )?crying (face|cat)|(slightly )?frowning face.*|(disappointed|pensive|sad but relieved) face",
    "love": "(red|pink|sparkling|growing|beating|two) hearts?|heart with .*|smiling face with heart.*|love letter",
    "car": "(oncoming )?(automobile|taxi|police car)|sport utility vehicle|racing car",
    "plane": "(small )?airplane.*",
    "bike": "bicycle",
    "boat": "sailboat|canoe|speedboat|passenger ship|ferry|motor boat|ship",
    "fruit": "grapes|(water)?melon|tangerine|lemon|banana|pineapple|mango|.* apple|pear|peach|cherries|.*berr.*|kiwi.*",
    "vegetable": "eggplant|potato|carrot|ear of corn|bell pepper|cucumber|leafy green|broccoli|tomato|onion|pea pod",
    "flower": "(cherry )?blossom|.* flower|lotus|rose|hibiscus|sunflower|tulip|hyacinth|bouquet",
    "sweets": "candy|lollipop|chocolate bar|doughnut|cookie|cupcake|shortcake|birthday cake|pie|custard",
    "wine": "wine glass|bottle with popping cork",
    "storm": "cloud with lightning.*|tornado|cyclone",
    "sunshine": "sun|sun with face|sunrise|sun behind small cloud",
    "moon": ".* moon( face)?",
    "phone": "mobile phone.*|telephone.*",
    "computer": "laptop|desktop computer",
    "present": "wrapped gift",
    "sofa": "couch and lamp",
    "jewelry": "ring|gem stone|crown|prayer beads",
    "money": "money (bag|with wings)|.*banknote|coin",
    "shoes": ".* (shoes?|boot|sandal)",
}


class Emoji(NamedTuple):
    """Pictures of a folder of `emoji_folder.py`, in the order in which training reads them."""

    images: Tensor  # (n, 3, S, S) uint8
    codes: list[str]  # code points, which say which emoji it is
    designs: list[str]
    texts: list[tuple[str, ...]]  # captions; the first one is the name

    def where(self, chosen: Sequence[bool] | Tensor) -> "Emoji":
        rows = torch.as_tensor(chosen).nonzero().flatten().tolist()
        return Emoji(self.images[rows], *([column[i] for i in rows] for column in self[1:]))


def read(folder: Path, side: int) -> Emoji:
    source = FolderDataset(folder)
    rows = [row for part in range(source.parts) for row in source.read(part, side, Problems())]
    names = [re.fullmatch(r"([0-9a-f-]+?)-([a-z].*)\.png", row.name).groups() for row in rows]
    images = torch.stack([row.image for row in rows])
    return Emoji(images, [code for code, _ in names], [name for _, name in names], [row.captions for row in rows])


def describe(images: Tensor) -> Tensor:
    """uint8 images (n, 3, S, S) -> (n, D): HOG (Dalal & Triggs 2005) in 7 x 7 overlapping cells, and 8 x 8 colors."""
    x, cell, bins = images.float() / 255, images.shape[-1] // 4, 9
    across = F.pad(x, (1, 1, 0, 0), mode="replicate")
    down = F.pad(x, (0, 0, 1, 1), mode="replicate")
    dx, dy = across[..., 2:] - across[..., :-2], down[:, :, 2:] - down[:, :, :-2]
    strength, channel = torch.hypot(dx, dy).max(1, keepdim=True)  # of the channel with the strongest edge
    angle = torch.atan2(dy.gather(1, channel), dx.gather(1, channel)) % torch.pi / torch.pi * bins
    histogram = torch.zeros(len(x), bins, *x.shape[2:])
    histogram.scatter_add_(1, angle.long() % bins, strength * (1 - angle.frac()))
    histogram.scatter_add_(1, (angle.long() + 1) % bins, strength * angle.frac())
    cells = F.avg_pool2d(histogram, cell, cell // 2)
    around = F.avg_pool2d(cells.square().sum(1, keepdim=True), 3, 1, 1).sqrt()
    return torch.cat([(cells / (around + 0.02)).flatten(1), F.avg_pool2d(x, cell // 2).flatten(1)], 1)


class Reader:
    """Images -> features, and the emoji of known pictures in the order of their distance."""

    def __init__(self, known: Emoji):
        x = describe(known.images)
        self.codes = sorted(set(known.codes))
        self.rows = torch.tensor([self.codes.index(code) for code in known.codes])
        counts = self.rows.bincount()[:, None]
        within = x - (torch.zeros(len(counts), x.shape[1]).index_add_(0, self.rows, x) / counts)[self.rows]
        covariance = within.T @ within / len(x)  # how pictures of one emoji differ
        shrunk = covariance + covariance.diagonal().mean() * torch.eye(len(covariance))
        self.mean, self.root = x.mean(0), torch.linalg.cholesky(shrunk)
        self.known = self(known.images)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (n, 3, S, S) -> (n, D) of length 1."""
        x = in_batches(describe, images, batch=256) - self.mean
        return F.normalize(torch.linalg.solve_triangular(self.root, x.T, upper=False).T, dim=1)

    def rank(self, images: Tensor, codes: Sequence[str] = ()) -> list[list[str]]:
        """Images -> for each, these emoji (all, if none are given), the nearest first."""
        far = torch.cdist(self(images), self.known)
        nearest = torch.full((len(images), len(self.codes)), torch.inf)
        nearest.scatter_reduce_(1, self.rows.expand_as(far), far, "amin")
        chosen = [self.codes.index(code) for code in codes or self.codes]
        return [[self.codes[chosen[i]] for i in row] for row in nearest[:, chosen].argsort(1)]


def hits(ranked: Sequence[Sequence[str]], right: Sequence[set[str]], groups: Any = None) -> dict[str, Estimate]:
    """Emoji, the nearest first, and the right ones -> how often a right one is the first, or among the first 5."""
    found = {k: [bool(answer & {*row[:k]}) for row, answer in zip(ranked, right, strict=True)] for k in (1, 5)}
    return {f"top {k}": proportion_interval(values, groups) for k, values in found.items()}


def pixels(images: Tensor) -> Tensor:
    """uint8 images -> rows whose distance is the root mean square difference."""
    return images.flatten(1).float() / images[0].numel() ** 0.5


def nearer(samples: Tensor, others: Tensor, q: float, draws: int = 2000) -> Estimate:
    """Distances (n,), (m,) -> the fraction of the first up to the q-quantile of the second; a bootstrap of both."""
    generator = torch.Generator().manual_seed(0)
    again = [x[torch.randint(len(x), (draws, len(x)), generator=generator)] for x in (samples, others)]
    below = [(a <= b.quantile(q, 1, keepdim=True)).float().mean(1) for a, b in (again, (samples[None], others[None]))]
    return Estimate(below[1].item(), *below[0].quantile(torch.tensor([0.025, 0.975])).tolist(), len(samples), ".1%")


def copies(samples: Tensor, held_out: Tensor, copied: Tensor, train: Tensor) -> dict[str, Estimate]:
    """Pixels or features (n, D) -> how near they are to the nearest training picture, and how many are too near."""
    kinds = {"samples": samples, "held-out pictures": held_out, "copies": copied}
    far = {kind: torch.cdist(x, train).amin(1) for kind, x in kinds.items()}
    found = {f"mean distance of {kind}": mean_interval(x) for kind, x in far.items()}
    found["samples nearer than 90% of the held-out pictures"] = nearer(far["samples"], far["held-out pictures"], 0.1)
    for kind in ("samples", "held-out pictures"):
        found[f"{kind} as near as 90% of the copies"] = nearer(far[kind], far["copies"], 0.9)
    return found


def page(samples: Tensor, titles: Sequence[str], wrong: Sequence[bool], train: Emoji) -> Image.Image:
    """Samples in rows, and below each the nearest training picture with its distance. Wrong ones have a red frame."""
    far, at = torch.cdist(pixels(samples), pixels(train.images)).min(1)
    below = [f"{train.texts[i][0]}, {train.designs[i]}: {x:.0f}" for i, x in zip(at, far, strict=True)]
    pictures = [ImageOps.expand(x, 2, "red" if bad else "white") for x, bad in zip(to_pil(samples), wrong, strict=True)]
    copied = [ImageOps.expand(x, 2, "white") for x in to_pil(train.images[at])]
    columns = min(COLUMNS, len(titles))
    rows = [slice(i, i + columns) for i in range(0, len(titles) // columns * columns, columns)][:ROWS]
    cells, texts = ([x for row in rows for x in (*a[row], *b[row])] for a, b in ((pictures, copied), (titles, below)))
    return grid(cells, texts, columns)


class Measurement:
    """A Muse, its data and other designs -> `report`, estimates by name, and `pages`, pictures by name."""

    def __init__(self, muse: Muse, data: Emoji, others: Emoji, *, base_only: bool = False, names: int = 200):
        self.muse, self.base_only, self.report, self.pages = muse, base_only, {}, {}
        self.model = EvalModel(muse, base_only=base_only)
        held = torch.arange(len(data.codes)) % HELD_OUT == HELD_OUT - 1  # as in training
        kinds = {"held-out": data.images[held], "training": some(data.images[~held]), "other": some(others.images)}
        for name in ["low_tokenizer"] + ["high_tokenizer"] * (not base_only):
            for kind, images in kinds.items():
                x = self.at(name, images)
                found = {f"PSNR of {kind} pictures": mean_interval(psnr(x, self.tokenized(x, name)))}
                self.add(name, {key: value._replace(format=".2f") for key, value in found.items()})
        self.drawn = "low_tokenizer" if base_only else "high_tokenizer"
        data, others = (emoji._replace(images=self.at(self.drawn, emoji.images)) for emoji in (data, others))
        self.train, self.held_out, self.reader = data.where(~held), data.where(held), Reader(others)
        self.text = {code: texts[0] for code, texts in zip(data.codes, data.texts, strict=True)}
        complete = [{code for code, k in Counter(e.codes).items() if k == len({*e.designs})} for e in (data, others)]
        codes = sorted(set.intersection(*complete))
        order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[:names]
        self.names(data, [codes[i] for i in order])
        self.words()

    def at(self, name: str, images: Tensor) -> Tensor:
        """Images as training reads them -> at the size of a tokenizer."""
        return area_downsample(images, images.shape[-1] // getattr(self.muse.config, name).image_size)

    def tokenized(self, images: Tensor, name: str = "") -> Tensor:
        """Images after a tokenizer, by default that of the measured pictures."""
        tokenizer = self.muse.parts[name or self.drawn]
        return in_batches(lambda x: to_uint8(tokenizer.decode(tokenizer.encode(to_float(x)))), images)

    def draw(self, prompts: Sequence[str]) -> Tensor:
        """A picture of each prompt, seeds from 0."""
        return in_batches(lambda at: self.model.draw([prompts[i] for i in at], at.tolist()), torch.arange(len(prompts)))

    def names(self, data: Emoji, codes: list[str]) -> None:
        """Names and copies."""
        samples, right = self.draw([self.text[code] for code in codes]), [{code} for code in codes]
        ranked = self.reader.rank(samples, codes)
        self.add("names", hits(ranked, right))
        self.add("names in a wrong order", hits(ranked, right[1:] + right[:1]))
        for design in dict.fromkeys(data.designs):
            real = data.where([c in codes and d == design for c, d in zip(data.codes, data.designs, strict=True)])
            for how, images in {"": real.images, " after the tokenizer": self.tokenized(real.images)}.items():
                self.add(f"real {design}{how}", hits(self.reader.rank(images, codes), [{c} for c in real.codes]))
        held_out, copied = self.tokenized(self.held_out.images), self.tokenized(some(self.train.images))
        for kind, features in {"pixels": pixels, "features": self.reader}.items():
            self.add(kind, copies(*map(features, (samples, held_out, copied, self.train.images))))
        self.show("names", samples, [self.text[code] for code in codes], ranked, right)

    def words(self, n: int = 2) -> None:
        """n pictures of each word."""
        names = {word: {c for c, name in self.text.items() if re.fullmatch(WORDS[word], name)} for word in WORDS}
        prompts = [word for word in names for _ in range(n)]
        samples, right = self.draw(prompts), [names[word] for word in prompts]
        ranked = self.reader.rank(samples)
        self.add("words in a wrong order", hits(ranked, right[n:] + right[:n], prompts))
        learned = {word for texts in self.train.texts for text in texts for word in re.findall(r"\w+", text)}
        for kind, known in {
            "words of captions": {True},
            "words of no caption": {False},
            "words": {True, False},
        }.items():
            at = [i for i, word in enumerate(prompts) if (word in learned) in known]
            self.add(kind, hits(*([column[i] for i in at] for column in (ranked, right, prompts))) if at else {})
        self.show("words", samples[::n], prompts[::n], ranked[::n], right[::n])

    def show(self, name: str, samples: Tensor, titles: list[str], ranked: list[list[str]], right: list[set]) -> None:
        wrong = [row[0] not in answer for row, answer in zip(ranked, right, strict=True)]
        seen = [f"{t} (read as {self.text.get(row[0], row[0])})" for t, row in zip(titles, ranked, strict=True)]
        texts = [long if bad else title for long, bad, title in zip(seen, wrong, titles, strict=True)]
        self.pages[name] = page(samples, texts, wrong, self.train)

    def add(self, kind: str, found: dict[str, Estimate]) -> None:
        self.report |= {f"{kind}, {name}": value for name, value in found.items()}


def some(images: Tensor, n: int = 200) -> Tensor:
    """At most n images, evenly spread."""
    return images[:: -(-len(images) // n)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a folder or a shipped name")
    parser.add_argument("--data", type=Path, required=True, help="the folder that it was trained on")
    parser.add_argument("--others", type=Path, required=True, help="a folder of other designs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base-only", action="store_true", help="pictures of the base model, without super-resolution")
    parser.add_argument("--names", type=int, default=200)
    args = parser.parse_args(arguments)
    muse = Muse.from_pretrained(args.model, device="cpu", dtype=torch.float32)
    data, others = (read(folder, muse.config.high_tokenizer.image_size) for folder in (args.data, args.others))
    found = Measurement(muse, data, others, base_only=args.base_only, names=args.names)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, image in found.pages.items():
        image.save(args.out / f"{name}.png")
    (args.out / "report.json").write_text(json.dumps({k: v._asdict() for k, v in found.report.items()}, indent=1))
    rows = "".join(f"| {name} | {value.short()} | {value.n} |\n" for name, value in found.report.items())
    (args.out / "report.md").write_text(f"| Measured | Value (95% interval) | Pictures |\n|---|---|---|\n{rows}")
    print(rows)


if __name__ == "__main__":
    main()
