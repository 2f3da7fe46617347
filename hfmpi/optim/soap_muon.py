"""SOAP-Muon: SOAP with Nesterov's look-ahead, whose step is made orthogonal in the recurrent matrices.

    M  <- beta1 M + (1 - beta1) G,    N = beta1 M + (1 - beta1) G
    P  = Q_L ((Q_L' N Q_R) / (sqrt(V) + epsilon)) Q_R'           (SOAP, hfmpi.optim.soap)
    P  <- scale orthogonal(P) in every square part of a block    (Muon, hfmpi.optim.muon)

and the step is -rate P. SOAP before Muon is due to Vyas (nikhilvyas.github.io/SOAP_Muon.pdf). It holds the
records for the fewest steps at a fixed batch since May 2026, with new eigenvectors at every step since June
(github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, results 14 and 44, pull requests 278
and 321). As there, only hidden matrices are made orthogonal, not what acts on symbols or yields the outputs.
What differs: V is SOAP's mean of squares of G', where the records have that of Q_L' N Q_R, the eigenvectors
are those of this gradient and not of the one before, and the other parameters are SOAP's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import together
from hfmpi.optim.layout import Block, Vector
from hfmpi.optim.muon import orthogonal, orthogonalisation
from hfmpi.optim.reduced_model import Part, parts_of
from hfmpi.optim.soap import SOAP
from hfmpi.settings import POSITIVE, at_least

__all__ = ["SOAPMuon"]


@dataclass(frozen=True)
class SOAPMuon(SOAP):
    """SOAP on the blocks of theta, with orthogonal steps in their square parts.

    A part has one kind of inputs and one of outputs. That of each gate from the hidden state is square, and
    so is a layer from one hidden state to another one of the same size. A model without such parts has
    SOAP's steps, with Nesterov's look-ahead.

    Attributes
    ----------
    refresh : int
        As in SOAP. The records: 1.
    scale : float
        Length of the orthogonal steps: their singular values are about `scale` times the rate.
    newton_schulz_steps : int
        As in Muon.
    rate, beta1, beta2, epsilon, factor_decay, longest_side, nesterov
        See `SOAP`.
    decay, averaging, schedule, schedule_steps, schedule_end, warm_up
        See `Adaptive` and `Schedule`.
    """

    _name: ClassVar[str] = "soap-muon"

    refresh: Annotated[int, at_least(1)] = 1
    nesterov: bool = True
    scale: Annotated[float, POSITIVE] = 3.0
    newton_schulz_steps: Annotated[int, at_least(1)] = 5

    def _finished(self, block: Block, step: Vector) -> Vector:
        for part in _square(block):
            view = step[part.top : part.bottom, part.left : part.right]
            view[...] = step.dtype.type(self.scale) * orthogonal(view, self.newton_schulz_steps)
        return step

    def _finishing(self, block: Block) -> Counts:
        return together(
            orthogonalisation(part.bottom - part.top, part.right - part.left, self.newton_schulz_steps)
            for part in _square(block)
        )


def _square(block: Block) -> list[Part]:
    """Return the parts of a block that are square matrices."""
    return [part for part in parts_of([block]) if 1 < part.bottom - part.top == part.right - part.left]
