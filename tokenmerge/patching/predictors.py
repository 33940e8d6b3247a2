"""Trained predictors (DynamicViT, arXiv 2106.02034) in the blocks of a model: adding, training, saving and loading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenmerge import files
from tokenmerge.errors import ConfigError, InputError, PatchError
from tokenmerge.matching.learned import PREDICTOR, TokenPredictor
from tokenmerge.patching.target import find_target

FILE = "tokenmerge/predictors.safetensors"
"""Name of the predictors' file in a trained model's folder, in a subfolder because timm loads any weights beside a model."""


def add_predictors(model: nn.Module, blocks: Sequence[int]) -> None:
    """Add an untrained predictor to some blocks of a model, as a submodule of the block.

    Args:
        model: a supported model, not patched.
        blocks: positions of the blocks, from 0.

    Raises:
        UnsupportedModelError: if the model is not supported.
        PatchError: if a block already has a predictor.
        ConfigError: if there is no such block, or the model's channels are not divisible by 4.
    """
    target = find_target(model)
    for index in blocks:
        if not 0 <= index < len(target.blocks):
            raise ConfigError(
                f"block {index} was to get a predictor, but the model has blocks 0 … {len(target.blocks) - 1}"
            )
        block = target.blocks[index][0]
        if hasattr(block, PREDICTOR):
            raise PatchError(f"block {index} has a predictor already: remove_predictors(model) first")
        like = next(block.parameters())
        block.add_module(PREDICTOR, TokenPredictor(target.channels).to(like.device, like.dtype).train(block.training))


def remove_predictors(model: nn.Module, blocks: Sequence[int] | None = None) -> None:
    """Remove the predictors of some blocks of a model, or of all blocks."""
    for index, block in predicting(model).items():
        if blocks is None or index in blocks:
            delattr(block, PREDICTOR)


def predicting(model: nn.Module) -> dict[int, nn.Module]:
    """Return the blocks that have a predictor, by position."""
    return {index: block for index, (block, _) in enumerate(find_target(model).blocks) if hasattr(block, PREDICTOR)}


def ratio_loss(model: nn.Module, schedule: Sequence[int], tokens: int) -> Tensor | None:
    """Return the loss by which predictors learn to keep as many tokens as the schedule leaves (DynamicViT's ratio loss).

    It is the mean of `(kept − wanted)²` over predictors. Call it once after the forward pass of each training step, and add
    it to the loss (DynamicViT gives it a weight of 2).

    Args:
        model: the patched model.
        schedule: tokens that each block drops, cut to the possible maximum.
        tokens: tokens that enter the first block, without protected tokens.

    Returns:
        A scalar with gradient; `None` if no predictor ran.
    """
    parts = []
    for index, block in predicting(model).items():
        predictor = getattr(block, PREDICTOR)
        kept, predictor.kept = predictor.kept, None
        if kept is not None and schedule[index]:
            wanted = 1 - sum(schedule[: index + 1]) / tokens
            parts.append((kept - wanted).square().mean())
    return torch.stack(parts).mean() if parts else None


def split_state(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a model's state dict without its predictors, and the predictors' state by `BLOCK.NAME`, as they are saved."""
    places = {module: name for name, module in model.named_modules()}
    starts = {f"{places[block]}.{PREDICTOR}.": index for index, block in predicting(model).items()}
    rest, found = {}, {}
    for name, value in state.items():
        start = next((prefix for prefix in starts if name.startswith(prefix)), None)
        if start is None:
            rest[name] = value
        else:
            found[f"{starts[start]}.{name.removeprefix(start)}"] = value
    return rest, found


def save_predictors(model: nn.Module, path: Path | str) -> None:
    """Save the weights of all predictors as a safetensors file.

    Raises:
        PatchError: if the model has no predictors.
        InputError: if the file cannot be written.
    """
    from safetensors.torch import save

    _, state = split_state(model, model.state_dict())
    if not state:
        raise PatchError(
            "the model has no predictors, so there is nothing to save: add_predictors(model, blocks) first"
        )
    files.write(path, save({name: value.contiguous() for name, value in state.items()}), "the file of predictors")


def load_predictors(model: nn.Module, path: Path | str) -> None:
    """Add the predictors that `save_predictors` saved to a model.

    Raises:
        InputError: if the file cannot be read or does not fit the model, which then keeps what it had.
        PatchError: if a block already has a predictor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, before = files.plain_file(path, "the file of predictors"), set(predicting(model))
    try:
        state = load_file(path)
        blocks = sorted({int(name.partition(".")[0]) for name in state})
        add_predictors(model, blocks)
        for index in blocks:
            start = f"{index}."
            mine = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
            getattr(predicting(model)[index], PREDICTOR).load_state_dict(mine)
    except Exception as error:  # safetensors and torch raise their own types for damaged files
        remove_predictors(model, [index for index in predicting(model) if index not in before])
        if isinstance(error, PatchError):
            raise
        known = isinstance(error, SafetensorError | OSError | ValueError | RuntimeError | LookupError | TypeError)
        if not known:
            raise
        raise InputError(
            f"the predictors in {str(path)!r} cannot be used ({files.words_of(error)}): give the file that was trained with this model"
        ) from None
