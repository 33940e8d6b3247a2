"""Thresholds for adaptive merging, and schedules that others published."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenmerge.config import FIELDS, MergeConfig
from tokenmerge.errors import ConfigError, InputError
from tokenmerge.matching.informed import collecting_edges
from tokenmerge.patching.handle import patched


@torch.inference_mode()
def calibrate(
    model: nn.Module, batches: Iterable[Any], config: MergeConfig | None = None, **fields: Any
) -> MergeConfig:
    """Find the threshold of each block at which as many tokens merge on average as the schedule says.

    Runs the unpatched model once over the batches, merging by the schedule, and notes the similarity of every A token's
    best edge. A block's threshold is the one that its r best edges of an average image reach.

    Args:
        model: an unpatched model; as it was, afterwards.
        batches: inputs of the model, such as `[B, 3, H, W]`; a few hundred images without labels are enough.
        config: the schedule, and anything else that shall hold.
        **fields: fields of `MergeConfig` that replace its, such as `r=16`.

    Returns:
        The config with `matcher="threshold"` and its thresholds, for `patch`.

    Raises:
        InputError: if there are no batches, or what the model makes of them is not finite.
        ConfigError: if the schedule means nothing, or another matcher is asked for.
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
        merged = sum(r * len(similarities) for similarities, r in edges[layer])  # as each pass did, whatever its tokens
        position = min(len(best), max(1, merged))
        thresholds.append(float(best.sort(descending=True).values[position - 1]) - 1e-6)
    return MergeConfig.create(wanted, options={"thresholds": thresholds})


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int | float) or int(number) != number or number < 0:
        raise ValueError(f"{number!r:.60} is no number of tokens")
    return int(number)


def diffrate_schedule(path: str | Path, model: str, target: str, tokens: int = 197) -> MergeConfig:
    """A schedule that DiffRate published: tokens kept after pruning and after merging, block by block.

    It is kept as the fraction of its tokens that each block keeps, so that it means the same for images of another size.
    Where the file keeps as many after merging as after pruning, or more, nothing merges in that block.

    Args:
        path: DiffRate's JSON file of compression rates.
        model: the entry in it, such as "ViT-S-DeiT".
        target: the GFLOPs in that, such as "2.9".
        tokens: that entered the first block of the model that it was made for, class token included.

    Raises:
        InputError: if the file has no such entry, holds anything but numbers of tokens that fall, or was made for another
            number of tokens.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        entry = found[model][target]
        # lists, or lists written as text
        pruned, merged = (
            [_whole(number) for number in (ast.literal_eval(listed) if isinstance(listed, str) else listed)]
            for listed in (entry["prune_kept_num"], entry["merge_kept_num"])
        )
        kept = list(zip(pruned, merged, strict=True))
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, LookupError, TypeError, SyntaxError, RecursionError) as error:
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
