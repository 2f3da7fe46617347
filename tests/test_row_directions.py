"""Rows in the subspace step: conjugate gradients for several shifts, products S'S v, factors with rows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objective import make
from test_subspace import SIZE, Bowl, steps

import hfmpi
from hfmpi.errors import UserError
from hfmpi.optim import Objective, Subspace
from hfmpi.optim.rows import DenseRows, RowRequest
from hfmpi.optim.shifted_cg import shifted_solutions


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 30), first=st.sampled_from([1e-3, 0.1, 1.0]))
@settings(deadline=None, max_examples=30)
def test_all_shifts_are_solved_by_the_products_of_one(seed, rank, first):
    rng = np.random.default_rng(seed)
    root, b, products = rng.standard_normal((rank, 20)), rng.standard_normal(20), []
    a, shifts = root.T @ root, [first, 10 * first, 1e3 * first]

    def apply(v):
        products.append(v)
        return a @ v

    found, iterations = shifted_solutions(apply, b, shifts, 1e-9, 100)
    assert iterations == len(products)
    for x, shift in zip(found, shifts, strict=True):
        expected = np.linalg.solve(a + shift * np.eye(20), b)
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


def test_it_ends_at_the_tolerance_or_after_the_most_iterations():
    a, b = np.diag(np.geomspace(1e-3, 1e3, 40)), np.ones(40)
    (x,), iterations = shifted_solutions(lambda v: a @ v, b, [1e-3], 1e-2, 1000)
    assert np.linalg.norm(b - a @ x - 1e-3 * x) <= 1.01e-2 * np.linalg.norm(b)
    assert 3 < iterations < 1000
    (shorter,), limited = shifted_solutions(lambda v: a @ v, b, [1e-3], 1e-2, 3)
    assert limited == 3
    assert np.linalg.norm(b - a @ shorter) > np.linalg.norm(b - a @ x)


def test_a_shift_that_is_solved_long_before_the_others_is_left_alone():
    a, b = np.diag(np.geomspace(1e-6, 1.0, 200)), np.ones(200)
    found, iterations = shifted_solutions(lambda v: a @ v, b, [1e-7, 1e4, 1e12], 0.0, 400)
    assert iterations > 100
    for x, shift in zip(found[1:], (1e4, 1e12), strict=True):
        np.testing.assert_allclose(x, b / (np.diag(a) + shift), rtol=1e-12)


def test_earlier_iterates_are_those_of_fewer_iterations():
    a, b = np.diag(np.geomspace(1e-3, 1e3, 40)), np.ones(40)
    *_, early, late, third = shifted_solutions(lambda v: a @ v, b, [1e-3, 0.1], 1e-9, 40, {5, 22, 40})[0]
    for x, most in ((early, 5), (late, 22), (third, 40)):
        (alone, _), iterations = shifted_solutions(lambda v: a @ v, b, [1e-3, 0.1], 1e-9, most)
        assert iterations == most
        np.testing.assert_array_equal(x, alone)
    found, iterations = shifted_solutions(lambda v: a @ v, b, [1e-3], 1e-2, 1000, {1, 999})
    assert (len(found), iterations < 999) == (2, True)  # it ended before


def test_numbers_that_are_not_finite_end_it():
    found, iterations = shifted_solutions(lambda v: v * np.nan, np.ones(3), [1.0, 2.0], 1e-3, 50)
    assert iterations == 1
    assert len(found) == 2


class Scored(Bowl):
    """The bowl with rows of scores that are unrelated to its other values."""

    request, many = None, 30

    def rows(self, theta, request):
        self.request = request
        at, factors = self.factored_gradient(theta)
        scores = np.random.default_rng(3).standard_normal((self.many, SIZE)).astype(theta.dtype)
        factors = factors if request.factors else None
        return DenseRows(at.loss, at.vector, scores, None, 7, request.segments, factors=factors)


@pytest.mark.parametrize("directions", ["rows", "kfac+rows"])
def test_the_directions_are_those_of_the_dense_matrix(directions, monkeypatch):
    bowl, taken = Scored(), []
    original = Subspace._model

    def model(self, theta, state, objectives, g, directions):
        taken.extend(row for stack in directions for row in stack)
        return original(self, theta, state, objectives, g, directions)

    monkeypatch.setattr(Subspace, "_model", model)
    optimizer = Subspace(directions, memory=0, segments=3, row_damping=0.1, row_dampings=2)
    _, state, (report,) = steps(optimizer, bowl, 1)
    s = np.random.default_rng(3).standard_normal((30, SIZE))
    g = bowl.gradient(np.zeros(SIZE)).vector
    for direction, gamma in zip(taken, (0.1, 1.0), strict=False):
        np.testing.assert_allclose(
            direction, np.linalg.solve(s.T @ s / 7 + gamma * np.eye(SIZE), g), rtol=1e-3, atol=1e-4
        )
    assert len(taken) == 2 + 3 * ("kfac" in directions)
    assert bowl.request == RowRequest("scores", 3, 0, factors="kfac" in directions)
    assert (report.work.gradients, report.work.adjoints) == (1, 3)
    assert state.updates == 1


def test_earlier_iterates_are_directions_too(monkeypatch):
    numbers, original = [], Subspace._model

    def model(self, theta, state, objectives, g, directions):
        numbers.append(len(directions))
        return original(self, theta, state, objectives, g, directions)

    monkeypatch.setattr(Subspace, "_model", model)
    optimizer = Subspace("rows", memory=0, row_damping=1e-3, row_dampings=1, row_steps=9, row_iterates=1)
    steps(optimizer, Scored(), 1)
    steps(replace(optimizer, row_damping=1e3), Scored(), 1)  # solved after one or two iterations
    assert numbers == [2, 1]


def test_sketches_are_drawn_anew_in_every_step(monkeypatch):
    bowl, seeds = Scored(), []
    original = Scored.rows

    def rows(self, theta, request):
        seeds.append(request.seed)
        assert request.kind == "sketch"
        return original(self, theta, request)

    monkeypatch.setattr(Scored, "rows", rows)
    steps(Subspace("kfac+rows", row_kind="sketch"), bowl, 3)
    assert seeds == [0, 1, 2]


def test_the_model_may_come_from_a_sketch(monkeypatch):
    """The rows of the sketch differ from those of the directions, and there is no projection."""
    bowl, requests = Scored(), []
    original = Scored.rows
    monkeypatch.setattr("hfmpi.optim.subspace.LEAST_ROWS", 0)

    def rows(self, theta, request):
        requests.append(request)
        return original(self, theta, request)

    monkeypatch.setattr(Scored, "rows", rows)
    monkeypatch.setattr(Scored, "project", None)
    optimizer = Subspace("kfac+rows", row_kind="sketch", curvature_segments=4)
    _, state, reports = steps(optimizer, bowl, 2)
    seeds = [request.seed for request in requests]
    assert len(set(seeds)) == 4
    assert [(r.kind, r.segments, r.factors) for r in requests[::2]] == [("sketch", 1, True)] * 2
    assert [(r.kind, r.segments, r.factors) for r in requests[1::2]] == [("sketch", 4, False)] * 2
    work = reports[1].work
    assert (work.gradients, work.adjoints, work.sketches, work.projections) == (1, 1, 4, 0)
    s = np.random.default_rng(3).standard_normal((30, SIZE))  # the same rows for any seed
    p = state.steps[:SIZE]
    assert state.curvature == pytest.approx(np.square(s @ p).sum() / 7, rel=1e-6)
    assert Subspace(curvature_segments=1).needs == Subspace().needs._replace(sketch=True)
    assert not Subspace().needs.sketch


def test_a_model_from_few_rows_is_left():
    optimizer, bowl = Subspace("rows", row_dampings=1, memory=1, cut=False, curvature_segments=1), Scored()
    for rows, projections in ((12, 0), (11, 1)):  # of two directions from the second step on
        bowl.many = rows
        _, _, reports = steps(optimizer, bowl, 2)
        assert (reports[1].work.sketches, reports[1].work.projections) == (1, projections)
    for examples, sketches in ((128, 0), (129, 1)):  # so few examples have J V, without rows
        bowl.many, bowl.size = 12, examples
        _, _, reports = steps(optimizer, bowl, 2)
        assert (reports[1].work.sketches, reports[1].work.projections) == (sketches, 1 - sketches)


def test_an_objective_without_rows_gets_a_sentence():
    theta = np.zeros(SIZE)
    bowl, optimizer = Bowl(), Subspace("rows")
    state = optimizer.init(theta, bowl.blocks)
    with pytest.raises(UserError, match=r"^the objective has no rows of examples"):
        optimizer.step(theta, state, hfmpi.Objectives(bowl, bowl))
    assert Objective.rows is Bowl.rows


@pytest.mark.parametrize(
    ("factors", "error", "words"),
    [
        (None, UserError, r"^the objective's rows have no Kronecker factors: set RowMatrix.factors$"),
        (np.zeros(3), TypeError, r"^Scored.rows must return 91 numbers of float64 as factors, not "),
        (np.zeros(91, np.float32), TypeError, r"^Scored.rows must return 91 numbers of float64 as factors"),
    ],
)
def test_rows_must_have_the_factors_that_were_requested(factors, error, words, monkeypatch):
    original = Scored.rows
    monkeypatch.setattr(Scored, "rows", lambda *given: replace(original(*given), factors=factors))
    with pytest.raises(error, match=words):
        steps(Subspace("kfac+rows"), Scored(), 1)


# The objective ---------------------------------------------------------------------------------


def both(owner, sequences, theta, request, part):
    """Return rows of a risk that stores linearisations of a part, and its gradient with factors."""
    indices = np.array([7, 0, 11, 3, 5, 2])
    whole = owner.on(sequences, indices)
    if part:
        curvature = owner.on(sequences, indices[:part])
        whole.keep(curvature, indices[part:])
    else:
        curvature = owner.on(sequences, indices[:2])
    rows = whole.rows(theta, request)
    v = owner.model.backend.to_device(np.random.default_rng(0).standard_normal((3, theta.size)))
    projected = curvature.project(theta)(v)
    plain = owner.on(sequences, indices)
    other = owner.on(sequences, indices[: part or 2]).project(theta)(v)
    return rows, plain, projected, other, v[0]


@pytest.mark.parametrize("kind", ["scores", "sketch"])
@pytest.mark.parametrize(
    ("backend", "part", "options"),
    [
        *(
            ("numpy", part, options)
            for part in (0, 2, 6)
            for options in ({}, {"slices": 4}, {"memory_budget": 3e5})
        ),
        ("numba", 2, {}),
        ("cupy", 2, {}),
    ],
    ids=str,
)
def test_factors_and_linearisations_come_with_the_rows(kind, backend, part, options):
    owner, sequences, theta = make("mlstm", micro_batch=2, backend=backend, **options)
    backend = owner.model.backend
    theta = backend.to_device(theta)
    request = RowRequest(kind, 2, 5, factors=True)
    rows, plain, projected, other, v = both(owner, sequences, theta, request, part)
    gradient, factors = plain.factored_gradient(theta)
    alone = plain.rows(theta, RowRequest(kind, 2, 5))
    close = {"rtol": 1e-9, "atol": 1e-12}
    host = backend.to_host
    np.testing.assert_allclose(host(rows.gradient), host(gradient.vector), **close)
    np.testing.assert_allclose(host(rows.factors), host(factors), **close)
    np.testing.assert_allclose(rows.loss, gradient.loss, rtol=1e-12)
    np.testing.assert_allclose(projected, other, **close)
    assert rows.count == alone.count == 12
    np.testing.assert_allclose(rows.normal(), alone.normal(), **close)
    np.testing.assert_allclose(host(rows.product(v)), rows.normal() @ host(v), **close)
    assert alone.factors is None
