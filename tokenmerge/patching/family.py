"""What the patch has to know about a class of blocks and about a class of models: rows, not functions per model.

A row names seams of upstream's own modules; it never copies an attention forward. Rows live in
`families/`, one file per library, and are imported only when a model of that library is patched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tokenmerge.attention import note_keys
from tokenmerge.flops import BlockCost


def no_reasons(module: Any) -> list[str]:
    """The `refuse` of a row that has nothing to object to."""
    return []


@dataclasses.dataclass(frozen=True)
class BlockFamily:
    """One class of transformer blocks.

    Attributes:
        block: upstream's exact class; a subclass fits only if it inherits `forward` unchanged.
        attention: `(block, x, bias) -> x + attention branch`; bias is `[B, 1, 1, N]` or `None`.
        mlp: `(block, x) -> x + MLP branch`, or `None` where attention and MLP run side by side; tokens then
            merge after both.
        keys: the modules whose outputs are K as attention uses it.
        tap: the forward hook that notes those outputs as `[B, H, N, D]`.
        cost: multiply-adds of a block.
        refuse: reasons why this very block cannot be patched right.
    """

    block: type[nn.Module]
    attention: Callable[[Any, Tensor, Tensor | None], Tensor]
    mlp: Callable[[Any, Tensor], Tensor] | None
    keys: Callable[[Any], Sequence[nn.Module]]
    cost: Callable[[Any], BlockCost]
    refuse: Callable[[Any], list[str]] = no_reasons
    tap: Callable[[nn.Module, tuple[Tensor, ...], Tensor], None] = note_keys

    def __reduce__(self) -> tuple[Any, ...]:
        # patched blocks hold their row; a copied or unpickled block finds it again by its class
        from tokenmerge.patching.families import block_family

        return block_family, (self.block,)


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """One class of models: what stands before, between and after the blocks.

    Attributes:
        library: import name of the library.
        model: upstream's class; a subclass fits only if it inherits every method in `seams` unchanged.
        seams: methods whose behaviour the patch relies on.
        swap: mix-in put before the model's class while it is patched, for seams only methods can reach.
        blocks: the blocks in the order in which they run.
        protected: number of prefix tokens.
        tokens: tokens that enter the first block, prefix included, at the model's own input size.
        pooling: how the head reads the tokens, in words.
        entry: the module whose output enters the first block.
        norms: modules between the last block and the pooling that map tokens one by one.
        cost: multiply-adds of the patch embedding, of the head, and of the head per token it reads.
        mae: whether the weights are known to come from MAE pretraining.
        needs_plans: whether the head needs the map from patches to tokens, not only sizes.
        refuse: reasons why this very model cannot be patched right.
    """

    library: str
    model: type[nn.Module]
    seams: tuple[str, ...]
    swap: type | None
    blocks: Callable[[Any], Sequence[nn.Module]]
    protected: Callable[[Any], int]
    tokens: Callable[[Any], int]
    pooling: Callable[[Any], str]
    entry: Callable[[Any], nn.Module]
    norms: Callable[[Any], Sequence[nn.Module]]
    cost: Callable[[Any], tuple[int, int, int]]
    mae: Callable[[Any], bool]
    needs_plans: Callable[[Any], bool]
    refuse: Callable[[Any], list[str]] = no_reasons
