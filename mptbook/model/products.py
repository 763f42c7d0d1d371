"""Attention on a CPU by plain matrix products: the fastest form for rows that are not long.

PyTorch's fused kernel for CPUs works on tiles too small for a matrix product to reach its speed.
Here a block of queries meets all the keys up to its own in one product of all heads. The weights
are kept for the backward pass: half of Tq * Tk numbers for each head.

Dimensions in this file
    B   batch
    H   query heads;  G  key and value heads, a divisor of H
    Tq  query positions
    Tk  key positions; the last query stands on the last key
    K   width of a head
    C   K and the eight channels that ALiBi is folded into
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mptbook.model.reference import check, repeat_heads

BLOCK_QUERIES = 128  # measured: 64 and 256 are both slower
MOST_KEYS = 65_536  # a position in two numbers of 8 bits


def products(q, k, v, slopes, *, scale, documents=None, windows=None, dropout=0.0) -> Tensor:
    """Attention by matrix products in the dtype of `q`, forward and backward.

    Arguments as for `mptbook.model.reference.Backend`. A score is added up in float32, its
    ALiBi bias with it, and then rounded to the dtype of `q`; so is a weight.
    """
    check(q, k, v, slopes, documents, windows)
    if dropout:
        raise ValueError(f"attn_pdrop is {dropout}, and products cannot drop weights; use sdpa")
    if k.shape[2] > MOST_KEYS:
        raise ValueError(f"{k.shape[2]:,} keys, but products takes {MOST_KEYS:,}; use sdpa")
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    hidden = None
    if documents is not None or windows is not None:
        hidden = hidden_keys(q, k, documents, windows)
    return Products.apply(q, k, v, slopes, scale, hidden)


def hidden_keys(q: Tensor, k: Tensor, documents: Tensor | None, windows: Tensor | None) -> Tensor:
    """(1 or B, 1 or H, Tq, Tk) bool: which keys of the past a query may not see."""
    key = torch.arange(k.shape[2], device=q.device)
    query = key[-q.shape[2] :, None]
    hidden = (key < 0)[None, None, None]  # none
    if documents is not None:
        hidden = (documents[:, query] != documents[:, None])[:, None]
    if windows is not None:
        hidden = hidden | (query - key >= windows[:, None, None])
    return hidden


class Products(torch.autograd.Function):
    """The forward and backward pass of `products`; as many key heads as query heads."""

    @staticmethod
    def forward(ctx, q, k, v, slopes, scale, hidden):
        ctx.heads, ctx.scale = q.shape[:2], scale
        q, k = (x.flatten(0, 1) for x in fold_distance(q, k, slopes / scale))  # (B * H, T, C)
        v = v.flatten(0, 1)
        out = v.new_empty(*q.shape[:2], v.shape[2])
        weights = []
        for rows, keys in blocks(q.shape[1], k.shape[1]):
            scores = multiply(q[:, rows], k[:, keys].mT, scale)
            n = rows.stop - rows.start
            scores[:, :, -n:] += scores.new_full((n, n), float("-inf")).triu(1)  # the future
            if hidden is not None:
                unseen = hidden[:, :, rows, keys]
                scores.unflatten(0, ctx.heads).masked_fill_(unseen, float("-inf"))
            weights.append(scores.softmax(2))
            torch.bmm(weights[-1], v[:, keys], out=out[:, rows])
        ctx.save_for_backward(q, k, v, *weights)
        return out.unflatten(0, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, *weights = ctx.saved_tensors
        grad_out, width = grad_out.flatten(0, 1), v.shape[2]
        grad_q = torch.empty_like(grad_out)
        # Blocks share keys, so their parts are added up, in float32 or wider.
        wide = torch.promote_types(v.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros_like(v, dtype=wide) for _ in range(2))
        for (rows, keys), weight in zip(blocks(q.shape[1], k.shape[1]), weights, strict=True):
            grad = grad_out[:, rows]
            grad_v[:, keys] += weight.mT @ grad
            grad_weight = grad @ v[:, keys].mT
            grad_score = torch._softmax_backward_data(grad_weight, weight, 2, weight.dtype)
            grad_q[:, rows] = multiply(grad_score, k[:, keys, :width], ctx.scale)
            grad_k[:, keys] += multiply(grad_score.mT, q[:, rows, :width], ctx.scale)
        grads = grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
        return *(grad.unflatten(0, ctx.heads) for grad in grads), None, None, None


def fold_distance(q: Tensor, k: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """q and k with eight more channels that add slope * (key's position - query's) to a score.

    As `mptbook.model.folding.fold`, where the reason for the sums of 8-bit numbers stands, but
    with the query's position taken off: the score of a near key is going to be rounded, and
    must not carry the length of the row.
    """
    coarse = slopes.to(torch.bfloat16).float()
    fine = slopes - coarse
    position = torch.arange(k.shape[2], device=k.device)
    low, high = position % 256, position - position % 256
    of_head = torch.stack([coarse, coarse, fine, fine], dim=1)[:, None]  # (H, 1, 4)
    of_place = torch.stack([low, high, low, high], dim=1)[None]  # (1, Tk, 4)
    of_head, of_place = torch.broadcast_tensors(of_head, of_place)
    of_query = torch.cat([of_head, -of_place], dim=2)[:, -q.shape[2] :].to(q.dtype)
    of_key = torch.cat([of_place, of_head], dim=2).to(k.dtype)
    return (
        torch.cat([q, of_query.expand(len(q), -1, -1, -1)], dim=3),
        torch.cat([k, of_key.expand(len(k), -1, -1, -1)], dim=3),
    )


def blocks(n_queries: int, n_keys: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with all the keys up to its last query."""
    for start in range(0, n_queries, BLOCK_QUERIES):
        stop = min(start + BLOCK_QUERIES, n_queries)
        yield slice(start, stop), slice(0, n_keys - n_queries + stop)


def multiply(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b for (N, ..., ...) batches, rounded once."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
