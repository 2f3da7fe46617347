"""Prose, docstrings and messages are plain technical English: some words are refused."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

REFUSED = {
    "anew": "again, or from scratch",
    "in vain": "without success",
    "of another run": "of a different run",
    "whoever": "everyone who, or the name of the reader",
    "is let in": "is accepted",
    "of which no": "none of which",
    "by the clock": "in wall-clock time",
    "mend(?:ed|s)?": "fix",
}
"""Words of a dialect that this project once had, and what to write instead."""

WORDS = re.compile(rf"\b({'|'.join(REFUSED)})\b", re.IGNORECASE)
HEAD = re.compile(r'^\s*(?:r|f)?"""Give\b')


def texts():
    """Return the files of the project with prose, without this one and the texts of others."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout")
    names = [
        name
        for name in listed.stdout.split()
        if name.endswith((".py", ".md", ".toml")) or name.startswith("bin/")
    ]
    return [ROOT / name for name in names if (ROOT / name).is_file() and name != "tests/test_words.py"]


def test_prose_is_plain_english():
    wrong = []
    for path in texts():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found = WORDS.search(line) or HEAD.search(line)
            if found:
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {found.group().strip()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line", ["It is made anew.", "Whoever reads this", '    """Give the result."""', "mended by hand"]
)
def test_these_words_are_found(line):
    assert WORDS.search(line) or HEAD.search(line)


@pytest.mark.parametrize("line", ["a recommendation", "by the clocks", '"""Given a batch', "amend a record"])
def test_these_are_not(line):
    found = WORDS.search(line) or HEAD.search(line)
    assert not found
