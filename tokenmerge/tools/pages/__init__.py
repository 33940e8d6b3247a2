"""Self-contained HTML pages from templates with automatic escaping."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import tokenmerge
from tokenmerge import files
from tokenmerge.errors import InputError
from tokenmerge.tools.pages import theme


def render(template: str, **values: Any) -> str:
    """Render a template of this package.

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
    """Return JSON that is safe inside a script element, because it cannot end the element."""
    return json.dumps(finite(data)).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def finite(data: Any) -> Any:
    """Return the data with NaN and infinities replaced by `None`, because JSON cannot represent them."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {name: finite(value) for name, value in data.items()}
    return [finite(value) for value in data] if isinstance(data, list | tuple) else data


def printable(text: str) -> str:
    """Return text that can be encoded: undecodable bytes of a file name become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def title_of(model: str) -> str:
    """Return the name of a model for titles: MODEL as it was given, with the last part of a path in place of the path.

    A folder often has a name such as "model", so its architecture follows in parentheses, if its config.json names one.

    Example:
        >>> from tokenmerge.tools.pages import title_of
        >>> title_of("hf_hub:timm/vit_tiny_patch16_224"), title_of("open_clip:ViT-B-32:/weights/mine.pt")
        ('hf_hub:timm/vit_tiny_patch16_224', 'open_clip:ViT-B-32:mine.pt')
        >>> title_of("local-dir:/home/me/digits")
        'digits'
    """
    kind, _, place = model.partition(":")
    if kind in ("local-dir", "hf") and (kind == "local-dir" or _is_path(place)):
        folder = os.path.abspath(place)
        name, architecture = os.path.basename(folder) or "model", _architecture(folder)
        return printable(name if architecture in ("", name) else f"{name} ({architecture})")
    parts = model.split(":")
    return printable(":".join(os.path.basename(part) if _is_path(part) else part for part in parts))


def _is_path(text: str) -> bool:
    return os.path.isabs(text) or text.startswith((".", "~")) or os.path.exists(text)


def _architecture(folder: str) -> str:
    """Return the architecture in a folder's config.json, of timm or transformers; empty if there is none."""
    try:
        found = files.read_json(os.path.join(folder, "config.json"), "the config")
        names = found.get("architectures") or [found.get("architecture") or found.get("model_type")]
        return names[0][:80] if isinstance(names[0], str) else ""
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        return ""


def about_this() -> dict[str, Any]:
    """Return the command, versions and date for the footer of a page."""
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
class Figure:
    """One figure of a report.

    Attributes:
        caption: what it shows, in a sentence.
        svg: the SVG document.
    """

    caption: str
    svg: str


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of a report.

    Attributes:
        title: heading of the table.
        columns: column headings.
        rows: cells; numeric cells are sorted as numbers.
        folded: whether the rows are shown only on request.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False

    @property
    def kinds(self) -> list[str]:
        """Classes of the columns for the style sheet: words are aligned to the left, and long ones wrap."""
        found = []
        for number in range(len(self.columns)):
            cells = [str(row[number]) for row in self.rows if number < len(row)]
            longest = max(map(len, cells), default=0)
            words = number == 0 or any(_WORDS.search(cell) for cell in cells)
            found.append("text long" if words and longest > _LONG else "text" if words else "")
        return found


_LONG = 28
"""Characters from which the words of a cell wrap."""
_WORDS = re.compile(r"[^\W\d]{3}")


def write_report(
    path: Path | str,
    title: str,
    lead: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[Figure | None],
    data: Sequence[Mapping[str, Any]],
) -> None:
    """Write a page with sortable tables, figures, and the rows to download.

    Args:
        path: file to write.
        title: title of the page.
        lead: paragraphs below the title.
        tables: tables in order.
        figures: the figures; `None` is skipped.
        data: the rows to download.

    Raises:
        InputError: if Jinja2 is missing, or the file cannot be written.
    """
    page = render(
        "report.html.j2",
        title=title,
        lead=lead,
        tables=tables,
        figures=[
            (one.caption, theme.themed(one.svg, one.caption, number))
            for number, one in enumerate((one for one in figures if one is not None), 1)
        ],
        light=theme.variables(dark=False),
        dark=theme.variables(dark=True),
        data=embedded(list(data)),
        about=about_this(),
    )
    files.write(path, page, "the page")
