"""The study of the paper's Figure 1: its sizes, the choice among candidates, its curves and its tables."""

import dataclasses
import json
import re
import runpy
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from small import text, train, write_corpus

from hfmpi.data import prepare as data
from hfmpi.errors import UserError
from hfmpi.optim.presets import preset

FOLDER = Path(__file__).parents[1] / "examples" / "figure1"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import study

    return study


@pytest.fixture
def curves(study):
    import curves

    return curves


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
            if method in ("subspace", "subspace-whole"):
                assert batches[1] == curvature
                curvature, batches = 0, (batches[0], 0)
            for ours, theirs in zip(batches, (gradient, curvature), strict=True):
                assert abs(ours - theirs * size.sequences / study.SEQUENCES) <= 0.5
            if method in ("bhf", "bhf-short", "subspace", "subspace-rows"):
                assert batches[0] == size.sequences  # the gradient is that of the full training set
            if method in ("adam", "soap", "muon"):
                assert study.BATCHES[method] == study.BATCHES["bgd"]


def line(step, bpc, seconds=0.0, p_i=0, p_d=0, valid=None):
    costs = {"P_I": p_i, "P_D": p_d, "P_D_full": p_d, "P_I_full": p_i + step}
    return {"step": step, "seconds": seconds, "train_bpc": bpc, "valid_bpc": valid, **costs}


def write_history(folder, lines):
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_the_choice_is_by_the_tuning_time_alone_and_at_equal_cost(study, tmp_path):
    first, second, third = study.candidates("lstm", "sgd")[2:5]

    def choice():
        return study.best(tmp_path, 100.0, "lstm", "sgd")  # 20 s per candidate

    # Of the costs up to 100, which both reached, those from 80 on count.
    write_history(
        tmp_path / first.name, [line(1, 1.0, 5, 0, 50), line(2, 3.0, 20, 0, 100), line(3, 0.5, 90, 0, 150)]
    )
    write_history(
        tmp_path / second.name, [line(1, 2.8, 2, 0, 90), line(2, 2.9, 4, 0, 100), line(3, 4.0, 20, 0, 900)]
    )
    assert choice() == second  # the third one has not started
    write_history(tmp_path / third.name, [line(1, 2.6, 30, 0, 100)])  # its first step took longer
    assert choice() == third


@pytest.mark.parametrize("method", ["bgd", "bhf", "subspace"])
@pytest.mark.parametrize("optimum", range(7))
def test_tuning_goes_on_to_a_best_candidate_inside(study, tmp_path, method, optimum):
    known = study.candidates("lstm", method)
    start = [1, 2, 3] if method == "subspace" else [2, 3, 4]
    tried = []
    while following := study.untried(tmp_path, 100.0, "lstm", method):
        for c in following:
            tried.append(known.index(c))
            write_history(tmp_path / c.name, [line(1, 2.0 + abs(known.index(c) - optimum), 5, 0, 100)])
    assert tried[:3] == start
    assert known.index(study.best(tmp_path, 100.0, "lstm", method)) == optimum
    edges = {i for i in (optimum - 1, optimum, optimum + 1) if 0 <= i < len(known)}
    assert set(tried) == {*start} | edges | set(range(optimum, start[0])) | set(range(start[-1], optimum + 1))


def test_candidates_have_the_presets_value_among_the_first_three(study):
    for method, tuned in study.TUNED.items():
        value = getattr(preset(method).optimizer, tuned.setting)
        if method not in ("bhf", "adam"):  # Martens' 45, and a rate for a batch of 32
            assert value in tuned.values[tuned.first : tuned.first + 3]
        assert len(tuned.values) == 7


def falling(step_p_i, step_p_d, per_step, floor=1.5, steps=40):
    """Return a run whose loss falls by `per_step` each step from 6 to a floor; validation is 0.1 above."""
    losses = [max(6 - per_step * k, floor) for k in range(steps)]
    return [
        line(k + 1, loss, k, (k + 1) * step_p_i, (k + 1) * step_p_d, loss + 0.1)
        for k, loss in enumerate(losses)
    ]


def chosen(curves, records, setting="rate=2"):
    return curves.Chosen(setting, curves.thinned(curves.followed(records)))


def test_verdicts_of_runs_whose_costs_are_known(table, curves):
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
    runs = {(*run, 0): chosen(curves, records) for run, records in histories.items()}
    rows = {claim: (words, judged) for claim, _, words, judged in table.claims(runs)}
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

    runs["mlstm", "sgd", 0] = chosen(curves, falling(1, 96, 0.25))  # now it needs less than all others
    rows = {claim: judged for claim, _, _, judged in table.claims(runs)}
    assert rows["mlstm: P_I of SGD over BHF"] == rows["mlstm: P_I of SGD over BGD"] == "differs"

    del runs["lstm", "bhf", 0], runs["mlstm", "shf", 0]
    rows = {claim: (words, judged) for claim, _, words, judged in table.claims(runs)}
    assert rows["lstm: P_I of SGD over BHF"] == rows["SHF with LSTM"] == ("–", "–")
    assert rows["SHF with mLSTM generalises"][1] == "–"


def test_ratios_are_those_of_the_same_seed(table, curves):
    runs = {}
    for seed, per_step in enumerate((0.25, 0.5, 1.0)):  # to 3.0: 12, 6 and 3 steps
        runs["lstm", "sgd", seed] = chosen(curves, falling(3, 12, per_step))
        runs["lstm", "subspace", seed] = chosen(curves, falling(5, 12, 1.0))
    assert table.costs(runs, "lstm", "sgd", "train_bpc", "P_I", 3.0) == {0: 36, 1: 18, 2: 9}
    # The P_I of everything executed is one more per step: 18 for subspace, and 48, 24 and 12.
    row = table.against(runs, "lstm", "train_bpc", 3.0)
    assert row == ["3.0", "1.3 (0.67 to 2.7)", "–", "–", "–", "1.3 (0.67 to 2.7), sgd"]
    assert table.today(runs, "lstm", "train_bpc", 3.0) == ["3.0", "24 (18)", "**18** (**15**)"]
    assert table.today(runs, "lstm", "valid_bpc", 3.0) == ["3.0", "32 (**24**)", "**30** (25)"]
    runs["lstm", "sgd", 2] = chosen(curves, falling(3, 12, 1.0, floor=3.5))
    assert table.today(runs, "lstm", "train_bpc", 3.0) == ["3.0", "–", "**18** (**15**)"]  # a seed is missing
    assert table.against(runs, "lstm", "train_bpc", 3.0)[1:] == ["–"] * 5


def test_the_whole_set_is_not_smoothed_and_other_batches_lag_a_fortieth(curves):
    losses = [10.0 - 0.001 * k for k in range(5001)]
    assert curves.smoothed(losses, 1.0) == losses
    quarter, single = (curves.smoothed(losses, share) for share in (0.25, 4 / 1750))
    assert quarter[:39] == pytest.approx(losses[:39])
    for step in (40, 100, 999, 5000):  # the mean lags by half of its window
        width = min(50, step // 20)
        assert quarter[step - 1] == pytest.approx(losses[step - 1] + 0.001 * (width - 1) / 2)
    assert single[199] == pytest.approx(losses[199] + 0.001 * 13 / 2)  # 14 steps have a 32nd of 1,750
    assert single[0] == losses[0]


def test_a_file_of_curves_keeps_levels_ends_and_early_steps(curves, tmp_path):
    noise = np.random.default_rng(0).normal(size=20_000)
    records = [
        line(
            k,
            float(1.5 + 4 * k**-0.3 + 0.02 * e),
            k / 7,
            3 * k,
            12 * k,
            1.6 + 4 * k**-0.3 if k % 437 == 0 else None,
        )
        for k, e in enumerate(noise, start=1)
    ]
    whole = curves.followed(records, 4 / 1750)
    study = curves.Study(
        "small",
        80.0,
        "digest",
        {("lstm", "sgd", 0): chosen(curves, records), ("mlstm", "subspace", 2): chosen(curves, records[:1])},
    )
    thin = curves.thinned(whole)
    study.runs["lstm", "sgd", 0] = curves.Chosen("rate=2", thin)
    curves.write(study, tmp_path / "curves.json")
    assert curves.read(tmp_path / "curves.json") == study
    assert (tmp_path / "curves.json").stat().st_size < 20_000
    assert [point["step"] for point in thin[:100]] == [*range(1, 101)]
    assert thin[-1] == whole[-1]
    for key in curves.LOSSES:
        for level in range(20, 80):
            at = [curves.reached(points, key, "P_I", level / 20) for points in (thin, whole)]
            assert at[0] == at[1]
        assert min(curves.curve(thin, key, "P_I")[1]) == min(curves.curve(whole, key, "P_I")[1])
        assert curves.curve(thin, key, "P_I")[1][-1] == curves.curve(whole, key, "P_I")[1][-1]


def test_runs_of_a_file_join_those_of_a_folder(study, curves, tmp_path):
    for seed in (0, 1):
        c = study.Candidate("lstm", "sgd", "rate=2", seed)
        write_history(tmp_path / c.name, falling(3, 12, 0.25))
    other = chosen(curves, falling(30, 12, 0.5), "rate=8")
    filed = {("lstm", "sgd", 1): other, ("mlstm", "muon", 0): other}
    curves.write(curves.Study("small", 80.0, None, filed), tmp_path / curves.NAME)
    found = curves.load([tmp_path], "small", None).runs
    assert [*found] == [("lstm", "sgd", 0), ("lstm", "sgd", 1), ("mlstm", "muon", 0)]
    assert [run.setting for run in found.values()] == ["rate=2", "rate=2", "rate=8"]  # folders come first
    assert curves.read(tmp_path / curves.NAME).runs == found
    # A run in a file of known runs has priority over the run in a folder.
    curves.write(curves.Study("small", 80.0, None, filed), tmp_path / "known.json")
    known = curves.elsewhere(tmp_path, curves.Study("small", 80.0, None, {}), [tmp_path / "known.json"])
    assert known.runs == filed
    with pytest.raises(UserError, match="has the size small: use --size small"):
        curves.load([tmp_path / "known.json"], "medium", None)
    (tmp_path / "known.json").write_text("{}")
    with pytest.raises(UserError, match="is not a file of curves"):
        curves.read(tmp_path / "known.json")


def test_cost_to_a_level_and_its_ratios_over_seeds(study, tmp_path, monkeypatch):
    import better

    monkeypatch.setattr(better, "LEVELS", {"train_bpc": 3.0, "valid_bpc": 3.0})
    for name, variant in better.VARIANTS.items():
        per_step = 0.5 if name in better.BASES else 1.0
        for model in variant.models:
            for seed in better.SEEDS:
                records = falling(10 + seed, 100, per_step)
                short = name == "at most 6" and seed == 2
                write_history(better.folder(tmp_path, model, name, seed), records[: 2 if short else None])
    # Halving from 6: 3 is the loss before the seventh step; in validation, 0.1 above, the eighth is below.
    assert better.row(tmp_path, "lstm", "BHF", "train_bpc") == [
        "lstm", "BHF", *(word for cost in ("66", "72", "600") for word in (cost, "1.00 (1.00 to 1.00)"))
    ]  # fmt: skip
    assert better.row(tmp_path, "mlstm", "at most 10 iterations", "valid_bpc")[2:4] == [
        "55",
        "1.60 (1.60 to 1.60)",
    ]
    assert better.row(tmp_path, "mlstm", "at most 6", "train_bpc")[2:4] == ["2 of 3 seeds", "–"]
    assert better.row(tmp_path, "mlstm", "6 last steps", "train_bpc")[2:4] == ["33", "2.00 (2.00 to 2.00)"]


@pytest.mark.parametrize(("best", "tried"), [(0.15, 3), (0.2, 4), (0.3, 5), (0.1, 4)])
def test_a_bar_has_its_best_rate_on_all_seeds(study, tmp_path, monkeypatch, capsys, best, tried):
    """The loss falls fastest at the best rate; another rate is tried if the best is the last one."""
    import bars

    made = []

    def called(words, log, *fine):
        options = dict(zip(words[3::2], words[4::2], strict=True))
        assert options["--gradient-batch"] == "1750"
        rate = float(Path(options["--out"]).name.split("-")[-2])
        made.append((rate, int(options["--seed"]), int(options["--max-steps"])))
        fall = 0.03 / (1 + 10 * abs(rate - best)) + 0.01 * int(options["--seed"])
        shutil.rmtree(options["--out"], ignore_errors=True)
        write_history(Path(options["--out"]), falling(3, 96, fall, steps=made[-1][2]))
        return 0

    monkeypatch.setattr(bars, "call", called)
    monkeypatch.setattr(bars, "prepare", lambda *arguments: None)
    monkeypatch.setattr(
        sys, "argv", ["bars.py", "--cells", "lstm", "--bars", "soap-all", "d.h5", str(tmp_path)]
    )
    bars.main()
    assert len({rate for rate, *_ in made}) == tried
    assert [run for run in made if run[2] == 210] == [(best, seed, 210) for seed in (0, 1, 2)]
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    # From 6 by 0.03, 0.04 and 0.05 a step: 3.0 is the loss after 100, 75 and 60 steps of 3 passes.
    assert row[:4] == ["| lstm", "soap-all", f"{best:g}", "225 (180 to 300)"]
    assert row[9] == "1.600"
    before = len(made)
    bars.main()  # finished runs are not repeated
    assert len(made) == before


def test_a_rate_that_failed_is_not_chosen(study, tmp_path):
    import bars

    run, short = (bars.Run("lstm", "soap-all", rate) for rate in (0.1, 0.2))
    write_history(run.folder(tmp_path), falling(3, 96, 0.01, steps=60))
    write_history(short.folder(tmp_path), falling(3, 96, 0.2, steps=30))
    assert bars.score(run, tmp_path) < bars.score(short, tmp_path) == float("inf")


def test_both_figures_are_drawn(study, curves, tmp_path):
    import figure

    pairs = [(model, method) for model in study.MODELS for method in study.METHODS]
    runs = {(*pair, seed): chosen(curves, falling(3, 96, 0.1)) for pair in pairs for seed in (0, 1)}
    del runs["lstm", "muon", 0], runs["lstm", "muon", 1]
    figure.write(runs, tmp_path)
    for name in ("figure1.png", "figure1-validation.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    by_counts = figure.draw(runs, "train_bpc", "bits/char", clock=False)
    assert {axes.get_xlabel() for axes in by_counts.axes if axes.get_xlabel()} == {
        figure.COSTS["P_I"].label,
        figure.COSTS["P_D"].label,
    }


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("run.py", r".*other.h5 has 4,200 training characters, but this size needs --train-chars 175000 .*"),
        ("table.py", r".*other.h5 is not a file of curves of this study"),
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
        UserError, match=r"rate=2 was trained on data that differ from .*other.h5: choose a different OUT"
    ):
        prepare(tmp_path / "other.h5", tmp_path / "out", size)


def test_the_median_seed_is_drawn(study, curves):
    import figure

    every = [chosen(curves, falling(3, 96, per_step)).points for per_step in (0.5, 0.2, 0.3)]
    assert figure.middle(every, "train_bpc") is every[2]
    assert figure.middle(every[:1], "valid_bpc") is every[0]


def test_a_smoothed_line_does_not_lag_and_noise_shrinks(study, curves):
    import figure

    steps = np.unique(np.geomspace(1, 20_000, 300).astype(int))
    straight = 5 - 0.3 * np.log(steps)
    assert figure.smooth(steps, straight) == pytest.approx(list(straight))
    noise = 0.1 * np.random.default_rng(0).normal(size=len(steps))
    off = np.asarray(figure.smooth(steps, straight + noise)) - straight
    assert off[:4] == pytest.approx(noise[:4], abs=1e-3)  # these steps are far apart
    assert np.std(off[steps > 100]) < 0.4 * np.std(noise[steps > 100])


def test_what_is_drawn_of_a_curve(study, curves):
    import figure

    points = chosen(curves, falling(3, 96, 0.01, steps=150)).points
    whole = curves.curve(points, "train_bpc", "P_I")
    assert figure.drawn("subspace", points, "train_bpc", "P_I") == whole
    later = [points[100] | {"step": step, "P_I": -step} for step in range(299, 340)]
    xs, _ = figure.drawn("sgd", [*points, *later], "train_bpc", "P_I")
    assert -299 in xs
    assert -300 not in xs  # such points are preserved for their low loss


def test_the_tables_say_where_the_chosen_runs_ended(study, curves, table, tmp_path, capsys):
    for model in study.MODELS:
        for method in study.METHODS[:-1]:
            first = study.TUNED[method].first
            worse, better, _ = study.candidates(model, method)[first : first + 3]
            write_history(tmp_path / worse.name, falling(30, 96, 0.1))
            write_history(tmp_path / better.name, falling(30, 96, 0.2, steps=16))
            seed = dataclasses.replace(better, seed=1)
            write_history(tmp_path / seed.name, falling(30, 96, 0.2, steps=14))
    table.write(curves.load([tmp_path], "small", None))
    lines = capsys.readouterr().out.splitlines()
    # The last training losses, of steps 14 and 16, are those after 13 and 15 steps: 3.4 and 3.0. SGD's batch
    # is so small that means are over 13 and 14 steps: 4.6 and 4.3.
    costs = "14 | 15 | 450 | 465 | 1,440 | 1,440"
    assert f"| lstm sgd | rate=2 | 2 | {costs} | 4.450 | 3.300 | 3.300 |" in lines
    assert f"| lstm bgd | rate=2 | 2 | {costs} | 3.200 | 3.300 | 3.300 |" in lines
    assert "| mlstm subspace-rows " + "| – " * 11 + "|" in lines
    assert curves.read(tmp_path / curves.NAME).runs["mlstm", "muon", 1].setting == "rate=0.3"
    capsys.readouterr()
    table.write(curves.load([tmp_path / curves.NAME], "small", None))
    assert capsys.readouterr().out.splitlines() == lines  # the file has all of it


def test_clock_says_from_which_number_of_ranks_on_each_is_the_fastest(study):
    import clock

    ranks = clock.RANKS
    times = {"SGD": 10.0 + 0 * ranks, "BGD": 80.0 / ranks + 2.0, "subspace": 1000.0 / ranks + 1.0}
    assert clock.intervals(times) == (
        "from 1 rank(s) on SGD, from 11 rank(s) on BGD, from 921 rank(s) on subspace"
    )


def test_clock_takes_steps_from_curves_and_seconds_from_timed_runs(
    study, curves, tmp_path, monkeypatch, capsys
):
    import clock

    corpus = write_corpus(tmp_path / "small.h5")
    common = {"model": "lstm", "optimizer": "subspace", "max_steps": 3, "sequence_length": 20}
    train(tmp_path / "timed" / "lstm-subspace", corpus, curvature_batch=4, **common)
    runs = {("lstm", name, 0): chosen(curves, falling(3, 96, 0.1)) for name in ("subspace", "muon")}
    curves.write(curves.Study("small", 60.0, None, runs), tmp_path / "curves.json")
    options = ["--level", "2.55", "--timed", str(tmp_path / "timed"), str(tmp_path / "curves.json")]
    monkeypatch.setattr(sys, "argv", ["clock.py", *options])
    clock.main()
    lines = capsys.readouterr().out.splitlines()
    head, _, steps, *rows = [line for line in lines if line.startswith("|")]
    assert (head, steps) == ("| ranks | subspace |", "| steps | 35 |")
    assert f"Muon has no timed run {tmp_path / 'timed' / 'lstm-muon'}." in lines
    seconds = np.array([[float(x.replace(",", "")) for x in row.split("|")[1:-1]] for row in rows])
    assert seconds[:, 0].tolist() == [2**i for i in range(15)]
    assert (np.diff(seconds[:, 1]) <= 0).all()
    # A pass over 1,750 sequences takes 1,750 / 14 times as long as one over the sequences of the timed run.
    job = clock.step(tmp_path / "timed" / "lstm-subspace", (1750, 512), [], clock.Link(0.0, np.inf))
    assert [each.batch for each in job.passes if each.curve.seconds[0] > 0][:1] == [1750]
    assert seconds[0, 1] == pytest.approx(35 * float(job.seconds([1])[0]), rel=0.01)


def test_seconds_are_those_of_runs_with_the_settings_of_the_study(
    study, curves, tmp_path, monkeypatch, capsys
):
    import seconds

    made = []

    def run(command, **options):
        words = dict(zip(command[8::2], command[9::2], strict=False))
        made.append((command[:3], words["--optimizer"], words["--set"], words["--max-seconds"]))
        write_history(Path(words["--out"]), [one | {"seconds": one["step"]} for one in falling(3, 96, 0.1)])

    monkeypatch.setattr(seconds.subprocess, "run", run)
    runs = {("lstm", name, 1): chosen(curves, falling(3, 96, 0.1), "rate=3") for name in ("muon", "soap")}
    curves.write(curves.Study("small", 60.0, None, runs), tmp_path / "curves.json")
    words = ["--limit", "7", "--methods", "muon", "--levels", "3", "data.h5", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["seconds.py", *words, str(tmp_path / "curves.json")])
    seconds.main()
    assert made == [(["mpirun", "-n", "2"], "muon", "rate=3", "7")]
    assert capsys.readouterr().out.splitlines()[-1] == "| Muon | 30 | 2.100 |"


def test_the_page_of_results_is_what_its_curves_say(curves, table, capsys):
    results = FOLDER.parents[1] / "docs" / "results"
    table.write(curves.load([results / "fewest-passes.json"], "small", 60.0))
    page = (results / "fewest-passes.md").read_text().splitlines()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if re.match(r"\| (2\.0|1\.9|lstm subspace )", line)]
    missing = [row for row in rows if row not in page]
    assert len(rows) == 25
    assert len(missing) <= 8, missing  # not all tables of validation are on the page


@pytest.mark.parametrize(
    ("size", "section", "first", "levels", "least"),
    [
        ("medium", "## Medium", 1, (3.0, 2.5, 2.0, 1.8, 1.6, 1.5, 1.4), 8),
        ("paper", "## The paper's size", 3, (3.0, 2.5, 2.0, 1.8, 1.6, 1.5), 10),
    ],
)
def test_larger_sizes_on_the_page_are_what_their_curves_say(
    curves, table, size, section, first, levels, least
):
    results = FOLDER.parents[1] / "docs" / "results"
    runs = curves.load([results / f"fewest-passes-{size}.json"], size, None).runs
    page = (results / "fewest-passes.md").read_text()
    lines = re.sub(r"\*\*|`|, one seed", "", page[page.index(section) :]).splitlines()
    seen = 0
    for cell, name in product(("LSTM", "mLSTM"), ("SGD", "BGD", "Adam", "SOAP", "Muon", "subspace")):
        method = name.lower()
        if not curves.seeds(runs, cell.lower(), method):
            continue
        row = next(line for line in lines if line.startswith(f"| {cell} {name} | "))
        cells = [value.strip() for value in row.split("|")][first + 1 :]
        found = [
            table.number(table.typical(runs, cell.lower(), method, "train_bpc", "P_I_full", level))
            for level in levels
        ]
        assert cells[: len(levels)] == found, row
        seen += 1
    assert seen == least
