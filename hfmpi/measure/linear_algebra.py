"""Count the cost of dense linear algebra: floating point operations, and sequential steps.

================  ==============================  =====  ================================================
                  operations                      depth
================  ==============================  =====  ================================================
product           2 m k n                         1      (m, k) times (k, n)
gram              m^2 n                           1      A A' of A (m, n): half of a product, by symmetry
cholesky          n^3 / 3                         n      section 4.2.5
triangular_solve  n^2 for each right-hand side    n      section 3.1
qr                8 n^3 / 3                       2 n    Householder: 4/3 n^3 for R, as many for Q; 5.2.2
eigh              9 n^3                           2 n    symmetric QR algorithm with vectors; section 8.3
================  ==============================  =====  ================================================

The sections are those of Golub and Van Loan, Matrix Computations, 4th edition. The leading terms are counted,
for real numbers of any precision. NumPy calls LAPACK's divide-and-conquer method for eigenvalues, which needs
fewer operations than are counted here.

A product of matrices of any size has depth 1, as in the forward pass of a network. Factorisations eliminate
the columns sequentially, in n steps. The reflections of a QR decomposition are n steps, and their product Q
takes n more steps. The reduction of a symmetric matrix to a tridiagonal one is n steps; the following QR
sweeps, about two for each eigenvalue, overlap and count as n more steps.

All functions return `Counts`. Sequential work is added with `+`; `together` is for simultaneous work.
"""

from __future__ import annotations

from collections.abc import Iterable

from hfmpi.measure.cost import Counts

__all__ = ["cholesky", "eigh", "gram", "product", "qr", "repeated", "together", "triangular_solve"]


def product(m: int, k: int, n: int = 1) -> Counts:
    """Return the cost of a matrix (m, k) times a matrix (k, n), by default times a vector."""
    return Counts(operations=2 * m * k * n, depth=1)


def gram(m: int, n: int) -> Counts:
    """Return the cost of A A' (m, m) of a matrix A (m, n)."""
    return Counts(operations=m * m * n, depth=1)


def cholesky(n: int) -> Counts:
    """Return the cost of the Cholesky decomposition of a matrix (n, n)."""
    return Counts(operations=-(-(n**3) // 3), depth=n)


def triangular_solve(n: int, columns: int = 1) -> Counts:
    """Return the cost of solving with a triangular matrix (n, n) for right-hand sides (n, columns)."""
    return Counts(operations=n * n * columns, depth=n)


def qr(n: int) -> Counts:
    """Return the cost of the QR decomposition of a matrix (n, n), with Q."""
    return Counts(operations=-(-8 * n**3 // 3), depth=2 * n)


def eigh(n: int) -> Counts:
    """Return the cost of the eigenvalues and eigenvectors of a symmetric matrix (n, n)."""
    return Counts(operations=9 * n**3, depth=2 * n)


def repeated(work: Counts, times: int) -> Counts:
    """Return the cost of work that is repeated sequentially."""
    return Counts(operations=times * work.operations, depth=times * work.depth)


def together(works: Iterable[Counts]) -> Counts:
    """Return the cost of simultaneous work: all operations, and the longest depth.

    Examples
    --------
    >>> together([product(2, 3, 4), cholesky(6)]).depth
    6
    """
    works = list(works)
    depth = max((work.depth for work in works), default=0)
    return Counts(operations=sum(work.operations for work in works), depth=depth)
