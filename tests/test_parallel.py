"""Communicators, launch and placement: on one rank, under mpirun, and with faults."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from threadpoolctl import threadpool_info, threadpool_limits

from hfmpi.cli.info import info
from hfmpi.errors import UserError
from hfmpi.measure import control_groups, machine
from hfmpi.parallel import failure, launch, library, placement, sockets
from hfmpi.parallel.communicator import Communicator, MPICommunicator, digest

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
LAUNCHER_NAMES = [name for pair in library._LAUNCHERS for name in pair if name]
LAUNCHER_NAMES += ["PMIX_NAMESPACE", "PMIX_SERVER_URI4", "PMI_FD", "PMI_PORT"]


def mpirun(ranks, program, folder):
    """Run a Python program on several ranks; return the finished process and its seconds."""
    if MPIRUN is None:
        pytest.skip("there is no mpirun")
    script = folder / "program.py"
    script.write_text(program)
    begin = time.monotonic()
    done = subprocess.run(
        [MPIRUN, "-n", str(ranks), sys.executable, str(script)], capture_output=True, text=True, timeout=60
    )
    return done, time.monotonic() - begin


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)


def check_contract(comm):
    """Check the contract of every communicator, on any number of ranks."""
    rank, size = comm.rank, comm.size
    for dtype in (np.float32, np.float64, np.int64):
        vector = np.arange(5, dtype=dtype) + rank
        comm.sum(vector)
        np.testing.assert_array_equal(vector, np.arange(5) * size + sum(range(size)))
        assert vector.dtype == dtype

    for dtype in (np.float32, np.int32, np.uint8, np.bool_):
        vector = np.full(7, rank == 0, dtype=dtype)
        vector = comm.agree(vector)
        np.testing.assert_array_equal(vector, np.ones(7, dtype=dtype))

    for value in (
        None,
        True,
        3,
        0.1,
        np.float64(0.1),
        float("inf"),
        "word",
        "x" * 240,
        "x" * 5000,
        {"a": [1]},
    ):
        agreed = comm.agree(value if rank == 0 else "another")
        assert agreed == value
        assert type(agreed) is type(value)

    assert comm.any(rank == size - 1) is True
    assert comm.any(False) is False
    assert comm.gather((rank, "here")) == ([(r, "here") for r in range(size)] if rank == 0 else None)

    received = [np.zeros((2 + sender, 1 + rank)) for sender in range(size)]
    comm.exchange([np.full((1 + other, 2 + rank), 10.0 * rank + other).T for other in range(size)], received)
    for sender, array in enumerate(received):
        np.testing.assert_array_equal(array, np.full((2 + sender, 1 + rank), 10.0 * sender + rank))
    joined = comm.join(np.full(rank, -float(rank)), list(range(size)))  # nothing from rank 0
    np.testing.assert_array_equal(joined, [-r for r in range(size) for _ in range(r)])

    assert comm.same(2**64 - 1) == []
    assert comm.same(2**63 + rank) == list(range(1, size))
    vector = np.ones(9)
    if rank == size - 1:
        vector[3] = np.nextafter(1, 2)
    assert comm.same(digest(vector)) == ([size - 1] if size > 1 else [])

    assert failure.together(comm, lambda: rank * 10) == rank * 10
    with pytest.raises(UserError, match=r"^Größe 0 passt nicht$"):
        failure.together(comm, fail_on(comm, 0))
    with pytest.raises(UserError, match=rf"^Größe {size - 1} passt nicht$"):
        failure.together(comm, fail_on(comm, size - 1))

    for bad in (np.zeros((4, 4))[:, 0], np.zeros(3, dtype=np.float16), np.zeros(3, dtype=np.complex128)):
        with pytest.raises(TypeError, match="cannot send"):
            comm.sum(bad)
    with pytest.raises(TypeError, match="cannot send"):
        comm.sum(np.zeros(3, dtype=object))


def fail_on(comm, first):
    def function():
        if comm.rank >= first:
            raise UserError(f"Größe {comm.rank} passt nicht")

    return function


def test_one_rank_alone():
    comm = Communicator()
    assert (comm.rank, comm.size, comm.local_rank, comm.local_size) == (0, 1, 0, 1)
    check_contract(comm)


@pytest.mark.mpi(ranks=[1, 2, 3], timeout=60, unit="s")
def test_contract_under_mpi(mpi_ranks):
    comm = launch.connect()
    assert isinstance(comm, MPICommunicator)
    assert comm.size == mpi_ranks
    assert (comm.local_rank, comm.local_size) == (comm.rank, comm.size)
    check_contract(comm)
    place = placement.place(comm, threads=1)
    assert (place.rank, place.size, place.threads) == (comm.rank, mpi_ranks, 1)
    comm.close()


def test_digest_sees_every_bit():
    vector = np.linspace(0, 1, 1000, dtype=np.float32)
    other = vector.copy()
    other.view(np.uint32)[617] ^= 1
    assert digest(vector) != digest(other)
    assert digest(vector) == digest(vector.copy())
    assert 0 <= digest(np.zeros(0)) < 2**64


def test_serial_without_launcher_and_mpi_not_loaded():
    program = (
        "import sys; from hfmpi.parallel.launch import connect; assert 'mpi4py' not in sys.modules\n"
        "comm = connect(); assert type(comm).__name__ == 'Communicator', comm\n"
        "assert 'mpi4py' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "3"}, (1, 3)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}, (0, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 4)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, (2, 8)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # the process of a batch script itself
        ({"PMIX_RANK": "1"}, (1, 2)),
    ],
)
def test_launched(variables, expected, no_launcher, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert library.launched() == expected


def unloadable():
    raise RuntimeError("cannot load MPI library")


@pytest.mark.parametrize("size", [1, 2])
def test_launcher_but_no_mpi(size, no_launcher, monkeypatch):
    monkeypatch.setattr(library, "load", unloadable)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", str(size))
    if size == 1:
        assert launch.connect().size == 1
    else:
        with pytest.raises(UserError, match="started 2 processes, but MPI cannot be loaded"):
            launch.connect()


def test_launcher_of_another_mpi_is_an_error():
    # Open MPI's variables without its mpirun: ranks of a foreign launcher have such an environment.
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
    program = "from hfmpi.parallel import connect, guard\nwith guard(): connect()"
    for rank, lines in ((0, 1), (1, 0)):
        environment |= {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stderr.count("the launcher started 2 processes, but they are not connected") == lines
        assert len(done.stderr.splitlines()) == lines


MPICH, OPEN_MPI = "MPICH Version:      5.0.2\nMPICH Release date: x", "Open MPI v5.0.11, package: Open MPI x"
SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
PMI = {"PMI_RANK": "0", "PMI_SIZE": "2"}
PMIX = {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.1.0"}
OPEN_MPIRUN = PMIX | {
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMIX_SERVER_URI4": "x;tcp4://",
}


def library_named(text):
    return SimpleNamespace(Get_library_version=lambda: text, __file__=None, Is_initialized=lambda: False)


@pytest.mark.parametrize(
    ("found", "variables", "said"),
    [
        (MPICH, PMIX, "it uses PMIx, which MPICH 5.0.2 was not built for: use .* srun --mpi=pmi2"),
        (MPICH, OPEN_MPIRUN, "it uses PMIx"),
        (MPICH, PMI | {"PMI_FD": "closed"}, r"its connection \(PMI_FD\) is closed"),
        (MPICH, PMI | {"PMI_FD": "left"}, r"its connection \(PMI_FD\) is closed"),
        (MPICH, PMI | {"PMI_FD": "open"}, None),
        (MPICH, PMI | PMIX | {"PMI_FD": "open"}, None),  # mpirun called in a Slurm step
        (MPICH, PMI | {"PMI_PORT": "here:1"}, None),
        (MPICH, SLURM, None),  # MPICH starts, and reports that each rank is alone
        ("Intel(R) MPI Library 2021.13", PMIX, None),
        (OPEN_MPI, OPEN_MPIRUN, None),
        (OPEN_MPI, PMIX, "PMIX_SERVER_URI does not name its PMIx server"),
        (
            OPEN_MPI,
            PMI | {"PMI_FD": "open"},
            "it does not offer PMIx, which Open MPI v5.0.11 requires: use .*pmix",
        ),
        (OPEN_MPI, SLURM, "it does not offer PMIx"),
        ("Open MPI v4.1.6, package: x", SLURM, None),  # which may be built for Slurm's PMI
        (OPEN_MPI, {}, None),
    ],
)
def test_launcher_and_library_are_compared_before_mpi_starts(
    found, variables, said, no_launcher, monkeypatch
):
    here, there = socket.socketpair()
    with here, there:
        fds = {"open": str(here.fileno()), "left": str(here.fileno()), "closed": "999999"}
        if variables.get("PMI_FD") == "left":
            there.close()
        for name, value in variables.items():
            monkeypatch.setenv(name, fds.get(value, value))
        obstacle = library.obstacle(library_named(found))
    assert obstacle is None if said is None else re.match(said, obstacle)


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        (PMIX, True),
        (PMIX | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, True),
        (PMIX | SLURM, False),
        (OPEN_MPIRUN, False),
        (PMI | {"PMI_SIZE": "1", "PMI_FD": "999999"}, True),
        (PMI | {"PMI_SIZE": "1", "PMI_FD": "999999"} | SLURM, False),  # one launcher within another
    ],
)
def test_where_they_do_not_fit_a_single_process_goes_on_alone(variables, alone, no_launcher, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: library_named(MPICH))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if alone:
        assert type(launch.connect()) is Communicator
    else:
        with pytest.raises(UserError, match=r"^the launcher started 2 processes, but it"):
            launch.connect()


def test_the_first_process_speaks_before_the_others_leave(no_launcher, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: library_named(MPICH))
    waited = []
    monkeypatch.setattr(launch.time, "sleep", waited.append)
    for name, value in (PMIX | SLURM | {"SLURM_PROCID": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError):
        launch.connect()
    assert len(waited) == 1


def test_mpirun_in_a_step_of_another_launcher(tmp_path, monkeypatch, no_launcher):
    for name, value in PMIX.items():
        monkeypatch.setenv(name, value)
    done, _ = mpirun(2, "from hfmpi.cli.info import info; info()", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split(" on ")[0] for line in done.stdout.splitlines()[-2:]] == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.parametrize("size", [1, 2])
def test_info_where_launcher_and_library_do_not_fit(size, no_launcher, monkeypatch, blas_threads):
    for name, value in (PMIX | SLURM | {"SLURM_STEP_NUM_TASKS": str(size)}).items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(info, ["--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert "use the mpirun that belongs" in found["mpi"]["problem"] or "itself" in found["mpi"]["problem"]
    assert [rank["size"] for rank in found["ranks"]] == [1]
    assert "\nMPI is not started: " in CliRunner().invoke(info).output
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("PMIX_RANK", "1")
    monkeypatch.setattr(launch, "_HEAD_START", 0)
    assert (CliRunner().invoke(info).output, done.exit_code) == ("", 0)


START = """
import sys
import numpy as np
from hfmpi.errors import UserError
from hfmpi.parallel.failure import guard, together
from hfmpi.parallel.launch import connect
def wait(comm):
    while True:
        comm.sum(np.ones(1))
"""


@pytest.mark.parametrize(
    "failing",
    [
        "together(comm, lambda: open_corpus(comm))",  # one rank fails, together
        "fail(comm)",  # all ranks fail separately, in the same way
    ],
)
def test_user_error_on_all_ranks_is_one_sentence_and_code_2(failing, tmp_path):
    program = f"""{START}
def open_corpus(comm):
    if comm.rank == 1:
        raise UserError("there is no such corpus")
def fail(comm):
    raise UserError("there is no such corpus")
with guard():
    comm = connect()
    {failing}
"""
    done, seconds = mpirun(3, program, tmp_path)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).strip() == "Error: there is no such corpus"
    assert seconds < 10


@pytest.mark.parametrize(
    ("leaving", "code", "said"),
    [
        ("1 / 0", 1, "ZeroDivisionError: division by zero\nError: rank 1 failed with this exception"),
        ("sys.exit(3)", 3, "Error: rank 1 exited with code 3 without the other ranks"),
        ("sys.exit('no way')", 1, "no way"),
        ("raise UserError('this rank alone')", 2, "Error: this rank alone"),
    ],
)
def test_one_rank_that_leaves_ends_all(leaving, code, said, tmp_path):
    program = f"""{START}
with guard():
    comm = connect()
    if comm.rank == 1:
        {leaving}
    wait(comm)
"""
    done, seconds = mpirun(3, program, tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert done.stderr.count("Traceback") == ("ZeroDivisionError" in said)
    assert seconds < 10


def test_exception_without_guard_ends_all(tmp_path):
    done, seconds = mpirun(2, f"{START}\ncomm = connect()\ncomm.rank and 1 / 0\nwait(comm)", tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("ZeroDivisionError") == 1
    assert seconds < 10


def test_what_rank_0_says_right_after_its_word_stays_for_the_watchdog():
    words = "their word", "its word"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            link, _ = server.accept()
            with link:
                link.recv(64)
                link.sendall(b"its wordat 2\n")

        thread = threading.Thread(target=answer)
        thread.start()
        link = sockets._reach(["127.0.0.1"], server.getsockname()[1], words, 1)
        thread.join()
    assert link is not None
    with link:
        assert link.recv(64) == b"at 2\n"


def test_ranks_that_leave_at_once_leave_in_good_order(tmp_path):
    done, _ = mpirun(2, f"{START}\nconnect().close()", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_guard_alone(capsys, no_launcher):
    with pytest.raises(SystemExit) as leaving, failure.guard():
        raise UserError("no such file")
    assert leaving.value.code == 2
    assert capsys.readouterr().err == "Error: no such file\n"
    with pytest.raises(SystemExit) as leaving, failure.guard():
        sys.exit(7)
    assert leaving.value.code == 7
    with pytest.raises(ZeroDivisionError), failure.guard():
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("own", "masks", "quota", "threads"),
    [
        (0b1111, [0b1111], None, 4),
        (0b1111, [0b1111] * 2, None, 2),
        (0b1111, [0b1111] * 3, None, 1),
        (0b11, [0b11] * 5, None, 1),
        (0b0011, [0b0011, 0b1100], None, 2),  # bound to separate cores
        (0b1000, [0b0111, 0b1000], None, 1),
        (0b0111, [0b0111, 0b1110], None, 2),  # bound, but to common cores
        (0b1111, [0b1111], 2.5, 2),
        (0b1111, [0b1111], 0.5, 1),
        (0b1111, [0b1111], 64.0, 4),
        (0b1111, [0b1111] * 2, 3.0, 1),
        (0b0011, [0b0011, 0b1100], 2.0, 1),
    ],
)
def test_share_of_the_cores(own, masks, quota, threads):
    assert placement._share(own, masks, quota) == threads


@pytest.fixture
def blas_threads():
    """Undo the settings of `place`."""
    with threadpool_limits(limits=None, user_api="blas"):
        yield lambda: {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_place_sets_the_threads(monkeypatch, blas_threads):
    for name in placement._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    cores = machine.cores()
    place = placement.place(Communicator())
    assert (place.cores, place.threads) == (cores, cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert placement.place(Communicator()).threads == 2
    assert blas_threads() == {2}
    assert placement.place(Communicator(), threads=1).threads == 1
    assert blas_threads() == {1}
    with pytest.raises(UserError, match="must be at least 1, not"):
        placement.place(Communicator(), threads=0)


def test_place_keeps_to_a_quota_of_processor_time(monkeypatch, blas_threads):
    for name in placement._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(control_groups, "processors", lambda root=None: 1.5)
    place = placement.place(Communicator())
    assert (place.cores, place.threads) == (1, 1)
    assert blas_threads() == {1}


@pytest.mark.parametrize("asked", [100_000, 2**70])
def test_the_threads_of_a_place_are_those_that_the_blas_has(asked, blas_threads):
    found = placement.place(Communicator(), threads=asked).threads
    assert blas_threads() == {found}
    assert found < asked


def test_info_alone(no_launcher, monkeypatch, blas_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plain = CliRunner().invoke(info)
    assert plain.exit_code == 0
    assert "rank 0 of 1 on " in plain.output
    found = json.loads(CliRunner().invoke(info, ["--json"]).output)
    assert found["versions"]["numpy"] == np.__version__
    assert found["mpi"]["started"] is False
    assert [rank["rank"] for rank in found["ranks"]] == [0]


def test_info_under_mpirun(tmp_path):
    done, _ = mpirun(2, "from hfmpi.cli.info import info; info()", tmp_path)
    assert done.returncode == 0
    assert [line.split(" on ")[0] for line in done.stdout.splitlines()[-2:]] == ["rank 0 of 2", "rank 1 of 2"]
    assert len(done.stdout.splitlines()) == 6


@pytest.mark.parametrize(
    ("options", "limited"),
    [
        ("", False),
        ("--max-rejections 3", False),
        ("--config none.toml", False),
        ("--config limit.toml", True),
        ("--config=limit.toml --max-steps 0", False),
        ("--config none.toml --max-seconds=2.5", True),
        ("--config no-such.toml", True),  # which hfmpi reports
        ("--max-steps 8", True),
        ("--max-steps=8 --seed 1", True),
        ("--max-steps 0", False),
        ("--max-steps eight", True),
        ("--max-steps", True),
    ],
)
def test_the_batch_script_wants_a_limit(tmp_path, options, limited):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "hfmpi").touch(mode=0o755)
    (tmp_path / "none.toml").write_text("max_rejections = 3\n[settings]\ncg_max_steps = 3\n")
    (tmp_path / "limit.toml").write_text("max_steps = 3\n")
    script = Path(__file__).parents[1] / "bin" / "train.sbatch"
    environment = os.environ | {"VENV": str(tmp_path), "LAUNCH": "echo", "SLURM_JOB_END_TIME": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", script, "text.h5", "run", *options.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if limited:
        assert done.stdout == f"hfmpi train text.h5 --out run {options}\n"
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("Set --max-steps or --max-seconds")


def test_the_batch_script_enters_a_container_in_place_of_an_environment(tmp_path):
    script = Path(__file__).parents[1] / "bin" / "train.sbatch"
    (tmp_path / "enter").write_text('#!/bin/sh\necho "$@" >>entered\nexec "$@"\n')
    (tmp_path / "enter").chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    given = {"CONTAINER": "./enter", "LAUNCH": "echo", "VENV": "absent", "PATH": path}
    environment = os.environ | given | {"SLURM_JOB_END_TIME": "1"}
    words = ["bash", script, "text.h5", "run", "--max-steps", "8"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert done.stdout == "./enter hfmpi train text.h5 --out run --max-steps 8\n"
    assert (tmp_path / "entered").read_text() == "python - --max-steps 8\n"
