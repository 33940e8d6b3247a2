"""Measure the speed of drawing pictures and of the interactive page.

    python benchmarks/explorer.py

It measures the time to draw a 224-pixel picture without the forward pass, and, in a browser (Debian's chromium, driven by
Playwright), the time of one slider step on a page of 24 blocks at 518 pixels, with one and with two settings. Weights are random.
It prints a table; nothing is compared, so no rows are appended to results.csv.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from tokenmerge.tools.report import Report
from tokenmerge.tools.settings import parse_setting
from tokenmerge.tools.visualize.load import Loader
from tokenmerge.tools.visualize.looks import merged_copies
from tokenmerge.tools.visualize.main import sheet
from tokenmerge.tools.visualize.page import write_page

_STEPS = """async () => {
  const times = [], slider = document.getElementById("step");
  for (let i = 0; i <= 2 * Number(slider.max); i++) {
    slider.value = i % (Number(slider.max) + 1);
    const start = performance.now();
    slider.dispatchEvent(new Event("input"));
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - start);
  }
  return times;
}"""


def picture_seconds(report: Report) -> None:
    """Return the seconds for a sheet of the input and four blocks, at 224 pixels with 12 blocks."""
    model = timm.create_model("vit_base_patch16_224").eval()
    loader, noise = Loader(model), np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    shown = loader.image(Image.fromarray(noise), "noise")
    merged = merged_copies(model, [parse_setting("16")], {})[0]
    passes, pictures = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(9):
            start = time.perf_counter()
            look = merged.look(shown)
            passes.append(time.perf_counter() - start)
            start = time.perf_counter()
            sheet([shown], [[look]], [-1, 2, 5, 8, 11], "picture").save(Path(folder, "out.png"))
            pictures.append(time.perf_counter() - start)
    report.say(
        f"224 px, 12 blocks: forward pass {statistics.median(passes):.3f} s, the picture of 5 columns beyond it "
        f"{statistics.median(pictures):.3f} s"
    )


def slider_milliseconds(report: Report) -> None:
    """Return the milliseconds of a slider step, for 24 blocks at 518 pixels."""
    from playwright.sync_api import sync_playwright

    model = timm.create_model(
        "vit_large_patch14_dinov2", img_size=518, embed_dim=96, num_heads=6, num_classes=10
    ).eval()
    noise = np.random.default_rng(0).integers(0, 256, (518, 518, 3), dtype=np.uint8)
    shown = Loader(model).image(Image.fromarray(noise), "noise")
    settings = [parse_setting(text) for text in ("0", "25", "40")]
    looks = [one.look(shown) for one in merged_copies(model, settings, {}, attention=True)]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder, "page.html")
        write_page(page, "24 blocks at 518 pixels", [shown], [looks])
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-background-networking", "--disable-quic"],
        )
        view: Any = browser.new_page()
        view.goto(page.as_uri())
        view.wait_for_selector("canvas")
        for name in ("one setting", "two settings"):
            times = sorted(view.evaluate(_STEPS))
            report.say(
                f"page of {page.stat().st_size / 1e6:.1f} MB, {name}: a step of the slider takes "
                f"{statistics.median(times):.0f} ms, 95 % under {times[int(0.95 * len(times))]:.0f} ms"
            )
            view.keyboard.press("2")
        browser.close()


if __name__ == "__main__":
    torch.manual_seed(0)
    picture_seconds(Report())
    slider_milliseconds(Report())
