"""Custom matchers and methods, from Python files and from the entry points of installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from tokenmerge.errors import InputError

GROUP = "tokenmerge.plugins"
"""Group of entry points that are imported before a command runs."""


def load_plugins(files: Iterable[Path]) -> None:
    """Run every file, and import every installed package that has an entry point in the group `tokenmerge.plugins`.

    Raises:
        InputError: if a plugin cannot be read, or raises an exception.
    """
    for file in files:
        spec = importlib.util.spec_from_file_location(f"tokenmerge_plugin_{file.stem}", file)
        if spec is None or spec.loader is None:
            raise InputError(f"--plugin {str(file)!r} is no Python file: give one that ends in .py")
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except (Exception, SystemExit) as error:
            raise InputError(
                f"--plugin {str(file)!r} failed ({type(error).__name__}: {error}): run it with python to see where"
            ) from None
    for point in entry_points(group=GROUP):
        try:
            point.load()
        except (Exception, SystemExit) as error:
            raise InputError(
                f"the plugin {point.name!r} of an installed package failed ({type(error).__name__}: {error}): "
                "update or uninstall that package"
            ) from None
