"""Nested states as one JSON tree and named tensors, exact to the bit, so that no pickle is ever written or read.

In the tree, `null`, booleans, strings, whole numbers and finite numbers stand for themselves, and a list for a list. Everything
else is an object of one entry, whose name is its kind: `{"dict": [[key, value], …]}`, `{"tuple": […]}`, `{"tensor": name}`,
`{"complex": name}` for a tensor of complex numbers, whose parts are stored, and `{"float": hex}` for infinities and NaN.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenmerge.errors import InputError, shown
from tokenmerge.files import check_depth, plain_file, words_of

_PLAIN = (type(None), bool, str, int, float)
_LARGEST = 2**63
"""Whole numbers of at least this size are refused, because arithmetic with numbers of the processor would fail later."""


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return a nested value as a JSON tree and the tensors that it names.

    Args:
        value: dictionaries, lists, tuples, tensors and plain values, nested; subclasses of `dict` become dictionaries.

    Raises:
        InputError: if it holds anything else, or is nested too deeply.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    try:
        tree = _packed(value, tensors, names)
    except RecursionError:
        raise InputError("the state is nested too deeply: it cannot be stored") from None
    check_depth(tree, "the state")
    return tree, tensors


def packable(value: Any) -> bool:
    """Return whether `pack` can store a value."""
    try:
        pack(value)
    except InputError:
        return False
    return True


def _packed(value: Any, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    if type(value) in _PLAIN:
        if type(value) is float and not math.isfinite(value):
            return {"float": struct.pack(">d", value).hex()}
        if type(value) is int and not -_LARGEST <= value < _LARGEST:
            raise InputError(f"the state holds the number {shown(value)[:40]}, but 64 bits were expected")
        return value
    if isinstance(value, Tensor):
        return _named(value, tensors, names)
    if isinstance(value, dict):
        return {"dict": [[_packed(key, tensors, names), _packed(one, tensors, names)] for key, one in value.items()]}
    if type(value) in (list, tuple):
        parts = [_packed(one, tensors, names) for one in value]
        return parts if type(value) is list else {"tuple": parts}
    raise InputError(f"the state holds a {type(value).__name__}, but tensors, numbers and texts were expected")


def _named(value: Tensor, tensors: dict[str, Tensor], names: dict[int, str]) -> dict[str, str]:
    """Return the entry of a tensor; one that is held twice is stored once and shared again after loading."""
    if value.layout != torch.strided or value.is_quantized or hasattr(value, "full_tensor"):
        raise InputError(f"the state holds a tensor of {value.layout}, but a dense one was expected")
    name = names.setdefault(id(value), str(len(names)))
    tensors[name] = torch.view_as_real(value.detach().resolve_conj()) if value.is_complex() else value.detach()
    return {"complex" if value.is_complex() else "tensor": name}


def unpack(tree: Any, tensors: dict[str, Tensor], what: str) -> Any:
    """Return the value that `pack` stored.

    Args:
        tree: the JSON tree.
        tensors: the named tensors.
        what: what the tree describes, for messages, such as "the state 'a.json'".

    Raises:
        InputError: if the tree is not one of `pack`, it names a tensor that is missing, or a tensor is not named.
    """
    check_depth(tree, what)
    used: set[str] = set()
    value = _unpacked(tree, tensors, used, what)
    odd = next((name for name in tensors if name not in used), None)
    if odd is not None:
        raise InputError(f"{what} comes with a tensor {shown(odd)} that it does not name: it was changed")
    return value


def _unpacked(tree: Any, tensors: dict[str, Tensor], used: set[str], what: str) -> Any:
    if type(tree) in _PLAIN:
        if type(tree) is float and not math.isfinite(tree):
            raise InputError(f"{what} holds the number {tree}, but finite ones were expected: it was changed")
        if type(tree) is int and not -_LARGEST <= tree < _LARGEST:
            raise InputError(f"{what} holds a number of more than 64 bits: it was changed")
        return tree
    if isinstance(tree, list):
        return [_unpacked(one, tensors, used, what) for one in tree]
    kind, content = next(iter(tree.items())) if len(tree) == 1 else ("", None)
    if (
        kind == "dict"
        and isinstance(content, list)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in content)
    ):
        pairs = [tuple(_unpacked(one, tensors, used, what) for one in pair) for pair in content]
        try:
            return dict(pairs)
        except TypeError:  # a key such as a list
            raise InputError(f"{what} holds a key that is none: it was changed") from None
    if kind == "tuple" and isinstance(content, list):
        return tuple(_unpacked(one, tensors, used, what) for one in content)
    if kind == "float" and isinstance(content, str):
        try:
            found: float = struct.unpack(">d", bytes.fromhex(content))[0]
        except (ValueError, struct.error):
            raise InputError(f"{what} holds the number {shown(content)}: it was changed") from None
        return found
    if kind in ("tensor", "complex") and isinstance(content, str):
        return _tensor(kind, content, tensors, used, what)
    raise InputError(f"{what} holds {shown(tree)}, which has no meaning there: it was changed")


def _tensor(kind: str, name: str, tensors: dict[str, Tensor], used: set[str], what: str) -> Tensor:
    if name not in tensors:
        raise InputError(f"{what} names the tensor {shown(name)}, which is missing: it was changed")
    used.add(name)
    found = tensors[name]
    if kind == "tensor":
        return found
    if not found.is_floating_point() or found.shape[-1:] != (2,):
        raise InputError(f"{what} names {shown(name)} as complex numbers, which it does not hold: it was changed")
    return torch.view_as_complex(found.contiguous())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as safetensors, each with its own memory: views and tied weights are copied.

    Raises:
        OSError, SafetensorError: if it cannot be written.
    """
    from safetensors.torch import save_file

    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().to("cpu").resolve_neg().contiguous()
        storage = flat.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != flat.numel() * flat.element_size():
            flat = flat.clone()
        seen.add(flat.untyped_storage().data_ptr())
        own[name] = flat
    save_file(own, path)


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        InputError: if it cannot be read, or is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = plain_file(path, what)
    try:
        # cloned, because the file is mapped into memory, and somebody may change it while the run goes on
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{what} {shown(str(path))} cannot be read ({words_of(error)}): it was changed") from None


def outline(value: Any) -> Any:
    """Return the structure of a nested value, which can be compared: kinds, names, dtypes and shapes."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return {key: outline(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return (type(value).__name__, [outline(one) for one in value])
    return type(value).__name__


def equal(left: Any, right: Any) -> bool:
    """Return whether two nested values are equal to the bit."""
    if outline(left) != outline(right):
        return False
    if isinstance(left, Tensor):
        return _bits(left) == _bits(right)
    if isinstance(left, dict):
        return all(equal(one, right[key]) for key, one in left.items())
    if isinstance(left, list | tuple):
        return all(equal(*pair) for pair in zip(left, right, strict=True))
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    return bool(left == right)


def _bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b""
