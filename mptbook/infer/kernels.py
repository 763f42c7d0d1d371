"""Products of one or a few vectors with a matrix, compiled for the processor they run on.

Writing one token takes every weight once, and a multiplication and an addition for each: the
processor waits for memory. So a kernel has to read each weight once, as few bytes as it is
stored in, and to widen it on the way. PyTorch's products are made for many rows, and reach half
of the memory's speed for one, or less where weights have 16 bits and the processor has no units
for them. These are loops of our own, compiled.

A row becomes the same, to the last bit, whatever rows are beside it: each sum is taken in the
same order for one row and for several.

Dimensions in this file
    R   rows: sequences that a token is written for
    N   outputs of a layer
    D   its inputs
    G   groups of inputs with a scale of their own, D / GROUP
"""

import numpy as np
from numba import float32, int64, njit, prange, types
from numba.extending import overload

from mptbook.infer.compiled import COMPILED, EXACT, EXACT_PARALLEL, GROUP, INLINE, widen
from mptbook.infer.emit import LANES, PAIRS
from mptbook.infer.vectors import (
    add_products,
    add_scaled,
    add_up,
    ask_ahead,
    load,
    load_bytes,
    load_nibbles,
    whole_numbers,
    whole_zeros,
    zeros,
)
from mptbook.infer.whole import whole_groups, whole_rows

MOST = 4096  # inputs whose products, of 8 and 16 bits, add up in a vector without overflow
NO_UNIT = np.empty(0, np.float32)
ROWS = LANES // 4  # that are multiplied together: all sums of four outputs fit into the registers


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

        def multiply(linear, x, y):
            multiply_inputs(linear, whole_groups(x), y)
            add_bias(linear.bias, y)

    else:
        kinds = {types.int8: whole_rows, types.uint16: every_other}
        inputs_of = kinds.get(stored, as_they_are)

        def multiply(linear, x, y):
            multiply_inputs(linear, inputs_of(x), y)
            add_rest(linear, x, y)
            add_bias(linear.bias, y)

    return multiply


@njit(**EXACT)
def as_they_are(x):
    return x


@njit(**EXACT)
def every_other(x):
    """x in the order in which `load` finds weights of bfloat16."""
    ordered = np.empty_like(x)
    for r in range(len(x)):
        for start in range(0, x.shape[1] - PAIRS + 1, PAIRS):
            for lane in range(LANES):
                ordered[r, start + lane] = x[r, start + 2 * lane]
                ordered[r, start + LANES + lane] = x[r, start + 2 * lane + 1]
    return ordered


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
        inputs: x, or what `every_other`, `whole_rows` or `whole_groups` make of it.
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


@overload(products, jit_options=INLINE)
def _products(linear, i, inputs, r, y, sums):
    chosen = {types.uint8: nibble_products, types.int8: byte_products}
    return chosen.get(linear.types[0].dtype, float_products)


def float_products(linear, i, inputs, r, y, sums):
    weight = linear.weight
    outputs = i0, i1, i2, i3 = four_outputs(weight, i)
    a = b = c = d = sums
    for start in range(0, weight.shape[1] - PAIRS + 1, PAIRS):
        a = add_two(a, load(weight, (i0, start)), inputs, r, start)
        b = add_two(b, load(weight, (i1, start)), inputs, r, start)
        c = add_two(c, load(weight, (i2, start)), inputs, r, start)
        d = add_two(d, load(weight, (i3, start)), inputs, r, start)
        for output in outputs:
            ask_ahead(weight, (output, start))
    write(add_up(a, b, c, d), NO_UNIT, outputs, r, y)


@njit(**INLINE)
def add_two(sums, vectors, inputs, r, start):
    """Products of two vectors of weights, one after the other."""
    first = add_products(sums, vectors[0], inputs, r, start)
    return add_products(first, vectors[1], inputs, r, start + LANES)


def byte_products(linear, i, inputs, r, y, sums):
    weight, scale, _ = linear
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
        a, b = add_scaled(a, of_a, scale[i0, 0]), add_scaled(b, of_b, scale[i1, 0])
        c, d = add_scaled(c, of_c, scale[i2, 0]), add_scaled(d, of_d, scale[i3, 0])
    write(add_up(a, b, c, d), unit, outputs, r, y)


def nibble_products(linear, i, inputs, r, y, sums):
    weight, scale, _ = linear
    x, excess, unit = inputs
    outputs = i0, i1, i2, i3 = four_outputs(weight, i)
    a = b = c = d = sums
    for g in range(scale.shape[1]):
        a = add_scaled(a, group_products(weight, i0, g, x, excess, r, sums), scale[i0, g])
        b = add_scaled(b, group_products(weight, i1, g, x, excess, r, sums), scale[i1, g])
        c = add_scaled(c, group_products(weight, i2, g, x, excess, r, sums), scale[i2, g])
        d = add_scaled(d, group_products(weight, i3, g, x, excess, r, sums), scale[i3, g])
    write(add_up(a, b, c, d), unit, outputs, r, y)


@njit(**INLINE)
def group_products(weight, i, g, x, excess, r, sums):
    """Products of one group of output i, in whole numbers."""
    totals = whole_numbers(sums, excess, r, g)
    ask_ahead(weight, (i, g, 0))
    vectors = load_nibbles(weight, (i, g, 0))
    for n in range(len(vectors)):
        totals = add_products(totals, vectors[n], x, r, g * GROUP + n * PAIRS)
    return totals


@njit(**INLINE)
def four_outputs(weight, i):
    """One of each fourth; where there is no multiple of four, some come twice."""
    i, quarter, last = int64(i), (len(weight) + 3) // 4, len(weight) - 1
    return i, min(i + quarter, last), min(i + 2 * quarter, last), min(i + 3 * quarter, last)


@njit(**INLINE)
def write(found, unit, outputs, r, y):
    """What `add_up` gives, times the units of the rows where they have one, into y from r on."""
    for k in range(len(found) // 4):
        for n, i in enumerate(outputs):
            y[r + k, i] = found[4 * k + n] * unit[r + k] if unit.size else found[4 * k + n]


@njit(**EXACT_PARALLEL)
def add_rest(linear, x, y):
    """Add the products of inputs at the end, which fill no vector, to y."""
    weight, scale, _ = linear
    start = weight.shape[1] // PAIRS * PAIRS
    if start == weight.shape[1]:
        return
    for i in prange(len(weight)):
        factor = scale[i, 0] if scale.size else float32(1)
        for r in range(len(x)):
            for j in range(start, weight.shape[1]):
                y[r, i] += widen(weight[i, j]) * x[r, j] * factor


@njit(**EXACT)
def add_bias(bias, y):
    """Apart from the products, because a product and a sum may be rounded once, or twice."""
    if bias.size:
        for r in range(len(y)):
            for i in range(len(bias)):
                y[r, i] += bias[i]
