"""The page of runs: its contents for all kinds of folders; tests/browser/test_report.py displays it."""

import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from hfmpi.cli.report import report
from hfmpi.errors import UserError
from hfmpi.report import page as pages
from hfmpi.report.contents import read
from hfmpi.report.curves import MOST, thinned
from hfmpi.report.follow import follow
from hfmpi.report.levels import comparison
from hfmpi.report.styles import style
from hfmpi.report.times import MOST_RANKS, bars, spans

RUNS = Path(__file__).parent / "written_by_0.1.0"
KINDS = ["lstm-shf", "mlstm-adam", "mrnn-bhf", "rnn-sgd"]


@pytest.fixture(name="small")
def fixture_small(monkeypatch):
    """Omit the drawing library from the pages, because it is long."""
    monkeypatch.setattr(pages, "plotly_js", lambda: "const Plotly = {};")


@pytest.fixture(name="run")
def fixture_run(tmp_path):
    """Return a run that tests may modify."""
    return Path(shutil.copytree(RUNS / "lstm-shf", tmp_path / "run"))


class Words(HTMLParser):
    """The elements of a page by name, its text, and the data of its curves."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.data, self._in = [], "", "", ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "data":
            self.data += data
        elif self._in not in ("script", "style"):
            self.text += data


def words(*folders, every=None):
    return Words(pages.page(read(folders), every))


def rewrite(run, change):
    """Change each line of a history."""
    path = run / "history.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def test_runs_of_all_methods(small):
    found = words(*(RUNS / kind for kind in KINDS))
    data = json.loads(found.data)
    assert [run["name"] for run in data["runs"]] == KINDS
    for run, kind in zip(data["runs"], KINDS, strict=True):
        records = [json.loads(line) for line in (RUNS / kind / "history.jsonl").read_text().splitlines()]
        for key in ("P_I", "P_D", "P_I_full", "P_D_full", "step", "seconds"):
            assert run["x"][key] == pytest.approx([record[key] for record in records])
        assert run["train"] == pytest.approx([record["train_bpc"] for record in records], rel=1e-6)
        assert [v is None for v in run["valid"]] == [record["valid_bpc"] is None for record in records]
    meanings = [panel["meaning"] for panel in data["panels"]]
    told = dict(zip(meanings, zip(*(run["internals"] for run in data["runs"]), strict=True), strict=True))
    assert [bool(values) for values in told["damping λ"]] == [True, False, True, False]
    assert [bool(values) for values in told["CG iterations"]] == [True, False, True, False]
    assert [bool(values) for values in told["learning rate, or length of the step"]] == [
        False,
        True,
        False,
        True,
    ]
    for word in ("damping_factor", "characters, from the checkpoint", "Between the steps", "CG stopped by"):
        assert word in found.text


def test_a_page_loads_nothing(small):
    page = pages.page(read([RUNS / "lstm-shf"])).decode()
    assert "default-src 'none'" in page
    assert not {"link", "img", "iframe"} & {tag for tag, _ in Words(page.encode()).tags}
    assert not re.search(r"""(src|href)=|@import|url\(""", page)


def test_whatever_the_files_say_is_text(small, run):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> <b>%{x} $x"
    rewrite(
        run,
        lambda line: (
            line | {evil: line["step"], "__proto__": 1, "cg_stop": evil, "accepted": False, "message": evil}
        ),
    )
    settings = (run / "config.toml").read_text().replace('"lstm"', json.dumps(evil))
    (run / "config.toml").write_text(
        settings + f"deep = {'9' * 4000}\nhuge = 0x{'f' * 9000}\n{'.'.join('a' * 3000)} = 1\n"
    )
    times = json.loads((run / "timing.json").read_text())
    times["ranks"][0]["host"] = evil
    times["ranks"][0]["step_spans"][evil] = 1.0
    (run / "timing.json").write_text(json.dumps(times))
    (run / "DONE").write_text(evil)
    named = shutil.copytree(run, run.parent / evil.replace("/", "|"))
    clean, found = words(RUNS / "lstm-shf", RUNS / "lstm-shf"), words(run, named)
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in clean.tags} | {"p"}
    assert [tag for tag, _ in found.tags].count("script") == 3
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert found.text.count(evil) >= 6
    assert json.loads(found.data)["times"]["0"]["names"][-1] == html.escape(evil)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_sample_of_any_encoding_is_text(small, run, monkeypatch, encoding):
    written = "été </script>\x00".encode(encoding)
    monkeypatch.setattr("hfmpi.networks.sampling.sample", lambda *_: written)
    found = words(run)
    assert {"utf-8": "été </script>\\x00", "latin-1": "\\xe9t\\xe9 </script>\\x00"}[encoding] in found.text
    assert [tag for tag, _ in found.tags].count("script") == 3


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        (["history.jsonl", "checkpoint.h5", "checkpoint.previous.h5", "timing.json", "DONE"], "no step yet"),
        (["checkpoint.h5", "checkpoint.previous.h5"], "there is no checkpoint"),
        (["timing.json"], "cannot read"),
        (["config.toml"], "cannot read"),
    ],
)
def test_what_is_not_there_yet_is_told(small, run, gone, told):
    for name in gone:
        (run / name).unlink()
    found = words(run, RUNS / "rnn-sgd")
    assert told in found.text
    assert len(json.loads(found.data)["runs"]) == 2


@pytest.mark.parametrize("name", ["checkpoint.h5", "timing.json", "config.toml"])
def test_what_is_damaged_is_told_in_its_place(small, run, name):
    (run / "checkpoint.previous.h5").unlink()
    (run / name).write_bytes(b"\xff{")
    assert str(run / name) in words(run).text


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[1]\n", "is damaged in line 1"),
        (b'{"step": 1}\n', "its P_I is not a number"),
        (b'{"step": 1, "seconds": 1, "P_I": 1, "P_D": 1, "P_I_full": 1, "P_D_full": 1}\n', "train_bpc"),
    ],
)
def test_a_damaged_history_is_refused(run, content, why):
    (run / "history.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=why):
        read([run])


def test_a_run_of_a_model_of_the_users(small, run):
    def change(line):
        loss = {"loss": line.pop("train_bpc"), "valid_loss": line.pop("valid_bpc"), "valid_metric": 0.5}
        return line | loss

    rewrite(run, change)
    data = json.loads(words(run, RUNS / "rnn-sgd").data)
    assert [one["unit"] for one in data["runs"]] == ["loss", "bits/char"]
    assert None not in data["runs"][0]["train"]
    assert data["panels"][0]["meaning"] == "metric on the validation set"


def test_settings_are_those_in_effect(run):
    config = run / "config.toml"
    config.write_text('optimizer = "shf"\ngradient_batch = 0\nwarmup = 3\n[settings]\ndamping = 0.5\n')
    (found,) = read([run])
    settings = found.settings
    assert (settings["gradient_batch"], settings["burn_in"], settings["damping"]) == (320, 3, 0.5)
    assert settings["cg_max_steps"] == 15  # the preset's
    assert "model" not in settings  # a run of hfmpi.train has a user's model
    config.write_text("tomorrow = [1, 2]\n")
    assert read([run])[0].settings == {"tomorrow": [1, 2]}


def test_losses_that_are_not_known_are_gaps(small, run):
    rewrite(run, lambda line: line | ({"train_bpc": None} if line["step"] == 2 else {}))
    train = json.loads(words(run).data)["runs"][0]["train"]
    assert [value is None for value in train][:3] == [False, True, False]


def test_lines_are_told_apart_without_colours():
    styles = [style(number) for number in range(43)]
    assert len({(one.dash, one.mark) for one in styles[:42]}) == 42
    assert styles[42] == styles[0]


def test_long_curves_keep_their_ends_and_their_beginning():
    assert thinned(MOST).tolist() == list(range(MOST))
    kept = thinned(10**6)
    assert len(kept) <= MOST
    assert (kept[0], kept[-1]) == (0, 10**6 - 1)
    assert {0, 1, 2, 3, 5, 10} <= set(kept.tolist())  # of a logarithmic axis


def test_of_a_long_history_every_validation_is_shown(small, run):
    line = json.loads((run / "history.jsonl").read_text().splitlines()[0])
    steps = (line | {"step": k, "valid_bpc": 2.0 if k % 777 == 0 else None} for k in range(1, 4000))
    (run / "history.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (one,) = json.loads(words(run).data)["runs"]
    shown = [k for k, valid in zip(one["x"]["step"], one["valid"], strict=True) if valid is not None]
    assert shown == [777 * k for k in range(1, 6)]
    assert len(one["train"]) < 2100


def test_of_many_ranks_some_have_bars(run):
    times = json.loads((run / "timing.json").read_text())
    one = times["ranks"][0]
    times["ranks"] = [one | {"step_spans": {"gradient": 1.0, "waiting": float(999 - k)}} for k in range(1000)]
    found = bars(spans(times))
    assert len(found["ranks"]) == MOST_RANKS
    assert (found["ranks"][0], found["ranks"][-1]) == (
        "rank 999",
        "rank 0",
    )  # from the shortest to the longest waiting time
    assert found["names"] == ["gradient", "waiting"]


def test_runs_of_one_name_are_told_apart(small, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other" / "run")
    assert [one.name for one in read([run, other])] == [str(run), str(other)]


def test_the_command_writes_a_page_with_all_in_it(run, tmp_path):
    out = tmp_path / "page.html"
    for _ in range(2):  # a page replaces the page
        result = CliRunner().invoke(report, [str(run), "--out", str(out)])
        assert result.exception is None
    assert result.output == f"{out}: 1 run(s), {out.stat().st_size / 1e6:.1f} MB\n"
    assert b"plotly.js v" in out.read_bytes()


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("run/history.jsonl", "exists and is not a page of hfmpi report"),
        ("run", "exists and is not a page of hfmpi report"),
        ("nowhere/page.html", "cannot write"),
    ],
)
def test_what_cannot_become_a_page(small, run, monkeypatch, out, why):
    monkeypatch.chdir(run.parent)
    before = (run / "history.jsonl").read_bytes()
    result = CliRunner().invoke(report, ["run", "--out", out])
    assert isinstance(result.exception, UserError)
    assert why in str(result.exception)
    assert (run / "history.jsonl").read_bytes() == before


def test_without_plotly_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = CliRunner().invoke(report, [str(run), "--out", str(tmp_path / "page.html")])
    assert str(result.exception) == "a page needs plotly: pip install plotly"
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("folder", ["nothing", "empty"])
def test_what_is_no_run_is_refused(small, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="does not contain a run"):
        read([tmp_path / folder])


def test_following_ends_when_all_runs_are_done(small, run, tmp_path, monkeypatch):
    done = run / "DONE"
    says, out = done.read_text(), tmp_path / "page.html"
    done.unlink()
    every, told = [], []

    def sleep(seconds):
        every.append(json.loads(Words(out.read_bytes()).data)["every"])
        assert seconds >= 0.5
        if len(every) == 1:  # damaged temporarily, as on a file system that is unavailable
            (run / "history.jsonl").rename(run / "kept")
            (run / "history.jsonl").write_text("[]\n")
        elif len(every) == 3:
            (run / "kept").rename(run / "history.jsonl")
            done.write_text(says)
        assert len(every) < 9

    monkeypatch.setattr(time, "sleep", sleep)
    assert follow([run], out, 0.5, told.append)
    assert every == [0.5, 0.5, 0.5]
    assert json.loads(Words(out.read_bytes()).data)["every"] is None  # it is unchanged
    assert len(told) == 1
    assert "is damaged in line 1" in told[0]


def test_ctrl_c_ends_the_following(run, tmp_path):
    (run / "DONE").unlink()
    out = tmp_path / "page.html"
    command = [sys.executable, "-m", "hfmpi", "report", run, "--out", out, "--follow"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not out.exists() and process.poll() is None:
            time.sleep(0.05)
        assert b'"every":5.0' in out.read_bytes()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "is no longer updated" in said
    assert b'"every":null' in out.read_bytes()


@pytest.mark.parametrize(("last", "said"), [(1.5, False), (1.53, False), (2.0, True)])
def test_a_run_that_overfits_is_named(last, said, run, tmp_path):
    path = run / "history.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        record["valid_bpc"] = None
    records[0]["valid_bpc"], records[1]["valid_bpc"], records[-1]["valid_bpc"] = 3.0, 1.5, last
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    out = tmp_path / "page.html"
    result = CliRunner().invoke(report, [str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    text = out.read_text("utf-8")
    assert "Losses against what they cost" in text
    steps = f"at step {records[1]['step']}, and is 2 at step {records[-1]['step']}."
    assert (f"overfits: its validation loss was lowest, 1.5, {steps}" in text) == said


def test_costs_of_several_runs_to_a_level_that_all_reached():
    def records(losses, each):
        return [
            {"train_bpc": loss, "valid_bpc": None, "P_I": 3 * i, "P_D": each * i, "seconds": 0.5 * i}
            for i, loss in enumerate(losses, 1)
        ]

    runs = [("few", records([3.0, 2.0, 1.5], 3000)), ("many", records([4.0, 2.5, 1.991, 1.991], 10))]
    _, head, *table = comparison(runs, "bits/char")
    assert head == "Costs to a training loss of 2.00 bits/char, which all runs reached:"
    assert [line.split() for line in table[:3]] == [
        ["run", "P_I", "P_D", "seconds"],
        ["few", "6", "6,000", "1.0"],
        ["many", "9", "30", "1.5"],
    ]
    assert comparison(runs[:1], "bits/char") == []
