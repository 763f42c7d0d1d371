"""One more token for several sequences at once, on a CPU: a forward pass of few rows.

The same function as `MPT.forward` for one new token of each sequence, written out in loops that
are compiled as one. Eager PyTorch would make some thirty calls a layer, and for a small model
spend longer on them than on the weights.

Dimensions in this file
    R   rows: sequences that a token is written for
    L   layers
    S   slots of the cache, one sequence each
    H   query heads;  G  key and value heads, a divisor of H
    T   tokens that a slot has room for
    K   width of a head
    D   width of the residual stream
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numba import float32, int8, njit, prange, types
from numba.extending import overload
from torch import Tensor, nn

from mptbook.infer.compiled import COMPILED, PARALLEL, narrow, pytorchs_threads, widen
from mptbook.infer.elementwise import Norm, clip, exponentials, gelu, normalise
from mptbook.infer.embedding import add_embeddings
from mptbook.infer.kernels import multiply, product
from mptbook.infer.linear import Linear, floats, linear_of
from mptbook.infer.places import layer_at, places_of
from mptbook.infer.quantize import PackedEmbedding, PackedLinear
from mptbook.infer.vectors import LINE, ask
from mptbook.model.mpt import MPT
from mptbook.model.norms import Norm as NormModule


class Layer(NamedTuple):
    norm_1: Norm
    Wqkv: Linear
    q_ln: Norm
    k_ln: Norm
    out_proj: Linear
    norm_2: Norm
    up_proj: Linear
    down_proj: Linear
    windows: np.ndarray  # (G,) int64, keys that a head needs at most


class Cache(NamedTuple):
    """Keys and values of all layers; see `mptbook.infer.slots`."""

    keys: np.ndarray  # (L, S, G, T, K) float32, uint16 (bfloat16) or int8
    values: np.ndarray
    key_scale: np.ndarray  # (L, S, G, T) float32 of int8, else of no elements
    value_scale: np.ndarray


class Shape(NamedTuple):
    n_heads: int
    kv_heads: int
    width: int
    eps: float
    rms: bool
    clip: float  # infinity where there is none
    scale: float


NO_TABLE = Linear(np.empty((0, 0), np.float32), np.empty((0, 0), np.float32), floats(None))
LAYERS = nn.Linear, nn.Embedding, PackedLinear, PackedEmbedding, NormModule


def is_plain(model: nn.Module) -> bool:
    """Whether a model computes what its weights say and nothing besides, in layers of one shape.

    Adapters, shards of several processes and methods that were replaced do more than loops over
    weights would know.
    """
    if type(model) is not MPT or model.device.type != "cpu":
        return False
    blocks = model.transformer.blocks
    layers = [
        layer for each in blocks for part in (each.attn, each.ffn) for layer in part.children()
    ]
    first, *others = ([*map(_stored, each.state_dict().items())] for each in blocks)
    return all(type(layer) in LAYERS for layer in layers) and others == [first] * len(others)


def _stored(named: tuple[str, Tensor]) -> tuple:
    name, weight = named
    return name, weight.dtype, weight.shape, weight.stride()


def made_of(model: nn.Module) -> tuple[list[type], list[int]]:
    """The classes of a model's parts, and the addresses of its tensors."""
    tensors = *model.parameters(), *model.buffers()
    return [*map(type, model.modules())], [each.data_ptr() for each in tensors]


class Decoder:
    """The weights of a model as compiled code reads them; they stay where they are."""

    def __init__(self, model: MPT, windows: Sequence[Sequence[int]]) -> None:
        config, blocks = model.config, model.transformer.blocks
        attn, norm = blocks[0].attn, blocks[0].norm_1
        clip = math.inf if attn.clip is None else float(attn.clip)
        self.shape = Shape(
            attn.n_heads, attn.kv_heads, attn.width, norm.eps, norm.rms, clip, float(attn.scale)
        )
        transformer = model.transformer
        self.layers = [_layer(block, each) for block, each in zip(blocks, windows, strict=True)]
        wte = linear_of(transformer.wte)
        wpe = linear_of(transformer.wpe) if config.has_positions else NO_TABLE
        self.head = wte if config.tie_word_embeddings else linear_of(model.lm_head)
        of_layers = self.layers[0], places_of(self.layers)
        self.norm_f = _norm(transformer.norm_f)
        self.weights = wte, wpe, *of_layers, self.norm_f, self.head
        self.slopes, self.factor = model.slopes.numpy(), config.logit_factor
        self.model = model
        self._made_of = made_of(model)

    def is_of(self, model: nn.Module) -> bool:
        """Whether a model is the one that this was made of, and still stands as it did."""
        return model is self.model and made_of(model) == self._made_of

    def __call__(
        self, cache: Cache, slots: Sequence[int], lengths: Sequence[int], ids: Sequence[int]
    ) -> Tensor:
        """(R, V) float32 logits after one more token in each of some slots.

        Args:
            cache: extended by the keys and values of the tokens.
            slots: (R,), which of them, no one twice.
            lengths: (R,) tokens that each holds before.
            ids: (R,).

        Raises:
            ValueError: see `check`.
        """
        self.check(ids)
        rows = np.array((slots, lengths, ids), np.int64)
        with pytorchs_threads():
            found = step(rows, self.weights, cache, self.slopes, self.shape)
        return self._scaled(found)

    def check(self, ids: Sequence[int]) -> None:
        """Raise a ValueError if an id is none of the model's, which no loop would notice."""
        n_ids = len(self.weights[0].weight)
        if not 0 <= min(ids) <= max(ids) < n_ids:
            wrong = next(each for each in ids if not 0 <= each < n_ids)
            raise ValueError(f"id {wrong}; the model has those from 0 to {n_ids - 1}")

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(R, V) float32 of the (R, D) of `MPT.hidden`; the head is read once, and not widened."""
        with pytorchs_threads():
            return self._scaled(product(self.head, hidden.float().numpy()))

    def _scaled(self, logits: np.ndarray) -> Tensor:
        found = torch.from_numpy(logits)
        return found if self.factor == 1 else found * self.factor


def _layer(block: nn.Module, windows: Sequence[int]) -> Layer:
    attn, ffn = block.attn, block.ffn
    return Layer(
        _norm(block.norm_1),
        linear_of(attn.Wqkv),
        _norm(attn.q_ln),
        _norm(attn.k_ln),
        linear_of(attn.out_proj),
        _norm(block.norm_2),
        linear_of(ffn.up_proj),
        linear_of(ffn.down_proj),
        np.array(windows, np.int64),
    )


def _norm(norm: NormModule | None) -> Norm:
    if norm is None:
        return Norm(floats(None), floats(None))
    return Norm(floats(norm.weight), floats(norm.bias))


@njit(**COMPILED)
def step(rows, weights, cache, slopes, shape):
    """(R, V) logits, and the cache extended, of (3, R) slots, their lengths and ids."""
    slots, lengths, ids = rows[0], rows[1], rows[2]
    wte, wpe, first, places, norm_f, head = weights
    n_rows = len(ids)
    inner = shape.n_heads * shape.width
    keys = shape.kv_heads * shape.width
    x = np.zeros((n_rows, first.norm_1.gain.size), np.float32)
    add_embeddings(wte, ids, x)
    if wpe.weight.size:
        add_embeddings(wpe, lengths, x)
    normed, added = np.empty_like(x), np.empty_like(x)
    qkv = np.empty((n_rows, inner + 2 * keys), np.float32)
    attended = np.empty((n_rows, inner), np.float32)
    hidden = np.empty((n_rows, first.up_proj.weight.shape[0]), np.float32)
    for number in range(len(places)):
        layer = layer_at(first, places, number)
        normalise(layer.norm_1, shape.eps, shape.rms, x, normed)
        multiply(layer.Wqkv, normed, qkv)
        if shape.clip < math.inf:
            clip(qkv, float32(shape.clip))
        if layer.q_ln.gain.size:
            q, k = qkv[:, :inner], qkv[:, inner : inner + keys]
            normalise(layer.q_ln, shape.eps, shape.rms, q, q)
            normalise(layer.k_ln, shape.eps, shape.rms, k, k)
        append(qkv, cache, number, slots, lengths, shape)
        attend(qkv, cache, number, slots, lengths, slopes, layer.windows, shape, attended)
        multiply(layer.out_proj, attended, added)
        x += added
        normalise(layer.norm_2, shape.eps, shape.rms, x, normed)
        multiply(layer.up_proj, normed, hidden)
        gelu(hidden)
        multiply(layer.down_proj, hidden, added)
        x += added
    normalise(norm_f, shape.eps, shape.rms, x, normed)
    return product(head, normed)


@njit(**COMPILED)
def append(qkv, cache, layer, slots, lengths, shape):
    """Write the keys and values of the new tokens into the cache."""
    # Each place lies apart, and a processor waits for one after the other where it writes.
    for r in range(len(slots)):
        for head in range(shape.kv_heads):
            for d in range(0, shape.width, LINE // cache.keys.itemsize):
                at = layer, slots[r], head, lengths[r], d
                ask(cache.keys, at)
                ask(cache.values, at)
    first = shape.n_heads * shape.width
    for r in range(len(slots)):
        for head in range(shape.kv_heads):
            k = first + head * shape.width
            v = k + shape.kv_heads * shape.width
            at = layer, slots[r], head, lengths[r]
            store(qkv[r, k : k + shape.width], cache.keys[at], cache.key_scale, at)
            store(qkv[r, v : v + shape.width], cache.values[at], cache.value_scale, at)


def store(numbers, kept, scales, at):
    """Write (K,) float32 numbers in the cache's format."""
    raise AssertionError("compiled code only")


@overload(store, jit_options=COMPILED)
def _store(numbers, kept, scales, at):
    return store_int8 if kept.dtype == types.int8 else store_floats


def store_floats(numbers, kept, scales, at):
    for d in range(len(numbers)):
        kept[d] = narrow(widen(numbers[d]), kept)


def store_int8(numbers, kept, scales, at):
    largest = float32(0)
    for d in range(len(numbers)):
        largest = max(largest, abs(widen(numbers[d])))
    scales[at] = largest / float32(127)
    factor = float32(127) / largest if largest > 0 else float32(0)
    for d in range(len(numbers)):
        kept[d] = int8(np.rint(widen(numbers[d]) * factor))


@njit(**PARALLEL)
def attend(qkv, cache, layer, slots, lengths, slopes, windows, shape, out):
    """Attention of the new tokens to those of their slots; (R, H * K) into out."""
    n_heads, width = shape.n_heads, shape.width
    copies = n_heads // shape.kv_heads
    for item in prange(len(slots) * n_heads):
        r, head = item // n_heads, item % n_heads
        slot, end, shared = slots[r], lengths[r] + 1, head // copies
        start = max(0, end - windows[shared])  # farther keys change nothing: see horizon
        q = qkv[r, head * width : (head + 1) * width]
        keys, values = cache.keys[layer, slot, shared], cache.values[layer, slot, shared]
        weight = np.empty(end - start, np.float32)
        for j in range(end - start):
            key = keys[start + j]
            score = float32(0)
            for d in range(width):
                score += q[d] * widen(key[d])
            if cache.key_scale.size:
                score *= cache.key_scale[layer, slot, shared, start + j]
            distance = float32(end - 1 - start - j)
            weight[j] = score * float32(shape.scale) - slopes[head] * distance
        total = exponentials(weight, weight.max())
        mixed = np.zeros(width, np.float32)
        for j in range(end - start):
            share = weight[j]
            if cache.value_scale.size:
                share *= cache.value_scale[layer, slot, shared, start + j]
            value = values[start + j]
            for d in range(width):
                mixed[d] += share * widen(value[d])
        out[r, head * width : (head + 1) * width] = mixed / total
