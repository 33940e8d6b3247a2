"""The check at patch time: does this upstream's block still behave as its row says?

Three facts are tried on a float64 copy of one real block with a few random tokens, before anything is touched:
1. attention branch then MLP branch, without bias, is upstream's block to the bit;
2. the tap sees K, one vector per head and token;
3. `log size` as attention mask makes one token count like that many equal tokens.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.attention import close_tap, open_tap, size_bias
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.patching.family import BlockFamily
from tokenmerge.precision import no_autocast

_COPIES = 9  # equal tokens that one token stands for in the third test


def _double(block: nn.Module) -> Any:
    """A copy in float64 on the CPU, in evaluation mode and without hooks of the user's.

    In float64 even a branch that LayerScale shrinks to a millionth shows what arrives in it, and whatever
    precision the model has; and a user's hook may expect other tokens than the few that are tried here.
    """
    double = copy.deepcopy(block).to(device="cpu", dtype=torch.float64).eval()
    for module in double.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return double


def _tokens(channels: int, count: int) -> Tensor:
    return torch.randn(1, count, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def check_block(family: BlockFamily, block: Any, channels: int, name: str, library: str) -> None:
    """Raise unless the row still describes this block. Skipped on the meta device, where nothing has values.

    Raises:
        UnsupportedModelError: naming upstream's version, the block, and what differs.
    """
    if any(p.is_meta for p in block.parameters()):
        return
    with torch.no_grad(), no_autocast("cpu"):
        try:
            fault = _fault(family, _double(block), channels)
        except Exception as error:  # whatever upstream raises, the reader needs to know which block and version
            fault = f"running it in parts failed with {type(error).__name__}: {error}"
    if fault:
        version = getattr(importlib.import_module(library), "__version__", "unknown")
        raise UnsupportedModelError(
            f"{name} ({type(block).__module__}.{type(block).__qualname__}, {library} {version}) no longer behaves as "
            f"tokenmerge expects: {fault}; use a {library} version that tokenmerge lists as tested, or report this one",
            (fault,),
        )


def _fault(family: BlockFamily, block: Any, channels: int) -> str | None:
    """What differs from the row, in words; `None` when all three facts hold."""
    x = _tokens(channels, 7)
    hooks = [module.register_forward_hook(family.tap) for module in family.keys(block)]
    try:
        open_tap()
        ours = family.attention(block, x, None)
        keys = close_tap()
    finally:
        close_tap()
        for hook in hooks:
            hook.remove()
    if family.mlp is not None:
        ours = family.mlp(block, ours)
    theirs = type(block).forward(block, x)
    if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        return f"its parts differ from the whole block by {_gap(ours, theirs):.1e} although nothing is merged"
    if len(keys) != len(hooks) or any(key.dim() != 4 or key.shape[0] != 1 or key.shape[2] != 7 for key in keys):
        return f"its keys were expected as [1, heads, 7, head dim], but came as {[tuple(key.shape) for key in keys]}"
    return _fault_of_bias(family, block, x)


def _fault_of_bias(family: BlockFamily, block: Any, x: Tensor) -> str | None:
    """One token of size 9 must act on the others exactly like 9 equal tokens."""
    crowd = torch.cat([x, x[:, -1:].expand(-1, _COPIES - 1, -1)], dim=1)
    size = torch.ones(x.shape[:2], device=x.device)
    size[:, -1] = _COPIES
    wanted = family.attention(block, crowd, None)[:, : x.shape[1]]
    plain = family.attention(block, x, None)
    ours = family.attention(block, x, size_bias(size, x))
    effect, error = (wanted - plain).abs().max(), (ours - wanted).abs().max()
    if not torch.isfinite(effect) or effect <= 1e4 * torch.finfo(x.dtype).eps * wanted.abs().max():
        return None  # attention moves nothing in this block (LayerScale 0, say): there is nothing to check
    if error > 0.1 * effect:
        return f"token sizes change its attention wrongly (off by {float(error / effect):.2f} of the effect they should have)"
    return None
