"""tanh and exp that the compiler can vectorise, for the Numba kernels.

By default Numba emits calls of the scalar libm, which prevent the vectorisation of the complete loop. NumPy's
tanh takes more time per element and an additional pass over memory. The functions here have no branches. exp
and the float64 tanh use the formulas and coefficients of the Cephes library (S. L. Moshier, "Methods and
Programs for Mathematical Functions", 1989; expf.c, exp.c, tanh.c), with errors of at most 2 units in the last
place. The float32 tanh is the rational approximation of the Eigen library (degree 13 over 6), which XLA also
uses. Its error is at most 5 units in the last place, and it takes two thirds of the time of the function of
Cephes (tests/test_elementary.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

__all__ = ["exp", "tanh"]

F = np.float32
INLINE: Any = {"forceinline": True, "error_model": "numpy", "fastmath": {"contract"}}
"""Options of the functions: inlining allows the compiler to vectorise the surrounding loops.

Unlike in the callers, the compiler must not reorder sums, because exp subtracts the logarithm of 2 in two
parts.
"""


@njit(**INLINE)
def _exp32(value):
    x = min(max(value, F(-87.0)), F(88.0))
    k = np.floor(x * F(1.44269504088896341) + F(0.5))
    r = x - k * F(0.693359375) + k * F(2.12194440e-4)
    p = F(1.9875691500e-4) * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    p = p * r * r + r + F(1)
    power = (np.int32(k) + np.int32(127)) << np.int32(23)
    return p * np.int32(power).view(np.float32) if value == value else value


@njit(**INLINE)
def _exp64(value):
    x = min(max(value, -708.0), 709.0)
    k = np.floor(x * 1.4426950408889634073599 + 0.5)
    r = x - k * 6.93145751953125e-1 - k * 1.42860682030941723212e-6
    z = r * r
    p = ((1.26177193074810590878e-4 * z + 3.02994407707441961300e-2) * z + 9.99999999999999999910e-1) * r
    q = (
        (3.00198505138664455042e-6 * z + 2.52448340349684104192e-3) * z + 2.27265548208155028766e-1
    ) * z + 2.0
    power = (np.int64(k) + np.int64(1023)) << np.int64(52)
    result = (1.0 + 2.0 * p / (q - p)) * np.int64(power).view(np.float64)
    return result if value == value else value


@njit(**INLINE)
def _tanh32(value):
    # The bound is the float nearest to the x at which the quotient reaches 1. For slightly larger x, tanh(x)
    # rounds to 1.
    x = min(max(value, F(-7.99881172180175781)), F(7.99881172180175781))
    z = x * x
    p = F(-2.76076847742355e-16) * z + F(2.00018790482477e-13)
    p = p * z + F(-8.60467152213735e-11)
    p = p * z + F(5.12229709037114e-08)
    p = p * z + F(1.48572235717979e-05)
    p = p * z + F(6.37261928875436e-04)
    p = p * z + F(4.89352455891786e-03)
    q = F(1.19825839466702e-06) * z + F(1.18534705686654e-04)
    q = q * z + F(2.26843463243900e-03)
    q = q * z + F(4.89352518554385e-03)
    return x * p / q if value == value else value


@njit(**INLINE)
def _tanh64(x):
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    near = x + x * z * p / q
    size = abs(x)
    far = 1.0 - 2.0 / (_exp64(2.0 * min(size, 20.0)) + 1.0)
    return math.copysign(far, x) if size >= 0.625 else near


def exp(x):
    """Compute exp(x) inside compiled kernels; the result for NaN is NaN."""
    return np.exp(x)


def tanh(x):
    """Compute tanh(x) inside compiled kernels; the result for NaN is NaN."""
    return np.tanh(x)


@overload(exp, jit_options=INLINE)
def _exp(x):
    return (lambda x: _exp32(x)) if x == types.float32 else (lambda x: _exp64(x))


@overload(tanh, jit_options=INLINE)
def _tanh(x):
    return (lambda x: _tanh32(x)) if x == types.float32 else (lambda x: _tanh64(x))
