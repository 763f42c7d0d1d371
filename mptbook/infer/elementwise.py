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

from mptbook.infer.compiled import COMPILED, narrow, widen


class Norm(NamedTuple):
    """A norm: the gain, (D,) float32, and the bias, or no elements."""

    gain: np.ndarray
    bias: np.ndarray


@njit(**COMPILED)
def normalise(norm, eps, rms, x, y):
    """LayerNorm or RMSNorm of each row of x, (R, D), into y; float32 or uint16 (bfloat16) each."""
    width = x.shape[1]
    for r in range(x.shape[0]):
        mean = float32(0)
        if not rms:
            for j in range(width):
                mean += widen(x[r, j])
            mean /= float32(width)
        square = float32(0)
        for j in range(width):
            square += (widen(x[r, j]) - mean) ** 2
        factor = float32(1 / math.sqrt(square / float32(width) + eps))
        for j in range(width):
            normed = (widen(x[r, j]) - mean) * factor * norm.gain[j]
            if norm.bias.size:
                normed += norm.bias[j]
            y[r, j] = narrow(normed, y)


@njit(**COMPILED)
def gelu(y):
    """GELU of each element, float32 or uint16 (bfloat16), in place.

    max(x, 0) less what lies in the tail of the normal distribution, and not x times what does
    not: that would be 1 less nearly 1 where x is far below zero.
    """
    flat = y.reshape(-1)
    for i in range(flat.size):
        x = widen(flat[i])
        size = abs(x)
        lost = size * tail(size) if size < 14 else float32(0)
        flat[i] = narrow(float32(0.5) * (x + size) - lost, flat)


@njit(**COMPILED)
def clip(y, most):
    """Each element to between -most and most, in place."""
    flat = y.reshape(-1)
    for i in range(flat.size):
        flat[i] = max(min(flat[i], most), -most)


@njit(**COMPILED)
def tail(x):
    """The share of the normal distribution that lies above x, from 0 to 14, to 2 ** -16 of it.

    Multiplications and additions, which the compiler does for many numbers at once, as it cannot
    with calls of `math.erfc`.

    Source: Press et al., Numerical Recipes in C, 2nd edition, section 6.2 (`erfcc`).
    """
    z = x * float32(0.5**0.5)
    t = float32(1) / (float32(1) + float32(0.5) * z)
    series = t * float32(0.17087277) + float32(-0.82215223)
    series = t * series + float32(1.48851587)
    series = t * series + float32(-1.13520398)
    series = t * series + float32(0.27886807)
    series = t * series + float32(-0.18628806)
    series = t * series + float32(0.09678418)
    series = t * series + float32(0.37409196)
    series = t * series + float32(1.00002368)
    series = t * series + float32(-1.26551223)
    return float32(0.5) * t * exponential(series - z * z)


@njit(**COMPILED)
def exponential(x):
    """exp(x) of a number no more than zero, to 2 ** -22."""
    power = max(x * float32(1.44269504), float32(-126))  # of two
    whole = np.rint(power)
    y = (power - whole) * float32(0.69314718)  # at most 0.35: six terms of the series
    series = y * float32(1 / 720) + float32(1 / 120)
    series = y * series + float32(1 / 24)
    series = y * series + float32(1 / 6)
    series = y * series + float32(0.5)
    series = y * (y * series + float32(1)) + float32(1)
    exponent = np.int32(int32(whole) + int32(127)) << np.int32(23)
    return series * np.int32(exponent).view(np.float32)


@njit(**COMPILED)
def exponentials(x, most):
    """exp(x - most) of each element, in place, to 2 ** -22; their sum is returned.

    Args:
        x: (T,) float32.
        most: float32, no less than any of them.
    """
    total = float32(0)
    for i in range(len(x)):
        x[i] = exponential(x[i] - most)
        total += x[i]
    return total
