"""Weights of 16, 8 or 4 bits; what a layer computes with stays float32 or bfloat16.

Writing a token takes every weight out of memory once, so fewer bits are more tokens a second,
and a larger model in the same memory. Norms, biases and learned positions stay as they are:
they are one weight in a thousand.

Dimensions in this file
    N   outputs of a layer, or rows of an embedding
    D   inputs
    G   groups of inputs with a scale of their own

Sources: Dettmers et al., arXiv:2208.07339 (a scale for each row); Frantar et al.,
arXiv:2210.17323, section 3 (rounding to the nearest in groups, as the baseline).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mptbook.infer.compiled import GROUP
from mptbook.infer.linear import multiplied
from mptbook.infer.widen import widened
from mptbook.model.mpt import MPT
from mptbook.model.precision import has_bf16

PIECE = 2**22  # numbers that are packed at once, which bounds the memory that it takes
WIDE = 2**22  # numbers that are widened at once
# Rows up to which packed weights are multiplied as fast as PyTorch multiplies in bfloat16 what they
# are widened to, or faster (measured).
FEW = {torch.bfloat16: 16, torch.int8: 64, torch.uint8: 48}
SOME = 128  # likewise in float32
Bits = Literal[16, 8, 4]
PARTS = {16: ("packed",), 8: ("packed", "scale"), 4: ("packed", "scale")}


def pack(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor | None]:
    """A weight in fewer bits, and its scales; `unpack` gives it back, rounded.

    With 8 bits the largest of a row becomes 127. With 4 bits the largest of a group becomes -8,
    whatever its sign: of the sixteen numbers -8 to 7 all are used.

    Args:
        weight: (N, D) of any float dtype; with 4 bits D is a multiple of `GROUP`.

    Returns:
        16 bits: (N, D) bfloat16 and None. 8: (N, D) int8 and (N,) float32. 4: (N, G, GROUP / 2)
        uint8, of which each holds input j of a group below and input GROUP / 2 + j above, plus
        8; and (N, G) float32.

    Raises:
        ValueError: if a weight is not finite, or D not a multiple of GROUP.
    """
    if bits == 16:
        return weight.to(torch.bfloat16, copy=True), None
    if bits == 4 and weight.shape[1] % GROUP:
        raise ValueError(
            f"{weight.shape[1]} inputs are no multiple of {GROUP}, which share a scale in 4 bits; "
            "take 8 bits"
        )
    packed, scale = packed_like(weight, bits)
    rows = max(1, PIECE // weight.shape[1])
    pieces = zip(*(each.split(rows) for each in (weight, packed, scale)), strict=True)
    for piece, of_packed, of_scale in pieces:
        for place, values in zip(
            (of_packed, of_scale), _pack_rows(piece.float(), bits), strict=True
        ):
            place.copy_(values)
    return packed, scale


def packed_like(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor | None]:
    """Room for what `pack` gives, on the device of the weight."""
    n, width = weight.shape
    if bits == 16:
        return weight.new_empty(n, width, dtype=torch.bfloat16), None
    if bits == 8:
        return weight.new_empty(n, width, dtype=torch.int8), weight.new_empty(
            n, dtype=torch.float32
        )
    groups = n, width // GROUP
    packed = weight.new_empty(*groups, GROUP // 2, dtype=torch.uint8)
    return packed, weight.new_empty(groups, dtype=torch.float32)


def _pack_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("a weight is infinite or not a number, which no scale can hold")
    if bits == 8:
        scale = weight.abs().amax(1) / 127
        whole = (weight / _nonzero(scale)[:, None]).round_()
        # A scale so small that float32 rounds it may give more than 127.
        return whole.clamp_(-127, 127).to(torch.int8), scale
    groups = weight.unflatten(1, (-1, GROUP))  # (rows, G, GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))[..., 0]
    scale = largest / -8
    whole = (groups / _nonzero(scale)[..., None]).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    low, high = whole.chunk(2, dim=2)
    return low | (high << 4), scale


def unpack(packed: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, D) of what `pack` gives, or of some of its rows."""
    if packed.dtype == torch.uint8:
        whole = torch.cat([packed & 15, packed >> 4], dim=-1).to(dtype).sub_(8)
        return whole.mul_(scale[..., None].to(dtype)).flatten(-2)
    found = packed.to(dtype)
    return found if scale is None else found.mul_(scale[..., None].to(dtype))


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale)


class Packed(nn.Module):
    """What layers of packed weights have in common.

    Attributes:
        packed, scale: see `pack`.
    """

    def __init__(self, packed: Tensor, scale: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[0]

    @property
    def weight(self) -> Tensor:
        """(N, D) float32, made anew at each look."""
        return unpack(self.packed, self.scale)

    def _apply(self, fn, recurse=True):
        """What `.to()` and `.bfloat16()` do; a scale stays float32, whatever they say."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None:
            self.scale = scale.to(self.packed.device)
        return self


class PackedLinear(Packed):
    """A linear layer of packed weights.

    On a CPU few rows are multiplied with the packed weights themselves, `mptbook.infer.kernels`.
    For many rows products take longer than weights, and weights are widened first: to bfloat16
    where that is asked for and the device has units for it, else to float32, which does not pay
    for 8 bits.
    """

    def __init__(self, packed: Tensor, scale: Tensor | None, bias: Tensor | None) -> None:
        super().__init__(packed, scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., N), in the dtype of x; under autocast in its dtype, as `nn.Linear`."""
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # Who computes in float32 asks for products as exact as that.
        in_bf16 = dtype.itemsize == 2 and has_bf16(x.device)
        rows = x.reshape(-1, x.shape[-1])
        if device == "cpu" and not x.requires_grad and len(rows) <= self._most_rows(in_bf16):
            found = multiplied(self, rows)
        else:
            found = self._widened_product(rows, torch.bfloat16 if in_bf16 else torch.float32)
            found = found if self.bias is None else found + self.bias
        return found.view(*x.shape[:-1], -1).to(dtype)

    def _most_rows(self, in_bf16: bool) -> float:
        """Rows up to which packed weights are multiplied as fast as widened ones, or faster."""
        if in_bf16:
            return FEW[self.packed.dtype]
        # Products of whole numbers are faster than those of float32, for any number of rows.
        return math.inf if self.packed.dtype == torch.int8 else SOME

    def _widened_product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(R, D) to (R, N), without the bias."""
        if self.packed.dtype == dtype:
            return F.linear(x.to(dtype), self.packed)
        # Some rows of the weight at a time: widened they never leave the processor's cache.
        n = max(1, WIDE // x.shape[-1])
        scales = [None] * -(-len(self.packed) // n) if self.scale is None else self.scale.split(n)
        widen = widened if self.scale is not None and x.device.type == "cpu" else unpack
        pieces = zip(self.packed.split(n), scales, strict=True)
        given = x.to(dtype)
        outs = [F.linear(given, widen(*piece, dtype)) for piece in pieces]
        return torch.cat(outs, dim=-1) if len(outs) > 1 else outs[0]


class PackedEmbedding(Packed):
    """An embedding; where it is tied, the head reads the same weights."""

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape to float32 vectors of D numbers."""
        scale = None if self.scale is None else self.scale[ids]
        return unpack(self.packed[ids], scale)


def is_packed(name: str) -> bool:
    """Whether the weight of a model called `name` is stored in fewer bits."""
    owner = name.split(".")[-2]
    return name.endswith(".weight") and "norm" not in owner and owner not in ("q_ln", "k_ln", "wpe")


def packed_layer(layer: nn.Module, packed: Tensor, scale: Tensor | None) -> Packed:
    """What takes the place of an `nn.Linear` or `nn.Embedding`."""
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(packed, scale)
    bias = layer.bias
    return PackedLinear(packed, scale, None if bias is None else bias.detach())


@torch.no_grad()
def quantize(model: MPT, bits: Bits, look: Callable[[str, float], None] | None = None) -> MPT:
    """Pack the weights of a model, in place, one layer after the other.

    Args:
        bits: 16 is bfloat16: products of few rows then read half of what float32 takes.
        look: called with the name of each weight and its error: the root of the mean square of
            what rounding changed, relative to that of the weight.

    Raises:
        ValueError: see `pack`; the message names the weight.
    """
    for name, weight in [*model.named_parameters()]:
        if is_packed(name):
            owner = name.removesuffix(".weight")
            try:
                packed, scale = pack(weight, bits)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if look is not None:
                look(name, relative_error(weight, packed, scale))
            model.set_submodule(owner, packed_layer(model.get_submodule(owner), packed, scale))
    return model.eval()


def relative_error(weight: Tensor, packed: Tensor, scale: Tensor | None) -> float:
    """See `quantize`."""
    lost = whole = 0.0
    rows = max(1, PIECE // weight.shape[1])
    scales = [None] * -(-len(weight) // rows) if scale is None else scale.split(rows)
    for piece, bits, each in zip(weight.split(rows), packed.split(rows), scales, strict=True):
        lost += float((unpack(bits, each) - piece.float()).square().sum(dtype=torch.float64))
        whole += float(piece.float().square().sum(dtype=torch.float64))
    return (lost / whole) ** 0.5 if whole else 0.0
