"""Translate a text to the vocabulary of another text: count unknown characters, or replace them."""

from __future__ import annotations

import re
from collections import Counter

from hfmpi.errors import UserError

__all__ = ["Translation"]

MOST_NAMED = 10  # maximum number of unknown characters in a message

_SEVERAL = rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
"""A character of several bytes in UTF-8."""

_INCOMPLETE = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")
"""An incomplete character at the end of a text."""


class Translation:
    """The translation of a text, part by part, to the vocabulary of another text.

    A character is unknown if one of its bytes is not in the vocabulary. Bytes that form a UTF-8 character
    count as one character and are replaced together; every other byte is a character.

    Parameters
    ----------
    symbols : bytes
        The vocabulary, sorted and distinct.
    name : str
        The file of the vocabulary, for messages.
    replacement : bytes, optional
        A character of the vocabulary that replaces unknown characters. Default: unknown characters are an
        error.

    Attributes
    ----------
    unknown : Counter of bytes
        The number of occurrences of each unknown character so far.

    Raises
    ------
    UserError
        If the replacement is not in the vocabulary.
    """

    def __init__(self, symbols: bytes, name: str, replacement: bytes | None = None) -> None:
        if replacement is not None and set(replacement) - set(symbols):
            raise UserError(f"--unknown {_shown(replacement)} is not in the vocabulary of {name}")
        self.symbols, self.name, self.replacement = symbols, name, replacement
        self.unknown: Counter[bytes] = Counter()
        others = re.escape(bytes(byte for byte in range(256) if byte not in symbols))
        self._pattern = re.compile(_SEVERAL + (b"|[" + others + b"]" if others else b""))
        self._incomplete = b""

    def add(self, part: bytes) -> bytes:
        """Translate the next part of the text, up to its last complete character."""
        text = self._incomplete + part
        incomplete = _INCOMPLETE.search(text, max(0, len(text) - 3))
        self._incomplete = incomplete[0] if incomplete else b""
        return self._translated(text[: len(text) - len(self._incomplete)])

    def finish(self) -> bytes:
        """Translate the remaining bytes at the end of the text.

        Raises
        ------
        UserError
            If there are unknown characters and no replacement.
        """
        end, self._incomplete = self._translated(self._incomplete), b""
        if self.unknown and self.replacement is None:
            raise UserError(
                f"{self.summary()}; remove them, or use --unknown CHAR to replace them with a character of "
                "the vocabulary"
            )
        return end

    def summary(self) -> str:
        """Return a sentence on the unknown characters, sorted by frequency, and their replacement."""
        count, distinct, named = self.unknown.total(), len(self.unknown), self.unknown.most_common(MOST_NAMED)
        listed = ", ".join(f"{_shown(character)} ({times:,})" for character, times in named)
        more = f" and {distinct - len(named)} more" if distinct > len(named) else ""
        replaced = "" if self.replacement is None else f"; replaced with {_shown(self.replacement)}"
        characters, are = ("character", "is") if count == 1 else ("characters", "are")
        return (
            f"the text contains {count:,} {characters} ({distinct} distinct) that {are} not in the "
            f"vocabulary of {self.name}: {listed}{more}{replaced}"
        )

    def _translated(self, text: bytes) -> bytes:
        if not text.translate(None, self.symbols):
            return text
        # Without a replacement each unknown character becomes an arbitrary symbol, so that the splits do not
        # extend further into the text.
        replacement, symbols = self.replacement or self.symbols[:1], frozenset(self.symbols)

        def translate(match: re.Match[bytes]) -> bytes:
            character = match[0]
            if symbols.issuperset(character):
                return character
            self.unknown[character] += 1
            return replacement

        return self._pattern.sub(translate, text)


def _shown(character: bytes) -> str:
    """Return a character in quotes if it is printable, and otherwise its bytes."""
    try:
        text = character.decode()
    except UnicodeDecodeError:
        return repr(character).removeprefix("b")
    return repr(text) if text.isprintable() or text.isascii() else repr(character).removeprefix("b")
