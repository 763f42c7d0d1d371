"""Packed weights for products of many rows, compiled: widened, a piece at a time.

PyTorch multiplies what has 16 or 32 bits. Its own steps from 4 bits there write each weight some
five times, and take four times as long as these loops (measured).

Dimensions in this file
    N   outputs of a layer
    D   its inputs
    G   groups of inputs with a scale of their own, D / GROUP
"""

import torch
from numba import float32, njit, prange
from torch import Tensor

from mptbook.infer.compiled import GROUP, PARALLEL, narrow, pytorchs_threads, two


def widened(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, D) of what `mptbook.infer.quantize.pack` gives, on a CPU.

    Args:
        packed: int8, or uint8 of 4 bits each.
        dtype: float32 or bfloat16; a weight times its scale is rounded once.
    """
    width = packed.shape[1] if packed.dtype == torch.int8 else packed.shape[1] * GROUP
    out = torch.empty(len(packed), width, dtype=dtype)
    numbers = out.numpy() if dtype == torch.float32 else out.view(torch.uint16).numpy()
    with pytorchs_threads():
        if packed.dtype == torch.int8:
            widen_bytes(packed.numpy(), scale.numpy(), numbers)
        else:
            widen_nibbles(packed.numpy(), scale.numpy(), numbers)
    return out


@njit(**PARALLEL)
def widen_bytes(packed, scale, out):
    """(N, D) int8 times (N,) into (N, D) float32, or uint16 as the bits of bfloat16."""
    for i in prange(len(packed)):
        for j in range(packed.shape[1]):
            out[i, j] = narrow(float32(packed[i, j]) * scale[i], out)


@njit(**PARALLEL)
def widen_nibbles(packed, scale, out):
    """(N, G, GROUP / 2) uint8 times (N, G) into (N, D), as `widen_bytes`."""
    n_groups, half = packed.shape[1:]
    places = out.reshape(len(packed), n_groups, 2, half)
    for i in prange(len(packed)):
        for g in range(n_groups):
            for j in range(half):
                low, high = two(packed[i, g, j])
                places[i, g, 0, j] = narrow(low * scale[i, g], out)
                places[i, g, 1, j] = narrow(high * scale[i, g], out)
