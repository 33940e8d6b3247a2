"""A page in a real browser, and everything that it complained about or asked for."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
SIZES = {"desktop": (1280, 800), "large": (1920, 1080), "phone": (390, 844)}


@dataclasses.dataclass
class Browser:
    """One page, everything that it complained about, and everything that it asked for."""

    page: Any
    problems: list[str]
    requests: list[str]

    def check(self, *allowed: str) -> None:
        """No console errors, no injected script has run, no request went elsewhere."""
        assert not self.problems
        assert self.page.evaluate("window.hacked") is None
        elsewhere = [url for url in self.requests if not url.startswith(("data:", "blob:", *allowed))]
        assert not elsewhere

    def text(self, place: str) -> str:
        """Text of the first element."""
        return str(self.page.locator(place).first.inner_text())

    def shows(self, place: str, words: str) -> None:
        """Wait until it does."""
        from playwright.sync_api import expect

        expect(self.page.locator(place).first).to_contain_text(words, timeout=60_000)

    def until(self, expression: str) -> None:
        """Wait until an expression is true; the pages' policy forbids Playwright's own way, which evaluates text in the page."""
        end = time.monotonic() + 60
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


Open = Callable[..., Browser]


def opener(chromium: Any) -> Iterator[Open]:
    """Give a function that opens an address in a context of its own, and close all of them in the end."""
    contexts = []

    def call(url: str, **options: Any) -> Browser:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        found = Browser(page, [], [])
        page.on("console", lambda one: found.problems.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: found.problems.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.goto(url)
        return found

    yield call
    for context in contexts:
        context.close()
