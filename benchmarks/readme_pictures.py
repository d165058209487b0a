"""README's pictures, from the shipped checkpoints: python benchmarks/readme_pictures.py

Nothing is picked: the first different prompts of `minimuse eval`'s sets, each drawn once, picture i of the sheet with
seed i. What the reader does not find right is marked.
"""

from pathlib import Path

from minimuse import Muse
from minimuse.plots import film, grid
from minimuse.prompts import asks
from minimuse.reader import Reader
from minimuse.wants import matches, parse_prompt

ASSETS = Path(__file__).parent.parent / "assets"
SETS = {"seen": 5, "novel": 3, "counts": 2, "relations": 2}  # prompts of each; a set gives each prompt twice in a row


def sheet(name: str):
    """A checkpoint -> a sheet of twelve pictures."""
    muse = Muse.from_pretrained(name)
    prompts = [ask.prompt for kind, n in SETS.items() for ask in asks(kind, 2 * n)[::2]]
    images = [muse.generate(prompt, seed=i)[0] for i, prompt in enumerate(prompts)]
    read = Reader.from_pretrained().read(images)
    right = [matches(reading, parse_prompt(prompt)).right for reading, prompt in zip(read, prompts, strict=True)]
    captions = [prompt if ok else f"{prompt} (WRONG)" for prompt, ok in zip(prompts, right, strict=True)]
    return grid(images, captions, columns=6, scale=max(1, 160 // images[0].width))


def main() -> None:
    sheet("toy").save(ASSETS / "toy.png")
    muse = Muse.from_pretrained("toy")
    film(muse, list(muse.steps("a large red cube", seed=0)), most=9).save(ASSETS / "film.png")


if __name__ == "__main__":
    main()
