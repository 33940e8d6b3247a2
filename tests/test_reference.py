"""The API reference: every public name is on one of its pages, once, and a name that does not exist stops the build."""

from __future__ import annotations

import functools
import html
import importlib
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import tokenmerge
from tokenmerge import matching, methods
from tokenmerge.config import FIELDS, help_of

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))


def found(path: str) -> Any:
    """The object of a dotted path, through modules and their attributes."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[end:], module)
    raise ModuleNotFoundError(path)


def listed() -> Iterator[tuple[str, str]]:
    """Page and path of each name in the reference."""
    for page in PAGES:
        for path in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE):
            yield page.name, path


def names_of(module: ModuleType) -> list[str]:
    """Public names of a module: its `__all__`, or what it defines itself."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    assigned = re.findall(r"^([A-Z]\w*) = ", inspect.getsource(module), re.MULTILINE)
    return [name for name in (*own, *assigned) if not name.startswith("_")]


def advised() -> Iterator[str]:
    """Paths that docs/extend.md tells people to import or call."""
    text = (ROOT / "docs" / "extend.md").read_text("utf-8")
    for module, names in re.findall(r"^from (tokenmerge\S*) import (.+)$", text, re.MULTILINE):
        yield from (f"{module}.{name.strip()}" for name in names.split(","))
    for path in re.findall(r"\btokenmerge(?:\.\w+)+", text):
        where, _, name = path.rpartition(".")  # not methods such as `OFFERED.items`, nor `tokenmerge.plugins`, a group
        module = sys.modules.get(where)
        if module is not None and not isinstance(getattr(module, name, module), ModuleType):
            yield path
    for helper in re.findall(r"`(\w+)`", text):  # such as `lowest`, of modules that the page names
        for module in ("tokenmerge.matching.joining", "tokenmerge.matching.values"):
            if helper in names_of(importlib.import_module(module)):
                yield f"{module}.{helper}"


PUBLIC = sorted(
    {f"{module.__name__}.{name}" for module in (tokenmerge, matching, methods) for name in names_of(module)}
    | set(advised())
    | {f"tokenmerge.matching.joining.{name}" for name in names_of(matching.joining)}
)


def test_public_names_are_collected_from_all_places() -> None:
    assert {
        "tokenmerge.patch",
        "tokenmerge.methods.Kind",
        "tokenmerge.matching.OFFERED",
        "tokenmerge.matching.joining.drop",
        "tokenmerge.matching.values.PerBlock",
    } <= set(PUBLIC)


def test_every_public_name_is_on_exactly_one_page() -> None:
    """A name that two modules have, such as `bipartite_matching`, is one name: objects are compared."""
    places: dict[int, list[str]] = defaultdict(list)
    for page, path in listed():
        places[id(found(path))].append(f"{page}: {path}")
    missing = [path for path in PUBLIC if id(found(path)) not in places]
    assert not missing, f"not in docs/reference: {missing}"
    twice = [where for where in places.values() if len(where) > 1]
    assert not twice, f"listed twice: {twice}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert [page.name for page in PAGES if f"reference/{page.name}" not in navigation] == []


def build(folder: Path, **pages: str) -> tuple[int, str]:
    """Exit status and output of a strict build of some pages with the configuration of the site."""
    (folder / "docs").mkdir()
    for name, text in pages.items():
        (folder / "docs" / f"{name}.md").write_text(text, "utf-8")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    python = config["plugins"][1]["mkdocstrings"]["handlers"]["python"]
    python["paths"] = [str(ROOT)]
    python["options"]["extensions"] = [str(ROOT / "scripts" / "reference.py")]
    config |= {"docs_dir": str(folder / "docs"), "site_dir": str(folder / "site"), "extra_css": []}
    config["nav"] = [f"{name}.md" for name in pages]
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config), "utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(folder / "mkdocs.yml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_strict_build_fails_for_an_unknown_name(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    code, output = build(tmp_path, index="# A page\n\n::: tokenmerge.no_such_name\n")
    assert code != 0
    assert "no_such_name" in output


def test_settings_show_defaults_choices_and_texts(tmp_path: Path) -> None:
    """griffe cannot run `setting(…)`; the extension in scripts/reference.py reads it."""
    pytest.importorskip("mkdocstrings")
    text = "::: tokenmerge.MergeConfig\n    options: {merge_init_into_class: true}\n\n::: tokenmerge.matching.OFFERED\n"
    code, output = build(tmp_path, index=f"# A page\n\n{text}")
    assert code == 0, output
    page = html.unescape(re.sub(r"<[^>]*>", "", (tmp_path / "site" / "index.html").read_text("utf-8")))
    page = re.sub(r"\s+", " ", page.replace('"', ""))
    for name in FIELDS:
        start = help_of(name).split(":")[0].split(";")[0][1:40]
        assert re.search(rf"\b{name} \( ?.{{1,200}}?\) – .{re.escape(start)}", page), name
    assert "setting(" not in page
    assert re.search(r"partition: Literal\[ ?alternating, sequential, random, checkerboard ?\] = alternating", page)
    assert "patches per token, [B, N] float32" in page
    assert ">>> import tokenmerge" in page
    assert "Examples:" in page
