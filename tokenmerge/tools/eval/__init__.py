"""`tokenmerge eval`: measure top-1, top-5 and images per second for several r in one pass over the data."""

from tokenmerge.tools.eval.main import run
from tokenmerge.tools.eval.options import EvalOptions

__all__ = ["EvalOptions", "run"]
