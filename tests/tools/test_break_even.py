"""`tokenmerge bench --break-even`: what it tries, when it says that merging pays, what it advises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import tiny
from tokenmerge.cli import main
from tokenmerge.ops.timing import Spread
from tokenmerge.patching.tuning.measure import pays
from tokenmerge.patching.tuning.schedules import spaced
from tokenmerge.tools.bench import break_even
from tokenmerge.tools.bench.break_even import batches_up_to, ladder


def test_what_is_tried() -> None:
    assert batches_up_to(1) == [1]
    assert batches_up_to(8) == [1, 2, 4, 8]
    assert batches_up_to(12) == [1, 2, 4, 8, 12]
    # 36 patches and 3 blocks: 18 can merge in the first, 12 a block on average
    assert [setting.label for setting in ladder(tiny("deit_tiny_patch16_224"))] == [1, 2, 4, 8]


@pytest.mark.parametrize("schedule", [(8,) * 12, (5, 4, 3, 2), (7,), (1, 0, 0, 3, 9)])
def test_fewer_blocks_merge_as_many_tokens(schedule: tuple[int, ...]) -> None:
    for late in (False, True):
        fewer = spaced(schedule, 3, late)
        assert len(fewer) == len(schedule)
        assert sum(fewer) == sum(schedule)
        last = len(schedule) - 1
        assert not any(fewer[i] for i in range(len(fewer)) if (i % 3 if not late else i % 3 != 2 and i != last))
        merged = [sum(fewer[:i]) - sum(schedule[:i]) for i in range(len(fewer) + 1)]
        assert all(one <= 0 for one in merged) if late else all(one >= 0 for one in merged)


def test_when_merging_pays() -> None:
    assert pays(Spread.of_ratios([1.1] * 10, [1.0] * 10))
    assert not pays(Spread.of_ratios([1.01] * 10, [1.0] * 10))  # too little
    assert not pays(Spread.of_ratios([1.1, 1.1, 0.9, 0.9, 1.2], [1.0] * 5))  # too seldom
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)


SMALL = [
    "deit_tiny_patch16_224",
    "--img-size",
    "64",
    "--batch-size",
    "2",
    "--num-bench-iter",
    "2",
    "--num-warm-iter",
    "0",
]


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: Any, *options: str) -> list[dict[str, Any]]:
    """The rows, with times that are made up: what is measured is no matter of tests."""
    monkeypatch.setattr(break_even, "passes", lambda forwards, images: [images] * len(forwards))
    monkeypatch.setattr(break_even, "take_turns", lambda calls, *_: seconds(len(calls), calls[0].shape[0]))
    rows = tmp_path / "rows.json"
    assert main(["bench", *SMALL, "--break-even", "--json", str(rows), *options]) == 0
    found: list[dict[str, Any]] = json.loads(rows.read_text())
    return found


def test_the_smallest_r_that_pays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here r = 1 costs and r = 2 gains from a batch of 2 on."""

    def seconds(models: int, batch: int) -> list[list[float]]:
        return [[1.0 - 0.05 * i * (batch - 1) + 0.06 * (i > 0)] * 2 for i in range(models)]

    rows = run(monkeypatch, tmp_path, seconds, "--r", "0", "1", "2")
    assert [(row["batch_size"], row["r"], row["pays"]) for row in rows] == [
        (1, 1, False),
        (1, 2, False),
        (1, "0,0,6,0,0,6,0,0,3,0,0,0", False),  # 17 tokens: r = 2 until one is left to merge
        (2, 1, False),
        (2, 2, True),
    ]
    out = " ".join(capsys.readouterr().out.split())
    assert "does not pay at batch 1 with any r that was tried: use batches of 2 or more; try --compile" in out


def test_where_everything_pays_nothing_is_advised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(monkeypatch, tmp_path, lambda models, _: [[1.0 / (i + 1)] * 2 for i in range(models)])
    assert all(row["pays"] for row in rows)
    assert {row["batch_size"] for row in rows} == {1, 2}
    assert "does not pay" not in capsys.readouterr().out


def test_really_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.json"
    assert main(["bench", *SMALL, "--break-even", "--r", "2", "--json", str(rows)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    for row in json.loads(rows.read_text()):
        assert row["speedup_p20"] <= row["speedup"] <= row["speedup_p80"]
        assert row["ms"] > 0


def test_typed_order_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The smallest is the one that merges least, and a list that was typed is shown as typed."""
    rows = run(monkeypatch, tmp_path, lambda models, _: [[1.0]] + [[0.5]] * (models - 1), "--r", "4", "3,2,0", "2")
    assert [row["r"] for row in rows[:3]] == ["3,2,0", 2, 4]
    assert "3,2,0: 2.00x" in capsys.readouterr().out


def test_r_is_asked_for_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "deit_tiny_patch16_224", "--break-even", "--r", "0"]) == 2
    assert "r=0 alone" in capsys.readouterr().err
    assert main(["bench", "deit_tiny_patch16_224"]) == 2
    assert "such as --r 8 16" in capsys.readouterr().err
