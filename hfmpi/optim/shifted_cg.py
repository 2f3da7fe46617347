"""Conjugate gradients for several shifts together: (A + shift I) x = b for the same A and b.

All shifts share the Krylov space of b, so that an iteration needs one product with A for all of them
(Jegerlehner 1996, arXiv hep-lat/9612014; van den Eshof and Sleijpen 2004). The residuals of the shifted
systems are parallel to the residual of the smallest shift, r_k = zeta_k r, and shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from hfmpi.optim.base import Operator, Scalars, inner_product
from hfmpi.optim.layout import Vector

__all__ = ["shifted_solutions"]

SOLVED = 1e-30
"""A shift whose residual is below this fraction of the smallest shift's is solved in all digits."""


def shifted_solutions(
    apply: Operator,
    b: Vector,
    shifts: Sequence[float],
    tolerance: float,
    most: int,
    kept: Collection[int] = (),
    agree: Callable[[Scalars], Scalars] = lambda values: values,
) -> tuple[list[Vector], int]:
    """Solve (A + shift I) x = b approximately for each shift.

    Parameters
    ----------
    apply : callable
        v (D,) -> A v, a new vector; A is symmetric and positive semidefinite.
    b : (D,)
    shifts : sequence of float
        Positive, ascending.
    tolerance : float
        The iteration ends when the residual of the smallest shift is at most this fraction of b, in norm.
    most : int
        Maximum number of iterations.
    kept : collection of int
        Iterations after which the iterate of the smallest shift is also returned.
    agree : callable
        Returns rank 0's values of scalars (`Objective.agree`).

    Returns
    -------
    list of (D,), int
        The solutions, followed by the iterates of `kept` that were reached before the end; and the number of
        iterations, each of which takes one product. A solution may contain numbers that are not finite.
    """
    kind, smallest = b.dtype.type, shifts[0]
    r, xs, ps = b, [b * 0 for _ in shifts], [b * 1 for _ in shifts]
    zeta, zeta_before = [1.0] * len(shifts), [1.0] * len(shifts)
    alpha_before, beta_before = 1.0, 0.0
    goal, iterates = 0.0, list[Vector]()
    for iteration in range(most):
        q = apply(ps[0]) + kind(smallest) * ps[0]
        products = [inner_product(*each) for each in ((r, r), (ps[0], q), (r, q), (q, q))]
        square, bend, slope, length = agree(tuple(products))
        if not (bend > 0 and math.isfinite(bend) and math.isfinite(square)):
            return xs + iterates, iteration + 1
        alpha = square / bend
        r = r - kind(alpha) * q
        # The squared norm of the new residual without a second message; the next iteration recomputes it.
        after = max(square - 2 * alpha * slope + alpha**2 * length, 0.0)
        beta = after / square
        if iteration == 0:
            goal = tolerance**2 * square
        for k, shift in enumerate(shifts):
            before, last = zeta_before[k], zeta[k]
            if last < SOLVED:  # zeta would underflow
                continue
            new = alpha_before * before * (1 + alpha * (shift - smallest))
            new = last * before * alpha_before / (new + alpha * beta_before * (before - last))
            ratio = new / last
            xs[k] = xs[k] + kind(alpha * ratio) * ps[k]
            ps[k] = kind(new) * r + kind(beta * ratio**2) * ps[k]
            zeta_before[k], zeta[k] = last, new
        alpha_before, beta_before = alpha, beta
        if after <= goal:
            return xs + iterates, iteration + 1
        if iteration + 1 in kept:
            iterates.append(xs[0])
    return xs + iterates, most
