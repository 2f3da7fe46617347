"""Preconditioned conjugate gradients with the stop rule of Martens (2010).

Minimises phi(x) = x' A x / 2 - b' x for a symmetric positive definite A given by its products. With the
residual r = b - A x at hand, phi(x) = -(r + b)' x / 2 needs no product of its own.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hfmpi.optim.base import Vector

__all__ = ["CGResult", "Iterate", "Stop", "cg", "relative_progress"]


class Stop(enum.Enum):
    """Why conjugate gradients stopped."""

    PROGRESS = "the model value no longer improves enough per iteration"
    MAX_STEPS = "the limit of iterations was reached"
    SOLVED = "the residual is zero to rounding"
    NOT_POSITIVE = "the curvature along the search direction is not positive"
    NOT_FINITE = "a gradient, product or residual was not finite"


@dataclass(frozen=True)
class Iterate:
    """One kept iterate: x (D,), the number of iterations that led to it, and phi(x)."""

    step: int
    x: Vector
    value: float


@dataclass(frozen=True)
class CGResult:
    """Kept iterates in order (the last is the solution), phi after every iteration, and why it stopped.

    `products` counts the products with A, the one for a non-zero start and the refreshed residuals
    included; `steps` counts iterations.
    """

    iterates: list[Iterate]
    model_values: list[float]
    stop: Stop
    steps: int
    products: int


def relative_progress(values: list[float], tolerance: float) -> bool:
    """Martens' stop rule on the model values phi_0 ... phi_i (his section 4.4 and released code).

    True when i > k, phi_{i-k} < 0 and (phi_i - phi_{i-k}) / phi_i < k * tolerance, with
    k = max(10, ceil(i / 10)).
    """
    i = len(values) - 1
    k = max(10, math.ceil(0.1 * i))
    if i <= k or not values[i - k] < 0 or values[i] == 0:  # risen to zero: the quotient is +infinity
        return False
    return (values[i] - values[i - k]) / values[i] < k * tolerance


def cg(
    apply: Callable[[Vector], Vector],
    b: Vector,
    x0: Vector,
    *,
    inner: Callable[[Vector, Vector], float],
    max_steps: int = 250,
    tolerance: float = 5e-4,
    keep_ratio: float = 1.3,
    refresh: int = 0,
    precondition: Callable[[Vector], Vector] | None = None,
) -> CGResult:
    """Solve A x = b approximately.

    Parameters
    ----------
    apply : callable
        v (D,) -> A v, a new vector.
    b, x0 : (D,)
        Right-hand side and start.
    inner : callable
        Inner product; every branch below is taken from its values, so under MPI it must give the same
        number on every rank.
    max_steps : int
        Martens: 250. Kiros: 5.
    tolerance : float
        Epsilon of `relative_progress`; 5e-4 is Martens'. 0 switches the test off.
    keep_ratio : float
        Keep the iterates ceil(5 * ratio^j), j = 0, 1, ... and the last (Martens: 1.3); 1 keeps all.
    refresh : int
        Compute the residual afresh every so many iterations (one product more each time); 0: never.
        Single precision needs it in long solves.
    precondition : callable, optional
        r (D,) -> M^-1 r.
    """
    solve = precondition or (lambda r: r)
    x, products = x0, 0
    if inner(x0, x0) == 0:
        r = b.copy()
    else:
        r = b - apply(x0)
        products += 1
    values = [-0.5 * (inner(r, x) + inner(b, x))]
    kept: list[Iterate] = []
    due, stop, step = 0, Stop.MAX_STEPS, 0
    y = solve(r)
    d = y.copy()
    rho = inner(r, y)
    # Below it a residual is nothing but rounding, which the directions would then blow up.
    least = rho * float(np.finfo(b.dtype).eps) ** 2 if math.isfinite(rho) else 0.0
    while step < max_steps:
        if not math.isfinite(rho):
            stop = Stop.NOT_FINITE
            break
        if rho <= least:
            stop = Stop.SOLVED
            break
        q = apply(d)
        products += 1
        curvature = inner(d, q)
        if not math.isfinite(curvature):
            stop = Stop.NOT_FINITE
            break
        if curvature <= 0:
            stop = Stop.NOT_POSITIVE
            break
        step += 1
        alpha = rho / curvature
        before, x = x, x + b.dtype.type(alpha) * d
        if refresh and step % refresh == 0 and step < max_steps:
            r = b - apply(x)
            products += 1
        else:
            r = r - b.dtype.type(alpha) * q
        value = -0.5 * (inner(r, x) + inner(b, x))
        if not math.isfinite(value):  # as it is where x overflowed
            step, x, stop = step - 1, before, Stop.NOT_FINITE
            break
        values.append(value)
        while keep_ratio > 1 and math.ceil(5 * keep_ratio**due) < step:
            due += 1
        if keep_ratio <= 1 or math.ceil(5 * keep_ratio**due) == step:
            kept.append(Iterate(step, x, values[-1]))
        if tolerance > 0 and relative_progress(values, tolerance):
            stop = Stop.PROGRESS
            break
        y = solve(r)
        previous, rho = rho, inner(r, y)
        d = y + b.dtype.type(rho / previous) * d
    if not kept or kept[-1].step != step:
        kept.append(Iterate(step, x, values[-1]))
    return CGResult(kept, values, stop, step, products)
