from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmerge.errors import ConfigError
from tokenmerge.schedule import cut, expand, flops_target, inflected, keep_ratio, keep_step, max_merges, token_counts


def test_golden_schedules(shared: Path) -> None:
    for case in json.loads((shared / "reference/schedules.json").read_text()):
        r = case["r"]
        if isinstance(r, list) and r != [3, 3]:  # the file's two-entry values are pairs, except this list
            r = (r[0], r[1])
        assert list(expand(r, case["layers"])) == case["schedule"]


@pytest.mark.parametrize(
    ("r", "layers", "wanted"),
    [
        (8, 3, (8, 8, 8)),
        ((16, -1), 12, (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)),
        ((10, 1), 12, (0, 1, 3, 5, 7, 9, 10, 12, 14, 16, 18, 20)),
        ((10, 0), 3, (10, 10, 10)),
        ([3, 3], 4, (3, 3, 0, 0)),
        ([], 2, (0, 0)),
        ((16, -1), 1, (16,)),
        ((16, 0.5), 1, (16,)),
        ((16, 0.5), 2, (8, 24)),
        (10**9, 1, (10**9,)),
    ],
)
def test_forms(r: Any, layers: int, wanted: tuple[int, ...]) -> None:
    assert expand(r, layers) == wanted


@pytest.mark.parametrize(
    "r",
    [
        -1,
        (8, 2),
        (8,),
        (8, 0, 0),
        (-4, 0),
        [1, -1],
        [1, 2.0],
        10**9 + 1,
        3.0,
        "8",
        True,
        [True],
        (8, True),
        (8, "1"),
        (8, None),
        (8.0, 0),
        ("8", 0),
        (True, 0),
    ],
)
def test_bad_forms(r: Any) -> None:
    with pytest.raises(ConfigError, match=r"r=|r is larger"):
        expand(r, 12)


def test_a_list_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="lists 13 blocks, but the model has 12"):
        expand([1] * 13, 12)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=16), st.integers(1, 600), st.integers(0, 6))
def test_cut_leaves_what_is_possible(schedule: list[int], tokens: int, protected: int) -> None:
    possible = cut(tuple(schedule), tokens, protected)
    counts = token_counts(tuple(schedule), tokens, protected)
    assert counts[0] == tokens
    assert len(counts) == len(schedule) + 1
    for asked, r, before, after in zip(schedule, possible, counts[:-1], counts[1:], strict=True):
        assert before - after == r == min(asked, max_merges(before, protected))
        assert after >= min(before, protected)


@given(st.floats(0.5, 1), st.integers(1, 600), st.integers(0, 5))
def test_keep_ratio_keeps_at_least_its_share(keep: float, tokens: int, protected: int) -> None:
    counts = token_counts(keep_ratio(keep, 6, tokens, protected), tokens, protected)
    for before, after in itertools.pairwise(counts):
        free = max(before - protected, 0)
        assert after - min(before, protected) >= keep * free - 1e-6
        assert before - after <= max_merges(before, protected)


def test_keep_ratio_is_exact_where_fractions_are_not() -> None:
    assert keep_ratio(0.7, 1, 11, 1) == (3,)
    assert keep_ratio(0.55, 1, 101, 1) == (45,)  # 0.55 * 100 is 55.00000000000001 in binary


@pytest.mark.parametrize(
    ("tokens", "protected", "half", "all_but_one"),
    [(11, 1, 5, 9), (12, 1, 5, 10), (3, 1, 1, 1), (2, 1, 0, 0), (1, 1, 0, 0), (1, 3, 0, 0), (0, 0, 0, 0)],
)
def test_what_a_block_can_merge_away(tokens: int, protected: int, half: int, all_but_one: int) -> None:
    """Half of what is not protected, or all of it but one; also where there is nothing."""
    assert (max_merges(tokens, protected), max_merges(tokens, protected, "all but one")) == (half, all_but_one)
    assert cut((99,), tokens, protected) == (half,)
    assert cut((99, 99), tokens, protected, "all but one") == (all_but_one, 0)
    assert token_counts((99,), tokens, protected, "all but one") == (tokens, tokens - all_but_one)
    assert keep_step(0.0, tokens, protected) == half
    assert keep_step(0.0, tokens, protected, "all but one") == all_but_one
    assert keep_step(0.5, tokens, protected) == half
    assert keep_step(1.5, tokens, protected) == 0


def test_fractions_for_each_block() -> None:
    assert keep_ratio([0.9, 1, 0.25], 3, 102, 2, "all but one") == (10, 0, 67)
    assert keep_ratio((0.9, 1, 0.25), 3, 102, 2) == (10, 0, 45)
    assert keep_ratio(1, 3, 102, 2) == (0, 0, 0)
    for wrong in ([0.9], [0.9] * 3, []):
        with pytest.raises(ConfigError, match="blocks"):
            keep_ratio(wrong, 2, 102, 2)


def test_flops_target_is_the_closest_from_below() -> None:
    def fraction(schedule: tuple[int, ...]) -> float:
        return 1 - schedule[0] / 100

    assert flops_target(0.5, 3, 90, fraction) == (50, 50, 50)
    assert flops_target(0.495, 3, 90, fraction) == (51, 51, 51)
    assert flops_target(1.0, 3, 90, fraction) == (0, 0, 0)
    assert flops_target(0.25, 2, 48, lambda schedule: 1 - schedule[0] / 64) == (48, 48), "as far as it goes"
    with pytest.raises(ConfigError, match=r"flops=0\.05 is out of reach.*90"):
        flops_target(0.05, 3, 90, fraction)


def test_inflected_keeps_the_mean() -> None:
    assert sum(inflected(16, -1, 12)) == pytest.approx(12 * 16, abs=12)
