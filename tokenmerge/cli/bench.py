"""`tokenmerge bench`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="bench",
    summary="measure speed with and without merging, interleaved in one run",
    module="tokenmerge.tools.bench",
    options="BenchOptions",
    extra="timm",
    example="tokenmerge bench vit_base_patch16_224 --r 8 16",
)
