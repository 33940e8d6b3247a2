"""`tokenmerge eval`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="eval",
    summary="measure top-1, top-5 and images per second for each r",
    module="tokenmerge.tools.eval",
    options="EvalOptions",
    extra="timm",
    example="tokenmerge eval local-dir:digits/model --data digits/val --r 0 8 16",
    code=lambda options, rows: 1 if options.strict and rows[0]["skipped"] else 0,
)
