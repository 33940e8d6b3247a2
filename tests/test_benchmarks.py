"""What the benchmarks compare with must compute the same, or their ratios mean nothing."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

import tokenmerge
from tests.tiny import images_for, tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common
import straightforward


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_224"])
@torch.no_grad()
def test_the_straightforward_version_is_the_same_computation(name: str) -> None:
    model = tiny(name)
    images = images_for(model)
    plain = straightforward.straightforward(model, 5)(images)
    with tokenmerge.patched(model, r=5):
        torch.testing.assert_close(plain, model(images), rtol=1e-4, atol=1e-4)


def test_rows_are_only_appended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row with a new column leaves the older ones as they were, with that column empty."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.csv")
    common.append([{"model": "a", "ms": 1.5}, {"model": "b", "ms": 2}])
    common.append([{"model": "c", "tokens": 7}])
    with common.RESULTS.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["model", "ms", "tokens"], ["a", "1.5", ""], ["b", "2", ""], ["c", "", "7"]]
