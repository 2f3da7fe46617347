"""Compiled kernels between processes: found again, shared by many, and never an error."""

import os
import subprocess
import sys
import zipfile

import pytest

SCRIPT = """
import sys
import numpy as np
from hfmpi.backends import create
from hfmpi.backends.numba import kernels

backend = create("numba", sys.argv[1])
u = np.ones((3, 4), backend.dtype)
p = np.full((3, 4), 0.25, backend.dtype)
backend.softmax_hessian(p, u, 1.0)
assert np.array_equal(u, np.zeros((3, 4))), u
total, squares = np.zeros((2, 5), backend.dtype)
backend.accumulate_square(np.arange(5, dtype=backend.dtype), total, squares)
assert np.array_equal(squares, np.arange(5) ** 2), squares
used = [kernels()[name].stats for name in ("softmax_hessian", "accumulate_square")]
print(sum(sum(s.cache_hits.values()) for s in used), sum(sum(s.cache_misses.values()) for s in used))
"""


def start(cache, temporary, dtype="float32"):
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
    )


def finish(process):
    """Wait for a process; give the numbers of kernels taken from the cache and compiled."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    return tuple(map(int, out.split()))


@pytest.fixture
def temporary(tmp_path):
    """Give a folder for temporary files, empty again at the end."""
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
    if damage != "folder":  # which is not ours to remove
        assert finish(start(tmp_path, temporary)) == (2, 0)


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_no_error(temporary, place):
    assert finish(start(place, temporary)) == (0, 2)


def test_no_temporary_folder_is_no_error(tmp_path):
    assert finish(start(tmp_path, "/dev/null")) in ((0, 0), (0, 2))
