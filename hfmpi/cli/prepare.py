"""`hfmpi prepare`: make a corpus from text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import click

from hfmpi.cli.values import PATH, Number
from hfmpi.data import texts
from hfmpi.data.corpus import Corpus, is_corpus
from hfmpi.data.prepare import ALL, TRAIN_CHARS, VALID_CHARS
from hfmpi.data.prepare import prepare as split
from hfmpi.data.vocabulary import Translation
from hfmpi.errors import UserError

__all__ = ["prepare"]


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="[TEXT]... OUT.h5", type=PATH)
@click.option(
    "--ptb-raw",
    metavar="DIR",
    type=PATH,
    help="Instead of TEXT: the raw files of the Penn Treebank in DIR, in order, without .START lines.",
)
@click.option("--corpus", type=click.Choice(texts.CORPORA), help="Instead of TEXT: the King James Bible.")
@click.option(
    "--train-chars",
    default=TRAIN_CHARS,
    show_default=True,
    type=Number(int, least=1, word=ALL),
    metavar=f"INTEGER|{ALL}",
    help="Characters for training, from the start of the text; all: every character that the other splits "
    "do not need.",
    shell_complete=lambda ctx, param, prefix: [word for word in [ALL] if word.startswith(prefix)],
)
@click.option(
    "--valid-chars",
    default=VALID_CHARS,
    show_default=True,
    type=Number(int, least=1),
    help="Characters for validation, after the training text.",
)
@click.option(
    "--test-chars",
    default=0,
    type=Number(int, least=0),
    help="Characters for a test, after the validation text  [default: none]",
)
@click.option(
    "--vocabulary",
    metavar="CORPUS.h5|RUN",
    type=PATH,
    help="Use the symbols of this corpus or run, so that its networks can read OUT.h5  [default: those of "
    "the text]",
)
@click.option(
    "--unknown",
    metavar="CHAR",
    help="With --vocabulary: replace every character that is not in it by CHAR.",
)
def prepare(
    paths: tuple[Path, ...],
    ptb_raw: Path | None,
    corpus: str | None,
    train_chars: int | Literal["all"],
    valid_chars: int,
    test_chars: int,
    vocabulary: Path | None,
    unknown: str | None,
) -> None:
    """Make the corpus OUT.h5 from one or more TEXT files, joined in this order; - is standard input.

    Every byte is a symbol; nothing is cleaned or removed. A text that is too short is split in proportion;
    the remainder of a longer text is not used, unless --train-chars is all.
    """
    *names, out = paths
    if sum([bool(names), ptb_raw is not None, corpus is not None]) != 1:
        raise UserError("use one of TEXT files, --ptb-raw and --corpus, and OUT.h5 as the last argument")
    if ptb_raw is not None:
        source = texts.read_ptb_raw(ptb_raw)
    elif corpus is not None:
        source = texts.read_corpus(corpus)
    else:
        source = texts.read_texts(names)

    if out == texts.STANDARD_INPUT:
        raise UserError("OUT.h5, the last argument, must be the name of a file, not -")
    if os.path.exists(out):
        if any(os.path.samefile(out, file) for file in source.files):
            raise UserError(f"{out} is one of the texts: use a different file for the corpus")
        # If OUT.h5 was forgotten, the last text would be overwritten.
        if not is_corpus(out):
            raise UserError(f"{out} exists and is not a corpus: remove it or use a different file")
        if vocabulary is not None and os.path.exists(vocabulary) and os.path.samefile(out, vocabulary):
            raise UserError(f"{out} is the corpus of --vocabulary: use a different file")
    elif not out.parent.is_dir():  # checked before a long text is processed
        raise UserError(f"cannot write {out}: there is no folder {out.parent}")

    translation = None
    if unknown is not None and len(unknown) != 1:
        raise UserError(f"--unknown takes one character, not {unknown!r}")
    if vocabulary is not None:
        character = None if unknown is None else os.fsencode(unknown)
        translation = Translation(symbols_of(vocabulary), str(vocabulary), character)
    elif unknown is not None:
        raise UserError(
            "--unknown needs --vocabulary: otherwise the vocabulary contains every character of the text"
        )

    result, size, unit, notes = split(
        source.parts, train_chars, valid_chars, source.provenance, test_chars, translation
    )
    result.write(out)
    for note in notes:
        click.echo(f"Note: {note}.")
    used = sum(map(len, result.splits.values()))
    click.echo(f"{click.format_filename(out)}: {used:,} of {size:,} {unit}, {result.vocabulary} symbols")
    for name, ids in result.splits.items():
        click.echo(f"  {name:7} {len(ids):>13,} {unit}")
    click.echo(f"  digest  sha256:{result.digest}")


def symbols_of(path: Path) -> bytes:
    """Return the vocabulary of a corpus file, or of the folder or checkpoint of a run."""
    if not os.path.lexists(path):
        raise UserError(f"there is no corpus or run {path}")
    if not os.path.isdir(path) and is_corpus(path):
        return Corpus.read(path).symbols
    from hfmpi.runs.trained_model import Trained

    return Trained.read(path, backend="numpy").symbols
