"""Search for the model to patch inside the user's module, and the reasons if it cannot be patched."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.jit import ScriptModule

from tokenmerge.config import Place
from tokenmerge.errors import InputError, PatchError, UnsupportedModelError
from tokenmerge.flops import NO_ENDS, Ends, ModelCost
from tokenmerge.patching.families.family import (
    BlockFamily,
    ModelFamily,
    block_family,
    misread,
    model_family,
    supported_models,
    why_not,
)
from tokenmerge.patching.families.linear import channels_of
from tokenmerge.patching.record import ModelRecord, record_of
from tokenmerge.patching.swap import is_sharded, is_touched, original_class
from tokenmerge.schedule import Most

_WRAPPERS = "transformers.modeling_layers"


@dataclasses.dataclass(frozen=True)
class Target:
    """Model that can be patched.

    Attributes:
        model: the module itself.
        family: row of the model.
        blocks: the blocks, each with its row.
        around: multiply-adds of a classifier that surrounds the model.
    """

    model: Any
    family: ModelFamily
    blocks: tuple[tuple[Any, BlockFamily], ...]
    around: Ends = NO_ENDS

    @property
    def channels(self) -> int:
        """C, channels of a token, from the first block, whose channels may have been pruned since it was created."""
        return channels_of(self.blocks[0][0], self.family.channels(self.model))

    def cost(self, place: Place = "between", most: Most = "half") -> ModelCost:
        """Return the model's cost for one image at its own input size.

        Args:
            place: where blocks merge (`MergeConfig.place`).
            most: limit on the tokens that a block can merge away.
        """
        return ModelCost(
            tokens=self.family.tokens(self.model),
            protected=self.family.protected(self.model),
            blocks=tuple(row.cost(block) for block, row in self.blocks),
            **self.ends()._asdict(),
            place=place,
            most=most,
        )

    def ends(self) -> Ends:
        """Return the multiply-adds of everything before and after the blocks, at the model's own input size."""
        return Ends(*self.family.cost(self.model)).plus(self.around)

    def tokens_at(self, input_size: int | Sequence[int] | None) -> int:
        """Return the tokens that enter the first block, prefix included, for an input size (`None`: the model's own).

        Raises:
            InputError: if the number cannot be known before a forward pass, or the size is invalid.
        """
        if input_size is None:
            return self.family.tokens(self.model)
        return math.prod(self.grid_at(input_size) or ()) + self.family.protected(self.model)

    def grid_at(self, input_size: int | Sequence[int] | None) -> tuple[int, ...] | None:
        """Return the patches along each axis for an input size; `None` is the model's own size, which may have no grid.

        Raises:
            InputError: if a size is given and it is invalid, or its grid cannot be known before a forward pass.
        """
        family, model = self.family, self.model
        if input_size is None:
            return family.grid(model)
        sizes = self._sizes(input_size)
        grid = None if family.grid_at is None else family.grid_at(model, sizes)
        if grid is None:
            raise InputError(
                f"how many tokens {original_class(model).__name__} makes of an input of {sizes} is known only once it has run: "
                "run it with trace=True, and look at handle.trace.tokens"
            )
        if min(grid) < 1:
            raise InputError(f"input_size={input_size!r:.200} is smaller than one patch: give the size in pixels")
        return grid

    def _sizes(self, input_size: int | Sequence[int]) -> tuple[int, ...]:
        own = self.family.grid(self.model)
        axes = 2 if own is None else len(own)
        try:
            sizes = (input_size,) * axes if isinstance(input_size, int) else tuple(input_size)
        except TypeError:
            sizes = ()
        sizes = () if isinstance(input_size, bool | bytes | str) else sizes
        if len(sizes) != axes or not all(isinstance(size, int) and size > 0 for size in sizes):
            names = {1: "(frames,)", 2: "(height, width)", 3: "(frames, height, width)"}[axes]
            raise InputError(
                f"input_size={input_size!r:.200}, but {names} or one whole number for all of them was expected, in pixels or frames: "
                "leave out batch and channels"
            )
        return sizes


def patch_of(module: nn.Module) -> ModelRecord | None:
    """Return the record of a patched model, or `None` if this very module is not one."""
    record = record_of(module)
    return record if isinstance(record, ModelRecord) and module_is_root(record, module) else None


def module_is_root(record: ModelRecord, module: nn.Module) -> bool:
    """Return whether a record describes the module that carries it; norms and readers carry their model's record."""
    return issubclass(original_class(module), record.family.model)


def patched_inside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the name and module of every patched model in `model`; the name of `model` itself is empty."""
    return [(name, module) for name, module in model.named_modules() if patch_of(module) is not None]


def _name(module: nn.Module) -> str:
    cls = original_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def misread_by(model: nn.Module, target: Target) -> tuple[str, ...]:
    """Return why modules around the target, up to the one that the user passed, would misread merged tokens."""
    way = [*_way(model, target.model), target.model]
    tower = original_class(target.model)
    reasons = (misread(module, inside, original_class(module), tower) for module, inside in itertools.pairwise(way))
    return tuple(dict.fromkeys(reason for reason in reasons if reason))


def _way(model: nn.Module, inside: nn.Module) -> list[nn.Module]:
    """Return the modules around `inside` within `model`, outermost first."""
    name = next(name for name, module in model.named_modules() if module is inside)
    return [model.get_submodule(name[:end]) for end in _ends(name)]


def _ends(name: str) -> list[int]:
    """Return the lengths of the prefixes of a module's name that name the modules around it: for `a.b.c`, 0, 1 and 3."""
    return [0, *(place for place, letter in enumerate(name) if letter == ".")] if name else []


def _own(method: Any) -> Any:
    """Return a method without the wrapper that transformers puts around the forward of every subclass of a layer."""
    while hasattr(method, "__wrapped__") and getattr(method, "__globals__", {}).get("__name__", "").endswith(_WRAPPERS):
        method = method.__wrapped__
    return method


def _overridden(module: nn.Module, base: type, methods: tuple[str, ...]) -> list[str]:
    """Return which of `base`'s methods the module's class or the module itself overrides."""
    cls = original_class(module)
    return [
        name
        for name in methods
        if hasattr(base, name) and (_own(getattr(cls, name)) is not _own(getattr(base, name)) or name in vars(module))
    ]


def _own_method(module: nn.Module, name: str) -> str:
    """Return in words that a method is not upstream's."""
    if name in vars(module):
        kept = getattr(vars(module)[name], "__func__", None) is getattr(
            type(module), name
        )  # Accelerate left the class's own method on the module
        by = " as Accelerate's hooks leave it" if kept or is_prepared(module) else ""
        return f"it has its own {name}(), set on the module itself{by} (delete that if it is needed no more)"
    return f"it has its own {name}()"


def check_is_module(model: object) -> None:
    """Raise unless `model` is a `torch.nn.Module`.

    Raises:
        UnsupportedModelError: if it is anything else.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{model!r:.200} of type {type(model).__name__} was given, but a torch.nn.Module was expected: "
            "create the model first, for instance with timm.create_model(name)"
        )


def find_target(model: nn.Module) -> Target:
    """Return the only supported model in `model`, which may be `model` itself.

    Raises:
        UnsupportedModelError: if there is none, more than one, or the one found cannot be patched correctly.
    """
    check_is_module(model)
    found = [(name, module) for name, module in model.named_modules() if model_family(original_class(module))]
    if not found:
        reason = _why_none(model)
        raise UnsupportedModelError(
            f"{_name(model)} holds no model that tokenmerge supports ({reason}): patch one of {supported_models()}, or "
            "merge in your own forward with tokenmerge.bipartite_matching",
            (reason,),
        )
    if len(found) > 1:
        names = ", ".join(name or "the model itself" for name, _ in found)
        raise UnsupportedModelError(
            f"{_name(model)} holds {len(found)} supported models ({names}), but one was expected: patch the one you mean"
        )
    target = _examine(found[0][1])
    return dataclasses.replace(target, around=target.family.around(_way(model, target.model), target.model))


def _why_none(model: nn.Module) -> str:
    """Return why a module contains no model to patch."""
    if any(isinstance(module, GraphModule) for module in model.modules()):
        return "it was traced by torch.fx, which leaves no blocks: patch first, then trace"
    if any(isinstance(module, ScriptModule) for module in model.modules()):
        return "it was scripted or traced by TorchScript, which leaves no blocks: patch the original model"
    return why_not(original_class(model)) or "its class is not in the table of supported models"


def is_prepared(module: nn.Module) -> bool:
    """Return whether Accelerate has set a forward of its own on the module."""
    own = vars(module)
    return "forward" in own and any(name in own for name in ("_original_forward", "_old_forward", "_hf_hook"))


def _wrapped(block: nn.Module) -> str:
    """Return what hides a block or a module inside it from its row, with a remedy; empty if nothing does.

    The text follows the block's number in a message.
    """
    for name, module in block.named_modules():
        where = f": its module {name}" if name else ""
        if isinstance(module, GraphModule | ScriptModule):
            return f"{where} was traced or scripted already: patch first, then do that"
        if any(part.startswith(("_orig_mod", "_checkpoint_wrapped")) for part in module._modules):
            return f"{where} was compiled or wrapped already ({_name(module)}): patch first, then do that"
        if name and is_prepared(module):
            return f"{where} was prepared by Accelerate already: patch before that"
        if name and "forward" in vars(module):
            return f"{where} has its own forward(), set on the module itself: delete that if it is needed no more"
    return ""


def _against(block: nn.Module, row: BlockFamily | None) -> list[str]:
    """Return why a block cannot be patched correctly; each text follows the block's number in a message."""
    if row is None:
        return [_wrapped(block) or f" is {_name(block)}, which is not in the table of supported blocks"]
    own = _overridden(block, row.block, ("forward",))
    reasons = [f" ({_name(block)}): {_own_method(block, 'forward')}"] if own else []
    refused = row.refuse(block)
    hidden = _wrapped(block) if refused else ""
    return [*reasons, *([hidden] if hidden else (f": {reason}" for reason in refused))]


def _blocks_of(model: nn.Module, family: ModelFamily) -> list[nn.Module]:
    try:
        return list(family.blocks(model))
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{_name(model)} has lost the list of its blocks ({error}): create it anew", (str(error),)
        ) from None


def _examine(model: nn.Module) -> Target:
    """Return the target for a module of a supported class.

    Raises:
        UnsupportedModelError: if it cannot be patched correctly; the message lists the reasons.
    """
    family = model_family(original_class(model))
    assert family is not None
    patched = patch_of(model) is not None  # later changes to a patched model are checked by its forward passes instead
    reasons = [] if patched else [_own_method(model, name) for name in _overridden(model, family.model, family.seams)]
    if is_prepared(model) and not patched:
        reasons = ["Accelerate has prepared it already: patch before accelerator.prepare, or before it is dispatched"]
    blocks: list[tuple[Any, BlockFamily]] = []
    if not reasons:
        reasons += family.refuse(model)
        for index, block in enumerate(_blocks_of(model, family)):
            row = None if isinstance(block, ScriptModule) else block_family(original_class(block))
            if record_of(block) is None:
                reasons += [f"block {index}{reason}" for reason in _against(block, row)]
            if row is not None:
                blocks.append((block, row))
        if len({id(block) for block, _ in blocks}) < len(blocks):
            reasons.append("it runs the same block object more than once, and one block has one r")
        if any(is_sharded(block) and record_of(block) is None for block, _ in blocks):
            reasons.append("its blocks are sharded by FSDP2 already: patch first, then shard")
        if not reasons and not blocks:
            reasons.append("it has no blocks")
    if reasons:
        shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
        raise UnsupportedModelError(
            f"{_name(model)} cannot be patched without becoming silently wrong: {shown}; "
            "use the library's own classes, or merge in your own forward with tokenmerge.bipartite_matching",
            tuple(reasons),
        )
    return Target(model, family, tuple(blocks))


def refuse_if_patched(model: nn.Module) -> None:
    """Raise if the model or a module inside it is patched, or is part of another patched model.

    Raises:
        PatchError: if so; the message names the module.
    """
    for name, module in patched_inside(model):
        record = patch_of(module)
        assert record is not None
        where = f"its submodule {name}" if name else "the model"
        raise PatchError(
            f"{where} is patched already ({record.settings.config.to_json()}), but a model can be patched once: change it "
            "with tokenmerge.handle_of(model).update(...), or call tokenmerge.unpatch(model) first"
        )
    if any(record_of(module) is not None or is_touched(module) for module in model.modules()):
        raise PatchError(
            "blocks of this module, or modules inside them, belong to another model that is patched already: update that model's "
            "handle, unpatch that model first, or give this one modules of its own (copy.deepcopy)"
        )


def model_cost(model: nn.Module) -> ModelCost:
    """Return the cost of a supported model, patched or not, for one image at its own input size, without merging.

    Raises:
        UnsupportedModelError: if the model is not supported.
    """
    return find_target(model).cost()
