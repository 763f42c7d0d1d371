"""Keys and values of the tokens read so far, so that each is computed once.

Dimensions in this file
    B   batch
    G   key and value heads
    Tq  tokens of one call
    K   width of a head
"""

import torch
from torch import Tensor

from mptbook.model.horizon import horizons, static_ranges, tolerance
from mptbook.model.mpt import MPT


class KVCache:
    """Grows as the model reads; give the same one to every call of `MPT.forward`.

    Room is doubled when it runs out, so that reading T tokens one by one copies at most
    2 T of them and not T squared.

    Args:
        n_layers: layers of the model.
        room: tokens to make room for at first.
    """

    def __init__(self, n_layers: int, room: int = 256) -> None:
        self._room = room
        self._kept: list[Tensor | None] = [None] * n_layers  # (2, B, G, room, K) each
        self._lengths = [0] * n_layers

    def __len__(self) -> int:
        """Tokens that every layer has seen."""
        return self._lengths[-1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Append (B, G, Tq, K) keys and values of a layer; views of all of its tokens."""
        start = self._lengths[layer]
        end = start + k.shape[2]
        kept = self._kept[layer]
        if kept is None or kept.shape[3] < end:
            room = max(self._room, end, 0 if kept is None else 2 * kept.shape[3])
            larger = k.new_empty(2, *k.shape[:2], room, k.shape[3])
            if kept is not None:
                larger[:, :, :, :start] = kept[:, :, :, :start]
            self._kept[layer] = kept = larger
        kept[0, :, :, start:end] = k
        kept[1, :, :, start:end] = v
        self._lengths[layer] = end
        return [(kept[0, :, :, :end], kept[1, :, :, :end])]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens; what comes next is appended to them."""
        self._lengths = [min(length, seen) for seen in self._lengths]

    @property
    def bytes(self) -> int:
        """Memory taken, spare room included."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept if kept is not None)


class HorizonCache:
    """A cache that forgets, head by head, what can no longer change an output.

    A head keeps the keys within its horizon, which follows from the weights: whatever text
    comes, what is forgotten would change an output by less than rounding does. See
    `mptbook.model.horizon`. Memory stops growing once a text is longer than every horizon.

    Args:
        windows: for each layer, (G,) how many keys a head needs, from `windows_of`.
    """

    def __init__(self, windows: list[list[int]]) -> None:
        self._windows = windows
        # For each layer and head, (2, B, 1, room, K), and how much of the room is taken.
        self._kept: list[list[Tensor | None]] = [[None] * len(heads) for heads in windows]
        self._taken = [[0] * len(heads) for heads in windows]
        self._seen = [0] * len(windows)

    def __len__(self) -> int:
        """Tokens that every layer has seen, forgotten ones included."""
        return self._seen[-1]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Append (B, G, Tq, K) keys and values of a layer; for each head those it needs."""
        self._seen[layer] += k.shape[2]
        both = torch.stack([k, v])  # (2, B, G, Tq, K)
        return [
            self._extend_head(layer, head, both[:, :, head, None]) for head in range(k.shape[1])
        ]

    def _extend_head(self, layer: int, head: int, both: Tensor) -> tuple[Tensor, Tensor]:
        kept, taken, new = self._kept[layer][head], self._taken[layer][head], both.shape[3]
        window = self._windows[layer][head]
        past = min(taken, window - 1)  # what the first new query can need
        if kept is not None and taken + new <= kept.shape[3]:
            kept[:, :, :, taken : taken + new] = both
            self._taken[layer][head] = taken + new
            k, v = kept[:, :, :, taken - past : taken + new]
            return k, v
        whole = both if not past else torch.cat([kept[:, :, :, taken - past : taken], both], dim=3)
        keep = min(window - 1, whole.shape[3])
        # Twice what is kept, so that a key moves once in as many steps as there are keys.
        kept = both.new_empty(*both.shape[:3], 2 * keep + 16, both.shape[4])
        kept[:, :, :, :keep] = whole[:, :, :, whole.shape[3] - keep :]
        self._kept[layer][head], self._taken[layer][head] = kept, keep
        k, v = whole
        return k, v

    @property
    def bytes(self) -> int:
        """Memory taken, spare room included."""
        heads = (kept for layer in self._kept for kept in layer if kept is not None)
        return sum(kept.numel() * kept.element_size() for kept in heads)


def windows_of(model: MPT, error: float | None = None) -> list[list[int]]:
    """How many keys each key head of each layer can need, whatever the text.

    Args:
        error: the largest change of an output, as for `mptbook.model.horizon.horizons`; None:
            what is lost in the rounding of the model's dtype.

    Returns:
        (G,) for each layer; a shared key head serves the farthest-sighted of its query heads.
    """
    error = tolerance(next(model.parameters()).dtype) if error is None else error
    windows = []
    for block in model.transformer.blocks:
        ranges = static_ranges(block.attn, block.norm_1)
        needed = horizons(model.slopes, ranges, error)
        windows.append(needed.unflatten(0, (block.attn.kv_heads, -1)).amax(1).tolist())
    return windows
