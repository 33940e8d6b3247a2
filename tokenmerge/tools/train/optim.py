"""Optimizer, learning rate schedule, moving average and gradient checkpointing, from timm."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from tokenmerge.errors import InputError
from tokenmerge.matching.learned import PREDICTOR
from tokenmerge.patching.block import MergeBlock
from tokenmerge.tools.train.options import TrainOptions


def checkpoint_blocks(model: Any) -> None:
    """Turn on gradient checkpointing, which recomputes activations in the backward pass to save memory."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    elif hasattr(model, "activation_checkpointing_enable"):  # the name in newer versions of transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif not hasattr(model, "gradient_checkpointing_enable"):
        raise InputError(
            f"--grad-checkpointing was given, but {type(model).__name__} of {type(model).__module__} does not support it: leave it out"
        )
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _layers(model: nn.Module) -> dict[str, str]:
    """Return timm's `group_matcher` for a patched model of another library: embeddings, each block, then the rest."""
    first = next(name for name, module in model.named_modules() if isinstance(module, MergeBlock))
    blocks = re.escape(first.rsplit(".", 1)[0])
    stem = r"^(?:.*\.)?(?:embeddings\.|conv1\.|conv2\.|embed_positions\.|conv_proj\.|class_token$|pos_embedding$)"
    return {"stem": stem, "blocks": rf"^{blocks}\.(?:encoder_layer_)?(\d+)\."}


def average_of(model: nn.Module, args: TrainOptions) -> Any:
    """Return timm's moving average of the weights; `None` without `--model-ema`."""
    from timm.utils import ModelEmaV3

    if not args.model_ema:
        return None
    return ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup)


def schedule_of(optimizer: Any, args: TrainOptions, updates: int) -> Any:
    """Return timm's learning rate schedule by updates, set to update 0; `None` for `--sched none`."""
    from timm.scheduler import create_scheduler_v2

    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs - (args.warmup_epochs if args.warmup_prefix else 0),  # (timm adds the warm-up)
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        warmup_prefix=args.warmup_prefix,
        min_lr=args.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    if schedule is not None:
        schedule.step_update(0)
    return schedule


def optimizer_of(model: Any, args: TrainOptions, processes: int) -> Any:
    """Return timm's optimizer, with layer-wise decay by blocks for transformers models as well.

    Raises:
        InputError: if timm does not know the optimizer, or it refuses a value or has no betas.
    """
    from timm.optim import create_optimizer_v2

    borrowed = not hasattr(model, "group_matcher")
    if borrowed:
        layers = _layers(model)
        model.group_matcher = lambda coarse=False: layers
    betas: dict[str, Any] = {} if args.opt_betas is None else {"betas": args.opt_betas}
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=args.opt,
            lr=args.learning_rate(processes),
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay,
            **betas,
        )
    except Exception as error:  # an unknown name, or values that this optimizer refuses
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the optimizer {args.opt!r} cannot be made ({reason}): choose one of timm.optim.list_optimizers()"
        ) from None
    finally:
        if borrowed:
            del model.group_matcher
    if betas and "betas" not in optimizer.param_groups[0]:  # timm then leaves them out
        raise InputError(f"--opt-betas was given, but the optimizer {args.opt!r} has no betas: leave it out")
    _scale_predictors(model, optimizer, args)
    return optimizer


def _scale_predictors(model: nn.Module, optimizer: Any, args: TrainOptions) -> None:
    """Give the weights of predictors parameter groups of their own, with the learning rate times `--predictor-lr-scale`."""
    theirs = {id(p) for name, p in model.named_parameters() if f"{PREDICTOR}." in name}
    groups = optimizer.param_groups if theirs else []
    for group in list(groups):
        mine = [p for p in group["params"] if id(p) in theirs]
        if not mine:
            continue
        group["params"] = [p for p in group["params"] if id(p) not in theirs]
        # timm's schedules multiply by `lr_scale`; without a schedule nobody does
        scale = group.get("lr_scale", 1.0) * args.predictor_lr_scale
        rate = group["lr"] * (args.predictor_lr_scale if args.sched == "none" else 1.0)
        groups.append({**group, "params": mine, "lr_scale": scale, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
