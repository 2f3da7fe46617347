"""Requests to stop a run; a run that is stopped anywhere resumes as if it had not been stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import Recorder, history, make_run, same, shared_corpus, train, write_corpus

from hfmpi.files import checkpoint
from hfmpi.objective.data_parallel import DataParallel
from hfmpi.parallel.communicator import Communicator, MPICommunicator
from hfmpi.runs.stop import StopSignals, job_end
from hfmpi.runs.train import Run

STEPS = 2
OPTIMIZERS = {
    "shf": {"optimizer": "shf", "settings": {"cg_max_steps": 5}},
    "bhf": {"optimizer": "bhf", "settings": {"damping": 0.1, "structural_damping": 0.1, "cg_max_steps": 6}},
    "sgd": {"optimizer": "sgd"},
    "adam": {"optimizer": "adam", "settings": {"rate": 0.02}},
    "soap": {"optimizer": "soap", "settings": {"averaging": 0.5}},
    "soap-muon": {"optimizer": "soap-muon"},
}


@pytest.fixture(scope="module", name="data")
def fixture_data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small.h5")


# Signals and clocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_signal_is_noted_and_handlers_come_back(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert not stop.wanted()
        os.kill(os.getpid(), number)
        assert stop.wanted()
        assert stop.requested == f"received {name}"
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wanted()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


IGNORED = "import signal; print([n.name for n in signal.Signals if signal.getsignal(n) == signal.SIG_IGN])"


def test_no_child_of_a_test_ignores_signals():
    done = subprocess.run([sys.executable, "-c", IGNORED], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "['SIGPIPE', 'SIGXFSZ']\n"  # by Python


def test_tests_reset_the_signals_that_they_inherit():
    words = [sys.executable, "-m", "pytest", f"{__file__}::test_no_child_of_a_test_ignores_signals"]
    shell = ["bash", "-c", "trap '' INT HUP TERM USR1; exec \"$@\"", "bash"]
    done = subprocess.run([*shell, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0, done.stdout


def test_first_signal_names_the_reason():
    with StopSignals(time.time() + 1) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted()
        assert stop.requested == "received SIGUSR1"


def test_second_interrupt_leaves_at_once():
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "received SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("left", "longest", "wanted"),
    [(20, 0, True), (60, 0, False), (190, 100, True), (300, 100, False), (None, 1e6, False)],
)
def test_before_the_job_ends_twice_the_longest_wait_is_left_and_half_a_minute(left, longest, wanted):
    stop = StopSignals(None if left is None else time.time() + left)
    assert stop.wanted() is (left == 20)  # the time of the start does not count
    stop._asked -= longest  # as if the run had computed for this time
    assert stop.wanted() is wanted
    assert stop.wanted() is wanted  # also after a short time
    assert stop.requested == ("the job is about to reach its time limit" if wanted else None)


def test_the_end_of_the_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert job_end() is None
    end = int(time.time()) + 1000
    for text, expected in ((str(end), end), (str(end - 2000), None), ("", None), ("N/A", None), ("-1", None)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", text)
        assert job_end() == expected


# Stopped at every single sum -------------------------------------------------------------------


class StopAt(StopSignals):
    """Requests a stop from poll number n on."""

    def __init__(self, question):
        super().__init__()
        self.question, self.asked = question, 0

    def wanted(self):
        self.asked += 1
        if self.asked == self.question:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().wanted()


def stopped_at(question, folder, data, comm=None, **options):
    """Train until that poll; return the result and the number of polls."""
    stop = StopAt(question)
    run = make_run(folder, data, comm, signals=stop, keep="last", **options)
    with stop:
        result = run.train()
    assert not result.done
    assert result.reason == "received SIGTERM"
    assert result.step == len(history(folder) if (folder / "history.jsonl").exists() else [])
    evaluated = history(folder)[-1]["valid_bpc"] if result.step > run.first_step else None
    assert (result.valid and result.valid.loss) == evaluated
    found = checkpoint.latest(folder)
    assert (found.meta["step"], found.message) == (result.step, None)
    assert not (folder / "DONE").exists()
    return result


def questions(folder, data, comm=None, **options):
    """Train to the end; return the run and the number of its polls."""
    stop = StopAt(None)
    run = make_run(folder, data, comm, signals=stop, **options)
    assert run.train().done
    return run, stop.asked


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stopped_anywhere_it_goes_on_as_if_it_had_not_been(name, data, tmp_path):
    options = OPTIMIZERS[name] | {"max_steps": STEPS, "dtype": "float32"}
    whole, count = questions(tmp_path / "whole", data, **options)
    # One poll before each step and one at each sum, which the history counts; each step is evaluated.
    # The blocks of soap add one sum, and one poll for each block.
    spread = (1 + len(whole.model.blocks)) * name.startswith("soap")
    sums = [r["gradients"] + r["losses"] + r["products"] + spread for r in history(whole.folder)]
    assert count == sum(sums) + 2 * STEPS
    boundaries = np.cumsum([0] + [n + 2 for n in sums])
    for question in range(1, count + 1, 2 if name == "bhf" else 1):
        folder = tmp_path / f"stopped at {question}"
        result = stopped_at(question, folder, data, **options)
        assert result.step == np.searchsorted(boundaries, question) - 1
        run, result = train(folder, data, **options)
        assert (result.step, result.done) == (STEPS, True)
        same(run, whole)
        assert history(folder) == history(whole.folder)


def test_stopped_again_and_again_it_still_arrives(data, tmp_path):
    options = OPTIMIZERS["shf"] | {"max_steps": STEPS}
    whole, _ = questions(tmp_path / "whole", data, **options)
    folder = tmp_path / "often"
    sizes = [r["gradients"] + r["losses"] + r["products"] + 2 for r in history(whole.folder)]
    for step, size in enumerate(sizes):
        for question in (1, 3, size):  # before the step, during it, in its evaluation
            assert stopped_at(question, folder, data, **options).step == step
        if step + 1 < STEPS:  # before the next step
            assert stopped_at(size + 1, folder, data, **options).step == step + 1
    run, _ = train(folder, data, **options)
    same(run, whole)
    assert history(folder) == history(whole.folder)


def test_a_signal_in_the_last_evaluation_is_no_end(data, tmp_path):
    options = {"max_seconds": 0.1, "evaluate_every": 1000}
    folder = tmp_path / "run"

    class InEvaluation(StopSignals):
        def wanted(self):
            if run.progress.seconds >= 0.1 and self.requested is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().wanted()

    stop = InEvaluation()
    run = make_run(folder, data, signals=stop, **options)
    with stop:
        result = run.train()
    assert (result.done, result.valid) == (False, None)
    assert checkpoint.latest(folder).meta["step"] == result.step == len(history(folder)) > 0
    run, again = train(folder, data, **options)
    assert (again.step, again.done) == (result.step, True)
    assert again.valid is not None


def test_a_signal_while_the_last_checkpoint_is_written_comes_too_late(data, tmp_path):
    """Without validation data its training loss is computed, with a sum over the ranks."""

    class AfterTheLastStep(StopSignals):
        def wanted(self):
            if run.step == STEPS:
                self.requested = "too late"
            return super().wanted()

    run = make_run(tmp_path / "run", data, signals=AfterTheLastStep(), max_steps=STEPS)
    run = Run(run.folder, replace(run.task, valid_set=None), run.session)
    result = run.train()
    assert (result.step, result.done, result.valid) == (STEPS, True, None)
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize("during", ["save", "report"])
def test_a_signal_between_steps_stops_there(during, data, tmp_path, monkeypatch):
    def kill(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    signals, reporter = StopSignals(), Recorder()
    options = {"max_steps": STEPS, "checkpoint_every": 1}
    run = make_run(tmp_path / "run", data, signals=signals, reporter=reporter, **options)
    save = run.save
    if during == "save":
        monkeypatch.setattr(run, "save", lambda: (kill(run.step), save()))
    else:
        reporter.after_step = lambda record: kill(record["step"])
    with signals:
        result = run.train()
    assert (result.step, result.done, result.reason) == (1, False, "received SIGUSR1")
    assert checkpoint.latest(tmp_path / "run").meta["step"] == 1


# Several ranks ---------------------------------------------------------------------------------


@pytest.mark.mpi(ranks=2, timeout=110, unit="s")
@pytest.mark.parametrize("name", ["shf", "adam", "soap"])
def test_one_rank_that_is_told_stops_all_at_the_same_place(name, mpi_ranks, comm, mpi_tmp_path):
    assert comm.size == mpi_ranks
    communicator, data = MPICommunicator(comm), shared_corpus(comm, mpi_tmp_path)
    options = OPTIMIZERS[name] | {"max_steps": STEPS, "dtype": "float32"}
    whole, count = questions(mpi_tmp_path / "whole", data, communicator, **options)
    count = min(comm.allgather(count))  # a rank with more blocks of soap polls more often
    for question in range(1, count + 1, 1 if count < 20 else 7):
        folder = mpi_tmp_path / f"stopped at {question}"
        told = question % comm.size == comm.rank
        result = stopped_at(question if told else None, folder, data, communicator, **options)
        assert communicator.same(result.step) == []
        run, result = train(folder, data, communicator, **options)
        assert result.done
        same(run, whole)
        assert history(folder) == history(whole.folder)
    communicator.close()


class Counting(Communicator):
    """One rank that counts the sums that it would send."""

    sums = 0

    def sum(self, vector):
        self.sums += 1


def test_the_agreement_costs_no_message(data, tmp_path):
    comm = Counting()
    run = make_run(tmp_path / "run", data, comm, **OPTIMIZERS["shf"] | {"evaluate_every": 1000})
    with StopSignals() as signals:
        run.risk = DataParallel(run.model, comm, stop=signals.wanted)
        report = run._one_step()
    assert comm.sums == report.work.gradients + report.work.losses + report.work.products


# The command -----------------------------------------------------------------------------------


MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(("ranks", "name"), [(1, "INT"), (1, "HUP"), (2, "USR1"), (2, "HUP"), (2, "KILL")])
def test_the_command_leaves_a_step_of_hours(ranks, name, tmp_path):
    """CG with more iterations than anyone will wait for; the signal goes to mpirun where there is one.

    MPICH's mpirun dies of all but SIGINT, SIGTERM and SIGUSR1, and kills its ranks.
    """
    if ranks > 1 and MPIRUN is None:
        pytest.skip("there is no mpirun")
    data, folder = write_corpus(tmp_path / "small.h5"), tmp_path / "run"
    options = {
        "optimizer": "shf",
        "hidden": 40,
        "sequence-length": 20,
        "gradient-batch": 200,
        "curvature-batch": 200,
        "backend": "numpy",
        "out": folder,
        "set": "cg_max_steps=100000000",
    }
    endless = ["--set=cg_tolerance=0", "--set=cg_refresh=1", "--set=damping=0.001"]
    command = [MPIRUN, "-n", str(ranks)] if ranks > 1 else []
    command += [sys.executable, "-c", "from hfmpi.cli.main import entry; entry()", "train", str(data)]
    command += [f"--{option}={value}" for option, value in options.items()] + endless
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            while not process.stdout.readline().startswith("No limit"):
                assert process.poll() is None
            time.sleep(0.5)
            process.send_signal(signal.Signals[f"SIG{name}"])
            said = process.stdout.read()
            code = process.wait(timeout=60)
        finally:
            process.kill()
    if ranks == 1 or name == "USR1":
        assert code == 0
        assert f"Stopped at step 0: received SIG{name}.\nStart again with the same command" in said
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        deadline = time.monotonic() + 20
        while str(folder).encode() in (path.read_bytes() if path.exists() else b""):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert checkpoint.latest(folder).meta["step"] == 0
    assert not (folder / "DONE").exists()
