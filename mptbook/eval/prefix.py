"""What the contexts of a batch begin with, read once and copied to where each of them needs it.

Dimensions in this file
    B   contexts of a batch
    W   tokens of the longest of them
    P   tokens with which all of them begin
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from mptbook.eval.reader import Reader


class Prefix:
    """The keys and values of what the contexts of a batch begin with, kept for the next batch."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._ids: list[int] = []
        self._cache = DynamicCache()

    def spread(self, contexts: Sequence[list[int]]) -> tuple[Tensor, Tensor, DynamicCache]:
        """Contexts as one block that ends with the last token of each.

        The first P of its W columns are in the cache already. A context that is shorter than
        the longest has its part of the prefix moved to the right, behind its padding; what of
        it is moved out of the P columns is read again, so that nothing has a gap.

        Returns:
            (B, W - P) ids to be read, the (B, W) mask, and the cache of B rows, P tokens each.
        """
        reader = self.reader
        ids, mask = left_padded(contexts, reader.device)
        shared = min(common_begin(contexts), ids.shape[1] - 1)  # one token at least is read
        if not shared:
            return ids, mask, DynamicCache()
        self._read(max(contexts, key=len)[:shared])
        padding = (~mask).sum(1)  # (B,)
        source = torch.arange(shared, device=reader.device) - padding[:, None]  # (B, P)
        source = source.clamp(min=0)  # under padding, where it is hidden
        moved = DynamicCache()
        for number, layer in enumerate(self._cache.layers):
            keys, values = (
                kept[0][:, source].transpose(0, 1) for kept in (layer.keys, layer.values)
            )
            moved.update(keys.contiguous(), values.contiguous(), number)
        return ids[:, shared:], mask, moved

    def _read(self, ids: list[int]) -> None:
        """Have the cache hold exactly these tokens."""
        kept = common_begin([self._ids, ids])
        if kept:
            self._cache.crop(kept - len(self._ids))
        else:
            self._cache = DynamicCache()
        if kept < len(ids):
            mask = torch.ones(1, len(ids), dtype=torch.bool, device=self.reader.device)
            new = torch.tensor([ids[kept:]], device=self.reader.device)
            self.reader.logits(new, mask, self._cache, keep=1)
        self._ids = ids


def common_begin(rows: Sequence[list[int]]) -> int:
    """With how many equal tokens all rows begin."""
    return next(
        (n for n, column in enumerate(zip(*rows)) if len(set(column)) > 1),  # noqa: B905
        min(map(len, rows)),
    )


def left_padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, W) ids that end with the last of each row, and the mask of what is no padding."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = True
    return ids.to(device), mask.to(device)
