"""The decompositions of K-FAC and SOAP on one core, and warm starts from the last eigenvectors.

    python examples/benchmarks/eigenbases.py [--sides 692 2224] [--drift 0.1] [--repeats 3]

Times are process times of one thread, medians in ms. The matrices are covariances of samples with variances
from 1 to 1e-6, like the factors of a trained network. "Warm starts" begin with the eigenvectors of the
previous step's matrix; the new matrix is (1 - drift) times the previous one plus drift times an independent
one. The last column is the relative error of (A + 1e-4)^-1 x, the work for which K-FAC needs eigenvalues.

- Orthogonal iteration: Q is the factor Q of A Q, and the eigenvalues are the diagonal of Q' A Q (SOAP).
- Refinement: Ogita and Aishima 2018, Iterative refinement for symmetric eigenvalue decomposition, algorithm
  1: four products, with quadratic convergence from eigenvectors that are close.
"""

import argparse
from statistics import median
from time import process_time

import numpy as np
from scipy import linalg
from scipy.linalg import lapack
from threadpoolctl import threadpool_limits

from hfmpi.measure import machine
from hfmpi.optim.matrices import eigensystem, orthonormal, positive_solution

GAMMA = 1e-4


def covariance(n, seed):
    """Return the covariance of 2 n samples in n dimensions; its directions depend on n alone."""
    directions = linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0] * np.logspace(0, -3, n)
    samples = directions @ np.random.default_rng(seed).standard_normal((n, 2 * n))
    return samples @ samples.T / (2 * n)


def iterated(matrix, vectors):
    """Return eigenvalues and eigenvectors after one orthogonal iteration."""
    vectors = orthonormal(matrix @ vectors)
    return np.einsum("ij,ij->j", vectors, matrix @ vectors), vectors


def refined(matrix, vectors):
    """Return eigenvalues and eigenvectors after one step of refinement."""
    r = np.eye(len(matrix)) - vectors.T @ vectors
    s = vectors.T @ (matrix @ vectors)
    values = np.diag(s) / (1 - np.diag(r))
    size = np.linalg.norm(s - np.diag(values)) + np.linalg.norm(matrix, 1) * np.linalg.norm(r)
    gaps = values - values[:, None]
    apart = np.abs(gaps) > 2 * size
    e = np.where(apart, (s + values * r) / np.where(apart, gaps, 1.0), r / 2)
    return values, vectors + vectors @ e


def contestants(n, drift):
    """Return the functions by name, and the errors of those that compute eigenvalues."""
    before, other = covariance(n, 1), covariance(n, 2)
    matrix = (1 - drift) * before + drift * other
    single, start = matrix.astype(np.float32), linalg.eigh(before)[1]
    x = np.random.default_rng(0).standard_normal(n)
    work = int(lapack.dsytrd_lwork(n, lower=1)[0])
    reflectors, _, _, tau, _ = lapack.dsytrd(matrix, lower=1, lwork=work)
    below = reflectors[1:, :-1].copy(order="F")
    functions = {
        "numpy.linalg.eigh, float64": lambda: np.linalg.eigh(matrix),
        "in place, float64": lambda: eigensystem(matrix),
        "in place, float32 (K-FAC)": lambda: eigensystem(single),
        "to tridiagonal form, float64": lambda: lapack.dsytrd(matrix, lower=1, lwork=work),
        "its transformation as a matrix": lambda: lapack.dorgqr(below, tau, lwork=64 * n),
        "QR, float64": lambda: orthonormal(matrix.copy()),
        "QR, float32 (SOAP)": lambda: orthonormal(single.copy()),
        "a system by LU, float64": lambda: np.linalg.solve(matrix, x),
        "the same by Cholesky factors (biases)": lambda: positive_solution(matrix, 1.0, GAMMA, x[None]),
        "warm start: orthogonal iteration, float32": lambda: iterated(single, start.astype(np.float32)),
        "warm start: orthogonal iteration, float64": lambda: iterated(matrix, start),
        "warm start: refinement, float64": lambda: refined(matrix, start),
    }

    def solution(pair):
        values, vectors = (part.astype(float) for part in pair)
        return vectors @ ((vectors.T @ x) / (np.maximum(values, 0) + GAMMA))

    right = np.linalg.solve(matrix + GAMMA * np.eye(n), x)
    errors = {
        name: np.linalg.norm(solution(function()) - right) / np.linalg.norm(right)
        for name, function in functions.items()
        if name.startswith(("numpy", "in place", "warm"))
    }
    return functions, errors


def main():
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[692, 2224])
    parser.add_argument("--drift", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(machine.processor(), machine.versions("hfmpi", "numpy", "scipy"), sep=", ")
    print("| side | work | ms | error |\n| --- | --- | --- | --- |")
    for n in given.sides:
        functions, errors = contestants(n, given.drift)
        times = {name: [] for name in functions}
        for _ in range(given.repeats):
            for name, function in functions.items():
                start = process_time()
                function()
                times[name].append(1e3 * (process_time() - start))
        for name, each in times.items():
            error = f"{errors[name]:.1e}" if name in errors else ""
            print(f"| {n:,} | {name} | {median(each):,.1f} | {error} |", flush=True)


if __name__ == "__main__":
    with threadpool_limits(limits=1, user_api="blas"):
        main()
