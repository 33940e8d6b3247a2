from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenmerge import InputError, MergePlan, bipartite_matching
from tokenmerge.ops.combine import Reduce
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


# --- plans that drop tokens, of any map ----------------------------------------------------------------------


@st.composite
def maps(draw_: st.DrawFn, tokens: int | None = None) -> list[list[int]]:
    """Maps of 1 to 3 images onto the same positions; −1 drops a token, in some maps."""
    tokens = draw_(st.integers(1, 12)) if tokens is None else tokens
    left = draw_(st.integers(1, tokens))
    low = draw_(st.sampled_from([0, -1]))
    rows = []
    for _ in range(draw_(st.integers(1, 3))):
        more = draw_(st.lists(st.integers(low, left - 1), min_size=tokens - left, max_size=tokens - left))
        rows.append(draw_(st.permutations([*range(left), *more])))
    return rows


@settings(max_examples=60)
@given(maps())
def test_every_onto_map_is_a_plan(rows: list[list[int]]) -> None:
    """The first token of a group represents it, and the plan says whether it drops any."""
    plan = MergePlan.from_assign(torch.tensor(rows))
    assert plan.assign.tolist() == rows
    assert plan.drops == any(-1 in row for row in rows)
    assert plan.tokens_out == max(max(row) for row in rows) + 1
    assert plan.kept.tolist() == [[row.index(place) for place in range(plan.tokens_out)] for row in rows]
    for source, kept in zip(plan.source.tolist(), plan.kept.tolist(), strict=True):
        assert source == sorted(set(range(plan.tokens_in)) - set(kept))
    spatial = plan.in_order()
    assert spatial.drops == plan.drops
    assert spatial.kept.tolist() == [sorted(row) for row in plan.kept.tolist()]
    again = spatial.kept.gather(1, spatial.assign.clamp_min(0)).where(spatial.assign >= 0, -1)
    assert again.tolist() == plan.kept.gather(1, plan.assign.clamp_min(0)).where(plan.assign >= 0, -1).tolist()


@settings(max_examples=50)
@given(st.data())
def test_what_was_dropped_stays_dropped_in_plans_of_plans(data: st.DataObject) -> None:
    """One map after the other, each with or without drops, as one plan and as one source map."""
    first = data.draw(maps())
    plans, wanted = [MergePlan.from_assign(torch.tensor(first))], first
    for _ in range(3):
        row = data.draw(maps(plans[-1].tokens_out))[0]
        plans.append(MergePlan.from_assign(torch.tensor([row] * len(first))))
        wanted = [[row[place] if place >= 0 else -1 for place in image] for image in wanted]
    whole = functools.reduce(MergePlan.compose, plans)
    source = source_map(plans)
    assert source is not None
    assert whole.assign.tolist() == source.tolist() == wanted
    assert whole.drops == any(plan.drops for plan in plans)
    x = torch.randn(len(first), whole.tokens_in, 2, dtype=torch.float64)
    step: tuple[Tensor, Tensor] = (x, torch.ones(x.shape[:2]))
    for plan in plans:
        step = plan.merge(*step)
    torch.testing.assert_close(whole.merge(x), step)
    assert source_map([]) is None


@settings(max_examples=40)
@given(maps())
def test_dropped_tokens_count_for_nothing(rows: list[list[int]]) -> None:
    """Not in means, sums or maxima, and not in sizes; unmerged, they are 0."""
    plan = MergePlan.from_assign(torch.tensor(rows))
    x, size = torch.randn(len(rows), plan.tokens_in, 3, dtype=torch.float64) - 5, torch.arange(1.0, plan.tokens_in + 1)
    ways: tuple[Reduce, ...] = ("mean", "average", "sum", "max", "destination", "norm", "max_norm")
    found = {way: plan.merge(x, size.expand(len(rows), -1), way) for way in ways}
    for image, row in enumerate(rows):
        for place in range(plan.tokens_out):
            members = [token for token, to in enumerate(row) if to == place]
            of, weight = x[image, members], size[members].double().unsqueeze(1)
            mean, lengths = (of * weight).sum(dim=0) / weight.sum(), of.norm(dim=1, keepdim=True)
            wanted = {
                "mean": mean,
                "average": of.mean(dim=0),
                "sum": of.sum(dim=0),
                "max": of.amax(dim=0),
                "destination": of[0],
                "norm": mean / mean.norm() * (lengths * weight).sum() / weight.sum(),
                "max_norm": mean / mean.norm() * lengths.max(),
            }
            for way, (merged, sizes) in found.items():
                torch.testing.assert_close(merged[image, place], wanted[way], msg=way)
                assert sizes[image, place] == weight.sum()
    back = plan.unmerge(found["mean"][0])
    dropped = plan.assign < 0
    assert not back[dropped].any()
    assert torch.equal(
        back[~dropped], found["mean"][0].gather(1, plan.assign.clamp_min(0).unsqueeze(2).expand_as(x))[~dropped]
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_positions_are_int64_whatever_integers_the_map_holds(dtype: torch.dtype) -> None:
    plan = MergePlan.from_assign(torch.tensor([[1, 0, 1]]).to(dtype), 2)
    assert {plan.kept.dtype, plan.source.dtype, plan.target.dtype, plan.assign.dtype} == {torch.int64}
    assert plan.assign.tolist() == [[1, 0, 1]]


def test_maps_of_no_images() -> None:
    for left in (1, 2, 4):
        plan = MergePlan.from_assign(torch.empty(0, 4, dtype=torch.int64), left)
        assert (plan.tokens_in, plan.tokens_out, plan.drops) == (4, left, False)
    with pytest.raises(InputError):
        MergePlan.from_assign(torch.empty(0, 4, dtype=torch.int64), 5)


def test_a_plan_that_merges_nothing() -> None:
    """A permutation, and the identity, on whatever device."""
    plan = MergePlan.from_assign(torch.tensor([[2, 0, 1]]))
    assert (plan.r, plan.kept.tolist()) == (0, [[1, 2, 0]])
    assert MergePlan.identity(2, 3).assign.tolist() == [[0, 1, 2]] * 2
    away = MergePlan.identity(2, 3, "meta")
    assert {field.device.type for field in (away.kept, away.source, away.target)} == {"meta"}
    x, size = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, device="meta")
    assert away.merge(x, size)[0].shape == (2, 3, 4), "sizes without values are not looked at"


def test_more_that_does_not_fit_is_refused() -> None:
    plan = MergePlan.from_assign(torch.tensor([[0, 1, 1]] * 2))
    for unfit in (torch.zeros(2, 2), torch.zeros(2, 2, 3, 1), torch.zeros(1, 2, 3), torch.zeros(2, 3, 3)):
        with pytest.raises(InputError, match="x is"):
            plan.unmerge(unfit)
    for then in (MergePlan.identity(1, 2), MergePlan.identity(2, 3)):
        with pytest.raises(InputError, match="compose"):
            plan.compose(then)
    for assign, left in (([[0, 1]], 3), ([[0, -2]], None), ([[0, 2]], 3)):
        with pytest.raises(InputError, match="assign"):
            MergePlan.from_assign(torch.tensor(assign), left)


def test_gates_and_weights_go_along() -> None:
    """A gate is of the token it stands at, wherever that goes; it multiplies the size alone."""
    plan = MergePlan.from_assign(torch.tensor([[2, 0, 1, 0], [0, 1, 2, 2]]))
    gate, weight = torch.tensor([[0.5, 1.0, 0.25], [1.0, 0.5, 0.125]]), torch.rand(2, 4)
    gated = dataclasses.replace(plan, gate=gate, weight=weight)
    spatial = gated.in_order()
    assert spatial.gate is not None
    assert spatial.gate.tolist() == [[0.25, 0.5, 1.0], [1.0, 0.5, 0.125]]
    assert spatial.weight is weight
    x = torch.randn(2, 4, 3)
    merged, sizes = gated.merge(x)
    assert torch.equal(sizes, plan.merge(x)[1] * gate)
    assert torch.equal(merged, dataclasses.replace(plan, weight=weight).merge(x)[0])


def test_lengths_that_are_symbols_stay_symbols() -> None:
    """While a model is exported for any number of tokens, a plan is made for any number of them."""

    class Nothing(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return MergePlan.identity(x.shape[0], x.shape[1]).assign

    sizes = {0: torch.export.Dim("images"), 1: torch.export.Dim("tokens")}
    program = torch.export.export(Nothing(), (torch.zeros(2, 3),), dynamic_shapes=(sizes,), strict=False)
    assert program.module()(torch.zeros(4, 5)).tolist() == [[0, 1, 2, 3, 4]] * 4


@pytest.mark.parametrize("assign", [torch.empty(2, 0, dtype=torch.int64), torch.empty(0, 4, dtype=torch.int64)])
def test_maps_of_nothing_are_maps(assign: Tensor) -> None:
    plan = MergePlan.from_assign(assign)
    assert torch.equal(plan.assign, assign)
    assert plan.tokens_in == assign.shape[1]
