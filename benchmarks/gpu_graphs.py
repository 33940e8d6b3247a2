"""GPU step: merged models as CUDA graphs by `torch.cuda.make_graphed_callables`, for inference and for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import tokenmerge

if TYPE_CHECKING:
    from gpu_steps import Bench


def graphed(bench: Bench) -> None:
    """Measure models with and without graphs, dense and merged, and compare outputs and gradients."""
    import timm  # imported here because it takes seconds and few steps need it

    small: dict[str, Any] = {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 96} if bench.rehearse else {}
    for name, r, batch in (("vit_base_patch16_224", 16, 64), ("vit_small_patch16_224", 13, 1)):
        batch, r = (2, 4) if bench.rehearse else (batch, r)
        for trains in (False, True):
            calls, gaps = {}, {}
            for variant in ("dense", "merged"):
                torch.manual_seed(0)
                model = timm.create_model(name, **small).to(bench.device, bench.dtype).train(trains)
                model.requires_grad_(trains)
                if variant == "merged":
                    tokenmerge.patch(model, r=r)
                side = 96 if bench.rehearse else 224
                images = torch.randn(batch, 3, side, side, device=bench.device).to(bench.dtype)
                wanted = step(model, images, trains)
                whole: Any = nn.Sequential(
                    model
                )  # `make_graphed_callables` refuses the hooks of a patched model itself
                if bench.device.type == "cuda":
                    whole = torch.cuda.make_graphed_callables(whole, (images.clone(),))
                found = step(whole, images, trains)
                gaps[variant] = float((found - wanted).norm() / wanted.norm())
                calls[variant] = lambda whole=whole, images=images, trains=trains: step(whole, images, trains)
            for variant, seconds in zip(calls, bench.times(list(calls.values())), strict=True):
                shape = {"model": name, "batch_size": batch, "r": r, "variant": variant, "trains": trains}
                bench.note(what="graphed", **shape, ms=1e3 * seconds, gap=gaps[variant])


def step(model: Any, images: Tensor, trains: bool) -> Tensor:
    """Run one pass, with its backward if it trains, and return the outputs or the gradient of the first parameter."""
    if not trains:
        with torch.no_grad():
            out: Tensor = model(images).float().clone()
            return out
    for parameter in model.parameters():
        parameter.grad = None
    model(images).float().square().mean().backward()
    first: Tensor = next(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return first.float().clone()
