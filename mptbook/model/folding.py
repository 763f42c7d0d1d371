"""ALiBi folded into queries and keys, so that a kernel without ALiBi computes it.

Dimensions in this file
    B   batch
    H   query heads;  G  key and value heads, a divisor of H
    Tq  query positions
    Tk  key positions; the last query stands on the last key
    K   width of a head
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mptbook.model.reference import check, repeat_heads, visible

FOLDED_CHANNELS = 8  # a kernel's width must be a multiple of 8


def sdpa(q, k, v, slopes, *, scale, documents=None, windows=None, dropout=0.0) -> Tensor:
    """PyTorch's fused attention, with ALiBi folded into the queries and keys.

    Arguments as for `mptbook.model.reference.Backend`. Memory is linear in Tk: a packed row is
    read document by document, a single query has a row of biases, and other queries fewer than
    keys a mask of Tq x Tk bits for all heads. A document that is not one run of tokens takes a
    quadratic mask, and so do windows, which other forms skip.
    """
    check(q, k, v, slopes, documents, windows)
    n_queries, n_keys = q.shape[2], k.shape[2]
    on_cpu = q.device.type == "cpu"
    if windows is not None or (n_queries == 1 and on_cpu):
        mask = visible(slopes, n_queries, n_keys, documents, windows)
        # Beside float64 a float32 mask would be misread, without a word.
        mask = mask.to(torch.float32 if on_cpu and q.dtype.itemsize == 2 else q.dtype)
        k, v = repeat_heads(k, q), repeat_heads(v, q)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
    whole = documents is not None and n_queries == n_keys
    rows = runs(documents) if whole and not torch.compiler.is_compiling() else None
    if rows is not None:
        how = {"scale": scale, "dropout": dropout}
        if all(len(row) == 1 for row in rows):
            return sdpa(q, k, v, slopes, **how)
        out = []
        for i, row in enumerate(rows):
            one = [x[i : i + 1] for x in (q, k, v)]
            parts = [sdpa(*(x[:, :, at] for x in one), slopes, **how) for at in row]
            out.append(torch.cat(parts, dim=2))
        return torch.cat(out)
    mask = None
    if documents is not None or 1 < n_queries < n_keys:
        mask = visible(slopes.new_zeros(1), n_queries, n_keys, documents) == 0  # (B, 1, Tq, Tk)
    folded = fold(q, repeat_heads(k, q), repeat_heads(v, q), slopes, scale)
    causal = mask is None and n_queries == n_keys
    out = F.scaled_dot_product_attention(*folded, mask, dropout, is_causal=causal, scale=scale)
    return out[..., : q.shape[3]]


def runs(documents: Tensor) -> list[list[slice]] | None:
    """Where the documents of each (B, T) row lie, in order.

    None if a document is not one run of tokens, but comes again after another.
    """
    rows = []
    for row in documents:
        ids, lengths = row.unique_consecutive(return_counts=True)
        if len(ids.unique()) < len(ids):
            return None
        ends = lengths.cumsum(0).tolist()
        rows.append([slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)])
    return rows


def fold(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with `FOLDED_CHANNELS` more channels, whose scores are the ALiBi bias.

    A causal softmax does not see a constant added to a row, so the bias slope * (j - i) can
    be slope * j: the product of a number of the head and a number of the key.

    bfloat16 holds 8 bits of a number: a position above 256 and most slopes do not fit. Both
    are written as sums of numbers that do, position = 65536 * top + 256 * middle + low and
    slope = coarse + fine, and the product of the sums takes six channels.

    A kernel adds up in float32, where a term of slope * Tk leaves an error of its 2 ** -24:
    far below bfloat16's rounding at any length, but above float32's from some thousand tokens.

    Args:
        q: (B, H, Tq, K).
        k, v: (B, H, Tk, K).
        slopes: (H,) float32.
        scale: what the kernel multiplies the scores with; divided out here.

    Returns:
        (B, H, Tq, K + 8), and (B, H, Tk, K + 8) twice; the new channels of v are zeros, and
        those of the output are to be dropped.
    """
    slopes = slopes / scale
    coarse = slopes.to(torch.bfloat16).float()
    fine = slopes - coarse
    position = torch.arange(k.shape[2], device=k.device)
    low, high = position % 256, position // 256
    middle, top = high % 256, high // 256
    # (H, 6) and (Tk, 6): each number fits into 8 bits, and into the range of float16.
    of_head = [part * power for part in (coarse, fine) for power in (1, 256, 256)]
    of_key = [low, middle, 256 * top] * 2
    spare = FOLDED_CHANNELS - len(of_key)
    of_head = F.pad(torch.stack(of_head, dim=1), (0, spare)).to(q.dtype)[None, :, None]
    of_key = F.pad(torch.stack(of_key, dim=1), (0, spare)).to(k.dtype)
    q = torch.cat([q, of_head.expand(*q.shape[:3], -1)], dim=3)
    k = torch.cat([k, of_key.expand(*k.shape[:2], -1, -1)], dim=3)
    return q, k, F.pad(v, (0, FOLDED_CHANNELS))
