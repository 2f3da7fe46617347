"""Checkpoints and history are written completely or not at all, whatever happens to the files."""

import json
import math
import subprocess
import sys

import h5py
import numpy as np
import pytest

from hfmpi.errors import UserError
from hfmpi.files import atomic, checkpoint
from hfmpi.files.checkpoint import NEWEST, PREVIOUS, latest, load, save
from hfmpi.files.history import History

META = {"step": 7, "model": {"cell": "mlstm", "hidden": 3}, "note": "ä", "none": None, "list": [1, 2.5]}


def state(seed=0):
    numbers = np.random.default_rng(seed)
    return {
        "direction": numbers.standard_normal(11).astype(np.float32),
        "table": numbers.standard_normal((2, 3)),
        "flags": np.array([True, False]),
        "single": np.array(2.5),
        "empty": np.zeros((0, 4), dtype=np.int32),
        "damping": 0.1 + 0.2,
        "tiny": 5e-324,
        "nothing": math.nan,
        "endless": -math.inf,
        "count": 2**62 + 1,
        "moving": True,
        "name": "shf é",
        "blank": "",
    }


def theta(seed=0):
    return np.random.default_rng(seed).standard_normal(50).astype(np.float32)


def same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, float):
        assert np.float64(found).tobytes() == np.float64(expected).tobytes()
    else:
        assert found == expected


@pytest.fixture
def two(tmp_path):
    """Create a folder with a checkpoint and a previous one."""
    save(tmp_path / NEWEST, theta(1), state(1), {"step": 1})
    save(tmp_path / NEWEST, theta(2), state(2), {"step": 2})
    return tmp_path


def test_round_trip_bit_for_bit(tmp_path):
    save(tmp_path / NEWEST, theta(), state(), META)
    found = load(tmp_path / NEWEST)
    same(found.theta, theta())
    assert found.state.keys() == state().keys()
    for name, entry in state().items():
        same(found.state[name], entry)
    assert found.meta == META
    assert [path.name for path in tmp_path.iterdir()] == [NEWEST]


def test_no_state_and_float64_theta(tmp_path):
    save(tmp_path / NEWEST, theta().astype(np.float64), {}, {})
    found = load(tmp_path / NEWEST)
    assert (found.state, found.meta, found.theta.dtype) == ({}, {}, np.float64)


@pytest.mark.parametrize("entry", [None, [1, 2], np.array(["a"]), np.array([None]), b"bytes"])
def test_other_types_are_refused_before_anything_is_written(entry, two):
    before = contents(two)
    with pytest.raises(TypeError, match="cannot contain odd"):
        save(two / NEWEST, theta(), {"odd": entry}, {})
    assert contents(two) == before


def test_the_previous_one_is_kept(two):
    assert load(two / NEWEST).meta == {"step": 2}
    assert load(two / PREVIOUS).meta == {"step": 1}
    assert latest(two).message is None
    assert latest(two).meta == {"step": 2}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(theta(2).tobytes()) + 17] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, empty, remove])
def test_damaged_newest_falls_back_on_the_previous(damage, two):
    damage(two / NEWEST)
    with pytest.raises(UserError, match=r"checkpoint\.h5"):
        load(two / NEWEST)
    found = latest(two)
    assert found.meta == {"step": 1}
    same(found.theta, theta(1))
    assert NEWEST in found.message
    assert f"continuing from {two / PREVIOUS}" in found.message


def test_a_reader_finds_the_newest_at_any_moment(two, monkeypatch):
    replace, found = atomic.os.replace, []

    def observed(source, target):
        replace(source, target)
        found.append(latest(two))

    monkeypatch.setattr(atomic.os, "replace", observed)
    for step in (3, 4):
        save(two / NEWEST, theta(step), {}, {"step": step})
    assert [(c.meta["step"], c.message) for c in found] == [(2, None), (3, None), (3, None), (4, None)]
    assert load(two / PREVIOUS).meta == {"step": 3}
    assert {path.name for path in two.iterdir()} == {NEWEST, PREVIOUS}


def test_a_crash_between_the_names_leaves_nothing_for_the_next(two):
    """Both names may then refer to one file, and a rename between them does nothing."""
    (two / PREVIOUS).unlink()
    (two / PREVIOUS).hardlink_to(two / NEWEST)
    save(two / NEWEST, theta(3), {}, {"step": 3})
    assert [load(two / name).meta["step"] for name in (NEWEST, PREVIOUS)] == [3, 2]
    assert {path.name for path in two.iterdir()} == {NEWEST, PREVIOUS}


def test_a_file_system_without_hard_links(two, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(atomic.os, "link", refused)
    save(two / NEWEST, theta(3), {}, {"step": 3})
    assert [load(two / name).meta["step"] for name in (NEWEST, PREVIOUS)] == [3, 2]


def test_both_damaged(two):
    flip(two / NEWEST)
    truncate(two / PREVIOUS)
    with pytest.raises(UserError, match=r"digest.*previous"):
        latest(two)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        latest(tmp_path)


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path):
    save(tmp_path / NEWEST, theta(), state(), META)
    good = (tmp_path / NEWEST).read_bytes()
    noticed = 0
    for position in np.random.default_rng(5).choice(len(good), 150, replace=False):
        content = bytearray(good)
        content[position] ^= 1 << (int(position) % 8)
        (tmp_path / NEWEST).write_bytes(content)
        try:
            found = load(tmp_path / NEWEST)
        except UserError:
            noticed += 1
            continue
        same(found.theta, theta())
        for name, entry in state().items():
            same(found.state[name], entry)
        assert found.meta == META
    assert noticed > 0


def test_disk_full_leaves_the_files_as_before(two):
    before = contents(two)
    program = f"""
import resource, signal, sys
import numpy as np
from hfmpi.errors import UserError
from hfmpi.files.checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save({str(two / NEWEST)!r}, np.zeros(100_000), {{}}, {{}})
except UserError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cannot write {two / NEWEST}: ")
    assert len(done.stderr.splitlines()) == 1
    assert contents(two) == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failure_at_a_later_moment(step, two, monkeypatch):
    before = contents(two)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, step, full)
        with pytest.raises(UserError, match="No space left on device"):
            save(two / NEWEST, theta(3), {}, {})
    assert contents(two) == before


def test_crash_between_the_two_renames(two, monkeypatch):
    replace = atomic.os.replace

    def crash(source, target):
        if str(target).endswith(NEWEST):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(two / NEWEST, theta(3), {}, {})
    assert latest(two).meta == {"step": 2}


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        save(tmp_path / "absent" / NEWEST, theta(), {}, {})


def hostile_external_link(file, folder):
    with h5py.File(folder / "secret.h5", "w") as other:
        other["theta"] = theta()
    del file["theta"]
    file["theta"] = h5py.ExternalLink(str(folder / "secret.h5"), "theta")


def hostile_soft_link(file, folder):
    file["state/copy"] = h5py.SoftLink("/theta")


def hostile_external_storage(file, folder):
    (folder / "raw").write_bytes(bytes(200))
    del file["theta"]
    file.create_dataset("theta", (50,), np.float32, external=[(str(folder / "raw"), 0, 200)])


def hostile_virtual(file, folder):
    layout = h5py.VirtualLayout((50,), np.float32)
    layout[:] = h5py.VirtualSource(folder / "secret.h5", "theta", (50,))
    del file["theta"]
    file.create_virtual_dataset("theta", layout)


def hostile_references(file, folder):
    file["state"].create_dataset("refs", data=[file["theta"].ref], dtype=h5py.ref_dtype)


def hostile_reference_attribute(file, folder):
    file["state"].attrs["ref"] = file["theta"].ref


def hostile_strings(file, folder):
    file["state"].create_dataset("words", data=["a", "b"], dtype=h5py.string_dtype())


def hostile_huge(file, folder):
    del file["theta"]
    file.create_dataset("theta", (2**42,), np.float32)  # declared, never stored


def hostile_overflowing_shape(file, folder):
    file["state"].create_dataset(
        "product", (2**31, 2**30), np.uint8
    )  # a product that exceeds 32 bits, but not 64


def hostile_big_endian(file, folder):
    file["state"].create_dataset("big", data=np.zeros(3, ">f4"))


def hostile_enumeration(file, folder):
    file["state"].create_dataset("enum", data=np.zeros(3, np.uint8), dtype=h5py.enum_dtype({"A": 0}, "u1"))


def hostile_compound(file, folder):
    file["state"].create_dataset("pairs", data=np.zeros(3, [("a", "<f4"), ("b", "<i4")]))


def hostile_odd_precision(file, folder):
    kind = h5py.h5t.STD_I32LE.copy()
    kind.set_precision(31)
    h5py.h5d.create(file["state"].id, b"odd", kind, h5py.h5s.create_simple((3,)))


def hostile_hard_link_cycle(file, folder):
    file["state/loop"] = file["/"]


def hostile_hard_link_to_itself(file, folder):
    file["loop"] = file["/"]


def hostile_one_dataset_many_times(file, folder):
    for k in range(60):  # 60 times its memory
        file[f"state/{k}"] = file["theta"]


def hostile_many_members(file, folder):
    for k in range(100):
        file["state"].create_group(str(k))


def hostile_many_attributes(file, folder):
    for k in range(100):
        file["state"].attrs[str(k)] = k


def hostile_huge_text(file, folder):
    file.attrs["meta"] = np.bytes_(b"x" * (2**20 + 1))


def hostile_text_of_variable_length(file, folder):
    file.attrs["meta"] = "{}"


def hostile_compressed(file, folder):
    file["state"].create_dataset("bomb", data=np.zeros(10**6), chunks=(10**6,), compression="gzip")


def hostile_array_attribute(file, folder):
    file["state"].attrs["many"] = np.zeros(100)


def hostile_group(file, folder):
    file["state"].create_group("nested")


def hostile_missing(file, folder):
    del file["state"]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("format", np.bytes_(b"hfmpi corpus"), "is not a checkpoint: its format is 'hfmpi corpus'"),
        ("version", 2, "is a checkpoint of version 2, but this hfmpi reads version 1"),
        ("digest", None, "is damaged: it has no attribute digest"),
    ],
)
def test_the_header_is_read_first(two, name, value, sentence):
    with h5py.File(two / NEWEST, "r+") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
        del file["theta"]
    with pytest.raises(UserError) as caught:
        load(two / NEWEST)
    assert str(caught.value) == f"{two / NEWEST} {sentence}"


def hostile_version(file, folder):
    file.attrs["version"] = 2


def hostile_format(file, folder):
    file.attrs["format"] = "another thing"


def hostile_extra_entry(file, folder):
    file["state"].attrs["lambda"] = 3.0


HOSTILE = [function for name, function in sorted(globals().items()) if name.startswith("hostile_")]


@pytest.mark.parametrize("change", HOSTILE)
def test_hostile_files_are_refused(change, tmp_path, monkeypatch):
    save(tmp_path / NEWEST, theta(), state(), META)
    with h5py.File(tmp_path / NEWEST, "r+") as file:
        change(file, tmp_path)
    # The content is refused for its values, not only because the digest does not match.
    if change is not hostile_extra_entry:
        monkeypatch.setattr(checkpoint, "_digest", no_digest)
    with pytest.raises(UserError, match=str(tmp_path / NEWEST)):
        load(tmp_path / NEWEST)


def no_digest(*arguments):
    pytest.fail("the content was read")


def append(history, record):
    history.add(record)
    history.flush()


def test_history_appends_and_reads(tmp_path):
    history = History(tmp_path)
    append(history, {"step": 1, "train_bpc": np.float32(2.5), "valid_bpc": None, "rho": math.nan})
    append(history, {"step": np.int64(2), "spans": {"gradient": np.float64(0.1)}, "why": "a\nb"})
    assert History.read(tmp_path) == [
        {"step": 1, "train_bpc": 2.5, "valid_bpc": None, "rho": None},
        {"step": 2, "spans": {"gradient": 0.1}, "why": "a\nb"},
    ]
    assert len(history.path.read_text().splitlines()) == 2


def test_history_truncate(tmp_path):
    history = History(tmp_path)
    history.truncate(3)  # the file does not exist yet
    assert list(tmp_path.iterdir()) == []
    for step in range(1, 6):
        append(history, {"step": step, "loss": 1 / step})
    before = history.path.read_text().splitlines()
    with history.path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [record["step"] for record in History.read(tmp_path)] == [1, 2, 3, 4, 5]
    history.truncate(9)
    assert history.path.read_text().splitlines() == before
    history.truncate(3)
    assert history.path.read_text().splitlines() == before[:3]
    append(history, {"step": 4})
    assert [record["step"] for record in History.read(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["history.jsonl"]


@pytest.mark.parametrize(
    "line", ['{"step": 1', "[1]", '{"loss": 2}', '{"step": "1"}', "\ud800", "[" * 100_000]
)
def test_damaged_history(line, tmp_path):
    lines = [json.dumps({"step": 0}), line, json.dumps({"step": 2})]
    (tmp_path / "history.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="damaged in line 2"):
        History.read(tmp_path)


def test_history_missing_or_unwritable(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        History.read(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        append(History(tmp_path / "absent"), {"step": 1})
