"""A text in a given vocabulary: what is not in it is counted, and replaced where that is asked for."""

from __future__ import annotations

import re
from collections import Counter

from hfmpi.errors import UserError

__all__ = ["Translation"]

MOST_NAMED = 10  # unknown characters that a sentence names

_SEVERAL = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
"""A character of several bytes in UTF-8."""

_BEGUN = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")
"""The end of a text that may be the begin of one."""


class Translation:
    """Brings a text, part by part, into the vocabulary of another text.

    A character is unknown if one of its bytes is. What may be UTF-8 is taken for it, so that one replacement
    stands for one character; all other bytes are characters of their own.

    Parameters
    ----------
    symbols : bytes
        The vocabulary, sorted, no byte twice.
    name : str
        Whose vocabulary it is, for the user.
    replacement : bytes, optional
        A character of the vocabulary, in place of every unknown one. Without it there must be none.

    Attributes
    ----------
    unknown : Counter of bytes
        How often each unknown character was found so far.

    Raises
    ------
    UserError
        If the replacement is not in the vocabulary.
    """

    def __init__(self, symbols: bytes, name: str, replacement: bytes | None = None) -> None:
        if replacement is not None and set(replacement) - set(symbols):
            raise UserError(f"--unknown {_shown(replacement)} is not in the vocabulary of {name} itself")
        self.symbols, self.name, self.replacement = symbols, name, replacement
        self.unknown: Counter[bytes] = Counter()
        strange = re.escape(bytes(byte for byte in range(256) if byte not in symbols))
        self._pattern = re.compile(_SEVERAL + (b"|[" + strange + b"]" if strange else b""))
        self._begun = b""

    def add(self, part: bytes) -> bytes:
        """Give as much of the text up to here as is whole characters, and has not been given."""
        text = self._begun + part
        begun = _BEGUN.search(text, max(0, len(text) - 3))
        self._begun = begun[0] if begun else b""
        return self._known(text[: len(text) - len(self._begun)])

    def finish(self) -> bytes:
        """Give what is left at the end of the text; raise a UserError if unknown characters stay so."""
        left, self._begun = self._known(self._begun), b""
        if self.unknown and self.replacement is None:
            raise UserError(
                f"{self.told()}; take them out of it, or give --unknown CHAR to put one of the vocabulary in "
                "their place"
            )
        return left

    def told(self) -> str:
        """Name the unknown characters, the most frequent ones first, and what takes their place."""
        kinds, named = len(self.unknown), self.unknown.most_common(MOST_NAMED)
        listed = ", ".join(f"{_shown(character)} ({times:,})" for character, times in named)
        more = f" and {kinds - len(named)} more" if kinds > len(named) else ""
        noun = "character" if self.unknown.total() == 1 else "characters"
        put = "" if self.replacement is None else f"; {_shown(self.replacement)} takes their place"
        return (
            f"the text has {self.unknown.total():,} {noun} of {kinds} kind{'s' * (kinds > 1)} that the "
            f"vocabulary of {self.name} has not: {listed}{more}{put}"
        )

    def _known(self, text: bytes) -> bytes:
        if not text.translate(None, self.symbols):
            return text
        # In a text that will be refused, too, one byte stands for each, so that no more of it is read.
        put, symbols = self.replacement or self.symbols[:1], frozenset(self.symbols)

        def known(found: re.Match[bytes]) -> bytes:
            character = found[0]
            if symbols.issuperset(character):
                return character
            self.unknown[character] += 1
            return put

        return self._pattern.sub(known, text)


def _shown(character: bytes) -> str:
    """Give a character as it is if it can be printed, else its bytes."""
    try:
        text = character.decode()
    except UnicodeDecodeError:
        return repr(character).removeprefix("b")
    return repr(text) if text.isprintable() or text.isascii() else repr(character).removeprefix("b")
