"""Every public name says what it is for, with shapes, errors and sources; examples run; no idiom that strangers stumble over."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmerge
from tokenmerge import methods
from tokenmerge.matching import registry

ROOT = Path(__file__).parents[1]
IDIOMS = re.compile(r"\b(that of|those of all|what is|one of each|shall|what it gives)\b", re.IGNORECASE)
LEGEND = ("B", "N", "N'", "N₀", "r", "C", "H", "D")
SYMBOL = re.compile(r"\[([^\[\]`]+)\]")


def public() -> Iterator[tuple[str, Any]]:
    """Every public name that can have a docstring, and the public methods and properties of public classes."""
    for name in tokenmerge.__all__:
        found = getattr(tokenmerge, name)
        if not (inspect.isclass(found) or callable(found)):
            continue
        yield name, found
        if inspect.isclass(found) and not issubclass(found, Exception):
            for part, value in vars(found).items():
                if not part.startswith("_") and (callable(value) or isinstance(value, property | classmethod)):
                    yield f"{name}.{part}", value


PUBLIC = dict(public())


def documented(thing: Any) -> str:
    thing = thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing)
    return inspect.getdoc(thing) or ""


def parameters(thing: Any) -> list[inspect.Parameter]:
    """What a caller gives, by name."""
    if inspect.isclass(thing) or isinstance(thing, property):
        return []
    thing = getattr(thing, "__func__", thing)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        p for p in inspect.signature(thing).parameters.values() if p.kind in kinds and p.name not in ("self", "cls")
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name: str) -> None:
    """An opening line that ends; every argument by name; a shape for every tensor."""
    text = documented(PUBLIC[name])
    first = text.partition("\n\n")[0]
    assert first, f"{name} has no docstring"
    assert first.rstrip().endswith((".", ":", "`")) or ";" in first, f"{name}: its first line is no sentence: {first}"
    wanted = parameters(PUBLIC[name])
    if len(wanted) > 1:
        for parameter in wanted:
            entry = re.search(rf"^\s+{parameter.name}: .*(\n\s{{8,}}.*)*", text, re.MULTILINE)
            assert entry, f"{name}: {parameter.name} is not described"
            if str(parameter.annotation) in ("Tensor", "torch.Tensor", "Tensor | None"):
                assert "[" in text, f"{name}: {parameter.name} has no shape"


def test_functions_open_with_an_imperative() -> None:
    """Not with what they are."""
    wrong = ("the ", "a ", "an ", "what ", "whether ", "how ", "`", "every ", "which ")
    functions = {
        name: thing for name, thing in PUBLIC.items() if not (inspect.isclass(thing) or isinstance(thing, property))
    }
    assert not [name for name, thing in functions.items() if documented(thing).lower().startswith(wrong)]


def test_shapes_use_the_legend() -> None:
    """One legend in one place, whose letters public shapes are made of."""
    legend = tokenmerge.__doc__ or ""
    for symbol in LEGEND:
        assert re.search(rf"^\| {re.escape(symbol)} \| \S", legend, re.MULTILINE), symbol
    known = re.compile(r"(C'|\d+|\*grid|h|w|t|height|width|[BNCHDLrMKP]|N'|N₀|H·D|\|A\||\|B\|)( (or|−) (\d+|[BNCHr]))*")
    for name, thing in PUBLIC.items():
        for shape in SYMBOL.findall(documented(thing)):
            if shape.startswith("B, "):
                assert all(known.fullmatch(axis.strip()) for axis in shape.split(",")), f"{name}: [{shape}]"


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "name", path.name), ast.get_docstring(node) or ""


def test_no_cryptic_idioms() -> None:
    """In docstrings of the package and in the pages that people read."""
    found = [
        f"{path.relative_to(ROOT)} {name}: {match.group()}"
        for path in sorted((ROOT / "tokenmerge").rglob("*.py"))
        for name, text in _docstrings(path)
        for match in IDIOMS.finditer(text)
    ]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found += [f"{page.name}: {match.group()}" for page in pages for match in IDIOMS.finditer(page.read_text("utf-8"))]
    assert not found, "\n".join(found)


def _modules() -> list[str]:
    """Modules whose docstrings have examples."""
    names = []
    for path in sorted((ROOT / "tokenmerge").rglob("*.py")):
        if any(">>> " in text for _, text in _docstrings(path)):
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", _modules())
def test_examples_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process whose registries are afterwards what they were."""
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
    monkeypatch.setattr(registry, "_MATCHERS", dict(registry._MATCHERS))
    torch.manual_seed(0)
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert tried
    assert not failed


def test_a_dozen_public_names_have_examples() -> None:
    shown = [name for name, thing in PUBLIC.items() if ">>> " in documented(thing)]
    assert len(shown) >= 12, shown
