"""Vectors of numbers for compiled loops, as wide as the processor's registers.

Numba compiles a loop over numbers one by one, and LLVM makes vectors of it where it sees how. So
loops over weights can be written, but for several rows LLVM's vectors take twice the time of
these (measured). Here a loop says itself which vectors it holds. A function below stands for the
few instructions of LLVM's own language that its first line says; LLVM finds the processor's
instructions for them, whatever processor it is.

Several vectors go as a tuple: sums of as many rows.

Dimensions in this file
    R   rows of which a loop holds the sums
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic

from mptbook.infer.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    add_floats,
    add_neighbours,
    add_whole,
    address,
    addresses,
    constant,
    number_at,
    shuffle,
    spread,
    vector_at,
    vector_of,
)

AHEAD = 2048  # bytes between what is multiplied and what memory is asked for
HALF = 32  # bytes of a group of 64 weights of 4 bits
BYTES = HALF // PAIRS  # of such a group that go into a lane of 16 bits


class Vector(types.Type):
    """Numba's type of `n` numbers in a register."""

    def __init__(self, number: types.Type, n: int) -> None:
        self.number, self.n = number, n
        super().__init__(f"Vector({number}, {n})")


@register_default(Vector)
class VectorModel(models.PrimitiveModel):
    """A `Vector` is one of LLVM's vectors."""

    def __init__(self, manager: Any, kind: Vector) -> None:
        number = manager.lookup(kind.number).get_value_type()
        super().__init__(manager, kind, ir.VectorType(number, kind.n))


FLOATS = Vector(types.float32, LANES)
WHOLE = Vector(types.int32, LANES)
SHORT = Vector(types.int16, PAIRS)


@intrinsic
def load(typing, array, at):
    """The `PAIRS` numbers from array[at] on, as two vectors of float32.

    Args:
        array: of float32, the first half of which is the first vector; or of uint16, which are
            the bits of bfloat16, and every other number is in the first vector.
        at: a tuple of indices.
    """

    def emit(context, builder, signature, args):
        place = address(context, builder, signature, args, 0)
        if array.dtype == types.float32:
            places = place, builder.add(place, I64(4 * LANES))
            found = [vector_at(builder, each, F32, LANES) for each in places]
        else:
            # bfloat16 is the upper half of a float32. Two are loaded as one number and taken
            # apart by a shift and a mask, where one by one each would take two instructions.
            both = builder.bitcast(vector_at(builder, place, I16, PAIRS), vector_of(I32, LANES))
            bits = (
                builder.shl(both, constant(I32, 16, LANES)),
                builder.and_(both, constant(I32, 0xFFFF0000, LANES)),
            )
            found = [builder.bitcast(each, vector_of(F32, LANES)) for each in bits]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(FLOATS, 2)(array, at), emit


@intrinsic
def load_bytes(typing, array, at):
    """`PAIRS` numbers of int8 from array[at] on, as int16."""

    def emit(context, builder, signature, args):
        place = address(context, builder, signature, args, 0)
        return builder.sext(vector_at(builder, place, I8, PAIRS), vector_of(I16, PAIRS))

    return SHORT(array, at), emit


@intrinsic
def load_nibbles(typing, array, at):
    """The 64 weights of 4 bits from array[at] on, each 8 more than it is, in vectors of int16.

    A lane of a loaded vector has `BYTES` bytes; the first vector found is the low halves of the
    first byte of each lane, the second their high halves, and so on for the other byte.

    Args:
        array: of uint8; see `mptbook.infer.quantize.pack` for the order of weights.
    """

    def emit(context, builder, signature, args):
        place = address(context, builder, signature, args, 0)
        lanes = vector_at(builder, place, ir.IntType(8 * BYTES), PAIRS)
        lanes = lanes if BYTES == 2 else builder.zext(lanes, vector_of(I16, PAIRS))
        found = [
            builder.and_(builder.lshr(lanes, constant(I16, shift, PAIRS)), constant(I16, 15, PAIRS))
            for shift in range(0, 8 * BYTES, 4)
        ]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(SHORT, 2 * BYTES)(array, at), emit


@intrinsic
def ask_ahead(typing, array, at):
    """Ask memory for what is `AHEAD` bytes after array[at], which goes on while we multiply.

    The processor foresees by itself what a loop will read, but not while the loop goes over the
    same weights again for further rows; memory would stand still.
    """

    def emit(context, builder, signature, args):
        place = builder.add(address(context, builder, signature, args, 0), I64(AHEAD))
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # To read, to keep as near as can be, as data.
        builder.call(prefetch, [builder.inttoptr(place, pointer), I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(array, at), emit


@intrinsic(prefer_literal=True)
def zeros(typing, n_rows):
    """R vectors of float32 zeros; `n_rows` is R, a constant."""
    return types.UniTuple(FLOATS, n_rows.literal_value)(n_rows), _emit_zeros


@intrinsic
def whole_zeros(typing, sums):
    """As many vectors of int32 zeros as `sums` has."""
    return types.UniTuple(WHOLE, sums.count)(sums), _emit_zeros


@intrinsic
def whole_numbers(typing, sums, array, row, column):
    """As many vectors as `sums` has, whose lanes add up to array[row + k, column], int32."""

    def emit(context, builder, signature, args):
        empty = ir.Constant(vector_of(I32, LANES), [0] * LANES)
        found = [
            builder.insert_element(empty, number_at(builder, place, I32), I32(0))
            for place in addresses(context, builder, signature, args, 1, sums.count)
        ]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(WHOLE, sums.count)(sums, array, row, column), emit


def _emit_zeros(context, builder, signature, args):
    return context.get_constant_null(signature.return_type)


@intrinsic
def add_products(typing, sums, weights, x, row, column):
    """sums[k] + weights * x[row + k, column:] for each k below R.

    Args:
        sums: R vectors, of float32 or int32.
        weights: a vector, of float32 or int16.
        x: two-dimensional, of float32 or int16 likewise.
    """

    def emit(context, builder, signature, args):
        add = add_floats if weights == FLOATS else add_whole
        number = F32 if weights == FLOATS else I16
        places = addresses(context, builder, signature, args, 2, sums.count)
        found = [
            add(builder, each, args[1], vector_at(builder, place, number, weights.n))
            for each, place in zip(cgutils.unpack_tuple(builder, args[0]), places, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, found)

    return sums(sums, weights, x, row, column), emit


@intrinsic
def add_scaled(typing, sums, whole, scale):
    """sums[k] + scale * whole[k] for each k below R.

    Args:
        sums: R vectors of float32.
        whole: R vectors of int32.
        scale: float32.
    """

    def emit(context, builder, signature, args):
        factor = spread(builder, args[2])
        vectors = (cgutils.unpack_tuple(builder, each) for each in args[:2])
        found = [
            add_floats(builder, total, builder.sitofp(numbers, vector_of(F32, LANES)), factor)
            for total, numbers in zip(*vectors, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, found)

    return sums(sums, whole, scale), emit


@intrinsic
def add_up(typing, a, b, c, d):
    """The sum of each vector of four tuples: of a[0], b[0], c[0], d[0], a[1] and so on.

    Four at a time: neighbours are added until each lane has a sum, which takes a fourth of the
    instructions that adding up one vector after the other would.
    """

    def emit(context, builder, signature, args):
        found = []
        tuples = (cgutils.unpack_tuple(builder, each) for each in args)
        for of_a, of_b, of_c, of_d in zip(*tuples, strict=True):
            ab, cd = add_neighbours(builder, of_a, of_b, 1), add_neighbours(builder, of_c, of_d, 1)
            total, size = add_neighbours(builder, ab, cd, 2), LANES
            while size > 4:
                size //= 2
                upper = shuffle(builder, total, total, range(size, 2 * size))
                total = builder.fadd(shuffle(builder, total, total, range(size)), upper)
            found += [builder.extract_element(total, I32(lane)) for lane in range(4)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float32, 4 * a.count)(a, b, c, d), emit
