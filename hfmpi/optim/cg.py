"""Preconditioned conjugate gradients with the stop rule of Martens (2010).

Minimises phi(x) = x' A x / 2 - b' x for a symmetric positive definite A, using only products with A. With the
residual r = b - A x, phi(x) = -(r + b)' x / 2 needs no additional product.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hfmpi.optim.base import Operator, Scalars, inner_product
from hfmpi.optim.layout import Vector

__all__ = ["CGResult", "ConjugateGradients", "Iterate", "Stop", "relative_progress"]


class Stop(enum.StrEnum):
    """The reason why conjugate gradients stopped."""

    PROGRESS = "the model value no longer improves enough per iteration"
    MAX_STEPS = "the limit of iterations was reached"
    SOLVED = "the residual is zero to rounding"
    NOT_POSITIVE = "the curvature along the search direction is not positive"
    NOT_FINITE = "a gradient, product or residual is not finite"


@dataclass(frozen=True)
class Iterate:
    """A saved iterate: the number of iterations that led to it, x (D,), and phi(x)."""

    step: int
    x: Vector
    value: float


@dataclass(frozen=True)
class CGResult:
    """The result of a solve.

    Attributes
    ----------
    iterates : list of Iterate
        The saved iterates in order; the last one is the solution.
    model_values : list of float
        phi at the start and after every iteration.
    stop : Stop
        Why the solver stopped.
    steps : int
        The number of iterations.
    products : int
        The number of products with A, including one for a nonzero start and one for each recomputed residual.
    """

    iterates: list[Iterate]
    model_values: list[float]
    stop: Stop
    steps: int
    products: int


def relative_progress(values: list[float], tolerance: float) -> bool:
    """Return whether the model values phi_0 ... phi_i meet Martens' stop rule.

    The rule (Martens 2010, section 4.4, and his released code) is met if i > k, phi_{i-k} < 0 and
    (phi_i - phi_{i-k}) / phi_i < k * tolerance, with k = max(10, ceil(i / 10)).
    """
    i = len(values) - 1
    k = max(10, math.ceil(0.1 * i))
    if i <= k or not values[i - k] < 0 or values[i] == 0:  # the quotient is +infinity if phi rose to zero
        return False
    return (values[i] - values[i - k]) / values[i] < k * tolerance


@dataclass(frozen=True)
class ConjugateGradients:
    """Settings of the solver.

    Attributes
    ----------
    max_steps : int
        Maximum number of iterations. Martens: 250. Kiros: 5.
    tolerance : float
        The tolerance of `relative_progress`. Martens: 5e-4. 0 switches the test off.
    keep_ratio : float
        The solver saves the iterates ceil(5 * ratio^j), j = 0, 1, ... and the last one. Martens: 1.3. 1 saves
        all iterates.
    refresh : int
        Number of iterations after which the residual is recomputed, which takes one more product each time;
        0: never. Long solves in float32 need it.
    """

    max_steps: int = 250
    tolerance: float = 5e-4
    keep_ratio: float = 1.3
    refresh: int = 0

    def solve(
        self,
        apply: Operator,
        b: Vector,
        x0: Vector,
        *,
        inner: Callable[[Vector, Vector], float] = inner_product,
        agree: Callable[[Scalars], Scalars] = lambda values: values,
        precondition: Operator | None = None,
    ) -> CGResult:
        """Solve A x = b approximately.

        Under MPI all ranks hold bit-identical vectors, and each rank computes the inner products, possibly
        with different rounding. An iteration proceeds with the local numbers; then one message replaces them
        by those of rank 0. A rank whose local alpha was different recomputes x and r. Every branch depends on
        agreed numbers only.

        Parameters
        ----------
        apply : callable
            v (D,) -> A v, a new vector.
        b, x0 : (D,)
            The right-hand side and the initial x.
        inner : callable
            The inner product, as this rank computes it.
        agree : callable
            Returns rank 0's values of a tuple of scalars. It is called once per iteration, and twice in an
            iteration that recomputes the residual, because the product then needs an agreed alpha.
        precondition : callable, optional
            r (D,) -> M^-1 r.
        """
        solve = precondition or (lambda r: r)
        kind = b.dtype.type

        def measured(x: Vector, r: Vector, y: Vector) -> tuple[float, float]:
            """Compute phi(x) and r' y = r' M^-1 r."""
            return -0.5 * (inner(r, x) + inner(b, x)), inner(r, y)

        def moved(x: Vector, r: Vector, d: Vector, q: Vector, alpha: float) -> tuple[Vector, Vector, Vector]:
            """Return x, r and y = M^-1 r after a step of length alpha along d; q = A d."""
            residual = r - kind(alpha) * q
            return x + kind(alpha) * d, residual, solve(residual)

        x, r, products = x0, b, 0
        if x0.any():
            r = b - apply(x0)
            products += 1
        d = y = solve(r)
        value, square = agree(measured(x, r, y))
        values, saved = [value], list[Iterate]()
        due, stop, step = 0, Stop.MAX_STEPS, 0
        # A smaller residual consists of rounding errors only, which further directions would amplify.
        least = square * float(np.finfo(b.dtype).eps) ** 2 if math.isfinite(square) else 0.0
        while step < self.max_steps:
            if not math.isfinite(square):
                stop = Stop.NOT_FINITE
                break
            if square <= least:
                stop = Stop.SOLVED
                break
            q = apply(d)
            products += 1
            local = inner(d, q)
            ahead = x, r, y  # a rank whose local curvature is not positive and finite still sends a message
            fresh = self.refresh > 0 and (step + 1) % self.refresh == 0 and step + 1 < self.max_steps
            if fresh:
                (curvature,) = agree((local,))
            else:
                if 0 < local < math.inf:
                    ahead = moved(x, r, d, q, square / local)
                curvature, value, following = agree((local, *measured(*ahead)))
            if not math.isfinite(curvature):
                stop = Stop.NOT_FINITE
                break
            if curvature <= 0:
                stop = Stop.NOT_POSITIVE
                break
            if fresh:
                further = x + kind(square / curvature) * d
                residual = b - apply(further)
                products += 1
                ahead = further, residual, solve(residual)
                value, following = agree(measured(*ahead))
            elif curvature != local:
                ahead = moved(x, r, d, q, square / curvature)
            if not math.isfinite(value):  # x overflowed
                stop = Stop.NOT_FINITE
                break
            step += 1
            x, r, y = ahead
            values.append(value)
            while self.keep_ratio > 1 and math.ceil(5 * self.keep_ratio**due) < step:
                due += 1
            if self.keep_ratio <= 1 or math.ceil(5 * self.keep_ratio**due) == step:
                saved.append(Iterate(step, x, value))
            if self.tolerance > 0 and relative_progress(values, self.tolerance):
                stop = Stop.PROGRESS
                break
            d = y + kind(following / square) * d
            square = following
        if not saved or saved[-1].step != step:
            saved.append(Iterate(step, x, values[-1]))
        return CGResult(saved, values, stop, step, products)
