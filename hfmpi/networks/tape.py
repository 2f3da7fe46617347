"""A network linearised at theta on one batch: J v (jvp) and J' u (vjp) without exponentials.

The output of the network, seen by the Gauss-Newton matrix, is the pair (outputs, pre-activations): the loss
is a function of the outputs, and structural damping is a second loss, of the pre-activations, that has only a
second derivative. So the product reads

    v -> J v -> H (J v) -> J' (H (J v)),    H = diag(loss Hessian, structural weights).

All matrices multiply from the right; rows are sequences, time-major. Products that involve no recurrence are
taken over many steps at once; only h W_h (and h W_mh) and their transposes are sequential. The steps are
worked off in blocks, through all layers, so that what one pass over a block leaves is still in the cache for
the next. Derivation: docs/theory.md.

A pass takes one direction (D,) or C of them at once, (C, D), its columns. In the loops a sequence then has C
rows, one after the other: one sequential product serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hfmpi.backends.base import Array, Workspace
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.models.losses import Loss
from hfmpi.networks import factors as kronecker
from hfmpi.networks import recurrence
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.parameter_gradient import Cotangents, Each, Sums, Whole, layer_gradient
from hfmpi.networks.recurrence import Recurrence

__all__ = ["Outputs", "Tape", "blocks", "fill_outputs", "fill_rows"]


class Outputs(NamedTuple):
    """A tangent or a cotangent of the network's outputs.

    Attributes
    ----------
    outputs : (T * B * C, O)
    pre : tuple of (L, B * C, K) or None
        Of the pre-activations of each layer, for structural damping.
    """

    outputs: Array
    pre: tuple[Array, ...] | None = None


def blocks(steps: int, sequences: int, rows: int) -> list[slice]:
    """Cut steps into blocks of nearly one length and about so many rows (steps times sequences), in order."""
    count = min(steps, -(-steps * sequences // rows))
    return [slice(steps * i // count, steps * (i + 1) // count) for i in range(count)]


def fill_rows(backend: NumpyBackend, inputs: Array, matrix: Array, out: Array) -> None:
    """Fill a table with what inputs contribute: symbols (L, B) look rows up, vectors (L, B, I) multiply."""
    if inputs.ndim == 2:
        out[...] = matrix
    else:
        backend.matmul(inputs.reshape(-1, inputs.shape[2]), matrix, out)


def fill_outputs(backend: NumpyBackend, p: dict[str, Array], hidden: Array, out: Array) -> None:
    """Fill out (., O) with hidden (..., n) W_o + b_o."""
    backend.matmul(hidden.reshape(-1, hidden.shape[-1]), p["W_o"], out)
    if "b_o" in p:
        out += p["b_o"]


COLUMN_ROWS = 128
"""Rows (steps times sequences) of each of many columns in a block, at least: each has products of its own."""


@dataclass
class Tape:
    """The linearisation of a network at theta on one batch.

    Attributes
    ----------
    architecture : Architecture
    backend : NumpyBackend
    output_loss : Loss
    layers : tuple of Recurrence
        From below.
    parameters : dict of str to Array
        Views of theta.
    kept : (T * B, O)
        What the loss keeps of the outputs.
    targets : (T * B,) int32, or (T * B, O)
    mask : (T * B, 1) or None
        1 where a step is scored, 0 where not.
    loss : float
        Summed over the scored steps, nats.
    nbytes : int
        What it keeps in the device's memory.
    block_rows : int
        About how many rows (steps times sequences) the time-batched products take at once.
    memory : Workspace
        Where all of it lies.
    """

    architecture: Architecture
    backend: NumpyBackend
    output_loss: Loss
    layers: tuple[Recurrence, ...]
    parameters: dict[str, Array]
    kept: Array
    targets: Array
    mask: Array | None
    loss: float
    nbytes: int
    block_rows: int
    memory: Workspace

    # What the objective asks for ---------------------------------------------------------------

    def gradient(self, scale: float, out: Array) -> None:
        """Add scale times the gradient of the summed loss to out (D,)."""
        self.vjp(self._loss_gradient(scale), out)

    def squared_gradients(self, scale: float, out: Array, squares: Array) -> None:
        """Add what `gradient` adds to out (D,), and the sum of its squares over sequences to squares (D,)."""
        self.vjp(self._loss_gradient(scale), out, squares)

    def factored_gradient(self, scale: float, out: Array, factors: Array) -> None:
        """Add what `gradient` adds to out (D,), and sums for Kronecker factors to factors."""
        self.vjp(self._loss_gradient(scale), out, factors=factors)

    def gauss_newton(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * J' H_L J v to out (D,)."""
        self.structural_gauss_newton(v, scale, 0.0, out)

    def columns(self, v: Array, scale: float, out: Array) -> None:
        """Add scale * J' H_L J V, row by row, to out (C, D)."""
        self.structural_gauss_newton(v, scale, 0.0, out)

    def project(self, v: Array, scale: float, out: np.ndarray) -> None:
        """Add scale * V J' H_L J V' to out (C, C), float64 on the host."""
        outputs, (columns, count) = self.jvp(v).outputs, (len(v), len(self.kept))
        product = self.backend.workspace("projection", (columns, columns))
        most = max(1, self.block_rows // columns)
        for start in range(0, count, most):
            rows = slice(start, min(start + most, count))
            u = outputs[rows.start * columns : rows.stop * columns]
            before, after = self.backend.workspace("projected", (2, columns, u.size // columns))
            self._by_column(u, before)
            self._hessian(u, rows, scale)
            self._by_column(u, after)
            self.backend.matmul(before, after.T, product)
            out += self.backend.to_host(product)

    def _by_column(self, rows: Array, out: Array) -> None:
        """Fill out (C, N * O) with rows (N * C, O)."""
        apart = by_sequence(rows, len(rows) // len(out))
        out.reshape(len(out), -1, rows.shape[1])[...] = apart.transpose(1, 0, 2)

    def _hessian(self, u: Array, rows: slice, scale: float) -> None:
        """Overwrite u (N * C, O) with scale * H_L u, for N of the outputs."""
        self.output_loss.hessian(self.backend, self.kept[rows], u, scale)
        if self.mask is not None:
            apart = by_sequence(u, len(self.mask[rows]))
            apart *= self.mask[rows][:, None]

    def structural_gauss_newton(self, v: Array, scale: float, structural: float, out: Array) -> None:
        """Add scale * (J' H_L J + structural * J_a' W J_a) v to out, J_a the pre-activations' part."""
        u = self.jvp(v, pre=structural != 0)
        self._hessian(u.outputs, slice(None), scale)
        for r, pre in zip(self.layers, u.pre or (), strict=bool(u.pre)):
            weights: Array = r.weights
            apart = pre.reshape(*weights.shape[:2], -1, weights.shape[2])
            apart *= weights[:, :, None]
            pre[...] *= self.backend.dtype.type(scale * structural)
        self.vjp(u, out)

    def _loss_gradient(self, scale: float) -> Outputs:
        u = self.backend.workspace("outputs", self.kept.shape)
        self.output_loss.gradient(self.backend, self.kept, self.targets, scale, u)
        if self.mask is not None:
            u *= self.mask
        return Outputs(u)

    # J v ---------------------------------------------------------------------------------------

    def jvp(self, v: Array, pre: bool = False) -> Outputs:
        """J v: what a direction v (D,) does to the outputs and, with `pre`, to the pre-activations.

        For columns v (C, D) likewise what each of them does. The result lies in the backend's workspace,
        until the next pass.
        """
        backend, n, about = self.backend, self.architecture.hidden, self.architecture
        columns = [about.layout.views(column) for column in v.reshape(-1, v.shape[-1])]
        many, (count, width) = len(columns), self.kept.shape
        outputs = backend.workspace("outputs", (count, many, width))
        states = self._zeros("tangent", many)
        owns = [[about.of_layer(i, q) for q in columns] for i in range(len(self.layers))]
        every = about.layout.views(v) if many > 1 else {}
        cuts = [self._cuts(about.of_layer(i, every)) for i in range(len(self.layers))] if every else None
        above = [cut["W_o"] for cut in self._cuts(every)] if every else [slice(None)]
        symbols = self.layers[0].looks_up
        known = self._contributions(0, self.layers[0], owns[0], None) if symbols else None  # for all blocks
        for steps, scored, rows in self._blocks(pre, many):
            inputs, tangents = None, []
            for i, (last, dc) in enumerate(states):
                r = self.layers[i].part(steps)
                tables = self._contributions(i, r, owns[i], inputs) if i or known is None else known
                a, dh = self._block_tangent(i, r, owns[i], cuts[i] if cuts else [{}], tables, last, dc)
                last[...] = dh[-1]
                inputs = dh[1:]
                tangents.append(a)
            hidden = self.layers[-1].hidden[1 + scored.start : 1 + scored.stop]
            at = slice(1 + scored.start - steps.start, 1 + scored.stop - steps.start)
            direct = backend.workspace("outputs.direct", outputs[rows].shape)
            for j, q in enumerate(columns):
                self._direct(hidden.reshape(-1, n), q["W_o"], above[j], direct[:, j])
                if "b_o" in q:
                    direct[:, j] += q["b_o"]
            backend.matmul(dh[at].reshape(-1, n), self.parameters["W_o"], outputs[rows].reshape(-1, width))
            outputs[rows] += direct
        return Outputs(outputs.reshape(-1, width), tuple(tangents) if pre else None)

    def _block_tangent(
        self,
        i: int,
        r: Recurrence,
        owns: list[dict[str, Array]],
        cuts: list[dict[str, slice]],
        tables: tuple[Array, Array | None],
        last: Array,
        dc: Array,
    ) -> tuple[Array, Array]:
        """R a (L, B C, K) and R h (L + 1, B C, n) of layer i in one block, from the state before it."""
        cell, n, (length, size) = self.architecture.cell, self.architecture.hidden, r.x.shape
        backend, (table, factor_table), many = self.backend, tables, len(owns)
        before, factors = r.hidden[:-1].reshape(-1, n), None
        if r.intermediate is not None:
            factors = backend.workspace(f"factors.{i}", (length, size * many, n))
            for own, cut, out in zip(owns, cuts, _columns(factors, many), strict=True):
                self._direct(before, own["W_mh"], cut.get("W_mh", slice(None)), out)
            before = r.intermediate.reshape(-1, n)
        a = backend.workspace(f"pre.{i}", (length, size * many, cell.groups * n))
        dh = backend.workspace(f"hidden.{i}", (length + 1, size * many, n))
        dh[0] = last
        for j, (own, cut, out) in enumerate(zip(owns, cuts, _columns(a, many), strict=True)):
            self._direct(before, own["W_h"], cut.get("W_h", slice(None)), out[:, -cell.of_state * n :])
            if cell.on_rows < cell.groups:
                cell.bias_tangent(r, own["b"][cell.on_rows * n :], a[:, j::many], dh[:, j::many])
        recurrence.tangent(backend, r, table, a, factor_table, factors, dh, dc)
        return a, dh

    def _cuts(self, every: dict[str, Array]) -> list[dict[str, slice]]:
        """Give the columns of each matrix that each direction goes along, in groups of n: all others are 0.

        A direction that is one of many is often a part of a larger one, and all that is left is some gates
        of one matrix. `every` has the parameters of all directions by name, (C, ...) each.
        """
        found: list[dict[str, slice]] = []
        for name in ("W_h", "W_mh", "W_o"):
            if name in every:
                many, rows, width = every[name].shape
                size = width if name == "W_o" else self.architecture.hidden
                any_of = self.backend.xp.any(every[name].reshape(many, rows, -1, size), axis=(1, 3))
                along = self.backend.to_host(any_of)
                first, last = along.argmax(1), along.shape[1] - along[:, ::-1].argmax(1)
                ends = np.where(along.any(1), (first, last), 0).T.tolist()
                found = found or [{} for _ in range(many)]
                for cut, (begin, end) in zip(found, ends, strict=True):
                    cut[name] = slice(begin * size, end * size)
        return found

    def _direct(self, rows: Array, matrix: Array, cut: slice, out: Array) -> None:
        """Fill out with the product of rows and a direction's matrix, which is 0 beyond the columns `cut`."""
        if matrix[:, cut].shape != matrix.shape:
            out[...] = 0
        if matrix[:, cut].size:
            self.backend.matmul(rows, matrix[:, cut], out[:, cut])

    def _contributions(
        self, i: int, r: Recurrence, owns: list[dict[str, Array]], inputs: Array | None
    ) -> tuple[Array, Array | None]:
        """Give what inputs contribute to layer i along each column, through W_x with the bias and W_mx.

        `inputs` (L, B C, I) is what the columns do to the layer's inputs, None where that is nothing.
        """
        on_rows = self.architecture.cell.on_rows * self.architecture.hidden
        table = self._rows(i, "W_x", r, owns, inputs)
        for own, rows in zip(owns, _columns(table, len(owns)), strict=True):
            rows[:, :on_rows] += own["b"][:on_rows]
        return table, self._rows(i, "W_mx", r, owns, inputs) if "W_mx" in owns[0] else None

    def _rows(
        self, i: int, name: str, r: Recurrence, owns: list[dict[str, Array]], inputs: Array | None
    ) -> Array:
        """Give what inputs contribute through W_x or W_mx along each column, (R C, .)."""
        count = len(owns[0][name]) if r.looks_up else r.x.size
        shape = (count * len(owns), owns[0][name].shape[1])
        table = self.backend.workspace(f"direction.{name}.{i}", shape)
        for own, rows in zip(owns, _columns(table, len(owns)), strict=True):
            fill_rows(self.backend, r.inputs, own[name], rows)
        if inputs is not None:
            more = self.backend.workspace("direction.more", table.shape)
            fill_rows(self.backend, inputs, self.parameters[self.architecture.names[i][name]], more)
            table += more
        return table

    # J' u --------------------------------------------------------------------------------------

    def vjp(self, u: Outputs, out: Array, squares: Array | None = None, factors: Array | None = None) -> None:
        """J' u: add the parameter cotangent of the output cotangents u to out (D,).

        Parameters
        ----------
        u : Outputs
            `u.pre`, if given, must be what `jvp` returned, in place: its memory is used up.
        out : (D,) or (C, D)
            The cotangent, or that of each column, is added to it.
        squares : (D,), optional
            Gains, for every sequence of the batch, the element-wise square of that sequence's cotangent;
            not for columns.
        factors : array, optional
            Gains the sums of `hfmpi.networks.factors`; not for columns.
        """
        backend, n = self.backend, self.architecture.hidden
        many = len(u.outputs) // max(1, len(self.kept))
        size, top = self.layers[0].x.shape[1] * many, len(self.layers) - 1
        states = self._zeros("adjoint", many)
        whole = squares is not None or u.pre is not None
        for steps, scored, rows in reversed(self._blocks(whole, many)):
            length = steps.stop - steps.start
            dh = backend.workspace(f"hidden.{top}", (length + 1, size, n))
            first = 1 + scored.start - steps.start
            dh[1:first] = 0
            own = u.outputs[rows.start * many : rows.stop * many]
            backend.matmul(own, self.parameters["W_o"].T, dh[first:].reshape(-1, n))
            cotangents = []
            for i in range(top, -1, -1):
                below = backend.workspace(f"hidden.{i - 1}", (length + 1, size, n)) if i else None
                pre = None if u.pre is None else u.pre[i]
                back, dc = states[i]
                cotangents.append(self._block_adjoint(i, steps, dh, pre, back, dc, below))
                dh = below
            du = own.reshape(-1, size, self.architecture.outputs)
            self._collect(cotangents[::-1], du, out, squares)
            if factors is not None:
                kronecker.accumulate(backend, self.architecture, cotangents[::-1], du, factors)

    def _block_adjoint(
        self, i: int, steps: slice, dh: Array, pre: Array | None, back: Array, dc: Array, below: Array | None
    ) -> Cotangents:
        """Pull the cotangents dh (L + 1, B C, n) back through layer i in one block, into `below` if given."""
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
        return Cotangents(r.inputs, r.hidden, r.intermediate, dh[1:], da, dp, dq)

    def _collect(
        self, cotangents: Sequence[Cotangents], du: Array, out: Array, squares: Array | None
    ) -> None:
        """Add the parameter cotangents of one block to out (D,), and their squares by sequence to squares."""
        backend, layout = self.backend, self.architecture.layout
        if squares is not None and backend.each_numbers:
            many = max(1, backend.each_numbers // layout.size)
            for start in range(0, du.shape[1], many):
                part = slice(start, start + many)
                each = backend.workspace("each", (du[:, part].shape[1], layout.size))
                self._gradient([own.of(part, part) for own in cotangents], du[:, part], each, Each(backend))
                backend.accumulate_squares(each, out, squares)
            return
        single = backend.workspace("gradient", (layout.size,))
        if squares is None:
            columns = out.reshape(-1, layout.size)
            for j, column in enumerate(columns):
                part = slice(j, None, len(columns))
                own = [whole.of(slice(None), part) for whole in cotangents]
                self._gradient(own, du[:, part], single, Whole(backend))
                column += single
            return
        for b in range(du.shape[1]):
            part = slice(b, b + 1)
            self._gradient([own.of(part, part) for own in cotangents], du[:, part], single, Whole(backend))
            backend.accumulate_square(single, out, squares)

    def _gradient(self, cotangents: Sequence[Cotangents], du: Array, out: Array, sums: Sums) -> None:
        """Fill out (D,), or (B, D) for each sequence, with the parameter cotangents of some sequences."""
        g = self.architecture.layout.views(out)
        for i, own in enumerate(cotangents):
            layer_gradient(self.architecture.cell, own, self.architecture.of_layer(i, g), sums)
        hidden = cotangents[-1].hidden
        sums.product(hidden[len(hidden) - len(du) :], du, g["W_o"])
        if "b_o" in g:
            sums.total(du, g["b_o"])

    def _zeros(self, name: str, columns: int) -> list[tuple[Array, Array]]:
        """Give two arrays (B C, n) of zeros for each layer."""
        shape, found = (self.layers[0].x.shape[1] * columns, self.architecture.hidden), []
        for i in range(len(self.layers)):
            both = [self.backend.workspace(f"{name}.{part}.{i}", shape) for part in "hc"]
            for array in both:
                array[...] = 0
            found.append((both[0], both[1]))
        return found

    def _blocks(self, whole: bool, columns: int) -> list[tuple[slice, slice, slice]]:
        """Cut the steps into blocks of nearly one length, in order.

        Returns
        -------
        list of (steps, scored, rows)
            Steps of the recurrence, those among them that have outputs (perhaps none), and the rows of
            the outputs (T * B, O) that belong to these.
        """
        length, size = self.layers[0].x.shape
        burn_in = length - len(self.kept) // size
        found = []
        most = max(self.block_rows, COLUMN_ROWS * columns) if columns > 1 else self.block_rows
        for steps in [slice(0, length)] if whole else blocks(length, size * columns, most):
            first = min(max(steps.start, burn_in), steps.stop)
            rows = slice(max(first - burn_in, 0) * size, max(steps.stop - burn_in, 0) * size)
            found.append((steps, slice(first, steps.stop), rows))
        return found


def _columns(rows: Array, columns: int) -> list[Array]:
    """Give the rows (..., N C, .) of each column, (N, .): views."""
    apart = rows.reshape(-1, columns, rows.shape[-1])
    return [apart[:, j] for j in range(columns)]
