"""Damaged and hostile files, each determined by its kind and number (see files.py)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numba
import numpy as np

from hfmpi.data.corpus import Corpus
from hfmpi.data.prepare import prepare
from hfmpi.files import checkpoint

Change = Callable[[h5py.File, str, random.Random, Path], None]
CHANGES: dict[str, Change] = {}


# Bytes -----------------------------------------------------------------------------------------


def damage_bytes(good: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage bytes as disks and networks do; half of the damage is near the ends, with the structure."""
    content, size = bytearray(good), len(good)

    def place() -> int:
        near = rng.randrange(min(size, 2048))
        return rng.choice((near, size - 1 - near, rng.randrange(size), rng.randrange(size)))

    how = rng.choice(
        ("cut", "flip a bit", "flip bits", "swap bytes", "zeros", "other bytes", "longer", "moved")
    )
    if how == "cut":
        del content[rng.randrange(size) :]
    elif how.startswith("flip"):
        for _ in range(1 if how == "flip a bit" else rng.randrange(2, 40)):
            content[place()] ^= 1 << rng.randrange(8)
    elif how == "swap bytes":
        p, q = place(), place()
        content[p], content[q] = content[q], content[p]
    elif how == "zeros":
        p = place()
        content[p : p + 512] = bytes(len(content[p : p + 512]))
    elif how == "other bytes":
        for _ in range(rng.randrange(1, 9)):
            content[place()] = rng.randrange(256)
    elif how == "longer":
        content += rng.randbytes(rng.randrange(1, 3000))
    else:
        p, q, n = place(), place(), rng.randrange(1, 512)
        content[q : q + n] = content[p : p + n]
    return how, bytes(content)


@numba.njit
def lookup3(content: np.ndarray) -> int:  # pragma: no cover
    """Return the checksum of HDF5's structures, Bob Jenkins' lookup3."""
    mask, length = np.int64(0xFFFFFFFF), len(content)
    a = b = c = np.int64(0xDEADBEEF + length) & mask
    words = np.zeros(3 * max(1, -(-length // 12)), np.int64)
    for i in range(length):
        words[i // 4] |= np.int64(content[i]) << (8 * (i % 4))
    if not length:
        return c
    for k in range(0, len(words), 3):
        a, b, c = (a + words[k]) & mask, (b + words[k + 1]) & mask, (c + words[k + 2]) & mask
        if k == len(words) - 3:
            break
        for turn in (4, 6, 8, 16, 19, 4):
            a = ((a - c) & mask) ^ (((c << turn) | (c >> (32 - turn))) & mask)
            c = (c + b) & mask
            a, b, c = b, c, a
    for turn in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - (((b << turn) | (b >> (32 - turn))) & mask)) & mask
        a, b, c = b, c, a
    return b


def blocks(good: bytes) -> list[tuple[int, int]]:
    """Return the offsets of the structures of a file that end in a checksum: the start, and the checksum."""
    content, found = np.frombuffer(good, np.uint8), []
    for match in re.finditer(rb"\x89HDF|OHDR|OCHK|FRHP|FHDB|BTHD|BTLF", good):
        start = match.start()
        for end in range(start + 8, min(start + 4000, len(good) - 3)):
            if lookup3(content[start:end]) == int.from_bytes(good[end : end + 4], "little"):
                found.append((start, end))
                break
    return found


def damage_structure(good: bytes, found: list[tuple[int, int]], rng: random.Random) -> tuple[str, bytes]:
    """Change HDF5's structures and correct their checksums, as only an attacker does."""
    content = bytearray(good)
    start, end = rng.choice(found)
    how = rng.choice(("flip a bit", "flip bits", "odd bytes", "odd numbers"))
    if how.startswith("flip"):
        for _ in range(1 if how == "flip a bit" else rng.randrange(2, 6)):
            content[rng.randrange(start + 4, end)] ^= 1 << rng.randrange(8)
    elif how == "odd bytes":
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(start + 4, end)] = rng.choice((0, 1, 2, 3, 4, 8, 16, 127, 128, 254, 255))
    else:
        p, width = rng.randrange(start + 4, end - 8), rng.choice((2, 4, 8))
        number = rng.choice((-1, 0, 2**31 - 1, 2**62, start, 48, len(good)))
        content[p : p + width] = (number % 2**64).to_bytes(8, "little")[:width]
    sum_ = int(lookup3(np.frombuffer(bytes(content[start:end]), np.uint8)))
    content[end : end + 4] = sum_.to_bytes(4, "little")
    return how, bytes(content)


# Structure -------------------------------------------------------------------------------------


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


def again(file: h5py.File, name: str, **how: Any) -> None:
    del file[name]
    file.create_dataset(name, **how)


@change
def soft_link(file, name, rng, folder):
    file.move(name, "elsewhere")
    file[name] = h5py.SoftLink(rng.choice(("/elsewhere", f"/{name}", "/", "nowhere")))


@change
def external_link(file, name, rng, folder):
    del file[name]
    file[name] = h5py.ExternalLink(str(folder / rng.choice(("good.h5", "absent.h5"))), f"/{name}")


@change
def hard_link_cycle(file, name, rng, folder):
    file[rng.choice(("loop", f"{name}_loop"))] = file["/"]


@change
def hard_link_twice(file, name, rng, folder):
    file[f"{name}_2"] = file[name]


@change
def a_group_with_itself_inside(file, name, rng, folder):
    del file[name]
    file.create_group(name)[name] = file["/"]


@change
def virtual(file, name, rng, folder):
    shape, kind = file[name].shape, file[name].dtype
    layout = h5py.VirtualLayout(shape, kind)
    if shape:
        source = rng.choice((folder / "good.h5", folder / "absent.h5", "."))
        layout[:] = h5py.VirtualSource(source, name, shape)
    del file[name]
    file.create_virtual_dataset(name, layout)


@change
def external_storage(file, name, rng, folder):
    size = file[name].size * file[name].dtype.itemsize
    path = rng.choice((str(folder / "good.h5"), "/dev/zero", "/etc/passwd", str(folder / "absent")))
    again(file, name, shape=file[name].shape, dtype=file[name].dtype, external=[(path, 0, size)])


@change
def huge_shape(file, name, rng, folder):
    shape = rng.choice(((2**40,), (2**59,), (2**31, 2**28), (2**30, 2**27, 4), (2**31,)))
    again(file, name, shape=shape, dtype=rng.choice(("u1", "f4", "f8")))


@change
def huge_shape_in_a_sparse_file(file, name, rng, folder):
    kind, size = file[name].dtype, rng.choice((2**41, 2**42))
    del file[name]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple((size // kind.itemsize,))
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(kind), space, settings)


@change
def bomb(file, name, rng, folder):
    kind = file[name].dtype
    how = rng.choice(({"compression": "gzip", "compression_opts": 9}, {"compression": "lzf"}))
    again(file, name, data=np.zeros(2**22 // kind.itemsize, kind), chunks=(2**22 // kind.itemsize,), **how)


@change
def never_written(file, name, rng, folder):
    chunks = rng.choice((None, (64,)))
    again(file, name, shape=(2 ** rng.randrange(10, 50),), dtype=file[name].dtype, chunks=chunks, fillvalue=1)


@change
def filtered(file, name, rng, folder):
    kept = file[name][...].reshape(-1)
    how = rng.choice(({"shuffle": True}, {"fletcher32": True}, {"scaleoffset": 3}, {"maxshape": (None,)}, {}))
    again(file, name, data=kept, chunks=(max(1, kept.size // 3),), **how)


@change
def compact(file, name, rng, folder):
    kept = file[name][...].reshape(-1)[:100]
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.COMPACT)
    del file[name]
    kind, space = h5py.h5t.py_create(kept.dtype), h5py.h5s.create_simple(kept.shape)
    h5py.h5d.create(file.id, name.encode(), kind, space, settings).write(h5py.h5s.ALL, h5py.h5s.ALL, kept)


@change
def odd_type(file, name, rng, folder):
    size = file[name].size
    if rng.random() < 0.3:  # dtypes that NumPy does not support
        kind = rng.choice((h5py.h5t.STD_U8LE, h5py.h5t.STD_I32LE, h5py.h5t.IEEE_F32LE)).copy()
        if kind.get_class() == h5py.h5t.INTEGER:
            kind.set_precision(kind.get_size() * 8 - 1)
        else:
            kind.set_fields(31, 20, 11, 0, 20)
        del file[name]
        h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple((size,)))
        return
    kinds = ("<i2", ">i2", ">i4", ">f4", ">f8", "<f2", "<c8", "<c16", "S9", "V7", "(3,)<f4", "i1", "<u4")
    record = [("a", "<f4"), ("b", "u1")]
    made = rng.choice((*map(np.dtype, kinds), np.dtype(record), h5py.enum_dtype({"A": 0, "B": 1}, "u1"),
                       h5py.enum_dtype({"A": 0}, "<i4"), np.dtype(bool)))  # fmt: skip
    again(file, name, data=np.zeros(size, made))


@change
def variable_length(file, name, rng, folder):
    kind = rng.choice((h5py.string_dtype(), h5py.string_dtype("ascii"), h5py.vlen_dtype(np.uint8)))
    again(file, name, shape=(7,), dtype=kind)


@change
def references(file, name, rng, folder):
    kind = rng.choice((h5py.ref_dtype, h5py.regionref_dtype))
    whole = file[name].regionref[...] if kind is h5py.regionref_dtype else file[name].ref
    if rng.random() < 0.5:
        again(file, name, data=[whole], dtype=kind)
    else:
        file.attrs.create(rng.choice(("digest", "version", "format")), whole, dtype=kind)


@change
def odd_shape(file, name, rng, folder):
    kind = file[name].dtype
    shape = rng.choice(((), (0,), (1,), (0, 5), (1,) * 32, (2, 2)))
    data = h5py.Empty(kind) if rng.random() < 0.2 else np.zeros(shape, kind)
    again(file, name, data=data)


@change
def not_a_dataset(file, name, rng, folder):
    del file[name]
    if rng.random() < 0.5:
        file[name] = np.dtype("<f4")  # a named type
    elif rng.random() < 0.5:
        file.create_group(name)


@change
def attribute_odd(file, name, rng, folder):
    which = rng.choice(("format", "version", "digest"))
    values = (-1, 0, 2, 2**63, 1.0, 1.5, True, "1", "x" * 60000, [1, 1], np.zeros((20, 20)), h5py.Empty("S9"),
              np.bytes_(b"\xff\xfe"), np.void(b"abc"), 1j, h5py.Empty("<i4"), "a\nb\x1b[31m")  # fmt: skip
    file.attrs[which] = rng.choice(values)


@change
def attribute_missing(file, name, rng, folder):
    del file.attrs[rng.choice(("format", "version", "digest"))]


@change
def attribute_huge(file, name, rng, folder):
    which = rng.choice(("format", "version", "digest", "meta", "provenance_source"))
    size = rng.choice((2**20 + 1, 2**24))
    content = np.bytes_(b"x" * size) if rng.random() < 0.5 else np.zeros(size, np.uint8)
    file.attrs.create(which, content)


@change
def attribute_more(file, name, rng, folder):
    for k in range(rng.choice((1, 20, 5000))):
        file.attrs[f"{rng.choice(('provenance_', 'other '))}{k}"] = k


@change
def members_more(file, name, rng, folder):
    group = file.create_group("more") if rng.random() < 0.3 else file
    for k in range(rng.choice((1, 3, 3000))):
        group.create_group(f"{k}")


@change
def deep(file, name, rng, folder):
    group = file
    for _ in range(300):
        group = group.create_group("deeper")


@change
def odd_name(file, name, rng, folder):
    file.move(name, rng.choice(("n" * 60000, "a\nb", "\x1b[31m", f"{name} ", "Ünï", name.upper())))


@change
def other_hdf5_version(file, name, rng, folder):
    """Do nothing: `change_structure` copies the file with a different version of the format."""


@change
def user_block(file, name, rng, folder):
    """Do nothing: `change_structure` puts bytes before the file."""


def change_structure(path: Path, names: tuple[str, ...], rng: random.Random, good: Path) -> str:
    """Change a copy of a good file by h5py, as an attacker would; return the name of the change."""
    how = rng.choice(sorted(CHANGES))
    libver = rng.choice(("earliest", "v108", "v110", "latest")) if how == "other_hdf5_version" else "v110"
    block = 512 * 2 ** rng.randrange(3) if how == "user_block" else 0
    with (
        h5py.File(good, "r") as source,
        h5py.File(path, "w", libver=(libver, "latest"), userblock_size=block) as file,
    ):
        for name, value in source.attrs.items():
            file.attrs.create(name, value, dtype=source.attrs.get_id(name).dtype)
        for name in source:
            source.copy(name, file)
        name = rng.choice([n for n in names if n in file])
        CHANGES[how](file, name, rng, good.parent)
    return how


# Meaning ---------------------------------------------------------------------------------------


def odd_values(rng: random.Random) -> Any:
    """Return a value that JSON can represent but few readers expect."""
    deep: Any = []
    for _ in range(rng.choice((5, 400))):
        deep = [deep]
    return rng.choice((None, True, -1, 0, 1, 2**53, 10**12, 10**30, -(10**30), 0.5, 1e308, float("inf"),
                       float("nan"), "", "x", "a\0b", "y" * 10**5, "../../etc/passwd", "/dev/zero", [], {},
                       [1] * 1000, [300], [-1], ["a"], {"step": 1}, deep))  # fmt: skip


def change_meaning(path: Path, good: checkpoint.Checkpoint, rng: random.Random) -> str:
    """Write a complete checkpoint with the right digest and an unusual value."""
    meta, state, theta = json.loads(json.dumps(good.meta)), dict(good.state), good.theta
    how = rng.choice(("meta", "config", "counts", "no meta", "state", "no state", "more state", "theta"))
    if how in ("config", "counts"):
        meta[how][rng.choice(sorted(set(meta[how]) - {"settings"}))] = odd_values(rng)
    elif how == "meta":
        meta[rng.choice(sorted(meta))] = odd_values(rng)
    elif how == "no meta":
        del meta[rng.choice(sorted(meta))]
    elif how == "no state":
        del state[rng.choice(sorted(state))]
    elif how == "more state":
        state["extra"] = 1.0
    else:
        arrays = (theta[:-1], np.append(theta, theta[:1]), theta.astype(np.float64), theta.astype(np.int32),
                  theta.reshape(1, -1), theta * np.nan, theta[:0], np.ones(1, np.float32))  # fmt: skip
        if how == "theta":
            theta = np.asarray(rng.choice(arrays))
        else:
            odd = (1, -1.0, float("nan"), "word", True, 2**62, *arrays)
            state[rng.choice(sorted(state))] = rng.choice(odd)
    checkpoint.save(path, theta, state, meta)
    return how


# Changes of the files of a run -------------------------------------------------------------------


def change_corpus(path: Path, good: Path, rng: random.Random) -> tuple[str, str, str]:
    """Write a file that may replace the corpus of a run; return how, and phrases of the expected refusals.

    The phrases are those of `evaluate` without --data and of `train` that resumes; empty if both must work.
    """
    corpus = Corpus.read(good)
    symbols = np.frombuffer(corpus.symbols, np.uint8)
    train, valid = symbols[corpus.train].tobytes(), symbols[corpus.valid].tobytes()
    how = rng.choice(
        ("prepared again", "another text", "another split", "another vocabulary", "moved", "in use")
    )
    if how == "prepared again":
        prepare(train + valid, len(train), len(valid), {"source": f"{rng.random()}"})[0].write(path)
        return how, "", ""
    if how == "another text":
        cut = rng.randrange(1, len(train))
        prepare(train[cut:] + train[:cut] + valid, len(train), len(valid))[0].write(path)
    elif how == "another split":
        prepare(train + valid, len(train) - rng.randrange(1, 500), len(valid))[0].write(path)
    elif how == "another vocabulary":
        old, new = rng.choice(sorted(set(train))), rng.choice(sorted(set(range(256)) - set(train + valid)))
        table = bytes.maketrans(bytes([old]), bytes([new]))
        prepare((train + valid).translate(table), len(train), len(valid))[0].write(path)
        return how, "--data", "different vocabulary"
    elif how == "in use":
        content = bytearray(good.read_bytes())
        content[11] = rng.choice(
            (1, 5)
        )  # HDF5's mark that a program has opened it for writing, with SWMR or without
        content[44:48] = int(lookup3(np.frombuffer(content[:44], np.uint8))).to_bytes(4, "little")
        path.write_bytes(content)
        return how, "open for writing in another program", "open for writing in another program"
    else:
        return how, "use --data with its new path", "--out"
    return how, "no longer contains the data", "different data"


def change_text(good: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage lines of a text file, and insert other lines."""
    lines = good.splitlines(keepends=True)
    how = rng.choice(("bytes", "foreign line", "order", "odd value", "zeros"))
    at = rng.randrange(len(lines))
    if how == "bytes":
        return damage_bytes(good, rng)
    if how == "foreign line":
        foreign = (b"\n", b"{}\n", b"[1]\n", b'{"step": 1}\n', b'{"step": true}\n', b"\xff\xfe\n", b"NaN\n",
                   b"[" * 50000 + b"\n", b"x" * 100000, b'{"step": 1e400}\n', b"9" * 5000 + b"\n",
                   b'{"step": ' + b"9" * 300 + b"}\n", b"\0" * 70000, b"hidden = 5\n",
                   b"a.b.c = 1\n")  # fmt: skip
        lines.insert(at, rng.choice(foreign))
    elif how == "order":
        rng.shuffle(lines)
    elif how == "zeros":
        lines[at] = bytes(len(lines[at]))
    else:
        value = rng.choice(("1e400", "-1", "1e308", '"x"', "[]", "{}", "true", "NaN", "9" * 400, "null"))
        numbers = list(re.finditer(rb"(?<=[:=] )[-\d.e]+", lines[at]))
        if numbers:
            found = rng.choice(numbers)
            lines[at] = lines[at][: found.start()] + value.encode() + lines[at][found.end() :]
    return how, b"".join(lines)
