"""Products of one or a few vectors with a matrix, compiled for the processor they run on.

Writing one token takes every weight once, and a multiplication and an addition for each: the
processor waits for memory. So a kernel has to read each weight once, as few bytes as it is
stored in, and to widen it on the way. PyTorch's products are made for many rows, and reach half
of the memory's speed for one, or less where weights have 16 bits and the processor has no units
for them. These are loops, compiled by Numba at their first call (seconds; kept on disk).

Dimensions in this file
    R   rows: sequences that a token is written for
    N   outputs of a layer
    D   its inputs
    G   groups of inputs with a scale of their own, D / GROUP
"""

import math
from typing import NamedTuple

import numpy as np
from numba import float32, int16, int32, njit, prange, types
from numba.extending import overload

# A sum may be taken in any order, which lets the compiler use wide registers; infinities and
# NaN keep their meaning.
COMPILED = {"fastmath": {"reassoc", "contract", "nsz"}, "cache": True, "nogil": True}
PARALLEL = COMPILED | {"parallel": True}

GROUP = 64  # inputs that share a scale where weights have 4 bits
HALF = GROUP // 2


class Linear(NamedTuple):
    """A layer as kernels read it; arrays of no elements where it has none.

    Args:
        weight: (N, D) float32, uint16 (the bits of bfloat16) or int8; or 4 bits each in
            (N, G, GROUP / 2) uint8: input j of a group in the low half of byte j, input
            GROUP / 2 + j in the high half, each 8 more than it is.
        scale: (N,) float32 of int8, (N, G) of 4 bits.
        bias: (N,) float32.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


class Norm(NamedTuple):
    """A norm: the gain, (D,) float32, and the bias, or no elements."""

    gain: np.ndarray
    bias: np.ndarray


def widen(x):
    """The float32 that a stored number stands for."""
    raise AssertionError("compiled code only")


@overload(widen, jit_options=COMPILED)
def _widen(x):
    if x == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: float32(x)


def multiply(linear, x, y):
    """y = x @ weight.T + bias.

    Args:
        linear: a `Linear`.
        x: (R, D) float32.
        y: (R, N) float32, written.
    """
    raise AssertionError("compiled code only")


@overload(multiply, jit_options=COMPILED)
def _multiply(linear, x, y):
    if linear.types[0].dtype == types.uint8:
        return lambda linear, x, y: multiply_nibbles(linear, x, y)
    return lambda linear, x, y: multiply_numbers(linear, x, y)


@njit(**PARALLEL)
def multiply_numbers(linear, x, y):
    """`multiply` for weights of 8 bits or more."""
    weight, scale, bias = linear
    n_rows, width = x.shape
    for i in prange(weight.shape[0]):
        factor = scale[i] if scale.size else float32(1)
        shift = bias[i] if bias.size else float32(0)
        row = weight[i]
        done = n_rows - n_rows % 4
        for r in range(0, done, 4):  # a weight is widened once for four rows
            x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
            a = b = c = d = float32(0)
            for j in range(width):
                w = widen(row[j])
                a += w * x0[j]
                b += w * x1[j]
                c += w * x2[j]
                d += w * x3[j]
            y[r, i] = a * factor + shift
            y[r + 1, i] = b * factor + shift
            y[r + 2, i] = c * factor + shift
            y[r + 3, i] = d * factor + shift
        for r in range(done, n_rows):
            only = x[r]
            a = float32(0)
            for j in range(width):
                a += widen(row[j]) * only[j]
            y[r, i] = a * factor + shift


@njit(**PARALLEL)
def multiply_nibbles(linear, x, y):
    """`multiply` for weights of 4 bits.

    Products of 16-bit whole numbers are added in 32 bits, two to an instruction where there is
    one. So each group of inputs is written as whole numbers up to 32,767 times a scale, which
    changes it by 2 ** -16 of its largest: far less than 4 bits do to the weights.
    """
    weight, scale, bias = linear
    n_rows, n_groups = x.shape[0], weight.shape[1]
    whole = np.empty((n_rows, n_groups, 2, HALF), np.int16)
    unit = np.empty((n_rows, n_groups), np.float32)
    offset = np.empty((n_rows, n_groups), np.int32)
    for r in range(n_rows):
        to_whole_numbers(x[r], whole[r], unit[r], offset[r])
    for i in prange(weight.shape[0]):
        shift = bias[i] if bias.size else float32(0)
        for r in range(n_rows):
            total = shift
            for g in range(n_groups):
                w, low, high = weight[i, g], whole[r, g, 0], whole[r, g, 1]
                a = int32(0)
                for j in range(HALF):
                    b = int16(w[j])
                    a = int32(a + int32(int32(int16(b & int16(15))) * int32(low[j])))
                    a = int32(a + int32(int32(int16(b >> int16(4))) * int32(high[j])))
                total += float32(int32(a - offset[r, g])) * scale[i, g] * unit[r, g]
            y[r, i] = total


@njit(**COMPILED)
def to_whole_numbers(x, whole, unit, offset):
    """(D,) float32 as int16 times a unit for each group, and 8 times the sum of each group."""
    for g in range(whole.shape[0]):
        largest = float32(0)
        for j in range(GROUP):
            largest = max(largest, abs(x[g * GROUP + j]))
        unit[g] = largest / float32(32767)
        factor = float32(32767) / largest if largest > 0 else float32(0)
        total = int32(0)
        for half in range(2):
            for j in range(HALF):
                value = int16(np.rint(x[g * GROUP + half * HALF + j] * factor))
                whole[g, half, j] = value
                total += int32(value)
        offset[g] = int32(8 * total)


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


@njit(**PARALLEL)
def gelu(y):
    """GELU of each element, in place."""
    flat = y.reshape(-1)
    for i in prange(flat.size):
        flat[i] = float32(0.5) * flat[i] * float32(1 + math.erf(flat[i] * float32(math.sqrt(0.5))))
