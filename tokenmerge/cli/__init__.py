"""The `tokenmerge` command: one file per command, over the functions of `tokenmerge.tools`."""

from tokenmerge.cli.main import COMMANDS, entry, main

__all__ = ["COMMANDS", "entry", "main"]
