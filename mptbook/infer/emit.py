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
REGISTER = 4 * LANES  # bytes
BF16_UNITS = LANES == 16 and "+avx512bf16" in _FEATURES
I8, I16, I32, I64, F32 = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())


class _BFloat16(ir.Type):
    """LLVM's type of a bfloat16, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash("bfloat")


BF16 = _BFloat16()


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


def add_pairs(builder, total, x, y):
    """Each number of `total`, and both products of two bfloat16 of x with two of y."""
    pairs = vector_of(BF16, PAIRS)
    kind = ir.FunctionType(total.type, [total.type, pairs, pairs])
    name = f"llvm.x86.avx512bf16.dpbf16ps.{8 * REGISTER}"
    dot = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(dot, [total, builder.bitcast(x, pairs), builder.bitcast(y, pairs)])


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
    return address_of(context, builder, signature, args, n, at, signature.args[n + 1])


def addresses(context, builder, signature, args, n):
    """Of array[row, column] for each of some rows; arguments n, n + 1 and n + 2."""
    column, kind = args[n + 2], signature.args[n + 2]
    for row in cgutils.unpack_tuple(builder, args[n + 1]):
        at, kinds = [row, column], [types.intp, kind]
        yield address_of(context, builder, signature, args, n, at, kinds)


def address_of(context, builder, signature, args, n, at, kinds):
    """Of array[at], which is argument n; numbers of a vector lie side by side."""
    array = signature.args[n]
    if array.layout != "C":
        raise TypingError(f"{array}: vectors are loaded from arrays whose numbers are neighbours")
    value = context.make_array(array)(context, builder, args[n])
    # The last stride is a constant, for which the processor needs no register.
    size = context.get_abi_sizeof(context.get_data_type(array.dtype))
    strides = [*cgutils.unpack_tuple(builder, value.strides)[:-1], I64(size)]
    place = builder.ptrtoint(value.data, I64)
    for index, kind, stride in zip(at, kinds, strides, strict=True):
        index = context.cast(builder, index, kind, types.intp)
        place = builder.add(place, builder.mul(index, stride))
    return place
