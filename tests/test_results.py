"""The page that compares methods agrees with the page of the study."""

import re
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "docs" / "results"
METHODS = "SGD", "BGD", "SHF", "BHF", "Adam", "SOAP", "Muon", "bhf-short", "subspace"


def rows(page, first, section=""):
    """Return the cells of all rows that start with a cell, without bold type and brackets."""
    text = (RESULTS / page).read_text()
    text = re.sub(r"\*\*| \([^)]*\)", "", text[text.index(section) :])
    found = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in found]


def test_methods_are_compared_by_what_the_study_found():
    at_2 = rows("fewest-passes.md", "2.0")  # P_I of both cells, ratios of both, P_D of both
    for i, method in enumerate(METHODS):
        p_i, p_d, *rest = rows("index.md", method)[0]
        assert p_i == f"{at_2[0][i]}; {at_2[1][i]}", method
        assert p_d == f"{at_2[4][i]}; {at_2[5][i]}", method
        small = [rows("fewest-passes.md", f"{cell} {method.lower()}")[0][-1] for cell in ("lstm", "mlstm")]
        assert rest[0] == "; ".join(small), method
        runs = [large(cell, method) for cell in ("LSTM", "mLSTM")]
        for found, column in zip(rest[1:], (7, 8), strict=True):
            assert found == ("; ".join(run[column] for run in runs) if any(runs) else "")


def large(cell, method):
    """Return the row of a run at the paper's size; empty if there is none."""
    name = f"`{method}`" if method == "subspace" else method
    return next(iter(rows("fewest-passes.md", f"{cell} {name}", "## The paper's size")), [])


def test_figures_of_the_winners_are_on_the_pages_that_are_named():
    pages = {
        "1": "fewest-passes.md",
        "2": "better.md",
        "3": "figure1.md",
        "4": "kjv.md",
        "5": "clock.md",
        "6": "peers.md",
        "7": "least-squares.md",
        "9": "shakespeare.md",
    }
    text = (RESULTS / "index.md").read_text()
    winners = text[text.index("## Who wins") : text.index("## Method by method")]
    seen = 0
    for row in re.findall(r"^\|.*\[.*\|$", winners, re.MULTILINE):
        _, _, _, *cells = row.split("|")
        named = "".join((RESULTS / pages[number]).read_text() for number in re.findall(r"\[(\d)\]", row))
        figures = re.findall(r"(?<![\d(\[])\d[\d,.]*\d(?![\])])", " ".join(cells))
        seen += len(figures)
        missing = [figure for figure in figures if figure not in named]
        assert not missing, row
    assert seen > 20
