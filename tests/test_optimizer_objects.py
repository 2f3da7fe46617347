"""Optimizers as objects: a run with a name and settings is stored, resumed and compared like its object."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest

import hfmpi
from hfmpi.files.checkpoint import load
from hfmpi.optim.presets import BASES, PRESETS, named
from hfmpi.runs.config import Config
from hfmpi.runs.merge import derive, merge

RNG = np.random.default_rng(5)
SYMBOLS = RNG.integers(0, 3, (40, 6))
DATA = SYMBOLS, np.roll(SYMBOLS, 1, axis=1)
OBJECTS = [
    hfmpi.Adam(rate=0.01),
    hfmpi.GradientDescent("clip", rate=0.1),
    hfmpi.HessianFree(damping=0.1, cg_max_steps=4),
    hfmpi.LBFGS(memory=5),
    hfmpi.LM(damping=0.01),
    hfmpi.Muon(),
    hfmpi.SOAP(rate=0.1),
    hfmpi.SOAPMuon(),
    hfmpi.Subspace(damping=0.01),
]


def network():
    return hfmpi.Network(cell="rnn", inputs=3, outputs=3, hidden=4)


def run(optimizer, steps=2, **more):
    return hfmpi.train(network(), DATA, optimizer=optimizer, max_steps=steps, quiet=True, **more)


def refused(words, *arguments, **more):
    with pytest.raises(hfmpi.UserError) as caught:
        run(*arguments, **more)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_class_of_the_front_is_there():
    classes = {getattr(hfmpi, name) for name in hfmpi.__all__}
    assert {c for c in classes if hasattr(c, "step") and hasattr(c, "init")} == set(BASES)
    assert {type(optimizer) for optimizer in OBJECTS} == set(BASES)
    assert {type(preset.optimizer) for preset in PRESETS.values()} == set(BASES)
    assert all(type(PRESETS[name].optimizer) is kind for kind, name in BASES.items())


@pytest.mark.parametrize("optimizer", OBJECTS, ids=lambda optimizer: type(optimizer).__name__)
def test_an_object_is_the_run_of_its_name_and_settings(optimizer, tmp_path):
    name, settings, batches = named(optimizer)
    assert (name, batches) == (BASES[type(optimizer)], {})
    assert hfmpi.preset(name, **settings) == replace(PRESETS[name], optimizer=optimizer)
    by_object = run(optimizer, out=tmp_path / "object")
    by_name = run(name, out=tmp_path / "name", settings=settings)
    np.testing.assert_array_equal(by_object.theta, by_name.theta)
    configs = [(tmp_path / at / "config.toml").read_bytes() for at in ("object", "name")]
    assert configs[0] == configs[1]
    assert tomllib.loads(configs[0].decode())["settings"] == settings
    full = min(40, PRESETS[name].gradient_batch)
    assert tomllib.loads(configs[0].decode())["gradient_batch"] == full


@pytest.mark.parametrize("optimizer", OBJECTS, ids=lambda optimizer: type(optimizer).__name__)
def test_a_resumed_run_is_the_uninterrupted_one(optimizer, tmp_path):
    options = {"gradient_batch": 40} if isinstance(optimizer, hfmpi.LBFGS) else {"gradient_batch": 20}
    whole = run(optimizer, 4, out=tmp_path / "whole", **options)
    run(optimizer, 2, out=tmp_path / "parts", **options)
    by_name, settings, _ = named(optimizer)
    parts = run(by_name, 3, out=tmp_path / "parts", settings=settings)
    parts = run(copy.deepcopy(optimizer), 4, out=tmp_path / "parts", **options)
    np.testing.assert_array_equal(parts.theta, whole.theta)
    whole, parts = (load(tmp_path / at / "checkpoint.h5") for at in ("whole", "parts"))
    assert parts.state.keys() == whole.state.keys()
    for entry, value in whole.state.items():
        np.testing.assert_array_equal(parts.state[entry], value)


def test_a_resumed_run_notices_every_other_setting(tmp_path):
    out = tmp_path / "run"
    run(hfmpi.Subspace(damping=0.01), out=out)
    different = "use a different out for a new run"
    refused(f"has damping = 0.01, not 0.02: {different}", hfmpi.Subspace(damping=0.02), out=out)
    refused(f"has damping = 0.01, not 0.001: {different}", hfmpi.Subspace(), out=out)
    # The preset's memory, which the stored settings do not name in that case, differs from the class's.
    assert PRESETS["subspace"].optimizer.memory == 6 != hfmpi.Subspace().memory
    refused(f"has memory = 3, not 6: {different}", hfmpi.Subspace(damping=0.01, memory=6), out=out)
    refused(f"has optimizer = 'subspace', not 'adam': {different}", hfmpi.Adam(), out=out)
    refused("has damping = 0.01, not 0.5", "subspace", out=out, settings={"damping": 0.5})
    assert run("subspace", 3, out=out, settings={"damping": 0.01}).step == 3  # others are unchanged
    assert hfmpi.train(network(), DATA, max_steps=4, out=out, quiet=True).step == 4
    assert run(hfmpi.Subspace(damping=0.01), 5, out=out).step == 5


def test_a_run_that_starts_from_another_one_takes_the_settings_of_the_object(tmp_path):
    run(hfmpi.Subspace(damping=0.01), out=tmp_path / "first")
    next_one = hfmpi.Subspace(memory=6)
    run(next_one, 4, out=tmp_path / "second", resume=tmp_path / "first")
    stored = tomllib.loads((tmp_path / "second" / "config.toml").read_text())
    assert (stored["optimizer"], stored["settings"]) == ("subspace", {"curvature_segments": 0})
    # The same call continues the second run.
    assert run(next_one, 5, out=tmp_path / "second", resume=tmp_path / "first").step == 5


def test_a_preset_keeps_its_batch_sizes(tmp_path):
    chosen = hfmpi.preset("muon-small", rate=0.1)
    assert named(chosen) == ("muon-small", {"rate": 0.1}, {})
    assert named(hfmpi.preset("bhf-short")) == ("bhf-short", {}, {})
    assert named(hfmpi.preset("bgd")) == ("bgd", {}, {})
    assert merge({"optimizer": chosen}) == Config(optimizer="muon-small", settings={"rate": 0.1})
    assert merge({"optimizer": chosen, "gradient_batch": 5}).gradient_batch == 5
    of_her_own = replace(hfmpi.preset("adam"), gradient_batch=7)
    assert named(of_her_own) == ("adam", {}, {"gradient_batch": 7})
    by_object = run(of_her_own, out=tmp_path / "object")
    by_name = run("adam", gradient_batch=7)
    np.testing.assert_array_equal(by_object.theta, by_name.theta)
    assert run(of_her_own, 3, out=tmp_path / "object").step == 3
    refused("has gradient_batch = 7, not 8", replace(of_her_own, gradient_batch=8), out=tmp_path / "object")


def test_a_run_of_a_name_is_continued_by_an_equal_object(tmp_path):
    whole = run("muon-small", 3)
    run("muon-small", 1, out=tmp_path / "run")
    run(hfmpi.preset("muon-small").optimizer, 2, out=tmp_path / "run")
    parts = run(hfmpi.preset("muon-small"), 3, out=tmp_path / "run")
    np.testing.assert_array_equal(parts.theta, whole.theta)
    different = "use a different out for a new run"
    for optimizer, words in (
        (hfmpi.Muon(), "has schedule = 'inverse-root', not 'constant'"),
        (hfmpi.preset("muon", rate=0.2, averaging=0.999), "has gradient_batch = 32, not 3500"),
        (hfmpi.preset("adam"), "has optimizer = 'muon-small', not 'adam'"),
    ):
        refused(f"{words}: {different}", optimizer, 4, out=tmp_path / "run")


def test_an_object_of_a_class_has_the_batches_of_its_preset():
    for kind, name in BASES.items():
        chosen = merge({"optimizer": kind()}).preset()
        assert chosen == replace(PRESETS[name], optimizer=kind())


def test_adam_clips_only_if_it_is_told_to():
    assert (hfmpi.Adam().threshold, hfmpi.preset("adam").optimizer.threshold) == (0.0, 1.0)
    # Runs of earlier versions, whose checkpoints only contain the preset's name, resume with its threshold.
    assert merge({}, {"optimizer": "adam", "settings": {}}).preset().optimizer.threshold == 1.0
    assert derive({}, {"optimizer": "adam", "settings": {}}).preset().optimizer.threshold == 1.0
    theta = np.zeros(2)
    steps = {}
    for threshold in (0.0, 1.0, 1e9):
        optimizer, now = hfmpi.Adam(rate=1.0, epsilon=1.0, threshold=threshold), theta
        state = optimizer.init(now)
        for _ in range(2):
            now, state, report = optimizer.step(now, state, hfmpi.Objectives(Slope(np.array([30.0, 40.0]))))
        steps[threshold] = now
        assert report.details["gradient_norm"] == 50.0
    np.testing.assert_array_equal(steps[0.0], steps[1e9])
    g, means = np.array([30.0, 40.0]), np.zeros((2, 2))
    expected = theta
    for t in (1, 2):  # Kingma and Ba, algorithm 1
        means = np.array([0.9, 0.999])[:, None] * means + np.array([0.1, 0.001])[:, None] * [g, g * g]
        m, v = means / (1 - np.array([0.9, 0.999])[:, None] ** t)
        expected = expected - m / (np.sqrt(v) + 1.0)
    np.testing.assert_allclose(steps[0.0], expected, rtol=1e-12)
    assert abs(steps[1.0]).max() < 0.9 < abs(steps[0.0]).min()


class Slope(hfmpi.Objective):
    def __init__(self, g):
        self.g = g

    def loss(self, theta):
        return float(self.g @ theta)

    def gradient(self, theta):
        return hfmpi.Gradient(self.loss(theta), self.g.copy())


def test_what_is_not_an_optimizer_of_hfmpi_is_refused():
    @dataclass(frozen=True)
    class Mine(hfmpi.Adam):
        pass

    start = (
        "optimizer must be a name such as 'bhf-short', an object such as hfmpi.Adam(rate=0.001), or one that"
    )
    refused(f"{start} hfmpi.preset returns, not Mine", Mine())
    for module, words in (("torch.optim.adam", "Adam of PyTorch"), ("optax._src.base", "Adam of optax")):
        refused(f"not {words}", type("Adam", (), {"__module__": module})())


@pytest.mark.parametrize(("kind", "word", "meant"), [
    (hfmpi.Adam, "lr", "rate"),
    (hfmpi.Adam, "learning_rate", "rate"),
    (hfmpi.Adam, "betas", "beta1 and beta2"),
    (hfmpi.Adam, "b2", "beta2"),
    (hfmpi.Adam, "momentum", "beta1"),
    (hfmpi.Adam, "eps", "epsilon"),
    (hfmpi.Adam, "weight_decay", "decay"),
    (hfmpi.Adam, "max_norm", "threshold"),
    (hfmpi.Adam, "clip", "threshold"),
    (hfmpi.Adam, "warmup_steps", "warm_up"),
    (hfmpi.Adam, "T_max", "schedule_steps"),
    (hfmpi.Adam, "epsilno", "epsilon"),
    (hfmpi.Muon, "ns_steps", "newton_schulz_steps"),
    (hfmpi.LBFGS, "history_size", "memory"),
    (hfmpi.Subspace, "decay", "weight_decay"),
    (hfmpi.HessianFree, "cg_max_iter", "cg_max_steps"),
    (hfmpi.GradientDescent, "lr", "rate"),
    # Its decay is that of the rate, and there is no momentum.
    (hfmpi.GradientDescent, "weight_decay", None),
    (hfmpi.GradientDescent, "momentum", None),
    (hfmpi.LM, "lr", None),
])  # fmt: skip
def test_words_of_the_field(kind, word, meant):
    names = ", ".join(setting.name for setting in fields(kind)[-1:])
    hint = f" (did you mean {meant}?)" if meant else ""
    with pytest.raises(hfmpi.UserError) as caught:
        kind(**{word: 1})
    assert str(caught.value).startswith(f"{kind.__name__} has no setting {word!r}{hint}; it has ")
    assert names in str(caught.value)
    with pytest.raises(hfmpi.UserError) as caught:
        hfmpi.preset(BASES[kind], **{word: 1})
    assert f"optimizer {BASES[kind]} has no setting {word!r}{hint}; it has " in str(caught.value)


def test_objects_are_plain_values():
    for optimizer in OBJECTS:
        assert pickle.loads(pickle.dumps(optimizer)) == copy.deepcopy(optimizer) == optimizer
        assert hash(replace(optimizer)) == hash(optimizer)
        assert "Attributes" in type(optimizer).__doc__


def test_the_data_have_two_names():
    options = {"optimizer": "adam", "max_steps": 1, "quiet": True}
    now = hfmpi.train(network(), data=DATA, **options)
    before = hfmpi.train(network(), train=DATA, **options)
    np.testing.assert_array_equal(now.theta, before.theta)
    with pytest.raises(hfmpi.UserError, match=r"unknown option 'train' \(did you mean data\?\)"):
        hfmpi.train(network(), DATA, train=DATA, **options)
    with pytest.raises(hfmpi.UserError, match=r"^data must not be None: pass the training examples$"):
        hfmpi.train(network(), **options)


def test_a_user_error_is_a_value_error():
    assert issubclass(hfmpi.UserError, ValueError)
    assert isinstance(hfmpi.train(network(), DATA, optimizer="adam", max_steps=1, quiet=True), hfmpi.Result)


# Several ranks -----------------------------------------------------------------------------------

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
PROGRAM = """
import json, os, sys
sys.path.insert(0, {tests!r})
import hfmpi
from test_optimizer_objects import run

rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
run(hfmpi.Adam(rate=0.01), 2, out="run", micro_batch=4)
theta = run(hfmpi.Adam(rate=0.01), 4, out="run", micro_batch=4).theta
said = []
for optimizer in (hfmpi.Adam(rate=0.5), hfmpi.Adam(rate=1.0 + rank), hfmpi.Adam, None):
    try:
        run(optimizer, 5, out="run" if optimizer == hfmpi.Adam(rate=0.5) else None)
    except hfmpi.UserError as error:
        said.append(str(error))
with open(f"said{{rank}}", "w") as file:
    json.dump([theta.tolist(), said], file)
"""


@pytest.mark.skipif(MPIRUN is None, reason="needs mpirun")
def test_ranks_take_one_optimizer(tmp_path):
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [MPIRUN, "-n", "2", sys.executable, "-c", program],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = [json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2)]
    assert ours[0] == ours[1]
    theta, (of_another_setting, of_ranks, of_class) = ours[0]
    np.testing.assert_allclose(theta, run(hfmpi.Adam(rate=0.01), 4).theta, rtol=1e-4, atol=1e-5)
    assert of_another_setting.startswith("this run has rate = 0.01, not 0.5")
    assert of_ranks == "rank 1 has different options or checkpoint files than the other ranks"
    assert of_class.endswith("not the class Adam")
