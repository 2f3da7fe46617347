"""The styles of runs on a page, which differ by colour, and in black and white by dashes and marks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GLYPHS", "Style", "style"]

# Okabe and Ito (2008), Color Universal Design, from dark to light and without the yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("", "8,4", "2,3", "8,3,2,3", "14,5", "12,3,2,3,2,3")
GLYPHS = {
    "circle": "○",
    "square": "□",
    "triangle-up": "△",
    "diamond": "◇",
    "x-thin": "✕",
    "star": "☆",
    "hexagram": "✡",
}
"""Characters for the marks in a legend, by the names of the marks in plotly."""


@dataclass(frozen=True)
class Style:
    """The style of a line and its marks; `dash` lists lengths in pixels, alternately on and off."""

    colour: str
    dash: str
    mark: str


def style(number: int) -> Style:
    """Return the style of a run by its number; in black and white styles repeat after 42 runs."""
    return Style(*(choices[number % len(choices)] for choices in (COLOURS, DASHES, tuple(GLYPHS))))
