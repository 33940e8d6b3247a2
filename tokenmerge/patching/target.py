"""Finding what to patch inside whatever the user holds, and saying why when it cannot be done."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from tokenmerge.errors import PatchError, UnsupportedModelError
from tokenmerge.flops import ModelCost
from tokenmerge.patching.families import block_family, misread, model_family, supported_models, why_not
from tokenmerge.patching.families.family import BlockFamily, ModelFamily
from tokenmerge.patching.root import Patch
from tokenmerge.patching.swap import is_sharded, original_class

_WRAPPERS = "transformers.modeling_layers"


@dataclasses.dataclass(frozen=True)
class Target:
    """A model that can be patched: the module itself, its row, and the row of each block."""

    model: Any
    family: ModelFamily
    blocks: tuple[tuple[Any, BlockFamily], ...]

    @property
    def channels(self) -> int:
        """C of the tokens."""
        return self.family.channels(self.model)

    def cost(self, place: str = "between") -> ModelCost:
        """What the model costs for one image at its own input size, when blocks merge at that place."""
        stem, head, head_per_token = self.family.cost(self.model)
        return ModelCost(
            tokens=self.family.tokens(self.model),
            protected=self.family.protected(self.model),
            blocks=tuple(row.cost(block) for block, row in self.blocks),
            stem=stem,
            head=head,
            head_per_token=head_per_token,
            place=place,
        )


def patch_of(module: nn.Module) -> Patch | None:
    """The record of a patched module, `None` if that very module is not patched."""
    record: Patch | None = vars(module).get("_tokenmerge_patch")
    return record


def patched_inside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of every patched model in `model`, itself included (then the name is empty)."""
    return [(name, module) for name, module in model.named_modules() if patch_of(module) is not None]


def _name(module: nn.Module) -> str:
    cls = original_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def misread_by(model: nn.Module) -> tuple[str, ...]:
    """Modules around a tower that would misread merged tokens, and why."""
    reasons = (misread(original_class(module)) for module in model.modules())
    return tuple(reason for reason in reasons if reason is not None)


def _own(method: Any) -> Any:
    """A method without the wrapper that transformers puts around the forward of every subclass of a layer."""
    while hasattr(method, "__wrapped__") and getattr(method, "__globals__", {}).get("__name__", "").endswith(_WRAPPERS):
        method = method.__wrapped__
    return method


def _overridden(module: nn.Module, base: type, methods: tuple[str, ...]) -> list[str]:
    """Which of `base`'s methods the module's class or the module itself has replaced."""
    cls = original_class(module)
    return [
        name
        for name in methods
        if hasattr(base, name) and (_own(getattr(cls, name)) is not _own(getattr(base, name)) or name in vars(module))
    ]


def check_is_module(model: object) -> None:
    """Raise `UnsupportedModelError` unless `model` is a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{model!r} of type {type(model).__name__} was given, but a torch.nn.Module was expected: "
            "create the model first, for instance with timm.create_model(name)"
        )


def find_target(model: nn.Module) -> Target:
    """The one supported model in `model`: itself, or the single one among its submodules.

    Raises:
        UnsupportedModelError: if there is none, more than one, or the one found cannot be patched right.
    """
    check_is_module(model)
    found = [(name, module) for name, module in model.named_modules() if model_family(original_class(module))]
    if not found:
        reason = why_not(original_class(model)) or "its class is not in the table of supported models"
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
    return _examine(found[0][1])


def _examine(model: nn.Module) -> Target:
    """The target for a module of a supported class, or all the reasons why it is none."""
    family = model_family(original_class(model))
    assert family is not None
    reasons = [f"it has its own {name}()" for name in _overridden(model, family.model, family.seams)]
    blocks: list[tuple[Any, BlockFamily]] = []
    if not reasons:
        reasons += family.refuse(model)
        for index, block in enumerate(family.blocks(model)):
            row = block_family(original_class(block))
            if row is None:
                reasons.append(f"block {index} is {_name(block)}, which is not in the table of supported blocks")
                continue
            if _overridden(block, row.block, ("forward",)):
                reasons.append(f"block {index} ({_name(block)}) has its own forward()")
            reasons += [f"block {index}: {reason}" for reason in row.refuse(block)]
            blocks.append((block, row))
        if len({id(block) for block, _ in blocks}) < len(blocks):
            reasons.append("it runs the same block object more than once, and one block has one r")
        if any(is_sharded(block) and "_tokenmerge_spec" not in vars(block) for block, _ in blocks):
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
    """Raise `PatchError` if the model, something inside it, or something it is a block of is patched."""
    for name, module in patched_inside(model):
        record = patch_of(module)
        assert record is not None
        where = f"its submodule {name}" if name else "the model"
        raise PatchError(
            f"{where} is patched already ({record.config.to_json()}), but a model can be patched once: change it "
            "with tokenmerge.handle(model).update(...), or call tokenmerge.unpatch(model) first"
        )
    if any("_tokenmerge_spec" in vars(module) for module in model.modules()):
        raise PatchError(
            "blocks of this module belong to a larger model that is patched already: "
            "update that model's handle, or unpatch that model first"
        )
