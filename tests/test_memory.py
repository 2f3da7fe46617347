"""Free memory as a rank finds it, and how a memory budget is written."""

import click
import pytest

from hfmpi.cli.values import SIZE
from hfmpi.measure.machine import free_memory

MEMINFO = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   1000 kB\nBuffers: 5 kB\n"


def system(folder, meminfo=MEMINFO, group="0::/job/step\n", **limits):
    """Make the files that tell of the memory; `limits` are those of the control group."""
    place = folder / "cgroup" / "job" / "step"
    place.mkdir(parents=True)
    (folder / "self").mkdir()
    for path, content in ((folder / "meminfo", meminfo), (folder / "self" / "cgroup", group)):
        if content is not None:
            path.write_text(content)
    for name, content in limits.items():
        (place / f"memory.{name}").write_text(content)
    return free_memory(folder, folder / "cgroup")


@pytest.mark.parametrize(("limits", "expected"), [
    ({}, 1_024_000),
    ({"max": "max\n", "current": "5\n"}, 1_024_000),
    ({"max": "9000\n", "current": "5000\n"}, 4_000),
    ({"max": "9000\n", "current": "9500\n"}, 0),
    ({"max": "9000000\n", "current": "0\n"}, 1_024_000),
    ({"max": "9000\n"}, 1_024_000),
])  # fmt: skip
def test_the_tighter_of_machine_and_control_group(tmp_path, limits, expected):
    assert system(tmp_path, **limits) == expected


@pytest.mark.parametrize("meminfo", [None, "", "MemAvailable:", "MemAvailable: many kB"])
@pytest.mark.parametrize("group", [None, "", "1:name=systemd:/\n"])
def test_where_nothing_can_be_found_out(tmp_path, meminfo, group):
    assert system(tmp_path, meminfo, group) == 4 * 2**30


def test_here_it_is_something():
    assert free_memory() > 2**20


@pytest.mark.parametrize(("text", "size"), [
    ("1", 1), ("1500", 1500), ("2GiB", 2 * 2**30), ("2gib", 2 * 2**30), ("1.5G", 3 * 2**29),
    ("500MB", 500_000_000), ("10 KiB", 10240), ("3tb", 3 * 10**12), ("7B", 7),
])  # fmt: skip
def test_memory_sizes(text, size):
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "x", "3XB", "1e400", "nan", "2 GiB GiB", "0.1"])
def test_what_is_no_memory_size(text):
    with pytest.raises(click.BadParameter, match="no memory size"):
        SIZE.convert(text, None, None)
