"""Colours of figures, which follow the theme of a page and are fixed in a file of their own."""

from __future__ import annotations

import html
import re

INK, GRID, PAPER = "#1c1e21", "#d4d8dd", "#ffffff"
"""Colours of words and axes, of the grid, and behind the figure."""
# the palette of Okabe and Ito, which colour-blind people can distinguish
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#44484d")
_DARK = ("#4ba6e8", "#ff8a47", "#2fc79b", "#e59fc7", "#f2b63c", "#a6dcff", "#c3c8ce")
_NAMES = {INK: "ink", GRID: "grid", PAPER: "paper"} | {colour: f"c{i}" for i, colour in enumerate(COLOURS)}


def variables(dark: bool) -> str:
    """Return the CSS declarations of all colours; paper is transparent on a page."""
    colours = _DARK if dark else COLOURS
    ink, grid = ("#e6e8ea", "#3d434a") if dark else (INK, GRID)
    fixed = {"ink": ink, "grid": grid, "paper": "transparent"}
    every = fixed | {f"c{i}": colour for i, colour in enumerate(colours)}
    return " ".join(f"--{name}: {colour};" for name, colour in every.items())


def themed(svg: str, caption: str, number: int) -> str:
    """Return an SVG document as an element of a page: with the page's colours, a name for screen readers, and ids of its own.

    Each colour becomes `var(--name, colour)`, from which the page restores the colour when the figure is downloaded.

    Args:
        svg: the document.
        caption: what it shows.
        number: number of the figure on the page, which its ids begin with.
    """
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, name in _NAMES.items():
        text = re.sub(rf"{colour}\b", f"var(--{name}, {colour})", text, flags=re.IGNORECASE)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>f{number}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(caption)}"', 1)
