"""`tokenmerge export`: write the merged model as one file for ONNX Runtime, torch.export or AOTInductor.

Before the file gets its final name, it is run on batch sizes that it was not exported with, and its outputs are compared
with the model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tokenmerge
from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.patching import patch
from tokenmerge.tools.device import place
from tokenmerge.tools.models import ModelArgs, input_shape, load_model
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.settings import Setting
from tokenmerge.tools.trained import as_trained
from tokenmerge.tools.tune_file import tune_file


@dataclasses.dataclass(frozen=True)
class Written:
    """Result of `export_model`.

    Attributes:
        difference: largest difference between the outputs of the file and of the model, divided by the largest output;
            `None` if not verified.
        bytes: size of the file, including the separate file of weights if there is one.
    """

    difference: float | None
    bytes: int


Run = Callable[[Tensor], list[Tensor]]
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
METADATA = "tokenmerge.json"
"""Name of the JSON description inside a .pt2 file, and its key in the metadata of an .onnx file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Options of an export.

    Attributes:
        format: "onnx" (ONNX, opset `opset`), "pt2" (torch.export) or "aoti" (compiled by AOTInductor).
        output: file to write; `None` is a name made of the model and r, in the current folder.
        batch_size: the only batch size that the file accepts; `None` accepts any.
        opset: ONNX operator set, at least 18.
        verify: whether to run the file and compare its outputs with the model before it gets its final name.
        tune_schedule: whether to measure files with other schedules and without merging first, and to keep the fastest one.
    """

    format: str = "onnx"
    output: Path | None = None
    batch_size: int | None = None
    opset: int = 18
    verify: bool = True
    tune_schedule: bool = False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logging, warnings and progress output of exporters; failures still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _program(model: nn.Module, images: Tensor, any_batch: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim.DYNAMIC},) if any_batch else None
    return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)


def _write_pt2(model: nn.Module, images: Tensor, args: ExportArgs, about: str, path: Path) -> None:
    program = _program(model, images, args.batch_size is None)
    torch.export.save(program, path, extra_files={METADATA: about})


def _run_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: _tensors(module(images))


def _write_aoti(model: nn.Module, images: Tensor, args: ExportArgs, about: str, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    program = _program(model, images, args.batch_size is None)
    aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {METADATA: about}}
    )


def _run_aoti(path: Path) -> Run:
    from torch._inductor import aoti_load_package

    module = aoti_load_package(str(path))
    return lambda images: _tensors(module(images))


def _write_onnx(model: nn.Module, images: Tensor, args: ExportArgs, about: str, path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        _needs(name)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if args.batch_size is None else None
    program = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=shapes, opset_version=args.opset, verbose=False
    )
    assert program is not None
    program.model.metadata_props[METADATA] = about
    program.save(str(path))


def _run_onnx(path: Path) -> Run:
    session = _needs("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {name: images.cpu().numpy()})]


_WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "aoti": _write_aoti}
_RUNNERS = {"onnx": _run_onnx, "pt2": _run_pt2, "aoti": _run_aoti}


def _needs(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{module} is not installed, but exporting to ONNX needs it: pip install 'tokenmerge[export]'"
        ) from None


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def export_model(model: nn.Module, images: Tensor, args: ExportArgs, path: Path, about: dict[str, Any]) -> Written:
    """Write a patched model; the file appears under its name only when it is complete and verified.

    Args:
        model: the patched model, in evaluation mode.
        images: an example batch, of at least 2 inputs unless `args.batch_size` is 1.
        args: format and options.
        path: the file to write.
        about: description of the model, stored in the file as JSON.

    Returns:
        The measured difference and the size of the file.

    Raises:
        InputError: if a package is missing, the exporter fails, the file cannot be written or run, or its outputs differ.
    """
    if args.format == "onnx" and args.verify:
        _needs("onnxruntime")  # fail now, not after minutes of exporting
        if images.dtype == torch.bfloat16:
            raise InputError(
                "ONNX Runtime does not compute bfloat16 on a CPU, so the file cannot be verified: export float32 or "
                "float16, or give --no-verify"
            )
    path = path.resolve()  # follow links, so that the file behind a link is replaced
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent))
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written ({error.strerror}): choose another --output") from None
    try:
        new = folder / path.name
        try:
            with torch.no_grad(), _quiet():
                _WRITERS[args.format](model, images, args, json.dumps(about), new)
        except (TokenMergeError, MemoryError, torch.OutOfMemoryError):
            raise
        except OSError as error:
            raise InputError(
                f"{str(path)!r} cannot be written ({error.strerror or error}): choose another --output"
            ) from None
        except Exception as error:  # every exporter raises its own exception types
            if (own := _own_error(error)) is not None:
                raise own from None
            reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
            raise InputError(
                f"the model cannot be exported as {args.format} ({type(error).__name__}: {reason[:300]}): "
                "try another --format, or another version of torch"
            ) from None
        difference = _verify(model, images, args, new) if args.verify else None
        parts = sorted(folder.iterdir())  # large ONNX models have a separate file of weights
        written = Written(difference, sum(part.stat().st_size for part in parts))
        for part in parts:
            os.replace(part, path.parent / part.name)
        return written
    finally:
        for part in folder.iterdir():
            part.unlink()
        folder.rmdir()


def _own_error(error: BaseException | None) -> TokenMergeError | None:
    """Return the error of this library that an exporter has wrapped in its own, or `None`."""
    while error is not None and not isinstance(error, TokenMergeError):
        error = error.__cause__ or error.__context__
    return error


def _verify(model: nn.Module, images: Tensor, args: ExportArgs, path: Path) -> float:
    """Return the largest relative difference between the file and the model, on random inputs.

    Without a fixed batch size, it is taken over batches of 1, of the example's size, and of one more.
    """
    try:
        with _quiet():
            run = _RUNNERS[args.format](path)
    except TokenMergeError:
        raise
    except Exception as error:  # every runtime raises its own exception types
        raise InputError(_cannot_run(args.format, error)) from None
    tolerance = 1e-4 if images.dtype == torch.float32 else 3e-2
    batches = [args.batch_size] if args.batch_size else [1, images.shape[0], images.shape[0] + 1]
    worst = 0.0
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, *images.shape[1:], generator=generator).to(images)
        if images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            wanted = _tensors(model(x))
            try:
                found = run(x)
            except Exception as error:
                raise InputError(_cannot_run(args.format, error)) from None
        if [tuple(a.shape) for a in found] != [tuple(a.shape) for a in wanted]:
            raise InputError(
                f"the exported model gives other shapes than the model at batch {batch}: report this model"
            )
        for ours, theirs in zip(found, wanted, strict=True):
            difference = (
                (ours.to(theirs.device).double() - theirs.double()).abs().max() if ours.numel() else torch.zeros(())
            )
            relative = float(difference / theirs.double().abs().max().clamp_min(1e-6))
            if not relative <= tolerance:  # written this way so that NaN fails, too
                raise InputError(
                    f"the exported model differs from the model by {relative:.1e} of the largest output, but at most "
                    f"{tolerance:.0e} was expected: nothing was written; try another --format, or --no-verify"
                )
            worst = max(worst, relative)
    return worst


def _cannot_run(format: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
    return (
        f"the {format} file was written but cannot be run here ({type(error).__name__}: {reason[:300]}), so it was not "
        "kept: try another --dtype, --opset or --format, or --no-verify"
    )


def run_export(args: ModelArgs, export: ExportArgs, setting: Setting, fields: dict[str, Any], report: Report) -> int:
    """Load, patch, export and verify a model, print and write one row, and return 0."""
    fields = as_trained(args, fields)
    path = export.output or Path(f"{_file_name(args.model)}_r{_file_name(str(setting.label))}{SUFFIXES[export.format]}")
    if path.suffix != SUFFIXES[export.format]:
        raise InputError(
            f"--output {str(path)!r} should end in {SUFFIXES[export.format]} for --format {export.format}: rename it"
        )
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise InputError(f"--output {str(path)!r} is a folder, or in one that does not exist: give a file name")
    model = load_model(args)
    shape = input_shape(model)
    config = setting.config(**fields, backend="torch")  # Triton kernels cannot be exported
    handle = None if setting.is_baseline else patch(model, config)
    images = torch.zeros(export.batch_size or 2, *shape)
    images = place(images, args.device, args.dtype, args.channels_last)
    tuned, asked = None, config
    if export.tune_schedule:
        if handle is None:
            raise InputError(
                "--tune-schedule was given with r=0, which merges nothing: give another r, or leave it out"
            )
        unverified = dataclasses.replace(export, verify=False)

        def write(file: Path) -> None:
            export_model(model, images, unverified, file, {})

        batch = images[: export.batch_size or 1]
        tuned = tune_file(model, handle, batch, path.suffix, write, _RUNNERS[export.format])
        config = handle.config
        report.say(tuned)
    about = {
        "model": args.model,
        "config": json.loads(config.to_json()),
        "tokenmerge": tokenmerge.__version__,
        "torch": torch.__version__,
        "input": ["batch" if export.batch_size is None else export.batch_size, *shape],
    }
    start = time.perf_counter()
    written = export_model(model, images, export, path, about)
    row: Row = {
        **about,
        "r": setting.label if tuned is None or handle is None or handle.config == asked else handle.config.r,
        "format": export.format,
        "opset": export.opset if export.format == "onnx" else None,
        "file": str(path),
        "bytes": written.bytes,
        "difference": written.difference,
        "tuned": tuned,
        "flops_ratio": 1.0 if handle is None else handle.summary().flops_ratio,
        "seconds": time.perf_counter() - start,
    }
    _print(report, row)
    report.write([row])
    return 0


def _file_name(text: str) -> str:
    """Return `text` with every character except letters, digits, dots and dashes replaced by an underscore."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text).strip("_.")


def _print(report: Report, row: Row) -> None:
    batch, *shape = row["input"]
    report.say(f"{row['file']}: {row['bytes'] / 2**20:.1f} MiB, input [{batch}, {', '.join(map(str, shape))}]")
    report.say(f"{row['model']}, r={row['r']}, {row['flops_ratio']:.2f}x fewer FLOPs, {row['format']}")
    if row["difference"] is None:
        report.say("not verified: run without --no-verify to compare it with the model")
    else:
        report.say(f"verified: its outputs differ from the model's by at most {row['difference']:.1e} of the largest")
