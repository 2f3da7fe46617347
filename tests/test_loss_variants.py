"""Losses with parameters and means over outputs: derivatives by differences, and runs with them."""

import math

import numpy as np
import pytest
from dense import loss_of_rows, numbers, symbols

import hfmpi
from hfmpi.backends import create
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.models.loss_check import check_loss
from hfmpi.models.loss_variants import SmoothedCrossEntropy, WeightedBernoulli
from hfmpi.models.losses import LOSSES, Bernoulli, OutputMean, SoftmaxCrossEntropy, SquaredError, choose
from hfmpi.parallel.communicator import Communicator, MPICommunicator

BITS = (numbers(12, 4, seed=3) > 0) * 1.0


class Mean(OutputMean):
    """A user-defined copy of a loss, which is checked like every user-defined loss."""


CASES = [
    pytest.param(Mean(SquaredError(), 2.0), numbers(12, 4, seed=4), id="mse"),
    pytest.param(Mean(Bernoulli()), abs(np.sin(numbers(12, 4))), id="binary-cross-entropy"),
    pytest.param(SmoothedCrossEntropy(0.3), symbols(12).astype(np.int32), id="smoothed"),
    pytest.param(SmoothedCrossEntropy(1.0), symbols(12).astype(np.int32), id="uniform"),
    pytest.param(WeightedBernoulli((0.2, 1.0, 3.0, 50.0)), BITS, id="weighted"),
    pytest.param(WeightedBernoulli((3.0,)), BITS, id="one weight"),
    pytest.param(Mean(WeightedBernoulli((3.0,)), 0.7), BITS, id="mean of weighted"),
]


@pytest.mark.parametrize("backend", ["numpy", "numba", "cupy"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("loss", "targets"), CASES)
def test_derivatives_are_those_of_the_value(loss, targets, dtype, backend):
    made, targets = create(backend, dtype), targets if loss.symbols else targets.astype(dtype)
    z = numbers(12, 4).astype(dtype)
    for outputs in (z, 8 * z, 0 * z):
        arrays = (made.to_device(outputs), made.to_device(targets))
        check_loss(choose(loss), made, *arrays)


def test_the_check_sees_these_losses():
    class Wrong(Mean):
        def _scale(self, outputs):
            return 2.0

        def value(self, *arguments):
            return self.loss.value(*arguments)

    with pytest.raises(hfmpi.UserError, match="the loss Wrong is wrong: gradient"):
        check_loss(Wrong(SquaredError()), NumpyBackend("float64"), numbers(6, 3), numbers(6, 3, seed=2))


@pytest.mark.parametrize("name", ["mse", "binary-cross-entropy"])
@pytest.mark.parametrize("outputs", [1, 5])
def test_named_means_are_their_formulas(name, outputs):
    z, y = numbers(6, outputs), abs(np.sin(numbers(6, outputs, seed=2)))
    backend, cache, u, out = NumpyBackend("float64"), z.copy(), np.eye(outputs)[None].repeat(6, 0), z * 0
    value, gradient, hessian = loss_of_rows(name, z, y)
    by_hand = (z - y) ** 2 if name == "mse" else np.log1p(np.exp(z)) - z * y
    assert value == pytest.approx(by_hand.mean(axis=1).sum(), rel=1e-12)
    loss = LOSSES[name]
    np.testing.assert_allclose(loss.value(backend, cache, y), by_hand.mean(axis=1), rtol=1e-12)
    loss.gradient(backend, cache, y, 0.5, out)
    np.testing.assert_allclose(out, 0.5 * gradient, rtol=1e-12)
    loss.hessian(backend, cache, u.reshape(-1, outputs), 0.5)
    np.testing.assert_allclose(u, 0.5 * hessian, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("loss", "targets"), CASES)
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_saturated_outputs_are_finite(loss, targets, size, dtype):
    backend, targets = NumpyBackend(dtype), targets if loss.symbols else targets.astype(dtype)
    cache = (size * numbers(12, 4)).astype(dtype)
    assert np.isfinite(loss.value(backend, cache, targets)).all()
    gradient, r = np.empty((2, *cache.shape), dtype)
    loss.gradient(backend, cache, targets, 1.0, gradient)
    loss.residual(backend, cache, targets, r)
    assert np.isfinite(gradient).all()
    assert np.isfinite(r).all()
    loss.root(backend, cache, r)
    bound = 100 * np.finfo(dtype).eps * max(1, abs(gradient).max()) + 1e-12
    np.testing.assert_allclose(r, gradient, atol=bound, rtol=1e-4 if dtype == "float32" else 1e-9)


def test_no_smoothing_and_no_weight_are_the_plain_losses():
    backend = NumpyBackend("float64")
    for plain, special, y in (
        (SoftmaxCrossEntropy(), SmoothedCrossEntropy(0.0), symbols(12)),
        (Bernoulli(), WeightedBernoulli((1.0,)), BITS),
    ):
        results = []
        for loss in (plain, special):
            cache, out = numbers(12, 4), np.empty((12, 4))
            value = loss.value(backend, cache, y)
            loss.gradient(backend, cache, y, 1.0, out)
            u = numbers(12, 4, seed=9)
            loss.hessian(backend, cache, u, 1.0)
            results.append((value, out, u))
        for one, other in zip(*results, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: SmoothedCrossEntropy(1.5), r"label smoothing must be in \[0, 1\], not 1.5"),
    (lambda: SmoothedCrossEntropy(math.nan), r"label smoothing must be in \[0, 1\], not nan"),
    (lambda: WeightedBernoulli((1.0, 0.0)), r"weights of positive targets must be positive numbers"),
    (lambda: WeightedBernoulli(()), r"weights of positive targets must be positive numbers"),
    (lambda: choose("MSELoss"), r"no loss 'MSELoss' \(did you mean mse\?\); choose one of cross-entropy"),
    (lambda: choose("cross_entropy"), r"no loss 'cross_entropy' \(did you mean cross-entropy\?\)"),
    (lambda: choose("BCE"), r"no loss 'BCE' \(did you mean binary-cross-entropy\?\)"),
    (lambda: choose("l2"), r"no loss 'l2' \(did you mean squares\?\)"),
    (lambda: choose("hinge"), r"no loss 'hinge'; choose one of"),
])  # fmt: skip
def test_what_is_not_a_loss(make, words):
    with pytest.raises(hfmpi.UserError, match=words):
        make()


X = numbers(30, 6, 2)


def run(loss, targets, out=None, steps=2, optimizer="lm"):
    outputs = 3 if loss != "binary-cross-entropy" else targets.shape[-1]
    network = hfmpi.Network(cell="rnn", inputs=2, outputs=outputs, hidden=3, loss=loss)
    return hfmpi.train(network, (X, targets), optimizer=optimizer, max_steps=steps, out=out, quiet=True)


@pytest.mark.parametrize("optimizer", ["lm", "bhf-short", "adam"])
def test_a_network_is_trained_by_name(optimizer):
    # lm is invariant to the scale of the loss: its steps are those of the squares.
    y = numbers(30, 6, 3, seed=7)
    mse, squares = run("mse", y, optimizer=optimizer), run("squares", y, optimizer=optimizer)
    assert mse.history[0]["loss"] == pytest.approx(2 / 3 * squares.history[0]["loss"], rel=1e-6)
    if optimizer == "lm":
        np.testing.assert_allclose(mse.theta, squares.theta, rtol=1e-3, atol=1e-4)


def test_other_parameters_of_a_loss_are_another_run(tmp_path):
    y = symbols(180).reshape(30, 6) % 3
    run(SmoothedCrossEntropy(0.1), y, tmp_path / "run")
    for other in (SmoothedCrossEntropy(0.2), "cross-entropy"):
        with pytest.raises(hfmpi.UserError, match="belongs to a run of a different model"):
            run(other, y, tmp_path / "run", 3)
    assert run(SmoothedCrossEntropy(0.1), y, tmp_path / "run", 3).step == 3


def test_weights_need_their_outputs_and_bits():
    bits = (numbers(30, 6, 3) > 0) * 1.0
    assert math.isfinite(run(WeightedBernoulli((1.0, 2.0, 3.0)), bits).history[-1]["loss"])
    for weights, y, words in (
        ((1.0, 2.0), bits, "the loss has weights for 2 outputs, but the model has 3"),
        ((2.0,), 0.5 * bits, "the targets must be 0 or 1, because the loss has weights for positive targets"),
    ):
        with pytest.raises(hfmpi.UserError, match=words):
            run(WeightedBernoulli(weights), y)


@pytest.mark.mpi(ranks=3, timeout=60, unit="s")
def test_ranks_compute_what_one_computes(mpi_ranks, comm):
    assert comm.size == mpi_ranks
    for loss, targets in (case.values for case in CASES):
        about = hfmpi.Architecture("rnn", hidden=3, inputs=2, outputs=4)
        network = hfmpi.Network(about, NumpyBackend("float64"), loss)
        theta, data = network.initial(0), hfmpi.Arrays(numbers(12, 1, 2), targets[:, None])
        results = []
        for communicator in (MPICommunicator(comm), Communicator()):
            curvature = hfmpi.curvature(network, theta, data, communicator=communicator)
            g, v = curvature.gradient(), np.linspace(-1, 1, theta.size)
            results.append((g.loss, g.vector, curvature.gauss_newton(v), curvature.matrix()))
        for ours, alone in zip(*results, strict=True):
            np.testing.assert_allclose(ours, alone, rtol=1e-12, atol=1e-14)
