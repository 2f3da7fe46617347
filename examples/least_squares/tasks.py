"""The tasks: models in JAX, training data and test data, all float64.

The loss of a task is half the mean squared distance between outputs and targets, and its error is the
relative L2 distance on the test data, |outputs - targets| / |targets|.

Physics-informed networks have the residual of the equation and the values on the boundary as outputs. An
example is a point with its coordinates and two numbers a and b. Its output is a R(u) + b u, where R is the
residual, and its target a f + b g. b is 0 at interior points, and a is 0 at points of the boundary and of the
initial condition; in tests a = 0 and b = 1. The weights are such that the loss is half the mean of (R - f)^2
over the interior plus `weight` times half the mean of (u - g)^2 over the boundary, up to a factor that scales
the targets to a mean square of 1.

Sources: poisson, Mueller and Zeinhofer (2023, arXiv 2302.13163): its 900 interior and 120 boundary points,
whose weights are the measures 1 and 4; a second hidden layer is added. helmholtz, Wang, Teng and Perdikaris
(2021, arXiv 2001.04536), whose weights of the boundary are about 100. burgers and allen-cahn, Raissi et al.
(2019), with the points and the network of DeepXDE's example of Burgers' equation. regression, Friedman
(1991), without noise. curves, Martens (2010), here of 14 x 14 pixels with half the layers or less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import references

Data = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Pde:
    """What DeepXDE needs to define an equation: a function for the residual, and the points of the loss.

    `second` are the coordinates in which second derivatives are needed, `residual(u, first, second)` is R(u),
    `interior` and `boundary` the points with their f and g.
    """

    residual: Callable[..., Any]
    second: tuple[int, ...]
    interior: Data
    boundary: Data
    weight: float


@dataclass(frozen=True)
class Task:
    """A model, its initial parameters and its data.

    Attributes
    ----------
    apply : callable
        (params, x) -> outputs (B, O) or (B, T, O)
    params : pytree of arrays
        The initial parameters.
    train, test : (x, y)
    pde : Pde, optional
    """

    apply: Callable[[Any, Any], Any]
    params: Any
    train: Data
    test: Data
    pde: Pde | None = None

    @property
    def size(self) -> int:
        """The number of parameters, D."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


# Networks ------------------------------------------------------------------------------------------------


def glorot(sizes: tuple[int, ...], rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw matrices by the normal rule of Glorot and Bengio; biases are 0."""
    return [(rng.normal(0, (2 / (n + m)) ** 0.5, (n, m)), np.zeros(m)) for n, m in pairwise(sizes)]


def mlp(params: Any, x: Any) -> Any:
    """Compute the outputs of a tanh network."""
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def derivatives(params: Any, x: Any, second: tuple[int, ...]) -> tuple[Any, list[Any], list[Any]]:
    """Compute a tanh network and its derivatives in the coordinates, forward layer by layer.

    Returns
    -------
    u (B, 1), its first derivatives in all coordinates, and its second derivatives in the coordinates `second`
    """
    w, b = params[0]
    h = jnp.tanh(x @ w + b)
    slope = 1 - h * h
    first = [slope * w[k] for k in range(len(w))]
    bent = [-2 * h * slope * w[k] ** 2 for k in second]
    for w, b in params[1:-1]:
        h = jnp.tanh(h @ w + b)
        slope, first = 1 - h * h, [each @ w for each in first]
        bent = [slope * (each @ w - 2 * h * first[k] ** 2) for k, each in zip(second, bent, strict=True)]
        first = [slope * each for each in first]
    w, b = params[-1]
    return h @ w + b, [each @ w for each in first], [each @ w for each in bent]


def equation(pde: Pde, sizes: tuple[int, ...], seed: int, test: Data) -> Task:
    """Create the task of a physics-informed network."""

    def apply(params: Any, x: Any) -> Any:
        d = sizes[0]
        u, first, second = derivatives(params, x[:, :d], pde.second)
        return x[:, d : d + 1] * pde.residual(u, first, second) + x[:, d + 1 :] * u

    def points(data: Data, a: float, b: float) -> Data:
        x, y = data
        return np.hstack([x, np.broadcast_to([a, b], (len(x), 2))]), (a + b) * y

    inside, edge = len(pde.interior[0]), len(pde.boundary[0])
    squares = np.array([np.mean(y**2) for _, y in (pde.interior, pde.boundary)])
    size = (squares[0] + pde.weight * squares[1]) ** 0.5
    a = ((inside + edge) / inside) ** 0.5 / size
    b = ((inside + edge) / edge * pde.weight) ** 0.5 / size
    parts = points(pde.interior, a, 0.0), points(pde.boundary, 0.0, b)
    x, y = (np.concatenate(each) for each in zip(*parts, strict=True))
    start = glorot(sizes, np.random.default_rng(seed))
    return Task(apply, start, (x, y), points(test, 0.0, 1.0), pde)


def grid(count: int, low: float, high: float, ends: bool = False) -> np.ndarray:
    """Return the points (count ** 2, 2) of a square grid: midpoints of cells, or with the ends."""
    along = np.linspace(low, high, count) if ends else low + (high - low) * (np.arange(count) + 0.5) / count
    return np.stack(np.meshgrid(along, along, indexing="ij"), axis=-1).reshape(-1, 2)


def edges(count: int, low: float, high: float) -> np.ndarray:
    """Return `count` midpoints on each side of a square, (4 count, 2)."""
    along = low + (high - low) * (np.arange(count) + 0.5) / count
    ends = [np.full(count, low), np.full(count, high)]
    return np.concatenate([np.stack(s, axis=1) for e in ends for s in ((along, e), (e, along))])


# Equations -----------------------------------------------------------------------------------------------


def poisson(seed: int) -> Task:
    """Create the task -(u_xx + u_yy) = f on the unit square, u = sin(pi x) sin(pi y)."""

    def exact(x: np.ndarray) -> np.ndarray:
        return np.sin(np.pi * x).prod(axis=1, keepdims=True)

    inside, edge, test = grid(30, 0, 1), edges(30, 0, 1), grid(51, 0, 1, ends=True)
    pde = Pde(
        lambda u, first, second: -(second[0] + second[1]),
        (0, 1),
        (inside, 2 * np.pi**2 * exact(inside)),
        (edge, exact(edge)),
        4.0,
    )
    return equation(pde, (2, 32, 32, 1), seed, (test, exact(test)))


def helmholtz(seed: int) -> Task:
    """Create the task u_xx + u_yy + u = q on [-1, 1]^2, u = sin(pi x) sin(4 pi y)."""

    def exact(x: np.ndarray) -> np.ndarray:
        return np.sin(np.pi * x[:, :1]) * np.sin(4 * np.pi * x[:, 1:])

    inside, edge, test = grid(40, -1, 1), edges(40, -1, 1), grid(51, -1, 1, ends=True)
    pde = Pde(
        lambda u, first, second: second[0] + second[1] + u,
        (0, 1),
        (inside, (1 - 17 * np.pi**2) * exact(inside)),
        (edge, exact(edge)),
        100.0,
    )
    return equation(pde, (2, 32, 32, 1), seed, (test, exact(test)))


def evolution(
    residual: Callable[..., Any],
    start: Callable[[np.ndarray], np.ndarray],
    ends: float,
    weight: float,
    solution: Callable[[np.ndarray, np.ndarray], np.ndarray],
    seed: int,
) -> Task:
    """Create a task for u(x, t) on [-1, 1] x [0, 1] with initial values, and fixed values at x = -1 and 1."""
    rng = np.random.default_rng(1000 + seed)
    inside = np.stack([rng.uniform(-1, 1, 2540), rng.uniform(0, 1, 2540)], axis=1)
    sides = np.stack([np.repeat([-1.0, 1.0], 40), rng.uniform(0, 1, 80)], axis=1)
    first = np.stack([rng.uniform(-1, 1, 160), np.zeros(160)], axis=1)
    edge = np.concatenate([sides, first])
    values = np.concatenate([np.full(80, ends), start(first[:, 0])])[:, None]
    pde = Pde(residual, (0,), (inside, np.zeros((2540, 1))), (edge, values), weight)
    x, t = np.linspace(-1, 1, 101), np.linspace(0, 1, 26)
    test = np.stack(np.meshgrid(x, t, indexing="ij"), axis=-1).reshape(-1, 2)
    return equation(pde, (2, 20, 20, 20, 1), seed, (test, solution(x, t).reshape(-1, 1)))


def burgers(seed: int) -> Task:
    """Create the task u_t + u u_x = nu u_xx, nu = 0.01 / pi, u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0."""
    nu = 0.01 / np.pi
    return evolution(
        lambda u, first, second: first[1] + u * first[0] - nu * second[0],
        lambda x: -np.sin(np.pi * x),
        0.0,
        1.0,
        lambda x, t: references.burgers(x, t, nu),
        seed,
    )


def allen_cahn(seed: int) -> Task:
    """Create the task u_t = 0.001 u_xx + 5 (u - u^3), u(x, 0) = x^2 cos(pi x), u(-1, t) = u(1, t) = -1."""
    return evolution(
        lambda u, first, second: first[1] - 0.001 * second[0] - 5 * (u - u**3),
        lambda x: x**2 * np.cos(np.pi * x),
        -1.0,
        100.0,
        references.allen_cahn,
        seed,
    )


# Other tasks ---------------------------------------------------------------------------------------------


def regression(seed: int) -> Task:
    """Fit Friedman's function of five variables at 1,000 points, over its standard deviation; no noise."""
    rng = np.random.default_rng(1000 + seed)
    x = rng.uniform(0, 1, (3000, 5))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    x, y = 2 * x - 1, ((y - 14.4) / 4.9)[:, None]
    start = glorot((5, 32, 32, 1), np.random.default_rng(seed))
    return Task(mlp, start, (x[:1000], y[:1000]), (x[1000:], y[1000:]))


STEPS, SPAN = 20, 0.25


def neural_ode(seed: int) -> Task:
    """Predict the logarithms of predator and prey from 40 initial states at 20 times; the field is a network.

    An example is an initial state. Its outputs are the states at the following times, with one RK4 step for
    each. The reference solution uses 20 steps for each.
    """

    def rk4(field: Callable[[Any], Any], z: Any, h: float) -> Any:
        k1 = field(z)
        k2 = field(z + h / 2 * k1)
        k3 = field(z + h / 2 * k2)
        k4 = field(z + h * k3)
        return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def lotka_volterra(z: np.ndarray) -> np.ndarray:
        prey, predator = np.exp(z.T)
        return np.stack([1.5 - predator, prey - 1.0], axis=1)

    def truth(z: np.ndarray) -> np.ndarray:
        found = []
        for _ in range(STEPS):
            for _ in range(20):
                z = rk4(lotka_volterra, z, SPAN / 20)
            found.append(z)
        return np.stack(found, axis=1)

    def apply(params: Any, x: Any) -> Any:
        def step(z: Any, _: None) -> tuple[Any, Any]:
            z = rk4(lambda at: mlp(params, at), z, SPAN)
            return z, z

        return jax.lax.scan(step, x, None, STEPS)[1].swapaxes(0, 1)

    x = np.random.default_rng(1000 + seed).uniform([-0.7, -0.4], [0.7, 1.0], (140, 2))
    y = truth(x)
    start = glorot((2, 24, 24, 2), np.random.default_rng(seed))
    return Task(apply, start, (x[:40], y[:40]), (x[40:], y[40:]))


def factorisation(seed: int) -> Task:
    """Complete a matrix of 60 x 50 and rank 5, with singular values from 1 to 0.001, from half of it.

    An example is an entry, and its inputs are two indices. The matrix has a mean square of 1.
    """
    rows, columns, rank = 60, 50, 5
    rng = np.random.default_rng(1000 + seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, rank)))[0] for n in (rows, columns))
    matrix = left * np.logspace(0, -3, rank) @ right.T
    matrix /= np.sqrt(np.mean(matrix**2))
    x = np.argwhere(np.ones_like(matrix)).astype(np.int32)
    x = x[rng.permutation(len(x))]
    y = matrix[x[:, 0], x[:, 1]][:, None]
    draw, half = np.random.default_rng(seed), len(x) // 2
    start = {"rows": draw.normal(0, 0.5, (rows, rank)), "columns": draw.normal(0, 0.5, (columns, rank))}

    def apply(params: Any, x: Any) -> Any:
        return (params["rows"][x[:, 0]] * params["columns"][x[:, 1]]).sum(axis=1, keepdims=True)

    return Task(apply, start, (x[:half], y[:half]), (x[half:], y[half:]))


PIXELS = 14


def curves(seed: int) -> Task:
    """Reproduce images of curves: 196-100-50-25-6-25-50-100-196 units, code and output linear.

    A curve is the quadratic Bezier curve of three random points, drawn with a Gaussian pen.
    """
    rng = np.random.default_rng(1000 + seed)
    points = rng.uniform(0.1, 0.9, (1500, 3, 2))
    t = np.linspace(0, 1, 60)[:, None, None, None]
    ends = (1 - t) ** 2 * points[:, 0] + t**2 * points[:, 2] + 2 * t * (1 - t) * points[:, 1]
    pen = ends[:, 0]  # (60, 1500, 2)
    centres = (np.arange(PIXELS) + 0.5) / PIXELS
    near = np.exp(-(((pen[..., None] - centres) / 0.06) ** 2) / 2)  # (60, 1500, 2, PIXELS)
    x = np.einsum("tni,tnj->tnij", near[:, :, 0], near[:, :, 1]).max(axis=0).reshape(1500, -1)
    sizes = PIXELS**2, 100, 50, 25, 6, 25, 50, 100, PIXELS**2

    def apply(params: Any, x: Any) -> Any:
        for number, (w, b) in enumerate(params):
            x = x @ w + b
            x = x if number in (3, 7) else jnp.tanh(x)
        return x

    start = glorot(sizes, np.random.default_rng(seed))
    return Task(apply, start, (x[:1000], x[:1000]), (x[1000:], x[1000:]))


TASKS: dict[str, Callable[[int], Task]] = {
    "poisson": poisson,
    "helmholtz": helmholtz,
    "burgers": burgers,
    "allen-cahn": allen_cahn,
    "regression": regression,
    "neural-ode": neural_ode,
    "factorisation": factorisation,
    "curves": curves,
}
"""Functions that create the tasks, by name; their seed draws the start and, except for grids, the data."""
