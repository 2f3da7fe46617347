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
Efficiency of Recurrent Neural Network Optimization Algorithms).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

__all__ = ["Counts", "full", "paper", "ranks"]

_FORWARD, _GRADIENT, _PRODUCT = 1, 3, 4


@dataclass(frozen=True)
class Counts:
    """What has been done so far; counts add up with `+`.

    Attributes
    ----------
    steps, cg_steps : int
        I_t and I_c of the paper; I_c stays 0 for first-order methods.
    gradients, products, losses, linearisations : int
        What was really executed: gradients and losses on the gradient batch, Gauss-Newton products and
        the forward passes they are linearised at on the curvature batch.
    """

    steps: int = 0
    cg_steps: int = 0
    gradients: int = 0
    products: int = 0
    losses: int = 0
    linearisations: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + more for mine, more in zip(astuple(self), astuple(other), strict=True)))


def paper(counts: Counts, gradient_batch: int, curvature_batch: int) -> tuple[int, int]:
    """Give (P_D, P_I) by the formulas of Krause et al. 2015.

    P_D = 3 I_t B_g + 4 I_c B_c and P_I = 3 I_t + 4 I_c.

    Examples
    --------
    >>> paper(Counts(steps=10, cg_steps=50), gradient_batch=320, curvature_batch=32)
    (16000, 230)
    """
    gradient, curvature = _GRADIENT * counts.steps, _PRODUCT * counts.cg_steps
    return gradient * gradient_batch + curvature * curvature_batch, gradient + curvature


def ranks(counts: Counts, gradient_batch: int, curvature_batch: int, size: int) -> int:
    """Give P_P, the paper's cost when `size` ranks share each batch.

    P_P = 3 I_t ceil(B_g / P) + 4 I_c ceil(B_c / P), which is P_D for P = 1 and P_I once P >= B_g, B_c. The
    speedup it predicts is P_D / P_P.
    """
    gradient = _GRADIENT * counts.steps * -(-gradient_batch // size)
    return gradient + _PRODUCT * counts.cg_steps * -(-curvature_batch // size)


def full(counts: Counts, gradient_batch: int, curvature_batch: int) -> tuple[int, int]:
    """Give (P_D, P_I) with everything that was executed.

    The paper's formulas leave out the forward passes of backtracking and line search, the product that a
    warm start needs, and the linearisation. Here a loss and a linearisation count 1, a gradient 3 and a
    product 4.

    Examples
    --------
    >>> full(Counts(gradients=1, products=6, losses=8, linearisations=1), 320, 32)
    (4320, 36)
    """
    gradient = _FORWARD * counts.losses + _GRADIENT * counts.gradients
    curvature = _FORWARD * counts.linearisations + _PRODUCT * counts.products
    return gradient * gradient_batch + curvature * curvature_batch, gradient + curvature
