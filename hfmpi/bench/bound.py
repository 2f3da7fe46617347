"""Record the matrix products of a pass, and repeat them alone, without the other work of the pass.

The time of the repetition is a bound: no implementation that computes all products by the BLAS can be faster.
The repetition calls the BLAS with the arrays of the pass, so shapes, strides, alignment and memory are the
same. A backend that has a faster product for some shapes (`Backend.multiply`) may be faster than this bound.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hfmpi.backends.base import Array, Packed
from hfmpi.backends.numpy import NumpyBackend

__all__ = ["Products", "Recording"]


class Products:
    """The matrix products of a pass, in order; any kernel of the backend may have computed them.

    Parameters
    ----------
    backend : NumpyBackend
        Repeats the products.
    matmul : callable
        Computes one product by the BLAS.

    Attributes
    ----------
    calls : list of (a, b, out)
        Views of the arrays of the pass. Their content may change, and `repeat` overwrites `out`: tapes that
        the recorded pass has filled are invalid afterwards.
    """

    def __init__(self, backend: NumpyBackend, matmul: Callable[[Array, Array, Array], None]) -> None:
        self.backend, self._matmul = backend, matmul
        self.calls: list[tuple[Array, Array, Array]] = []
        self._key = object()  # identifies this recording to `Backend.replay`, even when memory is reused
        self._copies: dict[tuple[int, ...], Array] = {}

    def copied(self, matrix: Array) -> Array:
        """Return a contiguous copy of a matrix; all views of the same numbers get the same copy.

        The BLAS reads a copy faster than a transposed view; sharing it keeps the cost of recording low.
        """
        view = (self.backend.address(matrix), *matrix.strides)
        if view not in self._copies:
            self._copies[view] = self.backend.xp.ascontiguousarray(matrix)
        return self._copies[view]

    def repeat(self) -> None:
        """Compute all products again, and nothing else."""

        def launch() -> None:
            matmul = self._matmul
            for a, b, out in self.calls:
                matmul(a, b, out)

        self.backend.replay(("products alone", self._key), launch)
        self.backend.synchronize()

    @property
    def operations(self) -> int:
        """Return the number of additions and multiplications."""
        return sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in self.calls)


class Recording(NumpyBackend):
    """A mixin for any kind of backend, which records matrix products on request.

    Examples
    --------
    >>> import numpy as np
    >>> from hfmpi.backends import create
    >>> backend = create("numpy", mixin=Recording)
    >>> with backend.recorded() as products:
    ...     backend.matmul(np.ones((2, 3)), np.ones((3, 4)), np.empty((2, 4)))
    >>> products.operations
    48
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._products: Products | None = None
        self._calls_of_loops: dict[Hashable, list[tuple[Array, Array, Array]]] = {}

    @contextmanager
    def recorded(self) -> Iterator[Products]:
        """Record the products inside the `with` block."""
        self._products = products = Products(self, super().matmul)
        try:
            yield products
        finally:
            self._products = None

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """Compute out = a b, and record the product."""
        if self._products is not None:
            self._products.calls.append((a, b, out))
        super().matmul(a, b, out)

    @property
    def multiply(self) -> Callable[..., None]:
        """Return the method of the backend, or one that records; a loop looks it up only once."""
        multiply, products = super().multiply, self._products
        if products is None:
            return multiply
        calls, copied = products.calls, products.copied

        def recorded(a: Array, b: Packed, out: Array, add: bool = False) -> None:
            start = len(calls)
            multiply(a, b, out, add)
            calls[start:] = [(a, copied(b.matrix), out)]  # once, even if `multiply` calls `matmul`

        return recorded

    def loop(self, name: str, run: Callable[[], None], arrays: Mapping[str, Any]) -> None:
        """Run a loop over time; a loop that may become a graph or one kernel is recorded in its first run."""
        products = self._products
        key = None if products is None else self.loop_key(name, arrays)
        if products is None or key is None:
            super().loop(name, run, arrays)
        elif key in self._calls_of_loops:
            self._products = None
            try:
                super().loop(name, run, arrays)
            finally:
                self._products = products
            products.calls += self._calls_of_loops[key]
        else:
            start = len(products.calls)
            run()
            self._calls_of_loops[key] = products.calls[start:]
