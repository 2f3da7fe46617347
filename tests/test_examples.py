"""The examples and the README produce the results that they describe."""

import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import train, write_corpus

ROOT = Path(__file__).parents[1]
MPIRUN = Path(sys.executable).with_name("mpirun")


def last_line(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()[-1]


def test_own_objective_is_minimised_alike_on_any_number_of_ranks():
    script = ROOT / "examples" / "own_objective.py"
    launcher = str(MPIRUN) if MPIRUN.exists() else shutil.which("mpirun")
    lines = [last_line(sys.executable, script), last_line(launcher, "-n", "3", sys.executable, script)]
    found = [re.match(r"f = ([\d.]+) on (\d) rank\(s\); the noise alone is ([\d.]+)", line) for line in lines]
    assert [match[2] for match in found] == ["1", "3"]
    for match in found:
        assert float(match[1]) <= float(match[3])  # as good a fit as the noise permits
    assert float(found[0][1]) == pytest.approx(float(found[1][1]), rel=1e-2)


def test_the_adding_problem_is_solved_alike_on_any_number_of_ranks(tmp_path):
    source = (ROOT / "examples" / "adding_problem.py").read_text()
    script = tmp_path / "adding_problem.py"  # shorter sequences, fewer steps
    script.write_text(source.replace("1000, 20,", "300, 6,").replace("range(1, 41)", "range(1, 21)"))
    launcher = str(MPIRUN) if MPIRUN.exists() else shutil.which("mpirun")
    lines = [last_line(sys.executable, script), last_line(launcher, "-n", "2", sys.executable, script)]
    found = [re.match(r"(\d) rank\(s\): test loss ([\d.]+)", line) for line in lines]
    assert [match[1] for match in found] == ["1", "2"]
    assert all(float(match[2]) < 0.005 for match in found)  # always answering 0.5 has a loss of 0.021


def test_the_program_of_the_readme(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(program, {})
    x, y, loss = map(float, re.findall(r"[-+\d.e]+", capsys.readouterr().out))
    assert (x, y) == pytest.approx((1, 1), abs=1e-5)
    assert loss < 1e-9


def test_the_table_of_the_study(tmp_path, capsys, monkeypatch):
    data = write_corpus(tmp_path / "small.h5")
    _, result = train(tmp_path / "some-run", data, max_steps=3, forget_bias=3.0)  # CG never stops on its own
    monkeypatch.setattr(sys, "argv", ["table.py", str(tmp_path / "some-run")])
    runpy.run_path(str(ROOT / "examples" / "kjv" / "table.py"), run_name="__main__")
    head, _, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert cells["| run"] == "| some-run"
    assert cells["steps"] == "3"
    assert cells["60 s"] == "–"  # not reached
    assert cells["P_I"] == "189"  # 3 (3 + 4 * 15)
    assert result.step == 3


def test_the_comparison_with_peers_runs_without_them():
    script = ROOT / "examples" / "benchmarks" / "compare.py"
    given = ["--model", "mlstm", "--batch", "2", "--repeats", "1", "--json"]
    hidden = "import sys; sys.modules.update(jax=None, torch=None); import runpy; "
    run = f"sys.argv[1:] = {given}; runpy.run_path({str(script)!r}, run_name='__main__')"
    found = json.loads(last_line(sys.executable, "-c", hidden + run))
    names = [(row["pass"], row["contestant"]) for row in found["rows"]]
    assert names == [(kind, who) for kind in ("product", "gradient") for who in ("hfmpi", "products alone")]
    assert all(row["seconds"] > 0 for row in found["rows"])


def test_the_measurements_on_a_gpu_are_commands_that_exist():
    script = ROOT / "bin" / "measure-gpu"

    def commands(*parts):
        shown = subprocess.run(
            [script, "-n", "out", "kjv.h5", *parts], capture_output=True, text=True, check=True
        )
        return [shlex.split(line) for line in shown.stdout.splitlines()]

    tests, *first = commands("first")
    assert tests == [str(ROOT / "bin" / "test-gpu")]
    assert len(first) == 8
    assert len(commands()) == 16
    assert all(command in commands() for command in first)
    for command in commands():
        options = [word for word in command if word.startswith("--")]
        verbs = list(itertools.takewhile(lambda w: not w.startswith("--") and w != "kjv.h5", command))
        if verbs[0] == "hfmpi":
            verbs[:1] = [sys.executable, "-c", "from hfmpi.cli.main import entry; entry()"]
        told = subprocess.run([*verbs, "--help"], capture_output=True, text=True, check=True).stdout
        assert all(option in told for option in options), command
    wrong = subprocess.run([script, "out", "kjv.h5", "no"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "bin/measure-gpu: there is no part no\n")
    assert not Path("out").exists()


@pytest.mark.usefixtures("cooperative", "small_clusters")
def test_the_comparison_of_loops(monkeypatch, capsys):
    pytest.importorskip("cupy")
    given = "loops.py --model lstm --hidden 5 --length 4 --batch 1 3 --repeats 1"
    monkeypatch.setattr(sys, "argv", given.split())
    runpy.run_path(str(ROOT / "examples" / "benchmarks" / "loops.py"), run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    rows, verdicts = rows[:20], rows[20:]
    assert [row[4] for row in rows] == ["launches", "graph", "persistent", "clusters-16", "clusters-8"] * 4
    assert all(float(row[5]) > 0 for row in rows)
    assert [row[0].partition(": ")[2].split(":")[0] for row in verdicts] == [
        f"lstm, batch {batch}, {kind}" for batch in (1, 3) for kind in ("product", "gradient")
    ]


def test_the_comparison_of_decompositions(monkeypatch, capsys):
    pytest.importorskip("cupy")
    given = "decompositions.py --backend cupy --model mlstm --parameters 2000 --side 6 9 --repeats 1"
    monkeypatch.setattr(sys, "argv", given.split())
    runpy.run_path(str(ROOT / "examples" / "benchmarks" / "decompositions.py"), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in shown if line.startswith("| ") and " --- " not in line][1:]
    ways = ["host", "one by one", "batched"]
    assert [row[1] for row in rows if row[1] != "XsyevBatched"] == ways * 3
    assert all(float(row[2]) > 0 for row in rows)
    verdicts = [line.partition("Verdict: ")[2] for line in shown if line.startswith("Verdict")]
    assert [verdict.partition(":")[0] for verdict in verdicts] == [row[0][2:] for row in rows[::-3]][::-1]


@pytest.mark.parametrize("backend", ["numpy", "cupy"])
def test_the_comparison_of_directions(monkeypatch, capsys, backend):
    if backend == "cupy":
        pytest.importorskip("cupy")
    given = "--network mlstm --hidden 4 --length 5 --batch 2 3 --directions 7 --part 3 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["directions.py", "--backend", backend, *given.split()])
    runpy.run_path(str(ROOT / "examples" / "benchmarks" / "directions.py"), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in shown if line.startswith("| mlstm")]
    ways = ["one direction", "7 as one pass", "7 in parts of 3", "7 passes of one"]
    assert [(row[2], row[3]) for row in rows] == [(batch, way) for batch in "23" for way in ways]
    assert [row[5] for row in rows[::4]] == ["1.00 |"] * 2
    assert sum(line.startswith("Verdict: mlstm, batch ") for line in shown) == 2


@pytest.mark.parametrize("backend", ["numpy", "cupy"])
def test_the_comparison_of_steps(monkeypatch, capsys, backend):
    if backend == "cupy":
        pytest.importorskip("cupy")
    given = (
        "--network lstm --methods muon subspace --hidden 4 --length 12 --examples 9 --warm-up 1 --repeats 2"
    )
    monkeypatch.setattr(sys, "argv", ["steps.py", "--backend", backend, *given.split()])
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    runpy.run_path(str(ROOT / "examples" / "benchmarks" / "steps.py"), run_name="__main__")
    shown = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in shown if line.startswith("| lstm")]
    assert [(row[2], row[3], int(row[4]) > 1) for row in rows] == [
        ("muon", "9", False),
        ("subspace", "9", True),
    ]
    (verdict,) = [line for line in shown if line.startswith("Verdict: lstm: gradients that a step takes: ")]
    for row in rows:  # both numbers are rounded
        (gradients,) = re.findall(rf"\b{row[2]} ([\d.]+\d)", verdict)
        assert float(gradients) == pytest.approx(float(row[7]), abs=0.06)


def test_the_comparison_of_precisions(tmp_path, monkeypatch, capsys):
    data = write_corpus(tmp_path / "d.h5")
    given = f"precision.py {data} --backend numba --parameters 500 --sequence-length 20 --steps 3"
    batches = "--gradient-batch 8 --curvature-batch 4 --damping 0.1"
    monkeypatch.setattr(sys, "argv", f"{given} {batches}".split())
    script = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "precision.py"), run_name="__main__")
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 9
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in shown.out.splitlines()}
    float32, tf32 = (rows[f"| {precision}"] for precision in ("float32", "tf32"))
    assert 0 < float(float32[3][:-1]) < float(tf32[3][:-1])  # the angles to the step in float64
    step = np.float32(2.0**-10)
    given = np.float32([1, 1 + step, 1 + step / 2, 1 + step / 4, -1 - step / 2, 0, np.inf])
    expected = np.float32([1, 1 + step, 1 + step, 1, -1 - step, 0, np.inf])
    np.testing.assert_array_equal(script["to_tf32"](given), expected)
    assert np.isnan(script["to_tf32"](np.float32([np.nan])))


def test_the_comparison_of_eigenbases(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eigenbases.py", "--sides", "40", "--drift", "1e-4", "--repeats", "1"])
    runpy.run_path(str(ROOT / "examples" / "benchmarks" / "eigenbases.py"), run_name="__main__")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 40 ")]
    assert len(rows) == 12
    errors = {row[1]: float(row[3].strip(" |")) for row in rows if row[3].strip(" |")}
    assert errors["in place, float64"] < 1e-10
    assert errors["in place, float32 (K-FAC)"] < 0.05
    refined, iterated = (
        errors[f"warm start: {way}, float64"] for way in ("refinement", "orthogonal iteration")
    )
    assert refined < 1e-3 < iterated


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpirun of this environment")
def test_the_model_of_a_step_is_compared_with_more_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{MPIRUN.parent}:{os.environ['PATH']}")
    script = ROOT / "examples" / "benchmarks" / "more_ranks.py"
    network = "--model mlstm --hidden 4 --sequence-length 20 --dtype float64 --backend numpy"
    step = "--optimizer subspace-whole --gradient-batch 12 --curvature-batch 6 --max-steps 4"
    command = [sys.executable, script, write_corpus(tmp_path / "d.h5"), tmp_path / "out", "--ranks", "1", "3"]
    command += ["--columns", "3", "--", *network.split(), *step.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["1", "3"]
    one, three = (np.array(row[1:], float).reshape(4, 3) for row in rows)
    np.testing.assert_allclose(one[:, 2], 1, atol=0.01)  # the model is that of the run on one rank
    assert (three[:3] > 0).all()


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpirun of this environment")
def test_the_campaign_of_faults(monkeypatch):
    monkeypatch.setenv("PATH", f"{MPIRUN.parent}:{os.environ['PATH']}")
    script = ROOT / "examples" / "faults" / "ranks.py"
    command = [sys.executable, script, "--trials", "2", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    total = next(line.split() for line in done.stdout.splitlines() if line.startswith("all "))
    assert total[1] == "2"


@pytest.mark.skipif(not MPIRUN.exists(), reason="needs the mpirun of this environment")
def test_the_campaign_of_surroundings(monkeypatch):
    monkeypatch.setenv("PATH", f"{MPIRUN.parent}:{os.environ['PATH']}")
    script = ROOT / "examples" / "faults" / "surroundings.py"
    kinds = "signal to hfmpi", "command | head", "ulimit", "arguments"
    command = [sys.executable, script, "--trials", "4", "--kinds", *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| **all** | 4 | 4 | |" in done.stdout.splitlines()
