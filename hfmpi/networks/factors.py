"""Kronecker factors of the curvature of each matrix of a network, from a gradient's own pass.

A block of theta (`Architecture.blocks`) maps its inputs z, a row each, to pre-activations a, a column each.
Its part of the Fisher matrix is taken for A x B (Martens and Grosse 2015; for recurrent networks, with steps
as if they were independent, Martens, Ba and Johnson 2018):

    A = mean of z z' over steps and sequences           B = N sum of da da'

da is the gradient of the mean loss over N scored outputs with respect to a, at the targets of the data: the
empirical Fisher matrix. One-hot inputs are never written out.
"""

from __future__ import annotations

from collections.abc import Sequence

from hfmpi.backends.base import Array
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.parameter_gradient import Cotangents, flat
from hfmpi.optim.layout import Block, kronecker_layout, split_factors

__all__ = ["accumulate", "normalise", "size"]

Source = Array | None
"""Inputs of some rows of a block: symbols (L, B), vectors (L, B, I), or None for the constant of a bias."""


def size(blocks: Sequence[Block]) -> int:
    """Give the numbers of all factors, and of one more: the rows that z has been summed over."""
    return kronecker_layout(blocks).size + 1


def normalise(blocks: Sequence[Block], sums: Array, scored: int) -> None:
    """Turn sums over all ranks into A and B, block after block, in place; the last number stays."""
    kind, rows = sums.dtype.type, float(sums[-1])
    for _, a, b in split_factors(blocks, sums[:-1]):
        a *= kind(1 / max(1.0, rows))
        b *= kind(scored)


def accumulate(
    backend: NumpyBackend, about: Architecture, cotangents: Sequence[Cotangents], du: Array, sums: Array
) -> None:
    """Add what some steps bring to the sums of z z' and da da' of all blocks.

    Parameters
    ----------
    cotangents : sequence of Cotangents
        Of each layer from below.
    du : (T, B, O)
        Cotangents of the outputs of the last T of these steps.
    sums : (size,)
    """
    maps = [pair for i, own in enumerate(cotangents) for pair in _maps(backend, about, i, own)]
    hidden = cotangents[-1].hidden
    bias = [None] * ("b_o" in about.layout.shapes)
    maps.append(([hidden[len(hidden) - len(du) :], *bias], du))
    for (block, a, b), (sources, da) in zip(split_factors(about.blocks, sums[:-1]), maps, strict=True):
        if da.shape[0] * da.shape[1]:
            _squares(backend, sources, block.rows, da, a)
            _squares(backend, [da], block.columns, da, b)
    sums[-1:] += sums.dtype.type(cotangents[0].inputs.shape[0] * cotangents[0].inputs.shape[1])


def _maps(
    backend: NumpyBackend, about: Architecture, i: int, own: Cotangents
) -> list[tuple[list[Source], Array]]:
    """Give inputs and cotangents of the blocks of layer i, in their order."""
    cell, n = about.cell, about.hidden
    before, found = own.hidden[:-1], list[tuple[list[Source], Array]]()
    source = before
    if own.intermediate is not None:
        found += [([own.inputs], own.dp), ([before], own.dq)]
        source = own.intermediate
    joined = cell.of_inputs == cell.of_state == cell.groups
    if joined and cell.on_rows == cell.groups:
        return [*found, ([own.inputs, source, None], own.da)]
    bias = backend.workspace(f"kronecker.bias.{i}", own.da.shape)
    bias[...] = own.da
    bias[..., cell.on_rows * n :] = cell.bias_cotangent(own.hidden[1:], own.dh, own.da)
    if joined:
        return [*found, ([own.inputs, source], own.da), ([None], bias)]
    of_inputs, of_state = own.da[..., : cell.of_inputs * n], own.da[..., -cell.of_state * n :]
    return [*found, ([own.inputs], of_inputs), ([source], of_state), ([None], bias)]


def _squares(backend: NumpyBackend, sources: Sequence[Source], rows: int, da: Array, out: Array) -> None:
    """Add z z' to out (rows, rows), or its diagonal to out (rows,), z the sources below one another."""
    count = da.shape[0] * da.shape[1]
    taken = sum(source.shape[2] for source in sources if source is not None and source.ndim == 3)
    symbols = rows - taken - sum(source is None for source in sources)  # of the one source that has some
    start, places = 0, []
    for source in sources:
        width = 1 if source is None else symbols if source.ndim == 2 else source.shape[2]
        places.append((source, slice(start, start + width)))
        start += width
    if out.ndim == 1:
        for one, at in places:
            out[at] += count if one is None else _diagonal(backend, one, at.stop - at.start)
        return
    for i, (one, at) in enumerate(places):
        for other, beside in places[i:]:
            part = _product(backend, one, other, at.stop - at.start, beside.stop - beside.start, count)
            out[at, beside] += part
            if one is not other:
                out[beside, at] += part.T


def _product(backend: NumpyBackend, one: Source, other: Source, height: int, width: int, count: int) -> Array:
    """Give the sum of z_1 z_2' (height, width) over `count` rows."""
    xp, found = backend.xp, backend.workspace("kronecker", (height, width))
    if one is not None and one.ndim == 2:  # symbols
        x = xp.ascontiguousarray(one).reshape(-1)
        if other is one:
            found[...] = 0
            found.reshape(-1)[:: width + 1] = _diagonal(backend, one, height)
        else:
            rows = _ones(backend, count) if other is None else _whole(backend, other)
            backend.segment_sum(rows, x, found)
    elif one is None:
        found[...] = count
    elif other is None:
        found[:, 0] = xp.sum(flat(one), axis=0)
    else:
        backend.matmul(flat(one).T, flat(other), found)
    return found


def _diagonal(backend: NumpyBackend, one: Array, height: int) -> Array:
    """Give the diagonal of the sum of z z', (height,)."""
    if one.ndim == 3:
        rows = flat(one)
        return backend.xp.einsum("ni,ni->i", rows, rows)
    counts = backend.workspace("kronecker.counts", (height, 1))
    symbols = backend.xp.ascontiguousarray(one).reshape(-1)
    backend.segment_sum(_ones(backend, len(symbols)), symbols, counts)
    return counts[:, 0]


def _whole(backend: NumpyBackend, array: Array) -> Array:
    return backend.xp.ascontiguousarray(array).reshape(-1, array.shape[2])


def _ones(backend: NumpyBackend, count: int) -> Array:
    return backend.xp.zeros((count, 1), backend.dtype) + backend.dtype.type(1)
