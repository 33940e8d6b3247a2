"""Rows of the family table: each describes one class of blocks or of models to the patch, in place of code per model.

A row names parts of upstream's own modules and never copies an attention forward. The rows of each library stand in a
module of their own beside this file, which is imported when a model of that library is patched. Rows are found by class.
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
    """Return no reasons: the default of `refuse`, for classes that can always be patched."""
    return []


def _nothing(module: Any) -> Sequence[Any]:
    return ()


@dataclasses.dataclass(frozen=True)
class Example:
    """Input with which a block is tested at patch time.

    Attributes:
        tokens: number of tokens.
        arguments: further arguments of the block's forward.
    """

    tokens: int = 7
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class BlockFamily:
    """Row for one class of transformer blocks.

    Attributes:
        block: upstream's exact class; a subclass fits only if it inherits `forward` unchanged.
        attention: `(block, x, bias, **arguments) -> x + attention branch`; `bias` is `[B, 1 or H, 1 or N, N]` or `None`, and
            `arguments` are the caller's, without the mask.
        mlp: `(block, x) -> x + MLP branch`; `None` if attention and MLP run in parallel, so that tokens merge after both.
        keys: the modules on which the `tap` hook is registered.
        cost: multiply-adds of a block.
        refuse: reasons why this particular block cannot be patched correctly.
        tap: `note_output` (a forward hook) or `note_input` (a forward pre-hook).
        metric: `(block, recorded tensors) -> [B, N, D]`: K averaged over heads.
        per_head: `(block, recorded tensors) -> [B, H, N, D]`: K as a view, for matchers that average heads themselves;
            `None` if there is no such view. Filled in automatically for the usual metrics.
        keys_at_call: whether K is recorded, and the sizes are added, in the call of `scaled_dot_product_attention`
            (`attention/call.py`); `nn.MultiheadAttention` gives access to them nowhere else.
        mask: name of the argument that holds the padding mask, if the block takes one.
        pair_bias: name of the argument that holds a bias `[1, H, N₀, N₀]` between original tokens.
        rope: name of the argument that holds the table of rotary positions.
        passes: whether further arguments are passed on to upstream's attention; otherwise they are refused.
        hooks: `(block) -> (module, forward pre-hook)` pairs that add the sizes to attention without a mask.
        answers: `(block) -> (module, forward hook)` pairs, for modules whose output must change but whose class must not.
        mixins: `(block) -> (module, mix-in)` pairs: mix-ins for the classes of modules inside attention.
        positions: `(block, x) -> [1, N₀, P]`: coordinates, if attention computes them itself.
        own_pairs: whether attention computes a bias between original tokens itself (`mixins` then gives access to it).
        wrap: the form in which upstream's forward returns x.
        example: the input with which the block is tested.
        ready: raises if the block can no longer be run correctly, for instance because its attention was exchanged.
        arguments: names of the parameters of upstream's forward after the tokens, in order; read from `block`.
        needs_source: whether attention reads a bias between original tokens, so that their map must travel with the state.
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
        # computed here and not on first use, which may happen while Dynamo traces
        parameters = list(inspect.signature(self.block.forward).parameters.values())[2:]
        names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        object.__setattr__(self, "arguments", names)
        object.__setattr__(self, "needs_source", self.pair_bias is not None or self.own_pairs)
        if self.per_head is None:
            usual: dict[Any, Any] = {head_mean: heads_first, head_mean_untransposed: heads_second}
            object.__setattr__(self, "per_head", usual.get(self.metric))

    def __reduce__(self) -> tuple[Any, ...]:
        # patched blocks refer to their row; a copied or unpickled block finds it again by its class
        return block_family, (self.block,)


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """Row for one class of models: the parts before, between and after the blocks.

    Attributes:
        library: import name of the library.
        model: upstream's class; a subclass fits only if it inherits every method in `seams` unchanged.
        seams: methods whose behaviour the patch relies on.
        blocks: the blocks, in the order in which they run.
        channels: C, channels of a token.
        protected: number of prefix tokens.
        tokens: tokens that enter the first block, prefix tokens included, at the model's own input size.
        grid: patches along each axis at that size; `None` if the model has no such size.
        input_shape: shape of one input without the batch; `None` if the model takes several inputs.
        embed: the module that makes the patches; a pass reads the grid from its output, `[B, C, *grid]` or (tokens, grid).
        grid_at: `(model, sizes of an input along the axes of the grid) -> grid`, before any forward pass.
        pooling: how the head reads the tokens, in words.
        cost: multiply-adds before and after the blocks, at the model's own input size.
        around: `(modules around the model, outermost first; model) -> Ends`: multiply-adds of a surrounding classifier.
        swap: mix-in for the model's class while it is patched, for behaviour that only methods can change.
        norms: modules after the blocks that map tokens one by one; the state passes through them.
        output: output of the last block unless the user chooses: "merged" or "full".
        merged_output: reasons why the model's own modules would misread merged output.
        readers: modules that must get unmerged tokens even if merged tokens leave the last block.
        hooks: `(model) -> (module, forward pre-hook)` pairs, for anything else that must be recorded.
        collectors: modules whose forward can return the hidden states of all blocks.
        always_collects: whether those modules always return them.
        rotary: `(model, index of the block) -> Rotary`, for models with rotary positions.
        rotary_example: `(model, index) -> table`: upstream's table at the model's own size, to test `rotary` with.
        mae: whether the weights are known to come from MAE pretraining.
        needs_plans: whether the head needs the map from patches to tokens, and not only sizes.
        refuse: reasons why this particular model cannot be patched correctly.
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
        return model_family, (self.model,)  # found again by its class, as rows of blocks are


# --- finding rows ------------------------------------------------------------------------------------------

_Found = TypeVar("_Found")

LIBRARIES = {
    name: f"tokenmerge.patching.families.{name}" for name in ("timm", "transformers", "torchvision", "open_clip")
}
_OWN = "tokenmerge.models"
_ROWS = {**LIBRARIES, _OWN: "tokenmerge.patching.families.own"}


class _Rows(Protocol):
    """Interface of a library's module; every function looks up one exact class, and none of its bases."""

    NAMES: str
    """The supported models, in words."""

    def model_row(self, cls: type[nn.Module]) -> ModelFamily | None:
        """Return the row of a model class, or `None`."""
        ...

    def block_row(self, cls: type[nn.Module]) -> BlockFamily | None:
        """Return the row of a block class, or `None`."""
        ...

    def why_not(self, cls: type[nn.Module]) -> str | None:
        """Return why a model class has no row; `None` if the reason is not known."""
        ...


@cache
def _rows(library: str) -> _Rows:
    """Return the rows of a library.

    Raises:
        UnsupportedModelError: if the installed version of the library lacks classes that the rows import.
    """
    try:
        return cast("_Rows", importlib.import_module(_ROWS[library]))
    except ImportError as error:
        version = getattr(importlib.import_module(library), "__version__", "unknown")
        raise UnsupportedModelError(
            f"{library} {version} is installed, but it lacks what tokenmerge builds on ({error}): "
            f"pip install --upgrade 'tokenmerge[{library}]'"
        ) from None


def _library_of(cls: type) -> str | None:
    """Return the supported library that a class comes from, or `None`."""
    if cls.__module__.startswith(f"{_OWN}."):
        return _OWN
    root = cls.__module__.split(".")[0]
    return root if root in LIBRARIES else None


def _nearest(cls: type[nn.Module], ask: Callable[[_Rows, type[nn.Module]], _Found | None]) -> _Found | None:
    """Return the first answer other than `None` for a class and its bases, nearest first."""
    for base in cls.__mro__:
        library = _library_of(base)
        found = ask(_rows(library), base) if library else None
        if found is not None:
            return found
    return None


def model_family(cls: type[nn.Module]) -> ModelFamily | None:
    """Return the row of a model class or of its nearest supported base, or `None`."""
    return _nearest(cls, lambda rows, base: rows.model_row(base))


def block_family(cls: type[nn.Module]) -> BlockFamily | None:
    """Return the row of a block class or of its nearest supported base, or `None`."""
    return _nearest(cls, lambda rows, base: rows.block_row(base))


def why_not(cls: type[nn.Module]) -> str | None:
    """Return why a model class has no row; `None` if the reason is not known."""
    return _nearest(cls, lambda rows, base: rows.why_not(base))


_TRANSPARENT = ("torch.nn.parallel.", "torch._dynamo.", "torch.distributed.")
"""Starts of the module paths of wrapper classes that return the output of the module inside unchanged."""


def misread(module: Any, inside: nn.Module, cls: type[nn.Module], tower: type[nn.Module]) -> str:
    """Return why a module around a model would misread merged tokens, or `""` if it would not.

    A module that is not known counts as one that would.

    Args:
        module: the module.
        inside: its child that is or contains the model.
        cls: upstream's class of the module.
        tower: upstream's class of the model.
    """
    if cls.forward is nn.Sequential.forward and len(module) and module[-1] is inside:
        return ""  # a Sequential returns the output of its last module
    library = _library_of(cls)
    known = getattr(_rows(library), "misread", None) if library else None
    reason = None if known is None else cast("str | None", known(cls, tower, module))
    if reason is None:
        transparent = cls.__module__.startswith(_TRANSPARENT)
        return "" if transparent else f"how {cls.__name__} reads its tokens is not known"
    return f"{cls.__name__} {reason}" if reason else ""


def supported_models() -> str:
    """Return the supported models of every installed library, in words."""
    names = [_rows(library).NAMES for library in LIBRARIES if importlib.util.find_spec(library) is not None]
    return " or ".join(names) or f"those of {', '.join(LIBRARIES)} (not installed here)"
