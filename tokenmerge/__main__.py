"""`python -m tokenmerge`."""

from tokenmerge.cli import entry

entry()
