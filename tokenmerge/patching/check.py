"""The check at patch time: does this upstream's block still behave as its row says?

Three facts are tried on a float64 copy of one real block with a few random tokens, before anything is touched:
1. attention branch then MLP branch, without bias, is upstream's block to the bit;
2. the tap sees K, one vector per head and token;
3. `log size` as attention mask makes one token count like that many equal tokens.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.forms import Choice, choice_for
from tokenmerge.attention.tap import AttentionContext, Tap, size_bias
from tokenmerge.errors import ConfigError, UnsupportedModelError
from tokenmerge.ops.basics import autocast_dtype, no_autocast
from tokenmerge.ops.modes import lacks_values
from tokenmerge.patching.families.family import BlockFamily
from tokenmerge.patching.install import install_inside
from tokenmerge.patching.swap import Swapped, is_sharded, restore_class
from tokenmerge.patching.target import Target

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
        if isinstance(module, Swapped):
            restore_class(module)
    return double


def _tokens(channels: int, count: int) -> Tensor:
    return torch.randn(1, count, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def check_block(family: BlockFamily, block: Any, channels: int, name: str, library: str) -> None:
    """Raise unless the row still describes this block. Skipped where parameters have no values (meta, fake tensors).

    Raises:
        UnsupportedModelError: naming upstream's version, the block, and what differs.
    """
    if lacks_values(block):
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


def _attend(
    family: BlockFamily,
    block: Any,
    x: Tensor,
    bias: Tensor | None = None,
    call: type[AttentionCall] = AttentionCall,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The attention branch of a block with its hooks in place, and what the tap noted."""
    arguments = family.example(block).arguments
    with Tap(AttentionContext(bias)) as tap:
        if family.keys_at_call or call is not AttentionCall:
            with call(watch=family.keys_at_call, bias=bias if family.keys_at_call else None):
                out = family.attention(block, x, bias, **arguments)
        else:
            out = family.attention(block, x, bias, **arguments)
    return out, tap.keys if tap.inside is None or not family.keys_at_call else (tap.inside[1],)


def _fault(family: BlockFamily, block: Any, channels: int) -> str | None:
    """What differs from the row, in words; `None` when all three facts hold."""
    example = family.example(block)
    x = _tokens(channels, example.tokens)
    no_mask = {family.mask: None} if family.mask else {}
    # nn.MultiheadAttention has a kernel of its own for inference, which rounds otherwise; it steps back within a mode
    with AttentionCall() if family.keys_at_call else contextlib.nullcontext():
        theirs = type(block).forward(block, x, **no_mask, **example.arguments)
    if isinstance(theirs, tuple):
        theirs = theirs[0]
    install_inside(family, block)
    ours, keys = _attend(family, block, x)
    if family.mlp is not None:
        ours = family.mlp(block, ours)
    if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        return f"its parts differ from the whole block by {_gap(ours, theirs):.1e} although nothing is merged"
    showing = 1 if family.keys_at_call else len(family.keys(block))
    if len(keys) != showing:
        return f"{showing} modules were expected to show keys, but {len(keys)} did"
    metric = family.metric(block, keys)
    if metric.dim() != 3 or metric.shape[:2] != x.shape[:2]:
        return f"its keys were expected as [1, {x.shape[1]}, head dim], but came as {tuple(metric.shape)}"
    return None if family.needs_source else _fault_of_bias(family, block, x)


def _fault_of_bias(family: BlockFamily, block: Any, x: Tensor) -> str | None:
    """One token of size 9 must act on the others exactly like 9 equal tokens."""
    if family.positions is not None:
        return None  # equal tokens would stand at different positions: the tests check these rows
    crowd = torch.cat([x, x[:, -1:].expand(-1, _COPIES - 1, -1)], dim=1)
    size = torch.ones(x.shape[:2], device=x.device)
    size[:, -1] = _COPIES
    wanted = _attend(family, block, crowd)[0][:, : x.shape[1]]
    plain = _attend(family, block, x)[0]
    ours = _attend(family, block, x, size_bias(size, x))[0]
    effect, error = (wanted - plain).abs().max(), (ours - wanted).abs().max()
    if not torch.isfinite(effect) or effect <= 1e4 * torch.finfo(x.dtype).eps * wanted.abs().max():
        return None  # attention moves nothing in this block (LayerScale 0, say): there is nothing to check
    if error > 0.1 * effect:
        return f"token sizes change its attention wrongly (off by {float(error / effect):.2f} of the effect they should have)"
    return None


def reaches_sdpa(family: BlockFamily, block: Any, channels: int) -> bool:
    """Whether this block's attention hands the sizes, as they are, to `scaled_dot_product_attention`.

    Only there can their form be chosen; attention that adds the mask to its own scores, or takes it as padding, cannot
    tell. Assumed of parameters without values (meta, fake tensors), where nothing can be tried.
    """
    if lacks_values(block) or is_sharded(block):
        return True  # a sharded block cannot be copied; it was tried when it was patched
    if family.needs_source:
        return False
    seen: list[bool] = []

    with torch.no_grad(), no_autocast("cpu"):
        double = _double(block)
        install_inside(family, double)
        x = _tokens(channels, family.example(double).tokens)
        bias = size_bias(torch.full(x.shape[:2], 2.0), x)
        assert bias is not None
        sizes = bias.flatten()

        class Probe(AttentionCall):
            """Looks for the sizes in the mask of the call."""

            def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                mask = args[0] if args else kwargs.get("attn_mask")
                if mask is not None and mask.shape[-1] == len(sizes):
                    seen.append(torch.equal(mask, sizes.to(mask.dtype).expand_as(mask)))
                return super().attend(query, key, value, *args, **kwargs)

        _attend(family, double, x, bias, Probe)
    return bool(seen) and all(seen)


def attention_choice(target: Target, form: str) -> Choice:
    """Which form of attention will run in the model as it is now, and why.

    Raises:
        ConfigError: if a form is asked for that cannot run there.
    """
    block, row = target.blocks[0]
    if form == "mask":
        return Choice(form, "as the config asks")
    if not reaches_sdpa(row, block, target.channels):
        reason = "its attention takes the sizes elsewhere than in PyTorch's scaled_dot_product_attention"
        if form != "auto":
            raise ConfigError(f"attention={form!r} cannot run here: {reason}; use attention='auto'")
        return Choice("mask", reason)
    tokens = next(target.model.parameters())
    return choice_for(form, tokens, autocast_dtype(tokens.device.type))


def check_rotary(target: Target) -> None:
    """Raise unless the coordinates read off upstream's rotary table give that table again.

    Raises:
        UnsupportedModelError: if they do not, or the table cannot be read.
    """
    model, family = target.model, target.family
    if family.rotary_example is None or lacks_values(model):
        return
    for index in {0, len(target.blocks) - 1}:
        rotary = family.rotary(model, index)
        if rotary is None:
            continue
        with torch.no_grad():
            table = family.rotary_example(model, index)
            again = rotary.table(rotary.positions(table), table)
        gap = max(float((a - b).abs().max()) for a, b in zip(_tensors(again), _tensors(table), strict=True))
        # in half precision the table itself is known to three digits only
        if gap > 8 * max(1e-5, *(torch.finfo(part.dtype).eps for part in _tensors(table))):
            fault = f"the coordinates read off its rotary positions give other positions (off by {gap:.1e})"
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be patched: {fault}; use the library's own rotary embedding", (fault,)
            )


def _tensors(table: Any) -> tuple[Tensor, ...]:
    return table if isinstance(table, tuple) else (table,)
