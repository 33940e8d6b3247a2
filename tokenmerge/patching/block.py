"""The one patched block, for every family."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tokenmerge.attention import close_tap, head_mean, open_tap, size_bias
from tokenmerge.errors import PatchError
from tokenmerge.matching import get_matcher
from tokenmerge.patching.family import BlockFamily
from tokenmerge.plan import MergePlan
from tokenmerge.schedule import keep_step, max_merges
from tokenmerge.state import TokenState, carry, state_of


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What one patched block does; replaced as a whole by `Handle.update`.

    Attributes:
        family: seams of upstream's block.
        index: position of the block in the model.
        r: tokens to merge away here.
        keep: fraction of the unprotected tokens to keep here instead, whatever their number.
        protected: leading tokens that never merge.
        prop_attn: whether sizes weigh in attention.
        matcher: name of the matching algorithm.
        merged_before: whether an earlier block merges, so that a state must arrive.
        merges_at_all: whether any block of the model merges.
        keep_plans: whether plans travel with the sizes.
        trace: whether to note the departing state for `Handle.trace`.
    """

    family: BlockFamily
    index: int
    r: int
    keep: float | None
    protected: int
    prop_attn: bool
    matcher: str
    merged_before: bool
    merges_at_all: bool
    keep_plans: bool
    trace: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What a traced block noted of its latest pass; for looking at, never for computing.

    Attributes:
        state: the state that left the block.
        batch: images B.
        tokens: tokens N that entered the block.
        device: where they are.
    """

    state: TokenState
    batch: int
    tokens: int
    device: torch.device


class MergeBlock:
    """Mix-in before upstream's block class: attention, match, merge, MLP.

    `x [B, N, C]` becomes `[B, N − r, C]`; the sizes arrive and leave as an attribute of the activation.
    """

    _tokenmerge_spec: BlockSpec
    _tokenmerge_seen: Seen

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Upstream's block with tokens merged between attention and MLP (paper, figure 2).

        Raises:
            PatchError: if the sizes were lost on the way, or a mask was given while merging.
        """
        spec = self._tokenmerge_spec
        family = spec.family
        if any(value is not None and value is not False for value in (*args, *kwargs.values())):
            return self._masked(x, *args, **kwargs)
        state = _arriving(x, spec)
        if state.merged is not None:
            x = state.merged
        batch, tokens, _ = x.shape
        wanted = spec.r if spec.keep is None else keep_step(spec.keep, tokens, spec.protected)
        r = min(wanted, max_merges(tokens, spec.protected))
        bias = size_bias(state.size, x) if spec.prop_attn else None

        if r == 0:
            x = family.attention(self, x, bias)
            plan, size = None, state.size
        else:
            open_tap()
            x = family.attention(self, x, bias)
            plan = _plan(self, close_tap(), r, batch)
            x, size = plan.merge(x, state.size)
        if family.mlp is not None:
            x = family.mlp(self, x)

        plans = (*state.plans, plan) if spec.keep_plans or state.full_output else ()
        state = TokenState(size, plans, state.full_output)
        if spec.trace and not torch.compiler.is_exporting():
            self._tokenmerge_seen = Seen(state, batch, tokens, x.device)
        full = state.unmerge(x) if state.full_output else x
        if full is not x:
            return carry(full, dataclasses.replace(state, merged=x))
        return carry(x, state)

    def _masked(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A mask speaks of the tokens before any merge: fine as long as none happens."""
        if self._tokenmerge_spec.merges_at_all:
            raise PatchError(
                "an attention mask (or is_causal) was given to a model that merges tokens, but a mask over the "
                "original tokens does not fit merged ones: call the model without it, or handle.update(r=0) first"
            )
        vars(self).pop("_tokenmerge_seen", None)  # no older pass may be taken for this one
        out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # upstream's block comes next
        return out

    def _get_name(self) -> str:
        return f"Merge{type(self).__name__}"

    def extra_repr(self) -> str:
        """`r` of this block, for `print(model)`."""
        return f"r={self._tokenmerge_spec.r}"


def _plan(block: MergeBlock, keys: tuple[Tensor, ...], r: int, batch: int) -> MergePlan:
    """The matcher's plan, made sure to be what every shape after it relies on."""
    spec = block._tokenmerge_spec
    if not keys:
        raise PatchError(
            f"block {spec.index} noted no keys, so the module that gives them was replaced since the model was patched: "
            "unpatch before changing modules, and patch again"
        )
    plan = get_matcher(spec.matcher)(head_mean(keys), r, spec.protected)
    if plan.r != r or plan.keep.shape[0] != batch:
        raise PatchError(
            f"matcher {spec.matcher!r} merged {plan.r} tokens in {plan.keep.shape[0]} images, but block {spec.index} "
            f"asked for {r} in {batch}: a matcher must merge exactly r"
        )
    return plan


def _arriving(x: Tensor, spec: BlockSpec) -> TokenState:
    """The state that came with `x`; a fresh one at the start of the network."""
    state = state_of(x)
    if state is None or spec.index == 0:
        if spec.merged_before:
            raise PatchError(
                f"block {spec.index} received tokens without their sizes although earlier blocks merge, so "
                "something between the blocks made a new tensor (reentrant checkpointing and FSDP2 do): use "
                "use_reentrant=False, do not shard single blocks, and do not change activations between blocks"
            )
        return TokenState(full_output=state is not None and state.full_output)
    return state
