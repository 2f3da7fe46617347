"""`hfmpi.curvature`: G, rows and Kronecker factors of a network against dense matrices; on ranks too."""

import numpy as np
import pytest

import hfmpi
from hfmpi.backends import create
from hfmpi.errors import UserError
from hfmpi.networks.network import Network
from hfmpi.parallel.communicator import MPICommunicator

CASES, STEPS = 6, 4


def make():
    rng = np.random.default_rng(0)
    backend = create("numpy", "float64")
    network = Network(cell="lstm", inputs=2, outputs=2, hidden=3, backend=backend, loss="squares")
    data = rng.standard_normal((CASES, STEPS, 2)), rng.standard_normal((CASES, STEPS, 2))
    return network, network.initial(3), data


def jacobian(network, theta, data):
    """Return J (N, D) of all outputs by central differences."""
    batch = hfmpi.Arrays(*data).take(np.arange(CASES))
    steps = 1e-6 * np.eye(theta.size)
    ends = [[network.outputs(theta + sign * e, batch)[0].reshape(-1) for e in steps] for sign in (1, -1)]
    return (np.array(ends[0]) - np.array(ends[1])).T / 2e-6


def test_every_form_of_g_is_that_of_the_dense_jacobian():
    network, theta, data = make()
    j, c = jacobian(network, theta, data), hfmpi.curvature(network, theta, data)
    g = j.T @ j / (CASES * STEPS)
    np.testing.assert_allclose(c.matrix(), g, atol=1e-8)
    np.testing.assert_allclose(np.array([c.gauss_newton(e) for e in np.eye(theta.size)]), g, atol=1e-8)
    rows = c.rows("residuals")
    np.testing.assert_allclose(rows.normal() / c.scored, c.matrix(), atol=1e-14)
    np.testing.assert_allclose(rows.transposed(rows.residuals) / c.scored, c.gradient().vector, atol=1e-14)
    assert c.gradient().loss == pytest.approx(np.square(rows.residuals).sum() / 2 / c.scored)
    scores = c.rows("scores", segments=2)
    assert scores.count == 2 * CASES
    np.testing.assert_allclose(scores.transposed(np.ones(scores.count)) / c.scored, c.gradient().vector)


def test_kronecker_factors_are_named_by_block():
    network, theta, data = make()
    factors = hfmpi.curvature(network, theta, data).kronecker_factors()
    assert list(factors) == [block.name for block in network.blocks]
    for block in network.blocks:
        a, b = factors[block.name]
        assert (a.shape, b.shape) == ((block.rows,) * 2, (block.columns,) * 2)
        assert np.linalg.eigvalsh(a).min() > -1e-12
        assert np.linalg.eigvalsh(b).min() > -1e-12


def test_g_is_a_linear_operator_of_scipy():
    from scipy.sparse.linalg import eigsh

    network, theta, data = make()
    c = hfmpi.curvature(network, theta, data)
    largest = eigsh(c.to_scipy(), 2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(sorted(largest), np.linalg.eigvalsh(c.matrix())[-2:], rtol=1e-8)


@pytest.mark.parametrize(("change", "words"), [
    ({"theta": [1.0]}, "theta must be"),
    ({"theta": np.zeros(3)}, "theta must be a vector of shape"),
    ({"model": "lstm"}, "model must be a model"),
    ({"data": (np.zeros((2, 3, 2)), np.full((2, 3, 2), np.nan))}, "targets must be finite"),
    ({"data": None}, "data must be"),
    ({"memory_budget": 10.0}, "memory budget"),
])  # fmt: skip
def test_wrong_arguments_are_refused_in_a_sentence(change, words):
    network, theta, data = make()
    arguments = {"model": network, "theta": theta, "data": data} | change
    with pytest.raises((UserError, TypeError, ValueError), match=words):
        hfmpi.curvature(**arguments).rows("residuals")


@pytest.mark.parametrize("arguments", [("jacobian",), ("scores", 0), ("scores", 1.5), ("sketch", 1, -1)])
def test_wrong_rows_are_refused(arguments):
    with pytest.raises(UserError, match=r"kind|segments|seed"):
        hfmpi.curvature(*make()).rows(*arguments)


def test_vectors_of_another_length_are_refused():
    rows = hfmpi.curvature(*make()).rows("residuals")
    with pytest.raises(ValueError, match="v must be a vector of shape"):
        rows.times(np.ones(rows.gradient.size + 1))
    with pytest.raises(ValueError, match="a must be a vector of shape"):
        rows.transposed(np.ones(rows.count + 1))


@pytest.mark.mpi(ranks=[3])
def test_ranks_share_the_curvature(comm):
    network, theta, data = make()
    ours, alone = (
        hfmpi.curvature(network, theta, data, communicator=each)
        for each in (MPICommunicator(comm), hfmpi.parallel.communicator.Communicator())
    )
    np.testing.assert_allclose(ours.matrix(), alone.matrix(), rtol=1e-12, atol=1e-14)
    v = np.linspace(-1, 1, theta.size)
    np.testing.assert_allclose(ours.gauss_newton(v), alone.gauss_newton(v), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        ours.rows("sketch").gram(), alone.rows("sketch").gram(), rtol=1e-12, atol=1e-12
    )
    mixed = np.where(comm.rank == 0, v, np.cos(v))  # eigsh starts with a random vector
    np.testing.assert_allclose(ours.gauss_newton(mixed), alone.gauss_newton(v), rtol=1e-12, atol=1e-14)
    with pytest.raises(UserError, match="rank 1 has different parameters"):
        hfmpi.curvature(network, theta + (comm.rank == 1), data, communicator=MPICommunicator(comm))
