"""The GPU backend: its kernels, products, graphs, memory and transports; on a stand-in where there is no GPU.

Agreement of whole passes with NumPy is in test_models.py and test_objective.py.
"""

import ctypes
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REAL_GPU, STANDIN
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import history, make_run, same, train, write_corpus
from test_first_order import Linear
from test_models import make_batch

import hfmpi
from hfmpi.backends import create
from hfmpi.data.batches import Sequences
from hfmpi.errors import UserError
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.network import Network
from hfmpi.objective import transport
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.optim import Objectives
from hfmpi.parallel.communicator import Communicator, MPICommunicator, digest
from hfmpi.parallel.placement import Place
from hfmpi.runs.reporter import Log
from hfmpi.runs.train import Run

cupy = pytest.importorskip("cupy")
from hfmpi.backends import clusters  # noqa: E402
from hfmpi.backends.cupy import KERNELS  # noqa: E402
from hfmpi.backends.persistent import SIGNATURES, THREADS  # noqa: E402

DTYPES = ["float32", "float64"]
standin_only = pytest.mark.skipif(REAL_GPU, reason="needs the stand-in: the GPU does not fail on demand")


@pytest.fixture(scope="module", params=DTYPES)
def pair(request):
    """Return a GPU backend and the reference backend."""
    return create("cupy", request.param), create("numpy", request.param)


# Kernels and products --------------------------------------------------------------------------


def both(pair, name, *arrays, out):
    """Call a kernel of both backends; return the arrays at the positions `out`, and the return value."""
    results = []
    for backend in pair:
        own = [backend.to_device(a.copy()) if isinstance(a, np.ndarray) else a for a in arrays]
        value = getattr(backend, name)(*own)
        results.append(
            [backend.to_host(own[i]) for i in out] + ([] if value is None else [backend.to_host(value)])
        )
    return zip(*results, strict=True)


@pytest.mark.parametrize("symbols", [1, 2, 31, 32, 33, 64, 200, 256])
def test_softmax_of_any_width(pair, symbols):
    rng, dtype = np.random.default_rng(symbols), pair[0].dtype
    rows = 7
    logits = (10 * rng.standard_normal((rows, symbols))).astype(dtype)
    logits[0] = 0
    logits[1] = -800  # far below the others: still a distribution
    logits[2, 0] = 900
    targets = rng.integers(0, symbols, rows).astype(np.int32)
    tolerance = 20 * np.finfo(dtype).eps
    for ours, reference in both(pair, "softmax_loss", logits, targets, out=[0]):
        np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance)
    p, u = (
        rng.dirichlet(np.ones(symbols), rows).astype(dtype),
        rng.standard_normal((rows, symbols)).astype(dtype),
    )
    for ours, reference in both(pair, "softmax_gradient", p, targets, 0.3, u, out=[3]):
        np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance)
    for ours, reference in both(pair, "softmax_hessian", p, u, 0.3, out=[1]):
        np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("place", [0, 1, 5])
def test_softmax_shows_what_is_not_a_number(pair, place):
    logits = np.zeros((2, 6), pair[0].dtype)
    logits[0, place] = np.nan
    losses = pair[0].softmax_loss(*map(pair[0].to_device, (logits, np.zeros(2, np.int32))))
    assert np.array_equal(np.isnan(pair[0].to_host(losses)), [True, False])


@pytest.mark.parametrize(("symbols", "count", "width"), [
    (1, 1, 1), (5, 256, 3), (50, 257, 40), (256, 1000, 33), (256, 40_000, 2), (7, 511, 32),
])  # fmt: skip
def test_segment_sums(pair, symbols, count, width):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count, width)).astype(pair[0].dtype)
    x = rng.integers(0, symbols, count).astype(np.int32)
    out = np.full((symbols, width), 7, pair[0].dtype)
    tolerance = 4 * np.sqrt(count) * np.finfo(pair[0].dtype).eps
    for ours, reference in both(pair, "segment_sum", rows, x, out, out=[2]):
        np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=10 * tolerance)


def test_segment_sum_of_one_sequence_of_a_batch(pair):
    """The rows of one sequence are not contiguous."""
    gpu, reference = pair
    rows = np.random.default_rng(0).standard_normal((9, 4, 5)).astype(gpu.dtype)
    x = np.arange(9, dtype=np.int32) % 3
    expected, out = np.empty((3, 5), gpu.dtype), gpu.to_device(np.empty((3, 5), gpu.dtype))
    reference.segment_sum(rows[:, 2], x, expected)
    gpu.segment_sum(gpu.to_device(rows)[:, 2], gpu.to_device(x), out)
    np.testing.assert_allclose(gpu.to_host(out), expected, rtol=1e-5)


@given(
    st.integers(1, 9), st.integers(0, 9), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["rows", "one of a batch"]),
)  # fmt: skip
@example(1, 0, 1, True, False, False, "rows")
@settings(deadline=None, max_examples=60)
def test_products_of_every_layout(m, k, n, a_turned, b_turned, add, layout):
    backend = create("cupy", "float64")
    rng = np.random.default_rng(0)

    def matrix(rows, columns, turned):
        shape = (columns, rows) if turned else (rows, columns)
        if layout == "one of a batch":
            host = rng.standard_normal((shape[0], 3, shape[1]))
            device, host = backend.to_device(host)[:, 1], host[:, 1]
        else:
            host = rng.standard_normal(shape)
            device = backend.to_device(host)
        return (host.T, device.T) if turned else (host, device)

    (a, da), (b, db) = matrix(m, k, a_turned), matrix(k, n, b_turned)
    before = rng.standard_normal((m, n))
    out = backend.to_device(before)
    backend._cublas.gemm(da, db, out, add)
    np.testing.assert_allclose(backend.to_host(out), a @ b + (before if add else 0), rtol=1e-12, atol=1e-12)


def test_products_refuse_what_cublas_cannot_take():
    backend = create("cupy", "float64")
    a = backend.to_device(np.zeros((6, 6)))
    with pytest.raises(ValueError, match="does not accept a matrix"):
        backend.matmul(a[::2, ::2], a[:3, :3], a[3:, 3:])
    with pytest.raises(ValueError, match="the rows of the result"):
        backend.matmul(a, a, a.T)


def test_the_constants_of_cublas_are_as_the_library_has_them():
    """TF32 is only used if it was requested."""
    if REAL_GPU:
        a = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        errors = []
        for precision in ("float32", "tf32"):
            backend = create("cupy", precision=precision)
            out = backend.to_device(np.empty_like(a))
            backend.matmul(backend.to_device(a), backend.to_device(a), out)
            errors.append(np.abs(backend.to_host(out) - a.astype(np.float64) @ a).max())
        assert errors[0] < 1e-4
        assert np.isfinite(errors[1])
    else:
        mode = ctypes.c_int.in_dll(cupy.cublas(), "math_mode")
        create("cupy")
        assert mode.value == 0
        create("cupy", precision="tf32")
        assert mode.value == 3


# Graphs ----------------------------------------------------------------------------------------


MLSTM = Architecture("mlstm", 9, 5, 5)


def passes(backend, theta, batch, repeats, about=MLSTM):
    """Return losses, gradients and products with a different direction each time, for one network."""
    network, tape, results = Network(about, backend, block_rows=20), None, []
    for repeat in range(repeats):
        v = backend.to_device(np.random.default_rng(repeat).standard_normal(theta.size).astype(theta.dtype))
        results.append(np.array(network.loss(backend.to_device(theta), batch)))
        tape = network.linearise_structural(backend.to_device(theta), batch, tape)
        for structural in (0.0, 0.5):
            out = backend.to_device(np.zeros_like(theta))
            tape.structural_gauss_newton(v, 1.0, structural, out)
            results.append(backend.to_host(out))
        out = backend.to_device(np.zeros_like(theta))
        tape.gradient(1.0, out)
        results.append(backend.to_host(out))
    return results


def by_graphs(dtype="float64"):
    """Return a backend without persistent kernels."""
    backend = create("cupy", dtype)
    backend.persistent_batch = 0
    return backend


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(5)
    theta = 0.5 * rng.standard_normal(MLSTM.layout.size)
    return theta, make_batch(rng, 5, 12, 4)


def test_a_replayed_graph_gives_the_numbers_of_plain_launches(problem):
    plain, graphs = by_graphs(), by_graphs()
    plain.captures = False
    expected, found = passes(plain, *problem, 4), passes(graphs, *problem, 4)
    assert graphs.captures
    assert any(graphs._graphs.values())
    assert not any(plain._graphs.values())
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_graphs_survive_a_workspace_that_grows(problem):
    """The old memory is freed, and nothing may use it any more."""
    theta, batch = problem
    backend = by_graphs()
    passes(backend, theta, batch, 3)
    larger = make_batch(np.random.default_rng(1), 5, 30, 11)
    passes(backend, theta, larger, 3)
    fresh = by_graphs()
    for a, b in zip(passes(backend, theta, batch, 3), passes(fresh, theta, batch, 3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_few_graphs_are_kept(problem, monkeypatch):
    monkeypatch.setattr("hfmpi.backends.cupy.MOST_GRAPHS", 3)
    backend = by_graphs()
    expected = passes(by_graphs(), *problem, 3)
    for a, b in zip(passes(backend, *problem, 3), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(backend._graphs) == 3


@standin_only
def test_a_refused_capture_falls_back_to_plain_launches(problem, monkeypatch):
    expected = passes(by_graphs(), *problem, 3)
    monkeypatch.setattr(cupy.Memory, "refuse_capture", True)
    backend = by_graphs()
    before = cupy.Memory.graphs
    for a, b in zip(passes(backend, *problem, 3), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not backend.captures
    assert cupy.Memory.graphs == before


# Persistent kernels ----------------------------------------------------------------------------


def persistent(dtype, about, rows=None):
    """Return a backend whose loops are one kernel each, and one whose are not.

    The longest rows have room on the chip for so many.
    """
    backend = create("cupy", dtype)
    backend.persistent_batch = 100
    if rows is not None:
        numbers = (
            backend._persistent._matrices(about.hidden, about.cell.multiplicative)
            + 3
            + rows * 4 * about.hidden
        )
        backend._persistent._shared_bytes = numbers * backend.dtype.itemsize
    return backend, by_graphs(dtype)


@pytest.mark.usefixtures("cooperative")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("about", "batch", "rows"), [
    (MLSTM, 4, None),
    (MLSTM, 5, 2),
    (Architecture("lstm", 10, 5, 5), 3, None),
    (Architecture("lstm", 2, 5, 5, variant="krause"), 1, None),
    (Architecture("mlstm", 8, 5, 5, variant="krause"), 4, None),
])  # fmt: skip
def test_a_persistent_kernel_gives_the_numbers_of_the_other_loops(dtype, about, batch, rows):
    rng = np.random.default_rng(about.hidden)
    theta = (0.5 * rng.standard_normal(about.layout.size)).astype(dtype)
    own, other = persistent(dtype, about, rows)
    problem = theta, make_batch(rng, about.outputs, 6, batch), 2, about
    found = passes(own, *problem)
    assert own.persistent_batch  # not refused
    assert not own._graphs
    for a, b in zip(found, passes(other, *problem), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=20 * np.finfo(dtype).eps * np.abs(b).max())
    for a, b in zip(found, passes(own, *problem), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("cooperative")
@pytest.mark.parametrize("reason", ["too many sequences", "a plain cell", "no room on the chip"])
def test_other_loops_are_no_persistent_kernels(reason):
    about = Architecture("mrnn", 9, 5, 5) if reason == "a plain cell" else MLSTM
    own, other = persistent("float64", about, 0 if reason == "no room on the chip" else None)
    if reason == "too many sequences":
        own.persistent_batch = 3
    rng = np.random.default_rng(0)
    problem = 0.5 * rng.standard_normal(about.layout.size), make_batch(rng, 5, 6, 4), 1, about
    found = passes(own, *problem)
    assert own._graphs
    for a, b in zip(found, passes(other, *problem), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("cooperative")
@standin_only
def test_a_refused_cooperative_launch_falls_back_to_graphs(problem, monkeypatch):
    own, other = persistent("float64", MLSTM)
    assert own._persistent.fit(MLSTM.hidden, True)  # it has queried the properties of the GPU
    monkeypatch.setitem(cupy.ATTRIBUTES, "MultiProcessorCount", 2)  # as if other programs used the rest
    for a, b in zip(passes(own, *problem, 1), passes(other, *problem, 1), strict=True):
        np.testing.assert_array_equal(a, b)
    assert own.persistent_batch == 0


def test_the_threads_of_a_persistent_kernel_are_those_of_its_source():
    assert f"#define THREADS_PERSISTENT {THREADS}\n" in KERNELS.read_text()


# Thread-block clusters -------------------------------------------------------------------------


def on_clusters(dtype, about, blocks, per=None):
    """Return a backend whose loops run on clusters, each for at most `per` sequences."""
    backend = create("cupy", dtype)
    if not backend.clusters.supported:
        pytest.skip("the GPU has no thread-block clusters")
    backend.cluster_batch, backend.cluster_blocks = 100, blocks
    del backend.clusters
    if per is not None:
        numbers = max(
            backend.clusters._numbers(name, about.hidden, about.cell.multiplicative, per)
            for name in SIGNATURES
        )
        backend.clusters._shared_bytes = numbers * backend.dtype.itemsize
    return backend


@pytest.mark.usefixtures("small_clusters")
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("about", "batch", "blocks", "per"), [
    (MLSTM, 4, 4, None),  # 3, 3, 3 and 0 units; 2 clusters of 2 sequences
    (MLSTM, 9, 2, 4),  # 4, 4 and 1 sequences
    (Architecture("lstm", 10, 5, 5), 2, 4, 1),  # 3, 3, 3 and 1 units; 1 sequence at a time
    (Architecture("lstm", 7, 5, 5), 13, 2, 8),
    (Architecture("lstm", 2, 5, 5, variant="krause"), 1, 4, None),
    (Architecture("mlstm", 8, 5, 5, variant="krause"), 5, 8, None),
])  # fmt: skip
def test_clusters_give_the_numbers_of_the_other_loops(dtype, about, batch, blocks, per, late, monkeypatch):
    if not REAL_GPU:
        monkeypatch.setattr(cupy.Memory, "late", late)
    rng = np.random.default_rng(about.hidden)
    theta = (0.5 * rng.standard_normal(about.layout.size)).astype(dtype)
    own = on_clusters(dtype, about, blocks, per)
    problem = theta, make_batch(rng, about.outputs, 6, batch), 2, about
    found = passes(own, *problem)
    assert own.cluster_batch  # not refused
    assert not own._graphs
    for a, b in zip(found, passes(by_graphs(dtype), *problem), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=20 * np.finfo(dtype).eps * np.abs(b).max())
    for a, b in zip(found, passes(own, *problem), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("small_clusters")
def test_a_cluster_of_sixteen_blocks(problem):
    """It needs the permission of the driver."""
    theta, batch = problem
    own = on_clusters("float64", MLSTM, clusters.BLOCKS)
    found = passes(own, theta, batch, 1)
    assert own.cluster_batch
    for a, b in zip(found, passes(by_graphs(), theta, batch, 1), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14 * np.abs(b).max())


@standin_only
@pytest.mark.usefixtures("small_clusters")
@pytest.mark.parametrize("reason", ["an older card", "no cluster at once", "too many sequences", "no room"])
def test_other_loops_run_on_no_clusters(problem, reason, monkeypatch):
    if reason == "no cluster at once":
        ctypes.c_int.in_dll(cupy.cuda_driver(), "at_once").value = 0
    own = on_clusters("float64", MLSTM, 4)
    if reason == "an older card":
        own.clusters.supported = False
    elif reason == "no room":
        own.clusters._shared_bytes = 1000
    elif reason == "too many sequences":
        own.cluster_batch = 3
    try:
        found = passes(own, *problem, 1)
    finally:
        ctypes.c_int.in_dll(cupy.cuda_driver(), "at_once").value = 2
    assert own.cluster_batch == {"no cluster at once": 0, "too many sequences": 3}.get(reason, 100)
    assert own._graphs
    for a, b in zip(found, passes(by_graphs(), *problem, 1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_clusters_are_not_the_default():
    assert create("cupy").cluster_batch == 0


# Memory ----------------------------------------------------------------------------------------


def risk_on(backend, micro_batch=None, length=30):
    rng = np.random.default_rng(1)
    about = Architecture("lstm", 16, 5, 5)
    sequences = Sequences(rng.integers(0, 5, 24 * length).astype(np.uint8), length)
    owner = DataParallel(Network(about, backend), Communicator(), micro_batch=micro_batch)
    theta = backend.to_device(about.initial(3))
    return owner, owner.on(sequences, np.arange(24)), theta


def everything(risk, theta):
    backend = risk.owner.model.backend
    at = risk.squared_gradients(theta)
    product = risk.gauss_newton(theta)
    parts = at.vector, at.squares, product(at.vector), product(theta)
    return [np.array([risk.loss(theta), at.loss]), *map(backend.to_host, parts)]


@standin_only
def test_micro_batches_shrink_when_the_memory_runs_out(monkeypatch, caplog):
    expected = everything(*risk_on(create("numpy", "float64"))[1:])
    backend = create("cupy", "float64")
    owner, risk, theta = risk_on(backend)
    owner.model.backend.release()
    monkeypatch.setattr(cupy.Memory, "total", cupy.Memory.used + 400_000)
    with caplog.at_level(logging.WARNING):
        found = everything(risk, theta)
    assert owner.local.micro_batch < 24
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
    sentences = [record.getMessage() for record in caplog.records]
    assert 1 <= len(sentences) <= 3  # one for each pass that had to shrink
    assert f"rank 0 ran out of memory ({backend.device})" in sentences[-1]
    assert sentences[-1].endswith(f"micro-batches of {owner.local.micro_batch} sequences.")
    again = everything(risk, theta)  # it remembers the smaller size
    assert len(caplog.records) == len(sentences)
    for a, b in zip(again, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


@standin_only
def test_a_product_survives_memory_that_runs_out_between_products(monkeypatch):
    backend = create("cupy", "float64")
    owner, risk, theta = risk_on(backend)
    product = risk.gauss_newton(theta)
    before = backend.to_host(product(theta))
    backend.workspace.flat.clear()  # as if it had to grow
    monkeypatch.setattr(cupy.Memory, "total", cupy.Memory.used + 100_000)
    np.testing.assert_allclose(backend.to_host(product(theta)), before, rtol=1e-10)
    assert owner.local.micro_batch < 24


@standin_only
def test_a_sequence_that_does_not_fit_is_one_sentence(monkeypatch):
    _, risk, theta = risk_on(create("cupy", "float64"))
    monkeypatch.setattr(cupy.Memory, "total", cupy.Memory.used + 10_000)
    with pytest.raises(UserError, match=r"rank 0 does not have enough memory for a single sequence \(Stand"):
        risk.loss(theta)


# Placement and transport -----------------------------------------------------------------------


@standin_only
def test_ranks_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setenv("HFMPI_STANDIN_GPUS", "2")
    found = [create("cupy", local_rank=rank) for rank in range(4)]
    assert [backend.device for backend in found] == ["Stand-in (GPU 0)", "Stand-in (GPU 1)"] * 2
    assert found[0].device_id == found[2].device_id != found[1].device_id


@standin_only
def test_no_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HFMPI_STANDIN_GPUS", "0")
    with pytest.raises(UserError, match="CUDA shows none"):
        create("cupy")


def test_without_cupy_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "hfmpi.backends.cupy", raising=False)
    with pytest.raises(UserError, match=r"the cupy backend requires CuPy .* install cupy-cuda12x"):
        create("cupy")


@pytest.mark.parametrize(("arguments", "reason"), [
    (("numba", "float32", 0, "tf32"), "matmul precision tf32 requires the cupy backend"),
    (("cupy", "float64", 0, "tf32"), "matmul precision tf32 requires the cupy backend"),
    (("cupy", "float32", 0, "half"), "no matmul precision 'half'"),
])  # fmt: skip
def test_precisions_that_cannot_be(arguments, reason):
    with pytest.raises(UserError, match=reason):
        create(*arguments)


class Ranks(Communicator):
    """What a communicator of several ranks with these locations would gather."""

    def __init__(self, *places):
        super().__init__()
        self.size, self.places = len(places), places

    def gather(self, value):
        return list(self.places)


def rank(device="a", aware=False, nccl=True, host="node1"):
    return host, device, aware, nccl


@pytest.mark.parametrize(("wanted", "places", "name"), [
    ("auto", [rank(), rank("b")], "host"),
    ("auto", [rank(aware=True), rank("b", aware=True)], "cuda"),
    ("auto", [rank(aware=True), rank(None, aware=True)], "host"),
    ("auto", [rank(aware=None), rank("b", aware=None)], "host"),
    ("host", [rank(aware=True), rank("b", aware=True)], "host"),
    ("cuda", [rank(aware=None), rank("b", aware=None)], "cuda"),
])  # fmt: skip
def test_transports_are_chosen_for_all_ranks(wanted, places, name, monkeypatch):
    monkeypatch.setattr(transport, "cuda_aware", lambda: False)
    assert transport.choose(wanted, Ranks(*places), create("cupy")).name == name


@pytest.mark.parametrize(("wanted", "places", "reason"), [
    ("cuda", [rank(), rank("b")], "does not accept GPU memory"),
    ("cuda", [rank(aware=True), rank(None, aware=True)], "none on rank 1: choose"),
    ("nccl", [rank(None), rank(None)], "none on rank 0, rank 1: choose"),
    ("nccl", [rank(), rank()], "needs a separate GPU for every rank"),
    ("nccl", [rank(), rank("b", nccl=False)], "CuPy does not find"),
    ("pigeon", [rank()], "no transport 'pigeon'"),
])  # fmt: skip
def test_transports_that_cannot_be(wanted, places, reason, monkeypatch):
    monkeypatch.setattr(transport, "cuda_aware", lambda: False)
    with pytest.raises(UserError, match=reason):
        transport.choose(wanted, Ranks(*places), create("cupy"))


def test_one_gpu_of_a_node_for_two_ranks_is_a_warning(tmp_path, capsys):
    run = make_run(tmp_path / "run", write_corpus(tmp_path / "d.h5"), backend="cupy")
    place = Place("node1", 0, "A card (GPU 0)", "0000:01", "host")
    told = run.facts([place, place])
    config = replace(run.config, matmul_precision="tf32")
    Log().start(replace(told, task=replace(told.task, config=config)))
    said = capsys.readouterr().out
    assert "rank 1: node1, local rank 0, A card (GPU 0), transport host" in said
    assert "Warning: ranks 0, 1 share one GPU of node1 and slow each other down." in said
    assert "matrix products in tf32" in said
    other = place._replace(host="node2", gpus=2, device_id="0000:02")
    Log().start(run.facts([place._replace(gpus=4), place, place._replace(device_id="0000:03"), other]))
    said = capsys.readouterr().out
    assert "each other down; 2 of its GPUs are free: move the model to hfmpi.device()." in said


# Whole runs ------------------------------------------------------------------------------------


def test_a_run_goes_on_on_another_device(tmp_path):
    data = write_corpus(tmp_path / "d.h5")
    whole, _ = train(tmp_path / "whole", data, max_steps=4, backend="numpy")
    train(tmp_path / "mixed", data, max_steps=1, backend="cupy")
    train(tmp_path / "mixed", data, max_steps=2, backend="numba")
    train(tmp_path / "mixed", data, max_steps=3, backend="cupy")
    mixed, _ = train(tmp_path / "mixed", data, max_steps=4, backend="numpy")
    np.testing.assert_allclose(mixed.theta, whole.theta, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["adam", "soap", "muon", "soap-muon"])
def test_adaptive_methods_do_the_same_on_every_device(tmp_path, optimizer):
    data = write_corpus(tmp_path / "d.h5")
    chosen = {"averaging": 0.5, "decay": 0.01, "epsilon": 1e-4}  # a smaller one would amplify rounding
    options = {"optimizer": optimizer, "max_steps": 3, "settings": chosen}
    reference, _ = train(tmp_path / "numpy", data, backend="numpy", **options)
    for backend in ("numba", "cupy"):
        run, _ = train(tmp_path / backend, data, backend=backend, **options)
        np.testing.assert_allclose(run.backend.to_host(run.theta), reference.theta, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cell", ["mlstm", "gru"])
@pytest.mark.parametrize(
    ("optimizer", "batch", "chosen"),
    [("lm", 20, {}), ("lm", 1, {"momentum": 0.5}), ("lbfgs", 210, {"memory": 2})],
    ids=["lm, parameters", "lm, rows", "lbfgs"],
)
def test_exact_methods_do_the_same_on_every_device(tmp_path, cell, optimizer, batch, chosen):
    data = write_corpus(tmp_path / "d.h5")
    options = {"optimizer": optimizer, "model": cell, "hidden": 3, "max_steps": 4, "settings": chosen}
    options |= {"gradient_batch": batch, "curvature_batch": 0}
    reference, _ = train(tmp_path / "numpy", data, backend="numpy", **options)
    assert reference.step == 4
    for backend in ("numba", "cupy"):
        run, _ = train(tmp_path / backend, data, backend=backend, **options)
        np.testing.assert_allclose(run.backend.to_host(run.theta), reference.theta, rtol=1e-7, atol=1e-8)


def test_curvature_is_the_same_on_every_device():
    rng = np.random.default_rng(0)
    data, found = (rng.standard_normal((6, 4, 2)), rng.standard_normal((6, 4, 2))), []
    for device in ("numpy", "cupy"):
        backend = create(device, "float64")
        network = hfmpi.Network(cell="lstm", inputs=2, outputs=2, hidden=3, backend=backend, loss="squares")
        c = hfmpi.curvature(network, network.initial(3), data)
        v, rows = np.cos(np.arange(c.theta.size)), c.rows("residuals")
        host = [c.gradient().vector, c.gauss_newton(v), c.matrix(), rows.times(v), rows.gram()]
        device_arrays = rows.gradient, rows.transposed(np.cos(np.arange(rows.count)))
        found.append(host + [backend.to_host(array) for array in device_arrays])
    for ours, reference in zip(*found, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-10, atol=1e-12)


@standin_only
@pytest.mark.parametrize("optimizer", ["soap", "muon", "soap-muon"])
def test_gradients_that_overflow_on_the_device_are_rejected(tmp_path, optimizer):
    run = make_run(tmp_path / "run", write_corpus(tmp_path / "d.h5"), backend="cupy", optimizer=optimizer)
    huge = Linear([run.theta * 0 + 1e200], run.model.blocks)
    with np.errstate(all="ignore"):
        theta, state, report = run.preset.optimizer.step(run.theta, run.state, Objectives(huge))
    assert theta is run.theta
    assert state is run.state
    assert report.message == "update rejected: the gradient is not finite"


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "soap", "muon", "soap-muon", "shf", "lm"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer):
    data = write_corpus(tmp_path / "d.h5")
    options = {"backend": "cupy", "optimizer": optimizer, "dtype": "float32", "hidden": 5}
    whole, _ = train(tmp_path / "whole", data, max_steps=4, **options)
    train(tmp_path / "parts", data, max_steps=2, **options)
    parts, _ = train(tmp_path / "parts", data, max_steps=4, **options)
    for run in (whole, parts):
        run.theta = run.backend.to_host(run.theta)
        fields = {k: run.backend.to_host(v) if hasattr(v, "get") else v for k, v in vars(run.state).items()}
        run.state = type(run.state)(**fields)
    same(whole, parts)
    assert history(tmp_path / "whole") == history(tmp_path / "parts")


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
@pytest.mark.parametrize("second", ["cupy", "numba"])
@pytest.mark.parametrize("wanted", ["host", "cuda", "nccl"])
def test_ranks_with_and_without_a_gpu_stay_in_step(mpi_ranks, comm, tmp_path, second, wanted, monkeypatch):
    assert comm.size == mpi_ranks
    if wanted != "host":
        if second != "cupy" or REAL_GPU:
            pytest.skip("needs a CUDA-aware MPI, or NCCL and two GPUs")
        monkeypatch.setenv("HFMPI_STANDIN_GPUS", "2")
        monkeypatch.setattr(transport, "cuda_aware", lambda: True)  # the stand-in's is the host's
    folder = Path(comm.bcast(str(tmp_path), root=0))
    communicator = MPICommunicator(comm)
    if communicator.rank == 0:
        write_corpus(folder / "d.h5")
    comm.barrier()
    backend = "cupy" if communicator.rank == 0 else second
    options = {"max_steps": 2, "check_every": 1, "evaluate_every": 5, "dtype": "float32", "hidden": 5}
    run, result = train_on(folder, communicator, backend, transport=wanted, **options)
    assert result.step == 2
    assert run.risk.transport.name == wanted
    theta = run.backend.to_host(run.theta)
    assert communicator.same(digest(theta)) == []
    alone, _ = train(folder / f"alone{communicator.rank}", folder / "d.h5", backend="numpy", **options)
    np.testing.assert_allclose(theta, alone.theta, rtol=1e-3, atol=1e-4)
    communicator.close()


def train_on(folder, communicator, backend, **options):
    """Train with a backend that only this rank uses, as `auto` would choose it."""
    run = make_run(folder / "run", folder / "d.h5", communicator, backend="auto", **options)
    local = create(backend, options["dtype"], communicator.local_rank)
    run = Run(run.folder, replace(run.task, model=Network(run.model.architecture, local)), run.session)
    return run, run.train()


def test_the_command_line_end_to_end(tmp_path):
    data = write_corpus(tmp_path / "d.h5")
    paths = [str(STANDIN)] * (not REAL_GPU) + [os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def hfmpi(*words, code=0):
        command = [sys.executable, "-c", "from hfmpi.cli.main import entry; entry()", *map(str, words)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    run = tmp_path / "run"
    tiny = [
        "--optimizer",
        "shf",
        "--hidden",
        5,
        "--sequence-length",
        10,
        "--gradient-batch",
        6,
        "--curvature-batch",
        3,
    ]
    said = hfmpi("train", data, "--out", run, "--backend", "cupy", *tiny, "--max-steps", 2)
    assert "1 rank(s) of" in said
    assert "cupy, float32" in said
    assert "local rank 0" in said
    assert "transport host" in said
    assert "bits/char" in hfmpi("evaluate", run, "--backend", "cupy")
    hfmpi("train", data, "--out", run, "--backend", "numba", "--max-steps", 3)
    other = ["--out", tmp_path / "other", *tiny]
    said = hfmpi("train", data, "--backend", "cupy", "--transport", "pigeon", *other, code=2)
    assert "no transport 'pigeon'" in said
    assert not (tmp_path / "other").exists()
    said = hfmpi(
        "bench", "products", "--backend", "cupy", "--model", "lstm", "--hidden", 4, "--length", 5,
        "--batch", 3, "--repeats", 3,
    )  # fmt: skip
    assert "(GPU 0)" in said
    hfmpi("bench", "allreduce", "--backend", "cupy", "--model", "rnn", "--hidden", 4, "--repeats", 1)


# The source, for the cards ---------------------------------------------------------------------


def compiles(source, *options):
    """Compile a source with NVRTC; it must do so without warnings."""
    nvrtc = pytest.importorskip("nvidia.cuda_nvrtc", reason="needs the wheel nvidia-cuda-nvrtc-cu12")
    library = ctypes.CDLL(str(next(Path(nvrtc.__path__[0]).glob("lib/libnvrtc.so.*"))))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert (
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    )
    options = [option.encode() for option in options]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    lines = [
        line for line in log.value.decode().splitlines() if "warning" in line and "deprecated" not in line
    ]
    assert lines == []
    assert library.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0
    assert size.value > 10_000


@pytest.mark.parametrize("arch", ["sm_70", "sm_80", "sm_90"])
@pytest.mark.parametrize("real", ["float", "double"])
def test_the_source_compiles(arch, real):
    compiles(KERNELS.read_text(), "-std=c++17", f"-DREAL={real}", f"-arch={arch}")


@pytest.mark.parametrize("blocks", [8, clusters.BLOCKS])
@pytest.mark.parametrize("real", ["float", "double"])
def test_the_source_of_the_clusters_compiles(blocks, real):
    source = "\n".join(path.read_text() for path in clusters.SOURCES)
    compiles(source, *clusters.options(real, blocks), "-arch=sm_90")


CUPY_NAMES = """
zeros_like linalg.cholesky linalg.eigh linalg.qr linalg.solve ndarray.reshape
matmul maximum tanh exp log1p arange ndarray.astype ndarray.__abs__ ndarray.transpose
RawModule ndarray.data ndarray.get ndarray.set ndarray.strides ndarray.itemsize ndarray.__array_ufunc__
ndarray.any ndarray.__array_function__ array_equal asarray
asnumpy ascontiguousarray empty empty_like zeros sum einsum
from_dlpack ndarray.__dlpack__ ndarray.__dlpack_device__ ndarray.__matmul__ may_share_memory
stack moveaxis vdot shape
multiply subtract get_default_memory_pool cuda.runtime.CUDARuntimeError cuda.runtime.getDeviceCount
cuda.runtime.getDeviceProperties cuda.Device.use cuda.Device.mem_info cuda.Device.pci_bus_id
cuda.Device.cublas_handle cuda.Stream.use cuda.Stream.synchronize cuda.Stream.begin_capture
cuda.Stream.end_capture cuda.Graph.launch cuda.alloc_pinned_memory
cuda.Device.attributes cuda.Device.compute_capability cuda.driver.funcSetAttribute
cuda.driver.launchCooperativeKernel cuda.MemoryPointer.memset_async
RawKernel.kernel RawKernel.max_dynamic_shared_size_bytes cuda.function.Function.ptr
cuda.memory.MemoryPool.free_bytes cuda.memory.MemoryPool.free_all_blocks
"""


def test_the_names_that_are_used_are_those_of_cupy():
    """Runs in a process without the stand-in, because CuPy can be imported without a GPU."""
    script = f"""
import operator, sys, warnings
sys.path = [p for p in sys.path if p != {str(STANDIN)!r}]
try:
    import cupy
except ImportError:
    sys.exit("absent")
for name in {CUPY_NAMES.split()!r}:
    operator.attrgetter(name)(cupy)
assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
module = cupy.RawModule(code="", options=("-std=c++17",))
assert callable(module.get_function)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if "absent" in done.stderr:
        pytest.skip("CuPy is not installed")
    assert done.returncode == 0, done.stderr
