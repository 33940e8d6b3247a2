"""Intervals of accuracies and of paired differences, against SciPy and against counts by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Run
from tests.helpers import processes
from tokenmerge.tools.eval.scores import Score, add_in_turns
from tokenmerge.tools.processes import Processes
from tokenmerge.tools.settings import parse_setting
from tokenmerge.tools.statistics import bootstrap, paired_difference, wilson

COUNTS = [(0, 0, 1), (0, 0, 360), (0, 1, 360), (5, 0, 40), (9, 21, 100), (40, 41, 90), (30, 0, 30), (310, 402, 50_000)]


@pytest.mark.parametrize("count", [1, 2, 12, 360, 50_000])
def test_accuracies_have_wilsons_interval(count: int) -> None:
    scipy = pytest.importorskip("scipy.stats")
    for right in {0, 1, count // 3, count - 1, count}:
        found, expected = wilson(right, count), scipy.binomtest(right, count).proportion_ci(method="wilson")
        assert found.mean == right / count
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(("gained", "lost", "count"), COUNTS)
def test_differences_have_a_score_interval(gained: int, lost: int, count: int) -> None:
    """Its ends are the differences that a test with the most likely shares under them, found by a search, just rejects."""
    optimize = pytest.importorskip("scipy.optimize")
    found = paired_difference(gained, lost, count)
    assert found.mean == (gained - lost) / count
    assert -1 <= found.low <= found.mean <= found.high <= 1
    assert found.low < found.high
    for end in (found.low, found.high):
        if abs(end) > 1 - 1e-9:
            continue

        def unlikely(first: float, end: float = end) -> float:
            shares = (first + end, first, 1 - 2 * first - end)
            numbers = (gained, lost, count - gained - lost)
            return -sum(n * math.log(max(share, 1e-300)) for n, share in zip(numbers, shares, strict=True) if n)

        low, high = max(0.0, -end), (1 - end) / 2
        first = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        first = min((low, first, high), key=unlikely)
        statistic = (gained - lost - count * end) / math.sqrt(count * (2 * first + end * (1 - end)))
        assert abs(statistic) == pytest.approx(1.959964, rel=2e-3)


@pytest.mark.parametrize(("gained", "lost"), [(10, 22), (10, 23), (10, 24), (0, 3), (0, 4), (50, 71), (50, 72)])
def test_a_difference_excludes_zero_as_mcnemars_test_says(gained: int, lost: int) -> None:
    scipy = pytest.importorskip("scipy.stats")
    p = scipy.chi2.sf((gained - lost) ** 2 / (gained + lost), 1)
    assert paired_difference(gained, lost, 1000).differs == (p < 0.05)


def test_both_ways_agree_where_there_is_much() -> None:
    values = torch.zeros(20_000)
    values[:700], values[700:1500] = 1, -1
    one, other = paired_difference(700, 800, 20_000), bootstrap(values)
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=4e-4)


def _scores(answers: Sequence[Tensor], names: Sequence[str], batches: Sequence[slice], labels: Tensor) -> list[Score]:
    """Models that give known answers, on some of the images."""

    def forward(given: Tensor) -> Any:
        return lambda images: torch.nn.functional.one_hot(given[images.long()], 8).float()

    running = [Score(parse_setting(name), forward(given), 1.0) for name, given in zip(names, answers, strict=True)]
    for number, part in enumerate(batches):
        add_in_turns(running, torch.arange(len(labels), dtype=torch.float32)[part], labels[part], number)
    return running


def test_processes_together_find_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third process has no images."""
    labels = torch.randint(8, (60,))
    answers = [torch.where(torch.rand(60) < share, labels, (labels + 1) % 8) for share in (0.8, 0.7, 0.75)]
    names = ["8", "0", "4"]  # the unmerged model is not the first
    alone = _scores(answers, names, [slice(0, 32), slice(32, 60)], labels)
    for score, given in zip(alone, answers, strict=True):
        row = score.row("m", 0)
        right, base = given == labels, answers[1] == labels
        if score.setting.is_baseline:
            assert row["top1_difference"] is None
            continue
        expected = paired_difference(int((right & ~base).sum()), int((base & ~right).sum()), 60)
        assert row["top1_difference"] == pytest.approx(row["top1"] - 100 * float(base.float().mean()))
        found = (row["top1_difference_low"], row["top1_difference_high"])
        assert found == (100 * expected.low, 100 * expected.high)
    parts = [_scores(answers, names, part, labels) for part in ([slice(0, 10)], [slice(10, 30), slice(30, 60)], [])]
    for number in range(3):
        each = [part[number] for part in parts]
        every = [(one.top1, one.top5, one.changes) for one in each]
        answers_of_gather = iter([[1.0] * 3, [one.images for one in each], every])
        joined = parts[0][number]
        monkeypatch.setattr(Processes, "gather", lambda self, values, of=answers_of_gather: next(of))
        joined.join(Processes(0, 3, "cpu"))
        theirs, ours = joined.row("m", 0), alone[number].row("m", 0)
        assert {k: v for k, v in theirs.items() if "top" in k} == {k: v for k, v in ours.items() if "top" in k}


def test_images_seen_twice_count_once() -> None:
    labels = torch.randint(8, (40,))
    answers = [labels.clone(), (labels + (torch.arange(40) % 4 == 0)) % 8]
    whole = slice(0, 40)
    once = _scores(answers, ["0", "8"], [whole], labels)[1].row("m", 0)
    twice = _scores(answers, ["0", "8"], [whole, whole], labels)[1].row("m", 0, 2)
    assert {k: v for k, v in once.items() if "top" in k} == {k: v for k, v in twice.items() if "top" in k}


def test_eval_shows_them(run: Run, model_dir: Path, data: Path) -> None:
    command = ("eval", f"local-dir:{model_dir}", "--data", data, "-j", 0, "--json", "rows.json", "--r")
    code, out, err = run(*command, 0, 4, "flops=0.5")
    assert code == 0, err
    assert "change to r=0 on the same images in points, 95 % intervals" in out
    rows = json.loads(Path("rows.json").read_text())
    for row in rows:
        one = wilson(round(row["top1"] * 12 / 100), 12)
        assert (row["top1_low"], row["top1_high"]) == (100 * one.low, 100 * one.high)
        assert f"{row['top1_low']:.1f}-{row['top1_high']:.1f}" in out
    code, out, _ = run(*command, 4)
    assert code == 0
    assert "change to r=0" not in out, "nothing to compare with"


@pytest.mark.slow
def test_two_processes_print_the_same(model_dir: Path, data: Path, tmp_path: Path) -> None:
    words = ["eval", f"local-dir:{model_dir}", "--data", str(data), "-j", "0", "-b", "5", "--r", "0", "4", "--json"]
    processes.call([*words, str(tmp_path / "one.json")], tmp_path / "one")
    processes.call_on_two([*words, str(tmp_path / "two.json")], tmp_path / "two")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for ours, theirs in zip(one, two, strict=True):
        assert {k: v for k, v in theirs.items() if "top" in k} == {k: v for k, v in ours.items() if "top" in k}
