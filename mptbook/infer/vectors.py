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

from collections.abc import Iterable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.errors import TypingError
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]
LANES = 16 if "+avx512bw" in _FEATURES else 8  # numbers of 32 bits in a register
PAIRS = 2 * LANES  # numbers of 16 bits
AHEAD = 2048  # bytes between what is multiplied and what memory is asked for
I8, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())
HALF = 32  # bytes of a group of 64 weights of 4 bits


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
    """`LANES` numbers from array[at] on, as float32.

    Args:
        array: of float32, or of uint16, which are the bits of bfloat16.
        at: a tuple of indices.
    """

    def emit(context, builder, signature, args):
        place = _address(context, builder, signature, args, 0)
        if array.dtype == types.float32:
            return _load(builder, place, F32, LANES)
        # bfloat16 is the upper half of a float32.
        wide = builder.zext(_load(builder, place, I16, LANES), _of(I32, LANES))
        return builder.bitcast(builder.shl(wide, _all(I32, 16, LANES)), _of(F32, LANES))

    return FLOATS(array, at), emit


@intrinsic
def load_bytes(typing, array, at):
    """`PAIRS` numbers of int8 from array[at] on, as int16."""

    def emit(context, builder, signature, args):
        place = _address(context, builder, signature, args, 0)
        return builder.sext(_load(builder, place, I8, PAIRS), _of(I16, PAIRS))

    return SHORT(array, at), emit


@intrinsic
def load_nibbles(typing, array, at):
    """The 64 weights of 4 bits from array[at] on, as a tuple of vectors of int16.

    Args:
        array: of uint8; see `mptbook.infer.quantize.pack` for the order of weights.
    """

    def emit(context, builder, signature, args):
        place = _address(context, builder, signature, args, 0)
        low, high = [], []
        for start in range(0, HALF, PAIRS):
            byte = _load(builder, builder.add(place, I64(start)), I8, PAIRS)
            wide = builder.zext(byte, _of(I16, PAIRS))
            low.append(builder.and_(wide, _all(I16, 15, PAIRS)))
            high.append(builder.lshr(wide, _all(I16, 4, PAIRS)))
        found = [builder.sub(each, _all(I16, 8, PAIRS)) for each in low + high]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(SHORT, 2 * HALF // PAIRS)(array, at), emit


@intrinsic
def ask_ahead(typing, array, at):
    """Ask memory for what is `AHEAD` bytes after array[at], which goes on while we multiply.

    The processor foresees by itself what a loop will read, but not while the loop goes over the
    same weights again for further rows; memory would stand still.
    """

    def emit(context, builder, signature, args):
        place = builder.add(_address(context, builder, signature, args, 0), I64(AHEAD))
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
        add = _add_float_products if weights == FLOATS else _add_whole_products
        number = F32 if weights == FLOATS else I16
        places = _rows(context, builder, signature, args, 2, sums.count)
        found = [
            add(builder, each, args[1], _load(builder, place, number, weights.n))
            for each, place in zip(cgutils.unpack_tuple(builder, args[0]), places, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, found)

    return sums(sums, weights, x, row, column), emit


@intrinsic
def add_scaled(typing, sums, whole, scale, unit, row, column):
    """sums[k] + scale * unit[row + k, column] * whole[k] for each k below R.

    Args:
        sums: R vectors of float32.
        whole: R vectors of int32.
        scale: float32.
        unit: two-dimensional, of float32.
    """

    def emit(context, builder, signature, args):
        places = _rows(context, builder, signature, args, 3, sums.count)
        vectors = (cgutils.unpack_tuple(builder, each) for each in args[:2])
        found = []
        for total, numbers, place in zip(*vectors, places, strict=True):
            factor = builder.load(builder.inttoptr(place, F32.as_pointer()), align=4)
            factor = _spread(builder, builder.fmul(factor, args[2]))
            numbers = builder.sitofp(numbers, _of(F32, LANES))
            found.append(_add_float_products(builder, total, numbers, factor))
        return context.make_tuple(builder, signature.return_type, found)

    return sums(sums, whole, scale, unit, row, column), emit


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
            ab, cd = _add_pairs(builder, of_a, of_b, 1), _add_pairs(builder, of_c, of_d, 1)
            total, size = _add_pairs(builder, ab, cd, 2), LANES
            while size > 4:
                size //= 2
                upper = _shuffle(builder, total, total, range(size, 2 * size))
                total = builder.fadd(_shuffle(builder, total, total, range(size)), upper)
            found += [builder.extract_element(total, I32(lane)) for lane in range(4)]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float32, 4 * a.count)(a, b, c, d), emit


def _add_float_products(builder, total, x, y):
    """total + x * y, rounded once."""
    kind = ir.FunctionType(total.type, [total.type] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(fma, [x, y, total])


def _add_whole_products(builder, total, x, y):
    """Each number of `total` and the products of two neighbours of x and y.

    Processors have one instruction for this, or two, and LLVM knows it in this form.
    """
    wide = _of(I32, PAIRS)
    products = builder.mul(builder.sext(x, wide), builder.sext(y, wide))
    even = _shuffle(builder, products, products, range(0, PAIRS, 2))
    odd = _shuffle(builder, products, products, range(1, PAIRS, 2))
    return builder.add(total, builder.add(even, odd))


def _add_pairs(builder, x, y, size):
    """Neighbouring runs of `size` lanes added, those of x and those of y in turn."""
    left = []
    for start in range(0, LANES, 2 * size):
        left += [*range(start, start + size), *range(LANES + start, LANES + start + size)]
    right = [lane + size for lane in left]
    return builder.fadd(_shuffle(builder, x, y, left), _shuffle(builder, x, y, right))


def _of(number: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(number, n)


def _all(number: ir.Type, value: int, n: int) -> ir.Constant:
    return ir.Constant(_of(number, n), [value] * n)


def _shuffle(builder, x, y, lanes: Iterable[int]):
    chosen = [*lanes]
    return builder.shuffle_vector(x, y, ir.Constant(_of(I32, len(chosen)), chosen))


def _spread(builder, number):
    """The same number in all lanes."""
    empty = ir.Constant(_of(number.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, number, I32(0))
    return _shuffle(builder, one, empty, [0] * LANES)


def _load(builder, place, number: ir.Type, n: int):
    """n numbers from an address on, which need not be a multiple of anything."""
    align = 4 if number is F32 else number.width // 8
    return builder.load(builder.inttoptr(place, _of(number, n).as_pointer()), align=align)


def _address(context, builder, signature, args, n):
    """Of array[at], which are argument n and the one after it."""
    at = cgutils.unpack_tuple(builder, args[n + 1])
    whole = [
        context.cast(builder, each, kind, types.intp)
        for each, kind in zip(at, signature.args[n + 1], strict=True)
    ]
    return _place(context, builder, signature, args, n, whole)


def _rows(context, builder, signature, args, n, n_rows):
    """Addresses of array[row + k, column] for each k; arguments n, n + 1 and n + 2."""
    row, column = (
        context.cast(builder, args[i], signature.args[i], types.intp) for i in (n + 1, n + 2)
    )
    for k in range(n_rows):
        at = [builder.add(row, I64(k)), column]
        yield _place(context, builder, signature, args, n, at)


def _place(context, builder, signature, args, n, at):
    kind = signature.args[n]
    if kind.layout != "C":
        raise TypingError(f"{kind}: vectors are loaded from arrays whose numbers are neighbours")
    array = context.make_array(kind)(context, builder, args[n])
    place = builder.ptrtoint(array.data, I64)
    for index, stride in zip(at, cgutils.unpack_tuple(builder, array.strides), strict=True):
        place = builder.add(place, builder.mul(index, stride))
    return place
