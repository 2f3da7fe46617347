"""SOAP-Muon: SOAP with Nesterov's look-ahead and steps that are orthogonalised for the hidden matrices.

    M  <- beta1 M + (1 - beta1) G,    N = beta1 M + (1 - beta1) G
    P  = Q_L ((Q_L' N Q_R) / (sqrt(V) + epsilon)) Q_R'           (SOAP, hfmpi.optim.soap)
    P  <- scale orthogonal(P) in the rows of a hidden state      (Muon, hfmpi.optim.muon)

The step is -rate P. Applying Muon to the step of SOAP is from Vyas et al., Improving SOAP using iterative
whitening and Muon (2025, nikhilvyas.github.io/SOAP_Muon.pdf). The method has held the records for the fewest
steps at a fixed batch since May 2026, with new eigenvectors in every step since June
(github.com/KellerJordan/modded-nanogpt, records/track_3_optimization, results 14 and 44, pull requests 278
and 321). As in the records, only hidden matrices are orthogonalised, not the matrices that act on symbols or
compute the outputs. There are three differences from the records: V is SOAP's running mean of the squares of
G', not of those of Q_L' N Q_R; the eigenvectors include the current gradient, not only the previous ones; and
the other parameters are updated by SOAP, not by Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

from hfmpi.measure.cost import Counts
from hfmpi.measure.linear_algebra import together
from hfmpi.optim.layout import Block, Vector
from hfmpi.optim.muon import NewtonSchulzSteps, orthogonal, orthogonalisation
from hfmpi.optim.soap import SOAP, Nesterov, Refresh
from hfmpi.settings import POSITIVE, Meaning, documented

__all__ = ["SOAPMuon"]


@documented
@dataclass(frozen=True)
class SOAPMuon(SOAP):
    """SOAP on the blocks of theta, with orthogonal steps in the matrices from hidden state to hidden state.

    These are the rows of a block with one kind of inputs, if there are as many inputs as a gate has outputs:
    W_h of all gates, and a layer from one hidden state to another one of the same size. Without such matrices
    the steps are those of SOAP with Nesterov's look-ahead. The default `refresh=1` recomputes the
    eigenvectors in every update, as in the records (see the module's docstring).

    Examples
    --------
    >>> optimizer = hfmpi.SOAPMuon(rate=0.15)  # doctest: +SKIP
    >>> result = hfmpi.train(model, data, optimizer=optimizer, max_steps=1000)  # doctest: +SKIP
    """

    _name: ClassVar[str] = "soap-muon"

    refresh: Refresh = 1
    nesterov: Nesterov = True
    scale: Annotated[
        float,
        POSITIVE,
        Meaning("Scale of the orthogonal steps: their singular values are about this number times the rate."),
    ] = 3.0
    newton_schulz_steps: NewtonSchulzSteps = 5

    def _finished(self, block: Block, step: Vector) -> Vector:
        for top, bottom in _hidden(block):
            rows = step[top:bottom]
            rows[...] = step.dtype.type(self.scale) * orthogonal(rows, self.newton_schulz_steps)
        return step

    def _finishing(self, block: Block) -> Counts:
        return together(
            orthogonalisation(bottom - top, block.columns, self.newton_schulz_steps)
            for top, bottom in _hidden(block)
        )


def _hidden(block: Block) -> list[tuple[int, int]]:
    """Return the row ranges (from, to) of a block with one kind of inputs, as many as a gate has outputs."""
    width = block.columns // block.groups
    edges = pairwise((0, *block.cuts, block.rows))
    return [(top, bottom) for top, bottom in edges if 1 < bottom - top == width]
