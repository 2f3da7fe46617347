"""HDF5 files from untrusted sources: type, storage and size are checked before memory is allocated.

Only what hfmpi writes is accepted: hard links to groups and to contiguous datasets of plain numbers that are
stored in the file itself, and scalar attributes that are numbers or texts of fixed length. Other links,
virtual datasets, external storage, filters, references and all other types are refused unread.

The root of every file has the attributes `format`, `version` and `digest`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hfmpi.errors import UserError
from hfmpi.files.atomic import open_regular, replace

__all__ = [
    "Damage",
    "Format",
    "InUse",
    "NotHDF5",
    "array",
    "attribute",
    "attributes",
    "members",
    "opened",
    "set_text",
]

MOST_MEMBERS = 64  # of a group, and attributes of an object; hfmpi writes about ten
MOST_TEXT = 2**20  # bytes of an attribute

# HDF5 raises any of these on damaged files, with messages that do not help a user.
_HDF5_ERRORS = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError)


class Damage(Exception):
    """A defect of a file; the message continues the sentence that starts with the file's name."""


class InUse(UserError):
    """Another program has locked the file, so that its content is unknown."""


class NotHDF5(UserError):
    """The file is of another kind."""


@dataclass(frozen=True)
class Format:
    """A kind of file, such as "corpus", and the version of it that is written and read."""

    kind: str
    version: int

    @contextmanager
    def written(
        self, path: Path, digest: str, check: Callable[[Path], object], keep: Path | None = None
    ) -> Iterator[h5py.File]:
        """Yield a new file, which is written to `path` when the block ends; see `atomic.replace`."""
        # The file is made in memory, so that a full disk affects one plain write and not the HDF5 library.
        # From v110 on, the structures of HDF5 have checksums.
        image = io.BytesIO()
        with h5py.File(image, "w", libver=("v110", "v110")) as file:
            set_text(file, "format", self._name)
            file.attrs["version"] = self.version
            set_text(file, "digest", digest)
            yield file
        replace(path, image.getbuffer(), keep, check)

    def claimed(self, file: h5py.File) -> bool:
        """Return whether a file claims to be of this kind, whatever its version and state."""
        try:
            return attribute(file, "format", "S") == self._name
        except Damage:
            return False

    def digest(self, file: h5py.File) -> str:
        """Return the digest that a file claims to have; raise a Damage for another kind or version."""
        name, version = attribute(file, "format", "S"), attribute(file, "version", "iu")
        if name != self._name:
            raise Damage(f"is not a {self.kind}: its format is {name!r:.60}")
        if version != self.version:
            raise Damage(
                f"is a {self.kind} of version {version!s:.20}, and this hfmpi reads version {self.version}"
            )
        return str(attribute(file, "digest", "S"))

    @property
    def _name(self) -> str:
        return f"hfmpi {self.kind}"


@contextmanager
def opened(path: Path) -> Iterator[tuple[h5py.File, int]]:
    """Open a file for reading and yield it with its size in bytes.

    Raises
    ------
    UserError
        In one sentence, also for errors inside the `with` block; an `InUse` if another program has locked
        the file.
    """
    with open_regular(path) as file:  # missing permissions are not damage
        size = file.seek(0, 2)
    if not h5py.is_hdf5(path):
        raise NotHDF5(f"{path} is not an HDF5 file")
    try:
        # Files are replaced as a whole, so that reading needs no lock; some file systems have none.
        with h5py.File(path, "r", locking=False) as file:
            yield file, size
    except Damage as damage:
        raise UserError(f"{path} {damage}") from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} needs more memory than there is") from None
    except _HDF5_ERRORS as error:
        if "already open for write" in str(error):
            raise InUse(
                f"{path} is open for writing in another program: close it there; if that program has died, "
                f"`h5clear -s {path}` (of the HDF5 tools) makes it readable again"
            ) from None
        if "unable to lock file" in str(error):  # only if the environment requires locks
            raise InUse(
                f"{path} is locked by another program, or its file system has no locks: close it there, or "
                "set HDF5_USE_FILE_LOCKING=FALSE"
            ) from None
        raise UserError(f"{path} is damaged or truncated: HDF5 cannot read it") from None


def members(group: h5py.Group) -> list[str]:
    """Return the names in a group; soft and external links are refused."""
    if len(group) > MOST_MEMBERS:
        raise Damage(f"is damaged: {group.name} claims {len(group):,} members")
    names = list(group)
    for name in names:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise Damage(f"is damaged: {_short(name)} is a link")
    return names


def array(group: h5py.Group, name: str, limit: int) -> np.ndarray:
    """Read a dataset of plain numbers, at most `limit` bytes, all of them stored in the file itself.

    `name` comes from `members`.
    """
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or not _plain(dataset.id, "biuf"):
        raise Damage(f"is damaged: {_short(name)} is not a dataset of plain numbers")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize  # the product that h5py computes wraps around
    if size > limit:
        raise Damage(f"is damaged: {_short(name)} claims {size:,} bytes, more than there can be")
    settings = dataset.id.get_create_plist()
    plain = settings.get_layout() == h5py.h5d.CONTIGUOUS and not settings.get_external_count()
    if not plain or (size and (dataset.id.get_storage_size() != size or dataset.id.get_offset() is None)):
        raise Damage(f"is damaged: {_short(name)} is not stored as plain numbers in the file")
    return np.asarray(dataset[()])


def attribute(holder: Any, name: str, kinds: str = "biufS") -> bool | int | float | str:
    """Read a scalar attribute, a number or a text of fixed length; `kinds` are NumPy's type letters."""
    if name not in holder.attrs:
        raise Damage(f"is damaged: it has no attribute {_short(name)}")
    about = holder.attrs.get_id(name)
    if about.shape != () or not _plain(about, kinds) or about.dtype.itemsize > MOST_TEXT:
        raise Damage(
            f"is damaged: its attribute {_short(name)} is not a plain {'text' if kinds == 'S' else 'value'}"
        )
    value = holder.attrs[name].item()
    return value.decode() if isinstance(value, bytes) else value


def attributes(holder: Any) -> list[str]:
    """Return the names of the attributes of an object."""
    if len(holder.attrs) > MOST_MEMBERS:
        raise Damage(f"is damaged: {holder.name} claims {len(holder.attrs):,} attributes")
    return list(holder.attrs)


def set_text(holder: Any, name: str, value: str) -> None:
    """Set a text attribute of fixed length, UTF-8.

    HDF5 stores texts of variable length in a heap, and a damaged heap can make it loop for ever.
    """
    content = value.encode()
    holder.attrs.create(name, np.bytes_(content), dtype=h5py.string_dtype("utf-8", max(1, len(content))))


def _plain(stored: Any, kinds: str) -> bool:
    """Return whether the stored type is a NumPy type: little-endian, not an enumeration, of usual width."""
    kind = stored.dtype
    if kind.kind not in kinds or kind.str[0] == ">":
        return False
    # Compare the type made from its name: h5py marks enumerations in the metadata of the NumPy type.
    return kind.kind == "S" or stored.get_type().equal(h5py.h5t.py_create(np.dtype(kind.str), logical=True))


def _short(name: str) -> str:
    return name if len(name) < 60 and name.isascii() and name.isidentifier() else f"{name!r:.60}"
