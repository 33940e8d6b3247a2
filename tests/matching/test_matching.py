from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.helpers.oracle import naive_matching
from tests.helpers.plans import exact_metric
from tokenmerge import ConfigError, InputError, bipartite_matching, register_matcher
from tokenmerge.matching import get_matcher


@pytest.mark.parametrize("case", range(8))
def test_golden_matching(shared: Path, case: int) -> None:
    golden = load_file(shared / "reference/matching.safetensors")
    spec = json.loads((shared / "reference/matching.json").read_text())[case]
    data = {
        name: golden[f"case{case}.{name}"]
        for name in ("metric", "x", "size", "merged", "merged_size", "assign", "unmerged")
    }
    plan = bipartite_matching(data["metric"], spec["r"], spec["class_token"] + spec["distill_token"])
    assert torch.equal(plan.assign, data["assign"].long())
    merged, size = plan.merge(data["x"], data["size"])
    torch.testing.assert_close(merged, data["merged"], rtol=0, atol=1e-5)
    torch.testing.assert_close(size, data["merged_size"], rtol=0, atol=1e-5)
    unmerged = plan.unmerge(merged)
    if spec["distill_token"]:
        # With a distillation token the file's own `unmerged` contradicts its `merged` and `assign`: it gives that
        # token, and most others, the value of some other token. Unmerging is defined by the map, so the map decides.
        index = data["assign"].long().unsqueeze(2).expand(-1, -1, merged.shape[2])
        assert not torch.allclose(data["unmerged"], data["merged"].gather(1, index), atol=1e-2)
        data["unmerged"] = data["merged"].gather(1, index)
    torch.testing.assert_close(unmerged, data["unmerged"], rtol=0, atol=1e-5)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 33), st.integers(0, 20), st.integers(0, 5), st.integers(0, 10_000))
def test_equals_the_loops(tokens: int, r: int, protected: int, seed: int) -> None:
    protected = min(protected, tokens)
    # few distinct vectors of norm 2 (or 0): many ties, and every product is exact in whatever order it is summed
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randint(0, 2, (2, tokens, 4), generator=generator).float() * 2 - 1
    metric = metric * (torch.rand(2, tokens, 1, generator=generator) < 0.9)
    plan = bipartite_matching(metric, r, protected)
    for image in range(2):
        assert plan.assign[image].tolist() == naive_matching(metric[image], r, protected)


def test_ties_go_to_the_lower_positions() -> None:
    plan = bipartite_matching(torch.ones(1, 8, 4), 2)
    assert plan.source.tolist() == [[0, 2]]
    assert plan.assign.tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e4])
def test_zero_and_huge_keys_give_a_whole_plan(dtype: Any, scale: float) -> None:
    metric = (torch.randn(2, 12, 8) * scale).to(dtype)
    metric[:, 3] = 0
    plan = bipartite_matching(metric, 5, 1)
    merged, size = plan.merge(torch.randn(2, 12, 4))
    assert plan.assign.sort(1).values[:, -1].tolist() == [6, 6]
    assert merged.isfinite().all()
    assert size.isfinite().all()


def test_autocast_does_not_change_the_pairs() -> None:
    metric = torch.randn(4, 65, 16)
    plain = bipartite_matching(metric, 20, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = bipartite_matching(metric, 20, 1)
    assert torch.equal(plain.assign, cast.assign)


def test_takes_no_gradient_and_an_empty_batch() -> None:
    metric = torch.randn(2, 12, 8, requires_grad=True)
    assert not bipartite_matching(metric, 3).assign.requires_grad
    assert bipartite_matching(torch.empty(0, 12, 8), 3, 1).assign.shape == (0, 12)


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"\[B, N, D\]"):
        bipartite_matching(torch.zeros(3, 4), 1)
    with pytest.raises(InputError, match=r"\[B, N, D\]"):
        bipartite_matching(torch.zeros(1, 3, 4, dtype=torch.int64), 1)
    with pytest.raises(InputError, match="negative"):
        bipartite_matching(torch.zeros(1, 3, 4), -1)
    with pytest.raises(InputError, match="whole numbers"):
        bipartite_matching(torch.zeros(1, 3, 4), 2.0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="whole numbers"):
        bipartite_matching(torch.zeros(1, 3, 4), True)
    with pytest.raises(InputError, match="negative"):
        bipartite_matching(torch.zeros(1, 3, 4), 1, -1)
    with pytest.raises(InputError, match="dense"):
        bipartite_matching(torch.zeros(1, 3, 4).to_sparse(), 1)
    with pytest.raises(InputError, match=r"\[B, N, D\]"):
        get_matcher("kmeans")(torch.zeros(1, 2, 3, 4), 1)  # which does not average over heads


@pytest.mark.parametrize("distance", ["dot", "euclidean", "softmax"])
def test_other_distances_average_over_heads_and_need_torch(distance: Any) -> None:
    """The length of the mean matters to them; the kernels know the cosine alone."""
    keys = torch.randn(2, 3, 40, 6) * 3
    plan = bipartite_matching(keys, 12, 1, distance=distance)
    assert torch.equal(plan.assign, bipartite_matching(keys.mean(dim=1), 12, 1, distance=distance).assign)
    assert not torch.equal(plan.assign, bipartite_matching(keys, 12, 1).assign)
    with pytest.raises(ConfigError, match="cannot run"):
        bipartite_matching(keys, 12, 1, backend="triton", distance=distance)


def test_the_registry() -> None:
    assert get_matcher("bipartite") is bipartite_matching
    with pytest.raises(ConfigError, match=r"'nope' is not registered; known are .*bipartite"):
        get_matcher("nope")
    with pytest.raises(ConfigError, match="registered already"):
        register_matcher("bipartite")(lambda metric, r, protected=0: bipartite_matching(metric, r, protected))


def test_many_tokens_hold_only_a_tile_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plan as with all scores at once, and memory that does not grow with N²."""
    metric = exact_metric(6000, batch=1)  # exact in float32, so ties are ties however it is computed
    with torch.profiler.profile(profile_memory=True) as profile:
        plan = bipartite_matching(metric, 1500, 1, backend="torch")
    monkeypatch.setattr("tokenmerge.matching.bipartite._SCORES", 2**30)
    whole = bipartite_matching(metric, 1500, 1, backend="torch")
    assert torch.equal(plan.assign, whole.assign)
    assert plan.source[0].tolist() != sorted(plan.source[0].tolist()), "edges differ: the best are not just the first"
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert 8e6 < largest < 9e6  # all scores would be 36 MB
