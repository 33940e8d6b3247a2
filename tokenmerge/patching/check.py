"""The check at patch time: does this upstream's block still behave as its row says?

Three facts are tried on one real block with a few random tokens, before anything is touched:
1. attention branch then MLP branch, without bias, is upstream's block to the bit;
2. the tap sees K, one vector per head and token;
3. `log size` as attention mask makes one token count like that many equal tokens.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.attention import close_tap, open_tap, size_bias
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.patching.family import BlockFamily
from tokenmerge.precision import no_autocast

_COPIES = 9  # equal tokens that one token stands for in the third test


@contextlib.contextmanager
def _quietly(block: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or autocast; every module gets its own mode back."""
    modes = [(module, module.training) for module in block.modules()]
    device = next(block.parameters()).device.type
    block.eval()
    try:
        with torch.no_grad(), no_autocast(device):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tokens(block: nn.Module, channels: int, count: int) -> Tensor:
    parameter = next(p for p in block.parameters() if p.is_floating_point())
    noise = torch.randn(1, count, channels, generator=torch.Generator().manual_seed(0))
    return noise.to(device=parameter.device, dtype=parameter.dtype)


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
    with _quietly(block):
        try:
            fault = _fault(family, block, channels)
        except UnsupportedModelError:
            raise
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
    x = _tokens(block, channels, 7)
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
    # the branch may be tiny beside the residual (LayerScale), so compare what attention adds to x
    effect, error = (wanted - plain).abs().max(), (ours - wanted).abs().max()
    if not torch.isfinite(effect) or effect <= 32 * torch.finfo(x.dtype).eps * wanted.abs().max():
        return None  # attention moves nothing in this block (LayerScale 0, say): there is nothing to see
    if error > 0.1 * effect:
        return f"token sizes change its attention wrongly (off by {float(error / effect):.2f} of the effect they should have)"
    return None
