"""FlashAttention, written to be read: tiles, the online softmax, the recomputing backward.

A model of the GPU algorithm that really runs: it computes the same numbers in the same order
and counts the bytes that a GPU would move between its large, slow memory and the chip. Python
loops over the tiles, so its own speed says nothing; `mptbook.model.attention` has fast forms.

Dimensions in this file
    B   batch
    H   heads
    Tq  query positions
    Tk  key positions; the last query stands on the last key
    K   width of a head

Sources: Milakov and Gimelshein, arXiv:1805.02867 (online softmax); Dao et al.,
"FlashAttention", arXiv:2205.14135, algorithm 1; Dao, "FlashAttention-2", arXiv:2307.08691,
algorithms 1 and 2 (the order of the loops).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mptbook.model.alibi import alibi_bias
from mptbook.model.reference import check, repeat_heads


class SlowMemory:
    """Counts what passes between the slow memory and the chip.

    Attributes:
        loaded: bytes read from slow memory.
        stored: bytes written to it.
    """

    def __init__(self) -> None:
        self.loaded = self.stored = 0

    def load(self, x: Tensor) -> Tensor:
        self.loaded += x.numel() * x.element_size()
        return x.float()

    def store(self, place: Tensor, x: Tensor) -> None:
        self.stored += place.numel() * place.element_size()
        place.copy_(x)

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


def standard_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, *, scale: float, memory: SlowMemory
) -> Tensor:
    """Attention step by step: each step reads the matrix of the last one and writes its own.

    Args:
        q: (B, H, Tq, K).
        k, v: (B, H, Tk, K).
        slopes: (H,) float32.
        memory: counts the bytes moved, matrices of Tq x Tk among them.

    Returns:
        (B, H, Tq, K) in the dtype of `q`.
    """
    scores = q.new_empty(*q.shape[:3], k.shape[2])
    weights, out = torch.empty_like(scores), torch.empty_like(q)
    bias = alibi_bias(slopes, q.shape[2], k.shape[2])
    memory.store(scores, scale * (memory.load(q) @ memory.load(k).mT) + bias)
    memory.store(weights, memory.load(scores).softmax(dim=3))
    memory.store(out, memory.load(weights) @ memory.load(v))
    return out


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float,
    tile: int = 64,
    memory: SlowMemory | None = None,
) -> Tensor:
    """Causal attention with ALiBi, tile by tile; no matrix of Tq x Tk is ever stored.

    Args:
        q: (B, H, Tq, K).
        k, v: (B, H, Tk, K).
        slopes: (H,) float32.
        scale: factor of the scores, usually 1 / sqrt(K).
        tile: queries and keys on the chip at a time.
        memory: counts the bytes moved, of the forward pass and of a backward pass after it.

    Returns:
        (B, H, Tq, K) in the dtype of `q`; differentiable in q, k and v.

    Raises:
        ValueError: as for `mptbook.model.reference.Backend`.
    """
    check(q, k, v, slopes, None, None)
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    return Tiles.apply(q, k, v, slopes, scale, tile, memory or SlowMemory())


class Tiles(torch.autograd.Function):
    """The forward and backward pass of `flash_attention`."""

    @staticmethod
    def forward(ctx, q, k, v, slopes, scale, tile, memory):
        out = torch.empty_like(q)
        log_sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        for rows in tiles(q.shape[2], tile):
            queries = memory.load(q[:, :, rows])
            online = OnlineSoftmax(queries)
            for keys in tiles(k.shape[2], tile):
                if hidden(q, k, rows, keys):
                    continue
                scores = scale * (queries @ memory.load(k[:, :, keys]).mT)
                scores += bias_between(slopes, q, k, rows, keys)
                online.add(scores, memory.load(v[:, :, keys]))
            memory.store(out[:, :, rows], online.mean)
            memory.store(log_sums[:, :, rows], online.log_sum)
        ctx.save_for_backward(q, k, v, slopes, out, log_sums)
        ctx.scale, ctx.tile, ctx.memory = scale, tile, memory
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, slopes, out, log_sums = ctx.saved_tensors
        scale, tile, memory = ctx.scale, ctx.tile, ctx.memory
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        # What the softmax takes off every score's gradient: one number per query.
        common = torch.empty_like(log_sums)
        memory.store(common, (memory.load(grad_out) * memory.load(out)).sum(dim=3))
        for keys in tiles(k.shape[2], tile):
            key, value = memory.load(k[:, :, keys]), memory.load(v[:, :, keys])
            sum_k, sum_v = torch.zeros_like(key), torch.zeros_like(value)
            for rows in tiles(q.shape[2], tile):
                if hidden(q, k, rows, keys):
                    continue
                query, grad = memory.load(q[:, :, rows]), memory.load(grad_out[:, :, rows])
                scores = scale * (query @ key.mT) + bias_between(slopes, q, k, rows, keys)
                # The weights again, from one number per query instead of a stored matrix.
                weights = (scores - memory.load(log_sums[:, :, rows])[..., None]).exp()
                sum_v += weights.mT @ grad
                grad_weights = grad @ value.mT
                grad_scores = weights * (grad_weights - memory.load(common[:, :, rows])[..., None])
                sum_k += scale * (grad_scores.mT @ query)
                so_far = memory.load(grad_q[:, :, rows])
                memory.store(grad_q[:, :, rows], so_far + scale * (grad_scores @ key))
            memory.store(grad_k[:, :, keys], sum_k)
            memory.store(grad_v[:, :, keys], sum_v)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None, None, None


class OnlineSoftmax:
    """A softmax-weighted mean of values that come in pieces, each seen once.

    Args:
        like: (..., K) float32; the means will have this shape.
    """

    def __init__(self, like: Tensor) -> None:
        self.largest = like.new_full((*like.shape[:-1], 1), float("-inf"))
        self.total = torch.zeros_like(self.largest)  # of exp(score - largest)
        self.weighted = torch.zeros_like(like)  # of exp(score - largest) * value

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Take in (..., n) scores and their (..., n, K) values, one row per mean."""
        largest = torch.maximum(self.largest, scores.amax(dim=-1, keepdim=True))
        shrink = (self.largest - largest).exp()  # what was summed relative to a smaller largest
        weights = (scores - largest).exp()
        self.total = shrink * self.total + weights.sum(dim=-1, keepdim=True)
        self.weighted = shrink * self.weighted + weights @ values
        self.largest = largest

    @property
    def mean(self) -> Tensor:
        """(..., K): what softmax(all scores) @ (all values) is."""
        return self.weighted / self.total

    @property
    def log_sum(self) -> Tensor:
        """(...,): log of the sum of exp(score), all that the backward pass needs."""
        return (self.largest + self.total.log()).squeeze(-1)


def tiles(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def hidden(q: Tensor, k: Tensor, rows: slice, keys: slice) -> bool:
    """Whether a tile of keys lies wholly after a tile of queries."""
    return keys.start >= rows.stop + k.shape[2] - q.shape[2]


def bias_between(slopes: Tensor, q: Tensor, k: Tensor, rows: slice, keys: slice) -> Tensor:
    """(H, queries, keys): the ALiBi bias of one tile, minus infinity in the future."""
    query = torch.arange(rows.start, rows.stop) + k.shape[2] - q.shape[2]
    distance = query[:, None] - torch.arange(keys.start, keys.stop)
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(distance < 0, float("-inf"))
