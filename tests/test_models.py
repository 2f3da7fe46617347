"""The models against an independent implementation, a dense Gauss-Newton matrix and finite differences."""

from typing import NamedTuple

import independent
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import OnHost, Outputs

from hfmpi.backends import create
from hfmpi.errors import UserError
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.cells import CELLS

ALL = [(name, "standard") for name in CELLS] + [("lstm", "krause"), ("mlstm", "krause")]
BACKENDS = ["numpy", "numba", "cupy"]


class Symbols(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None = None


def make_batch(rng, vocabulary, steps, size, warmup=0):
    text = rng.integers(0, vocabulary, (steps + 1, size)).astype(np.int32)
    return Symbols(text[:-1].copy(), text[1 + warmup :].copy())


def make(
    name, variant, backend="numpy", hidden=4, vocabulary=5, steps=6, size=3, warmup=0, seed=0, block_rows=7
):
    rng = np.random.default_rng(seed)
    about = Architecture(name, hidden, vocabulary, vocabulary, variant=variant)
    network = OnHost(about, create(backend, "float64"), block_rows=block_rows)
    theta = 0.5 * rng.standard_normal(about.layout.size)
    return network, theta, make_batch(rng, vocabulary, steps, size, warmup), rng


def gradient_of(network, theta, batch, squares=None):
    out = np.zeros_like(theta)
    network.gradient(network.forward(theta, batch), 1.0, out, squares)
    return out


def product_of(network, theta, batch, v, structural=0.0):
    out = np.zeros_like(theta)
    network.gauss_newton(network.forward(theta, batch, structural > 0), v, 1.0, structural, out)
    return out


def close(a, b, tolerance=1e-10):
    assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-300)


def check_products(network, theta, batch, rng):
    """Assert that J' is the transpose of J, and G symmetric and positive semidefinite."""
    tape = network.forward(theta, batch)
    v, w = rng.standard_normal((2, theta.size))
    jv = network.jvp(tape, v).outputs.copy()
    u = rng.standard_normal(jv.shape)
    ju = np.zeros_like(theta)
    network.vjp(tape, Outputs(u), ju)
    size_of = np.linalg.norm(jv) * np.linalg.norm(u) + np.linalg.norm(ju) * np.linalg.norm(v)
    assert np.sum(jv * u) == pytest.approx(ju @ v, rel=1e-10, abs=1e-12 * size_of)
    for structural in (0.0, 0.3):
        gv, gw = (product_of(network, theta, batch, z, structural) for z in (v, w))
        bound = 1e-11 * (np.linalg.norm(gv) * np.linalg.norm(w) + np.linalg.norm(gw) * np.linalg.norm(v))
        assert gv @ w == pytest.approx(gw @ v, rel=1e-10, abs=bound)
        assert v @ gv >= -bound


@pytest.mark.parametrize(("name", "variant"), ALL)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warmup", [0, 2])
def test_loss_and_gradient_match_the_independent_implementation(name, variant, backend, warmup):
    network, theta, batch, _ = make(name, variant, backend, warmup=warmup)
    expected = independent.loss(theta, network.about, batch)
    assert network.loss(theta, batch) == pytest.approx(expected, rel=1e-12)
    assert network.forward(theta, batch).loss == pytest.approx(expected, rel=1e-12)
    close(gradient_of(network, theta, batch), independent.gradient(theta, network.about, batch))


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_blocks_of_steps_change_nothing_beyond_rounding(name, variant):
    results = []
    for block_rows in (1, 7, 12, 1000):  # one step each, uneven blocks, and all six steps at once
        network, theta, batch, rng = make(name, variant, "numba", warmup=3, block_rows=block_rows)
        v = rng.standard_normal(theta.size)
        results.append((gradient_of(network, theta, batch), product_of(network, theta, batch, v)))
    for g, p in results[:-1]:
        close(g, results[-1][0], 1e-13)
        close(p, results[-1][1], 1e-13)


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_gradient_matches_finite_differences(name, variant):
    network, theta, batch, rng = make(name, variant)
    g = gradient_of(network, theta, batch)
    for _ in range(5):
        v, e = rng.standard_normal(theta.size), 1e-5
        slope = (network.loss(theta + e * v, batch) - network.loss(theta - e * v, batch)) / (2 * e)
        assert slope == pytest.approx(g @ v, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("name", "variant"), ALL)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warmup", [0, 2])
def test_products_match_the_dense_matrices(name, variant, backend, warmup):
    network, theta, batch, rng = make(name, variant, backend, warmup=warmup)
    j, ja = independent.jacobians(theta, network.about, batch)
    dense = independent.gauss_newton(theta, network.about, batch)
    tape = network.forward(theta, batch)
    for _ in range(3):
        v = rng.standard_normal(theta.size)
        tangent = network.jvp(tape, v, pre=True)
        close(tangent.outputs.reshape(-1), j @ v)
        whole = tangent.outputs.copy()
        groups = network.about.hidden * independent.GROUPS[name]  # a GRU carries more values
        close(tangent.pre[0][..., :groups].reshape(-1), ja @ v)
        close(network.jvp(tape, v).outputs, whole, 1e-13)
        u = rng.standard_normal(tangent.outputs.shape)
        out = np.zeros_like(theta)
        network.vjp(tape, Outputs(u), out)
        close(out, j.T @ u.reshape(-1))
        close(product_of(network, theta, batch, v), dense @ v, 1e-9)


@pytest.mark.parametrize(("name", "variant"), ALL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_structural_damping_matches_its_definition(name, variant, backend):
    network, theta, batch, rng = make(name, variant, backend)
    dense = independent.gauss_newton(theta, network.about, batch, structural=0.7)
    plain = independent.gauss_newton(theta, network.about, batch)
    assert np.linalg.norm(dense - plain) > 1e-2 * np.linalg.norm(plain)
    v = rng.standard_normal(theta.size)
    close(product_of(network, theta, batch, v, 0.7), dense @ v, 1e-9)
    # A tape with weights still computes the plain product if weights are not requested.
    out = np.zeros_like(theta)
    network.gauss_newton(network.forward(theta, batch, structural=True), v, 1.0, 0.0, out)
    close(out, plain @ v, 1e-9)


@pytest.mark.parametrize(("name", "variant"), ALL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_are_those_of_each_sequence_alone(name, variant, backend):
    network, theta, batch, _ = make(name, variant, backend, warmup=1)
    squares = np.zeros_like(theta)
    total = gradient_of(network, theta, batch, squares)
    close(total, gradient_of(network, theta, batch))
    expected = np.zeros_like(theta)
    for b in range(batch.inputs.shape[1]):
        one = Symbols(batch.inputs[:, b : b + 1].copy(), batch.targets[:, b : b + 1].copy())
        expected += gradient_of(network, theta, one) ** 2
    close(squares, expected)


@pytest.mark.parametrize(("name", "variant"), ALL)
@pytest.mark.parametrize("backend", ["numpy", "cupy"])
@pytest.mark.parametrize("sequences", [1, 2, 9])
def test_squares_of_many_sequences_at_a_time(name, variant, backend, sequences):
    network, theta, batch, _ = make(name, variant, "numpy", size=5, warmup=1)
    expected_squares, squares = np.zeros_like(theta), np.zeros_like(theta)
    expected = gradient_of(network, theta, batch, expected_squares)
    network, _, _, _ = make(name, variant, backend, size=5, warmup=1)
    network.backend.each_numbers = sequences * theta.size
    close(gradient_of(network, theta, batch, squares), expected)
    close(squares, expected_squares)


@given(
    st.sampled_from(ALL), st.sampled_from(BACKENDS), st.integers(1, 9), st.integers(1, 7), st.integers(1, 9),
    st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**31), st.integers(1, 50),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_jacobian_products_are_transposes_and_curvature_is_symmetric_and_positive(
    kind, backend, hidden, vocabulary, steps, size, warmup, seed, block_rows
):
    warmup = min(warmup, steps - 1)
    network, theta, batch, rng = make(
        *kind, backend, hidden, vocabulary, steps, size, warmup, seed, block_rows
    )
    check_products(network, theta, batch, rng)


@given(st.sampled_from(ALL), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_any_split_into_micro_batches_gives_the_same(kind, parts, seed):
    network, theta, batch, rng = make(*kind, "numba", size=sum(parts), seed=seed)
    v = rng.standard_normal(theta.size)
    whole_g, whole_s = np.zeros_like(theta), np.zeros_like(theta)
    network.gradient(network.forward(theta, batch), 0.3, whole_g, whole_s)
    whole_p = product_of(network, theta, batch, v)
    g, s, p, at, tape, total = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta), 0, None, 0.0
    for part in parts:
        piece = Symbols(*(np.ascontiguousarray(z[:, at : at + part]) for z in batch[:2]))
        tape = network.forward(theta, piece, reuse=tape)  # one memory, reused for any shape
        network.gradient(tape, 0.3, g, s)
        network.gauss_newton(tape, v, 1.0, 0.0, p)
        total += tape.loss
        at += part
    close(g, whole_g, 1e-11)
    close(s, whole_s, 1e-11)
    close(p, whole_p, 1e-11)
    assert total == pytest.approx(network.loss(theta, batch), rel=1e-12)


@pytest.mark.parametrize(("name", "variant"), ALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("float64", 1e-11)])
def test_backends_agree_to_rounding(name, variant, dtype, tolerance):
    rng = np.random.default_rng(3)
    about = Architecture(name, 33, 17, 17, variant=variant)
    theta = about.initial(0).astype(dtype)
    v = rng.standard_normal(theta.size).astype(dtype)
    batch = make_batch(rng, 17, 50, 9)
    results = []
    for backend in BACKENDS:
        network = OnHost(about, create(backend, dtype), block_rows=100)
        g, s, p = (np.zeros_like(theta) for _ in range(3))
        tape = network.forward(theta, batch, structural=True)
        network.gradient(tape, 1.0, g, s)
        network.gauss_newton(tape, v, 1.0, 0.1, p)
        results.append((np.array([tape.loss]), g, s, p))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            close(a.astype(np.float64), b.astype(np.float64), tolerance)


@pytest.mark.parametrize(("name", "variant"), ALL)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_advancing_in_pieces_equals_reading_at_once(name, variant, backend):
    network, theta, batch, _ = make(name, variant, backend, steps=7)
    state, logits = network.advance(theta, None, batch.inputs[:3])
    _, logits = network.advance(theta, state, batch.inputs[3:])
    close(logits, independent.run(theta, network.about, batch)[0][-1])


def test_not_a_number_is_seen_in_the_loss():
    for name, variant in ALL:
        for backend in BACKENDS:
            network, theta, batch, _ = make(name, variant, backend)
            theta[: theta.size // 2] = np.nan
            with np.errstate(all="ignore"):
                assert np.isnan(network.loss(theta, batch))


def test_sizes_follow_the_formulas_of_the_paper():
    n, v = 7, 11
    assert Architecture("rnn", n, v, v).layout.size == n * n + 2 * n * v + n + v
    assert Architecture("mrnn", n, v, v).layout.size == 2 * n * n + 3 * n * v + n + v
    assert Architecture("lstm", n, v, v).layout.size == 4 * n * n + 5 * n * v + 4 * n + v
    assert Architecture("mlstm", n, v, v).layout.size == 5 * n * n + 6 * n * v + 4 * n + v
    assert Architecture("mlstm", n, v, v, variant="krause").layout.size == 5 * n * n + 6 * n * v + 4 * n


@pytest.mark.parametrize(("name", "vocabulary", "budget", "hidden"), [
    ("lstm", 50, 220_000, 205), ("lstm", 73, 220_000, 193), ("mlstm", 73, 215_000, 168),
    ("lstm", 88, 220_000, 185), ("mlstm", 88, 215_000, 161),
])  # fmt: skip
def test_budget_picks_the_nearest_size(name, vocabulary, budget, hidden):
    about = Architecture(name, 1, vocabulary, vocabulary).of_size(budget)
    assert about.hidden == hidden
    for other in (hidden - 1, hidden + 1):
        assert abs(Architecture(name, other, vocabulary, vocabulary).layout.size - budget) >= abs(
            about.layout.size - budget
        )


def test_unknown_names_are_one_sentence():
    for arguments in (
        ("elman", 3, 4, 4), ("rnn", 0, 4, 4), ("lstm", 3, 4, 4, 1, "other"), ("rnn", 3, 4, 4, 1, "krause"),
        ("rnn", 3, 4, 4, 0),
    ):  # fmt: skip
        with pytest.raises(UserError):
            Architecture(*arguments)
    with pytest.raises(UserError):
        Architecture("rnn", 3, 4, 4).initial(0, "zeros")
    for name in "rnn", "mrnn", "gru":
        with pytest.raises(UserError, match=f"krause-lstm is for lstm and mlstm, not for {name}"):
            Architecture(name, 3, 4, 4).initial(0, "krause-lstm")
    with pytest.raises(UserError):
        create("torch")


def test_initialisations():
    about = Architecture("mlstm", 40, 30, 30)
    p = about.layout.views(about.initial(5))
    assert not p["b"].any()
    biased = about.layout.views(about.initial(5, forget_bias=3.0))["b"]
    assert np.array_equal(np.flatnonzero(biased == 3), np.arange(40, 80))
    assert not np.delete(biased, np.arange(40, 80)).any()
    assert p["W_h"].std() == pytest.approx(0.02, rel=0.1)
    assert p["W_x"].std() == pytest.approx(0.1, rel=0.1)
    sparse = about.layout.views(about.initial(5, "sparse"))
    assert np.all((sparse["W_h"] != 0).sum(axis=0) == 15)
    assert np.array_equal(about.initial(5), about.initial(5))
    assert not np.array_equal(about.initial(5), about.initial(6))


@pytest.mark.parametrize("variant", ["standard", "krause"])
def test_the_initialisation_of_krauses_lstm(variant):
    about = Architecture("lstm", 40, 30, 30, 2, variant)
    p = about.layout.views(about.initial(5, "krause-lstm", 3.0))
    biases = np.repeat([0.0, 3.0, -2.0, 0.0], 40)  # i, f, o, u
    assert np.array_equal(p["b"], biases)
    assert np.array_equal(p["b.2"], biases)
    assert p["W_h"].std() == pytest.approx(1e-4, rel=0.1)
    assert p["W_h.2"].std() == pytest.approx(1e-4, rel=0.1)
    # Everything else is equal, draw by draw.
    other = about.layout.views(about.initial(5, "krause"))
    for name in "W_x", "W_x.2", "W_o":
        assert np.array_equal(p[name], other[name])
