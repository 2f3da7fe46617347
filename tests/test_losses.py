"""A user-defined loss is checked before use: an error in it has one message, a correct one is accepted."""

import pickle

import numpy as np
import pytest
from dense import OUTPUTS, numbers, symbols

import hfmpi
from hfmpi.backends import create
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.errors import UserError
from hfmpi.models.loss_check import check_loss
from hfmpi.models.losses import Bernoulli, SoftmaxCrossEntropy, SquaredError, choose
from hfmpi.parallel.communicator import Communicator

# Right losses -----------------------------------------------------------------------------------


class Elementwise:
    """A sum over outputs of f(z, y) with the derivatives f1 and f2; the cache is z."""

    symbols = False

    def value(self, backend, outputs, targets):
        return self.f(outputs, targets).sum(axis=1)

    def gradient(self, backend, cache, targets, scale, out):
        out[...] = scale * self.f1(cache, targets)

    def hessian(self, backend, cache, u, scale):
        by_output = by_sequence(u, len(cache))
        by_output *= scale * self.f2(cache)[:, None]


class OfError(Elementwise):
    """A function of the error, which is also the cache."""

    def value(self, backend, outputs, targets):
        outputs -= targets
        return self.f(outputs, targets).sum(axis=1)


class Huber(OfError):
    """The Huber loss: its gradient has kinks where |z - y| is 1."""

    def f(self, e, y):
        return np.where(abs(e) < 1, e**2 / 2, abs(e) - 0.5)

    def f1(self, e, y):
        return np.clip(e, -1, 1)

    def f2(self, e):
        return (abs(e) < 1) * 1.0


class Distance(OfError):
    def f(self, e, y):
        return abs(e)

    def f1(self, e, y):
        return np.sign(e)

    def f2(self, e):
        return 0 * e


class Poisson(Elementwise):
    def f(self, z, y):
        return np.exp(z) - y * z

    def f1(self, z, y):
        return np.exp(z) - y

    def f2(self, z):
        return np.exp(z)


class Positive(Elementwise):
    """-log z of positive outputs, such as probabilities; not finite elsewhere."""

    def f(self, z, y):
        return np.where(z > 0, -np.log(z), np.inf)

    def f1(self, z, y):
        return -1 / z

    def f2(self, z):
        return 1 / z**2


class Single(Poisson):
    """Computes in single precision for any dtype."""

    def value(self, backend, outputs, targets):
        return super().value(backend, outputs.astype("f"), targets.astype("f"))

    def gradient(self, backend, cache, targets, scale, out):
        out[...] = np.float32(scale) * self.f1(cache.astype("f"), targets.astype("f"))


class OnlySingle(Poisson):
    def value(self, backend, outputs, targets):
        assert outputs.dtype == np.float32
        return super().value(backend, outputs, targets)


class Squares(SquaredError):
    """A user-defined copy of a built-in loss; the wrong variants change one method."""


class Symbols(SoftmaxCrossEntropy):
    """The same for targets that are symbols."""


class Trials(Bernoulli):
    """The same for targets from 0 to 1."""


ZEROS, WIDE = np.zeros((6, OUTPUTS)), numbers(20, 40)
SIGNS = np.sign(numbers(6, OUTPUTS))  # where |z - y| is 1 at zero outputs


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize(("loss", "outputs", "targets"), [
    (Squares(), numbers(6, OUTPUTS), numbers(6, OUTPUTS, seed=4)),
    (Squares(), 1e4 * numbers(6, OUTPUTS), 1e4 * numbers(6, OUTPUTS, seed=4)),
    (Squares(), 1e-6 * numbers(6, OUTPUTS), ZEROS),
    (Squares(), numbers(1, 1), numbers(1, 1)),
    (Symbols(), numbers(6, OUTPUTS), symbols(6)),
    (Symbols(), ZEROS, symbols(6).astype(np.int32)),
    (Symbols(), 50 * numbers(20, 40), symbols(20)),
    (Trials(), WIDE, np.round(abs(np.sin(WIDE)))),
    (Huber(), ZEROS, SIGNS),
    (Huber(), 100 * numbers(20, 40), WIDE),
    (Distance(), ZEROS, ZEROS),
    (Distance(), numbers(6, OUTPUTS), ZEROS),
    (Poisson(), numbers(6, OUTPUTS), abs(SIGNS)),
    (Positive(), abs(numbers(6, OUTPUTS)) + 0.1, ZEROS),
    (Positive(), np.full((6, 40), 0.025), np.zeros((6, 40))),
    (Single(), numbers(6, OUTPUTS), abs(SIGNS)),
    (Squares(), np.full((6, OUTPUTS), np.nan), ZEROS),
])  # fmt: skip
def test_a_right_loss_passes(loss, outputs, targets, kind):
    targets = targets if loss.symbols else targets.astype(kind)
    check_loss(loss, NumpyBackend(kind), outputs.astype(kind), targets)
    before, mask = outputs.astype(kind), np.ones((len(outputs), 1), kind)
    mask[1:3] = 0
    check_loss(loss, NumpyBackend(kind), before, targets, mask)
    assert np.array_equal(before, outputs.astype(kind), equal_nan=True)
    check_loss(loss, NumpyBackend(kind), before, targets, 0 * mask)


def test_a_loss_of_single_precision_alone_passes():
    check_loss(
        OnlySingle(), NumpyBackend(), numbers(6, OUTPUTS).astype("f"), abs(numbers(6, OUTPUTS)).astype("f")
    )


# Wrong losses -----------------------------------------------------------------------------------


def wrong(base=Squares, **methods):
    return type("Wrong", (base,), methods)()


def value(change):
    return lambda self, backend, z, y: change(Squares().value(backend, z, y))


def squares(backend, z, y):
    return Squares().value(backend, z, y)


def not_left(self, backend, outputs, targets):
    """Return the correct values, but do not change z."""
    return squares(backend, outputs.copy(), targets)


def in_the_loss(self, backend, outputs, targets):
    losses = squares(backend, outputs, targets)
    self.e = outputs.copy()
    return losses


def writes(change):
    """Return a gradient that writes the result of `change` for the scale and the error."""

    def gradient(self, backend, cache, targets, scale, out):
        out[...] = change(scale, cache)

    return gradient


def partly(self, backend, cache, targets, scale, out):
    out[:, 1:] = scale * cache[:, 1:]


def adds(self, backend, cache, targets, scale, out):
    out += scale * cache


def in_place(self, backend, cache, targets, scale, out):
    cache *= scale
    out[...] = cache


def missing_key(self, backend, cache, targets, scale, out):
    raise KeyError("weights\nof the classes")


def turns(self, backend, cache, u, scale):
    """Overwrite u with scale * S u, S not symmetric."""
    u += 0.5 * np.roll(u, 1, axis=1)
    u *= scale


def one_direction(self, backend, cache, u, scale):
    u *= scale * np.ones_like(cache)  # fits (N, O), and not (N * C, O)


class Falling(Elementwise):
    """-exp(z), with the correct derivatives."""

    def f(self, z, y):
        return -np.exp(z)

    def f1(self, z, y):
        return -np.exp(z)

    def f2(self, z):
        return -np.exp(z)


MISTAKES = {
    "scalar": (wrong(value=value(np.mean)), r"value must return .* 6 rows .* array \(6,\) .* not float64 of"),
    "float": (wrong(value=value(lambda x: float(x.sum()))), r"value must return the loss of each .*, not \d"),
    "column": (wrong(value=value(lambda x: x[:, None])), r"value must return .* ndarray .* shape \(6, 1\)"),
    "outputs": (wrong(value=lambda self, b, z, y: (z - y) ** 2), r"value must return .* shape \(6, 3\)"),
    "list": (wrong(value=value(lambda x: x.tolist())), "value must return .* not list"),
    "nothing": (wrong(value=lambda self, b, z, y: None), "value must return .* not None"),
    "complex": (wrong(value=value(lambda x: x + 0j)), "value must return .* of complex128"),
    "repeated mean": (wrong(value=value(lambda x: np.full(len(x), x.mean()))), "gradient must compute"),
    "mean over outputs": (wrong(value=value(lambda x: x / 3)), "gradient must .* computes 3 times that"),
    "no cache": (wrong(value=not_left), "gradient must compute .* computes .* instead of .* cache"),
    "cache in the loss": (
        wrong(value=in_the_loss, gradient=lambda s, b, c, y, scale, out: np.multiply(s.e, scale, out=out)),
        "gradient must compute .* cache",
    ),
    "arguments": (wrong(value=lambda self, z, y: z), "value.backend, outputs, targets. raises TypeError"),
    "gradient returned": (
        wrong(gradient=lambda s, b, cache, y, scale, out: scale * cache),
        "gradient must overwrite out with .*, but it returns ndarray and does not fill out",
    ),
    "gradient partly": (wrong(gradient=partly), "gradient must overwrite out .* leaves elements of out"),
    "gradient added": (wrong(gradient=adds), "gradient must overwrite out .* or adds to them"),
    "gradient without scale": (wrong(gradient=writes(lambda s, e: e)), "gradient must .* ignores scale"),
    "gradient of wrong sign": (
        wrong(gradient=writes(lambda s, e: -s * e)), "gradient must compute .* computes -1 times that"
    ),
    "gradient of a mean": (wrong(gradient=writes(lambda s, e: s * e / len(e))), "gradient must compute"),
    "gradient nan": (wrong(gradient=writes(lambda s, e: s * e * np.nan)), "gradient must .* computes nan"),
    "gradient of one output": (
        wrong(gradient=writes(lambda s, e: s * e * [1, 1, 2])), "gradient must compute .* instead of"
    ),
    "gradient changes the cache": (wrong(gradient=in_place), "gradient must not change the cache"),
    "gradient raises": (wrong(gradient=missing_key), "gradient.* raises KeyError: 'weights.*classes'$"),
    "gradient without out": (wrong(gradient=lambda s, b, c, y, scale: c), "gradient.*out. raises TypeError"),
    "hessian returned": (
        wrong(hessian=lambda s, b, cache, u, scale: scale * u), "hessian must overwrite u .* leaves u"
    ),
    "hessian without scale": (
        wrong(hessian=lambda s, b, c, u, scale: None), "hessian must compute .* ignores scale"
    ),
    "hessian of wrong size": (
        wrong(hessian=lambda s, b, c, u, scale: np.multiply(u, 2 * scale, out=u)),
        "hessian must compute .* computes 2 times that",
    ),
    "hessian squares scale": (
        wrong(hessian=lambda s, b, c, u, scale: np.multiply(u, scale**2, out=u)),
        "hessian must compute .* computes 0.37 times that",
    ),
    "hessian not symmetric": (wrong(hessian=turns), "hessian must compute"),
    "hessian of one direction": (wrong(hessian=one_direction), "hessian.* raises ValueError"),
    "not convex": (Falling(), "it must be convex in the outputs, .* negative curvature"),
    "symbols": (
        wrong(Symbols, gradient=lambda s, b, p, y, scale, out: np.multiply(p, scale, out=out)),
        "gradient must compute",
    ),
    "no hessian of symbols": (
        wrong(Symbols, hessian=lambda s, b, p, u, scale: np.multiply(u, scale, out=u)), "hessian must compute"
    ),
    "targets": (
        wrong(value=lambda s, b, z, y: squares(b, z, np.multiply(y, 2, out=y))),
        "value must not change targets",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_loss_is_one_sentence(name, kind):
    loss, words = MISTAKES[name]
    targets = symbols(6) if loss.symbols else numbers(6, OUTPUTS, seed=4).astype(kind)
    with pytest.raises(UserError, match=words) as caught:
        check_loss(loss, NumpyBackend(kind), numbers(6, OUTPUTS).astype(kind), targets)
    assert type(loss).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("loss", "words"), [
    (Squares, "loss must be one of cross-entropy, .*, not the class Squares"),
    (object(), "hfmpi.models.losses.Loss, not object"),
    (type("Half", (), {"value": squares, "symbols": False})(), "not Half, which lacks gradient, hessian"),
    (type("Kind", (), dict.fromkeys(["value", "gradient", "hessian"], squares))(), "which lacks symbols"),
    (wrong(symbols="no"), "symbols of the loss Wrong must be True .* or False, not 'no'"),
    (wrong(hessian=1.0), "hessian of the loss Wrong must be a method, not 1.0"),
    (wrong(bounds=(1, 0)), r"bounds of the loss Wrong must be \(smallest target, largest target\)"),
    (wrong(bounds=3), r"bounds of the loss Wrong must be \(smallest target, largest target\), not 3"),
])  # fmt: skip
def test_an_object_that_is_not_a_loss_is_refused(loss, words):
    with pytest.raises(UserError, match=words):
        choose(loss)


# In a network -----------------------------------------------------------------------------------

SEQUENCES, TARGETS = numbers(6, 4, 2), numbers(6, 4, OUTPUTS, seed=4)


def network(loss, kind="float32", backend="numpy"):
    return hfmpi.Network(
        cell="gru", inputs=2, outputs=OUTPUTS, hidden=3, loss=loss, backend=create(backend, kind)
    )


@pytest.mark.parametrize("name", ["scalar", "gradient of wrong sign", "hessian returned", "arguments"])
@pytest.mark.parametrize("mask", [None, np.arange(24).reshape(6, 4) % 2])
def test_a_network_refuses_a_wrong_loss(name, mask, tmp_path):
    loss, words = MISTAKES[name]
    cases, words = hfmpi.Arrays(SEQUENCES, TARGETS, mask), words.replace("6", r"\d")
    with pytest.raises(UserError, match=words):
        hfmpi.train(network(loss), cases, max_steps=1, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    made = network(loss)
    theta = made.initial(0).astype(made.backend.dtype)
    with pytest.raises(UserError, match=words):
        hfmpi.DataParallel(made, Communicator()).on(cases, np.arange(6)).gradient(theta)


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("backend", ["numba", "cupy"])
def test_a_loss_is_checked_on_its_device(backend, kind):
    batch = hfmpi.Arrays(SEQUENCES, TARGETS).take(np.arange(6))
    for loss, words in [(Squares(), ""), MISTAKES["gradient of wrong sign"], MISTAKES["column"]]:
        made = network(loss, kind, backend)
        theta = made.backend.to_device(made.initial(0).astype(kind))
        if words:
            with pytest.raises(UserError, match=words.replace("6", "8")):
                made.loss(theta, batch)
        else:
            assert made.loss(theta, batch) == pytest.approx(
                network("squares", kind, backend).loss(theta, batch)
            )


def test_a_batch_without_a_scored_output_does_not_count_as_checked():
    made = network(MISTAKES["gradient of wrong sign"][0])
    theta = made.initial(0).astype("f")
    made.loss(theta, hfmpi.Arrays(SEQUENCES, TARGETS, np.zeros((6, 4))).take(np.arange(6)))
    with pytest.raises(UserError, match="computes -1 times that"):
        made.loss(theta, hfmpi.Arrays(SEQUENCES, TARGETS).take(np.arange(6)))


def test_a_right_loss_in_a_network_trains_as_the_built_in_one():
    def theta(loss):
        made = pickle.loads(pickle.dumps(network(loss, "float64")))
        return hfmpi.train(made, (SEQUENCES, TARGETS), optimizer="bhf-short", max_steps=3, quiet=True).theta

    assert np.array_equal(theta(Squares()), theta("squares"))
