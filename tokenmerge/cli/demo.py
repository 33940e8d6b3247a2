"""`tokenmerge demo`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="demo",
    summary="merge tokens of a model and images that ship with the package",
    module="tokenmerge.tools.demo",
    options="DemoOptions",
    extra="demo",
    example="tokenmerge demo --r 0 8 16 --export digits",
)
