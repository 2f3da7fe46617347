"""Speedup and its losses by hand, the scaling model in closed form, and the command on new runs."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from small import Recorder, train, write_corpus

from hfmpi.cli.main import cli
from hfmpi.display import aligned, bar, sparkline
from hfmpi.errors import UserError
from hfmpi.measure.cost import Counts
from hfmpi.objective.data_parallel import Risk
from hfmpi.optim.layout import Block
from hfmpi.parallel.communicator import Communicator
from hfmpi.runs.config import Config
from hfmpi.speedup.bench_file import read_bench
from hfmpi.speedup.compare import causes, compare, study
from hfmpi.speedup.prediction import KINDS, fit, predict
from hfmpi.speedup.runs import TimedRun, read_runs
from hfmpi.speedup.scaling import Curve, Job, Link, Pass, best, fit_link
from hfmpi.speedup.steps import StepTimes
from hfmpi.speedup.tables import _model

COUNTS = Counts(steps=2, cg_steps=10, gradients=2, products=12, losses=6, linearisations=2)


def measured(ranks, *spans, counts=COUNTS, seconds=None):
    """Return the measurements of a job with batches of 320 and 32; a single dict is used for all ranks."""
    spans = spans * ranks if len(spans) == 1 else spans
    seconds = np.full((1, 2), sum(spans[0].values())) if seconds is None else np.array(seconds)
    return StepTimes(ranks, seconds, spans, ({},) * ranks, counts, 320, 32)


ALONE = {"forward": 1.0, "gradient": 3.0, "products": 4.0, "optimizer": 0.5}


def test_a_perfect_run_loses_nothing():
    base = measured(1, ALONE)
    four = measured(4, {name: value / 4 for name, value in ALONE.items()})
    row = compare(base, four)
    assert row["speedup"] == pytest.approx(4)
    assert row["efficiency"] == pytest.approx(1)
    assert row["predicted"] == 4  # 4 divides both batches
    assert row["limit"] == (3 * 2 * 320 + 4 * 10 * 32) / (3 * 2 + 4 * 10)
    np.testing.assert_allclose(list(row["loss"].values()), 0, atol=1e-15)


def test_every_cause_by_hand():
    base = measured(1, ALONE)
    # Passes 4.4 and 4.2 instead of the ideal 4; 0.1 in collectives; rank 1 waits 0.2; 0.5 is repeated by all.
    two = measured(
        2,
        {
            "forward": 0.5,
            "gradient": 1.6,
            "products": 2.3,
            "optimizer": 0.5,
            "allreduce": 0.1,
            "waiting": 0.0,
        },
        {
            "forward": 0.5,
            "gradient": 1.6,
            "products": 2.1,
            "optimizer": 0.5,
            "allreduce": 0.1,
            "waiting": 0.2,
        },
    )
    found = causes(base, two)
    expected = {"allreduce": 0.1, "waiting": 0.1, "redundant": 0.25, "other work": 0, "slower passes": 0.3}
    assert found == pytest.approx(expected | {"uneven shares": 0})
    assert sum(found.values()) == pytest.approx(two.step_seconds - base.step_seconds / 2)
    assert two.step_seconds == pytest.approx(5.0)
    row = compare(base, two)
    assert row["speedup"] == pytest.approx(8.5 / 5)
    assert row["imbalance"] == pytest.approx(4.4 / 4.3)
    split = causes(base, two, uneven=0.06, batch_seconds=4.1)
    assert (split["uneven shares"], split["waiting"]) == pytest.approx((0.06, 0.04))
    assert split["smaller batch"] == pytest.approx(0.1)
    assert split["shared memory"] == pytest.approx(0.2)


def test_more_work_is_a_cause_of_its_own():
    base = measured(1, ALONE)
    twice = Counts(steps=2, cg_steps=20, gradients=4, products=24, losses=12, linearisations=4)
    two = measured(2, {name: value for name, value in ALONE.items() if name != "optimizer"}, counts=twice)
    found = causes(base, two)
    assert found["other work"] == pytest.approx(4.0)
    assert found["slower passes"] == pytest.approx(0.0)
    assert found["redundant"] == pytest.approx(-0.25)


def test_spread_is_over_steps_and_repeats_are_averaged():
    base = measured(1, ALONE, seconds=[[8.0, 4.0], [16.0, 4.0]])
    two = measured(2, ALONE, seconds=[[6.0, 1.0], [6.0, 1.0]])
    row = compare(base, two)
    assert (row["repeats"], row["steps"]) == (2, 2)
    np.testing.assert_allclose(row["speedup_spread"], [2 + 0.1 * 2, 4 - 0.1 * 2])


def test_uneven_shares_and_a_base_of_several_ranks():
    three = measured(3, ALONE)
    row = compare(measured(2, ALONE), three)
    assert row["predicted"] == (3 * 2 * 160 + 4 * 10 * 16) / (3 * 2 * 107 + 4 * 10 * 11)
    assert row["efficiency"] == pytest.approx(2 / 3)


amounts = st.floats(1e-6, 1e3)
NAMES = "forward", "line search", "products", "input", "allreduce", "optimizer", "waiting"
spans = st.fixed_dictionaries(dict.fromkeys(NAMES, amounts))


@given(spans, st.lists(spans, min_size=2, max_size=5), st.integers(1, 50), amounts, st.none() | amounts)
def test_causes_always_add_up_to_what_is_lost(one, several, products, uneven, batch_seconds):
    counts = Counts(steps=2, gradients=2, products=products, losses=3, linearisations=2)
    base, run = measured(1, one), measured(len(several), *several, counts=counts)
    row = compare(base, run, uneven, batch_seconds)
    whole = 1 + sum(abs(share) for share in row["loss"].values())
    assert sum(row["loss"].values()) == pytest.approx(1 - row["efficiency"], abs=1e-9 * whole)


# The model -------------------------------------------------------------------------------------


def test_the_allreduce_in_closed_form():
    link = Link(latency=2e-6, bandwidth=1e9)
    ranks = np.array([1.0, 2.0, 3.0, 8.0])
    np.testing.assert_allclose(link.allreduce(ranks, 0), [0, 2e-6, 4e-6, 6e-6])
    # 1 MB: on 2 ranks both algorithms send it once; on 8 Rabenseifner's is faster.
    np.testing.assert_allclose(link.allreduce(ranks[[0, 1, 3]], 1e6), [0, 2e-6 + 1e-3, 12e-6 + 1.75e-3])


@given(st.floats(1e-7, 1e-3), st.floats(1e6, 1e11), st.sampled_from([2, 4, 16]))
def test_a_fitted_link_is_the_one_it_was_measured_on(latency, bandwidth, ranks):
    rounds = np.log2(ranks)
    points = [(size, rounds * (latency + size / bandwidth)) for size in (16.0, 1e8)]
    found = fit_link(ranks, *points)
    assert found.bandwidth == pytest.approx(bandwidth, rel=1e-4)
    assert found.latency == pytest.approx(latency, rel=1e-3, abs=1e-9)


def test_a_curve_goes_through_its_points_and_on_in_proportion():
    curve = Curve.through({32: 8.0, 1: 2.0, 8: 3.0})
    np.testing.assert_allclose(curve(np.array([0, 0.5, 1, 4.5, 8, 32, 320])), [0, 1, 2, 2.5, 3, 8, 80])
    np.testing.assert_allclose(curve.scaled(64, 4.0)(np.array([1, 64])), [0.5, 4])


def job(redundant=0.0, link=None, batch=2**12, curve=None, slowdown=1.0):
    return Job((Pass(3, batch, curve or Curve.through({1: 1.0}), 4e6),), redundant, link, slowdown)


def test_without_losses_the_speedup_is_ideal_up_to_the_batch():
    seconds = job().seconds([1, 2, 64, 4096, 8192])
    np.testing.assert_allclose(seconds[0] / seconds, [1, 2, 64, 4096, 4096])
    assert best(job(), 8192) == (4096, 4096)
    # If a pass takes as long for 8 sequences as for one, more ranks than B / 8 are useless.
    flat = Curve.through({1: 1.0, 8: 1.0})
    assert best(job(curve=flat), 8192) == (512, 512)


def test_the_knee_of_amdahls_law_has_half_of_the_ranks_to_gain():
    # T = c / P + r: P T^2 is minimal at P = c / r, where the efficiency relative to c is 1/2.
    c = 3 * 2**12
    one = job(redundant=c / 64)
    knee, fastest = best(one, 8192)
    assert (knee, fastest) == (64, 4096)
    assert c / one.seconds([64])[0] / 64 == pytest.approx(0.5)


def test_latency_gives_a_quickest_number_of_ranks():
    # Of the powers of two, T = 3 * 2^12 / P + 3 L log2 P is minimal where halving the work saves at most L.
    slow = Link(latency=40.0, bandwidth=1e30)
    ranks = 2 ** np.arange(13)
    quickest = ranks[np.argmin(job(link=slow).seconds(ranks))]
    assert quickest == 64  # 64 -> 128 saves 3 * 32 and costs 3 * 40; 32 -> 64 saves 3 * 64
    # 62 have ceil(4096 / 62) = 67 sequences and as many rounds: 201 + 720, within 1 % of 912; 61 have 68.
    assert best(job(link=slow), 4096)[1] == 62


def test_slower_neighbours_count_from_two_ranks_on():
    np.testing.assert_allclose(job(slowdown=1.5).seconds([1, 2]), [3 * 4096, 3 * 2048 * 1.5])


MESSAGES = {"gradient": 8e6, "product": 4e6, "loss": 16, "linearisation": 0}


def runs_of(slowdown, bandwidth, sizes=(1, 2, 4)):
    """Return runs that follow the model, with passes of 1 and 0.25 seconds per sequence."""
    made = []
    for ranks in sizes:
        slow = slowdown if ranks > 1 else 1.0
        size = 1 * 8e6 + 6 * 4e6 + 3 * 16
        rounds = np.array([float(ranks)])
        spans = {
            "forward": slow * 320 / ranks * 0.25,
            "gradient": slow * 320 / ranks * 0.75,
            "line search": slow * 3 * 320 / ranks * 0.25,
            "products": slow * 6 * 32 / ranks,
            "linearise": slow * 32 / ranks * 0.25,
            "optimizer": 7.0,
            "allreduce": float(Link(0.0, bandwidth).allreduce(rounds, size)[0]),
        }
        made.append(measured(ranks, spans))
    return made


def test_a_fitted_job_predicts_the_run_it_was_not_shown():
    *few, four = runs_of(1.1, 2e6)
    found = fit(few, MESSAGES)
    assert found.link.bandwidth == pytest.approx(2e6)
    assert found.seconds([4])[0] == pytest.approx(four.step_seconds)
    assert found.redundant == pytest.approx(7.0)
    # With the shapes of a benchmark in any unit, the slowdown is identified.
    line = Curve.through({1: 10.0, 320: 3200.0})
    shapes = dict.fromkeys(MESSAGES, line)
    found = fit(few, MESSAGES, Link(0.0, 2e6), shapes)
    assert found.slowdown == pytest.approx(1.1)
    assert found.seconds([4])[0] == pytest.approx(four.step_seconds)
    assert fit(few[:1], MESSAGES).link is None


@pytest.mark.parametrize(("factor", "said"), [(1.0, False), (1.2, False), (10.0, True), (0.5, True)])
def test_predictions_whose_check_fails_are_doubted(factor, said):
    """A run on a loaded machine takes ten times as long: the check is 90 % off."""
    *few, last = runs_of(1.1, 2e6)
    spans = {name: factor * seconds for name, seconds in last.mean_spans.items()}
    lines = _model(predict([*few, measured(last.ranks, spans)], MESSAGES))
    assert lines[-1].startswith("Note: a check has an error of more than 30 %") == said


# The command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return runs on one rank, and simulated runs on two that halve nothing."""
    base = tmp_path_factory.mktemp("speedup")
    data = write_corpus(base / "data.h5")
    train(base / "one", data, max_steps=4)
    shutil.copytree(base / "one", base / "two")
    change(base / "two", lambda timing: timing["ranks"].append(timing["ranks"][0]))
    train(base / "other", data, max_steps=4, seed=1)
    train(base / "shorter", data, max_steps=3)
    train(base / "first", data, max_steps=1)
    return base


def change(folder, edit):
    path = folder / "timing.json"
    timing = json.loads(path.read_text())
    edit(timing)
    path.write_text(json.dumps(timing))


def invoke(*words):
    return CliRunner().invoke(cli, ["speedup", *map(str, words)])


def test_the_object_of_the_command(folders):
    result = invoke(folders / "two", folders / "one", folders / "one", "--json")
    assert result.exit_code == 0, result.output
    one, two = json.loads(result.output)["runs"]
    assert {"ranks", "seconds_per_step", "speedup", "predicted", "limit", "spans"} <= one.keys()
    assert (one["ranks"], two["ranks"], one["repeats"], two["repeats"]) == (1, 2, 2, 1)
    assert one["steps"] == 3
    assert one["seconds_per_step"] == pytest.approx(sum(one["spans"][0].values()))
    assert two["efficiency"] == pytest.approx(0.5)
    assert two["predicted"] == 2
    assert sum(two["loss"].values()) == pytest.approx(0.5)
    assert one["outside"][0]["evaluate"] > 0


def test_uneven_shares_are_told_from_waiting(folders, tmp_path):
    # A third rank: one rank has 4 and 2 of the 10 and 4 sequences, not 10/3 and 4/3.
    shutil.copytree(folders / "two", tmp_path / "three")
    change(tmp_path / "three", lambda timing: timing["ranks"].append(timing["ranks"][0]))
    one, three = json.loads(invoke(folders / "one", tmp_path / "three", "--json").output)["runs"]
    spans, step = one["spans"][0], three["seconds_per_step"]
    on_gradient = sum(spans[name] for name in ("forward", "gradient", "line search"))
    on_curvature = spans["products"]  # linearised by the gradient
    with_input = 1 + spans["input"] / (on_gradient + on_curvature)
    longer = with_input * (on_gradient * (4 - 10 / 3) / 10 + on_curvature * (2 - 4 / 3) / 4)
    assert three["loss"]["uneven shares"] == pytest.approx(longer / step)
    assert three["predicted"] < 3
    assert sum(three["loss"].values()) == pytest.approx(1 - 1 / 3)


def test_what_the_terminal_and_the_figure_show(folders, tmp_path):
    result = invoke(folders / "one", folders / "two", "--latency", "2us", "--bandwidth", "10GB/s")
    assert result.exit_code == 0, result.output
    for words in ("efficiency", "slower passes", "line search", "16,384", "knee", "Check: 2 ranks from 1"):
        assert words in result.output
    assert "latency 2 us, bandwidth 10 GB/s" in result.output
    alone = invoke(folders / "two")
    assert "There is no run on 1 rank" in alone.output
    pytest.importorskip("matplotlib")
    for name, start in ("a.png", b"\x89PNG"), ("a.svg", b"<?xml"):
        result = invoke(folders / "one", folders / "two", "--model", "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("one", "other"), "not the same job: seed is 0 and 1"),
        (("one", "shorter"), "the measured steps are 2 to 4 and 2 to 3"),
        (("first",), "too few steps"),
        (("absent",), "absent"),
        (("one", "--latency", "2us"), "needs both --latency and --bandwidth"),
        (("one", "--bench", "none.json"), "none.json"),
    ],
)
def test_what_is_refused(folders, words, sentence, monkeypatch):
    monkeypatch.chdir(folders)
    result = invoke(*words)
    assert isinstance(result.exception, UserError)
    assert sentence in str(result.exception)


def test_other_data_threads_and_damage_are_refused(folders, tmp_path):
    def made(name, edit):
        shutil.copytree(folders / "one", tmp_path / name)
        change(tmp_path / name, edit)
        return [folders / "one", tmp_path / name]

    with pytest.raises(UserError, match="threads of a rank are 1 and 2"):
        read_runs(made("threads", lambda timing: timing["ranks"][0].update(threads=2)))
    with pytest.raises(UserError, match="damaged, or was written by an older version"):
        read_runs(made("old", lambda timing: timing.pop("timed_steps")))
    with pytest.raises(UserError, match="damaged, or was written by an older version"):
        read_runs(made("hostile", lambda timing: timing["ranks"][0]["step_spans"].update(forward=-1)))
    idle = {"optimizer": 1.0}
    with pytest.raises(UserError, match="have no gradients"):
        read_runs(made("idle", lambda timing: timing["ranks"][0].update(step_spans=idle)))
    train(tmp_path / "data", write_other(tmp_path / "other.h5"), max_steps=4)
    with pytest.raises(UserError, match="not the same job: they have different data"):
        read_runs([folders / "one", tmp_path / "data"])


def write_other(path):
    from small import text

    from hfmpi.data.prepare import prepare

    prepare(text()[::-1])[0].write(path)
    return path


def test_benchmarks_are_read(folders, tmp_path):
    run, _ = read_runs([folders / "one"])
    row = {"model": "mlstm", "ranks": 1, "threads": 1, "seconds_least": 2.0}
    rows = [row | {"pass": "loss", "batch": 1}]
    rows += [
        row | {"pass": "loss", "batch": 4, "ranks": 2},
        row | {"pass": "loss", "batch": 4, "model": "rnn"},
        row | {"pass": "loss", "batch": 4, "hidden": 9},
        row | {"pass": "loss", "batch": 8, "hidden": 8, "seconds_least": 3.0},
    ]
    rows += [row | {"pass": "loss", "batch": None, "bytes": 8, "ranks": 2, "seconds_least": 1e-6}]
    rows += [
        row | {"pass": "product", "batch": None, "bytes": 1_000_008, "ranks": 2, "seconds_least": 1e-3 + 1e-6}
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"machine": {}, "rows": rows}))
    shapes, link = read_bench([tmp_path / "bench.json"], run)
    assert shapes["loss"] == shapes["linearisation"] == Curve((1, 8), (2.0, 3.0))
    assert link.bandwidth == pytest.approx(1e9)
    (tmp_path / "none.json").write_text(json.dumps({"rows": [row | {"model": "rnn"}]}))
    with pytest.raises(UserError, match="no --bench file has a row of mlstm of 8 units"):
        read_bench([tmp_path / "none.json"], run)
    (tmp_path / "bad.json").write_text('{"rows": [{"ranks": "two"}]}')
    with pytest.raises(UserError, match="is not an output of hfmpi bench"):
        read_bench([tmp_path / "bad.json"], run)


def test_the_sweep_makes_runs_that_can_be_compared(tmp_path):
    launcher = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if launcher is None:
        pytest.skip("there is no mpirun")
    sweep = Path(__file__).parents[1] / "bin" / "sweep"
    path = f"{Path(launcher).parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(*words):
        command = [sweep, *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=90, env=os.environ | {"PATH": path}
        )

    data, out = write_corpus(tmp_path / "data.h5"), tmp_path / "runs"
    assert run(data, out).returncode == 2
    assert "--max-steps" in run(data, out, "--ranks", "1 2").stderr
    assert run(data, out, "--ranks", "two", "--max-steps", 3).returncode == 2
    small = (
        "--backend",
        "numpy",
        "--optimizer",
        "shf",
        "--hidden",
        4,
        "--gradient-batch",
        8,
        "--curvature-batch",
        4,
    )
    words = (data, out, "--ranks", "1 2", *small, "--sequence-length", 20, "--max-steps", 3)
    done = run(*words)
    assert done.returncode == 0, done.stderr
    result = invoke(*sorted(out.iterdir()), "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)["runs"]
    assert [row["ranks"] for row in rows] == [1, 2]
    assert [row["predicted"] for row in rows] == [1, 2]
    assert len(rows[1]["spans"]) == 2
    again = run(*words)
    assert (again.returncode, again.stdout) == (0, "")  # the runs are finished
    (out / "2-1" / "DONE").unlink()
    assert "2-1 was not finished" in run(*words).stderr


def test_plot_shows_the_internals(folders, tmp_path):
    words = ["plot", str(folders / "one"), str(folders / "other")]
    result = CliRunner().invoke(cli, [*words, "--internals"])
    assert result.exit_code == 0, result.output
    assert all(key in result.output for key in ("damping", "rho", "cg_steps", "line_search_rate"))
    assert "valid_bpc" in CliRunner().invoke(cli, words).output
    pytest.importorskip("matplotlib")
    assert CliRunner().invoke(cli, [*words, "--internals", "--out", str(tmp_path / "a.svg")]).exit_code == 0
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()


def test_plot_says_that_runs_have_different_data(folders, tmp_path):
    train(tmp_path / "data", write_other(tmp_path / "other.h5"), max_steps=2)
    one, words = folders / "one", ["plot", folders / "one", folders / "other", tmp_path / "data"]
    found = CliRunner().invoke(cli, list(map(str, words)))
    assert f"Note: {one} and {tmp_path / 'data'} were trained on different data.\n" in found.output
    (tmp_path / "data" / "checkpoint.h5").unlink()  # its data are unknown
    assert "Note" not in CliRunner().invoke(cli, list(map(str, words))).output


@pytest.mark.parametrize("name", [r"x$\foo$", os.fsdecode(b"caf\xe9"), "_run"])
def test_a_run_of_any_name_is_drawn(name, folders, tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copytree(folders / "one", tmp_path / name)
    for more in [], ["--internals"]:
        words = ["plot", str(tmp_path / name), *more, "--out", str(tmp_path / "a.svg")]
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.exception


def test_small_charts():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7.0]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, None, 100.0, 10.0], log=True) == "▁ █▅"
    assert sparkline([5.0] * 4) == "▁▁▁▁"
    assert sparkline([0.0, 2.0, 8.0, 6.0], width=2) == "▁█"
    assert sparkline([None]) == " "
    assert bar(1, 4, 8) == "██······"
    assert aligned([["a", "bb"], ["ccc", "d"]]) == ["  a  bb", "ccc   d"]


@pytest.mark.parametrize(("optimizer", "settings"), [
    ("shf", {}), ("shf", {"preconditioner": "none"}), ("sgd", {}), ("subspace", {"memory": 1}),
    ("subspace", {"candidates": 3, "kfac_dampings": 2, "memory": 0}),
    ("subspace", {"directions": "rms", "memory": 1}),
    ("subspace", {"directions": "kfac+rows", "segments": 2, "memory": 0, "row_steps": 7}),
    ("subspace", {"directions": "rows", "memory": 1}),
    ("soap", {"refresh": 1}), ("soap", {"longest_side": 1}), ("muon", {}), ("soap-muon", {}),
])  # fmt: skip
def test_the_messages_are_those_that_a_run_sends(optimizer, settings, tmp_path, monkeypatch):
    sent, summing = Counter(), Communicator.sum

    def recorded(comm, vector):
        sent[vector.nbytes] += 1
        summing(comm, vector)

    def spread(risk, works, sizes, wide=False, name=""):
        sent[(8 if wide else 4) * (sum(sizes) + 1)] += 1  # one rank sends no message for these results
        return spreading(risk, works, sizes, wide, name)

    spreading = Risk.spread
    monkeypatch.setattr(Communicator, "sum", recorded)
    monkeypatch.setattr(Risk, "spread", spread)
    # Messages before the second step are not timed. Between steps are the losses of three evaluations, and
    # scalars that report whether a rank wants to stop.
    recorder = Recorder(lambda record: record["step"] == 1 and sent.clear())
    data, options = write_corpus(tmp_path / "data.h5"), {"dtype": "float32", "max_steps": 4}
    train(tmp_path / "run", data, reporter=recorder, optimizer=optimizer, settings=settings, **options)
    run, _ = read_runs([tmp_path / "run"])
    expected, counts, sizes = Counter(), run.steps.counts, run.messages
    for name, kind in KINDS.items():
        count, size = kind.count(counts), sizes[name]
        if name == "sketch" and count:  # one message after all adjoints of a step
            count, size = counts.gradients, round(size * count / counts.gradients)
        expected[size] += count
    expected[16] += 3
    del expected[0], sent[8]
    assert expected == sent
    rows = "rows" in settings.get("directions", "")
    assert rows == (counts.row_products > counts.steps) == (run.steps.mean_spans.get("rows", 0.0) > 0)


def test_the_message_of_a_loss_is_two_numbers():
    run = TimedRun(Path("run"), Config(), "mlstm", {}, 1, "CPU", 100, 4, 1, 2, measured(1, ALONE), ())
    assert run.messages["loss"] == 16


def test_a_method_whose_matrices_the_model_does_not_know_is_compared_but_not_predicted():
    runs = [measured(1, ALONE), measured(2, ALONE)]
    job = TimedRun(Path("run"), Config(optimizer="lm"), "mlstm", {}, 1, "CPU", 100, 4, 1, 2, runs[0], ())
    assert len(study(job, runs)["runs"]) == 2
    with pytest.raises(
        UserError, match=r"^no prediction is possible for lm: the scaling model does not include"
    ):
        study(job, runs, model=True)


def test_each_matrix_is_the_work_of_one_rank():
    """Five works of 3, 3, 2, 2 and 2 s: 12 s on one rank, 7 s on two, the largest first, and 3 s on five."""
    works = {f"matrix {i}": seconds for i, seconds in enumerate([2.0, 3.0, 2.0, 3.0, 2.0])}
    one = measured(1, {"gradient": 8.0, "optimizer": 0.5, **works})
    assert (one.parts["redundant"], one.most_redundant) == (12.5, 0.5)
    job = fit([one], {}, Link(0.0, 1e9))
    np.testing.assert_allclose(job.alone(np.array([1, 2, 3, 5, 64])), [12.5, 7.5, 5.5, 3.5, 3.5])
    np.testing.assert_allclose(job.seconds([1, 2]), [20.5, 4 + 7.5])
    first, second = ({name: s for name, s in works.items() if int(name[-1]) % 2 == i} for i in (0, 1))
    spans = [{"gradient": 4.0, "optimizer": 0.5, **first}, {"gradient": 4.0, "optimizer": 0.5, **second}]
    two = replace(measured(2, spans[0]), spans=tuple(spans))
    (group,) = two.matrices
    assert sorted(group) == [2.0, 2.0, 2.0, 3.0, 3.0]
    assert two.most_redundant == 0.5


def test_groups_of_works_follow_one_another():
    """1 s of each group remains if every work has a rank, although no rank has both of them."""
    works = {"matrix 0": 1.0, "matrix 1": 0.5, "matrix of directions 0": 1.0, "matrix of directions 1": 1.0}
    one = measured(1, {"gradient": 8.0, **works})
    assert one.matrices == ((1.0, 0.5), (1.0, 1.0))
    np.testing.assert_allclose(fit([one], {}, Link(0.0, 1e9)).alone(np.array([1, 2, 9])), [3.5, 2.0, 2.0])


def test_products_with_rows_are_shared_and_cost_no_forward_pass():
    counts = Counts(steps=2, gradients=2, adjoints=4, row_products=100)
    one = measured(1, {"gradient": 6.0, "rows": 10.0, "optimizer": 0.5}, counts=counts)
    two = measured(2, {"gradient": 3.0, "rows": 5.0, "optimizer": 0.5, "allreduce": 5.2}, counts=counts)
    messages = {"gradient": 4e6, "row product": 2e6}
    alone = fit([one], messages, Link(0.0, 2e7))  # 0.2 s and 50 times 0.1 s
    np.testing.assert_allclose(alone.compute(np.array([1, 2, 200, 400])), [16, 8, 2 * 0.05, 0.05])
    assert alone.seconds([2])[0] == pytest.approx(two.step_seconds)
    assert alone.redundant == pytest.approx(0.5)
    row = compare(one, two)
    assert row["loss"]["allreduce"] == pytest.approx(5.2 / two.step_seconds)
    assert row["loss"]["slower passes"] == row["loss"]["other work"] == pytest.approx(0)
    config = Config(optimizer="subspace", settings={"directions": "kfac+rows"})
    job = TimedRun(Path("run"), config, "mlstm", {}, 1, "CPU", 100, 4, 1, 2, one, (Block("W", 0, 10, 10),))
    assert len(study(job, [one, two], model=True)["model"]["check"]) == 1
    assert (job.messages["row product"], job.messages["gradient"]) == (4 * 101, 4 * (100 + 201 + 4 + 1 + 2))


def test_what_the_largest_matrix_takes_stays_and_is_no_slowdown():
    passes = {"forward": 2.0, "gradient": 2.0}
    base = measured(1, passes | {"optimizer": 1.0})
    half = {name: value / 2 for name, value in passes.items()}
    # One rank has 0.7 of the 0.9 seconds for matrices.
    two = measured(2, half | {"optimizer": 0.8, "waiting": 0.0}, half | {"optimizer": 0.3, "waiting": 0.5})
    found = fit([base, two], {"gradient": 0, "matrices": 0})
    assert found.slowdown == pytest.approx(1.0)
    np.testing.assert_allclose(found.seconds([2, 4]), [2.8, 1.8])
    # Their results need one message per step.
    alone = fit([base], {"gradient": 0, "matrices": 4e6}, Link(1.0, 1e6))
    np.testing.assert_allclose(alone.allreduce(np.array([1.0, 2.0])), [0.0, 5.0])
