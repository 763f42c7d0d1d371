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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import float32, int16, int32, njit, prange, types
from numba.extending import overload

# A sum may be taken in any order, which lets the compiler use wide registers; infinities and
# NaN keep their meaning.
COMPILED = {"fastmath": {"reassoc", "contract", "nsz"}, "cache": True, "nogil": True}
PARALLEL = COMPILED | {"parallel": True}

GROUP = 64  # inputs that share a scale where weights have 4 bits
HALF = GROUP // 2
BLOCK = 32  # outputs that a thread has in one go
ROWS = 4  # that are multiplied together


@contextmanager
def pytorchs_threads() -> Iterator[None]:
    """Compiled loops take as many threads as PyTorch may, and PyTorch keeps its own number."""
    n_threads = torch.get_num_threads()
    numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)  # numba's OpenMP layer has set its own for both


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
    packed = linear.types[0].dtype == types.uint8
    one = multiply_nibbles if packed else multiply_numbers
    many = multiply_nibbles_rows if packed else multiply_numbers_rows

    def choose(linear, x, y):
        n_rows = len(x)
        if n_rows == 1:
            one(linear, x[0], y[0])
        elif n_rows % ROWS == 0:
            many(linear, x, y)
        else:  # some rows of zeros cost less than loops for every number of rows
            filled = np.zeros((n_rows + ROWS - n_rows % ROWS, x.shape[1]), np.float32)
            filled[:n_rows] = x
            found = np.empty((len(filled), y.shape[1]), np.float32)
            many(linear, filled, found)
            y[:] = found[:n_rows]

    return choose


@njit(**COMPILED)
def product(linear, x):
    """(R, N) of `multiply`, in memory of its own."""
    y = np.empty((len(x), linear.weight.shape[0]), np.float32)
    multiply(linear, x, y)
    return y


@njit(**PARALLEL)
def multiply_numbers(linear, x, y):
    """`multiply` of one row, for weights of 8 bits or more.

    Each thread reads four places of the matrix at a time: memory serves several streams faster
    than one (measured: 28 against 17 GB/s).
    """
    weight, scale, bias = linear
    quarter, width = len(weight) // 4, len(x)
    for i in prange(quarter):
        w0, w1 = weight[i], weight[i + quarter]
        w2, w3 = weight[i + 2 * quarter], weight[i + 3 * quarter]
        a = b = c = d = float32(0)
        for j in range(width):
            number = x[j]
            a += widen(w0[j]) * number
            b += widen(w1[j]) * number
            c += widen(w2[j]) * number
            d += widen(w3[j]) * number
        y[i], y[i + quarter], y[i + 2 * quarter], y[i + 3 * quarter] = a, b, c, d
    for i in range(4 * quarter, len(weight)):
        last, a = weight[i], float32(0)
        for j in range(width):
            a += widen(last[j]) * x[j]
        y[i] = a
    if scale.size:
        y *= scale
    if bias.size:
        y += bias


@njit(**PARALLEL)
def multiply_nibbles(linear, x, y):
    """`multiply` of one row, for weights of 4 bits.

    Products of 16-bit whole numbers are added in 32 bits, two to an instruction where there is
    one. So each group of inputs is written as whole numbers up to 32,767 times a scale, which
    changes it by 2 ** -16 of its largest: far less than 4 bits do to the weights.
    """
    weight, scale, bias = linear
    n_groups = weight.shape[1]
    whole = np.empty((n_groups, 2, HALF), np.int16)
    unit = np.empty(n_groups, np.float32)
    offset = np.empty(n_groups, np.int32)
    to_whole_numbers(x, whole, unit, offset)
    for i in prange(len(weight)):
        total = bias[i] if bias.size else float32(0)
        for g in range(n_groups):
            w, low, high = weight[i, g], whole[g, 0], whole[g, 1]
            a = int32(0)
            for j in range(HALF):
                b = int16(w[j])
                a = int32(a + int32(int32(int16(b & int16(15))) * int32(low[j])))
                a = int32(a + int32(int32(int16(b >> int16(4))) * int32(high[j])))
            total += float32(int32(a - offset[g])) * scale[i, g] * unit[g]
        y[i] = total


@njit(**PARALLEL)
def multiply_numbers_rows(linear, x, y):
    """`multiply` of a multiple of `ROWS` rows, for weights of 8 bits or more."""
    weight, scale, bias = linear
    half = (len(weight) + 1) // 2
    for i in prange(half):
        k = min(i + half, len(weight) - 1)  # two streams; of an odd number one output comes twice
        scale_i, scale_k = (scale[i], scale[k]) if scale.size else (float32(1), float32(1))
        bias_i, bias_k = (bias[i], bias[k]) if bias.size else (float32(0), float32(0))
        for r in range(0, len(x), ROWS):
            a, b = products(weight, i, k, x, r)
            for row in range(ROWS):
                y[r + row, i] = a[row] * scale_i + bias_i
                y[r + row, k] = b[row] * scale_k + bias_k


@njit(**PARALLEL)
def multiply_nibbles_rows(linear, x, y):
    """`multiply` of a multiple of `ROWS` rows, for weights of 4 bits: each is widened once."""
    weight, _, bias = linear
    n_blocks = (len(weight) + BLOCK - 1) // BLOCK
    for block in prange(n_blocks):
        wide = np.empty((2, x.shape[1]), np.float32)
        for i in range(block * BLOCK, min(len(weight), (block + 1) * BLOCK), 2):
            k = min(i + 1, len(weight) - 1)
            widen_nibbles(linear, i, wide[0])
            widen_nibbles(linear, k, wide[1])
            bias_i, bias_k = (bias[i], bias[k]) if bias.size else (float32(0), float32(0))
            for r in range(0, len(x), ROWS):
                a, b = products(wide, 0, 1, x, r)
                for row in range(ROWS):
                    y[r + row, i] = a[row] + bias_i
                    y[r + row, k] = b[row] + bias_k


@njit(**COMPILED)
def products(weight, i, k, x, r):
    """Outputs i and k of `ROWS` rows of x, from row r on: eight sums, which fit into registers.

    Six numbers are loaded for eight multiplications; one output of one row would take two
    for one, and wait for loads. Arrays come whole and not as slices: of a slice that is handed
    on, all threads would count the references in the same place.
    """
    w, v = weight[i], weight[k]
    x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = float32(0)
    for j in range(len(w)):
        a, b = widen(w[j]), widen(v[j])
        a0 += a * x0[j]
        a1 += a * x1[j]
        a2 += a * x2[j]
        a3 += a * x3[j]
        b0 += b * x0[j]
        b1 += b * x1[j]
        b2 += b * x2[j]
        b3 += b * x3[j]
    return (a0, a1, a2, a3), (b0, b1, b2, b3)


@njit(**COMPILED)
def widen_nibbles(linear, i, wide):
    """Row i of a weight of 4 bits as (D,) float32, its scales included, into `wide`."""
    for g in range(linear.weight.shape[1]):
        bytes_, factor = linear.weight[i, g], linear.scale[i, g]
        low, high = wide[g * GROUP : g * GROUP + HALF], wide[g * GROUP + HALF : (g + 1) * GROUP]
        for j in range(HALF):
            b = int32(bytes_[j])
            low[j] = float32(int32((b & int32(15)) - int32(8))) * factor
            high[j] = float32(int32((b >> int32(4)) - int32(8))) * factor


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
