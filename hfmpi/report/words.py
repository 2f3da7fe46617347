"""Words that come from files, on a page: whatever they are, they are shown and do nothing."""

from __future__ import annotations

import html

__all__ = ["escaped"]

MOST = 200
"""Characters of a word; a longer one is cut."""


def escaped(text: object, most: int = MOST) -> str:
    """Give a text for HTML, and for names in a figure; what is not printed has codes."""
    words = str(text)
    words = words if len(words) <= most else f"{words[: most - 1]}…"
    return html.escape("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in words))
