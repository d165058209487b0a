"""Fine-tuning of `toy` on 300 pictures with a new color word: python benchmarks/finetune.py --out tuned

The pictures are scenes in which gray things are teal, each with three captions, such as "a teal cube behind a red
sphere". No picture shows cyan next to the word teal, and none is of the old data set. The settings are the defaults of
`train_muse(start="toy")`; --set changes them. One thread takes about 20 minutes.

--rehearse N adds N pictures that `toy` itself draws of captions of the old kind, so that less is forgotten. They need
no old data. --keep-old D averages the base model with that of `toy` after training, as `minimuse average --from toy
--decay D` does.

A picture of a new prompt is right if the detector finds everything that the prompt names and nothing else, as in
`minimuse eval`. The detector knows no teal, so the color of each thing is read from its pixels: the mean of the middle
of its box, and the nearest mean of nine colors in two materials, all of real renders. The script prints how often this
is right for other real renders. Old prompts are judged by the detector alone, before and after, with the same seeds.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minimuse import Muse
from minimuse.cli_commands import changed
from minimuse.data_captions import SceneDataset, caption
from minimuse.data_scenes import COLORS, Scene, render, sample_scene
from minimuse.eval_metrics import proportion_interval
from minimuse.eval_networks import Detection, Detections, Detector
from minimuse.eval_prompts import EvalPrompt, matches, parse_prompt, prompt_set
from minimuse.train import train_muse
from minimuse.train_engine import Engine
from minimuse.train_state import finetuned, keep_old
from minimuse.utils import to_pil

TEAL = (0.0, 0.5, 0.5)
OLD, NEW = "gray", "teal"  # teal things take the place of gray ones
FLOOR = "gray floor"


@contextmanager
def teal() -> Iterator[None]:
    """Inside, things that are called gray are rendered teal."""
    before = COLORS[OLD]
    COLORS[OLD] = TEAL
    try:
        yield
    finally:
        COLORS[OLD] = before


def in_teal(text: str) -> str:
    """The text with teal things in place of gray ones; the floor stays gray."""
    return re.sub(f"{OLD}(?! floor)", NEW, text)


def scenes_with(color: str, n: int, split: str = "train") -> list[Scene]:
    """The first n scenes of a split that have a thing of this color."""
    found: list[Scene] = []
    seed = 10_000_000  # beyond the scenes that the shipped models saw
    while len(found) < n:
        scene = sample_scene(seed, split=split)
        if any(thing.color == color for thing in scene.things):
            found.append(scene)
        seed += 1
    return found


def write_folder(folder: Path, n: int) -> None:
    """n captioned pictures with teal things, as a folder with metadata.jsonl."""
    folder.mkdir(parents=True)
    scenes = scenes_with(OLD, n)
    with teal():
        images = to_pil(render(scenes, 128))
    lines = []
    for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        image.save(folder / f"{i:04d}.png")
        texts = list(dict.fromkeys(in_teal(caption(scene, 10_007 * i + k)) for k in range(6)))
        texts = [text for text in texts if NEW in text][:3] or texts[:1]
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rehearse(folder: Path, muse: Muse, n: int) -> None:
    """Add n pictures that a Muse draws of old captions to a folder with metadata.jsonl."""
    options = {"fractions": muse.config.fractions, "synonyms": muse.config.synonyms}
    scenes = SceneDataset(n, 128, seed=9999, k=1, **options)
    captions = [scenes.captions(i)[0] for i in range(n)]
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
        for i, image in enumerate(muse.generate(captions, seed=list(range(n)))):
            image.save(folder / f"old{i:04d}.png")
            file.write(json.dumps({"file_name": f"old{i:04d}.png", "text": captions[i]}) + "\n")


def middle(image: Image.Image, thing: Detection) -> Tensor:
    """-> (3,) the mean color in the middle half of a thing's box, in [0, 1]."""
    left, top, right, bottom = thing.box
    x, y, w, h = (left + right) / 2, (top + bottom) / 2, (right - left) / 4, (bottom - top) / 4
    box = [round(edge * image.width) for edge in (x - w, y - h, x + w, y + h)]
    part = image.convert("RGB").crop((box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))
    return torch.from_numpy(np.array(part)).float().mean((0, 1)) / 255


class ColorReader:
    """Detections with the color of each thing read from its pixels. Teal things are called gray, gray ones other."""

    def __init__(self, detector: Detector, n: int = 60):
        self.detector, self.means = detector, {}
        for scenes, images, is_new in real(n, "train"):
            seen = defaultdict(list)
            for scene, image, found in zip(scenes, images, detector.detect(images), strict=True):
                for truth, thing in paired(scene, found):
                    seen[self.label(truth.color, is_new), truth.material].append(middle(image, thing))
            self.means |= {key: torch.stack(colors).mean(0) for key, colors in seen.items() if key not in self.means}

    @staticmethod
    def label(color: str, is_new: bool) -> str:
        return color if color != OLD else OLD if is_new else "other"

    def color(self, image: Image.Image, thing: Detection) -> str:
        at = middle(image, thing)
        return min(self.means, key=lambda key: float((self.means[key] - at).square().sum()))[0]

    def __call__(self, images: Sequence[Image.Image]) -> list[Detections]:
        return [
            found._replace(things=tuple(thing._replace(color=self.color(image, thing)) for thing in found.things))
            for image, found in zip(images, self.detector.detect(images), strict=True)
        ]


def real(n: int, split: str) -> Iterator[tuple[list[Scene], list[Image.Image], bool]]:
    """-> n real renders with each of the eight colors, and n with teal: scenes, pictures, whether gray is teal."""
    for color in COLORS:
        scenes = scenes_with(color, n, split)
        yield scenes, to_pil(render(scenes, 128)), False
    scenes = scenes_with(OLD, n, split)
    with teal():
        images = to_pil(render(scenes, 128))
    yield scenes, images, True


def paired(scene: Scene, found: Detections) -> list:
    """Things of a scene with the nearest detection, if as many were detected."""
    if len(found.things) != len(scene.things):
        return []
    return [
        (truth, min(found.things, key=lambda thing: abs(thing.x - truth.x) + abs(thing.depth - truth.depth)))
        for truth in scene.things
    ]


def validate(reader: ColorReader, n: int) -> dict[str, float]:
    """How often the color of a thing in a real render is read right: of teal things, and of all others."""
    right = defaultdict(list)
    for scenes, images, is_new in real(n, "test"):
        for scene, image, found in zip(scenes, images, reader.detector.detect(images), strict=True):
            for truth, thing in paired(scene, found):
                kind = NEW if is_new and truth.color == OLD else "other colors"
                right[kind].append(reader.color(image, thing) == reader.label(truth.color, is_new))
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def new_prompts(n: int) -> list[EvalPrompt]:
    """The first n prompts with teal things, half of one thing and half of two with a relation, in words of gray."""
    found = []
    for name in ("seen", "relations"):
        few = [p for p in prompt_set(name, 40 * n) if OLD in p.prompt]
        found += few[: n // 2]
    return found


def right_of(muse: Muse, prompts: list[str], read, asked: list[str]) -> list[bool]:
    """One picture for each prompt, seeds from 0 -> whether it has what `asked` names."""
    images = muse.generate(prompts, seed=list(range(len(prompts))))
    specs = map(parse_prompt, asked)
    return [matches(found, spec).right for found, spec in zip(read(images), specs, strict=True)]


def evaluate(muse: Muse, reader: ColorReader, n: int) -> dict[str, list[bool]]:
    """A Muse -> which pictures of n new and n old prompts are right."""
    new, old = [p.prompt for p in new_prompts(n)], [p.prompt for p in prompt_set("mixed", n)]
    return {
        "new": right_of(muse, [in_teal(prompt) for prompt in new], reader, new),
        "old": right_of(muse, old, reader.detector.detect, old),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--pictures", type=int, default=300)
    p.add_argument("--rehearse", type=int, default=0, help="pictures that toy draws of old captions, to add")
    p.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="such as stages.base.steps=1000")
    p.add_argument("--keep-old", type=float, default=0.0, help="fraction of the old weights in the base model")
    p.add_argument("--n", type=int, default=100, help="prompts of each kind")
    args = p.parse_args()
    data, run, start = args.out / "pictures", args.out / "run", Muse.from_pretrained("toy", device="cpu")
    if not data.exists():
        write_folder(data, args.pictures)
        if args.rehearse:
            rehearse(data, start, args.rehearse)
    reader = ColorReader(Detector.from_pretrained())
    print("colors of real renders read right:", validate(reader, 40), flush=True)
    report = {"before": evaluate(start, reader, args.n)}
    print({k: sum(v) for k, v in report["before"].items()}, flush=True)
    started = time.monotonic()
    config = changed(finetuned(start.config), args.set)
    for p in train_muse(config, start="toy", data=data, engine=Engine(device="cpu", folder=run)):
        if p.step % 100 == 0 and p.metrics:
            print(f"{time.monotonic() - started:.0f} s {p.stage} {p.step}", p.metrics, flush=True)
    print(f"{p.metrics['minutes']:.1f} minutes")
    keep_old(p.model, start, args.keep_old)
    p.model.save_pretrained(run, overwrite=True)
    report["after"] = evaluate(p.model, reader, args.n)
    for when, kinds in report.items():
        for kind, values in kinds.items():
            print(f"{when}, {kind} prompts right: {proportion_interval(values)}")
    (args.out / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
