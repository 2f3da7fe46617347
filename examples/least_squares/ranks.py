"""Print the milliseconds of a step of lm on one rank and on two, measured in turn.

A row of the table contains residuals, parameters, both times, and their ratio.

    python examples/least_squares/ranks.py [PAIRS]

Every run is a process with one thread per rank; a row has the medians of PAIRS runs (3) of ten steps.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

SIZES = (1020, 32), (2000, 32), (2000, 64), (4000, 40)
"""The number of residuals, and the units of each of two hidden layers."""


def measure(residuals: int, units: int) -> None:
    """Train a network for Poisson's equation on this process's ranks; print parameters and milliseconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import hfmpi

    jax.config.update("jax_enable_x64", True)

    def u(params, x):
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        return (x @ params[-1][0] + params[-1][1])[0]

    def residual(params, x):
        source = jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1])
        return jnp.trace(jax.hessian(u, 1)(params, x)) + 2 * jnp.pi**2 * source

    rng = np.random.default_rng(0)
    sizes = [(2, units), (units, units), (units, 1)]
    params = [(rng.standard_normal((m, n)) * (2 / (m + n)) ** 0.5, np.zeros(n)) for m, n in sizes]
    model = hfmpi.JaxModel(lambda p, x: jax.vmap(residual, (None, 0))(p, x)[:, None], params, "squares")
    data = rng.random((residuals, 2)), np.zeros((residuals, 1))
    result = hfmpi.train(model, data, optimizer="lm", max_steps=13, quiet=True)
    if hfmpi.connect().rank == 0:
        print(f"{model.size} {1e3 * median(r['step_seconds'] for r in result.history[3:])}")


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 2:
        measure(int(sys.argv[1]), int(sys.argv[2]))
        return
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    threads["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    env = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"} | threads
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    print("| residuals | parameters | 1 rank, ms | 2 ranks, ms | ratio |\n| --- | --- | --- | --- | --- |")
    for residuals, units in SIZES:
        times: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(pairs):
            for ranks, each in times.items():
                command = [mpirun, "-n", str(ranks)] * (ranks > 1)
                command += [sys.executable, __file__, str(residuals), str(units)]
                shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
                size, milliseconds = re.findall(r"^(\d+) ([\d.]+)$", shown, re.MULTILINE)[0]
                each.append(float(milliseconds))
        one, two = median(times[1]), median(times[2])
        print(f"| {residuals:,} | {int(size):,} | {one:.0f} | {two:.0f} | {one / two:.2f} |", flush=True)


if __name__ == "__main__":
    main()
