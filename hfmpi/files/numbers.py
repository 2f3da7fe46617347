"""Checks of numbers in files that another program or a person may have written."""

from __future__ import annotations

from typing import Any

__all__ = ["is_amount", "is_drawable"]


def is_amount(value: Any, limit: float = 2**53) -> bool:
    """Return whether a value is a number that is at least 0 and less than `limit`.

    Integers below 2^53 are exact as floats, and results that are computed from several of them are finite.
    """
    return type(value) in (int, float) and 0 <= value < limit


def is_drawable(value: Any) -> bool:
    """Return whether a value can be plotted: a number, or None, which is a gap."""
    # Larger numbers are refused, so that sums over the lines of a plot cannot overflow.
    return value is None or (type(value) in (int, float) and abs(value) < 1e100)
