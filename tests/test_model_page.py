"""The model on the page of the Model protocol can be trained, and its derivatives are correct."""

import re
from pathlib import Path

import numpy as np

from hfmpi.data.batches import Batch
from hfmpi.models.base import Linearisation, Model


def test_the_program_of_the_page_trains_a_model_with_the_right_derivatives():
    page = (Path(__file__).parents[1] / "docs" / "model.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(program, names)
    model, losses = names["model"], [record["loss"] for record in names["result"].history]
    assert isinstance(model, Model)
    assert losses[-1] < 0.01 < losses[0]
    theta, v = model.initial(0), np.random.default_rng(2).standard_normal((2, model.size))
    batch = Batch(names["x"][:7], np.ones(7), None)
    at = model.linearise(theta, batch)
    members = [name for name in vars(Linearisation) if not name.startswith("_")]
    assert all(hasattr(at, name) for name in members)

    def error(scale):
        return model.linearise(theta + scale * v[0], batch).error

    along, out, gradient = at.jvp(v[0]), np.zeros(model.size), np.zeros(model.size)
    assert np.allclose(along, (error(1e-5) - error(-1e-5)) / 2e-5)
    at.gauss_newton(v[0], 0.5, out)
    assert np.isclose(out @ v[1], along @ at.jvp(v[1]) / 2)
    at.gradient(0.5, gradient)
    assert np.isclose(gradient @ v[0], along @ at.error / 2)
