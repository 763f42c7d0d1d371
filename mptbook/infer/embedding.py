"""Rows of an embedding, compiled: PyTorch would make four calls for them, and each token waits.

Dimensions in this file
    R   rows: sequences that a token is written for
    D   width of the residual stream
    G   groups of numbers with a scale of their own, D / GROUP
"""

from numba import float32, types
from numba.extending import overload

from mptbook.infer.compiled import COMPILED, GROUP, two, widen


def add_embeddings(table, ids, x):
    """Add row ids[r] of a table to row r of x.

    Args:
        table: a `mptbook.infer.linear.Linear`.
        ids: (R,) int64.
        x: (R, D) float32, written.
    """
    raise AssertionError("compiled code only")


@overload(add_embeddings, jit_options=COMPILED)
def _add_embeddings(table, ids, x):
    return add_nibbles if table.types[0].dtype == types.uint8 else add_numbers


def add_numbers(table, ids, x):
    weight, scale, _ = table
    for r in range(len(ids)):
        factor = scale[ids[r], 0] if scale.size else float32(1)
        for j in range(x.shape[1]):
            x[r, j] += widen(weight[ids[r], j]) * factor


def add_nibbles(table, ids, x):
    weight, scale, _ = table
    halves = x.reshape(len(x), -1, 2, GROUP // 2)
    for r in range(len(ids)):
        for g in range(halves.shape[1]):
            factor = scale[ids[r], g]
            for j in range(GROUP // 2):
                low, high = two(weight[ids[r], g, j])
                halves[r, g, 0, j] += low * factor
                halves[r, g, 1, j] += high * factor
