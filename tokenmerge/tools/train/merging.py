"""How much is merged in which epoch."""

from __future__ import annotations

from typing import Any

from tokenmerge.patching import Handle
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.train.args import TrainArgs


def set_epoch(handle: Handle, args: TrainArgs, epoch: int) -> None:
    """Set r for an epoch: the latest milestone's, and while warming up a growing share of it.

    With n warm-up epochs, epoch e < n merges e/n of the tokens that a block will merge, rounded down: none at first.
    """
    apply(handle, setting_at(args, epoch))
    if epoch < args.r_warmup_epochs:
        handle.update(r=[r * epoch // args.r_warmup_epochs for r in handle.schedule])


def setting_at(args: TrainArgs, epoch: int) -> Setting:
    """The full setting of an epoch."""
    due = [setting for start, setting in sorted(args.r_milestones, key=lambda one: one[0]) if start <= epoch]
    return due[-1] if due else args.setting


def apply(handle: Handle, setting: Setting) -> None:
    """Give a patched model another schedule."""
    handle.update(**setting.fields)


def fields_for_training(fields: dict[str, Any]) -> dict[str, Any]:
    """The paper's rule: a model trained with merging has proportional attention, whatever it was pretrained with."""
    return {**fields, "prop_attn": True} if fields.get("prop_attn", "auto") == "auto" else fields
