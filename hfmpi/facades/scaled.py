"""A model in scaled variables: theta = scale * phi, with one scale for each array of theta.

The optimizer works only with phi. Every pass is that of the model with the Jacobian J diag(scale), so that
loss, gradient and curvature are exact for every method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.data.examples import Examples
from hfmpi.frameworks.framework import FrameworkModel
from hfmpi.models.base import Scoring
from hfmpi.models.factors import FactorSums
from hfmpi.models.linearisation import LossLinearisation, Passes
from hfmpi.optim.layout import Along, Block

__all__ = ["ScaledModel"]


class ScaledModel:
    """A framework's model as a function of phi = theta / scale; satisfies `hfmpi.models.base.Model`.

    Parameters
    ----------
    model : FrameworkModel
    scale : (D,)
        The scales, on the host: positive, and constant in every block.
    """

    linearisation = LossLinearisation

    def __init__(self, model: FrameworkModel, scale: np.ndarray) -> None:
        self.model, self._on_host = model, scale
        self.backend, self.output_loss = model.backend, model.output_loss
        self.scale = self.backend.to_device(scale)

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return self.model.size

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices of theta."""
        return self.model.blocks

    @property
    def factor_sums(self) -> FactorSums:
        """The sums of the Kronecker factors of all blocks."""
        return self.model.factor_sums

    def initial(self, seed: int) -> Array:
        """Return phi (D,), float64, for the initial parameters of the user's model; the seed is ignored."""
        return self.model.initial(seed) / self._on_host

    def release(self) -> None:
        """Release scratch memory."""
        self.model.release()

    def scoring(self, data: Examples) -> Examples:
        """Return the examples with a mask that marks the scored targets."""
        return self.model.scoring(data) if isinstance(self.model, Scoring) else data

    def check(self, phi: np.ndarray, batch: Any) -> None:
        """Raise a UserError if the model cannot be trained on batches like this one; phi is on the host."""
        self.model.check(self._on_host * phi, batch)

    def loss(self, phi: Array, batch: Any) -> float:
        """Compute the summed loss in nats, without a linearisation."""
        return self.model.loss(self.scale * phi, batch)

    def linearise(self, phi: Array, batch: Any, reuse: Any = None) -> LossLinearisation:
        """Linearise at phi (D,) on a batch; the memory of `reuse` is freed first."""
        return self._scaled(self.model.linearise(self.scale * phi, batch, reuse))

    def linearise_rows(self, phi: Array, batch: Any, reuse: Any = None) -> LossLinearisation:
        """Linearise at phi (D,) as `linearise` does, for rows of examples."""
        return self._scaled(self.model.linearise_rows(self.scale * phi, batch, reuse))

    def _scaled(self, at: LossLinearisation) -> LossLinearisation:
        return replace(at, passes=_ScaledPasses(at.passes, self.scale, self.factor_sums))


@dataclass
class _ScaledPasses:
    """Passes with the Jacobian J diag(scale); satisfies `hfmpi.models.linearisation.Passes`."""

    passes: Passes
    scale: Array
    sums: FactorSums

    @property
    def examples(self) -> int:
        """B, the number of examples."""
        return self.passes.examples

    @property
    def by_step(self) -> bool:
        """Whether the outputs are sorted by time step."""
        return self.passes.by_step

    @property
    def nbytes(self) -> int:
        """The bytes that the linearisation occupies."""
        return self.passes.nbytes

    def jvp(self, v: Array) -> Array:
        """Compute J v (N * C, O)."""
        return self.passes.jvp(v * self.scale)

    def vjp(self, u: Array, out: Array) -> None:
        """Add J' u for u (N * C, O) to out (D,) or (C, D)."""
        part = np.zeros_like(out)
        self.passes.vjp(u, part)
        out += part * self.scale

    def squares(self, u: Array, out: Array, squares: Array) -> None:
        """Add J' u for u (N, O) to out (D,), and its squares, summed over examples, to squares (D,)."""
        part, squared = np.zeros_like(out), np.zeros_like(squares)
        self.passes.squares(u, part, squared)
        out += part * self.scale
        squares += squared * self.scale**2

    def factors(self, u: Array, out: Array, sums: Array, *weights: Array) -> None:
        """Add J' u for u (N, O) to out (D,), and the sums of `hfmpi.models.factors` to sums.

        The curvature A x B of a block is multiplied by scale^2: A and B are both multiplied by scale.
        """
        part, more = np.zeros_like(out), np.zeros_like(sums)
        self.passes.factors(u, part, more, *weights)
        for block, views in zip(self.sums.blocks, self.sums.views(more)[0], strict=True):
            for factor in views.values():
                factor *= self.scale[block.start]
        out += part * self.scale
        sums += more

    def rows(self, u: Array, out: Array) -> None:
        """Write J' u of each example separately to out (B, C, D)."""
        self.passes.rows(u, out)
        out *= self.scale

    def rows_along(self, u: Array, several: int, along: Along) -> Array:
        """Compute V S' (k, B, C) for the rows S that `rows` computes from C = `several` cotangents."""
        stacks = [(part, stack * part.of(self.scale).reshape(-1)) for part, stack in along.stacks]
        return self.passes.rows_along(u, several, Along(stacks, along.scales))
