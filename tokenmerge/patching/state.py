"""What travels with the tokens of one forward pass: its settings, sizes and, when someone needs them, the plans so far.

The state is an attribute of the activation tensor itself. So it needs no shared dict (which gradient
checkpointing breaks: blocks run again in backward, in another order) and no slot per block (which mixes up
two views of one step). A recomputed block sees exactly the state that it saw the first time, and what one pass
knows no other can reach.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Proxy

from tokenmerge.errors import InputError, PatchError
from tokenmerge.ops.basics import spread_rows, take_rows
from tokenmerge.patching.record import Settings
from tokenmerge.plan import MergePlan, source_map
from tokenmerge.schedule import Schedule

STATE = "_tokenmerge_state"
"""Name of the attribute; and of the argument by which a block's call hands it to its forward."""
UNMERGED = "_tokenmerge_unmerged"
"""Name of an attribute of a tensor with which a block was called while nothing merged; and of the argument that says so when
gradient checkpointing gives the same tensor again.
"""
GRID = "_tokenmerge_grid"
"""Name of an attribute of a tensor with which a pass began: its patches along each axis, as far as they were seen."""
_OF_VIEW = "_tokenmerge_state_of_view"
"""Name of an attribute of the base of a view that a state travels with: where in the graph the view is, and its state."""
_IDENTITY = "BackwardHookFunctionBackward"
"""What autograd calls the identity by which full backward hooks learn of a gradient."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """What holds for one forward pass from its first block on; every state of the pass refers to it.

    Attributes:
        settings: those in force when it began.
        batch: images B.
        tokens: tokens N0 per image that entered the first block, prefix included.
        grid: patches along each axis, `(h, w)`, `(t, h, w)` or `(t,)`, as the embedding made them; `None` if nobody saw them.
        schedule: r per block for these tokens, as asked for.
        full: whether blocks hand on unmerged tokens, for readers that expect upstream's shapes.
        first_size: `[B, N0]` float32, 0 for padding and 1 for all others; `None` without padding.
        padded: whether some tokens may be padding.
        ambiguous: whether another pass, with other settings, has begun with the very same tensor.
    """

    settings: Settings
    batch: int
    tokens: int
    grid: tuple[int, ...] | None
    schedule: Schedule
    full: bool = False
    first_size: Tensor | None = None
    padded: bool = False
    ambiguous: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What one block did.

    Attributes:
        plan: which tokens it made one; `None` if none.
        size: patches per token after it, `[B, N]` float32; `None` while all are 1. Kept when tracing, as all that follows.
        similarity: cosine of each token that merged and of the token it joined, `[B, r]` float32; NaN where it was dropped.
        attention: of the class token to the tokens in attention, `[B, N]` float32.
    """

    plan: MergePlan | None
    size: Tensor | None = None
    similarity: Tensor | None = None
    attention: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TokenState:
    """Where the tokens of one activation tensor come from.

    Attributes:
        run: the pass.
        size: patches per token, `[B, N]` float32; `None` while every token is one patch. Padding has size 0, and
            so weighs nothing wherever sizes weigh: in means, in attention (log 0 = −inf) and in coordinates.
        steps: one for each block passed; empty unless plans are kept.
        positions: coordinates `[B, N, P]` float32 of the tokens, for attention that turns by position; `None`
            while no token has moved.
        merged: set when the tensor that carries this state was unmerged for its reader: the real, merged
            activations `[B, N, C]`, which the next block goes on with.
        log_size: `[B, N]`: logarithms of the sizes in the dtype of the attention that was expected next, where the kernel
            that merged has written them.
        rollout: `[B, N, N0]` float32: how much of each original token is in each token (attention rollout).
        shared: whether the tensor is a gradient: patches share that of their token, where they each have its value.
    """

    run: Pass
    size: Tensor | None = None
    steps: tuple[Step, ...] = ()
    positions: Tensor | None = None
    merged: Tensor | None = None
    log_size: Tensor | None = None
    rollout: Tensor | None = None
    shared: bool = False

    def __deepcopy__(self, memo: Any) -> TokenState:
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # a file of features holds what any file may: it carries nothing when it is loaded

    @property
    def plans(self) -> tuple[MergePlan, ...]:
        """The plans so far, without the blocks that merged nothing."""
        return tuple(step.plan for step in self.steps if step.plan is not None)

    @property
    def drops(self) -> bool:
        """Whether any plan may have dropped tokens."""
        return any(plan.drops for plan in self.plans)

    def detached(self) -> TokenState:
        """The same without the graph of a matcher that learns, and without activations."""
        steps = tuple(
            dataclasses.replace(
                step, plan=step.plan and dataclasses.replace(step.plan, gate=None), size=_cut_off(step.size)
            )
            for step in self.steps
        )
        return dataclasses.replace(
            self, steps=steps, size=_cut_off(self.size), positions=None, merged=None, log_size=None
        )

    def to(self, device: torch.device) -> TokenState:
        """The same on another device, to which something has moved the tokens."""
        moved: TokenState = _moved(self, device)
        return moved

    def source(self) -> Tensor | None:
        """`[B, N0]`, int64: the current token of each token that entered block 0, −1 if dropped; `None` if none merged."""
        return source_map(self.plans)

    def anchor(self) -> Tensor | None:
        """Return `[B, N]` int64: the original token at whose position each current token is; `None` if none merged."""
        return None if (places := self.places()) is None else places[0]

    def places(self) -> tuple[Tensor, Tensor] | None:
        """Return the anchors `[B, N]` int64 and all other original tokens `[B, N₀ − N]`; `None` if none merged."""
        anchor: Tensor | None = None
        joined: list[Tensor] = []
        for plan in self.plans:
            joined.append(plan.source if anchor is None else anchor.gather(1, plan.source))
            anchor = plan.kept if anchor is None else anchor.gather(1, plan.kept)
        return None if anchor is None else (anchor, joined[0] if len(joined) == 1 else torch.cat(joined, dim=1))

    def unmerge(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, N0, C]`: each original token gets the value of the token it became, 0 if it was dropped."""
        source = self.source()
        return x if source is None else spread_rows(x, source, self.drops)

    def one_of_equals(self, full: Tensor) -> Tensor:
        """`[B, N0, C]` -> `[B, N, C]`, the inverse of `unmerge`: of equal tokens, one stays."""
        anchor = self.anchor()
        return full if anchor is None else take_rows(full, anchor)

    def merge_again(self, full: Tensor) -> Tensor:
        """The same for tokens that may no longer be equal: the mean of those that are one, `[B, N, C]`."""
        whole: MergePlan | None = None
        for plan in self.plans:
            whole = plan if whole is None else whole.compose(plan)
        return full if whole is None else whole.merge(full, self.run.first_size)[0]


def _cut_off(size: Tensor | None) -> Tensor | None:
    return size.detach() if size is not None and size.requires_grad else size


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(entry, device) for entry in value)
    if isinstance(value, TokenState | Pass | Step | MergePlan):
        fields = {field.name: _moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def attach(x: Tensor, state: TokenState) -> Tensor:
    """Let the state travel with the activation tensor `x`, which is given back."""
    setattr(x, STATE, state)
    if not torch.compiler.is_compiling() and x.grad_fn is not None and x._base is not None:
        setattr(x._base, _OF_VIEW, (x.grad_fn, state))  # a view of `x` knows this base, but not `x`
    return x


def state_of(x: Any) -> TokenState | None:
    """The state that travels with `x`, or `None`."""
    if isinstance(x, Proxy):
        return None
    state = getattr(x, STATE, None)
    if state is None and isinstance(x, Tensor):
        state = _beyond_backward_hooks(x)
    return state if isinstance(state, TokenState) else None


def _beyond_backward_hooks(x: Tensor) -> TokenState | None:
    """The state of the tensor that `x` is, where modules with full backward hooks have put views in its place.

    PyTorch lets what enters and leaves such a module pass through an identity, by which it learns of the gradient.
    """
    if torch.compiler.is_compiling() or x.grad_fn is None or x._base is None:
        return None
    own = (x._base.grad_fn, getattr(x._base, STATE, None))
    known = [(at, state) for at, state in (own, getattr(x._base, _OF_VIEW, own)) if state is not None]
    node: Any = x.grad_fn
    number, state = x.output_nr, cast("TokenState | None", None)
    while state is None and node is not None and node.name() == _IDENTITY:
        node, number = node.next_functions[number]
        state = next((state for at, state in known if at is node), None)
    if state is None:
        return None
    # the next block goes on with merged tokens: taken from `x`, so that gradients go the way of the hooks
    return state if state.merged is None else dataclasses.replace(state, merged=state.one_of_equals(x))


def state_after_hooks(x: Tensor, given: Tensor | None, state: TokenState) -> TokenState | None:
    """The state that `given` carried, for the tensor that forward pre-hooks have put in its place; `None` if that is another.

    The same memory, seen the same way, is the same tokens (FSDP2 passes them through an identity); and so are those that were
    only moved to another device or cast. Whatever else was computed may be other tokens, in another order.
    """
    if given is None or x is given:
        return state
    if x.shape != given.shape:
        return None
    if x.device != given.device or x.dtype != given.dtype:
        return state
    try:
        same = x.untyped_storage()._cdata == given.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # tensors of function transforms have no memory to look at
        return state
    return state if same and x.stride() == given.stride() and x.storage_offset() == given.storage_offset() else None


def needed_state(x: Tensor, reader: str) -> TokenState:
    """The state that travels with `x`, for a reader that would be wrong without it.

    Raises:
        PatchError: if there is none.
    """
    state = state_of(x)
    if state is None:
        raise PatchError(
            f"{reader} received tokens without their sizes although the model merges, so something before it made a new tensor: "
            "give it the very tensor that the model made, or tokenmerge.carry(new, like=old)"
        )
    return state


def carried_state(features: Any, what: str, giver: str) -> TokenState:
    """The state of features that a user hands in, or an `InputError` that says what they miss and what gives it."""
    state = state_of(features)
    if state is None:
        shape = tuple(features.shape) if isinstance(features, Tensor) else repr(features)[:40]
        raise InputError(
            f"these features {shape} carry no {what}, but the very tensor that {giver} was expected: ask before changing "
            "it, or tokenmerge.carry(new, like=old)"
        )
    return state


def plans_needed(state: TokenState, reader: str) -> TokenState:
    """The state, if it tells of each patch which token it became.

    Raises:
        PatchError: if tokens merged and their plans did not travel.
    """
    if state.size is not None and not state.steps and state.size.shape[1] != state.run.tokens:
        raise PatchError(
            f"{reader} received merged tokens without the plans of their merges, but it must know which token each patch became: "
            "patch with trace=True, or handle.update(trace=True)"
        )
    return state


def carry(new: Tensor, *, like: Tensor) -> Tensor:
    """Let a new tensor carry on what is known of another one's tokens: sizes, plans, positions.

    For adapters, steering vectors and hooks that put another tensor in place of a block's output:
    `lambda module, args, output: tokenmerge.carry(output + vector, like=output)`.

    Args:
        new: `[B, N, C']`, token by token what `like` was.
        like: `[B, N, C]`, an output of a patched model or of one of its blocks.

    Returns:
        `new`. Where `like` carries nothing, as in a model that is not patched or merges nothing, neither does it.

    Raises:
        InputError: if the two differ in images or tokens.
    """
    for tensor in (new, like):
        if not isinstance(tensor, Tensor) or tensor.dim() < 2:
            raise InputError(
                f"{tensor!r:.40} was given, but tensors of tokens [B, N, C] were expected: give block outputs"
            )
    state = state_of(like)
    if new.shape[:2] != like.shape[:2]:
        raise InputError(
            f"the new tensor is {tuple(new.shape)}, but [{like.shape[0]}, {like.shape[1]}, C] was expected: as many images and "
            "tokens as the other"
        )
    if state is None:
        return new
    if state.merged is not None:  # the next block goes on with merged tokens: those of the new tensor
        state = dataclasses.replace(state, merged=state.merge_again(new))
    return attach(new, state)


def token_sizes(features: Tensor) -> Tensor:
    """How many patches each token of a patched model's features stands for.

    Args:
        features: the very tensor that `forward_features` of a patched model returned, `[B, N, C]`.

    Returns:
        `[B, N]`, float32.

    Raises:
        InputError: if the tensor carries no sizes: it was changed since, or the model is not patched.
    """
    state = carried_state(features, "token sizes", "a patched model's forward_features returned")
    if state.size is None or state.merged is not None:
        return torch.ones(features.shape[:2], device=features.device)
    return state.size


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """`Σ size·x / Σ size` over the tokens: `[B, N, C]`, `[B, N]` -> `[B, C]`, accumulated in float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = size.to(wide) / size.sum(dim=1, keepdim=True).to(wide).clamp_min(1.0)
    return (x.to(wide) * weight.unsqueeze(2)).sum(dim=1).to(x.dtype)
