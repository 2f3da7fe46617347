"""What several files say of the project is the same in all of them."""

import re
import tomllib
from pathlib import Path

import hfmpi

ROOT = Path(__file__).parents[1]


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert cited["version"] == project["version"] == hfmpi.__version__
    assert (cited["title"], cited["license"]) == (project["name"], project["license"])


def test_no_page_installs_hfmpi_from_where_it_is_not():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "results").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    installs = re.findall(r"pip install ([^`\n]*)", text)
    assert len(installs) > 5
    assert not [words for words in installs if "hfmpi" in words]  # PyPI has none: a checkout is "."
