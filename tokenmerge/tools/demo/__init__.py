"""`tokenmerge demo`: token merging on a model and images that ship with the package."""
