"""Products with a packed matrix compared with NumPy, for all sizes, strides and register widths."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfmpi.backends import create
from hfmpi.backends.panels import ROWS, panels_shape


def check(backend, rows, depth, columns, add=False, transposed=False, gap=0, seed=0):
    """Multiply into a part of a wider array: nothing outside of the part may change."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((depth, columns)).astype(backend.dtype)
    a = rng.standard_normal((depth, rows)).astype(backend.dtype).T if transposed else None
    if a is None:
        a = rng.standard_normal((rows, depth + gap)).astype(backend.dtype)[:, :depth]
    out = rng.standard_normal((rows + 1, columns + gap)).astype(backend.dtype)
    expected = out.astype(np.float64)
    exact = a.astype(np.float64) @ matrix.astype(np.float64)
    expected[:rows, :columns] = exact + add * expected[:rows, :columns]
    memory = backend.new_workspace()
    memory("w", panels_shape(depth, columns, backend.dtype.itemsize))[...] = np.nan  # what was there before
    packed = backend.pack(matrix, memory, "w")
    backend.multiply(a, packed, out[:rows, :columns], add)
    size = 1 + np.abs(a).astype(np.float64) @ np.abs(matrix).astype(np.float64)
    error = np.abs(out - expected)
    error[:rows, :columns] /= size * (depth + 2) * np.finfo(backend.dtype).eps
    assert error.max() <= 1
    return packed


@pytest.mark.parametrize("name", ["numpy", "numba"])
@given(
    st.integers(1, 3 * ROWS + 2), st.integers(1, 70), st.integers(1, 130), st.booleans(), st.booleans(),
    st.integers(0, 3), st.sampled_from(["float32", "float64"]), st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_products(name, rows, depth, columns, add, transposed, gap, dtype, seed):
    backend = create(name, dtype)
    packed = check(backend, rows, depth, columns, add, transposed, gap, seed)
    assert (packed.panels is not None) == (name == "numba")


def test_more_rows_than_a_chunk():
    check(create("numba"), 20 * ROWS + 3, 205, 50, add=True)


def test_what_is_not_finite_stays_in_its_row_and_column():
    backend = create("numba")
    a, matrix = np.ones((5, 3), np.float32), np.ones((3, 40), np.float32)
    a[2, 1], matrix[0, 7] = np.nan, np.inf
    out = np.full((5, 40), np.nan, np.float32)
    backend.multiply(a, backend.pack(matrix, backend.new_workspace(), "w"), out)
    assert np.isnan(out[2]).all()
    assert np.isinf(out[[0, 1, 3, 4], 7]).all()
    out[2], out[:, 7] = 3, 3
    assert np.all(out == 3)


@pytest.mark.parametrize("features", ["", "+avx", "+avx,+avx2,+fma"])
def test_on_lesser_processors(tmp_path, features):
    """Compiled for a processor with narrower registers, in a separate process."""
    with open("/proc/cpuinfo") as lines:
        flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    if not {name for name in features.replace("+", "").split(",") if name} <= flags:
        pytest.skip("this processor lacks them")
    script = (
        "from hfmpi.backends import create, panels\n"
        "from test_panels import check\n"
        "for dtype in ('float32', 'float64'):\n"
        "    for rows in range(1, 12):\n"
        "        assert check(create('numba', dtype), rows, 13, 37, add=True).panels is not None\n"
        "print(panels.BYTES)\n"
    )
    environment = os.environ | {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": features,
        "XDG_CACHE_HOME": str(tmp_path),
        "PYTHONPATH": os.path.dirname(__file__),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == (32 if features else 16)
