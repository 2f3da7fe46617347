"""Passes thousands of damaged and hostile files to the commands, and checks their messages and results.

    python examples/faults/files.py [--files 8000] [--seed 0] [--only WORD]

Each file is passed to `hfmpi evaluate`, and a checkpoint that is accepted is also passed to `hfmpi train`,
which resumes from it; histories are passed to `hfmpi plot` and `hfmpi train`, configurations to `hfmpi
train`. A run with a corpus or checkpoint that belongs to a different run must be refused by `evaluate` and
`train` with a message that names the reason. The commands run in worker processes, each of which processes
many files, under a limit of memory and, for each file, of time. A traceback, a crash of the worker, a wrong
content or message, and too much memory or time are failures.
Linux only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import platform
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import h5py
import hostile
import numpy as np

import hfmpi
from hfmpi.cli.main import entry
from hfmpi.data.corpus import Corpus
from hfmpi.data.prepare import prepare
from hfmpi.files import checkpoint

LIMIT_MEMORY = 256 * 2**20  # bytes of address space that a worker may use in addition to that of a good run
LIMIT_SECONDS = 20  # per file
SMALL = (
    "--optimizer shf --hidden 8 --sequence-length 20 --gradient-batch 10 --curvature-batch 4 --backend numpy"
)
SHARES = {
    "corpus: bytes damaged": 20,
    "checkpoint: bytes damaged": 20,
    "corpus: structures damaged, their checksums right": 12,
    "checkpoint: structures damaged, their checksums right": 12,
    "corpus: hostile structure": 9,
    "checkpoint: hostile structure": 9,
    "checkpoint: hostile meaning, digest right": 8,
    "history.jsonl: lines damaged": 3,
    "config.toml: lines damaged": 1,
    "run: its corpus changed, moved or in use": 4,
    "run: another run's checkpoint": 2,
}
"""Kinds of files, with the percentage of each."""


class Bench:
    """Valid files, and the checks of damaged files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "good.h5"
        self.taken = 0  # maximum number of bytes that a command used
        words = b"in the beginning was word and with god it all things were made by him".split()
        rng = np.random.default_rng(0)
        prepare(b" ".join(words[k] for k in rng.integers(len(words), size=4500))[:4500])[0].write(self.data)
        code, said = self.call("train", self.data, "--out", folder / "run", *SMALL.split(), "--max-steps", 2)
        assert code == 0, said
        # A damaged config.toml may choose Numba, whose compilation must not count as a hang.
        words = ("train", self.data, "--out", folder / "numba", *SMALL.split(), "--backend", "numba")
        code, said = self.call(*words, "--max-steps", 1)
        assert code == 0, said
        self.checkpoint = folder / "run" / checkpoint.NEWEST
        self.corpus = Corpus.read(self.data)
        self.trained = checkpoint.load(self.checkpoint)
        shutil.copy(self.checkpoint, folder / "checkpoint.h5")
        self.good = {"corpus": self.data.read_bytes(), "checkpoint": self.checkpoint.read_bytes()}
        self.others = {}  # checkpoints of runs that differ in one setting
        for other in ("--seed 1", "--layers 2", "--set damping=1", "--optimizer bhf"):
            run = folder / f"other {len(self.others)}"
            words = [*SMALL.split(), *other.split(), "--max-steps", rng.integers(1, 4)]
            code, said = self.call("train", self.data, "--out", run, *words)
            assert code == 0, said
            self.others[other] = run / checkpoint.NEWEST
        self.blocks = {kind: hostile.blocks(content) for kind, content in self.good.items()}
        assert all(len(found) >= 4 for found in self.blocks.values()), self.blocks
        for words in (("evaluate", folder / "run"), ("plot", folder / "run", "--out", folder / "figure.png")):
            code, said = self.call(*words)
            assert code == 0, said

    def call(self, *words: object) -> tuple[int, str]:
        """Run a command in this process; return exit code and stderr, or -1 and an uncaught exception."""
        sys.argv = ["hfmpi", *map(str, words)]
        said = io.StringIO()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
        before = memory("VmRSS")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                entry()
            except SystemExit as leaving:
                return (leaving.code if isinstance(leaving.code, int) else 1), said.getvalue()
            except Exception as error:
                return -1, f"{type(error).__name__}: {error}"
            finally:
                self.taken = max(self.taken, memory("VmHWM") - before)
        return 0, said.getvalue()

    def judge(self, code: int, said: str) -> str:
        """Return the verdict on a file; capital letters mean a failure."""
        if code < 0:
            return f"TRACEBACK {said}"
        counted = "hidden units have" in said  # a limit of size, checked before allocation
        if "memory" in said and ("not enough" in said or "needs more" in said) and not counted:
            return f"MEMORY {said}"
        if code == 0:
            return "loaded"
        if code != 2 or not said.startswith("Error: ") or said.count("\n") != 1:
            return f"NO SENTENCE {code} {said}"
        return "refused by its digest" if "match its digest" in said else "refused"

    def one(self, kind: str, number: int, folder: Path) -> tuple[str, str]:
        """Create a file and pass it to the commands; return how it was created and the verdict."""
        rng = random.Random(f"{kind} {number}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        what = kind.partition(":")[0]
        if what == "run":
            return self.try_run(kind, folder, rng)
        if what in ("corpus", "checkpoint"):
            path = folder / f"{what}.h5"
            how = self.make(kind, what, path, rng)
            if what == "corpus":
                return how, self.try_corpus(path)
            return how, self.try_checkpoint(path, strict="meaning" not in kind)
        if what == "history.jsonl":
            how, content = hostile.change_text((self.folder / "run" / what).read_bytes() * 3, rng)
            (folder / what).write_bytes(content)
            shutil.copy(self.checkpoint, folder)
            found = self.judge(*self.call("plot", folder, "--out", folder / "figure.png"))
            again = self.judge(*self.resume(folder))
            return how, found if again == "loaded" else f"RESUME {again}"
        how, content = hostile.change_text((self.folder / "run" / what).read_bytes(), rng)
        (folder / what).write_bytes(content)
        options = (
            "--optimizer",
            "shf",
            "--hidden",
            8,
            "--gradient-batch",
            10,
            "--curvature-batch",
            4,
            "--max-steps",
            1,
        )
        words = ("train", self.data, "--out", folder / "new", "--config", folder / what)
        return how, self.judge(*self.call(*words, *options, "--sequence-length", 20))

    def make(self, kind: str, what: str, path: Path, rng: random.Random) -> str:
        """Write a damaged file and return how it was damaged."""
        if "structures" in kind:
            how, content = hostile.damage_structure(self.good[what], self.blocks[what], rng)
        elif "bytes" in kind:
            how, content = hostile.damage_bytes(self.good[what], rng)
        elif "meaning" in kind:
            return hostile.change_meaning(path, self.trained, rng)
        else:
            names = ("train", "valid", "symbols") if what == "corpus" else ("theta", "state/direction")
            good = self.data if what == "corpus" else self.folder / "checkpoint.h5"
            return hostile.change_structure(path, names, rng, good)
        path.write_bytes(content)
        return how

    def try_corpus(self, path: Path) -> str:
        """Evaluate on a corpus; if it is loaded, its content must be that of the good corpus."""
        found = self.judge(*self.call("evaluate", self.folder / "run", "--data", path, "--backend", "numpy"))
        if found == "loaded" and Corpus.read(path).digest != self.corpus.digest:
            return "WRONG CONTENT"
        return found

    def try_checkpoint(self, path: Path, strict: bool) -> str:
        """Evaluate a checkpoint and resume from it; if `strict`, its content must be that of the good one."""
        found = self.judge(*self.call("evaluate", path, "--backend", "numpy"))
        if found[0].isupper() or (strict and found != "loaded"):
            return found
        found = self.judge(*self.resume(path.parent))
        if found == "loaded" and strict:
            before = checkpoint.load(path.parent / checkpoint.PREVIOUS)  # the one from which it resumed
            if before.theta.tobytes() != self.trained.theta.tobytes() or before.meta != self.trained.meta:
                return "WRONG CONTENT"
        return found

    def try_run(self, kind: str, folder: Path, rng: random.Random) -> tuple[str, str]:
        """Change the files of a run; it must be refused for the right reason, or resume correctly."""
        run, data, newest = folder / "run", folder / "corpus.h5", folder / "run" / checkpoint.NEWEST
        run.mkdir()
        checkpoint.save(
            newest, self.trained.theta, self.trained.state, self.trained.meta | {"data": str(data)}
        )
        if "corpus" in kind:
            how, *words = hostile.change_corpus(data, self.data, rng)
        else:
            how, words = rng.choice(sorted(self.others)), ["belong to different runs"] * 2
            shutil.copy(self.data, data)
            newest.rename(run / checkpoint.PREVIOUS)
            shutil.copy(self.others[how], newest)
        found = ""
        evaluated = self.call("evaluate", run, "--backend", "numpy")
        for (code, said), word in zip((evaluated, self.resume(run, data)), words, strict=True):
            found = self.judge(code, said)
            if not found[0].isupper() and ((code == 0) == bool(word) or word not in said):
                found = f"WRONG WORDS {said}"
            if found[0].isupper():
                break
        return how, found

    def resume(self, folder: Path, data: Path | None = None) -> tuple[int, str]:
        """Resume for one step; notes about files that were set aside are allowed."""
        code, said = self.call(
            "train", data or self.data, "--out", folder, "--max-steps", 3, "--backend", "numpy"
        )
        lines = said.splitlines(keepends=True)
        return code, "".join(line for line in lines if not line.startswith("Note: "))


def memory(key: str) -> int:
    """Return the value of a line of /proc/self/status in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0])


def work(bench: Bench, tasks: list[tuple[str, int]], first: int, step: int, pipe: int) -> None:
    """Process every `step`th task from the first; report the start and the result of each."""
    limit = memory("VmSize") + LIMIT_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    folder = bench.folder / f"work {first % step}"
    for k in range(first, len(tasks), step):
        os.write(pipe, f"{k}\n".encode())
        bench.taken = 0
        how, found = bench.one(*tasks[k], folder)
        line = f"{k}\t{how}\t{bench.taken}\t{' '.join(found.split())}"
        os.write(pipe, line.encode("utf-8", "replace")[:1000] + b"\n")


def drive(bench: Bench, tasks: list[tuple[str, int]], workers: int):
    """Keep the workers busy; yield the task, how it was damaged, its memory and its result."""
    running: dict[int, list] = {}  # by pipe: process, task, time, unread bytes, worker

    def start(first: int) -> None:
        if first >= len(tasks):
            return
        receive, send = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(receive)
            code = 1
            try:
                work(bench, tasks, first, workers, send)
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        os.close(send)
        running[receive] = [process, first, time.monotonic(), b""]

    for worker in range(workers):
        start(worker)
    while running:
        ready = select.select(list(running), [], [], 1)[0]
        for pipe in list(running):
            entry_ = running[pipe]
            part = os.read(pipe, 2**16) if pipe in ready else b""
            if part:
                *lines, entry_[3] = (entry_[3] + part).split(b"\n")
                for line in lines:
                    words = line.decode(errors="replace").split("\t", 3)
                    entry_[1], entry_[2] = int(words[0]), time.monotonic()
                    if len(words) > 1:
                        yield entry_[1], words[1], int(words[2]), words[3]
                continue
            hangs = time.monotonic() - entry_[2] > LIMIT_SECONDS
            if pipe in ready or hangs:
                if hangs:
                    os.kill(entry_[0], signal.SIGKILL)
                status = os.waitpid(entry_[0], 0)[1]
                del running[pipe]
                os.close(pipe)
                if hangs or status:
                    yield entry_[1], "?", 0, "HANG" if hangs else f"CRASH {status}"
                    start(entry_[1] + workers)


def main() -> None:
    """Print the table; exit with code 1 after a failure."""
    command = list(sys.argv)  # the tested commands overwrite sys.argv
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", default="", help="run kinds whose name contains this word")
    asked = parser.parse_args()
    kinds = {kind: share for kind, share in SHARES.items() if asked.only in kind}
    whole = sum(kinds.values())
    first = asked.seed * 10**9
    tasks = [(kind, first + k) for kind in kinds for k in range(asked.files * kinds[kind] // whole)]
    random.Random(0).shuffle(tasks)
    counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in kinds}
    most = dict.fromkeys(kinds, 0)
    failures, begin = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for k, how, taken, found in drive(bench, tasks, asked.workers):
            kind, number = tasks[k]
            failed = found[0].isupper()
            counts[kind]["failed" if failed else found] += 1
            most[kind] = max(most[kind], taken)
            if failed:
                failures.append(f"{kind} {number} ({how}): {found}")
    columns = ("refused", "refused by its digest", "loaded", "failed")
    print("python " + " ".join(command))
    print(
        f"hfmpi {hfmpi.__version__}, Python {platform.python_version()}, h5py {h5py.__version__}, "
        f"HDF5 {h5py.version.hdf5_version}, NumPy {np.__version__}"
    )
    print("| files | " + " | ".join(columns) + " | most memory |\n|---|" + "---:|" * (len(columns) + 1))
    for kind, count in counts.items():
        print(
            f"| {kind} | " + " | ".join(f"{count[column]:,}" for column in columns),
            end=f" | {most[kind] / 2**20:.1f} MiB |\n",
        )
    total = sum((count for count in counts.values()), collections.Counter())
    print("| **all** | " + " | ".join(f"{total[column]:,}" for column in columns) + " | |")
    print(
        f"{sum(total.values()):,} files in {time.monotonic() - begin:.0f} s; "
        f"limits for each: {LIMIT_SECONDS} s and {LIMIT_MEMORY >> 20} MiB"
    )
    for failure in failures[:40]:
        print("FAILED", failure)
    sys.exit(bool(failures) or sum(total.values()) != len(tasks))


if __name__ == "__main__":
    main()
