"""Launches of Triton kernels, and their compilation ahead of a launch.

Importing this module requires Triton; `tokenmerge.ops.choice` tells whether it is available.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from tokenmerge.ops.basics import is_plain

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels run in Triton's interpreter (`TRITON_INTERPRET=1` at import): slowly, on any device."""

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: a `triton.jit` function.
        programs: number of programs, all along the grid's x axis, which allows up to 2³¹ − 1.
        arguments: tensors and numbers.
        constants: compile-time constants by name, including `num_warps` and `num_stages`.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]

    def start(self) -> None:
        """Run the kernel on the device of its tensors, which need not be the current device.

        While tensors are traced, the kernel enters the graph by `torch.library.wrap_triton`, so that Inductor can compile
        it. On the "meta" device nothing runs.
        """
        first: Tensor = self.arguments[0]
        if first.is_meta:
            return
        if INTERPRETED or is_plain(first):
            with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
                self.kernel[(self.programs,)](*self.arguments, **self.constants)
        else:
            torch.library.wrap_triton(self.kernel)[(self.programs,)](*self.arguments, **self.constants)

    def compile(self) -> Any:
        """Compile the kernel for Triton's current target and these arguments; return Triton's compiled kernel.

        The tensors may be on the "meta" device: only their dtypes and alignment count.
        """
        return self.kernel.warmup(*self.arguments, grid=(1,), **self.constants)


def start_all(launches: Iterable[Launch]) -> None:
    """Start launches in order, except those without programs (empty batches)."""
    for launch in launches:
        if launch.programs:
            launch.start()


def operator(name: str, fake: Callable[..., Any]) -> Callable[[_F], Any]:
    """Return a decorator that makes a function of launches a torch operator.

    Inductor traces into the operator, except under Triton's interpreter, where it is opaque.

    Args:
        name: name of the operator, with its namespace.
        fake: function that allocates outputs of the right shapes, used where the operator is opaque.
    """

    def register(function: _F) -> Any:
        if not INTERPRETED:
            return torch.library.triton_op(name, mutates_args=())(function)
        closed = torch.library.custom_op(name, mutates_args=())(function)
        closed.register_fake(fake)
        return closed

    return register


def one_program_per(count: int, size: int) -> int:
    """Return how many programs of `size` rows cover `count` rows."""
    return -(-count // size)


def divisor(*strides: int) -> int:
    """Return the largest power of two, at most 16, that divides all strides."""
    step = 16
    while any(stride % step for stride in strides):
        step //= 2
    return step
