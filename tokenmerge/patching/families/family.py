"""What the patch has to know about a class of blocks and about a class of models: rows, not functions per model.

A row names seams of upstream's own modules; it never copies an attention forward. Rows live in
`families/`, one module per library, and are imported only when a model of that library is patched.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tokenmerge.attention.rotary import Rotary
from tokenmerge.attention.tap import head_mean, head_mean_untransposed, heads_first, heads_second, note_output
from tokenmerge.flops import BlockCost

Hook = Callable[..., Any]


def no_reasons(module: Any) -> list[str]:
    """The `refuse` of a row that has nothing to object to."""
    return []


def _nothing(module: Any) -> Sequence[Any]:
    return ()


@dataclasses.dataclass(frozen=True)
class Example:
    """What a block is tried with at patch time: this many tokens, and further arguments."""

    tokens: int = 7
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BlockFamily:
    """One class of transformer blocks.

    Attributes:
        block: upstream's exact class; a subclass fits only if it inherits `forward` unchanged.
        attention: `(block, x, bias, **arguments) -> x + attention branch`; bias is `[B, 1 or H, 1 or N, N]` or
            `None`, arguments are those that the caller gave and that are not the mask.
        mlp: `(block, x) -> x + MLP branch`, or `None` where attention and MLP run side by side; tokens then
            merge after both.
        keys: the modules that `tap` is hooked to.
        cost: multiply-adds of a block.
        refuse: reasons why this very block cannot be patched right.
        tap: `note_output` (a forward hook) or `note_input` (a forward pre-hook).
        metric: `(block, what was noted) -> [B, N, D]`: K averaged over its heads.
        per_head: `(block, what was noted) -> [B, H, N, D]`, a view of K, or `None` where there is none: matchers that
            average the heads themselves take it. Known by itself for the usual metrics.
        keys_at_call: whether K is seen, and sizes are given, where attention calls `scaled_dot_product_attention`
            (`attention_call`): the attention is `nn.MultiheadAttention`, which shows them nowhere else.
        mask: name of the argument that masks padding, if the block takes one.
        pair_bias: name of the argument that holds a bias `[1, H, N0, N0]` between original tokens.
        rope: name of the argument that holds the table of rotary positions.
        passes: whether further arguments go on to upstream's attention; otherwise they are refused.
        hooks: `(block) -> (module, forward pre-hook)` pairs that put the sizes into attention without a mask.
        mixins: `(block) -> (module, mix-in)` pairs put before the classes of modules inside attention.
        positions: `(block, x) -> [1, N0, P]`: coordinates, where attention makes them itself.
        own_pairs: whether attention makes a bias between original tokens itself (reached by `mixins`).
        wrap: what upstream's forward puts around x.
        example: what the block is tried with.
        ready: raises if the block can no longer be run right: its attention was exchanged since, say.
        arguments: names of what upstream's forward takes after the tokens, in order; read off `block`.
    """

    block: type[nn.Module]
    attention: Callable[..., Tensor]
    mlp: Callable[[Any, Tensor], Tensor] | None
    keys: Callable[[Any], Sequence[nn.Module]]
    cost: Callable[[Any], BlockCost]
    refuse: Callable[[Any], list[str]] = no_reasons
    tap: Hook = note_output
    metric: Callable[[Any, tuple[Tensor, ...]], Tensor] = head_mean
    per_head: Callable[[Any, tuple[Tensor, ...]], Tensor | None] | None = None
    keys_at_call: bool = False
    mask: str | None = None
    pair_bias: str | None = None
    rope: str | None = None
    passes: bool = False
    hooks: Callable[[Any], Sequence[tuple[nn.Module, Hook]]] = _nothing
    mixins: Callable[[Any], Sequence[tuple[nn.Module, type]]] = _nothing
    positions: Callable[[Any, Tensor], Tensor] | None = None
    own_pairs: bool = False
    wrap: Callable[[Tensor], Any] | None = None
    example: Callable[[Any], Example] = lambda block: Example()
    ready: Callable[[Any], None] = lambda block: None

    arguments: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        # now, not when first asked for: that may be while Dynamo traces
        parameters = list(inspect.signature(self.block.forward).parameters.values())[2:]
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        object.__setattr__(self, "arguments", names)
        if self.per_head is None:
            usual: dict[Any, Any] = {head_mean: heads_first, head_mean_untransposed: heads_second}
            object.__setattr__(self, "per_head", usual.get(self.metric))

    @property
    def needs_source(self) -> bool:
        """Whether attention reads a bias between original tokens, so that their map must travel."""
        return self.pair_bias is not None or self.own_pairs

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
        blocks: the blocks in the order in which they run.
        channels: C of the tokens.
        protected: number of prefix tokens.
        tokens: tokens that enter the first block, prefix included, at the model's own input size.
        grid: patches along each axis at that size; `None` if there is no such size.
        input_shape: shape of one input without the batch, or `None` if the model takes several.
        pooling: how the head reads the tokens, in words.
        cost: multiply-adds of the patch embedding, of the head, and of the head per token it reads.
        swap: mix-in put before the model's class while it is patched, for seams only methods can reach.
        norms: modules after the blocks that map tokens one by one; sizes pass through them.
        output: what leaves the last block unless the user chooses: "merged" or "full".
        merged_output: reasons why this very model cannot do with merged output.
        readers: modules that must get unmerged tokens, when merged ones leave the last block.
        collectors: modules whose forward may be asked for the hidden states of all blocks.
        always_collects: whether they always are.
        rotary: `(model, index of the block) -> Rotary`, for models whose attention turns by position.
        rotary_example: `(model, index) -> table`: upstream's table at the model's own size, to try `rotary` on.
        mae: whether the weights are known to come from MAE pretraining.
        needs_plans: whether the head needs the map from patches to tokens, not only sizes.
        refuse: reasons why this very model cannot be patched right.
    """

    library: str
    model: type[nn.Module]
    seams: tuple[str, ...]
    blocks: Callable[[Any], Sequence[nn.Module]]
    channels: Callable[[Any], int]
    protected: Callable[[Any], int]
    tokens: Callable[[Any], int]
    grid: Callable[[Any], tuple[int, ...] | None]
    input_shape: Callable[[Any], tuple[int, ...] | None]
    pooling: Callable[[Any], str]
    cost: Callable[[Any], tuple[int, int, int]]
    swap: type | None = None
    norms: Callable[[Any], Sequence[nn.Module]] = _nothing
    output: str = "full"
    merged_output: Callable[[Any], list[str]] = no_reasons
    readers: Callable[[Any], Sequence[nn.Module]] = _nothing
    collectors: Callable[[Any], Sequence[nn.Module]] = _nothing
    always_collects: bool = False
    rotary: Callable[[Any, int], Rotary | None] = lambda model, index: None
    rotary_example: Callable[[Any, int], Any] | None = None
    mae: Callable[[Any], bool] = lambda model: False
    needs_plans: Callable[[Any], bool] = lambda model: False
    refuse: Callable[[Any], list[str]] = no_reasons
