"""Texts in the vocabulary of another text, and corpora with a test text."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import decoded

from hfmpi.data.corpus import Corpus
from hfmpi.data.prepare import prepare
from hfmpi.data.vocabulary import Translation
from hfmpi.errors import UserError

SYMBOLS = bytes(sorted(b"abc ?"))


def put(text: bytes, symbols: bytes = SYMBOLS, replacement: bytes | None = b"?") -> Translation:
    """Translate a complete text; return the unknown symbols."""
    translation = Translation(symbols, "old.h5", replacement)
    translation.result = translation.add(text) + translation.finish()  # type: ignore[attr-defined]
    return translation


@pytest.mark.parametrize(("text", "result", "unknown"), [
    (b"a cab", b"a cab", {}),
    (b"a cad", b"a ca?", {b"d": 1}),
    ("ábc €€".encode(), b"?bc ??", {"á".encode(): 1, "€".encode(): 2}),
    ("ábc".encode("latin-1"), b"?bc", {b"\xe1": 1}),
    ("a𝄞b".encode()[:-2], b"a???", {b"\xf0": 1, b"\x9d": 1, b"\x84": 1}),  # cut within a character
    (b"\xa1\xa1]^-\\", b"??????", {b"\xa1": 2, b"]": 1, b"^": 1, b"-": 1, b"\\": 1}),
])  # fmt: skip
def test_one_replacement_for_every_unknown_character(text, result, unknown):
    translated = put(text)
    assert (translated.result, translated.unknown) == (result, unknown)


def test_a_character_of_which_one_byte_is_known_is_unknown_as_a_whole():
    symbols = bytes(sorted(SYMBOLS + b"\xc3\xa9"))
    assert put("aéáb".encode(), symbols).result == "aé?b".encode()


@settings(max_examples=50)
@given(st.text("abc é€𝄞d\n", max_size=40), st.binary(max_size=10), st.data())
def test_a_text_in_parts_is_the_text(text, tail, data):
    content = text.encode() + tail
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    whole, parts = put(content), Translation(SYMBOLS, "old.h5", b"?")
    found = b"".join(parts.add(content[a:b]) for a, b in zip([0, *cuts], [*cuts, None], strict=True))
    assert found + parts.finish() == whole.result
    assert parts.unknown == whole.unknown


def test_what_the_vocabulary_has_not_is_named_in_one_sentence():
    with pytest.raises(UserError) as caught:
        put("d é\xa0d d".encode() + b"\xff", replacement=None)
    assert str(caught.value) == (
        "the text contains 6 characters (4 distinct) that are not in the vocabulary of old.h5: 'd' (3), "
        r"'é' (1), '\xc2\xa0' (1), '\xff' (1); remove them, or use --unknown CHAR to replace them with a "
        "character of the vocabulary"
    )
    with pytest.raises(
        UserError, match=r"40 characters \(26 distinct\) .*'Z' \(15\).*\) and 16 more; remove"
    ):
        put(bytes(range(65, 91)) + b"Z" * 14, replacement=None)
    with pytest.raises(UserError, match=r"--unknown 'd' is not in the vocabulary of old\.h5$"):
        Translation(SYMBOLS, "old.h5", b"d")


def test_only_what_is_kept_must_be_in_the_vocabulary():
    kept = prepare(b"abc" * 4 + b"xyz", 8, 4, translation=Translation(SYMBOLS, "old.h5"))
    assert kept.corpus.symbols == SYMBOLS
    assert (kept.size, kept.notes) == (15, [])
    assert decoded(kept.corpus, kept.corpus.valid) == b"cabc"
    with pytest.raises(UserError, match=r"2 characters \(1 distinct\) "):
        prepare([b"abx", b"bax", b"yz"], 4, 2, translation=Translation(SYMBOLS, "old.h5"))


def test_sizes_are_those_of_the_text_in_its_new_vocabulary():
    text = "éa" * 10 + "ccc"
    found = prepare(text.encode(), 20, 3, translation=Translation(SYMBOLS, "at/old\udcff.h5", b"?"))
    assert decoded(found.corpus, found.corpus.train) == b"?a" * 10
    assert decoded(found.corpus, found.corpus.valid) == b"ccc"
    assert (found.size, found.unit) == (23, "characters")
    assert found.notes == [
        "the text contains 10 characters (1 distinct) that are not in the vocabulary of at/old\udcff.h5: "
        "'é' (10); replaced with '?'"
    ]
    assert found.corpus.provenance["vocabulary"] == "old\ufffd.h5"
    assert found.corpus.provenance["replaced_characters"] == "10"


# The test text ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "splits"), [
    ((5, 3, 2), (b"abcde", b"fgh", b"ij")),
    (("all", 3, 2), (b"abcdefg", b"hij", b"kl")),
    ((12, 6, 6), (b"abcdef", b"ghi", b"jkl")),  # in proportion
    ((5, 3, 0), (b"abcde", b"fgh")),
])  # fmt: skip
def test_a_test_text_follows_the_validation_text(sizes, splits, tmp_path: Path):
    train, valid, test = sizes
    corpus = prepare(b"abcdefghijkl", train, valid, test_chars=test).corpus
    assert tuple(decoded(corpus, ids) for ids in corpus.splits.values()) == splits
    corpus.write(tmp_path / "new.h5")
    again = Corpus.read(tmp_path / "new.h5")
    assert again.digest == corpus.digest
    assert tuple(decoded(again, ids) for ids in again.splits.values()) == splits
    with h5py.File(tmp_path / "new.h5") as file:
        assert (
            file.attrs["version"] == len(splits) - 1
        )  # older versions read the first format, and report the second
        assert set(file) == {*corpus.splits, "symbols"}


def test_a_test_text_that_cannot_be():
    for text, sizes, sentence in (
        (b"abcd", ("all", 2, 2), "none left for training after 2 for validation and 2 for test: use a longer "
         "text, or reduce --valid-chars and --test-chars"),
        (b"abcd", (100, 10, 10), "too short to split 100 to 10 to 10: use a longer text, or change "
         "--train-chars and --valid-chars and --test-chars"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            prepare(text, *sizes[:2], test_chars=sizes[2])


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda file: file.attrs.__setitem__("version", 1), "of version 1 has the datasets train, valid and"),
    (lambda file: file.__delitem__("test"), "of version 2 has the datasets train, valid, test and symbols"),
    (lambda file: file["test"].__setitem__(0, 99), "/test has ids outside the vocabulary"),
    (lambda file: file["test"].__setitem__(0, 1 - file["test"][0]), "do not match its digest"),
])  # fmt: skip
def test_a_damaged_test_text(damage, sentence, tmp_path: Path):
    prepare(b"aabbab" * 10, 40, 10, test_chars=10).corpus.write(tmp_path / "new.h5")
    assert np.unique(Corpus.read(tmp_path / "new.h5").test).size == 2
    with h5py.File(tmp_path / "new.h5", "r+") as file:
        damage(file)
    with pytest.raises(UserError, match=sentence):
        Corpus.read(tmp_path / "new.h5")
