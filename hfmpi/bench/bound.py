"""The time of a pass's matrix products alone: recorded as they happen, then repeated with nothing between.

No implementation on the same BLAS can be faster than its products. The repetition calls the same function
with the same arrays, so shapes, strides, alignment and memory are those of the pass itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hfmpi.backends.base import Array, Backend

__all__ = ["Products"]


class Products:
    """The matrix products of a pass, in order.

    Attributes
    ----------
    calls : list of (a, b, out)
        Views of the arrays of the pass. Their content may change, and `repeat` overwrites `out`: tapes that
        a recorded pass has made are of no use afterwards.

    Examples
    --------
    >>> import numpy as np
    >>> from hfmpi.backends import create
    >>> backend, products = create("numpy"), Products()
    >>> with products.recorded(backend):
    ...     backend.matmul(np.ones((2, 3)), np.ones((3, 4)), np.empty((2, 4)))
    >>> products.operations
    48
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Array, Array, Array]] = []

    @contextmanager
    def recorded(self, backend: Backend) -> Iterator[None]:
        """Record, instead of what was recorded before, the products inside the `with` block."""
        calls = self.calls = []
        multiply = backend.matmul

        def matmul(a: Array, b: Array, out: Array) -> None:
            calls.append((a, b, out))
            multiply(a, b, out)

        backend.matmul = matmul  # type: ignore[method-assign]
        try:
            yield
        finally:
            del backend.matmul  # the class's own again

    def repeat(self, backend: Backend) -> None:
        """Do all products again, and nothing else."""
        multiply = backend.matmul
        for a, b, out in self.calls:
            multiply(a, b, out)
        backend.synchronize()

    @property
    def operations(self) -> int:
        """Additions and multiplications in all."""
        return sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in self.calls)
