"""What a number in a file may be: another program, or another person, may have written it."""

from __future__ import annotations

from typing import Any

__all__ = ["is_amount", "is_drawable"]


def is_amount(value: Any, most: float = 2**53) -> bool:
    """Whether it counts or measures something: a number, not negative, and below `most`.

    Below 2^53 whole numbers are exact as floats, and what is computed from several stays finite.
    """
    return type(value) in (int, float) and 0 <= value < most


def is_drawable(value: Any) -> bool:
    """Whether it is a number that can be drawn, or None, which leaves a gap."""
    # Large ones are refused because sums over a plot's lines may not overflow.
    return value is None or (type(value) in (int, float) and abs(value) < 1e100)
