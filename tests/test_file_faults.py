"""Faults of files during a run, and of the folder between two runs: each is reported by its name."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import h5py
import numpy as np
import pytest
from small import Recorder, history, make_run, same, train, write_corpus

from hfmpi.errors import UserError
from hfmpi.files import atomic, checkpoint
from hfmpi.files import lock as locking
from hfmpi.files.checkpoint import NEWEST, PREVIOUS
from hfmpi.files.history import History
from hfmpi.files.lock import Lock
from hfmpi.runs import output
from hfmpi.runs.config import Config
from hfmpi.runs.merge import from_toml
from hfmpi.runs.text_task import TextTask
from hfmpi.runs.train import Run

FAULTS = {"disk full": errno.ENOSPC, "quota": errno.EDQUOT, "read-only": errno.EROFS, "gone": errno.ESTALE}


@pytest.fixture(scope="module", name="data")
def fixture_data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "small.h5")


@pytest.fixture(scope="module", name="whole")
def fixture_whole(data, tmp_path_factory):
    """Train an undisturbed run of eight steps."""
    return train(tmp_path_factory.mktemp("whole") / "run", data, max_steps=8, checkpoint_every=2)[0]


class During(Recorder):
    """A reporter that calls a function after certain steps."""

    def __init__(self, **actions):
        super().__init__(lambda record: actions.get(f"step_{record['step']}", lambda: None)())


class Disk:
    """A file system that refuses writes while it is broken: new files as well as further lines."""

    def __init__(self, monkeypatch, number):
        self.monkeypatch, self.number = monkeypatch, number

    def breaks(self):
        def fail(*arguments, **options):
            raise OSError(self.number, os.strerror(self.number))

        self.monkeypatch.setattr(atomic.os, "fsync", fail)
        real = os.open

        def open_(path, flags, *arguments, **options):
            if flags & os.O_WRONLY and str(path).endswith("history.jsonl"):
                fail()
            return real(path, flags, *arguments, **options)

        self.monkeypatch.setattr(os, "open", open_)

    def heals(self):
        self.monkeypatch.undo()


# While a run goes on ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_goes_on_and_makes_up_for_what_was_not_written(name, data, whole, tmp_path, monkeypatch):
    disk, folder = Disk(monkeypatch, FAULTS[name]), tmp_path / "run"
    seen = {}

    def look():
        seen["step"] = checkpoint.latest(folder).meta["step"]
        seen["lines"] = len(history(folder))
        disk.heals()

    reporter = During(step_3=disk.breaks, step_7=look)
    run, result = train(folder, data, max_steps=8, checkpoint_every=2, reporter=reporter)
    assert seen == {"step": 2, "lines": 3}  # the last good files, unchanged
    assert result.done
    same(run, whole)
    assert history(folder) == history(whole.folder)
    assert checkpoint.latest(folder).meta["step"] == 8
    failures = [note for note in reporter.notes if "training continues" in note]
    assert len(failures) == 4  # history, best.h5, checkpoint and timing: once each, in three failing rounds
    assert all(os.strerror(FAULTS[name]) in note for note in failures)
    assert sum("can be written again" in note for note in reporter.notes) == 4
    assert not list(folder.glob(".*.tmp"))


def test_a_checkpoint_is_tried_again_before_the_next_one_is_due(data, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "RETRY", 0.0)
    disk, steps = Disk(monkeypatch, errno.ENOSPC), []
    reporter = During(step_1=disk.breaks, step_3=disk.heals)
    reporter.after_step = lambda record, act=reporter.after_step: (act(record), steps.append(saved()))

    def saved():
        return checkpoint.latest(tmp_path / "run").meta["step"] if (tmp_path / "run" / NEWEST).exists() else 0

    train(tmp_path / "run", data, max_steps=5, checkpoint_every=2, reporter=reporter)
    assert steps == [0, 0, 0, 3, 4]


def test_in_the_end_a_missing_checkpoint_is_an_error(data, whole, tmp_path, monkeypatch):
    disk, folder = Disk(monkeypatch, errno.EDQUOT), tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(folder, data, max_steps=8, checkpoint_every=2, reporter=During(step_5=disk.breaks))
    disk.heals()
    assert str(caught.value) == (
        f"cannot write {folder / NEWEST}: {os.strerror(errno.EDQUOT)}; the steps after step 4 are not saved"
    )
    assert not (folder / "DONE").exists()
    run, _ = train(folder, data, max_steps=8, checkpoint_every=2)
    assert run.first_step == 4
    same(run, whole)
    assert history(folder) == history(whole.folder)


def test_a_line_that_is_half_written_is_written_again(tmp_path, monkeypatch):
    log = History(tmp_path)
    log.add({"step": 1})
    log.flush()
    fdopen = os.fdopen

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            self.file.write(content[:7])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", lambda *arguments: Full(fdopen(*arguments)))
        for step in (2, 3):
            log.add({"step": step})
            with pytest.raises(UserError, match="No space left"):
                log.flush()
    assert log.path.read_bytes().endswith(b'\n{"step"')
    log.add({"step": 4})
    log.flush()
    assert [record["step"] for record in History.read(tmp_path)] == [1, 2, 3, 4]


def test_a_folder_that_is_removed_is_made_again(data, tmp_path):
    folder = tmp_path / "run"
    reporter = During(step_3=lambda: shutil.rmtree(folder))
    run, _ = train(folder, data, max_steps=6, checkpoint_every=2, reporter=reporter)
    assert checkpoint.latest(folder).meta["step"] == 6
    assert from_toml(folder / "config.toml")["hidden"] == run.config.hidden
    assert [record["step"] for record in history(folder)] == [4, 5, 6]
    assert f"{folder} was removed and created again: its earlier history is lost" in reporter.notes


@pytest.mark.parametrize("held", [True, False])
def test_a_folder_that_another_job_took_over_is_left_to_it(held, data, tmp_path):
    folder, others = tmp_path / "run", []
    train(tmp_path / "other", data, max_steps=1)

    def replaced():
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "other", folder)
        others.append(Lock(folder))
        if not held:  # it has already ended
            others[0].release()

    reason = "is writing to" if held else "has written to"
    with pytest.raises(UserError, match=rf"another job {reason} .*; the steps after step 2 are not saved"):
        train(folder, data, max_steps=6, checkpoint_every=2, reporter=During(step_3=replaced))
    if held:
        others[0].release()
    for path in (tmp_path / "other").iterdir():
        assert path.name == ".lock" or (folder / path.name).read_bytes() == path.read_bytes()


@pytest.fixture(name="small_disk")
def fixture_small_disk(tmp_path):
    """Mount a separate file system, if that is permitted; return its folder and how to mount on it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*words):
        return subprocess.run(["mount", *words, folder], capture_output=True, timeout=20).returncode

    if os.geteuid() or shutil.which("mount") is None or mount("-t", "tmpfs", "-o", "size=256k", "none"):
        pytest.skip("mounting is not allowed here")
    yield folder, mount
    subprocess.run(["umount", "-l", folder], check=True, timeout=20)


def test_a_disk_that_is_really_full(data, whole, small_disk):
    disk, _ = small_disk

    def fill():
        with (disk / "other").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    reporter = During(step_3=fill, step_5=(disk / "other").unlink)
    run, _ = train(disk / "run", data, max_steps=8, checkpoint_every=2, reporter=reporter)
    same(run, whole)
    assert history(disk / "run") == history(whole.folder)
    assert any("No space left" in note for note in reporter.notes)


def test_a_disk_that_becomes_read_only(data, whole, small_disk):
    disk, mount = small_disk

    def read_only():  # a second mount on top: a busy file system cannot become read-only
        assert mount("--bind", disk) == 0
        assert mount("-o", "remount,bind,ro") == 0

    def writable():
        subprocess.run(["umount", disk], check=True, timeout=20)

    reporter = During(step_3=read_only, step_5=writable)
    run, _ = train(disk / "run", data, max_steps=8, checkpoint_every=2, reporter=reporter)
    same(run, whole)
    assert history(disk / "run") == history(whole.folder)
    assert any("Read-only file system" in note for note in reporter.notes)


def test_what_the_disk_changes_is_noticed_before_it_takes_the_name(tmp_path, monkeypatch):
    theta = np.arange(50.0)
    checkpoint.save(tmp_path / NEWEST, theta, {}, {"step": 1})
    before = (tmp_path / NEWEST).read_bytes()

    def lying_disk(descriptor):
        os.pwrite(descriptor, b"?", 60)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", lying_disk)
        with pytest.raises(UserError, match="the content that was read back differs from what was written"):
            checkpoint.save(tmp_path / NEWEST, theta, {}, {"step": 2})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {NEWEST: before}


def test_a_damaged_checkpoint_does_not_push_out_the_good_one(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / NEWEST, np.arange(50.0), {}, {"step": step})
    content = bytearray((tmp_path / NEWEST).read_bytes())
    content[-1000] ^= 1
    (tmp_path / NEWEST).write_bytes(content[:-100])
    checkpoint.save(tmp_path / NEWEST, np.arange(50.0), {}, {"step": 3})
    found = [checkpoint.load(tmp_path / name).meta["step"] for name in (NEWEST, PREVIOUS)]
    assert found == [3, 1]


# One job to a folder ---------------------------------------------------------------------------


def test_a_second_job_is_refused(data, tmp_path):
    def second():
        with pytest.raises(UserError, match=rf"another job is writing to .*\(process {os.getpid()} on "):
            train(tmp_path / "run", data, max_steps=2)

    train(tmp_path / "run", data, max_steps=1, reporter=During(step_1=second))
    train(tmp_path / "run", data, max_steps=2)  # the first run's lock is released


def test_a_job_that_read_the_checkpoint_too_early_starts_again(data, tmp_path):
    train(tmp_path / "run", data, max_steps=1)
    late = make_run(tmp_path / "run", data, max_steps=3)
    train(tmp_path / "run", data, max_steps=2)
    with pytest.raises(UserError, match="start again to continue from there"):
        late.train()
    train(tmp_path / "run", data, max_steps=3)


def test_a_lock_does_not_outlive_a_killed_job(data, tmp_path):
    words = ["train", data, "--out", tmp_path / "run", "--hidden", 6, "--sequence-length", 20]
    words += [
        "--optimizer",
        "shf",
        "--gradient-batch",
        9,
        "--curvature-batch",
        4,
        "--backend",
        "numpy",
        "--checkpoint-every",
        1,
    ]
    program = [sys.executable, "-c", "from hfmpi.cli.main import entry; entry()", *map(str, words)]
    job = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / PREVIOUS).exists():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        second = subprocess.run([*program, "--max-steps", "1"], capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert "another job is writing to" in second.stderr
        assert second.stderr.count("\n") == 1
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait(20)
    leftover = tmp_path / "run" / f".{NEWEST}.0123abcd.tmp"  # as if it had been killed during the write
    leftover.write_bytes(b"half")
    step = checkpoint.latest(tmp_path / "run").meta["step"]
    third = subprocess.run(
        [*program, "--max-steps", str(step + 1)], capture_output=True, text=True, timeout=60
    )
    assert third.returncode == 0, third.stderr
    assert f"continuing from step {step:,}" in third.stdout
    assert not leftover.exists()


def test_where_there_are_no_locks_a_run_goes_on_with_a_note(data, tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locking.fcntl, "flock", unsupported)
    assert locking.fcntl is fcntl
    reporter = Recorder()
    train(tmp_path / "run", data, max_steps=1, reporter=reporter)
    assert [note for note in reporter.notes if "cannot be locked" in note] == reporter.notes
    assert len(reporter.notes) == 1


# What a run finds in its folder ----------------------------------------------------------------


def test_a_damaged_history_is_put_aside_and_the_run_goes_on(data, tmp_path):
    folder = tmp_path / "run"
    train(folder, data, max_steps=3)
    good = history(folder)
    lines = (folder / "history.jsonl").read_bytes().splitlines(keepends=True)
    spoiled = b"".join([lines[0], b"#\n", lines[1], lines[0], b'{"loss": 1}\n', lines[2], b'{"step": 2}\n'])
    (folder / "history.jsonl").write_bytes(spoiled + b'{"step": 4, "tr')
    with pytest.raises(UserError, match="damaged in line 2"):
        History.read(folder)
    reporter = Recorder()
    train(folder, data, max_steps=4, reporter=reporter)
    assert history(folder)[:3] == good
    assert [record["step"] for record in history(folder)] == [1, 2, 3, 4]
    assert "4 damaged or foreign line(s) were removed" in reporter.notes[0]
    assert (folder / "history.damaged.jsonl").read_bytes().startswith(spoiled)


@pytest.mark.parametrize("numbers", ['"x"', "1e400", "[1]", "NaN", "9" * 400])
def test_a_history_with_odd_numbers_is_not_drawn(numbers, tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 1, "P_I": ' + numbers + "}\n")
    with pytest.raises(UserError, match="line 1"):
        History.read(tmp_path, ["P_I"])
    (tmp_path / "history.jsonl").write_text('{"step": 1, "P_I": 2}\n')
    with pytest.raises(UserError, match="its P_D is not a number"):
        History.read(tmp_path, ["P_I", "P_D"])


def test_a_history_without_end_takes_no_memory(data, tmp_path):
    train(tmp_path / "run", data, max_steps=1)
    with (tmp_path / "run" / "history.jsonl").open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="damaged in line 2"):
        History.read(tmp_path / "run")
    train(tmp_path / "run", data, max_steps=2)
    assert [record["step"] for record in history(tmp_path / "run")] == [1, 2]


def a_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def a_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def a_loop_of_links(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


@pytest.mark.parametrize("what", [a_pipe, a_folder, a_loop_of_links])
@pytest.mark.parametrize("name", [NEWEST, "history.jsonl", "config.toml", "DONE", ".lock"])
def test_what_is_no_file_is_one_sentence(what, name, data, tmp_path):
    train(tmp_path / "run", data, max_steps=1)
    what(tmp_path / "run" / name)
    harmless = {
        ("DONE", a_pipe),
        ("DONE", a_loop_of_links),
        ("config.toml", a_loop_of_links),
        (".lock", a_pipe),
    }
    if (name, what) in harmless:  # removed, replaced, or valid enough to be locked
        train(tmp_path / "run", data, max_steps=2)
        return
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", data, max_steps=2)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\0" * (2**20 + 1), b"hidden = " + b"9" * 5000, b"hidden = 5\xff"])
def test_a_configuration_that_is_none_is_one_sentence(content, tmp_path):
    (tmp_path / "config.toml").write_bytes(content)
    with pytest.raises(UserError, match="is not a TOML file"):
        from_toml(tmp_path / "config.toml")
    a_pipe(tmp_path / "config.toml")
    with pytest.raises(UserError, match="not a regular file"):
        from_toml(tmp_path / "config.toml")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": -1}, "invalid checkpoint: its step, seconds and counts must be non-negative"),
        ({"step": True}, "invalid checkpoint: its step, seconds and counts must be non-negative"),
        ({"step": 10**30}, "invalid checkpoint: its step, seconds and counts must be non-negative"),
        ({"seconds": float("nan")}, "invalid checkpoint: its step, seconds and counts must be non-negative"),
        ({"seconds": -1.0}, "invalid checkpoint: its step, seconds and counts must be non-negative"),
        ({"config": {"hidden": 10**7}}, "contains a model of"),  # and not: not enough memory
        ({"config": {"parameters": 10**18, "hidden": 0}}, "contains a model of"),
        ({"config": {"parameters": 10**40, "hidden": 0}}, "below 2"),
        ({"vocabulary": 10**12}, "vocabulary"),
        ({"state": {"direction": np.zeros(3)}}, '"direction" of the checkpoint does not fit'),
        ({"state": {"damping": 1}}, '"damping" of the checkpoint does not fit'),
        ({"state": {"damping": float("nan")}}, '"damping" of the checkpoint does not fit'),
        ({"state": {"damping": -1.0}}, '"damping" of the checkpoint does not fit'),
        ({"state": {"damping": np.zeros(2)}}, '"damping" of the checkpoint does not fit'),
    ],
)
def test_a_checkpoint_that_lies_is_refused_before_memory_is_taken(change, reason, data, tmp_path):
    run, _ = train(tmp_path / "run", data, max_steps=1)
    found = checkpoint.load(tmp_path / "run" / NEWEST)
    change = json.loads(json.dumps(change)) if "state" not in change else dict(change)
    state = found.state | change.pop("state", {})
    meta = found.meta | change
    meta["config"] = found.meta["config"] | change.get("config", {})
    checkpoint.save(tmp_path / "run" / NEWEST, found.theta, state, meta)
    lied = checkpoint.latest(tmp_path / "run")

    def go_on():
        config = Config(**lied.meta["config"])
        task = TextTask.read(config, data, 0)
        Run(tmp_path / "run", task, run.session, lied)

    with pytest.raises(UserError, match=reason):
        go_on()


def test_a_sparse_file_larger_than_memory_is_refused(tmp_path):
    checkpoint.save(tmp_path / NEWEST, np.arange(50.0), {}, {})
    with h5py.File(tmp_path / NEWEST, "r+") as file:
        del file["theta"]
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((2**37,))
        h5py.h5d.create(file.id, b"theta", h5py.h5t.IEEE_F64LE, space, settings)
    assert (tmp_path / NEWEST).stat().st_size > 2**40
    with pytest.raises(
        UserError, match="theta claims to have 1,099,511,627,776 bytes, more than is possible"
    ):
        checkpoint.load(tmp_path / NEWEST)
