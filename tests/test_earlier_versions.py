"""Files of version 0.1.0 can be read, and its runs resume with the results of that version."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small import Recorder, history, same, train, write_corpus

from hfmpi.cli.main import cli
from hfmpi.data.corpus import Corpus
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.files.run_folder import find_checkpoint
from hfmpi.parallel.communicator import Communicator, MPICommunicator
from hfmpi.parallel.placement import Placement
from hfmpi.runs.merge import merge
from hfmpi.runs.session import Session
from hfmpi.runs.stop import StopSignals
from hfmpi.runs.text_task import TextTask
from hfmpi.runs.train import Run

WRITTEN = Path(__file__).parent / "written_by_0.1.0"
DATA = WRITTEN / "corpus.h5"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
RUNS = EXPECTED["runs"]


def invoke(*words):
    result = CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def close(name, value):
    """Return a value with a tolerance for different processors; the run of `adam` is in single precision."""
    return pytest.approx(value, rel=1e-4 if name == "mlstm-adam" else 1e-9)


def test_the_corpus_is_read():
    corpus, expected = Corpus.read(DATA), EXPECTED["corpus"]
    assert corpus.digest == expected["digest"]
    assert corpus.symbols == expected["symbols"].encode()
    assert corpus.provenance == expected["provenance"]
    assert (len(corpus.train), len(corpus.valid)) == (2200, 300)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_read(name):
    run, expected = WRITTEN / name, RUNS[name]
    found = json.loads(invoke("evaluate", run, "--data", DATA, "--backend", "numpy", "--json"))
    assert found == {"run": str(run), "split": "valid", "best": False} | expected["evaluate"] | {
        "valid_bpc": close(name, expected["evaluate"]["valid_bpc"]),
        "corpus": EXPECTED["corpus"]["digest"],
    }
    assert invoke("sample", run, "--length", 40, "--prime", "in the", "--seed", 1) == expected["sample"]
    assert invoke("plot", run) == expected["plot"]
    study = json.loads(invoke("speedup", run, "--json"))
    assert (study["job"]["first_step"], study["job"]["last_step"]) == (2, 3)
    assert checkpoint.load(run / checkpoint.PREVIOUS).meta["step"] == 2


def go_on(name, folder, comm):
    """Take two more steps from a copy of a run, as `hfmpi train --max-steps 5` does."""
    place = Placement("here", comm.rank, comm.size, comm.local_rank, comm.local_size, 1, 1, 2**30)
    found = find_checkpoint(folder, "auto")
    task = TextTask.read(merge({"max_steps": 5}, found.meta["config"]), DATA, comm.local_rank)
    run = Run(folder, task, Session(comm, place, Recorder(), StopSignals()), found)
    result = run.train()
    assert (run.first_step, result.step, result.done) == (3, 5, True)


def check(name, folder, ranks):
    """Compare a resumed run with the records that version 0.1.0 wrote.

    It linearised with a pass of its own, which the gradient's now brings.
    """
    before = (WRITTEN / name / "history.jsonl").read_text().splitlines()
    lines = (folder / "history.jsonl").read_text().splitlines()
    assert lines[:3] == before
    config, saved = checkpoint.latest(folder).meta["config"], 0
    batch = config["curvature_batch"] or 0
    own = config["settings"].get("structural_damping", 0) > 0  # it linearises a different network
    for line, expected in zip(lines[3:], RUNS[name]["resumed"], strict=True):
        record = json.loads(line)
        assert list(record) == list(expected)
        less = 0 if own else expected["linearisations"]
        saved += less
        expected = {**expected, "linearisations": expected["linearisations"] - less}
        expected["P_I_full"] -= saved
        expected["P_D_full"] -= saved * batch
        for key, value in expected.items():
            if key in ("seconds", "step_seconds") or (key == "P_P" and ranks > 1):
                continue
            assert record[key] == (close(name, value) if isinstance(value, float) else value), key
    assert checkpoint.latest(folder).meta["ranks"] == ranks


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on(name, tmp_path):
    folder = Path(shutil.copytree(WRITTEN / name, tmp_path / name))
    go_on(name, folder, Communicator())
    check(name, folder, ranks=1)


@pytest.mark.mpi(ranks=2, timeout=60, unit="s")
def test_a_run_goes_on_on_two_ranks(mpi_ranks, comm, mpi_tmp_path):
    assert comm.size == mpi_ranks
    communicator = MPICommunicator(comm)
    for name in RUNS:
        folder = mpi_tmp_path / name
        if comm.rank == 0:
            shutil.copytree(WRITTEN / name, folder)
        comm.Barrier()
        go_on(name, folder, communicator)
        if comm.rank == 0:
            check(name, folder, ranks=2)
    communicator.close()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_subspace_run_of_version_0_2_goes_on(dtype, tmp_path):
    """Its state also has SOAP's means, empty without SOAP's direction, and its counts have columns."""
    data, options = write_corpus(tmp_path / "data.h5"), {"optimizer": "subspace", "dtype": dtype}
    whole, _ = train(tmp_path / "whole", data, max_steps=6, **options)
    folder = tmp_path / "old"
    train(folder, data, max_steps=3, **options)
    saved = checkpoint.latest(folder)
    meta = saved.meta | {"counts": saved.meta["counts"] | {"columns": 0}}
    refused = saved.state | {"soap": np.ones(3, dtype)}
    checkpoint.save(folder / checkpoint.NEWEST, saved.theta, refused, meta)
    with pytest.raises(UserError, match=r"^the checkpoint was not written by optimizer subspace$"):
        train(folder, data, max_steps=6, **options)
    checkpoint.save(folder / checkpoint.NEWEST, saved.theta, saved.state | {"soap": np.zeros(0, dtype)}, meta)
    run, result = train(folder, data, max_steps=6, **options)
    assert (run.first_step, result.step) == (3, 6)
    same(run, whole)
    assert history(folder) == history(whole.folder)


def test_a_run_with_options_that_are_unknown_is_refused(tmp_path):
    folder = Path(shutil.copytree(WRITTEN / "rnn-sgd", tmp_path / "run"))
    saved = checkpoint.latest(folder)
    config = saved.meta["config"] | {"flavour": "sweet"}
    checkpoint.save(folder / checkpoint.NEWEST, saved.theta, saved.state, saved.meta | {"config": config})
    before = (folder / "history.jsonl").read_text()
    for words in ("train", DATA, "--out", folder), ("evaluate", folder), ("sample", folder):
        result = CliRunner().invoke(cli, list(map(str, words)))
        assert isinstance(result.exception, UserError)
        assert str(result.exception).startswith("unknown option 'flavour'; the options are ")
        assert "\n" not in str(result.exception)
    assert (folder / "history.jsonl").read_text() == before


def test_counts_of_version_0_2_lack_linear_algebra(tmp_path):
    data, options = write_corpus(tmp_path / "data.h5"), {"optimizer": "subspace"}
    whole, _ = train(tmp_path / "whole", data, max_steps=5, **options)
    folder = tmp_path / "old"
    train(folder, data, max_steps=3, **options)
    saved = checkpoint.latest(folder)
    old = {n: v for n, v in saved.meta["counts"].items() if n not in ("adjoints", "operations", "depth")}
    meta = {name: value for name, value in saved.meta.items() if name != "unit"} | {"counts": old}
    checkpoint.save(folder / checkpoint.NEWEST, saved.theta, saved.state, meta)
    run, _ = train(folder, data, max_steps=5, **options)
    resumed, counts = run.progress.counts, whole.progress.counts
    since = sum(record["operations"] for record in history(folder)[3:])
    assert resumed == replace(counts, operations=since, depth=resumed.depth)
    assert 0 < since < counts.operations
    np.testing.assert_array_equal(run.theta, whole.theta)
