"""Sizes count patches, so they are exact: half precision would round them above 256 (bfloat16) and 2048 (float16)."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge import MergePlan, register_matcher
from tokenmerge.config import Backend
from tokenmerge.ops.combine import Reduce
from tokenmerge.patching.state import token_sizes, weighted_mean

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
COUNTS = [256, 1, 2048, 1, 65536, 1, 2**24 - 2, 1]
"""Pairs whose sums need every bit that float32 has, and more than half precision has."""
PAIRS = MergePlan.from_assign(torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]] * 2))
SUMS = [257.0, 2049.0, 65537.0, 2.0**24 - 1]


@DTYPES
@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("reduce", ["mean", "average", "max", "destination", "norm", "max_norm", "sum"])
def test_sums_of_sizes_are_exact(reduce: Reduce, given: torch.dtype, dtype: torch.dtype) -> None:
    size = torch.tensor([COUNTS, COUNTS[::-1]]).to(given)
    _, sizes = PAIRS.merge(torch.randn(2, 8, 4).to(dtype), size, reduce)
    assert sizes.dtype == torch.float32
    assert sizes.tolist() == [SUMS, SUMS[::-1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_sizes_are_exact_in_the_kernel(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = MergePlan.from_assign(PAIRS.assign.to(device))
    size = torch.tensor([COUNTS, COUNTS[::-1]], device=device).float()
    _, sizes = plan.merge(torch.randn(2, 8, 16, device=device).to(dtype), size, backend="triton")
    assert sizes.tolist() == [SUMS, SUMS[::-1]]


@DTYPES
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_tokens_without_sizes_are_counted_exactly(dtype: torch.dtype, backend: Backend) -> None:
    plan = MergePlan.from_assign(torch.tensor([[0] * 257 + [1] * 2051]))
    for reduce in ("mean", "average", "sum", "max", "norm"):
        assert plan.merge(torch.randn(1, 2308, 2).to(dtype), None, reduce, backend)[1].tolist() == [[257.0, 2051.0]]


def test_dropped_tokens_leave_exact_sums() -> None:
    plan = MergePlan.from_assign(torch.tensor([[0, 0, -1, 1, 1, -1]]))
    size = torch.tensor([[2048.0, 1.0, 7.0, 1.0, 256.0, 9.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert plan.merge(torch.randn(1, 6, 2).to(dtype), size)[1].tolist() == [[2049.0, 257.0]]


@pytest.mark.parametrize("counts", [(2049, 1, 3), (257, 2, 4099), (1, 65537, 5)])
def test_means_weigh_by_exact_sizes(counts: tuple[int, ...]) -> None:
    """In float64, where a size that was rounded on the way would show at once."""
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    size = torch.tensor([counts]).float()
    wanted = (x * size.double().unsqueeze(2)).sum(dim=1) / sum(counts)
    merged, _ = MergePlan.from_assign(torch.tensor([[0, 0, 0]])).merge(x, size)
    torch.testing.assert_close(merged[:, 0], wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(weighted_mean(x, size), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pooled_in_float32(dtype: torch.dtype) -> None:
    """The mean is rounded once: neither the sizes, nor their sum, nor a running total are."""
    x = torch.randn(3, 50, 4).to(dtype)
    size = torch.randint(1, 4099, (3, 50)).float()
    wanted = (x.double() * size.double().unsqueeze(2)).sum(dim=1) / size.double().sum(dim=1, keepdim=True)
    found = weighted_mean(x, size)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def _heap(metric: Tensor, r: int, protected: int = 0) -> MergePlan:
    """The first r tokens that may merge join the last."""
    assign = torch.arange(metric.shape[1]) - r
    assign[:protected] = torch.arange(protected)
    assign[protected : protected + r] = metric.shape[1] - r - 1
    return MergePlan.from_assign(assign.expand(metric.shape[0], -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
def test_sizes_stay_exact_on_their_way_through_a_model(dtype: Any) -> None:
    """What one block hands to the next, and what readers are told, whatever the dtype of the tokens."""
    register_matcher("heap", most="all but one")(_heap)
    model: Any = tiny("deit_tiny_patch16_224", img_size=16 * 46, num_heads=1, embed_dim=16)
    images = images_for(model, batch=1)
    cast: Any = contextlib.nullcontext()
    if dtype == "autocast":
        cast = torch.autocast("cpu", torch.bfloat16)
    else:
        model, images = model.to(dtype), images.to(dtype)
    seen: list[Tensor] = []
    with tokenmerge.patched(model, r=[2100, 2, 2], matcher="heap"), torch.no_grad(), cast:
        for block in model.blocks:
            block.register_forward_hook(lambda module, args, out: seen.append(token_sizes(out)))
        seen.append(token_sizes(model.forward_features(images)))
    assert [(size.dtype, float(size.max()), float(size.sum())) for size in seen] == [
        (torch.float32, largest, 46 * 46 + 1) for largest in (2101, 2103, 2105, 2105)
    ]
