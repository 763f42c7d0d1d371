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
from numba import float32, njit, prange, types
from numba.extending import overload

from mptbook.infer.compiled import COMPILED, EXACT, EXACT_PARALLEL, GROUP, INLINE, widen
from mptbook.infer.emit import LANES, PAIRS
from mptbook.infer.inputs import float_inputs, whole_groups, whole_inputs
from mptbook.infer.sums import (
    add_group,
    add_products,
    add_scaled,
    add_up,
    whole_zeros,
    zeros,
)
from mptbook.infer.vectors import ask_ahead, gather, load, outputs_at

FOUR = 0, 1, 2, 3
# Outputs that go together, so many that what four rows need for them fits into the registers. Of
# the 16 of AVX2, whole numbers take some for products before they are added, 4 bits most.
OF_FLOATS, OF_BYTES, OF_NIBBLES = (FOUR[: 4 if LANES == 16 else n] for n in (3, 2, 1))
MOST = 4096  # inputs whose products, of 8 and 16 bits, add up in a vector without overflow


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
            multiply_inputs(linear, whole_groups(x), OF_NIBBLES, y)
            add_bias(linear.bias, y)

    else:
        whole = stored == types.int8
        inputs_of, of = (whole_inputs, OF_BYTES) if whole else (float_inputs, OF_FLOATS)

        def multiply(linear, x, y):
            multiply_inputs(linear, inputs_of(x), of, y)
            add_rest(linear, x, y)
            add_bias(linear.bias, y)

    return multiply


@njit(**COMPILED)
def product(linear, x):
    """(R, N) of `multiply`, in memory of its own."""
    y = np.empty((len(x), linear.weight.shape[0]), np.float32)
    multiply(linear, x, y)
    return y


@njit(**EXACT_PARALLEL)
def multiply_inputs(linear, inputs, of, y):
    """`multiply`, but for inputs at the end that fill no vector.

    Each thread reads several places of the matrix at a time: memory serves several streams faster
    than one. Where outputs are no multiple of those that go together, some are computed twice.

    Args:
        inputs: x, as `float_inputs`, `whole_inputs` or `whole_groups` gives it.
        of: as many elements as outputs go together where there are three rows or more. One or two
            wait for memory, and four outputs are four streams.
    """
    n_rows, n_outputs = len(y), len(linear.weight)
    if n_rows < 3:
        for i in prange((n_outputs + 3) // 4):
            rest_products(linear, outputs_at(i, n_outputs, FOUR), inputs, 0, y)
    else:
        for i in prange((n_outputs + len(of) - 1) // len(of)):
            outputs = outputs_at(i, n_outputs, of)
            for r in range(0, n_rows - 3, 4):
                products(linear, outputs, inputs, r, y, zeros(outputs, 4))
            rest_products(linear, outputs, inputs, n_rows & -4, y)


@njit(**INLINE)
def rest_products(linear, outputs, inputs, r, y):
    """`products` of the last rows, from r on; fewer than four."""
    rest = len(y) - r
    if rest == 3:
        products(linear, outputs, inputs, r, y, zeros(outputs, 3))
    elif rest == 2:
        products(linear, outputs, inputs, r, y, zeros(outputs, 2))
    elif rest == 1:
        products(linear, outputs, inputs, r, y, zeros(outputs, 1))


def products(linear, outputs, inputs, r, y, sums):
    """Some outputs for rows from r on, into y.

    Args:
        sums: `zeros` of as many rows, which stay in registers.
    """
    raise AssertionError("compiled code only")


@overload(products, jit_options=INLINE)
def _products(linear, outputs, inputs, r, y, sums):
    chosen = {types.uint8: nibble_products, types.int8: byte_products}
    return chosen.get(linear.types[0].dtype, float_products)


def float_products(linear, outputs, inputs, r, y, sums):
    weight, x = linear.weight, inputs[0]
    width, n_rows = weight.shape[1], len(sums[0])
    for start in range(0, width - PAIRS + 1, PAIRS):
        for j in (start, start + LANES):
            weights = load(weight, outputs, j)
            sums = add_products(sums, weights, x, r * width + n_rows * j)
        for output in outputs:
            ask_ahead(weight, (output, start))
    write(add_up(sums), inputs[1], outputs, r, y)


def byte_products(linear, outputs, inputs, r, y, sums):
    weight, scale, _ = linear
    x, unit = inputs
    width, n_rows = weight.shape[1], len(sums[0])
    for start in range(0, width, MOST):
        whole = whole_zeros(sums)
        for j in range(start, min(start + MOST, width) - PAIRS + 1, PAIRS):
            whole = add_products(whole, load(weight, outputs, j), x, r * width + n_rows * j)
            for output in outputs:
                ask_ahead(weight, (output, j))
        sums = add_scaled(sums, whole, gather(scale, outputs, 0))
    write(add_up(sums), unit, outputs, r, y)


def nibble_products(linear, outputs, inputs, r, y, sums):
    weight, scale, _ = linear
    x, unit = inputs
    width, n_rows = GROUP * scale.shape[1], len(sums[0])
    for g in range(scale.shape[1]):
        for output in outputs:
            ask_ahead(weight, (output, g, 0))
        sums = add_group(sums, weight, scale, outputs, g, x, r * width + n_rows * GROUP * g)
    write(add_up(sums), unit, outputs, r, y)


@njit(**INLINE)
def write(found, unit, outputs, r, y):
    """What `add_up` gives, times the units of the rows where they have one, into y from r on."""
    for k in range(len(found) // len(outputs)):
        for n, i in enumerate(outputs):
            value = found[len(outputs) * k + n]
            y[r + k, i] = value * unit[r + k] if unit.size else value


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
