"""`tokenmerge export`: write the merged model as one file."""

from tokenmerge.tools.export.main import run
from tokenmerge.tools.export.options import ExportOptions

__all__ = ["ExportOptions", "run"]
