"""`tokenmerge search`: the best setting for a model, by distortion or accuracy at speed measured here."""
