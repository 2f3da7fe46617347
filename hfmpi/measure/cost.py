"""Count the cost of a run in the paper's unit: the forward pass of one sequence.

================  ================================================================================
I_t               optimizer steps
I_c               conjugate gradient iterations, the total over all steps
B_g, B_c          sequences in the batch of the gradient and of the curvature
P_D               cost on one rank that processes all sequences sequentially
P_I               cost on as many ranks as there are sequences
P_P               cost on P ranks, between the two
================  ================================================================================

A gradient counts as three forward passes, a Gauss-Newton product as four (Krause et al. 2015, On the
Efficiency of Recurrent Neural Network Optimization Algorithms). A product consists of J v and J' u, each of
which counts as two; a projection V G V' needs only J V and counts as two.

Independent vectors in one pass count once if the hardware processes all of them at once (P_I), and
separately if it does not (P_D, P_P). The methods of the paper have one vector per pass.

This applies to adjoints too. The rows of K segments of each example (hfmpi.optim.rows) are K simultaneous
adjoint passes after one forward pass. They count 3 in P_I and (1 + 2 K) B_g in P_D, and on P ranks K B_g
replaces B_g in the adjoint part. The adjoint passes of a sketch over the curvature batch run at the same
time: K' segments count 2 K' B_c in P_D and nothing in P_I. One row per example is an intermediate result of
the gradient, K = 1. This extends the paper, which runs only sequences in parallel: if the segments were
sequential, P_I would be 1 + 2 K. P_D could be (2 + K) B_g if each adjoint started at the end of its segment;
hfmpi starts all of them at the end of the sequence.

The `full` account also includes the linear algebra of the optimizer, in the same unit (`ForwardPass`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import NamedTuple

from hfmpi.measure.spans import FORWARD, GRADIENT, LINE_SEARCH, LINEARISE, PRODUCTS, ROWS

__all__ = ["COUNTS", "PASSES", "Counts", "ForwardPass", "Pass", "executed", "full", "paper", "ranks"]


class ForwardPass(NamedTuple):
    """The unit of linear algebra: the cost of the forward pass of one sequence.

    A parameter counts one multiplication and one addition in each step, so that a pass of L steps has about
    2 D L operations. Its depth is the number of its sequential matrix products.

    Attributes
    ----------
    operations : int
        Floating point operations, additions and multiplications; at least 1.
    depth : int
        At least 1.
    """

    operations: int
    depth: int


class Pass(NamedTuple):
    """A kind of pass, declared at the field of `Counts` that counts it.

    Products with rows are a kind too, because the ranks share them and sum a message after each of them. They
    do not count as forward passes: their work is in `Counts.operations` and `Counts.depth`.

    Attributes
    ----------
    name : str
    cost : int
        The cost in forward passes.
    on_gradient : bool
        Whether it is over the gradient batch; otherwise it is over the curvature batch.
    spans : tuple of str
        The spans of a timer to which its time belongs.
    paper : str
        The count that the formulas of the paper use instead; empty if they omit this kind.
    further : str
        The count of the vectors after the first of each pass; empty if a pass has one vector.
    shared : int
        The part of the cost that all vectors of a pass share: adjoints have one forward pass.
    beside : str
        The count of vectors of passes over the curvature batch that run at the same time as this pass.
    """

    name: str
    cost: int
    on_gradient: bool
    spans: tuple[str, ...]
    paper: str = ""
    further: str = ""
    shared: int = 0
    beside: str = ""


def _count(words: str, kind: Pass | None = None) -> int:
    """Declare a count, its name in tables, and the kind of pass that it counts."""
    return field(default=0, metadata={"words": words, "pass": kind})


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The work that was executed, in one step or since the start; `+` adds counts.

    Attributes
    ----------
    steps, cg_steps : int
        I_t and I_c of the paper; I_c is 0 for first-order methods. An optimizer does not count `steps`.
    gradients, losses : int
        Passes over the gradient batch.
    linearisations, products, projections : int
        Passes over the curvature batch. A linearisation that the forward pass of the gradient provides
        (`Objectives.shared`) is not counted.
    bends : int
        Second derivatives of the outputs along a step, over the gradient batch.
    candidates, directions, adjoints : int
        Vectors after the first of each loss, of each projection or model from a sketch, and of each adjoint
        pass of rows: an example with C rows has C cotangents, which are independent of one another
        (hfmpi.optim.rows). A model from a sketch needs no separate pass for each direction.
    sketches : int
        Adjoint passes of a sketch over the curvature batch, one for each segment of an example.
    row_products : int
        Products with the rows of the gradient batch, of any kind (`RowMatrix`).
    operations : int
        Floating point operations of the optimizer's linear algebra: products of matrices, Cholesky, QR and
        eigenvalue decompositions. Element-wise operations and inner products of vectors are not counted.
    depth : int
        Sequential steps of the linear algebra (hfmpi.measure.linear_algebra).
    """

    steps: int = 0
    gradients: int = _count(
        "gradients", Pass("gradient", 3, True, (FORWARD, GRADIENT), "steps", "adjoints", 1, "sketches")
    )
    losses: int = _count("losses", Pass("loss", 1, True, (LINE_SEARCH,), "", "candidates"))
    linearisations: int = _count("linearisations", Pass("linearisation", 1, False, (LINEARISE,)))
    products: int = _count("curvature products", Pass("product", 4, False, (PRODUCTS,), "cg_steps"))
    projections: int = _count(
        "projections", Pass("projection", 2, False, (PRODUCTS,), "projections", "directions")
    )
    bends: int = _count("second derivatives", Pass("bend", 6, True, (LINEARISE, PRODUCTS)))
    candidates: int = _count("candidates")
    directions: int = _count("directions")
    adjoints: int = _count("adjoints")
    sketches: int = _count("adjoints of a sketch", Pass("sketch", 0, False, (PRODUCTS,)))
    row_products: int = _count("products with rows", Pass("row product", 0, True, (ROWS,)))
    cg_steps: int = _count("CG iterations")
    operations: int = _count("operations of linear algebra")
    depth: int = _count("sequential steps of linear algebra")

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{each.name: self[each.name] + other[each.name] for each in fields(self)})

    def __getitem__(self, name: str) -> int:
        """Return the count of this name; 0 for an empty name."""
        number: int = getattr(self, name) if name else 0
        return number


COUNTS: dict[str, str] = {f.name: f.metadata["words"] for f in fields(Counts) if f.metadata}
"""The counts of a step, and their names in tables."""

PASSES: dict[str, Pass] = {f.name: kind for f in fields(Counts) if (kind := f.metadata.get("pass"))}
"""The kinds of passes, by the name of their count."""


def paper(counts: Counts, gradient_batch: int, curvature_batch: int) -> tuple[int, int]:
    """Compute (P_D, P_I) by the formulas of Krause et al. 2015.

    P_D = 3 I_t B_g + 4 I_c B_c and P_I = 3 I_t + 4 I_c. For methods that are not in the paper, the same rule
    adds 2 for each projection, and to P_D also 2 for each further direction, for each further adjoint, and
    for each adjoint of a sketch.

    Examples
    --------
    >>> paper(Counts(steps=10, cg_steps=50), gradient_batch=320, curvature_batch=32)
    (16000, 230)
    """
    return _totals(_passes(counts, gradient_batch, curvature_batch, executed=False))


def ranks(counts: Counts, gradient_batch: int, curvature_batch: int, size: int) -> int:
    """Compute P_P, the paper's cost when `size` ranks share each batch.

    P_P = 3 I_t ceil(B_g / P) + 4 I_c ceil(B_c / P), which is P_D for P = 1 and P_I for P >= B_g, B_c. The
    predicted speedup is P_D / P_P. If a pass has C vectors, C B_c replaces B_c; if it has C adjoints, C B_g
    replaces B_g in two thirds of the gradient.
    """
    passes = _passes(counts, gradient_batch, curvature_batch, executed=False)
    return sum(cost * count * -(-sequences // (count * size)) for cost, count, sequences in passes)


def executed(counts: Counts, gradient_batch: int, curvature_batch: int) -> tuple[int, int]:
    """Compute (P_D, P_I) of all passes that were executed.

    The paper's formulas omit the forward passes of backtracking and line search, the product that a warm
    start needs, and the linearisation. Here a loss and a linearisation count 1, a gradient 3, a projection 2
    and a product 4. P_D counts every further vector of a pass like the first, except that a further adjoint
    and each adjoint of a sketch count 2.

    Examples
    --------
    >>> executed(Counts(gradients=1, products=6, losses=8, linearisations=1), 320, 32)
    (4320, 36)
    """
    return _totals(_passes(counts, gradient_batch, curvature_batch, executed=True))


def full(counts: Counts, gradient_batch: int, curvature_batch: int, unit: ForwardPass) -> tuple[int, int]:
    """Compute (P_D, P_I) of everything that was executed: all passes and the linear algebra.

    P_D includes the operations of the linear algebra divided by those of a forward pass, P_I its depth
    divided by that of a forward pass; each quotient is rounded up once.

    Examples
    --------
    >>> full(Counts(gradients=1, operations=15_000, depth=250), 320, 32, ForwardPass(2_000, 100))
    (968, 6)
    """
    p_d, p_i = executed(counts, gradient_batch, curvature_batch)
    return p_d - -counts.operations // unit.operations, p_i - -counts.depth // unit.depth


def _passes(
    counts: Counts, gradient_batch: int, curvature_batch: int, executed: bool
) -> list[tuple[int, int, int]]:
    """Return cost, number and sequences of each kind of pass, as executed or as the paper counts them.

    A kind with a shared part has two entries.
    """
    passes = []
    for name, kind in PASSES.items():
        if count := counts[name if executed else kind.paper]:
            batch = gradient_batch if kind.on_gradient else curvature_batch
            sequences = (count + counts[kind.further]) * batch + counts[kind.beside] * curvature_batch
            passes.append((kind.cost - kind.shared, count, sequences))
            if kind.shared:
                passes.append((kind.shared, count, count * batch))
    return passes


def _totals(passes: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Compute (P_D, P_I)."""
    p_d = sum(cost * sequences for cost, _, sequences in passes)
    return p_d, sum(cost * count for cost, count, _ in passes)
