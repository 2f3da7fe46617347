"""Standard output and error that cannot be written, or whose encoding lacks the printed characters.

examples/faults/surroundings.py does the same at random times, also under mpirun and on terminals.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from small import history, train, write_corpus
from test_parallel import MPIRUN

from hfmpi import streams
from hfmpi.errors import UserError
from hfmpi.files.history import HISTORY
from hfmpi.parallel import failure, library, watchdog

COMMAND = [sys.executable, "-c", "from hfmpi.cli.main import entry; entry()"]
TRAIN = [
    "--optimizer",
    "shf",
    "--hidden",
    "8",
    "--sequence-length",
    "20",
    "--gradient-batch",
    "10",
    "--curvature-batch",
    "4",
]
TRAIN += ["--backend", "numpy"]
LOST = "Note: cannot write to standard output: {}; training continues, and the history contains every step.\n"
FULL = os.strerror(errno.ENOSPC)


@pytest.fixture(scope="module", name="made")
def fixture_made(tmp_path_factory):
    """Create a folder with a corpus and a run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    train(folder / "run", write_corpus(folder / "small.h5"), max_steps=2)
    return folder


def call(*words, **options):
    """Run a command in a separate process; return exit code and standard error."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options
    done = subprocess.run(
        [*COMMAND, *words], stdin=subprocess.DEVNULL, text=True, check=False, timeout=60, **options
    )
    return done.returncode, done.stderr


# Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("closed", "said"), [((), LOST.format(FULL)), ((1,), LOST.format("Bad file descriptor")), ((0, 1, 2), "")]
)
def test_training_goes_on_without_output(closed, said, made, tmp_path):
    words = ("train", str(made / "small.h5"), "--out", str(tmp_path / "run"), *TRAIN, "--max-steps", "3")
    with open("/dev/full", "wb") as log:
        found = call(*words, stdout=log, preexec_fn=lambda: [os.close(number) for number in closed])
    assert found == (0, said)
    assert len(history(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "DONE").exists()


PROGRAM = """
import sys
import numpy as np
import hfmpi
from hfmpi.backends import create
network = hfmpi.Network(cell="rnn", inputs=1, outputs=2, hidden=4, backend=create("numpy"))
data = np.ones((6, 5, 1), np.float32), np.ones((6, 5), int)
before = sys.stdout, sys.stderr
hfmpi.train(network, data, out=sys.argv[1], optimizer="adam", max_steps=3)
assert (sys.stdout, sys.stderr) == before
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "> >(exit)"])
@pytest.mark.parametrize("program", [True, False], ids=["hfmpi.train", "hfmpi train"])
def test_ranks_go_on_whatever_their_streams_are(program, streams, ranks, made, tmp_path):
    if ranks > 1 and MPIRUN is None:
        pytest.skip("there is no mpirun")
    run = str(tmp_path / "run")
    words = [*COMMAND, "train", str(made / "small.h5"), "--out", run, *TRAIN, "--max-steps", "3"]
    if program:
        words = [sys.executable, "-c", PROGRAM, run]
    launcher = [MPIRUN, "-n", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [*launcher, "bash", "-c", f'exec "$@" {streams}', "bash", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lost = streams in (">&-", ">/dev/full", "> >(exit)")
    assert done.stderr.count("Note: cannot write to standard output") == lost
    assert done.stderr.count("\n") == done.stderr.count("Note: ")
    assert len(history(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "DONE").exists()


@pytest.mark.parametrize(("ignored", "encoding"), [(True, "utf-8"), (False, "latin-1")])
def test_a_terminal_that_goes_away(ignored, encoding, made, tmp_path):
    """Under nohup the run continues, otherwise the same event is a SIGHUP, which stops it."""
    master, terminal = os.openpty()

    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    run = tmp_path / "run"
    words = ["train", str(made / "small.h5"), "--out", str(run), *TRAIN, "--max-steps", "30"]
    with subprocess.Popen(
        [*COMMAND, *words],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "xterm", "PYTHONIOENCODING": encoding},
        preexec_fn=nohup if ignored else None,
    ) as process:
        os.close(terminal)
        while not (run / HISTORY).exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.close(master)
        if not ignored:
            process.send_signal(signal.SIGHUP)
        said = process.stderr.read()
    assert (process.returncode, said) == (0, LOST.format(os.strerror(errno.EIO)))
    assert (run / "DONE").exists() == ignored
    assert (run / "checkpoint.h5").exists()


def test_a_stream_waits_for_its_reader(monkeypatch):
    """A process that shares a pipe or a terminal may have made it non-blocking."""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    content, heard = bytes(10**6), bytearray()
    with os.fdopen(ear, "rb") as reader:
        thread = threading.Thread(target=lambda: heard.extend(reader.read()))
        thread.start()
        with streams._Stream(mouth, "w") as stream:
            assert stream.write(content) == len(content)
        thread.join()
    assert heard == content


def test_a_stream_is_told_of_once_and_tried_again(tmp_path, monkeypatch):
    full, other = (os.open(path, os.O_RDWR | os.O_CREAT) for path in ("/dev/full", tmp_path / "other"))
    monkeypatch.setitem(streams._NAMES, full, "standard output")
    with streams._Stream(full, "w") as stream, streams._Stream(other, "w") as stream.other:
        stream.goes_on = True
        for line in (b"first\n", b"second\n"):
            assert stream.write(line) == len(line)
        room = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(room, full)
        os.close(room)
        stream.write(b"third\n")
    assert (tmp_path / "other").read_text() == LOST.format(FULL)
    assert (tmp_path / "log").read_text() == "third\n"


# The other commands ----------------------------------------------------------------------------


@pytest.mark.parametrize(("closed", "why"), [(False, FULL), (True, os.strerror(errno.EBADF))])
def test_a_command_that_cannot_print_says_so(closed, why, made):
    with open("/dev/full", "wb") as log:
        found = call("plot", str(made / "run"), stdout=log, preexec_fn=lambda: closed and os.close(1))
    assert found == (2, f"Error: cannot write to standard output: {why}\n")


@pytest.mark.parametrize("words", ["plot RUN", "evaluate RUN --backend numpy", "train --help"])
def test_a_command_whose_reader_has_left_ends_quietly(words, made):
    ear, mouth = os.pipe()
    os.close(ear)
    assert call(*words.replace("RUN", str(made / "run")).split(), stdout=mouth) == (1, "")
    os.close(mouth)


def test_a_mistake_keeps_its_code_where_it_cannot_be_said(tmp_path):
    with open("/dev/full", "wb") as log:
        assert call("plot", str(tmp_path), stderr=log)[0] == 2
    assert call("plot", str(tmp_path), preexec_fn=lambda: os.close(2)) == (2, "")


PMIX = {"PMIX_RANK": "7", "PMIX_NAMESPACE": "slurm.pmix.1.0"}


@pytest.mark.parametrize(("words", "said"), [
    (["sample", "absent"], "Error: there is no checkpoint"),
    (["train", "absent", "--out", "run"], "Error: the launcher started 8 processes, but it uses PMIx"),
])  # fmt: skip
def test_a_shell_that_a_launcher_started_as_another_rank_than_0(words, said, tmp_path):
    try:
        library.load()  # an import of mpi4py.MPI would start MPI, for all later tests of this process
    except (ImportError, RuntimeError, OSError):
        pytest.skip("mpi4py finds no MPI library")
    master, terminal = os.openpty()
    environment = os.environ | PMIX
    assert call(*words, env=environment, cwd=tmp_path) == (2, "")  # rank 0 reports it
    assert call(*words, env=environment, cwd=tmp_path, stderr=terminal) == (2, None)
    os.close(terminal)
    told = os.read(master, 10_000).decode()
    os.close(master)
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_encoding_without_the_letters(encoding, made, tmp_path):
    """The small charts consist of block characters; the name of a file may be no valid text."""
    strange = os.fsencode(tmp_path) + b"/caf\xe9.run"
    os.symlink(made / "run", strange)
    with open(tmp_path / "said", "wb") as log:
        found = call("evaluate", strange, "--data", str(made / "small.h5"), "--backend", "numpy", stdout=log)
        assert found == (0, "")
        found = call("plot", strange, stdout=log, env=os.environ | {"PYTHONIOENCODING": encoding})
        assert found == (0, "")
    assert "train_bpc" in (tmp_path / "said").read_text("latin-1")


# Who leaves ------------------------------------------------------------------------------------


class Broken:
    """A standard error that cannot be written."""

    def write(self, text):
        raise OSError(errno.ENOSPC, FULL)

    flush = write


@pytest.mark.parametrize("stream", [Broken(), None])
def test_who_leaves_does_not_fail_over_what_it_has_to_say(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    failure._say(UserError("it is lost"))

    def write(number, content):
        raise OSError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(watchdog.os, "write", write)
    watchdog._say("it is lost")
