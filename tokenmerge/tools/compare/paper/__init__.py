"""Experiments of the paper: models, lines, published figures, and the runs that these figures belong to."""
