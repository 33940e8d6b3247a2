"""Labels beside the points of a plot, where they cover neither each other nor the data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox, Transform

_PLACES = (
    (6, 5, "left", "bottom"),
    (-6, 5, "right", "bottom"),
    (6, -5, "left", "top"),
    (-6, -5, "right", "top"),
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (14, 14, "left", "bottom"),
    (-14, 14, "right", "bottom"),
    (14, -14, "left", "top"),
    (-14, -14, "right", "top"),
)
"""Offsets in points from the point to the label, and the side of the label that is there, in order of preference."""
_MARK = 4.0
"""Half the side of the square around a point that stays free, in points."""


def place_labels(axes: Axes, points: Sequence[tuple[float, float, str]], colour: str) -> None:
    """Write a label at each point, at the first place where it overlaps least; one that would lie on another is left out.

    Args:
        axes: the axes, with their limits set and everything else drawn.
        points: x, y and the label.
        colour: colour of the labels.
    """

    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # sets the layout, on which all positions depend
    scale = figure.dpi / 72
    taken = [_around(axes, x, y, _MARK * scale) for x, y, _ in points]
    bars = [box for one in axes.collections for box in _boxes(one.get_paths(), one.get_transform())]
    drawn = [line for line in axes.lines if line.get_linestyle() != "None"]
    chords = [box for line in drawn for box in _boxes([line.get_path()], line.get_transform())]
    frame = axes.bbox.padded(-2)
    written: list[Bbox] = []
    for x, y, text in points:
        best, least = None, float("inf")
        for number, (right, up, horizontal, vertical) in enumerate(_PLACES):
            one = axes.annotate(
                text,
                (x, y),
                xytext=(right, up),
                textcoords="offset points",
                fontsize=9,
                ha=horizontal,
                va=vertical,
                color=colour,
                parse_math=False,
            )
            box = one.get_window_extent()
            cost = 100 * sum(_shared(box, other) for other in written) + 4 * sum(_shared(box, other) for other in taken)
            cost += sum(_shared(box, other) for other in (*bars, *chords)) + 60 * _outside(box, frame) + 0.01 * number
            if cost < least:
                if best is not None:
                    best.remove()
                best, least = one, cost
            else:
                one.remove()
        assert best is not None
        box = best.get_window_extent()
        if any(_shared(box, other) > 0.02 for other in written):
            best.remove()
        else:
            written.append(box)


def _around(axes: Axes, x: float, y: float, reach: float) -> Bbox:
    from matplotlib.transforms import Bbox

    across, up = axes.transData.transform((x, y))
    return Bbox.from_extents(across - reach, up - reach, across + reach, up + reach)


def _boxes(paths: Sequence[Path], transform: Transform) -> list[Bbox]:
    """Return boxes that cover the segments of paths, eight for each, because a slanted segment does not fill one box."""
    from matplotlib.transforms import Bbox

    found = []
    for path in paths:
        corners = transform.transform(path.vertices)
        for first, second in itertools.pairwise(corners):
            for step in range(8):
                one, other = (first + (second - first) * part / 8 for part in (step, step + 1))
                found.append(
                    Bbox.from_extents(
                        min(one[0], other[0]) - 1,
                        min(one[1], other[1]) - 1,
                        max(one[0], other[0]) + 1,
                        max(one[1], other[1]) + 1,
                    )
                )
    return found


def _shared(box: Bbox, other: Bbox) -> float:
    """Return the share of a box that lies in another one."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return float(max(0.0, width) * max(0.0, height) / (box.width * box.height))


def _outside(box: Bbox, frame: Bbox) -> float:
    return 1 - _shared(box, frame)
