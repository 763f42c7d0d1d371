"""Sums of products in registers, for compiled loops; see `mptbook.infer.vectors`.

Sums are a tuple of tuples: for each output of a layer a vector for each row, whose lanes add up to
what is asked for.

Dimensions in this file
    O   outputs of which a loop holds the sums
    R   rows, likewise
"""

from functools import partial

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mptbook.infer.emit import (
    F32,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    REGISTER,
    add_floats,
    add_neighbours,
    add_pairs,
    add_whole,
    address_of,
    constant,
    number_at,
    shuffle,
    spread,
    vector_at,
    vector_of,
)
from mptbook.infer.vectors import BYTES, FLOATS, WHOLE


@intrinsic(prefer_literal=True)
def zeros(typing, outputs, n_rows):
    """O times R vectors of float32 zeros; `n_rows` is R, a constant."""
    of_output = types.UniTuple(FLOATS, n_rows.literal_value)
    return types.UniTuple(of_output, outputs.count)(outputs, n_rows), _emit_zeros


@intrinsic
def whole_zeros(typing, sums):
    """As many vectors of int32 zeros as `sums` has."""
    return types.UniTuple(types.UniTuple(WHOLE, sums.dtype.count), sums.count)(sums), _emit_zeros


def _emit_zeros(context, builder, signature, args):
    return context.get_constant_null(signature.return_type)


def _vectors(builder, sums):
    """A tuple of tuples as lists of lists."""
    outputs = cgutils.unpack_tuple(builder, sums)
    return [[*cgutils.unpack_tuple(builder, each)] for each in outputs]


def _sums(context, builder, kind, found):
    """Lists of lists as a tuple of tuples."""
    rows = [context.make_tuple(builder, kind.dtype, each) for each in found]
    return context.make_tuple(builder, kind, rows)


def _add(builder, sums, weights, place):
    """Products of a vector of weights for each output and one for each row, which lie at a place
    one after the other. For twelve multiplications seven vectors are loaded; one output of one row
    would take two for one."""
    add, number = (add_whole, I16) if weights[0].type.element == I16 else (add_floats, F32)
    for k in range(len(sums[0])):
        at = builder.add(place, I64(k * REGISTER))
        x = vector_at(builder, at, number, weights[0].type.count)
        for output, weight in zip(sums, weights, strict=True):
            output[k] = add(builder, output[k], weight, x)


@intrinsic
def add_products(typing, sums, weights, x, at):
    """Products added to sums: of the weights of each output and the inputs of each row.

    Args:
        sums: O times R vectors, of float32 or int32.
        weights: O vectors, of float32 or int16.
        x: one-dimensional, of float32 or int16 likewise; R vectors from `at` on.
    """

    def emit(context, builder, signature, args):
        found = _vectors(builder, args[0])
        at, kinds = [args[3]], [signature.args[3]]
        place = address_of(context, builder, signature, args, 2, at, kinds)
        _add(builder, found, cgutils.unpack_tuple(builder, args[1]), place)
        return _sums(context, builder, signature.return_type, found)

    return sums(sums, weights, x, at), emit


@intrinsic
def add_group(typing, sums, array, scale, rows, group, x, at):
    """Products added to sums: of 64 weights of 4 bits for each output, times their scale.

    A lane of a loaded vector has `BYTES` bytes. First come the low halves of the first byte of
    each lane, then their high halves, and so on for the other byte: x has its inputs in this order.

    Args:
        sums: O times R vectors of float32.
        array: of uint8, each half 8 more than its weight, from array[row, group] on.
        scale: of float32, scale[row, group].
        rows: O of them.
        x: one-dimensional, of int16; 64 for each of R rows from `at` on.
    """

    def emit(context, builder, signature, args):
        found = _vectors(builder, args[0])
        place = partial(address_of, context, builder, signature, args)
        index, kind = args[4], signature.args[4]
        x_at = place(5, [args[6]], [signature.args[6]])
        # One output after the other: all at once are more vectors than there are registers.
        for output, row in zip(found, cgutils.unpack_tuple(builder, args[3]), strict=True):
            at = place(1, [row, index, I64(0)], [types.intp, kind, types.intp])
            lanes = vector_at(builder, at, ir.IntType(8 * BYTES), PAIRS)
            lanes = lanes if BYTES == 2 else builder.zext(lanes, vector_of(I16, PAIRS))
            whole = [constant(I32, 0, LANES) for _ in output]
            for n in range(2 * BYTES):
                half = builder.lshr(lanes, constant(I16, 4 * n, PAIRS))
                half = builder.and_(half, constant(I16, 15, PAIRS))
                weights = [builder.sub(half, constant(I16, 8, PAIRS))]
                _add(builder, [whole], weights, builder.add(x_at, I64(n * len(output) * REGISTER)))
            at = place(2, [row, index], [types.intp, kind])
            _add_scaled(builder, output, whole, number_at(builder, at, F32))
        return _sums(context, builder, signature.return_type, found)

    return sums(sums, array, scale, rows, group, x, at), emit


@intrinsic
def add_scaled(typing, sums, whole, scales):
    """sums + whole * scale, for each output its scale.

    Args:
        sums: O times R vectors of float32.
        whole: O times R vectors of int32.
        scales: O numbers of float32.
    """

    def emit(context, builder, signature, args):
        found = _vectors(builder, args[0])
        numbers = _vectors(builder, args[1])
        factors = cgutils.unpack_tuple(builder, args[2])
        for output, of_output, scale in zip(found, numbers, factors, strict=True):
            _add_scaled(builder, output, of_output, scale)
        return _sums(context, builder, signature.return_type, found)

    return sums(sums, whole, scales), emit


def _add_scaled(builder, sums, whole, scale):
    """Whole numbers times a scale, added to the sums of one output."""
    factor = spread(builder, scale)
    for k, each in enumerate(whole):
        floats = builder.sitofp(each, vector_of(F32, LANES))
        sums[k] = add_floats(builder, sums[k], floats, factor)


@intrinsic
def add_outer(typing, sums, columns, at, rows, step):
    """What one step of a product of matrices adds to sums, for R rows and O * `LANES` columns.

    Args:
        sums: O times R vectors of float32.
        columns: (steps, columns) float32, or uint32, of two bfloat16 whose products are added.
        at: the first of the columns.
        rows: (R, steps) likewise.
        step: which.
    """

    def emit(context, builder, signature, args):
        add, number = (add_floats, F32) if rows.dtype == types.float32 else (add_pairs, I32)
        found = _vectors(builder, args[0])
        at, kinds = [args[4], args[2]], [signature.args[4], signature.args[2]]
        place = address_of(context, builder, signature, args, 1, at, kinds)
        of_outputs = [builder.add(place, I64(o * REGISTER)) for o in range(sums.count)]
        loaded = [vector_at(builder, each, number, LANES) for each in of_outputs]
        for k in range(sums.dtype.count):
            at, kinds = [I64(k), args[4]], [types.intp, signature.args[4]]
            place = address_of(context, builder, signature, args, 3, at, kinds)
            x = spread(builder, number_at(builder, place, number))
            for output, column in zip(found, loaded, strict=True):
                output[k] = add(builder, output[k], column, x)
        return _sums(context, builder, signature.return_type, found)

    return sums(sums, columns, at, rows, step), emit


@intrinsic
def put(typing, sums, array, column):
    """Store vectors: those of row k to array[k], from a column on, one output after the other.

    Args:
        array: of float32.
    """

    def emit(context, builder, signature, args):
        for o, output in enumerate(_vectors(builder, args[0])):
            for k, each in enumerate(output):
                at, kinds = [I64(k), args[2]], [types.intp, signature.args[2]]
                place = address_of(context, builder, signature, args, 1, at, kinds)
                place = builder.add(place, I64(o * REGISTER))
                builder.store(each, builder.inttoptr(place, each.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(sums, array, column), emit


@intrinsic
def add_up(typing, sums):
    """The sum of each vector, as R times O numbers: of all outputs of the first row, and so on.

    Four at a time: neighbours are added until each lane has a sum, which takes a fourth of the
    instructions that adding up one vector after the other would.
    """

    def emit(context, builder, signature, args):
        found = []
        for of_row in zip(*_vectors(builder, args[0]), strict=True):
            a, b, c, d = (*of_row, *of_row[-1:] * (4 - sums.count))
            ab, cd = add_neighbours(builder, a, b, 1), add_neighbours(builder, c, d, 1)
            total, size = add_neighbours(builder, ab, cd, 2), LANES
            while size > 4:
                size //= 2
                upper = shuffle(builder, total, total, range(size, 2 * size))
                total = builder.fadd(shuffle(builder, total, total, range(size)), upper)
            found += [builder.extract_element(total, I32(lane)) for lane in range(sums.count)]
        return context.make_tuple(builder, signature.return_type, found)

    numbers = types.UniTuple(types.float32, sums.count * sums.dtype.count)
    return numbers(sums), emit
