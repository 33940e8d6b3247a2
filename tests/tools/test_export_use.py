"""Exports as users need them: what a search finds, images of any size, ties that every runtime breaks alike."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tests.tools.test_export_table import COLUMNS, Several
from tokenmerge.errors import ConfigError
from tokenmerge.ops import basics, exported
from tokenmerge.tools.export.files import export_model
from tokenmerge.tools.export.options import SUFFIXES, ExportOptions
from tokenmerge.tools.search.space import START, config_fields, full, suggest

ANY = torch.export.Dim.DYNAMIC
LAYERS = 3


class Drawn:
    """Stands for a trial of a search: draws each parameter at random."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """A number of a range."""
        return self.draw.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number of a range, ends included."""
        return self.draw.randint(low, high)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """One of several."""
        return self.draw.choice(choices)


def _found() -> list[dict[str, Any]]:
    """Fields of configs that a search may find: its starting points, and random ones with every choice."""
    model = tiny("deit_tiny_patch16_224", depth=LAYERS)
    cost = tokenmerge.model_cost(model)
    drawn = [suggest(Drawn(seed), LAYERS, attention=True) for seed in range(12)]
    seen = {(name, value) for parameters in drawn for name, value in parameters.items() if isinstance(value, str)}
    assert {("matcher", "informed"), ("size_penalty", "sqrt_harmonic"), ("partition", "checkerboard")} <= seen
    parameters = [*(full(start, LAYERS) for start in START), *drawn]
    return [config_fields(one, 1.3, LAYERS, cost.tokens, cost.protected, cost.fraction) for one in parameters]


@functools.lru_cache(maxsize=1)
def _models(first: int, count: int) -> tuple[Several, Tensor]:
    """Models merged by some of what is found, from the last on, and images; the same ones again for another column."""
    models = []
    for fields in _found()[::-1][first : first + count]:
        models.append(tiny("deit_tiny_patch16_224", depth=LAYERS))
        tokenmerge.patch(models[-1], backend="torch", **fields)
    return Several(models).eval(), images_for(models[0])


@pytest.mark.slow
@pytest.mark.usefixtures("one_registry")
@pytest.mark.parametrize("column", ["onnx", "onnx, TorchScript", "pt2", "OpenVINO"])
def test_what_a_search_finds(column: str, tmp_path: Path) -> None:
    package, write = COLUMNS[column]
    pytest.importorskip(package)
    found = _found()
    # converters take ever longer for larger programs, and the newer ONNX exporter most of all; TorchScript's tries everything
    count = 2 if column == "onnx" else 6
    for first in range(0, len(found) if column == "onnx, TorchScript" else count, count):
        whole, images = _models(first, count)
        with torch.no_grad():
            run = write(whole, images, tmp_path)
            if run is None:  # the command's own check has run it
                continue
            for ours, theirs in zip(run(images[:1]), whole(images[:1]), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def _dinov2() -> Any:
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=96, patch_size=16
    )
    torch.manual_seed(0)
    return transformers.Dinov2Model(config).eval()


@pytest.mark.parametrize("fields", [{}, {"matcher": "informed"}, {"metric": "kv"}, {"matcher": "pitome"}], ids=str)
@torch.no_grad()
def test_height_and_width_may_stay_free(fields: dict[str, Any]) -> None:
    """A constant r merges as many tokens of images of any size."""
    model = tiny("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
    tokenmerge.patch(model, r=5, backend="torch", **fields)
    free = ({0: ANY, 2: ANY, 3: ANY},)
    program = torch.export.export(model, (torch.randn(2, 3, 96, 112),), dynamic_shapes=free, strict=False).module()
    for shape in ((1, 3, 128, 160), (3, 3, 160, 80)):
        images = torch.randn(shape)
        torch.testing.assert_close(program(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("one_registry")
@torch.no_grad()
def test_height_and_width_may_stay_free_in_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = _dinov2()
    tokenmerge.patch(model, r=5, backend="torch")
    free = ({0: ANY, 2: ANY, 3: ANY},)
    program = torch.onnx.export(
        model, (torch.randn(2, 3, 96, 128),), dynamo=True, dynamic_shapes=free, opset_version=18, verbose=False
    )
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 128, 160), (3, 3, 160, 80)):
        images = torch.randn(shape)
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        wanted = model(images).last_hidden_state
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("fields", [{"keep": 0.9}, {"flops": 0.8}, {"speedup": 1.2}], ids=str)
@torch.no_grad()
def test_a_share_of_tokens_or_flops_needs_a_size(fields: dict[str, Any]) -> None:
    """Which r it is depends on the size, and a program holds one; with the size fixed, it is exported."""
    model = tiny("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
    tokenmerge.patch(model, backend="torch", **fields)
    images = torch.randn(2, 3, 128, 96)
    with pytest.raises(ConfigError, match="leaves the height or the width free"):
        torch.export.export(model, (images,), dynamic_shapes=({0: ANY, 2: ANY, 3: ANY},), strict=False)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: ANY},), strict=False).module()
    torch.testing.assert_close(program(images[:1]), model(images[:1]), rtol=1e-5, atol=1e-5)


def _values(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if kind == "ties":
        return torch.randint(0, 4, (3, 40), generator=generator).float()
    values = torch.randn(3, 40, generator=generator)
    if kind == "broken":
        values[0, ::3], values[1, 5], values[2, :4] = torch.nan, torch.inf, -torch.inf
    return (10 * values).to(torch.int64) if kind == "integers" else values


@pytest.mark.parametrize("kind", ["numbers", "ties", "broken", "integers"])
def test_orders_for_export_are_the_usual_ones(kind: str) -> None:
    values = _values(kind)
    assert torch.equal(exported.ascending_order(values), basics.ascending_order(values))
    assert torch.equal(exported.descending_order(values), basics.descending_order(values))


@pytest.mark.parametrize("channels", [(), (7,)])
def test_sums_and_maxima_for_export_are_the_usual_ones(channels: tuple[int, ...]) -> None:
    """Rows that nothing joins keep every bit."""
    generator = torch.Generator().manual_seed(0)
    batch, left, r = 3, 11, 6
    rows, values = torch.randn(batch * left, *channels, generator=generator), torch.randn(batch * r, *channels)
    target = torch.randint(0, left // 2, (batch, r), generator=generator) + left * torch.arange(batch).unsqueeze(1)
    target = target.reshape(-1)
    summed = exported.add_rows(rows, target, values, left)
    torch.testing.assert_close(summed, basics.add_rows(rows.clone(), target, values, left))
    alone = torch.ones(batch * left, dtype=torch.bool).index_fill(0, target, False)
    assert torch.equal(summed[alone], rows[alone])
    assert torch.equal(
        exported.largest_rows(rows, target, values, left), basics.largest_rows(rows, target, values, left)
    )


def test_other_forms_for_export_are_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    values, group = torch.randn(2, 9, generator=generator), torch.randint(0, 4, (2, 9), generator=generator)
    group[group == 2] = 3  # an empty group
    levels, steps = torch.linspace(-1, 5, 12), torch.rand(2, 9, generator=generator).cumsum(dim=1)
    usual = basics.largest_by(values, group, 4, -torch.inf), basics.first_reaching(steps, levels)
    monkeypatch.setattr(basics, "is_exporting", lambda: True)
    assert torch.equal(basics.largest_by(values, group, 4, -torch.inf), usual[0])
    assert torch.equal(basics.first_reaching(steps, levels), usual[1])


class Sources(nn.Module):
    """Gives out which token each patch became."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("deit_tiny_patch16_224", depth=2)
        self.handle = tokenmerge.patch(self.model, r=5, backend="torch", trace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The map of every patch."""
        return tokenmerge.trace_of(self.model.forward_features(x)).source()


def _of_one_colour() -> list[Tensor]:
    """Images that have nothing but ties, or ties of two kinds."""
    ones = torch.ones(2, 3, 96, 96)
    return [torch.zeros_like(ones), ones, ones.tril()]


@torch.no_grad()
def test_equal_patches_merge_as_in_the_model() -> None:
    model = Sources().eval()
    program = torch.export.export(model, (torch.randn(2, 3, 96, 96),), strict=False).module()
    for images in _of_one_colour():
        assert torch.equal(program(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("column", ["onnx, TorchScript", "OpenVINO"])
@torch.no_grad()
def test_equal_patches_merge_as_in_the_model_in_every_runtime(column: str, tmp_path: Path) -> None:
    package, write = COLUMNS[column]
    pytest.importorskip(package)
    model = Sources().eval()
    run = write(model, torch.randn(2, 3, 96, 96), tmp_path)
    assert run is not None
    for images in _of_one_colour():
        assert torch.equal(run(images)[0], model(images))


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_refusal_is_our_own_sentence(format: str, tmp_path: Path) -> None:
    """Also where an exporter wraps it into an error of its own, with advice for its developers."""
    model = tiny("deit_tiny_patch16_224", depth=1)
    tokenmerge.patch(model, r=5, matcher="agglomerative")
    with pytest.raises(ConfigError, match="runs in scipy"):
        export_model(
            model,
            images_for(model),
            ExportOptions(model="m", r=[8], format=format),
            tmp_path / f"model{SUFFIXES[format]}",
            {},
        )
