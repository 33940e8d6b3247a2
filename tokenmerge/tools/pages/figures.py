"""Plots as vector graphics in one style."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenmerge.tools.pages import Figure
from tokenmerge.tools.pages.labels import place_labels
from tokenmerge.tools.pages.theme import COLOURS, GRID, INK, PAPER
from tokenmerge.tracing.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_SIZE = (5.0, 3.4)
"""Width and height in inches of the axes and their labels: two figures fit beside each other, and the words stay legible."""
_MOST_MARKED = 40
"""Most points of a line that are marked; more would hide it."""
_LEGEND_WIDTH = 68
"""Characters that fit beside each other below the axes."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Attributes:
        column: column of the values.
        label: label of the axis.
        least: smallest possible value, below which the axis never goes.
        most: largest possible value.
        ends: columns of the ends of an interval around each value, for error bars.
        mark: value to which others are compared, such as a speed-up of 1; the axis includes it, and a thin line shows it.
        span: smallest range of the axis, because a difference of nothing would fill it otherwise.
        whole: whether only whole numbers are marked.
    """

    column: str
    label: str
    least: float | None = None
    most: float | None = None
    ends: tuple[str, str] | None = None
    mark: float | None = None
    span: float = 0.0
    whole: bool = False

    def values(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """Return all values that the axis must include."""
        columns = (self.column, *(self.ends or ()))
        found = [float(row[name]) for row in rows for name in columns if row.get(name) is not None]
        return found if self.mark is None else [*found, self.mark]

    def limits(self, rows: Sequence[Mapping[str, Any]], padding: float = 0.07) -> tuple[float, float]:
        """Return the ends of the axis: a little beyond the values (by `padding` of their range), and never beyond possible values."""
        values = self.values(rows)
        low, high = min(values), max(values)
        span = max(high - low, self.span or 0.02 * abs(high), 1e-9)
        from_zero = self.least == 0 and 0 <= low < high / 4
        wider = (span - (high - low)) / 2 + padding * span
        low, high = low - wider, high + wider
        if self.most is not None:
            high = min(high, self.most)
        if self.least is not None:
            low = self.least if from_zero else max(low, self.least)
        return low, high


def svg(figure: Drawing) -> str:
    """Return a figure as a reproducible SVG document, with labels as text."""
    import matplotlib as mpl

    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tokenmerge"}):
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue()


def captioned(caption: str, drawn: str | None) -> Figure | None:
    """Return a figure with its caption; `None` if nothing was drawn."""
    return None if drawn is None else Figure(caption, drawn)


def lines(
    rows: Sequence[Mapping[str, Any]],
    x: Axis,
    y: Axis,
    by: str | None = None,
    names: str | None = None,
    alone: Sequence[str] = (),
    diagonal: bool = False,
) -> str | None:
    """Plot one column against another as lines, and return SVG; `None` for fewer than two points.

    Args:
        rows: the data; rows without a value are left out.
        x: the x axis; it has no error bars.
        y: the y axis.
        by: column that groups rows into lines; `None` draws one line.
        names: column of the labels at the points.
        alone: groups whose points are not connected.
        diagonal: whether to show where both are equal.

    Raises:
        InputError: if matplotlib is not installed.
    """
    shown = [row for row in rows if row.get(x.column) is not None and row.get(y.column) is not None]
    if len(shown) < 2:
        return None
    groups = list(dict.fromkeys(row[by] for row in shown)) if by else [None]
    legend = [str(group) for group in groups if group is not None]
    columns = max(1, min(len(legend), _LEGEND_WIDTH // (max(map(len, legend), default=0) + 7)))
    figure = new_figure(_SIZE[0], _SIZE[1] + 0.2 * -(-len(legend) // columns))
    axes = figure.subplots()
    for number, group in enumerate(groups):
        mine = sorted((row for row in shown if by is None or row[by] == group), key=lambda row: row[x.column])
        _line(axes, mine, x, y, number, "" if group is None else str(group), group not in alone)
    axes.set_xlim(*x.limits(shown, 0.07 if names is None else 0.11))  # names need room beside the outer points
    axes.set_ylim(*y.limits(shown))
    _style(figure, axes, x, y)
    if diagonal:
        ends = [max(x.limits(shown)[0], y.limits(shown)[0]), min(axes.get_xlim()[1], axes.get_ylim()[1])]
        axes.plot(ends, ends, color=INK, alpha=0.6, linewidth=0.9, linestyle=(0, (5, 3)), zorder=0.5)
    if legend:
        figure.legend(
            fontsize=9, ncols=columns, loc="outside lower center", frameon=False, labelcolor=INK, handlelength=1.6
        )
    if names is not None:
        place_labels(axes, [(row[x.column], row[y.column], str(row[names])) for row in shown], INK)
    return svg(figure)


def _line(
    axes: Axes, rows: Sequence[Mapping[str, Any]], x: Axis, y: Axis, number: int, label: str, joined: bool
) -> None:
    up = [row[y.column] for row in rows]
    bars = None
    if y.ends is not None:
        lower, upper = ([row[y.column if row.get(end) is None else end] for row in rows] for end in y.ends)
        if y.least is not None:
            lower = [max(y.least, end) for end in lower]
        if y.most is not None:
            upper = [min(y.most, end) for end in upper]
        # a value outside its interval, such as a minimum of times, has a bar on one side alone
        bars = [
            [max(0.0, value - end) for value, end in zip(up, lower, strict=True)],
            [max(0.0, end - value) for value, end in zip(up, upper, strict=True)],
        ]
    drawn = axes.errorbar(
        [row[x.column] for row in rows],
        up,
        yerr=bars,
        color=COLOURS[number % len(COLOURS)],
        marker=_MARKS[number % len(_MARKS)] if len(rows) <= _MOST_MARKED or not joined else "",
        linewidth=1.4 if joined else 0,
        elinewidth=1.2,
        capsize=3,
        markersize=5.5,
        clip_on=False,  # a mark at the end of an axis, such as 100 %, is shown whole
    )
    drawn.lines[0].set_label(label.replace("$", r"\$"))  # without the bars, which would fill the legend
    drawn.lines[0].set_gid(f"line-{number}")
    if bars is not None:
        for part in drawn.lines[2]:
            part.set_gid(f"bars-{number}")


def _style(figure: Drawing, axes: Axes, x: Axis, y: Axis) -> None:
    """Set words, lines and colours, which the page replaces by those of its theme."""
    from matplotlib import ticker

    figure.set_facecolor(PAPER)
    axes.set_facecolor("none")
    axes.set_xlabel(x.label, fontsize=10, color=INK)
    axes.set_ylabel(y.label, fontsize=10, color=INK)
    axes.tick_params(labelsize=9, colors=INK)
    axes.ticklabel_format(useOffset=False)
    for one, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=one.whole))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    for mark, line in ((x.mark, axes.axvline), (y.mark, axes.axhline)):
        if mark is not None:
            line(mark, color=INK, linewidth=0.9, alpha=0.6, zorder=0.5)
