"""The corpus and its file: written data are read back, and each kind of damage has an error message."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import decoded

from hfmpi.data.corpus import Corpus
from hfmpi.data.prepare import prepare
from hfmpi.errors import UserError

TEXT = b"in the beginning was the word. " * 20


@pytest.fixture(name="corpus")
def fixture_corpus() -> Corpus:
    return prepare(TEXT, 500, 100, {"source": "a test, naïve"}).corpus


@pytest.fixture(name="path")
def fixture_path(tmp_path: Path, corpus: Corpus) -> Path:
    path = tmp_path / "corpus.h5"
    corpus.write(path)
    return path


def test_what_is_written_is_read_back(corpus: Corpus, path: Path) -> None:
    again = Corpus.read(path)
    assert np.array_equal(again.train, corpus.train)
    assert np.array_equal(again.valid, corpus.valid)
    assert again.symbols == corpus.symbols == bytes(sorted(set(TEXT)))
    assert again.vocabulary == len(set(TEXT))
    assert again.provenance == corpus.provenance
    assert again.provenance["source"] == "a test, naïve"
    assert again.digest == corpus.digest
    assert again.train.dtype == again.valid.dtype == np.uint8
    assert decoded(again, again.train) + decoded(again, again.valid) == TEXT[:600]
    assert [item.name for item in path.parent.iterdir()] == ["corpus.h5"]


def test_the_file_describes_itself(corpus: Corpus, path: Path) -> None:
    with h5py.File(path) as file:
        assert file.attrs["format"] == b"hfmpi corpus"
        assert file.attrs["version"] == 1
        assert file.attrs["digest"].decode() == corpus.digest
        assert {"created", "creator", "provenance_source", "provenance_text_sha256"} <= set(file.attrs)
        assert set(file) == {"train", "valid", "symbols"}
        for dataset in file.values():
            assert dataset.dtype == np.uint8
            assert dataset.attrs["long_name"]
            assert dataset.dims[0].label


@given(st.binary(min_size=2, max_size=300))
def test_every_byte_can_be_a_symbol(text: bytes) -> None:
    corpus = prepare(text).corpus
    ids = np.concatenate([corpus.train, corpus.valid])
    assert decoded(corpus, ids) == text


def test_the_digest_covers_contents_and_not_provenance(corpus: Corpus) -> None:
    plain = {"train": corpus.train, "valid": corpus.valid, "symbols": corpus.symbols}
    assert Corpus(**plain).digest == corpus.digest
    moved = {"train": corpus.train[:-1], "valid": np.append(corpus.train[-1], corpus.valid)}
    others = [
        {"train": corpus.train[::-1]},
        {"valid": corpus.valid[1:]},
        {"symbols": corpus.symbols[:-1] + b"~"},
        moved,
    ]
    assert len({corpus.digest, *(Corpus(**{**plain, **other}).digest for other in others)}) == 5


# All ways to damage a file, with words of the resulting error message.
SPOILERS: dict[str, tuple[Callable[[h5py.File], object], str]] = {}


def spoils(sentence: str) -> Callable[[Callable[[h5py.File], object]], Callable[[h5py.File], object]]:
    def note(function: Callable[[h5py.File], object]) -> Callable[[h5py.File], object]:
        SPOILERS[function.__name__] = (function, sentence)
        return function

    return note


def replace(file: h5py.File, name: str, **settings: object) -> None:
    del file[name]
    file.create_dataset(name, **settings)


@spoils("not an hfmpi corpus")
def other_format(file: h5py.File) -> None:
    file.attrs["format"] = "hfmpi checkpoint"


@spoils("not an hfmpi corpus")
def format_a_number(file: h5py.File) -> None:
    file.attrs["format"] = 7


@spoils("not an hfmpi corpus")
def no_format(file: h5py.File) -> None:
    del file.attrs["format"]


@spoils("version 3, but this hfmpi reads version 2")
def other_version(file: h5py.File) -> None:
    file.attrs["version"] = 3


@spoils("version")
def version_a_text(file: h5py.File) -> None:
    file.attrs["version"] = np.bytes_(b"1")


@spoils("version")
def version_an_array(file: h5py.File) -> None:
    file.attrs["version"] = [1, 1]


@spoils("no attribute digest")
def no_digest(file: h5py.File) -> None:
    del file.attrs["digest"]


@spoils("attribute digest is not")
def digest_empty(file: h5py.File) -> None:
    file.attrs["digest"] = h5py.Empty("S64")


@spoils("attribute digest is not a plain text")
def digest_a_number(file: h5py.File) -> None:
    file.attrs["digest"] = 3


@spoils("do not match its digest")
def digest_of_another(file: h5py.File) -> None:
    file.attrs["digest"] = np.bytes_(b"0" * 64)


@spoils("do not match its digest")
def one_id_changed(file: h5py.File) -> None:
    file["train"][17] = (file["train"][17] + 1) % 3


@spoils("provenance_source is not")
def provenance_a_reference(file: h5py.File) -> None:
    file.attrs["provenance_source"] = file["train"].ref


@spoils("damaged")
def provenance_not_utf8(file: h5py.File) -> None:
    file.attrs["provenance_source"] = np.bytes_(b"\xff\xfe")


@spoils("/valid has ids outside the vocabulary")
def ids_outside(file: h5py.File) -> None:
    file["valid"][3] = file["symbols"].size


@spoils("the datasets train, valid and symbols and nothing else")
def no_train(file: h5py.File) -> None:
    del file["train"]


@spoils("/valid is not a one-dimensional dataset of at least one byte")
def valid_empty(file: h5py.File) -> None:
    replace(file, "valid", shape=(0,), dtype=np.uint8)


@spoils("valid is not a dataset of plain numbers")
def valid_null(file: h5py.File) -> None:
    replace(file, "valid", data=h5py.Empty("u1"))


@spoils("/train is not a one-dimensional dataset of at least one byte")
def train_int64(file: h5py.File) -> None:
    replace(file, "train", data=np.zeros(10, np.int64))


@spoils("/train is not a one-dimensional dataset of at least one byte")
def train_signed(file: h5py.File) -> None:
    replace(file, "train", data=np.zeros(10, np.int8))


@spoils("train is not a dataset of plain numbers")
def train_texts(file: h5py.File) -> None:
    replace(file, "train", data=["a", "b"])


@spoils("train is not a dataset of plain numbers")
def train_compound(file: h5py.File) -> None:
    replace(file, "train", data=np.zeros(3, [("a", "u1"), ("b", "f4")]))


@spoils("train is not a dataset of plain numbers")
def train_references(file: h5py.File) -> None:
    replace(file, "train", data=[file["valid"].ref], dtype=h5py.ref_dtype)


@spoils("/train is not a one-dimensional dataset of at least one byte")
def train_matrix(file: h5py.File) -> None:
    replace(file, "train", data=np.zeros((4, 4), np.uint8))


@spoils("/train is not a one-dimensional dataset of at least one byte")
def train_scalar(file: h5py.File) -> None:
    replace(file, "train", data=np.uint8(3))


@spoils("train is not a dataset of plain numbers")
def train_group(file: h5py.File) -> None:
    del file["train"]
    file.create_group("train")


@spoils("train is a link")
def train_soft_link(file: h5py.File) -> None:
    del file["train"]
    file["train"] = h5py.SoftLink("/valid")


@spoils("train is a link")
def train_external_link(file: h5py.File) -> None:
    del file["train"]
    file["train"] = h5py.ExternalLink("other.h5", "/train")


@spoils("train is not stored as plain numbers")
def train_external_storage(file: h5py.File) -> None:
    replace(file, "train", shape=(100,), dtype=np.uint8, external=[("/etc/passwd", 0, 100)])


@spoils("train is not stored as plain numbers")
def train_virtual(file: h5py.File) -> None:
    del file["train"]
    layout = h5py.VirtualLayout((10,), np.uint8)
    layout[:] = h5py.VirtualSource("/etc/passwd", "train", (10,))
    file.create_virtual_dataset("train", layout)


@spoils("train is not stored as plain numbers")
def train_compressed(file: h5py.File) -> None:
    replace(file, "train", data=np.zeros(1000, np.uint8), compression="gzip")


@spoils("train is not stored as plain numbers")
def train_never_written(file: h5py.File) -> None:
    replace(file, "train", shape=(1000,), dtype=np.uint8)


@spoils("train claims to have 1,000,000,000,000,000 bytes")
def train_gigantic(file: h5py.File) -> None:
    replace(file, "train", shape=(10**15,), dtype=np.uint8)


@spoils("train is not a dataset of plain numbers")
def train_enumeration(file: h5py.File) -> None:
    replace(file, "train", data=np.zeros(9, np.uint8), dtype=h5py.enum_dtype({"A": 0}, "u1"))


@spoils("train is not a dataset of plain numbers")
def train_of_seven_bits(file: h5py.File) -> None:
    kind = h5py.h5t.STD_U8LE.copy()
    kind.set_precision(7)
    del file["train"]
    h5py.h5d.create(file.id, b"train", kind, h5py.h5s.create_simple((9,)))


@spoils("and nothing else")
def hard_link_cycle(file: h5py.File) -> None:
    file["loop"] = file["/"]


@spoils("claims to have 101 members")
def many_members(file: h5py.File) -> None:
    for k in range(98):
        file.create_group(str(k))


@spoils("attributes")
def many_attributes(file: h5py.File) -> None:
    for k in range(100):
        file.attrs[f"provenance_{k}"] = k


@spoils("attribute provenance_source is not a plain text")
def huge_text(file: h5py.File) -> None:
    file.attrs["provenance_source"] = np.bytes_(b"x" * (2**20 + 1))


@spoils("attribute digest is not a plain text")
def text_of_variable_length(file: h5py.File) -> None:
    file.attrs["digest"] = "0" * 64


@spoils("symbols claims to have 300 bytes")
def too_many_symbols(file: h5py.File) -> None:
    replace(file, "symbols", data=np.zeros(300, np.uint8))


@spoils("not sorted and distinct")
def symbols_twice(file: h5py.File) -> None:
    file["symbols"][1] = file["symbols"][0]


@pytest.mark.parametrize("name", SPOILERS)
def test_a_spoiled_file_is_one_sentence(path: Path, name: str) -> None:
    spoil, words = SPOILERS[name]
    with h5py.File(path, "r+") as file:
        spoil(file)
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        Corpus.read(path)
    sentence = str(caught.value)
    assert words in sentence
    assert str(path) in sentence
    assert "\n" not in sentence
    assert path.read_bytes() == before


def test_a_truncated_file_is_one_sentence(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"damaged or truncated|is not an HDF5 file"):
            Corpus.read(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_change_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    corpus = prepare(b"abracadabra ", 9, 3).corpus
    path = tmp_path_factory.getbasetemp() / "damaged.h5"
    corpus.write(path)
    content = bytearray(path.read_bytes())
    places = st.integers(0, len(content) - 1)
    for place, byte in data.draw(st.dictionaries(places, st.integers(0, 255), max_size=4)).items():
        content[place] = byte
    path.write_bytes(content)
    try:
        read = Corpus.read(path).digest
    except UserError:
        read = corpus.digest  # refused, which is also correct
    assert read == corpus.digest


def test_what_is_no_corpus_file_is_one_sentence(tmp_path: Path) -> None:
    text = tmp_path / "text.h5"
    text.write_bytes(TEXT)
    os.mkfifo(tmp_path / "pipe.h5")
    for name, words in (
        ("text.h5", "is not an HDF5 file"),
        ("none.h5", "No such file"),
        ("pipe.h5", "not a regular file"),
        (".", "not a regular file"),
        ("text.h5/corpus.h5", "Not a directory"),
        ("nul\0.h5", "null byte"),
    ):
        with pytest.raises(UserError, match=words):
            Corpus.read(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everywhere")
def test_permissions_are_named(tmp_path: Path, corpus: Corpus, path: Path) -> None:
    path.chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*Permission denied"):
        Corpus.read(path)
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write .*Permission denied"):
        corpus.write(tmp_path / "new.h5")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["none/corpus.h5", "corpus.h5/corpus.h5", "folder", "x" * 300])
def test_a_bad_place_is_one_sentence_and_leaves_nothing(tmp_path: Path, path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    corpus = Corpus.read(path)
    with pytest.raises(UserError, match="cannot write"):
        corpus.write(tmp_path / name)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["corpus.h5", "folder"]
    assert list((tmp_path / "folder").iterdir()) == []


@contextmanager
def full_disk() -> Iterator[None]:
    # A limit on file sizes fails in the middle of a write, like a full disk. It is removed before the test is
    # reported, because pytest may write to a file.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, corpus: Corpus) -> None:
    old = tmp_path / "old.h5"
    old.write_bytes(b"as before")
    with full_disk(), pytest.raises(UserError, match=r"cannot write .*File too large"):
        corpus.write(old)
    assert old.read_bytes() == b"as before"
    assert list(tmp_path.iterdir()) == [old]


def test_a_link_stays_a_link(tmp_path: Path, corpus: Corpus) -> None:
    link = tmp_path / "link.h5"
    link.symlink_to(tmp_path / "target.h5")
    corpus.write(link)
    assert link.is_symlink()
    assert Corpus.read(tmp_path / "target.h5").digest == corpus.digest
    assert not (tmp_path / "target.h5").stat().st_mode & 0o111
