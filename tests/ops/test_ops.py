"""Triton's kernels against their references: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import tokenmerge
from tokenmerge import MergePlan, bipartite_matching
from tokenmerge.attention.tap import size_bias
from tokenmerge.errors import ConfigError
from tokenmerge.ops import matching, takes_triton, triton_refusals
from tokenmerge.ops.combine import merge_rows

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
THOUSANDS = 2 * matching.LONGEST_RANKED + 129  # tokens: ranks and the plan have launches of their own
# one rounding of the result; the interpreter cuts bfloat16 off where a GPU rounds it, hence a whole last place there
ULP = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
SHAPES = [  # N, protected, D, heads
    (2, 0, 32, 1),
    (40, 1, 136, 2),
    (33, 1, 700, 1),
    (3, 0, 48, 2),
    (3, 1, 64, 1),
    (17, 2, 80, 3),
    (64, 0, 64, 1),
    (129, 1, 128, 2),
    (197, 1, 64, 3),
    (261, 5, 96, 1),
    (300, 0, 72, 1),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def scores_of(keys: Tensor, protected: int) -> Tensor:
    """All similarities `[B, |A|, |B|]` in float64."""
    mean = keys.double().mean(dim=1)
    unit = mean / mean.norm(dim=2, keepdim=True).clamp_min(1e-12)
    a, b = unit[:, protected + protected % 2 :: 2], unit[:, protected + 1 - protected % 2 :: 2]
    scores: Tensor = a @ b.transpose(1, 2)
    return scores


def check_edges(keys: Tensor, protected: int) -> None:
    from tokenmerge.ops import launch, matching

    scores = scores_of(keys, protected)
    plan, best, partner, found = matching.launches(keys, 1, protected)
    for memory in (*plan, best, partner):
        memory.fill_(-7)  # so that what is not written shows
    launch.start_all(found)
    torch.testing.assert_close(best.double(), scores.amax(dim=2), atol=2e-6, rtol=0)
    reached = scores.gather(2, partner.long().unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(reached, scores.amax(dim=2), atol=2e-6, rtol=0)


@DTYPES
@pytest.mark.parametrize(("tokens", "protected", "dim", "heads"), SHAPES)
def test_edges(tokens: int, protected: int, dim: int, heads: int, dtype: torch.dtype) -> None:
    check_edges(draw(2, heads, tokens, dim, dtype=dtype), protected)
    if heads > 1:  # keys as they lie in a fused projection
        qkv = draw(2, tokens, 3, heads, dim, dtype=dtype)
        check_edges(qkv.permute(2, 0, 3, 1, 4)[1], protected)


@pytest.mark.parametrize(("tokens", "protected", "dim", "heads"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_plan_is_that_of_a_stable_sort(tokens: int, protected: int, dim: int, heads: int, share: float) -> None:
    """Exactly, and with many equal scores."""
    from tokenmerge.ops import launch, matching

    most = (tokens - protected) // 2
    r = max(1, round(share * most))
    count_a, count_b = matching.sides(tokens, protected)
    best = (draw(3, count_a) * 4).round() / 4
    partner = torch.randint(count_b, (3, count_a), dtype=torch.int32, device=DEVICE)
    keep, source, target = plan = matching.empty_plan(best, tokens, r)
    launch.start_all(matching.plan_of_edges(best, partner, plan, tokens, r, protected))
    order = best.argsort(dim=1, descending=True, stable=True)
    chosen, rest = order[:, :r], order[:, r:].sort(dim=1).values
    first_a, first_b = protected + protected % 2, protected + 1 - protected % 2
    position = torch.arange(tokens, device=DEVICE)
    assert torch.equal(source, chosen * 2 + first_a)
    assert torch.equal(target, partner.long().gather(1, chosen) + protected + count_a - r)
    others = position[first_b::2].expand(3, -1)
    assert torch.equal(keep, torch.cat([position[:protected].expand(3, -1), rest * 2 + first_a, others], dim=1))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e15])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_equal_zero_and_huge_keys(scale: float, protected: int) -> None:
    """Few different keys, all of them exact in float32, so that both backends see the same ties."""
    kinds = torch.eye(32, device=DEVICE)[:4] * scale
    metric = kinds[torch.randint(4, (2, 75), device=DEVICE)]
    metric[:, 5] = 0.0
    same_plan(
        bipartite_matching(metric, 20, protected, backend="torch"),
        bipartite_matching(metric, 20, protected, backend="triton"),
    )


def same_plan(one: MergePlan, other: MergePlan) -> None:
    assert torch.equal(one.kept, other.kept)
    assert torch.equal(one.source, other.source)
    assert torch.equal(one.target, other.target)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [32, 128])
def test_edges_of_thousands_of_tokens(dim: int) -> None:
    check_edges(draw(1, 1, THOUSANDS, dim), protected=1)


@pytest.mark.slow
@pytest.mark.parametrize("r", [1, THOUSANDS // 2])
def test_plans_of_thousands_of_tokens(r: int) -> None:
    metric = torch.eye(128, device=DEVICE)[torch.randint(128, (1, THOUSANDS), device=DEVICE)]
    same_plan(*(bipartite_matching(metric, r, 1, backend=backend) for backend in ("torch", "triton")))


@DTYPES
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(("tokens", "protected", "channels", "r"), [(2, 0, 16, 1), (50, 1, 40, 24), (97, 1, 192, 16)])
def test_merge_and_its_gradient(
    tokens: int, protected: int, channels: int, r: int, sized: bool, dtype: torch.dtype
) -> None:
    plan = bipartite_matching(draw(2, tokens, 8), r, protected, backend="torch")
    size = torch.randint(1, 9, (2, tokens), device=DEVICE).float() if sized else None
    x = draw(2, tokens, channels, dtype=dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    merged, sizes = plan.merge(x, size, backend="triton")
    wanted, wanted_sizes = plan.merge(exact, size, backend="torch")
    assert merged.dtype == dtype
    assert torch.equal(sizes, wanted_sizes)
    torch.testing.assert_close(merged.double(), wanted, atol=ULP[dtype], rtol=ULP[dtype])
    alone = wanted_sizes == (1.0 if size is None else size.gather(1, plan.kept))
    assert torch.equal(merged[alone], x.gather(1, plan.kept.unsqueeze(2).expand_as(merged))[alone])
    grad = draw(*merged.shape, dtype=dtype)
    (found,) = torch.autograd.grad(merged, x, grad)
    (true,) = torch.autograd.grad(wanted, exact, grad.double())
    torch.testing.assert_close(found.double(), true, atol=ULP[dtype], rtol=ULP[dtype])


def test_padding_merges_into_tokens_without_weight() -> None:
    """Sizes of 0 on either side, and on both: nothing divides by 0, forwards and backwards."""
    plan = MergePlan.from_assign(torch.tensor([[0, 1, 2, 0, 1, 2]], device=DEVICE))
    size = torch.tensor([[0.0, 2.0, 0.0, 3.0, 0.0, 0.0]], device=DEVICE)
    x = draw(1, 6, 16).requires_grad_()
    results = [plan.merge(x, size, backend=backend) for backend in ("torch", "triton")]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[1][0][0], torch.stack([x[0, 3], x[0, 1], x[0, 2]]))
    weights = draw(1, 3, 16)
    grads = [torch.autograd.grad(y, x, weights)[0] for y, _ in results]
    torch.testing.assert_close(*grads)


def test_infinite_tokens_stay_where_they_are() -> None:
    """A row that nothing joins is copied, whatever stands in other rows or in its own."""
    plan = bipartite_matching(draw(1, 20, 8), 4, backend="torch")
    x = draw(1, 20, 16)
    x[0, plan.source[0, 0]] = float("inf")
    alone = torch.ones(plan.tokens_out, dtype=torch.bool, device=DEVICE)
    alone[plan.target[0]] = False
    x[0, plan.kept[0][alone][0]] = float("-inf")
    merged = plan.merge(x, backend="triton")[0]
    assert torch.equal(merged[0, alone], x[0, plan.kept[0][alone]])


def test_strided_tokens_and_gradients() -> None:
    """Neither needs to be contiguous, and an expanded gradient (of a mean, say) is no special case."""
    plan = bipartite_matching(draw(2, 21, 8), 7, backend="torch")
    x = draw(21, 2, 48).transpose(0, 1)[..., ::2].detach().requires_grad_()
    results = [plan.merge(x, backend=backend)[0] for backend in ("torch", "triton")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[torch.autograd.grad(y.mean(), x)[0] for y in results])


def test_every_run_gives_the_same_bits() -> None:
    keys, x = draw(1, 2, 129, 64), draw(1, 129, 64)
    first, again = (bipartite_matching(keys, 60, backend="triton") for _ in range(2))
    same_plan(first, again)
    merged = [first.merge(x, backend="triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*merged, strict=True))


def test_plans_of_images_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that is the last of its image plans that image, however many programs and images there are."""
    from tokenmerge.ops import matching

    keys = draw(4, 2, 200, 32)
    together = bipartite_matching(keys, 70, 1, backend="triton")
    same_plan(together, bipartite_matching(keys, 70, 1, backend="torch"))
    for index in range(4):
        alone = bipartite_matching(keys[index : index + 1], 70, 1, backend="triton")
        keep, source, target = (part[index : index + 1] for part in (together.kept, together.source, together.target))
        same_plan(alone, MergePlan(keep, source, target))
    monkeypatch.setattr(matching, "LONGEST_RANKED", 0)  # ranks and plans in launches of their own
    same_plan(together, bipartite_matching(keys, 70, 1, backend="triton"))


def test_broken_keys_stay_in_bounds() -> None:
    """NaN and infinity give some plan of the right shape: each token once, each target a position."""
    keys = draw(2, 1, 50, 16)
    keys[0, 0, 7], keys[0, 0, 12], keys[1] = float("nan"), float("inf"), float("nan")
    plan = bipartite_matching(keys, 20, 1, backend="triton")
    together = torch.cat([plan.kept, plan.source], dim=1).sort(dim=1).values
    assert torch.equal(together, torch.arange(50, device=DEVICE).expand(2, -1))
    assert bool(((plan.target >= 0) & (plan.target < plan.tokens_out)).all())


@DTYPES
@pytest.mark.parametrize("tokens", [10, 50, 61])
def test_logarithms_of_sizes(dtype: torch.dtype, tokens: int) -> None:
    """As attention adds them: the torch reference to one rounding, padding as the least number, rows aligned."""
    plan = bipartite_matching(draw(2, tokens, 8), 3, 1, backend="torch")
    size = torch.randint(0, 9, (2, tokens), device=DEVICE).float()
    merged = merge_rows(draw(2, tokens, 16, dtype=dtype), size, plan, backend="triton", log=dtype)
    assert merged.log_size is not None
    wanted = size_bias(merged.size, merged.x)
    found = size_bias(merged.size, merged.x, log_size=merged.log_size)
    assert wanted is not None
    assert found is not None
    assert found.dtype == dtype
    assert found.untyped_storage().data_ptr() == merged.log_size.untyped_storage().data_ptr()
    torch.testing.assert_close(found, wanted, atol=ULP[dtype], rtol=ULP[dtype])
    assert all(stride % 8 == 0 for stride in found.stride()[:1])
    assert merge_rows(draw(2, tokens, 16), size, plan, backend="triton").log_size is None


def test_an_empty_batch() -> None:
    plan = bipartite_matching(draw(0, 2, 20, 16), 4, 1, backend="triton")
    assert plan.kept.shape == (0, 16)
    assert plan.merge(draw(0, 20, 8), backend="triton")[0].shape == (0, 16, 8)


def test_as_torch_operators() -> None:
    """Schemas, fake kernels, autograd registration and AOT dispatch, as torch checks them."""
    from tokenmerge.ops import matching, merging

    keep, source, target = matching.match(draw(2, 2, 20, 16), 4, 1)
    size = torch.rand(2, 20, device=DEVICE) + 1
    torch.library.opcheck(matching._operator, (draw(2, 2, 20, 16), 4, 1))
    for x, sizes, log in ((draw(2, 20, 16).requires_grad_(), size, None), (draw(2, 20, 16), None, torch.bfloat16)):
        torch.library.opcheck(merging._operator, (x, sizes, keep, source, target, log))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_a_whole_model(name: str) -> None:
    """Keys go to the kernel per head; logits and gradients are those of plain torch."""
    sizes: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 96, "num_classes": 5}
    model = timm.create_model(name, **sizes).to(DEVICE).eval()
    images = draw(2, 3, 96, 96)
    found = []
    for backend in ("torch", "triton"):
        with tokenmerge.patched(model, r=5, backend=backend):
            model.zero_grad()
            logits = model(images)
            logits.square().sum().backward()
            found.append((logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that was asked for and cannot run is an error with the reasons; "auto" takes plain torch."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    here = torch.zeros(1, 4, 8, dtype=torch.float64)
    assert "float64" in triton_refusals(here)[0]
    assert not takes_triton("auto", here)
    with pytest.raises(ConfigError, match=r"on 'cpu'.*float64.*use backend='auto'"):
        bipartite_matching(here, 1, backend="triton")
    with pytest.raises(ConfigError, match=r"on 'cpu'"):
        MergePlan.identity(1, 4).merge(here.float(), backend="triton")
    with pytest.raises(ConfigError, match="must be one of auto, torch, triton"):
        tokenmerge.MergeConfig(r=1, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be one of auto, torch, triton"):
        bipartite_matching(here, 1, backend="cuda")  # type: ignore[arg-type]
