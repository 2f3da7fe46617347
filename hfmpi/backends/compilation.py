"""Tells who asks while kernels are compiled: on a first start on a machine that takes up to half a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["tell", "told"]

_listeners: list[Callable[[bool], object]] = []


@contextmanager
def told(listener: Callable[[bool], object]) -> Iterator[None]:
    """Call the listener with True whenever this process begins to compile a kernel, with False at its end."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(compiling: bool) -> None:
    """Tell the listeners."""
    for listener in _listeners:
        listener(compiling)
