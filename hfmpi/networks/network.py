"""Recurrent networks: layers of one kind of cell that read symbols or vectors, and a loss of the outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hfmpi.backends import create
from hfmpi.backends.base import Array, Workspace
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.data.batches import check_steps, scored_targets
from hfmpi.data.examples import Arrays, Examples, one_hot_remedy
from hfmpi.errors import UserError, shown
from hfmpi.measure.cost import ForwardPass
from hfmpi.models.batch import (
    Batch,
    burn_in_of,
    check_bounds,
    check_mask,
    check_symbols,
    check_targets,
    example_weights,
    parts,
)
from hfmpi.models.factors import FactorSums
from hfmpi.models.loss_check import check_loss
from hfmpi.models.losses import Loss, choose, total_loss
from hfmpi.models.micro_batches import check_theta, in_parts, inputs_alone, loss_of_examples
from hfmpi.networks import recurrence
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.recurrence import Recurrence
from hfmpi.networks.tape import NetworkLinearisation, Tape, blocks, fill_outputs, fill_rows
from hfmpi.optim.checks import check_vector
from hfmpi.optim.layout import Block

__all__ = ["Network", "State"]


class State(NamedTuple):
    """The state of a layer between steps: h (B, n) and c (B, n); cells without c do not use it."""

    h: Array
    c: Array


class Network:
    """A recurrent network with a loss, on one device; satisfies `hfmpi.models.base.Model`.

    Vectors such as theta are arrays (D,) of the backend, with its dtype (float32 or float64). The inputs of a
    batch are symbols (B, L) or numbers (B, L, I). Its targets belong to the last T steps, the steps after the
    burn-in: symbols (B, T) or numbers (B, T, O), as the loss requires. Several threads may use one network.

    Parameters
    ----------
    architecture : Architecture, optional
        Required unless cell, inputs, outputs and hidden are passed.
    backend : NumpyBackend, optional
        A result of `hfmpi.backends.create`. Default: the fastest backend on this machine, with float32.
    loss : {'cross-entropy', 'squares', 'mse', 'bernoulli', 'binary-cross-entropy'} or Loss
    block_rows : int, optional
        The approximate number of rows (steps times sequences) that the time-batched products process at once.
        It changes the results only by rounding. Default: the recommended value of the backend.
    initialisation, forget_bias
        As in `Architecture.initial`.
    cell, inputs, outputs, hidden, layers, variant
        The arguments of `Architecture`, instead of an object; `cell` is its name.

    Raises
    ------
    UserError
        If an argument is missing or wrong.

    Examples
    --------
    >>> x = np.random.default_rng(0).integers(0, 2, (500, 12))
    >>> network = hfmpi.Network(cell="lstm", inputs=2, outputs=2, hidden=10)
    >>> result = hfmpi.train(network, (x, x.cumsum(axis=1) % 2), optimizer="subspace", max_steps=15)
    """

    linearisation = NetworkLinearisation
    examples = Arrays  # the class to which a tuple (x, y) or (x, y, mask) is converted

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
            raise UserError(
                "a network takes an architecture, or cell, inputs, outputs and hidden, but not both"
            )
        for name, value, kind, words in (
            ("architecture", architecture, Architecture, "an Architecture"),
            ("backend", backend, NumpyBackend | None, "a result of hfmpi.backends.create"),
            ("block_rows", block_rows, int | None, "a whole number"),
        ):
            if not isinstance(value, kind):
                raise UserError(f"{name} must be {words}, not {shown(value)}")
        self.architecture = architecture
        self.backend = backend or create()
        self.output_loss = choose(loss)
        self._loss_checked = False
        self.block_rows = block_rows or self.backend.block_rows
        self.layout = architecture.layout
        self.initialisation, self.forget_bias = initialisation, forget_bias
        self._scratch = self.backend.new_scratch()

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return self.layout.size

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The matrices of theta; see `Architecture.blocks`."""
        return self.architecture.blocks

    @property
    def factor_sums(self) -> FactorSums:
        """The sums for the Kronecker factors of all blocks; see `Architecture.factor_sums`."""
        return self.architecture.factor_sums

    def initial(self, seed: int) -> np.ndarray:
        """Draw initial parameters (D,), float64, which do not depend on the device or the number of ranks."""
        return self.architecture.initial(seed, self.initialisation, self.forget_bias)

    def forward_pass(self, steps: int) -> ForwardPass:
        """Return the cost of the forward pass of a sequence of `steps` steps.

        A symbol counts as the product with its one-hot vector, although a pass only looks up a row. Each step
        of a layer adds one product with W_h to the depth, and a multiplicative cell adds one with W_mh.
        """
        sequential = self.architecture.layers * (1 + self.architecture.cell.multiplicative)
        return ForwardPass(2 * self.size * steps, sequential * steps)

    def release(self) -> None:
        """Release the scratch memory of the network and of its backend."""
        self._scratch.flat.clear()
        self.backend.release()

    def check_data(self, inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> None:
        """Raise a UserError unless all symbols and targets fit the network and its loss."""
        if inputs.ndim == 2:
            check_symbols("inputs", inputs, self.architecture.inputs)
        check_targets(targets, mask, self.output_loss, self.architecture.outputs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes that a copy or a pickle of the network contains."""
        return {name: value for name, value in self.__dict__.items() if name != "_scratch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle of a network, with new scratch memory."""
        self.__dict__.update(state)
        self._scratch = self.backend.new_scratch()

    # One batch ---------------------------------------------------------------------------------

    def loss(self, theta: Array, batch: Batch | Examples) -> float:
        """Return the loss summed over the scored outputs, in nats, without a linearisation.

        `Examples` of any number are processed in micro-batches.

        Raises
        ------
        UserError
            If the batch does not fit the network.
        """
        if isinstance(batch, Examples):
            return loss_of_examples(self, theta, batch)
        inputs, targets, mask = self._to_device(batch, self._scratch)
        scales = self._scales(batch, self._scratch)
        _, _, outputs = self._forward(theta, inputs, len(targets), self._scratch, scales)
        return self._value(outputs, targets, mask)

    def linearise(
        self, theta: Array, batch: Batch, reuse: NetworkLinearisation | None = None
    ) -> NetworkLinearisation:
        """Run the network and store the arrays that are needed for products with J and J'.

        Parameters
        ----------
        theta : (D,)
        batch : Batch
        reuse : NetworkLinearisation, optional
            A linearisation that is no longer needed; its memory is overwritten.

        Raises
        ------
        UserError
            If the batch does not fit the network.
        """
        return self._linearise(theta, batch, reuse, structural=False)

    def linearise_structural(
        self, theta: Array, batch: Batch, reuse: NetworkLinearisation | None = None
    ) -> NetworkLinearisation:
        """Linearise as `linearise` does, and compute the structural-damping weights of pre-activations."""
        return self._linearise(theta, batch, reuse, structural=True)

    def tape_bytes(
        self, steps: int, size: int, structural: bool = False, looks_up: bool = True, dropout: bool = False
    ) -> int:
        """Compute the bytes that the tape of `size` sequences of `steps` steps occupies, without a pass.

        For each step and sequence, a layer stores 7n numbers if it is an LSTM, 6n if it is a GRU, and n if it
        is a plain cell. It stores 2n more if it is multiplicative (3n if it reads vectors), K more with
        structural damping, and n more with dropout.
        """
        architecture = self.architecture
        cell, n, layers = architecture.cell, architecture.hidden, architecture.layers
        read = layers - looks_up  # layers that read vectors
        units = 1 + cell.coefficients + 2 * cell.multiplicative + structural * cell.groups + dropout
        numbers = layers * n * units + read * n * cell.multiplicative
        numbers += architecture.outputs + (not looks_up) * architecture.inputs
        reals = (steps * numbers + (1 + dropout) * layers * n) * size * self.backend.dtype.itemsize
        return reals + 4 * steps * size * (looks_up + (read > 0))

    def outputs(self, theta: Array, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return outputs (N, O), before the loss, their targets (N,) or (N, O), and a mask (N, 1) or None.

        They are on the host and sorted by step: all sequences at the first step that has targets, then at the
        next one.

        Raises
        ------
        UserError
            If the batch does not fit the network.
        """
        inputs, targets, mask = self._to_device(batch, self._scratch)
        scales = self._scales(batch, self._scratch)
        _, _, outputs = self._forward(theta, inputs, len(targets), self._scratch, scales)
        to_host = self.backend.to_host
        copied = np.array(to_host(outputs))  # the next pass overwrites the scratch memory
        return copied, to_host(targets), None if mask is None else to_host(mask)

    def predict(self, theta: Array, x: Any) -> np.ndarray:
        """Compute the outputs of sequences without targets at every step, on this rank, in micro-batches.

        Parameters
        ----------
        theta : (D,)
            Parameters, on the host or on the device, such as `result.theta` of `hfmpi.train`.
        x : (B, L) symbols or (B, L, I) numbers

        Returns
        -------
        outputs : (B, L, O)
            Before the loss, on the host.

        Raises
        ------
        UserError
            If theta or the inputs do not fit the network.

        Examples
        --------
        >>> symbols = network.predict(result.theta, x_new)[:, -1].argmax(axis=-1)
        """
        check_theta(theta, self.size, kind=None)
        theta = self.backend.to_device(theta).astype(self.backend.dtype, copy=False)

        def outputs(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
            inputs = self._inputs_to_device(self._checked_inputs(arrays), self._scratch)
            steps, size = inputs.shape[:2]
            _, _, z = self._forward(theta, inputs, steps * size, self._scratch)
            by_step = np.array(self.backend.to_host(z)).reshape(steps, size, -1)
            return np.ascontiguousarray(by_step.swapaxes(0, 1))

        return in_parts(outputs, inputs_alone(x), self.backend.micro_batch)

    def _linearise(
        self, theta: Array, batch: Batch, reuse: NetworkLinearisation | None, *, structural: bool
    ) -> NetworkLinearisation:
        memory = reuse.passes.memory if reuse else self.backend.new_workspace()
        inputs, targets, mask = self._to_device(batch, memory)
        scales = self._scales(batch, memory)
        p, layers, cache = self._forward(
            theta, inputs, len(targets), memory, scales, linearise=True, structural=structural
        )
        loss = self._value(cache, targets, mask)
        steps, size = inputs.shape[:2]
        nbytes = self.tape_bytes(steps, size, structural, inputs.ndim == 2, scales is not None)
        tape = Tape(
            self.architecture, self.backend, tuple(layers), p, len(targets), nbytes, self.block_rows, memory
        )
        rows, directions = self.block_rows, self.backend.directions
        weights = example_weights(batch, self.backend.dtype)
        weights = None if weights is None else self.backend.to_device(weights)
        return NetworkLinearisation(
            tape, self.output_loss, self.backend, cache, targets, mask, loss, rows, directions, weights
        )

    def _value(self, outputs: Array, targets: Array, mask: Array | None) -> float:
        """Return the summed loss, and overwrite the outputs with the cache for the derivatives."""
        if not self._loss_checked:  # it is harmless if two threads check the first batch
            check_loss(self.output_loss, self.backend, outputs, targets, mask)
            self._loss_checked = mask is None or bool(mask.any())
        return total_loss(self.output_loss, self.backend, outputs, targets, mask)

    def _forward(
        self,
        theta: Array,
        inputs: Array,
        rows: int,
        memory: Workspace,
        scales: Array | None = None,
        *,
        linearise: bool = False,
        structural: bool = False,
    ) -> tuple[dict[str, Array], list[Recurrence], Array]:
        """Run the network; return parameters by name, layers, and the last `rows` outputs (rows, O).

        `scales` (layers, B, n) are the factors of the units of each layer where they are read.
        """
        check_vector("theta", theta, self.size, self.backend.xp.ndarray)
        (steps, size), n, p = inputs.shape[:2], self.architecture.hidden, self.layout.views(theta)
        layers, states = list[Recurrence](), []
        for i in range(self.architecture.layers):
            read = layers[-1].read if i else inputs
            hidden = memory(f"hidden.{i}", (steps + 1, size, n))
            hidden[0] = 0
            layers.append(self._layer(i, p, read, hidden, memory, linearise=linearise, structural=structural))
            if scales is not None:
                layers[-1].scales, layers[-1].scaled = scales[i], memory(f"scaled.{i}", (steps, size, n))
            states.append(self.backend.workspace(f"forward.c.{i}", (size, n)))
            states[-1][...] = 0
        self._advance(p, layers, states)
        outputs = memory("outputs", (rows, self.architecture.outputs))
        fill_outputs(self.backend, p, layers[-1].read[steps - rows // size :], outputs)
        return p, layers, outputs

    def _scales(self, batch: Batch, memory: Workspace) -> Array | None:
        """Copy the factors of the units of a batch to the device, (layers, B, n); None without dropout."""
        factors = getattr(batch, "unit_scales", None)
        if factors is None:
            return None
        about = self.architecture
        shape = (len(batch.targets), about.layers, about.hidden)
        if factors.shape != shape:
            raise UserError(f"unit_scales must have the shape {shape}, not {factors.shape}")
        scales = memory("scales", (shape[1], shape[0], shape[2]))
        scales[...] = self.backend.to_device(_time_first(factors.astype(self.backend.dtype, copy=False)))
        return scales

    def _to_device(self, batch: Batch, memory: Workspace) -> tuple[Array, Array, Array | None]:
        """Check a batch and copy it to the device, time-major.

        Returns
        -------
        inputs : (L, B) int32 or (L, B, I)
        targets : (T * B,) int32 or (T * B, O)
        mask : (T * B, 1) or None
        """
        arrays, y, mask = parts(batch)
        x = self._checked_inputs(arrays)
        architecture, symbols, dtype = self.architecture, self.output_loss.symbols, self.backend.dtype
        sequences, width = len(x), () if symbols else (architecture.outputs,)
        if y.ndim < 2 or (len(y), *y.shape[2:]) != (sequences, *width):
            raise UserError(
                f"targets must be {'symbols' if symbols else 'numbers'} of shape "
                f"{(sequences, 'steps', *width)} for inputs of shape {x.shape}, not of shape {y.shape}"
                f"{one_hot_remedy(y) if symbols else ''}"
            )
        check_steps(x.shape, y.shape, burn_in_of(batch))
        check_mask(mask, y.shape[:2])
        y = scored_targets(y, mask)
        if symbols:
            check_symbols("targets", y, architecture.outputs)
        else:
            check_bounds(y, self.output_loss)
        inputs = self._inputs_to_device(x, memory)
        targets = self.backend.to_device(_time_first(y.astype(np.int32 if symbols else dtype, copy=False)))
        if mask is not None:
            mask = self.backend.to_device(_time_first(mask.astype(dtype)).reshape(-1, 1))
        return inputs, targets.reshape(-1, *width), mask

    def _checked_inputs(self, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the inputs of a batch, or raise a UserError if the network cannot read them."""
        (x, *others), numbers = arrays, self.architecture.inputs
        if others or not (x.ndim == 2 or (x.ndim == 3 and x.shape[2] == numbers)):
            raise UserError(
                f"inputs must be symbols (sequences, steps) or numbers (sequences, steps, {numbers}), "
                f"not {f'{1 + len(others)} arrays' if others else f'an array of shape {x.shape}'}"
            )
        if x.ndim == 2:
            check_symbols("inputs", x, numbers)
        return x

    def _inputs_to_device(self, x: np.ndarray, memory: Workspace) -> Array:
        """Copy checked inputs to the device, time-major: (L, B) int32 or (L, B, I)."""
        looks_up = x.ndim == 2
        dtype = np.dtype(np.int32) if looks_up else self.backend.dtype
        name = "inputs" if looks_up else "vectors"  # a network may read both; a named array has one dtype
        inputs = memory(name, (x.shape[1], x.shape[0], *x.shape[2:]), dtype)
        inputs[...] = self.backend.to_device(_time_first(x.astype(dtype, copy=False)))
        return inputs

    def _layer(
        self,
        i: int,
        p: dict[str, Array],
        inputs: Array,
        hidden: Array,
        memory: Workspace,
        *,
        linearise: bool = False,
        structural: bool = False,
    ) -> Recurrence:
        """Create the recurrence of layer i, which reads `inputs` and starts from hidden[0]."""
        backend, cell, n = self.backend, self.architecture.cell, self.architecture.hidden
        matrices = self.architecture.of_layer(i, p)
        (steps, size), stored = inputs.shape[:2], len(inputs) if linearise else 1
        x = inputs
        if inputs.ndim == 3:
            x = memory("x", (steps, size), np.int32)
            x[...] = backend.xp.arange(steps * size, dtype=np.int32).reshape(steps, size)
        r = Recurrence(cell, inputs, x, hidden, backend.pack(matrices["W_h"], memory, f"W_h.{i}"))
        if linearise:
            r.recurrent_t = backend.pack(matrices["W_h"].T, memory, f"W_h.T.{i}")
            if cell.coefficients:
                r.coefficients = memory(f"coefficients.{i}", (steps, cell.coefficients, size, n))
        if cell.multiplicative:
            r.factor = backend.pack(matrices["W_mh"], memory, f"W_mh.{i}")
            if linearise:
                r.factor_t = backend.pack(matrices["W_mh"].T, memory, f"W_mh.T.{i}")
            rows = self.architecture.inputs if r.looks_up else steps * size
            r.factor_table = memory(f"W_mx.{i}", (rows, n))
            r.factors = memory(f"factors.{i}", (stored, size, n))
            r.intermediate = memory(f"intermediate.{i}", (stored, size, n))
        if cell.on_rows < cell.groups:
            r.bias_h = memory(f"b_h.{i}", ((cell.groups - cell.on_rows) * n,))
            r.bias_h[...] = matrices["b"][cell.on_rows * n :]
        if structural:
            r.weights = memory(f"weights.{i}", (steps, size, cell.groups * n))
        return r

    def _advance(self, p: dict[str, Array], layers: list[Recurrence], states: list[Array]) -> None:
        """Run all layers from their hidden[0] and states c, block by block if a layer reads vectors."""
        backend, cell, n = self.backend, self.architecture.cell, self.architecture.hidden
        (steps, size), on_rows = layers[0].x.shape, cell.on_rows * n
        simple = len(layers) == 1 and layers[0].looks_up
        for block in [slice(0, steps)] if simple else blocks(steps, size, self.block_rows):
            for i, (layer, c) in enumerate(zip(layers, states, strict=True)):
                r, matrices = layer.part(block), self.architecture.of_layer(i, p)
                rows = self.architecture.inputs if r.looks_up else r.x.size
                table = backend.workspace(f"table.{i}", (rows, cell.of_inputs * n))
                fill_rows(backend, r.inputs, matrices["W_x"], table)
                table[:, :on_rows] += matrices["b"][:on_rows]
                if r.factor_table is not None:
                    fill_rows(backend, r.inputs, matrices["W_mx"], r.factor_table)
                recurrence.forward(backend, r, table, c)
                if r.scaled is not None:
                    backend.xp.multiply(r.hidden[1:], r.scales, out=r.scaled)

    # Step by step ------------------------------------------------------------------------------

    def advance(
        self, theta: Array, state: tuple[State, ...] | None, inputs: Array
    ) -> tuple[tuple[State, ...], Array]:
        """Process time-major inputs, starting from a state of every layer.

        Parameters
        ----------
        theta : (D,)
        state : tuple of State or None
            None: all states are zero.
        inputs : (L, B) int32, or (L, B, I)

        Returns
        -------
        state : tuple of State
            The state after the last step.
        outputs : (B, O)
            The outputs of the last step.
        """
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
            layers.append(self._layer(i, p, read, hidden, memory))
            states.append(c)
        self._advance(p, layers, states)
        outputs = xp.empty((size, self.architecture.outputs), self.backend.dtype)
        fill_outputs(self.backend, p, layers[-1].hidden[-1], outputs)
        return tuple(State(r.hidden[-1], c) for r, c in zip(layers, states, strict=True)), outputs


def _time_first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.swapaxes(0, 1))
