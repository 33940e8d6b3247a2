"""`tokenmerge export`: files that ONNX Runtime, torch.export and AOTInductor run, equal to the model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import TOWERS
from tokenmerge.cli import main
from tokenmerge.errors import InputError
from tokenmerge.tools.export import files as tool
from tokenmerge.tools.export.files import METADATA, export_model
from tokenmerge.tools.export.options import SUFFIXES, ExportOptions

# one of each kind of seam: class token, distillation, registers and LayerScale, map and average pooling, rotary
# positions, relative biases, talking heads
NAMES = [
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_medium_patch16_gap_240",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "vit_relpos_small_patch16_224",
]


def export(model: nn.Module, images: torch.Tensor, path: Path, format: str, **fields: Any) -> float:
    """The relative difference that verifying found."""
    args = ExportOptions(model="m", r=[8], format=format, **fields)
    written = export_model(model, images, args, path / f"model{SUFFIXES[format]}", {"a": 1})
    assert written.difference is not None
    assert written.bytes == sum(file.stat().st_size for file in path.iterdir())
    return written.difference


AS_ONNX = [name for name in NAMES if name.startswith(("deit_tiny_patch", "eva", "beit", "cait"))]
REST = [name for name in NAMES[3:] if name not in AS_ONNX]  # an ONNX file is made of what torch.export gives


@pytest.mark.parametrize("name", [*NAMES[:3], *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_torch_export(name: str, tmp_path: Path) -> None:
    """Exported with a batch of 2; verified with 1, 2 and 3."""
    model = tiny(name, depth=2)
    tokenmerge.patch(model, r=5, backend="torch")
    gap = export(model, images_for(model), tmp_path, "pt2")
    assert gap <= 2e-6
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_registry")
@pytest.mark.parametrize("name", AS_ONNX)
def test_onnx(name: str, tmp_path: Path) -> None:
    model = tiny(name, depth=2)
    tokenmerge.patch(model, r=5, backend="torch")
    gap = export(model, images_for(model), tmp_path, "onnx")
    assert gap <= 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("one_registry")
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("vit.ViTModel", "aoti"),
        ("videomae.VideoMAEModel", "pt2"),
        ("dinov3_vit.DINOv3ViTModel", "onnx"),
    ],
)
def test_transformers(name: str, format: str, tmp_path: Path) -> None:
    tower = next(tower for tower in TOWERS if tower.name == name)
    model = tower.build(num_hidden_layers=2)
    tokenmerge.patch(model, r=5, backend="torch")
    (images,) = tower.feed(2).values()
    gap = export(model, images, tmp_path, format)
    assert gap <= 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("one_registry")
def test_what_an_onnx_file_holds(tmp_path: Path) -> None:
    """Plain operators of the standard set, any batch size, and what made it."""
    onnx = pytest.importorskip("onnx")
    model = tiny(NAMES[0], depth=1)
    tokenmerge.patch(model, r=5, backend="torch")
    export(model, images_for(model), tmp_path, "onnx")
    written = onnx.load(tmp_path / "model.onnx")
    assert [(opset.domain, opset.version) for opset in written.opset_import] == [("", 18)]
    assert {node.domain for node in written.graph.node} == {""}
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert {p.key: json.loads(p.value) for p in written.metadata_props if p.key == METADATA} == {METADATA: {"a": 1}}


@pytest.mark.parametrize("error", [1.0, float("nan")])
def test_a_file_that_differs_is_not_written(error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is an older file under that name lost."""
    model = tiny(NAMES[0])
    (tmp_path / "model.pt2").write_bytes(b"older")
    monkeypatch.setitem(tool.RUNNERS, "pt2", lambda path: lambda images: [model(images) + error])
    with pytest.raises(InputError, match=r"differs from the model by .* nothing was written"):
        export(model, images_for(model), tmp_path, "pt2")
    assert (tmp_path / "model.pt2").read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_be_run_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(images: torch.Tensor) -> list[torch.Tensor]:
        raise TypeError("no such kernel")

    model = tiny(NAMES[0])
    monkeypatch.setitem(tool.RUNNERS, "pt2", lambda path: broken)
    with pytest.raises(InputError, match=r"cannot be run here \(TypeError: no such kernel\)"):
        export(model, images_for(model), tmp_path, "pt2")
    with pytest.raises(InputError, match="does not compute bfloat16"):
        export(model.bfloat16(), images_for(model).bfloat16(), tmp_path, "onnx")
    assert not list(tmp_path.iterdir())


def test_a_link_is_followed(tmp_path: Path) -> None:
    model = tiny(NAMES[0])
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model.pt2").symlink_to(tmp_path / "there" / "real.pt2")
    export_model(
        model, images_for(model), ExportOptions(model="m", r=[8], format="pt2"), tmp_path / "here" / "model.pt2", {}
    )
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["real.pt2"]
    assert (tmp_path / "here" / "model.pt2").is_symlink()


def test_a_model_that_cannot_be_exported(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(InputError, match="cannot be exported as pt2"):
        export(Odd(), torch.ones(2, 3), tmp_path, "pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, rows = tmp_path / "deit.pt2", tmp_path / "rows.json"
    line = ["export", f"local-dir:{model_dir}", "--r", "8", "--format", "pt2", "-o", str(output), "--json", str(rows)]
    assert main(line) == 0
    assert "verified" in capsys.readouterr().out
    (row,) = json.loads(rows.read_text())
    assert row["config"]["r"] == 8
    assert row["difference"] <= 1e-6
    assert row["bytes"] == output.stat().st_size
    extra = {METADATA: ""}
    torch.export.load(output, extra_files=extra)
    assert json.loads(extra[METADATA])["model"] == f"local-dir:{model_dir}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--r", "8", "13"], "one file holds one"),
        (["--r", "8", "-o", "model.txt"], r"should end in \.onnx"),
        (["--r", "8", "-o", "no/such/folder/model.onnx"], "does not exist"),
        (["--r", "8", "--format", "aoti", "-o", "model.onnx"], r"should end in \.pt2"),
        (["--r", "8", "--opset", "17"], "opset"),
    ],
)
def test_bad_input(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(["export", "deit_tiny_patch16_224", *options])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
