"""The end of a run: with the lowest loss, converged, by an error, or at the time limit."""

import importlib
import json
import math
import signal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Recorder, history, train, write_corpus
from test_python_train import NEXT, SYMBOLS, VALID, Line, X, Y, mpirun, network
from test_train import Clock

import hfmpi
from hfmpi.backends import create
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.history import History
from hfmpi.objective.data_parallel import DataParallel, Stopped
from hfmpi.optim.layout import Block, kronecker_layout
from hfmpi.parallel.communicator import Communicator
from hfmpi.runs.start import _starting_point
from hfmpi.runs.train import Run
from hfmpi.runs.trained_model import Trained

WILD = {"quiet": True, "gradient_batch": 60, "optimizer": "adam", "settings": {"rate": 0.5}}


def loss(model, theta, x, y):
    cases = hfmpi.Arrays(x, y)
    every = np.arange(cases.count)
    return model.loss(theta, cases.take(every)) / cases.scored(every)


# The lowest loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    WILD,
    WILD | {"optimizer": "sgd", "settings": {"rate": 3.0}},
    WILD | {"optimizer": "subspace", "settings": {"damping": 1e-6}},
    WILD | {"optimizer": "bhf-short", "settings": {}},
    WILD | {"optimizer": "subspace", "settings": {"candidates": 2}},
], ids=["adam", "sgd", "subspace", "bhf-short", "candidates"])  # fmt: skip
def test_the_result_has_the_lowest_loss_that_is_known(options, tmp_path):
    given, seen, last_won = (network(), (SYMBOLS, NEXT), VALID), [], 0
    for steps in range(1, 9):
        whole = hfmpi.train(*given, max_steps=steps, **options)
        part = hfmpi.train(*given, max_steps=steps, out=tmp_path / "run", **options)  # resumed each time
        np.testing.assert_array_equal(part.theta, whole.theta)
        known = [record["loss"] for record in whole.history]
        found = loss(network(), whole.theta, SYMBOLS, NEXT)
        last = loss(network(), checkpoint.latest(tmp_path / "run").theta, SYMBOLS, NEXT)
        assert found == pytest.approx(min([*known, last]), rel=1e-12)
        assert whole.valid_loss == pytest.approx(loss(network(), whole.theta, *VALID), rel=1e-12)
        last_won += last <= min(known)
        seen.append([round(value, 9) for value in known])
    assert all(record == seen[-1][: len(record)] for record in seen)
    assert last_won > 0
    assert last_won < 8 or options["optimizer"] not in ("adam", "sgd")


@pytest.mark.parametrize("changes", [
    {"settings": {"rate": 0.5, "averaging": 0.9}},
    {"settings": {"rate": 0.5, "decay": 1e-3}},
    {"gradient_batch": 59},
])  # fmt: skip
def test_the_result_is_the_last_where_the_loss_is_not_what_counts(changes, tmp_path):
    for steps in 2, 3, 5, 8:
        result = hfmpi.train(
            network(), (SYMBOLS, NEXT), max_steps=steps, out=tmp_path / "run", **WILD | changes
        )
        saved = checkpoint.latest(tmp_path / "run")
        assert "lowest" not in saved.state
        expected = saved.state["average"] if saved.state["average"].size else saved.theta
        np.testing.assert_array_equal(result.theta, expected)


def test_evaluation_and_other_runs_use_the_lowest_loss(tmp_path):
    data = write_corpus(tmp_path / "c.h5")
    options = {"optimizer": "adam", "gradient_batch": 210, "settings": {"rate": 1.0}, "dtype": "float64"}
    options["keep"] = "last"
    for steps in range(2, 9):
        run, ending = train(tmp_path / "run", data, max_steps=steps, **options)
        lowest = run.lowest
        trained = Trained.read(tmp_path / "run")
        np.testing.assert_array_equal(trained.theta, run.evaluated)
        assert ending.valid.loss == run.evaluate(trained.theta)
        np.testing.assert_array_equal(checkpoint.latest(tmp_path / "run").theta, run.theta)
        if lowest.returned:
            break
    assert np.abs(trained.theta - run.theta).max() > 0.1
    found, config = checkpoint.latest(tmp_path / "run"), run.config
    same, _ = _starting_point(found, "run", config, True)
    np.testing.assert_array_equal(same.theta, run.theta)
    np.testing.assert_array_equal(same.state["lowest"], trained.theta)
    other, _ = _starting_point(found, "run", config, False)  # on other data
    np.testing.assert_array_equal(other.theta, trained.theta)
    assert "lowest" not in other.state.keys() | other.meta.keys()


@pytest.mark.parametrize("wrong", [
    {"risk": "1"}, {"risk": math.nan}, {"returned": 1}, {"risk": None}, None, [],
])  # fmt: skip
def test_a_checkpoint_with_a_wrong_lowest_loss_is_refused(wrong, tmp_path):
    options = WILD | {"out": tmp_path / "run"}
    hfmpi.train(network(), (SYMBOLS, NEXT), max_steps=3, **options)
    path = tmp_path / "run" / checkpoint.NEWEST
    found = checkpoint.load(path)
    meta = found.meta | {"lowest": found.meta["lowest"] | wrong if isinstance(wrong, dict) else wrong}
    checkpoint.save(path, found.theta, found.state, meta)
    with pytest.raises(
        UserError, match="invalid checkpoint: the entries of its lowest risk do not match the model"
    ):
        hfmpi.train(network(), (SYMBOLS, NEXT), max_steps=4, **options)


# Convergence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["shf", "bhf", "bhf-short", "subspace"])
def test_a_run_that_has_converged_ends_with_its_result(optimizer, tmp_path):
    model = Line(3)
    options = {"optimizer": optimizer, "quiet": True, "max_steps": 2000, "out": tmp_path / "run"}
    if optimizer == "subspace":
        model.blocks = (Block("w", 0, 4, 1),)
        options["settings"] = {"directions": "gradient", "curvature_segments": 0}
    result = hfmpi.train(model, (X, Y), **options)
    assert result.done
    assert result.step < 2000
    assert result.reason.startswith(f"converged at step {result.step}: the ")
    assert result.history[-1]["accepted"]
    assert result.history[-1]["step_norm"] == 0
    assert (tmp_path / "run" / "DONE").read_text() == f"{result.reason}\n"
    assert checkpoint.latest(tmp_path / "run").meta["step"] == result.step
    again = hfmpi.train(model, (X, Y), **options)
    assert again.done
    assert result.step < again.step <= result.step + 3  # different curvature examples may still lower it
    np.testing.assert_allclose(again.theta, result.theta, rtol=1e-14)


@pytest.mark.parametrize("optimizer", ["shf", "bhf-short"])
def test_on_changing_batches_a_converged_step_is_empty_and_the_run_goes_on(optimizer):
    options = {"optimizer": optimizer, "gradient_batch": 20, "curvature_batch": 20, "quiet": True}
    result = hfmpi.train(Line(3), (X, Y), max_steps=200, **options)
    assert result.step == 200
    empty = [record for record in result.history if record["message"].startswith("the predicted decrease is")]
    assert len(empty) > 10
    assert all(record["accepted"] and record["step_norm"] == 0 for record in empty)
    np.testing.assert_allclose(result.theta, [1, -2, 3, 0.5], rtol=1e-6)


@pytest.mark.parametrize("seed", [1, 3])
def test_in_float32_the_subspace_step_hardly_depends_on_the_order_of_summation(seed):
    """Slices are summed as ranks are; with a floor of 1e-9 these losses differed by 3 % and 0.3 %."""
    runs, about = [], {"cell": "gru", "inputs": 4, "outputs": 4, "hidden": 12}
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (60, 9))
    y = (x + np.roll(x, 1, 1)) % 4
    for slices in 1, 2, 4:
        model = hfmpi.Network(**about, backend=create("numpy", "float32"))
        options = {"optimizer": "subspace", "slices": slices, "seed": seed, "max_steps": 4, "quiet": True}
        runs.append([record["loss"] for record in hfmpi.train(model, (x, y), **options).history])
    np.testing.assert_allclose(runs[1:], [runs[0]] * 2, rtol=5e-4)  # of 16 seeds, 1e-5 is the median


# Errors ------------------------------------------------------------------------------------------


class Faulty:
    """Examples, a model and a metric, one of which fails from a certain call on, unless it is repaired."""

    def __init__(self, where, call):
        self.where, self.left, self.count = where, call, len(Y)

    def at(self, where):
        if where == self.where:
            self.left -= 1
            if self.left < 0:
                raise OSError("the file is gone")

    def take(self, indices):
        self.at("data")
        return hfmpi.Examples(X, Y).take(indices)

    def scored(self, indices):
        return len(indices)

    def metric(self, outputs, targets):
        self.at("metric")
        return np.abs(outputs[:, 0] - targets)


class Own(Line):
    fault = Faulty("", 0)

    def linearise(self, theta, batch, reuse=None):
        self.fault.at("model")
        return super().linearise(theta, batch)

    def outputs(self, theta, batch):
        return self.linearise(theta, batch).rows @ theta[:, None], batch.targets, None


def faulty(where, call, folder, **changes):
    model, cases = Own(3), Faulty(where, call)
    model.fault = cases
    given = {"optimizer": "shf", "gradient_batch": 20, "curvature_batch": 20, "max_steps": 6, "quiet": True}
    given |= {"out": folder, "checkpoint_every": 4, "evaluate_every": 1, "metric": cases.metric} | changes
    return hfmpi.train(model, cases, (X[:5], Y[:5]), **given)


@pytest.mark.parametrize("where", ["data", "model", "metric"])
def test_an_exception_of_the_users_ends_a_run_with_a_checkpoint_and_a_result(where, tmp_path, monkeypatch):
    monkeypatch.setattr("hfmpi.data.digest.digest_of", lambda cases: "same")
    monkeypatch.setattr("hfmpi.runs.model_task.digest_of", lambda cases: "same")
    whole, failed, kinds = faulty("", 0, tmp_path / "whole"), 0, set()
    for call in range(200):
        folder = tmp_path / f"{call}"
        try:
            faulty(where, call, folder)
        except (OSError, UserError) as error:
            kinds.add(type(error))
            result = getattr(error, "result", None)
            if result is None:  # before the first step
                assert not folder.exists() or not (folder / checkpoint.NEWEST).exists()
                continue
            failed += 1
            assert not result.done
            assert "the file is gone" in result.reason
            assert (result.valid_loss, result.valid_metric) == (None, None)
            assert [record["step"] for record in result.history] == [*range(1, result.step + 1)]
            if result.step:
                saved = checkpoint.latest(folder)
                assert saved.meta["step"] == result.step
                np.testing.assert_array_equal(saved.theta, result.theta)
            assert not (folder / "DONE").exists()
            again = faulty("", 0, folder)
            np.testing.assert_array_equal(again.theta, whole.theta)
            assert again.step == 6
        else:
            break
    assert failed >= 6
    assert kinds == {UserError if where == "metric" else OSError}
    assert call < 199


def test_an_error_of_many_rejections_hands_out_the_result(tmp_path):
    class Wrong(Line):
        """A model whose gradient points uphill after a number of steps."""

        steps = 0

        def linearise(self, theta, batch, reuse=None):
            at = super().linearise(theta, batch)
            self.steps += 1
            if self.steps > 12:
                at.error = -at.error  # its loss is already computed
            return at

    options = {"optimizer": "bhf-short", "max_rejections": 3, "quiet": True, "out": tmp_path / "run"}
    with pytest.raises(UserError, match="3 steps in a row were rejected up to step") as caught:
        hfmpi.train(Wrong(3), (X, Y), max_steps=50, **options)
    result = caught.value.result
    assert result.step == len(result.history) == checkpoint.latest(tmp_path / "run").meta["step"]
    assert f"the last checkpoint, of step {result.step}, is valid" in str(caught.value)
    assert [record["accepted"] for record in result.history[-4:]] == [True, False, False, False]
    assert np.isfinite(result.theta).all()


def test_parameters_that_went_wrong_are_neither_saved_nor_handed_out(tmp_path):
    options = {"optimizer": "sgd", "gradient_batch": 20, "quiet": True, "checkpoint_every": 3}
    huge = {"settings": {"rule": "clip", "rate": 1e200, "threshold": 1e200}}
    with pytest.raises(UserError, match="is not finite") as caught:
        hfmpi.train(Line(3), (X, Y), out=tmp_path / "run", max_steps=9, **options | huge)
    np.testing.assert_array_equal(caught.value.result.theta, Line(3).initial(0))
    assert not (tmp_path / "run" / checkpoint.NEWEST).exists()


def test_an_error_before_the_first_step_has_no_result():
    with pytest.raises(UserError) as caught:
        hfmpi.train(Line(3), (X, Y[1:]), max_steps=1)
    assert caught.value.result is None


FAILING = """
class Failing(Line):
    def linearise(self, theta, batch, reuse=None):
        if rank == 1 and os.path.exists("run/history.jsonl") and os.path.getsize("run/history.jsonl") > 900:
            raise {error}
        return super().linearise(theta, batch)

options = {{"optimizer": "{optimizer}", "gradient_batch": 20, "max_steps": 90, "checkpoint_every": 1000}}
try:
    hfmpi.train(Failing(3), (X, Y), out="run", quiet=True, **options)
except Exception as error:
    result = error.result
    said = type(error).__name__, str(error), result.step, result.theta.tolist(), len(result.history)
    with open(f"said{{rank}}", "w") as file:
        json.dump(said, file)
"""


@pytest.mark.parametrize("error", ['ValueError("my own mistake")', 'UserError("my own mistake")'])
@pytest.mark.parametrize("optimizer", ["shf", "sgd"])
def test_an_exception_of_one_rank_is_raised_on_all_with_the_result(error, optimizer, tmp_path):
    code, _, err = mpirun(2, tmp_path, FAILING.format(error=error, optimizer=optimizer))
    assert code == 0, err
    first, second = (json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2))
    kind = error.partition("(")[0]
    sentence = "my own mistake" if kind == "UserError" else f"rank 1 failed with {kind}: my own mistake"
    assert first[:2] == ["UserError", sentence]
    assert second[:2] == [kind, "my own mistake"]
    assert first[2:4] == second[2:4]
    saved = checkpoint.latest(tmp_path / "run")
    assert saved.meta["step"] == first[2] == first[4] > 0
    assert saved.theta.tolist() == first[3]


# Batches without a scored output -----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "shf", "subspace"])
def test_a_batch_without_a_scored_output_makes_an_empty_step(optimizer, tmp_path):
    mask = np.ones((60, 9))
    mask[3::4] = 0
    options = {"optimizer": optimizer, "gradient_batch": 2, "quiet": True, "out": tmp_path / "run"}
    if optimizer != "adam":
        options["curvature_batch"] = 1
    result = hfmpi.train(network(), (SYMBOLS, NEXT, mask), max_steps=90, **options)
    empty = [record for record in result.history if record["loss"] is None]
    assert 1 <= len(empty) < 60
    assert result.step == 90
    for record in empty:
        assert (
            record["message"]
            == "a batch has no scored outputs: check the mask and the weights; its step changes nothing"
        )
        assert (record["accepted"], record["gradients"]) == (True, 0)
    for stop in range(15, 91, 15):
        part = hfmpi.train(
            network(), (SYMBOLS, NEXT, mask), max_steps=stop, **options | {"out": tmp_path / "part"}
        )
    np.testing.assert_array_equal(part.theta, result.theta)


def test_a_checkpoint_does_not_need_a_scored_output_among_the_first_examples(tmp_path):
    mask = np.ones_like(SYMBOLS)
    mask[:8] = 0
    options = {"optimizer": "adam", "micro_batch": 4, "max_steps": 2, "quiet": True}
    result = hfmpi.train(network(), (SYMBOLS, NEXT, mask), out=tmp_path / "run", **options)
    assert result.done
    assert checkpoint.latest(tmp_path / "run").meta["step"] == 2


def test_a_training_set_without_a_scored_output_is_an_error():
    with pytest.raises(UserError, match="no output of the training examples is scored"):
        hfmpi.train(network(), (SYMBOLS, NEXT, np.zeros((60, 9))), max_steps=2, **WILD)


# Time is up between decompositions ---------------------------------------------------------------


@given(st.integers(0, 6), st.sampled_from(["stop", "overdue"]))
@settings(deadline=None, max_examples=20)
def test_work_on_matrices_ends_before_the_next_one(after, how):
    done = []
    wish = {how: lambda: len(done) >= after}
    owner = DataParallel(network(), Communicator(), **wish)
    risk = owner.on(hfmpi.Arrays(SYMBOLS, NEXT), np.arange(5))

    def work():
        done.append(1)
        return np.zeros(3)

    if after < 5 or (how == "stop" and after == 5):  # which the sum also checks
        with pytest.raises(Stopped):
            risk.spread([work] * 5, [3] * 5)
    else:  # the time limit is reached, but no step is left
        risk.spread([work] * 5, [3] * 5)
    assert len(done) == min(after, 5)


def test_long_sides_have_no_matrix():
    blocks = Block("table", 0, 2501, 2), Block("square", 5002, 3, 2500)
    theta = np.zeros(5002 + 7500, np.float32)
    assert [shape for each in kronecker_layout(blocks).layouts for shape in each.shapes.values()] == [
        (2501,), (2, 2), (3, 3), (2500, 2500),
    ]  # fmt: skip
    assert hfmpi.SOAP().init(theta, blocks).factors.size == 2**2 + 3**2 + 2500**2


@pytest.mark.parametrize(("optimizer", "name"), [
    ("soap", "soap._eigenvectors"), ("subspace", "kfac._decompose"), ("muon", "muon.orthogonal"),
    ("soap-muon", "soap._eigenvectors"),
])  # fmt: skip
def test_a_step_on_matrices_is_dropped_where_time_is_up(optimizer, name, tmp_path, monkeypatch):
    data, clock = write_corpus(tmp_path / "c.h5"), Clock()
    module, name = name.split(".")
    module = importlib.import_module(f"hfmpi.optim.{module}")
    compute = getattr(module, name)

    def slow(*arguments):
        clock.seconds += 4
        return compute(*arguments)

    monkeypatch.setattr(module, name, slow)
    reporter = Recorder()
    options = {"optimizer": optimizer, "max_seconds": 9.0, "gradient_batch": 210}
    run, ending = train(tmp_path / "run", data, clock=clock, reporter=reporter, **options)
    assert (ending.done, ending.reason) == (True, "9 seconds have passed")
    assert ending.step == len(history(tmp_path / "run") if ending.step else []) == 0
    assert 9 <= clock.seconds < 20
    assert ending.valid is not None
    assert (tmp_path / "run" / "DONE").read_text() == "9 seconds have passed\n"
    np.testing.assert_array_equal(checkpoint.latest(tmp_path / "run").theta, run.theta)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    _, again = train(tmp_path / "run", data, clock=Clock(), **options)
    assert (again.step, again.reason) == (0, "9 seconds have passed")


# The last validation ---------------------------------------------------------------------------


def test_the_last_validation_is_in_the_history(tmp_path):
    """Also if a limit of seconds is reached between two evaluations, or interrupts a step."""
    data = write_corpus(tmp_path / "small.h5")
    options = {"optimizer": "adam", "max_seconds": 0.4, "evaluate_every": 1000}
    _, ending = train(tmp_path / "run", data, **options)
    lines = history(tmp_path / "run")
    assert 0 < ending.step == len(lines) < 1000
    assert [line["valid_bpc"] for line in lines] == [None] * (ending.step - 1) + [ending.valid.loss]
    # Another start, after a stop that came before the validation.
    content = (tmp_path / "run" / "history.jsonl").read_text()
    other = content.replace(f'"valid_bpc": {ending.valid.loss!r}', '"valid_bpc": null')
    assert other != content
    (tmp_path / "run" / "history.jsonl").write_text(other)
    train(tmp_path / "run", data, **options)
    assert (tmp_path / "run" / "history.jsonl").read_text() == content


@pytest.mark.parametrize("folder", [None, "run"])
def test_the_last_validation_is_in_the_result(folder, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 4, (30, 9))
    network = hfmpi.Network(cell="gru", inputs=4, outputs=4, hidden=5, backend=create("numpy"))
    result = hfmpi.train(
        network,
        (x, x),
        valid=(x[:5], x[:5]),
        metric=lambda outputs, targets: outputs.argmax(axis=1) == targets,
        out=folder and tmp_path / folder,
        optimizer="adam",
        evaluate_every=1000,
        max_seconds=0.4,
        quiet=True,
    )
    assert result.valid_loss is not None
    last = result.history[-1]
    assert (last["valid_loss"], last["valid_metric"]) == (result.valid_loss, result.valid_metric)
    assert all(record["valid_loss"] is None for record in result.history[:-1])
    assert folder is None or history(tmp_path / folder)[-1]["valid_loss"] == result.valid_loss


@pytest.mark.parametrize("place", ["_update_seconds", "history"])
def test_an_error_between_a_step_and_its_record_loses_no_record(place, tmp_path, monkeypatch):
    """A checkpoint of the step would leave a history without it."""
    data, options = write_corpus(tmp_path / "small.h5"), {"max_steps": 6, "checkpoint_every": 2}
    whole, _ = train(tmp_path / "whole", data, **options)
    owner, name = (Run, place) if place == "_update_seconds" else (History, "add")
    honest = getattr(owner, name)

    def fails(self, *arguments):
        lines = tmp_path / "run" / "history.jsonl"
        steps = len(history(tmp_path / "run")) if lines.exists() else 0
        if steps == 2 and (place == "history" or self.step == 3):
            raise RuntimeError("planted")
        return honest(self, *arguments)

    monkeypatch.setattr(owner, name, fails)
    with pytest.raises(RuntimeError, match="planted"):
        train(tmp_path / "run", data, **options)
    monkeypatch.undo()
    run, _ = train(tmp_path / "run", data, **options)
    np.testing.assert_array_equal(run.theta, whole.theta)
    assert history(tmp_path / "run") == history(tmp_path / "whole")
