"""Compare hfmpi with other curvature methods for PyTorch and JAX models: loss against passes and seconds.

    pip install -e ".[peers]" git+https://github.com/ltatzel/PyTorchHessianFree
    python examples/benchmarks/peers.py MLP mlp.json
    python examples/benchmarks/peers.py LSTM lstm.json

Two networks classify scikit-learn's digits. All methods (methods.py) use the same start, the full training
set in each step, float32 and one thread. Each method has one setting, of which three candidates are tried
with the first seed; the best one, by passes, is run with the other seeds. A method whose library is not
installed is left out.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ |= {"JAX_PLATFORMS": "cpu"}
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import numpy as np
import torch
from methods import METHODS
from torch import nn

import hfmpi
from hfmpi.measure import machine

torch.set_num_threads(1)
LEVELS = 0.3, 0.1, 0.03, 0.01, 0.003, 0.001
SHOWN, UNITS = (0.1, 0.01, 0.001), ("sequential", "passes", "CPU s")
PEERS = "hessianfree", "curvlinops-for-pytorch", "kfac-jax"
PASSES, SEEDS = 1000, (0, 1, 2)


class MLP:
    """A network with 64 pixels, two layers of 64 tanh units, 10 digits."""

    recurrent, images = False, 1000

    def __init__(self):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, y = x[: self.images] / 16, y[: self.images]
        self.x, self.y = self.shaped(x).astype(np.float32), y.astype(np.int64)

    def shaped(self, x):
        return x

    def new(self):
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def weights(self, seed):
        """Return the initial parameters that PyTorch draws, by name."""
        torch.manual_seed(seed)
        return {name: p.detach().numpy().copy() for name, p in self.new().named_parameters()}

    def module(self, weights):
        made = self.new()
        made.load_state_dict({name: torch.from_numpy(p) for name, p in weights.items()})
        return made

    @staticmethod
    def function(p, x):
        """Compute the outputs of the module in JAX."""
        from jax import numpy as jnp

        for layer in "0", "2":
            x = jnp.tanh(x @ p[f"{layer}.weight"].T + p[f"{layer}.bias"])
        return x @ p["4.weight"].T + p["4.bias"]


class Reader(nn.Module):
    """Reads an image row by row, and classifies it at the end."""

    def __init__(self):
        super().__init__()
        self.lstm, self.top = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.top(self.lstm(x)[0][:, -1])


class LSTM(MLP):
    """A network with 8 steps of 8 pixels, 32 units, 10 digits after the last step."""

    recurrent, images = True, 500

    def shaped(self, x):
        return x.reshape(-1, 8, 8)

    def new(self):
        return Reader()

    @staticmethod
    def function(p, x):
        import jax
        from jax import numpy as jnp

        def step(carry, row):
            h, c = carry
            a = row @ p["lstm.weight_ih_l0"].T + p["lstm.bias_ih_l0"]
            i, f, g, o = jnp.split(a + h @ p["lstm.weight_hh_l0"].T + p["lstm.bias_hh_l0"], 4, axis=1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zero = jnp.zeros((x.shape[0], 32), x.dtype)
        (h, _), _ = jax.lax.scan(step, (zero, zero), x.swapaxes(0, 1))
        return h @ p["top.weight"].T + p["top.bias"]


NETS = {"MLP": MLP, "LSTM": LSTM}


def run(method, problem, seed, value, passes):
    """Return UNITS to each level of the training loss, None for levels that are not reached."""
    made = method(problem, problem.weights(seed), value)
    made.start()
    for _ in range(made.warm_up):
        made.step()
    made.start()
    seconds, reached = 0.0, []
    while min(made.sequential, made.passes) < passes and len(reached) < len(LEVELS):
        start = time.process_time()
        made.step()
        seconds += time.process_time() - start
        loss = made.loss()
        at = round(made.sequential, 1), round(made.passes, 1), round(seconds, 4)
        reached += [at for level in LEVELS[len(reached) :] if loss < level]
    return reached + [None] * (len(LEVELS) - len(reached))


def quality(reached):
    """Return the sort key of a run: more levels are better, then fewer passes to the last of them."""
    found = [at for at in reached if at]
    return len(found), -found[-1][UNITS.index("passes")] if found else 0


def study(problem, methods, passes):
    """Tune each method with the first seed, then run all methods in turn with the others."""
    rows = {}
    for name, method in methods.items():
        if problem.recurrent and not method.recurrent:
            continue
        tried = {}
        try:
            for value in method.candidates:
                tried[value] = run(method, problem, SEEDS[0], value, passes)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        best = max(tried, key=lambda value: quality(tried[value]))
        rows[name] = {"setting": method.setting, "value": best, "tried": tried, "runs": [tried[best]]}
        print(name, {value: quality(at) for value, at in tried.items()}, flush=True)
    for seed in SEEDS[1:]:
        for name, row in rows.items():
            row["runs"].append(run(methods[name], problem, seed, row["value"], passes))
    return rows


def table(rows):
    """Print medians over seeds, with the extremes in brackets, if every seed reached the level."""
    columns = [(unit, level) for unit in range(len(UNITS)) for level in SHOWN]
    print("| method | setting |", " | ".join(f"{UNITS[unit]} to {level:g}" for unit, level in columns), "|")
    print("| --- " * (2 + len(columns)) + "|")
    cells = {name: [reached(row, *column) for column in columns] for name, row in rows.items()}
    best = [min((np.median(x) for x in each if x), default=0) for each in zip(*cells.values(), strict=True)]
    for name, row in rows.items():
        shown = []
        for (unit, _), values, least in zip(columns, cells[name], best, strict=True):
            quantiles = np.quantile(values or [0], (0, 0.5, 1))
            low, middle, high = (f"{x:.2f}" if unit == 2 else f"{x:.0f}" for x in quantiles)
            middle = f"**{middle}**" if quantiles[1] == least else middle
            shown.append(f"{middle} ({low} to {high})" if values else "–")
        print(f"| {name} | {row['setting']} {row['value']:g} |", " | ".join(shown), "|")


def reached(row, unit, level):
    """Return one of UNITS to a level for each seed; an empty list if a seed did not reach it."""
    found = [run[LEVELS.index(level)] for run in row["runs"]]
    return [at[unit] for at in found] if all(found) else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("net", choices=NETS)
    parser.add_argument("file", type=Path, help="file of results; if it exists, its table is printed")
    parser.add_argument("--method", action="append", choices=METHODS, help="run only these methods")
    parser.add_argument("--passes", type=int, default=PASSES, help="maximum number of passes per run")
    given = parser.parse_args()
    if not given.file.exists():
        warnings.simplefilter("ignore")
        start, methods = time.process_time(), {name: METHODS[name] for name in given.method or METHODS}
        rows = study(NETS[given.net](), methods, given.passes)
        about = {"processor": machine.processor(), "CPU seconds": round(time.process_time() - start)}
        about |= {"hfmpi": hfmpi.__version__} | machine.versions("numpy", "scipy", "torch", "jax", *PEERS)
        given.file.write_text(json.dumps({"machine": about, "rows": rows}))
    found = json.loads(given.file.read_text())
    print(found["machine"])
    table(found["rows"])


if __name__ == "__main__":
    main()
