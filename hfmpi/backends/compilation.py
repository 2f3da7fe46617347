"""Notification of listeners while kernels are compiled, which takes up to 30 seconds at the first start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["listening", "notify"]

_listeners: list[Callable[[bool], object]] = []


@contextmanager
def listening(listener: Callable[[bool], object]) -> Iterator[None]:
    """Call a listener with True when this process begins to compile a kernel, and with False at the end."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def notify(compiling: bool) -> None:
    """Call all listeners with the state of the compilation."""
    for listener in _listeners:
        listener(compiling)
