"""Self-contained HTML pages from templates, with escaping on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tokenmerge
from tokenmerge.errors import InputError


def render(template: str, **values: Any) -> str:
    """A page of this package's templates.

    Raises:
        InputError: if Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise InputError("Jinja2 is not installed, but HTML pages need it: pip install 'tokenmerge[compare]'") from None
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template).render(**values)


def embedded(data: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element."""
    return json.dumps(finite(data)).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def finite(data: Any) -> Any:
    """The data with `None` for what JSON has no number for: NaN and infinities."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {name: finite(value) for name, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, list | tuple) else data


def printable(text: str) -> str:
    """Text that can be written: bytes of a file's name that are no UTF-8 become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def about_this() -> dict[str, Any]:
    """The command that is running, with what, and when: what every page says at its end."""
    return {
        "command": printable(shlex.join(["tokenmerge", *sys.argv[1:]])),
        "versions": {
            "tokenmerge": tokenmerge.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        "date": datetime.date.today().isoformat(),
    }


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of a report.

    Attributes:
        title: above it.
        columns: its heads.
        rows: its cells; what reads as a number sorts as one.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def write_report(
    path: Path,
    title: str,
    lead: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[str | None],
    data: Sequence[Mapping[str, Any]],
) -> None:
    """A page with tables that sort, figures, and the numbers behind them to download.

    Args:
        path: file to write.
        title: of the page.
        lead: paragraphs under it.
        tables: in their order.
        figures: SVG documents; `None` is left out.
        data: the rows as they are.

    Raises:
        InputError: if Jinja2 is missing, or the file cannot be written.
    """
    page = render(
        "report.html.j2",
        title=title,
        lead=lead,
        tables=tables,
        figures=[figure[figure.index("<svg") :] for figure in figures if figure is not None],
        data=embedded(list(data)),
        about=about_this(),
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"the page {str(path)!r} cannot be written ({error.strerror}): choose another file") from None
