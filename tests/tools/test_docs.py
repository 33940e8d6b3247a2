"""What README.md and docs/ say is run."""

from __future__ import annotations

import glob
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tokenmerge
from tokenmerge import methods
from tokenmerge.cli import main
from tokenmerge.cli.main import COMMANDS as CLI
from tokenmerge.cli.main import _recipes
from tokenmerge.cli.parsing import parse
from tokenmerge.matching import registry
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
# pages that lead a reader from step to step, with the digits that `tokenmerge demo --export digits` writes
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
INDEX = ROOT / "docs" / "index.md"


def steps(page: Path) -> list[tuple[str, str, str]]:
    """Blocks of a page in order: the language, the name of the file that a reader saves it as (or ""), the text."""
    pattern = r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```'
    return re.findall(pattern, page.read_text(), re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, _, text in steps(page) if found == language]


def words(line: str) -> list[str]:
    """What a shell makes of a line; of files that a pattern names, three are enough."""
    parts = shlex.split(line, comments=True)[1:]
    return [word for part in parts for word in (sorted(glob.glob(part))[:3] or [part])]


def is_made(page: Path) -> bool:
    """Whether a script writes the page, or it is made from docstrings, whose examples are tested where they stand."""
    text = page.read_text()
    return "<!-- written by scripts/" in text or re.search(r"^::: ", text, re.MULTILINE) is not None


class Reader:
    """Somebody in an empty folder who follows a page from top to bottom."""

    def __init__(self, page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.page, self.folder, self.monkeypatch = page, folder, monkeypatch
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.registries = dict(registry._MATCHERS), dict(methods._METHODS)
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)

    def python(self, file: str, text: str) -> None:
        """Run a block, or save it if it has the name of a file, to be imported or given to a command later."""
        if not file:
            exec(compile(text, str(self.page), "exec"), self.names)
            return
        (self.folder / file).write_text(text)
        self.monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
        importlib.invalidate_caches()

    def command(self, line: str) -> None:
        """Run a command, which does not know what the page's Python registered, because it is another process."""
        matchers, named = self.registries
        with self.monkeypatch.context() as fresh:
            fresh.setattr(registry, "_MATCHERS", dict(matchers))
            fresh.setattr(methods, "_METHODS", dict(named))
            assert main(words(line)) == 0, line


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GUIDES], ids=lambda page: page.name)
def test_python_blocks_run_in_order(
    page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of guides run between their commands, in a test below."""
    if page == INDEX:
        request.getfixturevalue("digits")
    reader = Reader(page, tmp_path, monkeypatch)
    code = [(file, text) for language, file, text in steps(page) if language == "python"]
    assert code or is_made(page)
    for file, text in code:
        reader.python(file, text)


def lines_of(block: str) -> list[str]:
    """Lines that start the command, without what is said beside them; a line that ends in a backslash goes on in the next."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(line.split(" #")[0].split()) for line in lines if line.startswith("tokenmerge ")]


SMALL = {"moving_digits.py": "--train 6 --val 2", "sound_events.py": "--val 12"}
"""Of the data that an example writes, as few as the commands take."""
BRIEF = "--epochs 1 --warmup-epochs 0 --epoch-size 16"
"""Training on such data is not waited for."""


def examples(block: str) -> list[str]:
    """Lines that run an example to write data."""
    return [line for line in block.splitlines() if line.startswith("python examples/")]


def run_example(line: str, folder: Path) -> None:
    """Run an example as its line says, but for fewer files."""
    _, script, *rest = shlex.split(line)
    few = SMALL[Path(script).name].split()
    subprocess.run([sys.executable, str(ROOT / script), *rest, *few], cwd=folder, check=True, capture_output=True)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in lines_of(block)]


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


def test_every_command_has_a_page_that_runs() -> None:
    """Which the test above runs line by line; `explore` alone would serve for ever."""
    assert {page.stem for page in COMMANDS} == set(CLI)
    for page in COMMANDS:
        assert page.stem == "explore" or page.stem in {line.split()[1] for line in commands(page)}


def test_the_readme_is_short() -> None:
    """Prose, without code and tables."""
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert 300 < len(" ".join(prose).split()) < 900


def test_the_readme_counts_what_the_models_page_lists() -> None:
    """Whose tables a script writes."""
    page = (ROOT / "docs" / "models.md").read_text()
    timm, transformers, rest = (part.split("\n## ")[0] for part in re.split(r"^## \w+$", page, flags=re.MULTILINE)[1:4])
    patched, flat = re.findall(r"\d+", timm)[:2]
    towers = len(re.findall(r"^\| `", transformers, re.MULTILINE))
    names = len(re.findall(r"`vit_\w+`", rest))
    counts = "\n".join(re.findall(r"^\|.*\| ([^|]*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert f"{patched} of {flat} names" in counts
    assert sum(int(number) for number in re.findall(r"(\d+) towers", counts)) == towers
    assert f"{names} names\n" in counts


@pytest.mark.parametrize(
    "page", [*GUIDES, INDEX, INDEX.with_name("faq.md"), INDEX.with_name("how-it-works.md")], ids=lambda page: page.name
)
def test_code_fits_its_column(page: Path) -> None:
    """A browser 1,280 pixels wide cuts longer lines."""
    assert not [line for _, _, text in steps(page) for line in text.splitlines() if len(line) > 78]


def test_the_first_pages_show_the_same_commands() -> None:
    """README.md and the first page of the site, whose commands the next test runs."""
    first = commands(ROOT / "README.md")
    assert {"demo", "inspect", "bench", "eval"} == {line.split()[1] for line in first}
    assert commands(INDEX)
    assert set(commands(INDEX)) <= set(first)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_run_from_top_to_bottom(page: Path, digits: Path, brief: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and commands in turns, because each uses what the other wrote.

    A line that a page of a command has runs there, unless it writes what later steps need.
    """
    elsewhere = {line for other in COMMANDS for line in commands(other) if line.split()[1] not in ("search", "train")}
    assert blocks(page, "python")
    reader = Reader(page, digits, monkeypatch)
    for language, file, text in steps(page):
        if language == "python":
            reader.python(file, text)
        elif language == "sh":
            for line in examples(text):
                run_example(line, digits)
            for line in lines_of(text):
                if line not in elsewhere:
                    reader.command(re.sub(r"--epochs \d+ --warmup-epochs \d+", BRIEF, line))


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


def not_run(page: Path) -> list[str]:
    """Command lines in blocks that do not run here, because they need a GPU, ImageNet, other processes or a server for ever."""
    text = "\n".join(blocks(page, "text")).replace("\\\n", " ")
    lines = re.findall(r"^(?:\$ |torchrun .*|accelerate .*)?-?m?\s*(?:-- )?(tokenmerge [a-z].*)$", text, re.MULTILINE)
    return [" ".join(line.split(" #")[0].split()) for line in lines if "…" not in line]


@pytest.mark.parametrize("page", [page for page in PAGES if not_run(page)], ids=lambda page: page.name)
def test_commands_that_cannot_run_here_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their flags exist and their values fit; placeholders such as DIR are folders and names of models."""
    monkeypatch.chdir(tmp_path)
    for name in ("DIR/val", "imagenet/val", "digits/val", "hf:models/vit", "photos"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for line in not_run(page):
        name, *rest = words(line)
        command = CLI[name]
        parse(command, command.load(rest)[0], rest, _recipes(command))
