"""Whether the model is being exported, asked in a way that is right in every supported version of PyTorch."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_exporting() -> bool:
    """Whether `torch.export` or the ONNX exporter traces the model: compiling it is not exporting it.

    In torch 2.11, Dynamo takes `torch.compiler.is_exporting()` for true wherever it compiles. It runs this function
    instead of tracing it, so that the answer is Python's own.
    """
    return torch.compiler.is_exporting()
