"""Layers as compiled loops read them, and products with them.

Dimensions in this file
    R   rows: sequences that a token is written for
    N   outputs of a layer
    D   its inputs
    G   groups of inputs with a scale of their own, D / GROUP
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mptbook.infer.compiled import pytorchs_threads
from mptbook.infer.kernels import product

BLOCK = 64  # rows whose inputs stay in the cache next to the processor


class Linear(NamedTuple):
    """A layer as kernels read it; arrays of no elements where it has none.

    Args:
        weight: (N, D) float32, uint16 (the bits of bfloat16) or int8; or 4 bits each in
            (N, G, GROUP / 2) uint8: input j of a group in the low half of byte j, input
            GROUP / 2 + j in the high half, each 8 more than it is.
        scale: (N, 1) float32 of int8, (N, G) of 4 bits.
        bias: (N,) float32.
    """

    weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def linear_of(layer: nn.Module) -> Linear:
    """Of an `nn.Linear` or `nn.Embedding`, or of what `mptbook.infer.quantize` makes of them."""
    bias = floats(getattr(layer, "bias", None))
    weight = layer.packed if hasattr(layer, "packed") else layer.weight.detach()
    scale = getattr(layer, "scale", None)
    scale = np.empty((0, 0), np.float32) if scale is None else scale.view(len(weight), -1).numpy()
    return Linear(bits_of(weight), scale, bias)


def bits_of(numbers: Tensor) -> np.ndarray:
    """NumPy's view of a tensor; of bfloat16, which it does not know, the bits.

    Loops have no other fractions than those and float32: of float16 and float64 it is a copy.
    """
    if numbers.dtype == torch.bfloat16:
        return numbers.view(torch.uint16).numpy()
    return (numbers.float() if numbers.is_floating_point() else numbers).numpy()


def floats(values: Tensor | None) -> np.ndarray:
    return np.empty(0, np.float32) if values is None else values.detach().float().numpy()


def multiplied(layer: nn.Module, x: Tensor) -> Tensor:
    """(R, N) float32 products of a layer, on a CPU, with the (R, D) rows of x.

    The packed weights themselves are read, once for each `BLOCK` rows.
    """
    linear, blocks = linear_of(layer), x.float().contiguous().split(BLOCK)
    with pytorchs_threads():
        found = [torch.from_numpy(product(linear, block.numpy())) for block in blocks]
    return found[0] if len(found) == 1 else torch.cat(found)
