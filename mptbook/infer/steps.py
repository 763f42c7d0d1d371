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


def pack_query(query, row):
    """A query in steps.

    Args:
        query: (K,).
        row: written.
    """
    raise AssertionError("compiled code only")


@overload(pack_query, jit_options=INLINE)
def _pack_query(query, row):
    def pairs(query, row):
        for d in range(len(query) // 2):
            row[d] = pair(query[2 * d], query[2 * d + 1])
        if len(query) % 2:
            row[len(query) // 2] = uint32(query[len(query) - 1])

    def single(query, row):
        for d in range(len(query)):
            row[d] = query[d]

    return pairs if in_pairs(row) else single


def pack_keys(keys, columns):
    """A tile of keys, one to a column, in steps.

    Args:
        keys: (n, K).
        columns: (steps of K, KEYS), written.
    """
    raise AssertionError("compiled code only")


@overload(pack_keys, jit_options=INLINE)
def _pack_keys(keys, columns):
    def pairs(keys, columns):
        n, width = keys.shape
        for j in range(n):
            for d in range(width // 2):
                columns[d, j] = pair(keys[j, 2 * d], keys[j, 2 * d + 1])
            if width % 2:
                columns[width // 2, j] = half(keys[j, width - 1])

    def single(keys, columns):
        for j in range(keys.shape[0]):
            for d in range(keys.shape[1]):
                columns[d, j] = widen(keys[j, d])

    return pairs if in_pairs(columns) else single


def pack_values(values, columns):
    """A tile of values; a token is a step, or half of one.

    Args:
        values: (n, K).
        columns: (steps of KEYS, C), written.
    """
    raise AssertionError("compiled code only")


@overload(pack_values, jit_options=INLINE)
def _pack_values(values, columns):
    def pairs(values, columns):
        n, width = values.shape
        for j in range(n // 2):
            for d in range(width):
                columns[j, d] = pair(values[2 * j, d], values[2 * j + 1, d])
        if n % 2:
            for d in range(width):
                columns[n // 2, d] = half(values[n - 1, d])

    def single(values, columns):
        for j in range(values.shape[0]):
            for d in range(values.shape[1]):
                columns[j, d] = widen(values[j, d])

    return pairs if in_pairs(columns) else single


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
    sums = zeros(VECTORS, 6)  # ROWS, which has to be a constant here
    for step in range(n):
        sums = add_outer(sums, columns, at, rows, step)
    return sums
