"""Keys and values of the tokens read so far, so that each is computed once.

Dimensions in this file
    B   batch
    G   key and value heads
    Tq  tokens of one call
    K   width of a head
"""

from torch import Tensor


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

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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
        return kept[0, :, :, :end], kept[1, :, :, :end]

    @property
    def bytes(self) -> int:
        """Memory taken, spare room included."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept if kept is not None)
