"""What the patch has to know about a class of blocks and about a class of models: rows, not functions per model.

A row names seams of upstream's own modules; it never copies an attention forward. Rows live beside this file, one
module per library, and are imported only when a model of that library is patched; they are found by class, here.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor, nn

from tokenmerge.attention.rotary import Rotary
from tokenmerge.attention.tap import head_mean, head_mean_untransposed, heads_first, heads_second, note_output
from tokenmerge.errors import UnsupportedModelError
from tokenmerge.flops import NO_ENDS, BlockCost, Ends

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
        answers: the same with forward hooks, for modules whose answer must change and whose class others may look for.
        mixins: `(block) -> (module, mix-in)` pairs put before the classes of modules inside attention.
        positions: `(block, x) -> [1, N0, P]`: coordinates, where attention makes them itself.
        own_pairs: whether attention makes a bias between original tokens itself (reached by `mixins`).
        wrap: what upstream's forward puts around x.
        example: what the block is tried with.
        ready: raises if the block can no longer be run right: its attention was exchanged since, say.
        arguments: names of what upstream's forward takes after the tokens, in order; read off `block`.
        needs_source: whether attention reads a bias between original tokens, so that their map must travel.
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
    answers: Callable[[Any], Sequence[tuple[nn.Module, Callable[..., Any]]]] = _nothing
    mixins: Callable[[Any], Sequence[tuple[nn.Module, type]]] = _nothing
    positions: Callable[[Any, Tensor], Tensor] | None = None
    own_pairs: bool = False
    wrap: Callable[[Tensor], Any] | None = None
    example: Callable[[Any], Example] = lambda block: Example()
    ready: Callable[[Any], None] | None = None

    arguments: tuple[str, ...] = dataclasses.field(init=False)
    needs_source: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        # now, not when first asked for: that may be while Dynamo traces
        parameters = list(inspect.signature(self.block.forward).parameters.values())[2:]
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        object.__setattr__(self, "arguments", names)
        object.__setattr__(self, "needs_source", self.pair_bias is not None or self.own_pairs)
        if self.per_head is None:
            usual: dict[Any, Any] = {head_mean: heads_first, head_mean_untransposed: heads_second}
            object.__setattr__(self, "per_head", usual.get(self.metric))

    def __reduce__(self) -> tuple[Any, ...]:
        # patched blocks hold their row; a copied or unpickled block finds it again by its class
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
        embed: the module that makes the patches, whose output is `[B, C, *grid]`, or tokens and a grid: there a pass sees it.
        grid_at: `(model, sizes of an input along the axes of the grid) -> grid`, before any pass.
        pooling: how the head reads the tokens, in words.
        cost: multiply-adds of what stands before and after the blocks, at the model's own input size.
        around: `(modules around it, the outermost first; model) -> Ends`: multiply-adds of a classifier that stands around it.
        swap: mix-in put before the model's class while it is patched, for seams only methods can reach.
        norms: modules after the blocks that map tokens one by one; sizes pass through them.
        output: what leaves the last block unless the user chooses: "merged" or "full".
        merged_output: reasons why this very model's own modules cannot do with merged output.
        readers: modules that must get unmerged tokens, when merged ones leave the last block.
        hooks: `(model) -> (module, forward pre-hook)` pairs, for what else must be noted.
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
    cost: Callable[[Any], Ends]
    around: Callable[[list[nn.Module], Any], Ends] = lambda way, model: NO_ENDS
    embed: Callable[[Any], nn.Module | None] = lambda model: None
    grid_at: Callable[[Any, Sequence[int]], tuple[int, ...] | None] | None = None
    swap: type | None = None
    norms: Callable[[Any], Sequence[nn.Module]] = _nothing
    output: str = "full"
    merged_output: Callable[[Any], list[str]] = no_reasons
    readers: Callable[[Any], Sequence[nn.Module]] = _nothing
    hooks: Callable[[Any], Sequence[tuple[nn.Module, Hook]]] = _nothing
    collectors: Callable[[Any], Sequence[nn.Module]] = _nothing
    always_collects: bool = False
    rotary: Callable[[Any, int], Rotary | None] = lambda model, index: None
    rotary_example: Callable[[Any, int], Any] | None = None
    mae: Callable[[Any], bool] = lambda model: False
    needs_plans: Callable[[Any], bool] = lambda model: False
    refuse: Callable[[Any], list[str]] = no_reasons

    def __reduce__(self) -> tuple[Any, ...]:
        return model_family, (self.model,)  # found again by its class, as a block's


# --- finding rows ------------------------------------------------------------------------------------------

_Found = TypeVar("_Found")

LIBRARIES = {
    name: f"tokenmerge.patching.families.{name}" for name in ("timm", "transformers", "torchvision", "open_clip")
}


class _Rows(Protocol):
    """What a library's module offers; every function answers for one exact class, not for its bases."""

    NAMES: str
    """The supported models in words."""

    def model_row(self, cls: type[nn.Module]) -> ModelFamily | None:
        """The row of a model class."""
        ...

    def block_row(self, cls: type[nn.Module]) -> BlockFamily | None:
        """The row of a block class."""
        ...

    def why_not(self, cls: type[nn.Module]) -> str | None:
        """Why a model class that has no row has none, where that is known."""
        ...


@cache
def _rows(library: str) -> _Rows:
    """The rows of a library, whose import failing means that it is another version than the rows know."""
    try:
        return cast("_Rows", importlib.import_module(LIBRARIES[library]))
    except ImportError as error:
        version = getattr(importlib.import_module(library), "__version__", "unknown")
        raise UnsupportedModelError(
            f"{library} {version} is installed, but it lacks what tokenmerge builds on ({error}): "
            f"pip install --upgrade 'tokenmerge[{library}]'"
        ) from None


def _library_of(cls: type) -> str | None:
    """The supported library that a class comes from."""
    root = cls.__module__.split(".")[0]
    return root if root in LIBRARIES else None


def _nearest(cls: type[nn.Module], ask: Callable[[_Rows, type[nn.Module]], _Found | None]) -> _Found | None:
    """The first answer of a supported library for the class or one of its bases, nearest first."""
    for base in cls.__mro__:
        library = _library_of(base)
        found = ask(_rows(library), base) if library else None
        if found is not None:
            return found
    return None


def model_family(cls: type[nn.Module]) -> ModelFamily | None:
    """The row of the nearest supported base of a model class, or `None`."""
    return _nearest(cls, lambda rows, base: rows.model_row(base))


def block_family(cls: type[nn.Module]) -> BlockFamily | None:
    """The row of the nearest supported base of a block class, or `None`."""
    return _nearest(cls, lambda rows, base: rows.block_row(base))


def why_not(cls: type[nn.Module]) -> str | None:
    """Why a model class has no row, where that is known."""
    return _nearest(cls, lambda rows, base: rows.why_not(base))


_TRANSPARENT = ("torch.nn.parallel.", "torch._dynamo.", "torch.distributed.")
"""Where modules come from that hand on what the one inside gives, untouched."""


def misread(module: Any, inside: nn.Module, cls: type[nn.Module], tower: type[nn.Module]) -> str:
    """Why a module of that class around a model would misread merged tokens; empty if it would not. What is not known would.

    Args:
        module: the module.
        inside: its child that the model is, or is in.
        cls: upstream's class of the module.
        tower: upstream's class of the model.
    """
    if cls.forward is nn.Sequential.forward and len(module) and module[-1] is inside:
        return ""  # it hands on what the last one gives
    library = _library_of(cls)
    known = getattr(_rows(library), "misread", None) if library else None
    reason = None if known is None else cast("str | None", known(cls, tower, module))
    if reason is None:
        transparent = cls.__module__.startswith(_TRANSPARENT)
        return "" if transparent else f"how {cls.__name__} reads its tokens is not known"
    return f"{cls.__name__} {reason}" if reason else ""


def supported_models() -> str:
    """The supported models of every installed library, for messages."""
    names = [_rows(library).NAMES for library in LIBRARIES if importlib.util.find_spec(library) is not None]
    return " or ".join(names) or f"those of {', '.join(LIBRARIES)} (not installed here)"
