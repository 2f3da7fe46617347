"""The mean risk over all ranks against the independent implementation, alone and on 1 to 4 ranks."""

import math

import independent
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfmpi.backends import create
from hfmpi.data.batches import Sequences
from hfmpi.errors import UserError
from hfmpi.models.cells import Cell
from hfmpi.models.network import Network
from hfmpi.objective.data_parallel import MeanRisk
from hfmpi.objective.messages import pack, unpack
from hfmpi.parallel.communicator import Communicator, MPICommunicator, digest

LENGTH, BURN_IN, VOCABULARY, HIDDEN = 5, 2, 4, 3
KINDS = [("rnn", "standard"), ("mrnn", "standard"), ("lstm", "krause"), ("mlstm", "standard")]


def make(name="mlstm", variant="standard", comm=None, micro_batch=64, dtype="float64", backend="numpy"):
    """Give a mean risk, 12 sequences for it, and a theta; the same ones whoever asks."""
    rng = np.random.default_rng(1)
    cell = Cell(name, HIDDEN, VOCABULARY, variant)
    sequences = Sequences(rng.integers(0, VOCABULARY, 12 * LENGTH).astype(np.uint8), LENGTH, BURN_IN)
    theta = (0.5 * rng.standard_normal(cell.layout.size)).astype(dtype)
    network = Network(cell, create(backend, dtype))
    return MeanRisk(network, comm or Communicator(), micro_batch=micro_batch), sequences, theta


def everything(risk, theta, v):
    """Give all that an objective computes, as vectors on the host."""
    backend = risk.owner.network.backend
    theta, v = backend.to_device(theta), backend.to_device(v)
    plain, squared = risk.gradient(theta), risk.gradient(theta, squares=True)
    assert plain.squares is None
    found = {
        "loss": np.array([risk.loss(theta)]),
        "loss with the gradient": np.array([plain.loss]),
        "loss with the squares": np.array([squared.loss]),
        "gradient": plain.vector,
        "gradient with the squares": squared.vector,
        "squares": squared.squares,
        "product": risk.gauss_newton(theta)(v),
        "damped product": risk.gauss_newton(theta, structural=0.7)(v),
    }
    return {k: x if k.startswith("loss") else backend.to_host(x) for k, x in found.items()}


def relative(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)


@pytest.mark.parametrize("backend", ["numpy", "numba", "cupy"])
@pytest.mark.parametrize(("name", "variant"), KINDS)
def test_means_match_the_independent_implementation(name, variant, backend):
    owner, sequences, theta = make(name, variant, micro_batch=2, backend=backend)
    cell, indices = owner.network.cell, np.array([7, 0, 11])
    v = np.random.default_rng(2).standard_normal(theta.size)
    found = everything(owner.on(sequences, indices), theta, v)

    batch, characters = sequences.take(indices), 3 * LENGTH
    assert batch.inputs.shape == (LENGTH + BURN_IN, 3)
    gradient = independent.gradient(theta, cell, batch) / characters
    singles = [sequences.take(indices[i : i + 1]) for i in range(3)]
    squares = np.mean([(independent.gradient(theta, cell, one) / LENGTH) ** 2 for one in singles], axis=0)
    expected = {
        "loss": np.array([independent.loss(theta, cell, batch) / characters]),
        "gradient": gradient,
        "squares": squares,
        "product": independent.gauss_newton(theta, cell, batch) @ v / characters,
        "damped product": independent.gauss_newton(theta, cell, batch, structural=0.7) @ v / characters,
    }
    for key, value in found.items():
        assert relative(value, expected[key.split(" with")[0]]) < 1e-10, key


@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_micro_batches_do_not_change_the_result(kind, size, micro_batch, seed):
    rng = np.random.default_rng(seed)
    indices = rng.permutation(12)[:size]
    results = []
    for most in (64, micro_batch):
        owner, sequences, theta = make(*kind, micro_batch=most)
        results.append(everything(owner.on(sequences, indices), theta, np.cos(np.arange(theta.size))))
    for key, value in results[1].items():
        assert relative(value, results[0][key]) < 1e-11, key


def test_one_mean_risk_serves_batches_of_any_size_in_turn():
    owner, sequences, theta = make(micro_batch=2)
    v = np.cos(np.arange(theta.size))
    for size in (5, 1, 12, 3):  # tapes of one size are reused for another
        indices = np.arange(size)
        again = everything(owner.on(sequences, indices), theta, v)
        fresh, _, _ = make(micro_batch=2)
        for key, value in everything(fresh.on(sequences, indices), theta, v).items():
            np.testing.assert_array_equal(again[key], value, key)


def test_a_product_leaves_its_operator_as_it_was():
    owner, sequences, theta = make(micro_batch=2)
    product = owner.on(sequences, np.arange(5)).gauss_newton(theta, structural=0.5)
    v, w = np.cos(np.arange(theta.size)), np.sin(np.arange(theta.size))
    first = product(v)
    kept = first.copy()
    product(w)
    owner.on(sequences, np.arange(9)).gradient(theta, squares=True)
    owner.on(sequences, np.arange(9)).loss(theta)
    np.testing.assert_array_equal(first, kept)  # a new vector each time
    np.testing.assert_array_equal(product(v), kept)


@pytest.mark.parametrize(("name", "variant"), KINDS)
def test_a_memory_budget_changes_no_bit(name, variant):
    results = []
    for budget, kept in ((math.inf, 3), (1.5, 1), (0, 0)):  # of three micro-batches
        owner, sequences, theta = make(name, variant, micro_batch=2)
        owner.memory_budget = budget * owner.network.tape_bytes(LENGTH + BURN_IN, 2, structural=True)
        product = owner.on(sequences, np.arange(6)).gauss_newton(theta, structural=0.5)
        assert len(owner._tapes) == kept
        v, w = np.cos(np.arange(theta.size)), np.sin(np.arange(theta.size))
        results.append((product(v), product(w), product(v)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "variant"), KINDS)
@pytest.mark.parametrize("structural", [False, True])
def test_tape_bytes_are_what_a_tape_takes(name, variant, structural):
    owner, sequences, theta = make(name, variant)
    batch = sequences.take(np.arange(5))
    tape = owner.network.forward(theta, batch, structural)
    # Besides, a tape has copies of the recurrent matrices, a few MB whatever the batch.
    taken = sum(flat.nbytes for name, flat in tape.memory.flat.items() if not name.startswith("W_"))
    unscored = BURN_IN * 5 * VOCABULARY * 8  # logits of the burn-in, counted though not kept
    assert owner.network.tape_bytes(LENGTH + BURN_IN, 5, structural) == taken + unscored


# A loss in a message of float32 ----------------------------------------------------------------


@given(
    st.integers(1, 1000), st.floats(0, 12), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**31)
)
@settings(deadline=None, max_examples=60)
def test_a_packed_loss_is_summed_exactly_in_any_order(ranks, mean, kind, seed):
    rng = np.random.default_rng(seed)
    losses = rng.dirichlet(np.ones(ranks)) * mean
    messages = np.array([pack(loss) for loss in losses]).astype(kind)
    total = np.zeros_like(messages[0])
    for message in messages:
        total += message
    expected = math.fsum(losses)
    assert unpack(total) == pytest.approx(expected, rel=1e-13, abs=2e-13)
    order = rng.permutation(ranks)
    while len(order) > 1:  # a tree, in another order
        half = len(order) // 2
        messages[order[:half]] += messages[order[-half:]]
        order = order[: len(order) - half]
    np.testing.assert_array_equal(messages[order[0]], total)


@given(st.floats(0, 1e4))
@settings(deadline=None)
def test_one_packed_loss_comes_back(loss):
    assert unpack(pack(loss)) == pytest.approx(loss, rel=1e-15, abs=2.0**-53)


def test_what_is_not_finite_arrives():
    finite = pack(1.5)
    assert unpack(finite + pack(math.inf)) == math.inf
    assert math.isnan(unpack(finite + pack(math.nan)))
    assert unpack(finite + pack(1e300)) == math.inf  # too large for the message
    assert unpack(pack(1e30)) == pytest.approx(1e30, rel=1e-6)


def test_the_loss_of_a_float32_gradient_has_double_precision():
    owner, sequences, theta = make(dtype="float32", micro_batch=4)
    risk = owner.on(sequences, np.arange(12))
    assert risk.gradient(theta).loss == pytest.approx(risk.loss(theta), rel=1e-14)


def test_a_diverged_theta_gives_a_loss_that_is_not_finite():
    owner, sequences, theta = make(dtype="float32")
    risk = owner.on(sequences, np.arange(3))
    with np.errstate(all="ignore"):
        at = risk.gradient(theta * np.float32(1e38))
    assert not math.isfinite(at.loss)


# Several ranks ---------------------------------------------------------------------------------


@pytest.mark.mpi(ranks=4, timeout=100, unit="s")
def test_ranks_compute_what_one_computes(mpi_ranks, comm):
    """On 1, 2, 3 and 4 of the ranks, with batches that leave shards uneven (5, 12) and empty (1, 3)."""
    assert comm.size == mpi_ranks
    for ranks in (1, 2, 3, 4):
        part = comm.Split(color=comm.rank < ranks, key=comm.rank)
        if comm.rank < ranks:
            communicator = MPICommunicator(part)
            for name, variant in KINDS:
                check_ranks(communicator, name, variant)
            communicator.close()
        part.Free()


@pytest.mark.mpi(ranks=4, timeout=100, unit="s")
def test_slices_give_the_same_bits_on_any_number_of_ranks(mpi_ranks, comm):
    assert comm.size == mpi_ranks
    for name, variant in KINDS:
        for dtype in ("float32", "float64"):
            results = []
            for ranks in (1, 2, 4):
                part = comm.Split(color=comm.rank < ranks, key=comm.rank)
                if comm.rank < ranks:
                    communicator = MPICommunicator(part)
                    results += sliced(communicator, name, variant, dtype)
                    communicator.close()
                part.Free()
            expected = results[:3]  # one rank, on rank 0
            expected = comm.bcast(expected, root=0)
            for i, found in enumerate(results):
                for key, value in found.items():
                    np.testing.assert_array_equal(value, expected[i % 3][key], f"{name} {dtype} {key}")


def sliced(communicator, name, variant, dtype):
    """Give everything for batches that make slices of many, of unequal and of no sequences."""
    owner, sequences, theta = make(name, variant, communicator, micro_batch=2, dtype=dtype)
    owner = MeanRisk(owner.network, communicator, micro_batch=2, slices=8)
    v = np.cos(np.arange(theta.size)).astype(dtype)
    batches = [np.random.default_rng(size).permutation(12)[:size] for size in (12, 11, 3)]
    return [everything(owner.on(sequences, indices), theta, v) for indices in batches]


@pytest.mark.parametrize("slices", [3, 6, 12])
def test_slices_that_cannot_be(slices):
    owner, _, _ = make()
    with pytest.raises(UserError, match="power of two that the number of ranks divides"):
        MeanRisk(owner.network, Communicator(), slices=slices)


def check_ranks(communicator, name, variant):
    alone, sequences, theta = make(name, variant)
    shared, _, _ = make(name, variant, communicator, micro_batch=2)
    v = np.cos(np.arange(theta.size))
    for size in (1, 3, 5, 12):
        indices = np.random.default_rng(size).permutation(12)[:size]
        found = everything(shared.on(sequences, indices), theta, v)
        expected = everything(alone.on(sequences, indices), theta, v)
        for key, value in found.items():
            assert relative(value, expected[key]) < 1e-10, (key, size, communicator.size)
            assert communicator.same(digest(value)) == [], (key, size, communicator.size)
    mine = 0.1 + communicator.rank
    assert shared.on(sequences, np.arange(3)).agree(mine) == 0.1
