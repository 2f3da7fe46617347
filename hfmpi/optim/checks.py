"""Checks of vectors, states and user-defined objectives; each error is reported in one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from hfmpi.errors import UserError, shown
from hfmpi.optim.base import Gradient, Objective, Objectives, Operator, Scalars
from hfmpi.optim.layout import Block, Vector, kronecker_layout
from hfmpi.optim.rows import RowMatrix

__all__ = ["Checked", "check_blocks", "check_state", "check_vector", "checked"]


def check_vector(
    name: str,
    vector: Vector,
    size: int | None = None,
    kind: type | None = None,
    columns: bool = False,
) -> None:
    """Raise a TypeError or ValueError unless `vector` is an array (D,) of float32 or float64.

    Parameters
    ----------
    name : str
        The name of the vector in the error message.
    vector : object
    size : int, optional
        D.
    kind : type, optional
        The type of arrays on the device.
    columns : bool
        Whether the array must have the shape (C, D).
    """
    dtype = getattr(vector, "dtype", None)  # CuPy and JAX use NumPy's dtypes
    if not isinstance(dtype, np.dtype) or (kind is not None and not isinstance(vector, kind)):
        device = "an" if kind in (None, np.ndarray) else f"a {kind.__module__.partition('.')[0]}"
        actual = f"one of {type(vector).__module__.partition('.')[0]}" if dtype is not None else shown(vector)
        raise TypeError(f"{name} must be {device} array of float32 or float64, not {actual}")
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be an array of float32 or float64, not of {dtype}")
    if vector.ndim != 1 + columns or size not in (None, vector.shape[-1]):
        wanted = f"({'C, ' * columns}{'D' if size is None else size}{',' * (not columns)})"
        raise ValueError(f"{name} must be a vector of shape {wanted}, not of shape {vector.shape}")


def check_blocks(method: str, blocks: Sequence[Block]) -> None:
    """Raise a UserError if a method that works on the matrices of theta gets no blocks."""
    if not blocks:
        raise UserError(f"{method} needs the matrices of theta: call init(theta, objective.blocks)")


def check_state(state: object, kind: type, theta: Vector, *vectors: str) -> None:
    """Raise an error unless the state has this type and its vectors have the shape and dtype of theta.

    Raises
    ------
    TypeError, ValueError
    """
    if not isinstance(state, kind):
        raise TypeError(f"state must be the result of init(theta), not {shown(state)}")
    for name in vectors:
        vector: Vector = getattr(state, name)
        check_vector(f"{name} of the state", vector)
        if vector.shape != theta.shape or vector.dtype != theta.dtype:
            raise ValueError(
                f"{name} of the state is {_described(vector)}, but theta is {_described(theta)}: "
                "call init(theta) again"
            )


def checked(theta: Vector, objectives: Objectives) -> Objectives:
    """Check the arguments of a step; return objectives that also check their results."""
    check_vector("theta", theta)
    if not isinstance(objectives, Objectives):
        raise TypeError(f"step needs Objectives(gradient, curvature), not {shown(objectives)}")
    curvature = None if objectives.curvature is None else _checked(objectives.curvature, theta)
    return replace(objectives, gradient=_checked(objectives.gradient, theta), curvature=curvature)


def _checked(objective: Objective, theta: Vector) -> Objective:
    return cast(Objective, Checked(objective, theta))


class Checked:
    """A wrapper that checks an objective's results and converts them to theta's dtype and Python numbers.

    It has all methods of the objective; `RESULTS` lists the checks of their results.

    Parameters
    ----------
    objective : Objective
    theta : (D,)

    Raises
    ------
    TypeError, ValueError
        Raised by a method whose result has a wrong type or shape.
    """

    def __init__(self, objective: Objective, theta: Vector) -> None:
        self.objective, self.like, self.name = objective, theta, type(objective).__name__

    def __getattr__(self, method: str) -> Vector:
        attribute: Vector = getattr(self.objective, method)
        check = RESULTS.get(method)
        return attribute if check is None else lambda *args: check(self, method, attribute(*args))

    def agree(self, values: Scalars) -> Scalars:
        """Return the objective's agreed scalars, after checking their number."""
        agreed: object = self.objective.agree(values)
        if not isinstance(agreed, (tuple, list)) or len(agreed) != len(values):
            raise TypeError(f"{self.name}.agree must return as many numbers as it receives, {len(values)}")
        return tuple(agreed)

    def _number(self, method: str, value: Vector) -> float:
        shape = getattr(value, "shape", ())
        if shape == () and not isinstance(value, (str, bytes)) and not np.iscomplexobj(value):
            with contextlib.suppress(TypeError):
                return float(value)
        actual = f"an array of shape {shape}" if shape else shown(value)
        raise TypeError(f"{self.name}.{method} must return a number as the loss, not {actual}")

    def _numbers(self, method: str, values: Vector) -> list[float]:
        return [self._number(method, value) for value in values]

    def _gradient(self, method: str, at: object) -> Gradient:
        if not isinstance(at, Gradient):
            raise TypeError(f"{self.name}.{method} must return a Gradient(loss, vector), not {shown(at)}")
        squares = None if at.squares is None else self._vector(f"{method} as squares", at.squares)
        return Gradient(self._number(method, at.loss), self._vector(method, at.vector), squares)

    def _factored(self, method: str, result: object) -> tuple[Gradient, Vector]:
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"{self.name}.{method} must return a Gradient and a vector of factors")
        like = np.empty(kronecker_layout(self.objective.blocks).size, self.like.dtype)
        factors = self._vector(f"{method} as factors", result[1], like)
        return self._gradient(method, result[0]), factors

    def _rows(self, method: str, rows: object) -> RowMatrix:
        if not isinstance(rows, RowMatrix):
            raise TypeError(f"{self.name}.{method} must return a RowMatrix, not {shown(rows)}")
        self._number(method, rows.loss)
        g = self._vector(f"{method} as gradient", rows.gradient)
        if g is not rows.gradient:  # methods of the rows use it, so that a converted copy would not help
            raise TypeError(
                f"{self.name}.{method} must return a gradient of theta's type, {_described(self.like)}, "
                f"not {shown(rows.gradient)} of {rows.gradient.dtype}"
            )
        if rows.residuals is not None and np.shape(rows.residuals) != (rows.count,):
            raise ValueError(
                f"{self.name}.{method} must return one residual for each of its {rows.count:,} rows, not "
                f"an array of shape {np.shape(rows.residuals)}"
            )
        if rows.factors is not None:
            size = kronecker_layout(self.objective.blocks).size
            if np.shape(rows.factors) != (size,) or rows.factors.dtype != self.like.dtype:
                raise TypeError(
                    f"{self.name}.{method} must return {size:,} numbers of {self.like.dtype} as factors, "
                    f"not {shown(rows.factors)}"
                )
        return rows

    def _operator(self, method: str, product: object) -> Operator:
        if not callable(product):
            raise TypeError(f"{self.name}.{method} must return a function v -> G v, not {shown(product)}")
        return lambda v: self._vector(f"{method}(theta)", product(v), v)

    def _vector(self, method: str, vector: Vector, like: Vector = None) -> Vector:
        """Return the vector in the dtype of theta or `like`, as a NumPy array if theta is one."""
        dtype, like = getattr(vector, "dtype", None), self.like if like is None else like
        if not isinstance(dtype, np.dtype) or dtype.kind not in "fiu":
            of = shown(vector) if dtype is None else f"{shown(vector)} of {dtype}"
            raise TypeError(f"{self.name}.{method} must return an array of real numbers, not {of}")
        if vector.shape != like.shape:
            raise ValueError(
                f"{self.name}.{method} must return a vector of theta's shape {like.shape}, not {vector.shape}"
            )
        if isinstance(self.like, np.ndarray) and not isinstance(vector, np.ndarray):
            vector = np.asarray(vector)
        return vector if dtype == like.dtype else vector.astype(like.dtype)


Objective.register(Checked)

RESULTS: dict[str, Callable[[Checked, str, Vector], object]] = {
    "loss": Checked._number,
    "losses": Checked._numbers,
    "gradient": Checked._gradient,
    "squared_gradients": Checked._gradient,
    "factored_gradient": Checked._factored,
    "rows": Checked._rows,
    "gauss_newton": Checked._operator,
    "structural_gauss_newton": Checked._operator,
}
"""The check of each method's result; the results of blocks, project and spread are not checked."""


def _described(vector: Vector) -> str:
    return f"{vector.dtype} of shape {vector.shape}"
