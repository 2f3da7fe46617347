"""The time of a pass's matrix products alone: recorded as they happen, then repeated with nothing between.

No implementation that takes all its products from the BLAS can be faster than they are. The repetition calls
the BLAS with the arrays of the pass, so shapes, strides, alignment and memory are the pass's own. A backend
that has a faster product for some shapes (`Backend.multiply`) may come out below this bound.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hfmpi.backends.base import Array, Backend, Packed

__all__ = ["Products"]


class Products:
    """The matrix products of a pass, in order, however the pass did them.

    Parameters
    ----------
    backend : Backend
        Whose products are recorded.

    Attributes
    ----------
    calls : list of (a, b, out)
        Views of the arrays of the pass. Their content may change, and `repeat` overwrites `out`: tapes that
        a recorded pass has made are of no use afterwards.

    Examples
    --------
    >>> import numpy as np
    >>> from hfmpi.backends import create
    >>> backend = create("numpy")
    >>> products = Products(backend)
    >>> with products.recorded():
    ...     backend.matmul(np.ones((2, 3)), np.ones((3, 4)), np.empty((2, 4)))
    >>> products.operations
    48
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.calls: list[tuple[Array, Array, Array]] = []
        self._recording = object()
        self._loops: dict[Hashable, list[tuple[Array, Array, Array]]] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record, instead of what was recorded before, the products inside the `with` block."""
        self.calls, backend = [], self.backend
        self._recording = object()  # another one each time, however the memory is reused
        calls = self.calls
        plain, packed, whole = backend.matmul, backend.multiply, backend.loop
        # A transpose is a view, and the BLAS reads a copy faster: one for all views of the same numbers, so
        # that recording hardly slows what is recorded.
        copies: dict[tuple[int, ...], Array] = {}

        def matmul(a: Array, b: Array, out: Array) -> None:
            calls.append((a, b, out))
            plain(a, b, out)

        def multiply(a: Array, b: Packed, out: Array, add: bool = False) -> None:
            known = len(calls)
            packed(a, b, out, add)
            view = (backend.address(b.matrix), *b.matrix.strides)
            if view not in copies:
                copies[view] = backend.xp.ascontiguousarray(b.matrix)
            calls[known:] = [(a, copies[view], out)]  # once, however it was done

        def loop(name: str, run: Callable[[], None], arrays: Mapping[str, Any]) -> None:
            known, place = len(calls), backend.loop_place(name, arrays)
            if place is None:
                whole(name, run, arrays)
            elif place in self._loops:  # as a graph or in one kernel: the products that it was seen to do
                whole(name, run, arrays)
                calls[known:] = self._loops[place]
            else:
                run()
                self._loops[place] = calls[known:]

        backend.matmul, backend.multiply, backend.loop = matmul, multiply, loop  # type: ignore[method-assign]
        try:
            yield
        finally:
            del backend.matmul, backend.multiply, backend.loop  # the class's own again

    def repeat(self) -> None:
        """Do all products again, and nothing else."""

        def launch() -> None:
            matmul = self.backend.matmul
            for a, b, out in self.calls:
                matmul(a, b, out)

        self.backend.replay(("products alone", self._recording), launch)
        self.backend.synchronize()

    @property
    def operations(self) -> int:
        """Additions and multiplications in all."""
        return sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in self.calls)
