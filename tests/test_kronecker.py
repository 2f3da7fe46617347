"""Kronecker factors against their definition: the gradient with respect to a matrix at each single step."""

import functools

import independent
import numpy as np
import pytest
from dense import stored
from test_models import close
from test_networks import BACKENDS, KINDS, make

from hfmpi.optim import kfac, layout
from hfmpi.optim.base import Objective
from hfmpi.optim.layout import Block, split_factors

CASES = [(1, "cross-entropy", True, False), (2, "cross-entropy", True, True), (1, "squares", False, False)]
SIZES = {"hidden": 2, "steps": 3, "size": 2, "scored": 2}


def inputs_of(about, tape, at):
    """Return the inputs z of each block at a step and sequence, from the states of the network."""
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
    after = tape.layers[-1].read[t, b]
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
    """Return dense A and B of all blocks, computed once for all backends."""
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
            if block.name.startswith("W_mh"):  # as long as the state is zero, so is its gradient
                layer = int(block.name.partition(".")[2] or 1) - 1
                da = scale * cotangent_of_q(theta, about, batch, loss, at, layer)
            if about.name == "gru" and block.name.startswith("W_h"):  # likewise, except the bias
                da = about.blocks[i + 1].of(g)[0, about.hidden :]
            if da is not None:
                close(np.outer(z, da), block.of(g), 1e-9)
                b[i] += np.outer(da, da) / scale
    return [*zip(about.blocks, a, b, strict=True)]


def as_stored(kind, case):
    """Return the stored parts of these factors as one vector."""
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


class Named(Objective):
    """An objective that is only asked for its blocks."""

    blocks = (Block("bias", 0, 1, 40, groups=4), Block("scale", 40, 1, 30), Block("W", 70, 3, 5))

    def loss(self, theta):
        raise NotImplementedError

    gradient = loss


@pytest.mark.parametrize(("dtype", "of_largest"), [(np.float32, 5e-3), (np.float64, 1e-9)])
@pytest.mark.parametrize("side", [layout.WHOLE_SIDE, 20])
def test_vectors_are_preconditioned_as_with_the_eigenvectors_of_their_factor(
    side, dtype, of_largest, monkeypatch
):
    """Systems are solved if decompositions are not stored; a factor may have fewer examples than columns.

    Its eigenvalues 0 have an error of a rounding of the largest one, which is divided by gamma.
    """
    monkeypatch.setattr(layout, "WHOLE_SIDE", side)
    blocks, rng = Named.blocks, np.random.default_rng(0)
    factors, g = np.zeros(layout.kronecker_layout(blocks).size, dtype), rng.standard_normal(85)
    for _, *both in split_factors(blocks, factors):
        for factor in (np.atleast_3d(each.T).T for each in both):
            for matrix in factor:
                x = rng.standard_normal((25, len(matrix)))
                matrix[...] = x.T @ x / 25
    gammas, kept = [1e-4, 1e-2, 1.0], np.zeros(kfac.decomposition_layout(blocks).size, dtype)
    g = g.astype(dtype)
    solved, nothing = kfac.preconditioned_gradients(Named(), g, factors, kept[:0], gammas, True)
    decomposed, kept = kfac.preconditioned_gradients(Named(), g, factors, kept, gammas, True)
    assert not nothing.size
    assert kept.any()
    np.testing.assert_allclose(solved, decomposed, rtol=0, atol=of_largest * abs(decomposed).max())
    of_bias = split_factors(blocks, factors)[0][2]
    dense = np.zeros((40, 40))
    for i, matrix in enumerate(np.atleast_3d(of_bias.T).T):
        n = len(matrix)
        dense[i * n : (i + 1) * n, i * n : (i + 1) * n] = matrix
    a = float(split_factors(blocks, factors)[0][1][0, 0])
    for vector, gamma in zip(solved, gammas, strict=True):
        expected = np.linalg.solve(a * dense + gamma * np.eye(40), g[:40])
        np.testing.assert_allclose(vector[:40], expected, rtol=1e-5, atol=1e-5 * abs(expected).max())
