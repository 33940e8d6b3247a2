"""The patched transformer block, shared by all model families."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from tokenmerge.attention.call import AttentionCall
from tokenmerge.attention.forms import running_form
from tokenmerge.attention.pairs import PairMap
from tokenmerge.attention.tap import AttentionContext, Tap, size_bias
from tokenmerge.errors import PatchError
from tokenmerge.ops.basics import is_exporting, is_recomputing
from tokenmerge.patching.begin import begin_pass, padding_in_pairs, with_positions
from tokenmerge.patching.leaf import as_leaf
from tokenmerge.patching.look import Look, kept_for_looking, look_at, mark_gradient
from tokenmerge.patching.merging import merge_tokens
from tokenmerge.patching.record import BlockRecord, Settings
from tokenmerge.patching.state import STATE, UNMERGED, Step, TokenState, attach, state_after_hooks, state_of
from tokenmerge.schedule import max_merges

_INPUT = "_tokenmerge_input"
"""Name of the argument by which a block's `__call__` hands `forward` a weak reference to its input."""


class OwnR:
    """Mix-in that keeps a user's own attribute `r`; otherwise setting `r`, as in the authors' code, is an error."""

    @property
    def r(self) -> Any:
        """Value of `r` from before patching."""
        return vars(self)["r"] if "r" in vars(self) else super().r  # type: ignore[misc]  # upstream's class comes next

    @r.setter
    def r(self, value: Any) -> None:
        if not hasattr(self, "r"):
            raise PatchError(self._refusal_of_r(value))
        vars(self)["r"] = value

    def _refusal_of_r(self, value: Any) -> str:
        raise NotImplementedError


class MergeBlock(OwnR):
    """Mix-in before upstream's block class: attention, matching, merging, MLP (arXiv 2210.09461, figure 2).

    A block maps tokens `[B, N, C]` to `[B, N − r, C]`. Token sizes arrive and leave as an attribute of the activation.
    """

    _tokenmerge: BlockRecord

    def _refusal_of_r(self, value: Any) -> str:
        return (
            f"r={value!r} was set on patched block {self._tokenmerge.index}: write tokenmerge.handle_of(model).update(r=[…]) "
            "with a number for each block"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block, and pass the state of its tokens to `forward` as an argument.

        Forward pre-hooks may replace the input by a new tensor without the state: hooks of FSDP2 do, to learn when its
        gradient is ready, and hooks of device maps do, to move it.
        """
        x = args[0] if args else None
        if isinstance(x, Tensor):
            state = getattr(x, STATE, None)
            if state is None and self._tokenmerge.model.settings.idle and not torch.is_grad_enabled():
                return super().__call__(*args, **kwargs)  # type: ignore[misc]  # nothing merges, and nothing is recomputed
            eager = not torch.compiler.is_compiling()
            if state is not None and state.merged is None:
                kwargs[STATE] = state
            if eager and (STATE in kwargs or self._tokenmerge.index == 0):
                kwargs[_INPUT] = weakref.ref(x)  # in block 0, too: gradient checkpointing passes it again to recompute
            if eager and torch.is_grad_enabled():
                _mark_unmerged(self._tokenmerge, x, state, kwargs)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]  # nn.Module's

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Run upstream's block on `x [B, N, C]`, merging between attention and MLP; torch.fx traces it as one node.

        Raises:
            PatchError: if the token sizes were lost before the block, or merged tokens cannot support an argument.
        """
        if isinstance(x, Proxy) and self._tokenmerge.model.settings.merges:
            return as_leaf(self, x, *args, **kwargs)
        idle = isinstance(x, Tensor) and self._tokenmerge.model.settings.idle and not torch.is_grad_enabled()
        if idle and getattr(x, STATE, None) is None and STATE not in kwargs and _INPUT not in kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        state, given = _arrive(self, x, args, kwargs)
        if state is None:  # no block merges, so upstream's own forward runs and may get any argument
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # upstream's block comes next
        family, config = self._tokenmerge.family, state.run.settings.config
        x = x if state.merged is None else state.merged
        r = _r_of(self, x, state)

        x_pre = x if config.metric == "x_pre" else None
        if r and config.place == "before":
            x, state = merge_tokens(self, x, x_pre, Tap(), r, state)
        x, tap, look = _attend(self, x, state, given)  # x + attention(norm1(x), log size)
        if r and config.place == "between":
            x, state = merge_tokens(self, x, x_pre, tap, r, state)  # [B, N − r, C]
        if config.place != "after":
            tap.forget()  # its views of Q, K and V would otherwise stay in memory during the MLP
        if family.mlp is not None:
            x = family.mlp(self, x)  # x + mlp(norm2(x))
        if r and config.place == "after":
            x, state = merge_tokens(self, x, x_pre, tap, r, state)
        return _leave(self, x, state, look, merged=r > 0)

    def _get_name(self) -> str:
        return f"Merge{type(self).__name__}"

    def extra_repr(self) -> str:
        """Return the block's `r` for `print(model)`."""
        schedule = self._tokenmerge.model.settings.schedule
        return "r by the number of tokens" if schedule is None else f"r={schedule[self._tokenmerge.index]}"


# --- arriving ----------------------------------------------------------------------------------------------


def _mark_unmerged(record: BlockRecord, x: Tensor, state: TokenState | None, kwargs: dict[str, Any]) -> None:
    """Mark the input of a block as unmerged, and tell `forward` so if backward recomputes the block from that input.

    Settings may change between forward and backward, and the input of a pass without state cannot carry them.
    """
    settings = record.model.settings
    if is_recomputing():
        if hasattr(x, UNMERGED):
            kwargs[UNMERGED] = True
    elif not (settings.merges or settings.traces) and (state is None or record.index == 0):
        setattr(x, UNMERGED, True)


def _arrive(
    block: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[TokenState | None, dict[str, Any]]:
    """Return the state of the tokens (`None` if upstream's own forward is to run) and the arguments for attention."""
    record: BlockRecord = block._tokenmerge
    family, passed, given_first = record.family, kwargs.pop(STATE, None), kwargs.pop(_INPUT, None)
    unmerged = kwargs.pop(UNMERGED, False)
    state: TokenState | None = passed if isinstance(x, Proxy) else getattr(x, STATE, passed)
    if passed is not None and given_first is not None and not hasattr(x, STATE):
        state = state_after_hooks(x, given_first(), passed)
    if state is None and record.index:
        state = state_of(x)
    recomputing = is_recomputing()
    if record.index == 0 and not recomputing:
        _check_unmerged(x, state)
        state = None  # an attached state belongs to an older pass
    if unmerged or (recomputing and state is not None and state.run.ambiguous):
        _check_first_time(record, state)
        return None, {}
    settings = record.model.settings if state is None else state.run.settings
    given = {**dict(zip(family.arguments, args, strict=False)), **kwargs} if args or kwargs else {}
    if not settings.merges and (not settings.traces or (family.mask and given.get(family.mask) is not None)):
        if record.index == 0 and record.model.latest is not None:
            record.model.latest = None  # a trace must not show an older pass in place of this one
        return None, given
    if family.ready is not None:
        family.ready(block)
    mask = given.pop(family.mask, None) if family.mask else None
    if family.pair_bias and padding_in_pairs(given.get(family.pair_bias), check=record.index == 0):
        mask = given.pop(family.pair_bias)
    given = _obeyed(record, given)
    if state is None:
        first = None if given_first is None else given_first()
        state = begin_pass(record, x, mask, x if first is None else first, recomputing)
    elif state.size is not None and state.size.device != x.device:
        state = state.to(x.device)  # a device map has moved only the tokens
    if state.positions is None and (family.positions is not None or family.rope is not None):
        state = with_positions(block, x, state, given)
    return state, given


def _check_first_time(record: BlockRecord, state: TokenState | None) -> None:
    """Raise if a recomputed block finds a state, although another pass, without state, began with the same input."""
    if state is not None:
        raise PatchError(
            f"block {record.index} runs again in backward, but passes with different settings began with the very same tensor, and "
            "gradient checkpointing cannot tell them apart: give each pass a tensor of its own (x.clone())"
        )


def _check_unmerged(x: Any, state: TokenState | None) -> None:
    """Raise if merged tokens enter block 0, where each token would count as one patch."""
    merged = state is not None and state.merged is None and state.size is not None
    if state is not None and merged and state.size is not state.run.first_size and x.shape[1] != state.run.tokens:
        raise PatchError(
            f"block 0 received {x.shape[1]} tokens that stand for {state.run.tokens}, and would take each for one patch: begin a pass with "
            "the tokens of patches, or merge with output='full'"
        )


def _obeyed(record: BlockRecord, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for attention; raise if merged tokens cannot support one of them."""
    family = record.family
    if family.passes or not given:
        return given
    known = {name: given.pop(name, None) for name in (family.rope, family.pair_bias) if name}
    strange = [name for name, value in given.items() if value is not None and value is not False]
    if strange:
        raise PatchError(
            f"{strange[0]} was given to a model that merges tokens, but merged tokens cannot obey it: "
            "call the model without it, or handle.update(r=0) first"
        )
    return known


def _r_of(block: Any, x: Tensor, state: TokenState) -> int:
    """Return r, the number of tokens per image that this block merges away."""
    run, index = state.run, block._tokenmerge.index
    entry, r = run.settings.entry, int(run.schedule[index])
    if "every block" in entry.requires:  # also if nothing is left to drop
        return r
    if entry.adaptive or entry.learned:  # earlier blocks may have left more or fewer tokens than scheduled
        r = min(r, max_merges(x.shape[1], run.settings.protected, entry.most))
    return r


# --- attention ---------------------------------------------------------------------------------------------


def _attend(block: Any, x: Tensor, state: TokenState, given: dict[str, Any]) -> tuple[Tensor, Tap, Look | None]:
    """Return `x + attention(norm1(x), log size)`, the tap, and the attention to trace (`None` without tracing)."""
    record: BlockRecord = block._tokenmerge
    settings, family, config = state.run.settings, record.family, state.run.settings.config
    weighs = settings.prop_attn or state.run.padded
    bias = size_bias(state.size, x, settings.prop_attn, state.log_size) if weighs else None
    pairs = _pair_map(state) if family.needs_source else None
    if family.pair_bias is not None:
        between = given.pop(family.pair_bias, None)
        if between is not None:
            between = pairs(between) if pairs is not None else between
            bias = between if bias is None else between + bias
    if family.rope is not None and given.get(family.rope) is not None and state.positions is not None:
        given[family.rope] = _table(record, state, given[family.rope])
    watch = settings.looks_inside or settings.looks or (family.keys_at_call and state.run.schedule[record.index] > 0)
    auto_on_cpu = config.attention == "auto" and x.device.type == "cpu"
    form = "mask" if bias is None or auto_on_cpu else running_form(config.attention, x, bias)
    with Tap(AttentionContext(bias, pairs, state.positions)) as tap:
        if form == "mask" and not watch and (bias is None or not family.keys_at_call):
            x = family.attention(block, x, bias, **given)
        else:  # this torch function mode costs a Python call for every torch function
            with AttentionCall(form, watch, bias if family.keys_at_call else None):
                x = family.attention(block, x, bias, **given)
    return x, tap, look_at(tap, state) if settings.looks else None


def _pair_map(state: TokenState) -> PairMap | None:
    source, places = state.source(), state.places()
    if source is None or places is None or state.size is None:
        return None
    mean = state.run.settings.config.positions == "mean"
    return PairMap(source, *places, state.run.first_size, mean, state.drops)


def _table(record: BlockRecord, state: TokenState, upstream: Any) -> Any:
    """Return the rotary table of the current tokens, in the layout of upstream's table."""
    if record.rotary is None or state.positions is None:
        raise PatchError(
            f"block {record.index} was given rotary positions, but the model had none when it was patched: patch it again"
        )
    return record.rotary.table(state.positions[:, state.run.settings.protected :], upstream)


# --- leaving -----------------------------------------------------------------------------------------------


def _is_latest(record: BlockRecord, settings: Settings) -> bool:
    """Return whether a trace keeps this pass: its settings are still in force, and backward is not recomputing it."""
    return settings is record.model.settings and not is_recomputing()


def _leave(block: Any, x: Tensor, state: TokenState, look: Look | None, merged: bool) -> Any:
    """Return the block's output: its tokens, with their state, spread over the original positions if needed."""
    record: BlockRecord = block._tokenmerge
    run, settings = state.run, state.run.settings
    last = record.index == settings.layers - 1
    if not merged:
        steps = (*state.steps, Step(None)) if settings.keep_plans or run.full or run.padded else ()
        state = dataclasses.replace(state, steps=steps, merged=None)
    if settings.traces:
        state = kept_for_looking(state, look)
        if last and not is_exporting() and (torch.compiler.is_compiling() or _is_latest(record, settings)):
            record.model.latest = state.detached()
    if (last and settings.full_output) or (run.full and not settings.merged_states):
        full = state.unmerge(x)
        out = attach(full, dataclasses.replace(state, merged=x) if full is not x else state)
    else:
        out = x
        setattr(out, STATE, state)
    with_graph = out.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if with_graph and out._base is not None:
        attach(out, getattr(out, STATE))  # also on the base, because full backward hooks replace the view
    if with_graph and settings.traces:
        mark_gradient(out, getattr(out, STATE))
    return out if record.family.wrap is None else record.family.wrap(out)
