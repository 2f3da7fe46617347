"""A network linearised at theta on one batch: J v (jvp) and J' u (vjp) without exponentials.

All matrices multiply from the right; rows are sequences, time-major. Products without recurrence are computed
over many steps at once; only h W_h (and h W_mh) and their transposes are sequential. The steps are processed
in blocks, each through all layers, so that the results of one layer are still in the processor's cache when
the next layer reads them. Derivation: docs/theory.md.

A pass processes one direction (D,) or C of them at once, (C, D). In the loops over time a sequence then has C
adjacent rows, one per direction, so that one sequential product serves all of them.

For structural damping, the output of the network is the pair (outputs, pre-activations). The loss is a
function of the outputs. Structural damping is a second loss, of the pre-activations, that has only a second
derivative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hfmpi.backends.base import Array, Workspace
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.models.linearisation import LossLinearisation
from hfmpi.networks import factors, recurrence
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.parameter_gradient import BatchSums, Cotangents, SequenceSums, Sums, layer_gradient
from hfmpi.networks.recurrence import Recurrence
from hfmpi.optim.layout import Along

__all__ = ["NetworkLinearisation", "Tape", "blocks", "fill_outputs", "fill_rows"]

DIRECTION_ROWS = 128
"""The minimum number of rows (steps times sequences) in a block for each of many directions."""

ROW_STEPS = 64
"""The minimum number of steps in a block of a pass that computes rows.

For each block such a pass adds a gradient of every sequence.
"""


def blocks(steps: int, sequences: int, rows: int) -> list[slice]:
    """Divide steps into blocks of nearly equal length with about `rows` rows (steps times sequences)."""
    count = min(steps, -(-steps * sequences // rows))
    return [slice(steps * i // count, steps * (i + 1) // count) for i in range(count)]


def fill_rows(backend: NumpyBackend, inputs: Array, matrix: Array, out: Array) -> None:
    """Fill a table with the contributions of inputs: all rows of the matrix, or the products of vectors."""
    if inputs.ndim == 2:
        out[...] = matrix
    else:
        backend.matmul(inputs.reshape(-1, inputs.shape[2]), matrix, out)


def fill_outputs(backend: NumpyBackend, p: dict[str, Array], hidden: Array, out: Array) -> None:
    """Fill out (., O) with hidden (..., n) W_o + b_o."""
    backend.matmul(hidden.reshape(-1, hidden.shape[-1]), p["W_o"], out)
    if "b_o" in p:
        out += p["b_o"]


@dataclass
class Tape:
    """A network linearised at theta on one batch; satisfies `hfmpi.models.linearisation.Passes`.

    The outputs are sorted by step: all sequences at the first step that has targets, then at the next one.

    Attributes
    ----------
    architecture : Architecture
    backend : NumpyBackend
    layers : tuple of Recurrence
        From the lowest.
    parameters : dict of str to Array
        Views of theta.
    scored : int
        N, the number of outputs with targets: steps times sequences.
    nbytes : int
        The number of bytes that the tape occupies in the device's memory.
    block_rows : int
        The approximate number of rows (steps times sequences) that the time-batched products process at once.
    memory : Workspace
        The memory that holds the tape.
    """

    architecture: Architecture
    backend: NumpyBackend
    layers: tuple[Recurrence, ...]
    parameters: dict[str, Array]
    scored: int
    nbytes: int
    block_rows: int
    memory: Workspace

    @property
    def examples(self) -> int:
        """B, the number of sequences."""
        return int(self.layers[0].x.shape[1])

    @property
    def by_step(self) -> bool:
        """Whether outputs are sorted by step; always True."""
        return True

    # J v ---------------------------------------------------------------------------------------

    def jvp(self, v: Array) -> Array:
        """Return J v (N * C, O) in the backend's workspace, valid until the next pass."""
        return self.tangents(v, pre=False)[0]

    def tangents(self, v: Array, pre: bool) -> tuple[Array, tuple[Array, ...]]:
        """Return J v (N * C, O) and, with `pre`, the tangents (L, B * C, K) of each layer's pre-activations.

        They are in the backend's workspace and valid until the next pass.
        """
        backend, about = self.backend, self.architecture
        n, width = about.hidden, about.outputs
        directions = [about.layout.views(row) for row in v.reshape(-1, v.shape[-1])]
        many = len(directions)
        outputs = backend.workspace("outputs", (self.scored, many, width))
        states = self._zeros("tangent", many)
        by_layer = [[about.of_layer(i, q) for q in directions] for i in range(len(self.layers))]
        stacked = about.layout.views(v) if many > 1 else {}
        cuts = [
            _nonzero_columns(backend, about.of_layer(i, stacked) if stacked else {}, n)
            for i in range(len(self.layers))
        ]
        output_cuts = [cut.get("W_o", slice(None)) for cut in _nonzero_columns(backend, stacked, n)]
        symbols = self.layers[0].looks_up
        # Symbols select rows of the same table in all blocks.
        table = self._contributions(0, self.layers[0], by_layer[0], None) if symbols else None
        for steps, scored, rows in self._blocks(None if pre else self._block_rows(many), many):
            inputs, tangents = None, []
            for i, (last, dc) in enumerate(states):
                r = self.layers[i].part(steps)
                tables = self._contributions(i, r, by_layer[i], inputs) if i or table is None else table
                a, dh = self._block_tangent(i, r, by_layer[i], cuts[i], tables, last, dc)
                last[...] = dh[-1]
                inputs = dh[1:]
                r.scale(inputs)
                tangents.append(a)
            hidden = self.layers[-1].read[scored]
            in_block = slice(1 + scored.start - steps.start, 1 + scored.stop - steps.start)
            direct = backend.workspace("outputs.direct", outputs[rows].shape)
            for j, q in enumerate(directions):
                self._direct(hidden.reshape(-1, n), q["W_o"], output_cuts[j], direct[:, j])
                if "b_o" in q:
                    direct[:, j] += q["b_o"]
            through = dh[in_block].reshape(-1, n)
            backend.matmul(through, self.parameters["W_o"], outputs[rows].reshape(-1, width))
            outputs[rows] += direct
        return outputs.reshape(-1, width), tuple(tangents) if pre else ()

    def _block_tangent(
        self,
        i: int,
        r: Recurrence,
        directions: list[dict[str, Array]],
        cuts: list[dict[str, slice]],
        tables: tuple[Array, Array | None],
        last: Array,
        dc: Array,
    ) -> tuple[Array, Array]:
        """Compute R a (L, B C, K) and R h (L + 1, B C, n) of layer i in a block, from the state before it."""
        cell, n, (length, size) = self.architecture.cell, self.architecture.hidden, r.x.shape
        backend, (table, factor_table), many = self.backend, tables, len(directions)
        before, factors = r.hidden[:-1].reshape(-1, n), None
        if r.intermediate is not None:
            factors = backend.workspace(f"factors.{i}", (length, size * many, n))
            for q, cut, out in zip(directions, cuts, _by_direction(factors, many), strict=True):
                self._direct(before, q["W_mh"], cut.get("W_mh", slice(None)), out)
            before = r.intermediate.reshape(-1, n)
        a = backend.workspace(f"pre.{i}", (length, size * many, cell.groups * n))
        dh = backend.workspace(f"hidden.{i}", (length + 1, size * many, n))
        dh[0] = last
        for j, (q, cut, out) in enumerate(zip(directions, cuts, _by_direction(a, many), strict=True)):
            self._direct(before, q["W_h"], cut.get("W_h", slice(None)), out[:, -cell.of_state * n :])
            if cell.on_rows < cell.groups:
                cell.bias_tangent(r, q["b"][cell.on_rows * n :], a[:, j::many], dh[:, j::many])
        recurrence.tangent(backend, r, table, a, factor_table, factors, dh, dc)
        return a, dh

    def _direct(self, rows: Array, matrix: Array, cut: slice, out: Array) -> None:
        """Fill out with the product of rows and a matrix that is 0 outside the columns `cut`."""
        if matrix[:, cut].shape != matrix.shape:
            out[...] = 0
        if matrix[:, cut].size:
            self.backend.matmul(rows, matrix[:, cut], out[:, cut])

    def _contributions(
        self, i: int, r: Recurrence, directions: list[dict[str, Array]], inputs: Array | None
    ) -> tuple[Array, Array | None]:
        """Return the contributions of inputs to layer i along each direction, by W_x (with bias) and W_mx.

        `inputs` (L, B C, I) are the tangents of the layer's inputs along the directions; None: zero.
        """
        on_rows = self.architecture.cell.on_rows * self.architecture.hidden
        table = self._rows(i, "W_x", r, directions, inputs)
        for q, rows in zip(directions, _by_direction(table, len(directions)), strict=True):
            rows[:, :on_rows] += q["b"][:on_rows]
        factor_table = self._rows(i, "W_mx", r, directions, inputs) if "W_mx" in directions[0] else None
        return table, factor_table

    def _rows(
        self, i: int, name: str, r: Recurrence, directions: list[dict[str, Array]], inputs: Array | None
    ) -> Array:
        """Return the contributions (R C, .) of inputs by W_x or W_mx (`name`) along each direction."""
        count = len(directions[0][name]) if r.looks_up else r.x.size
        shape = (count * len(directions), directions[0][name].shape[1])
        table = self.backend.workspace(f"direction.{name}.{i}", shape)
        for q, rows in zip(directions, _by_direction(table, len(directions)), strict=True):
            fill_rows(self.backend, r.inputs, q[name], rows)
        if inputs is not None:
            more = self.backend.workspace("direction.more", table.shape)
            fill_rows(self.backend, inputs, self.parameters[self.architecture.names[i][name]], more)
            table += more
        return table

    # J' u --------------------------------------------------------------------------------------

    def vjp(self, u: Array, out: Array) -> None:
        """Add J' u to out, (D,) or (C, D), for cotangents u (N * C, O)."""
        self.cotangents(u, out)

    def squares(self, u: Array, out: Array, squares: Array) -> None:
        """Add J' u to out (D,), and the sum over sequences of its squared terms to squares (D,)."""
        self.cotangents(u, out, squares=squares)

    def factors(self, u: Array, out: Array, sums: Array, weights: Array | None = None) -> None:
        """Add J' u to out (D,), and the sums of `hfmpi.networks.factors` to sums; see `Passes.factors`."""
        self.cotangents(u, out, sums=sums, weights=weights)

    def rows(self, u: Array, out: Array) -> None:
        """Fill out (B, C, D) with J' u of every sequence, for each of C cotangents u (N * C, O).

        J' u is a sum over steps, which is accumulated block by block.
        """
        out[...] = 0
        for examples, columns, rows in self._row_parts(u, out.shape[1]):
            target = out[examples, columns]
            target += rows

    def rows_along(self, u: Array, several: int, along: Along) -> Array:
        """Return V S' (k, B, C) for the rows S that `rows` computes for C cotangents, without storing S."""
        products = self.backend.xp.zeros((len(along), self.examples, several), self.backend.dtype)
        for examples, columns, rows in self._row_parts(u, several):
            part = products[:, examples, columns]
            part += along(rows.reshape(-1, rows.shape[2])).reshape(part.shape)
        return products

    def _row_parts(self, u: Array, many: int) -> Iterator[tuple[slice, slice, Array]]:
        """Yield terms (b, C', D) of the rows of some examples and some of C = `many` cotangents u (N * C, O).

        A block of steps skips the cotangents that are zero at all of its steps and at all later steps, except
        for those between two others.
        """
        steps, size = len(self.layers[0].x), self.examples
        about, backend = self.architecture, self.backend
        nonzero = backend.xp.any(u.reshape(-1, size, many, about.outputs), axis=(1, 3))
        nonzero = backend.to_host(nonzero)[::-1]
        last = np.where(nonzero.any(axis=0), steps - 1 - nonzero.argmax(axis=0), -1)
        parts = self._blocks(max(self.block_rows, ROW_STEPS * size * many), many)
        for columns, cotangents, du in self._adjoint(u, many, parts, last=last):
            for examples, some, each in self._each(cotangents, du, columns.stop - columns.start):
                yield examples, slice(columns.start + some.start, columns.start + some.stop), each

    def cotangents(
        self,
        u: Array,
        out: Array,
        pre: Sequence[Array] = (),
        squares: Array | None = None,
        sums: Array | None = None,
        weights: Array | None = None,
    ) -> None:
        """Add the parameter cotangent of the output cotangents u (N * C, O) to out (D,) or (C, D).

        Parameters
        ----------
        u : (N * C, O)
        out : (D,) or (C, D)
        pre : sequence of arrays
            Cotangents of the pre-activations, in the arrays that `tangents` returned, which are overwritten.
        squares : (D,), optional
            The element-wise square of the cotangent of every sequence is added to it; for one direction only.
        sums : array, optional
            The sums of `hfmpi.networks.factors` are added to it; for one direction only.
        weights : (B,), optional
            The weights of the inputs of each sequence in `sums`.
        """
        backend, size = self.backend, self.architecture.layout.size
        many = len(u) // max(1, self.scored)
        parts = self._blocks(None if squares is not None or pre else self._block_rows(many), many)
        for _, cotangents, du in self._adjoint(u, many, parts, pre):
            if squares is not None:
                for _, _, each in self._each(cotangents, du, 1):
                    backend.accumulate_squares(each.reshape(-1, size), out, squares)
            else:
                self._collect(cotangents, du, out)
            if sums is not None:
                factors.accumulate(backend, self.architecture, cotangents, du, sums, weights)

    def _adjoint(
        self,
        u: Array,
        many: int,
        parts: list[tuple[slice, slice, slice]],
        pre: Sequence[Array] = (),
        last: np.ndarray | None = None,
    ) -> Iterator[tuple[slice, list[Cotangents], Array]]:
        """Propagate the output cotangents u (N * C, O) back, block by block from the last to the first.

        Parameters
        ----------
        u : (N * C, O)
        many : int
            C, the number of cotangents.
        parts : list
            The result of `_blocks`.
        pre : sequence of arrays
            As in `cotangents`.
        last : (C,) of int, optional
            The last step at which each cotangent is not zero, -1 if it is zero at all steps. A block skips
            the cotangents that are zero in it and at all later steps, except for those between two others.

        Yields
        ------
        columns : slice
            The C' cotangents that the block processes.
        cotangents : list of Cotangents
            The cotangents (L, B C', .) of each layer, from the lowest.
        du : (T, B C', O)
            The cotangents of the outputs of the last T steps of the block.
        """
        backend, (n, width) = self.backend, (self.architecture.hidden, self.architecture.outputs)
        sequences, top = self.examples, len(self.layers) - 1
        states = self._zeros("adjoint", many)
        for steps, scored, rows in reversed(parts):
            columns, length, first = slice(0, many), steps.stop - steps.start, 1 + scored.start - steps.start
            du, of_columns = u[rows.start * many : rows.stop * many], states
            if last is not None:
                present = np.flatnonzero(last >= steps.start)
                if not present.size:
                    continue
                columns = slice(int(present[0]), int(present[-1]) + 1)
            size = sequences * (columns.stop - columns.start)
            if size < sequences * many:
                du = self._of_columns("u", du, many, columns)
                of_columns = [
                    (
                        self._of_columns(f"h.{i}", h, many, columns),
                        self._of_columns(f"c.{i}", c, many, columns),
                    )
                    for i, (h, c) in enumerate(states)
                ]
            dh = backend.workspace(f"hidden.{top}", (length + 1, size, n))
            dh[1:first] = 0
            backend.matmul(du, self.parameters["W_o"].T, dh[first:].reshape(-1, n))
            self.layers[top].scale(dh[first:])
            cotangents = []
            for i in range(top, -1, -1):
                below = backend.workspace(f"hidden.{i - 1}", (length + 1, size, n)) if i else None
                back, dc = of_columns[i]
                cotangents.append(self._block_adjoint(i, steps, dh, pre[i] if pre else None, back, dc, below))
                dh = below
            if of_columns is not states:
                for whole, part in zip(states, of_columns, strict=True):
                    for state, its_part in zip(whole, part, strict=True):
                        by_sequence(state, sequences)[:, columns] = by_sequence(its_part, sequences)
            yield columns, cotangents[::-1], du.reshape(-1, size, width)

    def _of_columns(self, name: str, rows: Array, many: int, columns: slice) -> Array:
        """Copy the rows (., C, .) of some cotangents to the workspace, and return them as (., .)."""
        part = rows.reshape(-1, many, rows.shape[1])[:, columns]
        copy = self.backend.workspace(f"adjoint.columns.{name}", part.shape)
        copy[...] = part
        return copy.reshape(-1, rows.shape[1])

    def _block_adjoint(
        self, i: int, steps: slice, dh: Array, pre: Array | None, back: Array, dc: Array, below: Array | None
    ) -> Cotangents:
        """Propagate cotangents dh (L + 1, B C, n) back through layer i in a block, to `below` if not None."""
        r, names, cell = self.layers[i].part(steps), self.architecture.names[i], self.architecture.cell
        backend, (length, size), n = self.backend, (len(r.x), dh.shape[1]), self.architecture.hidden
        da = backend.workspace(f"pre.{i}", (length, size, cell.groups * n)) if pre is None else pre
        dp = dq = None
        if r.factors is not None:
            dp = backend.workspace(f"rows.{i}", (length, size, n))
            dq = backend.workspace(f"factors.{i}", (length, size, n))
        recurrence.adjoint(backend, r, dh, da, dp, dq, back, dc, inject=pre is not None)
        if below is not None:
            flat, of_inputs = below[1:].reshape(-1, n), da.reshape(length * size, -1)[:, : cell.of_inputs * n]
            backend.matmul(of_inputs, self.parameters[names["W_x"]].T, flat)
            if dp is not None:
                more = backend.workspace("below.more", flat.shape)
                backend.matmul(dp.reshape(-1, n), self.parameters[names["W_mx"]].T, more)
                flat += more
            self.layers[i - 1].scale(below[1:])
        return Cotangents(r.inputs, r.hidden, r.intermediate, r.read, dh[1:], da, dp, dq)

    def _collect(self, cotangents: Sequence[Cotangents], du: Array, out: Array) -> None:
        """Add the parameter cotangents of one block to out (D,) or (C, D)."""
        single = self.backend.workspace("gradient", (self.architecture.layout.size,))
        rows = out.reshape(-1, single.size)
        for j, row in enumerate(rows):
            part = slice(j, None, len(rows))
            of_direction = [c.of_rows(part) for c in cotangents]
            self._gradient(of_direction, du[:, part], single, BatchSums(self.backend))
            row += single

    def _each(
        self, cotangents: Sequence[Cotangents], du: Array, many: int
    ) -> Iterator[tuple[slice, slice, Array]]:
        """Yield the parameter cotangents of each sequence of one block, for each of C = `many` cotangents.

        Each part (B', C', D) in the workspace has some sequences and cotangents, about `each_numbers`
        elements.
        """
        backend, size = self.backend, self.architecture.layout.size
        sequences = self.examples
        rows = max(1, backend.each_numbers // size)
        step, column_step = (max(1, rows // many), many) if rows >= many else (1, rows)
        du = du.reshape(len(du), sequences, many, du.shape[2])
        split = [c.by_sequence() for c in cotangents]
        for start in range(0, sequences, step):
            part = slice(start, min(start + step, sequences))
            for first in range(0, many, column_step):
                columns = slice(first, min(first + column_step, many))
                shape = (part.stop - part.start, columns.stop - columns.start, size)
                each = backend.workspace("each", shape)
                of_part = [c.of(part, columns) for c in split]
                self._gradient(of_part, du[:, part, columns], each, SequenceSums(backend))
                yield part, columns, each

    def _gradient(self, cotangents: Sequence[Cotangents], du: Array, out: Array, sums: Sums) -> None:
        """Fill out (D,), or (B, C, D) for each sequence, with the parameter cotangents of some sequences."""
        g = self.architecture.layout.views(out)
        for i, layer in enumerate(cotangents):
            layer_gradient(self.architecture.cell, layer, self.architecture.of_layer(i, g), sums)
        read = cotangents[-1].read
        sums.product(read[len(read) - len(du) :], du, g["W_o"])
        if "b_o" in g:
            sums.total(du, g["b_o"])

    def _zeros(self, name: str, directions: int) -> list[tuple[Array, Array]]:
        """Return two zero arrays (B C, n) in the workspace for each layer."""
        shape, states = (self.layers[0].x.shape[1] * directions, self.architecture.hidden), []
        for i in range(len(self.layers)):
            both = [self.backend.workspace(f"{name}.{part}.{i}", shape) for part in "hc"]
            for array in both:
                array[...] = 0
            states.append((both[0], both[1]))
        return states

    def _block_rows(self, directions: int) -> int:
        """Return the approximate number of rows (steps times sequences times directions) in a block."""
        return self.block_rows if directions == 1 else max(self.block_rows, DIRECTION_ROWS * directions)

    def _blocks(self, block_rows: int | None, directions: int) -> list[tuple[slice, slice, slice]]:
        """Divide the steps into blocks of nearly equal length, in order; None leaves them undivided.

        Returns
        -------
        list of (steps, scored, rows)
            The steps of the recurrence, the steps among them that have outputs (possibly none), and the rows
            of the outputs (N, O) at these.
        """
        length, size = self.layers[0].x.shape
        burn_in = length - self.scored // size
        parts = []
        divided = [slice(0, length)] if block_rows is None else blocks(length, size * directions, block_rows)
        for steps in divided:
            first = min(max(steps.start, burn_in), steps.stop)
            rows = slice(max(first - burn_in, 0) * size, max(steps.stop - burn_in, 0) * size)
            parts.append((steps, slice(first, steps.stop), rows))
        return parts


@dataclass
class NetworkLinearisation(LossLinearisation):
    """A network with its loss, linearised at theta on one batch."""

    passes: Tape

    def structural_gauss_newton(self, v: Array, scale: float, structural: float, out: Array) -> None:
        """Add scale * (J' H J + structural * J_a' W J_a) v to out; both are (D,) or (C, D).

        J_a is the Jacobian of the pre-activations, and W their weights.
        """
        tape = self.passes
        u, pre = tape.tangents(v, pre=structural != 0)
        self.hessian(u, slice(None), scale)
        for r, a in zip(tape.layers, pre, strict=bool(pre)):
            weights: Array = r.weights
            columns = a.reshape(*weights.shape[:2], -1, weights.shape[2])
            columns *= weights[:, :, None]
            if self.weights is not None:
                columns *= self.weights[:, None, None]
            a[...] *= self.backend.dtype.type(scale * structural)
        tape.cotangents(u, out, pre)


def _by_direction(rows: Array, directions: int) -> list[Array]:
    """Split rows (..., N C, .) into those of each direction (N, .), as views."""
    split = rows.reshape(-1, directions, rows.shape[-1])
    return [split[:, j] for j in range(directions)]


def _nonzero_columns(backend: NumpyBackend, stacked: dict[str, Array], n: int) -> list[dict[str, slice]]:
    """Return the columns of each matrix that contain the nonzero entries of each direction, in groups of n.

    One of many directions is often a part of a larger vector, and nonzero only in some gates of one matrix.
    `stacked` contains the parameters of all directions by name, (C, ...) each; it is empty for a single
    direction.
    """
    cuts: list[dict[str, slice]] = []
    for name in ("W_h", "W_mh", "W_o"):
        if name in stacked:
            many, rows, width = stacked[name].shape
            size = width if name == "W_o" else n
            nonzero = backend.xp.any(stacked[name].reshape(many, rows, -1, size), axis=(1, 3))
            nonzero = backend.to_host(nonzero)
            first, last = nonzero.argmax(1), nonzero.shape[1] - nonzero[:, ::-1].argmax(1)
            ends = np.where(nonzero.any(1), (first, last), 0).T.tolist()
            cuts = cuts or [{} for _ in range(many)]
            for cut, (begin, end) in zip(cuts, ends, strict=True):
                cut[name] = slice(begin * size, end * size)
    return cuts or [{}]
