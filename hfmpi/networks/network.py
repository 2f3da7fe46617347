"""Recurrent networks: layers of one cell that read symbols or vectors, and a loss of their outputs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hfmpi.backends import create
from hfmpi.backends.base import Array, Workspace
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError, shown
from hfmpi.models.batch import Batch
from hfmpi.models.losses import Loss, choose
from hfmpi.networks import factors as kronecker
from hfmpi.networks import recurrence
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.recurrence import Recurrence
from hfmpi.networks.tape import Tape, blocks, fill_outputs, fill_rows
from hfmpi.optim.checks import check_vector
from hfmpi.optim.layout import Block

__all__ = ["Network", "State"]


class State(NamedTuple):
    """State of a layer between steps: h (B, n), and c (B, n), which cells without c carry along unused."""

    h: Array
    c: Array


class Network:
    """A recurrent network with a loss, on one device; satisfies `hfmpi.models.base.Model`.

    Parameters
    ----------
    architecture : Architecture, optional
        In its place cell, inputs, outputs and hidden, and perhaps layers and variant, as it names them.
    backend : NumpyBackend, optional
        Without it the fastest that this machine has, for float32.
    loss : {'cross-entropy', 'squares', 'bernoulli'} or Loss
    block_rows : int, optional
        About how many rows (steps times sequences) the time-batched products take at once; changes the
        results within rounding. Without it, what suits the backend.
    initialisation, forget_bias
        As in `Architecture.initial`.
    """

    def __init__(
        self,
        architecture: Architecture | None = None,
        backend: NumpyBackend | None = None,
        loss: str | Loss = "cross-entropy",
        block_rows: int | None = None,
        initialisation: str = "krause",
        forget_bias: float = 0.0,
        *,
        cell: str | None = None,
        inputs: int | None = None,
        outputs: int | None = None,
        hidden: int | None = None,
        layers: int = 1,
        variant: str = "standard",
    ) -> None:
        if architecture is None:
            if cell is None or inputs is None or outputs is None or hidden is None:
                raise UserError("a network needs an architecture, or cell, inputs, outputs and hidden")
            architecture = Architecture(cell, hidden, inputs, outputs, layers, variant)
        elif (cell, inputs, outputs, hidden, layers, variant) != (None, None, None, None, 1, "standard"):
            raise UserError("a network takes an architecture, or cell, inputs, outputs and hidden, not both")
        for name, given, kind, words in (
            ("architecture", architecture, Architecture, "an Architecture"),
            ("backend", backend, NumpyBackend | None, "what hfmpi.backends.create gives"),
            ("block_rows", block_rows, int | None, "a whole number"),
        ):
            if not isinstance(given, kind):
                raise UserError(f"{name} must be {words}, not {shown(given)}")
        self.architecture = architecture
        self.backend = backend or create()
        self.output_loss = choose(loss)
        self.block_rows = block_rows or self.backend.block_rows
        self.layout = architecture.layout
        self.initialisation, self.forget_bias = initialisation, forget_bias
        self._scratch = self.backend.new_workspace()

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return self.layout.size

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices that theta is made of."""
        return self.architecture.blocks

    def initial(self, seed: int) -> np.ndarray:
        """Draw parameters to start from, (D,) float64, the same for every device and number of ranks."""
        return self.architecture.initial(seed, self.initialisation, self.forget_bias)

    def release(self) -> None:
        """Forget all scratch memory of this network and of its backend."""
        self._scratch.flat.clear()
        self.backend.release()

    # One batch ---------------------------------------------------------------------------------

    def loss(self, theta: Array, batch: Batch) -> float:
        """Give the summed loss in nats, without a linearisation."""
        return self._run(theta, batch, False, False, self._scratch).loss

    def linearise(self, theta: Array, batch: Batch, reuse: Tape | None = None) -> Tape:
        """Run the network and keep what every later product with J and J' needs.

        Parameters
        ----------
        theta : (D,)
        batch : Batch
        reuse : Tape, optional
            One whose memory may be overwritten.

        Raises
        ------
        UserError
            If the batch is not one of this network.
        """
        return self._run(theta, batch, True, False, reuse.memory if reuse else self.backend.new_workspace())

    def linearise_structural(self, theta: Array, batch: Batch, reuse: Tape | None = None) -> Tape:
        """Linearise, and keep the structural-damping weights of the pre-activations too."""
        return self._run(theta, batch, True, True, reuse.memory if reuse else self.backend.new_workspace())

    def squared_gradients(self, at: Tape, scale: float, out: Array, squares: Array) -> None:
        """Add the gradient to out (D,), and the sum of its squares over sequences to squares (D,)."""
        at.squared_gradients(scale, out, squares)

    @property
    def factors_size(self) -> int:
        """The numbers that `factored_gradient` adds to."""
        return kronecker.size(self.blocks)

    def factored_gradient(self, at: Tape, scale: float, out: Array, factors: Array) -> None:
        """Add the gradient to out (D,), and sums for the Kronecker factors of all blocks to factors."""
        at.factored_gradient(scale, out, factors)

    def normalise_factors(self, factors: Array, scored: int) -> Array:
        """Give A and B of each block, one after the other, from the sums of all ranks, which are used up."""
        kronecker.normalise(self.blocks, factors, scored)
        return factors[:-1]

    def tape_bytes(self, steps: int, size: int, structural: bool = False, looks_up: bool = True) -> int:
        """Give the memory that the tape of a batch (steps, size) takes, without running it.

        Per step and sequence and layer 7n numbers for an LSTM, 6n for a GRU and n for a plain cell,
        2n more for a multiplicative one (3n where it reads vectors) and K more with structural
        damping; and the outputs.
        """
        about = self.architecture
        cell, n = about.cell, about.hidden
        read = about.layers - looks_up  # layers that read vectors
        numbers = about.layers * n * (1 + cell.kept + 2 * cell.multiplicative + structural * cell.groups)
        numbers += about.outputs + read * n * cell.multiplicative + (not looks_up) * about.inputs
        whole = (steps * numbers + about.layers * n) * size * self.backend.dtype.itemsize
        return whole + 4 * steps * size * (looks_up + (read > 0))

    def outputs(self, theta: Array, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Give outputs (N, O), before the loss, their targets (N,) or (N, O), and a mask (N, 1) or None.

        On the host; the rows are the sequences of the first step that has targets, then those of the next.
        """
        memory = self._scratch
        inputs, targets, mask = self._placed(batch, memory)
        _, _, outputs = self._forward(theta, inputs, len(targets), False, False, memory)
        to_host = self.backend.to_host
        kept = np.array(to_host(outputs))  # the scratch memory is overwritten by the next pass
        return kept, to_host(targets), None if mask is None else to_host(mask)

    def _run(self, theta: Array, batch: Batch, linearise: bool, structural: bool, memory: Workspace) -> Tape:
        inputs, targets, mask = self._placed(batch, memory)
        p, layers, kept = self._forward(theta, inputs, len(targets), linearise, structural, memory)
        losses = self.output_loss.value(self.backend, kept, targets)
        if mask is not None:
            losses = losses * mask[:, 0]
        loss = float(losses.sum())
        steps, size = inputs.shape[:2]
        nbytes = self.tape_bytes(steps, size, structural, inputs.ndim == 2)
        return Tape(
            self.architecture, self.backend, self.output_loss, tuple(layers), p, kept, targets, mask, loss,
            nbytes, self.block_rows, memory,
        )  # fmt: skip

    def _forward(
        self, theta: Array, inputs: Array, rows: int, linearise: bool, structural: bool, memory: Workspace
    ) -> tuple[dict[str, Array], list[Recurrence], Array]:
        """Give the parameters by name, the layers, and the last so many rows of outputs (rows, O)."""
        check_vector("theta", theta, self.size, self.backend.xp.ndarray)
        (steps, size), n, p = inputs.shape[:2], self.architecture.hidden, self.layout.views(theta)
        layers, states = list[Recurrence](), []
        for i in range(self.architecture.layers):
            read = layers[-1].hidden[1:] if i else inputs
            hidden = memory(f"hidden.{i}", (steps + 1, size, n))
            hidden[0] = 0
            layers.append(self._layer(i, p, read, hidden, linearise, structural, memory))
            states.append(self.backend.workspace(f"forward.c.{i}", (size, n)))
            states[-1][...] = 0
        self._advance(p, layers, states)
        outputs = memory("kept", (rows, self.architecture.outputs))
        fill_outputs(self.backend, p, layers[-1].hidden[1 + steps - rows // size :], outputs)
        return p, layers, outputs

    def _placed(self, batch: Batch, memory: Workspace) -> tuple[Array, Array, Array | None]:
        """Check a batch and put it on the device: inputs, targets (T * B, ...) and mask (T * B, 1)."""
        if not isinstance(batch, Batch):
            raise UserError(
                f"a batch must have inputs, targets and mask, as of hfmpi.Arrays, not {shown(batch)}"
            )
        about, symbols, dtype = self.architecture, self.output_loss.symbols, self.backend.dtype
        given, wanted = np.asarray(batch.inputs), np.asarray(batch.targets)
        looks_up = given.ndim == 2
        if not looks_up and (given.ndim != 3 or given.shape[2] != about.inputs):
            raise UserError(
                f"inputs must be symbols (steps, sequences) or numbers (steps, sequences, {about.inputs}), "
                f"not of shape {given.shape}"
            )
        rest = () if symbols else (about.outputs,)
        if wanted.shape[1:] != (given.shape[1], *rest) or len(wanted) > len(given):
            raise UserError(
                f"targets must be {'symbols' if symbols else 'numbers'} of shape "
                f"{('steps', given.shape[1], *rest)} for at most {len(given)} steps, "
                f"not of shape {wanted.shape}"
            )
        _check_symbols("inputs", given if looks_up else None, about.inputs)
        _check_symbols("targets", wanted if symbols else None, about.outputs)
        inputs = memory("inputs", given.shape, np.int32 if looks_up else dtype)
        inputs[...] = self.backend.to_device(given.astype(np.int32 if looks_up else dtype, copy=False))
        targets = self.backend.to_device(wanted.astype(np.int32 if symbols else dtype, copy=False))
        mask = None
        if batch.mask is not None:
            if np.shape(batch.mask) != wanted.shape[:2]:
                raise UserError(f"the mask must be of shape {wanted.shape[:2]}, not {np.shape(batch.mask)}")
            mask = self.backend.to_device(np.asarray(batch.mask).astype(dtype).reshape(-1, 1))
        return inputs, targets.reshape(-1, *rest), mask

    def _layer(
        self,
        i: int,
        p: dict[str, Array],
        inputs: Array,
        hidden: Array,
        linearise: bool,
        structural: bool,
        memory: Workspace,
    ) -> Recurrence:
        """Make ready layer i, which reads these inputs, from its hidden[0] on."""
        backend, cell, n = self.backend, self.architecture.cell, self.architecture.hidden
        own = self.architecture.of_layer(i, p)
        (steps, size), kept = inputs.shape[:2], len(inputs) if linearise else 1
        x = inputs
        if inputs.ndim == 3:
            x = memory("x", (steps, size), np.int32)
            x[...] = backend.xp.arange(steps * size, dtype=np.int32).reshape(steps, size)
        r = Recurrence(cell, inputs, x, hidden, backend.pack(own["W_h"], memory, f"W_h.{i}"))
        if linearise:
            r.recurrent_t = backend.pack(own["W_h"].T, memory, f"W_h.T.{i}")
            if cell.kept:
                r.coefficients = memory(f"coefficients.{i}", (steps, cell.kept, size, n))
        if cell.multiplicative:
            r.factor = backend.pack(own["W_mh"], memory, f"W_mh.{i}")
            r.factor_t = backend.pack(own["W_mh"].T, memory, f"W_mh.T.{i}") if linearise else None
            rows = self.architecture.inputs if r.looks_up else steps * size
            r.factor_table = memory(f"W_mx.{i}", (rows, n))
            r.factors = memory(f"factors.{i}", (kept, size, n))
            r.intermediate = memory(f"intermediate.{i}", (kept, size, n))
        if cell.on_rows < cell.groups:
            r.bias_h = memory(f"b_h.{i}", ((cell.groups - cell.on_rows) * n,))
            r.bias_h[...] = own["b"][cell.on_rows * n :]
        if structural:
            r.weights = memory(f"weights.{i}", (steps, size, cell.groups * n))
        return r

    def _advance(self, p: dict[str, Array], layers: list[Recurrence], states: list[Array]) -> None:
        """Run all layers, block by block where a layer reads vectors, from their hidden[0] and states c."""
        backend, cell, n = self.backend, self.architecture.cell, self.architecture.hidden
        (steps, size), on_rows = layers[0].x.shape, cell.on_rows * n
        simple = len(layers) == 1 and layers[0].looks_up
        for block in [slice(0, steps)] if simple else blocks(steps, size, self.block_rows):
            for i, (whole, c) in enumerate(zip(layers, states, strict=True)):
                r, own = whole.part(block), self.architecture.of_layer(i, p)
                rows = self.architecture.inputs if r.looks_up else r.x.size
                table = backend.workspace(f"table.{i}", (rows, cell.of_inputs * n))
                fill_rows(backend, r.inputs, own["W_x"], table)
                table[:, :on_rows] += own["b"][:on_rows]
                if r.factor_table is not None:
                    fill_rows(backend, r.inputs, own["W_mx"], r.factor_table)
                recurrence.forward(backend, r, table, c)

    # Step by step ------------------------------------------------------------------------------

    def advance(
        self, theta: Array, state: tuple[State, ...] | None, inputs: Array
    ) -> tuple[tuple[State, ...], Array]:
        """Read inputs (L, B) or (L, B, I) from a state (None: zero); give that after and the last outputs."""
        (steps, size), n, xp = inputs.shape[:2], self.architecture.hidden, self.backend.xp
        check_vector("theta", theta, self.size, self.backend.xp.ndarray)
        p, memory = self.layout.views(theta), self._scratch
        layers, states = list[Recurrence](), []
        for i in range(self.architecture.layers):
            hidden = xp.zeros((steps + 1, size, n), self.backend.dtype)
            c = xp.zeros((size, n), self.backend.dtype)
            if state is not None:
                hidden[0], c[...] = state[i]
            read = layers[-1].hidden[1:] if i else inputs
            layers.append(self._layer(i, p, read, hidden, False, False, memory))
            states.append(c)
        self._advance(p, layers, states)
        outputs = xp.empty((size, self.architecture.outputs), self.backend.dtype)
        fill_outputs(self.backend, p, layers[-1].hidden[-1], outputs)
        return tuple(State(r.hidden[-1], c) for r, c in zip(layers, states, strict=True)), outputs


def _check_symbols(what: str, symbols: np.ndarray | None, count: int) -> None:
    """Raise a UserError if there are others than 0 ... count - 1: kernels would read beyond their tables."""
    if symbols is None or not symbols.size:
        return
    if symbols.dtype.kind not in "iu":
        raise UserError(f"{what} must be whole numbers, as symbols are, not {symbols.dtype}")
    if symbols.view(f"u{symbols.itemsize}").max() >= count:  # negative ones are huge
        raise UserError(
            f"{what} must be symbols from 0 to {count - 1}, not {symbols.min()} to {symbols.max()}"
        )
