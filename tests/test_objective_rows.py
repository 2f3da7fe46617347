"""Rows over ranks and dense matrices: S v, S'a, S S', S'S, residuals; slices, memory, micro-batches."""

import numpy as np
import pytest

from hfmpi.backends import create
from hfmpi.data.examples import Examples
from hfmpi.errors import UserError
from hfmpi.models.linearisation import LossLinearisation
from hfmpi.models.losses import choose, total_loss
from hfmpi.objective import local_rows, rows
from hfmpi.objective.data_parallel import DataParallel, Stopped
from hfmpi.objective.local_rows import signs
from hfmpi.objective.sums import Tree, pairwise_sum
from hfmpi.optim import Objective
from hfmpi.optim.layout import Along, whole
from hfmpi.optim.rows import RowRequest
from hfmpi.parallel.communicator import Communicator, MPICommunicator

EXAMPLES, STEPS, OUTPUTS = 13, 3, 2


class Vectors:
    """V (2, D), and V S'."""

    def __init__(self, size, dtype=np.float64):
        self.v = np.random.default_rng(9).standard_normal((2, size)).astype(dtype)

    def __len__(self):
        return len(self.v)

    def dense(self):
        return self.v

    def along(self):
        return Along([(whole(self.v.shape[1]), self.v)], np.ones(len(self.v)))


class Quadratic:
    """Outputs z_i = x_i theta + (y_i theta)^2 / 2, with rows x_i and y_i for each step and output."""

    linearisation = LossLinearisation

    def __init__(self, size, loss="squares", dtype="float64"):
        self.size, self.backend, self.output_loss = size, create("numpy", dtype), choose(loss)
        self.passes = 0

    def initial(self, seed):
        return np.random.default_rng(seed).standard_normal(self.size)

    def release(self):
        self.backend.release()

    def _outputs(self, theta, batch):
        shape = (len(batch.inputs), -1, OUTPUTS, 2, self.size)
        x, y = np.moveaxis(batch.inputs.astype(self.backend.dtype).reshape(shape), 3, 0)
        along = y @ theta
        return (x @ theta + along**2 / 2), x + along[..., None] * y

    def loss(self, theta, batch):
        z, _ = self._outputs(theta, batch)
        return total_loss(
            self.output_loss, self.backend, z.reshape(-1, OUTPUTS), batch.targets.reshape(-1, OUTPUTS), None
        )

    def linearise(self, theta, batch, reuse=None):
        self.passes += 1
        z, j = self._outputs(theta, batch)
        cache, targets = z.reshape(-1, OUTPUTS).copy(), batch.targets.reshape(-1, OUTPUTS)
        targets = targets.astype(self.backend.dtype)
        mask = None if batch.mask is None else batch.mask.reshape(-1, 1).astype(self.backend.dtype)
        loss = total_loss(self.output_loss, self.backend, cache, targets, mask)
        return LossLinearisation(
            Dense(j), self.output_loss, self.backend, cache, targets, mask, loss, self.backend.block_rows
        )


class Dense:
    """Passes with the Jacobian (B, T, O, D) in memory."""

    by_step = False

    def __init__(self, j):
        self.j, self.examples, self.nbytes = j, len(j), j.nbytes

    def vjp(self, u, out):
        out += np.tensordot(u.reshape(self.j.shape[:3]), self.j, 3)

    def rows(self, u, out):
        u = u.reshape(*self.j.shape[:2], out.shape[1], OUTPUTS)
        out[...] = np.einsum("btco,btod->bcd", u, self.j)

    def rows_along(self, u, several, along):
        rows = np.zeros((self.examples, several, self.j.shape[-1]), u.dtype)
        self.rows(u, rows)
        return along(rows.reshape(-1, rows.shape[-1])).reshape(-1, self.examples, several)


def data(size, masked=False):
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((EXAMPLES, STEPS, OUTPUTS * 2 * size))
    mask = (rng.random((EXAMPLES, STEPS)) < 0.7).astype(float) if masked else None
    return Examples(inputs, rng.random((EXAMPLES, STEPS, OUTPUTS)), mask)


def make(size, comm=None, loss="squares", dtype="float64", **options):
    model = Quadratic(size, loss, dtype)
    owner = DataParallel(model, comm or Communicator(), **options)
    return owner.on(data(size), np.arange(EXAMPLES)), model.initial(0).astype(dtype)


REQUESTS = [
    RowRequest("scores"),
    RowRequest("scores", 2),
    RowRequest("sketch", 3, 7),
    RowRequest("residuals", stored=False),
]
WIDE, NARROW = EXAMPLES * STEPS * OUTPUTS + 5, 7
"""More parameters than rows of residuals, and fewer."""


def dense(size, request, masked=False):
    """Return S by its definition, with the residuals, the gradient and N."""
    model, cases = Quadratic(size), data(size, masked)
    theta = model.initial(0)
    at = model.linearise(theta, cases.take(np.arange(EXAMPLES)))
    j, weight = at.passes.j, np.ones((EXAMPLES, STEPS)) if cases.mask is None else cases.mask
    r = at.cache.reshape(EXAMPLES, STEPS, OUTPUTS) * weight[..., None]
    segment = [k for k in range(request.segments) for t in range(STEPS) if _in(k, t, request.segments)]
    if request.kind == "residuals":
        s = (j * weight[..., None, None]).reshape(-1, size)
    else:
        e = signs(request.seed, np.arange(EXAMPLES), STEPS * OUTPUTS).reshape(r.shape) * weight[..., None]
        u = e if request.kind == "sketch" else r
        terms = np.einsum("bto,btod->btd", u, j)
        s = np.zeros((EXAMPLES, request.segments, size))
        for t, k in enumerate(segment):
            s[:, k] += terms[:, t]
        s = s.reshape(-1, size)
    return s, r.reshape(-1), np.tensordot(r, j, 3) / weight.sum(), int(weight.sum())


def _in(k, t, segments):
    return STEPS * k // segments <= t < STEPS * (k + 1) // segments


def check(found, size, request, rtol=1e-12):
    s, r, gradient, scored = dense(size, request)
    close = {"rtol": rtol, "atol": rtol * abs(s).max() ** 2 * len(s)}
    v, a = np.random.default_rng(1).standard_normal(size), np.random.default_rng(2).standard_normal(len(s))
    assert (found.count, found.scored, found.cotangents) == (len(s), scored, len(s) // EXAMPLES)
    np.testing.assert_allclose(found.gradient, gradient, **close)
    np.testing.assert_allclose(found.normal(), s.T @ s, **close)
    if request.kind == "residuals":
        np.testing.assert_allclose(found.residuals, r, **close)
    if request.stored or len(s) < size:
        np.testing.assert_allclose(found.times(v.astype(found.gradient.dtype)), s @ v, **close)
        np.testing.assert_allclose(found.transposed(a), s.T @ a, **close)
        gram = found.gram()
        np.testing.assert_array_equal(gram, gram.T)
        np.testing.assert_allclose(gram, s @ s.T, **close)


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("request_", REQUESTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"slices": 4}])
def test_rows_match_dense_matrices(size, request_, options):
    risk, theta = make(size, **options)
    check(risk.rows(theta, request_), size, request_)


def check_sketch(risk, theta, size, rtol=1e-12):
    """Compare V S'S V' / N with dense rows."""
    request, basis = RowRequest("sketch", 3, 7), Vectors(size, theta.dtype)
    (s, _, _, scored), found = dense(size, request), risk.sketch(theta, basis, request)
    np.testing.assert_allclose(found.projected, basis.v @ s.T @ s @ basis.v.T / scored, rtol=rtol)
    assert (found.rows, found.cotangents) == (3 * EXAMPLES, 3)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"slices": 4}])
def test_a_model_from_a_sketch_is_that_of_dense_rows(options):
    risk, theta = make(WIDE, **options)
    check_sketch(risk, theta, WIDE)
    arguments = theta, Vectors(WIDE), RowRequest("sketch", 3, 7)
    own, found = (
        Objective.sketch(risk, *arguments),
        risk.sketch(*arguments),
    )  # from stored rows, and from none
    np.testing.assert_allclose(own.projected, found.projected, rtol=1e-12)
    assert own[1:] == found[1:]


def test_the_mean_of_models_from_sketches_is_the_model():
    risk, theta = make(NARROW)
    basis, many = Vectors(NARROW), 4000
    found = [risk.sketch(theta, basis, RowRequest("sketch", 2, seed)).projected for seed in range(many)]
    s, _, _, scored = dense(NARROW, RowRequest("residuals"))
    exact = basis.v @ s.T @ s @ basis.v.T / scored
    # The square of a row has a relative variance of at most 2: 26 rows, 4000 times.
    np.testing.assert_allclose(np.mean(found, axis=0), exact, atol=4 * np.sqrt(2 / (26 * many)) * exact.max())


def test_rows_of_float32_are_multiplied_in_float64():
    risk, theta = make(WIDE, dtype="float32")
    found = risk.rows(theta, RowRequest("residuals"))
    check(found, WIDE, RowRequest("residuals"), rtol=1e-5)
    stored = found.slices[0].stored.astype(np.float64)
    np.testing.assert_allclose(found.gram(), stored @ stored.T, rtol=1e-14)


@pytest.mark.parametrize("kind", ["scores", "sketch"])
def test_no_example_has_more_segments_than_steps(kind):
    risk, theta = make(WIDE)
    found, fewer = (risk.rows(theta, RowRequest(kind, segments)) for segments in (STEPS + 4, STEPS))
    assert (found.count, found.cotangents) == (EXAMPLES * STEPS, STEPS)
    np.testing.assert_array_equal(found.gram(), fewer.gram())


def test_many_rows_of_residuals_need_not_be_stored():
    risk, theta = make(NARROW)
    check(risk.rows(theta, RowRequest("residuals")), NARROW, RowRequest("residuals"))
    found = risk.rows(theta, RowRequest("residuals", stored=False))
    assert found.slices[0].stored is None
    with pytest.raises(UserError, match="not stored"):
        found.gram()


def test_a_pass_computes_no_more_rows_than_fit(monkeypatch):
    monkeypatch.setattr(local_rows, "AT_ONCE", 2 * STEPS * OUTPUTS * WIDE)
    risk, theta = make(WIDE)
    first, second = (risk.rows(theta, RowRequest("residuals")) for _ in range(2))
    check(first, WIDE, RowRequest("residuals"))
    np.testing.assert_array_equal(first.gram(), second.gram())
    assert risk.owner.model.passes == 1 + 2 * 7  # the first batch showed the size; then 2 examples at a time


def test_columns_are_exchanged_in_parts(monkeypatch):
    monkeypatch.setattr(rows, "EXCHANGED", 3 * EXAMPLES)
    risk, theta = make(WIDE, slices=4)
    check(risk.rows(theta, RowRequest("scores")), WIDE, RowRequest("scores"))


@pytest.mark.parametrize(
    ("size", "words"), [(WIDE, "rows of this rank's examples"), (NARROW, "matrix of 7 x 7")]
)
def test_a_sentence_where_the_memory_budget_does_not_suffice(size, words):
    risk, theta = make(size, memory_budget=300.0)
    with pytest.raises(UserError, match=words):
        risk.rows(theta, RowRequest("residuals", stored=False))


def test_the_memory_that_runs_out_makes_micro_batches_smaller(monkeypatch):
    risk, theta = make(WIDE)
    original, failures = Quadratic.linearise, iter([True, True])

    def linearise(self, theta, batch, reuse=None):
        if next(failures, False):
            raise MemoryError
        return original(self, theta, batch, reuse)

    monkeypatch.setattr(Quadratic, "linearise", linearise)
    check(risk.rows(theta, RowRequest("scores")), WIDE, RowRequest("scores"))


def test_a_stop_ends_rows_and_their_products():
    stop = [False]
    risk, theta = make(WIDE, stop=lambda: stop[0])
    found = risk.rows(theta, RowRequest("scores"))
    stop[0] = True
    for call in (
        lambda: risk.rows(theta, RowRequest("scores")),
        found.gram,
        found.normal,
        lambda: found.times(theta),
        lambda: found.transposed(np.ones(found.count)),
    ):
        with pytest.raises(Stopped):
            call()


def test_masked_outputs_have_rows_of_zeros():
    model, cases = Quadratic(WIDE), data(WIDE, masked=True)
    risk = DataParallel(model, Communicator()).on(cases, np.arange(EXAMPLES))
    found = risk.rows(model.initial(0), RowRequest("residuals"))
    s, _r, gradient, scored = dense(WIDE, RowRequest("residuals"), masked=True)
    assert found.scored == scored < EXAMPLES * STEPS
    np.testing.assert_allclose(found.gram(), s @ s.T, rtol=1e-12)
    np.testing.assert_allclose(found.gradient, gradient, rtol=1e-12)
    np.testing.assert_allclose(found.transposed(found.residuals) / scored, gradient, rtol=1e-12)


def test_signs_depend_on_seed_and_example_alone():
    e = signs(3, np.arange(1000), 40)
    assert set(np.unique(e)) == {-1, 1}
    np.testing.assert_array_equal(signs(3, np.array([7, 999]), 40), e[[7, 999]])
    assert abs(e.mean()) < 0.02
    assert (signs(4, np.arange(1000), 40) == e).mean() == pytest.approx(0.5, abs=0.02)
    assert np.abs(np.corrcoef(e.T) - np.eye(40)).max() < 0.15


def test_a_tree_adds_as_pairs_do():
    parts = [np.array([x]) for x in np.random.default_rng(0).standard_normal(16)]
    tree = Tree()
    for part in parts:
        tree.add(part.copy())
    np.testing.assert_array_equal(tree.total, pairwise_sum(parts))


def every_number(risk, theta, size):
    """Return all results of rows of every kind, for bitwise comparison."""
    numbers = []
    for request in REQUESTS:
        found = risk.rows(theta, request)
        a = np.linspace(-1, 1, found.count)
        numbers += [found.loss, found.gradient, found.normal(), found.residuals]
        if request.stored or found.count < size:
            numbers += [found.gram(), found.times(theta), found.transposed(a)]
    numbers.append(risk.sketch(theta, Vectors(size, theta.dtype), RowRequest("sketch", 2, 5)).projected)
    return numbers


@pytest.mark.mpi(ranks=[2, 3])
def test_ranks_share_rows(comm):
    for size in WIDE, NARROW:
        for request in REQUESTS:
            risk, theta = make(size, MPICommunicator(comm), micro_batch=3)
            check(risk.rows(theta, request), size, request)
    check_sketch(risk, theta, NARROW)


@pytest.mark.mpi(ranks=[2, 4])
def test_slices_give_the_same_numbers_on_any_number_of_ranks(comm):
    for dtype in "float32", "float64":
        risk, theta = make(WIDE, MPICommunicator(comm), dtype=dtype, slices=8)
        alone, _ = make(WIDE, dtype=dtype, slices=8)
        numbers = zip(every_number(risk, theta, WIDE), every_number(alone, theta, WIDE), strict=True)
        for ours, expected in numbers:
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.mpi(ranks=[4])
def test_some_ranks_without_examples(comm):
    for size in WIDE, NARROW:
        check_few(comm, size)


def check_few(comm, size):
    """Compare ranks, one of which has no example, with one rank."""
    request, few = RowRequest("residuals"), np.arange(3)
    ours, alone = (
        make(size, communicator)[0].owner.on(data(size), few)
        for communicator in (MPICommunicator(comm), Communicator())
    )
    theta = Quadratic(size).initial(0)
    found, expected = ours.rows(theta, request), alone.rows(theta, request)
    assert (found.count, found.cotangents) == (3 * STEPS * OUTPUTS, STEPS * OUTPUTS)
    for name in ("gradient", "residuals"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    np.testing.assert_allclose(found.normal(), expected.normal(), rtol=1e-12, atol=1e-12)
    if size == WIDE:
        np.testing.assert_allclose(found.gram(), expected.gram(), rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=[2])
def test_a_rank_whose_memory_does_not_suffice_ends_all(comm):
    budget = np.inf if comm.rank == 0 else 300.0
    risk, theta = make(WIDE, MPICommunicator(comm), memory_budget=budget)
    with pytest.raises(UserError, match="memory budget"):
        risk.rows(theta, RowRequest("residuals"))
