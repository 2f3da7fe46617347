"""What a run costs, in the paper's unit: the forward pass of one sequence.

================  ================================================================================
I_t               optimizer steps
I_c               conjugate gradient iterations, the total over all steps
B_g, B_c          sequences in the batch of the gradient and of the curvature
P_D               cost on one rank, all sequences one after the other
P_I               cost on as many ranks as there are sequences
P_P               cost on P ranks, between the two
================  ================================================================================

A gradient counts as three forward passes, a Gauss-Newton product as four (Krause et al. 2015, On the
Efficiency of Recurrent Neural Network Optimization Algorithms). A product is J v and then J' u, two each; a
projection V G V' needs J V alone and counts two.

Independent vectors in one pass count once where there is hardware for all of them (P_I), and each for itself
where there is not (P_D, P_P). The paper's own methods have one vector a pass.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

__all__ = ["Counts", "full", "paper", "ranks"]

_FORWARD, _GRADIENT, _PRODUCT, _PROJECTION = 1, 3, 4, 2


@dataclass(frozen=True)
class Counts:
    """What has been done so far; counts add up with `+`.

    Attributes
    ----------
    steps, cg_steps : int
        I_t and I_c of the paper; I_c stays 0 for first-order methods.
    gradients, products, losses, linearisations : int
        What was really executed: gradients and losses on the gradient batch, Gauss-Newton products and
        the forward passes they are linearised at on the curvature batch, where those are not the gradient's.
    projections : int
        J V for a projection, on the curvature batch.
    candidates, columns, directions : int
        Vectors beyond the first of each loss, product and projection, in the same passes.
    """

    steps: int = 0
    cg_steps: int = 0
    gradients: int = 0
    products: int = 0
    losses: int = 0
    linearisations: int = 0
    projections: int = 0
    candidates: int = 0
    columns: int = 0
    directions: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))


def paper(counts: Counts, gradient_batch: int, curvature_batch: int) -> tuple[int, int]:
    """Give (P_D, P_I) by the formulas of Krause et al. 2015.

    P_D = 3 I_t B_g + 4 I_c B_c and P_I = 3 I_t + 4 I_c, and for methods that the paper has not, by the same
    rule: 2 for each projection, and in P_D for each further direction 2 and for each further column 4.

    Examples
    --------
    >>> paper(Counts(steps=10, cg_steps=50), gradient_batch=320, curvature_batch=32)
    (16000, 230)
    """
    gradient = _GRADIENT * counts.steps
    curvature = _PRODUCT * counts.cg_steps + _PROJECTION * counts.projections
    return gradient * gradient_batch + (curvature + _beside(counts)) * curvature_batch, gradient + curvature


def ranks(counts: Counts, gradient_batch: int, curvature_batch: int, size: int) -> int:
    """Give P_P, the paper's cost when `size` ranks share each batch.

    P_P = 3 I_t ceil(B_g / P) + 4 I_c ceil(B_c / P), which is P_D for P = 1 and P_I once P >= B_g, B_c. The
    speedup it predicts is P_D / P_P. Where a pass has C vectors, C B_c takes the place of B_c.
    """
    return (
        _GRADIENT * counts.steps * -(-gradient_batch // size)
        + _PRODUCT * _rounds(counts.cg_steps, counts.columns, curvature_batch, size)
        + _PROJECTION * _rounds(counts.projections, counts.directions, curvature_batch, size)
    )


def _rounds(passes: int, beside: int, batch: int, size: int) -> int:
    """Give the forward passes, of one sequence and vector, that each of `size` ranks does after the other."""
    return passes * -(-(passes + beside) * batch // (passes * size)) if passes else 0


def full(counts: Counts, gradient_batch: int, curvature_batch: int) -> tuple[int, int]:
    """Give (P_D, P_I) with everything that was executed.

    The paper's formulas leave out the forward passes of backtracking and line search, the product that a
    warm start needs, and the linearisation. Here a loss and a linearisation count 1, a gradient 3, a
    projection 2 and a product 4; and in P_D every further vector of a pass as much again.

    Examples
    --------
    >>> full(Counts(gradients=1, products=6, losses=8, linearisations=1), 320, 32)
    (4320, 36)
    """
    gradient = _FORWARD * counts.losses + _GRADIENT * counts.gradients
    curvature = _FORWARD * counts.linearisations + _PRODUCT * counts.products
    curvature += _PROJECTION * counts.projections
    p_d = (gradient + _FORWARD * counts.candidates) * gradient_batch
    p_d += (curvature + _beside(counts)) * curvature_batch
    return p_d, gradient + curvature


def _beside(counts: Counts) -> int:
    """Give the cost of the vectors beyond the first of each pass, for one sequence of the curvature batch."""
    return _PRODUCT * counts.columns + _PROJECTION * counts.directions
