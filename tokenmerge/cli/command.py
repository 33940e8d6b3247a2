"""`Command`: one command, its options, and the function that runs it, which are imported when the command is used."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from tokenmerge.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        name: its name.
        summary: what it does, a fragment without a full stop.
        module: module with its options and its function `run`.
        options: name of the dataclass of its options.
        extra: extra of the package that installs everything that it needs.
        example: a command line, for its help page.
        plugins: whether it takes `--plugin`.
        code: function from options and result rows to the exit code.
    """

    name: str
    summary: str
    module: str
    options: str
    extra: str
    example: str
    plugins: bool = True
    code: Callable[[Any, Sequence[dict[str, Any]]], int] = lambda options, rows: 0

    def load(self, words: Sequence[str] = ()) -> tuple[type[Any], Callable[..., Any]]:
        """Return the class of the options and the function that runs the command.

        Args:
            words: words of the command line, which tell what else is needed.

        Raises:
            InputError: if a package is missing; it names the extra that holds all that the command needs.
        """
        try:
            for package in [_PACKAGE_OF[extra] for extra in _extras(self, words) if extra in _PACKAGE_OF]:
                if importlib.util.find_spec(package) is None:
                    raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            module = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise missing(error, self, words) from None
        return getattr(module, self.options), module.run


PACKAGES = {"PIL": "Pillow", "av": "PyAV", "sklearn": "scikit-learn", "yaml": "PyYAML"}
"""Names of packages whose modules have other names."""
_PACKAGE_OF = {
    "transformers": "transformers",
    "torchvision": "torchvision",
    "open_clip": "open_clip",
    "train": "accelerate",
    "search": "optuna",
    "explore": "uvicorn",
    "demo": "sklearn",
}
"""A package that tells whether an extra is installed; all that are missing are named at once."""
_LIBRARIES = {"hf": "transformers", "torchvision": "torchvision", "open_clip": "open_clip"}
"""Extra that a prefix of MODEL needs beside the command's own."""


def missing(error: ModuleNotFoundError, command: Command, words: Sequence[str] = ()) -> InputError:
    """Return the sentence for a package that is not installed.

    Raises:
        ModuleNotFoundError: if the module is one of this package, which is a fault of ours.
    """
    root = str(error.name).split(".")[0]
    if root == "tokenmerge":
        raise error
    name = PACKAGES.get(root, root)
    return InputError(
        f"{name} is not installed, but tokenmerge {command.name} needs it: pip install 'tokenmerge[{','.join(_extras(command, words))}]'"
    )


def _extras(command: Command, words: Sequence[str]) -> list[str]:
    """Return the extras that hold all that a command line needs."""
    library = next((_LIBRARIES[word.partition(":")[0]] for word in words if _names_library(word)), None)
    if library is None:
        return [command.extra]
    return [library] if command.extra == "timm" else [command.extra, library]  # the extra of a library holds timm's


def _names_library(word: str) -> bool:
    prefix, colon, _ = word.partition(":")
    return bool(colon) and prefix in _LIBRARIES
