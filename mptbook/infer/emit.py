"""LLVM's instructions for numbers in registers, as `mptbook.infer.vectors` puts them together."""

from collections.abc import Iterable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.core.registry import cpu_target

_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]
LANES = 16 if "+avx512bw" in _FEATURES else 8  # numbers of 32 bits in a register
PAIRS = 2 * LANES  # numbers of 16 bits
I8, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())


def add_floats(builder, total, x, y):
    """total + x * y, rounded once."""
    kind = ir.FunctionType(total.type, [total.type] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
    return builder.call(fma, [x, y, total])


def add_whole(builder, total, x, y):
    """Each number of `total` and the products of two neighbours of x and y.

    Processors have one instruction for this, or two, and LLVM knows it in this form.
    """
    wide = vector_of(I32, PAIRS)
    products = builder.mul(builder.sext(x, wide), builder.sext(y, wide))
    even = shuffle(builder, products, products, range(0, PAIRS, 2))
    odd = shuffle(builder, products, products, range(1, PAIRS, 2))
    return builder.add(total, builder.add(even, odd))


def add_neighbours(builder, x, y, size):
    """Neighbouring runs of `size` lanes added, those of x and those of y in turn."""
    left = []
    for start in range(0, LANES, 2 * size):
        left += [*range(start, start + size), *range(LANES + start, LANES + start + size)]
    right = [lane + size for lane in left]
    return builder.fadd(shuffle(builder, x, y, left), shuffle(builder, x, y, right))


def vector_of(number: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(number, n)


def constant(number: ir.Type, value: int, n: int) -> ir.Constant:
    return ir.Constant(vector_of(number, n), [value] * n)


def shuffle(builder, x, y, lanes: Iterable[int]):
    chosen = [*lanes]
    return builder.shuffle_vector(x, y, ir.Constant(vector_of(I32, len(chosen)), chosen))


def spread(builder, number):
    """The same number in all lanes."""
    empty = ir.Constant(vector_of(number.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, number, I32(0))
    return shuffle(builder, one, empty, [0] * LANES)


def number_at(builder, place, kind: ir.Type):
    """The one number at an address."""
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=4)


def vector_at(builder, place, number: ir.Type, n: int):
    """n numbers from an address on, which need not be a multiple of anything."""
    align = 4 if number is F32 else number.width // 8
    return builder.load(builder.inttoptr(place, vector_of(number, n).as_pointer()), align=align)


def address(context, builder, signature, args, n):
    """Of array[at], which are argument n and the one after it."""
    at = cgutils.unpack_tuple(builder, args[n + 1])
    whole = [
        context.cast(builder, each, kind, types.intp)
        for each, kind in zip(at, signature.args[n + 1], strict=True)
    ]
    return address_of(context, builder, signature, args, n, whole)


def addresses(context, builder, signature, args, n, n_rows):
    """Addresses of array[row + k, column] for each k; arguments n, n + 1 and n + 2."""
    row, column = (
        context.cast(builder, args[i], signature.args[i], types.intp) for i in (n + 1, n + 2)
    )
    for k in range(n_rows):
        at = [builder.add(row, I64(k)), column]
        yield address_of(context, builder, signature, args, n, at)


def address_of(context, builder, signature, args, n, at):
    """Of array[at], which is argument n; numbers of a vector lie side by side."""
    kind = signature.args[n]
    if kind.layout != "C":
        raise TypingError(f"{kind}: vectors are loaded from arrays whose numbers are neighbours")
    array = context.make_array(kind)(context, builder, args[n])
    place = builder.ptrtoint(array.data, I64)
    for index, stride in zip(at, cgutils.unpack_tuple(builder, array.strides), strict=True):
        place = builder.add(place, builder.mul(index, stride))
    return place
