"""What travels with the activations: token sizes and, when someone needs them, the plans so far.

The state is an attribute of the activation tensor itself. So it needs no shared dict (which gradient
checkpointing breaks: blocks run again in backward, in another order) and no slot per block (which mixes up
two views of one step). A recomputed block sees exactly the state that it saw the first time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import InputError
from tokenmerge.plan import MergePlan, source_map, spread_rows, take_rows

_ATTRIBUTE = "_tokenmerge_state"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenState:
    """Where the tokens of one activation tensor come from.

    Attributes:
        size: patches per token, `[B, N]` float32; `None` while every token is one patch. Padding has size 0, and
            so weighs nothing wherever sizes weigh: in means, in attention (log 0 = −inf) and in coordinates.
        plans: one entry per block passed, `None` where it merged nothing; empty unless plans are kept.
        full_output: whether blocks shall hand on unmerged tokens, for readers that expect upstream's shapes.
        padded: whether some tokens may be padding.
        first_size: `[B, N0]` float32, 0 for padding and 1 for all others; `None` without padding.
        positions: coordinates `[B, N, P]` float32 of the tokens, for attention that turns by position; `None`
            while no token has moved.
        merged: set when the tensor that carries this state was unmerged for its reader: the real, merged
            activations `[B, N, C]`, which the next block goes on with.
        log_size: `[B, N]`: logarithms of the sizes in the dtype of the attention that was expected next, where the kernel
            that merged has written them.
    """

    size: Tensor | None = None
    plans: tuple[MergePlan | None, ...] = ()
    full_output: bool = False
    padded: bool = False
    first_size: Tensor | None = None
    positions: Tensor | None = None
    merged: Tensor | None = None
    log_size: Tensor | None = None

    def to(self, device: torch.device) -> TokenState:
        """The same on another device, to which something has moved the tokens."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, MergePlan):
                return dataclasses.replace(
                    value, **{f.name: moved(getattr(value, f.name)) for f in dataclasses.fields(value)}
                )
            return tuple(moved(one) for one in value) if isinstance(value, tuple) else value

        return dataclasses.replace(self, **{f.name: moved(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def source(self) -> Tensor | None:
        """`[B, N0]`, int64: the current token of each token that entered block 0, −1 if dropped; `None` if none merged."""
        return source_map(plan for plan in self.plans if plan is not None)

    def anchor(self) -> Tensor | None:
        """`[B, N]`, int64: the original token at whose position each current token is; `None` if none merged."""
        total: Tensor | None = None
        for plan in self.plans:
            if plan is not None:
                total = plan.keep if total is None else total.gather(1, plan.keep)
        return total

    @property
    def drops(self) -> bool:
        """Whether any plan may have dropped tokens."""
        return any(plan.drops for plan in self.plans if plan is not None)

    def unmerge(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, N0, C]`: each original token gets the value of the token it became, 0 if it was dropped."""
        source = self.source()
        return x if source is None else spread_rows(x, source, self.drops)

    def one_of_each(self, full: Tensor) -> Tensor:
        """`[B, N0, C]` -> `[B, N, C]`, the inverse of `unmerge`: of equal tokens, one stays."""
        source = self.source()
        if source is None or self.size is None:
            return full
        return take_rows(full, MergePlan.from_assign(source, self.size.shape[1]).keep)


def carry(x: Tensor, state: TokenState) -> Tensor:
    """Attach `state` to the activation tensor `x` and return `x`."""
    setattr(x, _ATTRIBUTE, state)
    return x


def state_of(x: Tensor) -> TokenState | None:
    """The state that travels with `x`, or `None`."""
    state: TokenState | None = getattr(x, _ATTRIBUTE, None)
    return state


class _Wish(threading.local):
    """Whether this thread is inside `wish_full_output`, or inside a module that wishes it (`owner`)."""

    full_output = False
    owner: torch.nn.Module | None = None


_wish = _Wish()


@contextlib.contextmanager
def wish_full_output() -> Iterator[None]:
    """Passes that start within it have full output; the wish travels with the activation, also into recomputation."""
    before, _wish.full_output = _wish.full_output, True
    try:
        yield
    finally:
        _wish.full_output = before


def note_wish(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the first block: attaches the wish for full output to what enters it."""
    if _wish.full_output:
        x = args[0] if args else next(iter(kwargs.values()))
        carry(x, dataclasses.replace(state_of(x) or TokenState(), full_output=True))


def wish_hidden_states(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of modules that collect what their blocks put out (`output_hidden_states`)."""
    wanted = kwargs.get("output_hidden_states")
    if wanted is None:
        wanted = getattr(getattr(module, "config", None), "output_hidden_states", False)
    if wanted is not False and wanted is not None and not _wish.full_output:
        _wish.full_output, _wish.owner = True, module


def end_wish(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook, called also after an error: the wish of `wish_hidden_states` ends with its module."""
    if _wish.owner is module:
        _wish.full_output, _wish.owner = False, None


def wish_always(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`wish_hidden_states` for modules that always collect: backbones."""
    if not _wish.full_output:
        _wish.full_output, _wish.owner = True, module


def unmerge_input(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of heads that read all tokens and know nothing of sizes: they get the unmerged ones."""
    state = state_of(args[0])
    if state is None or state.merged is not None:
        return None
    return (state.unmerge(args[0]), *args[1:])


class CarryThrough:
    """Mix-in before modules that map tokens one by one (the final norm): the state passes through.

    Not a hook, because hooks that ran before it may have put another tensor in place of what came in: FSDP2's do.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call."""
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]  # nn.Module's
        state = state_of(args[0]) if args else None
        if state is not None and state_of(output) is None:
            carry(output, state)
        return output


def token_sizes(features: Tensor) -> Tensor:
    """How many patches each token of a patched model's features stands for, `[B, N]`, float32.

    Args:
        features: the very tensor that `forward_features` of a patched model returned, `[B, N, C]`.

    Raises:
        InputError: if the tensor carries no sizes: it was changed since, or the model is not patched.
    """
    state = state_of(features)
    if state is None:
        raise InputError(
            f"these features {tuple(features.shape)} carry no token sizes, but the very tensor that a patched model's "
            "forward_features returned was expected: ask for the sizes before changing the features"
        )
    if state.size is None or state.merged is not None:
        return torch.ones(features.shape[:2], device=features.device)
    return state.size


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """`Σ size·x / Σ size` over the tokens: `[B, N, C]`, `[B, N]` -> `[B, C]`, accumulated in float32."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = size.to(wide) / size.sum(dim=1, keepdim=True).to(wide).clamp_min(1)
    return (x.to(wide) * weight.unsqueeze(2)).sum(dim=1).to(x.dtype)
