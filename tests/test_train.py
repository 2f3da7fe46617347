"""Complete runs on a small text: stopped, resumed, on several ranks, counted and measured."""

import json
import math
import time

import numpy as np
import pytest
from click.testing import CliRunner
from small import Recorder, history, make_run, same, shared_corpus, train, write_corpus

from hfmpi.cli.main import cli
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.history import HISTORY
from hfmpi.measure.spans import FORWARD
from hfmpi.objective.data_parallel import Risk
from hfmpi.objective.local import LocalSums
from hfmpi.objective.rows import ShardedRows
from hfmpi.parallel.communicator import MPICommunicator, digest
from hfmpi.runs.config import Config
from hfmpi.runs.merge import from_toml, merge
from hfmpi.runs.text_task import TextTask
from hfmpi.runs.train import Run
from hfmpi.runs.trained_model import Trained

STEPS = 6
OPTIMIZERS = {
    "sgd clip": {
        "optimizer": "sgd",
        "settings": {"rule": "clip", "rate": 1.0},
        "input_noise": 0.1,
        "dropout": 0.1,
    },
    "sgd normalised": {"optimizer": "sgd", "settings": {"rule": "normalised", "rate": 0.3}},
    "sgd rms-normalised": {"optimizer": "sgd", "settings": {"rule": "rms-normalised", "rate": 1.5}},
    "bgd": {"optimizer": "bgd"},
    "adam": {"optimizer": "adam", "settings": {"rate": 0.02}},
    "adamw": {"optimizer": "adam", "settings": {"rate": 0.02, "decay": 0.1, "averaging": 0.5, "warm_up": 2}},
    # With the default epsilon, rounding is amplified where the gradient is zero: 1e-8 after four steps.
    "soap": {"optimizer": "soap", "settings": {"epsilon": 1e-4, "averaging": 0.7}},
    "muon": {"optimizer": "muon", "settings": {"schedule": "cosine", "schedule_steps": 5}},
    "soap-muon": {"optimizer": "soap-muon", "settings": {"epsilon": 1e-4}},
    "subspace": {
        "optimizer": "subspace",
        "curvature_batch": 4,
        "input_noise": 0.2,
        "dropout": 0.3,
        "settings": {"kfac_dampings": 1, "candidates": 2, "refresh": 2, "damping": 1.0},
    },
    "subspace decay": {
        "optimizer": "subspace",
        "curvature_batch": 4,
        "settings": {
            "directions": "kfac+rms",
            "kfac_dampings": 1,
            "candidates": 2,
            "factor_decay": 0.5,
            "damping": 30.0,
            "weight_decay": 1e-3,
        },
    },
    "subspace rows": {
        "optimizer": "subspace",
        "curvature_batch": 4,
        "settings": {
            "directions": "kfac+rows",
            "segments": 2,
            "row_kind": "sketch",
            "kfac_dampings": 1,
            "row_dampings": 2,
            "row_damping": 1e-2,
            "row_steps": 4,  # later iterates are parallel up to rounding
            "row_iterates": 1,
            "damping": 1.0,
        },
    },
    "subspace sketch": {
        "optimizer": "subspace",
        "curvature_batch": 4,
        "settings": {
            "curvature_segments": 8,
            "memory": 1,
            "kfac_dampings": 1,
            "candidates": 2,
            "damping": 1.0,
            "cut": False,
        },
    },
    # Few CG iterations: after many, backtracking chooses among iterates that only differ by rounding.
    "shf": {"optimizer": "shf", "settings": {"cg_max_steps": 5}},
    "bhf": {"optimizer": "bhf", "settings": {"damping": 0.1, "structural_damping": 0.1, "cg_max_steps": 8}},
}


@pytest.fixture(autouse=True)
def _sketches_of_few_sequences(monkeypatch):
    """Allow sketches for the few sequences of these batches, as for large batches."""
    monkeypatch.setattr("hfmpi.optim.subspace.FEW_EXAMPLES", 0)


PAUSE = 0.05
"""Seconds of a run's steps that are in no span at most: a busy machine stops it between two of them."""


@pytest.fixture(scope="module", name="data")
def fixture_data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small.h5")


# Stop and go on --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_stopped_at_any_step_goes_on_as_if_it_had_not_been(name, dtype, data, tmp_path):
    options = OPTIMIZERS[name] | {"dtype": dtype, "seed": 3}
    whole, _ = train(tmp_path / "whole", data, max_steps=STEPS, **options)
    for stop in range(1, STEPS):
        folder = tmp_path / f"stopped at {stop}"
        _, result = train(folder, data, max_steps=stop, **options)
        assert (result.step, result.done) == (stop, True)
        run, result = train(folder, data, max_steps=STEPS, **options)
        assert (run.first_step, result.step) == (stop, STEPS)
        same(run, whole)
        assert history(folder) == history(whole.folder)
    # ... and stopped after every single step
    for stop in range(1, STEPS + 1):
        run, _ = train(tmp_path / "often", data, max_steps=stop, **options)
    same(run, whole)
    assert history(run.folder) == history(whole.folder)


def test_the_steps_of_a_run_do_something(data, tmp_path):
    seen = set()
    for name, options in OPTIMIZERS.items():
        run, _ = train(tmp_path / name, data, max_steps=STEPS, **options)
        losses = [record["train_bpc"] for record in history(run.folder)]
        assert len(set(losses)) == STEPS
        seen.add(digest(run.theta))
    another, _ = train(tmp_path / "seed", data, max_steps=STEPS, seed=1, **OPTIMIZERS["shf"])
    assert digest(another.theta) not in seen
    assert len(seen) == len(OPTIMIZERS)


@pytest.mark.parametrize("option", ["input_noise", "dropout"])
def test_noise_and_dropout_are_drawn_for_every_step_and_spare_validation(data, tmp_path, option):
    options = {"optimizer": "adam", "gradient_batch": 210, "settings": {"rate": 1e-30}, "evaluate_every": 1}
    plain, _ = train(tmp_path / "plain", data, max_steps=3, **options)
    noisy, _ = train(tmp_path / "noisy", data, max_steps=3, **{option: 0.3}, **options)
    without, found = history(plain.folder), history(noisy.folder)  # theta hardly moves
    losses = [{round(record["train_bpc"], 9) for record in records} for records in (without, found)]
    assert [len(each) for each in losses] == [1, 3]  # the batch is the full training set
    for record, other in zip(found, without, strict=True):
        assert record["train_bpc"] != other["train_bpc"]
        assert record["valid_bpc"] == other["valid_bpc"]
    assert f"{option} = 0.3" in (noisy.folder / "config.toml").read_text()
    assert any(option.replace("_", " ") in note for note in noisy.task.notes)


class PowerCut(BaseException):
    """Ends a run without saving anything."""


def test_a_run_that_broke_off_repeats_the_steps_after_its_checkpoint(data, tmp_path):
    whole, _ = train(tmp_path / "whole", data, max_steps=STEPS, checkpoint_every=2)

    def crash(record):
        if record["step"] == 5:
            raise PowerCut

    with pytest.raises(PowerCut):
        train(tmp_path / "broken", data, max_steps=STEPS, checkpoint_every=2, reporter=Recorder(crash))
    assert [record["step"] for record in history(tmp_path / "broken")] == [1, 2, 3, 4, 5]
    assert checkpoint.latest(tmp_path / "broken").meta["step"] == 4
    run, _ = train(tmp_path / "broken", data, max_steps=STEPS, checkpoint_every=2)
    assert run.first_step == 4
    same(run, whole)
    assert history(run.folder) == history(whole.folder)

    # If the newest checkpoint is damaged, the run resumes from the previous one.
    torn = tmp_path / "whole" / checkpoint.NEWEST
    torn.write_bytes(torn.read_bytes()[:-500])
    run, _ = train(tmp_path / "whole", data, max_steps=STEPS, checkpoint_every=2)
    assert run.first_step == 4
    same(run, whole)
    assert history(run.folder) == history(tmp_path / "broken")


def test_a_run_may_start_from_another_ones_checkpoint(data, tmp_path):
    whole, _ = train(tmp_path / "whole", data, max_steps=4)
    train(tmp_path / "first", data, max_steps=2)
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "first").iterdir())
    for source in ("first", f"first/{checkpoint.NEWEST}"):
        folder = tmp_path / f"second from {source.replace('/', ' ')}"
        run, _ = train(folder, data, max_steps=4, resume=str(tmp_path / source))
        same(run, whole)
        assert [record["step"] for record in history(folder)] == [3, 4]
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "first").iterdir()) == before
    with pytest.raises(UserError, match="already contains a run"):
        train(tmp_path / "whole", data, max_steps=4, resume="never")


class Clock:
    """A clock on which a step takes a sixteenth of a second and everything else takes no time."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds

    def tick(self, record):
        self.seconds += 1 / 16


def test_a_limit_of_seconds_that_passes_while_a_checkpoint_is_written_stands_in_it(data, tmp_path):
    """Otherwise the next start would take one more step."""
    clock = Clock()
    reporter = Recorder(lambda record: setattr(clock, "seconds", 100.0 * (record["step"] >= 2)))
    options = {"max_seconds": 50.0, "checkpoint_every": 1}
    _, result = train(tmp_path / "run", data, reporter=reporter, clock=clock, **options)
    _, again = train(tmp_path / "run", data, clock=Clock(), **options)
    assert result.step == again.step == 2


def test_steps_that_no_checkpoint_holds_are_counted(data, tmp_path):
    """A killed process leaves such steps."""
    train(tmp_path / "run", data, max_steps=2)
    with (tmp_path / "run" / HISTORY).open("a") as file:
        file.write('{"step": 3}\n{"step": 4}\n{"ste')
    reporter = Recorder()
    train(tmp_path / "run", data, max_steps=3, reporter=reporter)
    assert reporter.notes == [
        f"{tmp_path / 'run' / HISTORY}: 2 step(s) after the last checkpoint will be recomputed"
    ]
    train(tmp_path / "run", data, max_steps=4, reporter=reporter)
    assert len(reporter.notes) == 1


def test_max_seconds_counts_from_the_first_start(data, tmp_path):
    clock = Clock()
    reporter = Recorder(clock.tick)
    _, result = train(tmp_path / "run", data, max_seconds=0.3, reporter=reporter, clock=clock)
    assert result.step == 5
    assert result.done
    assert result.reason == "0.3 seconds have passed"
    assert reporter.records[-1]["seconds"] >= 0.2
    assert all(record["seconds"] < 0.3 for record in reporter.records[:-1])
    run, again = train(tmp_path / "run", data, max_seconds=0.3, clock=Clock())
    assert (again.step, run.first_step) == (result.step, result.step)
    assert (tmp_path / "run" / "DONE").exists()
    run, more = train(tmp_path / "run", data, max_seconds=0.3, max_steps=result.step + 1, clock=Clock())
    assert more.step == result.step  # still no time
    run, more = train(tmp_path / "run", data, max_steps=result.step + 1)
    assert more.step == result.step + 1


# What a run leaves -----------------------------------------------------------------------------


def test_the_folder_and_the_history_keep_the_contract(data, tmp_path):
    options = {"settings": {"cg_max_steps": 7, "structural_damping": 0.1}, "burn_in": 3, "max_steps": 4}
    reporter = Recorder()
    folder = tmp_path / "deep" / "run"
    run, result = train(
        folder, data, reporter=reporter, evaluate_every=3, checkpoint_every=3, check_every=1, **options
    )
    assert {path.name for path in folder.iterdir()} == {
        "config.toml", "history.jsonl", "checkpoint.h5", "checkpoint.previous.h5", "best.h5", "timing.json",
        "DONE", ".lock",
    }  # fmt: skip
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert records == reporter.records
    wanted = {"step", "seconds", "train_bpc", "valid_bpc", "P_I", "P_D", "damping", "rho", "cg_steps"}
    for record in records:
        assert wanted | {"cg_stop", "line_search_rate", "P_P", "P_I_full", "P_D_full"} <= record.keys()
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["valid_bpc"] is None for record in records] == [True, True, False, False]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)
    assert records[-1]["valid_bpc"] == result.valid.loss == run.evaluate(run.theta)
    characters = len(run.task.corpus.valid) // 20 * 20
    network, everything = run.model, run.task.valid_set.take(np.arange(run.task.valid_set.count))
    nats = network.loss(run.theta, everything) / characters
    assert result.valid.loss == pytest.approx(nats / math.log(2), rel=1e-12)

    timing = json.loads((folder / "timing.json").read_text())
    (rank,) = timing["ranks"]
    spans = {"forward", "gradient", "linearise", "products", "allreduce", "waiting", "line search", "input"}
    assert spans | {"files", "evaluate", "optimizer"} <= rank["spans"].keys()
    assert all(value >= 0 for value in rank["spans"].values())
    assert sum(rank["spans"].values()) <= timing["seconds"] * 1.001
    assert rank["spans"]["waiting"] == 0
    assert (timing["first_step"], timing["last_step"]) == (0, 4)
    # All steps except the first, and without the evaluation after each.
    assert timing["timed_steps"] == 3
    assert not {"files", "evaluate"} & rank["step_spans"].keys()
    stepping = sum(record["step_seconds"] for record in records[1:])
    assert -1e-3 < stepping - sum(rank["step_spans"].values()) < PAUSE
    assert all(rank["step_spans"][name] <= rank["spans"][name] for name in rank["step_spans"])
    assert stepping < seconds[-1] - seconds[0]

    # Its config.toml reproduces the run; only the times differ.
    config = merge(from_toml(folder / "config.toml"))
    assert config == run.config
    task = TextTask.read(config, data, 0)
    again = Run(tmp_path / "again", task, run.session)
    again.train()
    same(again, run)
    assert history(again.folder) == history(folder)


def test_a_run_whose_next_gradient_judges_the_last_step_goes_on_as_if_it_had_not_been_stopped(data, tmp_path):
    options = {"optimizer": "subspace", "gradient_batch": 210, "curvature_batch": 6, "dtype": "float32"}
    whole, _ = train(tmp_path / "whole", data, max_steps=STEPS, **options)
    for stop in range(1, STEPS + 1):
        run, _ = train(tmp_path / "often", data, max_steps=stop, **options)
    same(run, whole)
    records = history(run.folder)
    assert records == history(whole.folder)
    assert records[0]["rho"] is None
    assert records[1]["rho"] is not None
    assert {record.get("projections") for record in records if record["accepted"]} == {1}
    assert [record["losses"] for record in records] == [1] + [0] * (STEPS - 1)
    for name, changes in ("part", {"gradient_batch": 209}), ("noise", {"input_noise": 0.1}):
        other, _ = train(tmp_path / name, data, max_steps=2, **options | changes)
        assert [record["losses"] for record in history(other.folder)] == [1, 1]
    found = checkpoint.latest(run.folder)
    state = found.state | {"steps": found.state["steps"][:-1]}
    checkpoint.save(run.folder / checkpoint.NEWEST, found.theta, state, found.meta)
    with pytest.raises(UserError, match='"steps" of the checkpoint does not fit optimizer subspace'):
        train(run.folder, data, max_steps=STEPS + 1, **options)


@pytest.mark.parametrize("name", ["adamw", "soap", "muon", "soap-muon"])
def test_the_history_of_an_adaptive_method(name, data, tmp_path):
    run, _ = train(tmp_path / "run", data, max_steps=3, **OPTIMIZERS[name])
    for record in history(run.folder):
        assert {"gradient_norm", "step_norm", "rate", "accepted", "message"} <= record.keys()
        assert not {"damping", "rho", "projections"} & record.keys()
        factor = run.preset.optimizer.factor(record["step"] - 1)
        assert record["rate"] == pytest.approx(run.preset.optimizer.rate * factor)
    drawn = CliRunner().invoke(cli, ["plot", str(run.folder), "--internals"])
    assert [line.split()[2] for line in drawn.output.splitlines()[1:]] == [
        "rate",
        "gradient_norm",
        "step_norm",
    ]
    assert CliRunner().invoke(cli, ["plot", str(run.folder)]).exit_code == 0


@pytest.mark.parametrize("name", ["adamw", "soap"])
def test_the_average_is_what_is_evaluated_and_used(name, data, tmp_path):
    averaging, options = OPTIMIZERS[name]["settings"]["averaging"], OPTIMIZERS[name] | {"dtype": "float32"}
    iterates = []
    for steps in (1, 2, 3):  # through the checkpoint
        run, result = train(tmp_path / "run", data, max_steps=steps, **options)
        iterates.append(run.theta.astype(float))
    expected = iterates[0]  # the weights of docs/theory.md
    for t in (2, 3):
        share = max(1 - averaging, 9 / (t + 8))
        expected = (1 - share) * expected + share * iterates[t - 1]
    np.testing.assert_allclose(run.state.average, expected, rtol=1e-5, atol=1e-7)
    assert result.valid.loss == run.evaluate(run.state.average) != run.evaluate(run.theta)
    trained = Trained.read(tmp_path / "run")
    np.testing.assert_array_equal(trained.theta, run.state.average)
    np.testing.assert_array_equal(checkpoint.latest(tmp_path / "run").theta, run.theta)
    words = ["evaluate", str(tmp_path / "run"), "--backend", "numpy", "--json"]
    found = CliRunner().invoke(cli, words)
    assert json.loads(found.output)["valid_bpc"] == pytest.approx(result.valid.loss, rel=1e-5)
    plain = {"settings": options["settings"] | {"averaging": 0.0}}
    without, _ = train(tmp_path / "plain", data, max_steps=3, **options | plain)
    np.testing.assert_array_equal(without.theta, run.theta)  # the training is the same
    np.testing.assert_array_equal(Trained.read(tmp_path / "plain").theta, without.theta)


def test_a_checkpoint_without_an_average_goes_on(data, tmp_path):
    """Earlier versions wrote such checkpoints."""
    whole, _ = train(tmp_path / "whole", data, max_steps=4, **OPTIMIZERS["adam"])
    train(tmp_path / "run", data, max_steps=2, **OPTIMIZERS["adam"])
    found = checkpoint.latest(tmp_path / "run")
    state = {name: entry for name, entry in found.state.items() if name != "average"}
    assert set(state) == {"updates", "mean", "mean_square"}
    checkpoint.save(tmp_path / "run" / checkpoint.NEWEST, found.theta, state, found.meta)
    run, _ = train(tmp_path / "run", data, max_steps=4, **OPTIMIZERS["adam"])
    same(run, whole)
    with pytest.raises(UserError, match='"average" of the checkpoint does not fit optimizer adam'):
        train(tmp_path / "run", data, max_steps=5, **OPTIMIZERS["adamw"])


def test_no_done_while_a_run_goes_on(data, tmp_path):
    folder, seen = tmp_path / "run", []
    train(folder, data, max_steps=1)
    assert (folder / "DONE").exists()
    train(
        folder, data, max_steps=2, reporter=Recorder(lambda record: seen.append((folder / "DONE").exists()))
    )
    assert seen == [False]
    assert (folder / "DONE").exists()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_cost_follows_from_the_counted_passes(name, data, tmp_path, monkeypatch):
    counted = dict.fromkeys(("gradients", "losses", "linearisations", "products", "projections"), 0)
    counted["row_products"] = 0

    def count(method, key):
        original = getattr(Risk, method)

        def counting(self, *arguments, **options):
            counted[key] += self.span != "evaluate"
            result = original(self, *arguments, **options)
            if key not in ("products", "projections"):
                return result
            counted[key] -= 1

            def product(v):
                counted[key] += 1
                return result(v)

            return product

        monkeypatch.setattr(Risk, method, counting)

    for method, key in (
        ("gradient", "gradients"),
        ("squared_gradients", "gradients"),
        ("factored_gradient", "gradients"),
        ("rows", "gradients"),
        ("losses", "losses"),
        ("project", "projections"),
        ("gauss_newton", "products"),
        ("structural_gauss_newton", "products"),
    ):
        count(method, key)
    linearise = LocalSums._linearise

    def linearised(self, *arguments):  # in a separate pass, not with the gradient
        counted["linearisations"] += arguments[3:] != (FORWARD,)
        return linearise(self, *arguments)

    monkeypatch.setattr(LocalSums, "_linearise", linearised)
    multiply = ShardedRows.product

    def multiplied(self, v):
        counted["row_products"] += 1
        return multiply(self, v)

    monkeypatch.setattr(ShardedRows, "product", multiplied)
    # Stopped once, so that the counts are stored in the checkpoint.
    for steps in (2, STEPS):
        run, _ = train(tmp_path / "run", data, max_steps=steps, **OPTIMIZERS[name])
    records = history(run.folder)
    second = "hf" in name or "subspace" in name
    batch, curvature = 10, 4 if second else 0
    check_cost(run, records, batch, curvature, ranks=1)
    assert (
        ("operations" in records[-1])
        == ("depth" in records[-1])
        == name.startswith(("soap", "muon", "subspace"))
    )
    for key, total in counted.items():
        assert sum(record.get(key, 0) for record in records) == total
    assert (counted["products"] > 0) == ("hf" in name)
    assert (counted["row_products"] > 0) == ("rows" in name) == ("row_products" in records[0])


def check_cost(run, records, batch, curvature, ranks):
    """Recompute the costs of Krause et al. (2015): P_D = 3 I_t B_g + 4 I_c B_c, P_I = 3 I_t + 4 I_c."""
    operations = depth = 0
    forward = 2 * run.model.size * 20  # sequences of 20 steps
    sequential = 20 * (2 if run.model.architecture.name in ("mrnn", "mlstm") else 1)
    cg = losses = gradients = linearisations = products = 0
    projections = directions = candidates = adjoints = sketches = 0
    for steps, record in enumerate(records, start=1):
        cg += record["cg_steps"]
        losses += record["losses"]
        gradients += record["gradients"]
        linearisations += record["linearisations"]
        products += record["products"]
        projections += record.get("projections", 0)
        if record.get("projections"):
            directions += record.get("directions", 0) + record["projections"]
        sketches += record.get("sketches", 0)
        candidates += record.get("candidates", 0)
        adjoints += record.get("adjoints", 0)
        assert record["step"] == steps
        on_gradient = (3 * steps + 2 * adjoints) * batch
        assert record["P_D"] == on_gradient + (4 * cg + 2 * directions + 2 * sketches) * curvature
        assert record["P_I"] == 3 * steps + 4 * cg + 2 * projections
        if not projections and not sketches:
            expected = 3 * steps * math.ceil(batch / ranks) + 4 * cg * math.ceil(curvature / ranks)
            assert record["P_P"] == expected
        on_batch, on_curvature = losses + 3 * gradients, linearisations + 4 * products
        on_all = on_batch + candidates + 2 * adjoints
        operations += record.get("operations", 0)
        depth += record.get("depth", 0)
        more = math.ceil(operations / forward), math.ceil(depth / sequential)
        on_curvature_all = on_curvature + 2 * directions + 2 * sketches
        assert record["P_D_full"] == on_all * batch + on_curvature_all * curvature + more[0]
        assert record["P_I_full"] == on_batch + on_curvature + 2 * projections + more[1]


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("shf", 40),
        ("bhf", 25),
        ("adam", 120),
        ("sgd rms-normalised", 120),
        ("sgd clip", 300),
        ("soap", 40),
        ("muon", 40),
        ("soap-muon", 40),
    ],
)
@pytest.mark.parametrize("model", ["rnn", "mlstm"])
def test_training_learns(name, steps, model, data, tmp_path):
    options = {"hidden": 16, "gradient_batch": 40, "dtype": "float32", "backend": "numba", "model": model}
    if "hf" in name:
        options["curvature_batch"] = 20
    run, _ = train(tmp_path / "run", data, max_steps=steps, **OPTIMIZERS[name] | options)
    valid = [record["valid_bpc"] for record in history(run.folder)]
    assert valid[-1] < 0.85 * valid[0]


@pytest.mark.parametrize("name", ["adam", "soap", "muon", "soap-muon"])
def test_an_update_that_overflows_is_told_and_the_run_goes_on_but_is_not_saved(name, data, tmp_path):
    reporter, options = Recorder(), {"optimizer": name, "dtype": "float32", "settings": {"rate": 1e37}}
    run = make_run(tmp_path / "run", data, reporter=reporter, max_steps=3, **options)
    sentence = r"^the validation loss is not finite after step 3: there is no checkpoint yet$"
    with np.errstate(all="ignore"), pytest.raises(UserError, match=sentence):
        run.train()
    assert not (run.folder / checkpoint.NEWEST).exists()
    records = history(run.folder)
    assert [record["accepted"] for record in records] == [True, False, False]
    assert "not finite" in records[1]["message"]
    assert records[1]["train_bpc"] is None  # in JSON, while the reporter has nan
    assert not math.isfinite(reporter.records[1]["train_bpc"])
    assert merge(from_toml(run.folder / "config.toml")) == run.config


@pytest.mark.parametrize("settings", [{"rate": math.inf}, {"rate": math.nan}, {"rate": 10**400}])
def test_settings_are_finite(settings):
    with pytest.raises(UserError, match="rate must be a finite number"):
        Config(optimizer="sgd", settings=settings)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({"directions": "kfac+rows", "segments": 3}, 30), ({"curvature_segments": 3}, 0), ({}, 0)],
)
def test_the_first_lines_count_the_rows_that_are_stored(data, tmp_path, settings, rows):
    """The rows of a sketch are not stored."""
    run = make_run(tmp_path / "run", data, optimizer="subspace", gradient_batch=10, settings=settings)
    assert run.facts([]).rows == rows


# Several ranks ---------------------------------------------------------------------------------


ROUNDING = {"soap-muon": 1e-8}
"""How far sums in another order may move the parameters, relative; 1e-10 if a method is not named.

SOAP divides by the roots of second moments near zero, and Muon raises small singular values by 3.4445^5.
"""


def close(a, b, most=1e-10):
    assert np.linalg.norm(a - b) <= most * np.linalg.norm(b)


def wait(comm):
    """Wait for all ranks without the busy loop of a barrier, which would slow down the others."""
    arrived = comm.Ibarrier()
    while not arrived.Test():
        time.sleep(0.005)


@pytest.mark.mpi(ranks=4, timeout=200, unit="s")
def test_any_number_of_ranks_does_the_same_run(mpi_ranks, comm, mpi_tmp_path):
    """Runs on 1, 2, 3 and 4 of the ranks equal a serial one, also resumed on different numbers of ranks."""
    assert comm.size == mpi_ranks
    data = shared_corpus(comm, mpi_tmp_path)
    parts = {}
    for ranks in (1, 2, 3, 4):
        part = comm.Split(color=comm.rank < ranks, key=comm.rank)
        if comm.rank < ranks:
            parts[ranks] = MPICommunicator(part)
        part.Free()
    for name, options in OPTIMIZERS.items():
        options = options | {"check_every": 1, "micro_batch": 3}
        serial = None
        if comm.rank == 0:
            whole, _ = train(mpi_tmp_path / f"{name} serial", data, max_steps=4, **options)
            serial = whole.theta, history(whole.folder)
            assert all(record["accepted"] for record in serial[1])
        wait(comm)
        serial = comm.bcast(serial)
        for ranks in (1, 2, 3, 4):
            if ranks in parts:
                run, _ = train(mpi_tmp_path / f"{name} {ranks}", data, parts[ranks], max_steps=4, **options)
                compare(run, *serial, ROUNDING.get(name, 1e-10))
                second = "hf" in name or "subspace" in name
                check_cost(run, history(run.folder), 10, 4 * second, ranks)
            wait(comm)
        if name in ("sgd normalised", "bgd", "adam"):
            continue  # their states are those of sgd with the other rules, and of adamw
        for ranks, steps in ((1, 1), (3, 2), (2, 3), (4, 4)):  # stopped and resumed on other numbers of ranks
            if ranks in parts:
                run, _ = train(mpi_tmp_path / f"{name} mixed", data, parts[ranks], max_steps=steps, **options)
                assert run.first_step == steps - 1
            wait(comm)
        compare(run, *serial, ROUNDING.get(name, 1e-10))
    for communicator in parts.values():
        communicator.close()


def compare(run, theta, records, most):
    """Compare a run on several ranks with the serial one, and its ranks with each other."""
    close(run.theta, theta, most)
    assert run.communicator.same(digest(run.theta)) == []
    for name, value in vars(run.state).items():
        assert run.communicator.same(digest(np.asarray(value))) == [], name
    found = history(run.folder, leave=())
    for key in ("train_bpc", "valid_bpc"):
        losses = ([record[key] for record in each] for each in (found, records))
        close(*map(np.array, losses), most)
    for key in ("step", "P_D", "P_I", "P_D_full", "P_I_full", "cg_steps", "accepted"):
        assert [record[key] for record in found] == [record[key] for record in records]
    timing = json.loads((run.folder / "timing.json").read_text())
    assert [rank["rank"] for rank in timing["ranks"]] == list(range(run.communicator.size))
    assert min(rank["spans"]["waiting"] for rank in timing["ranks"]) >= 0
    lasted = [sum(rank["step_spans"].values()) for rank in timing["ranks"]]
    timed = [r["step_seconds"] for r in found if r["step"] > timing["last_step"] - timing["timed_steps"]]
    assert -1e-3 < sum(timed) - lasted[0] < PAUSE


@pytest.mark.mpi(ranks=4, timeout=110, unit="s")
def test_with_slices_the_bits_do_not_depend_on_the_number_of_ranks(mpi_ranks, comm, mpi_tmp_path):
    assert comm.size == mpi_ranks
    data, seen = shared_corpus(comm, mpi_tmp_path), {}
    for ranks in (1, 2, 4):
        part = comm.Split(color=comm.rank < ranks, key=comm.rank)
        if comm.rank < ranks:
            communicator = MPICommunicator(part)
            for name, backend in (
                ("shf", "numpy"),
                ("shf", "numba"),
                ("soap", "numba"),
                ("soap-muon", "numba"),
                ("subspace", "numpy"),
            ):
                options = {"backend": backend, "dtype": "float32", "slices": 4, "micro_batch": 2}
                options |= {"optimizer": name, "max_steps": 3}
                run, _ = train(mpi_tmp_path / f"{name} {backend} {ranks}", data, communicator, **options)
                record = (
                    history(run.folder, leave=("seconds", "step_seconds", "P_P")) if comm.rank == 0 else None
                )
                bits = [digest(np.asarray(v)) for v in (run.theta, *vars(run.state).values())]
                seen.setdefault(f"{name} {backend}", []).append((bits, record))
            communicator.close()
        part.Free()
    for name, found in seen.items():
        assert all(each == found[0] for each in found), name
        assert len(found) == (3, 2, 1, 1)[comm.rank]


@pytest.mark.mpi(ranks=3, timeout=60, unit="s")
def test_a_rank_that_strays_stops_the_run(mpi_ranks, comm, mpi_tmp_path, monkeypatch):
    communicator, data = MPICommunicator(comm), shared_corpus(comm, mpi_tmp_path)
    cases = (1, 3, "theta", 1), (0, 4, "theta", 1), (1, 3, "direction", 0)
    for check_every, found_at, what, stray in cases:  # at the next step, or before the next checkpoint
        folder = mpi_tmp_path / f"run {check_every} {what}"
        options = {"checkpoint_every": 2, "check_every": check_every}
        run = make_run(folder, data, communicator, max_steps=6, **options)
        thetas = []

        def one_step(*arguments, run=run, honest=run._one_step, thetas=thetas, what=what, stray=stray):
            report = honest(*arguments)
            if comm.rank == stray and run.step == 3:
                vector = run.theta if what == "theta" else run.state.direction
                vector.view(np.int64)[0] ^= 1  # the last bit of one number
            thetas.append(run.theta.copy())
            return report

        monkeypatch.setattr(run, "_one_step", one_step)
        differs = f"rank {stray} has different parameters than the other ranks"
        sentence = f"^{differs} after step {found_at}: .* step 2, is valid"
        with pytest.raises(UserError, match=sentence):
            run.train()
        assert len(thetas) == found_at
        comm.Barrier()  # rank 0 has written what the others read
        found = checkpoint.latest(folder)
        assert (found.meta["step"], found.message) == (2, None)
        np.testing.assert_array_equal(found.theta, thetas[1])
        assert not (folder / "DONE").exists()
        comm.Barrier()
        run, result = train(folder, data, communicator, max_steps=4, **options)  # continues from there
        assert (run.first_step, result.step) == (2, 4)

    # A rank that starts with different options or data stops the run before anything is written.
    seed = 5 if comm.rank == 2 else 4
    run = make_run(mpi_tmp_path / "new", data, communicator, max_steps=2, seed=seed)
    with pytest.raises(UserError, match=r"^rank 2 has different data, options"):
        run.train()
    assert not (mpi_tmp_path / "new").exists()

    communicator.close()
