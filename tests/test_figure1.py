"""The study of the paper's Figure 1: its sizes, the choice among candidates, and the table of claims."""

import dataclasses
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from small import text, train, write_corpus

from hfmpi.data import prepare as data
from hfmpi.errors import UserError

FOLDER = Path(__file__).parents[1] / "examples" / "figure1"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import study

    return study


@pytest.fixture
def table(study):
    import table

    return table


def test_sizes_keep_the_ratios_of_the_paper(study):
    paper = study.SIZES["paper"]
    assert (paper.train_chars, paper.valid_chars) == (2_800_000, 200_000)
    for size in study.SIZES.values():
        for method, (gradient, curvature) in study.BATCHES.items():
            words = study.candidates("lstm", method)[0].options(size)
            given = dict(zip(words[::2], words[1::2], strict=True))
            batches = int(given["--gradient-batch"]), int(given.get("--curvature-batch", 0))
            for ours, theirs in zip(batches, (gradient, curvature), strict=True):
                assert abs(ours - theirs * size.sequences / study.SEQUENCES) <= 0.5
            if method == "bhf":
                assert batches[0] == size.sequences  # the gradient is that of the whole training set


def line(step, bpc, seconds=0.0, p_i=0, p_d=0, valid=None):
    costs = {"P_I": p_i, "P_D": p_d, "P_D_full": p_d}
    return {"step": step, "seconds": seconds, "train_bpc": bpc, "valid_bpc": valid, **costs}


def write_history(folder, lines):
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_the_choice_is_by_the_tuning_time_alone_and_at_equal_cost(study, tmp_path):
    first, second, third = study.candidates("lstm", "sgd")[study.FIRST]

    def choice():
        return study.best(tmp_path, 100.0, "lstm", "sgd")  # 20 s a candidate

    # Of the costs up to 100, which both came to, those from 80 on count.
    write_history(
        tmp_path / first.name, [line(1, 1.0, 5, 0, 50), line(2, 3.0, 20, 0, 100), line(3, 0.5, 90, 0, 150)]
    )
    write_history(
        tmp_path / second.name, [line(1, 2.8, 2, 0, 90), line(2, 2.9, 4, 0, 100), line(3, 4.0, 20, 0, 900)]
    )
    assert choice() == second  # the third one has not begun
    write_history(tmp_path / third.name, [line(1, 2.6, 30, 0, 100)])  # its first step took longer
    assert choice() == third


@pytest.mark.parametrize("method", ["bgd", "bhf"])
@pytest.mark.parametrize("optimum", range(7))
def test_tuning_goes_on_to_a_best_candidate_inside(study, tmp_path, method, optimum):
    known = study.candidates("lstm", method)
    tried = []
    while following := study.untried(tmp_path, 100.0, "lstm", method):
        for c in following:
            tried.append(known.index(c))
            write_history(tmp_path / c.name, [line(1, 2.0 + abs(known.index(c) - optimum), 5, 0, 100)])
    assert tried[:3] == [2, 3, 4]
    assert known.index(study.best(tmp_path, 100.0, "lstm", method)) == optimum
    edges = {i for i in (optimum - 1, optimum, optimum + 1) if 0 <= i < len(known)}
    assert set(tried) == {2, 3, 4} | edges | set(range(optimum, 2)) | set(range(5, optimum + 1))


def falling(step_p_i, step_p_d, per_step, floor=1.5, steps=40):
    """Give a run whose loss falls by `per_step` each step from 6 down to a floor; valid 0.1 above."""
    losses = [max(6 - per_step * k, floor) for k in range(steps)]
    return [
        line(k + 1, loss, k, (k + 1) * step_p_i, (k + 1) * step_p_d, loss + 0.1)
        for k, loss in enumerate(losses)
    ]


def test_verdicts_of_runs_whose_costs_are_known(table):
    run = {
        "sgd": falling(60, 96, 0.25),
        "bgd": falling(60, 10_500, 0.25),
        "bhf": falling(50, 42_000, 3.0),  # a twelfth of the steps, at 5/6 of the cost: 14.4 times
        "shf": falling(63, 3_000, 0.25),
    }
    histories = {("lstm", m): records for m, records in run.items()}
    histories |= {("mlstm", m): records for m, records in run.items()}
    histories["mlstm", "bgd"] = falling(30, 10_500, 0.25)
    histories["lstm", "shf"] = falling(63, 3_000, 0.25, floor=3.34)
    histories["mlstm", "shf"] = falling(63, 3_000, 0.25, floor=1.2)
    rows = {claim: (words, judged) for claim, _, words, judged in table.claims(histories)}
    # To 1.5: SGD takes 18 steps and BHF 2.
    assert rows["lstm: P_I of SGD over BHF"] == (
        "11 to 1.5 bits/char (1,080 against 100); 9.6 to 2.0 bits/char (960 against 100); "
        "8.4 to 2.5 bits/char (840 against 100)",
        "agrees",
    )
    assert rows["lstm: P_I of SGD over BGD"][1] == "agrees"
    assert rows["mlstm: P_I of SGD over BGD"][0].startswith("2 to 1.5")
    assert rows["SHF with LSTM"][1] == rows["SHF with mLSTM trains"][1] == "agrees"
    assert rows["SHF with mLSTM generalises"][0].startswith("mlstm SHF 1.300, ")
    assert rows["lstm: P_D of all to 3.4 bits/char"][0].startswith("SGD ")
    assert {judged for _, judged in rows.values()} == {"agrees", "–"}

    histories["mlstm", "sgd"] = falling(1, 96, 0.25)  # now it needs less than all others
    rows = {claim: judged for claim, _, _, judged in table.claims(histories)}
    assert rows["mlstm: P_I of SGD over BHF"] == rows["mlstm: P_I of SGD over BGD"] == "differs"


def test_cost_to_a_level_and_its_ratios_over_seeds(study, tmp_path, monkeypatch):
    import better

    monkeypatch.setattr(better, "LEVELS", {"train_bpc": 3.0, "valid_bpc": 3.0})
    for name, variant in better.VARIANTS.items():
        per_step = 0.5 if name == "BHF" else 1.0
        for model in variant.models:
            for seed in better.SEEDS:
                records = falling(10 + seed, 100, per_step)
                short = name == "at most 6" and seed == 2
                write_history(better.folder(tmp_path, model, name, seed), records[: 2 if short else None])
    monkeypatch.setattr(better, "history", lambda at: with_full(study.history(at)))
    # From 6 by halves: 3 is the loss before the seventh step; in validation, 0.1 above, the eighth is below.
    assert better.row(tmp_path, "lstm", "BHF", "train_bpc") == [
        "lstm", "BHF", *["66", "1.00 (1.00 to 1.00)"] * 2, "600", "1.00 (1.00 to 1.00)"
    ]  # fmt: skip
    assert better.row(tmp_path, "mlstm", "at most 10 iterations", "valid_bpc")[2:4] == [
        "55",
        "1.60 (1.60 to 1.60)",
    ]
    assert better.row(tmp_path, "mlstm", "at most 6", "train_bpc")[2:4] == ["2 of 3 seeds", "–"]


def with_full(records):
    return [record | {"P_I_full": record["P_I"]} for record in records]


def test_a_curve_with_less_of_a_floor_keeps_its_slope(study):
    import clock

    from hfmpi.speedup.scaling import Curve

    shape = clock.lowered(Curve((1.0, 2.0, 4.0), (10.0, 11.0, 13.0)), 3.0)  # 9 + b
    assert shape.seconds == pytest.approx((4.0, 5.0, 7.0))


def test_both_figures_are_drawn(study, tmp_path):
    import figure

    figure.write({run: falling(3, 96, 0.1) for run in study.runs()}, tmp_path)
    for name in ("figure1.png", "figure1-validation.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("run.py", r".*other.h5 has 4,200 training characters; this size wants --train-chars 175000 .*"),
        ("table.py", r".*other.h5 has no steps of lstm sgd"),
    ],
)
def test_data_of_another_size_and_a_study_without_runs_are_refused(
    study, tmp_path, monkeypatch, capsys, script, sentence
):
    data = write_corpus(tmp_path / "other.h5")
    words = [str(data), str(tmp_path / "out")] if script == "run.py" else [str(data)]
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert ended.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert re.fullmatch(rf"Error: {sentence}\n", found.err)


def test_runs_of_other_data_are_not_mixed(study, tmp_path):
    from run import prepare

    size = dataclasses.replace(study.SIZES["small"], batches=1000, length=300)
    train(tmp_path / "out" / "lstm-sgd-rate=2", write_corpus(tmp_path / "own.h5"), max_steps=1)
    prepare(tmp_path / "own.h5", tmp_path / "out", size)
    data.prepare(text()[::-1])[0].write(tmp_path / "other.h5")
    with pytest.raises(
        UserError, match=r"rate=2 was trained on other data than .*other.h5: name another OUT"
    ):
        prepare(tmp_path / "other.h5", tmp_path / "out", size)


def test_the_table_says_where_the_chosen_runs_ended(study, table, tmp_path, capsys):
    for model, method in study.runs():
        worse, better, _ = study.candidates(model, method)[study.FIRST]
        write_history(tmp_path / worse.name, falling(30, 96, 0.1))
        write_history(tmp_path / better.name, falling(30, 96, 0.2, steps=16))
    picked = study.chosen(tmp_path, 100.0)
    table.write(picked, study.histories(tmp_path, picked))
    lines = capsys.readouterr().out.splitlines()
    # The last training loss, of step 16, is that after 15 steps; half a step is nothing here.
    assert lines[2] == "| lstm sgd | rate=2 | 15 | 16 | 480 | 1,536 | 1,536 | 3.000 | 3.100 |"
    assert len(lines) == 2 + 8 + 1 + 2 + 13
