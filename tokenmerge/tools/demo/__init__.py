"""`tokenmerge demo`: the main job with nothing but the installed package."""
