"""docs/export.md's table of what exports where: every cell is tried here, and `TOKENMERGE_WRITE=1` writes what was found.

One program holds all settings that a column says yes to, each a small model of its own: exporters take seconds to start.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tokenmerge.config import FIELDS, choices_of
from tokenmerge.errors import ConfigError
from tokenmerge.matching import matcher_names
from tokenmerge.matching.registry import get_entry
from tokenmerge.patching.predictors import add_predictors
from tokenmerge.tools.export import files
from tokenmerge.tools.export.files import export_model
from tokenmerge.tools.export.options import SUFFIXES, ExportOptions

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
R = [5, 0]
"""One block merges, and another attends to merged tokens: exporters take seconds for each matching."""


def _choices(field: str) -> list[Any]:
    """The values that a field of the config may have, besides its default."""
    return [value for value in choices_of(field) if value != FIELDS[field].default]


MATCHERS = [name for name in matcher_names() if get_entry(name).matcher.__module__.startswith("tokenmerge.")]
ROWS: dict[str, dict[str, Any]] = {
    **{
        f"matcher `{name}`": {"matcher": name, **({"place": "after"} if "after" in get_entry(name).requires else {})}
        for name in MATCHERS
    },
    "matcher `threshold`, calibrated": {"matcher": "threshold", "options": {"thresholds": [0.5, 0.5]}},
    **{
        f"metric `{name}`": {"metric": name, **({"place": "before"} if name == "x_pre" else {})}
        for name in ("q", "v", "kv", "x", "x_pre")
    },
    "metric `k`, heads `concat`": {"heads": "concat"},
    **{
        f"combine `{name}`": {"combine": name} for name in ("average", "max", "destination", "norm", "max_norm", "tofu")
    },
    **{f"distance `{name}`": {"distance": name} for name in ("euclidean", "dot", "softmax")},
    **{f"partition `{name}`": {"partition": name} for name in ("sequential", "random", "checkerboard")},
    "order `spatial`": {"order": "spatial"},
    "place `after`": {"place": "after"},
    "preset `accurate`": {"preset": "accurate"},
}
"""Name of a row to the fields of its config."""


class Several(nn.Module):
    """Several models that take the same images."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Give the output of each."""
        return tuple(model(x) for model in self.models)


def _model(row: str) -> Any:
    model = tiny("deit_tiny_patch16_224", depth=2)
    entry = get_entry(ROWS[row].get("matcher", "bipartite"))
    if entry.learned:
        torch.manual_seed(0)
        add_predictors(model, [0, 1], entry.name)
    tokenmerge.patch(model, r=5 if "every block" in entry.requires else R, backend="torch", **ROWS[row])
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters log, warn, and print whole graphs where they fail."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _hasty() -> Any:
    """Let the code around AOTInductor's kernels be compiled without optimization, to save time; other tests use the default."""
    from torch._inductor import config

    return config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"})


Run = Callable[[Tensor], list[Tensor]]


program_of = functools.lru_cache(maxsize=1)(files._program)
"""What torch.export makes of models: three columns begin with the same program, and it takes as long as what they do with it."""


def _by_command(format: str) -> Callable[[nn.Module, Tensor, Path], Run | None]:
    """Write and verify a file as `tokenmerge export` does, on batches that it was not exported with."""

    def write(model: nn.Module, images: Tensor, folder: Path) -> None:
        options = ExportOptions(model="m", r=[8], format=format)
        with mock.patch.object(files, "_program", program_of), _hasty():
            written = export_model(model, images, options, folder / f"model{SUFFIXES[format]}", {})
        assert written.difference is not None
        assert written.difference <= 1e-5

    return write


def _torchscript(model: nn.Module, images: Tensor, folder: Path) -> Run:
    import onnxruntime

    path = str(folder / "model.onnx")
    torch.onnx.export(
        model, (images,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}}, opset_version=18
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {"x": x.numpy()})]


def _openvino(model: nn.Module, images: Tensor, folder: Path) -> Run:
    import openvino

    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(program_of(model, images, True)), "CPU", precise)

    def run(x: Tensor) -> list[Tensor]:
        found = compiled(x.numpy())
        return [torch.from_numpy(found[index].copy()) for index in range(len(compiled.outputs))]

    return run


def _coreml(model: nn.Module, images: Tensor, folder: Path) -> None:
    """Convert; running needs a Mac."""
    import coremltools

    program = torch.export.export(model, (images,), strict=False).run_decompositions({})
    coremltools.convert(program, minimum_deployment_target=coremltools.target.iOS17, skip_model_load=True)


COLUMNS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Path], Run | None]]] = {
    "onnx": ("onnxruntime", _by_command("onnx")),
    "onnx, TorchScript": ("onnxruntime", _torchscript),
    "pt2": ("torch", _by_command("pt2")),
    "aoti": ("torch", _by_command("aoti")),
    "OpenVINO": ("openvino", _openvino),
    "Core ML, converted": ("coremltools", _coreml),
}
"""Name of a column to the package that it needs, and how to export and run."""


@functools.lru_cache(maxsize=1)
def _models(rows: tuple[str, ...]) -> tuple[Several, Tensor]:
    """The models of those rows, and images for them; the same ones again, so that they have the same program."""
    whole = Several([_model(row) for row in rows]).eval()
    return whole, images_for(whole.models[0])


def _exports(column: str, rows: Sequence[str], folder: Path) -> None:
    """Export the models of those rows as one program, and compare what it gives for another batch."""
    whole, images = _models(tuple(rows))
    with torch.no_grad(), _quiet():
        run = COLUMNS[column][1](whole, images, folder)
        if run is None:
            return
        other = torch.cat([images.flip(0), 0.5 * images[:1]])
        wanted, found = whole(other), run(other)
    for row, ours, theirs in zip(rows, found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()), msg=f"{column}: {row}")


def _working(column: str, rows: Sequence[str], folder: Path) -> list[str]:
    """The rows that export, found by halves: few do not."""
    (folder / rows[0].replace("`", "")).mkdir(exist_ok=True)
    try:
        _exports(column, rows, folder / rows[0].replace("`", ""))
    except Exception:
        middle = len(rows) // 2
        parts = (rows[:middle], rows[middle:]) if middle else ()
        return [row for part in parts for row in _working(column, part, folder)]
    return list(rows)


def _parts(column: str, rows: Sequence[str]) -> list[Sequence[str]]:
    """The rows that one program holds, and so on: ONNX's and Core ML's converters take ever longer for larger programs."""
    count = {"onnx": 1, "Core ML, converted": 4}.get(column, len(ROWS))
    return [rows[first : first + count] for first in range(0, len(rows), count)]


def _table() -> dict[str, dict[str, str]]:
    """The table in the docs, by row and column."""
    lines = DOCS.read_text("utf-8").partition("| setting |")[2].splitlines()
    columns = [cell.strip() for cell in lines[0].strip("| ").split("|")]
    found: dict[str, dict[str, str]] = {}
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        name, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        found[name] = dict(zip(columns, cells, strict=True))
    return found


def _write(column: str, found: dict[str, str]) -> None:
    """Put a column into the table, which may have no row yet."""
    text = DOCS.read_text("utf-8")
    table = _table()
    names = list(COLUMNS)
    lines = ["| setting | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in ROWS:
        cells = {**table.get(row, {}), column: found[row]}
        lines.append(f"| {row} | " + " | ".join(cells.get(name, "") for name in names) + " |")
    DOCS.write_text(re.sub(r"\| setting \|(.*\n\|)*.*\n", "\n".join(lines) + "\n", text, count=1), "utf-8")


def test_the_table_has_every_setting() -> None:
    """Every value of every field of matching and merging stands in a row."""
    assert list(_table()) == list(ROWS)
    assert set(_table()[next(iter(ROWS))]) == set(COLUMNS)
    covered: dict[str, set[Any]] = {}
    for row in ROWS.values():
        for field, value in row.items():
            covered.setdefault(field, set()).add(json.dumps(value))
    for field in ("metric", "heads", "combine", "distance", "partition", "order"):
        assert {json.dumps(value) for value in _choices(field)} <= covered[field], field
    ours = [name for name in matcher_names() if get_entry(name).matcher.__module__.startswith("tokenmerge.")]
    assert {json.dumps(name) for name in ours} == covered["matcher"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_registry")
@pytest.mark.parametrize("column", COLUMNS)
def test_column(column: str, tmp_path: Path) -> None:
    """What the table says yes to is exported, run and equal; what it says no to cannot be exported."""
    package = COLUMNS[column][0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if "TOKENMERGE_WRITE" in os.environ:
        working = [row for part in _parts(column, list(ROWS)) for row in _working(column, part, tmp_path)]
        found = {row: "yes" if row in working else "no" for row in ROWS}
        _write(column, found)
    cells = {row: cells[column] for row, cells in _table().items()}
    assert set(cells.values()) <= {"yes", "no"}
    working = [row for row, cell in cells.items() if cell == "yes"]
    for part in _parts(column, working):
        _exports(column, part, tmp_path)
    for number, row in enumerate(row for row, cell in cells.items() if cell == "no"):
        (tmp_path / f"no{number}").mkdir()
        with pytest.raises(ConfigError, match="exported program"):
            _exports(column, [row], tmp_path / f"no{number}")
