"""Many layers of one shape as the first of them and a table of where the others lie.

Handing an array to compiled code takes longer than multiplying a short one, and a model has some
hundreds of them. So the code is handed the arrays of one layer, and addresses.

Dimensions in this file
    L   layers
    P   arrays of a layer
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mptbook.infer.emit import I64, number_at


def places_of(layers: Sequence[tuple]) -> np.ndarray:
    """(L, P) int64, the addresses of all arrays of some layers, for `layer_at`.

    Args:
        layers: tuples of arrays and of such tuples, of the same dtypes, shapes and strides in
            each. Whoever uses the addresses has to keep them.
    """
    return np.array([[array.ctypes.data for array in _arrays(layer)] for layer in layers])


def _arrays(parts: tuple) -> Iterator[np.ndarray]:
    for part in parts:
        if isinstance(part, np.ndarray):
            yield part
        else:
            yield from _arrays(part)


@intrinsic
def layer_at(typing, first, places, number):
    """A layer like `first`, whose arrays lie at places[number]."""

    def emit(context, builder, signature, args):
        table = context.make_array(places)(context, builder, args[1])
        stride, _ = cgutils.unpack_tuple(builder, table.strides)
        row = builder.mul(context.cast(builder, args[2], number, types.intp), stride)
        row = builder.add(builder.ptrtoint(table.data, I64), row)
        column = count()

        def moved(kind, value):
            if isinstance(kind, types.BaseTuple):
                parts = zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
                return context.make_tuple(builder, kind, [moved(*part) for part in parts])
            array = context.make_array(kind)(context, builder, value)
            place = number_at(builder, builder.add(row, I64(8 * next(column))), I64)
            array.data = builder.inttoptr(place, array.data.type)
            # Nobody counts who uses it: it is not the compiled code's.
            array.meminfo = cgutils.get_null_value(array.meminfo.type)
            array.parent = cgutils.get_null_value(array.parent.type)
            return array._getvalue()

        return moved(first, args[0])

    return first(first, places, number), emit
