"""Checks of numbers in files that may have been written by another program or person."""

from __future__ import annotations

from typing import Any

__all__ = ["is_amount", "is_drawable"]


def is_amount(value: Any, limit: float = 2**53) -> bool:
    """Return whether a value is a number that is at least 0 and less than `limit`.

    Integers below 2^53 are exact as floats, and results computed from several of them stay finite.
    """
    return type(value) in (int, float) and 0 <= value < limit


def is_drawable(value: Any) -> bool:
    """Return whether a value is a number that can be drawn, or None, which leaves a gap."""
    # Larger numbers are refused so that sums over the lines of a plot cannot overflow.
    return value is None or (type(value) in (int, float) and abs(value) < 1e100)
