"""Vectors of numbers for compiled loops, as wide as the processor's registers.

Numba compiles a loop over numbers one by one, and LLVM makes vectors of it where it sees how. So
loops over weights can be written, but for several rows LLVM's vectors take twice the time of
these (measured). Here a loop says itself which vectors it holds. A function below stands for the
few instructions of LLVM's own language that its first line says; LLVM finds the processor's
instructions for them, whatever processor it is.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.errors import TypingError
from numba.extending import intrinsic

from mptbook.infer.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    REGISTER,
    address,
    address_of,
    addresses,
    constant,
    number_at,
    vector_at,
    vector_of,
)

LINE = 64  # bytes that memory serves at a time
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
def load(typing, array, rows, column):
    """A vector from array[row, column] on, for each of some rows.

    Args:
        array: of float32, or of uint16, the bits of bfloat16: `LANES` numbers as float32. Or of
            int8: `PAIRS` numbers as int16.
    """
    if array.dtype not in (types.float32, types.uint16, types.int8):
        raise TypingError(f"{array}: vectors are of float32, of bfloat16's bits, or of int8")
    kind = SHORT if array.dtype == types.int8 else FLOATS

    def vector(builder, place):
        if array.dtype == types.float32:
            return vector_at(builder, place, F32, LANES)
        if array.dtype == types.int8:
            return builder.sext(vector_at(builder, place, I8, PAIRS), vector_of(I16, PAIRS))
        # bfloat16 is the upper half of a float32.
        wide = builder.zext(vector_at(builder, place, I16, LANES), vector_of(I32, LANES))
        return builder.bitcast(builder.shl(wide, constant(I32, 16, LANES)), vector_of(F32, LANES))

    def emit(context, builder, signature, args):
        places = addresses(context, builder, signature, args, 0)
        found = [vector(builder, place) for place in places]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(kind, rows.count)(array, rows, column), emit


@intrinsic
def gather(typing, array, rows, column):
    """array[row, column] of float32, for each of some rows."""

    def emit(context, builder, signature, args):
        places = addresses(context, builder, signature, args, 0)
        found = [number_at(builder, place, F32) for place in places]
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.float32, rows.count)(array, rows, column), emit


@intrinsic
def copy(typing, array, row, column, target, at):
    """Copy a register of numbers, from array[row, column] on, to target[at] and after it.

    A loop over so few numbers would take ten times as long as the copy (measured).
    """

    def emit(context, builder, signature, args):
        kinds = signature.args
        source = address_of(context, builder, signature, args, 0, args[1:3], kinds[1:3])
        place = address_of(context, builder, signature, args, 3, args[4:], kinds[4:])
        found = vector_at(builder, source, I8, REGISTER)
        builder.store(found, builder.inttoptr(place, found.type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, row, column, target, at), emit


@intrinsic
def ask(typing, array, at):
    """Ask memory for array[at] and its neighbours, `LINE` bytes, which goes on while we compute."""

    def emit(context, builder, signature, args):
        return _ask(context, builder, address(context, builder, signature, args, 0))

    return types.void(array, at), emit


@intrinsic
def ask_ahead(typing, array, at):
    """Ask memory for what is `AHEAD` bytes after array[at].

    The processor foresees by itself what a loop will read, but not while the loop goes over the
    same weights again for further rows; memory would stand still.
    """

    def emit(context, builder, signature, args):
        place = address(context, builder, signature, args, 0)
        return _ask(context, builder, builder.add(place, I64(AHEAD)))

    return types.void(array, at), emit


def _ask(context, builder, place):
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To read, to keep as near as can be, as data.
    builder.call(prefetch, [builder.inttoptr(place, pointer), I32(0), I32(3), I32(1)])
    return context.get_dummy_value()


@intrinsic
def outputs_at(typing, i, n_outputs, of):
    """Output i of each part of all, of as many parts as `of` has elements.

    Where outputs are no multiple of that, the last of all stands for those that a part lacks.
    """

    def emit(context, builder, signature, args):
        first, total = (
            context.cast(builder, each, kind, types.intp)
            for each, kind in zip(args[:2], (i, n_outputs), strict=True)
        )
        part = builder.udiv(builder.add(total, I64(of.count - 1)), I64(of.count))
        last, found = builder.sub(total, I64(1)), []
        for n in range(of.count):
            output = builder.add(first, builder.mul(part, I64(n)))
            beyond = builder.icmp_signed(">", output, last)
            found.append(builder.select(beyond, last, output))
        return context.make_tuple(builder, signature.return_type, found)

    return types.UniTuple(types.intp, of.count)(i, n_outputs, of), emit
