"""Every page of the documentation as a reader sees it, without a network: bin/test-browser."""

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import NARROW, WIDE

BUILT = Path(__file__).parents[2] / "docs" / "_build" / "html"
PAGES = sorted(BUILT.rglob("*.html"))


def test_there_are_pages():
    assert {"index.html", "theory.html", "search.html"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(BUILT)))
def test_a_page(visit, path):
    seen = visit(path)
    assert not seen.abroad
    assert not seen.complaints
    assert not re.findall(r".{0,40}(?:\$|\\[([\])a-zA-Z]).{0,40}", seen.text()), "TeX that no one set"
    assert seen.page.locator("mjx-merror, [data-mjx-error]").count() == 0
    formulas = seen.page.locator(".math").count()
    assert seen.page.locator(".math mjx-container svg").count() >= formulas
    assert not seen.broken_figures()
    assert not seen.too_wide(WIDE)
    assert not seen.too_wide(NARROW)
    assert not dead_links(seen.page)


def dead_links(page):
    """Return the links of a page to missing files, and to missing parts of files."""
    found = set(page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)"))
    return [link for link in found if urlsplit(link).scheme == "file" and not leads_somewhere(link)]


def leads_somewhere(link):
    path, part = Path(unquote(urlsplit(link).path)), unquote(urlsplit(link).fragment)
    if not path.exists():
        return False
    return not part or path.suffix != ".html" or f'id="{part}"' in contents(path)


@cache
def contents(path):
    return path.read_text()


def test_the_search_finds_a_word(visit):
    seen = visit(BUILT / "search.html")
    seen.page.fill("input[name=q]", "preconditioner")
    seen.page.press("input[name=q]", "Enter")
    seen.page.wait_for_selector("#search-results li a")
    names = seen.page.locator("#search-results li a").all_inner_texts()
    assert "Theory" in names
    assert not seen.abroad
