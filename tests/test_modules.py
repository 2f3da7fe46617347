"""A few trials of examples/faults/modules.py, and whether it detects wrong results."""

import runpy
import sys
from pathlib import Path

import pytest

import hfmpi
from hfmpi.errors import UserError
from hfmpi.models.linearisation import LossLinearisation
from hfmpi.runs.model_task import ModelTask

pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of PyTorch on modules with defects
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "faults"
HEALTHY = 1  # the number of a trial without a defect


@pytest.fixture(scope="module")
def campaign():
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / "modules.py"))
    finally:
        sys.path.remove(str(FOLDER))


def number_of(campaign, family, name):
    """Return the number of the first trial with only this defect."""
    Trial = campaign["Trial"]
    return next(n for n in range(2000) if Trial(0, n).defects == [(family, name)])


@pytest.mark.parametrize(
    ("family", "name", "end"),
    [
        ("shared", "tied Parameter", "trained"),
        ("shared", "tied, transposed", "trained"),
        ("aliased", "not registered", "trained"),
        ("order", "batches larger than k", "refused"),
        ("order", "BatchNorm, train", "refused"),
        ("stateful", "counter", "refused"),
        ("stateful", "hidden state kept", "refused"),
        ("stochastic", "F.dropout", "refused"),
        ("data", "labels of type float", "refused"),
        ("data", "class axis second", "refused"),
    ],
)
def test_a_trial(campaign, family, name, end):
    trial = campaign["Trial"](0, number_of(campaign, family, name))
    assert campaign["attempt"](trial) == (end, "")


@pytest.mark.parametrize("number", [1, 3, 5, 7, 9, 11])
def test_healthy_modules(campaign, number):
    assert campaign["attempt"](campaign["Trial"](0, number)) == ("trained", "")


def scaled(function):
    """Return a method whose result is 1.001 times that of the original."""

    def method(self, vector, scale, out, *rest):
        function(self, vector, 1.001 * scale, out, *rest)

    return method


def scaled_gradient(function):
    def method(self, scale, *outs):
        function(self, 1.001 * scale, *outs)

    return method


def more(function):
    return lambda self, *arguments: 1.001 * function(self, *arguments)


def refuse(_):
    def method(*_):
        raise UserError("no")

    return method


def fail(_):
    def method(*_):
        raise ValueError("shapes do not fit")

    return method


def into_the_module(function):
    """Return a `loss` that writes theta into the module."""

    def method(self, theta, batch):
        self.write_back(theta + 1)
        return function(self, theta, batch)

    return method


@pytest.mark.parametrize(
    ("owner", "name", "change", "found"),
    [
        (LossLinearisation, "gradient", scaled_gradient, "wrong gradient"),
        (LossLinearisation, "squared_gradients", scaled_gradient, "wrong gradient with squares"),
        (LossLinearisation, "gauss_newton", scaled, "wrong Gauss-Newton product"),
        (LossLinearisation, "project", scaled, "wrong V G V'"),
        (hfmpi.TorchModel, "loss", more, "wrong loss"),
        (hfmpi.TorchModel, "loss", into_the_module, "the module was changed: values"),
        (ModelTask, "check", refuse, "refused a correct module: no"),
        (ModelTask, "check", fail, "ValueError: shapes do not fit"),
    ],
)
def test_the_judge_notices(campaign, monkeypatch, owner, name, change, found):
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    end, failure = campaign["attempt"](campaign["Trial"](0, HEALTHY))
    assert end == "failed"
    assert failure.startswith(found)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("order", "neighbour"),
        ("order", "the last example"),
        ("order", "batches larger than k"),
        ("order", "batch_first forgotten"),
        ("stateful", "cache by batch size"),
        ("stateful", "without gradients"),
        ("stochastic", "seed in forward"),
    ],
)
def test_the_reference_notices_outputs_that_are_no_function_of_the_example(campaign, family, name):
    trial = campaign["Trial"](0, number_of(campaign, family, name))
    campaign["attempt"](trial)
    assert trial.dependent(trial.start) > campaign["DEPENDENT"]
