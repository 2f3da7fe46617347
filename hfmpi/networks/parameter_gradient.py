"""Parameter cotangents from the cotangents of a layer: one formula, for a batch or for each sequence.

They are sums over steps and sequences of products of a source (L, B, .) and a cotangent (L, B, .).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.networks.recurrence import Cell

__all__ = ["BatchSums", "Cotangents", "SequenceSums", "Sums", "flat", "layer_gradient"]


class Cotangents(NamedTuple):
    """The sources and cotangents of a layer, for B sequences and C directions.

    Attributes
    ----------
    inputs : (L, B) or (L, B, I)
    hidden : (L + 1, B, n)
    intermediate : (L, B, n) or None
    dh : (L, B C, n)
    da : (L, B C, K)
    dp, dq : (L, B C, n) or None
    """

    inputs: Array
    hidden: Array
    intermediate: Array | None
    dh: Array
    da: Array
    dp: Array | None
    dq: Array | None

    def of(self, sequences: slice, rows: slice) -> Cotangents:
        """Return the arrays of some sequences, with these rows of their cotangents."""
        sources = (self.inputs, self.hidden, self.intermediate)
        cotangents = (self.dh, self.da, self.dp, self.dq)
        return Cotangents(
            *(None if array is None else array[:, sequences] for array in sources),
            *(None if array is None else array[:, rows] for array in cotangents),
        )


class Sums(Protocol):
    """A way to sum products; results of `SequenceSums` have a first axis for the sequences."""

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Sum source' cotangent, vectors (L, B, .), into out (., .)."""

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol (L, B) into its row of out (V, .)."""

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum cotangents into out (.,)."""


@dataclass(frozen=True)
class BatchSums:
    """Sums over steps and sequences, each as one large matrix product."""

    backend: NumpyBackend

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Fill out with source' cotangent."""
        self.backend.matmul(flat(source).T, flat(cotangent), out)

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol."""
        x = self.backend.xp.ascontiguousarray(symbols).reshape(-1)
        self.backend.segment_sum(flat(cotangent), x, out)

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum cotangents."""
        out[...] = self.backend.xp.sum(cotangent, axis=(0, 1))


@dataclass(frozen=True)
class SequenceSums:
    """Sums over the steps of each sequence."""

    backend: NumpyBackend

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Fill out[b] with source[:, b]' cotangent[:, b]."""
        out[...] = self.backend.xp.matmul(source.transpose(1, 2, 0), cotangent.transpose(1, 0, 2))

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol."""
        contiguous = self.backend.xp.ascontiguousarray
        self.backend.segment_sum_each(contiguous(cotangent), contiguous(symbols), out)

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum cotangents."""
        out[...] = self.backend.xp.sum(cotangent, axis=0)


def flat(array: Array) -> Array:
    """Return vectors (L, B, .) as rows (L B, .); for one sequence as a strided view, which BLAS accepts."""
    return array[:, 0] if array.shape[1] == 1 else array.reshape(-1, array.shape[2])


def layer_gradient(cell: Cell, layer: Cotangents, g: Mapping[str, Array], sums: Sums) -> None:
    """Fill g with the cotangents of the parameters of a layer, by their names in the cell."""
    n = layer.hidden.shape[2]
    source, da = layer.hidden[:-1], layer.da[..., : cell.of_inputs * n]
    if layer.intermediate is not None:
        sums.product(source, layer.dq, g["W_mh"])
        _of_inputs(layer.inputs, layer.dp, g["W_mx"], sums)
        source = layer.intermediate
    sums.product(source, layer.da[..., -cell.of_state * n :], g["W_h"])
    _of_inputs(layer.inputs, da, g["W_x"], sums)
    on_rows = cell.on_rows * n
    if layer.inputs.ndim == 2:  # every step has one symbol, so the rows of W_x add up to the bias
        g["b"][..., :on_rows] = np.sum(g["W_x"][..., :on_rows], axis=-2)
    else:
        sums.total(da[..., :on_rows], g["b"][..., :on_rows])
    if cell.on_rows < cell.groups:
        sums.total(cell.bias_cotangent(layer.hidden[1:], layer.dh, layer.da), g["b"][..., on_rows:])


def _of_inputs(inputs: Array, cotangent: Array | None, out: Array, sums: Sums) -> None:
    if inputs.ndim == 2:
        sums.rows(inputs, cotangent, out)
    else:
        sums.product(inputs, cotangent, out)
