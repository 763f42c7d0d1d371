"""Texts read at once, on a CPU: PyTorch's products, and compiled loops for all between them.

The same function as `MPT.hidden`. There, eager PyTorch writes what lies between two products to
memory some five times, and attention three times more: for 512 tokens of a small model a third of
the whole.

Dimensions in this file
    N   texts
    R   tokens of all of them, one text after the other
    D   width of the residual stream
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from mptbook.infer.attend import attend_texts
from mptbook.infer.compiled import PARALLEL, pytorchs_threads, widen
from mptbook.infer.decode import Cache, Decoder, Shape, append
from mptbook.infer.elementwise import Norm, gelu, normalise
from mptbook.infer.linear import bits_of


def read(
    decoder: Decoder,
    cache: Cache,
    slots: Sequence[int],
    lengths: Sequence[int],
    texts: Sequence[Sequence[int]],
    dtype: torch.dtype,
    every: bool = False,
) -> Tensor:
    """The output of the last norm after texts that go on with what some slots hold.

    Args:
        decoder: of a model whose weights are packed, or float32 where `dtype` is.
        cache: extended by the keys and values of the texts; not of float32 unless `dtype` is.
        slots: (N,), no one twice.
        lengths: (N,) tokens that each holds before.
        texts: ids of each, at least one.
        dtype: of products, float32 or bfloat16; the residual stream is float32.
        every: after each of the tokens, not only after the last of each text. What only the
            others need is not computed: most of the last layer's work.

    Returns:
        (N, D) float32, or (R, D).

    Raises:
        ValueError: see `Decoder.check`.
    """
    ids = [token for text in texts for token in text]
    decoder.check(ids)
    transformer, shape = decoder.model.transformer, decoder.shape
    inner = shape.n_heads * shape.width
    sizes = np.array([len(text) for text in texts])
    ends = np.cumsum(sizes)
    whole = np.stack([ends - sizes, slots, lengths, sizes], axis=1)
    last = np.stack([ends - 1, slots, lengths + sizes - 1, np.ones_like(sizes)], axis=1)
    slot_of_row = np.repeat(slots, sizes)
    place = np.arange(ends[-1]) + np.repeat(lengths - whole[:, 0], sizes)
    x = transformer.wte(torch.tensor(ids)).float()
    if decoder.model.config.has_positions:
        x = x + transformer.wpe(torch.from_numpy(place)).float()
    with pytorchs_threads():
        for number, block in enumerate(transformer.blocks):
            layer = decoder.layers[number]
            chosen = not every and number + 1 == len(decoder.layers)
            qkv = block.attn.Wqkv(normed(layer.norm_1, shape, x, dtype))
            if shape.clip < np.inf:
                qkv.clamp_(-shape.clip, shape.clip)
            if layer.q_ln.gain.size:
                q, k, _ = qkv.split(block.attn.splits, dim=1)
                normalise_rows(layer.q_ln, shape.eps, shape.rms, bits_of(q), bits_of(q))
                normalise_rows(layer.k_ln, shape.eps, shape.rms, bits_of(k), bits_of(k))
            append_rows(bits_of(qkv), cache, number, slot_of_row, place, shape)
            attended = x.new_empty(len(x), inner, dtype=dtype)
            spans = last if chosen else whole
            heads = decoder.slopes, layer.windows, shape
            attend_texts(bits_of(qkv), cache, number, spans, *heads, bits_of(attended))
            if chosen:
                x, attended = x[ends - 1], attended[ends - 1]
            add(x, block.attn.out_proj(attended))
            hidden = block.ffn.up_proj(normed(layer.norm_2, shape, x, dtype))
            gelu_rows(bits_of(hidden))
            add(x, block.ffn.down_proj(hidden))
        return normed(decoder.norm_f, shape, x, torch.float32)


def normed(norm: Norm, shape: Shape, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, D) of (R, D) float32."""
    y = torch.empty_like(x, dtype=dtype)
    normalise_rows(norm, shape.eps, shape.rms, x.numpy(), bits_of(y))
    return y


def add(x: Tensor, y: Tensor) -> None:
    """Add (R, D) numbers to (R, D) float32, in place."""
    add_rows(x.numpy(), bits_of(y))


@njit(**PARALLEL)
def normalise_rows(norm, eps, rms, x, y):
    for r in prange(len(x)):
        normalise(norm, eps, rms, x[r : r + 1], y[r : r + 1])


@njit(**PARALLEL)
def gelu_rows(y):
    for r in prange(len(y)):
        gelu(y[r])


@njit(**PARALLEL)
def add_rows(x, y):
    for r in prange(len(x)):
        for j in range(x.shape[1]):
            x[r, j] += widen(y[r, j])


@njit(**PARALLEL)
def append_rows(qkv, cache, layer, slots, lengths, shape):
    for r in prange(len(qkv)):
        row = slice(r, r + 1)
        append(qkv[row], cache, layer, slots[row], lengths[row], shape)
