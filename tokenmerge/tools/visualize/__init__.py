"""`tokenmerge visualize`: show merged tokens as pictures, films and interactive pages."""

from tokenmerge.tools.visualize.main import run
from tokenmerge.tools.visualize.options import VisualizeOptions

__all__ = ["VisualizeOptions", "run"]
