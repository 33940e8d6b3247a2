"""`tokenmerge compare`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="compare",
    summary="compare methods and settings: accuracy with confidence intervals, and speed",
    module="tokenmerge.tools.compare",
    options="CompareOptions",
    extra="compare",
    example="tokenmerge compare local-dir:digits/model --data digits/val --r 16",
)
