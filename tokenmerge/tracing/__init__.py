"""Pictures of merged tokens. The core imports this only when a picture is asked for."""

from tokenmerge.tracing.paint import VIEWS, View, paint
from tokenmerge.tracing.regions import borders, region_map

__all__ = ["VIEWS", "View", "borders", "paint", "region_map"]
