"""The commands. The core does not import this package."""
