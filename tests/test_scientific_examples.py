"""The scientific examples approach their solutions in a few steps, on one rank and on two."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
MPIRUN = Path(sys.executable).with_name("mpirun")

pytest.importorskip("scipy")


@pytest.mark.timeout(280)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("framework", "name", "steps", "figure", "solution", "close"),
    [
        ("torch", "regression", 10, r"relative error after 10 steps: (\S+)", 0, 1e-9),
        ("jax", "inverse_problem", 16, r"k = (\S+) after 16 steps", 0.3, 0.02),  # it starts at 1
        ("jax", "pinn_jax", 18, r"relative error of u after 18 steps: (\S+)", 0, 0.02),
        ("torch", "pinn_torch", 15, r"relative error of u after 15 steps: (\S+)", 0, 0.1),
        ("jax", "variational_monte_carlo", 40, r"energy: (\S+) \+-", 1.1951, 0.01),
    ],
)
def test_an_example_comes_near_its_solution(framework, name, steps, figure, solution, close, ranks):
    pytest.importorskip(framework)
    launcher = str(MPIRUN) if MPIRUN.exists() else shutil.which("mpirun")
    command = [sys.executable, EXAMPLES / f"{name}.py", str(steps)]
    if ranks > 1:
        command = [launcher, "-n", str(ranks), *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=260)
    assert done.returncode == 0, done.stdout + done.stderr
    (value,) = re.findall(figure, done.stdout)  # printed by one rank only
    assert float(value) == pytest.approx(solution, abs=close)


def test_every_example_is_short():
    for name in ("regression", "inverse_problem", "pinn_jax", "pinn_torch", "variational_monte_carlo"):
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
