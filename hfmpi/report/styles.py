"""How the lines of a run look: told apart by colour, and without colours by dashes and marks."""

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
"""What the marks look like in a legend, by their names in plotly."""


@dataclass(frozen=True)
class Style:
    """A line and its marks: dashes in pixels, on and off."""

    colour: str
    dash: str
    mark: str


def style(number: int) -> Style:
    """Give the style of the run of a number; without colours too they repeat after 42."""
    return Style(*(choices[number % len(choices)] for choices in (COLOURS, DASHES, tuple(GLYPHS))))
