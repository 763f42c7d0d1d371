"""Attention on a CPU in which each head sees a window of its own length.

PyTorch's fused kernel does the work, with the bias in float32. A head that sees everything is
one call. For a head with a window the queries are taken block by block: the keys that a block
can see are one slice, and the bias is a small mask, the same for every block. Only the output
and one number per query are kept for the backward pass.

Dimensions in this file
    B   batch
    H   query heads;  G  key and value heads, a divisor of H
    Tq  query positions
    Tk  key positions; the last query stands on the last key
    K   width of a head

Source of the backward pass: Dao et al., "FlashAttention", arXiv:2205.14135, appendix B.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mptbook.model.reference import repeat_heads, visible

BLOCK_QUERIES = 256  # measured: 128 and 512 are both slower

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def windowed(q, k, v, slopes, *, scale, documents=None, windows) -> Tensor:
    """Causal attention in which head h sees the last ``windows[h]`` keys.

    Time grows with Tq * window and not with Tq * Tk, forward and backward; memory with Tk and
    with `BLOCK_QUERIES` times the longest window. For tensors on a CPU; arguments as for
    `mptbook.model.reference.Backend`, but for dropout, which the kernel does not have.
    """
    if q.dtype == torch.float64:  # the kernel would misread the bias
        raise ValueError("horizon has no kernel for torch.float64; use float32, or choose sdpa")
    if q.numel() == 0:
        return torch.zeros_like(q)  # which the kernel would divide by
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    return Windowed.apply(q, k, v, slopes, scale, documents, windows.tolist())


class Windowed(torch.autograd.Function):
    """The forward and backward pass of `windowed`; as many key heads as query heads."""

    @staticmethod
    def forward(ctx, q, k, v, slopes, scale, documents, windows):
        out = torch.empty_like(q)
        log_sums = q.new_empty(q.shape[:3], dtype=torch.float32)  # of exp(scores), per query
        for at, seen, bias, causal in calls(q, slopes, windows, documents, k.shape[2]):
            n = threads_of(q[at])
            part, sums = attend(
                split(q[at], n),
                share(k[seen], n),
                share(v[seen], n),
                0.0,
                causal,
                attn_mask=split(bias, n),
                scale=scale,
            )
            out[at], log_sums[at] = join(part, n), join(sums, n)
        ctx.save_for_backward(q, k, v, slopes, documents, out, log_sums)
        ctx.scale, ctx.windows = scale, windows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, slopes, documents, out, log_sums = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for at, seen, bias, causal in calls(q, slopes, ctx.windows, documents, k.shape[2]):
            n = threads_of(q[at])
            part_q, part_k, part_v = attend_backward(
                split(grad_out[at], n),
                split(q[at], n),
                share(k[seen], n),
                share(v[seen], n),
                split(out[at], n),
                split(log_sums[at], n),
                0.0,
                causal,
                attn_mask=split(bias, n),
                scale=ctx.scale,
            )
            grad_q[at] = join(part_q, n)
            # Blocks share keys, so their parts are added up, in float32.
            grad_k[seen] += part_k.sum(1, keepdim=True) if n > 1 else part_k
            grad_v[seen] += part_v.sum(1, keepdim=True) if n > 1 else part_v
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def calls(
    q: Tensor, slopes: Tensor, windows: list[int], documents: Tensor | None, n_keys: int
) -> Iterator[tuple[tuple, tuple, Tensor, bool]]:
    """The calls of the kernel that make up the whole.

    Yields:
        Where in (B, H, Tq, K) the queries lie, where the keys that they see, the bias between
        them, and whether the kernel has to hide the future, which blocks have in their bias.
    """
    n_heads, n_queries = q.shape[1:3]
    simple = n_queries == n_keys and documents is None
    head = 0
    while head < n_heads:
        last = head
        while simple and last < n_heads and windows[last] >= n_keys:
            last += 1  # heads that see everything, side by side
        if (last - head) * q.shape[0] >= torch.get_num_threads():  # see `threads_of`
            at = slice(None), slice(head, last), slice(None)
            bias = slopes[None, head:last, None, None] * torch.arange(1 - n_keys, 1)
            yield at, at, bias.expand(1, last - head, n_queries, n_keys), True
            head = last
            continue
        one = slice(head, head + 1)
        for rows, keys, bias in blocks(n_queries, n_keys, slopes[one], windows[head], documents):
            yield (slice(None), one, rows), (slice(None), one, keys), bias, False
        head += 1


def threads_of(q: Tensor) -> int:
    """Into how many heads to split the queries of a call, (B, heads, T, K).

    The kernel's backward pass gives each head of each row to one thread, so that one head of
    one row would leave the others idle.
    """
    n = torch.get_num_threads()
    return n if q.shape[0] * q.shape[1] < n and q.shape[2] % n == 0 else 1


def split(x: Tensor, n: int) -> Tensor:
    """(B, 1, T, ...) to (B, n, T / n, ...)."""
    return x if n == 1 else x[:, 0].unflatten(1, (n, -1))


def share(x: Tensor, n: int) -> Tensor:
    """(B, 1, T, K) to (B, n, T, K), the same for each part of a head that was split."""
    return x if n == 1 else x.expand(-1, n, -1, -1)


def join(x: Tensor, n: int) -> Tensor:
    """(B, n, T / n, ...) to (B, 1, T, ...)."""
    return x if n == 1 else x.flatten(1, 2)[:, None]


def blocks(
    n_queries: int, n_keys: int, slope: Tensor, window: int, documents: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The blocks of queries of one head, and what each can see.

    Yields:
        The queries of the block, the keys inside its window, and the bias between them,
        (1 or B, 1, queries, keys) float32, minus infinity where a query may not look.
    """
    window, size = min(window, n_keys), min(BLOCK_QUERIES, n_queries)
    longest = min(n_keys, window + size - 1)
    # Of any block: the last corner.
    whole = visible(slope, size, longest, windows=torch.tensor([window]))
    first = None if documents is None else first_of_document(documents)
    for start in range(0, n_queries, size):
        rows = slice(start, min(start + size, n_queries))
        end = n_keys - n_queries + rows.stop
        on = slice(end - (rows.stop - start), end)  # the keys that the queries stand on
        oldest = max(0, on.start - window + 1)
        if first is not None:
            oldest = max(oldest, int(first[:, on].min()))
        bias = whole[:, :, start - rows.stop :, oldest - end :]
        if documents is not None:
            apart = documents[:, on, None] != documents[:, None, oldest:end]
            bias = bias.masked_fill(apart[:, None], float("-inf"))
        yield rows, slice(oldest, end), bias


def first_of_document(documents: Tensor) -> Tensor:
    """(B, T) int64: where the document of each token has its first token."""
    n_rows, n_tokens = documents.shape
    position = torch.arange(n_tokens).expand(n_rows, -1)
    ids, which = documents.unique(return_inverse=True)
    first = torch.full((n_rows, len(ids)), n_tokens)
    return first.scatter_reduce(1, which, position, "amin").gather(1, which)
