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
    factors_of_cases,
    numbers,
    symbols,
)

import hfmpi
from hfmpi.errors import UserError
from hfmpi.models.base import Blocks, KroneckerFactors, Model, Projection, has_squared_gradients
from hfmpi.models.batch import ScoredOutputs
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
    """Adds zeros to what parameters give, and keeps what they met; without zeros it does nothing."""

    def __init__(self, zeros=None):
        self.zeros, self.met = zeros, []

    def __call__(self, name, met, result):
        self.met.append((name, met, result.shape))
        return result if self.zeros is None else result + self.zeros[len(self.met) - 1]

    def loop(self, step, state, each):
        """Do what `jax.lax.scan` does; with zeros step by step, so that each step has its own."""
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
    """Check the factors of a function with taps against what these met and their derivatives."""
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
    assert "layers of the function are not known (no such thing)" in caplog.text


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
    (lambda w, x: linear(w, x - x.mean(axis=0)), WEIGHTS, "depend on the other examples of its batch"),
    (lambda w, x: (linear(w, x), x), WEIGHTS, "must return one array of outputs, not tuple: wrap it"),
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
