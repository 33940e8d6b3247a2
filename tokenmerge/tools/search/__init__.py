"""`tokenmerge search`: search for the most accurate setting at a measured speed-up."""

from tokenmerge.tools.search.main import run
from tokenmerge.tools.search.options import SearchOptions

__all__ = ["SearchOptions", "run"]
