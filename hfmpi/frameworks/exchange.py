"""How vectors pass between the optimizers and a framework: through the host, or on the GPU without a copy.

The optimizers compute with arrays of the model's backend: NumPy arrays on the host, or CuPy arrays on the GPU
of the user's function. A framework computes with tensors. An exchange converts between both. On a GPU arrays
and tensors share memory by DLPack (https://dmlc.github.io/dlpack), so that theta, v, J'u and all other
vectors stay on the device; only batches of data come from the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import numpy as np

from hfmpi.backends import create
from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError
from hfmpi.models.linearisation import Passes

__all__ = ["Exchange", "FrameworkPasses", "GuardedPasses", "gpu_backend"]


class FrameworkPasses(Passes, Protocol):
    """The passes of a function that a framework differentiates, with the outputs at theta."""

    @property
    def outputs(self) -> Array:
        """The outputs (N, O)."""


class Exchange:
    """Conversion between arrays of a backend and tensors of a framework, on the device of the function.

    In this class arrays are used as tensors without conversion; subclasses convert.

    Parameters
    ----------
    backend : NumpyBackend
        The backend whose arrays are the vectors of the optimizers.
    """

    def __init__(self, backend: NumpyBackend) -> None:
        self.backend = backend

    def tensor(self, array: Array) -> Any:
        """Return an array of the backend as a tensor that shares its memory where possible."""
        return array

    def array(self, tensor: Any) -> Array:
        """Return a tensor as a C-contiguous array of the backend that shares its memory where possible."""
        return tensor

    def moved(self, array: np.ndarray) -> Any:
        """Return an array of the host, such as the inputs of a batch, as a tensor on the device."""
        return array

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which the framework works on shared memory."""
        return nullcontext()

    def guarded(self, passes: FrameworkPasses) -> FrameworkPasses:
        """Return passes whose methods run in the context `working`."""
        if type(self).working is Exchange.working:
            return passes
        return cast(FrameworkPasses, GuardedPasses(passes, self.working))

    def release(self) -> None:
        """Release memory that the framework reserves on the device."""


class GuardedPasses:
    """Passes whose methods run in a context; all other attributes are those of the wrapped passes.

    Parameters
    ----------
    passes : FrameworkPasses
    working : callable
        Returns a new context.
    """

    def __init__(
        self, passes: FrameworkPasses, working: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.inner, self._working = passes, working

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.inner, name)
        if not callable(attribute):
            return attribute

        def guarded(*args: Any, **options: Any) -> Any:
            with self._working():
                return attribute(*args, **options)

        return guarded


def gpu_backend(dtype: str, index: int) -> NumpyBackend | None:
    """Return the backend of a GPU; without CuPy log a note on what to install, and return None.

    Parameters
    ----------
    dtype : {'float32', 'float64'}
    index : int
        The index of the GPU among those that CUDA shows to this process.
    """
    try:
        return create("cupy", dtype, index)
    except UserError as error:
        logging.getLogger(__name__).warning(
            "Note: the model is on a GPU, and all vectors are copied through the host in every pass: %s.",
            error,
        )
        return None
