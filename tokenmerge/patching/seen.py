"""Tokens and FLOPs of the passes that really ran, for matchers whose number of tokens depends on the images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.flops import ModelCost
from tokenmerge.patching.record import record_of
from tokenmerge.patching.state import state_of
from tokenmerge.patching.target import find_target


class TokensSeen:
    """Context manager that counts the tokens entering each block of a patched model, and those leaving the last one.

    Args:
        model: a patched model.

    Attributes:
        images: images of all passes within the context.
        flops: multiply-adds of all these images, rows of halted tokens included, because they are computed.
        present: `[L + 1]` float64: tokens that were not gone (size above 0), summed over images.
        each: `[images]` int64: tokens that were not gone, summed over the blocks that each image entered.

    Example:
        >>> import timm, torch, tokenmerge
        >>> from tokenmerge.patching.seen import TokensSeen
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=96).eval()
        >>> handle = tokenmerge.patch(model, r=8)
        >>> with TokensSeen(model) as seen:
        ...     _ = model(torch.zeros(2, 3, 96, 96))
        >>> seen.tokens, seen.mean_flops == handle.summary().flops_after
        ([37.0, 29.0, 21.0], True)
    """

    def __init__(self, model: nn.Module) -> None:
        target = find_target(model)
        self._blocks = [block for block, _ in target.blocks]
        self._cost: ModelCost = record_of(target.model).settings.cost
        self.images, self.flops = 0, 0
        self.present = torch.zeros(len(self._blocks) + 1, dtype=torch.float64)
        self.each = torch.zeros(0, dtype=torch.int64)
        self._counts: list[int] = []
        self._each: list[Tensor] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> TokensSeen:
        for block in self._blocks:
            self._hooks.append(block.register_forward_pre_hook(self._enters))
        self._hooks.append(self._blocks[-1].register_forward_hook(self._leaves))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._counts, self._each = [], [], []

    @property
    def mean_flops(self) -> float:
        """Multiply-adds per image."""
        return self.flops / max(1, self.images)

    @property
    def tokens(self) -> list[float]:
        """Tokens that were not gone, per image: before each block, and after the last one."""
        return [float(count) / max(1, self.images) for count in self.present]

    def _enters(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        place = next(i for i, one in enumerate(self._blocks) if one is block)
        if place == 0:  # a pass that ended early leaves nothing behind
            self._counts, self._each = [], []
        self._count(place, args[0])

    def _leaves(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        output = output if isinstance(output, Tensor) else output[0]
        self._count(len(self._blocks), output)
        batch, counts = len(output), self._counts
        self.images += batch
        self.each = torch.cat([self.each, torch.stack(self._each[:-1]).sum(dim=0)])
        self.flops += batch * self._cost.at(counts[0]).total_of(counts)

    def _count(self, place: int, x: Tensor) -> None:
        state = state_of(x)
        rows = x if state is None or state.merged is None else state.merged
        self._counts.append(rows.shape[1])
        left = torch.full((len(rows),), rows.shape[1])
        if state is not None and state.size is not None:
            left = (state.size > 0).sum(dim=1).cpu()
        self._each.append(left)
        self.present[place] += left.sum()


@torch.inference_mode()
def seen_in(model: nn.Module, batches: Iterable[Tensor]) -> TokensSeen:
    """Run a patched model on some batches, and return the counts of its tokens."""
    with TokensSeen(model) as seen:
        for batch in batches:
            model(batch)
    return seen


def flops_of(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Return the multiply-adds per image that run for some batches of a patched model, rows of halted tokens included."""
    return seen_in(model, batches).mean_flops
