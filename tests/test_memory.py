"""Free memory and processors as a rank detects them, and the notation of memory budgets."""

import resource

import click
import pytest

from hfmpi.cli.values import SIZE
from hfmpi.measure import control_groups
from hfmpi.measure.machine import cores, free_memory

MEMINFO = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   1000 kB\nBuffers: 5 kB\n"
STATUS = "Name:\tpython\nVmSize:\t  1 kB\nVmData:\t  1 kB\n"
MOUNTS = "22 1 0:21 / /proc rw - proc proc rw\n"
VERSION_2 = MOUNTS + "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
VERSION_1 = (
    MOUNTS
    + "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    + "35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
    + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
OWN_1 = "9:name=systemd:/\n4:memory:/slurm/job/step\n2:cpu,cpuacct:/slurm/job/step\n0::/\n"


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in "NODE", "CPU", "GPU":
        monkeypatch.delenv(f"SLURM_MEM_PER_{name}", raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)


@pytest.fixture
def system(tmp_path):
    """Create the files that report limits; `files` are those of control groups, by path."""

    def make(files=(), meminfo=MEMINFO, cgroup="0::/job/step\n", mountinfo=VERSION_2, status=STATUS):
        given = {
            "self/cgroup": cgroup,
            "self/mountinfo": mountinfo,
            "self/status": status,
            "meminfo": meminfo,
        }
        paths = {f"proc/{name}": content for name, content in given.items() if content is not None}
        for name, content in (paths | {f"sys/fs/cgroup/{n}": c for n, c in dict(files).items()}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return tmp_path

    return make


def group(place, **limits):
    return {f"{place}/memory.{name}": f"{content}\n" for name, content in limits.items()}


@pytest.mark.parametrize(("limits", "expected"), [
    ({}, 1_024_000),
    ({"max": "max", "current": "5"}, 1_024_000),
    ({"max": "9000", "current": "5000"}, 4_000),
    ({"max": "9000", "current": "9500"}, 0),
    ({"max": "9000000", "current": "0"}, 1_024_000),
    ({"max": "9000"}, 1_024_000),
    ({"max": "9000", "high": "8000", "current": "5000"}, 3_000),
    ({"max": "9000", "current": "5000", "stat": "anon 3000\ninactive_file 1500\nactive_file 500"}, 6_000),
    ({"max": "9000", "current": "5000", "stat": "nonsense"}, 4_000),
])  # fmt: skip
@pytest.mark.parametrize("place", ["job/step", "job", "."])
def test_the_tightest_of_machine_and_control_groups(system, place, limits, expected):
    root = system(group("job/step", max="max") | group(place, **limits))
    assert free_memory(root=root) == expected
    assert free_memory(2, root) == expected // 2


def test_the_least_of_all_levels_counts(system):
    root = system(group("job/step", max=9000, current=100) | group("job", max=10_000, current=7000))
    assert free_memory(root=root) == 3000


def test_control_groups_of_version_1(system):
    no_limit = {"limit_in_bytes": 9223372036854771712, "usage_in_bytes": 7}
    stat = "inactive_file 1\ntotal_inactive_file 500"
    files = group("memory/slurm/job/step", **no_limit)
    files |= group("memory/slurm/job", limit_in_bytes=9000, usage_in_bytes=5000, stat=stat)
    files |= group("memory/slurm/other", limit_in_bytes=1, usage_in_bytes=0)
    files |= {"cpu,cpuacct/slurm/job/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}
    files |= {f"cpu,cpuacct/{place}cpu.cfs_period_us": "100000\n" for place in ("", "slurm/job/")}
    root = system(files, cgroup=OWN_1, mountinfo=VERSION_1)
    assert free_memory(root=root) == 4500
    assert control_groups.processors(root) == 1.5
    assert cores(root) == 1


@pytest.mark.parametrize(("top", "own"), [
    ("/docker/abc", "/docker/abc/inner"),  # a container with the paths of its host
    ("/docker/abc", "/docker/abc"),
    ("/docker/a\\040b", "/docker/a b"),
    ("/docker/abc", "/"),
    ("/", "/../other"),  # a group that is not below what is mounted
    ("/docker/abc", "/docker/abcdef"),
    ("/", "/not/there"),
])  # fmt: skip
def test_what_is_mounted_is_a_part_of_the_tree(system, top, own):
    mounts = VERSION_2.replace(" / /sys", f" {top} /sys")
    root = system(group(".", max=9000, current=5000), cgroup=f"0::{own}\n", mountinfo=mounts)
    assert free_memory(root=root) == 4000


@pytest.mark.parametrize(("limits", "processors"), [
    ({"job/step": "max 100000"}, None),
    ({"job/step": "max 100000", "job": "250000 100000", ".": "max"}, 2.5),
    ({"job/step": "50000 100000", "job": "250000 100000"}, 0.5),
    ({"job": "nonsense"}, None),
])  # fmt: skip
def test_quota_of_processor_time(system, limits, processors):
    root = system({f"{place}/cpu.max": f"{content}\n" for place, content in limits.items()})
    assert control_groups.processors(root) == processors
    assert cores(root) >= 1


@pytest.mark.parametrize(("variables", "expected"), [
    ({"SLURM_MEM_PER_NODE": "3"}, 3 * 2**20),
    ({"SLURM_MEM_PER_NODE": "0"}, 10 * 2**30),  # all memory
    ({"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "4"}, 400 * 2**20),
    ({"SLURM_MEM_PER_CPU": "100"}, 10 * 2**30),
    ({"SLURM_MEM_PER_GPU": "100", "SLURM_GPUS_ON_NODE": "2"}, 200 * 2**20),
    ({"SLURM_MEM_PER_NODE": "many"}, 10 * 2**30),
    ({"SLURM_MEM_PER_NODE": "999999999"}, 10 * 2**30),
])  # fmt: skip
def test_memory_of_a_slurm_job(system, monkeypatch, variables, expected):
    for name, content in variables.items():
        monkeypatch.setenv(name, content)
    root = system(meminfo=f"MemAvailable: {10 * 2**20} kB\n")
    assert free_memory(root=root) == expected
    assert free_memory(4, root) == expected // 4


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_limits_of_the_process_are_not_shared(system, monkeypatch, kind):
    limits = {kind: (100_000, 200_000)}
    monkeypatch.setattr(resource, "getrlimit", lambda of: limits.get(of, (resource.RLIM_INFINITY,) * 2))
    assert free_memory(2, system()) == 100_000 - 1024
    limits[kind] = (1000, 1000)
    assert free_memory(2, system()) == 0


@pytest.mark.parametrize("meminfo", [None, "", "MemAvailable:", "MemAvailable: many kB"])
@pytest.mark.parametrize("cgroup", [None, "", "1:name=systemd:/\n", "nonsense"])
@pytest.mark.parametrize("mountinfo", [None, "nonsense\n", VERSION_2])
def test_where_nothing_can_be_found_out(system, meminfo, cgroup, mountinfo):
    root = system({}, meminfo, cgroup, mountinfo, status=None)
    assert free_memory(root=root) == 4 * 2**30
    assert control_groups.processors(root) is None


def test_here_it_is_something():
    assert free_memory() > 2**20
    assert cores() >= 1


@pytest.mark.parametrize(("text", "size"), [
    ("1", 1), ("1500", 1500), ("2GiB", 2 * 2**30), ("2gib", 2 * 2**30), ("1.5G", 3 * 2**29),
    ("500MB", 500_000_000), ("10 KiB", 10240), ("3tb", 3 * 10**12), ("7B", 7),
])  # fmt: skip
def test_memory_sizes(text, size):
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "x", "3XB", "1e400", "nan", "2 GiB GiB", "0.1"])
def test_what_is_no_memory_size(text):
    with pytest.raises(click.BadParameter, match="is not a memory size"):
        SIZE.convert(text, None, None)
