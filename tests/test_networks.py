"""Networks beyond text: layers, real inputs, other losses, masks; against the independent implementation."""

import functools
import json
from typing import NamedTuple

import independent
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import OnHost
from small import history, same, shared_corpus, train, write_corpus
from test_models import check_products, close, gradient_of, product_of

from hfmpi.backends import create
from hfmpi.cli.main import cli
from hfmpi.data.examples import Arrays
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.models.losses import LOSSES, choose
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.cells import CELLS
from hfmpi.networks.network import Network
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.optim import HessianFree, Objectives
from hfmpi.optim.layout import Directions
from hfmpi.parallel.communicator import Communicator, MPICommunicator
from hfmpi.runs.merge import merge

BACKENDS = ["numpy", "numba", "cupy"]
KINDS = [(name, "standard") for name in CELLS] + [("lstm", "krause"), ("mlstm", "krause")]


class Steps(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None = None
    scales: np.ndarray | None = None


def make_batch(rng, about, loss, symbols, masked, steps=5, size=3, scored=4):
    if symbols:
        inputs = rng.integers(0, about.inputs, (steps, size)).astype(np.int32)
    else:
        inputs = rng.standard_normal((steps, size, about.inputs))
    if loss == "cross-entropy":
        targets = rng.integers(0, about.outputs, (scored, size)).astype(np.int32)
    else:
        targets = rng.random((scored, size, about.outputs))
    mask = scales = None
    if masked:
        mask = (rng.random((scored, size)) < 0.6).astype(np.float64)
        mask[0, 0], mask[-1, -1] = 0, 1
    if masked and symbols:  # and with dropout
        scales = rng.choice([0.0, 1.5], (about.layers, size, about.hidden), p=[0.3, 0.7])
    return Steps(inputs, targets, mask, scales)


def make(kind, layers, loss, symbols, masked, backend="numpy", seed=0, hidden=3, block_rows=7, **sizes):
    rng = np.random.default_rng(seed)
    about = Architecture(kind[0], hidden, 4, 2 if loss != "cross-entropy" else 4, layers, kind[1])
    network = OnHost(about, create(backend, "float64"), loss, block_rows=block_rows)
    theta = 0.6 * rng.standard_normal(about.layout.size)
    return network, theta, make_batch(rng, about, loss, symbols, masked, **sizes), rng


CASES = [(layers, loss, symbols, masked) for layers, loss, symbols, masked in (
    (2, "cross-entropy", True, False),
    (1, "squares", False, False),
    (2, "bernoulli", False, True),
    (3, "cross-entropy", True, True),
)]  # fmt: skip


@functools.cache
def dense(kind, case):
    """Return the independent implementation's loss, gradient, Jacobian and Gauss-Newton matrices."""
    network, theta, batch, _ = make(kind, *case, hidden=2 if case[0] == 3 else 3)
    about, loss = network.about, case[1]
    return (
        independent.loss(theta, about, batch, loss),
        independent.gradient(theta, about, batch, loss),
        independent.jacobians(theta, about, batch)[0],
        independent.gauss_newton(theta, about, batch, kind=loss),
        independent.gauss_newton(theta, about, batch, 0.7, loss),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_everything_matches_the_independent_implementation(kind, backend, case):
    network, theta, batch, rng = make(kind, *case, backend, hidden=2 if case[0] == 3 else 3)
    expected, gradient, j, plain, damped = dense(kind, case)
    assert network.loss(theta, batch) == pytest.approx(expected, rel=1e-12)
    tape = network.forward(theta, batch)
    assert tape.loss == pytest.approx(expected, rel=1e-12)
    close(gradient_of(network, theta, batch), gradient, 1e-9)
    assert np.linalg.norm(damped - plain) > 1e-2 * np.linalg.norm(plain)
    for _ in range(2):
        v = rng.standard_normal(theta.size)
        close(product_of(network, theta, batch, v), plain @ v, 1e-9)
        close(product_of(network, theta, batch, v, 0.7), damped @ v, 1e-9)
    close(network.jvp(tape, v).outputs.reshape(-1), j @ v, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_finite_differences(kind, case):
    network, theta, batch, rng = make(kind, *case, "numba")
    g = gradient_of(network, theta, batch)
    for _ in range(3):
        v, e = rng.standard_normal(theta.size), 1e-5
        slope = (network.loss(theta + e * v, batch) - network.loss(theta - e * v, batch)) / (2 * e)
        assert slope == pytest.approx(g @ v, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[:3])
def test_squares_are_those_of_each_sequence_alone(kind, backend, case):
    network, theta, batch, _ = make(kind, *case, backend)
    network.backend.each_numbers *= 2 * theta.size / max(1, network.backend.each_numbers)  # two at a time
    network.backend.each_numbers = int(network.backend.each_numbers)
    squares = np.zeros_like(theta)
    close(gradient_of(network, theta, batch, squares), gradient_of(network, theta, batch))
    expected = np.zeros_like(theta)
    for b in range(batch.inputs.shape[1]):
        one = Steps(*(None if a is None else a[:, b : b + 1].copy() for a in batch))
        expected += gradient_of(network, theta, one) ** 2
    close(squares, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_blocks_and_pieces_change_nothing_beyond_rounding(kind, backend):
    results = []
    for block_rows in (1, 7, 1000):
        case = 3, "squares", False, True, backend
        network, theta, batch, rng = make(kind, *case, block_rows=block_rows, steps=7)
        v = rng.standard_normal(theta.size)
        state, _ = network.advance(theta, None, batch.inputs[:3])
        _, last = network.advance(theta, state, batch.inputs[3:])
        results.append((gradient_of(network, theta, batch), product_of(network, theta, batch, v), last))
    close(last, independent.run(theta, network.about, batch)[0][-1])
    for other in results[:-1]:
        for a, b in zip(other, results[-1], strict=True):
            close(a, b, 1e-13)


@given(
    st.sampled_from(KINDS), st.sampled_from(BACKENDS), st.integers(1, 3), st.sampled_from(sorted(LOSSES)),
    st.booleans(), st.booleans(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 4),
    st.integers(0, 2**31), st.integers(1, 30),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_products_are_transposes_and_curvature_is_symmetric_and_positive(
    kind, backend, layers, loss, symbols, masked, hidden, steps, size, seed, block_rows
):
    network, theta, batch, rng = make(
        kind, layers, loss, symbols, masked, backend, seed, hidden, block_rows,
        steps=steps, size=size, scored=1 + seed % steps,
    )  # fmt: skip
    check_products(network, theta, batch, rng)


@given(
    st.sampled_from(KINDS), st.sampled_from(BACKENDS), st.integers(1, 3), st.sampled_from(sorted(LOSSES)),
    st.booleans(), st.booleans(), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5),
    st.integers(0, 2**31), st.integers(1, 30), st.sampled_from([0.0, 0.3]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_columns_are_what_each_direction_gives_alone(
    kind, backend, layers, loss, symbols, masked, steps, size, columns, seed, block_rows, structural
):
    network, theta, batch, rng = make(
        kind, layers, loss, symbols, masked, backend, seed, 3, block_rows,
        steps=steps, size=size, scored=1 + seed % steps,
    )  # fmt: skip
    v = rng.standard_normal((columns, theta.size))
    for row in v[1:]:  # one part of a direction, as with `cuts`
        row[: rng.integers(theta.size)] = 0
        row[rng.integers(theta.size) :] = 0
    tape = network.forward(theta, batch, structural > 0)
    alone = np.array([network.jvp(tape, row).outputs.copy() for row in v])
    together = network.jvp(tape, v).outputs.reshape(-1, columns, alone.shape[2]).swapaxes(0, 1)
    close(together, alone, 1e-12)
    products = np.zeros_like(v)
    network.gauss_newton(tape, v, 0.7, structural, products)
    expected = np.zeros_like(v)
    for row, out in zip(v, expected, strict=True):
        network.gauss_newton(tape, row, 0.7, structural, out)
    close(products, expected, 1e-11)
    projection = np.ones((columns, columns))
    tape.project(network.device(v), 0.7, projection)
    plain = np.array([product_of(network, theta, batch, row) for row in v])
    close(projection - 1, 0.7 * v @ plain.T, 1e-11)


def test_a_mask_of_ones_changes_nothing_and_what_is_masked_does_not_count():
    network, theta, batch, _ = make(("lstm", "standard"), 2, "cross-entropy", True, True)
    ones = batch._replace(mask=np.ones(batch.targets.shape))
    close(gradient_of(network, theta, ones), gradient_of(network, theta, batch._replace(mask=None)), 1e-14)
    other = batch._replace(targets=np.where(batch.mask == 1, batch.targets, (batch.targets + 1) % 4))
    assert network.loss(theta, other) == network.loss(theta, batch)
    np.testing.assert_array_equal(gradient_of(network, theta, other), gradient_of(network, theta, batch))


def test_bernoulli_is_finite_far_out():
    loss, backend = choose("bernoulli"), create("numpy", "float64")
    outputs = np.array([[800.0, -800.0], [0.0, 0.0]])
    values = loss.value(backend, outputs, np.array([[1.0, 0.0], [1.0, 0.5]]))
    assert values == pytest.approx([0.0, 2 * np.log(2)])
    assert np.array_equal(outputs, [[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize(("change", "sentence"), [
    ({"inputs": np.zeros((5, 3, 9))}, r"inputs must be symbols .* or numbers .*, 4\), not an array of shape"),
    ({"inputs": np.full((5, 3), 4)}, "inputs must be symbols from 0 to 3, not 4 to 4"),
    ({"inputs": np.zeros((5, 3))}, "inputs must be whole numbers"),
    ({"targets": np.zeros((6, 3), int)}, "need a target for each step"),
    ({"targets": np.full((4, 3), -1)}, "targets must be symbols from 0 to 3, not -1 to -1"),
    ({"targets": np.zeros((4, 3, 4))}, "targets must be symbols of shape"),
    ({"scales": np.ones((1, 3, 4))}, r"unit_scales must have the shape \(3, 1, 3\), not \(3, 1, 4\)"),
])  # fmt: skip
def test_a_batch_of_another_network_is_one_sentence(change, sentence):
    network, theta, batch, _ = make(("lstm", "standard"), 1, "cross-entropy", True, False)
    with pytest.raises(UserError, match=sentence):
        network.loss(theta, batch._replace(**change))


def test_unknown_losses_and_layers_are_one_sentence():
    with pytest.raises(
        UserError, match="there is no loss 'hinge'; choose one of cross-entropy, squares, bern"
    ):
        choose("hinge")
    with pytest.raises(UserError, match="layers must be at least 1, not 0"):
        Architecture("lstm", 3, 4, 4, 0)


def adding(count, steps, seed=0):
    """Return the adding problem (Hochreiter and Schmidhuber 1997): the sum of two marked numbers."""
    rng = np.random.default_rng(seed)
    inputs = np.stack([rng.random((count, steps)), np.zeros((count, steps))], axis=2)
    for row in inputs:
        row[rng.choice(steps, 2, replace=False), 1] = 1
    targets = (inputs[..., :1] * inputs[..., 1:]).sum(axis=1, keepdims=True) / 2
    return Arrays(inputs, targets, burn_in=steps - 1)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_hessian_free_learns_the_adding_problem(name):
    cases = adding(200, 8)
    network = Network(Architecture(name, 8, 2, 1, 2), create("numba", "float64"), "squares")
    owner = DataParallel(network, Communicator())
    risk = owner.on(cases, np.arange(cases.count))
    optimizer = HessianFree(damping=0.1, cg_max_steps=40)
    theta = network.initial(0)
    state, start = optimizer.init(theta), risk.loss(theta)
    for _ in range(25):
        theta, state, _ = optimizer.step(theta, state, Objectives(risk, risk))
    assert risk.loss(theta) < 0.02 * start


@pytest.mark.parametrize(
    "options", [{"layers": 2, "model": "mlstm"}, {"model": "gru"}, {"layers": 3, "model": "gru"}]
)
@pytest.mark.parametrize("optimizer", ["sgd", "shf"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, options, optimizer):
    data = write_corpus(tmp_path / "d.h5")
    options = options | {"backend": "numba", "optimizer": optimizer, "dtype": "float32", "hidden": 5}
    whole, _ = train(tmp_path / "whole", data, max_steps=4, **options)
    train(tmp_path / "parts", data, max_steps=2, **options)
    parts, _ = train(tmp_path / "parts", data, max_steps=4, **options)
    same(whole, parts)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


@pytest.mark.parametrize("model", ["gru", "mlstm"])
def test_a_stacked_network_is_evaluated_and_writes(tmp_path, model):
    data, run = write_corpus(tmp_path / "d.h5"), tmp_path / "run"
    _, result = train(run, data, max_steps=2, model=model, layers=2)
    found = CliRunner().invoke(cli, ["evaluate", str(run), "--backend", "numpy", "--json"])
    assert json.loads(found.output)["valid_bpc"] == pytest.approx(result.valid.loss)
    written = CliRunner().invoke(cli, ["sample", str(run), "--length", "20", "--prime", "in the"])
    assert written.exit_code == 0
    assert len(written.output) == len("in the") + 20 + 1
    with pytest.raises(UserError, match="this run has layers = 2, not 3"):
        merge({"layers": 3}, checkpoint.latest(run).meta["config"])


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_network_may_read_symbols_and_then_fewer_vectors(backend):
    """If integer scratch memory were reused, it would truncate the vectors."""
    rng, about = np.random.default_rng(0), Architecture("gru", 3, 4, 4)
    symbols, vectors = rng.integers(0, 4, (6, 5)), rng.standard_normal((1, 5, 4))
    both, alone = (Network(about, create(backend, "float64")) for _ in range(2))
    theta, batch = alone.initial(0), Arrays(vectors, symbols[:1]).take(np.arange(1))
    at = both.linearise(theta, Arrays(symbols, symbols).take(np.arange(6)))
    both.loss(theta, Arrays(symbols, symbols).take(np.arange(6)))
    assert both.loss(theta, batch) == alone.loss(theta, batch)
    assert both.linearise(theta, batch, at).loss == alone.linearise(theta, batch).loss


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
@pytest.mark.parametrize("options", [{"layers": 2, "model": "mlstm"}, {"layers": 2, "model": "gru"}])
def test_two_ranks_equal_one(mpi_ranks, comm, tmp_path, options):
    from pathlib import Path

    assert comm.size == mpi_ranks
    folder = Path(comm.bcast(str(tmp_path), root=0))
    data = shared_corpus(comm, folder)
    communicator = MPICommunicator(comm)
    settings = options | {"max_steps": 3, "backend": "numba", "hidden": 5, "optimizer": "shf"}
    run, _ = train(folder / "run", data, communicator, **settings)
    alone, _ = train(folder / f"alone{communicator.rank}", data, **settings)
    np.testing.assert_allclose(run.theta, alone.theta, rtol=1e-9, atol=1e-11)
    communicator.close()


@pytest.mark.mpi(ranks=3, timeout=100, unit="s")
@pytest.mark.parametrize("masked", [False, True])
def test_ranks_share_cases_with_and_without_a_mask(mpi_ranks, comm, masked):
    assert comm.size == mpi_ranks
    rng = np.random.default_rng(0)
    mask = (rng.random((7, 3)) < 0.5).astype(np.float64) if masked else None
    if mask is not None:
        mask[0, 0] = 1
    cases = Arrays(rng.standard_normal((7, 5, 2)), rng.random((7, 3, 2)), mask, burn_in=2)
    about = Architecture("gru", 4, 2, 2, 2)
    communicator = MPICommunicator(comm)
    results = []
    for team in (communicator, Communicator()):
        network = Network(about, create("numpy", "float64"), "bernoulli")
        risk = DataParallel(network, team, micro_batch=2).on(cases, np.arange(7))
        theta = network.initial(1)
        at = risk.squared_gradients(theta)
        results.append(
            [np.array([risk.loss(theta), at.loss]), at.vector, at.squares, risk.gauss_newton(theta)(theta)]
        )
    for ours, alone in zip(*results, strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-10, atol=1e-13)
    communicator.close()


class Stored(Directions):
    """Directions in an array, generated a few at a time."""

    def __init__(self, v):
        self.v, self.shape, self.dtype, self.most = v, v.shape, v.dtype, 0

    def fill(self, start, out):
        self.most = max(self.most, len(out))
        out[...] = self.v[start : start + len(out)]

    def dense(self):
        return self.v.copy()


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("kind", [("mlstm", "standard"), ("gru", "standard"), ("lstm", "krause")])
def test_many_directions_go_through_a_network_in_parts(kind, backend, monkeypatch):
    network, theta, batch, rng = make(kind, 2, "cross-entropy", True, True, backend)
    v = rng.standard_normal((11, theta.size))
    v[3:6, : theta.size // 2] = 0
    found = []
    for most in (2**16, 4, 1):
        monkeypatch.setattr(type(network.backend), "directions", most)
        tape, out = network.forward(theta, batch), np.zeros((2, 11, 11))
        directions = Stored(network.device(v))
        tape.project(network.device(v), 0.7, out[0])
        tape.project(directions, 0.7, out[1])
        np.testing.assert_array_equal(out[1], out[0])
        assert directions.most == min(most, 11)
        found.append((out[0], tape.jvp(network.device(v)).copy()))
    for projected, tangents in found[1:]:
        close(projected, found[0][0], 1e-12)
        close(tangents, found[0][1], 1e-12)
