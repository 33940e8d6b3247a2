"""What README.md and docs/ say is run."""

from __future__ import annotations

import glob
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import tokenmerge
from tokenmerge.cli import main
from tokenmerge.ops import timing
from tokenmerge.tools.bench import break_even
from tokenmerge.tools.bench import measure as bench
from tokenmerge.tools.compare import variants
from tokenmerge.tools.demo import main as demo
from tokenmerge.tools.demo.digits import load_digits
from tokenmerge.tools.demo.export import export_demo
from tokenmerge.tools.search import main as search

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = sorted((ROOT / "docs" / "commands").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def words(line: str) -> list[str]:
    """What a shell makes of a line; of files that a pattern names, three are enough."""
    parts = shlex.split(line, comments=True)[1:]
    return [word for part in parts for word in (sorted(glob.glob(part))[:3] or [part])]


def is_tested_elsewhere(page: Path) -> bool:
    """Whether a page without Python code is a command's, or is made by a script or from docstrings, or has a test of its own."""
    text = page.read_text()
    made = "<!-- written by scripts/" in text or re.search(r"^::: ", text, re.MULTILINE)
    return page in COMMANDS or bool(made) or (Path(__file__).parent / f"test_{page.stem}.py").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    code = blocks(page, "python")
    assert code or is_tested_elsewhere(page) or page.stem == "faq"
    for block in code:
        exec(compile(block, str(page), "exec"), names)


def commands(page: Path) -> list[str]:
    """Lines of a page that start the command, without what is said beside them."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.startswith("tokenmerge ")]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `demo --export` writes; of each class as few images as `search` and `train` take."""
    folder = tmp_path_factory.mktemp("commands") / "digits"
    export_demo(folder)
    for split, kept in (("train", 12), ("val", 8)):
        for images in (folder / split).iterdir():
            for file in sorted(images.iterdir())[kept:]:
                file.unlink()
    return folder


@pytest.fixture
def digits(exported: Path, tmp_path: Path) -> Path:
    """A folder of the page's own in which it finds what it names; one page exports all digits again."""
    shutil.copytree(exported, tmp_path / "digits")
    return tmp_path


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes turns to be measured has one, or none where search looks for what is fast, and the demo has 60 digits.

    What comes out is no measurement, but it comes out.
    """

    def once(calls: Any, device: Any, warmup: int, rounds: int, *rest: Any, **options: Any) -> list[list[float]]:
        return timing.take_turns(calls, device, 0, 1, *rest, **options)

    def never(calls: Any, *_: Any, **__: Any) -> list[list[float]]:
        """As if each took less time than the one before it."""
        return [[1 / (1 + number)] for number, _ in enumerate(calls)]

    for module, turns in ((bench, once), (break_even, once), (variants, never), (search, never)):
        assert module.take_turns is timing.take_turns
        monkeypatch.setattr(module, "take_turns", turns)
    monkeypatch.setattr(demo, "load_digits", lambda: [part[-60:] for part in load_digits()])


def shape_of(line: str) -> str:
    """A line of output without what differs between machines and data: numbers, widths and frames of tables."""
    return " ".join(re.sub(r"[┃│]", " ", re.sub(r"-?\d[\d.,]*(e-\d+)?", "#", line)).split())


def promised(page: Path) -> list[str]:
    """Lines that a page says its first command prints: titles, heads of tables and sentences, not the rows."""
    shown = re.search(r"^```sh\n[^`]*```\n\n```text\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [] if shown is None else shown[1].splitlines()
    return [shape_of(line) for line in lines if not line.startswith(("│", "┏", "┡", "└", "…"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.stem)
def test_every_command_of_the_pages_runs(
    page: Path, digits: Path, brief: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the first one prints what the page shows below it."""
    monkeypatch.chdir(digits)
    lines = commands(page)
    assert lines or page.stem == "explore"  # which would serve for ever
    printed = []
    for line in lines:
        assert main(words(line)) == 0, line
        output = capsys.readouterr()
        printed.append([shape_of(one) for one in (output.out + output.err).splitlines()])
    if lines:
        assert promised(page), "the page shows no output"
        assert [line for line in promised(page) if line not in printed[0]] == []


@pytest.mark.slow
def test_every_command_of_the_readme_runs(digits: Path, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that no page of a command has as well."""
    monkeypatch.chdir(digits)
    lines = commands(ROOT / "README.md")
    names = "demo inspect inspect bench bench export eval visualize compare search train"
    assert [line.split()[1] for line in lines] == names.split()
    assert set(names.split()) == {page.stem for page in COMMANDS} - {"explore"}
    elsewhere = [line for page in COMMANDS for line in commands(page)]
    ours = [line for line in lines if not any(other.startswith(line) for other in elsewhere)]
    assert len(ours) < len(lines)
    for line in ours:
        assert main(words(line)) == 0, line


@pytest.mark.slow
def test_the_notebook_runs(digits: Path) -> None:
    """In a folder that has the digits already; another test runs the command that writes them."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "pictures.ipynb", as_version=4)
    assert "image/png" in str(notebook.cells[0].outputs), "it opens with a picture"
    for cell in notebook.cells:
        cell.outputs = [] if cell.cell_type == "code" else None
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(digits)}}).execute()
    assert "image/png" in str(notebook.cells[0].outputs)
    assert "merged:" in str([cell.get("outputs") for cell in notebook.cells])


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
