"""The pathological tasks: examples compared with definitions, success, runs, and the page of results."""

import itertools
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from on_host import turned

from hfmpi.data.batches import Cases
from hfmpi.errors import UserError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "pathological"
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import tasks

    return tasks


@pytest.fixture
def training(tasks):
    import training

    return training


def sequences(batch):
    """Return each example as lists: inputs, and the scored steps, counted from 1, with their targets."""
    batch = turned(batch)
    first = len(batch.inputs) - len(batch.targets) + 1
    for case in range(batch.inputs.shape[1]):
        scored = [
            (first + t, batch.targets[t, case].tolist())
            for t in range(len(batch.targets))
            if batch.mask is None or batch.mask[t, case] == 1
        ]
        yield batch.inputs[:, case].tolist(), scored


def marks(inputs):
    """Return the marked steps, counted from 1, and their numbers."""
    return [(t, number) for t, (number, mark) in enumerate(inputs, 1) if mark == 1]


@pytest.mark.parametrize("length", [30, 57])
@pytest.mark.parametrize("name", ["addition", "multiplication", "xor"])
def test_the_target_of_marked_numbers(tasks, name, length):
    rules = {
        "addition": lambda a, b: (a + b) / 2,
        "multiplication": lambda a, b: a * b,
        "xor": lambda a, b: float((a + b) % 2),
    }
    for inputs, scored in sequences(tasks.Task(name, length, 3).take(np.arange(150))):
        ((last, (target,)),) = scored
        (i, a), (j, b) = marks(inputs)
        assert length <= last <= 1.1 * length
        assert 1 <= i <= last / 10 < j <= last / 2
        assert target == rules[name](a, b)
        assert {mark for _, mark in inputs} == {0, 1}
        numbers = [number for number, _ in inputs]
        assert set(numbers) == {0, 1} if name == "xor" else 0 <= min(numbers) < max(numbers) < 1


@pytest.mark.parametrize("length", [30, 57])
@pytest.mark.parametrize(("name", "tenths"), [("temporal-2", (1, 5)), ("temporal-3", (1, 3, 6))])
def test_the_target_of_temporal_order(tasks, name, tenths, length):
    orders = list(itertools.product((4, 5), repeat=len(tenths)))
    for inputs, scored in sequences(tasks.Task(name, length, 3).take(np.arange(150))):
        special = [(t, symbol) for t, symbol in enumerate(inputs, 1) if symbol >= 4]
        assert len(inputs) == length
        assert min(inputs) >= 0
        for (t, _), tenth in zip(special, tenths, strict=True):
            assert tenth * length <= 10 * t <= (tenth + 1) * length
        assert scored == [(length, orders.index(tuple(symbol for _, symbol in special)))]


def test_the_targets_of_the_permutation(tasks):
    for inputs, scored in sequences(tasks.Task("permutation", 30, 3).take(np.arange(150))):
        assert inputs[0] in (0, 1)
        assert set(inputs[1:]) <= set(range(2, 100))
        assert scored == list(enumerate([*inputs[1:], inputs[0]], 1))


@pytest.mark.parametrize(("name", "symbols", "values"), [("memory-5", 5, 2), ("memory-20", 10, 5)])
def test_the_targets_of_memory(tasks, name, symbols, values):
    task, length, blank, trigger = tasks.Task(name, 30, 3), 30, values, values + 1
    seen = set()
    for inputs, scored in sequences(task.take(np.arange(min(task.count, 150)))):
        kept, wait, answer = inputs[:symbols], inputs[symbols:-symbols], inputs[-symbols:]
        assert set(kept) <= set(range(values))
        assert wait == [blank] * (length - 1) + [trigger]
        assert answer == [blank] * symbols
        assert scored == list(enumerate([blank] * (symbols + length) + kept, 1))
        seen.add(tuple(kept))
    assert len(seen) == min(values**symbols, 150)  # all sequences of 5 bits


def test_cases_are_a_function_of_seed_and_index(tasks):
    for name in tasks.KINDS:
        task = tasks.Task(name, 20, 5)
        assert isinstance(task, Cases)
        order = np.array([31, 3, 17, 3] if name == "memory-5" else [731, 3, 117, 3])
        some, whole = task.take(order), tasks.Task(name, 20, 5).take(np.arange(min(task.count, 800)))
        other = tasks.Task(name, 20, 6).take(order)
        for part, every in zip(some[:3], whole[:3], strict=True):
            assert (part is None) == (every is None)
            if part is not None:
                np.testing.assert_array_equal(part, every[order])
                assert part.flags.c_contiguous
        assert np.array_equal(some.inputs, other.inputs) == (name == "memory-5")  # which is not random
        targets = some.targets.shape[1] * 4 if some.mask is None else some.mask.sum()
        assert task.scored(order) == targets
        with pytest.raises(IndexError):
            task.take(np.array([task.count]))


def test_what_is_drawn_is_uniform(tasks):
    cases = 4000

    def drawn(name):
        return turned(tasks.Task(name, 30, 3).take(np.arange(cases)))

    def uniform(values, expected):
        found, counts = np.unique(values, return_counts=True)
        assert found.tolist() == list(expected)
        each = len(values) / len(expected)
        assert abs(counts - each).max() < 5 * np.sqrt(each)

    inputs, _, mask, *_ = drawn("addition")
    length, (first, second) = (
        30 + mask.argmax(axis=0),
        np.sort(np.argsort(inputs[..., 1], axis=0)[-2:], axis=0),
    )
    uniform(length, range(30, 34))
    uniform(first + 1, range(1, 4))
    uniform(second[length < 32] + 1, range(4, 16))
    uniform(inputs[:, :100, 0].reshape(-1) * 10 // 1, range(10))
    uniform(drawn("xor").targets.sum(axis=0)[:, 0], range(2))
    inputs, targets, *_ = drawn("temporal-3")
    uniform(targets[0], range(8))
    uniform((inputs > 3).argmax(axis=0) + 1, range(3, 7))
    uniform(inputs[0], range(4))
    inputs = drawn("permutation").inputs
    uniform(inputs[0], range(2))
    uniform(inputs[9], range(2, 100))
    uniform(drawn("memory-20").inputs[9], range(5))


def test_there_is_no_such_task(tasks):
    with pytest.raises(UserError, match="unknown task 'sorting': choose one of addition, "):
        tasks.Task("sorting", 30, 0)
    with pytest.raises(UserError, match="the length 9 is too short for xor: use at least 10"):
        tasks.Task("xor", 9, 0)


def test_which_answers_are_wrong(tasks, training):
    def wrong(name, found, targets, mask=None):
        found, targets = np.array(found, float), np.array(targets)
        mask = None if mask is None else np.array(mask)
        return training.mistakes(tasks.Task(name, 30, 0), found, targets, mask).tolist()

    one = [[1, 1, 1]]
    off, zeros = [[[0.039], [-0.041], [0.041]]], [[[0.0]] * 3]
    assert wrong("addition", off, zeros, one) == [[False, True, True]]
    assert wrong("multiplication", off, zeros, [[1, 0, 1]]) == [[False, False, True]]
    assert wrong("xor", [[[0.4], [0.6], [0.6]]], [[[0], [0], [1]]], one) == [[False, True, False]]
    likely = [[[0.5, 0.2, 0.3], [0.2, 0.3, 0.5]], [[0.5, 0.2, 0.3], [0.2, 0.3, 0.5]]]
    assert wrong("memory-5", likely, [[0, 1], [1, 2]]) == [[False, True], [True, False]]
    assert wrong("permutation", likely, [[0, 1], [1, 2]]) == [[True, False]]  # only the last step counts


def test_a_test_counts_what_the_network_gets_wrong(tasks, training):
    for name in "addition", "memory-20":
        task = tasks.Task(name, 12, 0)
        network = training.Run(name, 12, "rnn", "adam", 0.01, 0, hidden=5).network()
        theta = training.initial(network, 0).astype(network.backend.dtype)
        batch, wrong, outputs = turned(task.take(np.arange(60))), 0, 0
        answers = [network.advance(theta, None, batch.inputs[: t + 1])[1] for t in range(len(batch.inputs))]
        first = len(batch.inputs) - len(batch.targets)
        for case in range(60):
            missed = 0
            for t, target in enumerate(batch.targets[:, case]):
                answer = answers[first + t][case]
                if name == "memory-20":
                    missed += int(answer.argmax() != target)
                elif batch.mask[t, case]:
                    missed += int(abs(answer[0] - target[0]) > 0.04)
            wrong, outputs = wrong + (missed > 0), outputs + missed
        assert wrong > 0
        assert training.test(network, theta, task, 60) == pytest.approx((wrong / 60, outputs / 60))


def test_a_network_starts_as_in_the_released_code(training):
    run = training.Run("permutation", 30, "rnn", "adam", 0.01, 0)
    network = run.network()
    views = network.layout.views(training.initial(network, 0))
    for name, scale in ("W_h", 1.0), ("W_x", 0.25), ("W_o", 1.0):
        assert ((views[name] != 0).sum(axis=0) == 15).all()
        weights = views[name][views[name] != 0]
        assert weights.std() == pytest.approx(scale / 15**0.5, rel=0.1)
    assert abs(np.linalg.eigvals(views["W_h"])).max() == pytest.approx(1, abs=0.15)


def test_a_task_is_solved_and_a_run_goes_on_where_it_was(training, tmp_path):
    run = training.Run("memory-5", 10, "rnn", "subspace", 1e-3, 0, hidden=15)
    whole = training.train(run, tmp_path / "whole", 30, 2000)
    assert whole["solved"]
    assert whole["wrong"] == whole["outputs"] == 0
    first = training.train(run, tmp_path / "parts", 30, whole["P_I_full"] // 2)
    assert not first["solved"]
    assert 0 < first["wrong"] <= 1
    assert first["P_I_full"] < whole["P_I_full"] / 2 + 10
    again = training.train(run, tmp_path / "parts", 30, whole["P_I_full"] // 2)
    assert again == first  # the limit is unchanged
    rest = training.train(run, tmp_path / "parts", 30, 2000)
    assert rest | {"seconds": 0} == whole | {"seconds": 0}
    assert training.train(run, tmp_path / "parts", 30, 4000) == rest  # a solved run is not continued


def test_the_study_tunes_then_runs_and_its_tables_say_so(training, tmp_path, monkeypatch, capsys):
    given = (
        f"run.py --tasks memory-5 --lengths 10 --methods adam,subspace --hidden 5 --seeds 2 {tmp_path}/out"
    )
    monkeypatch.setattr(sys, "argv", [*given.split(), "--seconds", "0.01", "--tuning", "0.01"])
    monkeypatch.setattr(training, "TUNED_ON", 10)
    runpy.run_path(str(FOLDER / "run.py"), run_name="__main__")
    out = tmp_path / "out"
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}/results.json"
    records = json.loads((out / "results.json").read_text())
    for method in "adam", "subspace":
        own = [r for r in records if r["method"] == method]
        value = training.best([r for r in own if r["seed"] == 4])
        assert [r["value"] for r in own if r["seed"] < 4] == [value, value]
    for path in out, out / "results.json":
        monkeypatch.setattr(sys, "argv", ["table.py", str(path)])
        runpy.run_path(str(FOLDER / "table.py"), run_name="__main__")
        rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | " in line]
        assert rows[0] == ["| task", "adam", "subspace |"]
        assert rows[2][0] == "| memory-5"
        assert rows[2][1].startswith("> ")
        assert rows[2][1].endswith(" (0 of 2)")


def test_the_best_candidate_solves_with_the_least_passes_or_has_the_lowest_loss(training):
    def record(value, solved, passes, loss):
        return {"value": value, "solved": solved, "P_I_full": passes, "loss": loss}

    slow, quick = record(1, True, 90, 0.1), record(2, True, 60, 0.3)
    low, high, broken = (record(v, False, 100, loss) for v, loss in ((3, 0.2), (4, 0.4), (5, np.nan)))
    assert training.best([slow, low, quick]) == 2
    assert training.best([broken, high, low]) == 3
    assert training.best([record(7, False, 100, 0.2), low]) == 3  # equal candidates


def test_candidates_are_tried_until_the_best_has_neighbours(training):
    runs = training.tuning_runs("xor", "rnn", "adam", 4)
    assert {(run.task, run.length, run.seed) for run in runs} == {("addition", 30, 4)}
    assert len(runs) == 6

    def tried(*losses):
        each = zip(runs[: len(losses)], losses, strict=True)
        return {run: {"value": run.value, "solved": False, "loss": loss} for run, loss in each if loss}

    assert training.untried(runs, {}) == runs[2:5]
    assert training.untried(runs, tried(0, 0, 3, 1)) == runs[4:5]
    assert training.untried(runs, tried(0, 0, 3, 1, 2)) == []
    assert training.untried(runs, tried(0, 0, 1, 2, 3)) == runs[1:2]
    assert training.untried(runs, tried(0, 2, 1, 2, 3)) == []
    assert training.untried(runs, tried(1, 2, 3, 4, 5)) == []  # the last candidate
    assert training.untried(runs, tried(0, 0, 3, 2, 1)) == runs[5:]


def test_medians_over_seeds(tasks):
    passes = runpy.run_path(str(FOLDER / "table.py"))["passes"]

    def runs(*ends):
        return [{"solved": end > 0, "P_I_full": abs(end)} for end in ends]

    assert passes(runs(10, 30, 20, 50)) == "25"
    assert passes(runs(10, 30)) == "20 (2 of 2)"
    assert passes(runs(10, -900, 20, 50)) == "35 (3 of 4)"
    assert passes(runs(1000, -3000, 20, -5000)) == "> 4,000 (2 of 4)"
    assert passes(runs(-7000)) == "> 7,000 (0 of 1)"


def test_the_page_of_results_is_what_its_file_says(tasks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table.py", str(RESULTS / "pathological.json")])
    runpy.run_path(str(FOLDER / "table.py"), run_name="__main__")
    page = (RESULTS / "pathological.md").read_text().splitlines()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    assert [row for row in rows if row not in page] == []
