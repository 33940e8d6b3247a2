"""FSDP2: every process keeps a shard of weights, gradients and optimizer state, and gathers one block at a time.

Accelerate starts the processes and reduces their results, but its own FSDP2 needs GPUs. PyTorch's `fully_shard` also runs
with gloo on the CPU, where tests compare a sharded run with a run of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from tokenmerge.errors import InputError
from tokenmerge.patching.root import merge_blocks
from tokenmerge.patching.swap import is_sharded
from tokenmerge.tools.train.options import TrainOptions


def check_can_shard(args: TrainOptions, processes: int) -> None:
    """Raise `InputError` if an option of the run does not work with sharding."""
    if processes == 1:
        raise InputError(
            "--fsdp shares the model among processes, but there is one: launch with torchrun --nproc-per-node N -m -- "
            "tokenmerge train …"
        )
    half = args.amp and args.amp_dtype == "float16"
    given = {"--model-ema": args.model_ema, "--compile": args.compile, "--amp-dtype float16": half}
    odd = next((flag for flag, is_given in given.items() if is_given), None)
    if odd is not None:
        hint = "give --amp-dtype bfloat16" if half and odd.startswith("--amp") else f"leave {odd} out"
        raise InputError(f"--fsdp does not work with {odd}: {hint}, or train without --fsdp")


def shard(model: nn.Module, device: str, processes: int) -> None:
    """Shard a patched model over the processes, with one unit per block and one for all other modules.

    Args:
        model: the patched model, with the same weights in every process.
        device: type of its device.
        processes: number of processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (processes,))
    for block in merge_blocks(model):
        fully_shard(cast("nn.Module", block), mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all weights in every process, so that processes may run different numbers of batches; all must call it."""
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            # the default of PyTorch: the root's weights are needed first in the next backward pass
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the full state dict on the CPU in the main process; all processes must call it."""
    if not is_sharded(model):
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(model, options=_whole())  # type: ignore[return-value]


def whole_norm(norm: Any) -> float:
    """Return the norm of a gradient over all shards."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


class ShardedState:
    """Unsharded weights and optimizer state of a sharded model, for checkpoints.

    Args:
        model: the sharded model.
        optimizer: the optimizer of its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return both full states in the main process, empty in the others; all processes must call it."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer, options=_whole())
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this process's shards of both states."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=_whole(offload=False),
        )


def _whole(offload: bool = True) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=offload)
