"""Classic least squares problems: hfmpi's lm and lbfgs, and SciPy's solvers.

    python examples/least_squares/classic.py

Each cell contains the number of evaluations of residuals only, the number of evaluations with a Jacobian or
gradient, and the excess of the sum of squares over its minimum: relative, or absolute if the minimum is zero.
Problems and certified solutions are from NIST StRD (MGH17, BoxBOD, Misra1a) and from More, Garbow and
Hillstrom (1981).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, minimize

import hfmpi
from hfmpi.optim.base import Gradient, Objective, Objectives
from hfmpi.optim.rows import DenseRows

MGH17 = (
    "0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 0.658 0.628 0.603 0.580 "
    "0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 0.438 0.431 0.424 0.420 0.414 0.411 0.406"
)
MISRA = (
    (77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0),
    (10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78),
)
Function = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Problem(NamedTuple):
    """Residuals and their Jacobian as a function of theta, a start, and the minimal sum of squares."""

    name: str
    function: Function
    start: tuple[float, ...]
    least: float


def rosenbrock(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.array([10 * (t[1] - t[0] ** 2), 1 - t[0]]), np.array([[-20 * t[0], 10.0], [-1.0, 0.0]])


def powell(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c, d = t
    r = np.array([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])
    u, v = 2 * (b - 2 * c), 2 * 10**0.5 * (a - d)
    return r, np.array([[1, 10, 0, 0], [0, 0, 5**0.5, -(5**0.5)], [0, u, -2 * u, 0], [v, 0, 0, -v]])


def osborne(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = 10.0 * np.arange(33), np.array(MGH17.split(), float)
    with np.errstate(over="ignore", invalid="ignore"):
        e, f = np.exp(-t[3] * x), np.exp(-t[4] * x)
        j = np.stack([np.ones(33), e, f, -t[1] * x * e, -t[2] * x * f], 1)
        return t[0] + t[1] * e + t[2] * f - y, j


def saturating(x: np.ndarray, y: np.ndarray) -> Function:
    """Return the residuals of a (1 - exp(-b x)) - y."""

    def function(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(over="ignore", invalid="ignore"):
            e = np.exp(-t[1] * x)
            return t[0] * (1 - e) - y, np.stack([1 - e, t[0] * x * e], 1)

    return function


def deficient(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute residuals that do not distinguish two parameters, and do not depend on a third one."""
    x = np.cos(np.outer(np.arange(20), np.arange(1, 6)))
    x[:, 4], x[:, 3] = x[:, 2], 0
    z = np.tanh(x @ t)
    return z - np.tanh(x @ np.ones(5)), (1 - z * z)[:, None] * x


BOX = saturating(np.array([1.0, 2, 3, 5, 7, 10]), np.array([109.0, 149, 149, 191, 213, 224]))
PROBLEMS = [
    Problem("Rosenbrock", rosenbrock, (-1.2, 1), 0.0),
    Problem("Powell's singular function", powell, (3, -1, 0, 1), 0.0),
    Problem("MGH17, far start", osborne, (50, 150, -100, 1, 2), 5.4648946975e-5),
    Problem("MGH17, near start", osborne, (0.5, 1.5, -1, 0.01, 0.02), 5.4648946975e-5),
    Problem("BoxBOD, far start", BOX, (1, 1), 1.1680088766e3),
    Problem("Misra1a, far start", saturating(*map(np.array, MISRA)), (500, 1e-4), 1.2455138894e-1),
    Problem("rank-deficient J", deficient, (0.1,) * 5, 0.0),
]


class Squares(Objective):
    """Half the sum of squares of a function's residuals; counts the evaluations."""

    def __init__(self, function: Function) -> None:
        self.function, self.values, self.jacobians = function, 0, 0

    def loss(self, theta: np.ndarray) -> float:
        self.values, self.jacobians = self.values + 1, self.jacobians - 1
        return self.rows(theta).loss

    def gradient(self, theta: np.ndarray) -> Gradient:
        rows = self.rows(theta)
        return Gradient(rows.loss, rows.gradient)

    def rows(self, theta: np.ndarray, request: object = None) -> DenseRows:
        self.jacobians += 1
        r, j = self.function(theta)
        with np.errstate(over="ignore", invalid="ignore"):
            return DenseRows(float(r @ r) / 2, j.T @ r, j, r)


def ours(
    problem: Problem, optimizer: hfmpi.LM | hfmpi.LBFGS, steps: int = 200
) -> tuple[np.ndarray, int, int]:
    """Return the solution of an hfmpi optimizer, and the numbers of values and Jacobians that it needed."""
    squares, theta = Squares(problem.function), np.array(problem.start, float)
    state = optimizer.init(theta)
    for _ in range(steps):
        theta, state, report = optimizer.step(theta, state, Objectives(squares))
        if report.converged:
            break
    return theta, squares.values, squares.jacobians


def scipys(problem: Problem, method: str) -> tuple[np.ndarray, int, int]:
    """Return the same for a SciPy solver with its smallest tolerances."""
    start, function = np.array(problem.start, float), problem.function
    if method == "L-BFGS-B":
        squares = Squares(function)
        options = {"ftol": 0, "gtol": 0, "maxiter": 1000, "maxcor": 50}
        done = minimize(
            lambda t: tuple(squares.gradient(t)[:2]), start, jac=True, method=method, options=options
        )
        return done.x, 0, squares.jacobians
    tolerances = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "max_nfev": 2000}
    done = least_squares(
        lambda t: function(t)[0], start, lambda t: function(t)[1], method=method, **tolerances
    )
    return done.x, done.nfev, done.njev or 0


def main() -> None:
    """Print the table."""
    methods = {
        "hfmpi lm": lambda p: ours(p, hfmpi.LM()),
        "SciPy lm": lambda p: scipys(p, "lm"),
        "SciPy trf": lambda p: scipys(p, "trf"),
        "hfmpi lbfgs": lambda p: ours(p, hfmpi.LBFGS()),
        "SciPy L-BFGS-B": lambda p: scipys(p, "L-BFGS-B"),
    }
    print("| problem |", " | ".join(methods), "|")
    print("| --- |", " | ".join("---" for _ in methods), "|")
    for problem in PROBLEMS:
        cells = []
        for solve in methods.values():
            theta, values, jacobians = solve(problem)
            r, _ = problem.function(theta)
            excess = float(r @ r) - problem.least
            cells.append(f"{values} + {jacobians}: {max(excess, 0.0) / (problem.least or 1.0):.0e}")
        print(f"| {problem.name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
