"""Parameter cotangents from those of all intermediate values: one formula, over all sequences or of each.

What is summed over steps and sequences is a product of a source (L, B, .) and a cotangent (L, B, .).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.networks.recurrence import Cell

__all__ = ["Cotangents", "Each", "Sums", "Whole", "flat", "layer_gradient"]


class Cotangents(NamedTuple):
    """What the loops over the steps of a layer read and leave, some of its sequences or all, of one column.

    Attributes
    ----------
    inputs : (L, B) or (L, B, I)
    hidden : (L + 1, B, n)
    intermediate : (L, B, n) or None
    dh : (L, B, n)
    da : (L, B, K)
    dp, dq : (L, B, n) or None
    """

    inputs: Array
    hidden: Array
    intermediate: Array | None
    dh: Array
    da: Array
    dp: Array | None
    dq: Array | None

    def of(self, sequences: slice, rows: slice) -> Cotangents:
        """Give those of some sequences, of which the cotangents have these rows."""
        kept = (self.inputs, self.hidden, self.intermediate)
        found = (self.dh, self.da, self.dp, self.dq)
        return Cotangents(
            *(None if array is None else array[:, sequences] for array in kept),
            *(None if array is None else array[:, rows] for array in found),
        )


class Sums(Protocol):
    """How products are summed; the results have a first axis more where each sequence is kept apart."""

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Sum source' cotangent, vectors (L, B, .), into out (., .)."""

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol (L, B) into its row of out (V, .)."""

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum cotangents into out (.,)."""


@dataclass(frozen=True)
class Whole:
    """Sums over steps and sequences, one large matrix product each."""

    backend: NumpyBackend

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Give out = source' cotangent."""
        self.backend.matmul(flat(source).T, flat(cotangent), out)

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol."""
        x = self.backend.xp.ascontiguousarray(symbols).reshape(-1)
        self.backend.segment_sum(flat(cotangent), x, out)

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum cotangents."""
        out[...] = self.backend.xp.sum(cotangent, axis=(0, 1))


@dataclass(frozen=True)
class Each:
    """Sums over steps, of each sequence by itself."""

    backend: NumpyBackend

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Give out[b] = source[:, b]' cotangent[:, b]."""
        out[...] = self.backend.xp.matmul(source.transpose(1, 2, 0), cotangent.transpose(1, 0, 2))

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol."""
        contiguous = self.backend.xp.ascontiguousarray
        self.backend.segment_sum_each(contiguous(cotangent), contiguous(symbols), out)

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum cotangents."""
        out[...] = self.backend.xp.sum(cotangent, axis=0)


def flat(array: Array) -> Array:
    """Give vectors (L, B, .) as rows; those of one sequence of a batch stay a strided view, fit for BLAS."""
    return array[:, 0] if array.shape[1] == 1 else array.reshape(-1, array.shape[2])


def layer_gradient(cell: Cell, own: Cotangents, g: Mapping[str, Array], sums: Sums) -> None:
    """Fill g, the parameters of a layer by their names, with their cotangents."""
    n = own.hidden.shape[2]
    source, da = own.hidden[:-1], own.da[..., : cell.of_inputs * n]
    if own.intermediate is not None:
        sums.product(source, own.dq, g["W_mh"])
        _of_inputs(own.inputs, own.dp, g["W_mx"], sums)
        source = own.intermediate
    sums.product(source, own.da[..., -cell.of_state * n :], g["W_h"])
    _of_inputs(own.inputs, da, g["W_x"], sums)
    on_rows = cell.on_rows * n
    if own.inputs.ndim == 2:  # every step has one symbol: what its rows gained is what the bias gains
        g["b"][..., :on_rows] = np.sum(g["W_x"][..., :on_rows], axis=-2)
    else:
        sums.total(da[..., :on_rows], g["b"][..., :on_rows])
    if cell.on_rows < cell.groups:
        sums.total(cell.bias_cotangent(own.hidden[1:], own.dh, own.da), g["b"][..., on_rows:])


def _of_inputs(inputs: Array, cotangent: Array | None, out: Array, sums: Sums) -> None:
    if inputs.ndim == 2:
        sums.rows(inputs, cotangent, out)
    else:
        sums.product(inputs, cotangent, out)
