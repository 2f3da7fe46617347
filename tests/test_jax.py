"""A JAX function as a model: its derivatives compared with dense ones, and refused functions."""

import copy
import functools
import logging
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from dense import (
    CASES,
    INPUTS,
    OUTPUTS,
    STEPS,
    check,
    check_optimizers,
    check_page,
    check_ranks,
    check_refused,
    factors_of_cases,
    numbers,
    run_page,
    symbols,
)

import hfmpi
from hfmpi.errors import UserError
from hfmpi.models.base import Blocks, KroneckerFactors, Model, Projection, has_squared_gradients
from hfmpi.models.batch import ScoredOutputs, check_batch
from hfmpi.models.losses import SquaredError
from hfmpi.optim import layout
from hfmpi.optim.layout import split_factors
from hfmpi.parallel.communicator import Communicator

jax = pytest.importorskip("jax")
jnp = jax.numpy


@pytest.fixture(autouse=True)
def _double():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def mlp(params, x):
    return jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) @ params["top"]


def mlp_params():
    return {"a": {"w": numbers(INPUTS, 4), "b": numbers(4)}, "top": numbers(4, OUTPUTS)}


def tagger(params, x):
    """Tag each step of x (B, L, I) with a recurrent network, scanned over time."""

    def step(h, x):
        h = jnp.tanh(x @ params["x"] + h @ params["h"])
        return h, h

    first = jnp.zeros((x.shape[0], 3), x.dtype)
    hidden = jax.lax.scan(step, first, x.swapaxes(0, 1))[1].swapaxes(0, 1)
    return hidden @ params["top"]


def attention(params, x):
    """Apply attention to symbols x (B, L); params are a list that ends with an integer."""
    table, query, key, shift = params
    z = table[(x + shift) % OUTPUTS]
    weights = jax.nn.softmax((z @ query) @ (z @ key).swapaxes(1, 2))
    return (weights @ z) @ table.T


def two(params, x, y):
    return jax.nn.relu(x @ params) * y


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, u: (3 * x**2 * u,))


def reverse(params, x):
    """Return a function that only has a rule for the reverse pass."""
    return cube(x @ params)


def setting(name):
    """Return a function, its params, a loss, examples and the inputs of its calls."""
    x, sequences = numbers(CASES, INPUTS), numbers(CASES, STEPS, INPUTS)
    if name == "mlp":
        return mlp, mlp_params(), "squares", hfmpi.Examples(x, numbers(CASES, OUTPUTS)), [x]
    if name == "scan":
        params = {"x": numbers(INPUTS, 3), "h": numbers(3, 3), "top": numbers(3, OUTPUTS)}
        return tagger, params, "cross-entropy", hfmpi.Arrays(sequences, symbols(CASES, STEPS)), [sequences]
    if name == "attention":
        x = symbols(CASES, STEPS)
        params = [numbers(OUTPUTS, 4), numbers(4, 2), numbers(4, 2, seed=9), np.array(1)]
        return attention, params, "cross-entropy", hfmpi.Arrays(x, symbols(CASES, STEPS)), [x]
    if name == "two":
        y, hits = numbers(CASES, OUTPUTS), (numbers(CASES, OUTPUTS) > 0) * 1.0
        return two, numbers(INPUTS, OUTPUTS), "bernoulli", hfmpi.Examples((x, y), hits), [x, y]
    return reverse, numbers(INPUTS, OUTPUTS), "squares", hfmpi.Examples(x, numbers(CASES, OUTPUTS)), [x]


@pytest.mark.parametrize("name", ["mlp", "scan", "attention", "two", "reverse"])
def test_a_function_has_the_derivatives_of_its_dense_jacobian(name, caplog):
    apply, params, kind, cases, inputs = setting(name)
    model = hfmpi.JaxModel(apply, params, kind)
    assert isinstance(model, Model)
    assert isinstance(model, Blocks)
    assert isinstance(model, KroneckerFactors)
    assert has_squared_gradients(model)
    theta = model.initial(0)

    def rows(theta):
        return apply(model.params(theta), *inputs).reshape(-1, OUTPUTS)

    dense = jax.jit((jax.jacrev if name == "reverse" else jax.jacfwd)(rows))(theta)
    at = check(model, kind, cases, theta, np.asarray(rows(theta)), np.asarray(dense), None, name == "mlp")
    assert isinstance(at, Projection)
    assert not caplog.records


def test_every_optimizer_takes_a_function():
    params = jax.tree_util.tree_map(lambda a: a.astype(np.float32), mlp_params())
    check_optimizers(hfmpi.JaxModel(mlp, params, "squares"), setting("mlp")[3])


def test_the_page_solves_a_differential_equation(tmp_path):
    names = run_page("u' = -2 u", tmp_path)
    assert names["result"].history[-1]["loss"] < 1e-9


def test_the_page_works(tmp_path):
    names = check_page('params["top"]', tmp_path)
    assert np.array_equal(np.ravel(names["params"]["top"]), names["result"].theta[-20:])


@pytest.mark.parametrize("library", ["equinox", "flax"])
def test_the_page_works_with_modules(library, tmp_path):
    pytest.importorskip(library)
    jax.config.update("jax_enable_x64", False)
    names = check_page({"equinox": "import equinox", "flax": "from flax import nnx"}[library], tmp_path)
    assert type(names["module"]) is type(names["model"].params(names["model"].initial(0)))


def test_params_are_those_of_theta():
    params = setting("attention")[1]
    model = hfmpi.JaxModel(attention, params, "cross-entropy")
    back = model.params(model.initial(0))
    assert all(np.array_equal(a, b) for a, b in zip(back, params, strict=True))
    assert [block[:4] for block in model.blocks] == [
        ("[0]", 0, OUTPUTS, 4),
        ("[1]", 12, 4, 2),
        ("[2]", 20, 4, 2),
    ]
    with pytest.raises(UserError, match="theta must be a vector of 28 numbers, not of shape"):
        model.params(np.ones(3))


def test_passes_are_compiled_once_for_a_shape():
    traced = []

    def counted(params, x):
        traced.append(x.shape)
        return mlp(params, x)

    model, cases = hfmpi.JaxModel(counted, mlp_params(), "squares"), setting("mlp")[3]
    risk = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(CASES))
    theta = model.initial(0)
    risk.gauss_newton(theta)(theta)
    before = len(traced)
    for _ in range(2):
        theta = theta + 1
        product = risk.gauss_newton(theta)
        product(theta)
    assert len(traced) == before


class Twice(SquaredError):
    """A user-defined loss that only computes with NumPy."""

    root = residual = None

    def gradient(self, backend, cache, targets, scale, out):
        super().gradient(backend, cache, targets, 2 * scale, out)

    def value(self, backend, outputs, targets):
        return 2 * super().value(backend, outputs, targets)

    def hessian(self, backend, cache, u, scale):
        super().hessian(backend, cache, u, 2 * scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["mlp", "scan", "two", "reverse", "own loss"])
def test_a_gradient_alone_is_one_compiled_function(name, masked):
    apply, params, kind, cases, _ = setting("mlp" if name == "own loss" else name)
    model = hfmpi.JaxModel(apply, params, Twice() if name == "own loss" else kind)
    theta = model.initial(0)
    if masked:
        shape = np.shape(cases.targets)[: 2 if name == "scan" else 1]
        cases = hfmpi.Examples(cases.inputs, cases.targets, np.arange(np.prod(shape)).reshape(shape) % 2)
    batch = cases.take(np.arange(CASES))
    at, expected, found = model.linearise(theta, batch), np.ones(model.size), np.ones(model.size)
    at.gradient(0.5, expected)
    calls, linear = [], model.linear
    model.linear = lambda *args, **options: calls.append(args) or linear(*args, **options)
    alone = model.linearise_gradient(theta, batch)
    alone.gradient(0.5, found)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert alone.loss == at.loss
    assert len(calls) == (name == "own loss")
    products = np.zeros((2, model.size))
    for each, out in zip((alone, at), products, strict=True):  # other passes can follow
        each.gauss_newton(theta, 1.0, out)
    np.testing.assert_allclose(*products, rtol=1e-12, atol=1e-14)
    risk = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(CASES))
    del calls[:]
    gradient = risk.gradient(theta)
    assert len(calls) == (name == "own loss")
    wanted = np.zeros(model.size)
    at.gradient(1 / risk.scored, wanted)
    np.testing.assert_allclose(gradient.vector, wanted, rtol=1e-12, atol=1e-14)


def test_a_callback_that_cannot_be_batched_is_called_case_by_case(caplog):
    @jax.custom_vjp
    def double(x):
        return jax.pure_callback(lambda x: 2 * np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def back(_, u):
        return (double(u),)

    double.defvjp(lambda x: (double(x), None), back)
    x = numbers(CASES, INPUTS)
    cases = hfmpi.Examples(x, numbers(CASES, OUTPUTS))
    squares, gradients = [], []
    for apply in (lambda w, x: double(x @ w), lambda w, x: 2 * (x @ w)):
        model = hfmpi.JaxModel(apply, numbers(INPUTS, OUTPUTS), "squares")
        risk = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(CASES))
        squares.append(risk.squared_gradients(model.initial(0)).squares)
        gradients.append(np.zeros((2, model.size)))
        at = model.linearise(model.initial(0), cases.take(np.arange(CASES)))
        for _ in range(2):
            at.vjp(numbers(2 * CASES, OUTPUTS), gradients[-1])
    assert np.allclose(*squares)
    assert np.allclose(*gradients)
    for what in "examples", "directions":
        assert caplog.text.count(f"{what} are processed one at a time") == 1


# Kronecker factors -------------------------------------------------------------------------------


class Taps:
    """Adds zeros to the results of layers, and records their operands; without zeros it does nothing."""

    def __init__(self, zeros=None):
        self.zeros, self.met = zeros, []

    def __call__(self, name, met, result):
        self.met.append((name, met, result.shape))
        return result if self.zeros is None else result + self.zeros[len(self.met) - 1]

    def loop(self, step, state, each):
        """Compute `jax.lax.scan`; with zeros in a Python loop, so that each step has separate zeros."""
        if self.zeros is None and not self.counting:
            return jax.lax.scan(step, state, each)
        found = []
        for x in each:
            state, y = step(state, x)
            found.append(y)
        return state, jnp.stack(found)

    counting = False


def ones(z, width=1):
    return jnp.ones((*z.shape[:-1], width), z.dtype)


def layers(params, x, tap):
    h = tap("w", x, x @ params["w"])
    h = jnp.tanh(tap("b", ones(h), h + params["b"]))
    h = jax.nn.relu(tap("t", h, jnp.dot(h, params["t"].T)) + 0.5)
    return tap("u", h, jax.lax.dot_general(params["u"], h, (((0,), (2,)), ((), ()))).transpose(1, 2, 0))


def recurrent(params, x, tap):
    @jax.checkpoint
    def gates(x, h):
        z = tap("x", x, x @ params["x"]) + tap("h", h, params["h"] @ h[..., None])[..., 0]
        return tap("b", ones(z), params["b"] + z)

    def step(h, x):
        h = jnp.tanh(gates(x, h) if tap.zeros is None and not tap.counting else gates.__wrapped__(x, h))
        return h, h

    first = jnp.zeros((x.shape[0], 3), x.dtype)
    hidden = tap.loop(step, first, x.swapaxes(0, 1))[1].swapaxes(0, 1)
    return tap("top", hidden, hidden @ params["top"])


def heads(params, x, tap):
    x = (10 * jnp.abs(x[..., 0])).astype(int) % 4
    z = tap("table", x, params["table"][x])
    mean, deviation = z.mean(-1, keepdims=True), z.std(-1, keepdims=True)
    whitened = (z - mean) / (deviation + 0.1)
    z = tap("scale", whitened, params["scale"] * whitened)
    z = tap("shift", ones(z), z + params["shift"])
    query = tap("query", z, jnp.einsum("btd,dhk->bthk", z, params["query"]))
    z = jnp.einsum("bthk,bshk->btsh", query, query).sum(2)[..., None] * query
    z = z.reshape(*z.shape[:2], -1)
    return tap("out", z, jnp.einsum("btm,mo->bto", z, params["out"]))


FORMS = {
    "layers": (layers, {
        "b": numbers(4), "t": numbers(5, 4), "u": numbers(5, OUTPUTS), "w": numbers(INPUTS, 4)
    }),
    "heads": (heads, {
        "out": numbers(6, OUTPUTS), "query": numbers(4, 2, 3), "scale": 1 + numbers(4) / 4,
        "shift": numbers(4), "table": numbers(4, 4),
    }),
}  # fmt: skip


@pytest.mark.parametrize("longest", [100, 3])
@pytest.mark.parametrize("name", FORMS)
def test_factors_of_layers_are_means_over_their_products(name, longest, monkeypatch):
    monkeypatch.setattr(layout, "LONGEST_SIDE", longest)
    apply, params = FORMS[name]
    x, y = numbers(CASES, STEPS, INPUTS), symbols(CASES, STEPS)
    check_layers(apply, params, x, y)


def check_layers(apply, params, x, y):
    """Check the factors of a function with taps by the recorded operands and their derivatives."""
    model = hfmpi.JaxModel(lambda params, x: apply(params, x, Taps()), params, "cross-entropy")
    risk = hfmpi.DataParallel(model, Communicator(), micro_batch=2).on(hfmpi.Arrays(x, y), np.arange(len(x)))
    gradient, factors = risk.factored_gradient(model.initial(0))
    counting = Taps()
    counting.counting = True
    apply(params, x, counting)

    def loss(params, zeros, x, y):
        z = apply(params, x, Taps(zeros)).reshape(-1, OUTPUTS)
        return -jax.nn.log_softmax(z)[np.arange(len(z)), y.reshape(-1)].sum() / symbols(CASES, STEPS).size

    zeros = [jnp.zeros(shape) for *_, shape in counting.met]
    own, backs = jax.grad(loss, (0, 1))(params, zeros, x, y)
    own = np.concatenate([np.ravel(own[key]) for key in sorted(own)])
    np.testing.assert_allclose(gradient.vector, own, rtol=1e-7, atol=1e-10)
    for block, *found in split_factors(model.blocks, factors):
        key = block.name.strip("[]'")
        uses = [(met, back) for (k, met, _), back in zip(counting.met, backs, strict=True) if k == key]
        assert uses
        a = b = count = 0
        for met, back in uses:
            met, back = np.asarray(met), np.asarray(back)
            if key == "scale":
                met, back = np.asarray(ones(met)), back * met
            if key == "table":
                met = np.eye(block.rows)[met]
            z, u = met.reshape(-1, met.shape[-1]), back.reshape(-1, back.size * met.shape[-1] // met.size)
            a, b, count = a + y.size * u.T @ u, b + z.T @ z, count + len(z)
        b = b / count
        flipped = key not in ("t", "h")  # the rows are inputs
        cut = [
            m if len(m) <= layout.LONGEST_SIDE else np.diag(np.diag(m))
            for m in ((b, a) if flipped else (a, b))
        ]
        found = [m if m.ndim == 2 else np.diag(m) for m in found]
        np.testing.assert_allclose(np.kron(*found), np.kron(*cut), rtol=1e-6, atol=1e-12, err_msg=key)


def test_factors_of_layers_in_a_loop_are_means_over_its_steps():
    params = {"b": numbers(3), "h": numbers(3, 3), "top": numbers(3, OUTPUTS), "x": numbers(INPUTS, 3)}
    check_layers(recurrent, params, numbers(CASES, STEPS, INPUTS), symbols(CASES, STEPS))


def test_factors_of_all_else_are_those_of_the_gradients_of_cases():
    def apply(params, x):
        w = params["g"] * params["v"] / jnp.linalg.norm(params["v"])
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ w, params["deep"])[0]
        square = params["twice"].T @ params["twice"]
        x = jax.lax.scan(lambda last, a: (a, 2 * a), x[0], x)[1]  # without parameters; its state is dropped
        return x @ params["known"] + cube(h @ params["out"]) @ square + params["one"]

    params = {
        "deep": numbers(2, 4, 4), "g": numbers(4), "known": numbers(INPUTS, OUTPUTS), "one": numbers(1)[0],
        "out": numbers(4, OUTPUTS), "twice": numbers(2, OUTPUTS), "unused": numbers(2, 2),
        "v": numbers(INPUTS, 4),
    }  # fmt: skip
    x, y = numbers(CASES, INPUTS), numbers(CASES, OUTPUTS)
    model = hfmpi.JaxModel(apply, params, "squares")
    risk = hfmpi.DataParallel(model, Communicator()).on(hfmpi.Examples(x, y), np.arange(CASES))
    theta = model.initial(0)

    def loss(theta, x, y):
        return jnp.square(apply(model.params(theta), x[None])[0] - y).sum() / 2

    each = np.stack([jax.grad(loss)(theta, a, b) for a, b in zip(x, y, strict=True)])
    gradient, factors = risk.factored_gradient(theta)
    np.testing.assert_allclose(gradient.vector, each.mean(axis=0), rtol=1e-7, atol=1e-10)
    expected = split_factors(model.blocks, factors_of_cases(model.blocks, each, CASES))
    layers = model.layers((x,), ScoredOutputs((CASES,), OUTPUTS))
    names = [block.name.strip("[]'") for block in model.blocks]
    assert {names[i] for i in layers.unassigned} == {"deep", "g", "one", "twice", "v"}
    for name, (_, *ours), (_, *theirs) in zip(
        names, split_factors(model.blocks, factors), expected, strict=True
    ):
        for own, matrix in zip(ours, theirs, strict=True):
            if name not in ("known", "out", "unused"):
                np.testing.assert_allclose(own, matrix, rtol=1e-7, atol=1e-10, err_msg=name)
            assert own.any() == (name != "unused")


@pytest.mark.parametrize("count", [1, CASES])
def test_a_parameter_may_be_the_output(count):
    x, y = numbers(count, INPUTS), numbers(count, OUTPUTS)
    model = hfmpi.JaxModel(lambda b, x: jnp.zeros((len(x), 1)) + b, numbers(OUTPUTS), "squares")
    bare = hfmpi.JaxModel(lambda b, x: jnp.broadcast_to(b, (len(x), OUTPUTS)), numbers(OUTPUTS), "squares")
    found = []
    for one in model, bare:
        risk = hfmpi.DataParallel(one, Communicator()).on(hfmpi.Examples(x, y), np.arange(count))
        found.append(
            [
                np.kron(*both)
                for _, *both in split_factors(one.blocks, risk.factored_gradient(one.initial(0))[1])
            ]
        )
    np.testing.assert_allclose(*found)


def test_where_jax_does_not_tell_the_layers_factors_are_those_of_cases(monkeypatch, caplog):
    def broken(*_):
        raise AttributeError("no such thing")

    monkeypatch.setattr("hfmpi.frameworks.jax.Layers", broken)
    apply, params, kind, cases, inputs = setting("mlp")
    model = hfmpi.JaxModel(apply, params, kind)
    theta = model.initial(0)

    def rows(theta):
        return apply(model.params(theta), *inputs).reshape(-1, OUTPUTS)

    jacobian = np.asarray(jax.jacfwd(rows)(theta))
    check(model, kind, cases, theta, np.asarray(rows(theta)), jacobian, by_cases=True)
    assert "layers of the function cannot be determined (no such thing)" in caplog.text


# What is refused ---------------------------------------------------------------------------------

ROWS = numbers(CASES, INPUTS)
WEIGHTS = numbers(INPUTS, OUTPUTS)
GOOD = hfmpi.Examples(ROWS, symbols(CASES))


def linear(params, x):
    return x @ params


@pytest.mark.parametrize(("apply", "params", "words"), [
    (None, WEIGHTS, r"apply must be a function \(params, x\) -> outputs, not None"),
    (linear, {"n": np.arange(3)}, "params contain no array of real numbers"),
    (linear, {}, "params contain no array of real numbers"),
    (linear, [WEIGHTS, WEIGHTS.astype(np.float32)], "all be float64, not float32, float64"),
    (lambda w, x: linear(w, x - x.mean(axis=0)), WEIGHTS, "depend on the other examples of its batch"),
    (lambda w, x: (linear(w, x), x), WEIGHTS, "must return one array of outputs, not tuple: wrap it"),
    (linear, WEIGHTS * np.inf, "the loss is not finite at the start"),
    (lambda w, x: linear(w, x)[None], WEIGHTS, r"outputs of shape \(1, 4, 3\) do not fit"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_a_sentence(apply, params, words):
    check_refused(lambda: hfmpi.JaxModel(apply, params, "cross-entropy"), GOOD, words)


def test_double_precision_has_to_be_switched_on():
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(UserError, match="JAX computes in float32"):
        hfmpi.JaxModel(linear, WEIGHTS, "squares")
    assert hfmpi.JaxModel(linear, WEIGHTS.astype(np.float32), "squares").backend.dtype == np.float32


# Which leaves are trained --------------------------------------------------------------------------


def train(model, cases=None):
    """Train for two steps; return the params, and the notes except those on the sizes of batches."""
    notes, handler = [], logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())
    logging.getLogger("hfmpi.frameworks").addHandler(handler)
    try:
        cases = cases or hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS))
        model.replan(checked=None)  # as in a new model
        result = hfmpi.train(model, cases, optimizer="bhf-short", max_steps=2, quiet=True)
    finally:
        logging.getLogger("hfmpi.frameworks").removeHandler(handler)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    return model.params(result.theta), notes


def test_what_is_not_an_array_of_real_numbers_stays_as_it_is():
    def apply(params, x):
        assert params["name"] == "tanh"
        assert type(params["scale"]) is float
        z = params["act"](x @ params["w"]) * params["scale"] + params["table"][params["which"]]
        return z * jax.random.normal(params["key"], (OUTPUTS,)) * params["one"]

    params = {
        "act": jnp.tanh, "empty": np.zeros(0), "flags": np.array([True, False]), "key": jax.random.key(1),
        "name": "tanh", "none": None, "object": object(), "one": np.float64(2), "scale": 2.0,
        "table": np.arange(4), "w": WEIGHTS, "which": 3,
    }  # fmt: skip
    model = hfmpi.JaxModel(apply, params, "squares")
    assert [block.name for block in model.blocks] == ["['one']", "['w']"]
    after, notes = train(model)
    assert notes[1:] == [
        f"Note: theta consists of the {1 + WEIGHTS.size} numbers in params['one'], params['w']; not trained: "
        "params['scale'] (only NumPy and JAX arrays can be trained)."
    ]
    for name in set(params) - {"one", "w", "flags", "table", "empty"}:
        assert after[name] is params[name], name
    for name in "flags", "table", "empty":
        assert type(after[name]) is np.ndarray
        assert np.array_equal(after[name], params[name])


def test_arrays_of_the_caller_are_never_written_to():
    def apply(params, x):
        params["count"] += 1
        return x @ params["w"]

    count = np.zeros(2, int)
    params = {"count": count, "w": WEIGHTS}
    check_refused(
        lambda: hfmpi.JaxModel(apply, params, "cross-entropy"), GOOD, "fails on inputs .* is read-only"
    )
    assert not count.any()


def test_arrays_of_the_caller_may_change_after_the_model_is_made():
    params = {"count": np.zeros(2, int), "w": WEIGHTS.copy()}
    model = hfmpi.JaxModel(lambda p, x: x @ p["w"] + p["count"].sum(), params, "squares")
    batch = hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS)).take(np.arange(CASES))
    for array in params.values():
        array += 1
    np.testing.assert_allclose(model.outputs(model.initial(0), batch)[0], ROWS @ WEIGHTS)


VARIABLES = {
    "batch_stats": {"mean": numbers(INPUTS), "var": 1 + numbers(INPUTS) ** 2},
    "params": {"b": numbers(OUTPUTS), "w": WEIGHTS},
}


def normed(variables, x):
    statistics, params = variables["batch_stats"], variables["params"]
    return (x - statistics["mean"]) / jnp.sqrt(statistics["var"]) @ params["w"] + params["b"]


def test_running_statistics_are_not_trained():
    collections = {**VARIABLES, "head": {"scale": np.ones(OUTPUTS)}}
    nested = {"low": VARIABLES, "scale": np.ones(OUTPUTS)}
    for apply, params, names, frozen in (
        (normed, VARIABLES, ["['params']['b']", "['params']['w']"], 2),
        (lambda p, x: normed(p, x) * p["head"]["scale"], collections,
         ["['params']['b']", "['params']['w']"], 3),
        (lambda p, x: normed(p["low"], x) * p["scale"], nested,
         ["['low']['params']['b']", "['low']['params']['w']", "['scale']"], 2),
    ):  # fmt: skip
        model = hfmpi.JaxModel(apply, params, "squares")
        assert [block.name for block in model.blocks] == names
        after, (note,) = train(model)
        assert note.count("params[") == len(names) + frozen, note
        both = (tree.get("low", tree) for tree in (after, params))
        for ours, theirs in zip(
            *(jax.tree_util.tree_leaves(tree["batch_stats"]) for tree in both), strict=True
        ):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("trained", [
    lambda path, array: "batch_stats" not in path and array.ndim == 2,
    lambda path, array: np.bool_(path == "['params']['w']"),
    {"batch_stats": False, "params": {"b": False, "w": True}},
    {"batch_stats": {"mean": False, "var": False}, "params": {"b": False, "w": np.True_}},
])  # fmt: skip
def test_the_user_chooses_what_is_trained(trained):
    model = hfmpi.JaxModel(normed, VARIABLES, "squares", trained=trained)
    assert [block.name for block in model.blocks] == ["['params']['w']"]
    theta = model.initial(0)
    cases = hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS))

    def rows(theta):
        w = theta.reshape(INPUTS, OUTPUTS)
        return normed({**VARIABLES, "params": {**VARIABLES["params"], "w": w}}, ROWS)

    check(model, "squares", cases, theta, np.asarray(rows(theta)), np.asarray(jax.jacfwd(rows)(theta)))
    after, (note,) = train(model)
    assert (
        "not trained: params['batch_stats']['mean'], params['batch_stats']['var'], params['params']['b']"
        in note
    )
    assert np.array_equal(after["params"]["b"], VARIABLES["params"]["b"])


def test_statistics_that_are_trained_are_named():
    _, (note,) = train(hfmpi.JaxModel(normed, VARIABLES, "squares", trained=lambda path, array: True))
    assert "look like running statistics: params['batch_stats']['mean'], params['batch_stats']['var']" in note


def test_frozen_arrays_may_be_of_any_type():
    params = {"c": np.ones(OUTPUTS, complex), "low": jnp.ones(OUTPUTS, jnp.bfloat16), "w": WEIGHTS}
    choice = {"c": False, "low": False, "w": True}
    model = hfmpi.JaxModel(lambda p, x: x @ p["w"] * p["low"] + p["c"].real, params, "squares", choice)
    after, _ = train(model)
    assert after["low"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("params", "trained", "words"), [
    ({"w": WEIGHTS, "c": np.ones(2, complex)}, None, r"params\['c'\] is complex128, and complex numbers"),
    ({"w": WEIGHTS, "h": jnp.ones(2, jnp.bfloat16)}, None, r"params\['h'\] is bfloat16, but params must be"),
    ({"w": WEIGHTS, "h": np.ones(2, np.float16)}, None, r"params\['h'\] is float16, but params must be"),
    ({"w": WEIGHTS, "s": np.float32(2)}, None, r"float64: params\['s'\] is float32, params\['w'\] is"),
    ({"w": 2.0}, None, r"no array of real numbers to train: params\['w'\] must be arrays"),
    ({1: WEIGHTS, "a": WEIGHTS}, None, "params must be a JAX pytree"),
    ({"w": WEIGHTS}, False, "params contain no array of real numbers to train"),
    ({"w": WEIGHTS}, "w", r"trained must be a function \(path, array\) -> bool, .* not 'w' for"),
    ({"w": WEIGHTS}, {"w": 1}, r"or a tree of bools .* not 1 for params\['w'\]"),
    ({"w": WEIGHTS}, {"b": True}, "tree of bools with the structure of params or of their upper levels: "),
    ({"w": WEIGHTS}, {"w": [True, True]}, "the structure of params or of their upper levels: "),
    ({"w": WEIGHTS}, lambda array: True, r"for params\['w'\] it raised TypeError: "),
    ({"w": WEIGHTS}, lambda path, array: array, r"not ndarray for params\['w'\]"),
])  # fmt: skip
def test_params_and_choices_that_do_not_fit_are_refused(params, trained, words):
    with pytest.raises(UserError, match=words) as caught:
        hfmpi.JaxModel(lambda p, x: x @ p["w"], params, "squares", trained)
    assert "\n" not in str(caught.value)


def test_trees_that_only_look_like_variables_of_flax_are_trained():
    params = {"params": {"w": WEIGHTS}, "scale": numbers(OUTPUTS)}
    model = hfmpi.JaxModel(lambda p, x: x @ p["params"]["w"] * p["scale"], params, "squares")
    assert model.size == WEIGHTS.size + OUTPUTS
    assert not train(model)[1]


def test_parts_with_one_key_are_told_apart():
    key = jax.tree_util.DictKey("w")

    class Pair:
        def __init__(self, *both):
            self.both = both

    jax.tree_util.register_pytree_with_keys(
        Pair, lambda pair: ([(key, part) for part in pair.both], None), lambda _, both: Pair(*both)
    )
    pair = Pair(WEIGHTS, numbers(OUTPUTS))
    model = hfmpi.JaxModel(lambda pair, x: x @ pair.both[0] + pair.both[1], pair, "squares")
    assert [block.name for block in model.blocks] == ["['w']", "['w']<1>"]
    train(model)


def test_params_without_effect_are_named():
    def apply(params, x):
        return x @ params["w"]

    model = hfmpi.JaxModel(apply, {"v": WEIGHTS, "w": WEIGHTS}, "squares")
    assert train(model)[1] == ["Note: the outputs do not depend on params['v']."]


# Modules ---------------------------------------------------------------------------------------------


def softsign(x):
    return x / (1 + abs(x))


@jax.tree_util.register_pytree_with_keys_class
class Layer:
    """A module that is a pytree, as in equinox: its function is a leaf."""

    def __init__(self, w, b, function):
        self.w, self.b, self.function = w, b, function

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key("w"), self.w), (key("b"), self.b), (key("function"), self.function)], None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)

    def __call__(self, x):
        return self.function(x @ self.w + self.b)


def each(module, x):
    """Call an equinox module, which takes one example."""
    return jax.vmap(module)(x)


def all_of(module, x):
    return module(x)


def check_module(apply, module, blocks, frozen=(), pickled=True):
    """Check the derivatives of a model of a module and its training; return the trained module."""
    model = hfmpi.JaxModel(apply, module, "squares")
    assert [block.name for block in model.blocks] == blocks
    x, y = numbers(CASES, INPUTS), numbers(CASES, OUTPUTS)
    cases, theta = hfmpi.Examples(x, y), model.initial(0)

    def rows(theta):
        return apply(model.params(theta), x).reshape(-1, OUTPUTS)

    np.testing.assert_allclose(rows(theta), np.asarray(apply(module, x)).reshape(-1, OUTPUTS))
    check(model, "squares", cases, theta, np.asarray(rows(theta)), np.asarray(jax.jacfwd(rows)(theta)))
    after, notes = train(model, cases)
    assert len(notes) == bool(frozen)
    for name in frozen:
        assert f"params{name}" in notes[0].partition("; not trained: ")[2]
    for again in (copy.deepcopy(model), *([pickle.loads(pickle.dumps(model))] if pickled else [])):
        np.testing.assert_array_equal(apply(again.params(theta), x), apply(model.params(theta), x))
        assert again.loss(theta, cases.take(np.arange(CASES))) == model.loss(
            theta, cases.take(np.arange(CASES))
        )
    assert type(after) is type(module)
    return after


def test_a_module_that_is_a_pytree():
    module = Layer(WEIGHTS, numbers(OUTPUTS), softsign)
    after = check_module(all_of, module, ["w", "b"])
    assert after.function is softsign
    assert np.array_equal(module.w, WEIGHTS)


def double(tree):
    """Return the real arrays of a tree in float64, because layers are created in float32."""

    def wide(a):
        return a.astype(float) if jnp.issubdtype(getattr(a, "dtype", int), jnp.floating) else a

    return jax.tree_util.tree_map(wide, tree)


def test_a_module_of_equinox():
    eqx = pytest.importorskip("equinox")
    module = double(eqx.nn.MLP(INPUTS, OUTPUTS, 4, 1, key=jax.random.key(0)))
    names = [f"layers[{i}].{name}" for i in range(2) for name in ("weight", "bias")]
    after = check_module(each, module, names, pickled=False)  # the JAX function in it cannot be pickled
    assert after.activation is module.activation
    choice = eqx.tree_at(lambda m: m.layers[-1].bias, jax.tree_util.tree_map(lambda _: False, module), True)
    model = hfmpi.JaxModel(each, module, "squares", trained=choice)
    assert [block.name for block in model.blocks] == ["layers[1].bias"]
    drop = eqx.nn.Sequential([module, eqx.nn.Dropout(0.5)])
    check_refused(lambda: hfmpi.JaxModel(each, drop, "cross-entropy"), GOOD, "Dropout requires a key")
    model = hfmpi.JaxModel(each, eqx.nn.inference_mode(drop), "squares")
    (note,) = train(model)[1]
    assert "not trained: params.layers[1].p (only " in note


def nnx_module(nnx, norm=True, drop=0.5):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.low = nnx.Linear(INPUTS, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs) if norm else jnp.tanh
            self.drop = nnx.Dropout(drop, broadcast_dims=(0,), rngs=rngs)  # one mask for all examples
            self.top = nnx.Linear(4, OUTPUTS, rngs=rngs)

        def __call__(self, x):
            return self.top(self.drop(jnp.tanh(self.norm(self.low(x)))))

    module = Net(nnx.Rngs(0))
    nnx.update(module, double(nnx.state(module)))
    return module


def test_a_module_of_nnx(monkeypatch):
    nnx = pytest.importorskip("flax.nnx")
    module = nnx_module(nnx)
    Net = type(module)
    monkeypatch.setattr(sys.modules[__name__], "Net", Net, raising=False)  # so that it can be pickled
    Net.__qualname__ = "Net"
    make = functools.partial(hfmpi.JaxModel, all_of, loss="cross-entropy")
    norm = nnx_module(nnx, drop=0.0)
    check_refused(lambda: make(norm), GOOD, r"changes \['norm'\]\['mean'\] \(BatchStat\) when it is called")
    without = nnx_module(nnx, norm=False, drop=0.01)
    check_refused(
        lambda: make(without), GOOD, r"outputs depend on the random numbers of the module \(dropout\?\)"
    )
    module.eval()
    part = ["['low']['bias']", "['low']['kernel']", "['norm']['bias']", "['norm']['scale']"]
    names = [*part, "['top']['bias']", "['top']['kernel']"]
    frozen = "['norm']['mean']", "['norm']['var']"
    before = jax.tree_util.tree_leaves(nnx.state(module, nnx.Param))
    check_module(all_of, module, names, frozen)
    for ours, theirs in zip(before, jax.tree_util.tree_leaves(nnx.state(module, nnx.Param)), strict=True):
        assert ours is theirs
    graph, state = nnx.split(module)
    for apply, params in (
        (lambda state, x: nnx.merge(graph, state)(x), state),
        (lambda both, x: both["net"](x) + both["b"], {"b": numbers(OUTPUTS), "net": module}),
    ):
        model = hfmpi.JaxModel(apply, params, "squares")
        assert model.size == sum(leaf.size for leaf in before) + (OUTPUTS if params is not state else 0)
        assert "['norm']['mean']" in train(model)[1][0]
    compiled = hfmpi.JaxModel(nnx.jit(all_of), module, "squares")  # sets all variables to their old values
    assert compiled.size == sum(leaf.size for leaf in before)
    train(compiled)
    top = hfmpi.JaxModel(all_of, module, "squares", trained=lambda path, array: "top" in path)
    assert [block.name for block in top.blocks] == names[-2:]


def test_shared_parts_of_nnx_are_in_theta_once():
    nnx = pytest.importorskip("flax.nnx")

    class Twice(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(INPUTS, INPUTS, rngs=nnx.Rngs(0))
            self.two = self.one

        def __call__(self, x):
            return self.two(jnp.tanh(self.one(x)))

    model = hfmpi.JaxModel(all_of, Twice(), "squares")
    assert model.size == INPUTS**2 + INPUTS
    after, _ = train(model, hfmpi.Examples(ROWS.astype("f"), numbers(CASES, INPUTS).astype("f")))
    assert after.one is after.two


def test_random_numbers_of_nnx_that_have_no_effect_are_allowed():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.net = nnx.RNN(nnx.LSTMCell(INPUTS, OUTPUTS, rngs=rngs), rngs=rngs)  # draws a state of zeros

        def __call__(self, x):
            return self.net(x)

    x, y = numbers(CASES, STEPS, INPUTS).astype("f"), numbers(CASES, STEPS, OUTPUTS).astype("f")
    train(hfmpi.JaxModel(all_of, Net(nnx.Rngs(0)), "squares"), hfmpi.Examples(x, y))


def test_a_linen_module():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        training: bool = False

        @nn.compact
        def __call__(self, x):
            return nn.Dense(OUTPUTS)(nn.BatchNorm(use_running_average=not self.training)(nn.Dense(4)(x)))

    x, y = ROWS.astype("f"), numbers(CASES, OUTPUTS).astype("f")
    variables = Net().init(jax.random.key(0), x)
    check_refused(
        lambda: hfmpi.JaxModel(Net(True).apply, variables, "cross-entropy"),
        GOOD,
        "collection .batch_stats. is im",
    )
    after, notes = train(hfmpi.JaxModel(Net().apply, variables, "squares"), hfmpi.Examples(x, y))
    assert "not trained: params['batch_stats']['BatchNorm_0']['mean'], params['batch_stats']" in notes[0]
    assert jax.tree_util.tree_structure(after) == jax.tree_util.tree_structure(variables)


# What the user's function does -----------------------------------------------------------------------

seen = []


def dropped(w, x):
    """Return a mask from a fixed key that is 1 at nearly every position."""
    return x @ w * jax.random.bernoulli(jax.random.key(0), 1 - 1e-6, (len(x), OUTPUTS))


def dropped_by_example(w, x):
    def one(key, x):
        return x @ w * jax.random.bernoulli(key, 1 - 1e-6, (OUTPUTS,))

    return jax.vmap(one)(jax.random.split(jax.random.PRNGKey(0), len(x)), x)


def random_features(w, x):
    """Return features that are random, and the same for all examples."""
    return jnp.cos(x @ jax.random.normal(jax.random.key(0), (INPUTS, INPUTS))) @ w


@jax.custom_vjp
def other_outputs(z):
    return z


other_outputs.defvjp(lambda z: (1.01 * z, None), lambda _, u: (u,))


def remembers(params, x):
    seen.append(x @ params)
    return seen[0]


def counts(params, x):
    seen.append(1)
    return x @ params * len(seen)


def random_mask(params, x):
    """Return a mask that nearly always has the same constants."""
    return x * (np.random.rand(INPUTS) > 1e-6) @ params  # noqa: NPY002


def random_scale(params, x):
    return x @ params * np.random.default_rng().random()


def broken_callback(params, x):
    def call(x):
        raise OSError("no such file")

    return x @ params + jax.pure_callback(call, jax.ShapeDtypeStruct((), x.dtype), x[0, 0])


def dynamic_loop(params, x):
    return jax.lax.fori_loop(0, 1 + (params.sum() > 0), lambda _, z: z * params.sum(), x) @ params


@pytest.mark.parametrize(("apply", "words"), [
    (lambda w, x: x @ w.T, r"the function fails on inputs float64 \(4, 2\): TypeError: dot_general requires"),
    (lambda w, x: x[:, 7:] @ w, r"fails on inputs float64 \(4, 2\): TypeError"),
    (lambda w, x: x @ w if x.sum() > 0 else -x @ w, "TracerBoolConversionError: Attempted boolean"),
    (lambda w, x: np.asarray(x) @ np.asarray(w), "TracerArrayConversionError: The numpy.ndarray conversion"),
    (lambda w, x: jnp.zeros(int(x[0, 0])) + x @ w, "ConcretizationTypeError: "),
    (lambda w, x: w["a"], "fails on inputs float64"),
    (lambda w: w, "takes 1 positional argument but 2 were given"),
    (lambda w, x: 1 / 0, "ZeroDivisionError: division by zero"),
    (lambda w, x: {"z": x @ w}, "must return one array of outputs, not dict: wrap it"),
    (lambda w, x: None, "must return one array of outputs, not None: wrap it"),
    (lambda w, x: (x @ w) * 1j, "outputs must be float32 or float64, not complex128"),
    (lambda w, x: (x @ w).astype(int), "outputs must be float32 or float64, not int64"),
    (lambda w, x: x @ w > 0, "outputs must be float32 or float64, not bool"),
    (lambda w, x: (x @ w).astype(jnp.bfloat16), r"not bfloat16: use .astype\(jax"),
    (lambda w, x: (x @ w).astype(jnp.float16), r"not float16: use .astype\(jax"),
    (lambda w, x: np.zeros((CASES, OUTPUTS)), "outputs do not depend on params: the function must"),
    (lambda w, x: x @ jnp.asarray(WEIGHTS), "outputs do not depend on params: the function must"),
    (lambda w, x: x @ w * jnp.nan, "the loss is not finite at the start"),
    (random_scale, r"JAX obtains a different trace each time \(random numbers of NumPy"),
    (lambda w, x: jnp.roll(x @ w, random.randint(0, 9**9) * OUTPUTS, 1), "JAX obtains a different trace"),
    (random_mask, "JAX obtains a different trace each time"),
    (counts, "JAX obtains a different trace each time"),
    (dropped, "the function draws random numbers for each example of a batch, as dropout does"),
    (dropped_by_example, "the function draws random numbers for each example of a batch, as dropout does"),
    (remembers, "UnexpectedTracerError: Encountered an unexpected tracer"),
    (broken_callback, "JaxRuntimeError: OSError: no such file"),
    (lambda w, x: other_outputs(x @ w), "the outputs of the function change when JAX differentiates it"),
    (dynamic_loop, "JAX cannot differentiate the function: ValueError: Reverse-mode differentiation"),
])  # fmt: skip
def test_what_a_function_must_not_do_is_refused(apply, words):
    seen.clear()
    model = hfmpi.JaxModel(apply, WEIGHTS, "cross-entropy")
    with pytest.raises(UserError, match=words) as caught:
        model.loss(model.initial(0), GOOD.take(np.arange(CASES)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_function_with_references_is_trained():
    if not hasattr(jax, "new_ref"):
        pytest.skip("this JAX has no references")

    def apply(params, x):
        sums = jax.new_ref(jnp.zeros((len(x), OUTPUTS)))
        sums[...] += x @ params
        return sums[...]

    train(hfmpi.JaxModel(apply, WEIGHTS, "squares"))


@pytest.mark.parametrize("kind", ["f", float])
@pytest.mark.parametrize("mix", [
    lambda z: z + 1e-3 * z.cumsum(axis=0),
    lambda z: z + 0.005 * z.mean(axis=0),
    lambda z: z + 1e-5 * jnp.arange(len(z))[:, None],
    lambda z: jnp.sort(z, axis=0),
    lambda z: z * (1 + 1e-4 * (len(z) == 1)),
])  # fmt: skip
def test_examples_that_depend_on_one_another_are_refused(mix, kind):
    cases = hfmpi.Examples(numbers(40, INPUTS), numbers(40, OUTPUTS))
    jax.config.update("jax_enable_x64", kind is float)

    def model(mix):
        return hfmpi.JaxModel(lambda w, x: mix(jnp.tanh(x @ w)), WEIGHTS.astype(kind), "squares")

    check_refused(lambda: model(mix), cases, "outputs of an example depend on the other examples")
    right = model(lambda z: z)
    right.loss(right.initial(0), cases.take(np.arange(40)))


def test_random_numbers_by_a_fixed_key_are_noted():
    (note,) = train(hfmpi.JaxModel(random_features, WEIGHTS, "squares"))[1]
    assert note == "Note: the function draws random numbers from a fixed key: they never change."


def test_the_shapes_of_several_inputs_are_named():
    model = hfmpi.JaxModel(lambda w, x, y: x @ w + y, WEIGHTS, "cross-entropy")
    cases = hfmpi.Examples((ROWS, numbers(CASES, OUTPUTS + 1)), symbols(CASES))
    words = r"fails on inputs float64 \(4, 2\) and float64 \(4, 4\): TypeError: add got"
    check_refused(lambda: model, cases, words)


def test_a_function_may_call_compiled_ones_that_take_their_arguments():
    plain, cases = hfmpi.JaxModel(linear, WEIGHTS, "squares"), hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS))
    donating = hfmpi.JaxModel(jax.jit(linear, donate_argnums=(0, 1)), WEIGHTS, "squares")
    for _ in range(2):
        both = [model.loss(model.initial(0), cases.take(np.arange(CASES))) for model in (plain, donating)]
        assert both[0] == both[1]


def test_what_a_function_closes_over_may_change_between_runs():
    scale = {"of": 1.0}
    model = hfmpi.JaxModel(lambda w, x: x @ w * scale["of"], WEIGHTS, "squares")
    batch = hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS)).take(np.arange(CASES))
    for scale["of"] in (1.0, 3.0):
        model.replan(checked=None)  # as before each run
        outputs = model.outputs(model.initial(0), batch)[0]
        np.testing.assert_allclose(outputs, ROWS @ WEIGHTS * scale["of"])


def test_a_function_without_forward_products_trains_by_first_order():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    def back(_, u):
        like = jax.ShapeDtypeStruct(u.shape, u.dtype)
        return (jax.pure_callback(lambda u: 2 * np.asarray(u), like, u, vmap_method="sequential"),)

    twice.defvjp(lambda x: (2 * x, None), back)
    model = hfmpi.JaxModel(lambda w, x: twice(x @ w), WEIGHTS, "squares")
    cases = ROWS, numbers(CASES, OUTPUTS)
    hfmpi.train(model, cases, optimizer="adam", max_steps=2, quiet=True)
    with pytest.raises(
        UserError, match=r"JAX cannot compute J v of the function .*: use a first-order optimizer"
    ):
        hfmpi.train(model, cases, optimizer="bhf-short", max_steps=2, quiet=True)


def test_numbers_of_64_bits_are_not_cut_without_a_word():
    jax.config.update("jax_enable_x64", False)
    model = hfmpi.JaxModel(lambda w, x: w[x % INPUTS], WEIGHTS.astype("f"), "cross-entropy")
    whole = hfmpi.Examples(np.arange(CASES) + 2**31, symbols(CASES))
    check_refused(
        lambda: model,
        whole,
        "inputs are integers from 2147483648 to 2147483651, but JAX computes with 32",
    )
    small = hfmpi.Examples(np.arange(CASES), symbols(CASES)).take(np.arange(CASES))
    assert np.isfinite(model.loss(model.initial(0), small))
    jax.config.update("jax_enable_x64", True)
    model = hfmpi.JaxModel(linear, WEIGHTS, "cross-entropy")
    jax.config.update("jax_enable_x64", False)
    check_refused(lambda: model, GOOD, "params are float64, but JAX computes in float32")


# In float64 ------------------------------------------------------------------------------------------


def in_float64(apply, params, x, targets):
    """Return what a float32 model computes in float64, with JAX in float32."""
    jax.config.update("jax_enable_x64", False)
    single = jax.tree_util.tree_map(
        lambda a: np.asarray(a, "f") if np.asarray(a).dtype == float else a, params
    )
    model = hfmpi.JaxModel(apply, single, "squares", trained=lambda path, array: "frozen" not in path)
    examples = check_batch(
        hfmpi.Examples(x, targets).take(np.arange(len(x))), model.output_loss, np.dtype("f")
    )
    theta = model.initial(0) * (1 + 1e-9)  # cannot be represented in float32
    found = model.in_float64(theta, examples)
    assert not jax.config.jax_enable_x64
    assert jnp.zeros(1).dtype == np.float32
    assert model._outputs(theta.astype("f"), examples).dtype == np.float32
    return theta, examples, found


def test_a_function_is_computed_in_float64():
    def apply(params, x):
        h = jax.jit(jax.nn.relu)(x @ params["a"] + params["frozen"] + jnp.zeros(4))
        h = jax.lax.scan(lambda h, _: (jnp.tanh(h), None), h, None, length=2)[0]
        return jax.lax.cond(True, lambda h: h, lambda h: 2 * h, h) @ params["b"] + jnp.float32(0.5)

    params = {"a": numbers(INPUTS, 4), "b": numbers(4, OUTPUTS), "frozen": numbers(4)}
    theta, examples, found = in_float64(apply, params, ROWS, numbers(CASES, OUTPUTS))
    a, b = theta[: 4 * INPUTS].reshape(INPUTS, 4), theta[4 * INPUTS :].reshape(4, OUTPUTS)
    h = np.maximum(examples.inputs[0].astype(float) @ a + params["frozen"].astype("f"), 0)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.tanh(np.tanh(h)) @ b + 0.5, rtol=1e-12, atol=1e-13)


def rounded(z):
    return z.astype("f").astype(z.dtype)


def callback(w, x):
    return jax.pure_callback(lambda z: rounded(np.asarray(z)), x @ w, x @ w)


@pytest.mark.parametrize("apply", [
    lambda w, x: (x @ w).astype(jnp.float32),
    lambda w, x: x @ w.astype(jnp.float32),
    lambda w, x: x.astype(jnp.float32).cumsum(axis=1) @ w,
    lambda w, x: jnp.tanh((x @ w).astype(jnp.bfloat16)).astype(x.dtype),
    lambda w, x: jax.lax.reduce_precision(x @ w, 8, 10),
    lambda w, x: jax.lax.scan(lambda h, _: (rounded(h), None), x @ w, None, length=2)[0],
    lambda w, x: jax.jit(lambda z: z.astype(jnp.float32) * 2.0)(x @ w),
    lambda w, x: jax.lax.cond(x.sum() > 0, lambda z: z, rounded, x @ w),
    lambda w, x: jax.lax.while_loop(lambda z: (z < 1).all(), lambda z: rounded(z) + 1, x @ w),
    lambda w, x: jax.lax.scan(lambda h, a: (h + a.sum(), h), jnp.float32(0), x @ w)[1][:, None] + x @ w,
    callback,
])  # fmt: skip
def test_a_function_that_rounds_to_fewer_digits_is_not_computed_in_float64(apply):
    assert in_float64(apply, WEIGHTS, ROWS, numbers(CASES, OUTPUTS))[2] is None


# Copies and threads ----------------------------------------------------------------------------------


def copies(model):
    return pickle.loads(pickle.dumps(model)), copy.deepcopy(model)


def test_a_model_can_be_pickled_and_copied():
    params = {**mlp_params(), "n": np.arange(2)}
    model, cases = hfmpi.JaxModel(mlp, params, "squares"), setting("mlp")[3]
    batch, theta = cases.take(np.arange(CASES)), model.initial(0) + 0.1
    before = copies(model)
    loss = model.loss(theta, batch)
    for again in *before, *copies(model):
        assert again.loss(theta, batch) == loss
        assert np.array_equal(again.initial(0), model.initial(0))
        assert again.linearise(theta, batch).loss == loss
        assert not again.params(theta)["n"].flags.writeable
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(hfmpi.JaxModel(lambda w, x: x @ w, WEIGHTS, "squares"))


def test_threads_may_use_one_model():
    model, cases = hfmpi.JaxModel(mlp, mlp_params(), "squares"), setting("mlp")[3]
    start = model.initial(0)
    thetas = [start + 0.1 * i for i in range(4)]

    def all_passes(theta):
        risk = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(CASES))
        gradient, factors = risk.factored_gradient(theta)
        squared, product = risk.squared_gradients(theta), risk.gauss_newton(theta)
        return risk.loss(theta), gradient.vector, factors, squared.squares, product(start)

    with ThreadPoolExecutor(4) as pool:
        several = [*pool.map(all_passes, 5 * thetas)]
    for i, theta in enumerate(thetas):
        alone = all_passes(theta)
        for found in several[i::4]:
            for ours, theirs in zip(found, alone, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-12)


# Several ranks -----------------------------------------------------------------------------------


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
def test_two_ranks_compute_what_one_computes(mpi_ranks, comm):
    apply, params, kind, cases, _ = setting("mlp")
    check_ranks(hfmpi.JaxModel(apply, params, kind), cases, comm)
