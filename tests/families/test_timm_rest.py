"""One name per row of timm's other flat transformers: copies, single images, bfloat16, compiled blocks, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import tokenmerge
from tests.helpers import flat
from tests.helpers.tiny import images_for, tiny

_NAMES = [
    "eva02_tiny_patch14_224",
    "eva02_enormous_patch14_clip_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_relpos_medium_patch16_rpn_224",
    "cait_xxs24_224",
    "naflexvit_base_patch16_gap",
    "qwen3_vit_88m",
    "deepseek_vit_412m",
]
NAMES = [name for name in _NAMES if name in flat.names(*flat.OTHERS)]


@torch.no_grad()
def runs_in_bfloat16(name: str) -> bool:
    """Whether upstream does; mixed rotary embeddings of timm 1.0.26 do not."""
    model = tiny(name)
    try:
        model.bfloat16()(images_for(model, batch=1).bfloat16())
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_battery(name: str) -> None:
    model = tiny(name)
    first, one = images_for(model), images_for(model, batch=1)
    second = first.flip(-1)
    tokenmerge.patch(model, r=[5, 0, 7])
    with torch.no_grad():
        wanted = model(one)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(one), wanted)
        torch._dynamo.reset()
        getattr(twin, "encoder", twin).blocks[-1].compile(fullgraph=True, backend="aot_eager")  # takes sizes, merges
        torch.testing.assert_close(twin(one), wanted, rtol=1e-4, atol=1e-4)
        with torch._dynamo.config.patch(error_on_recompile=True):
            twin(one)
        if runs_in_bfloat16(name):
            assert copy.deepcopy(model).bfloat16()(one.bfloat16()).isfinite().all()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        views = [model(first), model(second)]
        (views[0].square().mean() + views[1].square().mean()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.set_grad_checkpointing(True)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "aug_active"):
            module.aug_active = False
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
