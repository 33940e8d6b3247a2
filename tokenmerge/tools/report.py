"""Output of the commands: tables of at most 80 columns, JSON rows, HTML pages and progress bars."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from tokenmerge.errors import InputError
from tokenmerge.tools.pages import Table, write_report

Row = dict[str, Any]


class _Console(Console):
    """Console that raises `BrokenPipeError` if a pipe is closed, for the caller to handle (rich would exit with 1)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Report:
    """Receiver of the results of a command.

    Args:
        json_path: file for the rows as a JSON list; "-" is standard output, and tables then go to standard error;
            `None` writes no JSON.
        html_path: file for an HTML page with the tables, figures and rows; `None` writes no page.

    Raises:
        InputError: if a path is a folder, or its folder does not exist; this is checked before any work is done.
    """

    def __init__(self, json_path: str | None = None, html_path: str | None = None) -> None:
        self._json_path, self._html_path = json_path, html_path
        self._tables: list[Table] = []
        self._said: list[str] = []
        for flag, given, name in (("--json", json_path, "rows.json"), ("--html", html_path, "report.html")):
            path = None if given is None or (given == "-" and flag == "--json") else Path(given)
            if path is not None and path.is_dir():
                raise InputError(f"{flag} {given!r} is a folder, but a file was expected: add a name such as {name}")
            if path is not None and not path.resolve().parent.is_dir():
                raise InputError(f"the folder of {flag} {given!r} does not exist: make it first")
        missing = [name for name in ("jinja2", "matplotlib") if html_path and importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(f"{missing[0]} is not installed, but pages need it: pip install 'tokenmerge[visualize]'")
        self.out = _Console(stderr=json_path == "-", highlight=False, soft_wrap=False)
        self.err = Console(stderr=True, highlight=False)

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line."""
        self._said.append(text)
        self.out.print(text, style=style, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning to standard error."""
        self.err.print(f"warning: {text}", style="yellow", markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table in which all columns except the first are right-aligned numbers."""
        rows = list(rows)
        self._tables.append(Table(title, [column.replace("-\n", "").replace("\n", " ") for column in columns], rows))
        # Text, because ":-1:" in a label would become an emoji and brackets would be read as markup
        table = RichTable(title=Text(title), title_justify="left", header_style="bold")
        for i, column in enumerate(columns):
            short = i > 0 or max((len(row[0]) for row in rows), default=0) <= 9  # only long names may wrap
            table.add_column(Text(column), justify="right" if i else "left", no_wrap=short, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.out.print(table)

    def progress(self) -> Progress:
        """Return a progress bar on standard error that disappears when it is done."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
        )

    def write(self, rows: Sequence[Row], figures: Callable[[], Sequence[str | None]] = tuple) -> None:
        """Write the rows as a JSON list and the HTML page, if their paths were given.

        Args:
            rows: the result rows.
            figures: function that returns the figures of the page as SVG; called only if a page is written.

        Raises:
            InputError: if a file cannot be written, or a package that the page needs is missing.
        """
        text = json.dumps(list(rows), indent=2) + "\n"
        if self._json_path == "-":
            sys.stdout.write(text)
        elif self._json_path is not None:
            try:
                Path(self._json_path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise InputError(
                    f"--json {self._json_path!r} cannot be written ({error.strerror}): choose another file"
                ) from None
        if self._html_path is not None:
            title = self._tables[0].title if self._tables else "tokenmerge"
            write_report(Path(self._html_path), title, self._said, self._tables, figures(), rows)
            self.say(f"wrote {self._html_path}")
