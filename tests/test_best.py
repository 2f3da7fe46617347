"""The parameters of the best validation: kept, saved in best.h5, resumed bit for bit, and used afterwards."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from small import Recorder, history, make_run, train, write_corpus
from test_file_faults import Disk, During
from test_python_train import mpirun, network, right

import hfmpi
from hfmpi.cli.main import cli
from hfmpi.errors import UserError
from hfmpi.files import checkpoint, writer
from hfmpi.files.checkpoint import BEST, NEWEST, PREVIOUS
from hfmpi.runs.best import LOSS, Best, Watch, judged
from hfmpi.runs.record import Validation
from hfmpi.runs.restore import best, best_entries
from hfmpi.runs.trained_model import Trained

RNG = np.random.default_rng(5)
SYMBOLS, TARGETS = RNG.integers(0, 4, (2, 40, 6))  # random targets, which can only be memorised
GIVEN = (network(8), (SYMBOLS[:20], TARGETS[:20]), (SYMBOLS[20:], TARGETS[20:]))
OVERFITS = {
    "optimizer": "adam",
    "gradient_batch": 10,
    "settings": {"rate": 0.05},
    "evaluate_every": 1,
    "checkpoint_every": 3,
    "quiet": True,
}


def fit(steps, model=None, **options):
    return hfmpi.train(model or GIVEN[0], *GIVEN[1:], max_steps=steps, **OVERFITS | options)


def valid_losses(result):
    return [record["valid_loss"] for record in result.history]


# The rule ----------------------------------------------------------------------------------------


def test_the_result_is_that_of_the_best_validation(tmp_path):
    last = fit(16, out=tmp_path / "last")
    best = fit(16, out=tmp_path / "best", keep="best")
    bare = fit(16, keep="best")
    losses = valid_losses(last)
    assert valid_losses(best) == losses  # the training is the same
    step = 1 + int(np.argmin(losses))
    assert step < 12  # it overfits
    assert (last.best_step, last.kept_best, last.valid_loss) == (step, False, losses[-1])
    for result in best, bare:
        assert (result.best_step, result.kept_best, result.valid_loss) == (step, True, min(losses))
        assert hfmpi.evaluate(GIVEN[0], result.theta, GIVEN[2]).loss == pytest.approx(min(losses), rel=1e-12)
    np.testing.assert_array_equal(fit(step).theta, best.theta)
    for name in "last", "best":
        saved = checkpoint.load(tmp_path / name / BEST)
        np.testing.assert_array_equal(saved.theta, best.theta)
        assert (saved.state, saved.meta["step"], saved.meta["valid_loss"]) == ({}, step, min(losses))
        np.testing.assert_array_equal(checkpoint.latest(tmp_path / name).theta, last.theta)
    counts = [record["gradients"] for record in best.history]
    assert saved.meta["counts"]["gradients"] == sum(counts[:step])


def test_without_validation_data_there_is_no_best(tmp_path):
    result = hfmpi.train(*GIVEN[:2], out=tmp_path / "run", max_steps=2, **OVERFITS)
    assert (result.best_step, result.valid_loss) == (None, None)
    assert not (tmp_path / "run" / BEST).exists()
    for options, name in (({"keep": "best"}, "keep='best'"), ({"patience": 2}, "patience")):
        with pytest.raises(UserError, match=f"{name} needs validation data: pass valid too"):
            hfmpi.train(*GIVEN[:2], max_steps=2, **OVERFITS | options)
    with pytest.raises(UserError, match="keep must be best or last, not 'first'"):
        fit(2, keep="first")


def test_the_mean_of_the_iterates_is_what_is_kept():
    options = {"keep": "best", "settings": {"rate": 0.05, "averaging": 0.6}}
    best = fit(16, **options)
    assert best.best_step < 16
    np.testing.assert_array_equal(fit(best.best_step, **options | {"keep": "last"}).theta, best.theta)


@pytest.mark.parametrize("optimizer", ["shf", "subspace", "lbfgs", "muon", "soap"])
def test_optimizers_do_not_overwrite_what_is_kept(optimizer):
    options = {"optimizer": optimizer, "gradient_batch": 20, "settings": {}, "keep": "best"}
    best = fit(12, **options)
    assert best.valid_loss == min(valid_losses(best))
    assert hfmpi.evaluate(GIVEN[0], best.theta, GIVEN[2]).loss == pytest.approx(best.valid_loss, rel=1e-12)


def test_a_validation_that_is_not_finite_is_never_the_best():
    theta = [np.full(2, float(k)) for k in range(4)]
    best = None
    for step, loss in enumerate([np.nan, 2.0, np.inf, 1.0], start=1):
        best = judged(best, LOSS, theta[step - 1], Validation(loss), step)
        best = judged(best, LOSS, theta[0], Validation(0.0), step) if best else best  # the same step again
        expected = [None, (2, 0), (2, 1), (4, 0)][step - 1]
        assert (best and (best.step, best.stale)) == expected
    np.testing.assert_array_equal(best.theta, theta[3])
    high = Watch.parse("max right", ["right"])
    accuracy = [Validation(1.0, {"right": x}) for x in (0.5, 0.4, 0.6)]
    best = None
    for step, valid in enumerate(accuracy, start=1):
        best = judged(best, high, theta[step], valid, step)
    assert (best.step, best.stale, str(high), high.noun) == (3, 0, "max right", "highest validation right")


# Several metrics, and which value counts -----------------------------------------------------------


def certain(outputs, targets):
    outputs -= outputs.max(axis=1, keepdims=True)  # a metric may work in place
    return 1 / np.exp(outputs).sum(axis=1)


def test_several_metrics_are_measured_by_name(tmp_path, capsys):
    metrics = {"accuracy": right, "certainty": certain, "again": right}
    result = fit(3, metric=metrics, out=tmp_path / "run", quiet=False)
    single = fit(3, metric=right)
    assert result.valid_metric["accuracy"] == result.valid_metric["again"] == single.valid_metric
    assert result.valid_metric.keys() == metrics.keys()
    record = json.loads((tmp_path / "run" / "history.jsonl").read_text().splitlines()[-1])
    assert {name: record[f"valid_{name}"] for name in metrics} == result.valid_metric
    assert "valid_metric" not in record
    assert f"accuracy {record['valid_accuracy']:.5g}" in capsys.readouterr().out
    assert hfmpi.evaluate(GIVEN[0], result.theta, GIVEN[2], metrics) == (
        result.valid_loss,
        result.valid_metric,
    )
    assert hfmpi.evaluate(GIVEN[0], result.theta, GIVEN[2], right).metric == single.valid_metric


@pytest.mark.parametrize(("metric", "words"), [
    ({"loss": right}, "the name of a metric must be a word such as 'accuracy', other than loss, bpc, metric"),
    ({"a b": right}, "not 'a b'"),
    ({3: right}, "not 3"),
    ({}, "metric must be a function"),
    ({"accuracy": 0.5}, "metric accuracy must be a function (outputs, targets) -> values, not 0.5"),
    ({"wrong": lambda z, y: 1.0}, "wrong(outputs, targets) must return a number for each of the 48 rows"),
])  # fmt: skip
def test_metrics_that_cannot_be_measured_are_refused(metric, words, tmp_path):
    with pytest.raises(UserError) as caught:
        fit(2, metric=metric, out=tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_best_may_be_that_of_a_metric(tmp_path):
    options = {"metric": {"accuracy": right, "certainty": certain}, "keep": "best", "out": tmp_path / "run"}
    result = fit(9, watch="max accuracy", **options)
    accuracies = [record["valid_accuracy"] for record in result.history]
    step = 1 + int(np.argmax(accuracies))
    assert (result.best_step, result.valid_metric["accuracy"]) == (step, max(accuracies))
    assert checkpoint.load(tmp_path / "run" / BEST).meta["best"]["watch"] == "max accuracy"
    low = fit(9, watch="min certainty", **options | {"out": None})
    assert low.best_step == 1 + int(np.argmin([record["valid_certainty"] for record in low.history]))
    with pytest.raises(
        UserError, match="this run compares its validations by watch='max accuracy', not 'loss'"
    ):
        fit(12, **options)
    for watch in "accuracy", "max right", "max", 3, "best accuracy":
        with pytest.raises(UserError, match="watch must be 'loss' or 'max accuracy' or 'min accuracy' or"):
            fit(2, watch=watch, **options | {"out": None})


# Patience ----------------------------------------------------------------------------------------


def test_a_run_without_a_better_validation_stops(tmp_path):
    whole = fit(30)
    losses = valid_losses(whole)
    stop = next(n for n in range(4, 31) if min(losses[: n - 3]) <= min(losses[n - 3 : n]))
    result = fit(30, patience=3, keep="best", out=tmp_path / "run")
    assert (result.step, result.done) == (stop, True)
    assert valid_losses(result) == losses[:stop]
    best = stop - 3
    assert result.reason == f"the lowest validation loss is that of step {best}, 3 validations ago"
    assert (tmp_path / "run" / "DONE").read_text() == f"{result.reason}\n"
    again = fit(30, patience=3, keep="best", out=tmp_path / "run")  # no step is left, in any repetition
    assert (again.step, again.reason) == (stop, result.reason)
    assert checkpoint.latest(tmp_path / "run").meta["best"]["stale"] == 3
    assert fit(30, patience=1).reason.endswith(", 1 validation ago")
    more = fit(30, patience=5, out=tmp_path / "run")
    assert more.step > stop
    assert valid_losses(more) == losses[: more.step]
    assert fit(30, patience=5).step == more.step


def test_a_run_that_no_longer_improves_says_so_once(tmp_path):
    recorder = Recorder()
    data = write_corpus(tmp_path / "c.h5")
    options = {"optimizer": "adam", "gradient_batch": 10, "settings": {"rate": 0.5}, "max_steps": 40}
    run, ending = train(tmp_path / "run", data, reporter=recorder, **options)
    losses = [record["valid_bpc"] for record in recorder.records]
    told = [note for note in recorder.notes if "the lowest validation loss was" in note]
    late = [
        step
        for step in range(1, 41)
        if step - 1 - int(np.argmin(losses[:step])) >= 10
        and losses[step - 1] - min(losses[:step]) >= 0.02 * min(losses[:step])
    ]
    assert late
    best = 1 + int(np.argmin(losses[: late[0]]))
    assert told == [
        f"the lowest validation loss was {losses[best - 1]:.5g} at step {best}, {late[0] - best} validations "
        f"ago, and it is {losses[late[0] - 1]:.5g} now; --patience N stops a run after N such validations"
    ]
    assert (ending.kept_step, ending.valid.loss) == (run.best.step, min(losses))


# Stops and resumes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"settings": {"rate": 0.05, "averaging": 0.6}}, {"gradient_batch": 20}]
)
def test_a_resumed_run_knows_its_best(changes, tmp_path):
    options = {"keep": "best"} | changes
    whole = fit(16, out=tmp_path / "whole", **options)
    for steps in (2, 3, 7, 11, 16, 16):
        part = fit(steps, out=tmp_path / "part", **options)
        assert part.valid_loss == min(valid_losses(part))
    for name in "theta", "best_step", "valid_loss":
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name))
    assert history(tmp_path / "part") == history(tmp_path / "whole")
    ours, theirs = (checkpoint.load(tmp_path / name / BEST) for name in ("part", "whole"))
    np.testing.assert_array_equal(ours.theta, theirs.theta)
    assert ours.meta["best"]["step"] == theirs.meta["best"]["step"] == ours.meta["step"]
    newest = [checkpoint.latest(tmp_path / name).meta["best"] for name in ("part", "whole")]
    assert newest[0] == newest[1]


@pytest.fixture(name="at_once")
def fixture_at_once(monkeypatch):
    """Write best.h5 after every improvement, however short a step is."""
    monkeypatch.setattr(writer, "REST", 0.0)


def stopped_after(folder, step, **options):
    """Leave the files of a job that was killed after a step, before its checkpoint if one was due."""

    def copy(record, theta):
        if record["step"] == step:
            shutil.copytree(folder, f"{folder}.killed")

    fit(16, out=folder, callback=copy, **options)
    shutil.rmtree(folder)
    os.rename(f"{folder}.killed", folder)


@pytest.mark.usefixtures("at_once")
def test_a_job_that_is_killed_leaves_files_from_which_the_run_is_the_same(tmp_path):
    whole = fit(16, out=tmp_path / "whole", keep="best")
    losses = valid_losses(whole)
    for step in range(1, 9):
        folder = tmp_path / f"killed {step}"
        stopped_after(folder, step, keep="best")
        saved = 0 if step < 3 else step // 3 * 3 - (step % 3 == 0) * 3
        assert ((folder / NEWEST).exists(), saved > 0) in ((False, False), (True, True))
        best = checkpoint.load(folder / BEST)
        assert best.meta["step"] == 1 + int(np.argmin(losses[:step]))
        part = fit(16, out=folder, keep="best")
        assert (part.best_step, part.valid_loss) == (whole.best_step, whole.valid_loss)
        np.testing.assert_array_equal(checkpoint.load(folder / BEST).theta, whole.theta)


@pytest.mark.usefixtures("at_once")
def test_best_follows_the_checkpoint_from_which_a_run_continues(tmp_path):
    stopped_after(tmp_path / "run", 3, checkpoint_every=2)
    late = checkpoint.load(tmp_path / "run" / BEST)
    saved = checkpoint.latest(tmp_path / "run")
    assert (late.meta["step"], saved.meta["step"], saved.meta["best"]["step"]) == (3, 2, 2)
    fit(2, out=tmp_path / "run", checkpoint_every=2)
    assert checkpoint.load(tmp_path / "run" / BEST).meta["step"] == 2


def test_a_checkpoint_after_rejected_steps_knows_its_best():
    """Then the best parameters are those of the checkpoint, and their validation is older."""
    theta, other = np.ones(3), np.zeros(3)
    old = Best(theta, Validation(1.0, {"accuracy": 0.5}), 3, 5, 2)
    for now in theta, other:
        entries, about = best_entries(old, now, LOSS)
        assert list(entries) == ([] if now is theta else ["best"])
        found = best(checkpoint.Checkpoint(now, entries, {"step": 5} | about), LOSS)
        assert found == old
        assert found.theta is theta


@pytest.mark.parametrize("wrong", [
    {"current": True}, {"step": "1"}, {"step": -1}, {"last": 0}, {"stale": 1.5}, {"loss": np.nan},
    {"loss": "1"}, {"metrics": 3}, None, [],
])  # fmt: skip
def test_a_checkpoint_with_a_wrong_best_is_refused(wrong, tmp_path):
    fit(16, out=tmp_path / "run")
    path = tmp_path / "run" / NEWEST
    found = checkpoint.load(path)
    assert "best" in found.state
    meta = found.meta | {"best": found.meta["best"] | wrong if isinstance(wrong, dict) else wrong}
    checkpoint.save(path, found.theta, found.state, meta)
    with pytest.raises(
        UserError, match="invalid checkpoint: the entries of its best validation do not match the model"
    ):
        fit(17, out=tmp_path / "run")


def test_a_best_file_that_is_missing_or_damaged_is_written_again(tmp_path, capsys):
    fit(16, out=tmp_path / "run")
    path = tmp_path / "run" / BEST
    before = checkpoint.load(path)
    for damage, words in (
        (path.unlink, f"{path} is missing"),
        (lambda: path.write_bytes(b"no"), f"{path} is not an HDF5 file"),
    ):
        damage()
        fit(16, out=tmp_path / "run")
        assert f"Note: {words}; it is written again from the checkpoint." in capsys.readouterr().err
        np.testing.assert_array_equal(checkpoint.load(path).theta, before.theta)
    fit(16, out=tmp_path / "run")
    assert "written again" not in capsys.readouterr().err


def test_a_best_file_of_a_different_run_is_refused(tmp_path):
    fit(4, out=tmp_path / "run")
    fit(4, out=tmp_path / "other", seed=1)
    shutil.copy(tmp_path / "other" / BEST, tmp_path / "run")
    with pytest.raises(UserError) as caught:
        fit(5, out=tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path / 'run' / NEWEST} and {BEST} belong to different runs (the seed differs): remove one of "
        "them"
    )
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "other" / BEST, tmp_path / "new")
    for resume in "auto", "never", str(tmp_path / "other"):
        with pytest.raises(UserError) as caught:
            fit(5, out=tmp_path / "new", resume=resume, seed=2)
        assert str(caught.value) == (
            f"{tmp_path / 'new' / BEST} belongs to a different run (the seed differs): move it elsewhere, or "
            "use a different out"
        )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [BEST]
    fit(5, out=tmp_path / "new", seed=1)  # a run that was stopped before its first checkpoint


def test_a_new_run_starts_from_the_best_parameters_of_another(tmp_path):
    old = fit(16, out=tmp_path / "old", keep="best")
    new = fit(old.best_step + 1, out=tmp_path / "new", resume=tmp_path / "old" / BEST)
    assert new.step == old.best_step + 1
    assert new.best_step == new.step  # only its own validations are compared
    last = fit(17, out=tmp_path / "third", resume=tmp_path / "old", keep="last")
    np.testing.assert_array_equal(last.theta, fit(17).theta)  # from the checkpoint, not from best.h5


def test_best_files_take_a_small_part_of_the_time(tmp_path, monkeypatch):
    real, written, now = checkpoint.save, [], [100.0]
    monkeypatch.setattr(writer, "monotonic", lambda: now[0])

    def save(path, theta, state, meta, **options):
        if path.name == BEST:
            written.append(meta["step"])
            now[0] += 1.0
        real(path, theta, state, meta, **options)

    def later(record, theta):
        now[0] += 6.0

    monkeypatch.setattr(writer.checkpoint, "save", save)
    options = {"optimizer": "bhf-short", "settings": {}, "evaluate_every": 1, "checkpoint_every": 100}
    result = hfmpi.train(
        GIVEN[0], GIVEN[1], GIVEN[1], out=tmp_path / "run", max_steps=9, quiet=True, callback=later, **options
    )
    assert result.best_step == 9  # each step lowers this loss
    assert written == [1, 5, 9]
    assert checkpoint.load(tmp_path / "run" / BEST).meta["step"] == 9

    def fail(record, theta):
        if record["step"] == 3:
            raise ZeroDivisionError

    options |= {"out": tmp_path / "two", "callback": fail, "max_steps": 9, "quiet": True}
    with pytest.raises(ZeroDivisionError):
        hfmpi.train(*GIVEN[:2], GIVEN[1], **options)
    assert checkpoint.load(tmp_path / "two" / BEST).meta["step"] == 3


# Files that cannot be written ----------------------------------------------------------------------


def test_a_best_file_that_cannot_be_written_is_noted_and_made_up_for(tmp_path, monkeypatch):
    data, folder = write_corpus(tmp_path / "c.h5"), tmp_path / "run"
    disk = Disk(monkeypatch, errno.ENOSPC)
    reporter = During(step_3=disk.breaks, step_6=disk.heals)
    run, _ = train(folder, data, max_steps=8, checkpoint_every=2, reporter=reporter)
    failures = [note for note in reporter.notes if "training continues" in note and BEST in note]
    assert failures == [
        f"cannot write {folder / BEST}: {os.strerror(errno.ENOSPC)}; "
        "training continues, and hfmpi will try again"
    ]
    assert f"{BEST} can be written again" in reporter.notes
    np.testing.assert_array_equal(checkpoint.load(folder / BEST).theta, run.best.theta)


def test_in_the_end_a_missing_best_file_is_an_error(tmp_path, monkeypatch):
    data, folder, real = write_corpus(tmp_path / "c.h5"), tmp_path / "run", checkpoint.save

    def save(path, *arguments, **options):
        if path.name == BEST:
            raise UserError(f"cannot write {path}: no")
        real(path, *arguments, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(UserError, match=f"cannot write {folder / BEST}: no"):
        train(folder, data, max_steps=3)
    assert not (folder / "DONE").exists()
    assert checkpoint.latest(folder).meta["step"] == 3
    monkeypatch.undo()
    run, _ = train(folder, data, max_steps=3)
    np.testing.assert_array_equal(checkpoint.load(folder / BEST).theta, run.best.theta)


def test_a_folder_that_was_removed_gets_its_best_again(tmp_path):
    data, folder = write_corpus(tmp_path / "c.h5"), tmp_path / "run"

    def remove(record):
        if record["step"] == 39:
            shutil.rmtree(folder)

    options = {"optimizer": "adam", "settings": {"rate": 0.5}, "max_steps": 40}
    run, _ = train(folder, data, reporter=Recorder(remove), **options)
    assert run.best.step < 39
    np.testing.assert_array_equal(checkpoint.load(folder / BEST).theta, run.best.theta)


# Afterwards ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="overfit")
def fixture_overfit(tmp_path_factory):
    """Make a run on a text whose best validation is not the last one."""
    folder = tmp_path_factory.mktemp("overfit")
    data = write_corpus(folder / "c.h5")
    options = {"optimizer": "adam", "gradient_batch": 10, "settings": {"rate": 0.5}, "max_steps": 12}
    return train(folder / "run", data, **options)[0]


def command(*words):
    return CliRunner().invoke(cli, list(map(str, words)))


def test_evaluate_and_sample_take_the_best(overfit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(overfit.folder, run)
    losses = [record["valid_bpc"] for record in history(run)]
    step = 1 + int(np.argmin(losses))
    assert step < 12
    found = command("evaluate", run)
    clause = "from best.h5, of the best validation; the last checkpoint is that of step 12"
    assert found.stdout == (
        f"step {step}: {min(losses):.4f} bits/char on 15 validation sequences ({clause})\n"
    )
    as_json = json.loads(command("evaluate", run, "--json").stdout)
    assert (as_json["step"], as_json["best"]) == (step, True)
    assert as_json["valid_bpc"] == pytest.approx(min(losses), rel=1e-9)
    last = json.loads(command("evaluate", run, "--keep", "last", "--json").stdout)
    assert (last["step"], last["best"]) == (12, False)
    assert last["valid_bpc"] == pytest.approx(losses[-1], rel=1e-9)
    sampled, other = command("sample", run), command("sample", run, "--keep", "last")
    assert f"Note: the parameters are those of step {step}, {clause}." in sampled.stderr
    assert other.stderr == ""
    assert sampled.stdout != other.stdout
    assert "keep must be best or last, not 'first'" in str(
        command("sample", run, "--keep", "first").exception
    )
    for name, expected in ((BEST, step), (NEWEST, 12)):
        assert json.loads(command("evaluate", run / name, "--json").stdout)["step"] == expected
    (run / BEST).write_bytes(b"no")
    assert f"{run / BEST} is not an HDF5 file; the parameters of checkpoint.h5 are used instead" in (
        command("evaluate", run).stderr
    )
    assert "is not an HDF5 file" in str(command("evaluate", run, "--keep", "best").exception)
    (run / BEST).unlink()  # as in the folder of an earlier version
    assert json.loads(command("evaluate", run, "--json").stdout)["step"] == 12
    assert "there is no" in str(command("evaluate", run, "--keep", "best").exception)


def test_best_alone_can_be_evaluated(overfit, tmp_path):
    shutil.copy(overfit.folder / BEST, tmp_path)
    np.testing.assert_array_equal(Trained.read(tmp_path).theta, overfit.best.theta)
    with pytest.raises(UserError, match="there is no checkpoint"):
        Trained.read(tmp_path, keep="last")


def test_best_of_a_different_run_is_not_evaluated(overfit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(overfit.folder, run)
    data = overfit.task.data
    options = {
        "optimizer": "adam",
        "settings": {"rate": 0.5},
        "max_steps": 2,
        "seed": 7,
        "gradient_batch": 10,
    }
    train(tmp_path / "other", data, **options)
    shutil.copy(tmp_path / "other" / BEST, run)
    with pytest.raises(UserError, match=f"{BEST} belong to different runs \\(the seed differs\\)"):
        Trained.read(run)


def test_what_is_kept_may_change_when_a_run_is_resumed(overfit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(overfit.folder, run)
    options = {"optimizer": "adam", "gradient_batch": 10, "settings": {"rate": 0.5}}
    again = make_run(run, overfit.task.data, max_steps=12, keep="last", **options)
    np.testing.assert_array_equal(again.evaluated, again.theta)
    assert again.train().kept_step is None
    assert Trained.read(run).step == 12
    assert Trained.read(run, keep="best").step == overfit.best.step


def test_the_previous_checkpoint_has_its_best_too(overfit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(overfit.folder, run)
    if (run / PREVIOUS).exists():
        (run / NEWEST).write_bytes(b"no")
        assert Trained.read(run).step == overfit.best.step
    assert isinstance(overfit.best, Best)


def test_the_report_samples_from_the_best(overfit, tmp_path):
    pytest.importorskip("plotly")
    assert command("report", overfit.folder, "--out", tmp_path / "page.html").exit_code == 0
    assert f"from the checkpoint of step {overfit.best.step}" in (tmp_path / "page.html").read_text()


# Under mpirun --------------------------------------------------------------------------------------


def test_ranks_keep_the_same_best(tmp_path):
    body = """
from test_best import GIVEN, fit, valid_losses
result = fit(16, out="two", keep="best", patience=20)
part = [fit(steps, out="part", keep="best") for steps in (5, 16)][-1]
assert part.valid_loss == result.valid_loss and (part.theta == result.theta).all()
stopped = fit(40, patience=3, keep="best").step
with open(f"said{rank}", "w") as file:
    json.dump([result.best_step, result.valid_loss, result.theta.tolist(), stopped, result.rank], file)
"""
    code, _, err = mpirun(2, tmp_path, body)
    assert code == 0, err
    ours = [json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2)]
    alone = fit(16, keep="best")
    assert [said[4] for said in ours] == [0, 1]
    assert ours[0][:4] == ours[1][:4]
    assert ours[0][0] == alone.best_step
    assert ours[0][1] == pytest.approx(alone.valid_loss, rel=1e-6)
    np.testing.assert_allclose(ours[0][2], alone.theta, rtol=1e-4, atol=1e-5)
    assert ours[0][3] == fit(40, patience=3).step
