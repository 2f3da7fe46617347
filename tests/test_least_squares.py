"""The study of least squares: its solutions, its derivatives, and one run of it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "least_squares"


@pytest.fixture
def files(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: runpy.run_path(str(FOLDER / name))


@pytest.mark.parametrize(("name", "more", "rate", "start", "bound"), [
    ("burgers", (0.05,), lambda u, first, second: 0.05 * second - u * first,
     lambda x: -np.sin(np.pi * x), 2e-5),
    ("allen_cahn", (), lambda u, first, second: 0.001 * second + 5 * (u - u**3),
     lambda x: x**2 * np.cos(np.pi * x), 2e-4),
])  # fmt: skip
def test_a_reference_solves_its_equation(files, name, more, rate, start, bound):
    x, t = np.linspace(-0.9, 0.9, 721), np.array([0, 0.298, 0.299, 0.3, 0.301, 0.302])
    u = files("references.py")[name](x, t, *more)
    h = x[1] - x[0]
    first = (u[:-4] - 8 * u[1:-3] + 8 * u[3:-1] - u[4:])[:, 3] / (12 * h)
    second = (-u[:-4] + 16 * u[1:-3] - 30 * u[2:-2] + 16 * u[3:-1] - u[4:])[:, 3] / (12 * h**2)
    by_time = (u[:, 1] - 8 * u[:, 2] + 8 * u[:, 4] - u[:, 5])[2:-2] / 0.012
    np.testing.assert_allclose(by_time, rate(u[2:-2, 3], first, second), atol=bound)
    np.testing.assert_allclose(u[:, 0], start(x), atol=1e-12)


def test_the_networks_have_the_derivatives_that_jax_takes(files):
    jax = pytest.importorskip("jax")
    tasks = files("tasks.py")
    rng = np.random.default_rng(0)
    params, x = tasks["glorot"]((2, 8, 8, 1), rng), rng.uniform(-1, 1, (7, 2))
    u = lambda at: tasks["mlp"](params, at[None])[0, 0]  # noqa: E731
    value, first, second = tasks["derivatives"](params, x, (1,))
    for found, wanted in (
        (value, jax.vmap(u)(x)),
        (first[0], jax.vmap(jax.grad(u))(x)[:, 0]),
        (first[1], jax.vmap(jax.grad(u))(x)[:, 1]),
        (second[0], jax.vmap(jax.hessian(u))(x)[:, 1, 1]),
    ):
        np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(280)
def test_a_run_has_a_file_and_a_place_in_the_table(tmp_path):
    for module in "jax", "scipy":
        pytest.importorskip(module)
    run = {"task": "factorisation", "setting": 0, "seed": 0, "seconds": 0.3, "ranks": 1, "tuning": False}
    for method in "soap", "dense-lm":
        path = tmp_path / f"{method}.json"
        about = json.dumps(run | {"method": method})
        subprocess.run([sys.executable, FOLDER / "single.py", path, about], check=True, timeout=90)
        trace = json.loads(path.read_text())["trace"]
        assert trace[-1][3] < trace[0][3]
    command = [sys.executable, FOLDER / "table.py", tmp_path, tmp_path / "all.json"]
    once = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    again = subprocess.run([*command[:2], tmp_path / "all.json"], capture_output=True, text=True, check=True)
    assert once == again.stdout
    assert "| task | soap | dense-lm | first |" in once
