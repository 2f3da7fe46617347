"""Arguments of the API: errors in one sentence; types and the caller's process are unchanged."""

import os
import random
import signal
import sys
import warnings
from dataclasses import fields

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Recorder, train, write_corpus

import hfmpi
from hfmpi.backends import create
from hfmpi.cli.main import cli
from hfmpi.errors import UserError
from hfmpi.models.losses import SquaredError
from hfmpi.optim import Adam, Gradient, GradientDescent, HessianFree, Objective, Objectives
from hfmpi.optim.presets import preset
from hfmpi.parallel.communicator import Communicator

SECOND_ORDER = [HessianFree(), HessianFree(preconditioner="none")]
OPTIMIZERS = [*SECOND_ORDER, GradientDescent("clip"), GradientDescent(), Adam()]
GOOD = np.array([1.0, -2.0, 0.5])


def sentence(error):
    """Return the message of an error, which must be a single line of hfmpi, not of NumPy."""
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 200
    for word in ("einsum", "ufunc", "operand", "broadcast", "attribute", "unsupported", "iterable", "cast"):
        assert word not in said
    return said


class Bowl(Objective):
    """theta'theta / 2; a function is applied to each result."""

    def __init__(self, loss=float, gradient=Gradient, product=lambda v: v, operator=None):
        self.as_loss, self.as_gradient, self.as_product, self.operator = loss, gradient, product, operator

    def loss(self, theta):
        return self.as_loss(theta @ theta / 2)

    def gradient(self, theta):
        return self.as_gradient(self.loss(theta), theta.copy())

    def gauss_newton(self, theta):
        return (lambda v: self.as_product(v.copy())) if self.operator is None else self.operator


def steps(optimizer, theta, objective, count=2):
    state = optimizer.init(theta)
    for _ in range(count):
        theta, state, report = optimizer.step(theta, state, Objectives(objective, objective))
    return theta, state, report


# Vectors -----------------------------------------------------------------------------------------

WRONG_VECTORS = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.floats(),
    st.lists(st.floats(), max_size=4),
    st.sampled_from([int, bool, complex, object, np.float16, ">f8"]).map(lambda kind: np.ones(3, kind)),
    st.sampled_from([(), (3, 1), (1, 3), (0, 0), (2, 2, 2)]).map(np.ones),
)


@given(st.sampled_from(OPTIMIZERS), WRONG_VECTORS)
@settings(deadline=None)
def test_what_is_no_theta_is_refused(optimizer, wrong):
    both = Objectives(Bowl(), Bowl())
    for call in (optimizer.init, lambda theta: optimizer.step(theta, optimizer.init(GOOD), both)):
        with pytest.raises((TypeError, ValueError)) as caught:
            call(wrong)
        assert sentence(caught).startswith("theta must be ")


LAYOUTS = {
    "as it is": lambda a: a,
    "strided": lambda a: np.repeat(a, 2)[::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
    "of a file": lambda a: np.frombuffer(a.tobytes(), a.dtype),  # a read-only array
}


@given(
    st.sampled_from(OPTIMIZERS),
    st.sampled_from([np.float32, np.float64]),
    st.sampled_from([np.float16, np.float32, np.float64, np.int64]),
    st.sampled_from(list(LAYOUTS.values())),
    st.sampled_from([float, np.float32, np.float64, np.array]),
)
@settings(deadline=None)
def test_theta_keeps_its_type_whatever_the_objective_gives(optimizer, kind, given_kind, layout, number):
    objective = Bowl(
        lambda loss: number(loss),
        lambda loss, g: Gradient(loss, layout(g.astype(given_kind))),
        lambda v: layout(v.astype(np.float64 if given_kind is np.int64 else given_kind)),
    )
    theta = layout(GOOD.astype(kind) * 4)
    before = theta.tobytes()
    after, state, report = steps(optimizer, theta, objective)
    assert theta.tobytes() == before
    assert after.dtype == kind
    assert all(value.dtype == kind for value in vars(state).values() if isinstance(value, np.ndarray))
    assert type(report.loss) is float
    assert report.accepted
    assert np.linalg.norm(after) < np.linalg.norm(theta)


# Objectives --------------------------------------------------------------------------------------

NO_LOSS, NO_ARRAY = (
    "gradient must return a number as the loss, not ",
    " must return an array of real numbers, not ",
)
SHAPE = " must return a vector of theta's shape (3,), not "


@pytest.mark.parametrize(("answers", "words"), [
    ({"loss": lambda loss: np.array([loss])}, NO_LOSS + "an array of shape (1,)"),
    ({"loss": lambda loss: None}, NO_LOSS + "None"),
    ({"loss": str}, NO_LOSS + "'"),
    ({"loss": complex}, NO_LOSS + "("),
    ({"gradient": lambda loss, g: (loss, g)}, "gradient must return a Gradient(loss, vector), not tuple"),
    ({"gradient": lambda loss, g: g}, "gradient must return a Gradient(loss, vector), not ndarray"),
    ({"gradient": lambda loss, g: Gradient(loss, list(g))}, "gradient" + NO_ARRAY + "list"),
    ({"gradient": lambda loss, g: Gradient(loss, None)}, "gradient" + NO_ARRAY + "None"),
    ({"gradient": lambda loss, g: Gradient(loss, g + 0j)}, "gradient" + NO_ARRAY + "ndarray of complex128"),
    ({"gradient": lambda loss, g: Gradient(loss, g[:2])}, "gradient" + SHAPE + "(2,)"),
    ({"gradient": lambda loss, g: Gradient(loss, g[:, None])}, "gradient" + SHAPE + "(3, 1)"),
    ({"gradient": lambda loss, g: Gradient(loss, g, g[:2])}, "gradient as squares" + SHAPE + "(2,)"),
    ({"product": list}, "gauss_newton(theta)" + NO_ARRAY + "list"),
    ({"product": lambda v: v[:1]}, "gauss_newton(theta)" + SHAPE + "(1,)"),
    ({"operator": np.eye(3)}, "gauss_newton must return a function v -> G v, not ndarray"),
])  # fmt: skip
def test_what_is_no_answer_of_an_objective_is_refused(answers, words):
    for optimizer in SECOND_ORDER if words.startswith("gauss_newton") else OPTIMIZERS:
        with pytest.raises((TypeError, ValueError)) as caught:
            steps(optimizer, GOOD, Bowl(**answers))
        assert sentence(caught).replace("squared_gradients", "gradient").startswith(f"Bowl.{words}")


class Duck:
    loss, gradient, gauss_newton = Bowl.loss, Bowl.gradient, Bowl.gauss_newton


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_no_objective_or_state_is_refused(optimizer):
    for wrong in (Duck(), Bowl, None, (Bowl(), Bowl())):
        with pytest.raises(TypeError, match=r"must be an instance of hfmpi.Objective, not \S"):
            Objectives(wrong)
    state, both = optimizer.init(GOOD), Objectives(Bowl(), Bowl())
    for wrong in (Bowl(), (Bowl(), Bowl()), None):
        with pytest.raises(TypeError, match="needs Objectives"):
            optimizer.step(GOOD, state, wrong)
    for wrong in (None, {}, object()):
        with pytest.raises(TypeError, match=r"state must be the result of init\(theta\), not "):
            optimizer.step(GOOD, wrong, both)
    if optimizer != GradientDescent("clip"):  # its state has no vector
        for other in (np.ones(4), GOOD.astype(np.float32)):
            with pytest.raises(ValueError, match=r"call init\(theta\) again"):
                optimizer.step(GOOD, optimizer.init(other), both)


# Settings ----------------------------------------------------------------------------------------

WRONG_SETTINGS = {
    float: st.one_of(st.none(), st.text(), st.booleans(), st.just(1j), st.just([1.0])),
    int: st.one_of(st.none(), st.text(), st.booleans(), st.floats(), st.just((1,))),
    bool: st.one_of(st.none(), st.text(), st.integers(), st.floats()),
    str: st.one_of(st.none(), st.integers(), st.floats(), st.booleans()),
}
SETTINGS = [
    (name, kind, field.name, type(field.default))
    for name, kind in (("bhf", HessianFree), ("sgd", GradientDescent), ("adam", Adam))
    for field in fields(kind)
]


@given(st.data())
@settings(deadline=None)
def test_settings_of_another_type_are_refused_as_on_the_command_line(data):
    name, kind, setting, of = data.draw(st.sampled_from(SETTINGS))
    wrong = data.draw(WRONG_SETTINGS[of])
    with pytest.raises(TypeError) as caught:
        kind(**{setting: wrong})
    with pytest.raises(UserError) as on_command_line:
        preset(name, **{setting: wrong})
    assert str(on_command_line.value) == str(caught.value).replace(setting, f"setting {setting} of {name}", 1)


def test_numbers_of_numpy_become_pythons():
    changes = {
        "damping": 1,
        "cg_max_steps": np.int64(9),
        "line_search": np.False_,
        "warm_start": np.float32(0.5),
    }
    optimizer = HessianFree(**changes)
    assert {name: getattr(optimizer, name) for name in changes} == changes
    assert [type(getattr(optimizer, name)) for name in changes] == [float, int, bool, float]


# Networks, cases, batches ------------------------------------------------------------------------

ABOUT = hfmpi.Architecture("rnn", 3, 2, 1)
INPUTS = np.linspace(-1, 1, 60, dtype=np.float32).reshape(6, 5, 2)
TARGETS = np.linspace(0, 1, 12, dtype=np.float32).reshape(6, 2, 1)
NETWORK = hfmpi.Network(ABOUT, create("numpy"), loss="squares")
OWNER = hfmpi.DataParallel(NETWORK, Communicator())
CASES = hfmpi.Arrays(INPUTS, TARGETS, burn_in=3)
RISK = OWNER.on(CASES, range(6))
THETA = NETWORK.initial(0).astype(np.float32)


def owner(**changes):
    return hfmpi.DataParallel(**{"model": NETWORK, "communicator": OWNER.communicator} | changes)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: hfmpi.Architecture("rnn", "3", 2, 1), "hidden must be of type int, not '3'"),
    (lambda: hfmpi.Architecture("rnn", 3, 2, 1, layers=1.5), "layers must be of type int, not 1.5"),
    (lambda: hfmpi.Architecture(["rnn"], 3, 2, 1), "name must be of type str, not list"),
    (lambda: ABOUT.of_size("9"), "parameters must be a whole number, not '9'"),
    (lambda: ABOUT.initial(-1), "a seed must be a whole number, 0 or more, not -1"),
    (lambda: NETWORK.initial(None), "a seed must be a whole number, 0 or more, not None"),
    (lambda: ABOUT.initial(0, forget_bias="3"), "forget_bias must be a finite number, not '3'"),
    (lambda: hfmpi.Network("rnn"), "architecture must be an Architecture, not 'rnn'"),
    (lambda: hfmpi.Network(ABOUT, "numba"), "backend must be a result of hfmpi.backends.create, not 'numba'"),
    (lambda: hfmpi.Network(ABOUT, loss=SquaredError), "hfmpi.models.losses.Loss, not the class SquaredError"),
    (lambda: hfmpi.Network(ABOUT, block_rows=1.5), "block_rows must be a whole number, not 1.5"),
    (lambda: NETWORK.loss(THETA, (INPUTS, TARGETS)), "a batch must have inputs, targets and mask"),
    (lambda: NETWORK.loss(list(THETA), CASES.take([0])), "theta must be an array"),
    (lambda: NETWORK.loss(THETA, CASES.take([0])._replace(mask=np.ones(2))), "the mask must have shape"),
    (lambda: hfmpi.Arrays([[1, 2], [3]], TARGETS), "inputs must be an array with rows of equal length"),
    (lambda: owner(model="net"), "model must be a model such as hfmpi.Network, not 'net'"),
    (lambda: owner(model=hfmpi.Network), "model must be a model such as hfmpi.Network, not the class"),
    (lambda: owner(communicator=None), "communicator must be a result of connect(), not None"),
    (lambda: owner(micro_batch=-1), "micro_batch must be 0, 1, 2, ..., not -1"),
    (lambda: owner(memory_budget="1GiB"), "memory_budget must be a number of bytes, not '1GiB'"),
    (lambda: owner(slices=2.0), "slices must be 0, 1, 2, ..., not 2.0"),
    (lambda: owner(stop=True), "stop must be a function, not True"),
    (lambda: OWNER.on((INPUTS, TARGETS), [0]), "cases must be an object such as hfmpi.Arrays, not tuple"),
    (lambda: OWNER.on(CASES, [0.5]), "case indices must be whole numbers (B,), not float64 of shape (1,)"),
    (lambda: OWNER.on(CASES, np.zeros((2, 2), int)), "not int64 of shape (2, 2)"),
    (lambda: OWNER.on(CASES, 3), "case indices must be whole numbers (B,), not int64 of shape ()"),
    (lambda: OWNER.on(CASES, [6]), "case indices must lie in 0 ... 5"),
])  # fmt: skip
def test_what_a_network_cannot_work_with_is_refused(call, words):
    with pytest.raises((TypeError, ValueError, IndexError, UserError)) as caught:
        call()
    assert words in sentence(caught)


@given(WRONG_VECTORS, st.sampled_from(["loss", "gradient", "squared_gradients", "gauss_newton", "v"]))
@settings(deadline=None)
def test_a_risk_refuses_what_is_no_vector_of_its_model(wrong, method):
    for given_vector in (wrong, np.append(THETA, 0), THETA[:, None], THETA.astype(int)):
        with pytest.raises((TypeError, ValueError)) as caught:
            RISK.gauss_newton(THETA)(given_vector) if method == "v" else getattr(RISK, method)(given_vector)
        assert sentence(caught).startswith("v must be " if method == "v" else "theta must be ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_risk_takes_vectors_however_they_lie(layout):
    theta = LAYOUTS[layout](THETA)
    assert RISK.loss(theta) == pytest.approx(RISK.loss(THETA), rel=1e-6)
    assert np.allclose(RISK.gradient(theta).vector, RISK.gradient(THETA).vector, atol=1e-6)
    assert np.allclose(RISK.gauss_newton(THETA)(theta), RISK.gauss_newton(THETA)(THETA), atol=1e-6)


# What is said once -------------------------------------------------------------------------------


def test_an_optimum_is_said():
    class At(Bowl):
        def loss(self, theta):
            return 1.0 + super().loss(theta)

    far = GOOD * 1e-12  # its loss is that of the optimum, to rounding
    why = "the predicted decrease is smaller than the rounding of the risk: theta is at an optimum, or the "
    for most, end in (1e10, ""), (1e9, "; the damping is at its maximum"):
        optimizer = HessianFree(damping=1e9, damping_maximum=most)
        state = optimizer.init(far)
        after, later, report = optimizer.step(far, state, Objectives(At(), At()))
        assert (after is far, later is state) == (True, True)
        assert (report.accepted, report.converged, report.details["step_norm"]) == (True, True, 0.0)
        assert report.message == f"{why}damping is too large{end}"
    for each in OPTIMIZERS:
        _, _, report = each.step(GOOD * 0, each.init(GOOD), Objectives(Bowl(), Bowl()))
        assert report.message.startswith("the gradient is zero")


def test_a_run_says_once_what_is_not_in_its_lines(tmp_path):
    reporter = Recorder()
    huge = {"damping": 1e18, "damping_maximum": 1e18}
    train(tmp_path / "run", write_corpus(tmp_path / "c.h5"), reporter=reporter, max_steps=3, settings=huge)
    assert len(reporter.records) == 3
    (said,) = reporter.notes
    assert said.startswith("step 1: the predicted decrease is smaller than the rounding of the risk")
    assert "the damping is at its maximum" in said


# What is the caller's ----------------------------------------------------------------------------


def surroundings():
    """Return the state of the process that hfmpi must not change."""
    return {
        "floating point": np.geterr(),
        "warnings": list(warnings.filters),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "hooks": (sys.excepthook, sys.unraisablehook, warnings.showwarning),
        "random numbers": (random.getstate(), repr(np.random.get_state())),  # noqa: NPY002
        "streams": (sys.stdout, sys.stderr),
        "path": list(sys.path),
    }


def test_the_process_of_a_caller_stays_as_it_was(tmp_path):
    corpus, run = str(write_corpus(tmp_path / "c.h5")), str(tmp_path / "run")
    small = [
        "--optimizer",
        "shf",
        "--hidden",
        "5",
        "--backend",
        "numpy",
        "--gradient-batch",
        "9",
        "--curvature-batch",
        "3",
    ]
    before = surroundings()
    for optimizer in OPTIMIZERS:
        steps(optimizer, GOOD, Bowl())
    steps(HessianFree(), THETA, RISK)
    assert surroundings() == before
    for command in (
        ["train", corpus, "--out", run, *small, "--sequence-length", "20", "--max-steps", "1"],
        ["sample", run, "--length", "3"],
        ["bench", "step", *small, "--vocabulary", "4", "--length", "9", "--repeats", "1"],
        ["info"],
    ):
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.output
        assert surroundings() == before, command[0]
