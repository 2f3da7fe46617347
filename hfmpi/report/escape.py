"""Escape text from files, so that a page shows it and never interprets it."""

from __future__ import annotations

import html

__all__ = ["escaped"]

MOST = 200
"""Maximum number of characters; longer texts are truncated."""


def escaped(text: object, most: int = MOST) -> str:
    """Return a text escaped for HTML and for names in a figure, with codes for unprintable characters."""
    cut = str(text)
    cut = cut if len(cut) <= most else f"{cut[: most - 1]}…"
    return html.escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in cut))
