"""The mean risk over all ranks compared with the independent implementation, on 1 to 4 ranks."""

import math

import independent
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from on_host import turned

from hfmpi.backends import create
from hfmpi.data.batches import Sequences, global_indices
from hfmpi.data.dropout import Dropout
from hfmpi.errors import UserError
from hfmpi.networks.architecture import Architecture
from hfmpi.networks.network import Network
from hfmpi.objective.data_parallel import DataParallel, Stopped, step_objectives
from hfmpi.objective.messages import pack, unpack
from hfmpi.objective.shares import shares
from hfmpi.optim import SOAP, Gradient, HessianFree, Muon, Objective, Objectives
from hfmpi.optim.layout import Block
from hfmpi.parallel.communicator import Communicator, MPICommunicator, digest

LENGTH, BURN_IN, VOCABULARY, HIDDEN = 5, 2, 4, 3
KINDS = [("rnn", "standard"), ("mrnn", "standard"), ("lstm", "krause"), ("mlstm", "standard")]


def make(
    name="mlstm", variant="standard", comm=None, micro_batch=64, dtype="float64", backend="numpy", **options
):
    """Return a mean risk, 12 sequences for it, and a theta; the same ones in every call."""
    rng = np.random.default_rng(1)
    about = Architecture(name, HIDDEN, VOCABULARY, VOCABULARY, variant=variant)
    sequences = Sequences(rng.integers(0, VOCABULARY, 12 * LENGTH).astype(np.uint8), LENGTH, BURN_IN)
    theta = (0.5 * rng.standard_normal(about.layout.size)).astype(dtype)
    network = Network(about, create(backend, dtype))
    return DataParallel(network, comm or Communicator(), micro_batch=micro_batch, **options), sequences, theta


def everything(risk, theta, v):
    """Return the results of all computations of an objective, as vectors on the host."""
    backend = risk.owner.model.backend
    columns = backend.to_device(np.array([v, theta, v - theta]))
    theta, v = backend.to_device(theta), backend.to_device(v)
    plain, squared = risk.gradient(theta), risk.squared_gradients(theta)
    assert plain.squares is None
    found = {
        "loss": np.array([risk.loss(theta)]),
        "loss with the gradient": np.array([plain.loss]),
        "loss with the squares": np.array([squared.loss]),
        "gradient": plain.vector,
        "gradient with the squares": squared.vector,
        "squares": squared.squares,
        "losses": np.array(risk.losses([theta, theta + v, theta])),
        "product": risk.gauss_newton(theta)(v),
        "projection": risk.project(theta)(columns),
        "factors": risk.factored_gradient(theta)[1],
        "gradient with factors": risk.factored_gradient(theta)[0].vector,
        "damped product": risk.structural_gauss_newton(theta, 0.7)(v),
    }
    return {k: x if isinstance(x, np.ndarray) else backend.to_host(x) for k, x in found.items()}


def relative(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300)


@pytest.mark.parametrize("backend", ["numpy", "numba", "cupy"])
@pytest.mark.parametrize(("name", "variant"), KINDS)
def test_means_match_the_independent_implementation(name, variant, backend):
    owner, sequences, theta = make(name, variant, micro_batch=2, backend=backend)
    about, indices = owner.model.architecture, np.array([7, 0, 11])
    v = np.random.default_rng(2).standard_normal(theta.size)
    found = everything(owner.on(sequences, indices), theta, v)

    batch, characters = turned(sequences.take(indices)), 3 * LENGTH
    assert batch.inputs.shape == (LENGTH + BURN_IN, 3)
    gradient = independent.gradient(theta, about, batch) / characters
    singles = [turned(sequences.take(indices[i : i + 1])) for i in range(3)]
    squares = np.mean([(independent.gradient(theta, about, one) / LENGTH) ** 2 for one in singles], axis=0)
    expected = {
        "loss": np.array([independent.loss(theta, about, batch) / characters]),
        "gradient": gradient,
        "squares": squares,
        "product": independent.gauss_newton(theta, about, batch) @ v / characters,
        "damped product": independent.gauss_newton(theta, about, batch, structural=0.7) @ v / characters,
    }
    columns = np.array([v, theta, v - theta])
    expected["projection"] = columns @ independent.gauss_newton(theta, about, batch) @ columns.T / characters
    losses = [independent.loss(at, about, batch) / characters for at in (theta, theta + v, theta)]
    expected["losses"] = np.array(losses)
    expected["factors"] = found["factors"]  # tests/test_kronecker.py
    for key, value in found.items():
        assert relative(value, expected[key.split(" with")[0]]) < 1e-10, key


@given(st.sampled_from(KINDS), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_micro_batches_do_not_change_the_result(kind, size, micro_batch, seed):
    rng = np.random.default_rng(seed)
    indices = rng.permutation(12)[:size]
    results = []
    for most in (64, micro_batch):
        owner, sequences, theta = make(*kind, micro_batch=most)
        results.append(everything(owner.on(sequences, indices), theta, np.cos(np.arange(theta.size))))
    for key, value in results[1].items():
        assert relative(value, results[0][key]) < 1e-11, key


def test_one_mean_risk_serves_batches_of_any_size_in_turn():
    owner, sequences, theta = make(micro_batch=2)
    v = np.cos(np.arange(theta.size))
    for size in (5, 1, 12, 3):  # tapes of one size are reused for another
        indices = np.arange(size)
        again = everything(owner.on(sequences, indices), theta, v)
        fresh, _, _ = make(micro_batch=2)
        for key, value in everything(fresh.on(sequences, indices), theta, v).items():
            np.testing.assert_array_equal(again[key], value, key)


def test_a_product_leaves_its_operator_as_it_was():
    owner, sequences, theta = make(micro_batch=2)
    product = owner.on(sequences, np.arange(5)).structural_gauss_newton(theta, 0.5)
    v, w = np.cos(np.arange(theta.size)), np.sin(np.arange(theta.size))
    first = product(v)
    kept = first.copy()
    product(w)
    owner.on(sequences, np.arange(9)).squared_gradients(theta)
    owner.on(sequences, np.arange(9)).loss(theta)
    np.testing.assert_array_equal(first, kept)  # a new vector each time
    np.testing.assert_array_equal(product(v), kept)


@pytest.mark.parametrize(("name", "variant"), KINDS)
def test_a_memory_budget_changes_no_bit(name, variant):
    results = []
    for budget, kept in ((math.inf, 3), (1.5, 1), (0, 0)):  # of three micro-batches
        owner, sequences, theta = make(name, variant, micro_batch=2)
        owner.local.memory_budget = budget * owner.model.tape_bytes(LENGTH + BURN_IN, 2, structural=True)
        product = owner.on(sequences, np.arange(6)).structural_gauss_newton(theta, 0.5)
        assert len(owner.local.linearisations) == kept
        v, w = np.cos(np.arange(theta.size)), np.sin(np.arange(theta.size))
        results.append((product(v), product(w), product(v)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "variant"), KINDS)
@pytest.mark.parametrize("structural", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_tape_bytes_are_what_a_tape_takes(name, variant, structural, dropout):
    owner, sequences, theta = make(name, variant)
    batch = sequences.take(np.arange(5))
    if dropout:
        about = owner.model.architecture
        batch = Dropout(sequences, 0.2, about.layers, about.hidden, 0, 0).take(np.arange(5))
    tape = (owner.model.linearise_structural if structural else owner.model.linearise)(theta, batch)
    # In addition, a tape has copies of matrices and biases, a few MB for any batch.
    taken = sum(flat.nbytes for name, flat in tape.passes.memory.flat.items() if name[:2] not in ("W_", "b_"))
    unscored = BURN_IN * 5 * VOCABULARY * 8  # logits of the warm-up, counted though not kept
    assert owner.model.tape_bytes(LENGTH + BURN_IN, 5, structural, dropout=dropout) == taken + unscored


def test_a_linearisation_that_turns_out_too_large_is_not_kept_and_the_next_ones_not_tried():
    """The size of the first one is only known after it was made; the others have the same size."""
    owner, sequences, theta = make(micro_batch=2)
    made, linearise = [], owner.model.linearise

    def counting(*arguments):
        made.append(linearise(*arguments))
        return made[-1]

    owner.model.linearise = counting
    size = owner.model.linearise(theta, sequences.take(np.arange(2))).nbytes
    for budget, tried in ((0, 1), (size, 1), (2 * size, 2), (2 * size + 1, 2)):
        owner.local.memory_budget = budget
        made.clear()
        owner.on(sequences, np.arange(8)).gauss_newton(theta)
        assert len(made) == tried
        assert len(owner.local.linearisations) == budget // size


@pytest.mark.parametrize("budget", [0, 10_000, math.inf])
@pytest.mark.parametrize("beside", ["gradient", "squared_gradients", "factored_gradient"])
def test_the_pass_of_the_gradient_linearises_the_curvature_batch(beside, budget):
    owner, sequences, theta = make(micro_batch=2)
    owner.local.memory_budget = budget
    plain = owner.on(sequences, global_indices(0, 1, 9, 12))
    linearise, made = owner.model.linearise, []

    def counting(*arguments):
        made.append(arguments[1].inputs.shape[0])
        return linearise(*arguments)

    owner.model.linearise = counting
    v = np.random.default_rng(2).standard_normal((3, theta.size))
    expected = getattr(plain, beside)(theta)
    given = step_objectives(owner, sequences, 0, 1, 9, 4)
    assert given.shared
    own = given.second.project(theta)(v)
    made.clear()
    found = getattr(given.gradient, beside)(theta)
    pairs = zip(found, expected, strict=True) if beside == "factored_gradient" else [(found, expected)]
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            if b is not None:
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    if budget == math.inf:
        assert sum(made) == 9
        made.clear()
    np.testing.assert_array_equal(given.second.project(theta)(v), own)
    if budget == math.inf:
        assert not made
    # At a different theta, and for different products, it is linearised again.
    away = theta + 1e-3
    np.testing.assert_array_equal(
        given.second.project(away)(v), step_objectives(owner, sequences, 0, 1, 9, 4).second.project(away)(v)
    )
    damped = given.second.structural_gauss_newton(theta, 0.5)(v[0])
    other = step_objectives(owner, sequences, 0, 1, 9, 4).second.gauss_newton(theta)(v[0])
    np.testing.assert_allclose(given.second.gauss_newton(theta)(v[0]), other)
    np.testing.assert_array_equal(given.second.structural_gauss_newton(theta, 0.5)(v[0]), damped)


# Matrices --------------------------------------------------------------------------------------


@st.composite
def architectures(draw):
    name = draw(st.sampled_from(["rnn", "mrnn", "lstm", "mlstm", "gru"]))
    variant = draw(st.sampled_from(["standard", "krause"] if "lstm" in name else ["standard"]))
    n, inputs, outputs, layers = (draw(st.integers(1, most)) for most in (6, 9, 9, 3))
    return Architecture(name, n, inputs, outputs, layers=layers, variant=variant)


@given(architectures())
@settings(deadline=None, max_examples=80)
def test_blocks_are_the_affine_maps_and_all_of_theta(about):
    """Rows are the inputs of an output of the map, columns the outputs: W, and b if it is added to them."""
    theta = np.arange(about.layout.size)
    views, n = about.layout.views(theta), about.hidden
    at, expected = 0, []
    for layer in range(about.layers):
        end = f".{layer + 1}" if layer else ""
        inputs, groups = (
            n if layer else about.inputs,
            {"gru": 3}.get(about.name, 4 if "lstm" in about.name else 1),
        )
        if about.name in ("mrnn", "mlstm"):
            expected += [("W_mx" + end, inputs, n), ("W_mh" + end, n, n)]
        if about.name == "gru":
            shapes = ("W_x", inputs, groups), ("W_h", n, groups), ("b", 1, 4)
            expected += [(name + end, rows, columns * n) for name, rows, columns in shapes]
        elif about.variant == "krause":  # three quarters of b are no part of the map, but inside the unit
            expected += [(f"W_x{end} W_h{end}", inputs + n, groups * n), ("b" + end, 1, groups * n)]
        else:
            expected += [(f"W_x{end} W_h{end} b{end}", inputs + n + 1, groups * n)]
    bias = about.variant == "standard"
    expected += [("W_o b_o" if bias else "W_o", n + bias, about.outputs)]
    assert [(block.name, block.rows, block.columns) for block in about.blocks] == expected
    for block in about.blocks:
        assert block.start == at
        at += block.rows * block.columns
        stacked = np.vstack([np.atleast_2d(views[name]) for name in block.name.split()])
        np.testing.assert_array_equal(block.of(theta), stacked)
    assert at == theta.size
    block.of(theta)[...] = -1  # a view
    assert theta[-1] == -1


def test_an_objective_has_the_blocks_of_its_model():
    owner, sequences, _ = make()
    assert owner.on(sequences, np.arange(3)).blocks == owner.model.blocks == owner.model.architecture.blocks
    with pytest.raises(
        UserError, match=r"does not define the matrices of theta \(blocks\): use another optimizer"
    ):
        _ = DataParallel(Line(), Communicator()).on(Rows(), np.arange(3)).blocks


def spread(risk, sizes, wide=False):
    """Distribute works of these sizes; return the results and the works of this rank."""
    done, kind = [], np.dtype(np.float64) if wide else risk.owner.model.backend.dtype

    def work(i):
        done.append(i)
        return np.random.default_rng(i).standard_normal(sizes[i]).astype(kind) * kind.type(
            -0.0 if i == 2 else 1
        )

    return risk.spread([lambda i=i: work(i) for i in range(len(sizes))], sizes, wide), done


@pytest.mark.parametrize("sizes", [[3, 700, 2, 40, 1, 300, 300], [5], []])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wide", [False, True])
def test_works_come_back_in_order(sizes, dtype, wide):
    owner, sequences, _ = make(dtype=dtype)
    found, done = spread(owner.on(sequences, np.arange(3)), sizes, wide)
    assert sorted(done) == list(range(len(sizes)))
    dtype = "float64" if wide else dtype
    for i, own in enumerate(found):
        assert own.dtype == dtype
        expected = np.random.default_rng(i).standard_normal(sizes[i]).astype(dtype)
        np.testing.assert_array_equal(own, 0 * expected if i == 2 else expected)


@given(st.lists(st.integers(0, 1000), max_size=12), st.integers(1, 6))
def test_works_are_shared_out(sizes, ranks):
    found = shares(sizes, ranks)
    assert sorted(i for own in found for i in own) == list(range(len(sizes)))
    most = max(sum(sizes[i] for i in own) for own in found)
    assert most <= sum(sizes) / ranks + max(sizes, default=0)  # Graham (1966)


# Any model -------------------------------------------------------------------------------------


class Rows:
    """Cases of a table: x (N, D) and y (N,)."""

    def __init__(self, count=9, size=4):
        rng = np.random.default_rng(4)
        self.count, self.x, self.y = count, rng.standard_normal((count, size)), rng.standard_normal(count)

    def take(self, indices):
        return self.x[indices], self.y[indices]

    def scored(self, indices):
        return len(indices)


class Line:
    """Linear least squares: a minimal model, with neither squares nor structural damping."""

    def __init__(self, size=4):
        self.size, self.backend = size, create("numpy", "float64")

    def initial(self, seed):
        return np.random.default_rng(seed).standard_normal(self.size)

    def loss(self, theta, batch):
        return self.linearise(theta, batch).loss

    def linearise(self, theta, batch, reuse=None):
        return Residual(*batch, theta)

    def release(self):
        pass


class Residual:
    def __init__(self, x, y, theta):
        self.x, self.error = x, x @ theta - y
        self.loss, self.nbytes = float(self.error @ self.error) / 2, x.nbytes

    def gradient(self, scale, out):
        out += scale * self.vjp(self.error, np.zeros_like(out))

    def jvp(self, v):
        return self.x @ v

    def vjp(self, u, out):
        out += self.x.T @ u
        return out

    def gauss_newton(self, v, scale, out):
        out += scale * self.vjp(self.jvp(v), np.zeros_like(out))


def check_line(communicator, slices=0):
    """Check sums and a step against dense algebra, and the missing features, on any number of ranks."""
    rows, model = Rows(), Line()
    owner = DataParallel(model, communicator, micro_batch=2, slices=slices)
    theta, v = model.initial(0), model.initial(1)
    for indices in (np.array([5, 0, 7, 2, 8, 1]), np.array([3])):
        risk, (x, y) = owner.on(rows, indices), rows.take(indices)
        error = x @ theta - y
        at = risk.gradient(theta)
        assert risk.loss(theta) == pytest.approx(error @ error / 2 / len(indices), rel=1e-14)
        assert at.loss == pytest.approx(risk.loss(theta), rel=1e-13)
        assert relative(at.vector, x.T @ error / len(indices)) < 1e-13
        assert relative(risk.gauss_newton(theta)(v), x.T @ (x @ v) / len(indices)) < 1e-13
        both, dense = np.array([v, theta]), x.T @ x / len(indices)
        assert relative(risk.project(theta)(both), both @ dense @ both.T) < 1e-13
        assert risk.losses([v, theta]) == [risk.loss(v), risk.loss(theta)]
    whole = owner.on(rows, np.arange(rows.count))
    objectives = Objectives(whole, whole)
    optimizer = HessianFree(damping=0.0, preconditioner="none")
    after, _, _ = optimizer.step(theta, optimizer.init(theta), objectives)
    assert np.allclose(after, np.linalg.lstsq(rows.x, rows.y)[0], rtol=1e-10)
    assert communicator.same(digest(after)) == []
    one = owner.on(rows, np.arange(1))  # most ranks have no example of it
    for objectives in (Objectives(whole, whole), Objectives(one, one)):
        for changes, sentence in (
            (
                {"preconditioner": "diagonal"},
                "the objective has no squared gradients, which preconditioner=diagonal needs: set "
                "preconditioner=auto or none",
            ),
            (
                {"preconditioner": "none", "structural_damping": 0.5},
                "the model has no structural damping: set structural_damping=0",
            ),
        ):
            lacking = HessianFree(damping=1.0, **changes)
            with pytest.raises(UserError, match=f"^{sentence}$"):
                lacking.step(theta, lacking.init(theta), objectives)
            assert communicator.any(False) is False  # all ranks are here


@pytest.mark.parametrize("slices", [0, 4])
def test_any_model_will_do(slices):
    check_line(Communicator(), slices)


@pytest.mark.mpi(ranks=[2, 4], timeout=60, unit="s")
def test_any_model_will_do_on_any_number_of_ranks(mpi_ranks, comm):
    assert comm.size == mpi_ranks
    communicator = MPICommunicator(comm)
    for slices in (0, 4):
        check_line(communicator, slices)
    communicator.close()


def test_an_objective_of_ones_own_says_what_it_lacks():
    class Bare(Objective):
        def loss(self, theta):
            return float(theta @ theta) / 2

        def gradient(self, theta):
            return Gradient(self.loss(theta), theta.copy())

    class Curved(Bare):
        def gauss_newton(self, theta):
            return lambda v: v.copy()

    theta = np.ones(3)
    for objectives, changes, words in (
        (Objectives(Bare()), {"preconditioner": "diagonal"}, "needs: set preconditioner=auto or none"),
        (Objectives(Bare()), {"preconditioner": "none"}, "needs a curvature objective"),
        (Objectives(Bare(), Bare()), {"preconditioner": "none"}, "no Gauss-Newton products"),
        (
            Objectives(Curved(), Curved()),
            {"preconditioner": "none", "structural_damping": 0.1},
            "no structural damping: set structural_damping=0",
        ),
    ):
        optimizer = HessianFree(damping=1.0, **changes)
        with pytest.raises(UserError, match=words):
            optimizer.step(theta, optimizer.init(theta), objectives)
    for optimizer in (SOAP(), Muon()):
        state = optimizer.init(theta, (Block("all", 0, 1, 3),))
        with pytest.raises(UserError, match=r"does not define the matrices of theta \(blocks\)"):
            optimizer.step(theta, state, Objectives(Bare()))
    optimizer = HessianFree(damping=1.0, preconditioner="none")
    _, _, report = optimizer.step(theta, optimizer.init(theta), Objectives(Curved(), Curved()))
    assert report.accepted
    with pytest.raises(TypeError, match="abstract"):
        Objective()


class Listening(Communicator):
    """One rank that counts the messages it would send: summed vectors, and scalars that are agreed on."""

    sums = agreements = 0

    def sum(self, vector):
        self.sums += 1

    def agree(self, value):
        self.agreements += 1
        return value


@pytest.mark.parametrize("refresh", [0, 2])
def test_a_cg_iteration_sends_one_vector_and_one_message_of_scalars(refresh):
    rows, comm = Rows(count=40, size=20), Listening()
    risk = DataParallel(Line(20), comm).on(rows, np.arange(40))
    optimizer = HessianFree(
        damping=0.1, preconditioner="none", cg_max_steps=7, cg_tolerance=0.0, cg_refresh=refresh
    )
    theta = np.zeros(20)
    _, _, report = optimizer.step(theta, optimizer.init(theta), Objectives(risk, risk))
    assert report.work.cg_steps == 7
    assert report.work.products == 7 + (3 if refresh else 0)
    assert comm.sums == 1 + report.work.products + report.work.losses
    # In addition: the gradient, the start of CG and the choice; each loss is agreed on as well.
    assert comm.agreements == 3 + report.work.products + report.work.losses


def test_the_mean_is_over_what_is_scored():
    """Examples with 3, 1 and 0 scored outputs: sums divided by sums, never a mean of means."""

    class Some(Rows):
        def scored(self, indices):
            return int(np.array([3, 1, 0] * 3)[indices].sum())

    rows, theta = Some(), np.ones(4)
    owner = DataParallel(Line(), Communicator(), micro_batch=2)
    for indices, count in ((np.arange(3), 4), (np.array([1, 4]), 2)):
        x, y = rows.take(indices)
        risk, total = owner.on(rows, indices), np.sum((x @ theta - y) ** 2) / 2
        assert risk.loss(theta) == pytest.approx(total / count, rel=1e-14)
        assert risk.gradient(theta).loss == pytest.approx(total / count, rel=1e-13)
        assert relative(risk.gauss_newton(theta)(theta), x.T @ (x @ theta) / count) < 1e-13
    with pytest.raises(UserError, match="a batch has no scored outputs"):
        owner.on(rows, np.array([2, 5]))


# A loss in a message of float32 ----------------------------------------------------------------


@given(st.integers(1, 1000), st.floats(0, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_a_packed_loss_is_summed_exactly_in_any_order(ranks, mean, seed):
    rng = np.random.default_rng(seed)
    losses = rng.dirichlet(np.ones(ranks)) * mean
    messages = np.array([pack(loss) for loss in losses])
    assert messages.dtype == np.float32
    total = np.zeros_like(messages[0])
    for message in messages:
        total += message
    expected = math.fsum(losses)
    assert unpack(total) == pytest.approx(expected, rel=1e-13, abs=2e-13)
    order = rng.permutation(ranks)
    while len(order) > 1:  # a tree, in another order
        half = len(order) // 2
        messages[order[:half]] += messages[order[-half:]]
        order = order[: len(order) - half]
    np.testing.assert_array_equal(messages[order[0]], total)


@given(st.floats(0, 1e4))
@settings(deadline=None)
def test_one_packed_loss_comes_back(loss):
    assert unpack(pack(loss)) == pytest.approx(loss, rel=1e-15, abs=2.0**-53)


@given(st.floats(0, 1e300))
@settings(deadline=None, derandomize=True)
def test_a_message_of_float64_has_all_digits_of_its_loss(loss):
    assert unpack(pack(loss, np.float64)) == loss
    assert unpack(pack(loss, np.float64) + pack(2 * loss, np.float64)) == loss + 2 * loss


def test_what_is_not_finite_arrives():
    finite = pack(1.5)
    assert unpack(finite + pack(math.inf)) == math.inf
    assert math.isnan(unpack(finite + pack(math.nan)))
    assert unpack(finite + pack(1e300)) == math.inf  # too large for the message
    assert unpack(pack(1e30)) == pytest.approx(1e30, rel=1e-6)


def test_the_loss_of_a_float32_gradient_has_double_precision():
    owner, sequences, theta = make(dtype="float32", micro_batch=4)
    risk = owner.on(sequences, np.arange(12))
    assert risk.gradient(theta).loss == pytest.approx(risk.loss(theta), rel=1e-14)


def test_a_diverged_theta_gives_a_loss_that_is_not_finite():
    owner, sequences, theta = make(dtype="float32")
    risk = owner.on(sequences, np.arange(3))
    with np.errstate(all="ignore"):
        at = risk.gradient(theta * np.float32(1e38))
    assert not math.isfinite(at.loss)


# Several ranks ---------------------------------------------------------------------------------


@pytest.mark.mpi(ranks=4, timeout=100, unit="s")
def test_ranks_compute_what_one_computes(mpi_ranks, comm):
    """Ranks 1, 2, 3 and 4, with batches that leave shards uneven (5, 12) and empty (1, 3)."""
    assert comm.size == mpi_ranks
    for ranks in (1, 2, 3, 4):
        part = comm.Split(color=comm.rank < ranks, key=comm.rank)
        if comm.rank < ranks:
            communicator = MPICommunicator(part)
            for name, variant in KINDS:
                check_ranks(communicator, name, variant)
            communicator.close()
        part.Free()


@pytest.mark.mpi(ranks=4, timeout=100, unit="s")
def test_slices_give_the_same_bits_on_any_number_of_ranks(mpi_ranks, comm):
    assert comm.size == mpi_ranks
    for name, variant in KINDS:
        for dtype in ("float32", "float64"):
            results = []
            for ranks in (1, 2, 4):
                part = comm.Split(color=comm.rank < ranks, key=comm.rank)
                if comm.rank < ranks:
                    communicator = MPICommunicator(part)
                    results += sliced(communicator, name, variant, dtype)
                    communicator.close()
                part.Free()
            expected = results[:3]  # one rank, on rank 0
            expected = comm.bcast(expected, root=0)
            for i, found in enumerate(results):
                for key, value in found.items():
                    np.testing.assert_array_equal(value, expected[i % 3][key], f"{name} {dtype} {key}")


@pytest.mark.mpi(ranks=4, timeout=60, unit="s")
def test_works_are_done_once_with_the_same_bits_on_any_number_of_ranks(mpi_ranks, comm):
    assert comm.size == mpi_ranks
    sizes = [3, 700, 2, 40, 1, 300, 300]
    for dtype in ("float32", "float64"):
        for slices in (0, 4):
            bits = set()
            for ranks in (1, 2, 4):
                part = comm.Split(color=comm.rank < ranks, key=comm.rank)
                if comm.rank < ranks:
                    communicator = MPICommunicator(part)
                    owner, sequences, _ = make(comm=communicator, dtype=dtype)
                    owner = DataParallel(owner.model, communicator, slices=slices)
                    found, done = spread(owner.on(sequences, np.arange(3)), sizes)
                    bits.add(digest(np.concatenate(found)))
                    everywhere = part.allgather(done)
                    assert sorted(i for own in everywhere for i in own) == list(range(len(sizes)))
                    assert all(everywhere)  # no rank is idle
                    communicator.close()
                part.Free()
            assert len(set().union(*comm.allgather(bits))) == 1


@pytest.mark.mpi(ranks=3, timeout=60, unit="s")
def test_wide_works_come_back_in_order_on_all_ranks(mpi_ranks, comm):
    communicator = MPICommunicator(comm)
    owner, sequences, _ = make(comm=communicator)
    for sizes in ([3, 700, 2, 40, 1, 300, 300], [5], []):
        found, done = spread(owner.on(sequences, np.arange(3)), sizes, wide=True)
        assert sorted(i for each in comm.allgather(done) for i in each) == list(range(len(sizes)))
        for i, own in enumerate(found):
            expected = np.random.default_rng(i).standard_normal(sizes[i])
            np.testing.assert_array_equal(own, 0 * expected if i == 2 else expected)
        assert communicator.same(digest(np.concatenate([np.zeros(1), *found]))) == []
    communicator.close()


@pytest.mark.mpi(ranks=3, timeout=60, unit="s")
def test_a_wide_work_that_fails_on_one_rank_ends_all(mpi_ranks, comm):
    communicator = MPICommunicator(comm)
    owner, sequences, _ = make(comm=communicator)
    risk = owner.on(sequences, np.arange(3))

    def work(what):
        if comm.rank == 1:
            raise what("no more")
        return np.ones(3)

    for what in (Stopped, MemoryError, UserError):
        expected = what if what is Stopped or comm.rank == 1 else UserError
        with pytest.raises(expected):
            risk.spread([lambda what=what: work(what)] * 4, [3] * 4, True)
        found = risk.spread([lambda: np.ones(3)] * 4, [3] * 4, True)
        np.testing.assert_array_equal(np.concatenate(found), 1.0)
    communicator.close()


def sliced(communicator, name, variant, dtype):
    """Return all results for batches that give slices of many, of unequal and of no sequences."""
    owner, sequences, theta = make(name, variant, communicator, micro_batch=2, dtype=dtype)
    owner = DataParallel(owner.model, communicator, micro_batch=2, slices=8)
    v = np.cos(np.arange(theta.size)).astype(dtype)
    batches = [np.random.default_rng(size).permutation(12)[:size] for size in (12, 11, 3)]
    return [everything(owner.on(sequences, indices), theta, v) for indices in batches]


@pytest.mark.parametrize("slices", [3, 6, 12])
def test_slices_that_cannot_be(slices):
    owner, _, _ = make()
    with pytest.raises(UserError, match="power of two that the number of ranks divides"):
        DataParallel(owner.model, Communicator(), slices=slices)


def check_ranks(communicator, name, variant):
    alone, sequences, theta = make(name, variant)
    shared, _, _ = make(name, variant, communicator, micro_batch=2)
    v = np.cos(np.arange(theta.size))
    for size in (1, 3, 5, 12):
        indices = np.random.default_rng(size).permutation(12)[:size]
        found = everything(shared.on(sequences, indices), theta, v)
        expected = everything(alone.on(sequences, indices), theta, v)
        for key, value in found.items():
            assert relative(value, expected[key]) < 1e-10, (key, size, communicator.size)
            assert communicator.same(digest(value)) == [], (key, size, communicator.size)
    mine = 0.1 + communicator.rank
    assert shared.on(sequences, np.arange(3)).agree((mine,)) == (0.1,)
