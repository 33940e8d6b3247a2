"""The processes that torchrun or `accelerate launch` started, as one: for evaluation on many devices."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from tokenmerge.errors import InputError


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among others.

    Attributes:
        rank: its number.
        count: how many there are.
        device: where it computes.
    """

    rank: int
    count: int
    device: str

    @property
    def is_main(self) -> bool:
        """Whether this one prints and writes."""
        return self.rank == 0

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other, in every process."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        found: list[Any] = gather_object(values)
        return found

    def close(self) -> None:
        """Disconnect: left to the interpreter's exit, gloo's threads may abort it."""
        from torch import distributed

        if self.count > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def launched(device: str) -> Processes:
    """The processes of the launcher, connected; just this one if there was none.

    Raises:
        InputError: if there are several, and Accelerate is not installed.
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
