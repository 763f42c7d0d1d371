"""Products of two matrices in registers, and the order of numbers that they are taken in.

In bfloat16 the processor's units multiply two numbers of a row with two of a column and add both
to a sum; such two lie beside each other in 32 bits. In float32 a number is by itself. A step of a
product is one of either.

Dimensions in this file
    n   keys of a tile
    K   width of a head
    C   K and as many zeros as make it a multiple of `COLUMNS`
"""

import numpy as np
from numba import njit, types, uint32
from numba.extending import overload

from mptbook.infer.compiled import INLINE, widen
from mptbook.infer.emit import LANES
from mptbook.infer.sums import add_outer, zeros

# What fills the registers with sums: 24 of 32, or 12 of the 16 of AVX2.
VECTORS = (0, 1, 2, 3) if LANES == 16 else (0, 1)
COLUMNS = len(VECTORS) * LANES
ROWS = 6


def steps(n, like):
    """Steps that n products of a sum take."""
    raise AssertionError("compiled code only")


@overload(steps, jit_options=INLINE)
def _steps(n, like):
    return (lambda n, like: (n + 1) // 2) if in_pairs(like) else (lambda n, like: n)


def room(n, m, like):
    """(n, m) zeros, of float32 or of pairs of bfloat16."""
    raise AssertionError("compiled code only")


@overload(room, jit_options=INLINE)
def _room(n, m, like):
    if in_pairs(like):
        return lambda n, m, like: np.zeros((n, m), np.uint32)
    return lambda n, m, like: np.zeros((n, m), np.float32)


def in_pairs(array: types.Array) -> bool:
    """Whether a step is of two bfloat16, as the numbers themselves or as the array of pairs."""
    return array.dtype != types.float32


def pack(numbers, packed):
    """Numbers in steps along the first axis.

    Args:
        numbers: (n, m) as they are stored.
        packed: (steps of n, m or more), written.
    """
    raise AssertionError("compiled code only")


@overload(pack, jit_options=INLINE)
def _pack(numbers, packed):
    def pairs(numbers, packed):
        n, m = numbers.shape
        for i in range(n // 2):
            for j in range(m):
                packed[i, j] = pair(numbers[2 * i, j], numbers[2 * i + 1, j])
        if n % 2:
            for j in range(m):
                packed[n // 2, j] = half(numbers[n - 1, j])

    def single(numbers, packed):
        for i in range(numbers.shape[0]):
            for j in range(numbers.shape[1]):
                packed[i, j] = widen(numbers[i, j])

    return pairs if in_pairs(packed) else single


@njit(**INLINE)
def pair(x, y):
    """Two bfloat16 beside each other in 32 bits."""
    return half(x) | (half(y) << uint32(16))


def half(x):
    """The bits of a stored number as bfloat16, which holds all that 8 bits can."""
    raise AssertionError("compiled code only")


@overload(half, jit_options=INLINE)
def _half(x):
    if x == types.uint16:
        return lambda x: uint32(x)
    return lambda x: np.float32(x).view(np.uint32) >> uint32(16)


@njit(**INLINE)
def product(rows, columns, at, n):
    """`ROWS` rows with `COLUMNS` columns from one on; n steps."""
    sums = zeros(VECTORS, ROWS)
    for step in range(n):
        sums = add_outer(sums, columns, at, rows, step)
    return sums
