"""Change of a module's class in place, and its restoration.

A patched module keeps its weights, buffers, hooks and name; its class becomes a subclass made at run time, as in torch's
parametrize and FSDP2. `forward` is never bound on an instance, because that would hide the module from wrappers for
gradient checkpointing and can make Dynamo reuse stale code.
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
    """Marker base of all classes made by `swapped_class`.

    A mix-in that turns an attribute of instances into a property lists it in `_tokenmerge_moved`, with the name under which
    the value is stored meanwhile. The names must differ, because Dynamo of torch 2.11 reads `vars(self)[name]` as the
    property and recurses without end.
    """

    _tokenmerge_mixin: type
    _tokenmerge_original: type[nn.Module]

    def __prepare_scriptable__(self) -> NoReturn:
        """Raise when `torch.jit.script` calls this method: TorchScript has no tensors that carry a state.

        Raises:
            PatchError: always.
        """
        raise PatchError(
            f"{type(self).__name__} is patched, and torch.jit.script cannot compile a model that merges tokens: use torch.export "
            "or torch.jit.trace, or unpatch it first"
        )


@functools.cache
def swapped_class(mixin: type, original: Any) -> type[nn.Module]:
    """Return the subclass of `original` in which `mixin` comes first; the same class object for the same arguments.

    It keeps the name of `original`, because device maps and sharding policies find blocks by class name.
    """

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        # pickle and deepcopy cannot find a class made at run time by its name, so they make it anew;
        # __getstate__ leaves out compiled code, which is valid only for the module that it was compiled for
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
    """Replace the module's class by the subclass in which `mixin` comes first."""
    cls: Any = type(module)
    for name, place in getattr(mixin, "_tokenmerge_moved", {}).items():
        vars(module)[place] = vars(module).pop(name)
    module.__class__ = swapped_class(mixin, cls)


def check_restorable(module: nn.Module) -> None:
    """Raise if something else has changed the module's class since `swap_class`.

    Raises:
        PatchError: if so.
    """
    cls: Any = type(module)
    if "_tokenmerge_original" not in cls.__dict__:
        raise PatchError(
            f"the class of a patched module has become {cls.__module__}.{cls.__qualname__} since it was patched, "
            "so it cannot be put back: undo the later change (FSDP, parametrize, …) first"
        )


def restore_class(module: nn.Module) -> None:
    """Restore the class that the module had before `swap_class`.

    Raises:
        PatchError: if something else has changed its class since.
    """
    check_restorable(module)
    cls: Any = type(module)
    module.__class__ = cls._tokenmerge_original
    for name, place in getattr(cls._tokenmerge_mixin, "_tokenmerge_moved", {}).items():
        vars(module)[name] = vars(module).pop(place)
    for name, value in vars(module).items():  # hooks of Accelerate store the bound method that they replaced
        if isinstance(value, types.MethodType) and value.__self__ is module:
            own = getattr(type(module), value.__name__, None)
            if own is not None and getattr(cls, value.__name__, None) is value.__func__ is not own:
                vars(module)[name] = types.MethodType(own, module)


def copy_without_hooks(module: Any, memo: dict[int, Any] | None = None) -> Any:
    """Return a deep copy for tests, without any hooks, which may expect other inputs or record what they see.

    Args:
        module: the module.
        memo: tensors that replace tensors of the module in the copy, by the `id` of the replaced one; others are copied.
    """
    # tensors that hooks compute before each pass, such as those of torch.nn.utils.prune, are no leaves of autograd, and
    # deepcopy refuses them
    computed = (value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor))
    memo = {**{id(value): value.detach().clone() for value in computed if not value.is_leaf}, **(memo or {})}
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return copied


def is_ours(hook: Any) -> bool:
    """Return whether patching registered this hook; its module tells, because a copied hook keeps nothing else."""
    return (getattr(hook, "__module__", None) or "").startswith("tokenmerge.")


def is_touched(module: nn.Module) -> bool:
    """Return whether a module has a hook or a class of this library."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return isinstance(module, Swapped) or any(is_ours(hook) for hook in hooks)


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2's `fully_shard` was called on this very module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return upstream's class of a module, patched or not."""
    cls: type[nn.Module] = getattr(type(module), "_tokenmerge_original", type(module))
    return cls
