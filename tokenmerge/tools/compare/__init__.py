"""`tokenmerge compare`: compare methods and settings by accuracy, KL divergence and measured speed."""

from tokenmerge.tools.compare.main import run
from tokenmerge.tools.compare.options import CompareOptions

__all__ = ["CompareOptions", "run"]
