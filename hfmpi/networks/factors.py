"""Kronecker factors of the curvature of each matrix of a network, computed in the gradient pass.

A block of theta (`Architecture.blocks`) maps its inputs z, one per row, to pre-activations a, one per column.
Its part of the Fisher matrix is approximated by A x B (Martens and Grosse 2015; for recurrent networks, whose
steps are treated as independent, Martens, Ba and Johnson 2018):

    A = mean of z z' over steps and sequences           B = N sum of da da'

da is the gradient of the mean loss over N scored outputs with respect to a. It is taken at the targets of the
data, so that the matrix is the empirical Fisher matrix. One-hot inputs are never expanded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.parameter_gradient import Cotangents, flat

__all__ = ["accumulate"]

Source = Array | None
"""Inputs of some rows of a block: symbols (L, B), vectors (L, B, I), or None for the constant 1 of a bias."""


def accumulate(
    backend: NumpyBackend,
    about: Architecture,
    cotangents: Sequence[Cotangents],
    du: Array,
    sums: Array,
    weights: Array | None = None,
) -> None:
    """Add the contribution of some steps to the sums of z z' and da da' of all blocks.

    Parameters
    ----------
    backend : NumpyBackend
    about : Architecture
    cotangents : sequence of Cotangents
        The cotangents of each layer, from the lowest.
    du : (T, B, O)
        The cotangents of the outputs of the last T of these steps.
    sums : (about.factor_sums.size,)
    weights : (B,), optional
        The weight of z z' of each sequence; the cotangents already contain the square roots of the weights.
    """
    maps = [pair for i, layer in enumerate(cotangents) for pair in _maps(backend, about, i, layer)]
    read = cotangents[-1].read
    bias = [None] * ("b_o" in about.layout.shapes)
    maps.append(([read[len(read) - len(du) :], *bias], du))
    factors, count = about.factor_sums.views(sums)
    for block, views, (sources, da) in zip(about.blocks, factors, maps, strict=True):
        if da.shape[0] * da.shape[1]:
            _squares(backend, sources, block.rows, da, views["A"], weights)
            groups = views["B"].reshape(-1, *views["B"].shape[-2:]) if views["B"].ndim > 1 else [views["B"]]
            for i, out in enumerate(groups):
                of_group = da[:, :, i * len(out) : (i + 1) * len(out)]
                _squares(backend, [of_group], len(out), of_group, out)
    steps, size = cotangents[0].inputs.shape[:2]
    count += sums.dtype.type(steps * (size if weights is None else float(weights.astype(np.float64).sum())))


def _maps(
    backend: NumpyBackend, about: Architecture, i: int, layer: Cotangents
) -> list[tuple[list[Source], Array]]:
    """Return the inputs and cotangents of each block of layer i, in the order of the blocks."""
    cell, n = about.cell, about.hidden
    before, maps = layer.hidden[:-1], list[tuple[list[Source], Array]]()
    source = before
    if layer.intermediate is not None:
        maps += [([layer.inputs], layer.dp), ([before], layer.dq)]
        source = layer.intermediate
    joined = cell.of_inputs == cell.of_state == cell.groups
    if joined and cell.on_rows == cell.groups:
        return [*maps, ([layer.inputs, source, None], layer.da)]
    bias = backend.workspace(f"kronecker.bias.{i}", layer.da.shape)
    bias[...] = layer.da
    bias[..., cell.on_rows * n :] = cell.bias_cotangent(layer.hidden[1:], layer.dh, layer.da)
    if joined:
        return [*maps, ([layer.inputs, source], layer.da), ([None], bias)]
    of_inputs, of_state = layer.da[..., : cell.of_inputs * n], layer.da[..., -cell.of_state * n :]
    return [*maps, ([layer.inputs], of_inputs), ([source], of_state), ([None], bias)]


def _squares(
    backend: NumpyBackend,
    sources: Sequence[Source],
    rows: int,
    da: Array,
    out: Array,
    weights: Array | None = None,
) -> None:
    """Add the sum of z z' to out (rows, rows), or its diagonal to out (rows,); z concatenates the sources."""
    count = da.shape[0] * da.shape[1]
    by_row = None if weights is None else _column(backend, weights, da.shape[0])
    vectors = sum(source.shape[2] for source in sources if source is not None and source.ndim == 3)
    symbols = rows - vectors - sum(source is None for source in sources)  # at most one source has symbols
    start, located = 0, []
    for source in sources:
        width = 1 if source is None else symbols if source.ndim == 2 else source.shape[2]
        located.append((source, slice(start, start + width)))
        start += width
    if out.ndim == 1:
        for one, at in located:
            if one is None:
                out[at] += count if by_row is None else by_row.sum()
            else:
                out[at] += _diagonal(backend, one, at.stop - at.start, by_row)
        return
    for i, (one, at) in enumerate(located):
        for other, across in located[i:]:
            height, width = at.stop - at.start, across.stop - across.start
            part = _product(backend, one, other, height, width, count, by_row)
            out[at, across] += part
            if one is not other:
                out[across, at] += part.T


def _product(
    backend: NumpyBackend,
    one: Source,
    other: Source,
    height: int,
    width: int,
    count: int,
    weights: Array | None,
) -> Array:
    """Return the sum of z_1 z_2' (height, width) over `count` rows, with weights (count, 1) if not None."""
    xp, product = backend.xp, backend.workspace("kronecker", (height, width))
    if one is not None and one.ndim == 2:  # symbols
        x = xp.ascontiguousarray(one).reshape(-1)
        if other is one:
            product[...] = 0
            product.reshape(-1)[:: width + 1] = _diagonal(backend, one, height, weights)
        else:
            rows = _ones(backend, count) if other is None else _contiguous(backend, other)
            backend.segment_sum(rows if weights is None else rows * weights, x, product)
    elif one is None:
        product[...] = count if weights is None else weights.sum()
    elif other is None:
        rows = flat(one)
        product[:, 0] = xp.sum(rows if weights is None else rows * weights, axis=0)
    else:
        rows = flat(one)
        backend.matmul((rows if weights is None else rows * weights).T, flat(other), product)
    return product


def _diagonal(backend: NumpyBackend, one: Array, height: int, weights: Array | None) -> Array:
    """Return the diagonal (height,) of the sum of z z'."""
    if one.ndim == 3:
        rows = flat(one)
        return backend.xp.einsum("ni,ni->i", rows if weights is None else rows * weights, rows)
    counts = backend.workspace("kronecker.counts", (height, 1))
    symbols = backend.xp.ascontiguousarray(one).reshape(-1)
    backend.segment_sum(_ones(backend, len(symbols)) if weights is None else weights, symbols, counts)
    return counts[:, 0]


def _column(backend: NumpyBackend, weights: Array, steps: int) -> Array:
    """Repeat the weights (B,) of sequences for every step, as the weights (steps * B, 1) of rows."""
    return (backend.xp.zeros((steps, len(weights), 1), weights.dtype) + weights[:, None]).reshape(-1, 1)


def _contiguous(backend: NumpyBackend, array: Array) -> Array:
    return backend.xp.ascontiguousarray(array).reshape(-1, array.shape[2])


def _ones(backend: NumpyBackend, count: int) -> Array:
    return backend.xp.zeros((count, 1), backend.dtype) + backend.dtype.type(1)
