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
