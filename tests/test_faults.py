"""Ranks that die or diverge, and invalid numbers: each fault is reported by its name.

examples/faults/ranks.py does the same with complete runs at random times.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nodes import nodes
from small import history, make_run, shared_corpus, train, write_corpus
from test_parallel import MPIRUN

from hfmpi.cli.train import train as train_command
from hfmpi.errors import UserError
from hfmpi.files import checkpoint
from hfmpi.networks.network import Network
from hfmpi.networks.tape import NetworkLinearisation
from hfmpi.optim import Gradient, HessianFree, Objective, Objectives
from hfmpi.parallel import launch, watchdog
from hfmpi.parallel.communicator import MPICommunicator

# Ranks -----------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
import numpy as np
from hfmpi.parallel import sockets, watchdog
from hfmpi.parallel import connect, guard
watchdog._POLL = 0.2  # the polls are counted; fewer seconds between them
sockets._PATIENCE = 2.0
faulty, until = int(sys.argv[1]), float(sys.argv[2])
with guard():
    if "no network" in sys.argv[3]:
        def refuse(*arguments, **options): raise OSError("no network")
        sockets.socket.create_server = refuse
    comm = connect(2.0 if "hang" in sys.argv[3] else 0.0)
    os.write(1, b"%d\\n" % os.getpid())  # in one piece
    begin, passed = time.monotonic(), 0.0
    while passed < until:
        comm.sum(np.ones(10))
        passed = comm.agree(time.monotonic() - begin)
    if comm.rank == faulty:
        exec(sys.argv[4])
    connect() if sys.argv[3] == "connect" else comm.sum(np.ones(10))
"""


def run(faulty, command, name="", until=0.1, meanwhile=None):
    """Run the program on two ranks, one of which fails; return exit code, stderr and seconds."""
    if MPIRUN is None:
        pytest.skip("there is no mpirun")
    begin = time.monotonic()
    words = [MPIRUN, "-n", "2", sys.executable, "-c", PROGRAM, str(faulty), str(until), name, command]
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        ranks = [int(process.stdout.readline()) for _ in range(2)]
        if meanwhile:
            meanwhile(ranks)
        _, said = process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{rank}") for rank in ranks):  # no process is left behind
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process.returncode, said, time.monotonic() - begin


@pytest.mark.parametrize(
    ("command", "faulty"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 0),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1),
        ("os._exit(3)", 1),
        ("os._exit(0)", 1),
    ],
)
def test_a_rank_that_dies_ends_all(command, faulty):
    # The launcher also detects the death, and often kills the other ranks before they can report it.
    code, said, seconds = run(faulty, command)
    assert code != 0 or command == "os._exit(0)"  # the code that MPICH's mpirun returns
    assert said.count("Error:") <= 1
    assert f"rank {faulty} (process " in said or "Error:" not in said
    assert seconds < 30


@pytest.mark.parametrize(
    ("command", "name", "faulty", "sentence"),
    [
        ("sys.exit(0)", "", 1, "rank 1 (process {}) has exited while other ranks continue"),
        ("sys.exit(0)", "connect", 1, "rank 1 (process {}) has exited while other ranks continue"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "", 1, "rank 1 (process {}) is stopped (SIGSTOP)"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "", 0, "rank 0 (process {}) is stopped (SIGSTOP)"),
        ("time.sleep(1000)", "hang", 1, "for 2 s (--stall-timeout); the others wait for rank 1 (process {})"),
        ("time.sleep(1000)", "hang, no network", 1, "no collective has finished for 2 s (--stall-timeout)"),
    ],
)
def test_a_rank_that_the_launcher_does_not_miss_ends_all(command, name, faulty, sentence):
    processes = []
    code, said, seconds = run(faulty, command, name, meanwhile=processes.extend)
    host = socket.gethostname()
    assert code != 0
    assert any(sentence.format(f"{process} on {host}") in said for process in processes)
    assert ("Note: rank 0 has no TCP connection to rank 1" in said) == ("no network" in name)
    assert seconds < 40


ENDLESS = """
import os, sys, time
import numpy as np
from hfmpi.parallel import connect, guard, watchdog
watchdog._POLL = 0.1
with guard():
    comm = connect(float(sys.argv[1]))
    os.write(1, b"%d %d\\n" % (comm.rank, os.getpid()))
    while True:
        comm.sum(np.ones(10))
        time.sleep(0.01)
"""


def lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("ranks", "stopped", "cut_off", "stall", "sentence"),
    [
        ((1, 1), 1, "", 0, "rank 1 (process {1} on nodeb) has been silent for 30 s"),
        (
            (1, 1),
            0,
            "",
            0,
            "rank 0 (process {0} on nodea) has been silent for 30 s, or rank 1 on nodeb is cut",
        ),
        ((2, 1, 1), 3, "", 0, "rank 3 (process {3} on nodec) has been silent for 30 s"),
        ((1, 2), 2, "", 0, "rank 2 (process {2} on nodeb) is stopped (SIGSTOP)"),
        (
            (2, 1, 2),
            None,
            "nodec",
            0,
            "rank 3 (process {3} on nodec), rank 4 (process {4} on nodec) have been si",
        ),
        (
            (1, 1, 1),
            None,
            "nodeb",
            1.5,
            "(--stall-timeout); rank 1 (process {1} on nodeb) has been silent for 6 s",
        ),
        (
            (1, 1, 1),
            None,
            "nodea",
            0,
            "rank 0 (process {0} on nodea) is cut off: the ranks of all other nodes",
        ),
    ],
)
def test_a_rank_alone_on_its_node_ends_all_and_mpirun(ranks, stopped, cut_off, stall, sentence, tmp_path):
    """When a rank exits, MPICH's mpirun waits for the ranks of other nodes; after a signal it ends them."""
    program = tmp_path / "program.py"
    program.write_text(ENDLESS)
    with nodes(tmp_path, *ranks) as cluster, (tmp_path / "stderr").open("w+") as said:
        words = [*cluster.mpirun, sys.executable, str(program), str(stall)]
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said) as mpirun:
            try:
                processes = dict(map(int, mpirun.stdout.readline().split()) for _ in range(sum(ranks)))
                time.sleep(0.3)
                if cut_off:
                    cluster.cut_off(cut_off)
                else:
                    os.kill(processes[stopped], signal.SIGSTOP)
                assert mpirun.wait(30) != 0
                deadline = time.monotonic() + 10
                while any(map(lives, processes.values())):
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                mpirun.kill()
                for process in filter(lives, processes.values()):
                    os.kill(process, signal.SIGKILL)
        said.seek(0)
        errors = [line for line in said.read().splitlines() if line.startswith("Error: ")]
    assert sentence.format(*(processes[rank] for rank in range(sum(ranks)))) in errors[0]


@pytest.mark.parametrize("apart", [False, True], ids=["one node", "two nodes"])
@pytest.mark.parametrize("where", ["launch._watched", "connect"])
def test_a_rank_that_never_joins_ends_all(where, apart, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal\n"
        "from hfmpi.parallel import launch, library\n"
        "from hfmpi.parallel.launch import connect\n"
        "def stop(*arguments): os.kill(os.getpid(), signal.SIGSTOP)\n"
        f"if library.launched()[0] == 1: {where} = stop\n"
        "connect(1.0)\n"
    )
    with nodes(tmp_path, 1, 1) if apart else contextlib.nullcontext() as cluster:
        words = [*(cluster.mpirun if cluster else [MPIRUN, "-n", "2"]), sys.executable, str(program)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    # MPI_Init holds Python's lock: no Python thread can report there, so the stack must be printed.
    sentence = "Timeout (0:00:03)!" if where == "connect" else "not all ranks have joined within 1 s"
    assert sentence in done.stderr


def test_a_job_that_sleeps_as_a_whole_goes_on():
    def sleep(ranks):
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        time.sleep(2.5)  # more than the polls after which a single rank would be given up
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)

    assert run(0, "", until=0.5, meanwhile=sleep)[:2] == (0, "")


def test_a_rank_may_leave_later_than_the_others():
    assert run(1, "comm.sum(np.ones(10)); time.sleep(2); sys.exit(0)")[:2] == (0, "")


@pytest.mark.parametrize(("words", "seconds"), [([], 600.0), (["--stall-timeout", "7"], 7.0)])
def test_training_hands_its_stall_timeout_on(words, seconds, monkeypatch):
    def connect(stall_timeout):
        raise UserError(f"it is {stall_timeout!r}")

    monkeypatch.setattr(launch, "connect", connect)
    with pytest.raises(UserError, match=f"^it is {seconds}$"):
        train_command(["small.h5", *words], standalone_mode=False)


class Ended(BaseException):
    pass


def test_a_silent_node_is_given_up_and_who_waits_for_whom_is_known(monkeypatch, capfd):
    def leave(self):
        raise Ended

    monkeypatch.setattr(watchdog.Watchdog, "_exit", leave)
    monkeypatch.setattr(watchdog.Watchdog, "_run", lambda self: None)
    places = [("a", "", 1), ("b", "", 2), ("c", "", 3)]
    ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
    for link in ours:
        link.setblocking(False)
    dog = watchdog.Watchdog(SimpleNamespace(rank=0, pulse=7), 5, dict(enumerate(ours, 1)), places)

    def poll(times, answers=True):
        for _ in range(times):
            theirs[0].send(b" 7\nat")  # lines may arrive in pieces
            dog._hear(1)
            if answers:
                theirs[1].send(b"at 6\n")
                dog._hear(2)
            dog._poll(1.0)

    theirs[0].send(b"at 7\nat")
    dog._hear(1)
    with pytest.raises(Ended):
        poll(20)
    assert "has finished for 5 s (--stall-timeout); the others wait for rank 2 (pro" in capfd.readouterr().err
    dog.stall_timeout = 10
    with pytest.raises(Ended):
        poll(20, answers=False)
    assert (
        "for 10 s (--stall-timeout); rank 2 (process 3 on c) has been silent for 6 s"
        in capfd.readouterr().err
    )
    dog.stall_timeout = 0
    with pytest.raises(Ended):
        poll(watchdog._SILENT, answers=False)
    assert (
        capfd.readouterr().err
        == "Error: rank 2 (process 3 on c) has been silent for 30 s, so all ranks end.\n"
    )
    for link in (*ours, *theirs, dog.bell, dog.ear):
        link.close()


# Numbers ---------------------------------------------------------------------------------------


class Quadratic(Objective):
    """f(x) = |x|^2 / 2 at the point 1; a fault replaces the result of a method."""

    def __init__(self, **faults):
        self.faults = faults
        self.calls = dict.fromkeys(("loss", "gradient", "product"), 0)

    def given(self, name, value):
        self.calls[name] += 1
        return self.faults.get(name, value)

    def loss(self, theta):
        return self.given("loss", float(theta @ theta) / 2)

    def gradient(self, theta, squares=False):
        g = self.given("gradient", theta.copy())
        return Gradient(
            self.faults.get("risk", float(theta @ theta) / 2), g, self.faults.get("squares", g * g)
        )

    def squared_gradients(self, theta):
        return self.gradient(theta, squares=True)

    def gauss_newton(self, theta):
        return lambda v: self.given("product", v.copy())


def full(value):
    return np.full(3, value)


@pytest.mark.parametrize(
    ("faults", "cause", "stop"),
    [
        ({"gradient": full(math.nan)}, "the gradient is not finite", "NOT_FINITE"),
        ({"gradient": full(math.inf)}, "the gradient is not finite", "NOT_FINITE"),
        ({"risk": math.nan}, "the risk is not finite", "NOT_FINITE"),
        ({"risk": -math.inf}, "the risk is not finite", "NOT_FINITE"),
        ({"product": full(math.nan)}, "a gradient, product or residual is not finite", "NOT_FINITE"),
        ({"product": full(math.inf)}, "a gradient, product or residual is not finite", "NOT_FINITE"),
        ({"squares": full(math.nan)}, "a gradient, product or residual is not finite", "NOT_FINITE"),
        ({"product": full(-1e3)}, "the curvature along the search direction is not positive", "NOT_POSITIVE"),
        ({"loss": math.nan}, "along the direction from conjugate gradients the risk is not finite", None),
        ({"loss": -math.inf}, "along the direction from conjugate gradients the risk is not finite", None),
        ({"loss": 99.0}, "no rate along the direction from conjugate gradients lowers the risk enough", None),
    ],
)
@pytest.mark.parametrize("damping", [1.0, 1e10])
def test_a_bad_number_rejects_the_step_by_name(faults, cause, stop, damping):
    objective, theta = Quadratic(**faults), -np.ones(3)
    optimizer = HessianFree(damping=1.0)
    state = type(optimizer.init(theta))(damping, theta * 0)
    with np.errstate(all="ignore"):
        if stop == "NOT_POSITIVE":
            state = type(state)(1e-3, theta * 0)
        after, later, report = optimizer.step(theta, state, Objectives(objective, objective))
    assert after is theta
    assert not report.accepted
    bound = "; the damping is at its maximum" if later.damping == 1e10 else ""
    assert report.message.startswith(f"step rejected: {cause}")
    assert report.message.endswith(bound)
    assert later.damping == min(state.damping * 1.5, 1e10)
    np.testing.assert_array_equal(later.direction, np.zeros(3))
    assert stop in (None, report.details["cg_stop"])
    if "gradient" in faults or "risk" in faults:
        assert objective.calls == {"loss": 0, "gradient": 1, "product": 0}
    if "squares" in faults:
        assert objective.calls["product"] == 0


def test_a_bad_number_late_in_conjugate_gradients_leaves_what_was_reached():
    a = np.diag([1.0, 10.0, 100.0]).astype(np.float32)
    for late in (np.nan, np.inf):
        objective, theta = Quadratic(), np.ones(3, np.float32)

        def gauss_newton(theta, objective=objective, late=late):
            return lambda v: objective.given("product", a @ v if objective.calls["product"] < 1 else v * late)

        objective.gauss_newton = gauss_newton
        optimizer = HessianFree(damping=1.0, preconditioner="none")
        after, state, report = optimizer.step(theta, optimizer.init(theta), Objectives(objective, objective))
        assert (report.accepted, report.message) == (True, "")
        assert (report.details["cg_stop"], report.details["cg_steps"]) == ("NOT_FINITE", 1)
        assert np.all(np.isfinite(after))
        assert np.all(np.isfinite(state.direction))


def test_an_iterate_that_overflows_is_not_kept():
    """A curvature so small that the step along it overflows float32."""
    objective, theta = Quadratic(product=np.full(3, -1e-30, np.float32)), np.full(3, 1e10, np.float32)
    optimizer = HessianFree(damping=0.0, preconditioner="none", backtracking=False)
    with np.errstate(all="ignore"):
        after, state, report = optimizer.step(theta, optimizer.init(theta), Objectives(objective, objective))
    assert (after is theta, report.accepted, report.details["cg_stop"]) == (True, False, "NOT_FINITE")
    assert np.all(np.isfinite(state.direction))


def test_a_zero_gradient_is_no_rejection_and_no_work():
    objective, theta = Quadratic(gradient=np.zeros(3)), np.ones(3)
    optimizer = HessianFree()
    state = optimizer.init(theta)
    after, later, report = optimizer.step(theta, state, Objectives(objective, objective))
    assert after is theta
    assert later is state
    assert report.accepted
    assert report.message == "the gradient is zero: nothing to do"
    assert objective.calls == {"loss": 0, "gradient": 1, "product": 0}


@pytest.mark.mpi(ranks=2, timeout=60, unit="s")
def test_one_ranks_bad_numbers_stop_the_run_on_all(mpi_ranks, comm, mpi_tmp_path, monkeypatch):
    communicator, data = MPICommunicator(comm), shared_corpus(comm, mpi_tmp_path)
    linearised = NetworkLinearisation
    honest = linearised.squared_gradients, linearised.gauss_newton, Network.loss
    methods = (
        ("squared_gradients", 1, "gradient is not finite"),
        ("gauss_newton", 2, "product or residual is not finite"),
    )
    for method, place, cause in methods:
        folder = mpi_tmp_path / method
        options = {"checkpoint_every": 2, "max_steps": 30, "max_rejections": 3}
        run = make_run(folder, data, communicator, **options)
        original = getattr(NetworkLinearisation, method)

        def spoiled(self, *arguments, original=original, place=place, run=run):
            result = original(self, *arguments)
            if comm.rank == 1 and run.step >= 2:
                arguments[place][0] = np.nan
            return result

        monkeypatch.setattr(NetworkLinearisation, method, spoiled)
        sentence = (
            rf"^3 steps in a row were rejected up to step 5, .*{cause}.*; the last checkpoint, of step 5, is"
        )
        with pytest.raises(UserError, match=sentence):
            run.train()
        monkeypatch.undo()
        comm.Barrier()  # rank 0 has written what the others read
        assert (
            NetworkLinearisation.squared_gradients,
            NetworkLinearisation.gauss_newton,
            Network.loss,
        ) == honest
        assert checkpoint.latest(folder).meta["rejections"] == 3
        assert [record["accepted"] for record in history(folder)] == [True] * 2 + [False] * 3
        assert all(cause in record["message"] for record in history(folder)[2:])
        comm.Barrier()
        run, result = train(
            folder, data, communicator, **(options | {"max_steps": 6})
        )  # after the repair it continues
        assert (run.first_step, result.step, run.progress.rejections) == (5, 6, 0)
        assert history(folder)[-1]["accepted"]
    communicator.close()


def test_rejections_count_across_a_stop_and_may_be_unlimited(tmp_path, monkeypatch):
    data = write_corpus(tmp_path / "small.h5")
    honest = NetworkLinearisation.squared_gradients

    def spoiled(self, *arguments):
        honest(self, *arguments)
        arguments[1][0] = np.nan

    monkeypatch.setattr(NetworkLinearisation, "squared_gradients", spoiled)
    train(tmp_path / "run", data, max_steps=3)
    with pytest.raises(
        UserError, match=r"^20 steps in a row were rejected up to step 20, .*, of step 20, is valid"
    ):
        train(tmp_path / "run", data)
    _, result = train(tmp_path / "run", data, max_steps=25, max_rejections=0)
    assert result.step == 25
