"""Weights of examples: sums and dense matrices in float64; integer weights and repeated examples."""

import importlib.util

import numpy as np
import pytest
from dense import check_ranks, loss_of_rows
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import hfmpi
from hfmpi.backends import create
from hfmpi.errors import UserError
from hfmpi.objective.local_rows import signs
from hfmpi.optim.layout import whole
from hfmpi.optim.reduced_model import Basis, Row
from hfmpi.optim.rows import RowRequest
from hfmpi.parallel.communicator import Communicator, MPICommunicator
from hfmpi.runs import metric

COUNT, STEPS, INPUTS, OUTPUTS = 5, 3, 2, 3
CLOSE = {"rtol": 1e-9, "atol": 1e-11}

frameworks = pytest.mark.parametrize(
    "framework",
    [
        "network",
        "table",
        *(
            pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=name))
            for name in ("torch", "jax")
        ),
    ],
)
settled = settings(max_examples=8, deadline=None)
kinds = st.sampled_from(["cross-entropy", "squares", "bernoulli"])


def model_of(framework, kind):
    """Return a model in float64 that reads sequences."""
    if framework in ("network", "table"):
        inputs = 4 if framework == "table" else INPUTS
        parts = {"cell": "lstm", "inputs": inputs, "outputs": OUTPUTS, "hidden": 2}
        return hfmpi.Network(backend=create("numpy", dtype="float64"), loss=kind, **parts)
    if framework == "torch":
        import torch

        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(INPUTS, 3), torch.nn.Tanh(), torch.nn.Linear(3, OUTPUTS))
        return hfmpi.TorchModel(module.double(), kind)
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    params = {"a": rng.standard_normal((INPUTS, 3)), "b": rng.standard_normal((3, OUTPUTS)), "c": np.ones(3)}
    return hfmpi.JaxModel(lambda p, x: jnp.tanh(x @ p["a"] * p["c"]) @ p["b"], params, kind)


MODELS = {}


def model_for(framework, kind):
    """Return one model for all examples of a property test, because JAX compiles each model."""
    if (framework, kind) not in MODELS:
        MODELS[framework, kind] = model_of(framework, kind)
    return MODELS[framework, kind]


def data_of(model, kind, framework, seed):
    """Return x and y."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((COUNT, STEPS, INPUTS))
    if framework == "table":
        x = rng.integers(0, 4, (COUNT, STEPS))
    y = rng.random((COUNT, STEPS, OUTPUTS))
    return x, rng.integers(0, OUTPUTS, (COUNT, STEPS)) if kind == "cross-entropy" else y


def examples_of(framework, *arrays, **more):
    """Return the examples that the model takes."""
    return (hfmpi.Arrays if framework in ("network", "table") else hfmpi.Examples)(*arrays, **more)


def sizes(z, y):
    return np.abs(z).sum(axis=1)


def risk_of(model, cases, micro_batch=2):
    return hfmpi.DataParallel(model, Communicator(), micro_batch=micro_batch).on(
        cases, np.arange(cases.count)
    )


def directions_of(model):
    """Return two directions that are generated a few at a time."""
    vectors, part = np.random.default_rng(2).standard_normal((2, model.size)), whole(model.size)
    return Basis([vectors], [Row(part, i, 1.0) for i in (0, 1)])


@frameworks
@settled
@given(kind=kinds, seed=st.integers(0, 99), by_target=st.booleans())
def test_all_sums_are_those_of_dense_matrices(framework, kind, seed, by_target):
    model, rng = model_for(framework, kind), np.random.default_rng(seed)
    x, y = data_of(model, kind, framework, seed)
    weights = rng.uniform(0.1, 3, (COUNT, STEPS) if by_target else COUNT) * (rng.random(COUNT) < 0.8).reshape(
        -1, *[1] * by_target
    )
    assume(weights.any())
    cases = examples_of(framework, x, y, weights=weights)
    theta = model.initial(1)
    w = np.broadcast_to(weights.reshape(COUNT, -1), (COUNT, STEPS))
    at = model.linearise(theta, cases.take(np.arange(COUNT)))
    jacobian = np.stack([at.jvp(row).copy() for row in np.eye(model.size)], axis=-1)
    z = model.outputs(theta, cases.take(np.arange(COUNT)))[0]
    if framework in ("network", "table"):  # sorted by step
        jacobian = jacobian.reshape(STEPS, COUNT, OUTPUTS, -1).swapaxes(0, 1)
        z = z.reshape(STEPS, COUNT, OUTPUTS).swapaxes(0, 1)
    z, jacobian, targets = z.reshape(-1, OUTPUTS), jacobian.reshape(-1, OUTPUTS, model.size), y
    targets = targets.reshape(-1) if kind == "cross-entropy" else targets.reshape(-1, OUTPUTS)
    flat, total = w.reshape(-1), w.sum()
    losses = [loss_of_rows(kind, z[None], t[None])[0] for z, t in zip(z, targets, strict=True)]
    _, slopes, curvature = loss_of_rows(kind, z, targets)
    each = np.einsum("n,no,nod->nd", flat, slopes, jacobian)
    dense = np.einsum("n,nod,nop,npe->de", flat, jacobian, curvature, jacobian) / total

    risk = risk_of(model, cases)
    assert risk.scored == pytest.approx(total)
    assert risk.loss(theta) == pytest.approx(flat @ losses / total)
    gradient = each.sum(0) / total
    np.testing.assert_allclose(risk.gradient(theta).vector, gradient, **CLOSE)
    v = rng.standard_normal((2, model.size))
    product = risk.gauss_newton(theta)
    np.testing.assert_allclose([product(row) for row in v], v @ dense, **CLOSE)
    np.testing.assert_allclose(risk.project(theta)(v), v @ dense @ v.T, **CLOSE)

    by_example = each.reshape(COUNT, STEPS, -1).sum(1)
    scores = risk.rows(theta, RowRequest("scores"))
    np.testing.assert_allclose([scores.times(row) for row in np.eye(model.size)], by_example.T, **CLOSE)
    np.testing.assert_allclose(scores.gradient, gradient, **CLOSE)
    rows = risk.rows(theta, RowRequest("residuals"))
    np.testing.assert_allclose(rows.normal() / total, dense, **CLOSE)
    np.testing.assert_allclose(rows.transposed(rows.residuals) / total, gradient, **CLOSE)
    np.testing.assert_allclose(rows.gradient, gradient, **CLOSE)
    assert rows.complete

    # The weight of an example is the mean of the positive weights of its targets.
    often = w.sum(1) / np.maximum(1, (w > 0).sum(1))
    square = (by_example**2 / np.where(often > 0, often, 1)[:, None]).sum(0) * often.sum() / total**2
    squared = risk.squared_gradients(theta)
    np.testing.assert_allclose(squared.squares, square, **CLOSE)
    np.testing.assert_allclose(squared.vector, gradient, **CLOSE)


@frameworks
@settled
@given(
    kind=kinds, seed=st.integers(0, 99), counts=st.lists(st.integers(0, 3), min_size=COUNT, max_size=COUNT)
)
def test_whole_weights_are_repeated_examples(framework, kind, seed, counts):
    assume(any(counts))
    model = model_for(framework, kind)
    x, y = data_of(model, kind, framework, seed)
    often = np.repeat(np.arange(COUNT), counts)
    both = (
        examples_of(framework, x, y, weights=np.array(counts)),
        examples_of(framework, x[often], y[often]),
    )
    theta, v, found = model.initial(1), np.random.default_rng(3).standard_normal((2, model.size)), []
    for cases in both:
        risk = risk_of(model, cases)
        gradient, squared, (again, factors) = (
            risk.gradient(theta),
            risk.squared_gradients(theta),
            risk.factored_gradient(theta),
        )
        product, damped = risk.gauss_newton(theta), np.zeros(1)
        if framework in ("network", "table"):
            damped = risk.structural_gauss_newton(theta, 0.3)(v[0])
        residuals = risk.rows(theta, RowRequest("residuals"))
        found.append(
            [
                np.array([risk.scored, risk.weight, gradient.loss]),
                gradient.vector,
                again.vector,
                squared.vector,
                squared.squares,
                factors,
                np.stack([product(row) for row in v]),
                risk.project(theta)(v),
                damped,
                residuals.normal(),
                risk.rows(theta, RowRequest("scores", 1, 0, factors=True)).factors,
                np.array(metric.means({"size": sizes}, risk.owner, cases, theta)["size"]),
            ]
        )
    for ours, repeated in zip(*found, strict=True):
        np.testing.assert_allclose(ours, repeated, **CLOSE)


def table_model(framework):
    """Return a model of symbols with all kinds of operations on parameters."""
    if framework == "torch":
        import torch
        from torch import nn

        class Module(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.steps = nn.Embedding(4, 3), nn.LSTM(3, 2, batch_first=True)
                self.places, self.norm = nn.Parameter(torch.ones(STEPS, 3)), nn.LayerNorm(2)
                self.shift, self.top = nn.Parameter(torch.zeros(2)), nn.Linear(2, OUTPUTS)

            def forward(self, x):
                return self.top(self.norm(self.steps(self.table(x) + self.places)[0]) + self.shift)

        torch.manual_seed(0)
        return hfmpi.TorchModel(Module().double(), "cross-entropy")
    import jax
    from jax import numpy as jnp

    jax.config.update("jax_enable_x64", True)
    rng, shapes = (
        np.random.default_rng(0),
        {"table": (4, 3), "w": (3, 3), "b": (3,), "scale": (3,), "top": (3, 3)},
    )
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def apply(p, x):
        def step(h, e):
            h = jnp.tanh(e + h @ p["w"] + p["b"])
            return h, h * p["scale"]

        e = p["table"][x].swapaxes(0, 1)
        outputs = jax.lax.scan(step, jnp.zeros(e.shape[1:]), e)[1].swapaxes(0, 1)
        return outputs @ jnp.sin(p["top"])  # which is not a layer

    return hfmpi.JaxModel(apply, params, "cross-entropy")


@pytest.mark.parametrize(
    "framework",
    [
        pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=name))
        for name in ("torch", "jax")
    ],
)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_layers_of_all_kinds_count_repeated_examples(framework, one_by_one):
    model = table_model(framework)
    rng, counts, found = np.random.default_rng(5), np.array([2, 0, 1, 3, 1]), []
    x, y = rng.integers(0, 4, (COUNT, STEPS)), rng.integers(0, OUTPUTS, (COUNT, STEPS))
    often, theta = np.repeat(np.arange(COUNT), counts), model.initial(0)
    model.loss(theta, hfmpi.Examples(x, y).take(np.arange(COUNT)))
    if one_by_one:
        model.replan(sequential=frozenset({"examples"}))
    for cases in hfmpi.Examples(x, y, weights=counts), hfmpi.Examples(x[often], y[often]):
        risk = risk_of(model, cases)
        squared, (gradient, factors) = risk.squared_gradients(theta), risk.factored_gradient(theta)
        found.append([gradient.vector, factors, squared.vector, squared.squares])
    for ours, repeated in zip(*found, strict=True):
        assert np.abs(repeated).max() > 1e-6
        np.testing.assert_allclose(ours, repeated, rtol=1e-8, atol=1e-11)


@frameworks
def test_weights_of_a_sketch_are_roots(framework):
    """S'S of random signs is G on average: each row is multiplied by the root of its weight."""
    model = model_for(framework, "cross-entropy")
    x, y = data_of(model, "cross-entropy", framework, 0)
    weights, theta = np.array([0.5, 2, 0, 1, 3]), model.initial(1)
    one = risk_of(model, examples_of(framework, x, y, weights=weights))
    directions = directions_of(model)
    alone = [examples_of(framework, x[i : i + 1], y[i : i + 1]) for i in range(COUNT)]
    rows = [
        np.sqrt(w) * sketch_row(model, one, theta, i)
        for i, (w, one) in enumerate(zip(weights, alone, strict=True))
    ]
    ours = one.rows(theta, RowRequest("sketch", seed=4))
    np.testing.assert_allclose([ours.times(e) for e in np.eye(model.size)], np.array(rows).T, **CLOSE)
    v = directions.dense()
    projected = one.sketch(theta, directions, RowRequest("sketch", seed=4)).projected
    along = v @ np.array(rows).T
    np.testing.assert_allclose(projected, along @ along.T / (STEPS * weights.sum()), **CLOSE)


def sketch_row(model, cases, theta, index):
    """Return the row (D,) of a sketch of a single example, with the signs for its index."""
    at = model.linearise(theta, cases.take(np.arange(1)))
    out = np.zeros((1, 1, model.size))
    at.sketch(signs(4, np.array([index]), at.residual_count()).astype(float), 1, out)
    return out[0, 0]


def test_weights_of_one_are_no_weights():
    """Weights of 1 change nothing, bit for bit; without weights a mask counts integers."""
    model = model_for("network", "cross-entropy")
    x, y = data_of(model, "cross-entropy", "network", 0)
    theta, mask, found = model.initial(1), np.arange(COUNT * STEPS).reshape(COUNT, STEPS) % 4 > 0, []
    for more in {"mask": mask}, {"mask": mask, "weights": np.ones(COUNT)}, {"weights": mask.astype(float)}:
        risk = risk_of(model, hfmpi.Arrays(x, y, **more))
        assert risk.scored == mask.sum()
        squared, (gradient, factors) = risk.squared_gradients(theta), risk.factored_gradient(theta)
        found.append([gradient.vector, factors, squared.squares, risk.gauss_newton(theta)(theta)])
    for ours in zip(*found, strict=True):
        assert all(np.array_equal(ours[0], other) for other in ours[1:])


def test_weights_of_any_scale_are_the_same():
    model = model_for("network", "squares")
    x, y = data_of(model, "squares", "network", 0)
    theta, weights, found = model.initial(1), np.array([0, 1e-3, 0.5, 2, 1]), []
    for scale in 1, 1e-4, 2e5:
        risk = risk_of(model, hfmpi.Arrays(x, y, weights=weights * scale))
        squared, (gradient, factors) = risk.squared_gradients(theta), risk.factored_gradient(theta)
        found.append([risk.loss(theta), gradient.vector, squared.squares, factors])
    for ours in zip(*found, strict=True):
        np.testing.assert_allclose(ours[1], ours[0], **CLOSE)
        np.testing.assert_allclose(ours[2], ours[0], **CLOSE)


def test_what_has_weight_zero_is_not_read():
    x, y, weights = np.zeros((4, 2)), np.array([0, 1, -100, 1]), np.array([1.0, 2, 0, 0.5])
    cases = hfmpi.Examples(x, y, weights=weights)
    assert cases.scored(np.arange(4)) == 3.5
    batch = cases.take(np.array([2, 1]))
    assert (batch.mask == [0, 2]).all()
    sequences = hfmpi.Arrays(np.zeros((2, 3), int), np.array([[0, 1, 0], [-1, -1, -1]]), weights=[0.5, 0])
    assert sequences.scored(np.arange(2)) == 1.5
    both = hfmpi.Examples(x, np.ma.masked_array(y, [1, 0, 0, 0]), [1, 1, 0, 1], [2, 3, 4, 5])
    assert (both.mask == [0, 3, 0, 5]).all()


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1, -1, 1, 1], "weights must be finite numbers, 0 or more, not -1 as in example 1"),
        ([1, 1, 1, np.inf], "weights must be finite numbers, 0 or more, not inf as in example 3"),
        ([1, 1, 1], r"weights have shape \(3,\), not \(4,\)"),
        (["a"] * 4, "weights must be numbers"),
        ([1e-21] * 4, "the largest of weights is 1e-21, which is too far from 1"),
    ],
)
def test_wrong_weights_are_one_sentence(weights, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        hfmpi.Examples(np.zeros((4, 2)), np.zeros(4, int), weights=weights)
    assert "\n" not in str(caught.value)


def test_weights_of_classes():
    cases = hfmpi.Examples(np.zeros((4, 2)), np.array([[0, 1], [1, 2], [2, 2], [0, 0]]), weights=[1, 2, 1, 0])
    assert (cases.with_class_weights([1, 10, 0.5]).mask == [[1, 10], [20, 1], [0.5, 0.5], [0, 0]]).all()
    ignored = hfmpi.Examples(np.zeros((3, 2)), np.array([0, -100, 1])).with_class_weights([2.0, 3.0])
    assert (ignored.masked(ignored.targets != -100).mask == [2, 0, 3]).all()
    with pytest.raises(UserError, match="class weights must be finite numbers, 0 or more"):
        cases.with_class_weights([1, -1, 1])
    for inputs in cases, cases.masked(cases.targets > 0):
        with pytest.raises(
            UserError, match="have 2 classes, but example 1 has target 2: pass one weight for"
        ):
            inputs.with_class_weights([1, 10])
    masked = cases.masked(cases.targets < 2).with_class_weights([1, 10])
    assert (masked.mask == [[1, 10], [20, 0], [0, 0], [0, 0]]).all()
    with pytest.raises(UserError, match="class weights require targets that are whole numbers"):
        hfmpi.Examples(np.zeros((3, 2)), np.zeros(3)).with_class_weights([1, 1])


@pytest.mark.parametrize("backend", ["numba", "cupy"])
@pytest.mark.parametrize("framework", ["network", "table"])
def test_all_backends_weigh_alike(framework, backend):
    x, y = data_of(None, "cross-entropy", framework, 0)
    cases, found = hfmpi.Arrays(x, y, weights=np.array([0.5, 2, 0, 1, 3])), []
    for name in "numpy", backend:
        parts = {"cell": "mlstm", "inputs": 4 if framework == "table" else INPUTS, "outputs": OUTPUTS}
        model = hfmpi.Network(backend=create(name, dtype="float64"), hidden=2, **parts)
        to_device, to_host = model.backend.to_device, model.backend.to_host
        theta, risk = to_device(model.initial(1)), risk_of(model, cases)
        squared, (gradient, factors) = risk.squared_gradients(theta), risk.factored_gradient(theta)
        rows = risk.rows(theta, RowRequest("residuals"))
        vectors = gradient.vector, factors, squared.vector, squared.squares, risk.gauss_newton(theta)(theta)
        found.append([*map(to_host, vectors), rows.normal(), rows.residuals])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def check_weighted_ranks(framework, comm):
    """Check that ranks with unequal weights compute the same as one, and use the same metric."""
    model = model_for(framework, "cross-entropy")
    x, y = data_of(model, "cross-entropy", framework, 0)
    for weights in np.array([0.2, 3, 1, 0, 2]), np.random.default_rng(0).uniform(0, 2, (COUNT, STEPS)):
        cases, theta = examples_of(framework, x, y, weights=weights), model.initial(1)
        check_ranks(model, cases, comm)
        means = [
            metric.means({"size": sizes}, hfmpi.DataParallel(model, each), cases, theta)["size"]
            for each in (Communicator(), MPICommunicator(comm))
        ]
        assert means[0] == pytest.approx(means[1], rel=1e-12)


@pytest.mark.mpi(ranks=[2, 3])
def test_ranks_with_unequal_weights(comm):
    check_weighted_ranks("network", comm)
    check_weighted_ranks("table", comm)
