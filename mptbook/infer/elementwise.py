"""What a step does to vectors between its products: norms, GELU and exponentials, compiled.

Dimensions in this file
    R   rows: sequences that a token is written for
    D   width of a row
    T   tokens that a sequence looks back on
"""

import math
from typing import NamedTuple

import numpy as np
from numba import float32, int32, njit

from mptbook.infer.compiled import COMPILED


class Norm(NamedTuple):
    """A norm: the gain, (D,) float32, and the bias, or no elements."""

    gain: np.ndarray
    bias: np.ndarray


@njit(**COMPILED)
def normalise(norm, eps, rms, x, y):
    """LayerNorm or RMSNorm of each row of x, (R, D), into y."""
    width = x.shape[1]
    for r in range(x.shape[0]):
        mean = float32(0)
        if not rms:
            for j in range(width):
                mean += x[r, j]
            mean /= float32(width)
        square = float32(0)
        for j in range(width):
            square += (x[r, j] - mean) ** 2
        factor = float32(1 / math.sqrt(square / float32(width) + eps))
        for j in range(width):
            y[r, j] = (x[r, j] - mean) * factor * norm.gain[j]
            if norm.bias.size:
                y[r, j] += norm.bias[j]


@njit(**COMPILED)
def gelu(y):
    """GELU of each element, in place."""
    flat = y.reshape(-1)
    for i in range(flat.size):
        flat[i] = float32(0.5) * flat[i] * (float32(1) + erf(flat[i] * float32(0.5**0.5)))


@njit(**COMPILED)
def clip(y, most):
    """Each element to between -most and most, in place."""
    flat = y.reshape(-1)
    for i in range(flat.size):
        flat[i] = max(min(flat[i], most), -most)


@njit(**COMPILED)
def erf(x):
    """The error function of a float32 number, to 2 ** -22.

    Multiplications and additions only, which the compiler does for many numbers at once, as it
    cannot with calls of `math.erf`, which take ten times as long.

    Source: the quotient of polynomials that Eigen and XLA take.
    """
    x = min(max(x, float32(-4)), float32(4))
    s = x * x
    above = s * float32(-2.72614225801306e-10) + float32(2.77068142495902e-08)
    above = s * above + float32(-2.10102402082508e-06)
    above = s * above + float32(-5.69250639462346e-05)
    above = s * above + float32(-7.34990630326855e-04)
    above = s * above + float32(-2.95459980854025e-03)
    above = s * above + float32(-1.60960333262415e-02)
    below = s * float32(-1.45660718464996e-05) + float32(-2.13374055278905e-04)
    below = s * below + float32(-1.68282697438203e-03)
    below = s * below + float32(-7.37332916720468e-03)
    below = s * below + float32(-1.42647390514189e-02)
    return x * above / below


@njit(**COMPILED)
def exponentials(x, most):
    """exp(x - most) of each element, in place, to 2 ** -22; their sum is returned.

    Args:
        x: (T,) float32.
        most: float32, no less than any of them.
    """
    total = float32(0)
    for i in range(len(x)):
        power = max((x[i] - most) * float32(1.44269504), float32(-126))  # of two
        whole = np.rint(power)
        y = (power - whole) * float32(0.69314718)  # at most 0.35: six terms of the series
        series = y * float32(1 / 720) + float32(1 / 120)
        series = y * series + float32(1 / 24)
        series = y * series + float32(1 / 6)
        series = y * series + float32(0.5)
        series = y * (y * series + float32(1)) + float32(1)
        exponent = np.int32(int32(whole) + int32(127)) << np.int32(23)
        x[i] = series * np.int32(exponent).view(np.float32)
        total += x[i]
    return total
