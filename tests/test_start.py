"""New runs that start from an existing run: what continues, what restarts, and what the history reports."""

import json
import math
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from small import history, text, write_corpus
from test_cli import content, outside
from threadpoolctl import threadpool_limits

from hfmpi.cli.main import cli
from hfmpi.data.prepare import prepare
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.optim.presets import preset
from hfmpi.runs.choice import preferred
from hfmpi.runs.config import Config

TINY = "--hidden 6 --sequence-length 20 --gradient-batch 9 --backend numpy --evaluate-every 1"


def run(*words):
    """Run hfmpi train in the working folder; return its output."""
    with np.errstate(), threadpool_limits(limits=None, user_api="blas"):
        done = CliRunner().invoke(cli, ["train", *" ".join(words).split()])
    if done.exception:
        raise done.exception
    return done.output


@pytest.fixture(scope="module", name="made")
def fixture_made(tmp_path_factory):
    """Create a folder with a corpus and runs of two steps, with shf and with adam."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "small.h5")
    prepare(text()[::-1])[0].write(folder / "other.h5")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("small.h5 --out old --max-steps 2 --optimizer shf --curvature-batch 4", TINY)
        run("small.h5 --out adam --max-steps 2 --optimizer adam", TINY)
    return folder


@pytest.fixture(name="here")
def fixture_here(made, tmp_path, monkeypatch):
    """Copy it to the current folder; the runs in it must not change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = content(tmp_path / "old")
    yield tmp_path
    assert content(tmp_path / "old") == before


def theta(folder):
    return checkpoint.latest(folder).theta


def last(folder):
    return history(folder)[-1]


@pytest.mark.parametrize("changes", [
    "--set cg_max_steps=3",
    "--optimizer adam --set rate=0.01",
    "--gradient-batch 30 --curvature-batch 5 --sequence-length 10",
])  # fmt: skip
def test_a_new_run_goes_on_bit_for_bit_with_the_same_command(changes, here):
    words = "small.h5 --resume old", changes
    run(*words, "--out whole --max-steps 5")
    run(*words, "--out new --max-steps 3")
    run(*words, "--out new --max-steps 4")  # resumes the new run, and does not start it again
    run("small.h5 --out new --max-steps 5")
    assert history(here / "new") == history(here / "whole")
    np.testing.assert_array_equal(theta(here / "new"), theta(here / "whole"))
    records = history(here / "new")
    assert [record["step"] for record in records] == [3, 4, 5]
    # The first step is taken from the old run's parameters: its loss is close to the last loss.
    assert records[0]["train_bpc"] == pytest.approx(last(here / "old")["valid_bpc"], abs=0.1)
    assert (here / "new" / "config.toml").read_bytes() == (here / "whole" / "config.toml").read_bytes()


def test_the_costs_go_on_whatever_the_batches_are(here):
    run("small.h5 --resume old --out one --gradient-batch 30 --curvature-batch 5 --max-steps 3")
    run("small.h5 --resume one --out two --optimizer sgd --max-steps 5")
    run("small.h5 --resume two --out three --set rate=0.5 --max-steps 6")
    records = [record for name in ("old", "one", "two", "three") for record in history(here / name)]
    batches = [(9, 4)] * 2 + [(30, 5)] + [(32, 0)] * 3
    totals = np.zeros(4, int)
    for record, (gradient, curvature) in zip(records, batches, strict=True):
        cg = record["cg_steps"]
        on_batch = record["losses"] + 3 * record["gradients"]
        on_curvature = record["linearisations"] + 4 * record["products"]
        totals += (
            3 + 4 * cg,
            3 * gradient + 4 * cg * curvature,
            on_batch + on_curvature,
            on_batch * gradient + on_curvature * curvature,
        )
        assert [record[key] for key in ("P_I", "P_D", "P_I_full", "P_D_full")] == totals.tolist()
        assert record["P_P"] == record["P_D"]  # one rank
    meta = checkpoint.latest(here / "three").meta
    assert [part["gradient_batch"] for part in meta["before"]] == [9, 30]
    assert meta["counts"]["steps"] == 3  # of sgd: its batches continue with a different rate
    assert meta["origin"] == str((here / "two").resolve())


def test_with_the_same_options_it_is_the_run_that_goes_on(here):
    run("small.h5 --resume old --out new --max-steps 4")
    shutil.copytree(here / "old", here / "copy")
    run("small.h5 --out copy --max-steps 4")
    np.testing.assert_array_equal(theta(here / "new"), theta(here / "copy"))
    assert history(here / "new") == history(here / "copy")[2:]


def test_the_state_of_an_optimizer_of_the_same_kind_goes_on(here):
    old = checkpoint.latest(here / "old").state
    assert "is not used" not in run("small.h5 --resume old --out new --max-steps 3 --set cg_max_steps=3")
    assert last(here / "new")["damping"] == old["damping"] < 0.1
    run(
        "small.h5 --resume old --out bhf --optimizer bhf --gradient-batch 9 --curvature-batch 4 --max-steps 3"
    )
    assert last(here / "bhf")["damping"] == old["damping"]  # not the 45 of a new bhf
    run("small.h5 --resume old --out given --max-steps 3 --set damping=7")
    assert last(here / "given")["damping"] == 7


def test_another_optimizer_starts_anew_and_it_is_said(here):
    said = run("small.h5 --resume old --out new --optimizer adam --max-steps 3")
    why = "that run was trained with shf, and this run uses adam"
    note = f"Note: the optimizer's state of old is not used: {why}.\n"
    assert note in said
    found = checkpoint.latest(here / "new")
    assert found.state["updates"] == 1
    assert found.meta["config"]["settings"] == {}
    assert found.meta["config"]["gradient_batch"] == 0  # the preset's value
    assert found.meta["config"]["hidden"] == 6
    assert note not in run("small.h5 --resume old --out new --optimizer adam --max-steps 4")
    back = "--out back --optimizer shf --set damping=3 --gradient-batch 9 --curvature-batch 4"
    run("small.h5 --resume adam --max-steps 3", back)
    assert last(here / "back")["damping"] == 3


def test_a_state_of_another_form_starts_anew_and_it_is_said(here):
    said = run("small.h5 --resume adam --out new --max-steps 3 --set averaging=0.9")
    assert 'of adam is not used: the entry "average" of the checkpoint does not fit optimizer adam.\n' in said
    found = checkpoint.latest(here / "new")
    assert found.state["updates"] == 1
    state = found.state | {"average": found.theta[:3]}
    checkpoint.save(here / "new" / checkpoint.NEWEST, found.theta, state, found.meta)
    way_out = "use a different --out, and --resume new to start from its parameters"
    with pytest.raises(UserError, match=f"so that the run cannot continue: {way_out}"):
        run("small.h5 --out new --max-steps 9")
    np.testing.assert_allclose(found.state["average"], found.theta, rtol=1e-5)  # of the iterates from here on


def test_a_new_optimizer_starts_from_the_parameters_that_were_evaluated(here):
    run("small.h5 --resume adam --out mean --max-steps 4 --set averaging=0.9")
    found = checkpoint.latest(here / "mean")
    assert not np.array_equal(found.state["average"], found.theta)
    loss = last(here / "mean")["valid_bpc"]  # of the mean
    for options in ("--optimizer sgd --set rate=1e-30 floor=0", "--set averaging=0 --set rate=1e-30"):
        name = f"new{len(options)}"
        said = run(
            "small.h5 --resume mean --max-steps 5 --out", name, options.replace(" floor", " --set floor")
        )
        assert "the optimizer's state of mean is not used" in said
        np.testing.assert_array_equal(theta(here / name), found.state["average"])
        assert last(here / name)["valid_bpc"] == pytest.approx(loss, rel=1e-6)


def test_the_subspace_step_does_not_judge_the_last_step_by_other_data(here):
    options = "--optimizer subspace --gradient-batch 210 --curvature-batch 8"
    run("small.h5 --resume old --out sub --max-steps 3", options)
    assert checkpoint.latest(here / "sub").state["descent"] > 0
    said = run("other.h5 --resume sub --out new --max-steps 5")
    assert "Note: sub was trained on different data than other.h5.\n" in said
    assert [record["rho"] is None for record in history(here / "new")] == [True, False]
    run("small.h5 --resume sub --out same --max-steps 4")
    assert last(here / "same")["rho"] is not None


def test_a_limit_replaces_those_of_the_other_run(here):
    found = checkpoint.latest(here / "adam")
    meta = found.meta | {"config": found.meta["config"] | {"max_seconds": 1e-9}}
    (here / "timed").mkdir()
    checkpoint.save(here / "timed" / checkpoint.NEWEST, found.theta, found.state, meta)
    run("small.h5 --resume timed --out new --max-steps 4")
    assert last(here / "new")["step"] == 4
    assert checkpoint.latest(here / "new").meta["config"]["max_seconds"] == 0


@pytest.mark.parametrize(("words", "sentence"), [
    ("--model lstm", "the run to start from has model = 'mlstm', not 'lstm': its network cannot be changed"),
    ("--layers 2", "has layers = 1, not 2"),
    ("--variant krause", "has variant = 'standard', not 'krause'"),
    ("--dtype float64", "has dtype = 'float32', not 'float64'"),
    ("--hidden 7", "the checkpoint contains a model of"),
    ("--max-steps 2", "old already has 2 steps, and --max-steps counts from its first start: use a value "
     "larger than that, not 2"),
    ("", "old already has 2 steps"),
    ("--max-steps 9 --max-seconds 1e-9", "and --max-seconds counts from its first start"),
    ("--optimizer sgd --set damping=1", "optimizer sgd has no setting 'damping'"),
    ("--optimizer adam --curvature-batch 4", "optimizer adam has no curvature batch"),
    ("--max-steps 3 --resume adam --out old", "old already contains a run"),
])  # fmt: skip
def test_what_cannot_start(words, sentence, here):
    before = content(here)
    with pytest.raises(UserError, match=sentence):
        run("small.h5 --resume old --out new", words)
    assert content(here) == before


def test_a_checkpoint_whose_past_is_none(here):
    run("small.h5 --resume old --out new --optimizer sgd --max-steps 3")
    path = here / "new" / checkpoint.NEWEST
    found = checkpoint.load(path)
    part = found.meta["before"][0]
    other = "the checkpoint does not describe a run of this version"
    numbers = "invalid checkpoint: its step, seconds and counts must be non-negative"
    for wrong, sentence in (
        ({"before": 3}, other),
        ({"before": [3]}, other),
        ({"before": [part | {"gradient_batch": -1}]}, numbers),
        ({"origin": 3}, 'invalid checkpoint: "origin" must be a string'),
        ({"before": [part | {"counts": {"naps": 1}}]}, other),
        ({"before": [part | {"counts": {"steps": 0.5}}]}, numbers),
        ({"before": [part | {"unit": [100, 0]}]}, numbers),
        ({"before": [part | {"counts": {"operations": 2**100}}]}, numbers),
        ({"unit": [0, 1]}, numbers),
        ({"unit": [2**100, 1]}, numbers),
        ({"unit": "ab"}, numbers),
        ({"unit": 3}, other),
        ({"unit": [1, 2, 3]}, other),
    ):
        checkpoint.save(path, found.theta, found.state, found.meta | wrong)
        with pytest.raises(UserError, match=sentence):
            run("small.h5 --out new --max-steps 4")


def test_linear_algebra_is_counted_in_passes_over_the_sequences_of_its_time(here):
    run("small.h5 --resume old --out one --optimizer muon --gradient-batch 9 --max-steps 4")
    run("small.h5 --resume one --out two --sequence-length 5 --max-steps 6")
    p_d, p_i = (last(here / "old")[key] for key in ("P_D_full", "P_I_full"))
    size = theta(here / "two").size
    for name, length in (("one", 20), ("two", 5)):
        operations, depth = (sum(r[key] for r in history(here / name)) for key in ("operations", "depth"))
        p_d += 2 * 3 * 9 + math.ceil(operations / (2 * size * length))
        p_i += 2 * 3 + math.ceil(depth / (2 * length))  # an mLSTM
        assert (last(here / name)["P_D_full"], last(here / name)["P_I_full"]) == (p_d, p_i)


def test_a_checkpoint_without_options(here):
    path = here / "bare.h5"
    found = checkpoint.latest(here / "old")
    meta = {name: value for name, value in found.meta.items() if name != "config"}
    checkpoint.save(path, found.theta, found.state, meta)
    with pytest.raises(UserError, match="it does not contain the options of a run"):
        run("small.h5 --resume bare.h5 --out new --max-steps 4")


def test_ranks_start_with_the_same_parameters(here):
    words = "small.h5 --resume old --optimizer adam --max-steps 4 --out"
    done = outside(2, here, "train", *words.split(), "two")
    assert done.returncode == 0, done
    assert done.stderr.count("is not used") == 1
    run(words, "one")
    np.testing.assert_allclose(theta(here / "two"), theta(here / "one"), rtol=1e-4, atol=1e-6)
    assert last(here / "two")["P_D"] == last(here / "one")["P_D"]


# --prefer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefer", "ranks", "memory", "name", "why"),
    [
        ("passes", 1, 2**30, "subspace-rows", "the rows of all sequences need 0.000268 GiB per rank"),
        ("passes", 2, 2**20, "subspace-rows", "the rows of all sequences need 0.000134 GiB per rank"),
        ("passes", 1, 2**20, "subspace", "subspace-rows would need 0.0"),
        ("seconds", 1, 2**30, "muon-small", "it is the fastest on 1 rank(s) according to"),
        ("seconds", 199, 2**30, "muon-small", "it is the fastest on 199 rank(s) according to"),
        ("seconds", 2000, 2**30, "subspace-whole", "it is the fastest on 2,000 rank(s) according to"),
    ],
)
def test_what_is_preferred_is_an_optimizer_for_these_ranks(prefer, ranks, memory, name, why):
    """The rows of 120 sequences, six each, of 100 numbers of 4 bytes; a quarter of the memory is for them."""
    config, note = preferred(Config(prefer=prefer), 100, 120, ranks, memory)
    assert note.startswith(f"--prefer {prefer} chooses {name}: {why}")
    chosen = config.preset()
    assert (config.optimizer, chosen.gradient_batch) == (name, min(120, preset(name).gradient_batch))
    assert chosen.curvature_batch <= chosen.gradient_batch


@pytest.mark.parametrize(
    ("model", "name"), [("mlstm", "subspace-whole"), ("lstm", "subspace"), ("gru", "subspace")]
)
@pytest.mark.parametrize(("ranks", "batch"), [(200, 3500), (1999, 3500), (2000, 14_000)])
def test_some_hundred_ranks_have_gradients_on_a_quarter_of_the_sequences(model, name, ranks, batch):
    config, note = preferred(Config(prefer="seconds", model=model), 100, 14_000, ranks, 2**30)
    assert (config.optimizer, config.gradient_batch) == (name, batch)
    assert config.curvature_batch == preset(name).curvature_batch
    assert ("a quarter of the sequences" in note) == (batch == 3500)
    config, note = preferred(Config(prefer="seconds", gradient_batch=700), 100, 14_000, ranks, 2**30)
    assert config.gradient_batch == 700
    assert "a quarter of the sequences" not in note


def test_a_run_keeps_the_optimizer_that_was_preferred(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(made / "small.h5", tmp_path)
    options = "small.h5 --out new --prefer passes --hidden 3 --sequence-length 20 --backend numpy"
    said = run(options, "--max-steps 1")
    assert "--prefer passes chooses subspace-rows: the rows of all sequences need " in said
    said = run(options, "--max-steps 2")  # a run that goes on does not choose again
    assert (last(tmp_path / "new")["step"], "chooses" in said) == (2, False)
    assert checkpoint.latest("new").meta["config"]["optimizer"] == "subspace-rows"
    with pytest.raises(UserError, match=r"^use either --prefer seconds or --optimizer soap, not both$"):
        run("small.h5 --out other --prefer seconds --optimizer soap --hidden 3")
    with pytest.raises(UserError, match=r"^prefer must be passes or seconds, not 'speed'$"):
        run("small.h5 --out other --prefer speed --hidden 3")


@pytest.mark.parametrize(("batch", "said"), [(200, "from 1,200 random rows per step\n"), (100, "")])
def test_the_first_lines_say_where_the_curvature_comes_from(batch, said, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "--optimizer subspace --gradient-batch 210 --hidden 3 --sequence-length 20 --backend numpy"
    lines = run(f"{made / 'small.h5'} --out new --max-steps 1 --curvature-batch {batch}", options)
    assert lines.count("random rows") == bool(said)
    assert said in lines


@pytest.mark.parametrize("name", ["bgd", "subspace", "muon", "lbfgs"])
def test_a_small_book_is_one_batch(name, tmp_path):
    """The preset's batches are larger than the text; a second call continues the run."""
    data, run = write_corpus(tmp_path / "small.h5"), tmp_path / "run"
    words = ["train", str(data), "--out", str(run), "--optimizer", name, "--sequence-length", "20"]
    words += ["--hidden", "5", "--backend", "numpy"]
    first = CliRunner().invoke(cli, [*words, "--max-steps", "1"])
    assert first.exit_code == 0, first.output
    chosen = preset(name)
    note = (
        f"the gradient batch is 210, all training sequences; the preset {name} has {chosen.gradient_batch:,}"
    )
    assert note in first.output
    assert ("the curvature batch is 210" in first.output) == (chosen.curvature_batch > 210)
    again = CliRunner().invoke(cli, [*words, "--max-steps", "2"])
    assert again.exit_code == 0, again.output
    assert [record["step"] for record in history(run)] == [1, 2]
    assert "all training sequences" not in again.output


@pytest.mark.parametrize("name", ["bgd", "subspace"])
def test_the_best_parameters_of_a_run_on_all_sequences_are_evaluated(name, tmp_path):
    """Its checkpoint also contains the parameters with the lowest training loss, which best.h5 does not."""
    data, run = write_corpus(tmp_path / "small.h5"), tmp_path / "run"
    words = ["train", str(data), "--out", str(run), "--optimizer", name, "--sequence-length", "20"]
    words += ["--hidden", "5", "--backend", "numpy", "--max-steps", "6", "--evaluate-every", "2"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    lowest = min(record["valid_bpc"] for record in history(run) if record["valid_bpc"] is not None)
    for keep in ["best"], ["last"], []:
        found = CliRunner().invoke(
            cli, ["evaluate", str(run), *(["--keep", *keep] if keep else []), "--json"]
        )
        assert found.exit_code == 0, found.output
        bits = json.loads(found.stdout)["valid_bpc"]
        assert keep == ["last"] or bits == pytest.approx(lowest, rel=1e-6)
