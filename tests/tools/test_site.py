"""The documentation site in a real browser: no code is cut on a laptop, and no page is wider than a phone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDEST = 88
LAPTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
CUT = """() => [...document.querySelectorAll("pre code")].filter(code => code.scrollWidth > code.clientWidth)
    .map(code => code.innerText.split("\\n").sort((a, b) => b.length - a.length)[0])"""
OUTSIDE = """width => [...document.querySelectorAll("body *")]
    .filter(one => one.getBoundingClientRect().right > width && !one.closest("pre, .md-typeset__scrollwrap, .md-sidebar"))
    .map(one => one.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_code_are_short(page: Path) -> None:
    """Browsers differ in their fonts, so that the text has a limit of its own."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert not [line for block in blocks for line in block.splitlines() if len(line) > WIDEST]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def opened(chromium: Any, site: Path, viewport: dict[str, int]) -> Iterator[tuple[str, Any]]:
    """Name and browser page of each page of the site; none asks for a file of another host."""
    context = chromium.new_context(viewport=viewport)
    tab, requests = context.new_page(), []
    tab.on("request", lambda request: requests.append(request.url))
    for path in sorted(site.rglob("*.html")):
        if path.name != "404.html":  # whose links start at the root of a server
            tab.goto(path.as_uri())
            yield str(path.relative_to(site)), tab
    context.close()
    assert not [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]


@pytest.mark.slow
def test_no_code_is_cut_on_a_laptop(chromium: Any, site: Path) -> None:
    cut = {name: lines for name, tab in opened(chromium, site, LAPTOP) if (lines := tab.evaluate(CUT))}
    assert not cut


@pytest.mark.slow
def test_no_page_is_wider_than_a_phone(chromium: Any, site: Path) -> None:
    """Code and tables scroll within the page."""
    wide = {}
    for name, tab in opened(chromium, site, PHONE):
        if tab.evaluate("document.documentElement.scrollWidth") > PHONE["width"]:
            wide[name] = tab.evaluate(OUTSIDE, PHONE["width"])[:3]
    assert not wide
