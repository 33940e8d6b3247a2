"""How a Triton kernel is started, and how it is compiled without being started.

Importing this module needs Triton; `tokenmerge.ops.choice` says whether that is so.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether the kernels were made for Triton's interpreter (`TRITON_INTERPRET=1` at import): on any device, and slowly."""

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One start of one kernel.

    Attributes:
        kernel: a `triton.jit` function.
        programs: how many programs run it; all of them along x, where a grid may have 2³¹ − 1.
        arguments: tensors and numbers.
        constants: what it is compiled for, by name; `num_warps` and `num_stages` among them.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]

    def start(self) -> None:
        """Run it on the device of its tensors, which need not be the current one.

        Where tensors are traced, the kernel goes into the graph as itself (`torch.library.wrap_triton`), so that
        Inductor sees it; on the "meta" device nothing runs.
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
        """Compile it for the current target of Triton, as for these arguments, and return Triton's compiled kernel.

        The tensors may be on the "meta" device: only their dtypes count, and that they are aligned.
        """
        return self.kernel.warmup(*self.arguments, grid=(1,), **self.constants)


def is_plain(x: Tensor) -> bool:
    """Whether `x` is a tensor with memory, and nobody traces what is done with it."""
    if torch.compiler.is_compiling():
        return False
    traced = torch._C._len_torch_dispatch_stack() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return type(x) in (Tensor, Parameter) and not traced


def start_all(launches: Iterable[Launch]) -> None:
    """Start them one after the other; nothing is started for a batch without images."""
    for launch in launches:
        if launch.programs:
            launch.start()


def operator(name: str, fake: Callable[..., Any]) -> Callable[[_F], Any]:
    """A torch operator made of launches, into which Inductor sees; closed where Triton's interpreter runs them.

    Args:
        name: with its namespace.
        fake: makes outputs of the right shapes where the operator is closed. An open one is traced as it is written.
    """

    def register(function: _F) -> Any:
        if not INTERPRETED:
            return torch.library.triton_op(name, mutates_args=())(function)
        closed = torch.library.custom_op(name, mutates_args=())(function)
        closed.register_fake(fake)
        return closed

    return register


def one_program_per(count: int, size: int) -> int:
    """How many programs of `size` rows cover `count` rows."""
    return -(-count // size)


def divisor(*strides: int) -> int:
    """The largest power of two up to 16 that divides all of these."""
    step = 16
    while any(stride % step for stride in strides):
        step //= 2
    return step
