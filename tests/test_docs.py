"""What README.md and docs/ say is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import tokenmerge
from tokenmerge.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    code = blocks(page, "python")
    assert code
    for block in code:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.slow
def test_every_command_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tokenmerge ")]
    assert [command[0] for command in commands] == [
        "demo",
        "inspect",
        "inspect",
        "bench",
        "bench",
        "export",
        "eval",
        "compare",
        "search",
        "train",
    ]
    for command in commands:
        assert main(command) == 0, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_every_method_and_option_has_its_place_in_the_docs() -> None:
    page = (ROOT / "docs" / "compare.md").read_text()
    for name in tokenmerge.method_names():
        matcher = str(tokenmerge.get_method(name).fields.get("matcher", "bipartite"))
        if not tokenmerge.matching.get_entry(matcher).matcher.__module__.startswith("tokenmerge."):
            continue  # registered by another test's module
        assert f"`{name}`" in page or f'"{name}"' in page, name
    extend = (ROOT / "docs" / "extend.md").read_text()
    for name in tokenmerge.matching.OFFERED:
        assert f"`{name}`" in extend, name
