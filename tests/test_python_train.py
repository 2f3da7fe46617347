"""hfmpi.train: runs of any model from Python, on one rank and under mpirun: stopped, resumed, refused."""

import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from dense import check_page, run_page
from small import history, write_corpus
from small import train as train_text

import hfmpi
from hfmpi.backends import create
from hfmpi.backends.numpy import NumpyBackend
from hfmpi.cli.main import cli
from hfmpi.data.batches import Cases
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.models.base import Model
from hfmpi.optim.layout import Block
from hfmpi.parallel.placement import threads_kept

RNG = np.random.default_rng(0)
SYMBOLS = RNG.integers(0, 4, (60, 9))
NEXT = (SYMBOLS + np.roll(SYMBOLS, 1, 1)) % 4
VALID = SYMBOLS[:13], NEXT[:13]
ONE_HOT = np.eye(4, dtype=int)[NEXT]
OPTIONS = {
    "optimizer": "bhf-short",
    "gradient_batch": 30,
    "curvature_batch": 10,
    "checkpoint_every": 2,
    "evaluate_every": 2,
    "quiet": True,
}


def network(hidden=5, loss="cross-entropy", backend="numpy", **changes):
    about = {"cell": "gru", "inputs": 4, "outputs": 4, "hidden": hidden} | changes
    return hfmpi.Network(backend=create(backend, "float64"), loss=loss, **about)


def right(outputs, targets):
    return outputs.argmax(axis=1) == targets


class Line:
    """y = x w + b with half the squared error, on batches (inputs, targets) of Examples."""

    def __init__(self, inputs):
        self.size, self.backend = inputs + 1, NumpyBackend("float64")

    def initial(self, seed):
        return np.random.default_rng(seed).standard_normal(self.size)

    def release(self):
        pass

    def loss(self, theta, batch):
        return self.linearise(theta, batch).loss

    def linearise(self, theta, batch, reuse=None):
        return AtLine(np.column_stack([batch.inputs, np.ones(len(batch.targets))]), theta, batch.targets)


class AtLine:
    def __init__(self, rows, theta, targets):
        self.rows, self.error = rows, rows @ theta - targets
        self.loss, self.nbytes = float(self.error @ self.error) / 2, rows.nbytes

    def gradient(self, scale, out):
        out += scale * self.rows.T @ self.error

    def jvp(self, v):
        return self.rows @ v

    def vjp(self, u, out):
        out += self.rows.T @ u

    def gauss_newton(self, v, scale, out):
        out += scale * self.rows.T @ (self.rows @ v)


X = RNG.standard_normal((80, 3))
Y = X @ [1.0, -2.0, 3.0] + 0.5


class Pairs:
    """A map-style data set, as PyTorch calls it."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], float(self.y[i])


class Lazy:
    """User-defined examples."""

    count = len(Y)

    def take(self, indices):
        return hfmpi.Examples(X, Y).take(indices)

    def scored(self, indices):
        return len(indices)


# What a run does --------------------------------------------------------------------------------


def test_a_run_keeps_the_contract_of_the_command(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = network()
    given = OPTIONS | {"max_steps": 4, "seed": 3}
    result = hfmpi.train(model, (SYMBOLS, NEXT), VALID, out="run", metric=right, **given | {"quiet": False})
    said = capfd.readouterr()
    assert said.out.startswith(
        f"gru, 5 units, {model.size} parameters\nbhf-short, B_g = 30, B_c = 10 of 60 examples\n"
    )
    measured = f"loss {result.valid_loss:.5g}, metric {result.valid_metric:.5g} on validation"
    assert f"Stopped at step 4: 4 steps were taken, {measured}.\n" in said.out
    assert (result.step, result.done, result.reason) == (4, True, "4 steps were taken")
    assert {path.name for path in Path("run").iterdir()} >= {
        "config.toml",
        "checkpoint.h5",
        "timing.json",
        "DONE",
    }
    assert result.history == [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert [record["valid_loss"] is None for record in result.history] == [True, False, True, False]
    last = result.history[-1]
    assert (last["valid_loss"], last["valid_metric"]) == (result.valid_loss, result.valid_metric)
    assert not {"train_bpc", "valid_bpc"} & last.keys()
    # The values agree with their names.
    everything = hfmpi.Arrays(*VALID).take(np.arange(13))
    outputs, targets, mask = model.outputs(result.theta, everything)
    assert mask is None
    assert result.valid_metric == pytest.approx(right(outputs, targets).mean(), rel=1e-12)
    assert result.valid_loss == pytest.approx(model.loss(result.theta, everything) / (13 * 9), rel=1e-12)
    own = outputs - np.log(np.exp(outputs).sum(axis=1, keepdims=True))
    assert result.valid_loss == pytest.approx(-own[np.arange(len(own)), targets].mean(), rel=1e-9)

    def command(*words):
        return CliRunner().invoke(cli, list(map(str, words)))

    shown = command("plot", "run")
    assert (shown.exit_code, "valid_metric" in shown.output, "bpc" in shown.output) == (0, True, False)
    assert command("plot", "run", "--out", "figure.png").exit_code == 0
    assert "gru, 5 units" in command("speedup", "run").output
    for name in "evaluate", "sample":
        assert "evaluate it in that program" in str(command(name, "run").exception)
    data = write_corpus(tmp_path / "text.h5")
    assert "run is a run of a Python program (hfmpi.train); use a different --out" in str(
        command("train", data, "--out", "run", "--max-steps", 1).exception
    )
    assert (
        "run is a run of a Python program (hfmpi.train); a run on a text can only start from a run on a text"
        in str(command("train", data, "--out", "new", "--resume", "run", "--max-steps", 9).exception)
    )
    train_text(tmp_path / "text", data, max_steps=2)
    assert "plot them separately" in str(command("plot", "run", "text", "--out", "both.png").exception)
    with pytest.raises(UserError, match="text is a run of `hfmpi train` on a text; use a different out"):
        hfmpi.train(model, (SYMBOLS, NEXT), out="text", **given)


@pytest.mark.parametrize(
    "optimizer", [{}, {"optimizer": "adam", "curvature_batch": None, "settings": {"averaging": 0.5}}]
)
def test_a_run_goes_on_as_if_it_had_not_been_stopped(optimizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (network(), (SYMBOLS, NEXT), VALID)
    options = OPTIONS | {"evaluate_every": 1, "checkpoint_every": 100} | optimizer
    alone = hfmpi.train(*given, max_steps=4, **options)
    assert list(tmp_path.iterdir()) == []
    whole = hfmpi.train(*given, out="whole", max_steps=4, **options)
    for steps in (1, 4, 4):
        part = hfmpi.train(*given, out=Path("part"), max_steps=steps, **options)
    for other in whole, part:
        np.testing.assert_array_equal(alone.theta, other.theta)
        assert alone.valid_loss == other.valid_loss
    assert history("whole") == history("part")
    times = "seconds", "step_seconds"
    assert [{k: v for k, v in r.items() if k not in times} for r in alone.history] == history("part")
    found = [checkpoint.load(f"{name}/checkpoint.h5") for name in ("whole", "part")]
    for name, value in found[0].state.items():
        np.testing.assert_array_equal(value, found[1].state[name])


ADAM = OPTIONS | {"optimizer": "adam", "curvature_batch": None, "evaluate_every": 1}


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def without_times(records):
    return [{k: v for k, v in record.items() if not k.endswith("seconds")} for record in records]


@pytest.mark.parametrize("options", [OPTIONS | {"evaluate_every": 1}, ADAM])
def test_a_run_that_starts_from_another_one_is_that_which_goes_on(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (network(), (SYMBOLS, NEXT), VALID)
    whole = hfmpi.train(*given, max_steps=4, **options)
    hfmpi.train(*given, out="old", max_steps=2, **options)
    before = files("old")
    new = hfmpi.train(*given, out="new", resume="old", max_steps=4, quiet=True)  # with the old options
    for steps in (3, 4):
        part = hfmpi.train(*given, out="part", resume=Path("old"), max_steps=steps, quiet=True)
    bare = hfmpi.train(*given, resume="old/checkpoint.h5", max_steps=4, quiet=True)
    for other in new, part, bare:
        np.testing.assert_array_equal(other.theta, whole.theta)
        assert (other.step, other.valid_loss) == (4, whole.valid_loss)
        assert without_times(other.history) == without_times(whole.history)[2:]
    assert new.history[0]["seconds"] > json.loads(before["history.jsonl"].splitlines()[-1])["seconds"]
    assert {path.name for path in tmp_path.iterdir()} == {"old", "new", "part"}
    assert files("old") == before


def test_a_run_that_starts_from_another_one_may_have_other_options_and_data(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    given = (network(), (SYMBOLS, NEXT), VALID)
    old = hfmpi.train(*given, out="old", max_steps=3, **ADAM)
    before = files("old")

    def new(*given, **changes):
        result = hfmpi.train(*given, resume="old", max_steps=4, **{"quiet": True} | changes)
        (record,) = result.history
        assert (record["step"], result.step) == (4, 4)
        assert record["P_I"] > old.history[-1]["P_I"]
        return result, capfd.readouterr()

    still, said = new(*given, settings={"rate": 1e-30}, out="still")
    np.testing.assert_allclose(still.theta, old.theta, rtol=1e-12)
    assert still.history[0]["loss"] == pytest.approx(old.history[-1]["valid_loss"], abs=0.2)
    assert said.err == ""
    assert checkpoint.latest("still").state["updates"] == checkpoint.latest("old").state["updates"] + 1
    _, said = new(*given, optimizer="sgd")
    why = "that run was trained with adam, and this run uses sgd"
    assert f"Note: the optimizer's state of old is not used: {why}.\n" in said.err
    _, said = new(given[0], (SYMBOLS[:50], NEXT[:50]), (SYMBOLS, NEXT))
    assert "Note: old was trained on different examples.\n" in said.err
    assert files("old") == before


SAME_MODEL = "a run can only start from a run of the same model"


@pytest.mark.parametrize(("changes", "words"), [
    ({"resume": "nowhere"}, "there is no checkpoint nowhere"),
    ({"resume": "old/config.toml"}, "old/config.toml is not an HDF5 file"),
    ({"resume": "text"}, f"text is a run of `hfmpi train` on a text; {SAME_MODEL}"),
    ({"model": network(hidden=6)}, f"old belongs to a run of a different model; {SAME_MODEL}"),
    ({"model": network(loss="squares"), "train": (SYMBOLS, np.zeros((60, 9, 4)))}, "old belongs to a run of"),
    ({"max_steps": 2}, "old already has 2 steps, and max_steps counts from its first start: use a value"),
    ({"max_steps": None}, "old already has 2 steps"),
    ({"settings": {"rat": 1}}, "has no setting 'rat'"),
    ({"gradient_batch": 61}, "gradient_batch can be at most 60"),
    ({"out": "old"}, 'old already contains a run: use a different out, or resume="auto" to continue the run'),
    ({"resume": "never", "out": "old"}, 'old already contains a run: use a different out, or resume="auto"'),
    ({"resume": ""}, "resume must be 'auto', 'never', or the path of a run, not ''"),
    ({"resume": None}, "resume must be 'auto', 'never', or the path of a run, not None"),
])  # fmt: skip
def test_what_cannot_start_from_another_run(changes, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hfmpi.train(network(), (SYMBOLS, NEXT), out="old", max_steps=2, **OPTIONS)
    if changes.get("resume") == "text":
        train_text(tmp_path / "text", write_corpus(tmp_path / "text.h5"), max_steps=1)
    before = files("old")
    given = {"model": network(), "train": (SYMBOLS, NEXT), "out": "new", "resume": "old", "max_steps": 3}
    refused(lambda: hfmpi.train(**given | {"quiet": True} | changes), words, tmp_path / "new")
    assert files("old") == before


def test_never_goes_on_is_a_new_run_where_there_is_none(tmp_path):
    options = {"optimizer": "shf", "max_steps": 1, "quiet": True, "resume": "never"}
    assert hfmpi.train(Line(3), (X, Y), out=tmp_path / "run", **options).step == 1


def test_all_forms_of_data_make_the_same_run():
    assert isinstance(Line(3), Model)
    assert isinstance(Lazy(), Cases)
    options = {"optimizer": "shf", "max_steps": 12, "quiet": True, "settings": {"damping": 1e-3}}
    forms = (X, Y), (X, Y, np.ones(80)), Pairs(), list(zip(X, Y, strict=True)), hfmpi.Examples(X, Y), Lazy()
    thetas = [hfmpi.train(Line(3), form, **options).theta for form in forms]
    for theta in thetas:
        np.testing.assert_array_equal(theta, thetas[0])
    np.testing.assert_allclose(thetas[0], [1, -2, 3, 0.5], atol=1e-3)


def test_a_metric_is_the_mean_over_scored_rows():
    mask = (RNG.random((13, 9)) > 0.4) * 1
    options = OPTIONS | {"max_steps": 1, "micro_batch": 2}
    model = network(loss="squares", outputs=2)
    targets = RNG.standard_normal((13, 9, 2))
    result = hfmpi.train(
        model, (SYMBOLS, RNG.standard_normal((60, 9, 2))), (*VALID[:1], targets, mask),
        metric=lambda z, y: ((z - y) ** 2).sum(axis=1, keepdims=True) / 2, **options,
    )  # fmt: skip
    assert result.valid_metric == pytest.approx(result.valid_loss, rel=1e-12)


def test_a_batch_of_a_preset_is_no_larger_than_the_data(capfd):
    result = hfmpi.train(Line(3), (X, Y), optimizer="bhf-short", max_steps=1, quiet=True)
    assert result.history[0]["P_D"] == 80 * result.history[0]["P_I"]
    said = capfd.readouterr()
    assert said.out == ""
    assert (
        said.err
        == (
            "Note: the gradient batch is 80, all training examples; the preset bhf-short has 14,000.\n"
            "Note: the curvature batch is 80, the gradient batch; the preset bhf-short has 3,500.\n"
        )
        or said.err == ""
    )


class Tight(Line):
    """A model whose memory is sufficient for eight examples."""

    def linearise(self, theta, batch, reuse=None):
        if len(batch.targets) > 8:
            raise MemoryError
        return super().linearise(theta, batch, reuse)


def test_a_warning_of_a_lower_room_is_one_note(capfd):
    handlers = logging.getLogger("hfmpi").handlers.copy()
    hfmpi.train(Tight(3), (X, Y), optimizer="adam", gradient_batch=80, max_steps=2, quiet=True)
    said = capfd.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"Note: rank 0 ran out of memory \(.*\).* 8 sequences\.\n", said.err)
    assert logging.getLogger("hfmpi").handlers == handlers


def test_a_thread_may_train_and_the_process_stays_as_it_was(capfd):
    found, state = [], np.geterr()
    thread = threading.Thread(
        target=lambda: found.append(
            hfmpi.train(Line(3), (X, Y), optimizer="adam", max_steps=2, quiet=True, threads=1)
        )
    )
    with threads_kept():
        thread.start()
        thread.join()
    assert found[0].step == 2
    assert np.geterr() == state


# What is refused --------------------------------------------------------------------------------


def refused(call, words, folder):
    with pytest.raises(UserError) as caught:
        call()
    said = str(caught.value)
    assert words in said
    assert "\n" not in said
    assert not folder.exists()


class Random(Pairs):
    def __getitem__(self, i):
        return RNG.standard_normal(3), 1.0


class Ragged(Pairs):
    def __getitem__(self, i):
        return np.zeros(3 + i % 2), 1.0


class Longer(Pairs):
    def __len__(self):
        return 81


class Failing(Pairs):
    def __getitem__(self, i):
        if i == 3:
            raise KeyError(f"image {i}")
        return super().__getitem__(i)


class Endless(Pairs):
    def __len__(self):
        raise TypeError("no\nlength")


class Loader:
    """Batches of a data set, as in PyTorch."""

    dataset = Pairs()

    def __iter__(self):
        yield X, Y

    def __len__(self):
        return 1


class Changing(Lazy):
    def take(self, indices):
        return hfmpi.Examples(RNG.standard_normal(X.shape), Y).take(indices)


class Named(Line):
    blocks = (Block("w", 0, 1, 4),)


RUN = {"model": network(), "train": (SYMBOLS, NEXT)}


def broken(where):
    x = X.copy()
    x[where, 0] = np.nan
    return x


def unknown(where):
    y = Y.copy()
    y[where] = np.nan
    return y


def fails(outputs, targets):
    raise KeyError("class\n3")


@pytest.mark.parametrize(("changes", "words"), [
    ({"train": (broken(0), Y)}, "the loss is not finite at the start (nan): the inputs of example 0 are not"),
    ({"train": (broken(slice(10, None)), Y)}, "at the start (nan): the inputs of example "),
    ({"train": (broken(11), Y), "gradient_batch": 80}, "(nan): the inputs of example 11 are not finite"),
    ({"valid": (broken(77), Y)}, "valid: the loss is not finite (nan): the inputs of example 77 are not"),
    ({"train": (X, unknown(7))}, "data: targets must be finite numbers, not nan as in example 7: correct"),
    ({"valid": (X, unknown(79))}, "valid: targets must be finite numbers, not nan as in example 79"),
    ({"train": (X, 1e30 * Y)}, "larger than the maximum of 3.4e+38: scale inputs and targets to about 1"),
    ({"train": (1e20 * X, Y)}, "larger than the maximum of 3.4e+38: scale inputs and targets to about 1"),
    (RUN | {"train": (np.full((60, 9, 4), np.nan), NEXT)},
     "the loss is not finite at the start (nan): the inputs of example 0 are not finite"),
    ({"train": (X, Y[:-1])}, "data: inputs have 80 examples, but targets have 79"),
    ({"valid": (X, Y[:-1])}, "valid: inputs have 80 examples, but targets have 79"),
    ({"train": (X[:0], Y[:0])}, "data: inputs must be whole or real numbers with at least one row"),
    ({"train": []}, "data: the data set is empty"),
    ({"train": None}, "data must not be None: pass the training examples"),
    ({"train": X}, "data must be a tuple (x, y)"),
    ({"train": {"x": X}}, "data must be a tuple (x, y)"),
    ({"train": (X,)}, "data: a tuple of data must be (x, y) or (x, y, mask), but it has 1 parts"),
    ({"train": Random()}, "data: reading example 0 of the data set twice returned"),
    ({"train": Ragged()}, "data: example 1 of the data set has a different shape or type than example 0"),
    ({"train": [(X, "a")]}, "the parts of example 0 of the data set must be whole or real numbers, not <U1"),
    ({"train": [(X, [[1], [1, 2]])]}, "the parts of example 0 of the data set must be an array with rows"),
    ({"train": Longer()}, "example 80 of the data set, which has length 81, cannot be read: IndexError"),
    ({"train": Failing()}, "of the data set, which has length 80, cannot be read: KeyError: 'image 3'"),
    ({"train": Endless()}, "data: the length of the data set cannot be read: TypeError: no length"),
    ({"train": Loader()}, "an object such as hfmpi.Examples, not Loader; pass its data set, loader.dataset"),
    ({"train": [1, 2]}, "data: a data set must return (x, y) or (x, y, weight) for each index, not 1"),
    ({"train": Changing()}, "reading the same examples twice returned different values"),
    ({"model": "net"}, "model must be a model such as an hfmpi.TorchModel, hfmpi.JaxModel or hfmpi.Network"),
    ({"model": Line}, "model must be a model such as an hfmpi.TorchModel, hfmpi.JaxModel or hfmpi.Network"),
    ({"gradient_batch": 81}, "gradient_batch can be at most 80, the number of training examples, not 81"),
    ({"gradient_batch": 9, "curvature_batch": 10}, "curvature_batch can be at most 9, the gradient batch"),
    ({"optimizer": "sgd", "curvature_batch": 10}, "optimizer sgd has no curvature batch"),
    ({"optimizer": hfmpi.Adam}, "(rate=0.001), or one that hfmpi.preset returns, not the class Adam"),
    ({"optimizer": 3}, "optimizer must be a name such as 'bhf-short', an object such as"),
    ({"optimizer": hfmpi.Adam(), "settings": {"rate": 1.0}}, "pass the settings to hfmpi.Adam("),
    ({"optimizer": hfmpi.preset("adam"), "settings": {"rate": 1.0}}, "the settings to hfmpi.preset(...)"),
    ({"optimizer": hfmpi.Adam(rate=np.inf)}, "setting rate must be a finite number"),
    ({"optimizer": "newton"}, "there is no optimizer 'newton' (did you mean lm?); choose one of sgd"),
    ({"optimizer": "AdamW"}, "'AdamW' (did you mean adam with the setting decay?); choose"),
    ({"optimizer": "Adam"}, "there is no optimizer 'Adam' (did you mean adam?); choose one of sgd"),
    ({"optimizer": "adam", "settings": {"lr": 1.0}}, "'lr' (did you mean rate?); it has rate, beta1"),
    ({"data": (X, Y)}, "unknown option 'train' (did you mean data?); the options are optimizer"),
    ({"lr": 0.1}, "unknown option 'lr' (did you mean settings={'rate': ...}?); the options are optimizer"),
    ({"optimizer": "soap"}, "Line does not define the matrices of theta (blocks): use a different optimizer"),
    ({"optimizer": "subspace"}, "Line does not define the matrices of theta (blocks): use a different"),
    ({"model": Named(3), "optimizer": "subspace"}, "Named has no Kronecker factors: use settings="),
    (
        {
            "model": Named(3),
            "optimizer": "subspace",
            "settings": {"directions": "gradient", "curvature_segments": 1},
        },
        "Named has no rows of examples, from which subspace estimates the curvature: use settings=",
    ),
    ({"settings": {"preconditioner": "diagonal"}}, "Line has no squared gradients: use settings="),
    ({"settings": {"structural_damping": 1.0}}, "Line has no structural damping"),
    ({"settings": {"dampin": 1.0}}, "has no setting 'dampin' (did you mean damping?); it has damping"),
    ({"max_steps": -1}, "max_steps must not be negative"),
    ({"max_steps": "3"}, "option max_steps must be of type int, not '3'"),
    ({"batch_size": 3}, "unknown option 'batch_size' (did you mean gradient_batch?); the options are"),
    ({"metrics": {}}, "unknown option 'metrics' (did you mean metric?); the options are"),
    ({"callbacks": []}, "unknown option 'callbacks' (did you mean callback?); the options are"),
    ({"validation_data": 1}, "unknown option 'validation_data' (did you mean valid?); the options are"),
    ({"early_stopping": 3}, "unknown option 'early_stopping' (did you mean patience?); the options are"),
    ({"monitor": "loss"}, "unknown option 'monitor' (did you mean watch?); the options are"),
    ({"dtype": "float64"}, "dtype is not an option of hfmpi.train"),
    ({"threads": 0}, "the number of threads of a rank must be at least 1, not 0"),
    ({"stall_timeout": -1}, "stall_timeout must be a number of seconds"),
    ({"slices": 3}, "slices must be a power of two"),
    ({"slices": 2**53}, "at most 65,536, not 9007199254740992"),
    ({"metric": right, "valid": (X, Y)}, "Line has no method outputs(theta, batch)"),
    ({"metric": right}, "a metric needs validation data: pass valid too"),
    ({"metric": 1, "valid": (X, Y)}, "metric must be a function (outputs, targets) -> values, or a dict"),
    (RUN | {"valid": VALID, "metric": lambda z, y: right(z, y).mean()},
     "metric(outputs, targets) must return a number for each of the 72 rows"),
    (RUN | {"valid": VALID, "metric": fails}, "metric(outputs, targets) raises KeyError: 'class"),
    (RUN | {"valid": VALID, "metric": lambda z: z}, "metric(outputs, targets) raises TypeError: "),
    (RUN | {"train": (SYMBOLS, NEXT + 4)}, "targets must be symbols from 0 to 3"),
    (RUN | {"train": (SYMBOLS, NEXT[:, :, None])}, "data: targets must be symbols (examples, steps)"),
    (RUN | {"train": (SYMBOLS, ONE_HOT)}, "if these are one-hot vectors, pass their symbols, y.argmax(-1)"),
    (RUN | {"train": (SYMBOLS, ONE_HOT.astype(float))}, "one-hot vectors, pass their symbols, y.argmax(-1)"),
    (RUN | {"train": (SYMBOLS, NEXT > 1)}, "; pass the symbols 0 and 1, .astype(int)"),
    ({"out": 3}, "out must be the path of a folder, not 3"),
])  # fmt: skip
def test_bad_input_is_one_sentence(changes, words, tmp_path):
    given = {"model": Line(3), "train": (X, Y), "optimizer": "shf", "max_steps": 1, "quiet": True}
    given |= {"out": tmp_path / "run"} | changes
    refused(lambda: hfmpi.train(**given), words, tmp_path / "run")


@pytest.mark.parametrize(("changes", "words"), [
    ({"train": (X + 1, Y)}, "belongs to a run with different training examples; use a different out"),
    ({"valid": (X, Y)}, "belongs to a run with different validation examples; use a different out"),
    ({"model": type("Curve", (Line,), {})(3)}, "belongs to a run of a different model; use a different out"),
    ({"optimizer": "bhf"}, "this run has optimizer = 'shf', not 'bhf': use a different out for a new run"),
    ({"gradient_batch": 5}, "this run has gradient_batch = 80, not 5: use a different out for a new run"),
])  # fmt: skip
def test_another_run_in_the_folder_stays(changes, words, tmp_path):
    given = {"model": Line(3), "train": (X, Y), "optimizer": "shf", "quiet": True, "out": tmp_path / "run"}
    hfmpi.train(**given, max_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        hfmpi.train(**given | changes, max_steps=2)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_model_that_computes_something_else_does_not_go_on(tmp_path):
    class Twice(Line):
        pass

    class Other(Line):
        def linearise(self, theta, batch, reuse=None):
            return super().linearise(-theta, batch)

    Other.__name__ = Twice.__name__
    given = {"train": (X, Y), "optimizer": "shf", "quiet": True, "out": tmp_path / "run"}
    hfmpi.train(Twice(3), **given, max_steps=1)
    with pytest.raises(
        UserError,
        match="belongs to a run of a different model: the loss of its parameters on the first examples",
    ):
        hfmpi.train(Other(3), **given, max_steps=2)


def test_a_network_takes_its_architecture_or_its_parts():
    parts = {"cell": "lstm", "inputs": 3, "outputs": 2, "hidden": 4}
    whole = hfmpi.Network(hfmpi.Architecture("lstm", 4, 3, 2, 2, "krause"), create("numpy"))
    assert network(backend="numpy", **parts, layers=2, variant="krause").architecture == whole.architecture
    with pytest.raises(UserError, match="not both"):
        hfmpi.Network(whole.architecture, hidden=3)
    with pytest.raises(
        UserError, match="a network needs an architecture, or cell, inputs, outputs and hidden"
    ):
        hfmpi.Network(cell="lstm", inputs=3, hidden=3)


def test_the_page_works(tmp_path):
    check_page('Network(cell="lstm"', tmp_path)
    names = run_page("HessianFree(", tmp_path)
    assert names["risk"].loss(names["theta"]) < 0.9 * names["risk"].loss(names["model"].initial(0))


# Under mpirun -----------------------------------------------------------------------------------

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
PROGRAM = """
import json, os, sys, time
sys.path.insert(0, {tests!r})
import numpy as np
import hfmpi
from hfmpi.errors import UserError
from test_python_train import NEXT, OPTIONS, SYMBOLS, VALID, X, Y, Line, network, right

rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
given = (network(), (SYMBOLS, NEXT), VALID)
{body}
"""


def mpirun(ranks, folder, body, meanwhile=None):
    """Run a program on several ranks; return exit code, stdout and stderr."""
    if MPIRUN is None:
        pytest.skip("there is no mpirun")
    program = PROGRAM.format(tests=str(Path(__file__).parent), body=body)
    words = [MPIRUN, "-n", str(ranks), sys.executable, "-c", program]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as process:
        if meanwhile:
            meanwhile(process)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_two_ranks_do_the_run_of_one(tmp_path):
    body = """
options = OPTIONS | {"metric": right, "micro_batch": 4}
first = hfmpi.train(*given, out="two", max_steps=2, **options)
again = hfmpi.train(*given, out="two", max_steps=4, **options)
third = hfmpi.train(*given, out="three", resume="two", max_steps=5, metric=right, quiet=True)
single = {"gradient_batch": 1, "curvature_batch": 1, "max_steps": 1}  # the shard of one rank is empty
assert hfmpi.train(*given, **options | single).step == 1
said = []
for changes in (
    {"train": (SYMBOLS, NEXT[: 60 - rank])},
    {"train": ((SYMBOLS + rank) % 4, NEXT)},
    {"model": network(hidden=5 + rank)},
    {"max_rejections": 5 + rank},
    {"resume": "nowhere"},
):
    try:
        bad = {"model": given[0], "train": given[1], "out": "bad", "max_steps": 1}
        hfmpi.train(**bad | OPTIONS | changes)
    except UserError as error:
        said.append(str(error))
with open(f"said{rank}", "w") as file:
    steps = first.step, again.step, len(again.history), third.step
    json.dump([*steps, again.valid_metric, again.theta.tolist(), third.theta.tolist(), said], file)
hfmpi.train(Line(3), (X, Y[1:]), max_steps=1)
"""
    code, _, err = mpirun(2, tmp_path, body)
    assert code != 0
    # What all ranks raise, one of them tells.
    assert (
        err.count("Traceback")
        == err.count("UserError: data: inputs have 80 examples, but targets have 79")
        == 1
    )
    ours = [json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2)]
    assert ours[0] == ours[1]
    first, again, records, third, metric, theta, last, said = ours[0]
    assert (first, again, records, third) == (2, 4, 4, 5)
    serial = hfmpi.train(network(), (SYMBOLS, NEXT), VALID, max_steps=4, metric=right, **OPTIONS)
    np.testing.assert_allclose(theta, serial.theta, rtol=1e-9, atol=1e-10)
    assert metric == pytest.approx(serial.valid_metric, abs=1e-9)
    serial = hfmpi.train(network(), (SYMBOLS, NEXT), VALID, max_steps=5, **OPTIONS)
    np.testing.assert_allclose(last, serial.theta, rtol=1e-6, atol=1e-7)
    assert not (tmp_path / "bad").exists()
    seed = "than the other ranks: if it is random, use the same seed on all ranks"
    assert said == [
        "data: inputs have 60 examples, but targets have 59",
        f"rank 1 has different data {seed}",
        f"rank 1 has a different model {seed}",
        "rank 1 has different options or checkpoint files than the other ranks",
        "there is no checkpoint nowhere",
    ]
    shown = CliRunner().invoke(cli, ["speedup", str(tmp_path / "two")])
    assert shown.exit_code == 0, shown.output


def test_a_warning_of_any_rank_is_seen(tmp_path):
    body = """
from test_python_train import Tight

Tight.__name__ = "Line"  # the models of all ranks have one name
hfmpi.train((Line, Tight)[rank](3), (X, Y), optimizer="adam", gradient_batch=80, max_steps=2, quiet=True)
"""
    code, out, err = mpirun(2, tmp_path, body)
    assert (code, out) == (0, "")
    assert re.fullmatch(r"Note: rank 1 ran out of memory \(.*\).* 8 sequences\.\n", err)


def test_the_failure_of_one_rank_is_that_of_all(tmp_path):
    body = """
class Failing(Line):
    def linearise(self, theta, batch, reuse=None):
        if rank == 1 and os.path.exists("run/checkpoint.h5"):
            raise ValueError("my own mistake")
        return super().linearise(theta, batch)

options = {"optimizer": "shf", "gradient_batch": 20, "checkpoint_every": 1, "max_steps": 9}
hfmpi.train(Failing(3), (X, Y), out="run", **options)
print("this is not reached")
"""
    code, out, err = mpirun(2, tmp_path, body)
    assert code != 0
    assert "ValueError: my own mistake" in err
    assert "Error: rank 1 failed with this exception, so all ranks end." in err
    assert err.count("Traceback") == 1
    assert "not reached" not in out
    assert checkpoint.latest(tmp_path / "run").meta["step"] >= 1


def test_a_metric_that_fails_on_one_rank_is_one_sentence(tmp_path):
    body = """
def fails(outputs, targets):
    if rank == 1 and len(outputs) < 72:
        return {}["label"]
    return right(outputs, targets)

with hfmpi.guard():
    hfmpi.train(*given, metric=fails, out="run", optimizer="bhf-short", max_steps=1)
"""
    code, _, err = mpirun(2, tmp_path, body)
    assert code == 2
    assert (
        err.count(
            "valid: metric(outputs, targets) raises KeyError: 'label'; its arguments are arrays of outputs"
        )
        == 1
    )
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_signal_stops_a_run_with_a_checkpoint(tmp_path):
    body = """
result = hfmpi.train(*given, out="run", optimizer="bhf-short", gradient_batch=60, curvature_batch=60,
    checkpoint_every=10**6, evaluate_every=10**6)
whole = result.step == len(result.history)
print(f"returned {rank} {whole} {result.done} {result.reason}", flush=True)  # in one write
"""

    def stop(process):
        while "step " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(10)  # SIGUSR1, which mpirun passes on

    code, out, _ = mpirun(2, tmp_path, body, stop)
    assert code == 0
    assert "Call it again with the same out to continue; the checkpoint is in run." in out
    for rank in range(2):
        assert f"returned {rank} True False received SIGUSR1" in out
    found = checkpoint.latest(tmp_path / "run")
    assert found.meta["step"] >= 1
    assert math.isfinite(found.meta["tried"])
    assert not (tmp_path / "run" / "DONE").exists()
