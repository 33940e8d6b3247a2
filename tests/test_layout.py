"""The shape of the package: imports point downward, files are one room each, a pass visits few, a field stands in one place."""

from __future__ import annotations

import ast
import functools
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmerge
from tests.helpers.tiny import images_for, tiny
from tests.helpers.towers import BY_NAME
from tokenmerge.config import CHOICES, FIELDS, choices_of, help_of
from tokenmerge.ops import native

PACKAGE = Path(tokenmerge.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def _module(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(file): file for file in FILES}


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, also inside functions and for type checkers."""
    found: set[str] = set()
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return {name for name in found if name in MODULES and MODULES[name] != file}


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {name: _imports(file) for name, file in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_the_core_knows_no_tools() -> None:
    for name, file in MODULES.items():
        if not name.startswith(("tokenmerge.tools", "tokenmerge.cli", "tokenmerge.__main__")):
            assert not any(other.startswith(("tokenmerge.tools", "tokenmerge.cli")) for other in _imports(file)), name


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(file): count for file in FILES if (count := len(file.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


MODELS: dict[str, Any] = {
    "timm": lambda: tiny("vit_tiny_patch16_224"),
    "timm, average": lambda: tiny("vit_base_patch16_siglip_gap_224"),
    "transformers": lambda: BY_NAME["ViTModel"].build(),
}


@torch.inference_mode()
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_one_blocks_pass_visits_at_most_six_files(make: Any) -> None:
    """Files of the package whose functions run between a block's first line and its last.

    Without a C compiler four more: matching, merging and the choice of their backend, in operators, in place of one call.
    """
    model = make()
    images = images_for(model) if hasattr(model, "patch_embed") else torch.randn(2, 3, 96, 96)
    tokenmerge.patch(model, r=4)
    blocks = [module for module in model.modules() if hasattr(module, "_tokenmerge") and "Merge" in module._get_name()]
    block: Any = blocks[1]  # sizes are no longer 1 there, and it is not the last, which may spread tokens again
    model(images)
    visited: dict[str, int] = defaultdict(int)

    def note(frame: Any, event: str, arg: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            visited[path[len(str(PACKAGE)) + 1 :]] += 1

    block.register_forward_pre_hook(lambda *_: sys.setprofile(note))
    block.register_forward_hook(lambda *_: sys.setprofile(None), always_call=True)
    model(images)
    assert "patching/block.py" in visited
    assert len(visited) <= (6 if native.refusal() is None else 10), dict(visited)


def _names_fields(file: Path) -> set[str]:
    """Fields of `MergeConfig` that a file reads off a config: `config.combine`, `settings.config.combine`."""
    found = set()
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Attribute) and node.attr in FIELDS:
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name in ("config", "usual"):
                found.add(node.attr)
    return found


def test_a_field_is_named_in_at_most_three_files() -> None:
    """Where it is written, and where it is obeyed; choices, flags, errors, summaries and pages read the first."""
    places: dict[str, set[str]] = {name: {"config.py"} for name in FIELDS}
    for file in FILES:
        for name in _names_fields(file):
            places[name].add(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in places.items() if len(files) > 3} == {}


def test_choices_stand_in_one_file() -> None:
    """The list of what a field may be is written once: nobody spells it again."""
    for name in CHOICES:
        choices = {choice for choice in choices_of(name) if isinstance(choice, str)}
        if len(choices) < 3:
            continue
        for file in FILES:
            if file.name == "config.py":
                continue
            for node in ast.walk(_tree(file)):
                if isinstance(node, ast.Tuple | ast.List | ast.Set):
                    listed = {part.value for part in node.elts if isinstance(part, ast.Constant)}
                    assert not choices <= listed, f"{file}:{node.lineno} lists the choices of {name} again"
    assert all(help_of(name) for name in FIELDS)


def test_the_help_of_settings_is_made_from_fields() -> None:
    from tokenmerge.cli.help import settings

    text = " ".join(settings().split())
    for name in FIELDS:
        if FIELDS[name].metadata["group"] in ("matching", "running") and choices_of(name):
            assert f" {name} " in text
            assert " ".join(help_of(name).split())[:40] in text
