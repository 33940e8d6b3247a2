"""Check on fake CUDA tensors that a merged pass can be captured as a CUDA graph, and what PyTorch's own ways refuse.

    python -m tests.helpers.fake_graphs

A captured graph replays the same kernels on the same addresses. So a pass must not read a value, copy from the host, write to its
inputs, or use a tensor that was made before (its memory may be freed or hold other values by then). Each pass is traced into a
graph of operators, in which all of that shows. The graph is not run: there is no GPU here.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tokenmerge
from tests.helpers.fake_cuda import fake, timm_models
from tests.helpers.tiny import images_for, tiny

READS = ("_local_scalar_dense", "aten.nonzero", "aten.item", "aten.is_nonzero", "aten.masked_select", "aten.unique")


def faults(model: nn.Module, images: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Return what would break a captured graph of the model's pass."""
    with FakeTensorMode(), torch.no_grad():
        weights = fake(dict(model.named_parameters()), "cuda", dtype) | fake(dict(model.named_buffers()), "cuda", dtype)
        x = fake({"x": images}, "cuda", dtype)["x"]
        before = {name: tensor._version for name, tensor in {**weights, "x": x}.items()}

        def run(weights: dict[str, Tensor], x: Tensor) -> Any:
            return torch.func.functional_call(model, weights, (x,))

        run(weights, x)  # what upstream makes once and keeps is made now, as before a capture
        graph = make_fx(run, tracing_mode="real", _allow_non_fake_inputs=True)(weights, x)
        found = [f"writes to {name}" for name, tensor in {**weights, "x": x}.items() if tensor._version != before[name]]
    kernels = 0
    for node in graph.graph.nodes:
        name = str(node.target)
        kernels += "triton_kernel_wrapper" in name or name.startswith("tokenmerge.")
        if any(read in name for read in READS):
            found.append(f"reads a value: {name}")
        if node.op == "get_attr" and isinstance(getattr(graph, name, None), Tensor):
            found.append(f"uses a tensor made before the pass: {tuple(getattr(graph, name).shape)}")
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.device.type != "cuda" and value.dim():
            found.append(f"computes on {value.device}: {name}")
    return found if kernels else [*found, "holds no kernel of ours"]


class Broken(nn.Module):
    """A module with one fault, to show that this check finds it."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.weight, self.kept = fault, nn.Parameter(torch.ones(3)), torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        """Commit the fault."""
        if self.fault == "reads":
            return x[x > 0]
        if self.fault == "copies":
            return x + torch.arange(3).to(x.device)
        if self.fault == "writes":
            return x.mul_(2)
        if not self.kept.is_cuda:
            self.kept = torch.ones(3, device=x.device)  # kept from the first pass on
        return x + self.kept


def _outcome(model: nn.Module, images: Tensor) -> list[str]:
    try:
        return faults(model, images)
    except Exception as error:  # tracing fails where a pass would: on a read, for example
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"]


def main() -> int:
    """Check every kind of timm model and every option with kernels, and return the number of failures."""
    from triton.runtime import driver

    driver.set_active(importlib.import_module("scripts.kernels").Target(90))
    wrong = count = 0
    for name, model, inputs, option in timm_models():
        if any(word in option for word in ("matcher", "metric", "place", "combine", "preset", "distance")):
            continue  # in plain operators, without kernels of ours; `fake_cuda passes` checks them
        dense = _outcome(model, inputs["x"])
        with tokenmerge.patched(model, r=5, **option):
            merged = _outcome(model, inputs["x"])
        if "holds no kernel of ours" in dense:
            dense.remove("holds no kernel of ours")
        found = [one for one in merged if one not in dense]  # upstream itself may compute positions on the CPU
        count += 1
        wrong += bool(found)
        for one in dict.fromkeys(found):
            print(f"{name}: {one}")
    print(f"{count} graphs, {wrong} wrong")

    words = {"reads": "", "copies": "computes on cpu", "writes": "writes to x", "keeps": "a tensor made before"}
    broken = {fault: _outcome(Broken(fault), torch.ones(3)) for fault in words}
    missed = [
        fault
        for fault, word in words.items()
        if not any(word in one and "kernel of" not in one for one in broken[fault])
    ]
    print(f"of {len(words)} planted faults {len(words) - len(missed)} are found")
    wrong += len(missed)

    model = tiny("deit_tiny_patch16_224")
    tokenmerge.patch(model, r=5)
    images = images_for(model)
    for label, module in (("the model itself", model), ("a module around it", nn.Sequential(model))):
        try:
            torch.cuda.make_graphed_callables(module, (images,))
            print(f"make_graphed_callables takes {label}")
        except AssertionError as error:
            print(f"make_graphed_callables refuses {label}: {str(error).splitlines()[0]}")
        except Exception as error:  # the first call that needs a GPU
            print(f"make_graphed_callables takes {label}, and then needs a GPU ({type(error).__name__})")
    return wrong


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
