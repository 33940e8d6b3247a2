"""Traces of merges, and pictures of merged tokens."""

from tokenmerge.tracing.paint import VIEWS, View, paint
from tokenmerge.tracing.regions import borders, region_map

__all__ = ["VIEWS", "View", "borders", "paint", "region_map"]
