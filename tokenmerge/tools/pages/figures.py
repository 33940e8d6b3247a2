"""Plots as vector graphics in one style."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenmerge.tracing.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the palette of Okabe and Ito, which colour-blind people can distinguish
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def svg(figure: Figure) -> str:
    """Return a figure as a reproducible SVG document, with labels as text."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tokenmerge"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _name(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8, parse_math=False)


def lines(
    rows: Sequence[Mapping[str, Any]],
    across: str,
    up: str,
    labels: tuple[str, str],
    by: str | None = None,
    error: tuple[str, str] | None = None,
    names: str | None = None,
    alone: Sequence[str] = (),
) -> str | None:
    """Plot `up` against `across` as lines, and return SVG; `None` for fewer than two points.

    Args:
        rows: the data; rows without a value are left out.
        across: column of the x values.
        up: column of the y values.
        labels: labels of the x and the y axis.
        by: column that groups rows into lines; `None` draws one line.
        error: columns of the ends of an interval around `up`, for error bars.
        names: column of the labels at the points.
        alone: groups whose points are not connected.

    Raises:
        InputError: if matplotlib is not installed.
    """
    shown = [row for row in rows if row.get(across) is not None and row.get(up) is not None]
    if len(shown) < 2:
        return None
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    groups = list(dict.fromkeys(row[by] for row in shown)) if by else [None]
    for number, group in enumerate(groups):
        mine = sorted((row for row in shown if by is None or row[by] == group), key=lambda row: row[across])
        x, y = [row[across] for row in mine], [row[up] for row in mine]
        bars = None
        if error is not None:
            bars = [[abs(row[up] - row[end]) if row.get(end) is not None else 0 for row in mine] for end in error]
        axes.errorbar(
            x,
            y,
            yerr=bars,
            label=None if group is None else str(group).replace("$", r"\$"),
            color=COLOURS[number % len(COLOURS)],
            marker=_MARKS[number % len(_MARKS)],
            linewidth=0 if group in alone else 1,
            elinewidth=1,
            capsize=2,
            markersize=5,
        )
        if names is not None:
            for row in mine:
                _name(axes, str(row[names]), row[across], row[up])
    axes.set_xlabel(labels[0], fontsize=9)
    axes.set_ylabel(labels[1], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if by:
        columns = 2 if len(groups) > 8 else 1
        axes.legend(fontsize=7, ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure)
