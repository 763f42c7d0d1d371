"""Products of one or a few vectors with a matrix, compiled for the processor they run on.

Writing one token takes every weight once, and a multiplication and an addition for each: the
processor waits for memory. So a kernel has to read each weight once, as few bytes as it is
stored in, and to widen it on the way. PyTorch's products are made for many rows, and reach half
of the memory's speed for one, or less where weights have 16 bits and the processor has no units
for them. These are loops, compiled by Numba at their first call (seconds; kept on disk).

A row becomes the same, to the last bit, whatever rows are beside it: each sum is taken in the
same order for one row and for several.

Dimensions in this file
    R   rows: sequences that a token is written for
    N   outputs of a layer
    D   its inputs
    G   groups of inputs with a scale of their own, D / GROUP
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch
from numba import float32, int16, int32, int64, njit, prange, types, uint16, uint32
from numba.extending import overload

from mptbook.infer.vectors import (
    LANES,
    PAIRS,
    add_products,
    add_scaled,
    add_up,
    ask_ahead,
    load,
    load_bytes,
    load_nibbles,
    whole_zeros,
    zeros,
)

# NumPy's division: one that had to raise for a zero would keep a loop from using wide registers.
EXACT = {"error_model": "numpy", "cache": True, "nogil": True}
EXACT_PARALLEL = EXACT | {"parallel": True}
# A sum may be taken in any order, which lets the compiler use wide registers; infinities and
# NaN keep their meaning.
COMPILED = EXACT | {"fastmath": {"reassoc", "contract", "nsz"}}
PARALLEL = COMPILED | {"parallel": True}

GROUP = 64  # inputs that share a scale where weights have 4 bits
MOST = 4096  # inputs whose products, of 8 and 16 bits, add up in a vector without overflow
ROWS = LANES // 4  # that are multiplied together: all sums of four outputs fit into the registers


@contextmanager
def pytorchs_threads() -> Iterator[None]:
    """Compiled loops take as many threads as PyTorch may, and PyTorch keeps its own number."""
    n_threads = torch.get_num_threads()
    numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)  # numba's OpenMP layer has set its own for both


def widen(x):
    """The float32 that a stored number stands for."""
    raise AssertionError("compiled code only")


@overload(widen, jit_options=COMPILED)
def _widen(x):
    if x == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: float32(x)


def narrow(number, array):
    """A float32 as an array of float32, or of the bits of bfloat16, keeps it."""
    raise AssertionError("compiled code only")


@overload(narrow, jit_options=COMPILED)
def _narrow(number, array):
    return bfloat16_bits if array.dtype == types.uint16 else lambda number, array: number


def bfloat16_bits(number, array):
    bits = np.float32(number).view(np.uint32)
    odd = uint32((bits >> uint32(16)) & uint32(1))  # to the nearest, halves to the even
    return uint16(uint32(bits + uint32(0x7FFF) + odd) >> uint32(16))


def multiply(linear, x, y):
    """y = x @ weight.T + bias.

    Args:
        linear: a `mptbook.infer.linear.Linear`.
        x: (R, D) float32.
        y: (R, N) float32, written.
    """
    raise AssertionError("compiled code only")


@overload(multiply, jit_options=COMPILED)
def _multiply(linear, x, y):
    stored = linear.types[0].dtype
    if stored == types.uint8:  # groups of inputs fill vectors
        return lambda linear, x, y: multiply_inputs(linear, whole_groups(x), y)
    if stored == types.int8:

        def multiply(linear, x, y):
            multiply_inputs(linear, whole_rows(x), y)
            add_rest(linear, x, y, x.shape[1] // PAIRS * PAIRS)

    else:

        def multiply(linear, x, y):
            multiply_inputs(linear, x, y)
            add_rest(linear, x, y, x.shape[1] // LANES * LANES)

    return multiply


@njit(**COMPILED)
def product(linear, x):
    """(R, N) of `multiply`, in memory of its own."""
    y = np.empty((len(x), linear.weight.shape[0]), np.float32)
    multiply(linear, x, y)
    return y


@njit(**EXACT_PARALLEL)
def multiply_inputs(linear, inputs, y):
    """`multiply`, but for inputs at the end that fill no vector.

    Each thread reads four places of the matrix at a time: memory serves several streams faster
    than one.

    Args:
        inputs: x, or what `whole_rows` or `whole_groups` make of it.
    """
    n_rows, quarter = len(y), (len(linear.weight) + 3) // 4
    for i in prange(quarter):
        for r in range(0, n_rows - ROWS + 1, ROWS):
            products(linear, i, inputs, r, y, zeros(ROWS))
        for r in range(n_rows - n_rows % ROWS, n_rows):
            products(linear, i, inputs, r, y, zeros(1))


def products(linear, i, inputs, r, y, sums):
    """Output i of each fourth of all, for rows from r on, into y.

    Args:
        sums: `zeros` of as many rows. They stay in registers, and for four rows eight vectors are
            loaded for sixteen multiplications; one output of one row would take two for one.
    """
    raise AssertionError("compiled code only")


@overload(products, jit_options=EXACT)
def _products(linear, i, inputs, r, y, sums):
    chosen = {types.uint8: nibble_products, types.int8: byte_products}
    return chosen.get(linear.types[0].dtype, float_products)


def float_products(linear, i, inputs, r, y, sums):
    weight = linear.weight
    outputs = i0, i1, i2, i3 = four_outputs(weight, i)
    a = b = c = d = sums
    for j in range(0, weight.shape[1] - LANES + 1, LANES):
        a = add_products(a, load(weight, (i0, j)), inputs, r, j)
        b = add_products(b, load(weight, (i1, j)), inputs, r, j)
        c = add_products(c, load(weight, (i2, j)), inputs, r, j)
        d = add_products(d, load(weight, (i3, j)), inputs, r, j)
        for output in outputs:
            ask_ahead(weight, (output, j))
    write(add_up(a, b, c, d), linear.bias, outputs, r, y)


def byte_products(linear, i, inputs, r, y, sums):
    weight, scale, bias = linear
    x, unit = inputs
    outputs = i0, i1, i2, i3 = four_outputs(weight, i)
    a = b = c = d = sums
    for start in range(0, x.shape[1], MOST):
        of_a = of_b = of_c = of_d = whole_zeros(sums)
        for j in range(start, min(start + MOST, x.shape[1]) - PAIRS + 1, PAIRS):
            of_a = add_products(of_a, load_bytes(weight, (i0, j)), x, r, j)
            of_b = add_products(of_b, load_bytes(weight, (i1, j)), x, r, j)
            of_c = add_products(of_c, load_bytes(weight, (i2, j)), x, r, j)
            of_d = add_products(of_d, load_bytes(weight, (i3, j)), x, r, j)
            for output in outputs:
                ask_ahead(weight, (output, j))
        a = add_scaled(a, of_a, scale[i0, 0], unit, r, 0)
        b = add_scaled(b, of_b, scale[i1, 0], unit, r, 0)
        c = add_scaled(c, of_c, scale[i2, 0], unit, r, 0)
        d = add_scaled(d, of_d, scale[i3, 0], unit, r, 0)
    write(add_up(a, b, c, d), bias, outputs, r, y)


def nibble_products(linear, i, inputs, r, y, sums):
    weight, scale, bias = linear
    x, unit = inputs
    outputs = i0, i1, i2, i3 = four_outputs(weight, i)
    a = b = c = d = sums
    for g in range(unit.shape[1]):
        a = add_scaled(a, group_products(weight, i0, g, x, r, sums), scale[i0, g], unit, r, g)
        b = add_scaled(b, group_products(weight, i1, g, x, r, sums), scale[i1, g], unit, r, g)
        c = add_scaled(c, group_products(weight, i2, g, x, r, sums), scale[i2, g], unit, r, g)
        d = add_scaled(d, group_products(weight, i3, g, x, r, sums), scale[i3, g], unit, r, g)
    write(add_up(a, b, c, d), bias, outputs, r, y)


@njit(**EXACT)
def group_products(weight, i, g, x, r, sums):
    """Products of one group of output i, in whole numbers."""
    totals = whole_zeros(sums)
    ask_ahead(weight, (i, g, 0))
    vectors = load_nibbles(weight, (i, g, 0))
    for n in range(len(vectors)):
        totals = add_products(totals, vectors[n], x, r, g * GROUP + n * PAIRS)
    return totals


@njit(**EXACT)
def four_outputs(weight, i):
    """One of each fourth; where there is no multiple of four, some come twice."""
    i, quarter, last = int64(i), (len(weight) + 3) // 4, len(weight) - 1
    return i, min(i + quarter, last), min(i + 2 * quarter, last), min(i + 3 * quarter, last)


@njit(**EXACT)
def write(found, bias, outputs, r, y):
    """What `add_up` gives, into the rows of y from r on."""
    for k in range(len(found) // 4):
        for n, i in enumerate(outputs):
            y[r + k, i] = found[4 * k + n] + bias[i] if bias.size else found[4 * k + n]


@njit(**EXACT_PARALLEL)
def add_rest(linear, x, y, start):
    """Add the products of inputs from `start` on, which fill no vector, to y."""
    weight, scale, _ = linear
    if start == weight.shape[1]:
        return
    for i in prange(len(weight)):
        factor = scale[i, 0] if scale.size else float32(1)
        for r in range(len(x)):
            for j in range(start, weight.shape[1]):
                y[r, i] += widen(weight[i, j]) * x[r, j] * factor


@njit(**EXACT)
def whole_rows(x):
    """(R, D) float32 as int16, and the unit of each row, (R, 1), for weights of 8 bits.

    Products of 16-bit whole numbers are added in 32 bits, two to an instruction: twice as many at
    a time as of float32. So inputs are written as whole numbers up to 32,767 times a unit, which
    changes them by 2 ** -16 of the largest: less than bfloat16, which changes the largest itself
    by 2 ** -9, and far less than 8 bits do to the weights.
    """
    whole = np.empty(x.shape, np.int16)
    return whole, to_whole_numbers(x, whole).reshape(-1, 1)


@njit(**EXACT)
def whole_groups(x):
    """`whole_rows` with a unit for each group of inputs, (R, G), for weights of 4 bits."""
    whole = np.empty(x.shape, np.int16)
    unit = to_whole_numbers(x.reshape(-1, GROUP), whole.reshape(-1, GROUP))
    return whole, unit.reshape(len(x), -1)


@njit(**EXACT)
def to_whole_numbers(x, whole):
    """Rows of float32 as int16 times a unit for each row: the units; whole is written."""
    bits = x.view(np.int32)
    unit = np.empty(len(x), np.float32)
    for r in range(len(x)):
        largest = int32(0)
        for j in range(x.shape[1]):  # without their signs, bits are in the order of numbers
            largest = max(largest, int32(bits[r, j] & int32(0x7FFFFFFF)))
        most = np.int32(largest).view(np.float32)
        factor = float32(32767) / most if most > 0 else float32(0)
        for j in range(x.shape[1]):
            whole[r, j] = int16(np.rint(x[r, j] * factor))
        unit[r] = most / float32(32767)
    return unit
