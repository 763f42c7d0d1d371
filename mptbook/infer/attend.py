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
from mptbook.infer.elementwise import exponential, exponentials
from mptbook.infer.steps import COLUMNS, ROWS, pack, product, room, steps
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
    numbers = shares.view(qkv.dtype)
    distance = np.arange(KEYS).astype(np.float32)
    for tile in range(max(0, before + 1 - window) // KEYS * KEYS, end, KEYS):
        stop = min(tile + KEYS, end)
        pack(keys[tile:stop].T, key_columns)
        pack(values[tile:stop], value_columns)
        for start in range(max(0, tile - before), min(size, stop + window - before), ROWS):
            n_queries = min(ROWS, size - start)
            n_keys = min(stop, before + start + n_queries) - tile  # that one of them sees
            pack(qkv[start : start + n_queries, first : first + width].T, queries.T)
            for j in range(0, n_keys, COLUMNS):
                put(product(queries, key_columns, j, steps(width, qkv)), scores, j)
            for k in range(n_queries):
                i = start + k
                seen = max(0, min(n_keys, before + i + 1 - tile))
                numbers[k, seen : n_keys + n_keys % 2] = 0
                if seen:
                    part = scores[k, :seen]
                    multiply(part, key_scale[tile : tile + seen])
                    add_bias(part, scale, slope, float32(tile - before - i), distance)
                    new = max(most[i], largest(part.view(np.int32)))
                    factor = exponential(most[i] - new)
                    total[i] = total[i] * factor + exponentials(part, new)
                    for d in range(padded):
                        mixed[i, d] *= factor
                    most[i] = new
                    multiply(part, value_scale[tile : tile + seen])
                    for j in range(seen):
                        numbers[k, j] = narrow(part[j], numbers)
            for d in range(0, padded, COLUMNS):
                put(product(shares, value_columns, d, steps(n_keys, qkv)), found, d)
            for k in range(n_queries):
                for d in range(padded):
                    mixed[start + k, d] += found[k, d]
    for i in range(size):
        write(mixed, i, float32(1) / total[i], out[i, first : first + width])


@njit(**INLINE)
def multiply(scores, scales):
    """Each score with the scale of its key or value, where they have one."""
    if scales.size:
        for j in range(len(scores)):
            scores[j] *= scales[j]


@njit(**INLINE)
def add_bias(scores, scale, slope, offset, distance):
    """Scale the scores of a query, and add ALiBi's bias."""
    for j in range(len(scores)):
        scores[j] = scores[j] * scale + slope * (offset + distance[j])


@njit(**INLINE)
def largest(bits):
    """The largest of some float32, of which these are the bits.

    As whole numbers of the same order: the compiler takes many of them at a time, and of float32
    one after the other, because one may be NaN.
    """
    most = int32(-(2**31))
    for j in range(len(bits)):
        each = bits[j]
        most = max(most, int32(each ^ ((each >> int32(31)) & int32(0x7FFFFFFF))))
    return np.int32(most ^ ((most >> int32(31)) & int32(0x7FFFFFFF))).view(np.float32)


@njit(**INLINE)
def write(mixed, i, factor, out):
    for d in range(len(out)):
        out[d] = narrow(mixed[i, d] * factor, out)
