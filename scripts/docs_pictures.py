"""Write the pictures of README.md and docs: output of the commands for scikit-image's photo of a cat (CC0).

    python scripts/docs_pictures.py FOLDER
    python scripts/docs_pictures.py --tutorials FOLDER

Without --tutorials, FOLDER holds a classifier with 14 × 14 patches and its weights, in timm's hub format. The pictures in the repository show a
ViT-Ti/16 that was fine-tuned on Tiny ImageNet (200 classes, photos enlarged from 64 pixels). With it, the commands of
docs/tutorials/video.md and sound.md were run in FOLDER, and parts of what they wrote are taken.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from skimage import data

from tokenmerge.cli import main as tokenmerge

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def screenshot(page: Path, out: Path) -> None:
    """Take a screenshot of the interactive page with one token pinned."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-background-networking", "--disable-quic"],
        )
        view: Any = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        view.goto(page.as_uri())
        view.wait_for_selector("canvas")
        view.locator("#step").fill("9")
        view.locator("#step").blur()
        box = view.locator(".panel canvas").nth(1).bounding_box()
        view.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.45 * box["height"])
        view.screenshot(path=out)
        browser.close()


def of_tutorials(folder: Path) -> None:
    """Take the pictures of the tutorials on videos and sounds: three frames of eight, the curves alone, and the spectrograms."""
    film, frames = Image.open(folder / "moving.png"), Image.open(folder / "frames.png")
    head, foot, rows, kept = 26, 24, 8, 3
    film.crop((0, 0, film.width, head + (film.height - head) * kept // rows)).save(IMAGES / "moving.png")
    frames.crop((0, film.height + foot, frames.width, frames.height)).save(IMAGES / "over-time.png")
    Image.open(folder / "events.png").save(IMAGES / "events.png")


def main() -> None:
    """Write all pictures."""
    if len(sys.argv) == 3 and sys.argv[1] == "--tutorials":
        of_tutorials(Path(sys.argv[2]))
        return
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        cat = Path(folder, "cat.png")
        pixels = data.chelsea()  # type: ignore[no-untyped-call]  # 300 × 451, of which the central square is used
        Image.fromarray(pixels[:, 90:390]).save(cat)
        Path(folder, "tiny-imagenet").symlink_to(Path(sys.argv[1]).resolve())
        os.chdir(folder)  # so that pages contain no local paths
        base = ["visualize", "local-dir:tiny-imagenet", "cat.png", "--pretrained", "--r", "16"]
        for view, name in (("picture", "cat"), ("sizes", "cat-sizes")):
            if tokenmerge([*base, "--view", view, "--out", str(IMAGES / f"{name}.png")]):
                sys.exit("the picture could not be made")
        page = Path(folder, "cat.html")
        if tokenmerge([*base, "8", "--out", str(page)]):
            sys.exit("the page could not be made")
        screenshot(page, IMAGES / "explorer.png")


if __name__ == "__main__":
    main()
