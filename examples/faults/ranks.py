"""Random faults on random ranks at random times in small training runs under mpirun; prints one table.

    python examples/faults/ranks.py --trials 200 --seed 0

Each trial trains on 2 to 4 ranks, one of which gets a fault. Afterwards every process of the run must have
ended, the checkpoint must load, and the same command without a fault must end with the theta and the history
of an undisturbed run, bit for bit. The exit code is 0 if all of this held.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np

STEPS, LIMIT = 6, 60  # steps of a run; seconds after which a trial counts as hung
FAULTS = {  # weights
    "SIGKILL": 3, "SIGSEGV": 2, "SIGSTOP": 2, "os._exit(0)": 2, "os._exit(3)": 2, "sys.exit(0)": 2,
    "sys.exit(3)": 1, "exception": 2, "hang": 1, "bit of theta": 2,
}  # fmt: skip
WORDS = "in", "the", "beginning", "was", "word", "and", "all", "things", "were", "made", "by", "him"
PLACES = ("input", "before Allreduce", "in Allreduce", "in Bcast", "writing a file", "history", "any time")
TRAIN = (
    "--optimizer shf --hidden 8 --sequence-length 20 --gradient-batch 10 --curvature-batch 4 "
    "--set cg_max_steps=4 --backend numpy --threads 1 "
    "--checkpoint-every 2 --evaluate-every 3 --check-every 1 --stall-timeout 6 "
    f"--max-steps {STEPS}"
).split()


# In a rank: training with an injected fault -----------------------------------------------------


def strike(fault, folder):
    """Execute the fault, and record the time."""
    (folder / "struck").write_text(repr(time.time()))
    if fault == "SIGSEGV":
        ctypes.string_at(0)
    elif fault.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, fault))
    elif fault == "hang":
        time.sleep(10**6)
    elif fault == "exception":
        raise RuntimeError("planted")
    elif fault.startswith("sys"):
        sys.exit(int(fault[-2]))
    else:
        os._exit(int(fault[-2]))


def plant(fault, place, number, folder):
    """Count the calls of a rank at each location; at the chosen location and count, inject the fault."""
    from hfmpi.data.batches import Sequences
    from hfmpi.files import atomic
    from hfmpi.files.history import History
    from hfmpi.parallel.communicator import MPICommunicator
    from hfmpi.runs.train import Run

    counts = Counter()

    def hook(owner, name, *places):
        honest = getattr(owner, name)

        def hooked(*arguments, **options):
            for here in places:
                counts[here] += 1
                if here == place and counts[here] == number:
                    if here == "in Allreduce" and fault not in ("exception", "sys.exit(0)", "sys.exit(3)"):
                        threading.Timer(2e-4 * (number % 7), strike, (fault, folder)).start()
                    else:
                        strike(fault, folder)
            return honest(*arguments, **options)

        setattr(owner, name, hooked)

    hook(Sequences, "take", "input")
    hook(MPICommunicator, "sum", "before Allreduce", "in Allreduce")
    hook(MPICommunicator, "agree", "in Bcast")
    hook(atomic.os, "fsync", "writing a file")
    hook(atomic.os, "replace", "writing a file")
    hook(History, "add", "history")
    honest = Run._one_step

    def one_step(run, *arguments):
        report = honest(run, *arguments)
        counts["bit"] += 1
        if place == "bit" and counts["bit"] == number:
            (folder / "struck").write_text(repr(time.time()))
            run.theta.view(np.uint8)[number % run.theta.nbytes] ^= 1
        return report

    Run._one_step = one_step
    if place == "any time":
        threading.Timer(number / 1000, strike, (fault, folder)).start()
    return counts


def victim(fault, victim_rank, place, number, folder, words):
    """Run one rank of a training."""
    from hfmpi.cli.main import entry
    from hfmpi.cli.stand_in import stand_in
    from hfmpi.parallel.library import launched

    stand_in()  # earlier than in `entry`: the fault must hit the rank
    folder, rank = Path(folder), launched()[0]
    (folder / f"process.{rank}").write_text(str(os.getpid()))
    chosen = (fault, place, int(number)) if rank == int(victim_rank) else ("", "", 0)
    counts = plant(*chosen, folder)
    sys.argv = ["hfmpi", "train", *words]
    begin = time.monotonic()
    entry()
    counts["any time"] = int(1000 * (time.monotonic() - begin))
    (folder / f"counts.{rank}").write_text(json.dumps(counts))


# Outside: trials --------------------------------------------------------------------------------


def start(mpirun, ranks, fault, rank, place, number, folder, run, data):
    """Run under mpirun; return the exit code (None for a run that hung) and stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = [fault, rank, place, number, folder]
    words = [*mpirun, "-n", ranks, sys.executable, __file__, "--victim", *plan, data, "--out", run, *TRAIN]
    with (folder / "stderr").open("w+b") as said:
        process = subprocess.Popen(
            list(map(str, words)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            code = process.wait(LIMIT)
            while time.time() < float((folder / "struck").read_text()) + LIMIT if struck(folder) else False:
                if not alive(folder):
                    break
                time.sleep(0.05)
        except subprocess.TimeoutExpired:
            code = None
    ended = time.time()
    left = alive(folder)
    for number in left:
        os.kill(number, signal.SIGKILL)
    if code is None:
        process.kill()
        process.wait()
    text = (folder / "stderr").read_text(errors="replace")
    return None if left else code, text, ended


def struck(folder):
    return (folder / "struck").exists()


def alive(folder):
    """Return the processes of a run that still exist."""
    numbers = [int(path.read_text() or 0) for path in folder.glob("process.*")]
    found = []
    for number in filter(None, numbers):
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words:
            found.append(number)
    return found


def outcome(run):
    """Return everything that a repeated run must reproduce, bit for bit."""
    from hfmpi.files import checkpoint
    from hfmpi.files.history import History

    found = checkpoint.latest(run)
    clock = "seconds", "step_seconds"
    records = [{k: v for k, v in record.items() if k not in clock} for record in History.read(run)]
    state = {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in found.state.items()}
    return found.theta.tobytes(), state, records


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mpirun", default="mpirun", help="command, such as 'mpirun --oversubscribe'")
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    options = parser.parse_args()
    mpirun, rng = shlex.split(options.mpirun), random.Random(options.seed)
    begin, rows, bad = time.monotonic(), {name: Counter() for name in options.faults}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = " ".join(rng.choice(WORDS) for _ in range(1100))[:4500]
        from hfmpi.data.prepare import prepare

        prepare(text.encode())[0].write(folder / "small.h5")
        whole, counts = {}, {}
        for ranks in (2, 3, 4):
            run, calm = folder / f"whole {ranks}", folder / f"calm {ranks}"
            code, said, _ = start(mpirun, ranks, "", -1, "", 0, calm, run, folder / "small.h5")
            if code != 0:
                sys.exit(f"a run without faults ended with {code}:\n{said}")
            whole[ranks] = outcome(run)
            counts[ranks] = [json.loads((calm / f"counts.{rank}").read_text()) for rank in range(ranks)]
        for trial in range(options.trials):
            ranks = rng.choice((2, 2, 3, 4))
            rank = rng.randrange(ranks)
            fault = rng.choices(options.faults, [FAULTS[name] for name in options.faults])[0]
            at = {key: n for key, n in counts[ranks][rank].items() if key in PLACES}
            if fault in ("exception", "sys.exit(0)", "sys.exit(3)"):  # these are raised in the main thread
                del at["any time"]
            place = "bit" if fault == "bit of theta" else rng.choice(sorted(at))
            number = rng.randint(1, STEPS if place == "bit" else at[place])
            row, here, run = rows[fault], folder / f"trial {trial}", folder / f"run {trial}"
            code, said, ended = start(
                mpirun, ranks, fault, rank, place, number, here, run, folder / "small.h5"
            )
            row["trials"] += 1
            if not struck(here):
                row["ended before"] += 1
            else:
                row["hung"] += code is None
                row["code 0"] += code == 0
                errors = [line for line in said.splitlines() if line.startswith("Error: ")]
                row["named"] += any(f"rank {rank} " in line for line in errors)
                seconds = ended - float((here / "struck").read_text())
                row["longest"] = max(row["longest"], seconds)
            try:
                code, said, _ = start(
                    mpirun, ranks, "", -1, "", 0, folder / f"again {trial}", run, folder / "small.h5"
                )
                fine = code == 0 and outcome(run) == whole[ranks]
                row["identical"] += fine
            except Exception as error:
                fine, said = False, f"{said}\n{error!r}"
            if not fine:
                bad.append(f"trial {trial}: {fault} at {place} {number} of rank {rank} of {ranks}: {said}")
    print(shlex.join(["python", *sys.argv]))
    print(versions(mpirun))
    head = ("trials", "ended before", "hung", "code 0", "named", "identical", "longest")
    print(f"{'fault':<14}" + "".join(f"{name:>14}" for name in head))
    total = Counter()
    for fault, row in rows.items():
        cells = [f"{row[name]:>14.1f}" if name == "longest" else f"{row[name]:>14}" for name in head]
        print(f"{fault:<14}" + "".join(cells))
        total += row
    cells = [f"{total[name]:>14}" for name in head[:-1]]
    print(f"{'all':<14}" + "".join(cells) + f"{max(row['longest'] for row in rows.values()):>14.1f}")
    print(f"{time.monotonic() - begin:.0f} s")
    print("\n".join(bad), end="")
    sys.exit(bool(bad or total["hung"]))


def versions(mpirun):
    import mpi4py

    import hfmpi
    from hfmpi.parallel.library import load, name

    return (
        f"hfmpi {hfmpi.__version__}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"mpi4py {mpi4py.__version__}, {name(load())}, {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--victim"]:
        victim(*sys.argv[2:7], sys.argv[7:])
    else:
        main()
