"""The questions and answers of docs/faq.md, and a mark for tests that check an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import tiny

ROOT = Path(__file__).parents[2]
FAQ = (ROOT / "docs" / "faq.md").read_text("utf-8")
ANSWERS = {
    question: " ".join(answer.split())
    for question, answer in re.findall(r"^\*\*(.+?\?)\*\*(.*?)(?=^\*\*|^## |\Z)", FAQ, re.DOTALL | re.MULTILINE)
}
NOT_RUN = {
    "Why does the first pass on a GPU take seconds?": "kernels are compiled on a GPU; benchmarks/gpu.py measures there",
    "Why a constant r, and not more in late blocks?": "results of the paper and of docs/compare.md, on real weights",
}
CLAIMED: dict[str, list[str]] = {}
_Test = Callable[..., None]


def claim(question: str, *words: str) -> Callable[[_Test], _Test]:
    """Mark a test of an answer; the words are those that it checks, as they stand on the page."""
    CLAIMED.setdefault(question, []).extend(words)
    mark = pytest.mark.parametrize("said", [pytest.param((question, words), id=question)], indirect=True)
    return lambda test: mark(test)


@pytest.fixture(autouse=True)
def said(request: pytest.FixtureRequest) -> None:
    """The page still says what a test is about."""
    if hasattr(request, "param"):
        question, words = request.param
        assert question in ANSWERS, "the page asks this no longer"
        assert [part for part in words if part not in ANSWERS[question]] == []


def small(**options: Any) -> Any:
    """A ViT of 3 blocks for 36 patches and a class token."""
    return tiny("vit_tiny_patch16_224", **options)
