"""`tokenmerge export`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="export",
    summary="write the merged model as one file for ONNX Runtime or PyTorch",
    module="tokenmerge.tools.export",
    options="ExportOptions",
    extra="export",
    example="tokenmerge export local-dir:digits/model --r 16 --output digits.onnx",
)
