"""`tokenmerge inspect`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="inspect",
    summary="check whether a model is supported; tokens and FLOPs per block",
    module="tokenmerge.tools.inspect",
    options="InspectOptions",
    extra="timm",
    example="tokenmerge inspect vit_base_patch16_224 --r 16",
    code=lambda options, rows: 0 if all(row["supported"] for row in rows) else 2,
)
