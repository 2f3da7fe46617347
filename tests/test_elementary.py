"""tanh and exp of the compiled kernels against NumPy's in double or extended precision."""

import numpy as np
import pytest

from hfmpi.backends.elementary import exp, tanh
from hfmpi.backends.numba import compiled

WIDE = np.longdouble if np.finfo(np.longdouble).eps < np.finfo(np.float64).eps else np.float64


def map_tanh(x, out):
    for i in range(x.size):
        out[i] = tanh(x[i])


def map_exp(x, out):
    for i in range(x.size):
        out[i] = exp(x[i])


map_tanh, map_exp = (compiled(function) for function in (map_tanh, map_exp))


def both_signs(low, high, dtype):
    x = np.exp(np.linspace(np.log(low), np.log(high), 200_000)).astype(dtype)
    return np.concatenate([-x[::-1], x])


def units_off(function, reference, x):
    out = np.empty_like(x)
    function(x, out)
    exact = reference(x.astype(WIDE))
    return float(np.max(np.abs(out.astype(WIDE) - exact) / np.spacing(np.abs(exact).astype(x.dtype))))


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 5), (np.float64, 2)])
def test_tanh_is_accurate_over_its_whole_range(dtype, bound):
    assert units_off(map_tanh, np.tanh, both_signs(1e-12, 30, dtype)) <= bound


@pytest.mark.parametrize(("dtype", "highest"), [(np.float32, 86), (np.float64, 700)])
def test_exp_is_accurate(dtype, highest):
    assert units_off(map_exp, np.exp, both_signs(1e-12, highest, dtype)) <= 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_values(dtype):
    x = np.array([0, np.inf, -np.inf, np.nan, 1e30, -1e30], dtype)
    out = np.empty_like(x)
    map_tanh(x, out)
    np.testing.assert_allclose(out, np.array([0, 1, -1, np.nan, 1, -1], dtype), rtol=4e-7)
    map_exp(x[:4], out[:4])
    assert out[0] == 1
    assert out[1] > 1e38
    assert 0 <= out[2] < 1e-37
    assert np.isnan(out[3])
