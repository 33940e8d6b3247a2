"""`tokenmerge explore`: the page of `visualize`, live, for one's own pictures."""
