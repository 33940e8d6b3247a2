"""Check at patch time that upstream's block still behaves as its row states.

A copy of one real block runs on a few random tokens, before the model is changed, to test three properties:
1. The attention branch followed by the MLP branch, without a bias, equals upstream's block bit for bit.
2. The tap records K, one vector for each head and token.
3. With `log size` as attention mask, one token has the effect of that many equal tokens.

The tests run in float64, if the block has a float64 form, so that even a branch that LayerScale scales by a millionth
shows its input. They run again with the block in its own dtype and on its own device, quantised or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.forms import Choice, choice_for
from tokenmerge.attention.tap import AttentionContext, Tap, size_bias
from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError, UnsupportedModelError
from tokenmerge.ops.basics import autocast_dtype, no_autocast
from tokenmerge.ops.modes import lacks_values
from tokenmerge.patching.families.family import BlockFamily
from tokenmerge.patching.install import install_inside
from tokenmerge.patching.record import RECORD
from tokenmerge.patching.swap import Swapped, copy_without_hooks, is_sharded, restore_class
from tokenmerge.patching.target import Target

_COPIES = 9  # size of one token, and number of equal tokens, in the third test


@dataclasses.dataclass(frozen=True)
class Probe:
    """Copy of a block for tests, and tokens for it.

    Attributes:
        block: the copy, in evaluation mode and without the user's hooks, which may expect other tokens.
        x: `[1, N, C]` random tokens.
        noise: tolerated rounding error relative to the largest output: a few steps of the dtype, or 0.02 where weights or
            activations may be quantised to 8 bits.
    """

    block: Any
    x: Tensor
    noise: float


def plain_copy(block: nn.Module, instead: dict[int, Any] | None = None) -> Any:
    """Return a copy of a block in evaluation mode, without any hooks, and with upstream's classes.

    Args:
        block: the block, patched or not.
        instead: tensors that replace tensors of the block in the copy, by the `id` of the replaced one.
    """
    copied = copy_without_hooks(block, instead).eval()
    for module in copied.modules():
        if issubclass(type(module), Swapped):
            restore_class(module)
        vars(module).pop(RECORD, None)
    return copied


def example_tokens(channels: int, count: int, like: Tensor | None = None) -> Tensor:
    """Return random tokens `[1, count, channels]`, float64 on the CPU or of the dtype and on the device of `like`."""
    x = torch.randn(1, count, channels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x if like is None else x.to(like.device, like.dtype)


def _in_float64(family: BlockFamily, block: nn.Module, channels: int) -> Probe | None:
    """Return a probe of the block in float64 on the CPU; `None` if it has no such form, as quantised layers have none."""
    try:
        double = plain_copy(block).to(device="cpu", dtype=torch.float64)
        probe = Probe(
            double, example_tokens(channels, family.example(double).tokens), 1e3 * torch.finfo(torch.float64).eps
        )
        found = _upstream(family, probe)
    except Exception:  # kernels without float64 raise errors of many kinds; the block's own dtype is tested instead
        return None
    plain = all(type(parameter) is nn.Parameter for parameter in double.parameters())
    return probe if plain and found.dtype == torch.float64 else None


def as_it_is(family: BlockFamily, block: nn.Module, channels: int, rounded: bool) -> Probe:
    """Return a probe of the block in its own dtype and on its own device.

    Args:
        family: row of the block.
        block: the block.
        channels: C, channels of a token.
        rounded: whether weights or activations may be quantised, so that rounding errors are larger.
    """
    own = plain_copy(block)
    like = next((p for p in own.parameters() if p.is_floating_point()), torch.empty(0))
    like = torch.empty(0, device=like.device, dtype=like.dtype)
    noise = max(8 * torch.finfo(like.dtype).eps, 0.02 if rounded else 0.0)
    return Probe(own, example_tokens(channels, family.example(own).tokens, like), noise)


def _probe(family: BlockFamily, block: nn.Module, channels: int) -> Probe:
    """Return a probe of the block in float64 if possible, otherwise in its own dtype."""
    return _in_float64(family, block, channels) or as_it_is(family, block, channels, rounded=True)


def _upstream(family: BlockFamily, probe: Probe) -> Tensor:
    """Return the output of upstream's own block for the probe's tokens."""
    block, no_mask = probe.block, {family.mask: None} if family.mask else {}
    # nn.MultiheadAttention's fused kernel for inference rounds differently; within a function mode it is disabled
    with AttentionCall() if family.keys_at_call else contextlib.nullcontext():
        found = type(block).forward(block, probe.x, **no_mask, **example_arguments(family, probe))
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def example_arguments(family: BlockFamily, probe: Probe) -> dict[str, Any]:
    """Return the arguments of the row's example, in the dtype and on the device of the probe's tokens."""
    return {name: _fitted(value, probe.x) for name, value in family.example(probe.block).arguments.items()}


def _fitted(value: Any, like: Tensor) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(like.device, like.dtype)
    return tuple(_fitted(part, like) for part in value) if isinstance(value, tuple) else value


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def check_block(family: BlockFamily, block: Any, channels: int, name: str, library: str) -> None:
    """Raise unless the row still describes this block; blocks without values (meta or fake tensors) are skipped.

    Args:
        family: row of the block.
        block: the block.
        channels: C, channels of a token.
        name: name of the block, for the message.
        library: import name of its library.

    Raises:
        UnsupportedModelError: if it does not; the message names upstream's version, the block, and the difference.
    """
    if lacks_values(block):
        return
    device = next((parameter.device.type for parameter in block.parameters()), "cpu")
    with torch.no_grad(), no_autocast("cpu"), no_autocast(device):
        double = _in_float64(family, block, channels)
        fault = None if double is None else _fault(family, double)
        fault = fault or _fault(family, as_it_is(family, block, channels, rounded=double is None))
    if fault:
        version = getattr(importlib.import_module(library), "__version__", "unknown")
        raise UnsupportedModelError(
            f"{name} ({type(block).__module__}.{type(block).__qualname__}, {library} {version}) cannot be patched: {fault}",
            (fault,),
        )


def _attend(
    family: BlockFamily,
    probe: Probe,
    x: Tensor,
    bias: Tensor | None = None,
    call: type[AttentionCall] = AttentionCall,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output of a block's attention branch with its hooks, and the tensors that the tap recorded."""
    arguments = example_arguments(family, probe)
    with Tap(AttentionContext(bias)) as tap:
        if family.keys_at_call or call is not AttentionCall:
            with call(watch=family.keys_at_call, bias=bias if family.keys_at_call else None):
                out = family.attention(probe.block, x, bias, **arguments)
        else:
            out = family.attention(probe.block, x, bias, **arguments)
    return out, tap.keys if tap.inside is None or not family.keys_at_call else (tap.inside[1],)


def _fault(family: BlockFamily, probe: Probe) -> str | None:
    """Return the difference from the row, with a remedy, in words; `None` if all three properties hold."""
    try:
        theirs = _upstream(family, probe)
    except Exception as error:  # upstream alone raised it, so its kind is unknown
        return (
            f"the block itself fails on {probe.x.shape[1]} tokens of {probe.x.shape[2]} channels ({type(error).__name__}: {error}): "
            "make it run unpatched first (were channels pruned, or layers exchanged?)"
        )
    advice = "use a version of the library that tokenmerge lists as tested, or report this one"
    try:
        fault = _fault_of_parts(family, probe, theirs)
    except Exception as error:  # reported with the block and its version, whatever its kind
        fault = f"running it in parts failed with {type(error).__name__}: {error}"
    return f"it no longer behaves as tokenmerge expects: {fault}; {advice}" if fault else None


def _fault_of_parts(family: BlockFamily, probe: Probe, theirs: Tensor) -> str | None:
    block, x = probe.block, probe.x
    install_inside(family, block)
    ours, keys = _attend(family, probe, x)
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
    return None if family.needs_source else _fault_of_bias(family, probe)


def _fault_of_bias(family: BlockFamily, probe: Probe) -> str | None:
    """Return a fault unless one token of size 9 affects the other tokens exactly as 9 equal tokens do."""
    x = probe.x
    if family.positions is not None:
        return None  # equal tokens would have different positions; the test suite checks these rows instead
    crowd = torch.cat([x, x[:, -1:].expand(-1, _COPIES - 1, -1)], dim=1)
    size = torch.ones(x.shape[:2], device=x.device)
    size[:, -1] = _COPIES
    wanted = _attend(family, probe, crowd)[0][:, : x.shape[1]]
    plain = _attend(family, probe, x)[0]
    ours = _attend(family, probe, x, size_bias(size, x))[0]
    effect, error = (wanted - plain).abs().max(), (ours - wanted).abs().max()
    rounding = probe.noise * wanted.abs().max()
    if not torch.isfinite(effect) or effect <= 10 * rounding:
        return None  # attention has too little effect in this block (for instance, LayerScale 0) to exceed rounding
    if error > 0.1 * effect + rounding:
        return f"token sizes change its attention wrongly (off by {float(error / effect):.2f} of the effect they should have)"
    return None


def reaches_sdpa(family: BlockFamily, block: Any, channels: int) -> bool:
    """Return whether this block's attention passes the sizes unchanged to `scaled_dot_product_attention`.

    The form of the sizes can be chosen only in that call, and not in attention that adds the mask to its own scores or reads
    it as a padding mask. Assumed true for blocks without values (meta or fake tensors), which cannot run.
    """
    if lacks_values(block) or is_sharded(block):
        return True  # a sharded block cannot be copied; it was tested when it was patched
    if family.needs_source:
        return False
    seen: list[bool] = []
    device = next((parameter.device.type for parameter in block.parameters()), "cpu")
    with torch.no_grad(), no_autocast("cpu"), no_autocast(device):
        probe = _probe(family, block, channels)
        install_inside(family, probe.block)
        bias = size_bias(torch.full(probe.x.shape[:2], 2.0, device=probe.x.device), probe.x)
        assert bias is not None
        sizes = bias.flatten()

        class Watching(AttentionCall):
            """Attention call that looks for the sizes in its mask."""

            def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                mask = args[0] if args else kwargs.get("attn_mask")
                if mask is not None and mask.shape[-1] == len(sizes):
                    seen.append(torch.equal(mask, sizes.to(mask.dtype).expand_as(mask)))
                return super().attend(query, key, value, *args, **kwargs)

        _attend(family, probe, probe.x, bias, Watching)
    return bool(seen) and all(seen)


def attention_choice(target: Target, config: MergeConfig) -> Choice:
    """Return the form of attention that will run in the current state of the model, and the reason for it.

    Raises:
        ConfigError: if the config asks for a form that cannot run there.
    """
    (block, row), form = target.blocks[0], config.attention
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
    """Raise unless coordinates recovered from upstream's rotary table reproduce that table.

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
            positions = rotary.positions(table)
            again = rotary.table(positions, table)
        gap = max(float((a - b).abs().max()) for a, b in zip(_tensors(again), _tensors(table), strict=True))
        # half precision keeps about three digits, of the table and of the angles that a half-precision model stores
        kept = [torch.finfo(buffer.dtype).eps for buffer in rotary.module.buffers() if buffer.is_floating_point()]
        rounded = max(kept, default=0.0) * float(positions.abs().max())
        if gap > max(rounded, 8 * max(1e-5, *(torch.finfo(part.dtype).eps for part in _tensors(table)))):
            fault = f"the coordinates read off its rotary positions give other positions (off by {gap:.1e})"
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be patched: {fault}; use the library's own rotary embedding", (fault,)
            )


def _tensors(table: Any) -> tuple[Tensor, ...]:
    return table if isinstance(table, tuple) else (table,)
