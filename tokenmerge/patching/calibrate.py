"""Thresholds for adaptive merging, and schedules that others published."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import InputError
from tokenmerge.patching import patched


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
        InputError: if there are no batches.
        ConfigError: if the schedule means nothing.
    """
    wanted = MergeConfig.create(config, **{**fields, "matcher": "threshold", "options": {}})
    seen: dict[int, list[Tensor]] = {}
    with patched(model, MergeConfig.create(wanted, options={"seen": seen})) as handle:
        for batch in batches:
            model(batch)
        schedule = handle.summary().r
    if not seen:
        raise InputError("not one block merged while calibrating: give batches of images, and a schedule that merges")
    thresholds = []
    for layer, r in enumerate(schedule):
        if layer not in seen:
            thresholds.append(1.0)
            continue
        best = torch.cat([one.flatten() for one in seen[layer]])
        images = sum(len(one) for one in seen[layer])
        place = min(len(best), max(1, r * images))
        thresholds.append(float(best.sort(descending=True).values[place - 1]) - 1e-6)
    return MergeConfig.create(wanted, options={"thresholds": thresholds})


def diffrate_schedule(path: str | Path, model: str, target: str, tokens: int) -> MergeConfig:
    """A schedule that DiffRate published: tokens kept after pruning and after merging, block by block.

    Args:
        path: DiffRate's JSON file of compression rates.
        model: the entry in it, such as "ViT-S-DeiT".
        target: the GFLOPs in that, such as "2.9".
        tokens: that enter the first block, class token included (197 for 224 pixels).

    Raises:
        InputError: if the file has no such entry, or it holds anything but numbers of tokens that fall.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        entry = found[model][target]
        # lists, or lists written as text
        pruned, merged = (
            ast.literal_eval(one) if isinstance(one, str) else one
            for one in (entry["prune_kept_num"], entry["merge_kept_num"])
        )
        pruned, merged = [int(one) for one in pruned], [int(one) for one in merged]
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise InputError(
            f"{str(path)!r} holds no schedule for {model!r} at {target!r} ({type(error).__name__}: {error}): it should hold "
            "prune_kept_num and merge_kept_num, one number for each block"
        ) from None
    r, dropped, left = [], [], tokens
    for kept, after in zip(pruned, merged, strict=True):
        kept, after = min(kept, left), min(after, left)
        if not 0 < after <= kept:
            raise InputError(
                f"{str(path)!r} keeps {after} tokens after merging of {kept} after pruning: the file is damaged"
            )
        r.append(left - after)
        dropped.append(left - kept)
        left = after
    return MergeConfig.create(r=r, matcher="diffrate", options={"pruned": dropped})
