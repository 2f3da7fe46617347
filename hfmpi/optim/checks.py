"""What comes from outside: vectors, states and an objective of one's own, each refused in one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.optim.base import Gradient, Objective, Objectives, Operator, Scalars
from hfmpi.optim.layout import Block, Vector, kronecker_layout

__all__ = ["Checked", "check_blocks", "check_state", "check_vector", "checked"]


def check_vector(
    name: str,
    vector: Vector,
    size: int | None = None,
    kind: type | None = None,
    columns: bool = False,
) -> None:
    """Raise a TypeError or ValueError unless it is an array (D,) of float32 or float64.

    `size` is D, where that is known, and `kind` the type of arrays on the device; with `columns` the array
    is (C, D).
    """
    dtype = getattr(vector, "dtype", None)  # arrays of CuPy and JAX have NumPy's types too
    if not isinstance(dtype, np.dtype) or (kind is not None and not isinstance(vector, kind)):
        device = "an" if kind in (None, np.ndarray) else f"a {kind.__module__.partition('.')[0]}"
        found = f"one of {type(vector).__module__.partition('.')[0]}" if dtype is not None else shown(vector)
        raise TypeError(f"{name} must be {device} array of float32 or float64, not {found}")
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be an array of float32 or float64, not of {dtype}")
    if vector.ndim != 1 + columns or size not in (None, vector.shape[-1]):
        wanted = f"({'C, ' * columns}{'D' if size is None else size}{',' * (not columns)})"
        raise ValueError(f"{name} must be a vector of shape {wanted}, not of shape {vector.shape}")


def check_blocks(method: str, blocks: Sequence[Block]) -> None:
    """Raise a UserError where a method that looks at the matrices of theta is not told them."""
    if not blocks:
        raise UserError(f"{method} needs the matrices of theta: init(theta, objective.blocks)")


def check_state(state: object, kind: type, theta: Vector, *vectors: str) -> None:
    """Raise a TypeError or ValueError unless the state is of this kind, and its vectors are as theta is."""
    if not isinstance(state, kind):
        raise TypeError(f"state must be what init(theta) gives, not {shown(state)}")
    for name in vectors:
        vector: Vector = getattr(state, name)
        check_vector(f"{name} of the state", vector)
        if vector.shape != theta.shape or vector.dtype != theta.dtype:
            raise ValueError(
                f"{name} of the state is {_described(vector)}, theta is {_described(theta)}: "
                "call init(theta) anew"
            )


def checked(theta: Vector, objectives: Objectives) -> Objectives:
    """Check what a step is given; give the objectives with a check of all that they give."""
    check_vector("theta", theta)
    if not isinstance(objectives, Objectives):
        raise TypeError(f"a step takes Objectives(gradient, curvature), not {shown(objectives)}")
    curvature = None if objectives.curvature is None else Checked(objectives.curvature, theta)
    return replace(objectives, gradient=Checked(objectives.gradient, theta), curvature=curvature)


class Checked(Objective):
    """An objective whose losses are Python's numbers and whose vectors are of theta's shape and type.

    Parameters
    ----------
    objective : Objective
    theta : (D,)

    Raises
    ------
    TypeError, ValueError
        Out of each method, if the objective gives something else.
    """

    def __init__(self, objective: Objective, theta: Vector) -> None:
        self.objective, self.like, self.name = objective, theta, type(objective).__name__

    def loss(self, theta: Vector) -> float:
        """Give the objective's loss."""
        return self._number("loss", self.objective.loss(theta))

    def gradient(self, theta: Vector) -> Gradient:
        """Give the objective's gradient."""
        return self._gradient("gradient", self.objective.gradient(theta))

    def squared_gradients(self, theta: Vector) -> Gradient:
        """Give the objective's gradient and squared gradients."""
        return self._gradient("squared_gradients", self.objective.squared_gradients(theta))

    def gauss_newton(self, theta: Vector) -> Operator:
        """Give the objective's operator."""
        return self._operator("gauss_newton", self.objective.gauss_newton(theta))

    def structural_gauss_newton(self, theta: Vector, structural: float) -> Operator:
        """Give the objective's operator with structural damping."""
        product = self.objective.structural_gauss_newton(theta, structural)
        return self._operator("structural_gauss_newton", product)

    def factored_gradient(self, theta: Vector) -> tuple[Gradient, Vector]:
        """Give the objective's gradient and Kronecker factors."""
        found: object = self.objective.factored_gradient(theta)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"{self.name}.factored_gradient must give a Gradient and factors")
        like = np.empty(kronecker_layout(self.blocks).size, self.like.dtype)
        factors = self._vector("factored_gradient as factors", found[1], like)
        return self._gradient("factored_gradient", found[0]), factors

    def columns(self, theta: Vector) -> Operator:
        """Give the objective's operator on columns."""
        return self._operator("columns", self.objective.columns(theta))

    def project(self, theta: Vector) -> Operator:
        """Give the objective's projection."""
        return self.objective.project(theta)

    def losses(self, thetas: Sequence[Vector]) -> list[float]:
        """Give the objective's losses."""
        return [self._number("losses", loss) for loss in self.objective.losses(thetas)]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The objective's blocks."""
        return self.objective.blocks

    def spread(self, works: Sequence[Callable[[], Vector]], sizes: Sequence[int]) -> list[Vector]:
        """Let the objective's ranks share the works."""
        return self.objective.spread(works, sizes)

    def agree(self, values: Scalars) -> Scalars:
        """Give the scalars that the objective's ranks agree on."""
        found: object = self.objective.agree(values)
        if not isinstance(found, (tuple, list)) or len(found) != len(values):
            raise TypeError(f"{self.name}.agree must give as many numbers as it was given")
        return tuple(found)

    def _number(self, method: str, value: Vector) -> float:
        shape = getattr(value, "shape", ())
        if shape == () and not isinstance(value, (str, bytes)) and not np.iscomplexobj(value):
            with contextlib.suppress(TypeError):
                return float(value)
        found = f"an array of shape {shape}" if shape else shown(value)
        raise TypeError(f"{self.name}.{method} must give a number as its loss, not {found}")

    def _gradient(self, method: str, found: object) -> Gradient:
        if not isinstance(found, Gradient):
            raise TypeError(f"{self.name}.{method} must give a Gradient(loss, vector), not {shown(found)}")
        squares = None if found.squares is None else self._vector(f"{method} as squares", found.squares)
        return Gradient(self._number(method, found.loss), self._vector(method, found.vector), squares)

    def _operator(self, method: str, product: object) -> Operator:
        if not callable(product):
            raise TypeError(f"{self.name}.{method} must give a function v -> G v, not {shown(product)}")
        return lambda v: self._vector(f"{method}(theta)", product(v), v)

    def _vector(self, method: str, vector: Vector, like: Vector = None) -> Vector:
        """Give a vector of the type and shape of theta, or of another, as one of NumPy where that is."""
        dtype, like = getattr(vector, "dtype", None), self.like if like is None else like
        if not isinstance(dtype, np.dtype) or dtype.kind not in "fiu":
            of = shown(vector) if dtype is None else f"{shown(vector)} of {dtype}"
            raise TypeError(f"{self.name}.{method} must give an array of real numbers, not {of}")
        if vector.shape != like.shape:
            raise ValueError(
                f"{self.name}.{method} must give a vector of theta's shape {like.shape}, not {vector.shape}"
            )
        if isinstance(self.like, np.ndarray) and not isinstance(vector, np.ndarray):
            vector = np.asarray(vector)
        return vector if dtype == like.dtype else vector.astype(like.dtype)


def _described(vector: Vector) -> str:
    return f"{vector.dtype} of shape {vector.shape}"
