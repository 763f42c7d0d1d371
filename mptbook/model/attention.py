"""Causal self-attention with ALiBi, in several equivalent forms.

Dimensions in this file
    B   batch
    H   query heads;  G  key and value heads, a divisor of H
    Tq  query positions
    Tk  key positions; the last query stands on the last key
    K   width of a head

Sources: Vaswani et al., arXiv:1706.03762; Press, Smith and Lewis, arXiv:2108.12409; Ainslie
et al., arXiv:2305.13245 (grouped queries).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptbook.model.alibi import alibi_bias, alibi_slopes
from mptbook.model.config import MPTConfig
from mptbook.model.norms import Norm


class KeyValueCache(Protocol):
    """What attention asks of a cache; `mptbook.infer.cache` has one."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, Tq, K) keys and values; return all of them, (B, G, Tk, K)."""


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float,
    documents: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention as it is written down, in float32: the form that all others must equal.

    Args:
        q: (B, H, Tq, K).
        k, v: (B, H, Tk, K).
        slopes: (H,) float32, nats per token; zeros for a model without ALiBi.
        scale: factor of the scores, usually 1 / sqrt(K).
        documents: (B, Tk) int64; a query sees the keys of its own document only.
        dropout: chance of dropping an attention weight.

    Returns:
        (B, H, Tq, K) in the dtype of `q`.

    Raises:
        ValueError: if there are more queries than keys.
    """
    scores = scale * (q.float() @ k.float().transpose(2, 3))  # (B, H, Tq, Tk)
    scores = scores + visible(slopes, q.shape[2], k.shape[2], documents)
    weights = F.dropout(scores.softmax(dim=3), dropout)
    return (weights @ v.float()).to(q.dtype)


def visible(slopes: Tensor, n_queries: int, n_keys: int, documents: Tensor | None) -> Tensor:
    """The ALiBi bias, minus infinity where a query may not look.

    Returns:
        (1, H, Tq, Tk) float32, or (B, H, Tq, Tk) where there are documents.
    """
    bias = alibi_bias(slopes, n_queries, n_keys)
    if documents is None:
        return bias
    apart = documents[:, -n_queries:, None] != documents[:, None, :]  # (B, Tq, Tk)
    return bias.masked_fill(apart[:, None], float("-inf"))


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float,
    documents: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """As `reference`, but every product and the bias in the dtype of `q`.

    On a CPU with matrix units for bfloat16 this is the fastest form for short rows. The bias
    is rounded as the scores are, to 8 bits; beyond `EAGER_TOKENS`, where the positions
    themselves no longer fit into 8 bits and neighbours run together, `sdpa` is taken.
    """
    bias = visible(slopes, q.shape[2], k.shape[2], documents).to(q.dtype)
    scores = torch.matmul(q * scale, k.transpose(2, 3)) + bias
    return F.dropout(scores.softmax(dim=3), dropout) @ v


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: float,
    documents: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """PyTorch's fused attention, with ALiBi folded into the queries and keys.

    A causal softmax does not see a constant added to a row, so the bias slope * (j - i) can
    be slope * j: the product of a number of the head and a number of the key. As further
    channels of q and k it needs no bias tensor, and memory stays linear in Tk.

    Where some keys are hidden, or queries are fewer than keys, the mask is a tensor.
    """
    if documents is None and q.shape[2] == k.shape[2]:
        width = q.shape[3]
        q, k, v = fold(q, k, v, slopes, scale)
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale
        )
        return out[..., :width]
    mask = visible(slopes, q.shape[2], k.shape[2], documents).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)


FOLDED_CHANNELS = 8  # a kernel's width must be a multiple of 8


def fold(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with `FOLDED_CHANNELS` more channels, whose scores are the ALiBi bias.

    bfloat16 holds 8 bits of a number: a position above 256 and most slopes do not fit. Both
    are written as a sum of two that do, position = 256 * high + low and slope = a + b, which
    takes four channels: a * 256 * high + a * low + b * 256 * high + b * low.

    Args:
        q, k, v: (B, H, T, K), (B, H, T, K), (B, H, T, K).
        slopes: (H,) float32.
        scale: what the kernel multiplies the scores with; divided out here.
    """
    slopes = slopes / scale
    coarse = slopes.to(torch.bfloat16).float()
    fine = slopes - coarse
    of_head = torch.stack([256 * coarse, coarse, 256 * fine, fine], dim=1)  # (H, 4)
    position = torch.arange(k.shape[2], device=k.device)
    high = torch.div(position, 256, rounding_mode="floor")
    of_key = torch.stack([high, position % 256] * 2, dim=1)  # (Tk, 4)
    spare = FOLDED_CHANNELS - 4
    of_head = F.pad(of_head, (0, spare)).to(q.dtype)[None, :, None]
    of_key = F.pad(of_key, (0, spare)).to(k.dtype)
    q = torch.cat([q, of_head.expand(*q.shape[:3], -1)], dim=3)
    k = torch.cat([k, of_key.expand(*k.shape[:2], -1, -1)], dim=3)
    return q, k, F.pad(v, (0, FOLDED_CHANNELS))


EAGER_TOKENS = 256


def auto(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, **how) -> Tensor:
    """The form that is fastest for this device, dtype and length."""
    short = k.shape[2] <= EAGER_TOKENS and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    return (eager if short else sdpa)(q, k, v, slopes, **how)


BACKENDS = {"auto": auto, "reference": reference, "sdpa": sdpa}


class Attention(nn.Module):
    """Multi-head attention with grouped or single key heads where the configuration asks.

    Parameters keep the names of released checkpoints. The rows of `Wqkv` are all queries,
    then all keys, then all values.
    """

    def __init__(self, config: MPTConfig, layer: int) -> None:
        super().__init__()
        attn = config.attn_config
        self.layer = layer
        self.n_heads, self.kv_heads, self.width = config.n_heads, config.kv_heads, config.head_width
        self.clip = attn.clip_qkv
        self.dropout = attn.attn_pdrop
        self.scale = attn.softmax_scale or self.width**-0.5
        self.backend = BACKENDS[attn.attn_impl]
        d_model, d_keys = config.d_model, self.kv_heads * self.width
        self.splits = [d_model, d_keys, d_keys]
        self.Wqkv = nn.Linear(d_model, sum(self.splits), bias=not config.no_bias)
        self.Wqkv.parts = self.splits  # initialised as three layers
        self.q_ln = self.k_ln = None
        if attn.qk_ln:
            norm = config.norm_type, config.norm_eps, not config.no_bias
            self.q_ln = Norm(norm[0], d_model, *norm[1:])
            self.k_ln = Norm(norm[0], d_keys, *norm[1:])
        self.out_proj = nn.Linear(d_model, d_model, bias=not config.no_bias)
        self.out_proj.is_residual = True

    def forward(
        self,
        x: Tensor,
        slopes: Tensor,
        documents: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(B, Tq, d_model) to the same shape; see `MPT.forward` for the other arguments."""
        qkv = self.Wqkv(x)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = qkv.split(self.splits, dim=2)
        if self.q_ln is not None:
            q, k = self.q_ln(q).to(v.dtype), self.k_ln(k).to(v.dtype)
        q, k, v = (self._heads(part) for part in (q, k, v))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        if self.kv_heads != self.n_heads:
            copies = self.n_heads // self.kv_heads
            k, v = (part.repeat_interleave(copies, dim=1) for part in (k, v))
        dropout = self.dropout if self.training else 0.0
        out = self.backend(q, k, v, slopes, scale=self.scale, documents=documents, dropout=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, part: Tensor) -> Tensor:
        """(B, T, heads * K) to (B, heads, T, K)."""
        return part.unflatten(2, (-1, self.width)).transpose(1, 2)


def slopes_of(config: MPTConfig) -> Tensor:
    """(H,) float32: ALiBi's slopes, or zeros for a model that has none."""
    attn = config.attn_config
    if attn.alibi:
        return alibi_slopes(config.n_heads, attn.alibi_bias_max)
    return torch.zeros(config.n_heads)
