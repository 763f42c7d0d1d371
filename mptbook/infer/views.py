"""Slots as the cache of `MPT.forward`: on GPUs, and for models that are more than their weights.

Dimensions in this file
    G   key and value heads
    Tq  tokens given now
    K   width of a head
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mptbook.infer.slots import Slots


class Texts:
    """Some slots as the cache of `MPT.forward`, for texts one after the other.

    Several begin in empty slots; a single one goes on with what its slot holds.
    """

    def __init__(
        self, slots: "Slots", chosen: Sequence[int], lengths: Sequence[int], sizes: Sequence[int]
    ) -> None:
        self.slots, self.sizes = slots, sizes
        self.places = [*zip(chosen, lengths, strict=True)]

    def __len__(self) -> int:
        return self.places[0][1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        kept = []
        new = zip(k[0].split(self.sizes, 1), v[0].split(self.sizes, 1), strict=True)
        for (slot, start), size, (keys, values) in zip(self.places, self.sizes, new, strict=True):
            write(self.slots, layer, slot, start, keys, values)
            kept.append(stored(self.slots, layer, slot, start + size, k.dtype))
        keys, values = (torch.cat(parts, dim=1)[None] for parts in zip(*kept, strict=True))
        return [(keys, values)]


class Rows:
    """Several slots as the cache of `MPT.forward`, padded on the left to the longest."""

    def __init__(self, slots: "Slots", chosen: Sequence[int], lengths: Sequence[int]) -> None:
        self.slots, self.chosen, self.lengths = slots, chosen, lengths
        longest = max(lengths) + 1
        filled = torch.tensor(lengths, device=slots.model.device)[:, None] + 1
        place = torch.arange(longest, device=filled.device)
        self.documents = (place >= longest - filled).long()  # 0 is padding

    def __len__(self) -> int:
        return max(self.lengths)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = len(self.chosen), k.shape[1], max(self.lengths) + 1, k.shape[3]
        keys, values = k.new_zeros(size), v.new_zeros(size)
        for row, (slot, length) in enumerate(zip(self.chosen, self.lengths, strict=True)):
            write(self.slots, layer, slot, length, k[row], v[row])
            kept = stored(self.slots, layer, slot, length + 1, k.dtype)
            keys[row, :, size[2] - length - 1 :], values[row, :, size[2] - length - 1 :] = kept
        return [(keys, values)]


def write(slots: "Slots", layer: int, slot: int, start: int, k: Tensor, v: Tensor) -> None:
    """(G, Tq, K) keys and values into a slot."""
    end = start + k.shape[1]
    kept = (slots.keys, slots.key_scale, k), (slots.values, slots.value_scale, v)
    for numbers, scales, new in kept:
        if scales.numel():
            scale = new.float().abs().amax(2) / 127  # (G, Tq)
            scales[layer, slot, :, start:end] = scale
            new = (new / scale.clamp(min=1e-30)[..., None]).round()
        numbers[layer, slot, :, start:end] = new


def stored(
    slots: "Slots", layer: int, slot: int, end: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(G, end, K) keys and values of a slot, in the dtype that attention computes in."""
    found = []
    for numbers, scales in ((slots.keys, slots.key_scale), (slots.values, slots.value_scale)):
        kept = numbers[layer, slot, :, :end]
        if scales.numel():
            kept = kept * scales[layer, slot, :, :end, None]
        found.append(kept.to(dtype))
    return found[0], found[1]
