"""Distributed evaluation over the processes that torchrun or `accelerate launch` started."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from tokenmerge.errors import InputError, TokenMergeError


@dataclasses.dataclass(frozen=True)
class Processes:
    """The place of this process among all processes.

    Attributes:
        rank: index of this process.
        count: number of processes.
        device: device of this process.
    """

    rank: int
    count: int
    device: str

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes results."""
        return self.rank == 0

    def gather(self, values: list[Any]) -> list[Any]:
        """Concatenate the lists of all processes, in every process."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        found: list[Any] = gather_object(values)
        return found

    def close(self) -> None:
        """Disconnect from the other processes, because gloo's threads may abort the interpreter when it exits."""
        from torch import distributed

        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def launched(device: str) -> Processes:
    """Connect the processes of the launcher; without a launcher, return this process alone.

    Raises:
        InputError: if there are several processes, and Accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1, device)
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError(
            "accelerate is not installed, but several processes need it: pip install 'tokenmerge[train]'"
        ) from None
    state = PartialState(cpu=device == "cpu")
    return Processes(state.process_index, state.num_processes, str(state.device) if device == "cuda" else device)


@contextlib.contextmanager
def agree(kind: type[TokenMergeError]) -> Iterator[None]:
    """Raise an error of the body in every process, so that none waits for one that failed; all processes must enter it.

    Args:
        kind: class of the error to raise in the processes whose own body did not fail.

    Raises:
        TokenMergeError: if the body raised one in any process.
    """
    problem: TokenMergeError | None = None
    try:
        yield
    except TokenMergeError as error:
        problem = error
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        found: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, None if problem is None else str(problem))
        first = next((text for text in found if text is not None), None)
        if problem is None and first is not None:
            problem = kind(first)
    if problem is not None:
        raise problem
