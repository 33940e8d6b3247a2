"""Calibration of thresholds for adaptive merging, and schedules published by others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenmerge import files
from tokenmerge.config import FIELDS, MergeConfig
from tokenmerge.errors import ConfigError, InputError
from tokenmerge.matching.informed import collecting_edges
from tokenmerge.patching.apply import patched


@torch.inference_mode()
def calibrate(
    model: nn.Module, batches: Iterable[Any], config: MergeConfig | None = None, **fields: Any
) -> MergeConfig:
    """Find the threshold of each block at which, on average, as many tokens merge as the schedule requests.

    The model runs once over the batches and merges by the schedule, while the similarity of every A token's best edge is
    recorded. The threshold of a block is then the similarity that on average its r best edges per image exceed.
    Thresholds on similarity follow DyMU (arXiv 2504.17040) and LTMP (arXiv 2307.10780).

    Args:
        model: an unpatched model, which is unpatched again afterwards.
        batches: inputs of the model, such as `[B, 3, height, width]`; a few hundred images without labels are enough.
        config: the schedule, and any other settings; `None` starts from the defaults.
        **fields: fields of `MergeConfig` that replace those of `config`, such as `r=16`.

    Returns:
        The config with `matcher="threshold"` and the thresholds, for `patch`.

    Raises:
        InputError: if there are no batches, or similarities are not finite.
        ConfigError: if the schedule is invalid, or another matcher is requested.
        UnsupportedModelError: if the model cannot be patched correctly.
        PatchError: if the model is already patched.
    """
    matcher = fields.get("matcher", "threshold")
    if isinstance(config, MergeConfig) and "matcher" not in fields and config.matcher != FIELDS["matcher"].default:
        matcher = config.matcher
    if not isinstance(matcher, str) or matcher != "threshold":
        raise ConfigError(f"matcher={matcher!r:.60} cannot be calibrated, but 'threshold' can: leave the matcher out")
    if fields.get("options"):
        raise ConfigError(
            f"options={fields['options']!r:.60} were given, but calibrating finds them: leave the options out"
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise InputError(
            f"batches is of type {type(batches).__name__}, but batches of images to run were expected: give a list"
        )
    wanted = MergeConfig.create(config, **{**fields, "matcher": "threshold", "options": {}})
    with patched(model, wanted) as handle, collecting_edges() as edges:
        for batch in batches:
            model(batch)
        layers = len(handle.schedule)
    if not edges:
        raise InputError("not one block merged while calibrating: give batches of images, and a schedule that merges")
    thresholds = []
    for layer in range(layers):
        if layer not in edges:
            thresholds.append(1.0)
            continue
        best = torch.cat([similarities.flatten() for similarities, _ in edges[layer]])
        if not bool(best.isfinite().all()):
            raise InputError(
                f"similarities in block {layer} are not finite while calibrating: leave out images that hold NaN or infinity, and look "
                "at what the model makes of the others"
            )
        merged = sum(r * len(similarities) for similarities, r in edges[layer])  # passes may differ in their r
        position = min(len(best), max(1, merged))
        thresholds.append(float(best.sort(descending=True).values[position - 1]) - 1e-6)
    return MergeConfig.create(wanted, options={"thresholds": thresholds})


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int | float) or int(number) != number or number < 0:
        raise ValueError(f"{number!r:.60} is no number of tokens")
    return int(number)


def diffrate_schedule(path: str | Path, model: str, target: str, tokens: int = 197) -> MergeConfig:
    """Read a schedule published by DiffRate (arXiv 2305.17997): tokens kept after pruning and merging, by block.

    The schedule is stored as the fraction of tokens that each block keeps, so that it also applies to other image sizes. If
    the file keeps at least as many tokens after merging as after pruning, the block merges nothing.

    Args:
        path: DiffRate's JSON file of compression rates.
        model: name of a model in the file, such as "ViT-S-DeiT".
        target: GFLOPs of one of the model's schedules, such as "2.9".
        tokens: tokens that entered the first block of the model for which the schedule was made, class token included.

    Returns:
        A config with `matcher="diffrate"`, the fractions as `keep`, and the share of pruned tokens as an option.

    Raises:
        InputError: if the file cannot be read, lacks such a schedule, holds anything but numbers of tokens, or was made for
            another number of tokens.
    """
    found = files.read_json(path, "the schedule")
    try:
        entry = found[model][target]
        # DiffRate's files hold lists, some of them written as text
        pruned, merged = (
            [
                _whole(number)
                for number in (files.parse_json(listed, "a list in it") if isinstance(listed, str) else listed)
            ]
            for listed in (entry["prune_kept_num"], entry["merge_kept_num"])
        )
        kept = list(zip(pruned, merged, strict=True))
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise InputError(
            f"{str(path)!r} holds no schedule for {model!r} at {target!r} ({type(error).__name__}: {error}): it should hold "
            "prune_kept_num and merge_kept_num, one number for each block"
        ) from None
    if kept and min(kept[0]) * 2 < tokens:
        raise InputError(
            f"the schedule of {model!r} at {target!r} keeps {min(kept[0])} tokens in its first block, so it was not made for "
            f"{tokens}: give the number of tokens that it was made for (197 in DiffRate's own files)"
        )
    keep, dropped, left = [], [], tokens
    for after_pruning, after_merging in kept:
        after_pruning = min(after_pruning, left)
        after = min(after_merging, after_pruning)
        if after < 2:
            raise InputError(
                f"{str(path)!r} keeps {after} tokens of {left} in a block of {model!r}, but the class token and one more are the "
                "least: the file is damaged"
            )
        keep.append((after - 1) / (left - 1))
        dropped.append((left - after_pruning) / (left - after) if after < left else 0.0)
        left = after
    return MergeConfig.create(keep=keep, matcher="diffrate", options={"pruned": dropped})
