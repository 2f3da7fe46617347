"""The costs in a record, and the unit of its linear algebra."""

from types import SimpleNamespace

import numpy as np
import pytest

from hfmpi import Examples, Network
from hfmpi.files.history import NATS
from hfmpi.measure.cost import Counts, ForwardPass
from hfmpi.optim.base import StepReport
from hfmpi.optim.layout import Block
from hfmpi.runs.record import Progress, counted, step_record
from hfmpi.runs.task import Task

COSTS = "P_I", "P_D", "P_P", "P_I_full", "P_D_full"


def record_of(work, unit=ForwardPass(1_000, 10), ranks=1):  # noqa: B008
    """Return the record of the first step of a run with B_g = 20 and B_c = 5."""
    report = StepReport(1.0, True, "", work)
    progress = Progress(unit=unit).after(report)
    return step_record(progress, report, None, NATS, (), 0.1, (20, 5), ranks)


def test_a_step_with_rows_of_six_segments():
    work = Counts(gradients=1, projections=1, directions=9, adjoints=5)
    record = record_of(work, ranks=8)
    p_d = (1 + 2 * 6) * 20 + 2 * 10 * 5
    assert [record[key] for key in COSTS] == [5, p_d, (3 + 2 * 15) + 2 * 7, 5, p_d]
    assert record["adjoints"] == 5
    assert not {"operations", "depth"} & record.keys()
    assert counted(record) == work + Counts(steps=1)


def test_linear_algebra_is_in_the_full_accounts_alone():
    work = Counts(gradients=1, operations=2_500, depth=31)
    record = record_of(work)
    assert [record[key] for key in COSTS] == [3, 60, 60, 3 + 4, 60 + 3]
    assert (record["operations"], record["depth"]) == (2_500, 31)
    assert counted(record) == work + Counts(steps=1)


@pytest.mark.parametrize(
    ("inputs", "targets", "burn_in", "outputs"),
    [
        (np.zeros((3, 7), int), np.zeros((3, 7), int), 0, 7),
        (np.zeros((3, 7), int), np.zeros((3, 5), int), 2, 7),
        (np.zeros((3, 7, 2)), np.zeros((3, 4, 2)), 3, 7),
        (np.zeros((3, 2)), np.zeros((3, 6)), 0, 1),  # one vector of six numbers
        (np.zeros((3, 2)), np.zeros(3), 0, 1),
        (np.zeros((3, 2)), np.zeros(3, int), 0, 1),
        (np.zeros((3, 2)), np.zeros((3, 4, 5), int), 0, 20),
    ],
)
def test_the_unit_of_a_model_that_does_not_know_it(inputs, targets, burn_in, outputs):
    examples = Examples(inputs, targets, burn_in=burn_in)
    model = SimpleNamespace(
        size=50, blocks=(Block("W", 0, 5, 4), Block("b", 20, 1, 10), Block("V", 30, 10, 2))
    )
    task = SimpleNamespace(model=model, train_set=examples)
    assert Task.forward_pass(task) == ForwardPass(2 * 50 * outputs, 2)
    task.model = SimpleNamespace(size=50)  # without the matrices of theta
    assert Task.forward_pass(task) == ForwardPass(2 * 50 * outputs, 1)
    task.model = SimpleNamespace(size=50, forward_pass=lambda steps: ForwardPass(steps, 3))
    assert Task.forward_pass(task) == ForwardPass(outputs, 3)


@pytest.mark.parametrize(
    ("cell", "products"), [("rnn", 1), ("mrnn", 2), ("lstm", 1), ("mlstm", 2), ("gru", 1)]
)
def test_the_unit_of_a_network(cell, products):
    network = Network(cell=cell, inputs=3, outputs=3, hidden=4, layers=2)
    assert network.forward_pass(10) == ForwardPass(2 * network.size * 10, 2 * products * 10)
