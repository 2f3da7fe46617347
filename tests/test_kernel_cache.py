"""Compiled kernels are shared between processes; faults of the cache are never an error."""

import os
import resource
import subprocess
import sys
import tempfile
import zipfile

import pytest

from hfmpi.backends import cupy_cache, kernel_cache

SCRIPT = """
import sys
import numpy as np
from hfmpi.backends import create
from hfmpi.backends.compilation import listening
from hfmpi.backends.numba import kernels

events = []
listener = listening(events.append)
listener.__enter__()
backend = create("numba", sys.argv[1])
u = np.ones((3, 4), backend.dtype)
p = np.full((3, 4), 0.25, backend.dtype)
backend.softmax_hessian(p, u, 1.0)
assert np.array_equal(u, np.zeros((3, 4))), u
total, squares = np.zeros((2, 5), backend.dtype)
backend.accumulate_square(np.arange(5, dtype=backend.dtype), total, squares)
assert np.array_equal(squares, np.arange(5) ** 2), squares
used = [kernels()[name].stats for name in ("softmax_hessian", "accumulate_square")]
misses = sum(sum(s.cache_misses.values()) for s in used)
print(sum(sum(s.cache_hits.values()) for s in used), misses)
assert events == [True, False] * (2 - len(used[0].cache_hits) - len(used[1].cache_hits)), events
"""


def start(cache, temporary, dtype="float32", **options):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
    }
    environment |= {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, dtype],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process):
    """Wait for a process; return the numbers of kernels from the cache and of compiled kernels."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    return tuple(map(int, out.split()))


@pytest.fixture
def temporary(tmp_path):
    """Create a folder for temporary files that must be empty at the end."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def test_a_second_process_compiles_nothing(tmp_path, temporary):
    assert finish(start(tmp_path, temporary)) == (0, 2)
    assert finish(start(tmp_path, temporary)) == (2, 0)
    assert finish(start(tmp_path, temporary, "float64")) == (0, 2)  # other types are added,
    assert finish(start(tmp_path, temporary, "float64")) == (2, 0)
    assert finish(start(tmp_path, temporary)) == (2, 0)  # and nothing is lost
    assert [path.suffix for path in (tmp_path / "hfmpi").iterdir()] == [".zip"]


def test_processes_that_start_together(tmp_path, temporary):
    for _ in range(2):
        started = [start(tmp_path, temporary, dtype) for dtype in ("float32", "float64") * 2]
        for process in started:
            finish(process)
    assert finish(start(tmp_path, temporary)) == (2, 0)
    assert len(list((tmp_path / "hfmpi").iterdir())) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "folder"])
def test_a_damaged_archive_is_replaced(tmp_path, temporary, damage):
    finish(start(tmp_path, temporary))
    (archive,) = (tmp_path / "hfmpi").iterdir()
    content = bytearray(archive.read_bytes())
    if damage == "flipped":
        with zipfile.ZipFile(archive) as packed:
            content[packed.infolist()[0].header_offset + 200] ^= 0xFF
    archive.write_bytes(content[: {"empty": 0, "cut": len(content) // 2}.get(damage)])
    if damage == "folder":
        archive.unlink()
        archive.mkdir()
    assert finish(start(tmp_path, temporary)) == (0, 2)
    if damage != "folder":  # which hfmpi must not remove
        assert finish(start(tmp_path, temporary)) == (2, 0)


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_no_error(temporary, place):
    assert finish(start(place, temporary)) == (0, 2)


def test_no_temporary_folder_is_no_error(tmp_path):
    assert finish(start(tmp_path, "/dev/null")) in ((0, 0), (0, 2))


def test_a_disk_that_takes_no_more_is_no_error(tmp_path, temporary):
    most = 20_000  # bytes: enough for an index, not for machine code
    finish(start(tmp_path, temporary))  # with an archive that cannot be unpacked, and without one
    for cache in tmp_path, tmp_path / "other":
        limited = start(
            cache, temporary, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        )
        assert finish(limited) == (0, 2)


def test_a_folder_that_is_cleared_away_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kernel_cache.atexit, "register", lambda *arguments: None)
    with kernel_cache.kernel_cache("test", (__file__,)) as cached:
        function = cached(kernel_cache.numba.njit(lambda x: x + 1))
    (folder,) = tmp_path.iterdir()
    kernel_cache.shutil.rmtree(folder)
    folder.write_text("a file in its place")
    assert function(1) == 2


OWNER = """
import sys
from hfmpi.backends.kernel_cache import _private_folder
print(_private_folder(), flush=True)
sys.stdin.read()
"""


def test_folders_of_killed_processes_are_removed(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", OWNER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    dead, living = (owner.stdout.readline().strip() for owner in owners)
    (tmp_path / "another").mkdir()
    (tmp_path / "hfmpi-cache-link").symlink_to(tmp_path / "another")
    owners[0].kill()
    owners[0].communicate()
    assert os.path.exists(dead)
    kernel_cache._remove_abandoned(tmp_path)
    assert not os.path.exists(dead)
    assert os.path.exists(living)
    assert (tmp_path / "another").exists()
    owners[1].communicate("")
    kernel_cache._remove_abandoned(tmp_path)
    assert not os.path.exists(living)


def test_folders_of_other_users_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "hfmpi-cache-theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    kernel_cache._remove_abandoned(tmp_path)
    assert (tmp_path / "hfmpi-cache-theirs").exists()


def test_a_folder_that_another_removes_before_it_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = []

    def mkdtemp(prefix, make=tempfile.mkdtemp):
        made.append(make(prefix=prefix))
        if len(made) == 1:
            kernel_cache._remove_abandoned(tmp_path)
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    assert str(kernel_cache._private_folder()) == made[1]
    assert [str(path) for path in tmp_path.iterdir()] == made[1:]


@pytest.mark.parametrize("folder", ["taken", "new/folder", "/proc/nowhere", "/dev/null/there", "full"])
def test_where_cupy_keeps_its_kernels(tmp_path, monkeypatch, folder):
    (tmp_path / "taken").mkdir()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / folder))
    monkeypatch.delenv("CUPY_CACHE_IN_MEMORY", raising=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if folder == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        cupy_cache.choose()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    usable = folder in ("taken", "new/folder")
    assert ("CUPY_CACHE_IN_MEMORY" in os.environ) is not usable
    assert os.path.isdir(os.environ["CUPY_CACHE_DIR"])  # otherwise CuPy creates it at its import, or fails
    if usable:
        assert list((tmp_path / folder).iterdir()) == []
