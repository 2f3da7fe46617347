"""Properties shared by models of any framework, tested with NumPy: rows, losses, examples, error messages."""

import subprocess
import sys

import numpy as np
import pytest
from dense import CASES, INPUTS, OUTPUTS, STEPS, check, check_optimizers, numbers, symbols

import hfmpi
from hfmpi.errors import UserError
from hfmpi.frameworks.framework import CACHE, FrameworkModel, directions_at_once, matrices
from hfmpi.models.batch import ScoredOutputs
from hfmpi.models.factors import add_examples
from hfmpi.optim.layout import Layout, split_factors
from hfmpi.parallel.communicator import Communicator

ONE_HOT = np.eye(OUTPUTS, dtype=int)[symbols(CASES)]
SHAPES = ("W", (INPUTS, OUTPUTS)), ("b", (OUTPUTS,))
BLOCKS = matrices(Layout(dict(SHAPES)))


class Tanh(FrameworkModel):
    """Outputs tanh(x W + b) with a dense Jacobian; x (B, ..., I)."""

    def __init__(self, loss, start):
        super().__init__(SHAPES, start, loss)

    def _outputs(self, theta, examples):
        W, b = theta[:-OUTPUTS].reshape(INPUTS, OUTPUTS), theta[-OUTPUTS:]
        return examples.scored.of(np.tanh(examples.inputs[0] @ W + b))

    def _linearise(self, theta, examples):
        x = examples.scored._replace(width=INPUTS).of(examples.inputs[0])
        return Passes(self._outputs(theta, examples), x, examples.scored)


class Passes:
    by_step = False

    def __init__(self, outputs, x, scored):
        self.outputs, self.examples = outputs, scored.shape[0]
        kernel = np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)  # of W and b
        eye = np.eye(OUTPUTS, dtype=x.dtype)
        self.jacobian = np.einsum("no,ni,op->noip", 1 - outputs**2, kernel, eye).reshape(*outputs.shape, -1)
        self.nbytes = self.jacobian.nbytes

    def jvp(self, v):
        return np.einsum("nod,cd->nco", self.jacobian, np.atleast_2d(v)).reshape(-1, OUTPUTS)

    def vjp(self, u, out):
        u = u.reshape(len(self.outputs), -1, OUTPUTS)
        out += np.einsum("nod,nco->cd", self.jacobian, u).reshape(out.shape)

    def squares(self, u, out, squares):
        each = self._each(u)
        out += each.sum(axis=0)
        squares += (each**2).sum(axis=0)

    def factors(self, u, out, sums):
        each = self._each(u)
        out += each.sum(axis=0)
        add_examples(BLOCKS, each, sums)

    def rows(self, u, out):
        u = u.reshape(len(self.outputs), -1, OUTPUTS)
        each = np.einsum("nod,nco->ncd", self.jacobian, u)
        out[...] = each.reshape(self.examples, -1, *out.shape[1:]).sum(axis=1)

    def _each(self, u):
        each = np.einsum("nod,no->nd", self.jacobian, u)
        return each.reshape(self.examples, -1, each.shape[1]).sum(axis=1)


def model(loss="cross-entropy", kind=np.float64):
    return Tanh(loss, numbers(INPUTS * OUTPUTS + OUTPUTS).astype(kind))


MASK = np.array([[1, 0], [1, 1], [0, 0], [0, 1]])
ROWS, SEQUENCES = numbers(CASES, INPUTS), numbers(CASES, STEPS, INPUTS)


@pytest.mark.parametrize(("loss", "cases", "x", "mask"), [
    ("cross-entropy", hfmpi.Examples(ROWS, symbols(CASES)), ROWS, None),
    ("squares", hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS), np.array([1, 0, 1, 1])), ROWS, [1, 0, 1, 1]),
    ("bernoulli", hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS) > 0), ROWS, None),
    ("cross-entropy", hfmpi.Examples(SEQUENCES, symbols(CASES, STEPS)), SEQUENCES, None),
    ("squares", hfmpi.Arrays(SEQUENCES, numbers(CASES, STEPS, OUTPUTS)), SEQUENCES, None),
    ("cross-entropy", hfmpi.Arrays(SEQUENCES, symbols(CASES, 2), MASK, burn_in=1), SEQUENCES[:, 1:], MASK),
])  # fmt: skip
def test_losses_masks_and_burn_in_are_those_of_the_dense_jacobian(loss, cases, x, mask):
    made = model(loss)
    theta = made.initial(0)
    x = x.reshape(-1, INPUTS)
    W, b = theta[:-OUTPUTS].reshape(INPUTS, OUTPUTS), theta[-OUTPUTS:]
    z = np.tanh(x @ W + b)
    jacobian = Passes(z, x, ScoredOutputs((len(x),), None)).jacobian
    check(
        made, loss, cases, theta, z, jacobian, None if mask is None else np.reshape(mask, -1), by_cases=True
    )


def test_long_sides_have_the_diagonals_of_their_factors(monkeypatch):
    made, cases = model("squares"), hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS))
    risk = hfmpi.DataParallel(made, Communicator()).on(cases, np.arange(CASES))
    whole = split_factors(made.blocks, risk.factored_gradient(made.initial(0))[1])
    monkeypatch.setattr("hfmpi.optim.layout.LONGEST_SIDE", 2)
    cut = split_factors(made.blocks, risk.factored_gradient(made.initial(0))[1])
    assert [matrix.ndim for _, *both in cut for matrix in both] == [2, 1, 2, 1]
    for (_, *ours), (_, *theirs) in zip(cut, whole, strict=True):
        for own, matrix in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(own, matrix if own.ndim == 2 else np.diag(matrix))


def test_arrays_on_top_of_one_another_are_cut():
    made = matrices(Layout({"W": (6, 2), "b": (6,), "k": (4, 1, 3), "s": ()}), {"W": 3, "b": 3})
    assert [block[2:] for block in made] == [
        (6, 2, (2, 4), 1), (1, 6, (), 3), (4, 3, (), 1), (1, 1, (), 1)
    ]  # fmt: skip


def test_outputs_may_lack_the_axis_of_one_step_or_of_one_number():
    rows = numbers(CASES, OUTPUTS)
    of = ScoredOutputs
    assert np.array_equal(of((CASES, 1), None).of(rows), rows)
    assert np.array_equal(of((CASES,), 1).of(rows[:, 0]), rows[:, :1])
    assert np.array_equal(of((CASES,), 1).of(rows[:, :1]), rows[:, :1])
    for shape, width in (((CASES + 1,), None), ((CASES,), 2), ((CASES, 2), None), ((CASES, 1, 1), 3)):
        with pytest.raises(UserError, match="do not fit targets of shape"):
            of(shape, width).of(rows)


def test_every_optimizer_takes_a_model_of_a_framework():
    check_optimizers(model("squares", np.float32), hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS)))


def test_theta_of_another_type_is_taken_too():
    made, cases = model("squares", np.float32), hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS))
    risk = hfmpi.DataParallel(made, Communicator()).on(cases, np.arange(CASES))
    theta = made.initial(0)
    assert theta.dtype == np.float64
    for other in (theta, theta.astype(np.float32)):
        assert risk.gauss_newton(other)(other).dtype == other.dtype
        assert risk.gradient(other).loss == pytest.approx(risk.loss(theta), rel=1e-6)


def test_memory_of_a_linearisation_is_given_back_before_the_next():
    made, cases = model(), hfmpi.Examples(ROWS, symbols(CASES))
    at = made.linearise(made.initial(0), cases.take(np.arange(CASES)))
    made.linearise(made.initial(0), cases.take(np.arange(CASES)), at)
    assert not hasattr(at, "passes")


@pytest.mark.parametrize(("loss", "cases", "words"), [
    ("cross-entropy", hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS)), "must be whole numbers \\(symbols\\)"),
    ("squares", hfmpi.Examples(ROWS, symbols(CASES)), r"must be real numbers \(y.astype\(float\)\)"),
    ("cross-entropy", hfmpi.Examples(ROWS, symbols(CASES) + 1), "must be symbols from 0 to 2, not 2 to 3"),
    ("cross-entropy", hfmpi.Examples(ROWS, -symbols(CASES)), "must be symbols from 0 to 2, not -2 to -1"),
    ("cross-entropy", hfmpi.Examples(ROWS, symbols(CASES) > 1), r"not bool; pass y.astype\(int\)"),
    ("cross-entropy", hfmpi.Examples(ROWS, ONE_HOT), r"do not fit .* pass their symbols: y.argmax\(-1\)"),
    ("cross-entropy", hfmpi.Examples(ROWS, ONE_HOT.astype("f")), r"single 1: .* symbols, y.argmax\(-1\)"),
    ("cross-entropy", hfmpi.Examples(ROWS, ONE_HOT > 0), r"single 1: .* symbols, y.argmax\(-1\)"),
    ("squares", hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS) * np.nan), "must be finite numbers, not nan"),
    ("squares", hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS) * np.inf), "finite numbers, not -inf to inf"),
    ("squares", hfmpi.Examples(ROWS, numbers(CASES, 2)), r"shape \(4, 3\) do not fit .* \(4, 2\)"),
    ("squares", hfmpi.Examples(ROWS * np.nan, numbers(CASES, OUTPUTS)), "loss is not finite at the start"),
])  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused(loss, cases, words):
    made, batch = model(loss), cases.take(np.arange(CASES))
    for call in (made.loss, made.linearise):
        with pytest.raises(UserError, match=words):
            call(made.initial(0), batch)
    with pytest.raises(UserError, match="a batch must have inputs, targets and mask"):
        made.loss(made.initial(0), (ROWS, ROWS))


@pytest.mark.parametrize(("given", "words"), [
    ((ROWS, symbols(CASES + 1)), "inputs have 4 examples, but targets have 5"),
    (((ROWS, ROWS[1:]), symbols(CASES)), "inputs have 3 examples, but targets have 4"),
    (((), symbols(CASES)), "not an empty tuple"),
    ((ROWS, [[1, 2], [3]]), "targets must be an array with rows of equal length, or a tensor on the CPU"),
    ((ROWS[:0], symbols(0)), r"inputs must be whole or real numbers with at least one row, not float64 of"),
    ((ROWS.astype(str), symbols(CASES)), "inputs must be whole or real numbers"),
    ((ROWS, symbols(CASES), np.ones(3)), r"the mask has shape \(3,\), not \(4,\)"),
    ((ROWS, symbols(CASES), np.full(4, np.nan)), "the mask must be finite numbers, 0 or more, not nan"),
])  # fmt: skip
def test_examples_that_do_not_fit_one_another_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        hfmpi.Examples(*given)


class Unreadable:
    """A tensor that NumPy cannot convert, with the class name of PyTorch's."""

    dtype, device, layout, requires_grad = "torch.float32", "cpu", "torch.strided", False

    def __init__(self, **changes):
        vars(self).update(changes)

    def detach(self):
        return self

    def __array__(self, *_, **__):
        raise TypeError("not this one")


@pytest.mark.parametrize(("values", "words"), [
    (Unreadable(requires_grad=True), r"; pass tensor.detach\(\)$"),
    (Unreadable(device="cuda:1"), r"; pass tensor.cpu\(\)$"),
    (Unreadable(layout="torch.sparse_coo"), r"; pass tensor.to_dense\(\)$"),
    (Unreadable(dtype="torch.bfloat16", requires_grad=True),
     r"; pass tensor.detach\(\).float\(\), because NumPy has no bfloat16"),
    ([Unreadable(dtype="torch.bfloat16")] * CASES, r"; pass tensor.float\(\), because NumPy has no bfloat16"),
    (Unreadable(), "or a tensor on the CPU without a gradient$"),
    (np.zeros((CASES, 2), "V2"), r"not \|V2: pass x.astype\('float32'\)"),
])  # fmt: skip
def test_a_tensor_that_numpy_cannot_read_is_refused_with_the_remedy(values, words):
    for given in ((values, symbols(CASES)), (ROWS, values)):
        with pytest.raises(UserError, match=words):
            hfmpi.Examples(*given)
    with pytest.raises(UserError, match="the parts of example 0 of the data set must be .*" + words):
        hfmpi.train(model(), [(values[0] if isinstance(values, np.ndarray) else values, 1)], quiet=True)


def test_examples_count_what_is_scored():
    assert hfmpi.Examples(ROWS, symbols(CASES, 5)).scored(np.arange(2)) == 10
    assert hfmpi.Examples(ROWS, numbers(CASES, 5)).scored(np.arange(2)) == 2
    assert hfmpi.Examples(ROWS, numbers(CASES)).scored(np.arange(2)) == 2
    assert hfmpi.Examples(ROWS, symbols(CASES, 2), MASK).scored(np.array([1, 3])) == 3


class Reversed:
    """Examples of any `Cases` in the opposite byte order."""

    count = CASES

    def __init__(self, cases):
        self.cases, self.scored = cases, cases.scored

    def take(self, indices):
        def other(array):
            return array.astype(array.dtype.newbyteorder("S"))

        batch = self.cases.take(indices)
        return batch._replace(inputs=other(batch.inputs), targets=other(batch.targets))


@pytest.mark.parametrize(("loss", "targets"), [
    ("cross-entropy", symbols(CASES)), ("cross-entropy", symbols(CASES).astype(np.uint16)),
    ("squares", numbers(CASES, OUTPUTS)), ("bernoulli", abs(np.sin(numbers(CASES, OUTPUTS)))),
])  # fmt: skip
def test_arrays_of_another_byte_order_are_the_same_examples(loss, targets):
    made, cases = model(loss), hfmpi.Examples(ROWS, targets)
    there = [array.astype(array.dtype.newbyteorder("S")) for array in (ROWS, targets, np.ones(CASES))]
    assert np.array_equal(there[1], targets)
    at, risks = made.initial(0), []
    for same in (cases, hfmpi.Examples(*there), Reversed(cases)):
        risk = hfmpi.DataParallel(made, Communicator()).on(same, np.arange(CASES))
        risks.append((risk.loss(at), *risk.gradient(at).vector))
        made.check_data(cases.inputs, np.asarray(same.take(np.arange(CASES)).targets), None)
    assert risks[0] == risks[1] == risks[2]
    assert all(
        array.dtype.isnative for array in vars(hfmpi.Examples(*there)).values() if hasattr(array, "dtype")
    )


def test_several_inputs_are_taken_together():
    batch = hfmpi.Examples((ROWS, SEQUENCES), symbols(CASES)).take(np.array([2, 0]))
    assert np.array_equal(batch.inputs[0], ROWS[[2, 0]])
    assert np.array_equal(batch.inputs[1], SEQUENCES[[2, 0]])
    with pytest.raises(IndexError, match="example indices must lie in 0"):
        hfmpi.Examples(ROWS, symbols(CASES)).take(np.array([CASES]))


def test_a_framework_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("hfmpi.frameworks.torch.torch", None)
    monkeypatch.setattr("hfmpi.frameworks.jax.jax", None)
    with pytest.raises(UserError, match="TorchModel needs PyTorch: pip install torch"):
        hfmpi.TorchModel(None, "squares")
    with pytest.raises(UserError, match="JaxModel needs JAX: pip install jax"):
        hfmpi.JaxModel(None, None, "squares")


def test_frameworks_are_imported_when_they_are_asked_for():
    script = "import sys, hfmpi; hfmpi.Network; hfmpi.Examples; print({'torch', 'jax'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


def test_large_linearisations_take_fewer_directions_at_once():
    sizes = [directions_at_once(nbytes) for nbytes in (0, CACHE // 8, CACHE // 5, CACHE // 4, CACHE)]
    assert sizes == [8, 8, 5, 4, 4]
    tanh, cases = model("squares"), hfmpi.Examples(ROWS, numbers(CASES, OUTPUTS))
    theta, calls = tanh.initial(0), []
    at = tanh.linearise(theta, cases.take(np.arange(CASES)))
    v = np.random.default_rng(0).standard_normal((11, theta.size))
    expected = at.passes.jvp(v)
    original = at.passes.jvp
    at.passes.jvp = lambda v: calls.append(len(v)) or original(v)
    np.testing.assert_array_equal(at.jvp(v), expected)
    assert calls == [5, 6]
