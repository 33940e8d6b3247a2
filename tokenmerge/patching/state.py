"""State that travels with the tokens through one forward pass: settings, sizes and, where something reads them, plans.

The state is an attribute of the activation tensor. A shared dict would break under gradient checkpointing, which runs
blocks again in backward and in another order, and a slot in each block would mix up two views of one training step. With
an attribute, a recomputed block sees exactly the state that it saw the first time, and passes cannot reach each other.
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
from tokenmerge.plan import Carried, MergePlan, source_map
from tokenmerge.schedule import Schedule

STATE = "_tokenmerge_state"
"""Name of the attribute, and of the argument by which a block's `__call__` passes the state to `forward`."""
UNMERGED = "_tokenmerge_unmerged"
"""Name of a tensor's attribute that marks the input of a block in a pass without merging, and of the argument that reports
this mark when gradient checkpointing recomputes the block from the same tensor.
"""
GRID = "_tokenmerge_grid"
"""Name of the attribute that keeps the grid, the patches along each axis, on the tensor with which a pass began."""
_OF_VIEW = "_tokenmerge_state_of_view"
"""Name of the attribute on the base of a view: the view's position in the autograd graph, and the state of the view."""
_IDENTITY = "BackwardHookFunctionBackward"
"""Autograd's name of the identity function that full backward hooks insert to receive gradients."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """Facts that hold for one whole forward pass; every state of the pass refers to it.

    Attributes:
        settings: settings in force when the pass began.
        batch: B, images in the batch.
        tokens: N₀, tokens per image that entered the first block, prefix tokens included.
        grid: patches along each axis as the embedding made them: `(h, w)`, `(t, h, w)` or `(t,)`; `None` if unknown.
        schedule: r per block for this number of tokens.
        full: whether every block returns unmerged tokens, for readers that expect upstream's shapes.
        first_size: `[B, N₀]` float32: 0 for padding, 1 for all other tokens; `None` without padding.
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
    """Record of one block's merge.

    Attributes:
        plan: the merge; `None` if the block merged nothing.
        size: patches per token after the block, `[B, N']` float32; `None` if all are 1. Only a trace keeps this and the
            following fields.
        similarity: `[B, r]` float32: cosine similarity of each merged token to the token it joined; NaN if it was dropped.
        attention: `[B, N]` float32: attention from the class token to each token.
    """

    plan: MergePlan | None
    size: Tensor | None = None
    similarity: Tensor | None = None
    attention: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TokenState:
    """History of the tokens in one activation tensor.

    Attributes:
        run: the forward pass.
        size: patches per token, `[B, N]` float32; `None` if all are 1. Padding has size 0 and therefore weight 0 in means,
            in attention (log 0 = −inf) and in coordinates.
        steps: one step for each block that ran; empty unless plans are kept.
        positions: coordinates `[B, N, P]` float32, for attention with positions of its own; `None` until a token moves.
        merged: the merged activations `[B, N, C]`, with which the next block continues, if the tensor that carries this
            state was unmerged for its reader; `None` otherwise.
        log_size: `[B, N]`: logarithms of the sizes in the dtype of the next attention, if the merging kernel wrote them.
        rollout: `[B, N, N₀]` float32: attention rollout, the share of each original token in each current token.
        shared: whether the tensor is a gradient that all patches of a merged token share, because each has its value.
        carried: what a learned matcher handed on in the block before, or `None`.
    """

    run: Pass
    size: Tensor | None = None
    steps: tuple[Step, ...] = ()
    positions: Tensor | None = None
    merged: Tensor | None = None
    log_size: Tensor | None = None
    rollout: Tensor | None = None
    shared: bool = False
    carried: Carried | None = None

    def __deepcopy__(self, memo: Any) -> TokenState:
        return self  # a state is immutable

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # `torch.load` accepts only common types, so saved features carry no state

    @property
    def plans(self) -> tuple[MergePlan, ...]:
        """Plans so far, without the blocks that merged nothing."""
        return tuple(step.plan for step in self.steps if step.plan is not None)

    @property
    def drops(self) -> bool:
        """Whether any plan may have dropped tokens."""
        return any(plan.drops for plan in self.plans)

    def detached(self) -> TokenState:
        """Return a copy without activations and without the autograd graph of a learned matcher."""
        steps = tuple(
            dataclasses.replace(step, plan=step.plan and step.plan.recorded(), size=_cut_off(step.size))
            for step in self.steps
        )
        return dataclasses.replace(
            self, steps=steps, size=_cut_off(self.size), positions=None, merged=None, log_size=None, carried=None
        )

    def to(self, device: torch.device) -> TokenState:
        """Return a copy on another device, after something moved the tokens there."""
        moved: TokenState = _moved(self, device)
        return moved

    def source(self) -> Tensor | None:
        """Return `[B, N₀]` int64: the current token of each original one, −1 if dropped; `None` if no tokens merged."""
        return source_map(self.plans)

    def anchor(self) -> Tensor | None:
        """Return `[B, N]` int64: the original token at the position of each current token; `None` if no tokens merged."""
        return None if (places := self.places()) is None else places[0]

    def places(self) -> tuple[Tensor, Tensor] | None:
        """Return the anchors `[B, N]` and all other original tokens `[B, N₀ − N]`, int64; `None` if no tokens merged."""
        anchor: Tensor | None = None
        joined: list[Tensor] = []
        for plan in self.plans:
            joined.append(plan.source if anchor is None else anchor.gather(1, plan.source))
            anchor = plan.kept if anchor is None else anchor.gather(1, plan.kept)
        return None if anchor is None else (anchor, joined[0] if len(joined) == 1 else torch.cat(joined, dim=1))

    def unmerge(self, x: Tensor) -> Tensor:
        """Copy the values `x [B, N, C]` of current tokens to their original tokens: `[B, N₀, C]`; 0 if dropped."""
        source = self.source()
        return x if source is None else spread_rows(x, source, self.drops)

    def one_of_equals(self, full: Tensor) -> Tensor:
        """Invert `unmerge`: keep one token of each group of equal tokens in `full [B, N₀, C]`: `[B, N, C]`."""
        anchor = self.anchor()
        return full if anchor is None else take_rows(full, anchor)

    def merge_again(self, full: Tensor) -> Tensor:
        """Merge `full [B, N₀, C]`, whose tokens may differ within a group, by the mean of each group: `[B, N, C]`."""
        whole: MergePlan | None = None
        for plan in self.plans:
            whole = plan if whole is None else whole.compose(plan)
        return full if whole is None else whole.merge(full, self.run.first_size)[0]


def _cut_off(size: Tensor | None) -> Tensor | None:
    return size.detach() if size is not None and size.requires_grad else size


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Carried):
        return Carried(*(_moved(entry, device) for entry in value))
    if isinstance(value, tuple):
        return tuple(_moved(entry, device) for entry in value)
    if isinstance(value, TokenState | Pass | Step | MergePlan):
        fields = {field.name: _moved(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def attach(x: Tensor, state: TokenState) -> Tensor:
    """Attach a state to the activation tensor `x`, and return `x`."""
    setattr(x, STATE, state)
    if not torch.compiler.is_compiling() and x.grad_fn is not None and x._base is not None:
        setattr(x._base, _OF_VIEW, (x.grad_fn, state))  # a view of `x` knows this base, but not `x`
    return x


def state_of(x: Any) -> TokenState | None:
    """Return the state that `x` carries, or `None`."""
    if isinstance(x, Proxy):
        return None
    state = getattr(x, STATE, None)
    if state is None and isinstance(x, Tensor):
        state = _beyond_backward_hooks(x)
    return state if isinstance(state, TokenState) else None


def _beyond_backward_hooks(x: Tensor) -> TokenState | None:
    """Return the state of the tensor that full backward hooks replaced by the view `x`, or `None`.

    PyTorch passes the inputs and outputs of a module with such hooks through an identity, to receive their gradients.
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
    # the next block continues with merged tokens, which are taken from `x` so that gradients pass the hooks
    return state if state.merged is None else dataclasses.replace(state, merged=state.one_of_equals(x))


def state_after_hooks(x: Tensor, given: Tensor | None, state: TokenState) -> TokenState | None:
    """Return the state for a tensor that forward pre-hooks put in place of `given`; `None` if it may hold other tokens.

    Tensors that view the same memory in the same way hold the same tokens (FSDP2 passes them through an identity), and so do
    tensors that were only cast, or moved to another device. Anything else may hold other tokens, or the same in another order.

    Args:
        x: the tensor that `forward` received.
        given: the tensor that the block was called with, if it still exists.
        state: the state that `given` carried.
    """
    if given is None or x is given:
        return state
    if x.shape != given.shape:
        return None
    if x.device != given.device or x.dtype != given.dtype:
        return state
    try:
        same = x.untyped_storage()._cdata == given.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # tensors of function transforms have no storage
        return state
    return state if same and x.stride() == given.stride() and x.storage_offset() == given.storage_offset() else None


def needed_state(x: Tensor, reader: str) -> TokenState:
    """Return the state that `x` carries, for a reader that would be wrong without it.

    Args:
        x: tokens of a patched model.
        reader: the reader's name, for the message.

    Raises:
        PatchError: if `x` carries no state.
    """
    state = state_of(x)
    if state is None:
        raise PatchError(
            f"{reader} received tokens without their sizes although the model merges, so something before it made a new tensor: "
            "give it the very tensor that the model made, or tokenmerge.carry(new, like=old)"
        )
    return state


def carried_state(features: Any, what: str, giver: str) -> TokenState:
    """Return the state of features that a user passes in.

    Args:
        features: the features.
        what: the information that the caller needs, for the message.
        giver: the function that returns suitable features, for the message.

    Raises:
        InputError: if `features` carries no state.
    """
    state = state_of(features)
    if state is None:
        shape = tuple(features.shape) if isinstance(features, Tensor) else repr(features)[:40]
        raise InputError(
            f"these features {shape} carry no {what}, but the very tensor that {giver} was expected: ask before changing "
            "it, or tokenmerge.carry(new, like=old)"
        )
    return state


def plans_needed(state: TokenState, reader: str) -> TokenState:
    """Return `state` itself, after checking that it tells which token each patch became.

    Args:
        state: the state.
        reader: the name of the reader that needs the plans, for the message.

    Raises:
        PatchError: if tokens merged, but the state holds no plans.
    """
    if state.size is not None and not state.steps and state.size.shape[1] != state.run.tokens:
        raise PatchError(
            f"{reader} received merged tokens without the plans of their merges, but it must know which token each patch became: "
            "patch with trace=True, or handle.update(trace=True)"
        )
    return state


def carry(new: Tensor, *, like: Tensor) -> Tensor:
    """Attach the token sizes, plans and positions that `like` carries to a new tensor.

    Adapters, steering vectors and hooks need this if they replace the output of a block:
    `lambda module, args, output: tokenmerge.carry(output + vector, like=output)`.

    Args:
        new: `[B, N, C']`, any dtype: one row for each token of `like`, in the same order.
        like: `[B, N, C]`: an output of a patched model or of one of its blocks.

    Returns:
        `new` itself. It gets no state if `like` has none, as in a model that is not patched or merges nothing.

    Raises:
        InputError: if `new` and `like` differ in images or tokens.

    Example:
        >>> import timm, torch, tokenmerge
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=96).eval()
        >>> handle = tokenmerge.patch(model, r=8)
        >>> features = model.forward_features(torch.zeros(1, 3, 96, 96))
        >>> new = tokenmerge.carry(features + 1, like=features)
        >>> tokenmerge.token_sizes(new).sum()  # 36 patches and the class token
        tensor(37.)
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
    if state.merged is not None:  # the next block continues with merged tokens, which must come from the new tensor
        state = dataclasses.replace(state, merged=state.merge_again(new))
    return attach(new, state)


def token_sizes(features: Tensor) -> Tensor:
    """Return the number of patches that each token in a patched model's features stands for.

    Args:
        features: `[B, N, C]`: the very tensor that `forward_features` of a patched model returned.

    Returns:
        Sizes `[B, N]` float32; 1 for a prefix token, which stands for itself.

    Raises:
        InputError: if the tensor carries no sizes, because it was changed or the model is not patched.

    Example:
        >>> import timm, torch, tokenmerge
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=96).eval()
        >>> handle = tokenmerge.patch(model, r=8)
        >>> features = model.forward_features(torch.zeros(1, 3, 96, 96))
        >>> sizes = tokenmerge.token_sizes(features)
        >>> sizes.shape, sizes.sum()  # 21 tokens stand for 36 patches and the class token
        (torch.Size([1, 21]), tensor(37.))
    """
    state = carried_state(features, "token sizes", "a patched model's forward_features returned")
    if state.size is None or state.merged is not None:
        return torch.ones(features.shape[:2], device=features.device)
    return state.size


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """Return the size-weighted mean `Σ size·x / Σ size` of tokens, `[B, C]` in the dtype of `x`.

    Args:
        x: tokens `[B, N, C]`, any floating dtype; the mean is accumulated in float32 (float64 for float64).
        size: patches per token `[B, N]`.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = size.to(wide) / size.sum(dim=1, keepdim=True).to(wide).clamp_min(1.0)
    return (x.to(wide) * weight.unsqueeze(2)).sum(dim=1).to(x.dtype)
