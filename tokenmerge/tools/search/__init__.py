"""`tokenmerge search`: search for the most accurate setting of a model at a measured speed-up."""
