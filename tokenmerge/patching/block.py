"""The one patched block, for every family."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.forms import running_form
from tokenmerge.attention.pairs import PairMap
from tokenmerge.attention.rotary import Rotary
from tokenmerge.attention.tap import Inside, Noted, attention_dtype, close_tap, open_tap, size_bias, take_inside
from tokenmerge.errors import PatchError
from tokenmerge.ops import Backend
from tokenmerge.ops.combine import Reduce
from tokenmerge.ops.exporting import is_exporting
from tokenmerge.patching.families.family import BlockFamily
from tokenmerge.patching.masks import padding_in_pairs, padding_sizes
from tokenmerge.patching.rule import Rule, make_plan, seen_by_class_token
from tokenmerge.patching.state import TokenState, carry, state_of
from tokenmerge.plan import MergePlan, take_rows
from tokenmerge.schedule import keep_step, max_merges

STATE = "_tokenmerge_state"
"""Name of the argument by which a block's call hands the state of its input to its forward."""


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
        attention: how they reach its kernel.
        rule: how it decides what merges.
        place: whether tokens merge before attention, between it and the MLP, or after that.
        combine: what becomes of tokens that merge.
        backend: what runs the merge.
        in_order: whether the tokens that are left keep their order.
        mean_positions: whether a merged token stands at the mean of its positions, not at its destination's.
        rotary: how this block's table of rotary positions is read and written, if it takes one.
        merged_before: whether an earlier block merges, so that a state must arrive.
        merges_at_all: whether any block of the model merges.
        keep_plans: whether plans travel with the sizes.
        full_output: whether this is the last block and hands on unmerged tokens.
        merged_states: whether hidden states that someone collects stay merged: the user asked for merged output.
        trace: whether to note the departing state for `Handle.trace`.
        look: whether to note what the class token attends to as well.
    """

    family: BlockFamily
    index: int
    r: int
    keep: float | None
    protected: int
    prop_attn: bool
    attention: str
    rule: Rule
    place: str
    combine: Reduce
    backend: Backend
    in_order: bool
    mean_positions: bool
    rotary: Rotary | None
    merged_before: bool
    merges_at_all: bool
    keep_plans: bool
    full_output: bool
    merged_states: bool
    trace: bool
    look: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What a traced block noted of its latest pass; for looking at, never for computing.

    Attributes:
        state: the state that left the block.
        batch: images B.
        tokens: tokens N that entered the block.
        device: where they are.
        similarity: of the tokens that merged, `[B, r]`, in the order of the plan's sources; `None` if none did.
        attention: of the class token to the tokens in attention, `[B, N]`; `None` if it was not looked at.
    """

    state: TokenState
    batch: int
    tokens: int
    device: torch.device
    similarity: Tensor | None = None
    attention: Tensor | None = None


class MergeBlock:
    """Mix-in before upstream's block class: attention, match, merge, MLP.

    `x [B, N, C]` becomes `[B, N − r, C]`; the sizes arrive and leave as an attribute of the activation.
    """

    _tokenmerge_spec: BlockSpec
    _tokenmerge_seen: Seen | None
    _tokenmerge_attention: Tensor | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's call. Hooks may put new tensors in place of what comes in (FSDP2's do, to learn when its gradient
        is there; those of device maps, to move it), so the state passes them as an argument.
        """
        state = state_of(args[0]) if args else None
        if state is not None and state.merged is None:
            kwargs[STATE] = state
        return super().__call__(*args, **kwargs)  # type: ignore[misc]  # nn.Module's

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Upstream's block with tokens merged between attention and MLP (paper, figure 2).

        Raises:
            PatchError: if the sizes were lost on the way, or an argument cannot be obeyed while merging.
        """
        spec = self._tokenmerge_spec
        family = spec.family
        kept = kwargs.pop(STATE, None)
        if kept is not None and state_of(x) is None:
            carry(x, kept)
        given = {**dict(zip(family.arguments, args, strict=False)), **kwargs}
        if not spec.merges_at_all and (not spec.trace or (family.mask and given.get(family.mask) is not None)):
            return self._untouched(x, *args, **kwargs)
        family.ready(self)
        state, given = _arriving(self, x, given)
        if state.merged is not None:
            x = state.merged
        batch, tokens, _ = x.shape
        wanted = spec.r if spec.keep is None else keep_step(spec.keep, tokens, spec.protected)
        r = min(wanted, max_merges(tokens, spec.protected))

        rule = spec.rule
        x_pre = x if r and rule.metric == "x_pre" else None
        if r and spec.place == "before":
            x, state = _merge(make_plan(self, rule, Noted(), x, x, r, spec.protected, state), x, state, spec)
        watch = (r > 0 and (rule.looks_inside or family.keys_at_call)) or spec.look
        bias, given, inside = _what_attention_sees(self, x, state, given)
        call = _call_of_attention(spec, x, bias, watch)
        open_tap(inside)
        if call is None:
            x = family.attention(self, x, bias, **given)
        else:
            with call:
                x = family.attention(self, x, bias, **given)
        noted: Noted | None = Noted(close_tap(), take_inside() if watch else None)
        if spec.look:
            assert noted is not None
            weight = state.size if spec.prop_attn or state.size is None else (state.size > 0).float()
            self._tokenmerge_attention = seen_by_class_token(rule, noted, weight)
        if r and spec.place == "between":
            assert noted is not None
            x, state = _merge(make_plan(self, rule, noted, x_pre, x, r, spec.protected, state), x, state, spec)
        if spec.place != "after":
            noted = None  # views of Q, K and V, which would stay in memory during the MLP
        if family.mlp is not None:
            x = family.mlp(self, x)
        if r and noted is not None:
            x, state = _merge(make_plan(self, rule, noted, x_pre, x, r, spec.protected, state), x, state, spec)
        return _leave(self, x, state, spec, batch, tokens, merged=r > 0)

    def _untouched(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Upstream's own forward: nothing merges anywhere, so any argument may be given."""
        if getattr(self, "_tokenmerge_seen", None) is not None:
            self._tokenmerge_seen = None  # no older pass may be taken for this one
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # upstream's block comes next

    def _get_name(self) -> str:
        return f"Merge{type(self).__name__}"

    def extra_repr(self) -> str:
        """`r` of this block, for `print(model)`."""
        return f"r={self._tokenmerge_spec.r}"


def _leave(block: Any, x: Tensor, state: TokenState, spec: BlockSpec, batch: int, tokens: int, merged: bool) -> Any:
    """What the block hands on: its tokens, with their state, or spread over the patches for who reads them."""
    if not merged:
        plans = (*state.plans, None) if spec.keep_plans or state.full_output else ()
        state = dataclasses.replace(state, plans=plans, merged=None)
    if spec.trace and not is_exporting():
        noted = [getattr(block, name, None) for name in ("_tokenmerge_similarity", "_tokenmerge_attention")]
        block._tokenmerge_seen = Seen(_without_graph(state), batch, tokens, x.device, *noted)
        # (set, not removed: Dynamo of torch 2.11 cannot look into a module's dict)
        block._tokenmerge_similarity = block._tokenmerge_attention = None
    if spec.full_output or (state.full_output and not spec.merged_states):
        full = state.unmerge(x)
        out = carry(full, dataclasses.replace(state, merged=x) if full is not x else state)
    else:
        out = carry(x, state)
    return out if spec.family.wrap is None else spec.family.wrap(out)


def _without_graph(state: TokenState) -> TokenState:
    """What a trace keeps of a state: not the graph of a matcher that learns."""
    if state.size is None or not state.size.requires_grad:
        return state
    plans = tuple(plan and dataclasses.replace(plan, gate=None) for plan in state.plans)
    return dataclasses.replace(state, size=state.size.detach(), plans=plans)


def _what_attention_sees(
    block: Any, x: Tensor, state: TokenState, given: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Any], Inside]:
    """Sizes, pair biases and positions of the current tokens, as this block's attention takes them."""
    spec: BlockSpec = block._tokenmerge_spec
    family = spec.family
    bias = size_bias(state.size, x, spec.prop_attn, state.log_size)
    pairs = _pair_map(state, spec) if family.needs_source else None
    if family.pair_bias is not None:
        between = given.pop(family.pair_bias, None)
        if between is not None:
            between = pairs(between) if pairs is not None else between
            bias = between if bias is None else between + bias
    if family.rope is not None and given.get(family.rope) is not None and state.positions is not None:
        if spec.rotary is None:
            raise PatchError(
                f"block {spec.index} was given rotary positions, but the model had none when it was patched: patch it again"
            )
        given[family.rope] = spec.rotary.table(state.positions[:, spec.protected :], given[family.rope])
    return bias, given, Inside(bias, pairs, state.positions)


def _call_of_attention(spec: BlockSpec, x: Tensor, bias: Tensor | None, watch: bool) -> AttentionCall | None:
    """What answers the call of attention, or `None` where PyTorch alone does: the mode costs a Python call per function."""
    form = running_form(spec.attention, x, bias)
    if form == "mask" and not watch and (bias is None or not spec.family.keys_at_call):
        return None
    return AttentionCall(form, watch, bias if spec.family.keys_at_call else None)


def _pair_map(state: TokenState, spec: BlockSpec) -> PairMap | None:
    source = state.source()
    if source is None or state.size is None:
        return None
    anchor = state.anchor()
    assert anchor is not None
    return PairMap(source, anchor, state.first_size, spec.mean_positions)


def _merge(plan: MergePlan, x: Tensor, state: TokenState, spec: BlockSpec) -> tuple[Tensor, TokenState]:
    if spec.in_order:
        plan = plan.in_order()
    if state.padded and spec.combine not in ("mean", "norm", "keep"):
        raise PatchError(
            f"combine={spec.combine!r} would mix padding into the tokens of block {spec.index}: use combine='mean' for padded "
            "inputs, or run them without padding"
        )
    positions = state.positions
    if positions is not None:
        positions = (
            plan.merge(positions, state.size, backend=spec.backend)[0]
            if spec.mean_positions
            else take_rows(positions, plan.keep)
        )
    log = attention_dtype(x) if spec.prop_attn else None
    merged = plan.merge_for_attention(x, state.size, spec.combine, spec.backend, log)
    plans = (*state.plans, plan) if spec.keep_plans or state.full_output else ()
    state = TokenState(
        merged.size, plans, state.full_output, state.padded, state.first_size, positions, None, merged.log_size
    )
    return merged.x, state


def _arriving(block: Any, x: Tensor, given: dict[str, Any]) -> tuple[TokenState, dict[str, Any]]:
    """The state that came with `x`, or a fresh one at the start of the network; and the arguments but the mask."""
    spec: BlockSpec = block._tokenmerge_spec
    family = spec.family
    mask = given.pop(family.mask, None) if family.mask else None
    if family.pair_bias and padding_in_pairs(given.get(family.pair_bias), check=spec.index == 0):
        mask = given.pop(family.pair_bias)
    if not family.passes:
        known = {name: given.pop(name, None) for name in (family.rope, family.pair_bias) if name}
        strange = [name for name, value in given.items() if value is not None and value is not False]
        if strange:
            raise PatchError(
                f"{strange[0]} was given to a model that merges tokens, but merged tokens cannot obey it: "
                "call the model without it, or handle.update(r=0) first"
            )
        given = known
    state = state_of(x)
    if state is None or spec.index == 0:
        state = _fresh(x, spec, mask, state)
    elif state.size is not None and state.size.device != x.device:
        state = state.to(x.device)  # a device map has moved the tokens alone
    return _with_positions(block, x, state, given), given


def _fresh(x: Tensor, spec: BlockSpec, mask: Tensor | None, wish: TokenState | None) -> TokenState:
    """The state of tokens that nothing has merged yet."""
    if spec.merged_before:
        raise PatchError(
            f"block {spec.index} received tokens without their sizes although earlier blocks merge, so "
            "something between the blocks made a new tensor (reentrant checkpointing does): use "
            "use_reentrant=False, and do not change activations between blocks"
        )
    size = padding_sizes(mask, x.shape[0], x.shape[1])
    full = wish is not None and wish.full_output
    return TokenState(size, full_output=full, padded=size is not None, first_size=size)


def _with_positions(block: Any, x: Tensor, state: TokenState, given: dict[str, Any]) -> TokenState:
    """The state with the coordinates of its tokens, from the first block that needs to move them."""
    spec: BlockSpec = block._tokenmerge_spec
    family = spec.family
    moves = spec.r > 0 or spec.keep is not None
    if state.positions is not None or not moves:
        return state
    if family.positions is not None:
        positions = family.positions(block, x)
    elif family.rope is not None and spec.rotary is not None and given.get(family.rope) is not None:
        positions = spec.rotary.positions(given[family.rope])
    else:
        return state
    batch, tokens, _ = x.shape
    prefix = tokens - positions.shape[1]
    if prefix != spec.protected:
        raise PatchError(
            f"block {spec.index} received {tokens} tokens with positions for {positions.shape[1]}, but "
            f"{tokens - spec.protected} were expected (all but the {spec.protected} prefix tokens): do not drop tokens "
            "or change the image size of this model while it merges"
        )
    positions = torch.nn.functional.pad(positions.expand(batch, -1, -1), (0, 0, prefix, 0))
    return dataclasses.replace(state, positions=positions)
