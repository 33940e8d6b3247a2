"""From a config to what every block of a model does."""

from __future__ import annotations

import torch

from tokenmerge.attention.forms import Choice
from tokenmerge.config import MergeConfig
from tokenmerge.matching import get_entry
from tokenmerge.ops import triton_refusals
from tokenmerge.ops.choice import faults
from tokenmerge.ops.combine import Reduce
from tokenmerge.ops.precision import autocast_dtype
from tokenmerge.patching.block import BlockSpec
from tokenmerge.patching.root import Patch
from tokenmerge.patching.rule import Rule
from tokenmerge.patching.target import Target


def rule_for(target: Target, config: MergeConfig, index: int) -> Rule:
    """How the block of that index decides what merges."""
    model = target.model
    return Rule(
        family=target.blocks[index][1],
        matcher=config.matcher,
        metric=config.metric,
        concat=config.heads == "concat",
        distance=config.distance,
        partition=config.partition,
        options=config.options,
        backend=config.backend,
        layer=index,
        layers=len(target.blocks),
        grid=target.family.grid(model),
        # a model may have registers and no class token; where it cannot say, the first prefix token is one
        trace=bool(config.trace),
        class_token=target.family.protected(model) > 0 and getattr(model, "cls_token", model) is not None,
    )


def _combine(config: MergeConfig, index: int, layers: int) -> Reduce:
    """What becomes of tokens that merge in the block of that index."""
    if config.combine == "tofu":  # early blocks are far from linear, so a mean of tokens is no mean of outputs
        return "keep" if index < layers // 2 else "max_norm"
    return config.combine


def matching_in_words(config: MergeConfig) -> str:
    """The matcher, and what else of matching is not the paper's."""
    usual = MergeConfig()
    names = ("metric", "heads", "distance", "partition", "combine", "place")
    words = [f"{name} {getattr(config, name)}" for name in names if getattr(config, name) != getattr(usual, name)]
    words += [f"{name}={value}" for name, value in config.options.items()]
    return ", ".join([config.matcher, *words])


def backend_choice(target: Target, config: MergeConfig) -> Choice:
    """What runs matching and merging in the model as it is now, "triton" or "torch", and why."""
    if config.backend == "torch":
        return Choice("torch", "as the config asks")
    tokens = next(target.model.parameters())
    if config.backend == "auto" and not tokens.is_cuda:
        return Choice("torch", f"the model is on {tokens.device.type!r}, and the kernels need a CUDA device")
    dtype = autocast_dtype(tokens.device.type) or tokens.dtype
    like = torch.empty(0, 1, 0, 64, dtype=dtype, device="meta" if tokens.is_meta else tokens.device)
    reasons = [*triton_refusals(like, "match"), *triton_refusals(like.flatten(1, 2), "merge"), *faults(dtype)]
    if reasons:
        return Choice("torch", "; ".join(dict.fromkeys(reasons)))
    parts = [
        *(["matching"] if "backend" in get_entry(config.matcher).offered and config.distance == "cosine" else []),
        *(["merging"] if config.combine == "mean" else []),
    ]
    if not parts:
        return Choice("torch", f"there is no kernel for matcher {config.matcher!r} with combine={config.combine!r}")
    return Choice("triton", f"{' and '.join(parts)} by kernels")


def set_specs(target: Target, record: Patch) -> None:
    """Give every block what it does from now on, and forget older traces."""
    config = record.config
    keeps_less = (config.keep or 1) < 1
    rules = [rule_for(target, config, index) for index in range(len(target.blocks))]
    needs_plans = (
        target.family.needs_plans(target.model)
        or any(row.needs_source for _, row in target.blocks)
        or rules[0].needs_plans
    )
    for index, (block, row) in enumerate(target.blocks):
        vars(block).pop("_tokenmerge_seen", None)
        block._tokenmerge_spec = BlockSpec(
            family=row,
            index=index,
            r=record.schedule[index],
            keep=config.keep,
            protected=record.protected,
            prop_attn=record.prop_attn,
            attention=config.attention,
            rule=rules[index],
            place=config.place,
            combine=_combine(config, index, len(target.blocks)),
            backend=config.backend,
            in_order=config.order == "keep",
            mean_positions=config.positions == "mean",
            rotary=target.family.rotary(target.model, index) if row.rope else None,
            merged_before=any(record.schedule[:index]) or (index > 0 and keeps_less),
            merges_at_all=record.merges or keeps_less,
            keep_plans=bool(config.trace) or needs_plans or record.full_output,
            full_output=record.full_output and index == len(target.blocks) - 1,
            trace=bool(config.trace),
            look=config.trace == "attention",
            merged_states=bool(target.family.collectors(target.model)) and not record.full_output,
        )
