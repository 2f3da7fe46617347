"""Facts about the project that occur in several files are consistent."""

import re
import tomllib
from pathlib import Path

import pytest

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
    assert not [words for words in installs if "hfmpi" in words]  # hfmpi is not on PyPI: a checkout is "."
    checkouts = [words for words in installs if words.startswith(("-e", ".", '"', "'"))]
    assert len(checkouts) > 5
    assert all(words.startswith(("-e .", '-e ".[')) for words in checkouts)


def test_the_environment_of_conda_has_the_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    recipe = re.findall(
        r"^  - ([\w-]+(?:>=[\d.]+)?)", (ROOT / "docs" / "environment.yml").read_text(), re.MULTILINE
    )
    names = {"matplotlib": "matplotlib-base"}
    needed = [
        *project["dependencies"],
        *(project["optional-dependencies"][extra][0] for extra in ("plot", "report")),
    ]
    for requirement in needed:
        name, bound = requirement.split(">=")
        assert f"{names.get(name, name)}>={bound}" in recipe
    assert f"python{project['requires-python']}" in recipe


def test_the_package_is_typed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "Typing :: Typed" in project["classifiers"]
    assert (Path(hfmpi.__file__).parent / "py.typed").read_bytes() == b""


def test_the_front_offers_what_it_names():
    for name in hfmpi.__all__:
        assert getattr(hfmpi, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Preset'"):
        _ = hfmpi.Preset
