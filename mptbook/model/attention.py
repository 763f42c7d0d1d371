"""The attention layer of MPT, and the choice among the forms that compute it.

Dimensions in this file
    B   batch
    H   query heads;  G  key and value heads, a divisor of H
    Tq  query positions
    Tk  key positions; the last query stands on the last key
    K   width of a head

Source: Ainslie et al., arXiv:2305.13245 (grouped queries).
"""

import importlib
from typing import Protocol

import torch
from torch import Tensor, nn

from mptbook.model.alibi import alibi_slopes
from mptbook.model.config import MPTConfig
from mptbook.model.folding import sdpa
from mptbook.model.norms import Norm
from mptbook.model.reference import Backend, reference

PRODUCTS_TOKENS = 1024  # on CPUs, measured


class KeyValueCache(Protocol):
    """What attention asks of a cache; `mptbook.infer.cache` has one."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Append (B, G, Tq, K) keys and values; return what the queries may look at.

        One pair for all heads, or G pairs of one head each, which may differ in length; each
        pair is (B, heads, Tk, K) and ends with the keys just given.
        """


def auto(q, k, v, slopes, *, dropout=0.0, **how) -> Tensor:
    """The form that is fastest for this device, dtype and length. Arguments as for `Backend`."""
    form = backend(choose(q, k, dropout))
    return form(q, k, v, slopes, dropout=dropout, **how)


def choose(q: Tensor, k: Tensor, dropout: float = 0.0) -> str:
    """The name of the form that `auto` takes."""
    # The horizon depends on the values of q and k, which a compiled graph does not know.
    if torch.compiler.is_compiling() or q.device.type not in ("cpu", "cuda"):
        return "sdpa"
    if q.device.type == "cuda":
        return "flash" if kernels().can_flash(q) else "sdpa"
    if dropout or q.shape[2] < 2 or q.dtype == torch.float64:
        return "sdpa"
    return "products" if k.shape[2] <= PRODUCTS_TOKENS and q.dtype != torch.half else "horizon"


def backend(name: str) -> Backend:
    """The form of attention called `name`, one of `BACKENDS`.

    Those of long rows and of GPUs are imported when they are first asked for.

    Raises:
        ValueError: for `flash` without flash-attn, saying what to install.
    """
    loaded = {"auto": auto, "reference": reference, "sdpa": sdpa}
    if name in loaded:
        return loaded[name]
    if name in ("products", "horizon"):
        return getattr(importlib.import_module(f"mptbook.model.{name}"), name)
    if name == "flash":
        kernels().require_flash_attn()
    return getattr(kernels(), name)


def kernels():
    """The module `mptbook.model.kernels`, which only a GPU needs."""
    return importlib.import_module("mptbook.model.kernels")


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
        self.backend = backend(attn.attn_impl)
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
        pieces = [(k, v)] if cache is None else cache.extend(self.layer, k, v)
        how = {"scale": self.scale, "dropout": self.dropout if self.training else 0.0}
        out = []
        queries, slopes = q.chunk(len(pieces), dim=1), slopes.chunk(len(pieces))
        for q, (k, v), slope in zip(queries, pieces, slopes, strict=True):
            own = None if documents is None else documents[:, -k.shape[2] :]
            out.append(self.backend(q, k, v, slope, documents=own, **how))
        out = torch.cat(out, dim=1) if len(out) > 1 else out[0]
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
