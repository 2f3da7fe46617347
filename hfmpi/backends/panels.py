"""Matrix products a W with few rows of a, where W is packed once for many products.

The sequential products of a pass multiply B rows at a time by the same recurrent matrix. A BLAS copies the
matrix at each call to an order that its innermost loop can read at full speed; for B = 16 rows this copy
reduces the speed by a third (docs/performance.md). Here the copy is made once per linearisation. The loop
follows Goto and van de Geijn ("Anatomy of High-Performance Matrix Multiplication", 2008): it multiplies a
block of `ROWS` rows by one panel of W, and keeps the sums in registers.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

__all__ = ["multiply", "pack", "panels_shape"]


def _registers() -> tuple[int, int, int]:
    """Return the bytes of a vector register, and the rows and vectors of a block that fits in registers."""
    selected = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    host = [f"+{name}" for name, present in binding.get_host_cpu_features().items() if present]
    features = host if selected is None else selected.split(",")
    if "+avx512f" in features:
        return 64, 8, 2
    if "+avx" in features:
        return 32, 4, 3  # 16 registers contain 12 sums, 3 vectors of W and 1 number of a
    return 16, 4, 3


BYTES, ROWS, VECTORS = _registers()
CHUNK = 16 * ROWS
"""The number of rows of a that are multiplied by all of W at a time, so that they remain in the cache."""


def panels_shape(rows: int, columns: int, itemsize: int) -> tuple[int, int, int]:
    """Return the shape of a packed matrix (rows, columns): a sequence of panels of columns."""
    width = VECTORS * BYTES // itemsize
    return -(-columns // width), rows, width


def pack(w, panels):
    """Copy w (K, N) to panels (P, K, width), and pad the last panel with zeros."""
    width = panels.shape[2]
    for p in range(panels.shape[0]):
        first = p * width
        columns = min(width, w.shape[1] - first)
        for k in range(w.shape[0]):
            for j in range(columns):
                panels[p, k, j] = w[k, first + j]
            for j in range(columns, width):
                panels[p, k, j] = 0


@intrinsic(prefer_literal=True)
def block(typing_context, rows, like, a, a_row, a_column, panel, depth, c, c_row, add):
    """Compute c = a panel, or c += a panel if `add` is set, with a (rows, depth) and panel (depth, width).

    `a`, `panel` and `c` are addresses, `a_row`, `a_column` and `c_row` strides in bytes; `like` is a number
    of the element type.
    """
    number, count = like, rows.literal_value
    lanes = BYTES * 8 // number.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, _, a, a_row, a_column, panel, depth, c, c_row, add = arguments
        element = context.get_data_type(number)
        vector, integer, size = ir.VectorType(element, lanes), ir.IntType(64), number.bitwidth // 8
        fused = ("contract",)  # a multiplication and an addition may be combined to one instruction

        def at(address: Any, kind: Any) -> Any:
            return builder.inttoptr(address, kind.as_pointer())

        def load(address: Any, kind: Any) -> Any:
            loaded = builder.load(at(address, kind))
            loaded.align = size
            return loaded

        def broadcast(value: Any) -> Any:
            lane = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
            mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            return builder.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), mask)

        starts = [builder.add(a, builder.mul(integer(r), a_row)) for r in range(count)]
        before = builder.block
        loop, done = (builder.function.append_basic_block(name) for name in ("loop", "done"))
        builder.branch(loop)
        builder.position_at_end(loop)
        k, a_offset, panel_row = builder.phi(integer), builder.phi(integer), builder.phi(integer)
        sums = [[builder.phi(vector) for _ in range(VECTORS)] for _ in range(count)]
        columns = [load(builder.add(panel_row, integer(v * BYTES)), vector) for v in range(VECTORS)]
        totals = []
        for start, row in zip(starts, sums, strict=True):
            value = broadcast(load(builder.add(start, a_offset), element))
            totals.append(
                [
                    builder.fadd(total, builder.fmul(value, column, flags=fused), flags=fused)
                    for total, column in zip(row, columns, strict=True)
                ]
            )
        following = builder.add(k, integer(1))
        for phi, first, step in (
            (k, integer(0), following),
            (a_offset, integer(0), builder.add(a_offset, a_column)),
            (panel_row, panel, builder.add(panel_row, integer(VECTORS * BYTES))),
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(step, loop)
        zero = ir.Constant(vector, [element(0.0)] * lanes)
        for row, row_totals in zip(sums, totals, strict=True):
            for phi, total in zip(row, row_totals, strict=True):
                phi.add_incoming(zero, before)
                phi.add_incoming(total, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
        builder.position_at_end(done)
        adding = builder.trunc(add, ir.IntType(1))
        for r, row in enumerate(totals):
            for v, total in enumerate(row):
                address = builder.add(builder.add(c, builder.mul(integer(r), c_row)), integer(v * BYTES))
                previous = builder.select(adding, load(address, vector), zero)
                stored = builder.store(builder.fadd(total, previous), at(address, vector))
                stored.align = size
        return context.get_dummy_value()

    return types.void(rows, number, *[types.intp] * 7, types.boolean), generate


def multiply(a, panels, out, add):
    """Compute out = a W, or out += a W if `add` is set, with a (B, K) and the panels of W (K, N).

    a may have any strides, out any stride between its rows; K is at least 1.
    """
    batch, depth = a.shape
    columns, width = out.shape[1], panels.shape[2]
    like, size = panels.dtype.type(0), panels.itemsize
    edge = np.empty((ROWS, width), panels.dtype)  # receives the last panel, which may be wider than out
    a_row, a_column = a.strides
    for chunk in range(0, batch, CHUNK):
        for p in range(panels.shape[0]):
            panel, first = panels[p].ctypes.data, p * width
            inside = min(width, columns - first)
            b, end = chunk, min(chunk + CHUNK, batch)
            while b < end:
                remaining = end - b
                rows = ROWS if remaining >= ROWS else 4 if remaining >= 4 else 2 if remaining >= 2 else 1
                start = a.ctypes.data + b * a_row
                c, c_row = out.ctypes.data + b * out.strides[0] + first * size, out.strides[0]
                if inside < width:
                    if add:
                        edge[:rows, :inside] = out[b : b + rows, first:]
                    c, c_row = edge.ctypes.data, width * size
                if rows == ROWS:
                    block(ROWS, like, start, a_row, a_column, panel, depth, c, c_row, add)
                elif rows == 4:
                    block(4, like, start, a_row, a_column, panel, depth, c, c_row, add)
                elif rows == 2:
                    block(2, like, start, a_row, a_column, panel, depth, c, c_row, add)
                else:
                    block(1, like, start, a_row, a_column, panel, depth, c, c_row, add)
                if inside < width:
                    out[b : b + rows, first:] = edge[:rows, :inside]
                b += rows
