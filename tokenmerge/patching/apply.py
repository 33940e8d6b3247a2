"""Patching and unpatching of models."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from tokenmerge.config import MergeConfig
from tokenmerge.errors import PatchError
from tokenmerge.patching.check import check_block, check_rotary
from tokenmerge.patching.decisions import log_settings
from tokenmerge.patching.entering import count_again
from tokenmerge.patching.handle import Handle, take_off, turns
from tokenmerge.patching.install import install, restore
from tokenmerge.patching.kept import keep
from tokenmerge.patching.record import ModelRecord, record_of
from tokenmerge.patching.settings import settings_for
from tokenmerge.patching.target import (
    check_is_module,
    find_target,
    misread_by,
    patch_of,
    patched_inside,
    refuse_if_patched,
)


def patch(model: nn.Module, config: MergeConfig | None = None, **fields: Any) -> Handle:
    """Make a Vision Transformer merge similar tokens, in place, and return its handle (arXiv 2210.09461).

    Weights, `state_dict` keys and output shapes stay; only `forward_features` returns fewer tokens. Errors change nothing.

    Args:
        model: a supported model, or a module that contains exactly one.
        config: settings; `fields` replace single ones of them.
        **fields: fields of `MergeConfig`, such as `r=8` or `flops=0.5`.

    Raises:
        UnsupportedModelError: if the patched model would compute something else; the message lists the reasons.
        PatchError: if the model, or a part of it, is already patched.
        ConfigError: if a value is invalid, or no schedule is given.
        UnknownFieldError: (a TypeError) if a keyword is not a field of `MergeConfig`.

    Example:
        >>> import timm, torch, tokenmerge
        >>> model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=96).eval()
        >>> handle = tokenmerge.patch(model, r=8)
        >>> model.forward_features(torch.zeros(1, 3, 96, 96)).shape  # 37 tokens, minus 8 in each of 2 blocks
        torch.Size([1, 21, 192])
    """
    config = MergeConfig.create(config, **fields)
    check_is_module(model)
    with turns:
        refuse_if_patched(model)
        target = find_target(model)
        misreaders = misread_by(model, target)
        record = ModelRecord(target.family, settings_for(target, config, misreaders), misreaders, model)
        record.own_r = ("r" in vars(target.model), "r" in vars(model))
        block, row = target.blocks[0]
        check_block(row, block, target.channels, "block 0", target.family.library)
        check_rotary(target)
        try:
            install(target, record)
            record.root = weakref.ref(target.model)
            record.around = target.around
            count_again(record, target.model)
            keep(target.model, record)
        except BaseException:
            restore(target.model)
            raise
        log_settings(target, record.settings)
    return Handle(target.model, record)


def unpatch(model: nn.Module) -> None:
    """Restore every patched model in `model` to its exact state before patching.

    Raises:
        PatchError: if `model` contains no patched model, or a forward pass of one is running.
    """
    check_is_module(model)
    with turns:
        found = patched_inside(model)
        if not found and any(record_of(module) is not None for module in model.modules()):
            restore(model)  # blocks of a patched model that were put into this one
            return
        if not found:
            raise PatchError(
                f"{type(model).__name__} is not patched, so there is nothing to undo: check tokenmerge.is_patched(model)"
            )
        for _, module in found:
            record = patch_of(module)
            assert record is not None
            take_off(module, record)


@contextlib.contextmanager
def patched(model: nn.Module, config: MergeConfig | None = None, **fields: Any) -> Iterator[Handle]:
    """Patch a model within a `with` block, as `patch` does, and unpatch it at the end, also after an error.

    With gradient checkpointing, call `backward` within the block: it runs the blocks again, which must still be patched.

    Args:
        model: a supported model, or a module that contains exactly one.
        config: settings; keywords override single fields of it.
        **fields: fields of `MergeConfig`.

    Yields:
        The handle. The errors are those of `patch`.

    Example:
        >>> import timm, tokenmerge
        >>> with tokenmerge.patched(timm.create_model("test_vit"), r=8) as handle:
        ...     handle.output_tokens()
        53
    """
    handle = patch(model, config, **fields)
    try:
        yield handle
    except BaseException:
        with contextlib.suppress(PatchError):  # it must not hide the user's own error
            _remove_if_live(handle)
        raise
    _remove_if_live(handle)


def _remove_if_live(handle: Handle) -> None:
    with turns:
        if patch_of(handle._model) is handle._record:
            handle.remove()


def is_patched(model: nn.Module) -> bool:
    """Return whether `model` is a patched model or contains one."""
    check_is_module(model)
    return bool(patched_inside(model))
