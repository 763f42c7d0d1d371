"""Attention of many tokens at once, on a CPU, in FlashAttention's order.

A few queries meet a tile of keys; their scores, the exponentials and the weighted values stay in
the caches next to the processor. PyTorch's products write the scores of all queries to memory,
and come back for them three times.

Dimensions in this file
    N   texts
    R   tokens of all of them, one text after the other
    Q   tokens of one text
    T   tokens before and of one text
    H   query heads;  G  key and value heads, a divisor of H
    K   width of a head
    C   K and as many zeros as make it a multiple of `COLUMNS`

Source: Dao et al., arXiv:2205.14135, algorithm 1.
"""

import numpy as np
from numba import float32, int32, njit, prange

from mptbook.infer.compiled import COMPILED, INLINE, PARALLEL, narrow
from mptbook.infer.elementwise import exponential
from mptbook.infer.steps import (
    COLUMNS,
    ROWS,
    pack_keys,
    pack_query,
    pack_values,
    product,
    room,
    steps,
)
from mptbook.infer.sums import put

KEYS = 512  # of a tile


@njit(**PARALLEL)
def attend_texts(qkv, cache, layer, spans, slopes, windows, shape, out):
    """Attention of the tokens of some texts to what their slots hold, themselves included.

    Args:
        qkv: (R, ...) float32, or uint16, the bits of bfloat16; the queries come first.
        cache: a `mptbook.infer.decode.Cache`, with the keys and values of these tokens too; not of
            float32 if qkv is not.
        spans: (N, 4) int64: the first row of a text, its slot, how many tokens this held before,
            and Q.
        windows: (G,) int64, keys that a head needs at most.
        shape: a `mptbook.infer.decode.Shape`.
        out: (R, H * K) like qkv, written.
    """
    copies = shape.n_heads // shape.kv_heads
    for item in prange(len(spans) * shape.n_heads):
        head = item % shape.n_heads
        row, slot, before, size = spans[item // shape.n_heads]
        shared = head // copies
        at, end = (layer, slot, shared), before + size
        attend_head(
            qkv[row : row + size],
            cache.keys[at][:end],
            cache.values[at][:end],
            scales(cache.key_scale, at, end),
            scales(cache.value_scale, at, end),
            head * shape.width,
            float32(shape.scale),
            slopes[head],
            windows[shared],
            out[row : row + size],
        )


@njit(**INLINE)
def scales(kept, at, end):
    """Those of the first tokens of a head, or none."""
    return kept[at][:end] if kept.size else np.empty(0, np.float32)


@njit(**COMPILED)
def attend_head(qkv, keys, values, key_scale, value_scale, first, scale, slope, window, out):
    """One head of one text.

    Args:
        qkv: (Q, ...), queries from column `first` on.
        keys, values: (T, K), of which the last Q are the text's own.
        key_scale, value_scale: (T,) float32, or of no elements.
        out: (Q, H * K), written from the same column on.
    """
    (end, width), size = keys.shape, len(qkv)
    before = end - size
    padded = (width + COLUMNS - 1) // COLUMNS * COLUMNS
    mixed = np.zeros((size, padded), np.float32)  # values, each times its exponential
    total = np.zeros(size, np.float32)  # of the exponentials
    most = np.full(size, -np.inf, np.float32)  # the largest score so far
    queries = room(ROWS, steps(width, qkv), qkv)
    key_columns = room(steps(width, qkv), KEYS, qkv)
    shares = room(ROWS, steps(KEYS, qkv), qkv)
    value_columns = room(steps(KEYS, qkv), padded, qkv)
    scores = np.empty((ROWS, KEYS), np.float32)
    found = np.empty((ROWS, padded), np.float32)
    bits, numbers = scores.view(np.int32), shares.view(qkv.dtype)
    distance = np.arange(KEYS).astype(np.float32)
    for tile in range(max(0, before + 1 - window) // KEYS * KEYS, end, KEYS):
        stop = min(tile + KEYS, end)
        pack_keys(keys[tile:stop], key_columns)
        pack_values(values[tile:stop], value_columns)
        for start in range(max(0, tile - before), min(size, stop + window - before), ROWS):
            n_queries = min(ROWS, size - start)
            n_keys = min(stop, before + start + n_queries) - tile  # that one of them sees
            for k in range(n_queries):
                pack_query(qkv[start + k, first : first + width], queries[k])
            for j in range(0, n_keys, COLUMNS):
                put(product(queries, key_columns, j, steps(width, qkv)), scores, j)
            for k in range(n_queries):
                i = start + k
                seen = min(n_keys, before + i + 1 - tile)
                numbers[k, max(seen, 0) : n_keys + n_keys % 2] = 0
                if seen > 0:
                    multiply(scores, k, seen, key_scale, tile)
                    offset = float32(tile - before - i)
                    add_bias(scores, k, seen, scale, slope, offset, distance)
                    new = max(most[i], largest(bits, k, seen))
                    factor = exponential(most[i] - new)
                    total[i] = total[i] * factor + exponentials(scores, k, seen, new)
                    for d in range(padded):
                        mixed[i, d] *= factor
                    most[i] = new
                    multiply(scores, k, seen, value_scale, tile)
                    for j in range(seen):
                        numbers[k, j] = narrow(scores[k, j], numbers)
            for d in range(0, padded, COLUMNS):
                put(product(shares, value_columns, d, steps(n_keys, qkv)), found, d)
            for k in range(n_queries):
                for d in range(padded):
                    mixed[start + k, d] += found[k, d]
    for i in range(size):
        write(mixed, i, float32(1) / total[i], out[i, first : first + width])


@njit(**INLINE)
def multiply(scores, k, n, scales, tile):
    """The numbers of a query with the scale of each key or value, where they have one."""
    if scales.size:
        for j in range(n):
            scores[k, j] *= scales[tile + j]


@njit(**INLINE)
def add_bias(scores, k, n, scale, slope, offset, distance):
    """Scale the scores of a query, and add ALiBi's bias."""
    for j in range(n):
        scores[k, j] = scores[k, j] * scale + slope * (offset + distance[j])


@njit(**INLINE)
def largest(bits, k, n):
    """The largest of n float32, of which `bits` are the bits.

    As whole numbers of the same order: the compiler takes many of them at a time, and of float32
    one after the other, because one may be NaN.
    """
    most = int32(-(2**31))
    for j in range(n):
        each = bits[k, j]
        most = max(most, int32(each ^ ((each >> int32(31)) & int32(0x7FFFFFFF))))
    return np.int32(most ^ ((most >> int32(31)) & int32(0x7FFFFFFF))).view(np.float32)


@njit(**INLINE)
def exponentials(scores, k, n, most):
    """exp(score - most) of the scores of a query, in place; their sum is returned."""
    total = float32(0)
    for j in range(n):
        scores[k, j] = exponential(scores[k, j] - most)
        total += scores[k, j]
    return total


@njit(**INLINE)
def write(mixed, i, factor, out):
    for d in range(len(out)):
        out[d] = narrow(mixed[i, d] * factor, out)
