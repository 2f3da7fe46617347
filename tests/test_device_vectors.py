"""Vectors of PyTorch and JAX models that stay on the GPU: same results as on the host, and no copies.

Without a GPU, on the stand-in for CuPy, the frameworks compute on the CPU and share the memory of the
stand-in's arrays, which are not NumPy arrays. With a GPU everything is on the GPU (bin/test-gpu).
"""

import contextlib
import copy
import logging
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REAL_GPU, STANDIN
from dense import CASES, INPUTS, OUTPUTS, STEPS, numbers, symbols

import hfmpi
from hfmpi.backends import create
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.errors import UserError
from hfmpi.objective import transport
from hfmpi.optim import Objectives
from hfmpi.optim.layout import parts_of, whole
from hfmpi.optim.presets import PRESETS
from hfmpi.optim.reduced_model import Basis, Row
from hfmpi.parallel.communicator import Communicator, MPICommunicator, digest

cupy = pytest.importorskip("cupy")
ONE = "examples", "directions"
SIZES = 6, 10, 10, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


# Models whose vectors pass through the host, and the same ones whose vectors stay on the device -----------


class Torch:
    """Modules of tests/test_torch.py."""

    names = "mlp", "lstm", "attention", "two", "convolution"

    def __init__(self, monkeypatch):
        self.torch = pytest.importorskip("torch")
        from hfmpi.frameworks import torch as models
        from hfmpi.frameworks import torch_exchange as exchange

        if REAL_GPU and not self.torch.cuda.is_available():
            pytest.skip("PyTorch finds no GPU")
        self.where = "cuda" if REAL_GPU else "cpu"
        self.patch, self.models, self.exchange = monkeypatch, models, exchange
        if not REAL_GPU:  # the CPU has no streams
            monkeypatch.setattr(exchange, "on_stream", lambda backend, device: contextlib.nullcontext())

    def choose(self, shared):
        """Return the function that chooses one of the two exchanges."""

        def choose(device, dtype):
            if shared:
                return self.exchange.ThroughDevice(create("cupy", dtype, device.index or 0), device)
            return self.exchange.ThroughHost(NumpyBackend(dtype), device)

        return choose

    def model(self, module, loss, shared):
        """Create a model with one of the two exchanges."""
        with self.patch.context() as patch:
            patch.setattr(self.models, "choose_exchange", self.choose(shared))
            return hfmpi.TorchModel(module.to(self.where), loss)

    def setting(self, name, shared):
        from test_torch import setting

        module, loss, cases, _ = setting(name)
        return self.model(module, loss, shared), cases

    def module(self, sizes):
        """Create linear layers of these sizes on the device."""
        nn = self.torch.nn
        self.torch.manual_seed(0)
        layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.Tanh())]
        return nn.Sequential(*layers[:-1]).double().to(self.where)

    def network(self, sizes, shared):
        """Create a model of linear layers of these sizes."""
        return self.model(self.module(sizes), "squares", shared)

    def address(self, tensor):
        return tensor.data_ptr()


class Jax:
    """Functions of tests/test_jax.py."""

    names = "mlp", "scan", "attention", "two", "reverse"

    def __init__(self, monkeypatch):
        self.jax = pytest.importorskip("jax")
        from hfmpi.frameworks import jax as models
        from hfmpi.frameworks import jax_exchange as exchange

        self.device = self.jax.devices()[0]
        if REAL_GPU and self.device.platform != "gpu":
            pytest.skip("JAX finds no GPU")
        self.patch, self.models, self.exchange = monkeypatch, models, exchange

    def model(self, apply, params, loss, shared):
        """Create a model with one of the two exchanges."""

        def choose(params, dtype):
            if shared:
                backend = create("cupy", dtype, self.device.local_hardware_id or 0)
                return self.exchange.ThroughDevice(backend, self.device)
            return self.exchange.ThroughHost(NumpyBackend(dtype))

        with self.patch.context() as patch:
            patch.setattr(self.models, "choose_exchange", choose)
            return hfmpi.JaxModel(apply, params, loss)

    def setting(self, name, shared):
        from test_jax import setting

        apply, params, loss, cases, _ = setting(name)
        return self.model(apply, params, loss, shared), cases

    def network(self, sizes, shared):
        """Create a model of linear layers of these sizes."""
        pairs, jnp = list(pairwise(sizes)), self.jax.numpy
        params = [(numbers(i, o) / i, numbers(o) / i) for i, o in pairs]

        def apply(params, x):
            for w, b in params[:-1]:
                x = jnp.tanh(x @ w + b)
            return x @ params[-1][0] + params[-1][1]

        return self.model(apply, params, "squares", shared)

    def address(self, tensor):
        return tensor.unsafe_buffer_pointer()


@pytest.fixture(params=[Torch, Jax], ids=["torch", "jax"])
def framework(request, monkeypatch):
    """Return a framework on the device; JAX with float64."""
    made = request.param(monkeypatch)
    if request.param is Torch:
        yield made
        return
    before = made.jax.config.jax_enable_x64
    made.jax.config.update("jax_enable_x64", True)
    yield made
    made.jax.config.update("jax_enable_x64", before)


def scaled(params, x):
    """Scale an array; a function at module level, which JAX and pickle accept."""
    return params * x


def cases_for(sizes, count=8):
    return hfmpi.Examples(numbers(count, sizes[0]), numbers(count, sizes[-1], seed=5))


# The same numbers --------------------------------------------------------------------------------


def everything(model, cases, micro_batch=CASES):
    """Return the results of all computations of a model on the host; with several steps some are masked."""
    backend = model.backend
    to_device, to_host, xp = backend.to_device, backend.to_host, backend.xp
    theta, count = to_device(model.initial(0)), cases.count
    batch, size = cases.take(np.arange(count)), model.size
    assert isinstance(theta, xp.ndarray)
    found = {"loss": model.loss(theta, batch), "outputs": model.outputs(theta, batch)[0]}
    assert isinstance(found["outputs"], np.ndarray)

    def add(name, write, *shapes):
        """Return what `write` adds to vectors of zeros."""
        out = [xp.zeros(shape, backend.dtype) for shape in shapes]
        write(*out)
        found.update({f"{name} {i}": to_host(each) for i, each in enumerate(out)})

    v, many = to_device(numbers(size, seed=6)), to_device(numbers(9, size, seed=7))
    for words, linearise in (("", model.linearise), ("rows first, ", model.linearise_rows)):
        at = linearise(theta, batch)
        assert isinstance(at.passes.outputs, xp.ndarray)
        assert at.nbytes > 0
        found[f"{words}linearised"] = at.loss
        residuals, segments = at.residual_count(), at.segment_count(2)
        signs = to_device(np.where(numbers(count, residuals, seed=8) > 0, 1.0, -1.0))
        add(f"{words}scores", lambda out, at=at: at.scores(1, out), (count, 1, size))
        add(f"{words}segments", lambda out, at=at: at.scores(2, out), (count, 2, size))
        add(f"{words}sketch", lambda out, at=at, s=signs: at.sketch(s, 1, out), (count, 1, size))
        add(f"{words}residuals", at.residual_rows, (count, residuals, size), (count, residuals))
        add(f"{words}gradient", lambda out, at=at: at.gradient(0.5, out), size)
        add(
            f"{words}factors",
            lambda *out, at=at: at.factored_gradient(0.5, *out),
            size,
            model.factor_sums.size,
        )
        add(f"{words}squares", lambda *out, at=at: at.squared_gradients(0.5, *out), size, size)
        add(f"{words}product", lambda out, at=at: at.gauss_newton(v, 0.5, out), size)
        found[f"{words}along"] = np.array(to_host(at.jvp(v)))
        found[f"{words}along many"] = np.array(to_host(at.jvp(many)))
        u = to_device(numbers(len(at.cache) * 3, at.cache.shape[1], seed=9))
        add(f"{words}back", lambda out, at=at, u=u: at.vjp(u, out), (3, size))
        projected = np.zeros((9, 9))
        at.project(many, 0.5, projected)
        found[f"{words}projected"] = projected
        # Directions that are cut into parts, and full directions.
        for cuts in (parts_of(model.blocks), [whole(size)]):
            basis = Basis([many[:2]], [Row(part, i, 0.5 + i) for part in cuts for i in (0, 1)])
            found[f"{words}sketched {len(cuts)}"] = to_host(at.sketch_along(signs, segments, basis.along()))

    owner = hfmpi.DataParallel(model, Communicator(), micro_batch=micro_batch)
    risk = owner.on(cases, np.arange(count))
    gradient, factors = risk.factored_gradient(theta)
    squared, product = risk.squared_gradients(theta), risk.gauss_newton(theta)
    vectors = {
        "gradient": gradient.vector,
        "factors": factors,
        "squares": squared.squares,
        "product": product(v),
    }
    assert all(isinstance(vector, xp.ndarray) for vector in vectors.values())
    found |= {f"risk, {name}": to_host(vector) for name, vector in vectors.items()}
    found["risk"], found["risk, projected"] = risk.loss(theta), risk.project(theta)(many)
    return found


JAX_CASES = (False, 0), (False, 1), (False, 3), (True, 0)


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "one by one"])
@pytest.mark.parametrize("number", range(5))
def test_all_passes_compute_the_same_on_the_device(framework, number, sequential):
    if isinstance(framework, Jax) and (sequential, number) not in JAX_CASES:
        pytest.skip("compiles for long, and adds no way to exchange arrays")
    found = []
    for shared in (False, True):
        model, cases = framework.setting(framework.names[number], shared)
        model.check(model.initial(0), cases.take(np.arange(CASES)))
        if sequential:
            model.replan(sequential=frozenset(ONE))
        found.append(everything(model, cases))
    assert list(found[0]) == list(found[1])
    for name, expected in found[0].items():
        np.testing.assert_allclose(found[1][name], expected, **CLOSE, err_msg=name)


def test_masks_and_burn_in_are_on_the_device(monkeypatch):
    torch, mask = Torch(monkeypatch), np.array([[1, 0], [1, 1], [0, 0], [0, 1]])
    cases = hfmpi.Arrays(numbers(CASES, STEPS, INPUTS), symbols(CASES, STEPS - 1), mask, burn_in=1)
    ours, expected = (everything(torch.setting("lstm", shared)[0], cases, 2) for shared in (True, False))
    for key, value in expected.items():
        np.testing.assert_allclose(ours[key], value, **CLOSE, err_msg=key)


def test_weights_of_examples_are_on_the_device(framework):
    weights, found = np.array([0.5, 2.0, 0.0, 1.5]), []
    for shared in (True, False):
        model = framework.setting("mlp", shared)[0]
        cases = hfmpi.Examples(numbers(CASES, INPUTS), numbers(CASES, OUTPUTS), weights=weights)
        risk = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(CASES))
        theta, to_host = model.backend.to_device(model.initial(0)), model.backend.to_host
        (gradient, factors), squared = risk.factored_gradient(theta), risk.squared_gradients(theta)
        vectors = gradient.vector, factors, squared.squares, risk.gauss_newton(theta)(gradient.vector)
        found.append([risk.loss(theta), *map(to_host, vectors)])
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, **CLOSE)


@pytest.mark.parametrize("name", ["bhf-short", "adam"])
def test_the_facade_of_pytorch_keeps_its_vectors_on_the_device(monkeypatch, name):
    torch, found = Torch(monkeypatch), []
    x, y = torch.torch.tensor(numbers(8, 6)), torch.torch.tensor(numbers(8, 3, seed=5))
    for shared in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(torch.models, "choose_exchange", torch.choose(shared))
            module = torch.module(SIZES)
            optimizer = hfmpi.torch.Optimizer(module, "squares", name)
            found.append([optimizer.step(x, y) for _ in range(3)])
        found[-1] += [p.detach().cpu().numpy() for p in module.parameters()]
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-8)


def test_single_outputs_of_a_jax_function_come_with_their_gradients(monkeypatch):
    jax = Jax(monkeypatch)
    jax.jax.config.update("jax_enable_x64", True)
    try:
        found = [
            everything(jax.network((INPUTS, 3, 1), s), cases_for((INPUTS, 1), CASES)) for s in (True, False)
        ]
    finally:
        jax.jax.config.update("jax_enable_x64", False)
    for key, value in found[1].items():
        np.testing.assert_allclose(found[0][key], value, **CLOSE, err_msg=key)


@pytest.mark.parametrize("optimizer", PRESETS)
def test_every_preset_takes_the_same_steps_on_the_device(framework, optimizer, tmp_path):
    if isinstance(framework, Jax) and optimizer not in ("adam", "bhf-short", "subspace"):
        pytest.skip("compiles for long, and PyTorch shows it")
    options = {"optimizer": optimizer, "quiet": True, "valid": (numbers(6, 6), numbers(6, 3, seed=2))}
    options["metric"] = lambda outputs, targets: np.abs(outputs - targets).sum(axis=1)
    data, results = (numbers(24, 6), numbers(24, 3, seed=5)), []
    for shared in (False, True):
        model = framework.network(SIZES, shared)
        results.append(hfmpi.train(model, data, max_steps=4, **options))
        losses = [record["loss"] for record in results[-1].history]
        assert len(losses) == 4
        assert isinstance(results[-1].theta, np.ndarray)
    theirs, ours = ([record["loss"] for record in result.history] for result in results)
    # Host and device solve systems differently, and a step that overshoots amplifies the rounding.
    loose = 1e4 if optimizer.startswith("subspace") else 1
    np.testing.assert_allclose(ours, theirs, rtol=loose * 1e-7)
    np.testing.assert_allclose(results[1].theta, results[0].theta, rtol=1e-5 * loose, atol=1e-7 * loose)
    np.testing.assert_allclose(results[1].valid_metric, results[0].valid_metric, rtol=loose * 1e-6)
    if isinstance(framework, Jax):  # each model compiles again
        return
    # A run that is resumed is the same bit for bit.
    out = tmp_path / "run"
    for steps in (2, 4):
        parts = hfmpi.train(framework.network(SIZES, True), data, max_steps=steps, out=out, **options)
    assert np.array_equal(parts.theta, results[1].theta)


@pytest.mark.parametrize("loss", ["cross-entropy", "bernoulli"])
def test_float32_and_the_other_losses_train_on_the_device(framework, loss):
    y = symbols(40) if loss == "cross-entropy" else (numbers(40, OUTPUTS) > 0) * 1.0
    losses = []
    for shared in (False, True):
        if isinstance(framework, Torch):
            framework.torch.manual_seed(0)
            model = framework.model(framework.torch.nn.Linear(INPUTS, OUTPUTS), loss, shared)
        else:
            params = numbers(INPUTS, OUTPUTS).astype(np.float32)
            model = framework.model(lambda w, x: x @ w, params, loss, shared)
        result = hfmpi.train(model, (numbers(40, INPUTS), y), optimizer="bhf-short", max_steps=3, quiet=True)
        assert model.backend.dtype == result.theta.dtype == np.float32
        losses.append([record["loss"] for record in result.history])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    assert losses[1][-1] < losses[1][0]


# No copies ---------------------------------------------------------------------------------------


class Copies:
    """Records the sizes of arrays that are copied between host and device."""

    def __init__(self, monkeypatch, backend, exchange):
        self.sizes = list[tuple[str, int]]()
        kind, moves = type(backend), type(exchange)
        for owner, name in [(kind, n) for n in ("to_host", "to_device", "stage")] + [(moves, "moved")]:
            self._count(monkeypatch, owner, name, 1)
        if not REAL_GPU:  # the only ways to and from the stand-in's memory
            for name in ("get", "set", "__init__"):
                if name != "__init__":
                    self._count(monkeypatch, cupy.ndarray, name, 0)
            self._count(monkeypatch, cupy, "asarray", 0)

    def _count(self, monkeypatch, owner, name, position):
        function = getattr(owner, name)

        def counted(*args, **options):
            array = args[position]
            if name not in ("asarray", "to_device") or not isinstance(array, cupy.ndarray):
                self.sizes.append((name, int(np.prod(array.shape)) if hasattr(array, "shape") else 1))
            return function(*args, **options)

        monkeypatch.setattr(owner, name, counted)


STEPPED = "sgd", "adam", "shf", "bhf-short", "soap", "muon", "subspace", "subspace-rows", "lm", "lbfgs"


@pytest.mark.parametrize("name", STEPPED)
def test_no_vector_passes_through_the_host_in_a_step(framework, name, monkeypatch):
    """Only scalars, small matrices and the examples of the batch do."""
    if isinstance(framework, Jax) and name not in ("bhf-short", "subspace-rows"):
        pytest.skip("compiles for long, and PyTorch shows it")
    sizes = 6, 60, 60, 3
    model, cases = framework.network(sizes, True), cases_for(sizes)
    risk = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(cases.count))
    optimizer, backend = hfmpi.optim.presets.preset(name).optimizer, model.backend
    theta = backend.to_device(model.initial(0))
    state = optimizer.init(theta, risk.blocks)
    theta, state, _ = optimizer.step(theta, state, Objectives(risk, risk))  # checks the model
    copies = Copies(monkeypatch, backend, model.exchange)
    for _ in range(2):
        theta, state, _ = optimizer.step(theta, state, Objectives(risk, risk))
        assert isinstance(theta, cupy.ndarray)
    assert copies.sizes  # at least the targets of the batch
    assert max(size for _, size in copies.sizes) <= 60 * 60 < model.size
    backend.to_host(theta)
    assert copies.sizes[-1][1] == model.size  # such a copy is detected


def test_tensors_and_arrays_share_their_memory(framework):
    model, _ = framework.setting("mlp", True)
    exchange, backend = model.exchange, model.backend
    v = backend.xp.zeros(1 << 12, backend.dtype)
    tensor = exchange.tensor(v)
    if isinstance(framework, Torch) or REAL_GPU:  # on a CPU, JAX requires aligned memory
        assert framework.address(tensor) == backend.address(v)
    with exchange.working():
        result = tensor + 1
        back = exchange.array(result)
        assert backend.address(back) == framework.address(result)
        np.testing.assert_array_equal(backend.to_host(back), np.ones(1 << 12))
    # A slice of a vector with any offset, and a matrix in column order.
    odd = backend.to_device(np.arange(101.0))[1:]
    columns = backend.to_device(np.arange(12.0).reshape(3, 4)).swapaxes(0, 1)
    for array in (odd, columns):
        with exchange.working():
            back = exchange.array(exchange.tensor(array) * 2)
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(backend.to_host(back), 2 * backend.to_host(array))


def test_arrays_of_jax_are_held_until_the_stream_has_finished(monkeypatch):
    jax = Jax(monkeypatch)
    jax.jax.config.update("jax_enable_x64", True)
    try:
        model, cases = jax.setting("mlp", True)
        theta = model.backend.to_device(model.initial(0))
        at, order = model.linearise(theta, cases.take(np.arange(CASES))), []
        held, synchronize = model.exchange._held, model.backend.synchronize
        monkeypatch.setattr(
            type(model.backend),
            "synchronize",
            lambda self: (order.append([*held.arrays]), synchronize()),
        )
        u = model.backend.to_device(numbers(CASES, OUTPUTS))
        at.vjp(u, theta * 0)
        given = [*held.arrays]
        assert any(one is u or getattr(one, "shape", None) == u.shape for one in given)
        assert any(one.shape == theta.shape for one in given)
        order.clear()
        at.vjp(u, theta * 0)  # the first action of the next pass
        assert [len(one) for one in order] == [len(given)]
        assert all(a is b for a, b in zip(order[0], given, strict=True))
        monkeypatch.setattr(jax.exchange, "HELD_BYTES", 0)
        order.clear()
        at.scores(1, model.backend.xp.zeros((CASES, 1, model.size)))
        assert len(order) > 2  # also within a pass, if it holds much memory
    finally:
        jax.jax.config.update("jax_enable_x64", False)


def test_the_theta_of_a_linearisation_stays_as_it_was(framework):
    model, cases = framework.setting("mlp", True)
    batch, theta = cases.take(np.arange(CASES)), model.backend.to_device(model.initial(0))
    at, sums = model.linearise(theta, batch), []
    for _ in range(2):
        out = model.backend.xp.zeros((CASES, 1, model.size), model.backend.dtype)
        at.scores(1, out)  # recomputed from theta
        sums.append(model.backend.to_host(out))
        theta += 1
    assert np.array_equal(*sums)


# Forms of theta ----------------------------------------------------------------------------------


def test_theta_may_be_on_the_host_or_on_the_device(framework):
    model, cases = framework.setting("mlp", True)
    batch, theta = cases.take(np.arange(CASES)), model.initial(0) * 2
    device = model.backend.to_device(theta)
    assert model.loss(theta, batch) == model.loss(device, batch)
    assert model.linearise(theta, batch).loss == pytest.approx(model.loss(device, batch), rel=1e-9)
    with pytest.raises((TypeError, ValueError), match="theta must be"):
        model.loss(device[1:], batch)
    if isinstance(framework, Torch):
        for one in (theta, device):
            model.write_back(one)
            again = framework.model(model.module, "squares", True)
            assert np.array_equal(again.initial(0), theta)
            model.write_back(model.initial(0))
        with pytest.raises(UserError, match="theta must be a vector of"):
            model.write_back(device[1:])
    else:
        trees = [framework.jax.tree_util.tree_leaves(model.params(one)) for one in (theta, device)]
        flat = [np.concatenate([np.ravel(leaf) for leaf in tree]) for tree in trees]
        assert np.array_equal(flat[0], theta)
        assert np.array_equal(*flat)
        with pytest.raises(UserError, match="theta must be a vector of"):
            model.params(device[1:])


def test_models_on_the_device_can_be_copied(framework):
    if isinstance(framework, Jax):
        model = framework.model(scaled, numbers(OUTPUTS), "squares", True)
        cases = hfmpi.Examples(numbers(CASES, OUTPUTS), numbers(CASES, OUTPUTS))
    else:
        model, cases = framework.network((INPUTS, OUTPUTS), True), cases_for((INPUTS, OUTPUTS), CASES)
    batch = cases.take(np.arange(CASES))
    expected, theta = model.loss(model.initial(0), batch), model.initial(0)
    model.backend.micro_batch = 77
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again.exchange) is type(model.exchange)
        assert again.exchange.backend is again.backend
        assert again.backend.micro_batch == 77
        assert again.loss(theta, batch) == expected


def test_curvature_is_that_of_the_host(framework):
    found = []
    for shared in (False, True):
        model = framework.network((INPUTS, 4, OUTPUTS), shared)
        data = numbers(CASES, INPUTS), numbers(CASES, OUTPUTS)
        c = hfmpi.curvature(model, model.initial(0), data)
        v, rows = np.cos(np.arange(c.theta.size)), c.rows("residuals")
        host = [c.gradient().vector, c.gauss_newton(v), c.matrix(), rows.times(v), rows.gram()]
        host += [matrix for pair in c.kronecker_factors().values() for matrix in pair]
        assert all(isinstance(array, np.ndarray) for array in host)
        found.append(host)
    for ours, expected in zip(found[1], found[0], strict=True):
        np.testing.assert_allclose(ours, expected, **CLOSE)


@pytest.mark.skipif(REAL_GPU, reason="needs the stand-in: the GPU does not run out of memory on demand")
def test_memory_of_the_device_that_runs_out_halves_the_micro_batch(framework, caplog, monkeypatch):
    sizes = 6, 24, 24, 3
    model, cases = framework.network(sizes, True), cases_for(sizes)
    theta = model.backend.to_device(model.initial(0))
    owner = hfmpi.DataParallel(model, Communicator())
    risk = owner.on(cases, np.arange(cases.count))
    expected = cupy.asnumpy(risk.squared_gradients(theta).squares)
    total, known = cupy.Memory.total, type(model.linearise(theta, cases.take(np.arange(2))).passes.inner)
    squares = known.squares

    def hungry(self, *args):
        if self.examples > 2:
            cupy.zeros(total)
        squares(self, *args)

    monkeypatch.setattr(known, "squares", hungry)
    found = cupy.asnumpy(risk.squared_gradients(theta).squares)
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert "micro-batches of 2 sequences" in caplog.text


# The choice of the exchange, and streams ---------------------------------------------------------


def test_a_module_on_an_nvidia_gpu_takes_the_backend_of_that_gpu(monkeypatch, caplog):
    torch = Torch(monkeypatch)
    choose, device = torch.exchange.choose_exchange, torch.torch.device
    monkeypatch.setattr(torch.torch.version, "cuda", "13.0")
    made = []
    monkeypatch.setattr(torch.exchange, "gpu_backend", lambda *asked: made.append(asked))
    kinds = torch.exchange.ThroughHost, torch.exchange.ThroughDevice
    assert type(choose(device("cuda", 3), "float64")) is kinds[0]  # CuPy is missing
    assert type(choose(device("cpu"), "float32")) is type(choose(device("mps"), "float32")) is kinds[0]
    assert made == [("float64", 3)]
    monkeypatch.setattr(torch.exchange, "gpu_backend", lambda *asked: NumpyBackend(asked[0]))
    assert type(choose(device("cuda", 3), "float64")) is kinds[1]
    monkeypatch.setattr(torch.torch.version, "cuda", None)  # PyTorch for AMD
    assert type(choose(device("cuda", 0), "float64")) is kinds[0]
    assert not caplog.records


def test_a_function_of_jax_takes_the_backend_of_the_gpu_of_its_params(monkeypatch):
    jax = Jax(monkeypatch)
    made = []
    monkeypatch.setattr(
        jax.exchange, "gpu_backend", lambda *asked: made.append(asked) or NumpyBackend(asked[0])
    )
    gpu = SimpleNamespace(
        platform="gpu", client=SimpleNamespace(platform_version="... cuda 13000"), local_hardware_id=2
    )
    assert jax.exchange.is_nvidia(gpu)
    assert not jax.exchange.is_nvidia(SimpleNamespace(platform="cpu"))
    gpu.client.platform_version = "rocm"
    assert not jax.exchange.is_nvidia(gpu)
    monkeypatch.setattr(jax.exchange, "is_nvidia", lambda device: True)
    found = jax.exchange.choose_exchange({"w": jax.jax.numpy.ones(3), "b": np.ones(2)}, "float64")
    assert type(found) is jax.exchange.ThroughDevice
    assert found.device in jax.jax.devices()
    assert made == [("float64", found.device.local_hardware_id)]


def test_without_cupy_a_note_says_what_to_install(monkeypatch, caplog):
    from hfmpi.frameworks.exchange import gpu_backend

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "hfmpi.backends.cupy", raising=False)
    with caplog.at_level(logging.WARNING):
        assert gpu_backend("float32", 0) is None
    (record,) = caplog.records
    assert "all vectors are copied through the host in every pass" in record.getMessage()
    assert "cupy-cuda12x or cupy-cuda13x" in record.getMessage()


class Streams:
    """The effect of `on_stream` on the streams of PyTorch."""

    def __init__(self, current):
        self.current, self.log = current, []

    def made(self, name):
        class Stream:
            def __eq__(stream, other):
                return stream.name == other.name

            __hash__ = None

            def wait_stream(stream, other):
                self.log.append(f"{stream.name} waits for {other.name}")

        stream = Stream()
        stream.name = name
        return stream

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before


@pytest.mark.parametrize("fails", [False, True])
def test_pytorch_works_on_the_stream_of_the_backend(monkeypatch, fails):
    torch = pytest.importorskip("torch")
    from hfmpi.frameworks.torch_exchange import on_stream

    streams = Streams("user's")
    monkeypatch.setattr(
        torch.cuda, "ExternalStream", lambda stream, device: streams.made(f"{stream} of {device}")
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.made(streams.current))
    monkeypatch.setattr(torch.cuda, "stream", streams.stream)
    backend = SimpleNamespace(stream=7, use=lambda: streams.log.append("backend's device"))
    with contextlib.suppress(ZeroDivisionError), on_stream(backend, "cuda:1"):
        streams.log.append(f"on {streams.current}")
        with on_stream(backend, "cuda:1"):
            streams.log.append(f"inside on {streams.current}")
        assert not (fails and 1 / 0)
    assert streams.log == [
        "backend's device",
        "7 of cuda:1 waits for user's",
        "on 7 of cuda:1",
        "backend's device",
        "inside on 7 of cuda:1",
        "user's waits for 7 of cuda:1",
        "backend's device",
    ]


# Several ranks -----------------------------------------------------------------------------------


@pytest.mark.mpi(ranks=2, timeout=200, unit="s")
@pytest.mark.parametrize("wanted", ["host", "cuda", "nccl"])
def test_two_ranks_on_devices_compute_what_one_computes(mpi_ranks, comm, wanted, monkeypatch):
    if wanted != "host" and REAL_GPU:
        pytest.skip("needs a CUDA-aware MPI, or NCCL and two GPUs")
    monkeypatch.setenv("HFMPI_STANDIN_GPUS", "2")
    monkeypatch.setattr(transport, "cuda_aware", lambda: True)  # the stand-in's is the host's
    torch, found, steps = Torch(monkeypatch), [], []
    local = comm.rank % 2
    if not REAL_GPU:
        make = torch.exchange.ThroughDevice
        monkeypatch.setattr(
            torch.exchange, "ThroughDevice", lambda _, device: make(create("cupy", "float64", local), device)
        )
    for communicator in (MPICommunicator(comm), Communicator()):
        model, cases = torch.setting("lstm", True)
        backend = model.backend
        chosen = transport.choose(wanted if communicator.size > 1 else "host", communicator, backend)
        risk = hfmpi.DataParallel(model, communicator, transport=chosen).on(cases, np.arange(cases.count - 1))
        assert chosen.name == (wanted if communicator.size > 1 else "host")
        theta, v = backend.to_device(model.initial(0)), backend.to_device(numbers(3, model.size))
        squared, (gradient, factors) = risk.squared_gradients(theta), risk.factored_gradient(theta)
        vectors = [squared.vector, squared.squares, gradient.vector, factors, risk.gauss_newton(theta)(v[0])]
        found.append([risk.loss(theta), risk.project(theta)(v), *map(backend.to_host, vectors)])
        steps.append([])
        for name in ("bhf-short", "subspace", "adam"):
            optimizer = hfmpi.optim.presets.preset(name).optimizer
            at, state = theta, optimizer.init(theta, risk.blocks)
            for _ in range(2):
                at, state, _ = optimizer.step(at, state, Objectives(risk, risk))
            host = backend.to_host(at)
            assert communicator.same(digest(host)) == []
            steps[-1].append(host)
    assert mpi_ranks == comm.size == 2
    for ours, alone in zip(*found, strict=True):
        np.testing.assert_allclose(ours, alone, **CLOSE)
    for ours, alone in zip(*steps, strict=True):  # rounding errors grow in a step
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-5)


RANKS = """
import hfmpi
print(hfmpi.local_rank(), hfmpi.device())
"""


def test_one_process_has_the_first_device():
    paths = [str(Path(__file__).parents[1]), *([str(STANDIN)] * (not REAL_GPU))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", RANKS], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "cuda:0" if REAL_GPU else "cpu"], done.stderr


def test_ranks_of_a_node_take_its_gpus_in_turn(monkeypatch):
    from hfmpi.backends import rank_device

    for gpus, names in ((0, ["cpu"] * 3), (2, ["cuda:0", "cuda:1", "cuda:0"])):
        monkeypatch.setattr(rank_device, "gpus", lambda gpus=gpus: ["A card"] * gpus)
        monkeypatch.setattr(rank_device, "devices", list)
        for local, name in enumerate(names):
            monkeypatch.setattr(rank_device, "local_rank", lambda local=local: local)
            assert hfmpi.device() == name
    monkeypatch.setattr(rank_device, "gpus", list)  # without CuPy
    monkeypatch.setattr(rank_device, "devices", lambda: ["0", "1", "2"])
    monkeypatch.setattr(rank_device, "local_rank", lambda: 2)
    assert hfmpi.device() == "cuda:2"


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
def test_ranks_have_numbers_on_their_node(mpi_ranks, comm):
    assert comm.gather(hfmpi.local_rank()) in (None, [*range(mpi_ranks)])
