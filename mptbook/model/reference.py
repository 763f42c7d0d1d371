"""Attention as it is written down, and what every other form of it shares.

Dimensions in this file
    B   batch
    H   query heads;  G  key and value heads, a divisor of H
    Tq  query positions
    Tk  key positions; the last query stands on the last key
    K   width of a head

Sources: Vaswani et al., arXiv:1706.03762; Press, Smith and Lewis, arXiv:2108.12409.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mptbook.model.alibi import alibi_bias


class Backend(Protocol):
    """The signature of every form of attention. All give the same result, but for rounding.

    Args:
        q: (B, H, Tq, K).
        k, v: (B, G, Tk, K); head g serves the query heads g * H / G and following.
        slopes: (H,) float32, nats per token; zeros for a model without ALiBi.
        scale: factor of the scores, usually 1 / sqrt(K).
        documents: (B, Tk) int64; a query sees the keys of its own document only.
        windows: (H,) int64; a query of head h sees the last windows[h] keys only, its own
            among them. None: all of them.
        dropout: chance of dropping an attention weight.

    Returns:
        (B, H, Tq, K) in the dtype of `q`.

    Raises:
        ValueError: if the shapes do not fit together, a slope is not a number, or the form
            cannot run on this device, dtype, head width or installation; the message says
            which one can. Slopes that lie on a GPU are not looked at, which would make the
            program wait for it: a slope that is NaN makes the output NaN.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor,
        *,
        scale: float,
        documents: Tensor | None = None,
        windows: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor: ...


def reference(q, k, v, slopes, *, scale, documents=None, windows=None, dropout=0.0) -> Tensor:
    """Attention as it is written down, in float32: the form that all others must equal.

    Arguments as for `Backend`. Time and memory grow with Tq * Tk.
    """
    check(q, k, v, slopes, documents, windows)
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    scores = scale * (q.float() @ k.float().transpose(2, 3))  # (B, H, Tq, Tk)
    scores = scores + visible(slopes, q.shape[2], k.shape[2], documents, windows)
    weights = F.dropout(scores.softmax(dim=3), dropout)
    return (weights @ v.float()).to(q.dtype)


def visible(
    slopes: Tensor,
    n_queries: int,
    n_keys: int,
    documents: Tensor | None = None,
    windows: Tensor | None = None,
) -> Tensor:
    """The ALiBi bias, minus infinity where a query may not look.

    Returns:
        (1, H, Tq, Tk) float32, or (B, H, Tq, Tk) where there are documents.
    """
    bias = alibi_bias(slopes, n_queries, n_keys)
    if windows is not None:
        key = torch.arange(n_keys, device=slopes.device)
        distance = key[n_keys - n_queries :, None] - key[None, :]  # (Tq, Tk)
        bias = bias.masked_fill(distance >= windows[:, None, None], float("-inf"))
    if documents is not None:
        apart = documents[:, -n_queries:, None] != documents[:, None, :]  # (B, Tq, Tk)
        bias = bias.masked_fill(apart[:, None], float("-inf"))
    return bias


def eager(q, k, v, slopes, *, scale, documents=None, windows=None, dropout=0.0) -> Tensor:
    """As `reference`, but every product and the bias in the dtype of `q`, as is often written.

    In bfloat16 the bias keeps 8 bits: beyond 256 tokens those of neighbours run together.
    """
    check(q, k, v, slopes, documents, windows)
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    bias = visible(slopes, q.shape[2], k.shape[2], documents, windows).to(q.dtype)
    scores = torch.matmul(q * scale, k.transpose(2, 3)) + bias
    return F.dropout(scores.softmax(dim=3), dropout) @ v


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    documents: Tensor | None,
    windows: Tensor | None,
) -> None:
    """Refuse what no form can compute; see `Backend`."""
    (batch, heads, n_queries, width), (_, kv_heads, n_keys, _) = q.shape, k.shape
    if n_queries > n_keys:
        raise ValueError(
            f"{n_queries} queries but only {n_keys} keys; "
            "pass the cached keys along with the new ones"
        )
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != width or heads % kv_heads:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not "
            "fit together; the batch and the width of a head must agree, and the number of key "
            "heads must divide that of query heads"
        )
    # A compiled graph and a GPU would have to stop to look at the numbers.
    looked_at = slopes.device.type == "cpu" and not torch.compiler.is_compiling()
    if slopes.shape != (heads,) or (looked_at and not slopes.isfinite().all()):
        raise ValueError(
            f"slopes are {slopes.tolist()}; attention with {heads} heads needs {heads} finite "
            "numbers, such as alibi_slopes(n_heads) or zeros"
        )
    if documents is not None and documents.shape != (batch, n_keys):
        raise ValueError(
            f"documents have the shape {tuple(documents.shape)}, but there are {batch} rows of "
            f"{n_keys} keys; attention is always causal and takes no other mask: to hide tokens, "
            "give them a document of their own"
        )
    if windows is not None and (windows.shape != (heads,) or (looked_at and windows.min() < 1)):
        raise ValueError(f"windows are {windows.tolist()}; {heads} heads need {heads}, at least 1")


def repeat_heads(part: Tensor, q: Tensor) -> Tensor:
    """(B, G, Tk, K) keys or values as (B, H, Tk, K), for a kernel that knows no shared heads."""
    copies = q.shape[1] // part.shape[1]
    return part if copies == 1 else part.repeat_interleave(copies, dim=1)
