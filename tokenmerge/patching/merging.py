"""Matching and merging within a block: the metric, the plan, and the merge of tokens, sizes and positions by it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenmerge.attention.tap import Tap, attention_dtype
from tokenmerge.errors import PatchError
from tokenmerge.ops import native
from tokenmerge.ops.basics import take_rows
from tokenmerge.ops.combine import Merged, merge_rows
from tokenmerge.patching.look import similarity_of
from tokenmerge.patching.match import metric_from, tensors_for
from tokenmerge.patching.record import BlockRecord, Settings
from tokenmerge.patching.state import Step, TokenState
from tokenmerge.plan import MergePlan

_NEVER_MIXES = ("mean", "norm", "destination")
"""Values of `combine` for which padding, whose size is 0, leaves the token that it merges with unchanged."""


def merge_tokens(
    block: Any, x: Tensor, x_pre: Tensor | None, tap: Tap, r: int, state: TokenState
) -> tuple[Tensor, TokenState]:
    """Merge r tokens per image by the matcher's plan; return the tokens `[B, N − r, C]` and their state."""
    record: BlockRecord = block._tokenmerge
    run, settings = state.run, state.run.settings
    config = settings.config
    metric = metric_from(block, x, x_pre, tap, state) if settings.other_metric else _keys(block, tap, state)
    log = attention_dtype(x) if settings.prop_attn else None
    merged: Merged | None = None
    if settings.one_call and not run.padded and native.fits_both(metric, x, state.size, r, settings.protected):
        found, made = native.match_and_merge(metric, x, state.size, r, settings.protected, log)
        if state.positions is None and not (settings.keep_plans or run.full):  # the usual case: nobody reads the plan
            return made[0], TokenState(run, made[1], state.steps, None, None, made[2], state.rollout)
        plan, merged = MergePlan(*found), Merged(*made)
    else:
        plan = _plan(block, metric, x, tap, r, state)
    if config.order == "spatial":
        plan = plan.in_order()
    positions = state.positions
    if positions is not None and config.positions == "mean":
        positions = merge_rows(positions, state.size, plan, backend=config.backend).x
    elif positions is not None:
        positions = take_rows(positions, plan.kept)
    if merged is None:
        merged = merge_rows(x, state.size, plan, _reduce_of(record, state), config.backend, log)
    steps = state.steps
    if settings.keep_plans or run.full or run.padded:
        similarity = similarity_of(metric, plan) if settings.traces else None
        steps = (*steps, Step(plan.recorded() if settings.entry.learned else plan, similarity=similarity))
    carried = plan.carried if settings.entry.learned else None
    return merged.x, TokenState(
        run, merged.size, steps, positions, None, merged.log_size, state.rollout, carried=carried
    )


def _reduce_of(record: BlockRecord, state: TokenState) -> Any:
    """Return how this block combines the members of a token.

    Raises:
        PatchError: if that would mix padding into tokens.
    """
    run, reduce = state.run, state.run.settings.config.combine
    if reduce == "tofu":  # early blocks are far from linear, so averaging tokens does not average their outputs
        reduce = "destination" if record.index < run.settings.layers // 2 else "max_norm"
    if run.padded and reduce not in _NEVER_MIXES:
        raise PatchError(
            f"combine={reduce!r} would mix padding into the tokens of block {record.index}: use combine='mean' for padded "
            "inputs, or run them without padding"
        )
    return reduce


def _keys(block: Any, tap: Tap, state: TokenState) -> Tensor:
    """Return the paper's metric: K averaged over heads `[B, N, D]`, or `[B, H, N, D]` for matchers that average heads."""
    record: BlockRecord = block._tokenmerge
    family, keys, metric = record.family, tap.keys, None
    if family.keys_at_call and tap.inside is not None:
        keys = (tap.inside[1],)
    if not keys:
        raise PatchError(
            f"block {record.index} noted no keys, so the module that gives them was replaced since the model was patched: "
            "unpatch before changing modules, and patch again"
        )
    if "backend" in state.run.settings.entry.offered and not state.run.padded and family.per_head is not None:
        metric = family.per_head(block, keys)
    metric = family.metric(block, keys) if metric is None else metric
    return metric if not state.run.padded else metric_from(block, metric, metric, tap, state)


def _plan(block: Any, metric: Tensor, x: Tensor, tap: Tap, r: int, state: TokenState) -> MergePlan:
    """Return the matcher's plan, after checking that it has the shapes that all later steps rely on."""
    record: BlockRecord = block._tokenmerge
    settings: Settings = state.run.settings
    entry, offered = settings.entry, dict(settings.offered)
    if "layer" in entry.offered:
        offered["layer"] = record.index
    if "grid" in entry.offered:
        offered["grid"] = state.run.grid
    if settings.tensors:
        offered.update(tensors_for(block, x, tap, state))
    plan: MergePlan = entry.matcher(metric, r, settings.protected, **offered)
    (batch, left), gone = plan.kept.shape, plan.source.shape[1]
    fits = batch == x.shape[0] and left + gone == x.shape[1]
    if not fits or (gone != r and not (entry.adaptive or (entry.learned and gone == 0))):
        raise PatchError(
            f"matcher {entry.name!r} merged {gone} of {left + gone} tokens in {batch} images, but block {record.index} asked for "
            f"{r} of {x.shape[1]} in {x.shape[0]}: it must merge exactly r, or r must be smaller"
        )
    return plan
