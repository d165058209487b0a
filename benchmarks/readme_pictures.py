"""README's pictures, from the shipped checkpoints: python benchmarks/readme_pictures.py [--page]

No picture is selected: the sheet shows the first prompts of the evaluation sets, each drawn once, picture i with seed
i. Pictures that the detector finds wrong are marked. --page takes a screenshot of `minimuse app` instead: its first
prompt, seed 0. It needs the extra `app`, playwright and Chromium. --page PATH takes a narrow one."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from minimuse import Muse
from minimuse.eval_networks import Detector
from minimuse.eval_prompts import matches, parse_prompt, prompt_set
from minimuse.plots import film, grid

ASSETS = Path(__file__).parent.parent / "assets"
SETS = {
    "seen": 5,
    "novel": 3,
    "counts": 2,
    "relations": 2,
}  # prompts of each set; a set holds each prompt twice in a row


def sheet(name: str):
    """Draw a sheet of twelve pictures with a checkpoint."""
    muse = Muse.from_pretrained(name)
    prompts = [ask.prompt for kind, n in SETS.items() for ask in prompt_set(kind, 2 * n)[::2]]
    images = [muse.generate(prompt, seed=i)[0] for i, prompt in enumerate(prompts)]
    read = Detector.from_pretrained().detect(images)
    right = [matches(reading, parse_prompt(prompt)).right for reading, prompt in zip(read, prompts, strict=True)]
    captions = [prompt if ok else f"{prompt} (WRONG)" for prompt, ok in zip(prompts, right, strict=True)]
    return grid(images, captions, columns=6, scale=max(1, 160 // images[0].width))


def page(path: Path, width: int = 1280, port: int = 7877) -> None:
    """Press Draw in `minimuse app` and save a screenshot of a window of this width."""
    from playwright.sync_api import sync_playwright

    command = "from minimuse.cli import main; main()"
    words = [sys.executable, "-c", command, "app", "--checkpoint", "toy", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        next(line for line in server.stdout if "http" in line)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": width, "height": 950})
            tab.goto(f"http://127.0.0.1:{port}/")
            tab.get_by_role("button", name="Draw", exact=True).click()
            tab.get_by_text("Done in").wait_for()
            tab.locator("#film img").wait_for()
            tab.wait_for_timeout(1000)  # until all animations have ended
            tab.screenshot(path=path, full_page=True)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", nargs="?", const="", metavar="PATH", help="the page; with a path, narrow")
    args = parser.parse_args()
    if args.page is not None:
        page(*((Path(args.page), 400) if args.page else (ASSETS / "app.png",)))
        return
    sheet("toy").save(ASSETS / "toy.png")
    muse = Muse.from_pretrained("toy")
    film(muse, list(muse.steps("a large red cube", seed=0)), most=9).save(ASSETS / "film.png")


if __name__ == "__main__":
    main()
