"""Models that no library has, built from timm's parts."""

import importlib


def register() -> None:
    """Register the models in timm, so that `timm.create_model` makes them and loads folders that hold them."""
    importlib.import_module("tokenmerge.models.video_mae")
