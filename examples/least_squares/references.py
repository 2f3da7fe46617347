"""Solutions (points in x, times) of equations without a simple closed form, computed with NumPy."""

from __future__ import annotations

import numpy as np


def burgers(x: np.ndarray, t: np.ndarray, nu: float, nodes: int = 100) -> np.ndarray:
    """Solve u_t + u u_x = nu u_xx with u(x, 0) = -sin(pi x) by the Cole-Hopf transformation.

    Both integrals over the real line use Gauss-Hermite quadrature (Basdevant et al. 1986, equation 2.4).
    """
    at, weights = np.polynomial.hermite.hermgauss(nodes)
    found = np.empty((len(x), len(t)))
    for k, time in enumerate(t):
        if time == 0:
            found[:, k] = -np.sin(np.pi * x)
            continue
        moved = x[:, None] - np.sqrt(4 * nu * time) * at
        power = -np.cos(np.pi * moved) / (2 * np.pi * nu)
        kernel = weights * np.exp(power - power.max(axis=1, keepdims=True))
        found[:, k] = -(kernel * np.sin(np.pi * moved)).sum(axis=1) / kernel.sum(axis=1)
    return found


def allen_cahn(x: np.ndarray, t: np.ndarray, modes: int = 1000, step: float = 1e-3) -> np.ndarray:
    """Solve u_t = 0.001 u_xx + 5 (u - u^3), u(x, 0) = x^2 cos(pi x), u(-1, t) = u(1, t) = -1.

    Space is discretised by a sine series for v = u + 1, whose even derivatives vanish at both ends, and
    time by the exponential Runge-Kutta method ETDRK4 (Kassam and Trefethen 2005). The times must be multiples
    of the step.
    """
    k = np.arange(1, modes)
    linear = -0.001 * (np.pi * k / 2) ** 2 * step
    circle = linear[:, None] + np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)

    def mean(values: np.ndarray) -> np.ndarray:
        return step * values.mean(axis=1).real

    power = np.exp(circle)
    half = mean((np.exp(circle / 2) - 1) / circle)
    first = mean((-4 - circle + power * (4 - 3 * circle + circle**2)) / circle**3)
    middle = mean((2 + circle + power * (circle - 2)) / circle**3)
    last = mean((-4 - 3 * circle - circle**2 + power * (4 - circle)) / circle**3)
    decay, decay_half = np.exp(linear), np.exp(linear / 2)

    def series(v: np.ndarray) -> np.ndarray:
        """Return the sine coefficients of values at the inner nodes."""
        odd = np.concatenate([[0], v, [0], -v[::-1]])
        return -np.fft.rfft(odd).imag[1:modes] / modes

    def values(b: np.ndarray) -> np.ndarray:
        return np.fft.irfft(np.concatenate([[0], -1j * modes * b, [0]]), 2 * modes)[1:modes]

    def reaction(b: np.ndarray) -> np.ndarray:
        u = values(b) - 1
        return series(5 * (u - u**3))

    at = -1 + 2 * k / modes
    b, found = series(at**2 * np.cos(np.pi * at) + 1), np.empty((len(x), len(t)))
    basis, done = np.sin(np.outer(x + 1, np.pi * k / 2)), 0
    for column, time in enumerate(t):
        for _ in range(round(time / step) - done):
            r = reaction(b)
            p = decay_half * b + half * r
            r_p = reaction(p)
            q = decay_half * b + half * r_p
            r_q = reaction(q)
            r_s = reaction(decay_half * p + half * (2 * r_q - r))
            b = decay * b + first * r + 2 * middle * (r_p + r_q) + last * r_s
        done = round(time / step)
        found[:, column] = basis @ b - 1
    return found
