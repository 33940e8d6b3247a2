"""`tokenmerge explore`: serve the interactive page of `visualize`."""

from tokenmerge.tools.explore.main import run
from tokenmerge.tools.explore.options import ExploreOptions

__all__ = ["ExploreOptions", "run"]
