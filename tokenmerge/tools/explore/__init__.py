"""`tokenmerge explore`: serve the interactive page of `visualize`, with a live model."""
