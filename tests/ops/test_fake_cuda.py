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
ROOT = Path(__file__).resolve().parents[2]


def without_interpreter(*words: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python with Triton's compiler instead of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_path_that_a_gpu_takes(request: pytest.FixtureRequest) -> None:
    """Launches, host reads and copies, devices, models without values, and what a compiler sees; see `fake_cuda.py`.

    In one process, because importing every library takes most of its time. What it prints is shown by `pytest -s`. Passes of
    every family and option are left to a run with the slow tests.
    """
    fast = request.config.getoption("markexpr") == "not slow"
    parts = ("launches", "devices", "models", "graph") if fast else ("passes", "launches", "devices", "models", "graph")
    done = without_interpreter("-m", "tests.helpers.fake_cuda", *parts)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    # dense and three more at most, from the second block on, in every library
    rows = [line for line in lines if line.startswith(("timm", "transformers", "torchvision", "open_clip"))]
    assert len(rows) == 4
    assert all("match_kernel, merge_kernel, unit_keys_kernel" in row for row in rows)
    # families, options and forms on tensors without values: no host read, and no copy from the host
    for passes in [line for line in lines if line.endswith(" wrong")]:
        count, wrong = (int(word) for word in passes.split() if word.isdigit())
        assert wrong == 0
        assert count >= 70
    assert fast or any(line.endswith(" wrong") for line in lines)
    # sizes and plans go with the tokens to another device, as a device map moves activations between blocks
    assert "two devices: the output is on cuda:1" in lines
    assert sum(line.startswith("without values: ") for line in lines) == 3
    # a traced graph holds the Triton kernels themselves, so Inductor can place and fuse around them
    assert "a traced graph: 4 Triton kernels, 0 closed operators, 0 warnings" in lines


@pytest.mark.slow
def test_passes_can_be_captured_as_graphs() -> None:
    """What PyTorch would capture reads and copies nothing, writes to no input, and uses nothing made before."""
    done = without_interpreter("-m", "tests.helpers.fake_graphs")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(line.endswith(" graphs, 0 wrong") and int(line.split()[0]) >= 15 for line in lines)
    assert "of 4 planted faults 4 are found" in lines
    assert any("refuses the model itself: Modules must not have hooks" in line for line in lines)
    assert any("takes a module around it" in line for line in lines)


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
