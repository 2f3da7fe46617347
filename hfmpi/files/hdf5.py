"""HDF5 files from untrusted sources: type, storage and size are checked before memory is allocated.

Only the features that hfmpi uses are accepted: hard links to groups and to contiguous datasets of plain
numbers that are stored in the file itself, and scalar attributes that are numbers or texts of fixed length.
Other links, virtual datasets, external storage, filters, references and all other types are refused without
being read.

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

MOST_MEMBERS = 64  # the limit for members of a group and attributes of an object; hfmpi writes about 10
MOST_TEXT = 2**20  # the limit for the bytes of an attribute

# h5py raises these exceptions for damaged files, with messages that do not help a user.
_HDF5_ERRORS = (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError)


class Damage(Exception):
    """Raised when a file is defective; the message continues a sentence that starts with the file's name."""


class InUse(UserError):
    """Raised when another program has locked a file, so that its content is unknown."""


class NotHDF5(UserError):
    """Raised when a file is not an HDF5 file."""


@dataclass(frozen=True)
class Format:
    """A kind of file, such as "corpus", and the version of its format that is written and read."""

    kind: str
    version: int

    @contextmanager
    def written(
        self, path: Path, digest: str, check: Callable[[Path], object], keep: Path | None = None
    ) -> Iterator[h5py.File]:
        """Yield a new file, which is written to `path` when the block ends; see `atomic.replace`."""
        # The file is created in memory, so that a full disk affects one plain write and not the HDF5 library.
        # From version v110 on, the structures of HDF5 have checksums.
        image = io.BytesIO()
        with h5py.File(image, "w", libver=("v110", "v110")) as file:
            set_text(file, "format", self._name)
            file.attrs["version"] = self.version
            set_text(file, "digest", digest)
            yield file
        replace(path, image.getbuffer(), keep, check)

    def claimed(self, file: h5py.File) -> bool:
        """Return whether a file claims to be of this kind, in any version and state."""
        try:
            return attribute(file, "format", "S") == self._name
        except Damage:
            return False

    def digest(self, file: h5py.File) -> str:
        """Return the digest that is stored in a file; raise a Damage if its kind or version is different."""
        name, version = attribute(file, "format", "S"), attribute(file, "version", "iu")
        if name != self._name:
            raise Damage(f"is not a {self.kind}: its format is {name!r:.60}")
        if version != self.version:
            raise Damage(
                f"is a {self.kind} of version {version!s:.20}, but this hfmpi reads version {self.version}"
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
        If the file cannot be read or is damaged, also for errors inside the `with` block; an `InUse` if
        another program has locked the file.
    """
    with open_regular(path) as file:  # reports missing permissions, which are not damage
        size = file.seek(0, 2)
    if not h5py.is_hdf5(path):
        raise NotHDF5(f"{path} is not an HDF5 file")
    try:
        # Files are replaced atomically, so that reading needs no lock; some file systems have no locks.
        with h5py.File(path, "r", locking=False) as file:
            yield file, size
    except Damage as damage:
        raise UserError(f"{path} {damage}") from None
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} needs more memory than is available") from None
    except _HDF5_ERRORS as error:
        if "already open for write" in str(error):
            raise InUse(
                f"{path} is open for writing in another program: close it there; if that program has died, "
                f"run `h5clear -s {path}` (of the HDF5 tools) to make the file readable again"
            ) from None
        if "unable to lock file" in str(error):  # occurs only if the environment requires locks
            raise InUse(
                f"{path} is locked by another program, or its file system has no locks: close it there, or "
                "set HDF5_USE_FILE_LOCKING=FALSE"
            ) from None
        raise UserError(f"{path} is damaged or truncated: HDF5 cannot read it") from None


def members(group: h5py.Group) -> list[str]:
    """Return the names of the members of a group; soft and external links are refused."""
    if len(group) > MOST_MEMBERS:
        raise Damage(f"is damaged: {group.name} claims to have {len(group):,} members")
    names = list(group)
    for name in names:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise Damage(f"is damaged: {_short(name)} is a link")
    return names


def array(group: h5py.Group, name: str, limit: int) -> np.ndarray:
    """Read a dataset of plain numbers with at most `limit` bytes, all of them stored in the file itself.

    `name` must be a result of `members`.
    """
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None or not _plain(dataset.id, "biuf"):
        raise Damage(f"is damaged: {_short(name)} is not a dataset of plain numbers")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize  # dataset.nbytes may overflow
    if size > limit:
        raise Damage(f"is damaged: {_short(name)} claims to have {size:,} bytes, more than is possible")
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
        raise Damage(f"is damaged: {holder.name} claims to have {len(holder.attrs):,} attributes")
    return list(holder.attrs)


def set_text(holder: Any, name: str, value: str) -> None:
    """Set a text attribute of fixed length, in UTF-8.

    HDF5 stores texts of variable length in a heap, and a damaged heap can make it loop forever.
    """
    content = value.encode()
    holder.attrs.create(name, np.bytes_(content), dtype=h5py.string_dtype("utf-8", max(1, len(content))))


def _plain(stored: Any, kinds: str) -> bool:
    """Return whether a stored type is a plain NumPy type: little-endian, of standard width, not an enum."""
    kind = stored.dtype
    if kind.kind not in kinds or kind.str[0] == ">":
        return False
    # The type is created again from its name, because h5py marks enumerations in the NumPy type's metadata.
    return kind.kind == "S" or stored.get_type().equal(h5py.h5t.py_create(np.dtype(kind.str), logical=True))


def _short(name: str) -> str:
    return name if len(name) < 60 and name.isascii() and name.isidentifier() else f"{name!r:.60}"
