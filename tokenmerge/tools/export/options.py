"""Options of `tokenmerge export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tokenmerge.tools.common import DeviceOptions, MergeOptions, PageOptions, batch_size
from tokenmerge.tools.options import OptionError, option

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(DeviceOptions, MergeOptions, PageOptions):
    """Options of `tokenmerge export`.

    Attributes:
        format: "onnx" (ONNX, opset `opset`), "pt2" (torch.export) or "aoti" (compiled by AOTInductor for this processor).
        output: file to write; `None` is a name made of the model and r, in the current folder.
        batch_size: the only batch size that the file accepts; `None` accepts any.
        opset: ONNX operator set.
        no_verify: whether not to run the file and compare its outputs with the model before it gets its final name.
        tune_schedule: whether to measure files with other schedules and without merging first, and to keep the fastest one.
    """

    tune_schedule: bool = option(
        False, "measure files that merge in fewer blocks or not at all, and keep the fastest", "measuring"
    )
    batch_size: int | None = batch_size(None, "the only batch size to support (default: any)")
    format: str = option("onnx", "file format", "output", choices=tuple(SUFFIXES))
    output: Path | None = option(
        None, "file to write (default: MODEL_rR in this folder)", "output", "--output", "-o", metavar="FILE"
    )
    opset: int = option(18, "ONNX opset version", "output", least=18, most=99, metavar="N", rare=True)
    no_verify: bool = option(False, "do not run the file to compare it with the model", "output", rare=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.r) > 1:
            raise OptionError("r", f"{' '.join(map(str, self.r))!r:.60} was given, but one file holds one schedule")
