"""Changing a module's class in place and back.

A patched module keeps its weights, buffers, hooks and name; only its class becomes a subclass made here, as
torch's parametrize and FSDP2 do. `forward` is never bound on an instance: that hides a module from gradient
checkpointing wrappers and can make Dynamo reuse stale code.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import types
from typing import Any, NoReturn

from torch import Tensor, nn

from tokenmerge.errors import PatchError


class Swapped:
    """Marks classes made by `swapped_class`.

    A mix-in that makes a property of an instance's attribute names it in `_tokenmerge_moved`, with the name under
    which the value lies meanwhile: Dynamo of torch 2.11 reads `vars(self)[name]` as the property, without end.
    """

    _tokenmerge_mixin: type
    _tokenmerge_original: type[nn.Module]

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script`, whose language has no tensors that carry a state."""
        raise PatchError(
            f"{type(self).__name__} is patched, and torch.jit.script cannot compile a model that merges tokens: use torch.export "
            "or torch.jit.trace, or unpatch it first"
        )


@functools.cache
def swapped_class(mixin: type, original: Any) -> type[nn.Module]:
    """The subclass of `original` in which `mixin` comes first; the same object each time.

    It keeps the original's name, because device maps and sharding policies look blocks up by class name.
    """

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # a class made at run time cannot be found by name: pickle and deepcopy make it anew
        # (by __getstate__, which leaves out compiled code: that belongs to the module it was compiled for)
        return _rebuild, (mixin, original), self.__getstate__()

    namespace = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce_ex__": reduce,
        "_tokenmerge_mixin": mixin,
        "_tokenmerge_original": original,
    }
    return type(original.__name__, (mixin, original, Swapped), namespace)


def _rebuild(mixin: type, original: Any) -> Any:
    return copyreg.__newobj__(swapped_class(mixin, original))  # type: ignore[attr-defined]


def swap_class(module: nn.Module, mixin: type) -> None:
    """Put `mixin` in front of the module's class."""
    cls: Any = type(module)
    for name, place in getattr(mixin, "_tokenmerge_moved", {}).items():
        vars(module)[place] = vars(module).pop(name)
    module.__class__ = swapped_class(mixin, cls)


def check_restorable(module: nn.Module) -> None:
    """Raise `PatchError` if something else has changed the module's class since `swap_class`."""
    cls: Any = type(module)
    if "_tokenmerge_original" not in cls.__dict__:
        raise PatchError(
            f"the class of a patched module has become {cls.__module__}.{cls.__qualname__} since it was patched, "
            "so it cannot be put back: undo the later change (FSDP, parametrize, …) first"
        )


def restore_class(module: nn.Module) -> None:
    """Give the module the class back that it had before `swap_class`.

    Raises:
        PatchError: if something else has changed its class in between.
    """
    check_restorable(module)
    cls: Any = type(module)
    module.__class__ = cls._tokenmerge_original
    for name, place in getattr(cls._tokenmerge_mixin, "_tokenmerge_moved", {}).items():
        vars(module)[name] = vars(module).pop(place)
    for name, value in vars(module).items():  # hooks of Accelerate keep the method that they put theirs in place of
        if isinstance(value, types.MethodType) and value.__self__ is module:
            own = getattr(type(module), value.__name__, None)
            if own is not None and getattr(cls, value.__name__, None) is value.__func__ is not own:
                vars(module)[name] = types.MethodType(own, module)


def copy_without_hooks(module: Any, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy for trying things on, without anyone's hooks, which may expect other inputs or note what they see.

    Args:
        module: the module.
        memo: what stands in the copy for tensors of the module, by `id`; all others are copied.
    """
    # what hooks compute before each pass, as those of torch.nn.utils.prune do, is no leaf, which Python's copy refuses
    computed = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    memo = {**{id(value): value.detach().clone() for value in computed if not value.is_leaf}, **(memo or {})}
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return copied


def is_ours(hook: Any) -> bool:
    """Whether a hook was put on a module by patching; found by where it was written, because copies keep nothing else."""
    return (getattr(hook, "__module__", None) or "").startswith("tokenmerge.")


def is_touched(module: nn.Module) -> bool:
    """Whether a module has a hook or a class of ours."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return isinstance(module, Swapped) or any(is_ours(hook) for hook in hooks)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` was called on this very module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Upstream's class of a module, patched or not."""
    cls: type[nn.Module] = getattr(type(module), "_tokenmerge_original", type(module))
    return cls
