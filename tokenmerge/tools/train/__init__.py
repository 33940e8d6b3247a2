"""`tokenmerge train`: train with merging, on timm's data loading and optimizers, distributed by Accelerate."""
