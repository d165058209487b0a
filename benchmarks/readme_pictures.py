"""README's pictures, from the shipped checkpoint: python benchmarks/readme_pictures.py

Each prompt is drawn once, with seed 0. The prompts themselves lean towards single large things, which nano does best.
"""

from pathlib import Path

from minimuse import Muse
from minimuse.plots import film, grid

ASSETS = Path(__file__).parent.parent / "assets"
PROMPTS = [
    "a large red cube",
    "a large green sphere",
    "a small blue cylinder",
    "a large purple cube",
    "a small red sphere",
    "a large yellow metal cylinder",
    "a cyan cube",
    "a large brown cylinder",
    "a large cyan cylinder",  # a combination that no training scene shows
    "two small red cubes",
    "a red sphere left of a blue cube",
    "a shiny crimson ball",  # three words that no training caption contains
]


def main() -> None:
    muse = Muse.from_pretrained("nano")
    images = [muse.generate(prompt, seed=0)[0] for prompt in PROMPTS]
    grid(images, PROMPTS, columns=6, scale=2).save(ASSETS / "nano.png")
    film(muse, list(muse.steps("a large red cube", seed=0)), most=9).save(ASSETS / "film.png")


if __name__ == "__main__":
    main()
