"""How tokens that become one are combined, where the fused kernel must not, and what does not fit a plan."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.plans import drawn
from tokenmerge import InputError, MergePlan, bipartite_matching
from tokenmerge.ops import basics
from tokenmerge.ops.combine import Reduce, combine, merge_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def given() -> tuple[MergePlan, Tensor, Tensor]:
    """Several tokens join one, and some nothing; in two images."""
    plan = MergePlan.from_assign(torch.tensor([[0, 1, 0, 2, 0, 3], [3, 1, 1, 2, 0, 2]], device=DEVICE))
    size = torch.tensor([[3.0, 1, 2, 1, 5, 4], [1, 7, 2, 3, 1, 1]], device=DEVICE)
    return plan, torch.randn(2, 6, 16, device=DEVICE), size


def _dropping(plan: MergePlan) -> MergePlan:
    target = plan.target.clone()
    target[:, 0] = -1
    return dataclasses.replace(plan, target=target, drops=True)


@pytest.mark.parametrize(
    "change",
    [
        _dropping,
        lambda plan: dataclasses.replace(plan, weight=torch.rand(2, 6, device=DEVICE)),
        lambda plan: dataclasses.replace(plan, gate=torch.rand(2, 4, device=DEVICE)),
    ],
    ids=["drops", "weights", "gates"],
)
def test_what_the_kernel_does_not_know_is_left_to_torch(change: Any) -> None:
    pytest.importorskip("triton")
    plan, x, size = given()
    other = change(plan)
    found, wanted = (other.merge(x, size, backend=backend) for backend in ("triton", "torch"))
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))
    assert any(not torch.equal(one, two) for one, two in zip(found, plan.merge(x, size), strict=True))


@pytest.mark.parametrize("reduce", ["average", "max", "destination", "norm", "max_norm", "sum"])
def test_other_combinations_are_left_to_torch(reduce: Reduce) -> None:
    pytest.importorskip("triton")
    plan, x, size = given()
    found, wanted = (plan.merge(x, size, reduce, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(found[0], wanted[0])
    assert not torch.equal(found[0], plan.merge(x, size)[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sizes_of_any_dtype(backend: Any) -> None:
    pytest.importorskip("triton")
    plan, x, size = given()
    for dtype in (torch.int64, torch.float64, torch.float16):
        for found, wanted in zip(plan.merge(x, size.to(dtype), backend=backend), plan.merge(x, size), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduce", ["mean", "average", "max", "norm", "max_norm", "sum", "destination"])
def test_the_dtype_of_tokens_stays_and_is_rounded_once(reduce: Reduce, dtype: torch.dtype) -> None:
    plan, x, size = given()
    x = x.to(dtype)
    found, wanted = plan.merge(x, size, reduce)[0], plan.merge(x.double(), size, reduce)[0]
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6 * (dtype != torch.float64)
    )


def test_tokens_that_were_given_stay_as_they_were() -> None:
    """Rows are changed in place only where memory is fresh."""
    plan, x, size = given()
    before = x.clone(), size.clone()
    for reduce in ("mean", "average", "max", "norm", "max_norm", "sum", "destination"):
        for one in (plan, _dropping(plan)):
            one.merge(x, size, reduce)
            one.merge(x[:1].expand(2, -1, -1), None, reduce)
    assert torch.equal(x, before[0])
    assert torch.equal(size, before[1])


def test_vectors_of_no_length_have_no_direction() -> None:
    """A mean of 0 stays 0, and nothing divides by it."""
    plan = MergePlan.from_assign(torch.tensor([[0, 0]]))
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    for reduce in ("norm", "max_norm"):
        assert plan.merge(opposite, None, reduce)[0].tolist() == [[[0.0, 0.0]]]
    assert plan.merge(opposite, torch.zeros(1, 2))[0].tolist() == [[[1.0, 0.0]]]


def test_a_gradient_through_sizes_is_not_one_through_means() -> None:
    """A matcher that learns gets its gradient where sizes weigh in attention, not where tokens become one."""
    plan, x, size = given()
    learned, tokens = size.clone().requires_grad_(), x.clone().requires_grad_()
    merged, sizes = plan.merge(tokens, learned)
    assert sizes.requires_grad
    (grad,) = torch.autograd.grad(sizes.sum(), learned, retain_graph=True)
    assert torch.equal(grad, torch.ones_like(size))
    through_means: tuple[Any, ...] = torch.autograd.grad(merged.sum(), learned, retain_graph=True, allow_unused=True)
    assert through_means == (None,)
    (known,) = torch.autograd.grad(merged.square().sum(), tokens)
    plain = x.clone().requires_grad_()
    torch.testing.assert_close(known, torch.autograd.grad(plan.merge(plain, size)[0].square().sum(), plain)[0])
    torch.testing.assert_close(merged.detach(), plan.merge(x, size)[0])
    assert torch.equal(sizes.detach(), plan.merge(x, size)[1])


@pytest.mark.parametrize(
    ("field", "unfit"),
    [
        ("x", torch.zeros(2, 6)),
        ("x", torch.zeros(2, 6, 3, 1)),
        ("x", torch.zeros(1, 6, 3)),
        ("x", torch.zeros(2, 5, 3)),
        ("x", torch.zeros(2, 6, 3, dtype=torch.int32)),
        ("x", torch.zeros(2, 6, 3).to_sparse()),
        ("x", torch.zeros(2, 6, 3, device="meta")),
        ("x", None),
        ("size", torch.zeros(2, 5)),
        ("size", torch.zeros(2, 6, 1)),
        ("size", torch.zeros(2, 6).to_sparse()),
        ("size", torch.zeros(2, 6, device="meta")),
        ("size", [[1.0] * 6] * 2),
    ],
)
def test_what_does_not_fit_a_plan_is_named(field: str, unfit: Any) -> None:
    """Asked of the rows themselves, before anything looks at values."""
    plan, x, size = given()
    with pytest.raises(InputError, match=f"^{field} is"):
        merge_rows(**{"x": x, "size": size, "plan": plan, field: unfit})


def test_the_paths_of_one_image_and_of_many_are_one() -> None:
    """Rows of one image need no numbers of their own; the results are the same to the bit."""
    metric, size = drawn(0, batch=3, tokens=20)
    plan, x = bipartite_matching(metric, 8), torch.randn(3, 20, 5)
    together = plan.merge(x, size)
    for image in range(3):
        one_image = slice(image, image + 1)
        alone = MergePlan(plan.kept[one_image], plan.source[one_image], plan.target[one_image])
        for one, all_ in zip(alone.merge(x[one_image], size[one_image]), together, strict=True):
            assert torch.equal(one[0], all_[image])


def test_an_unknown_combination_is_refused_by_the_function_itself() -> None:
    plan, x, size = given()
    with pytest.raises(InputError, match="must be one of mean"):
        combine(x, size, None, "median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must be one of mean"):
        plan.merge(x, size, "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("reduce", ["mean", "norm", "max_norm"])
def test_weights_of_tokens_that_are_dropped_count_for_nothing(reduce: Reduce) -> None:
    """A plan that drops some tokens and weighs the others: as if the dropped ones had never been there."""
    weight = torch.tensor([[0.5, 2.0, 1.5, 0.25, 9.0, 3.0]], device=DEVICE)
    plan = dataclasses.replace(MergePlan.from_assign(torch.tensor([[0, 1, 0, 1, -1, 0]], device=DEVICE)), weight=weight)
    x = torch.randn(1, 6, 16, device=DEVICE)
    without = dataclasses.replace(
        MergePlan.from_assign(torch.tensor([[0, 1, 0, 1, 0]], device=DEVICE)), weight=weight[:, [0, 1, 2, 3, 5]]
    )
    found, wanted = plan.merge(x, reduce=reduce), without.merge(x[:, [0, 1, 2, 3, 5]], reduce=reduce)
    torch.testing.assert_close(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    if reduce == "mean":
        share = weight[0, [0, 2, 5]] / weight[0, [0, 2, 5]].sum()
        torch.testing.assert_close(found[0][0, 0], (share.unsqueeze(1) * x[0, [0, 2, 5]]).sum(dim=0))


def test_a_default_device_does_not_reach_what_is_kept() -> None:
    """Ranges of integers are kept for later calls; one that was made on "meta" broke all of them."""
    basics._made.cache_clear()
    keys = torch.randn(1, 23, 4)
    with torch.device("meta"):
        bipartite_matching(keys, 5, backend="torch")
    assert bipartite_matching(keys, 5, backend="torch").kept.device.type == "cpu"
    basics._made.cache_clear()
