from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenmerge import InputError, MergePlan, bipartite_matching
from tokenmerge.plan import source_map

shapes = st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 5), st.integers(0, 30), st.integers(0, 4))


def draw(shape: tuple[int, int, int, int, int]) -> tuple[MergePlan, Tensor, Tensor, int]:
    batch, tokens, channels, r, protected = shape
    protected = min(protected, tokens)
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (batch, tokens), generator=generator).float()
    metric = torch.randn(batch, tokens, 4, generator=generator)
    return bipartite_matching(metric, r, protected), x, size, protected


@settings(max_examples=150, deadline=None)
@given(shapes)
def test_properties_of_a_merge(shape: tuple[int, int, int, int, int]) -> None:
    plan, x, size, protected = draw(shape)
    batch, tokens = x.shape[:2]
    assign = plan.assign
    # total and onto
    assert assign.shape == (batch, tokens)
    assert plan.tokens_in == tokens
    assert plan.tokens_out == tokens - plan.r
    for row in assign:
        assert row.unique().tolist() == list(range(plan.tokens_out))
    # protected tokens stay alone and in place
    assert torch.equal(assign[:, :protected], torch.arange(protected).expand(batch, -1))
    assert not (assign[:, protected:] < protected).any()
    # sizes sum to N (or to what came in), the weighted sum of x is conserved
    merged, new_size = plan.merge(x, size)
    assert torch.equal(new_size.sum(1), size.sum(1))
    assert torch.equal(plan.merge(x)[1].sum(1), torch.full((batch,), float(tokens)))
    torch.testing.assert_close((merged * new_size.unsqueeze(2)).sum(1), (x * size.unsqueeze(2)).sum(1))
    # merging what was unmerged changes nothing
    again, _ = plan.merge(plan.unmerge(merged), size)
    torch.testing.assert_close(again, merged)
    for image in range(batch):
        assert torch.equal(plan.unmerge(merged)[image], merged[image, assign[image]])


@settings(max_examples=100, deadline=None)
@given(shapes)
def test_merge_equals_its_definition(shape: tuple[int, int, int, int, int]) -> None:
    plan, x, size, _ = draw(shape)
    for reduce in ("mean", "sum", "max"):
        merged, new_size = plan.merge(x, size, reduce)
        for image in range(x.shape[0]):
            for token in range(plan.tokens_out):
                members = plan.assign[image] == token
                rows, weights = x[image, members], size[image, members].double()
                wanted = {
                    "mean": (rows * weights.unsqueeze(1)).sum(0) / weights.sum(),
                    "sum": rows.sum(0),
                    "max": rows.max(0).values,
                }[reduce]
                torch.testing.assert_close(merged[image, token], wanted)
                assert new_size[image, token] == weights.sum()


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 20))
def test_compose_is_one_after_the_other(shape: tuple[int, int, int, int, int], r: int) -> None:
    first, x, size, protected = draw(shape)
    metric = torch.randn(x.shape[0], first.tokens_out, 3, generator=torch.Generator().manual_seed(r))
    second = bipartite_matching(metric, r, protected)
    whole = first.compose(second)
    step, step_size = second.merge(*first.merge(x, size))
    once, once_size = whole.merge(x, size)
    torch.testing.assert_close(once, step)
    assert torch.equal(once_size, step_size)
    assert torch.equal(whole.unmerge(once), once.gather(1, whole.assign.unsqueeze(2).expand_as(x)))
    source = source_map([first, second])
    assert source is not None
    assert torch.equal(whole.assign, source)


def test_from_assign_round_trip_and_refusals() -> None:
    assign = torch.tensor([[2, 0, 1, 0], [0, 1, 2, 2]])
    plan = MergePlan.from_assign(assign)
    assert torch.equal(plan.assign, assign)
    assert plan.r == 1
    for bad in ([[0, 2]], [[0, 0], [0, 1]], [[-1, 0]]):
        with pytest.raises(InputError, match=r"onto|must lie"):
            MergePlan.from_assign(torch.tensor(bad), tokens_out=2)
    with pytest.raises(InputError, match=r"integers of shape \[B, N\]"):
        MergePlan.from_assign(torch.tensor([0, 1]))
    with pytest.raises(InputError, match="integers"):
        MergePlan.from_assign(torch.zeros(1, 2))
    with pytest.raises(InputError, match="floating-point"):
        plan.merge(torch.ones(2, 4, 3, dtype=torch.int64))


def test_wrong_shapes_are_named() -> None:
    plan = bipartite_matching(torch.randn(2, 10, 4), 3)
    with pytest.raises(InputError, match=r"x is \(2, 9, 4\) torch.float32, but this plan merges floating-point tokens"):
        plan.merge(torch.zeros(2, 9, 4))
    with pytest.raises(InputError, match="size is"):
        plan.merge(torch.zeros(2, 10, 4), torch.ones(2, 9))
    with pytest.raises(InputError, match="must be one of mean, average"):
        plan.merge(torch.zeros(2, 10, 4), reduce="median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="x is"):
        plan.unmerge(torch.zeros(2, 10, 4))
    with pytest.raises(InputError, match="compose"):
        plan.compose(plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: Any) -> None:
    """600 equal tokens become one: in half precision their sum or count would overflow or stall."""
    tokens = 600
    plan = MergePlan.from_assign(torch.zeros(1, tokens, dtype=torch.int64))
    x = torch.full((1, tokens, 4), 120.0, dtype=dtype)
    merged, size = plan.merge(x)
    assert merged.dtype == dtype
    assert size.dtype == torch.float32
    assert torch.equal(merged, torch.full((1, 1, 4), 120.0, dtype=dtype))
    assert size.item() == tokens
    # against float64
    x = torch.randn(1, tokens, 4).to(dtype)
    torch.testing.assert_close(plan.merge(x)[0], x.double().mean(1, keepdim=True).to(dtype), rtol=1e-2, atol=1e-3)
    # untouched rows keep every bit
    few = bipartite_matching(torch.randn(2, 20, 8), 4, 1)
    y = torch.randn(2, 20, 4).to(dtype)
    out, new_size = few.merge(y)
    alone = new_size == 1
    assert torch.equal(out[alone], y.gather(1, few.kept.unsqueeze(2).expand(-1, -1, 4))[alone])


def test_gradients_in_float64() -> None:
    plan = bipartite_matching(torch.randn(2, 9, 4), 4, 1)
    size = torch.randint(1, 5, (2, 9)).float()
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    for reduce in ("mean", "sum", "max"):
        assert torch.autograd.gradcheck(lambda x, how=reduce: plan.merge(x, size, how)[0], x)
    y = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(plan.unmerge, y)


@pytest.mark.parametrize("value", [-1, 2.0, True, "2", None])
def test_counts_that_mean_nothing_are_refused(value: Any) -> None:
    for counts in ((value, 3), (2, value)):
        with pytest.raises(InputError, match="a whole number"):
            MergePlan.identity(*counts)
    if value is not None:
        with pytest.raises(InputError, match="tokens_out"):
            MergePlan.from_assign(torch.tensor([[0, 1, 1]]), value)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("-inf")])
def test_sizes_are_numbers_of_patches(wrong: float) -> None:
    tokens = torch.randn(2, 6, 4)
    plan = bipartite_matching(tokens, 2)
    size = torch.ones(2, 6)
    size[1, 3] = wrong
    with pytest.raises(InputError, match="a size is negative or NaN"):
        plan.merge(tokens, size)
