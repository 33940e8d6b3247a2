"""`tokenmerge train`: train or fine-tune a model with merging."""

from tokenmerge.tools.train.main import run
from tokenmerge.tools.train.options import TrainOptions

__all__ = ["TrainOptions", "run"]
