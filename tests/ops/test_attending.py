"""Triton's kernel of attention with sizes against attention in float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.helpers.tiny import tiny

pytest.importorskip("triton")

import tokenmerge
from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.tap import size_bias
from tokenmerge.errors import ConfigError
from tokenmerge.ops import attending

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# of the largest output: scores and weights are rounded to the factors of products, and the output once more
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
SHAPES = [  # queries, keys, channels of a head: tiles that are full, nearly full and nearly empty
    (7, 7, 16),
    (64, 64, 64),
    (65, 65, 64),
    (33, 63, 64),
    (1, 130, 32),
    (197, 197, 64),
    (90, 85, 64),
    (20, 20, 32),
    (17, 129, 64),
]


def reference(q: Tensor, k: Tensor, v: Tensor, log: Tensor, scale: float) -> Tensor:
    """softmax(QKᵀ·scale + log size) V in float64; paper, section 3."""
    scores = q.double() @ k.double().transpose(2, 3) * scale + log.double()[:, :, None, :]
    return scores.softmax(dim=-1) @ v.double()


def draw(
    batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; as they lie in a fused projection where all have as many tokens."""
    torch.manual_seed(0)
    if queries == keys:
        fused = torch.randn(batch, keys, 3, heads, dim, device=DEVICE).to(dtype).permute(2, 0, 3, 1, 4)
        return fused[0], fused[1], fused[2]
    q = torch.randn(batch, heads, queries, dim, device=DEVICE).to(dtype)
    k, v = torch.randn(2, batch, heads, keys, dim, device=DEVICE).to(dtype)
    return q, k, v


def check(q: Tensor, k: Tensor, v: Tensor, log: Tensor, scale: float) -> None:
    with torch.no_grad():
        found = attending.attend(q, k, v, log, scale)
    wanted = reference(q, k, v, log, scale)
    assert found.dtype == q.dtype
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    gap = float((found.double() - wanted).abs().max() / wanted.abs().max())
    assert gap <= TOLERANCE[q.dtype], f"{gap:.1e}"


@DTYPES
@pytest.mark.parametrize(("queries", "keys", "dim"), SHAPES)
def test_values(queries: int, keys: int, dim: int, dtype: torch.dtype) -> None:
    """Large sizes, and padding at the end and as the whole first tile of keys."""
    q, k, v = draw(2, 3, queries, keys, dim, dtype)
    size = torch.randint(1, 400, (2, keys), device=DEVICE).float()
    size[:, -2] = 0
    size[1, : min(64, keys - 1)] = 0
    bias = size_bias(size, q)
    assert bias is not None
    check(q, k, v, bias.squeeze(2).expand(2, 3, keys), dim**-0.5)


def test_other_logarithms() -> None:
    """Each head its own, rows that are aligned, −inf for padding, and another dtype than the tokens'."""
    q, k, v = draw(2, 2, 30, 30, 32, torch.float16)
    rows = torch.zeros(2, 2, 32, device=DEVICE)
    rows[:, :, 4:9] = torch.randn(2, 2, 5, device=DEVICE)
    rows[:, 1, 3] = float("-inf")
    check(q, k, v, rows[:, :, :30], 0.3)


def test_strides() -> None:
    """What does not begin at multiples of 16 bytes, or does not lie side by side, is copied."""
    q, k, v = draw(1, 2, 21, 21, 64, torch.float16)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    shifted = torch.zeros(1 + q.numel(), device=DEVICE, dtype=q.dtype)[1:].view(1, 2, 21, 64).copy_(q)
    wide = torch.zeros(1, 2, 21, 65, device=DEVICE, dtype=v.dtype)[..., :64].copy_(v)
    check(shifted, turned, wide, torch.zeros(1, 2, 21, device=DEVICE), 0.2)


def test_images_without_tokens_give_zeros() -> None:
    """Not NaN, where all that an image has is padding."""
    q, k, v = draw(1, 1, 5, 5, 16, torch.float16)
    found = attending.attend(q, k, v, torch.full((1, 1, 5), float("-inf"), device=DEVICE), 1.0)
    assert torch.equal(found, torch.zeros_like(found))


def test_what_it_cannot_do_is_done_by_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, dropout, full precision, heads of other than 64 channels, values of other widths; never a wrong answer."""

    def never(*_: Any) -> Tensor:
        raise AssertionError("the kernel was started")

    monkeypatch.setattr(attending, "attend", never)
    log = torch.randn(1, 1, 1, 9, device=DEVICE)
    kinds = [
        (torch.float16, 64, 64, True, 0.0),
        (torch.float32, 64, 64, False, 0.0),
        (torch.float64, 64, 64, False, 0.0),
        (torch.float16, 80, 80, False, 0.0),
        (torch.float16, 64, 24, False, 0.0),
        (torch.float16, 64, 64, False, 0.5),
    ]
    for dtype, dim, of_values, learns, dropout in kinds:
        q, k = (torch.randn(1, 2, 9, dim, device=DEVICE, dtype=dtype, requires_grad=learns) for _ in range(2))
        v = torch.randn(1, 2, 9, of_values, device=DEVICE, dtype=dtype)
        with AttentionCall("triton"):
            found = torch.nn.functional.scaled_dot_product_attention(q, k, v, log.to(dtype), dropout)
        if not dropout:
            wanted = reference(q, k, v, log[:, 0].expand(1, 2, 9).to(dtype), dim**-0.5)
            torch.testing.assert_close(found.double(), wanted, atol=2e-3, rtol=2e-3)
    q, k, v = draw(1, 2, 9, 9, 64, torch.float16)
    with AttentionCall("triton"), pytest.raises(AssertionError, match="was started"):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, log.half())


def test_an_empty_batch() -> None:
    q, k, v = draw(0, 2, 9, 9, 16, torch.float16)
    assert attending.attend(q, k, v, torch.zeros(0, 2, 9, device=DEVICE), 1.0).shape == (0, 2, 9, 16)


def test_as_a_torch_operator() -> None:
    q, k, v = draw(1, 2, 9, 9, 16, torch.float16)
    torch.library.opcheck(attending._operator, (q, k, v, torch.randn(1, 2, 9, device=DEVICE), 0.5))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_whole_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a merged model are those with a mask, and its summary names the form."""
    model = timm.create_model(name, img_size=96, depth=3, embed_dim=128, num_heads=2, num_classes=7).to(
        DEVICE, torch.bfloat16
    )
    images = torch.randn(2, 3, 96, 96, device=DEVICE, dtype=torch.bfloat16)
    started: list[Tensor] = []
    attend = attending.attend

    def watched(query: Tensor, *rest: Any) -> Tensor:
        started.append(query)
        return attend(query, *rest)

    monkeypatch.setattr(attending, "attend", watched)
    found = []
    for form in ("mask", "triton"):
        with torch.no_grad(), tokenmerge.patched(model.eval(), r=5, attention=form) as handle:
            found.append(model(images))
            assert form in handle.summary().attention
    torch.testing.assert_close(found[0], found[1], atol=3e-2, rtol=3e-2)
    assert len(started) == 2  # the first block has no sizes yet


def test_a_device_without_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = tiny("deit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"attention='triton' cannot run: .*'cpu'.*use attention='auto'"):
        tokenmerge.patch(model, r=5, attention="triton")
