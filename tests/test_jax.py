"""A function of JAX as a model: its derivatives against dense ones, and what is refused."""

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
    numbers,
    symbols,
)

import hfmpi
from hfmpi.errors import UserError
from hfmpi.models.base import Blocks, Columns, KroneckerFactors, Model, SquaredGradients
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
    """Let symbols x (B, L) attend to one another; params a list, the last one a whole number."""
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
    """Give what has a rule for the reverse pass alone."""
    return cube(x @ params)


def setting(name):
    """Give a function, its params, a loss, cases and the inputs that it is called with."""
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
    assert isinstance(model, SquaredGradients)
    theta = model.initial(0)

    def rows(theta):
        return apply(model.params(theta), *inputs).reshape(-1, OUTPUTS)

    dense = jax.jit((jax.jacrev if name == "reverse" else jax.jacfwd)(rows))(theta)
    at = check(
        model, kind, cases, theta, np.asarray(rows(theta)), np.asarray(dense), None, name == "mlp", True
    )
    assert isinstance(at, Columns)
    assert not caplog.records


def test_every_optimizer_takes_a_function():
    params = jax.tree_util.tree_map(lambda a: a.astype(np.float32), mlp_params())
    check_optimizers(hfmpi.JaxModel(mlp, params, "squares"), setting("mlp")[3])


def test_the_page_works(tmp_path):
    names = check_page("JaxModel", tmp_path)
    assert np.array_equal(np.ravel(names["params"]["top"]), names["result"].theta[-20:])


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


def test_a_callback_that_cannot_be_batched_is_called_case_by_case(caplog):
    @jax.custom_vjp
    def double(x):
        return jax.pure_callback(lambda x: 2 * np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def back(_, u):
        return (double(u),)

    double.defvjp(lambda x: (double(x), None), back)
    x = numbers(CASES, INPUTS)
    cases = hfmpi.Examples(x, numbers(CASES, OUTPUTS))
    found = []
    for apply in (lambda w, x: double(x @ w), lambda w, x: 2 * (x @ w)):
        model = hfmpi.JaxModel(apply, numbers(INPUTS, OUTPUTS), "squares")
        risk = hfmpi.DataParallel(model, Communicator()).on(cases, np.arange(CASES))
        found.append(risk.squared_gradients(model.initial(0)).squares)
    assert np.allclose(*found)
    assert "cannot be batched" in caplog.text


# What is refused ---------------------------------------------------------------------------------

ROWS = numbers(CASES, INPUTS)
WEIGHTS = numbers(INPUTS, OUTPUTS)
GOOD = hfmpi.Examples(ROWS, symbols(CASES))


def linear(params, x):
    return x @ params


@pytest.mark.parametrize(("apply", "params", "words"), [
    (None, WEIGHTS, r"apply must be a function \(params, x\) -> outputs, not None"),
    (linear, {"n": np.arange(3)}, "params have no array of real numbers"),
    (linear, {}, "params have no array of real numbers"),
    (linear, [WEIGHTS, WEIGHTS.astype(np.float32)], "all be float64, not float32, float64"),
    (lambda w, x: linear(w, x - x.mean(axis=0)), WEIGHTS, "depend on the other cases of its batch"),
    (lambda w, x: (linear(w, x), x), WEIGHTS, "must give one array of outputs, not tuple"),
    (linear, WEIGHTS * np.inf, "the loss is not finite at the start"),
    (lambda w, x: linear(w, x)[None], WEIGHTS, r"outputs must be of shape \(4, symbols\) for these targets"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_a_sentence(apply, params, words):
    check_refused(lambda: hfmpi.JaxModel(apply, params, "cross-entropy"), GOOD, words)


def test_double_precision_has_to_be_switched_on():
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(UserError, match="JAX computes in float32"):
        hfmpi.JaxModel(linear, WEIGHTS, "squares")
    assert hfmpi.JaxModel(linear, WEIGHTS.astype(np.float32), "squares").backend.dtype == np.float32


# Several ranks -----------------------------------------------------------------------------------


@pytest.mark.mpi(ranks=2, timeout=100, unit="s")
def test_two_ranks_compute_what_one_computes(mpi_ranks, comm):
    apply, params, kind, cases, _ = setting("mlp")
    check_ranks(hfmpi.JaxModel(apply, params, kind), cases, comm)
