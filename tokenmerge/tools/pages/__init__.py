"""Self-contained HTML pages from templates, with escaping on."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def write_report(
    path: Path,
    title: str,
    lead: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    figures: Sequence[str],
    data: Sequence[Mapping[str, Any]],
    versions: Mapping[str, str],
) -> None:
    """A page with a table that sorts, figures, and the numbers behind them to download.

    Args:
        path: file to write.
        title: of the page.
        lead: one paragraph under it.
        columns: heads of the table.
        rows: its cells; numbers sort as numbers.
        figures: SVG documents.
        data: the rows as they are.
        versions: what made it.
    """
    page = render(
        "report.html.j2",
        title=title,
        lead=lead,
        columns=columns,
        rows=rows,
        figures=[figure[figure.index("<svg") :] for figure in figures],
        data=json.dumps(list(data)).replace("<", "\\u003c"),  # nothing in it may end the script element
        command=" ".join(["tokenmerge", *sys.argv[1:]]),
        versions=versions,
        date=datetime.date.today().isoformat(),
    )
    path.write_text(page, encoding="utf-8")
