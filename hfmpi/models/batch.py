"""A batch as every model takes it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["Batch"]


@runtime_checkable
class Batch(Protocol):
    """B sequences side by side, time first: L inputs, and targets of the last T of them."""

    @property
    def inputs(self) -> Any:
        """(L, B) int32 symbols, or (L, B, I) numbers."""

    @property
    def targets(self) -> Any:
        """(T, B) int32 symbols, or (T, B, O) numbers; T <= L, steps before are burn-in, without outputs."""

    @property
    def mask(self) -> Any:
        """(T, B), 1 where a step is scored and 0 where it is not, or None: all are."""
