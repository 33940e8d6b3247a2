"""Cost of merging itself, in multiply-adds: the metric, the tensors that the matcher takes, and matching.

Published figures leave these operations out, and so do `Summary.flops_after` and all schedules. They are counted here by
running the matcher on tensors without values, which gives the correct figure for any matcher, including a user's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.tap import AttentionContext, Tap
from tokenmerge.matching.informed import collecting_edges
from tokenmerge.matching.learned import PREDICTOR
from tokenmerge.ops.basics import no_autocast
from tokenmerge.patching.check import Probe, as_it_is, example_arguments, example_tokens, plain_copy
from tokenmerge.patching.families.family import BlockFamily
from tokenmerge.patching.install import install_inside
from tokenmerge.patching.match import metric_channels
from tokenmerge.patching.record import Settings
from tokenmerge.patching.swap import is_sharded
from tokenmerge.patching.target import Target, is_prepared


@dataclasses.dataclass(frozen=True)
class Shown:
    """Shapes that the attention of a block shows, per image.

    Attributes:
        channels: C, channels of a token.
        metric: channels of the paper's metric, K averaged over heads.
        per_token: multiply-adds of this metric per token; 0 if attention computes the keys anyway.
        heads: H; 0 if attention does not show Q, K and V.
        inside: channels of a head of Q, K and V.
    """

    channels: int
    metric: int
    per_token: int
    heads: int = 0
    inside: tuple[int, int, int] = (0, 0, 0)


def matching_flops(target: Target, settings: Settings, counts: Sequence[int], grid: Any) -> tuple[int, ...] | None:
    """Return the multiply-adds per image that merging adds to each block.

    Args:
        target: the model.
        settings: settings that it merges with.
        counts: tokens that enter each block, followed by the tokens that leave the last one.
        grid: patches along each axis, or `None`.

    Returns:
        One number per block. `None` if a block cannot be copied (because it is sharded, or its weights are not loaded), or
        the matcher needs a predictor that is not trained yet.
    """
    try:
        with collecting_edges():  # a separate collection, because this is not a pass that `calibrate` should see
            return _of_blocks(target, settings, counts, grid)
    except _UnknownError:
        return None


class _UnknownError(Exception):
    """Raised if the cost of merging cannot be counted."""


def _of_blocks(target: Target, settings: Settings, counts: Sequence[int], grid: Any) -> tuple[int, ...]:
    found: list[int] = []
    shown: dict[Any, Shown] = {}
    for layer, (block, row) in enumerate(target.blocks):
        tokens, left = counts[layer : layer + 2]
        if tokens == left:
            found.append(0)
            continue
        if is_sharded(block):
            raise _UnknownError
        key = (row.block, row.cost(block))
        if key not in shown:
            shown[key] = _shown(row, block, target.channels)
        found.append(_of_block(block, shown[key], settings, layer, tokens, tokens - left, grid))
    return tuple(found)


def heads_of(block: nn.Module, row: BlockFamily, channels: int) -> int:
    """Return H, the heads of a block's attention; 0 if attention does not show them."""
    try:
        return _shown(row, block, channels).heads
    except _UnknownError:
        return 0


@contextlib.contextmanager
def _counted(total: list[int]) -> Iterator[None]:
    """Append the multiply-adds of everything that runs within the context to a list."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        yield
    total.append(int(counter.get_total_flops()) // 2)


def _shown(row: BlockFamily, block: nn.Module, channels: int) -> Shown:
    try:
        return _look(row, _without_data(row, block, channels))
    except Exception:  # quantised weights, for instance, have no meta form; a copy with values runs instead
        try:
            return _look(row, as_it_is(row, block, channels, rounded=True))
        except Exception:  # the rest of a summary is useful even if this number is unknown
            raise _UnknownError from None


def _without_data(row: BlockFamily, block: nn.Module, channels: int) -> Probe:
    """Return a copy of a block on the meta device, which has shapes but no values."""
    tensors = [*block.parameters(), *block.buffers()]
    shapes: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), False) for p in block.parameters()}
    shapes |= {id(b): b.to("meta") for b in block.buffers()}
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    copied = plain_copy(block, shapes)
    for module in copied.modules():
        if is_prepared(module):  # Accelerate's forward would load the weights
            vars(module).pop("forward")
    x = example_tokens(channels, row.example(block).tokens, torch.empty(0, dtype=like.dtype, device="meta"))
    return Probe(copied, x, 0.0)


def _look(row: BlockFamily, probe: Probe) -> Shown:
    """Run the attention of a block on a few tokens, and return the shapes that it shows."""
    install_inside(row, probe.block)
    arguments, cost = example_arguments(row, probe), [0]
    device = probe.x.device.type
    with torch.no_grad(), no_autocast(device), Tap(AttentionContext()) as tap, AttentionCall(watch=True):
        row.attention(probe.block, probe.x, None, **arguments)
    keys = (tap.inside[1],) if row.keys_at_call and tap.inside is not None else tap.keys
    with no_autocast(device), _counted(cost):
        metric = row.metric(probe.block, keys)
    seen = Shown(probe.x.shape[2], metric.shape[2], cost[-1] // probe.x.shape[1])
    if tap.inside is None:
        return seen
    query, key, value, _ = tap.inside
    inside = (query.shape[3], key.shape[3], value.shape[3])
    return dataclasses.replace(seen, heads=query.shape[1], inside=inside)


def _of_block(block: Any, shown: Shown, settings: Settings, layer: int, tokens: int, r: int, grid: Any) -> int:
    total = [0 if settings.other_metric else shown.per_token * tokens]
    if "attention" in settings.entry.offered:
        queries = 1 if settings.class_token else tokens
        total.append(queries * tokens * shown.heads * shown.inside[0])
    like = next(block.parameters())
    try:
        with _counted(total):
            _match(block, shown, settings, layer, tokens, r, grid, torch.device("meta"))
    except Exception:  # matchers that read values, or have weights of their own, need real tensors
        try:
            with _counted(total):
                _match(block, shown, settings, layer, tokens, r, grid, like.device)
        except Exception:
            raise _UnknownError from None
    return sum(total)


def _match(
    block: Any, shown: Shown, settings: Settings, layer: int, tokens: int, r: int, grid: Any, device: torch.device
) -> None:
    """Run the matcher on the shapes of one image, with the arguments that a block would pass."""
    offered: dict[str, Any] = {**settings.offered}

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(1, *shape, device=device)

    made: dict[str, Any] = {
        "layer": layer,
        "grid": grid,
        "size": zeros(tokens) + 1,
        "tokens": zeros(tokens, shown.channels),
        "values": zeros(shown.heads, tokens, shown.inside[2]),
        "attention": zeros(tokens) + 1 / tokens,
        "anchor": torch.arange(tokens, device=device).unsqueeze(0),
        "predictor": getattr(block, PREDICTOR, None),
        "carried": None,
        "backend": "torch",
    }
    offered.update({name: value for name, value in made.items() if name in settings.entry.offered})
    other = metric_channels(settings.config, shown.channels, shown.heads, shown.inside)
    metric = zeros(tokens, other if settings.other_metric else shown.metric)
    settings.entry.matcher(metric, r, settings.protected, **offered)
