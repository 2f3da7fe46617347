"""Kinds of faults: limits of memory, processors or disk, and wrong environment variables."""

import json
import os
import resource
import subprocess
import time

from trial import LIMIT, STEPS, TRAIN, kind

from hfmpi.runs.live import COMPILING

# Memory and processors --------------------------------------------------------------------------


def limit(which, most):
    """Return a function that sets a limit of the process that will be started."""
    return lambda: resource.setrlimit(which, (most, most))


@kind("memory limits")
def memory(trial):
    sizes = "", "0", "-1", "4G", "inf", "9" * 30
    megabytes = trial.rng.choice([1, 10, 300, 1000, 10**5, 10**12])
    options = trial.rng.choice([
        {"env": os.environ | {"SLURM_MEM_PER_NODE": str(megabytes)}},
        {"env": os.environ | {"SLURM_MEM_PER_CPU": str(megabytes), "SLURM_CPUS_ON_NODE": "2"}},
        {"env": os.environ | {"SLURM_MEM_PER_NODE": trial.rng.choice(sizes)}},
        {"preexec_fn": limit(resource.RLIMIT_AS, (1000 + megabytes % 10**5) * 2**20)},
        {"preexec_fn": limit(resource.RLIMIT_DATA, (1000 + megabytes % 10**5) * 2**20)},
    ])  # fmt: skip
    trial.note = f"{megabytes} MB {set(options.get('env', {}).items()) - set(os.environ.items())}"
    code = trial.end(trial.start(**options))
    if not trial.refused(code, trial.said()):
        trial.finished()


@kind("processors")
def processors(trial):
    core = trial.rng.choice(sorted(os.sched_getaffinity(0)))
    given = trial.rng.choice([1, 2, 64, 65, 1000, 10**5, 10**9, 10**10, 2**31, 2**64])
    trial.note = f"--threads {given}, core {core}"
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    options = {"env": environment, "preexec_fn": lambda: os.sched_setaffinity(0, {core})}
    code, out, said = trial.command("info", "--json", **options)
    assert code == 0, said
    (rank,) = json.loads(out)["ranks"]
    assert (rank["cores"], rank["threads"]) == (1, 1), out
    words = ["train", trial.data, "--out", trial.run, *TRAIN, "--max-steps", 2, "--threads", given]
    code, out, said = trial.command(*words, **options)
    if trial.refused(code, said):
        assert given > 10**9, said
    else:
        taken = json.loads((trial.run / "timing.json").read_text())["ranks"][0]["threads"]
        assert taken <= min(given, 1024), f"{taken} threads"


# Disks ------------------------------------------------------------------------------------------


@kind("ulimit -f")
def small_files(trial):
    most = trial.rng.choice([0, 1, 100, 1000, 5000, 20_000, 50_000])
    trial.note = f"{most} bytes"
    words = ["train", trial.data, "--out", trial.run, *TRAIN]
    code, _, said = trial.command(*words, preexec_fn=limit(resource.RLIMIT_FSIZE, most))
    said = "".join(line for line in said.splitlines(keepends=True) if not line.startswith("Note: "))
    if trial.refused(code, said):
        trial.resumed(lost=STEPS)
    else:
        assert not said, said
        trial.finished()


def with_numba(trial, temporary, **options):
    """Evaluate with Numba; the folder for temporary files must be empty afterwards."""
    cache = trial.folder if trial.rng.random() < 0.2 else trial.bench.folder
    environment = os.environ | {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(cache / "cache")}
    words = "evaluate", trial.good, "--backend", "numba", "--json"
    code, out, said = trial.command(*words, env=environment, timeout=10 * LIMIT, **options)  # it may compile
    said = said.replace(f"{COMPILING}\n", "")  # only printed on a slow machine
    assert (code, said) == (0, ""), said
    found, good = json.loads(out)["valid_bpc"], trial.bench.with_numpy["valid_bpc"]
    assert abs(found - good) < 1e-6 * good, f"{found} in place of {good}"
    assert not temporary.is_dir() or not list(temporary.iterdir()), "left over"


@kind("TMPDIR, Numba")
def temporary_folder(trial):
    temporary = trial.folder / "temporary"
    temporary.mkdir()
    how = trial.rng.choice(["small", "small", "missing", "file", "ulimit -f", "ulimit -f"])
    most = trial.rng.choice([0, 1, 1000, 20_000, 100_000, 10**6])
    trial.note = f"{how} {most}"
    if how in ("missing", "file"):
        temporary.rmdir()
    if how == "file":
        temporary.touch()
    if how == "small":
        size = max(most, 4096)  # the minimum: a folder with nothing in it
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(temporary)]
        how = (
            "small"
            if subprocess.run(mount, capture_output=True, check=False).returncode == 0
            else "ulimit -f"
        )
    try:
        with_numba(
            trial,
            temporary,
            preexec_fn=limit(resource.RLIMIT_FSIZE, most) if how == "ulimit -f" else None,
        )
    finally:
        if how == "small":
            subprocess.run(["umount", str(temporary)], check=True)


@kind("killed, Numba")
def left_kernels(trial):
    temporary = trial.folder / "temporary"
    temporary.mkdir()
    environment = os.environ | {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(trial.bench.folder / "cache")}
    words = [*trial.words(), "--backend", "numba"]
    process = subprocess.Popen(
        words, cwd=trial.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + LIMIT
    while not list(temporary.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(trial.rng.choice([0, 0.01, 0.1, 1]))
    process.kill()
    process.wait()
    trial.note = f"{len(list(temporary.iterdir()))} left"
    with_numba(trial, temporary)


# Launchers and folders --------------------------------------------------------------------------

VARIABLES = (
    *("PMIX_RANK", "PMIX_NAMESPACE", "PMIX_SERVER_URI2", "PMIX_SERVER_URI41", "PMIX_SECURITY_MODE"),
    *("PMI_RANK", "PMI_SIZE", "PMI_FD", "PMI_PORT", "PMI_ID", "PALS_RANKID"),
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID"),
    *("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
)
VALUES = "", "0", "0", "0", "1", "1", "2", "7", "-1", "x", "99999999999999999999", "127.0.0.1:1", "slurm.1.0"


def variables(trial):
    """Return an environment with variables that launchers might have set."""
    names = trial.rng.sample(VARIABLES, trial.rng.randint(1, 5))
    if trial.rng.random() < 0.5:  # all variables of a launcher
        names += [
            name for name in VARIABLES if name.startswith(trial.rng.choice(["PMIX_", "OMPI_", "SLURM_"]))
        ]
    given = {name: trial.rng.choice(VALUES) for name in names}
    trial.note = str(given)
    return os.environ | given


@kind("launchers' variables")
def launchers(trial):
    environment = variables(trial)
    code, _, said = trial.command("info", env=environment)
    assert code == 0, f"info: {code} {said}"
    assert "Traceback" not in said, said
    code = trial.end(trial.start(env=environment))
    if code == 2 and not trial.said():  # only the first process prints, and this may not be it
        ranks = [environment.get(name, "") for name in VARIABLES if name.endswith(("_RANK", "_PROCID"))]
        assert any(rank.isdecimal() and int(rank) for rank in ranks), "nothing said"
    elif not trial.refused(code, trial.said()):
        trial.finished()


@kind("launchers' variables, mpirun")
def launchers_mpirun(trial):
    trial.ranks, environment = 2, variables(trial)
    launcher = [*trial.bench.mpirun, "-n", "2"]
    code, _, said = trial.command("info", env=environment, launcher=launcher)
    assert code == 0, f"info: {code} {said}"
    assert "Traceback" not in said, said
    code = trial.end(trial.start(env=environment))
    said = "".join(line for line in trial.said().splitlines(True) if line.startswith("Error: "))
    assert code in (0, 2), f"{code} {trial.said()}"
    if not trial.refused(code, said):
        trial.finished()


@kind("working folder gone")
def working_folder(trial):
    folder = trial.folder / "gone"
    folder.mkdir()
    if trial.rng.random() < 0.3:  # of a running training
        process = trial.start(preexec_fn=lambda: os.chdir(folder))
        trial.moment(begun=trial.rng.random() < 0.7)
        folder.rmdir()
        code = trial.end(process)
        if not trial.refused(code, trial.said()):
            trial.finished()
        return

    def remove():
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        os.rmdir(folder)

    words = trial.another()
    whole = trial.command(*words)
    (trial.folder / "out.h5").unlink(missing_ok=True)
    code, out, said = trial.command(*words, preexec_fn=remove)
    if trial.refused(code, said):
        assert "the working folder has been removed" in said, said
    elif words[0] != "info":  # `info` prints the free memory, which varies
        assert out == whole[1], out
    relative = trial.rng.choice(
        ["evaluate run", "train small.h5", "plot run", "prepare - out.h5", "sample run"]
    )
    code, out, said = trial.command(*relative.split(), preexec_fn=remove)
    assert (code, said) == (
        2, "Error: the working folder has been removed: change to another folder, for example by cd ~\n"
    ), f"{relative}: {said}"  # fmt: skip
