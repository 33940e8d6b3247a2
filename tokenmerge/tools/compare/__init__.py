"""`tokenmerge compare`: compare methods and settings by accuracy, KL divergence and measured speed."""
