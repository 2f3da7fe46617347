"""The subspace step against dense algebra, and K-FAC's directions against dense Kronecker products."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from dense import restored, stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfmpi.errors import UserError
from hfmpi.optim import Gradient, Objective, Objectives, Subspace, kfac, layout, reduced_model
from hfmpi.optim.layout import Block
from hfmpi.optim.presets import preset

BLOCKS = Block("gates", 0, 5, 6, cuts=(2, 4), groups=3), Block("bias", 30, 1, 4), Block("out", 34, 3, 2)
SIZE = 40


def random_positive(rng, n):
    m = rng.standard_normal((n, n + 2))
    return m @ m.T / n


class Bowl(Objective):
    """A quadratic risk, with random factors."""

    blocks = BLOCKS

    def __init__(self, seed=0, hard=1.0, least=0.0):
        rng, self.least = np.random.default_rng(seed), least
        self.curvature, self.centre, self.hard = random_positive(rng, SIZE), rng.standard_normal(SIZE), hard
        sides = [(b.rows, b.columns) for b in BLOCKS]
        self.factors = [tuple(random_positive(rng, side) for side in both) for both in sides]

    def loss(self, theta):
        away = np.asarray(theta, float) - self.centre
        return float(away @ self.curvature @ away) / 2 * self.hard + self.least

    def gradient(self, theta):
        away = np.asarray(theta, float) - self.centre
        return Gradient(self.loss(theta), (self.hard * self.curvature @ away).astype(theta.dtype))

    def factored_gradient(self, theta):
        flat = [
            stored(m, groups).reshape(-1)
            for block, both in zip(BLOCKS, self.factors, strict=True)
            for m, groups in zip(both, (1, block.groups), strict=True)
        ]
        return self.gradient(theta), np.concatenate(flat).astype(theta.dtype)

    def gauss_newton(self, theta):
        return lambda v: (self.curvature @ v).astype(theta.dtype)


@pytest.fixture(params=[(100, 100), (100, 5), (4, 4), (1, 1)], ids=str)
def _longest(request, monkeypatch):
    """Set the longest side with a full factor, and the longest total side of several groups with one."""
    for name, side in zip(("LONGEST_SIDE", "WHOLE_SIDE"), request.param, strict=True):
        monkeypatch.setattr(layout, name, side)


def product(a, b, groups):
    """Return the Kronecker product of two stored factors as a dense matrix."""
    return np.kron(restored(stored(a)), restored(stored(b, groups)))


ON_FIXTURES = [HealthCheck.function_scoped_fixture]  # the same for all examples


@given(seed=st.integers(0, 2**31), gamma=st.sampled_from([1e-4, 0.1, 3.0]))
@settings(deadline=None, max_examples=20, suppress_health_check=ON_FIXTURES)
@pytest.mark.usefixtures("_longest")
def test_kfac_directions_are_those_of_dense_kronecker_products(seed, gamma):
    bowl, g = Bowl(seed), np.random.default_rng(seed).standard_normal(SIZE)
    flat = bowl.factored_gradient(g)[1]
    empty = np.zeros(kfac.decomposition_layout(BLOCKS).size)
    (one, two), kept = kfac.preconditioned_gradients(bowl, g, flat, empty, [gamma, 10 * gamma], True)
    for direction, damping in ((one, gamma), (two, 10 * gamma)):
        for block, (a, b) in zip(BLOCKS, bowl.factors, strict=True):
            dense = product(a, b, block.groups) + damping * np.eye(block.rows * block.columns)
            expected = np.linalg.solve(dense, block.of(g).reshape(-1))
            np.testing.assert_allclose(block.of(direction).reshape(-1), expected, rtol=1e-8, atol=1e-10)
    again, same = kfac.preconditioned_gradients(bowl, g, flat * 0, kept, [gamma], False)  # decomposed before
    np.testing.assert_array_equal(again[0], one)
    np.testing.assert_array_equal(same, kept)


def steps(optimizer, bowl, count, dtype=np.float64):
    theta, reports = np.zeros(SIZE, dtype), []
    state = optimizer.init(theta, bowl.blocks)
    for _ in range(count):
        theta, state, report = optimizer.step(theta, state, Objectives(bowl, bowl))
        assert theta.dtype == dtype
        reports.append(report)
    return theta, state, reports


def test_the_step_minimises_the_damped_model_in_the_space_of_its_directions():
    bowl = Bowl()
    optimizer = Subspace("gradient", memory=0, damping=0.3)
    theta, _, (report,) = steps(optimizer, bowl, 1)
    g = bowl.gradient(np.zeros(SIZE)).vector
    rows = []
    for block in BLOCKS:
        for top, bottom in zip((0, *block.cuts), (*block.cuts, block.rows), strict=True):
            for columns in np.split(np.arange(block.columns), block.groups):
                part = np.zeros(SIZE)
                block.of(part)[top:bottom, columns] = block.of(g)[top:bottom, columns]
                rows.append(part / np.linalg.norm(part))
    v = np.array(rows)
    m = v @ bowl.curvature @ v.T
    system = m + 0.3 * v @ v.T
    c = -np.linalg.solve(system + 1e-12 * np.diag(np.diag(system)), v @ g)
    np.testing.assert_allclose(theta, v.T @ c, rtol=1e-7)
    assert len(rows) == 9 + 1 + 1
    assert (report.work.directions, report.work.projections, report.work.linearisations) == (10, 1, 1)
    assert report.details["step_norm"] == pytest.approx(np.linalg.norm(theta))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("directions", ["kfac", "gradient", "kfac+gradient+rms"])
@pytest.mark.parametrize("candidates", [0, 1, 3])
def test_a_bowl_is_solved(dtype, directions, candidates):
    bowl = Bowl(1)
    _, _, reports = steps(Subspace(directions, candidates=candidates), bowl, 25, dtype)
    losses = [report.loss for report in reports]
    assert losses[-1] < 1e-3 * losses[0]
    assert min(report.details["damping"] for report in reports) < 1e-3
    assert all(report.accepted or report.loss < 1e-6 * losses[0] for report in reports[:5])
    rhos = [report.details["rho"] for report in reports[1:3]]  # the model is the risk itself
    assert rhos == pytest.approx([1.0] * 2, rel=0.05)


def test_a_step_whose_next_one_has_another_batch_measures_its_own_risk():
    bowl = Bowl(2)
    theta, state, _ = steps(Subspace(), bowl, 1)
    found = []
    for candidates, repeated in ((0, True), (0, False), (1, True), (3, False)):
        optimizer = Subspace(candidates=candidates)
        objectives = Objectives(bowl, bowl, repeated=repeated)
        found.append(optimizer.step(theta, state, objectives))
    assert [report.work.losses for _, _, report in found] == [0, 1, 1, 1]
    assert [report.work.candidates for _, _, report in found] == [0, 0, 0, 2]
    np.testing.assert_array_equal(found[1][0], found[2][0])
    assert found[1][2] == found[2][2]
    # The change of the last step on the next batch does not count.
    theta, state, _ = found[1]
    worse = Bowl(2)
    worse.gradient = lambda theta: bowl.gradient(theta)._replace(loss=1e9)
    worse.losses = lambda every: [1e8 for _ in every]
    _, _, report = Subspace().step(theta, state, Objectives(worse, bowl, repeated=False))
    assert report.accepted
    worse.losses = lambda every: [1e10 for _ in every]
    after, later, report = Subspace().step(theta, state, Objectives(worse, bowl, repeated=False))
    assert (report.accepted, report.message) == (False, "step rejected: no candidate lowers the risk")
    assert (after is theta, later.damping) == (True, 4 * state.damping)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_directions_that_are_parallel_do_not_blow_the_step_up(dtype):
    """Some of them have no curvature either, so that only lambda bounds the step."""
    bowl = Bowl(3)
    bowl.curvature[:, :7] = bowl.curvature[:7] = 0
    slope = np.linspace(1, 2, SIZE)
    bowl.loss = lambda theta: 1.0 + slope @ theta + theta @ bowl.curvature @ theta / 2
    bowl.gradient = lambda theta: Gradient(bowl.loss(theta), (slope + bowl.curvature @ theta).astype(dtype))
    optimizer, theta = Subspace("kfac+gradient+rms", kfac_ratio=1 + 1e-9, damping=0.5), np.zeros(SIZE, dtype)
    after, _, report = optimizer.step(theta, optimizer.init(theta, BLOCKS), Objectives(bowl, bowl))
    assert report.accepted
    assert np.linalg.norm(after) <= np.linalg.norm(slope) / 0.5


def bold(optimizer, objective, count, dtype=np.float64):
    """Take a cautious step, an unchecked one with the optimizer's lambda, and more; return all of them."""
    cautious = replace(optimizer, damping=100.0)
    theta = np.zeros(SIZE, dtype)
    taken = [cautious.step(theta, cautious.init(theta, BLOCKS), Objectives(objective, objective))]
    state = replace(taken[0][1], damping=optimizer.damping)
    for _ in range(count):
        taken.append(optimizer.step(taken[-1][0], state, Objectives(objective, objective)))
        state = taken[-1][1]
    return taken


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("memory", [0, 1, 3])
def test_where_the_risk_rises_it_goes_back_to_the_minimum_along_the_step(memory, decay):
    bowl = Bowl(2, hard=4.0)  # the model's curvature is a quarter of the true one
    optimizer = Subspace("gradient", memory=memory, damping=1e-3, weight_decay=decay)
    taken = bold(optimizer, bowl, 60)
    (start, _, _), (far, _, _), (theta, state, back) = taken[:3]
    step = far - start
    assert [report.accepted for _, _, report in taken[:3]] == [True, True, False]
    assert [report.work.losses for _, _, report in taken[:3]] == [1, 0, 0]

    def risk(part):
        at = start + part * step
        return bowl.loss(at) + decay / 2 * (at @ at)

    slope = (risk(1e-6) - risk(-1e-6)) / 2e-6
    part = -slope / (2 * (risk(1) - risk(0) - slope))
    assert 0.1 < part < 0.5
    np.testing.assert_allclose(theta, start + part * step, rtol=1e-6)
    assert all(risk(part) < risk(other) for other in (part - 0.02, part + 0.02))
    assert back.message == f"the risk rose: the last step was shortened to {part:.2g} of its length"
    assert back.loss == pytest.approx(bowl.loss(far))  # without the decay
    assert state.damping == 4 * taken[1][1].damping
    np.testing.assert_allclose(state.steps[:SIZE], part * step)
    assert taken[-1][2].loss < (0.1 if decay == 0 else 0.5) * taken[0][2].loss


@given(seed=st.integers(0, 2**31), hard=st.floats(0.1, 1e4), decay=st.sampled_from([0.0, 0.1]))
@settings(deadline=None, max_examples=30)
def test_a_step_without_one_before_it_lowers_the_risk_at_any_scale(seed, hard, decay):
    bowl, optimizer = Bowl(seed, hard), Subspace("gradient", weight_decay=decay)
    theta, state, (report,) = steps(optimizer, bowl, 1)
    assert report.accepted
    assert bowl.loss(theta) + decay / 2 * (theta @ theta) < bowl.loss(np.zeros(SIZE))
    assert state.damping == report.details["damping"] == optimizer.damping
    assert report.work.losses > 1 or hard < 2.5
    g = bowl.gradient(np.zeros(SIZE)).vector  # what the model predicts for the accepted part
    np.testing.assert_allclose(state.descent, -(g @ theta), rtol=1e-5)
    np.testing.assert_allclose(
        state.curvature - decay * theta @ theta, theta @ bowl.curvature @ theta, rtol=1e-5
    )


class Cliff(Bowl):
    """A risk that is higher everywhere except at the start."""

    def loss(self, theta):
        return super().loss(theta) + 100.0 * bool(np.any(theta))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_from_the_edge_of_a_cliff_no_step_is_taken(dtype, damping):
    optimizer = Subspace("gradient", damping=damping, damping_minimum=damping / 10)
    theta, state, reports = steps(optimizer, Cliff(), 3, dtype)
    assert not theta.any()
    assert [report.accepted for report in reports[:1]] == [False]
    assert reports[0].message == "step rejected: no part of it lowers the risk"
    assert 0 < reports[0].work.losses <= 30
    assert state.damping == damping


class Step(Bowl):
    """A risk that is 100 higher everywhere except at a point."""

    point = None

    def loss(self, theta):
        off = self.point is not None and bool(np.any(theta != self.point))
        return super().loss(theta) + 100.0 * off


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_beyond_a_cliff_a_step_is_solved_again_when_nothing_is_left_of_the_last(dtype):
    """Going back forever would not end."""
    bowl = Step()
    optimizer = Subspace("gradient", damping=1e-3)
    theta, state, _ = steps(optimizer, bowl, 1, dtype)
    bowl.point, reports = theta, []
    for _ in range(30):
        theta, state, report = optimizer.step(theta, state, Objectives(bowl, bowl))
        reports.append(report)
    back = [i for i, report in enumerate(reports) if report.message.startswith("the risk rose")]
    assert back == [*range(1, len(back) + 1)]
    assert 5 < len(back) < 20
    assert any(report.accepted and not report.converged for report in reports[len(back) + 1 :])


def test_weight_decay_is_part_of_the_model():
    bowl, decay = Bowl(), 0.7
    optimum = np.linalg.solve(bowl.curvature + decay * np.eye(SIZE), bowl.curvature @ bowl.centre)
    for candidates in 0, 3:
        theta, _, reports = steps(Subspace(weight_decay=decay, candidates=candidates), bowl, 40)
        np.testing.assert_allclose(theta, optimum, rtol=1e-3, atol=1e-4)
        assert reports[1].details["rho"] == pytest.approx(1.0, rel=0.05)


def test_candidates_are_not_taken_where_none_lowers_the_risk():
    bowl = Bowl(2, hard=8.0)
    optimizer = Subspace("gradient", damping=1e-3, candidates=1)
    theta, state, (report,) = steps(optimizer, bowl, 1)
    assert (report.accepted, report.message) == (False, "step rejected: no candidate lowers the risk")
    assert not theta.any()
    assert state.damping == 4e-3
    assert (report.work.losses, report.work.candidates) == (1, 0)
    _, _, reports = steps(replace(optimizer, candidates=3), bowl, 20)
    assert reports[-1].loss < 0.1 * reports[0].loss
    assert reports[0].work.candidates == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_move_nothing(bad):
    bowl = Bowl()
    optimizer, theta = Subspace(), np.zeros(SIZE)
    state = optimizer.init(theta, BLOCKS)
    bowl.factors[0] = bowl.factors[0][0] * bad, bowl.factors[0][1]
    with np.errstate(invalid="ignore"):
        after, later, report = optimizer.step(theta, state, Objectives(bowl, bowl))
    assert (report.accepted, report.message) == (False, "a direction is not finite")
    assert (after is theta, later is state) == (True, True)
    bowl.centre = bowl.centre * bad
    with np.errstate(invalid="ignore"):
        after, later, report = optimizer.step(theta, state, Objectives(bowl, bowl))
    assert (report.accepted, report.message) == (False, "the risk or its gradient is not finite")
    assert (after is theta, later is state) == (True, True)


def test_at_an_optimum_nothing_moves():
    bowl, optimizer = Bowl(), Subspace()
    after, _, report = optimizer.step(
        bowl.centre, optimizer.init(bowl.centre, BLOCKS), Objectives(bowl, bowl)
    )
    assert (report.accepted, report.message, report.converged) == (True, "the gradient is zero", True)
    np.testing.assert_array_equal(after, bowl.centre)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("candidates", [0, 1, 3])
@pytest.mark.parametrize("repeated", [True, False])
def test_a_step_that_promises_less_than_rounding_is_not_taken(dtype, candidates, repeated):
    bowl, optimizer = Bowl(1, least=1.0), Subspace(candidates=candidates)
    objectives = Objectives(bowl, bowl, repeated=repeated)
    theta = np.zeros(SIZE, dtype)
    state, reports = optimizer.init(theta, BLOCKS), []
    while not (reports and reports[-1].converged):
        before = theta, state
        theta, state, report = optimizer.step(theta, state, objectives)
        reports.append(report)
        assert len(reports) < 200
    assert (report.accepted, report.work.losses) == (True, 0)
    assert report.message.startswith("the predicted decrease is smaller than the rounding of the risk: theta")
    assert theta is before[0]
    assert state is before[1]
    assert bowl.loss(theta) - 1 < 1e-5 * reports[0].loss


def test_what_is_missing_is_one_sentence():
    class Bare(Bowl):
        factored_gradient = Objective.factored_gradient

    theta = np.zeros(SIZE)
    with pytest.raises(UserError, match=r"^subspace needs the matrices of theta: call init\(theta, obj"):
        Subspace().init(theta)
    state = Subspace().init(theta, BLOCKS)
    with pytest.raises(UserError, match=r"^the objective has no Kronecker factors: remove kfac from"):
        Subspace().step(theta, state, Objectives(Bare(), Bare()))
    with pytest.raises(UserError, match="a second-order step needs a curvature objective"):
        Subspace().step(theta, state, Objectives(Bowl()))
    for directions in "kfac+kfac", "kfac+soap":
        with pytest.raises(
            ValueError, match=r"^directions must be one or more of kfac, rows, gradient, rms joined by \+$"
        ):
            Subspace(directions)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"krylov": 1}, "optimizer subspace has no setting 'krylov'; it has directions, memory, cut, "),
    ({"metric": "kfac"}, "optimizer subspace has no setting 'metric'; it has directions, memory, cut, "),
    ({"directions": "kfac+soap"}, "optimizer subspace: directions must be one or more of kfac, rows, "),
])  # fmt: skip
def test_settings_of_earlier_versions_are_refused_with_a_sentence(changes, sentence):
    with pytest.raises(UserError, match=f"^{sentence}"):
        preset("subspace", **changes)


@pytest.mark.parametrize(
    "blocks", [BLOCKS, (Block("all", 0, 8, 5),), (Block("a", 0, 4, 5), Block("b", 20, 1, 20))]
)
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(("scale", "some"), [(2.0, (0, 1, 2)), (2.0, (0, 2)), (1e13, (0, 1, 2))])
def test_what_directions_have_in_each_block(blocks, cut, scale, some):
    """Also for a block that is as large as theta, but has a different shape than full directions."""
    rng = np.random.default_rng(6)
    vectors, g = rng.standard_normal((3, SIZE)), rng.standard_normal((2, SIZE))
    parts = layout.parts_of(blocks) if cut else [layout.whole(SIZE)]
    rows = [reduced_model.Row(p, i, scale) for p in parts for i in some]
    basis = reduced_model.Basis([vectors[:2], vectors[2:]], rows)
    along = basis.along()
    scales = along.scales[:, None]
    np.testing.assert_allclose(scales * along(g), basis.dense() @ g.T)
    found = np.zeros((len(basis), len(g)))
    for block, pieces in zip(blocks, along.by_block(blocks), strict=True):
        for first, part, v in pieces:
            found[first : first + len(v)] += v @ part.of_block(block.of(g)).reshape(len(g), -1).T
    np.testing.assert_allclose(scales * found, basis.dense() @ g.T)


@pytest.mark.parametrize(("size", "copied"), [(1.0, False), (1e-25, True), (1e25, True)])
def test_vectors_are_copied_where_float32_could_not_hold_their_products(size, copied):
    vectors = np.float32(size) * np.random.default_rng(7).standard_normal((3, SIZE)).astype(np.float32)
    basis, *_ = reduced_model.normalised(Bowl(), [vectors], [layout.whole(SIZE)], vectors[0])
    along, g = basis.along(), np.float32(1e-15) * np.ones((1, SIZE), np.float32)
    assert [np.shares_memory(stack, vectors) for _, stack in along.stacks] == [not copied]
    np.testing.assert_allclose(along.scales[:, None] * along(g), basis.dense() @ g.T, rtol=1e-5)


@pytest.mark.parametrize("stacked", [reduced_model.STACKED, 6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_basis_is_the_dense_matrix_of_its_rows(stacked, dtype, monkeypatch):
    monkeypatch.setattr(reduced_model, "STACKED", stacked)
    rng, parts = np.random.default_rng(4), layout.parts_of(BLOCKS)
    vectors, g = rng.standard_normal((3, SIZE)).astype(dtype), rng.standard_normal(SIZE).astype(dtype)
    parts[1].of(vectors[2])[...] = 0  # makes no row
    dense = []
    for part in parts:
        for vector in vectors:
            row = np.zeros(SIZE)
            part.of(row)[...] = part.of(vector)
            dense += [row / np.linalg.norm(row)] if row.any() else []
    dense, tolerance = np.array(dense), 20 * np.finfo(dtype).eps
    basis, gram, slopes = reduced_model.normalised(Bowl(), [vectors], parts, g)
    assert len(dense) == 3 * len(parts) - 1
    assert (basis.shape, basis.dtype) == (dense.shape, dtype)
    np.testing.assert_allclose(np.asarray(basis), dense, rtol=0, atol=tolerance)
    np.testing.assert_array_equal([*basis], basis.dense())
    some = np.full((5, SIZE), np.nan, dtype)
    basis.fill(7, some)
    np.testing.assert_array_equal(some, basis.dense()[7:12])
    np.testing.assert_allclose(gram, dense @ dense.T, rtol=0, atol=tolerance)
    np.testing.assert_allclose(slopes, dense @ g, rtol=0, atol=10 * tolerance)
    weights = rng.standard_normal(len(dense))
    np.testing.assert_allclose(basis.combined(weights), weights @ dense, rtol=0, atol=10 * tolerance)


class Straight(Objective):
    """A risk with many parameters in 16 parts, whose products G v need no memory."""

    blocks = (Block("a", 0, 1024, 256, cuts=tuple(range(64, 1024, 64))),)

    def loss(self, theta):
        return float(np.einsum("i,i->", theta, theta, dtype=np.float64)) / 2

    def gradient(self, theta):
        return Gradient(self.loss(theta), theta + 1)

    def project(self, theta):
        def projected(v):
            self.directions, few = len(v), np.empty((1, theta.size), theta.dtype)
            for start in range(len(v)):
                v.fill(start, few)
            return np.eye(len(v))

        return projected


def test_the_memory_of_a_step_does_not_grow_with_its_directions():
    objective = Straight()
    theta, peaks = np.ones(1024 * 256, np.float32), []
    for cut in (False, True):
        optimizer = Subspace("gradient+rms", memory=2, cut=cut)
        state = optimizer.init(theta, objective.blocks)
        optimizer.step(theta, state, Objectives(objective, objective))  # imports and first uses
        tracemalloc.start()
        optimizer.step(theta, state, Objectives(objective, objective))
        peaks.append(tracemalloc.get_traced_memory()[1] / theta.nbytes)
        tracemalloc.stop()
    assert objective.directions == 2 * 16
    assert peaks[1] < peaks[0] + 1 < 16, peaks
