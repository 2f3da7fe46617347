"""Faults of a run's environment and of the inputs of commands; prints one table.

    python examples/faults/surroundings.py [--trials 150] [--seed 0] [--kinds WORD ...]

Each trial draws a kind of fault and its time. A kind is a function in a registry: it disturbs a command and
asserts the expected behaviour. This file contains the kinds that break output or send signals, limits.py
those that limit a process or give it wrong information, inputs.py those of texts and arguments. After a
disturbed training no process or file of it may be left over, no traceback printed, and no step lost unless
the kind allows it; the same command, run again, must end with the theta and the history of an undisturbed
run, bit for bit. Other commands must print the same as undisturbed, or refuse in one sentence. The exit code
is 0 if all of this held. Linux only.
"""

import argparse
import contextlib
import fcntl
import os
import pty
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import Counter
from pathlib import Path

import inputs  # noqa: F401  registers kinds
import limits  # noqa: F401
from ranks import versions
from trial import ENCODINGS, KINDS, LIMIT, STEPS, Bench, Trial, kind

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from nodes import nodes, obstacle

# Standard output and error of a training --------------------------------------------------------


def lost_once(trial):
    """Assert that a lost output was reported once."""
    assert trial.said().count("cannot write to standard output") == 1, "not reported once"


def full(trial, ranks):
    """Train with a log on a full disk."""
    trial.ranks = ranks
    with open("/dev/full", "wb") as log:
        return trial.end(trial.start(stdout=log))


@kind("full log")
def full_log(trial):
    assert full(trial, 1) == 0
    lost_once(trial)
    trial.finished()


@kind("full log, mpirun")
def full_log_mpirun(trial):
    full(trial, 2)  # MPICH's mpirun exits
    trial.resumed()


@kind("full log of all")
def full_log_of_all(trial):
    with open("/dev/full", "wb") as log:
        assert trial.end(trial.start(stdout=log, stderr=log)) == 0
    trial.finished()


@kind("closed")
def closed(trial):
    which = trial.rng.choice([(1,), (2,), (1, 2), (0, 1, 2)])
    trial.note = f"closed {which}"

    def close():
        for number in which:
            os.close(number)

    assert trial.end(trial.start(preexec_fn=close)) == 0
    if which == (1,):
        lost_once(trial)
    trial.finished()


STREAMS = (
    *("<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&-", "<&- >&- 2>&-", "</dev/null 1<&0", ">/dev/full"),
    *("2>/dev/full", ">/dev/full 2>&1", "> >(exit)", "> >(head -1)", "2> >(exit)", "> >(head -1) 2>&1"),
)
PROGRAM = """
import sys
import numpy as np
import hfmpi
from hfmpi.backends import create
network = hfmpi.Network(cell="gru", inputs=4, outputs=4, hidden=5, backend=create("numpy", "float64"))
x = np.random.default_rng(0).integers(0, 4, (60, 9))
hfmpi.train(network, (x, x), (x, x), out=sys.argv[2], optimizer="bhf-short", gradient_batch=30,
            curvature_batch=10, max_steps=5, evaluate_every=2)
"""


def with_streams(trial):
    """Draw streams for all ranks or for one; return the shell command that redirects them."""
    trial.ranks = trial.rng.choice((1, 2, 2, 3))
    streams, rank = trial.rng.choice(STREAMS), trial.rng.choice(["", *range(trial.ranks)])
    trial.note = f"{streams} on rank {rank} of {trial.ranks}"
    chosen = f'[ "${{PMI_RANK:-{rank}}}" = "{rank}" ]' if rank != "" else "true"
    return ["bash", "-c", f'if {chosen}; then exec "$@" {streams}; else exec "$@"; fi', "bash"]


@kind("streams of ranks")
def streams_of_ranks(trial):
    process = trial.start(shell=with_streams(trial), stdout=subprocess.DEVNULL)
    assert trial.end(process) == 0
    trial.finished()


@kind("streams of a program")
def streams_of_a_program(trial):
    shell = with_streams(trial)
    launcher = [*trial.bench.mpirun, "-n", str(trial.ranks)] if trial.ranks > 1 else []
    words = [*launcher, *shell, sys.executable, "-c", PROGRAM, "--out", str(trial.run), "end"]
    with (trial.folder / "stderr").open("wb") as said:
        process = subprocess.Popen(
            words, cwd=trial.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
    assert trial.end(process) == 0
    assert (trial.run / "DONE").exists()
    assert trial.history() == 5


# Several nodes ----------------------------------------------------------------------------------


def on_nodes(name):
    """Register a kind if nodes can be simulated."""
    return kind(name) if obstacle() is None else lambda function: function


def lost_node(trial, lose):
    """Train on nodes, and lose one at a random time; the others must end, and the run must resume."""
    ranks = trial.rng.choice([(1, 1), (2, 1), (1, 1, 1), (2, 1, 1)])
    trial.ranks = sum(ranks)
    folder = trial.bench.folder / trial.folder.name.replace(" ", "")  # mpirun's launcher splits at spaces
    folder.mkdir()
    with nodes(folder, *ranks) as cluster:
        process = trial.start(launcher=cluster.mpirun)
        trial.moment()
        name = trial.rng.choice(
            [name for name, count in zip(cluster.names, ranks, strict=True) if count == 1]
        )
        trial.note = f"{name} of {ranks} after {trial.history()} steps"
        lose(cluster, name)
        code = trial.end(process)
    if not (trial.run / "DONE").exists():
        assert code != 0
        errors = [line for line in trial.said().splitlines() if line.startswith("Error: ")]
        # With two nodes it is not known which one is cut off, and rank 0 is on the first.
        assert f"on {name})" in errors[0] or (name, len(ranks)) == ("nodea", 2), "not named"
    trial.resumed(lost=STEPS)


@on_nodes("stopped alone on its node")
def stopped_alone(trial):
    def stop(cluster, name):
        space = os.readlink(f"/proc/{cluster.holders[name]}/ns/uts")
        here = [n for n in trial.processes() if os.readlink(f"/proc/{n}/ns/uts") == space]
        if here:
            os.kill(here[-1], signal.SIGSTOP)

    lost_node(trial, stop)


@on_nodes("node cut off")
def cut_off(trial):
    lost_node(trial, lambda cluster, name: cluster.cut_off(name))


def head(trial, ranks):
    """Train with a reader that closes the pipe."""
    trial.ranks = ranks
    process = trial.start(stdout=subprocess.PIPE)
    process.stdout.readline()
    if trial.rng.random() < 0.5:
        trial.moment()
    process.stdout.close()
    return trial.end(process)


@kind("| head")
def reader_leaves(trial):
    assert head(trial, 1) == 0
    trial.finished()


@kind("| head, mpirun")
def reader_leaves_mpirun(trial):
    head(trial, 2)
    trial.resumed()


def on_a_terminal(trial, goes=True, ignored=True, **environment):
    """Train on a terminal that is closed at a random time, under nohup if SIGHUP is ignored."""
    master, terminal = pty.openpty()
    gone = threading.Event()

    def attach():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    def read():
        while not gone.is_set():
            with contextlib.suppress(OSError):
                if select.select([master], [], [], 0.05)[0]:
                    os.read(master, 10_000)

    errors = {} if trial.rng.random() < 0.5 else {"stderr": terminal}
    environment = os.environ | {"TERM": "xterm"} | environment
    process = trial.start(stdin=terminal, stdout=terminal, preexec_fn=attach, env=environment, **errors)
    os.close(terminal)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    if goes:
        trial.moment(begun=trial.rng.random() < 0.7)
    else:
        process.wait(LIMIT)
    gone.set()
    reader.join()
    os.close(master)
    return trial.end(process)


@kind("terminal gone, nohup")
def terminal_gone(trial):
    assert on_a_terminal(trial) == 0
    trial.finished()


@kind("terminal gone")
def terminal_gone_with_sighup(trial):
    on_a_terminal(trial, ignored=False)
    trial.resumed()


@kind("terminal gone, mpirun")
def terminal_gone_mpirun(trial):
    trial.ranks = 2
    on_a_terminal(trial, ignored=trial.rng.random() < 0.5)
    trial.resumed()


@kind("terminal, encoding")
def terminal_in_another_encoding(trial):
    encoding = trial.rng.choice(ENCODINGS)
    trial.note = str(encoding)
    assert on_a_terminal(trial, goes=False, **encoding) == 0
    trial.finished()


# Signals ----------------------------------------------------------------------------------------


def stopped(trial, process, target):
    """Send a random signal at a random time; during the start, with nothing to lose, it may kill."""
    name = trial.rng.choice(["SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
    begun = name == "SIGINT" or trial.rng.random() < 0.7
    trial.moment(begun)
    trial.note = f"{name} after {trial.history()} steps"
    with contextlib.suppress(OSError, IndexError):
        os.kill(target(), getattr(signal, name))
    code = trial.end(process)
    trial.resumed()
    return code if begun else 0


@kind("signal to hfmpi")
def signal_to_the_process(trial):
    process = trial.start(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert stopped(trial, process, lambda: process.pid) == 0


@kind("signal to a rank")
def signal_to_a_rank(trial):
    trial.ranks = 2
    process = trial.start()
    assert stopped(trial, process, lambda: trial.rng.choice(trial.processes()[1:])) == 0


@kind("signal to mpirun")
def signal_to_mpirun(trial):
    trial.ranks = 2
    process = trial.start(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    stopped(trial, process, lambda: process.pid)


@kind("mpirun killed")
def mpirun_killed(trial):
    trial.ranks = 2
    process = trial.start()
    trial.moment()
    process.kill()
    trial.end(process)
    trial.resumed()


@kind("nohup")
def nohup(trial):
    trial.ranks = trial.rng.choice((1, 2))
    process = trial.start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    for _ in range(3):
        trial.moment()
        for number in trial.processes():
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGHUP)
    assert trial.end(process) == 0
    trial.finished()


@kind("killed, and said")
def killed(trial):
    process = trial.start()
    trial.moment()
    process.kill()
    trial.end(process)
    steps, done = trial.history(), (trial.run / "DONE").exists()
    trial.resumed(lost=STEPS)
    note = f": {steps} step(s) after the last checkpoint will be recomputed"
    assert done or note in trial.said(), "not reported"


# The other commands -----------------------------------------------------------------------------


@kind("command, full disk")
def command_on_a_full_disk(trial):
    with open("/dev/full", "wb") as log:
        code, _, said = trial.command(*trial.another(), stdout=log)
    assert (code, said) == (
        2, "Error: cannot write to standard output: No space left on device\n"
    ), said  # fmt: skip


@kind("command, closed")
def command_without_output(trial):
    number = trial.rng.choice((1, 2))
    code, _, said = trial.command(*trial.another(), preexec_fn=lambda: os.close(number))
    assert code == (2 if number == 1 else 0), said
    assert "Traceback" not in said, said


@kind("command | head")
def command_without_reader(trial):
    ear, mouth = os.pipe()
    os.close(ear)
    code, _, said = trial.command(*trial.another(), stdout=mouth)
    os.close(mouth)
    said = [line for line in said.splitlines() if "compiling kernels" not in line]  # slow machines
    assert (code, said) == (1, []), f"{code} {said}"


@kind("command, encoding")
def command_in_another_encoding(trial):
    encoding = trial.rng.choice(ENCODINGS)
    code, _, said = trial.command(*trial.another(), env=os.environ | encoding)
    assert (code, said) == (0, ""), f"{encoding} {code} {said}"


# The campaign -----------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mpirun", default="mpirun", help="command, such as 'mpirun --oversubscribe'")
    parser.add_argument(
        "--kinds", nargs="*", default=[""], help="run kinds whose name contains one of these words"
    )
    options = parser.parse_args()
    names = [name for name in KINDS if any(word in name for word in options.kinds)]
    rows, failed, begin = {name: Counter() for name in names}, 0, time.monotonic()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), shlex.split(options.mpirun))
        for number in range(options.trials):
            name = names[number % len(names)]  # every kind occurs before one is repeated
            trial = Trial(bench, bench.folder / f"trial {number}", random.Random(f"{options.seed} {number}"))
            row, started = rows[name], time.monotonic()
            row["trials"] += 1
            try:
                KINDS[name](trial)
            except Exception as error:
                said = trial.said() if (trial.folder / "stderr").exists() else ""
                failed += 1
                print(f"FAILED trial {number}: {name}: {trial.note}: {error!r}\n{said}", flush=True)
            else:
                row["held"] += 1
            row["longest"] = max(row["longest"], time.monotonic() - started)
            shutil.rmtree(trial.folder, ignore_errors=True)
    print(shlex.join(["python", *sys.argv]))
    print(versions(bench.mpirun))
    print("| fault | trials | held | longest, s |\n|---|---:|---:|---:|")
    for name, row in rows.items():
        print(
            f"| {name.replace('|', chr(92) + '|')} | {row['trials']} | {row['held']} | {row['longest']:.1f} |"
        )
    total = sum(row["held"] for row in rows.values())
    print(f"| **all** | {options.trials} | {total} | |\n{time.monotonic() - begin:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
