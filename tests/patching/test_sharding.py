"""FSDP2 on a patched model: the same outputs and gradients as unsharded, with sizes that arrive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys

import timm
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import tokenmerge

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))


def check(name, make, blocks, shape, **shards):
    torch.manual_seed(0)
    images = torch.randn(2, *shape)
    wanted, model = make(), make()
    with torch.no_grad():
        for parameter in wanted.parameters():  # as they are made, blocks change little, and so does merging
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.load_state_dict(wanted.state_dict())
    handles = [tokenmerge.patch(one, r=5) for one in (wanted, model)]
    for unit in blocks(model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for mode in ("train", "eval"):
        for one in (wanted, model):
            getattr(one, mode)()
            for handle in handles:
                handle.update(r=5 if mode == "train" else 7)
        outputs = [one(images) for one in (wanted, model)]
        outputs = [getattr(output, "last_hidden_state", output) for output in outputs]
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    for (label, left), right in zip(wanted.named_parameters(), model.parameters()):
        if left.grad is not None:  # every process saw the same images, so the mean over them is the gradient
            torch.testing.assert_close(right.grad.full_tensor(), left.grad, atol=1e-4, rtol=1e-4, msg=label)
    plain = make()
    plain.load_state_dict(wanted.state_dict())
    assert not torch.allclose(getattr(plain.eval()(images), "last_hidden_state", plain(images)), outputs[0], atol=1e-4)
    sys.stdout.write(f"{name} agrees\\n")  # at once: two processes write


def vit(**more):
    return lambda: timm.create_model("vit_tiny_patch16_224", img_size=96, depth=3, num_classes=5, **more)


shape = (3, 96, 96)
check("class token", vit(), lambda model: model.blocks, shape)
check("average", vit(global_pool="avg", class_token=False, fc_norm=False), lambda model: [*model.blocks, model.norm], shape)
check(
    "rotary",
    lambda: timm.create_model("eva02_tiny_patch14_224", img_size=84, depth=3, num_classes=5),
    lambda model: model.blocks,
    (3, 84, 84),
)
if "transformers" in sys.argv:
    from transformers import ViTConfig, ViTModel

    small = ViTConfig(image_size=96, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96)
    blocks = lambda model: tokenmerge.patching.root.merge_blocks(model)
    torch.manual_seed(1)
    check("transformers", lambda: ViTModel(small), blocks, shape)
"""


@pytest.mark.slow
def test_sharded_blocks_merge_as_whole_ones(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*words, "transformers"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("class token", "average", "rotary", "transformers"):
        assert done.stdout.count(f"{name} agrees") == 2
