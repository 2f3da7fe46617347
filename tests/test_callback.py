"""The callback of a run, what `hfmpi.train` returns, `hfmpi.evaluate`, and the line in a notebook."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from dense import run_page
from small import history
from test_best import GIVEN, OVERFITS, fit
from test_python_train import SYMBOLS, VALID, Line, X, Y, mpirun, network, right

import hfmpi
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.runs.live import in_notebook
from hfmpi.runs.record import Ending, Validation
from hfmpi.runs.reporter import Notebook, make_reporter

EXAMPLES = Path(__file__).parents[1] / "examples"


# The callback ------------------------------------------------------------------------------------


def test_the_callback_sees_every_step(tmp_path):
    seen = []
    result = fit(5, out=tmp_path / "run", callback=lambda *given: seen.append(given))
    assert [record for record, _ in seen] == result.history
    for step, (_, theta) in enumerate(seen, start=1):
        np.testing.assert_array_equal(theta, fit(step).theta)
        assert theta.dtype == result.theta.dtype
        with pytest.raises(ValueError, match="read-only"):
            theta[0] = 1.0
    plain = fit(5, out=tmp_path / "plain")
    np.testing.assert_array_equal(plain.theta, result.theta)
    assert history(tmp_path / "plain") == history(tmp_path / "run")


def test_a_callback_that_changes_its_record_changes_nothing_else(tmp_path):
    def change(record, theta):
        record.clear()

    assert fit(3, out=tmp_path / "run", callback=change).history[1]["step"] == 2
    assert len(history(tmp_path / "run")) == 3


def test_the_callback_gets_the_mean_of_the_iterates():
    seen, options = [], {"settings": {"rate": 0.05, "averaging": 0.6}}
    result = fit(4, callback=lambda record, theta: seen.append(theta.copy()), **options)
    np.testing.assert_array_equal(seen[-1], result.theta)
    assert np.abs(seen[-1] - seen[-2]).max() > 0


@pytest.mark.parametrize("stop", [True, np.bool_(True), 1])
def test_the_callback_stops_the_run_as_a_limit_does(stop, tmp_path):
    options = {"out": tmp_path / "run", "evaluate_every": 100}
    result = fit(9, callback=lambda record, theta: stop if record["step"] == 4 else None, **options)
    assert (result.step, result.done, result.reason) == (4, True, "the callback asked to stop")
    assert (tmp_path / "run" / "DONE").read_text() == "the callback asked to stop\n"
    assert checkpoint.latest(tmp_path / "run").meta["step"] == 4
    np.testing.assert_array_equal(result.theta, fit(4).theta)
    assert result.valid_loss == fit(4).valid_loss == result.history[-1]["valid_loss"]
    np.testing.assert_array_equal(
        fit(6, **options).theta, fit(6).theta
    )  # and resumes when it is called again


def test_an_exception_in_the_callback_ends_the_run_with_its_result(tmp_path):
    def fail(record, theta):
        if record["step"] == 4:
            raise ZeroDivisionError("my own mistake")

    with pytest.raises(ZeroDivisionError, match="my own mistake") as caught:
        fit(9, callback=fail, out=tmp_path / "run")
    result = caught.value.result
    assert (result.step, result.done, len(result.history)) == (4, False, 4)
    assert checkpoint.latest(tmp_path / "run").meta["step"] == 4
    np.testing.assert_array_equal(fit(6, out=tmp_path / "run").theta, fit(6).theta)
    with pytest.raises(ZeroDivisionError) as caught:
        fit(9, callback=fail, keep="best")
    best = fit(4, keep="best")
    np.testing.assert_array_equal(caught.value.result.theta, best.theta)
    assert caught.value.result.valid_loss == best.valid_loss
    with pytest.raises(UserError, match="callback must be a function"):
        fit(2, callback="print")
    with pytest.raises(UserError, match="callback must return True to stop, and False or None to continue"):
        fit(2, callback=lambda record, theta: theta > 0)


def test_callbacks_on_ranks_agree(tmp_path):
    body = """
from test_best import GIVEN, fit
seen = []
def callback(record, theta):
    seen.append([record, float(theta.sum())])
    if record["step"] == 2:
        seen.append(hfmpi.evaluate(GIVEN[0], theta, GIVEN[2], {"accuracy": right}))
    return rank == 1 and record["step"] == 3  # one rank is enough

result = fit(9, callback=callback, out="run")
assert seen[1][0]["valid_loss"] == seen[2].loss
with open(f"said{rank}", "w") as file:
    json.dump([seen, result.step, result.reason, result.history], file)

def fails(record, theta):
    if rank == 1 and record["step"] == 2:
        raise KeyError("label")

try:
    fit(9, callback=fails, out="failed")
except (KeyError, UserError) as error:
    print(f"caught {rank} {type(error).__name__} {error.result.step} {error}", flush=True)
"""
    code, out, err = mpirun(2, tmp_path, body)
    assert code == 0, err
    ours = [json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2)]
    assert ours[0] == ours[1]
    seen, step, reason, records = ours[0]
    assert (step, reason) == (3, "the callback asked to stop")
    assert [entry[0] for entry in seen if len(entry[0:1]) and isinstance(entry[0], dict)] == records
    assert sorted(out.splitlines()) == [
        "caught 0 UserError 2 rank 1 failed with KeyError: 'label'",
        "caught 1 KeyError 2 'label'",
    ]
    assert checkpoint.latest(tmp_path / "failed").meta["step"] == 2


def test_ranks_with_other_metrics_or_callbacks_are_refused(tmp_path):
    body = """
from test_best import GIVEN, fit
said = []
names = {"right": right} if rank == 0 else {"right": right, "more": right}
for options in (
    {"metric": names},
    {"metric": {"right": right}, "watch": "loss" if rank == 0 else "max right"},
    {"callback": print if rank == 0 else None},
    {"out": "run" if rank == 0 else None},
):
    try:
        fit(2, **options)
    except UserError as error:
        said.append(str(error))
for metric in names, None if rank == 0 else right, "right" if rank == 0 else right:
    try:
        hfmpi.evaluate(GIVEN[0], GIVEN[0].initial(0), GIVEN[2], metric)
    except UserError as error:
        said.append(str(error))
with open(f"said{rank}", "w") as file:
    json.dump(said, file)
"""
    code, _, err = mpirun(2, tmp_path, body)
    assert code == 0, err
    metrics = "rank 1 has different metrics or a different watch than the other ranks"
    alone = "on all ranks or on none: rank 1 differs from the others"
    evaluated = "rank 1 has different metrics than the other ranks"
    wrong = "metric must be a function (outputs, targets) -> values, or a dict of such functions by name"
    expected = [metrics, metrics, f"pass a callback {alone}", f"pass out {alone}", evaluated, evaluated]
    for rank in range(2):
        assert json.loads((tmp_path / f"said{rank}").read_text()) == [*expected, f"{wrong}, not 'right'"]


def test_a_callback_that_fails_on_one_rank_is_named_while_others_wait(tmp_path):
    body = """
from test_best import GIVEN, fit
def callback(record, theta):
    if rank == 1:
        raise KeyError("label")
    hfmpi.evaluate(GIVEN[0], theta, GIVEN[2])

fit(2, callback=callback, stall_timeout=5)
"""
    code, _, err = mpirun(2, tmp_path, body)
    assert code != 0
    assert "rank 1: the callback raised KeyError: 'label'" in err
    assert "no collective has finished for 5 s" in err


# The result --------------------------------------------------------------------------------------


def test_a_result_has_a_short_repr():
    result = fit(16, keep="best", metric={"accuracy": right})
    assert result.rank == 0
    accuracy = result.valid_metric["accuracy"]
    assert repr(result) == (
        f"Result(step 16: 16 steps were taken; valid_loss {result.valid_loss:.4g}, valid_accuracy "
        f"{accuracy:.4g} at step {result.best_step}; D = {GIVEN[0].size})"
    )
    bare = hfmpi.train(*GIVEN[:2], max_steps=1, **OVERFITS)
    assert repr(bare) == f"Result(step 1: 1 step was taken; D = {GIVEN[0].size})"


def test_a_result_is_drawn(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    backend = matplotlib.get_backend()
    result = fit(3)
    figure = result.plot(tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    lines = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [3, 3, 1]  # training, validation and its last marker
    np.testing.assert_allclose(lines[1].get_ydata(), [record["valid_loss"] for record in result.history])
    assert matplotlib.get_backend() == backend
    with pytest.raises(UserError, match="cannot write"):
        result.plot(tmp_path / "missing" / "losses.png")
    with pytest.raises(UserError, match="there is nothing to draw"):
        hfmpi.runs.result.Result(result.theta, [], 0, False, "", None, None).plot()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="needs matplotlib: pip install matplotlib"):
        result.plot()


# In a notebook -----------------------------------------------------------------------------------


@pytest.fixture(name="notebook")
def fixture_notebook(monkeypatch):
    """Make this process appear as the kernel of a notebook."""
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    return shell


def test_a_notebook_is_recognised(notebook, monkeypatch):
    assert in_notebook()
    del notebook.kernel  # a terminal with IPython
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()


@pytest.mark.usefixtures("notebook")
def test_a_notebook_shows_one_line(capsys):
    result = fit(6, quiet=False, metric={"accuracy": right})
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    shown = said.out.split("\r")
    assert shown[0] == ""
    assert shown[1].startswith("step 0/6")
    assert shown[-1].rstrip() == (
        f"Stopped at step 6: 6 steps were taken, loss {result.valid_loss:.5g}, accuracy "
        f"{result.valid_metric['accuracy']:.5g} on validation."
    )
    assert said.err == ""


def test_the_line_is_overwritten_a_few_times_a_second(capsys):
    now = [0.0]
    notebook = Notebook(lambda: now[0])
    facts = types.SimpleNamespace(
        step=0, task=types.SimpleNamespace(config=types.SimpleNamespace(max_steps=100, max_seconds=0.0))
    )
    notebook.start(facts)
    record = {"step": 1, "seconds": 0.1, "loss": 2.0, "valid_loss": None, "accepted": True}
    for step in range(1, 21):
        now[0] += 0.05
        notebook.step(record | {"step": step, "seconds": now[0]})
    notebook.compiling(True)
    notebook.note("something")
    notebook.end(Ending("it is over", False, 20, Validation(1.5), "", "Call it again", 7))
    said = capsys.readouterr()
    parts = said.out.split("\r")
    assert 3 <= sum("step " in part and "train 2" in part for part in parts) <= 6
    assert any("compiling" in part for part in parts)
    assert (
        parts[-1]
        == "Stopped at step 20: it is over, loss 1.5 on validation at step 7, the best one.\nCall it again.\n"
    )
    assert said.err == "Note: something.\n"


@pytest.mark.usefixtures("notebook")
def test_other_ranks_and_quiet_runs_show_no_line(capsys):
    for rank, quiet in ((1, False), (0, True)):
        with make_reporter(rank, quiet) as reporter:
            assert not isinstance(reporter, Notebook)
    with make_reporter(0) as reporter:
        assert isinstance(reporter, Notebook)
    assert capsys.readouterr().out == ""


# Evaluation and predictions --------------------------------------------------------------------------


def test_evaluate_is_the_validation_of_a_run():
    model = network()
    result = hfmpi.train(
        model,
        (SYMBOLS, (SYMBOLS + 1) % 4),
        VALID,
        metric=right,
        optimizer="bhf-short",
        max_steps=2,
        quiet=True,
    )
    found = hfmpi.evaluate(model, result.theta, VALID, right)
    assert (found.loss, found.metric) == (result.valid_loss, result.valid_metric)
    assert hfmpi.evaluate(model, result.theta, hfmpi.Arrays(*VALID)) == (result.valid_loss, None)
    assert hfmpi.evaluate(model, result.theta, VALID, right, micro_batch=2).metric == pytest.approx(
        found.metric
    )
    assert hfmpi.evaluate(Line(3), np.zeros(4), (X, Y)).loss == pytest.approx(np.square(Y).mean() / 2)


@pytest.mark.parametrize(
    ("theta", "remedy"),
    [
        (types.SimpleNamespace(theta=np.zeros(3)), "; pass result.theta"),
        ({"w": np.zeros(3)}, r"; for a JaxModel, pass model.theta\(params\)"),
        ([0.0, 1.0], r"; pass numpy.asarray\(theta\)"),
    ],
)
def test_parameters_of_another_form_are_refused_with_a_remedy(theta, remedy):
    for use in (
        lambda: hfmpi.evaluate(GIVEN[0], theta, GIVEN[2]),
        lambda: GIVEN[0].predict(theta, GIVEN[2][0]),
    ):
        with pytest.raises(UserError, match=remedy):
            use()


def test_evaluate_refuses_what_does_not_fit():
    model, theta = network(), network().initial(0)
    with pytest.raises(UserError, match="theta must be a vector"):
        hfmpi.evaluate(model, theta[1:], VALID)
    with pytest.raises(UserError, match="has no method outputs"):
        hfmpi.evaluate(Line(3), np.zeros(4), (X, Y), right)
    with pytest.raises(UserError, match="targets must be symbols from 0 to 3, not 3 to 6"):
        hfmpi.evaluate(model, theta, (VALID[0], VALID[1] + 3))
    with pytest.raises(UserError, match="check the mask and the weights"):
        hfmpi.evaluate(model, theta, (*VALID, np.zeros_like(VALID[0])))


@pytest.mark.parametrize("reads", ["symbols", "numbers"])
def test_a_network_predicts_every_step(reads):
    model, theta = network(), network().initial(0)
    x = VALID[0] if reads == "symbols" else np.eye(4)[VALID[0]]
    outputs = model.predict(theta, x)
    assert outputs.shape == (13, 9, 4)
    rows = model.outputs(theta, hfmpi.Arrays(x, VALID[1]).take(np.arange(13)))[0]
    np.testing.assert_array_equal(outputs.swapaxes(0, 1).reshape(-1, 4), rows)
    model.backend.micro_batch = 5
    np.testing.assert_allclose(model.predict(theta, x), outputs, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(model.predict(theta.astype(np.float32), x[:1]).shape, (1, 9, 4))
    with pytest.raises(UserError, match="inputs must be"):
        model.predict(theta, x[:, 0])
    with pytest.raises(
        UserError, match="x must be an array, or a tuple of arrays with the same number of examples"
    ):
        model.predict(theta, (x, x[1:]))
    with pytest.raises(UserError, match="x must be whole or real numbers"):
        model.predict(theta, x[:0])
    with pytest.raises(UserError, match="theta must be a vector"):
        model.predict(theta[1:], x)


def test_the_loss_of_a_data_set_is_summed_in_micro_batches():
    model, theta = network(), network().initial(0)
    data = hfmpi.Examples(*VALID, mask=np.arange(13 * 9).reshape(13, 9) % 3 > 0)
    whole = model.loss(theta, data.take(np.arange(13)))
    model.backend.micro_batch = 4
    assert model.loss(theta, data) == pytest.approx(whole, rel=1e-12)
    assert model.loss(theta, data) / data.scored(np.arange(13)) == pytest.approx(
        hfmpi.evaluate(model, theta, data).loss, rel=1e-12
    )


# The loggers of the examples ---------------------------------------------------------------------


class Writer:
    """A replacement for TensorBoard's writer and for the module of Weights & Biases."""

    def __init__(self, folder=None):
        self.logged, self.closed = [], False

    def add_scalar(self, name, value, step):
        self.logged.append((step, name, value))

    def init(self, **options):
        self.options = options
        return self

    def log(self, values, step):
        self.logged += [(step, name, value) for name, value in values.items()]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_the_loggers_of_the_examples_log_every_step(name, monkeypatch):
    made = []

    def writer(folder=None):
        made.append(Writer(folder))
        return made[-1]

    modules = {
        "tensorboard": {"torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=writer)},
        "wandb": {"wandb": types.SimpleNamespace(init=lambda **options: writer().init(**options))},
    }
    for module, stand_in in modules[name].items():
        for parent in ("torch", "torch.utils") if "torch" in module else ():
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module, stand_in)
    spec = importlib.util.spec_from_file_location("loggers", EXAMPLES / "loggers.py")
    loggers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loggers)
    callback = getattr(loggers, name)("folder", 0)
    result = fit(3, callback=callback)
    (found,) = made
    expected = [
        (record["step"], key, record[key])
        for record in result.history
        for key in ("loss", "valid_loss")
        if record[key] is not None
    ]
    assert [entry for entry in found.logged if entry[1] in ("loss", "valid_loss")] == expected
    assert all(isinstance(value, (int, float)) for _, _, value in found.logged)
    assert getattr(loggers, name)("folder", 1)({"step": 1}, None) is None  # other ranks log nothing
    assert len(made) == 1


# The page ----------------------------------------------------------------------------------------


def test_the_programs_of_the_page_work(tmp_path, capsys):
    result = run_page("patience=8", tmp_path)["result"]
    losses = [record["valid_loss"] for record in result.history]
    assert result.valid_loss == min(losses) < losses[-1]
    assert result.step < 60
    assert repr(result) in capsys.readouterr().out
    names = run_page("model.predict(", tmp_path)
    loss, accuracy, right_share = map(float, capsys.readouterr().out.split()[-3:])
    assert (loss, accuracy) == tuple(names["test"])
    assert accuracy == pytest.approx(right_share, abs=1e-12)
    np.testing.assert_array_equal(np.load(tmp_path / "theta.npy"), names["result"].theta)
