"""The CUDA path without CUDA: launches are counted and nothing is read back (`fake_cuda.py`, in processes of their own)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def without_interpreter(*words: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python with Triton's compiler instead of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_launches_per_block() -> None:
    """Dense and three more at most, from the second block on, in every library; printed for who runs pytest with -s."""
    done = without_interpreter("-m", "tests.fake_cuda", "launches")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("timm", "transformers", "torchvision", "open_clip"))
    ]
    assert len(rows) == 4
    assert all("match_kernel, merge_kernel, unit_keys_kernel" in row for row in rows)


def test_nothing_is_read_back() -> None:
    """Families, options and forms run on tensors without values: no host read, and no copy from the host."""
    done = without_interpreter("-m", "tests.fake_cuda", "passes")
    assert done.returncode == 0, done.stdout + done.stderr
    count, wrong = (int(word) for word in done.stdout.splitlines()[-1].split() if word.isdigit())
    assert wrong == 0
    assert count >= 70


GRAPH = """
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import driver
from scripts.kernels import Target
from tokenmerge.ops import matching, merging

driver.set_active(Target(90))  # so that the kernels can be read: what they write is found out that way

def both(keys, x):
    plan = matching.match(keys, 4, 1)
    return merging.merge(x, None, *plan, torch.bfloat16)

with FakeTensorMode():
    keys, x = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((2, 3, 50, 64), (2, 50, 192)))
    graph = aot_export_joint_simple(both, (keys, x), trace_joint=False).graph
print([str(node.target) for node in graph.nodes if node.op == "call_function"])
"""


def test_the_compiler_sees_the_kernels() -> None:
    """A traced graph holds the Triton kernels themselves, not closed operators, so Inductor can place and fuse around them."""
    done = without_interpreter("-c", GRAPH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("triton_kernel_wrapper") == 3, done.stdout
    assert "tokenmerge" not in done.stdout


DEVICES = """
import timm, torch, tokenmerge
from torch._subclasses.fake_tensor import FakeTensorMode

model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
tokenmerge.patch(model, r=8, trace=True)
moved = lambda module, args: tuple(x.to("cuda:1") for x in args)
for block in model.blocks[2:]:
    block.register_forward_pre_hook(moved)
state, second = model.state_dict(), ("blocks.2", "blocks.3", "norm.", "head.")
with FakeTensorMode(), torch.no_grad():
    weights = {n: torch.empty(p.shape, device="cuda:1" if n.startswith(second) else "cuda:0") for n, p in state.items()}
    out = torch.func.functional_call(model, weights, (torch.empty(2, 3, 224, 224, device="cuda:0"),))
print(out.device)
"""


def test_sizes_follow_the_tokens_to_another_device() -> None:
    """As a device map moves activations between blocks: sizes and plans go with them."""
    done = without_interpreter("-c", DEVICES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "cuda:1"


FAKE = """
import timm, torch, tokenmerge
from torch._subclasses.fake_tensor import FakeTensorMode

for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"):
    with torch.device("meta"):
        meta = timm.create_model(name, depth=3)
    print(tokenmerge.patch(meta, r=8).summary().tokens[-1])
    fake = timm.create_model(name, depth=3).eval()
    with FakeTensorMode():
        for module in fake.modules():
            for tensors in (module._parameters, module._buffers):
                for key, value in tensors.items():
                    if value is not None:
                        like = torch.empty(value.shape, device="cuda", requires_grad=value.requires_grad)
                        tensors[key] = torch.nn.Parameter(like) if tensors is module._parameters else like
        handle = tokenmerge.patch(fake, r=8)
        size = fake.patch_embed.img_size
        print(handle.summary().tokens[-1], fake(torch.empty(2, 3, *size, device="cuda")).shape[0])
"""


def test_models_without_values_can_be_patched() -> None:
    done = without_interpreter("-c", FAKE)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 9


def test_a_kernel_starts_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one; and all its programs lie along x, where a grid may be long."""
    from tokenmerge.ops import launch, matching

    seen: list[Any] = []

    class On:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            seen.append(self.device)

        def __exit__(self, *_: Any) -> None:
            seen.append("left")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(grid)
            return lambda *args, **constants: seen.append(constants)

    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(launch, "is_plain", lambda x: True)
    there = SimpleNamespace(is_meta=False, is_cuda=True, device=torch.device("cuda:1"))
    launch.Launch(Kernel(), 70_000, (there,), {"ROWS": 16}).start()
    assert seen == [torch.device("cuda:1"), (70_000,), {"ROWS": 16}, "left"]
    keys = torch.empty(70_000, 1, 197, 32, device="meta")
    assert all(70_000 <= one.programs < 2**31 for one in matching.launches(keys, 8, 1)[3])
