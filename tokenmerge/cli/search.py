"""`tokenmerge search`."""

from tokenmerge.cli.command import Command

COMMAND = Command(
    name="search",
    summary="search for the most accurate setting at a measured speed-up",
    module="tokenmerge.tools.search",
    options="SearchOptions",
    extra="search",
    example="tokenmerge search local-dir:digits/model --data digits/train --speedup 1.5",
    plugins=False,
)
