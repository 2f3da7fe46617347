"""What the kinds of faults share: a registry, one disturbed command, and undisturbed runs."""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from ranks import WORDS, outcome

STEPS, LIMIT = 40, 60  # steps of a run; seconds after which a command counts as hung
TRAIN = (
    "--optimizer shf --hidden 8 --sequence-length 20 --gradient-batch 10 --curvature-batch 4 "
    "--set cg_max_steps=4 --backend numpy --threads 1 "
    "--checkpoint-every 1000 --evaluate-every 10 --stall-timeout 20 "
    f"--max-steps {STEPS}"
).split()
HFMPI = [sys.executable, "-c", "from hfmpi.cli.main import entry; entry()"]
ENCODINGS = [
    *({"PYTHONIOENCODING": name} for name in ("ascii", "latin-1", "cp437", "utf-16")),
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
KINDS = {}
"""Functions of a `Trial` by the name of their row in the table."""


def kind(name):
    """Register a kind of fault: a function that asserts the expected behaviour."""

    def register(function):
        KINDS[name] = function
        return function

    return register


class Trial:
    """One disturbed command in a separate folder.

    Attributes
    ----------
    folder, run, data : Path
        The trial's folder, the folder of the run in it, and a small corpus.
    rng : random.Random
        The only source of random numbers.
    good : Path
        The folder of a finished run, which must not be written to.
    ranks : int
        The number of ranks of `start`; 1: without a launcher.
    """

    def __init__(self, bench, folder, rng):
        self.bench, self.folder, self.rng = bench, folder, rng
        self.run, self.data, self.good, self.ranks = folder / "run", bench.data, bench.good(1), 1
        self.note = ""  # the random choices
        folder.mkdir()

    def command(self, *words, **options):
        """Run a command; return its exit code, standard output and standard error."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.folder} | options
        if "input" not in options:
            options["stdin"] = subprocess.DEVNULL
        words = [*options.pop("launcher", ()), *HFMPI, *map(str, words)]
        options = {"errors": "replace", "timeout": LIMIT} | options
        done = subprocess.run(words, check=False, **options)
        return done.returncode, done.stdout or "", done.stderr or ""

    def another(self):
        """Return the arguments of a command that prints."""
        words = self.rng.choice(
            ["evaluate RUN", "evaluate RUN --json", "plot RUN", "sample RUN --length 20", "info", "--help",
             "train --help", "speedup RUN", "prepare TEXT OUT"]
        ).split()  # fmt: skip
        self.note = " ".join(words)
        places = {"RUN": self.good, "TEXT": self.bench.text, "OUT": self.folder / "out.h5"}
        return [places.get(word, word) for word in words]

    def refused(self, code, said):
        """Return whether a command was refused; assert that it either worked or printed one sentence."""
        assert code in (0, 2), f"code {code}: {said}"
        assert code == 0 or (said.startswith("Error: ") and said.count("\n") == 1), said
        return code == 2

    def words(self, launcher=(), shell=()):
        """Return the command line that trains on the trial's number of ranks."""
        if not launcher and self.ranks > 1:
            launcher = [*self.bench.mpirun, "-n", self.ranks]
        return [
            str(word) for word in (*launcher, *shell, *HFMPI, "train", self.data, "--out", self.run, *TRAIN)
        ]

    def start(self, launcher=(), shell=(), **options):
        """Start to train; `shell` is put before the command of each rank."""
        with (self.folder / "stderr").open("wb") as said:
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said} | options
            return subprocess.Popen(self.words(launcher, shell), cwd=self.folder, **options)

    def moment(self, begun=True):
        """Sleep until a random step of the run, or a random time of its start."""
        if not begun:
            time.sleep(self.rng.uniform(0, 1.5))
            return
        step, deadline = self.rng.randint(1, STEPS - 5), time.monotonic() + LIMIT
        while self.history() < step and time.monotonic() < deadline:
            time.sleep(0.002)

    def history(self):
        """Return the number of lines of the history."""
        with contextlib.suppress(OSError):
            return (self.run / "history.jsonl").read_bytes().count(b"\n")
        return 0

    def processes(self):
        """Return the processes of the run, including its launcher, the oldest first."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"--out\0{self.run}\0".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return sorted(found)

    def end(self, process):
        """Wait for the end of a training; return its exit code when none of its processes is left."""
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            code = None
        deadline = time.monotonic() + LIMIT
        while code is not None and self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        left = self.processes()
        for number in left:
            with contextlib.suppress(OSError):
                os.kill(number, signal.SIGKILL)
        process.wait()
        assert not left, f"{len(left)} processes did not end"
        assert "Traceback" not in self.said(), "a traceback was printed"
        return code

    def said(self):
        """Return the standard error of the training."""
        return (self.folder / "stderr").read_text(errors="replace")

    def finished(self):
        """Assert that the run has finished in spite of the fault."""
        assert (self.run / "DONE").exists(), f"stopped after {self.history()} steps"
        assert outcome(self.run) == outcome(self.bench.good(self.ranks)), "different results"

    def resumed(self, lost=0):
        """Assert that at most `lost` steps are lost, and that the same command completes the run."""
        from hfmpi.files import checkpoint

        steps, saved = self.history(), 0
        if steps or (self.run / checkpoint.NEWEST).exists():
            with contextlib.suppress(Exception):
                saved = checkpoint.latest(self.run).meta["step"]
        assert steps - saved <= lost, f"{steps - saved} of {steps} steps lost"
        code = self.end(self.start())
        assert code == 0, f"the next start ended with {code}"
        self.finished()


class Bench:
    """Shared by the trials: a text, its corpus, and undisturbed runs by number of ranks."""

    def __init__(self, folder, mpirun):
        self.folder, self.mpirun = folder, mpirun
        self.text, self.data = folder / "text.txt", folder / "small.h5"
        rng = random.Random(0)
        self.text.write_text(" ".join(rng.choice(WORDS) for _ in range(1100))[:4500])
        from hfmpi.data.prepare import prepare

        prepare(self.text.read_bytes())[0].write(self.data)
        self.runs = {}

    @functools.cached_property
    def with_numpy(self):
        """Return the results of `evaluate` for the good run."""
        words = [*HFMPI, "evaluate", self.good(1), "--backend", "numpy", "--json"]
        return json.loads(subprocess.run(words, check=True, capture_output=True).stdout)

    def good(self, ranks):
        """Return the undisturbed run on a number of ranks."""
        if ranks not in self.runs:
            self.runs[ranks] = self.folder / f"good {ranks}"  # before the trial below asks for it
            trial = Trial(self, self.folder / f"good {ranks} log", random.Random(0))
            trial.ranks, trial.run = ranks, self.runs[ranks]
            code = trial.end(trial.start())
            if code != 0:
                sys.exit(f"a run without faults ended with {code}:\n{trial.said()}")
        return self.runs[ranks]
