"""Output of the commands: tables of at most 80 columns, JSON rows, HTML pages and progress bars."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from tokenmerge import files
from tokenmerge.errors import InputError
from tokenmerge.tools.pages import Figure, Table, finite, write_report
from tokenmerge.tools.signals import deferred
from tokenmerge.tools.streams import one_terminal, to_nowhere, writing

Row = dict[str, Any]


class _Console(Console):
    """Console that raises `BrokenPipeError` if a pipe is closed (`| head`), for the caller to handle; rich would exit with 1.

    Args:
        goes_on: whether nothing is raised, and nothing printed from then on, because the command has files to write.
    """

    def __init__(self, goes_on: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._goes_on = goes_on

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def print(self, *objects: Any, **kwargs: Any) -> None:
        """Print as rich does; a full disk behind the stream becomes an `InputError`."""
        try:
            with writing(self.stderr):
                super().print(*objects, **kwargs)
        except BrokenPipeError:
            if not self._goes_on:
                raise
            to_nowhere(self.file)


class Bars(Progress):
    """Progress bars that a signal never leaves half drawn, because rich would keep everything that is printed afterwards."""

    def start(self) -> None:
        """Show the bars."""
        with deferred():
            super().start()

    def stop(self) -> None:
        """Remove the bars."""
        with deferred():
            super().stop()

    def refresh(self) -> None:
        """Draw the bars."""
        with deferred():
            super().refresh()

    def update(self, *args: Any, **values: Any) -> None:
        """Change a task."""
        with deferred():
            super().update(*args, **values)

    def advance(self, *args: Any, **values: Any) -> None:
        """Advance a task."""
        with deferred():
            super().advance(*args, **values)

    def reset(self, *args: Any, **values: Any) -> None:
        """Start a task again."""
        with deferred():
            super().reset(*args, **values)


class Report:
    """Receiver of the results of a command.

    Args:
        json_path: file for the rows as a JSON list; "-" is standard output, and tables then go to standard error;
            `None` writes no JSON.
        html_path: file for an HTML page with the tables, figures and rows; `None` writes no page.
        writes: whether the command writes other files; it then goes on when a pipe that it prints to is closed.

    Raises:
        InputError: if a path is a folder, or its folder does not exist; this is checked before any work is done.
    """

    def __init__(self, json_path: str | None = None, html_path: str | None = None, writes: bool = False) -> None:
        self._json_path, self._html_path = json_path, html_path
        self._tables: list[Table] = []
        self._said: list[str] = []
        self.history: list[str] = []
        """All lines and warnings so far, as they are logged."""
        self.also: Callable[[str], None] | None = None
        """Function that receives each line and warning as well, such as a log."""
        for flag, given, name in (("--json", json_path, "rows.json"), ("--html", html_path, "report.html")):
            if given is not None and not (given == "-" and flag == "--json"):
                files.check_writable(given, flag, name)
        if json_path == "-" and sys.stdout is None:  # Python's word for a closed one
            raise InputError("--json - writes to standard output, but it is closed: give the name of a file")
        missing = [name for name in ("jinja2", "matplotlib") if html_path and importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(f"{missing[0]} is not installed, but pages need it: pip install 'tokenmerge[visualize]'")
        goes_on = writes or html_path is not None or json_path not in (None, "-")
        self.out: Console = _Console(goes_on, stderr=json_path == "-", highlight=False, soft_wrap=False)
        self.err: Console = _Console(goes_on, stderr=True, highlight=False)

    def say(self, text: str, style: str | None = None, whole: bool = False) -> None:
        """Print one line.

        Args:
            text: the line.
            style: a style of rich.
            whole: whether to leave wrapping to the terminal, so that a long command can be copied.
        """
        self._said.append(text)
        with deferred():
            self._console().print(text, style=style, markup=False, soft_wrap=whole)
        self._log(text)

    def warn(self, text: str) -> None:
        """Print a warning to standard error."""
        with deferred():
            self.err.print(f"warning: {text}", style="yellow", markup=False)
        self._log(f"warning: {text}")

    def _log(self, line: str) -> None:
        self.history.append(line)
        if self.also is not None:
            self.also(line)

    def _console(self) -> Console:
        """Return the console of results.

        If both outputs are one terminal, it is the console of the progress bars, which stay below everything that it prints;
        the bars would erase what another one prints.
        """
        return self.err if one_terminal(self.out.file, self.err.file) else self.out

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
        with deferred():
            self._console().print(table)

    def progress(self) -> Progress:
        """Return a progress bar on standard error that disappears when it is done."""
        return Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
            disable=not self.err.is_terminal,
        )

    def write(self, rows: Sequence[Row], figures: Callable[[], Sequence[Figure | None]] = tuple) -> None:
        """Write the rows as a JSON list and the HTML page, if their paths were given.

        Numbers that are not finite become null, because JSON has none; a warning names them.

        Args:
            rows: the result rows.
            figures: function that returns the figures of the page; called only if a page is written.

        Raises:
            InputError: if a file cannot be written, or a package that the page needs is missing.
        """
        rows = self.finite(rows)
        if self._json_path == "-":
            with writing():
                sys.stdout.write(files.to_json(rows, "the rows") + "\n")
                sys.stdout.flush()
        elif self._json_path is not None:
            files.write_json(self._json_path, rows, "--json")
        if self._html_path is not None:
            title = self._tables[0].title if self._tables else "tokenmerge"
            tables = [dataclasses.replace(one, title="Results") for one in self._tables[:1]]
            tables += [
                dataclasses.replace(one, title=one.title[:1].upper() + one.title[1:]) for one in self._tables[1:]
            ]
            write_report(self._html_path, title, self._said, tables, figures(), rows)
            self.say(f"wrote {self._html_path}")

    def finite(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with `None` in place of NaN and infinities, after a warning that names them."""
        odd = [path for number, row in enumerate(rows) for path in _not_finite(row, f"row {number + 1}")]
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            self.warn(f"{'; '.join(odd[:3])}{more}: written as null, because JSON has no such number")
        return [finite(row) for row in rows]


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """Yield "name is nan" for each number in a value that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}"
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(part, f"{name}, {key}")
    elif isinstance(value, list | tuple):
        for place, part in enumerate(value):
            yield from _not_finite(part, f"{name}[{place}]")
