"""Attention by the kernels that know ALiBi themselves: flash-attn and FlexAttention, for GPUs.

Dimensions in this file
    B   batch
    H   query heads;  G  key and value heads, a divisor of H
    Tq  query positions
    Tk  key positions; the last query stands on the last key
    K   width of a head

Sources: Dao, "FlashAttention-2", arXiv:2307.08691, and flash-attn's `flash_attn_interface.py`;
Dong et al., "Flex Attention", arXiv:2412.05496.
"""

import functools
import importlib.util
from importlib.metadata import version

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from mptbook.model.reference import check

FLASH_ATTN = "2.4.2"  # the first with slopes of ALiBi in the forward and backward pass
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_WIDTH = 256
INSTALL_FLASH = f"pip install --no-build-isolation 'flash-attn>={FLASH_ATTN}'"


def flash(q, k, v, slopes, *, scale, documents=None, windows=None, dropout=0.0) -> Tensor:
    """Attention by flash-attn, which takes the slopes, windows, shared and cached keys.

    Arguments as for `mptbook.model.reference.Backend`, on a GPU, in float16 or bfloat16. A
    packed row of as many queries as keys is read as documents laid end to end; finding where
    they end makes the program wait for the GPU. Heads are called together if their windows are
    equal, and keys that such heads share are repeated.

    Raises:
        ValueError: besides those of `Backend`, if flash-attn is missing or too old, the tensors
            are not on a GPU, or the dtype or width of a head has no kernel.
    """
    check(q, k, v, slopes, documents, windows)
    require_flash(q)
    slopes = slopes.to(q.device, torch.float32)
    if windows is None:
        return call_flash(q, k, v, slopes, scale, documents, dropout, window=(-1, -1))
    out = torch.empty_like(q)
    copies = q.shape[1] // k.shape[1]
    for window in windows.unique().tolist():
        heads = (windows == window).nonzero()[:, 0]
        parts = q[:, heads], k[:, heads // copies], v[:, heads // copies], slopes[heads]
        past = min(window, k.shape[2]) - 1
        part = call_flash(*parts, scale, documents, dropout, window=(past, 0))
        out = out.index_copy(1, heads, part)
    return out


def require_flash_attn() -> None:
    """Refuse to go on without flash-attn, or with one that has no ALiBi."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ValueError(f"flash needs the package flash-attn: {INSTALL_FLASH}; or choose sdpa")
    found = version("flash-attn")
    if Version(found) < Version(FLASH_ATTN):
        raise ValueError(
            f"flash-attn {found} has no ALiBi; flash needs {FLASH_ATTN} or newer: {INSTALL_FLASH}"
        )


def require_flash(q: Tensor) -> None:
    """Refuse what flash-attn cannot compute, before it is imported."""
    require_flash_attn()
    if q.device.type != "cuda":
        raise ValueError(f"flash runs on a GPU and the tensors are on {q.device}; choose sdpa")
    if q.dtype not in FLASH_DTYPES:
        raise ValueError(
            f"flash has no kernel for {q.dtype}; use bfloat16 (as autocast does), or choose sdpa"
        )
    if q.shape[3] > FLASH_WIDTH or q.shape[3] % 8:
        raise ValueError(
            f"heads are {q.shape[3]} wide, and flash takes multiples of 8 up to {FLASH_WIDTH}; "
            "choose sdpa"
        )


def can_flash(q: Tensor) -> bool:
    """Whether `flash` has a kernel for these queries here."""
    try:
        require_flash(q)
    except ValueError:
        return False
    return True


def call_flash(q, k, v, slopes, scale, documents, dropout, window) -> Tensor:
    """One call of flash-attn, whose tensors are (B, T, heads, K)."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    how = {
        "dropout_p": dropout,
        "softmax_scale": scale,
        "causal": True,
        "window_size": window,
        "alibi_slopes": slopes,
    }
    if documents is None:
        return flash_attn_func(q, k, v, **how).transpose(1, 2)
    if q.shape[1] != k.shape[1]:
        return flash_with_padding(q, k, v, documents, how).transpose(1, 2)
    ends, longest = document_ends(documents)
    packed = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, K)
    out = flash_attn_varlen_func(*packed, ends, ends, longest, longest, **how)
    return out.unflatten(0, q.shape[:2]).transpose(1, 2)


def flash_with_padding(q, k, v, documents: Tensor, how: dict) -> Tensor:
    """New queries after cached keys, of which those of the last document count.

    While a batch of prompts is continued, each row is padding and then its prompt. The keys of
    the last document are laid end to end; it must end the row and hold all the queries.
    """
    from flash_attn import flash_attn_varlen_func

    n_rows, n_queries, n_heads, width = q.shape
    own = documents == documents[:, -1:]  # (B, Tk)
    lengths = own.sum(1)
    if not bool((own.flip(1).cumprod(1).sum(1) == lengths).all()) or lengths.min() < n_queries:
        raise ValueError(
            f"{n_queries} queries after cached keys belong to several documents, which flash "
            "cannot keep apart; choose sdpa"
        )
    key_ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    query_ends = torch.arange(n_rows + 1, device=q.device, dtype=torch.int32) * n_queries
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        k[own],
        v[own],
        query_ends,
        key_ends,
        n_queries,
        int(lengths.max()),
        **how,
    )
    return out.view(n_rows, n_queries, n_heads, width)


def document_ends(documents: Tensor) -> tuple[Tensor, int]:
    """Where documents end in rows laid end to end: (documents + 1,) int32 from 0; the longest.

    Raises:
        ValueError: if a document comes again after another; flash reads it as two.
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    distinct = sum(len(row.unique()) for row in documents)
    ends = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=starts.numel())
    if len(ends) - 1 != distinct:
        raise ValueError(
            "a document comes again after another in its row, which flash cannot tell from a "
            "new one; lay each document down in one run, or choose sdpa"
        )
    return ends.int(), int(ends.diff().max())


def flex(q, k, v, slopes, *, scale, documents=None, windows=None, dropout=0.0) -> Tensor:
    """Attention by FlexAttention: the bias as `score_mod`, what is hidden as `block_mask`.

    Arguments as for `mptbook.model.reference.Backend`. On a GPU the kernel is compiled, once
    for each kind of call, and blocks that are hidden whole are skipped: later documents, and
    what lies outside the windows. On a CPU it runs uncompiled, quadratic in memory, and serves
    to check the kernel's arguments.

    Raises:
        ValueError: besides those of `Backend`, if there is dropout, which it does not have.
    """
    check(q, k, v, slopes, documents, windows)
    if dropout:
        raise ValueError(f"attn_pdrop is {dropout}, and flex cannot drop weights; choose sdpa")
    if q.device.type == "cpu" and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("flex has no backward pass on a CPU; choose auto, or detach q, k and v")
    from torch.nn.attention.flex_attention import create_block_mask

    n_queries, n_keys = q.shape[2], k.shape[2]
    past = torch.tensor(n_keys - n_queries, device=q.device)  # a number would be compiled in

    def alibi(score, b, h, i, j):
        return score - slopes[h] * (i + past - j)

    def seen(b, h, i, j):
        near = i + past >= j
        if windows is not None:
            near = near & (i + past - j < windows[h])
        if documents is not None:
            near = near & (documents[b, i + past] == documents[b, j])
        return near

    batch = None if documents is None else q.shape[0]
    heads = None if windows is None else q.shape[1]
    compiled = q.device.type == "cuda"
    mask = create_block_mask(
        seen, batch, heads, n_queries, n_keys, device=q.device, _compile=compiled
    )
    run = flex_kernel(compiled)
    grouped = q.shape[1] != k.shape[1]
    return run(q, k, v, score_mod=alibi, block_mask=mask, scale=scale, enable_gqa=grouped)


@functools.cache
def flex_kernel(compiled: bool):
    """FlexAttention; compiling it is what makes a kernel of it."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
