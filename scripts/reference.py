"""Extension of griffe for the API reference, which fits our docstrings and dataclasses to what mkdocstrings can show.

griffe reads source code without running it. A setting of `MergeConfig` is a call `setting(default, help, …)`, of which it cannot
know the default and the text; they become the signature and the section "Attributes" of the class. The description of a
dict of texts lists its entries. A section "Example" is shown as "Examples", the only name that griffe has for code.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe


def _text(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


class Reference(griffe.Extension):
    """Completes docstrings and default values before pages are made of them."""

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, dict[str, str]] = {}

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any
    ) -> None:
        """Read the default and the text of a setting, and list the entries of a dict of texts."""
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "setting":
            assert isinstance(attr.value, griffe.ExprCall)
            assert attr.parent is not None
            attr.value = attr.value.arguments[0]
            self._settings.setdefault(attr.parent.path, {})[attr.name] = ast.literal_eval(value.args[1])
        elif isinstance(value, ast.Dict) and attr.docstring is not None:
            try:
                entries = ast.literal_eval(value)
            except ValueError:
                return
            if all(isinstance(entry, str) for entry in entries.values()):
                lines = [f"- `{key}`: {entry}" for key, entry in entries.items()]
                attr.docstring.value += "\n\n" + "\n".join(lines)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Add the settings of a class to its docstring, and their choices to its signature."""
        settings = self._settings.get(cls.path)
        if settings and cls.docstring is not None:
            lines = [f"    {name}: {_text(text)}" for name, text in settings.items()]
            cls.docstring.value += "\n\n" + "\n".join(["Attributes:", *lines])
            for name in settings:
                attr = cls.members[name]
                alias = cls.module.members.get(str(getattr(attr, "annotation", "")))
                if isinstance(attr, griffe.Attribute) and isinstance(alias, griffe.Attribute):
                    attr.annotation = alias.value

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename a section "Example"."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rename it in the docstring of the package, too."""
        self.on_object(obj=pkg)
