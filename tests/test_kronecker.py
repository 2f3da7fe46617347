"""Kronecker factors against their definition: the gradient with respect to a matrix at each single step."""

import functools

import independent
import numpy as np
import pytest
from dense import stored
from test_models import close
from test_networks import BACKENDS, KINDS, make

from hfmpi.optim import layout
from hfmpi.optim.layout import split_factors

CASES = [(1, "cross-entropy", True, False), (2, "cross-entropy", True, True), (1, "squares", False, False)]
SIZES = {"hidden": 2, "steps": 3, "size": 2, "scored": 2}


def inputs_of(about, tape, at):
    """Give the inputs z of each block at a step and sequence, from the states of the network."""
    t, b = at
    found, one = [], np.ones(1)
    for layer in tape.layers:
        x = layer.inputs[t, b]
        x = np.eye(about.inputs)[x] if layer.looks_up else x
        h = layer.hidden[t, b]
        source = h
        if about.cell.multiplicative:
            found += [x, h]
            source = layer.intermediate[t, b]
        if about.name == "gru":
            found += [x, h, one]
        elif about.variant == "krause":
            found += [np.concatenate([x, source]), one]
        else:
            found += [np.concatenate([x, source, one])]
    after = tape.layers[-1].hidden[t + 1, b]
    return [*found, np.concatenate([after, one]) if about.variant == "standard" else after]


def cotangent_of_q(theta, about, batch, loss, at, layer):
    found = []
    for e in np.eye(about.hidden):
        q = np.zeros((about.layers, about.hidden), complex)
        q[layer] = 1j * independent.STEP * e
        found.append(independent.loss(theta.astype(complex), about, batch, loss, at, theta, q).imag)
    return np.array(found) / independent.STEP


@functools.cache
def expected_factors(kind, case):
    """Give dense A and B of all blocks, computed once for all backends."""
    network, theta, batch, _ = make(kind, *case, "numpy", **SIZES)
    loss = case[1]
    about, scale = network.about, 1 / (batch.targets.shape[0] * batch.targets.shape[1])
    tape = network.forward(theta, batch)
    a = [np.zeros((block.rows, block.rows)) for block in about.blocks]
    b = [np.zeros((block.columns, block.columns)) for block in about.blocks]
    steps = list(np.ndindex(*batch.inputs.shape[:2]))
    for at in steps:
        g = np.zeros_like(theta)
        for j, e in enumerate(np.eye(len(theta))):
            other = theta + 1j * independent.STEP * e
            g[j] = independent.loss(theta.astype(complex), about, batch, loss, at, other).imag
        g *= scale / independent.STEP
        for i, (block, z) in enumerate(zip(about.blocks, inputs_of(about, tape.passes, at), strict=True)):
            if i < len(a) - 1 or at[0] >= len(batch.inputs) - len(batch.targets):
                a[i] += np.outer(z, z) / len(steps)
            da = z @ block.of(g) / (z @ z) if z @ z > 0 else None
            if block.name.startswith("W_mh"):  # where the state is still zero, so is its gradient
                layer = int(block.name.partition(".")[2] or 1) - 1
                da = scale * cotangent_of_q(theta, about, batch, loss, at, layer)
            if about.name == "gru" and block.name.startswith("W_h"):  # likewise; the bias sees it all
                da = about.blocks[i + 1].of(g)[0, about.hidden :]
            if da is not None:
                close(np.outer(z, da), block.of(g), 1e-9)
                b[i] += np.outer(da, da) / scale
    return [*zip(about.blocks, a, b, strict=True)]


def as_stored(kind, case):
    """Give what is stored of these factors as one vector."""
    of_block = [(stored(a), stored(b, block.groups)) for block, a, b in expected_factors(kind, case)]
    return np.concatenate([m.reshape(-1) for both in of_block for m in both])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("whole", [512, 2])
def test_factors_are_means_over_single_steps(kind, backend, case, whole, monkeypatch):
    monkeypatch.setattr(layout, "WHOLE_SIDE", whole)
    network, theta, batch, _ = make(kind, *case, backend, block_rows=3, **SIZES)
    scored = batch.targets.shape[0] * batch.targets.shape[1]
    tape, model = network.forward(theta, batch), network.network
    out, plain = np.zeros_like(theta), np.zeros_like(theta)
    sums = np.zeros(model.factor_sums.size)
    network._adding(lambda g, f: tape.factored_gradient(1 / scored, g, f), out, sums)
    network.gradient(network.forward(theta, batch), 1 / scored, plain)
    np.testing.assert_array_equal(out, plain)
    factors = network.host(model.factor_sums.normalise(network.device(sums), scored))
    close(factors, as_stored(kind, case), 1e-9)
    for block, a, b in split_factors(model.blocks, factors):
        for matrix in (a, *b.reshape(-1, *b.shape[-2:])):
            np.testing.assert_allclose(matrix, matrix.T, atol=1e-12 * abs(matrix).max())
            assert np.linalg.eigvalsh(matrix).min() >= -1e-12 * abs(matrix).max(), block.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_long_sides_have_the_diagonals_of_their_factors(kind, case, monkeypatch):
    network, theta, batch, _ = make(kind, *case, "numpy", block_rows=3, **SIZES)
    monkeypatch.setattr(layout, "LONGEST_SIDE", 2)
    monkeypatch.setattr(layout, "WHOLE_SIDE", 2)
    expected = split_factors(network.network.blocks, as_stored(kind, case))
    scored = batch.targets.shape[0] * batch.targets.shape[1]
    tape, model = network.forward(theta, batch), network.network
    sums = np.zeros(model.factor_sums.size)
    network._adding(lambda g, f: tape.factored_gradient(1 / scored, g, f), np.zeros_like(theta), sums)
    found = split_factors(model.blocks, model.factor_sums.normalise(sums, scored))
    shapes = set()
    for (_, *ours), (_, *theirs) in zip(found, expected, strict=True):
        for own, matrix in zip(ours, theirs, strict=True):
            shapes.add(own.ndim)
            close(own, matrix, 1e-9)
    assert 1 in shapes
