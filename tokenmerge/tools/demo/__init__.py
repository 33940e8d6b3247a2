"""`tokenmerge demo`: token merging on a model and images that ship with the package."""

from tokenmerge.tools.demo.main import run
from tokenmerge.tools.demo.options import DemoOptions

__all__ = ["DemoOptions", "run"]
