"""The PyTorch and JAX examples learn their tasks, on one rank and on two."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MPIRUN = Path(sys.executable).with_name("mpirun")


@pytest.mark.timeout(280)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("framework", "name", "right", "loss"), [
    ("torch", "torch_tagger", 0.99, 0.05),  # initially half are right, and the loss is log 2
    ("jax", "jax_mlp", 0.97, 0.1),  # the same
    ("torch", "torch_transformer", 0.98, 0.1),  # initially an eighth, and log 8
])  # fmt: skip
def test_an_example_learns_its_task(framework, name, right, loss, ranks):
    pytest.importorskip(framework)
    launcher = str(MPIRUN) if MPIRUN.exists() else shutil.which("mpirun")
    command = [sys.executable, EXAMPLES / f"{name}.py"]
    if ranks > 1:
        command = [launcher, "-n", str(ranks), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=260)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = re.findall(
        r"^(\d) rank\(s\): accuracy .*: ([\d.]+), loss ([\d.]+)$", done.stdout, re.MULTILINE
    )
    assert int(found[0]) == ranks
    assert float(found[1]) > right
    assert float(found[2]) < loss


@pytest.mark.timeout(280)
def test_the_comparison_with_peers_leaves_out_what_is_not_installed(tmp_path):
    for module in "torch", "sklearn":
        pytest.importorskip(module)
    asked = ["hfmpi soap", "torch.optim.Adam", "PyTorchHessianFree"]
    file = tmp_path / "found.json"
    command = [sys.executable, EXAMPLES / "benchmarks" / "peers.py", "MLP", file, "--passes", "40"]
    options = [word for name in asked for word in ("--method", name)]

    def shown(*command):
        return subprocess.run(command, capture_output=True, text=True, timeout=260, check=True).stdout

    once = shown(*command, *options)
    rows = json.loads(file.read_text())["rows"]
    has = bool(importlib.util.find_spec("hessianfree"))
    assert list(rows) == asked[: 2 + has]
    assert ("PyTorchHessianFree is left out" in once) != has
    runs = rows["hfmpi soap"]["runs"]
    assert len(runs) == 3
    assert all(9 <= at[0][0] <= 40 and at[0][1] > 0 for at in runs)  # passes and seconds to a loss of 0.3
    assert once.endswith(shown(*command))


def test_steps_and_directions_of_a_module():
    """The parts torch and torch-directions of bin/measure-gpu, on the CPU."""
    pytest.importorskip("torch")
    tiny = ["--network", "mlp", "--width", "6", "--repeats", "1"]
    steps = ["steps.py", "--methods", "muon", "subspace", "--examples", "20", "--warm-up", "1"]
    directions = ["directions.py", "--batch", "5", "--directions", "7", "--part", "3"]
    for script, *options in steps, directions:
        command = [sys.executable, EXAMPLES / "benchmarks" / script, *tiny, *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| mlp")]
        wanted = ["muon", "subspace"] if script == "steps.py" else ["one direction", "7 as one pass"]
        assert [row[2 if script == "steps.py" else 3] for row in rows][:2] == wanted
        assert done.stdout.splitlines()[-1].startswith("Verdict: mlp")
