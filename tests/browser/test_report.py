"""The page of hfmpi report as a reader sees and uses it, without a network: bin/test-browser."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NARROW, WIDE

from hfmpi.report.contents import read
from hfmpi.report.page import page

RUNS = Path(__file__).parents[1] / "written_by_0.1.0"
KINDS = ["lstm-shf", "mlstm-adam", "mrnn-bhf", "rnn-sgd"]

DRAWN = """() => [...document.querySelectorAll(".plot")].map(figure => ({
    kind: figure.classList[1],
    traces: figure.data.map(trace => [trace.name, trace.meta ?? "", trace.x.length]),
    lines: figure.querySelectorAll("path.js-line").length,
    marks: figure.querySelectorAll(".points path.point").length,
    bars: figure.querySelectorAll(".bars path").length,
    x: [figure.layout.xaxis.type, figure.layout.xaxis.title.text],
    y: figure.layout.yaxis.type,
}))"""

SHOWS = """([steps, type]) => {
    const figure = document.getElementById("loss-0");
    return figure?.data?.[0].x.length === steps && figure.layout.xaxis.type === type;
}"""


@pytest.fixture(name="content", scope="module")
def fixture_content():
    """Create the page of four runs."""
    return page(read([RUNS / kind for kind in KINDS]))


@pytest.fixture(name="seen")
def fixture_seen(visit, content, tmp_path):
    """Open the page as a different file in each test, because a reader's choices are stored."""
    path = tmp_path / "page.html"
    path.write_bytes(content)
    return visit(path)


def figures(seen, kind):
    return [figure for figure in seen.page.evaluate(DRAWN) if figure["kind"] == kind]


def test_a_page_of_runs(seen):
    assert not seen.abroad
    assert not seen.complaints
    (loss,) = figures(seen, "loss")
    assert {(name, kind) for name, kind, _ in loss["traces"]} == {
        (name, kind) for name in KINDS for kind in ("training", "validation")
    }
    assert loss["lines"] == 4
    assert loss["marks"] == sum(count for _, kind, count in loss["traces"] if kind == "validation") > 4
    told = figures(seen, "internal")
    assert len(told) >= 9
    assert all(figure["lines"] for figure in told)
    assert [len(figure["traces"]) for figure in figures(seen, "times")] == [
        figure["bars"] for figure in figures(seen, "times")
    ]
    covering = seen.page.evaluate("() => document.querySelectorAll('.times .modebar-btn').length")
    assert not covering  # tools over the legend
    assert not seen.too_wide(WIDE)
    assert not seen.too_wide(NARROW)
    seen.page.wait_for_function(f"() => document.querySelector('#loss-0 svg').clientWidth < {NARROW}")


def test_axes_are_chosen(seen):
    (loss,) = figures(seen, "loss")
    assert (loss["x"], loss["y"]) == (["log", "P<sub>I</sub>, sequential passes"], "linear")
    seen.page.click("[data-view=loss][data-against=seconds]")
    seen.page.click("[data-view=loss][data-log=x]")
    seen.page.click("[data-view=loss][data-log=y]")
    (loss,) = figures(seen, "loss")
    assert (loss["x"], loss["y"]) == (["linear", "seconds"], "log")
    assert loss["lines"] == 4
    assert all(figure["x"][1] == "steps" for figure in figures(seen, "internal"))
    seen.page.click("[data-view=internal][data-against=P_D_full]")
    assert all(figure["x"][1].startswith("P<sub>D</sub>") for figure in figures(seen, "internal"))
    seen.page.reload()
    assert figures(seen, "loss")[0]["x"] == ["linear", "seconds"]
    assert not seen.complaints


def test_runs_are_hidden_by_the_legend(seen):
    before = figures(seen, "internal")
    seen.page.click("label:has-text('mlstm-adam')")
    (loss,) = figures(seen, "loss")
    assert "mlstm-adam" not in {name for name, *_ in loss["traces"]}
    assert loss["lines"] == 3
    assert sum(figure["lines"] for figure in figures(seen, "internal")) < sum(
        figure["lines"] for figure in before
    )
    seen.page.click("label:has-text('training')")
    (loss,) = figures(seen, "loss")
    assert (loss["lines"], {kind for _, kind, _ in loss["traces"]}) == (0, {"validation"})
    seen.page.click("label:has-text('training')")
    seen.page.click("label:has-text('mlstm-adam')")
    assert figures(seen, "internal") == before


def test_a_zoom_outlasts_a_reload(seen):
    seen.page.evaluate("() => Plotly.relayout('loss-0', {'yaxis.range[0]': 3, 'yaxis.range[1]': 4})")
    seen.page.reload()
    assert seen.page.evaluate("() => document.getElementById('loss-0').layout.yaxis.range") == [3, 4]
    box = seen.page.locator("#loss-0 .nsewdrag").bounding_box()
    seen.page.mouse.dblclick(box["x"] + 50, box["y"] + 50)
    seen.page.wait_for_function("() => document.getElementById('loss-0').layout.yaxis.autorange === true")
    seen.page.reload()
    assert seen.page.evaluate("() => document.getElementById('loss-0').layout.yaxis.range[1] > 4")


def test_words_of_files_do_nothing(visit, tmp_path):
    evil = "<img src=x onerror=document.title='done'> <b>bold"
    run = Path(shutil.copytree(RUNS / "lstm-shf", tmp_path / evil))
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    lines = [line | {"</script>" + evil: line["step"], "cg_stop": "</script>" + evil} for line in lines]
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = json.loads((run / "timing.json").read_text())
    times["ranks"][0]["step_spans"][evil] = 1.0
    (run / "timing.json").write_text(json.dumps(times))
    path = tmp_path / "page.html"
    path.write_bytes(page(read([run])))
    seen = visit(path)
    assert not seen.abroad
    assert not seen.complaints
    assert seen.page.title() == evil
    assert seen.page.locator("img, b").count() == 0
    assert evil in seen.page.locator("#times-0 .legend").text_content()
    box = seen.page.locator("#loss-0 .scatterlayer path.js-line").bounding_box()
    seen.page.mouse.move(box["x"] + 5, box["y"] + 3)
    seen.page.wait_for_selector("#loss-0 .hoverlayer .hovertext")
    assert evil in seen.page.locator("#loss-0 .hovertext").text_content()


def test_a_page_that_follows_a_run(visit, tmp_path):
    run, out = Path(shutil.copytree(RUNS / "lstm-shf", tmp_path / "run")), tmp_path / "page.html"
    done, history = run / "DONE", run / "history.jsonl"
    says = done.read_text()
    done.unlink()
    lines = history.read_bytes().splitlines(keepends=True)
    history.write_bytes(b"".join(lines[:2]))
    command = [sys.executable, "-m", "hfmpi", "report", run, "--out", out, "--follow", "--every", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert "follows" in process.stdout.readline()
            while not out.exists():
                assert process.poll() is None
            seen = visit(out)
            seen.page.wait_for_function(SHOWS, arg=[2, "log"])
            seen.page.click("[data-view=loss][data-log=x]")
            history.write_bytes(b"".join(lines))
            seen.page.wait_for_function(SHOWS, arg=[len(lines), "linear"], timeout=60_000)
            done.write_text(says)
            seen.page.wait_for_function("() => document.body.textContent.includes('done: ')", timeout=60_000)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert not seen.abroad
    assert not seen.complaints
