"""Parameter cotangents from the cotangents of a layer, by the same formula for a batch and for each sequence.

They are sums over steps and sequences of products of a source (L, B, .) and a cotangent (L, B, .).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.networks.recurrence import Cell

__all__ = ["BatchSums", "Cotangents", "SequenceSums", "Sums", "flat", "layer_gradient"]


Change = Callable[[Array], Array]


class Cotangents(NamedTuple):
    """The sources and cotangents of a layer, for B sequences and C directions.

    `by_sequence` adds a separate axis for directions, which has length 1 in the vectors of sources.

    Attributes
    ----------
    inputs : (L, B) or (L, B, I)
    hidden : (L + 1, B, n)
    intermediate : (L, B, n) or None
    read : (L, B, n)
        The states that the next layer or the output layer reads.
    dh : (L, B C, n)
    da : (L, B C, K)
    dp, dq : (L, B C, n) or None
    """

    inputs: Array
    hidden: Array
    intermediate: Array | None
    read: Array
    dh: Array
    da: Array
    dp: Array | None
    dq: Array | None

    def _map(self, of_source: Change, of_cotangent: Change) -> Cotangents:
        return Cotangents(
            *(None if array is None else of_source(array) for array in self[:4]),
            *(None if array is None else of_cotangent(array) for array in self[4:]),
        )

    def of_rows(self, rows: slice) -> Cotangents:
        """Return the sources with some rows of the cotangents."""
        return self._map(lambda source: source, lambda cotangent: cotangent[:, rows])

    def by_sequence(self) -> Cotangents:
        """Return vectors as (L, B, 1, .) and cotangents as (L, B, C, .); symbols remain (L, B)."""
        sequences = self.inputs.shape[1]
        return self._map(
            lambda source: source if source.ndim == 2 else source[:, :, None],
            lambda cotangent: cotangent.reshape(len(cotangent), sequences, -1, cotangent.shape[2]),
        )

    def of(self, sequences: slice, columns: slice) -> Cotangents:
        """Select some sequences and directions from a result of `by_sequence`."""
        return self._map(lambda source: source[:, sequences], lambda array: array[:, sequences, columns])


class Sums(Protocol):
    """A method to sum products of a source and a cotangent, vectors (L, B, .)."""

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Sum source' cotangent into out (., .)."""

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol (L, B) into its row of out (V, .)."""

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of all steps into out (.,)."""


@dataclass(frozen=True)
class BatchSums:
    """Sums over steps and sequences, each as one large matrix product."""

    backend: NumpyBackend

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Fill out with source' cotangent."""
        self.backend.matmul(flat(source).T, flat(cotangent), out)

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol over all steps and sequences into its row of out (V, .)."""
        x = self.backend.xp.ascontiguousarray(symbols).reshape(-1)
        self.backend.segment_sum(flat(cotangent), x, out)

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum the cotangents over all steps and sequences into out (.,)."""
        out[...] = self.backend.xp.sum(cotangent, axis=(0, 1))


@dataclass(frozen=True)
class SequenceSums:
    """Sums over the steps of each sequence and direction.

    Sources are (L, B, 1, .) or symbols (L, B), cotangents (L, B, C, .), and results have the first axes B, C.
    """

    backend: NumpyBackend

    def product(self, source: Array, cotangent: Array, out: Array) -> None:
        """Fill out[b, c] with source[:, b, 0]' cotangent[:, b, c]."""
        if len(source):
            pairs = source.transpose(1, 2, 3, 0), cotangent.transpose(1, 2, 0, 3)
            out[...] = self.backend.xp.matmul(*pairs)
        else:
            out[...] = 0

    def rows(self, symbols: Array, cotangent: Array, out: Array) -> None:
        """Sum the cotangents of each symbol over the steps into its row of out[b, c]."""
        columns = cotangent.shape[2]
        x = self.backend.xp.repeat(symbols, columns, axis=1)
        rows = cotangent.reshape(*x.shape, cotangent.shape[3])
        self.backend.segment_sum_each(rows, x, out.reshape(-1, *out.shape[2:]))

    def total(self, cotangent: Array, out: Array) -> None:
        """Sum the cotangents over the steps into out[b, c]."""
        out[...] = self.backend.xp.sum(cotangent, axis=0)


def flat(array: Array) -> Array:
    """Return vectors (L, B, .) as rows (L B, .); a single sequence as a strided view, which BLAS accepts."""
    return array[:, 0] if array.shape[1] == 1 else array.reshape(-1, array.shape[2])


def layer_gradient(cell: Cell, layer: Cotangents, g: Mapping[str, Array], sums: Sums) -> None:
    """Fill g with the parameter cotangents of a layer; its keys are the names of parameters in the cell."""
    n = layer.hidden.shape[-1]
    source, da = layer.hidden[:-1], layer.da[..., : cell.of_inputs * n]
    if layer.intermediate is not None:
        sums.product(source, layer.dq, g["W_mh"])
        _of_inputs(layer.inputs, layer.dp, g["W_mx"], sums)
        source = layer.intermediate
    sums.product(source, layer.da[..., -cell.of_state * n :], g["W_h"])
    _of_inputs(layer.inputs, da, g["W_x"], sums)
    on_rows = cell.on_rows * n
    if layer.inputs.ndim == 2:  # every step has one symbol, so that the rows of W_x add up to the bias
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
