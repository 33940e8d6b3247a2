"""How much is merged in which epoch, and what learns to decide it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tokenmerge.errors import InputError
from tokenmerge.matching import entry_for
from tokenmerge.patching import Handle, model_cost
from tokenmerge.patching.predictors import add_predictors, predicting, ratio_loss, remove_predictors
from tokenmerge.schedule import cut
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
    due = [
        setting for start, setting in sorted(args.r_milestones, key=lambda milestone: milestone[0]) if start <= epoch
    ]
    return due[-1] if due else args.setting


def apply(handle: Handle, setting: Setting) -> None:
    """Give a patched model another schedule."""
    handle.update(**setting.fields)


def fields_for_training(fields: dict[str, Any]) -> dict[str, Any]:
    """The paper's rule: a model trained with merging has proportional attention, whatever it was pretrained with."""
    return {**fields, "prop_attn": True} if fields.get("prop_attn", "auto") == "auto" else fields


_RATIO_WEIGHT = 2.0
"""Of the loss that draws predictors to the number of tokens that is wanted (DynamicViT, section 3.3)."""


def with_predictors(model: nn.Module, handle: Handle, args: TrainArgs) -> Callable[[], Tensor | None]:
    """Give the blocks that drop tokens their predictors, if the matcher learns; what is added to the loss.

    Raises:
        InputError: if r is to change over the epochs, which predictors cannot follow.
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
    if handle.config.prop_attn is False:
        raise InputError(
            f"--prop-attn off was given, but matcher {entry.name!r} learns through the sizes in attention: leave it out"
        )
    cost = model_cost(model)
    gone = cut(handle.schedule, cost.tokens, cost.protected)
    have = predicting(model)
    remove_predictors(model, [index for index in have if not gone[index]])  # of an earlier run: they would not learn
    add_predictors(model, [index for index, r in enumerate(gone) if r and index not in have])

    def loss() -> Tensor | None:
        found = ratio_loss(model, gone, cost.tokens - cost.protected)
        return None if found is None else _RATIO_WEIGHT * found

    return loss
