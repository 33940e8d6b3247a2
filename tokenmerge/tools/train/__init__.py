"""`tokenmerge train`: timm's data pipeline, optimizers and schedules, Accelerate's distribution, merging inside."""
