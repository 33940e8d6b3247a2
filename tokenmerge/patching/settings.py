"""Settings of one model from a config, and descriptions of them in words."""

from __future__ import annotations

import torch

from tokenmerge.attention.forms import Choice
from tokenmerge.config import MergeConfig
from tokenmerge.errors import ConfigError
from tokenmerge.matching import entry_for
from tokenmerge.ops.basics import autocast_dtype
from tokenmerge.ops.choice import c_refusals, faults, triton_refusals
from tokenmerge.patching.check import attention_choice, reaches_sdpa
from tokenmerge.patching.match import (
    TENSORS,
    check_matching,
    check_requirements,
    cost_of,
    looks_inside,
    offered_by,
    other_metric,
)
from tokenmerge.patching.record import Settings, resolved_schedule
from tokenmerge.patching.swap import original_class
from tokenmerge.patching.target import Target


def settings_for(target: Target, config: MergeConfig, misreaders: tuple[str, ...] = ()) -> Settings:
    """Resolve a config for one model; errors are raised before anything is changed.

    Args:
        target: the model.
        config: the user's config.
        misreaders: reasons why modules around the model would misread merged tokens.

    Raises:
        ConfigError: if the model or the matcher does not support the config.
    """
    family, model, entry = target.family, target.model, entry_for(config)
    layers = len(target.blocks)
    check_matching(config, layers)
    name = original_class(model).__name__
    inside = looks_inside(config)
    if inside and not all(reaches_sdpa(row, block, target.channels) for block, row in target.blocks[:1]):
        raise ConfigError(
            f"what is compared, by matcher {entry.name!r}, is seen at Q, K and V, but the attention of "
            f"{name} does not call PyTorch's scaled_dot_product_attention: switch it to fused ('sdpa') attention, or use a "
            "matcher that looks at keys alone"
        )
    output = family.output if config.output == "auto" else config.output
    reasons = [*family.merged_output(model), *misreaders] if output == "merged" else []
    if reasons and config.output == "auto":
        output, reasons = "full", []
    if reasons:
        raise ConfigError(
            f"output='merged' would be silently wrong for {name} ({'; '.join(reasons)}): use output='full'"
        )
    if "attention" in config.changed("running"):
        attention_choice(target, config)  # raises if the form cannot run
    cost = cost_of(target, config, output == "full")
    schedule = resolved_schedule(config, cost)  # raises if the schedule does not fit
    proportional = prop_attn_choice(target, config).form == "on"
    if any(schedule):
        check_requirements(target, config, all(schedule), proportional)
    protected = cost.protected
    needs_plans = (
        family.needs_plans(model)
        or any(row.needs_source for _, row in target.blocks)
        or "anchor" in entry.offered
        or bool(family.readers(model))
    )
    return Settings(
        config=config,
        entry=entry,
        offered=offered_by(config, layers),
        tensors=bool(entry.offered & TENSORS),
        other_metric=other_metric(config),
        looks_inside=inside,
        cost=cost,
        layers=layers,
        protected=protected,
        # a model may have register tokens but no class token; without `cls_token`, the first prefix token counts as one
        class_token=protected > 0 and getattr(model, "cls_token", model) is not None,
        prop_attn=proportional,
        full_output=output == "full",
        merged_states=bool(family.collectors(model)) and output != "full",
        keep_plans=config.traces or needs_plans or output == "full",
        one_call=config.backend in ("auto", "c") and config.order == "partition" and not config.changed("matching"),
    )


def prop_attn_choice(target: Target, config: MergeConfig) -> Choice:
    """Return whether attention is proportional to sizes, "on" or "off", and the reason."""
    if config.prop_attn != "auto":
        return Choice("on" if config.prop_attn else "off", "as the config asks")
    if target.family.mae(target.model):
        return Choice(
            "off",
            "its weights come from MAE pretraining, and the paper finds such models better without it off the shelf",
        )
    return Choice("on", "its weights are not known to come from MAE pretraining")


def matching_in_words(config: MergeConfig) -> str:
    """Return the name of the matcher, and all settings of matching that differ from the paper's."""
    changed = config.changed("matching")
    options = changed.pop("options", {})
    words = [f"{name} {value}" for name, value in changed.items() if name != "matcher"]
    return ", ".join([entry_for(config).name, *words, *(f"{name}={value}" for name, value in options.items())])


def backend_choice(target: Target, config: MergeConfig) -> Choice:
    """Return the backend of matching and merging, "triton", "c" or "torch", in the current state of the model, and the reason."""
    if config.backend == "torch":
        return Choice("torch", "as the config asks")
    tokens = next(target.model.parameters())
    if config.backend == "c" or (config.backend == "auto" and not tokens.is_cuda):
        return _choice_of("c", target, config, "functions in C; code that is compiled uses torch")
    return _choice_of("triton", target, config, "kernels")


def backend_refusals(backend: str, target: Target) -> list[str]:
    """Return the reasons why a backend cannot run on a model in its current state; empty if it can."""
    tokens = next(target.model.parameters())
    dtype = autocast_dtype(tokens.device.type) or tokens.dtype
    if backend == "c":
        return c_refusals(tokens.device, dtype)
    if backend != "triton":
        return []
    like = torch.empty(0, 1, 0, 64, dtype=dtype, device="meta" if tokens.is_meta else tokens.device)
    return [*triton_refusals(like, "match"), *triton_refusals(like.flatten(1, 2), "merge"), *faults(dtype)]


def _choice_of(backend: str, target: Target, config: MergeConfig, how: str) -> Choice:
    reasons = backend_refusals(backend, target)
    if reasons:
        return Choice("torch", "; ".join(dict.fromkeys(reasons)))
    parts = [
        *(["matching"] if "backend" in entry_for(config).offered and config.distance == "cosine" else []),
        *(["merging"] if config.combine == "mean" else []),
    ]
    if not parts:
        matcher = entry_for(config).name
        return Choice("torch", f"there is no kernel for matcher {matcher!r} with combine={config.combine!r}")
    return Choice(backend, f"{' and '.join(parts)} by {how}")
