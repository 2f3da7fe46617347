"""Per-example rows: scores, sketches and residuals of built-in networks, compared with dense matrices."""

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import independent
import numpy as np
import pytest
from dense import loss_of_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import Distance, Huber, OfError, Poisson, Squares, Symbols, Trials, wrong
from test_networks import BACKENDS, CASES, KINDS, Steps, make

import hfmpi
from hfmpi.backends import create
from hfmpi.backends.numpy import NumpyBackend, by_sequence
from hfmpi.errors import UserError
from hfmpi.models import linearisation, roots
from hfmpi.models.base import has_rows
from hfmpi.models.linearisation import LossLinearisation
from hfmpi.models.loss_check import check_loss
from hfmpi.models.losses import LOSSES, HasRoot, choose
from hfmpi.networks import tape
from hfmpi.optim import layout


def close(a, b, tolerance=1e-12):
    """Assert that arrays are equal up to rounding, relative to the largest number."""
    assert np.abs(a - b).max(initial=0) <= tolerance * max(np.abs(b).max(initial=0), 1e-3)


def rows_of(network, fill, examples, count):
    """Return the rows (B, C, D) of `fill`, in an array with a stride larger than C * D per example."""
    wide = network.device(np.full((examples, count + 2, network.network.size), 7, network.backend.dtype))
    fill(wide[:, 1:-1])
    wide = network.host(wide)
    assert (wide[:, [0, -1]] == 7).all()
    return wide[:, 1:-1]


def scores_of(network, at, segments=1):
    return rows_of(network, lambda out: at.scores(segments, out), at.passes.examples, segments)


def residuals_of(network, at):
    """Return the rows (B, T O, D), r (B, T O), and whether the residuals are complete."""
    examples, count, found = at.passes.examples, at.residual_count(), []
    r = network.device(np.empty((examples, count), network.backend.dtype))
    rows = rows_of(network, lambda out: found.append(at.residual_rows(out, r)), examples, count)
    return rows, network.host(r), found[0]


def gradient_of(network, at, squares=None):
    out = np.zeros(network.network.size, network.backend.dtype)
    network.gradient(at, 1.0, out, squares)
    return out


def curvature_of(network, at):
    """Return G (D, D), computed by products."""
    size = network.network.size
    out = np.zeros((size, size))
    for row, unit in zip(out, np.eye(size), strict=True):
        network.gauss_newton(at, unit, 1.0, 0.0, row)
    return out


def alone(batch, b):
    return Steps(*(None if a is None else a[:, b : b + 1].copy() for a in batch))


def segment(batch, k, segments):
    """Return the batch with a mask that scores segment k only."""
    steps = len(batch.targets)
    mask = np.zeros(batch.targets.shape[:2])
    mask[steps * k // segments : steps * (k + 1) // segments] = 1
    return batch._replace(mask=mask if batch.mask is None else mask * batch.mask)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Process few steps, sequences and cotangents at a time."""
    monkeypatch.setattr(tape, "ROW_STEPS", 2)
    monkeypatch.setattr(linearisation, "COTANGENTS", 100)


# Scores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_a_row_is_the_gradient_of_its_example(kind, backend, case):
    network, theta, batch, _ = make(kind, *case, backend, steps=7, scored=5)
    network.backend.each_numbers = 2 * theta.size
    at = network.forward(theta, batch)
    squares = np.zeros_like(theta)
    gradient = gradient_of(network, at, squares)
    (rows,) = scores_of(network, at).swapaxes(0, 1)
    close(rows.sum(axis=0), gradient)
    close((rows**2).sum(axis=0), squares)
    for b, row in enumerate(rows):
        close(row, gradient_of(network, network.forward(theta, alone(batch, b))))


@given(
    st.sampled_from(KINDS), st.sampled_from(BACKENDS), st.sampled_from(CASES), st.integers(1, 7),
    st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 9),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_a_segment_is_the_gradient_of_its_steps(
    kind, backend, case, segments, size, steps, seed, block_rows, each
):
    network, theta, batch, _ = make(
        kind, *case, backend, seed, block_rows=block_rows, steps=steps, size=size, scored=1 + seed % steps
    )
    network.backend.each_numbers = each * theta.size
    at = network.forward(theta, batch)
    rows = scores_of(network, at, segments)
    close(rows.sum(axis=(0, 1)), gradient_of(network, at))
    for k in range(segments):
        (expected,) = scores_of(network, network.forward(theta, segment(batch, k, segments))).swapaxes(0, 1)
        close(rows[:, k], expected)


@given(
    st.sampled_from(KINDS), st.sampled_from(BACKENDS), st.sampled_from(CASES), st.integers(1, 4),
    st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31), st.integers(1, 20),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_rows_are_transposed_products_of_single_examples(
    kind, backend, case, size, steps, columns, seed, block_rows
):
    """For any cotangents, some of which are zero from a step on, or everywhere."""
    network, theta, batch, rng = make(
        kind, *case, backend, seed, block_rows=block_rows, steps=steps, size=size, scored=1 + seed % steps
    )
    passes = network.forward(theta, batch).passes
    u = rng.standard_normal((len(batch.targets), size, columns, network.about.outputs))
    for c in range(columns):
        u[rng.integers(len(u) + 1) :, :, c] = 0
    device, width = network.device, u.shape[-1]
    rows = rows_of(network, lambda out: passes.rows(device(u.reshape(-1, width)), out), size, columns)
    for b in range(size):
        of_one, expected = np.zeros_like(u), device(np.zeros((columns, theta.size)))
        of_one[:, b] = u[:, b]
        passes.vjp(device(of_one.reshape(-1, width)), expected)
        close(rows[b], network.host(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_precision_agrees_with_double(backend):
    found = []
    for dtype in ("float32", "float64"):
        rng = np.random.default_rng(0)
        network = hfmpi.Network(
            cell="mlstm", inputs=4, outputs=4, hidden=6, layers=2, backend=create(backend, dtype)
        )
        x = rng.integers(0, 4, (5, 9))
        at = network.linearise(network.backend.to_device(network.initial(0).astype(dtype)), batch_of(x, x))
        out = network.backend.to_device(np.empty((5, 3, network.size), dtype))
        at.scores(3, out)
        found.append(network.backend.to_host(out))
    assert found[0].dtype == np.float32
    close(*found, 1e-5)


# Residuals and sketches -------------------------------------------------------------------------


class Rooted(Huber):
    """Huber's loss with its root; the gradient has a part that H does not see where it is linear."""

    def root(self, backend, cache, u):
        by_output = by_sequence(u, len(cache))
        by_output *= self.f2(cache)[:, None]

    def residual(self, backend, cache, targets, out):
        out[...] = cache * self.f2(cache)


class Along(OfError):
    """(<a, z - y>)^2 / 2 with a = (1, 2, ...): H = a a' has rank 1, and the gradient is parallel to a."""

    @staticmethod
    def direction(width):
        return np.arange(1.0, 1 + width)

    def value(self, backend, outputs, targets):
        outputs -= targets
        return (outputs @ self.direction(outputs.shape[1])) ** 2 / 2

    def gradient(self, backend, cache, targets, scale, out):
        a = self.direction(cache.shape[1])
        out[...] = scale * (cache @ a)[:, None] * a

    def hessian(self, backend, cache, u, scale):
        a = self.direction(cache.shape[1])
        u[...] = scale * (u @ a)[:, None] * a


class Unrooted(Symbols):
    """Cross-entropy with a decomposition of H, which is singular."""

    root = residual = None


CUSTOM = [Squares(), Poisson(), Along(), Huber(), Rooted(), Distance()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[:3])
def test_residual_rows_are_a_root_of_the_gauss_newton_matrix(kind, backend, case):
    network, theta, batch, _ = make(kind, *case, backend, hidden=2)
    at = network.forward(theta, batch)
    rows, r, complete = residuals_of(network, at)
    flat = rows.reshape(-1, theta.size)
    close(flat.T @ flat, independent.gauss_newton(theta, network.about, batch, kind=case[1]))
    close(flat.T @ r.reshape(-1), independent.gradient(theta, network.about, batch, case[1]))
    assert complete


@pytest.mark.parametrize("loss", CUSTOM, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_residual_rows_of_a_loss_with_and_without_a_root(loss, masked):
    network, theta, batch, _ = make(("gru", "standard"), 1, loss, False, masked)
    batch = batch._replace(targets=batch.targets - 4 * (np.arange(2) == 1))  # Huber: one linear output
    at = network.forward(theta, batch)
    rows, r, complete = residuals_of(network, at)
    flat, gradient = rows.reshape(-1, theta.size), gradient_of(network, at)
    close(flat.T @ flat, curvature_of(network, at))
    seen = flat.T @ r.reshape(-1)
    assert complete == (not isinstance(loss, Huber | Distance))
    if complete:
        close(seen, gradient)
    else:
        assert np.linalg.norm(seen - gradient) > 1e-3 * np.linalg.norm(gradient)


def test_a_decomposed_hessian_gives_what_the_known_root_gives():
    """Also on a device: CuPy's arrays have no implicit conversions."""
    found = []
    for backend, loss in itertools.product(["numpy", "cupy"], [Unrooted(), "cross-entropy"]):
        network, theta, batch, _ = make(("lstm", "standard"), 1, "cross-entropy", True, True, backend)
        network.network.output_loss = choose(loss)
        rows, r, complete = residuals_of(network, network.forward(theta, batch))
        flat = rows.reshape(-1, theta.size)
        assert complete
        found.append((flat.T @ flat, flat.T @ r.reshape(-1)))
    assert not isinstance(Unrooted(), HasRoot)
    for normal, projected in found[1:]:
        close(normal, found[0][0])
        close(projected, found[0][1])


@pytest.mark.parametrize("loss", ["cross-entropy", "squares", "bernoulli", Unrooted(), Along()],
                         ids=["cross-entropy", "squares", "bernoulli", "unrooted", "along"])  # fmt: skip
@pytest.mark.parametrize("segments", [1, 2])
def test_a_sketch_has_the_gauss_newton_matrix_as_its_expectation(loss, segments):
    """Exactly: the mean over all signs."""
    symbols = loss == "cross-entropy" or isinstance(loss, Unrooted)
    network, theta, batch, _ = make(
        ("rnn", "standard"), 1, "cross-entropy" if symbols else "squares", True, False, steps=3, scored=2
    )
    network.network.output_loss = choose(loss)
    at = network.forward(theta, batch)
    mean, count, examples = 0, at.residual_count(), at.passes.examples
    patterns = [np.array(signs) for signs in itertools.product([1.0, -1.0], repeat=count)]
    for pattern in patterns:
        signs = np.tile(pattern, (examples, 1))
        rows = rows_of(network, lambda out, e=signs: at.sketch(e, segments, out), examples, segments)
        flat = rows.reshape(-1, theta.size)
        mean = mean + flat.T @ flat / len(patterns)
    close(mean, curvature_of(network, at))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_a_sketch_adds_residual_rows_by_their_signs(backend, case):
    network, theta, batch, rng = make(("mlstm", "standard"), *case, backend)
    at = network.forward(theta, batch)
    rows, _, _ = residuals_of(network, at)
    signs = rng.choice([1.0, -1.0], rows.shape[:2])
    fill = network.device(signs)
    for segments in (1, 3, 9):
        sketch = rows_of(network, lambda out, k=segments: at.sketch(fill, k, out), len(rows), segments)
        terms = (signs[:, :, None] * rows).reshape(len(rows), len(batch.targets), -1, theta.size).sum(axis=2)
        for k in range(segments):
            steps = len(batch.targets)
            expected = terms[:, steps * k // segments : steps * (k + 1) // segments].sum(axis=1)
            close(sketch[:, k], expected)
        v = rng.standard_normal((4, theta.size))
        on_device = network.device(v)
        whole = layout.Part(layout.Block("theta", 0, 1, theta.size), 0, 1, 0, theta.size)
        along = at.sketch_along(fill, segments, layout.Along([(whole, on_device)], np.ones(len(on_device))))
        close(network.host(along), v @ sketch.reshape(-1, theta.size).T)


class ByExample:
    """Passes of a dense Jacobian (B, T, O, D), with outputs sorted by example or by step."""

    nbytes = 0

    def __init__(self, jacobian, by_step):
        self.jacobian, self.by_step, self.examples = jacobian, by_step, len(jacobian)

    def rows(self, u, out):
        examples, steps, width, _ = self.jacobian.shape
        u = u.reshape(*((steps, examples) if self.by_step else (examples, steps)), -1, width)
        out[...] = np.einsum("btod,btco->bcd", self.jacobian, u.swapaxes(0, 1) if self.by_step else u)


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6),
    st.sampled_from(sorted(LOSSES)), st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_rows_are_dense_products_in_both_orders_of_outputs(examples, steps, width, segments, loss, seed):
    rng, backend = np.random.default_rng(seed), NumpyBackend("float64")
    jacobian, z = (
        rng.standard_normal((examples, steps, width, 7)),
        rng.standard_normal((examples, steps, width)),
    )
    y = rng.integers(0, width, (examples, steps)) if loss == "cross-entropy" else rng.random(z.shape)
    mask = (rng.random((examples, steps, 1)) < 0.7) * 1.0
    flat = z.reshape(-1, width), y.reshape(-1, *y.shape[2:])
    _, gradient, hessian = loss_of_rows(loss, *flat)
    gradient = gradient.reshape(z.shape) * mask
    hessian = hessian.reshape(*z.shape, width) * mask[..., None]
    normal = np.einsum("btod,btop,btpe->bde", jacobian, hessian, jacobian)
    signs = rng.choice([1.0, -1.0], (examples, steps * width))
    sketches = []
    for by_step in (False, True):

        def order(array, turn=by_step):
            array = array.swapaxes(0, 1) if turn else array
            return np.array(array, order="C").reshape(-1, *array.shape[2:])

        cache, targets, known = order(z), order(y), LOSSES[loss]
        known.value(backend, cache, targets)
        passes = ByExample(jacobian, by_step)
        at = LossLinearisation(passes, known, backend, cache, targets, order(mask), 0.0, 100)
        scores, sketch = np.empty((2, examples, segments, 7))
        at.scores(segments, scores)
        for k in range(segments):
            part = slice(steps * k // segments, steps * (k + 1) // segments)
            close(scores[:, k], np.einsum("btod,bto->bd", jacobian[:, part], gradient[:, part]))
        rows, r = np.empty((examples, steps * width, 7)), np.empty((examples, steps * width))
        assert at.residual_rows(rows, r)
        close(np.einsum("bmd,bme->bde", rows, rows), normal)
        close(np.einsum("bmd,bm->bd", rows, r), np.einsum("btod,bto->bd", jacobian, gradient))
        at.sketch(signs, segments, sketch)
        close(sketch.sum(axis=1), np.einsum("bm,bmd->bd", signs, rows))
        sketches.append(sketch)
    close(*sketches)


# Numerics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", ["cross-entropy", "bernoulli"])
@pytest.mark.parametrize("size", [20.0, 60.0, 2000.0])
def test_saturated_probabilities_have_finite_rows(dtype, backend, loss, size):
    """For probabilities that are rounded to 0 or 1, at correct and wrong targets."""
    made = create(backend, dtype)
    z = size * np.array([[1, 0, -1], [0, 0, 0], [-1, 1, 1], [0.5, -1, 1]])
    y = np.array([0, 1, 0, 1], np.int32)
    if loss == "bernoulli":
        y = np.eye(3)[y]
    cache = made.to_device(z.astype(dtype))
    targets = made.to_device(y if y.dtype == np.int32 else y.astype(dtype))
    known = LOSSES[loss]
    known.value(made, cache, targets)
    at = LossLinearisation(Identity(made), known, made, cache, targets, None, 0.0, 100)
    rows, r = made.to_device(np.empty((4, 3, 3), dtype)), made.to_device(np.empty((4, 3), dtype))
    assert at.residual_rows(rows, r)
    rows, r, p = map(made.to_host, (rows, r, cache))
    hot = np.eye(3)[y] if loss == "cross-entropy" else y
    assert np.isfinite(rows).all()
    assert np.abs(r).max() <= 1.01e7
    eps = np.finfo(dtype).eps
    close(np.einsum("bm,bmd->bd", r, rows), p - hot, 20 * eps + 1e-13)
    p = p.astype(np.float64)
    outer = p[:, :, None] * p[:, None] if loss == "cross-entropy" else p[:, :, None] ** 2 * np.eye(3)
    expected = p[:, :, None] * np.eye(3) - outer
    assert np.abs(np.einsum("bmd,bme->bde", rows, rows) - expected).max() <= 20 * eps + 1e-13


class Identity:
    """Passes whose outputs are the parameters of each example."""

    nbytes, by_step, examples = 0, False, 4

    def __init__(self, backend):
        self.backend = backend

    def rows(self, u, out):
        out[...] = u.reshape(out.shape)


def test_a_decomposed_hessian_that_is_not_finite_gives_rows_that_are_not():
    cache = np.array([[0.0], [np.nan], [np.inf]])
    root = roots.root_of(Poisson(), NumpyBackend("float64"), cache)
    assert np.array_equal(np.isfinite(root.apply(np.ones((3, 1))))[:, 0], [True, False, False])


def test_a_hessian_too_large_to_decompose_is_one_sentence():
    backend = NumpyBackend("float64")
    with pytest.raises(
        UserError, match=r"Poisson has no method root, .* 257 outputs .* define root and residual"
    ):
        roots.root_of(Poisson(), backend, np.zeros((1, 257)))
    u = np.ones((2, 257))
    roots.apply_root(LOSSES["squares"], backend, np.zeros((2, 257)), u)
    assert (u == 1).all()


# Losses that bring a root -----------------------------------------------------------------------


def shifts(self, backend, cache, targets, out):
    out[...] = cache + 1


def returns(self, backend, cache, u):
    return 2 * u


WRONG_ROOTS = {
    "of another H": (wrong(root=lambda s, b, c, u: np.multiply(u, 2, out=u)), "root must .* A A' = H"),
    "returned": (wrong(root=returns), "root must overwrite u with A u, but it returns ndarray and leaves"),
    "inherited": (
        wrong(
            value=lambda s, b, z, y: 4 * Squares.value(s, b, z, y),
            gradient=lambda s, b, c, y, scale, out: np.multiply(c, 4 * scale, out=out),
            hessian=lambda s, b, c, u, scale: np.multiply(u, 4 * scale, out=u),
        ),
        "root must compute .* set both to None",
    ),
    "residual": (wrong(residual=shifts), "residual must compute r with A r = gradient"),
    "residual of symbols": (
        wrong(Symbols, residual=lambda s, b, p, y, out: np.sqrt(p, out=out)), "residual must compute r with A"
    ),
    "residual partly": (
        wrong(residual=lambda s, b, c, y, out: np.copyto(out[:, 1:], c[:, 1:])), "residual must overwrite out"
    ),
    "raises": (wrong(root=lambda s, b, c: None), r"root\(backend, cache, u\) raises TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", WRONG_ROOTS)
def test_a_mistake_in_a_root_is_one_sentence(name, dtype):
    loss, words = WRONG_ROOTS[name]
    rng = np.random.default_rng(0)
    z = rng.standard_normal((6, 3)).astype(dtype)
    y = rng.integers(0, 3, 6) if loss.symbols else rng.standard_normal((6, 3)).astype(dtype)
    with pytest.raises(UserError, match=words) as caught:
        check_loss(loss, NumpyBackend(dtype), z, y)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3])
def test_right_roots_pass(dtype, size):
    rng = np.random.default_rng(1)
    z = (size * rng.standard_normal((9, 12))).astype(dtype)
    for loss, y in [
        (Symbols(), rng.integers(0, 12, 9)),
        (Trials(), np.round(rng.random(z.shape))),
        (Squares(), rng.standard_normal(z.shape)),
        (Rooted(), rng.standard_normal(z.shape)),
    ]:
        check_loss(loss, NumpyBackend(dtype), z, y if loss.symbols else y.astype(dtype))


@pytest.mark.parametrize(("methods", "words"), [
    ({"root": None}, "Wrong has residual without root: define both, or neither"),
    ({"residual": None}, "Wrong has root without residual: define both, or neither"),
    ({"root": 1.0}, "root of the loss Wrong must be a method, not 1.0"),
])  # fmt: skip
def test_a_root_without_residuals_is_refused(methods, words):
    with pytest.raises(UserError, match=words):
        choose(wrong(**methods))


# Memory and threads -----------------------------------------------------------------------------


def batch_of(x, y, mask=None):
    return hfmpi.Arrays(x, y, mask).take(np.arange(len(x)))


def test_rows_survive_release_copies_and_threads():
    rng = np.random.default_rng(0)
    network = hfmpi.Network(cell="mlstm", inputs=4, outputs=4, hidden=5, backend=create("numba"))
    theta, x = network.initial(0).astype("f"), rng.integers(0, 4, (8, 3, 6))
    assert has_rows(network)

    def scores(model, i):
        at = model.linearise(theta, batch_of(x[i], x[i]))
        out = np.empty((2, 3, 3, model.size), "f")
        r = np.empty((3, at.residual_count()), "f")
        wide = np.empty((3, at.residual_count(), model.size), "f")
        for again in out:
            at.scores(3, again)
            at.residual_rows(wide, r)
            model.release()
        assert np.array_equal(*out)
        return out[0], wide

    expected = [scores(network, i) for i in range(len(x))]
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert all(map(np.array_equal, scores(other, 0), expected[0]))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: scores(network, i), range(len(x))))
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(np.array_equal, ours, theirs))
