"""Load, patch, export and verify a model."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch

import tokenmerge
from tokenmerge.errors import InputError
from tokenmerge.files import check_writable
from tokenmerge.patching import patch
from tokenmerge.tools.device import place
from tokenmerge.tools.export.files import RUNNERS, export_model
from tokenmerge.tools.export.options import SUFFIXES, ExportOptions
from tokenmerge.tools.export.tune_file import tune_file
from tokenmerge.tools.models import input_shape, load_model
from tokenmerge.tools.report import Report, Row
from tokenmerge.tools.saved import merging_of


def run(options: ExportOptions, report: Report | None = None) -> list[Row]:
    """Load, patch, export and verify a model, print and write one row, and return it.

    Args:
        options: what to export.
        report: receiver of the results; `None` prints them.

    Raises:
        InputError: if the model cannot be exported, or the file cannot be written or run.
    """
    report = report or Report(options.json, options.html, writes=True)
    (setting,), fields = merging_of(options, report.say)
    path = options.output or Path(
        f"{_file_name(options.model)}_r{_file_name(str(setting.label))}{SUFFIXES[options.format]}"
    )
    if path.suffix != SUFFIXES[options.format]:
        raise InputError(
            f"--output {str(path)!r} should end in {SUFFIXES[options.format]} for --format {options.format}: rename it"
        )
    check_writable(path, "--output", f"model{SUFFIXES[options.format]}")
    model = load_model(options)
    shape = input_shape(model)
    config = setting.config(**{**fields, "backend": "torch"})  # Triton kernels cannot be exported
    handle = None if setting.is_baseline else patch(model, config)
    images = torch.zeros(options.batch_size or 2, *shape)
    images = place(images, options.device, options.dtype, options.channels_last)
    tuned, asked = None, config
    if options.tune_schedule:
        if handle is None:
            raise InputError(
                "--tune-schedule was given with r=0, which merges nothing: give another r, or leave it out"
            )
        unverified = dataclasses.replace(options, no_verify=True)

        def write(file: Path) -> None:
            export_model(model, images, unverified, file, {})

        batch = images[: options.batch_size or 1]
        tuned = tune_file(model, handle, batch, path.suffix, write, RUNNERS[options.format])
        config = handle.config
        report.say(tuned)
    about = {
        "model": options.model,
        "config": json.loads(config.to_json()),
        "tokenmerge": tokenmerge.__version__,
        "torch": torch.__version__,
        "input": ["batch" if options.batch_size is None else options.batch_size, *shape],
    }
    start = time.perf_counter()
    written = export_model(model, images, options, path, about)
    row: Row = {
        **about,
        "r": setting.label if tuned is None or handle is None or handle.config == asked else handle.config.r,
        "format": options.format,
        "opset": options.opset if options.format == "onnx" else None,
        "file": str(path),
        "bytes": written.bytes,
        "difference": written.difference,
        "tuned": tuned,
        "flops_ratio": 1.0 if handle is None else handle.summary().flops_ratio,
        "seconds": time.perf_counter() - start,
    }
    _print(report, row)
    report.write([row])
    return [row]


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
