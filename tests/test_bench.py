"""`hfmpi bench`: the bound consists of the products of a pass, contestants take turns, rows are complete."""

import json
import time

import numpy as np
import pytest
from click.testing import CliRunner

from hfmpi.backends import create
from hfmpi.bench.bound import Recording
from hfmpi.bench.contest import Contestant, contest
from hfmpi.bench.table import doubts
from hfmpi.cli.bench import bench
from hfmpi.data.batches import Sequences
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.network import Network
from hfmpi.parallel.communicator import Communicator, MPICommunicator

SMALL = ["--hidden", "6", "--vocabulary", "5", "--length", "7", "--repeats", "2", "--json"]
ROW = {
    "model",
    "hidden",
    "vocabulary",
    "length",
    "batch",
    "ranks",
    "threads",
    "seconds",
    "bound_seconds",
    "ratio",
}


def rows(*arguments):
    result = CliRunner().invoke(bench, [*arguments, *SMALL], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.output.splitlines()[-1])  # a first run prints a note on compilation
    assert {"processor", "blas", "versions", "ranks", "threads"} <= found["machine"].keys()
    for row in found["rows"]:
        assert row.keys() >= ROW
        assert row["seconds"] > 0
        assert row["bound_seconds"] > 0
        assert row["seconds_least"] <= row["seconds"] <= row["seconds_most"]
    return found["rows"]


@pytest.mark.parametrize(("median", "said"), [(1.4, False), (1.9, True)])
def test_times_on_a_loaded_machine_are_doubted(median, said):
    steady = {"seconds": 2e-6, "seconds_least": 1.9e-6, "seconds_most": 9.0}
    note = doubts([steady, {"seconds": median, "seconds_least": 1.0, "seconds_most": 2.0}, steady])
    assert (note is not None) == said
    if note:
        assert note.startswith("Note: a median is 1.9 times the minimum time of the same work")


def test_products():
    found = rows("products", "--batch", "3", "--batch", "4")
    assert [(r["model"], r["batch"], r["pass"]) for r in found] == [
        (model, batch, "product") for model in ("lstm", "mlstm") for batch in (3, 4)
    ]
    assert {(r["hidden"], r["vocabulary"], r["length"], r["ranks"]) for r in found} == {(6, 5, 7, 1)}


def test_projections():
    found = rows("products", "--model", "lstm", "--batch", "3", "--columns", "2")
    assert [r["pass"] for r in found] == ["product", "projection", "projection of 2", "sketch"]


def test_gradients():
    found = rows("gradients", "--model", "rnn", "--batch", "3", "--backend", "numpy", "--dtype", "float64")
    assert [(r["pass"], r["dtype"]) for r in found] == [("gradient", "float64"), ("loss", "float64")]


def test_allreduce():
    found = rows("allreduce", "--model", "lstm")
    size = Architecture("lstm", 6, 5, 5).layout.size
    # Two float64; the product and a flag; the gradient, squares, the loss in four parts and a flag.
    assert [r["bytes"] for r in found] == [16, 4 * size + 4, 8 * size + 20]


SECOND = "shf", "subspace"


@pytest.mark.parametrize("optimizer", ["sgd", "shf", "soap", "muon", "soap-muon", "subspace"])
def test_steps(optimizer):
    sizes = ["--gradient-batch", "8"] + (["--curvature-batch", "4"] if optimizer in SECOND else [])
    (found,) = rows("step", "--model", "mlstm", "--optimizer", optimizer, *sizes)
    assert found["optimizer"] == optimizer
    assert 0 < found["other"] < 1
    assert sum(found["spans"].values()) < found["seconds_most"]
    assert {"forward", "gradient", "allreduce", "waiting", "optimizer"} <= found["spans"].keys()
    assert ("products" in found["spans"]) == (optimizer in SECOND)


def test_the_table_names_what_was_measured_on():
    batches = "--gradient-batch", "8", "--curvature-batch", "4"
    result = CliRunner().invoke(
        bench, ["step", "--model", "lstm", "--optimizer", "shf", *batches, *SMALL[:-1]]
    )
    assert result.exit_code == 0
    assert "rank(s) of 1 thread(s)" in result.output
    assert "openblas" in result.output
    assert "products" in result.output.splitlines()[-1]


@pytest.mark.parametrize("name", ["rnn", "mrnn", "lstm", "mlstm"])
@pytest.mark.parametrize("backend", ["numpy", "numba", "cupy", "cupy by graphs"])
@pytest.mark.usefixtures("cooperative")
def test_the_bound_holds_all_products_of_a_pass(name, backend):
    """The number of operations equals that of the formulas."""
    n, v, steps, size = 6, 5, 7, 3
    about = Architecture(name, n, v, v)
    network = Network(about, create(backend.split()[0], mixin=Recording), block_rows=6)
    if backend == "cupy by graphs":  # in place of one kernel per loop
        network.backend.persistent_batch = 0
    theta = network.backend.to_device(about.initial(0).astype(np.float32))
    batch = Sequences(np.arange(steps * size, dtype=np.uint8) % v, steps).take(np.arange(size))
    k = 4 * n if (name in ("lstm", "mlstm")) else n
    recurrent = n * k + about.cell.multiplicative * n * n
    tape = None
    for _ in range(3):
        with network.backend.recorded() as products:
            tape = network.linearise(theta, batch, tape)
        assert products.operations == 2 * steps * size * (recurrent + n * v)
        out = theta * 0
        with network.backend.recorded() as products:
            tape.gauss_newton(theta, 1.0, out)
        assert products.operations == 2 * steps * size * (4 * recurrent + 4 * n * v)
    calls = len(products.calls)
    tape.gauss_newton(theta, 1.0, out)
    assert len(products.calls) == calls  # the recording has ended
    products.calls = [(a * 0, b * 0, result * np.nan) for a, b, result in products.calls]
    for _ in range(3):  # on a GPU: direct, captured and replayed
        products.repeat()
        assert all(np.all(network.backend.to_host(result) == 0) for _, _, result in products.calls)


def test_contestants_take_turns():
    calls = []
    contestants = [Contestant(lambda i=i: calls.append(i), 1, 1) for i in range(3)]
    assert contest(Communicator(), contestants, 2).shape == (3, 2)
    assert calls == [0, 1, 2] * 3


@pytest.mark.mpi(ranks=2, timeout=60, unit="s")
def test_the_slowest_rank_counts_and_the_others_sleep(mpi_ranks, comm):
    assert comm.size == mpi_ranks
    communicator = MPICommunicator(comm)
    alone = []
    contestants = [
        Contestant(lambda: time.sleep(0.05 * communicator.rank), 2, 1),
        Contestant(lambda: alone.append(time.sleep(0.1)), 1, 1),
    ]
    before = time.process_time()
    seconds = contest(communicator, contestants, 3)
    assert time.process_time() - before < 0.25  # the passes take at least 0.45 s
    assert np.all(seconds[0] >= 0.05)
    assert np.all(seconds[1] >= 0.1)
    assert len(alone) == (4 if communicator.rank == 0 else 0)
    assert communicator.same(int(seconds.sum() * 1e9)) == []
    communicator.close()
