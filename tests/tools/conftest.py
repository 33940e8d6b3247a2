"""A browser for the tests of pages, and one list of ONNX's operators for the tests of exporting."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.browser import CHROMIUM, Open, opener


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    options = [
        "--no-sandbox",
        "--disable-background-networking",
        "--disable-quic",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Open]:
    yield from opener(chromium)


@pytest.fixture(scope="session")
def one_registry() -> Iterator[None]:
    """Torch's exporter to ONNX makes its list of operators once, and not in each export, where it takes over a second.

    Nothing changes a list but operators of one's own, and tokenmerge gives none.
    """
    if importlib.util.find_spec("onnxscript") is None:
        yield
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield
