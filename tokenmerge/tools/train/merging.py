"""Merging in training: the schedule of each epoch, and the predictors of learned matchers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenmerge.errors import InputError
from tokenmerge.frozen import thawed
from tokenmerge.matching import entry_for
from tokenmerge.patching import Handle, model_cost
from tokenmerge.patching.predictors import KINDS, add_predictors, kind_of, learned_loss, predicting, remove_predictors
from tokenmerge.schedule import Schedule, cut
from tokenmerge.tools.common import MergeOptions
from tokenmerge.tools.saved import kept_of, saved_with, say_used
from tokenmerge.tools.settings import Setting, label_of
from tokenmerge.tools.train.options import TrainOptions


def as_saved(args: TrainOptions, say: Callable[[str], Any]) -> TrainOptions:
    """Return the options with the merging that was saved with the model, where they do not say otherwise.

    Args:
        args: the options.
        say: function that prints a line; it is told what was taken from the model.
    """
    saved = saved_with(args)
    if saved is None:
        return dataclasses.replace(args, r="0" if args.r is None else args.r)
    takes_r = args.r is None and saved.scheduled
    r = str(label_of(saved)) if takes_r else "0" if args.r is None else args.r
    kept = {} if str(r).endswith(".json") else kept_of(saved, MergeOptions.merging(args, saved))
    say_used(saved, {*kept, *(saved.changed("schedule") if takes_r else ())}, say)
    if "prop_attn" in kept and args.prop_attn is None:
        args = dataclasses.replace(args, prop_attn="on" if kept["prop_attn"] else "off")
    options = kept.pop("options", {})
    matcher = kept.pop("matcher", args.matcher)
    kept.pop("prop_attn", None)
    return dataclasses.replace(args, r=r, matcher=matcher, set={**kept, **thawed(options), **args.set})


def set_epoch(handle: Handle, args: TrainOptions, epoch: int) -> None:
    """Set the schedule of an epoch, from the latest milestone and the warm-up of r.

    With n warm-up epochs, each block merges e/n of its final r in epoch e < n, rounded down, and thus nothing in epoch 0.
    """
    apply(handle, setting_at(args, epoch))
    if epoch < args.r_warmup_epochs:
        handle.update(r=[r * epoch // args.r_warmup_epochs for r in handle.schedule])


def setting_at(args: TrainOptions, epoch: int) -> Setting:
    """Return the setting of an epoch, without warm-up."""
    due = [setting for start, setting in args.milestones if start <= epoch]
    return due[-1] if due else args.setting


def apply(handle: Handle, setting: Setting) -> None:
    """Give a patched model the schedule of a setting."""
    handle.update(**setting.fields)


def with_predictors(model: nn.Module, handle: Handle, args: TrainOptions) -> Callable[[], Tensor | None]:
    """Add predictors to the blocks that drop tokens, if the matcher is learned, and return their additional loss.

    Returns:
        A function that returns the loss to add after each pass, or `None` if there is none.

    Raises:
        InputError: if r changes over the epochs, which predictors do not support.
    """
    entry = entry_for(handle.config)
    if not entry.learned:
        remove_predictors(model)
        return lambda: None
    if args.r_warmup_epochs or args.r_milestones:
        raise InputError(
            f"r is to change over the epochs, but the predictors of matcher {entry.name!r} learn one r: leave out "
            "--r-warmup-epochs and --r-milestones"
        )
    gone, _ = _dropped(model, handle)
    kind = kind_of(model)
    if kind is not None and kind is not KINDS.get(entry.name, kind):
        remove_predictors(model)  # another matcher was trained before
    wanted = [i for i, r in enumerate(gone) if r or "every block" in entry.requires]
    have = predicting(model)
    remove_predictors(model, [i for i in have if i not in wanted])  # of an earlier run, which would not be trained
    add_predictors(model, [i for i in wanted if i not in have], entry.name)
    return loss_of_predictors(model, handle)


def _dropped(model: nn.Module, handle: Handle) -> tuple[Schedule, int]:
    """Return the tokens that each block drops at the model's own input size, and how many tokens may be dropped there at all."""
    cost = model_cost(model)
    return cut(
        handle.schedule, cost.tokens, cost.protected, entry_for(handle.config).most
    ), cost.tokens - cost.protected


def loss_of_predictors(model: nn.Module, handle: Handle) -> Callable[[], Tensor | None]:
    """Return the function that gives the loss of a model's predictors after each pass, `None` if it has none."""
    gone, tokens = _dropped(model, handle)
    return lambda: learned_loss(model, gone, tokens)
