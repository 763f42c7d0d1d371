"""Inputs of a layer as kernels take them: in the order of their loops, and as whole numbers where
weights have 8 or 4 bits.

Kernels multiply four rows together, and then those that are left. What such rows have for one
vector of weights lies together, so that a loop goes through one stretch of memory.

Dimensions in this file
    R   rows: sequences that a token is written for
    D   inputs of a layer
"""

import numpy as np
from numba import float32, int16, int32, njit

from mptbook.infer.compiled import EXACT, INLINE
from mptbook.infer.emit import LANES, PAIRS
from mptbook.infer.vectors import BYTES, HALF, copy


@njit(**INLINE)
def together(x, size):
    """(R * D,) of the (R, D) numbers: rows that are multiplied together in turn, `size` numbers of
    each, a register. Of inputs at the end that do not fill so many nothing is copied."""
    n_rows, width = x.shape
    flat = np.empty(x.size, x.dtype)
    for r in range(0, n_rows, 4):
        n = min(4, n_rows - r)
        for k in range(n):
            at = r * width + k * size
            for start in range(0, width - size + 1, size):
                copy(x, r + k, start, flat, at + n * start)
    return flat


@njit(**EXACT)
def float_inputs(x):
    """(R, D) float32 in the order of kernels, and no units."""
    return together(x, LANES), np.empty(0, np.float32)


@njit(**EXACT)
def whole_inputs(x):
    """`whole_rows` in the order of kernels: (R * D,) int16, and (R,) float32."""
    whole, unit = whole_rows(x)
    return together(whole, PAIRS), unit


@njit(**EXACT)
def whole_rows(x):
    """(R, D) float32 as int16, and the unit of each row, (R,) float32.

    Products of 16-bit whole numbers are added in 32 bits, two to an instruction: twice as many at
    a time as of float32. So inputs are written as whole numbers up to 32,767 times a unit, which
    changes them by 2 ** -16 of the largest: less than bfloat16, which changes the largest itself
    by 2 ** -9, and far less than 8 bits do to the weights.
    """
    whole, unit = np.empty(x.shape, np.int16), np.empty(len(x), np.float32)
    bits = x.view(np.int32)
    for r in range(len(x)):
        largest = int32(0)
        for j in range(x.shape[1]):  # without their signs, bits are in the order of numbers
            largest = max(largest, int32(bits[r, j] & int32(0x7FFFFFFF)))
        most = np.int32(largest).view(np.float32)
        factor = float32(32767) / most if most > 0 else float32(0)
        for j in range(x.shape[1]):
            whole[r, j] = int16(np.rint(x[r, j] * factor))
        unit[r] = most / float32(32767)
    return whole, unit


@njit(**EXACT)
def whole_groups(x):
    """`whole_inputs` for weights of 4 bits, each group in the order that
    `mptbook.infer.sums.add_group` has them in."""
    whole, unit = whole_rows(x)
    ordered = np.empty_like(whole)
    lanes = HALF // BYTES
    halves = whole.reshape(-1, 2, HALF)
    target = ordered.reshape(-1, BYTES, 2, lanes)
    for g in range(len(halves)):
        for half in range(2):
            for byte in range(BYTES):
                for lane in range(lanes):
                    target[g, byte, half, lane] = halves[g, half, lane * BYTES + byte]
    return together(ordered, PAIRS), unit
