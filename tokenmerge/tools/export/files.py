"""`tokenmerge export`: write the merged model as one file for ONNX Runtime, torch.export or AOTInductor.

Before the file gets its final name, it is run on batch sizes that it was not exported with, and its outputs are compared
with the model's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tokenmerge import files
from tokenmerge.errors import InputError, TokenMergeError
from tokenmerge.tools.export.options import ExportOptions
from tokenmerge.tools.packages import needed


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
METADATA = "tokenmerge.json"
"""Name of the JSON description inside a .pt2 file, and its key in the metadata of an .onnx file."""


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


def _write_pt2(model: nn.Module, images: Tensor, options: ExportOptions, about: str, path: Path) -> None:
    program = _program(model, images, options.batch_size is None)
    packed = io.BytesIO()  # torch's own writer of files ends the whole process if the disk is full
    torch.export.save(program, packed, extra_files={METADATA: about})
    path.write_bytes(packed.getbuffer())


def _run_pt2(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: _tensors(module(images))


def _write_aoti(model: nn.Module, images: Tensor, options: ExportOptions, about: str, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    program = _program(model, images, options.batch_size is None)
    packed = io.BytesIO()  # as above
    aoti_compile_and_package(
        program, package_path=packed, inductor_configs={"aot_inductor.metadata": {METADATA: about}}
    )
    path.write_bytes(packed.getbuffer())


def _run_aoti(path: Path) -> Run:
    from torch._inductor import aoti_load_package

    module = aoti_load_package(str(path))
    return lambda images: _tensors(module(images))


def _write_onnx(model: nn.Module, images: Tensor, options: ExportOptions, about: str, path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        _needs(name)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if options.batch_size is None else None
    program = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=shapes, opset_version=options.opset, verbose=False
    )
    assert program is not None
    program.model.metadata_props[METADATA] = about
    program.save(str(path))


def _run_onnx(path: Path) -> Run:
    session = _needs("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {name: images.cpu().numpy()})]


_WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "aoti": _write_aoti}
RUNNERS = {"onnx": _run_onnx, "pt2": _run_pt2, "aoti": _run_aoti}


def _needs(module: str) -> Any:
    return needed(module, "exporting to ONNX needs it", "export")


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output, in order."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def export_model(
    model: nn.Module, images: Tensor, options: ExportOptions, path: Path, about: dict[str, Any]
) -> Written:
    """Write a patched model; the file appears under its name only when it is complete and verified.

    Args:
        model: the patched model, in evaluation mode.
        images: an example batch, of at least 2 inputs unless `options.batch_size` is 1.
        options: format and options.
        path: the file to write.
        about: description of the model, stored in the file as JSON.

    Returns:
        The measured difference and the size of the file.

    Raises:
        InputError: if a package is missing, the exporter fails, the file cannot be written or run, or its outputs differ.
    """
    if options.format == "onnx" and not options.no_verify:
        _needs("onnxruntime")  # fail now, not after minutes of exporting
        if images.dtype == torch.bfloat16:
            raise InputError(
                "ONNX Runtime does not compute bfloat16 on a CPU, so the file cannot be verified: export float32 or "
                "float16, or give --no-verify"
            )
    with files.replacing(path, "the exported model") as new:
        _write(model, images, options, json.dumps(about), new)
        difference = _verify(model, images, options, new) if not options.no_verify else None
        # large ONNX models have a separate file of weights
        return Written(difference, sum(part.stat().st_size for part in new.parent.iterdir()))


def _write(model: nn.Module, images: Tensor, options: ExportOptions, about: str, path: Path) -> None:
    """Run the exporter of the format; anything that it raises becomes an `InputError`, except errors of the file system."""
    try:
        with torch.no_grad(), _quiet():
            _WRITERS[options.format](model, images, options, about, path)
    except (TokenMergeError, MemoryError, torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:  # every exporter raises its own exception types
        if (own := _own_error(error)) is not None:
            raise own from None
        raise InputError(
            f"the model cannot be exported as {options.format} ({type(error).__name__}: {files.words_of(error)}): "
            "try another --format, or another version of torch"
        ) from None


def _own_error(error: BaseException | None) -> TokenMergeError | None:
    """Return the error of this library that an exporter has wrapped in its own, or `None`."""
    while error is not None and not isinstance(error, TokenMergeError):
        error = error.__cause__ or error.__context__
    return error


def _verify(model: nn.Module, images: Tensor, options: ExportOptions, path: Path) -> float:
    """Return the largest relative difference between the file and the model, on random inputs.

    Without a fixed batch size, it is taken over batches of 1, of the example's size, and of one more.
    """
    try:
        with _quiet():
            run = RUNNERS[options.format](path)
    except TokenMergeError:
        raise
    except Exception as error:  # every runtime raises its own exception types
        raise InputError(_cannot_run(options.format, error)) from None
    tolerance = 1e-4 if images.dtype == torch.float32 else 3e-2
    batches = [options.batch_size] if options.batch_size else [1, images.shape[0], images.shape[0] + 1]
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
                raise InputError(_cannot_run(options.format, error)) from None
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
    return (
        f"the {format} file was written but cannot be run here ({type(error).__name__}: {files.words_of(error)}), so it was not "
        "kept: try another --dtype, --opset or --format, or --no-verify"
    )
