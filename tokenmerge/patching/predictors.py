"""Trained predictors of learned matchers in the blocks of a model: adding, training, saving and loading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from tokenmerge import files
from tokenmerge.errors import ConfigError, InputError, PatchError
from tokenmerge.matching.avit import HaltingGate
from tokenmerge.matching.dynamicvit import TokenPredictor
from tokenmerge.matching.learned import PREDICTOR, Predictor
from tokenmerge.matching.spvit import TokenSelector
from tokenmerge.patching.added import heads_of
from tokenmerge.patching.target import find_target

KINDS: Mapping[str, type[Predictor]] = {kind.matcher: kind for kind in (TokenPredictor, TokenSelector, HaltingGate)}
"""Class of the predictors of each learned matcher; matchers of others get DynamicViT's."""
FILE = "tokenmerge/predictors.safetensors"
"""Name of the predictors' file in a trained model's folder, in a subfolder because timm loads any weights beside a model."""


def add_predictors(model: nn.Module, blocks: Sequence[int], matcher: str = "dynamicvit") -> None:
    """Add an untrained predictor to some blocks of a model, as a submodule of the block.

    Args:
        model: a supported model, not patched.
        blocks: positions of the blocks, from 0.
        matcher: name of the learned matcher: "dynamicvit", "spvit" or "avit" (which needs one in every block).

    Raises:
        UnsupportedModelError: if the model is not supported.
        PatchError: if a block already has a predictor.
        ConfigError: if there is no such block, or the matcher's network cannot be made for the model's channels and heads.
    """
    target, kind = find_target(model), KINDS.get(matcher, TokenPredictor)
    made: list[tuple[nn.Module, Predictor]] = []
    for index in blocks:
        if not 0 <= index < len(target.blocks):
            raise ConfigError(
                f"block {index} was to get a predictor, but the model has blocks 0 … {len(target.blocks) - 1}"
            )
        block = target.blocks[index][0]
        if hasattr(block, PREDICTOR):
            raise PatchError(f"block {index} has a predictor already: remove_predictors(model) first")
        like = next(block.parameters())
        heads = heads_of(*target.blocks[index], target.channels) if kind is TokenSelector else 0
        made.append((block, kind(target.channels, heads).to(like.device, like.dtype).train(block.training)))
    for block, predictor in made:
        block.add_module(PREDICTOR, predictor)


def remove_predictors(model: nn.Module, blocks: Sequence[int] | None = None) -> None:
    """Remove the predictors of some blocks of a model, or of all blocks."""
    for index, block in predicting(model).items():
        if blocks is None or index in blocks:
            delattr(block, PREDICTOR)


def predicting(model: nn.Module) -> dict[int, nn.Module]:
    """Return the blocks that have a predictor, by position."""
    return {index: block for index, (block, _) in enumerate(find_target(model).blocks) if hasattr(block, PREDICTOR)}


def kind_of(model: nn.Module) -> type[Predictor] | None:
    """Return the class of a model's predictors, or `None` if it has none.

    Raises:
        PatchError: if they belong to different matchers.
    """
    kinds = {type(getattr(block, PREDICTOR)) for block in predicting(model).values()}
    if len(kinds) > 1:
        names = " and ".join(sorted(kind.matcher for kind in kinds))
        raise PatchError(
            f"the blocks have predictors of {names}, but only one matcher can run: remove_predictors(model)"
        )
    return next(iter(kinds), None)


def learned_loss(model: nn.Module, schedule: Sequence[int], tokens: int) -> Tensor | None:
    """Return the loss by which a learned matcher learns, with its paper's weights.

    Call it once after the forward pass of each training step, and add it to the loss. For DynamicViT and SPViT it is twice
    the mean of `(kept − wanted)²` over predictors. For A-ViT it is the ponder loss (weight 5e-4) and the KL divergence of
    the mean halting scores from a Gaussian over blocks (weight 0.1), whose mean is the depth that the schedule leaves.

    Args:
        model: the patched model.
        schedule: tokens that each block drops, cut to the possible maximum.
        tokens: tokens that enter the first block, without protected tokens.

    Returns:
        A scalar with gradient; `None` if no predictor ran.

    Raises:
        PatchError: if the predictors belong to different matchers.
    """
    kind = kind_of(model)
    found = {index: getattr(block, PREDICTOR) for index, block in predicting(model).items()}
    return None if kind is None else kind.loss(found, schedule, tokens)


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
    _, state = split_state(model, model.state_dict())
    if not state:
        raise PatchError(
            "the model has no predictors, so there is nothing to save: add_predictors(model, blocks) first"
        )
    files.write(path, as_file(model, state), "the file of predictors")


def as_file(model: nn.Module, state: Mapping[str, Tensor]) -> bytes:
    """Return the predictors' state of a model as a safetensors file that names their matcher."""
    from safetensors.torch import save

    kind = kind_of(model)
    return save(
        {name: value.contiguous() for name, value in state.items()},
        {"matcher": TokenPredictor.matcher if kind is None else kind.matcher},
    )


def load_predictors(model: nn.Module, path: Path | str) -> None:
    """Add the predictors that `save_predictors` saved to a model.

    Raises:
        InputError: if the file cannot be read or does not fit the model, which then keeps what it had.
        PatchError: if a block already has a predictor.
    """
    from safetensors import SafetensorError, safe_open

    path, before = files.plain_file(path, "the file of predictors"), set(predicting(model))
    try:
        with safe_open(path, "pt") as file:
            matcher = (file.metadata() or {}).get("matcher", TokenPredictor.matcher)  # older files do not say it
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        if matcher not in KINDS:
            raise ValueError(f"they belong to matcher {matcher!r:.60}, which is not known")
        blocks = sorted({int(name.partition(".")[0]) for name in state})
        add_predictors(model, blocks, matcher)
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
